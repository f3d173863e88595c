"""README's table of what works with what: made of runs, and of the program's own words; and some of the runs again."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import compatibility
import launches
import pytest
from compatibility import FACTORS, OPTIONS, PLAIN, Plan, Result, deviations, make_plan, reference_of, run_cases
from compatibility_report import BEGIN, END, HEADERS, README, Record, in_readme, problem_of, table
from covering import Pair, all_pairs, covering_array, pairs_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compatibility")
    launches.Workshop(folder)
    return folder


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return make_plan(folder)


# ---------------------------------------------------------------- the covering array


def reachable(factors: dict[str, list[str]], forbidden: set[Pair]) -> set[Pair]:
    """Every pair that stands in a case without forbidden pairs, by looking at all cases."""
    found: set[Pair] = set()
    for values in itertools.product(*factors.values()):
        pairs = pairs_of(dict(zip(factors, values, strict=True)))
        if not pairs & forbidden:
            found |= pairs
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_pair_that_can_is_met_and_no_other(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 4) for _ in range(draw.randint(2, 5))]
    factors = {f"f{i}": [f"v{j}" for j in range(size)] for i, size in enumerate(sizes)}
    pairs = all_pairs(factors)
    forbidden = set(draw.sample(pairs, draw.randint(0, len(pairs) // 2)))
    cases, impossible = covering_array(factors, forbidden)
    met = set().union(*map(pairs_of, cases))
    assert met == reachable(factors, forbidden)
    assert set(impossible) == set(pairs) - forbidden - met
    assert (cases, impossible) == covering_array(factors, forbidden), "the same whenever it is made"
    assert len(cases) <= len(met)


# ---------------------------------------------------------------- the record, and README


def test_readme_says_what_the_record_says() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert in_readme(text, Record.read()) == text, "write it by compatibility_report.py --table"


def test_the_record_is_of_these_options_and_of_what_is_refused_today(plan: Plan) -> None:
    record = Record.read()
    assert record.refused == plan.refused
    assert record.impossible == plan.impossible
    assert [result.case for result in record.results] == sorted(plan.cases, key=lambda c: compatibility.engine_of(c)[1])
    assert [result.case for result in record.references] == plan.references


def test_every_run_of_the_record_is_good() -> None:
    record = Record.read()
    problems = {str(result.case): record.problem(result) for result in record.results}
    assert not {case: problem for case, problem in problems.items() if problem}


def test_plain_runs_differ_by_more_than_is_allowed() -> None:
    """Or a run that ignores an option could pass for one that honours it."""
    references = Record.read().references
    assert len(references) == len(OPTIONS["clipping"]) * len(OPTIONS["trained"])
    most = max(most for both in compatibility.TOLERANCES.values() for most in both)
    for one, other in itertools.combinations(references, 2):
        assert max(deviations(one, other)) > 2 * most, (one.case, other.case)


def test_what_was_not_run_well_gets_no_tick() -> None:
    record = Record.read()
    place, value = "FSDP2 x 2", ("moments", "8-bit")
    row = f"| FSDP2 | {' | '.join(['✓'] * 3)} |"
    assert row in table(record)
    spoiled = [r for r in record.results if r.case["place"] == place and r.case["moments"] == "8-bit"]
    assert spoiled
    for result in spoiled:
        result.losses = [loss * 1.01 for loss in result.losses]
    column = list(HEADERS).index(value) + 5  # in what `split` gives: nothing, the engine, three numbers of ranks
    cells = next(line for line in table(record).splitlines() if line.startswith("| FSDP2 |")).split(" | ")
    assert cells[column - 1] == "✓ on 1, 4; not run on 2"
    record.results = []
    assert "✓" not in table(record)


def test_what_is_wrong_with_a_run() -> None:
    record = Record.read()
    (plain,) = (r for r in record.references if r.case == PLAIN)
    good = Result(PLAIN, list(plain.losses), list(plain.reinits))
    assert problem_of(good, plain) == ""
    assert "re-initializations" in problem_of(Result(PLAIN, plain.losses, [1]), plain)
    assert "deviate" in problem_of(Result(PLAIN, [*plain.losses[:-1], plain.losses[-1] * 1.002], plain.reinits), plain)
    assert "losses" in problem_of(Result(PLAIN, plain.losses[:-1], plain.reinits), plain)
    assert "boom" in problem_of(Result(PLAIN, error="boom"), plain)


# ---------------------------------------------------------------- runs


def check(results: list[Result], plan_references: list[Result]) -> None:
    for result in results:
        (reference,) = (r for r in plan_references if r.case == reference_of(result.case))
        assert problem_of(result, reference) == "", json.dumps(result.case)


def test_an_engine_after_the_other_on_two_ranks(plan: Plan, folder: Path) -> None:
    quick = plan.quick
    assert Counter(compatibility.engine_of(case) for case in quick) == {
        (engine, 2): 1 for engine in compatibility.QUICK
    }
    assert sum(case["torch.compile"] == "on" for case in quick) == 1
    wanted = [reference for reference in plan.references if reference in map(reference_of, quick)]
    results = run_cases([*wanted, *quick], folder)
    check(results[len(wanted) :], results[: len(wanted)])


@pytest.mark.slow
def test_the_whole_array(plan: Plan, folder: Path) -> None:
    results = run_cases([*plan.references, *plan.cases], folder, timeout_seconds=3600)
    num = len(plan.references)
    assert Counter(str(r.case) for r in results) == Counter(map(str, [*plan.references, *plan.cases]))
    check(results[num:], results[:num])


def test_factors_are_all_in_the_table() -> None:
    assert {name for name, _ in HEADERS} == set(OPTIONS) and set(FACTORS) == {"place", *OPTIONS}
