"""tools/compare.py: what its command line refuses, and how it starts, ends and repeats runs; instead of training, a run
is a small script that does what the test says."""

from __future__ import annotations

import fcntl
import importlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

TOOLS = ("fit", "candidates", "rivals", "compare_run", "compare_suites", "compare_lines", "compare_variants")
TOOLS += ("compare_report", "compare_plots", "compare")

# Does what DO, a JSON file, says of its method: a result's status, or how the process ends. Notes that it was started.
SCRIPT = """
import json, os, pathlib, signal, sys, time
spec, directory = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
with open(os.environ["STARTED"], "a") as log:
    log.write(f"{spec['method']} {spec['seed']} {os.environ['OMP_NUM_THREADS']} {sys.argv[3:]}\\n")
what = json.loads(pathlib.Path(os.environ["DO"]).read_text()).get(spec["method"], "done")
if what == "killed":
    print("a last word", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "exits":
    sys.exit("no such thing")
elif what == "waits":
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    (directory / "progress.json").write_text(json.dumps({"step": 3, "steps": 9, "seconds": 1.0, "loss": 5.0}))
    while not stop:
        time.sleep(0.02)
    sys.exit(75)
else:
    content = {"spec": spec, "status": what, "losses": [9.0, 8.0], "seconds": 2.0}
    if what == "done":
        content["final"] = {"loss": spec["lr"], "perplexity": 2.0, "num_tokens": 10}
    if what == "failed":
        content["error"] = "it said so"
    (directory / "result.json").write_text(json.dumps(content))
"""


@pytest.fixture(scope="module")
def compare(repository: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("compare")
    sys.path.remove(str(repository / "tools"))
    for name in [*TOOLS, *(name for name in sys.modules if name.startswith(("rivals_", "candidates_")))]:
        sys.modules.pop(name, None)


class Bench:
    """A plan, a work directory, and scripts in the place of runs."""

    def __init__(self, compare: Any, folder: Path, methods: tuple[str, ...], **changes: Any) -> None:
        self.compare, self.work, self.started = compare, folder / "work", folder / "started"
        self._do = folder / "do.json"
        suites = sys.modules["compare_suites"]
        suite = replace(suites.SUITES["small"], methods=methods, **changes)
        self.plan = suites.Plan(suite, [suites.DataSet("one")])
        self.says = io.StringIO()
        os.environ |= {"DO": str(self._do), "STARTED": str(self.started)}

    def run(self, until: float | None = None, **do: str) -> bool:
        self._do.write_text(json.dumps(do))
        self.started.write_text("")
        with self.compare.locked(self.work) as lock:
            progress = self.compare.Progress(self.says)
            self.runner = self.compare.Runner(self.plan, self.work, lock=lock, until=until, progress=progress)
            return bool(self.runner.run())

    @property
    def starts(self) -> list[list[str]]:
        return [line.split() for line in self.started.read_text().splitlines()]

    @property
    def statuses(self) -> dict[str, str]:
        results = self.compare.known_results(self.work, self.plan)
        return {row.contender: results[row.key]["status"] for row in self.plan.rows(results) if row.key in results}


@pytest.fixture
def bench(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    script = tmp_path / "one_run.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(compare, "ONE_RUN", script)
    monkeypatch.setattr(compare, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("DO", "")  # set by each bench, and what they were before afterwards
    monkeypatch.setenv("STARTED", "")
    return lambda *methods, **changes: Bench(compare, tmp_path, methods, **changes)


METHODS = ("adamw", "galore:8", "apollo:8", "lora:8", "adamw8bit")
ENDS = {"galore:8": "diverged", "apollo:8": "failed", "lora:8": "killed", "adamw8bit": "exits"}


def test_every_run_ends_somehow_and_none_is_repeated(bench: Any) -> None:
    made = bench(*METHODS)
    assert made.run(**ENDS)
    assert [start[0] for start in made.starts] == sorted((s[0] for s in made.starts), key=METHODS.index)
    assert made.statuses == {"adamw": "done", "galore:8": "diverged"} | dict.fromkeys(METHODS[2:], "failed")
    results = {result["spec"]["method"]: result for result in made.runner.results.values()}
    assert results["lora:8"]["error"] == (
        "the process was ended by SIGKILL, often for want of memory; its last line: a last word"
    )
    assert results["adamw8bit"]["error"] == "the process ended with exit code 1; its last line: no such thing"
    assert results["adamw"]["num_steps"] == 2 and "losses" not in results["adamw"]
    said = made.says.getvalue()
    assert "galore:8 (one, seed 0): diverged at step 2" in said and "failed: it said so" in said
    assert made.run(**ENDS) and made.starts == []


def test_what_failed_is_repeated_when_asked(compare: Any, bench: Any) -> None:
    made = bench(*METHODS)
    made.run(**ENDS)
    compare.forget_failed(made.work, made.plan)
    assert made.statuses == {"adamw": "done", "galore:8": "diverged"}
    assert made.run() and {start[0] for start in made.starts} == set(METHODS[2:])
    assert set(made.statuses.values()) == {"done", "diverged"}


def test_runs_have_the_cores_between_them(compare: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "num_cores", lambda: 7)
    made = bench("adamw", "adamw8bit", "lora:8", jobs=3)
    assert made.run() and [start[2] for start in made.starts] == ["2"] * 3
    assert [start[3] for start in made.starts] == ["[]"] * 3  # no time to pause at
    more = bench("qlora:8", jobs=9)
    assert more.run() and more.starts[0][2] == "1"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: pytest-xdist's workers ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_comparison_goes_on(compare: Any, bench: Any, interruptible: None) -> None:
    made = bench("adamw", "lora:8", "qlora:8", "adamw8bit")

    def interrupt() -> None:
        while "lora:8" not in made.started.read_text() or "qlora:8" not in made.started.read_text():
            time.sleep(0.02)
        while len(list(made.work.glob("runs/*/progress.json"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    made.started.write_text("")
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        made.run(**{"lora:8": "waits", "qlora:8": "waits"})
    thread.join()
    assert made.statuses == {"adamw": "done"} and "waiting for runs to pause" in made.says.getvalue()
    assert made.run() and [start[0] for start in made.starts] == ["lora:8", "qlora:8", "adamw8bit"]
    assert set(made.statuses.values()) == {"done"}


def test_a_run_that_does_not_pause_in_time_is_ended(compare: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # started in time, and told when to pause; this one goes on waiting
    monkeypatch.setattr(compare, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(compare, "LATE_SECONDS", 0.3)
    made = bench("adamw", "lora:8", jobs=1)
    assert not made.run(time.monotonic() + 0.4, adamw="waits")
    assert made.starts[0][0] == "adamw" and float(made.starts[0][3].strip("[]'")) == 1.0
    assert made.statuses == {} and "ended before it could pause, and keeps what it had saved" in made.says.getvalue()
    assert len(made.starts) == 1  # the time is over
    assert made.run()


def test_nothing_is_started_at_the_end_of_the_minutes(bench: Any) -> None:
    made = bench("adamw")
    assert not made.run(time.monotonic() + 5) and made.starts == []
    assert "the minutes were over when the data was ready" in made.says.getvalue()
    assert made.run() and made.says.getvalue().count("the minutes were over") == 1


def test_a_search_decides_what_comes_next(bench: Any) -> None:
    # the script's loss is its learning rate: the smallest wins
    made = bench("adamw", search=(1.0, 0.5, 2.0), seeds=2)
    assert made.run()
    specs = [row.spec for row in made.plan.rows(made.runner.results) if row.part == "method"]
    lr = sys.modules["compare_suites"].rates("adamw", "llama_2m")[0]
    assert [spec.lr for spec in specs] == pytest.approx([0.5 * lr] * 2) and len(made.starts) == 4


def test_a_larger_search_repeats_nothing(bench: Any) -> None:
    # the smallest of the rates wins again, and what it trained for the table is there
    made = bench("adamw", search=(1.0, 0.5), seeds=2)
    assert made.run() and len(made.starts) == 3
    more = bench("adamw", search=(1.0, 0.5, 2.0), seeds=2)
    assert more.run() and len(more.starts) == 1


def test_two_at_work_in_one_directory_are_one_too_many(compare: Any, tmp_path: Path) -> None:
    with compare.locked(tmp_path), pytest.raises(ValueError, match="is at work there"), compare.locked(tmp_path):
        pass
    with compare.locked(tmp_path) as lock:
        assert fcntl.fcntl(lock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize(("field", "value"), [("method", "lora:8"), ("lr", 0.5), ("final_tokens", 77), ("seed", 3)])
def test_a_directory_of_another_run_is_refused(compare: Any, bench: Any, field: str, value: Any) -> None:
    made = bench("adamw")
    made.run()
    file = next(made.work.glob("runs/*/result.json"))
    content = json.loads(file.read_text())
    content["spec"]["data"] = ["data.path=elsewhere"]
    file.write_text(json.dumps(content))
    assert compare.known_results(made.work, made.plan)
    content["spec"][field] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is of another run, " + (value if field == "method" else "adamw")):
        compare.known_results(made.work, made.plan)


def test_a_run_that_ends_in_nothing_finite_has_diverged(compare: Any, bench: Any) -> None:
    made = bench("adamw", "lora:8")
    made.run()
    file = next(made.work.glob("runs/*lora*/result.json"))
    content = json.loads(file.read_text())
    content["final"]["loss"] = float("nan")
    file.write_text(json.dumps(content))
    assert made.statuses == {"adamw": "done", "lora:8": "diverged"}


def test_data_that_is_too_small_for_components_alone(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suites, opened, told = sys.modules["compare_suites"], [], []  # type: Any, list[str], list[str]
    plan = suites.Plan(suites.SUITES["full"], [suites.DataSet("one"), suites.DataSet("two")])
    limit = 10000

    def opens(spec: Any) -> None:
        opened.append(spec.data[-1].partition("=")[2])
        if int(opened[-1]) > limit:
            raise ValueError("too small")

    monkeypatch.setattr(compare, "open_data", opens)
    compare.prepare(plan, told.append)
    assert opened == ["4096", "4096", "32000"]
    assert told == ["the components of memory will be shown as failed: too small"]
    limit = 1000
    with pytest.raises(ValueError, match="too small"):
        compare.prepare(plan, told.append)


def test_methods_without_their_package_are_told_of(compare: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = sys.modules["compare_suites"]
    monkeypatch.setattr(suites, "find_spec", lambda name: None if name in ("peft", "apollo_torch") else name)
    made, told = bench("adamw", "lora:8", "galore:8", "qlora:8", "apollomini"), []
    compare.tell_missing(made.plan, {}, told.append)
    assert [text.partition(" to ")[0] for text in told] == [
        "peft is not installed: lora:8, qlora:8 will be shown as failed;",
        "apollo_torch is not installed: apollomini will be shown as failed;",
    ]
    made.run()
    told.clear()
    compare.tell_missing(made.plan, made.runner.results, told.append)
    assert told == []  # of runs that are over there is nothing to say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_progress_on_a_terminal_and_elsewhere(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.os, "get_terminal_size", lambda _: os.terminal_size((60, 24)))
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        progress = compare.Progress(stream)
        progress.show(3, 12, ["adamw (one, seed 0) step 7/400 loss 5.123", "another"], 4000.0)
        progress.say("a line")
    shown, line = terminal.getvalue().split("\r\033[K")[1:]
    assert shown.startswith("[#####...............] 3/12 runs, about 1 h 07 min left") and len(shown) == 59
    assert line == "a line\n" and pipe.getvalue() == "a line\n"
    monkeypatch.setattr(compare, "LINE_SECONDS", 0.0)
    progress.show(3, 12, [], None)
    assert pipe.getvalue().endswith("3/12 runs | \n")


# ---------------------------------------------------------------- the command line


WRONG = [
    (["--suite", "small", "--seeds", "0"], "--seeds 0"),
    (["--suite", "small", "--jobs", "-1"], "--jobs -1"),
    (["--suite", "small", "--steps", "0"], "--steps 0"),
    (["--suite", "small", "--minutes", "-3"], "--minutes -3"),
    (["--suite", "small", "--methods", "adam"], "no method 'adam'"),
    (["--suite", "small", "--methods", "loqt"], "needs a rank"),
    (["--suite", "small", "--methods", "galore:4000", "--list"], "4000"),
    (["--suite", "small", "--methods", "relora:8+start=400"], "start"),
    (["--suite", "small", "--methods", "loqt:8+loqt.alpha={x}"], "loqt.alpha"),
    (["--suite", "small", "--minutes", "0.5"], "--minutes 0.5: runs need time to start and to pause; give at least 2"),
    (["--suite", "small", "--list", "--report"], "--report does nothing beside --list"),
    (["--suite", "small", "--list", "--jobs", "2"], "--jobs does nothing beside --list"),
    (["--suite", "small", "--report", "--again"], "--again does nothing beside --report"),
    (["--suite", "small", "--report", "--minutes", "9"], "--minutes does nothing beside --report"),
    (["--suite", "small", "--methods", "adamw", "lora:8", "adamw"], "adamw is given twice"),
    (["--suite", "small", "--methods", "loqt:8+loqt.alpha=much"], "loqt.alpha"),
    (["--suite", "small", "--methods", "loqt:8+candidate.nonsense=1"], "nonsense"),
    (["--suite", "small", "--shape", "llama_2mm"], "llama_2mm"),
    (["--suite", "small", "--data", "c4"], "give NAME=FILE"),
    (["--suite", "small", "--data", "c4=/no/such/file.jsonl"], "/no/such/file.jsonl"),
    (["--suite", "full"], "wants 2 data sets"),
    (["--suite", "defaults", "--data", "stdlib", "--data", "stdlib"], "the name stdlib is given twice"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_a_wrong_command_line_starts_nothing(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert compare.main([*arguments, "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error
    assert list(tmp_path.iterdir()) == []


def test_a_suite_for_cuda_is_refused_without_it(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    assert compare.main(["--suite", "gpu", "--work", str(tmp_path / "work")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert compare.main(["--suite", "gpu", "--work", str(tmp_path / "work"), "--list"]) == 0


def test_listing_and_reporting_run_nothing(
    compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "open_data", lambda _: pytest.fail("no data is needed"))
    common = ["--suite", "small", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    assert compare.main([*common, "--list", "--methods", "adamw", "loqt:8+loqt.alpha=1"]) == 0
    listed = capsys.readouterr().out
    assert "method: loqt:8+loqt.alpha=1 (stdlib, seed 0): rates" in listed and "2 runs, 0 of them over" in listed
    assert compare.main([*common, "--report"]) == 1
    assert "there is no report" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_fewer_steps_keep_the_proportions(compare: Any) -> None:
    options = compare.parser().parse_args(["--suite", "small", "--steps", "100", "--methods", "adamw"])
    suite = compare.chosen_suite(options)
    whole = sys.modules["compare_suites"].SUITES["small"].spec
    assert suite.spec["steps"] == 100
    for name in ("interval", "eval_every"):
        assert suite.spec[name] == round(whole[name] * 100 / whole["steps"])
