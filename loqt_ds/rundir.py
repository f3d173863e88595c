"""Where a run lives: which directory, that no other process has it, and which checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loqt_ds.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_checkpoint, write_json
from loqt_ds.config import Config, ConfigError, save_yaml

Say = Callable[[str], None]

LOCK_FILE, DS_CONFIG_FILE = ".lock", "ds_config.json"

# Options that may differ when a run goes on: they do not change what a step computes, but for rounding.
_FREE_ON_RESUME = (
    "checkpoint.",
    "logging.",
    "eval.",
    "export.",
    "output_dir",
    "name",
    "train.device",
    "train.memory_limit_gib",
    "optim.layerwise",
    "train.lean_activations",
    "train.compile",
    "train.activation_checkpointing",
    "loqt.dequantized_cache_gib",
    "train.collective_timeout_seconds",
    "engine",
    "fsdp.",
    "data.cache_dir",
    "data.num_processes",
)
# These may differ as long as a step sees the same rows.
_BATCH = ("train.micro_batch_size", "train.gradient_accumulation_steps")
# Of a DeepSpeed configuration: the batch, which follows the recipe; and how the same is computed, or told of.
_FREE_OF_DEEPSPEED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "zero_optimization.",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger.",
    "flops_profiler.",
    "tensorboard.",
    "wandb.",
    "csv_monitor.",
)


def choose_directory(config: Config, say: Say) -> Path | None:
    """`output_dir`; or, with checkpoint.resume=auto, the newest runs/NAME-NNNN; None: a new numbered one, made later.

    Raises ConfigError if the directory holds something and the run is not to go on, or cannot be written.
    """
    resume = config.checkpoint.resume
    if config.output_dir is None:
        runs = Path("runs").absolute()
        _check_writable(runs)
        if resume == "auto":
            for number in sorted(_numbers(runs, config.name), reverse=True):
                directory = runs / f"{config.name}-{number:04d}"
                if (directory / "checkpoints").is_dir():
                    return directory
            say(f"checkpoint.resume=auto: there is no run named {config.name} in {runs}; starting one")
        return None
    directory = Path(config.output_dir)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output_dir={directory} is a file; give a directory")
    if directory.is_dir() and any(path.name != LOCK_FILE for path in directory.iterdir()):
        is_run = (directory / "config.yaml").exists() or (directory / "checkpoints").exists()
        if not is_run:
            raise ConfigError(f"output_dir={directory} holds other files and no run; give a new or empty directory")
        inside = resume not in ("none", "auto") and directory.resolve() in Path(resume).resolve().parents
        if resume != "auto" and not inside:
            raise ConfigError(
                f"output_dir={directory} holds a run already; set checkpoint.resume=auto to go on with it, or give "
                "another directory"
            )
    _check_writable(directory)
    return directory


def _numbers(runs: Path, name: str) -> list[int]:
    matches = (re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name) for path in runs.glob("*"))
    return [int(match[1]) for match in matches if match]


def _check_writable(directory: Path) -> None:
    """Raises ConfigError if the nearest folder above that exists cannot be written."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={directory} cannot be written ({existing} is not writable); give another one")


@dataclass
class Lock:
    """A locked directory, until the process ends or the file is closed. `token` is written in it."""

    file: IO[bytes]
    token: str


def claim_directory(config: Config, directory: Path | None) -> tuple[Path, Lock]:
    """Makes the directory (a new number where it is None) and locks it.

    Raises ConfigError if another process has the run, or the directory cannot be written.
    """
    token = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    try:
        if directory is None:
            directory = _new_number(config)
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK_FILE).open("ab")
    except OSError as error:
        raise ConfigError(f"output_dir={directory} cannot be written ({error.strerror}); give another one") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(token.encode())
        file.flush()
    except BlockingIOError:
        file.close()
        raise ConfigError(f"output_dir={directory} belongs to a process that is still running; stop it first") from None
    except OSError as error:
        file.close()
        raise ConfigError(f"output_dir={directory} cannot be written ({error.strerror}); give another one") from error
    return directory, Lock(file, token)


def is_claimed_by(directory: Path, token: str) -> bool:
    """Whether the directory, as seen from here, is the one that was locked with `token`."""
    try:
        return (directory / LOCK_FILE).read_text(encoding="utf-8") == token
    except OSError:
        return False


def _new_number(config: Config) -> Path:
    runs = Path("runs").absolute()
    number = max(_numbers(runs, config.name), default=0) + 1
    while True:
        directory = runs / f"{config.name}-{number:04d}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:  # a run that started at the same moment
            number += 1
        else:
            return directory


def write_options(config: Config, directory: Path, ds_config: dict[str, Any] | None) -> None:
    """config.yaml, and ds_config.json where DeepSpeed runs: these reproduce the run, in a directory of its own."""
    checkpoint = dataclasses.replace(config.checkpoint, resume="none")
    save_yaml(dataclasses.replace(config, checkpoint=checkpoint, output_dir=None), directory / "config.yaml")
    if ds_config is not None:
        file = directory / DS_CONFIG_FILE
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.unlink(missing_ok=True)
        write_json(temporary, ds_config)  # refuses a file that is there, and a run that goes on has one
        os.replace(temporary, file)


def choose_checkpoint(
    config: Config, directory: Path | None, ds_config: dict[str, Any] | None, world_size: int, say: Say
) -> Checkpoint | None:
    """The checkpoint to go on from, verified; None for a fresh run.

    Raises CheckpointError if it is damaged or was made with options that change what a step computes.
    """
    root = Path("runs") if directory is None else directory / "checkpoints"
    if directory is None and config.checkpoint.resume == "auto":
        return None
    path = find_checkpoint(root, config.checkpoint.resume, say=say)
    if path is None:
        return None
    checkpoint = load_checkpoint(path, verify=False)  # find_checkpoint has just verified it
    if "data" not in checkpoint.metadata:
        raise CheckpointError(
            f"checkpoint.resume={config.checkpoint.resume}: {path} was saved by a script of its own (engine."
            "save_checkpoint), and knows nothing of a recipe's data; go on from it in that script"
        )
    compare_options(checkpoint, config, ds_config, world_size, say)
    return checkpoint


def compare_options(
    checkpoint: Checkpoint, config: Config, ds_config: dict[str, Any] | None, world_size: int, say: Say
) -> None:
    """Refuses options that differ from the checkpoint's; a longer or shorter run, another number of ranks and another
    engine are allowed and said."""
    # An option that was not there yet when the checkpoint was written had what is its default now.
    saved = flatten(Config().to_dict()) | flatten(checkpoint.metadata["config"])
    given = flatten(config.to_dict())
    # What is held out of a stream depends on how much is evaluated.
    strict = ("eval.max_tokens",) if config.data.streaming else ()
    for name in sorted(saved.keys() | given.keys()):
        before, now = saved.get(name), given.get(name)
        if before == now or name in _BATCH or (name.startswith(_FREE_ON_RESUME) and name not in strict):
            continue
        if name in ("train.max_steps", "train.epochs"):
            if config.train.epochs is not None or name == "train.epochs":
                continue  # steps are known, and compared, when the rows have been counted
            say(f"train.max_steps was {before} and is {now}: the learning rate follows the new length")
            continue
        raise CheckpointError(
            f"{name}={now} differs from {name}={before} of {checkpoint.path}, which belongs to another run or model; "
            f"go on with `{name}={before}`, or start a new run"
        )
    _compare_batch(checkpoint, config, world_size, say)
    before_ds = flatten(checkpoint.metadata.get("ds_config") or {})
    now_ds = json.loads(json.dumps(flatten(ds_config or {})))
    for name in sorted(before_ds.keys() | now_ds.keys()):
        if name.startswith(_FREE_OF_DEEPSPEED) or not before_ds or not now_ds:
            continue
        if before_ds.get(name) != now_ds.get(name):
            raise CheckpointError(
                f"--ds_config: {name}={now_ds.get(name)} differs from {before_ds.get(name)} of {checkpoint.path}; go "
                "on with the DeepSpeed configuration that began the run"
            )


def _compare_batch(checkpoint: Checkpoint, config: Config, world_size: int, say: Say) -> None:
    """Refuses another global batch, and names values that keep it."""
    saved_ranks = int(checkpoint.metadata["world_size"])
    saved, train = checkpoint.metadata["config"]["train"], config.train
    before = saved["micro_batch_size"] * saved["gradient_accumulation_steps"] * saved_ranks
    now = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    if now == before:
        if world_size != saved_ranks:
            say(f"{checkpoint.path} was written by {_count(saved_ranks)}; the run goes on with {_count(world_size)}")
        return
    rule = "train.micro_batch_size × train.gradient_accumulation_steps × ranks"
    share = before // world_size
    if before % world_size:
        possible = ", ".join(str(n) for n in range(1, before + 1) if before % n == 0)
        remedy = f"{before} rows cannot be split over {world_size} ranks; start {possible} ranks"
    else:
        size = max(n for n in range(1, min(share, train.micro_batch_size) + 1) if share % n == 0)
        remedy = f"go on with `train.micro_batch_size={size} train.gradient_accumulation_steps={share // size}`"
    raise CheckpointError(
        f"train.micro_batch_size={train.micro_batch_size} × train.gradient_accumulation_steps="
        f"{train.gradient_accumulation_steps} × {_count(world_size)} = {now} rows in a step, but {before} in "
        f"{checkpoint.path} ({rule}); {remedy}, or start a new run"
    )


def _count(world_size: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}"


def compare_model(checkpoint: Checkpoint, model_config: Any) -> None:
    """Refuses a checkpoint of another model: the file that model.shape names may have been edited since."""
    saved = flatten(checkpoint.metadata["model_config"])
    given = json.loads(json.dumps(flatten(model_config.to_dict())))
    for name in sorted(saved.keys() | given.keys()):
        if name not in ("transformers_version", "_name_or_path", "dtype") and saved.get(name) != given.get(name):
            raise CheckpointError(
                f"{name}={given.get(name)} of the model differs from {name}={saved.get(name)} of {checkpoint.path}, "
                "which belongs to another model; go on with the model that began the run, or start a new run"
            )


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names; tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
