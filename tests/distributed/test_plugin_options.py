"""`loqt_ds.initialize` in one process: what its arguments and the JSON's sections do.

References: plain DeepSpeed with the same JSON, torch's own gradients, and the same weights converted in memory.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from helpers import llama_config, lm_loss, token_batch
from plain_net import ROWS, Net, batch, held, learn, settings, start
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import loqt_ds
from loqt_ds.checkpoint import CheckpointError
from loqt_ds.config import ConfigError
from loqt_ds.engines import plugin
from loqt_ds.engines.deepspeed import LoQTEngine, start_distributed
from loqt_ds.method.conversion import initializer, loqt_layers
from loqt_ds.ranks import Ranks


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process group stays; its variables do not reach other tests."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    start_distributed()
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield


def options_of(engine: LoQTEngine) -> dict[str, tuple[float, float]]:
    """(lr, weight_decay) of each trained parameter, as the optimizer has them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found = {}
    for parameters, group in zip(engine.optimizer.bit16_groups, engine.optimizer.param_groups, strict=True):
        found |= {names[id(p)]: (group["lr"], group["weight_decay"]) for p in parameters}
    return found


# ---------------------------------------------------------------- the return value, and what DeepSpeed's users ask for


def test_it_returns_what_deepspeed_returns_and_learns() -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Tensor:
            return batch(index)[0]

    engine, optimizer, loader, scheduler = loqt_ds.initialize(
        model=Net(), model_parameters=None, training_data=Rows(), config=settings(), collate_fn=torch.stack
    )
    assert isinstance(engine, deepspeed.DeepSpeedEngine) and scheduler is None
    assert optimizer is engine.optimizer and loader is engine.training_dataloader
    loader.num_local_io_workers = 0
    assert next(iter(loader)).shape == (ROWS, 13)
    assert set(loqt_layers(engine.module)) == {"up", "down", "head"}
    losses = learn(engine, 30)
    assert losses[-1] < 0.75 * losses[0]


def test_numbers_that_scripts_ask_for() -> None:
    engine = start(config=settings(train_micro_batch_size_per_gpu=2, gradient_clipping=0.7))
    assert engine.train_batch_size() == 8 and engine.train_micro_batch_size_per_gpu() == 2
    assert engine.gradient_accumulation_steps() == 4 and engine.gradient_clipping() == 0.7
    assert engine.zero_optimization_stage() == 2 and engine.world_size == 1 and engine.global_rank == 0
    assert engine.get_lr() == [0.01] * len(engine.optimizer.param_groups)
    learn(engine, 2)
    assert engine.global_steps == 2 and engine.micro_steps == 8 and engine.global_samples == 16
    assert engine.was_step_applied() and engine.skipped_steps == 0


@pytest.mark.parametrize("how", ["dict", "path", "args", "config_params"])
def test_where_the_configuration_is_given(how: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings()), encoding="utf-8")
    arguments: dict[str, Any] = {
        "dict": {"config": settings()},
        "path": {"config": str(file)},
        "args": {"config": None, "args": argparse.Namespace(deepspeed_config=str(file), local_rank=0)},
        "config_params": {"config": None, "config_params": file},
    }[how]
    engine = start(**arguments)
    assert {layer.rank for layer in loqt_layers(engine.module).values()} == {8}


def test_a_dictionary_is_left_as_it_was() -> None:
    given = settings()
    before = copy.deepcopy(given)
    start(config=given)
    assert given == before


# ---------------------------------------------------------------- parameter groups


def test_groups_keep_their_options_and_b_takes_the_place_of_its_weight() -> None:
    model = Net()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [
        {"params": [model.up.weight, model.down.weight], "lr": 0.02, "weight_decay": 0.1},
        {"params": [model.head.weight], "lr": 0.005},
        {"params": [model.embedding.weight, model.norm.weight, *biases], "weight_decay": 0.0},
    ]
    engine = start(
        model,
        model_parameters=groups,
        config=settings(optimizer={"params": {"lr": 0.01, "weight_decay": 0.05}}),
    )
    assert options_of(engine) == {
        "up.B": (0.02, 0.1),
        "down.B": (0.02, 0.1),
        "head.B": (0.005, 0.05),
        "embedding.weight": (0.01, 0.0),
        "norm.weight": (0.01, 0.0),
        "norm.bias": (0.01, 0.0),
        "up.bias": (0.01, 0.0),
        "head.bias": (0.01, 0.0),
    }
    learn(engine, 2)
    assert options_of(engine)["up.B"] == (0.02, 0.1)


@pytest.mark.parametrize("target", ["all-linear", r".*\.experts\..*\.1"])
def test_batched_experts_are_trained_one_by_one(target: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**shape, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2))
    groups = [
        {"params": [p for name, p in model.named_parameters() if ".experts." in name], "lr": 0.02},
        {"params": [p for name, p in model.named_parameters() if ".experts." not in name]},
    ]
    engine = start(model, model_parameters=groups, config=settings(loqt={"target_modules": target}))
    found = options_of(engine)
    assert found.keys() == {name for name, p in engine.module.named_parameters() if p.requires_grad}
    experts = [name for name in found if ".experts." in name]
    assert len(experts) == 6 and sum(name.endswith(".B") for name in experts) == (6 if target == "all-linear" else 2)
    assert all((rate == 0.02) == (name in experts) for name, (rate, _) in found.items())
    before = held(engine)
    for step in range(2):
        loss = engine(input_ids=batch(step), labels=batch(step)).loss
        engine.backward(loss)
        engine.step()
    assert all(not torch.equal(before[name], tensor) for name, tensor in held(engine).items() if name in experts)


def test_sketches_of_experts_on_several_ranks_are_refused_before_anything_is_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(**shape, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2))
    two = Ranks()
    two.world_size = 2
    monkeypatch.setattr(plugin, "start_distributed", lambda **_: two)
    with pytest.raises(ValueError, match="with 2 ranks .* use loqt.subspace=iterated"):
        start(model, config=settings(loqt={"subspace": "sketch"}))
    assert not loqt_layers(model)


def test_a_group_with_rate_zero_stays() -> None:
    model = Net()
    rest = [p for name, p in model.named_parameters() if not name.startswith("up")]
    engine = start(
        model,
        model_parameters=[{"params": list(model.up.parameters()), "lr": 0.0}, {"params": rest}],
        config=settings(loqt={"interval": 100}),
    )
    learn(engine, 1)  # the first re-initialization sets B
    before = held(engine)
    learn(engine, 2)
    after = held(engine)
    assert torch.equal(after["up.B"], before["up.B"]) and torch.equal(after["up.bias"], before["up.bias"])
    assert not torch.equal(after["down.B"], before["down.B"])


def test_parameters_may_come_from_a_generator_or_be_single() -> None:
    model = Net()
    engine = start(model, model_parameters=(p for p in [model.up.weight, model.embedding.weight]))
    assert set(options_of(engine)) == {"up.B", "embedding.weight"}
    model = Net()
    assert set(options_of(start(model, model_parameters=[{"params": model.up.weight}]))) == {"up.B"}


@pytest.mark.parametrize("how", ["left out", "frozen"])
def test_what_is_not_trained_is_neither_converted_nor_changed(how: str) -> None:
    model = Net()
    still = [model.down.weight, model.embedding.weight, model.up.bias]
    original = [p.detach().clone() for p in still]
    if how == "frozen":
        for parameter in still:
            parameter.requires_grad_(False)
        engine = start(model)
    else:
        kept = [p for p in model.parameters() if not any(p is other for other in still)]
        engine = start(model, model_parameters=kept)
    assert set(loqt_layers(engine.module)) == {"up", "head"}
    assert type(engine.module.down) is nn.Linear and not engine.module.down.weight.requires_grad
    learn(engine, 5)
    now = [engine.module.down.weight, engine.module.embedding.weight, engine.module.up.bias]
    for parameter, before in zip(now, original, strict=True):
        assert torch.equal(parameter, before)


def test_tied_weights_stay_tied_and_are_trained_in_full() -> None:
    engine = start(Net(tied=True))
    assert set(loqt_layers(engine.module)) == {"up", "down"}
    assert engine.module.head.weight is engine.module.embedding.weight
    before = engine.module.head.weight.detach().clone()
    losses = learn(engine, 20)
    assert losses[-1] < losses[0] and not torch.equal(before, engine.module.head.weight)
    assert engine.module.head.weight is engine.module.embedding.weight


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="is not the model's"):
        start(model_parameters=Net().parameters())


# ---------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_hyper_parameters_of_the_json_reach_the_optimizer(kind: str, name: str) -> None:
    params = {"lr": 0.003, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.07, "torch_adam": True}
    engine = start(config=settings(optimizer={"type": kind, "params": params}, loqt={"optim": {"name": name}}))
    real = engine.basic_optimizer
    assert isinstance(real, torch.optim.AdamW if name == "adamw" else bitsandbytes.optim.AdamW8bit)
    for group in real.param_groups:
        assert (group["lr"], list(group["betas"]), group["eps"]) == (0.003, [0.8, 0.95], 1e-6)
        assert group["weight_decay"] == 0.07


def test_bf16_masters_take_them_too() -> None:
    config = settings(
        optimizer={"params": {"lr": 0.003, "betas": [0.8, 0.95], "weight_decay": 0.07}},
        bf16={"enabled": True},
        loqt={"optim": {"name": "adamw", "master": "bf16"}},
    )
    engine = start(config=config)
    losses = learn(engine, 20)
    inner = engine._state.shards[0].optimizer.param_groups[0]
    assert (inner["lr"], tuple(inner["betas"]), inner["weight_decay"]) == (0.003, (0.8, 0.95), 0.07)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_of_torch_is_taken_over(kind: Any) -> None:
    model = Net()
    decay = {} if kind is torch.optim.Adam else {"weight_decay": 0.07}
    head = {"params": list(model.head.parameters()), "lr": 0.002}
    rest = {"params": [p for name, p in model.named_parameters() if not name.startswith("head")]}
    given = kind([head, rest], lr=0.003, betas=(0.8, 0.95), eps=1e-6, **decay)
    engine = start(model, optimizer=given, config=settings(optimizer=None))
    rates = options_of(engine)
    assert rates["head.B"][0] == rates["head.bias"][0] == 0.002
    assert rates["up.B"][0] == rates["embedding.weight"][0] == 0.003
    for group in engine.basic_optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)
        assert group["weight_decay"] == decay.get("weight_decay", 0.0)
    losses = learn(engine, 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "optimizer is a SGD"),
        (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1), "L2 penalty"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.AdamW(p, lr=0.1, maximize=True), "maximize=True"),
    ],
)
def test_optimizers_that_cannot_be_taken_over_are_refused(make: Any, named: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=named):
        start(model, optimizer=make(model.parameters()), config=settings(optimizer=None))
    assert not loqt_layers(model), "refused before anything was converted"


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(batch(0)).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="has moments"):
        start(model, optimizer=optimizer, config=settings(optimizer=None))


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize("callable_", [False, True])
def test_an_optimizer_and_the_json_section_contradict(as_path: bool, callable_: bool, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings()), encoding="utf-8")
    model = Net()
    optimizer: Any = torch.optim.AdamW if callable_ else torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="give one of them"):
        start(model, optimizer=optimizer, config=file if as_path else settings())


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"type": "Lamb", "params": {"lr": 0.1}}, "optimizer.type=Lamb"),
        ({"type": "Muon", "params": {"lr": 0.1}}, "optimizer.type=Muon"),
        ({"type": "OneBitAdam", "params": {"lr": 0.1}}, "optimizer.type=OneBitAdam"),
        ({"type": "AdamW", "params": {"lr": 0.1, "freeze_step": 3}}, "optimizer.params.freeze_step"),
        ({"type": "Adam", "params": {"weight_decay": 0.1, "adam_w_mode": False}}, "adam_w_mode=false"),
        ({"type": "AdamW", "params": {"bias_correction": False}}, "bias_correction=false"),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_json_optimizers_that_cannot_be_honoured(section: dict[str, Any], named: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=named):
        start(model, config=settings(optimizer=section))
    assert not loqt_layers(model)


def test_an_option_in_both_places_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.params.lr=0.01 and loqt.optim.lr=0.2"):
        start(config=settings(loqt={"optim": {"lr": 0.2}}))


@pytest.mark.parametrize("make", [torch.optim.AdamW, bitsandbytes.optim.Adam8bit, bitsandbytes.optim.AdamW])
def test_a_function_that_makes_the_optimizer(make: Any) -> None:
    engine = start(optimizer=lambda groups: make(groups, betas=(0.8, 0.9)), config=settings(optimizer=None))
    assert isinstance(engine.basic_optimizer, make)
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in engine.basic_optimizer.param_groups)
    losses = learn(engine, 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [torch.optim.SGD, bitsandbytes.optim.Lion8bit])
def test_a_function_that_makes_another_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=make.__name__):
        start(optimizer=lambda groups: make(groups, lr=0.1), config=settings(optimizer=None))


# ---------------------------------------------------------------- the learning rate

SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 5},
    "WarmupDecayLR": {"warmup_max_lr": 0.02, "warmup_num_steps": 3, "total_num_steps": 8, "warmup_type": "linear"},
    "WarmupCosineLR": {"total_num_steps": 8, "warmup_num_steps": 3},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 4, "cycle_momentum": False},
    "LRRangeTest": {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 2},
    "StepLR": {"step_size": 3, "gamma": 0.5},  # of torch
}


def rates(engine: Any) -> list[tuple[list[float], list[float]]]:
    """What `get_lr` says and what the groups have, before the first step and after each; a group's only once."""
    found = []
    for _ in range(9):
        groups = list(dict.fromkeys(group["lr"] for group in engine.optimizer.param_groups))
        found.append((list(dict.fromkeys(engine.get_lr())), groups))
        learn(engine, 1)
    return found


@pytest.mark.parametrize(
    ("kind", "stage"),
    # DeepSpeed gives torch's schedulers ZeRO's optimizer, which they do not take.
    [(kind, stage) for kind in SCHEDULERS for stage in (0, 2) if (kind, stage) != ("StepLR", 2)],
)
def test_schedulers_of_the_json_give_the_rates_of_plain_deepspeed(kind: str, stage: int) -> None:
    config = settings(
        optimizer={"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        scheduler={"type": kind, "params": SCHEDULERS[kind]},
        zero_optimization={"stage": stage},
    )
    ours = start(config=config)
    model = Net()
    plain = {name: section for name, section in config.items() if name != "loqt"}
    theirs, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=plain)
    assert type(ours.lr_scheduler) is type(theirs.lr_scheduler)
    assert rates(ours) == rates(theirs)


def test_a_function_that_makes_the_scheduler() -> None:
    engine = start(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step))
    assert [found for found, _ in rates(engine)][:4] == [[0.01], [0.005], [0.0025], [0.00125]]


def test_a_scheduler_object_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ConfigError, match="holds the old optimizer; give lambda optimizer"):
        start(model, optimizer=optimizer, lr_scheduler=scheduler, config=settings(optimizer=None))
    assert not loqt_layers(model)


def test_max_steps_gives_our_schedule() -> None:
    optim = {"name": "adamw", "lr_full_rank": 0.001, "schedule": "cosine", "warmup_steps": 4, "min_lr_ratio": 0.1}
    engine = start(config=settings(loqt={"max_steps": 12, "optim": optim}))
    used = []
    for step in range(12):
        engine.backward(engine(batch(step)))
        report = engine.step()
        used.append((report.lr, report.lr_full_rank))
    factors = [lr for lr, _ in used]
    assert factors[0] == pytest.approx(0.01 / 4) and max(factors) == pytest.approx(0.01)
    assert factors[:4] == sorted(factors[:4]) and factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] < 0.002
    assert [full for _, full in used] == pytest.approx([lr / 10 for lr in factors])


@pytest.mark.parametrize(
    ("changes", "arguments", "named"),
    [
        ({"loqt": {"max_steps": 9}, "scheduler": {"type": "StepLR", "params": {"step_size": 3}}}, {}, "both decide"),
        ({"loqt": {"max_steps": 9}}, {"lr_scheduler": lambda optimizer: None}, "both decide"),
        ({"loqt": {"optim": {"warmup_steps": 3}}}, {}, "give loqt.max_steps"),
    ],
)
def test_two_schedules_are_refused(changes: dict[str, Any], arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        start(config=settings(**changes), **arguments)


def test_rates_that_the_script_sets_are_used() -> None:
    """Some scripts write into `param_groups` instead of having a scheduler."""
    engine = start(config=settings(loqt={"interval": 100}))
    learn(engine, 2)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    before = held(engine)
    learn(engine, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(engine).items())


# ---------------------------------------------------------------- the step


def test_accumulation_is_the_whole_batch_in_parts() -> None:
    """Also in steps that re-initialize: each micro-batch is tapped."""
    unquantized = {"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0}
    whole = start(config=settings(loqt=unquantized))
    parts = start(config=settings(loqt=unquantized, train_micro_batch_size_per_gpu=2))
    assert learn(parts, 8) == pytest.approx(learn(whole, 8), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_norm_and_clipping_are_those_of_torchs_gradient(stage: int) -> None:
    limit = 0.02
    engine = start(config=settings(gradient_clipping=limit, zero_optimization={"stage": stage}))
    learn(engine, 2)
    moments = {name: engine._state.moment(name, 0).clone() for name in engine._trained}
    loss = engine(batch(2))
    trained = list(engine._trained.values())
    gradients = torch.autograd.grad(engine.module(batch(2)), trained)
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    engine.backward(loss)
    report = engine.step()
    assert float(engine.get_global_grad_norm()) == pytest.approx(norm, rel=1e-5) == report.grad_norm
    assert norm > 2 * limit
    for name, gradient in zip(engine._trained, gradients, strict=True):
        expected = 0.9 * moments[name] + 0.1 * gradient * limit / (norm + 1e-6)
        torch.testing.assert_close(engine._state.moment(name, 0), expected, rtol=1e-4, atol=1e-9)


def test_evaluation_in_the_middle_changes_nothing() -> None:
    """Within a step that re-initializes: between forward and backward, between micro-batches, before the step."""
    undisturbed = start(config=settings(train_micro_batch_size_per_gpu=4))
    expected = learn(undisturbed, 6)
    engine = start(config=settings(train_micro_batch_size_per_gpu=4))

    def evaluate() -> None:
        engine.eval()
        with torch.no_grad():
            engine(batch(99, rows=3))
        engine.module(batch(98, rows=3))  # with gradients on
        engine.train()
        with torch.no_grad():
            engine(batch(97, rows=3))

    losses = []
    for step in range(6):
        evaluate()
        parts = []
        for part in batch(step).chunk(2):
            loss = engine(part)
            evaluate()
            engine.backward(loss)
            evaluate()
            engine.step()
            parts.append(loss.detach())
        losses.append(torch.stack(parts).mean().item())  # in float32, as `learn` has it
    assert losses == expected


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "deepspeed"])
def test_activation_checkpointing_changes_nothing(kind: str) -> None:
    expected = learn(start(), 6)
    model = Net()
    if kind == "deepspeed":
        deepspeed.checkpointing.configure(None, num_checkpoints=1)
        model.remember = deepspeed.checkpointing.checkpoint
    else:
        model.remember = lambda function, x: checkpoint(function, x, use_reentrant=kind == "reentrant")
    assert learn(start(model), 6) == expected


def test_a_backward_of_the_loss_itself() -> None:
    """DeepSpeed lets scripts call `loss.backward()`."""
    expected = learn(start(), 6)
    engine = start()
    losses = []
    for step in range(6):
        loss = engine(batch(step))
        loss.backward()
        engine.step()
        losses.append(loss.item())
    assert losses == expected


def test_gradients_without_sums_over_the_ranks_are_gathered_whole() -> None:
    """`no_sync`: several backwards before the one that ends the step."""
    unquantized = {"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0}
    config = settings(loqt=unquantized, zero_optimization={"stage": 0})
    expected = learn(start(config=config), 8)
    engine = start(config=config)
    losses = []
    for step in range(8):
        one, two = batch(step).chunk(2)
        with engine.no_sync():
            first = engine(one)
            engine.backward(first / 2)
        second = engine(two)
        engine.backward(second / 2)
        engine.step()
        losses.append((first.item() + second.item()) / 2)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_w_is_kept_dequantized_in_the_dtype_it_is_used_in() -> None:
    """As many layers as have room in bf16, of a model that was given in float32; under autocast it would be no use."""
    layers = loqt_layers(start(config=settings(bf16={"enabled": True})).module)
    room = sum(2 * layer.in_features * layer.out_features for layer in layers.values())
    change = {"dequantized_cache_gib": room / 2**30}
    engine = start(config=settings(bf16={"enabled": True}, loqt=change))
    learn(engine, 4)
    for layer in loqt_layers(engine.module).values():
        assert layer.keeps_dequantized
        with layer.weight_q_buffer(torch.bfloat16) as kept:
            assert torch.equal(kept, layer.weight_q(torch.bfloat16))
    with pytest.raises(ConfigError, match="dequantized_cache_gib"):
        start(config=settings(loqt=change, torch_autocast={"enabled": True, "dtype": "bfloat16"}))


@pytest.mark.parametrize("by_json", [False, True])
def test_autocast(by_json: bool) -> None:
    """float32 parameters, bf16 products, asked for in the script or in the JSON: the loss is close to that without."""
    section = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if by_json else {}
    engine = start(config=settings(**section))
    expected = learn(start(), 12)
    losses = []
    for step in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not by_json):
            loss = engine(batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=0.03) and losses != expected
    assert engine.module.up.B.dtype == torch.float32


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_bf16(given: torch.dtype) -> None:
    """Scripts give the model in either; DeepSpeed casts it."""
    engine = start(Net().to(given), config=settings(bf16={"enabled": True}))
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    losses = learn(engine, 30)
    assert losses[-1] < 0.75 * losses[0]


@pytest.fixture
def cpu_with_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks for matrix units before it trains in fp16 on a CPU; torch computes it without."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)


FP16 = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 4, "hysteresis": 1}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("subspace", ["exact", "sketch"])
def test_loss_scaling_skips_and_goes_on(stage: int, subspace: str, cpu_with_fp16: None) -> None:
    """The first scales overflow: those steps change nothing, and the re-initialization waits for one that does not."""
    loqt = {"subspace": subspace} | ({"sketch_oversampling": 4} if subspace == "sketch" else {})
    given = settings(zero_optimization={"stage": stage}, fp16=FP16, loqt=loqt)
    engine = start(config=given)
    before = held(engine)
    reports: list[Any] = []
    for step in range(40):
        engine.backward(engine(batch(step)))
        reports.append(engine.step())
        if not any(report.applied for report in reports):
            assert all(torch.equal(tensor, before[name]) for name, tensor in held(engine).items())
    first = next(index for index, report in enumerate(reports) if report.applied)
    assert 0 < first < 20 and engine.skipped_steps == sum(not report.applied for report in reports) >= first
    assert reports[first].reinit is not None, "it was due since step 0"
    assert all(layer.kept is None for layer in reports[first].reinit.layers)
    assert {p.dtype for p in engine.module.parameters()} == {torch.float16}
    assert all(0 < layer.captured_energy <= 1.0001 for layer in reports[first].reinit.layers)
    assert learn(engine, 10)[-1] < 0.85 * learn(start(config=given), 1)[0]


def test_the_loss_scale_goes_on_from_a_checkpoint(cpu_with_fp16: None, tmp_path: Path) -> None:
    engine = start(config=settings(fp16=FP16))
    learn(engine, 25)
    engine.save_checkpoint(tmp_path)
    expected = learn(engine, 8)
    other = start(Net(seed=3), config=settings(fp16=FP16))
    other.load_checkpoint(tmp_path)
    assert other.optimizer.loss_scale < 2**24
    assert learn(other, 8) == expected and other.optimizer.loss_scale == engine.optimizer.loss_scale
    assert other.skipped_steps == engine.skipped_steps > 0


def test_loss_scaling_at_stage_0_is_refused(cpu_with_fp16: None) -> None:
    with pytest.raises(ConfigError, match=r"fp16 with zero_optimization.stage=0.*stage 1 or 2"):
        start(config=settings(fp16=FP16, zero_optimization={"stage": 0}))


def test_a_bf16_model_without_the_section_is_refused() -> None:
    with pytest.raises(ConfigError, match='embedding.weight is torch.bfloat16.*"bf16"'):
        start(Net().bfloat16())


# ---------------------------------------------------------------- when a step begins


def test_a_model_in_evaluation_mode_is_trained_like_any_other() -> None:
    """`from_pretrained` gives models in this mode, and DeepSpeed does not ask."""
    model = Net().eval()
    assert learn(start(model), 8) == learn(start(), 8)
    assert not model.training and all(layer.B.any() for layer in loqt_layers(model).values())


def test_a_forward_past_the_engine_is_refused() -> None:
    engine = start()
    learn(engine, 1)
    engine.backward(engine.module(batch(1)))
    with pytest.raises(RuntimeError, match=r"engine\(\.\.\.\) instead of engine.module"):
        engine.step()


def test_saving_and_loading_wait_for_the_step(tmp_path: Path) -> None:
    engine = start()
    learn(engine, 1)
    engine(batch(1))  # looked at only
    engine.save_checkpoint(tmp_path)
    assert all(layer.tap is None for layer in loqt_layers(engine.module).values())
    engine.backward(engine(batch(1)))
    for act in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(ValueError, match="a step has begun"):
            act(tmp_path)
    engine.step()
    engine.load_checkpoint(tmp_path)
    assert engine.global_steps == 1


def test_the_first_initialization_after_a_checkpoint_of_other_weights(tmp_path: Path) -> None:
    """What is compensated for is the weight that was saved, not that of the model it was loaded into."""
    start(Net(seed=1)).save_checkpoint(tmp_path)
    engine = start(Net(seed=2))
    engine.load_checkpoint(tmp_path)
    before = {name: layer.effective_weight() for name, layer in loqt_layers(engine.module).items()}
    learn(engine, 1)
    for name, layer in loqt_layers(engine.module).items():
        change = (layer.effective_weight() - before[name]).norm() / before[name].norm()
        assert change < 0.15, "a rounding, and not another model"


# ---------------------------------------------------------------- whose hyper-parameters


def test_a_function_decides_what_it_states() -> None:
    config = settings(optimizer=None)
    made = start(config=config, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1))
    assert {(group["lr"], group["weight_decay"]) for group in made.optimizer.param_groups} == {(1e-4, 0.1)}


@pytest.mark.parametrize("name", ["lr", "lr_full_rank", "weight_decay"])
def test_an_optimizer_and_options_of_ours_contradict(name: str) -> None:
    model = Net()
    config = settings(optimizer=None, loqt={"optim": {name: 0.02}})
    with pytest.raises(ConfigError, match=f"optimizer is given, and loqt.optim.{name}"):
        start(model, config=config, optimizer=torch.optim.AdamW(model.parameters()))
    assert not loqt_layers(model), "refused before anything was converted"


def test_warm_up_to_a_constant_rate() -> None:
    loqt = {"max_steps": 100, "optim": {"lr": 0.02, "schedule": "constant", "warmup_steps": 50}}
    engine = start(config=settings(optimizer=None, loqt=loqt))
    learn(engine, 2)
    assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 2 / 50)


# ---------------------------------------------------------------- models on the meta device


@pytest.mark.parametrize("tied", [False, True])
def test_a_directory_of_weights_equals_the_model_in_memory(tied: bool, tmp_path: Path) -> None:
    original = Net(tied=tied, seed=3)
    save_file({n: p.detach().clone() for n, p in original.named_parameters()}, tmp_path / "model.safetensors")
    expected = start(original)
    with torch.device("meta"):
        empty = Net(tied=tied)
    engine = start(empty, weights=tmp_path)
    assert held(engine).keys() == held(expected).keys()
    assert all(torch.equal(tensor, held(expected)[name]) for name, tensor in held(engine).items())
    assert learn(engine, 6) == learn(expected, 6)


@pytest.mark.parametrize("buffers", ["real", "meta"])
def test_a_llama_on_the_meta_device(buffers: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    original = AutoModelForCausalLM.from_config(llama_config())
    original.save_pretrained(tmp_path)
    # transformers reads what it wrote: the reference is the model that a script would load
    in_memory = start(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train())
    if buffers == "meta":
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(llama_config())
        assert any(buffer.is_meta for buffer in empty.buffers())
    else:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(llama_config())
    engine = start(empty.train(), weights=tmp_path)

    def losses(trained: LoQTEngine) -> list[float]:
        found = []
        for step in range(5):
            loss = lm_loss(trained, token_batch(step, rows=ROWS))
            trained.backward(loss)
            trained.step()
            found.append(loss.item())
        return found

    assert losses(engine) == losses(in_memory)


def test_drawn_weights_depend_on_the_seed_alone() -> None:
    def drawn(seed: int, torch_seed: int) -> LoQTEngine:
        with torch.device("meta"):
            empty = Net()
        torch.manual_seed(torch_seed)
        return start(empty, weights="init", config=settings(loqt={"seed": seed}))

    one, other = held(drawn(1, 10)), held(drawn(1, 20))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    different = held(drawn(2, 10))
    assert not torch.equal(one["up.w_codes"], different["up.w_codes"])
    assert not torch.equal(one["embedding.weight"], different["embedding.weight"])
    engine = drawn(1, 10)
    losses = learn(engine, 30)
    assert losses[-1] < 0.8 * losses[0]


def test_drawn_weights_are_compensated_as_those_in_memory() -> None:
    with torch.device("meta"):
        empty, shape = Net(), Net()
    source = initializer(7)(shape)
    model = Net()
    for name, module in model.named_modules():
        if parameters := dict(module.named_parameters(recurse=False)):
            drawn = source.module(name, shape.get_submodule(name))
            for short, parameter in parameters.items():
                parameter.data.copy_(drawn[short])
    config = settings(loqt={"seed": 7})
    assert learn(start(empty, weights="init", config=config), 6) == learn(start(model, config=config), 6)


@pytest.mark.parametrize(
    ("meta", "weights", "named"),
    [
        (True, None, "embedding.weight is on the meta device: give weights=DIRECTORY"),
        (False, "init", "has its weights already"),
        (True, "/absent", "weights='/absent' is no directory"),
    ],
)
def test_weights_that_do_not_fit(meta: bool, weights: str | None, named: str) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = Net()
    with pytest.raises(ConfigError, match=named):
        start(model, weights=weights)


# ---------------------------------------------------------------- what cannot be honoured


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3 is not supported"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"amp": {"enabled": True}}, "`amp`"),
        ({"tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel`"),
        ({"pipeline": {"stages": 2}}, "`pipeline`"),
        ({"compression_training": {"weight_quantization": {}}}, "`compression_training`"),
        ({"loqt": {"rnak": 8}}, "rnak"),
        ({"loqt": {"rank": 60}}, "loqt.rank=60"),
        ({"lokt": {}}, "did you mean `loqt`"),
        ({"loqt": {"optim": {"layerwise": True}}}, "optim.layerwise=true"),
        ({"train_batch_size": None}, "train_batch_size"),
    ],
    ids=str,
)
def test_refused_sections(changes: dict[str, Any], named: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=named):
        start(model, config=settings(**changes))
    assert not loqt_layers(model), "refused before anything was converted"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mpu": SimpleNamespace()}, "mpu"),
        ({"mesh_param": (1, 1)}, "mesh_param"),
        ({"config": None}, "config=None"),
        ({"config": "absent.json"}, "absent.json cannot be read"),
        ({"args": argparse.Namespace(deepspeed_config="a.json")}, "a.json"),
        ({"config_params": {}}, "config_params"),
        ({"optimizer": 3, "config": settings(optimizer=None)}, "optimizer=3"),
    ],
    ids=str,
)
def test_refused_arguments(arguments: dict[str, Any], named: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=named):
        start(model, **arguments)
    assert not loqt_layers(model)


def test_refused_models() -> None:
    for nothing in (None, [Net()]):
        with pytest.raises(ConfigError, match="must be a torch.nn.Module"):
            loqt_ds.initialize(model=nothing, config=settings())
    with pytest.raises(ConfigError, match="PipelineModule"):
        start(PipelineModule(layers=[nn.Linear(8, 8)], num_stages=1, loss_fn=nn.MSELoss()))
    with pytest.raises(ValueError, match="matches no linear layer"):
        start(nn.Embedding(5, 5))


# ---------------------------------------------------------------- saving and loading


def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(tmp_path: Path) -> None:
    config = settings(
        optimizer={"params": {"lr": 0.01}},
        scheduler={"type": "WarmupDecayLR", "params": SCHEDULERS["WarmupDecayLR"] | {"total_num_steps": 20}},
        loqt={"optim": {"name": "adamw8bit"}},
        train_micro_batch_size_per_gpu=4,
    )
    engine = start(config=config)
    learn(engine, 5)
    assert engine.save_checkpoint(tmp_path, client_state={"epoch": 3}) is True
    rates_then = engine.get_lr()
    expected = learn(engine, 6)
    again = start(Net(seed=9), config=config)
    path, client = again.load_checkpoint(str(tmp_path))
    assert path is not None and client == {"epoch": 3} and again.global_steps == 5
    assert again.get_lr() == rates_then != engine.get_lr()
    assert learn(again, 6) == expected


def test_a_checkpoint_of_before_the_first_initialization_needs_a_new_engine(tmp_path: Path) -> None:
    """The first P is compensated for the original weights, which an engine lets go of when all layers have one."""
    engine = start()
    engine.save_checkpoint(tmp_path)
    expected = learn(engine, 4)
    before = held(engine)
    with pytest.raises(ValueError, match="before the first initialization.*new engine"):
        engine.load_checkpoint(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(engine).items())
    other = start()
    other.load_checkpoint(tmp_path)
    assert learn(other, 4) == expected


@pytest.mark.parametrize(("kind", "other"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_another_kind_of_adam_goes_on_with_the_moments(kind: str, other: str, tmp_path: Path) -> None:
    """The model is wide enough for factors to be kept in 8 bits."""

    def engine_with(name: str) -> LoQTEngine:
        loqt = {"rank": 30, "interval": 50, "optim": {"name": name}}
        return start(config=settings(loqt=loqt))

    engine = engine_with(kind)
    learn(engine, 6)
    engine.save_checkpoint(tmp_path)
    expected = learn(engine, 5)
    changed = engine_with(other)
    changed.load_checkpoint(tmp_path)
    flat = changed.optimizer.single_partition_of_fp32_groups[0]
    kept = changed.optimizer.optimizer.state[flat]
    assert kept["state1" if other == "adamw8bit" else "exp_avg"].dtype == (
        torch.uint8 if other == "adamw8bit" else torch.float32
    )
    assert learn(changed, 5) == pytest.approx(expected, rel=2e-3)


def test_tags(tmp_path: Path) -> None:
    engine = start()
    learn(engine, 1)
    engine.save_checkpoint(tmp_path, "global_step1", {"of": 1})
    learn(engine, 1)
    engine.save_checkpoint(tmp_path, tag=2, client_state={"of": 2})
    assert (tmp_path / "latest").read_text() == "2"
    assert engine.load_checkpoint(tmp_path)[1] == {"of": 2} and engine.global_steps == 2
    assert engine.load_checkpoint(tmp_path, tag=2)[1] == {"of": 2}
    path, client = engine.load_checkpoint(tmp_path, tag="global_step1")
    assert path == str(tmp_path / "global_step1") and client == {"of": 1} and engine.global_steps == 1
    with pytest.raises(CheckpointError, match="absent"):
        engine.load_checkpoint(tmp_path, tag="absent")


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    engine = start()
    before = held(engine)
    assert engine.load_checkpoint(tmp_path / "absent") == (None, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(engine).items())


@pytest.mark.parametrize("how", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
def test_the_weights_alone(how: dict[str, bool], tmp_path: Path) -> None:
    engine = start()
    learn(engine, 4)
    engine.save_checkpoint(tmp_path)
    saved, loss = held(engine), engine.module(batch(50)).item()
    again = start(Net(seed=9))
    learn(again, 2)
    again.load_checkpoint(tmp_path, **how)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in held(again).items())
    assert again.module(batch(50)).item() == loss
    assert not again._state.has_moments("up.B") and again.get_lr()[0] == 0.01
    losses = learn(again, 8)
    assert losses[0] == pytest.approx(loss, rel=0.2) and losses[-1] < losses[0]


def test_what_the_format_does_not_have_is_refused(tmp_path: Path) -> None:
    engine = start()
    for options in ({"save_latest": False}, {"exclude_frozen_parameters": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            engine.save_checkpoint(tmp_path, **options)
    for options in ({"load_module_strict": False}, {"load_lr_scheduler_states": False}, {"custom_load_fn": print}):
        with pytest.raises(ValueError, match=next(iter(options))):
            engine.load_checkpoint(tmp_path, **options)
    with pytest.raises(ValueError, match="client_state.*JSON"):
        engine.save_checkpoint(tmp_path, client_state={"random": torch.get_rng_state()})
    for save in (engine.save_16bit_model, engine.save_fp16_model):
        with pytest.raises(ValueError, match=r"engine.export\(.*bf16"):
            save(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    start().save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        start(Net(tied=True)).load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_loaded_by_the_original_model(dtype: str, tied: bool, tmp_path: Path) -> None:
    engine = start(Net(tied=tied), config=settings(bf16={"enabled": dtype == "bf16"}))
    learn(engine, 10)
    expected = engine.module(batch(50)).item()
    engine.export(tmp_path / "out", format="bf16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model = Net(tied=tied, seed=9)
    missing = model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= ({"head.weight"} if tied else set())
    assert model(batch(50)).item() == pytest.approx(expected, rel=0.01)
    assert learn(engine, 2), "training goes on"


def test_a_checkpoint_of_a_classifier_is_exported_as_one(tmp_path: Path) -> None:
    import transformers

    from loqt_ds.export import export_checkpoint

    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    engine = start(
        transformers.BertForSequenceClassification(transformers.BertConfig(**shape, num_labels=3)), config=settings()
    )
    rows = {"input_ids": torch.tensor([[5, 9, 3]]), "labels": torch.tensor([2])}
    engine.backward(engine(**rows).loss)
    engine.step()
    engine.save_checkpoint(str(tmp_path / "saved"))
    report = export_checkpoint(tmp_path / "saved", tmp_path / "out", format="bf16", say=str)
    assert report.loader == "AutoModelForSequenceClassification"
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.classifier.weight, engine.module.classifier.weight.bfloat16())
    assert engine.export(tmp_path / "unverified", "bf16", verify=False).verification is None
