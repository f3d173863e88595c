"""The subspace that several ranks find together: P, and W and B made with it.

References: a float64 SVD of the gradient of a dense model on the whole global batch; the one-process controller, given
the gradient that the ranks have summed; exact SVD of the gradient that a sketch was taken of.
"""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import dense_state, llama_config, lm_loss, make_config, token_batch
from ranks import build, held, held_factors, launch, restore, save, step_on
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loqt_ds.config import Config
from loqt_ds.engines.deepspeed import LoQTEngine
from loqt_ds.engines.ds_config import check_deepspeed
from loqt_ds.engines.single import SingleEngine
from loqt_ds.method.conversion import build_model, checkpoint_files, convert, initializer, loqt_layers
from loqt_ds.ranks import Ranks

ZERO2 = Path(__file__).resolve().parents[2] / "configs" / "zero2.json"
UNQUANTIZED = {"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0}


def configuration(loqt: dict[str, Any], *, micro_batch_size: int = 4, **sections: Any) -> Config:
    train = {"micro_batch_size": micro_batch_size, "max_steps": 60} | sections.pop("train", {})
    return make_config(loqt={"rank": 7} | loqt, train=train, **sections)


# ---------------------------------------------------------------- bit for bit, from the same sums


BITWISE: list[tuple[int, str, dict[str, Any]]] = [
    (0, "fp32", {"subspace": "exact", "optimizer_state": "project", "double_quant": "both"}),
    (1, "fp32", {"subspace": "sketch", "sketch_oversampling": 4, "dequantized_cache_gib": 1.0}),
    (2, "bf16", {"subspace": "gram", "optimizer_state": "reset", "dequantized_cache_gib": 1.0}),
    (2, "bf16", {"subspace": "sketch", "sketch_oversampling": 4, "optimizer_state": "transport"}),
]


def same_rows_everywhere(ranks: Ranks) -> list[list[dict[str, str]]]:
    """Every rank sees the same rows: sums over 1, 2, 4 ranks then differ by a power of two, which rounds nothing."""
    results = []
    for stage, dtype, loqt in BITWISE:
        config = configuration(loqt, optim={"name": "adamw"}, train={"gradient_accumulation_steps": 2, "dtype": dtype})
        engine = build(ranks, config, stage=stage)
        states = []
        for step in range(3):
            ids = token_batch(step, rows=8)
            every = torch.cat([part for half in ids.chunk(2) for part in [half] * ranks.world_size])
            _, report = step_on(engine, every)
            if report.reinit is not None:
                states.append(held(engine))
        results.append(states)
        engine.release()
    return results


def test_the_same_sums_give_the_same_bits_on_any_number_of_ranks() -> None:
    """Of the whole model, after each of two re-initializations."""
    (expected,) = launch(1, same_rows_everywhere)
    for states in expected:
        assert len(states) == 2 and states[0] != states[1]
    for world_size in (2, 4):
        for results in launch(world_size, same_rows_everywhere):
            for number, case in enumerate(BITWISE):
                assert results[number] == expected[number], case


def recorded_reinit(ranks: Ranks, root: str, loqt: dict[str, Any]) -> dict[str, Any]:
    """Saves a state, and re-initializes from it in a step with a learning rate of zero. Returns the gradients that this
    rank owns, as they were summed, and what is held afterwards."""
    engine = build(ranks, configuration(loqt, micro_batch_size=8 // ranks.world_size), stage=2)
    for step in range(5):
        step_on(engine, token_batch(step, rows=8))
    path = save(engine, Path(root))
    assert engine._rates is not None
    engine._rates._factors = engine._rates._full_rank = 0.0
    sums: list[tuple[Tensor, int]] = []
    reduce = engine.controller.ranks.reduce

    def recording(tensor: Tensor, target: int) -> Any:
        sums.append((tensor, target))
        return reduce(tensor, target)

    engine.controller.ranks.reduce = recording  # type: ignore[method-assign]
    _, report = step_on(engine, token_batch(5, rows=8))
    assert report.reinit is not None
    names = list(reversed(engine.controller.layers))  # gradients are summed in this order, and before anything else
    own = {
        name: tensor for name, (tensor, target) in zip(names, sums[: len(names)], strict=True) if target == ranks.rank
    }
    return {"path": str(path), "sums": own, "held": held(engine)}


@pytest.mark.parametrize(
    ("world_size", "loqt"), [(2, {"subspace": "exact"}), (4, {"subspace": "gram", "double_quant": "both"})]
)
def test_one_process_makes_the_same_bits_of_the_sum_over_ranks(
    tmp_path: Path, world_size: int, loqt: dict[str, Any]
) -> None:
    """W, P and B of all layers, of ranks that saw different rows. Each rank owns some of the layers."""
    loqt = loqt | {"interval": 5, "optimizer_state": "project"}
    results = launch(world_size, recorded_reinit, root=str(tmp_path), loqt=loqt)
    config = configuration(loqt, micro_batch_size=8)
    model, source = build_model(llama_config(num_hidden_layers=2), config.loqt, initializer(0))
    single = restore(SingleEngine(model, config, original=source.weight), Path(results[0]["path"]))
    before = held(single)
    assert all(result["sums"] for result in results), "each rank owns something"
    sums = {name: tensor for result in results for name, tensor in result["sums"].items()}
    controller = single.controller
    assert sums.keys() == controller.layers.keys()
    controller.begin_step(5)
    for name, layer in controller.layers.items():
        assert layer.tap is not None
        identity = torch.eye(layer.basis_shape[0])
        # (dY, X) whose product is the sum, exactly
        layer.tap(*((sums[name], identity) if layer.side == "right" else (identity, sums[name])))
        controller.gradient_complete(name)
    assert controller.end_step(True) is not None
    expected = held(single)
    assert all(expected[name] != before[name] for name in expected if name.endswith((".B", ".p_codes", ".w_codes")))
    for result in results:
        assert result["held"] == expected


# ---------------------------------------------------------------- P against the dense gradient of the global batch


def dense_model(state: dict[str, Tensor]) -> nn.Module:
    model = LlamaForCausalLM(llama_config(num_hidden_layers=2)).double()
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()})
    return model


def distance(basis: Tensor, gradient: Tensor) -> float:
    """‖P Pᵀ − U Uᵀ‖ (spectral: the sine of the largest angle) between P (k, r) and the top singular vectors U of a
    gradient (k, l), in float64."""
    basis = basis.double()
    left = torch.linalg.svd(gradient.double(), full_matrices=False).U[:, : basis.shape[1]]
    return float(torch.linalg.matrix_norm(basis @ basis.T - left @ left.T, ord=2))


def canonical(gradient: Tensor) -> Tensor:
    """A (k, l), the smaller side first, of a gradient (out, in)."""
    return gradient.T if gradient.shape[1] <= gradient.shape[0] else gradient


def shares(rows: list[int], rank: int) -> slice:
    """Which rows of the global batch a rank sees."""
    start = sum(rows[:rank])
    return slice(start, start + rows[rank])


def found_bases(ranks: Ranks, rows: list[int], subspace: str, stage: int) -> dict[str, Any]:
    """The dense state before the re-initialization of step 4, and P after it, on rank 0. Ranks have so many rows."""
    engine = build(ranks, configuration(UNQUANTIZED | {"interval": 4, "subspace": subspace}), stage=stage)
    state: dict[str, Tensor] = {}
    for step in range(5):
        if step == 4:
            state = {name: tensor.clone() for name, tensor in dense_state(engine.network).items()}
        ids = token_batch(step, rows=sum(rows))
        own = ids[shares(rows, ranks.rank)]
        # each predicted token of the global batch weighs the same; DeepSpeed averages over the ranks
        engine.backward(lm_loss(engine, own) * (len(own) * ranks.world_size / len(ids)))
        report = engine.step()
    assert report is not None and report.reinit is not None
    if not ranks.is_main:
        return {}
    bases = {name: layer.basis_hat().clone() for name, layer in loqt_layers(engine.network).items()}
    return {"state": state, "bases": bases}


@pytest.mark.parametrize(
    ("rows", "subspace", "stage"),
    [([8], "exact", 2), ([4, 4], "exact", 2), ([6, 2], "exact", 1), ([3, 1, 1, 3], "exact", 2), ([1, 7], "gram", 0)],
)
def test_p_is_that_of_the_concatenated_batch(rows: list[int], subspace: str, stage: int) -> None:
    """Also where ranks have different numbers of tokens."""
    found, *_ = launch(len(rows), found_bases, rows=rows, subspace=subspace, stage=stage)
    dense = dense_model(found["state"])
    ids = token_batch(4, rows=8)
    lm_loss(dense, ids).backward()
    own = {n: p.grad for n, p in dense.named_parameters()}
    dense.zero_grad(set_to_none=True)
    lm_loss(dense, ids[: rows[0]]).backward()
    for name, basis in found["bases"].items():
        gradient = own[f"{name}.weight"]
        assert gradient is not None
        assert distance(basis, canonical(gradient)) < 1e-3, name
        if len(rows) > 1:  # the measure tells shares of the batch from the whole
            alone = dense.get_parameter(f"{name}.weight").grad
            assert alone is not None
            assert distance(basis, canonical(alone)) > 0.1, name


# ---------------------------------------------------------------- layers that a rank does not use


class Branches(nn.Module):
    """A branch that is used where a batch asks for it, a part that always is, and perhaps one that never is."""

    def __init__(self, *, idle: bool) -> None:
        super().__init__()
        self.always = nn.Linear(24, 40)
        self.seldom = nn.Linear(40, 24, bias=False)
        if idle:
            self.never = nn.Linear(40, 24, bias=False)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        hidden = torch.tanh(self.always(x))
        return self.seldom(hidden) if branch else hidden[..., :24]


def with_branches(ranks: Ranks, users: list[int], steps: int, idle: bool) -> dict[str, Any]:
    """Only the ranks `users` take the branch. Re-initializes at steps 0, 2, …"""
    torch.manual_seed(0)
    model = Branches(idle=idle)
    config = configuration({"rank": 5, "interval": 1, "schedule": "static", "subspace": "exact"} | UNQUANTIZED)
    original = convert(model, config.loqt)
    ds_config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine = LoQTEngine(model, config, ds_config, ranks=ranks, original=original.__getitem__)
    reports: list[dict[str, str | None]] = []
    before: dict[str, Tensor] = {}
    for step in range(steps):
        before = {name: layer.effective_weight().clone() for name, layer in loqt_layers(engine.network).items()}
        before |= {"bias": engine.network.always.bias.detach().clone()}
        draw = torch.Generator().manual_seed(100 * step + ranks.rank)
        x, y = torch.randn(4, 24, generator=draw), torch.randn(4, 24, generator=draw)
        engine.backward(nn.functional.mse_loss(engine(x, ranks.rank in users), y))
        report = engine.step()
        assert report is not None and report.reinit is not None
        reports.append({layer.name: layer.kept for layer in report.reinit.layers})
    bases = {name: layer.basis_hat().clone() for name, layer in loqt_layers(engine.network).items()}
    return {"reports": reports, "before": before, "bases": bases, "held": held_factors(engine)}


@pytest.mark.parametrize(("users", "idle"), [([0], True), ([1], True), ([0], False), ([1], False)])
def test_a_layer_that_one_rank_does_not_use_is_re_initialized_from_the_others(users: list[int], idle: bool) -> None:
    """Whether the layer that nobody uses, or this one, is the first whose gradient is waited for."""
    steps = 3
    results = launch(2, with_branches, users=users, steps=steps, idle=idle)
    one, other = results
    assert one["reports"] == other["reports"] and one["held"] == other["held"]
    never = {"never": "no gradient reached the layer"} if idle else {}
    assert one["reports"][-1] == {"always": None, "seldom": None} | never
    # the same, dense, in float64
    dense = Branches(idle=idle).double()
    with torch.no_grad():
        for name in ("always", "seldom", *never):
            dense.get_submodule(name).weight.copy_(one["before"][name])
        dense.always.bias.copy_(one["before"]["bias"])
    for rank in range(2):
        draw = torch.Generator().manual_seed(100 * (steps - 1) + rank)
        x, y = torch.randn(4, 24, generator=draw), torch.randn(4, 24, generator=draw)
        nn.functional.mse_loss(dense(x.double(), rank in users), y.double()).backward()
    for name, num_tokens in (("always", 8), ("seldom", 4)):
        gradient = dense.get_submodule(name).weight.grad
        known = min(5, num_tokens)  # directions that the gradient has; the rest of P is filled up
        assert distance(one["bases"][name][:, :known], canonical(gradient)) < 1e-3, name


# ---------------------------------------------------------------- sketches of a really trained model


@pytest.fixture(scope="module")
def stories(real_data: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """stories260K as a transformers directory, and a file of token ids (rows, 129) of TinyStories."""
    weights, text = real_data / "weights" / "stories260K", real_data / "en" / "tinystories_sample.txt.gz"
    if not weights.is_dir() or not text.is_file():
        pytest.skip(f"no stories260K or TinyStories in {real_data}")
    spec = importlib.util.spec_from_file_location("convert_llama2c", repository / "tools" / "convert_llama2c.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # dataclasses look their module up
    spec.loader.exec_module(tool)
    folder = tmp_path_factory.mktemp("stories")
    model = folder / "model"
    tool.convert(weights / "stories260K.bin", weights / "tok512.model", model)
    with gzip.open(text, "rt", encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(model)(file.read(900_000))["input_ids"]
    rows = len(ids) // 129
    torch.save(torch.tensor(ids[: rows * 129]).view(rows, 129), folder / "ids.pt")
    return model, folder / "ids.pt"


STORIES, PAUSE = 16, 5  # rows of a step; steps between re-initializations


def sketches(ranks: Ranks, model: str, ids: str, loqt: dict[str, Any], train: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains a trained model further. At each re-initialization: P, the dense gradient that it is of,
    summed over the ranks, and that of the next step, on rank 0."""
    config = configuration(
        {"subspace": "sketch", "quantize_p": "none", "interval": PAUSE} | loqt,
        micro_batch_size=STORIES // train.get("gradient_accumulation_steps", 1) // ranks.world_size,
        optim={"lr": 0.001, "name": "adamw"},
        train=train,
    )
    kind = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    description = LlamaConfig.from_pretrained(model)
    built, source = build_model(description, config.loqt, checkpoint_files(Path(model)), dtype=kind)
    ds_config = check_deepspeed(ZERO2, config)
    engine = LoQTEngine(built, config, ds_config, ranks=ranks, original=source.weight)
    layers = engine.controller.layers
    dense: dict[str, Tensor] = {}

    def also_dense(name: str, tap: Any) -> Any:
        """`tap`, and the dense gradient beside it, canonical, in float32."""

        def both(dy: Tensor, x: Tensor) -> None:
            inner, outer = (x, dy) if layers[name].side == "right" else (dy, x)
            dense[name] += inner.float().T @ outer.float()
            if tap is not None:
                tap(dy, x)

        return both

    begin_step = engine.controller.begin_step

    def begin(step: int) -> None:
        begin_step(step)
        for name, layer in layers.items():
            dense[name] = torch.zeros(layer.basis_shape[0], layer.factor_length)
            layer.tap = also_dense(name, layer.tap)

    engine.controller.begin_step = begin  # type: ignore[method-assign]
    every = torch.load(ids, weights_only=True)
    found: list[dict[str, Any]] = []
    for step in range(PAUSE + 2):
        _, report = step_on(engine, every[step * STORIES : (step + 1) * STORIES])
        for layer in layers.values():
            layer.tap = None
        if step % PAUSE < 2:
            summed = {name: ranks.all_reduce(gradient.clone()) for name, gradient in dense.items()}
            assert (report.reinit is None) == (step % PAUSE == 1)
            if report.reinit is not None:
                bases = {name: layer.basis_hat().clone() for name, layer in layers.items()}
                said = {layer.name: layer.captured_energy for layer in report.reinit.layers}
                found.append({"now": summed, "bases": bases, "said": said, "kept": report.reinit.summary()["num_kept"]})
            else:
                found[-1]["next"] = summed
    return found if ranks.is_main else []


def energy(gradient: Tensor, basis: Tensor) -> float:
    """‖Qᵀ A‖² / ‖A‖² in float64, with Q orthonormal and of the span of P (which may be rounded to bf16)."""
    gradient, q = gradient.double(), torch.linalg.qr(basis.double()).Q
    return float((q.T @ gradient).square().sum() / gradient.square().sum())


def compare_with_exact(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Layer -> energy that P holds of this gradient and of the next, over what the exact P holds of each."""
    ratios = {}
    for name, basis in found["bases"].items():
        now, following = found["now"][name], found["next"][name]
        exact = torch.linalg.svd(now.double(), full_matrices=False).U[:, : basis.shape[1]]
        ratios[name] = (energy(now, basis) / energy(now, exact), energy(following, basis) / energy(following, exact))
    return ratios


@pytest.mark.parametrize(
    ("loqt", "train"),
    [
        ({}, {"dtype": "bf16"}),
        ({"sketch_oversampling": 8}, {}),
        ({}, {"gradient_accumulation_steps": 2}),
    ],
)
def test_sketches_of_a_trained_model_capture_what_exact_svd_does(
    stories: tuple[Path, Path], loqt: dict[str, Any], train: dict[str, Any]
) -> None:
    """At least 0.96 of its energy of the same gradient, 0.99 of the next step's, summed over two ranks; the first time,
    without any moment, and later. The mean over the layers; each layer by itself is noisy in the next step."""
    model, ids = stories
    arguments = {"model": str(model), "ids": str(ids), "loqt": {"rank": 16} | loqt, "train": train}
    found, _ = launch(2, sketches, **arguments)
    # Columns are iterated on the first micro-batch only: of two, measured 0.991 of this and 0.976 to 0.998 of the next.
    least = (0.96, 0.95 if "gradient_accumulation_steps" in train else 0.99)
    assert len(found) == 2
    for reinit in found:
        ratios = compare_with_exact(reinit)
        assert len(ratios) == 35 and reinit["kept"] == 0
        now, following = (sum(values) / len(values) for values in zip(*ratios.values(), strict=True))
        assert 1 + 1e-5 > now >= least[0] and following >= least[1], (now, following)
