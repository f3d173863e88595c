"""tools/compare_run.py: one run, however it ends; paused and gone on with, it is the same run."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loqt_ds.evaluation import evaluate

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def compare_run(repository: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("compare_run")
    sys.path.remove(str(repository / "tools"))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all runs here have in common: a small shape and 400 documents of sentences that repeat themselves."""
    folder = tmp_path_factory.mktemp("compare_run")
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(150)]
    documents = [{"text": " ".join(draw.choices(words, k=60))} for _ in range(400)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return {
        "data": (
            f"data.path={folder}/text.jsonl",
            "data.tokenizer_vocab_size=300",
            f"data.cache_dir={folder}/cache",
            "data.num_processes=1",
        ),
        "shape": str(folder / "shape.json"),
        "rows": 3,
        "length": 33,
        "steps": 6,
        "interval": 2,
        "eval_every": 3,
        "eval_tokens": 200,
        "lr": 1e-2,
        "lr_full_rank": 3e-3,
    }


def test_a_run_tells_what_it_came_to(compare_run: Any, content: dict[str, Any], tmp_path: Path) -> None:
    spec = compare_run.Spec("loqt:8", **content)
    assert compare_run.Spec.from_json(spec.to_json()) == spec
    compare_run.run(spec, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "done" and len(result["losses"]) == 6
    assert [tokens for tokens, _ in result["curve"]] == [0, 297, 594]
    # a model of random weights knows nothing
    assert result["curve"][0][1] == pytest.approx(math.log(320), rel=0.02)
    final = result["final"]
    assert final["num_tokens"] == result["data"]["num_validation_tokens"] - 1  # whole documents, joined
    batches = math.ceil(final["num_tokens"] / 99)
    assert final["biased_perplexity"] == pytest.approx(final["perplexity"] ** (batches / (batches + 1)), rel=1e-9)
    assert result["num_refreshes"] == 2 and result["refresh_seconds"] > 0  # after steps 0 and 3: the gap is 2 + 1
    factors = 2 * (4 * 64 + 3 * 192) * 8  # B has the larger side
    assert result["trained_parameters"] == factors + 2 * 320 * 64 + 5 * 64


@pytest.mark.parametrize("method", ["adamw", "galore:8", "relora:8", "loqt:8+optim.name=adamw8bit"])
def test_a_run_that_paused_is_the_same_run(
    compare_run: Any, content: dict[str, Any], tmp_path: Path, method: str
) -> None:
    pytest.importorskip("galore_torch", reason="the compare extra is not installed")
    pytest.importorskip("peft", reason="the compare extra is not installed")
    spec = compare_run.Spec(method, **content)
    straight = compare_run.run(spec, tmp_path / "straight")
    assert straight["status"] == "done", straight
    for _ in range(5):
        assert compare_run.run(spec, tmp_path / "paused", lambda: True)["status"] == "paused"
        assert not (tmp_path / "paused/result.json").exists()
    result = compare_run.run(spec, tmp_path / "paused")
    assert not (tmp_path / "paused/state.pt").exists()
    assert result["num_parts"] == 6
    for name in ("losses", "curve", "final", "trained_parameters", "num_refreshes"):
        assert result[name] == straight[name], name


def test_all_methods_see_the_same_rows(compare_run: Any, content: dict[str, Any], tmp_path: Path) -> None:
    def rows(method: str, seed: int) -> list[torch.Tensor]:
        comparand = compare_run.Comparand(compare_run.Spec(method, **content, seed=seed), tmp_path)
        return [comparand.bundle.train.next_batch()["input_ids"] for _ in range(3)]

    for one, other in zip(rows("adamw", 1), rows("loqt:8", 1), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(rows("adamw", 1)[0], rows("adamw", 2)[0])


def test_a_run_goes_on_from_another(compare_run: Any, content: dict[str, Any], tmp_path: Path) -> None:
    """Its base is what transformers loads; it is evaluated as it starts, when it is initialized, and on other text."""
    steps = {"steps": 2, "eval_every": 2}
    result = compare_run.run(compare_run.Spec("adamw", **content | steps, keep_model=True), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "model")
    spec = compare_run.Spec(
        "loqt:8+loqt.schedule=never",
        **content | steps | {"seed": 1},
        start=str(tmp_path / "base" / "model"),
        also=content["data"],
    )
    comparand = compare_run.Comparand(spec, tmp_path)
    assert evaluate(model, comparand.bundle.validation.batches(3), torch.device("cpu")).loss == pytest.approx(
        result["final"]["loss"], rel=1e-5
    )
    later = compare_run.run(spec, tmp_path / "later")
    assert later["status"] == "done", later
    tokens, losses = zip(*later["curve"], strict=True)
    assert tokens == (0, 99, 198) and losses == tuple(loss for _, loss in later["also_curve"])
    assert losses[0] == pytest.approx(result["curve"][-1][1], abs=0.02), "W in NF4 is all that differs"
    assert later["also_final"]["loss"] == later["final"]["loss"] and later["num_refreshes"] == 1


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ("loqt:8", {"keep_model": True}, "no full weights"),
        ("adamw", {"start": "nowhere"}, "nowhere is not a directory"),
    ],
)
def test_what_cannot_go_on_is_told(
    compare_run: Any, content: dict[str, Any], tmp_path: Path, method: str, changes: dict[str, Any], told: str
) -> None:
    result = compare_run.run(compare_run.Spec(method, **content | changes), tmp_path)
    assert result["status"] == "failed" and told in result["error"]


@pytest.mark.parametrize(
    ("method", "changes", "status", "told"),
    [
        ("adamw", {"lr": 3e3, "lr_full_rank": 3e3}, "diverged", ""),
        ("loqt:4000", {}, "failed", "loqt.rank=4000"),
        ("adamw", {"rows": 4000, "length": 64}, "failed", "tokens"),
        # the last update is judged as well, by the evaluations after it
        ("adamw", {"lr": 1e9, "lr_full_rank": 1e9, "steps": 1}, "diverged", ""),
    ],
)
def test_what_goes_wrong_is_a_result(
    compare_run: Any, content: dict[str, Any], tmp_path: Path, method: str, changes: Any, status: str, told: str
) -> None:
    result = compare_run.run(compare_run.Spec(method, **{**content, **changes}), tmp_path)
    assert result["status"] == status
    assert told in result.get("error", "")
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert json.loads((tmp_path / "result.json").read_text())["status"] == status


def test_a_run_that_was_killed_goes_on_from_its_last_evaluation(
    compare_run: Any, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = compare_run.Spec("loqt:8", **content)
    straight = compare_run.run(spec, tmp_path / "straight")
    original = compare_run.Comparand._step

    def killed(self: Any) -> float:
        if len(self.losses) == 5:
            raise SystemExit  # no Exception: nothing is written after it
        return float(original(self))

    monkeypatch.setattr(compare_run.Comparand, "_step", killed)
    with pytest.raises(SystemExit):
        compare_run.run(spec, tmp_path / "killed")
    monkeypatch.undo()
    saved = torch.load(tmp_path / "killed/state.pt", weights_only=True)
    assert len(saved["losses"]) == 3
    assert compare_run.run(spec, tmp_path / "killed")["losses"] == straight["losses"]


def test_descriptions_with_unknown_fields_are_refused(compare_run: Any, content: dict[str, Any]) -> None:
    text = json.dumps({**content, "method": "adamw", "learning_rate": 1})
    with pytest.raises(ValueError, match="learning_rate"):
        compare_run.Spec.from_json(text)
