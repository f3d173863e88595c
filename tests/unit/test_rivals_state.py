"""Contenders go on from their state, saved and read as a run does it, bit for bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from small_rivals import batch_of, build, rivals_fixture, shape_fixture  # noqa: F401
from torch import Tensor

# With rank 32 the states of the projected gradients and of B have 4096 numbers, and so are in 8 bits where a method
# has that.
CASES = (
    *((name, "fp32") for name in ("adamw8bit", "galore:8", "qgalore:32", "apollomini", "qlora:8")),
    *((name, "fp32") for name in ("relora:8+start=2", "relora:8+start=5")),
    ("loqt8bit:8+candidate.error_feedback=nf4+candidate.stochastic=1", "fp32"),
    *((name, "bf16") for name in ("loftq:8", "loqt8bit:32")),
    *((name, "masters") for name in ("qgalore:32", "relora:8")),
)
STOP, STEPS = 3, 7


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def different(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two states differ, bit for bit."""
    if isinstance(one, Tensor):
        same = isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        return [] if same else [where]
    if isinstance(one, dict):
        if not isinstance(two, dict) or one.keys() != two.keys():
            return [f"{where}: other names"]
        return [found for key in one for found in different(one[key], two[key], f"{where}/{key}")]
    if isinstance(one, list):
        if not isinstance(two, list) or len(one) != len(two):
            return [f"{where}: other lengths"]
        return [
            found for i, pair in enumerate(zip(one, two, strict=True)) for found in different(*pair, f"{where}/{i}")
        ]
    return [] if one == two and type(one) is type(two) else [where]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_contender_goes_on_bit_for_bit(rivals: Any, shape: str, name: str, dtype: str) -> None:
    """Refreshed in steps 0, 2, 4 and 6: before the stop and after it."""
    options = {
        "dtype": "fp32" if dtype == "fp32" else "bf16",
        "masters": dtype == "masters",
        "lr": 1e-2,
        "lr_full_rank": 3e-3,
        "interval": 2,
        "max_steps": 20,
        "max_grad_norm": 1.0,
    }
    straight = build(rivals, name, shape, **options)
    losses = []
    for number in range(STEPS):
        if number == STOP:
            kept = through_a_file(straight.state())
        losses.append(straight.step(batch_of(number)).loss)
    assert len(set(losses)) == STEPS
    resumed = build(rivals, name, shape, **options)
    torch.manual_seed(1234)  # what is drawn goes on where it was, whatever this process has drawn
    resumed.restore(kept)
    assert different(resumed.state(), kept) == []
    assert [resumed.step(batch_of(number)).loss for number in range(STOP, STEPS)] == losses[STOP:]
    assert different(resumed.state(), straight.state()) == []
    assert resumed.num_trained() == straight.num_trained()
    assert resumed.num_bytes() == straight.num_bytes()


def test_a_state_does_not_change_with_the_contender(rivals: Any, shape: str) -> None:
    contender = build(rivals, "galore:8", shape, interval=2)
    contender.step(batch_of(0))
    state = contender.state()
    before = through_a_file(state)
    contender.step(batch_of(1))
    assert different(state, before) == [] and different(contender.state(), before) != []


def test_the_state_of_another_contender_is_refused(rivals: Any, shape: str) -> None:
    state = build(rivals, "adamw", shape).state()
    for name in ("adamw8bit", "loqt:8"):
        with pytest.raises(ValueError, match=f"the state is of 'adamw', this is '{name}'"):
            build(rivals, name, shape).restore(state)
    kept = build(rivals, "lora:8", shape).state()
    del kept["model"]["lm_head.weight"]
    with pytest.raises(ValueError, match=r"another model: lm_head\.weight is in one of them only"):
        build(rivals, "lora:8", shape).restore(kept)
