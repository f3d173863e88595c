"""The base of an adapter: is it the one that a run was trained over, and what has the run trained beside it?

W_q of the base must be that of the run, byte for byte. What else is different belongs to the task and goes into the
adapter: modules whole (PEFT's `modules_to_save`), biases of adapted layers as what is added to them (`lora_bias`), and
of a classifier always its head. Afterwards the base is known by the checksums of its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loqt_ds.export import writer
from loqt_ds.export.pack import pack_layer
from loqt_ds.export.report import ExportError
from loqt_ds.export.verify import Expected, StoredTensors
from loqt_ds.method.conversion import output_head
from loqt_ds.method.linear import LoQTLinear

BASE_FILE = "base.json"
"""In an adapter's directory: which base it is of."""


@dataclass(frozen=True)
class Contents:
    """What an adapter holds beside P and B; all of it is in the base where the base is its own."""

    modules: tuple[str, ...] = ()
    """Modules that are saved whole."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Their tensors, by name."""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """What is added to the base's bias (out,), by adapted layer."""


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what the model is for; None where it need not know."""
    from transformers.models.auto import modeling_auto as auto

    known = {
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    for task, names in known.items():
        if type(model).__name__ in names.values():
            return task
    return None


def loader_of(model: nn.Module) -> str:
    """The class of transformers by which the model's directory is best loaded."""
    from transformers.models.auto import modeling_auto as auto

    known = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForMaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    name = type(model).__name__
    return next((loader for loader, names in known.items() if name in names.values()), name)


def stored_weights(directory: Path) -> writer.WrittenWeights:
    """The files of weights of a model directory, hashed, and which tensor is in which.

    Raises ExportError if there are none, or one is missing or damaged.
    """
    index = directory / writer.INDEX_FILE
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    except (ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"{index} is no index of shards ({error!r}); copy it again") from error
    files: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    for name in names or ["model.safetensors"]:
        path = directory / name
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            with safe_open(path, framework="pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), name)
        except FileNotFoundError as error:
            raise ExportError(
                f"{directory} has no {name}; give the directory of a base, as an export made it"
            ) from error
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path} cannot be read ({error}); copy it again") from error
        files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return writer.WrittenWeights(files, weight_map)


def contents_of(model: nn.Module, expected: Expected, base_dir: Path | None, *, option: str = "--base") -> Contents:
    """What an adapter holds beside P and B, over a base of its own (None) or one that there is; `option`: by which it
    was given, for messages."""
    if base_dir is None:
        return _with_modules(model, expected, set(), {}, option)
    return _compare_base(base_dir, expected, model, option)


@torch.no_grad()
def _compare_base(base_dir: Path, expected: Expected, model: nn.Module, option: str) -> Contents:
    """What the adapter of a model must hold over this base, beside P and B: what has other values in the base.

    Raises ExportError if the base has other quantized weights, or other dense ones that an adapter cannot hold.
    """
    try:
        weights = stored_weights(base_dir)
    except ExportError as error:
        raise ExportError(f"{option}={base_dir}: {error}") from error
    stored = StoredTensors(base_dir, weights.weight_map)
    for name, layer in expected.layers.items():
        problem = _other_weight(stored, name, layer, expected)
        if problem:
            raise ExportError(
                f"{option}={base_dir} is not the base of this run: {name} {problem}. Leave {option} out to write a "
                "base of its own; tasks share one where they are trained from the same model.path with "
                "loqt.schedule=never, loqt.compensation_steps=1, and the same loqt.quantize_w, loqt.double_quant and "
                "train.dtype"
            )
    called = {expected.layout.dense_name(name): name for name in expected.dense}
    adapted = tuple(f"{name}.weight" for name in expected.layers)
    unknown = [name for name in stored.names if name not in called and not name.startswith(adapted)]
    if unknown:
        raise ExportError(f"{option}={base_dir} is a base of another model: it has {unknown[0]}, which this one lacks")
    others = {}
    for file_name, name in called.items():
        tensor = expected.dense[name]
        theirs = stored.get(file_name) if file_name in weights.weight_map else None
        own = tensor.detach().cpu().to(expected.dtype_of(name))
        if theirs is None or not torch.equal(own, theirs):
            others[name] = own
    biases = {}
    for name in expected.layers:
        if others.pop(f"{name}.bias", None) is not None:
            biases[name] = expected.dense[f"{name}.bias"].detach().cpu().float() - stored.get(f"{name}.bias").float()
    return _with_modules(model, expected, {name.rpartition(".")[0] for name in others}, biases, option)


def _with_modules(
    model: nn.Module, expected: Expected, modules: set[str], biases: Mapping[str, Tensor], option: str
) -> Contents:
    """An adapter's contents with these modules, and those that PEFT takes for a classifier's own.

    Raises ExportError for a module that has adapted layers inside: PEFT cannot hold it whole.
    """
    modules = modules | _heads(model, expected)
    modules = {name for name in modules if not any(name.startswith(f"{other}.") for other in modules)}
    head, names = output_head(model), dict(model.named_modules())
    tied = next((name for name, module in names.items() if head is not None and module is head), None)
    tied_weight = getattr(head, "weight", None)
    tensors: dict[str, Tensor] = {}
    for module in sorted(modules):
        inside = next((name for name in expected.layers if name.startswith(f"{module}.") or not module), None)
        if inside is not None:
            raise ExportError(
                f"parameters of {module or 'the model'} itself were trained, and {inside} is inside: an adapter cannot "
                f"hold them. Leave {option} out, or train with optim.train_full_rank=false"
            )
        own = {name: t for name, t in expected.dense.items() if name.startswith(f"{module}.")}
        tensors |= {name: t.detach().to(expected.dtype_of(name)) for name, t in own.items()}
    if tied is not None and f"{tied}.weight" not in expected.dense:
        # PEFT copies the embedding that the task has trained: the head has to follow it by itself.
        source = next((n for n in tensors if getattr(names[n.rpartition(".")[0]], "weight", 0) is tied_weight), None)
        if source is not None:
            bias = {name: tensor.detach() for name, tensor in expected.dense.items() if name == f"{tied}.bias"}
            tensors |= {f"{tied}.weight": tensors[source], **bias}
            modules = modules | {tied}
    return Contents(tuple(sorted(modules)), tensors, biases)


def _heads(model: nn.Module, expected: Expected) -> set[str]:
    """Of a classifier, what is not its encoder: it belongs to the task, and not to the base."""
    if task_type(model) != "SEQ_CLS":
        return set()
    prefix = getattr(model, "base_model_prefix", "")
    own = {name.partition(".")[0] for name in expected.dense}
    return own - {prefix} - {name.partition(".")[0] for name in expected.layers}


def _other_weight(stored: StoredTensors, name: str, layer: LoQTLinear, expected: Expected) -> str | None:
    """How a matrix of the base differs from W_q of the layer; None where it does not."""
    weight_format = expected.format_of(name)
    own, _ = pack_layer(name, layer, torch.zeros(layer.factor_length, layer.rank), weight_format)
    theirs = stored.of_weight(name)
    if not theirs:
        return "is not in it"
    theirs = expected.layout.of_weight(name, layer, theirs, stored.get)
    if own.keys() != theirs.keys():
        return f"is stored in another format than {weight_format.label}"
    for key, tensor in own.items():
        if tensor.dtype != theirs[key].dtype or tensor.shape != theirs[key].shape:
            return f"has another shape or dtype ({tuple(theirs[key].shape)}, {theirs[key].dtype})"
        if not torch.equal(tensor, theirs[key]):
            return "holds other values"
    return None


def check_base(adapter_dir: Path, base_dir: Path) -> None:
    """Refuses an adapter over another base than the one that it was written for.

    Raises ExportError, naming the difference and what would do. Adapters without `BASE_FILE` are not ours: whether
    they fit, PEFT finds out.
    """
    file = adapter_dir / BASE_FILE
    if not file.is_file():
        return
    try:
        recorded = json.loads(file.read_text())
        wanted = {name: entry["sha256"] for name, entry in recorded["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{file} does not say which base the adapter is of ({error!r}); export it again") from error
    found = {name: entry["sha256"] for name, entry in stored_weights(base_dir).files.items()}
    if found == wanted:
        return
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    raise ExportError(
        f"the adapter {adapter_dir} belongs to another base than {base_dir}: {', '.join(different)} "
        f"{'differs' if len(different) == 1 else 'differ'}. Give the base it was exported with "
        f"({recorded.get('base')}), or export its run again with --format adapter --base {base_dir}"
    )
