"""The loop: batches in, steps out; evaluates, saves and reports at its intervals, and stops cleanly.

It sees an `Engine`, and nothing of ranks, shards or re-initializations but the reports that come back.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from loqt_ds.checkpoint import Checkpoint, save_checkpoint
from loqt_ds.config import Config
from loqt_ds.data import DataBundle
from loqt_ds.engines.base import Engine, StepReport
from loqt_ds.evaluation import Evaluation, evaluate, model_inputs, num_predicted, summed_loss
from loqt_ds.metrics import MetricsLogger

MAX_SKIPPED_IN_A_ROW = 10


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message names the last good checkpoint."""


class Interrupted(RuntimeError):
    """A signal asked the run to stop; it stopped after a step and saved. `signum` is the signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Trainer:
    """Runs `train.max_steps` optimizer steps.

    Args:
        config: the whole configuration.
        engine: takes the steps.
        data: batches, validation set.
        logger: metrics and progress.
        checkpoints: the directory of checkpoints.
        extra_metadata: JSON saved with each checkpoint (the model's configuration).
        directories: folders saved with each checkpoint (the tokenizer).
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: DataBundle,
        logger: MetricsLogger,
        *,
        checkpoints: Path,
        extra_metadata: dict[str, Any],
        directories: dict[str, Path],
    ) -> None:
        self._config, self._engine, self._data, self._logger = config, engine, data, logger
        self._checkpoints, self._extra, self._directories = checkpoints, extra_metadata, directories
        self._num_tokens = 0  # predicted tokens so far, over all ranks
        self._num_skipped, self._skipped_in_a_row = 0, 0
        self._last_checkpoint: Path | None = None
        self._proven_checkpoint: Path | None = None  # the last one after which a step succeeded
        self._save_is_due = False
        self._signal: int | None = None

    # ---------------------------------------------------------------- the run

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint: weights, factors, optimizer, data position, random state, counters."""
        self._engine.restore(checkpoint)
        self._data.train.load_state_dict(checkpoint.metadata["data"])
        self._num_tokens = int(checkpoint.metadata["num_tokens"])
        self._num_skipped = int(checkpoint.metadata["num_skipped"])
        self._skipped_in_a_row = int(checkpoint.metadata["skipped_in_a_row"])
        self._last_checkpoint = checkpoint.path

    def fit(self) -> Evaluation:
        """Trains to the last step; returns the final evaluation.

        Raises TrainingFailed after ten skipped steps in a row or if a checkpoint cannot be written, Interrupted after
        SIGTERM or SIGINT.
        """
        config = self._config
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        evaluated: Evaluation | None = None
        try:
            if self._last_checkpoint is None:
                self._save()
            self._window = _Window()
            while (step := self._engine.step_index) < config.train.max_steps:
                report, loss, num_tokens = self._train_step()
                done = step + 1
                self._record(report, loss, num_tokens)
                evaluated = None
                if config.eval.every and done % config.eval.every == 0:
                    evaluated = self._evaluate()
                self._stop_if_hopeless()
                self._save_is_due |= done % config.checkpoint.every == 0
                ending = self._signal is not None or done == config.train.max_steps
                # What a skipped step leaves may be a spoiled model: it must not push out the checkpoints before it.
                if ending or (self._save_is_due and not self._skipped_in_a_row):
                    self._save()
                if self._signal is not None and done < config.train.max_steps:
                    self._stop_for_signal()
            return evaluated or self._evaluate()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _train_step(self) -> tuple[StepReport, torch.Tensor, int]:
        """One optimizer step; returns its report, the summed loss, and the number of predicted tokens."""
        accumulation = self._config.train.gradient_accumulation_steps
        batches = [self._data.train.next_batch() for _ in range(accumulation)]
        num_tokens = max(1, sum(num_predicted(batch) for batch in batches))
        total = torch.zeros((), device=self._engine.device)
        report = None
        for batch in batches:
            inputs, targets = model_inputs(batch, self._engine.device)
            loss = summed_loss(self._engine(**inputs).logits, targets)
            # Every predicted token of the step weighs the same, however the micro-batches are filled; the engine
            # divides by the accumulation steps.
            self._engine.backward(loss * (accumulation / num_tokens))
            total += loss.detach()
            report = self._engine.step()
        assert report is not None
        return report, total, num_tokens

    # ---------------------------------------------------------------- reporting

    def _record(self, report: StepReport, loss: torch.Tensor, num_tokens: int) -> None:
        done = report.step + 1
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
                "loss": loss.item() / num_tokens,
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
        with self._window.paused():
            options = self._config.eval
            batches = self._data.validation.batches(
                options.micro_batch_size or self._config.train.micro_batch_size, options.max_tokens
            )
            result = evaluate(self._engine.network, batches, self._engine.device)
            step = self._engine.step_index
            self._logger.event("eval", {"step": step, **result.record()})
            self._logger.say(
                f"step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f} "
                f"({result.num_tokens:,} tokens)"
            )
        return result

    # ---------------------------------------------------------------- saving and stopping

    def _save(self) -> None:
        window = getattr(self, "_window", None) or _Window()
        with window.paused():
            self._logger.flush()
            step = self._engine.step_index
            metadata = self._extra | {
                "config": self._config.to_dict(),
                "engine_state": self._engine.saved_state(),
                "data": self._data.train.state_dict(),
                "num_tokens": self._num_tokens,
                "num_skipped": self._num_skipped,
                "skipped_in_a_row": self._skipped_in_a_row,
            }
            try:
                path = save_checkpoint(
                    self._checkpoints,
                    step,
                    tensors=self._engine.saved_tensors(),
                    metadata=metadata,
                    directories=self._directories,
                    keep=self._config.checkpoint.keep,
                )
            except (OSError, ValueError) as error:
                raise TrainingFailed(
                    f"the checkpoint of step {step} could not be written: {error}. {self.last_checkpoint()}"
                ) from error
            self._last_checkpoint, self._save_is_due = path, False
            self._logger.event("checkpoint", {"step": step, "path": str(path)})

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
            raise TrainingFailed(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a gradient that is not finite (up to step "
                f"{self._engine.step_index}); lower optim.lr or set train.max_grad_norm. {self._where_to_go_on(good)}"
            )

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        # The same signal twice means now, not after the step. (Ctrl-C under a launcher comes as SIGINT, and again as
        # SIGTERM from the launcher: that is one wish.)
        if signum == self._signal:
            raise Interrupted(signum, f"stopped at once by {signal.Signals(signum).name}. {self.last_checkpoint()}")
        self._signal = self._signal or signum

    def _stop_for_signal(self) -> None:
        assert self._signal is not None
        name = signal.Signals(self._signal).name
        raise Interrupted(
            self._signal, f"stopped by {name} after step {self._engine.step_index}. {self.last_checkpoint()}"
        )


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
    if summary["num_from_previous"] or summary["num_random"]:
        parts.append(
            f"{summary['num_from_previous']} columns of P from the old one, {summary['num_random']} random, "
            "for want of rank in the gradient"
        )
    return "; ".join(parts)
