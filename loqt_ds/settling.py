"""What a run settles once its data are there: how many steps its epochs are, how it evaluates, and how texts end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.config import Config, check_steps
from loqt_ds.data import DataBundle, Tokenizer
from loqt_ds.evaluation import Evaluator
from loqt_ds.export.writer import generation_defaults, read_generation, with_end
from loqt_ds.gsm8k import ExactMatch, check_references
from loqt_ds.method.description import num_positions

Say = Callable[[str], None]


def resolve_steps(
    config: Config, data: DataBundle, world_size: int, checkpoint: Checkpoint | None, *, say: Say
) -> Config:
    """The configuration with epochs as steps: train.max_steps instead of train.epochs, eval.every as a number."""
    train, written = config.train, config
    if train.epochs is None and config.eval.every != "epoch":
        return config
    num_rows = int(data.summary["num_rows"])
    rows_of_step = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    if train.epochs is not None:
        # Of a decimal number as it was written: .1 of 10 rows is one row, not a row and a bit.
        num_steps = max(1, math.ceil(Fraction(str(train.epochs)) * num_rows / rows_of_step))
        say(f"train.epochs={train.epochs:g}: {num_steps} steps of {rows_of_step} of the {num_rows} rows")
        before = num_steps if checkpoint is None else checkpoint.metadata["config"]["train"]["max_steps"]
        if before != num_steps:
            say(f"{before} steps were planned and are {num_steps}: the learning rate follows the new length")
        config = dataclasses.replace(config, train=dataclasses.replace(train, max_steps=num_steps, epochs=None))
    if config.eval.every == "epoch":
        every = -(-num_rows // rows_of_step)
        say(f"eval.every=epoch: every {every} steps")
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=every))
    check_steps(config, written)
    return config


def resolve_generation(config: Config, tokenizer: Tokenizer, model_config: Any) -> dict[str, Any]:
    """What `generation_config.json` of an export says: what the source checkpoint's does, with the token that ended
    documents and responses in training among those that end a text. Raises ExportError where it cannot be read."""
    generates = config.model.task == "causal_lm"
    source = read_generation(Path(config.model.path)) if generates and config.model.path is not None else None
    return with_end(generation_defaults(model_config) if source is None else source, tokenizer.eot_id)


def build_evaluator(
    config: Config, tokenizer: Tokenizer, data: DataBundle, model_config: Any, device: torch.device, *, say: Say
) -> Evaluator:
    """How this run evaluates. Raises DataError where held-out responses cannot be what eval.metric asks for."""
    options = config.eval
    batch_size = options.micro_batch_size or config.train.micro_batch_size
    answers = None
    if options.metric == "exact_match":
        check_references(data.questions)
        answers = ExactMatch(
            data.questions[: options.max_examples],
            tokenizer,
            device,
            batch_size,
            options.max_new_tokens,
            num_positions(model_config),
        )
        say(f"eval.metric=exact_match: {len(answers.questions)} of {len(data.questions)} held-out prompts are answered")
        if answers.num_without_room:
            say(
                f"{answers.num_without_room} of them leave no room for {options.max_new_tokens} tokens "
                f"(eval.max_new_tokens) in the model's {answers.max_length}: they count as answered wrongly"
            )
    return Evaluator(
        data.validation, batch_size, device, options.max_tokens, config.model.task, scorer=data.scorer, answers=answers
    )
