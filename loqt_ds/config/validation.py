"""Refuses a configuration that cannot be honoured, before any data or weight is loaded.

Three kinds of rules, each with option, value and remedy in its message:
  ranges          one option alone (sizes, rates, shares, names);
  contradictions  options that exclude one another;
  inactive        an option that was changed although nothing would read it. Its default is always fine: what is off may
                  keep the defaults of its settings, but nothing a user wrote is silently ignored.
Only the model's JSON description is read here. What needs the model itself (rank against the smaller side, patterns,
vocabulary) is checked where the model is described, on the meta device; data files are checked where they are opened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loqt_ds.config.fields import Config
from loqt_ds.config.parsing import ConfigError, check_types, field_types, find_config_file

# option -> (test, what is valid)
_positive = (lambda value: value >= 1, "at least 1")
_not_negative = (lambda value: value >= 0, "at least 0")
_above_zero = (lambda value: value > 0, "above 0")
_share = (lambda value: 0 <= value <= 1, "from 0 to 1")

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model.vocab_size": (lambda value: value == "auto" or value >= 2, "at least 2, auto, or null"),
    "model.num_labels": (lambda value: value >= 2, "at least 2"),
    "loqt.rank": _positive,
    "loqt.alpha": _above_zero,
    "loqt.interval": _positive,
    "loqt.growth": _not_negative,
    "loqt.max_gap": _positive,
    "loqt.compensation_steps": _not_negative,
    "loqt.sketch_oversampling": _not_negative,
    "loqt.dequantized_cache_gib": _not_negative,
    "data.validation_fraction": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "data.tokenizer_vocab_size": (lambda value: value >= 300, "at least 300 (256 bytes, special pieces, some text)"),
    "data.sequence_length": (lambda value: value >= 2, "at least 2"),
    "data.num_processes": _positive,
    "optim.lr": _above_zero,
    "optim.lr_full_rank": _above_zero,
    "optim.eps": _above_zero,
    "optim.weight_decay": _not_negative,
    "optim.warmup_steps": _not_negative,
    "optim.warmup_ratio": _share,
    "optim.min_lr_ratio": _share,
    "optim.rewarmup_steps": _positive,
    "train.max_steps": _positive,
    "train.epochs": (lambda value: value > 0, "above 0, or null for train.max_steps"),
    "train.micro_batch_size": _positive,
    "train.gradient_accumulation_steps": _positive,
    "train.seed": (lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
    "train.max_grad_norm": (lambda value: value > 0, "above 0, or null for no clipping"),
    "train.max_grad_norm_per_parameter": (lambda value: value > 0, "above 0, or null for no clipping"),
    "train.memory_limit_gib": (lambda value: value > 0, "above 0, or null for the whole device"),
    "train.device": (lambda value: bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)), "auto, cpu, cuda, or cuda:N"),
    "train.collective_timeout_seconds": _positive,
    "fsdp.num_replicas": _positive,
    "eval.every": (lambda value: value == "epoch" or value >= 0, "at least 0, or epoch"),
    "eval.patience": (lambda value: value >= 1, "at least 1, or null to train to the end"),
    "eval.max_examples": (lambda value: value >= 1, "at least 1, or null for all held-out prompts"),
    "eval.max_new_tokens": _positive,
    "eval.max_tokens": (lambda value: value >= 1, "at least 1, or null for all held-out documents"),
    "eval.micro_batch_size": _positive,
    "eval.num_samples": _not_negative,
    "eval.sample_tokens": _positive,
    "checkpoint.every": _positive,
    "checkpoint.keep": _not_negative,
    "logging.every": _positive,
    "name": (lambda value: bool(re.fullmatch(r"\w[\w.+-]*", value)), "letters, digits, . _ + - (it names a directory)"),
}


def options(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(option as a user writes it, value, default) of every option."""
    default = Config()
    for name, hint in field_types(Config).items():
        if not dataclasses.is_dataclass(hint):
            yield name, getattr(config, name), getattr(default, name)
            continue
        section, section_default = getattr(config, name), getattr(default, name)
        for inner in field_types(hint):
            yield f"{name}.{inner}", getattr(section, inner), getattr(section_default, inner)


def validate(config: Config) -> None:
    """Raises ConfigError for the first option or combination that cannot be honoured. Changes nothing, loads
    nothing."""
    check_types(config)
    _check_ranges(config)
    _check_model(config)
    _check_loqt(config)
    _check_data(config)
    _check_examples(config)
    _check_task(config)
    _check_optim(config)
    check_steps(config)
    _check_engine(config)
    _check_run(config)
    _check_inactive(config)
    _check_description(config)


def validate_training(config: Config) -> None:
    """As `validate`, of what concerns the method, the optimizer and the steps alone: model and data are elsewhere."""
    check_types(config)
    _check_ranges(config)
    _check_loqt(config)
    _check_optim(config)
    check_steps(config)
    _check_inactive(config)


def _check_ranges(config: Config) -> None:
    for name, value, _ in options(config):
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigError(f"{name}={value} is not a finite number; give one")
        if value in ("", []) or (isinstance(value, list) and "" in value):
            raise ConfigError(f"{name}={value!r} is empty; give a value, or leave the option out")
        if value is not None and name in RANGES:
            test, valid = RANGES[name]
            if not test(value):
                raise ConfigError(f"{name}={value} is out of range; it must be {valid}")


def _check_model(config: Config) -> None:
    model = config.model
    if model.shape is None and model.path is None:
        raise ConfigError(
            "model.shape=null and model.path=null: there is no model; give model.shape (a file of configs/models, such "
            "as llama_9m) or model.path (a checkpoint directory)"
        )
    if model.shape is not None and model.path is not None:
        raise ConfigError(
            f"model.shape={model.shape} and model.path={model.path} exclude one another; set model.shape=null to start "
            "from the checkpoint, or model.path=null to start from random weights"
        )
    if model.path is not None and model.vocab_size is not None:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} cannot change the checkpoint model.path={model.path}; set "
            "model.vocab_size=null"
        )
    if model.attention == "flash_attention_2" and (config.train.device == "cpu" or config.train.dtype == "fp32"):
        raise ConfigError(
            f"model.attention=flash_attention_2 needs a CUDA device and bf16, but train.device={config.train.device} "
            f"and train.dtype={config.train.dtype}; use model.attention=sdpa"
        )
    if model.kernels == "liger" and config.train.lean_activations is False:
        raise ConfigError(
            "model.kernels=liger with train.lean_activations=false: Liger's normalization and gated activation keep as "
            "little as lean activations do; set train.lean_activations=true, or model.kernels=torch"
        )
    if model.kernels == "liger" and config.train.compile:
        raise ConfigError(
            "model.kernels=liger with train.compile=true: Liger's kernels have no place in a compiled graph, and the "
            "compiler fuses the same operations; use model.kernels=torch, or train.compile=false"
        )


def _check_loqt(config: Config) -> None:
    loqt = config.loqt
    if loqt.schedule == "exponential" and loqt.growth < 1:
        raise ConfigError(
            f"loqt.growth={loqt.growth} with loqt.schedule=exponential makes no gap grow; give at least 1, or use "
            "loqt.schedule=static"
        )
    if loqt.max_gap is not None and loqt.max_gap < loqt.interval and loqt.schedule in ("exponential", "linear"):
        raise ConfigError(
            f"loqt.max_gap={loqt.max_gap} is below loqt.interval={loqt.interval}, so that every gap would be cut; use "
            f"loqt.schedule=static with loqt.interval={loqt.max_gap}, or a loqt.max_gap of at least {loqt.interval}"
        )
    for letter in ("w", "p"):
        if getattr(loqt, f"double_quant_{letter}") and getattr(loqt, f"quantize_{letter}") == "none":
            remedy = {"both": "w" if letter == "p" else "p"}.get(loqt.double_quant, "none")
            raise ConfigError(
                f"loqt.double_quant={loqt.double_quant} with loqt.quantize_{letter}=none: there is no absmax of "
                f"{letter.upper()} to quantize again; set loqt.double_quant={remedy}"
            )
    if isinstance(loqt.target_modules, str) and loqt.target_modules != "all-linear":
        try:
            re.compile(loqt.target_modules)
        except re.error as error:
            raise ConfigError(
                f"loqt.target_modules={loqt.target_modules!r} is not a regular expression ({error}); give one, a list "
                "of name suffixes such as [q_proj, v_proj], or all-linear"
            ) from error


def _check_data(config: Config) -> None:
    data = config.data
    if data.path is not None and data.name is not None:
        raise ConfigError(
            f"data.path={data.path} and data.name={data.name} exclude one another; set data.path=null or data.name=null"
        )
    if data.validation_path is not None and data.validation_split is not None:
        raise ConfigError(
            f"data.validation_path={data.validation_path} and data.validation_split={data.validation_split} exclude "
            "one another; set one of them to null"
        )
    if data.name is None:
        for name in ("config_name", "validation_split", "streaming", "split"):
            value, default = getattr(data, name), getattr(type(data)(), name)
            if value != default:
                remedy = "null" if default is None else str(default).lower()
                raise ConfigError(
                    f"data.{name}={value} needs a named data set, but data.name=null; set data.name, or "
                    f"data.{name}={remedy}"
                )
    elif data.validation_split == data.split:
        raise ConfigError(
            f"data.validation_split={data.validation_split} is data.split, which is trained on; validate on another "
            "split, or set data.validation_split=null to hold out data.validation_fraction of it"
        )
    if data.mask_documents and data.packing == "truncated":
        raise ConfigError(
            "data.mask_documents=true with data.packing=truncated: a row holds one document, there is nothing to mask; "
            "set data.mask_documents=false"
        )
    if data.mask_documents and config.model.attention != "sdpa":
        raise ConfigError(
            "data.mask_documents=true needs an attention that takes a mask per row, "
            f"model.attention={config.model.attention} does not; use model.attention=sdpa"
        )


def _check_examples(config: Config) -> None:
    """Data sets of examples: prompts and responses, or texts and labels."""
    data, metric = config.data, config.eval.metric
    if metric != "loss":
        needed = "instruction" if metric == "exact_match" else "classification"
        if data.format != needed:
            raise ConfigError(
                f"eval.metric={metric} needs data.format={needed}, but data.format={data.format}; use eval.metric=loss"
            )
        _check_score(config)
    if data.format == "text":
        return
    if data.path is None and data.name is None:
        raise ConfigError(
            f"data.format={data.format} needs a data set of examples, but data.path=null and data.name=null; give one"
        )
    if data.tokenizer is None and config.model.path is None:
        raise ConfigError(
            f"data.format={data.format} with data.tokenizer=null: a tokenizer is trained from text only; give "
            "data.tokenizer, or model.path, whose tokenizer is then used"
        )
    for option, value in (("streaming", data.streaming), ("mask_documents", data.mask_documents)):
        if value:
            raise ConfigError(
                f"data.{option}=true with data.format={data.format}: every row is one example of a data set that is "
                f"read as a whole; set data.{option}=false"
            )
    _check_labels(config)
    if data.prompt_template is not None and "{prompt}" not in data.prompt_template:
        raise ConfigError(
            f"data.prompt_template={data.prompt_template!r} has no place for the prompt; write {{prompt}} where it goes"
        )


# task -> what its model can be judged by, besides the loss and GLUE's mean
_SCORES = {"classification": ("accuracy", "f1", "matthews"), "regression": ("pearson", "spearman")}


def _check_score(config: Config) -> None:
    """That eval.metric, a score, is one of this task's; else the first evaluation would find out, after much work."""
    metric, task = config.eval.metric, config.model.task
    if metric == "glue" and config.data.glue_task is None:
        raise ConfigError(
            "eval.metric=glue with data.glue_task=null: it is the mean of what a task of GLUE is judged by; give "
            f"data.glue_task, or one of {', '.join(_SCORES.get(task, ('loss',)))}"
        )
    others = [name for name, scores in _SCORES.items() if metric in scores and name != task]
    if others:
        raise ConfigError(
            f"eval.metric={metric} is a score of model.task={others[0]}, but model.task={task}; use "
            f"{', '.join((*_SCORES.get(task, ()), 'loss'))}"
        )


def _check_labels(config: Config) -> None:
    """Texts with labels."""
    data = config.data
    if data.format != "classification":
        return
    if len(data.text_fields) > 2:
        raise ConfigError(f"data.text_fields={data.text_fields} has {len(data.text_fields)} columns; give one or two")
    if data.labels is not None and len(set(data.labels)) < len(data.labels):
        raise ConfigError(f"data.labels={data.labels} has a class twice; name each once")
    if data.glue_task is not None and isinstance(data.path, list):
        raise ConfigError(f"data.path={data.path} with data.glue_task={data.glue_task}: give the task's one directory")


def _check_task(config: Config) -> None:
    """What the model is trained for, and what the data are."""
    task, data_format = config.model.task, config.data.format
    formats = {"causal_lm": ("text", "instruction"), "masked_lm": ("text",)}.get(task, ("classification",))
    if data_format not in formats:
        tasks = {"classification": "classification (or regression)"}.get(data_format, "causal_lm")
        raise ConfigError(
            f"model.task={task} with data.format={data_format} does not go together; set model.task={tasks}, or "
            f"data.format={formats[0]}"
        )
    if task == "masked_lm" and config.data.mask_documents:
        raise ConfigError(
            "data.mask_documents=true with model.task=masked_lm: attention within documents is there for causal "
            "language models only; set data.mask_documents=false"
        )


def _check_optim(config: Config) -> None:
    optim, train = config.optim, config.train
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas={optim.betas} is out of range; give two numbers of at least 0 and below 1")
    if optim.layerwise and train.max_grad_norm is not None:
        raise ConfigError(
            "optim.layerwise=true updates inside the backward pass, before the norm of all gradients is known, so "
            f"that train.max_grad_norm={train.max_grad_norm} cannot be applied; set train.max_grad_norm=null (and "
            f"train.max_grad_norm_per_parameter={train.max_grad_norm} to clip each parameter's gradient by its own "
            "norm), or optim.layerwise=false"
        )
    if train.max_grad_norm is not None and train.max_grad_norm_per_parameter is not None:
        raise ConfigError(
            f"train.max_grad_norm={train.max_grad_norm} and train.max_grad_norm_per_parameter="
            f"{train.max_grad_norm_per_parameter} would scale every gradient twice; set one of them to null"
        )
    if optim.master == "bf16" and train.dtype != "bf16":
        raise ConfigError(
            f"optim.master=bf16 keeps no fp32 weights, but train.dtype={train.dtype} "
            f"{'trains in them' if train.dtype == 'fp32' else 'may choose them'}; set train.dtype=bf16, or "
            "optim.master=fp32"
        )
    if optim.schedule == "cosine_rewarmup":
        loqt = config.loqt
        if loqt.schedule == "never":
            raise ConfigError(
                "optim.schedule=cosine_rewarmup ramps after each re-initialization, but loqt.schedule=never has none; "
                "use optim.schedule=cosine"
            )
        if optim.rewarmup_steps > loqt.interval:
            raise ConfigError(
                f"optim.rewarmup_steps={optim.rewarmup_steps} is more than loqt.interval={loqt.interval}: the next "
                f"re-initialization would come before the ramp has ended; use at most {loqt.interval}"
            )


def check_steps(config: Config, written: Config | None = None) -> None:
    """How long the run is, how often it is evaluated, and what follows from that; again, once epochs are steps:
    `written` is then what was given, for messages."""
    train, evaluation = config.train, config.eval
    written = written or config
    if train.max_steps is None and train.epochs is None:
        raise ConfigError("train.max_steps=null and train.epochs=null: how long is not said; give one of them")
    if train.max_steps is not None and train.epochs is not None:
        raise ConfigError(
            f"train.max_steps={train.max_steps} and train.epochs={train.epochs:g} exclude one another; set "
            "train.max_steps=null to train for epochs, or train.epochs=null"
        )
    if config.data.streaming and (train.epochs is not None or evaluation.every == "epoch"):
        option = "eval.every=epoch" if train.epochs is None else f"train.epochs={train.epochs:g}"
        raise ConfigError(
            f"{option} with data.streaming=true: a stream's rows are not counted before they are read; give a number "
            "of steps, or data.streaming=false"
        )
    length = f"train.max_steps={train.max_steps}"
    if written.train.epochs is not None:
        length = f"train.epochs={written.train.epochs:g}"
        length += "" if train.max_steps is None else f" ({train.max_steps} steps)"
    if train.max_steps is not None and config.num_warmup_steps > train.max_steps:
        raise ConfigError(
            f"optim.warmup_steps={config.optim.warmup_steps} is more than {length}; use at most {train.max_steps}"
        )
    for option, is_on in (
        ("checkpoint.best=true", config.checkpoint.best),
        (f"eval.patience={evaluation.patience}", evaluation.patience is not None),
    ):
        if is_on and _has_one_evaluation(config):
            raise ConfigError(
                f"{option} with eval.every={written.eval.every}{'' if evaluation.every == 0 else f' of {length}'}: "
                f"there is one evaluation, at the end, and nothing to choose from; set "
                f"{_how_to_evaluate_more(config, written)}, or leave the option out"
            )


def _has_one_evaluation(config: Config) -> bool:
    every, train = config.eval.every, config.train
    if isinstance(every, str):
        return train.epochs is not None and train.epochs <= 1
    return every == 0 or (train.max_steps is not None and every >= train.max_steps)


def _how_to_evaluate_more(config: Config, written: Config) -> str:
    steps = "" if config.train.max_steps is None else f" below {config.train.max_steps}"
    if written.eval.every == "epoch" and written.train.epochs is not None:
        return f"train.epochs above 1, or eval.every to a number of steps{steps}"
    return "eval.every" if config.eval.every == 0 else f"eval.every{steps}"


def _check_engine(config: Config) -> None:
    """What FSDP2 cannot honour."""
    if config.engine != "fsdp2":
        return
    if config.optim.layerwise:
        raise ConfigError(
            "optim.layerwise=true with engine=fsdp2: the gradients of a block come together, reduced and sharded, and "
            "what is left of them is small; set optim.layerwise=false"
        )
    if config.train.max_grad_norm_per_parameter is not None:
        raise ConfigError(
            f"train.max_grad_norm_per_parameter={config.train.max_grad_norm_per_parameter} with engine=fsdp2: it is "
            "the clipping of layer-wise updates on one device; use train.max_grad_norm, over all shards"
        )
    if config.export.base is not None:
        raise ConfigError(
            f"export.base={config.export.base} with engine=fsdp2: W is compared with the base's before training, when "
            "no rank has all of it any more; set export.format=none, and make the adapter of a checkpoint afterwards "
            f"(tools/export.py --format adapter --base {config.export.base})"
        )
    if not config.fsdp.shard_frozen:
        return
    if config.loqt.dequantized_cache_gib:
        raise ConfigError(
            f"loqt.dequantized_cache_gib={config.loqt.dequantized_cache_gib:g} with fsdp.shard_frozen=true: one keeps "
            "whole dequantized weights on every rank, the other not even the packed ones; set "
            "loqt.dequantized_cache_gib=0, or fsdp.shard_frozen=false"
        )
    if config.eval.metric == "exact_match":
        raise ConfigError(
            "eval.metric=exact_match with fsdp.shard_frozen=true: answers have different lengths, and a rank that is "
            "done would leave the others waiting for its part of the weights; set fsdp.shard_frozen=false, or "
            "eval.metric=loss"
        )


def _check_run(config: Config) -> None:
    if config.output_dir is not None and os.path.isfile(config.output_dir):
        raise ConfigError(f"output_dir={config.output_dir} is a file; give a directory")
    base, loqt = config.export.base, config.loqt
    if config.export.format != "adapter" or base is None:
        return
    if not os.path.isfile(os.path.join(base, "config.json")):
        raise ConfigError(f"export.base={base} is no model directory; give the directory base of an adapter's export")
    if loqt.schedule != "never" or (loqt.compensation_steps > 1 and loqt.quantize_w != "none"):
        raise ConfigError(
            f"export.base={base} with loqt.schedule={loqt.schedule} and loqt.compensation_steps="
            f"{loqt.compensation_steps}: W becomes another one than the base's; set loqt.schedule=never and "
            "loqt.compensation_steps=1, or export.base=null"
        )


def _inactive_rules(config: Config) -> Iterator[tuple[bool, str, str, tuple[Any, ...]]]:
    """(inactive?, option, why nothing reads it, values besides the default that also mean `off`)."""
    loqt, data, optim = config.loqt, config.data, config.optim
    never, static = loqt.schedule == "never", loqt.schedule == "static"
    corpus = data.path is None and data.name is None
    task = config.model.task
    for name in ("shard_frozen", "num_replicas", "reshard_after_forward"):
        yield config.engine != "fsdp2", f"fsdp.{name}", f"with engine={config.engine} (engine=fsdp2 has it)", ()
    yield task != "classification", "model.num_labels", f"with model.task={task}", ()
    yield config.export.format != "adapter", "export.base", f"with export.format={config.export.format}", ()
    yield never, "loqt.interval", "with loqt.schedule=never", ()
    yield never or static, "loqt.growth", f"with loqt.schedule={loqt.schedule}", ()
    yield never or static, "loqt.max_gap", f"with loqt.schedule={loqt.schedule}", ()
    yield never, "loqt.optimizer_state", "with loqt.schedule=never", ()
    yield loqt.quantize_w == "none", "loqt.dequantized_cache_gib", "with loqt.quantize_w=none (W is dense)", (0,)
    yield loqt.quantize_w == "none", "loqt.compensation_steps", "with loqt.quantize_w=none (no error)", (0,)
    yield loqt.subspace in ("exact", "gram"), "loqt.sketch_oversampling", f"with loqt.subspace={loqt.subspace}", (0,)
    yield optim.schedule != "cosine_rewarmup", "optim.rewarmup_steps", f"with optim.schedule={optim.schedule}", ()
    yield optim.schedule == "constant", "optim.min_lr_ratio", "with optim.schedule=constant", (1.0,)
    b_alone = not optim.train_full_rank and config.model.task in ("causal_lm", "masked_lm")  # others have a head anew
    yield b_alone, "optim.lr_full_rank", "with optim.train_full_rank=false", ()
    yield optim.warmup_steps is not None, "optim.warmup_ratio", f"with optim.warmup_steps={optim.warmup_steps}", ()
    yield corpus, "data.text_field", "with the standard library as corpus (no data.path, no data.name)", ()
    held_out = data.validation_path is not None or data.validation_split is not None
    yield held_out, "data.validation_fraction", "with data.validation_path or data.validation_split", ()
    yield data.tokenizer is not None, "data.tokenizer_vocab_size", f"with data.tokenizer={data.tokenizer}", ()
    yield config.eval.num_samples == 0, "eval.sample_tokens", "with eval.num_samples=0", ()
    for name, off in (("num_samples", (0,)), ("sample_tokens", ())):
        yield task != "causal_lm", f"eval.{name}", f"with model.task={task}, which continues no text", off
    yield data.format == "classification", "data.num_processes", "with data.format=classification", ()
    yield from _inactive_example_rules(config)


def _inactive_example_rules(config: Config) -> Iterator[tuple[bool, str, str, tuple[Any, ...]]]:
    """As `_inactive_rules`, of data sets of examples."""
    data = config.data
    for name in ("prompt_field", "response_field", "messages_field", "prompt_template", "chat_template"):
        yield data.format != "instruction", f"data.{name}", f"with data.format={data.format}", ()
    for name in ("glue_task", "text_fields", "label_field", "labels"):
        yield data.format != "classification", f"data.{name}", f"with data.format={data.format}", ()
    for name in ("header", "quoting"):
        yield data.format == "text", f"data.{name}", "with data.format=text", ()
    for name in (
        "text_fields",
        "label_field",
        "labels",
        "header",
        "quoting",
        "validation_split",
        "validation_fraction",
    ):
        yield data.glue_task is not None, f"data.{name}", f"with data.glue_task={data.glue_task}", ()
    for name in ("header", "quoting"):
        no_files = data.name is not None and data.validation_path is None
        yield no_files, f"data.{name}", f"with data.name={data.name}", ()
    yield config.model.task == "regression", "data.labels", "with model.task=regression", ()
    for name in ("text_field", "packing"):
        yield data.format != "text", f"data.{name}", f"with data.format={data.format}", ()
    conversation = data.messages_field is not None
    for name in ("prompt_field", "response_field", "prompt_template"):
        yield conversation, f"data.{name}", f"with data.messages_field={data.messages_field}", ()
    has_template = data.chat_template is not None
    yield has_template, "data.prompt_template", f"with data.chat_template={data.chat_template}", ()
    for name in ("max_examples", "max_new_tokens"):
        yield config.eval.metric != "exact_match", f"eval.{name}", f"with eval.metric={config.eval.metric}", ()


def _check_inactive(config: Config) -> None:
    values = {name: (value, default) for name, value, default in options(config)}
    for inactive, name, why, off in _inactive_rules(config):
        value, default = values[name]
        if inactive and value != default and value not in off:
            fine = "null" if default is None else default
            raise ConfigError(f"{name}={value} has no effect {why}; leave it at its default, {name}={fine}")


def describe_model(config: Config) -> tuple[Path, dict[str, Any]]:
    """The JSON description of the model, (file, content), of model.shape or model.path; ConfigError where there is
    none."""
    if config.model.path is not None:
        folder = Path(config.model.path)
        if not folder.is_dir():
            raise ConfigError(f"model.path={config.model.path} is not a directory; give a checkpoint directory")
        file, option = folder / "config.json", f"model.path={config.model.path}"
    else:
        shape = str(config.model.shape)
        option = f"model.shape={shape}"
        if shape.endswith(".json"):
            file = Path(shape)
        else:
            try:
                file = find_config_file("models", shape)
            except ConfigError as error:
                raise ConfigError(f"{option}: {error}") from error
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=_special_float)
    except OSError as error:
        raise ConfigError(f"{option}: {file} cannot be read ({error.strerror}); give a transformers config") from error
    except (ValueError, TypeError) as error:  # JSONDecodeError, UnicodeDecodeError, what is no float
        raise ConfigError(f"{option}: {file} is not valid JSON ({error})") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(f"{option}: {file} has no model_type; it is not a transformers config")
    return file, content


def _special_float(content: dict[str, Any]) -> Any:
    """transformers writes an infinity, which JSON has not, as {"__float__": "Infinity"}."""
    return float(content["__float__"]) if content.keys() == {"__float__"} else content


def _check_description(config: Config) -> None:
    file, content = describe_model(config)
    longest = content.get("max_position_embeddings")
    if isinstance(longest, int) and config.data.sequence_length > longest > 0:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is more than max_position_embeddings={longest} of "
            f"{file}; use at most {longest}"
        )
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        value = content.get(name)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{file}: {name}={value} is out of range; it must be at least 1")
    hidden, heads = content.get("hidden_size"), content.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and hidden % heads and content.get("head_dim") is None:
        raise ConfigError(f"{file}: hidden_size={hidden} does not divide by num_attention_heads={heads}; change one")
