"""Tokens of one side of the corpus, made once and mapped into memory.

`tokens.bin` holds the ids (uint16 where the vocabulary allows, else uint32), each document closed by end-of-text;
`offsets.npy` where each document begins; `counts.npy` how often each id occurs; `meta.json` what was met on the way.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loqt_ds.data.cache import Say, entry, hash_of
from loqt_ds.data.corpus import Corpus, Counts, Split
from loqt_ds.data.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 1 << 20  # what one call of the tokenizer's threads gets
_SAY_EVERY_SECONDS = 5.0
_NUM_HASHED = 1 << 16
_VERSION = 1


@dataclass(frozen=True)
class TokenStore:
    """tokens (N,), offsets (num_documents + 1,) int64, counts (vocab_size,) int64, and the documents met."""

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    met: Counts

    @property
    def digest(self) -> str:
        """Hash of how often each token occurs, where documents begin, and the first and last tokens: it tells other
        content apart without reading all of it."""
        found = hashlib.sha256(self.counts.tobytes())
        for part in (self.offsets, self.tokens[:_NUM_HASHED], self.tokens[-_NUM_HASHED:]):
            found.update(part.tobytes())
        return found.hexdigest()[:32]


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def encoded(
    texts: Iterator[str], tokenizer: Tokenizer, *, workers: int, chunk_characters: int = _CHUNK_CHARACTERS
) -> Iterator[list[int]]:
    """Ids of each text with end-of-text, in order, chunk by chunk in parallel."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= chunk_characters:
            yield from ([*ids, tokenizer.eot_id] for ids in tokenizer.encode_batch(chunk, workers))
            chunk, size = [], 0
    if chunk:
        yield from ([*ids, tokenizer.eot_id] for ids in tokenizer.encode_batch(chunk, workers))


def in_memory(texts: Iterator[str], tokenizer: Tokenizer, *, workers: int = 1) -> TokenStore:
    """A store that is not on disk."""
    documents = [np.asarray(ids, dtype=np.int64) for ids in encoded(texts, tokenizer, workers=workers)]
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])]).astype(np.int64)
    counts = np.bincount(tokens, minlength=tokenizer.vocab_size).astype(np.int64)
    return TokenStore(tokens.astype(token_dtype(tokenizer.vocab_size)), offsets, counts, Counts(len(documents)))


def token_store(
    corpus: Corpus, side: str, split: Split, tokenizer: Tokenizer, *, cache: Path, workers: int, say: Say
) -> TokenStore:
    """The tokens of `side` ("train" or "validation"), from the cache or made now."""
    key = hash_of([_VERSION, corpus.key(cache), side, tokenizer.fingerprint])

    def build(directory: Path) -> None:
        _write(directory, corpus, side, split, tokenizer, workers, say)

    directory = entry(cache, "tokens", key, build, say)
    meta = json.loads((directory / "meta.json").read_text())
    dtype = token_dtype(tokenizer.vocab_size)
    path = directory / "tokens.bin"  # an empty file cannot be mapped
    tokens = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
    offsets = np.load(directory / "offsets.npy", mmap_mode="r", allow_pickle=False)
    return TokenStore(tokens, offsets, np.load(directory / "counts.npy", allow_pickle=False), Counts(**meta["met"]))


def _write(
    directory: Path, corpus: Corpus, side: str, split: Split, tokenizer: Tokenizer, workers: int, say: Say
) -> None:
    met = Counts()
    dtype = token_dtype(tokenizer.vocab_size)
    lengths: list[int] = []
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    started = said = time.monotonic()
    texts = (document.text for _, document in corpus.documents(side, split, met))
    num_tokens = 0
    with (directory / "tokens.bin").open("wb") as handle:
        for ids in encoded(texts, tokenizer, workers=workers):
            array = np.asarray(ids, dtype=dtype)
            array.tofile(handle)
            np.add.at(counts, array, 1)
            lengths.append(len(array))
            num_tokens += len(array)
            if time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                rate = met.num_characters / (said - started) / 1e6
                say(
                    f"tokenizing {side}: {met.num_characters / 1e6:.1f} of {split.num_characters / 1e6:.1f} million "
                    f"characters read, {num_tokens} tokens, {rate:.1f} million characters/s"
                )
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
    np.save(directory / "offsets.npy", offsets, allow_pickle=False)
    np.save(directory / "counts.npy", counts, allow_pickle=False)
    (directory / "meta.json").write_text(json.dumps({"met": asdict(met), "num_tokens": num_tokens}))
    say(f"tokenized {side}: {met.num_documents} documents, {num_tokens} tokens in {time.monotonic() - started:.1f} s")


def unigram_loss(train_counts: NDArray[np.int64], validation_counts: NDArray[np.int64]) -> float:
    """Cross-entropy in nats a token of the validation tokens under add-one-smoothed training frequencies:
    -sum_v c_v log p_v / sum_v c_v, p_v = (n_v + 1) / (N + V)."""
    log_p = np.log(train_counts + 1.0) - np.log(float(train_counts.sum()) + len(train_counts))
    return float(-(validation_counts * log_p).sum() / max(1, validation_counts.sum()))
