"""Prints the table of architectures: what the method adapts in each, and what stays in full precision.

    python tools/architectures.py
    python tools/architectures.py --only mixtral --names

Counted in the default configuration of each class of transformers (mostly its first published model), on the meta
device: nothing is allocated. That each of them trains, merges, exports and loads again is what
tests/unit/test_architectures.py holds, on tiny models.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from loqt_ds.export.layout import Layout
from loqt_ds.export.pack import WeightFormat
from loqt_ds.method.conversion import empty_of, target_linears, unpack_experts

# name -> (how it is called in the table, class of the model, class of its configuration, what is special about it)
ARCHITECTURES = {
    "llama": ("Llama", "LlamaForCausalLM", "LlamaConfig", ""),
    "mistral": ("Mistral", "MistralForCausalLM", "MistralConfig", "grouped-query attention"),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", "norms of queries and keys"),
    "gemma2": ("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", "tied head, capped logits"),
    "gpt2": ("GPT-2", "GPT2LMHeadModel", "GPT2Config", "transposed Conv1D, fused qkv"),
    "gpt-neox": ("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", "fused qkv, one matrix"),
    "opt": ("OPT", "OPTForCausalLM", "OPTConfig", ""),
    "mixtral": ("Mixtral", "MixtralForCausalLM", "MixtralConfig", "batched experts, one matrix each"),
    "qwen3-moe": ("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", "batched experts, one matrix each"),
    "deberta-v2": ("DeBERTa-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", "classification"),
    "bert": ("BERT", "BertForMaskedLM", "BertConfig", "masked language model"),
    "vit": ("ViT", "ViTForImageClassification", "ViTConfig", "images"),
    "mamba": ("Mamba", "MambaForCausalLM", "MambaConfig", "state space"),
    "whisper": ("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", "sound, encoder-decoder"),
    "t5": ("T5", "T5ForConditionalGeneration", "T5Config", "encoder-decoder"),
}
SMALL = 0.0005  # shares below this are summed up


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of one model."""

    total: int
    adapted: dict[str, int]
    """Elements of adapted matrices, by name with N for numbers."""
    kept: dict[str, int]
    """Elements of everything else, likewise."""
    num_matrices: int
    num_dense: int
    """Adapted matrices that a 4-bit export writes dense."""


def _common(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def count(model: nn.Module) -> Counts:
    """Of a transformers model on the meta device, which is changed. Tied parameters count once."""
    layout, nf4 = Layout(model, model.config), WeightFormat("nf4")
    unpack_experts(model, "all-linear")
    linears = target_linears(model, "all-linear")
    weights = {id(linear.weight) for linear in linears.values()}
    adapted: dict[str, int] = {}
    kept: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = adapted if id(parameter) in weights else kept
        key = _common(name.removesuffix(".weight"))
        group[key] = group.get(key, 0) + parameter.numel()
    num_dense = sum(layout.format_of(name, nf4).quant_type is None for name in linears)
    total = sum(adapted.values()) + sum(kept.values())
    return Counts(total, adapted, kept, len(linears), num_dense)


def build(name: str) -> Any:
    """The model of a row, on the meta device."""
    import transformers

    _, model, config, _ = ARCHITECTURES[name]
    return empty_of(getattr(transformers, model), getattr(transformers, config)())


def _short(name: str) -> str:
    """The end of a module's name, without the numbers of layers and experts."""
    parts = [part for part in name.split(".") if part != "N"]
    return ".".join(parts[-2:]) if parts[-1] in ("bias", "dense", "proj", "A_log", "D") else parts[-1]


def _sum_by_short(sizes: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in sizes.items():
        found[_short(name)] = found.get(_short(name), 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def row(name: str, counts: Counts) -> str:
    """One line of the table, in Markdown."""
    title, _, _, special = ARCHITECTURES[name]
    adapted = ", ".join(f"`{short}`" for short in _sum_by_short(counts.adapted))
    kept = _sum_by_short(counts.kept)
    large = {short: size for short, size in kept.items() if size >= SMALL * counts.total}
    parts = [f"`{short}` {size / counts.total:.1%}" for short, size in large.items()]
    rest = sum(kept.values()) - sum(large.values())
    if rest:
        parts.append(f"{len(kept) - len(large)} others (norms, biases) {rest / counts.total:.2%}")
    dense = f"; {counts.num_dense} written dense" if counts.num_dense else ""
    share = sum(counts.adapted.values()) / counts.total
    special = f" ({special})" if special else ""
    millions = f"{counts.total / 1e6:,.0f} M"
    matrices = f"{counts.num_matrices}, {share:.1%}{dense}"
    return f"| {title}{special} | {millions} | {adapted} | {matrices} | {'; '.join(parts)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*ARCHITECTURES], help="one architecture")
    parser.add_argument(
        "--names", action="store_true", help="every name with its number of parameters, below the table"
    )
    options = parser.parse_args()
    names = [options.only] if options.only else [*ARCHITECTURES]
    print("| Model | Parameters | Adapted | Matrices, share | Trained in full precision, share |")
    print("|---|--:|---|--:|---|")
    details = []
    for name in names:
        counts = count(build(name))
        print(row(name, counts), flush=True)
        for what, sizes in (("adapted", counts.adapted), ("full precision", counts.kept)):
            details += [f"{name}  {what:<14}  {size:>14,}  {module}" for module, size in sizes.items()]
    if options.names:
        print("", *details, sep="\n")


if __name__ == "__main__":
    main()
