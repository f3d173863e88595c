"""Fine-tuning from the command line: the best checkpoint, early stopping, frozen parameters, and going on."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import llama_config, lm_loss, make_config, token_batch
from killable import run_ranks
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM
from workshop import ZERO2, Result, Workshop, events, losses, main

from loqt_ds.config import DataConfig, load_config
from loqt_ds.data.tokenizer import train_sentencepiece
from loqt_ds.engines.single import SingleEngine
from loqt_ds.export import export_checkpoint
from loqt_ds.generate import Sampling, load, write
from loqt_ds.method.conversion import convert, loqt_layers
from loqt_ds.optim import freeze_full_rank
from loqt_ds.trainer import Trainer

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
    (folder / "train.jsonl").write_text(sums(27, 1))  # one asks what is held out, too: 26 are left
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


def test_the_chat_template_trained_with_travels(workshop: Workshop, examples: dict[str, Any], tmp_path: Path) -> None:
    """Also with the checkpoint, and where a run goes on."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    run, options = tmp_path / "run", examples | {"data__prompt_template": ..., "checkpoint__best": False}
    options |= {
        "data__chat_template": tmp_path / "own.jinja",
        "eval__every": 0,
        "train__epochs": ...,
        "train__max_steps": 1,
    }
    finetune(workshop, run, options, checkpoint__every=1).ok()
    finetune(workshop, run, options, checkpoint__resume="auto", train__max_steps=2, export__format="bf16").ok()
    for directory in (run / "checkpoints" / "step_1" / "tokenizer", run / "export"):
        assert AutoTokenizer.from_pretrained(directory).chat_template == template
    loaded = load(run / "export", None, None, around=DataConfig(messages_field="messages"), device="cpu")
    assert loaded.opening("hi") == loaded.tokenizer.encode("[user]hi[assistant]")
    (tmp_path / "own.jinja").unlink()  # the checkpoint has it
    loaded = load(run / "checkpoints", None, None, around=None, device="cpu")
    assert loaded.opening("hi") == loaded.tokenizer.encode("[user]hi[assistant]")
    ends = loaded.model.generation_config.eos_token_id
    assert loaded.tokenizer.eot_id in (ends if isinstance(ends, list) else [ends])


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


def test_a_killed_run_ends_as_if_it_had_not_been(
    workshop: Workshop, examples: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between checkpoints, after better evaluations than the newest checkpoint knows: the one it goes on from
    still finds its own best one, and does not wait for better than it will reach."""
    (tmp_path / "test.jsonl").write_text(sums(6, 2))
    options = examples | {"eval__every": 1, "eval__patience": 2, "checkpoint__every": 3, "train__epochs": 1.5}
    options |= {"data__validation_path": tmp_path / "test.jsonl", "optim__lr": 0.002, "optim__lr_full_rank": 0.002}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finetune(workshop, whole, options).ok()
    evaluated = {event["step"]: event["loss"] for event in events(whole, "eval")}
    assert evaluated[3] > evaluated[4] > evaluated[5] and max(evaluated) > 5, "else nothing is shown"

    def best(run: Path) -> set[str]:
        return {path.name for path in (run / "best").glob("step_*")}

    record = Trainer._record

    def killed_at_6(self: Trainer, report: Any, *numbers: Any) -> None:
        if report.step == 5:
            raise OSError("killed")
        record(self, report, *numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", killed_at_6)
        assert finetune(workshop, killed, options).status != 0
    assert best(killed) == {"step_3", "step_5"}
    again = finetune(workshop, killed, options, checkpoint__resume="auto").ok()
    assert {event["step"]: event["loss"] for event in events(killed, "eval")} == evaluated
    assert best(killed) == best(whole) and len(best(whole)) == 1 and "looked for from here on" not in again.output


@pytest.fixture(scope="module")
def base(workshop: Workshop, examples: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from."""
    run = tmp_path_factory.mktemp("base") / "run"
    changes = {"train__epochs": 1, "export__format": "bf16", "checkpoint__best": False, "eval__every": 0}
    finetune(workshop, run, examples, **changes).ok()
    return run / "export"


@pytest.mark.parametrize(
    "recipe", ["gsm8k_small", *(pytest.param(f"gsm8k_llama2_{s}b", marks=pytest.mark.slow) for s in (7, 13))]
)
def test_the_twin_of_a_recipe_trains_b_alone(recipe: str, base: Path, examples: dict[str, Any], tmp_path: Path) -> None:
    """Of gsm8k: evaluated before the first step, initialized once, frozen but for B, and left as an adapter."""
    run, hub = tmp_path / "run", tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text(sums(26, 1))
    (hub / "test.jsonl").write_text(sums(6, 2))
    files = [{"split": name, "path": f"{name}.jsonl"} for name in ("train", "test")]
    card = {"configs": [{"config_name": "main", "data_files": files}]}
    (hub / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    place = [f"data.path={hub / 'train.jsonl'}"] if recipe == "gsm8k_small" else [f"data.name={hub}"]
    small = ["data.sequence_length=48", "data.num_processes=1", "train.device=cpu", "train.dtype=fp32", "loqt.rank=8"]
    small += ["train.micro_batch_size=4", "train.gradient_accumulation_steps=1", "train.epochs=1", "eval.every=3"]
    small += ["eval.max_new_tokens=4", "eval.num_samples=1", "eval.sample_tokens=4", "logging.tensorboard=false"]
    small += ["train.lean_activations=true", "checkpoint.every=50", "checkpoint.keep=0", "optim.lr=0.01"]
    done = main(["--config", recipe, f"model.path={base}", f"output_dir={run}", *place, *small], finetune=True).ok()
    steps = max(losses(run))
    assert [event["step"] for event in events(run, "eval")] == [0, 3, 6, *([steps] if steps > 6 else [])]
    assert all(0 <= event["exact_match"] <= 1 for event in events(run, "eval"))
    begun, ended = weights(run / "checkpoints" / "step_0"), weights(run / "checkpoints" / f"step_{steps}")
    original, num_moved = load_file(base / "model.safetensors"), 0
    for name, tensor in begun.items():
        if name in original:  # embeddings, norms, head: as they were read
            assert torch.equal(ended[name], tensor) and torch.equal(tensor, original[name].float())
        elif name.endswith(".B"):
            num_moved += 1
            assert not torch.equal(ended[name], tensor), name
    assert num_moved == 14 and "frozen parameters:" in done.output
    (initialized,) = events(run, "reinit")
    assert initialized["num_kept"] == 0 and initialized["captured_energy"] > 0.5
    assert (run / "export" / "base").is_dir() and (run / "export" / "adapter" / "adapter_config.json").is_file()


def test_how_texts_are_generated_travels(
    workshop: Workshop, base: Path, examples: dict[str, Any], tmp_path: Path
) -> None:
    """The source's generation_config.json, also out of a checkpoint; what the run itself writes does not follow it."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(base, source)
    theirs = {"do_sample": True, "top_p": 0.5, "num_beams": 3, "eos_token_id": [5, 6], "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(theirs))
    options = examples | {"train__epochs": ..., "train__max_steps": 1, "checkpoint__best": False, "eval__every": 0}
    options |= {"model__shape": "null", "model__vocab_size": "null", "data__tokenizer": ..., "model__path": source}
    done = finetune(workshop, run, options, export__format="bf16", eval__num_samples=1).ok()
    assert "held-out prompt ⟶ answer" in done.output
    end = AutoTokenizer.from_pretrained(run / "export").eos_token_id
    export_checkpoint(run, tmp_path / "adapter", format="adapter", verify=False, say=str)
    for directory in (run / "export", tmp_path / "adapter" / "base"):
        written = json.loads((directory / "generation_config.json").read_text())
        assert written == theirs | {"eos_token_id": [5, 6, end]}
    loaded = load(run / "export", None, None, around=DataConfig(prompt_template="Q: {prompt}\nA: "), device="cpu")
    assert 1 <= len(write(loaded, "1 plus 2?", Sampling(4, 0.0, 50), seed=0)) <= 4


def test_the_first_layer_sees_its_gradient_with_frozen_embeddings() -> None:
    """Its P is that of the gradient of a dense model; nothing before the layer needs a gradient."""
    config = make_config(loqt={"schedule": "never", "quantize_w": "none", "quantize_p": "none", "subspace": "exact"})
    torch.manual_seed(0)
    dense = LlamaForCausalLM(llama_config())
    model = copy.deepcopy(dense)
    originals = convert(model, config.loqt)
    freeze_full_rank(model)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == sum(
        p.numel() for n, p in dense.named_parameters() if n.removesuffix(".weight") not in originals
    )
    engine = SingleEngine(model, config, original=originals.__getitem__)
    ids = token_batch(0)
    lm_loss(dense, ids).backward()
    engine.backward(lm_loss(engine, ids))
    engine.step()
    for name, layer in loqt_layers(model).items():
        gradient = dense.get_submodule(name).weight.grad
        assert gradient is not None
        u, _, v = torch.linalg.svd(gradient.double())
        basis = layer.basis_hat().double()
        top = (v[: layer.rank] if layer.side == "right" else u[:, : layer.rank].T).T
        overlap = torch.linalg.svdvals(top.T @ basis)
        assert overlap.min() > 0.99, name


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


@pytest.mark.slow
def test_two_ranks_choose_the_same_best_as_one(workshop: Workshop, examples: dict[str, Any], tmp_path: Path) -> None:
    """The rows of a step, the best checkpoint and the end are those of one process; then two go on from it all."""
    options = examples | {"eval__patience": 2, "export__format": "adapter"}
    alone, together = tmp_path / "alone", tmp_path / "together"
    finetune(workshop, alone, options).ok()

    def two(**changes: Any) -> list[str]:
        given = options | {"output_dir": together, "train__micro_batch_size": 2} | changes
        own = ["--ds_config", str(ZERO2), *workshop.overrides(**given)]
        statuses, printed = run_ranks([own] * 2, folder=tmp_path)
        assert statuses == [0, 0], "\n".join(printed)
        return printed

    printed = two()
    for one, other in zip(events(alone, "eval"), events(together, "eval"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
    (best,), (expected,) = ((run / "best").glob("step_*") for run in (together, alone))
    assert best.name == expected.name and "back to the best" in printed[0] and not printed[1]
    assert (together / "export" / "adapter" / "adapter_model.safetensors").is_file()
    before = len(losses(together))
    two(checkpoint__resume="auto")
    assert len(losses(together)) == before, "nothing is left to do"
    assert [path.name for path in together.glob("export*")] == ["export"]
