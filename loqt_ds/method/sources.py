"""Where full-precision weights come from, one module at a time: the model's own initializer, or safetensors files.

Because a weight is drawn from (seed, module name) or read from a file, it can be had again: `WeightSource.weight(name)`
is what the first re-initialization calls, so that B compensates the error of the first quantization too
(ALGORITHM.md, re-initialization, step 1).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loqt_ds.core.subspace import layer_seed
from loqt_ds.method import experts
from loqt_ds.method.experts import Stored
from loqt_ds.method.structure import is_transposed, matrix_shape, own_parameters, task_head, tied_head


class WeightSource(Protocol):
    """Where full-precision tensors come from, one at a time, as often as asked."""

    def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """The module's own parameters by their short names, float32 or as stored, on the CPU; of files also its
        persistent buffers, which nobody draws."""

    def weight(self, name: str) -> Tensor:
        """The weight of the linear `name` in its original precision, as float32 (out, in), on the CPU."""


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(short name, buffer) of those of a module's own buffers that belong to its state, and so to its files."""
    kept = module._non_persistent_buffers_set
    return [(short, buffer) for short, buffer in module.named_buffers(recurse=False) if short not in kept]


class _Initializer:
    """Draws a module's parameters with the model's own initializer, from (seed, module name) alone."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        from transformers import PreTrainedModel

        self._model, self._seed = model, seed
        self._shapes = {n: matrix_shape(m) for n, m in model.named_modules() if type(m) is nn.Linear}
        # A model of transformers may draw a linear's weight again when the module around it is initialized (GPT-2's
        # residual projections, Mamba's steps): a copy without weights is kept for that, for no other weight is touched.
        has_own = any(isinstance(module, PreTrainedModel) for module in model.modules())
        self._empty = copy.deepcopy(model) if has_own else None

    def _initialize(self, name: str, module: nn.Module) -> None:
        """Draws a module's parameters in place, as the transformers model around it does, or by its own
        `reset_parameters`."""
        from transformers import PreTrainedModel

        parts = name.split(".")
        for end in range(len(parts), -1, -1):
            model = self._model if self._empty is None else self._empty
            around = model.get_submodule(".".join(parts[:end]))
            if isinstance(around, PreTrainedModel):
                around._init_weights(module)  # type: ignore[operator]
                if end < len(parts) and self._empty is not None:
                    around._init_weights(self._empty.get_submodule(".".join(parts[:-1])))  # type: ignore[operator]
                return
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has parameters and no reset_parameters() to draw "
                "them with; give a directory of weights"
            )
        reset()

    def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        module = module if self._empty is None else self._empty.get_submodule(name)
        empties = dict(module.named_parameters(recurse=False))
        if not empties:
            return {}
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
        if self._empty is not None:
            module = self._empty.get_submodule(name)
            weight = self.module(name, module)["weight"]
            return weight.t() if is_transposed(module) else weight
        out_features, in_features = self._shapes[name]
        with torch.device("meta"):
            blank = nn.Linear(in_features, out_features)  # the bias, if any, is drawn after the weight
        return self.module(name, blank)["weight"]


_NUM_COMPARED = 256  # rows of two matrices that are the same, or not

HEADS = r"^(lm_head|cls|classifier|score|qa_outputs|vocab_\w+|pre_classifier|lm_predictions|\w+_predictions)\."
"""Heads of tasks as models of transformers call them, beside a base model that may be saved without its prefix."""


class _CheckpointFiles:
    """Reads tensors, one at a time, from one or several safetensors files.

    With `seed`, modules of the model's `task_head` that the files have nothing of, or in another shape (for another
    number of classes), are drawn by the model's own initializer, and `drawn` names them. What the files hold of another
    task, such as its head or a pooler that the model lacks, is left alone, and `left_out` names it.
    """

    def __init__(self, model: nn.Module, directory: Path, option: str, seed: int | None) -> None:
        what = f"{option}={str(directory)!r}"
        self._files = dict(_tensor_files(directory, option))
        self._option = option
        tied = tied_head(model)
        around = task_head(model) if seed is not None else set()
        shapes: dict[str, torch.Size] = {}
        same: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for short, parameter in own_parameters(module, tied):
                full = f"{name}.{short}" if name else short
                shapes[full] = parameter.shape
                same.setdefault(id(parameter), []).append(full)
            for short, buffer in persistent_buffers(module):
                full = f"{name}.{short}" if name else short
                shapes[full] = buffer.shape
                same[id(buffer)] = [full]
        self._transposed = {name for name, module in model.named_modules() if is_transposed(module)}
        self._renamed = _names_in_model(model, self._files)
        self._stored = self._find(same.values(), shapes, getattr(model, "base_model_prefix", ""))
        missing = sorted(set(shapes) - set(self._stored))
        # A head is the task's as a whole: a classifier of another one with the same name is not half of it.
        lacking = {name.rpartition(".")[0] for name in missing}
        for name, place in self._stored.items():
            if name.rpartition(".")[0] in around and place.shape(self._shape) != tuple(shapes[name]):
                lacking.add(name.rpartition(".")[0])
        self.drawn = sorted(name for name in lacking if name in around)
        self._initializer = None if seed is None else _Initializer(model, seed)
        wanted = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in self.drawn}
        missing = sorted(set(wanted) - set(self._stored))
        if missing:
            raise ValueError(
                f"{what} has no tensor {missing[0]} (and {len(missing) - 1} others of "
                f"{len(shapes)} are missing): its config.json describes another model than its files hold"
            )
        read = {key for place in self._stored.values() for key in place.names}
        extra, others = self._extra(model, read, has_head=tied is None)
        self.left_out = sorted({name.rpartition(".")[0] for name in others})
        if extra:
            raise ValueError(
                f"{what} holds {len(extra)} tensors that {type(model).__name__} has no place "
                f"for, the first being {extra[0]}; give the directory of a full-precision checkpoint of that model"
            )
        for name, shape in wanted.items():
            there = self._stored[name].shape(self._shape)
            if there != tuple(shape):
                raise ValueError(f"{what}: {name} is {there}, the model's is {tuple(shape)}")
        if tied is not None:
            self._check_tied(model, tied, what)

    def _check_tied(self, model: nn.Module, tied: nn.Module, what: str) -> None:
        """Refuses files with a head of its own for a model whose head is its embedding."""
        names = {id(module): name for name, module in model.named_modules()}
        head, embedding = (f"{names.get(id(m), '')}.weight" for m in (tied, model.get_input_embeddings()))  # type: ignore[operator]
        key = self._renamed.get(head, head)
        if key not in self._files or embedding not in self._stored or len(self._stored[embedding].names) != 1:
            return
        (of_embedding,) = self._stored[embedding].names
        own, shared = self._some_rows(key), self._some_rows(of_embedding)
        narrow = min(own.dtype, shared.dtype, key=lambda dtype: dtype.itemsize)
        if self._shape(key) != self._shape(of_embedding) or not torch.equal(own.to(narrow), shared.to(narrow)):
            raise ValueError(
                f"{what} holds {key}, which is not {embedding}, and its config.json says tie_word_embeddings=true, so "
                f"that {key} would not be read; set that to false there if {key} was trained, or remove the tensor"
            )

    def _find(self, groups: Iterable[list[str]], shapes: dict[str, torch.Size], prefix: str) -> dict[str, Stored]:
        """Name of each parameter -> where it is in the files. One that several modules share is there under one of its
        names, or under all; a base model is saved without the prefix that it has inside of others; old files say gamma
        and beta for the weight and bias of a norm; transformers has renamed modules since files were written; for
        experts see `experts.spellings`."""

        def spellings(name: str) -> Iterator[Stored]:
            for start in (name, name.removeprefix(f"{prefix}.")):
                yield Stored(((start,),))
                for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                    if start.endswith(new):
                        yield Stored(((start.removesuffix(new) + old,),))
                yield from experts.spellings(start, shapes[name])

        def in_files(name: str) -> str:
            return name if name in self._files else self._renamed.get(name, name)

        def find(name: str) -> Stored | None:
            places = (place.under(in_files) for place in spellings(name))
            return next((place for place in places if all(key in self._files for key in place.names)), None)

        stored: dict[str, Stored] = {}
        for names in groups:
            found = {name: find(name) for name in names}
            there = [place for place in found.values() if place is not None]
            stored |= {name: place or there[0] for name, place in found.items() if there}
        return stored

    def _extra(self, model: nn.Module, read: set[str], *, has_head: bool) -> tuple[list[str], list[str]]:
        """Tensors of the files that are not read: (those that nobody knows, those of other tasks)."""
        patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
        patterns += [r".*rotary_emb\.inv_freq", r".*\.position_ids"]
        if self._transposed:
            patterns.append(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias")  # masks that old files of GPT-2 hold
        if not has_head:
            patterns.append(r"lm_head\.weight")
        base = f"{getattr(model, 'base_model_prefix', '')}."
        of_others = [r"^cls\.seq_relationship\.", r"^sop_classifier\."]  # of pairs of sentences, in pre-training
        if not any("pooler" in name.split(".") for name, _ in model.named_modules()):
            of_others.append(r"(^|\.)pooler\.")
        if self._initializer is not None:
            of_others.append(HEADS)
            if any(name.startswith(base) for name in self._files):
                of_others.append(rf"^(?!{re.escape(base)})")
        dispensable, other = re.compile("|".join(patterns)), re.compile("|".join(of_others))
        left = [name for name in sorted(set(self._files) - read) if not dispensable.search(name)]
        return [n for n in left if not other.search(n)], [n for n in left if other.search(n)]

    def _shape(self, key: str) -> list[int]:
        with _opened(self._files[key], self._option) as file:
            return file.get_slice(key).get_shape()

    def _tensor(self, key: str, row: int | None) -> Tensor:
        with _opened(self._files[key], self._option) as file:
            return file.get_tensor(key) if row is None else file.get_slice(key)[row]

    def _some_rows(self, key: str) -> Tensor:
        """Rows from the first to the last of a matrix, `_NUM_COMPARED` at most."""
        num_rows = self._shape(key)[0]
        rows = sorted({round(place) for place in torch.linspace(0, num_rows - 1, _NUM_COMPARED).tolist()})
        with _opened(self._files[key], self._option) as file:
            stored = file.get_slice(key)
            return torch.stack([stored[row] for row in rows])

    def _read(self, name: str) -> Tensor:
        return self._stored[name].read(self._tensor)

    def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        if name in self.drawn:
            assert self._initializer is not None
            return self._initializer.module(name, module)
        prefix = f"{name}." if name else ""
        own = [*module.named_parameters(recurse=False), *persistent_buffers(module)]
        return {short: self._read(prefix + short) for short, _ in own if prefix + short in self._stored}

    def weight(self, name: str) -> Tensor:
        weight = self._read(f"{name}.weight").float()
        return weight.t() if name in self._transposed else weight


def _names_in_model(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Name in the model -> name in the files, of tensors whose names transformers translates when it loads them."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return {}
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names[name] = key
    return names


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
