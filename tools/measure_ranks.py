"""What several ranks exchange in a step, and what each of them keeps: counted, beside the formulas.

    python tools/measure_ranks.py                       # two shapes, 1, 2 and 4 processes on this machine, no data

Every case trains four steps on random tokens under ZeRO, in real processes over gloo: the first initialization, an
ordinary step, a re-initialization and an ordinary step of two micro-batches; so does the dense model of the same shape
with the same optimizer.

Bytes: each exchange of torch.distributed ends in a method of `ProcessGroup`; these are wrapped, and the size of what
they are given is added up by kind and by purpose (who called). The *payload* of an exchange is the whole tensor it is
about: the tensor of an all_reduce, reduce or broadcast, the gathered result of an all_gather. What a rank sends for a
payload S depends on the backend; at best, averaged over N ranks, 2 S (N − 1)/N for an all_reduce and S (N − 1)/N for
the others (a ring; for a tree that is the mean, its busiest rank sends more). A second counter sits in torch's
dispatcher.

Memory: tensors that are alive between the two micro-batches, each storage once.

Everything is per rank. Results go to benchmarks/results/ranks; options after `--` are overrides of all cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks/results/ranks"
SHAPES = ("llama_9m:32", "llama_60m:128")
RECIPES = ("llama_130m", "llama_350m", "llama_1b", "pretrain_7b_24gb")  # by the formulas only
NUM_TOKENS = 16  # of a micro-batch; no byte counted here depends on it, or on loqt.compensation_steps
STEPS = ("first", "ordinary", "reinit", "accumulated")
OPTIONS = """
    loqt.schedule=static loqt.interval=2 loqt.compensation_steps=1 optim.name=adamw8bit train.device=cpu
    train.micro_batch_size=1 train.max_steps=100 data.sequence_length=16
"""

PURPOSES = {
    "gradients": "ZeRO: gradients",
    "parameters": "ZeRO: updated parameters",
    "norms": "ZeRO: norm and overflow",
    "sums": "gradients or sketches, to their owners",
    "columns": "columns a sketch is taken with",
    "masters": "B's masters, to their owners",
    "moments": "B's moments, to their owners (project)",
    "w": "W, packed",
    "p": "P, packed",
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


def payload(arguments: Iterable[Any]) -> int:
    """Of an exchange: the larger of what goes in and what comes out."""
    return max(map(num_bytes, arguments), default=0)


def sent(kind: str, size: int, world_size: int) -> float:
    """Bytes that a rank sends on average for a payload, by the best algorithm there is."""
    return (2 if kind == "all_reduce" else 1) * size * (world_size - 1) / world_size


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
    """Adds up calls and payload bytes of all exchanges of this process by (purpose, kind), while `counting`.

    Args:
        frozen: storage address -> purpose, of the buffers that hold W and P.
        on_gradients: called when gradients are about to be exchanged.
    """

    def __init__(self, frozen: dict[int, str] | None = None, on_gradients: Callable[[], None] | None = None) -> None:
        self.frozen, self._on_gradients = frozen or {}, on_gradients
        self.counts: dict[tuple[str, str], list[int]] = {}

    def _add(self, kind: str, arguments: Sequence[Any]) -> None:
        purpose = purpose_of_caller()
        if purpose == "gradients" and self._on_gradients is not None:
            self._on_gradients()
        if purpose == "factors":
            tensor = arguments[0][0] if isinstance(arguments[0], list | tuple) else arguments[0]
            purpose = self.frozen.get(tensor.untyped_storage().data_ptr(), purpose)
        entry = self.counts.setdefault((purpose, kind), [0, 0])
        entry[0] += 1
        entry[1] += payload(arguments[:2])

    def _wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(group: Any, *arguments: Any, **options: Any) -> Any:
            self._add(KINDS[name], [*arguments, *options.values()] or [None])
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
    """A second counter of the same, where torch hands operators to backends: [calls, payload bytes]."""

    def __init__(self) -> None:
        super().__init__()
        self.total = [0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (size := payload(args[:2])):
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


def formula(model: nn.Module, config: Any, *, stage: int = 2) -> dict[str, dict[str, int]]:
    """Payload bytes of each of STEPS by purpose; small messages apart. `model` may be on the meta device."""
    from loqt_ds.core.quantization import packed_layout
    from loqt_ds.method.controller import CARRIED, NUM_PROBES, POWER_ITERATIONS, subspace_method
    from loqt_ds.method.conversion import loqt_layers

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    ordinary = {"gradients": weights, "parameters": weights}
    # Stage 2 sums the gradients of each micro-batch, stage 1 those of the step.
    accumulated = {"gradients": 2 * weights if stage == 2 else weights, "parameters": weights}
    first, later = dict.fromkeys(PURPOSES, 0) | ordinary, dict.fromkeys(PURPOSES, 0) | ordinary
    project = config.loqt.optimizer_state in CARRIED
    for layer in loqt_layers(model).values():
        k, length, r = layer.basis_shape[0], layer.factor_length, layer.rank
        width = 2 if layer.B.dtype == torch.bfloat16 else 4
        sketched = subspace_method(layer, config.loqt.subspace) == "sketch"
        num_columns = min(k, length, r + config.loqt.sketch_oversampling)
        for step in (first, later):
            step["sums"] += width * k * (num_columns + NUM_PROBES) if sketched else 4 * k * length
            if sketched:  # each power iteration sums A Ω for all, sums AᵀA Ω to the owner, and sends Ω to all
                step["columns"] += POWER_ITERATIONS * width * num_columns * (k + 2 * length)
            step["w"] += sum(packed_layout(layer.weight_shape, layer.spec_w).values())
            step["p"] += sum(packed_layout(layer.basis_shape, layer.spec_p).values())
            step["factors"] += 4 * length * r
        later["masters"] += 4 * length * r
        if project:
            later["moments"] += 8 * length * r
            later["factors"] += 8 * length * r
    drop = {*SMALL, "other"}
    return {
        "ordinary": ordinary,
        "accumulated": accumulated,
        "first": {name: size for name, size in first.items() if name not in drop},
        "reinit": {name: size for name, size in later.items() if name not in drop},
    }


def memory_formula(num_trained: int, *, precision: str, stage: int, world_size: int) -> dict[str, float]:
    """Bytes per rank (DEEPSPEED.md's table): weights, masters, moments, gradients, and those cast for the update."""
    width = 4 if precision == "fp32" else 2
    return {
        "weights": width * num_trained,
        "masters": (2 if precision == "bf16 masters" else 4) * num_trained / world_size,
        "moments": (2 + 2 * 4 / 256) * num_trained / world_size,  # 8 bits, and a scale for each block of 256
        "gradients": width * num_trained / (world_size if stage == 2 else 1),
    }


# ---------------------------------------------------------------- one case, on every rank


@dataclass(frozen=True)
class Case:
    """One way to train."""

    method: str  # loqt or dense
    stage: int = 2
    precision: str = "bf16"  # bf16 (fp32 masters), bf16 masters, fp32
    subspace: str = "auto"
    optimizer_state: str = "keep"

    def options(self) -> list[str]:
        return [
            f"train.dtype={'fp32' if self.precision == 'fp32' else 'bf16'}",
            f"optim.master={'bf16' if self.precision == 'bf16 masters' else 'fp32'}",
            f"loqt.subspace={self.subspace}",
            f"loqt.optimizer_state={self.optimizer_state}",
        ]


CASES = (
    *(Case("loqt", stage, precision) for precision in ("bf16", "bf16 masters", "fp32") for stage in (2, 1)),
    *(Case("dense", stage, "bf16") for stage in (2, 1)),
    Case("loqt", subspace="sketch"),
    Case("loqt", optimizer_state="project"),
)
SHORT_CASES = (Case("loqt"), Case("dense"))  # of all shapes but the first


def make_config(case: Case, overrides: Sequence[str]) -> Any:
    from loqt_ds.config import load_config

    return load_config(None, [*OPTIONS.split(), *case.options(), *overrides])


def build(case: Case, config: Any, ranks: Any, *, description: Any = None) -> Any:
    """The engine of a case, of the shape that `config` or `description` says."""
    import deepspeed

    from loqt_ds.engines.deepspeed import LoQTEngine
    from loqt_ds.engines.ds_config import check_deepspeed
    from loqt_ds.method.conversion import build_model, initializer
    from loqt_ds.method.description import model_description
    from loqt_ds.optim import RoundingAdam, build_optimizer, parameter_groups

    # Buckets of the shipped configurations; DeepSpeed's own are of 5e8 elements.
    zero = {"stage": case.stage, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"zero_optimization": zero, "steps_per_print": 10**9}, file)
        file.flush()
        ds_config = check_deepspeed(file.name, config)
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    description = description or model_description(config)
    if case.method == "loqt":
        model, source = build_model(description, config.loqt, initializer(0), dtype=dtype)
        return LoQTEngine(model, config, ds_config, ranks=ranks, original=source.weight)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(description, dtype=dtype).train()
    groups = [
        {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
        for group in parameter_groups(dense, config.optim)
    ]

    def optimizer(given: Any) -> torch.optim.Optimizer:
        rounds = config.optim.master == "bf16"
        return RoundingAdam(given, config.optim, seed=0) if rounds else build_optimizer(given, config.optim)

    return deepspeed.initialize(model=dense, optimizer=optimizer, model_parameters=groups, config=ds_config)[0]


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of each storage behind some tensors."""
    found = {}
    for tensor in tensors:
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


def buckets(engine: Any) -> list[Any]:
    """What ZeRO copies gradients into before it sums them: `reduce_bucket_size` elements, however few there are."""
    return [leaf for bucket in engine.optimizer.ipg_buckets.values() for leaf in nested(bucket.buffer)]


def gradients(engine: Any) -> list[Any]:
    """Gradients of parameters, and those accumulated; buckets apart."""
    zero = engine.optimizer
    of_parameters = [parameter.grad for parameter in engine.module.parameters()]
    return [*of_parameters, *nested(zero.averaged_gradients), *nested(zero.all_grad_tensors)]


def census(engine: Any, before: set[int]) -> dict[str, int]:
    """Bytes of live tensors by what they are, each storage once; `before`: those that are not the engine's."""
    from loqt_ds.method.conversion import loqt_layers
    from loqt_ds.optim import RoundingAdam

    zero = engine.optimizer
    inner = zero.optimizer
    layers = loqt_layers(engine.module).values()
    states = [dict(inner.state)]
    if isinstance(inner, RoundingAdam):
        states = [inner.item(t, group).optimizer.state for group in inner.param_groups for t in group["params"]]
    parts = {
        "weights": [parameter for parameter in engine.module.parameters() if parameter.requires_grad],
        "w": [buffer for layer in layers for buffer in layer.packed_w().values()],
        "p": [buffer for layer in layers for buffer in layer.packed_p().values()],
        "masters": list(nested(zero.single_partition_of_fp32_groups)),
        "moments": [leaf for state in states for leaf in nested(list(state.values()))],
        "bucket": buckets(engine),
        "gradients": gradients(engine),
        "other": all_tensors(),
    }
    seen = set(before)
    found = {}
    for name, tensors in parts.items():
        own = {address: size for address, size in storages(tensors).items() if address not in seen}
        seen |= set(own)
        found[name] = sum(own.values())
    return found


def train_step(engine: Any, after_backward: Callable[[], None]) -> Any:
    """One step on random tokens; what the engine reports. `after_backward`: called after each micro-batch's."""
    report = None
    for _ in range(engine.gradient_accumulation_steps()):
        ids = torch.randint(0, engine.module.config.vocab_size, (1, NUM_TOKENS + 1), device=engine.device)
        logits = engine(input_ids=ids[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        del logits
        engine.backward(loss)
        del loss, ids
        after_backward()
        report = engine.step()
    return report


def packed_storages(engine: Any) -> dict[int, str]:
    """Storage address -> "w" or "p", of the buffers that hold them."""
    from loqt_ds.method.conversion import loqt_layers

    return {
        buffer.untyped_storage().data_ptr(): name
        for layer in loqt_layers(engine.module).values()
        for name, packed in (("w", layer.packed_w()), ("p", layer.packed_p()))
        for buffer in packed.values()
    }


def measure(ranks: Any, case: Case, overrides: Sequence[str], *, description: Any = None) -> dict[str, Any]:
    """Trains a case for a few steps on every rank. Collective; the same result on all ranks."""
    gc.collect()
    before = set(storages(all_tensors()))
    config = make_config(case, overrides)
    engine = build(case, config, ranks, description=description)
    torch.manual_seed(ranks.rank)
    cast: list[int] = []  # bytes of the gradients that each call of the optimizer is given
    engine.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: cast.append(
            sum(num_bytes(t.grad) for g in optimizer.param_groups for t in g["params"] if t.grad is not None)
        )
    )
    steps: list[dict[str, Any]] = []
    live: list[dict[str, int]] = []  # after each backward
    bucket: list[int] = []  # bytes of buckets when gradients are about to be exchanged
    for name in STEPS:
        if name == "accumulated":
            engine.set_train_batch_size(2 * ranks.world_size)
            engine.micro_steps = 2 * engine.global_steps
        counter = WireCounter(packed_storages(engine), lambda: bucket.append(sum(storages(buckets(engine)).values())))
        second = DispatchCounter()
        ranks.barrier()
        bytes_before = loopback_bytes()
        with counter.counting(), second:
            report = train_step(engine, lambda: live.append(census(engine, before)))
        ranks.barrier()
        on_loopback = loopback_bytes() - bytes_before
        if case.method == "loqt":
            assert (report.reinit is not None) == (name in ("first", "reinit")), "a step is not what it should be"
        record = {"step": name, "traffic": counter.by_purpose(), "dispatched": second.total}
        assert all(other == record for other in ranks.gather_objects(record)), "the ranks do not count the same"
        steps.append(record | {"loopback": on_loopback})
    trained = sum(parameter.numel() for parameter in engine.module.parameters() if parameter.requires_grad)
    memory = live[3] | {
        "gradients at the end": live[1]["gradients"],
        "bucket when reduced": max(bucket, default=0),
        "gradients cast": max(cast),
        "gathered": live[2]["other"] - live[1]["other"],  # for the re-initialization, when its backward is over
    }
    result = {
        "case": asdict(case),
        "world_size": ranks.world_size,
        "num_trained": trained,
        "steps": steps,
        "formula": formula(engine.module, config, stage=case.stage),
        "memory": ranks.gather_objects(memory),
        "memory_formula": memory_formula(
            trained, precision=case.precision, stage=case.stage, world_size=ranks.world_size
        ),
    }
    if case.method == "loqt":
        engine.release()
    else:
        engine.destroy()
    return result


# ---------------------------------------------------------------- processes


def _member(rank: int, world_size: int, port: int, shapes: Sequence[str], overrides: Sequence[str], path: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from loqt_ds.engines.deepspeed import start_distributed

    ranks = start_distributed(timeout_seconds=600)
    results: dict[str, list[dict[str, Any]]] = {}
    for number, shape in enumerate(shapes):
        for case in CASES if number == 0 else SHORT_CASES:
            result = measure(ranks, case, [*shape_options(shape), *overrides])
            results.setdefault(shape.replace(":", ", rank "), []).append(result)
            if ranks.is_main:
                told = ", ".join(str(value) for value in asdict(case).values())
                print(f"{world_size} ranks, {shape}: {told}", flush=True)
    if ranks.is_main:
        Path(path).write_text(json.dumps(results))
    ranks.barrier()
    os._exit(0)  # without waiting for gloo's threads


def shape_options(shape: str) -> list[str]:
    """The overrides of `NAME:RANK`."""
    name, _, rank = shape.partition(":")
    return [f"model.shape={name}", f"loqt.rank={rank or 32}"]


def run_ranks(world_size: int, shapes: Sequence[str], overrides: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """All cases of all shapes in `world_size` new processes."""
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        path = Path(folder) / "results.json"
        spawn(_member, (world_size, port, tuple(shapes), tuple(overrides), str(path)), nprocs=world_size)
        return json.loads(path.read_text())


# ---------------------------------------------------------------- tables and plots


SERIES = {
    "LoQT, ordinary step": (Case("loqt"), "ordinary"),
    "LoQT, re-initialization": (Case("loqt"), "reinit"),
    "LoQT, re-initialization by sketch": (Case("loqt", subspace="sketch"), "reinit"),
    "LoQT, the first initialization": (Case("loqt"), "first"),
    "full rank, any step": (Case("dense"), "ordinary"),
}
KEPT = {
    "weights": "trained weights",
    "w": "W, packed",
    "p": "P, packed",
    "masters": "masters",
    "moments": "moments",
    "gradients": "gradients",
}
MB = 1e6
INTRODUCTION = """\
Random tokens, real processes over gloo. **Payload** of an exchange: the tensor of an all_reduce, reduce or broadcast,
the gathered result of an all_gather; the same on every rank, whatever their number (but for padding). What a rank sends
for a payload S over N ranks is the backend's affair: at best, averaged over the ranks, 2 S (N − 1)/N for an all_reduce
and S (N − 1)/N for the others. A ring does that; so does a tree on average, but its busiest rank sends more. Formulas
are made from shapes alone; MB are 10^6 bytes. Trained in full are embeddings, head and norms: they are most of a small
model, and next to nothing of a large one (last table).
"""
MEMORY_TEXT = """\
Bytes per trained parameter that the fullest rank keeps between two micro-batches: live tensors, in brackets the
formula. At stage 2 ZeRO keeps the whole gradient of every parameter that a rank's partition touches: more than the
formula where a parameter (an embedding) is larger than a partition. Apart from these: W and P, whole on every rank;
during the update, the partition's gradient cast for the optimizer (bytes per trained parameter); at a
re-initialization, what was gathered for it when the backward is over (sums that a peer has not taken yet are still
there); and ZeRO's bucket, `reduce_bucket_size` elements of the gradients' dtype (here 5e7: 100 MB in bf16), however
small the model is, at stage 1 between micro-batches too."""
FORMULA_TEXT = """\
Not run. The formulas are those that hold to the byte above. ZeRO-2, one micro-batch a step, bf16; payload."""
CHECK_TEXT = """\
In the loopback's bytes are headers, the process group's own messages, and what other programs send: none, if it is one
of its own (`unshare -rn sh -c 'ip link set lo up; python tools/measure_ranks.py'`). gloo's reduce scatters sums over
all ranks and then gathers them on one, and so sends more than needed; that is what re-initializations show."""


def find(results: Sequence[dict[str, Any]], case: Case, world_size: int) -> dict[str, Any] | None:
    """The result of a case, if it was measured."""
    wanted = (asdict(case), world_size)
    return next((result for result in results if (result["case"], result["world_size"]) == wanted), None)


def of_step(result: dict[str, Any], name: str) -> dict[str, Any]:
    """One of a result's STEPS."""
    return next(step for step in result["steps"] if step["step"] == name)


def purposes(step: dict[str, Any]) -> dict[str, int]:
    """Payload bytes by purpose."""
    return {name: sum(size for _, size in kinds.values()) for name, kinds in step["traffic"].items()}


def sent_in(step: dict[str, Any], world_size: int) -> float:
    """Bytes a rank sends at least."""
    kinds = [item for kinds in step["traffic"].values() for item in kinds.items()]
    return sum(sent(kind, size, world_size) for kind, (_, size) in kinds)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def ratio(measured: float, expected: float) -> str:
    return f"{measured / expected:.4f}" if expected else "–"


def bytes_tables(results: Sequence[dict[str, Any]]) -> list[str]:
    """Of one shape: totals, then purposes."""
    worlds = sorted({result["world_size"] for result in results} - {1})
    rows, details = [], []
    dense = {n: find(results, Case("dense"), n) for n in worlds}
    for label, (case, name) in SERIES.items():
        for n in worlds:
            result, full = find(results, case, n), dense[n]
            if result is None:
                continue
            step = of_step(result, name)
            found, expected = purposes(step), result["formula"][name]
            total, formula_total = sum(found.values()), sum(expected.values())
            beside = sum(purposes(of_step(full, "ordinary")).values()) if full else 0
            calls = sum(number for kinds in step["traffic"].values() for number, _ in kinds.values())
            rows.append(
                [label, str(n), f"{total / MB:.3f}", f"{formula_total / MB:.3f}", ratio(total, formula_total)]
                + [f"{total / beside:.3f}" if beside else "–", f"{sent_in(step, n) / MB:.3f}", str(calls)]
            )
    head = ["step", "ranks", "payload, MB", "formula, MB", "ratio", "/ full rank", "a rank sends ≥, MB", "exchanges"]
    n = worlds[0]
    columns = {
        label: result
        for label, (case, _) in SERIES.items()
        if label != "LoQT, the first initialization" and (result := find(results, case, n)) is not None
    }
    for name, label in PURPOSES.items():
        cells = []
        for column, result in columns.items():
            step_name = SERIES[column][1]
            step = of_step(result, step_name)
            size, expected_size = purposes(step).get(name, 0), result["formula"][step_name].get(name, 0)
            kinds = "+".join(f"{number} {kind}" for kind, (number, _) in step["traffic"].get(name, {}).items())
            same = "" if name in SMALL or size == expected_size else f" (formula {expected_size:,})"
            cells.append(f"{size:,}{same}: {kinds}" if kinds else "")
        if any(cells):
            details.append([label, *cells])
    return [*table(head, rows), *table([f"payload bytes, {n} ranks", *columns], details), *beyond_design(results, n)]


def beyond_design(results: Sequence[dict[str, Any]], world_size: int) -> list[str]:
    """How much of a re-initialization is what it is for: sums of gradients or sketches; W, P and B."""
    lines = []
    for label, (case, name) in SERIES.items():
        result = find(results, case, world_size)
        if name != "reinit" or result is None:
            continue
        found = purposes(of_step(result, name))
        added = sum(size for purpose, size in found.items() if purpose not in ("gradients", "parameters", "norms"))
        named = sum(found.get(purpose, 0) for purpose in ("sums", "w", "p", "factors"))
        rest = [PURPOSES[purpose] for purpose in ("columns", "masters", "moments") if found.get(purpose)]
        lines.append(
            f"- {label}: adds {added / MB:.2f} MB to an ordinary step. {named / added:.0%} are the sums, W, P and B; "
            f"the rest: {'; '.join(rest)}; messages."
        )
    return [*lines, ""]


def memory_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Of one shape: bytes per trained parameter and rank, measured (formula), the largest of the ranks."""
    rows = []
    for result in results:
        case = Case(**result["case"])
        if case.subspace != "auto" or case.optimizer_state != "keep":
            continue
        parts = {name: max(rank[name] for rank in result["memory"]) for name in result["memory"][0]}
        trained, expected = result["num_trained"], result["memory_formula"]
        cells = [f"{parts[name] / trained:.3f} ({expected[name] / trained:.3f})" for name in expected]
        measured = sum(parts[name] for name in expected)
        rows.append(
            ["LoQT" if case.method == "loqt" else "full rank", case.precision, str(case.stage)]
            + [str(result["world_size"]), *cells, f"{measured / MB:.1f}", ratio(measured, sum(expected.values()))]
            + [f"{(parts['w'] + parts['p']) / MB:.1f}", f"{sum(parts[name] for name in KEPT) / MB:.1f}"]
            + [f"{parts['gradients cast'] / trained:.3f}", f"{parts['gathered'] / MB:.1f}"]
            + [f"{parts['bucket when reduced'] / MB:.0f}"]
        )
    rows.sort(key=lambda row: (row[0] != "LoQT", ["bf16", "bf16 masters", "fp32"].index(row[1]), -int(row[2]), row[3]))
    head = ["model", "precision", "stage", "ranks", "weights", "masters", "moments", "gradients", "sum, MB", "ratio"]
    return table([*head, "W + P, MB", "kept, MB", "cast in the update", "gathered, MB", "bucket, MB"], rows)


def by_formula() -> dict[str, dict[str, int]]:
    """Of recipes too large to run here, and of those that were run: bytes by the formulas, which hold to the byte."""
    from loqt_ds.config import load_config
    from loqt_ds.method.conversion import build_empty, build_meta
    from loqt_ds.method.description import model_description

    found = {}
    for recipe in RECIPES:
        config = load_config(recipe, ["train.dtype=bf16"])
        description = model_description(config)
        model = build_meta(description, config.loqt, dtype=torch.bfloat16)
        steps = {name: sum(sizes.values()) for name, sizes in formula(model, config).items()}
        found[recipe] = {
            "rank": config.loqt.rank,
            "ordinary": steps["ordinary"],
            "reinit": steps["reinit"],
            "full_rank": 2 * 2 * sum(parameter.numel() for parameter in build_empty(description).parameters()),
        }
    return found


def formula_table(found: dict[str, dict[str, int]]) -> list[str]:
    rows = [
        [name, str(row["rank"]), f"{row['ordinary'] / MB:,.0f}", f"{(row['reinit'] - row['ordinary']) / MB:,.0f}"]
        + [f"{row['full_rank'] / MB:,.0f}", f"{row['ordinary'] / row['full_rank']:.3f}"]
        + [f"{(row['ordinary'] + (row['reinit'] - row['ordinary']) / 100) / row['full_rank']:.3f}"]
        for name, row in found.items()
    ]
    head = ["recipe", "rank", "ordinary step, MB", "a re-initialization adds, MB", "full rank, MB"]
    return table([*head, "ordinary / full rank", "with one re-initialization in 100 steps"], rows)


def check_lines(record: dict[str, Any]) -> list[str]:
    """What the independent counters say."""
    steps = [
        (result, step)
        for results in record["results"].values()
        for result in results
        for step in result["steps"]
        if result["world_size"] > 1
    ]
    differing = sum(step["dispatched"][1] != sum(purposes(step).values()) for _, step in steps)
    unknown = sum(purposes(step).get("other", 0) for _, step in steps)
    lines = [
        f"- torch's dispatcher saw the same number of bytes in {len(steps) - differing} of {len(steps)} steps; "
        f"{unknown} bytes were of a purpose that was not recognized."
    ]
    for name, what in (("ordinary", "ordinary steps"), ("reinit", "re-initializations")):
        over = [
            step["loopback"] / result["world_size"] / sent_in(step, result["world_size"])
            for result, step in steps
            if step["step"] == name and result["case"]["method"] == "loqt" and step["loopback"] > 0
        ]
        if over:
            lines.append(
                f"- /proc/net/dev, loopback: in {what} {min(over):.3f} to {max(over):.3f} times the bytes that the "
                "ranks must send at least."
            )
    return lines


def report(record: dict[str, Any]) -> str:
    """README.md."""
    origin = record["provenance"]
    lines = ["# Several ranks: bytes on the wire and memory, counted", "", f"    {origin['command']}", "", INTRODUCTION]
    for shape, results in record["results"].items():
        result = find(results, Case("loqt"), results[0]["world_size"])
        dense = find(results, Case("dense"), results[0]["world_size"])
        assert result is not None and dense is not None
        lines += [
            f"## {shape}",
            "",
            f"{result['num_trained']:,} trained parameters; {dense['num_trained']:,} in full rank. ZeRO-2, bf16, fp32 "
            "masters, 8-bit AdamW, one micro-batch a step:",
            "",
            *bytes_tables(results),
        ]
        lines += [MEMORY_TEXT, "", *memory_table(results)]
    lines += ["## Larger shapes, by the formulas", "", FORMULA_TEXT, "", *formula_table(record["by_formula"])]
    lines += ["## Was everything counted?", "", *check_lines(record), "", CHECK_TEXT, ""]
    lines += ["![bytes](bytes.png)", "", "![memory](memory.png)", ""]
    lines += [f"Machine: {origin['machine']}, shared with other work (no count depends on that); {origin['versions']}."]
    return "\n".join([*lines, "", f"Code: commit {origin['commit']}.", ""])


def plot(record: dict[str, Any], output: Path) -> None:
    """bytes.png: payload by purpose; memory.png: by number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = record["results"]
    colors = {name: pyplot.get_cmap("tab20")(number) for number, name in enumerate(PURPOSES)}
    shown: dict[str, Any] = {}
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(6 * len(shapes), 5), layout="constrained", squeeze=False)
    for ax, (shape, results) in zip(axes[0], shapes.items(), strict=True):
        n = min(result["world_size"] for result in results if result["world_size"] > 1)
        found = {
            label: purposes(of_step(result, name))
            for label, (case, name) in SERIES.items()
            if name != "first" and (result := find(results, case, n)) is not None
        }
        bottom = [0.0] * len(found)
        for name, label in PURPOSES.items():
            heights = [sizes.get(name, 0) / MB for sizes in found.values()]
            if max(heights) > 0.001 * max(bottom):
                shown[label] = ax.bar(list(found), heights, bottom=bottom, color=colors[name])
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        ax.set_xticks(range(len(found)), [label.replace(", ", ",\n").replace(" by", "\nby") for label in found])
        ax.tick_params(axis="x", labelsize=8)
        ax.set(title=f"{shape}, ZeRO-2, bf16", ylabel="payload of a step, MB")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2 * len(shapes), fontsize=8)
    figure.savefig(output / "bytes.png", dpi=110)
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(6 * len(shapes), 4.5), layout="constrained", squeeze=False)
    for ax, (shape, results) in zip(axes[0], shapes.items(), strict=True):
        worlds = sorted({result["world_size"] for result in results})
        columns = [(case, n) for case in (Case("loqt"), Case("dense")) for n in worlds]
        ticks = [f"{'LoQT' if case.method == 'loqt' else 'full rank'}\n{n} rank{'s' * (n > 1)}" for case, n in columns]
        bottom = [0.0] * len(columns)
        for name, label in KEPT.items():
            heights = []
            for case, n in columns:
                result = find(results, case, n)
                heights.append(max(rank[name] for rank in result["memory"]) / MB if result else 0.0)
            ax.bar(ticks, heights, bottom=bottom, label=label)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        ax.set(title=f"{shape}, ZeRO-2, bf16, fp32 masters", ylabel="kept by a rank, MB")
    axes[0][0].legend(fontsize=8)
    figure.savefig(output / "memory.png", dpi=110)


def provenance() -> dict[str, str]:
    """Where and with what this was measured."""
    from importlib.metadata import version

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": f"{os.cpu_count()} cores of {models[0].split(':')[1].strip() if models else platform.processor()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "bitsandbytes")),
        "commit": git("rev-parse", "--short", "HEAD"),
        "command": shlex.join(["python", "tools/measure_ranks.py", *sys.argv[1:]]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="NAME:RANK", help="of configs/models")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    record: dict[str, Any] = {"provenance": provenance(), "results": {}}
    for world_size in options.ranks:
        for shape, results in run_ranks(world_size, options.shape, options.overrides).items():
            record["results"].setdefault(shape, []).extend(results)
    record["by_formula"] = by_formula()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "README.md").write_text(report(record))
    plot(record, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
