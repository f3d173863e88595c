"""Convert a llama2.c model (version 0 `.bin`, float32) and its tokenizer to a transformers Llama directory.

    python tools/convert_llama2c.py --model stories260K.bin --tokenizer tok512.model --output stories260K

The file (karpathy/llama2.c, `legacy_export`): seven little-endian int32 (dim, hidden_dim, n_layers, n_heads,
n_kv_heads, vocab_size, seq_len), then float32 tensors, each stacked over layers:

    tok_embeddings, attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3, norm, rope_cos, rope_sin [, output]

vocab_size > 0 means that the head is tied to the embeddings; < 0, that `output` follows. llama2.c rotates neighbouring
pairs (2i, 2i + 1) of a head, transformers the halves (i, i + d/2), so that the rows of wq and wk are reordered; nothing
else changes, and nothing is rounded. Tensors are read through a memory map and written a shard at a time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loqt_ds.checkpoint import GIB
from loqt_ds.data.tokenizer import Tokenizer, load_tokenizer
from loqt_ds.export.writer import (
    Unit,
    complete_or_nothing,
    generation_defaults,
    refuse_existing,
    write_configuration,
    write_weights,
)

NORM_EPSILON = 1e-5  # a constant of llama2.c, not in the file
DEFAULT_ROPE_THETA = 10000.0
MAX_SHARD_BYTES = 5 * GIB
MAGIC_OF_LATER_VERSIONS = 0x616B3432
BOS_ID = 1  # llama2.c begins every document with it and stops at it

Array = np.ndarray[Any, np.dtype[np.float32]]


class ConversionError(ValueError):
    """The files are not what they should be; the message says what was found."""


@dataclass(frozen=True)
class Header:
    """The seven integers at the start, as they are in the file."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int

    @property
    def tied(self) -> bool:
        return self.vocab_size > 0

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in the order of the file."""
        vocab, kv_dim, layers = abs(self.vocab_size), self.n_kv_heads * self.head_dim, self.n_layers
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings": (vocab, self.dim),
            "attention_norm": (layers, self.dim),
            "wq": (layers, self.dim, self.dim),
            "wk": (layers, kv_dim, self.dim),
            "wv": (layers, kv_dim, self.dim),
            "wo": (layers, self.dim, self.dim),
            "ffn_norm": (layers, self.dim),
            "w1": (layers, self.hidden_dim, self.dim),
            "w2": (layers, self.dim, self.hidden_dim),
            "w3": (layers, self.hidden_dim, self.dim),
            "norm": (self.dim,),
            "rope_cos": (self.seq_len, self.head_dim // 2),
            "rope_sin": (self.seq_len, self.head_dim // 2),
        }
        return shapes if self.tied else shapes | {"output": (vocab, self.dim)}


NUM_HEADER_BYTES = 4 * len(fields(Header))


def read_header(path: Path) -> Header:
    """Read and check the header.

    Raises:
        ConversionError: the file is missing, of another version, or has impossible sizes.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(NUM_HEADER_BYTES)
    except OSError as error:
        raise ConversionError(f"--model={path} cannot be read: {error}") from error
    if len(data) < NUM_HEADER_BYTES:
        raise ConversionError(f"--model={path} has {len(data)} bytes, fewer than the {NUM_HEADER_BYTES} of the header")
    values = np.frombuffer(data, dtype="<i4").tolist()
    if values[0] == MAGIC_OF_LATER_VERSIONS:
        raise ConversionError(
            f"--model={path} is of llama2.c's version {values[1]}; export it again with --version 0 (float32)"
        )
    header = Header(*values)
    for field in fields(Header):
        value = getattr(header, field.name)
        if value == 0 or (value < 0 and field.name != "vocab_size"):
            raise ConversionError(f"--model={path}: {field.name}={value} in the header; is this a llama2.c v0 file?")
    for whole, part in (("dim", "n_heads"), ("n_heads", "n_kv_heads")):
        if getattr(header, whole) % getattr(header, part):
            raise ConversionError(
                f"--model={path}: {whole}={getattr(header, whole)} is not divisible by {part}={getattr(header, part)}; "
                "is this a llama2.c v0 file?"
            )
    if header.head_dim % 2:
        raise ConversionError(f"--model={path}: the head size {header.head_dim} is odd, so RoPE cannot pair its rows")
    return header


def map_tensors(path: Path, header: Header) -> dict[str, Array]:
    """Name -> float32 array over the file; nothing is read yet.

    Raises:
        ConversionError: the file does not have exactly the size that the header asks for.
    """
    shapes = header.shapes()
    expected = NUM_HEADER_BYTES + 4 * sum(math.prod(shape) for shape in shapes.values())
    actual = path.stat().st_size
    if actual != expected:
        problem = "it is cut off" if actual < expected else "there is something else behind the weights"
        raise ConversionError(f"--model={path} has {actual} bytes, its header asks for {expected}: {problem}")
    flat = np.memmap(path, dtype="<f4", mode="r", offset=NUM_HEADER_BYTES)
    tensors, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        tensors[name] = flat[start:end].reshape(shape)
        start = end
    return tensors


def rope_theta(path: Path, tensors: dict[str, Array]) -> float:
    """The base of RoPE, from the stored tables cos, sin (position · θ^(-2i/d)).

    Raises:
        ConversionError: the tables are not those of any base.
    """
    cos, sin = tensors["rope_cos"], tensors["rope_sin"]  # (seq_len, head_dim / 2)
    num_positions, num_pairs = cos.shape
    bases = [DEFAULT_ROPE_THETA]
    if num_positions > 1 and num_pairs > 1:
        angle = math.atan2(sin[1, 1], cos[1, 1])
        if angle > 0:
            bases.append(float(f"{angle**-num_pairs:.3g}"))
    for base in bases:
        frequencies = base ** (-np.arange(num_pairs) / num_pairs)
        angles = np.outer(np.arange(num_positions), frequencies)
        # float32 angles of some thousands are off by 1e-4
        tolerance = 1e-4 + 1e-6 * num_positions
        if np.abs(np.cos(angles) - cos).max() < tolerance and np.abs(np.sin(angles) - sin).max() < tolerance:
            return base
    raise ConversionError(f"--model={path}: its RoPE tables are not those of a Llama; is this a llama2.c v0 file?")


def halves_from_pairs(weight: Array, num_heads: int) -> Array:
    """Reorder rows of (num_heads · d, in) from RoPE on pairs (2i, 2i+1) to RoPE on halves (i, i + d/2)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def _tensor(path: Path, name: str, array: Array) -> Tensor:
    if not np.isfinite(array).all():
        raise ConversionError(f"--model={path}: {name} has values that are not finite; fetch the file again")
    return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: the map is read-only


def units(path: Path, header: Header, tensors: dict[str, Array]) -> list[Unit]:
    """The tensors under transformers' names, a layer in each unit."""
    ends = {"model.embed_tokens.weight": tensors["tok_embeddings"], "model.norm.weight": tensors["norm"]}
    if not header.tied:
        ends["lm_head.weight"] = tensors["output"]

    def layer(index: int) -> dict[str, Array]:
        arrays = {
            "input_layernorm": tensors["attention_norm"][index],
            "self_attn.q_proj": halves_from_pairs(tensors["wq"][index], header.n_heads),
            "self_attn.k_proj": halves_from_pairs(tensors["wk"][index], header.n_kv_heads),
            "self_attn.v_proj": tensors["wv"][index],
            "self_attn.o_proj": tensors["wo"][index],
            "post_attention_layernorm": tensors["ffn_norm"][index],
            "mlp.gate_proj": tensors["w1"][index],
            "mlp.down_proj": tensors["w2"][index],
            "mlp.up_proj": tensors["w3"][index],
        }
        return {f"model.layers.{index}.{name}.weight": array for name, array in arrays.items()}

    def end(name: str) -> dict[str, Array]:
        return {name: ends[name]}

    def unit(num_bytes: int, arrays: Callable[[], dict[str, Array]]) -> Unit:
        return Unit(num_bytes, lambda: {name: _tensor(path, name, array) for name, array in arrays().items()})

    layer_bytes = sum(array[0].nbytes for array in tensors.values() if array.shape[0] == header.n_layers)
    made = [unit(array.nbytes, partial(end, name)) for name, array in ends.items()]
    return made + [unit(layer_bytes, partial(layer, index)) for index in range(header.n_layers)]


def model_config(header: Header, theta: float, tokenizer: Tokenizer) -> Any:
    """The transformers configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=torch.float32,
        vocab_size=abs(header.vocab_size),
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.n_layers,
        num_attention_heads=header.n_heads,
        num_key_value_heads=header.n_kv_heads,
        max_position_embeddings=header.seq_len,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=header.tied,
        bos_token_id=BOS_ID,
        eos_token_id=tokenizer.eot_id,
        pad_token_id=tokenizer.pad_id,
    )


def convert(model: Path, tokenizer: Path, output: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Header:
    """Write `output`, completely or not at all.

    Args:
        model: a llama2.c v0 file.
        tokenizer: a sentencepiece `.model`, or a directory with tokenizer files.
        output: must not exist, or be empty.
        max_shard_bytes: weights are split into files of at most this size.

    Raises:
        ConversionError: something is wrong with the model, or the tokenizer does not fit it.
        ValueError: the tokenizer cannot be loaded, or the output directory is taken.
    """
    refuse_existing(output)
    header = read_header(model)
    tensors = map_tensors(model, header)
    theta = rope_theta(model, tensors)
    loaded = load_tokenizer(str(tokenizer))
    if loaded.vocab_size > abs(header.vocab_size):
        raise ConversionError(
            f"--tokenizer={tokenizer} has {loaded.vocab_size} pieces, --model={model} knows {abs(header.vocab_size)}; "
            "give the tokenizer that the model was trained with"
        )
    try:
        with complete_or_nothing(output) as temporary:
            write_weights(temporary, units(model, header, tensors), max_shard_bytes)
            config = model_config(header, theta, loaded)
            # Documents end where llama2.c begins the next one; text trained on later may end with the usual piece.
            stop = [loaded.eot_id, BOS_ID]
            write_configuration(
                temporary, config.to_json_string(), generation_defaults(config) | {"eos_token_id": stop}
            )
            loaded.save(temporary)
    except OSError as error:
        raise ConversionError(f"--output={output} could not be written: {error}; earlier files are intact") from error
    return header


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (2 for whatever the user can put right)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, help="llama2.c version 0 file (.bin, float32)")
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="sentencepiece .model, or a directory with tokenizer files"
    )
    parser.add_argument("--output", required=True, type=Path, help="directory to make; must not exist or be empty")
    options = parser.parse_args(arguments)
    try:
        header = convert(options.model, options.tokenizer, options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {header}")
    print(
        "train it further: python -m loqt_ds.train model.shape=null model.vocab_size=null "
        f"model.path={options.output} data.tokenizer={options.output} data.path=YOUR_TEXT"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
