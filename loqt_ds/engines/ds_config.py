"""DeepSpeed configurations: what may stand in one, what cannot be honoured and why, and how it meets our options.

Two ways in:

- `check_deepspeed(file, config)`: the launcher's. The recipe decides batch sizes, dtype, clipping, optimizer and
  learning rate, the JSON decides ZeRO; a value in both must agree.
- `plugin_config(config)`: of `loqt_ds.initialize`. The JSON decides everything, our options stand in its section
  `"loqt"`: those of the method, and `optim` (a section as in a recipe), `seed`, `max_steps`,
  `collective_timeout_seconds`.

DeepSpeed itself ignores unknown top-level keys; here they are refused.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from loqt_ds.config import Config, ConfigError, from_dict, validate_training
from loqt_ds.engines.processes import world_size

_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_HONOURED = (
    *_BATCH_SIZES,
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "loqt",
    "zero_allow_untested_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "csv_monitor",
)
_REFUSED = {
    "amp": "it casts modules that it does not know; use bf16, fp16 or torch_autocast",
    "data_types": "gradients are accumulated in the dtype of the parameters; remove it",
    "pipeline": "a layer's gradient must reach its owner whole; use data parallelism",
    "tensor_parallel": "a layer's weight must be whole on its rank; use data parallelism",
    "sequence_parallel_size": "a layer's gradient is summed over data-parallel ranks; use data parallelism",
    "compression_training": "weights are quantized by LoQT; remove it",
    "hybrid_engine": "it rewrites linear layers; remove it",
}
_REFUSED_WITH_RECIPE = {
    "optimizer": "the optimizer is built from the recipe's `optim` section; remove it there",
    "scheduler": "the learning rate follows the recipe's `optim` section; remove it there",
    "activation_checkpointing": "set train.activation_checkpointing of the recipe instead",
    "data_efficiency": "batches come from the recipe's `data` section; remove it",
    "curriculum_learning": "batches come from the recipe's `data` section; remove it",
    "fp16": "a recipe trains in bf16 or float32; remove it and set train.dtype",
    "torch_autocast": "a recipe trains in bf16 or float32; remove it and set train.dtype",
}
_REFUSED_ZERO = {
    "offload_optimizer": "re-initialization rewrites optimizer states on the device; remove it",
    "offload_param": "the trained parameters are few; remove it",
    "cpu_offload": "re-initialization rewrites optimizer states on the device; remove it",
    "zero_hpz_partition_size": "it belongs to ZeRO stage 3; remove it",
    "elastic_checkpoint": "our checkpoints are read by any number of ranks; remove it",
}
_BF16_MASTERS = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
_PLUGIN_OPTIONS = ("optim", "seed", "max_steps", "collective_timeout_seconds")
_OPTIMIZERS = ("Adam", "AdamW")


def read_json(path: str | Path, *, option: str) -> dict[str, Any]:
    """The object in a DeepSpeed configuration file."""
    file = Path(path)
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be read ({error.strerror}); try configs/zero2.json") from error
    except ValueError as error:
        raise ConfigError(f"{option} {file} is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{option} {file} holds no JSON object; try configs/zero2.json")
    return given


def _is_off(name: str, value: Any) -> bool:
    """Whether a section that cannot be honoured asks for nothing, as configurations that were copied often do."""
    if name == "sequence_parallel_size":
        return value == 1
    if not isinstance(value, dict):
        return False
    if name == "tensor_parallel":
        return value.get("autotp_size", 0) in (0, 1)
    return value.get("enabled") is False or value.get("device") == "none"


def _check_sections(
    given: dict[str, Any], where: str, *, refused: dict[str, str], honoured: Iterable[str] = _HONOURED
) -> None:
    """What is the same for both ways in: sections that cannot be honoured, or are not known."""
    known = tuple(honoured)
    for name, section in given.items():
        if name in refused and section and not _is_off(name, section):
            raise ConfigError(f"{where}: `{name}` cannot be honoured: {refused[name]}")
        if name not in known and name not in refused:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"use some of {', '.join(known)}"
            raise ConfigError(f"{where}: `{name}` is not a section that is read; {hint}")
    for name in ("zero_optimization", "bf16", "fp16", "torch_autocast", "loqt", "optimizer", "scheduler"):
        if not isinstance(given.get(name, {}), dict):
            raise ConfigError(f"{where}: {name}={given[name]!r} must be an object; see configs/zero2.json")
    zero = given.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2):
        raise ConfigError(
            f"{where}: zero_optimization.stage={zero.get('stage', 0)} is not supported: frozen weights are buffers, "
            "which stage 3 would not shard, and re-initialization would gather every layer; use 0, 1 or 2"
        )
    if given.get("fp16", {}).get("enabled") and not zero.get("stage", 0):
        raise ConfigError(
            f"{where}: fp16 with zero_optimization.stage=0: DeepSpeed 0.19.8 divides gradients by a loss scale that it "
            "has not multiplied the loss with; use stage 1 or 2, or bf16"
        )
    for name, reason in _REFUSED_ZERO.items():
        if zero.get(name) and not _is_off(name, zero[name]):
            raise ConfigError(f"{where}: zero_optimization.{name} cannot be honoured: {reason}")
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            f"{where}: zero_optimization.compute_grad_norm=false: the norm decides what is skipped; remove it"
        )
    bf16 = given.get("bf16", {})
    if extra := sorted(set(bf16) - {"enabled", "check_grad_overflow"}):
        raise ConfigError(
            f"{where}: bf16.{extra[0]} cannot be honoured: masters follow optim.master (bf16 or fp32); remove it"
        )
    if bf16.get("check_grad_overflow") is False:
        raise ConfigError(
            f"{where}: bf16.check_grad_overflow=false cannot be honoured: a step whose gradient is not finite must be "
            "skipped; remove it"
        )


def _check_optim(config: Config, stage: int) -> None:
    """Options of ours that ZeRO cannot honour."""
    if config.optim.layerwise:
        raise ConfigError("optim.layerwise=true: ZeRO updates after the backward; use `python -m loqt_ds.train`")
    if config.train.max_grad_norm_per_parameter is not None:
        raise ConfigError(
            f"train.max_grad_norm_per_parameter={config.train.max_grad_norm_per_parameter}: ZeRO cuts gradients into "
            "parts that know no parameters, and clips by the norm of all; use train.max_grad_norm, or "
            "`python -m loqt_ds.train`"
        )
    if config.optim.master == "bf16" and stage == 0:
        raise ConfigError(
            "optim.master=bf16 with zero_optimization.stage=0: stage 0 keeps float32 masters of bf16 weights; use "
            "stage 1 or 2, or optim.master=fp32"
        )


def _complete(given: dict[str, Any], config: Config, where: str) -> dict[str, Any]:
    """The configuration as DeepSpeed gets it; raises where DeepSpeed would refuse it."""
    bf16 = given.get("bf16", {}) | {"enabled": config.train.dtype == "bf16"}
    if config.optim.master == "bf16":
        bf16 |= _BF16_MASTERS
    complete = given | {"bf16": bf16, "zero_allow_untested_optimizer": True}
    complete.pop("loqt", None)
    tried = dict(complete)
    if not torch.distributed.is_initialized() and "train_micro_batch_size_per_gpu" in tried:
        tried.pop("train_batch_size", None)  # DeepSpeed would take this process for the only one
    _resolved(tried, where)
    return complete


def _resolved(complete: dict[str, Any], where: str) -> DeepSpeedConfig:
    try:
        return DeepSpeedConfig(complete)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:  # what its sections raise
        raise ConfigError(f"{where}: DeepSpeed refuses it: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------- with a recipe


def check_deepspeed(path: str | Path, config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the file, completed from the recipe.

    Raises ConfigError, before any weight is loaded, for a file that cannot be read, for a value that differs from the
    recipe's, naming both places, for anything that cannot be honoured, and for anything that is not known.
    """
    given, where = read_json(path, option="--ds_config"), str(path)
    _check_sections(given, where, refused=_REFUSED | _REFUSED_WITH_RECIPE)
    if config.train.device not in ("auto", *_launched_devices()):
        raise ConfigError(
            f"train.device={config.train.device}: under DeepSpeed the launcher decides the device; use "
            "train.device=auto, and CUDA_VISIBLE_DEVICES or DS_ACCELERATOR=cpu to choose"
        )
    _check_optim(config, given.get("zero_optimization", {}).get("stage", 0))
    return _complete(given | _derived(given, config, where), config, where)


def _launched_devices() -> tuple[str, ...]:
    """The names of the device that DeepSpeed will use in this process."""
    kind = get_accelerator().device_name()
    return kind, f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"


def _derived(given: dict[str, Any], config: Config, where: str) -> dict[str, Any]:
    """Values the recipe decides, in DeepSpeed's names; refuses the file's where they differ."""
    train, ranks = config.train, world_size()
    rows = train.micro_batch_size * train.gradient_accumulation_steps * ranks
    times_ranks = f" × {ranks} ranks" if ranks > 1 else ""
    derived: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": (f"train.micro_batch_size={train.micro_batch_size}", train.micro_batch_size),
        "gradient_accumulation_steps": (
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}",
            train.gradient_accumulation_steps,
        ),
        "train_batch_size": (
            f"train.micro_batch_size × train.gradient_accumulation_steps{times_ranks} = {rows}",
            rows,
        ),
        "gradient_clipping": (f"train.max_grad_norm={train.max_grad_norm}", train.max_grad_norm or 0.0),
    }
    for name, (source, value) in derived.items():
        if given.get(name, "auto") not in ("auto", value):
            raise ConfigError(
                f"{name}={given[name]} in {where} contradicts {source} of the recipe; give it in one place only"
            )
    bf16 = train.dtype == "bf16"
    section = given.get("bf16", {})
    if section.get("enabled", "auto") not in ("auto", bf16):
        raise ConfigError(
            f"bf16.enabled={section['enabled']} in {where} contradicts train.dtype={train.dtype} of the recipe; "
            "give it in one place only"
        )
    for name, value in given.get("loqt", {}).items():
        if not hasattr(config.loqt, name):
            raise ConfigError(f"{where}: loqt.{name} is not an option; see `python -m loqt_ds.train --help`")
        if getattr(config.loqt, name) != value:
            raise ConfigError(
                f"loqt.{name}={value} in {where} contradicts loqt.{name}={getattr(config.loqt, name)} of the recipe; "
                "give it in one place only"
            )
    return {name: value for name, (_, value) in derived.items()}


# ---------------------------------------------------------------- of loqt_ds.initialize


def parameter_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """In which DeepSpeed keeps the trained parameters."""
    if ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def plugin_config(config: str | Path | dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Our options and DeepSpeed's configuration, from the JSON that `loqt_ds.initialize` was given (a path or an
    object).

    `Config.train` holds the batch sizes and clipping of the JSON (of its dtype, whether it is bf16). Raises ConfigError
    as `check_deepspeed`.
    """
    is_path = not isinstance(config, dict)
    where = f"config {config}" if is_path else "config"
    given = read_json(config, option="config") if not isinstance(config, dict) else dict(config)
    _check_sections(
        given, where, refused=_REFUSED, honoured=(*_HONOURED, *_REFUSED_WITH_RECIPE, "zero_force_ds_cpu_optimizer")
    )
    _refuse_auto({name: value for name, value in given.items() if name != "zero_optimization"}, where)
    section = dict(given.get("loqt", {}))
    for name, part in (("loqt.optim", section.get("optim", {})), ("optimizer.params", _params(given))):
        if not isinstance(part, dict):
            raise ConfigError(f"{where}: {name}={part!r} must be an object")
    options = {name: section.pop(name) for name in _PLUGIN_OPTIONS if name in section}
    optim = _optim_section(given, dict(options.pop("optim", {})), where, scheduled="max_steps" in options)
    train = options | {
        "max_grad_norm": given.get("gradient_clipping") or None,
        "dtype": "bf16" if given.get("bf16", {}).get("enabled") else "fp32",
    }
    ours = from_dict({"loqt": section, "optim": optim, "train": train}, source=where)
    if ours.loqt.dequantized_cache_gib and given.get("torch_autocast", {}).get("enabled"):
        raise ConfigError(
            f"{where}: loqt.dequantized_cache_gib={ours.loqt.dequantized_cache_gib} with torch_autocast: what is kept "
            "is in the dtype of the parameters, which is not that of the products; remove it, or use bf16"
        )
    _check_optim(ours, given.get("zero_optimization", {}).get("stage", 0))
    validate_training(ours)
    without = {name: value for name, value in given.items() if name != "optimizer"}
    complete = _complete(without, ours, where)
    resolved = _resolved(complete, where)
    ours.train.micro_batch_size = resolved.train_micro_batch_size_per_gpu
    ours.train.gradient_accumulation_steps = resolved.gradient_accumulation_steps
    return ours, complete


def _params(given: dict[str, Any]) -> Any:
    return given.get("optimizer", {}).get("params", {})


def _refuse_auto(given: dict[str, Any], where: str, *, inside: str = "") -> None:
    """Refuses the value "auto", which the Trainer of transformers fills in, and which is true in an `if`. (In the
    section of ZeRO DeepSpeed takes its default.)"""
    for name, value in given.items():
        if isinstance(value, dict):
            _refuse_auto(value, where, inside=f"{inside}{name}.")
        elif value == "auto" and not inside.startswith("loqt."):  # there it is a value: loqt.subspace=auto
            raise ConfigError(f'{where}: {inside}{name}="auto": there is no recipe to take it from; give a value')


def _optim_section(given: dict[str, Any], optim: dict[str, Any], where: str, *, scheduled: bool) -> dict[str, Any]:
    """`loqt.optim` completed from DeepSpeed's `optimizer` section, which may be Adam or AdamW."""
    if not scheduled:
        of_schedule = ("schedule", "warmup_steps", "warmup_ratio", "min_lr_ratio", "rewarmup_steps")
        if asked := [name for name in of_schedule if name in optim]:
            raise ConfigError(
                f"{where}: loqt.optim.{asked[0]}={optim[asked[0]]} needs the number of steps; give loqt.max_steps, or "
                "use DeepSpeed's `scheduler` section"
            )
        optim |= {"schedule": "constant", "warmup_steps": 0}
    elif given.get("scheduler"):
        raise ConfigError(f"{where}: loqt.max_steps and `scheduler` both decide the learning rate; give one of them")
    section = given.get("optimizer")
    if not section:
        return optim
    kind, params = section.get("type"), dict(_params(given))
    if str(kind).lower() not in [name.lower() for name in _OPTIMIZERS]:
        raise ConfigError(
            f"{where}: optimizer.type={kind} cannot be honoured: B is trained by Adam in 8 or 32 bits "
            f"(loqt.optim.name); use {' or '.join(_OPTIMIZERS)}"
        )
    decay = params.get("weight_decay", 0.0)
    if str(kind).lower() == "adam" and decay and params.pop("adam_w_mode", True) is False:
        raise ConfigError(
            f"{where}: optimizer.params.weight_decay={decay} with adam_w_mode=false is an L2 penalty, which is not "
            "implemented; use AdamW"
        )
    for name in ("adam_w_mode", "torch_adam", "fused"):  # which implementation: ours
        params.pop(name, None)
    if params.pop("bias_correction", True) is False:
        raise ConfigError(f"{where}: optimizer.params.bias_correction=false is not implemented; remove it")
    honoured = ("lr", "betas", "eps", "weight_decay")
    for name, value in params.items():
        if name not in honoured:
            raise ConfigError(f"{where}: optimizer.params.{name} cannot be honoured; use some of {', '.join(honoured)}")
        if name in optim:
            raise ConfigError(
                f"{where}: optimizer.params.{name}={value} and loqt.optim.{name}={optim[name]}: give it in one place "
                "only"
            )
        optim[name] = value
    return optim
