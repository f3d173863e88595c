"""DeepSpeed configurations: refused with the reason, completed from the recipe, or read on their own by the plugin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import make_config

from loqt_ds.config import Config, ConfigError
from loqt_ds.engines.ds_config import check_deepspeed, plugin_config

ZERO2 = Path(__file__).resolve().parents[2] / "configs" / "zero2.json"
STAGE2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
PLUGIN: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield


def configuration(**sections: dict[str, Any]) -> Config:
    sections["loqt"] = {"rank": 7} | sections.get("loqt", {})
    sections["train"] = {"micro_batch_size": 4} | sections.get("train", {})
    return make_config(**sections)


def refused(tmp_path: Path, content: Any, config: Config | None = None) -> str:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        check_deepspeed(file, config or configuration())
    assert "ds.json" in str(error.value)
    return str(error.value)


def refused_by_plugin(content: Any) -> str:
    with pytest.raises(ConfigError) as error:
        plugin_config(PLUGIN | content)
    return str(error.value)


# ---------------------------------------------------------------- refused in both

REFUSED = [
    ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage=3", "would not shard", "use 0, 1 or 2"]),
    ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4", "use 0, 1 or 2"]),
    ({"sequence_parallel_size": 2}, ["sequence_parallel_size", "data parallelism"]),
    ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage=auto", "use 0, 1 or 2"]),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "remove"]),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param", "remove"]),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["cpu_offload", "remove"]),
    ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, ["elastic_checkpoint", "any number of ranks"]),
    ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size", "stage 3"]),
    (STAGE2 | {"pipeline": {"stages": 2}}, ["`pipeline`", "data parallelism"]),
    (STAGE2 | {"tensor_parallel": {"autotp_size": 2}}, ["`tensor_parallel`", "whole on its rank"]),
    (STAGE2 | {"sequence_parallel_size": 2}, ["`sequence_parallel_size`", "data-parallel"]),
    (STAGE2 | {"hybrid_engine": {"enabled": True}}, ["`hybrid_engine`", "linear layers"]),
    (STAGE2 | {"compression_training": {"a": 1}}, ["`compression_training`", "remove"]),
    (STAGE2 | {"amp": {"enabled": True}}, ["`amp`", "bf16"]),
    (STAGE2 | {"data_types": {"grad_accum_dtype": "fp32"}}, ["`data_types`", "remove"]),
    (STAGE2 | {"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow", "remove"]),
    (STAGE2 | {"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads", "optim.master"]),
    ({"zero_optimization": [2]}, ["zero_optimization=[2]", "object"]),
    (STAGE2 | {"bf16": True}, ["bf16=True", "object"]),
    (STAGE2 | {"loqt": 8}, ["loqt=8", "object"]),
    ({"zero_optimization": {"stage": 2, "stagee": 1}}, ["stagee"]),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -4}}, ["reduce_bucket_size", "greater than 0"]),
    (STAGE2 | {"zero_optimisation": {}}, ["`zero_optimisation`", "did you mean `zero_optimization`"]),
    (STAGE2 | {"gradient_acumulation_steps": 2}, ["did you mean `gradient_accumulation_steps`"]),
    (STAGE2 | {"qqqq": 1}, ["`qqqq` is not a section that is read", "train_batch_size"]),
]


@pytest.mark.parametrize(("content", "named"), REFUSED, ids=str)
def test_what_cannot_be_honoured_is_refused_with_the_reason(
    tmp_path: Path, content: dict[str, Any], named: list[str]
) -> None:
    for message in (refused(tmp_path, content), refused_by_plugin(content)):
        for part in named:
            assert part in message, message


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}},
        {"fp16": {"enabled": False}, "zero_optimization": {"offload_optimizer": None}},
        {"communication_data_type": "bf16", "prescale_gradients": True, "gradient_predivide_factor": 2.0},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {"sequence_parallel_size": 1, "tensor_parallel": {"autotp_size": 1}},
        {"comms_logger": {"enabled": True}, "steps_per_print": 10, "wall_clock_breakdown": True, "dump_state": False},
    ],
    ids=str,
)
def test_what_deepspeed_does_by_itself_is_left_to_it(tmp_path: Path, content: dict[str, Any]) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    _, own = plugin_config(PLUGIN | content)
    for complete in (check_deepspeed(file, configuration()), own):
        for name, value in content.items():
            assert complete[name] == value


# ---------------------------------------------------------------- with a recipe


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (STAGE2 | {"optimizer": {"type": "AdamW"}}, ["`optimizer`", "`optim` section", "remove"]),
        (STAGE2 | {"scheduler": {"type": "WarmupLR"}}, ["`scheduler`", "remove"]),
        (STAGE2 | {"fp16": {"enabled": True}}, ["`fp16`", "train.dtype"]),
        (STAGE2 | {"torch_autocast": {"enabled": True}}, ["`torch_autocast`", "train.dtype"]),
        (STAGE2 | {"activation_checkpointing": {"x": 1}}, ["train.activation_checkpointing"]),
        (STAGE2 | {"data_efficiency": {"enabled": True}}, ["`data_efficiency`", "`data` section"]),
        ("{not json", ["not valid JSON"]),
        ("[]", ["no JSON object"]),
    ],
    ids=str,
)
def test_what_the_recipe_decides_has_no_place_in_the_file(tmp_path: Path, content: Any, named: list[str]) -> None:
    message = refused(tmp_path, content)
    for part in named:
        assert part in message, message


@pytest.mark.parametrize(
    ("content", "ours", "theirs"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, "train.micro_batch_size=4", "train_micro_batch_size_per_gpu=3"),
        ({"gradient_accumulation_steps": 3}, "train.gradient_accumulation_steps=1", "gradient_accumulation_steps=3"),
        ({"train_batch_size": 7}, "train.gradient_accumulation_steps = 4", "train_batch_size=7"),
        ({"gradient_clipping": 0.5}, "train.max_grad_norm=None", "gradient_clipping=0.5"),
        ({"bf16": {"enabled": True}}, "train.dtype=fp32", "bf16.enabled=True"),
        ({"loqt": {"rank": 9}}, "loqt.rank=7", "loqt.rank=9"),
        ({"loqt": {"rnak": 9}}, "--help", "loqt.rnak"),
    ],
    ids=str,
)
def test_a_contradiction_names_both_places(tmp_path: Path, content: dict[str, Any], ours: str, theirs: str) -> None:
    message = refused(tmp_path, STAGE2 | content)
    assert ours in message and theirs in message, message


def test_values_that_agree_or_are_auto_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    agreeing = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "loqt": {"rank": 7},
    }
    file.write_text(json.dumps(STAGE2 | agreeing), encoding="utf-8")
    complete = check_deepspeed(file, configuration())
    assert complete["train_batch_size"] == 4 and complete["gradient_clipping"] == 0.0
    assert complete["bf16"]["enabled"] is False and complete["gradient_accumulation_steps"] == 1
    assert "loqt" not in complete and complete["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("world_size", [1, 2, 6])
def test_the_global_batch_counts_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config = configuration(train={"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "dtype": "bf16"})
    complete = check_deepspeed(ZERO2, config)
    assert complete["train_batch_size"] == 4 * 3 * world_size
    assert complete["train_micro_batch_size_per_gpu"] == 4 and complete["gradient_accumulation_steps"] == 3
    assert complete["gradient_clipping"] == 0.5 and complete["bf16"] == {"enabled": True}
    assert complete["zero_optimization"] == json.loads(ZERO2.read_text())["zero_optimization"]
    message = refused(tmp_path, STAGE2 | {"train_batch_size": 4 * 3 * world_size + 1}, config)
    assert f"= {12 * world_size} of the recipe" in message and f"train_batch_size={12 * world_size + 1}" in message
    assert (f"{world_size} ranks" in message) == (world_size > 1)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_recipe_options_under_zero(tmp_path: Path, stage: int) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optim\.layerwise=true") as error:
        check_deepspeed(file, configuration(optim={"layerwise": True}))
    with pytest.raises(ConfigError, match=r"train\.max_grad_norm_per_parameter=0\.5: .*train\.max_grad_norm"):
        check_deepspeed(file, configuration(train={"max_grad_norm_per_parameter": 0.5}))
    assert "python -m loqt_ds.train" in str(error.value)
    without_masters = configuration(optim={"master": "bf16"}, train={"dtype": "bf16"})
    if stage == 0:
        with pytest.raises(ConfigError, match=r"optim\.master=bf16 with zero_optimization\.stage=0") as error:
            check_deepspeed(file, without_masters)
        assert "optim.master=fp32" in str(error.value)
    else:
        bf16 = check_deepspeed(file, without_masters)["bf16"]
        assert bf16 == {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert check_deepspeed(file, configuration(train={"dtype": "bf16"}))["bf16"] == {"enabled": True}


def test_the_launcher_decides_the_device() -> None:
    assert check_deepspeed(ZERO2, configuration(train={"device": "auto"}))
    with pytest.raises(ConfigError, match=r"train\.device=cuda:7") as error:
        check_deepspeed(ZERO2, configuration(train={"device": "cuda:7"}))
    assert "train.device=auto" in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read .*configs/zero2\.json"):
        check_deepspeed(tmp_path / "absent.json", configuration())


# ---------------------------------------------------------------- of loqt_ds.initialize


def test_our_section_and_deepspeeds_become_one_configuration() -> None:
    given = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "loqt": {
            "rank": 5,
            "interval": 9,
            "subspace": "auto",
            "optim": {"name": "adamw8bit", "lr": 0.25, "warmup_steps": 4},
            "seed": 17,
            "max_steps": 321,
            "collective_timeout_seconds": 44,
        },
    }
    before = json.dumps(given)
    config, complete = plugin_config(given)
    assert json.dumps(given) == before, "the caller's object is left as it was"
    assert (config.loqt.rank, config.loqt.interval, config.loqt.subspace) == (5, 9, "auto")
    assert (config.optim.name, config.optim.lr, config.optim.warmup_steps) == ("adamw8bit", 0.25, 4)
    assert config.optim.schedule == Config().optim.schedule
    train = config.train
    assert (train.seed, train.max_steps, train.collective_timeout_seconds) == (17, 321, 44)
    assert (train.max_grad_norm, train.dtype) == (0.7, "bf16")
    assert (train.micro_batch_size, train.gradient_accumulation_steps) == (2, 3)
    assert not {"loqt", "optimizer"} & set(complete) and complete["zero_optimization"] == {"stage": 1}
    assert complete["bf16"] == {"enabled": True} and complete["zero_allow_untested_optimizer"] is True


def test_without_a_section_there_are_defaults() -> None:
    config, complete = plugin_config(PLUGIN)
    assert config.loqt == Config().loqt and config.train.dtype == "fp32" and config.train.max_grad_norm is None
    assert (config.optim.schedule, config.optim.warmup_steps) == ("constant", 0), "whoever steps decides the rate"
    assert complete["bf16"]["enabled"] is False


def test_a_path_and_an_object_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    given = PLUGIN | {"loqt": {"rank": 3}}
    file.write_text(json.dumps(given), encoding="utf-8")
    assert plugin_config(file) == plugin_config(str(file)) == plugin_config(given)
    with pytest.raises(ConfigError, match=r"config .*absent\.json cannot be read"):
        plugin_config(tmp_path / "absent.json")
    file.write_text(json.dumps(PLUGIN | {"pipeline": {"x": 1}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ds\.json"):
        plugin_config(file)


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "adamw"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_optimizer_section_is_honoured(kind: str, name: str) -> None:
    params = {"lr": 0.5, "betas": [0.7, 0.8], "eps": 1e-5, "weight_decay": 0.25, "adam_w_mode": True, "fused": True}
    section = {"type": kind, "params": params}
    config, complete = plugin_config(PLUGIN | {"optimizer": section, "loqt": {"optim": {"name": name}}})
    optim = config.optim
    assert (optim.lr, list(optim.betas), optim.eps, optim.weight_decay) == (0.5, [0.7, 0.8], 1e-5, 0.25)
    assert optim.name == name and "optimizer" not in complete


@pytest.mark.parametrize(
    ("params", "ours"),
    [({"lr": 0.5}, {"lr": 0.25}), ({"betas": [0.9, 0.99]}, {"betas": [0.9, 0.95]}), ({"lr": 0.5}, {"lr": 0.5})],
    ids=str,
)
def test_a_value_in_both_optimizer_sections_is_refused_naming_both(params: dict[str, Any], ours: Any) -> None:
    message = refused_by_plugin({"optimizer": {"type": "AdamW", "params": params}, "loqt": {"optim": ours}})
    ((name, value),) = params.items()
    assert f"optimizer.params.{name}={value}" in message and f"loqt.optim.{name}={ours[name]}" in message
    assert "in one place only" in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type=Lamb", "Adam or AdamW"]),
        ({"optimizer": {"type": "OneBitAdam"}}, ["optimizer.type=OneBitAdam", "Adam or AdamW"]),
        ({"optimizer": {"params": {"lr": 0.1}}}, ["optimizer.type=None", "Adam or AdamW"]),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, ["optimizer.params.amsgrad", "lr, betas, eps"]),
        ({"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, ["bias_correction=false", "remove"]),
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.1, "adam_w_mode": False}}},
            ["weight_decay=0.1", "adam_w_mode=false", "use AdamW"],
        ),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, ["optimizer.params=[1]", "object"]),
        ({"optimizer": "AdamW"}, ["optimizer='AdamW'", "object"]),
        ({"scheduler": "WarmupLR"}, ["scheduler='WarmupLR'", "object"]),
        ({"loqt": {"optim": 3}}, ["loqt.optim=3", "object"]),
        ({"loqt": {"rnak": 4}}, ["`rnak`", "did you mean `rank`"]),
        ({"loqt": {"optim": {"lrr": 4}}}, ["`lrr`", "did you mean `lr`"]),
        ({"loqt": {"rank": 0}}, ["loqt.rank=0", "at least 1"]),
        ({"loqt": {"quantize_w": "nf5"}}, ["loqt.quantize_w", "nf5", "nf4"]),
        ({"loqt": {"seed": "x"}}, ["seed='x'", "integer"]),
        ({"loqt": {"max_steps": 0}}, ["max_steps=0", "at least 1"]),
        ({"loqt": {"collective_timeout_seconds": 0}}, ["collective_timeout_seconds=0", "at least 1"]),
        ({"loqt": {"optim": {"schedule": "cosine"}}}, ["loqt.optim.schedule=cosine", "loqt.max_steps", "`scheduler`"]),
        ({"loqt": {"optim": {"warmup_steps": 3}}}, ["loqt.optim.warmup_steps=3", "loqt.max_steps"]),
        ({"loqt": {"optim": {"min_lr_ratio": 0.1}}}, ["loqt.optim.min_lr_ratio=0.1", "loqt.max_steps"]),
        (
            {"loqt": {"max_steps": 9}, "scheduler": {"type": "WarmupLR", "params": {}}},
            ["loqt.max_steps", "`scheduler`", "one of them"],
        ),
        ({"loqt": {"optim": {"layerwise": True}}}, ["optim.layerwise=true"]),
        ({"loqt": {"optim": {"master": "bf16"}}, "bf16": {"enabled": True}}, ["optim.master=bf16", "stage=0"]),
        ({"loqt": {"optim": {"master": "bf16"}}} | STAGE2, ["optim.master=bf16", "fp32"]),
        ({"gradient_clipping": -1}, ["max_grad_norm=-1", "above 0"]),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 1}, ["DeepSpeed refuses it", "train_batch_size"]),
    ],
    ids=str,
)
def test_what_the_plugin_cannot_honour_is_refused_with_the_reason(content: dict[str, Any], named: list[str]) -> None:
    message = refused_by_plugin(content)
    for part in named:
        assert part in message, message


@pytest.mark.parametrize(
    ("content", "option"),
    [
        ({"train_batch_size": "auto"}, "train_batch_size"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu"),
        ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps"),
        ({"gradient_clipping": "auto"}, "gradient_clipping"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),
        ({"fp16": {"enabled": "auto"}}, "fp16.enabled"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "scheduler.params.warmup_num_st"),
    ],
    ids=str,
)
def test_auto_means_nothing_without_a_recipe(content: dict[str, Any], option: str) -> None:
    """It is the Trainer of transformers that fills it in; as a condition it would be true."""
    message = refused_by_plugin(STAGE2 | content)
    assert option in message and '="auto"' in message and "give a value" in message


def test_no_batch_size_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_micro_batch_size_per_gpu"):
        plugin_config({})


def test_a_schedule_of_ours_needs_the_number_of_steps_and_gets_it() -> None:
    optim = {"schedule": "linear", "warmup_steps": 3, "min_lr_ratio": 0.2}
    config, _ = plugin_config(PLUGIN | {"loqt": {"optim": optim, "max_steps": 50}})
    assert (config.optim.schedule, config.optim.warmup_steps, config.optim.min_lr_ratio) == ("linear", 3, 0.2)
    _, complete = plugin_config(PLUGIN | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}})
    assert complete["scheduler"] == {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
