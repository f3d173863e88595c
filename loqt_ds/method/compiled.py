"""`train.compile`: the blocks of a model through `torch.compile`, each block one graph without a break.

A block (an item of the model's list of layers) is compiled where it stands: its instance gets another forward, names of
parameters stay. All blocks of a kind share their graphs, because nothing in a graph belongs to one of them: LoQT layers
are operators that find their layer by a tensor (`operators`). There are two graphs for each kind of block and shape of
micro-batch, with tapped layers and without. Shapes are constants: whether a graph is made for shapes in general would
depend on what came before, and a run that goes on would not repeat one that went through.

Only what is differentiated is compiled. Evaluation, generation and export run as they always do.

What is kept for the backward: the compiler's partitioner keeps what is cheapest to keep of what a graph computes. Where
activations are lean (`lean`), normalizations and gated activations are marked to be computed again, and the same bytes
are kept as without compiling. Each block's gradients come all at once, at the end of its backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from loqt_ds.config import ConfigError
from loqt_ds.method.conversion import loqt_layers
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.method.structure import blocks

# Graphs of one kind of block: two for each shape of a micro-batch. Past torch's 8, a run would end in an error.
MAX_GRAPHS = 64


def install(model: nn.Module, *, backend: str = "inductor") -> int:
    """Compiles the blocks of a model at their first call; returns how many there are. May be called again.

    Args:
        backend: of torch.compile.

    Raises ConfigError for a model that has no blocks, or blocks that somebody else has given a forward.
    """
    found = blocks(model, loqt_layers(model))
    if not found:
        raise ConfigError(
            f"train.compile=true: {type(model).__name__} has no list of modules with LoQT layers in each; use "
            "train.compile=false"
        )
    for name, block in found.items():
        if any(isinstance(module, LoQTLinear) and module.is_conditional for module in block.modules()):
            raise ConfigError(
                f"train.compile=true: which experts {name} calls depends on its tokens, and it is not one graph; use "
                "train.compile=false"
            )
        installed = vars(block).get("forward")
        if installed is not None and not isinstance(getattr(installed, "__self__", None), _BlockForward):
            raise ConfigError(
                f"train.compile=true: {name} has been given another forward, which would not be compiled; use "
                "train.compile=false"
            )
        block.forward = _BlockForward(block, backend).__call__  # type: ignore[method-assign]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    return len(found)


@dataclass(eq=False)
class _BlockForward:
    """The forward of a block: compiled where there is something to differentiate."""

    block: nn.Module
    backend: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = type(self.block).forward
        if not torch.is_grad_enabled():
            return forward(self.block, *args, **kwargs)
        try:
            return _compiled(forward, self.backend)(self.block, *args, **kwargs)
        except (
            TorchDynamoException,
            FailOnRecompileLimitHit,
        ) as error:  # at the first call
            raise ConfigError(
                f"train.compile=true: {type(self.block).__name__} cannot be compiled as one graph "
                f"({_first_line(error)}); use train.compile=false"
            ) from error


@functools.cache
def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)
    return compiled


def check_compiler(device: torch.device) -> None:
    """Compiles and runs two operations on a device. Raises ConfigError where that does not work."""

    def function(x: Tensor) -> Tensor:
        return x.sin() + x

    x = torch.linspace(-1.0, 1.0, 7, device=device)
    try:
        compiled = torch.compile(function, dynamic=False, fullgraph=True)(x)
    except Exception as error:  # whatever compilers do
        remedy = "Triton" if device.type == "cuda" else "a C++ compiler (g++, or one that CXX names)"
        raise ConfigError(
            f"train.compile=true: torch.compile fails on {device} ({_first_line(error)}); install {remedy}, or use "
            "train.compile=false"
        ) from error
    assert torch.allclose(compiled, function(x), atol=1e-6)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
