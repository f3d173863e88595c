"""The engine inside DeepSpeed (one process): against the single engine, and its view of ZeRO's flat states.

References: the single engine, which is tested against dense models; and blocks of 8-bit moments dequantized and
quantized here, in numpy, from their codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import factors, llama_config, lm_loss, make_config, relative, token_batch

from loqt_ds.config import Config, ConfigError
from loqt_ds.engines.base import Engine, StepReport
from loqt_ds.engines.deepspeed import LoQTEngine, check_deepspeed, start_distributed
from loqt_ds.engines.single import SingleEngine
from loqt_ds.engines.zero import ZeroStore
from loqt_ds.method.conversion import build_model, initializer

ZERO2 = Path(__file__).resolve().parents[2] / "configs" / "zero2.json"
BLOCK = 256


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process group of `start_distributed` stays; its variables do not reach other tests."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield


def engines(config: Config, *, stage: int = 2, **shape: Any) -> tuple[SingleEngine, LoQTEngine]:
    """Both engines on the same model: two layers, 5404 factor elements, so that moments are kept in 8 bits and slices
    of 7 · 86 and 7 · 32 elements straddle the blocks of 256."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    description = llama_config(**({"num_hidden_layers": 2} | shape))
    ours, source = build_model(description, config.loqt, initializer(0), dtype=dtype)
    theirs, again = build_model(description, config.loqt, initializer(0), dtype=dtype)
    ds_config = check_deepspeed(ZERO2, config)
    ds_config["zero_optimization"] = ds_config["zero_optimization"] | {"stage": stage}
    single = SingleEngine(ours, config, original=source.weight)
    start_distributed()
    return single, LoQTEngine(theirs, config, ds_config, original=again.weight)


def configuration(**sections: dict[str, Any]) -> Config:
    sections["loqt"] = {"rank": 7} | sections.get("loqt", {})
    sections["train"] = {"micro_batch_size": 4} | sections.get("train", {})
    return make_config(**sections)


def train_step(engine: Engine, num_micro_batches: int = 1, *, factor: float = 1.0) -> tuple[float, StepReport]:
    """One step on the batch of its index; the loss is multiplied by `factor` before the backward."""
    losses, report = [], None
    for part in token_batch(engine.step_index).chunk(num_micro_batches):
        loss = lm_loss(engine, part)
        engine.backward(loss * factor)
        report = engine.step()
        losses.append(loss.item())
    assert report is not None
    return sum(losses) / len(losses), report


# ---------------------------------------------------------------- the same run as on one device


PLAIN: dict[str, Any] = {}
CASES = {
    "plain": (PLAIN, PLAIN),
    "two-rates-decay-clipping": ({"lr_full_rank": 0.003, "weight_decay": 0.1}, {"max_grad_norm": 0.3}),
    "accumulation": (
        {"betas": [0.8, 0.95]},
        {"gradient_accumulation_steps": 2, "micro_batch_size": 2, "max_grad_norm": 1.0},
    ),
}
# Stages 1 and 2 differ in what is sharded, and there is one process: one case of stage 1 is enough.
RUNS = [(1, "plain", "keep")] + [(2, case, state) for case in CASES for state in ("keep", "project", "reset")]


@pytest.mark.parametrize(("stage", "case", "state"), RUNS)
def test_losses_equal_the_single_engines(stage: int, case: str, state: str) -> None:
    """Without quantization nothing can flip: nine steps with five re-initializations stay together."""
    optim, train = CASES[case]
    loqt = {"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0, "optimizer_state": state}
    config = configuration(loqt=loqt, optim=optim, train=train)
    single, zero = engines(config, stage=stage)
    num = config.train.gradient_accumulation_steps
    for step in range(9):
        (expected, ours), (actual, theirs) = train_step(single, num), train_step(zero, num)
        assert actual == pytest.approx(expected, rel=1e-5), f"step {step}"
        assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
        assert (theirs.step, theirs.applied, theirs.lr, theirs.lr_full_rank) == (
            ours.step,
            ours.applied,
            ours.lr,
            ours.lr_full_rank,
        )
        assert (theirs.reinit is None) == (ours.reinit is None) == (step % 2 == 1)
    for name, factor in factors(single).items():
        assert relative(factors(zero)[name], factor) < 1e-3, name


def test_quantized_losses_equal_the_single_engines_over_an_interval() -> None:
    """Codes of NF4 can flip where a sum is rounded otherwise; up to the second re-initialization they have not."""
    config = configuration(loqt={"interval": 6})
    single, zero = engines(config)
    for step in range(7):
        (expected, ours), (actual, theirs) = train_step(single), train_step(zero)
        assert actual == pytest.approx(expected, rel=1e-5), f"step {step}"
        if ours.reinit is not None and theirs.reinit is not None:
            for one, other in zip(ours.reinit.layers, theirs.reinit.layers, strict=True):
                assert one.name == other.name
                assert other.error_after == pytest.approx(one.error_after, rel=1e-3)
                assert other.captured_energy == pytest.approx(one.captured_energy, rel=1e-4)


# ---------------------------------------------------------------- what DeepSpeed must not touch


def test_deepspeeds_casts_leave_frozen_weights_and_rotary_tables_alone() -> None:
    config = configuration(train={"dtype": "bf16"})
    description = llama_config(num_hidden_layers=2)
    model, source = build_model(description, config.loqt, initializer(0), dtype=torch.bfloat16)
    before = {name: (b.dtype, b.clone()) for name, b in model.named_buffers()}
    kinds = {dtype for dtype, _ in before.values()}
    assert torch.uint8 in kinds and torch.float32 in kinds, "codes and rotary tables"
    start_distributed()
    zero = LoQTEngine(model, config, check_deepspeed(ZERO2, config), original=source.weight)

    def check(names: set[str]) -> None:
        now = dict(zero.network.named_buffers())
        assert now.keys() == before.keys()
        for name in names:
            dtype, value = before[name]
            assert now[name].dtype == dtype, name
            assert torch.equal(now[name].view(torch.uint8), value.view(torch.uint8)), name

    check(set(before))
    train_step(zero)  # the first initialization rewrites codes, and only codes
    check({name for name, (dtype, _) in before.items() if dtype != torch.uint8})
    after = {name: b.clone() for name, b in zero.network.named_buffers()}
    assert not torch.equal(after["model.layers.0.mlp.up_proj.p_codes"], before["model.layers.0.mlp.up_proj.p_codes"][1])
    train_step(zero)  # an ordinary step rewrites nothing
    for name, buffer in zero.network.named_buffers():
        assert torch.equal(buffer, after[name]), name
    assert {p.dtype for p in zero.network.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- slices of flat states


@pytest.fixture(scope="module")
def trained() -> LoQTEngine:
    """A DeepSpeed engine with 8-bit moments after three steps."""
    config = configuration(optim={"name": "adamw8bit"}, loqt={"interval": 50})
    _, zero = engines(config)
    for _ in range(3):
        train_step(zero)
    return zero


def flat_moment(state: dict[str, Any], index: int) -> np.ndarray[Any, Any]:
    """A whole 8-bit moment in float64, from its codes: table[code] · absmax of the block of 256."""
    number = index + 1
    codes = state[f"state{number}"].numpy().reshape(-1)
    table = state[f"qmap{number}"].double().numpy()
    absmax = state[f"absmax{number}"].double().numpy()
    return table[codes] * np.repeat(absmax, BLOCK)[: codes.size]


def factor_places(zero: LoQTEngine) -> dict[str, slice]:
    """Layer -> slice of the flat group, from the order of the parameters alone."""
    places, start = {}, 0
    for name in zero.controller.layers:
        size = zero.controller.layers[name].B.numel()
        places[name] = slice(start, start + size)
        start += size
    return places


def factor_state(zero: LoQTEngine) -> dict[str, Any]:
    flat = zero.optimizer.single_partition_of_fp32_groups[0]
    return zero.optimizer.optimizer.state[flat]


def store_of(zero: LoQTEngine) -> ZeroStore:
    return ZeroStore(zero._zero_state)


def test_the_case_is_a_hard_one(trained: LoQTEngine) -> None:
    assert factor_state(trained)["state1"].dtype == torch.uint8
    places = factor_places(trained)
    assert sum(place.start % BLOCK != 0 for place in places.values()) > 8
    assert factor_state(trained)["state1"].numel() % BLOCK != 0, "the last block is a partial one"


@pytest.mark.parametrize("index", [0, 1])
def test_a_moment_is_read_from_its_slice_of_the_blocks(trained: LoQTEngine, index: int) -> None:
    whole = flat_moment(factor_state(trained), index)
    assert np.abs(whole).max() > 0
    for name, place in factor_places(trained).items():
        moments = store_of(trained).moments(name)
        assert moments is not None
        layer = trained.controller.layers[name]
        assert moments[index].shape == layer.B.shape and moments[index].dtype == torch.float32
        np.testing.assert_allclose(moments[index].double().numpy().reshape(-1), whole[place], rtol=1e-6, atol=0)


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_a_moment_is_written_to_its_slice_and_its_neighbours_keep_theirs(trained: LoQTEngine, position: str) -> None:
    """Each block that the slice touches is quantized again, to the nearest codes of its new absmax; no other block
    changes a bit."""
    names = list(trained.controller.layers)
    name = {"first": names[0], "middle": names[5], "last": names[-1]}[position]
    place = factor_places(trained)[name]
    state = factor_state(trained)
    draw = torch.Generator().manual_seed(7)
    shape = trained.controller.layers[name].B.shape
    # larger than what the neighbours hold, so that the shared blocks get a new absmax
    new = [torch.randn(shape, generator=draw) * 0.5, torch.rand(shape, generator=draw) * 0.5]
    expected, codes_before = [], []
    for index in (0, 1):
        values = flat_moment(state, index)
        values[place] = new[index].double().numpy().reshape(-1)
        expected.append(values)
        codes_before.append((state[f"state{index + 1}"].clone(), state[f"absmax{index + 1}"].clone()))
    store_of(trained).set_moments(name, *new)
    first, last = place.start // BLOCK, -(-place.stop // BLOCK)
    for index in (0, 1):
        number = index + 1
        codes, absmax = state[f"state{number}"].numpy().reshape(-1), state[f"absmax{number}"].numpy()
        before_codes, before_absmax = codes_before[index]
        outside = np.ones(codes.size, bool)
        outside[first * BLOCK : last * BLOCK] = False
        assert (codes[outside] == before_codes.numpy().reshape(-1)[outside]).all()
        assert (np.delete(absmax, np.s_[first:last]) == np.delete(before_absmax.numpy(), np.s_[first:last])).all()
        table = state[f"qmap{number}"].double().numpy()
        for block in range(first, last):
            wanted = expected[index][block * BLOCK : (block + 1) * BLOCK]
            assert absmax[block] == pytest.approx(np.abs(wanted).max(), rel=1e-6)
            scaled = wanted / np.abs(wanted).max()
            stored = table[codes[block * BLOCK : block * BLOCK + wanted.size]]
            nearest = np.abs(scaled[:, None] - table[None, :]).min(1)
            # the search decides between two neighbours in float32
            assert (np.abs(stored - scaled) <= nearest + 1e-6).all()


def test_a_factor_is_written_to_parameter_and_master(trained: LoQTEngine) -> None:
    """DeepSpeed publishes the masters at every step: what is written to the parameter alone would be undone."""
    name = list(trained.controller.layers)[3]
    layer = trained.controller.layers[name]
    value = torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(3))
    others = {n: trained._zero_state.read(f"{n}.B").clone() for n in trained.controller.layers if n != name}
    store_of(trained).write(name, value)
    assert torch.equal(layer.B.detach(), value)
    flat = trained.optimizer.single_partition_of_fp32_groups[0].data
    assert torch.equal(flat[factor_places(trained)[name]].view(layer.B.shape), value)
    for other, before in others.items():
        assert torch.equal(trained._zero_state.read(f"{other}.B"), before), other
    trained._rates._factors = trained._rates._full_rank = 0.0
    train_step(trained)
    assert torch.equal(layer.B.detach(), value), "the next step published something else"


# ---------------------------------------------------------------- re-initialization and momentum


def train_on_nothing(engine: Engine) -> StepReport:
    """A step whose gradients are all exactly zero."""
    return train_step(engine, factor=0.0)[1]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_with_reset_a_zero_gradient_moves_nothing(name: str) -> None:
    """Momentum that belongs to the old P would (mistake 3 of ALGORITHM.md)."""
    config = configuration(optim={"name": name, "lr": 0.05}, loqt={"optimizer_state": "reset", "interval": 3})
    _, zero = engines(config)
    for _ in range(3):
        train_step(zero)
    *_, (_, report) = [train_step(zero)]
    assert report.reinit is not None and report.step == 3
    before = {n: f.clone() for n, f in factors(zero).items()}
    state = factor_state(zero)
    assert int(state["step"]) == 0
    assert train_on_nothing(zero).applied
    for n, factor in factors(zero).items():
        assert torch.equal(factor, before[n]), n


def test_with_keep_momentum_goes_on() -> None:
    """The counterpart: `keep` carries momentum on purpose, so the test above can fail."""
    config = configuration(optim={"lr": 0.05}, loqt={"optimizer_state": "keep", "interval": 3})
    _, zero = engines(config)
    for _ in range(4):
        train_step(zero)
    before = {n: f.clone() for n, f in factors(zero).items()}
    train_on_nothing(zero)
    assert all(not torch.equal(factor, before[n]) for n, factor in factors(zero).items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_the_re_initialization_stays_due(dtype: str, bad: float) -> None:
    config = configuration(optim={"name": "adamw8bit"}, loqt={"interval": 3}, train={"dtype": dtype})
    _, zero = engines(config)
    for _ in range(3):
        train_step(zero)
    before = {k: v.clone() for k, v in zero.saved_tensors()["model"].items()}
    states = {k: v.clone() for k, v in zero.saved_tensors()["optimizer"].items()}
    _, report = train_step(zero, factor=bad)  # step 3, on which a re-initialization is due
    assert not report.applied and report.reinit is None and report.step == 3
    for key, value in zero.saved_tensors()["model"].items():
        assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8)), key
    for key, value in zero.saved_tensors()["optimizer"].items():
        assert torch.equal(value, states[key]), key
    assert zero.controller.state_dict()["overdue"]
    _, report = train_step(zero)
    assert report.applied and report.reinit is not None and report.step == 4
    assert all(torch.isfinite(f).all() for f in factors(zero).values())


# ---------------------------------------------------------------- what cannot be honoured


def refused(tmp_path: Path, content: Any, config: Config | None = None) -> str:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        check_deepspeed(file, config or configuration())
    message = str(error.value)
    assert "ds.json" in message or content == {"zero_optimization": {"stage": 2}}
    return message


STAGE2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage=3", "use 1 or 2"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage=0", "use 1 or 2"]),
        ({}, ["zero_optimization.stage", "use 1 or 2"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "remove"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param", "remove"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["cpu_offload", "remove"]),
        (STAGE2 | {"optimizer": {"type": "AdamW"}}, ["`optimizer`", "`optim` section", "remove"]),
        (STAGE2 | {"scheduler": {"type": "WarmupLR"}}, ["`scheduler`", "remove"]),
        (STAGE2 | {"fp16": {"enabled": True}}, ["`fp16`", "train.dtype"]),
        (STAGE2 | {"amp": {"enabled": True}}, ["`amp`", "train.dtype"]),
        (STAGE2 | {"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow", "remove"]),
        (STAGE2 | {"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads", "optim.master"]),
        (STAGE2 | {"torch_autocast": {"enabled": True}}, ["`torch_autocast`", "train.dtype"]),
        ({"zero_optimization": [2]}, ["zero_optimization", "object"]),
        ({"zero_optimization": {"stage": 2}, "bf16": True}, ["bf16", "object"]),
        ({"zero_optimization": {"stage": 2}, "loqt": 8}, ["loqt", "object"]),
        ({"zero_optimization": {"stage": 2, "stagee": 1}}, ["stagee"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -4}}, ["reduce_bucket_size", "greater than 0"]),
        ("{not json", ["not valid JSON"]),
        ("[]", ["no JSON object"]),
    ],
    ids=str,
)
def test_refused_sections(tmp_path: Path, content: Any, named: list[str]) -> None:
    message = refused(tmp_path, content)
    for part in named:
        assert part in message, message


@pytest.mark.parametrize(
    ("content", "ours", "theirs"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, "train.micro_batch_size=4", "train_micro_batch_size_per_gpu=3"),
        ({"gradient_accumulation_steps": 3}, "train.gradient_accumulation_steps=1", "gradient_accumulation_steps=3"),
        ({"train_batch_size": 7}, "train.gradient_accumulation_steps = 4", "train_batch_size=7"),
        ({"gradient_clipping": 0.5}, "train.max_grad_norm=None", "gradient_clipping=0.5"),
        ({"bf16": {"enabled": True}}, "train.dtype=fp32", "bf16.enabled=True"),
        ({"loqt": {"rank": 9}}, "loqt.rank=7", "loqt.rank=9"),
        ({"loqt": {"rnak": 9}}, "--help", "loqt.rnak"),
    ],
    ids=str,
)
def test_a_contradiction_names_both_places(tmp_path: Path, content: dict[str, Any], ours: str, theirs: str) -> None:
    message = refused(tmp_path, STAGE2 | content)
    assert ours in message and theirs in message and "ds.json" in message, message


def test_values_that_agree_or_are_auto_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    agreeing = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "loqt": {"rank": 7},
    }
    file.write_text(json.dumps(STAGE2 | agreeing), encoding="utf-8")
    complete = check_deepspeed(file, configuration())
    assert complete["train_batch_size"] == 4 and complete["gradient_clipping"] == 0.0
    assert complete["bf16"]["enabled"] is False


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"optim": {"layerwise": True}}, "optim.layerwise=true"),
        ({"optim": {"master": "bf16"}, "train": {"dtype": "bf16"}}, "optim.master=bf16"),
    ],
)
def test_recipe_options_that_zero_cannot_honour(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        check_deepspeed(ZERO2, configuration(**sections))
    assert "python -m loqt_ds.train" in str(error.value)


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2") as error:
        check_deepspeed(ZERO2, configuration())
    assert "--num_gpus 1" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read .*configs/zero2\.json"):
        check_deepspeed(tmp_path / "absent.json", configuration())
