"""A sentencepiece model as a `tokenizers` fast tokenizer with the same ids.

transformers' own conversion (5.23) gives other ids on runs of spaces: it drops the dummy prefix where a text begins
with a space, and orders merges otherwise. Built here from the model's protocol buffer instead:

* BPE. sentencepiece merges the neighbours whose concatenation is the piece with the best score, the leftmost first. So
  the merges are all pairs of normal pieces whose concatenation is a normal piece, by falling score; control, byte and
  unknown pieces take no part, so text that spells `</s>` stays text in both.
* Unigram. The same search, but sentencepiece sums float32 and `tokenizers` float64, so that near ties can fall
  otherwise (T5: in 4 of 2400 web documents, one word each); and `tokenizers` lets the text `</s>` match the control
  piece. Such differences cannot be removed; `deviation` finds them, and the caller says them.
* Normalizer: the model's character map, then stripping and collapsing of spaces, the dummy prefix, and the replacement
  of spaces by U+2581, each only where the model's normalizer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loqt_ds.data.errors import DataError

MODEL_PROTO = "ModelProto"
META_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # sentencepiece_model.proto, SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType

# What distinguishes tokenizers in practice; real text comes on top of it.
SAMPLES: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "Hello world",
    "  two spaces before,  between  and after  ",
    "def f(x):\n    return x\n\n\nclass A:\n\tpass\r\n",
    "line one\n\n  line three\n",
    "caf\u00e9 cafe\u0301 na\u00efve \u00df \u00f0 \u00fe \u00e6 \u0416 \u03a9",
    "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8 \u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ee\U0001f1f8",
    "a\u00a0b\u200bc\u3000d \ufb01 \u2460 \uff21",
    "0 1 22 333 4444 3.14159 1,000,000",
    "======== -------- ........ aaaaaaa ababababa",
    *(" " * width + "x" for width in range(3, 20)),
)
LITERALS = ("<s>", "</s>", "<unk>", "<pad>", "<0x0A>", META_SPACE)


def parse(model: bytes) -> Any:
    """The ModelProto of a sentencepiece model's bytes."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    # protobuf makes the class at run time, where a type checker cannot see it
    proto = getattr(sentencepiece_model_pb2, MODEL_PROTO)()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise DataError(f"not a sentencepiece model: {error}") from error
    return proto


def is_bpe(proto: Any) -> bool:
    return bool(proto.trainer_spec.model_type == _BPE)


def _merges(proto: Any) -> list[tuple[str, str]]:
    normal = {piece.piece: (index, piece.score) for index, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    merges = [
        (-score, index, at, piece[:at], piece[at:])
        for piece, (index, score) in normal.items()
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _model(proto: Any) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    if trainer.model_type == _BPE:
        return models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=trainer.unk_piece,
            byte_fallback=trainer.byte_fallback,
            fuse_unk=not trainer.byte_fallback,
        )
    if trainer.model_type == _UNIGRAM:
        vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    raise DataError("a sentencepiece model of words or characters cannot be used; train one of type bpe or unigram")


def _normalizer(proto: Any) -> Any:
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # \A and \z: ^ and $ would match at every line
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", META_SPACE))
    if spec.remove_extra_whitespaces:  # sentencepiece strips the end last, when U+2581 of the text looks like a space
        steps.append(normalizers.Replace(Regex(rf"{META_SPACE if spec.escape_whitespaces else ' '}+\z"), ""))
    return normalizers.Sequence(steps) if steps else None


def fast_tokenizer(proto: Any) -> Any:
    """A transformers fast tokenizer (backend `tokenizers`) for a sentencepiece model.

    `split_special_tokens` is set: text that spells a special token is encoded as text, as sentencepiece does.
    """
    from tokenizers import AddedToken, Tokenizer, decoders
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(_model(proto))
    normalizer = _normalizer(proto)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    steps: list[Any] = [decoders.Replace(META_SPACE, " ")] if proto.normalizer_spec.escape_whitespaces else []
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in defined])

    def piece(index: int) -> str | None:
        return proto.pieces[index].piece if 0 <= index < len(proto.pieces) else None

    trainer = proto.trainer_spec
    names = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    control = {index for index, item in enumerate(proto.pieces) if item.type in (_UNKNOWN, _CONTROL)}
    tokens = {f"{name}_token": piece(index) for name, index in names.items() if index in control}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in tokens.items() if token is not None},
    )


def deviation(
    expected: Callable[[str], list[int]], actual: Callable[[str], list[int]], texts: Sequence[str]
) -> tuple[int, str] | None:
    """(number of texts whose ids differ, a description of the first difference), or None where all are identical."""
    num_different, first = 0, ""
    for text in texts:
        ours, theirs = expected(text), actual(text)
        if ours == theirs:
            continue
        num_different += 1
        if not first:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(ours), len(theirs)) if at is None else at
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            first = f"{shown!r}: from token {at} on {ours[at : at + 6]} became {theirs[at : at + 6]}"
    return (num_different, first) if num_different else None
