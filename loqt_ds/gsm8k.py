"""Exact match, as GSM8K is scored: the number after the last `####` of an answer is that of the reference.

(Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168, whose data close each solution with
`#### 1,234`.) Numbers are compared as numbers: 1,234 is 1234.00, $5 is 5, a full stop at the end is none of it. An
answer without `####`, or without a number after it, is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch

from loqt_ds.data import DataError, Tokenizer
from loqt_ds.data.instruction import Question
from loqt_ds.evaluation import Tick
from loqt_ds.generation import answer_greedily
from loqt_ds.ranks import Ranks

MARK = "####"
# Hyphens, minus and plus, also full-width and small ones, the en dash; the em dash only where no word is before it and
# no space behind it: there it is punctuation.
_SIGN = r"[-+\u2010-\u2013\u2212\ufe62\ufe63\uff0b\uff0d]"
_SIGNS = rf"((?:{_SIGN}|(?<!\w)(?<!\w\s)\u2014(?=\S))*+)"
# A currency, after a sign also in letters: -USD 5, -US$5; what follows a word's hyphen is a word.
_CODE = rf"(?:(?<={_SIGN})(?<!\w{_SIGN})(?:[A-Z]{{3}}\b|[A-Z]{{1,2}}(?=\$))\s*)?"
_CURRENCY = rf"{_CODE}(?:\\?[$\xa2-\xa5\u20a0-\u20cf\uff04\uffe5]\s*)?"
# Digits with commas anywhere, or in groups of three with spaces or apostrophes between them.
_DIGITS = r"(?:[1-9]\d{0,2}(?:[ \xa0\u2009\u202f'\u2019]\d{3})+(?!,?\d)|\d[\d,]*)"
_POWER = r"(?:[eE][-+]?\d{1,3}(?![\d.]))?"
_NUMBER = re.compile(rf"{_SIGNS}\s*{_CURRENCY}{_SIGNS}((?:{_DIGITS}(?:\.\d+)?|\.\d+){_POWER})")
_PLUS = "+\ufe62\uff0b"


def final_number(text: str) -> Decimal | None:
    """The first number after the last `####`, whole: commas are dropped wherever they are, spaces and apostrophes
    between groups of three digits; None where there is none."""
    _, mark, after = text.rpartition(MARK)
    found = _NUMBER.search(re.sub(r"\s{3,}", "  ", after)) if mark else None
    if found is None:
        return None
    *signs, digits = found.groups()
    number = Decimal(re.sub(r"[,'\u2019\s]", "", digits))
    num_minus = sum(sign not in _PLUS for sign in "".join(signs))
    return number.copy_negate() if num_minus % 2 else number  # and not -number, which rounds


def is_exact_match(answer: str, reference: str) -> bool:
    """Whether the answer has the reference's final number."""
    wanted = final_number(reference)
    return wanted is not None and final_number(answer) == wanted


@dataclass(frozen=True)
class ExactMatch:
    """Answers questions and counts the exact matches; what `Evaluator.answers` is.

    questions: those that are answered. max_length: tokens that the model can see; a prompt that leaves no room for an
    answer counts as answered wrongly.
    """

    questions: Sequence[Question]
    tokenizer: Tokenizer
    device: torch.device
    batch_size: int
    max_new_tokens: int
    max_length: int | None = None

    def __call__(self, model: Any, ranks: Ranks, tick: Tick | None = None) -> dict[str, float]:
        """{"exact_match": share of the questions}, the same on all ranks. Collective: each answers a part."""
        own = [question for question in self.questions[ranks.rank :: ranks.world_size] if self._has_room(question)]
        answers = answer_greedily(
            model,
            [question.prompt for question in own],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            eot_id=self.tokenizer.eot_id,
            pad_id=self.tokenizer.pad_id,
            device=self.device,
            tick=None if tick is None else self._tick(tick, len(own)),
        )
        texts = map(self.tokenizer.decode, answers)
        own_right = sum(is_exact_match(text, question.response) for text, question in zip(texts, own, strict=True))
        (num_right,) = ranks.sum_numbers(own_right)
        return {"exact_match": num_right / len(self.questions)}

    def _tick(self, tick: Tick, num_own: int) -> Callable[[int], None]:
        return lambda done: tick(done, num_own)

    def _has_room(self, question: Question) -> bool:
        return self.max_length is None or len(question.prompt) + self.max_new_tokens <= self.max_length

    @property
    def num_without_room(self) -> int:
        return sum(not self._has_room(question) for question in self.questions)


def check_references(questions: Sequence[Question]) -> None:
    """Raises DataError if there is nothing to compare with: a response has no final number."""
    without = [question for question in questions if final_number(question.response) is None]
    if without:
        raise DataError(
            f"eval.metric=exact_match: {len(without)} of {len(questions)} held-out responses have no number after "
            f"{MARK}, the first {without[0].where}; correct them, or use eval.metric=loss"
        )
