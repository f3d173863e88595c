"""The cross-entropy of a linear output head, in blocks of logits.

    loss = sum over predicted tokens t of  log sum_v exp(z_tv) - z_t,y(t),      z = H Wᵀ + b

Logits, as large as tokens times vocabulary, exist for one block at a time. Two ways, by the size of all of them:

- up to `KEPT_ELEMENTS`, the forward turns each block of logits into their gradient, softmax(z) - onehot(y), and keeps
  that in the dtype of H until the backward, which is then one product each for H and W: 6 h V operations a token;
- beyond, a block is made in the forward and again in the backward, 8 h V operations a token, and between the two only
  one log-sum-exp per token is kept; the forward finds it block after block with a running maximum. A block takes all
  tokens, up to `MAX_ROWS`, and as many vocabulary entries as its size allows, rather than a few tokens and the whole
  vocabulary: the gradient of W is then one product for up to `MAX_ROWS` tokens, rounded once, and what is added up from
  block to block is the gradient of H, for which a float32 copy is small. (With chunks of few tokens the gradient of W
  would be rounded to bf16 after each, or need a float32 copy of W's size.)

All of it is in float32 but the matrix products, whose logits come in the dtype of H and W, as a linear module makes
them.

    legend: T tokens, V vocabulary, h hidden; H (T, h), W (V, h), b (V,), y (T,)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**23
"""Logits alive at a time: 32 MiB in float32. Larger blocks are slower on a CPU; a GPU wants products of some size."""
KEPT_ELEMENTS = 2**26
"""Logits whose gradient is kept rather than made again: 2,097 tokens of 32,000 pieces; 128 MiB in bf16."""
MAX_ROWS = 8192
"""Tokens of a block; more would leave so few columns that products became slow."""

Transform = Callable[[Tensor], Tensor]
"""What a model does to every logit by itself: (rows, columns) -> (rows, columns), differentiable."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    transform: Transform | None = None,
) -> Tensor:
    """Negative log-likelihood in nats, summed over tokens whose target is not `ignore_index`.

    Under autocast the product is in its dtype, as a linear module's would be. Can be differentiated once.

    Args:
        hidden: (T, h). weight: (V, h). bias: (V,). All of one floating-point dtype; any of them may need no gradient.
        targets: (T,) int64, each below V or `ignore_index`.
        transform: applied to the logits of each block, elementwise; None: they are as the product gives them.

    Returns a scalar in float32 (float64 if hidden is); 0 where all targets are ignored.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (T, h) and (V, h)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be one for each row of hidden {tuple(hidden.shape)}")
    kind = hidden.device.type
    if kind == "cpu":  # elsewhere it would be a synchronization; the loss is then no number
        _check_range(targets, len(weight), ignore_index)
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if transform is None and _is_kept(len(hidden), len(weight)):
        loss: Tensor = _KeptCrossEntropy.apply(hidden, weight, bias, targets, ignore_index, torch.is_grad_enabled())
    else:
        loss = _LinearCrossEntropy.apply(hidden, weight, bias, targets, ignore_index, transform)
    return loss


def _is_kept(num_tokens: int, vocab_size: int) -> bool:
    return num_tokens * vocab_size <= KEPT_ELEMENTS


def _check_range(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
    if len(wrong):
        raise ValueError(f"the target {int(wrong[0])} is neither in the vocabulary of {vocab_size} nor {ignore_index}")


def workspace_bytes(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, *, transformed: bool = False
) -> int:
    """What `linear_cross_entropy` and its backward hold at their peak beside their arguments, the log-sum-exp and the
    gradients that they return: a block of logits in float32, and of all in `dtype` their gradient; or of the block in
    `dtype`, and the gradient of H in float32 and a part.

    transformed: with a transform; counted is one that scales, caps and scales back, with what its derivative takes.
    """
    low = 0 if dtype == torch.float32 else dtype.itemsize
    if not transformed and _is_kept(num_tokens, vocab_size):
        # The block in float32 is gone when the gradients come.
        of_forward = 4 * _rows_at_once(num_tokens, vocab_size) * vocab_size if low else 0
        of_backward = dtype.itemsize * hidden_size * (num_tokens + vocab_size)
        return dtype.itemsize * num_tokens * vocab_size + max(0, of_forward - of_backward)
    rows, columns = _block_shape(num_tokens, vocab_size)
    num_bytes = (4 + low) * rows * columns
    if transformed:
        num_bytes += 5 * dtype.itemsize * rows * columns
    if low and columns < vocab_size:
        num_bytes += (4 + low) * rows * hidden_size
    return num_bytes


def _rows_at_once(num_tokens: int, vocab_size: int) -> int:
    """Tokens of a block of whole rows."""
    return min(num_tokens, max(1, BLOCK_ELEMENTS // vocab_size))


def _block_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Tokens and vocabulary entries of a block, the latter a multiple of 64 unless there are fewer."""
    rows = min(num_rows, MAX_ROWS)
    columns = max(64, BLOCK_ELEMENTS // max(1, rows) // 64 * 64)
    return rows, min(columns, num_columns)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, max(1, step)))


class _Blocks:
    """Makes the logits of one block after another, always in the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform | None) -> None:
        self._hidden, self._weight, self._bias, self._transform = hidden, weight, bias, transform
        self._transformed: tuple[Tensor, Tensor] | None = None  # logits before and after
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows, columns = _block_shape(len(hidden), len(weight))
        self.rows, self.columns = list(_slices(len(hidden), rows)), list(_slices(len(weight), columns))
        self._wide = hidden.new_empty(rows * columns, dtype=self.dtype)
        in_place = hidden.dtype == self.dtype and transform is None
        self._low = self._wide if in_place else hidden.new_empty(rows * columns)

    def logits(self, rows: slice, columns: slice, *, differentiable: bool = False) -> Tensor:
        """(rows, columns) in float32, until the next call. differentiable: `gradient` will be asked for."""
        hidden, weight = self._hidden[rows], self._weight[columns]
        low = self._view(self._low, hidden, weight)
        torch.mm(hidden, weight.t(), out=low)
        if self._transform is not None:
            before = low if self._bias is None else low.add_(self._bias[columns])
            before = before.detach().requires_grad_(differentiable)
            with torch.set_grad_enabled(differentiable):
                after = self._transform(before)
            self._transformed = before, after
            return self._view(self._wide, hidden, weight).copy_(after.detach())
        wide = low if self._low is self._wide else self._view(self._wide, hidden, weight).copy_(low)
        return wide if self._bias is None else wide.add_(self._bias[columns])

    def gradient(self, block: Tensor) -> Tensor:
        """The gradient of H Wᵀ + b, in the dtype of H, from that of the logits made last, whose place it may take."""
        if self._transformed is not None:
            before, after = self._transformed
            return torch.autograd.grad(after, before, block.to(after.dtype))[0]
        if self._low is self._wide:
            return block
        return self._low[: block.numel()].view(block.shape).copy_(block)

    @staticmethod
    def _view(memory: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        return memory[: len(hidden) * len(weight)].view(len(hidden), len(weight))


def _in_block(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(column of each target within the block (T, 1), whether it is there (T, 1)); column 0 for those that are not."""
    local = targets.unsqueeze(1) - columns.start
    inside = (local >= 0) & (local < columns.stop - columns.start)
    return local * inside, inside


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        transform: Transform | None,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            kept = targets != ignore_index
            possible = (targets >= 0) & (targets < len(weight))
            blocks = _Blocks(hidden, weight, bias, transform)
            log_sums = hidden.new_empty(len(hidden), dtype=blocks.dtype)
            total = hidden.new_zeros((), dtype=blocks.dtype)
            for rows in blocks.rows:
                own = targets[rows]
                of_target = hidden.new_zeros((len(own), 1), dtype=blocks.dtype)
                of_target.masked_fill_(~possible[rows].unsqueeze(1), math.nan)
                # Not -inf, which all logits of a block may be: the difference of two would be no number.
                top = torch.full_like(of_target, torch.finfo(blocks.dtype).min)
                summed = torch.zeros_like(top)
                for columns in blocks.columns:
                    block = blocks.logits(rows, columns)
                    column, inside = _in_block(own, columns)
                    of_target += torch.where(inside, block.gather(1, column), 0)
                    new_top = torch.maximum(top, block.amax(1, keepdim=True))
                    summed = summed * (top - new_top).exp_() + block.sub_(new_top).exp_().sum(1, keepdim=True)
                    top = new_top
                log_sum = summed.log_().add_(top)
                log_sums[rows] = log_sum.squeeze(1)
                total += torch.where(kept[rows], (log_sum - of_target).squeeze(1), 0).sum()
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums)  # type: ignore[arg-type]
        ctx.ignore_index, ctx.transform = ignore_index, transform  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors  # type: ignore[attr-defined]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = _Blocks(hidden, weight, bias, ctx.transform)  # type: ignore[attr-defined]
            # Of a token that is not predicted every logit's gradient is 0.
            scale = (targets != ctx.ignore_index).unsqueeze(1) * grad  # type: ignore[attr-defined]
            empty = torch.empty_like if len(hidden) else torch.zeros_like
            grad_hidden = empty(hidden) if wants_hidden else None
            grad_weight = empty(weight) if wants_weight else None
            grad_bias = weight.new_zeros(len(weight), dtype=blocks.dtype) if wants_bias else None
            for rows in blocks.rows:
                own, of_rows = targets[rows], hidden[rows]
                # Of several parts, each as the product rounds it, the sum is taken in float32.
                added = None
                if grad_hidden is not None and len(blocks.columns) > 1:
                    own_dtype = grad_hidden.dtype == blocks.dtype
                    added = grad_hidden[rows].zero_() if own_dtype else torch.zeros_like(of_rows, dtype=blocks.dtype)
                for columns in blocks.columns:
                    block = blocks.logits(rows, columns, differentiable=True).sub_(log_sums[rows].unsqueeze(1)).exp_()
                    column, inside = _in_block(own, columns)
                    block.scatter_add_(1, column, inside.to(blocks.dtype).neg_())
                    block.mul_(scale[rows])
                    low = blocks.gradient(block)
                    if grad_bias is not None:
                        grad_bias[columns] += low.sum(0, dtype=blocks.dtype)
                    if grad_weight is not None:
                        if rows.start == 0:
                            torch.mm(low.t(), of_rows, out=grad_weight[columns])
                        else:
                            grad_weight[columns].addmm_(low.t(), of_rows)
                    if grad_hidden is not None:
                        if added is None:
                            torch.mm(low, weight[columns], out=grad_hidden[rows])
                        elif added.dtype == low.dtype:
                            added.addmm_(low, weight[columns])
                        else:
                            added += low @ weight[columns]
                    del block, low  # before the next is there
                if grad_hidden is not None and added is not None and added.dtype != grad_hidden.dtype:
                    grad_hidden[rows] = added
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(weight.dtype), None, None, None


class _KeptCrossEntropy(torch.autograd.Function):
    """The gradient of the logits is made in the forward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        training: bool,
    ) -> Tensor:
        wanted = training and any(ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        num_rows, vocab_size = len(hidden), len(weight)
        step = _rows_at_once(num_rows, vocab_size)
        gradient = hidden.new_empty((num_rows if wanted else step, vocab_size))
        wide = None if gradient.dtype == dtype else hidden.new_empty((step, vocab_size), dtype=dtype)
        total = hidden.new_zeros((), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(num_rows, step):
                own = targets[rows].unsqueeze(1)
                kept, column = own != ignore_index, own.clamp(0, vocab_size - 1)
                place = gradient[rows] if wanted else gradient[: len(own)]
                torch.mm(hidden[rows], weight.t(), out=place)
                block = place if wide is None else wide[: len(own)].copy_(place)
                if bias is not None:
                    block += bias
                of_target = block.gather(1, column).masked_fill_(column != own, math.nan)
                top = block.amax(1, keepdim=True)
                summed = block.sub_(top).exp_().sum(1, keepdim=True)
                total += torch.where(kept, summed.log() + top - of_target, 0).sum()
                if wanted:
                    block.mul_(kept / summed)  # of a token that is not predicted every logit's gradient is 0
                    block.scatter_add_(1, column, kept.to(dtype).neg_())
                    if block is not place:
                        place.copy_(block)
        ctx.save_for_backward(*((hidden, weight, gradient) if wanted else ()))  # type: ignore[arg-type]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, gradient = ctx.saved_tensors  # type: ignore[attr-defined]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden = (gradient @ weight).mul_(grad) if wants_hidden else None
            grad_weight = (gradient.t() @ hidden).mul_(grad) if wants_weight else None
            grad_bias = gradient.sum(0, dtype=grad.dtype).mul_(grad).to(weight.dtype) if wants_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None
