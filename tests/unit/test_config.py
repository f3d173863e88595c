"""Configuration: parsing is strict, nothing a user wrote is ignored, and the saved file alone repeats the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loqt_ds.config import (
    Config,
    ConfigError,
    LoQTConfig,
    apply_overrides,
    find_config_file,
    from_dict,
    help_text,
    load_config,
    option_names,
    parse_section,
    save_yaml,
    validate,
)
from loqt_ds.config.parsing import field_docs, field_types

SHAPE = "model.shape=llama_9m"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------- parsing


def test_file_then_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "model: {shape: llama_9m}\nloqt: {rank: 16, alpha: 1}\noptim:\n  lr: 1e-3\n")
    config = load_config(file, ["loqt.rank=8", "data.text_field=body", "data.path=x.jsonl"])
    assert (config.loqt.rank, config.loqt.alpha, config.optim.lr) == (8, 1.0, 0.001)
    assert isinstance(config.loqt.alpha, float)
    assert config.data.text_field == "body"
    assert config.train == Config().train  # what nobody named keeps its default


@pytest.mark.parametrize(
    "text, value",
    [
        ("optim.lr=1e-3", 0.001),
        ("optim.lr=1", 1.0),
        ("optim.betas=[0.9, 0.95]", [0.9, 0.95]),
        ("loqt.double_quant=true", "both"),
        ("loqt.double_quant=false", "none"),
        ("loqt.max_gap=null", None),
        ("loqt.max_gap=none", None),
        ("loqt.quantize_w=none", "none"),
        ("export.format=null", "none"),
        ("checkpoint.resume=none", "none"),
        ("model.vocab_size=auto", "auto"),
        ("model.vocab_size=512", 512),
        ("train.device=cuda:1", "cuda:1"),
        ("name=0017", "0017"),  # YAML alone reads the octal number 15
        ("data.prompt_template=Question: {prompt}\nAnswer: ", "Question: {prompt}\nAnswer: "),  # YAML reads a mapping
        ("name=yes", "yes"),  # and here a boolean
        ("loqt.target_modules=.*[qv]_proj", ".*[qv]_proj"),
        ("loqt.target_modules=[qv]_proj.*", "[qv]_proj.*"),  # not YAML at all
        ("loqt.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("data.path=[a.txt, b=c.txt]", ["a.txt", "b=c.txt"]),
        ("data.streaming=yes", True),
    ],
)
def test_override_values(text: str, value: Any) -> None:
    config = apply_overrides(Config(), [text])
    section, _, name = text.partition("=")[0].rpartition(".")
    assert getattr(getattr(config, section) if section else config, name) == value


@pytest.mark.parametrize(
    "text, words",
    [
        ("loqt.rang=8", ["loqt.rang", "loqt.rank"]),
        ("rank=8", ["rank", "loqt.rank"]),
        ("train.lr=1", ["train.lr", "optim.lr"]),
        ("lokt.rank=8", ["lokt.rank", "loqt.rank"]),
        ("model=llama_9m", ["model"]),
        ("loqt.rank", ["loqt.rank", "section.field=value"]),
        ("loqt.rank=true", ["loqt.rank=True", "integer"]),
        ("loqt.rank=8.0", ["loqt.rank=8.0", "integer"]),
        ("loqt.rank=eight", ["loqt.rank='eight'", "integer"]),
        ("loqt.rank=[8", ["loqt.rank", "integer"]),
        ("optim.lr=fast", ["optim.lr='fast'", "number"]),
        ("optim.betas=0.9", ["optim.betas=0.9", "list of numbers"]),
        ("optim.name=adam8bit", ["optim.name='adam8bit'", "adamw8bit"]),
        ("loqt.quantize_w=nf8", ["loqt.quantize_w='nf8'", "nf4|fp4|int4|none", "nf4"]),
        ("data.streaming=1", ["data.streaming=1", "true|false"]),
        ("data.path={a: 1}", ["data.path", "text"]),
        ("model.vocab_size=big", ["model.vocab_size='big'", "auto"]),
        ("data.labels=[no, yes]", ["data.labels=[False, True]", "in quotation marks", '["no", "yes"]']),
        ("data.labels=[0, 1]", ["data.labels=[0, 1]", "list of texts", "in quotation marks"]),
    ],
)
def test_bad_overrides(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), [text])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("loqt: {rnk: 8}", ["rnk", "section `loqt`", "rank"]),
        ("modell: {}", ["modell", "model"]),
        ("rank: 8", ["rank", "loqt.rank"]),
        ("loqt: 8", ["section `loqt`", "8"]),
        ("loqt: {rank: '8'}", ["loqt.rank='8'", "integer"]),
        ("loqt:\n  rank: 8\n  rank: 9", ["line 3", "rank", "twice"]),
        ("- a\n- b", ["list"]),
        ("loqt: {rank: 8", ["not valid YAML"]),
        ("? [1, 2]\n: 3", ["plain name"]),
        ("data: {prompt_field: 0}", ["data.prompt_field=0", "give text; in quotation marks", '"0"']),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, [SHAPE])
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"llama_60n.*did you mean llama_60m.*pretrain_7b_24gb"):
        load_config("llama_60n")


def test_empty_sections_and_files_mean_defaults(tmp_path: Path) -> None:
    assert from_dict(None) == Config()
    assert from_dict({"loqt": None}) == Config()
    assert load_config(write(tmp_path / "e.yaml", "# nothing\n"), [SHAPE]).loqt == LoQTConfig()


def test_one_section_alone() -> None:
    """The `loqt` section of a DeepSpeed JSON is read by the same rules."""
    assert parse_section(LoQTConfig, {"rank": 4}, where="loqt", source="zero2.json") == LoQTConfig(rank=4)
    with pytest.raises(ConfigError, match=r"zero2.json.*rnk.*rank"):
        parse_section(LoQTConfig, {"rnk": 4}, where="loqt", source="zero2.json")


def test_find_config_file(repository: Path) -> None:
    assert find_config_file("models", "llama_7b") == repository / "configs/models/llama_7b.json"
    with pytest.raises(ConfigError) as caught:
        find_config_file("models", "llama_8b")
    for file in (repository / "configs/models").glob("*.json"):
        assert file.stem in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- round trip


def strategy(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if get_origin(hint) is list:
        return st.lists(strategy(get_args(hint)[0]), min_size=1, max_size=3)
    if hint is type(None):
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(-(10**12), 10**12)
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if hint is str:  # the word none is null by declaration
        alphabet = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])
        return st.text(alphabet, min_size=1).filter(lambda text: text.lower() not in ("none", "null"))
    choices = get_args(hint)
    if all(isinstance(choice, str) for choice in choices):  # Literal
        return st.sampled_from(choices)
    return st.one_of([strategy(choice) for choice in choices])


@st.composite
def configurations(draw: st.DrawFn) -> Config:
    """Any well-typed configuration, sensible or not."""
    values: dict[str, Any] = {}
    for name, hint in field_types(Config).items():
        if dataclasses.is_dataclass(hint):
            values[name] = hint(**{inner: draw(strategy(kind)) for inner, kind in field_types(hint).items()})
        else:
            values[name] = draw(strategy(hint))
    return Config(**values)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(config=configurations())
def test_any_configuration_survives_a_file(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("c") / "config.yaml"
    save_yaml(config, file)
    assert from_dict(yaml.safe_load(file.read_text(encoding="utf-8")), source="file") == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_value_survives_an_override(data: st.DataObject) -> None:
    """An override written as YAML sets the one field it names, to the value that was meant, and nothing else."""
    name = data.draw(st.sampled_from(option_names()))
    section, _, field = name.rpartition(".")
    value = data.draw(strategy(field_types(type(getattr(Config(), section)) if section else Config)[field]))
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    text = text.removesuffix("...\n").strip("\n")
    expected = Config()
    setattr(getattr(expected, section) if section else expected, field, value)
    assert apply_overrides(Config(), [f"{name}={text}"]) == expected


def test_saved_configuration_alone_repeats_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths must not depend on where the second run is started."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "text.txt").write_text("x")
    (tmp_path / "a" / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    overrides = [SHAPE, "data.path=*.txt", "data.validation_path=text.txt", "data.tokenizer=tokenizer", "output_dir=o"]
    first = load_config(None, overrides)
    save_yaml(first, tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(tmp_path / "config.yaml") == first
    assert first.data.path == str(tmp_path / "a" / "*.txt")
    assert first.data.tokenizer == str(tmp_path / "a" / "tokenizer")
    assert load_config(None, [SHAPE, "data.tokenizer=t5-base"]).data.tokenizer == "t5-base"  # a hub name stays one


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_explains_every_option() -> None:
    text = help_text()
    for name in option_names():
        assert f"\n  {name}=" in text, name
    for cls in [Config, *[hint for hint in field_types(Config).values() if dataclasses.is_dataclass(hint)]]:
        for item in dataclasses.fields(cls):
            if cls is Config and dataclasses.is_dataclass(field_types(cls)[item.name]):
                continue
            assert len(field_docs(cls)[item.name]) > 5, (cls, item.name)
    assert "nf4|fp4|int4|none" in text and "  loqt.rank=128 " in text and "loqt.max_gap=null" in text


# ---------------------------------------------------------------------------------------------------------- validation

LABELS = ["data.format=classification", "data.path=rows.tsv", "data.tokenizer=x"]
REFUSED: list[tuple[list[str], list[str]]] = [
    (["model.shape=null"], ["model.shape", "model.path"]),
    (["model.path=/tmp"], ["model.shape", "model.path", "exclude"]),
    (["model.shape=llama_8m"], ["model.shape=llama_8m", "llama_9m"]),
    (["model.shape=null", "model.path=/nowhere"], ["model.path=/nowhere", "directory"]),
    (["model.shape=null", "model.path=/tmp", "model.vocab_size=64"], ["model.vocab_size=64", "null"]),
    (["model.vocab_size=0"], ["model.vocab_size=0"]),
    (["model.attention=flash_attention_2", "train.device=cpu"], ["flash_attention_2", "sdpa"]),
    (["loqt.rank=0"], ["loqt.rank=0", "at least 1"]),
    (["loqt.rank=-4"], ["loqt.rank=-4"]),
    (["loqt.alpha=0"], ["loqt.alpha=0"]),
    (["loqt.alpha=.nan"], ["loqt.alpha=nan", "finite"]),
    (["optim.lr=.inf"], ["optim.lr=inf", "finite"]),
    (["optim.betas=[0.9, .nan]"], ["optim.betas", "finite"]),
    (["loqt.interval=0"], ["loqt.interval=0"]),
    (["loqt.growth=0.5"], ["loqt.growth=0.5", "static"]),
    (["loqt.schedule=linear", "loqt.growth=-1"], ["loqt.growth=-1"]),
    (["loqt.max_gap=0"], ["loqt.max_gap=0"]),
    (["loqt.max_gap=50"], ["loqt.max_gap=50", "loqt.interval=100"]),
    (["loqt.compensation_steps=-1"], ["loqt.compensation_steps=-1"]),
    (["loqt.quantize_w=none", "loqt.double_quant=both"], ["loqt.double_quant=both", "loqt.double_quant=p"]),
    (["loqt.quantize_p=none", "loqt.double_quant=both"], ["loqt.double_quant=both", "loqt.double_quant=w"]),
    (["loqt.quantize_p=none", "loqt.double_quant=p"], ["loqt.double_quant=p", "loqt.double_quant=none"]),
    (["loqt.target_modules=("], ["loqt.target_modules", "regular expression"]),
    (["loqt.target_modules=[]"], ["loqt.target_modules", "empty"]),
    (["loqt.target_modules=['']"], ["loqt.target_modules", "empty"]),
    (["loqt.sketch_oversampling=-1"], ["loqt.sketch_oversampling=-1"]),
    (["loqt.dequantized_cache_gib=-0.5"], ["loqt.dequantized_cache_gib=-0.5"]),
    (["loqt.product=dense"], ["loqt.product", "dense", "factored"]),
    (["data.path=a.txt", "data.name=allenai/c4"], ["data.path", "data.name", "exclude"]),
    (["data.streaming=true"], ["data.streaming=True", "data.name"]),
    (["data.config_name=en"], ["data.config_name=en", "data.name"]),
    (["data.split=test"], ["data.split=test", "data.name"]),
    (["data.validation_split=test"], ["data.validation_split=test", "data.name"]),
    (["data.name=a", "data.validation_split=train"], ["data.validation_split=train", "trained on"]),
    (
        ["data.name=a", "data.validation_split=x", "data.validation_path=b.txt"],
        ["data.validation_path", "data.validation_split=x"],
    ),
    (["data.validation_fraction=0"], ["data.validation_fraction=0"]),
    (["data.validation_fraction=1"], ["data.validation_fraction=1"]),
    (["data.sequence_length=0"], ["data.sequence_length=0"]),
    (["data.sequence_length=4096"], ["data.sequence_length=4096", "max_position_embeddings=1024"]),
    (["data.mask_documents=true", "data.packing=truncated"], ["data.mask_documents", "data.packing=truncated"]),
    (["data.mask_documents=true", "model.attention=eager"], ["data.mask_documents", "sdpa"]),
    (["data.num_processes=0"], ["data.num_processes=0"]),
    (["data.path=''"], ["data.path", "empty"]),
    (["optim.lr=0"], ["optim.lr=0"]),
    (["optim.lr=-1"], ["optim.lr=-1"]),
    (["optim.lr_full_rank=0"], ["optim.lr_full_rank=0"]),
    (["optim.betas=[0.9, 1.0]"], ["optim.betas=[0.9, 1.0]", "below 1"]),
    (["optim.betas=[0.9]"], ["optim.betas=[0.9]", "two"]),
    (["optim.eps=0"], ["optim.eps=0"]),
    (["optim.weight_decay=-0.1"], ["optim.weight_decay=-0.1"]),
    (["optim.warmup_steps=-1"], ["optim.warmup_steps=-1"]),
    (["optim.warmup_steps=20", "train.max_steps=10"], ["optim.warmup_steps=20", "train.max_steps=10"]),
    (["optim.warmup_ratio=1.5"], ["optim.warmup_ratio=1.5"]),
    (["optim.min_lr_ratio=2"], ["optim.min_lr_ratio=2"]),
    (
        ["optim.layerwise=true", "train.max_grad_norm=1"],
        ["layerwise", "train.max_grad_norm=null", "backward", "train.max_grad_norm_per_parameter=1"],
    ),
    (
        ["train.max_grad_norm=1", "train.max_grad_norm_per_parameter=2"],
        ["train.max_grad_norm=1", "train.max_grad_norm_per_parameter=2", "null"],
    ),
    (
        ["model.kernels=liger", "train.lean_activations=false"],
        ["model.kernels=liger", "train.lean_activations=true", "model.kernels=torch"],
    ),
    (["train.max_grad_norm_per_parameter=0"], ["train.max_grad_norm_per_parameter=0", "null"]),
    (["optim.master=bf16"], ["optim.master=bf16", "train.dtype=auto", "train.dtype=bf16"]),
    (["optim.master=bf16", "train.dtype=fp32"], ["optim.master=bf16", "train.dtype=fp32"]),
    (["optim.schedule=cosine_rewarmup", "loqt.schedule=never"], ["cosine_rewarmup", "never"]),
    (["optim.schedule=cosine_rewarmup", "optim.rewarmup_steps=200"], ["rewarmup_steps=200", "loqt.interval=100"]),
    (["train.max_steps=0"], ["train.max_steps=0"]),
    (["train.micro_batch_size=0"], ["train.micro_batch_size=0"]),
    (["train.gradient_accumulation_steps=0"], ["train.gradient_accumulation_steps=0"]),
    (["train.max_grad_norm=0"], ["train.max_grad_norm=0", "null"]),
    (["train.seed=-1"], ["train.seed=-1"]),
    (["train.device=gpu"], ["train.device=gpu", "cuda"]),
    (["eval.every=-1"], ["eval.every=-1"]),
    (["eval.max_tokens=0"], ["eval.max_tokens=0"]),
    (["checkpoint.every=0"], ["checkpoint.every=0"]),
    (["checkpoint.keep=-1"], ["checkpoint.keep=-1"]),
    (["checkpoint.resume=''"], ["checkpoint.resume", "empty"]),
    (["logging.every=0"], ["logging.every=0"]),
    (["name=a/b"], ["name=a/b"]),
    (["output_dir=/etc/passwd"], ["output_dir=/etc/passwd", "directory"]),
    # changed although nothing would read it
    (["loqt.schedule=never", "loqt.interval=50"], ["loqt.interval=50", "no effect"]),
    (["loqt.schedule=static", "loqt.growth=1.5"], ["loqt.growth=1.5", "no effect"]),
    (["loqt.schedule=static", "loqt.max_gap=500"], ["loqt.max_gap=500", "no effect"]),
    (["loqt.schedule=never", "loqt.optimizer_state=reset"], ["loqt.optimizer_state=reset", "no effect"]),
    (["loqt.quantize_w=none", "loqt.compensation_steps=10"], ["loqt.compensation_steps=10", "no effect"]),
    (["loqt.quantize_w=none", "loqt.dequantized_cache_gib=1"], ["loqt.dequantized_cache_gib=1", "no effect"]),
    (["loqt.subspace=gram", "loqt.sketch_oversampling=8"], ["loqt.sketch_oversampling=8", "no effect"]),
    (["optim.rewarmup_steps=5"], ["optim.rewarmup_steps=5", "no effect"]),
    (["optim.schedule=constant", "optim.min_lr_ratio=0.5"], ["optim.min_lr_ratio=0.5", "no effect"]),
    (["optim.warmup_steps=5", "optim.warmup_ratio=0.2"], ["optim.warmup_ratio=0.2", "no effect"]),
    (["data.text_field=body"], ["data.text_field=body", "no effect"]),
    (["data.quoting=none"], ["data.quoting=none", "no effect", "data.format=text"]),
    (["data.tokenizer=t5-base", "data.tokenizer_vocab_size=512"], ["data.tokenizer_vocab_size=512", "no effect"]),
    (["data.validation_path=a", "data.validation_fraction=0.1"], ["data.validation_fraction=0.1", "no effect"]),
    (["eval.num_samples=0", "eval.sample_tokens=8"], ["eval.sample_tokens=8", "no effect"]),
    (["model.task=masked_lm", "eval.num_samples=2"], ["eval.num_samples=2", "no effect", "masked_lm"]),
    (["model.task=masked_lm", "eval.sample_tokens=8"], ["eval.sample_tokens=8", "no effect"]),
    ([*LABELS, "model.task=regression", "data.num_processes=2"], ["data.num_processes=2", "no effect"]),
    (["checkpoint.best=true", "train.max_steps=100"], ["checkpoint.best=true", "eval.every=100", "one evaluation"]),
    (["eval.patience=2", "train.max_steps=50"], ["eval.patience=2", "eval.every=100", "below 50"]),
]


@pytest.mark.parametrize("overrides, words", REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_refused(overrides: list[str], words: list[str]) -> None:
    """Each rule alone: the base is valid, the changes are not, and the message names option, value and remedy."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, [SHAPE, *overrides])
    for word in words:
        assert word in str(caught.value)


CLASSES = [*LABELS, "model.task=classification", "model.num_labels=2"]
NUMBERS = [*LABELS, "model.task=regression"]


@pytest.mark.parametrize(
    "given, metrics", [(CLASSES, ("accuracy", "f1", "matthews")), (NUMBERS, ("pearson", "spearman"))]
)
def test_a_score_of_another_task_is_refused(given: list[str], metrics: tuple[str, ...]) -> None:
    for metric in ("loss", *metrics):
        load_config(None, [SHAPE, *given, f"eval.metric={metric}"])
    for metric in {"accuracy", "f1", "matthews", "pearson", "spearman"} - {*metrics}:
        with pytest.raises(ConfigError, match=f"eval.metric={metric} is a score of .*; use {', '.join(metrics)}, loss"):
            load_config(None, [SHAPE, *given, f"eval.metric={metric}"])
    with pytest.raises(ConfigError, match="eval.metric=glue with data.glue_task=null"):
        load_config(None, [SHAPE, *given, "eval.metric=glue"])
    load_config(None, [SHAPE, *given, "eval.metric=glue", f"data.glue_task={'rte' if given == CLASSES else 'stsb'}"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loqt.schedule=never"],
        ["loqt.schedule=static", "loqt.interval=10"],
        ["loqt.schedule=linear", "loqt.growth=0.5"],
        ["loqt.max_gap=100"],
        ["loqt.quantize_w=none", "loqt.compensation_steps=0"],
        ["loqt.quantize_w=none", "loqt.double_quant=p"],
        ["optim.layerwise=true", "train.gradient_accumulation_steps=2", "train.max_grad_norm_per_parameter=1"],
        ["train.max_grad_norm_per_parameter=1"],
        ["optim.master=bf16", "train.dtype=bf16"],
        ["optim.schedule=cosine_rewarmup", "optim.rewarmup_steps=100"],
        ["optim.warmup_steps=10", "train.max_steps=10"],
        ["optim.warmup_steps=0"],
        ["eval.every=0", "checkpoint.keep=0", "eval.num_samples=0"],
        ["model.task=masked_lm", "eval.num_samples=0"],
        ["checkpoint.best=true", "eval.patience=2", "train.max_steps=101"],
        ["data.name=allenai/c4", "data.config_name=en", "data.streaming=true", "data.validation_split=validation"],
        ["data.sequence_length=1024"],
        ["train.device=cuda:3"],
    ],
    ids=" ".join,
)
def test_accepted(overrides: list[str]) -> None:
    load_config(None, [SHAPE, *overrides])


def test_a_config_built_in_python_is_checked_too() -> None:
    config = load_config(None, [SHAPE])
    config.loqt.rank = "8"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="loqt.rank"):
        validate(config)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not valid JSON"),
        ('{"hidden_size": 8}', "model_type"),
        ('{"model_type": "llama", "hidden_size": 0}', "hidden_size=0"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "num_attention_heads=3"),
    ],
)
def test_bad_shape_files(tmp_path: Path, content: str, words: str) -> None:
    file = write(tmp_path / "shape.json", content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(None, [f"model.shape={file}"])
    assert str(file) in str(caught.value)


def test_warmup_steps() -> None:
    assert load_config(None, [SHAPE, "train.max_steps=300"]).num_warmup_steps == 30
    assert load_config(None, [SHAPE, "optim.warmup_steps=7"]).num_warmup_steps == 7
