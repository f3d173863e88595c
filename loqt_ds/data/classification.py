"""Texts, or pairs of texts, with a class or a number: rows of a table to batches of whole examples.

An example is a row of tokens as the tokenizer writes a text or a pair: with its special tokens and, where the model
tells two texts apart by them, token types. Rows are padded at the right to the longest of their batch. A batch has
input_ids (b, s) int64, attention_mask (b, s) int64, perhaps token_type_ids (b, s) int64, and targets (b,): int64
classes, or float32 numbers with model.task=regression.

Nothing is cut or left out unsaid: examples longer than data.sequence_length are shortened (the longer text of a pair
first) and counted, with how many tokens they lost; examples without text, and training examples whose texts are held
out, are left out and counted, but kept in the tasks of GLUE, whose results are those of all rows. A label that is no
class is an error that names the row.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loqt_ds.config import describe_model
from loqt_ds.data.batches import ValidationSet
from loqt_ds.data.build import DataBundle
from loqt_ds.data.cache import Say
from loqt_ds.data.corpus import content_digest, split_hash
from loqt_ds.data.errors import DataError
from loqt_ds.data.examples import batch_length, text_of, train_batches
from loqt_ds.data.files import resolve_paths
from loqt_ds.data.glue import TASKS, GlueTask
from loqt_ds.data.sources import open_dataset
from loqt_ds.data.tables import TABLES, read_rows
from loqt_ds.data.tokenizer import Tokenizer
from loqt_ds.scores import CLASSIFICATION, PART, REGRESSION, LabelScorer, check_packages


class Example(NamedTuple):
    """One or two texts, the class's number or the number to predict, and where it stands."""

    texts: tuple[str, ...]
    target: float
    where: str


class Row(NamedTuple):
    """inputs, types: (length,) int32 tokens and token types; part: which held-out set it belongs to."""

    inputs: NDArray[np.int32]
    types: NDArray[np.int32] | None
    target: float
    part: int


@dataclass
class Counts:
    """What was met in one table, or several."""

    num_rows: int = 0
    num_empty: int = 0
    num_unreadable: int = 0
    num_duplicates: int = 0
    num_tokens: int = 0
    num_long: int = 0
    num_truncated_tokens: int = 0
    targets: list[float] = field(default_factory=list)


class Examples:
    """Rows in memory, as `StoredSequence` and `ValidationSet` read them."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        self.num_predicted = len(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._rows[index]

    def num_targets(self, index: int) -> int:
        return 1

    @cached_property
    def digest(self) -> str:
        """Of all tokens and targets, in their order."""
        found = hashlib.sha256()
        for row in self._rows:
            found.update(np.array([len(row.inputs), row.part], dtype=np.int64).tobytes())
            found.update(row.inputs.tobytes())
            found.update(np.float64(row.target).tobytes())
        return found.hexdigest()[:32]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and how they are understood. labels: the classes' names; none: they are their numbers, or
    there are no classes. num_labels: 1 for a number to predict. stored_names: by which the data set of the hub numbers
    its classes, where it does."""

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    num_labels: int
    header: bool
    quoting: str
    has_short_rows: bool
    stored_names: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        return self.num_labels == 1

    def example(self, row: dict[str, Any], where: str) -> Example:
        """Raises DataError for columns that there are not, for what is no text, and for a label that is no class."""
        for option, name in [("data.text_fields", name) for name in self.texts] + [("data.label_field", self.label)]:
            if name not in row:
                raise DataError(
                    f"{option}: {where} has no column {name!r}; it has: {', '.join(map(repr, row)) or 'none'}"
                )
        texts = tuple(text_of(row[name], f"data.text_fields={name}", where) for name in self.texts)
        return Example(texts, self._target(row[self.label], where), where)

    def _target(self, value: Any, where: str) -> float:
        if self.is_regression:
            return self._number(value, where)
        if self.labels:
            value = self._class_name(value)
        if value in self.labels:
            return self.labels.index(value)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not self.labels and isinstance(value, str) and value.strip().isdecimal():
            value, is_number = int(value), True
        if is_number and 0 <= value < self.num_labels:
            return int(value)
        if self.labels:
            names, remedy = f"data.labels={list(self.labels)}", "give its class as well"
        else:
            names = f"0 to {self.num_labels - 1} (model.num_labels)"
            remedy = "give data.labels, what the classes are called there"
            if isinstance(value, bool):
                remedy = 'set data.labels=["false", "true"], with the quotation marks'
        raise DataError(
            f"data.label_field={self.label}: {where} has the label {value!r}, which is no class; classes are {names}: "
            f"correct the row, or {remedy}"
        )

    def _class_name(self, value: Any) -> Any:
        """What a number stands for where classes have names, and which class is called false or true, in letters of
        any case; other labels as they are. A number among names that are none is a place among them, and left as it
        is."""
        if isinstance(value, bool):
            return next((label for label in self.labels if label.lower() == str(value).lower()), value)
        if not isinstance(value, int):
            return value
        has_numbers = any(label.removeprefix("-").isdecimal() for label in self.labels)
        if 0 <= value < len(self.stored_names):
            name = self.stored_names[value]
            return name if name in self.labels or not has_numbers else str(value)
        return str(value) if has_numbers else value

    def _number(self, value: Any, where: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) or value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        except OverflowError:  # an integer of JSON has any number of digits
            number = math.inf
        told = f"data.label_field={self.label}: {where} has {reprlib.repr(value)}"
        if math.isnan(number):
            raise DataError(
                f"{told}, which is no number; correct the row, or set model.task=classification if these are classes"
            )
        if abs(number) > torch.finfo(torch.float32).max:
            raise DataError(f"{told}, which float32 cannot hold; correct the row, or scale the numbers")
        return number


def columns_of(config: Any, table: Table | None = None) -> Columns:
    """What `config` says of the columns, those of one table if given: GLUE's files have others than the hub's data set.
    Raises DataError where it contradicts the model."""
    data, model = config.data, config.model
    task = glue_task(config)
    labels = task.labels if task else tuple(data.labels or ())
    num_labels = 1 if model.task == "regression" else _num_labels(config)
    if model.task != "regression" and labels and len(labels) != num_labels:
        option = f"data.glue_task={data.glue_task}" if task else f"data.labels={list(labels)}"
        raise DataError(
            f"{option} has {len(labels)} classes, the model {num_labels}; set model.num_labels={len(labels)}"
        )
    if task is None:
        texts = tuple(data.text_fields)
        return Columns(texts, data.label_field, labels, num_labels, data.header, data.quoting, False)
    needed = "classification" if labels else "regression"
    if model.task != needed:
        raise DataError(f"data.glue_task={data.glue_task} with model.task={model.task}; set model.task={needed}")
    if data.name is not None and (table is None or not table.paths):
        return Columns(task.hub_fields, "label", labels, num_labels, True, "auto", False)
    return Columns(task.text_fields, task.label_field, labels, num_labels, task.header, "none", task.has_short_rows)


def glue_task(config: Any) -> GlueTask | None:
    name = config.data.glue_task
    return None if name is None else TASKS[name]


def class_names(config: Any) -> tuple[str, ...]:
    """Names of the classes, for the model's description; none where they are called by their numbers, or there are no
    classes."""
    task = glue_task(config)
    names = task.labels if task else tuple(config.data.labels or ())
    return () if names == tuple(map(str, range(len(names)))) else names


def _num_labels(config: Any) -> int:
    """As the model's description has it."""
    _, content = describe_model(config)
    names = content.get("id2label") or {}
    return int(config.model.num_labels or content.get("num_labels") or len(names))


@dataclass(frozen=True)
class Table:
    """One table: local files, or a split of a data set of the hub. part: which of several held-out sets it is."""

    option: str
    paths: tuple[Path, ...]
    dataset: Any = None
    part: int = 0

    def examples(self, columns: Columns, counts: Counts) -> Iterator[Example]:
        """Rows that a broken file has cut short are counted where the task is known to have them."""
        features = getattr(self.dataset, "features", None) or {}
        columns = replace(columns, stored_names=tuple(getattr(features.get(columns.label), "names", None) or ()))
        for where, row in self._rows(columns):
            counts.num_rows += 1
            if columns.has_short_rows and columns.label not in row:
                counts.num_unreadable += 1
                continue
            yield columns.example(row, where)

    def _rows(self, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(self.dataset or (), start=1):
            yield f"{self.option} row {number}", row
        for path in self.paths:
            yield from read_rows(
                path,
                self.option.partition("=")[0],
                header=columns.header,
                quoting=columns.quoting,
                is_lenient=columns.has_short_rows,
            )


def _files(value: str | list[str], option: str, say: Say) -> Table:
    return Table(f"{option}={value}", tuple(resolve_paths(value, option, say, TABLES)))


def _split(config: Any, split: str, option: str, part: int = 0) -> Table:
    data = config.data
    name = data.config_name or data.glue_task
    where = f"data.name={data.name} ({option}={split})"
    return Table(where, (), open_dataset(data.name, name, split, False, where, option), part)


def open_tables(config: Any, say: Say) -> tuple[Table, list[Table]]:
    """(training table, held-out tables; none: a part of the training table is held out)."""
    data, task = config.data, glue_task(config)
    of_files = [] if data.validation_path is None else [_files(data.validation_path, "data.validation_path", say)]
    if data.name is not None:
        train = _split(config, data.split, "data.split")
        if of_files:
            return train, of_files
        if data.validation_split is not None:
            return train, [_split(config, data.validation_split, "data.validation_split")]
        names = [] if task is None else [name.replace("dev", "validation") for name in task.held_out]
        return train, [_split(config, name, "data.glue_task", part) for part, name in enumerate(names)]
    if task is not None:
        directory = Path(data.path)
        if not directory.is_dir():
            raise DataError(
                f"data.path={data.path} with data.glue_task={data.glue_task} is not a directory; give the task's "
                f"directory of the GLUE archive"
            )
        train = Table(f"data.path={directory}", (task.file(directory, "train"),))
        if not of_files:
            files = [task.file(directory, name) for name in task.held_out]
            return train, [Table(f"data.path={directory}", (file,), None, part) for part, file in enumerate(files)]
    else:
        train = _files(data.path, "data.path", say)
    return train, of_files


def read_examples(config: Any, say: Say) -> tuple[list[Example], list[tuple[Example, int]], Counts, Counts]:
    """(training examples, held-out examples with their part, what was met in training data, and held out)."""
    train_table, held_out_tables = open_tables(config, say)
    counts, of_held_out, keeps_all = Counts(), Counts(), glue_task(config) is not None

    def wanted(table: Table, counts: Counts) -> Iterator[Example]:
        for example in table.examples(columns_of(config, table), counts):
            if not any(text.strip() for text in example.texts):
                counts.num_empty += 1
                if not keeps_all:
                    continue
            yield example

    held_out = [(example, table.part) for table in held_out_tables for example in wanted(table, of_held_out)]
    read = list(wanted(train_table, counts))
    if not held_out_tables:
        places = [split_hash(_digest(example)) for example in read]
        # At least one is held out, and its like.
        cut = max(int(config.data.validation_fraction * 2**64), min(places, default=0) + 1)
        held_out = [(example, 0) for example, place in zip(read, places, strict=True) if place < cut]
        train = [example for example, place in zip(read, places, strict=True) if place >= cut]
        return train, held_out, counts, of_held_out
    known = {_digest(example) for example, _ in held_out}
    train = [example for example in read if keeps_all or _digest(example) not in known]
    counts.num_duplicates = sum(_digest(example) in known for example in read)
    return train, held_out, counts, of_held_out


def _digest(example: Example) -> bytes:
    """Of the texts, so that equal ones fall on the same side, whatever their labels."""
    return content_digest("\x00".join(example.texts))


# ---------------------------------------------------------------- tokens


class Encoder:
    """Examples to rows of at most `length` tokens.

    Args:
        has_types: whether the model tells two texts apart by token types.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, *, has_types: bool) -> None:
        self._tokenizer, self._hf, self._length = tokenizer, tokenizer.hf, length
        self._has_types = has_types and "token_type_ids" in self._hf.model_input_names
        self._writes_pairs = self._hf.num_special_tokens_to_add(pair=True) > 0

    def rows(self, examples: list[tuple[Example, int]], counts: Counts) -> list[Row]:
        rows = []
        for start in range(0, len(examples), 1000):
            chunk = examples[start : start + 1000]
            for (example, part), (ids, types) in zip(
                chunk, self._encode([e.texts for e, _ in chunk], counts), strict=True
            ):
                counts.num_tokens += len(ids)
                counts.targets.append(example.target)
                of_types = np.array(types, dtype=np.int32) if self._has_types else None
                rows.append(Row(np.array(ids, dtype=np.int32), of_types, example.target, part))
        return rows

    def _encode(self, texts: list[tuple[str, ...]], counts: Counts) -> Iterator[tuple[list[int], list[int]]]:
        if not self._writes_pairs:  # a language model's: end-of-text closes each text
            yield from (self._joined(each, counts) for each in texts)
            return
        whole = self._call(texts)
        long = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > self._length]
        cut = self._call([texts[index] for index in long], truncation="longest_first", max_length=self._length)
        place = {index: number for number, index in enumerate(long)}
        for index, ids in enumerate(whole["input_ids"]):
            found, at = (cut, place[index]) if index in place else (whole, index)
            if index in place:
                counts.num_long += 1
                counts.num_truncated_tokens += len(ids) - len(cut["input_ids"][at])
            yield found["input_ids"][at], found["token_type_ids"][at] if self._has_types else []

    def _call(self, texts: list[tuple[str, ...]], **options: Any) -> Any:
        if not texts:
            return {"input_ids": [], "token_type_ids": []}
        columns = [list(column) for column in zip(*texts, strict=True)]
        return self._hf(*columns, verbose=False, return_token_type_ids=self._has_types, **options)

    def _joined(self, texts: tuple[str, ...], counts: Counts) -> tuple[list[int], list[int]]:
        parts = [[*self._tokenizer.encode(text), self._tokenizer.eot_id] for text in texts]
        excess = sum(map(len, parts)) - self._length
        if excess > 0:
            counts.num_long += 1
            counts.num_truncated_tokens += excess
            for _ in range(excess):
                longest = max(parts, key=len)
                del longest[-2]
        return sum(parts, []), []


def model_has_token_types(config: Any) -> bool:
    """Whether the model of `config` takes token types and has more than one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    _, content = describe_model(config)
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(content["model_type"])
    if name is None:
        return False
    takes = "token_type_ids" in inspect.signature(getattr(transformers, str(name)).forward).parameters
    description = transformers.AutoConfig.for_model(**content)
    return takes and (getattr(description, "type_vocab_size", None) or 0) > 1


def collate(
    rows: list[Row], *, pad_id: int, is_regression: bool, sequence_length: int, whole_length: bool = False
) -> dict[str, Tensor]:
    """A batch (see the module's docstring), as long as its longest row, or as `sequence_length`."""
    longest = max(len(row.inputs) for row in rows)
    shape = len(rows), batch_length(longest, sequence_length, is_whole=whole_length)
    ids, mask, types = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.inputs)] = row.inputs
        mask[index, : len(row.inputs)] = 1
        if row.types is not None:
            types[index, : len(row.inputs)] = row.types
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if rows[0].types is not None:
        batch["token_type_ids"] = torch.from_numpy(types)
    dtype = torch.float32 if is_regression else torch.int64
    batch["targets"] = torch.tensor([row.target for row in rows], dtype=dtype)
    batch[PART] = torch.tensor([row.part for row in rows])
    return batch


# ---------------------------------------------------------------- all


def build_classification(
    config: Any, tokenizer: Tokenizer, *, rank: int = 0, world_size: int = 1, say: Say = print
) -> DataBundle:
    """The batches of data.format=classification, with what scores them. Raises DataError for every mistake in the
    data, and for fewer examples than one global batch."""
    columns = columns_of(config)
    task = glue_task(config)
    metrics = REGRESSION if columns.is_regression else CLASSIFICATION
    check_packages(metrics)
    train, held_out, counts, of_held_out = read_examples(config, say)
    if not held_out:
        raise DataError(_nothing_held_out(config))
    _require(config, len(train), counts, world_size)
    encoder = Encoder(tokenizer, config.data.sequence_length, has_types=model_has_token_types(config))
    rows = Examples(encoder.rows([(example, 0) for example in train], counts))
    held_out_rows = Examples(encoder.rows(held_out, of_held_out))
    summary = _summary(counts, of_held_out, columns, tokenizer)
    if task is not None:  # kept, and told
        summary |= {"num_duplicates": 0, "num_shared": counts.num_duplicates}
    _say(config, columns, counts, of_held_out, say)
    data = config.data
    batch_of = partial(
        collate,
        pad_id=tokenizer.pad_id,
        is_regression=columns.is_regression,
        sequence_length=data.sequence_length,
        whole_length=config.train.compile,  # or it would be compiled for every length
    )
    batches = train_batches(config, rows, tokenizer, batch_of, rank=rank, world_size=world_size)
    scorer = partial(
        LabelScorer,
        metrics,
        columns.num_labels,
        parts=task.parts if task else ("",),
        glue=task.metrics if task else (),
    )
    return DataBundle(batches, ValidationSet(held_out_rows, collate=batch_of), summary, scorer)


def _nothing_held_out(config: Any) -> str:
    """What is wrong where there is no held-out example, by where they come from."""
    data = config.data
    if data.validation_path is not None:
        return f"data.validation_path={data.validation_path} has no example; give another file, or null"
    if data.glue_task is not None or data.validation_split is not None:
        source = f"data.path={data.path}" if data.name is None else f"data.name={data.name}"
        return f"{source}: its held-out part has no example; give another, or data.validation_path"
    return f"{_training_source(config)} has no example with text; give other data"


def _training_source(config: Any) -> str:
    data = config.data
    return f"data.path={data.path}" if data.name is None else f"data.name={data.name} (data.split={data.split})"


def _require(config: Any, found: int, counts: Counts, world_size: int) -> None:
    train = config.train
    needed = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    if found < needed:
        num_known = counts.num_rows - counts.num_empty - counts.num_unreadable - found
        why = f" ({num_known} of {counts.num_rows} rows have texts that are held out)" if num_known > 0 else ""
        raise DataError(
            f"{_training_source(config)}: {found} examples for training, fewer than the {needed} of one global batch "
            f"(train.micro_batch_size={train.micro_batch_size} x train.gradient_accumulation_steps="
            f"{train.gradient_accumulation_steps} x {world_size} ranks); give more data, or lower one of these{why}"
        )


def blind_loss(train: list[float], held_out: list[float], num_labels: int) -> float:
    """The loss of a model that knows the training targets but no text: cross-entropy in nats under add-one-smoothed
    class frequencies, or the squared error of the mean."""
    if num_labels == 1:
        return float(np.mean((np.array(held_out) - np.mean(train)) ** 2))
    counts = np.bincount(np.array(train, dtype=np.int64), minlength=num_labels) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[np.array(held_out, dtype=np.int64)]))


def _summary(counts: Counts, held_out: Counts, columns: Columns, tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of `DataBundle.summary`; and, of classification, how many examples each class has."""
    summary: dict[str, Any] = {
        "num_documents": len(counts.targets),
        "num_validation_documents": len(held_out.targets),
        "num_duplicates": counts.num_duplicates,
        "num_empty": counts.num_empty,
        "num_unreadable": counts.num_unreadable,
        "num_validation_empty": held_out.num_empty,
        "num_validation_unreadable": held_out.num_unreadable,
        "num_tokens": counts.num_tokens,
        "num_rows": len(counts.targets),
        "num_validation_tokens": held_out.num_tokens,
        "num_truncated_tokens": counts.num_truncated_tokens,
        "num_truncated_rows": counts.num_long,
        "num_truncated_validation_rows": held_out.num_long,
        "unigram_loss": blind_loss(counts.targets, held_out.targets, columns.num_labels),
        "vocab_size": tokenizer.vocab_size,
    }
    if not columns.is_regression:
        of_class = Counter(map(int, counts.targets))
        names = columns.labels or tuple(map(str, range(columns.num_labels)))
        summary["num_by_class"] = {name: of_class[number] for number, name in enumerate(names)}
    return summary


def _say(config: Any, columns: Columns, counts: Counts, held_out: Counts, say: Say) -> None:
    """What was met."""
    train, other = len(counts.targets), len(held_out.targets)
    what = "numbers" if columns.is_regression else f"{columns.num_labels} classes"
    say(f"{train} examples for training, {other} held out; {counts.num_tokens / max(train, 1):.1f} tokens each; {what}")
    is_glue = config.data.glue_task is not None
    kept = "kept, as in the benchmark" if is_glue else "left out"
    for number, text in (
        (counts.num_empty, f"examples have no text and are {kept}"),
        (held_out.num_empty, f"held-out examples have no text and are {kept}"),
        (counts.num_unreadable, "rows are cut short in the file and are left out"),
        (held_out.num_unreadable, "held-out rows are cut short in the file and are left out"),
        (counts.num_duplicates, f"training examples have the texts of held-out ones and are {kept}"),
    ):
        if number:
            say(f"{number} {text}")
    for each, side in ((counts, "training"), (held_out, "held-out")):
        if each.num_long:
            total = each.num_tokens + each.num_truncated_tokens
            say(
                f"{each.num_long} {side} examples are longer than data.sequence_length={config.data.sequence_length} "
                f"and are cut: {each.num_truncated_tokens} of {total} tokens are lost; raise it to keep them"
            )
    missing = columns.num_labels - len(set(counts.targets))
    if not columns.is_regression and missing:
        say(f"warning: {missing} of {columns.num_labels} classes have no training example")
