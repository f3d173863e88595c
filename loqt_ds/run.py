"""One run from its configuration to what it leaves: directory, tokenizer, data, model, engine, training, export.

Everything that can be refused is refused in the order of its cost: options, then the model's shape on the meta device,
then files and directories, then data; weights come last.

Where several ranks train, rank 0 chooses the directory and the checkpoint and reads every byte of it; the first rank of
each node prepares tokenizer and tokens, which the others then find in the cache. The others wait for these without a
limit: a corpus may take hours.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from loqt_ds.config import Config, ConfigError, describe_model
from loqt_ds.data import DataBundle, Tokenizer, build_data, load_or_train_tokenizer
from loqt_ds.data.classification import class_names
from loqt_ds.engines.base import Engine
from loqt_ds.engines.single import SingleEngine
from loqt_ds.evaluation import Evaluator
from loqt_ds.export import check_export, check_shared_base
from loqt_ds.export.gguf_tokenizer import read_tokenizer
from loqt_ds.failures import Voice
from loqt_ds.memory import Asker, check_fits, device_bytes, division_of, needs_lean
from loqt_ds.method import compiled, head, lean
from loqt_ds.method.controller import check_experts
from loqt_ds.method.conversion import (
    WeightSource,
    build_empty,
    build_meta,
    build_model,
    checkpoint_files,
    initializer,
    loqt_layers,
    materialize_zeros,
    task_head_parameters,
    unpack_experts,
)
from loqt_ds.method.description import model_description, training_dtype
from loqt_ds.method.structure import blocks
from loqt_ds.metrics import MetricsLogger
from loqt_ds.optim import freeze_full_rank, parameter_groups
from loqt_ds.ranks import Ranks
from loqt_ds.rundir import (
    Lock,
    choose_checkpoint,
    choose_directory,
    claim_directory,
    compare_model,
    flatten,
    is_claimed_by,
    write_options,
)
from loqt_ds.settling import build_evaluator, resolve_steps
from loqt_ds.trainer import Trainer

if TYPE_CHECKING:
    from loqt_ds.engines.fsdp import Sharding

Say = Callable[[str], None]

_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # of transformers' models that leave out blocks
VISIBLE_SECONDS = 30.0  # for a directory made on one node to be seen on another


@dataclass
class Run:
    """A run that is ready to train."""

    config: Config
    directory: Path
    tokenizer: Tokenizer
    data: DataBundle
    engine: Engine
    model_config: Any
    evaluator: Evaluator
    logger: MetricsLogger
    trainer: Trainer
    lock: Lock | None  # of rank 0; held while the run lasts
    resumed_step: int | None  # of the checkpoint it went on from

    @property
    def tokenizer_dir(self) -> Path:
        return self.directory / "tokenizer"


def prepare(
    config: Config, *, ds_config: str | Path | None = None, voice: Voice | None = None, say: Say = print
) -> Run:
    """Builds everything a run needs; loads the checkpoint it goes on from. Collective.

    Args:
        config: validated.
        ds_config: file of a DeepSpeed configuration, to train under DeepSpeed; None: one device, or with engine=fsdp2
            FSDP2.
        voice: of the processes that train together; None: this one is alone.
        say: prints; used on rank 0 only.

    Raises ValueError (of many kinds) for what the user can mend, before weights are loaded; PeerFailed if another rank
    does.
    """
    voice = Voice() if voice is None else voice
    ranks = voice.ranks
    say = say if ranks.is_main else _silent
    device, config, ds_options = ranks.attempt(lambda: _check_options(config, ds_config, ranks.world_size))
    _check_agreement(ranks, config, ds_options)
    chosen, path = voice.on_main(lambda: _choose(config, ds_options, ranks.world_size, say))
    checkpoint = ranks.attempt(lambda: _open_checkpoint(path))

    is_first = ranks.local_rank == 0
    tokenizer = voice.in_turn(is_first, lambda: load_or_train_tokenizer(config, say))
    model_config = ranks.attempt(lambda: configure_model(config, tokenizer))
    config = resolve_activations(config, model_config, device, ds_options, ranks, checkpoint)
    ranks.attempt(lambda: check_memory(config, model_config, device, ds_options, ranks.world_size, say=say))
    # A stream is not kept, so that nobody can find what another rank has read.
    data = voice.in_turn(
        is_first or config.data.streaming,
        lambda: build_data(config, tokenizer, rank=ranks.rank, world_size=ranks.world_size, say=say),
    )
    if checkpoint is not None:
        compare_model(checkpoint, model_config)
        data.train.load_state_dict(checkpoint.metadata["data"])  # refuses other data, before anything is loaded

    as_given = config
    config = ranks.attempt(lambda: resolve_steps(config, data, ranks.world_size, checkpoint, say=say))
    evaluator = ranks.attempt(lambda: build_evaluator(config, tokenizer, data, model_config, device, say=say))

    directory, lock = _claim(config, chosen, ranks)
    voice.directory = directory
    if ranks.is_main:
        write_options(as_given, directory, ds_options)
        tokenizer.save(directory / "tokenizer", say=say)
        if config.export.format == "gguf":
            read_tokenizer(directory / "tokenizer", int(model_config.vocab_size))  # refuses what no such file can hold
    say(f"run directory: {directory}")
    torch.manual_seed(config.train.seed)
    sharding = _sharding(config, ranks)
    resumed = checkpoint is not None
    model, original = load_model(config, model_config, device, ranks, resumed=resumed, sharding=sharding, say=say)
    if checkpoint is None:  # else the model is empty yet
        voice.on_main(lambda: check_shared_base(config, model, model_config))
    engine = build_engine(config, model, ds_options, original, ranks, sharding, model_config)
    if not ranks.is_main:
        torch.manual_seed(config.train.seed + ranks.rank)  # what a model drops out is another thing on each rank
    logger = MetricsLogger(
        directory,
        max_steps=config.num_steps,
        every=config.logging.every,
        tensorboard=config.logging.tensorboard,
        progress=config.logging.progress,
        is_main=ranks.is_main,
        resumed_step=None if checkpoint is None else checkpoint.step,
    )
    trainer = Trainer(
        config,
        engine,
        data,
        evaluator,
        logger,
        checkpoints=directory / "checkpoints",
        extra_metadata={"model_config": model_config.to_dict(), "ds_config": ds_options},
        directories={"tokenizer": directory / "tokenizer"},
    )
    if checkpoint is None:
        logger.event("data", {"step": 0, **data.summary})
    else:
        trainer.restore(checkpoint)
        say(f"going on from {checkpoint.path} (step {checkpoint.step})")
    resumed_step = None if checkpoint is None else checkpoint.step
    return Run(config, directory, tokenizer, data, engine, model_config, evaluator, logger, trainer, lock, resumed_step)


def _silent(_: str) -> None:
    """What ranks other than 0 say."""


# ---------------------------------------------------------------- what the ranks settle first


def _check_options(
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


def _check_agreement(ranks: Ranks, config: Config, ds_options: dict[str, Any] | None) -> None:
    """Refuses ranks that were given different options: files differ between nodes, or `auto` means different things."""
    mine = flatten(config.to_dict()) | {f"--ds_config: {name}": v for name, v in flatten(ds_options or {}).items()}
    for rank, other in enumerate(ranks.gather_objects(mine)):
        for name in mine:
            if other.get(name) != mine[name]:
                raise ConfigError(
                    f"{name}={mine[name]} on rank {ranks.rank} ({socket.gethostname()}) is {other.get(name)} on rank "
                    f"{rank}; start all ranks with the same command and the same files"
                )


def _choose(
    config: Config, ds_options: dict[str, Any] | None, world_size: int, say: Say
) -> tuple[Path | None, Path | None]:
    """The run's directory (None: a new numbered one) and the verified checkpoint to go on from."""
    directory = choose_directory(config, say)
    checkpoint = choose_checkpoint(config, directory, ds_options, world_size, say)
    return directory, None if checkpoint is None else checkpoint.path


def _open_checkpoint(path: Path | None) -> Checkpoint | None:
    """The checkpoint that rank 0 has verified."""
    if path is None:
        return None
    try:
        return load_checkpoint(path, verify=False)
    except CheckpointError as error:
        raise CheckpointError(f"on {socket.gethostname()}: {error} ({_SHARED})") from error


_SHARED = "output_dir must be on a file system that all nodes see"


def _claim(config: Config, chosen: Path | None, ranks: Ranks) -> tuple[Path, Lock | None]:
    """The run's directory, made and locked by rank 0 and seen by all."""
    lock: Lock | None = None

    def claim() -> tuple[Path, str]:
        nonlocal lock
        directory, lock = claim_directory(config, chosen)
        return directory, lock.token

    directory, token = ranks.on_main(claim)

    def look() -> None:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not is_claimed_by(directory, token):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"output_dir={directory} of rank 0 is not to be seen on {socket.gethostname()}: {_SHARED}"
                )
            time.sleep(0.2)

    ranks.attempt(look)
    return directory, lock


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
        _source_of(config)(build_empty(model_config, **options))
    check_export(config, model, model_config)


def _check_shardable(config: Config, model: nn.Module) -> None:
    """Refuses a model that FSDP2 cannot divide, or not so that it is worth it."""
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            raise ConfigError(
                f"engine=fsdp2: {name} is one number, which has no rows to divide; use DeepSpeed (--ds_config) or "
                "one device"
            )
    if config.fsdp.shard_frozen and not blocks(model, loqt_layers(model)):
        raise ConfigError(
            f"fsdp.shard_frozen=true: {type(model).__name__} has no list of blocks with adapted matrices, so that all "
            "bytes would be gathered for the whole step; set fsdp.shard_frozen=false"
        )


def _source_of(config: Config) -> Callable[[nn.Module], WeightSource]:
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


# ---------------------------------------------------------------- model and engine


def _sharding(config: Config, ranks: Ranks) -> Sharding | None:
    """How FSDP2 divides the model, where it does. Collective."""
    if config.engine != "fsdp2":
        return None
    from loqt_ds.engines.fsdp import Sharding

    return Sharding(config, ranks)


def load_model(
    config: Config,
    model_config: Any,
    device: torch.device,
    ranks: Ranks,
    *,
    resumed: bool,
    sharding: Sharding | None = None,
    say: Say,
) -> tuple[nn.Module, Callable[[str], Tensor]]:
    """The converted model on its device, its blocks sharded where there is a `sharding`, and where the original weights
    can be had for the first initialization. Collective."""
    shard = None if sharding is None else sharding.shard
    make_source, dtype = _source_of(config), training_dtype(config)
    options = {"attention": config.model.attention, "task": config.model.task}
    if resumed:
        model = build_meta(model_config, config.loqt, dtype=dtype, **options)
        model = materialize_zeros(model, device, shard=shard)
        original = _LazySource(lambda: make_source(build_empty(model_config, **options)))
    else:
        say("drawing weights" if config.model.path is None else f"reading weights from {config.model.path}")
        model, source = build_model(
            model_config,
            config.loqt,
            make_source,
            device=device,
            dtype=dtype,
            ranks=ranks,
            shard=shard,
            **options,
        )
        if drawn := getattr(source, "drawn", None):
            says = f"{config.model.path} has no {', '.join(drawn)} of these shapes"
            say(f"{says}: drawn from train.seed={config.train.seed}")
        if left_out := getattr(source, "left_out", None):
            say(f"{config.model.path} also holds parts of another task, which are left out: {', '.join(left_out)}")
        original = _LazySource(lambda: source)
    if config.train.activation_checkpointing:
        # Renamed within transformers 5; the old name warns where the new one exists.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if config.train.lean_activations is not False:  # auto, where nobody has decided: what needs least
        say(lean.install(model, kernels=config.model.kernels).describe())
    loss = head.install(model, kernels=config.model.kernels, task=config.model.task)
    if loss.whole_logits is not None or config.model.kernels != "torch":
        say(loss.describe())
    if config.train.compile:
        say(f"torch.compile: {compiled.install(model)} blocks, compiled in the first steps")
    if not config.optim.train_full_rank:
        freeze_full_rank(model, but=task_head_parameters(model))
        packed = {f"{name}.{key}" for name, layer in loqt_layers(model).items() for key in layer.packed_bytes}
        frozen = sum(p.numel() for n, p in model.named_parameters() if not p.requires_grad and n not in packed)
        say(f"frozen parameters: {frozen:,}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"trained parameters: {trained:,}; adapted weights in {config.loqt.quantize_w}")
    return model, original


class _LazySource:
    """Original weights, from a source made when the first is asked for: a run that goes on asks for none."""

    def __init__(self, make: Callable[[], WeightSource]) -> None:
        self._make = make
        self._source: WeightSource | None = None

    def __call__(self, name: str) -> Tensor:
        if self._source is None:
            self._source = self._make()
        return self._source.weight(name)


def build_engine(
    config: Config,
    model: nn.Module,
    ds_options: dict[str, Any] | None,
    original: Callable[[str], Tensor],
    ranks: Ranks,
    sharding: Sharding | None = None,
    model_config: Any = None,
) -> Engine:
    """FSDP2 with a `sharding` (and the model's configuration), DeepSpeed with a DeepSpeed configuration, else one
    device."""
    if sharding is not None:
        from loqt_ds.engines.fsdp import FSDPEngine

        def rebuild() -> nn.Module:
            options: dict[str, Any] = {"attention": config.model.attention, "task": config.model.task}
            plain = build_meta(model_config, config.loqt, dtype=training_dtype(config), **options)
            head.install(plain, kernels=config.model.kernels, task=config.model.task)
            return plain

        return FSDPEngine(model, config, sharding, original=original, rebuild=rebuild)
    if ds_options is None:
        return SingleEngine(model, config, original=original)
    from loqt_ds.engines.deepspeed import LoQTEngine

    groups = [
        {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
        for group in parameter_groups(model, config.optim)
    ]
    return LoQTEngine(model, config, ds_options, groups=groups, ranks=ranks, original=original)
