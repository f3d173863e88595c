"""FSDP2, W and P whole or sharded, one group of ranks or two, trains like one process and like ZeRO-2.

References: the single engine, which knows no ranks (1e-5 over an interval, 5e-5 over re-initializations where nothing
is quantized and so nothing can flip, 2 % over a run that quantizes); a dense model in float64 for losses; ZeRO-2 for
re-initializations, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, dense_state, llama_config, lm_loss, make_config, token_batch
from helpers import train_step as train_single
from ranks import build, held, held_factors, launch, lesson, restore, save, step_on
from transformers import GPT2Config, LlamaForCausalLM

from loqt_ds.config import Config
from loqt_ds.engines.single import SingleEngine
from loqt_ds.engines.state import whole_tensors
from loqt_ds.method.conversion import build_model, initializer
from loqt_ds.ranks import Ranks

ROWS = 8  # of a global batch
UNQUANTIZED = {"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0}
MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"shard_frozen": True},
    "groups": {"num_replicas": 2},
    "groups, sharded": {"num_replicas": 2, "shard_frozen": True},
    "gathered once": {"shard_frozen": True, "reshard_after_forward": False},
}


def odd_llama() -> Any:
    """Sides of 40, 10 and 86, biases, tied embeddings, one head of keys for four of queries; at rank 3, B of a left
    side has fewer rows than four ranks."""
    return llama_config(
        hidden_size=40,
        num_hidden_layers=2,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )


def gpt2() -> Any:
    """Transposed matrices, biases, tied embeddings, learned positions."""
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=36,
        n_layer=2,
        n_head=3,
        n_positions=40,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
    )


MODELS = {"llama": lambda: llama_config(num_hidden_layers=2), "odd": odd_llama, "gpt2": gpt2}

# All start anew, with an initialization in step 0.
CASES: dict[str, dict[str, Any]] = {
    "interval": {"loqt": {"interval": 40}, "num_steps": 7, "num_reinits": 1},
    "interval, odd shapes, accumulation, clipping": {
        "model": "odd",
        "loqt": {"interval": 40, "rank": 3},
        "optim": {"lr_full_rank": 0.003, "weight_decay": 0.1},
        "train": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3},
        "num_steps": 6,
        "num_reinits": 1,
    },
    "project, odd shapes": {
        "model": "odd",
        "loqt": UNQUANTIZED | {"rank": 3, "optimizer_state": "project"},
        "num_steps": 7,
        "num_reinits": 4,
    },
    "sketch, reset, clipping": {
        "loqt": UNQUANTIZED | {"subspace": "sketch", "sketch_oversampling": 4, "optimizer_state": "reset"},
        "train": {"max_grad_norm": 0.3},
        "num_steps": 7,
        "num_reinits": 4,
    },
    "iterated, keep, accumulation": {
        "loqt": UNQUANTIZED | {"subspace": "iterated"},
        "train": {"gradient_accumulation_steps": 2},
        "num_steps": 7,
        "num_reinits": 4,
    },
    "transport, gpt2": {
        "model": "gpt2",
        "loqt": UNQUANTIZED | {"rank": 5, "optimizer_state": "transport"},
        "num_steps": 7,
        "num_reinits": 4,
    },
}
# (ranks, [(case, mode)]): one launch each
FAST = {
    1: [("interval", "sharded")],
    2: [
        ("interval", "whole"),
        ("interval", "sharded"),
        ("interval, odd shapes, accumulation, clipping", "sharded"),
        ("project, odd shapes", "whole"),
    ],
    4: [("project, odd shapes", "sharded"), ("sketch, reset, clipping", "groups, sharded")],
}


def configuration(world_size: int, case: dict[str, Any]) -> Config:
    train = dict(case.get("train", {}))
    train["micro_batch_size"] = ROWS // train.get("gradient_accumulation_steps", 1) // world_size
    train.setdefault("max_steps", 60)
    return make_config(loqt={"rank": 7} | case.get("loqt", {}), optim=case.get("optim", {}), train=train)


def single_engine(case: dict[str, Any]) -> SingleEngine:
    config = configuration(1, case)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    model, source = build_model(MODELS[case.get("model", "llama")](), config.loqt, initializer(0), dtype=dtype)
    return SingleEngine(model, config, original=source.weight)


def fsdp_engine(ranks: Ranks, case: dict[str, Any], mode: str) -> Any:
    model = MODELS[case.get("model", "llama")]()
    return build(ranks, configuration(ranks.world_size, case), fsdp=MODES[mode], description=model)


# ---------------------------------------------------------------- the same losses


def run_cases(ranks: Ranks, chosen: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Losses, norms and fingerprints of W, P and B after re-initializations, of each (case, mode)."""
    results = []
    for name, mode in chosen:
        engine = fsdp_engine(ranks, CASES[name], mode)
        result: dict[str, Any] = {"losses": [], "norms": [], "replicas": []}
        for step in range(CASES[name]["num_steps"]):
            loss, report = step_on(engine, lesson(step))
            result["losses"].append(loss)
            result["norms"].append(report.grad_norm)
            if report.reinit is not None:
                result["replicas"].append(held_factors(engine))
        results.append(result | {"held": held(engine)})
        engine.release()
    return results


def check_cases(world_size: int, chosen: list[tuple[str, str]]) -> None:
    results = launch(world_size, run_cases, chosen=chosen, timeout_seconds=240)
    for number, (name, mode) in enumerate(chosen):
        engine, case = single_engine(CASES[name]), CASES[name]
        steps = [train_single(engine, lesson(step)) for step in range(case["num_steps"])]
        tolerance = 1e-5 if case["num_reinits"] == 1 else 5e-5
        for rank in range(world_size):
            result = results[rank][number]
            assert result["losses"] == pytest.approx([loss for loss, _ in steps], rel=tolerance), (name, mode)
            norms = [report.grad_norm for _, report in steps]
            assert result["norms"] == pytest.approx(norms, rel=10 * tolerance), (name, mode)
            assert len(result["replicas"]) == case["num_reinits"]
            assert result["replicas"] == results[0][number]["replicas"]
            assert result["held"] == results[0][number]["held"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_losses_are_those_of_one_process(world_size: int) -> None:
    check_cases(world_size, FAST[world_size])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_one_process_in_every_case(world_size: int, mode: str) -> None:
    check_cases(world_size, [(name, mode) for name in CASES])


# ---------------------------------------------------------------- a dense model


def against_dense(ranks: Ranks, mode: str) -> list[list[float]]:
    """Of each step the loss, and, on rank 0, that of the dense model in float64 that the ranks together held."""
    case = {"loqt": {"rank": 3, "interval": 3}, "model": "odd"}
    engine, found = fsdp_engine(ranks, case, mode), []
    for step in range(5):
        model, _ = build_model(odd_llama(), configuration(ranks.world_size, case).loqt, initializer(1))
        model.load_state_dict(dict(whole_tensors(engine.network, torch.float32)), strict=False)  # a tied head
        loss, _ = step_on(engine, token_batch(step, rows=ROWS))
        if ranks.is_main:
            dense = LlamaForCausalLM(odd_llama()).double()
            dense.load_state_dict({name: tensor.double() for name, tensor in dense_state(model).items()}, strict=False)
            with torch.no_grad():
                found.append([loss, lm_loss(dense, token_batch(step, rows=ROWS)).item()])
    return found


@pytest.mark.parametrize(
    ("world_size", "mode"), [(2, "sharded"), pytest.param(4, "groups, sharded", marks=pytest.mark.slow)]
)
def test_losses_are_those_of_the_dense_model(world_size: int, mode: str) -> None:
    found = launch(world_size, against_dense, mode=mode)[0]
    assert len(found) == 5
    for actual, expected in found:
        assert actual == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- the same re-initialization


def after_reinit(ranks: Ranks, root: str, loqt: dict[str, Any]) -> dict[str, Any]:
    """Under ZeRO-2 and, from its checkpoint, in every mode: W, P and B after a step with a re-initialization. More than
    two ranks add gradients up in another order than ZeRO's: their update is one of length zero."""
    case = {"loqt": {"rank": 7, "interval": 3} | loqt}
    config = configuration(ranks.world_size, case)
    results: dict[str, Any] = {}
    zero = build(ranks, config, stage=2)
    for step in range(3):
        step_on(zero, lesson(step))
    path = save(zero, Path(root))
    for mode in (None, *MODES):
        engine = zero if mode is None else restore(build(ranks, config, fsdp=MODES[mode]), path)
        before = held_factors(engine)
        if ranks.world_size > 2:
            engine._rates.at = lambda step: (0.0, 0.0)
        _, report = step_on(engine, lesson(3))
        assert report.reinit is not None
        results[str(mode)] = {
            "before": before,
            "after": held_factors(engine),
            "errors": [layer.error_after for layer in report.reinit.layers],
        }
        engine.release()
    return results


@pytest.mark.parametrize(
    ("world_size", "loqt"),
    [
        (2, {"optimizer_state": "project"}),
        pytest.param(2, {"subspace": "sketch", "sketch_oversampling": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"subspace": "exact"}, marks=pytest.mark.slow),
    ],
)
def test_a_re_initialization_gives_the_bits_of_zeros(tmp_path: Path, world_size: int, loqt: dict[str, Any]) -> None:
    results = launch(world_size, after_reinit, root=str(tmp_path), loqt=loqt)
    expected = results[0]["None"]
    changed = [n for n, value in expected["after"].items() if value != expected["before"][n]]
    assert len([n for n in changed if n.endswith(("w_codes", "p_codes", ".B"))]) == 3 * 14
    for result in results:
        for mode in MODES:
            assert result[mode] == expected, mode


# ---------------------------------------------------------------- over whole runs

RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"loqt": {"interval": 10, "rank": 14}, "optim": {"name": "adamw"}},
    "8 bits, bf16": {
        "loqt": {"interval": 10, "rank": 14, "subspace": "sketch", "sketch_oversampling": 4},
        "optim": {"name": "adamw8bit"},
        "train": {"dtype": "bf16", "max_grad_norm": 1.0},
    },
}
NUM_STEPS = 50


def run_whole(ranks: Ranks, chosen: list[tuple[str, str]]) -> list[dict[str, Any]]:
    results = []
    for name, mode in chosen:
        engine = fsdp_engine(ranks, RUNS[name], mode)
        losses, replicas = [], []
        for step in range(NUM_STEPS):
            loss, report = step_on(engine, lesson(step))
            losses.append(loss)
            if report.reinit is not None:
                replicas.append((step, held_factors(engine)))
        results.append({"losses": losses, "replicas": replicas})
        engine.release()
    return results


@pytest.mark.parametrize(
    ("world_size", "chosen"),
    [
        (2, [("fp32", "sharded")]),
        pytest.param(
            2, [("fp32", "whole"), ("8 bits, bf16", "whole"), ("8 bits, bf16", "sharded")], marks=pytest.mark.slow
        ),
        pytest.param(4, [("fp32", "groups"), ("8 bits, bf16", "groups, sharded")], marks=pytest.mark.slow),
        pytest.param(4, [("8 bits, bf16", "sharded"), ("fp32", "sharded")], marks=pytest.mark.slow),
    ],
)
def test_curves_agree_over_several_re_initializations(world_size: int, chosen: list[tuple[str, str]]) -> None:
    """Quantized: codes flip on rounding, so that the curves agree within 2 %; the ranks still agree in every bit."""
    results = launch(world_size, run_whole, chosen=chosen, timeout_seconds=240)
    for number, (name, _) in enumerate(chosen):
        engine = single_engine(RUNS[name])
        expected = [train_single(engine, lesson(step))[0] for step in range(NUM_STEPS)]
        assert expected[-1] < 0.8 * expected[0], "it learns"
        replicas = results[0][number]["replicas"]
        assert [step for step, _ in replicas] == [0, 10, 20, 30, 40]
        for result in results:
            assert result[number]["losses"] == pytest.approx(expected, rel=0.02)
            assert result[number]["replicas"] == replicas
