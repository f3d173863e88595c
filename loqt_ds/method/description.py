"""What model a configuration asks for, before anything of it exists: transformers' configuration, and the dtype."""

from __future__ import annotations

from typing import Any

import torch

from loqt_ds.config import Config, ConfigError, describe_model


def transformers_config(description: dict[str, Any], where: str) -> Any:
    """The transformers configuration of a JSON description. Raises ConfigError, naming `where`, if there is none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**description)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(
            f"{where}: transformers cannot make a model of it ({' '.join(str(error).split())})"
        ) from error


def model_description(config: Config, *, vocab_size: int | None = None) -> Any:
    """The transformers configuration of `model.shape` or `model.path`.

    `vocab_size` (a tokenizer's, say) overrides what the file says; so does a number in `model.vocab_size`.
    Raises ConfigError for what is no language model, and for classes that nobody has counted.
    """
    file, content = describe_model(config)
    description = transformers_config(content, str(file))
    if not isinstance(getattr(description, "vocab_size", None), int):
        raise ConfigError(f"{file}: {content['model_type']} has no vocab_size of its own; give a text-only model")
    wanted = config.model.vocab_size
    if vocab_size is None and isinstance(wanted, int):
        vocab_size = wanted
    if vocab_size is not None:
        description.vocab_size = vocab_size
    if config.model.task == "classification":
        description.num_labels = _num_labels(config, content, str(file))
        description.problem_type = "single_label_classification"
    elif config.model.task == "regression":
        description.num_labels, description.problem_type = 1, "regression"
    return description


def num_positions(model_config: Any) -> int | None:
    """Tokens that a model can see; None where nothing limits them (XLNet says -1)."""
    longest = getattr(model_config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _num_labels(config: Config, content: dict[str, Any], where: str) -> int:
    """Classes: those of the option, or of the file. (transformers' own default of 2 would be a guess.)"""
    names = content.get("id2label")
    found = config.model.num_labels or content.get("num_labels") or (len(names) if isinstance(names, dict) else None)
    if not isinstance(found, int) or found < 2:
        raise ConfigError(
            f"model.num_labels={config.model.num_labels} with model.task=classification: {where} does not say how many "
            "classes there are; give model.num_labels"
        )
    return found


def training_dtype(config: Config) -> torch.dtype:
    """bfloat16 or float32; auto is bfloat16 where there is a CUDA device that the run may use and that computes it in
    hardware."""
    if config.train.dtype == "auto":
        cuda = config.train.device != "cpu" and torch.cuda.is_available()
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float32
    return torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
