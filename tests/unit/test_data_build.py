"""From a configuration to batches: stored and streamed, cached, resumed, refused."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import as_ranks

from loqt_ds.config import Config, ConfigError, DataConfig, EvalConfig, TrainConfig
from loqt_ds.data import DataBundle, Tokenizer, build_data, load_tokenizer
from loqt_ds.data import streaming as streaming_module
from loqt_ds.data.corpus import Corpus
from loqt_ds.data.errors import DataError
from loqt_ds.data.packing import IGNORED
from loqt_ds.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from loqt_ds.preflight import check_same_data
from loqt_ds.ranks import Ranks

WORDS = ["alpha", "beta", "gamma", "delta", "  indented", "new\nline", "caf\u00e9", "\U0001f600", "x = 1"]


def texts_of(num_documents: int, seed: int = 0) -> list[str]:
    chooser = random.Random(seed)
    return [f"{n} " + " ".join(chooser.choices(WORDS, k=chooser.randint(1, 30))) for n in range(num_documents)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(train_sentencepiece(texts_of(300, seed=9), 340), "test", trained_here=True)


def make_config(tmp_path: Path, num_documents: int = 120, **options: Any) -> Config:
    path = tmp_path / "corpus.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of(num_documents)))
    train = {name: options.pop(name) for name in ("micro_batch_size", "gradient_accumulation_steps") if name in options}
    defaults: dict[str, Any] = {
        "path": str(path),
        "validation_fraction": 0.2,
        "sequence_length": 16,
        "cache_dir": str(tmp_path / "cache"),
    }
    max_tokens = options.pop("max_tokens", None)
    return Config(
        data=DataConfig(**(defaults | options)),
        train=TrainConfig(**({"micro_batch_size": 4, "seed": 3} | train)),
        eval=EvalConfig(max_tokens=max_tokens),
    )


def build(config: Config, tokenizer: Tokenizer, told: list[str] | None = None, **ranks: int) -> DataBundle:
    return build_data(config, tokenizer, say=(told if told is not None else []).append, **ranks)


def documents(config: Config, side: str) -> list[str]:
    corpus = Corpus(config.data, lambda line: None)
    split = corpus.survey(Path(config.data.cache_dir or ""), lambda line: None)
    return [document.text for _, document in corpus.documents(side, split)]


def take(bundle: DataBundle, num_batches: int) -> list[list[int]]:
    return [row for _ in range(num_batches) for row in bundle.train.next_batch()["input_ids"].tolist()]


def test_tokens_are_those_of_the_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = make_config(tmp_path, shuffle=False)
    bundle = build(config, tokenizer)
    stream = [token for text in documents(config, "train") for token in [*tokenizer.encode(text), tokenizer.eot_id]]
    num_rows = bundle.summary["num_rows"]
    assert num_rows == math.ceil((len(stream) - 1) / 16)
    targets: list[int] = []
    while len(targets) < 16 * num_rows:
        targets += bundle.train.next_batch()["targets"].flatten().tolist()
    assert [token for token in targets[: 16 * num_rows] if token != IGNORED] == stream[1:]
    assert bundle.summary["num_tokens"] == len(stream)


def test_validation_holds_the_held_out_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = make_config(tmp_path)
    bundle = build(config, tokenizer)
    held_out = documents(config, "validation")
    stream = [token for text in held_out for token in [*tokenizer.encode(text), tokenizer.eot_id]]
    batches = list(bundle.validation.batches(3))
    targets = [token for batch in batches for token in batch["targets"].flatten().tolist() if token != IGNORED]
    assert targets == stream[1:]
    assert bundle.validation.num_predicted == len(targets)
    assert not set(held_out) & set(documents(config, "train"))


def test_unigram_loss_against_a_loop(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = make_config(tmp_path)
    summary = build(config, tokenizer).summary
    seen = Counter(t for text in documents(config, "train") for t in [*tokenizer.encode(text), tokenizer.eot_id])
    total = sum(seen.values()) + tokenizer.vocab_size
    held_out = [t for text in documents(config, "validation") for t in [*tokenizer.encode(text), tokenizer.eot_id]]
    expected = -math.fsum(math.log((seen[token] + 1) / total) for token in held_out) / len(held_out)
    assert summary["unigram_loss"] == pytest.approx(expected, rel=1e-12)
    json.dumps(summary)


@pytest.mark.parametrize("packing", ["packed", "truncated"])
@pytest.mark.parametrize("streaming", [False, True])
def test_resume_anywhere(
    tmp_path: Path, tokenizer: Tokenizer, packing: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new object that loads the state gives the batches the old one gives; over several blocks and epochs."""
    monkeypatch.setattr(streaming_module.StreamSequence.__init__, "__kwdefaults__", {"block_rows": 7})
    config = make_config(tmp_path, num_documents=60, packing=packing, streaming=streaming, mask_documents=True)
    bundle = build(config, tokenizer)
    states, batches = [], []
    for _ in range(120):
        states.append(json.loads(json.dumps(bundle.train.state_dict())))
        batches.append(bundle.train.next_batch())
    assert states[-1]["epoch"] >= 2
    for at in [0, 1, 5, 17, 33, 34, 35, 64, 101]:
        resumed = build(config, tokenizer).train
        resumed.load_state_dict(states[at])
        assert resumed.state_dict() == states[at]
        for expected in batches[at : at + 5]:
            found = resumed.next_batch()
            assert set(found) == set(expected) == {"input_ids", "targets", "attention_mask", "position_ids"}
            for name in found:
                assert found[name].tolist() == expected[name].tolist()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_order(tmp_path: Path, tokenizer: Tokenizer, streaming: bool, world_size: int) -> None:
    one = take(build(make_config(tmp_path, streaming=streaming), tokenizer), 12 * world_size)
    config = make_config(tmp_path, streaming=streaming)
    ranks = [build(config, tokenizer, rank=rank, world_size=world_size) for rank in range(world_size)]
    union = [row for _ in range(12) for rank in ranks for row in take(rank, 1)]
    assert union == one


def test_streamed_rows_are_the_stored_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Unshuffled, one epoch of the stream is one epoch of the store, whatever its blocks."""
    stored = build(make_config(tmp_path, shuffle=False), tokenizer)
    streamed = build(make_config(tmp_path, shuffle=False, streaming=True), tokenizer)
    num_batches = stored.summary["num_rows"] // 4 * 3
    assert take(streamed, num_batches) == take(stored, num_batches)


def test_stream_shuffles_within_blocks_and_loses_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stored = build(make_config(tmp_path, shuffle=False, micro_batch_size=1), tokenizer)
    streamed = build(make_config(tmp_path, streaming=True, micro_batch_size=1), tokenizer)
    num_rows = stored.summary["num_rows"]
    expected, first, second = take(stored, num_rows), take(streamed, num_rows), take(streamed, num_rows)
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != expected and first != second


def test_stream_keeps_held_out_text_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = make_config(tmp_path, streaming=True, max_tokens=50)
    streamed = build(config, tokenizer)
    held_out = {text for text in documents(make_config(tmp_path), "validation")}
    batch = next(iter(streamed.validation.batches(1000)))
    ids = [token for token in batch["targets"].flatten().tolist() if token != IGNORED]
    text = tokenizer.decode([token for token in ids if token != tokenizer.eot_id])
    assert streamed.summary["num_validation_tokens"] >= 50
    assert any(document[5:] in text for document in held_out)
    rows = take(streamed, 200)
    seen = tokenizer.decode([token for row in rows for token in row if token != tokenizer.eot_id])
    assert not any(document in seen for document in held_out)


def test_truncated_is_counted_and_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    told: list[str] = []
    config = make_config(tmp_path, packing="truncated")
    summary = build(config, tokenizer, told).summary
    lengths = [len(tokenizer.encode(text)) + 1 for text in documents(config, "train")]
    assert summary["num_truncated_tokens"] == sum(max(0, length - 17) for length in lengths) > 0
    assert summary["num_rows"] == len(lengths)
    assert any(f"cuts off {summary['num_truncated_tokens']} of the training tokens" in line for line in told)


def tokenized(told: list[str]) -> int:
    return sum(line.startswith("tokenized") for line in told)


def test_cache_is_used_checked_and_keyed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    told: list[str] = []
    config = make_config(tmp_path)
    before = take(build(config, tokenizer, told), 10)
    assert tokenized(told) == 2
    told.clear()
    assert take(build(config, tokenizer, told), 10) == before
    assert tokenized(told) == 0
    for path in (tmp_path / "cache" / "tokens").glob("*/tokens.bin"):  # damaged: cut short
        path.write_bytes(path.read_bytes()[:-2])
    assert take(build(config, tokenizer, told), 10) == before
    assert tokenized(told) == 2 and any("is damaged; it is made again" in line for line in told)
    told.clear()
    other = SentencePieceTokenizer(train_sentencepiece(texts_of(300, seed=9), 341), "other")
    build(config, other, told)
    assert tokenized(told) == 2
    told.clear()
    path = tmp_path / "corpus.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": "one more document, held out or not"}) + "\n")
    build(config, tokenizer, told)
    assert tokenized(told) == 2


def test_other_ranks_say_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    told: list[str] = []
    build(make_config(tmp_path), tokenizer, told, rank=1, world_size=2)
    assert not told


def _build_and_report(tmp_path: Path, model: Path, queue: multiprocessing.Queue[tuple[list[list[int]], int]]) -> None:
    told: list[str] = []
    bundle = build(make_config(tmp_path), load_tokenizer(str(model)), told)
    queue.put((take(bundle, 5), tokenized(told)))


def test_processes_that_race_tokenize_once(tmp_path: Path) -> None:
    make_config(tmp_path)
    (tmp_path / "a.model").write_bytes(train_sentencepiece(texts_of(300, seed=9), 340))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_build_and_report, args=(tmp_path, tmp_path / "a.model", queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert results[0][0] == results[1][0]
    assert sum(count for _, count in results) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_tokens_than_one_global_batch(tmp_path: Path, tokenizer: Tokenizer, streaming: bool) -> None:
    config = make_config(tmp_path, num_documents=30, gradient_accumulation_steps=50, streaming=streaming)
    num_tokens = sum(len(tokenizer.encode(text)) + 1 for text in documents(config, "train"))
    message = rf"data.path=.*corpus.jsonl: {num_tokens} tokens for training, fewer than the {4 * 50 * 2 * 16 + 1} "
    with pytest.raises(DataError, match=message):
        build(config, tokenizer, world_size=2)
    enough = (num_tokens - 1) // 16
    config.train.gradient_accumulation_steps, config.train.micro_batch_size = 1, enough
    assert len(build(config, tokenizer).train.next_batch()["input_ids"]) == enough
    config.train.micro_batch_size = enough + 1
    with pytest.raises(DataError, match=r"fewer than the"):
        build(config, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_documents_than_one_truncated_batch(tmp_path: Path, tokenizer: Tokenizer, streaming: bool) -> None:
    config = make_config(tmp_path, num_documents=30, packing="truncated", streaming=streaming)
    config.train.micro_batch_size = len(documents(config, "train"))
    build(config, tokenizer)
    config.train.micro_batch_size += 1
    with pytest.raises(DataError, match=r"\d+ documents for training, fewer than the \d+ of one global batch"):
        build(config, tokenizer)


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir=.*file/x cannot be written.*LOQT_CACHE"):
        build(make_config(tmp_path, cache_dir=str(tmp_path / "file" / "x")), tokenizer)


def test_resume_with_other_options_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    state = build(make_config(tmp_path), tokenizer).train.state_dict()
    with pytest.raises(DataError, match=r"sequence_length was 16, is 32"):
        build(make_config(tmp_path, sequence_length=32), tokenizer).train.load_state_dict(state)


# ---------------------------------------------------------------- nodes with files of their own


def check(configs: list[Config], tokenizers: list[Tokenizer]) -> None:
    """What `prepare` does with the data of its ranks, each of which is a node."""

    def member(ranks: Ranks) -> None:
        config = configs[ranks.rank]
        bundle = build(config, tokenizers[ranks.rank], rank=ranks.rank, world_size=ranks.world_size)
        check_same_data(ranks, config, bundle)

    as_ranks(len(configs), member)


@pytest.mark.parametrize("streaming", [False, True])
def test_nodes_that_read_other_data_are_refused(tmp_path: Path, tokenizer: Tokenizer, streaming: bool) -> None:
    texts = texts_of(120)
    configs = []
    for name, kept in (("a", texts), ("b", texts), ("c", [*texts[:-1], texts[-1] + " alpha"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
        configs.append(make_config(tmp_path / name, streaming=streaming))
    same, copied, other = configs
    check([same, copied], [tokenizer] * 2)
    with pytest.raises(ConfigError, match=r"corpus.jsonl: rank \d .* than rank \d .*: corpus is .*the same files"):
        check([same, copied, other], [tokenizer] * 3)
    trained = SentencePieceTokenizer(train_sentencepiece(texts_of(300, seed=8), 340), "test", trained_here=True)
    with pytest.raises(ConfigError, match=r"tokenizer is .*one tokenizer \(data.tokenizer\)"):
        check([same, copied], [tokenizer, trained])


def test_copies_that_are_only_newer_are_the_same_data(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` makes fingerprints of a directory's files from their times too."""
    prints = iter(range(1000))
    monkeypatch.setattr("loqt_ds.data.sources.FileSource.fingerprint", lambda *_: str(next(prints)))
    config = make_config(tmp_path)
    check([config, config], [tokenizer] * 2)


def test_large_vocabularies_take_four_bytes(real_data: Path, tmp_path: Path) -> None:
    from loqt_ds.data.token_store import token_dtype

    assert token_dtype(65536) is np.uint16 and token_dtype(65537) is np.uint32
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / "t5-base" / "spiece.model"), lambda line: None)
    c4 = real_data / "en" / "c4"
    config = make_config(
        tmp_path, path=str(c4 / "c4_en_part1.jsonl.gz"), validation_path=str(c4 / "c4_en_part2.jsonl.gz")
    )
    summary = build(config, tokenizer).summary
    # SOURCES.md counts 512,612 and 519,468 T5 tokens without the end-of-text of each of the 1000 documents
    assert summary["num_duplicates"] == 0
    assert summary["num_tokens"] == 512612 + 1000
    assert summary["num_validation_tokens"] == 519468 + 1000
