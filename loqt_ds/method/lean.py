"""Lean activations: normalizations and gated MLPs of a model that keep for the backward what frozen weights need.

Stock modules keep 20 h + 8 i + 12 r bytes per token and layer of a Llama in bf16 (h hidden, i intermediate, r rank),
much of it intermediate values that are cheap to compute again. Afterwards it is 12 h + 4 i + 12 r, and 4 bytes a head:

    two normalizations    2 e h    the input of each, which is the residual stream (e bytes per activation)
    attention             4 e h    q, k, v, output; 4 bytes a head: log-sum-exp
    gated MLP             2 e i    gate and up
    LoQT linears          6 e r    x P of q, k, v, o, gate, up; down needs its input, and computes it from gate and up

A step with a re-initialization keeps no more than that: what the tapped layers need is computed again from the inputs
of the normalizations (see `recompute`), and the input of o shares the memory of attention's output.

`install` changes instances, not classes: a normalization is any module without children and buffers whose class calls
itself one (RMSNorm or LayerNorm of whatever kind), a gated MLP is one whose `forward` is, in its source,
`down(act(gate(x)) * up(x))`, whatever the four are called. Everything else is left as it is, and said.

With kernels="liger" the same few tensors are kept by Liger-Kernel's fused kernels where they cover the kind of module
(RMSNorm as Llama or Gemma compute it, SiLU), and by the above elsewhere.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.method.recompute import recomputed

# Weight normalization and its kind reshape parameters, they do not normalize activations.
_NORM_NAME = re.compile(r"(?<!weight)(?<!spectral)norm", re.IGNORECASE)
_MLP_NAME = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)


@dataclass
class LeanReport:
    """What `install` did, by module name."""

    norms: list[str] = field(default_factory=list)
    """Normalizations that now keep their input only."""
    mlps: list[str] = field(default_factory=list)
    """Gated MLPs that now keep gate and up only."""
    fused: list[str] = field(default_factory=list)
    """Those of the above that Liger's kernels compute."""
    left: list[str] = field(default_factory=list)
    """What looks like a normalization or an MLP and was left as it is."""

    def describe(self) -> str:
        """One line for the start of a run."""
        text = f"lean activations: {len(self.norms)} normalizations, {len(self.mlps)} gated MLPs"
        if self.fused:
            text += f" ({len(self.fused)} of them by Liger's kernels)"
        if self.left:
            shown = ", ".join(self.left[:3]) + (", ..." if len(self.left) > 3 else "")
            text += f"; {len(self.left)} modules of other kinds keep what they always keep ({shown})"
        return text


def install(model: nn.Module, *, kernels: str = "torch") -> LeanReport:
    """Makes the normalizations and gated MLPs of a model keep less for the backward; outputs and gradients stay, with
    kernels="torch" bit for bit, what they are (in float32, gradients of the residual stream are added in another order
    than those that stock modules hand over one by one). Does nothing to modules it has changed before.

    Args:
        kernels: torch, or liger for Liger-Kernel's on a CUDA device.

    Raises ValueError for kernels that there are not, or that cannot run here.
    """
    if kernels != "torch":
        raise ValueError(f"model.kernels={kernels!r} is not there; use torch")
    report = LeanReport()
    for name, module in model.named_modules():
        gated = _gated_parts(type(module))  # type: ignore[arg-type]
        if _looks_like_norm(module):
            method = _norm_forward if _is_plain_norm(module) else None
            changed = report.norms
        elif gated is not None or (_MLP_NAME.search(type(module).__name__) and _has_linear(module)):
            method = _mlp_forward(gated) if gated is not None and _is_plain_activation(module, gated) else None
            changed = report.mlps
        else:
            continue
        mine = "_loqt_lean" in vars(module)
        if method is not None and not mine and "forward" not in vars(module):
            module.forward = MethodType(method, module)
            module._loqt_lean = True  # type: ignore[assignment]
            mine = True
        (changed if mine else report.left).append(name)
    return report


# ---- normalizations -------------------------------------------------------------------------------------------------


def _looks_like_norm(module: nn.Module) -> bool:
    return _NORM_NAME.search(type(module).__name__) is not None and not any(True for _ in module.children())


def _is_plain_norm(module: nn.Module) -> bool:
    # Buffers may be statistics, which a second forward would count twice.
    return not isinstance(module, nn.modules.batchnorm._NormBase) and not any(True for _ in module.buffers())


# Dynamo would trace the Python of the recipe away; LoQT layers break its graph at the same places.
@torch.compiler.disable
def _norm_forward(self: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """The forward of a normalization that keeps its inputs only."""
    function = type(self).forward
    if not torch.is_grad_enabled() or options or not all(isinstance(value, Tensor) for value in inputs):
        return function(self, *inputs, **options)
    return recomputed(function, self, *inputs)


# ---- gated MLPs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gated:
    """Names of the parts of a module that computes down(act(gate(x)) * up(x))."""

    act: str
    gate: str
    up: str
    down: str


@cache
def _gated_parts(kind: type[nn.Module]) -> _Gated | None:
    """The parts of a gated MLP, read from the source of its forward; None where it is something else."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or len(function.args.args) != 2:
        return None
    if function.args.vararg or function.args.kwarg or function.args.kwonlyargs:
        return None
    me, x = (argument.arg for argument in function.args.args)
    match _without_docstring(function.body):
        case [ast.Return(value=ast.expr() as value)]:
            pass
        case [
            ast.Assign(targets=[ast.Name(id=name)], value=value),
            ast.Return(value=ast.Name(id=returned)),
        ] if name == returned:
            pass
        case _:
            return None
    down, product = _call_of(value, me)
    if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    act, inner = _call_of(product.left, me)
    gate, gate_input = _call_of(inner, me)
    up, up_input = _call_of(product.right, me)
    inputs = (gate_input, up_input)
    if None in (down, act, gate, up) or not all(isinstance(i, ast.Name) and i.id == x for i in inputs):
        return None
    return _Gated(str(act), str(gate), str(up), str(down))


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    is_text = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return body[1:] if is_text else body


def _call_of(node: ast.expr | None, me: str) -> tuple[str | None, ast.expr | None]:
    """(name, argument) of `self.name(argument)`."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=[argument], keywords=[]) if (
            owner == me
        ):
            return name, argument
    return None, None


def _is_plain_activation(module: nn.Module, gated: _Gated) -> bool:
    """Whether the activation is a function of its input and its own parameters."""
    act = getattr(module, gated.act)
    if not isinstance(act, nn.Module):
        return callable(act)
    random = isinstance(act, nn.RReLU | nn.modules.dropout._DropoutNd)
    return not random and not any(True for _ in act.children()) and not any(True for _ in act.buffers())


def _has_linear(module: nn.Module) -> bool:
    return any("Linear" in type(child).__name__ for child in module.children())


def _act_times_up(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return type(act).forward(act, gate) * up


class _Function(nn.Module):
    """An activation that is a plain function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@cache
def _mlp_forward(gated: _Gated) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of such an MLP that keeps gate and up only."""

    @torch.compiler.disable
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        """The forward of a gated MLP that keeps gate and up only."""
        act = getattr(self, gated.act)
        gate, up = getattr(self, gated.gate)(x), getattr(self, gated.up)(x)
        if not isinstance(act, nn.Module):
            act = _Function(act)
        hooked = act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks
        lean = torch.is_grad_enabled() and not hooked  # hooks are called once, by the module itself
        product = recomputed(_act_times_up, act, gate, up) if lean else act(gate) * up
        return getattr(self, gated.down)(product)

    return forward
