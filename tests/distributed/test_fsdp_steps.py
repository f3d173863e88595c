"""What a step of FSDP2 does, and what must not matter to it.

References: a dense model in float64 and `torch.nn.utils.clip_grad_norm_` for gradients; 32-bit Adam for moments in 8
bits; the single engine for losses; and the same run without whatever must not matter, bit for bit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import dense_state, llama_config, lm_loss, make_config, relative, token_batch
from helpers import train_step as train_single
from ranks import build, caught, fingerprint, held, held_factors, launch, own_state, restore, save, step_on
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from loqt_ds.config import Config
from loqt_ds.engines.single import SingleEngine
from loqt_ds.engines.state import whole_tensors
from loqt_ds.evaluation import evaluate
from loqt_ds.method import compiled, head, lean
from loqt_ds.method.conversion import build_model, initializer, loqt_layers
from loqt_ds.optim import freeze_full_rank
from loqt_ds.ranks import ALONE, Ranks

ROWS = 8  # of a global batch
MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"shard_frozen": True},
    "groups": {"num_replicas": 2},
    "groups, sharded": {"num_replicas": 2, "shard_frozen": True},
}


def description(**changes: Any) -> Any:
    """Odd sides, biases, tied embeddings, one head of keys for four of queries."""
    odd = {"hidden_size": 40, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    return llama_config(**(odd | {"num_hidden_layers": 2, "tie_word_embeddings": True} | changes))


def configuration(world_size: int, case: dict[str, Any]) -> Config:
    train = dict(case.get("train", {}))
    train["micro_batch_size"] = ROWS // train.get("gradient_accumulation_steps", 1) // world_size
    return make_config(loqt={"rank": 3} | case.get("loqt", {}), optim=case.get("optim", {}), train=train)


def engine_of(ranks: Ranks, case: dict[str, Any], **options: Any) -> Any:
    options |= {"fsdp": MODES[case["mode"]], "description": description(**case.get("shape", {}))}
    return build(ranks, configuration(ranks.world_size, case), **options)


def single_engine(case: dict[str, Any]) -> SingleEngine:
    config = configuration(1, case)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model, source = build_model(description(**case.get("shape", {})), config.loqt, initializer(0), dtype=dtype)
    if not config.optim.train_full_rank:
        freeze_full_rank(model)
    return SingleEngine(model, config, original=source.weight)


def plain_model(engine: Any, case: dict[str, Any]) -> nn.Module:
    """What the ranks together hold, in a model that nobody shards. Collective."""
    config = configuration(engine.ranks.world_size, case)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model, _ = build_model(description(**case.get("shape", {})), config.loqt, initializer(1), dtype=dtype)
    model.load_state_dict(dict(whole_tensors(engine.network, dtype)), strict=False)  # a tied head
    return model


# ---------------------------------------------------------------- gradients, and how they are clipped


def dense_gradients(model: nn.Module, ids: Tensor, case: dict[str, Any]) -> dict[str, Tensor]:
    """Of everything that a converted model trains, float64, through transformers' own model with its effective
    weights: of B by the chain rule from the gradient of the weight."""
    dense = LlamaForCausalLM(description(**case.get("shape", {}))).double()
    dense.load_state_dict({name: tensor.double() for name, tensor in dense_state(model).items()}, strict=False)
    lm_loss(dense, ids).backward()
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters() if parameter.grad is not None}
    for name, layer in loqt_layers(model).items():
        whole, p = gradients.pop(f"{name}.weight"), layer.basis_hat().double()
        gradients[f"{name}.B"] = layer.scale * (whole @ p if layer.side == "right" else p.T @ whole)
    return gradients


def one_clipped_step(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """The norm that was reported, and the gradient that Adam was given, m = β m_before + (1 − β) g solved for g; beside
    both the dense model's."""
    engine = engine_of(ranks, case)
    for step in range(2):
        step_on(engine, token_batch(step, rows=ROWS))
    state, beta = engine._state, engine._config.optim.betas[0]

    def first_moments() -> dict[str, Tensor]:
        found = {name: state.moment(name, 0) for name in state._parameters}
        return {name: moment.double() for name, moment in found.items() if moment is not None}

    model, before, ids = plain_model(engine, case), first_moments(), token_batch(2, rows=ROWS)
    _, report = step_on(engine, ids)
    after = first_moments()
    if not ranks.is_main:
        return {"norm": report.grad_norm}
    expected = dense_gradients(model, ids, case)
    assert expected.keys() == before.keys() == after.keys()
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in expected.values()]
    for parameter, gradient in zip(parameters, expected.values(), strict=True):
        parameter.grad = gradient
    norm = nn.utils.clip_grad_norm_(parameters, case["train"]["max_grad_norm"]).item()
    errors = {
        name: relative((after[name] - beta * before[name]) / (1 - beta), parameter.grad)
        for name, parameter in zip(expected, parameters, strict=True)
        if parameter.grad is not None
    }
    return {"norm": report.grad_norm, "expected": norm, "errors": errors}


@pytest.mark.parametrize(
    ("world_size", "mode", "accumulation"),
    [
        (2, "sharded", 2),
        pytest.param(4, "groups", 1, marks=pytest.mark.slow),
        pytest.param(1, "whole", 4, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_clipped_by_the_norm_over_all_shards(world_size: int, mode: str, accumulation: int) -> None:
    limit = 0.2
    train = {"gradient_accumulation_steps": accumulation, "max_grad_norm": limit}
    case = {"mode": mode, "loqt": {"interval": 40}, "train": train}
    results = launch(world_size, one_clipped_step, case=case)
    assert {result["norm"] for result in results} == {results[0]["norm"]}
    assert results[0]["expected"] > 2 * limit, "there is something to clip"
    assert results[0]["norm"] == pytest.approx(results[0]["expected"], rel=1e-5)
    assert len(results[0]["errors"]) == 14 + 14 + 6, "B, biases, embeddings and norms"
    # the bias of keys has no gradient but rounding: softmax does not see it
    assert max(e for name, e in results[0]["errors"].items() if not name.endswith("k_proj.bias")) < 1e-4


# ---------------------------------------------------------------- moments in 8 bits


def eight_bits(ranks: Ranks, mode: str, shape: dict[str, Any]) -> dict[str, list[float]]:
    """Of each trained parameter: elements of all and on this rank, bits of the moments, and by how much they are
    farther from those of 32-bit Adam than the nearest code is, in units of the block's largest element."""
    case = {"mode": mode, "shape": shape, "loqt": {"interval": 40}}
    engines = []
    for name in ("adamw8bit", "adamw"):
        engine = engine_of(ranks, case | {"optim": {"name": name}})
        for step in range(2):  # of B, which step 0 resets, the first update: the moments of both Adams are still alike
            step_on(engine, token_batch(step, rows=ROWS))
        engines.append(engine)
    result = {}
    shards = [{shard.key: shard for shard in engine._state.shards} for engine in engines]
    for key, shard in shards[0].items():
        state, exact = shard.state, shards[1][key].state
        is_8bit = state["state1"].dtype == torch.uint8
        excess = 0.0
        for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            wanted = exact[name].double().numpy().reshape(-1)
            if is_8bit and key.endswith(".B"):
                table = state[f"qmap{number}"].double().numpy()
                stored = table[state[f"state{number}"].numpy().reshape(-1)]
                assert state[f"absmax{number}"].numel() == -(-wanted.size // 256), "blocks of this rank's own rows"
                for start in range(0, wanted.size, 256):
                    block = wanted[start : start + 256]
                    scaled = block / np.abs(block).max()
                    nearest = np.abs(scaled[:, None] - table[None, :]).min(1)
                    excess = max(excess, float((np.abs(stored[start : start + 256] - scaled) - nearest).max()))
        result[key] = [engines[0]._parameters[key].numel(), shard.values.numel(), 8 if is_8bit else 32, excess]
    return result


@pytest.mark.parametrize(
    ("world_size", "mode", "intermediate_size"),
    [(2, "sharded", 1400), pytest.param(4, "whole", 1400, marks=pytest.mark.slow), (1, "whole", 1365)],
)
def test_moments_in_8_bits_are_those_of_adam(world_size: int, mode: str, intermediate_size: int) -> None:
    """B of an MLP has 3 · 1400 elements, 4096 or more, and so 8 bits on every rank that has some of its rows, and be it
    one of three; with 3 · 1365 it has 4095, and 32."""
    shape = {"intermediate_size": intermediate_size}
    results = launch(world_size, eight_bits, mode=mode, shape=shape)
    for result in results:
        for name, (num_whole, num_own, bits, excess) in result.items():
            is_large = "mlp" in name and name.endswith(".B") and intermediate_size == 1400
            assert num_whole == 3 * intermediate_size if "mlp" in name and name.endswith(".B") else num_whole < 4096
            assert bits == (8 if is_large else 32) or not num_own, name
            assert excess < 2e-4, name  # bitsandbytes looks codes up on a grid of 2^-15
    for name in results[0]:
        assert sum(result[name][1] for result in results) == results[0][name][0], "each element is on one rank"
    if world_size == 4:
        assert results[3]["model.layers.0.mlp.down_proj.B"][1] == 0


# ---------------------------------------------------------------- what is in which precision


def mixed(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """A run in bf16: dtypes of shards, gradients and logits, and at the end masters beside the model."""
    engine = engine_of(ranks, case)
    dtypes, losses = set(), []
    # after FSDP's own hooks, which make the gradients
    for _, parameter in engine.network.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: dtypes.add(str(p.grad.dtype)))
    for step in range(6):
        losses.append(step_on(engine, token_batch(step, rows=ROWS))[0])
    with engine.evaluating(alone=False), torch.no_grad():
        logits = engine.network(input_ids=token_batch(9), use_cache=False).logits
    trained = {str(p.dtype) for p in engine.network.parameters() if p.requires_grad}
    masters = engine.masters()
    names, layers = list(engine._parameters), list(engine.controller.layers.values())
    engine.release()
    fits = ranks.is_main and all(
        torch.equal(masters[name].to(torch.bfloat16), parameter)
        for name, parameter in engine.network.named_parameters()
    )
    return {
        "losses": losses,
        "gradients": sorted(dtypes),
        "shards": sorted(trained),
        "logits": str(logits.dtype),
        "masters": {name: tensor.clone() for name, tensor in masters.items()},
        "names": names,
        "fits": fits,
        "num_kept": sum(layer.keeps_dequantized for layer in layers),
    }


@pytest.mark.parametrize("mode", ["sharded", pytest.param("whole", marks=pytest.mark.slow)])
def test_computes_in_bf16_and_keeps_float32(mode: str) -> None:
    room = 5000 / 2**30 if mode == "whole" else 0.0  # for W of the first two, 40 · 40 and 10 · 40, dequantized in bf16
    loqt = {"interval": 40, "dequantized_cache_gib": room}
    case = {"mode": mode, "train": {"dtype": "bf16"}, "loqt": loqt, "optim": {"weight_decay": 0.1}}
    results = launch(2, mixed, case=case)
    engine = single_engine(case)
    num_kept = sum(layer.keeps_dequantized for layer in engine.controller.layers.values())
    assert num_kept == (3 if room else 0)
    expected = [train_single(engine, token_batch(step, rows=ROWS))[0] for step in range(6)]
    for result in results:
        assert result["gradients"] == result["shards"] == ["torch.float32"] and result["logits"] == "torch.bfloat16"
        assert result["losses"] == pytest.approx(expected, rel=1e-3) and result["num_kept"] == num_kept
    first, other = results
    assert set(first["masters"]) == set(first["names"]) == set(engine.masters()) and not other["masters"]
    assert first["fits"], "rounded, masters are the model"
    for name, master in engine.masters().items():
        found = first["masters"][name]
        assert found.dtype == torch.float32 and found.shape == master.shape
        assert not torch.equal(found.to(torch.bfloat16).float(), found), f"{name} is more precise than bf16"
        # Adam takes steps of one size, in directions that bf16 decides where gradients are small. (Of keys' biases they
        # are nothing but rounding: softmax does not see these.)
        if not name.endswith("k_proj.bias"):
            assert relative(found, master) < 0.3, name


def rounded(ranks: Ranks, mode: str) -> dict[str, Any]:
    """Norms, all ones at the start, after updates of a sixteenth of a unit in the last place."""
    optim = {"master": "bf16", "lr": 2**-12, "warmup_steps": 0, "schedule": "constant"}
    engine = engine_of(ranks, {"mode": mode, "train": {"dtype": "bf16"}, "optim": optim})
    for step in range(12):
        step_on(engine, token_batch(step, rows=ROWS))
    moved = [t.double() - 1 for n, t in whole_tensors(engine.network, torch.bfloat16) if n.endswith("norm.weight")]
    dtypes = {str(p.dtype) for p in engine.network.parameters() if p.requires_grad}
    return {"moved": torch.cat(moved), "dtypes": sorted(dtypes), "masters": len(engine.masters())}


@pytest.mark.parametrize(
    ("world_size", "mode"), [(2, "whole"), pytest.param(4, "groups, sharded", marks=pytest.mark.slow)]
)
def test_bf16_alone_is_rounded_stochastically(world_size: int, mode: str) -> None:
    """With rounding to nearest they would stay where they are. Groups round alike: what they hold is compared by the
    engine at every re-initialization."""
    for result in launch(world_size, rounded, mode=mode):
        assert result["dtypes"] == ["torch.bfloat16"] and not result["masters"]
        moved = result["moved"]
        assert 0 < (moved != 0).double().mean() < 1 and float(moved.abs().mean()) < 12 * 2**-12


# ---------------------------------------------------------------- options that must not matter


def checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, None),
    "checkpointing": ({}, checkpointing),
    "gathered once": ({"reshard_after_forward": False}, None),
    "gathered once, checkpointing": ({"reshard_after_forward": False}, checkpointing),
    "whole": ({"shard_frozen": False}, None),
    "whole, checkpointing": ({"shard_frozen": False}, checkpointing),
}


def with_variants(ranks: Ranks, names: list[str], case: dict[str, Any]) -> dict[str, Any]:
    results = {}
    for name in names:
        fsdp, prepare = VARIANTS[name]
        options = {"fsdp": {"shard_frozen": True} | fsdp, "description": description(), "prepare": prepare}
        engine = build(ranks, configuration(ranks.world_size, case), **options)
        losses = [step_on(engine, token_batch(step, rows=ROWS))[0] for step in range(5)]
        results[name] = {"losses": losses, "factors": held_factors(engine)}
        engine.release()
    return results


@pytest.mark.parametrize(
    ("names", "case"),
    [
        (["plain", "checkpointing", "gathered once"], {"train": {"gradient_accumulation_steps": 2}}),
        pytest.param(
            list(VARIANTS), {"train": {"dtype": "bf16"}, "loqt": {"subspace": "sketch"}}, marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_kept_and_what_is_computed_again_does_not_matter(names: list[str], case: dict[str, Any]) -> None:
    """Not in one bit, W, P and B after re-initializations at steps 0, 2 and 4 included."""
    results = launch(2, with_variants, names=names, case=case)
    assert results[0] == results[1]
    for name in names:
        assert results[0][name] == results[0]["plain"], name


def leans(model: nn.Module) -> None:
    report = lean.install(model)
    assert len(report.norms) == 5 and len(report.mlps) == 2


def leans_and_checkpoints(model: nn.Module) -> None:
    checkpointing(model)
    leans(model)


def compiles(model: nn.Module) -> None:
    assert compiled.install(model) == 2


WAYS: dict[str, Any] = {
    "lean": leans,
    "lean, checkpointing": leans_and_checkpoints,
    "compiled": compiles,
    "kept dequantized": None,
}


def in_other_ways(ranks: Ranks, mode: str, names: list[str]) -> dict[str, list[float]]:
    losses = {}
    for name in ["plain", *names]:
        loqt = {"dequantized_cache_gib": 1.0} if name == "kept dequantized" else {}
        engine = engine_of(ranks, {"mode": mode, "loqt": loqt}, prepare=WAYS.get(name))
        losses[name] = [step_on(engine, token_batch(step, rows=ROWS))[0] for step in range(5)]
        if loqt:
            assert all(layer.keeps_dequantized for layer in engine.controller.layers.values())
        engine.release()
    return losses


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("sharded", ["lean"]),
        pytest.param("sharded", ["lean, checkpointing", "compiled"], marks=pytest.mark.slow),
        pytest.param("whole", list(WAYS), marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_compute_give_the_same_losses(mode: str, names: list[str]) -> None:
    """Re-initializations at steps 0, 2 and 4 included."""
    options = {"timeout_seconds": 500, "collective_timeout_seconds": 400} if "compiled" in names else {}
    for losses in launch(2, in_other_ways, mode=mode, names=names, **options):
        for name in names:
            assert losses[name] == pytest.approx(losses["plain"], rel=1e-5), name


# ---------------------------------------------------------------- factors alone


def factors_alone(ranks: Ranks, case: dict[str, Any], root: str) -> dict[str, Any]:
    """Losses, what is trained, what has changed; and a checkpoint, and whether a second engine makes the same of it."""
    engine = engine_of(ranks, case)
    before = held(engine)
    losses = [step_on(engine, token_batch(step, rows=ROWS))[0] for step in range(5)]
    path, after, state = save(engine, Path(root)), held(engine), own_state(engine)
    again = restore(engine_of(ranks, case), path)
    return {
        "losses": losses,
        "trained": sorted(engine._parameters),
        "changed": sorted(name for name, value in after.items() if value != before[name]),
        "same": held(again) == after and own_state(again) == state,
        "path": str(path),
        "dtypes": sorted({str(p.dtype) for n, p in engine.network.named_parameters() if n.endswith("norm.weight")}),
    }


@pytest.mark.parametrize("mode", ["whole", pytest.param("sharded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_factors_alone_are_trained(tmp_path: Path, mode: str, dtype: str) -> None:
    case = {"mode": mode, "optim": {"train_full_rank": False}, "train": {"dtype": dtype}}
    results = launch(2, factors_alone, case=case, root=str(tmp_path))
    engine = single_engine(case)
    expected = [train_single(engine, token_batch(step, rows=ROWS))[0] for step in range(5)]
    factors = sorted(f"{name}.B" for name in loqt_layers(engine.network))
    for result in results:
        assert result["losses"] == pytest.approx(expected, rel=1e-5 if dtype == "fp32" else 5e-3)
        assert result["trained"] == factors and result["same"]
        parts = {name.rsplit(".", 1)[-1] for name in result["changed"]}
        assert parts == {"B", "w_codes", "w_absmax", "p_codes", "p_absmax"}
        assert result["dtypes"] == [f"torch.{'float32' if dtype == 'fp32' else 'bfloat16'}"], "no master of what stays"
    gone_on = restore(single_engine(case), Path(results[0]["path"]))
    for name, tensor in gone_on.network.named_parameters():
        if not tensor.requires_grad:
            assert torch.equal(tensor, dict(engine.network.named_parameters())[name]), name


# ---------------------------------------------------------------- evaluation, generation, and the end


def look(engine: Any, number: int) -> dict[str, Any]:
    """Evaluates 5 batches, which are no multiple of the ranks, and where it can, lets each rank, whose `number` it is,
    generate as long as it likes."""
    ranks, network = engine.ranks, engine.network
    batches = [{"input_ids": ids[:, :-1], "targets": ids[:, 1:]} for ids in (token_batch(s, rows=3) for s in range(5))]
    batches[1]["targets"] = batches[1]["targets"].clone()
    batches[1]["targets"][:, 3:] = head.IGNORED
    with engine.evaluating(alone=False):
        result = evaluate(network, batches, engine.device, ranks=ranks)
        with torch.no_grad():
            logits = network(input_ids=token_batch(7), use_cache=False).logits
    found = {"loss": result.loss, "num_tokens": result.num_tokens, "logits": logits.float()}

    def generate() -> None:
        with engine.evaluating(alone=True):
            network.eval()
            ids = token_batch(60 + number, rows=1 + number)[:, :5]
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3 + 4 * number}
            found["generated"] = network.generate(ids, **options, do_sample=False, eos_token_id=None, pad_token_id=0)
            network.train()

    found["said"] = caught(generate)
    return found


class Plain:
    """As much of an engine as is looked at, with a model that nobody shards."""

    ranks, device = ALONE, torch.device("cpu")

    def __init__(self, network: Any) -> None:
        self.network = network

    def evaluating(self, *, alone: bool) -> Any:
        return torch.no_grad()


def looked_at(ranks: Ranks, case: dict[str, Any], looks: bool) -> dict[str, Any]:
    """Fingerprints after each step of a run that is looked at between steps, and of one that is not; what was seen at
    the end, and what rank 0's model shows once the engine has let go of it."""
    engine = engine_of(ranks, case, prepare=head.install)
    states = []
    for step in range(4):
        loss, report = step_on(engine, token_batch(step, rows=ROWS))
        if looks:
            look(engine, ranks.rank)
        states.append([loss, report.grad_norm, held(engine) | own_state(engine)])
    result: dict[str, Any] = {"states": states}
    if looks:
        result["seen"] = look(engine, ranks.rank)
        engine.release()
        if ranks.is_main:
            network = engine.network
            assert not any(isinstance(tensor, DTensor) for tensor in network.state_dict().values())
            assert type(network) is LlamaForCausalLM and network.lm_head.weight is network.model.embed_tokens.weight
            assert not any("FSDP" in type(module).__name__ for module in network.modules())
            result["plain"] = [look(Plain(network), number) for number in range(ranks.world_size)]
    return result


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (2, {"mode": "whole"}),
        (2, {"mode": "sharded"}),
        pytest.param(2, {"mode": "whole", "train": {"dtype": "bf16"}}, marks=pytest.mark.slow),
        pytest.param(4, {"mode": "groups"}, marks=pytest.mark.slow),
        pytest.param(4, {"mode": "groups, sharded", "train": {"dtype": "bf16"}}, marks=pytest.mark.slow),
    ],
)
def test_looking_changes_nothing_and_sees_the_model(world_size: int, case: dict[str, Any]) -> None:
    results, others = (launch(world_size, looked_at, case=case, looks=looks) for looks in (True, False))
    plain = results[0]["plain"]
    for rank, (result, other) in enumerate(zip(results, others, strict=True)):
        assert result["states"] == other["states"], "training goes on bit for bit"
        seen, expected = result["seen"], plain[rank]
        assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-6) and math.isfinite(seen["loss"])
        assert seen["num_tokens"] == expected["num_tokens"] == 3 * (4 * 16 + 3), "each target once"
        assert torch.equal(seen["logits"], expected["logits"])
        if "sharded" in case["mode"]:
            assert seen["said"].startswith("ValueError: ") and "fsdp.shard_frozen=true" in seen["said"]
        else:
            assert not seen["said"] and torch.equal(seen["generated"], expected["generated"])
            assert seen["generated"].shape == (1 + rank, 5 + 3 + 4 * rank)
    assert fingerprint(plain[0]["logits"]) != fingerprint(torch.zeros_like(plain[0]["logits"]))
