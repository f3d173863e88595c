"""From a model with `nn.Linear` to one with `LoQTLinear`, in place or without ever holding it in full precision.

Three ways in:

- `convert(model, ...)` replaces the linears of a model that is in memory;
- `build_model(config, ...)` builds a transformers model with unallocated parameters, and `materialize(model, ...)`
  takes any such model: one module at a time is drawn by the model's own initializer, each from its own seed, or read
  from safetensors, quantized, and its full-precision tensor let go; several ranks share the work;
- `build_meta(config, ...)` stops before materializing, for the planner, for checks, and for loading a checkpoint.

Linears are `nn.Linear`, the transposed Conv1D of GPT-2, and each expert of batched ones, which are unpacked first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from loqt_ds.config import LoQTConfig
from loqt_ds.core.quantization import QuantSpec, quantize
from loqt_ds.core.subspace import resolve_side
from loqt_ds.method.experts import is_expert
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.method.sources import WeightSource, checkpoint_files, initializer, persistent_buffers
from loqt_ds.method.structure import (
    blocks,
    check_rank,
    is_in,
    is_transposed,
    matrix_shape,
    output_head,
    own_parameters,
    target_linears,
    task_head,
    task_head_parameters,
    tie_weights,
    tied_head,
    unpack_experts,
)
from loqt_ds.ranks import ALONE, Ranks

__all__ = [
    "TASKS",
    "Shard",
    "WeightSource",
    "auto_class",
    "build_empty",
    "build_meta",
    "build_model",
    "check_rank",
    "checkpoint_files",
    "convert",
    "empty_of",
    "initializer",
    "keep_dequantized",
    "loqt_layers",
    "materialize",
    "materialize_zeros",
    "output_head",
    "quantization_specs",
    "target_linears",
    "task_head",
    "task_head_parameters",
    "tie_weights",
    "unpack_experts",
]


Shard = Callable[[nn.Module, nn.Module], None]
"""(model, block of it that has just been made): shards the block, before the next is made."""


def loqt_layers(model: nn.Module) -> dict[str, LoQTLinear]:
    """All LoQT layers by module name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoQTLinear)}


def quantization_specs(loqt: LoQTConfig, dtype: torch.dtype) -> tuple[QuantSpec, QuantSpec]:
    """How W and how P are stored."""
    return (
        QuantSpec(loqt.quantize_w, double_quant=loqt.double_quant_w, dense_dtype=dtype),
        QuantSpec(loqt.quantize_p, double_quant=loqt.double_quant_p, dense_dtype=dtype),
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _loqt_twin(name: str, linear: Any, loqt: LoQTConfig, dtype: torch.dtype, device: torch.device | str) -> LoQTLinear:
    spec_w, spec_p = quantization_specs(loqt, dtype)
    out_features, in_features = matrix_shape(linear)
    layer = LoQTLinear(
        in_features,
        out_features,
        rank=loqt.rank,
        side=resolve_side(loqt.side, out_features, in_features),
        scale=loqt.alpha,
        spec_w=spec_w,
        spec_p=spec_p,
        bias=linear.bias is not None,
        dtype=dtype,
        device=device,
        product=loqt.product,
    )
    layer.is_stored_transposed, layer.is_conditional = is_transposed(linear), is_expert(name)
    return layer


def keep_dequantized(model: nn.Module, loqt: LoQTConfig, *, dtype: torch.dtype | None = None) -> None:
    """Tells the first layers to keep their W dequantized, as many as `loqt.dequantized_cache_gib` has room for. To be
    called again where the dtype of B was changed. `dtype`: of the computation, where it is not that of B."""
    room = loqt.dequantized_cache_gib * 2**30
    for layer in loqt_layers(model).values():
        itemsize = (layer.B.dtype if dtype is None else dtype).itemsize
        room -= layer.dequantized_bytes // layer.B.dtype.itemsize * itemsize
        layer.keeps_dequantized = room >= 0


@torch.no_grad()
def convert(model: nn.Module, loqt: LoQTConfig) -> dict[str, Tensor]:
    """Replaces the target linears of a model in memory by LoQT layers on the same device, quantizing each weight.

    B and biases take the dtype of the weight they belong to. Returns the original weights by name (out, in), which
    the controller needs for the first re-initialization and then lets go.
    """
    unpack_experts(model, loqt.target_modules)
    linears = target_linears(model, loqt.target_modules)
    check_rank(linears, loqt.rank)
    originals: dict[str, Tensor] = {}
    for name, linear in linears.items():
        weight = linear.weight.detach().t() if is_transposed(linear) else linear.weight.detach()  # (out, in)
        layer = _loqt_twin(name, linear, loqt, weight.dtype, weight.device)
        layer.set_w(quantize(weight.float().contiguous(), layer.spec_w))
        if layer.bias is not None and linear.bias is not None:
            layer.bias.copy_(linear.bias)
        layer.train(linear.training)
        originals[name] = weight
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

    Raises ValueError, naming model.task, if transformers has no such model, cannot make it, or makes an encoder for
    what a decoder does.
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
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = auto.from_config(model_config, dtype=torch.float32, attn_implementation=attention)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model.task={task} with model.attention={attention} needs a package: {reason}") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever the model's own code stumbles over, it is in its configuration
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model.task={task}: transformers cannot make a {model_config.model_type} of its config.json ({reason}); "
            "correct it"
        ) from error
    # An encoder that can be a decoder says which in its configuration; GPT-NeoX has the word there and never reads it.
    reads_it = any(getattr(module, "is_decoder", None) is False for module in model.modules())
    if task == "causal_lm" and getattr(model.config, "is_decoder", None) is False and reads_it:
        masked = "use model.task=masked_lm, or " if type(model_config) in auto_class("masked_lm")._model_mapping else ""
        raise ValueError(
            f"model.task=causal_lm: a {model_config.model_type} with is_decoder=false sees the tokens that it is to "
            f"predict; {masked}set is_decoder to true in its config.json"
        )
    tie_weights(model)
    return model.train()


def empty_of(model_class: Any, model_config: Any, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """As `build_empty`, of a class of transformers, with the attention that it takes by itself."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = model_class._from_config(model_config, dtype=dtype)
    tie_weights(model)
    return model


def build_meta(
    model_config: Any,
    loqt: LoQTConfig,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    task: str = "causal_lm",
    model_class: Any = None,
) -> nn.Module:
    """The converted model with nothing allocated: LoQT layers and parameters in `dtype` on the meta device.

    `model_class`: a class of transformers to build, instead of the task's.
    """
    if model_class is None:
        model = build_empty(model_config, attention=attention, task=task)
    else:
        model = empty_of(model_class, model_config)
    unpack_experts(model, loqt.target_modules)
    linears = target_linears(model, loqt.target_modules)
    check_rank(linears, loqt.rank)
    for name, linear in linears.items():
        _replace(model, name, _loqt_twin(name, linear, loqt, dtype, "meta"))
    for module in model.modules():
        for short, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != dtype:
                setattr(module, short, nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad))
    tie_weights(model)
    keep_dequantized(model, loqt)
    return model


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
    shard: Shard | None = None,
) -> tuple[nn.Module, WeightSource]:
    """Builds a transformers model for a task and materializes it in 4 bits (see `materialize`)."""
    model = build_empty(model_config, attention=attention, task=task)
    return materialize(model, loqt, source, device=device, dtype=dtype, ranks=ranks, shard=shard)


def _repeated(model: nn.Module, linears: Collection[str], tied: nn.Module | None) -> dict[str, set[str]]:
    """Module -> those of its own parameters that a module before it has: they are drawn, or read, under their first
    name, by however many ranks and in whatever order that is done. What replaces a linear shares nothing."""
    seen: set[int] = set()
    names: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if name in linears:
            names[name] = set()
            continue
        own = dict(own_parameters(module, tied))
        every = module.named_parameters(recurse=False)
        names[name] = {short for short, parameter in every if short not in own or id(parameter) in seen}
        seen |= {id(parameter) for parameter in own.values()}
    return names


def _fill(made: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Gives an empty module its own tensors, as the source gives them."""
    if isinstance(made, LoQTLinear):
        weight = tensors["weight"].to(device).float()
        made.set_w(quantize(weight.t().contiguous() if made.is_stored_transposed else weight, made.spec_w))
        tensors = {"bias": tensors["bias"]} if made.bias is not None else {}
    for short, tensor in tensors.items():
        getattr(made, short).copy_(tensor)


def _stored(module: nn.Module) -> list[Tensor]:
    """What a module holds beside its parameters: quantized W, or buffers."""
    if isinstance(module, LoQTLinear):
        return list(module.packed_w().values())
    return [buffer for _, buffer in persistent_buffers(module)]


@torch.no_grad()
def materialize(
    model: nn.Module,
    loqt: LoQTConfig,
    source: Callable[[nn.Module], WeightSource],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
    shard: Shard | None = None,
) -> tuple[nn.Module, WeightSource]:
    """Makes, quantizes and releases a model on the meta device layer by layer; one weight at a time is in float32.

    Several ranks share the work: each makes every N-th module and broadcasts it, quantized, so that a weight is read or
    drawn once.

    Args:
        model: its parameters are on the meta device, its buffers are real. It is changed.
        source: makes the weight source for the empty model: `initializer(seed)` or `checkpoint_files(directory)`.
        device, dtype: of the trained parameters and of the computation.
        shard: called with each block as soon as it is whole, so that no more than one is.

    Returns the model, whose P and B are zero, and the source.
    """
    device = torch.device(device)
    unreal = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unreal:
        raise ValueError(
            f"the buffer {unreal[0]} is on the meta device; build the model with its parameters there only "
            "(accelerate.init_empty_weights(include_buffers=False))"
        )

    def prepare() -> tuple[dict[str, Any], WeightSource]:
        unpack_experts(model, loqt.target_modules)
        linears = target_linears(model, loqt.target_modules)
        check_rank(linears, loqt.rank)
        return linears, source(model)

    linears, weights = ranks.attempt(prepare)
    tied = tied_head(model)
    repeated = _repeated(model, linears, tied)
    shared: dict[int, nn.Parameter] = {}  # by the parameter on the meta device

    def empty(name: str, module: nn.Module) -> nn.Module:
        """What replaces a module, not filled in yet."""
        if name in linears:
            return _loqt_twin(name, linears[name], loqt, dtype, device)
        for short, parameter in own_parameters(module, tied):
            if id(parameter) not in shared:
                blank = torch.empty(parameter.shape, device=device, dtype=dtype)
                shared[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
            module.register_parameter(short, shared[id(parameter)])
        for short, buffer in persistent_buffers(module):
            module._buffers[short] = buffer.to(device)
        return module

    jobs = [(n, m) for n, m in model.named_modules() if own_parameters(m, tied) or persistent_buffers(m)]
    unsharded = {} if shard is None else blocks(model, linears)
    for start in range(0, len(jobs), ranks.world_size):
        batch = jobs[start : start + ranks.world_size]
        own = batch[ranks.rank] if ranks.rank < len(batch) else None
        # Before the module is replaced: its parameters' shapes are asked for.
        tensors = ranks.attempt(lambda own=own: weights.module(*own) if own is not None else {})  # type: ignore[misc]
        made = [(name, empty(name, module)) for name, module in batch]
        if own is not None:
            name, module = made[ranks.rank]
            _fill(module, {short: t for short, t in tensors.items() if short not in repeated[name]}, device)
        del tensors  # before the next is there
        for owner, (name, module) in enumerate(made):
            own_once = [p.data for short, p in own_parameters(module, tied) if short not in repeated[name]]
            for tensor in (*_stored(module), *own_once):
                ranks.broadcast(tensor, owner)
            if name in linears:
                _replace(model, name, module)
        to_come = [name for name, _ in jobs[start + ranks.world_size :]]
        for block in [block for block in unsharded if not any(is_in(name, (block,)) for name in to_come)]:
            assert shard is not None
            within = {id(parameter) for parameter in unsharded[block].parameters()}
            shard(model, unsharded.pop(block))
            shared = {key: parameter for key, parameter in shared.items() if id(parameter) not in within}
    tie_weights(model)
    model.to(device)  # what is left: buffers such as rotary tables
    keep_dequantized(model, loqt, dtype=dtype)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"not materialized: {left}"
    return model, weights


@torch.no_grad()
def materialize_zeros(model: nn.Module, device: torch.device | str, *, shard: Shard | None = None) -> nn.Module:
    """Gives every tensor that is on the meta device zeros on `device`, shared ones once; returns the model. `shard` is
    called with each block as soon as it is whole."""
    if shard is not None:
        for block in blocks(model, loqt_layers(model)).values():
            shard(model, materialize_zeros(block, device))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for short, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if id(parameter) not in made:
                    zeros = torch.zeros_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
                module.register_parameter(short, made[id(parameter)])
        for short, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[short] = torch.zeros_like(buffer, device=device)
    return model.to(device)
