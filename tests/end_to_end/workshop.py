"""A place to run the commands in: a tiny model, a tiny corpus, a cache, and the overrides that shrink a run to them.

Most tests call `loqt_ds.train.main`, which is what the command line calls, in this process: starting Python and its
packages takes ten times as long as training the tiny model. A few start the real commands (`command`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN = REPOSITORY / "launch" / "pretrain.py"
ZERO2 = REPOSITORY / "configs" / "zero2.json"

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

# Re-initializations before updates 0, 4 and 9 (gaps 3 + int(1.2^k)); validation and checkpoints fall between and on
# them.
TINY = {
    "model.vocab_size": "auto",
    "data.tokenizer_vocab_size": 400,
    "data.sequence_length": 32,
    "data.num_processes": 1,
    "loqt.rank": 16,
    "loqt.interval": 3,
    "train.max_steps": 8,
    "train.micro_batch_size": 4,
    "train.device": "cpu",
    "eval.every": 0,
    "eval.max_tokens": 256,
    "eval.num_samples": 0,
    "checkpoint.every": 1000,
    "logging.tensorboard": False,
    "export.format": "none",
}


def write_corpus(path: Path, *, num_documents: int = 60, num_words: int = 80, seed: int = 0) -> Path:
    """A .jsonl file of made-up text in which the next word depends on the last, so that there is something to learn."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(120)]
    followers = {word: draw.sample(words, 4) for word in words}
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_documents):
            text = [draw.choice(words)]
            while len(text) < num_words:
                text.append(draw.choice(followers[text[-1]]))
            file.write(json.dumps({"text": " ".join(text)}) + "\n")
    return path


def environment(**changes: str) -> dict[str, str]:
    """Of a child process: this interpreter's commands first, the repository importable, threads that do not spin."""
    drop = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # of DeepSpeed tests in this process
    values = {name: value for name, value in os.environ.items() if name not in drop}
    return values | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{values.get('PATH', '')}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        **changes,
    }


@dataclass
class Result:
    """What a command did."""

    status: int
    output: str
    errors: str

    def ok(self) -> Result:
        assert self.status == 0, f"status {self.status}\n{self.output}\n{self.errors}"
        return self


class Workshop:
    """A directory with a tiny model's shape and a tiny corpus, and the commands run on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shape = directory / "tiny.json"
        self.shape.write_text(json.dumps(SHAPE), encoding="utf-8")
        self.corpus = write_corpus(directory / "corpus.jsonl")

    def overrides(self, **changes: Any) -> list[str]:
        """Command-line overrides; `section__field=value` changes or adds one, `...` (Ellipsis) leaves it out."""
        values = {"model.shape": self.shape, "data.path": self.corpus} | TINY
        values |= {name.replace("__", "."): value for name, value in changes.items()}
        return [f"{name}={as_yaml(value)}" for name, value in values.items() if value is not ...]

    def train(self, *arguments: str, deepspeed: bool = False, **changes: Any) -> Result:
        """`loqt_ds.train.main` in this process with the tiny overrides."""
        given = [*arguments, *self.overrides(**changes)]
        if deepspeed and "--ds_config" not in arguments:
            given = ["--ds_config", str(ZERO2), *given]
        return main(given, deepspeed=deepspeed)


def as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def main(arguments: list[str], *, deepspeed: bool = False, finetune: bool = False) -> Result:
    """The command line in this process; what it prints is caught."""
    from loqt_ds.train import main as command_line

    output, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = command_line(arguments, launched=deepspeed or finetune, finetune=finetune)
        except SystemExit as exit_:  # argparse
            status = int(exit_.code or 0)
    output.flush()
    return Result(status, output.buffer.getvalue().decode(), errors.getvalue())  # type: ignore[attr-defined]


def command(*words: str | Path, cwd: Path, timeout: float = 600, **variables: str) -> Result:
    """A real command in a child process."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


# ---------------------------------------------------------------------------------------------- what a run wrote


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; each must be JSON without NaN."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in records(run) if record.get("event") == kind]


_OF_OTHERS = re.compile(
    r"\[Gloo\]|\*{5}|[WIE]\d{4} \d\d:|.*\] \[(INFO\] \[|WARNING\] \[(real_accelerator|runner)\.py)"
)  # torch 2.8's gloo, torchrun, DeepSpeed


def own_lines(printed: str) -> list[str]:
    """What this project printed, without what launchers and backends say of themselves."""
    return [line for line in printed.splitlines() if line.strip() and not _OF_OTHERS.match(line)]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, of the last line of each step."""
    return {record["step"]: record["loss"] for record in records(run) if "event" not in record}


def files_below(directory: Path) -> dict[str, bytes]:
    """Every file with its content, to see that nothing was touched."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
