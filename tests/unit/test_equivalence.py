"""With quantization off, full rank, and no re-initialization after the first, LoQT is plain training of a dense model.

The reference is written here from nothing but torch and transformers: a Llama whose linears compute with
W = W₀ + s · (B Pᵀ or P B), B a leaf, trained by torch.optim.AdamW under a learning rate computed by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import llama_config, lm_loss, make_config, relative, token_batch, train_step
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM

from loqt_ds.engines.single import SingleEngine
from loqt_ds.method.conversion import build_model, initializer

NUM_STEPS = 24
MAX_STEPS, WARMUP, MIN_RATIO = 30, 5, 0.1
# eps above the rounding errors of a gradient: Adam would blow those of its weakest directions up to full steps.
LR, LR_FULL_RANK, BETAS, EPS, DECAY, ALPHA = 0.02, 0.005, (0.9, 0.99), 1e-5, 0.05, 0.7


def learning_rate(step: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return MIN_RATIO + (1 - MIN_RATIO) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (MAX_STEPS - WARMUP)))


class LowRankUpdate(nn.Module):
    """W₀ ↦ W₀ + s · (P, B product)."""

    def __init__(self, basis: Tensor, *, right: bool, shape: torch.Size) -> None:
        super().__init__()
        self.right = right
        self.register_buffer("basis", basis)
        self.factor = nn.Parameter(basis.new_zeros((shape[0] if right else shape[1]), basis.shape[1]))  # (l, r)

    def forward(self, weight: Tensor) -> Tensor:
        product = self.factor @ self.basis.T if self.right else self.basis @ self.factor.T
        return weight + ALPHA * product


class DenseReference:
    """Plain training. Step 0 moves what is trained in full; then P is given, and B begins at zero."""

    def __init__(self, model: LlamaForCausalLM, names: list[str]) -> None:
        self.model, self.names = model, names
        frozen = {f"{name}.weight" for name in names}
        decayed, other = [], []
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)
            else:
                (decayed if parameter.dim() >= 2 else other).append(parameter)
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": other, "weight_decay": 0.0}]
        self.full_rank = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS)
        self.factors: torch.optim.AdamW | None = None

    def set_bases(self, bases: dict[str, tuple[Tensor, bool]]) -> None:
        leaves = []
        for name in self.names:
            linear = self.model.get_submodule(name)
            update = LowRankUpdate(bases[name][0], right=bases[name][1], shape=linear.weight.shape)
            parametrize.register_parametrization(linear, "weight", update)
            leaves.append(update.factor)
        self.factors = torch.optim.AdamW(leaves, lr=1.0, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def step(self, step: int, ids: Tensor) -> float:
        loss = lm_loss(self.model, ids)
        loss.backward()
        for optimizer, rate in ((self.full_rank, LR_FULL_RANK), (self.factors, LR)):
            if optimizer is None:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()


@pytest.mark.parametrize("subspace", ["exact", "gram", "sketch"])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_are_those_of_plain_training(subspace, layerwise, tied):
    # The smaller side of every matrix is 32, so that one rank is full for all.
    shape = llama_config(
        hidden_size=32, intermediate_size=75, num_key_value_heads=4, num_hidden_layers=2, tie_word_embeddings=tied
    )
    config = make_config(
        loqt={
            "rank": 32,
            "alpha": ALPHA,
            "schedule": "never",
            "quantize_w": "none",
            "quantize_p": "none",
            "subspace": subspace,
        },
        optim={
            "lr": LR,
            "lr_full_rank": LR_FULL_RANK,
            "betas": list(BETAS),
            "eps": EPS,
            "weight_decay": DECAY,
            "warmup_steps": WARMUP,
            "min_lr_ratio": MIN_RATIO,
            "layerwise": layerwise,
        },
        train={"max_steps": MAX_STEPS},
    )
    network, source = build_model(shape, config.loqt, initializer(3))
    engine = SingleEngine(network, config, original=source.weight)
    layers = engine.controller.layers

    dense = LlamaForCausalLM(shape)
    state = {name: p.detach().clone() for name, p in network.named_parameters() if not name.endswith(".B")}
    state |= {f"{name}.weight": source.weight(name) for name in layers}
    missing, unexpected = dense.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    dense.tie_weights()
    reference = DenseReference(dense.train(), list(layers))

    losses, expected = [], []
    for step in range(NUM_STEPS):
        ids = token_batch(step % 3, rows=6)
        losses.append(train_step(engine, ids)[0])
        expected.append(reference.step(step, ids))
        if step == 0:
            bases = {}
            for name, layer in layers.items():
                p = layer.basis_hat()
                assert relative(p.T @ p, torch.eye(32)) < 1e-5  # full rank: a rotation of the smaller side
                assert torch.equal(layer.weight_q(), source.weight(name)) and not layer.B.any()
                bases[name] = (p.clone(), layer.side == "right")
            reference.set_bases(bases)

    assert losses == pytest.approx(expected, rel=2e-6)  # measured: 2e-7
    assert expected[-1] < expected[0] - 0.5  # something was learnt
    for name, layer in layers.items():
        assert relative(layer.effective_weight(), dense.get_submodule(name).weight) < 1e-4
        assert relative(layer.effective_weight(), source.weight(name)) > 0.05
    for name, parameter in network.named_parameters():
        if not name.endswith(".B"):
            assert relative(parameter, dense.get_parameter(name)) < 1e-4, name


def test_the_reference_can_tell():
    """A β₁ that is one per cent off is seen by the tolerance of the test above."""
    shape = llama_config(num_key_value_heads=4)
    losses = []
    for factor in (1.0, 1.01):
        torch.manual_seed(0)
        reference = DenseReference(LlamaForCausalLM(shape).train(), ["model.layers.0.mlp.up_proj"])
        reference.set_bases({"model.layers.0.mlp.up_proj": (torch.eye(32), True)})
        for group in reference.full_rank.param_groups:
            group["betas"] = (BETAS[0] / factor, BETAS[1])
        losses.append([reference.step(step, token_batch(step % 3)) for step in range(6)])
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)
