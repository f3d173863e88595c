"""What an export reports: per-layer merge error, size, and how far the reloaded model is from what was meant.

Kept beside the weights as `export_report.json`, so that the quality cost of the format travels with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30


class ExportError(ValueError):
    """The export was refused, or what was written does not load as what was meant; nothing is left under its name."""


@dataclass(frozen=True)
class LayerReport:
    """One exported matrix."""

    name: str
    stored_as: str
    """How W was stored while training: nf4, fp4, int4 or none."""
    exported_as: str
    """nf4, fp4 or bf16."""
    action: str
    """"copied": the stored codes; "quantized": merged in float32 and quantized once; "rounded": merged, to bf16."""
    merge_error: float
    """‖W_eff − W_export‖ / ‖W_eff‖, Frobenius norms."""


@dataclass
class Verification:
    """What reloading with transformers showed."""

    device: str
    num_tokens: int
    logits_max_difference: float
    """Largest |logit difference| between the reloaded model and a model that holds the exported weights densely."""
    logits_relative_difference: float
    """The same, ‖difference‖ / ‖logits‖."""
    merged_logits_relative_difference: float
    """‖difference‖ / ‖logits‖ of the reloaded bf16 model against the merged model in float32."""
    patched_layers: list[str] = field(default_factory=list)
    """Layers whose dequantization bitsandbytes gets wrong on a CPU, computed from their codes instead."""


@dataclass
class AdapterReport:
    """What was written as an adapter, and what PEFT made of it."""

    rank: int
    target_modules: list[str] | str
    modules_to_save: list[str]
    """Modules that the adapter holds whole, because the task trained them and the base does not have them."""
    num_bytes: int
    base: str
    layers_relative_difference: float | None = None
    """Of a layer's W + (alpha / r) B A as PEFT has it from W_q + s (P, B product), the largest; None: not compared."""
    logits_relative_difference: float | None = None
    """‖difference‖ / ‖logits‖ of PEFT's model against the trained one."""


@dataclass
class ExportReport:
    """Summary of one export."""

    output_dir: Path
    format: str
    layers: list[LayerReport]
    num_bytes: int
    """Of the files of weights."""
    num_shards: int
    notes: list[str]
    """What a user should know: re-quantization, copied codes, patched layers."""
    versions: dict[str, str]
    source: str
    loader: str = "AutoModelForCausalLM"
    """The class of transformers that loads it."""
    verification: Verification | None = None
    adapter: AdapterReport | None = None

    @property
    def mean_merge_error(self) -> float:
        """Mean over layers."""
        return sum(layer.merge_error for layer in self.layers) / len(self.layers)

    @property
    def worst_layer(self) -> LayerReport:
        """The layer with the largest merge error."""
        return max(self.layers, key=lambda layer: layer.merge_error)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the means spelled out. The directory is left out: it may be moved."""
        value = asdict(self)
        del value["output_dir"]
        worst = self.worst_layer
        summary = {
            "mean_merge_error": self.mean_merge_error,
            "worst_merge_error": worst.merge_error,
            "worst_layer": worst.name,
        }
        return {"format": value.pop("format"), "source": value.pop("source"), **summary, **value}

    def summary_lines(self) -> list[str]:
        """A few lines for a person."""
        if self.adapter is not None:
            return self._adapter_lines(self.adapter)
        worst = self.worst_layer
        size = f"{self.num_bytes / GIB:.2f} GiB" if self.num_bytes >= GIB else f"{self.num_bytes / 2**20:.1f} MiB"
        shards = f"{self.num_shards} file{'s' if self.num_shards > 1 else ''}"
        lines = [
            f"exported {len(self.layers)} adapted matrices as {worst.exported_as}: {size} in {shards}",
            f"merge error ‖W_eff − exported‖/‖W_eff‖: mean {self.mean_merge_error:.4f}, "
            f"worst {worst.merge_error:.4f} ({worst.name})",
        ]
        if self.verification is None:
            return [*lines, "logits were not compared with those of a reloaded model"]
        check = self.verification
        return [
            *lines,
            f"reloaded with transformers on {check.device}: logits differ by {check.logits_max_difference:.2e} at most "
            f"({check.logits_relative_difference:.1e} relative) from those of the exported weights, and by "
            f"{check.merged_logits_relative_difference:.1e} relative from those of the merged model in float32",
        ]

    def _adapter_lines(self, adapter: AdapterReport) -> list[str]:
        of_base = self.layers[0].exported_as
        lines = [
            f"exported P and B of {len(self.layers)} matrices as an adapter of rank {adapter.rank} "
            f"({adapter.num_bytes / 2**20:.1f} MiB) over the base {adapter.base} (weights as {of_base})"
        ]
        if adapter.modules_to_save:
            first = ", ".join(adapter.modules_to_save[:4])
            more = len(adapter.modules_to_save) - 4
            others = f" and {more} more" if more > 0 else ""
            lines.append(f"the adapter also holds what the task has of its own: {first}{others}")
        if adapter.logits_relative_difference is None:
            return [*lines, "it was not loaded with PEFT, and no logits were compared"]
        return [
            *lines,
            f"loaded with PEFT: logits differ by {adapter.logits_relative_difference:.1e} (relative) from those of the "
            f"trained model, weights by {adapter.layers_relative_difference:.1e} at most",
        ]


def how_to_load(report: ExportReport) -> str:
    """A line for whoever has just exported."""
    if report.adapter is not None:
        adapter = str(report.output_dir / "adapter")
        return (
            f"load it with PeftModel.from_pretrained(model, {adapter!r}), where model = "
            f"{report.loader}.from_pretrained({report.adapter.base!r})"
        )
    if report.format == "gguf":
        return f"load it with llama.cpp (-m {str(report.output_dir / 'model.gguf')!r}), which an export does not run"
    return f"load it with {report.loader}.from_pretrained({str(report.output_dir)!r})"
