"""Prompts and responses: rows of a table to batches of whole examples, with targets on the responses only.

An example is [beginning of text, prompt, response, end-of-text], one a row. What precedes a response is seen and not
predicted; the end-of-text after it is. Rows are padded at the right to the longest of their batch, which has input_ids
and targets (b, s) int64, targets already shifted and -100 where nothing is predicted, and attention_mask (b, s) int64.

Nothing is cut but what follows the last answer of a conversation, which is counted: an example longer than
data.sequence_length is left out and counted, as is one without prompt or response, a conversation that an assistant
begins, and a training example whose prompt is also held out. Held-out prompts are kept even where the response makes
them too long, so that generated answers are scored over all of them (`Question`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loqt_ds.data.batches import ValidationSet
from loqt_ds.data.build import DataBundle
from loqt_ds.data.cache import Say
from loqt_ds.data.conversation import Example, Reader
from loqt_ds.data.corpus import content_digest, split_hash
from loqt_ds.data.errors import DataError
from loqt_ds.data.examples import batch_length, train_batches
from loqt_ds.data.files import resolve_paths
from loqt_ds.data.packing import IGNORED
from loqt_ds.data.sources import open_dataset
from loqt_ds.data.tables import TABLES, read_rows
from loqt_ds.data.tokenizer import Tokenizer, num_workers

EXAMPLES_AT_ONCE = 10_000  # to be tokenized


class Row(NamedTuple):
    """tokens: (length + 1,) int32; is_target: (length + 1,) bool, of the tokens of responses."""

    tokens: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    @property
    def num_targets(self) -> int:
        return int(self.is_target.sum())


class Question(NamedTuple):
    """A held-out prompt, with all that precedes the last response, as tokens; and that response as it stands in the
    data."""

    prompt: list[int]
    response: str
    where: str


@dataclass
class Counts:
    """What was met on one side."""

    num_rows: int = 0
    num_empty: int = 0
    num_answer_first: int = 0
    """Conversations that an assistant begins."""
    num_unanswered: int = 0
    """Conversations whose last messages no response follows."""
    num_duplicates: int = 0
    lengths: list[int] = field(default_factory=list)
    """Of the examples that are too long, in tokens."""


class Examples:
    """Rows in memory, as `StoredSequence` and `ValidationSet` read them."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        self.num_predicted = sum(row.num_targets for row in rows)
        self.num_tokens = sum(len(row.tokens) for row in rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]

    def num_targets(self, index: int) -> int:
        return self._rows[index].num_targets

    @cached_property
    def digest(self) -> str:
        """Of all tokens and of what is predicted, in their order."""
        found = hashlib.sha256()
        for row in self._rows:
            found.update(np.int64(len(row.tokens)).tobytes())
            found.update(row.tokens.tobytes())
            found.update(row.is_target.tobytes())
        return found.hexdigest()[:32]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Table:
    """Local files, or a split of a data set. option: how messages name it."""

    option: str
    config: Any
    split: str | None
    files: Any = None

    def rows(self, say: Say) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where it stands, row)."""
        data, name = self.config.data, self.option.partition("=")[0]
        if self.split is None:
            for path in resolve_paths(self.files, name, say, TABLES):
                yield from read_rows(path, name, header=data.header, quoting=data.quoting)
            return
        dataset = open_dataset(data.name, data.config_name, self.split, False, self.option, name)
        for number, row in enumerate(dataset, start=1):
            yield f"{self.option} row {number}", row


def open_tables(config: Any) -> tuple[Table, Table | None]:
    """(training table, held-out table; None: a part of the training table is held out)."""
    data = config.data
    if data.name is None:
        train = Table(f"data.path={data.path}", config, None, data.path)
        if data.validation_path is None:
            return train, None
        return train, Table(f"data.validation_path={data.validation_path}", config, None, data.validation_path)
    train = Table(f"data.name={data.name} (data.split={data.split})", config, data.split)
    if data.validation_path is not None:
        return train, Table(f"data.validation_path={data.validation_path}", config, None, data.validation_path)
    if data.validation_split is None:
        return train, None
    option = f"data.name={data.name} (data.validation_split={data.validation_split})"
    return train, Table(option, config, data.validation_split)


def read_examples(config: Any, reader: Reader, say: Say) -> tuple[list[Example], list[Example], Counts, Counts]:
    """(training examples, held-out examples, what was met in training data, and held out)."""
    train_table, held_out_table = open_tables(config)
    met, met_held_out = Counts(), Counts()

    def wanted(table: Table, counts: Counts) -> list[Example]:
        kept = []
        for where, row in table.rows(say):
            counts.num_rows += 1
            example = reader.example(row, where)
            if example.stretches:
                kept.append(example)
                counts.num_unanswered += example.num_unanswered > 0
            elif example.is_answer_first:
                counts.num_answer_first += 1
            else:
                counts.num_empty += 1
        if not kept:
            first = f", {counts.num_answer_first} that an assistant's message begins" if counts.num_answer_first else ""
            raise DataError(
                f"{table.option} has no example: {counts.num_rows} rows, {counts.num_empty} of them without prompt or "
                f"response{first}; give others"
            )
        return kept

    read = wanted(train_table, met)
    if held_out_table is not None:
        held_out = wanted(held_out_table, met_held_out)
        known = {_digest(example) for example in held_out}
        train = [example for example in read if _digest(example) not in known]
        met.num_duplicates = len(read) - len(train)
        if not train:
            raise DataError(
                f"{train_table.option}: 0 examples for training, as all {len(read)} have a prompt that is held out "
                f"({held_out_table.option}); give held-out data with other prompts, or leave that option out to hold "
                "out data.validation_fraction of the training data"
            )
        return train, held_out, met, met_held_out
    places = {_digest(example): split_hash(_digest(example)) for example in read}
    # At least one is held out, and its like.
    cut = max(int(config.data.validation_fraction * 2**64), min(places.values()) + 1)
    train = [example for example in read if places[_digest(example)] >= cut]
    if not train:
        fraction = f"data.validation_fraction={config.data.validation_fraction:g}"
        what = f"{fraction} holds out all {len(places)} prompts; lower it"
        if len(places) == 1:
            what = f"all {len(read)} have one prompt, which is held out ({fraction}, at least one); give more prompts"
        raise DataError(
            f"{train_table.option}: 0 examples for training: {what}, or give other prompts in data.validation_path"
        )
    return train, [example for example in read if places[_digest(example)] < cut], met, met_held_out


def _digest(example: Example) -> bytes:
    """Of the prompt, or of all that is given in a conversation: the solutions of one question fall on the same side, or
    what is held out would be half known."""
    return content_digest(json.dumps([stretch.text for stretch in example.stretches if not stretch.is_response]))


# ---------------------------------------------------------------- tokens


class Encoder:
    """Examples to tokens.

    Args:
        is_chat: whether the text has its special tokens already.
        workers: threads.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_chat: bool, workers: int = 1) -> None:
        self._tokenizer, self._workers = tokenizer, workers
        self._beginning = [] if is_chat else beginning_of_text(tokenizer)

    def rows(self, examples: list[Example]) -> Iterator[tuple[Row, list[int]]]:
        """(the whole row, the tokens before its last response) of each."""
        for start in range(0, len(examples), EXAMPLES_AT_ONCE):
            chunk = examples[start : start + EXAMPLES_AT_ONCE]
            texts = [stretch.text for example in chunk for stretch in example.stretches]
            encoded = iter(self._tokenizer.encode_batch(texts, self._workers))
            for example in chunk:
                yield self._row(example, [next(encoded) for _ in example.stretches])

    def _row(self, example: Example, parts: list[list[int]]) -> tuple[Row, list[int]]:
        eot = self._tokenizer.eot_id
        parts[0] = [*self._beginning, *parts[0]]
        if not example.stretches[-1].has_end:
            parts[-1].append(eot)
        learned = []
        for part, stretch in zip(parts, example.stretches, strict=True):
            end = len(part) - part[::-1].index(eot) if stretch.has_end else len(part)
            learned.append([stretch.is_response and place < end for place in range(len(part))])
        # Nothing follows the last end: what a template writes behind it (a line break) goes.
        parts[-1] = parts[-1][: sum(learned[-1])]
        learned[-1] = learned[-1][: len(parts[-1])]
        tokens = np.array([token for part in parts for token in part], dtype=np.int32)
        is_target = np.array([flag for part in learned for flag in part])
        return Row(tokens, is_target), [token for part in parts[:-1] for token in part]


def beginning_of_text(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as Llama's; mostly none."""
    probe = "a"
    plain = list(tokenizer.hf(probe, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer.hf(probe)["input_ids"])
    starts = (n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain)
    return whole[: next(starts, 0)]


def collate(rows: list[Row], *, pad_id: int, sequence_length: int, whole_length: bool = False) -> dict[str, Tensor]:
    """A batch (see the module's docstring), as long as its longest row, or as `sequence_length`."""
    longest = max(len(row.tokens) for row in rows) - 1
    shape = len(rows), batch_length(longest, sequence_length, is_whole=whole_length)
    ids, mask, targets = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for index, row in enumerate(rows):
        end = len(row.tokens) - 1
        ids[index, :end], mask[index, :end] = row.tokens[:-1], 1
        targets[index, :end] = np.where(row.is_target[1:], row.tokens[1:], IGNORED)
    return {
        name: torch.from_numpy(a) for name, a in (("input_ids", ids), ("attention_mask", mask), ("targets", targets))
    }


# ---------------------------------------------------------------- all


def build_instruction(
    config: Any, tokenizer: Tokenizer, *, rank: int = 0, world_size: int = 1, say: Say = print
) -> DataBundle:
    """The batches of data.format=instruction, and the held-out questions. Raises DataError for every mistake in the
    data, and for fewer examples than one global batch."""
    data, reader = config.data, Reader(config.data, tokenizer)
    train, held_out, met, met_held_out = read_examples(config, reader, say)
    encoder = Encoder(tokenizer, is_chat=reader.is_chat, workers=num_workers(data.num_processes))
    rows = Examples(list(_fitting((row for row, _ in encoder.rows(train)), data.sequence_length, met)))
    encoded = list(encoder.rows(held_out))
    held_out_rows = Examples(list(_fitting((row for row, _ in encoded), data.sequence_length, met_held_out)))
    questions = tuple(
        Question(prompt, example.response, example.where)
        for (_, prompt), example in zip(encoded, held_out, strict=True)
    )
    _say(config, rows, held_out_rows, met, met_held_out, say)
    if not reader.is_chat:
        _say_beginning(tokenizer, say)
    _require(config, rows, held_out_rows, met, met_held_out, world_size)
    batch_of = partial(
        collate,
        pad_id=tokenizer.pad_id,
        sequence_length=data.sequence_length,
        whole_length=config.train.compile,  # or it would be compiled for every length
    )
    batches = train_batches(config, rows, tokenizer, batch_of, rank=rank, world_size=world_size)
    summary = {
        "num_rows": len(rows),
        "num_validation_rows": len(held_out_rows),
        "num_questions": len(questions),
        "num_duplicates": met.num_duplicates,
        "num_empty": met.num_empty,
        "num_validation_empty": met_held_out.num_empty,
        "num_answer_first": met.num_answer_first,
        "num_validation_answer_first": met_held_out.num_answer_first,
        "num_unanswered": met.num_unanswered,
        "num_validation_unanswered": met_held_out.num_unanswered,
        "num_too_long": len(met.lengths),
        "num_validation_too_long": len(met_held_out.lengths),
        "num_tokens": rows.num_tokens,
        "num_response_tokens": rows.num_predicted,
        "num_validation_response_tokens": held_out_rows.num_predicted,
        "vocab_size": tokenizer.vocab_size,
    }
    return DataBundle(batches, ValidationSet(held_out_rows, collate=batch_of), summary, questions=questions)


def _fitting(rows: Iterable[Row], sequence_length: int, counts: Counts) -> Iterator[Row]:
    """Those of at most `sequence_length` inputs; the others are counted."""
    for row in rows:
        if len(row.tokens) - 1 <= sequence_length:
            yield row
        else:
            counts.lengths.append(len(row.tokens) - 1)


def _say(config: Any, rows: Examples, held_out: Examples, met: Counts, met_held_out: Counts, say: Say) -> None:
    say(
        f"{len(rows)} examples for training with {rows.num_predicted} tokens of responses, {len(held_out)} with "
        f"{held_out.num_predicted} held out"
    )
    for counts, side in ((met, "training"), (met_held_out, "held-out")):
        if counts.num_empty:
            say(f"{counts.num_empty} of {counts.num_rows} {side} rows have no prompt or no response and are left out")
        if counts.num_answer_first:
            say(
                f"{counts.num_answer_first} of {counts.num_rows} {side} conversations begin with an assistant's "
                "message and are left out"
            )
        if counts.num_unanswered:
            say(
                f"{counts.num_unanswered} of {counts.num_rows} {side} conversations go on after the assistant's last "
                "message: that end is left out"
            )
        if counts.lengths:
            say(
                f"{len(counts.lengths)} {side} examples are longer than data.sequence_length="
                f"{config.data.sequence_length} and are left out; data.sequence_length={max(counts.lengths)} would "
                "keep them all"
            )
    if met.num_duplicates:
        say(f"{met.num_duplicates} training examples have a prompt that is held out, and are left out of training")


def _say_beginning(tokenizer: Tokenizer, say: Say) -> None:
    """A tokenizer may have a beginning-of-text and not use it, as that of a sentencepiece file, which does not say."""
    hf = tokenizer.hf
    if hf.bos_token_id not in (None, tokenizer.eot_id) and not beginning_of_text(tokenizer):
        say(
            f"data.tokenizer={tokenizer.name} puts no {hf.bos_token} before a prompt; if the model was trained with "
            "one, give the directory of its tokenizer (tokenizer.json, tokenizer_config.json) or one that does"
        )


def _require(
    config: Any, rows: Examples, held_out: Examples, met: Counts, met_held_out: Counts, world_size: int
) -> None:
    train, length = config.train, config.data.sequence_length
    needed = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    if len(rows) < needed:
        remedy = "give more data, or lower one of these"
        if met.lengths:
            remedy += f" ({len(met.lengths)} are longer than data.sequence_length={length})"
        if met.num_duplicates:
            remedy += f" ({met.num_duplicates} have a prompt that is held out)"
        raise DataError(
            f"{len(rows)} examples for training, fewer than the {needed} of one global batch (train.micro_batch_size="
            f"{train.micro_batch_size} x train.gradient_accumulation_steps={train.gradient_accumulation_steps} x "
            f"{world_size} ranks); {remedy}"
        )
    if not held_out.num_predicted:
        raise DataError(
            f"no held-out example fits data.sequence_length={length} ({len(met_held_out.lengths)} are longer, up to "
            f"{max(met_held_out.lengths, default=0)} tokens); raise it, or set data.validation_path"
        )
