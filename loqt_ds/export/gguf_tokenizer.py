"""A tokenizer as a GGUF file holds it: pieces, scores and types, or pieces and merges.

Two kinds are known to those who read GGUF, and both are made from `tokenizer.json`:

    "llama"   sentencepiece's BPE with byte fallback. The neighbours whose concatenation has the best score are merged
              first; the score of a piece is minus its id, which for BPE is its rank. Spaces are U+2581 in the pieces.
    "gpt2"    BPE of bytes, by merges; the rule that splits text before it goes by a name, and only known rules have one
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loqt_ds.export.report import ExportError

META_SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_RULES = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""Regular expression of a `Split` before the bytes -> the name that llama.cpp has for it."""

_INSTEAD = "export it with format=bf16 and convert that with llama.cpp's own convert_hf_to_gguf.py"


@dataclass(frozen=True)
class GGUFTokenizer:
    """What is written under `tokenizer.ggml`."""

    model: str
    """llama or gpt2."""
    pre: str
    """Name of the rule that splits text."""
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    adds_space: bool
    """Whether a text begins with a space of the tokenizer's own."""
    special_ids: dict[str, int]
    """bos, eos, unk, pad -> id."""
    adds_bos: bool
    chat_template: str | None

    @property
    def has_merges(self) -> bool:
        return self.model == "gpt2"


def read_tokenizer(directory: Path | None, num_rows: int) -> GGUFTokenizer:
    """The tokenizer of a directory, with as many tokens as the model has rows.

    Raises ExportError where there is none, or it is of a kind that GGUF has no name for.
    """
    if directory is None:
        raise ExportError(f"format=gguf holds the tokenizer in its file, and there is none; give one, or {_INSTEAD}")
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ExportError(f"format=gguf needs {file}, which is not there; {_INSTEAD}")
    content = json.loads(file.read_text(encoding="utf-8"))
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(str(directory))
    model, pre = _kind(content, file)
    names = {index: piece for piece, index in hf.get_vocab().items()}
    if len(names) > num_rows:
        raise ExportError(f"{file} has {len(names)} tokens, and the model {num_rows} rows; give the model's tokenizer")
    # A model may have more rows than its tokenizer has pieces, up to a round number.
    tokens = [names.get(index, f"[PAD{index}]") for index in range(num_rows)]
    types = _types(tokens, names, content, hf)
    adds_space = False
    if model == "llama":
        escaped = META_SPACE in json.dumps(content.get("normalizer"), ensure_ascii=False) or (
            (content.get("pre_tokenizer") or {}).get("type") == "Metaspace"
        )
        adds_space = _adds_space(content)
        if not escaped:
            tokens = [t.replace(" ", META_SPACE) if types[i] == _NORMAL else t for i, t in enumerate(tokens)]
    ids = {name: getattr(hf, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return GGUFTokenizer(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=[-float(index) for index in range(num_rows)] if model == "llama" else None,
        adds_space=adds_space,
        special_ids={name: int(index) for name, index in ids.items() if index is not None},
        adds_bos=_adds_bos(hf),
        chat_template=hf.chat_template if isinstance(hf.chat_template, str) else None,
    )


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


def _types(tokens: list[str], names: dict[int, str], content: dict[str, Any], hf: Any) -> list[int]:
    added = {entry["id"]: _CONTROL if entry.get("special") else _USER_DEFINED for entry in content["added_tokens"]}
    if hf.unk_token_id is not None:
        added[hf.unk_token_id] = _UNKNOWN
    has_bytes = bool(content["model"].get("byte_fallback"))

    def of(index: int, token: str) -> int:
        if index not in names:
            return _UNUSED
        if index in added:
            return added[index]
        return _BYTE if has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else _NORMAL

    return [of(index, token) for index, token in enumerate(tokens)]


def _kind(content: dict[str, Any], file: Path) -> tuple[str, str]:
    """(model, pre) of `tokenizer.json`."""
    model = content["model"]
    if model["type"] != "BPE":
        raise ExportError(f"{file} is a tokenizer of type {model['type']}; GGUF's readers know BPE: {_INSTEAD}")
    if model.get("byte_fallback"):
        return "llama", "default"
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if steps and steps[-1].get("type") == "ByteLevel":
        rules = [step["pattern"].get("Regex") for step in steps[:-1] if step.get("type") == "Split"]
        if not rules and len(steps) == 1 and steps[0].get("use_regex", True):
            return "gpt2", "gpt-2"
        if len(rules) == len(steps) - 1 == 1 and rules[0] in SPLIT_RULES:
            return "gpt2", SPLIT_RULES[rules[0]]
    raise ExportError(f"{file} splits text by a rule that this export has no GGUF name for; {_INSTEAD}")


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether a normalizer or splitter puts a space before the text."""
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    before = content.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or before.get("prepend_scheme") in ("first", "always")


def _adds_bos(hf: Any) -> bool:
    """By trying: where a tokenizer says so differs from kind to kind."""
    ids = hf("a")["input_ids"]
    return bool(ids) and hf.bos_token_id is not None and ids[0] == hf.bos_token_id
