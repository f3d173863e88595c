"""Batched experts, one matrix each: what transformers 5 holds as one parameter (experts, out, in) becomes linears.

    y_t = sum over chosen experts e of  g_te · D_e(act(U_e x_t)),        act gated where the model's is

transformers keeps the matrices of all experts of a block in one parameter, `experts.gate_up_proj` and
`experts.down_proj`, and its forward picks slices of it. Each expert has a gradient, a subspace and a quantization of
its own, so `unpack` puts `experts.gate_up_proj.3` and so on in their place, ordinary linears that are adapted as any
other, and a forward that computes the same sum, one expert after the other over the tokens that chose it. An expert
that no token chose in a micro-batch has a gradient of zero; one that nobody chose in a whole re-initialization step
keeps its P.

Files hold experts in one of three ways: fused as in the model, or each under a name of its own, in Mixtral's spelling
(w1 the gate, w3 up, w2 down) or in Qwen's (gate_proj, up_proj, down_proj). All are read, under the names that
transformers translates as well (`input_linear` and `output_linear` of GraniteMoE); written is the spelling that the
library's own conversion of the model type names, or else fused as in the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_EXPERT = re.compile(r"(.*\.experts)\.(gate_up_proj|up_proj|down_proj)\.(\d+)")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|up_proj|down_proj)")
_IN_FILES = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_QWEN = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_MIXTRAL = {"gate_up_proj": ("w1", "w3"), "up_proj": ("w1",), "down_proj": ("w2",)}
_MIXTRAL_BLOCK = ".block_sparse_moe"


def batched_parameters(module: nn.Module) -> list[str]:
    """Short names of the parameters (experts, out, in) of a module of batched experts that `unpack` knows; empty for
    any other. Experts with biases, transposed matrices or a norm of their own stay as they are."""
    if getattr(module, "is_transposed", True) or getattr(module, "has_bias", True):
        return []
    if getattr(module, "has_post_expert_norm", False) or not hasattr(module, "_apply_gate"):
        return []
    names = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    own = dict(module.named_parameters(recurse=False))
    return names if all(name in own and own[name].dim() == 3 for name in names) else []


def unpack(model: nn.Module, is_wanted: Callable[[str], bool]) -> None:
    """Puts linears in the place of batched experts, in every module of which one of them `is_wanted` by its name. The
    linears are views of the parameter: nothing is copied."""
    for name, module in list(model.named_modules()):
        shorts = batched_parameters(module)
        own = dict(module.named_parameters(recurse=False))
        if any(map(is_wanted, _names(name, module))):
            for short in shorts:
                delattr(module, short)
                setattr(module, short, _linears(own[short]).train(module.training))
            module.forward = _ExpertsForward(module)


def batched_names(model: nn.Module) -> list[str]:
    """What `unpack` would call the experts of a model that need a gradient."""
    return [
        each
        for name, module in model.named_modules()
        for each in _names(name, module)
        if module.get_parameter(each.split(".")[-2]).requires_grad
    ]


def _names(name: str, module: nn.Module) -> list[str]:
    """Of all experts of a module of that name."""
    shorts = batched_parameters(module)
    return [f"{name}.{short}.{number}" for short in shorts for number in range(len(module.get_parameter(short)))]


def _linears(parameter: nn.Parameter) -> nn.ModuleList:
    linears = nn.ModuleList()
    for weight in parameter.detach():  # (out, in)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        linears.append(linear)
    return linears


def unpacked_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of parameters of a model as it was before `unpack`, each expert's in the place of what held them all."""
    modules = dict(model.named_modules())
    found = []
    for name in names:
        linears = modules.get(name)
        if isinstance(linears, nn.ModuleList):
            found += [f"{name}.{number}.weight" for number in range(len(linears))]
        else:
            found.append(name)
    return found


class _ExpertsForward:
    """The forward of unpacked experts: an object with the module inside, not a bound method, which would be unpickled
    as that of the class."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts: Any = experts

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, h); top_k_index (T, k) int64, top_k_weights (T, k): which experts, and how much of each.
        Returns (T, h)."""
        experts = self._experts
        first = experts.gate_up_proj if experts.has_gate else experts.up_proj
        chosen = top_k_index.flatten()  # (T k)
        # One synchronization: how many tokens each expert has. An index beyond the last means none.
        counts = chosen.bincount(minlength=len(first)).tolist()
        places = chosen.argsort(stable=True).split(counts)
        result = torch.zeros_like(hidden_states)
        for number, place in enumerate(places[: len(first)]):
            # In training an expert without tokens is called too: its gradient is zero, as that of its slice of one
            # parameter would be, and all ranks have gradients of the same parameters.
            if len(place) or torch.is_grad_enabled():
                tokens = place // top_k_index.shape[1]
                inner = first[number](hidden_states[tokens])
                inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
                outer = experts.down_proj[number](inner) * top_k_weights.flatten()[place, None]
                result.index_add_(0, tokens, outer.to(result.dtype))
        return result


def is_expert(name: str) -> bool:
    """Whether a module's name is that of one expert's matrix."""
    return _EXPERT.fullmatch(name) is not None


# ---------------------------------------------------------------- names in files


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies in files: tensors that are joined along their first dimension, for each expert if all of
    them make one parameter; or one row of a fused tensor."""

    parts: tuple[tuple[str, ...], ...]
    row: int | None = None
    is_stacked: bool = False

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part]

    def under(self, renamed: Callable[[str], str]) -> Stored:
        """The same place in files that have other names."""
        return replace(self, parts=tuple(tuple(map(renamed, part)) for part in self.parts))

    def read(self, get: Callable[[str, int | None], Tensor]) -> Tensor:
        """The tensor, by `get(name in the files, row or None)`."""
        parts = [[get(name, self.row) for name in part] for part in self.parts]
        joined = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
        return torch.stack(joined) if self.is_stacked else joined[0]

    def shape(self, get: Callable[[str], list[int]]) -> tuple[int, ...]:
        """Of what `read` gives, by `get(name in the files)`."""
        shapes = [get(name) for name in self.parts[0]]
        one = shapes[0][1:] if self.row is not None else [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        return (len(self.parts), *one) if self.is_stacked else tuple(one)


def spellings(name: str, shape: torch.Size) -> list[Stored]:
    """Where else than under its own name a parameter of that shape may lie in files, as far as experts go."""
    if match := _EXPERT.fullmatch(name.removesuffix(".weight")):
        block, short, number = match[1], match[2], int(match[3])
        found = [Stored(((f"{block}.{short}",),), row=number)]
        return found + [Stored((own_names(block, short, number, style),)) for style in ("mixtral", "qwen")]
    if (match := _FUSED.fullmatch(name)) and len(shape) == 3:
        each = [[own_names(match[1], match[2], e, style) for e in range(shape[0])] for style in ("mixtral", "qwen")]
        return [Stored(tuple(parts), is_stacked=True) for parts in each]
    return [Stored(((renamed(name, "mixtral"),),))] if ".mlp." in name else []


def own_names(block: str, short: str, number: int, style: str) -> tuple[str, ...]:
    """Names of the tensors of one expert's matrix, one below the other, where each expert has its own."""
    parts = (_MIXTRAL if style == "mixtral" else _QWEN)[short]
    return tuple(f"{renamed(block, style)}.{number}.{part}.weight" for part in parts)


def renamed(name: str, style: str | None) -> str:
    """A name as files of that style have it."""
    return re.sub(r"\.mlp\b", _MIXTRAL_BLOCK, name) if style == "mixtral" else name


def renamed_back(name: str) -> str:
    """The inverse of `renamed`, for any style."""
    return name.replace(_MIXTRAL_BLOCK, ".mlp")


@dataclass(frozen=True)
class Place:
    """Where in a model's own parameter an expert's tensor of a file belongs."""

    parameter: str
    expert: int
    part: int
    num_parts: int

    def of(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """That part (out, in) of a state; None where it has no such parameter."""
        if self.parameter not in state:
            return None
        return state[self.parameter][self.expert].chunk(self.num_parts)[self.part]


def parse(name: str) -> Place | None:
    """What a name in files says of an expert; None where it is not of an expert's own tensor."""
    match = _IN_FILES.fullmatch(renamed_back(name))
    if match is None:
        return None
    block, number, part = match[1], int(match[2]), match[3]
    for parts in (_MIXTRAL, _QWEN):
        for short in ("gate_up_proj", "down_proj"):
            if part in parts[short]:
                return Place(f"{block}.{short}", number, parts[short].index(part), len(parts[short]))
    return None


def written_style(model_config: Any) -> str | None:
    """How files of a model type name experts: mixtral, qwen, or None where they are fused as in the model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    converters = get_checkpoint_conversion_mapping(getattr(model_config, "model_type", "")) or []
    sources = [str(pattern) for c in converters for pattern in getattr(c, "source_patterns", [])]
    if any(".experts.*.w1.weight" in pattern for pattern in sources):
        return "mixtral"
    return "qwen" if any(".experts.*.gate_proj.weight" in pattern for pattern in sources) else None


def tensors_of(name: str, weight: Tensor, style: str | None) -> dict[str, Tensor]:
    """An expert's matrix (out, in) as tensors for files of a style that has one for each expert."""
    match = _EXPERT.fullmatch(name)
    assert match is not None and style is not None
    names = own_names(match[1], match[2], int(match[3]), style)
    return {key: part.contiguous() for key, part in zip(names, weight.chunk(len(names)), strict=True)}


def fused_place(name: str) -> tuple[str, int]:
    """(name of the parameter of all experts in transformers' model, which of them)."""
    match = _EXPERT.fullmatch(name)
    assert match is not None
    return f"{match[1]}.{match[2]}", int(match[3])
