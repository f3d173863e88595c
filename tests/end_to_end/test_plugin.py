"""A DeepSpeed script that somebody already has, turned to LoQT by one line and a section of its JSON.

`plain_deepspeed.py` knows nothing of us. The LoQT version is made of its text here, so that what is claimed is tested.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from workshop import REPOSITORY, Result, command

from loqt_ds.engines.deepspeed import LoQTEngine, start_distributed

PLAIN = Path(__file__).parent / "plain_deepspeed.py"
TEXT = argparse.__file__  # real text that is always there
NUM_STEPS, SAVED_AT = 60, 35
INTERVAL = 20  # re-initializations at steps 0, 20 and 40


class Folder:
    """Both versions of the script with their configurations."""

    def __init__(self, path: Path) -> None:
        self.path = path
        plain = PLAIN.read_text(encoding="utf-8")
        turned = plain.replace("deepspeed.initialize(", "loqt_ds.initialize(")
        turned = turned.replace("import deepspeed\n", "import deepspeed\nimport loqt_ds\n")
        difference = list(difflib.ndiff(plain.splitlines(), turned.splitlines()))
        assert [line for line in difference if line[0] == "-"] == [
            "-     engine, _, loader, _ = deepspeed.initialize("
        ], "exactly one line changes"
        assert [line for line in difference if line[0] == "+"] == [
            "+ import loqt_ds",
            "+     engine, _, loader, _ = loqt_ds.initialize(",
        ]
        config = json.loads(PLAIN.with_suffix(".json").read_text(encoding="utf-8"))
        # Plain DeepSpeed would compile its own Adam on the CPU; this is the same one, of torch.
        config["optimizer"]["params"]["torch_adam"] = True
        loqt = {"rank": 16, "interval": INTERVAL, "schedule": "static"}
        for name, text, options in (("plain", plain, config), ("loqt", turned, config | {"loqt": loqt})):
            (path / f"{name}.py").write_text(text, encoding="utf-8")
            (path / f"{name}.json").write_text(json.dumps(options), encoding="utf-8")

    def arguments(self, name: str, *more: str | Path) -> list[str]:
        given = ["--deepspeed_config", self.path / f"{name}.json", "--text", TEXT, "--steps", NUM_STEPS, *more]
        return [str(word) for word in given]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("script"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of the scripts that run in this process; their group stays, its variables do not reach other tests."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    start_distributed()
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield


def module(folder: Folder, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", folder.path / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) lr \S+ loss (\S+)$", output, re.M)}


def rates(output: str) -> list[str]:
    return re.findall(r"^step \d+ lr (\S+) ", output, re.M)


def launched(result: Result) -> dict[int, float]:
    return losses(result.ok().output)


# ---------------------------------------------------------------- in one process


def test_it_learns_like_the_plain_script(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    """At the plain script's rates, loss for loss: the start is that of the quantized weights, the end is close."""
    module(folder, "plain").main(folder.arguments("plain"))
    plain = capfd.readouterr().out
    script = module(folder, "loqt")
    engine = script.main(folder.arguments("loqt"))
    ours = capfd.readouterr().out
    assert rates(ours) == rates(plain), "the JSON's scheduler"
    theirs, found = losses(plain), losses(ours)
    assert sorted(found) == sorted(theirs) == list(range(NUM_STEPS))
    assert found[0] == pytest.approx(theirs[0], rel=0.02)

    def last(values: dict[int, float]) -> float:
        return sum(values[step] for step in range(NUM_STEPS - 10, NUM_STEPS)) / 10

    assert last(theirs) < 0.5 * theirs[0]
    assert last(found) < 0.55 * found[0] and last(found) < 1.2 * last(theirs)
    check_export(engine, script, folder.path / "exported")


def check_export(engine: LoQTEngine, script: ModuleType, output: Path) -> None:
    """The original torch model loads what was trained, and computes what the engine computes."""
    engine.export(output, format="bf16")
    tensors = load_file(output / "model.safetensors")
    model = script.ByteModel()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    inputs, targets = (torch.stack(part) for part in zip(*(script.Text(TEXT)[i] for i in range(40)), strict=True))
    with torch.no_grad():
        expected = engine.module(inputs.to(engine.device), targets.to(engine.device)).item()
        assert model(inputs, targets).item() == pytest.approx(expected, rel=2e-3)


# ---------------------------------------------------------------- README

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S))
def test_the_code_in_readme_runs(block: str, tmp_path: Path) -> None:
    """As a file, with `python` alone; the model it exports is the one it trained."""
    asked = """
torch.manual_seed(1)
x = torch.randn(500, 63)
with torch.no_grad():
    print("engine", (engine(x) - x.roll(1, dims=1)).square().mean().item())
"""
    (tmp_path / "script.py").write_text(block + asked, encoding="utf-8")
    done = command(sys.executable, "script.py", cwd=tmp_path, timeout=300, DS_ACCELERATOR="cpu").ok()
    found = [float(line.split()[1]) for line in done.output.splitlines() if re.fullmatch(r"\d+ \d\.\d+", line)]
    assert len(found) == 100 and sum(found[-5:]) < 0.5 * sum(found[:5])
    assert (tmp_path / "saves" / "latest").is_file()
    model = torch.nn.Sequential(torch.nn.Linear(63, 171), torch.nn.GELU(), torch.nn.Linear(171, 63))
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    (of_engine,) = [float(line.split()[1]) for line in done.output.splitlines() if line.startswith("engine ")]
    torch.manual_seed(1)
    x = torch.randn(500, 63)
    # the rows of training are drawn anew in every run, so the two models are compared on the same ones
    assert (model(x) - x.roll(1, dims=1)).square().mean().item() == pytest.approx(of_engine, rel=0.01)


# ---------------------------------------------------------------- under launchers


def test_two_ranks_save_and_go_on(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    """`deepspeed --num_gpus 2`, and from its checkpoint `torchrun` with two ranks, and one process."""
    saves = folder.path / "saves"
    words = ["deepspeed", "--num_gpus", "2", folder.path / "loqt.py"]
    words += folder.arguments("loqt", "--save_dir", saves, "--save_at", str(SAVED_AT))
    variables = {"DS_ACCELERATOR": "cpu"}
    first = launched(command(*words, cwd=folder.path, timeout=300, **variables))
    assert sorted(first) == list(range(NUM_STEPS)) and first[NUM_STEPS - 1] < 0.6 * first[0]

    resume = folder.arguments("loqt", "--load_dir", saves)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*torchrun, folder.path / "loqt.py", *resume]
    again = launched(command(*words, cwd=folder.path, timeout=300, **variables))
    assert again == {step: first[step] for step in range(SAVED_AT, NUM_STEPS)}, "bit for bit"

    module(folder, "loqt").main(resume)
    alone = losses(capfd.readouterr().out)
    assert sorted(alone) == list(range(SAVED_AT, NUM_STEPS))
    for step in range(SAVED_AT, 2 * INTERVAL + 1):
        assert alone[step] == pytest.approx(first[step], rel=1e-3)
