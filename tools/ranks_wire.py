"""What processes exchange: each exchange of torch.distributed counted as it ends in a method of `ProcessGroup`, by kind
and by purpose (who called), beside formulas from shapes alone.

The *payload* of an exchange is the whole tensor it is about: that of an all_reduce, reduce or broadcast, what goes into
a reduce_scatter, all ranks' parts of an all_gather, gather or scatter. What a rank sends for a payload S depends on the
backend; at best, averaged over the N ranks of the exchange, 2 S (N − 1)/N for an all_reduce, S (N − 1)/N² for a gather
or scatter, where one rank has all, and S (N − 1)/N for the others (a ring; for a tree that is the mean, its busiest
rank sends more).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks_cases import STEPS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PURPOSES = {
    "gradients": "gradients",
    "parameters": "parameters: updated (ZeRO), gathered (FSDP2)",
    "norms": "norm and overflow",
    "sums": "gradients or sketches, to their owners",
    "columns": "columns a sketch is taken with",
    "masters": "B's masters, to their owners",
    "moments": "B's moments, to their owners (project)",
    "collected": "W and P in shards, to their owners",
    "w": "W, packed",
    "p": "P, packed",
    "scattered": "W and P, back to the shards",
    "factors": "B in fp32 (and projected moments)",
    "checksum": "checksum",
    "messages": "reports and counts",
    "other": "not recognized",
}
SMALL = ("norms", "checksum", "messages")  # not in the formulas
KINDS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "barrier": "barrier",
}
# (file, function) -> purpose; the innermost caller that is here decides
CALLERS = {
    ("utils.py", "all_gather_into_tensor_dp_groups"): "parameters",
    ("utils.py", "all_gather_dp_groups"): "parameters",
    ("stage_1_and_2.py", "average_tensor"): "gradients",
    ("stage_1_and_2.py", "reduce_ipg_grads"): "gradients",
    ("stage_1_and_2.py", "get_grad_norm_direct"): "norms",
    ("stage_1_and_2.py", "complete_grad_norm_calculation_for_cpu_offload"): "norms",
    ("stage_1_and_2.py", "scaled_global_norm"): "norms",
    ("stage_1_and_2.py", "has_overflow"): "norms",
    ("stage_1_and_2.py", "_average_expert_grad_norms"): "norms",
    ("_fsdp_collectives.py", "foreach_reduce"): "gradients",
    ("_fsdp_collectives.py", "foreach_all_gather"): "parameters",
    ("fsdp.py", "_update_all"): "norms",
    ("fsdp.py", "collect"): "collected",
    ("fsdp.py", "install"): "scattered",
    ("shards.py", "read"): "masters",
    ("shards.py", "moment"): "moments",
    ("controller.py", "_start_reductions"): "sums",
    ("controller.py", "_columns"): "columns",
    ("controller.py", "_install"): "factors",
    ("state.py", "check_replicas"): "checksum",
    ("ranks.py", "sum_numbers"): "messages",
    ("ranks.py", "gather_objects"): "messages",
}


# ---------------------------------------------------------------- counting exchanges


def num_bytes(value: Any) -> int:
    """Of a tensor, or of all tensors in nested lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(num_bytes, value)) if isinstance(value, list | tuple) else 0


def payload(kind: str, arguments: Sequence[Any], num_ranks: int) -> int:
    """Of an exchange between `num_ranks`: the larger of what goes in and what comes out; where one rank alone has all,
    as many as each has."""
    if kind in ("gather", "scatter"):
        return num_ranks * num_bytes(arguments[1 if kind == "gather" else 0])
    return max(map(num_bytes, arguments), default=0)


def sent(kind: str, size: int, num_ranks: int) -> float:
    """Bytes that a rank sends on average for a payload, by the best algorithm there is."""
    factor = {"all_reduce": 2.0, "gather": 1 / num_ranks, "scatter": 1 / num_ranks}.get(kind, 1.0)
    return factor * size * (num_ranks - 1) / num_ranks


def sent_in(step: dict[str, Any], num_ranks: int) -> float:
    """Bytes a rank sends at least in a step, all of whose exchanges are between all ranks."""
    kinds = [item for kinds in step["traffic"].values() for item in kinds.items()]
    return sum(sent(kind, size, num_ranks) for kind, (_, size) in kinds)


def purpose_of_caller() -> str:
    """Why an exchange takes place, from the functions that are being executed."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = CALLERS.get((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
        if found is not None:
            return found
        frame = frame.f_back
    return "other"


class WireCounter:
    """Adds up calls and payload bytes of all exchanges of this process by (purpose, kind), and what it sends at least,
    while `counting`.

    Args:
        frozen: storage address -> purpose, of the buffers that hold W and P.
        on_gradients: called when gradients are about to be exchanged.
    """

    def __init__(self, frozen: dict[int, str] | None = None, on_gradients: Callable[[], None] | None = None) -> None:
        self.frozen, self._on_gradients = frozen or {}, on_gradients
        self.counts: dict[tuple[str, str], list[int]] = {}
        self.sent = 0.0

    def _add(self, kind: str, arguments: Sequence[Any], num_ranks: int) -> None:
        purpose = purpose_of_caller()
        if purpose == "gradients" and self._on_gradients is not None:
            self._on_gradients()
        if purpose == "factors":
            tensor = arguments[0][0] if isinstance(arguments[0], list | tuple) else arguments[0]
            purpose = self.frozen.get(tensor.untyped_storage().data_ptr(), purpose)
        entry = self.counts.setdefault((purpose, kind), [0, 0])
        size = payload(kind, arguments[:2], num_ranks)
        entry[0] += 1
        entry[1] += size
        self.sent += sent(kind, size, num_ranks)

    def _wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(group: Any, *arguments: Any, **options: Any) -> Any:
            self._add(KINDS[name], [*arguments, *options.values()] or [None], group.size())
            return method(group, *arguments, **options)

        return counted

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what happens inside."""
        # As they stand in the class: what getattr returns would no longer bind when put back.
        originals = {name: method for name, method in vars(dist.ProcessGroup).items() if name in KINDS}
        for name in originals:
            setattr(dist.ProcessGroup, name, self._wrap(name, getattr(dist.ProcessGroup, name)))
        try:
            yield
        finally:
            for name, method in originals.items():
                setattr(dist.ProcessGroup, name, method)

    def by_purpose(self) -> dict[str, dict[str, list[int]]]:
        """purpose -> kind -> [calls, payload bytes]."""
        found: dict[str, dict[str, list[int]]] = {}
        for (purpose, kind), entry in sorted(self.counts.items()):
            found.setdefault(purpose, {})[kind] = list(entry)
        return found


class DispatchCounter(TorchDispatchMode):
    """A second counter of the same, where torch hands operators to backends: [calls, payload bytes].

    `num_ranks`: of gathers and scatters.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        super().__init__()
        self.total, self._num_ranks = [0, 0], num_ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func._schema.name.removeprefix("c10d::").removesuffix("_")
        if func.namespace == "c10d" and (size := payload(kind, args[:2], self._num_ranks)):
            self.total[0] += 1
            self.total[1] += size
        return func(*args, **(kwargs or {}))


def loopback_bytes() -> int:
    """Sent so far over this machine's loopback interface, headers included; -1 where that is not known."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return -1
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), -1)


# ---------------------------------------------------------------- formulas, from shapes alone


def formula(model: nn.Module, config: Any, division: Any) -> dict[str, dict[str, int]]:
    """Payload bytes of each of STEPS by purpose; small messages apart. `model` is on the meta device; `division`: how
    ranks divide it (`loqt_ds.memory.Division`)."""
    from loqt_ds.method.controller import CARRIED
    from loqt_ds.method.conversion import loqt_layers

    if division.world_size == 1:
        return {name: {} for name in STEPS}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    ordinary = {"gradients": weights, "parameters": weights}
    # Stage 2 and FSDP2 sum the gradients of each micro-batch, stage 1 those of the step.
    accumulated = {"gradients": 2 * weights if division.gradients else weights, "parameters": weights}
    if division.layout == "rows":
        ordinary = of_rows(model, config, division)
        accumulated = {name: 2 * size for name, size in ordinary.items()}
    first, later = dict.fromkeys(PURPOSES, 0) | ordinary, dict.fromkeys(PURPOSES, 0) | ordinary
    for layer in loqt_layers(model).values():
        for step in (first, later):
            _add_reinit(step, layer, config, division)
        num = 4 * layer.factor_length * layer.rank
        later["masters"] += num
        if config.loqt.optimizer_state in CARRIED:
            later["moments"] += 2 * num
            later["factors"] += 2 * num
    drop = {*SMALL, "other"}
    return {
        "ordinary": ordinary,
        "accumulated": accumulated,
        "first": {name: size for name, size in first.items() if name not in drop},
        "reinit": {name: size for name, size in later.items() if name not in drop},
    }


def _add_reinit(step: dict[str, int], layer: Any, config: Any, division: Any) -> None:
    """What the re-initialization of a layer exchanges, masters and moments apart."""
    from loqt_ds.core.quantization import packed_layout
    from loqt_ds.memory.division import bytes_share
    from loqt_ds.method.controller import NUM_PROBES, POWER_ITERATIONS, sketch_columns, subspace_method
    from loqt_ds.method.description import training_dtype

    k, length = layer.basis_shape[0], layer.factor_length
    groups = division.world_size // division.parts
    width = training_dtype(config).itemsize
    num_columns = sketch_columns(layer, config.loqt.sketch_oversampling)
    if subspace_method(layer, config.loqt.subspace, division.world_size) == "sketch":
        step["sums"] += width * k * (num_columns + NUM_PROBES)
        # each power iteration sums A Ω for all, sums AᵀA Ω to the owner, and sends Ω to all
        step["columns"] += POWER_ITERATIONS * width * num_columns * (k + 2 * length)
    else:
        step["sums"] += 4 * k * length
    step["factors"] += 4 * length * layer.rank
    for name, shape, spec in (("w", layer.weight_shape, layer.spec_w), ("p", layer.basis_shape, layer.spec_p)):
        for num in packed_layout(shape, spec).values():
            if not division.frozen:
                step[name] += num
                continue
            part = bytes_share(num, parts=division.parts, word=width)
            # Averaged over ranks: the owner's group collects, and scatters; others get each part from it.
            step["collected"] += division.parts * part // groups
            step["scattered"] += division.parts * part // groups + (part if groups > 1 else 0)


def of_rows(model: nn.Module, config: Any, division: Any) -> dict[str, int]:
    """FSDP2, of a micro-batch: gradients are scattered in float32 (and under hybrid sharding a rank's part is summed
    over groups); a block is gathered for its forward and again for its backward, the root once, filled up to equal
    parts."""
    from loqt_ds.core.quantization import packed_layout
    from loqt_ds.memory.division import bytes_share, rows_share
    from loqt_ds.method.conversion import loqt_layers
    from loqt_ds.method.description import training_dtype
    from loqt_ds.method.structure import blocks

    if division.parts == 1:
        return {"gradients": 0, "parameters": 0}
    adapted = list(loqt_layers(model)) or [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    parts, width = division.parts, training_dtype(config).itemsize
    inside: set[int] = set()
    found = {"gradients": 0, "parameters": 0}
    for block in [*blocks(model, adapted).values(), model]:
        own = [p for p in block.parameters() if id(p) not in inside]
        inside |= set(map(id, own))
        num = sum(rows_share(p.shape, parts) for p in own)
        bytes_packed = 0
        if division.frozen and block is not model:
            layouts = [
                packed_layout(*of).values()
                for layer in loqt_layers(block).values()
                for of in ((layer.weight_shape, layer.spec_w), (layer.basis_shape, layer.spec_p))
            ]
            bytes_packed = sum(bytes_share(size, parts=parts, word=width) for sizes in layouts for size in sizes)
        times = 1 if block is model or division.keeps_gathered else 2
        found["parameters"] += times * parts * (width * num + bytes_packed)
        found["gradients"] += 4 * num * (parts + (1 if division.world_size > parts else 0))
    return found
