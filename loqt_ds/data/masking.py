"""Masked language modelling: rows of text with some tokens hidden, which the model is to predict.

As in BERT (Devlin et al., arXiv 1810.04805, section 3.1 and appendix A.1): of a row's tokens 15 % are predicted, of
which 80 % are replaced by the mask token, 10 % by a random token, and 10 % stay. It is 15 % of each row, rounded, and
at least one token. End-of-text and other special tokens are neither hidden nor put in.

Rows are documents joined and cut, as a causal language model's (`packing`), between the tokenizer's [CLS] and [SEP]
where it has them: the full sentences of RoBERTa (Liu et al., arXiv 1907.11692, section 4.2), without BERT's pairs. What
is hidden in a row is a function of (seed, place of the row in the run), another one in every epoch, so that a run that
goes on hides the same; in held-out rows it is a function of the row's place alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loqt_ds.data.batches import HeldOutRows, Sequence
from loqt_ds.data.errors import DataError
from loqt_ds.data.packing import IGNORED, Row, collate
from loqt_ds.data.tokenizer import Tokenizer

SHARE = 0.15  # of a row's tokens, predicted
MASKED, RANDOM = 0.8, 0.1  # of those
HELD_OUT_SEED = -1  # no run has it
_WHOLE = float(1 << 64)


@dataclass(frozen=True)
class Masker:
    """What is hidden, and by which tokens.

    mask_id: the mask token. begin, end: special tokens around a row (both empty where the tokenizer has none).
    ordinary: (n,) ids of tokens that may be hidden, and put in at random; all others are special.
    """

    mask_id: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    ordinary: NDArray[np.int64]

    @property
    def num_around(self) -> int:
        """Special tokens around a row."""
        return len(self.begin) + len(self.end)

    @cached_property
    def _is_ordinary(self) -> NDArray[np.bool_]:
        table = np.zeros(int(self.ordinary.max()) + 2, dtype=bool)  # the last one for all larger ids
        table[self.ordinary] = True
        return table

    def masked(self, row: Row, *key: int) -> Row:
        """The row with tokens hidden, and its targets, -100 where nothing is predicted; drawn from `key` alone."""
        tokens = np.concatenate([self.begin, row.inputs, self.end]).astype(np.int64)
        places = np.flatnonzero(self._is_ordinary[np.minimum(tokens, len(self._is_ordinary) - 1)])
        count = min(len(places), max(1, round(SHARE * len(places))))
        # Raw bits, which are the same in every version of numpy.
        digest = blake2b(repr(key).encode(), digest_size=16, person=b"loqt-mask").digest()
        bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(len(places) + 2 * count)
        order, how, which = np.split(bits, [len(places), len(places) + count])
        chosen = places[np.argsort(order, kind="stable")[:count]]
        inputs, targets = tokens.copy(), np.full(len(tokens), IGNORED, dtype=np.int64)
        targets[chosen] = tokens[chosen]
        share = how / _WHOLE
        inputs[chosen[share < MASKED]] = self.mask_id
        at_random = (share >= MASKED) & (share < MASKED + RANDOM)
        inputs[chosen[at_random]] = self.ordinary[which[at_random] % np.uint64(len(self.ordinary))]
        return Row(inputs, targets, np.zeros(len(tokens), dtype=np.int64))


def masker_of(tokenizer: Tokenizer) -> Masker:
    """Raises DataError for a tokenizer without a mask token."""
    hf = tokenizer.hf
    if hf.mask_token_id is None:
        raise DataError(
            f"data.tokenizer={tokenizer.name} has no mask token (mask_token), which model.task=masked_lm needs; use an "
            f"encoder's tokenizer, such as BERT's, or data.tokenizer=null to have one trained"
        )
    around = hf.cls_token_id is not None and hf.sep_token_id is not None
    special = [*hf.all_special_ids, tokenizer.eot_id, tokenizer.pad_id]
    return Masker(
        int(hf.mask_token_id),
        (int(hf.cls_token_id),) if around else (),
        (int(hf.sep_token_id),) if around else (),
        np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int64), special),
    )


class MaskedSequence:
    """The training sequence (`batches.Sequence`) with tokens hidden by the place of a row in the run."""

    def __init__(self, sequence: Sequence, masker: Masker, *, seed: int) -> None:
        self._sequence, self._masker, self._seed = sequence, masker, seed
        self._rows_seen = 0

    def take(self, num_rows: int, first: int, num_wanted: int) -> list[Row]:
        rows = self._sequence.take(num_rows, first, num_wanted)
        begin = self._rows_seen + first
        self._rows_seen += num_rows
        return [self._masker.masked(row, self._seed, begin + place) for place, row in enumerate(rows)]

    def state_dict(self) -> dict[str, Any]:
        return {**self._sequence.state_dict(), "rows_masked": self._rows_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sequence.load_state_dict(state)
        self._rows_seen = int(state["rows_masked"])


class MaskedRows:
    """Held-out rows, in which always the same tokens are hidden."""

    def __init__(self, rows: HeldOutRows, masker: Masker) -> None:
        self._rows, self._masker = rows, masker

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        return self._masker.masked(self._rows.row(index), HELD_OUT_SEED, index)

    def num_targets(self, index: int) -> int:
        return int((self.row(index).targets != IGNORED).sum())

    @cached_property
    def num_predicted(self) -> int:
        return sum(map(self.num_targets, range(len(self))))


def collate_masked(rows: list[Row], *, sequence_length: int, pad_id: int) -> dict[str, Tensor]:
    """A batch: input_ids and targets (b, s) int64, not shifted, and attention_mask (b, s) int64, 0 at padding."""
    batch = collate(rows, sequence_length, pad_id)
    mask = torch.zeros_like(batch["input_ids"])
    for index, row in enumerate(rows):
        mask[index, : len(row.inputs)] = 1
    return batch | {"attention_mask": mask}
