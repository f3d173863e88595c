"""Values that are computed a second time in the backward instead of being kept.

Idea: a function of a module (a normalization, a gated activation) runs without a graph and saves nothing but its
inputs; its backward runs the same function on them again, with a graph this time, and differentiates that. So the
gradients are, bit for bit, those of the module itself, whatever the function is, and of all its intermediate values
none is kept (Chen et al., arXiv 1604.06174, applied to one cheap function at a time).

Its output y carries a *recipe*: how to compute y from the inputs, which are kept anyway. A layer that needs y in its
backward (`LoQTLinear`) saves those inputs instead of y, which adds nothing to what is kept, and follows the recipe.

Everything kept goes through `save_for_backward`: autograd's check of in-place changes, saved-tensor hooks and both
kinds of activation checkpointing see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

_ATTRIBUTE = "_loqt_recipe"


class Autocast(NamedTuple):
    """The state of autocast on one type of device."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def restored(self) -> torch.autocast:
        """The context that brings it back. A second computation shall not fill the caches of the first."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True, slots=True)
class Computation:
    """A function of some inputs and of a module's own parameters, that gives the same tensor each time it is called.

    function: (module, *inputs) -> Tensor; reads parameters as attributes of the module, draws no random numbers and
        changes nothing.
    names: of the module's parameters, which follow the inputs in a call.
    """

    function: Callable[..., Tensor]
    module: nn.Module
    names: tuple[str, ...]
    autocast: Autocast

    def __call__(self, *tensors: Tensor) -> Tensor:
        num_inputs = len(tensors) - len(self.names)
        # A copy of the module that has the given tensors for parameters: the module itself may be in use in another
        # thread, and hooks on its parameters are for their gradients, not for those of a function within.
        module = object.__new__(type(self.module))
        module.__dict__.update(self.module.__dict__)
        given = dict(zip(self.names, tensors[num_inputs:], strict=True))
        module.__dict__["_parameters"] = {name: given.get(name) for name in self.module._parameters}
        with self.autocast.restored():
            return self.function(module, *tensors[:num_inputs])


class Recipe(NamedTuple):
    """How to compute a tensor again: `computation(*tensors)`."""

    computation: Computation
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]  # of the tensor itself and of `tensors`, when it was computed

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A tensor that is pickled takes its attributes along; a recipe means nothing elsewhere.
        return type(None), ()


def attach_recipe(value: Tensor, computation: Computation, tensors: tuple[Tensor, ...]) -> Tensor:
    """Notes on `value` that it is `computation(*tensors)`, which are kept for the backward anyway; returns it."""
    setattr(value, _ATTRIBUTE, Recipe(computation, tensors, _versions(value, tensors)))
    return value


def recipe_of(value: Tensor) -> Recipe | None:
    """The recipe of a tensor; None where it has none, or where it or what it came from was changed in place since."""
    recipe: Recipe | None = getattr(value, _ATTRIBUTE, None)
    if recipe is None or recipe.versions != _versions(value, recipe.tensors):
        return None
    return recipe


def _versions(value: Tensor, tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(t._version for t in (value, *tensors))


def recomputed(function: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> Tensor:
    """`function(module, *inputs)`, of which only the inputs are kept for the backward; the result carries a recipe.

    See `Computation` for what the function may be. Its gradients reach the inputs and the module's own parameters, not
    those of modules inside it.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    computation = Computation(function, module, tuple(parameters), Autocast.now(inputs[0].device.type))
    tensors = (*inputs, *parameters.values())
    value = _Recomputed.apply(computation, *tensors)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{type(module).__name__} gives {type(value).__name__}, not one tensor; a model that has it needs "
            "train.lean_activations=false"
        )
    return attach_recipe(value, computation, tensors)


def kept_inputs(ctx: Any, computation: Computation | None) -> tuple[Tensor, ...]:
    """What a function has saved for its backward, the inputs of a computation among it. Raises RuntimeError, with the
    remedy, where they have been changed in place since."""
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if computation is None or "inplace" not in str(error):
            raise
        kind = type(computation.module).__name__
        raise RuntimeError(
            f"the model changes the input of a {kind} in place, which is kept for the backward; a model that does so "
            f"needs train.lean_activations=false ({error})"
        ) from error
    return saved


class _Recomputed(torch.autograd.Function):
    """A computation that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, computation: Computation, *tensors: Tensor) -> Tensor:
        ctx.computation = computation
        ctx.save_for_backward(*tensors)
        return computation(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        saved = kept_inputs(ctx, ctx.computation)
        with torch.enable_grad():
            tensors = [t.detach().requires_grad_(w) for t, w in zip(saved, wanted, strict=True)]
            # The edge in place of the output, which is not kept for its own gradient.
            edge = get_gradient_edge(ctx.computation(*tensors))
        leaves = [t for t in tensors if t.requires_grad]
        gradients = iter(torch.autograd.grad(edge, leaves, grad_output, allow_unused=True))
        return None, *(next(gradients) if w else None for w in wanted)
