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

TOOLS = ("fit", "candidates", "rivals", "compare_run", "compare_suites", "compare_lines", "compare_variants")
TOOLS += ("compare_report", "compare_plots")
GIB = 2**30


@pytest.fixture(scope="module")
def tools(repository: Path) -> Iterator[dict[str, Any]]:
    """The modules, imported as `python tools/compare.py` does."""
    sys.path.insert(0, str(repository / "tools"))
    yield {name: importlib.import_module(name) for name in TOOLS}
    sys.path.remove(str(repository / "tools"))
    for name in [*TOOLS, *(name for name in sys.modules if name.startswith(("rivals_", "candidates_")))]:
        sys.modules.pop(name, None)


@pytest.fixture
def report(tools: dict[str, Any]) -> Any:
    return tools["compare_report"]


@pytest.fixture
def made_of(tools: dict[str, Any]) -> Any:
    return tools["compare_lines"]


@pytest.fixture
def variants(tools: dict[str, Any]) -> Any:
    return tools["compare_variants"]


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
        "packages": {"torch": "2", "peft": "0.1" if row.seed else "0.2"},
        "machine": {"device": "a machine", "threads": 1, "python": "3", "torch": "2", "commit": "abc"},
    }
    if status == "diverged":
        return result | {"num_steps": 123, "curve": curve[:2]}
    loss = generator.uniform(3.0, 4.0)
    result["curve"] = [*curve, [600000, loss + 0.01]]
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
def every(made_of: Any, plan: Any, results: dict[str, Any]) -> list[Any]:
    rows = plan.rows(results)
    return [line for part in ("method", "search", "variant", "memory") for line in made_of.lines(rows, results, part)]


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


def test_means_and_ratios_are_of_the_same_seeds(made_of: Any, plan: Any, results: Any, every: list[Any]) -> None:
    for data in ("one", "two"):
        ours, base = finals(plan, results, "loqt:16", data), finals(plan, results, "adamw", data)
        line = line_of(every, "loqt:16", data)
        assert line.values(made_of.perplexity) == pytest.approx(ours)
        middle, deviation = made_of.spread(list(ours.values()))
        values = np.array(list(ours.values()))
        assert (middle, deviation) == pytest.approx((values.mean(), values.std(ddof=1)))
        found = made_of.ratios(line, line_of(every, "adamw", data), made_of.perplexity)
        assert found == pytest.approx({seed: ours[seed] / base[seed] for seed in ours})
        nats = made_of.differences(line, line_of(every, "adamw", data))
        assert nats == pytest.approx({seed: math.log(ours[seed] / base[seed]) for seed in ours})
    assert made_of.ratios(line, None, made_of.perplexity) == made_of.differences(line, None) == {}
    assert len(finals(plan, results, "loqt:16", "two")) == 2  # one is missing
    assert made_of.spread([3.0]) == (3.0, None)


def test_the_table_says_what_diverged_failed_and_is_missing(report: Any, made_of: Any, every: list[Any]) -> None:
    assert made_of.trouble(line_of(every, "adamw", "one")) == ""
    assert made_of.trouble(line_of(every, "galore:16", "one")) == (
        "**failed**: RuntimeError: a / b and more (seed 0)"
    )  # shown once: no rate trains it
    assert made_of.trouble(line_of(every, "qlora:16", "two")) == "**diverged** at step 123 of 1000 (seed 1)"
    assert made_of.trouble(line_of(every, "loqt:16", "two")) == "1 of 3 seeds not run yet"
    cells = report.method_cells(line_of(every, "galore:16", "one"), every)
    assert len(cells) == len(report.HEAD) and set(cells[1:-1]) == {made_of.DASH}


def test_a_row_has_what_was_measured(report: Any, made_of: Any, plan: Any, results: Any, every: list[Any]) -> None:
    cells = dict(zip(report.HEAD, report.method_cells(line_of(every, "loqt:16", "one"), every), strict=True))
    values = np.array(list(finals(plan, results, "loqt:16", "one").values()))
    assert cells["perplexity"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    biased = np.mean(values ** (90 / 91))
    assert cells["family's definition"] == f"{biased:.2f} (n = 90)"
    assert cells["weights / gradients / states, MB"] == "3.0 / 2.0 / 1.0" and cells["peak, MB"] == "10"
    assert cells["trained parameters"] == "1,234,567"
    assert cells["re-initializations"] == "9: 5.0 s (5.0 %)"
    assert made_of.components(line_of(every, "loqt:16", "one").measured[0])["the rest of the peak"] == pytest.approx(
        4e6
    )


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


def test_variants_are_held_against_the_shipped_one(variants: Any, plan: Any, results: Any, every: list[Any]) -> None:
    line = next(line for line in every if line.part == "variant" and line.label == "none")
    shipped = finals(plan, results, "loqt:16", "one")
    own = {row.seed: math.exp(results[row.key]["final"]["loss"]) for row in plan.rows(results) if row.label == "none"}
    against = np.array([own[seed] / shipped[seed] for seed in range(3)])
    cells = variants.variant_cells(line, every)
    assert cells[3] == f"{against.mean():.4f} ± {against.std(ddof=1):.4f}"
    assert cells[4] == f"{(against < 1).sum()} of 3"
    same = next(line for line in every if line.part == "variant" and line.label == "as it is")
    assert variants.variant_cells(same, every)[0] == "as it is (shipped)"


LABELS = ("worse", "better", "mixed", "lost one", "lost all", "not run")


def deciding(tools: dict[str, Any], plan: Any) -> tuple[Any, dict[tuple[str, str, int], float]]:
    """(lines of variants on two data sets with three seeds, losses by contender, data and seed): one variant is worse
    than LoQT as shipped everywhere, one better, one better but for a run; one has diverged once, one always."""
    suites, generator = tools["compare_suites"], np.random.default_rng(7)
    variants = tuple(suites.Variant("G", label, (f"loqt.alpha=0.{n + 10}",)) for n, label in enumerate(LABELS))
    suite = replace(plan.suite, methods=("adamw", "loqt:{rank}"), search=(), variants=variants, memory=())
    decided = suites.Plan(replace(suite, variants_on=None), list(plan.data.values()))
    results, losses = {}, {}
    for row in decided.rows({}):
        shift = {"worse": 0.5, "better": -0.5, "mixed": 0.3 if (row.data, row.seed) == ("two", 1) else -0.4}
        loss = 4.0 + generator.uniform(-0.01, 0.01) + shift.get(row.label, -0.9 if row.group else 0.0)
        is_lost = row.label == "lost all" or (row.label, row.data, row.seed) == ("lost one", "one", 2)
        if row.label != "not run":
            results[row.key] = result_of(row, generator, "diverged" if is_lost else "done")
        if row.key in results and not is_lost:
            results[row.key]["final"] |= {"loss": loss, "perplexity": math.exp(loss)}
            losses[row.contender, row.data, row.seed] = loss
    rows = decided.rows(results)
    return [
        line for part in ("method", "variant") for line in tools["compare_lines"].lines(rows, results, part)
    ], losses


def test_what_lacks_runs_is_ranked_last(tools: dict[str, Any], variants: Any, plan: Any) -> None:
    found, losses = deciding(tools, plan)
    order = variants.standings(found)
    assert [standing.name.removeprefix("G: ") for standing in order] == [
        *("better", "mixed", "worse", "lost one", "lost all", "not run")
    ]
    assert [standing.verdict() for standing in order] == [
        *("**in all 6**", "in 5 of 6", "in 0 of 6", "in 5 of 5 runs; **1 lacking**"),
        *["in 0 of 0 runs; **6 lacking**"] * 2,
    ]


def test_every_variant_has_a_row_for_each_data_set(tools: dict[str, Any], variants: Any, plan: Any) -> None:
    found, losses = deciding(tools, plan)
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in variants.deciding_table(found)[4:-1]]
    assert [cells[0] for cells in told[2:6]] == ["*adamw*", "*adamw*", "*loqt:16 as shipped*", "*loqt:16 as shipped*"]
    assert [cells[0] for cells in told[6:10]] == ["G: better", "", "G: mixed", ""] and len(told) == 2 + 4 + 2 * 6
    for number, data in enumerate(("one", "two")):
        cells = dict(zip(variants.DECIDING_HEAD, told[8 + number], strict=True))
        own, shipped, base = (
            np.array([losses[name, data, seed] for seed in range(3)]) for name in (MIXED, "loqt:16", "adamw")
        )
        against = own - shipped
        assert cells["on"] == f"{data}, llama_2m" and cells["seeds"] == "3 of 3" and cells["remarks"] == ""
        assert cells["loss − LoQT's as shipped, nats"] == f"{against.mean():+.4f} ± {against.std(ddof=1):.4f}"
        ratio = np.exp(own - base)
        assert cells["/ AdamW's"] == f"{ratio.mean():.4f} ± {ratio.std(ddof=1):.4f}"
        assert cells["better than LoQT as shipped"] == ("" if number else "in 5 of 6")
    lost = told[12]
    assert lost[0] == "G: lost one" and lost[5] == "2 of 3" and "diverged" in lost[-1]


MIXED = f"loqt:16+loqt.alpha=0.{10 + LABELS.index('mixed')}"


def test_how_much_of_the_gap_is_closed(variants: Any) -> None:
    means = {"neither": 30.0, "compensation": 27.0, "both": 26.0, "no quantization": 25.0}
    assert variants.gap_closed(means) == pytest.approx({"compensation": 0.6, "both": 0.8})
    assert variants.gap_closed(means | {"no quantization": 31.0}) == {}
    assert variants.gap_closed({"neither": 30.0}) == {}


def test_the_gap_is_of_the_seeds_that_all_have(variants: Any, made_of: Any) -> None:
    # by hand: with seeds 1 and 2 the gap is 10, of which compensation closes (32 - 27) + (28 - 26) over 2 = 3.5
    values = {
        "neither": {0: 99.0, 1: 32.0, 2: 28.0},
        "compensation": {1: 27.0, 2: 26.0},
        "no quantization": {0: 1.0, 1: 20.0, 2: 20.0},
        "both": {},
    }
    found = [
        made_of.Line("variant", "", label, "", "llama_2m", "one", 3, {
            seed: {"status": "done", "final": {"perplexity": value, "loss": 0.0}} for seed, value in of.items()
        })
        for label, of in values.items()
    ]  # fmt: skip
    (told, _) = variants.paper_gap(found)
    assert "(seeds 1, 2): compensation 35 % (" in told
    found[1].runs.clear()
    found[0].runs.clear()
    assert variants.paper_gap(found) == []


def test_the_curve_is_drawn_to_its_end(made_of: Any, results: Any) -> None:
    result = next(result for result in results.values() if result["status"] == "done")
    tokens, values = made_of.curve(result)
    assert tokens == [0, 100000, 200000, 300000, 400000, 600000]
    assert values == pytest.approx([math.exp(loss) for _, loss in result["curve"]])
    broken = result | {"curve": [[0, 8.0], [1, math.nan], [2, None], [3, 800.0], [4, math.inf]]}
    assert made_of.curve(broken) == ([0, 3], [math.exp(8.0), math.exp(700.0)])


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
    assert content["packages"]["torch"] == {"2": sum("packages" in run for run in content["runs"].values())}
    assert f"{len(results)} of {len(plan.runs(plan.rows(results)))} runs are over" in text
    assert "torch 2, peft 0.2 (" in text and " runs) and 0.1 (" in text
    assert content["machines"] == [next(iter(results.values()))["machine"]] or len(content["machines"]) == 1
    # every line of a table has as many cells as its head
    width = None
    for line in text.splitlines():
        width = None if not line.startswith("|") else width or line.count("|")
        assert width is None or line.count("|") == width, line


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_not_finite_ends_no_report(report: Any, plan: Any, results: Any, tmp_path: Path, value: Any) -> None:
    name = next(row.key for row in plan.rows(results) if (row.contender, row.seed) == ("qlora:16", 2))
    results[name]["final"] |= {"loss": value, "perplexity": value, "biased_perplexity": value}
    results[name]["curve"][-1] = [600000, value]
    other = next(row.key for row in plan.rows(results) if (row.contender, row.seed) == ("adamw", 1))
    results[other]["curve"][2] = [200000, value]  # and one that recovers
    report.write(plan, results, tmp_path, command=[])
    text = (tmp_path / "REPORT.md").read_text()
    assert "nan" not in text and "Not drawn" not in text
    assert "| **diverged** at step 1000 of 1000 (seed 2) |" in text
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert content["runs"][name]["status"] == "diverged"


def test_a_plot_that_fails_ends_no_report(
    report: Any, tools: dict[str, Any], plan: Any, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")

    def breaks(*_: Any) -> None:
        raise RuntimeError("no ink |")

    pictures = tools["compare_plots"].PICTURES
    monkeypatch.setitem(pictures, "memory", (*pictures["memory"][:1], breaks, 3.0))
    (tmp_path / "memory.png").write_text("of an earlier report")
    report.write(plan, results, tmp_path, command=[])
    text = (tmp_path / "REPORT.md").read_text()
    assert "**Not drawn**: memory: RuntimeError: no ink /" in text and "memory.png" not in text
    assert "(components.png)" in text and not (tmp_path / "memory.png").exists()


def test_the_words_are_those_of_the_suite(report: Any, tools: dict[str, Any], plan: Any) -> None:
    rows = plan.rows({})
    spec = report.first_spec(rows)
    assert "over whole held-out documents" in report.reading(spec)
    assert "over the first 1,024 tokens of the held-out documents" in report.reading(replace(spec, final_tokens=1024))
    told = "\n".join(report.introduction(plan, rows, {}, []))
    assert f"0 of {len(plan.runs(rows))} runs are over" in told and len(plan.runs(rows)) > len(
        {row.key for row in rows}
    )
    assert "bf16" not in told
    suites = tools["compare_suites"]
    told = "\n".join(
        report.introduction(gpu := suites.Plan(suites.SUITES["gpu"], [suites.DataSet("one")]), gpu.rows({}), {}, [])
    )
    assert report.BF16 in told and "One at a time" in told


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
    # which is far above what is shown, and seen all the same
    (cross,) = [line for line in left.lines if line.get_marker() == "X" and len(line.get_xdata())]
    bottom, top = left.get_ylim()
    assert bottom <= cross.get_ydata()[0] <= top < math.exp(7.9) and not cross.get_clip_on()
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
