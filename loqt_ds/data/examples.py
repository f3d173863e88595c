"""What tables of whole examples have in common, whether of prompts and responses or of texts with a class: a column's
text, the length of a batch, and the batches of one rank."""

from __future__ import annotations

from typing import Any, Protocol

from loqt_ds.data.batches import Collate, Rows, StoredSequence, TrainBatches
from loqt_ds.data.errors import DataError
from loqt_ds.data.files import check_text
from loqt_ds.data.tokenizer import Tokenizer

LENGTH_MULTIPLE = 8  # rows of a batch are padded to: lengths that processors like, and fewer different ones


class KnownRows(Rows, Protocol):
    """Rows with a digest of all of them, in their order."""

    @property
    def digest(self) -> str: ...


def text_of(value: Any, option: str, where: str) -> str:
    """What a row has in a column, empty for None. Raises DataError for what is no text.

    Args:
        option: and its value, which name the column.
        where: the row stands.
    """
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{option}: {where} holds a {type(value).__name__} there, not a string; name a column that holds text"
        )
    check_text(value or "", where)
    return value or ""


def batch_length(longest: int, sequence_length: int, *, is_whole: bool) -> int:
    """Tokens of the rows of a batch whose longest has so many.

    Args:
        is_whole: always `sequence_length`.
    """
    return sequence_length if is_whole else min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, sequence_length)


def train_batches(
    config: Any, rows: KnownRows, tokenizer: Tokenizer, collate: Collate, *, rank: int, world_size: int
) -> TrainBatches:
    """The batches of one rank, all rows of an epoch in the order that `config` asks for."""
    data, train = config.data, config.train
    return TrainBatches(
        StoredSequence(rows, shuffle=data.shuffle, seed=train.seed),
        identity={
            "corpus": rows.digest,
            "num_rows": len(rows),
            "tokenizer": tokenizer.fingerprint,
            "sequence_length": data.sequence_length,
            "shuffle": data.shuffle,
            "seed": train.seed,
        },
        micro_batch_size=train.micro_batch_size,
        collate=collate,
        rank=rank,
        world_size=world_size,
    )
