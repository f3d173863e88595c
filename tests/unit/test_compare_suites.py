"""tools/compare_suites.py: which runs a comparison makes, in which order, under which names; no model is built."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loqt_ds.core.schedules import ReinitSchedule

TOOLS = ("fit", "candidates", "rivals", "compare_run", "compare_suites")


@pytest.fixture(scope="module")
def suites(repository: Path) -> Iterator[Any]:
    """The module, imported as `python tools/compare.py` does."""
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("compare_suites")
    sys.path.remove(str(repository / "tools"))
    for name in [*TOOLS, *(name for name in sys.modules if name.startswith(("rivals_", "candidates_")))]:
        sys.modules.pop(name, None)


def done(loss: float) -> dict[str, Any]:
    return {"status": "done", "final": {"loss": loss, "perplexity": math.exp(loss)}}


def write_data(folder: Path, *names: str) -> list[Path]:
    """Files of JSON Lines of various sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, name in enumerate(names):
        file = folder / name
        file.write_text(json.dumps({"text": "word " * (number + 3)}) + "\n")
        made.append(file)
    return made


# ---------------------------------------------------------------- suites


def test_every_suite_can_be_run(suites: Any) -> None:
    for suite in suites.SUITES.values():
        suites.check_all(suite)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("loqt:32+loqt.compensation_stepz=1", "compensation_stepz"),
        ("loqt:32+loqt.alpha={x}", "loqt.alpha"),
        ("loqt:32+optim.layerwise=true+train.max_grad_norm_per_parameter=1.0", "optim.layerwise"),
        ("loqt:32+candidate.nonsense=1", "nonsense"),
        ("loqt:32+candidate.sketch=gauss", "subspace=sketch"),
        ("adam", "no method 'adam'"),
        ("galore:4000", "4000"),
        ("loqt:4000", "4000"),
        ("relora:32+start=400", "start"),
    ],
)
def test_methods_that_cannot_be_run_are_refused(suites: Any, method: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        suites.check_all(replace(suites.SUITES["small"], methods=("adamw", method)))


def test_a_variant_or_component_that_cannot_be_run_is_refused(suites: Any) -> None:
    wrong = (suites.Variant("", "", ("optim.layerwise=true",)),)
    for name in ("variants", "memory"):
        with pytest.raises(ValueError, match="optim.layerwise"):
            suites.check_all(replace(suites.SUITES["small"], methods=("adamw",), **{name: wrong}))


def test_layerwise_components_clip_as_they_can(suites: Any) -> None:
    for variant in suites.MEMORY_COMPONENTS:
        for option in variant.options:
            assert suites.is_shipped(option) or f"+{option}" in variant.contender(8)
    plan = suites.Plan(suites.SUITES["full"], [suites.DataSet("one"), suites.DataSet("two")])
    rows = [row for row in plan.rows({}) if row.part == "memory"]
    assert {option for row in rows for option in row.spec.data} == {"data.tokenizer_vocab_size=32000"}
    config = suites.setup_of(rows[-1].spec, 256).config(*suites.rivals.run_options(rows[-1].spec.method))
    assert (config.optim.layerwise, config.train.max_grad_norm) == (True, None)


def test_the_small_suite_is_what_was_promised(suites: Any) -> None:
    suite = suites.SUITES["small"]
    plan = suites.Plan(suite, [suites.DataSet("stdlib")])
    rows = plan.rows({})
    families = {row.contender.partition(":")[0] for row in rows}
    assert families == {
        *("adamw", "adamw8bit", "galore", "qgalore", "apollo", "apollomini"),
        *("lora", "qlora", "loftq", "relora", "loqt", "loqtnq"),
    }
    assert "relora:32+start=40" in {row.contender for row in rows} and len(rows) == 13 == len({row.key for row in rows})
    spec = rows[0].spec
    schedule = ReinitSchedule("exponential", spec.interval, spec.growth)
    assert sum(schedule.is_due(step) for step in range(spec.steps)) >= 8
    methods = {row.contender: row.spec.method for row in rows}
    assert methods["loqt:32"] == "loqt:32+optim.name=adamw8bit" and methods["adamw"] == "adamw"


def test_rates_fall_back_on_the_family(suites: Any) -> None:
    table, published = suites.RATES, suites.PUBLISHED
    assert suites.rates("relora:32+start=40", "llama_2m") == table["relora"]
    assert suites.rates("loqt8bit:8", "llama_2m") == suites.rates("loqt:8+loqt.alpha=1", "llama_2m") == table["loqt"]
    assert suites.rates("loqtnq:8", "llama_2m") == table["loqtnq"]
    assert suites.rates("galore:8", "llama_60m") == published["galore"]


def test_the_rates_of_every_method_are_stored(suites: Any) -> None:
    from rivals import METHODS

    for method in METHODS:
        name = method if method in ("adamw", "adamw8bit", "apollomini") else f"{method}:8"
        assert all(rate > 0 for rate in suites.rates(name, "llama_2m"))


def test_shipped_options_make_no_run_of_their_own(suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    default = suites.shipped("loqt.compensation_steps")
    assert suites.Variant("", "", (f"loqt.compensation_steps={default}",)).contender(16) == "loqt:16"
    other = f"loqt.compensation_steps={default + 1}"
    assert suites.Variant("", "", (other,), rank=0.5).contender(16) == f"loqt:8+{other}"
    assert suites.Variant("", "", ("candidate.stochastic=1",)).contender(16) == "loqt:16+candidate.stochastic=1"
    assert suites.Variant("", "", method="adamw").contender(16) == "adamw"
    for option in ("train.max_grad_norm=null", "optim.lr=0.001", "candidate.stochastic=1", "loqt.interval=100"):
        assert not suites.is_shipped(option)  # what runs set themselves, and what no product has
    for option in ("loqt.double_quant=none", "loqt.optimizer_state=keep", "optim.name=adamw"):
        name, _, value = option.partition("=")
        assert suites.is_shipped(option) == (suites.shipped(name) == value)


def test_a_static_schedule_may_be_shipped(suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    was, caches = suites.shipped, (suites.is_shipped, suites.shipped_config, suites.key)
    monkeypatch.setattr(suites, "shipped", lambda option: "static" if option == "loqt.schedule" else was(option))
    for cached in caches:
        cached.cache_clear()
    plan = suites.Plan(replace(suites.SUITES["small"], methods=("adamw", "loqt:8")), [suites.DataSet("one")])
    base, ours = (row.spec for row in plan.rows({}))
    setup = suites.setup_of(ours, 256)
    assert setup.config(*setup.schedule()).loqt.schedule == "static" and base.growth == 1.2
    assert suites.Variant("", "", ("loqt.schedule=static",)).contender(8) == "loqt:8"
    assert suites.Variant("", "", ("loqt.schedule=exponential",)).contender(8) == "loqt:8+loqt.schedule=exponential"
    for cached in caches:
        cached.cache_clear()


def test_only_what_names_no_optimizer_has_the_shipped_one(suites: Any) -> None:
    told = f"+optim.name={suites.shipped('optim.name')}"
    for method in ("loqt:8", "loqtnq:8", "loqt:8+candidate.stochastic=1"):
        assert suites.with_optimizer(method) == method + told
    for method in ("loqt8bit:8", "loqtcard:8", "adamw", "galore:8", "loqt:8+optim.name=adamw"):
        assert suites.with_optimizer(method) == method


# ---------------------------------------------------------------- data


def test_data_sets_of_a_command_line(suites: Any, tmp_path: Path) -> None:
    a, b, c = write_data(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    one = suites.data_set(f"one={a},{b}:{c}")
    assert one.name == "one"
    options = dict(option.split("=", 1) for option in one.options)
    assert json.loads(options["data.path"]) == [str(a), str(b)]
    assert json.loads(options["data.validation_path"]) == [str(c)]
    globbed = dict(option.split("=", 1) for option in suites.data_set(f"two={tmp_path}/[ab].jsonl").options)
    assert json.loads(globbed["data.path"]) == [str(a), str(b)]
    assert float(globbed["data.validation_fraction"]) == suites.VALIDATION_FRACTION
    full, small = suites.SUITES["full"], suites.SUITES["small"]
    assert [data.name for data in suites.data_sets([], small)] == ["stdlib"]
    assert [data.name for data in suites.data_sets([f"x={a}", "stdlib"], full)] == ["x", "stdlib"]
    with pytest.raises(ValueError, match="wants 2 data sets and has x"):
        suites.data_sets([f"x={a}"], full)
    with pytest.raises(ValueError, match="the name x is given twice"):
        suites.data_sets([f"x={a}", f"x={b}"], small)


@pytest.mark.parametrize("text", ["{}/a.jsonl", "={}/a.jsonl", "a b={}/a.jsonl", "stdlib={}/a.jsonl"])
def test_data_without_a_name_is_refused(suites: Any, tmp_path: Path, text: str) -> None:
    write_data(tmp_path, "a.jsonl")
    with pytest.raises(ValueError, match="give NAME=FILE"):
        suites.data_set(text.format(tmp_path))


@pytest.mark.parametrize(
    "text", ["x={}/none.jsonl", "x={}/a.jsonl:{}/none.jsonl", "x={}/*.parquet", "x={}/a.pdf", "x="]
)
def test_data_that_cannot_be_read_is_refused(suites: Any, tmp_path: Path, text: str) -> None:
    write_data(tmp_path, "a.jsonl", "a.pdf")
    with pytest.raises(ValueError, match="--data x="):
        suites.data_set(text.format(tmp_path, tmp_path))


# ---------------------------------------------------------------- names of runs


def test_a_run_is_named_after_what_it_depends_on(suites: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    file, other = write_data(tmp_path / "one", "a.jsonl", "b.jsonl")
    moved = Path(shutil.copytree(tmp_path / "one", tmp_path / "two")) / "a.jsonl"

    def spec(file: Path, **changes: Any) -> Any:
        options = (f"data.path={json.dumps([str(file)])}", "data.tokenizer_vocab_size=300")
        return replace(suites.Spec("adamw", options, 1e-3, 1e-3), **changes)

    assert suites.key(spec(file)) == suites.key(spec(moved)) != suites.key(spec(other))
    changes = [{"seed": 1}, {"lr": 2e-3}, {"lr_full_rank": 2e-3}, {"method": "adamw8bit"}, {"steps": 7}, {"rows": 3}]
    names = [suites.key(spec(file, **change)) for change in ({}, *changes)]
    assert len(set(names)) == len(names)
    default = suites.Spec.__dataclass_fields__["interval"].default
    assert suites.key(spec(file, interval=default)) == names[0]
    for name in names:
        assert all(letter.isalnum() or letter in "_.=-" for letter in name)


def test_a_shape_file_is_named_after_its_content(suites: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    names = []
    for hidden in (64, 128):
        file.write_text(json.dumps({"hidden_size": hidden}))
        suites.key.cache_clear()
        names.append(suites.key(suites.Spec("adamw", (), 1e-3, 1e-3, shape=str(file))))
    assert names[0] != names[1] and all(name.startswith("mine-adamw-0.001-0-") for name in names)


def test_a_shipped_default_makes_other_runs_of_loqt_alone(suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [suites.Spec(method, (), 1e-3, 1e-3) for method in ("adamw", "loqt:8", "loqtnq:8")]
    suites.key.cache_clear()
    before = [suites.key(spec) for spec in specs]
    changed = suites.shipped_digest() | {"loqt.alpha": 17.0}
    monkeypatch.setattr(suites, "shipped_digest", lambda: changed)
    suites.key.cache_clear()
    after = [suites.key(spec) for spec in specs]
    suites.key.cache_clear()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_a_raised_version_makes_other_runs_of_one_family(suites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [suites.Spec(method, (), 1e-3, 1e-3) for method in ("adamw", "galore:8", "loqt:8", "loqt8bit:8")]
    names = []
    for version in (0, 0, 1, 2):
        monkeypatch.setitem(suites.VERSIONS, "galore", version)
        suites.key.cache_clear()
        names.append([suites.key(spec) for spec in specs])
    suites.key.cache_clear()
    assert names[0] == names[1] and len({tuple(found) for found in names}) == 3
    assert {(found[0], *found[2:]) for found in names} == {(names[0][0], *names[0][2:])}


# ---------------------------------------------------------------- the search and the rows


def test_the_best_rate_is_chosen(suites: Any) -> None:
    generator = random.Random(0)
    for _ in range(50):
        factors = generator.sample([0.25, 0.5, 1.0, 2.0, 4.0], 4)
        ends = [[done(generator.uniform(3, 5)), {"status": "diverged"}, {"status": "failed"}, done(math.nan)]
                for _ in factors]  # fmt: skip
        found = [(factor, generator.choice(end)) for factor, end in zip(factors, ends, strict=True)]
        expected, best = None, math.inf
        for factor, result in found:
            if result["status"] == "done" and result["final"]["loss"] < best:
                expected, best = factor, result["final"]["loss"]
        assert suites.choose(found) == suites.Choice(expected)
        found[generator.randrange(4)] = (9.0, None)
        assert suites.choose(found).is_open


@pytest.fixture
def plan(suites: Any) -> Any:
    variants = (
        suites.Variant("C", "shipped", (f"loqt.compensation_steps={suites.shipped('loqt.compensation_steps')}",)),
        suites.Variant("C", "none", ("loqt.compensation_steps=0",)),
    )
    suite = replace(
        suites.SUITES["full"],
        scales=(("llama_2m", 16),),
        methods=("adamw", "loqt:{rank}"),
        seeds=3,
        search=(1.0, 0.5, 2.0),
        variants=variants,
        memory=(),
    )
    return suites.Plan(suite, [suites.DataSet("one"), suites.DataSet("two", ("data.validation_fraction=0.1",))])


def test_rows_wait_for_the_search(suites: Any, plan: Any) -> None:
    # 2 methods x 3 rates; the other 5 of 2 data sets x 3 seeds of each method; one variant on one data set x 3 seeds.
    number = 2 * 3 + 2 * 5 + 3
    rows = plan.rows({})
    assert len(plan.runs(rows)) == number
    known = [row for row in rows if row.spec is not None]
    assert [row.part for row in known] == ["search"] * 6 and rows[:6] == known
    assert [(row.contender, row.factor) for row in known[:3]] == [("adamw", 1.0), ("adamw", 0.5), ("adamw", 2.0)]

    results = {row.key: done(4.0 + abs(row.factor - 2.0)) for row in known if row.contender == "adamw"}
    rows = plan.rows(results)
    assert len(plan.runs(rows)) == number
    found = [row for row in rows if row.part == "method" and row.spec is not None]
    assert {row.contender for row in found} == {"adamw"} and {row.factor for row in found} == {2.0}
    lr, lr_full_rank = suites.rates("adamw", "llama_2m")
    assert (found[0].spec.lr, found[0].spec.lr_full_rank) == pytest.approx((2 * lr, 2 * lr_full_rank))
    assert [(row.seed, row.data) for row in found] == list(itertools.product(range(3), ("one", "two")))
    assert found[0].key in results  # the search's run is the seed 0's


def test_one_seed_after_the_other(suites: Any, plan: Any) -> None:
    memory = suites.MEMORY_COMPONENTS[:2]
    rows = suites.Plan(replace(plan.suite, search=(), memory=memory), list(plan.data.values())).rows({})
    assert [(part, seed) for (part, seed), _ in itertools.groupby(rows, lambda row: (row.part, row.seed))] == [
        *(("method", 0), ("memory", 0), ("variant", 0)),
        *((part, seed) for seed in (1, 2) for part in ("method", "variant")),
    ]


def test_variants_take_the_rate_of_their_method(suites: Any, plan: Any) -> None:
    known = plan.rows({})[:6]
    results = {row.key: done(4.0 + abs(row.factor - 0.5)) for row in known}
    rows = plan.rows(results)
    variants = [row for row in rows if row.part == "variant"]
    assert {row.data for row in variants} == {"one"} and {row.factor for row in variants} == {0.5}
    shipped = [row.key for row in variants if row.label == "shipped"]
    main = [row.key for row in rows if row.part == "method" and row.contender == "loqt:16" and row.data == "one"]
    assert shipped == main
    none = next(row for row in variants if row.label == "none")
    assert none.spec.method == "loqt:16+loqt.compensation_steps=0+optim.name=adamw8bit"


def test_a_method_that_no_rate_trains_is_shown_once(suites: Any, plan: Any) -> None:
    known = plan.rows({})[:6]
    results = {row.key: {"status": "diverged" if row.contender == "adamw" else "done", "final": {"loss": 3.0}}
               for row in known}  # fmt: skip
    rows = [row for row in plan.rows(results) if row.part == "method"]
    alone = [row for row in rows if row.contender == "adamw"]
    assert [(row.seed, row.data, row.factor) for row in alone] == [(0, "one", 1.0)] and alone[0].key in results
    assert len([row for row in rows if row.contender == "loqt:16"]) == 6


def test_changes_of_a_variant_reach_its_run(suites: Any, plan: Any) -> None:
    variant = suites.Variant("interval", "short", changes={"interval": 7, "lr": 0.125})
    suite = replace(plan.suite, search=(), variants=(variant,))
    rows = suites.Plan(suite, [suites.DataSet("one")]).rows({})
    made = [row.spec for row in rows if row.part == "variant"]
    assert [(spec.interval, spec.lr, spec.seed) for spec in made] == [(7, 0.125, seed) for seed in range(3)]
    assert not {row.key for row in rows if row.part == "variant"} & {row.key for row in rows if row.part == "method"}
