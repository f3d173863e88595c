"""What `tools/compare.py` compares: methods, shapes, learning rates, ablations; and which runs that makes, in order.

A suite is data. `rows` turns it, the data sets and the results so far into the rows of the report, each with the run
(`compare_run.Spec`) that it needs, most useful first. Runs that depend on a learning-rate search have none until that
search is over; equal runs of several rows are one run. `key` names a run's directory: the same for the same run, also
where the data lies elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import rivals
from compare_run import Spec, setup_of
from rivals import options_of, parse

from loqt_ds.config import Config, load_config
from loqt_ds.data.files import check_files, resolve_paths

Result = dict[str, Any]

STDLIB = "stdlib"  # the data set that every user has: Python's standard library
VALIDATION_FRACTION = 0.08  # of documents, where a data set names no files to validate on

# Peak learning rates: (of the adapted weights or what takes their place, of embeddings, norms and head).
Rates = Mapping[str, tuple[float, float]]
# Found by trying on Wikipedia with llama_2m (benchmarks/DEFAULTS.md has what was tried).
RATES: Rates = {
    "adamw": (2e-3, 4e-2),
    "adamw8bit": (2e-3, 4e-2),
    "galore": (1e-2, 4e-2),
    "qgalore": (1e-2, 4e-2),
    "apollo": (1e-2, 4e-2),
    "apollomini": (1e-2, 4e-2),
    "lora": (4e-3, 4e-2),
    "qlora": (4e-3, 4e-2),
    "loftq": (4e-3, 4e-2),
    "lqlora": (4e-3, 4e-2),
    "apiq": (4e-3, 4e-2),
    "relora": (4e-3, 4e-2),
    "loqt": (1e-2, 4e-2),
    "loqtnq": (1e-2, 4e-2),
}
# The published rates of the shapes that the papers train; the rest is RATES'.
PUBLISHED: Rates = {
    "adamw": (1e-3, 1e-3),
    "adamw8bit": (1e-3, 1e-3),
    "lora": (1e-3, 1e-3),
    "qlora": (1e-3, 1e-3),
    "loftq": (1e-3, 1e-3),
    "lqlora": (1e-3, 1e-3),
    "apiq": (1e-3, 1e-3),
    "relora": (1e-3, 1e-3),
    "galore": (1e-2, 1e-2),
    "qgalore": (1e-2, 1e-2),
    "apollo": (1e-2, 1e-2),
    "apollomini": (1e-2, 1e-2),
    "loqt": (1e-2, 1e-2),
    "loqtnq": (1e-2, 1e-2),
}
# A narrower model and more steps: embeddings, norms and head at the rate of the rest.
NARROW: Rates = {"adamw": (2e-3, 1e-2), "loqt": (1e-2, 1e-2), "loqtnq": (1e-2, 1e-2)}
RATES_OF_SHAPE: Mapping[str, Rates] = {"llama_60m": PUBLISHED, "llama_130m": PUBLISHED, "llama_340k": NARROW}


def family_of(method: str) -> str:
    """What a contender's name begins with; loqt8bit and loqtcard are LoQT."""
    return re.sub(r"^(loqtnq|loqt).*", r"\1", parse(method)[0])


def rates(method: str, shape: str, first: Rates | None = None) -> tuple[float, float]:
    """The rates of a method in the tables, of which `first` is asked first: its own, with its options, else those of
    its family.

    Raises ValueError for a method without any.
    """
    for table in (first or {}, RATES_OF_SHAPE.get(shape, {}), RATES):
        for name in (method, parse(method)[0], family_of(method)):
            if name in table:
                return table[name]
    raise ValueError(f"method {method!r} has no stored learning rate; there is one for {', '.join(RATES)}")


# The packages that methods are (the extra `compare`), by the names they are imported by.
PACKAGE_OF = {
    "galore": "galore_torch",
    "qgalore": "q_galore_torch",
    "apollo": "apollo_torch",
    "apollomini": "apollo_torch",
    **dict.fromkeys(("lora", "qlora", "loftq", "lqlora", "apiq", "relora"), "peft"),
}


def without_package(method: str) -> str | None:
    """The package that a method needs and that is not installed."""
    package = PACKAGE_OF.get(parse(method)[0])
    return package if package is not None and find_spec(package) is None else None


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class DataSet:
    """A name, and the options of a run that say what is read."""

    name: str
    options: tuple[str, ...] = ()


def data_set(text: str) -> DataSet:
    """NAME=TRAIN[,TRAIN...][:VALIDATION], or stdlib. Raises ValueError for what cannot be read (DataError is one)."""
    if text == STDLIB:
        return DataSet(STDLIB)
    name, equals, paths = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name == STDLIB:
        raise ValueError(
            f"--data {text}: give NAME=FILE[,FILE...][:VALIDATION_FILE] with a name of letters, digits, _ . or -, "
            f"such as c4=../data/c4/*.jsonl.gz; or {STDLIB} alone, Python's own source"
        )
    train, colon, held_out = paths.partition(":")
    options = [f"data.path={files(train, text)}"]
    if colon:
        options.append(f"data.validation_path={files(held_out, text)}")
    else:
        options.append(f"data.validation_fraction={VALIDATION_FRACTION}")
    return DataSet(name, tuple(options))


def files(paths: str, text: str) -> str:
    """The files that are named, separated by commas, as a list of absolute paths in JSON."""
    found = resolve_paths([part for part in paths.split(",") if part], f"--data {text}: path", say=print)
    check_files(found, "text", f"--data {text}: path")
    return json.dumps([str(path.resolve()) for path in found])


def data_sets(texts: Sequence[str], suite: Suite) -> list[DataSet]:
    """The data sets of a command line. Raises ValueError for names given twice, and where a suite needs more."""
    found = [data_set(text) for text in texts or [STDLIB]]
    names = [data.name for data in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--data: the name {twice[0]} is given twice; every data set needs a name of its own")
    if len(found) < suite.num_data:
        raise ValueError(
            f"--suite {suite.name} wants {suite.num_data} data sets and has {', '.join(names)}; give more, such as "
            f"--data c4=c4/*.jsonl.gz --data wiki=train.jsonl.gz:valid.jsonl.gz ({STDLIB} alone is Python's own source)"
        )
    return found


# ---------------------------------------------------------------- suites


@dataclass(frozen=True)
class Variant:
    """LoQT with other options, held against LoQT as it is shipped.

    group: what the variants of one table differ in. options: of a run, and candidates (`candidate.NAME=VALUE`).
    method: instead of LoQT. rank: as a factor on the suite's. changes: of other fields of `Spec`.
    """

    group: str
    label: str
    options: tuple[str, ...] = ()
    method: str = "loqt"
    rank: float = 1.0
    changes: Mapping[str, Any] = field(default_factory=dict)

    def contender(self, rank: int) -> str:
        """Its name; options that LoQT is trained with anyway are left out, so that this is trained once."""
        full = self.method if self.method in ("adamw", "adamw8bit") else f"{self.method}:{round(self.rank * rank)}"
        return "+".join([full, *(option for option in self.options if not is_shipped(option))])


MEMORY_SCALE = ("llama_60m", 128)


@dataclass(frozen=True)
class Suite:
    """What one command compares.

    scales: (shape, rank of all methods that have one). methods: contenders' names, with {rank} and {tenth} (of the
    steps) in them. search: factors on the stored rates that are tried with seed 0 on the first data set; none: the
    stored rates. variants_on: data sets that the variants are run on; None: all. memory: what is drawn as components of
    memory, and on which shape, with which rank. vocabulary: of the tokenizer that is trained on each data set;
    memory_vocabulary: of another one for the components of memory, of which embeddings and head are a good part.
    rates: of contenders by their names, or methods or families of them, where they are not the stored ones.
    """

    name: str
    scales: tuple[tuple[str, int], ...]
    methods: tuple[str, ...]
    spec: Mapping[str, Any]
    seeds: int
    search: tuple[float, ...] = ()
    variants: tuple[Variant, ...] = ()
    variants_on: int | None = None
    memory: tuple[Variant, ...] = ()
    memory_scale: tuple[str, int] = MEMORY_SCALE
    vocabulary: int = 4096
    memory_vocabulary: int = 32000
    num_data: int = 1
    jobs: int = 2
    rates: Rates = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return int(self.spec["steps"])

    def vocabulary_of(self, part: str) -> int:
        """Of the tokenizer for a row's part."""
        return self.memory_vocabulary if part == "memory" else self.vocabulary

    def contenders(self, rank: int) -> list[str]:
        told = {"{rank}": rank, "{tenth}": round(0.1 * self.steps)}
        return [re.sub("|".join(told), lambda found: str(told[found[0]]), method) for method in self.methods]


ALL_METHODS = (  # those first that say most
    "adamw",
    "loqt:{rank}",
    "qlora:{rank}",
    "loqtnq:{rank}",
    "adamw8bit",
    "galore:{rank}",
    "qgalore:{rank}",
    "apollo:{rank}",
    "apollomini",
    "lora:{rank}",
    "loftq:{rank}",
    "relora:{rank}",
    "relora:{rank}+start={tenth}",
)


def values(group: str, option: str, *of: str) -> list[Variant]:
    """A variant for each value of an option."""
    return [Variant(group, value, (f"{option}={value}",)) for value in of]


NEITHER = ("loqt.compensation_steps=0", "loqt.schedule=static")
MOMENTS = "Adam's moments of B at a re-initialization"
PAPER = "The paper's two ideas"  # whose table tells how much of the gap to no quantization each closes
FORMAT = "Format of W and P"
SUBSPACE = "Subspace P"
ABLATIONS = (
    Variant(PAPER, "neither", NEITHER),
    Variant(PAPER, "compensation", NEITHER[1:]),
    Variant(PAPER, "growing intervals", NEITHER[:1]),
    Variant(PAPER, "both"),
    Variant(PAPER, "no quantization", method="loqtnq"),
    *values("Iterations of compensation", "loqt.compensation_steps", "0", "1", "5"),
    *values("Quantization of P", "loqt.quantize_p", "nf4", "none"),
    *(Variant(FORMAT, v, (f"loqt.quantize_w={v}", f"loqt.quantize_p={v}")) for v in ("nf4", "fp4", "int4")),
    *values("Double quantization", "loqt.double_quant", "none", "w", "p", "both"),
    *values("Schedule of re-initializations", "loqt.schedule", "exponential", "static"),
    *(Variant("Rank", label, rank=rank) for label, rank in (("half", 0.5), ("as shipped", 1.0), ("twice", 2.0))),
    *values(MOMENTS, "loqt.optimizer_state", "keep", "reset", "project", "transport"),
    Variant(SUBSPACE, "exact", ("loqt.subspace=exact",)),
    Variant(SUBSPACE, "sketch", ("loqt.subspace=sketch",)),
    Variant(SUBSPACE, "sketch, Gaussian columns only", ("loqt.subspace=sketch", "candidate.sketch=gauss")),
    Variant(SUBSPACE, "sketch seeded from B's moment", ("loqt.subspace=sketch", "candidate.sketch=moment")),
    *values("Optimizer", "optim.name", "adamw8bit", "adamw"),
)

# Where 4-bit weights cost something, which they do in a small model that is trained for long.
WHAT_ROUNDING_LOSES = (
    *values("Error feedback", "candidate.error_feedback", "fp32"),
    *values("Scales of blocks", "candidate.absmax", "search"),
    *values("Stochastic rounding of W", "candidate.stochastic", "1"),
    *values("Compensation weighted by Fisher information", "candidate.fisher", "x"),
    Variant("Block", "32", ("loqt.quantize_w=none", "candidate.blocksize=32")),
)

# Clipping by the norm of all gradients is not possible in layer-wise updates.
LAYERWISE = ("optim.layerwise=true", "train.max_grad_norm=null", "train.max_grad_norm_per_parameter=1.0")
ADAM_32 = ("optim.name=adamw",)
COMPONENTS = "Components of memory"
MEMORY_COMPONENTS = (
    Variant(COMPONENTS, "full rank, AdamW", method="adamw"),
    Variant(COMPONENTS, "full rank, 8-bit Adam", method="adamw8bit"),
    Variant(COMPONENTS, "GaLore", method="galore"),
    Variant(COMPONENTS, "LoQT, AdamW", ADAM_32),
    Variant(COMPONENTS, "LoQT, 8-bit Adam", ("optim.name=adamw8bit",)),
    Variant(COMPONENTS, "LoQT, AdamW, layer-wise", (*ADAM_32, *LAYERWISE)),
    Variant(COMPONENTS, "LoQT, 8-bit Adam, layer-wise", ("optim.name=adamw8bit", *LAYERWISE)),
)
# Four steps without a warm-up, at a rate that spoils nothing: what is trained does not matter.
MEMORY_SPEC: Mapping[str, Any] = {
    "steps": 4,
    "interval": 2,
    "rows": 4,
    "lr": 1e-4,
    "lr_full_rank": 1e-4,
    "eval_every": 4,
    "eval_tokens": 1024,
    "final_tokens": 1024,
}

# What may become a default: tried on two data sets and with three seeds (benchmarks/DEFAULTS.md).
CANDIDATES = (
    *values(MOMENTS, "loqt.optimizer_state", "keep", "reset", "project", "transport"),
    *values("Steps between re-initializations", "loqt.interval", "10", "40"),
    *values("Learning rate of embeddings, norms and head", "optim.lr_full_rank", "0.016"),
    Variant("Rank", "twice", rank=2.0),
    *values("Error feedback", "candidate.error_feedback", "fp32"),
    *values("Scales of blocks", "candidate.absmax", "search"),
    *values("Stochastic rounding of W", "candidate.stochastic", "1"),
    *values("Compensation weighted by Fisher information", "candidate.fisher", "x"),
    *values("Steps behind the gradient of P", "candidate.denoise", "4"),
    *values("Vectors of P", "candidate.basis", "sample"),
    *values("P aligned with the one before", "candidate.align", "1"),
    Variant(MOMENTS, "second kept", ("loqt.optimizer_state=keep", "candidate.momentum=second")),
    Variant("Sketch", "moment", ("loqt.subspace=sketch", "candidate.sketch=moment")),
    Variant("Learning rate after a re-initialization", "from zero, 10 steps", ("optim.schedule=cosine_rewarmup",)),
    *values("Iterations of compensation", "loqt.compensation_steps", "0"),
)

SMALL = {"steps": 400, "interval": 40, "eval_every": 50}
ABLATION = Suite(
    "ablation",
    (("llama_340k", 16),),
    ("adamw", "loqt:{rank}", "loqtnq:{rank}"),
    {"steps": 2000, "interval": 20, "eval_every": 200},
    seeds=3,
    variants=tuple(variant for variant in ABLATIONS if variant.group == PAPER),
    vocabulary=1024,
)
SUITES = {
    suite.name: suite
    for suite in (
        Suite("small", (("llama_2m", 32),), ALL_METHODS, SMALL, seeds=1),
        Suite(
            "full",
            (("llama_7m", 64),),
            ALL_METHODS,
            {"steps": 1000, "interval": 50, "eval_every": 100},
            seeds=3,
            search=(1.0, 0.5, 2.0, 0.25),
            variants=ABLATIONS,
            variants_on=1,
            memory=MEMORY_COMPONENTS,
            num_data=2,
        ),
        Suite(
            "defaults",
            (("llama_2m", 32),),
            ("adamw", "loqt:{rank}", "loqtnq:{rank}"),
            {"steps": 200, "interval": 20, "eval_every": 50, "final_tokens": 131072},
            seeds=3,
            variants=CANDIDATES,
            num_data=2,
        ),
        ABLATION,
        replace(ABLATION, name="rounding", variants=WHAT_ROUNDING_LOSES),
        Suite("memory", (MEMORY_SCALE,), (), MEMORY_SPEC, 1, memory=MEMORY_COMPONENTS, vocabulary=32000),
        Suite(
            "gpu",
            (("llama_60m", 128), ("llama_130m", 256)),
            ALL_METHODS,
            {"steps": 2000, "interval": 100, "eval_every": 200, "rows": 64, "dtype": "bf16", "device": "cuda"}
            | {"eval_tokens": 131072},
            seeds=1,
            vocabulary=32000,
            jobs=1,
        ),
    )
}


@cache
def shipped(option: str) -> Any:
    """The value that an option of a run has where nobody gives it."""
    section, _, name = option.partition(".")
    return getattr(getattr(Config(), section), name)


def shipped_growth() -> float | None:
    """Of LoQT's intervals; None: they are all the same."""
    return float(shipped("loqt.growth")) if shipped("loqt.schedule") == "exponential" else None


@cache
def shipped_config() -> Config:
    """What LoQT without options is trained with here; its interval and rank are a suite's."""
    content: dict[str, Any] = {"growth": shipped_growth()}
    setup = setup_of(Spec("loqt:1", (), 1e-3, 1e-3, **content), 256)
    return setup.config(*setup.schedule(), f"optim.name={shipped('optim.name')}")


@cache
def is_shipped(option: str) -> bool:
    """Whether LoQT is trained with an option, NAME=VALUE, in any case: one of the method's own, that no suite sets, or
    the optimizer. What is set beside these (clipping, rates) is not as shipped. Candidates never are."""
    name, _, _ = option.partition("=")
    section, _, inner = name.partition(".")
    if (section != "loqt" and name != "optim.name") or inner in ("rank", "interval", "growth"):
        return False
    given = load_config(None, ["model.shape=llama_2m", option])
    return bool(getattr(getattr(given, section), inner) == getattr(getattr(shipped_config(), section), inner))


def with_optimizer(method: str) -> str:
    """LoQT's name with the shipped optimizer, where it names none; loqt8bit and loqtcard have theirs."""
    named = any(option.startswith("optim.name=") for option in options_of(method))
    if named or parse(method)[0] not in ("loqt", "loqtnq"):
        return method
    return f"{method}+optim.name={shipped('optim.name')}"


def check_all(suite: Suite) -> None:
    """Raises ValueError for a row of a suite that cannot be run: its method, options, rank or candidates."""
    plan = Plan(replace(suite, search=(), seeds=1, variants_on=1), [DataSet(STDLIB)])
    for row in {row.key: row for row in plan.rows({})}.values():
        assert row.spec is not None  # there is no search
        rivals.check(row.spec.method, setup_of(row.spec, suite.vocabulary_of(row.part)))


# ---------------------------------------------------------------- a run's name

# To be raised where a change of the code or of a package makes a family's earlier runs another method's.
VERSIONS: dict[str, int] = dict.fromkeys(RATES, 0)


def portable(option: str) -> str:
    """An option of the data with the names and sizes of files in place of their paths."""
    name, _, value = option.partition("=")
    if name == "data.tokenizer" and Path(value).is_dir():
        return f"{name}={[digest_of(file) for file in sorted(Path(value).glob('tokenizer*'))]}"
    if name not in ("data.path", "data.validation_path"):
        return option
    return f"{name}={[[Path(file).name, Path(file).stat().st_size] for file in json.loads(value)]}"


@cache
def digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache
def shipped_digest() -> dict[str, Any]:
    """What LoQT does where nobody says otherwise; options that are off are left out, so that a new one, off, changes
    nothing."""
    config = Config()
    both = {"loqt": asdict(config.loqt), "optim": asdict(config.optim)}
    return {f"{s}.{name}": v for s, section in both.items() for name, v in section.items() if v not in (None, False, 0)}


@cache
def key(spec: Spec) -> str:
    """The name of a run's directory: readable, and a hash of what the run is told: its `Spec`, the names and sizes of
    the files that it reads, the bytes of the weights that it starts from and of a tokenizer's directory, and, of LoQT,
    the shipped defaults.

    A field of Spec that has its default is left out of the hash, so that a new field changes no name. Left out are also
    the code and the packages (`VERSIONS` is raised by hand where they change what a method does), the content of files
    of the same name and size, Python's version, whose source stdlib is, and the machine: after a change of these, take
    another --work.
    """
    said = {
        item.name: getattr(spec, item.name)
        for item in fields(Spec)
        if item.default is MISSING or getattr(spec, item.name) != item.default
    }
    said["data"] = [portable(option) for option in spec.data]
    if spec.also:
        said["also"] = [portable(option) for option in spec.also]
    if spec.start is not None:
        said["start"] = [digest_of(file) for file in sorted(Path(spec.start).glob("*.safetensors"))]
    if Path(spec.shape).is_file():
        said["shape"] = Path(spec.shape).read_text()
    family = family_of(spec.method)
    if family.startswith("loqt"):
        said["shipped"] = shipped_digest()
    if VERSIONS[family]:
        said["version"] = VERSIONS[family]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]
    readable = f"{Path(spec.shape).stem}-{spec.method}-{spec.lr:g}-{spec.seed}"
    return f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', readable)[:90]}-{digest}"


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One run's place in the report.

    part: search, method, variant or memory. label: the contender's name, or the variant's. contender: its name, without
    the optimizer that is shipped. data: the data set's name. group: of a variant. changes: of fields of `Spec`.
    factor: on the stored rates. spec: the run; None where a search must end first.
    """

    part: str
    label: str
    contender: str
    data: str
    shape: str
    seed: int
    group: str = ""
    changes: tuple[tuple[str, Any], ...] = ()
    factor: float | None = None
    spec: Spec | None = None

    @property
    def key(self) -> str | None:
        return None if self.spec is None else key(self.spec)


@dataclass(frozen=True)
class Choice:
    """What a search came to. factor: the best, or None: no rate trained to the end. is_open: runs are missing."""

    factor: float | None
    is_open: bool = False


def final_loss(result: Result | None) -> float | None:
    """Held-out loss at the end; None where a run has none, or none that is finite."""
    if result is None or result["status"] != "done":
        return None
    loss = result["final"]["loss"]
    return loss if loss is not None and math.isfinite(loss) else None


def settled(result: Result) -> Result:
    """The result; as one that diverged, where it is done with a held-out loss that is not finite."""
    if result["status"] != "done" or final_loss(result) is not None:
        return result
    return {name: value for name, value in result.items() if name != "final"} | {"status": "diverged"}


def choose(found: Iterable[tuple[float, Result | None]]) -> Choice:
    """The factor with the lowest held-out loss of a search's (factor, result)."""
    entries = list(found)
    if any(result is None for _, result in entries):
        return Choice(None, is_open=True)
    done = [(loss, factor) for factor, result in entries if (loss := final_loss(result)) is not None]
    return Choice(min(done)[1] if done else None)


class Plan:
    """The rows of one suite on some data sets."""

    def __init__(self, suite: Suite, data: Sequence[DataSet]) -> None:
        self.suite, self.data = suite, {each.name: each for each in data}
        self._first = data[0].name

    def rows(self, results: Mapping[str, Result]) -> list[Row]:
        """All rows, in the order in which their runs are started."""
        return [row for scale in self.suite.scales for row in self._of_scale(*scale, results)]

    def run_of(self, row: Row) -> str:
        """The name of a row's run; of one that is not known yet, what makes it another than others."""
        if row.key is not None:
            return row.key
        methods = self.suite.contenders(dict(self.suite.scales)[row.shape])
        if row.contender in methods and (row.data, row.seed, row.changes) == (self._first, 0, ()):
            row = self._searched(row.contender, row.shape, 1.0)  # it will be one of the search's own runs
        return row.key or f"{row.contender} {row.shape} {row.data} {row.seed} {row.changes}"

    def runs(self, rows: Sequence[Row]) -> set[str]:
        """All runs of the rows, known or not."""
        return {self.run_of(row) for row in rows}

    def _of_scale(self, shape: str, rank: int, results: Mapping[str, Result]) -> Iterator[Row]:
        methods = self.suite.contenders(rank)
        choices = dict.fromkeys(methods, Choice(1.0))
        for method in methods if self.suite.search else ():
            rows = [self._searched(method, shape, factor) for factor in self.suite.search]
            yield from rows
            choices[method] = choose([(row.factor or 1.0, results.get(row.key or "")) for row in rows])
        for seed in range(self.suite.seeds):
            for data in self.data:
                for method in methods:
                    choice, is_first = choices[method], (seed, data) == (0, self._first)
                    # what no rate could train is shown once, with the stored one
                    if choice.factor is not None or choice.is_open or is_first:
                        yield self._filled(Row("method", method, method, data, shape, seed), choice)
            if seed == 0 and shape == self.suite.scales[0][0]:
                yield from self._memory_rows()
            yield from self._variant_rows(shape, rank, seed, choices)

    def _searched(self, method: str, shape: str, factor: float) -> Row:
        return self._filled(Row("search", method, method, self._first, shape, 0), Choice(factor))

    def _variant_rows(self, shape: str, rank: int, seed: int, choices: Mapping[str, Choice]) -> Iterator[Row]:
        """With the rates that were found for the method of the same family."""
        found: dict[str, Choice] = {}
        for method, choice in choices.items():
            found.setdefault(parse(method)[0], choice)
        for data in list(self.data)[: self.suite.variants_on]:
            for variant in self.suite.variants:
                contender, changes = variant.contender(rank), tuple(variant.changes.items())
                row = Row("variant", variant.label, contender, data, shape, seed, variant.group, changes)
                yield self._filled(row, found.get(parse(contender)[0], Choice(1.0)))

    def _memory_rows(self) -> Iterator[Row]:
        shape, rank = self.suite.memory_scale
        for variant in self.suite.memory:
            changes = tuple({**MEMORY_SPEC, **variant.changes}.items())
            contender = variant.contender(rank)
            row = Row("memory", variant.label, contender, self._first, shape, 0, variant.group, changes)
            yield self._filled(row, Choice(1.0))

    def _filled(self, row: Row, choice: Choice) -> Row:
        """The row with its run; without one while the choice is open."""
        if choice.is_open:
            return row
        factor = 1.0 if choice.factor is None else choice.factor
        lr, lr_full_rank = (float(f"{factor * rate:.6g}") for rate in rates(row.contender, row.shape, self.suite.rates))
        vocabulary = self.suite.vocabulary_of(row.part)
        options = (*self.data[row.data].options, f"data.tokenizer_vocab_size={vocabulary}")
        content = {"lr": lr, "lr_full_rank": lr_full_rank, **self.suite.spec, **dict(row.changes)}
        if parse(row.contender)[0].startswith("loqt"):
            content = {"growth": shipped_growth()} | content
        spec = Spec(with_optimizer(row.contender), options, seed=row.seed, shape=row.shape, **content)
        return replace(row, factor=factor, spec=spec)
