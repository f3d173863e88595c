"""How ranks divide what a run keeps: the planner's counts under ZeRO and FSDP2 against tensors that are cut by torch
and stepped by bitsandbytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from loqt_ds.config import Config, ConfigError, load_config
from loqt_ds.memory import GIB, Asker, Division, MemoryPlan, division_of, plan
from loqt_ds.memory.command import main
from loqt_ds.memory.division import rows_share, touched
from loqt_ds.preflight import check_memory

RANK, VOCABULARY = 20, 331
ZERO2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500, "overlap_comm": True}}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """Sides that are not multiples of anything: parts of four ranks differ."""
    content = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 128, "hidden_size": 78}
    content |= {"intermediate_size": 203, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 14}
    content |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(content))
    return str(file)


def configured(shape: str, *overrides: str) -> Config:
    base = [f"loqt.rank={RANK}", "data.sequence_length=32", "train.micro_batch_size=3", "train.dtype=bf16"]
    return load_config(None, [f"model.shape={shape}", *base, *overrides])


def planned(shape: str, world_size: int, *overrides: str) -> MemoryPlan:
    config = configured(shape, "engine=fsdp2", *overrides)
    return plan(config, division=division_of(config, world_size=world_size))


def real_model(shape: str) -> nn.Module:
    description = AutoConfig.for_model(**json.loads(Path(shape).read_text()))
    return AutoModelForCausalLM.from_config(description, dtype=torch.float32)


def adapted(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def trained(shape: str) -> dict[str, Tensor]:
    """Zeros of the shapes of what is trained: all but the adapted weights, and B on the larger side of each."""
    model = real_model(shape)
    found = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if "_proj" not in name}
    for name, linear in adapted(model).items():
        # canonical B is (out, r) where in <= out, else (r, in)
        right = linear.in_features <= linear.out_features
        found[name] = torch.zeros(linear.out_features, RANK) if right else torch.zeros(RANK, linear.in_features)
    return found


def first_part(tensor: Tensor, parts: int) -> Tensor:
    """The fullest: torch gives the others no more."""
    return tensor.chunk(parts)[0].clone()


def stepped_moments(parts: dict[str, Tensor], whole: dict[str, Tensor], name: str) -> int:
    """Bytes of the moments that optimizers leave for parts, in 8 bits where the whole has 4096 elements."""
    total = 0
    for key, part in parts.items():
        parameter = nn.Parameter(part)
        parameter.grad = torch.ones_like(part)
        if name == "adamw":
            optimizer: Any = torch.optim.AdamW([parameter])
        else:
            at_least = 1 if whole[key].numel() >= 4096 else 10**9
            optimizer = bitsandbytes.optim.AdamW8bit([parameter], min_8bit_size=at_least)
        optimizer.step()
        state = optimizer.state[parameter]
        total += sum(v.nbytes for k, v in state.items() if isinstance(v, Tensor) and k != "step" and "qmap" not in k)
    return total


# ---------------------------------------------------------------- ZeRO


@pytest.mark.parametrize(
    ("dtype", "master", "per_master"), [("fp32", "fp32", 4), ("bf16", "fp32", 4), ("bf16", "bf16", 2)]
)
def test_ranks_divide_what_zero_divides(shape: str, dtype: str, master: str, per_master: int) -> None:
    """DEEPSPEED.md's table: weights whole, masters and moments over N, gradients over N at stage 2 only."""
    config = configured(shape, f"train.dtype={dtype}", f"optim.master={master}", "optim.name=adamw")
    alone = plan(config)
    for stage in (0, 1, 2):
        for ranks in (1, 4):
            file = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}
            entries = plan(config, division=division_of(config, world_size=ranks, ds_config=file)).entries
            if stage:  # each of three flat vectors is padded
                assert entries["masters"] == pytest.approx(per_master * alone.num_trained // ranks, abs=4 * 3)
                assert entries["moments"] == pytest.approx(8 * alone.num_trained // ranks, abs=8 * 3)
                assert entries["buckets"] == 1000 * (4 if dtype == "fp32" else 2)
            else:
                assert (entries["moments"], entries["buckets"]) == (alone.entries["moments"], 0)
            if stage < 2 or ranks == 1:
                assert entries["gradients"] == alone.entries["gradients"]
            else:  # whole parameters: no less than a share, no more than all that may straddle besides
                share = alone.entries["gradients"] / ranks
                assert share <= entries["gradients"] < alone.entries["gradients"]
            for name in ("weights_w", "projections_p", "factors_b", "full_rank_parameters", "activations", "loss"):
                assert entries[name] == alone.entries[name], name
    assert division_of(config, world_size=4, ds_config=ZERO2) == Division(4, "flat", 4, True, bucket_elements=1000)


def test_a_partition_keeps_whole_gradients_of_what_it_touches() -> None:
    """By hand: vectors of 10 elements in 2 and 3 partitions."""
    assert touched([4, 4, 2], 2) == 8  # 0-4 touches the first two, 5-9 the last two
    assert touched([4, 4, 2], 3) == 4  # 0-3, 4-7, 8-9: one each
    assert touched([10], 4) == 10
    assert touched([2, 2, 2, 2, 2], 5) == 2


# ---------------------------------------------------------------- FSDP2


def test_the_fullest_rank_has_torchs_first_chunk() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        rows, columns, parts = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(3))
        tensor = torch.empty(rows, columns) if rows % 2 else torch.empty(rows)
        assert rows_share(tensor.shape, parts) == max(chunk.numel() for chunk in tensor.chunk(parts))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(("dtype", "master", "width"), [("fp32", "fp32", 4), ("bf16", "fp32", 4), ("bf16", "bf16", 2)])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_trained_state_is_that_of_rows(
    shape: str, ranks: int, dtype: str, master: str, width: int, optimizer: str
) -> None:
    options = f"train.dtype={dtype}", f"optim.master={master}", f"optim.name={optimizer}"
    entries = planned(shape, ranks, *options).entries
    whole = trained(shape)
    parts = {name: first_part(tensor, ranks) for name, tensor in whole.items()}
    factors = sum(part.numel() for name, part in parts.items() if "_proj" in name)
    assert entries["factors_b"] == width * factors
    num = sum(part.numel() for part in parts.values())
    assert entries["full_rank_parameters"] == width * (num - factors)
    assert entries["gradients"] == width * num
    assert entries["masters"] == 0
    assert entries["moments"] == stepped_moments(parts, whole, optimizer)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_packed_bytes_are_cut_where_they_are_sharded(shape: str, ranks: int, is_sharded: bool) -> None:
    entries = planned(shape, ranks, f"fsdp.shard_frozen={str(is_sharded).lower()}").entries
    total, largest = 0, 0
    for linear in adapted(real_model(shape)).values():
        sides = min(linear.in_features, linear.out_features)
        of_layer = 0
        for matrix in (linear.weight.detach(), torch.randn(sides, RANK)):
            codes, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=False)
            for tensor in (codes.view(-1).view(torch.uint8), state.absmax.view(torch.uint8)):
                words = nn.functional.pad(tensor, (0, len(tensor) % 2)).view(torch.bfloat16)
                total += words.chunk(ranks)[0].nbytes if is_sharded and ranks > 1 else len(tensor)
                of_layer += len(tensor)
        largest = max(largest, of_layer)
    assert entries["weights_w"] + entries["projections_p"] == total
    assert entries["reinit_packed"] == (largest if is_sharded and ranks > 1 else 0)


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_is_gathered_and_reduced(shape: str, ranks: int) -> None:
    """Two blocks, and the root; gradients of a block in bf16 beside its reduction's float32, of the root at the end."""

    def padded(tensor: Tensor) -> int:
        return ranks * first_part(tensor, ranks).numel()

    whole = trained(shape)
    blocks = [{n: t for n, t in whole.items() if f"layers.{number}." in n} for number in range(3)]
    root = {n: t for n, t in whole.items() if "layers." not in n}
    assert set(root) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    of_block = 2 * sum(padded(t) for t in blocks[0].values())
    entries = planned(shape, ranks).entries
    assert entries["gathered_blocks"] == (1 if ranks == 1 else 2) * of_block
    assert entries["gathered_root"] == 2 * sum(padded(t) for t in root.values())
    assert entries["buckets"] == (2 + 4) * sum(t.numel() for t in blocks[0].values())
    assert entries["new_gradient"] == 2 * sum(t.numel() for n, t in root.items() if "embed" not in n)
    embedding = VOCABULARY * 78
    of_root = sum(t.numel() for t in root.values())
    own = 4 * sum(first_part(t, ranks).numel() for t in root.values())
    # either all in bf16 and in float32, before there is a result; or the embedding's, float32, and the result
    after = 4 * of_root + (2 * embedding if ranks > 1 else 0)
    assert entries["root_buckets"] == max((2 + 4) * of_root - own, after)
    accumulated = planned(shape, ranks, "train.gradient_accumulation_steps=2").entries
    assert accumulated["root_buckets"] == max((2 + 4) * of_root, after + own)
    on_host = planned(shape, ranks, "train.device=cpu").entries
    assert on_host["buckets"] == (8 if ranks > 1 else 6) * sum(t.numel() for t in blocks[0].values())
    assert on_host["root_buckets"] >= (8 if ranks > 1 else 4) * of_root
    all_stay = planned(shape, ranks, "fsdp.reshard_after_forward=false").entries
    assert all_stay["gathered_blocks"] == all_stay["gathered_all"] == 3 * of_block
    sharded = planned(shape, ranks, "fsdp.shard_frozen=true").entries
    packed = sharded["weights_w"] + sharded["projections_p"]
    of_frozen = 2 * ranks * packed // 3 if ranks > 1 else 0
    assert sharded["gathered_blocks"] == entries["gathered_blocks"] + of_frozen
    tied = json.loads(Path(shape).read_text()) | {"tie_word_embeddings": True}
    Path(shape).write_text(json.dumps(tied))
    assert planned(shape, ranks).entries["new_gradient"] == 2 * (embedding + 78)  # the head's is the embedding's


def test_groups_that_hold_everything_divide_among_themselves(shape: str) -> None:
    """Hybrid sharding: four ranks in two groups keep what two ranks keep."""
    options = "fsdp.shard_frozen=true", "loqt.subspace=sketch"
    two = planned(shape, 2, *options)
    hybrid = planned(shape, 4, *options, "fsdp.num_replicas=2")
    four = planned(shape, 4, *options)
    assert hybrid.persistent_bytes == two.persistent_bytes > four.persistent_bytes
    config = configured(shape, "engine=fsdp2", "fsdp.num_replicas=2")
    assert division_of(config, world_size=2).frozen is False
    with pytest.raises(ConfigError, match=r"fsdp.num_replicas=2.*3 ranks"):
        division_of(config, world_size=3)


@pytest.mark.parametrize(
    ("ranks", "replicas", "words"),
    [(1, 1, "there is one rank"), (4, 4, "each of 4 ranks .*fsdp.num_replicas=4"), (4, 2, None)],
)
def test_nothing_to_shard_is_said(shape: str, ranks: int, replicas: int, words: str | None) -> None:
    config = configured(shape, "engine=fsdp2", "fsdp.shard_frozen=true", f"fsdp.num_replicas={replicas}")
    asker = Asker(config, vocab_size=VOCABULARY, world_size=ranks)
    notes = [note for note in asker.plan().notes if "shard_frozen" in note]
    assert len(notes) == (words is not None)
    assert words is None or re.search(f"shards nothing: {words}", notes[0])
    told: list[str] = []
    check_memory(config, SimpleNamespace(vocab_size=VOCABULARY), torch.device("cpu"), None, ranks, say=told.append)
    assert [line for line in told if "shard_frozen" in line] == notes


def test_ranks_hold_less_the_more_there_are(shape: str) -> None:
    """Sharded, what stays goes with 1/N (but for odd rows); else W and P stay as they are."""
    for is_sharded in (False, True):
        option = f"fsdp.shard_frozen={str(is_sharded).lower()}"
        one, *more = [planned(shape, n, option).persistent_bytes for n in (1, 2, 4)]
        entries = planned(shape, 1).entries
        kept = 0 if is_sharded else entries["weights_w"] + entries["projections_p"]
        for n, found in zip((2, 4), more, strict=True):
            assert found - entries["buffers"] == pytest.approx(kept + (one - kept) / n, rel=0.06)


def test_frozen_parameters_are_cut_but_have_no_master(shape: str) -> None:
    entries = planned(shape, 4, "optim.train_full_rank=false").entries
    others = {name: t for name, t in trained(shape).items() if "_proj" not in name}
    assert entries["full_rank_parameters"] == 2 * sum(first_part(t, 4).numel() for t in others.values())
    assert entries["new_gradient"] == entries["root_buckets"] == 0
    assert entries["gathered_root"] > 0


# ---------------------------------------------------------------- questions


def test_proposals_shard_more_and_never_update_layer_by_layer(shape: str) -> None:
    config = configured(shape, "engine=fsdp2", "fsdp.num_replicas=2")
    asker = Asker(config, world_size=4)
    for sharded in (("fsdp.shard_frozen=true",), ("fsdp.num_replicas=1",)):
        room = asker.plan(*sharded).total_bytes
        found = asker.nearest(room, limit=20)
        assert sharded in [proposal.overrides for proposal in found]
        assert all(proposal.plan.total_bytes <= room for proposal in found)
        assert not any("optim.layerwise=true" in proposal.overrides for proposal in found)
    with pytest.raises(ConfigError, match="optim.layerwise=true with engine=fsdp2"):
        asker.plan("optim.layerwise=true")
    gathered = Asker(configured(shape, "engine=fsdp2", "fsdp.reshard_after_forward=false"), world_size=4)
    room = gathered.plan("fsdp.reshard_after_forward=true").total_bytes
    assert gathered.nearest(room)[0].overrides == ("fsdp.reshard_after_forward=true",)
    # One keeps W dequantized, the other lets go of it.
    cached = Asker(configured(shape, "engine=fsdp2", "loqt.dequantized_cache_gib=1"), world_size=4)
    both = "fsdp.shard_frozen=true", "loqt.dequantized_cache_gib=0"
    assert both in [p.overrides for p in cached.nearest(cached.plan(*both).total_bytes, limit=20)]
    alone = Asker(configured(shape), world_size=1)
    assert not any("fsdp" in o for p in alone.nearest(int(0.51 * GIB), limit=20) for o in p.overrides)


def test_70b_starts_on_eight_cards_of_24_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """W alone is more than a card where it is not sharded."""
    base = ["--config", "fsdp2_70b_8x24gb", "--gpus", "8", "--card-gib", "23.4"]
    assert main(base) == 0
    out = capsys.readouterr().out
    assert "llama_70b" in out or "fsdp2_70b_8x24gb" in out
    assert "23.4 GiB on each of 8 GPUs: fits" in out
    assert main([*base, "fsdp.shard_frozen=false"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "fits with fsdp.shard_frozen=true" in out
    config = load_config("fsdp2_70b_8x24gb", ["fsdp.shard_frozen=false"])
    replicated = plan(config, division=division_of(config, world_size=8))
    assert replicated.entries["weights_w"] / GIB > 23.4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "3", "--engine", "fsdp2", "fsdp.num_replicas=2"], "divisor of 3"),
        (["--gpus", "2", "--engine", "fsdp2", "optim.layerwise=true"], "layerwise=true with engine=fsdp2"),
        (["--gpus", "2", "--engine", "zero2", "engine=fsdp2"], "engine=auto"),
        (["--gpus", "2", "fsdp.shard_frozen=true"], "engine=auto"),
    ],
)
def test_what_the_engine_has_not_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--shape", "7b", *arguments]) == 2
    assert words in capsys.readouterr().err
