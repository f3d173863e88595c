"""One layer's tensors, as transformers and bitsandbytes store them.

For a weight of shape (N out, K in), blocksize 64 (EXPORT.md of the design):

    weight                                 uint8 (ceil(N K / 2), 1), row-major, even element in the high nibble
    weight.absmax                          float32 (ceil(N K / 64),); uint8 codes where double-quantized
    weight.quant_map                       float32 (16,)
    weight.quant_state.bitsandbytes__nf4   uint8: UTF-8 JSON of type, blocksize, dtype, shape
    weight.nested_absmax, .nested_quant_map  float32, where double-quantized; the JSON then has offset and blocksize
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from loqt_ds.core.quantization import (
    BLOCKSIZE,
    NESTED_BLOCKSIZE,
    Packed,
    QuantSpec,
    dequantize,
    packed_layout,
    quantize,
)
from loqt_ds.export.report import ExportError, LayerReport
from loqt_ds.method.linear import LoQTLinear

EXPORT_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class WeightFormat:
    """How adapted weights are exported: quant_type "nf4", "fp4", or None for dense ones."""

    quant_type: str | None
    double_quant: bool = False
    dtype: torch.dtype = EXPORT_DTYPE
    """Of everything that is not quantized, and what 4-bit weights are computed in: bf16, or float32 for the base of an
    adapter that was trained in float32."""

    @property
    def spec(self) -> QuantSpec:
        """The same, as the arithmetic knows it."""
        return QuantSpec(self.quant_type or "none", double_quant=self.double_quant, dense_dtype=self.dtype)

    @property
    def dtype_name(self) -> str:
        """As files spell it: "bfloat16", "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """For reports."""
        return self.quant_type or ("bf16" if self.dtype == torch.bfloat16 else "fp32")


@torch.no_grad()
def pack_layer(
    name: str, layer: LoQTLinear, factor: Tensor | None, weight_format: WeightFormat
) -> tuple[dict[str, Tensor], LayerReport]:
    """The tensors of one adapted weight by key relative to the module ("weight", "weight.absmax", ...), on the CPU.

    Args:
        factor: canonical (l, r) float32 to use instead of the layer's B (its fp32 master), or None.

    Raises:
        ExportError: the merged weight is not finite.
    """
    spec = weight_format.spec
    factor = layer.factor() if factor is None else factor.to(layer.B.device, torch.float32)
    same_kind = (layer.spec_w.kind, layer.spec_w.double_quant) == (weight_format.quant_type, weight_format.double_quant)
    if same_kind and not factor.any():
        tensors = to_tensors(layer.packed_w(), layer.weight_shape, weight_format)
        return tensors, LayerReport(name, layer.spec_w.kind, weight_format.label, "copied", 0.0)
    merged = layer.effective_weight(factor)  # (out, in) float32
    if not torch.isfinite(merged).all():
        raise ExportError(f"the merged weight of {name} has values that are not finite; export an earlier checkpoint")
    packed = quantize(merged, spec)
    tensors = to_tensors(packed, layer.weight_shape, weight_format)
    error = merge_error(merged, packed, weight_format)
    action = "rounded" if weight_format.quant_type is None else "quantized"
    return tensors, LayerReport(name, layer.spec_w.kind, weight_format.label, action, error)


def merge_error(merged: Tensor, packed: Packed, weight_format: WeightFormat) -> float:
    """‖W_eff − W_export‖ / ‖W_eff‖ of a merged weight (out, in) float32 and its exported bytes; 0 where W_eff is 0."""
    norm = torch.linalg.vector_norm(merged, dtype=torch.float64).item()
    exported = dequantize(packed, (merged.shape[0], merged.shape[1]), weight_format.spec)
    if weight_format.spec.kind == "none" and weight_format.dtype == torch.float32:
        exported = exported.clone()  # it shares the memory of what is to be written
    residual = torch.linalg.vector_norm(exported.sub_(merged), dtype=torch.float64).item()
    return residual / norm if norm > 0 else residual


def to_tensors(packed: Packed, shape: tuple[int, int], weight_format: WeightFormat) -> dict[str, Tensor]:
    """Packed bytes as the tensors of the file format, on the CPU."""
    packed = {key: value.detach().cpu() for key, value in packed.items()}
    if weight_format.quant_type is None:
        return {"weight": packed["dense"].view(weight_format.dtype).view(shape)}
    state = {
        "quant_type": weight_format.quant_type,
        "blocksize": BLOCKSIZE,
        "dtype": weight_format.dtype_name,
        "shape": list(shape),
    }
    tensors = {"weight": packed["codes"].view(-1, 1)}
    if weight_format.double_quant:
        tensors["weight.absmax"] = packed["absmax"]
        tensors["weight.nested_absmax"] = packed["nested_absmax"].view(torch.float32)
        tensors["weight.nested_quant_map"] = bnb.create_dynamic_map()
        state["nested_blocksize"] = NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = packed["nested_offset"].view(torch.float32).item()
    else:
        tensors["weight.absmax"] = packed["absmax"].view(torch.float32)
    tensors["weight.quant_map"] = bnb.get_4bit_type(weight_format.quant_type, device="cpu")
    tensors[f"weight.quant_state.bitsandbytes__{weight_format.quant_type}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], weight_format: WeightFormat) -> Packed:
    """The inverse of `to_tensors`, for computing with what a file holds."""
    if weight_format.quant_type is None:
        return {"dense": tensors["weight"].reshape(-1).view(torch.uint8)}
    packed = {
        "codes": tensors["weight"].reshape(-1),
        "absmax": tensors["weight.absmax"].view(torch.uint8),
    }
    if weight_format.double_quant:
        state = bytes(tensors[f"weight.quant_state.bitsandbytes__{weight_format.quant_type}"].tolist())
        packed["nested_absmax"] = tensors["weight.nested_absmax"].view(torch.uint8)
        packed["nested_offset"] = torch.tensor([json.loads(state)["nested_offset"]]).view(torch.uint8)
    return packed


def packed_num_bytes(shape: tuple[int, int], weight_format: WeightFormat) -> int:
    """Bytes that the tensors of one weight take, before it is packed (the JSON by an upper bound)."""
    overhead = 0 if weight_format.quant_type is None else 64 + 4 * 256 + 256
    return sum(packed_layout(shape, weight_format.spec).values()) + overhead
