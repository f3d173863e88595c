"""tools/measure_ranks.py counts rightly, and LoQT exchanges what the shapes say: sizes are worked out here by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import llama_config
from ranks import launch

from loqt_ds.ranks import Ranks

# Two layers of q, o (32, 32), k, v (16, 32), gate, up (86, 32), down (32, 86) at rank 8.
SIDES_P = 2 * (32 + 16 + 16 + 32 + 32 + 32 + 32)  # the smaller side of each, where P lives
SIDES_B = 2 * (32 + 32 + 32 + 32 + 86 + 86 + 86)
WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 86 * 32)
FULL_RANK = 2 * 61 * 32 + 5 * 32  # embeddings and head, norms
TRAINED = 8 * SIDES_B + FULL_RANK
SMALL = {"norms", "checksum", "messages"}


def tool() -> Any:
    """tools/measure_ranks.py, as a module."""
    path = Path(__file__).resolve().parents[2] / "tools/measure_ranks.py"
    spec = importlib.util.spec_from_file_location("measure_ranks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def count_known_exchanges(ranks: Ranks) -> dict[str, Any]:
    measure_ranks = tool()
    counter, second = measure_ranks.WireCounter(), measure_ranks.DispatchCounter()
    dist.all_reduce(torch.ones(1000))  # before: not counted
    with counter.counting(), second:
        dist.all_reduce(torch.ones(1000))
        works = [dist.all_reduce(torch.ones(10, dtype=torch.int64), async_op=True)]
        dist.all_reduce_coalesced([torch.ones(3), torch.ones(4)])
        works.append(ranks.reduce(torch.ones(7, 5, dtype=torch.bfloat16), 1))
        ranks.broadcast(torch.ones(33, dtype=torch.uint8), 0)
        ranks.all_gather(torch.ones(6))
        dist.all_gather_into_tensor(torch.empty(2 * 9), torch.ones(9))
        dist.reduce_scatter_tensor(torch.empty(11), torch.ones(2 * 11))
        for work in works:
            work.wait()
    after = torch.ones(3)
    dist.all_reduce(after)  # after: works as before, and is not counted
    kinds: dict[str, list[int]] = {}
    for (_, kind), (number, size) in counter.counts.items():
        entry = kinds.setdefault(kind, [0, 0])
        kinds[kind] = [entry[0] + number, entry[1] + size]
    return {"kinds": kinds, "dispatched": second.total, "after": after.tolist()}


def train(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    measure_ranks = tool()
    options = ["model.shape=llama_9m", "loqt.rank=8", "loqt.sketch_oversampling=4"]
    description = llama_config(num_hidden_layers=2)
    return measure_ranks.measure(ranks, measure_ranks.Case(**case), options, description=description)


def everything(ranks: Ranks) -> list[Any]:
    cases: list[dict[str, Any]] = [
        {"method": "loqt"},
        {"method": "loqt", "stage": 1, "subspace": "sketch"},
        {"method": "loqt", "optimizer_state": "project"},
        {"method": "dense"},
    ]
    return [count_known_exchanges(ranks), *(train(ranks, case) for case in cases)]


@pytest.fixture(scope="module")
def measured() -> list[Any]:
    one, two = launch(2, everything)
    for mine, other in zip(one[1:], two[1:], strict=True):
        mine["steps"], other["steps"] = ([step | {"loopback": 0} for step in x["steps"]] for x in (mine, other))
    assert one == two
    return one


def payloads(result: dict[str, Any], name: str) -> dict[str, int]:
    step = next(step for step in result["steps"] if step["step"] == name)
    found = {purpose: sum(size for _, size in kinds.values()) for purpose, kinds in step["traffic"].items()}
    assert step["dispatched"][1] == sum(found.values())  # the second counter
    return {purpose: size for purpose, size in found.items() if purpose not in SMALL}


def test_known_exchanges_are_counted_by_kind(measured: list[Any]) -> None:
    found = measured[0]
    gathered, scattered = 2 * 6 * 4 + 2 * 9 * 4, 2 * 11 * 4
    assert found["kinds"] == {
        "all_reduce": [3, 1000 * 4 + 10 * 8 + 7 * 4],
        "reduce": [1, 35 * 2],
        "broadcast": [1, 33],
        "all_gather": [2, gathered],
        "reduce_scatter": [1, scattered],
    }
    assert found["dispatched"] == [8, 4000 + 80 + 28 + 70 + 33 + gathered + scattered]
    assert found["after"] == [2, 2, 2]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_ordinary_step_moves_only_trained_parameters(measured: list[Any], number: int) -> None:
    result = measured[number]
    assert result["num_trained"] == TRAINED
    assert payloads(result, "ordinary") == {"gradients": 2 * TRAINED, "parameters": 2 * TRAINED}
    assert result["formula"]["ordinary"] == payloads(result, "ordinary")
    sums = 1 if result["case"]["stage"] == 1 else 2  # of two micro-batches
    assert payloads(result, "accumulated") == {"gradients": 2 * sums * TRAINED, "parameters": 2 * TRAINED}


def test_full_rank_moves_all_parameters(measured: list[Any]) -> None:
    for name in ("first", "ordinary", "reinit"):
        assert payloads(measured[4], name) == {name: 2 * (WEIGHTS + FULL_RANK) for name in ("gradients", "parameters")}


def test_a_reinitialization_moves_sums_packed_weights_and_factors(measured: list[Any]) -> None:
    gram, sketch, project = measured[1:4]
    ordinary = {"gradients": 2 * TRAINED, "parameters": 2 * TRAINED}
    factors = 4 * 8 * SIDES_B
    for result in (gram, sketch, project):
        ordinary_and_packed = ordinary | {name: result["memory"][0][name] for name in ("w", "p")}
        # a sketch: 12 columns and 8 probes in bf16; two iterations make the columns of sums over all ranks
        columns = {"sums": 2 * 20 * SIDES_P, "columns": 2 * 2 * 12 * (SIDES_P + 2 * SIDES_B)}
        sums = columns if result is sketch else {"sums": 4 * WEIGHTS}
        first = ordinary_and_packed | sums | {"factors": factors}
        assert payloads(result, "first") == first
        again = first | {"masters": factors}
        if result is project:
            again |= {"moments": 2 * factors, "factors": 3 * factors}
        assert payloads(result, "reinit") == again
        for name in ("first", "reinit"):
            expected = {purpose: size for purpose, size in result["formula"][name].items() if size}
            assert expected == payloads(result, name)


def test_memory_is_that_of_the_formula(measured: list[Any]) -> None:
    for result in measured[1:]:
        trained, expected = result["num_trained"], result["memory_formula"]
        for rank in result["memory"]:
            assert (rank["weights"], rank["masters"]) == (expected["weights"], expected["masters"])
            # each group's partition is padded, and may begin inside a parameter
            assert rank["gradients"] == pytest.approx(expected["gradients"], rel=0.02)
            # most of these few moments are in tensors that stay in 32 bits
            assert 2 * trained / 2 < rank["moments"] < 8 * trained / 2 + 4096
            assert rank["gradients cast"] <= 4 * trained / 2 and rank["bucket when reduced"] == 2 * 50_000_000
