"""The layer against a dense `nn.Linear` in float64 whose weight is W_eff, with autograd doing the differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import effective_weight, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from loqt_ds.core.quantization import BUFFERS, KINDS, QuantSpec, quantize
from loqt_ds.core.subspace import resolve_side
from loqt_ds.method.linear import LoQTLinear

# (out, in): square, wide, tall, sides that do not divide by 64, by 16, or by 2.
SHAPES = [(64, 64), (172, 64), (64, 172), (341, 128), (37, 91), (91, 37), (13, 5)]


@pytest.fixture(params=["factored", "merged", "merged, W kept"], autouse=True)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How every layer of every test here computes."""
    product, _, kept = request.param.partition(", ")
    stock = LoQTLinear.__init__

    def init(self: LoQTLinear, *args: Any, **options: Any) -> None:
        stock(self, *args, **options, product=product)
        self.keeps_dequantized = bool(kept)

    monkeypatch.setattr(LoQTLinear, "__init__", init)
    return str(request.param)


def make_layer(
    shape: tuple[int, int],
    *,
    rank: int = 4,
    side: str = "auto",
    kind_w: str = "nf4",
    kind_p: str = "nf4",
    double: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoQTLinear:
    """A layer with everything random: W, P, B and the bias."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    layer = LoQTLinear(
        in_features,
        out_features,
        rank=rank,
        side=resolve_side(side, out_features, in_features),
        scale=0.7,
        spec_w=QuantSpec(kind_w, double_quant=double and kind_w != "none", dense_dtype=dtype),
        spec_p=QuantSpec(kind_p, double_quant=double and kind_p != "none", dense_dtype=dtype),
        bias=bias,
        dtype=dtype,
    )
    layer.set_w(quantize(torch.randn(shape, generator=generator) / in_features**0.5, layer.spec_w))
    basis, _ = torch.linalg.qr(torch.randn(layer.basis_shape, generator=generator))
    layer.set_p(quantize(basis, layer.spec_p))
    with torch.no_grad():
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.2)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(out_features, generator=generator))
    return layer


class DenseGradients:
    """Output and gradients of y = x W_effᵀ + b in float64; dB from dW_eff by the chain rule, through autograd."""

    def __init__(self, layer: LoQTLinear, x: Tensor, dy: Tensor) -> None:
        p = layer.basis_hat().double()
        self.b = layer.B.detach().double().requires_grad_()
        product = self.b @ p.T if layer.side == "right" else p @ self.b
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).double()
        weight = layer.weight_q().double() + layer.scale * product
        weight.retain_grad()
        x = x.detach().double().requires_grad_()
        bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
        del dense.weight
        dense.weight = weight  # a non-leaf, so that autograd also gives dB
        if bias is not None:
            del dense.bias
            dense.bias = bias
        self.y = dense(x)
        self.y.backward(dy.double())
        self.dx, self.dw, self.db = x.grad, weight.grad, self.b.grad
        self.dbias = None if bias is None else bias.grad


class Sum:
    """A tap that sums dYᵀX in float64 and counts its calls."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.num_calls = 0

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        assert dy.dim() == x.dim() == 2
        self.num_calls += 1
        self.total = self.total + dy.double().T @ x.double()


def random_input(layer: LoQTLinear, *leading: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, layer.in_features, generator=generator).to(dtype).requires_grad_()


def random_cotangent(y: Tensor, seed: int = 2) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)


def assert_like_dense(layer: LoQTLinear, x: Tensor, tolerance: float) -> None:
    tap = layer.tap = Sum()
    layer.B.grad = None
    y = layer(x)
    dy = random_cotangent(y)
    y.backward(dy)
    layer.tap = None
    reference = DenseGradients(layer, x, dy)
    assert y.shape == reference.y.shape
    assert relative(y, reference.y) < tolerance
    assert relative(x.grad, reference.dx) < tolerance
    assert relative(layer.B.grad, reference.db) < tolerance
    assert tap.num_calls == 1
    assert relative(tap.total, reference.dw) < tolerance
    if layer.bias is not None:
        assert relative(layer.bias.grad, reference.dbias) < tolerance


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["auto", "left", "right"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_outputs_and_gradients_are_those_of_the_dense_layer(shape, side, bias):
    layer = make_layer(shape, side=side, bias=bias)
    assert_like_dense(layer, random_input(layer, 9), 2e-6)
    for parameter in layer.parameters():
        parameter.grad = None
    assert_like_dense(layer, random_input(layer, 3, 7), 2e-6)


@pytest.mark.parametrize("kind_w", KINDS)
@pytest.mark.parametrize("kind_p", KINDS)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_every_quantizer(kind_w, kind_p, double):
    for shape in ((53, 37), (37, 53)):
        layer = make_layer(shape, kind_w=kind_w, kind_p=kind_p, double=double, rank=5)
        assert_like_dense(layer, random_input(layer, 11), 2e-6)


def test_ranks_up_to_the_smaller_side():
    for shape in ((29, 17), (17, 29)):
        for rank in (1, 17):
            layer = make_layer(shape, rank=rank, kind_p="none")
            assert_like_dense(layer, random_input(layer, 6), 2e-6)
        with pytest.raises(ValueError, match=r"loqt\.rank=18.*17"):
            make_layer(shape, rank=18)


@pytest.mark.parametrize("shape", [(172, 64), (64, 172)], ids=str)
def test_bf16_is_as_good_as_bf16_gets(shape):
    layer = make_layer(shape, dtype=torch.bfloat16)
    assert_like_dense(layer, random_input(layer, 2, 17, dtype=torch.bfloat16), 2e-2)


@pytest.mark.parametrize("shape", [(172, 64), (64, 172)], ids=str)
def test_effective_weight_is_the_written_out_product(shape):
    layer = make_layer(shape)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert relative(layer.effective_weight(), effective_weight(layer)) < 1e-6
    dense = make_layer(shape, kind_w="none", kind_p="none")  # here the dequantized weight may be the buffer itself
    dense_before = dense.weight_q().clone()
    dense.effective_weight()
    assert torch.equal(dense.weight_q(), dense_before)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_taps_of_several_backward_calls_add_up():
    layer = make_layer((37, 91))
    tap = layer.tap = Sum()
    expected = torch.zeros(37, 91, dtype=torch.float64)
    for seed in range(3):
        x = random_input(layer, 4 + seed, seed=seed)
        y = layer(x)
        dy = random_cotangent(y, seed=seed)
        y.backward(dy)
        expected += DenseGradients(layer, x, dy).dw
    assert tap.num_calls == 3
    assert relative(tap.total, expected) < 2e-6


def test_a_layer_used_twice_in_one_forward():
    layer = make_layer((48, 48))
    tap = layer.tap = Sum()
    x = random_input(layer, 5)
    y = layer(torch.tanh(layer(x)))
    dy = random_cotangent(y)
    y.backward(dy)

    weight = effective_weight(layer).requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = nn.functional.linear(torch.tanh(nn.functional.linear(wide, weight, bias)), weight, bias)
    expected.backward(dy.double())
    assert relative(y, expected) < 2e-6
    assert relative(x.grad, wide.grad) < 5e-6
    assert tap.num_calls == 2 and relative(tap.total, weight.grad) < 5e-6
    assert relative(layer.bias.grad, bias.grad) < 5e-6
    assert relative(layer.B.grad, layer.scale * weight.grad @ layer.basis_hat().double()) < 5e-6


def test_no_rows():
    layer = make_layer((20, 12))
    x = random_input(layer, 0)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 20) and x.grad.shape == (0, 12) and not layer.B.grad.any()


# ---------------------------------------------------------------- under what surrounds it


@pytest.mark.parametrize("shape", [(172, 64), (64, 172)], ids=str)
def test_autocast_computes_in_bf16_and_returns_gradients_in_float32(shape):
    layer = make_layer(shape)
    x = random_input(layer, 6, 5)
    tap = layer.tap = Sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    dy = random_cotangent(y)
    y.backward(dy)
    reference = DenseGradients(layer, x, dy)
    assert relative(y, reference.y) < 2e-2 and relative(tap.total, reference.dw) < 2e-2
    for actual, expected in ((x.grad, reference.dx), (layer.B.grad, reference.db), (layer.bias.grad, reference.dbias)):
        assert actual.dtype == torch.float32
        assert relative(actual, expected) < 2e-2


class Block(nn.Module):
    """Two layers of opposite sides with something non-linear between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = make_layer((41, 16), seed=3), make_layer((16, 41), seed=4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def block_gradients(block: Block, x: Tensor, run) -> dict[str, Tensor]:
    block.zero_grad()
    taps = {"up": Sum(), "down": Sum()}
    block.up.tap, block.down.tap = taps["up"], taps["down"]
    leaf = x.detach().clone().requires_grad_()
    y = run(leaf)
    y.square().sum().backward()
    assert {name: tap.num_calls for name, tap in taps.items()} == {"up": 1, "down": 1}
    result = {name: p.grad.clone() for name, p in block.named_parameters()} | {"x": leaf.grad, "y": y.detach()}
    return result | {f"tap.{name}": tap.total for name, tap in taps.items()}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_activation_checkpointing_changes_nothing_and_taps_once(reentrant, autocast):
    # Mistake 7 of ALGORITHM.md.
    block = Block()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))

    def plain(value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return block(value).float()

    def checkpointed(value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return checkpoint(block, value, use_reentrant=reentrant).float()

    expected, actual = block_gradients(block, x, plain), block_gradients(block, x, checkpointed)
    assert set(actual) == set(expected) and len(actual) == 8
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_torch_compile_gives_the_same_result():
    block = Block()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))
    compiled = torch.compile(block, backend="aot_eager")
    expected, actual = block_gradients(block, x, block), block_gradients(block, x, compiled)
    for name in expected:
        assert relative(actual[name], expected[name]) < 1e-6, name


def test_gradients_do_not_need_a_differentiable_input():
    # Mistake 4 of ALGORITHM.md: with frozen embeddings the input of the first layer needs no gradient.
    for shape in ((37, 20), (20, 37)):
        layer = make_layer(shape)
        tap = layer.tap = Sum()
        x = random_input(layer, 8).detach()
        y = layer(x)
        dy = random_cotangent(y)
        y.backward(dy)
        reference = DenseGradients(layer, x, dy)
        assert x.grad is None
        assert relative(layer.B.grad, reference.db) < 2e-6
        assert relative(tap.total, reference.dw) < 2e-6


def test_a_forward_without_gradients_in_the_middle_of_a_tapped_step_changes_nothing():
    # Mistake 1 of ALGORITHM.md.
    def gradients(disturb: bool) -> tuple[Tensor, Tensor, Tensor]:
        layer = make_layer((37, 20))
        tap = layer.tap = Sum()
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        x = random_input(layer, 8)
        y = layer(x)
        if disturb:
            layer.eval()
            with torch.no_grad():
                layer(random_input(layer, 30, seed=8))
            with torch.inference_mode():
                layer(random_input(layer, 30, seed=9))
            layer.train()
            assert tap.num_calls == 0
            assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
        y.backward(random_cotangent(y))
        return y, layer.B.grad, tap.total

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(actual, expected)


# ---------------------------------------------------------------- what is kept for the backward


def saved_shapes(layer: LoQTLinear, x: Tensor) -> list[tuple[torch.Size, int]]:
    saved: list[tuple[torch.Size, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.shape, tensor.data_ptr()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return saved


@pytest.mark.parametrize("shape", [(91, 37), (37, 91)], ids=["right", "left"])
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_only_what_the_factor_needs_is_saved(shape, kind):
    layer = make_layer(shape, kind_w=kind)
    x = random_input(layer, 5)
    out_features, in_features = shape
    inputs = {(5, in_features)}
    small = {(5, layer.rank), tuple(layer.B.shape)}

    ordinary = {tuple(shape) for shape, _ in saved_shapes(layer, x)}
    assert ordinary == ({(5, layer.rank)} if layer.side == "right" else inputs) | {tuple(layer.B.shape)}
    layer.tap = Sum()
    tapped = {tuple(shape) for shape, _ in saved_shapes(layer, x)}
    assert tapped - small == inputs
    for shapes in (ordinary, tapped):
        assert not any(torch.Size(s).numel() >= out_features * in_features for s in shapes)


@pytest.mark.parametrize("shape", [(91, 37), (37, 91)], ids=["right", "left"])
def test_few_dequantized_matrices_are_alive_at_a_time(shape, product, monkeypatch):
    """One where the product is factored; W and P where it is merged, as many as the planner counts."""
    in_use, most, taken = 0, 0, []
    original = BUFFERS.take

    @contextmanager
    def take(num_bytes: int, device: torch.device) -> Iterator[Tensor]:
        nonlocal in_use, most
        in_use += 1
        most = max(most, in_use)
        taken.append(num_bytes)
        with original(num_bytes, device) as buffer:
            yield buffer
            buffer.fill_(255)  # NaN, for whoever keeps a view of it
        in_use -= 1

    layer = make_layer(shape)
    layer.tap = Sum()
    x = random_input(layer, 5)
    dy = random_cotangent(layer(x))
    monkeypatch.setattr(BUFFERS, "take", take)
    y = layer(x)
    y.backward(dy)
    w, p = 4 * shape[0] * shape[1], 4 * layer.basis_shape[0] * layer.rank
    if product == "factored":
        assert taken == ([p, w, w, p] if layer.side == "right" else [w, p, p, w])  # forward; backward: each once
        assert most == 1
    else:
        assert taken == ([w, p, p, w, p] if layer.side == "right" else [w, p, p, w, p])
        assert most == 2
    reference = DenseGradients(layer, x, dy)
    assert relative(y, reference.y) < 2e-6 and relative(x.grad, reference.dx) < 2e-6
    assert relative(layer.B.grad, reference.db) < 2e-6


def operations(layer: LoQTLinear, num_tokens: int, *, training: bool) -> int:
    """Counted by torch, to which what happens in place is nothing if it is not told."""
    layer.B.grad = None
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, *_, **__: 2 * y[0] * y[1] * a[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.set_grad_enabled(training):
        y = layer(random_input(layer, num_tokens))
        if training:
            y.backward(y.detach())
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(64, 64), (91, 37), (37, 91), (200, 24)])
@pytest.mark.parametrize("training", [True, False])
def test_auto_takes_the_product_with_fewer_operations(shape, training):
    chosen = set()
    for num_tokens in (1, 3, 8, 13, 19, 21, 24, 27, 30, 36, 44, 60, 200):
        layer = make_layer(shape)
        counts = {}
        for layer.product in ("factored", "merged"):
            counts[layer.product] = operations(layer, num_tokens, training=training)
        layer.product = "auto"
        product = layer.product_of(num_tokens, torch.float32, training=training)
        chosen.add(product)
        assert counts[product] == min(counts.values()), (num_tokens, counts)
        assert layer.product_of(num_tokens, torch.bfloat16, training=training) == "factored"
    assert chosen == {"factored", "merged"}


def test_a_w_that_is_kept_dequantized_is_made_again_only_when_its_bytes_change():
    layer = make_layer((91, 37))
    layer.keeps_dequantized = True
    x = random_input(layer, 5)
    layer(x)
    with layer.weight_q_buffer(torch.float32) as first, layer.weight_q_buffer(torch.float32) as again:
        assert first is again
    layer.set_w(quantize(torch.randn(layer.weight_shape), layer.spec_w))
    assert_like_dense(layer, x, 2e-6)
    with layer.weight_q_buffer(torch.float32) as renewed:
        assert renewed.data_ptr() == first.data_ptr()
    layer.to(torch.bfloat16)
    with layer.weight_q_buffer(torch.bfloat16) as other:
        assert other.dtype == torch.bfloat16 and torch.equal(other, layer.weight_q(torch.bfloat16))
    layer.stop_keeping_dequantized()
    assert layer._kept is None


def test_rewriting_w_or_p_between_forward_and_backward_is_an_error():
    for rewrite in (
        lambda layer: layer.set_w(quantize(torch.randn(layer.weight_shape), layer.spec_w)),
        lambda layer: layer.set_p(quantize(torch.randn(layer.basis_shape), layer.spec_p)),
    ):
        layer = make_layer((37, 20))
        y = layer(random_input(layer, 3))
        rewrite(layer)
        with pytest.raises(RuntimeError, match="rewritten"):
            y.sum().backward()


def test_a_second_derivative_is_refused():
    layer = make_layer((37, 20))
    x = random_input(layer, 3)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---------------------------------------------------------------- state


def test_w_and_p_are_bytes_that_no_cast_touches():
    layer = make_layer((37, 20), kind_p="none", double=True)
    assert {name for name, _ in layer.named_parameters()} == {"B", "bias"}
    assert all(buffer.dtype == torch.uint8 and buffer.dim() == 1 for buffer in layer.buffers())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    weight, basis = layer.weight_q(), layer.basis_hat()
    layer.to(torch.bfloat16)
    assert layer.B.dtype == torch.bfloat16
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    assert torch.equal(layer.weight_q(), weight) and torch.equal(layer.basis_hat(), basis)


def test_state_dict_round_trip():
    source, target = make_layer((37, 20), seed=1), make_layer((37, 20), seed=2)
    target.load_state_dict(source.state_dict())
    x = random_input(source, 4)
    assert torch.equal(source(x), target(x))
    assert set(source.state_dict()) == {"w_codes", "w_absmax", "p_codes", "p_absmax", "B", "bias"}
