"""The model of a run without its weights: converted on the meta device, as it will be for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loqt_ds.config import Config
from loqt_ds.method import head, lean
from loqt_ds.method.conversion import build_meta, loqt_layers, task_head_parameters
from loqt_ds.method.description import model_description, training_dtype
from loqt_ds.method.head import HeadReport
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.method.structure import blocks
from loqt_ds.optim import freeze_full_rank


@dataclass(frozen=True)
class Facts:
    """A converted model on the meta device: all that a plan asks of it."""

    model: nn.Module
    description: Any
    """The transformers configuration."""
    dtype: torch.dtype
    layers: list[LoQTLinear]
    blocks: list[nn.Module]
    """The items of its lists of modules that have such layers."""
    factors: dict[str, nn.Parameter]
    """Every B."""
    others: dict[str, nn.Parameter]
    """All other parameters: trained in full, or frozen."""
    lean: frozenset[str]
    """Names of the modules that lean activations change."""
    head: HeadReport
    """How the loss is computed."""
    notes: list[str]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in (*self.factors.values(), *self.others.values()) if parameter.requires_grad]


def planned_vocab_size(config: Config, described: int) -> tuple[int, str | None]:
    """Rows of embedding and head before a tokenizer was loaded, and a note where they are a guess."""
    wanted = config.model.vocab_size
    if wanted is None:
        return described, None
    if wanted != "auto":
        return int(wanted), None
    if config.data.tokenizer is None:
        return -(-config.data.tokenizer_vocab_size // 64) * 64, None
    return described, f"model.vocab_size=auto: counted with the {described} of the shape file, not the tokenizer's size"


def planned_model(config: Config, *, vocab_size: int | None = None) -> tuple[Any, list[str]]:
    """The transformers configuration of the model to plan for, and notes."""
    described = model_description(config, vocab_size=vocab_size)
    if vocab_size is not None:
        return described, []
    described.vocab_size, note = planned_vocab_size(config, int(described.vocab_size))
    return described, [note] if note else []


def describe(config: Config, *, vocab_size: int | None = None) -> Facts:
    """Builds the model without weights. Raises ValueError as the run itself would, for a rank or a pattern that does
    not fit the model."""
    dtype = training_dtype(config)
    description, notes = planned_model(config, vocab_size=vocab_size)
    options = {"attention": config.model.attention, "task": config.model.task}
    model = build_meta(description, config.loqt, dtype=dtype, **options)
    layers = loqt_layers(model)
    own = {id(layer.B) for layer in layers.values()}
    if not config.optim.train_full_rank:
        freeze_full_rank(model, but=task_head_parameters(model))
    parameters = dict(model.named_parameters())
    factors = {name: parameter for name, parameter in parameters.items() if id(parameter) in own}
    others = {name: parameter for name, parameter in parameters.items() if id(parameter) not in own}
    changed = lean.install(model)
    loss = head.install(model, task=config.model.task)
    if loss.whole_logits is not None:
        notes = [*notes, loss.describe()]
    return Facts(
        model=model,
        description=description,
        dtype=dtype,
        layers=list(layers.values()),
        blocks=list(blocks(model, layers).values()),
        factors=factors,
        others=others,
        lean=frozenset((*changed.norms, *changed.mlps, *changed.activations)),
        head=loss,
        notes=notes,
    )
