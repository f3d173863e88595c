"""Every shipped recipe and every shipped DeepSpeed configuration runs, shrunken, through to a reloaded export."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from killable import run_ranks
from workshop import REPOSITORY, TINY, Workshop, command, events, losses, main, write_corpus

from loqt_ds.config import load_config

ALL = sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))
MODELS = {path: yaml.safe_load(path.read_text(encoding="utf-8")).get("model", {}) for path in ALL}
# Those that pretrain from drawn weights; what starts from a checkpoint or has another task has tests of its own.
SHAPED = [path for path, model in MODELS.items() if "shape" in model and "task" not in model]
OF_SEVERAL_RANKS = [path for path in SHAPED if "\nengine: fsdp2\n" in path.read_text(encoding="utf-8")]
RECIPES = [path for path in SHAPED if path not in OF_SEVERAL_RANKS]
DEEPSPEED = sorted((REPOSITORY / "configs").glob("*.json"))

# What makes a twin small. Everything else is the recipe's: schedule, compensation, double quantization, subspace,
# masters, layer-wise updates, rates, packing, streaming, dtype, activation checkpointing.
SMALL = {
    "model.vocab_size": "auto",
    "data.tokenizer_vocab_size": 400,
    "data.sequence_length": 32,
    "data.num_processes": 1,
    "data.tokenizer": "null",
    "loqt.rank": 16,
    "loqt.interval": 2,
    "train.max_steps": 5,
    "train.micro_batch_size": 4,
    "train.device": "cpu",
    "eval.every": 3,
    "eval.max_tokens": 256,
    "eval.num_samples": 1,
    "eval.sample_tokens": 4,
    "checkpoint.every": 2,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as the hub would have it: configuration `en`, splits train and validation."""
    folder = tmp_path_factory.mktemp("hub") / "c4"
    (folder / "en").mkdir(parents=True)
    write_corpus(folder / "en" / "train.jsonl", num_documents=80, seed=3)
    write_corpus(folder / "en" / "validation.jsonl", num_documents=8, seed=4)
    card = {
        "configs": [
            {
                "config_name": "en",
                "data_files": [
                    {"split": "train", "path": "en/train.jsonl"},
                    {"split": "validation", "path": "en/validation.jsonl"},
                ],
            }
        ]
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")
    return folder


def twin(recipe: Path, workshop: Workshop, hub: Path, run: Path) -> list[str]:
    """Overrides that shrink a recipe; data come from where the recipe takes them: local files, or a named data set."""
    values: dict[str, Any] = SMALL | {"model.shape": workshop.shape, "output_dir": run}
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data = content.get("data", {})
    if data.get("name"):
        values["data.name"] = hub
    elif data.get("path"):
        values["data.path"] = workshop.corpus
        if data.get("validation_path"):
            values["data.validation_path"] = hub / "en" / "validation.jsonl"
    else:
        values["data.path"] = workshop.corpus  # the default corpus takes half a minute; README's command runs on it
    accumulation = content.get("train", {}).get("gradient_accumulation_steps", 1)
    values["train.gradient_accumulation_steps"] = min(accumulation, 2)
    return [f"{name}={value}" for name, value in values.items()]


@pytest.mark.parametrize(
    "name", ["continue_small", pytest.param("continue_llama2_7b_icelandic", marks=pytest.mark.slow)]
)
def test_the_twin_of_a_recipe_that_goes_on_from_a_checkpoint(
    name: str, workshop: Workshop, hub: Path, tmp_path: Path
) -> None:
    """It is evaluated before the first step, initialized once, and better afterwards."""
    before, run = tmp_path / "before", tmp_path / "run"
    options = {"output_dir": before, "export__format": "bf16", "train__max_steps": 6, "data__tokenizer_vocab_size": 448}
    main(workshop.overrides(**options)).ok()
    overrides = twin(REPOSITORY / "configs" / "recipes" / f"{name}.yaml", workshop, hub, run)
    without = ("model.shape", "model.vocab_size", "data.tokenizer", "data.tokenizer_vocab_size", "loqt.interval")
    overrides = [text for text in overrides if text.partition("=")[0] not in without] + ["optim.warmup_steps=1"]
    if name != "continue_small":  # which has a file of held-out documents
        overrides.append("data.validation_fraction=0.3")
    done = main(["--config", name, f"model.path={before / 'export'}", *overrides]).ok()
    assert sorted(losses(run)) == [1, 2, 3, 4, 5] and len(events(run, "reinit")) == 1
    assert [event["step"] for event in events(run, "eval")] == [0, 3, 5]
    assert events(run, "eval")[-1]["loss"] < events(run, "eval")[0]["loss"]
    assert f"reading weights from {before / 'export'}" in done.output
    (export,) = events(run, "export")
    assert export["perplexity"] == pytest.approx(export["perplexity_trained"], rel=0.1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_twin_of_a_recipe_runs_to_a_reloaded_export(
    recipe: Path, workshop: Workshop, hub: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = main(["--config", recipe.stem, *twin(recipe, workshop, hub, run)]).ok()
    assert sorted(losses(run)) == [1, 2, 3, 4, 5]
    assert len(events(run, "reinit")) >= 2
    (export,) = events(run, "export")
    assert export["perplexity"] == pytest.approx(export["perplexity_trained"], rel=0.1)
    assert (run / "export" / "model.safetensors").is_file()
    assert "--- sample 1" in done.output
    # nothing of the recipe but what was overridden has changed
    asked, got = load_config(recipe).to_dict(), load_config(run / "config.yaml").to_dict()
    overridden = {*SMALL, "model.shape", "data.name", "data.path", "data.validation_path", "output_dir"}
    overridden |= {"train.gradient_accumulation_steps"}
    for section, fields in asked.items():
        for field, value in fields.items() if isinstance(fields, dict) else ():
            if f"{section}.{field}" in overridden or value == "auto":
                continue
            assert got[section][field] == value, f"{section}.{field}"


@pytest.mark.parametrize("recipe", OF_SEVERAL_RANKS, ids=lambda path: path.stem)
def test_the_twin_of_a_recipe_for_several_ranks_runs_on_two(
    recipe: Path, workshop: Workshop, hub: Path, tmp_path: Path
) -> None:
    """Through to a reloaded export, which such a recipe may leave to a larger machine."""
    run = tmp_path / "run"
    arguments = ["--config", recipe.stem, *twin(recipe, workshop, hub, run), "export.format=nf4"]
    statuses, printed = run_ranks([arguments] * 2, folder=tmp_path)
    assert statuses == [0, 0], printed
    assert sorted(losses(run)) == [1, 2, 3, 4, 5] and len(events(run, "reinit")) >= 2
    (export,) = events(run, "export")
    assert export["perplexity"] == pytest.approx(export["perplexity_trained"], rel=0.1)
    got = load_config(run / "config.yaml")
    assert got.engine == "fsdp2" and got.fsdp == load_config(recipe).fsdp


def test_the_twins_keep_what_makes_recipes_different() -> None:
    """So that the test above runs what it says: layer-wise updates, bf16 masters, double quantization, the sketch, a
    stream and truncated rows are each somebody's."""
    sections = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES]
    assert any(s.get("optim", {}).get("layerwise") for s in sections)
    assert any(s.get("optim", {}).get("master") == "bf16" for s in sections)
    assert any(s.get("data", {}).get("streaming") and s["data"]["packing"] == "truncated" for s in sections)
    assert any(s["loqt"].get("subspace") == "sketch" for s in sections)
    assert not {"optim.layerwise", "optim.master", "loqt.double_quant", "loqt.subspace", "data.streaming"} & {*SMALL}


@pytest.mark.parametrize("ds_config", DEEPSPEED, ids=lambda path: path.stem)
def test_a_deepspeed_configuration_runs_on_two_ranks(ds_config: Path, workshop: Workshop, tmp_path: Path) -> None:
    """Through to a reloaded export; with buckets a ten-thousandth as large, so that there are several in a step."""
    content = json.loads(ds_config.read_text(encoding="utf-8"))
    zero = content["zero_optimization"]
    assert zero["stage"] in (1, 2) and zero["overlap_comm"] is (ds_config.stem == "zero2_overlap")
    zero |= {name: value // 10_000 for name, value in zero.items() if name.endswith("_bucket_size")}
    twin_of_it = tmp_path / ds_config.name
    twin_of_it.write_text(json.dumps(content), encoding="utf-8")
    run = tmp_path / "run"
    options = {"output_dir": run, "export__format": "nf4", "train__max_steps": 6, "train__micro_batch_size": 2}
    arguments = ["--ds_config", str(twin_of_it), *workshop.overrides(**options)]
    statuses, printed = run_ranks([arguments] * 2, folder=tmp_path)
    assert statuses == [0, 0], printed
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6] and len(events(run, "reinit")) == 2
    (export,) = events(run, "export")
    assert export["perplexity"] == pytest.approx(export["perplexity_trained"], rel=0.1)


@pytest.mark.slow
def test_the_real_launcher(workshop: Workshop, tmp_path: Path) -> None:
    """One process; a stranger's terminal gets nothing odd from the program itself, and it starts while another run has
    the launcher's port."""
    ds_config = REPOSITORY / "configs" / "zero2.json"
    run = tmp_path / "run"
    values = {"model.shape": workshop.shape, "data.path": workshop.corpus} | TINY
    values |= {"output_dir": run, "export.format": "nf4", "eval.num_samples": 1, "eval.sample_tokens": 4}
    values |= {"train.max_steps": 6, "checkpoint.every": 3}
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # if another run has it, so much the better
            other.bind(("127.0.0.1", 29500))
            other.listen()
        done = command(
            *("deepspeed", REPOSITORY / "launch" / "pretrain.py", "--ds_config", ds_config),
            *(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()),
            cwd=tmp_path,
        ).ok()
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6] and len(events(run, "reinit")) == 2
    (export,) = events(run, "export")
    assert export["perplexity"] == pytest.approx(export["perplexity_trained"], rel=0.1)
    launcher = ("] [INFO] [", "] [WARNING] [real_accelerator.py", "] [WARNING] [runner.py")
    own = [line for line in (done.output + done.errors).splitlines() if not any(part in line for part in launcher)]
    for word in ("warning", "Warning", "Traceback", "untested", "deprecated", "Failed"):
        assert not [line for line in own if word in line], "noise in the terminal"
