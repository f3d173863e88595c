"""Which options work with which: what is named here is tried together under every engine; `compatibility_report` tells.

The engine with its number of ranks is one factor, each option another; pairs that the program refuses are asked for and
kept with its words, and a covering array of the others is run (`covering`), so that every option is run under every
engine on every number of ranks, and every two options meet. A case is a whole run of a tiny model through
`loqt_ds.run.prepare` and the trainer, as the command line makes it: five steps with two re-initializations, a
checkpoint before and after, an evaluation. Its losses must be those of one device in float32 with nothing else switched
on, on the same rows, up to the rounding of its precision.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import launches
import pytest
import ranks
from covering import Case, Pair, all_pairs, covering_array

from loqt_ds.config import Config, ConfigError, load_config
from loqt_ds.ranks import Ranks

NUM_STEPS = 5
NUM_ROWS = 8  # of a step, of all ranks and micro-batches together
REINIT_STEPS = [1, 4]
WORLD_SIZES = (1, 2, 4)
# Of torch.compile: the same graphs, partitions and operators as inductor gets, without its C++, which takes minutes.
BACKEND = "aot_eager"

# ---------------------------------------------------------------- what there is

ENGINES: dict[str, tuple[str, ...]] = {
    "one device": (),
    "ZeRO-0": (),
    "ZeRO-1": (),
    "ZeRO-2": (),
    "FSDP2": ("engine=fsdp2",),
    "FSDP2, frozen weights sharded": ("engine=fsdp2", "fsdp.shard_frozen=true"),
    "HSDP, two replicas": ("engine=fsdp2", "fsdp.shard_frozen=true", "fsdp.num_replicas=2"),
}
QUICK = ("ZeRO-2", *(engine for engine, given in ENGINES.items() if "engine=fsdp2" in given))
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "updates": {"after the backward": ("optim.layerwise=false",), "layer-wise": ("optim.layerwise=true",)},
    "micro-batches": {"1": (), "2": ("train.gradient_accumulation_steps=2",)},
    "clipping": {
        "none": ("train.max_grad_norm=null",),
        "max_grad_norm": ("train.max_grad_norm=0.02",),
        "max_grad_norm_per_parameter": ("train.max_grad_norm=null", "train.max_grad_norm_per_parameter=0.002"),
    },
    "activation checkpointing": {"off": (), "on": ("train.activation_checkpointing=true",)},
    "moments": {"32-bit": ("optim.name=adamw",), "8-bit": ("optim.name=adamw8bit",)},
    "precision": {
        "fp32": ("train.dtype=fp32",),
        "bf16, fp32 masters": ("train.dtype=bf16",),
        "bf16, bf16 masters": ("train.dtype=bf16", "optim.master=bf16"),
    },
    "torch.compile": {"off": (), "on": ("train.compile=true",)},
    "activations": {"kept": ("train.lean_activations=false",), "lean": ("train.lean_activations=true",)},
    "trained": {"all": (), "B alone": ("optim.train_full_rank=false",)},
}
FACTORS = {"place": [f"{engine} x {n}" for engine in ENGINES for n in WORLD_SIZES]} | {
    name: list(values) for name, values in OPTIONS.items()
}
PLAIN = {name: values[0] for name, values in FACTORS.items()}  # one device, nothing switched on
CHANGES_THE_RUN = ("clipping", "trained")  # what one device's plain run must have alike

# Relative, of a loss: before the second re-initialization, and from there on, where codes of 4 bits may have flipped.
TOLERANCES: dict[tuple[str, str], tuple[float, float]] = {
    ("fp32", "32-bit"): (1e-5, 5e-4),
    ("fp32", "8-bit"): (1e-4, 5e-4),
    ("bf16, fp32 masters", "32-bit"): (8e-4, 8e-4),
    ("bf16, fp32 masters", "8-bit"): (8e-4, 8e-4),
    ("bf16, bf16 masters", "32-bit"): (8e-4, 8e-4),
    ("bf16, bf16 masters", "8-bit"): (8e-4, 8e-4),
}

COMMON = launches.TINY | {
    "loqt.rank": 32,  # B of the MLP then has 4096 elements, and moments in 8 bits
    "optim.eps": 0.001,  # or Adam would not notice that its gradients have been scaled
    "optim.warmup_steps": 0,
    "optim.schedule": "constant",
    "optim.lr_full_rank": "null",
    "optim.lr": 0.01,
    "train.max_steps": NUM_STEPS,
    "checkpoint.every": 1000,
    "checkpoint.resume": "none",
    "logging.progress": "none",
}


def engine_of(case: Mapping[str, str]) -> tuple[str, int]:
    """The engine of a case, and its number of ranks."""
    engine, _, number = case["place"].rpartition(" x ")
    return engine, int(number)


def overrides(case: Mapping[str, str], folder: Path, run: Path) -> list[str]:
    """The command line of a case, but for --ds_config. `folder`: of `launches.Workshop`."""
    engine, world_size = engine_of(case)
    num = 2 if case["micro-batches"] == "2" else 1
    values = COMMON | {
        "model.shape": folder / "shape.json",
        "data.path": folder / "corpus.jsonl",
        "output_dir": run,
        "train.micro_batch_size": max(1, NUM_ROWS // (world_size * num)),
    }
    given = [text for name, values in OPTIONS.items() for text in values[case[name]]]
    return [f"{name}={value}" for name, value in values.items()] + list(ENGINES[engine]) + given


def ds_config(case: Mapping[str, str], folder: Path) -> Path | None:
    """The DeepSpeed configuration of a case: that of configs/zero2.json at its stage."""
    engine, _ = engine_of(case)
    if not engine.startswith("ZeRO"):
        return None
    content = json.loads(launches.ZERO2.read_text(encoding="utf-8"))
    stage = int(engine[-1])
    file = folder / f"zero{stage}.json"
    if not file.exists():
        content["zero_optimization"]["stage"] = stage
        temporary = folder / f"zero{stage}-{os.getpid()}"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(file)
    return file


# ---------------------------------------------------------------- what is refused


@contextmanager
def announced(world_size: int) -> Iterator[None]:
    """As a launcher of so many processes would announce them."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def refusal(case: Mapping[str, str], folder: Path) -> str | None:
    """What the program says to a case before it loads anything; None if it takes it."""
    from loqt_ds.engines.ds_config import check_deepspeed
    from loqt_ds.memory.division import division_of
    from loqt_ds.train import _wrong_start

    _, world_size = engine_of(case)
    try:
        config = load_config("default", overrides(case, folder, folder / "run"))
        with announced(world_size):
            file = ds_config(case, folder)
            if file is None and config.engine != "fsdp2" and world_size > 1:
                problem = _wrong_start(launched=True, finetune=False)
                assert problem is not None
                raise problem
            options = None if file is None else check_deepspeed(file, config)
            division_of(config, world_size=world_size, ds_config=options)
    except ConfigError as error:
        return str(error).replace(f"{folder}/", "")
    return None


@dataclass
class Plan:
    """What is to be run, and what is refused."""

    cases: list[Case]
    refused: dict[Pair, str]  # (or a single value) -> what the program says
    impossible: list[Pair]  # of which each value is refused something that the other needs

    @property
    def references(self) -> list[Case]:
        """The plain runs that the cases are compared with."""
        found: list[Case] = []
        for case in self.cases:
            if reference_of(case) not in found:
                found.append(reference_of(case))
        return found

    @property
    def quick(self) -> list[Case]:
        """A part for every day: of each of the QUICK engines on two ranks the case that has most switched on;
        torch.compile, which takes longer than everything else, under the last of them only."""
        found: dict[str, Case] = {}
        for case in self.cases:
            engine, world_size = engine_of(case)
            if engine in QUICK and world_size == 2 and num_on(case) > num_on(found.get(engine, PLAIN)):
                found[engine] = case
        for engine in QUICK[:-1]:
            found[engine] = found[engine] | {"torch.compile": PLAIN["torch.compile"]}
        return list(found.values())


def make_plan(folder: Path) -> Plan:
    """Asks for every value alone and every two together, the others as in PLAIN, and covers what is not refused."""
    alone: dict[Pair, str] = {}
    for factor, values in FACTORS.items():
        for value in values:
            if (why := refusal(PLAIN | {factor: value}, folder)) is not None:
                alone[frozenset({(factor, value)})] = why
    allowed = {f: [v for v in values if frozenset({(f, v)}) not in alone] for f, values in FACTORS.items()}
    together: dict[Pair, str] = {}
    for pair in all_pairs(allowed):
        if (why := refusal(PLAIN | dict(pair), folder)) is not None:
            together[pair] = why
    cases, impossible = covering_array(allowed, together)
    return Plan(cases, alone | together, impossible)


def num_on(case: Mapping[str, str]) -> int:
    """How many options of a case are not as in the plain run."""
    return sum(case[name] != PLAIN[name] for name in OPTIONS)


# ---------------------------------------------------------------- one run


@dataclass
class Result:
    """What a case gave."""

    case: Case
    losses: list[float] = field(default_factory=list)  # of the steps, and held-out at the end
    reinits: list[int] = field(default_factory=list)  # steps
    seconds: float = 0.0
    error: str = ""


def reference_of(case: Mapping[str, str]) -> Case:
    """The plain run that a case is compared with."""
    return PLAIN | {name: case[name] for name in CHANGES_THE_RUN}


def run_case(case: Case, voice: Any, folder: Path, run: Path) -> Result:
    """Trains a case on the ranks of `voice`; collective."""
    import torch

    from loqt_ds.method import compiled
    from loqt_ds.run import prepare

    began = time.monotonic()
    config: Config = load_config("default", overrides(case, folder, run))
    done = prepare(config, ds_config=ds_config(case, folder), voice=voice, say=lambda _: None)
    with done.logger:
        held_out = done.trainer.fit().loss
    result = Result(case, seconds=0.0)
    if voice.ranks.is_main:
        by_step = launches.losses(run)
        result.losses = [by_step[step] for step in sorted(by_step)] + [held_out]
        result.reinits = [event["step"] for event in launches.events(run, "reinit")]
    if done.lock is not None:
        done.lock.file.close()
    done.engine.release()
    del done
    if case["torch.compile"] == "on":
        torch._dynamo.reset()
        compiled._compiled.cache_clear()
    gc.collect()
    voice.ranks.barrier()
    result.seconds = time.monotonic() - began
    return result


def run_members(members: Ranks, *, cases: list[Case], folder: str, name: str) -> None:
    """Runs cases one after another on the ranks that are there; rank 0 writes each result as a line of a file."""
    from loqt_ds.engines import fsdp
    from loqt_ds.failures import Voice
    from loqt_ds.method import compiled

    compiled.install = functools.partial(compiled.install, backend=BACKEND)  # type: ignore[assignment]
    compiled.check_compiler = lambda device: None  # it is not used
    place = Path(folder)
    os.environ["LOQT_CACHE"] = str(place / "cache")
    voices: dict[str, Voice] = {}
    for number, case in enumerate(cases):
        engine, world_size = engine_of(case)
        assert world_size == members.world_size
        kind = "fsdp" if "engine=fsdp2" in ENGINES[engine] else "zero" if engine.startswith("ZeRO") else "one"
        if kind not in voices:
            own = {"fsdp": lambda: fsdp.start_distributed(timeout_seconds=600), "zero": lambda: members}
            voices[kind] = Voice(own[kind](), timeout_seconds=600) if kind in own else Voice()
        result = run_case(case, voices[kind], place, place / f"{name}-{number}")
        if members.is_main:
            with (place / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def run_cases(cases: Iterable[Case], folder: Path, *, timeout_seconds: float = 600) -> list[Result]:
    """Runs cases in as few launches as there are numbers of ranks; one that fails is noted, and the others go on."""
    left: dict[int, list[Case]] = {}
    for case in cases:
        left.setdefault(engine_of(case)[1], []).append(case)
    results: list[Result] = []
    for world_size, todo in sorted(left.items()):
        attempt = 0
        while todo:
            name, error = f"{world_size}-{attempt}", ""
            try:
                ranks.launch(
                    world_size,
                    run_members,
                    timeout_seconds=timeout_seconds,
                    collective_timeout_seconds=600,
                    cases=todo,
                    folder=str(folder),
                    name=name,
                )
            except pytest.fail.Exception as failure:
                error = str(failure)
            found: list[Result] = []
            with suppress(FileNotFoundError):
                lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
                found = [Result(**json.loads(line)) for line in lines]
            if len(found) < len(todo):
                found.append(Result(todo[len(found)], error=error or "it wrote no result"))
            results += found
            todo, attempt = todo[len(found) :], attempt + 1
    return results


# ---------------------------------------------------------------- comparing


def deviations(result: Result, reference: Result) -> tuple[float, float]:
    """The largest relative deviation of a loss, before the second re-initialization and from there on. (The loss of the
    step in which it happens comes before it.)"""
    each = [abs(a - b) / abs(b) for a, b in zip(result.losses, reference.losses, strict=True)]
    first = REINIT_STEPS[1]
    return max(each[:first]), max(each[first:])


def problem_of(result: Result, reference: Result) -> str:
    """What is wrong with a result; empty if nothing is."""
    if result.error:
        return result.error
    if not all(map(math.isfinite, result.losses)) or len(result.losses) != NUM_STEPS + 1:
        return f"losses {result.losses}"
    if result.reinits != REINIT_STEPS:
        return f"re-initializations in the steps {result.reinits}"
    tolerances = TOLERANCES[result.case["precision"], result.case["moments"]]
    found = deviations(result, reference)
    if any(is_ > most for is_, most in zip(found, tolerances, strict=True)):
        return f"losses deviate from the plain run's by {found[0]:.1e} and {found[1]:.1e}, more than {tolerances}"
    return ""
