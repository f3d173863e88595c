"""Operations and bytes of one optimizer step, from shapes alone; nothing of the model is allocated.

An operation is a multiplication or an addition of a matrix product, so that a product (a, b) (b, c) has 2abc. Bytes are
what has to be read and written if every tensor goes to memory once: kernels that fuse nothing move more. Together with
the rates of a machine they give the floor under the time of a step; beside those of the same model in full rank, what a
step can gain at most.

Of a matrix W (m, n) and T tokens, with r the rank, l the side of B and k that of P (forward and backward together):

    products of W    4 m n T               x Wᵀ and dY W; in full rank 6 m n T, with dYᵀ x
    low-rank path    (4 r (m + n) + 2 r l) T           factored: three products forth and three back, one of them as
                                                       large as B for its gradient
                     2 r (m + n) T + 4 m n r           merged: the gradient of B, and W_eff made twice
    head             6 h V T, or 8 h V T where its logits are made twice (see `core.cross_entropy`)
    attention        4 a forth and 10 a back for each pair of positions, of which half are seen under a causal mask; 8 a
                     back where attention keeps its scores (eager)

A re-initialization (`reinit_work`) comes on top. Its decompositions are counted by the leading terms of their
algorithms (Golub and Van Loan, Matrix Computations, 4th ed.: QR 5.2, symmetric eigenproblem 8.3, SVD 8.6), which says
little of their time: they are not products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from loqt_ds.config import Config
from loqt_ds.core.cross_entropy import KEPT_ELEMENTS
from loqt_ds.core.quantization import QuantSpec, packed_layout
from loqt_ds.memory import Facts, describe, moment_bytes
from loqt_ds.memory.formulas import is_norm, widths
from loqt_ds.method.controller import NUM_PROBES, POWER_ITERATIONS, sketch_columns, subspace_method
from loqt_ds.method.conversion import output_head
from loqt_ds.method.head import HeadReport
from loqt_ds.method.linear import LoQTLinear

PARTS = {
    "products": "products of W",
    "low_rank": "low-rank path",
    "dequantization": "dequantization",
    "head": "head and loss",
    "attention": "attention",
    "elementwise": "norms, activations, sums",
    "optimizer": "optimizer",
}
REINIT_PARTS = {
    "tap": "gradients or sketches",
    "decompose": "finding P",
    "merge": "merging",
    "compensate": "compensation",
    "quantize": "quantization",
}


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, and bytes read or written."""

    operations: int = 0
    num_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.num_bytes + other.num_bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.operations * times, self.num_bytes * times)


def total(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def product(rows: int, inner: int, columns: int, e: int, *, adds: bool = False) -> Work:
    """(rows, inner) (inner, columns) with e bytes an element; `adds` to what is there."""
    moved = rows * inner + inner * columns + (1 + adds) * rows * columns
    return Work(2 * rows * inner * columns, e * moved)


# ---------------------------------------------------------------- linears


def dense_work(in_features: int, out_features: int, num_tokens: int, e: int) -> Work:
    """Forward and backward of a linear that is trained in full."""
    return total(
        (
            product(num_tokens, in_features, out_features, e),
            product(num_tokens, out_features, in_features, e),
            product(out_features, num_tokens, in_features, e),
        )
    )


def layer_work(
    layer: LoQTLinear, num_tokens: int, dtype: torch.dtype, *, repeats_forward: bool = False
) -> dict[str, Work]:
    """Forward and backward of one micro-batch in an ordinary step: products, low_rank, dequantization.

    repeats_forward: under activation checkpointing.
    """
    (m, n), (k, r), e = layer.weight_shape, layer.basis_shape, dtype.itemsize
    length, t = layer.factor_length, num_tokens
    right = layer.side == "right"
    parts = {name: Work() for name in ("products", "low_rank", "dequantization")}
    merged = layer.product_of(t, dtype, training=True) == "merged"
    for forward in [True, False] + [True] * repeats_forward:
        parts["products"] += product(t, n, m, e) if forward else product(t, m, n, e)
        small = []
        if merged:
            small.append(product(m, r, n, e, adds=True))  # W_eff
            num_p = 1
            # The products that the gradient of B is made of; x P comes with the forward.
            if right:
                small.append(product(t, k, r, e) if forward else product(length, t, r, e))
                num_p += forward
            elif not forward:
                small += [product(t, k, r, e), product(r, t, length, e)]
                num_p += 1
        else:
            inside, outside = (n, m) if forward else (m, n)
            small += [product(t, inside, r, e), product(t, r, outside, e, adds=True)]
            if not forward:
                small.append(product(length, t, r, e))
            num_p = 1
        parts["low_rank"] += total(small)
        is_kept = layer.keeps_dequantized and dtype == layer.B.dtype
        parts["dequantization"] += Work() if is_kept else dequantize_work((m, n), layer.spec_w, dtype)
        parts["dequantization"] += dequantize_work((k, r), layer.spec_p, dtype) * num_p
    return parts


def dequantize_work(shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype) -> Work:
    """One matrix from its packed bytes; nothing where it is dense in `dtype` already."""
    if spec.kind == "none" and spec.dense_dtype == dtype:
        return Work()
    return Work(0, sum(packed_layout(shape, spec).values()) + dtype.itemsize * prod(shape))


# ---------------------------------------------------------------- the rest of a micro-batch


def head_work(num_tokens: int, hidden: int, vocab_size: int, e: int, report: HeadReport) -> Work:
    """Logits and their gradient written and read once, beside the products."""
    t, transformed = num_tokens, report.is_transformed
    twice = (
        report.whole_logits is None and report.kernels == "torch" and (transformed or t * vocab_size > KEPT_ELEMENTS)
    )
    return product(t, hidden, vocab_size, e) * (1 + twice) + total(
        (product(t, vocab_size, hidden, e), product(vocab_size, t, hidden, e))
    )


def attention_work(
    config: Config, description: Any, num_rows: int, length: int, e: int, *, repeats_forward: bool = False
) -> Work:
    """Of all layers."""
    width, text = widths(description), description.get_text_config()
    eager = config.model.attention == "eager"
    # A mask that is given, as for documents, is not known to be causal: all pairs are computed.
    causal = not eager and not config.data.mask_documents
    pairs = num_rows * (length * (length + 1) // 2 if causal else length * length)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or width.heads)
    tokens, keys = num_rows * length, width.attention * kv_heads // width.heads
    forward = Work(4 * width.attention * pairs, e * tokens * 2 * (width.attention + keys))
    backward = Work((8 if eager else 10) * width.attention * pairs, e * tokens * 4 * (width.attention + keys))
    if eager:  # scores and their softmax in memory, in float32
        forward += Work(0, 4 * 4 * width.heads * pairs)
        backward += Work(0, 4 * 4 * width.heads * pairs)
    return (forward * (1 + repeats_forward) + backward) * width.num_layers


def elementwise_work(
    config: Config, facts: Facts, num_tokens: int, *, lean: bool, repeats_forward: bool = False
) -> Work:
    """Normalizations, activations, rotary embeddings, sums of the residual stream and the embedding, each fused."""
    e, width, text = facts.dtype.itemsize, widths(facts.description), facts.description.get_text_config()
    forward = backward = 0
    for module in filter(is_norm, facts.model.modules()):
        numel = sum(parameter.numel() for parameter in module.parameters())
        size = width.hidden if numel in (0, width.hidden) else width.attention
        forward += 2 * size  # x, y
        backward += 3 * size  # x, dy, dx; lean or not
    kv_heads = int(getattr(text, "num_key_value_heads", None) or width.heads)
    rotated = width.attention * (width.heads + kv_heads) // width.heads
    # gate, up, their product; then both again and three gradients, and for a lean model the product once more
    forward += width.num_layers * (3 * width.intermediate + 2 * rotated + 2 * 3 * width.hidden)
    backward += width.num_layers * ((5 + lean) * width.intermediate + 2 * rotated + 4 * 3 * width.hidden)
    embedding = 2 * width.hidden * num_tokens * 2 + width.hidden * int(text.vocab_size)  # its gradient is dense
    return Work(0, e * (num_tokens * (forward * (1 + repeats_forward) + backward) + embedding))


def optimizer_work(config: Config, parameters: Iterable[tuple[int, torch.dtype]]) -> Work:
    """Reads and writes of an update, and of the norms of the gradients before it. parameters: (elements, dtype)."""
    num_bytes = 0
    for numel, dtype in parameters:
        e = dtype.itemsize
        has_copy = dtype != torch.float32 and config.optim.master == "fp32"
        values = e + 2 * 4 if has_copy else 2 * e  # the copy is read and written, the parameter written
        num_bytes += (2 * e + values) * numel + 2 * moment_bytes(numel, optimizer=config.optim.name)
    return Work(0, num_bytes)


# ---------------------------------------------------------------- a step


def step_work(
    config: Config, *, vocab_size: int | None = None, facts: Facts | None = None, full_rank: bool = False
) -> dict[str, Work]:
    """Work of an ordinary optimizer step on one device, by PARTS.

    Args:
        config: shape, rank, product, rows, length, accumulation, optimizer; train.lean_activations=auto counts as true.
        vocab_size: rows of embedding and head, where they are known from the tokenizer.
        facts: what `memory.describe` said of the same model.
        full_rank: the same model with every weight trained, under the same optimizer.

    Raises ValueError as `memory.describe`.
    """
    facts = describe(config, vocab_size=vocab_size) if facts is None else facts
    dtype, e = facts.dtype, facts.dtype.itemsize
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    tokens, width = rows * length, widths(facts.description)
    repeats = config.train.activation_checkpointing
    parts = {name: Work() for name in PARTS}
    for layer in facts.layers:
        if full_rank:
            n, m = layer.in_features, layer.out_features
            parts["products"] += dense_work(n, m, tokens, e) + product(tokens, n, m, e) * repeats
            continue
        for name, work in layer_work(layer, tokens, dtype, repeats_forward=repeats).items():
            parts[name] += work
    head = output_head(facts.model)
    for module in facts.model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            n, m = module.in_features, module.out_features
            parts["products"] += dense_work(n, m, tokens, e) + product(tokens, n, m, e) * repeats
    vocab = int(facts.description.get_text_config().vocab_size)
    parts["head"] = head_work(tokens, width.hidden, vocab, e, facts.head)
    parts["attention"] = attention_work(config, facts.description, rows, length, e, repeats_forward=repeats)
    lean = config.train.lean_activations is not False and not full_rank
    parts["elementwise"] = elementwise_work(config, facts, tokens, lean=lean, repeats_forward=repeats)
    trained = [(p.numel(), p.dtype) for p in (list(facts.others.values()) if full_rank else facts.trained)]
    if full_rank:
        trained += [(prod(layer.weight_shape), dtype) for layer in facts.layers]
    steps = config.train.gradient_accumulation_steps
    added = 3 * (steps - 1) * sum(numel * dtype.itemsize for numel, dtype in trained)  # gradients of micro-batches
    parts = {name: work * steps for name, work in parts.items()}
    parts["optimizer"] = optimizer_work(config, trained) + Work(0, added)
    return parts


# ---------------------------------------------------------------- a re-initialization


def reinit_work(
    config: Config, *, vocab_size: int | None = None, facts: Facts | None = None, first: bool = False
) -> dict[str, Work]:
    """What a step that re-initializes all layers does more than an ordinary one, by REINIT_PARTS.

    first: the initialization at step 0, which finds no P to merge.
    """
    facts = describe(config, vocab_size=vocab_size) if facts is None else facts
    tokens = config.train.micro_batch_size * config.data.sequence_length
    steps, e = config.train.gradient_accumulation_steps, facts.dtype.itemsize
    parts = {name: Work() for name in REINIT_PARTS}
    for layer in facts.layers:
        parts["tap"] += tap_work(layer, config, tokens, e) * steps + columns_work(layer, config, tokens, e)
        parts["decompose"] += decompose_work(layer, config)
        (m, n), (k, r) = layer.weight_shape, layer.basis_shape
        if not first:
            parts["merge"] += product(m, r, n, 4, adds=True) + dequantize_work((m, n), layer.spec_w, torch.float32)
        iterations = config.loqt.compensation_steps if layer.spec_w.kind != "none" else 0
        packed = sum(packed_layout((m, n), layer.spec_w).values())
        num_quantized = max(1, iterations)
        parts["quantize"] += Work(0, (4 * m * n + packed) * num_quantized)
        parts["quantize"] += Work(0, 4 * k * r + sum(packed_layout((k, r), layer.spec_p).values()))
        # Each iterate is read back and taken from W.
        parts["compensate"] += Work(0, 3 * 4 * m * n + packed) * num_quantized + compensate_work(layer, iterations)
    return parts


def compensate_work(layer: LoQTLinear, iterations: int) -> Work:
    """Of the products: orthonormal columns of P, then two with W's residual an iteration, less the last one's second,
    and from coordinates to B."""
    if not iterations:
        return Work()
    (k, r), length = layer.basis_shape, layer.factor_length
    columns = product(r, k, r, 8) + product(k, r, r, 8)
    along, without = product(length, k, r, 4), product(length, r, k, 4, adds=True)
    return columns + along * iterations + without * (iterations - 1) + product(length, r, r, 4)


def tap_work(layer: LoQTLinear, config: Config, num_tokens: int, e: int) -> Work:
    """A layer's share of its gradient (in float32), or of a sketch of it, from one micro-batch."""
    k, length = layer.basis_shape[0], layer.factor_length
    if subspace_method(layer, config.loqt.subspace) != "sketch":
        return product(k, num_tokens, length, 4, adds=True)
    columns = sketch_columns(layer, config.loqt.sketch_oversampling) + NUM_PROBES
    return product(num_tokens, length, columns, e) + product(k, num_tokens, columns, e, adds=True)


def columns_work(layer: LoQTLinear, config: Config, num_tokens: int, e: int) -> Work:
    """Of the products that turn the columns of a sketch to where its gradient is large, once a step."""
    if subspace_method(layer, config.loqt.subspace) != "sketch":
        return Work()
    k, length = layer.basis_shape[0], layer.factor_length
    columns = sketch_columns(layer, config.loqt.sketch_oversampling)
    turn = product(num_tokens, length, columns, e) * 2 + product(num_tokens, k, columns, e) * 2
    return turn * POWER_ITERATIONS


def decompose_work(layer: LoQTLinear, config: Config) -> Work:
    """Of one layer, by the leading terms of the algorithms; orthonormal columns of a sketch included."""
    (k, r), length = layer.basis_shape, layer.factor_length
    method = subspace_method(layer, config.loqt.subspace)
    if method == "sketch":
        c = sketch_columns(layer, config.loqt.sketch_oversampling)
        # R and Q of S, and of the columns after each turn
        qr = 4 * (k + POWER_ITERATIONS * length) * c * c - 4 * (1 + POWER_ITERATIONS) * c**3 // 3
        return Work(qr + 2 * c**3 + 9 * c**3 + 2 * k * c * r, 4 * 4 * (k + length) * c)
    if method == "iterated":
        c = sketch_columns(layer, config.loqt.sketch_oversampling)
        turn = product(length, k, c, 4) + product(k, length, c, 4) + Work(4 * k * c * c - 4 * c**3 // 3, 4 * 4 * k * c)
        small = product(c, k, length, 4) + product(c, length, c, 8) + Work(9 * c**3, 8 * 4 * c * c)
        return turn * POWER_ITERATIONS + small + product(k, c, r, 4)
    if method == "gram":
        return product(k, length, k, 8) + Work(9 * k**3, 8 * 4 * k * k)
    return Work(4 * length * k * k + 22 * k**3, 4 * 4 * k * length)
