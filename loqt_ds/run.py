"""One run from its configuration to what it leaves: directory, tokenizer, data, model, engine, training, export.

Everything that can be refused is refused in the order of its cost: options, then the model's shape on the meta device,
then files and directories, then data; weights come last.

Where several ranks train, rank 0 chooses the directory and the checkpoint and reads every byte of it; the first rank of
each node prepares tokenizer and tokens, which the others then find in the cache. The others wait for these without a
limit: a corpus may take hours.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from loqt_ds.config import Config, ConfigError
from loqt_ds.data import DataBundle, Tokenizer, build_data, load_or_train_tokenizer
from loqt_ds.data.conversation import read_template
from loqt_ds.engines.base import Engine
from loqt_ds.engines.single import SingleEngine
from loqt_ds.evaluation import Evaluator
from loqt_ds.export import check_shared_base
from loqt_ds.export.gguf_tokenizer import read_tokenizer
from loqt_ds.failures import Voice
from loqt_ds.method import compiled, head, lean
from loqt_ds.method.conversion import (
    WeightSource,
    build_empty,
    build_meta,
    build_model,
    loqt_layers,
    materialize_zeros,
    task_head_parameters,
)
from loqt_ds.method.description import training_dtype
from loqt_ds.metrics import MetricsLogger
from loqt_ds.optim import freeze_full_rank, parameter_groups
from loqt_ds.preflight import (
    check_agreement,
    check_memory,
    check_options,
    check_same_data,
    configure_model,
    resolve_activations,
    weight_source,
)
from loqt_ds.ranks import Ranks
from loqt_ds.rundir import (
    Lock,
    choose_checkpoint,
    choose_directory,
    claim_directory,
    compare_model,
    is_claimed_by,
    write_options,
)
from loqt_ds.settling import build_evaluator, resolve_generation, resolve_steps
from loqt_ds.trainer import Trainer

if TYPE_CHECKING:
    from loqt_ds.engines.fsdp import Sharding

Say = Callable[[str], None]

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
    generation: dict[str, Any]  # generation_config.json of the export
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
    device, config, ds_options = ranks.attempt(lambda: check_options(config, ds_config, ranks.world_size))
    check_agreement(ranks, config, ds_options)
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
    check_same_data(ranks, config, data)
    if checkpoint is not None:
        compare_model(checkpoint, model_config)
        data.train.load_state_dict(checkpoint.metadata["data"])  # refuses other data, before anything is loaded

    generation = ranks.attempt(lambda: resolve_generation(config, tokenizer, model_config))
    as_given = config
    config = ranks.attempt(lambda: resolve_steps(config, data, ranks.world_size, checkpoint, say=say))
    evaluator = ranks.attempt(lambda: build_evaluator(config, tokenizer, data, model_config, device, say=say))

    directory, lock = _claim(config, chosen, ranks)
    voice.directory = directory
    if ranks.is_main:
        write_options(as_given, directory, ds_options)
        # Whoever loads the model asks it as it was trained to be asked.
        template = None if config.data.chat_template is None else read_template(config.data.chat_template)
        tokenizer.save(directory / "tokenizer", chat_template=template, say=say)
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
        extra_metadata={"model_config": model_config.to_dict(), "ds_config": ds_options, "generation": generation},
        directories={"tokenizer": directory / "tokenizer"},
    )
    if checkpoint is None:
        logger.event("data", {"step": 0, **data.summary})
    else:
        trainer.restore(checkpoint)
        say(f"going on from {checkpoint.path} (step {checkpoint.step})")
    resumed_step = None if checkpoint is None else checkpoint.step
    return Run(
        config,
        directory,
        tokenizer,
        data,
        engine,
        model_config,
        generation,
        evaluator,
        logger,
        trainer,
        lock,
        resumed_step,
    )


def _silent(_: str) -> None:
    """What ranks other than 0 say."""


# ---------------------------------------------------------------- the run's directory and checkpoint


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
    make_source, dtype = weight_source(config), training_dtype(config)
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
