"""The engine inside DeepSpeed (one process): against the single engine, and its view of ZeRO's flat states.

References: the single engine, which is tested against dense models; and blocks of 8-bit moments dequantized and
quantized here, in numpy, from their codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import equal, factors, llama_config, lm_loss, make_config, relative, restore, save, token_batch
from torch import Tensor

from loqt_ds.config import Config
from loqt_ds.engines.base import Engine, StepReport
from loqt_ds.engines.deepspeed import LoQTEngine, start_distributed
from loqt_ds.engines.ds_config import check_deepspeed
from loqt_ds.engines.single import SingleEngine
from loqt_ds.engines.state import ShardedFactors
from loqt_ds.method.conversion import build_model, initializer

ZERO2 = Path(__file__).resolve().parents[2] / "configs" / "zero2.json"
BLOCK = 256


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    """The process group of `start_distributed` stays; its variables do not reach other tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it again, long after the group was started
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
    return single, LoQTEngine(theirs, config, ds_config, ranks=start_distributed(), original=again.weight)


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
# Stages 1 and 2 differ in what is sharded, and there is one process: one case of stage 1 is enough. Stage 0 has no flat
# partitions; in float32 DeepSpeed steps the plain optimizer.
RUNS = [(1, "plain", "keep")] + [(2, case, state) for case in CASES for state in ("keep", "project", "reset")]
RUNS += [(0, "plain", "project"), (0, "two-rates-decay-clipping", "keep"), (0, "accumulation", "reset")]


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


@pytest.mark.parametrize("stage", [0, 2])
def test_quantized_losses_equal_the_single_engines_over_an_interval(stage: int) -> None:
    """Codes of NF4 can flip where a sum is rounded otherwise; up to the second re-initialization they have not."""
    config = configuration(loqt={"interval": 6})
    single, zero = engines(config, stage=stage)
    for step in range(7):
        (expected, ours), (actual, theirs) = train_step(single), train_step(zero)
        assert actual == pytest.approx(expected, rel=1e-5), f"step {step}"
        if ours.reinit is not None and theirs.reinit is not None:
            for one, other in zip(ours.reinit.layers, theirs.reinit.layers, strict=True):
                assert one.name == other.name
                assert other.error_after == pytest.approx(one.error_after, rel=1e-3)
                assert other.captured_energy == pytest.approx(one.captured_energy, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_losses_in_bf16_follow_the_single_engines(stage: int, name: str) -> None:
    """bf16 with float32 masters: with 32-bit Adam the same masters. Under ZeRO moments in 8 bits are of all factors
    together, else alone of each that is large enough: they are rounded otherwise."""
    config = configuration(optim={"name": name, "weight_decay": 0.1}, loqt={"interval": 6}, train={"dtype": "bf16"})
    single, zero = engines(config, stage=stage)
    tolerance = 1e-5 if name == "adamw" else 1e-3
    for step in range(7):
        (expected, ours), (actual, theirs) = train_step(single), train_step(zero)
        assert actual == pytest.approx(expected, rel=tolerance if step < 6 else 5e-3), f"step {step}"
        assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=0.02)
        if name == "adamw" and step < 6:
            for key, master in single.masters().items():
                assert relative(zero.masters()[key], master) < 1e-5, key
    masters = zero.masters()
    assert set(masters) == {name for name, _ in zero.network.named_parameters()} == set(single.masters())
    for key, parameter in zero.network.named_parameters():
        assert masters[key].dtype == torch.float32 and torch.equal(masters[key].to(torch.bfloat16), parameter)
    assert any(not torch.equal(masters[n].to(torch.bfloat16).float(), masters[n]) for n in masters)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_masters_are_rounded_stochastically(stage: int) -> None:
    """Updates of a sixteenth of a unit in the last place: with rounding to nearest, nothing of float32 remembered,
    norms (all ones) would stay where they are."""
    config = configuration(
        optim={"master": "bf16", "lr": 2**-12, "warmup_steps": 0, "schedule": "constant"}, train={"dtype": "bf16"}
    )
    single, zero = engines(config, stage=stage)
    for _ in range(12):
        expected, _ = train_step(single)
        actual, report = train_step(zero)
        assert report.applied and actual == pytest.approx(expected, rel=5e-3)
    norms = [p.detach() for n, p in zero.network.named_parameters() if n.endswith("norm.weight")]
    moved = torch.cat(norms).double() - 1
    assert 0 < (moved != 0).double().mean() < 1 and float(moved.abs().mean()) < 12 * 2**-12
    assert all(t.dtype == torch.bfloat16 for n, t in zero.saved_tensors()["optimizer"].items() if n.endswith("/master"))


# ---------------------------------------------------------------- what DeepSpeed must not touch


def test_deepspeeds_casts_leave_frozen_weights_and_rotary_tables_alone() -> None:
    config = configuration(train={"dtype": "bf16"})
    description = llama_config(num_hidden_layers=2)
    model, source = build_model(description, config.loqt, initializer(0), dtype=torch.bfloat16)
    before = {name: (b.dtype, b.clone()) for name, b in model.named_buffers()}
    kinds = {dtype for dtype, _ in before.values()}
    assert torch.uint8 in kinds and torch.float32 in kinds, "codes and rotary tables"
    ranks = start_distributed()
    zero = LoQTEngine(model, config, check_deepspeed(ZERO2, config), ranks=ranks, original=source.weight)

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


def store_of(zero: LoQTEngine) -> ShardedFactors:
    store = zero.controller.store
    assert isinstance(store, ShardedFactors)
    return store


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
        moment = store_of(trained).moment(name, index)
        layer = trained.controller.layers[name]
        assert moment is not None and moment.shape == layer.B.shape and moment.dtype == torch.float32
        np.testing.assert_allclose(moment.double().numpy().reshape(-1), whole[place], rtol=1e-6, atol=0)


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
    others = {n: trained._state.read(f"{n}.B").clone() for n in trained.controller.layers if n != name}
    store_of(trained).write(name, value)
    assert torch.equal(layer.B.detach(), value)
    flat = trained.optimizer.single_partition_of_fp32_groups[0].data
    assert torch.equal(flat[factor_places(trained)[name]].view(layer.B.shape), value)
    for other, before in others.items():
        assert torch.equal(trained._state.read(f"{other}.B"), before), other
    trained._rates._factors = trained._rates._full_rank = 0.0
    train_step(trained)
    assert torch.equal(layer.B.detach(), value), "the next step published something else"


# ---------------------------------------------------------------- saved and restored

RESUMED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "stage0-adamw": (0, {}, {}),
    "stage0-bf16": (0, {"name": "adamw8bit"}, {"dtype": "bf16"}),
    "stage2-adamw": (2, {}, {}),
    "stage2-adamw8bit": (2, {"name": "adamw8bit"}, {}),
    "stage2-bf16": (2, {"name": "adamw8bit"}, {"dtype": "bf16"}),
    "stage1-bf16-masters": (1, {"name": "adamw8bit", "master": "bf16"}, {"dtype": "bf16"}),
    "stage2-bf16-masters": (2, {"master": "bf16"}, {"dtype": "bf16"}),
}
# B of the MLP has more than 4096 numbers: enough for moments in 8 bits where each parameter is a tensor of its own.
RESUME_MODEL = {"intermediate_size": 600, "attention_dropout": 0.1}


def saved_bytes(engine: Engine) -> dict[str, Tensor]:
    groups = engine.saved_tensors()
    return {f"{group}/{name}": tensor.clone() for group in groups for name, tensor in groups[group].items()}


@pytest.mark.parametrize("case", RESUMED)
def test_stopping_changes_no_bit(case: str, tmp_path: Path) -> None:
    stage, optim, train = RESUMED[case]
    config = configuration(optim=optim, train=train | {"max_grad_norm": 1.0})
    _, zero = engines(config, stage=stage, **RESUME_MODEL)
    torch.manual_seed(5)
    losses, paths = [], {}
    for step in range(6):
        if step in (0, 3):
            paths[step] = save(zero, tmp_path)
        losses.append(train_step(zero)[0])
    expected = saved_bytes(zero)
    assert any(t.dtype == torch.uint8 for n, t in expected.items() if n.endswith("/state1")) == (
        optim.get("name") == "adamw8bit"
    )
    for stop, path in paths.items():
        _, again = engines(config, stage=stage, **RESUME_MODEL)
        if stop > 0:  # a first initialization needs the original weights, which are let go after it
            train_step(again)  # some other state is overwritten
        torch.manual_seed(99 + stop)
        restore(again, path)
        assert again.step_index == stop
        assert [train_step(again)[0] for _ in range(stop, 6)] == losses[stop:], f"stopped after {stop} steps"
        assert equal(saved_bytes(again), expected) == [], f"stopped after {stop} steps"


@pytest.mark.parametrize(
    ("optim", "dtype", "tolerance"),
    [({"name": "adamw"}, "fp32", 1e-5), ({"name": "adamw8bit"}, "fp32", 1e-3), ({"name": "adamw8bit"}, "bf16", 1e-3)],
    ids=["fp32", "fp32-8bit", "bf16-8bit"],
)
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("back", [False, True], ids=["single-to-deepspeed", "deepspeed-to-single"])
def test_checkpoints_of_the_single_engine_and_of_deepspeed_are_each_others(
    stage: int, optim: dict[str, Any], dtype: str, tolerance: float, back: bool, tmp_path: Path
) -> None:
    """Up to the next re-initialization (step 8), with re-initializations at 0 and 4 behind."""
    config = configuration(optim=optim, loqt={"interval": 4}, train={"dtype": dtype})
    shape = {"intermediate_size": 600}
    single, zero = engines(config, stage=stage, **shape)
    first, second = (zero, single) if back else (single, zero)
    for _ in range(5):
        train_step(first)
    restore(second, save(first, tmp_path))
    assert second.step_index == 5
    for name, factor in factors(first).items():
        assert torch.equal(factors(second)[name], factor), name
    masters = second.masters()
    if dtype == "bf16":
        assert set(masters) == set(first.masters())
        for name, value in first.masters().items():
            assert torch.equal(masters[name], value), name
    for step in range(5, 8):
        (expected, ours), (actual, theirs) = train_step(first), train_step(second)
        assert actual == pytest.approx(expected, rel=tolerance), f"step {step}"
        assert (theirs.lr, theirs.lr_full_rank) == (ours.lr, ours.lr_full_rank)
    assert train_step(second)[1].reinit is not None and train_step(first)[1].reinit is not None


@pytest.mark.parametrize(("one", "other"), [(0, 2), (2, 0), (1, 0)])
def test_stages_go_on_from_each_other(one: int, other: int, tmp_path: Path) -> None:
    config = configuration(loqt={"interval": 4})
    _, first = engines(config, stage=one)
    _, second = engines(config, stage=other)
    for _ in range(5):
        train_step(first)
    restore(second, save(first, tmp_path))
    for step in range(5, 8):
        assert train_step(second)[0] == pytest.approx(train_step(first)[0], rel=1e-5), f"step {step}"


def test_a_skipped_step_is_remembered(tmp_path: Path) -> None:
    config = configuration(loqt={"interval": 3})
    _, zero = engines(config, stage=0)
    for _ in range(3):
        train_step(zero)
    train_step(zero, factor=float("nan"))
    _, again = engines(config, stage=0)
    restore(again, save(zero, tmp_path))
    assert again.skipped_steps == 1 and again.step_index == 4
    assert train_step(again)[1].reinit is not None


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


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_the_re_initialization_stays_due(
    stage: int, dtype: str, bad: float
) -> None:
    train = {"dtype": dtype, "max_grad_norm": 1.0}
    config = configuration(optim={"name": "adamw8bit"}, loqt={"interval": 3}, train=train)
    _, zero = engines(config, stage=stage)
    for _ in range(3):
        train_step(zero)
    before = {k: v.clone() for k, v in zero.saved_tensors()["model"].items()}
    states = {k: v.clone() for k, v in zero.saved_tensors()["optimizer"].items()}
    _, report = train_step(zero, factor=bad)  # step 3, on which a re-initialization is due
    assert not report.applied and report.reinit is None and report.step == 3
    assert not math.isfinite(report.grad_norm) and zero.skipped_steps == 1 and zero.step_index == 4
    for key, value in zero.saved_tensors()["model"].items():
        assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8)), key
    for key, value in zero.saved_tensors()["optimizer"].items():
        assert torch.equal(value, states[key]), key
    assert zero.controller.state_dict()["overdue"]
    _, report = train_step(zero)
    assert report.applied and report.reinit is not None and report.step == 4
    assert all(torch.isfinite(f).all() for f in factors(zero).values())
