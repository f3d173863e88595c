"""LoQT inside DeepSpeed: an engine that is a `DeepSpeedEngine`, with ZeRO over the trained parameters only.

Frozen W and P are uint8 buffers, which DeepSpeed neither casts, shards nor broadcasts: each rank keeps all of them,
made equal at the start and compared, by a checksum over all ranks, at every re-initialization and save. B is in a
parameter group of its own; masters, moments and gradients are ZeRO's (stage 0, 1, 2). The engine tells the controller
when a step begins, when a layer's gradient is complete and, once ZeRO has applied the update, that it may
re-initialize; what the controller reads and writes goes through the shards that ZeRO's partitions are
(`loqt_ds.shards`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups as process_groups
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from loqt_ds.config import Config, TrainConfig
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.processes import prepare_to_meet
from loqt_ds.engines.state import (
    ShardedFactors,
    check_replicas,
    engine_state,
    load_model,
    own_part,
    random_tensors,
    take_back,
)
from loqt_ds.export import ExportReport, export_model
from loqt_ds.export.writer import options_of
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import keep_dequantized, loqt_layers
from loqt_ds.optim import LearningRates, RoundingAdam, build_optimizer, parameter_groups
from loqt_ds.ranks import Ranks
from loqt_ds.shards import Fragment, Shard, ShardedState

DEFAULT_TIMEOUT_SECONDS = TrainConfig().collective_timeout_seconds
_SAVED_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def start_distributed(*, timeout_seconds: int = DEFAULT_TIMEOUT_SECONDS, port: int | None = None) -> Ranks:
    """Starts or joins the process group, under a launcher or alone; returns the ranks over a group of their own.

    Args:
        timeout_seconds: after which a collective that some rank does not join is an error.
        port: of rank 0, where the launcher names none.
    """
    # Its warnings about this engine's choices (an optimizer "untested" with ZeRO) are answered in this room.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    prepare_to_meet(port)
    # The shared-memory transport would be compiled at the first start (35 s), for sums within one machine's CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds)}
    if port is not None:
        options["distributed_port"] = port
    deepspeed.init_distributed(verbose=False, **options)
    device = deepspeed.get_accelerator().current_device_name()
    if dist.get_world_size() == 1:
        return Ranks(device=device)  # nobody to talk to: a group would only hold files open
    if process_groups._WORLD_GROUP is None:
        # ZeRO's group, which DeepSpeed would make with the backend's default timeout, whatever it was given above.
        process_groups._WORLD_GROUP = dist.new_group(list(range(dist.get_world_size())), timeout=options["timeout"])
    # Its own group: sums of re-initializations run beside ZeRO's and must not be mixed up with them.
    group = dist.new_group(timeout=options["timeout"])
    return Ranks(group, device=device)


class LoQTEngine(DeepSpeedEngine):
    """A `DeepSpeedEngine` that re-initializes W, P and B when the schedule says so.

    Args:
        model: converted, in its training dtype.
        config: method, optimizer and steps; its `train` section agrees with `ds_config`.
        ds_config: what `check_deepspeed` or `plugin_config` returned.
        ranks: what `start_distributed` returned.
        groups: torch-style parameter groups over the trained parameters, those of factors apart from the others; None:
            those of `config.optim`.
        original: (layer name) -> original weight, for the first initialization; None if there is none to be had.
        scheduled: whether learning rates follow `config.optim`; else they are the groups' or a scheduler's.
        Others: as of `DeepSpeedEngine`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        ds_config: dict[str, Any],
        *,
        ranks: Ranks,
        groups: list[dict[str, Any]] | None = None,
        original: Callable[[str], Tensor] | None = None,
        scheduled: bool = True,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        **options: Any,
    ) -> None:
        self.ranks, self._loqt_config = ranks, config
        layers = loqt_layers(model)
        if groups is None:
            groups = [
                {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
                for group in parameter_groups(model, config.optim)
            ]
        for layer in layers.values():
            for buffer in layer.packed_tensors().values():
                # DeepSpeed broadcasts parameters, and leaves buffers to chance.
                on_device = buffer.to(ranks.device)
                ranks.broadcast(on_device, 0)
                buffer.copy_(on_device)
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        self._trained = {name: p for name, p in model.named_parameters() if id(p) in trained}
        factors = {id(layer.B) for layer in layers.values()}
        self._group_is_factor = [any(id(p) in factors for p in group["params"]) for group in groups]
        # `model.bfloat16()` inside would round float buffers (rotary tables) for good.
        float_buffers = {n: b.detach().clone() for n, b in model.named_buffers() if b.is_floating_point()}
        super().__init__(
            args=options.pop("args", None),
            model=model,
            optimizer=optimizer or self._make_optimizer,
            model_parameters=groups,
            config=ds_config,
            config_class=DeepSpeedConfig(ds_config),
            dont_change_device=False,
            **options,
        )
        for name, value in float_buffers.items():
            parent, _, child = name.rpartition(".")
            self.module.get_submodule(parent)._buffers[child] = value.to(self.device)
        keep_dequantized(self.module, config.loqt)  # of the dtype that the parameters have now
        shards, replicated = self._find_shards()
        num_replicas = ranks.world_size if replicated else 1
        self._state = ShardedState(shards, self._trained, ranks=ranks, num_replicas=num_replicas)
        # Stage 0 in bf16 allocates states by a step without gradients, which counts, and decays the masters.
        self._state.start_anew()
        store = ShardedFactors(self._state)
        self.controller = Controller(layers, config.loqt, store, original=original, seed=config.train.seed, ranks=ranks)
        self._rates = LearningRates(config, self.controller.schedule) if scheduled else None
        # Whether a step has been opened; and whether one of its gradients is there.
        self._in_step = self._has_gradients = False
        for name, layer in layers.items():
            layer.B.register_post_accumulate_grad_hook(self._gradient_hook(name))

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optim, train = self._loqt_config.optim, self._loqt_config.train
        if optim.master == "bf16":
            return RoundingAdam(groups, optim, seed=train.seed + self.ranks.rank)
        return build_optimizer(groups, optim)

    # ---------------------------------------------------------------- where ZeRO keeps the trained state

    def _find_shards(self) -> tuple[list[Shard], bool]:
        """This rank's shards, and whether every rank has the same ones."""
        names = {id(parameter): name for name, parameter in self._trained.items()}
        if hasattr(self.optimizer, "single_partition_of_fp32_groups"):  # stage 1 and 2
            return [self._zero_shard(number, names) for number in range(len(self.optimizer.bit16_groups))], False
        pairs: list[tuple[nn.Parameter, Tensor]]
        if hasattr(self.optimizer, "fp32_groups"):  # stage 0 in bf16
            inner = self.optimizer.optimizer
            pairs = [
                pair
                for ours, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
                for pair in zip(ours, masters, strict=True)
            ]
        else:  # stage 0 in float32
            inner = self.optimizer
            pairs = [(p, p) for group in inner.param_groups for p in group["params"]]
        shards = []
        for parameter, master in pairs:
            name = names[id(parameter)]
            whole = (Fragment(name, 0, parameter.numel(), 0),)
            shards.append(Shard(name, whole, master, master, inner, master is not parameter))
        return shards, True

    def _zero_shard(self, number: int, names: dict[int, str]) -> Shard:
        """This rank's partition of a parameter group."""
        fragments = []
        for parameter in self.optimizer.bit16_groups[number]:
            mapping = parameter._hp_mapping
            if mapping is not None:  # None: all of it is on other ranks
                ours, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(Fragment(names[id(parameter)], ours.start, flat.numel, flat.start))
        fragments.sort(key=lambda fragment: fragment.offset)
        values, optimizer = self.optimizer.single_partition_of_fp32_groups[number], self.optimizer.optimizer
        slot = values
        if isinstance(optimizer, RoundingAdam):
            item = optimizer.item(values, optimizer.param_groups[number])
            slot, optimizer = item.master, item.optimizer
        return Shard(f"rank{self.ranks.rank}.group{number}", tuple(fragments), values, slot, optimizer, True)

    # ---------------------------------------------------------------- one step

    @property
    def network(self) -> nn.Module:
        return self.module

    @property
    def step_index(self) -> int:
        return self.global_steps

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            self._has_gradients = True
            # Within `no_sync`, more of this step's gradient is to come.
            if self._in_step and self.is_gradient_accumulation_boundary() and not self.inside_no_sync_ctxt:
                self.controller.gradient_complete(name)

        return hook

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As `DeepSpeedEngine.forward`. The first one of a step with gradients on opens the step; evaluation and
        generation without do not."""
        if torch.is_grad_enabled() and not self._in_step:
            self.controller.begin_step(self.global_steps)
            self._in_step = True
        return super().forward(*inputs, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """As `DeepSpeedEngine.backward`. After that of the last micro-batch every rank has handed over what it has."""
        result = super().backward(*args, **kwargs)
        if self._in_step and self.is_gradient_accumulation_boundary() and not self.inside_no_sync_ctxt:
            self.controller.backward_complete()
        return result

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> StepReport | None:
        """As `DeepSpeedEngine.step`; where it updates, it re-initializes what is due, and returns a report.

        Raises ReplicaMismatch before and after a re-initialization if the ranks do not hold the same model.
        """
        boundary, step = self.is_gradient_accumulation_boundary(), self.global_steps
        if self._has_gradients and not self._in_step:
            raise RuntimeError(
                "there are gradients of a forward that did not go through the engine, so that its re-initializations "
                "would see nothing; call engine(...) instead of engine.module(...)"
            )
        if self._rates is not None:
            lr, lr_full_rank = self._rates.at(step)
            for group, is_factor in zip(self.optimizer.param_groups, self._group_is_factor, strict=True):
                group["lr"] = lr if is_factor else lr_full_rank
        used = self._learning_rates()
        super().step(lr_kwargs)
        if not boundary or not self._in_step:
            return None
        applied = self.was_step_applied()
        if applied and self.controller.active:
            # Afterwards all ranks hold what the owners have merged, damaged or not.
            check_replicas(self.module, self.ranks)
        reinit = self.controller.end_step(applied)
        self._in_step = self._has_gradients = False
        if reinit is not None:
            check_replicas(self.module, self.ranks)
        norm = self.get_global_grad_norm()
        return StepReport(step, applied, math.nan if norm is None else float(norm), *used, reinit)

    def _learning_rates(self) -> tuple[float, float]:
        """(of factors, of the rest) as the groups have them."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        of_factors = [rate for rate, is_factor in zip(rates, self._group_is_factor, strict=True) if is_factor]
        others = [rate for rate, is_factor in zip(rates, self._group_is_factor, strict=True) if not is_factor]
        return (of_factors or rates)[0], (others or rates)[0]

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        if self.optimizer is self.basic_optimizer:
            # Stage 0 in float32: DeepSpeed steps the plain optimizer, whatever the gradients are.
            gradients = [p.grad for p in self._trained.values() if p.grad is not None]
            norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).norm().item()
            self.optimizer._global_grad_norm, self.optimizer.overflow = norm, not math.isfinite(norm)
            if self.optimizer.overflow:
                for parameter in self._trained.values():
                    parameter.grad = None
        super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        if not self.optimizer.overflow:  # else there are none left
            super().clip_fp32_gradients()

    # ---------------------------------------------------------------- saving

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        self._between_steps("a checkpoint is taken")
        check_replicas(self.module, self.ranks)
        random = random_tensors(self.device)
        if isinstance(self.basic_optimizer, RoundingAdam):
            random[f"rounding_{self.device.type}"] = self.basic_optimizer.generator(self.device).get_state()
        return {
            "model": own_part(self.module, self.ranks),
            "optimizer": self._state.saved(),
            "random": random,
        }

    def _between_steps(self, what: str) -> None:
        """Raises ValueError within a step; one without a gradient yet (a forward that was looked at) is taken back."""
        if self._has_gradients:
            raise ValueError(f"{what}: a step has begun; wait for the engine.step() of its last micro-batch")
        if self._in_step:
            self.controller.abandon_step()
            self._in_step = False

    def saved_state(self) -> dict[str, Any]:
        state = engine_state("deepspeed", self.global_steps, self.controller, self._state)
        state["skipped_steps"] = self.skipped_steps
        if (scaler := self._loss_scaler()) is not None:
            state["loss_scaler"] = {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)}
        if self._rates is None:
            groups = self.optimizer.param_groups
            state["groups"] = [
                {name: group[name] for name in _SAVED_HYPERPARAMETERS if name in group} for group in groups
            ]
            state["lr_scheduler"] = None if self.lr_scheduler is None else self.lr_scheduler.state_dict()
        return state

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.metadata["engine_state"]
        seed = self._loqt_config.train.seed
        random = take_back(checkpoint, self.module, self.controller, self._state, device=self.device, seed=seed)
        rounding = random.get(f"rounding_{self.device.type}")
        if rounding is not None and isinstance(self.basic_optimizer, RoundingAdam):
            self.basic_optimizer.generator(self.device).set_state(rounding)
        self.global_steps = int(state["step"])
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        self.global_samples = self.global_steps * self.train_batch_size()
        self.skipped_steps = int(state.get("skipped_steps", 0))
        if (scaler := self._loss_scaler()) is not None and "loss_scaler" in state:
            vars(scaler).update(state["loss_scaler"])
        if self._rates is None and "groups" in state:
            for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
                group.update(saved)
            if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
                self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        check_replicas(self.module, self.ranks)

    def _loss_scaler(self) -> Any:
        """What adapts the loss scale, where there is one (fp16)."""
        if not self.fp16_enabled():
            return None
        return getattr(self.optimizer, "loss_scaler", None) or getattr(self.optimizer, "loss_scale_config", None)

    def evaluating(self, *, alone: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def masters(self) -> dict[str, Tensor]:
        return self._state.masters()

    def release(self, *, keep: bool = True) -> None:
        self.destroy()
        # DeepSpeed's `destroy` leaves the partitions with the optimizer that was handed to it.
        self.basic_optimizer.state.clear()
        self.basic_optimizer.param_groups.clear()
        self.lr_scheduler = None
        del self._state, self.controller.store, self.optimizer, self.basic_optimizer

    # ---------------------------------------------------------------- what DeepSpeed's users call

    def save_checkpoint(  # type: ignore[override]
        self,
        save_dir: str | Path,
        tag: str | int | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves SAVE_DIR/TAG (step_N without a tag), whole or not at all; any number of ranks can go on from it.

        `client_state` is JSON. Raises ValueError for one that is not, for options that the format does not have, and
        within a step.
        """
        if not save_latest or exclude_frozen_parameters:
            option = "exclude_frozen_parameters=True" if exclude_frozen_parameters else "save_latest=False"
            raise ValueError(f"save_checkpoint: {option}: a checkpoint is whole, and `latest` names the newest")
        self._between_steps("save_checkpoint")
        self.ranks.attempt(lambda: _check_json(client_state))
        metadata: dict[str, Any] = {
            "config": self._loqt_config.to_dict(),
            "engine_state": self.saved_state(),
            "client_state": client_state or {},
        }
        if (model_config := self._model_config()) is not None:
            metadata["model_config"] = model_config.to_dict()
            metadata["model_class"] = type(self.module).__name__  # no task of a configuration says it here
            if (generation_config := getattr(self.module, "generation_config", None)) is not None:
                metadata["generation"] = options_of(generation_config)
        tensors = self.saved_tensors()
        save_checkpoint(
            Path(save_dir),
            self.global_steps,
            tensors=tensors,
            metadata=metadata,
            keep=0,
            ranks=self.ranks,
            name=None if tag is None else str(tag),
        )
        return True

    def save_16bit_model(self, *_: Any, **__: Any) -> bool:  # type: ignore[override]
        """Refused: the weights that DeepSpeed would save here are packed in 4 bits, apart from their factors."""
        raise ValueError("save_16bit_model would save W, P and B apart; use engine.export(DIRECTORY, format='bf16')")

    save_fp16_model = save_16bit_model

    def load_checkpoint(  # type: ignore[override]
        self,
        load_dir: str | Path,
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Goes on from LOAD_DIR/TAG, or from the newest undamaged checkpoint in LOAD_DIR.

        Returns (its path, client state); (None, {}) where there is none. With `load_module_only`, or without optimizer
        states, the weights are loaded and training starts anew from them, with a re-initialization at its first step.
        Raises CheckpointError for a damaged or unfit checkpoint, ValueError for options that it does not have.
        """
        if not load_module_strict or custom_load_fn is not None or not load_lr_scheduler_states:
            raise ValueError(
                "load_checkpoint: load_module_strict=False, load_lr_scheduler_states=False and custom_load_fn are not "
                "supported: a checkpoint is loaded whole, or its weights alone (load_module_only=True)"
            )
        self._between_steps("load_checkpoint")
        root = Path(load_dir)

        def find() -> str | None:
            wanted = "auto" if tag is None else str(root / str(tag))
            found = find_checkpoint(root, wanted, option="tag")
            return None if found is None else str(found)

        path = self.ranks.on_main(find)
        if path is None:
            return None, {}
        checkpoint = self.ranks.attempt(lambda: load_checkpoint(Path(path), verify=False))
        if load_module_only or not load_optimizer_states:
            self.controller.load_state_dict(checkpoint.metadata["engine_state"]["controller"])
            load_model(self.module, checkpoint)
            self.controller.check_originals()
            self._state.start_anew()
        else:
            self.restore(checkpoint)
        return path, checkpoint.metadata.get("client_state", {})

    def export(
        self,
        output_dir: str | Path,
        format: str = "nf4",
        *,
        tokenizer_dir: str | Path | None = None,
        verify: bool = True,
    ) -> ExportReport:
        """Writes the model for others to load: "nf4", "bf16", "adapter", or "gguf" with the tokenizer's directory (a
        model that is not of transformers: bf16). verify=False: it is not loaded again and compared.

        Collective: rank 0 writes and verifies, all return its report. Raises ExportError if it was refused or failed.
        """
        masters = self.masters()
        return self.ranks.on_main(
            lambda: export_model(
                self.module,
                model_config=self._model_config(),
                tokenizer_dir=None if tokenizer_dir is None else Path(tokenizer_dir),
                output_dir=Path(output_dir),
                format=format,
                masters=masters,
                verify=verify,
            )
        )

    def _model_config(self) -> Any:
        """The transformers configuration of a model that is of one of transformers' own classes, by which an export is
        loaded again; None for other models."""
        import transformers

        known = getattr(transformers, type(self.module).__name__, None)
        return self.module.config if known is type(self.module) else None


def _check_json(client_state: dict[str, Any] | None) -> None:
    try:
        json.dumps(client_state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"save_checkpoint: client_state is not JSON ({error}); give numbers, text, lists and objects (torch's "
            "random states are in every checkpoint)"
        ) from error
