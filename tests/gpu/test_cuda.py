"""What only a CUDA device can show: `pytest -m gpu`. References are float64 on the CPU, or the same run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from loqt_ds.config import LoQTConfig
from loqt_ds.core.cross_entropy import linear_cross_entropy
from loqt_ds.core.quantization import QuantSpec, dequantize, dequantized, quantize
from loqt_ds.data import StepBatches
from loqt_ds.method import lean
from loqt_ds.method.conversion import build_model, initializer, loqt_layers
from loqt_ds.method.head import IGNORED, _liger_loss
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.train import main
from loqt_ds.trainer import HostNumber

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, None], torch.Tensor]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_batches_are_pinned_and_a_loss_is_read_before_what_follows() -> None:
    class Ones:
        def next_batch(self) -> dict[str, torch.Tensor]:
            return {"targets": torch.ones(3, 5, dtype=torch.int64)}

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    batches = StepBatches(Ones(), num_micro_batches=2, device=torch.device("cuda", 0))
    assert all(batch["targets"].is_pinned() for batch in batches.take(is_last=True))
    value = torch.full((), 2.5, device="cuda", dtype=torch.float64)
    number = HostNumber(value)
    after = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second of the device
    after.record()
    assert number.read() == 2.5 and not after.query()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("shape", [(64, 64), (172, 352), (37, 91), (1376, 512)])
def test_quantization_is_that_of_the_cpu(kind: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    spec = QuantSpec(kind)
    on_cpu, on_cuda = quantize(matrix, spec), quantize(matrix.cuda(), spec)
    values_cpu = dequantize(on_cpu, shape, spec)
    values_cuda = dequantize(on_cuda, shape, spec).cpu()
    # A value half-way between two levels may round to either on another device.
    assert (values_cpu != values_cuda).float().mean() < 1e-3
    assert torch.linalg.norm(values_cuda - matrix) / torch.linalg.norm(matrix) < 0.13


@pytest.mark.parametrize("shape", [(172, 64), (64, 172), (96, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_a_dense_layer_with_the_effective_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    out_features, in_features = shape
    side = "right" if in_features <= out_features else "left"
    spec = QuantSpec("nf4")
    layer = LoQTLinear(
        in_features, out_features, rank=16, side=side, scale=0.5, spec_w=spec, spec_p=spec, dtype=dtype, device="cuda"
    )
    layer.set_w(quantize(torch.randn(shape, device="cuda"), spec))
    layer.set_p(quantize(torch.linalg.qr(torch.randn(layer.basis_shape, device="cuda"))[0], spec))
    nn.init.normal_(layer.B)
    x = torch.randn(5, 7, in_features, device="cuda", dtype=dtype, requires_grad=True)
    gathered: list[torch.Tensor] = []
    layer.tap = lambda dy, rows: gathered.append(dy.double().t() @ rows.double())
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = layer.effective_weight().double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2

    def close(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool(torch.linalg.norm(actual.double() - wanted) <= tolerance * torch.linalg.norm(wanted))

    rows, dense = x.detach().double().flatten(0, 1), dy.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
    p = layer.basis_hat().double()
    assert close(y.flatten(0, 1), rows @ weight.t())
    assert x.grad is not None and close(x.grad.flatten(0, 1), dy.double().flatten(0, 1) @ weight)
    assert layer.B.grad is not None and close(layer.B.grad, 0.5 * (dense @ p if side == "right" else p.t() @ dense))
    assert close(gathered[0], dense)


def _with_gradients(loss: Loss, dtype: torch.dtype, drawn: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    hidden, weight = (drawn[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight"))
    value = loss(hidden, weight, drawn["targets"], None)
    return [value.detach(), *torch.autograd.grad(value / 600, (hidden, weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["torch", "liger"])
def test_the_loss_in_blocks_is_nearly_that_of_float64(kernels: str, dtype: torch.dtype) -> None:
    """Three blocks of torch's; nothing waits for the device."""
    if kernels == "liger":
        pytest.importorskip("liger_kernel")
    drawn = {
        "hidden": torch.randn(600, 64, device="cuda").to(dtype),
        "weight": (torch.randn(32003, 64, device="cuda") / 3).to(dtype),
        "targets": torch.randint(0, 32003, (600,), device="cuda"),
    }
    drawn["targets"][::7] = IGNORED

    def stock(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, _: None) -> torch.Tensor:
        logits = hidden @ weight.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)

    def blocked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, _: None) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets)

    exact, usual = (_with_gradients(stock, kind, drawn) for kind in (torch.float64, dtype))
    if kernels == "torch":
        _with_gradients(blocked, dtype, drawn)  # torch's own start-up waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        actual = _with_gradients(blocked if kernels == "torch" else _liger_loss, dtype, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, ours, wanted in zip(usual, actual, exact, strict=True):
        error, of_stock = ((v.double() - wanted).norm() / wanted.norm() for v in (ours, value))
        assert error <= 3 * of_stock + 1e-5


def _losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "event" not in line]


def _arguments(folder: Path, name: str, *extra: str) -> list[str]:
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        words = [f"word{number % 97}" for number in range(0, 40000, 7)]
        corpus.write_text("<|endoftext|>".join(" ".join(words[i : i + 200]) for i in range(0, len(words), 200)))
    return [
        f"data.path={corpus}",
        f"data.cache_dir={folder / 'cache'}",
        "data.tokenizer_vocab_size=400",
        "data.sequence_length=64",
        "loqt.interval=4",
        "loqt.growth=1.0",
        "train.max_steps=12",
        "optim.name=adamw",
        "eval.every=6",
        "checkpoint.every=6",
        "eval.num_samples=1",
        "eval.sample_tokens=8",
        f"output_dir={folder / name}",
        *extra,
    ]


def test_a_float32_run_has_the_losses_of_the_cpu(tmp_path: Path) -> None:
    assert main(_arguments(tmp_path, "cpu", "train.device=cpu", "train.dtype=fp32", "export.format=none")) == 0
    assert main(_arguments(tmp_path, "cuda", "train.device=cuda", "train.dtype=fp32")) == 0
    for on_cpu, on_cuda in zip(_losses(tmp_path / "cpu"), _losses(tmp_path / "cuda"), strict=True):
        assert on_cuda == pytest.approx(on_cpu, rel=0.02)


@pytest.mark.parametrize("extra", [(), ("optim.layerwise=true", "train.max_grad_norm=null")])
def test_a_bf16_run_learns_and_exports(tmp_path: Path, extra: tuple[str, ...]) -> None:
    assert main(_arguments(tmp_path, "run", "train.dtype=bf16", "optim.name=adamw8bit", *extra)) == 0
    losses = _losses(tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("ds_config", ["zero1.json", "zero2.json", "zero2_overlap.json"])
def test_a_deepspeed_run_learns_and_exports(tmp_path: Path, repository: Path, ds_config: str) -> None:
    arguments = ["--ds_config", str(repository / "configs" / ds_config)]
    arguments += _arguments(tmp_path, "run", "train.dtype=bf16", "optim.name=adamw8bit")
    assert main(arguments, launched=True) == 0
    losses = _losses(tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]


# ---- lean activations, the buffer of dequantized matrices, Liger's kernels ------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "none"])
@pytest.mark.parametrize("shape", [(64, 64), (172, 352), (37, 91), (1376, 2048)])
def test_the_buffer_holds_what_dequantize_returns(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    spec = QuantSpec(kind, double_quant=kind != "none")
    packed = quantize(torch.randn(shape, device="cuda"), spec)
    expected = dequantize(packed, shape, spec, dtype=dtype)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), dequantized(packed, shape, spec, dtype=dtype) as values:
            same = torch.equal(values, expected)
        assert same


def _converted(kind: str, dtype: torch.dtype, num_layers: int = 2, *, tapped: bool = False) -> nn.Module:
    """A converted model with everything random, the same each time."""
    description = AutoConfig.for_model(
        kind,
        vocab_size=128,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=256,
    )
    model, _ = build_model(description, LoQTConfig(rank=16), initializer(0), dtype=dtype, device=torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(1)
    for layer in loqt_layers(model).values():
        basis = torch.linalg.qr(torch.randn(layer.basis_shape, device="cuda", generator=generator))[0]
        layer.set_p(quantize(basis, layer.spec_p))
        layer.B.data.normal_(generator=generator).mul_(0.1)
        layer.tap = (lambda dy, x: None) if tapped else None
    return model.train()


def _ids() -> torch.Tensor:
    return torch.randint(0, 128, (2, 129), generator=torch.Generator().manual_seed(2)).cuda()


def _loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = _ids()
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("tapped", [False, True])
def test_bytes_per_token_and_layer_are_the_formula(tapped: bool) -> None:
    ids, kept = _ids()[:, :-1], []
    for num_layers in (1, 3):
        model = _converted("llama", torch.bfloat16, num_layers, tapped=tapped)
        lean.install(model)
        resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, alive=alive: alive.append(t) or t, lambda t: t):
            output = model.model(input_ids=ids, use_cache=False)
        pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive if t.is_cuda}
        kept.append(sum(size for pointer, size in pieces.items() if pointer not in resident))
        del output
    per_token = (kept[1] - kept[0]) / 2 / ids.numel()
    formula = 2 * (6 * 256 + 2 * 688 + 6 * 16) + 4 * 4
    assert formula <= per_token <= 1.02 * formula  # kernels of attention may pad what they keep of a row


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3"])
def test_lean_gradients_are_the_stock_ones(kind: str) -> None:
    stock, changed = _converted(kind, torch.bfloat16), _converted(kind, torch.bfloat16)
    lean.install(changed)
    expected, actual = _loss_and_gradients(stock), _loss_and_gradients(changed)
    for name in expected:
        # Attention's backward adds in an order that varies; the rest is the same to the bit.
        difference = torch.linalg.norm(actual[name] - expected[name])
        assert difference <= 1e-2 * torch.linalg.norm(expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3"])
def test_ligers_kernels_compute_what_torch_does(kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed")
    by_torch, by_liger = _converted(kind, dtype), _converted(kind, dtype)
    lean.install(by_torch)
    report = lean.install(by_liger, kernels="liger")
    assert set(report.norms) <= set(report.fused) and bool(set(report.mlps) & set(report.fused)) == (kind != "gemma")
    expected, actual = _loss_and_gradients(by_torch), _loss_and_gradients(by_liger)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for name in expected:
        difference = torch.linalg.norm(actual[name] - expected[name])
        assert difference <= tolerance * torch.linalg.norm(expected[name]), name
