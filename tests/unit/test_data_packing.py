"""Rows against naive references: every token once, document masks against separate forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loqt_ds.data.packing import IGNORED, PackedRows, TruncatedRows, collate

EOT = 1


@dataclass
class Store:
    tokens: np.ndarray
    offsets: np.ndarray


def store(documents: list[list[int]]) -> Store:
    closed = [[*document, EOT] for document in documents]
    lengths = [len(document) for document in closed]
    return Store(np.array(sum(closed, []), dtype=np.uint16), np.array([0, *np.cumsum(lengths)], dtype=np.int64))


documents_strategy = st.lists(st.lists(st.integers(2, 60000), max_size=12), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(documents=documents_strategy, length=st.integers(1, 17))
def test_packed_predicts_every_token_but_the_first_once(documents: list[list[int]], length: int) -> None:
    held = store(documents)
    stream = [token for document in documents for token in [*document, EOT]]
    rows = PackedRows(held, length)
    inputs, targets, owners = [], [], []
    for index in range(len(rows)):
        row = rows.row(index)
        assert len(row.inputs) == len(row.targets) == len(row.documents)
        assert len(row.inputs) == length or index == len(rows) - 1
        inputs += row.inputs.tolist()
        targets += row.targets.tolist()
        owners += row.documents.tolist()
    assert inputs == stream[:-1]
    assert targets == stream[1:]
    assert owners == [number for number, document in enumerate(documents) for _ in [*document, EOT]][:-1]
    assert rows.num_predicted == len(targets)


@settings(max_examples=100, deadline=None)
@given(documents=documents_strategy, length=st.integers(1, 17))
def test_truncated_counts_what_it_cuts(documents: list[list[int]], length: int) -> None:
    rows = TruncatedRows(store(documents), length)
    assert len(rows) == len(documents)
    num_used = 0
    for index, document in enumerate(documents):
        row = rows.row(index)
        whole = [*document, EOT]
        assert row.inputs.tolist() == whole[:-1][:length]
        assert row.targets.tolist() == whole[1:][:length]
        num_used += len(row.targets) + 1
    assert num_used + rows.num_truncated_tokens == sum(len(document) + 1 for document in documents)


@settings(max_examples=50, deadline=None)
@given(documents=documents_strategy, length=st.integers(2, 11))
def test_document_mask_equals_a_loop(documents: list[list[int]], length: int) -> None:
    rows = PackedRows(store(documents), length)
    if not len(rows):
        return
    taken = [rows.row(index) for index in range(len(rows))]
    batch = collate(taken, length, pad_id=0, mask_documents=True)
    mask = batch["attention_mask"]
    assert mask.shape == (len(rows), 1, length, length) and mask.dtype == torch.bool
    for number, row in enumerate(taken):
        owners = [*row.documents.tolist(), *[-1] * (length - len(row.inputs))]
        for query in range(length):
            for key in range(length):
                assert bool(mask[number, 0, query, key]) == (key <= query and owners[key] == owners[query])
            begin = query
            while begin and owners[begin - 1] == owners[query]:
                begin -= 1
            assert int(batch["position_ids"][number, query]) == query - begin


def test_padding() -> None:
    rows = TruncatedRows(store([[5, 6], [7, 8, 9, 10, 11]]), 4)
    batch = collate([rows.row(0), rows.row(1)], 4, pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 3, 3], [7, 8, 9, 10]]
    assert batch["targets"].tolist() == [[6, EOT, IGNORED, IGNORED], [8, 9, 10, 11]]
    assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64
    assert set(batch) == {"input_ids", "targets"}


@pytest.fixture(scope="module")
def small_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            attn_implementation="sdpa",
        )
    ).eval()


def test_masked_documents_do_not_see_each_other(small_llama: torch.nn.Module) -> None:
    """The logits of a packed row equal those of its documents run one by one."""
    documents = [[4, 5, 6], [7], [8, 9, 10, 11, 12, 13]]
    rows = PackedRows(store(documents), 16)
    batch = collate([rows.row(0)], 16, pad_id=0, mask_documents=True)
    model_inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        packed = small_llama(**model_inputs).logits[0]
        alone = torch.cat([small_llama(input_ids=torch.tensor([[*item, EOT]])).logits[0] for item in documents])
        plain = small_llama(input_ids=batch["input_ids"]).logits[0]
    used = len(alone) - 1  # the last end-of-text is only a target
    torch.testing.assert_close(packed[:used], alone[:used], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain[:used], alone[:used], atol=1e-3)  # so that the comparison means something
    assert torch.isfinite(packed).all()


def test_right_padding_needs_no_mask(small_llama: torch.nn.Module) -> None:
    row = TruncatedRows(store([[4, 5, 6]]), 8).row(0)
    batch = collate([row], 8, pad_id=0)
    with torch.no_grad():
        padded = small_llama(input_ids=batch["input_ids"]).logits[0, :3]
        alone = small_llama(input_ids=torch.tensor([[4, 5, 6]])).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
