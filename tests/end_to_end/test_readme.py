"""Every command in README.md is run, in the order it stands there, in a directory that looks like a fresh clone.

Training commands get a few overrides appended that shrink the run, not what it is made of: the default corpus, its
tokenizer and the default model are the ones a user gets. pytest only collects here; pip is compared, not run. A command
of a kind that is not known below fails the test, so that nothing in README goes untested.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from workshop import REPOSITORY, Result, command, events, losses

from loqt_ds.config import load_config

README = REPOSITORY / "README.md"

# A value that README itself gives is kept, except for the number of steps.
SMALLER = {
    "train.max_steps": 4,
    "train.micro_batch_size": 4,
    "loqt.interval": 2,
    "eval.every": 2,
    "eval.max_tokens": 1024,
    "eval.sample_tokens": 4,
    "checkpoint.every": 2,
    "train.device": "cpu",
}
SHELL_FENCES = {"sh", "shell", "console", "shell-session", "zsh"}


def blocks() -> list[list[list[str]]]:
    """The ```bash blocks; each a list of commands, each a list of words."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert not [language for language, _ in found if language in SHELL_FENCES], "write ```bash: this test reads those"
    return [commands(text) for language, text in found if language == "bash"]


def commands(text: str) -> list[list[str]]:
    """Words of each command of a block; `&&` and line ends separate them."""
    result: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        current: list[str] = []
        for word in [*lexer, "&&"]:
            if word == "&&":
                if current:
                    result.append(current)
                current = []
            else:
                assert not set(word) <= set("();<>|&"), f"{line!r}: {word!r} is not understood by this test"
                current.append(word)
    return result


# ---------------------------------------------------------------- one kind of command each


def smaller(words: list[str]) -> list[str]:
    given = {word.partition("=")[0] for word in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)?=.*", word)}
    kept = given - {"train.max_steps"}
    return [*words, *(f"{name}={value}" for name, value in SMALLER.items() if name not in kept)]


def run_training(words: list[str], clone: Path) -> None:
    before = set((clone / "runs").glob("*"))
    done = command(*smaller(words), cwd=clone).ok()
    (run,) = set((clone / "runs").glob("*")) - before
    assert f"run directory:   {run}" in done.output
    assert sorted(losses(run)) == [1, 2, 3, 4] and len(events(run, "reinit")) == 2
    assert (run / "export" / "model.safetensors").is_file() and events(run, "export")
    assert "token frequencies alone" in done.output and "--- sample 1" in done.output


def run_as_it_is(words: list[str], clone: Path) -> Result:
    return command(*words, cwd=clone).ok()


def check_pip(words: list[str], clone: Path) -> None:
    """Installing is what a fresh clone is for; here only that the command says what it must."""
    assert words[:3] == ["pip", "install", "-e"] and len(words) == 4, words
    found = re.fullmatch(r"\.(?:\[(\w+)\])?", words[3])
    assert found, words
    project = tomllib.loads((clone / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found[1] is None or found[1] in project["optional-dependencies"]


def collect(words: list[str], clone: Path) -> None:
    """The tests themselves are run by whoever runs this one."""
    done = command(sys.executable, "-m", *words, "--collect-only", "-q", "-p", "no:cacheprovider", cwd=REPOSITORY).ok()
    found = re.search(r"(\d+)(?:/\d+)? tests collected", done.output)
    assert found and int(found[1]) >= 1, done.output[-2000:]


def check_script(words: list[str], clone: Path) -> None:
    """.ci/run runs all tests, this one among them: only that a shell would run it."""
    script = clone / words[0]
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def run_command(words: list[str], clone: Path) -> None:
    program, rest = words[0], words[1:]
    if program == "pip":
        check_pip(words, clone)
    elif program == "pytest":
        collect(words, clone)
    elif program == ".ci/run":
        check_script(words, clone)
    elif program in ("deepspeed", "torchrun") and "launch/pretrain.py" in rest:
        run_training(words, clone)
    elif program == "python" and rest[:2] == ["-m", "loqt_ds.train"]:
        if "--help" in rest:
            assert "loqt.rank=128" in run_as_it_is(words, clone).output
        else:
            run_training(words, clone)
    elif program == "python" and rest[0] == "tools/plan_memory.py":
        assert re.search(r"24 GiB( on each of \d+ GPUs)?: fits", run_as_it_is(words, clone).output)
    elif program == "python" and rest[0] == "tools/profile_step.py":
        shown = run_as_it_is(words, clone).output
        assert "products of W" in shown and "Step with a re-initialization" in shown
        assert (clone / rest[rest.index("--trace") + 1]).stat().st_size > 0
    elif program == "python" and rest[0] == "tools/compare.py":
        # two of the methods, which need no package of a rival, and a few of the steps; the clone's folders are links to
        # the repository, whose results stay as they are
        report = clone / "compared/REPORT.md"
        fewer = ["--methods", "adamw", "loqt:32", "--steps", "4", "--output", str(report.parent)]
        assert str(report) in run_as_it_is([*words, *fewer], clone).output
        assert "loqt:32" in report.read_text(encoding="utf-8")
    elif program == "python" and rest[0] == "tools/architectures.py":
        assert "Conv1D" in run_as_it_is([*words, "--only", "gpt2"], clone).output
    elif program == "python" and rest[:2] == ["-m", "loqt_ds.generate"]:
        prompt = rest[rest.index("--prompt") + 1]
        shown = run_as_it_is(words, clone).output
        assert prompt in shown and len(shown.split(prompt, 1)[1].strip()) > 1
    elif program == "python" and rest[0] == "tools/export.py":
        assert "loaded with" in run_as_it_is(words, clone).output
        written = {"adapter": "adapter/adapter_config.json"}.get(rest[rest.index("--format") + 1], "config.json")
        assert (clone / rest[rest.index("--output") + 1] / written).is_file()
    else:
        pytest.fail(f"README has a command that no test knows how to run: {shlex.join(words)}")


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds, linked; runs/ is made in it and not in the repository."""
    folder = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    names = {name.split("/")[0] for name in tracked} or {path.name for path in REPOSITORY.iterdir()} - {"runs", ".git"}
    for name in names:
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def test_the_two_commands_open_the_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert blocks()[:2] == [
        [["pip", "install", "-e", "."], ["deepspeed", "launch/pretrain.py", "--ds_config", "configs/zero2.json"]],
        [["pip", "install", "-e", ".[test]"], ["pytest"]],
    ]
    assert "pip install -e . && deepspeed launch/pretrain.py --ds_config configs/zero2.json" in text
    assert "pip install -e '.[test]' && pytest" in text
    assert text.index("```bash") < 600, "one sentence, then the commands"


def test_every_command_runs(clone: Path) -> None:
    """In order: later ones use what earlier ones have made."""
    everything = [words for block in blocks() for words in block]
    assert len(everything) >= 6
    for words in everything:
        try:
            run_command(words, clone)
        except AssertionError as error:
            raise AssertionError(f"README says `{shlex.join(words)}`: {error}") from error


def test_options_of_commands_that_name_files_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are indented, not in a bash block, and cannot be run; that their programs take them can be seen."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    ((?:deepspeed|python) .*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)
        program = next(word for word in words if word.endswith(".py"))
        arguments = words[words.index(program) + 1 :]
        if program.startswith("tools/"):
            importlib.import_module(Path(program).stem).parser().parse_args(arguments)  # exits where it does not
        else:
            given = dict(word.split("=", 1) for word in arguments if "=" in word)
            (tmp_path / given["model.path"]).mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / "configs/models/llama_2m.json", tmp_path / given["model.path"] / "config.json")
            load_config(
                arguments[arguments.index("--config") + 1], [f"{name}={value}" for name, value in given.items()]
            )


def test_links_and_files_that_are_named_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (REPOSITORY / target).exists(), target
    for path in re.findall(r"`((?:loqt_ds|configs|tools|launch|benchmarks|tests)/[\w./-]*)`", text):
        assert (REPOSITORY / path).exists(), path


def test_placeholders_are_filled_in() -> None:
    assert "@@" not in README.read_text(encoding="utf-8")


def test_a_command_of_an_unknown_kind_fails(clone: Path) -> None:
    for line in ("make all", "python -m loqt_ds.dance", "python tools/absent.py", "pip install loqt-ds"):
        (words,) = commands(line)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            run_command(words, clone)
    with pytest.raises(AssertionError):
        commands("curl somewhere | sh")
