"""How ranks divide what a run keeps: one description of one device, of DeepSpeed's ZeRO and of PyTorch's FSDP2.

A *piece* is a tensor that the optimizer of one rank updates. Layouts differ in what pieces are:

    whole   every trained parameter (one device; ZeRO stage 0)
    flat    a part of the parameters of a group, laid end to end and cut into N (ZeRO stage 1 and 2)
    rows    ceil(rows / N) rows of every trained parameter (FSDP2)

Everything is counted of the fullest rank, from its pieces. n trained parameters, N parts, e bytes per number in
train.dtype; m bytes of a trained value where it is its own master, 4, or with optim.master=bf16 2; and of a block (a
transformer layer) or of the root (embedding, last norm, head) the same with an index:

                          whole       flat, stage 1    flat, stage 2    rows                 rows, shard_frozen
    W, P                  w           w                w                w                    w / N
    trained parameters    e n         e n              e n              m n / N              m n / N
    masters               4 n or 0    4 n / N          4 n / N          –                    –
    moments               2.03 n      2.03 n / N       2.03 n / N       2.03 n / N           2.03 n / N
    gradients             e n         e n              e n / N          m n / N              m n / N
    gathered, root        –           –                –                e n_root             e n_root
    gathered, blocks      –           –                –                2 e n_block          2 (e n_block + w_block)
    being reduced         –           bucket           bucket           (e + 4) n_block      (e + 4) n_block
      of the root         –           –                –                (e + 4) n_root       (e + 4) n_root
    a layer's W, P, whole –           –                –                –                    2 w_layer

ZeRO keeps masters of float32 parameters too, and at stage 2 the whole gradient of every parameter that a partition
touches, so that large parameters are divided less; its reduction buckets are of their full size however small the model
is (measured in benchmarks/results/ranks). FSDP2 gathers a block into one buffer and copies it to where it is used: two
blocks' bytes, either both of one block or, in the backward, of one block and of the next one's buffer. With
fsdp.reshard_after_forward=false all blocks stay gathered. A block's gradients wait in train.dtype, beside the float32
buffer of the reduction before; those of the head wait through the whole backward, for the embedding's. At a
re-initialization a layer's owner holds its bytes beside the parts they are put together from. On a CPU, gloo sums
gradients in a copy of their float32 buffer: 8 bytes each instead of e + 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from loqt_ds.config import Config, ConfigError
from loqt_ds.core.quantization import packed_layout
from loqt_ds.memory.facts import Facts
from loqt_ds.memory.formulas import moment_bytes, update_bytes
from loqt_ds.method.conversion import loqt_layers, output_head
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.optim import UPDATE_PIECE


@dataclass(frozen=True)
class Division:
    """What is divided, and among how many. The default: one process, which keeps everything."""

    world_size: int = 1
    layout: Literal["whole", "flat", "rows"] = "whole"
    parts: int = 1
    """How many ranks divide it; under hybrid sharding others hold the same again."""
    gradients: bool = False
    """Whether gradients are divided too."""
    frozen: bool = False
    """Whether W and P are."""
    keeps_gathered: bool = False
    """rows: whether blocks stay gathered from forward to backward."""
    bucket_elements: int = 0
    """flat: of all reduction buckets together."""


def division_of(config: Config, *, world_size: int = 1, ds_config: dict[str, Any] | None = None) -> Division:
    """How `world_size` ranks divide a run: under a DeepSpeed configuration, if there is one, else under config.engine.

    Raises ConfigError for options that the engine does not have, or that do not fit the number of ranks.
    """
    if ds_config is not None:
        if config.optim.layerwise:
            raise ConfigError("optim.layerwise=true: ZeRO updates after the backward; set optim.layerwise=false")
        return _of_deepspeed(ds_config, world_size)
    if config.engine != "fsdp2":
        return Division()
    replicas = config.fsdp.num_replicas
    if world_size % replicas:
        raise ConfigError(
            f"fsdp.num_replicas={replicas} with {world_size} ranks: groups would have different sizes; give a divisor "
            f"of {world_size}"
        )
    return Division(
        world_size=world_size,
        layout="rows",
        parts=world_size // replicas,
        gradients=True,
        frozen=config.fsdp.shard_frozen and world_size > replicas,
        keeps_gathered=not config.fsdp.reshard_after_forward,
    )


def _of_deepspeed(ds_config: dict[str, Any], world_size: int) -> Division:
    zero = ds_config.get("zero_optimization", {})
    zero = {name: value for name, value in zero.items() if value != "auto"}
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1)
    stage = int(zero.get("stage", 0))
    if not stage:
        return Division(world_size)
    return Division(world_size, "flat", world_size, gradients=stage == 2, bucket_elements=bucket)


# ---------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Piece:
    """A tensor that an optimizer updates: its elements, and those of the tensor whose size decides whether its moments
    have 8 bits."""

    numel: int
    decisive: int


def rows_share(shape: Sequence[int], parts: int) -> int:
    """Elements of the fullest of the parts of a tensor that is cut along its first dimension."""
    return -(-shape[0] // parts) * prod(shape[1:])


def pieces(parameters: Sequence[nn.Parameter], division: Division) -> list[Piece]:
    """What the optimizer of the fullest rank updates of a parameter group."""
    if division.layout == "flat":
        share = -(-sum(parameter.numel() for parameter in parameters) // division.parts)
        return [Piece(share, share)]
    if division.layout == "rows":
        return [Piece(rows_share(p.shape, division.parts), p.numel()) for p in parameters]
    return [Piece(parameter.numel(), parameter.numel()) for parameter in parameters]


def _groups(facts: Facts) -> list[list[nn.Parameter]]:
    """The trained parameters, those that ZeRO lays end to end together."""
    others = [parameter for parameter in facts.others.values() if parameter.requires_grad]
    groups = (list(facts.factors.values()), [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2])
    return [group for group in groups if group]


def touched(sizes: Sequence[int], parts: int) -> int:
    """Elements of the parameters that the fullest partition of a flat vector touches."""
    length = -(-sum(sizes) // parts)
    found = [0] * parts
    start = 0
    for size in sizes:
        for part in range(start // length, (start + size - 1) // length + 1):
            found[part] += size
        start += size
    return max(found)


# ---------------------------------------------------------------- what the fullest rank keeps


def num_elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def kept(config: Config, facts: Facts, division: Division) -> dict[str, int]:
    """Bytes of the plan's entries that depend on how state is divided (see the module's table)."""
    e = facts.dtype.itemsize
    groups = _groups(facts)
    own = [piece for group in groups for piece in pieces(group, division)]
    num_own, num_trained = sum(piece.numel for piece in own), num_elements(facts.trained)
    weights_w, projections_p = _packed(facts.layers, facts, division)
    updates_at_once = config.optim.layerwise and config.train.gradient_accumulation_steps == 1
    gradients = 0 if updates_at_once else e * num_trained
    if division.layout == "rows":
        gradients = _value_width(config, facts) * num_own
    elif division.gradients:
        gradients = e * sum(touched([parameter.numel() for parameter in group], division.parts) for group in groups)
    return {
        "weights_w": weights_w,
        "projections_p": projections_p,
        "factors_b": parameter_bytes(list(facts.factors.values()), config, facts, division),
        "full_rank_parameters": parameter_bytes(list(facts.others.values()), config, facts, division),
        "masters": _master_width(config, facts, division) * num_own,
        "moments": sum(moment_bytes(p.numel, optimizer=config.optim.name, decisive=p.decisive) for p in own),
        "gradients": gradients,
        "update_workspace": _update_bytes(own, config, facts, division),
        "export_trained": _whole_bytes(config, facts, division) if config.train.device == "cpu" else 0,
        **_in_flight(config, facts, division),
    }


def bytes_share(num_bytes: int, *, parts: int, word: int) -> int:
    """The fullest of the parts of packed bytes, which are cut between words of the training dtype's size."""
    return -(-num_bytes // (word * parts)) * word


def _packed(layers: Iterable[LoQTLinear], facts: Facts, division: Division) -> tuple[int, int]:
    """Bytes of (W, P) of some layers on the fullest rank."""
    sums = [0, 0]
    for layer in layers:
        for index, (shape, spec) in enumerate(((layer.weight_shape, layer.spec_w), (layer.basis_shape, layer.spec_p))):
            for size in packed_layout(shape, spec).values():
                cut = bytes_share(size, parts=division.parts, word=facts.dtype.itemsize)
                sums[index] += cut if division.frozen else size
    return sums[0], sums[1]


def has_masters(config: Config) -> bool:
    return config.optim.master == "fp32"


def _value_width(config: Config, facts: Facts) -> int:
    """Bytes of a trained number that is its own master."""
    return 4 if has_masters(config) or facts.dtype == torch.float32 else facts.dtype.itemsize


def parameter_bytes(parameters: Sequence[nn.Parameter], config: Config, facts: Facts, division: Division) -> int:
    """Of parameters of any kind; frozen ones stay in the training dtype."""
    e = facts.dtype.itemsize
    if division.layout != "rows":
        return e * num_elements(parameters)
    width = {True: _value_width(config, facts), False: e}
    return sum(width[p.requires_grad] * rows_share(p.shape, division.parts) for p in parameters)


def _master_width(config: Config, facts: Facts, division: Division) -> int:
    if division.layout == "flat":
        return 4 if has_masters(config) else 2
    is_copy = division.layout == "whole" and facts.dtype != torch.float32 and has_masters(config)
    return 4 if is_copy else 0


def _update_bytes(own: Sequence[Piece], config: Config, facts: Facts, division: Division) -> int:
    if division.layout == "flat":
        # Of one partition: its gradient in float32, and Adam's denominator; bf16 masters are updated in pieces.
        partition = sum(piece.numel for piece in own)
        return 8 * partition if has_masters(config) else 12 * min(partition, UPDATE_PIECE)
    is_low = facts.dtype != torch.float32 and not (division.layout == "rows" and has_masters(config))
    return update_bytes(max(piece.numel for piece in own), config, is_low=is_low)


# ---------------------------------------------------------------- what is gathered and reduced


def _in_flight(config: Config, facts: Facts, division: Division) -> dict[str, int]:
    """Parameters gathered for a block, and gradients on their way."""
    e, blocks = facts.dtype.itemsize, facts.blocks
    new = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
    if division.layout != "rows":
        # The gradients of a compiled block come all at once.
        together = [*(new if config.train.compile else []), *([parameter] for parameter in facts.trained)]
        return {"new_gradient": e * max(map(num_elements, together)), "buckets": e * division.bucket_elements}
    return _rows_in_flight(config, facts, division, new)


def _rows_in_flight(
    config: Config, facts: Facts, division: Division, new: Sequence[Sequence[nn.Parameter]]
) -> dict[str, int]:
    """`new`: the trained parameters of each block."""
    e, parts = facts.dtype.itemsize, division.parts
    inside = {id(parameter) for block in facts.blocks for parameter in block.parameters()}
    root = [p for p in (*facts.factors.values(), *facts.others.values()) if id(p) not in inside]
    alone = [layer for layer in facts.layers if id(layer.B) not in inside]
    gathered = [
        _gathered_bytes(list(block.parameters()), list(loqt_layers(block).values()), facts, division)
        for block in facts.blocks
    ]
    output = getattr(output_head(facts.model), "weight", None)
    embedded = {id(module.weight) for module in facts.model.modules() if isinstance(module, nn.Embedding)}
    late = [p for p in root if p.requires_grad and id(p) in embedded and p is not output]
    num_late = num_elements(late)
    num_early = num_elements(p for p in root if p.requires_grad) - num_late
    at_once = sum(gathered) if division.keeps_gathered else min(parts, 2) * max(gathered, default=0)
    return {
        "new_gradient": e * num_early,
        "buckets": (8 if _sums_in_a_copy(config, division) else e + 4) * max(map(num_elements, new), default=0),
        "root_buckets": _root_reduction_bytes(root, num_late, config, facts, division),
        "gathered_root": _gathered_bytes(root, alone, facts, division),
        "gathered_blocks": at_once,
        "gathered_all": sum(gathered),
        "reinit_packed": max(sum(_packed([layer], facts, Division())) for layer in facts.layers)
        if division.frozen
        else 0,
        **_start_bytes(root, late, config, facts, division),
    }


def _sums_in_a_copy(config: Config, division: Division) -> bool:
    """Whether what is reduced is there twice, as gloo has it."""
    return config.train.device == "cpu" and division.parts > 1


def _root_reduction_bytes(
    root: Sequence[nn.Parameter], num_late: int, config: Config, facts: Facts, division: Division
) -> int:
    """Of the last reduction, beside all gradients that a step leaves: the whole gradients and their float32 buffer;
    then of the whole ones the last alone, the buffer and what comes out; and that as it is rounded to bf16 masters."""
    e, width = facts.dtype.itemsize, _value_width(config, facts)
    trained = [parameter for parameter in root if parameter.requires_grad]
    num, num_own = num_elements(trained), sum(rows_share(p.shape, division.parts) for p in trained)
    # Where nothing was accumulated, the root's part of the gradients does not exist until it comes out.
    own = 0 if config.train.gradient_accumulation_steps > 1 else width * num_own
    last = e * num_late if division.parts > 1 else 0
    whole = (e + 4) * num - own
    reduced = (8 if _sums_in_a_copy(config, division) else 4) * num + 4 * num_own - own + last
    rounded = 4 * num + (4 * num_own if width != 4 else 0) + last
    return max(whole, reduced, rounded)


def _start_bytes(
    root: Sequence[nn.Parameter], late: Sequence[nn.Parameter], config: Config, facts: Facts, division: Division
) -> dict[str, int]:
    """Of what is whole before it is sharded, beside the shards: a block as its layers are made, in the training dtype;
    then a block, or the root, in float32 where this is their master."""
    e, undivided = facts.dtype.itemsize, replace(division, parts=1)
    frozen = [sum(_packed(loqt_layers(b).values(), facts, Division())) if division.frozen else 0 for b in facts.blocks]
    made = [e * num_elements(block.parameters()) + bytes_w for block, bytes_w in zip(facts.blocks, frozen, strict=True)]
    cast = [
        parameter_bytes(list(block.parameters()), config, facts, undivided) + bytes_w
        for block, bytes_w in zip(facts.blocks, frozen, strict=True)
    ]
    # Ranks make a module each, so that some of the next block are there when one is complete.
    num_modules = min((sum(1 for m in b.modules() if m._parameters) for b in facts.blocks), default=1)
    ahead = int(min(division.world_size - 1, num_modules) / num_modules * max(made, default=0))
    # The embedding is made first, and sharded last.
    embedding = max(0, e * num_elements(late) - parameter_bytes(late, config, facts, division))
    # The head is drawn in float32 when all of the root is there.
    root_made = e * num_elements(root) + 4 * max((p.numel() for p in root), default=0)
    root_made -= parameter_bytes(root, config, facts, division)
    return {
        "start_made": max(made, default=0) + ahead + embedding,
        "start_cast": max(
            max(cast, default=0) + ahead + embedding, parameter_bytes(root, config, facts, undivided), root_made
        ),
    }


def _whole_bytes(config: Config, facts: Facts, division: Division) -> int:
    """Of the whole model after training on rank 0, and of the masters where there are any."""
    e, is_copied = facts.dtype.itemsize, has_masters(config) and facts.dtype != torch.float32
    parameters = num_elements([*facts.factors.values(), *facts.others.values()])
    masters = 4 if is_copied or (division.layout == "flat" and has_masters(config)) else 0
    buffers = sum(buffer.numel() * buffer.dtype.itemsize for buffer in facts.model.buffers())
    return e * parameters + masters * num_elements(facts.trained) + buffers


def _gathered_bytes(
    parameters: Sequence[nn.Parameter], layers: Sequence[LoQTLinear], facts: Facts, division: Division
) -> int:
    """Of parameters, and of W and P of some layers where these are sharded, as all ranks' parts come together: whole
    ones, and what fills up the last rank's part."""
    values = sum(rows_share(parameter.shape, division.parts) for parameter in parameters)
    packed = sum(_packed(layers, facts, division)) if division.frozen else 0
    return division.parts * (facts.dtype.itemsize * values + packed)
