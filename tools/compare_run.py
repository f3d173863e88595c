"""One run of a comparison: one method, one data set, one seed, and what it cost.

    python tools/compare_run.py SPEC.json DIRECTORY [SECONDS]

`compare.py` starts one such process after another. The process writes DIRECTORY/result.json when it is over, however it
ended, and while it goes on DIRECTORY/progress.json, both whole or not at all. After so many SECONDS, or at SIGTERM, it
writes DIRECTORY/state.pt instead and ends with status 75; the next such process goes on from there, bit for bit.

All runs of a comparison see the same rows in the same order (`loqt_ds.data`, by seed) and are judged by the same
evaluator (`loqt_ds.evaluation`): the loss per predicted token over whole held-out documents, joined and cut into rows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from fit import machine
from rivals import Setup, build, model_bytes, parse
from rivals_initial import CALIBRATED, CALIBRATION_ROWS
from torch import Tensor

from loqt_ds.config import Config, load_config
from loqt_ds.data import DataBundle, Tokenizer, build_data, load_or_train_tokenizer
from loqt_ds.evaluation import Evaluation, evaluate
from loqt_ds.trainer import peak_memory_gib

STATUS = {"done": 0, "diverged": 0, "failed": 1, "paused": 75}  # of the process
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "galore-torch", "q-galore-torch", "apollo-torch")
WITH_FULL_WEIGHTS = ("adamw", "adamw8bit", "galore", "apollo", "apollomini")  # as transformers saves them
DIVERGED_AT = 3.0  # nats above the loss of the untrained model


@dataclass(frozen=True)
class Spec:
    """What one run is.

    method: a contender's name (`rivals`). data: options of a run, such as `data.path=FILE`, that say what is read.
    lr: of what takes the place of the adapted weights; lr_full_rank: of embeddings, norms and head. rows, length: of a
    step. interval, growth: of re-initializations, and of the refreshes of others' projections (interval only).
    eval_every: steps between evaluations on the first eval_tokens held-out tokens; what the run is judged by are the
    first final_tokens of them, or all (None).
    start: directory of a checkpoint that the run starts from; shape is then a name and no more. full_rank: whether
    embeddings, norms and head are trained. also: options of a run that say what else the model is evaluated on,
    whenever it is; nothing is trained on that. keep_model: write DIRECTORY/model, a checkpoint with its tokenizer, at
    the end; of methods that train full weights.
    """

    method: str
    data: tuple[str, ...]
    lr: float
    lr_full_rank: float
    seed: int = 0
    shape: str = "llama_2m"
    dtype: str = "fp32"
    device: str = "cpu"
    rows: int = 8
    length: int = 256
    steps: int = 400
    interval: int = 40
    growth: float | None = 1.2
    max_grad_norm: float = 1.0
    eval_every: int = 50
    eval_tokens: int = 32768
    final_tokens: int | None = None
    start: str | None = None
    full_rank: bool = True
    also: tuple[str, ...] = ()
    keep_model: bool = False

    @staticmethod
    def from_json(text: str) -> Spec:
        """Raises ValueError for fields that there are not."""
        content = json.loads(text)
        unknown = set(content) - {field.name for field in fields(Spec)}
        if unknown:
            raise ValueError(f"a run's description has no {', '.join(sorted(unknown))}")
        return Spec(**content | {name: tuple(content.get(name, ())) for name in ("data", "also")})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def data_config(spec: Spec, options: Sequence[str]) -> Config:
    """Of some options that say what is read."""
    return load_config(
        None,
        [
            f"model.shape={spec.shape}",
            f"train.seed={spec.seed}",
            f"train.micro_batch_size={spec.rows}",
            f"data.sequence_length={spec.length}",
            *options,
        ],
    )


def open_data(spec: Spec, options: Sequence[str] | None = None) -> tuple[DataBundle, Tokenizer]:
    """Batches of `Spec.data`, or of other options, and their tokenizer."""
    config = data_config(spec, spec.data if options is None else options)
    tokenizer = load_or_train_tokenizer(config, print)
    return build_data(config, tokenizer), tokenizer


def rows_of_vocabulary(tokenizer: Tokenizer) -> int:
    """Of embeddings and head of a model that starts from drawn weights."""
    return -(-tokenizer.vocab_size // 64) * 64


def setup_of(spec: Spec, vocab_size: int, calibration: tuple[dict[str, Tensor], ...] = ()) -> Setup:
    """vocab_size: of weights that are drawn."""
    return Setup(
        spec.shape,
        dtype=spec.dtype,
        rows=spec.rows,
        length=spec.length,
        device=spec.device,
        lr=spec.lr,
        lr_full_rank=spec.lr_full_rank,
        interval=spec.interval,
        growth=spec.growth,
        max_steps=spec.steps,
        max_grad_norm=spec.max_grad_norm,
        vocab_size=vocab_size if spec.start is None else None,
        masters=spec.dtype == "bf16",  # as LoQT's default: who updates bf16 weights trains with a handicap
        seed=spec.seed,
        start=spec.start,
        full_rank=spec.full_rank,
        calibration=calibration,
    )


def first_batches(bundle: DataBundle, num_rows: int, rows: int) -> tuple[dict[str, Tensor], ...]:
    """Batches of so many rows that will be trained on; the place in the data stays."""
    place = bundle.train.state_dict()
    taken = tuple(bundle.train.next_batch() for _ in range(-(-num_rows // rows)))
    bundle.train.load_state_dict(place)
    return taken


class Comparand:
    """A contender on its way through the data."""

    def __init__(self, spec: Spec, directory: Path, pauses: Callable[[], bool] = lambda: False) -> None:
        self.spec, self.directory, self.pauses = spec, directory, pauses
        if spec.keep_model and parse(spec.method)[0] not in WITH_FULL_WEIGHTS:
            raise ValueError(f"keep_model: {spec.method} has no full weights; {', '.join(WITH_FULL_WEIGHTS)} have")
        self.bundle, self.tokenizer = open_data(spec)
        self.also = open_data(spec, spec.also)[0] if spec.also else None
        self.device = torch.device(spec.device)
        self.before = peak_memory_gib(self.device)
        wants_data = parse(spec.method)[0] in CALIBRATED
        calibration = first_batches(self.bundle, CALIBRATION_ROWS, spec.rows) if wants_data else ()
        started = time.perf_counter()
        self.contender = build(spec.method, setup_of(spec, rows_of_vocabulary(self.tokenizer), calibration))
        self.seconds_to_build = time.perf_counter() - started
        self.check_vocabulary()
        self.curve: list[tuple[int, float]] = []  # (tokens seen, held-out loss)
        self.also_curve: list[tuple[int, float]] = []  # the same of Spec.also
        self.losses: list[float] = []  # of training, by step
        self.seconds, self.refreshes = 0.0, []  # type: tuple[float, list[float]]
        # what most was needed of, bytes; above: of the process, more than before there was a model
        self.most = {"gradients": 0, "states": 0, "above": 0}
        self.notes: list[str] = []
        self.num_parts = 1  # processes that this run has taken
        self.final: Evaluation | None = None
        self.also_final: Evaluation | None = None

    def check_vocabulary(self) -> None:
        """Raises ValueError for a checkpoint that has fewer tokens than the tokenizer."""
        rows = self.contender.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        if self.tokenizer.vocab_size > rows:
            raise ValueError(
                f"start={self.spec.start} has {rows} tokens, {self.tokenizer.name} {self.tokenizer.vocab_size}; give "
                "data.tokenizer=DIRECTORY, the one it was trained with"
            )

    def evaluate(self, max_tokens: int | None, bundle: DataBundle | None = None) -> Evaluation:
        batches = (bundle or self.bundle).validation.batches(self.spec.rows, max_tokens)
        with self.contender.computing():
            return evaluate(self.contender.model, batches, self.device)

    def note_progress(self) -> None:
        now = {"step": len(self.losses), "steps": self.spec.steps, "seconds": self.seconds, "loss": self.losses[-1]}
        write_whole(self.directory / "progress.json", now)

    def run(self) -> str:
        """Trains; returns done, diverged or paused."""
        self._restore()
        if not self.curve:
            self._extend_curve()
        for step in range(len(self.losses), self.spec.steps):
            if not self._is_sane(self._step()):
                return "diverged"
            ended = step + 1 == self.spec.steps
            # what LoQT starts from is there after its first step
            is_initialized = self.spec.start is not None and step == 0
            if ended or is_initialized or (step + 1) % self.spec.eval_every == 0:
                if not self._is_sane(self._extend_curve()):
                    return "diverged"
                self._save()
            # after a step at least, so that a run whose parts are short comes to an end as well
            if not ended and self.pauses():
                self._save()
                return "paused"
        self.final = self.evaluate(self.spec.final_tokens)
        if self.also is not None:
            self.also_final = self.evaluate(self.spec.final_tokens, self.also)
        if self.spec.keep_model:
            self.write_model()
        return "done" if self._is_sane(self.final.loss) else "diverged"

    def _is_sane(self, loss: float) -> bool:
        """Whether a loss is one to go on from."""
        return math.isfinite(loss) and loss < self.curve[0][1] + DIVERGED_AT

    def _extend_curve(self) -> float:
        """The loss on the first held-out tokens, as it is now."""
        self._measure()
        loss = self.evaluate(self.spec.eval_tokens).loss
        tokens = len(self.losses) * self.spec.rows * self.spec.length
        self.curve.append((tokens, loss))
        if self.also is not None:
            self.also_curve.append((tokens, self.evaluate(self.spec.eval_tokens, self.also).loss))
        return loss

    def write_model(self) -> None:
        """DIRECTORY/model, whole or not at all."""
        model: Any = self.contender.model
        target, aside = self.directory / "model", self.directory / f".model.{os.getpid()}"
        for old in (target, aside):
            shutil.rmtree(old, ignore_errors=True)
        model.save_pretrained(aside)
        self.tokenizer.save(aside)
        aside.rename(target)

    def _measure(self) -> None:
        above = round((peak_memory_gib(self.device) - self.before) * 2**30)
        for name, size in (("states", self.contender.num_bytes()["states"]), ("above", above)):
            self.most[name] = max(self.most[name], size)

    # what a run has gathered so far, beside the contender's own state and the place in the data
    GATHERED = ("curve", "also_curve", "losses", "seconds", "refreshes", "most", "notes", "num_parts")

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in self.GATHERED}
        state |= {"contender": self.contender.state(), "data": self.bundle.train.state_dict()}
        aside = self.directory / ".state.pt.part"
        torch.save(state, aside)
        aside.replace(self.directory / "state.pt")

    def _restore(self) -> None:
        file = self.directory / "state.pt"
        if not file.is_file():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.contender.restore(state["contender"])
        self.bundle.train.load_state_dict(state["data"])
        for name in self.GATHERED:
            setattr(self, name, state[name])
        self.num_parts += 1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # reading the state is not part of the method

    def _step(self) -> float:
        """Takes a step; its loss."""
        taken = self.contender.step(self.bundle.train.next_batch())
        self.losses.append(taken.loss)
        self.seconds += taken.total
        self.most["gradients"] = max(self.most["gradients"], taken.gradients)
        if taken.inside is not None:
            self.refreshes.append(taken.inside)
        self.notes += [f"step {len(self.losses)}: {note}" for note in taken.notes]
        if len(self.losses) % 10 == 1:
            self.note_progress()
        return taken.loss

    def result(self, status: str) -> dict[str, Any]:
        spec, model = self.spec, self.contender.model
        self._measure()
        held = {"weights": self.contender.num_bytes()["weights"], "model": model_bytes(model)}
        content: dict[str, Any] = {
            "spec": asdict(spec),
            "status": status,
            "trained_parameters": self.contender.num_trained(),
            "bytes": held | {name: self.most[name] for name in ("gradients", "states")},
            "peak_memory_gib": self.before + self.most["above"] / 2**30,
            "memory_before_model_gib": self.before,
            "num_parts": self.num_parts,
            "seconds": self.seconds,
            "seconds_to_build": self.seconds_to_build,
            "tokens_per_second": len(self.losses) * spec.rows * spec.length / max(self.seconds, 1e-9),
            "refresh_seconds": sum(self.refreshes),
            "num_refreshes": len(self.refreshes),
            "losses": [finite(loss) for loss in self.losses],
            "notes": self.notes[:50],
            "curve": [(tokens, finite(loss)) for tokens, loss in self.curve],
            "data": self.bundle.summary,
        }
        if self.also is not None:
            content["also_curve"] = [(tokens, finite(loss)) for tokens, loss in self.also_curve]
            content["also_final"] = None if self.also_final is None else self.also_final.record()
        if status == "done":
            assert self.final is not None
            num_batches = -(-self.final.num_tokens // (spec.rows * spec.length))
            # the family's evaluators divide the summed loss by one batch too many (ALGORITHM.md)
            biased = math.exp(min(self.final.loss * num_batches / (num_batches + 1), 700.0))
            content["final"] = self.final.record() | {"biased_perplexity": biased, "num_batches": num_batches}
        return content


def finite(value: float) -> float | None:
    """JSON has no number for what is not finite."""
    return value if math.isfinite(value) else None


def packages() -> dict[str, str]:
    """Versions of what takes part, where it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(spec: Spec, directory: Path, pauses: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Trains, judges, writes DIRECTORY/result.json, and returns what it says: also of a run that failed.

    `pauses` is asked after every step. Where it says so, the run's state is kept and nothing is judged. It is kept at
    every evaluation as well, so that a process that is killed loses no more than what came after.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        comparand = Comparand(spec, directory, pauses)
        if (status := comparand.run()) == "paused":
            return {"spec": asdict(spec), "status": status}
        content = comparand.result(status)
    except Exception as error:  # a comparison goes on without a method that fails, and shows what it said
        traceback.print_exc()
        content = {"spec": asdict(spec), "status": "failed", "error": f"{type(error).__name__}: {error}"}
    content |= {"machine": machine(torch.device(spec.device)), "packages": packages()}
    write_whole(directory / "result.json", content)
    (directory / "state.pt").unlink(missing_ok=True)
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, one of STATUS."""
    spec_file, directory, *seconds = sys.argv[1:] if arguments is None else arguments
    until = time.monotonic() + sum(map(float, seconds), 0.0 if seconds else math.inf)
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    spec = Spec.from_json(Path(spec_file).read_text())
    return STATUS[run(spec, Path(directory), lambda: asked.is_set() or time.monotonic() > until)["status"]]


if __name__ == "__main__":
    sys.exit(main())
