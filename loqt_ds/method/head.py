"""The loss of a causal language model without the logits of all tokens: `model(**inputs, targets=targets)`.

`install` changes the `forward` of one model, not of its class: with targets it gives the summed loss, a float32 scalar,
without them what it always gave. With targets the model runs its own forward, so that its decoder is called exactly as
it always is; only its output head, instead of making logits, notes its input and hands on a tensor on the meta device.
The loss is then `core.cross_entropy`'s (or Liger-Kernel's fused one) of that input and the head's weight.

This is right where what the model returns is what its head returns. Models that scale or cap their logits (Granite,
Cohere, Gemma 2), or whose head is no plain `nn.Linear`, are found out by trying the forward once, with the decoder left
out; their logits are made for all tokens, and `install` says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.core.cross_entropy import linear_cross_entropy
from loqt_ds.method.conversion import output_head

IGNORED = -100
"""The target of a token that is not predicted."""


@dataclass(frozen=True)
class HeadReport:
    """What `install` did."""

    whole_logits: str | None
    """Why the logits of all tokens are made at once; None where they are not."""
    kernels: str
    """Who computes the loss: torch or liger."""

    def describe(self) -> str:
        """One line for the start of a run."""
        if self.whole_logits is not None:
            return f"the loss needs the logits of all tokens at once: {self.whole_logits}"
        return "the loss is computed without the logits of all tokens" + (
            ", by Liger's fused kernel" if self.kernels == "liger" else ""
        )


def install(model: nn.Module, *, kernels: str = "torch") -> HeadReport:
    """Afterwards `model(**inputs, targets=targets)` is the negative log-likelihood in nats, summed over the targets
    (shape of input_ids, -100 where nothing is predicted), in float32. Installed twice, the last one counts.

    Args:
        model: a causal language model whose forward returns an output with `logits`; its parameters may be on the meta
            device.
        kernels: torch, or liger for Liger-Kernel's fused loss on a CUDA device.

    Raises ValueError for kernels that there are not, or that cannot run here.
    """
    if kernels not in ("torch", "liger"):
        raise ValueError(f"model.kernels={kernels!r} is not there; use torch or liger")
    head = output_head(model)
    why = _why_whole(model, head)
    if kernels == "liger":
        _check_liger(model)
    if why is None:
        assert head is not None
        head.forward = MethodType(_head_forward, head)
        head._loqt_inputs = None  # type: ignore[assignment]
    report = HeadReport(why, kernels if why is None else "torch")
    if "_loqt_head" not in vars(model):
        model._loqt_forward = model.forward  # type: ignore[assignment]
        model.forward = MethodType(_forward_of(type(model)), model)
    model._loqt_head = report  # type: ignore[assignment]
    return report


def is_installed(model: nn.Module) -> bool:
    """Whether `model(**inputs, targets=targets)` gives a loss."""
    return "_loqt_head" in vars(model)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over predicted tokens; logits (b, s, v) are taken to float32."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


# ---------------------------------------------------------------- with targets


def _forward_of(kind: type[nn.Module]) -> Any:
    """The forward of a changed model. Its signature is the model's own, from which transformers reads what a model
    takes."""

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return self._loqt_forward(*args, **kwargs)
        if self._loqt_head.whole_logits is not None:
            return summed_loss(self._loqt_forward(*args, **kwargs).logits, targets)
        head: Any = output_head(self)
        with _noting(head) as inputs:
            logits = self._loqt_forward(*args, **kwargs).logits
        if len(inputs) != 1 or not logits.is_meta or logits.shape[:-1] != targets.shape:
            raise RuntimeError(
                f"{kind.__name__} called its output head {len(inputs)} times and returned logits "
                f"{tuple(logits.shape)} for targets {tuple(targets.shape)}; call it with one target for each token"
            )
        hidden, targets = inputs[0].flatten(0, -2), targets.flatten()
        # Liger's gradient of W is lost where H needs none.
        if self._loqt_head.kernels == "liger" and (hidden.requires_grad or not head.weight.requires_grad):
            return _liger_loss(hidden, head.weight, targets, head.bias)
        return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, ignore_index=IGNORED)

    return forward


def _head_forward(self: Any, x: Tensor) -> Tensor:
    """The forward of an output head, which while it is noted makes nothing."""
    if self._loqt_inputs is None:
        return nn.functional.linear(x, self.weight, self.bias)
    self._loqt_inputs.append(x)
    return torch.empty(*x.shape[:-1], len(self.weight), dtype=x.dtype, device="meta")


@contextmanager
def _noting(head: Any) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []
    head._loqt_inputs = inputs
    try:
        yield inputs
    finally:
        head._loqt_inputs = None


# ---------------------------------------------------------------- Liger


def _check_liger(model: nn.Module) -> None:
    """Raises ValueError if Liger's kernels cannot run here."""
    if next(model.parameters()).device.type not in ("cuda", "meta"):
        raise ValueError("model.kernels=liger runs on a CUDA device; on a CPU use model.kernels=torch")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError(
            "model.kernels=liger needs Liger-Kernel: pip install 'loqt-ds[liger]', or use model.kernels=torch"
        )


def _liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Liger's fused loss: it makes the gradients in the forward, of W in the dtype of W."""
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyFunction,
    )

    # By position, in the order that all versions from 0.6 have: no weights of entries, the target to ignore, no z-loss,
    # no smoothing, the sum.
    outputs = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, bias, None, IGNORED, 0.0, 0.0, "sum")
    loss: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss


# ---------------------------------------------------------------- whether the logits are the head's


class _DecoderOutput(tuple):
    """What a decoder returns, as far as a model with a head asks: hidden states, and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


@torch.no_grad()
def _why_whole(model: nn.Module, head: nn.Module | None) -> str | None:
    """Why the loss cannot be had from the head's input and weight alone; None if it can.

    The model's own forward is run on the CPU with decoder and head replaced: does it hand what the decoder gave to the
    head once, and return what the head gave, the very tensor, unchanged?
    """
    name = type(model).__name__
    if head is None:
        return f"{name} does not say which module makes its logits"
    if type(head) is not nn.Linear:
        return f"the output head of {name} is {type(head).__name__}, not nn.Linear"
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, head.in_features, generator=draw).to(head.weight.dtype)
    logits = torch.randn(1, 2, head.out_features, generator=draw).to(head.weight.dtype)
    given, made = hidden.clone(), logits.clone()
    inputs: list[Tensor] = []

    def stub_head(x: Tensor) -> Tensor:
        inputs.append(x)
        return made

    def stub_decoder(*_: Any, **__: Any) -> _DecoderOutput:
        return _DecoderOutput((given,))

    stubs: list[tuple[nn.Module, Callable[..., Any]]] = [(head, stub_head)]
    stubs += [(decoder, stub_decoder) for decoder in _decoders(model)]
    try:
        with _replaced_forwards(stubs):
            forward = vars(model).get("_loqt_forward", model.forward)
            output = forward(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:  # whatever a model does with such a decoder
        return f"{name} could not be tried ({type(error).__name__}: {error})"
    if len(inputs) != 1 or not torch.equal(inputs[0], hidden):
        return f"{name} does more than to hand its decoder's output to its head"
    if getattr(output, "logits", None) is not made or not torch.equal(made, logits):
        return f"{name} changes its logits after its head has made them (scales or caps them, say)"
    return None


def _decoders(model: nn.Module) -> list[nn.Module]:
    """Modules that may be the one which the model's forward calls for hidden states."""
    getter = getattr(model, "get_decoder", None)
    found = [getattr(model, "base_model", None), getter() if callable(getter) else None]
    return list({id(m): m for m in found if isinstance(m, nn.Module) and m is not model}.values())


@contextmanager
def _replaced_forwards(stubs: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    own = [(module, vars(module).get("forward")) for module, _ in stubs]
    try:
        for module, stub in stubs:
            module.forward = stub
        yield
    finally:
        for module, forward in own:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
