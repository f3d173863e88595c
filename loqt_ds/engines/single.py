"""One device: the model, its masters and its optimizer states on one CPU or GPU.

Two orders of work, one code path per parameter:

- by default the update of all parameters follows the last micro-batch's backward, after clipping; in a
  re-initialization step each layer's gradient becomes its new P inside the backward, and the merges follow the update;
- with `optim.layerwise` each parameter is updated, and its gradient freed, inside the backward as soon as the gradient
  is complete; a layer that is due is then re-initialized on the spot.

A step whose gradient is not finite is skipped: as a whole by default, per parameter with layer-wise updates (others
have been updated by then).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.config import Config
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.state import ShardedFactors, load_model, model_tensors, random_tensors, restore_random
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import loqt_layers
from loqt_ds.optim import LearningRates, ParameterOptimizer, parameter_groups
from loqt_ds.ranks import ALONE
from loqt_ds.shards import LAYOUT, Fragment, Shard, ShardedState


def _shard(name: str, item: ParameterOptimizer) -> Shard:
    """One parameter is one shard."""
    whole = (Fragment(name, 0, item.parameter.numel(), 0),)
    is_copy = item.values is not item.parameter
    return Shard(name, whole, item.values, item.master, item.optimizer, is_copy)


class SingleEngine:
    """The `Engine` of one process and one device.

    Args:
        model: converted, on its device, in its training dtype.
        config: the whole configuration.
        original: (layer name) -> original weight, for the first initialization; None if there is none to be had.
    """

    ranks = ALONE

    def __init__(self, model: nn.Module, config: Config, *, original: Callable[[str], Tensor] | None = None) -> None:
        self._model, self._config = model, config
        self.device = next(model.parameters()).device
        self._generator = torch.Generator(self.device)
        self._generator.manual_seed(config.train.seed)
        self._optimizers: dict[str, ParameterOptimizer] = {}
        self._is_factor: dict[str, bool] = {}
        for group in parameter_groups(model, config.optim):
            for name, parameter in group.parameters.items():
                self._optimizers[name] = ParameterOptimizer(
                    parameter, config.optim, weight_decay=group.weight_decay, generator=self._generator
                )
                self._is_factor[name] = group.is_factor
        layers = loqt_layers(model)
        self._state = ShardedState(
            [_shard(name, item) for name, item in self._optimizers.items()],
            {name: item.parameter for name, item in self._optimizers.items()},
        )
        store = ShardedFactors(self._state)
        self.controller = Controller(layers, config.loqt, store, original=original, seed=config.train.seed)
        self._rates = LearningRates(config, self.controller.schedule)
        self._step, self._micro_batch, self._open = 0, 0, False
        self._squared_norm = 0.0  # of the gradients of this step, with layer-wise updates
        self._num_updates, self._num_skipped_updates = 0, 0  # of this step, with layer-wise updates
        self._hooks: list[Any] = []
        self._add_hooks()

    @property
    def network(self) -> nn.Module:
        return self._model

    @property
    def step_index(self) -> int:
        return self._step

    # ---------------------------------------------------------------- one micro-batch

    def __call__(self, **inputs: Any) -> Any:
        if self._model.training and torch.is_grad_enabled():
            self._begin()
        return self._model(**inputs)

    def _begin(self) -> None:
        """Opens the step, if its first micro-batch has not."""
        if not self._open:
            self.controller.begin_step(self._step)
            self._squared_norm, self._num_updates, self._num_skipped_updates, self._open = 0.0, 0, 0, True

    def backward(self, loss: Tensor) -> None:
        (loss / self._config.train.gradient_accumulation_steps).backward()

    def step(self) -> StepReport | None:
        self._micro_batch += 1
        if self._micro_batch < self._config.train.gradient_accumulation_steps:
            return None
        lr, lr_full_rank = self._rates.at(self._step)
        if self._config.optim.layerwise:
            applied, norm = self._num_skipped_updates == 0, math.sqrt(self._squared_norm)
            reinit = self.controller.end_step(self._num_updates > 0)
        else:
            applied, norm = self._update(lr, lr_full_rank)
            reinit = self.controller.end_step(applied)
        report = StepReport(self._step, applied, norm, lr, lr_full_rank, reinit)
        self._step, self._micro_batch, self._open = self._step + 1, 0, False
        return report

    def _update(self, lr: float, lr_full_rank: float) -> tuple[bool, float]:
        """Clips and updates everything; skips all of it where the gradient is not finite."""
        live = [name for name, item in self._optimizers.items() if item.parameter.grad is not None]
        gradients = [g for name in live if (g := self._optimizers[name].parameter.grad) is not None]
        # float32: the norm of bf16 gradients in bf16 has three digits.
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).norm()
        value = norm.item()  # a host-device synchronization: the one of an ordinary step
        if not math.isfinite(value):
            for name in live:
                self._optimizers[name].parameter.grad = None
            return False, value
        limit = self._config.train.max_grad_norm
        if limit is not None:
            parameters = [self._optimizers[name].parameter for name in live]
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        for name in live:
            self._optimizers[name].step(lr if self._is_factor[name] else lr_full_rank)
        return True, value

    # ---------------------------------------------------------------- inside the backward

    def _add_hooks(self) -> None:
        """Hooks run when a parameter's gradient of one backward is complete, shared uses included."""
        for name, optimizer in self._optimizers.items():
            layer = name.removesuffix(".B") if self._is_factor[name] else None
            if self._config.optim.layerwise:
                hook = self._layerwise_hook(name, optimizer, layer)
            elif layer is not None:
                hook = self._complete_hook(layer)
            else:
                continue
            self._hooks.append(optimizer.parameter.register_post_accumulate_grad_hook(hook))

    def _complete_hook(self, layer: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            in_last_micro_batch = self._micro_batch == self._config.train.gradient_accumulation_steps - 1
            if self._open and in_last_micro_batch:
                self.controller.gradient_complete(layer)

        return hook

    def _layerwise_hook(self, name: str, optimizer: ParameterOptimizer, layer: str | None) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not self._open:
                return
            assert parameter.grad is not None
            squared = parameter.grad.float().pow(2).sum().item()  # a synchronization, the price of skipping safely
            self._squared_norm += squared
            if not math.isfinite(squared):
                parameter.grad = None
                self._num_skipped_updates += 1
                return  # a layer stays as it is; the controller reports it when the step ends
            optimizer.step(self._rates.at(self._step)[0 if self._is_factor[name] else 1])
            self._num_updates += 1
            parameter.grad = None
            if layer is not None:
                self.controller.gradient_complete(layer)
                self.controller.apply(layer)

        return hook

    # ---------------------------------------------------------------- saving

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        assert not self._open, "a checkpoint is taken between steps"
        random = random_tensors(self.device) | {f"rounding_{self.device.type}": self._generator.get_state()}
        return {"model": model_tensors(self._model), "optimizer": self._state.saved(), "random": random}

    def saved_state(self) -> dict[str, Any]:
        return {
            "engine": "single",
            "step": self._step,
            "controller": self.controller.state_dict(),
            LAYOUT: self._state.layout(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.metadata["engine_state"]
        self.controller.load_state_dict(state["controller"])  # first: it may refuse
        load_model(self._model, checkpoint)
        self.controller.check_originals()
        self._state.restore(checkpoint)
        random = restore_random(checkpoint, self.ranks, self.device, self._config.train.seed)
        # On another kind of device the roundings to come are others, as all arithmetic is.
        if (rounding := random.get(f"rounding_{self.device.type}")) is not None:
            self._generator.set_state(rounding)
        self._step = int(state["step"])

    def masters(self) -> dict[str, Tensor]:
        return self._state.masters()

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._optimizers.clear()
        del self._state, self.controller.store
