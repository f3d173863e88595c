"""What a run will need on one device, or on each of several ranks, counted before anything is allocated.

The model is built on the meta device and converted as it will be for training, so that everything that stays is counted
exactly: packed W and P by `packed_layout`, trained parameters, masters, and moments tensor by tensor (bitsandbytes
keeps tensors below 4096 elements in 32 bits; others take 2 bytes an element and 8 bytes for each block of 256).

What comes and goes is estimated. Per token and transformer layer, with e bytes per activation (2 in bf16, 4 in fp32), h
hidden, a attention width (heads * head size), i intermediate:

    two RMSNorms     2 (4 h + e h)         the float32 copy and the normalized input; 2 * 2 e h in fp32 (no copy)
    attention        4 e a + 4 heads       q, k, v, output; log-sum-exp
       eager         3 e a + (4 + e) heads s     q, k, v; softmax over s = sequence in float32 and its copy (4 heads s
                                           in fp32)
    gated MLP        3 e i                 gate, its activation, up
    LoQT linear      e r                   x P where in <= out;   e in (its input x) where in > out, and on both while
                                           tapped for a re-initialization (once for those that share it)
    other linear     e in                  its input, once for those that share it

For a Llama in bf16 with square attention this is the 20 h + 8 i + 12 r of ARCHITECTURE.md's layer. Activation
checkpointing keeps one input of e h per token and layer, and the above for one layer at a time. The logits:
log-softmax, its gradient and that of the logits in float32, 12 bytes a token and vocabulary entry.

Re-initialization (ARCHITECTURE.md): while the micro-batches of a step run, a gradient (exact, gram) or a sketch for
each layer, 4 or e bytes an entry; with one micro-batch a step only one layer's at a time. Then one layer's float32
workspace. The total is the largest of the phases of a step, on top of what stays.

Under ZeRO (stage 1 and 2) masters and moments are divided by the number of ranks; there is a master also of float32
parameters. At stage 2 a rank keeps the whole gradient of every parameter that its partition touches, so that large
parameters are divided less. Reduction buckets, of their full size however small the model is, and during the update the
gradient of a partition in float32, are on top (measured in benchmarks/results/ranks).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loqt_ds.config import Config, load_config
from loqt_ds.core.quantization import packed_layout
from loqt_ds.method.controller import NUM_PROBES, sketch_columns, subspace_method
from loqt_ds.method.conversion import build_meta, loqt_layers, output_head
from loqt_ds.method.description import model_description, training_dtype
from loqt_ds.method.linear import LoQTLinear

GIB = 2**30
MIN_8BIT_SIZE = 4096  # bitsandbytes' min_8bit_size
MOMENT_BLOCKSIZE = 256

LABELS = {
    "weights_w": "W, packed",
    "projections_p": "P, packed",
    "factors_b": "B",
    "full_rank_parameters": "parameters trained in full",
    "masters": "fp32 masters",
    "moments": "Adam's moments",
    "buffers": "other buffers",
    "gradients": "gradients",
    "buckets": "buckets of gradients to be reduced",
    "activations": "activations",
    "tapped_inputs": "inputs kept for a re-initialization",
    "logits": "logits and loss",
    "dequantized": "one layer's W and P, dequantized",
    "update_workspace": "update of one parameter",
    "reinit_gathered": "gradients or sketches gathered",
    "reinit_workspace": "one layer in fp32",
}
PERSISTENT = ("weights_w", "projections_p", "factors_b", "full_rank_parameters", "masters", "moments", "buffers")


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed divides the trained state. bucket_elements: of all reduction buckets together."""

    stage: int
    world_size: int
    bucket_elements: int

    @property
    def parts(self) -> int:
        """Into how many parts masters and moments are divided."""
        return self.world_size if self.stage else 1


def zero_of(ds_config: dict[str, Any], world_size: int) -> Zero:
    """What a DeepSpeed configuration says of it."""
    zero = ds_config.get("zero_optimization", {})
    zero = {name: value for name, value in zero.items() if value != "auto"}
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1)
    stage = int(zero.get("stage", 0))
    return Zero(stage, world_size, bucket if stage else 0)


@dataclass
class MemoryPlan:
    """Bytes by entry, and which of them are alive together."""

    name: str
    dtype: str
    entries: dict[str, int]
    """Bytes of every entry of LABELS."""
    phases: dict[str, tuple[str, ...]]
    """Phase of a step -> the entries alive in it besides those that stay."""
    num_adapted: int
    """Weights in adapted matrices."""
    num_trained: int
    """Trained parameters: B and those trained in full."""
    notes: list[str] = field(default_factory=list)

    @property
    def persistent_bytes(self) -> int:
        """What stays for the whole run."""
        return sum(self.entries[name] for name in PERSISTENT)

    def phase_bytes(self, phase: str) -> int:
        """What stays and what the phase adds."""
        return self.persistent_bytes + sum(self.entries[name] for name in self.phases[phase])

    @property
    def total_bytes(self) -> int:
        """The peak: the largest phase."""
        return max(self.phase_bytes(phase) for phase in self.phases)

    @property
    def total_gib(self) -> float:
        """The peak in GiB."""
        return self.total_bytes / GIB

    def lines(self) -> list[str]:
        """A table for people."""

        def row(label: str, num_bytes: int, remark: str = "") -> str:
            return f"  {label:<40}{num_bytes / GIB:>9.3f} GiB{remark}"

        rows = [f"memory of {self.name} in {self.dtype}"]
        rows += [f"  {self.num_adapted:,} weights adapted, {self.num_trained:,} parameters trained"]
        for name, label in LABELS.items():
            if self.entries[name]:
                rows.append(row(label, self.entries[name], "" if name in PERSISTENT else "  for a while"))
        rows.append(row("stays", self.persistent_bytes))
        rows += [row(f"peak in {phase}", self.phase_bytes(phase)) for phase in self.phases]
        rows.append(row("total", self.total_bytes))
        return rows + [f"  {note}" for note in self.notes]


def moment_bytes(num_elements: int, *, optimizer: str) -> int:
    """Bytes of Adam's two moments of one tensor: 8 an element in 32 bits; in 8 bits 2, and 8 for each block of 256."""
    if optimizer == "adamw" or num_elements < MIN_8BIT_SIZE:
        return 8 * num_elements
    return 2 * num_elements + 8 * -(-num_elements // MOMENT_BLOCKSIZE)


def planned_vocab_size(config: Config, described: int) -> tuple[int, str | None]:
    """Rows of embedding and head before a tokenizer was loaded, and a note where they are a guess."""
    wanted = config.model.vocab_size
    if wanted is None:
        return described, None
    if wanted != "auto":
        return int(wanted), None
    if config.data.tokenizer is None:
        return -(-config.data.tokenizer_vocab_size // 64) * 64, None
    return described, f"model.vocab_size=auto: counted with the {described} of the shape file, not the tokenizer's size"


def planned_model(config: Config, *, vocab_size: int | None = None) -> tuple[Any, list[str]]:
    """The transformers configuration of the model to plan for, and notes."""
    described = model_description(config, vocab_size=vocab_size)
    if vocab_size is not None:
        return described, []
    described.vocab_size, note = planned_vocab_size(config, int(described.vocab_size))
    return described, [note] if note else []


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _packed_bytes(layers: Sequence[LoQTLinear]) -> tuple[int, int]:
    weights = sum(sum(packed_layout(layer.weight_shape, layer.spec_w).values()) for layer in layers)
    projections = sum(sum(packed_layout(layer.basis_shape, layer.spec_p).values()) for layer in layers)
    return weights, projections


def gathered_bytes(layer: LoQTLinear, config: Config) -> int:
    """One layer's gradient in float32; or its sketch with the columns it is taken with, in the activations' dtype."""
    k, length = layer.basis_shape[0], layer.factor_length
    if subspace_method(layer, config.loqt.subspace) == "sketch":
        columns = sketch_columns(layer, config.loqt.sketch_oversampling) + NUM_PROBES
        return training_dtype(config).itemsize * (k + length) * columns
    return 4 * k * length


def reinit_workspace_bytes(layer: LoQTLinear, config: Config) -> int:
    """Float32 temporaries of one layer's re-initialization: the larger of decomposing and of compensating.

    Compensation: the merged weight, one residual of its size, P̂ old and new, B old, its candidate and the best; the
    new packed W beside the old. Decomposition: for gram the (k, k) matrix, its eigenvectors and workspace in float64;
    for the sketch S, its QR and Ω; for exact the left and right factors and LAPACK's copy.
    """
    (k, rank), length = layer.basis_shape, layer.factor_length
    compensate = 4 * (2 * k * length + 2 * k * rank + 3 * length * rank)
    compensate += sum(packed_layout(layer.weight_shape, layer.spec_w).values())
    method = subspace_method(layer, config.loqt.subspace)
    if method == "sketch":
        columns = sketch_columns(layer, config.loqt.sketch_oversampling) + NUM_PROBES
        decompose = 4 * (2 * k * columns + 2 * columns**2 + 2 * length * columns)
    elif method == "gram":
        decompose = 8 * 3 * k * k + 4 * k * rank
    else:
        decompose = 4 * (2 * k * length + k * k)
    return max(compensate, decompose)


def _widths(description: Any) -> tuple[int, int, int, int]:
    """(hidden, attention width, intermediate, heads) of a transformers config."""
    text = description.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    head_size = getattr(text, "head_dim", None) or hidden // heads
    return hidden, heads * int(head_size), int(getattr(text, "intermediate_size", None) or 4 * hidden), heads


def _linear_bytes(model: nn.Module, itemsize: int) -> tuple[int, int]:
    """Bytes per token that the linears of all layers keep for their backward, the output head apart: (in an ordinary
    step, and how much more while tapped)."""
    total = tapped = 0
    head = output_head(model)
    for parent in model.modules():
        # by name of the parent's child: q, k, v of one attention, or gate and up of one MLP, share their input, while
        # the projection back (o, down) has one of its own
        dense, right = set(), set()
        for name, child in parent.named_children():
            shared = (getattr(child, "in_features", 0), name.startswith(("o_", "out", "down")))
            if isinstance(child, LoQTLinear):
                total += itemsize * (child.rank if child.side == "right" else child.in_features)
                if child.side == "right":
                    right.add(shared)
            elif isinstance(child, nn.Linear) and child is not head:
                dense.add(shared)
        total += itemsize * sum(width for width, _ in dense)
        tapped += itemsize * sum(width for width, _ in right - dense)
    return total, tapped


def activation_bytes(config: Config, model: nn.Module, description: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Kept between forward and backward of one micro-batch, the logits apart (formula above): (in an ordinary step, and
    how much more in a re-initialization's, where layers keep their inputs for the gradient of W)."""
    hidden, attention, intermediate, heads = _widths(description)
    num_layers = int(description.get_text_config().num_hidden_layers)
    e, sequence = dtype.itemsize, config.data.sequence_length
    norm = 2 * e * hidden if e == 4 else (4 + e) * hidden
    if config.model.attention == "eager":  # q, k, v; the float32 softmax, and its copy where activations are bf16
        attended = 3 * e * attention + (4 if e == 4 else 4 + e) * heads * sequence
    else:
        attended = 4 * e * attention + 4 * heads
    linears, tapped = (num_bytes / num_layers for num_bytes in _linear_bytes(model, e))
    block = 2 * norm + attended + 3 * e * intermediate + linears
    tokens = config.train.micro_batch_size * sequence
    if config.train.activation_checkpointing:
        kept = num_layers * e * hidden + block  # the inputs of all blocks, and one block's activations at a time
    else:
        kept, tapped = num_layers * block, num_layers * tapped
    return int(tokens * (kept + norm + e * hidden)), int(tokens * tapped)  # with the final norm and the head's input


def logits_bytes(config: Config, vocab_size: int) -> int:
    """The log-softmax, its gradient and that of the logits, float32, at the start of the backward (the forward's peak,
    the logits, their float32 copy and the log-softmax, is smaller)."""
    return 12 * config.train.micro_batch_size * config.data.sequence_length * vocab_size


def _update_bytes(parameters: Sequence[nn.Parameter], config: Config) -> int:
    """Temporaries of the update of the largest parameter (one is updated at a time)."""
    largest = max(parameter.numel() for parameter in parameters)
    if parameters[0].dtype == torch.float32:
        return 4 * largest  # Adam's denominator
    if config.optim.master == "fp32":
        return 8 * largest  # the gradient in float32, and Adam's denominator
    return 12 * largest  # the value and its gradient in float32, and Adam's denominator; it is rounded in pieces


def _by_group(factors: list[nn.Parameter], others: list[nn.Parameter]) -> list[list[int]]:
    """Sizes of the parameters in each flat vector of ZeRO's."""
    groups = (factors, [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2])
    return [[parameter.numel() for parameter in group] for group in groups if group]


def _touched(sizes: list[int], parts: int) -> int:
    """Elements of the parameters that the fullest partition of a flat vector touches."""
    length = -(-sum(sizes) // parts)
    touched = [0] * parts
    start = 0
    for size in sizes:
        for part in range(start // length, (start + size - 1) // length + 1):
            touched[part] += size
        start += size
    return max(touched)


def _zero_entries(
    entries: dict[str, int], config: Config, factors: list[nn.Parameter], others: list[nn.Parameter], zero: Zero
) -> None:
    """Changes the entries to what DeepSpeed keeps on the fullest rank."""
    parameters = [*factors, *others]
    num = sum(parameter.numel() for parameter in parameters)
    itemsize = parameters[0].dtype.itemsize
    if zero.stage:
        entries["masters"] = num * (2 if config.optim.master == "bf16" else 4) // zero.parts
        entries["moments"] = moment_bytes(num, optimizer=config.optim.name) // zero.parts
        # Of one partition: its gradient in float32, and Adam's denominator; of bf16 masters also the value.
        entries["update_workspace"] = num * (12 if config.optim.master == "bf16" else 8) // zero.parts
    if zero.stage == 2:
        entries["gradients"] = itemsize * sum(_touched(group, zero.parts) for group in _by_group(factors, others))
    entries["buckets"] = itemsize * zero.bucket_elements


def plan(config: Config, *, vocab_size: int | None = None, zero: Zero | None = None) -> MemoryPlan:
    """The memory a run of `config` needs on one device, or under DeepSpeed on each rank; nothing of the model is
    allocated.

    `vocab_size` is the number of rows of embedding and head, where it is known from the tokenizer. Raises ValueError as
    the run itself would, for a rank or a pattern that does not fit the model.
    """
    dtype = training_dtype(config)
    description, notes = planned_model(config, vocab_size=vocab_size)
    model = build_meta(description, config.loqt, dtype=dtype, attention=config.model.attention)
    layers = list(loqt_layers(model).values())
    trained = _trained(model)
    factors = {id(layer.B) for layer in layers}
    sizes = {name: parameter.numel() * parameter.dtype.itemsize for name, parameter in trained.items()}
    weights_w, projections_p = _packed_bytes(layers)
    factors_b = sum(sizes[name] for name, parameter in trained.items() if id(parameter) in factors)
    packed = {id(buffer) for layer in layers for buffer in layer.buffers()}
    ranks = 1 if zero is None else zero.world_size
    # One process finishes layers inside their own backward.
    one_at_a_time = config.train.gradient_accumulation_steps == 1 and ranks == 1
    gathered = [gathered_bytes(layer, config) for layer in layers]
    masters = dtype != torch.float32 and config.optim.master == "fp32"
    activations, tapped = activation_bytes(config, model, description, dtype)
    entries = {
        "weights_w": weights_w,
        "projections_p": projections_p,
        "factors_b": factors_b,
        "full_rank_parameters": sum(sizes.values()) - factors_b,
        "masters": sum(4 * parameter.numel() for parameter in trained.values()) if masters else 0,
        "moments": sum(moment_bytes(item.numel(), optimizer=config.optim.name) for item in trained.values()),
        "buffers": sum(b.numel() * b.dtype.itemsize for b in model.buffers() if id(b) not in packed),
        "gradients": max(sizes.values()) if config.optim.layerwise else sum(sizes.values()),
        "activations": activations,
        "tapped_inputs": tapped,
        "logits": logits_bytes(config, int(description.vocab_size)),
        "dequantized": max(dtype.itemsize * (prod(item.weight_shape) + prod(item.basis_shape)) for item in layers),
        "update_workspace": _update_bytes(list(trained.values()), config),
        "reinit_gathered": max(gathered) if one_at_a_time else sum(gathered),
        "reinit_workspace": max(reinit_workspace_bytes(layer, config) for layer in layers),
        "buckets": 0,
    }
    if zero is not None:
        of_factors = [p for p in trained.values() if id(p) in factors]
        _zero_entries(entries, config, of_factors, [p for p in trained.values() if id(p) not in factors], zero)
    return MemoryPlan(
        name=config.name,
        dtype=str(dtype).removeprefix("torch."),
        entries=entries,
        phases=_phases(config, one_at_a_time=one_at_a_time),
        num_adapted=sum(layer.in_features * layer.out_features for layer in layers),
        num_trained=sum(parameter.numel() for parameter in trained.values()),
        notes=notes,
    )


def _phases(config: Config, *, one_at_a_time: bool) -> dict[str, tuple[str, ...]]:
    """What is alive together. The logits are gone when the layers' backward begins; the activations shrink as it
    goes."""
    gradients = () if config.optim.layerwise else ("gradients",)  # of an earlier micro-batch
    backward = ("activations", "gradients", "buckets", "dequantized")
    tapped = ("tapped_inputs", "reinit_gathered")
    phases = {
        "the start of backward": ("activations", "logits", *gradients),
        "the start of a re-initialization": ("activations", "tapped_inputs", "logits", *gradients),
        "a re-initialization's backward": (*backward, *tapped),
        "the update": ("gradients", "update_workspace"),
        "the re-initialization": ("gradients", "reinit_gathered", "reinit_workspace"),
    }
    if config.optim.layerwise:  # update and re-initialization happen inside the backward
        phases["the update"] = ("activations", "gradients", "update_workspace")
    if one_at_a_time:
        phases["the re-initialization"] = ("activations", "gradients", *tapped, "reinit_workspace")
    return phases


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m loqt_ds.memory --config NAME [section.field=value ...]`: prints the plan."""
    parser = argparse.ArgumentParser(prog="python -m loqt_ds.memory", description="What a run will need on one device.")
    parser.add_argument("--config", required=True, help="a recipe's name in configs/recipes, or a YAML file")
    parser.add_argument("--vocab-size", type=int, help="rows of embedding and head, where model.vocab_size is auto")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="options to change")
    parser.add_argument("--ds_config", type=Path, help="a DeepSpeed configuration: count what each rank needs")
    parser.add_argument("--ranks", type=int, default=1, help="processes under DeepSpeed (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        zero = None
        if options.ds_config is not None:
            zero = zero_of(json.loads(options.ds_config.read_text(encoding="utf-8")), options.ranks)
        elif options.ranks != 1:
            raise ValueError(f"--ranks={options.ranks} needs --ds_config, such as configs/zero2.json")
        config = load_config(options.config, options.overrides)
        result = plan(config, vocab_size=options.vocab_size, zero=zero)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(result.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
