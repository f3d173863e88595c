"""`loqt_ds.initialize`: what an existing DeepSpeed script calls instead of `deepspeed.initialize`.

The model's linears become LoQT layers, the optimizer becomes ours, and everything else stays DeepSpeed's:

    engine, optimizer, loader, scheduler = loqt_ds.initialize(model=model, config="ds_config.json", ...)

Parameter groups are given for the model as it was: the factor B of a converted layer takes the place of the layer's
weight in its group. A model in memory is made equal on all ranks before it is quantized; one on the meta device is
read or drawn, quantized and released layer by layer, by all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from loqt_ds.config import Config, ConfigError
from loqt_ds.engines.deepspeed import DEFAULT_TIMEOUT_SECONDS, LoQTEngine, start_distributed
from loqt_ds.engines.ds_config import parameter_dtype, plugin_config, read_json
from loqt_ds.method.controller import check_experts
from loqt_ds.method.conversion import checkpoint_files, convert, initializer, loqt_layers, materialize
from loqt_ds.method.experts import unpacked_names
from loqt_ds.method.structure import wanted_experts
from loqt_ds.ranks import Ranks

_GROUP_OPTIONS = ("lr", "betas", "eps", "weight_decay")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | Path | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | dict[str, Any] | None = None,
    *,
    weights: str | Path | None = None,
) -> tuple[LoQTEngine, Any, Any, Any]:
    """A LoQT engine, with the arguments and the return value of `deepspeed.initialize`.

    Args:
        args: may hold `deepspeed_config`, instead of `config`.
        model: any module with `nn.Linear` inside, in memory or on the meta device. It is converted in place.
        optimizer: None; a `torch.optim.Adam` or `AdamW` over the model's parameters, whose groups and hyper-parameters
            are taken over; or a callable that makes one, of torch or bitsandbytes, from parameter groups.
        model_parameters: parameters or parameter groups of the model as given; others are frozen. None: all that
            require gradients.
        training_data, collate_fn: for DeepSpeed's data loader.
        lr_scheduler: a callable that makes a scheduler from the optimizer. (An object would hold the old optimizer.)
        distributed_port, dist_init_required: of the process group.
        mpu, mesh_param: refused, model parallelism is not supported.
        config, config_params: a path or an object; our options stand in its section "loqt".
        weights: for a model on the meta device: a directory of safetensors, or "init" to draw them from `loqt.seed`.

    Returns:
        (engine, optimizer, data loader or None, scheduler or None).

    Raises ConfigError for what cannot be honoured, before any weight is converted (but for what an optimizer function
    makes, which is called on the converted parameters).
    """
    if mpu is not None or mesh_param is not None:
        raise ConfigError(
            f"{'mpu' if mpu is not None else 'mesh_param'}: a layer must be whole on its rank; use data parallelism"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={model!r} must be a torch.nn.Module")
    if isinstance(model, PipelineModule):
        raise ConfigError("model is a PipelineModule: a layer's gradient must reach its owner whole; use its layers")
    source = _given_config(args, config, config_params)
    if optimizer is not None and not callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer={optimizer!r} is no optimizer; give torch's Adam or AdamW, or a function")
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ConfigError("lr_scheduler is an object, which holds the old optimizer; give lambda optimizer: ...")
    if dist_init_required is False and not dist.is_initialized():
        raise ConfigError("dist_init_required=False, and there is no process group; start one, or leave it out")
    port = distributed_port if dist_init_required is not False else None
    section = _section(source)
    seconds = section.get("collective_timeout_seconds")
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds <= 0:  # refused below, if it is given
        seconds = DEFAULT_TIMEOUT_SECONDS
    ranks = start_distributed(timeout_seconds=seconds, port=port)
    scheduled = "max_steps" in section
    is_function = optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer)

    def check(model: nn.Module = model) -> tuple[Config, dict[str, Any], list[tuple[list[str], dict[str, Any]]]]:
        ours, ds_config = plugin_config(source)
        if lr_scheduler is not None and scheduled:
            raise ConfigError("lr_scheduler and loqt.max_steps both decide the learning rate; give one of them")
        if optimizer is not None and _read(source).get("optimizer"):
            raise ConfigError("optimizer is given, and the config has an `optimizer` section; give one of them")
        stated = [name for name in ("lr", "lr_full_rank", "betas", "eps", "weight_decay") if name in section["optim"]]
        if optimizer is not None and stated:
            raise ConfigError(f"optimizer is given, and loqt.optim.{stated[0]}; give one of them")
        _check_weights(model, weights)
        named = _named_groups(model, optimizer, model_parameters)
        for _, options in named:
            if "lr" in options and scheduled:
                raise ConfigError(f"a group with lr={options['lr']} and loqt.max_steps: give one of them")
        check_experts(ours.loqt, wanted_experts(model, ours.loqt.target_modules), ranks.world_size)
        return ours, ds_config, named

    ours, ds_config, named = ranks.attempt(check)  # what one rank refuses, none goes on with
    model, original, originals = _convert(model, ours, ds_config, named, ranks, weights)
    engine = LoQTEngine(
        model,
        ours,
        ds_config,
        ranks=ranks,
        groups=_groups(model, named, None if is_function else ours),
        original=original,
        scheduled=scheduled,
        optimizer=_checked(optimizer) if is_function else None,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        collate_fn=collate_fn,
        args=args,
    )
    for name, owner in engine.controller.owners.items():
        if owner != ranks.rank:
            originals.pop(name, None)  # the owner alone asks for it
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _given_config(args: Any, config: Any, config_params: Any) -> Any:
    """The one configuration that is given, of the three places there are for it."""
    places = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    given = {place: value for place, value in places.items() if value is not None}
    if not given:
        raise ConfigError("config=None: give a path or an object, such as config='configs/zero2.json'")
    if len(given) > 1:
        values = " and ".join(f"{place}={value!r}" for place, value in given.items())
        raise ConfigError(f"{values} are given; give one of them")
    return next(iter(given.values()))


def _read(source: Any) -> dict[str, Any]:
    return source if isinstance(source, dict) else read_json(source, option="config")


def _section(source: Any) -> dict[str, Any]:
    """The section "loqt" as it was given; what is wrong with it is told later, by all ranks together."""
    section = _read(source).get("loqt")
    section = dict(section) if isinstance(section, dict) else {}
    return section | {"optim": section["optim"] if isinstance(section.get("optim"), dict) else {}}


def _check_weights(model: nn.Module, weights: str | Path | None) -> None:
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if on_meta and weights is None:
        raise ConfigError(f"{on_meta[0]} is on the meta device: give weights=DIRECTORY, or weights='init'")
    if weights is not None and not on_meta:
        raise ConfigError(f"weights={str(weights)!r}, but the model has its weights already; leave it out")
    if weights not in (None, "init") and not Path(str(weights)).is_dir():
        raise ConfigError(f"weights={str(weights)!r} is no directory; give one with safetensors, or 'init'")


# ---------------------------------------------------------------- parameter groups, by name


def _named_groups(
    model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None
) -> list[tuple[list[str], dict[str, Any]]]:
    """(parameter names, options) of each group, of the model as given. Parameters in none of them are frozen."""
    given: list[Any]
    if isinstance(optimizer, torch.optim.Optimizer):
        if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
            raise ConfigError(
                f"optimizer is a {type(optimizer).__name__}: B is trained by Adam in 8 or 32 bits; use torch's Adam "
                "or AdamW, or leave it to the config"
            )
        refused = [key for key in ("amsgrad", "maximize") if any(group.get(key) for group in optimizer.param_groups)]
        if refused:
            raise ConfigError(f"optimizer: {refused[0]}=True is not implemented; leave it out")
        decays = any(group["weight_decay"] for group in optimizer.param_groups)
        if decays and not isinstance(optimizer, torch.optim.AdamW):
            raise ConfigError("optimizer: Adam's weight_decay is an L2 penalty, which is not implemented; use AdamW")
        if optimizer.state:
            raise ConfigError(
                "optimizer has moments of the weights, which B does not have; give one that has not stepped"
            )
        given = optimizer.param_groups
    elif model_parameters is None:
        given = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    else:
        given = list(model_parameters)
        if not all(isinstance(group, dict) for group in given):
            given = [{"params": given}]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in given:
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        unknown = [p for p in params if id(p) not in names]
        if unknown:
            raise ConfigError(
                f"a parameter of shape {tuple(unknown[0].shape)} that is to be trained is not the model's; pass "
                "parameters of the model that is given"
            )
        options = {name: group[name] for name in _GROUP_OPTIONS if name in group}
        groups.append(([names[id(p)] for p in params if p.requires_grad], options))
    trained = {name for group_names, _ in groups for name in group_names}
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)
    return groups


def _groups(
    model: nn.Module, named: list[tuple[list[str], dict[str, Any]]], config: Config | None
) -> list[dict[str, Any]]:
    """Torch-style groups of the converted model: B in the place of its weight, in groups apart from the others'.

    What a group does not state is `config.optim`'s; without `config`, it is left to the optimizer."""
    parameters = dict(model.named_parameters())
    under_any_name = dict(model.named_parameters(remove_duplicate=False))
    layers = loqt_layers(model)
    of_factors_by_default: dict[str, Any] = {}
    others_by_default: dict[str, Any] = {}
    if config is not None:
        optim = config.optim
        full_rank = optim.lr if optim.lr_full_rank is None else optim.lr_full_rank
        of_factors_by_default = {"lr": optim.lr, "weight_decay": optim.weight_decay}
        others_by_default = {"lr": full_rank, "weight_decay": optim.weight_decay}
    groups = []
    for names, options in named:
        of_factors, others = [], []
        for name in unpacked_names(model, names):
            layer, _, short = name.rpartition(".")
            if layer in layers and short == "weight":
                of_factors.append(parameters[f"{layer}.B"])
            elif name in parameters:
                others.append(parameters[name])
            else:  # tied to another, which is there
                assert name in under_any_name, f"{name} is to be trained and is not in the converted model"
        for params, default in ((of_factors, of_factors_by_default), (others, others_by_default)):
            if params:
                groups.append({"params": params} | default | options)
    return groups


def _checked(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A user's optimizer function, whose result must keep moments that we can read."""

    def optimizer(groups: Any) -> Any:
        import bitsandbytes

        made = make(groups)
        known = (torch.optim.Adam, bitsandbytes.optim.Adam, bitsandbytes.optim.AdamW)
        eight_bit = (bitsandbytes.optim.Adam8bit, bitsandbytes.optim.AdamW8bit)
        if not isinstance(made, (*known, *eight_bit)):
            raise ConfigError(
                f"optimizer makes a {type(made).__name__}: B is trained by Adam in 8 or 32 bits; make torch's or "
                "bitsandbytes'"
            )
        return made

    return optimizer


# ---------------------------------------------------------------- the model


def _convert(
    model: nn.Module,
    config: Config,
    ds_config: dict[str, Any],
    named: list[tuple[list[str], dict[str, Any]]],
    ranks: Ranks,
    weights: str | Path | None,
) -> tuple[nn.Module, Callable[[str], Tensor], dict[str, Tensor]]:
    """The converted model, where its original weights can be had for the first initialization, and those in memory."""
    dtype = parameter_dtype(ds_config)
    if weights is not None:
        make = initializer(config.train.seed) if weights == "init" else checkpoint_files(weights, option="weights")
        model, source = materialize(
            _with_real_buffers(model), config.loqt, make, device=ranks.device, dtype=dtype, ranks=ranks
        )
        return model, source.weight, {}
    ranks.attempt(lambda: _check_dtype(model, dtype))
    model.to(ranks.device)
    for parameter in model.parameters():
        # Each rank quantizes for itself: what it quantizes must be the same.
        whole = parameter.data.contiguous()
        ranks.broadcast(whole, 0)
        parameter.data.copy_(whole)
    originals = ranks.attempt(lambda: convert(model, config.loqt))
    return model, originals.__getitem__, originals


def _check_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if dtype == torch.float32 and parameter.is_floating_point() and parameter.dtype != dtype:
            raise ConfigError(
                f'{name} is {parameter.dtype}, but the config does not say "bf16": {{"enabled": true}}; say so, or '
                "give the model in float32"
            )


def _with_real_buffers(model: nn.Module) -> nn.Module:
    """A transformers model that is wholly on the meta device is built again with its buffers, which no file holds."""
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not any(buffer.is_meta for buffer in model.buffers()):
        return model
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with init_empty_weights(include_buffers=False):
        built = type(model)(model.config)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return built.train(model.training)
