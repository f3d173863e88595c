"""What is hidden for a masked language model: how much, by what, and the same whenever a run goes on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from loqt_ds.config import Config, ConfigError, load_config
from loqt_ds.data.build import DataBundle, build_data
from loqt_ds.data.errors import DataError
from loqt_ds.data.masking import Masker, masker_of
from loqt_ds.data.packing import IGNORED, Row
from loqt_ds.data.tokenizer import Tokenizer, TransformersTokenizer, load_or_train_tokenizer

MASK, BEGIN, END, VOCABULARY = 4, 2, 3, 60
MASKER = Masker(MASK, (BEGIN,), (END,), np.arange(5, VOCABULARY))


def row_of(tokens: np.ndarray) -> Row:
    return Row(tokens, tokens, np.zeros_like(tokens))


def test_shares_of_masked_random_and_kept_tokens() -> None:
    draw = np.random.default_rng(0)
    kinds: Counter[str] = Counter()
    put_in: Counter[int] = Counter()
    for number in range(400):
        tokens = draw.integers(5, VOCABULARY, 200)
        tokens[draw.integers(0, 200, 10)] = END  # documents end there
        inputs, targets, _ = MASKER.masked(row_of(tokens), 7, number)
        whole = np.array([BEGIN, *tokens, END])
        predicted = targets != IGNORED
        assert predicted.sum() == round(0.15 * (tokens != END).sum())
        assert (targets[predicted] == whole[predicted]).all() and (inputs[~predicted] == whole[~predicted]).all()
        assert not np.isin(whole[predicted], [BEGIN, END]).any()
        changed = inputs[predicted] != whole[predicted]
        kinds["mask"] += int((inputs[predicted] == MASK).sum())
        kinds["random"] += int((changed & (inputs[predicted] != MASK)).sum())
        kinds["kept"] += int((~changed).sum())
        put_in.update(inputs[predicted][changed & (inputs[predicted] != MASK)].tolist())
    total = sum(kinds.values())
    # Of random tokens one in 55 is the token itself.
    for kind, share in (("mask", 0.8), ("random", 0.1 * 54 / 55), ("kept", 0.1 + 0.1 / 55)):
        spread = (share * (1 - share) / total) ** 0.5
        assert abs(kinds[kind] / total - share) < 5 * spread, kind
    assert set(put_in) == set(range(5, VOCABULARY)) and max(put_in.values()) < 3 * min(put_in.values()) + 20


def test_places_are_hidden_alike() -> None:
    hidden = np.zeros(42)
    for number in range(3000):
        hidden += MASKER.masked(row_of(np.full(40, 9)), 0, number).targets != IGNORED
    assert hidden[0] == hidden[-1] == 0
    expected = 3000 * 6 / 40
    assert abs(hidden[1:-1] - expected).max() < 5 * expected**0.5


def test_the_key_alone_decides() -> None:
    tokens = np.random.default_rng(1).integers(5, VOCABULARY, 50)
    first = MASKER.masked(row_of(tokens), 3, 17)
    again = MASKER.masked(row_of(tokens), 3, 17)
    assert (first.inputs == again.inputs).all() and (first.targets == again.targets).all()
    others = [MASKER.masked(row_of(tokens), *key) for key in ((3, 18), (4, 17), (17, 3))]
    assert all((first.targets != other.targets).any() for other in others)
    # These very bits: a resumed run hides the same under another version of numpy.
    assert np.flatnonzero(first.targets != IGNORED).tolist() == [2, 18, 24, 26, 30, 33, 37, 47]


def test_a_row_of_special_tokens_predicts_nothing() -> None:
    inputs, targets, _ = MASKER.masked(row_of(np.array([END, END, 99, 1000])), 0, 0)
    assert (targets == IGNORED).all() and inputs.tolist() == [BEGIN, END, END, 99, 1000, END]
    assert (MASKER.masked(row_of(np.array([END, 9])), 0, 0).targets != IGNORED).sum() == 1


# ---------------------------------------------------------------- in a run's data


def texts(count: int) -> list[str]:
    draw = np.random.default_rng(5)
    letters = np.array(list("abcdefgh "))
    return ["".join(draw.choice(letters, 60 + 7 * number)) + f" Number {number}." for number in range(count)]


@pytest.fixture(scope="module")
def tokenizer_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("masked")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(80)))
    shape = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "vocab_size": 512, "max_position_embeddings": 64}
    (folder / "bert.json").write_text(json.dumps(shape))
    return load_or_train_tokenizer(config_of(folder), lambda _: None), folder


def config_of(folder: Path, *overrides: str) -> Config:
    common = [
        f"model.shape={folder / 'bert.json'}",
        "model.task=masked_lm",
        "model.vocab_size=auto",
        f"data.path={folder / 'text.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.tokenizer_vocab_size=300",
        "data.num_processes=1",
        "data.validation_fraction=0.2",
        "data.sequence_length=24",
        "train.micro_batch_size=3",
    ]
    return load_config(None, [*common, *overrides])


def bundle_of(tokenizer: Tokenizer, folder: Path, *overrides: str, **ranks: int) -> DataBundle:
    return build_data(config_of(folder, *overrides), tokenizer, say=lambda _: None, **ranks)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_the_trained_tokenizer_is_an_encoders(tokenizer_and_folder: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    tokenizer, _ = tokenizer_and_folder
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    pair = loaded("abc de", "fgh")
    assert set(pair) == {"input_ids", "token_type_ids", "attention_mask"}
    whole = loaded.convert_ids_to_tokens(pair["input_ids"])
    assert whole[0] == "[CLS]" and whole[-1] == "[SEP]" and whole.count("[SEP]") == 2
    assert pair["token_type_ids"][-1] == 1 and pair["token_type_ids"][0] == 0
    assert loaded.mask_token == "[MASK]" and len(loaded) == tokenizer.vocab_size <= 300
    assert loaded("abc", add_special_tokens=False)["input_ids"] == tokenizer.encode("ABC")


def test_rows_are_the_text_between_its_special_tokens(tokenizer_and_folder: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = tokenizer_and_folder
    bundle = bundle_of(tokenizer, folder, "data.shuffle=false")
    batch = bundle.train.next_batch()
    whole = torch.where(batch["targets"] == IGNORED, batch["input_ids"], batch["targets"])
    hf = tokenizer.hf
    assert (whole[:, 0] == hf.cls_token_id).all() and (whole[:, -1] == hf.sep_token_id).all()
    inside = whole[:, 1:-1].flatten().tolist()
    documents = [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts(80)]
    assert any(inside[: len(ids)] == ids for ids in documents)
    assert batch["attention_mask"].all() and batch["input_ids"].shape == (3, 24)


def test_a_run_goes_on_with_the_same_masks(tokenizer_and_folder: tuple[Tokenizer, Path]) -> None:
    first, second = (bundle_of(*tokenizer_and_folder) for _ in range(2))
    seen = [first.train.next_batch() for _ in range(40)]
    state = json.loads(json.dumps(first.train.state_dict()))
    second.train.load_state_dict(state)
    assert all(same(first.train.next_batch(), second.train.next_batch()) for _ in range(5))
    other_seed = bundle_of(*tokenizer_and_folder, "train.seed=1").train.next_batch()
    assert not same(seen[0], other_seed)


def test_two_ranks_see_what_one_sees(tokenizer_and_folder: tuple[Tokenizer, Path]) -> None:
    one = bundle_of(*tokenizer_and_folder, "train.micro_batch_size=6").train
    two = [bundle_of(*tokenizer_and_folder, rank=rank, world_size=2).train for rank in range(2)]
    for _ in range(6):
        parts = [train.next_batch() for train in two]
        assert same(one.next_batch(), {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def test_an_epoch_hides_other_tokens_and_evaluation_always_the_same(
    tokenizer_and_folder: tuple[Tokenizer, Path],
) -> None:
    bundle = bundle_of(*tokenizer_and_folder, "data.shuffle=false", "train.micro_batch_size=1")
    count = bundle.summary["num_rows"]
    epochs = [[bundle.train.next_batch() for _ in range(count)] for _ in range(2)]
    differ = [not torch.equal(one["targets"], other["targets"]) for one, other in zip(*epochs, strict=True)]
    assert sum(differ) > 0.9 * count
    passes = [list(bundle.validation.batches(size)) for size in (4, 4, 1)]
    assert all(same(one, other) for one, other in zip(passes[0], passes[1], strict=True))
    rows = [row for batch in passes[0] for row in batch["targets"].tolist()]
    assert rows == [row for batch in passes[2] for row in batch["targets"].tolist()]
    assert bundle.validation.num_predicted == sum(token != IGNORED for row in rows for token in row)
    last = passes[0][-1]
    assert not last["attention_mask"].all() and (last["targets"][last["attention_mask"] == 0] == IGNORED).all()


def test_documents_are_cut_where_each_has_a_row(tokenizer_and_folder: tuple[Tokenizer, Path]) -> None:
    bundle = bundle_of(*tokenizer_and_folder, "data.packing=truncated")
    batch = bundle.train.next_batch()
    assert batch["input_ids"].shape == (3, 24) and bundle.summary["num_truncated_tokens"] > 0


def test_what_cannot_be_masked_is_refused(tokenizer_and_folder: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = tokenizer_and_folder
    hf = AutoTokenizer.from_pretrained(next((folder / "cache" / "tokenizers").glob("*/tokenizer.json")).parent)
    hf.mask_token = None
    with pytest.raises(DataError, match=r"data.tokenizer=mine has no mask token.*data.tokenizer=null"):
        masker_of(TransformersTokenizer(hf, "mine"))
    with pytest.raises(DataError, match=r"data.sequence_length=2 leaves no room between the 2 special tokens"):
        bundle_of(tokenizer, folder, "data.sequence_length=2")
    with pytest.raises(ConfigError, match="data.mask_documents=true with model.task=masked_lm"):
        config_of(folder, "data.mask_documents=true")
