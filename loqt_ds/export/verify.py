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
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.export.pack import WeightFormat
from loqt_ds.export.report import ExportError, Verification
from loqt_ds.export.writer import WrittenWeights
from loqt_ds.method.linear import LoQTLinear

# bf16 has 8 bits; kernels that add in another order differ by that much in each layer. A wrong dequantization differs
# by 0.2 and more. On a CPU the two are usually equal.
LOGITS_TOLERANCE = 0.05
NUM_ROWS, NUM_COLUMNS = 2, 32


@dataclass(frozen=True)
class Expected:
    """What the reloaded model must equal."""

    model_config: Any
    weight_format: WeightFormat
    layers: Mapping[str, LoQTLinear]
    factors: Mapping[str, Tensor]
    """Canonical (l, r) float32, for layers whose B is not to be used."""
    dense: Mapping[str, Tensor]
    """Every tensor that is not an adapted weight, by name; what is exported is its bf16 rounding."""
    merge_errors: dict[str, float]
    """‖W_eff − W_export‖ / ‖W_eff‖ of each layer as it was written; filled in by the writing."""


class _ReferenceLinear(nn.Module):
    """A linear whose weight is made each time it is used, so that no second copy of the model is held."""

    def __init__(self, weight: Callable[[], Tensor]):
        super().__init__()
        self.make_weight = weight
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.make_weight().to(x.dtype), self.bias)


@torch.no_grad()
def verify_export(directory: Path, written: WrittenWeights, expected: Expected) -> Verification:
    """Reload on the device of the trained model, and compare.

    Raises:
        ExportError: anything differs; the message names it.
    """
    for name, entry in written.files.items():
        with open(directory / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ExportError(f"{name} reads back differently than it was written; check the disk of {directory}")
    device = str(next(iter(expected.layers.values())).B.device)
    reloaded = _reload(directory, device)
    stored = _StoredTensors(directory, written.weight_map)
    patched = _compare_tensors(reloaded, stored, expected)
    tokens = _random_tokens(expected.model_config, device)
    actual = reloaded(input_ids=tokens).logits.float()
    del reloaded
    reference = _Reference(expected, stored, device)
    wanted = reference.logits(tokens, merged=False)
    merged = reference.logits(tokens, merged=True)
    if not torch.isfinite(actual).all():
        raise ExportError("the reloaded model computes logits that are not finite")
    relative = _relative_difference(actual, wanted)
    if relative > LOGITS_TOLERANCE:
        raise ExportError(
            f"the reloaded model's logits differ by {relative:.3f} (relative) from those of the exported weights, more "
            f"than {LOGITS_TOLERANCE}; the export is not usable on {device} with the installed transformers"
        )
    return Verification(
        device=device,
        num_tokens=tokens.numel(),
        logits_max_difference=(actual - wanted).abs().max().item(),
        logits_relative_difference=relative,
        merged_logits_relative_difference=_relative_difference(actual, merged),
        patched_layers=patched,
    )


def _relative_difference(actual: Tensor, wanted: Tensor) -> float:
    norm = torch.linalg.vector_norm(wanted).item()
    return torch.linalg.vector_norm(actual - wanted).item() / norm if norm > 0 else float(actual.any())


def _random_tokens(model_config: Any, device: str) -> Tensor:
    text_config = model_config.get_text_config()
    num_columns = min(NUM_COLUMNS, getattr(text_config, "max_position_embeddings", NUM_COLUMNS))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, text_config.vocab_size, (NUM_ROWS, num_columns), generator=generator)
    return tokens.to(device)


# ------------------------------------------------------------------------------------------------- reloading


@contextmanager
def _quiet_transformers():
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
