"""What can be refused or settled before any weight is loaded: device and dtype, the model's shape, memory.

The model is built on the meta device, converted, and looked at: patterns, ranks, experts, what the engine can divide,
what the export can write.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.config import Config, ConfigError, describe_model
from loqt_ds.data import DataBundle, Tokenizer
from loqt_ds.data.classification import class_names
from loqt_ds.export import check_export
from loqt_ds.memory import Asker, check_fits, device_bytes, division_of, needs_lean
from loqt_ds.method import compiled, lean
from loqt_ds.method.controller import check_experts
from loqt_ds.method.conversion import (
    WeightSource,
    build_empty,
    build_meta,
    checkpoint_files,
    initializer,
    loqt_layers,
    unpack_experts,
)
from loqt_ds.method.description import model_description, num_positions, training_dtype
from loqt_ds.method.structure import blocks, is_in
from loqt_ds.ranks import Ranks
from loqt_ds.rundir import flatten

Say = Callable[[str], None]

_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # of transformers' models that leave out blocks


def check_options(
    config: Config, ds_config: str | Path | None, world_size: int = 1
) -> tuple[torch.device, Config, dict[str, Any] | None]:
    """The device, the resolved configuration, and the completed DeepSpeed configuration."""
    device = choose_device(config)
    config = resolve_config(config, device)
    ds_options = None
    if ds_config is not None:
        from loqt_ds.engines.ds_config import check_deepspeed

        ds_options = check_deepspeed(ds_config, config)
    division_of(config, world_size=world_size, ds_config=ds_options)  # refuses what cannot be divided
    launched = "cuda" if torch.cuda.is_available() else "cpu"
    of_rank = f"{launched}:{os.environ.get('LOCAL_RANK', '0')}"
    if config.engine == "fsdp2" and config.train.device not in ("auto", launched, of_rank):
        raise ConfigError(
            f"train.device={config.train.device} with engine=fsdp2: each rank takes the {launched} device of its own; "
            "use train.device=auto, and CUDA_VISIBLE_DEVICES to choose (empty: the CPU)"
        )
    lean.check_kernels(config.model.kernels, [device])
    if config.train.compile:
        compiled.check_compiler(device)
    check_model(config, world_size)
    return device, config, ds_options


def check_agreement(ranks: Ranks, config: Config, ds_options: dict[str, Any] | None) -> None:
    """Refuses ranks that were given different options: files differ between nodes, or `auto` means different things."""
    mine = flatten(config.to_dict()) | {f"--ds_config: {name}": v for name, v in flatten(ds_options or {}).items()}
    for rank, other in enumerate(ranks.gather_objects(mine)):
        for name in mine:
            if other.get(name) != mine[name]:
                raise ConfigError(
                    f"{name}={mine[name]} on rank {ranks.rank} ({socket.gethostname()}) is {other.get(name)} on rank "
                    f"{rank}; start all ranks with the same command and the same files"
                )


def check_same_data(ranks: Ranks, config: Config, data: DataBundle) -> None:
    """Refuses ranks that have other data under the same options: each node reads files, and keeps a cache, of its own.

    A stream's ranks are compared by its beginning.
    """
    if ranks.world_size == 1:
        return
    host, mine = own = socket.gethostname(), data.identity
    for rank, (other_host, other) in enumerate(ranks.gather_objects(own)):
        different = [name for name in mine if other.get(name) != mine[name]]
        if different:
            details = ", ".join(f"{name} is {mine[name]}, not {other.get(name)}" for name in different)
            raise ConfigError(
                f"{_where_data_is(config)}: rank {ranks.rank} ({host}) has other data than rank {rank} ({other_host}): "
                f"{details}; give all nodes the same files"
                + (", and one tokenizer (data.tokenizer)" if "tokenizer" in different else "")
            )


def _where_data_is(config: Config) -> str:
    """The options that say where."""
    names = ("path", "name", "validation_path", "tokenizer")
    given = {f"data.{name}": getattr(config.data, name) for name in names}
    return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None) or "data.path=null"


# ---------------------------------------------------------------- device and dtype


def choose_device(config: Config) -> torch.device:
    """`train.device`, or the CUDA device of this process where there is one."""
    wanted = config.train.device
    if wanted == "auto":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(
            f"train.device={config.train.device!r} is not a device; use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"train.device={config.train.device}: torch sees no CUDA device; use train.device=cpu")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", index)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"train.device={wanted}: there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
        if config.train.memory_limit_gib is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.train.memory_limit_gib * 2**30 / total), device)
    return device


def resolve_config(config: Config, device: torch.device) -> Config:
    """The configuration with dtype and tokenizer decided, so that what is written down reproduces the run."""
    on_device = dataclasses.replace(config, train=dataclasses.replace(config.train, device=device.type))
    dtype = "bf16" if training_dtype(on_device) == torch.bfloat16 else "fp32"
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))  # type: ignore[arg-type]
    if config.model.path is None or config.data.tokenizer is not None:
        return config
    # A trained model speaks its own tokenizer's language, and no other.
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    if not any((Path(config.model.path) / name).is_file() for name in names):
        raise ConfigError(
            f"data.tokenizer=null with model.path={config.model.path}, which has no tokenizer files: give the "
            "tokenizer the model was trained with"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=config.model.path))


# ---------------------------------------------------------------- the model's shape


def check_model(config: Config, world_size: int = 1) -> None:
    """Builds the converted model on the meta device: rank, patterns and architecture are checked without weights."""
    file, description = describe_model(config)
    if description.get("quantization_config"):
        raise ConfigError(f"model.path={config.model.path}: {file} says it is quantized already; give full precision")
    model_config = model_description(config)
    longest, name = num_positions(model_config), "max_position_embeddings"
    if longest is not None and config.data.sequence_length > longest:  # by another name than validation knows
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is more than "
            f"{model_config.attribute_map.get(name, name)}={longest} of {file}; use at most {longest}"
        )
    options = {"attention": config.model.attention, "task": config.model.task}
    model = build_meta(model_config, config.loqt, dtype=training_dtype(config), **options)
    check_experts(config.loqt, (n for n, layer in loqt_layers(model).items() if layer.is_conditional), world_size)
    if config.engine == "fsdp2":
        _check_shardable(config, model)
    dropped = [name for name in _LAYERDROP if getattr(model_config, name, None)]
    if dropped and config.engine == "fsdp2" and world_size > 1:
        raise ConfigError(
            f"engine=fsdp2 with {dropped[0]}={getattr(model_config, dropped[0])} of the model: a rank that leaves out "
            f"a block would not take part in gathering it; set {dropped[0]} to 0 in the model's config.json, or use "
            "DeepSpeed (--ds_config)"
        )
    if config.train.compile:
        compiled.install(model)  # refuses models without blocks
    if config.model.path is not None:
        weight_source(config)(build_empty(model_config, **options))
    check_export(config, model, model_config)


def _check_shardable(config: Config, model: nn.Module) -> None:
    """Refuses a model that FSDP2 cannot divide, or not so that it is worth it."""
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            raise ConfigError(
                f"engine=fsdp2: {name} is one number, which has no rows to divide; use DeepSpeed (--ds_config) or "
                "one device"
            )
    units = blocks(model, loqt_layers(model))
    names: dict[int, list[str]] = {}  # of each parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for same in (same for same in names.values() if len(same) > 1):
        if len({next((unit for unit in units if is_in(name, (unit,))), None) for name in same}) > 1:
            # Of what does not divide evenly, fully_shard has a copy for each, of which one would be updated.
            raise ConfigError(
                f"engine=fsdp2: {same[0]} and {same[-1]} are one parameter of two blocks, each of which is sharded by "
                "itself; use DeepSpeed (--ds_config) or one device"
            )
    if config.fsdp.shard_frozen and not units:
        raise ConfigError(
            f"fsdp.shard_frozen=true: {type(model).__name__} has no list of blocks with adapted matrices, so that all "
            "bytes would be gathered for the whole step; set fsdp.shard_frozen=false"
        )


def weight_source(config: Config) -> Callable[[nn.Module], WeightSource]:
    """Where the model's weights come from: the seed, or files (which may lack the head of the task)."""
    if config.model.path is None:
        make = initializer(config.train.seed)
    else:
        has_own_head = config.model.task in ("classification", "regression")
        make = checkpoint_files(config.model.path, seed=config.train.seed if has_own_head else None)

    def source(model: nn.Module) -> WeightSource:
        unpack_experts(model, config.loqt.target_modules)  # by whose names weights are asked for
        return make(model)

    return source


def configure_model(config: Config, tokenizer: Tokenizer) -> Any:
    """The transformers configuration with the vocabulary of the run. Raises ConfigError if tokenizer and model do not
    fit."""
    wanted = config.model.vocab_size
    auto = -(-tokenizer.vocab_size // 64) * 64 if wanted == "auto" else None
    model_config = model_description(config, vocab_size=auto)
    rows = int(model_config.vocab_size)
    if tokenizer.vocab_size > rows:
        remedy = "use the model's own tokenizer" if config.model.path else "set model.vocab_size=auto"
        if config.model.path is not None and config.data.tokenizer == config.model.path:
            remedy = "its tokenizer has tokens added to it: call resize_token_embeddings on the model and save it again"
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} ids, the model's vocabulary has {rows} "
            f"(model.vocab_size={wanted}): they do not fit; {remedy}"
        )
    # A vocabulary that was rounded up to a multiple of 64 is the tokenizer's.
    if config.model.path is not None and tokenizer.vocab_size < min(0.9 * rows, rows - 63):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} ids, model.path={config.model.path} "
            f"was trained with {rows}: they do not fit; use the model's own tokenizer"
        )
    if config.data.format == "classification" and (names := class_names(config)):
        model_config.id2label = dict(enumerate(names))
        model_config.label2id = {name: number for number, name in enumerate(names)}
    if config.model.path is None:
        model_config.eos_token_id = tokenizer.eot_id
        model_config.bos_token_id = None
    # Decoders classify by the last token that is no padding, and take another one than the batches' for text.
    has_classifier = config.model.task in ("classification", "regression")
    if config.model.path is None or has_classifier or getattr(model_config, "pad_token_id", None) is None:
        model_config.pad_token_id = tokenizer.pad_id
    _check_positions(config, model_config)
    return model_config


def _check_positions(config: Config, model_config: Any) -> None:
    """Raises ConfigError where a row has more tokens than the model has positions left: RoBERTa's kind counts them from
    the padding token's number on."""
    length, longest = config.data.sequence_length, getattr(model_config, "max_position_embeddings", None)
    if longest is None or model_config.pad_token_id is None or length + model_config.pad_token_id < longest:
        return
    model = build_empty(model_config, attention=config.model.attention, task=config.model.task)
    for name, module in model.named_modules():
        if not name.endswith("position_embeddings") or getattr(module, "padding_idx", None) is None:
            continue
        room = int(module.num_embeddings) - int(module.padding_idx) - 1  # type: ignore[arg-type]
        if length > room:
            raise ConfigError(
                f"data.sequence_length={length} is more than the {room} positions that {name} has left: it has "
                f"{module.num_embeddings}, and the model counts from its padding token's {module.padding_idx} on; use "
                f"at most {room}"
            )


# ---------------------------------------------------------------- memory


def _asker(
    config: Config, model_config: Any, device: torch.device, ds_options: dict[str, Any] | None, world_size: int
) -> Asker:
    on_device = dataclasses.replace(config, train=dataclasses.replace(config.train, device=device.type))
    return Asker(on_device, vocab_size=int(model_config.vocab_size), world_size=world_size, ds_config=ds_options)


def _capacity(config: Config, device: torch.device) -> tuple[int, str]:
    """Bytes that a rank may use, and of what."""
    capacity, limit = device_bytes(device), config.train.memory_limit_gib
    if limit is not None and limit * 2**30 < capacity:
        return int(limit * 2**30), f"train.memory_limit_gib={limit:g}"
    return capacity, f"{device}"


def resolve_activations(
    config: Config,
    model_config: Any,
    device: torch.device,
    ds_options: dict[str, Any] | None,
    ranks: Ranks,
    checkpoint: Checkpoint | None,
) -> Config:
    """The configuration with train.lean_activations decided, for all ranks alike. Collective.

    A run that was lean stays so: another order of additions would change its last bits.
    """
    if config.train.lean_activations != "auto":
        return config
    was_lean = checkpoint is not None and checkpoint.metadata["config"]["train"].get("lean_activations") is True
    asker, (capacity, _) = _asker(config, model_config, device, ds_options, ranks.world_size), _capacity(config, device)
    is_lean = any(ranks.gather(lambda: was_lean or needs_lean(asker, capacity)))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, lean_activations=is_lean))


def check_memory(
    config: Config,
    model_config: Any,
    device: torch.device,
    ds_options: dict[str, Any] | None,
    world_size: int,
    *,
    say: Say,
) -> None:
    """One line on the memory that each rank will need, and a warning if the device, or train.memory_limit_gib, has
    less, with the nearest settings that fit. Raises ConfigError if what stays alone is more."""
    asker = _asker(config, model_config, device, ds_options, world_size)
    planned = asker.plan()
    each = f" on each of {world_size} ranks" if world_size > 1 else ""
    say(f"planned memory{each}: {planned.summary()}")
    for note in planned.notes:
        say(note)
    capacity, what = _capacity(config, device)
    check_fits(asker, capacity, what, say=say)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if free < planned.total_bytes <= capacity:
            say(f"warning: {free / 2**30:.2f} GiB of {device} are free: other processes hold the rest; end them")
