"""tools/benchmark.py with real processes: two contenders and one that fails, stopped and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONTENT = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "intermediate_size": 200,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools/benchmark.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_two_contenders_in_turns_and_on_from_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    shape = tmp_path / "tiny.json"
    shape.write_text(json.dumps(CONTENT))
    work = tmp_path / "work"
    command = ["--shape", shape, "--contenders", "adamw", "loqt:10", "loqt:1000", "--rows", 3, "--length", 37]
    first = benchmark(*command, "--work", work, "--rounds", 1)
    assert first.returncode == 0, first.stderr
    file = work / "tiny_fp32_3x37_cpu.json"
    record = json.loads(file.read_text())
    assert [sorted(entry) for entry in record["rounds"]] == [["adamw", "loqt:10"]]
    entries = record["contenders"]
    assert entries["loqt:1000"]["status"] == "failed" and "loqt.rank=1000" in entries["loqt:1000"]["error"]
    # By hand: four square matrices and three of the MLP in each layer; embedding, head, norms.
    adapted = 2 * (4 * 72**2 + 3 * 72 * 200)
    others = 2 * 300 * 72 + 5 * 72
    assert entries["adamw"]["bytes"]["gradients"] == 4 * (adapted + others)
    assert entries["loqt:10"]["bytes"]["gradients"] == 4 * (others + 2 * 10 * (4 * 72 + 3 * 200))
    second = benchmark(*command, "--work", work, "--rounds", 2)
    assert second.returncode == 0, second.stderr
    grown = json.loads(file.read_text())
    assert grown["rounds"][0] == record["rounds"][0] and len(grown["rounds"]) == 2
    loss = grown["rounds"][1]["loqt:10"][0]["loss"]
    assert loss < entries["loqt:10"]["first_loss"]
    text = (work / "README.md").read_text()
    assert "| loqt:10 |" in text and "| loqt:1000 | failed: ValueError: loqt.rank=1000" in text
    assert {"ratios.png", "parts.png"} <= {path.name for path in work.iterdir()}
