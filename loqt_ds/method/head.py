"""The loss of a model, summed over targets: `model(**inputs, targets=targets)`.

`install` changes the `forward` of one model, not of its class: with targets it gives the summed loss, a float32 scalar,
without them what it always gave. The loss by model.task:

    causal_lm       -log softmax(z)[y] over tokens; the next token is already what a target says: nothing is shifted
    masked_lm       the same, over the few tokens whose target is not `IGNORED`
    classification  -log softmax(z)[y] over rows
    regression      (z - y)² over rows

Logits of tokens are as large as tokens times vocabulary and are not made at once: with targets the model runs its own
forward, so that its decoder is called exactly as it always is; only its output head, instead of making logits, notes
its input and hands on a tensor on the meta device. The loss is then `core.cross_entropy`'s (or Liger-Kernel's fused
one) of that input and the head's weight.

This is right where the model returns what its head returns, or that with every logit scaled or capped by itself, as
Granite, Cohere and Gemma 2 do: then the model's own forward is run once more on each block of logits, with the decoder
left out. Which of these a model is, is tried when it is changed, on numbers and without its decoder. For others (a head
that is no plain `nn.Linear`, say) the logits of all tokens are made, and `install` says so. A masked language model may
do more between its encoder and its head (which is then run as it is), but nothing after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.core.cross_entropy import linear_cross_entropy
from loqt_ds.method.conversion import TASKS, output_head
from loqt_ds.method.lean import check_kernels
from loqt_ds.method.linear import LoQTLinear

IGNORED = -100
"""The target of a token (or of a row's class) that is not predicted."""


@dataclass(frozen=True)
class HeadReport:
    """How the loss is computed."""

    whole_logits: str | None
    """Why the logits of all tokens are made at once; None where they are not."""
    is_transformed: bool
    """Whether the model scales or caps its logits, which then is done block by block."""
    kernels: str
    """Who computes the loss: torch or liger."""
    task: str = "causal_lm"
    """What is predicted, of `conversion.TASKS`."""

    @property
    def is_of_tokens(self) -> bool:
        """Whether tokens are predicted, and not a class or a number for each row."""
        return self.task in ("causal_lm", "masked_lm")

    def describe(self) -> str:
        """One line for the start of a run."""
        if not self.is_of_tokens:
            return f"the loss is the {'squared error' if self.task == 'regression' else 'cross-entropy'} of rows"
        if self.whole_logits is not None:
            return f"the loss needs the logits of all tokens at once: {self.whole_logits}"
        by = "Liger's fused kernel" if self.kernels == "liger" else "torch, block by block"
        why = " (the model scales or caps its logits)" if self.is_transformed else ""
        return f"the loss is computed by {by}, from the input of the output head{why}"


def install(model: nn.Module, *, kernels: str = "torch", task: str = "causal_lm") -> HeadReport:
    """Afterwards `model(**inputs, targets=targets)` is the loss, summed over the targets, in float32. Installed again,
    the last one counts.

    Args:
        model: its forward returns an output with `logits`: (b, s, v) for tokens, (b, num_labels) for rows; its
            parameters may be on the meta device.
        kernels: torch, or liger for Liger-Kernel's fused loss on a CUDA device (where the model leaves its logits as
            they are; for rows there is nothing to fuse).
        task: of `conversion.TASKS`. Targets are int64: of tokens (b, s), of classes (b,), `IGNORED` where nothing is
            predicted; or float32 (b,) for a regression.

    Raises ConfigError for kernels that there are not, or that cannot run here.
    """
    assert task in TASKS, task
    check_kernels(kernels, {parameter.device for parameter in model.parameters()})
    installed = vars(model).get("forward")
    stock = installed.stock if isinstance(installed, _ModelForward) else model.forward
    if task not in ("causal_lm", "masked_lm"):
        report = HeadReport(None, False, "torch", task)
    else:
        head = output_head(model)
        report = _try_model(model, stock, head, kernels, task)
        if report.whole_logits is None and head is not None:
            head.forward = _HeadForward(head)
    model.forward = _ModelForward(model, stock, report)
    return report


def is_installed(model: nn.Module) -> bool:
    """Whether `model(**inputs, targets=targets)` gives a loss."""
    return isinstance(vars(model).get("forward"), _ModelForward)


def loss_of_outputs(outputs: Any, targets: Tensor, task: str) -> Tensor:
    """The same loss, of what the model returned without targets (its `logits`), for callers who want both."""
    if task in ("causal_lm", "masked_lm"):
        return _loss_of_logits(outputs.logits, targets)
    return _loss_of_rows(outputs.logits, targets, task)


# ---------------------------------------------------------------- with targets

# Objects with the module inside, not bound methods, which would be unpickled as those of the class.


class _HeadForward:
    """The forward of an output head, which while it is noted makes nothing."""

    def __init__(self, head: nn.Module) -> None:
        self._head: Any = head
        self.inputs: list[Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.inputs is None:
            return nn.functional.linear(x, self._head.weight, self._head.bias)
        self.inputs.append(x)
        return torch.empty(*x.shape[:-1], len(self._head.weight), dtype=x.dtype, device="meta")


class _ModelForward:
    """The forward of a changed model."""

    def __init__(self, model: nn.Module, stock: Callable[..., Any], report: HeadReport) -> None:
        self._model, self.stock, self._report = model, stock, report
        kinds = inspect.signature(stock).parameters
        self._takes_use_cache = "use_cache" in kinds or any(k.kind is k.VAR_KEYWORD for k in kinds.values())

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For `inspect.signature`, by which transformers finds out what a model takes."""
        return self.stock

    def __call__(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return self.stock(*args, **kwargs)
        if not self._takes_use_cache and kwargs.get("use_cache") is False:
            del kwargs["use_cache"]  # an encoder that has no cache and no word for it
        if not self._report.is_of_tokens:
            return _loss_of_rows(self.stock(*args, **kwargs).logits, targets, self._report.task)
        if self._report.whole_logits is not None:
            return _loss_of_logits(self.stock(*args, **kwargs).logits, targets)
        head: Any = output_head(self._model)
        hidden = self._head_input(head, args, kwargs, targets).flatten(0, -2)
        targets = targets.flatten()
        if self._report.task == "masked_lm":
            # A synchronization on a device, for a head of a seventh of the tokens.
            masked = targets != IGNORED
            hidden, targets = hidden[masked], targets[masked]
        # Liger's gradient of W is lost where H needs none.
        if self._report.kernels == "liger" and (hidden.requires_grad or not head.weight.requires_grad):
            return _liger_loss(hidden, head.weight, targets, head.bias)
        transform = self._transform if self._report.is_transformed else None
        return linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, ignore_index=IGNORED, transform=transform
        )

    def _head_input(self, head: Any, args: Any, kwargs: Any, targets: Tensor) -> Tensor:
        """What the head is called with (b, s, h) when the model runs its own forward."""
        inputs: list[Tensor] = []
        head.forward.inputs = inputs
        try:
            logits = self.stock(*args, **kwargs).logits
        finally:
            head.forward.inputs = None
        if len(inputs) != 1 or not logits.is_meta or inputs[0].shape[:-1] != targets.shape:
            raise RuntimeError(
                f"{type(self._model).__name__} called its output head {len(inputs)} times for logits of shape "
                f"{tuple(logits.shape)}, with targets {tuple(targets.shape)}; give one target for each token, and no "
                "option that leaves out logits"
            )
        return inputs[0]

    def _transform(self, logits: Tensor) -> Tensor:
        """What the model makes of its head's logits (rows, columns)."""
        head = output_head(self._model)
        assert head is not None
        return _after_head(self._model, self.stock, head, logits.unsqueeze(0))[0].squeeze(0)


def _loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over predicted tokens; logits (b, s, v) are taken to float32."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _loss_of_rows(logits: Tensor, targets: Tensor, task: str) -> Tensor:
    """Cross-entropy in nats of classes (b, num_labels), or squared error of numbers (b, 1), summed over the rows."""
    logits = logits.float()
    wanted = (len(logits),)
    if targets.shape != wanted or (task == "regression" and logits.shape != (*wanted, 1)):
        raise RuntimeError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit for model.task={task}; give "
            "one target for each row"
        )
    if task == "regression":
        return (logits.squeeze(-1) - targets.float()).square().sum()
    return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Liger's fused loss: it makes the gradients in the forward, of W in the dtype of W."""
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyFunction,
    )

    # By position, in the order that all versions from 0.6 have: no weights of entries, the target to ignore, no z-loss,
    # no smoothing, the sum.
    outputs = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, bias, None, IGNORED, 0.0, 0.0, "sum")
    loss: Tensor = outputs[0]
    return loss


# ---------------------------------------------------------------- what a model does after its head


class _DecoderOutput(tuple):
    """What a decoder returns, as far as a model with a head asks: hidden states, and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def _after_head(
    model: nn.Module, stock: Callable[..., Any], head: nn.Module, logits: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(what the model returns as its logits if its head makes `logits` (1, s, v), what it called its head with), where
    its decoder gives `hidden`."""
    if hidden is None:
        hidden = torch.empty(*logits.shape[:-1], 1, dtype=logits.dtype, device="meta")
    inputs: list[Tensor] = []

    def stub_head(x: Tensor) -> Tensor:
        inputs.append(x)
        return logits

    def stub_decoder(*_: Any, **__: Any) -> _DecoderOutput:
        return _DecoderOutput((hidden,))

    stubs: list[tuple[nn.Module, Callable[..., Any]]] = [(head, stub_head)]
    # What ModernBERT calls its decoder is its head.
    stubs += [(decoder, stub_decoder) for decoder in _decoders(model) if decoder is not head]
    with _replaced_forwards(stubs):
        tokens = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return stock(input_ids=tokens, use_cache=False).logits, inputs


def _decoders(model: nn.Module) -> list[nn.Module]:
    """Modules that may be the one which the model's forward calls for hidden states."""
    getter = getattr(model, "get_decoder", None)
    found = [getattr(model, "base_model", None), getter() if callable(getter) else None]
    return list({id(m): m for m in found if isinstance(m, nn.Module) and m is not model}.values())


@contextmanager
def _replaced_forwards(stubs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
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


def _try_model(
    model: nn.Module, stock: Callable[..., Any], head: nn.Module | None, kernels: str, task: str
) -> HeadReport:
    """How the loss of a model can be had. Its forward is run on the CPU without its decoder and head: does it call the
    head once, for all tokens, and what does it make of what the head gave?"""
    name = type(model).__name__

    def whole(why: str) -> HeadReport:
        return HeadReport(why, False, "torch", task)

    if head is None:
        return whole(f"{name} does not say which module makes its logits")
    if type(head) is not nn.Linear:
        return whole(f"the output head of {name} is {type(head).__name__}, not nn.Linear")
    if not isinstance(vars(head).get("forward"), _HeadForward | None):
        return whole(f"the output head of {name} has been given another forward")
    if task == "masked_lm":
        why = _why_not_masked(model, stock, head)
        return HeadReport(None, False, kernels, task) if why is None else whole(why)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, head.in_features, generator=draw).to(head.weight.dtype)
    # Large ones too, so that a cap shows.
    logits = torch.randn(1, 3, head.out_features, generator=draw).pow_(3).mul_(10).to(head.weight.dtype)
    before = logits.clone()
    try:
        after, inputs = _after_head(model, stock, head, logits, hidden)
        if len(inputs) != 1 or inputs[0].shape != hidden.shape:
            return whole(f"{name} calls its head {len(inputs)} times, or not for all tokens")
        if after is logits and torch.equal(after, before):
            return HeadReport(None, False, kernels)
        if not torch.equal(logits, before):
            return whole(f"{name} changes in place what its head has made")
        columns = (0, 1, head.out_features // 2, head.out_features - 1)
        cuts = [(slice(None), slice(row, row + 1), slice(v, v + 1)) for row in (0, 2) for v in columns]
        alone = [_after_head(model, stock, head, logits[cut])[0] for cut in cuts]
    except Exception as error:  # whatever a model does with such a decoder
        return whole(f"{name} could not be tried ({type(error).__name__}: {error})")
    same = after.shape == logits.shape and all(map(torch.equal, alone, (after[cut] for cut in cuts)))
    if not same or after.requires_grad:  # the latter: with something that is trained
        return whole(f"{name} changes its logits after its head has made them, and not each by itself")
    return HeadReport(None, True, "torch")


@torch.no_grad()
def _why_not_masked(model: nn.Module, stock: Callable[..., Any], head: nn.Linear) -> str | None:
    """None if a masked language model returns what its head returns, the very tensor, else what is in the way. What it
    has between encoder and head is run where its parameters are (on the meta device perhaps), but for LoQT layers, of
    which the shape is all that matters."""

    def stub(layer: LoQTLinear) -> Callable[[Tensor], Tensor]:
        return lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)

    name, weight = type(model).__name__, head.weight
    width = getattr(getattr(model, "config", None), "hidden_size", head.in_features)
    hidden = torch.zeros(1, 3, width, dtype=weight.dtype, device=weight.device)
    logits = torch.zeros(1, 3, head.out_features, dtype=weight.dtype, device=weight.device)
    layers = [(layer, stub(layer)) for layer in model.modules() if isinstance(layer, LoQTLinear)]
    try:
        with _replaced_forwards(layers):
            after, inputs = _after_head(model, stock, head, logits, hidden)
    except Exception as error:  # whatever a model does with such an encoder
        return f"{name} could not be tried ({type(error).__name__}: {error})"
    if len(inputs) != 1 or inputs[0].shape != (1, 3, head.in_features):
        return f"{name} calls its head {len(inputs)} times, or not for all tokens"
    return None if after is logits else f"{name} changes its logits after its head has made them"
