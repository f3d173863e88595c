"""What processes keep: tensors that are alive, by what they are, and the most that is alive at once in a step; and what
the planner counts of both.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KEPT = {
    "weights": "trained weights",
    "w": "W, packed",
    "p": "P, packed",
    "masters": "masters",
    "moments": "moments",
    "gradients": "gradients",
}
PARTS_OF_RUN = ("start", "step", "re-initialization")


def planned(model: nn.Module, description: Any, config: Any, division: Any) -> dict[str, dict[str, float]]:
    """What the planner says that the fullest rank keeps ("kept"), and needs at most in each part of a run ("peaks"; of
    LoQT). `model`: dense or converted, on the meta device."""
    from loqt_ds.memory import Facts, plan
    from loqt_ds.memory.division import kept
    from loqt_ds.method import head
    from loqt_ds.method.conversion import loqt_layers
    from loqt_ds.method.description import training_dtype
    from loqt_ds.method.structure import blocks

    layers = loqt_layers(model)
    adapted = list(layers) or [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parameters = dict(model.named_parameters())
    factors = {name: parameter for name, parameter in parameters.items() if name.removesuffix(".B") in layers}
    facts = Facts(
        model=model,
        description=description,
        dtype=training_dtype(config),
        layers=list(layers.values()),
        blocks=list(blocks(model, adapted).values()),
        factors=factors,
        others={name: parameter for name, parameter in parameters.items() if name not in factors},
        lean=frozenset(),
        head=head.install(model),
        notes=[],
    )
    entries = kept(config, facts, division)
    found: dict[str, float] = {
        "weights": entries["factors_b"] + entries["full_rank_parameters"],
        "w": entries["weights_w"],
        "p": entries["projections_p"],
        **{name: entries[name] for name in ("masters", "moments", "gradients")},
    }
    if not layers:
        return {"kept": found, "peaks": {}}
    whole = plan(config, division=division, facts=facts)
    unseen = ("context", "update_workspace")  # of bitsandbytes' operation
    whole.entries |= dict.fromkeys(unseen, 0)
    parts = PARTS_OF_RUN if division.layout == "rows" else PARTS_OF_RUN[1:]  # DeepSpeed makes its state at the start
    return {"kept": found, "peaks": {part: whole.peak_bytes(part) for part in parts}}


# ---------------------------------------------------------------- what is alive


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of each storage behind some tensors; of a sharded one, of this rank's part."""
    found = {}
    for tensor in tensors:
        tensor = getattr(tensor, "_local_tensor", tensor)
        if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def nested(value: Any) -> Iterator[Any]:
    """The leaves of lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from nested(item)
    else:
        yield value


def all_tensors() -> list[Any]:
    """That Python knows."""
    return [item for item in gc.get_objects() if issubclass(type(item), Tensor)]


def network_of(engine: Any) -> nn.Module:
    network: nn.Module = engine.module if hasattr(engine, "module") else engine.network
    return network


def packed_tensors(engine: Any) -> dict[str, list[Tensor]]:
    """The bytes of all W ("w") and all P ("p")."""
    from loqt_ds.method.conversion import loqt_layers

    layers = loqt_layers(network_of(engine)).values()
    tensors = [item for layer in layers for item in layer.packed_tensors().items()]
    return {kind: [tensor for name, tensor in tensors if name.startswith(f"{kind}_")] for kind in ("w", "p")}


def buckets(engine: Any) -> list[Any]:
    """What ZeRO copies gradients into before it sums them: `reduce_bucket_size` elements, however few there are."""
    if not hasattr(engine, "optimizer"):
        return []
    return [leaf for bucket in engine.optimizer.ipg_buckets.values() for leaf in nested(bucket.buffer)]


def _gradients(engine: Any) -> list[Any]:
    """Gradients of parameters, and those accumulated; buckets apart."""
    of_parameters = [parameter.grad for parameter in network_of(engine).parameters()]
    if not hasattr(engine, "optimizer"):
        return of_parameters
    zero = engine.optimizer
    return [*of_parameters, *nested(zero.averaged_gradients), *nested(zero.all_grad_tensors)]


def _optimizers(engine: Any) -> list[Any]:
    """Those that keep moments."""
    from loqt_ds.optim import RoundingAdam

    if not hasattr(engine, "optimizer"):
        return [item.optimizer for item in engine._optimizers.values()]
    inner = engine.optimizer.optimizer
    if isinstance(inner, RoundingAdam):
        return [inner.item(t, group).optimizer for group in inner.param_groups for t in group["params"]]
    return [inner]


def census(engine: Any, before: set[int]) -> dict[str, int]:
    """Bytes of live tensors by what they are, each storage once; `before`: those that are not the engine's."""
    zero = getattr(engine, "optimizer", None)
    states = [state for optimizer in _optimizers(engine) for state in optimizer.state.values()]
    parts: dict[str, list[Any]] = {
        "weights": [parameter for parameter in network_of(engine).parameters() if parameter.requires_grad],
        **packed_tensors(engine),
        "masters": [] if zero is None else list(nested(zero.single_partition_of_fp32_groups)),
        # Tables of codes are the same for all.
        "moments": [leaf for state in states for key, leaf in state.items() if not key.startswith("qmap")],
        "bucket": buckets(engine),
        "gradients": _gradients(engine),
        "other": all_tensors(),
    }
    seen = set(before)
    found = {}
    for name, tensors in parts.items():
        own = {address: size for address, size in storages(tensors).items() if address not in seen}
        seen |= set(own)
        found[name] = sum(own.values())
    return found


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have returned since it was entered and that somebody holds; kernels' own
    temporaries are not seen. FSDP empties storages that it will fill again: its functions for that are wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> LiveBytes:
        from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

        for name in ("alloc_storage", "free_storage"):
            self._originals[name] = getattr(_fsdp_param, name)
            for module in (_fsdp_param, _fsdp_param_group):
                if hasattr(module, name):
                    setattr(module, name, self._resizing(self._originals[name]))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

        super().__exit__(*error)
        for name, original in self._originals.items():
            for module in (_fsdp_param, _fsdp_param_group):
                if hasattr(module, name):
                    setattr(module, name, original)

    def _resizing(self, resize: Any) -> Any:
        def resized(tensor: Tensor) -> None:
            resize(tensor)
            self._see(tensor)

        return resized

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._gone, key)
        self.now += storage.nbytes() - self._sizes[key]
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def restart(self) -> None:
        """Lets the peak be that of what follows."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a sharded one, this rank's
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._see(tensor)
        return output
