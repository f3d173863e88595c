"""Token streams to rows of a fixed length.

Packed: documents are joined, [doc, eot, doc, eot, ...] = t[0..N), and cut with stride s: row i has inputs
t[i s : (i+1) s] and targets t[i s + 1 : (i+1) s + 1]. Every token but the very first is a target exactly once; the last
row is shorter and padded when batched.

Truncated, as the paper's runs did: one document a row, its first s + 1 tokens (s inputs, s targets), the rest lost and
counted.

Padding stands at the right and has ignored targets; under causal attention no real position sees it, so that no mask is
needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100


class Row(NamedTuple):
    """inputs, targets: (length,) int64, length <= s; documents: (length,) int64, the document each input belongs to."""

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: NDArray[np.int64]


class TokenDocuments(Protocol):
    """tokens (N,): all documents, each closed by end-of-text; offsets (num_documents + 1,): where each begins."""

    @property
    def tokens(self) -> NDArray[np.integer]: ...

    @property
    def offsets(self) -> NDArray[np.int64]: ...


class PackedRows:
    """Rows of the joined documents."""

    num_truncated_tokens = 0

    def __init__(self, store: TokenDocuments, sequence_length: int) -> None:
        self._store = store
        self._length = sequence_length
        self.num_predicted = max(0, len(store.tokens) - 1)

    def __len__(self) -> int:
        return -(-self.num_predicted // self._length)

    def num_targets(self, index: int) -> int:
        return min(self._length, self.num_predicted - index * self._length)

    def row(self, index: int) -> Row:
        start = index * self._length
        stop = min(start + self._length, self.num_predicted)
        tokens = np.asarray(self._store.tokens[start : stop + 1]).astype(np.int64)
        documents = np.searchsorted(self._store.offsets, np.arange(start, stop), side="right") - 1
        return Row(tokens[:-1], tokens[1:], documents)


class TruncatedRows:
    """One document a row."""

    def __init__(self, store: TokenDocuments, sequence_length: int) -> None:
        self._store = store
        self._length = sequence_length
        kept = self._kept = np.minimum(np.diff(store.offsets), sequence_length + 1)
        self.num_truncated_tokens = int(store.offsets[-1] - kept.sum())
        self.num_predicted = int((kept - 1).sum())

    def __len__(self) -> int:
        return len(self._store.offsets) - 1

    def num_targets(self, index: int) -> int:
        return int(self._kept[index]) - 1

    def row(self, index: int) -> Row:
        start = int(self._store.offsets[index])
        stop = min(int(self._store.offsets[index + 1]), start + self._length + 1)
        tokens = np.asarray(self._store.tokens[start:stop]).astype(np.int64)
        return Row(tokens[:-1], tokens[1:], np.full(len(tokens) - 1, index, dtype=np.int64))


Rows = PackedRows | TruncatedRows


def make_rows(store: TokenDocuments, sequence_length: int, packing: str) -> Rows:
    """Rows for `data.packing`: "packed" or "truncated"."""
    kinds: dict[str, type[PackedRows] | type[TruncatedRows]] = {"packed": PackedRows, "truncated": TruncatedRows}
    return kinds[packing](store, sequence_length)


def collate(
    rows: Sequence[Row], sequence_length: int, pad_id: int, *, mask_documents: bool = False
) -> dict[str, Tensor]:
    """A batch: input_ids and targets (b, s) int64, targets already shifted and -100 where nothing is predicted.

    With `mask_documents` also attention_mask (b, 1, s, s) bool, True where a position may look (causal, within its
    document; padding looks at padding, so that no row is empty), and position_ids (b, s) int64, from 0 in each document
    (in each part of one, where a row begins inside it).
    """
    batch = len(rows)
    input_ids = np.full((batch, sequence_length), pad_id, dtype=np.int64)
    targets = np.full((batch, sequence_length), IGNORED, dtype=np.int64)
    documents = np.full((batch, sequence_length), -1, dtype=np.int64)
    for index, row in enumerate(rows):
        length = len(row.inputs)
        input_ids[index, :length] = row.inputs
        targets[index, :length] = row.targets
        documents[index, :length] = row.documents
    result = {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets)}
    if mask_documents:
        same = documents[:, :, None] == documents[:, None, :]  # (b, s, s)
        causal = np.tril(np.ones((sequence_length, sequence_length), dtype=bool))
        result["attention_mask"] = torch.from_numpy((same & causal)[:, None])
        positions = np.broadcast_to(np.arange(sequence_length), documents.shape)
        begins = np.ones_like(documents, dtype=bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
        result["position_ids"] = torch.from_numpy(positions - first)
    return result
