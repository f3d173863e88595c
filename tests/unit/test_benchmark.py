"""tools/benchmark.py: its arithmetic, how a comparison goes on and what it does with failures; no model is built."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

TOOLS = ("fit", "measure_ranks", "rivals", "benchmark_operations", "benchmark_report", "benchmark_ranks", "benchmark")


@pytest.fixture(scope="module")
def tools(repository: Path) -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules, imported as `python tools/benchmark.py` does."""
    sys.path.insert(0, str(repository / "tools"))
    yield {name: importlib.import_module(name) for name in TOOLS}
    sys.path.remove(str(repository / "tools"))
    for name in TOOLS:
        del sys.modules[name]


@pytest.fixture
def report(tools: dict[str, ModuleType]) -> Any:
    return tools["benchmark_report"]


def step(seconds: float, **others: Any) -> dict[str, Any]:
    """One step, as a worker answers."""
    parts = {"forward": 0.25 * seconds, "backward": 0.5 * seconds, "update": 0.25 * seconds}
    return {"loss": 3.0, "seconds": parts, "gradients": 7, "refresh": None, "notes": []} | others


def make_record(rounds: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    names = list(dict.fromkeys(name for entry in rounds for name in entry))
    entry = {"status": "ok", "num_steps": 9, "first_loss": 9.0, "before": {"resident": 100}, "peak": {"resident": 450}}
    cell = {"shape": "llama_9m", "dtype": "fp32", "rows": 2, "length": 8, "contenders": names, "device": "cpu"}
    cell |= {"num_layers": None, "cap_gib": None}
    contenders = {n: entry | {"bytes": {"weights": 1, "gradients": 2, "states": 3}} for n in names}
    return {"cell": cell, "rounds": rounds, "refreshes": [], "contenders": contenders, "runs": []} | others


def test_spread_is_the_quartiles(report: Any) -> None:
    generator = np.random.default_rng(0)
    for count in (2, 3, 5, 8, 21):
        values = generator.lognormal(size=count).tolist()
        np.testing.assert_allclose(report.spread(values), np.percentile(values, [25, 50, 75]))
    assert report.spread([4.0]) == (4.0, 4.0, 4.0)


def test_ratios_are_of_the_same_round(report: Any) -> None:
    # Rounds are disturbed by up to a factor of ten, both of a round alike: the ratio does not see it.
    generator = random.Random(1)
    factors = [generator.uniform(1, 10) for _ in range(7)]
    rounds = [{"adamw": [step(2 * f)], "loqt:4": [step(1.5 * f)], "adamw8bit": [step(3 * f)]} for f in factors]
    record = make_record(rounds)
    assert report.ratios(record, "loqt:4") == pytest.approx([0.75] * 7)
    assert report.ratios(record, "loqt:4", "adamw8bit") == pytest.approx([0.5] * 7)
    # A step that is disturbed alone moves one ratio, not the median.
    rounds[3]["loqt:4"] = [step(1e3)]
    found = report.line(record, "loqt:4")
    assert found["ratio"][1] == pytest.approx(0.75) and max(report.ratios(record, "loqt:4")) > 40


def test_a_line_has_what_was_measured(report: Any) -> None:
    seconds = [4.0, 1.0, 2.0]
    rounds = [{"adamw": [step(2.0)], "loqt8bit:4": [step(s)], "adamw8bit": [step(2 * s)]} for s in seconds]
    refreshes = [{"loqt8bit:4": step(7.0)}, {"loqt8bit:4": step(9.0)}]
    record = make_record(rounds, refreshes=refreshes)
    found = report.line(record, "loqt8bit:4")
    assert found["seconds"] == pytest.approx((1.5, 2.0, 3.0))
    assert found["tokens_per_second"] == pytest.approx(16 / 2.0)
    assert found["parts"] == pytest.approx({"forward": 0.5, "backward": 1.0, "update": 0.5})
    assert found["ratio"] == pytest.approx((0.75, 1.0, 1.5)), "to 32-bit AdamW in full rank"
    assert found["ratio_own"] == pytest.approx((0.5, 0.5, 0.5)), "to 8-bit AdamW in full rank"
    assert found["refresh"] == pytest.approx(8.0 - 2.0) and found["peak"] == (350, "resident")
    assert 0.5 < found["promised"] < 1.5
    assert report.line(record, "adamw")["refresh"] is None
    beside = make_record(rounds, refreshes=[{"loqt8bit:4": step(2.0, refresh=33.0)}])
    assert report.line(beside, "loqt8bit:4")["refresh"] == 33.0, "what was measured beside the step counts"


def test_rounds_of_several_steps_count_by_their_median(report: Any) -> None:
    record = make_record([{"adamw": [step(1.0), step(9.0), step(2.0)], "loqt:4": [step(3.0), step(1.0), step(1.0)]}])
    assert report.of_rounds(record, "adamw") == [2.0] and report.ratios(record, "loqt:4") == [0.5]


def test_a_failure_is_shown_and_the_others_stay(report: Any) -> None:
    record = make_record([{"adamw": [step(1.0)], "loqt:4": [step(0.5)]}, {"loqt:4": [step(0.5)]}])
    record["cell"]["contenders"].append("galore:4")
    record["contenders"]["galore:4"] = {"status": "out of memory", "error": "tried to allocate | much"}
    lines = report.table(record)
    assert any("galore:4 | out of memory: tried to allocate / much" in text for text in lines)
    assert len(report.ratios(record, "loqt:4")) == 1, "only rounds that the base took part in"
    columns = {text.count("|") for text in lines if text.startswith("|")}
    assert columns == {len(report.HEAD) + 1}


def test_how_cost_grows_is_sorted_by_what_differs(report: Any) -> None:
    rounds = [{"adamw": [step(2.0)], "loqt:4": [step(1.0)], "loqt:8": [step(3.0)]}]
    deep = make_record([{"adamw": [step(2.0)], "loqt:4": [step(5.0)]}])
    deep["cell"]["num_layers"] = 3
    found = report.growth([make_record(rounds), deep])
    assert ("loqt, measured", 8, 1.5) in found["rank"] and ("loqt, measured", 4, 0.5) in found["rank"]
    rounds[0]["loqt:8+loqt.product=merged"] = [step(8.0)]
    named = report.growth([make_record(rounds)])["rank"]
    assert ("loqt+loqt.product=merged, measured", 8, 4.0) in named
    assert ("loqt:4", 16, 1000.0) in found["tokens of a micro-batch"]
    assert found["layers"] == [("adamw", 3, 2000.0), ("loqt:4", 3, 5000.0)]


def test_everything_measured_is_written_and_drawn(report: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    rounds = [{"adamw": [step(2.0)], "loqt:4": [step(1.0)], "loqt:8": [step(3.0)]}]
    one, two = make_record(rounds), make_record([{"adamw": [step(3.0)]}])
    two["cell"]["rows"] = 4
    two["contenders"]["loqt:4"] = {"status": "not installed", "error": "no"}
    two["cell"]["contenders"].append("loqt:4")
    points = [("LoQT, weak", 1.0, 50.0), ("LoQT, weak", 2.0, 90.0)]
    command = ["--shape", "a b", "--report"]
    report.write([one, two], tmp_path, command=command, processes=points, more="## More")
    text = (tmp_path / "README.md").read_text()
    assert "tools/benchmark.py --shape 'a b'\n" in text and "## More" in text and text.count("| adamw |") == 2
    for name in ("ratios.png", "parts.png", "growth.png"):
        assert name in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- a comparison, with workers that only count


class FakeWorker:
    """Answers at once; `broken`: contender -> number of the step it fails in."""

    broken: dict[str, int] = {}
    told: list[tuple[Any, ...]] = []
    ended: list[str] = []
    failed: Any = None
    deadline: int | None = None

    def __init__(self, cell: Any, name: str) -> None:
        self.name, self.steps = name, 0

    def ask(self, *message: Any, until: float | None) -> dict[str, Any]:
        self.told.append((self.name, *message))
        if message[0] == "build":
            return {"build_seconds": 0.1, "before": {"resident": 1}, "notes": []}
        self.steps += 1
        if self.steps == self.broken.get(self.name):
            raise self.failed("out of memory", "too much")
        _, _, refresh, peak = message
        extra = {"peak": {"resident": 5}, "bytes": {"weights": 1, "states": 2}} if peak else {}
        return step(2.0 if refresh else 1.0, **extra)

    def end(self) -> None:
        self.ended.append(self.name)


@pytest.fixture
def benchmark(tools: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = tools["benchmark"]
    monkeypatch.setattr(FakeWorker, "broken", {})
    monkeypatch.setattr(FakeWorker, "told", [])
    monkeypatch.setattr(FakeWorker, "ended", [])
    monkeypatch.setattr(FakeWorker, "failed", module.Failed)
    monkeypatch.setattr(module, "Worker", FakeWorker)
    return module


def compare(benchmark: Any, work: Path, *, rounds: int | None = None, **options: Any) -> tuple[bool, dict[str, Any]]:
    budget, until = options.pop("budget", 60.0), options.pop("until", None)
    cell = benchmark.Cell("llama_9m", "fp32", 2, 8, ("adamw", "loqt:4", "qlora:4"), **options)
    comparison = benchmark.Comparison(cell, work, until=until, budget=budget, rounds=rounds)
    return comparison.run(), comparison.record


def test_contenders_take_turns_and_a_comparison_goes_on(benchmark: Any, tmp_path: Path) -> None:
    done, record = compare(benchmark, tmp_path, rounds=2)
    assert done and len(record["rounds"]) == 2
    ordinary = [name for name, kind, *rest in FakeWorker.told if kind == "step" and not rest[2] and not rest[1]]
    turns = ["adamw", "loqt:4", "qlora:4"]
    assert ordinary[3:] == turns * 2, "the first steps are each contender's own, then A B C A B C"
    assert [sorted(entry) for entry in record["refreshes"]] == [["loqt:4"]] * 2, "only who has subspaces refreshes"
    told = len(FakeWorker.told)
    again, same = compare(benchmark, tmp_path, rounds=2)
    assert again and same == record and len(FakeWorker.told) == told, "what is there is not measured again"
    done, more = compare(benchmark, tmp_path, rounds=3)
    assert done and more["rounds"][:2] == record["rounds"] and len(more["rounds"]) == 3
    assert len(more["refreshes"]) == 2 and len(more["runs"]) == 2
    assert json.loads((tmp_path / f"{benchmark.Cell(**more['cell']).name}.json").read_text()) == more


def test_who_fails_is_left_out_of_what_follows(benchmark: Any, tmp_path: Path) -> None:
    FakeWorker.broken = {"loqt:4": 4}  # two that do not count, a round, and here the refresh after it
    done, record = compare(benchmark, tmp_path, rounds=3)
    assert done and [len(entry) for entry in record["rounds"]] == [3, 2, 2]
    assert (
        record["contenders"]["loqt:4"] | {"status": "out of memory", "error": "too much"}
        == (record["contenders"]["loqt:4"])
    )
    assert FakeWorker.ended.count("loqt:4") == 1


def test_a_cell_of_which_all_fail_is_done(benchmark: Any, tmp_path: Path) -> None:
    FakeWorker.broken = dict.fromkeys(("adamw", "loqt:4", "qlora:4"), 1)
    done, record = compare(benchmark, tmp_path)
    assert done and record["rounds"] == []


def test_rounds_fit_the_budget(benchmark: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert len(compare(benchmark, tmp_path / "a", budget=0.0)[1]["rounds"]) == benchmark.MIN_ROUNDS
    assert len(compare(benchmark, tmp_path / "b", budget=1e6)[1]["rounds"]) == benchmark.MAX_ROUNDS


def test_by_turns_every_round_starts_anew_and_goes_on_within_it(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = FakeWorker.ask

    def stops(worker: FakeWorker, *message: Any, until: float | None) -> dict[str, Any]:
        if len(FakeWorker.told) == 16:  # somewhere in the third contender's turn
            raise benchmark.OutOfTime
        return asked(worker, *message, until=until)

    monkeypatch.setattr(FakeWorker, "ask", stops)
    done, record = compare(benchmark, tmp_path, together=False, refreshes=1)
    assert not done and [len(entry) for entry in record["rounds"]] == [2]
    monkeypatch.setattr(FakeWorker, "ask", asked)
    before = len(FakeWorker.told)
    done, record = compare(benchmark, tmp_path, together=False, refreshes=1)
    assert done and FakeWorker.told[before][0] == "qlora:4", "it goes on with the one that was interrupted"
    assert [len(entry) for entry in record["rounds"]] == [3] * benchmark.MIN_ROUNDS
    assert {len(steps) for entry in record["rounds"] for steps in entry.values()} == {benchmark.STEPS_AFRESH}
    assert FakeWorker.ended.count("adamw") == benchmark.MIN_ROUNDS
    assert list(record["refreshes"][0]) == ["loqt:4"] and not any(record["refreshes"][1:])


def test_a_file_of_another_cell_is_refused(benchmark: Any, tmp_path: Path) -> None:
    compare(benchmark, tmp_path, rounds=1)
    with pytest.raises(ValueError, match="another cell.*--work"):
        compare(benchmark, tmp_path, rounds=1, refreshes=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--suite"),
        (["--shape", "llama_9m"], "--work"),
        (["--shape", "llama_9m", "--contenders", "nothing", "--work", "x"], "'nothing'"),
        (["--shape", "llama_9m", "--contenders", "loqt", "--work", "x"], "needs a rank"),
        (["--shape", "llama_9m", "--contenders", "adamw:4", "--work", "x"], "takes no rank"),
        (["--shape", "llama_9m", "--contenders", "loqt:-4", "--work", "x"], "'-4'"),
        (["--shape", "no_such_shape", "--work", "x"], "no_such_shape"),
        (["--shape", "llama_9m", "--contenders", "adamw+loqt.rank=4", "--work", "x"], "no options"),
        (["--shape", "llama_9m", "--contenders", "loqt:4+loqt.produce=merged", "--work", "x"], "loqt.produce"),
        pytest.param(["--suite", "cuda"], "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")),
    ],
)
def test_what_cannot_be_measured_is_refused(
    benchmark: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_suites_are_of_shapes_and_contenders_that_there_are(benchmark: Any) -> None:
    for make, _ in benchmark.SUITES.values():
        cells = make()
        assert len({cell.name for cell in cells}) == len(cells), "a file each"
        for cell in cells:
            assert "adamw" in cell.contenders and cell.setup().description().vocab_size == 32000
            assert all(benchmark.parse(name) for name in cell.contenders)


def test_counted_operations_of_the_rivals(tools: dict[str, ModuleType]) -> None:
    operations, setup = (
        tools["benchmark_operations"].operations,
        tools["rivals"].Setup("llama_9m", rows=3, length=40, num_layers=3),
    )
    num_tokens, rank = 3 * 40, 16
    full = operations(setup, "adamw")
    matrices = 3 * (4 * [(128, 128)] + 2 * [(352, 128)] + [(128, 352)])
    projections = sum(2 * m * n * rank for m, n in matrices)
    assert operations(setup, f"galore:{rank}") - full == 2 * projections
    assert operations(setup, f"apollo:{rank}") - full == projections
    adapters = sum(6 * rank * (m + n) - 2 * m * n for m, n in matrices)
    assert all(operations(setup, f"{m}:{rank}") - full == num_tokens * adapters for m in ("lora", "qlora", "relora"))
    assert operations(setup, "apollomini") - full == projections / rank
    assert operations(setup, "adamw8bit") == full
    merged, factored = (operations(setup, f"loqt:{rank}+loqt.product={kind}") for kind in ("merged", "factored"))
    assert merged != factored and operations(setup, f"loqt8bit:{rank}") == min(merged, factored)
    assert full == pytest.approx(num_tokens * 6 * (sum(m * n for m, n in matrices) + 128 * 32000), rel=0.01)


def test_several_processes_are_as_fast_as_the_slowest_and_send_what_was_counted(tools: dict[str, ModuleType]) -> None:
    ranks = tools["benchmark_ranks"]
    cells = ranks.cells("llama_9m:32")
    assert len({cell.name for cell in cells}) == len(cells)
    strong, weak = (next(c for c in cells if c.way == way and c.world_size == 4) for way in ("strong", "weak"))
    assert strong.own_rows * 4 == strong.rows and weak.own_rows == weak.rows
    traffic = {"gradients": {"all_reduce": [2, 4_000_000]}, "parameters": {"all_gather": [1, 8_000_000]}}
    rounds = [
        {"loqt": step(s) | {"traffic": traffic}, "dense": step(2 * s) | {"traffic": traffic}} for s in (1.0, 9.0, 2.0)
    ]
    grown = {"traffic": traffic | {"w": {"broadcast": [1, 1_000_000]}}}
    result = {"cell": vars(weak), "rounds": rounds, "reinits": [step(s) | grown for s in (5.0, 4.0, 50.0)]}
    found = dict(zip(ranks.HEAD, ranks.row(result), strict=True))
    assert found["LoQT, ms a step"] == "2,000" and found["full rank, ms a step"] == "4,000"
    assert found["LoQT / full rank [quartiles]"] == "0.500 [0.500, 0.500]"
    assert found["LoQT, tokens/s"] == f"{weak.rows * 4 * 256 / 2.0:,.0f}"
    assert found["payload of a step, MB: LoQT / full rank"] == "12.0 / 12.0"
    assert found["a rank sends ≥, MB: LoQT / full rank"] == "12.0 / 12.0", "2 4 3/4 + 8 3/4"
    assert found["re-initialization adds, s"] == "3.00" and found["and MB"] == "1.0"
    assert ranks.points([result])[1] == ("full rank, weak", 4.0, weak.rows * 4 * 256 / 4.0)
