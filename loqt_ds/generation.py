"""Greedy answers to many prompts: batches padded at the left, keys and values kept, a prompt's answer ended at
end-of-text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (b, s) int64: every prompt ends where its answer begins."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


@contextmanager
def only_what_is_asked(model: Any) -> Iterator[None]:
    """Without the model's own `generation_config`, which transformers has a say in whatever a call leaves open: a chat
    model's samples, penalizes repetitions, or searches several beams."""
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@torch.no_grad()
def answer_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    eot_id: int,
    pad_id: int,
    device: torch.device,
    tick: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most probable continuation of each prompt, token by token, without its end-of-text.

    The longest prompts come first, so that a batch has little padding and one that does not fit memory fails at once.

    Args:
        model: of transformers, on `device`; evaluated in eval mode, and put back into the one it was in.
        prompts: token ids, none of them empty.
        tick: told how many prompts are answered so far.
    """
    from transformers import GenerationConfig

    options = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eot_id, pad_token_id=pad_id, use_cache=True
    )
    longest_first = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    answers: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            chosen = longest_first[start : start + batch_size]
            ids, mask = left_padded([prompts[index] for index in chosen], pad_id, device)
            with only_what_is_asked(model):
                made = model.generate(ids, attention_mask=mask, generation_config=options)[:, ids.shape[1] :].tolist()
            for index, answer in zip(chosen, made, strict=True):
                # pad_id may be eot_id; both stand after the end only.
                answers[index] = answer[: answer.index(eot_id)] if eot_id in answer else answer
            if tick is not None:
                tick(start + len(chosen))
    finally:
        model.train(was_training)
    return answers
