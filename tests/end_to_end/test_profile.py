"""tools/profile_step.py on a small shape: every product is put down to the part it is counted in; table and trace."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from workshop import REPOSITORY

SHAPE = {
    **{"model_type": "llama", "vocab_size": 211, "max_position_embeddings": 64, "tie_word_embeddings": False},
    **{"hidden_size": 48, "intermediate_size": 116, "num_hidden_layers": 2, "num_attention_heads": 4},
}

# Runs in a process of its own: the tool puts its ranges into classes.
DRIVER = """
import json, sys
from torch.profiler import profile
import profile_step as tool

tool.mark_all()
for overrides in (["loqt.product=factored"], ["loqt.product=merged", "train.gradient_accumulation_steps=2"], None):
    full_rank = overrides is None
    options = tool.parser().parse_args([*sys.argv[1:], *(overrides or [])])
    config, engine, batches, device = tool.build(tool.configuration(options), full_rank=full_rank)
    for _ in range(2):
        tool.take_step(engine, batches, device)
    with profile(activities=[tool.ProfilerActivity.CPU], record_shapes=True) as profiler:
        tool.take_step(engine, batches, device)
    found = {}
    for event in profiler.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (rows, inner), (_, columns) = event.input_shapes[event.name != "aten::mm" :][:2]
            part = str(tool.part_of(event))
            found[part] = found.get(part, 0) + 2 * rows * inner * columns
    works = tool.step_work(config, full_rank=full_rank)
    print("FOUND", json.dumps([found, {name: work.operations for name, work in works.items() if work.operations}]))
"""


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps(SHAPE))
    return str(tmp_path / "tiny.json")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(REPOSITORY / "tools"), str(REPOSITORY)))}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, timeout=240, check=False
    )


def test_products_are_put_down_to_their_parts(shape: str) -> None:
    """Factored, merged, and in full rank."""
    finished = run("-c", DRIVER, "--shape", shape, "--rank", 8, "--tokens", 64, "train.dtype=fp32", "train.device=cpu")
    assert finished.returncode == 0, finished.stderr
    cases = [json.loads(line[5:]) for line in finished.stdout.splitlines() if line.startswith("FOUND")]
    assert len(cases) == 3
    for found, counted in cases:
        attention = counted.pop("attention")  # is one operation on a CPU
        assert found == counted and attention > 0


def test_a_table_and_a_trace(shape: str, tmp_path: Path) -> None:
    trace, work = tmp_path / "trace.json.gz", tmp_path / "work"
    finished = run(
        *(REPOSITORY / "tools/profile_step.py", "--shape", shape, "--rank", 8, "--tokens", 64, "--steps", 1),
        *("--trace", trace, "--work", work, "train.dtype=fp32", "train.device=cpu", "optim.name=adamw"),
    )
    assert finished.returncode == 0, finished.stderr
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"part: products", "aten::mm"} <= {event.get("name") for event in events}
    (file,) = work.glob("*.json")
    assert file.name == "tiny_r8_fp32_t64_adamw.json"
    record = json.loads(file.read_text())
    for kind in ("ordinary", "reinit"):
        measured = record[kind]
        spent = sum(part["operations"] for part in measured["parts"].values())
        assert 0 < spent < measured["wall"]
    steps = {"products", "low_rank", "dequantization", "head", "attention", "elementwise", "optimizer"}
    assert all(record["ordinary"]["parts"][name]["operations"] > 0 for name in steps)
    more = {"tap", "decompose", "merge", "compensate", "quantize"}
    assert all(record["reinit"]["parts"][name]["operations"] > 0 for name in steps | more)
    assert not more & {name for name, part in record["ordinary"]["parts"].items() if part["operations"]}
    text = (work / "README.md").read_text()
    assert "| products of W |" in text and "| **step** |" in text and "re-init.: compensation" in finished.stdout
