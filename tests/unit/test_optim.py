"""Parameter optimizers against torch's AdamW in float32, bitsandbytes' own 8-bit AdamW, and written-out arithmetic.

How their state is read, written, saved and restored is in test_shards.py.
"""

from __future__ import annotations

import math

import bitsandbytes
import pytest
import torch
from helpers import llama_config, make_config, relative
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loqt_ds import optim as optim_module
from loqt_ds.config import OptimConfig
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.method.conversion import build_model, initializer
from loqt_ds.optim import (
    EvenAdamW,
    LearningRates,
    ParameterOptimizer,
    RoundingAdam,
    clipping_scale,
    decode_moment,
    gradient_norm,
    parameter_groups,
    quantize_moment,
    stochastic_round,
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
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # theirs is not fused


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
    assert optimizer.optimizer.state[ours]["state1"].dtype == (torch.uint8 if shape == (80, 64) else torch.float32)


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
        assert torch.equal(optimizer.values, exact)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, exact.to(torch.bfloat16))


def test_without_masters_nothing_of_float32_stays():
    parameter = nn.Parameter(random(80, 64).to(torch.bfloat16))
    optimizer = optimizer_of(parameter, name="adamw8bit", master="bf16")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    assert optimizer.master.numel() == 0 and optimizer.master.grad is None and parameter.grad is None
    assert optimizer.values is parameter


# ---------------------------------------------------------------- in pieces


@pytest.mark.parametrize("piece", [256, 1024, 2**22])
@pytest.mark.parametrize("master", ["own", "fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("shape", [(7, 1031), (5, 123)], ids=str)  # 8-bit moments from 4096 elements on
def test_updates_in_pieces_are_those_of_the_whole(shape, name, master, piece, monkeypatch):
    """Against torch's and bitsandbytes' own step of the whole tensor in float32; gradients scaled, rates changing.

    torch's is of a tensor that fills its vectors: fused, it rounds the elements of one that is not full differently."""
    monkeypatch.setattr(optim_module, "UPDATE_PIECE", piece)
    dtype = torch.float32 if master == "own" else torch.bfloat16
    ours = nn.Parameter(random(*shape).to(dtype))
    optimizer = optimizer_of(ours, name=name, weight_decay=0.1, master="bf16" if master == "bf16" else "fp32")
    num, rng = ours.numel(), generator()
    rest = -num % 64 if name == "adamw" else 0

    def whole(tensor):
        return nn.functional.pad(tensor.detach().float().flatten(), (0, rest))

    theirs = nn.Parameter(whole(ours))
    if name == "adamw":
        reference = torch.optim.AdamW([theirs], weight_decay=0.1, fused=True)
    else:
        reference = bitsandbytes.optim.AdamW8bit([theirs], weight_decay=0.1)
    for step in range(4):
        lr, scale = 0.01 * (step + 1), (0.3, 1.0)[step % 2]
        ours.grad = random(*shape, seed=step + 1).to(dtype)
        theirs.grad = whole(ours.grad) * scale
        optimizer.step(lr, gradient_scale=scale)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        expected = theirs.detach()[:num].view(shape)
        if master == "bf16":
            expected = stochastic_round(expected, rng)
            theirs.data = whole(expected)
        assert torch.equal(optimizer.values, expected) and torch.equal(ours, expected.to(dtype))
        state = optimizer.optimizer.state[optimizer.master]
        assert list(optimizer.optimizer.state) == [optimizer.master] and set(state) == set(reference.state[theirs])
        for key, value in reference.state[theirs].items():
            value, mine = torch.as_tensor(value), torch.as_tensor(state[key]).flatten()
            assert torch.equal(mine, value.flatten()[: mine.numel()]), key


@pytest.mark.parametrize("sizes", [(5, 4, 10), (16, 33), (1, 1, 1, 46), (64, 15)])
def test_an_element_is_updated_alike_wherever_a_tensor_ends(sizes):
    """As ZeRO's partitions end elsewhere on another number of ranks. Against one that fills its vectors."""
    num = sum(sizes)
    whole = nn.Parameter(nn.functional.pad(random(num), (0, -num % 64)))
    parts = [nn.Parameter(part.clone()) for part in whole.detach()[:num].split(sizes)]
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    reference, ours = torch.optim.AdamW([whole], fused=True, **options), EvenAdamW(parts, **options)
    for step in range(3):
        gradient = random(num, seed=step + 1)
        whole.grad = nn.functional.pad(gradient, (0, -num % 64))
        for part, of_part in zip(parts, gradient.split(sizes), strict=True):
            part.grad = of_part.clone()
        reference.step()
        ours.step()
        assert torch.equal(torch.cat([part.detach() for part in parts]), whole.detach()[:num])
        for key in ("exp_avg", "exp_avg_sq"):
            found = torch.cat([ours.state[part][key] for part in parts])
            assert torch.equal(found, reference.state[whole][key][:num])
        assert all(ours.state[part]["step"] == step + 1 for part in parts)


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor of 4-byte numbers that is made, views of what there was before apart; a norm makes,
    inside, a copy of its input."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self._known = [tensor.untyped_storage().data_ptr() for tensor in before]
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.linalg_vector_norm.default:
            self.largest = max(self.largest, 4 * args[0].numel())
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor) and made.element_size() >= 4:
                storage = made.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self.largest = max(self.largest, storage.nbytes())
        return result


@pytest.mark.parametrize("master", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_no_float32_tensor_of_an_update_is_larger_than_a_piece(name, master, monkeypatch):
    monkeypatch.setattr(optim_module, "UPDATE_PIECE", 1024)
    parameter = nn.Parameter(random(96, 65).to(torch.bfloat16))
    optimizer = optimizer_of(parameter, name=name, master=master)
    for step in range(2):
        parameter.grad = random(96, 65, seed=step).to(torch.bfloat16)
        state = optimizer.optimizer.state[optimizer.master].values()
        with Allocations(optimizer.values.data, *(value for value in state if isinstance(value, Tensor))) as made:
            assert math.isfinite(gradient_norm(parameter.grad).item())
            optimizer.step(0.01, gradient_scale=0.5)
        # In the first step 32-bit moments are made. (What bitsandbytes makes inside an operation is not seen.)
        assert made.largest == (4 * parameter.numel() if name == "adamw" and step == 0 else 4 * 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (4095,), (4096,), (3, 4097), (5, 7, 500)], ids=str)
def test_the_norm_is_that_of_float64(shape, dtype):
    gradient = random(*shape).to(dtype) * 3e-4
    norm = gradient_norm(gradient)
    assert norm.shape == () and norm.dtype == torch.float32
    assert norm.item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)
    if gradient.dim() > 1:
        assert gradient_norm(gradient.mT).item() == pytest.approx(norm.item(), rel=1e-6)
    for odd in (math.nan, math.inf):
        if gradient.numel():
            gradient.view(-1)[-1] = odd
            assert not math.isfinite(gradient_norm(gradient).item())


def test_the_norm_of_a_large_gradient_is_not_lost_in_one_float32_sum():
    gradient = torch.full((2**25 + 5,), 0.01, dtype=torch.bfloat16)
    exact = gradient[0].double().item() * math.sqrt(gradient.numel())
    assert gradient_norm(gradient).item() == pytest.approx(exact, rel=2e-6)


def test_clipping_is_torchs():
    for norm, limit in ((3.0, 0.5), (0.4, 0.5), (0.5, 0.5), (1e-9, 2.0)):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([parameter], limit)
        assert norm * clipping_scale(norm, limit) == pytest.approx(parameter.grad.item(), rel=1e-6)
    assert clipping_scale(1e9, None) == 1.0 and clipping_scale(0.0, 1.0) == 1.0


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


def rounding_adam(tensors: list[Tensor], *, name: str, seed: int = 3, weight_decay: float = 0.0) -> RoundingAdam:
    groups = [{"params": [tensor], "weight_decay": weight_decay} for tensor in tensors]
    return RoundingAdam(groups, OptimConfig(name=name, master="bf16"), seed=seed)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_rounding_adam_is_parameter_optimizers_that_share_their_random_numbers(name):
    shapes, rates = [(5000,), (33,)], [0.02, 0.005]
    ours = [random(*shape, seed=i).to(torch.bfloat16) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(tensor.clone()) for tensor in ours]
    optimizer, rng = rounding_adam(ours, name=name, weight_decay=0.1), generator(3)
    references = [
        ParameterOptimizer(p, OptimConfig(name=name, master="bf16"), weight_decay=0.1, generator=rng) for p in theirs
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for step in range(3):
        for index, shape in enumerate(shapes):
            gradient = random(*shape, seed=10 * step + index).to(torch.bfloat16)
            ours[index].grad, theirs[index].grad = gradient, gradient.clone()
        if step == 1:
            ours[1].grad = None  # no gradient, no update
        optimizer.step()
        for index, (reference, rate) in enumerate(zip(references, rates, strict=True)):
            if (step, index) != (1, 1):
                reference.step(rate)
        for one, other in zip(ours, theirs, strict=True):
            assert one.grad is None and one.dtype == torch.bfloat16 and torch.equal(one, other)
    for tensor, reference in zip(ours, references, strict=True):
        item = optimizer.item(tensor, {"weight_decay": 0.1})
        state, expected = item.optimizer.state[item.master], reference.optimizer.state[reference.master]
        for key, value in expected.items():
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key


def test_rounding_adam_takes_tensors_that_replace_its_own_before_the_first_step():
    """What ZeRO does: the flat partition takes the place of the parameters."""
    whole, partition = torch.zeros(64, dtype=torch.bfloat16), random(32).to(torch.bfloat16)
    optimizer = rounding_adam([whole], name="adamw")
    optimizer.param_groups[0]["params"] = [partition]
    before, partition.grad = partition.clone(), torch.ones_like(partition)
    optimizer.step()
    assert not torch.equal(partition, before) and not whole.any()


def test_the_mean_of_many_rounded_updates_is_the_float32_update():
    """Each seed takes the same three steps from the same start, far below half a unit in the last place: the mean over
    seeds is where float32 goes. Standard error of a mean of n sums of three rounded steps: ulp √3 / (2 √n)."""
    num_seeds, size, rate = 400, 600, 2**-14
    start = random(size).abs().add(1).clamp(max=1.99).to(torch.bfloat16)  # in [1, 2): one spacing, 2^-7
    gradients = [random(size, seed=7 + step).to(torch.bfloat16) for step in range(3)]
    exact = nn.Parameter(start.float())
    reference = torch.optim.AdamW([exact], lr=rate, betas=(0.9, 0.999), eps=OptimConfig().eps, weight_decay=0.0)
    for gradient in gradients:
        exact.grad = gradient.float()
        reference.step()
    total = torch.zeros(size, dtype=torch.float64)
    for seed in range(num_seeds):
        tensor = start.clone()
        optimizer = rounding_adam([tensor], name="adamw", seed=seed)
        optimizer.param_groups[0]["lr"] = rate
        for gradient in gradients:
            tensor.grad = gradient.clone()
            optimizer.step()
        total += tensor.double()
    error = (total / num_seeds - exact.detach().double()) / 2**-7
    assert float(error.abs().max()) < 5 * math.sqrt(3) / (2 * math.sqrt(num_seeds))
    assert abs(float(error.mean())) < 5 * math.sqrt(3) / (2 * math.sqrt(num_seeds * size))
    moved = (exact.detach() - start.float()).abs()
    assert float(moved.max()) < 2**-8 / 8, "rounding to nearest would not move at all"


# ---------------------------------------------------------------- 8-bit codes of moments


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(256,), (1,), (255,), (257,), (3, 700), (0,)], ids=str)
def test_codes_of_moments_are_the_nearest(shape, signed):
    """Against a search of all 256 codes in float64; blocks of 256 of the flat order, the last one partial."""
    table = bitsandbytes.functional.create_dynamic_map(signed=signed)
    values = random(*shape) if signed else random(*shape).square()
    values.view(-1)[::7] = 0.0
    codes, absmax = quantize_moment(values, table)
    flat = values.reshape(-1).double()
    num_blocks = -(-flat.numel() // 256)
    assert codes.shape == values.shape and codes.dtype == torch.uint8 and absmax.shape == (num_blocks,)
    assert absmax.tolist() == [block.abs().max().item() for block in flat.split(256) if block.numel()]
    scale = absmax.double().repeat_interleave(256)[: flat.numel()].clamp_min(1e-300)
    stored = table.double()[codes.flatten().long()]
    nearest = (flat.div(scale).unsqueeze(1) - table.double()).abs().amin(1)
    assert ((flat / scale - stored).abs() <= nearest + 1e-7).all()
    decoded = decode_moment(codes, absmax, table)
    assert decoded.shape == values.shape and decoded.dtype == torch.float32
    assert torch.allclose(decoded.flatten().double(), stored * absmax.double().repeat_interleave(256)[: flat.numel()])
    assert (decoded.view(-1)[::7] == 0).all(), "a zero stays zero: Adam divides one moment by the other"
    again, _ = quantize_moment(decoded, table)
    assert torch.equal(again, codes), "a read that is written back changes no code"


def test_blocks_of_zeros_and_of_the_smallest_numbers_are_kept():
    table = bitsandbytes.functional.create_dynamic_map(signed=True)
    values = torch.zeros(512)
    values[256:] = random(256) * 1e-36
    codes, absmax = quantize_moment(values, table)
    decoded = decode_moment(codes, absmax, table)
    assert not decoded[:256].any() and relative(decoded[256:], values[256:]) < 0.02
