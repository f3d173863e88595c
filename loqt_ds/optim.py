"""Parameter groups, Adam in 32 and 8 bits, master copies, and access to moments in whatever form they are kept.

- `adamw` is `torch.optim.AdamW`, fused; `adamw8bit` is bitsandbytes' AdamW8bit (two moments in 8 bits, blocks of 256,
  tensors below 4096 elements in 32 bits).
- Parameters in bf16 have float32 masters (`optim.master: fp32`), or none (`bf16`): then the update is computed in
  float32 and rounded stochastically, so that updates below half a unit in the last place survive on average.
- `ParameterOptimizer` is one parameter with its own optimizer object, so that a step can be taken for one parameter as
  soon as its gradient is complete (layer-wise updates) or for all of them, by the same code. It works on pieces of
  UPDATE_PIECE elements: value and gradient in float32 and Adam's temporaries exist for one piece only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.config import Config, OptimConfig
from loqt_ds.core.schedules import LRSchedule, ReinitSchedule
from loqt_ds.method.conversion import loqt_layers

MOMENT_KEYS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))
BLOCKSIZE_8BIT = 256
MIN_8BIT_SIZE = 4096  # elements from which moments are kept in 8 bits; bitsandbytes' own
LANES = 16  # float32 numbers in the widest vector of a CPU
UPDATE_PIECE = 2**22  # elements updated at once: a multiple of BLOCKSIZE_8BIT, so that pieces have whole blocks
ROUNDED_AT_ONCE = 2**20  # elements: rounding takes several times the memory of what is rounded, less than Adam then
_NORM_ROW = 4096  # elements whose squares are summed in one float32


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


def freeze_full_rank(model: nn.Module, *, but: Collection[str] = ()) -> None:
    """Lets everything but the B of each layer, and the parameters named in `but`, stay as it is
    (optim.train_full_rank=false)."""
    kept = {f"{name}.B" if name else "B" for name in loqt_layers(model)} | set(but)
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.requires_grad_(False)


def build_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, *, min_8bit_size: int = MIN_8BIT_SIZE
) -> torch.optim.Optimizer:
    """AdamW or AdamW8bit over torch-style parameter groups; of tensors below `min_8bit_size` elements moments have 32
    bits."""
    options: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
    if optim.name == "adamw":
        return EvenAdamW(groups, **options)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, min_8bit_size=min_8bit_size, **options)


class EvenAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused: one pass over each tensor, no temporaries.

    On a CPU the fused kernel computes the last elements of a tensor, those that do not fill a vector, by other
    instructions than the rest, which round differently. Here they too go through a full vector, so that an element's
    bits depend on its numbers alone: not on where a tensor ends, which for ZeRO's partitions is another place on
    another number of ranks.
    """

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        ends = [
            (tensor, *self._step_end(tensor, group))
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.grad is not None and tensor.device.type == "cpu" and tensor.numel() % LANES
        ]
        super().step()
        for tensor, value, state in ends:
            num = tensor.numel() % LANES
            tensor.data.view(-1)[-num:] = value[:num]
            for key in MOMENT_KEYS[0]:
                self.state[tensor][key].view(-1)[-num:] = state[key][:num]

    def _step_end(self, tensor: Tensor, group: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The last elements after the step, and their state, in vectors of LANES."""
        num = tensor.numel() % LANES

        def end(of: Tensor) -> Tensor:
            return nn.functional.pad(of.detach().view(-1)[-num:], (0, LANES - num))

        assert tensor.grad is not None
        alone = nn.Parameter(end(tensor))
        alone.grad = end(tensor.grad)
        optimizer = torch.optim.AdamW([{**group, "params": [alone]}])
        if state := self.state.get(tensor):
            moments = {key: end(state[key]) for key in MOMENT_KEYS[0]}
            optimizer.state[alone] = {"step": state["step"].clone(), **moments}
        optimizer.step()
        return alone.detach(), optimizer.state[alone]


class LearningRates:
    """The two rates of each step: of B, and of the parameters trained in full rank."""

    def __init__(self, config: Config, reinit: ReinitSchedule) -> None:
        optim = config.optim
        self._factors = optim.lr
        self._full_rank = optim.lr if optim.lr_full_rank is None else optim.lr_full_rank
        self._schedule = LRSchedule(
            kind=optim.schedule,
            max_steps=config.num_steps,
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


def moment_keys(state: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of the two moments in an optimizer's state of one tensor; None before its first step."""
    return next((keys for keys in MOMENT_KEYS if keys[0] in state), None)


def decode_moment(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """8-bit codes of a moment, in blocks of 256 of their flat order, as float32 in their shape."""
    import bitsandbytes.functional as F

    flat = F.dequantize_blockwise(
        codes.reshape(-1).contiguous(), absmax=absmax.contiguous(), code=table, blocksize=BLOCKSIZE_8BIT
    )
    return flat.view(codes.shape)


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


def new_state(optimizer: Any, first: Tensor, second: Tensor, step: int, *, shape: torch.Size) -> dict[str, Tensor]:
    """What `restore_state` takes, from both moments in float32 (any shape), as this optimizer would keep them for a
    tensor of `shape`."""
    first, second = first.view(shape), second.view(shape)
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
    state = {"step": torch.tensor(step), "state1": first, "state2": second}
    if optimizer.args.optim_bits != 8 or first.numel() < optimizer.args.min_8bit_size:
        return state
    from bitsandbytes.functional import create_dynamic_map

    for number, moment in ((1, first), (2, second)):
        table = create_dynamic_map(signed=number == 1).to(moment.device)
        state[f"state{number}"], state[f"absmax{number}"] = quantize_moment(moment, table)
    return state


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
            # Where the tensor is, for a fused update, which then need not wait for the host.
            device = tensor.device if optimizer.param_groups[0].get("fused") else value.device
            state[key] = value.to(device, torch.float32, copy=True) if is_torch else int(value)
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
    rounded = noise.add_(bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(torch.bfloat16)


def gradient_norm(gradient: Tensor) -> Tensor:
    """2-norm of a tensor of any shape and dtype, float32 (), without a float32 copy of it.

    Of rows, and then of their norms: one float32 sum over 10^8 squares on a CPU is 1 % too small. In pieces: on a CPU
    torch's own norm of a bf16 tensor in float32 makes a copy.
    """
    norms = []
    for piece in gradient.detach().reshape(-1).split(UPDATE_PIECE):
        whole = piece.numel() - piece.numel() % _NORM_ROW
        norms.append(torch.linalg.vector_norm(piece[:whole].view(-1, _NORM_ROW), dim=1, dtype=torch.float32))
        norms.append(torch.linalg.vector_norm(piece[whole:], dtype=torch.float32).view(1))
    return torch.linalg.vector_norm(torch.cat(norms))


def clipping_scale(norm: float, limit: float | None) -> float:
    """What a gradient of norm `norm` is multiplied with so that its norm is at most `limit`, as torch's
    `clip_grad_norm_` has it; 1 without a limit."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


class ParameterOptimizer:
    """One parameter, its master copy and its optimizer.

    Args:
        parameter: float32 (then it is its own master) or bf16.
        optim: kind of optimizer and of master.
        weight_decay: decoupled, as in AdamW.
        generator: for stochastic rounding, on the parameter's device.
        num_whole: elements of the parameter that this is a part of, which decides whether moments have 8 bits.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        optim: OptimConfig,
        *,
        weight_decay: float,
        generator: torch.Generator,
        num_whole: int | None = None,
    ) -> None:
        if not parameter.is_contiguous():  # pieces are those of the flat order
            parameter.data = parameter.data.contiguous()
        self.parameter, self._generator = parameter, generator
        self._own = parameter.dtype == torch.float32
        self._transient = not self._own and optim.master == "bf16"
        if self._own:
            self.master = parameter
        elif self._transient:
            self.master = nn.Parameter(torch.empty(0, device=parameter.device))
        else:
            self.master = nn.Parameter(parameter.detach().float())
        # What the optimizer is shown: one piece after another.
        self._piece = nn.Parameter(torch.empty(0, device=parameter.device))
        whole = parameter.numel() if num_whole is None else num_whole
        min_8bit_size = 1 if whole >= MIN_8BIT_SIZE else MIN_8BIT_SIZE
        groups = [{"params": [self._piece], "weight_decay": weight_decay}]
        self._optimizer = build_optimizer(groups, optim, min_8bit_size=min_8bit_size)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of this one parameter; it keeps the state under `master`."""
        return self._optimizer

    @property
    def values(self) -> nn.Parameter:
        """The tensor that holds the value in the highest precision there is."""
        return self.parameter if self._own or self._transient else self.master

    @torch.no_grad()
    def step(self, lr: float, *, gradient_scale: float = 1.0) -> None:
        """Updates the parameter from its gradient, multiplied with `gradient_scale`, and frees the gradient.

        Bit for bit what the whole tensor's update would give. Nothing in float32 is larger than a piece, but for
        masters and moments.
        """
        assert self.parameter.grad is not None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        state = self._state()
        gradient, self.parameter.grad = self.parameter.grad.reshape(-1), None
        for start in range(0, max(1, gradient.numel()), UPDATE_PIECE):  # of an empty tensor, too, a step is counted
            place = slice(start, min(start + UPDATE_PIECE, gradient.numel()))
            self._step_piece(place, gradient[place], gradient_scale, state)

    def _state(self) -> dict[str, Any]:
        """The optimizer's state of the whole parameter; that of a new one before the first step."""
        optimizer = self._optimizer
        state: dict[str, Any] = optimizer.state[self.master]
        if state:
            return state
        if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.parameter.device)
            for key in MOMENT_KEYS[0]:
                state[key] = torch.zeros_like(self.parameter, dtype=torch.float32)
            return state
        # bitsandbytes asks for shape and device only: no float32 copy is needed.
        optimizer.init_state(optimizer.param_groups[0], self.parameter, 0, 0)  # type: ignore[attr-defined]
        optimizer.state[self.master] = optimizer.state.pop(self.parameter)
        return optimizer.state[self.master]

    def _step_piece(self, place: slice, gradient: Tensor, scale: float, state: dict[str, Any]) -> None:
        """Updates elements `place` of the flat parameter. `state` is the whole parameter's; the last piece counts."""
        if not gradient.numel():  # no kernel of bitsandbytes takes nothing
            state["step"] += 1
            return
        optimizer, piece = self._optimizer, self._piece
        piece.data = self.values.data.view(-1)[place].float()  # a view where that is float32
        piece.grad = gradient.float() if scale == 1 else gradient.float().mul_(scale)
        part = _state_of_piece(state, place)
        optimizer.state[piece] = part
        if isinstance(optimizer, torch.optim.Adam):
            optimizer.step()
        else:
            _step_bitsandbytes(optimizer, piece)
        del optimizer.state[piece]
        piece.grad = None
        if place.stop == self.parameter.numel():
            state["step"] = part["step"]
        shown = self.parameter.data.view(-1)[place]
        if self._transient:
            self._round(piece.data, shown)
        elif not self._own:
            shown.copy_(piece.data)
        piece.data = piece.data.new_empty(0)

    def _round(self, value: Tensor, target: Tensor) -> None:
        """Writes float32 values into bf16 ones, rounded stochastically."""
        for ours, exact in zip(target.split(ROUNDED_AT_ONCE), value.split(ROUNDED_AT_ONCE), strict=True):
            ours.copy_(stochastic_round(exact, self._generator))


def _state_of_piece(state: dict[str, Any], place: slice) -> dict[str, Any]:
    """The state of elements `place` of a flattened parameter: views, and a step count of its own."""
    part = {}
    for key, value in state.items():
        if key == "step":
            part[key] = value.clone() if isinstance(value, Tensor) else value
        elif key.startswith("qmap"):
            part[key] = value
        elif key.startswith("absmax"):
            part[key] = value[place.start // BLOCKSIZE_8BIT : -(-place.stop // BLOCKSIZE_8BIT)]
        else:
            part[key] = value.view(-1)[place]
    return part


def _step_bitsandbytes(optimizer: Any, tensor: nn.Parameter) -> None:
    """The update inside bitsandbytes' `step` for one tensor, without waiting for the device, as `step` does each time.

    Its kernels run on the default stream; a caller on another one has to be waited for, and has to wait.
    """
    device = tensor.device
    aside = device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device)
    if aside:
        torch.cuda.synchronize(device)
    optimizer.update_step(optimizer.param_groups[0], tensor, 0, 0)
    if aside:
        torch.cuda.synchronize(device)


class RoundingAdam(torch.optim.Optimizer):
    """Adam over bf16 tensors that have no float32 copies: each is updated in float32 and rounded stochastically.

    What ZeRO drives where its own masters are bf16; each tensor is a `ParameterOptimizer`.

    Args:
        groups: torch-style parameter groups; their tensors may be replaced before the first step.
        optim: kind of optimizer; `optim.master` is bf16.
        seed: of the rounding.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig, *, seed: int) -> None:
        super().__init__(groups, {"lr": optim.lr, "weight_decay": 0.0})
        self._optim, self._seed = optim, seed
        self._items: dict[Tensor, ParameterOptimizer] = {}
        self._generator: torch.Generator | None = None

    def generator(self, device: torch.device) -> torch.Generator:
        """The rounding's random numbers."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(self._seed)
        return self._generator

    def item(self, tensor: Any, group: dict[str, Any]) -> ParameterOptimizer:
        """The optimizer of one tensor, with the hyper-parameters of its group."""
        if tensor not in self._items:
            optim = replace(
                self._optim,
                betas=list(group.get("betas", self._optim.betas)),
                eps=group.get("eps", self._optim.eps),
            )
            self._items[tensor] = ParameterOptimizer(
                tensor, optim, weight_decay=group["weight_decay"], generator=self.generator(tensor.device)
            )
        return self._items[tensor]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every tensor that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self.item(tensor, group).step(group["lr"])
