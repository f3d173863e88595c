"""P and B as a PEFT LoRA adapter over the frozen base: nothing is merged, and nothing is quantized again.

A LoRA layer computes y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ, A (r, in) and B (out, r) (LoRA, arXiv 2106.09685, section 4.1;
`lora_A.weight` and `lora_B.weight` of PEFT). The layer of `method.linear` is the same function with

    side "right":  A = P̂ᵀ, B = B          side "left":  A = B, B = P̂          alpha = s r

so an export is two directories: `base`, the weights W_q with their stored codes and everything that is trained in full,
as transformers loads it; and `adapter`, as `PeftModel.from_pretrained` loads it. The base is in the dtype of training
and what the adapter holds is in float32 (masters of B, and P̂ as its codes stand for).

W_q of several tasks is the same where it is the quantized weight of one checkpoint (`loqt.schedule=never`,
`loqt.compensation_steps` at most 1). Then one base serves all: the adapter alone is written over it, and what else the
task has trained goes along, modules as `modules_to_save`, biases of adapted layers as `lora_bias`. `BASE_FILE` in the
adapter's directory holds the checksums of the base that it is of, and `CLASSES_FILE` what a classifier's classes are
called: PEFT has no place for that, and the base's configuration speaks of the first task's.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from loqt_ds.checkpoint import write_json, write_safetensors
from loqt_ds.export.base import BASE_FILE, Contents, task_type
from loqt_ds.export.pack import WeightFormat
from loqt_ds.export.report import AdapterReport, ExportError, LayerReport
from loqt_ds.export.verify import Expected, logits_of, relative_difference, table_lookup
from loqt_ds.method.experts import is_expert
from loqt_ds.method.linear import LoQTLinear

BASE, ADAPTER = "base", "adapter"
"""The two directories of an export."""
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CLASSES_FILE = "classes.json"

# Kernels add in another order: 1e-7 in a layer in float32, 4e-3 in bf16. A wrong factor is an error of its size.
_LAYER_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# What PEFT refuses (`_check_lora_target_modules_mamba`), in models of which types.
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_NOT_OF_MAMBAS = ("out_proj", "conv1d")
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Factors:
    """One layer's adapter, on the CPU: A (r, in) and B (out, r) float32; s multiplies their product."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@torch.no_grad()
def lora_factors(layer: LoQTLinear, factor: Tensor | None = None) -> Factors:
    """A layer's P and B as PEFT's A and B; `factor`: canonical (l, r) float32 to use instead of the layer's B."""
    factor = (layer.factor() if factor is None else factor.float()).cpu()
    basis = layer.basis_hat().cpu()
    if layer.side == "right":
        return Factors(basis.t().contiguous(), factor.contiguous(), layer.scale)
    return Factors(factor.t().contiguous(), basis.contiguous(), layer.scale)


def base_format(layers: Mapping[str, LoQTLinear]) -> tuple[WeightFormat, list[str]]:
    """How W_q is stored so that nothing of it is lost, and what to say about it."""
    stored = {(layer.spec_w.kind, layer.spec_w.double_quant) for layer in layers.values()}
    dtype = next(iter(layers.values())).spec_w.dense_dtype
    kind, double_quant = next(iter(stored))
    if len(stored) == 1 and kind in ("nf4", "fp4"):
        return WeightFormat(kind, double_quant, dtype), []
    kinds = " and ".join(sorted({kind for kind, _ in stored}))
    what = {"none": "are not quantized", "int4": "are int4, which transformers reads in no 4-bit format"}
    why = what.get(kinds, f"are {kinds}, which transformers does not read in one model")
    form = WeightFormat(None, dtype=dtype)
    return form, [f"the base's weights {why}: it is written dense, in {form.label}, with the values they stand for"]


def check_layers(names: Iterable[str], model_config: Any) -> None:
    """Raises ExportError for adapted matrices that an adapter cannot be of."""
    kind = getattr(model_config, "model_type", None)
    for name in names:
        if is_expert(name):
            raise ExportError(
                f"export.format=adapter: {name} is part of one parameter of all experts; PEFT adapts those by "
                "target_parameters, and what is written here is an A and a B for each linear layer; use format=bf16, "
                "or train with a loqt.target_modules that leaves the experts out"
            )
        if kind in _MAMBAS and name.rpartition(".")[2] in _NOT_OF_MAMBAS:
            raise ExportError(
                f"export.format=adapter: PEFT refuses an adapter of {name} in a model of type {kind}, whose fused "
                "kernels read its weight past the layer; use format=bf16, or train with a loqt.target_modules that "
                f"leaves {' and '.join(_NOT_OF_MAMBAS)} out"
            )


def base_of(expected: Expected) -> Expected:
    """The same model without P and B: W_q as it is stored, and everything that is trained in full."""
    zeros = {
        name: torch.zeros((), device=layer.B.device).expand(layer.factor_length, layer.rank)
        for name, layer in expected.layers.items()
    }
    return replace(expected, factors=zeros)


def unchanged(expected: Expected) -> list[LayerReport]:
    """Of the matrices of a base that was there already."""
    label = expected.weight_format.label
    return [LayerReport(name, layer.spec_w.kind, label, "copied", 0.0) for name, layer in expected.layers.items()]


# ------------------------------------------------------------------------------------------------- writing


def write_adapter(
    directory: Path,
    layers: Mapping[str, LoQTLinear],
    factors: Mapping[str, Tensor],
    model: nn.Module,
    *,
    base: Path,
    base_files: Mapping[str, Mapping[str, Any]],
    contents: Contents,
) -> AdapterReport:
    """Writes the adapter's files into a new directory.

    Args:
        layers: all adapted layers by name.
        factors: canonical (l, r) float32, for layers whose own B is not to be used.
        base, base_files: the base's directory as it will be called, and its files of weights with their checksums.

    Raises ExportError if a factor is not finite.
    """
    directory.mkdir()
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for name, layer in layers.items():
        made = lora_factors(layer, factors.get(name))
        if not (torch.isfinite(made.a).all() and torch.isfinite(made.b).all()):
            raise ExportError(f"P or B of {name} has values that are not finite; export an earlier checkpoint")
        tensors |= {f"{name}.lora_A.weight": made.a, f"{name}.lora_B.weight": made.b}
        if contents.biases:
            offset = contents.biases.get(name, torch.zeros(layer.out_features))
            tensors[f"{name}.lora_B.bias"] = offset.float().cpu() / made.scale
        shapes[name] = (made.rank, made.scale)
    tensors |= {name: tensor.detach().cpu() for name, tensor in contents.tensors.items()}
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    file = write_safetensors(directory / WEIGHTS_FILE, prefixed, metadata={"format": "pt"})
    is_transposed = any(layer.is_stored_transposed for layer in layers.values())
    config = _peft_config(model, shapes, contents, base, is_transposed=is_transposed)
    write_json(directory / CONFIG_FILE, config)
    if task_type(model) == "SEQ_CLS":
        own: Any = model.config
        named = {"num_labels": own.num_labels, "id2label": own.id2label, "problem_type": own.problem_type}
        write_json(directory / CLASSES_FILE, named)
    write_json(directory / BASE_FILE, {"base": str(base), "files": {n: dict(e) for n, e in base_files.items()}})
    return AdapterReport(
        rank=config["r"],
        target_modules=config["target_modules"],
        modules_to_save=list(contents.modules),
        num_bytes=file["bytes"],
        base=str(base),
    )


def _peft_config(
    model: nn.Module, shapes: Mapping[str, tuple[int, float]], contents: Contents, base: Path, *, is_transposed: bool
) -> dict[str, Any]:
    """`adapter_config.json`; what it leaves out has PEFT's defaults."""
    common_rank, common_scale = Counter(shapes.values()).most_common(1)[0][0]
    others = {name: shape for name, shape in shapes.items() if shape != (common_rank, common_scale)}
    return {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": common_rank,
        "lora_alpha": _alpha(common_rank, common_scale),
        "rank_pattern": {name: rank for name, (rank, _) in others.items()},
        "alpha_pattern": {name: _alpha(*shape) for name, shape in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(contents.biases),
        "use_rslora": False,
        "fan_in_fan_out": is_transposed,  # of a Conv1D; PEFT sees for itself which layers are others
        "target_modules": _target_modules(model, list(shapes)),
        "modules_to_save": list(contents.modules) or None,
    }


def _alpha(rank: int, scale: float) -> float | int:
    """PEFT divides it by the rank."""
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Last parts of the names where these fit no other module, else an expression of all names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    wanted = set(names)
    fits = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    if fits == wanted:
        return ends
    return "|".join(name.replace(".", r"\.") for name in names)


# ------------------------------------------------------------------------------------------------- verification


def load_adapter(base: nn.Module, adapter_dir: Path) -> nn.Module:
    """PEFT's model of a loaded base, in eval mode.

    A classifier's head is made one of as many classes as the adapter's, called as they are there.

    Raises ExportError where PEFT is not installed or cannot load it.
    """
    peft = import_peft()
    try:
        _fit_head(base, adapter_dir)
        _name_classes(base, adapter_dir)
        with warnings.catch_warnings():
            # PEFT asks transformers 5 for activation checkpointing by a name that is being replaced.
            warnings.filterwarnings("ignore", category=FutureWarning, message=r".*is_gradient_checkpointing")
            model = peft.PeftModel.from_pretrained(base, str(adapter_dir))
    except Exception as error:  # whatever PEFT raises, the adapter does not load
        raise ExportError(f"PEFT cannot load the adapter {adapter_dir}: {type(error).__name__}: {error}") from error
    return model.eval()


def _fit_head(model: Any, adapter_dir: Path) -> None:
    """Gives modules that the adapter holds whole the shape that they have there."""
    with safe_open(adapter_dir / WEIGHTS_FILE, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    for name, parameter in list(model.named_parameters()):
        shape = shapes.get(f"base_model.model.{name}", parameter.shape)
        if tuple(shape) != tuple(parameter.shape):
            module, _, child = name.rpartition(".")
            head = model.get_submodule(module)
            setattr(head, child, nn.Parameter(parameter.new_zeros(*shape), requires_grad=parameter.requires_grad))
            head.out_features = model.num_labels = model.config.num_labels = shape[0]


def _name_classes(model: Any, adapter_dir: Path) -> None:
    """Gives a classifier the classes of the adapter's task, where the adapter has them written down."""
    if not (adapter_dir / CLASSES_FILE).is_file():
        return
    named = json.loads((adapter_dir / CLASSES_FILE).read_text(encoding="utf-8"))
    model.config.id2label = {int(index): name for index, name in named["id2label"].items()}
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.config.problem_type = named["problem_type"]


def import_peft() -> Any:
    """Raises ExportError, naming the extra, where PEFT is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ExportError(
            "an adapter is read by PEFT, which is not installed: pip install 'loqt-ds[adapter]'"
        ) from error
    return peft


@torch.no_grad()
def verify_adapter(
    base: nn.Module,
    adapter_dir: Path,
    model: nn.Module,
    layers: Mapping[str, LoQTLinear],
    factors: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Loads the adapter over the reloaded base as a stranger would, and compares it with the trained model.

    Args:
        base: as transformers loads it, on the device of the trained model; it is changed.
        model: the trained one; it is left as it is.
        inputs: for both models.
        dtype: of the base.

    Returns the largest relative difference of a layer's weight W + (alpha / r) B A, and that of the logits. Raises
    ExportError, naming what differs, if one is too large.
    """
    reloaded = load_adapter(base, adapter_dir)
    of_layers = _compare_layers(reloaded, layers, factors, dtype)
    was_training = model.training
    try:
        wanted = logits_of(model.eval(), inputs)
    finally:
        model.train(was_training)
    actual = logits_of(reloaded, inputs)
    if not torch.isfinite(actual).all():
        raise ExportError("base and adapter compute logits that are not finite")
    of_logits = relative_difference(actual, wanted)
    if of_logits > LOGITS_TOLERANCE[dtype]:
        raise ExportError(
            f"the logits of base and adapter differ by {of_logits:.1e} (relative) from those of the trained model, "
            f"more than {LOGITS_TOLERANCE[dtype]}; the export is not usable with the installed PEFT"
        )
    return of_layers, of_logits


def _compare_layers(
    reloaded: nn.Module, layers: Mapping[str, LoQTLinear], factors: Mapping[str, Tensor], dtype: torch.dtype
) -> float:
    """The largest relative difference of W + (alpha / r) B A from W_q + s (P, B product)."""
    own = {name.removeprefix("base_model.model."): m for name, m in reloaded.named_modules() if hasattr(m, "lora_A")}
    if own.keys() != layers.keys():
        raise ExportError(f"PEFT adapts other layers than were trained: {sorted(own.keys() ^ layers.keys())[0]} is one")
    worst = 0.0
    for name, layer in layers.items():
        module: Any = own[name]
        (adapter,) = module.scaling
        a, b = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
        actual = torch.addmm(_weight_of(module.base_layer), b, a, alpha=module.scaling[adapter])
        factor = factors.get(name)
        wanted = layer.effective_weight(factor if factor is None else factor.to(layer.B.device, torch.float32))
        difference = relative_difference(actual, wanted)
        if not difference <= _LAYER_TOLERANCE[dtype]:
            raise ExportError(
                f"{name} of base and adapter differs by {difference:.1e} (relative) from what was trained"
            )
        worst = max(worst, difference)
    return worst


def _weight_of(module: Any) -> Tensor:
    """The weight (out, in) float32 of a base's layer."""
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Linear4bit):
        return table_lookup(module)
    weight: Tensor = module.weight.detach().float()
    return weight.t() if isinstance(module, Conv1D) else weight
