"""The merged model as one GGUF file, the format of llama.cpp, by the `gguf` package of its authors.

Llama and Mistral (both "llama" there) and Qwen2, whose tensors llama.cpp calls by names that `gguf` has a map of. Two
things differ from transformers: rows of q and k of Llama are ordered for rotary embeddings that turn neighbours
instead of halves, and norms are float32. The file is written tensor by tensor.

What is verified: `gguf`'s own reader finds every tensor with the values that were meant, and transformers loads the
file and computes the logits of a model that holds these values. llama.cpp itself is run by a test (log-probabilities
within 0.02 for the three families, as many tokens for a text), where `xllamacpp` is installed; an export does not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loqt_ds.export.gguf_tokenizer import GGUFTokenizer, read_tokenizer
from loqt_ds.export.report import ExportError, LayerReport, Verification
from loqt_ds.export.verify import Expected, quiet_transformers, random_tokens, relative_difference
from loqt_ds.method.conversion import build_empty, tie_weights

FILE = "model.gguf"
TYPES = ("bf16", "f16", "q8_0", "q4_0")
"""Of matrices. Blocks of 32 values share a scale in the last two; embeddings and head are q8_0 in both."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""transformers' model_type -> llama.cpp's architecture."""
_BLOCK = 32
_ROUNDING = {"f32": 0.0, "bf16": 0.004, "f16": 0.05, "q8_0": 0.03, "q4_0": 0.4}
"""‖exported − merged‖ / ‖merged‖ that a type may cost, whatever the weight; another weight is about 1.4 away."""
_INSTEAD = "export it with format=bf16 and convert that with llama.cpp's own convert_hf_to_gguf.py"


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    """In transformers."""
    called: str
    """In the file."""
    shape: tuple[int, ...]
    kind: str
    """f32, or one of TYPES."""
    make: Callable[[], Tensor]
    """float32, as transformers has it."""


def import_gguf() -> Any:
    """Raises ExportError, naming the extra, where the package is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ExportError("format=gguf needs the gguf package: pip install 'loqt-ds[gguf]'") from error
    return gguf


def check_model(model_config: Any) -> None:
    """Raises ExportError for a model that would not compute the same from a GGUF file."""
    kind = getattr(model_config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ExportError(f"format=gguf is written for {', '.join(ARCHITECTURES)}, and this is {kind}: {_INSTEAD}")
    rope = getattr(model_config, "rope_parameters", None) or {}
    problems = {
        f"rope_type={rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        f"hidden_act={model_config.hidden_act}": model_config.hidden_act != "silu",
        "biases of attention": bool(getattr(model_config, "attention_bias", False)),
        "biases of the MLP": bool(getattr(model_config, "mlp_bias", False)),
    }
    found = [name for name, is_there in problems.items() if is_there]
    if found:
        raise ExportError(f"format=gguf: {found[0]} cannot be verified in a file of {kind}; {_INSTEAD}")


def notes_of(model_config: Any) -> list[str]:
    """What a reader of the file will do otherwise."""
    window = _window(model_config)
    if window is None:
        return []
    return [
        f"attention over a window of {window} tokens is not told in the file: readers attend to the whole of longer "
        "texts"
    ]


def _window(model_config: Any) -> int | None:
    """How many tokens attention looks back; None: at all of them."""
    window: int | None = getattr(model_config, "sliding_window", None)
    return window if getattr(model_config, "use_sliding_window", True) else None


# ------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def write_gguf(
    path: Path, expected: Expected, *, kind: str, tokenizer_dir: Path | None, model_name: str
) -> tuple[list[LayerReport], list[str]]:
    """Writes the merged model; returns the cost of its rounding for each adapted matrix, and what to say.

    Args:
        path: file to make.
        kind: of `TYPES`.
        tokenizer_dir: goes into the file; must hold `tokenizer.json`.
        model_name: for people.

    Raises ExportError for a tokenizer that GGUF has no name for, or a weight that is not finite.
    """
    gguf = import_gguf()
    config = expected.model_config
    entries = _entries(expected, kind)
    tokenizer = read_tokenizer(tokenizer_dir, config.vocab_size)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    _add_metadata(writer, config, kind, model_name)
    assert tokenizer_dir is not None, "read_tokenizer refuses that"
    _add_tokenizer(writer, tokenizer, tokenizer_dir)
    for entry in entries:
        dtype: np.dtype[Any] = np.dtype(np.float32)
        stored = entry.shape
        quantization = _type(entry.kind)
        if entry.kind == "f16":
            dtype = np.dtype(np.float16)
        elif entry.kind != "f32":
            dtype, stored = np.dtype(np.uint8), gguf.quant_shape_to_byte_shape(entry.shape, quantization)
        num_bytes = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(entry.called, stored, dtype, num_bytes, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    reports = []
    for entry in entries:
        values = entry.make()
        if not torch.isfinite(values).all():
            raise ExportError(f"{entry.name} has values that are not finite; export an earlier checkpoint")
        data = gguf.quantize(_reordered(entry.name, values, config).numpy(), _type(entry.kind))
        writer.write_tensor_data(data)
        layer = expected.layers.get(entry.name.removesuffix(".weight"))
        if layer is not None:
            exported = _as_tensor(gguf.dequantize(data, _type(entry.kind)), entry, config)
            error = relative_difference(exported, values)
            action = "rounded" if entry.kind in ("bf16", "f16") else "quantized"
            name = entry.name.removesuffix(".weight")
            reports.append(LayerReport(name, layer.spec_w.kind, entry.kind, action, error))
    writer.flush()
    for file in writer.fout or []:
        os.fsync(file.fileno())
    writer.close()
    short = [e for e in entries if e.kind == "f16" and kind in ("q8_0", "q4_0")]
    notes = [f"{len(short)} matrices whose rows do not divide by {_BLOCK} are f16 ({short[0].name})"] if short else []
    return reports, notes


def _entries(expected: Expected, kind: str) -> list[_Entry]:
    """Every tensor, in the order of transformers' model."""
    gguf = import_gguf()
    config = expected.model_config
    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def entry(name: str, shape: tuple[int, ...], make: Callable[[], Tensor], wanted: str) -> _Entry:
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ExportError(f"format=gguf: llama.cpp has no name for {name}; {_INSTEAD}")
        if len(shape) < 2:
            wanted = "f32"
        elif wanted in ("q8_0", "q4_0") and shape[-1] % _BLOCK:
            wanted = "f16"
        return _Entry(name, called, shape, wanted, make)

    def of_layer(name: str) -> Callable[[], Tensor]:
        layer, factor = expected.layers[name], expected.factors.get(name)

        def merged() -> Tensor:
            of_master = factor if factor is None else factor.to(layer.B.device, torch.float32)
            return layer.effective_weight(of_master).cpu()

        return merged

    def of_dense(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor.detach().float().cpu()

    full = "q8_0" if kind == "q4_0" else kind
    dense = [entry(name, tuple(t.shape), of_dense(t), full) for name, t in expected.dense.items()]
    adapted = [entry(f"{n}.weight", layer.weight_shape, of_layer(n), kind) for n, layer in expected.layers.items()]
    return dense + adapted


def _type(kind: str) -> Any:
    return getattr(import_gguf().GGMLQuantizationType, kind.upper())


def _reordered(name: str, values: Tensor, config: Any) -> Tensor:
    """Rows of Llama's q and k, from halves that are turned against each other to neighbours."""
    num_heads = _heads_of(name, config)
    if num_heads is None:
        return values.contiguous()
    return values.view(num_heads, 2, -1, values.shape[-1]).transpose(1, 2).reshape(values.shape).contiguous()


def _as_tensor(values: np.ndarray[Any, Any], entry: _Entry, config: Any) -> Tensor:
    """What a file holds, as transformers has it."""
    tensor = torch.from_numpy(np.array(values, dtype=np.float32)).view(entry.shape)
    num_heads = _heads_of(entry.name, config)
    if num_heads is None:
        return tensor
    return tensor.view(num_heads, -1, 2, entry.shape[-1]).transpose(1, 2).reshape(entry.shape)


def _heads_of(name: str, config: Any) -> int | None:
    """Of a matrix whose rows are reordered; None for others."""
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    return next((int(number) for end, number in heads.items() if name.endswith(end)), None)


def _add_metadata(writer: Any, config: Any, kind: str, name: str) -> None:
    gguf = import_gguf()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    # By this very name, transformers takes a file of "llama" for another kind, whose tensors it cannot name.
    writer.add_name("a mistral model" if name == "mistral" else name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, tokenizer: GGUFTokenizer, directory: Path) -> None:
    gguf = import_gguf()
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.adds_space)
    if tokenizer.has_merges:
        writer.add_token_merges(gguf.SpecialVocab(directory, load_merges=True).merges)
    for special, index in tokenizer.special_ids.items():
        getattr(writer, f"add_{special}_token_id")(index)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


# ------------------------------------------------------------------------------------------------- verification


@torch.no_grad()
def verify_gguf(path: Path, expected: Expected, kind: str) -> Verification:
    """Reads the file with `gguf`, and loads it with transformers; both must give what was meant.

    Raises ExportError, naming what differs.
    """
    gguf = import_gguf()
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    entries = _entries(expected, kind)
    if stored.keys() != {entry.called for entry in entries}:
        raise ExportError(f"{path.name} holds other tensors than were written")
    meant: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for entry in entries:
        tensor = stored[entry.called]
        merged[entry.name] = entry.make()
        rows = _reordered(entry.name, merged[entry.name], expected.model_config)
        ours = gguf.quantize(rows.numpy(), _type(entry.kind))
        if tensor.tensor_type != _type(entry.kind) or not np.array_equal(tensor.data.reshape(-1), ours.reshape(-1)):
            raise ExportError(f"{entry.called} of {path.name} reads back otherwise than it was written")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        meant[entry.name] = _as_tensor(values, entry, expected.model_config)
        rounding = relative_difference(meant[entry.name], merged[entry.name])
        if not rounding <= _ROUNDING[entry.kind]:
            raise ExportError(
                f"{entry.called} of {path.name} is {rounding:.3f} (relative) away from {entry.name}, as no rounding to "
                f"{entry.kind} is"
            )
    reloaded = load_gguf(path)
    own = reloaded.state_dict()
    for name, tensor in meant.items():
        if name not in own or not torch.equal(own[name].float(), tensor):
            raise ExportError(f"{name} is another one where transformers loads {path.name}")
    # As many as are attended to with a window and without.
    tokens = random_tokens(expected.model_config, "cpu")[:, : _window(expected.model_config)]
    actual = reloaded(input_ids=tokens).logits.float()
    wanted, unrounded = (_logits(expected.model_config, tensors, tokens) for tensors in (meant, merged))
    relative = relative_difference(actual, wanted)
    if not relative < 1e-4:
        raise ExportError(
            f"transformers computes logits from {path.name} that differ by {relative:.1e} (relative) from those of the "
            "exported weights: the file describes another model"
        )
    return Verification(
        device="cpu",
        num_tokens=tokens.numel(),
        logits_max_difference=(actual - wanted).abs().max().item(),
        logits_relative_difference=relative,
        merged_logits_relative_difference=relative_difference(actual, unrounded),
    )


def _logits(model_config: Any, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Of transformers' model of the original configuration with these weights, in float32."""
    model = build_empty(model_config)
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    tie_weights(model)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"the reference model lacks {left}"
    logits: Tensor = model.eval()(input_ids=tokens).logits.float()
    return logits


def load_gguf(path: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a file as transformers loads it, dequantized, on the CPU and in eval mode.

    Raises ExportError where it does not.
    """
    import_gguf()
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    except Exception as error:  # whatever transformers raises, the file does not load
        raise ExportError(f"transformers cannot load {path}: {type(error).__name__}: {error}") from error
    return model.eval()
