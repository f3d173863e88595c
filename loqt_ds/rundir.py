"""Where a run lives: which directory, that no other process has it, and which checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from loqt_ds.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_checkpoint, write_json
from loqt_ds.config import Config, ConfigError, save_yaml

Say = Callable[[str], None]

LOCK_FILE, DS_CONFIG_FILE = ".lock", "ds_config.json"

# Options that may differ when a run goes on: they do not change what a step computes.
_FREE_ON_RESUME = (
    "checkpoint.",
    "logging.",
    "eval.",
    "export.",
    "output_dir",
    "name",
    "train.device",
    "data.cache_dir",
    "data.num_processes",
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


def claim_directory(config: Config, directory: Path | None) -> tuple[Path, IO[bytes]]:
    """Makes the directory (a new number where it is None) and locks it until the process ends or the file is closed.

    Raises ConfigError if another process has the run, or the directory cannot be written.
    """
    try:
        if directory is None:
            directory = _new_number(config)
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK_FILE).open("ab")
    except OSError as error:
        raise ConfigError(f"output_dir={directory} cannot be written ({error.strerror}); give another one") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"output_dir={directory} belongs to a process that is still running; stop it first") from None
    return directory, lock


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
    config: Config, directory: Path | None, ds_config: dict[str, Any] | None, say: Say
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
    engine = checkpoint.metadata["engine_state"]["engine"]
    if engine != ("single" if ds_config is None else "deepspeed"):
        raise CheckpointError(
            f"checkpoint.resume: {path} was written by the {engine} engine; go on with the command that began the run"
        )
    compare_options(checkpoint, config, ds_config, say)
    return checkpoint


def compare_options(checkpoint: Checkpoint, config: Config, ds_config: dict[str, Any] | None, say: Say) -> None:
    """Refuses options that differ from the checkpoint's; a longer or shorter run is allowed and said."""
    saved, given = _flatten(checkpoint.metadata["config"]), _flatten(config.to_dict())
    # What is held out of a stream depends on how much is evaluated.
    strict = ("eval.max_tokens",) if config.data.streaming else ()
    for name in sorted(saved.keys() | given.keys()):
        before, now = saved.get(name), given.get(name)
        if before == now or (name.startswith(_FREE_ON_RESUME) and name not in strict):
            continue
        if name == "train.max_steps":
            say(f"train.max_steps was {before} and is {now}: the learning rate follows the new length")
            continue
        raise CheckpointError(
            f"{name}={now} differs from {name}={before} of {checkpoint.path}, which belongs to another run or model; "
            f"go on with `{name}={before}`, or start a new run"
        )
    before_ds = _flatten(checkpoint.metadata.get("ds_config") or {})
    now_ds = json.loads(json.dumps(_flatten(ds_config or {})))
    for name in sorted(before_ds.keys() | now_ds.keys()):
        if ds_config is not None and before_ds and before_ds.get(name) != now_ds.get(name):
            raise CheckpointError(
                f"--ds_config: {name}={now_ds.get(name)} differs from {before_ds.get(name)} of {checkpoint.path}; go "
                "on with the DeepSpeed configuration that began the run"
            )


def compare_model(checkpoint: Checkpoint, model_config: Any) -> None:
    """Refuses a checkpoint of another model: the file that model.shape names may have been edited since."""
    saved = _flatten(checkpoint.metadata["model_config"])
    given = json.loads(json.dumps(_flatten(model_config.to_dict())))
    for name in sorted(saved.keys() | given.keys()):
        if name not in ("transformers_version", "_name_or_path", "dtype") and saved.get(name) != given.get(name):
            raise CheckpointError(
                f"{name}={given.get(name)} of the model differs from {name}={saved.get(name)} of {checkpoint.path}, "
                "which belongs to another model; go on with the model that began the run, or start a new run"
            )


def _flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
