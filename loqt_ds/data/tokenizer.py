"""Text to token ids: trained from the corpus, a sentencepiece `.model`, or a transformers tokenizer.

The trained one is a sentencepiece BPE model with byte fallback and no normalization at all, so that
decode(encode(text)) == text for every text that UTF-8 can carry. sentencepiece writes a space inside pieces as U+2581,
which makes the two indistinguishable; after training, the pieces are therefore rewritten with real spaces and the
escaping is switched off, U+2581 itself then being spelled in bytes. A newline is always a piece of its own. BPE rather
than unigram because it trains ten times faster (3 s against 36 s on 2 cores for 12.6 million characters), compresses
as well (3.12 against 3.06 characters a token on the standard library) and has a `tokenizers` twin with identical ids.

For model.task=masked_lm the trained one is BERT's kind instead (see `wordpiece`), which has a token to mask with.

`.save` writes what `AutoTokenizer.from_pretrained` loads, and checks it against the ids used in training.
"""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from loqt_ds.data import spm_fast
from loqt_ds.data.cache import Say, cache_directory, entry, hash_of
from loqt_ds.data.corpus import Corpus, Split, content_digest, split_hash
from loqt_ds.data.errors import DataError
from loqt_ds.data.wordpiece import train_wordpiece

SAMPLE_CHARACTERS = 16_000_000  # training text; more does not change a few thousand pieces
_VERSION = 1
_TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.9995,
    "max_sentence_length": 65536,  # bytes; longer lines are not trained on, though of course encoded
    "user_defined_symbols": ["\n"],
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
}


def num_workers(num_processes: int | None) -> int:
    """`data.num_processes`, or the number of CPU cores this process may use."""
    return num_processes or len(os.sched_getaffinity(0))


class Tokenizer(ABC):
    """vocab_size counts every id, added tokens too; eot_id ends a document; pad_id fills rows (and is never a target).

    `fingerprint` is a hash of everything the ids depend on.
    """

    vocab_size: int
    eot_id: int
    pad_id: int
    fingerprint: str
    name: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], workers: int) -> list[list[int]]:
        """`encode` for many texts, in `workers` native threads (which need no copy of the process and no pickling)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; those that stand for no token are passed over."""

    @property
    @abstractmethod
    def hf(self) -> Any:
        """The transformers tokenizer that `save` writes."""

    def save(
        self,
        directory: str | Path,
        *,
        texts: Sequence[str] = (),
        chat_template: str | None = None,
        say: Say = print,
    ) -> None:
        """Write tokenizer files; load them with AutoTokenizer; compare the ids on built-in samples and on `texts`.

        chat_template: the one that was trained with, where it is not the tokenizer's own; from here on it is.

        A difference is said with the text that shows it. For the tokenizer trained here it is a ValueError, since there
        it can only be a defect.
        """
        from transformers import AutoTokenizer

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if chat_template is not None:
            self.hf.chat_template = chat_template
        self.hf.save_pretrained(str(directory))
        loaded = AutoTokenizer.from_pretrained(str(directory))
        samples = [*spm_fast.SAMPLES, *spm_fast.LITERALS, *texts]
        found = spm_fast.deviation(self.encode, lambda text: _plain_ids(loaded, text), samples)
        if found:
            message = (
                f"data.tokenizer={self.name}: saved for transformers, {found[0]} of {len(samples)} texts checked get "
                f"other ids than in training, the first {found[1]}"
            )
            if self.must_be_exact:
                raise DataError(f"{message}; report this, and set data.tokenizer to another tokenizer meanwhile")
            say(message)

    @property
    def must_be_exact(self) -> bool:
        return False


def _plain_ids(hf: Any, text: str) -> list[int]:
    return list(hf(text, add_special_tokens=False, verbose=False)["input_ids"])


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, encoded by sentencepiece itself. The vocabulary is the model's pieces, nothing added."""

    def __init__(self, model: bytes, name: str, *, trained_here: bool = False) -> None:
        import sentencepiece

        self.name = name
        self._trained_here = trained_here
        self._proto = spm_fast.parse(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"data.tokenizer={name} is no sentencepiece model ({error}); name another file") from error
        self.vocab_size = self._processor.get_piece_size()
        self.eot_id = self._processor.eos_id()
        if self.eot_id < 0:
            raise DataError(
                f"data.tokenizer={name} has no end-of-text piece (eos_id is -1), which separates documents; use a "
                f"model trained with one"
            )
        pad_id = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eot_id
        self.fingerprint = hash_of([_VERSION, "sentencepiece", sentencepiece.__version__, model.hex()])
        self._hf: Any = None

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str], workers: int) -> list[list[int]]:
        return list(self._processor.encode(list(texts), num_threads=workers))

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than there are tokens: those stand for nothing, as in transformers.
        return str(self._processor.decode([int(index) for index in ids if index < self.vocab_size]))

    @property
    def hf(self) -> Any:
        if self._hf is None:
            self._hf = spm_fast.fast_tokenizer(self._proto)
        return self._hf

    @property
    def must_be_exact(self) -> bool:
        return self._trained_here


class TransformersTokenizer(Tokenizer):
    """A tokenizer that transformers loads; text that spells its special tokens is encoded as transformers does."""

    def __init__(self, hf: Any, name: str) -> None:
        self.name = name
        self._hf = hf
        self.vocab_size = len(hf)
        # An encoder's separates by sep_token, and may have no eos_token.
        end = hf.sep_token_id if hf.eos_token_id is None else hf.eos_token_id
        if end is None:
            raise DataError(
                f"data.tokenizer={name} has no end-of-text token (eos_token), which separates documents; set eos_token "
                f"in its tokenizer_config.json, or use another"
            )
        self.eot_id = int(end)
        self.pad_id = int(hf.pad_token_id) if hf.pad_token_id is not None else self.eot_id
        backend = hf.backend_tokenizer.to_str() if hf.is_fast else sorted(hf.get_vocab().items())
        self.fingerprint = hash_of([_VERSION, type(hf).__name__, backend, bool(hf.split_special_tokens)])

    def encode(self, text: str) -> list[int]:
        return _plain_ids(self._hf, text)

    def encode_batch(self, texts: Sequence[str], workers: int) -> list[list[int]]:
        if workers > 1 and self._hf.is_fast:  # `tokenizers` brings its own threads, one a core
            batch = self._hf(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            return [list(ids) for ids in batch]
        with ThreadPoolExecutor(1 if self._hf.is_fast else workers) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._hf.decode(list(map(int, ids)), clean_up_tokenization_spaces=False))

    @property
    def hf(self) -> Any:
        return self._hf


def load_or_train_tokenizer(config: Any, say: Say = print) -> Tokenizer:
    """The tokenizer that `config.data.tokenizer` names; None: one trained from the training documents, and cached.

    Raises DataError where it does not exist, cannot be loaded, or lacks an end-of-text token. Safe in several processes
    at once: one trains, the others wait.
    """
    if config.data.tokenizer is None:
        return _trained(config, say)
    return load_tokenizer(str(config.data.tokenizer), say)


def load_tokenizer(name: str, say: Say = print) -> Tokenizer:
    """A directory or a hub name (through AutoTokenizer), or a sentencepiece `.model` file."""
    path = Path(name).expanduser()
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        described = any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
        if not described and len(models) == 1:
            return _sentencepiece_file(models[0], say)
        if not described and not (path / "config.json").is_file():
            raise DataError(
                f"data.tokenizer={name}: the directory has neither tokenizer.json, tokenizer_config.json nor one "
                f".model file; name a directory that transformers saved, or a .model file"
            )
    elif path.is_file():
        if path.suffix != ".model":
            raise DataError(
                f"data.tokenizer={name} is a file, but not a sentencepiece .model file; name the directory it is in"
            )
        return _sentencepiece_file(path, say)
    elif name.endswith(".model") or name.startswith(("/", ".", "~")):
        raise DataError(f"data.tokenizer={name}: no such file (looked from {Path.cwd()}); correct the path")
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise DataError(
            f"data.tokenizer={name}: transformers cannot load it ({type(error).__name__}: {error}); name a directory "
            f"with tokenizer files, a sentencepiece .model file or, with network access, a hub name"
        ) from error
    return TransformersTokenizer(hf, name)


def _sentencepiece_file(path: Path, say: Say) -> SentencePieceTokenizer:
    model = path.read_bytes()
    if not model:
        raise DataError(f"data.tokenizer={path} is empty (0 bytes); fetch it again")
    try:
        tokenizer = SentencePieceTokenizer(model, str(path))
    except DataError as error:
        raise DataError(f"data.tokenizer={path}: {error}") from error
    samples = [*spm_fast.SAMPLES, *spm_fast.LITERALS]
    found = spm_fast.deviation(tokenizer.encode, lambda text: _plain_ids(tokenizer.hf, text), samples)
    if found:
        say(
            f"data.tokenizer={path}: its transformers twin, which is saved with the model, gives other ids for "
            f"{found[0]} of {len(samples)} texts checked, the first {found[1]}"
        )
    return tokenizer


def _trained(config: Any, say: Say) -> Tokenizer:
    data = config.data
    cache = cache_directory(data.cache_dir)
    corpus = Corpus(data, say)
    size = int(data.tokenizer_vocab_size)
    if corpus.streaming:
        split = corpus.stream_split()
        sample = list(_sample(corpus, split))
        content = hash_of(sample)
    else:
        split = corpus.survey(cache, say)
        sample = []
        content = corpus.key(cache)

    def texts() -> list[str]:
        found = sample or list(_sample(corpus, split))
        if not any(text.strip("\n") for text in found):
            raise DataError(
                f"{corpus.option} holds no text to train a tokenizer from (documents identical to held-out ones are "
                "kept out of training); set data.tokenizer, or give more text"
            )
        say(f"training a tokenizer of {size} pieces from {sum(map(len, found)) / 1e6:.1f} million characters")
        return found

    name = f"trained from {corpus.option}"
    if config.model.task == "masked_lm":
        return _trained_wordpiece(cache, content, size, texts, name, say)
    return _trained_sentencepiece(cache, content, size, texts, name, num_workers(data.num_processes), say)


def _trained_sentencepiece(
    cache: Path, content: str, size: int, texts: Callable[[], list[str]], name: str, workers: int, say: Say
) -> SentencePieceTokenizer:
    import sentencepiece

    key = hash_of([_VERSION, sentencepiece.__version__, content, size, SAMPLE_CHARACTERS, _TRAINER])

    def build(directory: Path) -> None:
        found = texts()
        model = train_sentencepiece(found, size, workers=workers)
        tokenizer = SentencePieceTokenizer(model, "trained", trained_here=True)
        checked = [text[:4000] for text in found[:: max(1, len(found) // 100)]]
        if any(tokenizer.decode(tokenizer.encode(text)) != text for text in checked):
            raise AssertionError("the trained tokenizer does not give back the text it was given")
        tokenizer.save(directory / "check", texts=checked, say=say)
        for path in (directory / "check").iterdir():
            path.rename(directory / path.name)
        (directory / "check").rmdir()
        (directory / "sentencepiece.model").write_bytes(model)

    model = (entry(cache, "tokenizers", key, build, say) / "sentencepiece.model").read_bytes()
    return SentencePieceTokenizer(model, name, trained_here=True)


def _trained_wordpiece(
    cache: Path, content: str, size: int, texts: Callable[[], list[str]], name: str, say: Say
) -> TransformersTokenizer:
    import tokenizers
    from transformers import AutoTokenizer

    key = hash_of([_VERSION, "wordpiece", tokenizers.__version__, content, size, SAMPLE_CHARACTERS])

    def build(directory: Path) -> None:
        train_wordpiece(texts(), size).save_pretrained(str(directory))

    return TransformersTokenizer(AutoTokenizer.from_pretrained(entry(cache, "tokenizers", key, build, say)), name)


def _sample(corpus: Corpus, split: Split) -> Iterator[str]:
    """About SAMPLE_CHARACTERS of the training documents: all of a small corpus, else documents chosen by their hash
    (of a stream: the first)."""
    keep = 1.0 if corpus.streaming else min(1.0, SAMPLE_CHARACTERS / max(1, split.num_characters))
    left = SAMPLE_CHARACTERS if corpus.streaming else 2 * SAMPLE_CHARACTERS
    for _, document in corpus.documents("train", split):
        chosen = split_hash(b"tokenizer" + content_digest(document.text)) < keep * 2**64
        if not chosen and split.tail is None:
            continue
        text = document.text[:SAMPLE_CHARACTERS]
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def train_sentencepiece(texts: Sequence[str], vocab_size: int, *, workers: int = 1) -> bytes:
    """A serialized sentencepiece model of exactly `vocab_size` pieces (see the module's docstring).

    Raises DataError where the text is too small, or `vocab_size` too small for its characters.
    """
    import sentencepiece

    def lines() -> Iterator[str]:
        for text in texts:
            yield from filter(None, text.split("\n"))

    if next(islice(lines(), 1), None) is None:
        raise DataError("there is no text to train a tokenizer from; set data.tokenizer, or give more text")
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=buffer,
            vocab_size=vocab_size,
            num_threads=workers,
            minloglevel=2,
            **_TRAINER,
        )
    except RuntimeError as error:
        if at_most := re.search(r"value <= (\d+)", str(error)):
            raise DataError(
                f"data.tokenizer_vocab_size={vocab_size} is more than this corpus supports; use at most "
                f"{at_most.group(1)}, give more text, or set data.tokenizer"
            ) from error
        if at_least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise DataError(
                f"data.tokenizer_vocab_size={vocab_size} is less than the bytes and characters of this corpus need; "
                f"use more than {at_least.group(1)}"
            ) from error
        raise DataError(f"data.tokenizer_vocab_size={vocab_size}: sentencepiece cannot train: {error}") from error
    return _with_real_spaces(buffer.getvalue())


def _with_real_spaces(model: bytes) -> bytes:
    """Rewrite U+2581 in the pieces as a space, switch the escaping off, make the newline an ordinary piece."""
    proto = spm_fast.parse(model)
    proto.normalizer_spec.escape_whitespaces = False
    proto.trainer_spec.ClearField("user_defined_symbols")
    proto.trainer_spec.ClearField("num_threads")  # or the bytes, and every key made of them, would name the machine
    for piece in proto.pieces:
        if piece.type in (1, 4):  # normal, user defined
            piece.piece = piece.piece.replace(spm_fast.META_SPACE, " ")
        if piece.type == 4:
            piece.type = 1
    return bytes(proto.SerializeToString())
