"""Every method side by side: the same data in the same order, one evaluator, one report.

    python tools/compare.py --suite small                     # all methods, 2M parameters; within an hour on two cores
    python tools/compare.py --suite full --data c4=c4/*.jsonl.gz --data wiki=train.jsonl.gz:valid.jsonl.gz
    python tools/compare.py --suite ablation                  # the paper's two ideas, where 4 bits cost something
    python tools/compare.py --suite gpu --minutes 8           # 60M and 130M, bf16, on CUDA; again until done
    python tools/compare.py --suite small --methods adamw loqt:32 loqt:32+loqt.alpha=1 --seeds 3

A suite (`tools/compare_suites.py`) says which methods, shapes, learning rates and ablations; --data says on what. One's
own files are NAME=TRAIN[,TRAIN...][:VALIDATION]; without --data it is what the product trains on without data, Python's
own source. Every run is a process of its own (`tools/compare_run.py`), --jobs of them at a time, each with the cores
divided by --jobs as its threads.

A run is a directory in --work, named after what it is told (`compare_suites.key` says what that leaves out: code and
packages, for example). A run that is over, also one that diverged or failed, is not repeated (--again repeats those
that failed): the same command goes on where it was stopped, and other commands find the runs that they share. REPORT.md
and results.json and plots go to --output; --report writes these alone, --list says which runs there are. With --steps,
the intervals between re-initializations and evaluations stay in proportion.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import compare_report
import torch
from compare_run import STATUS, Spec, open_data, write_whole
from compare_suites import SUITES, Plan, Result, Row, Suite, check_all, data_sets, key, settled, without_package

from loqt_ds.config import describe_model, load_config
from loqt_ds.stopping import Terminated, sigterm_raises
from loqt_ds.train import set_environment

REPOSITORY = Path(__file__).resolve().parents[1]
ONE_RUN = Path(__file__).resolve().with_name("compare_run.py")
POLL_SECONDS = 0.25
LINE_SECONDS = 60.0  # between lines of progress where there is no terminal
LEAST_SECONDS = 40.0  # before the end of --minutes in which no run is started
LEAST_MINUTES = 2.0  # of --minutes: these, what runs pause in, and a start
PAUSE_SECONDS = 25.0  # before the end of --minutes at which runs pause
LATE_SECONDS = 20.0  # after the end of --minutes at which those that have not are ended
END_SECONDS = 90.0  # that runs have to pause in when this command is interrupted: they do so before their next step


# ---------------------------------------------------------------- results


def directory_of(work: Path, spec: Spec) -> Path:
    return work / "runs" / key(spec)


def read_result(work: Path, spec: Spec) -> Result | None:
    """What a run came to, without its losses; None where it is not over.

    Raises ValueError where the directory holds a run of another description; data may lie elsewhere today.
    """
    file = directory_of(work, spec) / "result.json"
    if not file.is_file():
        return None
    result: Result = json.loads(file.read_text())
    found = Spec.from_json(json.dumps(result["spec"]))
    if replace(found, data=spec.data, also=spec.also, start=spec.start, shape=spec.shape) != spec:
        raise ValueError(f"{file} is of another run, {found.method}; remove it, or give another --work")
    result["num_steps"] = len(result.pop("losses", []))
    return settled(result)


def read_results(work: Path, rows: Sequence[Row]) -> dict[str, Result]:
    """By the names of runs, those of the rows that are over."""
    specs = {row.key: row.spec for row in rows if row.spec is not None}
    found = {name: read_result(work, spec) for name, spec in specs.items()}
    return {name: result for name, result in found.items() if name is not None and result is not None}


def known_results(work: Path, plan: Plan) -> dict[str, Result]:
    """All results of a plan: those of a search make more of its runs known."""
    results: dict[str, Result] = {}
    while True:
        found = read_results(work, plan.rows(results))
        if found.keys() == results.keys():
            return found
        results = found


# ---------------------------------------------------------------- progress


class Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        self._clear()
        print(text, file=self._stream, flush=True)

    def show(self, num_done: int, num_runs: int, current: Sequence[str], seconds_left: float | None) -> None:
        """How far it is; on a terminal each time, elsewhere once a minute."""
        if not self._is_terminal and time.monotonic() - self._last < LINE_SECONDS:
            return
        self._last = time.monotonic()
        left = "" if seconds_left is None else f", about {duration(seconds_left)} left"
        text = f"{num_done}/{num_runs} runs{left} | {'; '.join(current)}"
        if self._is_terminal:
            width = 20
            filled = width * num_done // max(num_runs, 1)
            columns = os.get_terminal_size(self._stream.fileno()).columns
            self._clear()
            self._stream.write(f"[{'#' * filled}{'.' * (width - filled)}] {text}"[: columns - 1])
            self._stream.flush()
        else:
            print(text, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._is_terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def close(self) -> None:
        self._clear()


def duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def outcome(result: Result) -> str:
    """What a run came to, in a line."""
    if result["status"] == "done":
        final = result["final"]
        return f"perplexity {final['perplexity']:.2f} on {final['num_tokens']:,} tokens, {result['seconds']:.0f} s"
    if result["status"] == "diverged":
        return f"diverged at step {result['num_steps']}"
    return f"failed: {result['error']}"


# ---------------------------------------------------------------- processes


def dies_with(parent: int) -> None:
    """Called in a process that was just forked: it is asked to end when its parent does, however that ends (Linux)."""
    assert LIBC is not None
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class Child:
    """A run that is going on."""

    row: Row
    directory: Path
    process: subprocess.Popen[bytes]
    must_end: float | None  # time.monotonic() by which it has paused, or is ended

    def progress(self) -> dict[str, Any]:
        """Its last progress.json; empty where there is none yet."""
        try:
            return dict(json.loads((self.directory / "progress.json").read_text()))
        except (OSError, ValueError):
            return {}

    def describe(self) -> str:
        now = self.progress()
        at = f"step {now['step']}/{now['steps']} loss {now['loss']:.3f}" if now else "starting"
        return f"{describe(self.row)} {at}"

    def kill(self) -> None:
        """Ends it, and what it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def pause(children: Sequence[Child], say: Callable[[str], None]) -> None:
    """Asks runs to pause; those that have not after a while, or when this is interrupted, are ended."""
    going = [child for child in children if child.process.poll() is None]
    if not going:
        return
    say("waiting for runs to pause; interrupt again to end them where they are")
    for child in going:
        child.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    try:
        for child in going:
            child.process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for child in going:
            child.kill()


def describe(row: Row) -> str:
    factor = "" if row.part != "search" else f" x {row.factor:g}"
    label = f"{row.group}: {row.label}" if row.group else row.label
    return f"{label}{factor} ({row.data}, seed {row.seed})"


def cause_of_death(code: int, log: Path) -> str:
    """What is known of a process that left no result."""
    if code < 0:
        name = signal.Signals(-code).name
        told = f"the process was ended by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    else:
        told = f"the process ended with exit code {code}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return told + (f"; its last line: {lines[-1][:300]}" if lines else "")


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Runner:
    """Starts the runs of a plan, several at a time.

    Args:
        lock: the descriptor of the lock on `work`. Runs hold it too: what outlives this process is still at work.
        until: (`time.monotonic`) when this call is to be over; None: when all runs are.
    """

    def __init__(self, plan: Plan, work: Path, *, lock: int, until: float | None, progress: Progress) -> None:
        self.plan, self.work, self.until, self.progress = plan, work, until, progress
        self.jobs, self._lock = plan.suite.jobs, lock
        self.results = known_results(work, plan)
        self._rows = plan.rows(self.results)
        self._children: dict[str, Child] = {}
        self._paused: set[str] = set()

    def run(self) -> bool:
        """Whether all runs are over. Ends its processes when it is interrupted."""
        num_over, has_time = len(self.results), self._has_time
        try:
            while self._tick():
                time.sleep(POLL_SECONDS)
        finally:
            pause(list(self._children.values()), self.progress.say)
            self.progress.close()
        is_done = all(row.key in self.results for row in self._rows)
        if not (is_done or has_time or len(self.results) > num_over):
            self.progress.say(
                "the minutes were over when the data was ready, which it now is: the same command goes on"
            )
        return is_done

    def _tick(self) -> bool:
        """Looks after what is going on, and starts what can be; whether anything is."""
        for name, child in list(self._children.items()):
            if child.process.poll() is not None:
                del self._children[name]
                self._note(name, child)
            elif child.must_end is not None and time.monotonic() > child.must_end:
                child.kill()
        for row in self._rows:
            if len(self._children) >= self.jobs or not self._has_time:
                break
            known = (*self.results, *self._children, *self._paused)
            if row.key is not None and row.key not in known:
                self._children[row.key] = self._start(row)
        self._show()
        return bool(self._children)

    @property
    def _has_time(self) -> bool:
        return self.until is None or time.monotonic() + LEAST_SECONDS < self.until

    def _start(self, row: Row) -> Child:
        assert row.spec is not None
        directory = directory_of(self.work, row.spec)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "progress.json").unlink(missing_ok=True)
        (directory / "spec.json").write_text(row.spec.to_json())
        command = [sys.executable, str(ONE_RUN), str(directory / "spec.json"), str(directory)]
        if self.until is not None:
            command.append(str(max(1.0, self.until - time.monotonic() - PAUSE_SECONDS)))
        parent = os.getpid()
        with (directory / "log").open("a") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": str(max(1, num_cores() // self.jobs))},
                pass_fds=(self._lock,),
                start_new_session=True,  # a Ctrl-C is for this process, which then ends the others
                preexec_fn=None if LIBC is None else lambda: dies_with(parent),
            )
        must_end = None if self.until is None else self.until + LATE_SECONDS
        return Child(row, directory, process, must_end)

    def _note(self, name: str, child: Child) -> None:
        """Reads what a process that is over has left."""
        assert child.row.spec is not None
        code = child.process.returncode
        result = read_result(self.work, child.row.spec)
        is_late = child.must_end is not None and time.monotonic() > child.must_end
        if result is None and (code == STATUS["paused"] or is_late):
            self._paused.add(name)
            told = "paused" if code == STATUS["paused"] else "ended before it could pause, and keeps what it had saved"
            self.progress.say(f"{describe(child.row)}: {told}; the same command goes on")
            return
        if result is None:
            error = cause_of_death(code, child.directory / "log")
            content = {"spec": json.loads(child.row.spec.to_json()), "status": "failed", "error": error}
            write_whole(child.directory / "result.json", content)
            result = read_result(self.work, child.row.spec)
        assert result is not None
        # Not this result alone: what a search comes to may have been run already, after a smaller search.
        self.results = known_results(self.work, self.plan)
        self._rows = self.plan.rows(self.results)
        self.progress.say(f"{describe(child.row)}: {outcome(result)}")

    # ---------------------------------------------------------------- how far it is

    def _show(self) -> None:
        runs = self.plan.runs(self._rows)
        current = [child.describe() for child in self._children.values()]
        self.progress.show(len(runs & self.results.keys()), len(runs), current, self._seconds_left())

    def _seconds_left(self) -> float | None:
        """By the mean seconds of a step of the same shape; None before anything is known of one."""
        measured: dict[str, list[float]] = {}
        for result in self.results.values():
            if result["status"] == "done":
                measured.setdefault(result["spec"]["shape"], []).append(result["seconds"] / result["spec"]["steps"])
        steps_taken = {}
        for name, child in self._children.items():
            if (now := child.progress()) and now["step"] > 1:
                measured.setdefault(child.row.shape, []).append(now["seconds"] / now["step"])
                steps_taken[name] = now["step"]
        if not measured:
            return None
        everywhere = [value for values in measured.values() for value in values]
        left = {name: row for row in self._rows if (name := self.plan.run_of(row)) not in self.results}
        total = 0.0
        for name, row in left.items():
            steps = self.plan.suite.steps if row.spec is None else row.spec.steps
            of_step = measured.get(row.shape, everywhere)
            total += sum(of_step) / len(of_step) * (steps - steps_taken.get(name, 0))
        return total / self.jobs


# ---------------------------------------------------------------- the command


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """The descriptor of a lock. Raises ValueError where another command, or a run that one left, has it."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = "another compare.py, or a run that it has left behind, is at work there; wait, or give another"
            raise ValueError(f"--work {work}: {told}") from None
        yield handle.fileno()


def refuse_unused(options: argparse.Namespace) -> None:
    """Raises ValueError for options that would do nothing beside others."""
    only = next((name for name in ("list", "report") if getattr(options, name)), None)
    # how many runs there were at a time is told in a report
    unused = {"list": ("report", "again", "minutes", "jobs"), "report": ("again", "minutes"), None: ()}[only]
    for name in unused:
        if getattr(options, name):
            raise ValueError(f"--{name} does nothing beside --{only}; leave one of them out")


def chosen_suite(options: argparse.Namespace) -> Suite:
    """The suite with what the command line says otherwise. Raises ValueError for what makes no sense."""
    suite = SUITES[options.suite]
    for name in ("seeds", "steps", "jobs", "minutes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value}: give a positive number")
    if options.minutes is not None and options.minutes < LEAST_MINUTES:
        raise ValueError(
            f"--minutes {options.minutes:g}: runs need time to start and to pause; give at least {LEAST_MINUTES:g}"
        )
    refuse_unused(options)
    spec = dict(suite.spec)
    if options.steps is not None:
        for name in ("interval", "eval_every"):
            spec[name] = max(1, round(spec[name] * options.steps / suite.steps))
        spec["steps"] = options.steps
    suite = replace(suite, spec=spec, seeds=options.seeds or suite.seeds, jobs=options.jobs or suite.jobs)
    if options.methods is not None:
        twice = sorted({name for name in options.methods if options.methods.count(name) > 1})
        if twice:
            raise ValueError(f"--methods: {twice[0]} is given twice")
        suite = replace(suite, methods=tuple(options.methods), variants=(), memory=())
    if options.shape is not None:
        shape = str(Path(options.shape).resolve()) if Path(options.shape).is_file() else options.shape
        suite = replace(suite, scales=((shape, suite.scales[0][1]),))
    for shape, _ in suite.scales:
        describe_model(load_config(None, [f"model.shape={shape}", "data.sequence_length=2"]))
    only_looks = options.report or options.list
    if suite.spec.get("device") == "cuda" and not only_looks and not torch.cuda.is_available():
        raise ValueError(f"--suite {suite.name} needs a CUDA device and torch sees none; --suite small needs none")
    return suite


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--suite", choices=list(SUITES), required=True, help="what is compared")
    made.add_argument(
        "--data",
        action="append",
        metavar="NAME=TRAIN[,TRAIN...][:VALIDATION]",
        help="a data set: files, globs or directories; again for more (default: stdlib, Python's own source)",
    )
    made.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD[:RANK][+OPTION=VALUE...]",
        help="instead of all that the suite has: its methods, its variants of LoQT and its components of memory",
    )
    made.add_argument(
        "--shape",
        help="instead of the suite's one or several: a name in configs/models, or a file; the ranks of the suite's own "
        "methods stay those of its first shape",
    )
    made.add_argument("--seeds", type=int, help="how many, from 0 on")
    made.add_argument("--steps", type=int, help="of every run")
    made.add_argument("--jobs", type=int, help="runs at a time (default: 2; gpu: 1)")
    made.add_argument("--minutes", type=float, help=f"of this call, at least {LEAST_MINUTES:g}: runs pause then")
    made.add_argument("--work", type=Path, default=Path("runs/compare"), help="where runs go (default: runs/compare)")
    made.add_argument("--output", type=Path, help="of the report (default: benchmarks/results/compare_SUITE)")
    made.add_argument("--again", action="store_true", help="repeat runs that failed")
    made.add_argument("--report", action="store_true", help="run nothing, report what there is")
    made.add_argument("--list", action="store_true", help="run nothing, list the runs")
    return made


def prepare(plan: Plan, say: Callable[[str], None]) -> None:
    """Tokenizes every data set, so that no run does it beside one that is timed. Raises ValueError for data that the
    runs could not use; what is too small for the components of memory, whose vocabulary is larger, ends nothing else.
    """
    suite = plan.suite
    specs = [
        Spec("adamw", (*data.options, f"data.tokenizer_vocab_size={suite.vocabulary}"),
             **{"lr": 0.0, "lr_full_rank": 0.0, **suite.spec, "shape": suite.scales[0][0]})
        for data in plan.data.values()
    ]  # fmt: skip
    of_memory = [row.spec for row in plan.rows({}) if row.part == "memory" and row.spec is not None]
    for spec in specs:
        open_data(spec)
    for spec in of_memory[:1]:  # all are on the same data
        try:
            open_data(spec)
        except ValueError as error:
            say(f"the components of memory will be shown as failed: {error}")


def tell_missing(plan: Plan, results: Mapping[str, Result], say: Callable[[str], None]) -> None:
    """Says which of the runs that there are to come will fail for want of a package."""
    rows = [row for row in plan.rows(results) if row.key is None or row.key not in results]
    lacking: dict[str, list[str]] = {}
    for contender in dict.fromkeys(row.contender for row in rows):
        if (package := without_package(contender)) is not None:
            lacking.setdefault(package, []).append(contender)
    for package, contenders in lacking.items():
        say(
            f"{package} is not installed: {', '.join(contenders)} will be shown as failed; to have them, "
            "pip install -e '.[compare]' now, or later and then --again"
        )


def forget_failed(work: Path, plan: Plan) -> None:
    for row in plan.rows(known_results(work, plan)):
        if row.spec is not None and (result := read_result(work, row.spec)) and result["status"] == "failed":
            (directory_of(work, row.spec) / "result.json").unlink()


def show_list(plan: Plan, results: Mapping[str, Result]) -> None:
    rows = plan.rows(results)
    for row in rows:
        if row.spec is None:
            print(f"{row.part}: {describe(row)}: waits for the search of the learning rate")
            continue
        result = results.get(key(row.spec))
        told = "not run" if result is None else outcome(result)
        print(f"{row.part}: {describe(row)}: rates {row.spec.lr:g}, {row.spec.lr_full_rank:g}: {told}")
    runs = plan.runs(rows)
    print(f"{len(runs)} runs, {len(runs & results.keys())} of them over")


def run_all(options: argparse.Namespace, plan: Plan, started: float) -> tuple[bool, int]:
    """(whether all runs are over, signal that ended it or 0)."""
    until = None if options.minutes is None else started + 60 * options.minutes
    progress = Progress(sys.stdout)
    with locked(options.work) as lock, sigterm_raises():
        try:
            if options.again:
                forget_failed(options.work, plan)
            tell_missing(plan, known_results(options.work, plan), progress.say)
            prepare(plan, progress.say)
            return Runner(plan, options.work, lock=lock, until=until, progress=progress).run(), 0
        except KeyboardInterrupt as stopped:
            print("stopped; the same command goes on", flush=True)
            return False, signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when all runs are over, 1 when some are not, 2 for a mistake in the command line."""
    set_environment()  # before the processes start
    started = time.monotonic()
    options = parser().parse_args(arguments)
    options.work = options.work.resolve()
    try:
        suite = chosen_suite(options)
        plan = Plan(suite, data_sets(options.data or [], suite))
        check_all(suite)
        results = known_results(options.work, plan)
        if options.list:
            show_list(plan, results)
            return 0
        is_done, signum = run_all(options, plan, started) if not options.report else (True, 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = known_results(options.work, plan)
    output = options.output or REPOSITORY / f"benchmarks/results/compare_{suite.name}"
    if results:
        said = sys.argv[1:] if arguments is None else arguments
        compare_report.write(plan, results, output, command=said)
        print(output / "REPORT.md")
    else:
        print("no run is over yet: there is no report", file=sys.stderr)
    is_done &= all(row.key in results for row in plan.rows(results))
    return 128 + signum if signum else int(not is_done)


if __name__ == "__main__":
    sys.exit(main())
