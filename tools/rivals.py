"""Ways to train one model, behind one small protocol: LoQT and what it is compared with.

    contender = build("galore:128", Setup("llama_9m", dtype="fp32"))
    taken = contender.step(batch)                # forward, backward, update, and the seconds of each
    taken = contender.step(batch, refresh=True)  # a step that also finds new subspaces
    torch.save(contender.state(), file)          # and `restore`, to go on in another process

A contender is named by its method and, where it has one, its rank:

    adamw        full rank, torch's fused AdamW
    adamw8bit    full rank, bitsandbytes' AdamW8bit
    galore:R     full rank, galore-torch's GaLoreAdamW
    qgalore:R    INT8 weights, q-galore-torch's 8-bit AdamW with INT4 projections
    apollo:R     full rank, apollo-torch's APOLLOAdamW (random projections, a scale for each channel)
    apollomini   the same with rank 1 and one scale for each matrix
    lora:R       frozen weights and PEFT's LoRA adapters, torch's fused AdamW
    qlora:R      the same with frozen NF4 weights
    loftq:R      the same with weights and adapters that PEFT's LoftQ has initialized
    lqlora:R     the same with LQ-LoRA's (`rivals_initial.py`, which looks at data: `Setup.calibration`)
    apiq:R       the same with ApiQ's
    relora:R     LoRA that is merged and restarted; `relora:R+start=N` after N steps in full rank
    loqt:R       this project, 32-bit AdamW
    loqt8bit:R   this project, 8-bit AdamW, as is its default
    loqtnq:R     loqt8bit without quantization of W and P
    loqtcard:R   loqt8bit as a small card asks for it: layer-wise updates, bf16 without masters (but for Setup.masters)

This project's may be followed by options of a run: `loqt:128+loqt.product=factored+train.lean_activations=true`, and by
ideas that are not in the product (`candidates.py`): `loqt:128+candidate.NAME=VALUE`.

All have transformers' model of the same shape, the same attention and the same loss (`loqt_ds.method.head`), and train
the same matrices in full rank: embeddings, norms and head, the adapters' too (none of these with
`Setup(full_rank=False)`). They start from the same weights, drawn or read (`Setup.start`). What differs is how the
linears in between are trained; how each rival is configured, and where that is from, is told in `rivals_projected.py`,
`rivals_adapters.py` and `rivals_initial.py`.

In bf16 LoQT keeps float32 masters of what it trains beside bf16 weights, as is its default (but loqtcard). The rivals'
packages update bf16 weights, with moments in bf16, where a second moment hardly decays and small updates round to
nothing. `Setup(dtype="bf16", masters=True)` holds precision equal: rivals keep float32 weights, gradients and moments
(8-bit moments stay 8-bit ones) and multiply in bf16, under autocast, where also what runs between the products - the
residual stream, the norms - is float32, which is bf16 in LoQT. Bytes of theirs then are 4 for each trained weight and 4
for its gradient; LoQT's are 2 and 2, and 4 for the master, which counts as a state.

On a CPU bitsandbytes dequantizes matrices whose width is no multiple of 64 wrongly (`loqt_ds.core.quantization` tells
more): the losses of QLoRA, LoftQ, LQ-LoRA and ApiQ suffer from that there, their times do not.

The rivals are packages: `pip install -e '.[compare]'`. (APOLLO's licence is CC-BY-NC: it is used for measuring only.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from rivals_adapters import loftq, lora, qlora, relora
from rivals_base import (
    Clock,
    Contender,
    MissingPackage,
    Rival,
    Setup,
    Taken,
    check_owner,
    check_rank,
    dense_model,
    gradient_bytes,
    groups,
    model_bytes,
    packed,
    size,
    text_batch,
)
from rivals_initial import apiq, lqlora
from rivals_projected import apollo, galore, projection_group, qgalore
from torch import Tensor

from loqt_ds.config import Config
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.engines.single import SingleEngine
from loqt_ds.evaluation import model_inputs, num_predicted
from loqt_ds.method.conversion import build_empty, build_meta, loqt_layers, target_linears
from loqt_ds.method.description import training_dtype
from loqt_ds.preflight import resolve_activations
from loqt_ds.ranks import ALONE
from loqt_ds.run import build_engine, load_model

__all__ = [
    "METHODS",
    "WITHOUT_RANK",
    "Contender",
    "LoQT",
    "MissingPackage",
    "OnDemand",
    "Rival",
    "Setup",
    "Taken",
    "build",
    "check",
    "dense_model",
    "model_bytes",
    "options_of",
    "parse",
    "run_options",
    "text_batch",
]

CANDIDATE = "candidate."

# ---------------------------------------------------------------- full rank


def adamw(name: str, setup: Setup, rank: int | None) -> Rival:
    model = dense_model(setup)
    return Rival(name, setup, model, torch.optim.AdamW(groups(setup, model), lr=setup.lr, weight_decay=0.0, fused=True))


def adamw8bit(name: str, setup: Setup, rank: int | None) -> Rival:
    import bitsandbytes

    model = dense_model(setup)
    return Rival(name, setup, model, bitsandbytes.optim.AdamW8bit(groups(setup, model), lr=setup.lr, weight_decay=0.0))


# ---------------------------------------------------------------- LoQT


@dataclass(frozen=True)
class OnDemand(ReinitSchedule):
    """Due in the first step, and in a step for which `asked` was set."""

    asked: list[bool] = field(default_factory=lambda: [True])

    def is_due(self, step: int) -> bool:
        return self.asked[0]


class LoQT:
    """What `loqt_ds.run` builds of a configuration, and one step after another of its engine on one device."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup, self.device = name, setup, torch.device(setup.device)
        config, description = loqt_config(name, setup), setup.description()
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
        if wanted := candidates_of(name):
            importlib.import_module("candidates").install(engine, wanted)

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

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def num_bytes(self) -> dict[str, int]:
        states = size(self.engine.saved_tensors()["optimizer"].values())
        if self.setup.dtype == "fp32":  # then parameters are their own masters
            shown = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
            saved = self.engine.saved_tensors()["optimizer"].values()
            states = size(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in shown)
        if candidates_of(self.name):  # which may keep residuals
            states += self.engine.controller.num_bytes()  # type: ignore[attr-defined]
        return {"weights": model_bytes(self.model), "states": states}

    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def state(self) -> dict[str, Any]:
        seen: dict[int, Tensor] = {}
        tensors, own = self.engine.saved_tensors(), self.engine.saved_state()
        return {"name": self.name, "tensors": packed(tensors, seen), "engine": packed(own, seen)}

    def restore(self, state: dict[str, Any]) -> None:
        check_owner(self.name, state)
        tensors: dict[str, dict[str, Tensor]] = state["tensors"]
        random = {name: tensor.cpu() for name, tensor in tensors["random"].items()}  # wherever it was read to
        kept: Any = SimpleNamespace(  # what an engine reads of a checkpoint
            path=f"the state of {self.name}",
            step=state["engine"]["step"],
            metadata={"engine_state": state["engine"]},
            num_parts=lambda group: 1,
            tensors=lambda group, part=None: random if group == "random" else tensors[group],
        )
        self.engine.restore(kept)


LOQT_OPTIONS = {
    "loqt": ("optim.name=adamw",),
    "loqt8bit": ("optim.name=adamw8bit",),
    "loqtnq": ("optim.name=adamw8bit", "loqt.quantize_w=none", "loqt.quantize_p=none"),
    "loqtcard": ("optim.name=adamw8bit", "optim.layerwise=true"),
}


def loqt_config(name: str, setup: Setup) -> Config:
    """Of one of this project's. Raises ConfigError for options that there are not, or that do not go together."""
    method, rank = parse(name)
    # intervals are read by no run that is initialized once
    schedule = [] if "loqt.schedule=never" in run_options(name) else setup.schedule()
    options = [*schedule, f"loqt.rank={rank}", *LOQT_OPTIONS[method]]
    options += [] if setup.full_rank else ["optim.train_full_rank=false", "optim.lr_full_rank=null"]
    if method == "loqtcard":
        options += ["optim.master=bf16"] if setup.dtype_of_weights == torch.bfloat16 else []
        if setup.max_grad_norm is not None:  # a layer is updated before the norm of all gradients is known
            options += ["train.max_grad_norm=null", f"train.max_grad_norm_per_parameter={setup.max_grad_norm}"]
    return setup.config(*options, *run_options(name))


def check_loqt(name: str, setup: Setup) -> None:
    """Raises ValueError (ConfigError is one) for options, a rank or candidates that do not fit, without a weight."""
    config, wanted = loqt_config(name, setup), candidates_of(name)
    model = build_meta(setup.description(), config.loqt, dtype=training_dtype(config))  # looks at the rank
    if wanted:
        candidates = importlib.import_module("candidates")
        chosen, layers = candidates.check(wanted), loqt_layers(model).values()
        candidates.check_use(chosen, config.loqt, layers, is_known_ahead=setup.interval is not None)


# ---------------------------------------------------------------- all


METHODS: dict[str, Callable[[str, Setup, int | None], Contender]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "galore": galore,
    "qgalore": qgalore,
    "apollo": apollo,
    "apollomini": apollo,
    "lora": lora,
    "qlora": qlora,
    "loftq": loftq,
    "lqlora": lqlora,
    "apiq": apiq,
    "relora": lambda name, setup, rank: relora(name, setup, rank, start_of(name)),
    **dict.fromkeys(LOQT_OPTIONS, lambda name, setup, rank: LoQT(name, setup)),
}
WITHOUT_RANK = ("adamw", "adamw8bit", "apollomini")


def parse(name: str) -> tuple[str, int | None]:
    """(method, rank) of a contender's name. Raises ValueError, telling the methods, for a name that says nothing."""
    method, _, rank = name.partition("+")[0].partition(":")
    if method not in METHODS:
        raise ValueError(f"contender {name!r}: there is no method {method!r}; there are {', '.join(METHODS)}")
    if (method in WITHOUT_RANK) != (rank == ""):
        wanted = "takes no rank" if method in WITHOUT_RANK else f"needs a rank, such as {method}:128"
        raise ValueError(f"contender {name!r}: {method} {wanted}")
    if rank and not (rank.isdecimal() and int(rank) > 0):
        raise ValueError(f"contender {name!r}: the rank is {rank!r}; give a positive number")
    if method == "relora":
        start_of(name)
    elif options_of(name) and method not in LOQT_OPTIONS:
        raise ValueError(f"contender {name!r}: {method} takes no options of a run; leave out what follows the +")
    candidates_of(name)
    return method, int(rank) if rank else None


def options_of(name: str) -> list[str]:
    """All that follows a contender's name."""
    return name.split("+")[1:]


def run_options(name: str) -> list[str]:
    """The options of a run that follow the name of one of this project's."""
    is_ours = name.partition(":")[0] in LOQT_OPTIONS
    return [option for option in options_of(name) if is_ours and not option.startswith(CANDIDATE)]


def candidates_of(name: str) -> dict[str, str]:
    """The candidates that follow a contender's name, with their values. Raises ValueError for one without a value."""
    found = {}
    for option in options_of(name):
        if option.startswith(CANDIDATE):
            key, has_value, value = option.removeprefix(CANDIDATE).partition("=")
            if not has_value:
                raise ValueError(f"contender {name!r}: {option} has no value; write {option}=VALUE")
            found[key] = value
    return found


def start_of(name: str) -> int:
    """ReLoRA's steps in full rank. Raises ValueError for any other option, or no number."""
    start = 0
    for option in options_of(name):
        key, _, value = option.partition("=")
        if key != "start" or not value.isdecimal():
            raise ValueError(f"contender {name!r}: ReLoRA's one option is start=STEPS, not {option!r}")
        start = int(value)
    return start


def check(name: str, setup: Setup) -> None:
    """Raises ValueError for what `build` would refuse, in a fraction of a second and before anything is built: names
    that say nothing; ranks above the smaller side of a matrix; options and candidates that there are not, or that do
    not go together; a start in full rank that leaves no step for ReLoRA; groups that Q-GaLore cannot have.

    Asks for no package. The device need not be there.
    """
    method, rank = parse(name)
    if method in LOQT_OPTIONS:
        check_loqt(name, setup)
        return
    if rank is not None:
        check_rank(name, setup, rank)
    if method == "qgalore":
        assert rank is not None
        projection_group(target_linears(build_empty(setup.description()), "all-linear"), rank)
    if method == "relora" and setup.max_steps is not None and start_of(name) >= setup.max_steps:
        raise ValueError(
            f"contender {name!r}: of {setup.max_steps} steps none is left for ReLoRA after {start_of(name)} in full "
            "rank; give a smaller start, or more steps"
        )


def build(name: str, setup: Setup) -> Contender:
    """The contender of a name, on its device, before its first step.

    Raises ValueError for what `check` refuses, MissingPackage where a rival is not installed.
    """
    check(name, setup)
    method, rank = parse(name)
    return METHODS[method](name, setup, rank)
