"""What a model's modules are to the method: matrices to adapt, the output head, the head of a task, what is tied."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from loqt_ds.method import experts

# child -> part of its parent's class name, where the parent computes with the child's weight instead of calling it
_READ_BY_PARENT = {"dt_proj": "Mamba"}


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D of GPT-2: a linear whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def matrix_shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear or a Conv1D."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear that is called as one, by name."""
    found = {}
    for parent_name, parent in model.named_modules():
        for child, module in parent.named_children():
            is_read = child in _READ_BY_PARENT and _READ_BY_PARENT[child] in type(parent).__name__
            # Exactly nn.Linear: subclasses (say, of nn.MultiheadAttention) are read by their parents, not called.
            if (type(module) is nn.Linear or is_transposed(module)) and not is_read:
                found[f"{parent_name}.{child}" if parent_name else child] = module
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def _has_suffix(name: str, suffix: str) -> bool:
    """Whether a name ends with a suffix of whole parts; the number of an expert may be left out."""
    names = [name, name.rpartition(".")[0]] if experts.is_expert(name) else [name]
    return any(n == suffix or n.endswith("." + suffix) for n in names)


def blocks(model: nn.Module, adapted: Collection[str]) -> dict[str, nn.Module]:
    """The blocks of a model by name: items of its outermost lists of modules, of lists of lists the inner ones', that
    have matrices inside that are `adapted` (names of modules)."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or is_in(name, found):
            continue
        items = {f"{name}.{key}".removeprefix("."): child for key, child in module.named_children()}
        if any(isinstance(child, nn.ModuleList) for child in items.values()):
            continue
        if any(is_in(each, items) for each in adapted):
            found |= items
    return found


def is_in(name: str, modules: Collection[str]) -> bool:
    """Whether a name is of something inside one of `modules`, or of one of these."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def unpack_experts(model: nn.Module, target_modules: str | list[str]) -> None:
    """Makes linears of batched experts that `target_modules` asks for (see `experts`); others stay as they are."""
    experts.unpack(model, lambda name: _is_wanted(name, target_modules))


def wanted_experts(model: nn.Module, target_modules: str | list[str]) -> list[str]:
    """Names of the batched experts that a conversion would adapt; nothing is changed."""
    return [name for name in experts.batched_names(model) if _is_wanted(name, target_modules)]


def _is_wanted(name: str, target_modules: str | list[str]) -> bool:
    if isinstance(target_modules, list):
        return any(_has_suffix(name, suffix) for suffix in target_modules)
    return target_modules == "all-linear" or _pattern(target_modules).fullmatch(name) is not None


def _pattern(target_modules: str) -> re.Pattern[str]:
    try:
        return re.compile(target_modules)
    except re.error as error:
        raise ValueError(f"loqt.target_modules={target_modules!r} is not a regular expression: {error}") from None


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


def target_linears(model: nn.Module, target_modules: str | list[str]) -> dict[str, Any]:
    """The linears to adapt (`nn.Linear`, or Conv1D of GPT-2), by name; batched experts have to be unpacked before.

    `target_modules` is "all-linear" (every linear but the output head or `task_head`, those whose weight is shared,
    those whose weight is frozen, and those whose weight is one row or column, such as the gate of a shared expert,
    which has no subspace to find), a regular expression matched against the whole module name, or a list of name
    suffixes.

    Raises ValueError, listing the names there are, if nothing matches, a listed suffix matches nothing, or the output
    head, a shared or a frozen weight is asked for.
    """
    head, around = output_head(model), task_head(model)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    linears: dict[str, Any] = _linears(model)
    allowed = {
        n: m
        for n, m in linears.items()
        if m is not head and n not in around and owners[id(m.weight)] == 1 and m.weight.requires_grad
    }
    known = ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in allowed})) or "none"
    if target_modules == "all-linear":
        chosen = {n: m for n, m in allowed.items() if min(matrix_shape(m)) > 1}
    elif isinstance(target_modules, str):
        pattern = _pattern(target_modules)
        chosen = {n: m for n, m in linears.items() if pattern.fullmatch(n)}
    else:
        chosen = {}
        for suffix in target_modules:
            found = {n: m for n, m in linears.items() if _has_suffix(n, suffix)}
            if not found:
                raise ValueError(f"loqt.target_modules: {suffix!r} matches no linear layer; there are: {known}")
            chosen |= found
    if not chosen:
        own = sorted(
            {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear}
        )
        beside = f" (linears with a forward of their own, such as {own[0]}, are not adapted)" if own else ""
        raise ValueError(f"loqt.target_modules={target_modules!r} matches no linear layer; there are: {known}{beside}")
    refused = sorted(set(chosen) - set(allowed))
    if refused:
        raise ValueError(
            f"loqt.target_modules={target_modules!r} matches {', '.join(refused)}: the output head and shared weights "
            f"are trained in full, and weights that need no gradient stay as they are; choose among: {known}"
        )
    return {name: module for name, module in linears.items() if name in chosen}


def check_rank(linears: dict[str, Any], rank: int) -> None:
    """Raises ValueError, naming the narrowest layer, if `rank` is above the smaller side of any of them."""
    name, shape = min(((n, matrix_shape(m)) for n, m in linears.items()), key=lambda item: min(item[1]))
    smallest = min(shape)
    if rank > smallest:
        raise ValueError(
            f"loqt.rank={rank} is larger than the smaller side ({smallest}) of {name} "
            f"({shape[0]}, {shape[1]}); use a rank of at most {smallest}, "
            f"or leave that layer out of loqt.target_modules"
        )


def tie_weights(model: nn.Module) -> None:
    """Points shared parameters at one tensor again, after they were replaced one by one."""
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()


def tied_head(model: nn.Module) -> nn.Module | None:
    """The output head, if it has no weight of its own (a bias it may have)."""
    config = getattr(model, "config", None)
    return output_head(model) if getattr(config, "tie_word_embeddings", False) else None


def own_parameters(module: nn.Module, tied: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """(short name, parameter) of a module's own, without the weight of a tied head, which is the embedding's."""
    own = module.named_parameters(recurse=False)
    return [(short, parameter) for short, parameter in own if module is not tied or short != "weight"]
