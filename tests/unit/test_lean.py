"""Lean activations against stock modules: what is kept is counted, gradients are compared with autograd's through the
same model without them."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import lm_loss, make_config, relative, token_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from loqt_ds.config import Config, ConfigError, ModelConfig, TrainConfig
from loqt_ds.core.quantization import QuantSpec, quantize
from loqt_ds.method import lean
from loqt_ds.method.conversion import build_model, initializer, loqt_layers
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.method.recompute import recipe_of, recomputed
from loqt_ds.preflight import check_options

SHAPE = dict(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
RANK = 8


class Sum:
    """A tap that sums the gradient of W in float32."""

    def __init__(self) -> None:
        self.total: Any = 0

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        self.total = self.total + dy.float().t() @ x.float()


def make_model(
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    tapped: bool = False,
    attention: str = "sdpa",
    **changes: Any,
) -> Any:
    """A converted model with everything random, the same each time."""
    description = AutoConfig.for_model(kind, **(SHAPE | changes))
    model, _ = build_model(description, make_config().loqt, initializer(0), dtype=dtype, attention=attention)
    fill(model, tapped=tapped)
    return model.train()


def fill(model: nn.Module, *, tapped: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in loqt_layers(model).values():
        basis = torch.linalg.qr(torch.randn(layer.basis_shape, generator=generator))[0]
        layer.set_p(quantize(basis, layer.spec_p))
        layer.B.data.normal_(generator=generator)
        layer.tap = Sum() if tapped else None
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of parameters and, where a layer is tapped, of W."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    taps = {name: layer.tap.total for name, layer in loqt_layers(model).items() if isinstance(layer.tap, Sum)}
    return found | {f"{name} (W)": total for name, total in taps.items()}


def kept_bytes(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of the memory that is kept for the backward, each piece once, besides that of parameters and buffers."""
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(size for pointer, size in pieces.items() if pointer not in resident), output


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("tapped", [False, True], ids=["ordinary", "tapped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_per_token_and_layer_are_the_formula(dtype, tapped):
    h, i, heads, e = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_attention_heads"], dtype.itemsize
    ids = token_batch(0, rows=3, length=16)
    kept = {}
    for num_layers in (1, 3):
        model = make_model(dtype=dtype, tapped=tapped, num_hidden_layers=num_layers)
        report = lean.install(model)
        assert (len(report.norms), len(report.mlps), report.left) == (2 * num_layers + 1, num_layers, [])
        kept[num_layers], _ = kept_bytes(model, lambda m=model: m.model(input_ids=ids, use_cache=False)[0])
    per_token = (kept[3] - kept[1]) / 2 / ids.numel()
    assert per_token == e * (6 * h + 2 * i + 6 * RANK) + 4 * heads


def test_stock_modules_keep_more():
    # So that the count above can fail: 20 h + 8 i + 12 r (the float32 copy of a mean of squares aside).
    h, i, heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_attention_heads"]
    ids = token_batch(0, rows=3, length=16)
    kept = [
        kept_bytes(model, lambda m=model: m.model(input_ids=ids, use_cache=False)[0])[0]
        for model in (make_model(dtype=torch.bfloat16, num_hidden_layers=n) for n in (1, 2))
    ]
    per_token = (kept[1] - kept[0]) / ids.numel()
    assert 0 <= per_token - (20 * h + 8 * i + 12 * RANK + 4 * heads) <= 8


def test_other_mlps_keep_the_input_of_their_activation():
    # GPT-NeoX has LayerNorms, biases, an MLP of two matrices, and both branches start from one residual stream.
    h, i, heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_attention_heads"]
    ids = token_batch(0, rows=3, length=16)
    kept = []
    for num_layers in (1, 3):
        model = make_model("gpt_neox", dtype=torch.bfloat16, tapped=True, num_hidden_layers=num_layers)
        assert lean.install(model).activations == [f"gpt_neox.layers.{n}.mlp.act" for n in range(num_layers)]
        kept.append(kept_bytes(model, lambda m=model: m.gpt_neox(input_ids=ids, use_cache=False)[0])[0])
    # The one input of both norms; q, k, the output of qkv for v, attention's output; the input of the activation;
    # x P of qkv, dense and h_to_4h; the masks, of one byte, of two dropouts with probability 0.
    per_token = (kept[1] - kept[0]) / 2 / ids.numel()
    assert per_token == 2 * (h + 6 * h + i + 3 * RANK) + 4 * heads + 2 * h


# ---------------------------------------------------------------- gradients

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "attention": "eager"},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "phi": {},
    "gpt_neox": {},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_what_it_computes_without(kind, dtype):
    ids = token_batch(3, rows=2, length=9)
    results = []
    for installs in (False, True):
        model = make_model(kind, dtype=dtype, tapped=True, **KINDS[kind])
        if installs:
            report = lean.install(model)
            gated = kind not in ("phi", "gpt_neox")
            assert report.norms and report.left == []
            assert len(report.mlps if gated else report.activations) == 2
            assert not (report.activations if gated else report.mlps)
        loss = lm_loss(model, ids)
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (expected_loss, expected), (loss, actual) = results
    assert torch.equal(loss, expected_loss)
    assert set(actual) == set(expected) and any("norm" in name for name in actual) == (kind != "olmo")
    for name in expected:
        if dtype == torch.bfloat16:
            assert torch.equal(actual[name], expected[name]), name
        else:
            # In float32 the gradients that meet in the residual stream are added in another order.
            assert relative(actual[name], expected[name]) < 3e-6, name


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "make",
    [lambda: LlamaRMSNorm(37), lambda: GemmaRMSNorm(37), lambda: nn.LayerNorm(37), lambda: nn.RMSNorm(37)],
    ids=["llama", "gemma", "layer", "rms"],
)
def test_a_normalization_alone_is_bit_for_bit_the_same(make, dtype, autocast):
    generator = torch.Generator().manual_seed(2)
    stock = make().to(dtype)
    for parameter in stock.parameters():
        parameter.data.normal_(generator=generator)
    changed = copy.deepcopy(stock)
    assert lean.install(nn.ModuleList([changed])).norms == ["0"]
    value, dy = torch.randn(2, 3, 5, 37, generator=generator).to(dtype)
    results = []
    for module in (stock, changed):
        x = value.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = module(x)
        y.backward(dy.to(y.dtype))  # outside of autocast, as a training step does it
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant, autocast):
    results = []
    for checkpointed in (False, True):
        model = make_model(tapped=True)
        lean.install(model)
        block = model.model.layers[0]
        positions = torch.arange(7)[None]
        x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        rotary = model.model.rotary_emb(x, positions)

        def run(value: Tensor, block=block, rotary=rotary) -> Tensor:
            return block(value, position_embeddings=rotary)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = checkpoint(run, x, use_reentrant=reentrant) if checkpointed else run(x)
        y.float().square().sum().backward()
        found = {name: g for name, g in gradients(model).items() if isinstance(g, Tensor)}  # the first block's
        results.append(found | {"x": x.grad, "y": y})
    expected, actual = results
    assert set(actual) == set(expected) and len(actual) > 15
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_without_gradients_nothing_is_noted_and_generation_works():
    model, stock = make_model(), make_model()
    lean.install(model)
    ids = token_batch(0, rows=2, length=5)
    with torch.no_grad():
        y = model.model.norm(torch.randn(2, 64))
    assert recipe_of(y) is None
    for m in (model, stock):
        m.eval()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, stock(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


def test_torch_compile_gives_the_same_result():
    block = make_block()
    compiled = torch.compile(block, backend="aot_eager")
    results = []
    for run in (block, compiled):
        block.zero_grad()
        for layer in loqt_layers(block).values():
            layer.tap = Sum()
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(5)).requires_grad_()
        kept, y = kept_bytes(block, lambda run=run, x=x: run(x))
        y.square().sum().backward()
        results.append(gradients(block) | {"x": x.grad, "y": y, "kept": torch.tensor(kept)})
    torch._dynamo.reset()
    expected, actual = results
    handles = 8 * len(loqt_layers(block))
    assert 0 <= actual.pop("kept") - expected.pop("kept") <= handles
    assert all(relative(actual[name].float(), expected[name].float()) < 1e-6 for name in expected)


# ---------------------------------------------------------------- recipes


def make_layer(out_features: int, in_features: int, seed: int) -> LoQTLinear:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec("nf4")
    side = "right" if in_features <= out_features else "left"
    layer = LoQTLinear(in_features, out_features, rank=4, side=side, scale=0.7, spec_w=spec, spec_p=spec)
    layer.set_w(quantize(torch.randn(layer.weight_shape, generator=generator), spec))
    layer.set_p(quantize(torch.linalg.qr(torch.randn(layer.basis_shape, generator=generator))[0], spec))
    layer.B.data.normal_(generator=generator)
    layer.tap = Sum()
    return layer


class Between(nn.Module):
    """Something that happens to a normalized value before a layer sees it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def make_block(change: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Sequential:
    block = nn.Sequential(LlamaRMSNorm(24), Between(change), make_layer(53, 24, 1), make_layer(24, 53, 2))
    block[0].weight.data.normal_(generator=torch.Generator().manual_seed(3))
    lean.install(block)
    return block


def test_a_layer_keeps_the_inputs_of_a_normalization_in_place_of_its_output():
    block = make_block()
    x = torch.randn(5, 24).requires_grad_()
    kept, y = kept_bytes(block, lambda: block(x))
    assert kept == 4 * 5 * (24 + 4 + 53)  # x of the norm; x P; the input of the left-sided layer, which is no norm's
    normalized = block[0](x)
    assert recipe_of(normalized) is not None
    y.sum().backward()
    expected = torch.ones(5, 24).t() @ block[2](normalized)
    assert relative(block[3].tap.total, expected) < 1e-6


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: x.mul_(2.0),
    "in place through a view": lambda x: x if x[1:].mul_(3.0) is not None else x,
    "a new tensor": lambda x: x * 2.0,
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "a view": lambda x: x.view(-1, 24),
    "detached": lambda x: x.detach(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_in_between_is_seen(change):
    block = make_block(CHANGES[change])
    seen: list[Tensor] = []
    block[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    given: list[Tensor] = []
    block[2].tap = lambda dy, x: given.append(x.clone())
    torch.manual_seed(0)
    block(torch.randn(5, 24).requires_grad_()).square().sum().backward()
    assert len(given) == 1 and torch.equal(given[0], seen[0])


def test_a_value_that_is_computed_again_has_the_dtype_of_autocast():
    # A left-sided layer takes its input from a normalization's float32 output, in bf16.
    found = []
    for installs in (False, True):
        block = nn.Sequential(LlamaRMSNorm(53), make_layer(24, 53, 2))
        if installs:
            lean.install(block)
        given: list[Tensor] = []
        block[1].tap = lambda dy, x, given=given: given.append(x.clone())
        x = torch.randn(5, 53, generator=torch.Generator().manual_seed(4)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        y.float().square().sum().backward()
        found.append([y, given[0], block[1].B.grad, x.grad, block[0].weight.grad])
    assert found[0][1].dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_computation_is_repeated_under_the_autocast_it_was_made_under():
    linear = nn.Linear(7, 5)
    value = torch.randn(3, 7, generator=torch.Generator().manual_seed(4))
    found = []
    for again in (False, True):
        x = value.clone().requires_grad_()
        linear.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = recomputed(nn.Linear.forward, linear, x) if again else linear(x)
        y.float().square().sum().backward()
        found.append([y, x.grad, linear.weight.grad, linear.bias.grad])
    assert found[1][0].dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    recipe = recipe_of(y)
    assert torch.equal(recipe.computation(*recipe.tensors), y)


def test_an_input_that_changes_after_the_normalization_is_no_recipe_any_more():
    norm, x = LlamaRMSNorm(24), torch.randn(5, 24)
    lean.install(nn.ModuleList([norm]))
    y = norm(x.requires_grad_() * 1.0)
    assert recipe_of(y) is not None
    recipe_of(y).tensors[0].data.add_(1.0)  # not counted by autograd: nobody can see it
    assert recipe_of(y) is not None
    with torch.no_grad():
        recipe_of(y).tensors[0].add_(1.0)
    assert recipe_of(y) is None
    with pytest.raises(RuntimeError, match="input of a LlamaRMSNorm in place.*needs train.lean_activations=false"):
        y.sum().backward()


def test_a_second_derivative_is_refused():
    block = make_block()
    x = torch.randn(3, 24).requires_grad_()
    (gradient,) = torch.autograd.grad(block[0](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_hooks_on_parameters_see_one_gradient():
    norm = LlamaRMSNorm(24)
    lean.install(nn.ModuleList([norm]))
    calls: list[Tensor] = []
    norm.weight.register_hook(calls.append)
    norm(torch.randn(5, 24)).sum().backward()
    assert len(calls) == 1 and torch.equal(norm.weight.grad, calls[0])


def test_frozen_weights_and_inputs_without_gradients():
    for freeze, needs in ((True, True), (False, False)):
        stock = LlamaRMSNorm(24)
        stock.weight.requires_grad_(not freeze)
        changed = copy.deepcopy(stock)
        lean.install(nn.ModuleList([changed]))
        found = []
        for module in (stock, changed):
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_(needs)
            module(x).square().sum().backward()
            found.append([g for g in (x.grad, module.weight.grad) if g is not None])
        assert len(found[0]) == len(found[1]) == 1 and torch.equal(found[0][0], found[1][0])


def test_a_computation_that_returns_its_input_or_leaves_a_parameter_out():
    module = nn.Linear(3, 3)
    x = torch.randn(2, 3).requires_grad_()
    recomputed(lambda m, value: value, module, x * 2.0).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0)) and module.weight.grad is None
    recomputed(lambda m, value: value @ m.weight, module, x).sum().backward()
    assert module.weight.grad is not None and module.bias.grad is None


def test_the_second_output_is_gone_before_its_gradients_come():
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def function(_: nn.Module, value: Tensor) -> Tensor:
        inner = value * 2.0
        output = inner + 1.0
        outputs.append(weakref.ref(output))
        if inner.requires_grad:
            inner.register_hook(lambda _: alive.append(outputs[-1]() is not None))
        return output

    recomputed(function, nn.Module(), torch.ones(3, requires_grad=True)).sum().backward()
    assert len(outputs) == 2 and alive == [False]


def test_parameters_of_an_activation_are_trained():
    class Prelu(LlamaMLP):
        pass

    stock = Prelu(AutoConfig.for_model("llama", **SHAPE))
    stock.act_fn = nn.PReLU(172)
    changed = copy.deepcopy(stock)
    assert lean.install(changed).mlps == [""]
    x, dy = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    for module in (stock, changed):
        module(x).backward(dy)
    assert torch.equal(changed.act_fn.weight.grad, stock.act_fn.weight.grad)
    assert changed.act_fn.weight.grad.any()


# ---------------------------------------------------------------- which modules


class Swapped(LlamaMLP):
    def forward(self, y):
        """Another name, a docstring, and the result at once."""
        # and a comment
        return self.down_proj(self.act_fn(self.gate_proj(y)) * self.up_proj(y))


class Ungated(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class OtherInput(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 1))


class Multiplied(LlamaMLP):
    def forward(self, x):
        down = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down * 2


OTHER = nn.ModuleDict({"down_proj": nn.Linear(172, 64)})
FIXED = torch.ones(3, 64)


class Elsewhere(LlamaMLP):
    def forward(self, x):
        return OTHER.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FixedInput(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(FIXED)) * self.up_proj(x))


class Functional(LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.act_fn

    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


def test_which_mlps_are_known():
    config = AutoConfig.for_model("llama", **SHAPE)
    kinds = [LlamaMLP, Swapped, Ungated, OtherInput, Multiplied, Elsewhere, FixedInput, Functional]
    model = nn.ModuleDict({f"{kind.__name__}Mlp": kind(config) for kind in kinds})
    for module in model.values():  # names that look like an MLP, so that what is left is said
        type(module).__name__ = f"{type(module).__name__}MLP"
    report = lean.install(model)
    assert report.mlps == ["LlamaMLPMlp", "SwappedMlp"]
    assert report.activations == [f"{kind.__name__.removesuffix('MLP')}Mlp.act_fn" for kind in kinds[2:-1]]
    assert report.left == ["FunctionalMlp"]
    for kind, module in zip(kinds, model.values(), strict=True):
        x = torch.randn(3, 64)
        assert torch.equal(module(x), kind.forward(module, x))


def test_what_draws_counts_or_is_changed_already_is_left():
    class NormWithCount(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x

    config = AutoConfig.for_model("llama", **SHAPE)
    random, inplace, patched = LlamaMLP(config), LlamaMLP(config), LlamaRMSNorm(8)
    random.act_fn, inplace.act_fn = nn.RReLU(), nn.SiLU(inplace=True)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "count": NormWithCount(),
            "batch": nn.BatchNorm1d(8),
            "random": random,
            "inplace": inplace,
            "patched": patched,
            "ok": nn.RMSNorm(8),
        }
    )
    report = lean.install(model)
    assert report.left == ["count", "batch", "random", "inplace", "patched"] and report.norms == ["ok"]
    assert "5 modules of other kinds" in report.describe() and "count, batch, random, ..." in report.describe()


def test_hooks_on_an_activation_are_called_once():
    mlp = LlamaMLP(AutoConfig.for_model("llama", **SHAPE))
    lean.install(mlp)
    calls: list[Any] = []
    mlp.act_fn.register_forward_hook(lambda *arguments: calls.append(arguments))
    mlp(torch.randn(3, 64)).sum().backward()
    assert len(calls) == 1


def test_installing_again_copying_and_pickling():
    model = make_model(num_hidden_layers=1)
    first, second = lean.install(model), lean.install(model)
    assert first == second
    ids = token_batch(0, rows=1, length=6)
    lm_loss(model, ids).backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0)  # a copy that used the parameters of the original would see them change
        assert other.model.norm.forward.__self__.module is other.model.norm
        lm_loss(other, ids).backward()
        assert all(torch.equal(g, gradients(other)[name]) for name, g in gradients(model).items())


def test_one_module_at_two_places():
    model = make_model()
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    model.model.layers[1].mlp = model.model.layers[0].mlp
    stock = copy.deepcopy(model)
    lean.install(model)
    ids = token_batch(0, rows=2, length=9)
    for m in (stock, model):
        lm_loss(m, ids).backward()
    expected, actual = gradients(stock), gradients(model)
    assert all(relative(actual[name], expected[name]) < 3e-6 for name in expected)


def test_a_recipe_is_not_pickled_along():
    norm = LlamaRMSNorm(24)
    y = recomputed(LlamaRMSNorm.forward, norm, torch.randn(3, 24)).detach_()  # others cannot be pickled
    assert hasattr(y, "_loqt_recipe") and pickle.loads(pickle.dumps(y))._loqt_recipe is None


# ---------------------------------------------------------------- kernels


def test_kernels_that_cannot_run_are_refused():
    model = make_model(num_hidden_layers=1)
    with pytest.raises(ConfigError, match="model.kernels='fast' does not exist; use torch or liger"):
        lean.install(model, kernels="fast")
    with pytest.raises(ConfigError, match="model.kernels=liger needs a CUDA device, not cpu; use model.kernels=torch"):
        lean.install(model, kernels="liger")


def test_a_run_is_refused_before_it_has_weights():
    config = Config(model=ModelConfig(shape="llama_60m", kernels="liger"), train=TrainConfig(device="cpu"))
    with pytest.raises(ConfigError, match="model.kernels=liger needs a CUDA device, not cpu"):
        check_options(config, None)


def test_a_missing_liger_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match=r"pip install 'loqt-ds\[liger\]'"):
        lean.check_kernels("liger", [torch.device("meta")])


def test_which_modules_ligers_kernels_compute():
    config = AutoConfig.for_model("llama", **SHAPE)
    norm = lean._LigerNormForward.of
    assert norm(LlamaRMSNorm(8)).casting == "llama" and norm(GemmaRMSNorm(8)).casting == "gemma"
    assert norm(nn.RMSNorm(8)) is None and norm(nn.LayerNorm(8)) is None
    mlp, other = LlamaMLP(config), LlamaMLP(AutoConfig.for_model("llama", **SHAPE, hidden_act="gelu"))
    parts = lean._gated_parts(LlamaMLP.forward)
    assert lean._LigerMlpForward.of(mlp, parts) is not None and lean._LigerMlpForward.of(other, parts) is None


def test_activations_that_are_not_torchs_or_transformers_are_left():
    """They may have parameters elsewhere, or draw random numbers, which a second computation would draw again."""

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
            self.beta = nn.Parameter(torch.ones(10))

        def act(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x * torch.sigmoid(self.beta * x), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.gate(x)) * self.up(x))

    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(nn.functional.silu(x), 0.5)

    drawing = LlamaMLP(AutoConfig.for_model("llama", **SHAPE))
    drawing.act_fn = Drawing()
    stock = nn.ModuleDict({"trained": Trained(), "drawing": drawing})
    ours = copy.deepcopy(stock)
    assert lean.install(ours).left == ["trained", "drawing"]
    for name, width in (("trained", 6), ("drawing", 64)):
        x = torch.randn(5, width)
        for model in (stock, ours):
            torch.manual_seed(1)
            model[name](x).square().sum().backward()
    for expected, actual in zip(stock.parameters(), ours.parameters(), strict=True):
        assert expected.grad is not None and torch.equal(expected.grad, actual.grad)


def test_a_forward_that_was_wrapped_is_called(monkeypatch):
    stock, calls = LlamaMLP.forward, []

    @functools.wraps(stock)
    def wrapper(self: LlamaMLP, x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * stock(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", wrapper)
    model = nn.Sequential(LlamaMLP(AutoConfig.for_model("llama", **SHAPE)))
    x = torch.randn(3, 64)
    expected = model(x)
    lean.install(model)
    assert torch.equal(model(x), expected) and len(calls) == 2


def test_a_normalization_that_gives_two_tensors_is_refused_with_the_remedy():
    class PairNorm(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x

    model = nn.Sequential(PairNorm())
    lean.install(model)
    with pytest.raises(ValueError, match="PairNorm gives tuple.*train.lean_activations=false"):
        model(torch.randn(3, 4, requires_grad=True))


@pytest.mark.parametrize("tapped", [False, True])
def test_a_kept_input_that_is_changed_in_place_is_told_with_the_remedy(tapped):
    norm, layer = make_block()[0], make_layer(24, 24, 1)
    layer.tap = (lambda dy, x: None) if tapped else None
    x = torch.randn(5, 24, requires_grad=True) * 1.0
    x += layer(norm(x))
    with pytest.raises(RuntimeError, match="LlamaRMSNorm in place.*train.lean_activations=false"):
        x.sum().backward()
