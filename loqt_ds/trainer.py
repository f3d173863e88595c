"""The loop: batches in, steps out; evaluates, saves and reports at its intervals, and stops cleanly.

It sees an `Engine`, and nothing of shards or re-initializations but the reports that come back. Of ranks it sees that
there may be several: before each step they tell one another how many tokens they bring, whether they were asked to
stop, and whether they have no batch, so that all weigh tokens alike and all stop after the same step.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import torch

from loqt_ds.checkpoint import Checkpoint, delete_others, find_checkpoint, load_checkpoint, save_checkpoint
from loqt_ds.config import Config
from loqt_ds.data import DataBundle, StepBatches
from loqt_ds.engines.base import Engine, StepReport
from loqt_ds.evaluation import Evaluation, Evaluator, model_inputs, num_predicted, summed_loss
from loqt_ds.metrics import MetricsLogger
from loqt_ds.selection import Selection
from loqt_ds.stopping import REASONS, Interrupted, StopRequests, signal_of

MAX_SKIPPED_IN_A_ROW = 10
TICK_SECONDS = 20.0  # between two words on an evaluation that takes long


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message names the last good checkpoint."""


class Trainer:
    """Runs `config.num_steps` optimizer steps, or fewer where eval.patience says so.

    Args:
        config: the whole configuration, with epochs resolved to steps.
        engine: takes the steps.
        data: batches.
        evaluator: evaluates the engine's network.
        logger: metrics and progress.
        checkpoints: the directory of checkpoints; the best one's, with checkpoint.best, is `best` beside it. While
            training there may be two in it: the one that the newest checkpoint names, so that a run that goes on from
            there finds it, and a better one since.
        extra_metadata: JSON saved with each checkpoint (the model's configuration).
        directories: folders saved with each checkpoint (the tokenizer).
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: DataBundle,
        evaluator: Evaluator,
        logger: MetricsLogger,
        *,
        checkpoints: Path,
        extra_metadata: dict[str, Any],
        directories: dict[str, Path],
    ) -> None:
        self._config, self._engine, self._evaluator, self._logger = config, engine, evaluator, logger
        self._ranks = engine.ranks
        self._checkpoints, self._extra, self._directories = checkpoints, extra_metadata, directories
        self._best = checkpoints.parent / "best"
        asked = {name: getattr(config.eval, name) for name in ("max_tokens", "max_examples", "max_new_tokens")}
        self._selection = Selection(config.eval.metric, patience=config.eval.patience, question=asked)
        self._batches = StepBatches(
            data.train, num_micro_batches=config.train.gradient_accumulation_steps, device=engine.device
        )
        self.num_steps_taken = 0
        """Steps since this process began."""
        self._num_tokens = 0  # predicted tokens so far, over all ranks
        self._num_skipped, self._skipped_in_a_row = 0, 0
        self._last_checkpoint: Path | None = None
        self._proven_checkpoint: Path | None = None  # the last one after which a step succeeded
        self._saved_step: int | None = None
        self._named_best: int | None = None  # step of the best one, as the newest checkpoint knows it
        self._save_is_due = False

    # ---------------------------------------------------------------- the run

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint: weights, factors, optimizer, data position, random state, counters."""
        self._engine.restore(checkpoint)
        self._batches.load_state_dict(checkpoint.metadata["data"])
        self._num_tokens = int(checkpoint.metadata["num_tokens"])
        self._num_skipped = int(checkpoint.metadata["num_skipped"])
        self._skipped_in_a_row = int(checkpoint.metadata["skipped_in_a_row"])
        self._last_checkpoint = checkpoint.path
        if (selection := checkpoint.metadata.get("selection")) is not None:
            for change in self._selection.load_state_dict(selection):
                self._logger.say(f"{change}: the best evaluation is looked for from here on")
            if self._config.checkpoint.best:
                self._find_best()
            self._named_best = self._selection.best_step

    def fit(self) -> Evaluation:
        """Trains to the last step, or until eval.patience is over; returns the final evaluation, the same on all ranks.
        With checkpoint.best the model is then that of the best evaluation, and it is that one which is returned.

        Raises TrainingFailed after ten skipped steps in a row, if a checkpoint cannot be written, or if there is no
        batch for a step; Interrupted after SIGTERM or SIGINT; PeerFailed if another rank fails.
        """
        config, num_steps = self._config, self._config.num_steps
        every = config.eval.every
        assert not isinstance(every, str), "epochs are resolved to steps before"
        evaluated: Evaluation | None = None
        with StopRequests() as requests, closing(self._batches):
            self._window = _Window()
            if self._last_checkpoint is None:
                if every and config.model.path is not None:
                    self._evaluate()  # what training starts from
                self._save()
            while (step := self._engine.step_index) < num_steps and not self._selection.is_over:
                batches, num_tokens = self._begin_step(requests)
                report, loss = self._train_step(batches, num_tokens)
                done = step + 1
                self._record(report, loss, num_tokens)
                evaluated = None
                if every and done % every == 0:
                    evaluated = self._evaluate_and_select()
                self._stop_if_hopeless()
                self._save_is_due |= done % config.checkpoint.every == 0
                is_last = done == num_steps or self._selection.is_over
                # What a skipped step leaves may be a spoiled model: it must not push out the checkpoints before it.
                if is_last or (self._save_is_due and not self._skipped_in_a_row):
                    self._save()
            if evaluated is None:
                evaluated = self._evaluate_and_select()
            self._say_early_stop(num_steps)
            if config.checkpoint.best and self._selection.best is not None:
                self._keep_best({self._selection.best_step})
            return self._return_to_best(evaluated) if config.checkpoint.best else evaluated

    def _begin_step(self, requests: StopRequests) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The micro-batches of this rank, and the number of predicted tokens of all ranks.

        Raises on all ranks if one was asked to stop (the run is saved first) or has no batch.
        """
        position = self._batches.state_dict()
        batches: list[dict[str, torch.Tensor]] = []
        problem: Exception | None = None
        try:
            batches = self._batches.take(is_last=self._engine.step_index + 1 >= self._config.num_steps)
        except Exception as error:
            problem = self._no_batch(error)
        own_tokens = sum(num_predicted(batch) for batch in batches)
        reason = requests.reason
        num_tokens, num_problems, *asked = self._ranks.sum_numbers(
            own_tokens, int(problem is not None), *(int(reason == other) for other in REASONS)
        )
        if any(asked):
            self._stop(next(other for other, num in zip(REASONS, asked, strict=True) if num), position)
        if num_problems:
            self._ranks.agree(problem)
        return batches, max(1, num_tokens)

    def _no_batch(self, error: Exception) -> Exception:
        """A failure of the data as an error to show; what is a bug of the program's stays as it is."""
        if not isinstance(error, ValueError | OSError | StopIteration):
            return error
        reason = "the data ended" if isinstance(error, StopIteration) else str(error)
        failed = TrainingFailed(
            f"there is no batch for step {self._engine.step_index + 1}: {reason}. {self.last_checkpoint()}"
        )
        failed.__cause__ = error
        return failed

    def _train_step(self, batches: list[dict[str, torch.Tensor]], num_tokens: int) -> tuple[StepReport, HostNumber]:
        """One optimizer step; returns its report and the loss summed over the tokens of all ranks."""
        total = torch.zeros((), device=self._engine.device)
        loss_of_step, report = None, None
        # Every predicted token of the step weighs the same, however the micro-batches of all ranks are filled; the
        # engine divides by the accumulation steps and takes the mean over ranks.
        weight = len(batches) * self._ranks.world_size / num_tokens
        for batch in batches:
            inputs, targets = model_inputs(batch, self._engine.device)
            loss = summed_loss(self._engine, inputs, targets)
            self._engine.backward(loss * weight)
            total += loss.detach()
            if batch is batches[-1]:  # before the update, for which a reader of the loss then need not wait
                loss_of_step = HostNumber(self._ranks.all_reduce(total.double()))
            report = self._engine.step()
        assert report is not None and loss_of_step is not None
        return report, loss_of_step

    # ---------------------------------------------------------------- reporting

    def _record(self, report: StepReport, loss: HostNumber, num_tokens: int) -> None:
        done = report.step + 1
        self.num_steps_taken += 1
        self._num_tokens += num_tokens
        self._window.add(num_tokens)
        if not report.applied:
            self._num_skipped += 1
            self._skipped_in_a_row += 1
            self._logger.event(
                "skipped_step",
                {"step": done, "grad_norm": report.grad_norm, "in_a_row": self._skipped_in_a_row},
            )
            what = "parameters with such a gradient are" if self._config.optim.layerwise else "the step is"
            self._logger.say(
                f"step {done}: the gradient is not finite; {what} not updated ({self._skipped_in_a_row} in a row)"
            )
        else:
            self._skipped_in_a_row = 0
            self._proven_checkpoint = self._last_checkpoint
        self._logger.step(
            {
                "step": done,
                "loss": loss.read() / num_tokens,
                "lr": report.lr,
                "lr_full_rank": report.lr_full_rank,
                "tokens": self._num_tokens,
                "tokens_per_second": self._window.rate(),
                "peak_memory_gib": peak_memory_gib(self._engine.device),
                "grad_norm": report.grad_norm,
                "num_skipped": self._num_skipped,
            }
        )
        if report.reinit is not None:
            self._logger.event("reinit", {"step": done, **report.reinit.record()})
            self._logger.say(f"step {done}: {describe_reinit(report.reinit.summary())}")

    def _evaluate(self) -> Evaluation:
        with self._window.paused(), self._engine.evaluating(alone=self._evaluator.answers is not None):
            result = self._evaluator(self._engine.network, ranks=self._ranks, tick=ticker(self._logger.say))
            step = self._engine.step_index
            self._logger.event("eval", {"step": step, **result.record()})
            self._logger.say(f"step {step}: {result.describe()} ({result.num_tokens:,} {result.unit})")
        return result

    def _evaluate_and_select(self) -> Evaluation:
        """An evaluation among which the best is looked for; saves that, with checkpoint.best."""
        result = self._evaluate()
        if self._selection.add(result, self._engine.step_index) and self._config.checkpoint.best:
            self._save(root=self._best)
        return result

    # ---------------------------------------------------------------- the best model

    def _say_early_stop(self, num_steps: int) -> None:
        if not self._selection.is_over or self._engine.step_index >= num_steps:
            return
        step, since = self._engine.step_index, self._selection.num_since
        self._logger.event("early_stop", {"step": step, "evaluations_since_best": since})
        self._logger.say(
            f"stopped early after step {step} of {num_steps}: {since} evaluations in a row without a better "
            f"{self._selection.metric} (eval.patience); {self._selection.describe_best()}"
        )

    def _find_best(self) -> None:
        """Makes sure that the best checkpoint that the one gone on from speaks of is there. Collective.

        A longer run goes on from before the last evaluation of a shorter one, which may have been the best; and a run
        in another directory has left its best one behind. One of a later step than the run's is none of its models.
        """
        selection = self._selection
        known = None if selection.best_step is None else self._best / f"step_{selection.best_step}"

        def look() -> dict[str, Any] | None:
            if known is None or known.is_dir():
                return selection.state_dict()
            path = find_checkpoint(self._best, "auto", say=self._logger.say, option="checkpoint.best")
            found = None if path is None else load_checkpoint(path, verify=False)
            return None if found is None or found.step > self._engine.step_index else found.metadata["selection"]

        none = {"metric": selection.metric, "best": None, "best_step": None}
        state = self._ranks.on_main(look) or none
        if state["best_step"] != selection.best_step:
            for each in (none, state):  # the second has no effect where it is of another metric
                selection.load_state_dict(each | {"num_since": selection.num_since})
            there = "" if selection.best is None else f" ({selection.describe_best()})"
            self._logger.say(f"{known} is not there: the best checkpoint is looked for from here on{there}")

    def _keep_best(self, steps: set[int | None]) -> None:
        """Deletes all best checkpoints but those of `steps`. Collective."""
        try:
            self._ranks.on_main(lambda: delete_others(self._best, {f"step_{step}" for step in steps}))
        except (OSError, ValueError) as error:
            raise TrainingFailed(f"{error}. {self.last_checkpoint()}") from error

    def _return_to_best(self, evaluated: Evaluation) -> Evaluation:
        """Gives the engine back the model of the best evaluation; returns that evaluation. Collective."""
        selection = self._selection
        if selection.best is None or selection.best_step == self._engine.step_index:
            return evaluated
        path = self._best / f"step_{selection.best_step}"
        try:
            self._ranks.on_main(lambda: load_checkpoint(path).step)  # every byte of it, once
            checkpoint = self._ranks.attempt(lambda: load_checkpoint(path, verify=False))
            self._engine.restore(checkpoint)
        except (OSError, ValueError) as error:
            raise TrainingFailed(
                f"training is done, but the best checkpoint cannot be read back ({error}); export another one with "
                f"tools/export.py. {self.last_checkpoint()}"
            ) from error
        self._logger.event("best", {"step": selection.best_step, "path": str(path), **selection.best.record()})
        self._logger.say(f"back to the {selection.describe_best()} ({path})")
        return selection.best

    # ---------------------------------------------------------------- saving and stopping

    def _save(self, position: dict[str, Any] | None = None, *, root: Path | None = None) -> None:
        """Writes a checkpoint; `position` is that of the data, where batches after it have been taken already. With
        `root` it is the best one, and not one to go on from."""
        with self._window.paused():
            self._logger.flush()
            step = self._engine.step_index
            metadata = self._extra | {
                "config": self._config.to_dict(),
                "engine_state": self._engine.saved_state(),
                "data": self._batches.state_dict() if position is None else position,
                "world_size": self._ranks.world_size,
                "num_tokens": self._num_tokens,
                "num_skipped": self._num_skipped,
                "skipped_in_a_row": self._skipped_in_a_row,
                "selection": self._selection.state_dict(),
            }
            try:
                path = save_checkpoint(
                    root or self._checkpoints,
                    step,
                    tensors=self._engine.saved_tensors(),
                    metadata=metadata,
                    directories=self._directories,
                    keep=self._config.checkpoint.keep if root is None else 0,
                    ranks=self._ranks,
                )
            except (OSError, ValueError) as error:
                raise TrainingFailed(
                    f"the checkpoint of step {step} could not be written: {error}. {self.last_checkpoint()}"
                ) from error
            if root is None:
                self._last_checkpoint, self._saved_step, self._save_is_due = path, step, False
                self._named_best = self._selection.best_step
            else:
                self._keep_best({step, self._named_best})
            self._logger.event("checkpoint" if root is None else "best_checkpoint", {"step": step, "path": str(path)})

    def last_checkpoint(self) -> str:
        """A sentence on where to go on from."""
        return self._where_to_go_on(self._last_checkpoint)

    def _where_to_go_on(self, path: Path | None) -> str:
        if path is None:
            return "There is no checkpoint before it."
        is_newest = path == self._last_checkpoint and path.parent == self._checkpoints
        resume = "auto" if is_newest else path
        return f"The last good checkpoint is {path}; go on from it with checkpoint.resume={resume}."

    def _stop_if_hopeless(self) -> None:
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            # The newest one may hold what the last update before the bad steps has spoiled.
            proven = self._proven_checkpoint
            good = proven if proven is not None and proven.is_dir() else self._last_checkpoint
            layerwise = self._config.optim.layerwise
            clipping = "train.max_grad_norm_per_parameter" if layerwise else "train.max_grad_norm"
            raise TrainingFailed(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite (up to step "
                f"{self._engine.step_index}); lower optim.lr or set {clipping}. {self._where_to_go_on(good)}"
            )

    def _stop(self, reason: str, position: dict[str, Any]) -> NoReturn:
        """Saves, unless that has just been done, and ends the run on all ranks."""
        if self._saved_step != self._engine.step_index:
            self._save(position)
        message = f"stopped by {reason} after step {self._engine.step_index}. {self.last_checkpoint()}"
        raise Interrupted(signal_of(reason), message, everywhere=True)


class _Window:
    """Tokens per second since the last reading, without the time spent evaluating or saving."""

    def __init__(self) -> None:
        self._tokens, self._started = 0, time.perf_counter()

    def add(self, num_tokens: int) -> None:
        self._tokens += num_tokens

    def rate(self) -> float:
        """Tokens per second; starts a new window."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._started, 1e-9)
        self._tokens, self._started = 0, now
        return rate

    def paused(self) -> _Pause:
        return _Pause(self)


class _Pause:
    def __init__(self, window: _Window) -> None:
        self._window = window

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._window._started += time.perf_counter() - self._began


class HostNumber:
    """A number on its way from the device to the host.

    Reading it waits for what was queued before it was made, not for what came after, as `Tensor.item` would.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def ticker(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Says now and then how far an evaluation is that takes long: (answered, of how many)."""
    said = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal said
        if done < total and time.monotonic() - said > TICK_SECONDS:
            said = time.monotonic()
            say(f"evaluating: {done} of {total} prompts are answered")

    return tick


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the run so far, GiB: allocated on a CUDA device, resident set size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def describe_reinit(summary: dict[str, Any]) -> str:
    """One line about a re-initialization."""

    def number(value: float | None, text: str) -> str:
        return "n/a" if value is None or math.isnan(value) else format(value, text)

    parts = [
        f"re-initialized {summary['num_layers']} layers in {summary['seconds']:.1f} s",
        f"P captures {number(summary['captured_energy'], '.1%')} of the gradient's energy",
        f"quantization error {number(summary['error_before'], '.4f')} → {number(summary['error_after'], '.4f')}",
    ]
    if summary["num_kept"]:
        parts.append(f"{summary['num_kept']} layers kept their P")
    if summary["num_started_at_random"]:
        parts.append(f"{summary['num_started_at_random']} layers without a gradient start from a random P")
    if summary["num_from_previous"] or summary["num_random"]:
        parts.append(
            f"{summary['num_from_previous']} columns of P from the old one, {summary['num_random']} random, "
            "for want of rank in the gradient"
        )
    return "; ".join(parts)
