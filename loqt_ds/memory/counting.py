"""The plan of a run: what stays is counted on the meta device, what comes and goes is estimated by `formulas`.

Under ZeRO (stage 1 and 2) masters and moments are divided by the number of ranks; there is a master also of float32
parameters. At stage 2 a rank keeps the whole gradient of every parameter that its partition touches, so that large
parameters are divided less. Reduction buckets, of their full size however small the model is, and during the update the
gradient of a partition in float32, are on top (measured in benchmarks/results/ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from loqt_ds.config import Config
from loqt_ds.core.quantization import QuantSpec, packed_layout
from loqt_ds.memory.formulas import (
    activation_bytes,
    answer_bytes,
    block_workspace_bytes,
    decompose_bytes,
    encode_bytes,
    gathered_bytes,
    loss_bytes,
    moment_bytes,
    packed_bytes,
    rebuild_bytes,
    update_bytes,
)
from loqt_ds.method import head, lean, structure
from loqt_ds.method.conversion import build_meta, loqt_layers, output_head, task_head_parameters
from loqt_ds.method.description import model_description, training_dtype
from loqt_ds.method.head import HeadReport
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.optim import UPDATE_PIECE, freeze_full_rank

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
    "gradients": "gradients kept",
    "new_gradient": "one new gradient",
    "buckets": "buckets of gradients to be reduced",
    "activations": "activations",
    "tapped_inputs": "inputs kept for a re-initialization",
    "loss": "a block of logits, and the loss",
    "dequantized": "one dequantized matrix",
    "dequantized_kept": "W kept dequantized",
    "recomputed_block": "activations of one block, computed again",
    "block_workspace": "backward of one block",
    "update_workspace": "update of one parameter",
    "reinit_gathered": "gradients or sketches gathered",
    "reinit_decompose": "finding one layer's P",
    "reinit_pending": "new P, waiting for the update",
    "reinit_rebuild": "one layer merged and compensated",
    "answers": "keys and values of a batch of answers",
    "export_model": "the export, loaded to be compared",
    "export_workspace": "one layer as it is exported",
}
STAYS = ("weights_w", "projections_p", "factors_b", "full_rank_parameters", "masters", "moments", "buffers")
_MODEL = ("weights_w", "projections_p", "factors_b", "full_rank_parameters", "buffers")


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


# ---------------------------------------------------------------- the model, without its weights


@dataclass(frozen=True)
class Facts:
    """A converted model on the meta device: all that a plan asks of it."""

    model: nn.Module
    description: Any
    """The transformers configuration."""
    dtype: torch.dtype
    layers: list[LoQTLinear]
    factors: dict[str, nn.Parameter]
    """Every B."""
    others: dict[str, nn.Parameter]
    """All other parameters: trained in full, or frozen."""
    lean: frozenset[str]
    """Names of the modules that lean activations change."""
    head: HeadReport
    """How the loss is computed."""
    notes: list[str]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in (*self.factors.values(), *self.others.values()) if parameter.requires_grad]


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


def describe(config: Config, *, vocab_size: int | None = None) -> Facts:
    """Builds the model without weights. Raises ValueError as the run itself would, for a rank or a pattern that does
    not fit the model."""
    dtype = training_dtype(config)
    description, notes = planned_model(config, vocab_size=vocab_size)
    options = {"attention": config.model.attention, "task": config.model.task}
    model = build_meta(description, config.loqt, dtype=dtype, **options)
    layers = list(loqt_layers(model).values())
    own = {id(layer.B) for layer in layers}
    if not config.optim.train_full_rank:
        freeze_full_rank(model, but=task_head_parameters(model))
    parameters = dict(model.named_parameters())
    factors = {name: parameter for name, parameter in parameters.items() if id(parameter) in own}
    others = {name: parameter for name, parameter in parameters.items() if id(parameter) not in own}
    changed = lean.install(model)
    loss = head.install(model, task=config.model.task)
    if loss.whole_logits is not None:
        notes = [*notes, loss.describe()]
    return Facts(
        model=model,
        description=description,
        dtype=dtype,
        layers=layers,
        factors=factors,
        others=others,
        lean=frozenset((*changed.norms, *changed.mlps, *changed.activations)),
        head=loss,
        notes=notes,
    )


# ---------------------------------------------------------------- counting


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in parameters)


def plan(
    config: Config, *, vocab_size: int | None = None, zero: Zero | None = None, facts: Facts | None = None
) -> MemoryPlan:
    """The memory a run of `config` needs on one device, or under DeepSpeed on each rank; nothing of the model is
    allocated.

    Args:
        vocab_size: rows of embedding and head, where they are known from the tokenizer.
        zero: how DeepSpeed divides what is trained; None: one device without it.
        facts: what `describe` said of the same model, to plan for other steps with it.

    Raises ValueError as `describe`.
    """
    facts = describe(config, vocab_size=vocab_size) if facts is None else facts
    model, description, dtype, layers = facts.model, facts.description, facts.dtype, facts.layers
    trained, steps = facts.trained, config.train.gradient_accumulation_steps
    weights_w, projections_p = packed_bytes(model)
    packed = {id(buffer) for layer in layers for buffer in layer.buffers()}
    changed = facts.lean if config.train.lean_activations else frozenset()
    activations, tapped, block = activation_bytes(config, model, description, dtype, lean=changed)
    world_size = 1 if zero is None else zero.world_size
    gathered = [gathered_bytes(layer, config, world_size) for layer in layers]
    # The gradients of a compiled block come all at once.
    blocks = list(structure.blocks(model, loqt_layers(model)).values()) if config.train.compile else []
    gathered_at_once = [
        sum(gathered_bytes(layer, config, world_size) for layer in loqt_layers(b).values()) for b in blocks
    ]
    new_at_once = [[p for p in b.parameters() if p.requires_grad] for b in blocks]
    one_process = world_size == 1
    # One process finds the P of a layer inside the layer's own backward.
    one_at_a_time = steps == 1 and one_process
    updates_at_once = config.optim.layerwise and steps == 1
    full_rank = _size(list(facts.others.values()))
    export = _export_bytes(config, facts)
    largest = max(prod(layer.weight_shape) for layer in layers)
    entries = {
        "weights_w": weights_w,
        "projections_p": projections_p,
        "factors_b": _size(list(facts.factors.values())),
        "full_rank_parameters": full_rank,
        "masters": 4 * sum(p.numel() for p in trained) if dtype != torch.float32 and _has_masters(config) else 0,
        "moments": sum(moment_bytes(parameter.numel(), optimizer=config.optim.name) for parameter in trained),
        "buffers": sum(b.numel() * b.dtype.itemsize for b in model.buffers() if id(b) not in packed),
        "context": INTERPRETER_BYTES if config.train.device == "cpu" else CONTEXT_BYTES,
        "start_workspace": _start_bytes(config, facts, largest),
        "gradients": 0 if updates_at_once else _size(trained),
        "new_gradient": max(_size(part) for part in [*new_at_once, *([parameter] for parameter in trained)]),
        "buckets": 0,
        "activations": activations,
        "tapped_inputs": tapped,
        "loss": loss_bytes(config, description, dtype, head=facts.head),
        "dequantized": _dequantized_bytes(config, facts),
        "dequantized_kept": sum(layer.dequantized_bytes for layer in layers if layer.keeps_dequantized),
        "recomputed_block": block,
        "block_workspace": block_workspace_bytes(config, description, dtype),
        "update_workspace": update_bytes(trained, config),
        "reinit_gathered": max(gathered + gathered_at_once) if one_at_a_time else sum(gathered),
        "reinit_decompose": max(decompose_bytes(layer, config, world_size) for layer in layers),
        "reinit_pending": projections_p if one_process and not updates_at_once else 0,
        "reinit_rebuild": max(rebuild_bytes(layer, config) for layer in layers),
        "answers": answer_bytes(config, description, dtype) if config.eval.metric == "exact_match" else 0,
        "export_model": export,
        "export_workspace": 2 * 4 * largest if export else 0,
    }
    if zero is not None:
        _divide(entries, config, facts, zero)
    return MemoryPlan(
        name=config.name,
        dtype=str(dtype).removeprefix("torch."),
        entries=entries,
        phases=_phases(config, zero),
        num_adapted=sum(layer.in_features * layer.out_features for layer in layers),
        num_trained=sum(parameter.numel() for parameter in trained),
        num_tokens=config.train.micro_batch_size * config.data.sequence_length,
        notes=facts.notes + _notes(config),
    )


def _notes(config: Config) -> list[str]:
    steps = config.train.gradient_accumulation_steps
    if not config.optim.layerwise or steps == 1:
        return []
    return [
        f"optim.layerwise with train.gradient_accumulation_steps={steps} keeps a gradient of every parameter between "
        "micro-batches"
    ]


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


def _has_masters(config: Config) -> bool:
    return config.optim.master == "fp32"


def _start_bytes(config: Config, facts: Facts, largest: int) -> int:
    """Of making one parameter in fp32, and of quantizing it where it is a layer's, of at most `largest` values. The
    output head comes after all layers: it is not there yet when these are quantized."""
    output = output_head(facts.model)
    weight = getattr(output, "weight", None)
    head_bytes = _size([p for p in facts.others.values() if p is weight])
    made = [4 * parameter.numel() for parameter in facts.others.values()]
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


def _by_group(facts: Facts) -> list[list[int]]:
    """Sizes of the parameters in each flat vector of ZeRO's."""
    others = [parameter for parameter in facts.others.values() if parameter.requires_grad]
    groups = (list(facts.factors.values()), [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2])
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


def _divide(entries: dict[str, int], config: Config, facts: Facts, zero: Zero) -> None:
    """Changes the entries to what DeepSpeed keeps on the fullest rank."""
    num = sum(parameter.numel() for parameter in facts.trained)
    if zero.stage:
        entries["masters"] = num * (4 if _has_masters(config) else 2) // zero.parts
        entries["moments"] = moment_bytes(num, optimizer=config.optim.name) // zero.parts
        # Of one partition: its gradient in float32, and Adam's denominator; bf16 masters are updated in pieces.
        partition = num // zero.parts
        entries["update_workspace"] = 8 * partition if _has_masters(config) else 12 * min(partition, UPDATE_PIECE)
    if zero.stage == 2:
        entries["gradients"] = facts.dtype.itemsize * sum(_touched(group, zero.parts) for group in _by_group(facts))
    entries["buckets"] = facts.dtype.itemsize * zero.bucket_elements


def _phases(config: Config, zero: Zero | None) -> dict[str, tuple[str, ...]]:
    """What is alive together.

    With one micro-batch a step, activations go as gradients come: the larger of the two counts. With several, the
    gradients of earlier ones are there all the time.
    """
    steps, layerwise = config.train.gradient_accumulation_steps, config.optim.layerwise
    one_process = zero is None or zero.world_size == 1
    always = (*STAYS, "context", "dequantized", "dequantized_kept")
    kept = ("gradients",) if steps > 1 else ()  # while a backward begins
    summed = ("reinit_gathered",) if steps > 1 else ()
    backward = (*always, "activations", "recomputed_block", "block_workspace", "new_gradient", *kept, "buckets")
    phases = {
        "start": (*_MODEL, "context", "start_workspace"),
        "step: the loss": (*always, "activations", "loss", "new_gradient", *kept),
        "step: the first block's backward": backward,
        "step: the last block's backward": (*always, "gradients", "new_gradient", "buckets"),
        "step: the update": (*always, "gradients", "update_workspace"),
        "re-initialization: the loss": (
            *(*always, "activations", "tapped_inputs", "loss", "new_gradient", *kept),
            *summed,
        ),
    }
    if layerwise:  # of the head first, while all activations are there
        update = (*always, "activations", "new_gradient", *kept, "update_workspace")
        phases["step: the update"] = update
        phases["re-initialization: the update"] = (*update, "tapped_inputs", *summed)
    tapped = (*backward, "tapped_inputs", "reinit_gathered")
    if one_process and layerwise:
        phases["re-initialization: the first block's backward"] = (*tapped, "reinit_decompose")
        phases["re-initialization: a layer"] = (
            *(*always, "activations", "recomputed_block", "tapped_inputs", *kept, "reinit_rebuild"),
            *summed,
        )
    elif one_process:
        phases["re-initialization: the first block's backward"] = (*tapped, "reinit_decompose")
        phases["re-initialization: the last block's backward"] = (
            *(*always, "gradients", "new_gradient", "reinit_pending"),
            *("buckets", "reinit_decompose"),
        )
        phases["re-initialization: a layer"] = (*always, "reinit_pending", "reinit_rebuild")
    else:
        phases["re-initialization: the first block's backward"] = tapped
        phases["re-initialization: the last block's backward"] = (
            *(*always, "gradients", "new_gradient", "reinit_gathered"),
            "buckets",
        )
        phases["re-initialization: finding P"] = (*always, "gradients", "reinit_gathered", "reinit_decompose")
        phases["re-initialization: a layer"] = (*always, "gradients", "reinit_gathered", "reinit_rebuild")
    if config.eval.metric == "exact_match":
        phases["evaluation"] = (*always, "answers")
    if config.export.format != "none":
        # A card without room for two models exports from the host (loqt_ds.finish); masters wait there anyway.
        trained = (*_MODEL, "masters") if config.train.device == "cpu" else ()
        phases["export"] = (*trained, "context", "export_model", "export_workspace", "answers")
    return phases
