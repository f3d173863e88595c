"""Mistakes a user makes: each is refused before any weight is loaded, with option, value and remedy, and exit status 2;
nothing is written where the run would have lived."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from workshop import SHAPE, Workshop, events, files_below, losses, main, write_corpus

pytestmark = pytest.mark.usefixtures("no_weights")


def refuse(
    workshop: Workshop,
    directory: Path,
    *named: str,
    arguments: tuple[str, ...] = (),
    deepspeed: bool = False,
    **changes: Any,
) -> str:
    """Runs into the mistake; the message must name every string of `named`. Returns it."""
    before = files_below(directory)
    done = workshop.train(*arguments, deepspeed=deepspeed, **({"output_dir": directory / "run"} | changes))
    assert done.status == 2, f"status {done.status}\n{done.output}\n{done.errors}"
    (message,) = done.errors.strip().splitlines()
    assert message.startswith("error: "), message
    for text in named:
        assert text in message, f"{text!r} is not in: {message}"
    assert files_below(directory) == before, "something was written"
    assert not (directory / "run").exists() or "run/" in str(before.keys())
    return message


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loqt__rnak": 8}, ["loqt.rnak=8", "unknown option", "loqt.rank"]),
        ({"lqot__rank": 8}, ["lqot.rank=8", "unknown option", "loqt.rank"]),
        ({"rank": 8}, ["rank=8", "loqt.rank"]),
        ({"loqt__rank": 65}, ["loqt.rank=65", "64", "model.layers.0.self_attn", "at most"]),
        ({"loqt__rank": 33}, ["loqt.rank=33", "32", "k_proj", "at most 32"]),
        ({"loqt__rank": 0}, ["loqt.rank=0", "at least 1"]),
        ({"loqt__rank": -4}, ["loqt.rank=-4", "at least 1"]),
        ({"loqt__rank": "eight"}, ["loqt.rank", "'eight'", "integer"]),
        ({"loqt__rank": 8.5}, ["loqt.rank", "8.5", "integer"]),
        ({"loqt__rank": "true"}, ["loqt.rank", "integer"]),
        ({"loqt__alpha": 0}, ["loqt.alpha=0", "above 0"]),
        ({"loqt__alpha": ".nan"}, ["loqt.alpha=nan", "finite"]),
        ({"loqt__quantize_w": "nf5"}, ["loqt.quantize_w", "nf5", "nf4|fp4|int4|none"]),
        ({"loqt__target_modules": "'*.q_proj['"}, ["loqt.target_modules", "*.q_proj[", "regular expression"]),
        ({"loqt__target_modules": "'.*no_such_proj'"}, ["loqt.target_modules", "no_such_proj", "self_attn.q_proj"]),
        ({"loqt__target_modules": "[q_porj]"}, ["loqt.target_modules", "q_porj", "self_attn.q_proj"]),
        ({"train__max_steps": 0}, ["train.max_steps=0", "at least 1"]),
        ({"train__max_steps": -1}, ["train.max_steps=-1", "at least 1"]),
        ({"train__micro_batch_size": 0}, ["train.micro_batch_size=0", "at least 1"]),
        ({"train__gradient_accumulation_steps": -2}, ["train.gradient_accumulation_steps=-2", "at least 1"]),
        ({"train__device": "gpu"}, ["train.device=gpu", "cuda"]),
        ({"data__sequence_length": 0}, ["data.sequence_length=0", "at least 2"]),
        ({"data__sequence_length": 129}, ["data.sequence_length=129", "max_position_embeddings=128", "at most 128"]),
        ({"data__tokenizer_vocab_size": 10}, ["data.tokenizer_vocab_size=10", "at least"]),
        ({"eval__every": -1}, ["eval.every=-1", "at least 0"]),
        ({"checkpoint__every": 0}, ["checkpoint.every=0", "at least 1"]),
        ({"checkpoint__keep": -1}, ["checkpoint.keep=-1", "at least 0"]),
        ({"logging__every": 0}, ["logging.every=0", "at least 1"]),
        ({"optim__lr": -1}, ["optim.lr=-1", "above 0"]),
        ({"optim__name": "sgd"}, ["optim.name", "sgd", "adamw|adamw8bit"]),
        (
            {"optim__layerwise": True, "train__max_grad_norm": 1.0},
            ["optim.layerwise=true", "train.max_grad_norm=1.0", "train.max_grad_norm_per_parameter"],
        ),
        ({"model__shape": "llama_9000b"}, ["model.shape=llama_9000b", "llama_9m"]),
        ({"model__shape": "/absent/shape.json"}, ["model.shape=/absent/shape.json", "cannot be read"]),
        ({"model__shape": None, "model__vocab_size": None}, ["model.shape=null", "model.path=null"]),
        ({"model__vocab_size": 399}, ["model.vocab_size=399", "400", "model.vocab_size=auto"]),
        ({"data__tokenizer": "/absent/spiece.model"}, ["data.tokenizer=/absent/spiece.model"]),
        ({"checkpoint__resume": "/absent/step_3"}, ["checkpoint.resume=/absent/step_3"]),
        ({"name": "../evil"}, ["name=../evil"]),
    ],
    ids=str,
)
def test_options(workshop: Workshop, tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    refuse(workshop, tmp_path, *named, **changes)


def test_words_that_are_no_overrides(workshop: Workshop, tmp_path: Path) -> None:
    refuse(workshop, tmp_path, "`train.max_steps`", "section.field=value", arguments=("train.max_steps",))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("loqt:\n  rnak: 8\n", ["rnak", "`loqt`", "rank"]),
        ("lqot:\n  rank: 8\n", ["lqot", "loqt"]),
        ("loqt:\n  rank: 8\n  rank: 9\n", ["line 3", "rank", "twice"]),
        ("loqt: [rank, 8]\n", ["loqt", "field: value"]),
        ("loqt:\n  rank: {8\n", ["not valid YAML"]),
        ("- loqt\n", ["sections"]),
        ("train:\n  max_steps: 1e3x\n", ["train.max_steps", "1e3x", "integer"]),
    ],
    ids=str,
)
def test_yaml_files(workshop: Workshop, tmp_path: Path, text: str, named: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    refuse(workshop, tmp_path, "mine.yaml", *named, arguments=("--config", str(file)))


def test_recipes_that_are_not_there(workshop: Workshop, tmp_path: Path) -> None:
    refuse(workshop, tmp_path, "llama_60", "llama_60m", "default", arguments=("--config", "llama_60"))
    refuse(workshop, tmp_path, "absent.yaml", "cannot be read", arguments=("--config", str(tmp_path / "absent.yaml")))


# ---------------------------------------------------------------- data


def data_file(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def test_data_that_is_not_there(workshop: Workshop, tmp_path: Path) -> None:
    refuse(workshop, tmp_path, f"data.path={tmp_path}/absent.txt", data__path=tmp_path / "absent.txt")
    refuse(workshop, tmp_path, f"data.path={tmp_path}/*.parquet", data__path=f"'{tmp_path}/*.parquet'")
    refuse(
        workshop,
        tmp_path,
        f"data.validation_path={tmp_path}/absent.txt",
        data__validation_path=tmp_path / "absent.txt",
    )


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", ["empty"]),
        ("blank.txt", b" \n\n \n", []),
        ("latin.txt", "Größe über alles. ".encode("latin-1") * 500, ["UTF-8"]),
        ("latin.jsonl", b'{"text": "Gr\xf6\xdfe"}\n' * 50, ["UTF-8"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2"]),
        ("field.jsonl", b'{"content": "a story"}\n' * 50, ["data.text_field=text", "content"]),
        ("table.csv", b"a,b\n1,2\n", [".csv", ".jsonl"]),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00rubbish", []),
        ("cut.parquet", b"PAR1rubbish", []),
    ],
)
def test_data_files(workshop: Workshop, tmp_path: Path, name: str, content: bytes, named: list[str]) -> None:
    file = data_file(tmp_path, name, content)
    message = refuse(workshop, tmp_path, name, *named, data__path=file)
    assert "data.path" in message or "data.text_field" in message


def test_less_text_than_a_batch(workshop: Workshop, tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "few.jsonl", num_documents=3, seed=1)
    refuse(
        workshop,
        tmp_path,
        *("few.jsonl", "tokens", "train.micro_batch_size=4", "train.gradient_accumulation_steps=16"),
        *("data.sequence_length=32", "lower one of these"),
        data__path=few,
        data__validation_path=workshop.corpus,
        data__tokenizer_vocab_size=300,
        train__gradient_accumulation_steps=16,
    )


def test_training_text_that_is_all_held_out(workshop: Workshop, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(workshop.corpus.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    refuse(workshop, tmp_path, "few.jsonl", "held-out", data__path=few, data__validation_path=workshop.corpus)


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory of 512 pieces, without a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "dense"
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "architectures"})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the tiny corpus, 400 pieces, as a directory."""
    from loqt_ds.config import load_config
    from loqt_ds.data import load_or_train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    load_or_train_tokenizer(load_config(None, workshop.overrides()), print).save(folder)
    return folder


def from_directory(folder: Path, tokenizer: Path) -> dict[str, Any]:
    return {
        "model__shape": None,
        "model__vocab_size": None,
        "model__path": folder,
        "data__tokenizer": tokenizer,
        "data__tokenizer_vocab_size": ...,
    }


def copied(source: Path, target: Path, edit: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    edit(target)
    return target


def test_a_model_directory_that_is_not_there(workshop: Workshop, tmp_path: Path, tokenizer: Path) -> None:
    refuse(workshop, tmp_path, "model.path=/absent", "directory", **from_directory(Path("/absent"), tokenizer))


def test_a_tokenizer_that_does_not_fit_the_model(
    workshop: Workshop, tmp_path: Path, trained_model: Path, tokenizer: Path
) -> None:
    options = from_directory(trained_model, tokenizer)
    refuse(workshop, tmp_path, "data.tokenizer", "400", "model.path", "512", "do not fit", **options)


def test_a_model_without_a_tokenizer(workshop: Workshop, tmp_path: Path, trained_model: Path) -> None:
    """Training one from the corpus for a model that speaks another language would be a silent disaster."""
    options = from_directory(trained_model, trained_model) | {"data__tokenizer": None}
    message = refuse(workshop, tmp_path, "data.tokenizer", "model.path", **options)
    assert "tokenizer" in message


def test_pickled_weights(workshop: Workshop, tmp_path: Path, trained_model: Path, tokenizer: Path) -> None:
    """A .bin file is a program; it is never opened."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    def pickle_it(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    folder = copied(trained_model, tmp_path / "pickled", pickle_it)
    refuse(workshop, tmp_path, "model.path", ".bin", "convert", "safetensors", **from_directory(folder, tokenizer))
    assert not (tmp_path / "exploded").exists()


def test_quantized_weights(workshop: Workshop, tmp_path: Path, trained_model: Path, tokenizer: Path) -> None:
    def quantize(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(content))

    folder = copied(trained_model, tmp_path / "quantized", quantize)
    refuse(workshop, tmp_path, "model.path", "quantized already", "full precision", **from_directory(folder, tokenizer))


def test_weights_with_a_hole(workshop: Workshop, tmp_path: Path, trained_model: Path, tokenizer: Path) -> None:
    from safetensors.torch import load_file

    def drop(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    folder = copied(trained_model, tmp_path / "hole", drop)
    refuse(workshop, tmp_path, "model.path", "model.layers.1.mlp.up_proj.weight", **from_directory(folder, tokenizer))


def test_weights_of_another_shape(workshop: Workshop, tmp_path: Path, trained_model: Path, tokenizer: Path) -> None:
    from safetensors.torch import load_file

    def cut(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:60].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    folder = copied(trained_model, tmp_path / "shape", cut)
    refuse(workshop, tmp_path, "model.path", "model.norm.weight", "60", "64", **from_directory(folder, tokenizer))


def test_truncated_weights(workshop: Workshop, tmp_path: Path, trained_model: Path, tokenizer: Path) -> None:
    def truncate(folder: Path) -> None:
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)

    folder = copied(trained_model, tmp_path / "short", truncate)
    refuse(workshop, tmp_path, "model.path", "model.safetensors", **from_directory(folder, tokenizer))


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def run(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("good") / "run"
    workshop.train(output_dir=folder, train__max_steps=3, checkpoint__every=2, checkpoint__keep=0).ok()
    yield folder


def damaged(run: Path, folder: Path, file: str, edit: Callable[[bytearray], bytearray]) -> Path:
    target = folder / "step_3"
    shutil.copytree(run / "checkpoints" / "step_3", target)
    path = target / file
    path.write_bytes(edit(bytearray(path.read_bytes())))
    return target


def flipped(content: bytearray) -> bytearray:
    content[len(content) * 2 // 3] ^= 0x10
    return content


def halved(content: bytearray) -> bytearray:
    return content[: len(content) // 2]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "metadata.json", "manifest.json"])
@pytest.mark.parametrize("edit", [flipped, halved])
def test_damaged_checkpoints(
    workshop: Workshop, tmp_path: Path, run: Path, file: str, edit: Callable[[bytearray], bytearray]
) -> None:
    checkpoint = damaged(run, tmp_path, file, edit)
    options = {"train__max_steps": 3, "checkpoint__resume": checkpoint}
    refuse(workshop, tmp_path, f"checkpoint.resume={checkpoint}", file, "another checkpoint", **options)


def test_a_run_whose_checkpoints_are_all_damaged(workshop: Workshop, tmp_path: Path, run: Path) -> None:
    """To start anew over them is not what resume=auto asks for."""
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(flipped(bytearray(file.read_bytes())))
    before = files_below(tmp_path)
    done = workshop.train(output_dir=tmp_path / "run", checkpoint__resume="auto", train__max_steps=3)
    assert (
        done.status == 2
        and "checkpoint.resume=auto" in done.errors
        and "model.safetensors" in done.errors + done.output
    )
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loqt__rank": 8}, ["loqt.rank=8", "loqt.rank=16"]),
        ({"loqt__quantize_w": "fp4"}, ["loqt.quantize_w=fp4", "nf4"]),
        ({"optim__lr": 0.5}, ["optim.lr=0.5", "differs from optim.lr="]),
        ({"train__seed": 9}, ["train.seed=9", "train.seed=0"]),
        ({"data__sequence_length": 16}, ["data.sequence_length=16", "data.sequence_length=32"]),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run(
    workshop: Workshop, tmp_path: Path, run: Path, changes: dict[str, Any], named: list[str]
) -> None:
    options = {"train__max_steps": 3, "checkpoint__resume": run / "checkpoints" / "step_3"} | changes
    refuse(workshop, tmp_path, *named, str(run), **options)


@pytest.fixture
def allow_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets a run in the middle of a test be an ordinary one."""
    from loqt_ds.method.conversion import build_model, materialize_zeros

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded before the mistake was found")

    def switch(allowed: bool) -> None:
        monkeypatch.setattr("loqt_ds.run.build_model", build_model if allowed else loaded)
        monkeypatch.setattr("loqt_ds.run.materialize_zeros", materialize_zeros if allowed else loaded)

    return switch


def test_a_checkpoint_of_another_model_under_the_same_name(
    workshop: Workshop, tmp_path: Path, allow_weights: Callable[[bool], None]
) -> None:
    """The shape file was edited since: only its content tells."""
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(SHAPE), encoding="utf-8")
    options: dict[str, Any] = {"model__shape": shape, "train__max_steps": 2}
    allow_weights(True)
    workshop.train(output_dir=tmp_path / "good", **options).ok()
    allow_weights(False)
    shape.write_text(json.dumps(SHAPE | {"intermediate_size": 192}), encoding="utf-8")
    checkpoint = tmp_path / "good" / "checkpoints" / "step_2"
    named = ("intermediate_size=192", "intermediate_size=128", str(checkpoint), "another model")
    refuse(workshop, tmp_path, *named, checkpoint__resume=checkpoint, **options)
    refuse(workshop, tmp_path, *named, output_dir=tmp_path / "good", checkpoint__resume="auto", **options)


def test_other_text_under_the_same_name(
    workshop: Workshop, tmp_path: Path, allow_weights: Callable[[bool], None]
) -> None:
    """The data position of a checkpoint means nothing in another corpus."""
    corpus = tmp_path / "corpus.jsonl"
    shutil.copy(workshop.corpus, corpus)
    options: dict[str, Any] = {"data__path": corpus, "train__max_steps": 2}
    allow_weights(True)
    workshop.train(output_dir=tmp_path / "good", **options).ok()
    allow_weights(False)
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join(lines[10:]), encoding="utf-8")
    checkpoint = tmp_path / "good" / "checkpoints" / "step_2"
    refuse(workshop, tmp_path, "data", "corpus", checkpoint__resume=checkpoint, **options)
    refuse(workshop, tmp_path, "data", output_dir=tmp_path / "good", checkpoint__resume="auto", **options)


# ---------------------------------------------------------------- directories


def test_an_output_directory_that_cannot_be_made(workshop: Workshop, tmp_path: Path) -> None:
    refuse(workshop, tmp_path, "output_dir=/proc/loqt_ds/run", "another", output_dir="/proc/loqt_ds/run")
    (tmp_path / "file").write_text("a file")
    refuse(workshop, tmp_path, f"output_dir={tmp_path}/file", "directory", output_dir=tmp_path / "file")
    refuse(workshop, tmp_path, f"output_dir={tmp_path}/file/run", output_dir=tmp_path / "file" / "run")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that even root cannot write."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"root may write everywhere, and mounting is not permitted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_unwritable_output_directory(workshop: Workshop, tmp_path: Path, read_only: Path) -> None:
    refuse(workshop, tmp_path, f"output_dir={read_only}/run", "another", output_dir=read_only / "run")
    refuse(workshop, tmp_path, f"output_dir={read_only}", "another", output_dir=read_only)
    refuse(workshop, tmp_path, f"data.cache_dir={read_only}", "LOQT_CACHE", data__cache_dir=read_only)


# ---------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage=3", "use 0, 1 or 2"]),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, ["`optimizer`", "`optim` section"]),
        (
            {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 7},
            ["train_micro_batch_size_per_gpu=7", "train.micro_batch_size=4"],
        ),
        ({"zero_optimization": {"stage": 2, "no_such_key": 1}}, ["no_such_key"]),
    ],
    ids=str,
)
def test_deepspeed_configurations(
    workshop: Workshop, tmp_path: Path, content: dict[str, Any], named: list[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    refuse(workshop, tmp_path, "mine.json", *named, arguments=("--ds_config", str(file)), deepspeed=True)


def test_deepspeed_with_a_recipe_it_cannot_honour(workshop: Workshop, tmp_path: Path) -> None:
    options = {"optim__layerwise": True, "train__max_grad_norm": None}
    refuse(workshop, tmp_path, "optim.layerwise=true", "python -m loqt_ds.train", deepspeed=True, **options)


def test_one_device_with_two_processes(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(workshop, tmp_path, "WORLD_SIZE=2", "one process")


def test_deepspeed_without_its_configuration() -> None:
    done = main([], deepspeed=True)
    assert done.status == 2 and "--ds_config" in done.errors


# ---------------------------------------------------------------- the export command


def test_export_of_what_is_no_checkpoint(tmp_path: Path, run: Path) -> None:
    from loqt_ds.export.__main__ import main as export

    def status(*arguments: str) -> int:
        try:
            return export(list(arguments))
        except SystemExit as error:
            return int(error.code or 0)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    good = str(run / "checkpoints" / "step_3")
    before = files_below(tmp_path)
    assert status("--checkpoint", str(tmp_path / "absent"), "--format", "nf4", "--output", str(tmp_path / "out")) == 2
    assert status("--checkpoint", good, "--format", "nf5", "--output", str(tmp_path / "out")) == 2
    assert status("--checkpoint", good, "--format", "nf4", "--output", str(taken)) == 2
    assert files_below(tmp_path) == before


def test_the_run_used_above_is_a_good_one(run: Path) -> None:
    assert sorted(losses(run)) == [1, 2, 3] and len(events(run, "checkpoint")) == 3
    assert torch.isfinite(torch.tensor(list(losses(run).values()))).all()
