"""Stop after any step, rebuild everything, restore from disk, go on: the same losses and the same bytes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    equal,
    llama_config,
    lm_loss,
    make_config,
    make_engine,
    restore,
    run,
    save,
    snapshot,
    token_batch,
    train_step,
)
from torch import Tensor

from loqt_ds import optim as optim_module
from loqt_ds.checkpoint import CheckpointError
from loqt_ds.engines.single import SingleEngine

RESUMED: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {},
    "adamw8bit": {"optim": {"name": "adamw8bit"}},
    "adamw8bit-bf16": {"optim": {"name": "adamw8bit"}, "train": {"dtype": "bf16"}},
    "adamw-bf16-no-master": {"optim": {"master": "bf16"}, "train": {"dtype": "bf16"}},
    "adamw8bit-bf16-no-master": {"optim": {"name": "adamw8bit", "master": "bf16"}, "train": {"dtype": "bf16"}},
    "layerwise": {"optim": {"layerwise": True}},
    "layerwise-8bit-bf16-no-master": {
        "optim": {"layerwise": True, "name": "adamw8bit", "master": "bf16"},
        "train": {"dtype": "bf16"},
    },
    "layerwise-accumulation-clipping-bf16": {
        "loqt": {"subspace": "sketch"},
        "optim": {"layerwise": True, "name": "adamw8bit", "weight_decay": 0.1},
        "train": {"dtype": "bf16", "gradient_accumulation_steps": 2, "max_grad_norm_per_parameter": 0.02},
    },
    "accumulation-sketch-project": {
        "loqt": {"subspace": "sketch", "optimizer_state": "transport", "double_quant": "both"},
        "train": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    },
    "reset-int4-nq": {"loqt": {"optimizer_state": "reset", "quantize_w": "none", "quantize_p": "int4"}},
    "rewarmup": {"optim": {"schedule": "cosine_rewarmup", "rewarmup_steps": 2, "weight_decay": 0.1}},
}
# B of the MLP has 4160 numbers: enough for bitsandbytes to keep its moments in 8 bits.
RESUME_MODEL = {"intermediate_size": 520, "attention_dropout": 0.1}
NUM_STEPS = 5


def fresh(name: str, *, seed: int = 0) -> SingleEngine:
    sections = RESUMED[name]
    config = make_config(**{key: dict(value) for key, value in sections.items()})
    torch.manual_seed(11)
    return make_engine(config, model_config=llama_config(**RESUME_MODEL), seed=seed)


@pytest.mark.parametrize("name", RESUMED)
def test_stopping_after_any_step_changes_no_bit(name, tmp_path):
    engine = fresh(name)
    losses, paths = [], []
    for _ in range(NUM_STEPS):
        paths.append(save(engine, tmp_path))
        losses += run(engine, 1)
    expected = snapshot(engine)
    assert len(set(losses)) == NUM_STEPS
    for stop, path in enumerate(paths):
        resumed = fresh(name)
        torch.manual_seed(1234 + stop)
        restore(resumed, path)
        assert resumed.step_index == stop
        assert run(resumed, NUM_STEPS - stop) == losses[stop:], f"stopped after {stop} steps"
        assert equal(snapshot(resumed), expected) == [], f"stopped after {stop} steps"


@pytest.mark.parametrize("name", ["adamw8bit-bf16-no-master", "layerwise-8bit-bf16-no-master"])
def test_a_run_goes_on_in_the_other_order_of_updates(name, tmp_path):
    """What is rounded stochastically depends on seed, step and parameter alone."""
    other = {"adamw8bit-bf16-no-master": "layerwise-8bit-bf16-no-master"}.get(name, "adamw8bit-bf16-no-master")
    engine = fresh(name)
    run(engine, 3)
    path = save(engine, tmp_path)
    losses = run(engine, 2)
    resumed = restore(fresh(other), path)
    assert run(resumed, 2) == losses
    assert equal(snapshot(resumed), snapshot(engine)) == []


def test_the_rounding_of_each_update_and_of_each_seed_is_another(monkeypatch):
    """Two parameters of one shape, or two steps, must not share their random numbers."""
    drawn: list[bytes] = []
    original = optim_module.stochastic_round

    def spy(value: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(generator.get_state().numpy().tobytes())
        return original(value, generator)

    monkeypatch.setattr(optim_module, "stochastic_round", spy)
    for seed in (0, 1):
        config = make_config(optim={"master": "bf16"}, train={"dtype": "bf16", "seed": seed})
        run(make_engine(config), 2)
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 12


@pytest.mark.parametrize("layerwise", [False, True])
def test_an_overdue_reinitialization_survives_a_stop(layerwise, tmp_path):
    name = "layerwise" if layerwise else "adamw"
    for bad in (0, 2):
        engine = fresh(name)
        run(engine, bad)
        engine.backward(lm_loss(engine, token_batch(bad)) * math.nan)
        assert not engine.step().applied
        path = save(engine, tmp_path / str(bad))
        losses = run(engine, 3)
        resumed = restore(fresh(name), path)
        first, report = train_step(resumed, token_batch(bad + 1))
        assert report.reinit is not None
        assert [first, *run(resumed, 2)] == losses
        assert equal(snapshot(resumed), snapshot(engine)) == []


def test_a_checkpoint_of_another_model_is_refused_and_names_what_differs(tmp_path):
    engine = make_engine(make_config())
    path = save(engine, tmp_path)
    for config, model, what in (
        (make_config(loqt={"rank": 9}), llama_config(), ".B"),
        (make_config(loqt={"quantize_w": "none"}), llama_config(), "w_"),
        (make_config(train={"dtype": "bf16"}), llama_config(), "torch.bfloat16"),
        (make_config(), llama_config(num_hidden_layers=2), "layers.1"),
        (make_config(), llama_config(vocab_size=62), "62"),
    ):
        other = make_engine(config, model_config=model)
        with pytest.raises(CheckpointError, match="another model") as caught:
            restore(other, path)
        assert what in str(caught.value) and str(path) in str(caught.value)


def test_a_checkpoint_holds_no_pickle_and_only_what_it_must(tmp_path):
    engine = make_engine(make_config(optim={"name": "adamw8bit"}))
    run(engine, 1)
    path = save(engine, tmp_path)
    assert {p.suffix for p in Path(path).rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert not any("qmap" in name for name in engine.saved_tensors()["optimizer"])
    assert set(engine.saved_tensors()["model"]) == set(engine.network.state_dict())
