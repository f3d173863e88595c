"""tools/compare_report.py and compare_plots.py: numbers, tables and plots of made-up results, with a diverged and a
failed run among them; nothing is trained."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = ("fit", "candidates", "rivals", "compare_run", "compare_suites", "compare_report", "compare_plots")
GIB = 2**30


@pytest.fixture(scope="module")
def tools(repository: Path) -> Iterator[dict[str, Any]]:
    """The modules, imported as `python tools/compare.py` does."""
    sys.path.insert(0, str(repository / "tools"))
    yield {name: importlib.import_module(name) for name in TOOLS[3:]}
    sys.path.remove(str(repository / "tools"))
    for name in [*TOOLS, *(name for name in sys.modules if name.startswith(("rivals_", "candidates_")))]:
        sys.modules.pop(name, None)


@pytest.fixture
def report(tools: dict[str, Any]) -> Any:
    return tools["compare_report"]


@pytest.fixture
def plan(tools: dict[str, Any]) -> Any:
    """Three methods and a variant, three seeds, two data sets, a search of three rates."""
    suites = tools["compare_suites"]
    suite = replace(
        suites.SUITES["full"],
        scales=(("llama_2m", 16),),
        methods=("adamw", "loqt:{rank}", "galore:{rank}", "qlora:{rank}"),
        search=(1.0, 0.5, 2.0),
        variants=(suites.Variant("C", "none", ("loqt.compensation_steps=0",)), suites.Variant("C", "as it is")),
        memory=suites.MEMORY_COMPONENTS[:2],
    )
    return suites.Plan(suite, [suites.DataSet("one"), suites.DataSet("two", ("data.text_field=t",))])


def result_of(row: Any, generator: np.random.Generator, status: str = "done") -> dict[str, Any]:
    """What a run may have come to."""
    spec = json.loads(row.spec.to_json())
    result: dict[str, Any] = {"spec": spec, "status": status, "num_steps": spec["steps"]}
    if status == "failed":
        return result | {"num_steps": 0, "error": "RuntimeError: a | b\nand more"}
    curve = [[tokens, 8.0 - tokens / 1e6] for tokens in range(0, 500000, 100000)]
    result |= {
        "trained_parameters": 1234567,
        "bytes": {"weights": 3_000_000, "gradients": 2_000_000, "states": 1_000_000},
        "peak_memory_gib": (50_000_000 + 10_000_000) / GIB,
        "memory_before_model_gib": 50_000_000 / GIB,
        "seconds": 100.0,
        "tokens_per_second": generator.uniform(1000, 2000),
        "refresh_seconds": 5.0 if row.contender.startswith("loqt") else 0.0,
        "num_refreshes": 9 if row.contender.startswith("loqt") else 0,
        "notes": [],
        "curve": curve,
        "data": {"num_documents": 10, "num_tokens": 1000, "num_validation_documents": 2, "num_validation_tokens": 77}
        | {"unigram_loss": 6.0},
        "machine": {"device": "a machine", "threads": 1, "python": "3", "torch": "2", "commit": "abc"},
    }
    if status == "diverged":
        return result | {"num_steps": 123, "curve": curve[:2]}
    loss = generator.uniform(3.0, 4.0)
    result["curve"] = [*curve, [600000, loss]]
    biased = math.exp(loss * 90 / 91)
    result["final"] = {"loss": loss, "perplexity": math.exp(loss), "num_tokens": 40000, "num_batches": 90}
    result["final"]["biased_perplexity"] = biased
    return result


@pytest.fixture
def results(plan: Any) -> dict[str, dict[str, Any]]:
    """GaLore fails with every rate, QLoRA diverges with seed 1 on the second data set, one run is missing."""
    generator = np.random.default_rng(3)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(2):  # what the search has found makes the rest known
        for row in plan.rows(found):
            if row.spec is None or row.key in found:
                continue
            status = "failed" if row.contender.startswith("galore") else "done"
            if (row.contender, row.data, row.seed) == ("qlora:16", "two", 1):
                status = "diverged"
            found[row.key] = result_of(row, generator, status)
    missing = next(row for row in plan.rows(found) if (row.contender, row.data, row.seed) == ("loqt:16", "two", 2))
    del found[missing.key]
    return found


@pytest.fixture
def every(report: Any, plan: Any, results: dict[str, Any]) -> list[Any]:
    rows = plan.rows(results)
    return [line for part in ("method", "search", "variant", "memory") for line in report.lines(rows, results, part)]


def line_of(every: list[Any], contender: str, data: str, part: str = "method") -> Any:
    return next(line for line in every if (line.part, line.contender, line.data) == (part, contender, data))


def finals(plan: Any, results: dict[str, Any], contender: str, data: str) -> dict[int, float]:
    """Final perplexity by seed, straight from the results."""
    found = {}
    for row in plan.rows(results):
        result = results.get(row.key)
        if (row.part, row.contender, row.data) == ("method", contender, data) and result and "final" in result:
            found[row.seed] = math.exp(result["final"]["loss"])
    return found


def test_means_and_ratios_are_of_the_same_seeds(report: Any, plan: Any, results: Any, every: list[Any]) -> None:
    for data in ("one", "two"):
        ours, base = finals(plan, results, "loqt:16", data), finals(plan, results, "adamw", data)
        line = line_of(every, "loqt:16", data)
        assert line.values(report.perplexity) == pytest.approx(ours)
        middle, deviation = report.spread(list(ours.values()))
        values = np.array(list(ours.values()))
        assert (middle, deviation) == pytest.approx((values.mean(), values.std(ddof=1)))
        found = report.ratios(line, line_of(every, "adamw", data), report.perplexity)
        assert found == pytest.approx({seed: ours[seed] / base[seed] for seed in ours})
    assert len(finals(plan, results, "loqt:16", "two")) == 2  # one is missing
    assert report.spread([3.0]) == (3.0, None)


def test_the_table_says_what_diverged_failed_and_is_missing(report: Any, every: list[Any]) -> None:
    assert report.trouble(line_of(every, "adamw", "one")) == ""
    assert report.trouble(line_of(every, "galore:16", "one")) == (
        "**failed**: RuntimeError: a / b and more (seed 0)"
    )  # shown once: no rate trains it
    assert report.trouble(line_of(every, "qlora:16", "two")) == "**diverged** at step 123 of 1000 (seed 1)"
    assert report.trouble(line_of(every, "loqt:16", "two")) == "1 of 3 seeds not run yet"
    cells = report.method_cells(line_of(every, "galore:16", "one"), every)
    assert len(cells) == len(report.HEAD) and set(cells[1:-1]) == {report.DASH}


def test_a_row_has_what_was_measured(report: Any, plan: Any, results: Any, every: list[Any]) -> None:
    cells = dict(zip(report.HEAD, report.method_cells(line_of(every, "loqt:16", "one"), every), strict=True))
    values = np.array(list(finals(plan, results, "loqt:16", "one").values()))
    assert cells["perplexity"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    biased = np.mean(values ** (90 / 91))
    assert cells["family's definition"] == f"{biased:.2f} (n = 90)"
    assert cells["weights / gradients / states, MB"] == "3.0 / 2.0 / 1.0" and cells["peak, MB"] == "10"
    assert cells["trained parameters"] == "1,234,567"
    assert cells["re-initializations"] == "9: 5.0 s (5.0 %)"
    assert report.components(line_of(every, "loqt:16", "one").measured[0])["the rest of the peak"] == pytest.approx(4e6)


def test_the_search_is_shown_in_full(report: Any, plan: Any, results: Any, every: list[Any]) -> None:
    text = "\n".join(report.search_tables(plan.rows(results), every))
    for row in plan.rows(results):
        if row.part == "search" and results[row.key]["status"] == "done":
            assert f"{math.exp(results[row.key]['final']['loss']):.2f}" in text
    for contender in ("adamw", "loqt:16", "qlora:16"):
        losses = {row.factor: results[row.key]["final"]["loss"] for row in plan.rows(results)
                  if (row.part, row.contender) == ("search", contender)}  # fmt: skip
        best = min(losses, key=lambda factor: losses[factor])
        told = next(line for line in text.splitlines() if line.startswith(f"| {contender} |"))
        assert told.count("**") == 2 and f"**{math.exp(losses[best]):.2f}**" in told
        assert ("edge" in told) == (best != 1.0)
    assert next(line for line in text.splitlines() if line.startswith("| galore:16 |")).count("failed") == 3


def test_variants_are_held_against_the_shipped_one(report: Any, plan: Any, results: Any, every: list[Any]) -> None:
    line = next(line for line in every if line.part == "variant" and line.label == "none")
    shipped = finals(plan, results, "loqt:16", "one")
    own = {row.seed: math.exp(results[row.key]["final"]["loss"]) for row in plan.rows(results) if row.label == "none"}
    against = np.array([own[seed] / shipped[seed] for seed in range(3)])
    cells = report.variant_cells(line, every)
    assert cells[3] == f"{against.mean():.4f} ± {against.std(ddof=1):.4f}"
    assert cells[4] == f"{(against < 1).sum()} of 3"
    same = next(line for line in every if line.part == "variant" and line.label == "as it is")
    assert report.variant_cells(same, every)[0] == "as it is (shipped)"
    text = "\n".join(report.overview([line, same], every))
    assert f"| C: none | {cells[3]} | {against.mean():.4f} | {(against < 1).sum()} of 3 |" in text
    assert "as it is" not in text


def test_how_much_of_the_gap_is_closed(report: Any) -> None:
    means = {"neither": 30.0, "compensation": 27.0, "both": 26.0, "no quantization": 25.0}
    assert report.gap_closed(means) == pytest.approx({"compensation": 0.6, "both": 0.8})
    assert report.gap_closed(means | {"no quantization": 31.0}) == {}
    assert report.gap_closed({"neither": 30.0}) == {}


def test_the_last_evaluation_is_no_part_of_the_curve_where_it_is_on_more(report: Any, plan: Any, results: Any) -> None:
    result = next(result for result in results.values() if result["status"] == "done")
    tokens, values = report.curve(result)
    assert len(tokens) == 5 and values[0] == pytest.approx(math.exp(8.0))
    alike = result | {"spec": result["spec"] | {"eval_tokens": 40000}}
    assert report.curve(alike)[0][-1] == 600000


def test_report_and_plots(report: Any, plan: Any, results: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    report.write(plan, results, tmp_path, command=["--suite", "full", "--report"])
    text = (tmp_path / "REPORT.md").read_text()
    assert "python tools/compare.py --suite full\n" in text
    for name in ("perplexity", "final", "memory", "search", "components"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10000 and f"({name}.png)" in text
    assert "- galore:16 on one, seed 0: failed: RuntimeError: a / b and more" in text
    assert "diverged at step 123 of 1000" in text and "not run: no rate trained it on one" in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["runs"].keys() == results.keys()
    assert content["machines"] == [next(iter(results.values()))["machine"]] or len(content["machines"]) == 1
    # every line of a table has as many cells as its head
    width = None
    for line in text.splitlines():
        width = None if not line.startswith("|") else width or line.count("|")
        assert width is None or line.count("|") == width, line


def test_nothing_but_what_failed(report: Any, plan: Any, tmp_path: Path) -> None:
    rows = plan.rows({})
    results = {row.key: result_of(row, np.random.default_rng(0), "failed") for row in rows if row.spec is not None}
    report.write(plan, results, tmp_path, command=[])
    text = (tmp_path / "REPORT.md").read_text()
    assert text.count("**failed**") >= 4 and "nan" not in text and ".png" not in text


def test_marks_in_the_plots(tools: dict[str, Any], every: list[Any]) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots = tools["compare_plots"]
    found = [line for line in every if line.part == "method" and line.data == "two"]
    figure, (left, right) = pyplot.subplots(1, 2)
    plots.draw_curves(left, found, every)
    spec = line_of(every, "qlora:16", "two").runs[1]["spec"]
    ends = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "X" and len(line.get_xdata())]
    assert ends == pytest.approx([123 * spec["rows"] * spec["length"] / 1e6])  # where the diverged run ended
    plots.draw_finals(right, found, every)
    assert [text.get_text() for text in right.texts] == ["1 diverged"]
    dots = {tick.get_text(): number for number, tick in enumerate(right.get_yticklabels())}
    drawn = [line for line in right.lines if line.get_marker() == "o" and dots["qlora:16"] in line.get_ydata()]
    assert len(drawn[0].get_xdata()) == 2
    one = [line for line in every if line.part == "method" and line.data == "one"]
    figure, ax = pyplot.subplots()
    plots.draw_curves(ax, one, every)
    assert "galore:16 (failed)" in [text.get_text() for text in ax.get_legend().get_texts()]
    pyplot.close("all")
