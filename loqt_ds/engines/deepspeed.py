"""LoQT inside DeepSpeed: an engine that is a `DeepSpeedEngine`, with ZeRO over the trained parameters only.

Frozen W and P are uint8 buffers, which DeepSpeed neither casts, shards nor broadcasts. B is in a parameter group of its
own. The engine tells the controller when a step begins and, once ZeRO has applied the update, lets it re-initialize;
new factors are written to the parameters and to ZeRO's float32 masters alike.

One process; `check_deepspeed` refuses more, and everything else that cannot be honoured, before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint, CheckpointError
from loqt_ds.config import Config, ConfigError
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.state import load_model, model_tensors, random_tensors, restore_random
from loqt_ds.engines.zero import ZeroState, ZeroStore
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import loqt_layers
from loqt_ds.optim import LearningRates, build_optimizer, parameter_groups

# What may stand in a DeepSpeed configuration. DeepSpeed itself ignores unknown top-level keys.
_DECIDED_BY_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
_HONOURED = (
    *_DECIDED_BY_RECIPE,
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
# What cannot, and why.
_REFUSED = {
    "optimizer": "the optimizer is built from the recipe's `optim` section; remove it there",
    "scheduler": "the learning rate follows the recipe's `optim` section; remove it there",
    "fp16": "LoQT trains in bf16 or float32; remove it and set train.dtype",
    "amp": "LoQT trains in bf16 or float32; remove it and set train.dtype",
    "torch_autocast": "LoQT trains in bf16 or float32; remove it and set train.dtype",
    "data_types": "gradients are accumulated in train.dtype; remove it",
    "pipeline": "a layer's gradient must reach its owner whole; use data parallelism",
    "tensor_parallel": "a layer's weight must be whole on its rank; use data parallelism",
    "activation_checkpointing": "set train.activation_checkpointing of the recipe instead",
    "data_efficiency": "batches come from the recipe's `data` section; remove it",
    "curriculum_learning": "batches come from the recipe's `data` section; remove it",
    "compression_training": "weights are quantized by LoQT; remove it",
}
_REFUSED_ZERO = {
    "offload_optimizer": "re-initialization rewrites optimizer states on the device; remove it",
    "offload_param": "the trained parameters are few; remove it",
    "cpu_offload": "re-initialization rewrites optimizer states on the device; remove it",
    "zero_hpz_partition_size": "it belongs to ZeRO stage 3; remove it",
}


def check_deepspeed(path: str | Path, config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the file, completed from the recipe.

    A value that both give must agree. Raises ConfigError, naming both places, where it does not, and for anything that
    cannot be honoured.
    """
    file = Path(path)
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--ds_config {file} cannot be read ({error.strerror}); try configs/zero2.json") from error
    except ValueError as error:
        raise ConfigError(f"--ds_config {file} is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"--ds_config {file} holds no JSON object; try configs/zero2.json")
    for name, section in given.items():
        if name in _REFUSED and section and not (isinstance(section, dict) and section.get("enabled") is False):
            raise ConfigError(f"{file}: `{name}` cannot be honoured: {_REFUSED[name]}")
        if name not in _HONOURED and name not in _REFUSED:
            close = difflib.get_close_matches(name, _HONOURED, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"use some of {', '.join(_HONOURED)}"
            raise ConfigError(f"{file}: `{name}` is not a section that is read; {hint}")
    for name in ("zero_optimization", "bf16", "loqt"):
        if not isinstance(given.get(name, {}), dict):
            raise ConfigError(f"{file}: {name}={given[name]!r} must be an object; see configs/zero2.json")
    zero = given.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2):
        raise ConfigError(
            f"{file}: zero_optimization.stage={zero.get('stage', 0)} is not supported: frozen weights are buffers that "
            "stage 3 would not shard, and stage 0 keeps no masters; use 1 or 2"
        )
    for name, reason in _REFUSED_ZERO.items():
        if zero.get(name):
            raise ConfigError(f"{file}: zero_optimization.{name} cannot be honoured: {reason}")
    bf16 = given.get("bf16", {})
    if extra := sorted(set(bf16) - {"enabled", "check_grad_overflow"}):
        raise ConfigError(f"{file}: bf16.{extra[0]} cannot be honoured: masters follow optim.master; remove it")
    if bf16.get("check_grad_overflow") is False:
        raise ConfigError(
            f"{file}: bf16.check_grad_overflow=false cannot be honoured: a step whose gradient is not finite must be "
            "skipped; remove it"
        )
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            f"{file}: zero_optimization.compute_grad_norm=false: the norm decides what is skipped; remove it"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: this version trains in one process; start it with "
            "`deepspeed --num_gpus 1 launch/pretrain.py ...`"
        )
    if config.train.device not in ("auto", *_launched_devices()):
        raise ConfigError(
            f"train.device={config.train.device}: under DeepSpeed the launcher decides the device; use "
            "train.device=auto, and CUDA_VISIBLE_DEVICES or DS_ACCELERATOR=cpu to choose"
        )
    if config.optim.layerwise:
        raise ConfigError("optim.layerwise=true: ZeRO updates after the backward; use `python -m loqt_ds.train`")
    if config.optim.master == "bf16":
        raise ConfigError(
            "optim.master=bf16: ZeRO's masters are float32, and it does not round stochastically; use "
            "optim.master=fp32, or `python -m loqt_ds.train`"
        )
    complete = given | _derived(given, config, file) | {"zero_allow_untested_optimizer": True}
    try:
        DeepSpeedConfig(complete)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:  # what its sections raise
        raise ConfigError(f"{file}: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    return complete


def _launched_devices() -> tuple[str, ...]:
    """The names of the device that DeepSpeed will use in this process."""
    kind = get_accelerator().device_name()
    return kind, f"{kind}:{os.environ.get('LOCAL_RANK', '0')}"


def _derived(given: dict[str, Any], config: Config, file: Path) -> dict[str, Any]:
    """Values the recipe decides, in DeepSpeed's names; refuses the file's where they differ."""
    train = config.train
    derived: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": (f"train.micro_batch_size={train.micro_batch_size}", train.micro_batch_size),
        "gradient_accumulation_steps": (
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}",
            train.gradient_accumulation_steps,
        ),
        "train_batch_size": (
            f"train.micro_batch_size × train.gradient_accumulation_steps = "
            f"{train.micro_batch_size * train.gradient_accumulation_steps}",
            train.micro_batch_size * train.gradient_accumulation_steps,
        ),
        "gradient_clipping": (f"train.max_grad_norm={train.max_grad_norm}", train.max_grad_norm or 0.0),
    }
    for name, (source, value) in derived.items():
        if given.get(name, "auto") not in ("auto", value):
            raise ConfigError(
                f"{name}={given[name]} in {file} contradicts {source} of the recipe; give it in one place only"
            )
    bf16 = train.dtype == "bf16"
    section = given.get("bf16", {})
    if section.get("enabled", "auto") not in ("auto", bf16):
        raise ConfigError(
            f"bf16.enabled={section['enabled']} in {file} contradicts train.dtype={train.dtype} of the recipe; "
            "give it in one place only"
        )
    method = given.get("loqt", {})
    for name, value in method.items():
        if not hasattr(config.loqt, name):
            raise ConfigError(f"{file}: loqt.{name} is not an option; see `python -m loqt_ds.train --help`")
        if getattr(config.loqt, name) != value:
            raise ConfigError(
                f"loqt.{name}={value} in {file} contradicts loqt.{name}={getattr(config.loqt, name)} of the recipe; "
                "give it in one place only"
            )
    return {name: value for name, (_, value) in derived.items()} | {"bf16": section | {"enabled": bf16}}


def start_distributed() -> None:
    """Makes a process group of one process, with or without a launcher."""
    # Its warnings about this engine's choices (an optimizer "untested" with ZeRO) are answered in this module.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The launcher gives every run the same port: a second run on the machine would find it taken.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("LOCAL_RANK", "0")
    # The shared-memory transport would be compiled at the first start (35 s), and one process never uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


class LoQTEngine(DeepSpeedEngine):
    """A `DeepSpeedEngine` that re-initializes W, P and B when the schedule says so.

    Args:
        model: converted, in its training dtype.
        config: the whole configuration.
        ds_config: what `check_deepspeed` returned.
        original: (layer name) -> original weight, for the first initialization; None if there is none to be had.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        ds_config: dict[str, Any],
        *,
        original: Callable[[str], Tensor] | None = None,
    ) -> None:
        groups = parameter_groups(model, config.optim)
        self._parameters_by_name = {name: p for group in groups for name, p in group.parameters.items()}
        self._group_is_factor = [group.is_factor for group in groups]
        # `model.bfloat16()` inside would round float buffers (rotary tables) for good.
        float_buffers = {n: b.detach().clone() for n, b in model.named_buffers() if b.is_floating_point()}
        super().__init__(
            args=None,
            model=model,
            optimizer=lambda parameters: build_optimizer(parameters, config.optim),
            model_parameters=[
                {"params": list(group.parameters.values()), "weight_decay": group.weight_decay} for group in groups
            ],
            config=ds_config,
            config_class=DeepSpeedConfig(ds_config),
            dont_change_device=False,
        )
        for name, value in float_buffers.items():
            parent, _, child = name.rpartition(".")
            self.module.get_submodule(parent)._buffers[child] = value.to(self.device)
        self._zero_state = ZeroState(self.optimizer, self._parameters_by_name)
        layers = loqt_layers(self.module)
        store = ZeroStore(self._zero_state)
        self.controller = Controller(layers, config.loqt, store, original=original, seed=config.train.seed)
        self._rates = LearningRates(config, self.controller.schedule)
        self._in_step = False
        for name, layer in layers.items():
            layer.B.register_post_accumulate_grad_hook(self._gradient_hook(name))

    @property
    def rank(self) -> int:
        return self.global_rank

    @property
    def network(self) -> nn.Module:
        return self.module

    @property
    def step_index(self) -> int:
        return self.global_steps

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._in_step and self.controller.in_last_micro_batch:
                self.controller.gradient_complete(name)

        return hook

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.module.training and torch.is_grad_enabled():
            accumulation = self.gradient_accumulation_steps()
            if not self._in_step:
                self.controller.begin_step(self.global_steps, accumulation)
                self._in_step = True
            self.controller.begin_micro_batch(self.micro_steps % accumulation)
        return super().forward(*inputs, **kwargs)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> StepReport | None:
        """As `DeepSpeedEngine.step`; where it updates, it re-initializes what is due, and returns a report."""
        boundary, step = self.is_gradient_accumulation_boundary(), self.global_steps
        lr, lr_full_rank = self._rates.at(step)
        for group, is_factor in zip(self.optimizer.param_groups, self._group_is_factor, strict=True):
            group["lr"] = lr if is_factor else lr_full_rank
        super().step(lr_kwargs)
        if not boundary:
            return None
        applied = self.was_step_applied()
        reinit = self.controller.end_step(applied)
        self._in_step = False
        return StepReport(step, applied, float(self.get_global_grad_norm()), lr, lr_full_rank, reinit)

    # ---------------------------------------------------------------- saving

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        assert not self._in_step, "a checkpoint is taken between steps"
        return {
            "model": model_tensors(self.module),
            "optimizer": self._zero_state.saved(),
            "random": random_tensors(self.device),
        }

    def saved_state(self) -> dict[str, Any]:
        return {
            "engine": "deepspeed",
            "step": self.global_steps,
            "controller": self.controller.state_dict(),
            "counters": {"global_samples": self.global_samples, "skipped_steps": self.skipped_steps},
            "world_size": self.world_size,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.metadata["engine_state"]
        if state["engine"] != "deepspeed":
            raise CheckpointError(
                f"checkpoint.resume: {checkpoint.path} was written by the {state['engine']} engine; "
                "go on with the command that began the run"
            )
        load_model(self.module, checkpoint)
        self._zero_state.restore(checkpoint.tensors("optimizer"))
        restore_random(checkpoint.tensors("random"), self.device)
        self.global_steps = int(state["step"])
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        self.global_samples = int(state["counters"]["global_samples"])
        self.skipped_steps = int(state["counters"]["skipped_steps"])
        self.controller.load_state_dict(state["controller"])

    def masters(self) -> dict[str, Tensor]:
        return self._zero_state.masters()

    def release(self) -> None:
        self.destroy()
        del self._zero_state, self.optimizer
