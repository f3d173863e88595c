"""The plan of a run: what stays is counted on the meta device, what comes and goes is estimated by `formulas`; what of
it a rank has is `division`'s affair, and what is alive together is `phases`'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from loqt_ds.config import Config
from loqt_ds.core.quantization import QuantSpec, packed_layout
from loqt_ds.memory.division import Division, division_of, kept, parameter_bytes
from loqt_ds.memory.facts import Facts, describe
from loqt_ds.memory.formulas import (
    activation_bytes,
    answer_bytes,
    block_workspace_bytes,
    decompose_bytes,
    encode_bytes,
    gathered_bytes,
    loss_bytes,
    packed_bytes,
    rebuild_bytes,
)
from loqt_ds.memory.phases import STAYS, phases_of
from loqt_ds.method.conversion import loqt_layers, output_head
from loqt_ds.method.description import training_dtype

GIB = 2**30
CONTEXT_BYTES = GIB  # a CUDA context and what the allocator keeps to itself
INTERPRETER_BYTES = GIB // 2  # on a CPU: Python and the libraries

LABELS = {
    "weights_w": "W, packed",
    "projections_p": "P, packed",
    "factors_b": "B",
    "full_rank_parameters": "other parameters",
    "masters": "fp32 masters",
    "moments": "Adam's moments",
    "buffers": "other buffers",
    "context": "device context and cache, or interpreter",
    "start_workspace": "one layer in fp32, as it is made",
    "start_made": "a block, whole as it is made",
    "start_cast": "what is sharded at once, whole",
    "gathered_root": "embedding and head, gathered",
    "gathered_blocks": "blocks, gathered",
    "gathered_all": "all blocks, gathered",
    "gradients": "gradients kept",
    "new_gradient": "one new gradient",
    "buckets": "gradients being reduced",
    "root_buckets": "those of embedding and head, being reduced",
    "activations": "activations",
    "tapped_inputs": "inputs kept for a re-initialization",
    "loss": "a block of logits, and the loss",
    "dequantized": "one dequantized matrix",
    "dequantized_kept": "W kept dequantized",
    "recomputed_block": "activations of one block, computed again",
    "block_workspace": "backward of one block",
    "update_workspace": "update of one parameter",
    "reinit_gathered": "gradients or sketches gathered",
    "reinit_begun": "those of the first block",
    "reinit_owned": "those of a rank's own layers",
    "reinit_decompose": "finding one layer's P",
    "reinit_pending": "new P, waiting for the update",
    "reinit_packed": "one layer's W and P, whole on its owner",
    "reinit_rebuild": "one layer merged and compensated",
    "answers": "keys and values of a batch of answers",
    "export_trained": "the trained model, whole, and its masters",
    "export_model": "the export, loaded to be compared",
    "export_workspace": "one layer as it is exported",
}


@dataclass
class MemoryPlan:
    """Bytes by entry, and which of them are alive together."""

    name: str
    dtype: str
    entries: dict[str, int]
    """Bytes of every entry of LABELS."""
    phases: dict[str, tuple[str, ...]]
    """Phase of a run (start, step, re-initialization, evaluation, export), or moment of one -> what is alive in it."""
    num_adapted: int
    """Weights in adapted matrices."""
    num_trained: int
    """Trained parameters: B and those trained in full."""
    num_tokens: int
    """Tokens of a micro-batch."""
    notes: list[str] = field(default_factory=list)

    @property
    def persistent_bytes(self) -> int:
        """Of tensors that stay for the whole run."""
        return sum(self.entries[name] for name in STAYS)

    def phase_bytes(self, phase: str) -> int:
        """What is alive in it."""
        return sum(self.entries[name] for name in self.phases[phase])

    def peak_bytes(self, of: str) -> int:
        """The largest phase of one of `parts_of_run`: of those that begin with its name."""
        return max(self.phase_bytes(phase) for phase in self.phases if phase.split(":")[0] == of)

    @property
    def total_bytes(self) -> int:
        """The peak: the largest phase."""
        return max(self.phase_bytes(phase) for phase in self.phases)

    @property
    def total_gib(self) -> float:
        """The peak in GiB."""
        return self.total_bytes / GIB

    @property
    def parts_of_run(self) -> list[str]:
        """start, step, re-initialization, evaluation where answers are generated, export."""
        return list(dict.fromkeys(phase.split(":")[0] for phase in self.phases))

    def summary(self) -> str:
        """One line: the peak, and of what."""
        peaks = ", ".join(f"{part} {self.peak_bytes(part) / GIB:.2f}" for part in self.parts_of_run)
        stays = f"{self.persistent_bytes / GIB:.2f} stay, {self.num_tokens:,} tokens at once"
        return f"{self.total_gib:.2f} GiB ({stays}; {peaks})"

    def lines(self) -> list[str]:
        """A table for people."""

        def row(label: str, num_bytes: int, remark: str = "") -> str:
            return f"  {label:<58}{num_bytes / GIB:>9.3f} GiB{remark}"

        rows = [f"memory of {self.name} in {self.dtype}, {self.num_tokens:,} tokens in a micro-batch"]
        rows += [f"  {self.num_adapted:,} weights adapted, {self.num_trained:,} parameters trained"]
        for name, label in LABELS.items():
            if self.entries[name]:
                rows.append(row(label, self.entries[name], "" if name in (*STAYS, "context") else "  for a while"))
        rows.append(row("stays", self.persistent_bytes))
        rows += [row(f"peak of {phase}", self.phase_bytes(phase)) for phase in self.phases]
        rows.append(row("total", self.total_bytes))
        return rows + [f"  {note}" for note in self.notes]


# ---------------------------------------------------------------- counting


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in parameters)


def plan(
    config: Config, *, vocab_size: int | None = None, division: Division | None = None, facts: Facts | None = None
) -> MemoryPlan:
    """The memory a run of `config` needs on one device, or on the fullest of several ranks; nothing of the model is
    allocated.

    Args:
        vocab_size: rows of embedding and head, where they are known from the tokenizer.
        division: what ranks divide (`division_of`); None: that of one process.
        facts: what `describe` said of the same model, to plan for other steps with it.

    Raises ValueError as `describe`.
    """
    facts = describe(config, vocab_size=vocab_size) if facts is None else facts
    division = division_of(config) if division is None else division
    model, description, dtype, layers = facts.model, facts.description, facts.dtype, facts.layers
    packed = {id(buffer) for layer in layers for buffer in layer.buffers()}
    changed = facts.lean if config.train.lean_activations else frozenset()
    activations, tapped, block = activation_bytes(config, model, description, dtype, lean=changed)
    export = _export_bytes(config, facts)
    largest = max(prod(layer.weight_shape) for layer in layers)
    found: dict[str, int] = {
        "buffers": sum(b.numel() * b.dtype.itemsize for b in model.buffers() if id(b) not in packed),
        "context": INTERPRETER_BYTES if config.train.device == "cpu" else CONTEXT_BYTES,
        "start_workspace": _start_bytes(config, facts, division, largest),
        "activations": activations,
        "tapped_inputs": tapped,
        "loss": loss_bytes(config, description, dtype, head=facts.head),
        "dequantized": _dequantized_bytes(config, facts),
        "dequantized_kept": sum(layer.dequantized_bytes for layer in layers if layer.keeps_dequantized),
        "recomputed_block": block,
        "block_workspace": block_workspace_bytes(config, description, dtype),
        "answers": answer_bytes(config, description, dtype) if config.eval.metric == "exact_match" else 0,
        "export_model": export,
        "export_workspace": 2 * 4 * largest if export else 0,
        **kept(config, facts, division),
        **_reinit_bytes(config, facts, division),
    }
    return MemoryPlan(
        name=config.name,
        dtype=str(dtype).removeprefix("torch."),
        entries=dict.fromkeys(LABELS, 0) | found,
        phases=phases_of(config, division),
        num_adapted=sum(layer.in_features * layer.out_features for layer in layers),
        num_trained=sum(parameter.numel() for parameter in facts.trained),
        num_tokens=config.train.micro_batch_size * config.data.sequence_length,
        notes=facts.notes + _notes(config, division),
    )


def _reinit_bytes(config: Config, facts: Facts, division: Division) -> dict[str, int]:
    """Of what a re-initialization gathers, finds and rebuilds; W and P of layers apart."""
    world_size, layers = division.world_size, facts.layers
    gathered = [gathered_bytes(layer, config, world_size) for layer in layers]
    in_blocks = [sum(gathered_bytes(la, config, world_size) for la in loqt_layers(b).values()) for b in facts.blocks]
    # One process finds the P of a layer inside the layer's own backward; of a compiled block all layers come at once.
    at_once = in_blocks if config.train.compile else []
    steps, one_process = config.train.gradient_accumulation_steps, world_size == 1
    updates_at_once = config.optim.layerwise and steps == 1
    return {
        "reinit_gathered": max(gathered + at_once) if one_process and steps == 1 else sum(gathered),
        "reinit_begun": sum(gathered) if steps > 1 else max(in_blocks, default=sum(gathered)),
        "reinit_owned": -(-sum(gathered) // world_size) + (0 if one_process else max(gathered)),
        "reinit_decompose": max(decompose_bytes(layer, config, world_size) for layer in layers),
        "reinit_pending": packed_bytes(facts.model)[1] if one_process and not updates_at_once else 0,
        "reinit_rebuild": max(rebuild_bytes(layer, config) for layer in layers),
    }


def _notes(config: Config, division: Division) -> list[str]:
    """What options do that may not be what was meant."""
    notes, steps = [], config.train.gradient_accumulation_steps
    if config.optim.layerwise and steps > 1:
        notes.append(
            f"optim.layerwise with train.gradient_accumulation_steps={steps} keeps a gradient of every parameter "
            "between micro-batches"
        )
    if config.fsdp.shard_frozen and not division.frozen:
        ranks, replicas = division.world_size, config.fsdp.num_replicas
        alone = f"each of {ranks} ranks is a group of its own (fsdp.num_replicas={replicas})"
        alone = alone if ranks > 1 else "there is one rank"
        notes.append(f"fsdp.shard_frozen=true shards nothing: {alone}, and has W and P whole")
    return notes


def _dequantized_bytes(config: Config, facts: Facts) -> int:
    """Of the buffer as large as the largest matrix that has to be dequantized, or merged; where layers are merged,
    P has another."""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    sizes, beside = [0], [0]
    for layer in facts.layers:
        basis = prod(layer.basis_shape) if config.loqt.quantize_p != "none" else 0
        merged = layer.product_of(tokens, facts.dtype, training=True) == "merged"
        if merged or (config.loqt.quantize_w != "none" and not layer.keeps_dequantized):
            sizes.append(prod(layer.weight_shape))
        (beside if merged else sizes).append(basis)
    return facts.dtype.itemsize * (max(sizes) + max(beside))


def _start_bytes(config: Config, facts: Facts, division: Division, largest: int) -> int:
    """Of making one parameter in fp32, and of quantizing it where it is a layer's, of at most `largest` values. The
    output head comes after all layers: it is not there yet when these are quantized."""
    output = output_head(facts.model)
    weight = getattr(output, "weight", None)
    head_bytes = parameter_bytes([p for p in facts.others.values() if p is weight], config, facts, division)
    # What is sharded is made where nothing else is yet, or as `division` counts it.
    made = [] if division.layout == "rows" else [4 * parameter.numel() for parameter in facts.others.values()]
    quantized = 4 * largest + encode_bytes(largest, next(iter(facts.layers)).spec_w, config)
    return max(4 * largest, quantized - head_bytes, *made)


def _export_bytes(config: Config, facts: Facts) -> int:
    """Of the model that is written, loaded again and compared."""
    form = config.export.format
    if form == "none":
        return 0
    others = sum(parameter.numel() for parameter in facts.others.values())
    if form == "gguf":  # compared on the host: what was meant, its rounding, and what transformers loads, in float32
        weights = others + sum(prod(layer.weight_shape) for layer in facts.layers)
        return 3 * 4 * weights if config.train.device == "cpu" else 0
    dtype = training_dtype(config) if form == "adapter" else torch.bfloat16
    dense_kinds = {"int4": "none"} if form == "adapter" else {"int4": "nf4", "none": "nf4"}
    kind = "none" if form == "bf16" else dense_kinds.get(config.loqt.quantize_w, config.loqt.quantize_w)
    dense = QuantSpec("none", dense_dtype=dtype)
    spec = QuantSpec(kind, dense_dtype=dtype)
    # Experts are written dense.
    specs = [dense if layer.is_conditional else spec for layer in facts.layers]
    adapted = sum(sum(packed_layout(la.weight_shape, s).values()) for la, s in zip(facts.layers, specs, strict=True))
    factors = sum(prod(layer.basis_shape) + layer.factor_length * layer.rank for layer in facts.layers)
    return adapted + dtype.itemsize * others + (4 * factors if form == "adapter" else 0)
