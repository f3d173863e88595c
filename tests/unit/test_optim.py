"""Parameter optimizers against torch's AdamW in float32, bitsandbytes' own 8-bit AdamW, and written-out arithmetic."""

from __future__ import annotations

import math

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from helpers import llama_config, make_config, relative
from torch import Tensor, nn

from loqt_ds.config import OptimConfig
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.method.conversion import build_model, initializer
from loqt_ds.optim import (
    LearningRates,
    ParameterOptimizer,
    parameter_groups,
    read_moment,
    stochastic_round,
    write_moment,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def optimizer_of(parameter: nn.Parameter, **options) -> ParameterOptimizer:
    weight_decay = options.pop("weight_decay", 0.0)
    return ParameterOptimizer(parameter, OptimConfig(**options), weight_decay=weight_decay, generator=generator())


# ---------------------------------------------------------------- groups and rates


def test_groups_hold_every_parameter_once_factors_first():
    config = make_config(optim={"weight_decay": 0.1})
    model, _ = build_model(llama_config(attention_bias=True, tie_word_embeddings=True), config.loqt, initializer(0))
    model.get_parameter("model.norm.weight").requires_grad_(False)
    groups = {group.kind: group for group in parameter_groups(model, config.optim)}
    assert list(groups) == ["factors", "full_rank", "full_rank_no_decay"]
    assert all(name.endswith("_proj.B") for name in groups["factors"].parameters)
    assert set(groups["full_rank"].parameters) == {"model.embed_tokens.weight"}
    assert set(groups["full_rank_no_decay"].parameters) == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        *(f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkvo"),
    }
    assert {kind: group.weight_decay for kind, group in groups.items()} == {
        "factors": 0.1,
        "full_rank": 0.1,
        "full_rank_no_decay": 0.0,
    }


def test_two_rates_share_one_schedule():
    config = make_config(
        optim={"lr": 0.02, "lr_full_rank": 0.001, "warmup_steps": 4, "min_lr_ratio": 0.2}, train={"max_steps": 12}
    )
    rates = LearningRates(config, ReinitSchedule())
    for step in range(12):
        factor = (step + 1) / 4 if step < 4 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2
        assert rates.at(step) == pytest.approx((0.02 * factor, 0.001 * factor), rel=1e-12)
    config.optim.lr_full_rank = None
    assert LearningRates(config, ReinitSchedule()).at(3) == (0.02, 0.02)


def test_warmup_ratio_and_rewarmup_reach_the_schedule():
    config = make_config(
        optim={"lr": 1.0, "warmup_steps": None, "warmup_ratio": 0.5, "schedule": "constant"}, train={"max_steps": 8}
    )
    assert [LearningRates(config, ReinitSchedule()).at(s)[0] for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    config = make_config(
        optim={"lr": 1.0, "warmup_steps": 0, "schedule": "cosine_rewarmup", "rewarmup_steps": 4, "min_lr_ratio": 1.0}
    )
    rates = LearningRates(config, ReinitSchedule("static", 6))
    assert [rates.at(s)[0] for s in range(6, 12)] == [1.0, 0.25, 0.5, 0.75, 1.0, 1.0]


# ---------------------------------------------------------------- updates


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_adamw_is_torchs(weight_decay):
    ours, theirs = nn.Parameter(random(7, 9)), nn.Parameter(random(7, 9))
    optimizer = optimizer_of(ours, name="adamw", betas=[0.8, 0.95], eps=1e-6, weight_decay=weight_decay)
    reference = torch.optim.AdamW([theirs], betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    for step in range(5):
        lr = 0.01 * (step + 1)
        ours.grad, theirs.grad = random(7, 9, seed=step + 1), random(7, 9, seed=step + 1)
        optimizer.step(lr)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        assert ours.grad is None
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(7, 9), (80, 64)], ids=["32-bit state", "8-bit state"])
def test_adamw8bit_is_bitsandbytes(shape):
    ours, theirs = nn.Parameter(random(*shape)), nn.Parameter(random(*shape))
    optimizer = optimizer_of(ours, name="adamw8bit", weight_decay=0.1)
    reference = bitsandbytes.optim.AdamW8bit([theirs], weight_decay=0.1)
    for step in range(4):
        ours.grad, theirs.grad = random(*shape, seed=step + 1), random(*shape, seed=step + 1)
        optimizer.step(0.02)
        reference.param_groups[0]["lr"] = 0.02
        reference.step()
        assert torch.equal(ours, theirs)
    assert optimizer.state["state1"].dtype == (torch.uint8 if shape == (80, 64) else torch.float32)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_bf16_with_a_float32_master_follows_float32(name):
    start = random(70, 64).to(torch.bfloat16)
    ours, exact = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer, reference = optimizer_of(ours, name=name), optimizer_of(exact, name=name)
    for step in range(5):
        gradient = random(70, 64, seed=step + 1).to(torch.bfloat16)
        ours.grad, exact.grad = gradient, gradient.float()
        optimizer.step(1e-3)
        reference.step(1e-3)
        assert torch.equal(optimizer.value(), exact)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, exact.to(torch.bfloat16))


def test_set_value_keeps_more_than_the_parameter_shows():
    value = random(8, 8)
    for dtype, master, expected in (
        (torch.float32, "fp32", value),
        (torch.bfloat16, "fp32", value),
        (torch.bfloat16, "bf16", None),
    ):
        parameter = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
        optimizer = optimizer_of(parameter, name="adamw", master=master)
        optimizer.set_value(value)
        if expected is not None:
            assert torch.equal(optimizer.value(), expected) and torch.equal(parameter, expected.to(dtype))
        else:
            assert optimizer.value().dtype == torch.float32 and torch.equal(optimizer.value(), parameter.float())
            assert relative(parameter, value) < 2**-7


def test_without_masters_nothing_of_float32_stays():
    parameter = nn.Parameter(random(80, 64).to(torch.bfloat16))
    optimizer = optimizer_of(parameter, name="adamw8bit", master="bf16")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    assert optimizer.master.numel() == 0 and optimizer.master.grad is None and parameter.grad is None
    assert optimizer.value().shape == (80, 64)


# ---------------------------------------------------------------- stochastic rounding


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    values = torch.cat(
        [random(60), random(20, seed=1) * 1e-30, random(20, seed=2) * 1e30, torch.tensor([0.0, 1.0, -3.0])]
    )
    num_draws = 4000
    rng = generator(3)
    draws = stochastic_round(values.repeat(num_draws, 1), rng).double()  # (draws, values)
    toward_zero = (values.view(torch.int32) & -65536).view(torch.float32)
    away = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    exact = toward_zero == values
    assert bool(((draws == toward_zero.double()) | (draws == away.double())).all())
    assert bool((draws[:, exact] == values[exact].double()).all()) and exact.sum() >= 3
    ulp = (away - toward_zero).double().abs()
    # The mean of n draws of a two-point variable: a standard error of at most ulp / (2 √n).
    error = (draws.mean(0) - values.double()).abs() / ulp
    assert float(error.max()) < 5 * 0.5 / math.sqrt(num_draws)


def test_stochastic_rounding_passes_infinities_and_is_seeded():
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    rounded = stochastic_round(odd, generator())
    assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2].isnan()
    values = random(1000)
    assert torch.equal(stochastic_round(values, generator(1)), stochastic_round(values, generator(1)))
    assert not torch.equal(stochastic_round(values, generator(1)), stochastic_round(values, generator(2)))
    before = torch.get_rng_state()
    stochastic_round(values, generator(1))
    assert torch.equal(before, torch.get_rng_state())


def test_bf16_learns_what_is_below_half_a_unit_in_the_last_place():
    """A hundred steps of 1/32 ulp each: rounding to nearest would go nowhere."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optimizer_of(parameter, name="adamw", master="bf16")
    step_size = 2**-8 / 32  # below 1, the spacing of bf16 is 2⁻⁸
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(step_size)  # AdamW on a constant gradient moves by its rate
    moved = 1 - parameter.double().mean().item()
    assert moved == pytest.approx(100 * step_size, rel=0.05)
    assert (torch.ones(1, dtype=torch.bfloat16) - step_size).item() == 1.0  # what rounding to nearest would do


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize("shape", [(80, 64), (67, 129)], ids=str)
def test_eight_bit_moments_are_read_as_bitsandbytes_reads_them(shape):
    parameter = nn.Parameter(random(*shape))
    optimizer = optimizer_of(parameter, name="adamw8bit")
    parameter.grad = random(*shape, seed=1)
    optimizer.step(0.01)
    state = optimizer.state
    for index in (0, 1):
        n = index + 1
        code, absmax = state[f"qmap{n}"].double(), state[f"absmax{n}"].double()
        flat = code[state[f"state{n}"].flatten().long()] * absmax.repeat_interleave(256)[: parameter.numel()]
        assert relative(read_moment(state, index), flat.view(shape)) < 1e-6
    gradient = random(*shape, seed=1)
    assert relative(read_moment(state, 0), 0.1 * gradient) < 0.02
    assert relative(read_moment(state, 1), 0.001 * gradient**2) < 0.02


def test_eight_bit_moments_are_written_in_the_nearest_codes():
    """Against a search of all 256 codes in float64. (bitsandbytes' absmax is the same, its codes on the CPU are not
    always the nearest, and a zero becomes 2e-5 of the absmax.)"""
    parameter = nn.Parameter(random(67, 129))
    optimizer = optimizer_of(parameter, name="adamw8bit")
    parameter.grad = random(67, 129, seed=1)
    optimizer.step(0.01)
    state = optimizer.state
    tensors = {key: state[key] for key in ("state1", "state2", "absmax1", "absmax2")}
    for index, value in ((0, random(129, 67, seed=2).t()), (1, random(129, 67, seed=3).t().square())):
        value[3:5] = 0.0
        write_moment(state, index, value)  # not contiguous: what a layer on the left side hands over
        n = index + 1
        _, quant_state = bnb.quantize_blockwise(value.contiguous(), code=state[f"qmap{n}"], blocksize=256)
        assert torch.equal(state[f"absmax{n}"], quant_state.absmax)
        table, flat = state[f"qmap{n}"].double(), value.reshape(-1).double()
        scaled = flat / state[f"absmax{n}"].double().repeat_interleave(256)[: flat.numel()]
        nearest = (scaled.unsqueeze(1) - table).abs().amin(1)
        got = (scaled - table[state[f"state{n}"].flatten().long()]).abs()
        assert (got <= nearest + 1e-7).all()
        assert (read_moment(state, index)[3:5] == 0).all(), "a zero stays zero: Adam divides one moment by the other"
        # Eight bits of a dynamic map: about one per cent of a typical value.
        assert relative(read_moment(state, index), value) < 0.02
    assert all(state[key] is tensor for key, tensor in tensors.items())  # in place: bitsandbytes holds them
    # A read that is written back changes nothing: quantization is a projection.
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    for index in (0, 1):
        write_moment(state, index, read_moment(state, index))
        assert torch.equal(before[f"state{index + 1}"], state[f"state{index + 1}"])


def test_a_reset_state_is_that_of_a_new_parameter():
    for name in ("adamw", "adamw8bit"):
        old, new = nn.Parameter(random(80, 64)), nn.Parameter(random(80, 64))
        used = optimizer_of(old, name=name)
        for step in range(3):
            old.grad = random(80, 64, seed=step)
            used.step(0.01)
        used.reset_state()
        used.set_value(random(80, 64))
        fresh = optimizer_of(new, name=name)
        for step in range(3):
            old.grad, new.grad = random(80, 64, seed=9 + step), random(80, 64, seed=9 + step)
            used.step(0.01)
            fresh.step(0.01)
            assert torch.equal(old, new)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("master", ["fp32", "bf16", "own"])
@pytest.mark.parametrize("shape", [(6, 7), (80, 64)], ids=str)
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_saved_and_restored_state_goes_on_as_if_nothing_had_happened(name, master, shape, num_steps):
    dtype = torch.float32 if master == "own" else torch.bfloat16
    options = dict(name=name, master="fp32" if master == "own" else master)

    def go_on(optimizer: ParameterOptimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.parameter.grad = random(*shape, seed=step).to(dtype)
            optimizer.step(0.01)

    one = optimizer_of(nn.Parameter(random(*shape).to(dtype)), **options)
    go_on(one, 0, num_steps)
    saved = {key: tensor.clone() for key, tensor in one.saved().items()}
    weights, rng = one.parameter.detach().clone(), one._generator.get_state()
    go_on(one, num_steps, 6)

    two = optimizer_of(nn.Parameter(random(*shape, seed=50).to(dtype)), **options)
    go_on(two, 20, 22)  # some other state is overwritten
    two.parameter.data.copy_(weights)
    two.restore(saved)
    two._generator.set_state(rng)
    go_on(two, num_steps, 6)
    assert torch.equal(one.parameter, two.parameter) and torch.equal(one.value(), two.value())
    assert set(one.saved()) == set(two.saved())
    for key, tensor in one.saved().items():
        assert torch.equal(tensor, two.saved()[key]), key
