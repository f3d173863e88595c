"""tools/adapt.py: a base, what goes on from it, and the reports; every run in this process, on a tiny model."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_rivals import write_shape
from transformers import AutoModelForCausalLM, AutoTokenizer

PIECES = 400
ONCE = "loqt:8+optim.name=adamw+loqt.schedule=never"


@pytest.fixture(scope="module")
def adapt(repository: Path) -> Iterator[Any]:
    """The module, imported as `python tools/adapt.py` does."""
    before = set(sys.modules)
    sys.path.insert(0, str(repository / "tools"))
    yield importlib.import_module("adapt")
    sys.path.remove(str(repository / "tools"))
    for name in set(sys.modules) - before:
        if str(repository / "tools") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write_text(file: Path, letters: str, num_documents: int, seed: int) -> Path:
    """Documents of made-up words of some letters."""
    draw = random.Random(letters)
    words = ["".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(80)]
    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=50))}) for _ in range(num_documents)]
    file.write_text("\n".join(lines) + "\n")
    return file


def write_questions(file: Path, number: int, seed: int) -> Path:
    """Sums, of fields as in GSM8K."""
    draw, lines = random.Random(seed), []
    for _ in range(number):
        one, two = draw.randint(1, 40), draw.randint(1, 40)
        lines.append(json.dumps({"question": f"{one} + {two}", "answer": f"{one + two}"}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of the command: two languages of different letters."""
    folder = tmp_path_factory.mktemp("adapt")
    said = []
    for name, letters in (("english", "abcdefghijklm"), ("icelandic", "nopqrstuvwxyzþæð")):
        train = write_text(folder / f"{name}.jsonl", letters, 60, 1)
        said += [f"--{name}", f"{train}:{write_text(folder / f'{name}_valid.jsonl', letters, 6, 2)}"]
    return said


@pytest.fixture
def small(adapt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The suites, made tiny."""
    monkeypatch.setenv("LOQT_CACHE", str(tmp_path / "cache"))
    shape = write_shape(tmp_path, vocab_size=PIECES + 48)
    spec = {
        "rows": 2,
        "length": 32,
        "steps": 4,
        "interval": 2,
        "eval_every": 2,
        "eval_tokens": 192,
        "final_tokens": 320,
    }

    def tiny(suite: Any, **changes: Any) -> Any:
        return replace(suite, scales=((shape, 8),), spec={**suite.spec, **spec}, vocabulary=4096, **changes)

    suites = {
        "icelandic": tiny(adapt.SUITES["icelandic"], methods=("adamw", ONCE)),
        "nomerge": tiny(adapt.SUITES["nomerge"], methods=(ONCE, "lora:8", "lqlora:8"), seeds=1, search=(1.0, 2.0)),
    }
    monkeypatch.setattr(adapt, "SUITES", suites)
    monkeypatch.setattr(adapt, "BASE", tiny(adapt.BASE))
    monkeypatch.setattr(adapt, "VOCABULARY", PIECES)
    return suites


class InProcess:
    """Does what `compare.Runner` does, without processes."""

    def __init__(self, plan: Any, work: Path, **_: Any) -> None:
        self.plan, self.work = plan, work

    def run(self) -> bool:
        compare_run, compare = sys.modules["compare_run"], sys.modules["compare"]
        while True:
            results = compare.known_results(self.work, self.plan)
            left = [row.spec for row in self.plan.rows(results) if row.spec is not None and row.key not in results]
            if not left:
                return True
            result = compare_run.run(left[0], compare.directory_of(self.work, left[0]))
            assert result["status"] == "done", result


@pytest.mark.slow
def test_both_suites_from_one_base(
    adapt: Any, small: dict[str, Any], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="the compare extra is not installed")
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    monkeypatch.setattr(adapt, "Runner", InProcess)
    work, found = tmp_path / "work", {}
    for suite in ("icelandic", "nomerge"):
        output = tmp_path / suite
        command = ["--suite", suite, *texts, "--work", str(work), "--output", str(output)]
        if suite == "nomerge":
            train = write_questions(tmp_path / "train.jsonl", 30, 1)
            command += ["--gsm8k", f"{train}:{write_questions(tmp_path / 'test.jsonl', 12, 2)}"]
        assert adapt.main(command) == 0
        before = {file: file.stat().st_mtime_ns for file in work.glob("runs/*/result.json")}
        assert adapt.main([*command, "--report"]) == 0
        assert before == {file: file.stat().st_mtime_ns for file in work.glob("runs/*/result.json")}
        found[suite] = json.loads((output / "results.json").read_text())
        found[suite]["text"] = (output / "REPORT.md").read_text()
    base = found["icelandic"]["base"]
    assert base == found["nomerge"]["base"], "one base for both"

    # transformers, on the first held-out tokens of the second text
    model = AutoModelForCausalLM.from_pretrained(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    ids: list[int] = []
    held_out = Path(texts[3].partition(":")[2])
    for line in held_out.read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    total = 0.0
    for start in range(0, 320, 32):
        row = torch.tensor([ids[start : start + 33]])
        logits = model(row[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    assert base["also_final"]["num_tokens"] == 320
    assert base["also_final"]["loss"] == pytest.approx(total / 320, rel=1e-4)

    runs = {run["spec"]["method"]: run for run in found["icelandic"]["runs"].values()}
    assert set(runs) == {"adamw", ONCE}
    for name, run in runs.items():
        assert [tokens for tokens, _ in run["curve"]] == [0, 64, 128, 256]
        assert len(run["also_curve"]) == 4 and run["final"]["loss"] < run["curve"][0][1]
        if name != ONCE:  # LoQT begins as NF4
            assert run["also_curve"][0][1] == pytest.approx(base["curve"][-1][1], rel=1e-4)
    forgotten = runs["adamw"]["also_final"]["perplexity"] / base["final"]["perplexity"]
    (row,) = [line for line in found["icelandic"]["text"].splitlines() if line.startswith("| full |")]
    assert f" {forgotten:.2f} " in row and f" {runs['adamw']['final']['perplexity']:.2f} " in row

    trained = {run["spec"]["method"]: run["trained_parameters"] for run in found["nomerge"]["runs"].values()}
    assert trained[ONCE] < trained["lora:8"] == trained["lqlora:8"] < base["trained_parameters"]
    (row,) = [line for line in found["nomerge"]["text"].splitlines() if line.startswith("| LoQT, no merge |")]
    entry = next(item for item in found["nomerge"]["summary"] if item["contender"] == ONCE)
    assert f" {entry['initialized_loss']['0']:.4f} " in row and f" {entry['loss']['0']:.4f} " in row
    assert "The search of the learning rate" in found["nomerge"]["text"]


def test_the_shipped_suites_can_be_run(adapt: Any) -> None:
    """Every method's options, rank and rates; every row has a name of its own in the report."""
    suites = importlib.import_module("adapt_suites")
    for suite in (adapt.BASE, *adapt.SUITES.values()):
        adapt.check_all(suite)
        if suite is adapt.BASE:
            continue
        labels = [suites.label(suite.name, name) for name in suite.contenders(suite.scales[0][1])]
        assert len(set(labels)) == len(labels) == len(suites.LABELS[suite.name]) and not any(":" in x for x in labels)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--suite", "nomerge"], "needs --gsm8k"),
        (["--gsm8k", "a:b"], "reads no --gsm8k"),
        (["--suite", "nomerge", "--gsm8k", "a.jsonl"], "TRAIN:VALIDATION"),
        (["--steps", "0"], "--steps 0"),
        (["--minutes", "0.5"], "at least"),
        (["--methods", "adam"], "suite icelandic has adamw"),
        (["--english", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_told(
    adapt: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], said: str
) -> None:
    command = ["--suite", "icelandic", *texts, "--work", str(tmp_path / "work")]
    assert adapt.main([*command, *changes]) == 2
    assert said in capsys.readouterr().err
