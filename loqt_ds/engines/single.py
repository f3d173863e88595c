"""One device: the model, its masters and its optimizer states on one CPU or GPU.

Two orders of work, one code path per parameter:

- by default the update of all parameters follows the last micro-batch's backward, after clipping; in a
  re-initialization step each layer's gradient becomes its new P inside the backward, and the merges follow the update;
- with `optim.layerwise` each parameter is updated, and its gradient freed, inside the last micro-batch's backward as
  soon as the gradient is complete; a layer that is due is then re-initialized on the spot.

Both give the same bits: nothing that an update reads depends on the order of updates, the rounding's random numbers,
which are seeded by (seed, step, parameter), included.

A step whose gradient is not finite is skipped: as a whole by default, per parameter with layer-wise updates (others
have been updated by then).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.config import Config
from loqt_ds.core.subspace import layer_seed
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.state import ShardedFactors, engine_state, model_tensors, random_tensors, take_back
from loqt_ds.method.controller import Controller
from loqt_ds.method.conversion import loqt_layers
from loqt_ds.optim import LearningRates, ParameterOptimizer, clipping_scale, gradient_norm, parameter_groups
from loqt_ds.ranks import ALONE
from loqt_ds.shards import Fragment, Shard, ShardedState


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
        self._generator = torch.Generator(self.device)  # seeded for every update
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
        self._norms: list[float] = []  # of the gradients of this step, with layer-wise updates
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
            self._norms, self._open = [], True

    def backward(self, loss: Tensor) -> None:
        (loss / self._config.train.gradient_accumulation_steps).backward()

    @property
    def _in_last_micro_batch(self) -> bool:
        return self._open and self._micro_batch == self._config.train.gradient_accumulation_steps - 1

    def step(self) -> StepReport | None:
        if self._config.optim.layerwise and self._in_last_micro_batch:
            for name in self._live():  # parameters that only an earlier micro-batch made use of
                self._update_at_once(name)
        self._micro_batch += 1
        if self._micro_batch < self._config.train.gradient_accumulation_steps:
            return None
        if self._config.optim.layerwise:
            norms = self._norms
            applied = all(map(math.isfinite, norms))
            reinit = self.controller.end_step(any(map(math.isfinite, norms)))
        else:
            applied, norms = self._update_all()
            reinit = self.controller.end_step(applied)
        # The exact sum: the same whatever the order of updates.
        norm = math.sqrt(math.fsum(norm * norm for norm in norms))
        report = StepReport(self._step, applied, norm, *self._rates.at(self._step), reinit)
        self._step, self._micro_batch, self._open = self._step + 1, 0, False
        return report

    def _live(self) -> list[str]:
        """Parameters that have a gradient."""
        return [name for name, item in self._optimizers.items() if item.parameter.grad is not None]

    def _update_all(self) -> tuple[bool, list[float]]:
        """Clips and updates everything; skips all of it where a gradient is not finite. Returns (whether it was
        applied, the norm of each gradient)."""
        live = self._live()
        parameters = [self._optimizers[name].parameter for name in live]
        norms = torch.stack([gradient_norm(p.grad) for p in parameters if p.grad is not None])
        # A host-device synchronization, the one of an ordinary step: whether there is an update hangs on it. A CUDA
        # device is idle from then until the update's first kernel is launched; what that costs is not measured.
        values: list[float] = norms.tolist()
        if not all(map(math.isfinite, values)):
            for parameter in parameters:
                parameter.grad = None
            return False, values
        limit = self._config.train.max_grad_norm
        if limit is not None:
            total = torch.linalg.vector_norm(norms, dtype=torch.float64).float()  # float32 squares could overflow
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
        for name, norm in zip(live, values, strict=True):
            self._update(name, norm)
        return True, values

    def _update(self, name: str, norm: float) -> None:
        """Takes one parameter's step, from its gradient of norm `norm`, and frees the gradient."""
        lr, lr_full_rank = self._rates.at(self._step)
        self._generator.manual_seed(layer_seed(self._config.train.seed, self._step, name))
        self._optimizers[name].step(
            lr if self._is_factor[name] else lr_full_rank,
            gradient_scale=clipping_scale(norm, self._config.train.max_grad_norm_per_parameter),
        )

    def _update_at_once(self, name: str) -> bool:
        """Updates one parameter while others wait for their gradients; skips it where its gradient is not finite."""
        parameter = self._optimizers[name].parameter
        assert parameter.grad is not None
        norm = gradient_norm(parameter.grad).item()  # a synchronization, the price of skipping safely
        self._norms.append(norm)
        if not math.isfinite(norm):
            parameter.grad = None
            return False
        self._update(name, norm)
        return True

    # ---------------------------------------------------------------- inside the backward

    def _add_hooks(self) -> None:
        """Hooks run when a parameter's gradient of one backward is complete, shared uses included."""
        for name, optimizer in self._optimizers.items():
            layer = name.removesuffix(".B") if self._is_factor[name] else None
            if self._config.optim.layerwise:
                hook = self._layerwise_hook(name, layer)
            elif layer is not None:
                hook = self._complete_hook(layer)
            else:
                continue
            self._hooks.append(optimizer.parameter.register_post_accumulate_grad_hook(hook))

    def _complete_hook(self, layer: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._in_last_micro_batch:
                self.controller.gradient_complete(layer)

        return hook

    def _layerwise_hook(self, name: str, layer: str | None) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if not self._in_last_micro_batch:
                return  # the gradient stays, and the next micro-batch's is added to it
            # Of a layer that is not updated the controller decides when the step ends, by what its tap has gathered.
            if self._update_at_once(name) and layer is not None:
                self.controller.gradient_complete(layer)
                self.controller.apply(layer)

        return hook

    # ---------------------------------------------------------------- outside of training

    def evaluating(self, *, alone: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        assert not self._open, "a checkpoint is taken between steps"
        return {
            "model": model_tensors(self._model),
            "optimizer": self._state.saved(),
            "random": random_tensors(self.device),
        }

    def saved_state(self) -> dict[str, Any]:
        return engine_state("single", self._step, self.controller, self._state)

    def restore(self, checkpoint: Checkpoint) -> None:
        seed = self._config.train.seed
        take_back(checkpoint, self._model, self.controller, self._state, device=self.device, seed=seed)
        self._step = int(checkpoint.metadata["engine_state"]["step"])

    def masters(self) -> dict[str, Tensor]:
        return self._state.masters()

    def release(self, *, keep: bool = True) -> None:
        for hook in self._hooks:
            hook.remove()
        self._optimizers.clear()
        del self._state, self.controller.store
