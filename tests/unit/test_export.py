"""Exports against what transformers and bitsandbytes themselves write, and against dense models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from loqt_ds.checkpoint import CheckpointError, save_checkpoint
from loqt_ds.config import Config, LoQTConfig
from loqt_ds.core.quantization import quantize
from loqt_ds.export import ExportError, export_checkpoint, export_model, load_export, writer
from loqt_ds.export import run as run_module
from loqt_ds.export import verify as verify_module
from loqt_ds.export.__main__ import main
from loqt_ds.method.conversion import convert, loqt_layers

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def silent(_: str) -> None:
    """For tests that do not look at what is said."""


def llama(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(settings | changes))


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    # 48 and 80 are multiples of 16 and not of 64: bitsandbytes on a CPU is wrong there; 90 is neither.
    "odd": {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 3},
    "odder": {"hidden_size": 30, "intermediate_size": 91, "num_attention_heads": 3, "num_key_value_heads": 1},
    "wide": {"hidden_size": 128, "intermediate_size": 192},
}


def trained(config: LlamaConfig, *, zero: bool = False, dtype: torch.dtype = torch.float32, **loqt: Any) -> Any:
    """A model with LoQT layers whose every parameter is random, as after some training."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        convert(model, LoQTConfig(**({"rank": 8, "alpha": 0.5} | loqt)))
        for layer in loqt_layers(model).values():
            layer.set_p(quantize(torch.linalg.qr(torch.randn(layer.basis_shape))[0], layer.spec_p))
            if not zero:
                layer.B.normal_(std=0.02)
    return model


def merged_twin(model: Any, config: LlamaConfig) -> Any:
    """A dense float32 model with the effective weights."""
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = loqt_layers(model)
    state = {name: value.float() for name, value in model.state_dict().items() if name in twin.state_dict()}
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.effective_weight()
    twin.load_state_dict(state, strict=True)
    return twin


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def saved_by_transformers(twin: Any, directory: Path, *, quant_type: str, dtype: torch.dtype) -> Path:
    """Save densely, load so that bitsandbytes quantizes values of `dtype`, save again."""
    twin.save_pretrained(directory / "dense")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory / "dense", dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(directory / "quantized")
    return directory / "quantized"


def export(model: Any, config: LlamaConfig, directory: Path, **options: Any) -> Any:
    options = {"tokenizer_dir": None, "say": silent} | options
    return export_model(model, model_config=config, output_dir=directory, **options)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_is_what_transformers_saves(tmp_path: Path, shape: str, quant_type: str) -> None:
    """From float32 values; transformers then records that dtype and keeps the dense tensors in it, we do not."""
    config = llama(**SHAPES[shape])
    model = trained(config, quantize_w=quant_type)
    report = export(model, config, tmp_path / "ours")
    theirs = saved_by_transformers(merged_twin(model, config), tmp_path, quant_type=quant_type, dtype=torch.float32)
    ours, wanted = stored_tensors(tmp_path / "ours"), stored_tensors(theirs)
    assert ours.keys() == wanted.keys()
    num_states = 0
    for name, tensor in wanted.items():
        if "quant_state" in name:
            num_states += 1
            state = bytes(tensor.tolist()).decode().replace("float32", "bfloat16")
            assert bytes(ours[name].tolist()).decode() == state
            continue
        quantized = any(name.startswith(f"{layer.name}.weight") for layer in report.layers)
        wanted_tensor = tensor if quantized else tensor.bfloat16()
        assert ours[name].dtype == wanted_tensor.dtype and torch.equal(ours[name], wanted_tensor), name
    assert num_states == len(report.layers) == 14
    assert ("lm_head.weight" in ours) == (not config.tie_word_embeddings)


def test_the_directory_is_byte_for_byte_that_of_transformers(tmp_path: Path) -> None:
    """From values that bf16 holds exactly, nothing may differ at all: tensors, metadata, config.json."""
    config = llama()
    model = trained(config, zero=True, quantize_w="none", quantize_p="none")
    with torch.no_grad():
        for value in (
            *model.parameters(),
            *(layer.packed_w()["dense"].view(torch.float32) for layer in loqt_layers(model).values()),
        ):
            value.copy_(value.bfloat16())
    said: list[str] = []
    export(model, config, tmp_path / "ours", say=said.append)
    assert any("without quantization" in line for line in said)
    theirs = saved_by_transformers(merged_twin(model, config), tmp_path, quant_type="nf4", dtype=torch.bfloat16)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    ours_config, their_config = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "ours", theirs))
    assert ours_config == their_config
    for path in (tmp_path / "ours", theirs):
        assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_double_quantization_is_what_transformers_saves(tmp_path: Path) -> None:
    config = llama()
    model = trained(config, zero=True, quantize_w="none", quantize_p="none")
    export(model, config, tmp_path / "ours", double_quant=True)
    merged_twin(model, config).save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours, wanted = stored_tensors(tmp_path / "ours"), stored_tensors(tmp_path / "theirs")
    assert ours.keys() == wanted.keys()
    for name in (name for name in wanted if ".weight." in name or "_proj.weight" in name):
        if "quant_state" not in name:
            assert torch.equal(ours[name], wanted[name]), name
        else:
            ours_state, state = (json.loads(bytes(tensors[name].tolist())) for tensors in (ours, wanted))
            assert ours_state == state | {"dtype": "bfloat16"}


RELOAD = textwrap.dedent(
    """
    # A stranger: transformers alone.
    import sys
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map={"": "cpu"}).eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    tokens = torch.arange(60).view(2, 30) % 131
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.float()
    assert "loqt_ds" not in sys.modules
    save_file({"logits": logits}, sys.argv[2])
    """
)


def logits_of_a_stranger(directory: Path, tmp_path: Path) -> torch.Tensor:
    path = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", RELOAD, str(directory), str(path)], env=ENVIRONMENT, check=True)
    return load_file(path)["logits"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(60).view(2, 30) % 131).logits.float()


def in_bf16(model: Any) -> Any:
    """Parameters only: `model.bfloat16()` would also round the rotary tables, which transformers keeps in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual - wanted).norm() / wanted.norm()).item()


def lookup(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, int]) -> torch.Tensor:
    """An independent dequantization, from what the file says and nothing else."""
    codes = tensors[f"{name}.weight"].view(-1)
    nibbles = torch.stack((codes >> 4, codes & 15), dim=1).view(-1)[: shape[0] * shape[1]]
    absmax = tensors[f"{name}.weight.absmax"].repeat_interleave(64)[: nibbles.numel()]
    return (tensors[f"{name}.weight.quant_map"][nibbles.int()] * absmax).view(shape)


@pytest.mark.parametrize("quantize_w", ["nf4", "fp4", "int4", "none"])
def test_a_stranger_computes_the_logits_of_the_merged_model(tmp_path: Path, quantize_w: str) -> None:
    config = llama(**SHAPES["wide"])
    model = trained(config, quantize_w=quantize_w)
    report = export(model, config, tmp_path / "out")
    # A dense bf16 model with the exported weights: the same to rounding; and the merged one: to one quantization.
    twin = merged_twin(model, config)
    merged_logits = logits(twin)
    tensors = stored_tensors(tmp_path / "out")
    quant_map = "fp4" if quantize_w == "fp4" else "nf4"
    for layer in report.layers:
        module = twin.get_submodule(layer.name)
        effective = module.weight.detach().clone()
        module.weight.data = lookup(tensors, layer.name, tuple(effective.shape))
        assert f"{layer.name}.weight.quant_state.bitsandbytes__{quant_map}" in tensors
        assert layer.merge_error == pytest.approx(relative(module.weight, effective), rel=1e-4)
        assert 0.05 < layer.merge_error < 0.2 and layer.action == "quantized"
    actual = logits_of_a_stranger(tmp_path / "out", tmp_path)
    assert relative(actual, logits(in_bf16(twin))) < 1e-3
    assert 0.01 < relative(actual, merged_logits) < 0.5
    check = report.verification
    assert check.logits_relative_difference < 1e-3 and not check.patched_layers
    assert check.merged_logits_relative_difference == pytest.approx(relative(actual, merged_logits), rel=0.5)
    assert check.merged_logits_relative_difference > 10 * check.logits_relative_difference


def test_the_training_model_itself_is_what_is_merged(tmp_path: Path) -> None:
    """bf16 export of both sides, with masters finer than bf16: logits of the LoQT model in float32."""
    config = llama(**SHAPES["biases"])
    model = trained(config, quantize_p="int4")
    report = export(model, config, tmp_path / "out", format="bf16")
    assert {layer.side for layer in loqt_layers(model).values()} == {"left", "right"}
    actual = logits_of_a_stranger(tmp_path / "out", tmp_path)
    # Rounding to bf16 only.
    assert 0.001 < report.verification.merged_logits_relative_difference < 0.02
    assert relative(actual, logits(model)) < 0.02
    tensors = stored_tensors(tmp_path / "out")
    merged_twin(model, config).bfloat16().save_pretrained(tmp_path / "theirs")
    wanted = stored_tensors(tmp_path / "theirs")
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    ours_config, their_config = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs")
    )
    assert ours_config == their_config and "quantization_config" not in ours_config
    assert all(layer.action == "rounded" and 0 < layer.merge_error < 0.004 for layer in report.layers)


def test_float64_says_what_the_merge_is() -> None:
    model = trained(llama(**SHAPES["odder"]))
    for layer in loqt_layers(model).values():
        weight, basis, factor = layer.weight_q().double(), layer.basis_hat().double(), layer.B.detach().double()
        product = factor @ basis.T if layer.side == "right" else basis @ factor
        assert relative(layer.effective_weight().double(), weight + 0.5 * product) < 1e-6


def test_widths_that_bitsandbytes_gets_wrong_are_patched_and_named(tmp_path: Path) -> None:
    config = llama(**SHAPES["odd"])
    model = trained(config)
    said: list[str] = []
    report = export(model, config, tmp_path / "out", say=said.append)
    assert sorted(report.verification.patched_layers) == sorted(layer.name for layer in report.layers)
    assert report.verification.logits_relative_difference < 1e-3
    assert any("bitsandbytes on this CPU" in line and "14 matrices" in line for line in said)
    # The reason for the patch: without it, the same directory computes something else.
    twin = merged_twin(model, config)
    tensors = stored_tensors(tmp_path / "out")
    for layer in report.layers:
        module = twin.get_submodule(layer.name)
        module.weight.data = lookup(tensors, layer.name, tuple(module.weight.shape))
    wanted = logits(in_bf16(twin))
    assert relative(logits_of_a_stranger(tmp_path / "out", tmp_path), wanted) > 0.05
    assert relative(logits(load_export(tmp_path / "out")), wanted) < 1e-3


@pytest.mark.parametrize("double_quant", ["none", "w"])
def test_codes_are_copied_where_b_is_zero(tmp_path: Path, double_quant: str) -> None:
    config = llama()
    model = trained(config, zero=True, double_quant=double_quant)
    layers = loqt_layers(model)
    with torch.no_grad():
        layers["model.layers.0.mlp.up_proj"].B.normal_()
    said: list[str] = []
    report = export(model, config, tmp_path / "out", say=said.append)
    tensors = stored_tensors(tmp_path / "out")
    actions = {layer.name: layer.action for layer in report.layers}
    assert actions.pop("model.layers.0.mlp.up_proj") == "quantized"
    assert set(actions.values()) == {"copied" if double_quant == "none" else "quantized"}
    assert any("13 of 14" in line for line in said) == (double_quant == "none")
    for name in actions:
        assert torch.equal(tensors[f"{name}.weight"].view(-1), layers[name].packed_w()["codes"]), name
        assert relative(lookup(tensors, name, layers[name].weight_shape), layers[name].weight_q()) < 1e-6


def test_shards(tmp_path: Path) -> None:
    config = llama()
    model = trained(config)
    export(model, config, tmp_path / "one")
    report = export(model, config, tmp_path / "many", max_shard_size_gib=40_000 / 2**30)
    assert report.num_shards > 2
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{report.num_shards:05d}.safetensors"
    assert all((tmp_path / "many" / name).stat().st_size < 45_000 for name in names)
    one, many = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in many.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a dictionary
            assert opened.metadata() == {"format": "pt"}
    assert torch.equal(
        logits_of_a_stranger(tmp_path / "one", tmp_path), logits_of_a_stranger(tmp_path / "many", tmp_path)
    )


def test_linears_that_were_not_adapted_stay_dense(tmp_path: Path) -> None:
    config = llama()
    model = trained(config, target_modules=["q_proj", "down_proj"])
    export(model, config, tmp_path / "out")
    skip = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in skip and "model.layers.1.mlp.up_proj" in skip and len(skip) == 11
    tensors = stored_tensors(tmp_path / "out")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.uint8


def test_tokenizer_files_travel_and_models_beside_them_do_not(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    (tokenizer / "deep").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer.model", "deep/file.txt", "config.json", "model.safetensors", ".hidden"):
        (tokenizer / name).write_text(name)
    config = llama()
    export(trained(config), config, tmp_path / "out", tokenizer_dir=tokenizer)
    assert (tmp_path / "out" / "deep" / "file.txt").read_text() == "deep/file.txt"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "deep",
        "export_report.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_how_texts_are_generated_travels(tmp_path: Path) -> None:
    """What is given, or the model's own; the token that ended texts in training is added to those there are."""
    config = llama()
    model = trained(config)

    def written(name: str, **options: Any) -> Any:
        export(model, config, tmp_path / name, format="bf16", verify=False, **options)
        return json.loads((tmp_path / name / "generation_config.json").read_text())

    theirs = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 5]}
    assert written("given", generation=theirs) == theirs
    assert writer.read_generation(tmp_path / "given") == theirs
    model.generation_config.update(do_sample=True, top_p=0.7, eos_token_id=[2, 7])
    own = written("own")
    assert own["top_p"] == 0.7 and own["eos_token_id"] == [2, 7]
    ends = [
        writer.with_end(given, 9)["eos_token_id"] for given in ({}, {"eos_token_id": 9}, {"eos_token_id": 2}, theirs)
    ]
    assert ends == [9, 9, [2, 9], [2, 5, 9]]
    (tmp_path / "own" / "generation_config.json").write_text("[")
    with pytest.raises(ExportError, match=r"own/generation_config.json, which goes along .* mend it"):
        writer.read_generation(tmp_path / "own")


def test_the_report_is_written_and_the_model_is_untouched(tmp_path: Path) -> None:
    config = llama()
    model = trained(config)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = export(model, config, tmp_path / "out")
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    written = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert written["mean_merge_error"] == pytest.approx(sum(l["merge_error"] for l in written["layers"]) / 14)  # noqa: E741
    assert written["worst_layer"] == report.worst_layer.name
    assert written["verification"]["logits_relative_difference"] < 1e-3
    assert written["num_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert not any(path.name.startswith(".tmp") for path in tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- from checkpoints


def checkpoint_of(
    model: Any,
    config: LlamaConfig,
    root: Path,
    *,
    loqt: dict[str, Any],
    masters: dict | None = None,
    step: int = 30,
    keeps_best: bool = False,
) -> Path:
    resolved = Config(loqt=LoQTConfig(**({"rank": 8, "alpha": 0.5} | loqt)))
    resolved.checkpoint.best = keeps_best
    tokenizer = root.parent / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    # As ZeRO keeps masters: all of them in one vector.
    flat = torch.cat([torch.zeros(0), *(value.flatten() for value in (masters or {}).values())])
    fragments, offset = [], 0
    for name, value in (masters or {}).items():
        fragments.append([name, 0, value.numel(), offset])
        offset += value.numel()
    shards = [{"key": "flat", "length": offset, "fragments": fragments}] if masters else []
    return save_checkpoint(
        root,
        step,
        tensors={"model": model.state_dict(), "optimizer": {"flat/master": flat, "flat/exp_avg": torch.zeros(3)}},
        metadata={
            "model_config": config.to_dict(),
            "config": resolved.to_dict(),
            "engine_state": {"shards": [shards]},
        },
        directories={"tokenizer": tokenizer},
        keep=0,
    )


@pytest.mark.parametrize(
    ("shape", "loqt"),
    [
        ("tied", {}),
        ("biases", {"double_quant": "both"}),
        ("wide", {"quantize_w": "none", "quantize_p": "none"}),
        ("odder", {"quantize_w": "int4", "side": "left", "quantize_p": "fp4"}),
        ("gqa", {"target_modules": ["k_proj", "up_proj"]}),
    ],
)
def test_a_checkpoint_exports_as_the_model_it_was_saved_from(tmp_path: Path, shape: str, loqt: dict) -> None:
    config = llama(**SHAPES[shape])
    model = trained(config, **loqt)
    root = tmp_path / "run" / "checkpoints"
    checkpoint_of(model, config, root, loqt=loqt)
    export(model, config, tmp_path / "model")
    report = export_checkpoint(tmp_path / "run", tmp_path / "checkpoint", say=silent)
    wanted, actual = stored_tensors(tmp_path / "model"), stored_tensors(tmp_path / "checkpoint")
    assert wanted.keys() == actual.keys() and all(torch.equal(wanted[name], actual[name]) for name in wanted)
    assert "step 30" in report.source and (tmp_path / "checkpoint" / "tokenizer.json").exists()
    assert (tmp_path / "model" / "config.json").read_text() == (tmp_path / "checkpoint" / "config.json").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_masters_are_used_instead_of_rounded_parameters(tmp_path: Path, tied: bool) -> None:
    """bf16 parameters with fp32 masters export as the fp32 model does."""
    config = llama(tie_word_embeddings=tied, attention_bias=True)
    fine = trained(config)
    coarse = trained(config)
    masters = {name: value.detach().clone() for name, value in fine.named_parameters()}
    for parameter in coarse.parameters():
        parameter.data = torch.zeros_like(parameter, dtype=torch.bfloat16)
    checkpoint_of(coarse, config, tmp_path / "run", loqt={}, masters=masters)
    export(fine, config, tmp_path / "fine")
    export_checkpoint(tmp_path / "run", tmp_path / "coarse", say=silent)
    wanted, actual = stored_tensors(tmp_path / "fine"), stored_tensors(tmp_path / "coarse")
    assert wanted.keys() == actual.keys() and all(torch.equal(wanted[name], actual[name]) for name in wanted)
    # In memory, the same.
    export(coarse, config, tmp_path / "memory", masters=masters, verify=False)
    in_memory = stored_tensors(tmp_path / "memory")
    assert all(torch.equal(wanted[name], in_memory[name]) for name in wanted)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    config = llama()
    path = checkpoint_of(trained(config), config, tmp_path / "checkpoints", loqt={})
    arguments = ["--checkpoint", str(path), "--format", "bf16", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(repository / "tools" / "export.py"), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "merge error" in done.stdout and "reloaded with transformers" in done.stdout
    # A second time, the directory is taken; and a path without a checkpoint is named.
    assert main(arguments) == 2
    assert f"{tmp_path / 'out'} exists and is not empty; choose another --output" in capsys.readouterr().err
    assert main(["--checkpoint", str(tmp_path / "no"), "--output", str(tmp_path / "new")]) == 2
    assert f"--checkpoint={tmp_path / 'no'} holds no checkpoint" in capsys.readouterr().err
    (path / "model.safetensors").write_bytes(b"")
    assert main(["--checkpoint", str(path), "--output", str(tmp_path / "new")]) == 2
    assert "model.safetensors has 0 bytes" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------- refusals


def test_bad_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama()
    model = trained(config)
    requests: list[tuple[dict[str, Any], str]] = [
        ({"format": "onnx"}, "export.format='onnx'"),
        ({"format": "bf16", "double_quant": True}, "double quantization needs"),
        ({"max_shard_size_gib": 0}, "max_shard_size_gib=0"),
    ]
    for options, problem in requests:
        with pytest.raises(ExportError, match=problem):
            export(model, config, tmp_path / "out", **options)
    with pytest.raises(ExportError, match="no LoQT layer"):
        export(AutoModelForCausalLM.from_config(config), config, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export(model, config, tmp_path / "file")
    with pytest.raises(ExportError, match="could not be written"):
        export(model, config, tmp_path / "file" / "out")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 1000, 1000))
    with pytest.raises(ExportError, match="the export needs 0.001 GiB"):
        export(model, config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_output_directory_is_used(tmp_path: Path) -> None:
    config = llama()
    (tmp_path / "out").mkdir()
    export(trained(config), config, tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_what_running_exports_have_written_stays(tmp_path: Path) -> None:
    """Of exports to the same directory only what a dead process left is removed, of others nothing."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    running = os.getppid()
    names = [f".tmp-task-{dead.pid}", f".tmp-task-{running}", f".tmp-task-2-{dead.pid}", f".tmp-task-2-{running}"]
    for name in names:
        (tmp_path / name).mkdir()
    with writer.complete_or_nothing(tmp_path / "task") as directory:
        (directory / "file").write_text("all of it")
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "task"}


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    config = llama()
    model = trained(config)
    with torch.no_grad():
        loqt_layers(model)["model.layers.1.self_attn.v_proj"].B[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.self_attn\.v_proj has values that are not finite"):
        export(model, config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["codes", "absmax", "dense", "missing", "extra", "config", "disk"])
def test_whatever_does_not_verify_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The files are tampered with between writing and verifying; the hash is told so, except for one."""
    config = llama(**SHAPES["wide"])
    model = trained(config)
    write_weights = run_module.writer.write_weights

    def tampered(directory: Path, *arguments: Any) -> Any:
        written = write_weights(directory, *arguments)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        if fault == "codes":
            tensors[name] = tensors[name].flip(0).contiguous()
        elif fault == "absmax":
            tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"].flip(0).contiguous()
        elif fault == "dense":
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
        elif fault == "missing":
            del tensors["model.norm.weight"]
        elif fault == "extra":
            tensors["model.extra.weight"] = torch.zeros(2)
        if fault == "disk":
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")
            return written
        save_file(tensors, path, metadata={"format": "pt"})
        written.files["model.safetensors"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        written.weight_map.clear()
        written.weight_map.update(dict.fromkeys(tensors, "model.safetensors"))
        return written

    monkeypatch.setattr(run_module.writer, "write_weights", tampered)
    if fault == "config":
        monkeypatch.setattr(run_module.writer, "skipped_modules", lambda *_: ["lm_head", "model.layers.1.mlp.up_proj"])
    problems = {
        "codes": "up_proj reads back with a merge error of",
        "absmax": "up_proj reads back with a merge error of",
        "dense": "logits differ",
        "missing": "missing_keys",
        "extra": "unexpected_keys",
        "config": "transformers|Linear4bit",
        "disk": "reads back differently",
    }
    # `codes` and `absmax` are self-consistent files with other weights: only a comparison with the source sees that.
    with pytest.raises(ExportError, match=problems[fault]):
        export(model, config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_dequantization_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of logits is not blind: with the patch switched off, the odd widths fail."""

    def left_wrong(_: str, module: Any) -> bool:
        module.support_avx512bf16_for_cpu = False
        return False

    monkeypatch.setattr(verify_module, "_put_right", left_wrong)
    config = llama(**SHAPES["odd"])
    with pytest.raises(ExportError, match="logits differ by"):
        export(trained(config), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_what_is_needed_is_refused(tmp_path: Path) -> None:
    config = llama()
    model = trained(config)
    path = save_checkpoint(tmp_path / "a", 1, tensors={"model": model.state_dict()}, metadata={}, keep=0)
    with pytest.raises(ExportError, match="metadata has no 'model_config'"):
        export_checkpoint(path, tmp_path / "out", say=silent)
    other = llama(intermediate_size=128)
    path = checkpoint_of(model, other, tmp_path / "b", loqt={})
    with pytest.raises(ExportError, match="does not fit the model it describes"):
        export_checkpoint(path, tmp_path / "out", say=silent)
    deeper = llama(num_hidden_layers=3)
    path = checkpoint_of(model, deeper, tmp_path / "c", loqt={})
    with pytest.raises(ExportError, match=r"lacks .*layers\.2"):
        export_checkpoint(path, tmp_path / "out", say=silent)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out", say=silent)
    assert AutoConfig.for_model("llama") is not None and not (tmp_path / "out").exists()
