"""Rows tokenized on the fly from documents read in order, resumable at the exact row.

Nothing is stored. Rows are gathered into blocks of BLOCK_ROWS; within a block they are permuted (data.shuffle), as a
stream cannot be shuffled as a whole. A position is small: (epoch, block, where the block begins: document and token in
it, row in the block). Resuming reads from the block's first document on. Every rank reads and tokenizes the whole
stream and keeps its rows: that costs world_size times the tokenizing, and buys that the global order of rows does not
depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from loqt_ds.data.corpus import Corpus, Counts, Split
from loqt_ds.data.errors import DataError
from loqt_ds.data.order import permuted
from loqt_ds.data.packing import Row
from loqt_ds.data.tokenizer import Tokenizer

BLOCK_ROWS = 1024
Place = tuple[int, int]  # document's position in the source, token in it


class StreamSequence:
    """The global sequence of rows over a stream. `num_truncated_tokens` counts since this object was made."""

    def __init__(
        self,
        corpus: Corpus,
        split: Split,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        packing: str,
        shuffle: bool,
        seed: int,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self._corpus = corpus
        self._split = split
        self._tokenizer = tokenizer
        self._length = sequence_length
        self._reader = {"packed": self._packed, "truncated": self._truncated}[packing]
        self._shuffle = shuffle
        self._seed = seed
        self._block_rows = block_rows
        self.num_truncated_tokens = 0
        self._enter(epoch=0, block=0, start=(0, 0), position=0)

    def _enter(self, *, epoch: int, block: int, start: Place, position: int) -> None:
        self._epoch, self._block, self._start, self._position = epoch, block, start, position
        self._rows: list[Row] = []
        self._order: list[int] = []
        self._next_start = start
        self._iterator = self._reader(start)
        self._loaded = False

    def _load_block(self) -> None:
        """Read the block at `_start`; an ended stream begins its next epoch."""
        if self._loaded:
            self._block += 1
            self._start = self._next_start
            self._position = 0
        self._rows = self._read()
        if not self._rows:
            if self._block == 0 and self._start == (0, 0):
                raise DataError(f"{self._corpus.option} holds no training text; give more data")
            self._enter(epoch=self._epoch + 1, block=0, start=(0, 0), position=0)
            self._rows = self._read()
            if not self._rows:
                raise DataError(f"{self._corpus.option} holds no training text in epoch {self._epoch}; was it changed?")
        order = np.arange(len(self._rows), dtype=np.int64)
        if self._shuffle:
            order = permuted(order, len(order), self._seed, self._epoch, self._block)
        self._order = [int(index) for index in order]
        self._loaded = True

    def _read(self) -> list[Row]:
        rows: list[Row] = []
        for row, next_start in self._iterator:
            rows.append(row)
            self._next_start = next_start
            if len(rows) == self._block_rows:
                break
        return rows

    def take(self, num_rows: int, first: int, num_wanted: int) -> list[Row]:
        taken = [self._next_row() for _ in range(num_rows)]
        return taken[first : first + num_wanted]

    def _next_row(self) -> Row:
        if not self._loaded or self._position == len(self._rows):
            self._load_block()
        row = self._rows[self._order[self._position]]
        self._position += 1
        return row

    @property
    def epoch(self) -> int:
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "block": self._block,
            "start": list(self._start),
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        document, token = state["start"]
        position = state["position"]
        self._enter(epoch=state["epoch"], block=state["block"], start=(document, token), position=position)
        if position:
            self._load_block()
            if position > len(self._rows):
                raise DataError(f"{self._corpus.option} ends before the position in the checkpoint; was it changed?")
            self._position = position

    def _ids(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        for index, document in self._corpus.documents("train", self._split, Counts(), first):
            ids = [*self._tokenizer.encode(document.text), self._tokenizer.eot_id]
            yield index, np.asarray(ids, dtype=np.int64)

    def _packed(self, start: Place) -> Iterator[tuple[Row, Place]]:
        """(row, where the next row begins); see `packing.py`."""
        first, offset = start
        length = self._length
        tokens, owners, places = (np.zeros(0, dtype=np.int64) for _ in range(3))
        for index, ids in self._ids(first):
            skipped = offset if index == first else 0
            tokens = np.concatenate([tokens, ids[skipped:]])
            owners = np.concatenate([owners, np.full(len(ids) - skipped, index, dtype=np.int64)])
            places = np.concatenate([places, np.arange(skipped, len(ids), dtype=np.int64)])
            while len(tokens) > length:
                row = Row(tokens[:length], tokens[1 : length + 1], owners[:length])
                tokens, owners, places = tokens[length:], owners[length:], places[length:]
                yield row, (int(owners[0]), int(places[0]))
        if len(tokens) > 1:
            yield Row(tokens[:-1], tokens[1:], owners[:-1]), (int(owners[-1]), int(places[-1]))

    def _truncated(self, start: Place) -> Iterator[tuple[Row, Place]]:
        for index, ids in self._ids(start[0]):
            kept = ids[: self._length + 1]
            self.num_truncated_tokens += len(ids) - len(kept)
            yield Row(kept[:-1], kept[1:], np.full(len(kept) - 1, index, dtype=np.int64)), (index + 1, 0)
