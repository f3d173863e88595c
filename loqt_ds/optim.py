"""Parameter groups, Adam in 32 and 8 bits, master copies, and access to moments in whatever form they are kept.

- `adamw` is `torch.optim.AdamW`; `adamw8bit` is bitsandbytes' AdamW8bit (two moments in 8 bits, blocks of 256, tensors
  below 4096 elements in 32 bits).
- Parameters in bf16 have float32 masters (`optim.master: fp32`), or none (`bf16`): then the update is computed in
  float32 and rounded stochastically, so that updates below half a unit in the last place survive on average.
- `ParameterOptimizer` is one parameter with its own optimizer object, so that a step can be taken for one parameter as
  soon as its gradient is complete (layer-wise updates) or for all of them, by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.config import Config, OptimConfig
from loqt_ds.core.schedules import LRSchedule, ReinitSchedule
from loqt_ds.method.conversion import loqt_layers

MOMENT_KEYS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))
BLOCKSIZE_8BIT = 256


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay.

    kind: "factors" (the B of each layer), "full_rank" (embeddings, head), or "full_rank_no_decay" (norms, biases).
    """

    kind: str
    parameters: dict[str, nn.Parameter]
    weight_decay: float

    @property
    def is_factor(self) -> bool:
        return self.kind == "factors"


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[ParameterGroup]:
    """The trained parameters of a converted model, B first; empty groups are left out. Shared ones appear once."""
    factor_names = {f"{name}.B" if name else "B" for name in loqt_layers(model)}
    kinds: dict[str, dict[str, nn.Parameter]] = {"factors": {}, "full_rank": {}, "full_rank_no_decay": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in factor_names:
            kinds["factors"][name] = parameter
        else:
            kinds["full_rank" if parameter.dim() >= 2 else "full_rank_no_decay"][name] = parameter
    return [
        ParameterGroup(kind, parameters, 0.0 if kind == "full_rank_no_decay" else optim.weight_decay)
        for kind, parameters in kinds.items()
        if parameters
    ]


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or AdamW8bit over torch-style parameter groups."""
    options: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, **options)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **options)


class LearningRates:
    """The two rates of each step: of B, and of the parameters trained in full rank."""

    def __init__(self, config: Config, reinit: ReinitSchedule) -> None:
        optim = config.optim
        self._factors = optim.lr
        self._full_rank = optim.lr if optim.lr_full_rank is None else optim.lr_full_rank
        self._schedule = LRSchedule(
            kind=optim.schedule,
            max_steps=config.train.max_steps,
            warmup_steps=config.num_warmup_steps,
            min_ratio=optim.min_lr_ratio,
            rewarmup_steps=optim.rewarmup_steps,
            reinit=reinit,
        )

    def at(self, step: int) -> tuple[float, float]:
        """(of B, of the rest) for the update of a 0-based step."""
        multiplier = self._schedule.multiplier(step)
        return self._factors * multiplier, self._full_rank * multiplier


# ---------------------------------------------------------------- moments, as torch or bitsandbytes keeps them


def moment_keys(state: dict[str, Any]) -> tuple[str, str] | None:
    """The names of the two moments in an optimizer's state of one tensor; None before its first step."""
    return next((keys for keys in MOMENT_KEYS if keys[0] in state), None)


def read_moment(state: dict[str, Any], index: int) -> Tensor:
    """First (0) or second (1) moment in float32, in the tensor's own shape."""
    keys = moment_keys(state)
    assert keys is not None
    moment = state[keys[index]]
    if moment.dtype != torch.uint8:
        return moment.float()
    import bitsandbytes.functional as F

    number = index + 1
    return F.dequantize_blockwise(
        moment, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=BLOCKSIZE_8BIT
    ).view(moment.shape)


def quantize_moment(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest 8-bit codes of a moment, and the absmax of each block of 256 of its flat order.

    bitsandbytes' own quantization rounds to a grid of about 2^-15 before it looks the code up on the CPU, and gives a
    zero the code of 2e-5: Adam would then divide tiny by tiny and move what has no gradient.

    Args:
        values: float32, any shape.
        table: the ascending values of the 256 codes, float32.

    Returns:
        (codes, uint8 in the shape of `values`; absmax, float32).
    """
    flat = values.float().reshape(-1)
    blocks = nn.functional.pad(flat, (0, -flat.numel() % BLOCKSIZE_8BIT)).view(-1, BLOCKSIZE_8BIT)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.view(-1)[: flat.numel()].view(values.shape), absmax


def write_moment(state: dict[str, Any], index: int, value: Tensor) -> None:
    """Overwrites a moment in place, quantizing it where it is kept in 8 bits."""
    keys = moment_keys(state)
    assert keys is not None
    moment = state[keys[index]]
    if moment.dtype != torch.uint8:
        moment.copy_(value)
        return
    number = index + 1
    codes, absmax = quantize_moment(value, state[f"qmap{number}"])
    moment.copy_(codes.view(moment.shape))
    state[f"absmax{number}"].copy_(absmax)


def restore_state(optimizer: Any, tensor: Tensor, saved: dict[str, Tensor]) -> None:
    """Gives an optimizer the state of one tensor back; without anything saved, that of a new parameter.

    `saved` holds what the state held, but for bitsandbytes' constant maps; numbers as tensors.
    """
    optimizer.state.pop(tensor, None)
    if not saved:
        return
    state = optimizer.state[tensor]
    is_torch = moment_keys(saved) == MOMENT_KEYS[0]
    for key, value in saved.items():
        if key == "step":
            state[key] = value.clone() if is_torch else int(value)
        else:
            # A copy: a checkpoint's tensors are mapped, and would hold the disk space of its file after its deletion.
            state[key] = value.to(tensor.device, copy=True)
    if "absmax1" in state:
        optimizer.fill_qmap()
        state["qmap1"] = optimizer.name2qmap["dynamic"].to(tensor.device)
        state["qmap2"] = optimizer.name2qmap["udynamic"].to(tensor.device)


def saved_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """What `restore_state` takes."""
    return {
        key: value if isinstance(value, Tensor) else torch.tensor(value)
        for key, value in state.items()
        if not key.startswith("qmap")
    }


def stochastic_round(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bf16, up or down with probabilities that make the expectation exact; inf and NaN pass through."""
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(torch.bfloat16)


class ParameterOptimizer:
    """One parameter, its master copy and its optimizer.

    Args:
        parameter: float32 (then it is its own master) or bf16.
        optim: kind of optimizer and of master.
        weight_decay: decoupled, as in AdamW.
        generator: for stochastic rounding, on the parameter's device.
    """

    def __init__(
        self, parameter: nn.Parameter, optim: OptimConfig, *, weight_decay: float, generator: torch.Generator
    ) -> None:
        self.parameter, self._generator = parameter, generator
        self._own = parameter.dtype == torch.float32
        self._transient = not self._own and optim.master == "bf16"
        if self._own:
            self.master = parameter
        elif self._transient:
            self.master = nn.Parameter(torch.empty(0, device=parameter.device))
        else:
            self.master = nn.Parameter(parameter.detach().float())
        self._optimizer = build_optimizer([{"params": [self.master], "weight_decay": weight_decay}], optim)

    @property
    def has_master(self) -> bool:
        """Whether there is a float32 copy besides the parameter."""
        return not (self._own or self._transient)

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of this parameter; empty before the first step."""
        return self._optimizer.state[self.master]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Updates the parameter from its gradient and frees the gradient."""
        gradient = self.parameter.grad
        assert gradient is not None
        if not self._own:
            if self._transient:
                self.master.data = self.parameter.detach().float()
            self.master.grad = gradient.float()
            self.parameter.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.master.grad = None
        if not self._own:
            self._publish()

    def _publish(self) -> None:
        """Copies the master into the bf16 parameter."""
        value = self.master.data
        self.parameter.copy_(stochastic_round(value, self._generator) if self._transient else value)
        if self._transient:
            self.master.data = value.new_empty(0)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The parameter in the precision of its master, float32."""
        return self.parameter.detach().float() if self._transient else self.master.detach()

    @torch.no_grad()
    def set_value(self, value: Tensor) -> None:
        """Overwrites the parameter and its master."""
        self.master.data = value.float() if self._transient else self.master.data.copy_(value)
        if not self._own:
            self._publish()

    def reset_state(self) -> None:
        """Makes the optimizer's state that of a new parameter."""
        self._optimizer.state.pop(self.master, None)

    def saved(self) -> dict[str, Tensor]:
        """Tensors to save: the master, if it is a copy, and the optimizer's state."""
        tensors = {"master": self.master.detach()} if self.has_master else {}
        return tensors | saved_state(self.state)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `saved` gave."""
        tensors = dict(tensors)
        master = tensors.pop("master", None)
        if master is not None:
            self.set_value(master.to(self.parameter.device))
        restore_state(self._optimizer, self.master, tensors)
