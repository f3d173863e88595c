"""What may differ when a run goes on: the number of ranks, and how the rows of a step are split; not their number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from loqt_ds.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from loqt_ds.config import Config, ConfigError, TrainConfig
from loqt_ds.rundir import Lock, choose_checkpoint, claim_directory, compare_options, is_claimed_by

ZERO2 = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "train_batch_size": 8}


def config(micro: int, accumulation: int, **train: Any) -> Config:
    return Config(train=TrainConfig(micro_batch_size=micro, gradient_accumulation_steps=accumulation, **train))


def checkpoint(saved: Config, world_size: int, ds_config: dict[str, Any] | None = None) -> Checkpoint:
    metadata = {"config": saved.to_dict(), "world_size": world_size, "ds_config": ds_config}
    return Checkpoint(Path("runs/x/checkpoints/step_4"), 4, json.loads(json.dumps(metadata)), {})


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((4, 2, 1), (4, 1, 2)),
        ((4, 2, 1), (1, 1, 8)),
        ((2, 1, 4), (8, 1, 1)),
        ((3, 4, 2), (2, 4, 3)),
        ((3, 4, 2), (3, 4, 2)),
        ((3, 4, 2), (6, 2, 2)),
    ],
)
def test_the_same_rows_in_a_step_go_on(before: tuple[int, int, int], now: tuple[int, int, int]) -> None:
    said: list[str] = []
    compare_options(checkpoint(config(*before[:2]), before[2]), config(*now[:2]), ZERO2, now[2], said.append)
    assert [before[2] != now[2]] == [any(f"{now[2]} rank" in line for line in said)]


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ((4, 2, 1), (4, 2, 2), ["= 16 rows", "but 8", "train.micro_batch_size=4 train.gradient_accumulation_steps=1"]),
        ((4, 1, 4), (4, 1, 1), ["= 4 rows", "but 16", "train.micro_batch_size=4 train.gradient_accumulation_steps=4"]),
        ((4, 1, 3), (8, 1, 2), ["= 16 rows", "but 12", "train.micro_batch_size=6 train.gradient_accumulation_steps=1"]),
        ((16, 1, 1), (5, 1, 2), ["but 16", "train.micro_batch_size=4 train.gradient_accumulation_steps=2"]),
        ((4, 2, 1), (3, 1, 3), ["8 rows cannot be split over 3 ranks", "start 1, 2, 4, 8 ranks"]),
        ((4, 2, 1), (4, 1, 1), ["× 1 rank = 4", "train.micro_batch_size=4 train.gradient_accumulation_steps=2"]),
    ],
)
def test_another_number_of_rows_is_refused_with_values_that_would_do(
    before: tuple[int, int, int], now: tuple[int, int, int], named: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        compare_options(checkpoint(config(*before[:2]), before[2]), config(*now[:2]), ZERO2, now[2], print)
    for words in (*named, "runs/x/checkpoints/step_4"):
        assert words in str(caught.value)


@pytest.mark.parametrize("before", [None, ZERO2])
@pytest.mark.parametrize("now", [None, ZERO2])
def test_with_and_without_deepspeed(before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    compare_options(checkpoint(config(4, 2), 1, before), config(4, 2), now, 1, print)


def test_how_deepspeed_computes_the_same_may_change() -> None:
    other = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5}, "train_batch_size": 4, "steps_per_print": 1}
    compare_options(checkpoint(config(4, 2), 1, ZERO2), config(4, 2), other, 1, print)
    with pytest.raises(CheckpointError, match="--ds_config: prescale_gradients=True differs from None"):
        compare_options(
            checkpoint(config(4, 2), 1, ZERO2), config(4, 2), other | {"prescale_gradients": True}, 1, print
        )


def test_patience_is_no_part_of_a_run_and_everything_else_of_training_is() -> None:
    saved = checkpoint(config(4, 2), 1)
    compare_options(saved, config(4, 2, collective_timeout_seconds=7), None, 1, print)
    with pytest.raises(CheckpointError, match="train.seed=3 differs from train.seed=0"):
        compare_options(saved, config(4, 2, seed=3), None, 1, print)


def test_a_claim_is_told_from_another_of_the_same_path(tmp_path: Path) -> None:
    """A second node may have a directory of that name on a disk of its own, of an earlier run even."""
    directory, lock = claim_directory(dataclasses.replace(Config(), output_dir=str(tmp_path / "run")), tmp_path / "run")
    assert isinstance(lock, Lock) and is_claimed_by(directory, lock.token)
    assert not is_claimed_by(tmp_path / "elsewhere", lock.token)
    with pytest.raises(ConfigError, match="still running"):
        claim_directory(Config(), directory)
    assert is_claimed_by(directory, lock.token), "who was refused has changed nothing"
    lock.file.close()
    _, second = claim_directory(Config(), directory)
    assert is_claimed_by(directory, second.token) and not is_claimed_by(directory, lock.token)
    second.file.close()


def test_a_checkpoint_of_a_script_of_its_own_is_no_runs(tmp_path: Path) -> None:
    """`engine.save_checkpoint` of the plugin knows of no data; the message says where it belongs."""
    metadata = {"config": Config().to_dict(), "engine_state": {}, "client_state": {}}
    path = save_checkpoint(tmp_path / "saves", 3, tensors={"model": {}}, metadata=metadata, keep=0)
    wanted = Config()
    wanted.checkpoint.resume = str(path)
    with pytest.raises(CheckpointError, match="script of its own"):
        choose_checkpoint(wanted, tmp_path / "run", None, 1, print)


def test_options_that_are_newer_than_the_checkpoint_have_their_defaults() -> None:
    old = checkpoint(config(4, 2), 1)
    del old.metadata["config"]["train"]["max_grad_norm"], old.metadata["config"]["model"]["kernels"]
    compare_options(old, config(4, 2), None, 1, print)
    with pytest.raises(CheckpointError, match="train.max_grad_norm=0.5 differs"):
        compare_options(old, config(4, 2, max_grad_norm=0.5), None, 1, print)


def test_how_the_same_is_computed_may_change() -> None:
    other = config(4, 2, memory_limit_gib=3.0, lean_activations=False, activation_checkpointing=True)
    other.optim.layerwise = True
    other.loqt.dequantized_cache_gib = 2.0
    compare_options(checkpoint(config(4, 2), 1), other, None, 1, print)
