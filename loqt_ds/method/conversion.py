"""From a model with `nn.Linear` to one with `LoQTLinear`, in place or without ever holding it in full precision.

Three ways in:

- `convert(model, ...)` replaces the linears of a model that is in memory;
- `build_model(config, ...)` builds a transformers model with unallocated parameters, and `materialize(model, ...)`
  takes any such model: one module at a time is drawn by the model's own initializer, each from its own seed, or read
  from safetensors, quantized, and its full-precision tensor let go; several ranks share the work;
- `build_meta(config, ...)` stops before materializing, for the planner, for checks, and for loading a checkpoint.

Because a weight is drawn from (seed, module name) or read from a file, it can be had again: `WeightSource.weight(name)`
is what the first re-initialization calls, so that B compensates the error of the first quantization too
(ALGORITHM.md, re-initialization, step 1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loqt_ds.config import LoQTConfig
from loqt_ds.core.quantization import QuantSpec, quantize
from loqt_ds.core.subspace import layer_seed, resolve_side
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.ranks import ALONE, Ranks


class WeightSource(Protocol):
    """Where full-precision tensors come from, one at a time, as often as asked."""

    def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """The module's own parameters by their short names, float32 or as stored, on the CPU."""

    def weight(self, name: str) -> Tensor:
        """The weight of the linear `name` in its original precision, as float32 (out, in), on the CPU."""


def loqt_layers(model: nn.Module) -> dict[str, LoQTLinear]:
    """All LoQT layers by module name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoQTLinear)}


def task_head(model: nn.Module) -> set[str]:
    """Names of the modules that a model for classes or numbers has around its trained part: what lies outside of its
    base model, and a pooler wherever it is. Empty for a model that makes logits of tokens, and for one that does not
    say what its base is.

    They are small, often drawn anew for a task, and always trained in full.
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model or output_head(model) is not None:
        return set()
    inside = {id(module) for module in base.modules()}
    return {
        name
        for name, module in model.named_modules()
        if name and (id(module) not in inside or "pooler" in name.split("."))
    }


def task_head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of `task_head`."""
    around = task_head(model)
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in around}


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, where the model says which it is."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def target_linears(model: nn.Module, target_modules: str | list[str]) -> dict[str, nn.Linear]:
    """The linears to adapt, by name.

    `target_modules` is "all-linear" (every `nn.Linear` but the output head or `task_head`, those whose weight is
    shared, and those whose weight is frozen), a regular expression matched against the whole module name, or a list of
    name suffixes.

    Raises ValueError, listing the names there are, if nothing matches, a listed suffix matches nothing, or the output
    head, a shared or a frozen weight is asked for.
    """
    head, around = output_head(model), task_head(model)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    # Exactly nn.Linear: subclasses (say, of nn.MultiheadAttention) are read by their parents, not called.
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    allowed = {
        n: m
        for n, m in linears.items()
        if m is not head and n not in around and owners[id(m.weight)] == 1 and m.weight.requires_grad
    }
    known = ", ".join(sorted({re.sub(r"\.\d+\.", ".N.", name) for name in allowed})) or "none"
    if target_modules == "all-linear":
        chosen = allowed
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"loqt.target_modules={target_modules!r} is not a regular expression: {error}") from None
        chosen = {n: m for n, m in linears.items() if pattern.fullmatch(n)}
    else:
        chosen = {}
        for suffix in target_modules:
            found = {n: m for n, m in linears.items() if n == suffix or n.endswith("." + suffix)}
            if not found:
                raise ValueError(f"loqt.target_modules: {suffix!r} matches no linear layer; there are: {known}")
            chosen |= found
    if not chosen:
        raise ValueError(f"loqt.target_modules={target_modules!r} matches no linear layer; there are: {known}")
    refused = sorted(set(chosen) - set(allowed))
    if refused:
        raise ValueError(
            f"loqt.target_modules={target_modules!r} matches {', '.join(refused)}: the output head and shared weights "
            f"are trained in full, and weights that need no gradient stay as they are; choose among: {known}"
        )
    return {name: module for name, module in linears.items() if name in chosen}


def check_rank(linears: dict[str, nn.Linear], rank: int) -> None:
    """Raises ValueError, naming the narrowest layer, if `rank` is above the smaller side of any of them."""
    name, linear = min(linears.items(), key=lambda item: min(item[1].in_features, item[1].out_features))
    smallest = min(linear.in_features, linear.out_features)
    if rank > smallest:
        raise ValueError(
            f"loqt.rank={rank} is larger than the smaller side ({smallest}) of {name} "
            f"({linear.out_features}, {linear.in_features}); use a rank of at most {smallest}, "
            f"or leave that layer out of loqt.target_modules"
        )


def quantization_specs(loqt: LoQTConfig, dtype: torch.dtype) -> tuple[QuantSpec, QuantSpec]:
    """How W and how P are stored."""
    return (
        QuantSpec(loqt.quantize_w, double_quant=loqt.double_quant_w, dense_dtype=dtype),
        QuantSpec(loqt.quantize_p, double_quant=loqt.double_quant_p, dense_dtype=dtype),
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _loqt_twin(linear: nn.Linear, loqt: LoQTConfig, dtype: torch.dtype, device: torch.device | str) -> LoQTLinear:
    spec_w, spec_p = quantization_specs(loqt, dtype)
    return LoQTLinear(
        linear.in_features,
        linear.out_features,
        rank=loqt.rank,
        side=resolve_side(loqt.side, linear.out_features, linear.in_features),
        scale=loqt.alpha,
        spec_w=spec_w,
        spec_p=spec_p,
        bias=linear.bias is not None,
        dtype=dtype,
        device=device,
        product=loqt.product,
    )


def keep_dequantized(model: nn.Module, loqt: LoQTConfig) -> None:
    """Tells the first layers to keep their W dequantized, as many as `loqt.dequantized_cache_gib` has room for. To be
    called again where the dtype of B was changed."""
    room = loqt.dequantized_cache_gib * 2**30
    for layer in loqt_layers(model).values():
        room -= layer.dequantized_bytes
        layer.keeps_dequantized = room >= 0


@torch.no_grad()
def convert(model: nn.Module, loqt: LoQTConfig) -> dict[str, Tensor]:
    """Replaces the target linears of a model in memory by LoQT layers on the same device, quantizing each weight.

    B and biases take the dtype of the weight they belong to. Returns the original weights by name (out, in), which
    the controller needs for the first re-initialization and then lets go.
    """
    linears = target_linears(model, loqt.target_modules)
    check_rank(linears, loqt.rank)
    originals: dict[str, Tensor] = {}
    for name, linear in linears.items():
        layer = _loqt_twin(linear, loqt, linear.weight.dtype, linear.weight.device)
        layer.set_w(quantize(linear.weight.detach().float(), layer.spec_w))
        if layer.bias is not None and linear.bias is not None:
            layer.bias.copy_(linear.bias)
        layer.train(linear.training)
        originals[name] = linear.weight.detach()
        _replace(model, name, layer)
    keep_dequantized(model, loqt)
    return originals


# ---------------------------------------------------------------- models that are never held in full precision


TASKS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}
"""model.task -> the class of transformers that makes the model."""


def auto_class(task: str) -> Any:
    """The Auto class of transformers for a task."""
    import transformers

    return getattr(transformers, TASKS[task])


def build_empty(model_config: Any, *, attention: str = "sdpa", task: str = "causal_lm") -> nn.Module:
    """A transformers model for a task (of `TASKS`) whose parameters are on the meta device; its buffers (rotary tables)
    are real. A model without sdpa, such as DeBERTa, computes the same attention as eager.

    Raises ValueError, naming model.task, if transformers has no such model.
    """
    auto: Any = auto_class(task)
    if type(model_config) not in auto._model_mapping:
        possible = [name for name in TASKS if type(model_config) in auto_class(name)._model_mapping]
        raise ValueError(
            f"model.task={task}: transformers has no {auto.__name__} of model_type {model_config.model_type}; "
            f"{'use ' + ' or '.join(possible) if possible else 'give another model'}"
        )
    if attention == "sdpa" and not getattr(auto._model_mapping[type(model_config)], "_supports_sdpa", True):
        attention = "eager"
    with init_empty_weights(include_buffers=False):
        model: nn.Module = auto.from_config(model_config, dtype=torch.float32, attn_implementation=attention)
    return model.train()


def build_meta(
    model_config: Any,
    loqt: LoQTConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    task: str = "causal_lm",
) -> nn.Module:
    """The converted model with nothing allocated: LoQT layers and parameters in `dtype` on the meta device."""
    model = build_empty(model_config, attention=attention, task=task)
    linears = target_linears(model, loqt.target_modules)
    check_rank(linears, loqt.rank)
    for name, linear in linears.items():
        _replace(model, name, _loqt_twin(linear, loqt, dtype, "meta"))
    for module in model.modules():
        for short, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != dtype:
                setattr(module, short, nn.Parameter(parameter.to(dtype)))
    tie_weights(model)
    keep_dequantized(model, loqt)
    return model


def tie_weights(model: nn.Module) -> None:
    """Points shared parameters at one tensor again, after they were replaced one by one."""
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()


def _tied_head(model: nn.Module) -> nn.Module | None:
    """The output head, if it has no weight of its own (a bias it may have)."""
    config = getattr(model, "config", None)
    return output_head(model) if getattr(config, "tie_word_embeddings", False) else None


def _own_parameters(module: nn.Module, tied: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """(short name, parameter) of a module's own, without the weight of a tied head, which is the embedding's."""
    own = module.named_parameters(recurse=False)
    return [(short, parameter) for short, parameter in own if module is not tied or short != "weight"]


def build_model(
    model_config: Any,
    loqt: LoQTConfig,
    source: Callable[[nn.Module], WeightSource],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    task: str = "causal_lm",
    ranks: Ranks = ALONE,
) -> tuple[nn.Module, WeightSource]:
    """Builds a transformers model for a task and materializes it in 4 bits (see `materialize`)."""
    model = build_empty(model_config, attention=attention, task=task)
    return materialize(model, loqt, source, device=device, dtype=dtype, ranks=ranks)


@torch.no_grad()
def materialize(
    model: nn.Module,
    loqt: LoQTConfig,
    source: Callable[[nn.Module], WeightSource],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> tuple[nn.Module, WeightSource]:
    """Makes, quantizes and releases a model on the meta device layer by layer; one weight at a time is in float32.

    Several ranks share the work: each makes every N-th module and broadcasts it, quantized, so that a weight is read or
    drawn once.

    Args:
        model: its parameters are on the meta device, its buffers are real. It is changed.
        source: makes the weight source for the empty model: `initializer(seed)` or `checkpoint_files(directory)`.
        device, dtype: of the trained parameters and of the computation.

    Returns the model, whose P and B are zero, and the source.
    """
    device = torch.device(device)
    unreal = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unreal:
        raise ValueError(
            f"the buffer {unreal[0]} is on the meta device; build the model with its parameters there only "
            "(accelerate.init_empty_weights(include_buffers=False))"
        )

    def prepare() -> tuple[dict[str, nn.Linear], WeightSource]:
        linears = target_linears(model, loqt.target_modules)
        check_rank(linears, loqt.rank)
        return linears, source(model)

    linears, weights = ranks.attempt(prepare)
    tied = _tied_head(model)
    shared: dict[int, nn.Parameter] = {}  # by the parameter on the meta device

    def empty(name: str, module: nn.Module) -> nn.Module:
        """What replaces a module, not filled in yet."""
        if name in linears:
            return _loqt_twin(linears[name], loqt, dtype, device)
        for short, parameter in _own_parameters(module, tied):
            if id(parameter) not in shared:
                blank = torch.empty(parameter.shape, device=device, dtype=dtype)
                shared[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
            module.register_parameter(short, shared[id(parameter)])
        return module

    def fill(made: nn.Module, tensors: dict[str, Tensor]) -> None:
        if made is tied:
            tensors.pop("weight", None)
        if isinstance(made, LoQTLinear):
            made.set_w(quantize(tensors["weight"].to(device).float(), made.spec_w))
            tensors = {"bias": tensors["bias"]} if made.bias is not None else {}
        for short, tensor in tensors.items():
            getattr(made, short).copy_(tensor)

    jobs = [(name, module) for name, module in model.named_modules() if _own_parameters(module, tied)]
    for start in range(0, len(jobs), ranks.world_size):
        batch = jobs[start : start + ranks.world_size]
        own = batch[ranks.rank] if ranks.rank < len(batch) else None
        # Before the module is replaced: its parameters' shapes are asked for.
        tensors = ranks.attempt(lambda own=own: weights.module(*own) if own is not None else {})  # type: ignore[misc]
        made = [(name, empty(name, module)) for name, module in batch]
        if own is not None:
            fill(made[ranks.rank][1], tensors)
        del tensors  # before the next is there
        for owner, (name, module) in enumerate(made):
            of_w = list(module.packed_w().values()) if isinstance(module, LoQTLinear) else []
            for tensor in (*of_w, *(p.data for _, p in _own_parameters(module, tied))):
                ranks.broadcast(tensor, owner)
            if name in linears:
                _replace(model, name, module)
    tie_weights(model)
    model.to(device)  # what is left: buffers such as rotary tables
    keep_dequantized(model, loqt)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"not materialized: {left}"
    return model, weights


class _Initializer:
    """Draws a module's parameters with the model's own initializer, from (seed, module name) alone."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model, self._seed = model, seed
        self._linears = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if type(m) is nn.Linear}

    def _initialize(self, name: str, module: nn.Module) -> None:
        """Draws a module's parameters in place, as the transformers model around it does, or by its own
        `reset_parameters`."""
        from transformers import PreTrainedModel

        parts = name.split(".")
        for end in range(len(parts), -1, -1):
            around = self._model.get_submodule(".".join(parts[:end]))
            if isinstance(around, PreTrainedModel):
                around._init_weights(module)  # type: ignore[operator]
                return
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters and no reset_parameters() to draw "
                "them with; give a directory of weights"
            )
        reset()

    def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        empties = dict(module.named_parameters(recurse=False))
        for short, empty in empties.items():
            # NaN, not zero: a parameter that the initializer forgets must not pass for an initialized one.
            blank = torch.full(empty.shape, float("nan"), dtype=torch.float32)
            module.register_parameter(short, nn.Parameter(blank, requires_grad=empty.requires_grad))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it also seeds every accelerator, whose states are not forked.
            torch.default_generator.manual_seed(layer_seed(self._seed, 0, name))
            self._initialize(name, module)
        tensors = {short: p.detach() for short, p in module.named_parameters(recurse=False)}
        for short, empty in empties.items():
            # Whoever holds the module must not hold what was drawn: all modules would be the whole model in float32.
            module.register_parameter(short, empty)
        # By the extremes: isfinite makes a copy, and the largest tensor decides the peak of the start.
        forgotten = [s for s, t in tensors.items() if t.numel() and not torch.stack(t.aminmax()).isfinite().all()]
        if forgotten:
            raise ValueError(
                f"the initializer of {type(self._model).__name__} leaves {name}.{forgotten[0]} uninitialized"
            )
        return tensors

    def weight(self, name: str) -> Tensor:
        in_features, out_features = self._linears[name]
        with torch.device("meta"):
            blank = nn.Linear(in_features, out_features)  # the bias, if any, is drawn after the weight
        return self.module(name, blank)["weight"]


class _CheckpointFiles:
    """Reads tensors, one at a time, from one or several safetensors files.

    With `seed`, modules of the model's `task_head` that the files have nothing of are drawn by the model's own
    initializer, and `drawn` names them; what the files hold of another task's head is left alone.
    """

    def __init__(self, model: nn.Module, directory: Path, option: str, seed: int | None) -> None:
        what = f"{option}={str(directory)!r}"
        self._files = dict(_tensor_files(directory, option))
        self._option = option
        tied = _tied_head(model)
        around = task_head(model) if seed is not None else set()
        shapes: dict[str, torch.Size] = {}
        same: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for short, parameter in _own_parameters(module, tied):
                full = f"{name}.{short}" if name else short
                shapes[full] = parameter.shape
                same.setdefault(id(parameter), []).append(full)
        self._stored = self._find(same.values(), getattr(model, "base_model_prefix", ""))
        missing = sorted(set(shapes) - set(self._stored))
        # A head is the task's as a whole: a classifier of another one with the same name is not half of it.
        lacking = {name.rpartition(".")[0] for name in missing}
        self.drawn = sorted(name for name in lacking if name in around)
        self._initializer = None if seed is None else _Initializer(model, seed)
        wanted = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in self.drawn}
        missing = sorted(set(wanted) - set(self._stored))
        if missing:
            raise ValueError(
                f"{what} has no tensor {missing[0]} (and {len(missing) - 1} others of "
                f"{len(shapes)} are missing): its config.json describes another model than its files hold"
            )
        extra = self._extra(model, {self._stored[name] for name in wanted}, has_head=tied is None)
        if extra:
            raise ValueError(
                f"{what} holds {len(extra)} tensors that {type(model).__name__} has no place "
                f"for, the first being {extra[0]}; give the directory of a full-precision checkpoint of that model"
            )
        for name, shape in wanted.items():
            there = tuple(self._shape(name))
            if there != tuple(shape):
                remedy = "; give the model.num_labels it was trained with" if name.rpartition(".")[0] in around else ""
                raise ValueError(f"{what}: {name} is {there}, the model's is {tuple(shape)}{remedy}")

    def _find(self, groups: Iterable[list[str]], prefix: str) -> dict[str, str]:
        """Name of each parameter -> name in the files. One that several modules share is there under one of its names,
        or under all; a base model is saved without the prefix that it has inside of others; old files say gamma and
        beta for the weight and bias of a norm."""

        def spellings(name: str) -> Iterator[str]:
            for start in (name, name.removeprefix(f"{prefix}.")):
                yield start
                for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                    if start.endswith(new):
                        yield start.removesuffix(new) + old

        stored: dict[str, str] = {}
        for names in groups:
            found = {name: next((s for s in spellings(name) if s in self._files), None) for name in names}
            there = [spelling for spelling in found.values() if spelling is not None]
            stored |= {name: spelling or there[0] for name, spelling in found.items() if there}
        return stored

    def _extra(self, model: nn.Module, read: set[str], *, has_head: bool) -> list[str]:
        """Tensors of the files that are neither read nor known to be dispensable."""
        patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
        patterns += [r".*rotary_emb\.inv_freq", r".*\.position_ids"]
        if not has_head:
            patterns.append(r"lm_head\.weight")
        base = f"{getattr(model, 'base_model_prefix', '')}."
        if self._initializer is not None and any(name.startswith(base) for name in self._files):
            patterns.append(rf"(?!{re.escape(base)})")  # heads of other tasks
        ignored = [re.compile(pattern) for pattern in patterns]
        return [name for name in sorted(set(self._files) - read) if not any(p.search(name) for p in ignored)]

    def _shape(self, name: str) -> list[int]:
        stored = self._stored[name]
        with _opened(self._files[stored], self._option) as file:
            return file.get_slice(stored).get_shape()

    def _read(self, name: str) -> Tensor:
        stored = self._stored[name]
        with _opened(self._files[stored], self._option) as file:
            return file.get_tensor(stored)

    def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        if name in self.drawn:
            assert self._initializer is not None
            return self._initializer.module(name, module)
        prefix = f"{name}." if name else ""
        names = [short for short, _ in module.named_parameters(recurse=False) if prefix + short in self._stored]
        return {short: self._read(prefix + short) for short in names}

    def weight(self, name: str) -> Tensor:
        return self._read(f"{name}.weight").float()


@contextmanager
def _opened(file: Path, option: str) -> Iterator[Any]:
    """A safetensors file; ValueError, naming it, where it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{option}: {file} cannot be read ({error}); copy it again") from error


def _tensor_files(directory: Path, option: str) -> Iterator[tuple[str, Path]]:
    """(tensor name, file) for each tensor of a safetensors checkpoint, sharded or not."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{option}: {index} is no index of shards ({error!r}); copy it again") from error
        for name, file in weight_map.items():
            if not (directory / file).is_file():
                raise ValueError(f"{option}={str(directory)!r}: the index names {file}, which is not there")
            yield name, directory / file
    elif single.is_file():
        with _opened(single, option) as opened:
            names = list(opened.keys())
        for name in names:
            yield name, single
    else:
        raise ValueError(
            f"{option}={str(directory)!r} has neither model.safetensors nor model.safetensors.index.json; "
            "pickled .bin checkpoints are not read: convert them to safetensors"
        )


def initializer(seed: int) -> Callable[[nn.Module], WeightSource]:
    """Weights drawn by the model's own initializer."""
    return lambda model: _Initializer(model, seed)


def checkpoint_files(
    directory: str | Path, *, option: str = "model.path", seed: int | None = None
) -> Callable[[nn.Module], WeightSource]:
    """Weights read from the safetensors files of a directory, which errors call `option`. With a seed, the modules of a
    `task_head` that the files lack are drawn from it; the source's `drawn` names them.

    Raises ValueError if the files are missing, pickled, quantized, or of another model.
    """
    return lambda model: _CheckpointFiles(model, Path(directory), option, seed)


@torch.no_grad()
def materialize_zeros(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Gives every tensor that is on the meta device zeros on `device`, shared ones once; returns the model."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for short, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.zeros_like(parameter, device=device))
                module.register_parameter(short, made[id(parameter)])
        for short, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[short] = torch.zeros_like(buffer, device=device)
    return model.to(device)
