"""tools/glue.py: all methods start from the same function, and the command leaves a report and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from loqt_ds.data.wordpiece import train_wordpiece

WORDS = [f"{a}{b}" for a in ("ka", "ri", "mo", "te", "lu") for b in ("n", "s", "do", "pi", "ve", "ga")]


def sentence(draw: np.random.Generator, length: int = 7) -> list[str]:
    return list(draw.choice(WORDS, length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with its tokenizer, and two tasks of few rows: is `kan` in a sentence; how many words do two share."""
    folder = tmp_path_factory.mktemp("glue")
    draw = np.random.default_rng(0)
    tokenizer = train_wordpiece([" ".join(sentence(draw)) for _ in range(200)], 120)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, hidden_dropout_prob=0.0, **shape)
    BertForMaskedLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, count in (("train", 96), ("dev", 40)):
        lines, pairs = ["sentence\tlabel"], ["sentence1\tsentence2\tscore"]
        for _ in range(count):
            words = sentence(draw)
            if draw.random() < 0.4:
                words[0] = "kan"
            lines.append(f"{' '.join(words)}\t{int('kan' in words)}")
            shared = int(draw.integers(0, 6))
            pairs.append(f"{' '.join(words)}\t{' '.join([*words[:shared], *sentence(draw, 7 - shared)])}\t{shared:.3f}")
        for task, rows in (("SST-2", lines), ("STS-B", pairs)):
            (folder / "tasks" / task).mkdir(parents=True, exist_ok=True)
            (folder / "tasks" / task / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture()
def glue(monkeypatch: pytest.MonkeyPatch, repository: Path) -> Any:
    monkeypatch.syspath_prepend(str(repository / "tools"))
    return pytest.importorskip("glue", reason="needs matplotlib and the comparison's tools")


def small(glue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rank 8, four steps a run."""
    monkeypatch.setattr(glue, "STEPS", dict.fromkeys(glue.STEPS, 4))

    def spec(self: Any, task: str, method: str, seed: int, lr: float) -> Any:
        return glue.Spec(task, method, seed, lr, 4, rows=8, length=32, rank=8, interval=2)

    monkeypatch.setattr(glue.Plan, "spec", spec)


def arguments(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    where = ["--base", folder / "base", "--glue", folder / "tasks", "--work", tmp_path / "work"]
    return [str(part) for part in (*where, "--output", tmp_path / "report", *more)]


def test_one_command_to_a_report_that_goes_on(
    glue: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    small(glue, monkeypatch)
    assert glue.main(arguments(folder, tmp_path, "--tasks", "stsb", "--seeds", "1")) == 0
    content = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(content["results"]) == 4
    by_method = {r["spec"]["method"]: r for r in content["results"]}
    assert by_method["nomerge"]["trained_parameters"] == by_method["loqt"]["trained_parameters"]
    assert by_method["lora"]["trained_parameters"] > by_method["loqt"]["trained_parameters"]  # A, too
    assert by_method["full"]["trained_parameters"] > by_method["lora"]["trained_parameters"]
    assert all({"pearson", "spearman", "glue"} <= set(r["final"]) for r in by_method.values())
    report = (tmp_path / "report" / "REPORT.md").read_text()
    assert all(label in report for label in ("full fine-tuning", "LoRA (PEFT)", "LoQT, merging", "LoQT, no merge"))
    assert not list((tmp_path / "work").glob("*.run"))
    # again: nothing is repeated
    seen: list[Any] = []
    monkeypatch.setattr(glue, "run", lambda spec, *_: seen.append(spec.name))
    capsys.readouterr()
    assert glue.main(arguments(folder, tmp_path, "--tasks", "stsb", "--seeds", "1")) == 0
    assert seen == []


def test_all_methods_start_from_the_same_function(glue: Any, folder: Path, tmp_path: Path) -> None:
    """Before the first step a LoQT model without quantization, a dense one and one with LoRA give the same logits."""
    pytest.importorskip("peft")
    import glue_run

    from loqt_ds.data import build_data, load_or_train_tokenizer
    from loqt_ds.evaluation import model_inputs
    from loqt_ds.preflight import configure_model, resolve_config
    from loqt_ds.ranks import ALONE
    from loqt_ds.run import load_model

    spec = glue.Spec("sst2", "loqt", 3, 1e-3, 4, rows=8, length=32, rank=8, interval=2)
    config = glue_run.config_of(spec, folder / "base", folder / "tasks", tmp_path / "run")
    config.loqt.quantize_w, config.loqt.compensation_steps = "none", 0
    config.train.lean_activations = False
    device = torch.device("cpu")
    config = resolve_config(config, device)
    tokenizer = load_or_train_tokenizer(config, lambda _: None)
    description = configure_model(config, tokenizer)
    inputs, _ = model_inputs(build_data(config, tokenizer, say=lambda _: None).train.next_batch(), device)
    del inputs["use_cache"]
    ours, _ = load_model(config, description, device, ALONE, resumed=False, say=lambda _: None)
    dense = glue_run.dense_model(config, description)
    adapted = glue_run.dense_model(config, description)
    glue_run.add_lora(adapted, 8)
    with torch.no_grad():
        first, *others = (model.eval()(**inputs).logits for model in (dense, adapted, ours))
    assert all(torch.allclose(first, other, atol=1e-6) for other in others)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith(("classifier", "bert.pooler")) for name in trained)


def test_the_best_rate_is_the_best_of_all_tasks(glue: Any) -> None:
    def result(method: str, lr: float, score: float) -> dict[str, Any]:
        return {"spec": {"method": method, "lr": lr}, "final": {"glue": score}}

    found = [result("lora", 1.0, 0.9), result("lora", 1.0, 0.1), result("lora", 2.0, 0.6), result("lora", 2.0, 0.5)]
    assert glue.best_rates([*found, result("full", 3.0, 0.0)]) == {"lora": 2.0, "full": 3.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--glue", "nowhere"], "is not there; correct the path"),
        (["--seeds", "0"], "give at least one seed"),
        (["--report"], "holds no run of this plan"),
    ],
)
def test_mistakes(
    glue: Any, folder: Path, tmp_path: Path, changed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert glue.main([*arguments(folder, tmp_path, "--tasks", "sst2"), *changed]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_another_encoder_are_refused(
    glue: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    spec = glue.Plan(["sst2"], ["full"], 1, 1.0).judged({"full": glue.RATES["full"]})[0]
    (work / f"{spec.name}.json").write_text(json.dumps({"encoder": "another"}))
    assert glue.main(arguments(folder, tmp_path, "--tasks", "sst2", "--methods", "full", "--seeds", "1")) == 2
    assert "is a run from another encoder" in capsys.readouterr().err
