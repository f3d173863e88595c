"""Going on from a pretrained model: in another language, and without merging. One base, one evaluator, one report.

    python tools/adapt.py --suite icelandic \\
        --english ../shared/data/en/enwiki2014/enwiki2014_train_00.jsonl.gz:../shared/data/en/enwiki2014/enwiki2014_valid.jsonl.gz \\
        --icelandic ../shared/data/is/iceec_train.jsonl.gz:../shared/data/is/iceec_valid.jsonl.gz
    python tools/adapt.py --suite nomerge --english ... --icelandic ... \\
        --gsm8k ../shared/data/gsm8k/train.jsonl.gz:../shared/data/gsm8k/test.jsonl.gz

Both suites begin with the same model: a small Llama, pretrained in full rank on English, with a tokenizer of both
languages. Then

    icelandic   continued pretraining: full rank, GaLore, LoRA, LoQT-nq and LoQT with one initialization and with merges;
                held-out perplexity in Icelandic before, during and after, and what is forgotten of English
    nomerge     adapters alone, at one rank, on the answers of GSM8K: LoRA over the dense model, and QLoRA, LoftQ, LQ-LoRA,
                ApiQ and LoQT without merging over the same model in NF4; a search of the learning rate for each, three
                seeds

(`tools/adapt_suites.py`). Any other two languages will do as well. Runs go to --work as `tools/compare.py` has them (its
runner is this one's, too): what is over is not repeated, and the same command goes on where it was stopped; --seeds,
--steps and --search change what is run, --report only writes REPORT.md, results.json and plots to --output. The model
itself, a checkpoint of transformers, is linked as --work/base: `python -m loqt_ds.train --config continue_small
model.path=runs/adapt/base` goes on from it in the product's own run. The others' methods are packages:
pip install -e '.[compare]'.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import adapt_report
from adapt_suites import (
    BASE,
    SUITES,
    TOKENIZER_CHARACTERS,
    VOCABULARY,
    base_plan,
    contenders_of,
    gsm8k,
    plan,
    scaled,
    with_tokenizer,
)
from compare import LEAST_MINUTES, REPOSITORY, Progress, Runner, directory_of, forget_failed, known_results, locked
from compare_run import Spec, open_data
from compare_suites import DataSet, Plan, Suite, check_all, data_set, portable

from loqt_ds.config import load_config
from loqt_ds.data.cache import cache_directory
from loqt_ds.data.corpus import Corpus
from loqt_ds.data.tokenizer import SentencePieceTokenizer, num_workers, train_sentencepiece
from loqt_ds.stopping import Terminated, sigterm_raises
from loqt_ds.train import set_environment

SEARCH = (1.0, 0.5, 2.0)


# ---------------------------------------------------------------- data


def beginning(data: DataSet, num_characters: int) -> Iterator[str]:
    """The first training documents of a data set."""
    config = load_config(None, ["model.shape=llama_2m", *data.options])
    corpus = Corpus(config.data, print)
    split = corpus.survey(cache_directory(config.data.cache_dir), print)
    for _, document in corpus.documents("train", split):
        yield document.text
        num_characters -= len(document.text)
        if num_characters <= 0:
            return


def shared_tokenizer(work: Path, texts: Sequence[DataSet]) -> Path:
    """A directory with a tokenizer trained on as many characters of each text."""
    told: list[Any] = [[portable(option) for option in data.options] for data in texts]
    told.append([VOCABULARY, TOKENIZER_CHARACTERS])
    directory = work / f"tokenizer-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:10]}"
    if not directory.is_dir():
        print(
            f"training a tokenizer of {VOCABULARY:,} pieces on {' and '.join(data.name for data in texts)}", flush=True
        )
        documents = list(chain.from_iterable(beginning(data, TOKENIZER_CHARACTERS) for data in texts))
        model = train_sentencepiece(documents, VOCABULARY, workers=num_workers(None))
        aside = work / f".tokenizer.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        SentencePieceTokenizer(model, "shared", trained_here=True).save(aside, texts=documents[:5])
        aside.rename(directory)
    return directory


def prepare(made: Plan) -> None:
    """Tokenizes what the runs of a plan read. Raises ValueError for data that they could not use."""
    for spec in {row.spec.data: row.spec for row in made.rows({}) if row.spec is not None}.values():
        for options in filter(None, (spec.data, spec.also)):
            open_data(spec, options)


# ---------------------------------------------------------------- runs


def base_spec(made: Plan) -> Spec:
    """Of the one run that makes the model."""
    (row,) = made.rows({})
    assert row.spec is not None
    return row.spec


def link_base(work: Path, model: Path) -> None:
    """--work/base points to the model, for what else starts from it."""
    link, aside = work / "base", work / f".base.{os.getpid()}"
    aside.symlink_to(model.relative_to(work))
    aside.replace(link)


class Adaptation:
    """What one command does: the base, then what goes on from it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work, self.suite, self.base = options.work, chosen_suite(options), scaled(BASE, options.base_steps)
        self.texts = [data_set(f"{name}={getattr(options, name)}") for name in ("english", "icelandic")]
        self.task = self.texts[1] if options.gsm8k is None else gsm8k(options.gsm8k)
        self.until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        self.again = options.again

    def plans(self) -> tuple[Plan, Plan | None]:
        """(of the base, of what goes on from it, if it is there). Trains the tokenizer, where there is none."""
        tokenizer = shared_tokenizer(self.work, self.texts)
        first, second, task = (with_tokenizer(data, tokenizer) for data in (*self.texts, self.task))
        of_base = base_plan(self.base, first, second)
        model = directory_of(self.work, base_spec(of_base)) / "model"
        if not model.is_dir():
            return of_base, None
        link_base(self.work, model)
        return of_base, plan(self.suite, model, first, task)

    def run(self) -> bool:
        """Whether all runs are over."""
        with locked(self.work) as lock:
            for number in range(2):
                made = self.plans()[number]
                if made is None:
                    print("there is no base to go on from; see above, and --again", file=sys.stderr)
                    return False
                check_all(made.suite)
                if self.again:
                    forget_failed(self.work, made)
                prepare(made)
                runner = Runner(made, self.work, lock=lock, until=self.until, progress=Progress(sys.stdout))
                if not runner.run():
                    return False
        return True

    def report(self, output: Path, command: Sequence[str]) -> bool:
        """Whether there was something to report."""
        of_base, made = self.plans()
        base = known_results(self.work, of_base)
        results = {} if made is None else known_results(self.work, made)
        if made is None or not results:
            return False
        (of_model,) = base.values()
        adapt_report.write(made, results, of_model, output, command=command)
        return True


# ---------------------------------------------------------------- the command


def chosen_suite(options: argparse.Namespace) -> Suite:
    """The suite with what the command line says otherwise. Raises ValueError for what makes no sense."""
    for name in ("seeds", "steps", "base_steps", "jobs", "minutes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a positive number")
    if (options.suite == "nomerge") != (options.gsm8k is not None):
        told = "needs --gsm8k, the task" if options.gsm8k is None else "reads no --gsm8k; leave it out"
        raise ValueError(f"--suite {options.suite} {told}")
    if options.minutes is not None and options.minutes < LEAST_MINUTES:
        raise ValueError(f"--minutes {options.minutes:g}: give at least {LEAST_MINUTES:g}, to start and to pause")
    suite = scaled(SUITES[options.suite], options.steps)
    suite = replace(suite, seeds=options.seeds or suite.seeds, jobs=options.jobs or suite.jobs)
    if options.search is not None:
        suite = replace(suite, search=(suite.search or SEARCH) if options.search == "yes" else ())
    if options.methods is not None:
        unknown = set(options.methods) - set(contenders_of(suite))
        if unknown:
            raise ValueError(f"--methods {min(unknown)}: suite {suite.name} has {', '.join(contenders_of(suite))}")
        suite = replace(suite, methods=tuple(options.methods))
    return suite


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--suite", choices=list(SUITES), required=True, help="what is compared")
    texts = "TRAIN[,TRAIN...][:VALIDATION]"
    made.add_argument("--english", required=True, metavar=texts, help="text that the base is pretrained on")
    made.add_argument("--icelandic", required=True, metavar=texts, help="text of another language, to go on with")
    made.add_argument("--gsm8k", metavar="TRAIN[,TRAIN...]:VALIDATION", help="questions and answers, for nomerge")
    made.add_argument("--methods", nargs="+", metavar="METHOD", help="some of the suite's, by their full names")
    made.add_argument("--seeds", type=int, help="how many, from 0 on")
    made.add_argument("--steps", type=int, help="of every run that goes on")
    made.add_argument("--base-steps", type=int, help=f"of pretraining (default: {BASE.steps:,})")
    made.add_argument("--search", choices=("yes", "no"), help="try multiples of the stored rates with seed 0")
    made.add_argument("--jobs", type=int, help="runs at a time (default: 1)")
    made.add_argument("--minutes", type=float, help=f"of this call, at least {LEAST_MINUTES:g}: runs pause then")
    made.add_argument("--work", type=Path, default=Path("runs/adapt"), help="where runs go (default: runs/adapt)")
    made.add_argument("--output", type=Path, help="of the report (default: benchmarks/results/continue_icelandic, or "
                      "benchmarks/results/nomerge)")  # fmt: skip
    made.add_argument("--again", action="store_true", help="repeat runs that failed")
    made.add_argument("--report", action="store_true", help="run nothing, report what there is")
    return made


OUTPUTS = {"icelandic": "continue_icelandic", "nomerge": "nomerge"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when all runs are over, 1 when some are not, 2 for a mistake in the command line."""
    set_environment()  # before the processes start
    options = parser().parse_args(arguments)
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    is_done, signum = True, 0
    try:
        adaptation = Adaptation(options)
        if not options.report:
            with sigterm_raises():
                try:
                    is_done = adaptation.run()
                except KeyboardInterrupt as stopped:
                    print("stopped; the same command goes on", flush=True)
                    signum = signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT
        output = options.output or REPOSITORY / f"benchmarks/results/{OUTPUTS[options.suite]}"
        if adaptation.report(output, sys.argv[1:] if arguments is None else arguments):
            print(output / "REPORT.md")
        else:
            print("no run is over yet: there is no report", file=sys.stderr)
            is_done = False
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 128 + signum if signum else int(not is_done)


if __name__ == "__main__":
    sys.exit(main())
