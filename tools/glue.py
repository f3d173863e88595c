"""Fine-tuning on GLUE, method beside method, from an encoder that is pretrained here: one command, one report.

    python tools/glue.py --text TRAIN.jsonl.gz --validation-text VALID.jsonl.gz --glue GLUE_DIRECTORY
    python tools/glue.py --base ENCODER --glue GLUE_DIRECTORY --tasks sst2 stsb --seeds 1

The encoder is the export of the recipe `mlm_small`, masked language modelling with LoQT, on the text given (--base
takes another one). Then five tasks x full fine-tuning, LoRA, LoQT that merges and LoQT that does not x --seeds, each
with the same rows, steps and start (`tools/glue_run.py` tells what is the same and what is not). REPORT.md,
results.json and a plot go to --output.

Everything that is over lies in --work and is not repeated: the same command goes on where it was stopped, the
pretraining from its last checkpoint. With --search, each method's rate is multiplied by a third, one and three on SST-2
and STS-B with a seed of its own, and the best by the mean of the two scores is taken for all tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glue_report
from compare import Progress, duration
from compare_run import write_whole
from glue_run import FOLDERS, METHODS, RATES, STEPS, Spec, config_of, run

from loqt_ds.stopping import Interrupted, sigterm_raises
from loqt_ds.train import set_environment

REPOSITORY = Path(__file__).resolve().parents[1]
FACTORS = (1 / 3, 1.0, 3.0)  # of a rate, in a search
SEARCHED = ("sst2", "stsb")
Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """All runs of one call."""

    tasks: Sequence[str]
    methods: Sequence[str]
    num_seeds: int
    scale: float  # on the steps of all tasks

    def spec(self, task: str, method: str, seed: int, lr: float) -> Spec:
        return Spec(task, method, seed, lr, max(1, round(STEPS[task] * self.scale)))

    def searched(self) -> list[Spec]:
        """On a seed that no row of the table has; on the tasks that a small encoder learns something of, where they are
        among the plan's."""
        tasks = [task for task in self.tasks if task in SEARCHED] or self.tasks
        rates = [(method, RATES[method] * factor) for method in self.methods for factor in FACTORS]
        return [self.spec(task, method, self.num_seeds, lr) for task in tasks for method, lr in rates]

    def judged(self, rates: dict[str, float]) -> list[Spec]:
        """Seed by seed, so that a table can be had early."""
        return [
            self.spec(task, method, seed, rates[method])
            for seed in range(self.num_seeds)
            for task in self.tasks
            for method in self.methods
        ]


def best_rates(results: Sequence[Result]) -> dict[str, float]:
    """By the mean of GLUE's scores over the tasks."""
    scores: dict[str, dict[float, list[float]]] = {}
    for result in results:
        spec = result["spec"]
        scores.setdefault(spec["method"], {}).setdefault(spec["lr"], []).append(result["final"]["glue"])
    return {method: max(of, key=lambda lr: sum(of[lr]) / len(of[lr])) for method, of in scores.items()}


class Runner:
    """Does what is not done yet."""

    def __init__(self, work: Path, base: Path, glue: Path, progress: Progress) -> None:
        self.work, self.base, self.glue, self.progress = work, base, glue, progress
        self._encoder = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()

    def known(self, spec: Spec) -> Result | None:
        """Raises ValueError for the run of another encoder."""
        file = self.work / f"{spec.name}.json"
        if not file.is_file():
            return None
        result: Result = json.loads(file.read_text())
        if result["encoder"] != self._encoder:
            raise ValueError(f"{file} is a run from another encoder than {self.base}; give another --work")
        return result

    def all(self, specs: Sequence[Spec]) -> list[Result]:
        """The results of all; one after another."""
        started = time.monotonic()
        missing = [spec for spec in specs if self.known(spec) is None]
        for number, spec in enumerate(missing):
            steps_left = sum(other.steps * _cost(other) for other in missing[number:])
            steps_done = sum(other.steps * _cost(other) for other in missing[:number])
            left = (time.monotonic() - started) * steps_left / steps_done if steps_done else None
            self.progress.show(len(specs) - len(missing) + number, len(specs), [spec.name], left)
            result = run(spec, self.base, self.glue, self.work)
            write_whole(self.work / f"{spec.name}.json", result | {"encoder": self._encoder})
            told = f"{spec.name}: {result['final']['glue']:.4f}, {result['seconds']:.0f} s"
            after = "" if left is None else f", about {duration(left)} left"
            self.progress.say(f"[{len(specs) - len(missing) + number + 1}/{len(specs)}{after}] {told}")
        found = [self.known(spec) for spec in specs]
        return [result for result in found if result is not None]


def _cost(spec: Spec) -> float:
    """Of a step, by the length of its rows, for what is told of the time left."""
    return {"cola": 1.0, "sst2": 1.6, "mrpc": 3.0, "stsb": 2.6, "rte": 3.6}[spec.task]


def pretrain(options: argparse.Namespace, work: Path) -> Path:
    """The encoder's directory; the product's own run, in a process of its own."""
    directory = work / "base"
    if not (directory / "export" / "config.json").is_file():
        command = [sys.executable, "-m", "loqt_ds.train", "--config", "mlm_small"]
        command += [f"data.path={options.text}", f"output_dir={directory}", "checkpoint.resume=auto"]
        command += [f"train.max_steps={options.pretrain_steps}", f"eval.every={max(1, options.pretrain_steps // 6)}"]
        held_out = options.validation_text
        command += ["data.validation_path=" + (str(held_out) if held_out else "null"), *options.pretrain]
        if (status := subprocess.run(command, cwd=REPOSITORY).returncode) != 0:
            raise ValueError(
                f"the pretraining ended with status {status} (see above); the same command goes on with it"
            )
    return directory / "export"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base = made.add_mutually_exclusive_group(required=True)
    base.add_argument("--text", type=Path, help="text to pretrain the encoder on (.jsonl, .txt, .parquet, compressed)")
    base.add_argument("--base", type=Path, help="an encoder's directory, instead of pretraining one")
    made.add_argument(
        "--validation-text", type=Path, help="held-out text of the pretraining (default: a share of --text)"
    )
    made.add_argument(
        "--glue", type=Path, required=True, help=f"holds the tasks' directories: {', '.join(FOLDERS.values())}"
    )
    made.add_argument("--tasks", nargs="+", choices=list(FOLDERS), default=list(FOLDERS))
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--seeds", type=int, default=3, help="runs of each method and task (default: %(default)s)")
    made.add_argument("--scale", type=float, default=1.0, help="on the steps of all tasks (default: %(default)s)")
    made.add_argument("--search", action="store_true", help="search each method's rate first (24 runs more)")
    made.add_argument("--pretrain-steps", type=int, default=1500, help="of the encoder (default: %(default)s)")
    made.add_argument("--pretrain", nargs="*", default=[], metavar="OPTION=VALUE", help="options of its run")
    made.add_argument("--work", type=Path, default=Path("runs/glue_small"), help="runs (default: %(default)s)")
    made.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY / "benchmarks/results/glue_small",
        help="report (default: %(default)s)",
    )
    made.add_argument("--report", action="store_true", help="write the report of what there is, run nothing")
    return made


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for paths that are not there, before anything takes time."""
    for path in (
        options.text,
        options.validation_text,
        options.base,
        *(options.glue / FOLDERS[t] for t in options.tasks),
    ):
        if path is not None and not path.exists():
            raise ValueError(f"{path} is not there; correct the path")
    if options.seeds < 1 or not options.scale > 0 or options.pretrain_steps < 1:
        raise ValueError(
            f"--seeds {options.seeds} --scale {options.scale:g} --pretrain-steps {options.pretrain_steps}: give at "
            "least one seed and one step, and a scale above 0"
        )


def compare(options: argparse.Namespace, progress: Progress) -> None:
    """Pretrains, searches, runs and reports, as far as is asked for."""
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = options.base.resolve() if options.base else work / "base" / "export"
    if options.base is None and not options.report:
        progress.say(f"the encoder: {work / 'base'}")
        base = pretrain(options, work)
    plan = Plan(options.tasks, options.methods, options.seeds, options.scale)
    runner = Runner(work, base, options.glue.resolve(), progress)
    if not options.report:
        for method in plan.methods:  # whether the encoder and the options do
            config_of(plan.spec(plan.tasks[0], method, 0, RATES[method]), base, options.glue.resolve(), work / "none")
    searched: list[Result] = []
    rates = {method: RATES[method] for method in plan.methods}
    if options.search:
        specs = plan.searched()
        searched = [r for r in map(runner.known, specs) if r] if options.report else runner.all(specs)
        rates |= best_rates(searched)
    specs = plan.judged(rates)
    results = [r for r in map(runner.known, specs) if r] if options.report else runner.all(specs)
    if not results:
        raise ValueError(f"--work {options.work} holds no run of this plan; leave out --report to make them")
    file = glue_report.write(results, searched, base, options.output)
    progress.say(f"written: {file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for a mistake in the request, 130 when it was interrupted."""
    options = parser().parse_args(arguments)
    set_environment()
    progress = Progress(sys.stdout)
    with sigterm_raises():
        try:
            check(options)
            compare(options, progress)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, Interrupted):
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        finally:
            progress.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
