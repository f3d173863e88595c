"""What a run says: `metrics.jsonl` for programs, TensorBoard for curves, a bar or plain lines for people.

`metrics.jsonl` holds one JSON object a line. A line without "event" is a training step; a line with it is what happened
at a step (reinit, eval, checkpoint, export, resume, ...). Every line is flushed as it is written, so that a killed run
loses at most the line it was writing; such a half line is cut off when the run goes on. JSON knows no NaN: a number
that is not finite is written as the string "nan", "inf" or "-inf", which a reader turns back with float().

A resumed run writes the event {"event": "resume", "step": N}. Steps after N that the stopped run had already logged
stay in the file before that line: what was measured is not erased, and the last line of a step is the valid one.
TensorBoard's are purged, or its curves would run twice.

Only the main rank writes. An OSError (a full disk, a directory that cannot be written) is raised with the path named.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

NUM_LINES = 30  # plain lines of a whole run, about

Progress = Literal["auto", "bar", "lines", "none"]


def json_value(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and numpy scalars as numbers, numbers that are not finite as text, paths
    too."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, float) and hasattr(value, "item"):
        return json_value(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    raise TypeError(f"{type(value).__name__} has no place in metrics.jsonl")


def format_duration(seconds: float) -> str:
    """`2d 03:04`, `1:02:03` or `02:03`; `?` where it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def _bar_size() -> dict[str, Any]:
    """Size of the bar for tqdm, which asks the terminal and takes an answer of 0 columns (containers, `script`) for an
    order to draw nothing."""
    try:
        told = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # not a terminal, or not a file
        told = None
    if told == 0:
        size = shutil.get_terminal_size()  # $COLUMNS, or 80
        return {"ncols": size.columns, "nrows": size.lines}
    return {"dynamic_ncols": True}


def repair_last_line(path: Path) -> int:
    """Cuts off a last line that a crash left half-written; returns the number of bytes removed.

    Only a line without its newline, or one that is not JSON at the very end, is touched; a complete JSON line that
    lacks just its newline is given one.
    """
    if not path.is_file():
        return 0
    content = path.read_bytes()
    body = content.rstrip(b"\n\x00")  # a power cut can leave zeros where data never reached the disk
    start = body.rfind(b"\n") + 1
    last = body[start:]
    whole = True
    if last:
        try:
            json.loads(last)
        except ValueError:
            whole = False
    kept = body + b"\n" if whole and body else body[:start]
    if kept != content:
        with path.open("r+b") as file:
            file.truncate(len(body) if whole else start)
            if whole and body:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
    return len(content) - len(kept)


def _scalars(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """(tag, value) of the numbers of a record; what is nested or text is for metrics.jsonl only."""
    for key, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield f"{prefix}/{key}", float(value)


class MetricsLogger:
    """Writes a run's metrics; on ranks other than the main one, and without a `run_dir`, it writes no files.

    Args:
        run_dir: directory of the run; None: show progress only.
        max_steps: steps of the whole run, for progress and the time left.
        every: steps between lines of metrics.jsonl; the first and the last step, and those whose loss or gradient is
        not
            finite, are always written.
        progress: "bar", "lines", "none", or "auto" (a bar on a terminal, lines elsewhere).
        is_main: whether this rank writes and shows anything.
        resumed_step: number of steps already done where a run goes on; None for a fresh run.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        *,
        max_steps: int,
        every: int = 1,
        tensorboard: bool = True,
        progress: Progress = "auto",
        is_main: bool = True,
        resumed_step: int | None = None,
    ) -> None:
        self.run_dir = Path(run_dir) if run_dir is not None and is_main else None
        self.max_steps, self.every, self.is_main = max_steps, every, is_main
        self._start, self._done = resumed_step or 0, resumed_step or 0
        self._started: float | None = None
        self._lines_every, self._next_line = -(-max_steps // NUM_LINES), 0  # rounded up
        self._file: IO[str] | None = None
        self._board: Any = None
        self._bar: tqdm[Any] | None = None
        self._lines = False
        if self.run_dir is not None:
            self._open(self.run_dir, tensorboard=tensorboard, resumed_step=resumed_step)
        if is_main:
            self._open_progress(progress)

    def _open(self, run_dir: Path, *, tensorboard: bool, resumed_step: int | None) -> None:
        self.path = run_dir / "metrics.jsonl"
        with self._named(self.path):
            run_dir.mkdir(parents=True, exist_ok=True)
            removed = repair_last_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the main rank needs it

            with self._named(run_dir / "tensorboard"):
                # events at and after purge_step, written before the stop, are hidden
                purge_step = None if resumed_step is None else resumed_step + 1
                self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)
        if resumed_step is not None:
            self._write({"event": "resume", "step": resumed_step} | ({"bytes_repaired": removed} if removed else {}))

    def _open_progress(self, progress: str) -> None:
        if progress == "auto":
            # `| tee log` leaves stderr on the terminal: a bar there would keep the progress out of the log
            progress = "bar" if sys.stderr.isatty() and sys.stdout.isatty() else "lines"
        self._lines = progress == "lines"
        if progress == "bar":
            self._bar = tqdm(
                total=self.max_steps,
                initial=self._start,
                desc="train",
                unit="step",
                **_bar_size(),
                # tqdm's own rate and time left; loss, lr and tokens/s are the postfix
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
            )

    @contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        """Errors of writing carry the path: those of write() and flush() do not know it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror or error}: metrics cannot be written", str(path)) from error

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(json_value(record), allow_nan=False) + "\n"
        with self._named(self.path):
            self._file.write(line)
            self._file.flush()

    def _plot(self, record: Mapping[str, Any], prefix: str, step: int) -> None:
        if self._board is not None:
            with self._named(self.path.parent / "tensorboard"):
                for tag, value in _scalars(record, prefix):
                    self._board.add_scalar(tag, value, step)

    def step(self, record: Mapping[str, Any]) -> None:
        """A finished training step: `step` (steps done, so the first is 1), `loss`, `lr`, `tokens`,
        `tokens_per_second`, `peak_memory_gib`, `grad_norm` and whatever else there is to record."""
        if not self.is_main:
            return
        step = int(record["step"])
        now = time.monotonic()
        first = self._started is None
        if first:  # counted from the first step's end: its compilation and first touch would spoil the time left
            self._started, self._start = now, step
        self._done = step
        # what went wrong is never thinned out
        sound = all(math.isfinite(float(record[key])) for key in ("loss", "grad_norm") if record.get(key) is not None)
        if first or step % self.every == 0 or step >= self.max_steps or not sound:
            self._write(record)
            self._plot(record, "train", step)
        self._show(record, step, now)

    def _show(self, record: Mapping[str, Any], step: int, now: float) -> None:
        shown = {"loss": "{:.4f}", "lr": "{:.2e}", "tokens_per_second": "{:,.0f}"}
        texts = {key: form.format(float(record[key])) for key, form in shown.items() if record.get(key) is not None}
        if self._bar is not None:
            parts = [f"loss {texts.get('loss', '-')}", f"lr {texts.get('lr', '-')}"]
            parts += [f"{texts.get('tokens_per_second', '-')} tok/s"]
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(self._done - self._bar.n)
        if self._lines and (step >= self._next_line or step >= self.max_steps):
            self._next_line = step - step % self._lines_every + self._lines_every
            pace = (now - (self._started or now)) / (step - self._start) if step > self._start else math.inf
            left = format_duration(pace * (self.max_steps - step)) if step < self.max_steps else "00:00"
            print(
                f"step {step}/{self.max_steps}  loss {texts.get('loss', '-')}  lr {texts.get('lr', '-')}  "
                f"{texts.get('tokens_per_second', '-')} tokens/s  {left} left",
                flush=True,
            )

    def event(self, kind: str, record: Mapping[str, Any] | None = None) -> None:
        """What happened at a step: a line {"event": kind, "step": ..., ...} and TensorBoard scalars `kind/...`.

        `step` is the record's, or that of the last step that was logged.
        """
        if not self.is_main:
            return
        record = dict(record or {})
        step = int(record.pop("step", self._done))
        self._write({"event": kind, "step": step, **record})
        self._plot(record, kind, step)

    def say(self, text: str) -> None:
        """Prints `text` above the bar, or as a line; nothing where progress is not shown on this rank."""
        if not self.is_main:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def flush(self) -> None:
        """Brings what was written to the disk (called before a checkpoint, so that no step it covers is lost)."""
        if self._file is not None:
            with self._named(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Ends the bar and closes the files; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None:
            file, self._file = self._file, None
            with self._named(self.path):
                file.close()
        if self._board is not None:
            board, self._board = self._board, None
            board.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
