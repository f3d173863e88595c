"""Classification data: columns and classes, the eight tasks of GLUE, tokens compared with the tokenizer's own calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from loqt_ds.config import ConfigError, load_config
from loqt_ds.data.build import DataBundle, build_data
from loqt_ds.data.classification import blind_loss
from loqt_ds.data.errors import DataError
from loqt_ds.data.glue import TASKS
from loqt_ds.data.tokenizer import TransformersTokenizer
from loqt_ds.preflight import configure_model

WORDS = ["a", "man", "is", "playing", "the", "flute", "guitar", "two", "dogs", "run", "in", "park", "someone", "reads"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(*, writes_pairs: bool = True) -> PreTrainedTokenizerFast:
    backend = FastTokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if writes_pairs:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", mask_token="[MASK]", **names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shape = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 32}
    (tmp_path / "bert.json").write_text(json.dumps(shape))
    return tmp_path


def options(folder: Path, *overrides: str, task: str = "classification", classes: int | None = 2) -> list[str]:
    common = [
        f"model.shape={folder / 'bert.json'}",
        f"model.task={task}",
        "data.format=classification",
        f"data.tokenizer={folder / 'tokenizer'}",
        "data.sequence_length=16",
        "train.micro_batch_size=4",
        "data.shuffle=false",
    ]
    return [*common, *([f"model.num_labels={classes}"] if task == "classification" and classes else []), *overrides]


def built(folder: Path, *overrides: str, said: list[str] | None = None, **options_of: Any) -> DataBundle:
    config = load_config(None, options(folder, *overrides, **options_of))
    hf = word_tokenizer(writes_pairs="joined" not in folder.name)
    return build_data(config, TransformersTokenizer(hf, "words"), say=(said if said is not None else []).append)


def write_tsv(path: Path, header: str | None, rows: Sequence[Sequence[object]]) -> Path:
    lines = ([header] if header else []) + ["\t".join(map(str, row)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def sentence(number: int, length: int = 5) -> str:
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(length))


def pairs(count: int, labels: Sequence[object]) -> list[tuple[str, str, object]]:
    return [(sentence(n), sentence(n + 50, 3 + n % 4), labels[n % len(labels)]) for n in range(count)]


# ---------------------------------------------------------------- batches


def test_a_pair_is_what_the_tokenizer_writes(folder: Path) -> None:
    rows = pairs(9, [0, 1])
    write_tsv(folder / "train.tsv", "one\ttwo\tkind", rows)
    write_tsv(folder / "dev.tsv", "one\ttwo\tkind", [("someone reads", "in the park", 1)])
    bundle = built(
        folder,
        f"data.path={folder / 'train.tsv'}",
        f"data.validation_path={folder / 'dev.tsv'}",
        "data.text_fields=[one, two]",
        "data.label_field=kind",
    )
    batch = bundle.train.next_batch()
    expected = word_tokenizer()(
        [row[0] for row in rows[:4]],
        [row[1] for row in rows[:4]],
        padding=True,
        pad_to_multiple_of=8,
        return_tensors="pt",
    )
    assert set(batch) == {*expected, "targets", "_part"}
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    assert batch["targets"].tolist() == [0, 1, 0, 1] and batch["targets"].dtype == torch.int64
    assert bundle.summary["num_rows"] == 9 and bundle.summary["num_by_class"] == {"0": 5, "1": 4}


def test_long_pairs_lose_the_end_of_the_longer_text_and_are_counted(folder: Path) -> None:
    rows = [(sentence(n, 20 - n), sentence(n + 9, 4 + n), n % 2) for n in range(6)]
    write_tsv(folder / "train.tsv", "text\tother\tlabel", rows)
    said: list[str] = []
    write_tsv(folder / "dev.tsv", "text\tother\tlabel", pairs(2, [0]))
    bundle = built(
        folder,
        f"data.path={folder / 'train.tsv'}",
        f"data.validation_path={folder / 'dev.tsv'}",
        "data.text_fields=[text, other]",
        "train.micro_batch_size=6",
        said=said,
    )
    reference = word_tokenizer()(
        [row[0] for row in rows],
        [row[1] for row in rows],
        truncation="longest_first",
        max_length=16,
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(bundle.train.next_batch()["input_ids"], reference["input_ids"])
    lost = sum(max(0, len(row[0].split()) + len(row[1].split()) + 3 - 16) for row in rows)
    assert bundle.summary["num_truncated_tokens"] == lost > 0
    assert bundle.summary["num_truncated_rows"] == 6
    assert any(f"{lost} of" in line and "data.sequence_length=16" in line for line in said)


def test_positions_that_are_counted_from_the_padding_token_are_fewer(folder: Path) -> None:
    shape = json.loads((folder / "bert.json").read_text()) | {"max_position_embeddings": 18}
    hf = word_tokenizer()
    hf.pad_token = "[SEP]"  # 3
    for model_type, longest in (("roberta", 14), ("bert", 18)):
        (folder / "bert.json").write_text(json.dumps(shape | {"model_type": model_type}))

        def described(length: int) -> Any:
            config = load_config(None, options(folder, "data.path=rows.tsv", f"data.sequence_length={length}"))
            return configure_model(config, TransformersTokenizer(hf, "words"))

        description = described(longest)
        model = AutoModelForSequenceClassification.from_config(description)
        model(input_ids=torch.ones(1, longest, dtype=torch.int64))
        with pytest.raises((ConfigError, IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.ones(1, longest + 1, dtype=torch.int64))
        with pytest.raises(ConfigError, match=f"data.sequence_length={longest + 1} is more than .*at most {longest}"):
            described(longest + 1)


def test_padding_changes_no_decoders_class(folder: Path) -> None:
    """Its description knows another padding than the tokenizer."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    (folder / "llama").mkdir()
    described = {"model_type": "llama", "vocab_size": 19, "pad_token_id": 7, "initializer_range": 1.0}
    (folder / "llama" / "config.json").write_text(json.dumps(shape | described))
    write_tsv(folder / "train.tsv", "text\tlabel", [(sentence(n, 2 + 3 * n), n % 2) for n in range(4)])
    write_tsv(folder / "dev.tsv", "text\tlabel", [("two dogs", 0)])
    paths = f"data.path={folder / 'train.tsv'}", f"data.validation_path={folder / 'dev.tsv'}"
    overrides = [*paths, "model.shape=null", f"model.path={folder / 'llama'}"]
    batch = built(folder, *overrides).train.next_batch()
    config = load_config(None, options(folder, *overrides))
    description = configure_model(config, TransformersTokenizer(word_tokenizer(), "words"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(description).eval()
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        together = model(**{name: batch[name] for name in names}).logits
        for index, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = model(**{name: batch[name][index : index + 1, :length] for name in names}).logits[0]
            torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [([], {8, 13}), (["train.compile=true"], {13})],  # padded to a multiple of 8, but not beyond 13
)
def test_rows_are_padded_to_few_lengths_and_not_beyond_the_longest(
    folder: Path, overrides: list[str], expected: set[int]
) -> None:
    write_tsv(folder / "train.tsv", "text\tlabel", [(sentence(n, 3 + 6 * (n // 4)), n % 2) for n in range(16)])
    write_tsv(folder / "dev.tsv", "text\tlabel", [("two dogs", 0)])
    paths = f"data.path={folder / 'train.tsv'}", f"data.validation_path={folder / 'dev.tsv'}"
    bundle = built(folder, *paths, "data.sequence_length=13", *overrides)
    batches = [bundle.train.next_batch() for _ in range(4)]
    assert {batch["input_ids"].shape[1] for batch in batches} == expected
    assert [batch["attention_mask"].sum(1).max().item() for batch in batches] == [5, 11, 13, 13]


def test_a_language_models_tokenizer_closes_each_text(tmp_path: Path) -> None:
    folder = tmp_path / "joined"
    folder.mkdir()
    word_tokenizer(writes_pairs=False).save_pretrained(folder / "tokenizer")
    shape = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "bert.json").write_text(json.dumps(shape | {"vocab_size": 64, "max_position_embeddings": 64}))
    rows = [
        {"text": "two dogs run", "other": "a man reads", "label": 1.5},
        {"text": "a " * 30, "other": "dogs", "label": 2},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dev.jsonl").write_text(json.dumps(rows[0] | {"text": "run"}) + "\n")
    bundle = built(
        folder,
        f"data.path={folder / 'rows.jsonl'}",
        f"data.validation_path={folder / 'dev.jsonl'}",
        "data.text_fields=[text, other]",
        "train.micro_batch_size=2",
        task="regression",
    )
    batch = bundle.train.next_batch()
    ids = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    end = ids["[SEP]"]
    of_first = [ids["two"], ids["dogs"], ids["run"], end, ids["a"], ids["man"], ids["reads"], end]
    assert batch["input_ids"][0, :8].tolist() == of_first
    assert batch["input_ids"][1].tolist() == [*[ids["a"]] * 13, end, ids["dogs"], end]
    assert batch["attention_mask"].sum(1).tolist() == [8, 16]
    assert batch["targets"].dtype == torch.float32 and batch["targets"].tolist() == [1.5, 2.0]
    assert "token_type_ids" not in batch and bundle.summary["num_truncated_tokens"] == 17


def test_without_held_out_files_equal_texts_fall_on_one_side(folder: Path) -> None:
    rows = [(sentence(n % 60, 4 + n % 3), n % 2) for n in range(240)]
    write_tsv(folder / "all.tsv", "text\tlabel", rows)
    bundle = built(folder, f"data.path={folder / 'all.tsv'}", "data.validation_fraction=0.3")
    held_out = {tuple(ids) for batch in bundle.validation.batches(7) for ids in trimmed(batch)}
    trained = {tuple(ids) for _ in range(bundle.summary["num_rows"] // 4) for ids in trimmed(bundle.train.next_batch())}
    assert held_out and trained and not held_out & trained
    assert bundle.summary["num_rows"] + bundle.summary["num_validation_documents"] == 240


def test_of_few_rows_one_is_held_out(folder: Path) -> None:
    write_tsv(folder / "few.tsv", "text\tlabel", [("a " * (n + 1), n % 2) for n in range(20)])
    summary = built(folder, f"data.path={folder / 'few.tsv'}", "data.validation_fraction=0.0001").summary
    assert (summary["num_rows"], summary["num_validation_documents"]) == (19, 1)
    write_tsv(folder / "few.tsv", "text\tlabel", [("a man", n % 2) for n in range(20)])
    with pytest.raises(
        DataError, match=r": 0 examples for training, .* \(20 of 20 rows have texts that are held out\)"
    ):
        built(folder, f"data.path={folder / 'few.tsv'}")
    write_tsv(folder / "few.tsv", "text\tlabel", [("", n % 2) for n in range(20)])
    with pytest.raises(DataError, match=r"few.tsv has no example with text"):
        built(folder, f"data.path={folder / 'few.tsv'}")


def trimmed(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in rows]


def test_empty_and_shared_texts_are_left_out_and_counted(folder: Path) -> None:
    rows = [(sentence(n), n % 2) for n in range(8)]
    write_tsv(folder / "train.tsv", "text\tlabel", [*rows, ("", 1), ("  ", 0)])
    write_tsv(folder / "dev.tsv", "text\tlabel", [(sentence(3), 0), ("someone reads the flute", 1), (" ", 1)])
    said: list[str] = []
    paths = f"data.path={folder / 'train.tsv'}", f"data.validation_path={folder / 'dev.tsv'}"
    summary = built(folder, *paths, said=said).summary
    assert (summary["num_rows"], summary["num_empty"], summary["num_duplicates"]) == (7, 2, 1)
    assert (summary["num_validation_documents"], summary["num_validation_empty"]) == (2, 1)
    assert any(line == "2 examples have no text and are left out" for line in said)
    assert any(line == "1 held-out examples have no text and are left out" for line in said)
    assert any("1 training examples have the texts of held-out ones and are left out" in line for line in said)


def test_the_position_goes_on_and_other_data_are_refused(folder: Path) -> None:
    write_tsv(folder / "train.tsv", "text\tlabel", [(sentence(n), n % 2) for n in range(23)])
    write_tsv(folder / "dev.tsv", "text\tlabel", [(sentence(99), 0)])
    paths = f"data.path={folder / 'train.tsv'}", f"data.validation_path={folder / 'dev.tsv'}"
    first, second = built(folder, *paths, "data.shuffle=true"), built(folder, *paths, "data.shuffle=true")
    for _ in range(8):  # into the second epoch
        first.train.next_batch()
    second.train.load_state_dict(json.loads(json.dumps(first.train.state_dict())))
    for _ in range(4):
        one, other = first.train.next_batch(), second.train.next_batch()
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(DataError, match=r"corpus was .* is "):
        write_tsv(folder / "train.tsv", "text\tlabel", [(sentence(n), 1) for n in range(23)])
        built(folder, *paths, "data.shuffle=true").train.load_state_dict(first.train.state_dict())


def test_the_loss_of_who_reads_nothing() -> None:
    assert blind_loss([0, 0, 1], [0, 1], 2) == pytest.approx(-(torch.tensor([0.6, 0.4]).log().mean().item()), abs=1e-6)
    assert blind_loss([1.0, 3.0], [2.0, 5.0], 1) == pytest.approx(4.5)


# ---------------------------------------------------------------- GLUE

FILES = {
    "cola": (None, lambda n, text, other: ("src", n % 2, "*" * (n % 2), text)),
    "sst2": ("sentence\tlabel", lambda n, text, other: (text, n % 2)),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", lambda n, text, other: (n % 2, n, n, text, other)),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        lambda n, text, other: (n, "g", "f", 2012, n, "none", "none", text, other, f"{n % 6:.3f}"),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        lambda n, text, other: (n, n, n, text, other, n % 2) if n != 5 else (n, n, n, text),
    ),
    "mnli": (
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        lambda n, text, other: (n, "g", text, other, "neutral", ("entailment", "neutral", "contradiction")[n % 3]),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        lambda n, text, other: (n, text, other, ("entailment", "not_entailment")[n % 2]),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        lambda n, text, other: (n, text, other, ("entailment", "not_entailment")[n % 2]),
    ),
}
HELD_OUT = {"mnli": ("dev_matched.tsv", "dev_mismatched.tsv")}


def test_held_out_rows_that_are_cut_short_are_told(folder: Path) -> None:
    header, row = FILES["qqp"]
    for name, count in (("train.tsv", 5), ("dev.tsv", 7)):  # number 5 is cut short
        write_tsv(folder / name, header, [row(n, sentence(n), sentence(n + 31)) for n in range(count)])
    said: list[str] = []
    summary = built(folder, f"data.path={folder}", "data.glue_task=qqp", said=said).summary
    assert (summary["num_validation_documents"], summary["num_validation_unreadable"]) == (6, 1)
    assert summary["num_unreadable"] == 0
    assert any(line == "1 held-out rows are cut short in the file and are left out" for line in said)


def glue_options(task: str) -> dict[str, Any]:
    labels = TASKS[task].labels
    return {"classes": len(labels)} if labels else {"task": "regression"}


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_of_glue(folder: Path, task: str) -> None:
    header, row = FILES[task]
    for name, first, count in [("train.tsv", 0, 12), *((n, 100, 7) for n in HELD_OUT.get(task, ("dev.tsv",)))]:
        rows = [row(n, f'"{sentence(n)}', sentence(n + 31, 4)) for n in range(first, first + count)]
        write_tsv(folder / task / name, header, rows)
    bundle = built(folder, f"data.path={folder / task}", f"data.glue_task={task}", **glue_options(task))
    skipped = 1 if task == "qqp" else 0
    assert bundle.summary["num_rows"] == 12 - skipped and bundle.summary["num_unreadable"] == skipped
    batch = bundle.train.next_batch()
    has_pairs = len(TASKS[task].text_fields) == 2
    hf = word_tokenizer()
    texts = ([f'"{sentence(0)}'], [sentence(31, 4)]) if has_pairs else ([f'"{sentence(0)}'],)
    assert trimmed(batch)[0] == hf(*texts)["input_ids"][0]
    assert batch["targets"].tolist() == [n % (6 if task == "stsb" else len(TASKS[task].labels)) for n in range(4)]
    held_out = list(bundle.validation.batches(4))
    assert sum(len(batch["targets"]) for batch in held_out) == 7 * len(TASKS[task].held_out)
    assert bundle.scorer is not None
    scorer = bundle.scorer()
    for batch in held_out:  # right everywhere
        targets = batch["targets"]
        right = targets[:, None] if task == "stsb" else torch.eye(len(TASKS[task].labels))[targets]
        scorer.add(type("Outputs", (), {"logits": right}), batch)
    scores = scorer.result([scorer.state()])
    assert all(value == pytest.approx(1.0) for value in scores.values())
    assert {*TASKS[task].metrics, "glue"} <= set(scores) and ("accuracy_mismatched" in scores) == (task == "mnli")


def test_the_hubs_data_set_has_its_own_columns(folder: Path) -> None:
    def split(first: int) -> datasets.Dataset:
        rows = [
            {"premise": sentence(n), "hypothesis": sentence(n + 5), "label": n % 3} for n in range(first, first + 9)
        ]
        features = datasets.Features(
            premise=datasets.Value("string"),
            hypothesis=datasets.Value("string"),
            label=datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        )
        return datasets.Dataset.from_list(rows, features=features)

    names = ("train", "validation_matched", "validation_mismatched")
    datasets.DatasetDict({name: split(20 * n) for n, name in enumerate(names)}).save_to_disk(folder / "hub")
    bundle = built(folder, f"data.name={folder / 'hub'}", "data.glue_task=mnli", classes=3)
    assert bundle.train.next_batch()["targets"].tolist() == [0, 1, 2, 0]
    assert [batch["_part"].tolist() for batch in bundle.validation.batches(9)] == [[0] * 9, [1] * 9]


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["bad", "good"], ["good", "bad"], [1, 0, 1, 0]),
        (["no", "yes"], ["1", "0"], [1, 0, 1, 0]),
        (None, ["1", "0"], [1, 0, 1, 0]),
        (None, ["bad", "good"], [0, 1, 0, 1]),
    ],
)
def test_numbers_of_a_data_set_are_the_classes_of_their_names(
    folder: Path, names: list[str] | None, labels: list[str], expected: list[int]
) -> None:
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features(text=datasets.Value("string"), label=label)
    rows = [{"text": sentence(n), "label": n % 2} for n in range(8)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "hub")
    write_tsv(folder / "dev.tsv", "text\tlabel", [("two dogs", labels[1])])
    paths = f"data.name={folder / 'hub'}", f"data.validation_path={folder / 'dev.tsv'}"
    bundle = built(folder, *paths, f"data.labels={json.dumps(labels)}")
    assert bundle.train.next_batch()["targets"].tolist() == expected


def test_the_names_of_a_data_set_must_be_the_classes(folder: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    rows = [{"text": sentence(n), "label": n % 2} for n in range(8)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "hub")
    with pytest.raises(DataError, match=r"row 1 has the label 'neg', which is no class; .*'bad', 'good'"):
        built(folder, f"data.name={folder / 'hub'}", "data.labels=[bad, good]")


def test_numbers_in_files_are_the_classes_that_are_called_so(folder: Path) -> None:
    rows = [(sentence(n), (n % 3) - 1) for n in range(9)]
    write_tsv(folder / "rows.tsv", "text\tlabel", rows)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    write_tsv(folder / "dev.tsv", "text\tlabel", [("two dogs", 0)])
    for name in ("rows.tsv", "rows.jsonl"):
        paths = f"data.path={folder / name}", f"data.validation_path={folder / 'dev.tsv'}"
        bundle = built(folder, *paths, 'data.labels=["1", "0", "-1"]', classes=3)
        assert bundle.train.next_batch()["targets"].tolist() == [2, 1, 0, 2], name
    with pytest.raises(DataError, match=r"has the label '0', which is no class"):
        built(folder, *paths, 'data.labels=["1", "2", "-1"]', classes=3)


@pytest.mark.parametrize("names", ['["false", "true"]', '["False", "True"]'])
def test_booleans_are_the_classes_that_are_called_so(folder: Path, names: str) -> None:
    rows = [{"text": sentence(n), "label": n % 3 == 0} for n in range(8)]
    pandas.DataFrame(rows).to_parquet(folder / "rows.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dev.jsonl").write_text(json.dumps({"text": "two dogs", "label": True}) + "\n")
    for name in ("rows.parquet", "rows.jsonl"):
        paths = f"data.path={folder / name}", f"data.validation_path={folder / 'dev.jsonl'}"
        assert built(folder, *paths, f"data.labels={names}").train.next_batch()["targets"].tolist() == [1, 0, 0, 1]
    with pytest.raises(DataError, match=r'label True, which is no class; .*set data.labels=\["false", "true"\]'):
        built(folder, *paths)


@pytest.mark.parametrize("task", [None, "mnli"])
def test_files_can_be_held_out_of_a_data_set_of_the_hub(folder: Path, task: str | None) -> None:
    names, rows = ("premise", "hypothesis", "label"), pairs(12, [0, 1, 2])
    stored = {"train": datasets.Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])}
    datasets.DatasetDict(stored).save_to_disk(folder / "hub")
    if task is None:
        overrides = ["data.text_fields=[premise, hypothesis]"]
        write_tsv(folder / "dev.tsv", "premise\thypothesis\tlabel", [("two dogs", "someone reads", 2)])
    else:  # whose files have other columns
        overrides = [f"data.glue_task={task}"]
        write_tsv(
            folder / "dev.tsv", "sentence1\tsentence2\tgold_label", [("two dogs", "someone reads", "contradiction")]
        )
    paths = f"data.name={folder / 'hub'}", f"data.validation_path={folder / 'dev.tsv'}"
    bundle = built(folder, *paths, *overrides, classes=3)
    (batch,) = bundle.validation.batches(4)
    assert trimmed(batch) == [word_tokenizer()("two dogs", "someone reads")["input_ids"]]
    assert batch["targets"].tolist() == [2] and bundle.summary["num_rows"] == 12


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([("a man", 0), ("dogs", 2)], [], r"line 3 has the label 2, which is no class; classes are 0 to 1"),
        ([("a man", "good"), ("dogs", "so-so")], ["data.labels=[bad, good]"], r"'so-so', which is no class.*'bad'"),
        ([("a man", 0)], ["data.labels=[bad, good, ugly]"], "has 3 classes, the model 2; set model.num_labels=3"),
        ([("a man", 0)], ["data.text_fields=[sentence]"], r"no column 'sentence'; it has: 'text', 'label'"),
        ([("a man", 0)], ["data.label_field=y"], r"data.label_field: .* no column 'y'"),
        ([("a man", 0)], [], r"1 examples for training, fewer than the 4 of one global batch"),
    ],
)
def test_wrong_rows_are_refused(folder: Path, rows: list[Any], overrides: list[str], message: str) -> None:
    write_tsv(folder / "train.tsv", "text\tlabel", rows)
    write_tsv(folder / "dev.tsv", "text\tlabel", [("run", "good" if "good" in str(rows) else 1)])
    with pytest.raises(DataError, match=message):
        built(folder, f"data.path={folder / 'train.tsv'}", f"data.validation_path={folder / 'dev.tsv'}", *overrides)


def test_what_is_missing_is_named_as_it_was_given(folder: Path) -> None:
    write_tsv(folder / "train.tsv", "text\tlabel", [("a man", 0), ("dogs", 1)])
    write_tsv(folder / "dev.tsv", "text\tlabel", [])
    with pytest.raises(DataError, match=r"^data.validation_path=.*dev.tsv has no example"):
        built(folder, f"data.path={folder / 'train.tsv'}", f"data.validation_path={folder / 'dev.tsv'}")
    hub = folder / "named"
    write_tsv(hub / "train.tsv", "text\tlabel", [("a man", 0), ("dogs", 1)])
    write_tsv(folder / "dev.tsv", "text\tlabel", [("run", 1)])
    with pytest.raises(DataError, match=r"^data.name=.*named \(data.split=train\): 2 examples for training"):
        built(folder, f"data.name={hub}", f"data.validation_path={folder / 'dev.tsv'}")


def test_numbers_that_are_none_are_refused(folder: Path) -> None:
    write_tsv(folder / "train.tsv", "text\tlabel", [("a man", 1.5), ("dogs", "nan")])
    with pytest.raises(DataError, match=r"line 3 has 'nan', which is no number"):
        built(folder, f"data.path={folder / 'train.tsv'}", "data.validation_fraction=0.5", task="regression")
    for number in (10**400, -(10**400), "1e39", "inf"):
        (folder / "train.jsonl").write_text(json.dumps({"text": "a man", "label": number}) + "\n")
        with pytest.raises(DataError, match=r"line 1 has .*, which float32 cannot hold"):
            built(folder, f"data.path={folder / 'train.jsonl'}", task="regression")


def test_another_directory_than_the_tasks_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no train.tsv in it.*data.glue_task"):
        built(folder, f"data.path={folder}", "data.glue_task=rte")
    write_tsv(folder / "RTE" / "train.tsv", "index\tsentence\tlabel", [(0, "a man", "entailment")])
    write_tsv(folder / "RTE" / "dev.tsv", "index\tsentence1\tsentence2\tlabel", [(0, "a", "b", "entailment")])
    with pytest.raises(DataError, match=r"no column 'sentence1'; it has: 'index', 'sentence', 'label'"):
        built(folder, f"data.path={folder / 'RTE'}", "data.glue_task=rte")
    with pytest.raises(DataError, match=r"data.glue_task=mnli has 3 classes, the model 2; set model.num_labels=3"):
        built(folder, f"data.path={folder}", "data.glue_task=mnli")
    with pytest.raises(
        DataError, match=r"data.glue_task=stsb with model.task=classification; set model.task=regression"
    ):
        built(folder, f"data.path={folder}", "data.glue_task=stsb")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.format=text"], r"model.task=classification with data.format=text"),
        (["model.task=masked_lm", "model.num_labels=null"], r"model.task=masked_lm with data.format=classification"),
        (["data.text_fields=[a, b, c]"], "has 3 columns; give one or two"),
        (["data.labels=[a, a]"], "has a class twice"),
        (["data.glue_task=rte", "data.label_field=y"], r"data.label_field=y has no effect with data.glue_task=rte"),
        (["data.packing=truncated"], r"data.packing=truncated has no effect with data.format=classification"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, options(folder, "data.path=rows.tsv", *overrides))
