"""Batches for training, resumable at any position, and batches for evaluation, always the same.

All ranks see one global sequence of rows, a function of (data, seed): epoch e visits row
permutation(seed, e)(position), and the next epoch follows without a gap. Micro-batch j of rank k takes the global rows
[(j world_size + k) m, (j world_size + k + 1) m), m = micro_batch_size. So a global batch holds the same rows for every
world size that divides it, and a run resumes on another number of ranks at the very next row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from loqt_ds.data.errors import DataError
from loqt_ds.data.order import permuted

Collate = Callable[[list[Any]], dict[str, Tensor]]
"""Makes a batch, "targets" among its tensors, of rows (`packing.collate` of those of plain text)."""


class Rows(Protocol):
    """Rows that can be read in any order."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any: ...


class HeldOutRows(Rows, Protocol):
    """num_predicted: how many targets all rows have."""

    @property
    def num_predicted(self) -> int: ...

    def num_targets(self, index: int) -> int:
        """How many targets one row has."""
        ...


class Sequence(Protocol):
    """The global sequence of rows, with a position in it."""

    def take(self, num_rows: int, first: int, num_wanted: int) -> list[Any]:
        """Advance by `num_rows`; return those at [first, first + num_wanted) among them."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StoredSequence:
    """The sequence over rows that can be read in any order."""

    def __init__(self, rows: Rows, *, shuffle: bool, seed: int) -> None:
        self._rows = rows
        self._shuffle = shuffle
        self._seed = seed
        self._rows_seen = 0

    def take(self, num_rows: int, first: int, num_wanted: int) -> list[Any]:
        begin = self._rows_seen + first
        self._rows_seen += num_rows
        return [self._rows.row(index) for index in self._indices(begin, num_wanted)]

    def _indices(self, begin: int, count: int) -> list[int]:
        epochs, positions = np.divmod(np.arange(begin, begin + count, dtype=np.int64), len(self._rows))
        if self._shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                positions[here] = permuted(positions[here], len(self._rows), self._seed, int(epoch))
        return [int(index) for index in positions]

    def state_dict(self) -> dict[str, Any]:
        epoch, position = divmod(self._rows_seen, len(self._rows))
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows_seen = state["epoch"] * len(self._rows) + state["position"]


class TrainBatches:
    """Training batches of one rank (see the module's docstring).

    `identity` names the data and the options that fix its order; a state of other data is refused. `collate` makes a
    batch of the sequence's rows.
    """

    def __init__(
        self,
        sequence: Sequence,
        *,
        identity: dict[str, Any],
        micro_batch_size: int,
        collate: Collate,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sequence = sequence
        self._identity = identity
        self._micro_batch_size = micro_batch_size
        self._collate = collate
        self._rank = rank
        self._world_size = world_size

    def next_batch(self) -> dict[str, Tensor]:
        """The next micro-batch: `micro_batch_size` rows of this rank."""
        size = self._micro_batch_size
        return self._collate(self._sequence.take(size * self._world_size, size * self._rank, size))

    def state_dict(self) -> dict[str, Any]:
        """JSON types; the same on every rank."""
        return {"identity": dict(self._identity), **self._sequence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any rank and any number of ranks. DataError if it belongs to other data."""
        saved = state["identity"]
        different = [name for name in self._identity if saved.get(name) != self._identity[name]]
        if different:
            details = "; ".join(f"{name} was {saved.get(name)!r}, is {self._identity[name]!r}" for name in different)
            raise DataError(
                f"checkpoint.resume: the position in the data belongs to other data or another order ({details}); "
                f"resume with the same data and options, or start a new run with checkpoint.resume=none"
            )
        self._sequence.load_state_dict(state)


class ValidationSet:
    """All held-out rows, in a fixed order."""

    def __init__(self, rows: HeldOutRows, *, collate: Collate) -> None:
        self._rows, self._collate = rows, collate

    @property
    def num_predicted(self) -> int:
        """How many targets a full pass has."""
        return self._rows.num_predicted

    @property
    def digest(self) -> str | None:
        """Of all rows, where they have one (`examples.KnownRows`)."""
        return getattr(self._rows, "digest", None)

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, micro_batch_size: int, max_tokens: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches of up to `micro_batch_size` rows, from the first row on until there are at least `max_tokens` targets
        (None: all). Which rows are used does not depend on `micro_batch_size`."""
        pending: list[Any] = []
        num_predicted = 0
        for index in range(len(self._rows)):
            if max_tokens is not None and num_predicted >= max_tokens:
                break
            num_predicted += self._rows.num_targets(index)
            pending.append(self._rows.row(index))
            if len(pending) == micro_batch_size:
                yield self._collate(pending)
                pending = []
        if pending:
            yield self._collate(pending)
