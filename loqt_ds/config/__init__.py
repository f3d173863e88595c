"""Configuration of a run: dataclasses, a YAML file, overrides, and refusal of what cannot be honoured.

    config = load_config("configs/recipes/default.yaml", ["loqt.rank=64", "train.max_steps=100"])

`fields` declares every option with its docstring, `parsing` turns text into them and back, `validation` refuses
contradictions. Precedence: defaults, then the file, then overrides. The saved configuration alone reproduces the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loqt_ds.config.fields import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ExportConfig,
    FSDPConfig,
    LoggingConfig,
    LoQTConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from loqt_ds.config.parsing import (
    ConfigError,
    apply_overrides,
    find_config_file,
    from_dict,
    help_text,
    option_names,
    parse_section,
    read_yaml,
    resolve_paths,
    save_yaml,
)
from loqt_ds.config.validation import check_steps, describe_model, validate, validate_training

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "FSDPConfig",
    "LoQTConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "apply_overrides",
    "check_steps",
    "describe_model",
    "find_config_file",
    "from_dict",
    "help_text",
    "load_config",
    "option_names",
    "parse_section",
    "read_yaml",
    "resolve_paths",
    "save_yaml",
    "validate",
    "validate_training",
]


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a run, with absolute paths.

    `path` is a YAML file or the name of a recipe in configs/recipes; None starts from the defaults alone. `overrides`
    are `section.field=value`. Raises ConfigError (a ValueError) that names file, option, value and remedy.
    """
    if path is None:
        config = Config()
    else:
        file = Path(path)
        if not file.is_file() and file.suffix not in (".yaml", ".yml"):
            file = find_config_file("recipes", str(path))
        config = from_dict(read_yaml(file), source=str(file))
    apply_overrides(config, overrides)
    resolve_paths(config)
    validate(config)
    return config
