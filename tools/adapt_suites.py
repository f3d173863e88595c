"""What `tools/adapt.py` compares: methods that go on from one pretrained model, on another text.

A suite is one of `compare_suites`, with what is particular to going on: where all runs start from, whether embeddings,
norms and head are trained, on what else they are evaluated. The model that they start from is a run as well, `BASE`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compare_suites import DataSet, Plan, Rates, Suite

from loqt_ds.data.files import resolve_paths
from loqt_ds.data.tables import TABLES

SHAPE, RANK = "llama_2m", 32
VOCABULARY = 4096
TOKENIZER_CHARACTERS = 4_000_000  # of each language
FINAL_TOKENS = 65536  # that a model is judged by; the first of them, while it is trained
COMMON = {"eval_tokens": 24576, "final_tokens": FINAL_TOKENS, "dtype": "fp32", "device": "cpu", "rows": 8}

BASE = Suite(
    "base",
    ((SHAPE, RANK),),
    ("adamw",),
    COMMON | {"steps": 1500, "interval": 100, "eval_every": 250, "keep_model": True},
    seeds=1,
    vocabulary=VOCABULARY,
    jobs=1,
)

ONCE = "+loqt.schedule=never"
PLAIN = "+optim.name=adamw"  # 32-bit moments for all: LoQT's 8-bit ones are no part of these comparisons
CONTROL = "+loqt.compensation_steps=0"
AS_MANY = f"loqt:12{PLAIN}{ONCE}"  # B alone: about as many parameters as A and B of the other methods' rank 8

# Peak learning rates: (of the matrices or what takes their place, of embeddings, norms and head).
ICELANDIC_RATES: Rates = {
    "adamw": (1e-3, 1e-2),
    "galore": (5e-3, 1e-2),
    "lora": (2e-3, 1e-2),
    "loqt": (5e-3, 1e-2),
    "loqtnq": (5e-3, 1e-2),
}
# Nothing but the adapters is trained; a search goes on from these.
NOMERGE_RATES: Rates = {
    **dict.fromkeys(("lora", "qlora"), (8e-3, 2e-3)),
    **dict.fromkeys(("loftq", "lqlora", "apiq"), (1.2e-2, 1e-3)),
    "loqt": (3.2e-2, 2e-3),
}

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "icelandic",
            ((SHAPE, RANK),),
            (
                "adamw",
                "galore:{rank}",
                "lora:{rank}",
                f"loqtnq:{{rank}}{PLAIN}{ONCE}",
                f"loqt:{{rank}}{PLAIN}{ONCE}",
                f"loqtnq:{{rank}}{PLAIN}",
                f"loqt:{{rank}}{PLAIN}",
            ),
            COMMON | {"steps": 240, "interval": 40, "eval_every": 120},
            seeds=1,
            vocabulary=VOCABULARY,
            jobs=1,
            rates=ICELANDIC_RATES,
        ),
        Suite(
            "nomerge",
            ((SHAPE, 8),),
            (
                f"loqt:{{rank}}{PLAIN}{ONCE}",
                "lora:{rank}",
                "qlora:{rank}",
                "loftq:{rank}",
                "lqlora:{rank}",
                "apiq:{rank}",
                f"loqt:{{rank}}{PLAIN}{ONCE}{CONTROL}",
                AS_MANY,
            ),
            COMMON
            | {"steps": 120, "interval": 40, "eval_every": 60, "full_rank": False}
            | {"eval_tokens": 12288, "final_tokens": 12288}
            | {"rows": 4, "length": 512},  # at 256 almost half of the examples would be too long
            seeds=3,
            search=(1.0, 0.5, 2.0, 0.25),
            vocabulary=VOCABULARY,
            jobs=1,
            rates=NOMERGE_RATES,
        ),
    )
}
# What a row of a report is called: by a contender's name, its method with its options, or its method alone.
LABELS = {
    "icelandic": {
        "adamw": "full",
        "galore": "GaLore",
        "lora": "LoRA",
        "loqtnq": "LoQT-nq, merging",
        "loqt": "LoQT, merging",
        f"loqtnq{PLAIN}{ONCE}": "LoQT-nq, one initialization",
        f"loqt{PLAIN}{ONCE}": "LoQT, one initialization",
    },
    "nomerge": {
        "lora": "LoRA (dense base)",
        "qlora": "QLoRA",
        "loftq": "LoftQ",
        "lqlora": "LQ-LoRA",
        "apiq": "ApiQ",
        f"loqt{PLAIN}{ONCE}": "LoQT, no merge",
        f"loqt{PLAIN}{ONCE}{CONTROL}": "LoQT, no merge, no compensation",
        AS_MANY: "LoQT, no merge, rank 12",
    },
}


def label(suite: str, contender: str) -> str:
    """A contender's name in a report."""
    method, _, options = contender.partition("+")
    family = method.partition(":")[0]
    names = LABELS[suite]
    found = (names[name] for name in (contender, f"{family}+{options}", family) if name in names)
    return next(found, contender)


def gsm8k(paths: str) -> DataSet:
    """TRAIN[,TRAIN...]:VALIDATION as questions and answers, the loss on the answers alone."""
    train, colon, held_out = paths.partition(":")
    if not colon:
        raise ValueError(f"--gsm8k {paths}: give TRAIN:VALIDATION, such as train.jsonl.gz:test.jsonl.gz")
    options = ["data.format=instruction", "data.prompt_field=question", "data.response_field=answer"]
    options.append('data.prompt_template="Question: {prompt}\\nAnswer: "')
    for name, given in (("path", train), ("validation_path", held_out)):
        found = resolve_paths(given.split(","), f"--gsm8k {given}: path", print, TABLES)
        options.append(f"data.{name}={json.dumps([str(path.resolve()) for path in found])}")
    return DataSet("gsm8k", tuple(options))


def with_tokenizer(data: DataSet, tokenizer: Path) -> DataSet:
    """The same text, read with a tokenizer's directory."""
    return replace(data, options=(*data.options, f"data.tokenizer={tokenizer}"))


def base_plan(suite: Suite, first: DataSet, second: DataSet) -> Plan:
    """The run that makes the model: pretrained on the first text, evaluated on both. suite: `BASE`, or what a command
    line makes of it."""
    return Plan(replace(suite, spec={**suite.spec, "also": second.options}), [first])


def plan(suite: Suite, start: Path, first: DataSet, second: DataSet) -> Plan:
    """Runs that go on from a checkpoint on the second text; where all is trained, they may forget of the first."""
    spec = {**suite.spec, "start": str(start)}
    if suite.spec.get("full_rank", True):
        spec["also"] = first.options
    return Plan(replace(suite, spec=spec), [second])


def scaled(suite: Suite, steps: int | None) -> Suite:
    """With another number of steps, intervals in proportion."""
    if steps is None:
        return suite
    spec = dict(suite.spec)
    for name in ("interval", "eval_every"):
        spec[name] = max(1, round(spec[name] * steps / suite.steps))
    return replace(suite, spec=spec | {"steps": steps})


def contenders_of(suite: Suite) -> Sequence[str]:
    return suite.contenders(suite.scales[0][1])
