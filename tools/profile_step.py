"""Where the time of one optimizer step goes, beside what it would take at the machine's own rates.

    python tools/profile_step.py --shape 60m --rank 128 optim.name=adamw train.dtype=fp32
    python tools/profile_step.py --shape 60m --full-rank optim.name=adamw train.dtype=fp32
    python tools/profile_step.py --config pretrain_7b_24gb --trace step.json.gz       # for ui.perfetto.dev
    python tools/profile_step.py --suite --work benchmarks/results/profile            # what is committed there

Takes ordinary steps, on random tokens through the trainer's own batches, and one re-initialization, under
torch.profiler; every operation is put down to a part of the step by what called it. Printed for each part: time in
operations (on CUDA: in kernels), time that Python took in between, operations and bytes of `loqt_ds.operations`, and
the floor, the longer of operations / rate of a large product and bytes / rate of a large copy, both measured in the
same run. The gap is what is above the floor. With --work the tables are written there, too, as JSON and Markdown;
--report makes the README.md of such a folder. --suite measures several shapes, each in a process of its own, but those
that --work has already.

Ranges are put around the layers' methods from here: the code that is measured knows nothing of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fit import machine
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import loqt_ds.core.compensation
import loqt_ds.method.controller
from loqt_ds.config import Config, load_config
from loqt_ds.data import StepBatches, TrainBatches
from loqt_ds.data.batches import StoredSequence
from loqt_ds.data.packing import PackedRows, collate
from loqt_ds.engines.single import SingleEngine
from loqt_ds.evaluation import model_inputs, num_predicted, summed_loss
from loqt_ds.method import head
from loqt_ds.method.controller import Controller
from loqt_ds.method.description import model_description, training_dtype
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.operations import PARTS, REINIT_PARTS, Work, reinit_work, step_work
from loqt_ds.preflight import choose_device, resolve_activations, resolve_config
from loqt_ds.ranks import ALONE
from loqt_ds.run import build_engine, load_model
from loqt_ds.train import set_environment

ROW = 256
PROFILED = 3  # ordinary steps
SUITE = [
    f"--shape {shape} {method} train.dtype={dtype}"
    for shape, dtypes, methods in (
        ("60m", ("fp32", "bf16"), ("--rank 32", "--rank 128", "--full-rank")),
        ("350m", ("fp32",), ("--rank 128", "--full-rank")),
    )
    for dtype in dtypes
    for method in methods
]
RANGE = "part: "
LABELS = PARTS | {"data": "data"} | {name: f"re-init.: {label}" for name, label in REINIT_PARTS.items()}

# What an operation belongs to where it is in no range of ours: the first rule that fits one of its callers.
RULES = [
    (re.compile("CrossEntropy"), "head"),
    (re.compile("LoQTLinear|loqt_ds::"), "low_rank"),
    (re.compile("_Recomputed"), "elementwise"),
    (re.compile(r"aten::linear$|AddmmBackward|\bMmBackward|LinearBackward"), "products"),
    (re.compile("scaled_dot_product|ScaledDotProduct|FlashAttention|matmul|Bmm|softmax|Softmax"), "attention"),
]


# ---------------------------------------------------------------- ranges


def mark(owner: Any, name: str, part: str) -> None:
    """Puts a range around a function."""
    original = getattr(owner, name)

    @wraps(original)
    def marked(*arguments: Any, **options: Any) -> Any:
        with record_function(RANGE + part):
            return original(*arguments, **options)

    setattr(owner, name, marked)


def mark_buffers() -> None:
    """Getting a dequantized matrix is dequantization (or the low-rank path, where it is merged); what is done while it
    is there is the product it is got for."""
    merging = 0

    def opened(get: Callable[..., Any], first: str, then: str) -> Callable[..., Any]:
        @contextmanager
        def marked(layer: LoQTLinear, argument: Any) -> Iterator[Tensor]:
            nonlocal merging
            with ExitStack() as held:
                merging += first == "low_rank"
                with record_function(RANGE + first):
                    matrix = held.enter_context(get(layer, argument))
                merging -= first == "low_rank"
                with record_function(RANGE + ("low_rank" if merging else then)):
                    yield matrix

        return marked

    for name, first, then in (
        ("weight_q_buffer", "dequantization", "products"),
        ("basis_hat_buffer", "dequantization", "low_rank"),
        ("effective_weight_buffer", "low_rank", "products"),
    ):
        setattr(LoQTLinear, name, opened(getattr(LoQTLinear, name), first, then))


def mark_all() -> None:
    """Once in a process."""
    mark_buffers()
    mark(SingleEngine, "_update_at_once", "optimizer")
    mark(LoQTLinear, "effective_weight", "merge")
    mark(Controller, "_rebuild", "compensate")
    mark(Controller, "_next_basis", "decompose")
    for module in (loqt_ds.method.controller, loqt_ds.core.compensation):
        mark(module, "quantize", "quantize")
    tapping = Controller._tap

    def tap(controller: Controller, name: str, layer: LoQTLinear) -> Callable[[Tensor, Tensor], None]:
        function = tapping(controller, name, layer)

        def marked(dy: Tensor, x: Tensor) -> None:
            with record_function(RANGE + "tap"):
                function(dy, x)

        return marked

    Controller._tap = tap  # type: ignore[method-assign, assignment]


# ---------------------------------------------------------------- what is trained


class RandomTokens:
    """A corpus in memory."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, 1 << 20, dtype=np.uint32)
        self.offsets = np.arange(0, len(self.tokens) + 1, 1 << 10, dtype=np.int64)


def batches_of(config: Config, vocab_size: int, device: torch.device) -> StepBatches:
    rows = PackedRows(RandomTokens(vocab_size), config.data.sequence_length)
    source = TrainBatches(
        StoredSequence(rows, shuffle=True, seed=0),
        identity={},
        micro_batch_size=config.train.micro_batch_size,
        collate=partial(
            collate,
            sequence_length=config.data.sequence_length,
            pad_id=0,
            mask_documents=config.data.mask_documents,
        ),
    )
    return StepBatches(source, num_micro_batches=config.train.gradient_accumulation_steps, device=device)


class FullRank:
    """The same model with every weight trained, by torch's fused AdamW or bitsandbytes' of 8 bits; the part of the
    `Engine` protocol that a step needs."""

    def __init__(self, config: Config, description: Any, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            self.network: nn.Module = AutoModelForCausalLM.from_config(
                description, dtype=training_dtype(config), attn_implementation=config.model.attention
            )
        head.install(self.network)
        parameters, lr = self.network.parameters(), config.optim.lr
        if config.optim.name == "adamw":
            self.optimizer: Any = torch.optim.AdamW(parameters, lr=lr, fused=True)
        else:
            import bitsandbytes

            self.optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=lr)
        self._steps, self._count = config.train.gradient_accumulation_steps, 0

    def __call__(self, **inputs: Any) -> Any:
        return self.network(**inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._steps).backward()

    def step(self) -> None:
        self._count += 1
        if self._count % self._steps == 0:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def take_step(engine: Any, batches: StepBatches, device: torch.device) -> None:
    """As the trainer does."""
    with record_function(RANGE + "data"):
        taken = batches.take(is_last=False)
    num_tokens = sum(num_predicted(batch) for batch in taken)
    for batch in taken:
        with record_function(RANGE + "data"):
            inputs, targets = model_inputs(batch, device)
        loss = summed_loss(engine, inputs, targets)
        engine.backward(loss * (len(taken) / num_tokens))
        with record_function(RANGE + "optimizer"):
            engine.step()


# ---------------------------------------------------------------- measuring


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Operations per second of a large product, bytes per second of a large copy; the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**28 // 4, device=device)
    target = torch.empty_like(source)
    times = [seconds_of(lambda: one @ other, device) for _ in range(6)]
    copies = [seconds_of(lambda: target.copy_(source), device) for _ in range(6)]
    return {"operations_per_second": 2 * size**3 / min(times), "bytes_per_second": 2 * source.nbytes / min(copies)}


def part_of(event: Any) -> str | None:
    """The part of the step an event of the profiler belongs to; None where nothing around it says so."""
    names = []
    while event is not None:
        if event.name.startswith(RANGE):
            return str(event.name.removeprefix(RANGE))
        names.append(event.name)
        event = event.cpu_parent
    return next((part for pattern, part in RULES if any(map(pattern.search, names))), None)


def is_operation(name: str) -> bool:
    """Whether an event's own time is that of a kernel, not of Python or of autograd. (torch.compile's kernels for a CPU
    are no events of their own, but what the call of their graph takes itself.)"""
    return ("::" in name and not name.startswith(("autograd::", RANGE))) or name.startswith("## Call CompiledFxGraph")


def by_part(events: Any, *, on_cuda: bool) -> dict[str, dict[str, float]]:
    """Seconds by part: in operations, and in Python between them."""
    parts: dict[str, dict[str, float]] = {name: {"operations": 0.0, "python": 0.0} for name in LABELS}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels count with the operation that started them
        part, is_op = part_of(event), is_operation(event.name)
        in_kernels = event.self_device_time_total if on_cuda else event.self_cpu_time_total if is_op else 0.0
        parts[part or "elementwise"]["operations"] += in_kernels / 1e6
        if part is not None and not is_op:
            parts[part]["python"] += event.self_cpu_time_total / 1e6
    return parts


def profiled(action: Callable[[], None], device: torch.device, trace: str | None) -> tuple[dict[str, Any], float]:
    """(seconds by part, seconds) of what `action` does."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        wall = seconds_of(action, device)
    if trace is not None:
        profiler.export_chrome_trace(trace)
    return by_part(profiler.events(), on_cuda=device.type == "cuda"), wall


def build(config: Config, *, full_rank: bool) -> tuple[Config, Any, StepBatches, torch.device]:
    """The resolved configuration, what takes steps, their batches, and the device."""
    device = choose_device(config)
    config = resolve_config(config, device)
    description = model_description(config)
    config = resolve_activations(config, description, device, None, ALONE, None)
    torch.manual_seed(config.train.seed)
    engine: Any
    if full_rank:
        engine = FullRank(config, description, device)
        engine.network.train()
    else:
        model, original = load_model(config, description, device, ALONE, resumed=False, say=lambda _: None)
        engine = build_engine(config, model.train(), None, original, ALONE)
    return config, engine, batches_of(config, int(description.vocab_size), device), device


def measure(config: Config, *, full_rank: bool, num_steps: int, trace: str | None) -> dict[str, Any]:
    """Everything about one configuration, as JSON."""
    if full_rank and config.train.compile:
        raise ValueError("--full-rank with train.compile=true: stock modules are measured as they are; leave one out")
    config, engine, batches, device = build(config, full_rank=full_rank)
    vocab_size, dtype = int(model_description(config).vocab_size), training_dtype(config)

    def step(times: int = 1) -> None:
        for _ in range(times):
            take_step(engine, batches, device)

    before = rates(dtype, device)
    first = seconds_of(step, device)
    step()  # a warm one
    times = [seconds_of(step, device) for _ in range(num_steps)]
    ordinary, wall = profiled(lambda: step(PROFILED), device, trace)
    reinit, reinit_wall = (None, None) if full_rank else profiled(step, device, None)
    batches.close()
    after = rates(dtype, device)
    best = {name: max(before[name], after[name]) for name in before}
    works = step_work(config, vocab_size=vocab_size, full_rank=full_rank)
    extra = {} if full_rank else reinit_work(config, vocab_size=vocab_size)
    ordinary = {name: {k: v / PROFILED for k, v in times.items()} for name, times in ordinary.items()}
    return {
        "name": name_of(config, full_rank),
        "command": " ".join(["python", "tools/profile_step.py", *sys.argv[1:]]),
        "tokens": config.train.micro_batch_size * config.data.sequence_length,
        "micro_batches": config.train.gradient_accumulation_steps,
        "optimizer": config.optim.name,
        "lean_activations": None if full_rank else config.train.lean_activations,
        "rates": best,
        "load": os.getloadavg()[0],
        "step_seconds": times,
        "first_step_seconds": first,
        "ordinary": {"wall": wall / PROFILED, "parts": lines(ordinary, works, best)},
        "reinit": reinit and {"wall": reinit_wall, "parts": lines(reinit, works | extra, best)},
        "machine": machine(device),
    }


def name_of(config: Config, full_rank: bool) -> str:
    shape = Path(config.model.shape or config.model.path or "").stem
    method = "full_rank" if full_rank else f"r{config.loqt.rank}"
    product = "" if full_rank or config.loqt.product == "auto" else f"_{config.loqt.product}"
    product += "_compiled" if config.train.compile and not full_rank else ""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    return f"{shape}_{method}{product}_{config.train.dtype}_t{tokens}_{config.optim.name}"


def lines(
    parts: dict[str, dict[str, float]], works: dict[str, Work], rate: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Measured and counted of each part that there is."""
    table = {}
    for name, seconds in parts.items():
        work = works.get(name, Work())
        floor = max(
            work.operations / rate["operations_per_second"],
            work.num_bytes / rate["bytes_per_second"],
        )
        if any(seconds.values()) or floor:
            counts = {"work": work.operations, "bytes": work.num_bytes, "floor": floor}
            table[name] = seconds | counts
    return table


# ---------------------------------------------------------------- tables


def table(record: dict[str, Any], kind: str) -> str:
    """Markdown: one row a part."""
    measured = record[kind]
    rows = [
        "| part | ms | of the step | Python between, ms | operations, G | bytes, MiB | floor, ms | above it, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    wall, spent, floors = measured["wall"], 0.0, 0.0
    for name, part in measured["parts"].items():
        spent, floors = spent + part["operations"], floors + part["floor"]
        rows.append(
            f"| {LABELS[name]} | {1e3 * part['operations']:.1f} | {part['operations'] / wall:.1%} | "
            f"{1e3 * part['python']:.1f} | {part['work'] / 1e9:.2f} | {part['bytes'] / 2**20:.0f} | "
            f"{1e3 * part['floor']:.1f} | {1e3 * (part['operations'] - part['floor']):.1f} |"
        )
    rest = wall - spent
    rows.append(f"| Python, launches, waiting | {1e3 * rest:.1f} | {rest / wall:.1%} | | | | 0.0 | {1e3 * rest:.1f} |")
    rows.append(f"| **step** | {1e3 * wall:.1f} | 100% | | | | {1e3 * floors:.1f} | {1e3 * (wall - floors):.1f} |")
    return "\n".join(rows)


def describe(record: dict[str, Any]) -> str:
    """The tables of one record."""
    rate, times = record["rates"], record["step_seconds"]
    low, high = (min(times), max(times)) if len(times) < 4 else statistics.quantiles(times, n=4)[::2]
    text = [
        f"## {record['name']}",
        f"`{record['command']}`",
        f"{record['micro_batches']} micro-batch(es) of {record['tokens']:,} tokens, {record['optimizer']}"
        + (f", lean activations {record['lean_activations']}" if record["lean_activations"] is not None else "")
        + f"; {record['machine']['device']}, {record['machine']['threads']} thread(s), load {record['load']:.1f}. "
        f"A large product runs at {rate['operations_per_second'] / 1e9:,.0f} G operations/s, a large copy at "
        f"{rate['bytes_per_second'] / 1e9:,.1f} GB/s. Step without the profiler: median "
        f"{1e3 * statistics.median(times):,.0f} ms, quartiles {1e3 * low:,.0f} to {1e3 * high:,.0f} of {len(times)}.",
        f"Ordinary step, the mean of {PROFILED} under the profiler:",
        table(record, "ordinary"),
    ]
    if record["reinit"] is not None:
        text += ["Step with a re-initialization of all layers:", table(record, "reinit")]
    return "\n\n".join(text)


def report(folder: Path) -> None:
    """README.md of all records in a folder."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not records:
        raise ValueError(f"--report {folder}: there is no record; run profile_step.py with --work {folder} first")
    first = records[0]["machine"]
    versions = ", ".join(f"{key} {first[key]}" for key in ("python", "torch", "transformers", "bitsandbytes", "commit"))
    intro = (
        "# One step by operation\n\nMade by `tools/profile_step.py`, whose docstring says what the columns are. "
        f"{versions}. Times under the profiler and beside other processes are rough: the shares are what counts."
    )
    (folder / "README.md").write_text("\n\n".join([intro, *map(describe, records)]) + "\n")


# ---------------------------------------------------------------- several


def suite(work: Path, num_steps: int) -> int:
    """Measures what SUITE has and the folder has not; returns how many failed."""
    failed = 0
    for case in SUITE:
        arguments = [*case.split(), "optim.name=adamw", "--steps", str(num_steps), "--work", str(work)]
        config, full_rank = configuration(options := parser().parse_args(arguments)), options.full_rank
        if (work / f"{name_of(config, full_rank)}.json").exists():
            continue
        print(f"{time.strftime('%H:%M:%S')} {case}", flush=True)
        failed += (
            subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.DEVNULL, check=False).returncode
            != 0
        )
    return failed


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="One optimizer step by operation, beside its floor.")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a recipe's name in configs/recipes, or a YAML file")
    what.add_argument("--shape", help="a size such as 60m, a name in configs/models, or a transformers config .json")
    what.add_argument("--report", type=Path, metavar="DIR", help="only make DIR/README.md of the records in DIR")
    what.add_argument("--suite", action="store_true", help="what benchmarks/results/profile has; with --work")
    made.add_argument("--rank", type=int, help="loqt.rank")
    made.add_argument(
        "--tokens", type=int, help=f"tokens of a micro-batch, in rows of {ROW}; --shape: 2048 unless told"
    )
    made.add_argument("--full-rank", action="store_true", help="every weight trained, without LoQT")
    made.add_argument("--steps", type=int, default=5, help="ordinary steps timed without the profiler (%(default)s)")
    made.add_argument("--trace", metavar="FILE", help="trace of the ordinary steps, .json or .json.gz, for Perfetto")
    made.add_argument("--work", type=Path, metavar="DIR", help="also write DIR/NAME.json and DIR/README.md")
    made.add_argument("overrides", nargs="*", metavar="section.field=value", help="options to change")
    return made


def configuration(options: argparse.Namespace) -> Config:
    if options.steps < 1:
        raise ValueError(f"--steps={options.steps} is out of range; it must be at least 1")
    overrides = ["loqt.schedule=static", f"loqt.interval={2 + options.steps + PROFILED}", "train.max_steps=100000"]
    tokens = options.tokens
    if options.shape is not None:
        shape = options.shape
        known = shape.endswith(".json") or shape.startswith("llama_")
        overrides.append(f"model.shape={shape if known else f'llama_{shape}'}")
        tokens = 2048 if tokens is None else tokens
    if tokens is not None:
        rows, length = (tokens // ROW, ROW) if tokens > ROW else (1, tokens)
        if tokens < 2 or rows * length != tokens:
            raise ValueError(f"--tokens={tokens} is no multiple of {ROW}; give 2 to {ROW}, or a multiple of it")
        overrides += [f"data.sequence_length={length}", f"train.micro_batch_size={rows}"]
    if options.rank is not None:
        overrides.append(f"loqt.rank={options.rank}")
    return load_config(options.config, [*overrides, *options.overrides])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.report is not None:
            report(options.report)
            return 0
        if options.suite:
            if options.work is None:
                raise ValueError("--suite needs --work DIR, where its tables go")
            return min(1, suite(options.work, options.steps))
        config = configuration(options)
        mark_all()
        record = measure(config, full_rank=options.full_rank, num_steps=options.steps, trace=options.trace)
        print(describe(record))
        if options.work is not None:
            options.work.mkdir(parents=True, exist_ok=True)
            partial = options.work / f".{record['name']}.part"
            partial.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(partial, options.work / f"{record['name']}.json")
            report(options.work)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    set_environment()
    sys.exit(main())
