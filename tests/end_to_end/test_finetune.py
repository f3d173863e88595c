"""Fine-tuning from the command line: the best checkpoint, early stopping, frozen parameters, and going on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from workshop import Result, Workshop, events, losses, main

from loqt_ds.config import load_config
from loqt_ds.data.tokenizer import train_sentencepiece

# Held-out answers are written backwards, so that what is learned soon makes them less likely: the best evaluation is
# not the last.
OPTIONS: dict[str, Any] = {
    "data__format": "instruction",
    "data__prompt_field": "question",
    "data__response_field": "answer",
    "data__prompt_template": "Q: {prompt}\nA: ",
    "data__sequence_length": 48,
    "data__tokenizer_vocab_size": ...,
    "loqt__schedule": "never",
    "loqt__interval": 100,
    "optim__name": "adamw",
    "optim__lr": 0.02,
    "optim__lr_full_rank": 0.02,
    "optim__schedule": "constant",
    "optim__warmup_steps": 0,
    "train__max_steps": "null",
    "train__epochs": 3,
    "train__dtype": "fp32",
    "eval__every": 2,
    "eval__max_tokens": 100,
    "checkpoint__best": True,
    "checkpoint__every": 3,
    "checkpoint__keep": 0,
}


def sums(num: int, seed: int, *, backwards: bool = False) -> str:
    draw = random.Random(seed)
    lines = []
    for _ in range(num):
        a, b = draw.randint(1, 30), draw.randint(1, 30)
        answer = f"{a}+{b} is\n#### {a + b}"
        lines.append(json.dumps({"question": f"{a} plus {b}?", "answer": answer[::-1] if backwards else answer}))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files of sums, and a tokenizer."""
    folder = tmp_path_factory.mktemp("sums")
    (folder / "train.jsonl").write_text(sums(26, 1))
    (folder / "test.jsonl").write_text(sums(6, 2, backwards=True))
    (folder / "tokenizer.model").write_bytes(train_sentencepiece([sums(60, 3)], 310))
    return OPTIONS | {
        "data__path": folder / "train.jsonl",
        "data__validation_path": folder / "test.jsonl",
        "data__tokenizer": folder / "tokenizer.model",
    }


def finetune(workshop: Workshop, run: Path, options: dict[str, Any], **changes: Any) -> Result:
    return main(workshop.overrides(**(options | {"output_dir": run} | changes)), finetune=True)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_the_best_is_kept_exported_and_found_again(
    workshop: Workshop, examples: dict[str, Any], tmp_path: Path
) -> None:
    """By the loss; stopped in the middle and gone on."""
    run, options = tmp_path / "run", examples
    done = finetune(workshop, run, options, export__format="bf16", eval__num_samples=1).ok()
    assert "train.epochs=3: 20 steps of 4 of the 26 rows" in done.output
    evaluated = {event["step"]: event["loss"] for event in events(run, "eval")}
    assert list(evaluated) == list(range(2, 21, 2)) and sorted(losses(run)) == list(range(1, 21))
    best = min(evaluated, key=lambda step: (evaluated[step], step))
    assert 3 < best < 12, "else nothing is shown"
    assert [path.name for path in (run / "best").glob("step_*")] == [f"step_{best}"]
    (export,) = events(run, "export")
    assert export["step"] == best and export["loss_trained"] == evaluated[best]
    assert export["loss"] == pytest.approx(evaluated[best], rel=0.02)
    assert (
        "held-out prompt ⟶ answer" in done.output and f"best loss {evaluated[best]:.4f} at step {best}" in done.output
    )
    config = load_config(run / "config.yaml")
    assert config.train.max_steps is None and config.train.epochs == 3

    # Gone on after the best, in another directory: the same to the last bit, but that the best has been left behind.
    again = tmp_path / "again"
    resumed = finetune(
        workshop, again, options, checkpoint__resume=run / "checkpoints" / "step_12", eval__patience=50
    ).ok()
    later = {step: loss for step, loss in evaluated.items() if step > 12}
    assert {event["step"]: event["loss"] for event in events(again, "eval")} == later
    ours, theirs = weights(again / "checkpoints" / "step_20"), weights(run / "checkpoints" / "step_20")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "is looked for from here on" in resumed.output
    (found,) = (again / "best").glob("step_*")
    assert found.name == f"step_{min(later, key=lambda step: (later[step], step))}"


def test_patience_ends_a_run_and_a_resumed_one(workshop: Workshop, examples: dict[str, Any], tmp_path: Path) -> None:
    run, options = tmp_path / "run", examples | {"eval__patience": 2}
    done = finetune(workshop, run, options).ok()
    evaluated = {event["step"]: event["loss"] for event in events(run, "eval")}
    last = max(evaluated)
    best = min(evaluated, key=lambda step: (evaluated[step], step))
    assert last == best + 4 and last < 20 and max(losses(run)) == last
    assert f"stopped early after step {last} of 20: 2 evaluations in a row without a better loss" in done.output
    assert (run / "checkpoints" / f"step_{last}").is_dir()
    again = finetune(workshop, run, options, checkpoint__resume="auto").ok()
    assert max(losses(run)) == last and "stopped early" in again.output
    assert f"back to the best loss {evaluated[best]:.4f} at step {best}" in again.output, "found where it was kept"
    finetune(workshop, run, options, checkpoint__resume="auto", eval__patience=3).ok()
    assert max(losses(run)) == last + 2


def test_frozen_parameters_stay_and_every_b_is_trained(
    workshop: Workshop, examples: dict[str, Any], tmp_path: Path
) -> None:
    """From a checkpoint, which is evaluated before the first step; an adapter of B alone."""
    base, run = tmp_path / "base", tmp_path / "run"
    finetune(
        workshop, base, examples, train__epochs=1, export__format="bf16", checkpoint__best=False, eval__every=0
    ).ok()
    options = examples | {"model__shape": "null", "model__vocab_size": "null", "model__path": base / "export"}
    options |= {"data__tokenizer": ..., "optim__train_full_rank": False, "train__lean_activations": True}
    done = finetune(workshop, run, options, train__epochs=1).ok()
    assert [event["step"] for event in events(run, "eval")] == [0, 2, 4, 6, 7]
    begun, ended = weights(run / "checkpoints" / "step_0"), weights(run / "checkpoints" / "step_7")
    original = load_file(base / "export" / "model.safetensors")
    num_moved = 0
    for name, tensor in begun.items():
        if name in original:  # embeddings, norms, head: as they were read
            assert torch.equal(ended[name], tensor) and torch.equal(tensor, original[name].float())
        elif name.endswith(".B"):
            num_moved += 1
            assert not torch.equal(ended[name], tensor), name
    assert num_moved == 14 and "frozen parameters:" in done.output
    (initialized,) = events(run, "reinit")
    assert initialized["num_kept"] == 0 and initialized["captured_energy"] > 0.5


def test_the_launcher_refuses_text_and_says_what_else(workshop: Workshop, tmp_path: Path) -> None:
    done = main(workshop.overrides(output_dir=tmp_path / "run"), finetune=True)
    assert done.status == 2 and "launch/finetune.py with data.format=text" in done.errors
    assert "launch/pretrain.py" in done.errors


@pytest.mark.slow
def test_under_deepspeed_with_exact_match(workshop: Workshop, examples: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    forwards = tmp_path / "test.jsonl"
    forwards.write_text(sums(6, 2))
    options = examples | {"eval__metric": "exact_match", "eval__max_new_tokens": 8, "eval__max_examples": 5}
    options |= {"data__validation_path": forwards, "train__epochs": 1}
    done = workshop.train(deepspeed=True, **(options | {"output_dir": run})).ok()
    assert "5 of 6 held-out prompts are answered" in done.output
    evaluated = events(run, "eval")
    assert [event["step"] for event in evaluated] == [2, 4, 6, 7]
    assert all(event["exact_match"] in {n / 5 for n in range(6)} for event in evaluated)
    alone = tmp_path / "alone"
    finetune(workshop, alone, options).ok()
    for one, other in zip(evaluated, events(alone, "eval"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
