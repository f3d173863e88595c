"""Every shipped model shape and recipe: read, checked, written, read again, planned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from loqt_ds.config import Config, ConfigError, load_config, save_yaml
from loqt_ds.core.schedules import ReinitSchedule
from loqt_ds.memory import division_of, plan
from loqt_ds.memory.machine import USABLE_SHARE

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("recipes/*.yaml"))
TABLE = (CONFIGS / "README.md").read_text(encoding="utf-8")
MODELS = sorted(CONFIGS.glob("models/*.json"))

# hidden, intermediate, layers, heads (ALGORITHM.md)
SHAPES = {
    "9m": (128, 352, 4, 4),
    "35m": (384, 1024, 6, 8),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
LLAMA2_70B = (8192, 28672, 80, 64)
# Recipes that start from a checkpoint, which a command line names: what they are planned with in its place.
INSTEAD = {
    "continue_llama2_7b_icelandic": ["model.shape=llama_7b"],
    "continue_small": ["model.shape=llama_2m"],
    "gsm8k_llama2_7b": ["model.shape=llama_7b", "data.tokenizer=t5-base"],
    "gsm8k_llama2_13b": ["model.shape=llama_13b", "data.tokenizer=t5-base"],
    "gsm8k_small": ["model.shape=llama_mini", "data.tokenizer=t5-base"],
    "glue_small": ["model.shape=modernbert_1m", "data.tokenizer=t5-base"],
    **{
        path.stem: ["model.shape=deberta_v3_base", "data.tokenizer=t5-base"]
        for path in CONFIGS.glob("recipes/glue_*.yaml")
        if path.stem != "glue_small"
    },
}
# rank, alpha, interval, growth, steps, C (ALGORITHM.md)
PAPER = {
    "llama_60m": (128, 0.4, 100, 1.2, 10_000, 5),
    "llama_130m": (256, 0.5, 100, 1.2, 20_000, 5),
    "llama_350m": (256, 0.5, 100, 1.2, 60_000, 5),
    "llama_1b": (512, 0.25, 100, 1.2, 100_000, 10),
    "pretrain_7b_24gb": (1024, 0.5, 10_000, 1.15, 150_000, 0),
    "pretrain_13b_24gb": (1024, 0.5, 200, 1.2, 100_000, 5),
}


def test_all_that_was_promised_is_there() -> None:
    assert {path.stem for path in MODELS} >= {f"llama_{size}" for size in SHAPES} | {"llama_mini"}
    assert {path.stem for path in RECIPES} >= {"default", "llama_9m_c4", "pretrain_7b_12gb", "pretrain_7b_8gb", *PAPER}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_shapes(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    loaded = AutoConfig.for_model(**content)
    for name, value in content.items():
        assert getattr(loaded, name) == value, name
    if content["model_type"] == "llama":
        assert loaded.rope_parameters["rope_theta"] == 10000.0
    size = path.stem.removeprefix("llama_")
    if size in SHAPES:
        got = loaded.hidden_size, loaded.intermediate_size, loaded.num_hidden_layers, loaded.num_attention_heads
        assert got == SHAPES[size]
        assert (loaded.vocab_size, loaded.tie_word_embeddings, loaded.rms_norm_eps) == (32000, False, 1e-6)
    if size == "70b":
        got = loaded.hidden_size, loaded.intermediate_size, loaded.num_hidden_layers, loaded.num_attention_heads
        assert (*got, loaded.num_key_value_heads) == (*LLAMA2_70B, 8)
        assert (loaded.vocab_size, loaded.tie_word_embeddings, loaded.rms_norm_eps) == (32000, False, 1e-5)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in INSTEAD], ids=lambda path: path.stem)
def test_a_recipe_that_starts_from_a_checkpoint_asks_for_it(path: Path) -> None:
    with pytest.raises(ConfigError, match="model.path"):
        load_config(path)


def test_icelandic_as_the_authors_ran_it() -> None:
    config = load_config("continue_llama2_7b_icelandic", ["model.shape=llama_7b"])
    assert (config.loqt.rank, config.loqt.alpha, config.loqt.schedule) == (1024, 0.25, "never")
    assert (config.optim.lr, config.optim.warmup_steps, config.train.max_steps) == (2e-4, 150, 1500)
    assert config.train.micro_batch_size * config.train.gradient_accumulation_steps == 512


@pytest.mark.parametrize(("size", "lr"), [("7b", 4e-4), ("13b", 3e-4)])
def test_gsm8k_as_the_authors_ran_it(size: str, lr: float) -> None:
    config = load_config(f"gsm8k_llama2_{size}", INSTEAD[f"gsm8k_llama2_{size}"])
    assert (config.loqt.rank, config.loqt.alpha, config.loqt.schedule) == (64, 0.25, "never")
    assert (config.optim.lr, config.train.epochs, config.data.sequence_length) == (lr, 3, 512)
    assert not config.optim.train_full_rank and config.eval.metric == "exact_match" and not config.checkpoint.best


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path: Path, tmp_path: Path) -> None:
    config = load_config(path, INSTEAD.get(path.stem, []))
    assert config.name == path.stem
    save_yaml(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    named = re.fullmatch(r"(?:pretrain|fsdp2)_[^_]+_(?:(\d+)x)?(\d+)gb", path.stem)
    num_cards, size = (1, 24) if named is None else (int(named[1] or 1), int(named[2]))
    division = division_of(config, world_size=num_cards)
    assert (num_cards > 1) == (config.engine == "fsdp2")
    vocab_size = 32_128 if config.data.tokenizer == "t5-base" and config.model.vocab_size == "auto" else None
    result = plan(config, vocab_size=vocab_size, division=division)
    assert result.total_gib < size * USABLE_SHARE, "\n".join(result.lines())
    peak = re.search(rf"\| {path.stem} \|.*\| (below )?([\d.]+) GiB, (\w+) \|", TABLE)
    assert peak is not None and peak[3] in ("bfloat16", "float32")
    if peak[1]:
        assert result.total_gib < float(peak[2])
    else:
        assert result.total_gib == pytest.approx(float(peak[2]), abs=0.1), "configs/README.md"


def test_recipes_for_a_card_need_no_checkpointing_where_they_say_so() -> None:
    """Of 24 GB; and 7B and 13B of the paper's rank are among them."""
    for name in ("pretrain_7b_24gb", "pretrain_13b_24gb"):
        config = load_config(name)
        assert not config.train.activation_checkpointing and config.loqt.rank == 1024


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    config = load_config(name)
    loqt = config.loqt
    got = loqt.rank, loqt.alpha, loqt.interval, loqt.growth, config.train.max_steps, loqt.compensation_steps
    assert got == PAPER[name]
    assert config.data.sequence_length == 256 and config.data.packing == "truncated"
    assert config.num_warmup_steps == config.train.max_steps // 10 and config.optim.min_lr_ratio == 0.1
    assert config.optim.name == "adamw8bit" and config.optim.weight_decay == 0.0
    if name == "pretrain_13b_24gb":
        assert loqt.schedule == "static" and config.optim.layerwise
        assert config.train.gradient_accumulation_steps == 1
    else:
        assert config.train.micro_batch_size * config.train.gradient_accumulation_steps * 256 == 131_072
        assert config.optim.lr == (1e-4 if name == "pretrain_7b_24gb" else 0.01)


def test_the_default_recipe_re_initializes_several_times() -> None:
    config: Config = load_config("default")
    loqt = config.loqt
    schedule = ReinitSchedule(loqt.schedule, loqt.interval, loqt.growth, loqt.max_gap)
    assert len(list(schedule.steps(config.train.max_steps))) >= 4
    assert config.data.path is None and config.data.name is None and config.data.tokenizer is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_key_of_a_deepspeed_configuration_is_explained(path: Path) -> None:
    explained = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert f"| {path.name} |" in explained
    for name, value in json.loads(path.read_text(encoding="utf-8")).items():
        for key in [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name]:
            assert f"| {key} |" in explained, key
