"""How adapted matrices lie in the files that transformers reads, where that is not one `weight` (out, in) each.

Two kinds are different: the transposed Conv1D of GPT-2, whose dense weight is (in, out) in files, while 4-bit codes are
those of (out, in) for every module (transformers turns a Conv1D into a Linear4bit); and experts, which are one
parameter of all experts in the model and, by the model's type, that or several tensors each in files. transformers
loads no experts in 4 bits, and no module that a model keeps in float32 (`wo` of T5): these are written dense. Tensors
that it holds in float32 whatever the model's dtype (biases by which experts are chosen) are written so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loqt_ds.export.pack import WeightFormat
from loqt_ds.method import experts
from loqt_ds.method.conversion import empty_of
from loqt_ds.method.linear import LoQTLinear

Get = Callable[[str], Tensor]

KEPT_IN_FLOAT32 = "_keep_in_fp32_modules_strict"
"""Where a model of transformers lists patterns of names that are float32 in a bf16 model too."""


class Layout:
    """The files of one type of model; a model that is not of transformers has no configuration."""

    def __init__(self, model: Any, model_config: Any) -> None:
        self._style = None if model_config is None else experts.written_style(model_config)
        self._kept_dense = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        self._in_float32 = [re.compile(p.replace("*", ".*")) for p in getattr(model, KEPT_IN_FLOAT32, None) or ()]
        self._made_in_float32: set[str] = set()
        if model_config is not None:
            made = empty_of(type(model), model_config, dtype=torch.bfloat16).state_dict()
            self._made_in_float32 = {name for name, tensor in made.items() if tensor.dtype == torch.float32}

    def dtype_of(self, name: str, tensor: Tensor, weight_format: WeightFormat) -> torch.dtype:
        """What a tensor that is not an adapted matrix is written in: transformers would cast it to that."""
        if not tensor.is_floating_point():
            return tensor.dtype
        if name in self._made_in_float32 or any(pattern.search(name) for pattern in self._in_float32):
            return torch.float32
        return weight_format.dtype

    def format_of(self, name: str, weight_format: WeightFormat) -> WeightFormat:
        """How a matrix is written: dense where transformers has no 4-bit module in its place."""
        if weight_format.quant_type is None and any(pattern.search(f"{name}.weight") for pattern in self._in_float32):
            return WeightFormat(None, dtype=torch.float32)
        is_dense = experts.is_expert(name) or not self._kept_dense.isdisjoint(name.split("."))
        return WeightFormat(None, dtype=weight_format.dtype) if is_dense else weight_format

    def group(self, name: str) -> str:
        """Matrices of the same group make one tensor in the files, and have to be written together."""
        return experts.fused_place(name)[0] if experts.is_expert(name) and self._style is None else name

    def to_files(self, layers: Mapping[str, tuple[LoQTLinear | None, dict[str, Tensor]]]) -> dict[str, Tensor]:
        """Tensors of a group by their names in the files, from name -> (layer, None for a matrix that is not adapted;
        tensors relative to the module, (out, in) where dense)."""
        first = next(iter(layers))
        if self.group(first) != first:
            order = sorted(layers, key=lambda name: experts.fused_place(name)[1])
            return {self.group(first): torch.stack([layers[name][1]["weight"] for name in order])}
        layer, tensors = layers[first]
        if experts.is_expert(first):
            return experts.tensors_of(first, tensors["weight"], self._style)
        if layer is not None and layer.is_stored_transposed and len(tensors) == 1:
            tensors = {"weight": tensors["weight"].t().contiguous()}
        return {f"{first}.{key}": tensor for key, tensor in tensors.items()}

    def dense_name(self, name: str) -> str:
        """Name in the files of a tensor that is not an adapted matrix, nor an expert's."""
        return name if ".experts." in name else experts.renamed(name, self._style)

    def of_weight(self, name: str, layer: LoQTLinear | None, own: Mapping[str, Tensor], get: Get) -> dict[str, Tensor]:
        """The inverse of `to_files` for one matrix; `own`: what the files hold under its own name."""
        if experts.is_expert(name):
            block, row = experts.fused_place(name)
            if self._style is None:
                return {"weight": get(block)[row]}
            block, _, short = block.rpartition(".")
            return {"weight": torch.cat([get(key) for key in experts.own_names(block, short, row, self._style)])}
        if layer is not None and layer.is_stored_transposed and len(own) == 1:
            return {"weight": own["weight"].t().contiguous()}
        return dict(own)

    def in_model(self, name: str, own: Mapping[str, Tensor]) -> Tensor | None:
        """The tensor of a loaded model's state that a dense tensor of the files went to; None if there is none."""
        return own.get(name, own.get(experts.renamed_back(name))) if (at := experts.parse(name)) is None else at.of(own)
