"""llama2.c files become transformers models that compute the same: a real one, and random ones of odd sizes."""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GREEDY = (  # karpathy/llama2.c, doc/stories260K.md, temperature 0
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" "
    "Lily was sad and didn't know what to do. She said, \"I want to play with your ball, but I can't find it.\""
)


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    path = repository / "tools" / "convert_llama2c.py"
    spec = importlib.util.spec_from_file_location("convert_llama2c", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 60 pieces."""
    words = ["the cat sat on the mat", "a dog ran to the park", "she saw a big red ball", "one day it was too high"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 5), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def sizes(**changes: int) -> dict[str, int]:
    """dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len: in the order of the header."""
    return {"dim": 30, "hidden": 37, "layers": 3, "heads": 5, "kv": 1, "vocab": 61, "seq": 19} | changes


def write_model(path: Path, size: dict[str, int], *, theta: float = 10000.0, seed: int = 0) -> dict[str, Any]:
    """A random v0 file, written field by field; returns its tensors."""
    dim, hidden, layers, heads, kv, vocab, seq = size.values()
    head_dim = dim // heads
    generator = np.random.default_rng(seed)

    def random(*shape: int) -> Any:
        return (generator.standard_normal(shape) / math.sqrt(shape[-1])).astype("<f4")

    angles = np.outer(np.arange(seq), theta ** (-np.arange(0, head_dim, 2) / head_dim))
    tensors = {
        "embed": random(abs(vocab), dim) * 3,
        "att_norm": 1 + random(layers, dim),
        "wq": random(layers, dim, dim) * 2,
        "wk": random(layers, kv * head_dim, dim) * 2,
        "wv": random(layers, kv * head_dim, dim),
        "wo": random(layers, dim, dim),
        "ffn_norm": 1 + random(layers, dim),
        "w1": random(layers, hidden, dim),
        "w2": random(layers, dim, hidden),
        "w3": random(layers, hidden, dim),
        "norm": 1 + random(dim),
        "cos": np.cos(angles).astype("<f4"),
        "sin": np.sin(angles).astype("<f4"),
    }
    if vocab < 0:
        tensors["output"] = random(-vocab, dim)
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *size.values()))
        for tensor in tensors.values():
            file.write(tensor.tobytes())
    return tensors


def numpy_logits(tensors: dict[str, Any], size: dict[str, int], tokens: Any) -> Any:
    """The forward pass of llama2.c for one sequence, in float64: RoPE turns neighbouring pairs by the stored tables."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    heads, kv, length = size["heads"], size["kv"], len(tokens)
    head_dim = size["dim"] // heads

    def normed(x: Any, weight: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def turned(x: Any) -> Any:  # (length, n, head_dim)
        pairs = x.reshape(length, -1, head_dim // 2, 2)
        turns = (t["cos"] + 1j * t["sin"])[:length, None, :]
        product = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
        return np.stack((product.real, product.imag), axis=-1).reshape(length, -1, head_dim)

    x = t["embed"][tokens]
    mask = np.triu(np.full((length, length), -np.inf), 1)
    for i in range(size["layers"]):
        h = normed(x, t["att_norm"][i])
        q = turned((h @ t["wq"][i].T).reshape(length, heads, head_dim))
        k = turned((h @ t["wk"][i].T).reshape(length, kv, head_dim)).repeat(heads // kv, axis=1)
        v = (h @ t["wv"][i].T).reshape(length, kv, head_dim).repeat(heads // kv, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1) @ t["wo"][i].T
        h = normed(x, t["ffn_norm"][i])
        gate = h @ t["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ t["w3"][i].T)) @ t["w2"][i].T
    return normed(x, t["norm"]) @ t.get("output", t["embed"]).T


@pytest.mark.parametrize(
    ("size", "theta"),
    [
        (sizes(), 10000.0),
        (sizes(vocab=-61), 10000.0),
        (sizes(dim=24, heads=6, kv=3, hidden=5, seq=40), 10000.0),
        (sizes(dim=32, heads=2, kv=2, layers=1), 1e6),
        (sizes(dim=6, heads=3, kv=3, seq=1), 10000.0),
    ],
    ids=["multi-query", "untied", "grouped", "theta", "pairs"],
)
def test_random_models_compute_what_llama2c_computes(
    tool: ModuleType, tokenizer_file: Path, tmp_path: Path, size: dict[str, int], theta: float
) -> None:
    tensors = write_model(tmp_path / "model.bin", size, theta=theta)
    tool.convert(tmp_path / "model.bin", tokenizer_file, tmp_path / "out", max_shard_bytes=10_000)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings == (size["vocab"] > 0)
    assert model.config.rope_parameters["rope_theta"] == theta
    tokens = np.random.default_rng(1).integers(0, 61, min(size["seq"], 17))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].double().numpy()
    wanted = numpy_logits(tensors, size, tokens)
    assert np.abs(logits - wanted).max() < 2e-4 * np.abs(wanted).max()
    # Nothing is rounded or lost, RoPE's order of rows apart.
    state = model.state_dict()
    for index in range(size["layers"]):
        for name, source in (("mlp.down_proj", "w2"), ("self_attn.v_proj", "wv"), ("input_layernorm", "att_norm")):
            assert np.array_equal(state[f"model.layers.{index}.{name}.weight"].numpy(), tensors[source][index])


def test_shards_hold_the_same_tensors(tool: ModuleType, tokenizer_file: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model.bin", sizes())
    tool.convert(tmp_path / "model.bin", tokenizer_file, tmp_path / "one")
    tool.convert(tmp_path / "model.bin", tokenizer_file, tmp_path / "many", max_shard_bytes=1)
    many: dict[str, torch.Tensor] = {}
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) == 5
    for path in shards:
        many |= load_file(path)
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_stories260k(tool: ModuleType, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published model: its published greedy text, the loss that SOURCES.md has for it, its tokenizer's ids."""
    folder = real_data / "weights" / "stories260K"
    arguments = ["--model", str(folder / "stories260K.bin"), "--tokenizer", str(folder / "tok512.model")]
    assert tool.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "dim=64" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    written = model.generate(torch.tensor([[1]]), max_new_tokens=170, do_sample=False, pad_token_id=0)
    assert str(tokenizer.decode(written[0], skip_special_tokens=True)).startswith(GREEDY)

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tok512.model"))
    text = gzip.decompress((real_data / "en" / "tinystories_sample.txt.gz").read_bytes()).decode(errors="ignore")
    stories = [story.strip() for story in text.split("<|endoftext|>")][:250]
    ids = [pieces.encode(story) for story in stories]
    assert [tokenizer(story, add_special_tokens=False)["input_ids"] for story in stories] == ids
    rows = torch.tensor([token for story in ids for token in [1, *story]][: 100 * 512]).view(100, 512)
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in rows.split(20)]
    assert sum(losses) / len(losses) == pytest.approx(1.479, abs=5e-4)


def damaged(path: Path, fault: str) -> None:
    data = bytearray(path.read_bytes())
    changes: dict[str, Any] = {
        "cut off": lambda: data[:-4],
        "longer": lambda: data + b"abcd",
        "no header": lambda: data[:20],
        "negative": lambda: struct.pack("<i", -30) + data[4:],
        "zero layers": lambda: data[:8] + struct.pack("<i", 0) + data[12:],
        "heads": lambda: data[:12] + struct.pack("<i", 7) + data[16:],
        "kv heads": lambda: data[:16] + struct.pack("<i", 2) + data[20:],
        "odd head": lambda: data[:12] + struct.pack("<i", 10) + data[16:],
        "version 1": lambda: struct.pack("<2i", 0x616B3432, 1) + data[8:],
        "rope": lambda: data[:-16] + np.full(4, 0.5, "<f4").tobytes(),
        "nan": lambda: data[:28] + np.full(1, np.nan, "<f4").tobytes() + data[32:],
    }
    path.write_bytes(bytes(changes[fault]()))


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("cut off", r"has \d+ bytes, its header asks for \d+: it is cut off"),
        ("longer", "something else behind"),
        ("no header", "20 bytes, fewer than the 28"),
        ("negative", "dim=-30 in the header"),
        ("zero layers", "n_layers=0 in the header"),
        ("heads", "dim=30 is not divisible by n_heads=7"),
        ("kv heads", "n_heads=5 is not divisible by n_kv_heads=2"),
        ("odd head", "head size 3 is odd"),
        ("version 1", "version 1; export it again with --version 0"),
        ("rope", "RoPE tables"),
        ("nan", "tok_embeddings|embed_tokens.* not finite"),
    ],
)
def test_files_that_are_something_else_are_refused(
    tool: ModuleType, tokenizer_file: Path, tmp_path: Path, fault: str, problem: str
) -> None:
    path = tmp_path / "model.bin"
    write_model(path, sizes())
    damaged(path, fault)
    with pytest.raises(tool.ConversionError, match=problem):
        tool.convert(path, tokenizer_file, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.bin"]


def test_other_refusals(
    tool: ModuleType, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.bin"
    write_model(path, sizes(vocab=50))
    with pytest.raises(tool.ConversionError, match=r"has 60 pieces, --model=.* knows 50"):
        tool.convert(path, tokenizer_file, tmp_path / "out")
    with pytest.raises(tool.ConversionError, match="cannot be read"):
        tool.convert(tmp_path / "absent.bin", tokenizer_file, tmp_path / "out")
    write_model(path, sizes())
    arguments = ["--model", str(path), "--output", str(tmp_path / "out"), "--tokenizer"]
    assert tool.main([*arguments, str(tmp_path / "absent.model")]) == 2
    assert "absent.model: no such file" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    assert tool.main([*arguments, str(tokenizer_file)]) == 2
    assert f"{tmp_path / 'out'} exists and is not empty" in capsys.readouterr().err
    with pytest.raises(tool.ConversionError, match="could not be written"):
        tool.convert(path, tokenizer_file, path / "out")
