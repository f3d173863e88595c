"""tools/fit.py on a small shape: what it counts, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks/results/fit"
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, RANK = 72, 200, 3, 331, 10


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    content |= {"intermediate_size": INTERMEDIATE, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 12}
    file = tmp_path_factory.mktemp("shape") / "tiny.json"
    file.write_text(json.dumps(content | {"max_position_embeddings": 512, "tie_word_embeddings": False}))
    return file


def fit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools/fit.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_cells_are_measured_once_and_count_what_there_is(shape: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    command = ["--shape", shape, "--rank", RANK, "--tokens", 37, 512, "--work", tmp_path]
    first = fit(*command, "--minutes", 0)  # one cell, however long it takes
    assert first.returncode == 1 and "goes on" in first.stdout, first.stderr
    files = [tmp_path / f"tiny_r{RANK}_t{tokens}_cpu.json" for tokens in (37, 512)]
    assert files[0].is_file() and not files[1].exists()
    measured_at = os.stat(files[0]).st_mtime_ns
    second = fit(*command)
    assert second.returncode == 0, second.stderr
    assert os.stat(files[0]).st_mtime_ns == measured_at, "what is there is not measured again"
    assert "| tiny r10 cpu | 512 |" in second.stdout and (tmp_path / "memory.png").is_file()
    assert second.stdout.count("as planned") == 2, "what stays is planned exactly"
    for file in files:
        record = json.loads(file.read_text())
        kinds = [step["kind"] for step in record["steps"]]
        assert kinds == ["reinit", "ordinary", "reinit", "ordinary"]
        losses = [step["loss"] for step in record["steps"]]
        assert losses[-1] < losses[0] and abs(losses[0] - torch.tensor(VOCABULARY).log()) < 0.5
        assert all(layer["num_kept"] == 0 for step in record["steps"] if (layer := step["reinit"]))
        # By hand: four square matrices and three of the MLP in each layer, a row for each token, norms.
        adapted = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
        factors = LAYERS * RANK * (4 * HIDDEN + 3 * INTERMEDIATE)
        full = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
        counted = record["components"]
        assert counted["factors_b"] == 2 * factors and counted["full_rank_parameters"] == 2 * full
        assert counted["masters"] == 0
        assert 0.5 * adapted < counted["weights_w"] < 0.53 * adapted
        assert set(record["peaks"]) == {"start", "ordinary", "reinit"}
        assert record["peaks"]["reinit"]["resident"] > sum(counted.values())


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    """tools/fit.py as a module."""
    spec = importlib.util.spec_from_file_location("tool_fit", REPOSITORY / "tools/fit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tool_fit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tool_fit"]


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_the_planner_is_within_a_tenth_of_what_was_measured(tool: ModuleType, file: Path) -> None:
    line = tool.summarize(json.loads(file.read_text()))
    assert line["ratio"] == pytest.approx(1, abs=0.1)
    assert not line["components_off"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "7b", "--tokens", "300"], "--tokens 300"),
        (["--rank", "8"], "--shape"),
        (["--shape", "llama_9m", "--rank", "4000"], "loqt.rank=4000"),
        (["--shape", "nothing_like_it"], "nothing_like_it"),
        pytest.param(["--cuda"], "--cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tool: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*arguments, "--work", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
