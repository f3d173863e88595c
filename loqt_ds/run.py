"""One run from its configuration to what it leaves: directory, tokenizer, data, model, engine, training, export.

Everything that can be refused is refused in the order of its cost: options, then the model's shape on the meta device,
then files and directories, then data; weights come last.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from loqt_ds.config import Config, ConfigError, describe_model
from loqt_ds.data import DataBundle, Tokenizer, build_data, load_or_train_tokenizer
from loqt_ds.engines.base import Engine
from loqt_ds.engines.single import SingleEngine
from loqt_ds.memory import plan
from loqt_ds.method.conversion import (
    WeightSource,
    build_empty,
    build_meta,
    build_model,
    checkpoint_files,
    initializer,
    materialize_zeros,
)
from loqt_ds.method.description import model_description, training_dtype
from loqt_ds.metrics import MetricsLogger
from loqt_ds.rundir import choose_checkpoint, choose_directory, claim_directory, compare_model, write_options
from loqt_ds.trainer import Trainer

Say = Callable[[str], None]


@dataclass
class Run:
    """A run that is ready to train."""

    config: Config
    directory: Path
    tokenizer: Tokenizer
    data: DataBundle
    engine: Engine
    model_config: Any
    logger: MetricsLogger
    trainer: Trainer
    lock: IO[bytes]  # held while the run lasts
    resumed_step: int | None  # of the checkpoint it went on from

    @property
    def tokenizer_dir(self) -> Path:
        return self.directory / "tokenizer"


def prepare(config: Config, *, ds_config: dict[str, Any] | None = None, say: Say = print) -> Run:
    """Builds everything a run needs; loads the checkpoint it goes on from.

    Args:
        config: validated.
        ds_config: of `engines.deepspeed.check_deepspeed`, to train under DeepSpeed; None: one device without it.

    Raises ValueError (of many kinds) for what the user can mend, before weights are loaded.
    """
    if ds_config is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: `python -m loqt_ds.train` runs in one process; start one"
        )
    device = choose_device(config)
    config = resolve_config(config, device)
    check_model(config)
    chosen = choose_directory(config, say)
    checkpoint = choose_checkpoint(config, chosen, ds_config, say)
    tokenizer = load_or_train_tokenizer(config, say)
    model_config = configure_model(config, tokenizer)
    data = build_data(config, tokenizer, say=say)
    if checkpoint is not None:
        compare_model(checkpoint, model_config)
        data.train.load_state_dict(checkpoint.metadata["data"])  # refuses other data, before anything is loaded
    directory, lock = claim_directory(config, chosen)
    write_options(config, directory, ds_config)
    tokenizer.save(directory / "tokenizer", say=say)
    say(f"run directory: {directory}")
    say_plan(config, model_config, device, say)
    torch.manual_seed(config.train.seed)
    model, original = load_model(config, model_config, device, resumed=checkpoint is not None, say=say)
    engine = build_engine(config, model, ds_config, original)
    logger = MetricsLogger(
        directory,
        max_steps=config.train.max_steps,
        every=config.logging.every,
        tensorboard=config.logging.tensorboard,
        progress=config.logging.progress,
        resumed_step=None if checkpoint is None else checkpoint.step,
    )
    trainer = Trainer(
        config,
        engine,
        data,
        logger,
        checkpoints=directory / "checkpoints",
        extra_metadata={"model_config": model_config.to_dict(), "ds_config": ds_config},
        directories={"tokenizer": directory / "tokenizer"},
    )
    if checkpoint is None:
        logger.event("data", {"step": 0, **data.summary})
    else:
        trainer.restore(checkpoint)
        say(f"going on from {checkpoint.path} (step {checkpoint.step})")
    resumed_step = None if checkpoint is None else checkpoint.step
    return Run(config, directory, tokenizer, data, engine, model_config, logger, trainer, lock, resumed_step)


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
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"train.device={wanted}: there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
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


def check_model(config: Config) -> None:
    """Builds the converted model on the meta device: rank, patterns and architecture are checked without weights."""
    file, description = describe_model(config)
    if description.get("quantization_config"):
        raise ConfigError(f"model.path={config.model.path}: {file} says it is quantized already; give full precision")
    model_config = model_description(config)
    build_meta(model_config, config.loqt, dtype=training_dtype(config), attention=config.model.attention)
    if config.model.path is not None:
        checkpoint_files(config.model.path)(build_empty(model_config, attention=config.model.attention))


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
    if config.model.path is not None and tokenizer.vocab_size < 0.9 * rows:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} ids, model.path={config.model.path} "
            f"was trained with {rows}: they do not fit; use the model's own tokenizer"
        )
    if config.model.path is None:
        model_config.eos_token_id = tokenizer.eot_id
        model_config.bos_token_id = None
        model_config.pad_token_id = tokenizer.pad_id
    return model_config


# ---------------------------------------------------------------- model and engine


def say_plan(config: Config, model_config: Any, device: torch.device, say: Say) -> None:
    """One line on the memory the run will need, and a warning if the device has less."""
    planned = plan(config, vocab_size=int(model_config.vocab_size))
    say(f"planned memory: {planned.total_gib:.2f} GiB (`python -m loqt_ds.memory --config` says what for)")
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory / 2**30
        if planned.total_gib > available:
            say(f"warning: {device} has {available:.2f} GiB; lower train.micro_batch_size")


def load_model(
    config: Config, model_config: Any, device: torch.device, *, resumed: bool, say: Say
) -> tuple[nn.Module, Callable[[str], Tensor]]:
    """The converted model on its device, and where the original weights can be had for the first initialization."""
    make_source = initializer(config.train.seed) if config.model.path is None else checkpoint_files(config.model.path)
    dtype, attention = training_dtype(config), config.model.attention
    if resumed:
        model = materialize_zeros(build_meta(model_config, config.loqt, dtype=dtype, attention=attention), device)
        original = _LazySource(lambda: make_source(build_empty(model_config, attention=attention)))
    else:
        say("drawing weights" if config.model.path is None else f"reading weights from {config.model.path}")
        model, source = build_model(
            model_config, config.loqt, make_source, device=device, dtype=dtype, attention=attention
        )
        original = _LazySource(lambda: source)
    if config.train.activation_checkpointing:
        # Renamed within transformers 5; the old name warns where the new one exists.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
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
    config: Config, model: nn.Module, ds_config: dict[str, Any] | None, original: Callable[[str], Tensor]
) -> Engine:
    """DeepSpeed with a DeepSpeed configuration, else one device."""
    if ds_config is None:
        return SingleEngine(model, config, original=original)
    from loqt_ds.engines.deepspeed import LoQTEngine, start_distributed

    start_distributed()
    return LoQTEngine(model, config, ds_config, original=original)
