"""The exported directory, as somebody else loads it: in a process that knows nothing of loqt_ds.

The reference is a dense transformers model whose weights are merged here, in float64, from the tensors of the training
checkpoint, with a table of NF4 written down below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM
from workshop import Workshop, command

# Dettmers et al., QLoRA (arXiv 2305.14314), appendix E
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)

STRANGER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, ids, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(directory)
with torch.no_grad():
    logits = model(load_file(ids)["ids"]).logits.float()
prompt = tokenizer("the quick", return_tensors="pt")["input_ids"]
generated = model.generate(prompt, max_new_tokens=4, do_sample=False)
save_file({"logits": logits}, output)
assert not any(name.split(".")[0] == "loqt_ds" for name in sys.modules)
print(json.dumps({
    "ids": tokenizer("the quick brown fox")["input_ids"],
    "text": tokenizer.decode(generated[0]),
    "classes": sorted({type(module).__name__ for module in model.modules()}),
}))
"""


@pytest.fixture(scope="module")
def run(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps at a rate that moves B well away from what compensates quantization."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    workshop.train(
        output_dir=folder,
        train__max_steps=9,
        train__dtype="fp32",
        optim__lr=0.2,
        loqt__interval=20,
        export__format="nf4",
    ).ok()
    return folder


def dequantized(codes: Tensor, absmax: Tensor, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """NF4 bytes (the even element in the high nibble) and float32 absmax of blocks of 64 to a float64 matrix."""
    packed = codes.numpy()
    nibbles = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: shape[0] * shape[1]]
    scales = np.repeat(absmax.view(torch.float32).double().numpy(), 64)[: nibbles.size]
    return (NF4[nibbles] * scales).reshape(shape)


def nearest_nf4(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A matrix as it comes out of NF4, blocks of 64 of the flat order."""
    flat = matrix.astype(np.float32).reshape(-1, 64)  # widths here divide by 64
    absmax = np.abs(flat).max(1, keepdims=True)
    codes = np.abs((flat / absmax)[..., None] - NF4).argmin(-1)
    return (NF4[codes] * absmax).reshape(matrix.shape)


def merged_weights(run: Path, *, with_product: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """W_q + s · (product of P and B) of each adapted matrix, from the last checkpoint, in float64."""
    checkpoint = run / "checkpoints" / "step_9"
    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "metadata.json").read_text())["config"]["loqt"]
    shape = AutoConfig.for_model(**json.loads((run / "export" / "config.json").read_text()))
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    shapes = {
        **{"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)},
        **{"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)},
    }
    merged = {}
    for key in tensors:
        if not key.endswith(".w_codes"):
            continue
        name = key.removesuffix(".w_codes")
        out_features, in_features = shapes[name.rsplit(".", 1)[-1]]
        weight = dequantized(tensors[key], tensors[f"{name}.w_absmax"], (out_features, in_features))
        smaller = min(out_features, in_features)
        basis = dequantized(tensors[f"{name}.p_codes"], tensors[f"{name}.p_absmax"], (smaller, config["rank"]))
        factor = tensors[f"{name}.B"].double().numpy()  # fp32: the parameter is its own master
        product = factor @ basis.T if in_features <= out_features else basis @ factor
        merged[name] = weight + (config["alpha"] * product if with_product else 0)
    assert len(merged) == 14
    return merged


def dense_model(run: Path, weights: dict[str, np.ndarray[Any, Any]], dtype: torch.dtype) -> LlamaForCausalLM:
    """A transformers Llama with these matrices and the checkpoint's other parameters."""
    content = json.loads((run / "export" / "config.json").read_text())
    content.pop("quantization_config", None)
    model = LlamaForCausalLM(AutoConfig.for_model(**content))
    tensors = load_file(run / "checkpoints" / "step_9" / "model.safetensors")
    state = {key: value for key, value in tensors.items() if key in model.state_dict()}
    state |= {f"{name}.weight": torch.from_numpy(weight).float() for name, weight in weights.items()}
    model.load_state_dict(state, strict=True)
    return model.to(dtype).eval()


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def load_as_a_stranger(directory: Path, ids: Tensor, folder: Path) -> tuple[Tensor, dict[str, Any]]:
    save_file({"ids": ids}, folder / "ids.safetensors")
    script = folder / "stranger.py"
    script.write_text(STRANGER, encoding="utf-8")
    done = command(
        *(sys.executable, script, directory, folder / "ids.safetensors", folder / "logits.safetensors"),
        cwd=folder,
        PYTHONPATH="",
    ).ok()
    return load_file(folder / "logits.safetensors")["logits"], json.loads(done.output.splitlines()[-1])


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 400, (4, 24), generator=torch.Generator().manual_seed(1))


def test_the_4_bit_export_in_a_process_without_loqt_ds(run: Path, ids: Tensor, tmp_path: Path) -> None:
    logits, told = load_as_a_stranger(run / "export", ids, tmp_path)
    merged = merged_weights(run)
    bf16 = torch.bfloat16
    quantized = {name: nearest_nf4(weight) for name, weight in merged.items()}
    # bfloat16 arithmetic in another order; the two models below show how little that is
    assert difference(logits, logits_of(dense_model(run, quantized, bf16), ids)) < 0.02
    exact = logits_of(dense_model(run, merged, torch.float32), ids)
    without = logits_of(dense_model(run, merged_weights(run, with_product=False), torch.float32), ids)
    cost = difference(logits, exact)  # of quantizing the merged weights, as EXPORT.md says
    assert cost < 0.5 * difference(without, exact), "the export is nearer to the merged model than to W_q alone"
    assert "Linear4bit" in told["classes"], "transformers keeps it in 4 bits"
    assert isinstance(told["text"], str)


def test_the_bf16_export_in_a_process_without_loqt_ds(run: Path, ids: Tensor, tmp_path: Path) -> None:
    from loqt_ds.export.__main__ import main as export

    out = tmp_path / "bf16"
    assert export(["--checkpoint", str(run), "--format", "bf16", "--output", str(out)]) == 0
    logits, told = load_as_a_stranger(out, ids, tmp_path)
    merged = merged_weights(run)
    assert torch.equal(logits, logits_of(dense_model(run, merged, torch.bfloat16), ids)) or (
        difference(logits, logits_of(dense_model(run, merged, torch.bfloat16), ids)) < 2e-3
    )
    assert difference(logits, logits_of(dense_model(run, merged, torch.float32), ids)) < 0.02
    assert "Linear4bit" not in told["classes"]


def test_the_tokenizer_travels_along(run: Path, ids: Tensor) -> None:
    from transformers import AutoTokenizer

    from loqt_ds.data import load_tokenizer

    ours = load_tokenizer(str(run / "tokenizer"))
    theirs = AutoTokenizer.from_pretrained(run / "export")
    for text in ("the quick brown fox", " ünïcode 漢字 \n\n  two", ours.decode(ids[0].tolist())):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
