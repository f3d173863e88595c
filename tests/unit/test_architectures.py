"""What of the method knows which model it is: nothing. Tiny models of many architectures, converted, trained for ten
steps with re-initializations, merged, exported and loaded again by transformers.

The reference is transformers' own model with every adapted weight replaced by W_q + s · (product of P and B), made in
float64 and put where that architecture keeps it (transposed, or a slice of batched experts).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from helpers import VOCAB, effective_weight, make_config, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loqt_ds.config import ConfigError, LoQTConfig
from loqt_ds.config.fields import Config, DataConfig, ModelConfig, TrainConfig
from loqt_ds.engines.base import StepReport
from loqt_ds.engines.single import SingleEngine
from loqt_ds.export import export_model
from loqt_ds.memory import plan
from loqt_ds.method import compiled, head
from loqt_ds.method.conversion import build_model, checkpoint_files, convert, initializer, loqt_layers
from loqt_ds.method.description import model_description
from loqt_ds.method.linear import LoQTLinear
from loqt_ds.method.structure import wanted_experts
from loqt_ds.preflight import check_model

TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = TEXT | dict(intermediate_size=86, num_key_value_heads=2)
ENCODER = TEXT | dict(intermediate_size=86, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
EXPERTS = TEXT | dict(num_key_value_heads=2, num_experts_per_tok=2)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # as GPT-2 spells it
DEBERTA = dict(relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"], num_labels=3)

# name -> (model class, configuration, number of adapted matrices, parts of names that stay in full precision)
MODELS: dict[str, tuple[str, Callable[[], Any], int, tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", lambda: tf.LlamaConfig(**GQA), 14, ("lm_head",)),
    "llama-tied": ("LlamaForCausalLM", lambda: tf.LlamaConfig(**GQA, tie_word_embeddings=True), 14, ()),
    "mistral": ("MistralForCausalLM", lambda: tf.MistralConfig(**GQA, sliding_window=8), 14, ("lm_head",)),
    "qwen3": ("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**GQA, head_dim=8), 14, ("q_norm",)),
    "gemma2": (
        "Gemma2ForCausalLM",
        lambda: tf.Gemma2Config(**GQA, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
        14,
        ("pre_feedforward_layernorm",),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_DROPOUT),
        8,
        ("wte", "wpe", "c_attn.bias"),
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", lambda: tf.GPTNeoXConfig(**TEXT, intermediate_size=86), 8, ("embed_in",)),
    "opt": (
        "OPTForCausalLM",
        lambda: tf.OPTConfig(**TEXT, ffn_dim=86, word_embed_proj_dim=32, dropout=0.0),
        12,
        ("embed_positions",),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        lambda: tf.MixtralConfig(**EXPERTS, intermediate_size=40, num_local_experts=6),
        2 * (4 + 2 * 6),
        ("mlp.gate",),
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        lambda: tf.Qwen3MoeConfig(
            **EXPERTS, intermediate_size=40, moe_intermediate_size=24, num_experts=4, head_dim=8, mlp_only_layers=[1]
        ),
        4 + 2 * 4 + 4 + 3,
        ("mlp.gate.weight",),
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        lambda: tf.DebertaV2Config(**ENCODER, **DEBERTA),
        16,
        ("pooler.dense", "classifier", "rel_embeddings"),
    ),
    "bert": ("BertForMaskedLM", lambda: tf.BertConfig(**ENCODER), 13, ("cls.predictions.bias", "LayerNorm")),
    "vit": (
        "ViTForImageClassification",
        lambda: tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=86,
            image_size=24,
            patch_size=8,
            num_labels=3,
        ),
        12,
        ("classifier", "patch_embeddings"),
    ),
    "mamba": (
        "MambaForCausalLM",
        lambda: tf.MambaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            time_step_rank=4,
        ),
        6,
        ("dt_proj", "A_log", "conv1d"),
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        lambda: tf.WhisperConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=86,
            decoder_ffn_dim=86,
            num_mel_bins=12,
            max_source_positions=10,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        6 + 10,
        ("conv1", "embed_positions"),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: tf.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=86,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        6 + 10,
        ("relative_attention_bias", "shared"),
    ),
}
IN_CI = ("gpt2", "mixtral", "deberta-v2", "mamba", "whisper")
NAMES = [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    cls, config, _, _ = MODELS[name]
    return getattr(tf, cls)._from_config(config(), dtype=torch.float32)


def example(model: Any) -> dict[str, Tensor]:
    """What the model reads, and the labels of its own loss."""
    config, draw = model.config, torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (3, 11), generator=draw)
    rows = torch.randint(0, 3, (3,), generator=draw)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, config.image_size, config.image_size, generator=draw), "labels": rows}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(3, config.num_mel_bins, 20, generator=draw), "labels": tokens}
    return {"input_ids": tokens, "labels": rows if "Sequence" in type(model).__name__ else tokens}


def train(model: nn.Module, originals: dict[str, Tensor], inputs: dict[str, Tensor]) -> tuple[list[float], list[Any]]:
    """Ten steps, the first of which initializes, with two more re-initializations; (losses, reports of these)."""
    config = make_config(loqt=dict(rank=4, interval=4), train=dict(max_steps=10))
    engine = SingleEngine(model, config, original=originals.__getitem__)
    losses, reports = [], []
    for _ in range(10):
        loss = engine(**inputs).loss
        engine.backward(loss)
        report = engine.step()
        assert isinstance(report, StepReport) and report.applied
        losses.append(loss.item())
        reports += [report.reinit] if report.reinit is not None else []
    return losses, reports


@torch.no_grad()
def merged_twin(model: nn.Module, dense: Any) -> Any:
    """transformers' own model (like `dense`) that computes what the converted one does."""
    twin = copy.deepcopy(dense).eval()
    state = twin.state_dict()
    trained = dict(model.named_parameters())
    for name, layer in loqt_layers(model).items():
        weight = effective_weight(layer).float()
        parent, _, last = name.rpartition(".")
        if ".experts." in name:
            state[parent][int(last)] = weight
        else:
            state[f"{name}.weight"].copy_(weight if state[f"{name}.weight"].shape == weight.shape else weight.t())
            if type(twin.get_submodule(name)).__name__ == "Conv1D":
                state[f"{name}.weight"].copy_(weight.t())
    for name, tensor in state.items():
        if name in trained:
            tensor.copy_(trained[name])
    return twin


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize("name", NAMES)
def test_converted_trained_merged_exported_and_loaded_again(name: str, tmp_path: Path):
    dense = make(name)
    inputs = example(dense)
    model = copy.deepcopy(dense).train()
    originals = convert(model, LoQTConfig(rank=4))
    _, _, num_adapted, full_precision = MODELS[name]
    assert len(originals) == num_adapted
    kept = [n for n, p in model.named_parameters() if not n.endswith(".B")]
    assert all(any(part in n for n in kept) for part in full_precision)

    losses, reports = train(model, originals, inputs)
    assert losses[-1] < 0.9 * losses[0]
    assert [report.step for report in reports] == [0, 4, 8]
    twin = merged_twin(model, dense)
    assert relative(logits(model, inputs), logits(twin, inputs)) < 1e-5

    # Dense: every tensor that transformers reads is the reference's, rounded once.
    options = dict(model_config=dense.config, tokenizer_dir=None, say=lambda _: None)
    export_model(model, output_dir=tmp_path / "bf16", format="bf16", **options)
    loaded = type(dense).from_pretrained(tmp_path / "bf16")
    rounded, found = copy.deepcopy(twin).to(torch.bfloat16).state_dict(), loaded.state_dict()
    assert rounded.keys() == found.keys()
    for key, wanted in rounded.items():
        # The product of P and B is in float32 there, in float64 here: neighbouring roundings.
        assert (found[key].float() - wanted.float()).abs().max() <= 2**-7 * wanted.float().abs().max(), key
        assert (found[key] != wanted).float().mean() < 0.05, key

    # 4 bits: the codes are bitsandbytes' own of the merged weights.
    report = export_model(model, output_dir=tmp_path / "nf4", format="nf4", **options)
    loaded = type(dense).from_pretrained(tmp_path / "nf4", device_map={"": "cpu"})
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    dense_ones = {n for n in originals if ".experts." in n or n.endswith(".wo")}  # T5 keeps the latter in float32
    assert packed.keys() == originals.keys() - dense_ones
    assert any(f"no 4-bit module for {len(dense_ones)} of" in note for note in report.notes) == bool(dense_ones)
    for layer_name, module in packed.items():
        merged = effective_weight(loqt_layers(model)[layer_name]).float()
        codes, _ = bnb.functional.quantize_4bit(merged, blocksize=64, quant_type="nf4")
        assert (codes.view(-1) != module.weight.data.view(-1)).float().mean() < 0.02, layer_name


@pytest.mark.parametrize("name", NAMES)
def test_drawn_or_read_layer_by_layer_it_is_the_same_model(name: str, tmp_path: Path):
    cls = MODELS[name][0]
    if not cls.endswith(("ForCausalLM", "LMHeadModel")):
        pytest.skip("a run builds causal language models, and what test_tasks.py holds")
    dense = make(name)
    dense.save_pretrained(tmp_path)
    loqt = LoQTConfig(rank=4, quantize_w="none", quantize_p="none")
    read, source = build_model(dense.config, loqt, checkpoint_files(tmp_path))
    inputs = {"input_ids": example(dense)["input_ids"]}
    assert relative(logits(read, inputs), logits(dense, inputs)) < 1e-6
    layers = loqt_layers(read)
    assert len(layers) == MODELS[name][2]
    assert all(torch.equal(source.weight(n), layer.weight_q()) for n, layer in layers.items())

    drawn, source = build_model(dense.config, loqt, initializer(0))
    spread = {n: p.detach().std() for n, p in dense.named_parameters() if p.numel() > 500}
    for layer_name, layer in loqt_layers(drawn).items():
        weight = layer.weight_q()
        assert torch.equal(source.weight(layer_name), weight)
        key = layer_name.rpartition(".")[0] if ".experts." in layer_name else f"{layer_name}.weight"
        if key in spread:
            assert weight.std() == pytest.approx(float(spread[key]), rel=0.15), layer_name


@pytest.mark.parametrize(
    "name, task",
    [("gpt2", "causal_lm"), ("mixtral", "causal_lm"), ("bert", "masked_lm"), ("deberta-v2", "classification")],
)
def test_the_planner_counts_what_autograd_keeps(name: str, task: str, tmp_path: Path):
    shape = MODELS[name][1]()
    shape.save_pretrained(tmp_path)
    config = Config(
        model=ModelConfig(shape=str(tmp_path / "config.json"), task=task),  # type: ignore[arg-type]
        loqt=LoQTConfig(rank=4),
        data=DataConfig(sequence_length=48),
        train=TrainConfig(micro_batch_size=3, dtype="fp32", device="cpu", lean_activations=False),
    )
    model, _ = build_model(model_description(config), config.loqt, initializer(0), task=task)
    head.install(model, task=task)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(3, VOCAB, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, targets=torch.tensor([0, 2, 1]) if task == "classification" else tokens)
    assert loss.requires_grad
    entries = plan(config).entries
    assert entries["activations"] + entries["loss"] == pytest.approx(sum(kept.values()), rel=0.2)


def test_the_table_counts_gpt2(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    import architectures

    counts = architectures.count(architectures.build("gpt2"))
    assert counts.total == 124_439_808 and counts.num_matrices == 48  # as published, the tied head once
    assert sum(counts.adapted.values()) == 12 * 12 * 768**2
    line = architectures.row("gpt2", counts)
    assert "| 124 M | `c_proj`, `c_fc`, `c_attn` | 48, 68.3% | `wte` 31.0%; " in line


# ---------------------------------------------------------------- experts

BIASES = ("e_score_correction_bias", "expert_bias")


def biased_experts(kind: str) -> Any:
    """The configuration of a model whose experts are chosen with the help of a persistent buffer."""
    small = GQA | dict(num_experts_per_tok=2, moe_intermediate_size=24)
    if kind == "Lfm2Moe":
        return tf.Lfm2MoeConfig(**small, num_experts=4, num_dense_layers=1, layer_types=["full_attention"] * 2)
    return tf.Glm4MoeConfig(**small, n_routed_experts=4, first_k_dense_replace=1, head_dim=8, n_group=1, topk_group=1)


def test_experts_without_a_token_keep_their_subspace_and_are_counted():
    model = make("mixtral").train()
    dense = copy.deepcopy(model)
    originals = convert(model, LoQTConfig(rank=4))
    engine = SingleEngine(
        model, make_config(loqt=dict(rank=4, interval=1), train=dict(max_steps=4)), original=originals.__getitem__
    )
    few = {"input_ids": torch.tensor([[7, 9]]), "labels": torch.tensor([[9, 7]])}
    report = None
    for _ in range(2):
        before = {n: layer.basis_hat() for n, layer in loqt_layers(model).items()}
        engine.backward(engine(**few).loss)
        report = engine.step()
    assert report is not None and report.reinit is not None
    reasons = {layer.name: layer.kept for layer in report.reinit.layers}
    assert set(reasons.values()) >= {None, "no gradient reached the layer"}
    kept = {name for name, reason in reasons.items() if reason is not None}
    experts = {name for name in kept if ".experts." in name}
    # Two tokens choose two experts each: at most four of six are reached in a block.
    assert len(experts) >= 2 * 2 * 2
    # The token that is predicted attends to itself alone: queries and keys have a gradient of zero, or of noise.
    others = {(name.rpartition(".")[2], reasons[name]) for name in kept - experts}
    assert others <= {("q_proj", "the gradient is zero"), ("k_proj", "the gradient is zero")}
    assert report.reinit.summary()["num_kept"] == len(kept)
    layers = loqt_layers(model)
    assert all(torch.equal(layers[n].basis_hat(), before[n]) for n in kept)
    with torch.no_grad():
        merged = merged_twin(model, dense)
    assert (
        relative(logits(model, {"input_ids": few["input_ids"]}), logits(merged, {"input_ids": few["input_ids"]})) < 1e-5
    )


def test_an_expert_without_a_token_has_a_gradient_of_zero_and_is_not_tapped():
    model = make("mixtral").train()
    convert(model, LoQTConfig(rank=4))
    layers = {n: layer for n, layer in loqt_layers(model).items() if layer.is_conditional}
    called: list[str] = []
    for name, layer in layers.items():
        nn.init.normal_(layer.B, std=0.1)
        layer.tap = lambda dy, x, name=name: called.append(name)  # type: ignore[misc]
    model(input_ids=torch.tensor([[7, 9]]), labels=torch.tensor([[9, 7]])).loss.backward()
    assert 0 < len(called) < len(layers)
    for name, layer in layers.items():
        assert layer.B.grad is not None and (name in called or not layer.B.grad.any()), name


@pytest.mark.parametrize("kind, form", [("Glm4Moe", "bf16"), ("Lfm2Moe", "nf4")])
def test_what_transformers_keeps_in_float32_is_written_so(kind: str, form: str, tmp_path: Path):
    """Biases by which experts are chosen: a list of names says so for GLM, the buffer's own dtype for LFM2."""
    config = biased_experts(kind)
    model, _ = build_model(config, LoQTConfig(rank=4), initializer(0))
    wanted = {n: t.normal_() for n, t in model.state_dict().items() if n.endswith(BIASES)}
    export_model(model, model_config=config, tokenizer_dir=None, output_dir=tmp_path / "out", format=form, say=str)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert wanted and all(stored[n].dtype == torch.float32 and torch.equal(stored[n], t) for n, t in wanted.items())
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_tables_that_have_the_dtype_of_the_model(form: str, tmp_path: Path):
    """XGLM's positions: a buffer that no file holds, in bf16 where the model is."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, d_model=64, num_layers=1, attention_heads=2, ffn_dim=64, max_position_embeddings=48)
    config = tf.XGLMConfig(**shape, pad_token_id=2, bos_token_id=0, eos_token_id=1)
    model = tf.XGLMForCausalLM._from_config(config, dtype=torch.float32).eval()
    convert(model, LoQTConfig(rank=4))
    report = export_model(
        model, model_config=config, tokenizer_dir=None, output_dir=tmp_path / "out", format=form, say=str
    )
    assert report.verification.logits_relative_difference < 1e-2


def test_models_of_waves_are_compared_and_of_what_is_not_known_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    small = dict(vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    conv = dict(conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    config = tf.Wav2Vec2Config(**small, **conv)
    model = tf.Wav2Vec2ForCTC(config).eval()
    convert(model, LoQTConfig(rank=4))
    options = dict(model_config=config, tokenizer_dir=None, format="bf16", say=str)
    report = export_model(model, output_dir=tmp_path / "out", **options)
    assert report.verification.logits_relative_difference < 1e-2
    monkeypatch.setattr(tf.Wav2Vec2ForCTC, "main_input_name", "sounds")
    with pytest.raises(ValueError, match=r"reads sounds, .* \(--no-verify, or verify=False\)"):
        export_model(model, output_dir=tmp_path / "two", **options)
    export_model(model, output_dir=tmp_path / "two", verify=False, **options)


@pytest.mark.parametrize("kind", ["Glm4Moe", "Lfm2Moe"])
def test_persistent_buffers_are_read(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    dense = getattr(tf, f"{kind}ForCausalLM")._from_config(biased_experts(kind), dtype=torch.float32).eval()
    wanted = {n: t.normal_() for n, t in dense.state_dict().items() if n.endswith(BIASES)}
    dense.save_pretrained(tmp_path)
    loqt = LoQTConfig(rank=4, quantize_w="none", quantize_p="none")
    model, _ = build_model(dense.config, loqt, checkpoint_files(tmp_path))
    found = model.state_dict()
    assert wanted and all(torch.equal(found[n], t) for n, t in wanted.items())
    inputs = {"input_ids": torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))}
    assert relative(logits(model, inputs), logits(dense, inputs)) < 1e-6

    name = next(iter(wanted))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has no tensor {name}"):
        build_model(dense.config, loqt, checkpoint_files(tmp_path))


@pytest.mark.parametrize(
    "kind, others, in_files",
    [
        ("GraniteMoe", dict(num_local_experts=3), "model.layers.0.block_sparse_moe.input_linear.weight"),
        (
            "NemotronH",
            dict(layers_block_type=["moe", "attention"], n_routed_experts=4, moe_intermediate_size=40, n_group=1,
                 topk_group=1, moe_shared_expert_intermediate_size=40, head_dim=8),
            "backbone.layers.0.mixer.experts.3.up_proj.weight",
        ),
    ],
)  # fmt: skip
def test_experts_under_names_that_transformers_translates(kind: str, others: Any, in_files: str, tmp_path: Path):
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**EXPERTS, intermediate_size=40, **others)
    dense = getattr(tf, f"{kind}ForCausalLM")._from_config(config, dtype=torch.float32).eval()
    dense.save_pretrained(tmp_path)
    assert in_files in load_file(tmp_path / "model.safetensors")
    loqt = LoQTConfig(rank=4, quantize_w="none", quantize_p="none")
    model, _ = build_model(dense.config, loqt, checkpoint_files(tmp_path))
    assert any(layer.is_conditional for layer in loqt_layers(model).values())
    inputs = {"input_ids": torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))}
    assert relative(logits(model, inputs), logits(dense, inputs)) < 1e-6
    export_model(model, model_config=config, tokenizer_dir=None, output_dir=tmp_path / "out", format="bf16", say=str)
    loaded = type(dense).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(logits(loaded, inputs), logits(dense, inputs)) < 3e-2


def test_experts_that_are_not_asked_for_stay_as_they_are():
    model = make("mixtral")
    assert len(convert(model, LoQTConfig(rank=4, target_modules=["q_proj"]))) == 2
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (6, 80, 32)


@pytest.mark.parametrize("pattern", [["down_proj"], r".*\.experts\.down_proj\.\d+"])
def test_some_matrices_of_experts_alone(pattern: Any, tmp_path: Path):
    dense = make("mixtral")
    model = copy.deepcopy(dense)
    assert all(".experts.down_proj." in name for name in convert(model, LoQTConfig(rank=4, target_modules=pattern)))
    export_model(
        model, model_config=dense.config, tokenizer_dir=None, output_dir=tmp_path / "out", format="bf16", say=str
    )
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.5.w3.weight" in names  # as Mixtral's own files have them
    loaded = tf.MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = merged_twin(model, dense).model.layers[1].mlp.experts
    assert relative(loaded.model.layers[1].mlp.experts.gate_up_proj, wanted.gate_up_proj) < 1e-2
    assert relative(loaded.model.layers[1].mlp.experts.down_proj, wanted.down_proj) < 1e-2


def test_what_experts_cannot_do_is_refused(tmp_path: Path):
    from loqt_ds.method.controller import Controller
    from loqt_ds.ranks import Ranks

    two = Ranks()
    two.world_size = 2
    model = make("mixtral")
    config = Config(
        model=ModelConfig(shape=str(tmp_path / "config.json")),
        loqt=LoQTConfig(rank=4, subspace="sketch"),
        data=DataConfig(sequence_length=32),
        train=TrainConfig(dtype="fp32", device="cpu"),
    )
    model.config.save_pretrained(tmp_path)
    check_model(config)
    with pytest.raises(ValueError, match="with 2 ranks .* loqt.subspace=iterated"):
        check_model(config, world_size=2)
    for target in ("all-linear", ["q_proj"], ["q_proj", "down_proj"]):
        found, twin = wanted_experts(model, target), copy.deepcopy(model)
        assert found == [n for n in convert(twin, LoQTConfig(rank=4, target_modules=target)) if ".experts." in n]
    originals = convert(model, LoQTConfig(rank=4))
    with pytest.raises(ValueError, match="loqt.subspace=iterated"):
        Controller(
            loqt_layers(model),
            LoQTConfig(rank=4, subspace="sketch"),
            None,  # type: ignore[arg-type]
            original=originals.__getitem__,
            seed=0,
            ranks=two,
        )
    assert isinstance(loqt_layers(model)["model.layers.0.mlp.experts.down_proj.0"], LoQTLinear)
    with pytest.raises(ConfigError, match="which experts model.layers.0 calls .* use train.compile=false"):
        compiled.install(model)
