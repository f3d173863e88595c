"""The planner's counts against tensors that exist: bitsandbytes' own buffers, autograd's saved tensors, nbytes."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from loqt_ds.config import Config, load_config
from loqt_ds.core import cross_entropy
from loqt_ds.memory import GIB, Division, moment_bytes, plan, planned_model
from loqt_ds.memory.command import main
from loqt_ds.method import head, lean
from loqt_ds.method.conversion import convert
from loqt_ds.method.linear import LoQTLinear

SMALL = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 6}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    content = {"model_type": "llama", "vocab_size": 331, "max_position_embeddings": 128, "tie_word_embeddings": False}
    content |= SMALL | {"num_key_value_heads": 6, "head_dim": 12}
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(content))
    return str(file)


def configured(shape: str, *overrides: str) -> Config:
    base = ["loqt.rank=20", "data.sequence_length=32", "train.micro_batch_size=3", "train.dtype=fp32"]
    return load_config(None, [f"model.shape={shape}", *base, *overrides])


def real_model(config: Config) -> nn.Module:
    torch.manual_seed(0)
    description = AutoConfig.for_model(**json.loads(Path(str(config.model.shape)).read_text()))
    attention = config.model.attention
    return AutoModelForCausalLM.from_config(description, dtype=torch.float32, attn_implementation=attention)


def targets(model: nn.Module) -> list[nn.Linear]:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def packed_bytes(matrix: Tensor, double_quant: bool) -> int:
    """Bytes of a matrix packed by bitsandbytes itself."""
    codes, state = bnb.quantize_4bit(
        matrix, blocksize=64, quant_type="nf4", compress_statistics=double_quant, quant_storage=torch.uint8
    )
    nested = state.state2.absmax.nbytes + state.offset.nbytes if double_quant else 0
    return codes.nbytes + state.absmax.nbytes + nested


@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_weights_are_those_of_bitsandbytes(shape: str, double_quant: bool) -> None:
    config = configured(shape, f"loqt.double_quant={str(double_quant).lower()}")
    linears = targets(real_model(config))
    assert len(linears) == 7 * 3
    entries = plan(config).entries
    assert entries["weights_w"] == sum(packed_bytes(linear.weight.detach(), double_quant) for linear in linears)
    sides = [min(linear.in_features, linear.out_features) for linear in linears]
    assert entries["projections_p"] == sum(packed_bytes(torch.randn(side, 20), double_quant) for side in sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weights(shape: str, dtype: torch.dtype) -> None:
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    config = configured(shape, "loqt.quantize_w=none", "loqt.quantize_p=none", f"train.dtype={name}")
    assert plan(config).entries["weights_w"] == sum(lin.weight.to(dtype).nbytes for lin in targets(real_model(config)))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype, master", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_trained_state_is_what_an_optimizer_step_leaves(shape: str, dtype: str, master: str, optimizer: str) -> None:
    config = configured(shape, f"train.dtype={dtype}", f"optim.master={master}", f"optim.name={optimizer}")
    model = real_model(config)
    parameters = [p for n, p in model.named_parameters() if "proj" not in n]
    full = sum(p.numel() for p in parameters)
    for linear in targets(model):  # B sits on the larger side
        parameters.append(nn.Parameter(torch.zeros(max(linear.in_features, linear.out_features), 20)))
    cls = bitsandbytes.optim.AdamW8bit if optimizer == "adamw8bit" else torch.optim.AdamW
    stepped = cls(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    moments = 0
    for parameter in parameters:
        state = stepped.state[parameter]
        moments += sum(v.nbytes for k, v in state.items() if isinstance(v, Tensor) and k != "step" and "qmap" not in k)
    entries, size = plan(config).entries, 4 if dtype == "fp32" else 2
    total = sum(p.numel() for p in parameters)
    assert entries["moments"] == moments
    assert entries["full_rank_parameters"] == full * size
    assert entries["factors_b"] == (total - full) * size
    assert entries["gradients"] == total * size
    assert entries["masters"] == (4 * total if (dtype, master) == ("bf16", "fp32") else 0)
    assert plan(config).num_trained == total


@pytest.mark.parametrize("numel", [1, 255, 4095, 4096, 4097, 100_003])
def test_moments_of_one_tensor(numel: int) -> None:
    parameter = nn.Parameter(torch.zeros(numel))
    parameter.grad = torch.ones(numel)
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    optimizer.step()
    state = optimizer.state[parameter]
    kept = sum(v.nbytes for k, v in state.items() if isinstance(v, Tensor) and "qmap" not in k)
    assert moment_bytes(numel, optimizer="adamw8bit") == kept
    assert moment_bytes(numel, optimizer="adamw") == 8 * numel


def saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, parameters and W, P apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, targets=tokens, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_lean", [False, True])
def test_activations_are_what_autograd_keeps(
    shape: str, dtype: str, attention: str, tapped: bool, is_lean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "KEPT_ELEMENTS", 0)  # the gradient of the logits is the loss's, and told there
    options = f"train.dtype={dtype}", f"model.attention={attention}", f"train.lean_activations={str(is_lean).lower()}"
    config = configured(shape, *options)
    model = real_model(config).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    convert(model, config.loqt)
    if is_lean:
        lean.install(model)
    head.install(model)
    for layer in model.modules():
        if tapped and isinstance(layer, LoQTLinear):
            layer.tap = lambda dy, x: None
    measured = saved_bytes(model, torch.zeros(3, 32, dtype=torch.int64))
    entries = plan(config).entries
    planned = entries["activations"] + (entries["tapped_inputs"] if tapped else 0)
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("is_lean", [False, True])
def test_the_formula_of_the_design_for_a_llama(shape: str, is_lean: bool) -> None:
    """12 h + 4 i + 12 r bytes per token and layer in bf16, 20 h + 8 i + 12 r of stock modules (and the log-sum-exp of
    each head)."""
    options = "train.dtype=bf16", f"train.lean_activations={str(is_lean).lower()}"
    few, many = (configured(shape, *options) for _ in range(2))
    content = json.loads(Path(shape).read_text()) | {"num_hidden_layers": 4}
    other = Path(shape).with_name("four.json")
    other.write_text(json.dumps(content))
    many.model.shape = str(other)
    per_layer = (plan(many).entries["activations"] - plan(few).entries["activations"]) / (3 * 32)
    assert per_layer == (12 * 72 + 4 * 200 if is_lean else 20 * 72 + 8 * 200) + 12 * 20 + 4 * 6


def test_checkpointing_accumulation_and_layerwise_save_what_they_should(shape: str) -> None:
    plain = plan(configured(shape)).entries
    less = plan(configured(shape, "train.activation_checkpointing=true")).entries
    assert less["activations"] < plain["activations"] / 2
    many = plan(configured(shape, "train.gradient_accumulation_steps=4")).entries
    assert many["activations"] == plain["activations"]
    # gram below 512: a dense fp32 gradient for each adapted weight is gathered over the micro-batches
    assert many["reinit_gathered"] == 4 * sum(lin.weight.numel() for lin in targets(real_model(configured(shape))))
    assert plain["reinit_gathered"] == 4 * 72 * 200
    layerwise = plan(configured(shape, "optim.layerwise=true")).entries
    assert layerwise["gradients"] == 0 and layerwise["new_gradient"] == 4 * 331 * 72  # the largest parameter's alone
    both = plan(configured(shape, "optim.layerwise=true", "train.gradient_accumulation_steps=4")).entries
    assert both["gradients"] == plain["gradients"]


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate", "num_layers", "gib"),
    [("pretrain_7b_24gb", 4096, 11008, 32, 1.8), ("pretrain_13b_24gb", 5120, 13824, 40, 2.8)],
)
def test_sketches_are_those_of_the_design(
    name: str, hidden: int, intermediate: int, num_layers: int, gib: float
) -> None:
    """ARCHITECTURE.md: all sketches at rank 1024 are 1.8 GiB at 7B and 2.8 GiB at 13B; their columns come on top."""
    overrides = ["optim.layerwise=false", "train.gradient_accumulation_steps=2"]
    columns = 1024 + 32 + 8
    sketches = 2 * columns * 7 * hidden * num_layers
    lengths = 2 * columns * (4 * hidden + 3 * intermediate) * num_layers  # of the test matrices
    assert sketches / GIB == pytest.approx(gib, rel=0.05)
    assert plan(load_config(name, overrides)).entries["reinit_gathered"] == sketches + lengths


def test_of_experts_several_ranks_gather_whole_gradients(tmp_path: Path) -> None:
    content = {"model_type": "mixtral", "vocab_size": 331, "hidden_size": 520, "intermediate_size": 600}
    content |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 3}
    file = tmp_path / "experts.json"
    file.write_text(json.dumps(content))
    config = configured(str(file), "train.gradient_accumulation_steps=2")
    columns = 20 + config.loqt.sketch_oversampling + 8
    attention = 4 * 4 * (520 + 520) * columns
    sketches = 3 * 4 * ((520 + 1200) + (520 + 600)) * columns
    assert plan(config).entries["reinit_gathered"] == attention + sketches
    gathered = {ranks: plan(config, division=Division(ranks)).entries["reinit_gathered"] for ranks in (1, 2)}
    assert gathered == {1: attention + sketches, 2: attention + 3 * 4 * 520 * (1200 + 600)}


def test_total_is_the_largest_phase(shape: str) -> None:
    result = plan(configured(shape))
    assert result.total_bytes == max(result.phase_bytes(phase) for phase in result.phases)
    assert result.persistent_bytes < result.total_bytes <= sum(result.entries.values())
    table = "\n".join(result.lines())
    for words in ("W, packed", "Adam's moments", "activations", "logits", "total", "fp32", "peak of start", "export"):
        assert words in table


def test_vocabulary_before_the_tokenizer_is_known(shape: str) -> None:
    def rows(*overrides: str, vocab_size: int | None = None) -> int:
        return int(planned_model(configured(shape, *overrides), vocab_size=vocab_size)[0].vocab_size)

    assert rows() == 331
    assert rows("model.vocab_size=400") == 400
    assert rows("model.vocab_size=auto", "data.tokenizer_vocab_size=1000") == 1024
    assert rows("model.vocab_size=auto", vocab_size=77) == 77
    config = configured(shape, "model.vocab_size=auto", "data.tokenizer=t5-base")
    assert any("shape file" in note for note in plan(config).notes)
    assert not plan(config, vocab_size=320).notes
    assert plan(config, vocab_size=320).entries["full_rank_parameters"] == 4 * (2 * 320 * 72 + 7 * 72)


def test_what_does_not_fit_the_model_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match=r"loqt.rank=73.*72"):
        plan(configured(shape, "loqt.rank=73"))
    with pytest.raises(ValueError, match="nothing_like_it"):
        plan(configured(shape, "loqt.target_modules=nothing_like_it"))


def test_command_line(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "default", f"model.shape={shape}", "loqt.rank=8", "data.sequence_length=32"]) == 0
    assert "total" in capsys.readouterr().out
    assert main(["--config", "default", "loqt.rank=512"]) == 2
    assert "loqt.rank=512" in capsys.readouterr().err
    small = ["--config", "default", f"model.shape={shape}", "loqt.rank=8", "data.sequence_length=32"]
    assert main([*small, "--gpus", "2", "--card-gib", "9"]) == 0
    assert "gradients being reduced" in capsys.readouterr().out
    assert main([*small, "--gpus", "2", "--engine", "single"]) == 2
    assert "zero2" in capsys.readouterr().err
    assert main(["--config", "defalt"]) == 2
    assert "default" in capsys.readouterr().err
