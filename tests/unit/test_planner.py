"""The planner's answers: the table of the project's promise, phases against bytes that are alive, what fits and what
would, how much memory there is."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from loqt_ds.checkpoint import Checkpoint
from loqt_ds.config import Config, ConfigError, load_config
from loqt_ds.engines.single import SingleEngine
from loqt_ds.finish import make_room
from loqt_ds.memory import GIB, Asker, check_fits, plan, planned_model
from loqt_ds.memory.command import main
from loqt_ds.memory.machine import host_bytes
from loqt_ds.preflight import check_memory, resolve_activations
from loqt_ds.ranks import ALONE
from loqt_ds.run import load_model

# GiB: W and P in NF4 with double quantization, B in bf16 without masters, 8-bit Adam, layer-wise; 1 GiB of context.
TARGETS = {
    ("7b", 256): {256: 7.8, 1024: 10.3, 2048: 13.3, 4096: 19.2},
    ("7b", 1024): {256: 12.8, 1024: 15.5, 2048: 18.7},
    ("13b", 256): {256: 12.5, 1024: 16.1, 2048: 20.8},
    ("13b", 1024): {256: 20.2, 512: 22.0},
}
ZERO2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500}}
LEAST = ("train.dtype=bf16", "optim.master=bf16", "optim.layerwise=true", "loqt.double_quant=both")


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_targets(size: str) -> None:
    asker = Asker(load_config(None, [f"model.shape=llama_{size}", *LEAST, "data.sequence_length=256"]))
    for rank, tokens, gib in [
        (r, t, gib) for (s, r), cells in TARGETS.items() if s == size for t, gib in cells.items()
    ]:
        planned = asker.plan(f"loqt.rank={rank}", f"train.micro_batch_size={tokens // 256}")
        assert planned.num_tokens == tokens
        assert planned.total_gib == pytest.approx(gib, rel=0.03), planned.lines()


# ---------------------------------------------------------------- against bytes that are alive


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have returned and that somebody holds; kernels' own
    temporaries are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return output


@pytest.fixture
def shape(tmp_path: Path) -> str:
    content = {
        **{"model_type": "llama", "vocab_size": 997, "max_position_embeddings": 512, "tie_word_embeddings": False},
        **{"hidden_size": 192, "intermediate_size": 520, "num_hidden_layers": 2, "num_attention_heads": 6},
    }
    (tmp_path / "shape.json").write_text(json.dumps(content))
    return str(tmp_path / "shape.json")


def small(shape: str, *overrides: str) -> Config:
    base = [f"model.shape={shape}", "loqt.rank=64", "data.sequence_length=128", "train.micro_batch_size=3"]
    base += ["train.device=cpu", "loqt.subspace=sketch", "loqt.interval=2", "loqt.schedule=static"]
    return load_config(None, [*base, *overrides])


CASES: dict[str, tuple[str, ...]] = {
    "least": LEAST,
    "least, many tokens": (*LEAST, "train.micro_batch_size=12"),
    "stock activations": (*LEAST, "train.micro_batch_size=12", "train.lean_activations=false"),
    "activation checkpointing": (*LEAST, "train.micro_batch_size=12", "train.activation_checkpointing=true"),
    "ordinary": ("train.dtype=bf16",),
    "float32": ("train.dtype=fp32", "loqt.subspace=gram"),
    "merged, W kept": ("train.dtype=bf16", "loqt.product=merged", "loqt.dequantized_cache_gib=1"),
    "accumulated": ("train.dtype=bf16", "train.gradient_accumulation_steps=2"),
    "layer-wise, accumulated": (*LEAST, "train.gradient_accumulation_steps=2"),
    "B alone": ("train.dtype=bf16", "optim.train_full_rank=false"),
}


@pytest.mark.parametrize("case", CASES)
def test_peaks_are_those_of_live_tensors(shape: str, case: str) -> None:
    """Of the start, of a step and of one with a re-initialization; without the context. 32-bit Adam, because the
    8-bit one makes its temporaries inside an operation, where they are not seen."""
    config = small(shape, "optim.name=adamw", *CASES[case])
    planned = plan(config)
    torch.manual_seed(0)
    measured = {}
    with LiveBytes() as live:
        description = planned_model(config)[0]
        model, original = load_model(config, description, torch.device("cpu"), ALONE, resumed=False, say=lambda _: None)
        measured["start"] = live.peak
        engine = SingleEngine(model, config, original=original)
        for _ in range(3):
            live.peak = live.now
            for _ in range(config.train.gradient_accumulation_steps):
                ids = torch.randint(0, 997, (config.train.micro_batch_size, 128))
                loss = engine(input_ids=ids, targets=ids, use_cache=False) / ids.numel()
                engine.backward(loss)
                del loss
                report = engine.step()
            assert report is not None
            measured["step" if report.reinit is None else "re-initialization"] = live.peak
    for part, num_bytes in measured.items():
        assert planned.peak_bytes(part) - planned.entries["context"] == pytest.approx(num_bytes, rel=0.1), part
    assert set(measured) == {*planned.parts_of_run} - {"export"}


def test_frozen_parameters_stay_but_are_not_trained(shape: str) -> None:
    all_, alone = (plan(small(shape, "train.dtype=bf16", *more)) for more in ((), ("optim.train_full_rank=false",)))
    full = all_.entries["full_rank_parameters"]
    assert alone.entries["full_rank_parameters"] == full and all_.num_trained - alone.num_trained == full // 2
    assert all_.entries["masters"] - alone.entries["masters"] == 2 * full
    assert all_.entries["gradients"] - alone.entries["gradients"] == full
    assert all_.entries["moments"] > alone.entries["moments"] + full


def test_the_cache_of_answers_is_that_of_transformers(tmp_path: Path) -> None:
    """Grouped keys, and one block twice: it is copied as it grows."""
    made = llama_config(num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(made.to_dict()))
    options = ["data.format=instruction", "data.path=x", "data.tokenizer=x", "data.sequence_length=40", "loqt.rank=8"]
    options += ["eval.metric=exact_match", "eval.micro_batch_size=3", "train.dtype=fp32", "train.device=cpu"]
    config = load_config(None, [f"model.shape={tmp_path / 'config.json'}", *options, "eval.max_new_tokens=9"])
    longer = load_config(None, [f"model.shape={tmp_path / 'config.json'}", *options, "eval.max_new_tokens=10"])
    cache = LlamaForCausalLM(made)(torch.zeros(3, 49, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    planned = plan(config)
    grown = plan(longer).entries["answers"] - planned.entries["answers"]
    assert grown * 49 == held // 3 * 4, "of three blocks, and one of them twice"
    assert planned.entries["answers"] > held and "evaluation" in planned.parts_of_run
    assert planned.peak_bytes("evaluation") == planned.phase_bytes("evaluation") > planned.entries["answers"]


# ---------------------------------------------------------------- questions


def test_the_largest_micro_batch_is_the_largest(shape: str) -> None:
    asker = Asker(small(shape, *LEAST))
    capacity = asker.plan("train.micro_batch_size=37").total_bytes
    assert asker.largest_micro_batch(capacity) == 37
    assert asker.largest_micro_batch(capacity - 1) == 36
    assert asker.largest_micro_batch(asker.plan("train.micro_batch_size=1").total_bytes - 1) == 0


def test_what_is_proposed_fits_and_what_costs_least_is_first(shape: str) -> None:
    config = small(shape, "train.dtype=bf16", "optim.name=adamw", "train.micro_batch_size=8")
    asker = Asker(config)
    capacity = asker.plan("optim.layerwise=true").total_bytes
    proposals = asker.nearest(capacity)
    assert proposals[0].overrides == ("optim.layerwise=true",)
    for proposal in proposals:
        assert proposal.plan.total_bytes <= capacity
        assert asker.plan(*proposal.overrides).total_bytes == proposal.plan.total_bytes
    assert len({proposal.overrides for proposal in proposals}) == len(proposals) <= 3


def test_a_combination_gives_up_nothing_that_is_not_needed(shape: str) -> None:
    asker = Asker(small(shape, "train.dtype=bf16", "optim.name=adamw", "train.micro_batch_size=8"))
    target = "optim.master=bf16", "optim.name=adamw8bit", "train.micro_batch_size=4", "optim.layerwise=true"
    capacity = asker.plan(*target).total_bytes
    found = asker.nearest(capacity)[0]
    assert len(found.overrides) > 1 and found.plan.total_bytes <= capacity
    assert not any("loqt.rank" in each for each in found.overrides)  # what costs most is not needed
    for override in found.overrides:
        others = [each for each in found.overrides if each != override]
        assert asker.plan(*others).total_bytes > capacity, override


def test_rows_of_a_step_are_accumulated_where_they_can_be(shape: str) -> None:
    asker = Asker(small(shape, "train.dtype=bf16", "train.micro_batch_size=64"))
    capacity = asker.plan("train.micro_batch_size=16", "train.gradient_accumulation_steps=4").total_bytes
    assert any("train.gradient_accumulation_steps=4" in p.overrides for p in asker.nearest(capacity, limit=9))


def test_proposals_can_be_honoured(shape: str) -> None:
    """No layer-wise updates under ZeRO, or with clipping by the norm of all."""
    for asker in (
        Asker(small(shape, "train.dtype=bf16"), world_size=2, ds_config=ZERO2),
        Asker(small(shape, "train.dtype=bf16", "train.max_grad_norm=1")),
    ):
        proposals = asker.nearest(int(1.02 * GIB), limit=20)
        assert proposals and not any("optim.layerwise=true" in p.overrides for p in proposals)
    with pytest.raises(ConfigError, match="optim.layerwise"):
        Asker(small(shape), world_size=2, ds_config=ZERO2).plan("optim.layerwise=true")


def test_a_run_is_told_before_it_would_not_fit(shape: str) -> None:
    asker = Asker(small(shape, "train.dtype=bf16"))
    planned = asker.plan()
    said: list[str] = []
    check_fits(asker, planned.total_bytes, "cuda:0", say=said.append)
    assert not said
    check_fits(asker, planned.total_bytes - 1, "cuda:0", say=said.append)
    assert "warning: cuda:0 has" in said[0] and "fits with optim.master=bf16" in said[0]
    with pytest.raises(ConfigError, match=r"train.memory_limit_gib=0.001: less than the .* GiB that weights") as caught:
        check_fits(asker, planned.persistent_bytes - 1, "train.memory_limit_gib=0.001", say=said.append)
    assert "memory" in str(caught.value).splitlines()[-1] and len(said) == 1


def test_a_run_says_its_plan_and_keeps_to_its_limit(shape: str) -> None:
    """Of the device, or of train.memory_limit_gib."""

    def said(*overrides: str) -> list[str]:
        config = small(shape, "train.dtype=bf16", "train.gradient_accumulation_steps=2", *overrides)
        lines: list[str] = []
        check_memory(config, planned_model(config)[0], torch.device("cpu"), None, 1, say=lines.append)
        return lines

    assert len(said()) == 1 and said()[0].startswith("planned memory: 0.5") and "re-initialization 0.5" in said()[0]
    assert "keeps a gradient of every parameter" in said("optim.layerwise=true")[1]
    assert "warning: train.memory_limit_gib=0.51," in said("train.memory_limit_gib=0.51")[1]
    with pytest.raises(ConfigError, match="train.memory_limit_gib=0.0001: less than"):
        said("train.memory_limit_gib=0.0001")


def test_a_run_keeps_all_activations_where_there_is_room(shape: str) -> None:
    """Four fifths of what it may use, and not below what keeping all is planned to take; a lean run stays lean."""

    def resolved(limit_gib: float, *overrides: str, before: bool | None = None) -> Any:
        config = small(shape, f"train.memory_limit_gib={limit_gib:.9f}", *overrides)
        checkpoint = None
        if before is not None:
            old = config.to_dict() | {"train": {"lean_activations": before}}
            checkpoint = Checkpoint(Path("step_1"), 1, {"config": old}, {})
        description = planned_model(config)[0]
        return resolve_activations(config, description, torch.device("cpu"), None, ALONE, checkpoint).train

    stock = plan(small(shape, "train.lean_activations=false")).total_bytes
    least = plan(small(shape)).total_bytes
    assert least == plan(small(shape, "train.lean_activations=true")).total_bytes < stock
    room, scarce = stock / 0.8 * 1.001 / GIB, stock / 0.8 * 0.999 / GIB
    assert resolved(room).lean_activations is False
    assert resolved(scarce).lean_activations is True
    assert resolved(scarce, "train.lean_activations=false").lean_activations is False
    assert resolved(room, "train.lean_activations=true").lean_activations is True
    assert resolved(room, before=True).lean_activations is True
    assert resolved(room, before=False).lean_activations is False
    assert resolved(scarce, before=False).lean_activations is True


@pytest.mark.parametrize("size", [10, 1])
@pytest.mark.parametrize(("free", "limit"), [(1000, None), (99, None), (1000, 120), (1000, 119)])
def test_a_full_card_exports_from_the_host(
    monkeypatch: pytest.MonkeyPatch, free: int, limit: int | None, size: int
) -> None:
    """Of 20 bytes that are allocated, the network has `size`: without it there is room, or is none."""
    limit_gib, card, host = None if limit is None else limit / 2**30, torch.device("cuda", 0), torch.device("cpu")
    moved: list[Any] = []
    lowered = 0 if limit in (None, 120) else 9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 10 - (9 if free == 99 else 0), 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 + lowered - size * len(moved))
    network, said = torch.nn.Linear(2, 2, device="meta"), list[str]()
    monkeypatch.setattr(network, "to", moved.append)
    where = make_room(network, card, 100, limit_gib=limit_gib, say=said.append)
    if free == 1000 and limit != 119:
        assert (where, moved, said) == (card, [], [])
    else:
        assert moved == ["cpu"] and where == (card if size == 10 else host)
        assert len(said) == (1 if size == 10 else 2) and ("eval.max_tokens" in said[-1]) == (size == 1)
    moved.clear()
    said.clear()
    assert make_room(network, host, 100, limit_gib=limit_gib, say=said.append) == host and (moved, said) == ([], [])


# ---------------------------------------------------------------- the machine


def test_memory_of_a_container(tmp_path: Path) -> None:
    """Control groups of both versions, the smallest limit around the process counts; `max` is none."""
    own = tmp_path / "cgroup"
    top = tmp_path / "fs"
    (top / "a" / "b").mkdir(parents=True)
    (top / "memory" / "job").mkdir(parents=True)
    own.write_text("0::/a/b\n5:cpu,cpuacct:/job\n4:memory:/job\n")
    machine = host_bytes(cgroups=top, own=tmp_path / "nothing")
    assert host_bytes(cgroups=top, own=own) == machine > 2**28
    (top / "a" / "b" / "memory.max").write_text("max\n")
    (top / "a" / "memory.max").write_text("20000000\n")
    assert host_bytes(cgroups=top, own=own) == 20_000_000
    (top / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    (top / "memory" / "job" / "memory.limit_in_bytes").write_text("10000000")
    assert host_bytes(cgroups=top, own=own) == 10_000_000
    own.write_text("0::/elsewhere/on/the/host\n")
    (top / "memory.max").write_text("30000000\n")
    assert host_bytes(cgroups=top, own=own) == 30_000_000


# ---------------------------------------------------------------- the command


def test_questions_on_the_command_line(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--shape", shape, "--rank", "64"]
    assert main([*base, "--tokens", "512", "--card-gib", "2"]) == 0
    out = capsys.readouterr().out
    assert "512 tokens in a micro-batch" in out and "2 GiB: fits" in out and "largest micro-batch" in out
    assert "train.lean_activations=auto is counted as true" in out
    assert main([*base, "--tokens", "300", "--card-gib", "1.01"]) == 0
    out = capsys.readouterr().out
    assert "300 tokens in a micro-batch" in out and "does not fit" in out
    assert main([*base, "--tokens", "256"]) == 0
    out = capsys.readouterr().out
    assert torch.cuda.is_available() or all(f"a card of {size} GB" in out for size in (8, 12, 16, 24, 48, 80))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "7b", "--gpus", "2", "--engine", "single"], "one process has one GPU"),
        (["--shape", "7b", "--engine", "zero9"], "zero2"),
        (["--shape", "7b", "--gpus", "0"], "at least 1"),
        (["--shape", "7b", "--tokens", "4097"], "max_position_embeddings"),
        (["--shape", "7b", "--tokens", "1"], "--tokens=1"),
        (["--shape", "7b", "--card-gib", "0"], "above 0"),
        (["--shape", "7b", "--gpus", "2", "optim.layerwise=true"], "ZeRO updates after the backward"),
        (["--shape", "8b"], "llama_7b"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
