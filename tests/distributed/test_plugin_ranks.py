"""`loqt_ds.initialize` in two processes: what a DeepSpeed script on several ranks relies on.

Reference: one process, with the same weights and the same global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama_config, lm_loss, token_batch
from plain_net import HIDDEN, ROWS, Net, batch, held, learn, settings, start
from ranks import caught, fingerprint, launch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loqt_ds.engines.deepspeed import LoQTEngine, start_distributed
from loqt_ds.method.conversion import loqt_layers
from loqt_ds.ranks import Ranks

UNQUANTIZED = {"quantize_w": "none", "quantize_p": "none", "compensation_steps": 0}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the references in this process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    start_distributed()
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield


def prints(engine: LoQTEngine) -> dict[str, str]:
    return {name: fingerprint(tensor) for name, tensor in held(engine).items()}


# ---------------------------------------------------------------- weights


def initialized(ranks: Ranks, directory: str) -> dict[str, Any]:
    """Fingerprints after `initialize`, and losses, for each way to give weights. Ranks are seeded differently."""
    found: dict[str, Any] = {}

    def record(name: str, engine: LoQTEngine, losses: list[float]) -> None:
        found[name] = {"losses": losses, "held": prints(engine)}

    engine = start(Net(seed=3 + ranks.rank))  # rank 0's are taken
    record("memory", engine, learn(engine, 5))
    with torch.device("meta"):
        empty = Net()
    torch.manual_seed(ranks.rank)
    engine = start(empty, weights=Path(directory) / "net")
    record("directory", engine, learn(engine, 5))
    with torch.device("meta"):
        empty = Net()
    torch.manual_seed(ranks.rank)
    engine = start(empty, weights="init")
    record("init", engine, learn(engine, 5))
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(llama_config())
    engine = start(llama.train(), weights=Path(directory) / "llama")
    record("llama", engine, learn_llama(engine))
    return found


def learn_llama(engine: LoQTEngine) -> list[float]:
    losses = []
    for step in range(3):
        loss = lm_loss(engine, token_batch(step, rows=ROWS).chunk(engine.world_size)[engine.global_rank])
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / engine.world_size
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    return losses


def test_ranks_start_from_the_same_weights_however_they_are_given(tmp_path: Path) -> None:
    """And train like one process with these weights: of rank 0, of the files, of the seed."""
    original = Net(seed=3)
    for name in ("net", "llama"):
        (tmp_path / name).mkdir()
    save_file({n: p.detach().clone() for n, p in original.named_parameters()}, tmp_path / "net" / "model.safetensors")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(tmp_path / "llama")
    results = launch(2, initialized, directory=str(tmp_path))
    for name in results[0]:
        assert results[0][name] == results[1][name], f"{name}: the ranks hold the same bytes"

    assert results[0]["directory"] == results[0]["memory"]
    expected = learn(start(Net(seed=3)), 5)
    assert results[0]["memory"]["losses"] == pytest.approx(expected, rel=1e-3)
    with torch.device("meta"):
        empty = Net()
    expected = learn(start(empty, weights="init"), 5)
    assert results[0]["init"]["losses"] == pytest.approx(expected, rel=1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).train()
    assert results[0]["llama"]["losses"] == pytest.approx(learn_llama(start(loaded)), rel=1e-3)


# ---------------------------------------------------------------- steps


def trained(ranks: Ranks) -> dict[str, list[float]]:
    """Losses of each kind of loop, where nothing is quantized and so nothing can flip."""
    found = {}
    for stage in (0, 1, 2):
        config = settings(loqt=UNQUANTIZED, zero_optimization={"stage": stage}, gradient_clipping=0.3)
        found[f"stage {stage}"] = learn(start(config=config), 8)
    parts = settings(loqt=UNQUANTIZED, train_micro_batch_size_per_gpu=2, gradient_clipping=0.3)
    found["accumulation"] = learn(start(config=parts), 8)

    engine = start(config=settings(loqt=UNQUANTIZED, zero_optimization={"stage": 1}, gradient_clipping=0.3))
    found["evaluation on rank 0 alone"] = []
    for _ in range(8):
        if ranks.is_main:
            engine.eval()
            with torch.no_grad():
                engine(batch(99, rows=3))
            engine.train()
        found["evaluation on rank 0 alone"] += learn(engine, 1)

    model = Net()
    model.remember = lambda function, x: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True)
    overlapping = settings(loqt=UNQUANTIZED, zero_optimization={"overlap_comm": True}, gradient_clipping=0.3)
    found["recomputed, overlapping"] = learn(start(model, config=overlapping), 8)

    config = settings(loqt=UNQUANTIZED, zero_optimization={"stage": 0}, gradient_clipping=0.3)
    found["no_sync"] = without_sums(start(config=config), 8)
    return found


def without_sums(engine: LoQTEngine, num_steps: int) -> list[float]:
    """Two backwards in each step; gradients are summed over the ranks in the second only."""
    losses = []
    for step in range(num_steps):
        one, two = batch(step).chunk(engine.world_size)[engine.global_rank].chunk(2)
        with engine.no_sync():
            first = engine(one)
            engine.backward(first / 2)
        second = engine(two)
        engine.backward(second / 2)
        engine.step()
        mean = (first.detach() + second.detach()) / 2 / engine.world_size
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    return losses


def test_two_ranks_train_like_one() -> None:
    expected = learn(start(config=settings(loqt=UNQUANTIZED, gradient_clipping=0.3)), 8)
    assert expected[-1] < expected[0]
    for result in launch(2, trained):
        for name, losses in result.items():
            assert losses == pytest.approx(expected, rel=1e-5), name


# ---------------------------------------------------------------- buffers of the user's


class Normed(Net):
    """With a batch norm, whose running means follow the rows of their rank."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.batch_norm = nn.BatchNorm1d(HIDDEN)

    def middle(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.up(x)))
        return x + self.down(self.batch_norm(y.flatten(0, 1)).view(y.shape))


def with_batch_norm(ranks: Ranks, root: str) -> dict[str, Any]:
    engine = start(Normed())
    losses = learn(engine, 8)
    own = engine.module.batch_norm.running_mean.clone()
    engine.save_checkpoint(root)
    again = start(Normed(seed=1))
    again.load_checkpoint(root)
    return {
        "losses": losses,
        "own": own,
        "loaded": again.module.batch_norm.running_mean.clone(),
        "count": int(again.module.batch_norm.num_batches_tracked),
    }


def test_running_means_are_each_ranks_own_and_rank_0s_are_saved(tmp_path: Path) -> None:
    one, two = launch(2, with_batch_norm, root=str(tmp_path))
    assert one["losses"] == two["losses"] and one["losses"][-1] < one["losses"][0]
    assert not torch.equal(one["own"], two["own"])
    assert torch.equal(one["loaded"], one["own"]) and torch.equal(two["loaded"], one["own"])
    assert one["count"] == two["count"] == 8


# ---------------------------------------------------------------- saving, loading, exporting

SCHEDULED = {
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 12}},
    "loqt": {"interval": 8, "optim": {"name": "adamw8bit"}},
    "bf16": {"enabled": True},
}


def saved(ranks: Ranks, root: str) -> dict[str, Any]:
    """A run that saves, one that goes on from there, and what is exported."""
    folder = Path(root)
    engine = start(config=settings(**SCHEDULED))
    learn(engine, 10)
    engine.save_checkpoint(folder / "saves", tag="ten", client_state={"epoch": 1})
    expected, lr = learn(engine, 5), engine.get_lr()
    again = start(Net(seed=9 + ranks.rank), config=settings(**SCHEDULED))
    path, client = again.load_checkpoint(folder / "saves")
    losses = learn(again, 5)
    engine.export(folder / "out", format="bf16")
    unfit = caught(lambda: engine.export(folder / "nf4", format="nf4"))
    own_text = {"rank": ranks.rank} if ranks.is_main else {"rank": torch.ones(1)}
    unsaved = caught(lambda: engine.save_checkpoint(folder / "unsaved", client_state=own_text))
    with torch.no_grad():
        exported = engine.module(batch(50)).item()
    return {
        "expected": expected,
        "losses": losses,
        "lr": lr == again.get_lr(),
        "path": path,
        "client": client,
        "loss": exported,
        "unfit": unfit,
        "unsaved": unsaved,
    }


def test_saving_loading_and_exporting_are_acts_of_all_ranks(tmp_path: Path) -> None:
    results = launch(2, saved, root=str(tmp_path))
    for result in results:
        assert result["losses"] == result["expected"] and result["lr"]
        assert result["path"] == str(tmp_path / "saves" / "ten") and result["client"] == {"epoch": 1}
        assert result["unfit"], "each rank learns that it was refused"
    assert "client_state is not JSON" in results[1]["unsaved"] and results[0]["unsaved"]
    assert not (tmp_path / "unsaved").exists()

    model = Net(seed=7)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert model(batch(50)).item() == pytest.approx(results[0]["loss"], rel=5e-3)

    alone = start(Net(seed=8), config=settings(**SCHEDULED))
    alone.load_checkpoint(tmp_path / "saves")
    assert learn(alone, 5) == pytest.approx(results[0]["expected"], rel=1e-3)
    assert len(loqt_layers(alone.module)) == 3


# ---------------------------------------------------------------- an error of one rank


def wrong_on_one(ranks: Ranks) -> dict[str, str]:
    model = Net()
    weights = "init" if ranks.is_main else "/absent"
    with torch.device("meta"):
        empty = Net()
    given = [{"params": (model if ranks.is_main else Net()).parameters()}]
    return {
        "weights": caught(lambda: start(empty, weights=weights)),
        "parameters": caught(lambda: start(model, model_parameters=given)),
        "config": caught(lambda: start(Net(), config=settings(loqt={"rank": 8 if ranks.is_main else 800}))),
    }


def test_what_one_rank_refuses_ends_all_of_them() -> None:
    """Instead of leaving the others to wait until the collective times out."""
    one, two = launch(2, wrong_on_one)
    assert two["weights"].startswith("ConfigError: weights='/absent'") and "PeerFailed" in one["weights"]
    assert "is not the model's" in two["parameters"] and "PeerFailed" in one["parameters"]
    assert "loqt.rank=800" in two["config"] and "PeerFailed" in one["config"]
