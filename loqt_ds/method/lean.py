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
`down(act(gate(x)) * up(x))`, whatever the four are called, or Phi-3's with gate and up in one tensor. In other MLPs the
activation keeps its input only, and what follows it computes its own input from that. Everything else is left as it is,
and said.

With kernels="liger" the same few tensors (and 4 bytes a normalization and token) are kept by Liger-Kernel's fused
kernels where they cover the kind of module (RMSNorm as Llama or Gemma compute it, SiLU), and by the above elsewhere.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loqt_ds.config import ConfigError
from loqt_ds.method.recompute import Autocast, Computation, attach_recipe, recomputed

# Activations that are no modules.
_FUNCTIONS = (
    nn.functional.silu,
    nn.functional.gelu,
    nn.functional.relu,
    nn.functional.mish,
    nn.functional.sigmoid,
    nn.functional.tanh,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
)
# Weight normalization and its kind reshape parameters, they do not normalize activations.
_NORM_NAME = re.compile(r"(?<!weight)(?<!spectral)norm(?!al|ed)", re.IGNORECASE)
_MLP_NAME = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)


@dataclass
class LeanReport:
    """What `install` did, by module name."""

    norms: list[str] = field(default_factory=list)
    """Normalizations that now keep their input only."""
    mlps: list[str] = field(default_factory=list)
    """Gated MLPs that now keep gate and up only."""
    activations: list[str] = field(default_factory=list)
    """Activations, in MLPs of other kinds, that now keep their input only."""
    fused: list[str] = field(default_factory=list)
    """Those of the above that Liger's kernels compute."""
    left: list[str] = field(default_factory=list)
    """What looks like a normalization or an MLP and was left as it is."""

    def describe(self) -> str:
        """One line for the start of a run."""
        text = f"lean activations: {len(self.norms)} normalizations, {len(self.mlps)} gated MLPs"
        if self.activations:
            text += f", {len(self.activations)} activations"
        if self.fused:
            text += f" ({len(self.fused)} of them by Liger's kernels)"
        if self.left:
            shown = ", ".join(self.left[:3]) + (", ..." if len(self.left) > 3 else "")
            text += f"; {len(self.left)} modules of other kinds keep what they always keep ({shown})"
        return text


def install(model: nn.Module, *, kernels: str = "torch") -> LeanReport:
    """Makes the normalizations and gated MLPs of a model keep less for the backward; outputs and gradients stay, with
    kernels="torch" bit for bit, what they are (in float32, gradients of the residual stream are added in another order
    than those that stock modules hand over one by one). May be called again.

    Args:
        kernels: torch, or liger for Liger-Kernel's on a CUDA device.

    Raises ConfigError for kernels that do not exist or cannot run on the model's device.
    """
    check_kernels(kernels, {p.device for p in model.parameters()})
    liger = kernels == "liger"
    report = LeanReport()
    for name, module in model.named_modules():
        parts = _gated_parts(type(module).forward)
        forward: _Forward | None = None
        if _looks_like_norm(module):
            changed = report.norms
            if _is_plain_norm(module):
                forward = (_LigerNormForward.of(module) if liger else None) or _LeafForward(module)
        elif parts is not None:
            changed = report.mlps
            if _is_plain_activation(getattr(module, parts.act)):
                forward = (_LigerMlpForward.of(module, parts) if liger else None) or _MlpForward(module, parts)
        elif _MLP_NAME.search(type(module).__name__) and _has_linear(module):
            acts = {key: child for key, child in module.named_children() if _is_plain_activation(child)}
            found = [f"{name}.{key}" for key, child in acts.items() if _replace(child, _LeafForward(child))]
            report.activations += found
            report.left += [] if found else [name]
            continue
        else:
            continue
        if forward is None or not _replace(module, forward):
            report.left.append(name)
            continue
        changed.append(name)
        if isinstance(forward, _LigerNormForward | _LigerMlpForward):
            report.fused.append(name)
    return report


def _replace(module: nn.Module, forward: _Forward) -> bool:
    """Gives an instance another forward, unless somebody else has."""
    installed = vars(module).get("forward")
    if installed is not None and not isinstance(getattr(installed, "__self__", None), _Forward):
        return False
    module.forward = forward.__call__  # type: ignore[method-assign,operator]
    return True


def check_kernels(kernels: str, devices: Collection[torch.device]) -> None:
    """Raises ConfigError for `model.kernels` that cannot run on these devices."""
    if kernels == "torch":
        return
    if kernels != "liger":
        raise ConfigError(f"model.kernels={kernels!r} does not exist; use torch or liger")
    for device in devices:
        if device.type not in ("cuda", "meta"):
            raise ConfigError(f"model.kernels=liger needs a CUDA device, not {device}; use model.kernels=torch")
    try:
        import liger_kernel.ops.rms_norm
        import liger_kernel.ops.swiglu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model.kernels=liger needs Liger-Kernel ({error}): pip install 'loqt-ds[liger]', or use "
            "model.kernels=torch"
        ) from error


# ---- forwards -------------------------------------------------------------------------------------------------------

# They are objects with the module inside, not methods: an instance that has them can be copied and pickled. What is put
# on the instance is their bound `__call__`: an object Dynamo would take for another function at each layer, and compile
# each block of a model anew.
#
# Dynamo would trace recipes away. To it these forwards are checkpoints, which tell the compiler what to compute again,
# the input of a tapped layer included. Into Liger's forwards it does not look.


@dataclass(eq=False)
class _Forward:
    """What `install` puts on instances."""

    module: nn.Module


@dataclass(eq=False)
class _LeafForward(_Forward):
    """The forward of a normalization or an activation that keeps its inputs only."""

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        function = type(self.module).forward
        plain = not options and all(isinstance(value, Tensor) and value.is_floating_point() for value in inputs)
        if not (torch.is_grad_enabled() and plain):
            return function(self.module, *inputs, **options)
        if torch.compiler.is_compiling():
            return _checkpointed(function, self.module, *inputs)
        return recomputed(function, self.module, *inputs)


def _checkpointed(function: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> Tensor:
    """`function(module, *inputs)`, in a graph of Dynamo's, marked to be computed again in the backward."""
    value: Tensor = checkpoint(lambda *given: function(module, *given), *inputs, use_reentrant=False)
    return value


# ---- normalizations -------------------------------------------------------------------------------------------------


def _looks_like_norm(module: nn.Module) -> bool:
    return _NORM_NAME.search(type(module).__name__) is not None and not any(True for _ in module.children())


def _is_plain_norm(module: nn.Module) -> bool:
    # Buffers may be statistics, which a second forward would count twice.
    return not isinstance(module, nn.modules.batchnorm._NormBase) and not any(True for _ in module.buffers())


# ---- gated MLPs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gated:
    """Names of the parts of a module that computes down(act(gate(x)) * up(x))."""

    act: str
    gate: str
    up: str | None
    """None: the output of `gate` has both in it, gate first."""
    down: str

    def activation(self, module: nn.Module) -> nn.Module:
        """The activation; a plain function in the form of a module."""
        act = getattr(module, self.act)
        return act if isinstance(act, nn.Module) else _Function(act)

    def operands(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Gate and up, or the one tensor that has both in it."""
        gate = getattr(module, self.gate)(x)
        return (gate,) if self.up is None else (gate, getattr(module, self.up)(x))


@cache
def _gated_parts(forward: Callable[..., Any]) -> _Gated | None:
    """The parts of a gated MLP, read from the source of its forward; None where it is something else."""
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    if _same_source(forward, Phi3MLP.forward):
        return _Gated("activation_fn", "gate_up_proj", None, "down_proj")
    function = _source(forward)
    if function is None or len(function.args.args) != 2:
        return None
    if function.args.vararg or function.args.kwarg or function.args.kwonlyargs:
        return None
    me, x = (argument.arg for argument in function.args.args)
    match function.body:
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


def _call_of(node: ast.expr | None, me: str) -> tuple[str | None, ast.expr | None]:
    """(name, argument) of `self.name(argument)`."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=[argument], keywords=[]) if (
            owner == me
        ):
            return name, argument
    return None, None


def _is_plain_activation(act: Any) -> bool:
    """Whether it is one of torch's or transformers', a function of its input and its own parameters, and leaves the
    input as it is. (Others may draw random numbers, or have parameters elsewhere.)"""
    if not isinstance(act, nn.Module):
        return act in _FUNCTIONS
    if type(act).__module__ not in ("torch.nn.modules.activation", "transformers.activations"):
        return False
    if isinstance(act, nn.RReLU | nn.modules.dropout._DropoutNd) or getattr(act, "inplace", False):
        return False
    return not any(True for _ in act.children()) and not any(True for _ in act.buffers())


def _has_linear(module: nn.Module) -> bool:
    return any(re.search("Linear|Conv1D", type(child).__name__) for child in module.children())


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _act_times_up(act: nn.Module, gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return act(gate) * up


class _Function(nn.Module):
    """An activation that is a plain function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(eq=False)
class _MlpForward(_Forward):
    """The forward of a gated MLP that keeps gate and up only."""

    parts: _Gated

    def __call__(self, x: Tensor) -> Tensor:
        act = self.parts.activation(self.module)
        operands = self.parts.operands(self.module, x)
        compute = _checkpointed if torch.compiler.is_compiling() else recomputed
        lean = torch.is_grad_enabled() and not _has_hooks(act)  # a second computation would call them again
        product = compute(_act_times_up, act, *operands) if lean else _act_times_up(act, *operands)
        return getattr(self.module, self.parts.down)(product)


# ---- source ---------------------------------------------------------------------------------------------------------


def _source(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The definition of a function, without its docstring; None where it cannot be read, or is decorated or wrapped."""
    if hasattr(function, "__wrapped__"):
        return None  # its source would be that of what is wrapped
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return None
    if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
        del node.body[0]
    return node


def _same_source(one: Callable[..., Any] | None, other: Callable[..., Any]) -> bool:
    """Whether two functions have the same statements; layout, comments and annotations of arguments do not count."""
    nodes = [_source(function) for function in (one, other) if function is not None]
    forms = [node and ([a.arg for a in node.args.args], [ast.dump(part) for part in node.body]) for node in nodes]
    return len(forms) == 2 and forms[0] is not None and forms[0] == forms[1]


# ---- Liger-Kernel ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _LigerNormForward(_Forward):
    """The forward of an RMSNorm by Liger's kernel, which keeps its input and 4 bytes a row."""

    eps: str
    """Name of the attribute."""
    offset: float
    """What is added to the weight."""
    casting: str
    """What is computed in float32; Liger's name of it."""

    @classmethod
    def of(cls, module: nn.Module) -> _LigerNormForward | None:
        """None for kinds that the kernel does not compute."""
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        kind = type(module)
        if _same_source(kind.forward, LlamaRMSNorm.forward):
            return cls(module, "variance_epsilon", 0.0, "llama")
        helper = getattr(kind, "_norm", None)
        if _same_source(kind.forward, GemmaRMSNorm.forward) and _same_source(helper, GemmaRMSNorm._norm):
            return cls(module, "eps", 1.0, "gemma")
        return None

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        y = self._compute(self.module, x)
        if not torch.is_grad_enabled():
            return y
        computation = Computation(self._compute, self.module, ("weight",), Autocast.now(x.device.type))
        weight: Any = self.module.weight
        return attach_recipe(y, computation, (x, weight))

    def _compute(self, module: nn.Module, x: Tensor) -> Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        eps = getattr(module, self.eps)
        # Not in place: the gradient of the output may be wanted elsewhere, as in models that normalize after a block.
        return LigerRMSNormFunction.apply(x, module.weight, eps, self.offset, self.casting, False)


@dataclass(eq=False)
class _LigerMlpForward(_Forward):
    """The forward of a gated MLP by Liger's kernel, which keeps gate and up. Its backward writes their gradients over
    them, so that a graph can be gone through once."""

    parts: _Gated

    @classmethod
    def of(cls, module: nn.Module, parts: _Gated) -> _LigerMlpForward | None:
        """None for activations other than SiLU, and for gate and up in one tensor."""
        from transformers.activations import SiLUActivation

        act = getattr(module, parts.act)
        is_silu = type(act) in (nn.SiLU, SiLUActivation) or act is nn.functional.silu
        return cls(module, parts) if is_silu and parts.up is not None else None

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        act = self.parts.activation(self.module)
        operands = self.parts.operands(self.module, x)
        product = _act_times_up(act, *operands) if _has_hooks(act) else self._compute(self.module, *operands)
        if torch.is_grad_enabled() and not _has_hooks(act):
            computation = Computation(self._compute, self.module, (), Autocast.now(x.device.type))
            attach_recipe(product, computation, operands)
        return getattr(self.module, self.parts.down)(product)

    @staticmethod
    def _compute(_: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)
