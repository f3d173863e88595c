"""Checkpoints of FSDP2 go on under every other engine and number of ranks, and theirs under it.

References: the run that was not interrupted; what the first engine held when it saved. (On as many ranks, bit for bit:
test_ranks_resume.py.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama_config, relative
from helpers import train_step as train_single
from ranks import build, caught, fingerprint, launch, lesson, restore, save, step_on
from torch import Tensor

from loqt_ds.config import Config, LoQTConfig, OptimConfig, TrainConfig
from loqt_ds.engines.single import SingleEngine
from loqt_ds.engines.state import whole_tensors
from loqt_ds.method.conversion import build_model, initializer
from loqt_ds.ranks import ALONE, Ranks

ROWS = 12  # for 1, 2, 3 and 4 ranks
SAVED, REINIT, END = 8, 12, 14  # re-initializations at steps 0, 6 and 12
# name -> ranks and options of FSDP2, None for ZeRO-2; no ranks: the single engine
PLACES: dict[str, tuple[int, dict[str, Any] | None]] = {
    "single": (0, None),
    "zero2 of 2": (2, None),
    "zero2 of 4": (4, None),
    "fsdp2 of 1": (1, {"shard_frozen": True}),
    "whole of 2": (2, {}),
    "sharded of 2": (2, {"shard_frozen": True}),
    "sharded of 3": (3, {"shard_frozen": True}),
    "whole of 4": (4, {}),
    "groups of 4": (4, {"num_replicas": 2}),
    "sharded groups of 4": (4, {"num_replicas": 2, "shard_frozen": True}),
}
SOME = ["single", "zero2 of 2", "sharded of 3", "sharded groups of 4"]
# Odd sides, biases, tied embeddings; gate and up have more than 4096 elements in B, so that they have moments in 8
# bits where these are asked for.
DESCRIPTION: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 410,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"optim": {"name": "adamw", "lr_full_rank": 0.004, "weight_decay": 0.01}, "tolerance": 1e-5},
    "few rows": {"optim": {"name": "adamw8bit"}, "loqt": {"rank": 3, "optimizer_state": "project"}, "tolerance": 1e-5},
    "8 bits, bf16": {"optim": {"name": "adamw8bit"}, "dtype": "bf16", "tolerance": 1e-3},
    "8 bits, bf16 alone": {"optim": {"name": "adamw8bit", "master": "bf16"}, "dtype": "bf16", "tolerance": 1e-3},
}


def configuration(world_size: int, kind: str) -> Config:
    case = KINDS[kind]
    train = {"max_steps": 20, "dtype": case.get("dtype", "fp32"), "micro_batch_size": ROWS // max(1, world_size)}
    return Config(
        loqt=LoQTConfig(**({"rank": 10, "interval": 6, "growth": 1.0, "schedule": "static"} | case.get("loqt", {}))),
        optim=OptimConfig(**({"lr": 0.01, "warmup_steps": 2} | case["optim"])),
        train=TrainConfig(**train),
    )


def engine_at(ranks: Ranks, place: str, kind: str, **changes: Any) -> Any:
    world_size, fsdp = PLACES[place]
    assert max(1, world_size) == ranks.world_size
    description = llama_config(**(DESCRIPTION | changes))
    config = configuration(world_size, kind)
    if world_size:
        return build(ranks, config, fsdp=fsdp, description=description)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model, source = build_model(description, config.loqt, initializer(0), dtype=dtype)
    return SingleEngine(model, config, original=source.weight)


def train_on(engine: Any, until: int) -> list[dict[str, Any]]:
    step, records = train_single if isinstance(engine, SingleEngine) else step_on, []
    while engine.step_index < until:
        loss, report = step(engine, lesson(engine.step_index, rows=ROWS))
        rates = [report.lr, report.lr_full_rank]
        records.append({"step": report.step, "loss": loss, "rates": rates, "reinit": report.reinit is not None})
    return records


def carried(engine: Any, kind: str) -> dict[str, Tensor]:
    """On rank 0 what must come over: the model, and masters and moments of what is trained. Collective."""
    dtype = torch.bfloat16 if KINDS[kind].get("dtype") == "bf16" else torch.float32
    found = {name: tensor.clone() for name, tensor in whole_tensors(engine.network, dtype)}
    state = engine._state
    have = engine.ranks.gather_objects([state.has_moments(name) for name in state._parameters])
    assert all(map(all, have)), "ranks without rows of a parameter, too"
    for name in state._parameters:
        parts = {"master": state.read(name), "first": state.moment(name, 0), "second": state.moment(name, 1)}
        found |= {f"{name}/{key}": tensor.clone() for key, tensor in parts.items() if tensor is not None}
    return found if engine.ranks.is_main else {}


# ---------------------------------------------------------------- between engines


def first_run(ranks: Ranks, place: str, kind: str, root: str) -> dict[str, Any]:
    """A run that is not interrupted, and what it held when it saved."""
    engine = engine_at(ranks, place, kind)
    train_on(engine, SAVED)
    path = save(engine, Path(root))
    return {"path": str(path), "held": carried(engine, kind), "records": train_on(engine, END)}


def second_runs(ranks: Ranks, place: str, kind: str, paths: dict[str, str]) -> dict[str, Any]:
    """Runs that go on from each path, and what they hold when they begin."""
    results = {}
    for name, path in paths.items():
        engine = restore(engine_at(ranks, place, kind), Path(path))
        results[name] = {"held": carried(engine, kind), "records": train_on(engine, END)}
        engine.release()
    return results


def at(place: str, function: Any, **arguments: Any) -> Any:
    """What `function` returns on rank 0."""
    if not PLACES[place][0]:
        return function(ALONE, place=place, **arguments)
    return launch(PLACES[place][0], function, place=place, timeout_seconds=240, **arguments)[0]


class FirstRuns:
    """Each is done once, when it is asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._done: dict[tuple[str, str], dict[str, Any]] = {}

    def __call__(self, place: str, kind: str) -> dict[str, Any]:
        if (place, kind) not in self._done:
            root = self._factory.mktemp("first")
            self._done[place, kind] = at(place, first_run, kind=kind, root=str(root))
        return self._done[place, kind]


@pytest.fixture(scope="module")
def first_runs(tmp_path_factory: pytest.TempPathFactory) -> FirstRuns:
    return FirstRuns(tmp_path_factory)


def check_goes_on(first_runs: FirstRuns, kind: str, before: list[str], after: str) -> None:
    runs = {place: first_runs(place, kind) for place in before}
    results = at(after, second_runs, kind=kind, paths={place: run["path"] for place, run in runs.items()})
    num = REINIT - SAVED + 1
    for place, run in runs.items():
        # ZeRO's blocks straddle layers, whose moments may be a thousandth of their neighbours'.
        check_carried(results[place]["held"], run["held"], kind, coarseness=0.2 if "zero2" in after else 0.02)
        actual, expected = results[place]["records"], run["records"]
        for key in ("step", "rates", "reinit"):
            assert [record[key] for record in actual] == [record[key] for record in expected]
        assert [record["step"] for record in expected if record["reinit"]] == [REINIT]
        losses, wanted = ([record["loss"] for record in records] for records in (actual, expected))
        assert losses[:num] == pytest.approx(wanted[:num], rel=KINDS[kind]["tolerance"]), place
        assert losses[num:] == pytest.approx(wanted[num:], rel=0.02), place


def check_carried(actual: dict[str, Tensor], expected: dict[str, Tensor], kind: str, *, coarseness: float) -> None:
    """Every bit comes over; but moments that are quantized in other blocks, which come as close as these allow."""
    assert actual.keys() == expected.keys()
    assert any(name.endswith("/second") for name in actual)
    for name, tensor in expected.items():
        if "8 bits" in kind and name.endswith(("/first", "/second")):
            assert relative(actual[name], tensor) < coarseness, name
        else:
            assert fingerprint(actual[name]) == fingerprint(tensor), name


FAST = [
    (["single", "zero2 of 2"], "sharded of 2"),
    (["sharded of 2"], "zero2 of 2"),
    (["zero2 of 2", "sharded of 2"], "sharded groups of 4"),
    (["sharded of 2"], "single"),
]


@pytest.mark.parametrize(("before", "after"), FAST)
def test_another_engine_goes_on(first_runs: FirstRuns, before: list[str], after: str) -> None:
    """Within 1e-5 up to the next re-initialization and 2 % after it; steps and learning rates are the very same."""
    check_goes_on(first_runs, "fp32", before, after)


def test_ranks_that_have_no_rows_go_on(first_runs: FirstRuns) -> None:
    """Of B on the left side, three rows, the fourth rank has none; its moments are projected with the others'."""
    check_goes_on(first_runs, "few rows", ["single"], "whole of 4")


@pytest.mark.slow
@pytest.mark.parametrize("after", PLACES)
def test_every_engine_goes_on_from_every_other(first_runs: FirstRuns, after: str) -> None:
    check_goes_on(first_runs, "fp32", [place for place in PLACES if place != after], after)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8 bits, bf16", "8 bits, bf16 alone"])
@pytest.mark.parametrize("after", SOME)
def test_in_8_bits_and_bf16_as_well(first_runs: FirstRuns, after: str, kind: str) -> None:
    """Moments are quantized anew, in blocks of each rank's own rows."""
    check_goes_on(first_runs, kind, [place for place in SOME if place != after], after)


def test_a_run_of_before_the_first_step_is_taken_over(tmp_path: Path) -> None:
    """Its first initialization compensates for the original weights, as far as they are those that W was made of."""
    engine = engine_at(ALONE, "single", "fp32")
    path = save(engine, tmp_path)
    records = at("sharded of 2", taken_over, kind="fp32", path=str(path))
    expected = train_on(engine, 4)
    assert [record["loss"] for record in records[0]] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    # The same file is no original of a model that was drawn from another seed: all that is left of it is its W.
    assert records[1][0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert records[1][1]["loss"] != pytest.approx(expected[1]["loss"], rel=1e-5)


def taken_over(ranks: Ranks, place: str, kind: str, path: str) -> list[list[dict[str, Any]]]:
    """The first four steps, with the originals and with those of another seed."""
    records = []
    for seed in (0, 1):
        config, fsdp = configuration(ranks.world_size, kind), PLACES[place][1]
        engine = build(ranks, config, fsdp=fsdp, description=llama_config(**DESCRIPTION), seed=seed)
        records.append(train_on(restore(engine, Path(path)), 4))
        engine.release()
    return records


# ---------------------------------------------------------------- what does not fit


def refused(ranks: Ranks, place: str, kind: str, paths: dict[str, str]) -> dict[str, str]:
    """What restoring from each path raises."""
    said = {}
    for name, path in paths.items():
        engine = engine_at(ranks, place, kind)
        said[name] = caught(lambda engine=engine, path=path: restore(engine, Path(path)))
    return said


def unfit(root: Path) -> dict[str, str]:
    """Checkpoints that nobody can go on from, by what is wrong."""
    engines = {
        "width": engine_at(ALONE, "single", "fp32", intermediate_size=408),
        "layers": engine_at(ALONE, "single", "fp32", num_hidden_layers=1),
        "dtype": engine_at(ALONE, "single", "8 bits, bf16"),
        "damaged": engine_at(ALONE, "single", "fp32"),
    }
    for name, engine in engines.items():
        train_on(engine, 1)
        save(engine, root / name)
    paths = {name: str(root / name / "step_1") for name in engines}
    (file,) = (root / "damaged" / "step_1").glob("optimizer*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    return paths


@pytest.mark.parametrize("place", ["sharded of 2", pytest.param("groups of 4", marks=pytest.mark.slow)])
def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path: Path, place: str) -> None:
    results = launch(PLACES[place][0], refused, place=place, kind="fp32", paths=unfit(tmp_path))
    for said in results:
        assert all(text.startswith("CheckpointError: ") for text in said.values()), said
        for name in ("width", "layers", "dtype"):
            assert "belongs to another model" in said[name], said
        assert ".mlp." in said["width"], said
        assert "is in the model only" in said["layers"] and "bfloat16" in said["dtype"]
        assert "optimizer" in said["damaged"], said
