"""An encoder from text to a task: masked language modelling, then classes or numbers, each to a reloaded export."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
)
from workshop import Workshop, events, losses, main

from loqt_ds.data.wordpiece import train_wordpiece
from loqt_ds.scores import METRICS

SHAPE = {
    "model_type": "bert",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
}
WORDS = [
    "good",
    "fine",
    "great",
    "bad",
    "poor",
    "awful",
    "film",
    "plot",
    "story",
    "actor",
    "scene",
    "music",
    "was",
    "is",
]
WORDS += ["the", "a", "very", "not"]


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))


def write_task(folder: Path, header: str, row: Any, *, num_train: int = 60, num_dev: int = 24) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for name, count in (("train", num_train), ("dev", num_dev)):
        rows = ["\t".join(map(str, row(draw))) for _ in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def review(draw: random.Random) -> tuple[str, int]:
    text = sentence(draw)
    return text, int(sum(text.count(word) for word in ("good", "fine", "great")) > text.count("bad"))


def similar(draw: random.Random) -> tuple[Any, ...]:
    one, other = sentence(draw), sentence(draw)
    shared = len({*one.split()} & {*other.split()})
    return 0, "g", "f", 2012, 0, "none", "none", one, other, f"{min(5, shared):.3f}"


def entailed(draw: random.Random) -> tuple[Any, ...]:
    one, other = sentence(draw), sentence(draw)
    return 0, one, other, "entailment" if {*one.split()} & {*other.split()} else "not_entailment"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    columns = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    return {
        "sst2": write_task(folder / "SST-2", "sentence\tlabel", review),
        "stsb": write_task(folder / "STS-B", columns, similar),
        "rte": write_task(folder / "RTE", "index\tsentence1\tsentence2\tlabel", entailed),
    }


def pretraining(workshop: Workshop, run: Path, **changes: Any) -> list[str]:
    shape = workshop.directory / "bert.json"
    shape.write_text(json.dumps(SHAPE))
    options = {
        "model__shape": shape,
        "data__validation_path": "null",
        "eval__every": 4,
        "checkpoint__every": 3,
        "checkpoint__keep": 0,
        "train__dtype": "fp32",
        "export__format": "bf16",
        "output_dir": run,
    }
    return ["--config", "mlm_small", *workshop.overrides(**options | changes)]


@pytest.fixture(scope="module")
def pretrained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's directory."""
    folder = tmp_path_factory.mktemp("pretrained")
    main(pretraining(workshop, folder / "run")).ok()
    return folder / "run"


def test_masked_language_modelling_to_an_export_and_goes_on_bit_for_bit(
    workshop: Workshop, pretrained: Path, tmp_path: Path
) -> None:
    assert sorted(losses(pretrained)) == list(range(1, 9)) and len(events(pretrained, "reinit")) == 2
    (export,) = events(pretrained, "export")
    assert export["perplexity"] == pytest.approx(export["perplexity_trained"], rel=0.02)
    evaluated = events(pretrained, "eval")
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(pretrained / "export")
    model = AutoModelForMaskedLM.from_pretrained(pretrained / "export")
    assert model(**tokenizer("ab [MASK] cd", return_tensors="pt")).logits.shape[-1] == model.config.vocab_size
    resume = pretrained / "checkpoints" / "step_3"
    again = tmp_path / "again"
    main(pretraining(workshop, again, checkpoint__resume=resume, export__format="none")).ok()
    assert losses(again) == {step: loss for step, loss in losses(pretrained).items() if step > 3}
    assert events(again, "eval")[-1]["loss"] == evaluated[-1]["loss"]


def finetuning(recipe: str, model: Path, data: Path, run: Path, *more: str) -> list[str]:
    small = ["loqt.rank=8", "train.micro_batch_size=8", "train.device=cpu", "train.dtype=fp32"]
    small += ["data.sequence_length=32", "logging.tensorboard=false", f"output_dir={run}"]
    return ["--config", recipe, f"model.path={model}", f"data.path={data}", *small, *more]


def test_a_task_from_the_pretrained_encoder(pretrained: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = finetuning("glue_small", pretrained / "export", tasks["sst2"], run)
    done = main([*arguments, "train.max_steps=9", "eval.every=3", "loqt.interval=4"], finetune=True).ok()
    assert len(events(run, "reinit")) == 3 and sorted(losses(run)) == list(range(1, 10))
    evaluated = events(run, "eval")
    assert [event["step"] for event in evaluated] == [0, 3, 6, 9]
    assert {"loss", "accuracy", "f1", "matthews", "glue"} <= set(evaluated[-1]) and "perplexity" not in evaluated[-1]
    assert "classifier" in done.output and "drawn from train.seed=0" in done.output
    # The export, asked by transformers alone, judges as the run did.
    (export,) = events(run, "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    rows = [line.split("\t") for line in (tasks["sst2"] / "dev.tsv").read_text().splitlines()[1:]]
    inputs = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(-1).numpy()
    labels = torch.tensor([int(label) for _, label in rows]).numpy()
    assert METRICS["accuracy"](labels, predicted) == pytest.approx(export["accuracy"], abs=0.05)


def test_numbers_without_merging(pretrained: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = finetuning("glue_small", pretrained / "export", tasks["stsb"], run, "data.glue_task=stsb")
    more = ["model.task=regression", "model.num_labels=null", "loqt.schedule=never", "train.max_steps=8"]
    main([*arguments, *more, "eval.every=4", "loqt.interval=100"], finetune=True).ok()
    assert len(events(run, "reinit")) == 1
    evaluated = events(run, "eval")
    assert evaluated[-1]["loss"] < evaluated[0]["loss"] and {"pearson", "spearman"} <= set(evaluated[-1])
    (export,) = events(run, "export")
    best = max(evaluated[1:], key=lambda event: event["glue"])  # which the recipe exports; not what it starts from
    assert export["loss"] == pytest.approx(best["loss"], rel=0.05)


@pytest.mark.slow
def test_the_twin_of_a_recipe_for_deberta(tasks: dict[str, Path], tmp_path: Path) -> None:
    """B, the classifier and its pooler are trained, nothing else; the best checkpoint is exported."""
    draw = random.Random(1)
    train_wordpiece([sentence(draw) for _ in range(200)], 120).save_pretrained(tmp_path / "deberta")
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    DebertaV2ForMaskedLM(config).save_pretrained(tmp_path / "deberta")
    run = tmp_path / "run"
    arguments = finetuning("glue_rte", tmp_path / "deberta", tasks["rte"], run, "data.name=null")
    done = main([*arguments, "train.epochs=2", "loqt.interval=5"], finetune=True).ok()
    evaluated = events(run, "eval")
    assert [event["step"] for event in evaluated] == [0, 8, 15]
    assert "train.epochs=2: 15 steps of 8 of the 60 rows" in done.output
    assert len(events(run, "reinit")) == 3 and (run / "best").is_dir()
    assert (run / "export" / "model.safetensors").is_file()
    assert AutoConfig.from_pretrained(run / "export").id2label == {0: "entailment", 1: "not_entailment"}


def test_a_label_that_is_no_class_ends_before_weights_are_read(
    pretrained: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "SST-2"
    broken.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (broken / name).write_text((tasks["sst2"] / name).read_text())
    with (broken / "train.tsv").open("a") as file:
        file.write("very good\tpositive\n")
    done = main(finetuning("glue_small", pretrained / "export", broken, tmp_path / "run"), finetune=True)
    assert done.status == 2 and "line 62 has the label 'positive', which is no class" in done.errors
    assert "reading weights" not in done.output and "Traceback" not in done.errors
