"""Things that happen to one rank of a run, under the real launchers and both engines: each ends the run on all ranks,
soon, with one message and no process left behind, and the run goes on from its checkpoint as if nothing had happened.

A launch is twenty seconds of starting up. So the faults of one kind happen to one run, one after another: each launch
goes on from what the one before it left, and in the end every loss is that of a run nothing happened to, bit for bit.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from launches import SHORT_PATIENCE, Outcome, Start, Workshop, ended_well, events, losses, records, saved

DEEPSPEED = Start("deepspeed", "zero2")
TORCHRUN = Start("torchrun", "zero2")
FSDP = Start("torchrun", "fsdp2")
FSDP_SHARDED = Start("torchrun", "fsdp2 sharded")
HYBRID = Start("torchrun", "hybrid")


def starts(*quick: Start, slow: tuple[Start, ...]) -> pytest.MarkDecorator:
    """Parametrizes a test by how a run is started; those of `slow` take their time elsewhere."""
    return pytest.mark.parametrize("start", [*quick, *(pytest.param(s, marks=pytest.mark.slow) for s in slow)], ids=str)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def goes_on(workshop: Workshop, run: Path, start: Start, **changes: Any) -> None:
    """The run, to which things have happened, goes on to its end and has the losses of one nothing happened to."""
    workshop.undisturbed(run, start.engine, **changes)
    assert losses(run) == losses(workshop.straight(start.engine))


# ---------------------------------------------------------------- ranks that are killed


def killed(workshop: Workshop, run: Path, start: Start, what: str, rank: int, step: int) -> None:
    """One rank is killed by SIGKILL, as the kernel does when memory runs out."""
    before = saved(run) if (run / "checkpoints").exists() else []
    outcome = workshop.launch(run, start, {"what": what, "rank": rank, "step": step})
    newest = step - step % 2  # the save of step + 1 is the one that fails
    assert saved(run) == sorted({*before, *range(0, newest + 1, 2)})
    ended_well(outcome, f"rank {rank} vanished", resume=run / "checkpoints" / f"step_{newest}")


@starts(DEEPSPEED, slow=(FSDP, FSDP_SHARDED))
def test_ranks_killed_in_a_step_in_a_re_initialization_and_in_a_save(
    workshop: Workshop, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    killed(workshop, run, start, "killed in a step", rank=0, step=4)
    killed(workshop, run, start, "killed in a re-initialization", rank=1, step=9)
    killed(workshop, run, start, "killed in a save", rank=1, step=13)
    goes_on(workshop, run, start)
    assert [event["step"] for event in events(run, "resume")] == [4, 8, 12]


def test_a_rank_killed_while_it_rewrites_sharded_weights(workshop: Workshop, tmp_path: Path) -> None:
    """The others wait for the bytes of W and P that it would have scattered."""
    run = tmp_path / "run"
    killed(workshop, run, FSDP_SHARDED, "killed in a re-initialization", rank=1, step=9)
    goes_on(workshop, run, FSDP_SHARDED)


@starts(slow=(DEEPSPEED, TORCHRUN, FSDP, FSDP_SHARDED))
def test_the_other_rank_killed_at_the_same_moments(workshop: Workshop, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    killed(workshop, run, start, "killed in a step", rank=1, step=4)
    killed(workshop, run, start, "killed in a re-initialization", rank=0, step=6)
    killed(workshop, run, start, "killed in a save", rank=0, step=9)
    killed(workshop, run, start, "killed before the rename", rank=0, step=11)
    goes_on(workshop, run, start)


# ---------------------------------------------------------------- launchers that are stopped


def terminate(process: subprocess.Popen[bytes]) -> None:
    time.sleep(0.2)
    process.terminate()


def stopped(workshop: Workshop, run: Path, start: Start, step: int) -> None:
    """SIGTERM to the launcher alone, as a scheduler sends it."""
    slow = {"what": "slow", "rank": 1, "step": step, "count": 4}
    outcome = workshop.launch(run, start, slow, then=terminate)
    done = max(losses(run))
    assert step <= done < step + 4
    error = ended_well(outcome, f"after step {done}.", resume=run / "checkpoints" / f"step_{done}")
    assert error.startswith(("stopped by SIGTERM", "stopped by the end of its launcher"))


def flipped(outcome: Outcome, layer: int = 0, *, between: str = "0, 1", resume: Path) -> None:
    ended_well(
        outcome,
        "the ranks no longer hold the same model",
        f"model.layers.0.self_attn.{'qk'[layer]}_proj.w_codes differ (between ranks {between};",
        resume=resume,
    )


def hung(workshop: Workshop, run: Path, start: Start, rank: int, step: int) -> None:
    hang = {"what": "hangs in a step", "rank": rank, "step": step}
    outcome = workshop.launch(run, start, hang, train__collective_timeout_seconds=SHORT_PATIENCE)
    ended_well(
        outcome,
        f"rank {rank} did not answer within train.collective_timeout_seconds={SHORT_PATIENCE}",
        resume=run / "checkpoints" / f"step_{step - step % 2}",
    )
    assert outcome.seconds > SHORT_PATIENCE - 1


@starts(slow=(DEEPSPEED, FSDP))
def test_a_stopped_launcher_then_a_flipped_bit_then_a_rank_that_hangs(
    workshop: Workshop, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    stopped(workshop, run, start, 1)
    assert max(losses(run)) < 6
    # No save comes before the re-initialization, after which all ranks would hold what the owner merged or broadcast.
    bit = {"what": "one bit", "rank": 1, "step": 6}
    flipped(workshop.launch(run, start, bit), resume=run / "checkpoints" / "step_6")
    hung(workshop, run, start, rank=1, step=9)
    goes_on(workshop, run, start)


@starts(slow=(TORCHRUN, FSDP))
def test_a_flipped_bit_is_seen_by_the_next_re_initialization_or_save(
    workshop: Workshop, tmp_path: Path, start: Start
) -> None:
    """Whichever rank re-initializes the layer, before it merges the weight."""
    run = tmp_path / "run"
    for rank, layer, step in ((1, 0, 3), (1, 1, 6), (0, 0, 9), (0, 1, 13)):
        bit = {"what": "one bit", "rank": rank, "step": step, "layer": layer}
        flipped(workshop.launch(run, start, bit), layer, resume=run / "checkpoints" / f"step_{step - step % 2}")
    goes_on(workshop, run, start)


@pytest.mark.slow
def test_a_flipped_bit_of_a_shard_is_seen_where_another_group_has_the_same(workshop: Workshop, tmp_path: Path) -> None:
    """Two groups of two ranks. (Within one group nobody holds the same bytes twice: there is nothing to compare.)"""
    run = tmp_path / "run"
    for rank, step, between in ((3, 3, "1, 3"), (0, 7, "0, 2")):
        bit = {"what": "one bit", "rank": rank, "step": step}
        outcome = workshop.launch(run, HYBRID, bit, num_ranks=4)
        flipped(outcome, between=between, resume=run / "checkpoints" / f"step_{step - step % 2}")


@starts(slow=(DEEPSPEED, TORCHRUN, FSDP, FSDP_SHARDED))
def test_other_ranks_that_do_not_answer(workshop: Workshop, tmp_path: Path, start: Start) -> None:
    """A rank that waits for something else; and one that is stopped altogether: it hears no signal, until the launcher
    kills it."""
    run = tmp_path / "run"
    moments = (("hangs between steps", 0, 3), ("frozen in a step", 1, 7), ("frozen in a step", 0, 10))
    for what, rank, step in moments:
        outcome = workshop.launch(
            run,
            start,
            {"what": what, "rank": rank, "step": step},
            train__collective_timeout_seconds=SHORT_PATIENCE,
        )
        said = f"rank {rank} did not answer within train.collective_timeout_seconds={SHORT_PATIENCE}"
        if start.launcher == "deepspeed" and (what, rank) == ("frozen in a step", 0):
            said = "rank 0 does not answer: it hangs"  # nor does the store, which is in that process
        ended_well(outcome, said, resume=run / "checkpoints" / f"step_{step - step % 2}")
    stopped(workshop, run, start, 12)
    goes_on(workshop, run, start)


# ---------------------------------------------------------------- ranks that fail


@starts(DEEPSPEED, slow=(FSDP, FSDP_SHARDED))
def test_steps_that_one_rank_spoils_are_skipped_and_counted_and_then_its_data_ends(
    workshop: Workshop, tmp_path: Path, start: Start
) -> None:
    """The second of them would have been a re-initialization, which is made up for after them."""
    run, without = tmp_path / "run", tmp_path / "without"
    spoiled = {"what": "NaN", "rank": 1, "step": 5, "count": 2}
    outcome = workshop.launch(run, start, spoiled, {"what": "out of data", "rank": 1, "step": 10})
    error = ended_well(outcome, "step 11: the data ended", resume=run / "checkpoints" / "step_10")
    assert error.startswith("error (rank 1): ")
    assert outcome.text.count("the gradient is not finite") == 2 and "(2 in a row)" in outcome.text
    assert [event["step"] for event in events(run, "skipped_step")] == [6, 7]
    assert [event["step"] for event in events(run, "reinit")] == [1, 4, 8, 10]
    counts = {record["step"]: record["num_skipped"] for record in records(run) if "event" not in record}
    assert [counts[step] for step in range(4, 11)] == [0, 0, 1, 2, 2, 2, 2]
    assert saved(run) == [0, 2, 4, 8, 10], "no checkpoint of a skipped step"
    workshop.undisturbed(run, start.engine)
    workshop.undisturbed(without, start.engine, spoiled)
    assert json.dumps(losses(run)) == json.dumps(losses(without))
    assert all(math.isfinite(float(loss)) == (step not in (6, 7)) for step, loss in losses(run).items())


@starts(TORCHRUN, slow=(FSDP, FSDP_SHARDED))
def test_ten_steps_in_a_row_that_one_rank_spoils_end_the_run(workshop: Workshop, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    outcome = workshop.launch(run, start, {"what": "NaN", "rank": 1, "step": 4, "count": 10})
    good = run / "checkpoints" / "step_2"  # after that of step 4 no step was a good one
    assert outcome.status != 0
    (error,) = outcome.errors
    assert "10 steps in a row had a gradient that is not finite (up to step 14)" in error and "optim.lr" in error
    assert f"The last good checkpoint is {good}; go on from it with checkpoint.resume={good}." in error
    assert outcome.text.count("(10 in a row)") == 1
    goes_on(workshop, run, start, checkpoint__resume=good)


@starts(slow=(DEEPSPEED, TORCHRUN, FSDP, FSDP_SHARDED))
def test_a_rank_that_raises(workshop: Workshop, tmp_path: Path, start: Start) -> None:
    """Between steps, while the others wait in a reduction, and in a save."""
    run = tmp_path / "run"
    for what, rank, step, said, tracebacks in (
        ("unreadable file", 0, 3, "Input/output error", 0),
        ("bug", 1, 5, "KeyError: 'no such thing'", 1),
        ("full disk", 1, 7, "rank 1 failed: OSError: [Errno 28] No space left on device", 0),  # rank 0 says so
        ("out of memory", 1, 8, "out of memory", 0),
        ("out of memory", 0, 10, "out of memory", 0),
    ):
        outcome = workshop.launch(run, start, {"what": what, "rank": rank, "step": step})
        checkpoint = run / "checkpoints" / f"step_{step - step % 2}"
        error = ended_well(outcome, said, resume=checkpoint, tracebacks=tracebacks)
        assert error.startswith(f"error (rank {0 if what == 'full disk' else rank}): ")
    goes_on(workshop, run, start)


# ---------------------------------------------------------------- three ranks


@starts(slow=(DEEPSPEED, FSDP))
def test_of_three_ranks_the_one_that_differs_is_named(workshop: Workshop, tmp_path: Path, start: Start) -> None:
    """Two others agree: theirs is the right model."""
    run = tmp_path / "run"
    outcome = workshop.launch(run, start, {"what": "one bit", "rank": 2, "step": 4}, num_ranks=3)
    ended_well(outcome, "rank 2 from the others", resume=run / "checkpoints" / "step_4")


@pytest.mark.parametrize("rank", [0, 2])
@starts(slow=(DEEPSPEED, FSDP_SHARDED))
def test_of_three_ranks_one_is_killed_and_one_speaks(
    workshop: Workshop, tmp_path: Path, start: Start, rank: int
) -> None:
    run = tmp_path / "run"
    outcome = workshop.launch(run, start, {"what": "killed in a step", "rank": rank, "step": 4}, num_ranks=3)
    ended_well(outcome, f"rank {rank} vanished", resume=run / "checkpoints" / "step_4")
