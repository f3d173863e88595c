"""Schedules against counts of the paper and values worked out by hand."""

from __future__ import annotations

import pytest

from loqt_ds.core.schedules import LRSchedule, ReinitSchedule


def test_counts_of_the_paper() -> None:
    schedule = ReinitSchedule("exponential", 100, 1.2)
    assert [len(schedule.steps(n)) for n in (10_000, 20_000, 60_000)] == [39, 44, 51]


def test_exponential_gaps_by_hand() -> None:
    # int(1.2 ** k), k = 1 …: 1, 1, 1, 2, 2, 2, 3, 4, 5, 6
    schedule = ReinitSchedule("exponential", 100, 1.2)
    assert [schedule.gap(k) for k in range(1, 11)] == [101, 101, 101, 102, 102, 102, 103, 104, 105, 106]
    assert schedule.steps(600) == [0, 101, 202, 303, 405, 507]


def test_other_kinds_by_hand() -> None:
    assert ReinitSchedule("static", 200).steps(801) == [0, 200, 400, 600, 800]
    assert ReinitSchedule("static", 200).steps(800) == [0, 200, 400, 600]
    assert ReinitSchedule("linear", 10, 1.5).steps(60) == [0, 11, 24, 38, 54]  # gaps 11, 13, 14, 16
    never = ReinitSchedule("never", 100)
    assert never.steps(10**9) == [0]
    assert never.is_due(0) and not any(never.is_due(s) for s in range(1, 500))
    assert ReinitSchedule("exponential", 100, 0.5).steps(301) == [0, 100, 200, 300]


@pytest.mark.parametrize("kind", ["exponential", "static", "linear", "never"])
@pytest.mark.parametrize("max_gap", [None, 7])
def test_is_due_does_not_depend_on_the_order_of_questions(kind: str, max_gap: int | None) -> None:
    steps = set(ReinitSchedule(kind, 5, 1.3, max_gap).steps(1000))
    backwards = ReinitSchedule(kind, 5, 1.3, max_gap)
    assert {s for s in reversed(range(1000)) if backwards.is_due(s)} == steps
    forwards = ReinitSchedule(kind, 5, 1.3, max_gap)
    assert {s for s in range(1000) if forwards.is_due(s)} == steps
    assert 0 in steps


def test_max_gap_clamps_gaps_and_not_steps() -> None:
    # Mistake 6 of the reference: steps were clamped, and re-initialization ended there.
    schedule = ReinitSchedule("exponential", 10, 1.5, max_gap=20)
    steps = schedule.steps(2000)
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert gaps[:8] == [11, 12, 13, 15, 17, 20, 20, 20]
    assert set(gaps[5:]) == {20}
    assert steps[-1] > 1975


def test_growth_does_not_overflow() -> None:
    endless = ReinitSchedule("exponential", 1, 1.2, max_gap=1)
    assert len(endless.steps(20_000)) == 20_000  # 1.2 ** 20000 is past the largest float
    assert ReinitSchedule("exponential", 1, 1.2).gap(10**6) >= 2**62
    assert ReinitSchedule("exponential", 1, 1e300).gap(5) >= 2**62
    assert ReinitSchedule("linear", 1, 1e308).gap(100) >= 2**62
    assert ReinitSchedule("exponential", 3, 0.9).gap(10**6) == 3


def test_latest_before() -> None:
    schedule = ReinitSchedule("static", 10)
    assert [schedule.latest_before(s) for s in (0, 1, 10, 11, 25)] == [None, 0, 0, 10, 20]


def test_equal_schedules_are_equal_whatever_was_asked() -> None:
    asked = ReinitSchedule("static", 10)
    asked.steps(1000)
    assert asked == ReinitSchedule("static", 10)
    assert hash(asked) == hash(ReinitSchedule("static", 10))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "sometimes"}, "sometimes.*exponential, static, linear, never"),
        ({"interval": 0}, "loqt.interval=0"),
        ({"growth": -1.0}, "loqt.growth=-1"),
        ({"growth": float("nan")}, "loqt.growth=nan"),
        ({"max_gap": 0}, "loqt.max_gap=0"),
    ],
)
def test_impossible_reinit_schedules_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReinitSchedule(**values)


# ---- learning rate --------------------------------------------------------------------------------------------------


def rates(schedule: LRSchedule, *steps: int) -> list[float]:
    return [schedule.multiplier(step) for step in steps]


def test_cosine_by_hand() -> None:
    schedule = LRSchedule("cosine", max_steps=110, warmup_steps=10, min_ratio=0.1)
    assert rates(schedule, 0, 4, 9) == pytest.approx([0.1, 0.5, 1.0])
    # A quarter, half, three quarters and the end of the way: 0.1 + 0.45 (1 + cos).
    expected = [1.0, 0.1 + 0.45 * 1.7071067811865475, 0.55, 0.1 + 0.45 * 0.2928932188134525, 0.1, 0.1]
    assert rates(schedule, 10, 35, 60, 85, 110, 5000) == pytest.approx(expected)


def test_linear_and_constant_by_hand() -> None:
    linear = LRSchedule("linear", max_steps=110, warmup_steps=10, min_ratio=0.2)
    assert rates(linear, 4, 10, 35, 60, 110, 999) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.2, 0.2])
    constant = LRSchedule("constant", max_steps=110, warmup_steps=4, min_ratio=0.2)
    assert rates(constant, 0, 3, 4, 100, 999) == pytest.approx([0.25, 1.0, 1.0, 1.0, 1.0])


def test_no_warmup_and_warmup_only() -> None:
    assert LRSchedule("cosine", max_steps=10, warmup_steps=0).multiplier(0) == 1.0
    only = LRSchedule("cosine", max_steps=4, warmup_steps=4, min_ratio=0.1)
    assert rates(only, 0, 1, 2, 3) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_rewarmup_by_hand() -> None:
    plain = LRSchedule("cosine", max_steps=100, warmup_steps=5, min_ratio=0.1)
    ramped = LRSchedule(
        "cosine_rewarmup",
        max_steps=100,
        warmup_steps=5,
        min_ratio=0.1,
        rewarmup_steps=4,
        reinit=ReinitSchedule("static", 20),
    )
    ratio = [ramped.multiplier(s) / plain.multiplier(s) for s in range(100)]
    # The re-initialization follows the update of step 20; the next updates are ramped.
    assert ratio[18:26] == pytest.approx([1, 1, 1, 0.25, 0.5, 0.75, 1, 1])
    assert ratio[:18] == pytest.approx([1] * 18)  # the first re-initialization is covered by the warm-up
    assert ratio[41] == pytest.approx(0.25)


def test_rewarmup_longer_than_a_gap_starts_again() -> None:
    schedule = LRSchedule(
        "cosine_rewarmup",
        max_steps=1000,
        warmup_steps=0,
        min_ratio=1.0,
        rewarmup_steps=10,
        reinit=ReinitSchedule("static", 4),
    )
    assert rates(schedule, 0, 4, 5, 8, 9) == pytest.approx([1, 1, 0.1, 0.4, 0.1])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "step"}, "step.*cosine, linear, constant, cosine_rewarmup"),
        ({"max_steps": 0}, "train.max_steps=0"),
        ({"warmup_steps": 20, "max_steps": 10}, "optim.warmup_steps=20"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1"),
        ({"min_ratio": 1.5}, "optim.min_lr_ratio=1.5"),
        ({"kind": "cosine_rewarmup", "rewarmup_steps": 0}, "optim.rewarmup_steps=0"),
        ({"kind": "cosine_rewarmup"}, "cosine_rewarmup"),
    ],
)
def test_impossible_lr_schedules_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRSchedule(**values)
