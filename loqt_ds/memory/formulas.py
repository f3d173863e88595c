"""What comes and goes in a step, in bytes, from shapes alone: activations, loss, gradients, update, re-initialization.

Per token and transformer layer, with e bytes per activation (2 in bf16, 4 in fp32), h hidden, a attention width (heads
* head size), i intermediate, r rank:

                     lean            stock (train.lean_activations=false)
    each norm        e h             (4 + e) h           its input; or a float32 copy and the normalized input (2 e h in
                                                         fp32, where there is no copy; LayerNorm: e h)
    attention        4 e a + 4 heads                     q, k, v, output; log-sum-exp
       eager         3 e a + (4 + e) heads s             q, k, v; softmax over s = sequence in float32 and its copy (4
                                                         heads s in fp32); DeBERTa: e heads s for each kind of
                                                         relative positions besides
       state space   16 i n                              n values of state for each channel, in float32, four times
    gated MLP        2 e i           3 e i               gate and up; its activation
    other MLP        e i             e i                 what is activated (four times where Python composes the
                                                         activation, as GPT-2's)
    experts          e (3 k i + 2 k h)                   of k experts a token
    LoQT linear      e r                                 x P where in <= out
       its input x   0               e in                where in > out, and on both while tapped (once for those that
                                                         share it); 0 where it is the output of attention, which is kept
    other linear     e in            e in                its input, once for those that share it

For a Llama in bf16 with square attention this is 12 h + 4 i + 12 r lean, and 20 h + 8 i + 12 r stock. Lean layers get x
from what norms and gated MLPs keep. Activation checkpointing keeps one input of e h per token and layer, and the above
for one layer at a time.

The loss holds one block of logits in float32 and in the activations' dtype (core.cross_entropy); where a model's head
is of another kind, all logits, their log-softmax and its gradient: 12 bytes a token and vocabulary entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loqt_ds.config import Config
from loqt_ds.core.cross_entropy import workspace_bytes
from loqt_ds.core.quantization import QuantSpec, lookup_bytes, packed_layout
from loqt_ds.method.controller import CARRIED, NUM_PROBES, sketch_columns, subspace_method
from loqt_ds.method.conversion import loqt_layers, output_head
from loqt_ds.method.description import training_dtype
from loqt_ds.method.head import HeadReport
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.optim import MIN_8BIT_SIZE, ROUNDED_AT_ONCE, UPDATE_PIECE

MOMENT_BLOCKSIZE = 256


def moment_bytes(num_elements: int, *, optimizer: str, decisive: int | None = None) -> int:
    """Bytes of Adam's two moments of one tensor: 8 an element in 32 bits; in 8 bits 2, and 8 for each block of 256.

    `decisive`: elements of the tensor whose size says which, where this is a part of it.
    """
    if optimizer == "adamw" or (num_elements if decisive is None else decisive) < MIN_8BIT_SIZE:
        return 8 * num_elements
    return 2 * num_elements + 8 * -(-num_elements // MOMENT_BLOCKSIZE)


# ---------------------------------------------------------------- activations


@dataclass(frozen=True)
class Widths:
    """Sizes of a decoder, per token."""

    hidden: int
    attention: int  # heads * head size
    intermediate: int
    heads: int
    num_layers: int
    state: int = 0  # of a state space model, instead of attention: of each of the intermediate channels


def experts_per_token(description: Any) -> int:
    """How many experts a token goes through; 1 where there are none."""
    return int(getattr(description.get_text_config(), "num_experts_per_tok", None) or 1)


def widths(description: Any) -> Widths:
    """Of a transformers config."""
    text = description.get_text_config()
    hidden, heads = int(text.hidden_size), getattr(text, "num_attention_heads", None)
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    if heads is None:
        state = int(getattr(text, "state_size", 0))
        return Widths(hidden, int(intermediate), int(intermediate), 1, int(text.num_hidden_layers), state)
    head_size = getattr(text, "head_dim", None) or hidden // heads
    per_expert = getattr(text, "moe_intermediate_size", None)
    if per_expert is not None or experts_per_token(description) > 1:
        intermediate = max(intermediate, experts_per_token(description) * (per_expert or intermediate))
    return Widths(hidden, heads * int(head_size), int(intermediate), int(heads), int(text.num_hidden_layers))


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _is_gated(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))


_BACK = ("o_", "out", "down", "c_proj", "fc2", "wo", "w2", "dense_4h")  # how names begin of what projects back


_COMPOSED = ("NewGELUActivation", "FastGELUActivation")  # of single operations, each of which keeps something


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _norm_bytes(model: nn.Module, width: Widths, e: int, *, lean: frozenset[str]) -> int:
    """Kept by all norms, per token."""
    total = 0
    for name, module in model.named_modules():
        if not is_norm(module):
            continue
        numel = sum(parameter.numel() for short, parameter in module.named_parameters() if short == "weight")
        # a norm of each head's queries or keys sees all heads of a token
        size = width.hidden if numel in (0, width.hidden) else width.attention
        only_input = name in lean or isinstance(module, nn.LayerNorm)
        total += e * size if only_input else (2 * e if e == 4 else 4 + e) * size
    return total


def _linear_bytes(model: nn.Module, e: int, *, lean: frozenset[str], eager: bool, num_experts: int) -> tuple[int, int]:
    """Kept by all linears, the output head apart, per token: (in an ordinary step, how much more while tapped). A token
    goes through `num_experts` of the experts of a block."""
    total = tapped = 0
    head = output_head(model)
    for parent_name, parent in model.named_modules():
        # By name of the parent's child: q, k, v of one attention, or gate and up of one MLP, share their input, while
        # the projection back (o, down) has one of its own.
        children = dict(parent.named_children())
        if isinstance(first := children.get("0"), LoQTLinear) and first.is_conditional:
            kept_input = e * first.in_features
            total += num_experts * (e * first.rank if first.side == "right" else kept_input)
            tapped += num_experts * kept_input if first.side == "right" else 0
            continue
        is_lean = parent_name in lean or any(f"{parent_name}.{name}" in lean for name in children)
        kept: set[tuple[int, bool]] = set()
        while_tapped: set[tuple[int, bool]] = set()
        for name, child in children.items():
            if child is head or not isinstance(child, nn.Linear | LoQTLinear):
                continue
            back = name.startswith(_BACK) or name == "dense"
            adapted, place = isinstance(child, LoQTLinear), (int(child.in_features), back)
            if back and _is_attention(parent):
                has_input = not eager  # attention's output is kept by attention
            else:
                has_input = bool(lean) and adapted and (not back or is_lean)
            if isinstance(child, LoQTLinear) and child.side == "right":
                total += e * child.rank
                if not has_input:
                    while_tapped.add(place)
            elif not has_input:
                kept.add(place)
        total += e * sum(size for size, _ in kept)
        tapped += e * sum(size for size, _ in while_tapped - kept)
    return total, tapped


def activation_bytes(
    config: Config, model: nn.Module, description: Any, dtype: torch.dtype, *, lean: frozenset[str]
) -> tuple[int, int, int]:
    """What is kept between forward and backward of one micro-batch, how much more in a re-initialization's (where
    layers keep their inputs for the gradient of W), and what of one block is computed again at a time (under activation
    checkpointing). `lean`: names of the norms, gated MLPs and activations that `method.lean` changes."""
    width, e = widths(description), dtype.itemsize
    sequence = config.data.sequence_length
    # What the model takes: one without sdpa is eager, whatever was asked for.
    taken = getattr(getattr(model, "config", None), "_attn_implementation", None)
    eager = (taken or config.model.attention) == "eager"
    if width.state:  # float32: the discretized matrices, their products with the input, and each token's state
        attended = 16 * width.intermediate * width.state
    elif eager:
        attended = 3 * e * width.attention + (4 if e == 4 else 4 + e) * width.heads * sequence
        # DeBERTa adds scores of positions to those of contents.
        relative = (
            getattr(description, "pos_att_type", None) if getattr(description, "relative_attention", False) else ()
        )
        attended += e * width.heads * sequence * len(relative or ())
    else:
        attended = 4 * e * width.attention + 4 * width.heads
    gated = {name for name, module in model.named_modules() if _is_gated(module)}
    activated = e * width.intermediate * (1 if not gated else 2 if gated <= lean else 3)
    experts = experts_per_token(description)
    if any(layer.is_conditional for layer in loqt_layers(model).values()):  # gate, up, and what each expert gives
        activated = e * (3 * width.intermediate + 2 * experts * width.hidden)
    elif any(type(module).__name__ in _COMPOSED and name not in lean for name, module in model.named_modules()):
        activated *= 4
    linears, tapped = _linear_bytes(model, e, lean=lean, eager=eager, num_experts=experts)
    blocks = _norm_bytes(model, width, e, lean=lean) + width.num_layers * (attended + activated) + linears
    if config.model.kernels == "liger":
        blocks += 4 * sum(is_norm(module) for module in model.modules())  # Liger keeps the root of the mean square
    tokens = config.train.micro_batch_size * sequence
    of_loss = e * width.hidden + 4  # its input, and a log-sum-exp
    if config.train.activation_checkpointing:
        one_block = (blocks + tapped) // width.num_layers
        return tokens * (width.num_layers * e * width.hidden + of_loss), 0, tokens * one_block
    return tokens * (blocks + of_loss), tokens * tapped, 0


def block_workspace_bytes(config: Config, description: Any, dtype: torch.dtype) -> int:
    """What the backward of one block makes besides: gradients of gate and of the product, the product and its
    activation computed again. (Gradients of the residual stream take the place of the head's input.)"""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    return 4 * tokens * dtype.itemsize * widths(description).intermediate


def answer_bytes(config: Config, description: Any, dtype: torch.dtype) -> int:
    """Of a batch of the longest prompts and answers: keys and values of all blocks (of one twice, as they grow); one
    block's activations of the prompts, of which nothing is kept for a backward; and the logits of one token."""
    width = widths(description)
    text = description.get_text_config()
    head_size = width.attention // width.heads
    keys = (getattr(text, "num_key_value_heads", None) or width.heads) * head_size
    rows = config.eval.micro_batch_size or config.train.micro_batch_size
    length = config.data.sequence_length
    cache = 2 * (width.num_layers + 1) * keys * rows * (length + config.eval.max_new_tokens)
    block = rows * length * (4 * width.hidden + 3 * width.attention + 3 * width.intermediate)
    return dtype.itemsize * (cache + block) + 8 * rows * int(text.vocab_size)


def loss_bytes(config: Config, description: Any, dtype: torch.dtype, *, head: HeadReport) -> int:
    """Temporaries of the loss, and the gradient of the head's input."""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    if not head.is_of_tokens:
        return 0  # a few numbers for each row
    hidden, vocab_size = widths(description).hidden, int(description.get_text_config().vocab_size)
    if head.whole_logits is not None:
        return 12 * tokens * vocab_size
    of_input = tokens * dtype.itemsize * hidden
    if config.model.kernels == "liger" and not head.is_transformed:
        return 2 * of_input  # Liger's chunks of logits are about as large as the head's input
    return workspace_bytes(tokens, hidden, vocab_size, dtype, transformed=head.is_transformed) + of_input


# ---------------------------------------------------------------- update


def update_bytes(num_elements: int, config: Config, *, is_low: bool) -> int:
    """Temporaries of an update, made of one piece of one tensor of at most `num_elements` at a time: where that is not
    float32 (`is_low`), those of the gradient and of the value; then Adam's, and after it, beside the value, those of
    rounding a part of it."""
    piece, on_host = min(num_elements, UPDATE_PIECE), config.train.device == "cpu"
    without_masters = is_low and config.optim.master == "bf16"
    value, gradient = 4 * without_masters, 4 * is_low
    # bitsandbytes on a CPU dequantizes both moments; on a GPU it makes nothing, as torch's fused Adam
    adam = 20 if config.optim.name == "adamw8bit" and on_host else 0
    rounding = 15 * min(piece, ROUNDED_AT_ONCE) if without_masters else 0
    return value * piece + max((gradient + adam) * piece, rounding)


# ---------------------------------------------------------------- re-initialization


def gathered_bytes(layer: LoQTLinear, config: Config, world_size: int) -> int:
    """One layer's gradient in float32; or its sketch with the columns it is taken with, in the activations' dtype."""
    k, length = layer.basis_shape[0], layer.factor_length
    if subspace_method(layer, config.loqt.subspace, world_size) == "sketch":
        columns = sketch_columns(layer, config.loqt.sketch_oversampling) + NUM_PROBES
        return training_dtype(config).itemsize * (k + length) * columns
    return 4 * k * length


def decompose_bytes(layer: LoQTLinear, config: Config, world_size: int) -> int:
    """Temporaries of gathering for one layer or of finding its P, in float32.

    For gram the (k, k) matrix, its eigenvectors and workspace in float64; for subspace iteration columns of both sides,
    and the small matrices in float64; for the sketch S, its QR, the small matrices
    in float64 and P, or in the tap Ω, its QR and Q; for exact the left and right factors and LAPACK's copy. Before, for
    all but the sketch, copies in float32 of what the gradient is the product of.
    """
    (k, rank), length = layer.basis_shape, layer.factor_length
    method = subspace_method(layer, config.loqt.subspace, world_size)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    copies = 4 * tokens * (k + length) if training_dtype(config) != torch.float32 else 0
    if method == "sketch":
        columns = sketch_columns(layer, config.loqt.sketch_oversampling)
        return max(4 * (2 * k * columns + k * rank) + 3 * 8 * columns**2, 4 * 3 * length * columns)
    if method == "iterated":
        columns = sketch_columns(layer, config.loqt.sketch_oversampling)
        return max(4 * (3 * k + length) * columns + 3 * 8 * columns**2, copies)
    if method == "gram":
        return max(8 * 3 * k * k + 4 * k * rank, copies)
    return max(4 * (2 * k * length + k * k), copies)


def encode_bytes(num_values: int, spec: QuantSpec, config: Config) -> int:
    """Temporaries of finding the codes of that many values; bitsandbytes' kernels on a GPU need none."""
    return lookup_bytes(num_values) if config.train.device == "cpu" and spec.kind in ("nf4", "fp4") else 0


def rebuild_bytes(layer: LoQTLinear, config: Config) -> int:
    """Temporaries of merging, quantizing and compensating one layer, in float32: the merged weight, one residual of its
    size, P̂ old and new, B old, its candidate and the best, its new moments where they are carried to the new P; the
    new packed W beside the old; what finds codes."""
    (k, rank), length = layer.basis_shape, layer.factor_length
    carries = config.loqt.schedule != "never"  # the first initialization has nothing to carry
    num_factors = 3 + (2 if carries and config.loqt.optimizer_state in CARRIED else 0)
    dense = 4 * (2 * k * length + 2 * k * rank + num_factors * length * rank)
    dense += encode_bytes(k * length, layer.spec_w, config)
    return dense + sum(packed_layout(layer.weight_shape, layer.spec_w).values())


def packed_bytes(model: nn.Module) -> tuple[int, int]:
    """(W, P) of all layers."""
    layers = list(loqt_layers(model).values())
    weights = sum(sum(packed_layout(layer.weight_shape, layer.spec_w).values()) for layer in layers)
    projections = sum(sum(packed_layout(layer.basis_shape, layer.spec_p).values()) for layer in layers)
    return weights, projections
