"""Load the export again as a stranger would, and compare it with what was meant.

Compared, in this order: the bytes on disk with the bytes that were handed over; the codes, scales and tables of every
4-bit layer of the reloaded model with those of the files; every dense tensor; the dequantized weights; and the logits
with those of a reference model, which takes its dense tensors from the trained model (not from the files) and
dequantizes each exported weight when it is used, through `core.quantization` and not through bitsandbytes' layer. The
trained weights are merged once more for a second reference, and each is compared with what its file holds.

bitsandbytes 0.50.2 on a CPU dequantizes wrongly where in_features is a multiple of 16 and not of 64 (DEEPSPEED.md of
the design), although the codes are right. Which layers it gets wrong is found by comparing each with a table look-up;
those layers of the reloaded model are then computed from their codes, and the report names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from loqt_ds.core.quantization import BLOCKSIZE, Packed, dequantize
from loqt_ds.export.layout import Layout
from loqt_ds.export.pack import WeightFormat, from_tensors, merge_error
from loqt_ds.export.report import ExportError, Verification
from loqt_ds.export.writer import WrittenWeights
from loqt_ds.method import experts
from loqt_ds.method.conversion import empty_of, tie_weights
from loqt_ds.method.linear import LoQTLinear

# bf16 has 8 bits; kernels that add in another order differ by that much in each layer. A wrong dequantization differs
# by 0.2 and more. On a CPU the two are usually equal.
LOGITS_TOLERANCE = 0.05
NUM_ROWS, NUM_COLUMNS = 2, 32


@dataclass(frozen=True)
class Expected:
    """What the reloaded model must equal."""

    model_class: type[nn.Module]
    model_config: Any
    layout: Layout
    weight_format: WeightFormat
    layers: Mapping[str, LoQTLinear]
    factors: Mapping[str, Tensor]
    """Canonical (l, r) float32, for layers whose B is not to be used."""
    dense: Mapping[str, Tensor]
    """Every tensor that is not an adapted weight, by name; what is exported is its rounding to the format's dtype."""
    merge_errors: dict[str, float]
    """‖W_eff − W_export‖ / ‖W_eff‖ of each layer as it was written; filled in by the writing."""

    def format_of(self, name: str) -> WeightFormat:
        """How a layer is written."""
        return self.layout.format_of(name, self.weight_format)

    def dtype_of(self, name: str) -> torch.dtype:
        """What one of `dense` is written in."""
        return self.layout.dtype_of(name, self.dense[name], self.weight_format)


class _ReferenceLinear(nn.Module):
    """A linear whose weight is made each time it is used, so that no second copy of the model is held."""

    def __init__(self, weight: Callable[[], Tensor], dtype: torch.dtype):
        super().__init__()
        self.make_weight = weight
        self.bias: nn.Parameter | None = None
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """For code that asks a linear for its dtype."""
        return torch.empty(0, dtype=self._dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.make_weight().to(x.dtype), self.bias)


def verify_files(directory: Path, written: WrittenWeights) -> None:
    """Reads the files back; raises ExportError, naming the file, if one is not what was handed over."""
    for name, entry in written.files.items():
        with open(directory / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ExportError(f"{name} reads back differently than it was written; check the disk of {directory}")


@torch.no_grad()
def verify_export(directory: Path, written: WrittenWeights, expected: Expected) -> Verification:
    """Reload on the device of the trained model, and compare.

    Raises:
        ExportError: anything differs; the message names it.
    """
    verify_files(directory, written)
    device = str(next(iter(expected.layers.values())).B.device)
    reloaded = _reload(directory, device)
    stored = StoredTensors(directory, written.weight_map)
    patched = _compare_tensors(reloaded, stored, expected)
    inputs = example_inputs(reloaded, device)
    actual = logits_of(reloaded, inputs)
    del reloaded
    wanted = _Reference(expected, stored, device, merged=False).logits(inputs)
    merged = _Reference(expected, stored, device, merged=True).logits(inputs)
    if not torch.isfinite(actual).all():
        raise ExportError("the reloaded model computes logits that are not finite")
    relative = relative_difference(actual, wanted)
    if relative > LOGITS_TOLERANCE:
        raise ExportError(
            f"the reloaded model's logits differ by {relative:.3f} (relative) from those of the exported weights, more "
            f"than {LOGITS_TOLERANCE}; the export is not usable on {device} with the installed transformers"
        )
    return Verification(
        device=device,
        num_tokens=next(iter(inputs.values())).numel(),
        logits_max_difference=(actual - wanted).abs().max().item(),
        logits_relative_difference=relative,
        merged_logits_relative_difference=relative_difference(actual, merged),
        patched_layers=patched,
    )


def relative_difference(actual: Tensor, wanted: Tensor) -> float:
    """‖actual − wanted‖ / ‖wanted‖; 0 or 1 where `wanted` is zero."""
    norm = torch.linalg.vector_norm(wanted).item()
    return torch.linalg.vector_norm(actual - wanted).item() / norm if norm > 0 else float(actual.any())


def random_tokens(model_config: Any, device: str) -> Tensor:
    """(rows, columns) token ids of a model, always the same."""
    text_config = model_config.get_text_config()
    longest = [getattr(text_config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    num_columns = min([NUM_COLUMNS, *(limit for limit in longest if isinstance(limit, int) and limit > 0)])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, getattr(text_config, "vocab_size", 2), (NUM_ROWS, num_columns), generator=generator)
    return tokens.to(device)


def example_inputs(model: Any, device: str) -> dict[str, Tensor]:
    """Arguments for a forward of a transformers model, always the same: tokens, an image or sounds, by what the model
    says that it reads; and tokens for its decoder where it has one of its own.

    Raises ExportError for a model that reads something else.
    """
    config, name = model.config, model.main_input_name
    draw = torch.Generator().manual_seed(1)
    tokens = random_tokens(config, device)
    if name == "input_ids":
        inputs = {name: tokens}
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        inputs = {name: torch.randn(NUM_ROWS, config.num_channels, size, size, generator=draw)}
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        inputs = {name: torch.randn(NUM_ROWS, config.num_mel_bins, frames, generator=draw)}
    elif name == "input_values" and hasattr(config, "conv_kernel"):  # waves
        inputs = {name: torch.randn(NUM_ROWS, 4000, generator=draw)}
    else:
        raise ExportError(
            f"{type(model).__name__} reads {name}, of which nothing is known here, so that no logits can be compared; "
            "export without that (--no-verify, or verify=False)"
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {key: v.to(device, dtype) if v.is_floating_point() else v.to(device) for key, v in inputs.items()}


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits, float32; of a model without, its first output."""
    outputs = model(**inputs)
    logits: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits.float()


# ------------------------------------------------------------------------------------------------- reloading


@contextmanager
def quiet_transformers():
    """Without the progress bars of loading."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def load_export(directory: Path, *, device: str = "cpu") -> nn.Module:
    """The exported model as transformers loads it, in eval mode, with the layers put right that a CPU gets wrong.

    Those are the layers that the module's docstring speaks of; on a GPU nothing is changed.

    Raises:
        ExportError: transformers cannot load the directory, or bitsandbytes dequantizes it wrongly on a GPU.
    """
    from bitsandbytes.nn import Linear4bit

    model = _reload(Path(directory), device)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            _put_right(name, module)
    return model


def _reload(directory: Path, device: str) -> nn.Module:
    import transformers

    try:
        # What the Auto classes look up, and also what has none of them.
        (name,) = json.loads((directory / "config.json").read_text())["architectures"]
        with quiet_transformers():
            # A pair, because of output_loading_info; its annotation does not say so.
            loaded: Any = getattr(transformers, name).from_pretrained(
                directory, device_map={"": device}, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # whatever transformers raises, the export does not load
        raise ExportError(f"transformers cannot load the export: {type(error).__name__}: {error}") from error
    model, info = loaded
    problems = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if problems:
        raise ExportError(f"transformers loads the export with {problems}; the tensor names do not fit the model")
    return model.eval()


class StoredTensors:
    """Tensors of the written files, read when asked for."""

    def __init__(self, directory: Path, weight_map: Mapping[str, str]):
        self._directory, self._weight_map = directory, weight_map
        self.names = sorted(weight_map)

    def get(self, name: str) -> Tensor:
        with safe_open(self._directory / self._weight_map[name], framework="pt") as file:
            return file.get_tensor(name)

    def of_weight(self, layer_name: str) -> dict[str, Tensor]:
        """All tensors of one adapted weight, by key relative to the module."""
        prefix = f"{layer_name}."
        own = [name for name in self.names if name == f"{prefix}weight" or name.startswith(f"{prefix}weight.")]
        return {name.removeprefix(prefix): self.get(name) for name in own}


# ------------------------------------------------------------------------------------------------- comparing tensors


def _compare_tensors(reloaded: nn.Module, stored: StoredTensors, expected: Expected) -> list[str]:
    """Compare everything stored with what the reloaded model holds; returns the layers that had to be patched."""
    patched = []
    adapted = {n: layer for n, layer in expected.layers.items() if expected.format_of(n).quant_type is not None}
    for name, layer in adapted.items():
        module = reloaded.get_submodule(name)
        problem = _compare_quantized(module, stored.of_weight(name), expected.weight_format, layer.weight_shape)
        if problem:
            raise ExportError(f"{name} of the reloaded model {problem}")
        if _put_right(name, module):
            patched.append(name)
    own = reloaded.state_dict()
    quantized = tuple(f"{name}.weight" for name in adapted)
    for name in stored.names:
        if not name.startswith(quantized) or not quantized:
            wanted, held = stored.get(name), expected.layout.in_model(name, own)
            if held is None or held.dtype != wanted.dtype or not torch.equal(held.cpu(), wanted):
                raise ExportError(f"{name} of the reloaded model is not what was stored")
    return patched


def _compare_quantized(
    module: nn.Module, tensors: Mapping[str, Tensor], weight_format: WeightFormat, shape: tuple[int, int]
) -> str | None:
    """What is wrong with a reloaded 4-bit layer, or None."""
    from bitsandbytes.nn import Linear4bit

    if not isinstance(module, Linear4bit):
        return f"is {type(module).__name__} and not Linear4bit"
    weight: Any = module.weight
    state = weight.quant_state
    if (state.quant_type, state.blocksize, tuple(state.shape)) != (weight_format.quant_type, BLOCKSIZE, shape):
        return f"has type {state.quant_type}, blocksize {state.blocksize}, shape {tuple(state.shape)}"
    held = {"weight": weight.data, "weight.absmax": state.absmax, "weight.quant_map": state.code}
    if weight_format.double_quant:
        held |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_quant_map": state.state2.code}
    for key, tensor in held.items():
        if tensor.dtype != tensors[key].dtype or not torch.equal(tensor.cpu().view(-1), tensors[key].view(-1)):
            return f"has another {key} than was stored"
    return None


def table_lookup(module: Any) -> Tensor:
    """The weight (out, in) float32 of a Linear4bit, from its codes, table and scales alone."""
    state, codes = module.weight.quant_state, module.weight.data.view(-1)
    num_values = state.shape.numel()
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = inner.code[absmax.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: absmax.numel()]
        absmax = absmax + state.offset
    nibbles = torch.stack((codes >> 4, codes & 15), dim=1).view(-1)[:num_values]
    values = state.code[nibbles.int()]
    return (values * absmax.repeat_interleave(state.blocksize)[:num_values]).view(state.shape)


def _put_right(name: str, module: Any) -> bool:
    """Where bitsandbytes dequantizes a reloaded layer wrongly, compute it from its codes; True if that was needed."""
    from bitsandbytes.functional import dequantize_4bit

    # With AVX512-BF16 the layer would repack its weight at its first forward and fail at odd widths.
    module.support_avx512bf16_for_cpu = False
    wanted = table_lookup(module)
    actual = dequantize_4bit(module.weight.data, module.weight.quant_state)
    difference = relative_difference(actual.float(), wanted)
    if difference < 0.01:  # bf16 rounding is 0.002, the error looked for 0.2
        return False
    width = module.in_features
    if not (actual.device.type == "cpu" and width % 16 == 0 and width % 64 != 0):
        raise ExportError(f"bitsandbytes dequantizes {name} with a relative error of {difference:.3f}")

    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, table_lookup(self).to(x.dtype), self.bias)

    module.forward = MethodType(forward, module)
    return True


# ------------------------------------------------------------------------------------------------- the reference


class _Reference:
    """The model as it should compute: exported weights in bf16, or merged ones in float32, before they were rounded."""

    def __init__(self, expected: Expected, stored: StoredTensors, device: str, *, merged: bool):
        self._expected, self._stored = expected, stored
        self._device = torch.device(device)
        self._merged = merged
        dtype = torch.float32 if merged else expected.weight_format.dtype
        # Tables that are made with the model, such as XGLM's positions, are then of the dtype they are reloaded in.
        model = empty_of(expected.model_class, expected.model_config, dtype=dtype)
        experts.unpack(model, expected.layers.__contains__)
        for name in expected.layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _ReferenceLinear(partial(self._weight, name), dtype))
        for name, tensor in expected.dense.items():
            parent, _, child = name.rpartition(".")
            own = torch.float32 if merged and tensor.is_floating_point() else expected.dtype_of(name)
            value = tensor.detach().to(self._device, own)
            module = model.get_submodule(parent)
            if child in module._buffers:
                module._buffers[child] = value
            else:
                setattr(module, child, nn.Parameter(value, requires_grad=False))
        tie_weights(model)
        left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        assert not left, f"the reference model lacks {left}"
        self._model = model.to(self._device).eval()

    def _weight(self, name: str) -> Tensor:
        layer, weight_format = self._expected.layers[name], self._expected.format_of(name)
        packed = {key: value.to(layer.B.device) for key, value in self._packed(name).items()}
        if not self._merged:
            dtype = weight_format.dtype
            return dequantize(packed, layer.weight_shape, weight_format.spec, dtype=dtype).to(self._device)
        factor = self._expected.factors.get(name)
        merged = layer.effective_weight(factor if factor is None else factor.to(layer.B.device, torch.float32))
        found, meant = merge_error(merged, packed, weight_format), self._expected.merge_errors[name]
        if abs(found - meant) > 1e-5 + 1e-3 * meant:
            raise ExportError(
                f"{name} reads back with a merge error of {found:.4f} instead of {meant:.4f}: its files hold another "
                "weight than was merged"
            )
        return merged.to(self._device)

    def _packed(self, name: str) -> Packed:
        layer, own = self._expected.layers[name], self._stored.of_weight(name)
        tensors = self._expected.layout.of_weight(name, layer, own, self._stored.get)
        return from_tensors(tensors, self._expected.format_of(name))

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Float32; numbers among the inputs are taken to the model's dtype."""
        dtype = next(self._model.parameters()).dtype
        return logits_of(self._model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
