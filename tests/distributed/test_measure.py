"""tools/measure_ranks.py counts rightly, and LoQT exchanges what the shapes say: sizes are worked out here by hand."""

from __future__ import annotations

import importlib
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
# Codes of half a byte, and four for each 64 values: all divide by two words.
PACKED = {"w": WEIGHTS // 2 + WEIGHTS // 16, "p": 8 * SIDES_P // 2 + 8 * SIDES_P // 16}
# Two ranks' rows of 61 are 31 each. The last norm, embedding and head are the root's.
ROOT = 2 * 62 * 32 + 32
BLOCKS = 8 * SIDES_B + 4 * 32
SMALL = {"norms", "checksum", "messages"}


def tool(name: str = "measure_ranks") -> Any:
    """A module of tools/."""
    folder = str(Path(__file__).resolve().parents[2] / "tools")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def count_known_exchanges(ranks: Ranks) -> dict[str, Any]:
    wire = tool("ranks_wire")
    counter, second = wire.WireCounter(), wire.DispatchCounter(2)
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
        parts = [torch.empty(13) for _ in range(2)] if ranks.rank == 1 else None
        dist.gather(torch.ones(13), parts, dst=1)
        dist.scatter(torch.empty(15), [torch.ones(15) for _ in range(2)] if ranks.is_main else None, src=0)
        for work in works:
            work.wait()
    after = torch.ones(3)
    dist.all_reduce(after)  # after: works as before, and is not counted
    kinds: dict[str, list[int]] = {}
    for (_, kind), (number, size) in counter.counts.items():
        entry = kinds.setdefault(kind, [0, 0])
        kinds[kind] = [entry[0] + number, entry[1] + size]
    return {"kinds": kinds, "dispatched": second.total, "sent": counter.sent, "after": after.tolist()}


def train(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    measure_ranks = tool()
    options = ["model.shape=llama_9m", "loqt.rank=8", "loqt.sketch_oversampling=4"]
    description = llama_config(num_hidden_layers=2)
    return measure_ranks.measure(ranks, measure_ranks.Case(**case), options, description=description)


CASES: dict[str, dict[str, Any]] = {
    "gram": {"method": "loqt"},
    "sketch": {"method": "loqt", "engine": "zero1", "subspace": "sketch"},
    "project": {"method": "loqt", "optimizer_state": "project"},
    "dense": {"method": "dense"},
    "fsdp2": {"method": "loqt", "engine": "fsdp2"},
    "sharded": {"method": "loqt", "engine": "sharded", "subspace": "sketch", "optimizer_state": "project"},
    "dense fsdp2": {"method": "dense", "engine": "fsdp2"},
}


def everything(ranks: Ranks) -> list[Any]:
    return [count_known_exchanges(ranks), {name: train(ranks, case) for name, case in CASES.items()}]


@pytest.fixture(scope="module")
def both() -> list[Any]:
    return launch(2, everything, timeout_seconds=300)


@pytest.fixture(scope="module")
def measured(both: list[Any]) -> dict[str, Any]:
    (_, one), (_, two) = both
    for name in CASES:
        mine, other = ([step | {"loopback": 0} for step in x[name]["steps"]] for x in (one, two))
        assert mine == other and one[name]["memory"] == two[name]["memory"]
    return one


def payloads(result: dict[str, Any], name: str) -> dict[str, int]:
    step = next(step for step in result["steps"] if step["step"] == name)
    found = {purpose: sum(size for _, size in kinds.values()) for purpose, kinds in step["traffic"].items()}
    assert step["dispatched"][1] == sum(found.values())  # the second counter
    return {purpose: size for purpose, size in found.items() if purpose not in SMALL}


def test_known_exchanges_are_counted_by_kind(both: list[Any]) -> None:
    gathered, scattered = 2 * 6 * 4 + 2 * 9 * 4, 2 * 11 * 4
    for found, _ in both:
        assert found["kinds"] == {
            "all_reduce": [3, 1000 * 4 + 10 * 8 + 7 * 4],
            "reduce": [1, 35 * 2],
            "broadcast": [1, 33],
            "all_gather": [2, gathered],
            "reduce_scatter": [1, scattered],
            "gather": [1, 2 * 13 * 4],
            "scatter": [1, 2 * 15 * 4],
        }
        alone = 2 * 13 * 4 + 2 * 15 * 4
        assert found["dispatched"] == [10, 4000 + 80 + 28 + 70 + 33 + gathered + scattered + alone]
        # between two: all of an all_reduce, half of the others, a quarter where one alone has all
        assert found["sent"] == (4000 + 80 + 28) + (70 + 33 + gathered + scattered) / 2 + alone / 4
        assert found["after"] == [2, 2, 2]


@pytest.mark.parametrize("name", ["gram", "sketch", "project"])
def test_an_ordinary_step_moves_only_trained_parameters(measured: dict[str, Any], name: str) -> None:
    result = measured[name]
    assert result["num_trained"] == TRAINED
    assert payloads(result, "ordinary") == {"gradients": 2 * TRAINED, "parameters": 2 * TRAINED}
    assert result["formula"]["ordinary"] == payloads(result, "ordinary")
    sums = 1 if result["case"]["engine"] == "zero1" else 2  # of two micro-batches
    assert payloads(result, "accumulated") == {"gradients": 2 * sums * TRAINED, "parameters": 2 * TRAINED}


def test_full_rank_moves_all_parameters(measured: dict[str, Any]) -> None:
    for name in ("first", "ordinary", "reinit"):
        moved = payloads(measured["dense"], name)
        assert moved == {name: 2 * (WEIGHTS + FULL_RANK) for name in ("gradients", "parameters")}


@pytest.mark.parametrize("name", ["fsdp2", "sharded", "dense fsdp2"])
def test_fsdp_scatters_gradients_and_gathers_blocks_twice(measured: dict[str, Any], name: str) -> None:
    """In every micro-batch; W and P come along where they are sharded."""
    result = measured[name]
    blocks = BLOCKS if "dense" not in name else WEIGHTS + 4 * 32
    frozen = sum(PACKED.values()) if name == "sharded" else 0
    once = {"gradients": 4 * (blocks + ROOT), "parameters": 2 * (2 * blocks + frozen) + 2 * ROOT}
    assert payloads(result, "ordinary") == once == result["formula"]["ordinary"]
    twice = {purpose: 2 * size for purpose, size in once.items()}
    assert payloads(result, "accumulated") == twice == result["formula"]["accumulated"]


@pytest.mark.parametrize("name", ["gram", "sketch", "project", "fsdp2", "sharded"])
def test_a_reinitialization_moves_sums_packed_weights_and_factors(measured: dict[str, Any], name: str) -> None:
    result, case = measured[name], CASES[name]
    factors = 4 * 8 * SIDES_B
    packed = PACKED
    if name == "sharded":  # to their owner, and back
        packed = dict.fromkeys(("collected", "scattered"), sum(PACKED.values()))
    # a sketch: 12 columns and 8 probes in bf16; two iterations make the columns of sums over all ranks
    columns = {"sums": 2 * 20 * SIDES_P, "columns": 2 * 2 * 12 * (SIDES_P + 2 * SIDES_B)}
    sums = columns if case.get("subspace") == "sketch" else {"sums": 4 * WEIGHTS}
    first = payloads(result, "ordinary") | packed | sums | {"factors": factors}
    assert payloads(result, "first") == first
    again = first | {"masters": factors}
    if "optimizer_state" in case:
        again |= {"moments": 2 * factors, "factors": 3 * factors}
    assert payloads(result, "reinit") == again
    for step in ("first", "reinit"):
        expected = {purpose: size for purpose, size in result["formula"][step].items() if size}
        assert expected == payloads(result, step)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_the_plan(measured: dict[str, Any], name: str) -> None:
    result = measured[name]
    trained, expected = result["num_trained"], result["planned"]["kept"]
    is_zero = "fsdp2" not in name and name != "sharded"
    for rank in result["memory"]:
        for part in ("weights", "w", "p"):
            assert rank[part] == expected[part], part
        if is_zero:  # each group's partition is padded, and may begin inside a parameter
            assert rank["weights"] == 2 * trained
            for part in ("masters", "gradients", "moments"):
                assert rank[part] == pytest.approx(expected[part], rel=0.02), part
            assert rank["gradients cast"] <= 4 * trained / 2 and rank["bucket when reduced"] == 2 * 50_000_000
        else:
            assert rank["weights"] == 4 * (ROOT + (BLOCKS if "dense" not in name else WEIGHTS + 4 * 32)) // 2
            assert (rank["gradients"], rank["masters"]) == (rank["weights"], 0)
            assert rank["moments"] == pytest.approx(expected["moments"], rel=0.02)  # the last rank has a row less


@pytest.mark.parametrize("name", ["fsdp2", "sharded"])
def test_peaks_are_those_of_the_plan(measured: dict[str, Any], name: str) -> None:
    """Of a model of a few kilobytes, of which ids and rotary tables are a part."""
    result = measured[name]
    assert set(result["planned"]["peaks"]) == {"start", "step", "re-initialization"}
    for part, planned in result["planned"]["peaks"].items():
        assert max(rank[part] for rank in result["peaks"]) == pytest.approx(planned, rel=0.15), part
