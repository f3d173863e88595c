"""The loss of a linear head in blocks: against float64, beside what stock modules give, and never more than a block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import LiveBytes, relative
from torch import Tensor, nn

from loqt_ds.core import cross_entropy
from loqt_ds.core.cross_entropy import linear_cross_entropy, workspace_bytes

Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def stock(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """What a model and torch compute: logits in the dtype of the weights, the loss in float32 or better."""
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)


def blocked(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, bias=bias)


def draw(num_tokens: int, vocab: int, width: int, *, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Every fifth token and the last is ignored. Logits spread over about 3 nats."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    targets[::5] = targets[-1:] = -100
    return {
        "hidden": torch.randn(num_tokens, width, generator=generator).to(dtype),
        "weight": (3 * torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype),
        "bias": torch.randn(vocab, generator=generator).to(dtype),
        "targets": targets,
    }


def gradients(loss: Loss, drawn: dict[str, Tensor], dtype: torch.dtype, *, bias: bool = True) -> dict[str, Tensor]:
    """The loss and its gradients, of a mean as in training."""
    leaves = {name: drawn[name].clone().to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")}
    value = loss(leaves["hidden"], leaves["weight"], drawn["targets"], leaves["bias"] if bias else None)
    (value / 7).backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": value.detach(), **found}


# Tokens, vocabulary, logits in a block, tokens in a block: one block; several of columns, the last one narrower; of
# rows too; a vocabulary smaller than the least block; a single token.
SHAPES = [(37, 61, 2**23, 8192), (45, 331, 2**12, 8192), (101, 331, 2**12, 40), (9, 50, 64, 4), (1, 333, 64, 8192)]


@pytest.fixture(params=["kept", "made again"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing: with the gradient of the logits kept, and with logits that are made again."""
    if request.param == "made again":
        monkeypatch.setattr(cross_entropy, "KEPT_ELEMENTS", 0)
    return str(request.param)


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the size of blocks."""

    def set_sizes(elements: int, rows: int) -> None:
        monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(cross_entropy, "MAX_ROWS", rows)

    return set_sizes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, bias: bool, sized: Callable[[int, int], None]
) -> None:
    """To rounding, and hardly worse than stock modules' (measured: 1.2 times theirs, with 17 blocks in bf16)."""
    num_tokens, vocab, *sizes = shape
    sized(*sizes)
    drawn = draw(num_tokens, vocab, 24, dtype=dtype)
    exact = gradients(stock, drawn, torch.float64, bias=bias)
    actual = gradients(blocked, drawn, dtype, bias=bias)
    usual = gradients(stock, drawn, dtype, bias=bias)
    assert actual.keys() == exact.keys()
    assert actual["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    floor = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    for name in exact:
        assert actual[name].dtype == (dtype if name != "loss" else actual["loss"].dtype)
        assert relative(actual[name], exact[name]) <= 2 * relative(usual[name], exact[name]) + floor, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_can_be_transformed_one_by_one(dtype: torch.dtype, sized: Callable[[int, int], None]) -> None:
    sized(2**12, 40)

    def usual(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        logits = capped(nn.functional.linear(hidden, weight, bias))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, transform=capped)

    drawn = draw(101, 331, 24, dtype=dtype)
    exact, actual = gradients(usual, drawn, torch.float64), gradients(ours, drawn, dtype)
    stocks = gradients(usual, drawn, dtype)
    floor = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    for name in exact:
        assert relative(actual[name], exact[name]) <= 2 * relative(stocks[name], exact[name]) + floor, name


def test_the_derivative_is_that_of_finite_differences(sized: Callable[[int, int], None]) -> None:
    sized(64, 3)
    drawn = draw(5, 150, 3, dtype=torch.float64)
    leaves = [drawn[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda h, w, b: blocked(h, w, drawn["targets"], b), leaves, fast_mode=True)


@pytest.mark.parametrize("num_tokens", [0, 11])
def test_without_a_predicted_token_loss_and_gradients_are_zero(num_tokens: int) -> None:
    drawn = draw(num_tokens, 61, 24, dtype=torch.float32)
    drawn["targets"].fill_(-100)
    for value in gradients(blocked, drawn, torch.float32).values():
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias")])
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_the_same(
    frozen: tuple[str, ...], sized: Callable[[int, int], None]
) -> None:
    sized(2**12, 40)
    drawn = draw(101, 331, 24, dtype=torch.float32)
    whole = gradients(blocked, drawn, torch.float32)
    leaves = {name: drawn[name].clone().requires_grad_(name not in frozen) for name in ("hidden", "weight", "bias")}
    (blocked(leaves["hidden"], leaves["weight"], drawn["targets"], leaves["bias"]) / 7).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is None if name in frozen else torch.equal(leaf.grad, whole[name])


@pytest.mark.parametrize("ignored", [-100, 3, 330])
def test_the_ignored_target_may_be_any_number(ignored: int, sized: Callable[[int, int], None]) -> None:
    sized(2**12, 40)
    drawn = draw(101, 331, 24, dtype=torch.float64)
    targets = torch.where(drawn["targets"] == -100, ignored, drawn["targets"])
    hidden, weight = drawn["hidden"].requires_grad_(), drawn["weight"]
    (actual,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, ignore_index=ignored), hidden)
    logits = hidden @ weight.T
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=ignored)
    assert relative(actual, torch.autograd.grad(expected, hidden)[0]) < 1e-13


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_overflow_nothing(size: float, sized: Callable[[int, int], None]) -> None:
    """The largest logit is in the first block of columns, in the last, or everywhere."""
    sized(64, 8192)
    drawn = draw(12, 200, 8, dtype=torch.float32)
    for columns in (slice(0, 3), slice(190, 200), slice(None)):
        bias = torch.zeros(200)
        bias[columns] = size
        actual = blocked(drawn["hidden"], drawn["weight"], drawn["targets"], bias)
        expected = stock(drawn["hidden"].double(), drawn["weight"].double(), drawn["targets"], bias.double())
        assert relative(actual, expected) < 1e-4  # 1e4 in float32 leaves 1e-3 nats of each


def test_entries_may_be_forbidden(sized: Callable[[int, int], None]) -> None:
    """By a bias of -inf: the whole first block of columns, and some of another."""
    sized(64, 8192)
    drawn = draw(12, 200, 8, dtype=torch.float32)
    drawn["bias"][:70] = drawn["bias"][131] = -float("inf")
    drawn["targets"] = drawn["targets"].clamp_min(132) * (drawn["targets"] >= 0) - 100 * (drawn["targets"] < 0)
    exact, actual = gradients(stock, drawn, torch.float64), gradients(blocked, drawn, torch.float32)
    assert all(relative(actual[name], exact[name]) < 1e-5 for name in exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    drawn = draw(11, 61, 24, dtype=torch.float32)
    drawn["hidden"][3, 5] = value
    found = gradients(blocked, drawn, torch.float32)
    assert all(not torch.isfinite(found[name]).all() for name in ("loss", "hidden", "weight"))


@pytest.mark.parametrize("target", [61, -1])
def test_a_target_out_of_range_is_refused_and_on_a_gpu_makes_the_loss_no_number(target: int) -> None:
    drawn = draw(11, 61, 24, dtype=torch.float32)
    drawn["targets"][1] = target
    with pytest.raises(ValueError, match=f"target {target} .* vocabulary of 61"):
        blocked(drawn["hidden"], drawn["weight"], drawn["targets"], None)
    # As on a GPU, where it is not looked for.
    arguments = (drawn["hidden"], drawn["weight"], None, drawn["targets"], -100)
    assert cross_entropy._LinearCrossEntropy.apply(*arguments, None).isnan()


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4, dtype=torch.long)
    for arguments in ((hidden[None], weight, targets), (hidden, weight[:, :7], targets), (hidden, weight, targets[:3])):
        with pytest.raises(ValueError, match="must be"):
            linear_cross_entropy(*arguments)


def test_under_autocast_the_product_is_in_its_dtype_and_gradients_in_that_of_the_parameters() -> None:
    drawn = draw(45, 331, 24, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(blocked, drawn, torch.float32)
    expected = gradients(blocked, drawn, torch.bfloat16)
    assert torch.equal(actual["loss"], expected["loss"])
    for name in ("hidden", "weight", "bias"):
        assert actual[name].dtype == torch.float32 and torch.equal(actual[name], expected[name].float())


def test_it_can_be_differentiated_once() -> None:
    drawn = draw(11, 61, 24, dtype=torch.float64)
    hidden = drawn["hidden"].requires_grad_()
    loss = blocked(hidden, drawn["weight"], drawn["targets"], None) * torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- memory


def capped(logits: Tensor) -> Tensor:
    """As Gemma 2 does it."""
    return torch.tanh(logits / 1.5) * 1.5


@pytest.mark.parametrize("transform", [None, capped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 5003, 2**16, 8192), (300, 5003, 2**16, 64), (300, 500, 2**23, 8192)])
def test_what_is_alive_at_the_peak_is_what_the_planner_is_told(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    transform: Callable[[Tensor], Tensor] | None,
    sized: Callable[[int, int], None],
    way: str,
) -> None:
    """A block, or all in the dtype of H where their gradient is kept."""
    num_tokens, vocab, *sizes = shape
    sized(*sizes)
    drawn = draw(num_tokens, vocab, 64, dtype=dtype)
    hidden, weight = drawn["hidden"].requires_grad_(), drawn["weight"].requires_grad_()
    with LiveBytes(hidden, weight, drawn["targets"]) as live:
        loss = linear_cross_entropy(hidden, weight, drawn["targets"], transform=transform)
        in_forward = live.peak
        torch.autograd.grad(loss, (hidden, weight))
    workspace = workspace_bytes(num_tokens, 64, vocab, dtype, transformed=transform is not None)
    returned = dtype.itemsize * 64 * (num_tokens + vocab)
    per_token = 60 * num_tokens  # log-sum-exp, masks, columns of targets, running maxima
    assert 0.97 * (workspace + returned) <= live.peak <= workspace + returned + per_token
    if way == "kept" and transform is None:
        rows = min(num_tokens, max(1, sizes[0] // vocab))
        in_float32 = 4 * rows * vocab if dtype != torch.float32 else 0
        assert live.largest == max(dtype.itemsize * num_tokens * vocab, in_float32)
        return
    assert in_forward <= workspace + per_token
    assert (live.largest < 4 * num_tokens * vocab) == (sizes[0] < num_tokens * vocab), "all logits in one block"


def test_between_forward_and_backward_there_is_one_number_a_token_more_or_the_gradient(way: str) -> None:
    drawn = draw(300, 5003, 64, dtype=torch.bfloat16)
    hidden, weight = drawn["hidden"].requires_grad_(), drawn["weight"].requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        blocked(hidden, weight, drawn["targets"], None)
    given = {tensor.data_ptr() for tensor in (hidden, weight, drawn["targets"])}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in given]
    expected = ((300, 5003), torch.bfloat16) if way == "kept" else ((300,), torch.float32)
    assert [(tensor.shape, tensor.dtype) for tensor in extra] == [expected]
