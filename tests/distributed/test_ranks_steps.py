"""What happens in and between the micro-batches of a step of two ranks, and must not matter, or must matter on all.

References: the same run without it, bit for bit or to rounding; and what was held before a step that is skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import lm_loss, make_config, token_batch
from ranks import build, fingerprint, held, held_factors, launch, own_state, step_on
from torch import nn

from loqt_ds.config import Config
from loqt_ds.engines.deepspeed import LoQTEngine
from loqt_ds.ranks import Ranks

NUM_STEPS = 3  # with re-initializations at steps 0 and 2


def configuration(case: dict[str, Any]) -> Config:
    train = {"gradient_accumulation_steps": 2, "micro_batch_size": 2} | case.get("train", {})
    return make_config(loqt={"rank": 7} | case.get("loqt", {}), optim={"name": "adamw8bit"}, train=train)


# ---------------------------------------------------------------- evaluation and generation


def look(engine: LoQTEngine, ids: torch.Tensor) -> None:
    """Evaluates in every way there is, and generates."""
    model = engine.network
    with torch.no_grad():
        lm_loss(engine, ids)  # in training mode
        lm_loss(model, ids)
    engine.eval()
    lm_loss(engine, ids)  # with gradients on
    with torch.no_grad():
        lm_loss(engine, ids)
    model.generate(ids[:, :5], attention_mask=torch.ones_like(ids[:, :5]), max_new_tokens=2, do_sample=False)
    engine.train()


def looked_at(ranks: Ranks, case: dict[str, Any], looks: bool) -> list[dict[str, Any]]:
    """Fingerprints of everything after each step. `looks`: each rank looks at its engine between the micro-batches,
    between backward and step, and between steps."""
    engine = build(ranks, configuration(case), stage=case["stage"])
    other = token_batch(77, rows=3 + ranks.rank)
    states = []
    for step in range(NUM_STEPS):
        if looks:
            look(engine, other)
        loss, report = step_on(
            engine, token_batch(step, rows=8), between=(lambda number: look(engine, other)) if looks else None
        )
        if looks:
            look(engine, other)
        state = held(engine) | own_state(engine)  # as for a checkpoint, which is taken between steps
        states.append({"loss": loss, "norm": report.grad_norm, "reinit": report.reinit is not None, "state": state})
    return states


@pytest.mark.parametrize(
    "case",
    [
        {"stage": 2, "loqt": {"subspace": "gram"}},
        {"stage": 1, "loqt": {"subspace": "sketch", "sketch_oversampling": 4}, "train": {"dtype": "bf16"}},
    ],
)
def test_looking_changes_nothing(case: dict[str, Any]) -> None:
    plain, watched = (launch(2, looked_at, case=case, looks=looks) for looks in (False, True))
    assert [state["reinit"] for state in plain[0]] == [True, False, True]
    assert watched == plain


# ---------------------------------------------------------------- options of model and DeepSpeed


def checkpointing(reentrant: bool) -> Any:
    def prepare(model: nn.Module) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    return prepare


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing, not reentrant": {"prepare": checkpointing(False)},
    "checkpointing, reentrant": {"prepare": checkpointing(True)},
    "overlap, small buckets": {"zero": {"overlap_comm": True, "reduce_bucket_size": 500, "allgather_bucket_size": 500}},
    "not contiguous": {"zero": {"contiguous_gradients": False}},
    "sums in float32": {"communication_data_type": "fp32"},
}


def with_variants(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    results = {}
    for name, options in VARIANTS.items():
        engine = build(ranks, configuration(case), stage=case["stage"], **options)
        losses = [step_on(engine, token_batch(step, rows=8))[0] for step in range(NUM_STEPS)]
        results[name] = {"losses": losses, "factors": held_factors(engine)}
        engine.release()
    return results


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ({"stage": 2, "loqt": {"subspace": "gram"}}, 1e-5),
        # bf16: another order of sums is another rounding
        ({"stage": 2, "loqt": {"subspace": "sketch", "sketch_oversampling": 4}, "train": {"dtype": "bf16"}}, 5e-3),
    ],
)
def test_options_that_must_not_matter(case: dict[str, Any], tolerance: float) -> None:
    results = launch(2, with_variants, case=case)
    plain = results[0]["plain"]
    for name in VARIANTS:
        assert results[0][name]["factors"] == results[1][name]["factors"]
        assert results[0][name]["losses"] == pytest.approx(plain["losses"], rel=tolerance), name
    for name in ("checkpointing, not reentrant", "checkpointing, reentrant"):
        assert results[0][name] == plain, "recomputed in the same order: the same bits"


# ---------------------------------------------------------------- steps that are skipped


def with_a_bad_rank(ranks: Ranks, case: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 sees NaN in step 4, where a re-initialization is due, and again in step 5."""
    case = case | {"loqt": {"interval": 4} | case.get("loqt", {})}
    engine = build(ranks, configuration(case), stage=case.get("stage", 2), fsdp=case.get("fsdp"))
    for step in range(4):
        step_on(engine, token_batch(step, rows=8))
    before = held(engine) | own_state(engine)
    reports, states = [], []
    for step in (4, 5, 6):
        bad = {0: 1.0, 1: float("nan") if step < 6 else 1.0}
        loss, report = step_on(engine, token_batch(step, rows=8), poison=bad.__getitem__)
        reports.append([report.step, report.applied, report.reinit is not None])
        states.append(held(engine) | own_state(engine))
    kept = [layer.kept for layer in report.reinit.layers] if report.reinit is not None else []
    return {"before": before, "reports": reports, "states": states, "kept": kept, "factors": held_factors(engine)}


@pytest.mark.parametrize(
    "case",
    [
        {"stage": 0},
        {"stage": 0, "train": {"dtype": "bf16"}},
        {"stage": 1, "train": {"dtype": "bf16"}},
        {"stage": 2},
        {"stage": 2, "train": {"max_grad_norm": 1.0}, "loqt": {"subspace": "sketch", "sketch_oversampling": 4}},
        {"fsdp": {"shard_frozen": True}, "train": {"dtype": "bf16", "max_grad_norm": 1.0}},
        pytest.param({"fsdp": {}}, marks=pytest.mark.slow),
        # groups of one rank: nothing is sharded, and the norm is that of each
        pytest.param({"fsdp": {"num_replicas": 2}, "train": {"dtype": "bf16"}}, marks=pytest.mark.slow),
    ],
)
def test_nan_on_one_rank_skips_the_step_on_all(case: dict[str, Any]) -> None:
    """Nothing changes, and the re-initialization stays due until a step is made."""
    results = launch(2, with_a_bad_rank, case=case)
    for result in results:
        assert result["reports"] == [[4, False, False], [5, False, False], [6, True, True]]
        assert result["states"][0] == result["before"] and result["states"][1] == result["before"]
        assert result["states"][2].keys() == result["before"].keys()
        assert set(result["kept"]) == {None}
        for name, value in result["factors"].items():
            if name.endswith((".B", ".w_codes", ".p_codes")):
                assert value != result["before"][name], name
    assert results[0]["factors"] == results[1]["factors"]


# ---------------------------------------------------------------- the start


def of_different_seeds(ranks: Ranks, dtype: str) -> list[dict[str, str]]:
    """What is held before there is an engine, then, and after a step; each rank draws another model."""
    before: list[dict[str, str]] = []

    def prepare(model: nn.Module) -> None:
        before.append({name: fingerprint(tensor) for name, tensor in model.state_dict().items()})

    case = {"train": {"dtype": dtype}}
    engine = build(ranks, configuration(case), prepare=prepare, seed=ranks.rank)
    states = [*before, held(engine)]
    step_on(engine, token_batch(0, rows=8))
    return [*states, held(engine)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ranks_begin_with_the_model_of_the_first(dtype: str) -> None:
    one, other = launch(2, of_different_seeds, dtype=dtype)
    assert all(one[0][name] != other[0][name] for name in one[0] if name.endswith(("w_codes", "embed_tokens.weight")))
    assert {name: one[1][name] for name in one[0]} == one[0], "rank 0 keeps its own"
    assert other[1:] == one[1:]
