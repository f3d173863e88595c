"""Mistakes of the method's first implementation (end of ALGORITHM.md) that show in a whole run only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from workshop import Workshop, events, losses

OFTEN: dict[str, Any] = {"loqt__schedule": "static", "loqt__interval": 2, "train__max_steps": 7}


@pytest.mark.parametrize("deepspeed", [False, True], ids=["single", "deepspeed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"loqt__subspace": "sketch", "loqt__sketch_oversampling": 8, "train__gradient_accumulation_steps": 2}],
    ids=["gram", "sketch-accumulation"],
)
def test_evaluations_on_re_initialization_steps_change_nothing(
    workshop: Workshop, tmp_path: Path, deepspeed: bool, options: dict[str, Any]
) -> None:
    """Mistake 1: an evaluation merged in its forward and left the adapters dead for good."""
    never, always = tmp_path / "never", tmp_path / "always"
    workshop.train(output_dir=never, deepspeed=deepspeed, **OFTEN, **options).ok()
    workshop.train(output_dir=always, deepspeed=deepspeed, eval__every=1, checkpoint__every=1, **OFTEN, **options).ok()
    assert [event["step"] for event in events(always, "reinit")] == [1, 3, 5, 7]
    assert len(events(always, "eval")) == 7
    assert losses(always) == losses(never)
    assert events(always, "eval")[-1]["loss"] == events(never, "eval")[-1]["loss"]
    # alive: the loss goes on falling after the evaluation of a re-initialization step
    evaluated = [event["loss"] for event in events(always, "eval")]
    assert evaluated == sorted(evaluated, reverse=True)


def test_activation_checkpointing_changes_nothing(workshop: Workshop, tmp_path: Path) -> None:
    """Mistake 7: it broke the custom autograd function; under it, taps see each activation twice."""
    for name, value in (("off", False), ("on", True)):
        workshop.train(output_dir=tmp_path / name, train__activation_checkpointing=value, **OFTEN).ok()
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    on, off = (
        [layer["captured_energy"] for event in events(tmp_path / name, "reinit") for layer in event["layers"]]
        for name in ("on", "off")
    )
    assert on == off


def test_logging_and_names_change_nothing(workshop: Workshop, tmp_path: Path) -> None:
    workshop.train(output_dir=tmp_path / "a", **OFTEN).ok()
    workshop.train(output_dir=tmp_path / "b", logging__every=3, logging__tensorboard=True, name="b", **OFTEN).ok()
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert sorted(b) == [1, 3, 6, 7]
    assert b == {step: a[step] for step in b}


def test_accumulated_micro_batches_are_one_batch(workshop: Workshop, tmp_path: Path) -> None:
    """Mistake 8: updates fired on every micro-batch. Four micro-batches of one row take the step of one of four rows,
    re-initializations included, up to the order of float32 sums."""
    shared: dict[str, Any] = OFTEN | {"train__dtype": "fp32", "optim__name": "adamw", "loqt__quantize_w": "none"}
    shared |= {"loqt__quantize_p": "none", "loqt__compensation_steps": 0}
    workshop.train(output_dir=tmp_path / "one", **shared).ok()
    workshop.train(
        output_dir=tmp_path / "four", train__micro_batch_size=1, train__gradient_accumulation_steps=4, **shared
    ).ok()
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_layerwise_updates_are_the_updates(workshop: Workshop, tmp_path: Path) -> None:
    """Without clipping, a parameter updated inside the backward gets the update it would have got after it."""
    shared: dict[str, Any] = {"train__max_grad_norm": None, "train__dtype": "fp32", **OFTEN}
    workshop.train(output_dir=tmp_path / "after", **shared).ok()
    workshop.train(output_dir=tmp_path / "inside", optim__layerwise=True, **shared).ok()
    assert losses(tmp_path / "inside") == losses(tmp_path / "after")
