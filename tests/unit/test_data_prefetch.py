"""Batches made ahead: the same ones, at the same positions, with errors where they belong."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_batches import batches, targets

from loqt_ds.data import prefetch
from loqt_ds.data.prefetch import StepBatches

CPU = torch.device("cpu")


class Numbers:
    """Batches that hold their number; `act` is called with it first."""

    def __init__(self, act: Any = lambda number: None) -> None:
        self.made, self._act = 0, act

    def next_batch(self) -> dict[str, torch.Tensor]:
        self._act(self.made)
        self.made += 1
        return {"targets": torch.tensor([self.made - 1])}

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["next"]


def numbers(step: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(batch["targets"]) for batch in step]


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(2, 200),
    size=st.integers(1, 4),
    accumulated=st.integers(1, 3),
    rank=st.integers(0, 1),
    stop=st.integers(0, 5),
)
def test_the_same_batches_at_the_same_positions(
    num_tokens: int, size: int, accumulated: int, rank: int, stop: int
) -> None:
    """A position taken after any step goes on, with and without reading ahead, where that step ended."""
    plain = batches(num_tokens, size, rank, 2)
    ahead = StepBatches(batches(num_tokens, size, rank, 2), num_micro_batches=accumulated, device=CPU)
    for step in range(6):
        if step == stop:
            state = ahead.state_dict()
            assert state == plain.state_dict()
            ahead = StepBatches(batches(num_tokens, size, rank, 2), num_micro_batches=accumulated, device=CPU)
            ahead.load_state_dict(state)
        got = ahead.take(is_last=step == 5)
        assert list(map(targets, got)) == [targets(plain.next_batch()) for _ in range(accumulated)]
    assert ahead.state_dict() == plain.state_dict()


def test_the_next_step_is_made_while_this_one_is_computed() -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def act(number: int) -> None:
        if number == 2:
            begun.set()
            assert may_go_on.wait(60)

    ahead = StepBatches(Numbers(act), num_micro_batches=2, device=CPU)
    assert numbers(ahead.take(is_last=False)) == [0, 1]
    assert begun.wait(60)  # nobody has asked for it
    assert ahead.state_dict() == {"next": 2}  # nor is it counted
    may_go_on.set()
    assert numbers(ahead.take(is_last=False)) == [2, 3]


def test_nothing_is_read_beyond_the_last_step() -> None:
    source = Numbers()
    ahead = StepBatches(source, num_micro_batches=3, device=CPU)
    ahead.take(is_last=False)
    ahead.take(is_last=True)
    ahead.close()
    assert source.made == 6 and ahead.state_dict() == {"next": 6}


@pytest.mark.parametrize("error", [StopIteration(), OSError(5, "Input/output error", "data.bin"), KeyError("a bug")])
def test_an_error_comes_up_in_its_own_step(error: Exception) -> None:
    def act(number: int) -> None:
        if number == 3:
            raise error

    ahead = StepBatches(Numbers(act), num_micro_batches=2, device=CPU)
    assert numbers(ahead.take(is_last=False)) == [0, 1]  # the second step fails meanwhile
    with pytest.raises(type(error)) as raised:
        ahead.take(is_last=False)
    assert raised.value is error
    assert ahead.state_dict() == {"next": 2}


def test_what_was_made_ahead_is_dropped_by_another_position() -> None:
    ahead = StepBatches(Numbers(), num_micro_batches=1, device=CPU)
    ahead.take(is_last=False)
    ahead.load_state_dict({"next": 7})
    assert ahead.state_dict() == {"next": 7}
    assert numbers(ahead.take(is_last=False)) == [7]


def test_closing_does_not_wait_for_ever_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CLOSING_SECONDS", 0.01)
    answers = threading.Event()

    def act(number: int) -> None:
        assert number == 0 or answers.wait(60)

    ahead = StepBatches(Numbers(act), num_micro_batches=1, device=CPU)
    ahead.take(is_last=False)
    ahead.close()
    assert not answers.is_set()
    answers.set()
    assert numbers(ahead.take(is_last=True)) == [1]
