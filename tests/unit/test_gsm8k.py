"""Exact match of final numbers, and the generated answers it is of."""

from __future__ import annotations

import random
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import VOCAB, as_ranks, llama_config
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from loqt_ds.data import DataError
from loqt_ds.data.instruction import Question
from loqt_ds.generation import answer_greedily, left_padded
from loqt_ds.gsm8k import ExactMatch, check_references, final_number, is_exact_match
from loqt_ds.ranks import ALONE

EOT, PAD, CPU = 2, 0, torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3+4=7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### -5", "-5"),
        ("#### − 5", "-5"),
        ("#### +5.", "5"),
        ("#### $18.00", "18"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### .5", "0.5"),
        ("####72", "72"),
        ("#### 10 dollars, not 12", "10"),
        ("#### The answer is 4.", "4"),
        ("#### 1\nno, wait\n#### 2", "2"),
        ("#### 80%", "80"),
        ("#### 1,2345", "12345"),  # whole, however it is grouped, and not its beginning
        ("#### 1,234,56", "123456"),
        ("#### 7, not 12,", "7"),
        ("#### \u20135", "-5"),
        ("#### 1e3", "1000"),
        ("#### 2.5E-1", "0.25"),
        ("#### 5 eggs, 5e of them", "5"),
        ("#### +-5", "-5"),
        ("#### -¥5", "-5"),
        ("#### -₹1,234", "-1234"),
        (r"#### -\$18", "-18"),
        ("#### -USD 5", "-5"),
        ("#### -US$5", "-5"),
        ("#### the post-TAX 5", "5"),  # a word's hyphen
        ("#### \u20115", "-5"),  # a hyphen that breaks no line
        ("#### \uff0d5", "-5"),
        ("#### \u20145", "-5"),
        ("#### so \u2014 5", "5"),  # punctuation
        ("#### so\u20145", "5"),
        ("#### 3 - 5", "3"),
        ("#### $3\u2013$5", "3"),
        ("#### 1 234", "1234"),
        ("#### -1\xa0234\u202f567.50 km", "-1234567.5"),
        ("#### 1'234", "1234"),
        ("#### 12\u2019345, and", "12345"),
        ("#### 1 23", "1"),  # no group
        ("#### 1 2345", "1"),
        ("#### 1234 567", "1234"),
        ("#### 18\n\n200", "18"),
        ("#### -1234567890123456789012345678901", "-1234567890123456789012345678901"),
        ("7", None),
        ("### 7", None),
        ("#### none", None),
        ("7 ####", None),
        ("", None),
    ],
)
def test_final_numbers(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_written_and_read_back() -> None:
    draw = random.Random(0)
    for _ in range(300):
        value = Decimal(draw.randint(-(10**7), 10**7)) / 10 ** draw.randint(0, 3)
        before, group, after = draw.choice(["", " ", "$"]), draw.choice([",", ""]), draw.choice(["", ".", " kg"])
        text = f"5 #### 6\n#### {before}{value:{group}f}{after}"
        assert final_number(text) == value, text
        assert is_exact_match(text, f"#### {value:f}") and not is_exact_match(text, f"#### {value + 1:f}")
    assert not is_exact_match("no number", "no number")


# ---------------------------------------------------------------- answers


def tiny(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "llama":
        return LlamaForCausalLM(llama_config(num_hidden_layers=2)).double()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ).double()


@torch.no_grad()
def one_by_one(model: Any, prompt: list[int], num: int) -> list[int]:
    """Without a cache, padding, an end, or `generate`."""
    tokens = list(prompt)
    for _ in range(num):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batched_answers_are_those_of_each_prompt_alone(kind: str) -> None:
    model, draw, ticks = tiny(kind).eval(), random.Random(1), []
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 17))] for _ in range(7)]
    endless = [one_by_one(model, prompt, 9) for prompt in prompts]
    eot = endless[0][4]  # some answers end early by it, others not
    expected = [answer[: answer.index(eot)] if eot in answer else answer for answer in endless]
    assert len(expected[0]) < 9
    model.train()
    model.generation_config.update(do_sample=True, temperature=0.3, max_length=3, repetition_penalty=9.0)  # not asked
    answers = answer_greedily(
        model, prompts, max_new_tokens=9, batch_size=3, eot_id=eot, pad_id=eot, device=CPU, tick=ticks.append
    )
    assert answers == expected and ticks == [3, 6, 7] and model.training


def test_left_padding() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]], PAD, CPU)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_share_of_matches_is_the_same_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts without room for an answer count, as wrong."""
    questions = [Question([number], f"#### {number}", "") for number in range(3, 13)]
    questions.append(Question([3] * 60, "#### 3", ""))
    asked: list[int] = []

    def answer(model: Any, prompts: Any, **_: Any) -> Any:
        asked.extend(len(prompt) for prompt in prompts)
        return [[prompt[0] + prompt[0] % 2] for prompt in prompts]  # right for even ones

    monkeypatch.setattr("loqt_ds.gsm8k.answer_greedily", answer)
    tokenizer: Any = SimpleNamespace(eot_id=EOT, pad_id=PAD, decode=lambda ids: f"#### {ids[0]}")
    score = ExactMatch(questions, tokenizer, CPU, 4, 8, 64)
    assert score.num_without_room == 1
    assert score(None, ALONE) == {"exact_match": 5 / 11} and asked == [1] * 10
    assert as_ranks(3, lambda ranks: score(None, ranks)) == [{"exact_match": 5 / 11}] * 3


def test_references_without_a_number_are_refused() -> None:
    good = Question([3], "#### 3", "f line 1")
    check_references([good])
    with pytest.raises(DataError, match=r"1 of 2 held-out responses have no number after ####, the first f line 2"):
        check_references([good, Question([3], "three", "f line 2")])
