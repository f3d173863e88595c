"""GGUF files against what gguf's reader and transformers find in them, and against sentencepiece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import SHAPES, export, llama, logits, merged_twin, relative, trained
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from loqt_ds.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from loqt_ds.data.tokenizer import _with_real_spaces as with_real_spaces
from loqt_ds.export import ExportError, load_export
from loqt_ds.export import gguf as gguf_module

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

TEXT = [
    f"the quick brown fox {word} jumps over\n  the lazy dog {word}s" for word in ["one", "two", "three", "four", "five"]
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[SentencePieceTokenizer, Path]:
    """As the product trains one: spaces are spaces, newlines pieces."""
    made = SentencePieceTokenizer(with_real_spaces(train_sentencepiece(TEXT * 20, 340)), "test", trained_here=True)
    directory = tmp_path_factory.mktemp("tokenizer")
    made.save(directory, texts=TEXT)
    return made, directory


def by_name(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("tied", "bf16"),
        ("gqa", "q4_0"),
        pytest.param("gqa", "f16", marks=pytest.mark.slow),
        pytest.param("wide", "q8_0", marks=pytest.mark.slow),
    ],
)
def test_transformers_loads_what_was_merged(tmp_path: Path, tokenizer: Any, shape: str, kind: str) -> None:
    config = llama(vocab_size=352, **SHAPES[shape])
    model = trained(config)
    said: list[str] = []
    report = export(
        model, config, tmp_path / "out", format="gguf", gguf_type=kind, tokenizer_dir=tokenizer[1], say=said.append
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    twin = merged_twin(model, config)
    most = {"bf16": 0.02, "f16": 0.002, "q8_0": 0.03, "q4_0": 0.4}[kind]
    assert relative(logits(loaded), logits(twin)) < most
    assert relative(logits(load_export(tmp_path / "out")), logits(loaded)) < 1e-6
    assert report.verification.logits_relative_difference < 1e-5
    errors = [layer.merge_error for layer in report.layers]
    assert len(errors) == 14 and 0 < max(errors) < {"bf16": 0.003, "f16": 0.001, "q8_0": 0.01, "q4_0": 0.15}[kind]
    stored = by_name(tmp_path / "out" / "model.gguf")
    assert ("output.weight" in stored) == (not config.tie_word_embeddings)
    assert stored["output_norm.weight"].tensor_type.name == "F32"
    # 172 does not divide by 32
    short = kind == "q4_0"
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == ("F16" if short else kind.upper())
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == kind.upper()
    assert any("do not divide by 32" in line for line in said) == short


def test_rows_of_q_turn_neighbours(tmp_path: Path, tokenizer: Any) -> None:
    """Row 2 i of a head is its row i, row 2 i + 1 its row i + half; v keeps its order."""
    config = llama(vocab_size=352, **SHAPES["biases"] | {"attention_bias": False, "mlp_bias": False})
    model = trained(config)
    export(model, config, tmp_path / "out", format="gguf", gguf_type="f16", tokenizer_dir=tokenizer[1], verify=False)
    stored, twin = by_name(tmp_path / "out" / "model.gguf"), merged_twin(model, config)
    for name, heads in (("q", 4), ("k", 2)):
        rows = getattr(twin.model.layers[1].self_attn, f"{name}_proj").weight.detach().half().numpy()
        half = len(rows) // heads // 2
        order = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]
        assert np.array_equal(stored[f"blk.1.attn_{name}.weight"].data, rows[order])
    assert np.array_equal(
        stored["blk.1.attn_v.weight"].data, twin.model.layers[1].self_attn.v_proj.weight.detach().half().numpy()
    )


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_families(tmp_path: Path, tokenizer: Any, family: str) -> None:
    kinds = {"mistral": MistralConfig, "qwen2": Qwen2Config}
    shape = {
        "vocab_size": 352,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "tie_word_embeddings": False,
    }
    config = kinds[family](**shape, **{"sliding_window": 8} if family == "mistral" else {})
    model = trained(config)  # type: ignore[arg-type]
    said: list[str] = []
    export(model, config, tmp_path / "out", format="gguf", tokenizer_dir=tokenizer[1], say=said.append)
    loaded = load_export(tmp_path / "out")
    ids = torch.arange(16).view(2, 8)  # no more than the window
    assert type(loaded).__name__ == ("Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM")
    with torch.no_grad():
        twin = merged_twin(model, config)  # type: ignore[arg-type]
        actual, wanted = (network.eval()(input_ids=ids).logits.float() for network in (loaded, twin))
    assert relative(actual, wanted) < 0.02
    assert any("window" in line for line in said) == (family == "mistral")


def test_the_pieces_encode_as_sentencepiece_does(tmp_path: Path, tokenizer: Any) -> None:
    """By what the reader finds: neighbours are merged by the best score, the leftmost first."""
    config = llama(vocab_size=352)
    export(trained(config), config, tmp_path / "out", format="gguf", tokenizer_dir=tokenizer[1])
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(scores) == len(types) == 352
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer[0].eot_id
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    ids = {token: index for index, token in enumerate(tokens) if types[index] == 1}
    of_byte = {token: index for index, token in enumerate(tokens) if types[index] == 6}
    assert len(of_byte) == 256 and types[351] == 5

    def encode(text: str) -> list[int]:
        parts = list(text.replace(" ", "\u2581"))
        while True:
            pairs = [
                (scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ids
            ]
            if not pairs:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [
            i
            for part in parts
            for i in ([ids[part]] if part in ids else [of_byte[f"<0x{b:02X}>"] for b in part.encode()])
        ]

    for text in (*TEXT, "  x\n\n y", "größe 漢字", "lazy  lazy"):
        assert encode(text) == tokenizer[0].encode(text), text


def test_what_a_file_cannot_say_is_refused(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama(vocab_size=352)
    model = trained(config)

    def refused(match: str, config: Any = config, **options: Any) -> None:
        with pytest.raises(ExportError, match=match):
            export(model, config, tmp_path / "out", **({"format": "gguf", "tokenizer_dir": tokenizer[1]} | options))
        assert not (tmp_path / "out").exists()

    refused("biases of attention cannot be verified.*format=bf16", config=llama(attention_bias=True))
    refused("rope_type=linear", config=llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}))
    refused("gguf_type='q2' does not exist", gguf_type="q2")
    refused("does nothing with format=bf16", format="bf16", gguf_type="f16")
    refused("there is none; give one", tokenizer_dir=None)
    refused("needs .*tokenizer.json, which is not there", tokenizer_dir=tmp_path)
    (tmp_path / "unigram").mkdir()
    text = (tokenizer[1] / "tokenizer.json").read_text()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / "unigram" / name).write_bytes((tokenizer[1] / name).read_bytes())
    (tmp_path / "unigram" / "tokenizer.json").write_text(
        text.replace('"byte_fallback": true', '"byte_fallback": false')
    )
    refused("splits text by a rule", tokenizer_dir=tmp_path / "unigram")
    config.model_type = "gpt2"
    refused("is written for llama, mistral, qwen2, and this is gpt2")
    config.model_type = "llama"
    monkeypatch.setattr(gguf_module, "_reordered", lambda name, values, config: values.contiguous())
    refused("attn_q.weight of model.gguf is 1.* away from model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_llama_cpp_computes_the_same(tmp_path: Path, tokenizer: Any, family: str) -> None:
    """llama.cpp itself, where `xllamacpp` is installed: it loads the file, and its log-probabilities are ours."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp (pip install xllamacpp) is not installed")
    kind = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[family]
    config = kind(**(llama(vocab_size=352).to_dict() | {"model_type": family}))
    model = trained(config)
    export(model, config, tmp_path / "out", format="gguf", gguf_type="f16", tokenizer_dir=tokenizer[1])
    options = llama_cpp.CommonParams()
    options.model.path = str(tmp_path / "out" / "model.gguf")
    options.n_ctx, options.n_parallel, options.warmup = 48, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    server = llama_cpp.Server(options)
    ids = tokenizer[0].encode("the lazy fox jumps")
    asked = {"max_tokens": 4, "temperature": 0.0, "logprobs": 10, "cache_prompt": False}
    answer = server.handle_completions({"prompt": ids, **asked})
    twin = merged_twin(model, config).eval()
    for made in answer["choices"][0]["logprobs"]["content"]:
        with torch.no_grad():
            wanted = twin(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert all(abs(top["logprob"] - wanted[top["id"]]) < 0.02 for top in made["top_logprobs"])
        ids = [*ids, made["id"]]
    for text in (*TEXT, "  x\n\n y", "größe 漢字"):  # as many tokens as training makes of it
        usage = server.handle_completions({"prompt": text, **asked})["usage"]
        assert usage["prompt_tokens"] == len(tokenizer[0].encode(text)), text
