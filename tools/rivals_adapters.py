"""LoRA, QLoRA, LoftQ and ReLoRA: frozen weights and PEFT's adapters beside them, W + (alpha / r) B A.

    lora:R             W as it was drawn, in the run's dtype (LoRA, arXiv 2106.09685)
    qlora:R            W in NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3)
    loftq:R            W in NF4; it, A and B from PEFT's LoftQ: five times W = NF4(W0 - B A), then B A = the best of
                       rank R to W0 - W (LoftQ, arXiv 2310.08659, algorithm 1)
    relora:R           LoRA whose product is merged into W every `interval` steps; A and B then start anew, 99 % of
                       their moments are pruned by magnitude, and the learning rate rises again from zero to its
                       schedule (ReLoRA, arXiv 2307.05695, section 3)
    relora:R+start=N   the same after N steps in full rank, which its paper calls the warm start

alpha is 32, as in GaLore's comparison with LoRA and ReLoRA (arXiv 2403.03507, section 5.1), but for LoftQ, whose
decomposition has no scale: there it is R. A starts as PEFT's, B at zero. Departures: no dropout (GaLore's comparison
has 0.05), since no token is seen twice; AdamW without paging; ReLoRA's rate rises for a tenth of the interval, at most
the 100 steps of its paper, whose intervals are thousands of steps; and its pruning keeps the same elements of both
moments, those where the first is largest: a first moment that outlives its second would be divided by nothing, since A
has no gradient where B is zero.

All train embeddings, norms and head in full, at that rate. In ReLoRA's full-rank start W has the rate that A and B have
afterwards (`Setup.lr`): the start has none of its own. What it holds is counted as it is at the time: optimizer states
and trained parameters of a full-rank method up to step N, of adapters after it.

With `Setup.masters` in bf16, A, B and what is trained in full are float32; W of LoRA is bf16, as nothing changes it;
W of ReLoRA is float32, since bf16 would round away most of what is merged into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from rivals_base import Rival, Setup, dense_model, groups, imported
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loqt_ds.method.conversion import target_linears

ALPHA = 32
LOFTQ_STEPS = 5
KEPT_BY_PRUNING = 0.01  # of ReLoRA's moments
LONGEST_REWARMUP = 100  # steps


def adapt(model: nn.Module, targets: Iterable[str], rank: int, setup: Setup, *, alpha: int) -> None:
    """Puts PEFT's LoRA layers in the place of linears, by their paths, and trains A, B and, where `Setup.full_rank`
    says so, all that is no W."""
    peft = imported("peft", "peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets))
    peft.inject_adapter_in_model(config, model)  # freezes all but the adapters
    frozen = {f"{path}.base_layer.weight" for path in targets}
    for path, parameter in model.named_parameters():
        if path not in frozen and (setup.full_rank or ".lora_" in path):
            parameter.requires_grad_(True)
    for layer in lora_layers(model):
        if hasattr(layer.base_layer, "compute_dtype"):  # of a quantized W; PEFT has taken it for A and B
            layer.base_layer.compute_dtype = setup.dtype_of_products


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Those that LoQT adapts, by path."""
    return target_linears(model, "all-linear")


def lora_layers(model: nn.Module) -> Iterator[Any]:
    """PEFT's."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield module


def freeze_in_nf4(model: nn.Module, linears: dict[str, nn.Linear], setup: Setup, *, double: bool) -> None:
    """Puts bitsandbytes' NF4 linears in the place of linears, with their weights. double: quantize the scales."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear in linears.items():
        weight, bias = linear.weight.data, linear.bias
        out_features, in_features = weight.shape
        frozen: Any = Linear4bit(
            in_features, out_features, bias is not None, compute_dtype=setup.dtype_of_weights, quant_type="nf4"
        )
        frozen.weight = Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=double, module=frozen
        )
        frozen.bias = bias
        # On CPUs with AVX512-BF16 an evaluation would repack the codes for a kernel that has no backward, and training
        # would go on with that: no gradient came through W any more.
        frozen.support_avx512bf16_for_cpu = False
        frozen = frozen.to(setup.device)  # which quantizes
        frozen.weight.quant_state.dtype = setup.dtype_of_products  # of what it shows, whatever it was quantized from
        model.set_submodule(path, frozen)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks


def _rival(name: str, setup: Setup, model: nn.Module) -> Rival:
    return Rival(name, setup, model, adamw(groups(setup, model), setup))


def adamw(parameters: list[dict[str, Any]], setup: Setup) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=setup.lr, weight_decay=0.0, fused=True)


def with_peft(rank: int | None) -> int:
    """The rank. Raises MissingPackage without PEFT."""
    imported("peft", "peft")
    assert rank is not None
    return rank


def lora(name: str, setup: Setup, rank: int | None) -> Rival:
    rank = with_peft(rank)
    model = dense_model(setup)
    adapt(model, linears_of(model), rank, setup, alpha=ALPHA)
    for layer in lora_layers(model):
        layer.base_layer.weight.data = layer.base_layer.weight.data.to(setup.dtype_of_products)
    return _rival(name, setup, model)


def qlora(name: str, setup: Setup, rank: int | None) -> Rival:
    rank = with_peft(rank)
    model = dense_model(setup)
    targets = linears_of(model)
    freeze_in_nf4(model, targets, setup, double=True)
    adapt(model, targets, rank, setup, alpha=ALPHA)
    return _rival(name, setup, model)


# ---------------------------------------------------------------- LoftQ


class _Elsewhere(TorchFunctionMode):
    """Sends to another device what is sent to "cuda", which PEFT's LoftQ has written into it (on a machine without it
    says `AssertionError: Torch not compiled with CUDA enabled`)."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)

    def _sent(self, value: Any) -> Any:
        is_cuda = value == "cuda" or (isinstance(value, torch.device) and value.type == "cuda")
        return self._device if is_cuda else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            args = (args[0], *(value if isinstance(value, Tensor) else self._sent(value) for value in args[1:]))
            kwargs = {name: self._sent(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def decompose(weight: Tensor, rank: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """PEFT's LoftQ of a weight (out, in) in float32: (W as NF4 shows it, A (rank, in), B (out, rank))."""
    utils = imported("peft.utils.loftq_utils", "peft")
    # Its collection of garbage, before each of the five steps of each matrix, takes longer than they do.
    with _Elsewhere(device), mock.patch.object(utils, "clear_device_cache", lambda: None):
        return utils.loftq_init(weight.float(), num_bits=4, reduced_rank=rank, num_iter=LOFTQ_STEPS)


def loftq(name: str, setup: Setup, rank: int | None) -> Rival:
    rank = with_peft(rank)
    model = dense_model(setup)
    found = {path: decompose(linear.weight.data, rank, setup.device) for path, linear in linears_of(model).items()}
    return initialized(name, setup, model, found)


Initial = tuple[Tensor, Tensor, Tensor]  # of a matrix: W as NF4 shows it (out, in), A (rank, in), B (out, rank)


def initialized(name: str, setup: Setup, model: nn.Module, found: Mapping[str, Initial]) -> Rival:
    """PEFT's adapters as they were found, over W in NF4, of all linears that LoQT adapts; W + B A, without a scale.

    Args:
        found: by path. W is quantized again, to the same codes and scales: those of its values in float32.
    """
    targets, rank = linears_of(model), len(next(iter(found.values()))[1])
    for path, linear in targets.items():
        linear.weight.data = found[path][0]
    freeze_in_nf4(model, targets, setup, double=False)
    adapt(model, targets, rank, setup, alpha=rank)
    for path, (_, a, b) in found.items():
        layer: Any = model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return _rival(name, setup, model)


# ---------------------------------------------------------------- ReLoRA


class ReLoRA(Rival):
    """LoRA that is merged and restarted.

    Args:
        start: steps in full rank before.
    """

    def __init__(self, name: str, setup: Setup, rank: int, start: int) -> None:
        model = dense_model(setup)
        self._rank, self._start = rank, start
        self._restarted: int | None = None  # the step before which A and B last started anew
        if start == 0:
            adapt(model, linears_of(model), rank, setup, alpha=ALPHA)
        super().__init__(name, setup, model, adamw(groups(setup, model), setup))

    @property
    def _is_adapted(self) -> bool:
        return next(lora_layers(self.model), None) is not None

    def renew(self, refresh: bool) -> bool:
        if not self._is_adapted:
            if self.num_steps < self._start:
                return False
            self._adapt()
        elif self._is_due(refresh):
            self._merge()
        else:
            return False
        self._restarted = self.num_steps
        return True

    def _is_due(self, refresh: bool) -> bool:
        taken = self.num_steps - self._start
        return refresh if self.setup.interval is None else taken > 0 and taken % self.setup.interval == 0

    def rate_factor(self) -> float:
        """The schedule's; after a restart it rises to that from zero."""
        factor = super().rate_factor()
        if self._restarted is None:
            return factor
        steps = min(LONGEST_REWARMUP, max(1, (self.setup.interval or LONGEST_REWARMUP) // 10))
        return factor * min(1.0, (self.num_steps - self._restarted + 1) / (steps + 1))

    def _adapt(self) -> None:
        """Ends the full-rank start; what is trained in full goes on with its moments."""
        adapt(self.model, linears_of(self.model), self._rank, self.setup, alpha=ALPHA)
        before = self.optimizer
        self.use(adamw(groups(self.setup, self.model), self.setup))
        for parameter in self.trained():
            if parameter in before.state:
                self.optimizer.state[parameter] = before.state[parameter]

    @torch.no_grad()
    def _merge(self) -> None:
        for layer in lora_layers(self.model):
            layer.base_layer.weight += layer.get_delta_weight("default")
            layer.reset_lora_parameters("default", True)
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                entry = self.optimizer.state[factor]
                prune(entry["exp_avg"], entry["exp_avg_sq"])

    def state(self) -> dict[str, Any]:
        return super().state() | {"adapted": self._is_adapted, "restarted": self._restarted}

    def restore(self, state: dict[str, Any]) -> None:
        if state.get("adapted") and not self._is_adapted:
            self._adapt()
        super().restore(state)
        self._restarted = state["restarted"]


def prune(first: Tensor, second: Tensor) -> None:
    """Zeroes both moments but where the first is largest."""
    flat = first.abs().flatten().float()
    kept = max(1, round(KEPT_BY_PRUNING * flat.numel()))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(kept).indices] = True
    for moment in (first, second):
        moment.mul_(mask.view_as(moment))


def relora(name: str, setup: Setup, rank: int | None, start: int) -> Rival:
    return ReLoRA(name, setup, with_peft(rank), start)
