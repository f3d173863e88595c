"""How fast is a step? LoQT beside full rank, 8-bit AdamW, GaLore, APOLLO and QLoRA, in one run, taking turns.

    python tools/benchmark.py --suite cpu                    # 9M, 35M, 60M, 350M; below 30 minutes on two cores
    python tools/benchmark.py --suite scaling                # over rank, tokens, layers, and processes under ZeRO-2
    python tools/benchmark.py --suite cuda --minutes 8       # 350M, 1B, 7B, with and without 24 GB; again until done
    python tools/benchmark.py --shape llama_9m --contenders adamw loqt:32 --rounds 5 --work /tmp/mine

A cell is one shape, data type and number of tokens, and its contenders (`tools/rivals.py` says who they are), each in a
process of its own. A round is one step of each, one after another (A B A B ...): what disturbs the machine disturbs all
of them, and a ratio is of two steps of the same round. Before the first round each takes two steps that do not count;
after the first rounds each takes one that also finds new subspaces. A contender that fails, or whose package is not
there, is shown with its error. Where two models do not fit beside each other (7B), every round starts its processes
afresh.

Tokens are bytes of Python's own source. Every cell is a file in --work, written after every round: the same command
goes on where it was stopped, and cells that are there are not measured again. Tables (README.md) and plots go there
too; --report writes these alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import benchmark_ranks
import benchmark_report
import torch
from fit import Memory, machine
from rivals import MissingPackage, Setup, build, parse, run_options, text_batch

from loqt_ds.train import set_environment

RANKS_SHAPE = "llama_35m:96"  # of the processes under ZeRO-2
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"
REFRESHING = (
    *("galore", "qgalore", "apollo", "apollomini", "relora"),
    *("loqt", "loqt8bit", "loqtnq", "loqtcard"),
)
WARM_UP = 2
STEPS_AFRESH = 3  # timed steps of a process that lives for one round
MIN_ROUNDS, MAX_ROUNDS = 3, 25


@dataclass(frozen=True)
class Cell:
    """One comparison.

    together: all contenders live at once; else every round starts each of them anew, alone. share: of the suite's time.
    refreshes: rounds that are followed by a step with new subspaces. gives_back: on a CPU, what a step has freed goes
    back to the system after it, so that the next contender can have it; all pay for that with page faults in their
    next step (2 to 4 % of it were measured).
    """

    shape: str
    dtype: str
    rows: int
    length: int
    contenders: tuple[str, ...]
    device: str = "cpu"
    num_layers: int | None = None
    cap_gib: float | None = None
    together: bool = True
    share: float = 1.0
    refreshes: int = 2
    gives_back: bool = False

    @property
    def name(self) -> str:
        layers = "" if self.num_layers is None else f"_{self.num_layers}layers"
        cap = "" if self.cap_gib is None else f"_{self.cap_gib:g}gib"
        return f"{Path(self.shape).stem}{layers}_{self.dtype}_{self.rows}x{self.length}_{self.device}{cap}"

    def setup(self) -> Setup:
        return Setup(
            self.shape,
            dtype=self.dtype,
            rows=self.rows,
            length=self.length,
            device=self.device,
            num_layers=self.num_layers,
            cap_gib=self.cap_gib,
            is_large=self.device == "cuda",
        )


def everyone(*ranks: int) -> tuple[str, ...]:
    """All rivals at the last of the ranks, LoQT at all of them."""
    rivals = [f"{method}:{ranks[-1]}" for method in ("galore", "apollo", "qlora")]
    ours = [f"{method}:{rank}" for rank in ranks for method in ("loqt", "loqt8bit")]
    return ("adamw", "adamw8bit", *rivals, *ours)


def cpu_suite() -> list[Cell]:
    few = ("adamw", "qlora:128", "loqt:128")
    return [
        Cell("llama_9m", "fp32", 8, 256, everyone(32), share=5),
        Cell("llama_60m", "fp32", 8, 256, everyone(32, 128), share=30),
        Cell("llama_350m", "fp32", 8, 256, few, share=28, refreshes=1, gives_back=True),
        Cell("llama_60m", "bf16", 8, 256, everyone(32, 128), share=17, refreshes=1),
        Cell("llama_35m", "fp32", 8, 256, everyone(32, 96), share=12, refreshes=1),
        Cell("llama_35m", "bf16", 8, 256, everyone(32, 96), share=6, refreshes=1),
        Cell("llama_9m", "bf16", 8, 256, everyone(32), share=3, refreshes=1),
    ]


def cuda_suite() -> list[Cell]:
    def cell(shape: str, rows: int, contenders: tuple[str, ...], **options: Any) -> Cell:
        return Cell(f"llama_{shape}", "bf16", rows, 256, contenders, device="cuda", **options)

    large = everyone(256)
    return [  # the cells that matter first
        cell("7b", 16, large, together=False, refreshes=1),
        cell("1b", 16, (*everyone(512), "loqt:128", "loqt:256"), refreshes=1),
        cell("7b", 8, (*large, "loqtcard:256", "loqtcard:1024"), together=False, refreshes=1, cap_gib=23.6),
        cell("350m", 32, (*everyone(128), "loqt:256")),
        cell("7b", 16, ("adamw", "loqt:128", "loqt:512", "loqt:1024"), together=False, refreshes=1, num_layers=16),
    ]


def scaling_suite() -> list[Cell]:
    ranks = tuple(f"loqt:{rank}" for rank in (32, 64, 128, 256, 512))
    both = ("adamw", "loqt:128")
    tokens = [Cell("llama_60m", "fp32", rows, 256, both, share=rows, refreshes=0) for rows in (1, 2, 4, 16)]
    layers = [Cell("llama_60m", "fp32", 4, 256, both, num_layers=n, share=n / 2, refreshes=1) for n in (2, 4, 16)]
    return [Cell("llama_60m", "fp32", 8, 256, ("adamw", *ranks), share=24, refreshes=1), *tokens, *layers]


SUITES = {"cpu": (cpu_suite, 27.0), "cuda": (cuda_suite, 60.0), "scaling": (scaling_suite, 20.0)}  # and its minutes


# ---------------------------------------------------------------- one contender, in a process of its own


def give_back() -> None:
    """Returns what was freed to the system, so that the next peak is of what is in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def serve(connection: Any, cell: Cell, name: str) -> None:
    """Builds a contender and takes steps as it is told: `("build",)`, `("step", number, refresh, peak)`.

    Every answer is ("done", dict) or ("failed", status, error).
    """
    try:
        device = torch.device(cell.device, 0) if cell.device == "cuda" else torch.device(cell.device)
        memory = Memory(device)
        if cell.cap_gib is not None and device.type == "cuda":
            memory.cap(cell.cap_gib)
        before = memory.peaks()
        connection.recv()
        began = time.perf_counter()
        contender = build(name, cell.setup())
        built = {"build_seconds": time.perf_counter() - began, "before": before}
        connection.send(("done", built | {"notes": getattr(contender, "notes", [])}))
        while True:
            _, number, refresh, peak = connection.recv()
            batch = text_batch(cell.rows, cell.length, number)
            if peak:
                give_back()
                memory.reset()
            answer: dict[str, Any] = asdict(contender.step(batch, refresh=refresh))
            if peak:
                answer |= {"peak": memory.peaks(), "bytes": contender.num_bytes()}
            if cell.gives_back:
                give_back()
            connection.send(("done", answer))
    except EOFError:
        return
    except MissingPackage as error:
        connection.send(("failed", "not installed", str(error)))
    except torch.OutOfMemoryError as error:
        connection.send(("failed", "out of memory", str(error).split("\n")[0]))
    except Exception as error:
        out_of_memory = "can't allocate memory" in str(error)
        connection.send(("failed", "out of memory" if out_of_memory else "failed", f"{type(error).__name__}: {error}"))


class Failed(RuntimeError):
    """A contender that cannot go on; `status`: failed, out of memory, or not installed."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class OutOfTime(RuntimeError):
    """This call's minutes are over."""


class Worker:
    """A process with one contender."""

    def __init__(self, cell: Cell, name: str) -> None:
        # On a CPU, processes forked from one that has done the imports, and nothing else: they start in no time. One in
        # which an import has looked for CUDA devices must not be forked by those that want to use them.
        context: Any = multiprocessing.get_context("forkserver" if cell.device == "cpu" else "spawn")
        if cell.device == "cpu":
            context.set_forkserver_preload(["rivals", "fit", "bitsandbytes", "transformers.models.auto.modeling_auto"])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, cell, name), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *message: Any, until: float | None) -> dict[str, Any]:
        """Its answer. Raises Failed, or OutOfTime if there is none by `until` (`time.monotonic`)."""
        try:
            self._connection.send(message)
            if until is not None and not self._connection.poll(max(0.0, until - time.monotonic())):
                raise OutOfTime
            kind, *content = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            status = "out of memory" if code == -9 else "failed"
            raise Failed(status, f"the process ended with exit code {code}") from None
        if kind == "failed":
            raise Failed(*content)
        return dict(content[0])

    def end(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


# ---------------------------------------------------------------- one cell


class Comparison:
    """A cell that is being measured, and its file.

    Args:
        until: (`time.monotonic`) when nothing may be started any more; None: no limit.
        budget: seconds that the cell should take.
        rounds: how many there shall be; None: as many as the budget allows.
    """

    def __init__(self, cell: Cell, work: Path, *, until: float | None, budget: float, rounds: int | None) -> None:
        self.cell, self.file, self.until, self._budget = cell, work / f"{cell.name}.json", until, budget
        self._workers: dict[str, Worker] = {}
        self._began = time.monotonic()
        described = json.loads(json.dumps(asdict(cell)))  # as it is read back
        self.record: dict[str, Any] = {
            "cell": described,
            "target": rounds if cell.together or rounds is not None else MIN_ROUNDS,
            "contenders": {name: {"status": "ok"} for name in cell.contenders},
            "rounds": [],
            "refreshes": [],
            "runs": [],
        }
        if self.file.is_file():
            self.record = json.loads(self.file.read_text())
            if self.record["cell"] != described:
                raise ValueError(f"{self.file} is of another cell; remove it, or give another --work")
            if rounds is not None:
                self.record["target"] = rounds
        if not self.is_done:
            self.record["runs"].append({"machine": machine(torch.device(cell.device)), "load": list(os.getloadavg())})

    @property
    def is_done(self) -> bool:
        target = self.record["target"]
        rounds = [entry for entry in self.record["rounds"] if set(self._live()) <= set(entry)]
        return not self._live() or (target is not None and len(rounds) >= target)

    def _live(self) -> list[str]:
        entries = self.record["contenders"]
        return [name for name in self.cell.contenders if entries[name]["status"] == "ok"]

    def _save(self) -> None:
        partial = self.file.with_suffix(".part")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(partial, self.file)

    def _say(self, text: str) -> None:
        print(f"{self.cell.name} {time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def run(self) -> bool:
        """Measures what is not there yet. Returns whether the cell is done."""
        if self.is_done:
            return True
        try:
            if self.cell.together:
                self._run_together()
            else:
                self._run_by_turns()
        except OutOfTime:
            self._say("the rest next time; the same command goes on")
        finally:
            for worker in self._workers.values():
                worker.end()
            self._workers.clear()
        return self.is_done

    # ---------------------------------------------------------------- steps

    def _ask(self, name: str, *message: Any) -> dict[str, Any] | None:
        """A worker's answer; None where the contender has failed, which is written down."""
        try:
            return self._workers[name].ask(*message, until=self.until)
        except Failed as error:
            self.record["contenders"][name] |= {"status": error.status, "error": str(error)}
            self._say(f"{name}: {error.status}: {error}")
            self._workers.pop(name).end()
            self._save()
            return None

    def _step(self, name: str, *, refresh: bool = False, peak: bool = False) -> dict[str, Any] | None:
        entry = self.record["contenders"][name]
        entry["num_steps"] = entry.get("num_steps", 0) + 1
        return self._ask(name, "step", entry["num_steps"], refresh, peak)

    def _warm_up(self, name: str) -> bool:
        """Builds a contender and takes the steps that do not count. Returns whether it lives."""
        built = self._ask(name, "build")
        if built is None:
            return False
        entry = self.record["contenders"][name]
        steps = []
        for number in range(WARM_UP):
            taken = self._step(name, peak=number == WARM_UP - 1)
            if taken is None:
                return False
            steps.append(taken)
        first, last = seconds(steps[0]), seconds(steps[-1])
        entry.setdefault("first_loss", steps[0]["loss"])
        entry |= {"bytes": last_bytes(steps[-1]), "peak": steps[-1]["peak"], **built}
        self._say(f"{name}: built in {built['build_seconds']:.1f} s, first step {first:.2f} s, second {last:.2f} s")
        return True

    def _refresh(self, name: str) -> dict[str, Any] | None:
        """A step that finds new subspaces; None for those without any, or that failed."""
        if parse(name)[0] not in REFRESHING or name not in self._workers:
            return None
        taken = self._step(name, refresh=True, peak=True)
        if taken is not None:
            self._say(f"{name}: a step with new subspaces {seconds(taken) + (taken['refresh'] or 0.0):.2f} s")
        return taken

    # ---------------------------------------------------------------- rounds

    def _run_together(self) -> None:
        """All contenders live side by side and take one step each in every round."""
        record = self.record
        if record["rounds"] and set(record["rounds"][-1]) < set(self._live()):
            record["rounds"].pop()
        self._workers = {name: Worker(self.cell, name) for name in self._live()}  # which import side by side
        for name in self._live():
            self._warm_up(name)
        while not self.is_done:
            began = time.monotonic()
            taken = {name: [step] for name in self._live() if (step := self._step(name)) is not None}
            if not taken:
                break
            record["rounds"].append(taken)
            spent = time.monotonic() - began
            self._say(f"round {len(record['rounds'])}/{record['target'] or '?'}: {benchmark_report.one_line(taken)}")
            if len(record["refreshes"]) < self.cell.refreshes:
                found = {name: step for name in self._live() if (step := self._refresh(name)) is not None}
                record["refreshes"].append(found)
            if record["target"] is None:
                record["target"] = self._affordable(spent, time.monotonic() - began - spent)
            self._save()
            if self.until is not None and time.monotonic() + spent > self.until:
                raise OutOfTime

    def _affordable(self, of_round: float, of_refresh: float) -> int:
        """Rounds that fit the budget, the first included."""
        left = self._budget - (time.monotonic() - self._began) - (self.cell.refreshes - 1) * of_refresh
        return min(MAX_ROUNDS, max(MIN_ROUNDS, 1 + int(left / max(of_round, 1e-9))))

    def _run_by_turns(self) -> None:
        """One contender lives at a time, for one round."""
        record = self.record
        for number in range(record["target"]):
            if len(record["rounds"]) <= number:
                record["rounds"].append({})
                record["refreshes"].append({})
            for name in self._live():
                if name not in record["rounds"][number]:
                    self._one_turn(name, number)

    def _one_turn(self, name: str, number: int) -> None:
        began = time.monotonic()
        entry = self.record["contenders"][name]
        longest = entry.get("turn_seconds", max((e.get("turn_seconds", 0.0) for e in self._entries()), default=0.0))
        if self.until is not None and began + longest > self.until:
            raise OutOfTime
        self._workers[name] = Worker(self.cell, name)
        try:
            alive = self._warm_up(name)
            steps = [step for _ in range(STEPS_AFRESH if alive else 0) if (step := self._step(name)) is not None]
            if len(steps) < STEPS_AFRESH:
                return
            if number < self.cell.refreshes and (found := self._refresh(name)) is not None:
                self.record["refreshes"][number][name] = found
        except OutOfTime:
            if began - self._began < 1.0 and not any(self.record["rounds"]):  # it had all the time there is
                entry |= {"status": "failed", "error": "did not finish its turn within --minutes"}
                self._save()
            raise
        finally:
            if name in self._workers:
                self._workers.pop(name).end()
        if name in self.record["rounds"][number] or entry["status"] != "ok":
            return
        self.record["rounds"][number][name] = steps
        entry["turn_seconds"] = time.monotonic() - began
        self._say(f"round {number + 1}: {benchmark_report.one_line(self.record['rounds'][number])}")
        self._save()

    def _entries(self) -> list[dict[str, Any]]:
        return list(self.record["contenders"].values())


def seconds(taken: dict[str, Any]) -> float:
    return float(sum(taken["seconds"].values()))


def last_bytes(taken: dict[str, Any]) -> dict[str, int]:
    return {**taken["bytes"], "gradients": taken["gradients"]}


# ---------------------------------------------------------------- all cells


def chosen_cells(options: argparse.Namespace) -> list[Cell]:
    """The cells of the command line. Raises ValueError for what cannot be measured here."""
    if options.suite is not None:
        cells = SUITES[options.suite][0]()
    elif options.shape is not None:
        device = "cuda" if options.cuda else "cpu"
        names = tuple(options.contenders or ["adamw", "loqt:128"])
        cells = [Cell(s, options.dtype, options.rows, options.length, names, device=device) for s in options.shape]
    else:
        raise ValueError(f"give --suite ({', '.join(SUITES)}) or --shape, such as llama_9m")
    for cell in cells:
        if cell.device == "cuda" and not torch.cuda.is_available() and not options.report:
            raise ValueError("torch sees no CUDA device; the suites for a CPU are --suite cpu and --suite scaling")
        cell.setup().description()
        for name in cell.contenders:
            parse(name)
            cell.setup().config(*run_options(name))
    return cells


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--suite", choices=sorted(SUITES), help="which cells")
    made.add_argument("--shape", nargs="+", help="instead of a suite: names in configs/models, or files")
    made.add_argument("--contenders", nargs="+", metavar="METHOD[:RANK][+OPTION=VALUE...]", help="with --shape")
    made.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="with --shape")
    made.add_argument("--rows", type=int, default=8, help="with --shape: rows of a micro-batch")
    made.add_argument("--length", type=int, default=256, help="with --shape: tokens of a row")
    made.add_argument("--cuda", action="store_true", help="with --shape: on the first CUDA device")
    made.add_argument("--rounds", type=int, help="of every cell (default: what fits --budget, at least 3)")
    made.add_argument("--budget", type=float, help="minutes for all cells together (default: 27 for the CPU's suite)")
    made.add_argument("--minutes", type=float, help="of this call: nothing is started later")
    made.add_argument("--work", type=Path, help="directory of the results (default: benchmarks/results/speed_SUITE)")
    made.add_argument("--report", action="store_true", help="measure nothing, write tables and plots of what is there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when all cells are done."""
    set_environment()  # before the processes start
    options = parser().parse_args(arguments)
    started = time.monotonic()
    try:
        cells = chosen_cells(options)
        if options.work is None and options.suite is None:
            raise ValueError("--shape needs --work, a directory for the results")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    work = options.work or RESULTS / f"speed_{options.suite}"
    work.mkdir(parents=True, exist_ok=True)
    until = None if options.minutes is None else started + 60 * options.minutes
    minutes = options.budget or (SUITES[options.suite][1] if options.suite else 5.0 * len(cells))
    budget = 60 * minutes / sum(cell.share for cell in cells)
    is_done = True
    for cell in cells if not options.report else []:
        try:
            comparison = Comparison(cell, work, until=until, budget=budget * cell.share, rounds=options.rounds)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        is_done &= comparison.run()
        if until is not None and time.monotonic() > until:
            break
    files = [work / f"{cell.name}.json" for cell in cells]
    records = [json.loads(file.read_text()) for file in files if file.is_file()]
    is_done &= len(records) == len(cells)
    more: dict[str, Any] = {}
    if options.suite == "scaling":
        may_run = not options.report and (until is None or time.monotonic() < until)
        over_ranks = benchmark_ranks.run(RANKS_SHAPE, work, measures=may_run)
        is_done &= len(over_ranks) == len(benchmark_ranks.cells(RANKS_SHAPE))
        if over_ranks:
            more = {
                "processes": benchmark_ranks.points(over_ranks),
                "more": "\n".join(benchmark_ranks.table(over_ranks)),
            }
    if records:
        benchmark_report.write(records, work, command=sys.argv[1:] if arguments is None else arguments, **more)
    return 0 if is_done else 1


if __name__ == "__main__":
    sys.exit(main())
