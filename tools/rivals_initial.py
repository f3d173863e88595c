"""LQ-LoRA and ApiQ: what QLoRA's frozen weights and adapters start from, found with a look at data.

    lqlora:R    W ≈ Q + L₁ L₂ under the Fisher information's weights (LQ-LoRA, arXiv 2311.12023, sections 3.1 and 3.3)
    apiq:R      Q, A and B for which each layer's outputs are the original's (ApiQ, arXiv 2402.05147, section 4)

Neither has a package, so that both are written here, from their papers. Their results are what `rivals_adapters.py`
trains: PEFT's adapters over W in NF4, without a scale beside them, A being L₂ and B being L₁. Both take
`Setup.calibration`, batches of the text that is trained on next.

LQ-LoRA, algorithm 1, with Q⁰ = 0 and E the weighted error below, until E rises:

    L₁, L₂ ← the best of rank R to W − Q        Q ← NF4(W − L₁ L₂)        E = ‖√F ∘ (W − Q − L₁ L₂)‖

F_ij, which stands for the diagonal of the Fisher information, is the mean over rows of text of the squared gradient of
a row's loss, the mean over its tokens: (∂ mean log p / ∂W_ij)², not the mean of each token's square. The best of rank R
under any F has no closed form; under F_ij = a_i b_j, of the means of its rows and columns, it is an SVD:

    D_a (W − Q) D_b = U Σ Vᵀ,   D_a = diag √a,  D_b = diag √b        L₁ = D_a⁻¹ U √Σ,   L₂ = √Σ Vᵀ D_b⁻¹

The roots are of the means, which its authors' code takes, too; their paper says means of the roots. Departures: every
matrix is in NF4 without double quantization (what integer programming would choose are other formats for some), the
largest errors count through F's factors, not F itself, and these are damped (`candidates_rounding.Importance`).

ApiQ, layer-wise: matrices are taken in the order in which the model computes. X are a matrix' inputs in the original
model, X̂ in the one whose earlier matrices are done, so that it makes up for their errors, too. Adam makes

    ‖X Wᵀ − X̂ (Q(θ) + B A)ᵀ‖²

small, over A, B and the clipping θ of each block of 64: its scale is σ(θ) times its largest magnitude. A starts as
PEFT's, B at zero, θ at 4; rounding passes gradients on as they come. Rates, decay and epochs are those of the authors'
script (scripts/quantize.sh of BaohaoLiao/ApiQ), a row of text a step. Departures: levels are NF4's, as of all methods
here, and not evenly spaced with a zero point; there are `ROWS_OF_APIQ` rows instead of 128, of the run's length, so
that a matrix takes fewer steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from candidates_rounding import Importance, levels
from rivals_adapters import Initial, initialized, linears_of, with_peft
from rivals_base import Rival, Setup, dense_model
from torch import Tensor, nn

from loqt_ds.core.quantization import BLOCKSIZE, QuantSpec, dequantize, quantize
from loqt_ds.evaluation import model_inputs, num_predicted
from loqt_ds.method import head

CALIBRATED = ("lqlora", "apiq")  # need Setup.calibration
CALIBRATION_ROWS = 32  # that LQ-LoRA looks at
ROWS_OF_APIQ = 16  # of them: it takes EPOCHS steps for each matrix with each
MOST_ALTERNATIONS = 100
EPOCHS = 20
LR_FACTORS, LR_CLIPPING, DECAY = 5e-4, 5e-3, 0.1
START_OF_CLIPPING = 4.0  # its sigmoid is .982


def rows_of(setup: Setup) -> Iterator[dict[str, Tensor]]:
    """Batches of one row each. Raises ValueError without any."""
    if not setup.calibration:
        raise ValueError("this initialization looks at data: give Setup.calibration some batches")
    for batch in setup.calibration:
        for row in range(len(batch["targets"])):
            yield {name: tensor[row : row + 1] for name, tensor in batch.items()}


# ---------------------------------------------------------------- LQ-LoRA


def fisher(model: nn.Module, linears: dict[str, nn.Linear], setup: Setup) -> dict[str, Importance]:
    """Means over rows and columns of the diagonal Fisher information of each linear's weight, by path.

    Args:
        model: what it computes stays as it is; `head.install` has been called.
    """
    device = torch.device(setup.device)
    weights = [linear.weight for linear in linears.values()]
    rows = {path: torch.zeros(linear.out_features, device=device) for path, linear in linears.items()}
    columns = {path: torch.zeros(linear.in_features, device=device) for path, linear in linears.items()}
    for batch in rows_of(setup):
        inputs, targets = model_inputs(batch, device)
        with setup.computing():
            loss = model(**inputs, targets=targets) / num_predicted(batch)
        for path, gradient in zip(linears, torch.autograd.grad(loss, weights), strict=True):
            squares = gradient.float().square_()
            rows[path] += squares.mean(dim=1)
            columns[path] += squares.mean(dim=0)
    return {path: Importance.of(rows[path], columns[path], (len(rows[path]), len(columns[path]))) for path in linears}


def weighted_svd(matrix: Tensor, importance: Importance, rank: int) -> tuple[Tensor, Tensor]:
    """(L₁ (out, rank), L₂ (rank, in)) of a matrix (out, in): the smallest ‖√F ∘ (matrix − L₁ L₂)‖ there is for an F of
    rank 1."""
    u, sizes, v = torch.linalg.svd(importance.scale(matrix), full_matrices=False)
    roots = sizes[:rank].sqrt()
    left = u[:, :rank] * roots / importance.rows.sqrt()[:, None]
    return left, roots[:, None] * v[:rank] / importance.columns.sqrt()


@torch.no_grad()
def alternate(weight: Tensor, importance: Importance, rank: int) -> Initial:
    """(Q (out, in), A (rank, in), B (out, rank)) of a weight (out, in) in float32: LQ-LoRA's algorithm 1."""
    shape, spec = (weight.shape[0], weight.shape[1]), QuantSpec("nf4")
    shown, error, found = torch.zeros_like(weight), math.inf, None
    for _ in range(MOST_ALTERNATIONS):
        left, right = weighted_svd(weight - shown, importance, rank)
        product = left @ right
        shown = dequantize(quantize(weight - product, spec), shape, spec)
        size = float(importance.scale(weight - shown - product).norm())
        if size >= error:
            break
        error, found = size, (shown, right, left)
    assert found is not None, "a weight is not finite"
    return found


def lqlora(name: str, setup: Setup, rank: int | None) -> Rival:
    """The alternation in place of LoftQ's, whose F is the same everywhere and whose W is rounded first."""
    rank = with_peft(rank)
    model = dense_model(setup)
    linears = linears_of(model)
    head.install(model)
    weights = fisher(model, linears, setup)
    found = {path: alternate(linear.weight.float(), weights[path], rank) for path, linear in linears.items()}
    return initialized(name, setup, model, found)


# ---------------------------------------------------------------- ApiQ


class _Found(Exception):
    """Ends a forward when what is looked for is there."""


@torch.no_grad()
def inputs_of(model: nn.Module, linear: nn.Module, setup: Setup) -> list[Tensor]:
    """What a linear of a model is called with: (tokens, in) float32 for each row of the calibration, without
    padding."""
    device, found = torch.device(setup.device), []  # type: tuple[torch.device, list[Tensor]]

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x, mask = arguments[0].flatten(0, -2).float(), batch.get("attention_mask")
        found.append(x if mask is None else x[mask.flatten().bool().to(device)])
        raise _Found

    hook = linear.register_forward_pre_hook(note)
    try:
        for batch in islice(rows_of(setup), ROWS_OF_APIQ):
            inputs, _ = model_inputs(batch, device)
            try:
                with setup.computing():
                    model(**inputs)
            except _Found:
                continue
    finally:
        hook.remove()
    return found


@dataclass
class Clipped:
    """NF4 of a weight (out, in) whose scales are learned. blocks: its values (blocks, 64), padded with zeros."""

    shape: torch.Size
    blocks: Tensor
    absmax: Tensor  # (blocks, 1)
    theta: Tensor  # (blocks, 1)

    @staticmethod
    def of(weight: Tensor) -> Clipped:
        flat = nn.functional.pad(weight.detach().float().reshape(-1), (0, -weight.numel() % BLOCKSIZE))
        blocks = flat.view(-1, BLOCKSIZE)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        return Clipped(weight.shape, blocks, absmax, torch.full_like(absmax, START_OF_CLIPPING).requires_grad_())

    def values(self) -> Tensor:
        """What codes and scales show (out, in); the gradient of θ passes through the rounding as if there were none."""
        scales = self.theta.sigmoid() * self.absmax
        fractions = (self.blocks / torch.where(scales > 0, scales, 1.0)).clamp(-1.0, 1.0)
        table = levels("nf4", self.blocks.device)
        nearest = table[torch.bucketize(fractions.detach(), (table[1:] + table[:-1]) / 2)]
        shown = scales * (fractions + (nearest - fractions).detach())
        return shown.view(-1)[: self.shape.numel()].view(self.shape)


def calibrate(weight: Tensor, inputs: Sequence[Tensor], seen: Sequence[Tensor], rank: int) -> Initial:
    """(Q (out, in), A (rank, in), B (out, rank)) of a weight (out, in) in float32: ApiQ's, of one matrix.

    Args:
        inputs, seen: X and X̂, (tokens, in) in float32 for each row of text. What A starts as is drawn from torch's own
            generator.
    """
    clipped = Clipped.of(weight)
    a = torch.empty(rank, weight.shape[1], device=weight.device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # PEFT's
    b = torch.zeros(weight.shape[0], rank, device=weight.device)
    groups = [{"params": [a.requires_grad_(), b.requires_grad_()], "lr": LR_FACTORS}]
    groups.append({"params": [clipped.theta], "lr": LR_CLIPPING})
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY, fused=True)
    with torch.no_grad():
        wanted = [x @ weight.t() for x in inputs]
    for _ in range(EPOCHS):
        for x, y in zip(seen, wanted, strict=True):
            with torch.enable_grad():
                found = nn.functional.linear(x, clipped.values()) + x @ a.t() @ b.t()
                (found - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return clipped.values().detach(), a.detach(), b.detach()


def apiq(name: str, setup: Setup, rank: int | None) -> Rival:
    rank = with_peft(rank)
    model = dense_model(setup)
    done = copy.deepcopy(model)  # in which Q + B A takes the place of one weight after another
    found: dict[str, Initial] = {}
    for path, linear in linears_of(model).items():
        own: Any = done.get_submodule(path)
        inputs, seen = (inputs_of(of, module, setup) for of, module in ((model, linear), (done, own)))
        shown, a, b = found[path] = calibrate(linear.weight.detach().float(), inputs, seen, rank)
        with torch.no_grad():
            own.weight.copy_(shown + b @ a)
    return initialized(name, setup, model, found)
