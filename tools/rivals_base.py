"""What all contenders of a comparison share: what they are given, how they take a step, what they hold (see rivals.py).

`Setup` is what is the same for all of them, `Contender` what each of them can do, and `Rival` a model with a torch
optimizer: stock training, from which the packages' methods differ in a few places.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loqt_ds.config import Config, describe_model, load_config
from loqt_ds.core.schedules import LRSchedule
from loqt_ds.engines.state import random_tensors
from loqt_ds.evaluation import model_inputs, num_predicted
from loqt_ds.method import head
from loqt_ds.method.conversion import build_empty, checkpoint_files, initializer, target_linears, tie_weights
from loqt_ds.method.description import model_description
from loqt_ds.preflight import resolve_config


class MissingPackage(ImportError):
    """A rival's package is not installed."""


@dataclass(frozen=True)
class Setup:
    """What all contenders of one comparison have in common.

    shape: a name in configs/models, or a file. dtype: fp32 or bf16. rows, length: of a batch; LoQT chooses by them how
    it computes and what it keeps. num_layers: instead of the shape's own. cap_gib: of the device's memory.
    interval: steps between refreshes; None: in the first step, and when `step` is asked for one.
    growth: of LoQT's intervals (exponential schedule); None: they all are `interval`.
    lr_full_rank: of what every method trains in full (embeddings, norms, head); None: lr.
    max_steps: of a cosine from the peak to a tenth of it, after a warm-up over the first tenth; None: a constant rate.
    max_grad_norm: of all gradients together; None: no clipping.
    vocab_size: instead of the shape's own.
    masters: in bf16, what is trained is kept in float32, with moments in float32 or 8 bits, and only products are in
    bf16; without, rivals train bf16 weights with moments in bf16, as their packages do. In fp32 it makes no difference.
    is_large: a refresh of GaLore or APOLLO is not made but measured on one matrix of each shape, because GaLore's, an
    SVD of every matrix, can take ten minutes.
    start: directory of a checkpoint in full precision, whose weights all start from, in place of drawn ones; the model
    is then the one its config.json describes, whatever `shape` says, which is its name.
    full_rank: False freezes embeddings, norms, head and biases, so that what takes the place of the matrices (adapters,
    LoQT's B) is trained alone.
    calibration: batches for initializations that look at data (`rivals_initial.py`).
    """

    shape: str
    dtype: str = "fp32"
    rows: int = 8
    length: int = 256
    device: str = "cpu"
    num_layers: int | None = None
    cap_gib: float | None = None
    lr: float = 1e-3
    lr_full_rank: float | None = None
    interval: int | None = None
    max_steps: int | None = None
    growth: float | None = None
    max_grad_norm: float | None = None
    vocab_size: int | None = None
    masters: bool = False
    is_large: bool = False
    seed: int = 0
    start: str | None = None
    full_rank: bool = True
    calibration: tuple[dict[str, Tensor], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.start is not None and (self.num_layers is not None or self.vocab_size is not None):
            raise ValueError(f"start={self.start} has layers and a vocabulary; leave out num_layers and vocab_size")

    def config(self, *options: str) -> Config:
        """A run's configuration with this shape, dtype and device. Raises ConfigError for what there is not."""
        shape = self.shape if self.num_layers is None else shape_with_layers(self.shape, self.num_layers)
        # no text is read by this configuration, but a checkpoint without a tokenizer is refused
        model = [f"model.path={self.start}", f"data.tokenizer={self.start}"]
        model = [f"model.shape={shape}"] if self.start is None else model
        common = [
            *model,
            f"train.dtype={self.dtype}",
            f"train.device={self.device}",
            f"train.seed={self.seed}",
            f"train.micro_batch_size={self.rows}",
            f"data.sequence_length={self.length}",
            *([] if self.cap_gib is None else [f"train.memory_limit_gib={self.cap_gib}"]),
            *([] if self.vocab_size is None else [f"model.vocab_size={self.vocab_size}"]),
            *([] if self.max_grad_norm is None else [f"train.max_grad_norm={self.max_grad_norm}"]),
            f"train.max_steps={self.max_steps or 1000000}",
            f"optim.lr={self.lr}",
            f"optim.lr_full_rank={self.rate_of_rest}",
            f"optim.schedule={self.rates.kind}",
            f"optim.warmup_steps={self.rates.warmup_steps}",
            f"optim.min_lr_ratio={self.rates.min_ratio}",
        ]
        config = load_config(None, [*common, *options])
        return resolve_config(config, torch.device(self.device))

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """Of what rivals train."""
        return torch.bfloat16 if self.dtype == "bf16" and not self.masters else torch.float32

    @property
    def dtype_of_products(self) -> torch.dtype:
        """In which all contenders multiply, and which weights may have that nothing changes."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def computing(self) -> AbstractContextManager[Any]:
        """Around a forward of a rival: autocast, where weights have another dtype than products."""
        if self.dtype_of_weights == self.dtype_of_products:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, self.dtype_of_products)

    @property
    def rate_of_rest(self) -> float:
        """Peak learning rate of what every method trains in full."""
        return self.lr if self.lr_full_rank is None else self.lr_full_rank

    @property
    def rates(self) -> LRSchedule:
        """The factor on all learning rates, by step."""
        if self.max_steps is None:
            return LRSchedule("constant", max_steps=1, warmup_steps=0)
        return LRSchedule("cosine", max_steps=self.max_steps, warmup_steps=round(0.1 * self.max_steps), min_ratio=0.1)

    def schedule(self) -> list[str]:
        """Options of LoQT's re-initializations; none where `step` is asked for them."""
        if self.interval is None:
            return []
        if self.growth is None:
            return ["loqt.schedule=static", f"loqt.interval={self.interval}"]
        return ["loqt.schedule=exponential", f"loqt.interval={self.interval}", f"loqt.growth={self.growth}"]

    def description(self) -> Any:
        """transformers' configuration of the model."""
        return model_description(self.config())


@cache
def shape_with_layers(shape: str, num_layers: int) -> str:
    """A file, gone when this process ends, of a shape with another number of layers."""
    _, content = describe_model(load_config(None, [f"model.shape={shape}", "data.sequence_length=2"]))
    folder = Path(tempfile.mkdtemp(prefix="loqt_shape_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / f"{Path(shape).stem}_{num_layers}_layers.json"
    file.write_text(json.dumps(content | {"num_hidden_layers": num_layers}))
    return str(file)


@dataclass
class Taken:
    """One step. seconds: forward, backward, update. refresh: what finding new subspaces takes, where that was measured
    beside the step and not in it. gradients: their bytes when the backward was over. inside: seconds of the step that
    a re-initialization took."""

    loss: float
    seconds: dict[str, float]
    gradients: int
    refresh: float | None = None
    notes: list[str] = field(default_factory=list)
    inside: float | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Contender(Protocol):
    """A model that is being trained."""

    name: str
    model: nn.Module

    def step(self, batch: dict[str, Tensor], *, refresh: bool = False) -> Taken:
        """Takes one step on a batch of `input_ids` and `targets`, both (rows, length), targets -100 where nothing is
        predicted. `refresh`: new subspaces are found as well, where the method has any."""
        ...

    def computing(self) -> AbstractContextManager[Any]:
        """To be entered around a forward of `model` from outside, such as an evaluation, so that it computes as in a
        step."""
        ...

    def num_bytes(self) -> dict[str, int]:
        """Of what stays: weights (what the model holds) and states (what the optimizer holds, masters included), as
        they are now: ReLoRA's change when a start in full rank ends."""
        ...

    def num_trained(self) -> int:
        """Parameters that are trained, as they are now."""
        ...

    def state(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit, copied to the host: tensors, numbers, strings, lists and dicts only,
        so that `torch.load(..., weights_only=True)` reads it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back a `state`, also of another process. Raises ValueError for one of another contender."""
        ...


# ---------------------------------------------------------------- text and counting


MEASURED_PACKAGES = ("galore_torch", "q_galore_torch", "apollo_torch", "bitsandbytes")


def text_batch(rows: int, length: int, number: int) -> dict[str, Tensor]:
    """Bytes of Python's own source as `input_ids` and `targets`, both (rows, length); another piece for each number."""
    text = Path(os.__file__).read_bytes()
    count = rows * length
    text *= 2 + count // len(text)
    start = number * count % (len(text) - count - 1)
    ids = torch.frombuffer(bytearray(text[start : start + count + 1]), dtype=torch.uint8).long()
    return {"input_ids": ids[:-1].view(rows, length), "targets": ids[1:].view(rows, length)}


def nested(value: Any) -> Iterator[Tensor]:
    """The tensors in dicts, lists, tuples, and in the attributes of objects of the packages that are measured."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from nested(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from nested(item)
    elif type(value).__module__.partition(".")[0] in MEASURED_PACKAGES:
        yield from nested(vars(value))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def parameter_tensors(parameter: Tensor) -> list[Tensor]:
    """A parameter's values and what its package keeps beside them: scales of bitsandbytes' 4-bit weights (double
    quantized or not), scales and zero points of Q-GaLore's INT8 weights."""
    beside = [getattr(parameter, name, None) for name in ("quant_state", "scales", "zeros")]
    return [parameter.data, *nested(beside)]


def model_bytes(model: nn.Module) -> int:
    """Parameters with their scales, and buffers."""
    tensors = [tensor for parameter in model.parameters() for tensor in parameter_tensors(parameter)]
    return size([*tensors, *model.buffers()])


def gradient(parameter: Tensor) -> Tensor | None:
    """Of INT8 weights, which torch gives none, the one that Q-GaLore keeps in an attribute."""
    return getattr(parameter, "float_grad", parameter.grad)


def gradient_bytes(model: nn.Module) -> int:
    return size(found for parameter in model.parameters() if (found := gradient(parameter)) is not None)


class Clock:
    """Seconds of one part after another; on CUDA of what the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, {}  # type: tuple[torch.device, dict[str, float]]
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def part(self, name: str) -> None:
        """What went on since the last part was `name`."""
        now = self._now()
        self.seconds[name], self._last = now - self._last, now

    def skip(self) -> float:
        """What went on since the last part is no part; its seconds."""
        now = self._now()
        spent, self._last = now - self._last, now
        return spent


# ---------------------------------------------------------------- keeping


def packed(value: Any, seen: dict[int, Tensor]) -> Any:
    """Copies of tensors on the host, each once; numbers and strings; tuples as lists; dicts of such.

    seen: the copies made so far, by the id of the original. What is shared stays shared.
    """
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().as_subclass(Tensor).to("cpu", copy=True)
        return seen[id(value)]
    if isinstance(value, dict):
        return {name: packed(item, seen) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [packed(item, seen) for item in value]
    assert value is None or isinstance(value, bool | int | float | str), f"cannot be kept: {type(value)}"
    return value


def unpacked(value: Any, device: torch.device, seen: dict[int, Tensor]) -> Any:
    """The reverse of `packed`, on a device; lists stay lists."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.to(device, copy=True)
        return seen[id(value)]
    if isinstance(value, dict):
        return {name: unpacked(item, device, seen) for name, item in value.items()}
    if isinstance(value, list):
        return [unpacked(item, device, seen) for item in value]
    return value


def restore_random(saved: dict[str, Tensor], device: torch.device) -> None:
    """Sets torch's random state, of the CPU and of the device, to what `random_tensors` gave."""
    torch.set_rng_state(saved["torch"].cpu())
    if "cuda" in saved and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"].cpu(), device)


def check_owner(name: str, state: dict[str, Any]) -> None:
    """Raises ValueError for a state of another contender."""
    if state["name"] != name:
        raise ValueError(f"the state is of {state['name']!r}, this is {name!r}; build that one to go on")


# ---------------------------------------------------------------- a model and a torch optimizer


class Rival:
    """A model and a torch optimizer.

    Args:
        optimizer: over those of the model's parameters that are trained.
    """

    def __init__(self, name: str, setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.setup, self.model = name, setup, model.train()
        self.device = torch.device(setup.device)
        self.num_steps, self._rates = 0, setup.rates
        self.use(optimizer)
        head.install(model)

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps are taken by this optimizer; the rates that its groups have now are their peaks."""
        self.optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def rate_factor(self) -> float:
        """Of all learning rates in this step."""
        return self._rates.multiplier(self.num_steps)

    def set_rates(self) -> None:
        """Called before a step's update: the learning rates of this step."""
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self.rate_factor()

    def computing(self) -> AbstractContextManager[Any]:
        return self.setup.computing()

    def trained(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def clip(self) -> None:
        """Called before a step's update: scales gradients down to the largest norm allowed."""
        if self.setup.max_grad_norm is not None:
            gradients = [found for parameter in self.trained() if (found := gradient(parameter)) is not None]
            total = torch.nn.utils.get_total_norm(gradients)
            factor = torch.clamp(self.setup.max_grad_norm / (total + 1e-6), max=1.0)  # as torch's clip_grad_norm_
            for found in gradients:
                found.mul_(factor.to(found.device))

    def renew(self, refresh: bool) -> bool:
        """Called before a step's forward: does what is due between two steps, and says whether anything was."""
        return False

    def refresh_beside(self) -> float | None:
        """Called between backward and update of a step that shall refresh; seconds, where it is done outside the
        step."""
        return None

    def set_gap(self, refresh: bool) -> None:
        """Called before a step's update: whether this one refreshes."""

    def update(self) -> float | None:
        """The optimizer's step; its seconds in new subspaces, where it found any."""
        self.optimizer.step()
        return None

    def step(self, batch: dict[str, Tensor], *, refresh: bool = False) -> Taken:
        count = num_predicted(batch)
        clock = Clock(self.device)
        is_renewed = self.renew(refresh)
        renewing = clock.skip()
        inputs, targets = model_inputs(batch, self.device)
        with self.computing():
            loss = self.model(**inputs, targets=targets) / count
        clock.part("forward")
        loss.backward()
        clock.part("backward")
        gradients = gradient_bytes(self.model)
        beside = self.refresh_beside() if refresh else None
        self.set_gap(refresh)
        clock.skip()
        self.set_rates()
        self.clip()
        inside = self.update()
        self.optimizer.zero_grad(set_to_none=True)
        clock.part("update")
        if is_renewed:
            inside = renewing
            clock.seconds["update"] += renewing
        self.num_steps += 1
        return Taken(loss.item(), clock.seconds, gradients, beside, inside=inside)

    def num_bytes(self) -> dict[str, int]:
        return {"weights": model_bytes(self.model), "states": size(nested(list(self.optimizer.state.values())))}

    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.trained())

    # ---------------------------------------------------------------- keeping

    def kept(self) -> dict[str, list[Tensor]]:
        """All tensors of the model, by the names of its parameters and buffers."""
        parameters = {name: parameter_tensors(parameter) for name, parameter in self.model.named_parameters()}
        return parameters | {name: [buffer] for name, buffer in self.model.named_buffers()}

    def packed_entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state of one parameter, without objects."""
        return entry

    def unpacked_entry(self, entry: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """The reverse of `packed_entry`; `group` is the parameter's."""
        return entry

    def state(self) -> dict[str, Any]:
        seen: dict[int, Tensor] = {}
        states = self.optimizer.state
        entries = {
            name: packed(self.packed_entry(states[parameter]), seen)
            for name, parameter in self.model.named_parameters()
            if parameter in states
        }
        model = {name: packed(tensors, {}) for name, tensors in self.kept().items()}
        random = random_tensors(self.device)
        return {"name": self.name, "steps": self.num_steps, "model": model, "optimizer": entries, "random": random}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        check_owner(self.name, state)
        own = self.kept()
        if own.keys() != state["model"].keys():
            other = sorted(own.keys() ^ state["model"].keys())[0]
            raise ValueError(f"the state is of another model: {other} is in one of them only")
        for name, tensors in own.items():
            for tensor, saved in zip(tensors, state["model"][name], strict=True):
                tensor.copy_(saved)
        seen: dict[int, Tensor] = {}
        groups_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in self.model.named_parameters():
            if name in state["optimizer"]:
                entry = unpacked(state["optimizer"][name], self.device, seen)
                self.optimizer.state[parameter] = self.unpacked_entry(entry, groups_of[id(parameter)])
        self.num_steps = state["steps"]
        restore_random(state["random"], self.device)


# ---------------------------------------------------------------- what rivals are made of


def imported(module: str, package: str) -> Any:
    """A rival's module. Raises MissingPackage."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"{package} is not installed ({error}); pip install -e '.[compare]'") from error


@torch.no_grad()
def dense_model(setup: Setup) -> nn.Module:
    """transformers' own, with the weights that LoQT draws from this seed, or reads, before it quantizes them."""
    model = build_empty(setup.description(), attention=setup.config().model.attention)
    make_source = initializer(setup.seed) if setup.start is None else checkpoint_files(setup.start)
    source, dtype = make_source(model), setup.dtype_of_weights
    for path, module in model.named_modules():
        if list(module.named_parameters(recurse=False)):
            for name, drawn in source.module(path, module).items():
                module.register_parameter(name, nn.Parameter(drawn.to(setup.device, dtype)))
    tie_weights(model)
    torch.manual_seed(setup.seed)  # what is drawn from here on is a method's own
    return model.to(setup.device)  # buffers


def check_rank(name: str, setup: Setup, rank: int) -> None:
    """Raises ValueError for a rank that some linear does not have; no weight is drawn for that."""
    linears = target_linears(build_empty(setup.description()), "all-linear")
    path, linear = min(linears.items(), key=lambda item: min(item[1].weight.shape))
    if rank > min(linear.weight.shape):
        raise ValueError(
            f"contender {name!r}: the rank is {rank}, but {path} is {tuple(linear.weight.shape)}; give at most "
            f"{min(linear.weight.shape)}"
        )


def groups(setup: Setup, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the linears that LoQT adapts, or adapters in their place; and the rest, which
    is frozen and none where it is not to be trained."""
    chosen = {id(linear.weight) for linear in target_linears(model, "all-linear").values()}
    chosen |= {id(parameter) for path, parameter in model.named_parameters() if ".lora_" in path}
    if not setup.full_rank:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if id(parameter) in chosen], "lr": setup.lr},
        {"params": [parameter for parameter in trained if id(parameter) not in chosen], "lr": setup.rate_of_rest},
    ]
