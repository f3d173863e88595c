"""Which linears are adapted, and models built or loaded layer by layer: against transformers' own models and files."""

from __future__ import annotations

import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, as_ranks, dense_state, llama_config, relative, token_batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from loqt_ds.config import LoQTConfig
from loqt_ds.core.quantization import quantize
from loqt_ds.method.conversion import (
    build_empty,
    build_meta,
    build_model,
    checkpoint_files,
    convert,
    initializer,
    loqt_layers,
    materialize,
    target_linears,
)
from loqt_ds.method.linear import LoQTLinear

NF4 = dict(rank=4)
DENSE = dict(rank=4, quantize_w="none", quantize_p="none", compensation_steps=5)


def small(cls: type, **changes: Any) -> Any:
    """A config of two small layers; unknown keys of an architecture are given in `changes`."""
    values: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return cls(**(values | changes))


ARCHITECTURES = {
    "llama": lambda: llama_config(num_hidden_layers=2),
    "llama-tied": lambda: llama_config(tie_word_embeddings=True),
    "gpt-neox": lambda: small(GPTNeoXConfig, intermediate_size=86),
    "qwen2": lambda: small(Qwen2Config, intermediate_size=86, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": lambda: small(MistralConfig, intermediate_size=86, num_key_value_heads=2),
    "gemma": lambda: small(GemmaConfig, intermediate_size=86, num_key_value_heads=2, head_dim=8),
    "opt": lambda: small(OPTConfig, ffn_dim=86, word_embed_proj_dim=32, dropout=0.0),
}


# ---------------------------------------------------------------- which linears


class Net(nn.Module):
    """Attention read by its parent, a shared weight, a head, and ordinary linears."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.shared_a, self.shared_b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.shared_b.weight = self.shared_a.weight
        self.head = nn.Linear(12, 7)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_all_linear_leaves_out_the_head_shared_weights_and_attention_internals():
    assert set(target_linears(Net(), "all-linear")) == {"first", "second"}


def test_all_linear_leaves_out_weights_of_one_row():
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts=2)
    with torch.device("meta"):
        description = Qwen2MoeConfig(vocab_size=VOCAB, moe_intermediate_size=24, **shape)
        model = Qwen2MoeForCausalLM(description)
    chosen = target_linears(model, "all-linear")
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert model.get_submodule(gate).weight.shape == (1, 32)
    assert "model.layers.0.mlp.shared_expert.up_proj" in chosen and gate not in chosen
    assert gate in target_linears(model, ["shared_expert_gate"])  # asked for by name: refused by its rank
    converted = build_meta(description, LoQTConfig(rank=4))
    assert converted.get_submodule(gate).weight.requires_grad
    with pytest.raises(ValueError, match=r"loqt.rank=4 .* side \(1\) of model.layers.0.mlp.shared_expert_gate"):
        build_meta(description, LoQTConfig(rank=4, target_modules=["shared_expert_gate"]))


def test_patterns_match_whole_names_and_suffixes_whole_components():
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(num_hidden_layers=2))
    assert list(target_linears(model, r"model\.layers\.1\..*")) == [
        name for name in dict(model.named_modules()) if name.startswith("model.layers.1.") and name.endswith("_proj")
    ]
    with pytest.raises(ValueError, match="matches no linear"):
        target_linears(model, "q_proj")  # a pattern has to match the whole name
    assert set(target_linears(model, ["q_proj", "mlp.down_proj"])) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    with pytest.raises(ValueError, match="'proj' matches no linear"):
        target_linears(model, ["q_proj", "proj"])


@pytest.mark.parametrize("pattern", ["nothing", ["q_proj", "nothing"], "model.layers.0.mlp", []], ids=str)
def test_an_unmatched_pattern_lists_what_there_is(pattern):
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(num_hidden_layers=2))
    with pytest.raises(ValueError) as caught:
        target_linears(model, pattern)
    message = str(caught.value)
    assert "loqt.target_modules" in message
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert f"model.layers.N.self_attn.{name}" in message
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.N.mlp.{name}" in message
    assert "lm_head" not in message


@pytest.mark.parametrize("pattern", [["head"], "first|head", ["shared_a"], "shared_.*"], ids=str)
def test_the_head_and_shared_weights_are_refused(pattern):
    with pytest.raises(ValueError, match="trained in full") as caught:
        target_linears(Net(), pattern)
    assert re.search("head|shared_a", str(caught.value))


def test_not_a_regular_expression():
    with pytest.raises(ValueError, match="not a regular expression"):
        target_linears(Net(), "(first")


def test_a_rank_above_the_smaller_side_names_the_layer():
    with pytest.raises(ValueError) as caught:
        build_meta(llama_config(), LoQTConfig(rank=17))
    # k_proj and v_proj have two of four heads: 16 outputs.
    message = str(caught.value)
    assert "loqt.rank=17" in message and "(16)" in message and "model.layers.0.self_attn.k_proj" in message
    build_meta(llama_config(), LoQTConfig(rank=16))


# ---------------------------------------------------------------- convert


def test_convert_in_place_keeps_the_function_and_everything_else():
    model = Net()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(5, 12)
    before = model.second(model.first(x)), model.attention(x, x, x)[0], model.head(x)
    originals = convert(model, LoQTConfig(**DENSE, side="left"))
    assert set(originals) == {"first", "second"} == set(loqt_layers(model))
    assert all(layer.side == "left" for layer in loqt_layers(model).values())
    for name, original in originals.items():
        assert torch.equal(original, expected[f"{name}.weight"])
    after = model.second(model.first(x)), model.attention(x, x, x)[0], model.head(x)
    for one, other in zip(before, after, strict=True):
        assert relative(one, other) < 1e-6
    for name, parameter in model.named_parameters():
        if not name.endswith(".B"):
            assert torch.equal(parameter, expected[name]), name
        else:
            assert not parameter.any()
    assert type(model.attention.out_proj) is not nn.Linear and model.second.bias is None


def test_convert_takes_the_dtype_and_mode_of_what_it_replaces():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).to(torch.bfloat16).eval()
    convert(model, LoQTConfig(rank=2))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(isinstance(m, LoQTLinear) and not m.training for m in model)


# ---------------------------------------------------------------- building from an initializer


def build(name: str, loqt: dict[str, Any], seed: int = 0, **kwargs: Any) -> tuple[nn.Module, Any]:
    return build_model(ARCHITECTURES[name](), LoQTConfig(**loqt), initializer(seed), **kwargs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_complete_trains_and_computes_what_transformers_computes(name):
    model, source = build(name, DENSE)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    dense = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32)
    linears = {n for n, m in dense.named_modules() if type(m) is nn.Linear and m is not dense.get_output_embeddings()}
    assert set(loqt_layers(model)) == linears
    missing, unexpected = dense.load_state_dict(dense_state(model), strict=False)
    assert not unexpected and all("lm_head" in key for key in missing), (missing, unexpected)
    dense.tie_weights()
    ids = token_batch(0)[:, :-1]
    with torch.no_grad():
        assert relative(model.eval()(input_ids=ids).logits, dense.eval()(input_ids=ids).logits) < 1e-5

    # With B and P zero, only the parameters trained in full have a gradient: all of them do.
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    for layer in loqt_layers(model):
        assert torch.equal(source.weight(layer), dense.get_parameter(f"{layer}.weight").detach())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt-neox", "qwen2", "gemma", "opt"])
def test_the_distribution_is_the_one_of_the_models_own_initializer(name):
    model, source = build(name, DENSE)
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=torch.float32)
    layers, parameters = loqt_layers(model), dict(model.named_parameters())
    checked = 0
    for key, expected in reference.named_parameters():
        owner = key.removesuffix(".weight")
        actual, expected = (source.weight(owner) if owner in layers else parameters[key]).detach(), expected.detach()
        assert actual.shape == expected.shape
        if expected.std() == 0 or expected.numel() < 2:
            assert torch.equal(actual, expected), key  # norms, biases
            continue
        # Standard deviations of n numbers agree within about 1/√n; five times that is never by chance.
        room = 5 / math.sqrt(expected.numel())
        assert abs(float(actual.std() / expected.std()) - 1) < room, key
        assert abs(float(actual.mean())) < room * float(expected.std()), key
        checked += 1
    assert checked >= len(layers) + 1


def test_weights_depend_on_seed_and_name_only():
    one, _ = build("llama", NF4, seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    two, source = build("llama", NF4, seed=3)
    source.weight("model.layers.0.mlp.up_proj")
    assert torch.equal(before, torch.get_rng_state())
    other, _ = build("llama", NF4, seed=4)
    a, b, c = one.state_dict(), two.state_dict(), other.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert not torch.equal(a["model.layers.0.mlp.up_proj.w_codes"], c["model.layers.0.mlp.up_proj.w_codes"])
    assert not torch.equal(a["model.layers.0.mlp.up_proj.w_codes"], a["model.layers.1.mlp.up_proj.w_codes"])


class Sharing(nn.Module):
    """A weight that three modules have, which ranks of one round and of another come to, and a linear to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.between, self.last = (nn.Linear(12, 12) for _ in range(4))
        self.other.weight = self.last.weight = self.one.weight


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_shared_is_drawn_under_its_first_name_by_any_number_of_ranks(world_size):
    def make(ranks):
        with torch.device("meta"):
            net = Sharing()
        model, source = materialize(net, LoQTConfig(**DENSE), initializer(5), ranks=ranks)
        return model, source.module("one", nn.Linear(12, 12, device="meta"))["weight"]

    for model, drawn in as_ranks(world_size, make):
        assert model.one.weight is model.other.weight and model.one.weight is model.last.weight
        assert torch.equal(model.one.weight, drawn)
        biases = [getattr(model, name).bias for name in ("one", "other", "last")]
        assert not any(torch.equal(biases[0], bias) for bias in biases[1:])


def test_drawing_weights_leaves_the_random_state_of_every_device_alone(monkeypatch):
    # torch.manual_seed also seeds every CUDA device, which forking the CPU's state does not undo.
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    _, source = build("llama", NF4)
    source.weight("model.layers.0.mlp.up_proj")
    assert seeded == []


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("kind", ["nf4", "int4", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_drawn_again_is_the_one_that_was_quantized(name, kind, dtype):
    model, source = build(name, dict(rank=4, quantize_w=kind), dtype=dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    for layer_name, layer in loqt_layers(model).items():
        weight = source.weight(layer_name)
        assert weight.dtype == torch.float32
        packed = quantize(weight, layer.spec_w)
        assert all(torch.equal(packed[key], stored) for key, stored in layer.packed_w().items())
        assert not layer.B.any() and not layer.basis_hat().any()


def test_tied_embeddings_stay_one_parameter():
    for name in ("llama-tied", "qwen2"):
        model, _ = build(name, NF4)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert sum(p is model.get_input_embeddings().weight for p in model.parameters()) == 1
        model(input_ids=token_batch(0)[:, :-1]).logits.sum().backward()
        assert model.get_input_embeddings().weight.grad is not None


def test_the_meta_model_has_the_same_tensors():
    for name in ("llama", "llama-tied", "qwen2"):
        for dtype in (torch.float32, torch.bfloat16):
            loqt = LoQTConfig(**NF4)
            meta = build_meta(ARCHITECTURES[name](), loqt, dtype=dtype)
            real, _ = build(name, NF4, dtype=dtype)
            assert all(p.is_meta for p in meta.parameters())

            def described(model: nn.Module) -> dict[str, tuple]:
                return {k: (v.shape, v.dtype) for k, v in (*model.named_parameters(), *model.state_dict().items())}

            assert described(meta) == described(real)


def test_an_initializer_that_forgets_a_parameter_is_noticed(monkeypatch):
    def forgetful(self: Any, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight)

    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", forgetful)
    monkeypatch.setattr(LlamaForCausalLM.__mro__[1], "_init_weights", forgetful)
    with pytest.raises(ValueError, match=r"uninitialized"):
        build("llama", NF4)


# ---------------------------------------------------------------- reading a checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories that transformers itself wrote: single, sharded, bf16, with biases and tied embeddings."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"](), dtype=torch.float32)
    llama.save_pretrained(root / "single")
    llama.save_pretrained(root / "sharded", max_shard_size="20KB")
    AutoModelForCausalLM.from_config(ARCHITECTURES["llama"](), dtype=torch.bfloat16).save_pretrained(root / "bf16")
    qwen = AutoModelForCausalLM.from_config(ARCHITECTURES["qwen2"](), dtype=torch.float32)
    for name, parameter in qwen.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # the initializer's zeros would prove nothing
    qwen.save_pretrained(root / "qwen2")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    return {path.name: path for path in root.iterdir()}


def load(directory: Path, loqt: dict[str, Any], config: Any = None, **kwargs: Any) -> tuple[nn.Module, Any]:
    config = config or AutoModelForCausalLM.from_pretrained(directory).config
    return build_model(config, LoQTConfig(**loqt), checkpoint_files(directory), **kwargs)


@pytest.mark.parametrize("name", ["single", "sharded", "bf16", "qwen2"])
def test_a_loaded_model_computes_what_transformers_computes(saved, name):
    model, source = load(saved[name], DENSE)
    reference = AutoModelForCausalLM.from_pretrained(saved[name], dtype=torch.float32)
    ids = token_batch(0)[:, :-1]
    with torch.no_grad():
        assert relative(model.eval()(input_ids=ids).logits, reference.eval()(input_ids=ids).logits) < 1e-5
    for layer in loqt_layers(model):
        weight = source.weight(layer)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, reference.get_parameter(f"{layer}.weight").detach())


@pytest.mark.parametrize("name", ["single", "sharded", "bf16", "qwen2"])
def test_loaded_weights_are_quantized_from_the_file(saved, name):
    model, _ = load(saved[name], NF4, dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(saved[name], dtype=torch.float32)
    for layer_name, layer in loqt_layers(model).items():
        packed = quantize(reference.get_parameter(f"{layer_name}.weight").detach(), layer.spec_w)
        assert all(torch.equal(packed[key], stored) for key, stored in layer.packed_w().items())


def copy_with(source: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def refused(directory: Path, config: Any = None) -> str:
    with pytest.raises(ValueError) as caught:
        load(directory, NF4, config or ARCHITECTURES["llama"]())
    message = str(caught.value)
    assert str(directory) in message and "model.path" in message
    return message


def test_a_missing_tensor_is_named(saved, tmp_path):
    missing = "model.layers.1.mlp.up_proj.weight"
    directory = copy_with(saved["single"], tmp_path / "a", lambda tensors: tensors.pop(missing))
    assert missing in refused(directory)


def test_a_tensor_without_a_place_is_named(saved, tmp_path):
    directory = copy_with(
        saved["single"], tmp_path / "a", lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(86)})
    )
    assert "model.layers.0.mlp.up_proj.bias" in refused(directory)


def test_a_tensor_of_another_shape_is_named(saved, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    directory = copy_with(saved["single"], tmp_path / "a", lambda t: t.update({name: torch.zeros(85, 32)}))
    message = refused(directory)
    assert name in message and "(85, 32)" in message and "(86, 32)" in message


def test_another_models_files_are_refused(saved):
    refused(saved["single"], ARCHITECTURES["qwen2"]())
    refused(saved["single"], llama_config(num_hidden_layers=3))
    refused(saved["single"], ARCHITECTURES["opt"]())


def test_pickled_and_absent_files_are_refused(saved, tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert ".bin" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((saved["single"] / "model.safetensors").read_bytes()[:1000])
    assert "cannot be read" in refused(tmp_path)


def test_a_missing_shard_is_named(saved, tmp_path):
    for path in saved["sharded"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / shard).unlink()
    assert shard in refused(tmp_path)


def test_a_tied_checkpoint_may_hold_the_head_as_well(saved, tmp_path):
    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    directory = copy_with(saved["qwen2"], tmp_path / "a", add_head)
    (directory / "config.json").write_bytes((saved["qwen2"] / "config.json").read_bytes())
    model, _ = load(directory, NF4, ARCHITECTURES["qwen2"]())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_tied_head_may_be_stored_in_another_dtype(saved, tmp_path):
    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16()

    directory = copy_with(saved["qwen2"], tmp_path / "a", add_head)
    load(directory, NF4, ARCHITECTURES["qwen2"]())


def test_linears_that_share_a_bias_have_one_each():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

    class Given:
        def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
            return {"weight": torch.ones(8, 8), "bias": torch.arange(8.0)}

    with torch.device("meta"):
        model = Pair()
    made, _ = materialize(model, LoQTConfig(rank=2), lambda _: Given())
    layers = loqt_layers(made)
    assert all(torch.equal(layers[name].bias, torch.arange(8.0)) for name in "ab")


def test_a_head_of_its_own_in_a_tied_checkpoint_is_refused(saved, tmp_path):
    """transformers keeps the two apart; a model with one of them is another."""

    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    directory = copy_with(saved["qwen2"], tmp_path / "a", add_head)
    message = refused(directory, ARCHITECTURES["qwen2"]())
    assert "lm_head.weight" in message and "tie_word_embeddings" in message


# ---------------------------------------------------------------- what transformers makes


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_an_encoder_is_no_causal_language_model_unless_it_says_so(name):
    from transformers import AutoConfig

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model(name, vocab_size=53, **small)
    with pytest.raises(ValueError, match=r"model\.task=causal_lm: a .* sees the tokens .*masked_lm"):
        build_empty(config)
    assert isinstance(build_empty(config, task="masked_lm"), nn.Module)
    config.is_decoder = True
    assert isinstance(build_empty(config), nn.Module)


@pytest.mark.parametrize("name", ["gpt_neox", "bart"])
def test_decoders_that_say_false_of_themselves_are_causal(name):
    """The word means nothing to GPT-NeoX, and BART's decoder sets it for itself. Seen on weights, not on words."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if name == "bart":
        small = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    config = AutoConfig.for_model(name, vocab_size=53, **small)
    assert config.is_decoder is False
    build_empty(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    other = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :3], model(other).logits[:, :3])


def test_a_package_that_is_missing_is_told_as_that():
    with pytest.raises(ValueError, match=r"model\.attention=flash_attention_2 needs a package: .*[Ff]lash") as caught:
        build_empty(llama_config(), attention="flash_attention_2")
    assert "correct it" not in str(caught.value)


def test_what_transformers_cannot_make_is_told_as_a_mistake_in_the_file():
    with pytest.raises(ValueError, match=r"cannot make a llama .*nonsense"):
        build_empty(llama_config(hidden_act="nonsense"))


# ---------------------------------------------------------------- memory


class CountingSource:
    """Notes how many full-precision linear weights that it handed out are still alive when something is asked for."""

    def __init__(self, inner: Any, linears: set[str]) -> None:
        self._inner, self._linears = inner, linears
        self._storages: list[weakref.ref] = []
        self.most_alive = 0

    def count(self) -> int:
        self.most_alive = max(self.most_alive, sum(storage() is not None for storage in self._storages))
        return len(self._storages)

    def module(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        self.count()
        tensors = self._inner.module(name, module)
        if name in self._linears:
            # The storage, not the tensor: views and parameters of the same memory count.
            self._storages.append(weakref.ref(tensors["weight"].untyped_storage()))
        return tensors

    def weight(self, name: str) -> Tensor:
        return self._inner.weight(name)


@pytest.mark.parametrize("origin", ["initializer", "files"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_never_two_full_precision_weights_at_once(saved, origin, name):
    make = initializer(0) if origin == "initializer" else checkpoint_files(saved[{"llama": "single"}.get(name, name)])
    counting: list[CountingSource] = []

    def source(model: nn.Module) -> CountingSource:
        counting.append(CountingSource(make(model), set(target_linears(model, "all-linear"))))
        return counting[0]

    model, _ = build_model(ARCHITECTURES[name](), LoQTConfig(**NF4), source)
    # What was handed out is gone when the next is asked for, and at the end.
    assert counting[0].count() == len(loqt_layers(model)) == 14
    assert counting[0].most_alive == 0

    # The counter sees what is kept: a source's caller that holds on to one.
    held = counting[0].module("model.layers.0.mlp.up_proj", nn.Linear(32, 86, bias=False))
    counting[0].count()
    assert counting[0].most_alive == 1 and held


# ---------------------------------------------------------------- W kept dequantized


def test_the_first_layers_are_kept_dequantized_as_far_as_there_is_room():
    """The same ones, whichever way the model is made."""
    config = llama_config(num_hidden_layers=2)
    layers = loqt_layers(build_meta(config, LoQTConfig(**NF4)))
    names, sizes = list(layers), [2 * layer.out_features * layer.in_features for layer in layers.values()]
    for num in (0, 1, 5, len(names)):
        for more in (0, -1) if num else (0,):
            loqt = LoQTConfig(**NF4, dequantized_cache_gib=(sum(sizes[:num]) + more) / 2**30)
            expected = names[: num + more]
            converted = LlamaForCausalLM(config).bfloat16()
            convert(converted, loqt)
            made = [
                build_meta(config, loqt, dtype=torch.bfloat16),
                converted,
                build_model(config, loqt, initializer(0), dtype=torch.bfloat16)[0],
            ]
            for model in made:
                kept = [name for name, layer in loqt_layers(model).items() if layer.keeps_dequantized]
                assert kept == expected
