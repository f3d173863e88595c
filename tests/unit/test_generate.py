"""`python -m loqt_ds.generate` against transformers' own generation, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import checkpoint_of, export, llama, trained
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from loqt_ds.config import DataConfig
from loqt_ds.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from loqt_ds.data.tokenizer import _with_real_spaces as with_real_spaces
from loqt_ds.export import export_checkpoint
from loqt_ds.generate import Sampling, _opening, _Printer, _writer, load, main, write

WORDS = ("one", "two", "three", "four", "five")
TEXT = [f"the quick brown fox {word} jumps over\n  the lazy dog {word}s" for word in WORDS]
PROMPT = "the lazy fox"


class Made:
    """A model, its bf16 export and a checkpoint of it, all with a tokenizer."""

    def __init__(self, root: Path) -> None:
        pieces = with_real_spaces(train_sentencepiece(TEXT * 20, 340))
        self.tokenizer = SentencePieceTokenizer(pieces, "test", trained_here=True)
        self.tokenizer.save(root / "words", texts=TEXT)
        config = llama(vocab_size=340, num_hidden_layers=1)
        self.config, self.model = config, trained(config)
        self.export = root / "export"
        export(self.model, config, self.export, format="bf16", tokenizer_dir=root / "words", verify=False)
        self.checkpoint = checkpoint_of(self.model, config, root / "run" / "checkpoints", loqt={})
        (root / "run" / "tokenizer" / "tokenizer.json").unlink()
        self.bare = root / "bare"
        export(self.model, config, self.bare, format="bf16", verify=False)
        self.words = root / "words"

    def greedy(self, model: Any, prompt: str, number: int) -> list[int]:
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        eot = self.tokenizer.eot_id
        made = model.generate(ids, max_new_tokens=number, do_sample=False, eos_token_id=eot, pad_token_id=3)
        return made[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in ("--device", "cpu", *arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_an_export_writes_what_transformers_does(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(made.export, None, None, around=None, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(made.export)
    for prompt in (PROMPT, "two dogs"):
        ids = write(loaded, prompt, Sampling(9, 0.0, 50), seed=0)
        assert ids == made.greedy(model, prompt, 9)
        assert capsys.readouterr().out.startswith(prompt)
    assert len(write(loaded, PROMPT, Sampling(60, 0.0, 50), seed=0)) == 48 - len(made.tokenizer.encode(PROMPT))
    assert "ended at the 48 tokens that the model sees" in capsys.readouterr().err


def test_a_gguf_export_writes_with_the_tokens_of_training(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    export(made.model, made.config, tmp_path / "out", format="gguf", tokenizer_dir=made.words, verify=False)
    loaded = load(tmp_path / "out", None, None, around=None, device="cpu")
    assert loaded.opening("lazy  dogs") == made.tokenizer.encode("lazy  dogs")
    ids = write(loaded, PROMPT, Sampling(9, 0.0, 50), seed=0)
    assert ids == made.greedy(loaded.model, PROMPT, 9)


def test_what_comes_is_printed_as_it_is_spelled(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Token by token, characters of several bytes among them; spaces between words stay."""
    text = "the quick brown gr\u00f6\u00dfe \u6f22\u5b57\n  lazy dogs"
    ids = made.tokenizer.encode(text)
    printer = _Printer(load_tokenizer(str(made.words)), ids[:3])
    printer.put(torch.tensor([ids[:3]]))
    for index in ids[3:]:
        printer.put(torch.tensor([index]))
    printer.end()
    assert made.tokenizer.decode(ids[:3]) + capsys.readouterr().out == text + "\n"


def test_a_checkpoint_and_a_run_write_what_was_trained(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = made.greedy(made.model.eval(), PROMPT, 9)
    for path in (made.checkpoint, made.checkpoint.parents[1]):
        loaded = load(path, None, made.words, around=None, device="cpu")
        assert write(loaded, PROMPT, Sampling(9, 0.0, 50), seed=0) == wanted and "step 30" in loaded.what


def test_of_a_run_the_best_is_taken(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the run itself exports it; what is newer is said to be there. Not of a run that went on without keeping it."""
    run_dir = tmp_path / "run"
    checkpoint_of(trained(made.config), made.config, run_dir / "checkpoints", loqt={}, keeps_best=True)
    checkpoint_of(trained(made.config), made.config, run_dir / "best", loqt={}, step=20)
    loaded = load(run_dir, None, made.words, around=None, device="cpu")
    assert "best/step_20 (step 20)" in loaded.what
    assert f"--model={run_dir} keeps its best checkpoint" in capsys.readouterr().err
    assert "step 30" in load(run_dir / "checkpoints", None, made.words, around=None, device="cpu").what
    said: list[str] = []
    report = export_checkpoint(run_dir, tmp_path / "out", format="bf16", verify=False, say=said.append)
    assert "best/step_20 (step 20)" in report.source and "which is taken; its newest is in" in said[0]
    checkpoint_of(trained(made.config), made.config, run_dir / "checkpoints", loqt={}, step=40)
    assert "step 40" in load(run_dir, None, made.words, around=None, device="cpu").what


def test_sampling_goes_by_the_seed_and_templates_come_around(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", made.export, "--max-new-tokens", 12, "--temperature", 5)
    texts = [run(capsys, *common, "--seed", seed, "--prompt", PROMPT)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    plain = ("--model", made.export, "--max-new-tokens", 5, "--temperature", 0)
    _, around, _ = run(capsys, *plain, "--template", "the {prompt} dog", "--prompt", "lazy")
    _, whole, _ = run(capsys, *plain, "--prompt", "the lazy dog")
    assert around.removeprefix("lazy") == whole.removeprefix("the lazy dog")
    opening = _opening(DataConfig(prompt_template=r"Q: {prompt}\nA:"), load_tokenizer(str(made.words)))
    assert opening("lazy") == made.tokenizer.encode("Q: lazy\nA:")


def test_prompts_from_a_pipe_and_from_a_terminal(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--model", made.export, "--max-new-tokens", 3, "--temperature", 0)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run(capsys, *common)[1].startswith(PROMPT)
    terminal = io.StringIO(f"{PROMPT}\ntwo dogs\n\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    _, out, _ = run(capsys, *common)
    assert PROMPT in out and "two dogs" in out and out.count("> ") == 3


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="--model=DIR is a T5ForConditionalGeneration, which answers a text"):
        _writer(T5ForConditionalGeneration(config), "DIR", None)  # type: ignore[arg-type]


def test_mistakes_are_told(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = tmp_path / "more.model"
    more.write_bytes(train_sentencepiece(TEXT * 20, 350))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert main(["--model", str(made.export), "--device", "cpu"]) == 2
    assert "error: the prompt on standard input is not UTF-8" in capsys.readouterr().err
    for arguments, problem in (
        (("--model", tmp_path / "no"), "is no directory; give an export"),
        (("--model", tmp_path), "holds no checkpoint"),
        (("--model", made.bare), "--tokenizer DIR"),
        (("--model", made.export, "--adapter", tmp_path), "holds no adapter_config.json"),
        (("--model", made.checkpoint, "--adapter", tmp_path), "give the base's directory"),
        (("--model", made.export, "--template", "Q:"), "has no {prompt} in it"),
        (("--model", made.export, "--temperature", -1), "--temperature=-1.0 must be 0"),
        (("--model", made.export, "--temperature", "1e-320"), "--temperature=1e-320 must be 0 (the most probable"),
        (("--model", made.export, "--seed", 10**25), "has more than 64 bits"),
        (("--model", made.export, "--prompt", "a\udcff"), "the prompt is not UTF-8"),
        (("--model", made.export, "--tokenizer", more), "has 350 ids, and --model="),
        (("--model", made.checkpoint, "--tokenizer", more), "has 350 ids, and --model="),
        (("--model", made.export, "--device", "meta"), "--device=meta is none"),
        (("--model", made.export, "--device", "banana"), "use auto, cpu, cuda or cuda:N"),
        (("--model", made.export, "--max-new-tokens", 0), "must be at least 1"),
        (("--model", made.export, "--prompt", "dog " * 60), "and the model sees 48: shorten it"),
    ):
        status, _, err = run(capsys, "--prompt", PROMPT, *arguments)
        assert status == 2 and err.splitlines()[-1].startswith("error: ") and problem in err, (arguments, err)
