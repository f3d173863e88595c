"""tools/compare.py with real runs of a tiny model: one method fails, the command is stopped and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 72,
    "num_hidden_layers": 1,
    "intermediate_size": 104,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
NUM_DOCUMENTS = 24


def write_data(folder: Path) -> str:
    """Some modules of Python's library, a document each; the last ones are held out."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda path: path.stat().st_size)[-NUM_DOCUMENTS:]
    texts = [json.dumps({"text": path.read_text(encoding="utf-8", errors="ignore")[:20000]}) for path in modules]
    (folder / "train.jsonl").write_text("\n".join(texts[:-2]) + "\n")
    (folder / "held_out.jsonl").write_text("\n".join(texts[-2:]) + "\n")
    return f"modules={folder}/train.jsonl:{folder}/held_out.jsonl"


def test_three_methods_stopped_and_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    shape, work, output = tmp_path / "tiny.json", tmp_path / "work", tmp_path / "report"
    shape.write_text(json.dumps(SHAPE))
    command = [sys.executable, str(REPOSITORY / "tools/compare.py"), "--suite", "small", "--shape", str(shape)]
    command += ["--methods", "adamw", "loqt:8", "galore:8", "--steps", "4", "--data", write_data(tmp_path)]
    command += ["--work", str(work), "--output", str(output)]

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/galore_torch.py").write_text("raise ImportError('as the test wants it')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "broken")}

    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 200
    while not list(work.glob("runs/*/progress.json")) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM, said
    assert "stopped; the same command goes on" in said
    assert not list((work / "runs").glob("*galore_8-*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in work.glob("runs/*/result.json")}

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    content = json.loads((output / "results.json").read_text())
    results = {name.partition("-")[2].rsplit("-", 3)[0]: run for name, run in content["runs"].items()}
    assert {name: run["status"] for name, run in results.items()} == {
        "adamw": "done",
        "loqt_8_optim.name=adamw8bit": "done",
        "galore_8": "failed",
    }
    full, ours = results["adamw"], results["loqt_8_optim.name=adamw8bit"]
    # By hand: four square matrices and three of the MLP; embedding, head (4,096 pieces) and three norms.
    adapted, others = 4 * 72**2 + 3 * 72 * 104, 2 * 4096 * 72 + 3 * 72
    assert full["trained_parameters"] == adapted + others
    assert ours["trained_parameters"] == others + 8 * (4 * 72 + 3 * 104)
    assert full["final"]["num_tokens"] == ours["final"]["num_tokens"] == full["data"]["num_validation_tokens"] - 1
    assert full["num_steps"] == 4 and full["curve"][-1][1] < full["curve"][0][1]
    text = (output / "REPORT.md").read_text()
    assert (
        "| adamw | " in text
        and "**failed**: MissingPackage: galore-torch is not installed (as the test wants it)" in text
    )
    assert {"perplexity.png", "final.png", "memory.png"} <= {path.name for path in output.iterdir()}
