"""Does it fit? A few steps of real shapes, re-initializations included, and their peaks beside the planner's.

    python tools/fit.py                          # on the CPU: 7B at rank 256 and 1024, 13B at rank 256, 128 tokens
    python tools/fit.py --cuda --cap-gib 23.6    # the table of the README on one CUDA device
    python tools/fit.py --cuda --plan            # what the planner says of that table, without measuring
    python tools/fit.py --shape llama_9m --rank 32 --tokens 64 128

A cell is one shape, rank and number of tokens in the micro-batch, with what a small card asks for: layer-wise updates,
bf16 without masters, 8-bit Adam, W and P in NF4 with double quantization. Weights are drawn from the seed; tokens are
bytes of Python's own source, so that the loss falls and no data is needed. Each cell is a process of its own. It makes
the model as a run does and takes four steps (six on CUDA); the first and the third (fourth) re-initialize all layers,
on CUDA with C = 5, on the CPU without compensation (the paper's C = 0 for 7B), which would take most of an hour.

Measured per phase (start, ordinary step, re-initialization): on the CPU the peak of the resident set, on CUDA what
torch allocated and reserved and what the driver reports; besides, the exact bytes of what stays, by component. On CUDA
an allocation beyond --cap-gib, context included, fails. `planned` is loqt_ds.memory's.

Every finished cell is a file in --work, and is not measured again: with --minutes the command stops starting cells
early enough, and the same command goes on. The table and a plot go to --work as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loqt_ds.config import Config, load_config
from loqt_ds.engines.single import SingleEngine
from loqt_ds.evaluation import model_inputs
from loqt_ds.memory import GIB, LABELS, plan
from loqt_ds.method.conversion import loqt_layers
from loqt_ds.method.description import model_description
from loqt_ds.ranks import ALONE
from loqt_ds.run import build_engine, load_model
from loqt_ds.train import set_environment

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/fit"
ROW = 256  # tokens of a row, as in the paper's runs; shorter micro-batches are one row
RECIPE = """
name: fit
optim: {name: adamw8bit, lr: 0.0005, master: bf16, layerwise: true, warmup_steps: 0}
loqt: {schedule: static, double_quant: both}
train: {dtype: bf16, max_steps: 1000}
export: {format: none}
"""
CPU_OPTIONS = ("loqt.interval=2", "loqt.compensation_steps=0")
CUDA_OPTIONS = ("loqt.interval=3", "loqt.compensation_steps=5")
CPU_CELLS = [("llama_7b", 256, 128), ("llama_7b", 1024, 128), ("llama_13b", 256, 128)]
CUDA_CELLS = [  # the cell that matters first
    ("llama_13b", 1024, 512),
    ("llama_13b", 1024, 256),
    *(("llama_7b", 1024, tokens) for tokens in (256, 1024, 2048)),
    *(("llama_7b", 256, tokens) for tokens in (256, 1024, 2048, 4096)),
    *(("llama_13b", 256, tokens) for tokens in (256, 1024, 2048)),
]


PHASES = {"start": "start", "ordinary": "step", "reinit": "re-initialization"}  # ours -> the planner's


@dataclass(frozen=True)
class Cell:
    """One measurement: shape is a name in configs/models or a file."""

    shape: str
    rank: int
    tokens: int
    device: str

    @property
    def name(self) -> str:
        return f"{Path(self.shape).stem}_r{self.rank}_t{self.tokens}_{self.device}"

    def config(self, overrides: Sequence[str] = ()) -> Config:
        rows, length = (self.tokens // ROW, ROW) if self.tokens > ROW else (1, self.tokens)
        if rows * length != self.tokens:
            raise ValueError(f"--tokens {self.tokens} is no multiple of {ROW}; give at most {ROW}, or a multiple of it")
        options = [
            f"model.shape={self.shape}",
            f"loqt.rank={self.rank}",
            f"data.sequence_length={length}",
            f"train.micro_batch_size={rows}",
            f"train.device={self.device}",
            *(CUDA_OPTIONS if self.device == "cuda" else CPU_OPTIONS),
        ]
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "fit.yaml"
            recipe.write_text(RECIPE)
            return load_config(recipe, [*options, *overrides])


# ---------------------------------------------------------------- one cell, in a process of its own


class Memory:
    """Peaks of this process since the last `reset`, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.context = 0  # on CUDA: taken before anything was allocated
        if device.type == "cuda":
            torch.empty(1, device=device)
            self.context = self._driver() - torch.cuda.memory_reserved(device)

    def _driver(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def cap(self, gib: float) -> None:
        """Lets allocations beyond `gib`, context included, fail."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, gib * GIB - self.context) / total, self.device)

    def reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now

    def peaks(self) -> dict[str, int]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
                "driver": self._driver(),
            }
        status = Path("/proc/self/status").read_text()
        return {"resident": next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)}


def components(model: nn.Module, engine: SingleEngine) -> dict[str, int]:
    """Bytes of the tensors that stay, by the planner's names."""

    def size(tensors: Iterator[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    layers = loqt_layers(model)
    factors = {id(layer.B) for layer in layers.values()}
    packed = {id(buffer) for layer in layers.values() for buffer in layer.buffers()}
    saved = engine.saved_tensors()["optimizer"]
    return {
        "weights_w": size(tensor for layer in layers.values() for tensor in layer.packed_w().values()),
        "projections_p": size(tensor for layer in layers.values() for tensor in layer.packed_p().values()),
        "factors_b": size(layer.B for layer in layers.values()),
        "full_rank_parameters": size(p for p in model.parameters() if p.requires_grad and id(p) not in factors),
        "masters": size(tensor for name, tensor in saved.items() if name.endswith("/master")),
        "moments": size(t for name, t in saved.items() if not name.endswith(("/master", "/step"))),
        "buffers": size(buffer for buffer in model.buffers() if id(buffer) not in packed),
    }


def token_rows(config: Config, step: int) -> dict[str, Tensor]:
    """A batch of bytes of Python's own source, different in each step."""
    text = Path(os.__file__).read_bytes()
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    start = step * rows * length % (len(text) // 2)
    while len(text) < start + rows * length + 1:
        text += text
    ids = torch.frombuffer(bytearray(text[start : start + rows * length + 1]), dtype=torch.uint8).long()
    return {"input_ids": ids[:-1].view(rows, length), "targets": ids[1:].view(rows, length)}


def measure(cell: Cell, result: Path, *, cap_gib: float | None, num_steps: int, overrides: Sequence[str]) -> None:
    """Takes the steps of a cell and writes what was measured."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{cell.name} {time.perf_counter() - began:7.1f} s  {text}", flush=True)

    device = torch.device("cuda", 0) if cell.device == "cuda" else torch.device("cpu")
    config = cell.config(overrides)
    say(f"planned {plan(config).total_gib:.2f} GiB")
    where = machine(device)  # before the repository may change
    memory = Memory(device)
    if cap_gib is not None and device.type == "cuda":
        memory.cap(cap_gib)
    memory.reset()
    before = memory.peaks()
    torch.manual_seed(config.train.seed)
    model, original = load_model(config, model_description(config), device, ALONE, resumed=False, say=say)
    engine = build_engine(config, model, None, original, ALONE)
    assert isinstance(engine, SingleEngine)
    peaks: dict[str, dict[str, int]] = {"start": memory.peaks()}
    say(f"made, peak {_gib(peaks['start'])}")
    steps = []
    for step in range(num_steps):
        memory.reset()
        step_began = time.perf_counter()
        inputs, targets = model_inputs(token_rows(config, step), device)
        loss = engine(**inputs, targets=targets)
        engine.backward(loss / cell.tokens)
        report = engine.step()
        assert report is not None and report.applied
        value, peak = loss.item() / cell.tokens, memory.peaks()
        seconds = time.perf_counter() - step_began
        kind = "ordinary" if report.reinit is None else "reinit"
        summary = None if report.reinit is None else report.reinit.summary()
        steps.append({"step": step, "kind": kind, "loss": value, "seconds": seconds, "peak": peak, "reinit": summary})
        say(f"step {step + 1}: {kind}, loss {value:.4f}, {seconds:.1f} s, peak {_gib(peak)}")
        if kind in peaks:
            peak = {name: max(number, peaks[kind][name]) for name, number in peak.items()}
        peaks[kind] = peak
    ordinary = [step["seconds"] for step in steps[1:] if step["kind"] == "ordinary"]
    record = {
        "cell": vars(cell),
        "cap_gib": cap_gib,
        "overrides": list(overrides),
        "before": before,
        "context": memory.context,
        "peaks": peaks,
        "steps": steps,
        "tokens_per_second": cell.tokens * len(ordinary) / sum(ordinary) if ordinary else None,
        "components": components(model, engine),
        "machine": where,
    }
    partial = result.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, result)
    say(f"done, {result}")


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    import bitsandbytes
    import transformers

    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """Of this repository, with a + where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=7", "--dirty=+"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or "unknown"


def _gib(peak: dict[str, int]) -> str:
    return ", ".join(f"{name} {number / GIB:.2f} GiB" for name, number in peak.items())


# ---------------------------------------------------------------- all cells


def summarize(record: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: measured peaks beside those that the planner gives now, GiB."""
    kind = "resident" if record["cell"]["device"] == "cpu" else "driver"
    peaks = {phase: peak[kind] for phase, peak in record["peaks"].items()}
    highest = max(record["peaks"].values(), key=lambda peak: peak[kind])
    planned = plan(Cell(**record["cell"]).config(record["overrides"]))
    differing = [name for name, num in record["components"].items() if num != planned.entries[name]]
    return {
        "cell": record["cell"],
        "measured": max(peaks.values()) / GIB,
        "all": {name: number / GIB for name, number in highest.items()},
        "phases": {phase: number / GIB for phase, number in peaks.items()},
        "planned": planned.total_gib,
        "planned_phases": {phase: planned.peak_bytes(name) / GIB for phase, name in PHASES.items()},
        "ratio": max(peaks.values()) / planned.total_bytes,
        "stays": sum(record["components"].values()) / GIB,
        "components_off": differing,
        "losses": [round(step["loss"], 4) for step in record["steps"]],
        "seconds_reinit": [round(step["seconds"], 1) for step in record["steps"] if step["kind"] == "reinit"],
        "tokens_per_second": record["tokens_per_second"],
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    rows = [
        "| cell | tokens | peak, GiB: start / step / re-initialization | planned | measured / planned | stays, exact "
        "| losses | s per re-initialization | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        line = summarize(record)
        cell, peaks, planned = line["cell"], line["phases"], line["planned_phases"]
        exact = "as planned" if not line["components_off"] else f"differs: {', '.join(line['components_off'])}"
        speed = line["tokens_per_second"]
        losses = [f"{loss:.2f}" for loss in line["losses"]]
        if len(losses) > 6:
            losses = [*losses[:3], "...", *losses[-3:]]
        rows.append(
            f"| {Path(cell['shape']).stem} r{cell['rank']} {cell['device']} | {cell['tokens']} | "
            f"{' / '.join(f'{peaks[name]:.2f}' for name in PHASES)} | "
            f"{' / '.join(f'{planned[name]:.2f}' for name in PHASES)} | "
            f"{line['ratio']:.3f} | {line['stays']:.2f}, {exact} | "
            f"{' '.join(losses)} | {', '.join(f'{s:.0f}' for s in line['seconds_reinit'][:3])} | "
            f"{'' if speed is None else f'{speed:.1f}'} |"
        )
    return "\n".join(rows)


def plan_table(cells: Sequence[Cell], overrides: Sequence[str]) -> str:
    """Planned peaks in GiB as Markdown: a line for each shape and rank, a column for each number of tokens."""
    peaks: dict[tuple[str, int], dict[int, float]] = {}
    for cell in cells:
        total = plan(cell.config(overrides)).total_gib
        peaks.setdefault((Path(cell.shape).stem, cell.rank), {})[cell.tokens] = total
    columns = sorted({cell.tokens for cell in cells})
    rows = [f"| GiB | {' | '.join(f'T={number}' for number in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for (shape, rank), planned in sorted(peaks.items(), key=lambda item: (len(item[0][0]), item[0])):
        cells_of_row = [f"{planned[number]:.1f}" if number in planned else "" for number in columns]
        rows.append(f"| {shape} r{rank} | {' | '.join(cells_of_row)} |")
    return "\n".join(rows)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Measured peaks beside planned ones, and what stays, by component."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [summarize(record) for record in records]
    names = [f"{Path(line['cell']['shape']).stem} r{line['cell']['rank']} t{line['cell']['tokens']}" for line in lines]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.7 * len(lines)))
    left = [0.0] * len(lines)
    positions = list(range(len(lines)))
    for component in records[0]["components"]:
        widths = [record["components"][component] / GIB for record in records]
        if not any(widths):
            continue
        axes.barh([p - 0.2 for p in positions], widths, 0.36, left=left, label=LABELS[component])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    rest = [line["measured"] - start for line, start in zip(lines, left, strict=True)]
    label = "comes and goes, and the interpreter"
    axes.barh([p - 0.2 for p in positions], rest, 0.36, left=left, label=label, color="0.8")
    planned = [line["planned"] for line in lines]
    axes.barh([p + 0.2 for p in positions], planned, 0.36, label="planned", color="0.4")
    axes.set_yticks(positions, names)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def run_cells(cells: Sequence[Cell], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures what is not there yet, each cell in a process of its own; returns all that is there."""
    started = time.perf_counter()
    longest: float | None = None
    failed = []
    for cell in cells:
        result = options.work / f"{cell.name}.json"
        if result.is_file():
            continue
        spent = time.perf_counter() - started
        if options.minutes is not None and longest is not None and spent + longest > 60 * options.minutes:
            print(f"{cell.name} and what follows: next time; the same command goes on", flush=True)
            break
        command = [sys.executable, __file__, "--cell", json.dumps(vars(cell)), "--work", str(options.work)]
        command += ["--steps", str(options.steps), *options.overrides]
        if options.cap_gib is not None:
            command += ["--cap-gib", str(options.cap_gib)]
        cell_began = time.perf_counter()
        # Otherwise glibc keeps freed blocks of up to 32 MiB, and the resident set wanders by 0.2 GiB.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        finished = subprocess.run(command, env=environment, check=False)
        longest = max(longest or 0.0, time.perf_counter() - cell_began)
        if finished.returncode:
            failed.append(cell.name)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    files = [options.work / f"{cell.name}.json" for cell in cells]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="measure on the first CUDA device")
    parser.add_argument("--cap-gib", type=float, help="CUDA: memory the process may use; CPU: what the peak is held to")
    parser.add_argument("--shape", nargs="+", help="names in configs/models, or files; 7b stands for llama_7b")
    parser.add_argument("--rank", type=int, nargs="+", help="ranks, with --shape")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of a micro-batch, with --shape")
    parser.add_argument("--steps", type=int, help="of each cell (default: 4, on CUDA 6)")
    parser.add_argument("--minutes", type=float, help="start no cell that would probably end later than this")
    parser.add_argument("--work", type=Path, default=RESULTS, help="directory of the results (default: %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print what is planned, and measure nothing")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="options to change, after --")
    set_environment()  # before the processes of the cells start
    options = parser.parse_args(arguments)
    options.steps = options.steps or (6 if options.cuda else 4)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.cell is not None:
        cell = Cell(**json.loads(options.cell))
        result = options.work / f"{cell.name}.json"
        measure(cell, result, cap_gib=options.cap_gib, num_steps=options.steps, overrides=options.overrides)
        return 0
    try:
        cells = chosen_cells(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.plan:
        print(plan_table(cells, options.overrides))
        return 0
    records = run_cells(cells, options)
    if records:
        print(table(records))
        (options.work / "table.md").write_text(table(records) + "\n")
        plot(records, options.work / "memory.png")
    cap = options.cap_gib
    above = [line["cell"] for record in records if cap and (line := summarize(record))["measured"] > cap]
    if above:
        print(f"above --cap-gib={cap}: {above}")
    return 0 if len(records) == len(cells) and not above else 1


def chosen_cells(options: argparse.Namespace) -> list[Cell]:
    """The cells of the command line. Raises ValueError for what cannot be measured here."""
    device = "cuda" if options.cuda else "cpu"
    if options.cuda and not options.plan and not torch.cuda.is_available():
        raise ValueError("--cuda: torch sees no CUDA device; leave it out to measure on the CPU")
    if options.shape is None:
        if options.rank or options.tokens:
            raise ValueError("--rank and --tokens need --shape, such as 7b")
        chosen = CUDA_CELLS if options.cuda else CPU_CELLS
    else:
        shapes = [f"llama_{shape}" if shape[:1].isdigit() else shape for shape in options.shape]
        ranks, tokens = options.rank or [256], options.tokens or [128]
        chosen = [(shape, rank, number) for shape in shapes for rank in ranks for number in tokens]
    cells = [Cell(shape, rank, tokens, device) for shape, rank, tokens in chosen]
    for cell in cells:
        plan(cell.config(options.overrides))  # refuses what does not fit the model
    return cells


if __name__ == "__main__":
    sys.exit(main())
