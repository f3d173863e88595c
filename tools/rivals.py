"""Ways to train one model, behind one small protocol: LoQT and what it is compared with.

    contender = build("galore:128", Setup("llama_9m", dtype="fp32"))
    taken = contender.step(batch)                # forward, backward, update, and the seconds of each
    taken = contender.step(batch, refresh=True)  # a step that also finds new subspaces

A contender is named by its method and, where it has one, its rank:

    adamw        full rank, torch's fused AdamW
    adamw8bit    full rank, bitsandbytes' AdamW8bit
    galore:R     full rank, galore-torch's GaLoreAdamW
    apollo:R     full rank, apollo-torch's APOLLOAdamW (random projections, a scale for each channel)
    qlora:R      frozen NF4 weights and PEFT's LoRA adapters, torch's fused AdamW
    loqt:R       this project, 32-bit AdamW
    loqt8bit:R   this project, 8-bit AdamW
    loqtcard:R   loqt8bit as a small card asks for it: layer-wise updates, bf16 without masters

This project's may be followed by options of a run: `loqt:128+loqt.product=factored+train.lean_activations=true`.

All have transformers' model of the same shape, the same attention and the same loss (`loqt_ds.method.head`), and train
the same matrices in full rank: embeddings, norms and head, QLoRA's too. What differs is how the linears in between are
trained. In bf16 the rivals update bf16 weights, as their packages do; LoQT keeps float32 masters of what it trains,
as is its default (but loqtcard). On a CPU bitsandbytes dequantizes matrices whose width is no multiple of 64 wrongly
(`loqt_ds.core.quantization` tells more): QLoRA's losses suffer from that there, its times do not.

The rivals are packages: `pip install -e '.[compare]'`. (APOLLO's licence is CC-BY-NC: it is used for measuring only.)
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loqt_ds.config import Config, describe_model, load_config
from loqt_ds.core.schedules import LRSchedule, ReinitSchedule
from loqt_ds.engines.single import SingleEngine
from loqt_ds.evaluation import model_inputs, num_predicted
from loqt_ds.method import head
from loqt_ds.method.conversion import target_linears
from loqt_ds.method.description import model_description, training_dtype
from loqt_ds.ranks import ALONE
from loqt_ds.run import build_engine, load_model, resolve_activations, resolve_config

SCALE = 0.25  # of GaLore's update, its authors' for pretraining; no time depends on it


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
    is_large: a refresh of GaLore or APOLLO is not made but measured on one matrix of each shape, because GaLore's, an
    SVD of every matrix, can take ten minutes.
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
    is_large: bool = False
    seed: int = 0

    def config(self, *options: str) -> Config:
        """A run's configuration with this shape, dtype and device. Raises ConfigError for what there is not."""
        shape = self.shape if self.num_layers is None else shape_with_layers(self.shape, self.num_layers)
        common = [
            f"model.shape={shape}",
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

    def num_bytes(self) -> dict[str, int]:
        """Of what stays: weights (what the model holds) and states (what the optimizer holds, masters included)."""
        ...


# ---------------------------------------------------------------- text and counting


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
    elif type(value).__module__.partition(".")[0] in ("galore_torch", "apollo_torch", "bitsandbytes"):
        yield from nested(vars(value))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def model_bytes(model: nn.Module) -> int:
    """Parameters, buffers, and the scales that bitsandbytes keeps beside a 4-bit parameter."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        tensors += nested(getattr(parameter, "quant_state", None))
    return size(tensors)


def gradient_bytes(model: nn.Module) -> int:
    return size(parameter.grad for parameter in model.parameters() if parameter.grad is not None)


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


# ---------------------------------------------------------------- rivals


class Rival:
    """A model and a torch optimizer.

    Args:
        optimizer: over those of the model's parameters that are trained.
    """

    def __init__(self, name: str, setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.setup, self.model, self.optimizer = name, setup, model.train(), optimizer
        self.device = torch.device(setup.device)
        self.num_steps, self._rates = 0, setup.rates
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        head.install(model)

    def set_rates(self) -> None:
        """Called before a step's update: the learning rates of this step."""
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self._rates.multiplier(self.num_steps)

    def clip(self) -> None:
        """Called before a step's update: scales gradients down to the largest norm allowed."""
        if self.setup.max_grad_norm is not None:
            trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, self.setup.max_grad_norm)

    def refresh_beside(self) -> float | None:
        """Called between backward and update of a step that shall refresh; seconds, where it is done outside the
        step."""
        return None

    def set_gap(self, refresh: bool) -> None:
        """Called before a step's update: whether this one refreshes."""

    def step(self, batch: dict[str, Tensor], *, refresh: bool = False) -> Taken:
        count = num_predicted(batch)
        clock = Clock(self.device)
        inputs, targets = model_inputs(batch, self.device)
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
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.part("update")
        self.num_steps += 1
        return Taken(loss.item(), clock.seconds, gradients, beside)

    def num_bytes(self) -> dict[str, int]:
        return {"weights": model_bytes(self.model), "states": size(nested(list(self.optimizer.state.values())))}


class Projected(Rival):
    """GaLore or APOLLO: the optimizer sees the gradients of the linears through a projection.

    Their projector finds a new basis where its own count of steps is divisible by `update_proj_gap`.
    """

    def _projectors(self) -> Iterator[tuple[Tensor, Any]]:
        for parameter, state in self.optimizer.state.items():
            if "projector" in state:
                yield parameter, state["projector"]

    def set_gap(self, refresh: bool) -> None:
        if self.setup.interval is None:
            for _, projector in self._projectors():
                projector.update_proj_gap = 1 if refresh and not self.setup.is_large else NEVER

    def refresh_beside(self) -> float | None:
        """Of GaLore, where all matrices would take too long: one of each shape, times how many there are."""
        if not self.setup.is_large:
            return None
        counts: dict[torch.Size, int] = {}
        found: dict[torch.Size, tuple[Tensor, Any]] = {}
        for parameter, projector in self._projectors():
            assert parameter.grad is not None
            counts[parameter.shape] = counts.get(parameter.shape, 0) + 1
            found.setdefault(parameter.shape, (parameter.grad, projector))
        total = 0.0
        for shape, (gradient, projector) in found.items():
            side = "right" if shape[0] >= shape[1] else "left"
            clock = Clock(self.device)
            extra = {"seed": 1} if hasattr(projector, "seed") else {}
            projector.get_orthogonal_matrix(gradient, projector.rank, type=side, **extra)
            total += clock.skip() * counts[shape]
        return total

    def preset(self) -> None:
        """Gives every matrix a random basis, so that the first step finds none."""
        for group in self.optimizer.param_groups:
            if "rank" not in group:
                continue
            for parameter in group["params"]:
                rows, columns = parameter.shape
                basis = torch.empty(min(rows, columns), group["rank"], dtype=torch.float32, device=self.device)
                nn.init.orthogonal_(basis)
                projector = self._new_projector(group, self.optimizer.state[parameter])
                projector.ortho_matrix = (basis.T if rows >= columns else basis).to(parameter.dtype).contiguous()
                self.optimizer.state[parameter] |= {"projector": projector, "step": 1}

    def _new_projector(self, group: dict[str, Any], state: dict[str, Any]) -> Any:
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "_initialize_projector"):  # APOLLO
            return optimizer._initialize_projector(group, state)
        projector = importlib.import_module("galore_torch.galore_projector").GaLoreProjector
        names = ("update_proj_gap", "scale", "proj_type")
        return projector(group["rank"], **{name: group[name] for name in names})


NEVER = 2**62


def imported(module: str, package: str) -> Any:
    """A rival's module. Raises MissingPackage."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"{package} is not installed ({error}); pip install -e '.[compare]'") from error


def dense_model(setup: Setup) -> nn.Module:
    """transformers' own, drawn from the seed."""
    from transformers import AutoModelForCausalLM

    config = setup.config()
    torch.manual_seed(setup.seed)
    with torch.device(setup.device):
        return AutoModelForCausalLM.from_config(
            setup.description(), dtype=training_dtype(config), attn_implementation=config.model.attention
        )


def groups(setup: Setup, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the linears that LoQT adapts, or adapters in their place; and the rest."""
    chosen = {id(linear.weight) for linear in target_linears(model, "all-linear").values()}
    chosen |= {id(parameter) for path, parameter in model.named_parameters() if ".lora_" in path}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if id(parameter) in chosen], "lr": setup.lr},
        {"params": [parameter for parameter in trained if id(parameter) not in chosen], "lr": setup.rate_of_rest},
    ]


def adamw(name: str, setup: Setup, rank: int | None) -> Rival:
    model = dense_model(setup)
    return Rival(name, setup, model, torch.optim.AdamW(groups(setup, model), lr=setup.lr, weight_decay=0.0, fused=True))


def adamw8bit(name: str, setup: Setup, rank: int | None) -> Rival:
    import bitsandbytes

    model = dense_model(setup)
    return Rival(name, setup, model, bitsandbytes.optim.AdamW8bit(groups(setup, model), lr=setup.lr, weight_decay=0.0))


def projected(name: str, setup: Setup, rank: int | None) -> Rival:
    """GaLore or APOLLO, on the linears that LoQT adapts."""
    is_galore = name.startswith("galore")
    module = imported("galore_torch", "galore-torch") if is_galore else imported("apollo_torch", "apollo-torch")
    model = dense_model(setup)
    matrices, others = groups(setup, model)
    group: dict[str, Any] = matrices | {
        "rank": rank,
        "update_proj_gap": setup.interval or NEVER,
        "scale": SCALE if is_galore else 1.0,
        "proj_type": "std",
    }
    if not is_galore:
        group |= {"proj": "random", "scale_type": "channel"}
    make = module.GaLoreAdamW if is_galore else module.APOLLOAdamW
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that torch has an AdamW, too
        optimizer = make([others, group], lr=setup.lr, weight_decay=0.0)
    rival = Projected(name, setup, model, optimizer)
    if setup.is_large:
        rival.preset()
    return rival


def freeze_in_nf4(model: nn.Module, linears: dict[str, nn.Linear], device: str) -> None:
    """Puts bitsandbytes' NF4 linears in the place of linears, with their weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear in linears.items():
        weight, bias = linear.weight.data, linear.bias
        out_features, in_features = weight.shape
        frozen = Linear4bit(in_features, out_features, bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
        frozen.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=frozen)
        frozen.bias = bias
        model.set_submodule(path, frozen.to(device))  # which quantizes


def qlora(name: str, setup: Setup, rank: int | None) -> Rival:
    """PEFT's LoRA on bitsandbytes' frozen linears; what is no adapted linear is trained, as in the others."""
    peft = imported("peft", "peft")
    model = dense_model(setup)
    targets = target_linears(model, "all-linear")
    freeze_in_nf4(model, targets, setup.device)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(targets))
    model = peft.inject_adapter_in_model(config, model)  # freezes all but the adapters
    frozen_names = {f"{path}.base_layer.weight" for path in targets}
    for path, parameter in model.named_parameters():
        if path not in frozen_names:
            parameter.requires_grad_(True)
    return Rival(name, setup, model, torch.optim.AdamW(groups(setup, model), lr=setup.lr, weight_decay=0.0, fused=True))


# ---------------------------------------------------------------- LoQT


@dataclass(frozen=True)
class OnDemand(ReinitSchedule):
    """Due in the first step, and in a step for which `asked` was set."""

    asked: list[bool] = field(default_factory=lambda: [True])

    def is_due(self, step: int) -> bool:
        return self.asked[0]


class LoQT:
    """What `loqt_ds.run` builds of a configuration, and one step after another of its engine on one device."""

    def __init__(self, name: str, setup: Setup, *options: str) -> None:
        self.name, self.setup, self.device = name, setup, torch.device(setup.device)
        config, description = setup.config(*setup.schedule(), *options), setup.description()
        config = resolve_activations(config, description, self.device, None, ALONE, None)
        self.notes: list[str] = []
        torch.manual_seed(setup.seed)
        model, original = load_model(config, description, self.device, ALONE, resumed=False, say=self.notes.append)
        self.model = model.train()
        engine = build_engine(config, model, None, original, ALONE)
        assert isinstance(engine, SingleEngine)
        self.engine = engine
        self._on_demand: OnDemand | None = None
        if setup.interval is None:
            self._on_demand = OnDemand("never", 1, 1.0)
            engine.controller.schedule = self._on_demand
            self._on_demand.asked[0] = True

    def step(self, batch: dict[str, Tensor], *, refresh: bool = False) -> Taken:
        if self._on_demand is not None and self.engine.step_index:
            self._on_demand.asked[0] = refresh
        count = num_predicted(batch)
        clock = Clock(self.device)
        inputs, targets = model_inputs(batch, self.device)
        loss = self.engine(**inputs, targets=targets) / count
        clock.part("forward")
        self.engine.backward(loss)
        clock.part("backward")
        gradients = gradient_bytes(self.model)
        clock.skip()
        report = self.engine.step()
        clock.part("update")
        assert report is not None
        notes = [] if report.applied else ["the update was skipped: a gradient is not finite"]
        assert report.reinit is not None or not refresh, "a re-initialization was asked for"
        inside = None
        if report.reinit is not None:
            inside = sum(report.reinit.seconds.values())
            notes += [f"{layer.name}: {layer.kept}" for layer in report.reinit.layers if layer.kept]
        return Taken(loss.item(), clock.seconds, gradients, None, notes, inside)

    def num_bytes(self) -> dict[str, int]:
        states = size(self.engine.saved_tensors()["optimizer"].values())
        if self.setup.dtype == "fp32":  # then parameters are their own masters
            shown = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
            saved = self.engine.saved_tensors()["optimizer"].values()
            states = size(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in shown)
        return {"weights": model_bytes(self.model), "states": states}


def loqt(name: str, setup: Setup, rank: int | None) -> LoQT:
    method = parse(name)[0]
    options = [f"loqt.rank={rank}", f"optim.name={'adamw' if method == 'loqt' else 'adamw8bit'}"]
    if method == "loqtcard":
        options += ["optim.layerwise=true", *(["optim.master=bf16"] if setup.dtype == "bf16" else [])]
    return LoQT(name, setup, *options, *options_of(name))


# ---------------------------------------------------------------- all


METHODS: dict[str, Callable[[str, Setup, int | None], Contender]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "galore": projected,
    "apollo": projected,
    "qlora": qlora,
    "loqt": loqt,
    "loqt8bit": loqt,
    "loqtcard": loqt,
}
FULL_RANK = ("adamw", "adamw8bit")


def parse(name: str) -> tuple[str, int | None]:
    """(method, rank) of a contender's name. Raises ValueError, telling the methods, for a name that says nothing."""
    method, _, rank = name.partition("+")[0].partition(":")
    if method not in METHODS:
        raise ValueError(f"contender {name!r}: there is no method {method!r}; there are {', '.join(METHODS)}")
    if (method in FULL_RANK) != (rank == ""):
        wanted = "takes no rank" if method in FULL_RANK else f"needs a rank, such as {method}:128"
        raise ValueError(f"contender {name!r}: {method} {wanted}")
    if rank and not (rank.isdecimal() and int(rank) > 0):
        raise ValueError(f"contender {name!r}: the rank is {rank!r}; give a positive number")
    if options_of(name) and not method.startswith("loqt"):
        raise ValueError(f"contender {name!r}: {method} takes no options of a run; leave out what follows the +")
    return method, int(rank) if rank else None


def options_of(name: str) -> list[str]:
    """The options of a run that follow a contender's name."""
    return name.split("+")[1:]


def build(name: str, setup: Setup) -> Contender:
    """The contender of a name, on its device, before its first step.

    Raises ValueError for names that say nothing and ranks that do not fit, MissingPackage where a rival is not
    installed.
    """
    method, rank = parse(name)
    return METHODS[method](name, setup, rank)
