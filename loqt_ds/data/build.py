"""From `config.data` to batches: open, split, tokenize, pack, and say what was met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loqt_ds.data.batches import Collate, Sequence, StoredSequence, TrainBatches, ValidationSet
from loqt_ds.data.cache import Say, cache_directory, hash_of
from loqt_ds.data.corpus import Corpus, Counts, Split, content_digest
from loqt_ds.data.errors import DataError
from loqt_ds.data.masking import MaskedRows, MaskedSequence, Masker, collate_masked, masker_of
from loqt_ds.data.packing import Rows, collate, make_rows
from loqt_ds.data.streaming import StreamSequence
from loqt_ds.data.token_store import TokenStore, in_memory, token_store, unigram_loss
from loqt_ds.data.tokenizer import Tokenizer, num_workers

STREAMED_VALIDATION_TOKENS = 1 << 20  # held out from a stream where eval.max_tokens does not say
STREAMED_FREQUENCY_TOKENS = 1 << 20  # from which a stream's token frequencies are estimated


@dataclass(frozen=True)
class DataBundle:
    """Batches for training and validation; `summary` holds JSON types:

    num_documents, num_validation_documents, num_duplicates (training documents left out because identical to held-out
    ones), num_empty, num_unreadable, num_tokens and num_rows (training; None for a stream), num_validation_tokens,
    num_truncated_tokens (cut off by data.packing=truncated; None for a stream), unigram_loss (nats a token: what token
    frequencies alone achieve on the validation tokens), vocab_size.
    """

    train: TrainBatches
    validation: ValidationSet
    summary: dict[str, Any]
    scorer: Callable[[], Any] | None = None
    """Makes an `evaluation.Scorer` for each evaluation, where the data say how outputs are scored."""
    questions: tuple[Any, ...] = ()
    """Held-out prompts to be answered, `instruction.Question`s."""
    content: str | None = None
    """Of text: hash of training and held-out tokens."""

    @property
    def identity(self) -> dict[str, Any]:
        """What is equal where the same rows are read, by whatever way they came; JSON types."""
        identity = dict(self.train.state_dict()["identity"])
        if self.content is not None:
            # The corpus of a position is that of its files, for which `datasets` takes their times too.
            return identity | {"corpus": self.content, "num_validation_rows": len(self.validation)}
        return identity | {
            "validation": self.validation.digest,
            "num_validation_rows": len(self.validation),
            "num_validation_targets": self.validation.num_predicted,
        }


def build_data(
    config: Any, tokenizer: Tokenizer, *, rank: int = 0, world_size: int = 1, say: Say = print
) -> DataBundle:
    """Everything a run reads. Only rank 0 says anything.

    Raises DataError for every mistake in the data that the first batches could meet, and for data with fewer tokens
    than one global batch (train.micro_batch_size x train.gradient_accumulation_steps x world_size rows).
    """
    quiet: Say = say if rank == 0 else _silent
    if config.data.format == "instruction":
        from loqt_ds.data.instruction import build_instruction

        return build_instruction(config, tokenizer, rank=rank, world_size=world_size, say=quiet)
    if config.data.format == "classification":
        from loqt_ds.data.classification import build_classification

        return build_classification(config, tokenizer, rank=rank, world_size=world_size, say=quiet)
    corpus = Corpus(config.data, quiet)
    build = _streamed if corpus.streaming else _stored
    return build(config, corpus, tokenizer, rank, world_size, quiet)


def _silent(message: str) -> None:
    """What ranks other than the first say."""


def _stored(config: Any, corpus: Corpus, tokenizer: Tokenizer, rank: int, world_size: int, say: Say) -> DataBundle:
    data = config.data
    cache = cache_directory(data.cache_dir)
    workers = num_workers(data.num_processes)
    split = corpus.survey(cache, say)
    masker = _masker(config, tokenizer)
    held_out = token_store(corpus, "validation", split, tokenizer, cache=cache, workers=workers, say=say)
    validation = _validation(config, corpus, held_out, tokenizer, masker)
    store = token_store(corpus, "train", split, tokenizer, cache=cache, workers=workers, say=say)
    rows = _rows(config, store, masker)
    needed = _rows_needed(config, world_size)
    if data.packing == "packed":
        _require(config, corpus, len(store.tokens), needed * _row_length(config, masker) + 1, "tokens", world_size)
    else:
        _require(config, corpus, len(rows), needed, "documents", world_size)
    sequence = _masked(StoredSequence(rows, shuffle=data.shuffle, seed=config.train.seed), config, masker)
    identity = {"corpus": corpus.key(cache), "num_rows": len(rows), **_identity(config, tokenizer)}
    summary = {
        "num_documents": store.met.num_documents,
        "num_validation_documents": held_out.met.num_documents,
        "num_duplicates": store.met.num_duplicates,
        "num_empty": store.met.num_empty,
        "num_unreadable": corpus.source.num_unreadable,
        "num_tokens": len(store.tokens),
        "num_rows": len(rows),
        "num_validation_tokens": len(held_out.tokens),
        "num_truncated_tokens": rows.num_truncated_tokens,
        "unigram_loss": unigram_loss(store.counts, held_out.counts),
        "vocab_size": tokenizer.vocab_size,
    }
    _say_summary(corpus, summary, say)
    batches = _batches(config, sequence, identity, tokenizer, rank, world_size)
    return DataBundle(batches, validation, summary, content=_content(store, held_out))


def _streamed(config: Any, corpus: Corpus, tokenizer: Tokenizer, rank: int, world_size: int, say: Say) -> DataBundle:
    data = config.data
    masker = _masker(config, tokenizer)
    split, held_out = _stream_held_out(config, corpus, tokenizer, say)
    validation = _validation(config, corpus, held_out, tokenizer, masker)

    def sequence() -> StreamSequence:
        return StreamSequence(
            corpus,
            split,
            tokenizer,
            sequence_length=_row_length(config, masker),
            packing=data.packing,
            shuffle=data.shuffle,
            seed=config.train.seed,
        )

    met = Counts()
    beginning = in_memory(_beginning(corpus, split, met), tokenizer, workers=num_workers(data.num_processes))
    rows = _rows(config, beginning, masker)
    needed = _rows_needed(config, world_size)
    # Perhaps only the beginning is too short: a global batch may be larger than it.
    amount = len(beginning.tokens) if data.packing == "packed" else len(rows)
    needed = needed * _row_length(config, masker) + 1 if data.packing == "packed" else needed
    if amount < needed:
        amount = _streamed_amount(sequence(), needed, data.packing)
    _require(config, corpus, amount, needed, "tokens" if data.packing == "packed" else "documents", world_size)
    identity = {"corpus": corpus.option, **_identity(config, tokenizer)}
    summary = {
        "num_documents": None,
        "num_validation_documents": held_out.met.num_documents,
        "num_duplicates": None,
        "num_empty": None,
        "num_unreadable": corpus.source.num_unreadable,
        "num_tokens": None,
        "num_rows": None,
        "num_validation_tokens": len(held_out.tokens),
        "num_truncated_tokens": None,
        "unigram_loss": unigram_loss(beginning.counts, held_out.counts),
        "vocab_size": tokenizer.vocab_size,
    }
    _say_summary(corpus, summary, say)
    batches = _batches(config, _masked(sequence(), config, masker), identity, tokenizer, rank, world_size)
    return DataBundle(batches, validation, summary, content=_content(beginning, held_out))


def _streamed_amount(sequence: StreamSequence, enough: int, packing: str) -> int:
    """Tokens (packed) or rows (truncated) of the stream's first epoch, counted up to `enough`."""
    amount = 1 if packing == "packed" else 0  # the very first token is no target
    while amount < enough:
        (row,) = sequence.take(1, 0, 1)
        if sequence.epoch > 0:
            break
        amount += len(row.targets) if packing == "packed" else 1
    return amount


def _beginning(corpus: Corpus, split: Split, met: Counts) -> Iterator[str]:
    """Training texts from the stream's beginning, about STREAMED_FREQUENCY_TOKENS tokens of them."""
    for _, document in corpus.documents("train", split, met):
        yield document.text
        if met.num_characters >= 4 * STREAMED_FREQUENCY_TOKENS:  # 3 to 5 characters make a token
            return


def _stream_held_out(config: Any, corpus: Corpus, tokenizer: Tokenizer, say: Say) -> tuple[Split, TokenStore]:
    """The first held-out documents of a stream, enough for one evaluation, and the split that keeps them out."""
    wanted = config.eval.max_tokens or STREAMED_VALIDATION_TOKENS
    say(f"reading held-out documents of about {wanted} tokens from the stream {corpus.option}")
    split = corpus.stream_split()
    texts: list[str] = []
    num_tokens = 0
    for _, document in corpus.documents("validation", split):
        texts.append(document.text)
        num_tokens += len(tokenizer.encode(document.text)) + 1
        if num_tokens >= wanted:
            break
    digests = frozenset(map(content_digest, texts))
    return replace(split, held_out=digests), in_memory(iter(texts), tokenizer)


def _masker(config: Any, tokenizer: Tokenizer) -> Masker | None:
    """What hides tokens, where hidden tokens are what is predicted."""
    if config.model.task != "masked_lm":
        return None
    masker, length = masker_of(tokenizer), config.data.sequence_length
    if length <= masker.num_around:
        raise DataError(
            f"data.sequence_length={length} leaves no room between the {masker.num_around} special tokens of a row; "
            f"use at least {masker.num_around + 1}"
        )
    return masker


def _row_length(config: Any, masker: Masker | None) -> int:
    """Tokens of text in a row."""
    return int(config.data.sequence_length) - (masker.num_around if masker else 0)


def _rows(config: Any, store: TokenStore, masker: Masker | None) -> Rows:
    return make_rows(store, _row_length(config, masker), config.data.packing)


def _masked(sequence: Sequence, config: Any, masker: Masker | None) -> Sequence:
    return MaskedSequence(sequence, masker, seed=config.train.seed) if masker else sequence


def _validation(
    config: Any, corpus: Corpus, store: TokenStore, tokenizer: Tokenizer, masker: Masker | None
) -> ValidationSet:
    data = config.data
    rows = _rows(config, store, masker)
    if rows.num_predicted < 1:
        raise DataError(
            f"data.validation_fraction={data.validation_fraction} holds out no text of {corpus.option}; raise it, give "
            f"more data, or set data.validation_path"
        )
    return ValidationSet(MaskedRows(rows, masker) if masker else rows, collate=_collate(config, tokenizer))


def _batches(
    config: Any, sequence: Sequence, identity: dict[str, Any], tokenizer: Tokenizer, rank: int, world_size: int
) -> TrainBatches:
    return TrainBatches(
        sequence,
        identity=identity,
        micro_batch_size=config.train.micro_batch_size,
        collate=_collate(config, tokenizer),
        rank=rank,
        world_size=world_size,
    )


def _collate(config: Any, tokenizer: Tokenizer) -> Collate:
    data = config.data
    if config.model.task == "masked_lm":
        return partial(collate_masked, sequence_length=data.sequence_length, pad_id=tokenizer.pad_id)
    return partial(
        collate,
        sequence_length=data.sequence_length,
        pad_id=tokenizer.pad_id,
        mask_documents=data.mask_documents,
    )


def _identity(config: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    data = config.data
    return {
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "shuffle": data.shuffle,
        "streaming": data.streaming,
        "seed": config.train.seed,
    }


def _content(train: TokenStore, held_out: TokenStore) -> str:
    return hash_of([train.digest, held_out.digest])


def _rows_needed(config: Any, world_size: int) -> int:
    return int(config.train.micro_batch_size * config.train.gradient_accumulation_steps * world_size)


def _require(config: Any, corpus: Corpus, found: int, needed: int, unit: str, world_size: int) -> None:
    if found >= needed:
        return
    train = config.train
    raise DataError(
        f"{corpus.option}: {found} {unit} for training, fewer than the {needed} of one global batch "
        f"(train.micro_batch_size={train.micro_batch_size} x train.gradient_accumulation_steps="
        f"{train.gradient_accumulation_steps} x {world_size} ranks, data.sequence_length="
        f"{config.data.sequence_length}); give more data, or lower one of these"
    )


def _say_summary(corpus: Corpus, summary: dict[str, Any], say: Say) -> None:
    if summary["num_tokens"] is not None:
        say(
            f"{corpus.option}: {summary['num_tokens']} tokens of {summary['num_documents']} documents for training, "
            f"{summary['num_validation_tokens']} tokens of {summary['num_validation_documents']} held out"
        )
    else:
        say(
            f"{corpus.option}: streamed; {summary['num_validation_tokens']} tokens of "
            f"{summary['num_validation_documents']} documents held out"
        )
    if summary["num_duplicates"]:
        say(f"{summary['num_duplicates']} documents are identical to held-out ones and are kept out of training")
    if summary["num_empty"]:
        say(f"{summary['num_empty']} documents are empty and are left out")
    if summary["num_truncated_tokens"]:
        share = summary["num_truncated_tokens"] / summary["num_tokens"]
        say(
            f"data.packing=truncated cuts off {summary['num_truncated_tokens']} of the training tokens ({share:.1%}); "
            f"data.packing=packed would keep them"
        )
