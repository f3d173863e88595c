"""The adapter as PEFT loads it, against the trained model and against float64; bases that are shared, and refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_export import SHAPES, checkpoint_of, export, llama, logits, lookup, relative, silent, stored_tensors, trained
from transformers import AutoModelForCausalLM

from loqt_ds.config import ConfigError, LoQTConfig, load_config
from loqt_ds.core.quantization import quantize
from loqt_ds.export import ExportError, adapter, check_export, check_shared_base, export_checkpoint, load_export
from loqt_ds.export import run as run_module
from loqt_ds.export.__main__ import main
from loqt_ds.export.base import check_base
from loqt_ds.generate import main as generate
from loqt_ds.method.conversion import convert, loqt_layers

peft = pytest.importorskip("peft", reason="the adapter extra is not installed")


def by_peft(base: Path, adapter_dir: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """As somebody loads it who knows nothing of loqt_ds."""
    model = kind.from_pretrained(base, device_map={"": "cpu"}, **options)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return peft.PeftModel.from_pretrained(model, adapter_dir)


def train_on(model: Any, *, everything: bool = False) -> None:
    """What another task makes of the same base: P and B are others, W_q is not."""
    with torch.no_grad():
        for layer in loqt_layers(model).values():
            layer.set_p(quantize(torch.linalg.qr(torch.randn(layer.basis_shape))[0], layer.spec_p))
            layer.B.normal_(std=0.03)
        for name, parameter in model.named_parameters():
            if everything and not name.endswith(".B"):
                parameter.add_(torch.randn_like(parameter) * 0.02)


CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "nf4": ("gqa", {}, torch.float32),
    "double": ("biases", {"double_quant": "both"}, torch.float32),
    "int4": ("odder", {"quantize_w": "int4", "quantize_p": "fp4", "side": "left"}, torch.float32),
    "nq": (
        "tied",
        {"quantize_w": "none", "quantize_p": "none", "target_modules": ["k_proj", "up_proj"]},
        torch.float32,
    ),
    "bf16": ("tied", {"alpha": 0.3}, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_trained_models_logits(tmp_path: Path, case: str) -> None:
    shape, options, dtype = CASES[case]
    config = llama(**SHAPES[shape])
    model = trained(config, dtype=dtype, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = export(model, config, tmp_path / "out", format="adapter")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    reloaded = by_peft(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
    difference = relative(logits(reloaded), logits(model))
    assert difference < (1e-5 if dtype == torch.float32 else 0.02)
    assert report.adapter.logits_relative_difference == pytest.approx(difference, abs=1e-2)
    assert relative(logits(reloaded.get_base_model()), logits(model)) < 0.02
    with reloaded.disable_adapter():  # the base alone is something else: the comparison is not blind
        assert relative(logits(reloaded), logits(model)) > 0.02
    stored = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert stored["task_type"] == "CAUSAL_LM" and stored["base_model_name_or_path"] == str(tmp_path / "out" / "base")


def test_float64_says_what_a_and_b_are(tmp_path: Path) -> None:
    """W of the base's file, plus alpha / r times the stored B A, for both sides."""
    config = llama(**SHAPES["wide"])
    model = trained(config, alpha=0.7)
    export(model, config, tmp_path / "out", format="adapter")
    base = stored_tensors(tmp_path / "out" / "base")
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    layers = loqt_layers(model)
    assert {layer.side for layer in layers.values()} == {"left", "right"}
    assert len(stored) == 2 * len(layers)
    for name, layer in layers.items():
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert torch.equal(base[f"{name}.weight"].view(-1), layer.packed_w()["codes"])
        weight = lookup(base, name, layer.weight_shape).double() + settings["lora_alpha"] / settings["r"] * (b @ a)
        p, factor = layer.basis_hat().double(), layer.B.detach().double()
        product = factor @ p.T if layer.side == "right" else p @ factor
        assert relative(weight, layer.weight_q().double() + 0.7 * product) < 1e-6


@pytest.mark.parametrize(
    ("shape", "everything"),
    [("biases", True), ("tied", False), pytest.param("tied", True, marks=pytest.mark.slow)],
)
def test_tasks_share_a_base(tmp_path: Path, shape: str, everything: bool) -> None:
    """What the second task has trained beside P and B travels in its adapter; the base is not touched."""
    config = llama(**SHAPES[shape])
    model = trained(config)
    export(model, config, tmp_path / "one", format="adapter")
    base = tmp_path / "one" / "base"
    files = {path: path.read_bytes() for path in base.iterdir()}
    train_on(model, everything=everything)
    report = export(model, config, tmp_path / "two", format="adapter", base_dir=base)
    assert files == {path: path.read_bytes() for path in base.iterdir()}
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["adapter", "export_report.json"]
    assert relative(logits(by_peft(base, tmp_path / "two" / "adapter")), logits(model)) < 1e-5
    assert relative(logits(load_export(tmp_path / "two")), logits(model)) < 1e-5
    kept = {"lm_head", "model.norm", "model.embed_tokens", "model.layers.1.input_layernorm"}
    assert (set(report.adapter.modules_to_save) >= kept) == everything
    biases = [name for name in load_file(tmp_path / "two/adapter/adapter_model.safetensors") if name.endswith("B.bias")]
    assert len(biases) == (14 if everything and shape == "biases" else 0)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    config = llama()
    model = trained(config)
    export(model, config, tmp_path / "one", format="adapter")
    base = tmp_path / "one" / "base"
    with torch.no_grad():
        layer = loqt_layers(model)["model.layers.1.mlp.up_proj"]
        layer.set_w(quantize(torch.randn(layer.weight_shape), layer.spec_w))
    with pytest.raises(ExportError, match=r"up_proj holds other values\. Leave --base out .*compensation_steps"):
        export(model, config, tmp_path / "two", format="adapter", base_dir=base)
    with pytest.raises(ExportError, match="is stored in another format than fp4"):
        export(trained(config, quantize_w="fp4"), config, tmp_path / "two", format="adapter", base_dir=base)
    shallow = llama(num_hidden_layers=1)
    with pytest.raises(ExportError, match="is a base of another model: it has model.layers.1"):
        small = trained(llama())
        del small.model.layers[1]
        export(small, shallow, tmp_path / "two", format="adapter", base_dir=base)
    # And when it is used: by the checksums.
    export(model, config, tmp_path / "two", format="adapter")
    with pytest.raises(ExportError, match=r"belongs to another base .*model\.safetensors differs.*--base"):
        check_base(tmp_path / "two" / "adapter", base)
    shutil.rmtree(tmp_path / "two" / "base")
    with pytest.raises(ExportError, match="is not there; give the directory"):
        load_export(tmp_path / "two")
    shutil.copytree(base, tmp_path / "two" / "base")
    with pytest.raises(ExportError, match="belongs to another base"):
        load_export(tmp_path / "two")


def test_a_base_that_has_moved_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = llama()
    model = trained(config)
    export(model, config, tmp_path / "one", format="adapter")
    other = trained(config)
    with torch.no_grad():
        other.model.norm.weight.add_(0.1)
    export(other, config, tmp_path / "other", format="adapter")
    base, own = tmp_path / "moved", tmp_path / "one" / "adapter"
    (tmp_path / "one" / "base").rename(base)
    with pytest.raises(ExportError, match=r"one/base of the adapter .* is not there; .*load_export\(DIR, base=BASE\)"):
        load_export(own)
    for directory in (own, tmp_path / "one"):
        assert relative(logits(load_export(directory, base=base)), logits(model)) < 1e-5
    with pytest.raises(ExportError, match=r"belongs to another base than .*other/base: model\.safetensors differs"):
        load_export(own, base=tmp_path / "other" / "base")
    with pytest.raises(ExportError, match="is a model of its own; leave base out"):
        load_export(base, base=base)
    # Both get as far as the tokenizer, which this base lacks.
    for given in (own, tmp_path / "one"):
        assert generate(["--model", str(base), "--adapter", str(given), "--prompt", "x"]) == 2
        assert f"data.tokenizer={base}" in capsys.readouterr().err


def test_requests_that_cannot_be_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama()
    model = trained(config)
    for options, problem in (
        ({"double_quant": True}, "double quantization needs format=nf4, not format=adapter"),
        ({"base_dir": tmp_path}, "is no model directory"),
    ):
        with pytest.raises(ExportError, match=problem):
            export(model, config, tmp_path / "out", format="adapter", **options)
    with pytest.raises(ExportError, match="--base is of an adapter"):
        export(model, config, tmp_path / "out", base_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExportError, match=r"loqt-ds\[adapter\]"):
        export(model, config, tmp_path / "out", format="adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["scale", "factor", "bias"])
def test_what_does_not_verify_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    config = llama(**SHAPES["biases"])
    model = trained(config)
    if fault == "scale":
        monkeypatch.setattr(adapter, "_alpha", lambda rank, scale: 2 * rank * scale)
    elif fault == "factor":
        factors = adapter.lora_factors

        def wrong(layer: Any, factor: Any = None) -> Any:
            made = factors(layer, factor)
            return adapter.Factors(made.a, made.b.flip(0).contiguous(), made.scale)

        monkeypatch.setattr(adapter, "lora_factors", wrong)
    else:
        export(model, config, tmp_path / "one", format="adapter")
        shutil.move(tmp_path / "one" / "base", tmp_path / "base")
        shutil.rmtree(tmp_path / "one")
        with torch.no_grad():
            loqt_layers(model)["model.layers.0.mlp.up_proj"].bias.add_(1.0)
        monkeypatch.setattr(run_module, "contents_of", lambda *_, **__: adapter.Contents())
    base = tmp_path / "base" if fault == "bias" else None
    with pytest.raises(
        ExportError, match="logits of base and adapter" if fault == "bias" else "q_proj of base and ada"
    ):
        export(model, config, tmp_path / "out", format="adapter", base_dir=base)
    assert not (tmp_path / "out").exists()


def test_masters_are_used(tmp_path: Path) -> None:
    """From a checkpoint whose parameters are bf16 and whose masters are float32."""
    config = llama(attention_bias=True)
    fine, coarse = trained(config), trained(config)
    masters = {name: value.detach().clone() for name, value in fine.named_parameters()}
    for parameter in coarse.parameters():
        parameter.data = torch.zeros_like(parameter, dtype=torch.bfloat16)
    checkpoint_of(coarse, config, tmp_path / "run", loqt={}, masters=masters)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    export_checkpoint(tmp_path / "run", tmp_path / "out", format="adapter", say=silent)
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(stored[f"base_model.model.{name}.lora_B.weight"], fine.get_submodule(name).B)
    assert stored_tensors(tmp_path / "out" / "base")["model.norm.weight"].dtype == torch.bfloat16


def test_the_command_writes_a_base_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = llama()
    path = checkpoint_of(trained(config), config, tmp_path / "checkpoints", loqt={})
    common = ["--checkpoint", str(path), "--format", "adapter", "--output"]
    assert main([*common, str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    assert "as an adapter of rank 8" in said and "loaded with PEFT: logits differ by" in said
    assert f"PeftModel.from_pretrained(model, {str(tmp_path / 'one' / 'adapter')!r})" in said
    base = tmp_path / "one" / "base"
    assert main([*common, str(tmp_path / "two"), "--base", str(base)]) == 0
    assert str(base) in capsys.readouterr().out and not (tmp_path / "two" / "base").exists()
    report = json.loads((tmp_path / "two" / "export_report.json").read_text())
    assert report["adapter"]["base"] == str(base) and report["adapter"]["logits_relative_difference"] < 1e-2


def test_a_cpu_that_computes_in_bf16_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the note says to do, does it (on any CPU: it is asked once, when a layer is made)."""
    config = llama()
    model = trained(config)
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)
    for directory, options in (
        ("nf4", {"format": "nf4"}),
        ("one", {"format": "adapter"}),
        ("two", {"format": "adapter", "base_dir": tmp_path / "one" / "base"}),
    ):
        report = export(model, config, tmp_path / directory, **options)
        assert sum("bitsandbytes.nn.modules.has_avx512bf16 = lambda: False" in note for note in report.notes) == 1
    assert not export(model, config, tmp_path / "bf16", format="bf16").notes
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: False)
    assert not export(model, config, tmp_path / "three", format="adapter").notes
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "base")
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "one" / "adapter")
    assert relative(logits(reloaded), logits(model)) < 1e-5


# ---------------------------------------------------------------------------------------------------- other models


def converted(model: Any, **loqt: Any) -> Any:
    """A model of any kind with LoQT layers whose P and B are random."""
    torch.manual_seed(3)
    model = model.eval()
    convert(model, LoQTConfig(**({"rank": 4, "alpha": 0.5} | loqt)))
    train_on(model)
    return model


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def gpt2() -> Any:
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 96, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=1, eos_token_id=2))


def bert(num_labels: int) -> Any:
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.BertConfig(**shape, vocab_size=96, max_position_embeddings=32, num_labels=num_labels)
    return transformers.BertForSequenceClassification(config)


@pytest.mark.parametrize("quantize_w", ["nf4", "none"])
def test_transposed_layers(tmp_path: Path, quantize_w: str) -> None:
    """GPT-2: in the files of a dense base its weights are (in, out)."""
    model = converted(gpt2(), quantize_w=quantize_w)
    export(model, model.config, tmp_path / "out", format="adapter")
    reloaded = by_peft(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
    inputs = {"input_ids": torch.arange(40).view(2, 20)}
    assert relative(outputs(reloaded, inputs), outputs(model, inputs)) < 1e-5
    train_on(model, everything=True)
    export(model, model.config, tmp_path / "two", format="adapter", base_dir=tmp_path / "out" / "base")
    assert relative(outputs(load_export(tmp_path / "two"), inputs), outputs(model, inputs)) < 1e-5


def test_classifiers_share_an_encoder(tmp_path: Path) -> None:
    """Each adapter has the head of its task, with its own number of classes."""
    inputs = {"input_ids": torch.arange(40).view(2, 20)}
    layers = r"bert\.encoder\..*"
    one = converted(bert(2), target_modules=layers)
    report = export(one, one.config, tmp_path / "one", format="adapter")
    assert report.adapter.modules_to_save == ["classifier"]
    base = tmp_path / "one" / "base"
    classifier = by_peft(base, tmp_path / "one" / "adapter", transformers.AutoModelForSequenceClassification)
    assert relative(outputs(classifier, inputs), outputs(one, inputs)) < 1e-5
    other = bert(3)
    other.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    other.config.problem_type = "single_label_classification"
    encoder = {name: value for name, value in one.state_dict().items() if name.startswith("bert.")}
    converted(other, target_modules=layers).load_state_dict(encoder, strict=False)
    train_on(other)
    with torch.no_grad():
        other.bert.pooler.dense.weight.add_(0.1)
    report = export(other, other.config, tmp_path / "two", format="adapter", base_dir=base)
    assert report.adapter.modules_to_save == ["bert.pooler.dense", "classifier"]
    loaded = load_export(tmp_path / "two")
    assert outputs(loaded, inputs).shape == (2, 3)
    assert loaded.config.id2label == other.config.id2label and loaded.config.problem_type == other.config.problem_type
    assert loaded.config.label2id == {"no": 0, "maybe": 1, "yes": 2} and loaded.config.num_labels == 3
    # As README says, for somebody who knows nothing of loqt_ds.
    names = json.loads((tmp_path / "two" / "adapter" / "classes.json").read_text())
    assert names["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    anew = {"num_labels": names["num_labels"], "ignore_mismatched_sizes": True}
    stranger = by_peft(base, tmp_path / "two" / "adapter", transformers.AutoModelForSequenceClassification, **anew)
    assert relative(outputs(stranger, inputs), outputs(other, inputs)) < 1e-5
    assert relative(outputs(loaded, inputs), outputs(other, inputs)) < 1e-5


def test_experts_have_no_adapter(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {"num_key_value_heads": 1, "num_local_experts": 2, "vocab_size": 96, "max_position_embeddings": 32}
    model = converted(transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **small)))
    with pytest.raises(
        ExportError, match=r"experts.* by target_parameters, and what is written .*; use format=bf16, or train with"
    ):
        export(model, model.config, tmp_path / "out", format="adapter")
    without = converted(
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **small)),
        target_modules=["q_proj", "k_proj"],
    )
    export(without, without.config, tmp_path / "out", format="adapter")
    inputs = {"input_ids": torch.arange(40).view(2, 20)}
    assert relative(outputs(load_export(tmp_path / "out"), inputs), outputs(without, inputs)) < 1e-5
    export(without, without.config, tmp_path / "two", format="adapter", base_dir=tmp_path / "out" / "base")


def test_another_base_is_refused_before_training(tmp_path: Path) -> None:
    config = llama()
    model = trained(config)
    export(model, config, tmp_path / "one", format="adapter")
    options = ["export.format=adapter", f"export.base={tmp_path}/one/base", "loqt.schedule=never"]
    off = ["loqt.compensation_steps=1", "loqt.interval=100", "loqt.growth=1.2", "loqt.max_gap=null"]
    of_run = load_config("default", [*options, *off])
    train_on(model, everything=True)
    check_shared_base(of_run, model, config)
    with torch.no_grad():
        layer = loqt_layers(model)["model.layers.0.self_attn.q_proj"]
        layer.set_w(quantize(torch.randn(layer.weight_shape), layer.spec_w))
    wanted = r"^export\.base=.*layers\.0\.self_attn\.q_proj holds other values\. Leave export\.base out"
    with pytest.raises(ExportError, match=wanted):
        check_shared_base(of_run, model, config)


def test_what_the_end_would_refuse_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for overrides, problem in (
        ([f"export.base={tmp_path}"], "export.base=.* has no effect with export.format=nf4"),
        (["export.format=adapter", f"export.base={tmp_path}"], "is no model directory; give the directory base"),
        (["export.format=adapter", f"export.base={tmp_path}/base"], r"set loqt\.schedule=never and"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_config("default", overrides)
    monkeypatch.chdir(tmp_path)
    shared = [
        *("export.format=adapter", "export.base=base", "loqt.schedule=never", "loqt.compensation_steps=1"),
        *("loqt.interval=100", "loqt.growth=1.2", "loqt.max_gap=null"),
    ]
    assert load_config("default", shared).export.base == str(tmp_path / "base")
    gguf = load_config("default", ["export.format=gguf"])
    with_adapter = load_config("default", ["export.format=adapter"])
    mamba = transformers.MambaConfig(vocab_size=96, hidden_size=64, state_size=8, num_hidden_layers=1)
    with pytest.raises(
        ExportError, match=r"PEFT refuses an adapter of .*mixer\.out_proj in a model of type mamba, .*le"
    ):
        check_export(with_adapter, converted(transformers.MambaForCausalLM(mamba)), mamba)
    check_export(with_adapter, converted(transformers.MambaForCausalLM(mamba), target_modules=["x_proj"]), mamba)
    with pytest.raises(ExportError, match="is written for llama, mistral, qwen2, and this is gpt2"):
        check_export(gguf, gpt2(), gpt2().config)
