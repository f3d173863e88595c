"""A real trained model: stories260K, converted, trained further with LoQT on TinyStories, exported, reloaded."""

from __future__ import annotations

import sys
from pathlib import Path

from workshop import REPOSITORY, command, events, losses, main, records


def test_a_trained_model_is_loaded_trained_further_and_exported(real_data: Path, tmp_path: Path) -> None:
    weights = real_data / "weights" / "stories260K"
    model, run = tmp_path / "model", tmp_path / "run"
    converted = command(
        *(sys.executable, REPOSITORY / "tools" / "convert_llama2c.py"),
        *("--model", weights / "stories260K.bin", "--tokenizer", weights / "tok512.model", "--output", model),
        cwd=tmp_path,
    ).ok()
    assert f"model.path={model}" in converted.output, "it says what to type next"
    assert converted.errors == ""
    done = main(
        [
            *("model.shape=null", "model.vocab_size=null", f"model.path={model}"),
            *(f"data.tokenizer={model}", "data.tokenizer_vocab_size=4096"),
            f"data.path={real_data / 'en' / 'tinystories_sample.txt.gz'}",
            *("data.sequence_length=256", "data.num_processes=1", "data.validation_fraction=0.05"),
            *("loqt.rank=16", "loqt.interval=8", "optim.lr=0.002", "optim.lr_full_rank=0.0005"),
            *("train.max_steps=20", "train.micro_batch_size=8", "train.device=cpu", "eval.every=10"),
            *("eval.max_tokens=8192", "eval.num_samples=1", "eval.sample_tokens=24", "logging.tensorboard=false"),
            *("checkpoint.every=1000", f"output_dir={run}"),
        ]
    ).ok()
    curve = losses(run)
    # The model comes trained: token frequencies alone give about 5 nats, a model drawn from a seed ln 512 = 6.2.
    assert curve[1] < 2.2, "the weights that were read are those of a trained model"
    evaluations = [event["loss"] for event in events(run, "eval")]
    assert evaluations[-1] < curve[1] + 0.1 and evaluations[-1] < evaluations[0] + 0.02
    reinits = [record for record in records(run) if record.get("event") == "reinit"]
    assert len(reinits) >= 2 and all(layer["error_after"] < layer["error_before"] for layer in reinits[0]["layers"])
    (export,) = events(run, "export")
    assert export["perplexity"] < export["perplexity_trained"] * 1.1
    assert "--- sample 1" in done.output
