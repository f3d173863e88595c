"""Which documents there are, and that training never sees what is held out."""

from __future__ import annotations

import json
import sysconfig
import tokenize
from pathlib import Path
from typing import Any

import pytest

from loqt_ds.config import DataConfig
from loqt_ds.data.corpus import Corpus, Counts
from loqt_ds.data.errors import DataError
from loqt_ds.data.sources import StandardLibrarySource


def sides(corpus: Corpus, cache: Path) -> tuple[list[str], list[str], Counts]:
    split = corpus.survey(cache)
    met = Counts()
    train = [document.text for _, document in corpus.documents("train", split, met)]
    return train, [document.text for _, document in corpus.documents("validation", split)], met


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_standard_library_is_what_it_should_be(tmp_path: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    expected = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not {"test", "tests", "site-packages", "dist-packages", "__pycache__"} & set(parts[:-1]):
            with tokenize.open(path) as handle:
                expected["/".join(parts)] = handle.read()
    documents = list(StandardLibrarySource().documents())
    assert {document.split_key: document.text for document in documents} == expected
    assert sum(map(len, expected.values())) > 5e6
    train, held_out, _ = sides(Corpus(DataConfig()), tmp_path)
    again, held_out_again, _ = sides(Corpus(DataConfig()), tmp_path / "other")
    assert (train, held_out) == (again, held_out_again)
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.09
    assert set(train) | set(held_out) == {text for text in expected.values() if text.strip()}


def test_standard_library_encodings_and_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = '\u00e9'\n".encode("latin-1"))
    (root / "bad.py").write_bytes(b"name = '\xff'\n")
    (root / "unknown.py").write_bytes(b"# -*- coding: no-such-code -*-\n")
    (root / "test" / "left_out.py").write_text("left out")
    for number in range(200):
        (root / f"module{number}.py").write_text(f"content {number // 2}\n")  # every content twice
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    told: list[str] = []
    corpus = Corpus(DataConfig(validation_fraction=0.2), told.append)
    train, held_out, met = sides(corpus, tmp_path / "cache")
    assert "2 files cannot be decoded" in told[0]
    assert any("\u00e9" in text for text in train + held_out)
    assert "left out" not in train + held_out
    assert not set(train) & set(held_out)
    assert met.num_duplicates > 0
    assert len(train) + len(held_out) + met.num_duplicates == 201


def test_no_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"no .py files there.*set data.path or data.name"):
        Corpus(DataConfig())


def test_identical_documents_fall_on_one_side(tmp_path: Path) -> None:
    texts = [f"document {number % 300}" + " \n" * (number % 2) for number in range(1000)] + ["", " \n"]
    corpus = Corpus(DataConfig(path=write_lines(tmp_path / "a.jsonl", texts), validation_fraction=0.1))
    train, held_out, met = sides(corpus, tmp_path / "cache")
    assert sorted(train + held_out) == sorted(text for text in texts if text.strip())
    assert not {text.strip() for text in train} & {text.strip() for text in held_out}
    assert 0.04 < len(held_out) / 1000 < 0.17
    assert met.num_empty == 2


def test_separate_validation_is_kept_out_of_training(tmp_path: Path) -> None:
    train_texts = [f"train {number}" for number in range(50)] + ["shared 1\n", "shared 2", "shared 1"]
    path = write_lines(tmp_path / "a.jsonl", train_texts)
    validation_path = write_lines(tmp_path / "b.jsonl", ["shared 1", "shared 2", "own"])
    corpus = Corpus(DataConfig(path=path, validation_path=validation_path))
    train, held_out, met = sides(corpus, tmp_path / "cache")
    assert train == train_texts[:50]
    assert held_out == ["shared 1", "shared 2", "own"]
    assert met.num_duplicates == 3


@pytest.mark.parametrize(("num_documents", "fraction"), [(2, 0.001), (3, 0.999), (70, 1e-6), (90, 0.999999)])
def test_both_sides_get_something(tmp_path: Path, num_documents: int, fraction: float) -> None:
    texts = [f"document {number}" for number in range(num_documents)]
    corpus = Corpus(DataConfig(path=write_lines(tmp_path / "a.jsonl", texts), validation_fraction=fraction))
    train, held_out, _ = sides(corpus, tmp_path / "cache")
    assert train and held_out
    assert sorted(train + held_out) == sorted(texts)


@pytest.mark.parametrize("text", ["\n".join(f"line {number}" for number in range(1000)), "x" * 5000])
def test_a_single_document_gives_its_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    corpus = Corpus(DataConfig(path=str(tmp_path / "a.txt"), validation_fraction=0.1))
    (train,), (held_out,), _ = sides(corpus, tmp_path / "cache")
    assert train + held_out == text
    assert 0.09 < len(held_out) / len(text) < 0.11
    assert train.endswith("\n") or "\n" not in text


def test_nothing_but_blanks(tmp_path: Path) -> None:
    corpus = Corpus(DataConfig(path=write_lines(tmp_path / "a.jsonl", ["", "  \n"])))
    with pytest.raises(DataError, match=r"a.jsonl holds no text"):
        corpus.survey(tmp_path / "cache")


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    path = Path(write_lines(tmp_path / "a.jsonl", ["one", "two", "three"]))
    before = Corpus(DataConfig(path=str(path))).key(tmp_path)
    path.rename(tmp_path / "b.jsonl")
    assert Corpus(DataConfig(path=str(tmp_path / "b.jsonl"))).key(tmp_path) == before
    write_lines(path, ["one", "two", "tiger"])
    assert Corpus(DataConfig(path=str(path))).key(tmp_path) != before
    write_lines(path, ["one", "two", "three"])
    assert Corpus(DataConfig(path=str(path))).key(tmp_path) == before
    assert Corpus(DataConfig(path=str(path), validation_fraction=0.1)).key(tmp_path) != before


@pytest.fixture(scope="module")
def dataset_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    for split, texts in {"train": [f"t {n}" for n in range(30)] + ["v 1"], "validation": ["v 1", "v 2"]}.items():
        write_lines(directory / f"{split}.jsonl", texts)
    return directory


@pytest.fixture(autouse=True)
def _own_datasets_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_directory(dataset_directory: Path, tmp_path: Path, streaming: bool) -> None:
    data = DataConfig(name=str(dataset_directory), validation_split="validation", streaming=streaming)
    corpus = Corpus(data)
    train, held_out, met = sides(corpus, tmp_path)
    assert train == [f"t {n}" for n in range(30)] and held_out == ["v 1", "v 2"] and met.num_duplicates == 1
    split = corpus.survey(tmp_path)
    late = [(index, document.text) for index, document in corpus.documents("train", split, first=27)]
    assert late == [(27, "t 27"), (28, "t 28"), (29, "t 29")]


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_dataset_without_validation_split(tmp_path: Path, streaming: bool) -> None:
    import datasets

    rows = {"body": [f"text {n}" for n in range(200)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "saved"))
    data = DataConfig(name=str(tmp_path / "saved"), text_field="body", streaming=streaming, validation_fraction=0.2)
    train, held_out, _ = sides(Corpus(data), tmp_path / "cache")
    assert sorted(train + held_out) == sorted(rows["body"]) and train and held_out
    with pytest.raises(DataError, match=r"data.text_field=text: .* has no such field; it has: 'body'"):
        Corpus(DataConfig(name=str(tmp_path / "saved"), streaming=streaming))
    with pytest.raises(DataError, match=r"data.split=extra.*can be one of train"):
        Corpus(DataConfig(name=str(tmp_path / "saved"), split="extra", text_field="body"))


def test_dataset_mistakes(dataset_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data.name=.* \(data.split=extra\).*cannot be loaded"):
        Corpus(DataConfig(name=str(dataset_directory), split="extra"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data.name=no/such-dataset.*local files with data.path"):
        Corpus(DataConfig(name="no/such-dataset"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "a.txt", "name": "b"}, r"data.path=a.txt and data.name=b are both set"),
        ({"validation_path": "a.txt", "validation_split": "b", "name": "c"}, r"data.validation_split=b are both"),
        ({"validation_split": "b"}, r"data.validation_split=b is a split of a dataset, but data.name is not set"),
        ({"config_name": "en"}, r"data.config_name=en belongs to data.name"),
        ({"validation_fraction": 0.0}, r"data.validation_fraction=0.0 must be above 0"),
        ({"path": "/no/such.txt"}, r"data.path=/no/such.txt: no such file"),
        ({"validation_path": "/no/such.txt"}, r"data.validation_path=/no/such.txt: no such file"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Corpus(DataConfig(**options))
