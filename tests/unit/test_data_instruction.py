"""Prompts and responses: what is predicted, what is left out and told, and where a run goes on."""

from __future__ import annotations

import gzip
import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama_config
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loqt_ds.config import Config, ConfigError, apply_overrides, from_dict, validate
from loqt_ds.data import DataBundle, DataError, build_data
from loqt_ds.data.conversation import Reader
from loqt_ds.data.instruction import read_examples
from loqt_ds.data.tokenizer import SentencePieceTokenizer, TransformersTokenizer, train_sentencepiece
from loqt_ds.evaluation import evaluate
from loqt_ds.method import head
from loqt_ds.settling import resolve_steps

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{{ '\n' }}{% else %}<|{{ m.role }}|>{{ m.content }}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, bos: bool = True, chat: bool = True) -> TransformersTokenizer:
    """A token a character, <s> before every text, a chat template."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL[4:],
    )
    if chat:
        hf.chat_template = CHAT
    return TransformersTokenizer(hf, "characters")


def rows(num: int, *, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return "".join(draw.choices(string.ascii_lowercase + " ", k=draw.randint(least, most))).strip() or "x"

    return [
        {"question": words(1, 20), "answer": f"{words(1, 15)} #### {draw.randint(-50, 5000):,}"} for _ in range(num)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def config(train: Path, held_out: Path | None = None, **changes: Any) -> Config:
    sections: dict[str, dict[str, Any]] = {
        "model": {"shape": "llama_9m"},
        "data": {
            "format": "instruction",
            "path": str(train),
            "validation_path": None if held_out is None else str(held_out),
            "prompt_field": "question",
            "response_field": "answer",
            "tokenizer": "characters",
            "sequence_length": 60,
            "num_processes": 1,
        },
        "train": {"micro_batch_size": 3, "gradient_accumulation_steps": 2},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        sections.setdefault(section, {})[field] = value
    made = from_dict(sections)
    validate(made)
    return made


def build(made: Config, *, bos: bool = True, chat: bool = True, **ranks: Any) -> tuple[DataBundle, list[str]]:
    said: list[str] = []
    return build_data(made, tokenizer(bos=bos, chat=chat), say=said.append, **ranks), said


def predicted(batch: dict[str, torch.Tensor], index: int) -> tuple[list[int], list[int]]:
    """(all tokens of a row, the predicted ones), from inputs, mask and targets."""
    length = int(batch["attention_mask"][index].sum())
    targets = batch["targets"][index, :length].tolist()
    assert (batch["targets"][index, length:] == -100).all() and batch["attention_mask"][index, :length].all()
    tokens = batch["input_ids"][index, :length].tolist()
    return [*tokens, targets[-1]], [target for target in targets if target != -100]


@pytest.mark.parametrize("bos", [True, False])
def test_the_response_and_its_end_are_predicted(tmp_path: Path, bos: bool) -> None:
    examples = rows(12)
    held_out = write(tmp_path / "test.jsonl", rows(5, seed=1))
    template = "Q: {prompt}\nA: "
    made = config(write(tmp_path / "train.jsonl", examples), held_out, data__prompt_template=template)
    bundle, said = build(made, bos=bos)
    backend, seen = tokenizer(bos=bos).hf, set()
    wanted = {
        (
            *backend(template.format(prompt=row["question"]))["input_ids"],
            *backend(row["answer"], add_special_tokens=False)["input_ids"],
            backend.eos_token_id,
        ): row["answer"]
        for row in examples
    }
    for _ in range(4):
        batch = bundle.train.next_batch()
        assert batch["input_ids"].shape == (3, batch["targets"].shape[1]) and batch["input_ids"].shape[1] % 8 in (0, 4)
        for index in range(3):
            tokens, answered = predicted(batch, index)
            answer = wanted[tuple(tokens)]
            assert answered == [*backend(answer, add_special_tokens=False)["input_ids"], backend.eos_token_id]
            seen.add(tuple(tokens))
    assert seen == set(wanted) and bundle.summary["num_rows"] == 12
    assert [question.response for question in bundle.questions] == [row["answer"] for row in rows(5, seed=1)]
    prompts = [backend(template.format(prompt=row["question"]))["input_ids"] for row in rows(5, seed=1)]
    assert [question.prompt for question in bundle.questions] == prompts
    assert said[0].startswith("12 examples for training")


def test_a_template_that_a_shell_hands_on_has_line_breaks(tmp_path: Path) -> None:
    """README's option as a shell gives it, a backslash and n in it; other backslashes stay, as of LaTeX."""
    made = config(write(tmp_path / "train.jsonl", rows(12)))
    apply_overrides(made, [r"data.prompt_template=Question: {prompt}\nAnswer: "])
    assert Reader(made.data, tokenizer()).opening("1 + 1") == "Question: 1 + 1\nAnswer: "
    made.data.prompt_template = r"\boxed{} \\neq\t{prompt}"
    assert Reader(made.data, tokenizer()).opening(r"a\n") == "\\boxed{} \\neq\ta\\n"


def test_what_messages_say_of_a_csv_helps(tmp_path: Path) -> None:
    """Quotation marks that are text, and a first row that names no columns."""
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\n" + "".join(f'{n},"hi" you\n' for n in range(12)), encoding="utf-8")
    with pytest.raises(DataError, match="set data.quoting=none"):
        build(config(file))
    questions = build(config(file, data__quoting="none"))[0].questions
    assert questions and all(question.response == '"hi" you' for question in questions)
    file.write_text("a,a\n" + "".join(f"{n},{n}\n" for n in range(11)), encoding="utf-8")
    with pytest.raises(DataError, match="set data.header=false"):
        build(config(file))
    columns = {"data__prompt_field": "0", "data__response_field": "1"}
    summary = build(config(file, data__header=False, **columns))[0].summary
    assert summary["num_rows"] + summary["num_validation_rows"] == 12


def test_conversations_as_transformers_masks_them(tmp_path: Path) -> None:
    """Against the assistant's mask that transformers itself makes of {% generation %}."""
    draw, conversations = random.Random(3), []
    for _ in range(9):
        turns = [{"role": "system", "content": "short"}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            turns += [{"role": "user", "content": draw.choice("abc") * 3}, {"role": "assistant", "content": "yes " * 2}]
        conversations.append({"chat": turns})
    data = {"data__messages_field": "chat", "data__prompt_field": "prompt", "data__response_field": "response"}
    made = config(write(tmp_path / "train.jsonl", conversations), data__sequence_length=200, **data)
    made.data.validation_path = made.data.path  # all of it is held out, too: then it is left out of training
    with pytest.raises(
        DataError, match=r"0 examples for training, as all 9 have a prompt that is held out \(data.validation_path="
    ):
        build(made)
    write(
        tmp_path / "test.jsonl", [{"chat": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]
    )
    made.data.validation_path = str(tmp_path / "test.jsonl")
    bundle, _ = build(made)
    hf, wanted = tokenizer().hf, {}
    for row in conversations:
        reference = hf.apply_chat_template(
            row["chat"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = reference["input_ids"], reference["assistant_masks"]
        assert hf.decode(ids[-1]) == "\n"  # after the end: never learned, never seen
        wanted[tuple(ids[:-1])] = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
    for _ in range(3):
        batch = bundle.train.next_batch()
        for index in range(3):
            tokens, answered = predicted(batch, index)
            assert answered == wanted[tuple(tokens)]
    assert hf.decode(bundle.questions[0].prompt) == "<s><|user|>?\n<|assistant|>"


def test_conversations_that_do_not_end_or_begin_as_they_should(tmp_path: Path) -> None:
    """They are learned up to the last answer; those that an assistant begins, and those without an answer, are not."""

    def turns(roles: str, number: int) -> dict[str, Any]:
        names = {"s": "system", "u": "user", "a": "assistant"}
        return {"chat": [{"role": names[role], "content": f"{role}{number}"} for role in roles]}

    data = {"data__messages_field": "chat", "data__prompt_field": "prompt", "data__response_field": "response"}
    shapes = ("ua", "uauu", "sua", "suaus", "auaua", "u", "a")
    train = write(tmp_path / "train.jsonl", [turns(roles, n) for roles in shapes for n in range(2)])
    held_out = write(tmp_path / "test.jsonl", [turns("uauau", 7), turns("au", 7)])
    bundle, said = build(config(train, held_out, **data))
    summary = bundle.summary
    assert (summary["num_rows"], summary["num_unanswered"]) == (8, 4)
    assert (summary["num_answer_first"], summary["num_empty"]) == (4, 2)
    (question,) = bundle.questions
    assert tokenizer().hf.decode(question.prompt) == "<s><|user|>u7\n<|assistant|>a7</s>\n<|user|>u7\n<|assistant|>"
    assert question.response == "a7"
    assert "4 of 14 training conversations go on after the assistant's last message: that end is left out" in said
    assert "1 of 2 held-out conversations begin with an assistant's message and are left out" in said
    write(train, [turns("au", n) for n in range(3)])
    with pytest.raises(DataError, match="3 rows, 0 of them without prompt or response, 3 that an assistant's message"):
        build(config(train, held_out, **data))


def test_a_chat_template_writes_prompt_and_response(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHAT.replace("<|user|>", "<|system|>"), encoding="utf-8")
    write(tmp_path / "train.jsonl", rows(9))
    made = config(tmp_path / "train.jsonl", data__chat_template=str(file), data__sequence_length=90)
    bundle, _ = build(made, chat=False)
    question = bundle.questions[0]
    text = tokenizer().hf.decode(question.prompt)
    assert text.startswith("<s><|user|>") and text.endswith("\n<|assistant|>") and text.count("<s>") == 1


@pytest.mark.parametrize("own_file", [True, False])
def test_all_solutions_of_a_question_are_on_one_side(tmp_path: Path, own_file: bool) -> None:
    content = [{"question": f"question {n // 4}", "answer": f"way {n}"} for n in range(48)]
    write(tmp_path / "train.jsonl", content)
    held_out = write(tmp_path / "test.jsonl", [{"question": f"question {n}", "answer": "other"} for n in range(3)])
    changes = {} if own_file else {"data__validation_fraction": 0.3}
    made = config(tmp_path / "train.jsonl", held_out if own_file else None, **changes)
    train, kept, met, _ = read_examples(made, Reader(made.data, tokenizer()), print)
    sides = [{example.stretches[0].text for example in side} for side in (train, kept)]
    assert (
        not sides[0] & sides[1]
        and len(sides[0] | sides[1]) == 12
        and len(sides[1]) == (3 if own_file else len(kept) / 4)
    )
    assert met.num_duplicates == (12 if own_file else 0)


def test_why_nothing_is_left_for_training(tmp_path: Path) -> None:
    """All rows have one prompt, all prompts are held out, or all but a few."""
    train = write(tmp_path / "train.jsonl", [{"question": "a joke", "answer": f"joke {n}"} for n in range(9)])
    with pytest.raises(DataError, match=r"0 examples for training: all 9 have one prompt, .*data.validation_path"):
        build(config(train))
    content = [{"question": str(n), "answer": "so"} for n in range(9)]
    write(train, content)
    with pytest.raises(DataError, match=r"data.validation_fraction=0.999 holds out all 9 prompts; lower it"):
        build(config(train, data__validation_fraction=0.999))
    held_out = write(tmp_path / "test.jsonl", content[:7])
    with pytest.raises(DataError, match=r"2 examples for training, .* \(7 have a prompt that is held out\)"):
        build(config(train, held_out))


def test_a_response_that_spells_the_end_of_text_is_whole(tmp_path: Path) -> None:
    """Alone, and in a chat whose template writes an end, or none."""
    answer, hf = "write </s> last", tokenizer().hf
    spelled = hf(answer, add_special_tokens=False)["input_ids"]
    assert spelled.count(hf.eos_token_id) == 1
    write(tmp_path / "train.jsonl", [{"question": str(n), "answer": answer} for n in range(6)])
    held_out = write(tmp_path / "test.jsonl", [{"question": "?", "answer": "!"}])
    endless = CHAT.replace("{{ eos_token }}", "").replace("{{ '\n' }}{% else %}", "{% else %}")
    for template in (None, CHAT, endless):
        changes = {}
        if template is not None:
            (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
            changes["data__chat_template"] = str(tmp_path / "chat.jinja")
        bundle, _ = build(config(tmp_path / "train.jsonl", held_out, **changes))
        batch = bundle.train.next_batch()
        for index in range(3):
            assert predicted(batch, index)[1] == [*spelled, hf.eos_token_id], template


def test_special_tokens_that_a_sentencepiece_model_reads_as_text(tmp_path: Path) -> None:
    """A chat template that writes them is refused, one that writes none is not; else a missing beginning is told."""
    model = SentencePieceTokenizer(train_sentencepiece(["a plain text of words 0123456789\n" * 40], 300), "own.model")
    write(tmp_path / "train.jsonl", rows(8))
    file = tmp_path / "chat.jinja"
    file.write_text(CHAT, encoding="utf-8")
    made = config(tmp_path / "train.jsonl", data__chat_template=str(file), data__sequence_length=200)
    with pytest.raises(DataError, match=r"the chat template writes <s>, which data.tokenizer=own.model reads as plain"):
        build_data(made, model, say=print)
    file.write_text(CHAT.replace("{{ bos_token }}", "").replace("{{ eos_token }}", ""), encoding="utf-8")
    build_data(made, model, say=print)
    said: list[str] = []
    build_data(config(tmp_path / "train.jsonl", data__sequence_length=200), model, say=said.append)
    assert any("data.tokenizer=own.model puts no <s> before a prompt" in line for line in said)


def test_padding_and_masks_change_no_loss(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(30))
    bundle, _ = build(config(tmp_path / "train.jsonl", data__validation_fraction=0.4))
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(vocab_size=128)).double()
    alone, count = 0.0, 0
    for batch in bundle.validation.batches(1):
        tokens, answered = predicted(batch, 0)
        logits = model(torch.tensor([tokens[:-1]])).logits[0].detach().log_softmax(-1)
        places = range(len(tokens) - 1 - len(answered), len(tokens) - 1)
        alone -= sum(float(logits[place, token]) for place, token in zip(places, answered, strict=True))
        count += len(answered)
    head.install(model)
    batched = evaluate(model, bundle.validation.batches(7), torch.device("cpu"))
    assert batched.num_tokens == count == bundle.validation.num_predicted
    assert batched.loss == pytest.approx(alone / count, rel=1e-6)


def test_what_is_left_out_is_counted_and_told(tmp_path: Path) -> None:
    content: list[dict[str, Any]] = rows(10)
    content[1]["answer"] = " \n"
    content[2]["question"] = None
    content[3]["answer"] = "long " * 30
    content[4] = dict(rows(3, seed=1)[0])
    held_out: list[dict[str, Any]] = rows(3, seed=1)
    held_out[1]["answer"] = "long " * 20 + "#### 4"
    held_out[2]["answer"] = ""
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in content))
    made = config(tmp_path / "train.jsonl.gz", write(tmp_path / "test.jsonl", held_out))
    bundle, said = build(made)
    summary = bundle.summary
    assert (summary["num_rows"], summary["num_empty"], summary["num_too_long"], summary["num_duplicates"]) == (
        6,
        2,
        1,
        1,
    )
    assert (summary["num_validation_empty"], summary["num_validation_too_long"]) == (1, 1)
    assert len(bundle.validation) == 1 and summary["num_questions"] == len(bundle.questions) == 2
    longest = 1 + len(content[3]["question"]) + 150
    text = "\n".join(said)
    assert (
        f"1 training examples are longer than data.sequence_length=60 and are left out; data.sequence_length={longest}"
        in text
    )
    assert "2 of 10 training rows have no prompt or no response" in text and "1 of 3 held-out rows" in text
    assert "1 training examples have a prompt that is held out" in text
    kept, _ = build(config(tmp_path / "train.jsonl.gz", tmp_path / "test.jsonl", data__sequence_length=longest))
    assert kept.summary["num_too_long"] == kept.summary["num_validation_too_long"] == 0


def test_held_out_rows_have_their_part_in_the_identity(tmp_path: Path) -> None:
    """By which nodes with other files are told apart."""
    train, held_out = write(tmp_path / "train.jsonl", rows(20)), write(tmp_path / "held_out.jsonl", rows(4, seed=1))
    first, _ = build(config(train, held_out))
    again, _ = build(config(train, held_out), rank=1, world_size=2)
    assert first.identity == again.identity
    other, _ = build(config(train, write(tmp_path / "other.jsonl", rows(4, seed=2))))
    assert "validation" in {name for name in first.identity if first.identity[name] != other.identity[name]}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_resumption_follow_one_sequence(tmp_path: Path, world_size: int) -> None:
    write(tmp_path / "train.jsonl", rows(23))

    def batches(rank: int = 0, world: int = 1, size: int = 4) -> Any:
        made = config(tmp_path / "train.jsonl", train__micro_batch_size=size, train__gradient_accumulation_steps=1)
        return build(made, rank=rank, world_size=world)[0].train

    def seen(*parts: dict[str, torch.Tensor]) -> list[list[int]]:
        return [predicted(part, index)[0] for part in parts for index in range(len(part["input_ids"]))]

    alone = batches()
    whole = [seen(alone.next_batch()) for _ in range(14)]  # beyond two epochs
    together = [batches(rank, world_size, 4 // world_size) for rank in range(world_size)]
    for step in range(5):
        assert seen(*(each.next_batch() for each in together)) == whole[step]
    state = json.loads(json.dumps(together[-1].state_dict()))
    gone_on = batches()
    gone_on.load_state_dict(state)
    assert [seen(gone_on.next_batch()) for _ in range(9)] == whole[5:]
    write(tmp_path / "train.jsonl", rows(23, seed=9))
    with pytest.raises(DataError, match="other data"):
        batches().load_state_dict(state)


@pytest.mark.parametrize(
    ("row", "changes", "words"),
    [
        ({"question": "a"}, {}, ["data.response_field=answer", "line 1", "'question'"]),
        ({"question": "a", "answer": 4}, {}, ["data.response_field=answer", "int", "not a string"]),
        ({"question": "a", "answer": "\ud800"}, {}, ["line 1", "surrogate"]),
        ({"chat": "hi"}, {"data__messages_field": "chat"}, ["data.messages_field=chat", "no list of messages"]),
        (
            {"chat": [{"role": "bot", "content": "hi"}]},
            {"data__messages_field": "chat"},
            ["message 1", "'bot'", "system, user, assistant"],
        ),
        ({"chat": [{"role": "user", "content": "hi"}]}, {"data__messages_field": "chat"}, ["no example", "1 rows"]),
        ({"question": "a", "answer": ""}, {}, ["no example", "1 of them without prompt or response"]),
        ({"question": "a", "answer": "b" * 99}, {}, ["0 examples", "1 are longer", "data.sequence_length=60"]),
    ],
)
def test_refused(tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], words: list[str]) -> None:
    write(tmp_path / "test.jsonl", rows(2, seed=1))
    if "data__messages_field" in changes:
        changes = changes | {"data__prompt_field": "prompt", "data__response_field": "response"}
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        write(tmp_path / "test.jsonl", [{"chat": turn}])
    made = config(write(tmp_path / "train.jsonl", [row]), tmp_path / "test.jsonl", **changes)
    with pytest.raises(DataError) as refused:
        build(made)
    assert all(word in str(refused.value) for word in words), refused.value


def test_chat_templates_that_cannot_be_used(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write(tmp_path / "train.jsonl", [{"chat": [*turns, *turns]}] * 3)
    data = {"data__messages_field": "chat", "data__prompt_field": "prompt", "data__response_field": "response"}
    with pytest.raises(DataError, match="has no chat template; give data.chat_template"):
        build(config(tmp_path / "train.jsonl", **data), chat=False)
    file = tmp_path / "chat.jinja"
    made = config(tmp_path / "train.jsonl", data__chat_template=str(file), **data)
    with pytest.raises(DataError, match="cannot be read"):
        build(made)
    file.write_text("{% for m in messages %}{{ m.content }}{{ loop.revindex }}{% endfor %}")
    with pytest.raises(DataError, match="in another way once others follow it"):
        build(made)
    file.write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match=r"cannot write this conversation \(no\)"):
        build(made)
    for expression, error in (("m.role + 1", "TypeError"), ("1 / 0", "ZeroDivisionError")):
        file.write_text("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
        with pytest.raises(DataError, match=rf"line 1: the chat template cannot write this conversation \({error}"):
            build(made)
    for end in ("", "{{ eos_token }}"):
        file.write_text("{% for m in messages %}{% if m.role == 'user' %}?{% else %}" + end + "{% endif %}{% endfor %}")
        with pytest.raises(DataError, match="writes nothing of message 2, the assistant's"):
            build(made)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__prompt_template": "Q:"}, ["data.prompt_template='Q:'", "{prompt}"]),
        ({"data__streaming": True, "data__name": "x", "data__path": None}, ["data.streaming=true", "instruction"]),
        ({"data__mask_documents": True}, ["data.mask_documents=true", "one example"]),
        ({"data__tokenizer": None}, ["data.tokenizer=null", "model.path"]),
        ({"data__messages_field": "chat"}, ["data.prompt_field=question", "data.messages_field=chat"]),
        ({"eval__metric": "accuracy"}, ["eval.metric=accuracy", "classification"]),
        ({"eval__max_new_tokens": 3}, ["eval.max_new_tokens=3", "eval.metric=loss"]),
        (
            {"optim__train_full_rank": False, "optim__lr_full_rank": 0.1},
            ["optim.lr_full_rank=0.1", "optim.train_full_rank=false"],
        ),
        ({"train__epochs": 2}, ["train.max_steps=1000", "train.epochs=2", "exclude"]),
        ({"train__max_steps": None}, ["train.epochs=null", "how long"]),
        ({"checkpoint__best": True, "eval__every": 0}, ["checkpoint.best=true", "eval.every=0"]),
        ({"eval__patience": 3, "eval__every": 0}, ["eval.patience=3", "eval.every=0"]),
        (
            {"eval__patience": 3, "eval__every": "epoch", "train__epochs": 1, "train__max_steps": None},
            ["eval.every=epoch of train.epochs=1:", "train.epochs above 1, or eval.every to a number of steps"],
        ),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config(tmp_path / "train.jsonl", **changes)
    assert all(word in str(refused.value) for word in words), refused.value


def test_options_of_examples_need_examples() -> None:
    for option in ("prompt_template", "chat_template", "messages_field", "prompt_field"):
        with pytest.raises(ConfigError, match=f"data.{option}=.*data.format=text"):
            validate(from_dict({"model": {"shape": "llama_9m"}, "data": {option: "{prompt}s"}}))


@pytest.mark.parametrize(
    ("epochs", "num_rows", "world_size", "steps", "every"),
    [(3, 7473, 1, 3737, 1246), (3, 7473, 2, 1869, 623), (0.1, 60, 1, 1, 10), (1, 12, 1, 2, 2), (0.5, 7, 1, 1, 2)],
)
def test_epochs_as_steps(epochs: float, num_rows: int, world_size: int, steps: int, every: int) -> None:
    """Of six rows on each rank; .1 of 60 rows is one step, whatever .1 is in binary."""
    made = from_dict(
        {
            "model": {"shape": "llama_9m"},
            "train": {"max_steps": None, "epochs": epochs, "micro_batch_size": 3, "gradient_accumulation_steps": 2},
            "eval": {"every": "epoch"},
            "optim": {"warmup_ratio": 0.25},
        }
    )
    validate(made)
    bundle: Any = DataBundle(None, None, {"num_rows": num_rows})  # type: ignore[arg-type]
    said: list[str] = []
    resolved = resolve_steps(made, bundle, world_size, None, say=said.append)
    assert (resolved.train.max_steps, resolved.train.epochs, resolved.eval.every) == (steps, None, every)
    assert resolved.num_warmup_steps == round(0.25 * steps) and f"{steps} steps" in said[0]
    assert steps * 6 * world_size >= epochs * num_rows - 1e-6 > (steps - 1) * 6 * world_size
    made.optim.warmup_steps = 10_000
    with pytest.raises(ConfigError, match="optim.warmup_steps=10000 is more than"):
        resolve_steps(made, bundle, world_size, None, say=said.append)


@pytest.mark.parametrize(
    ("train", "every", "message"),
    [
        (
            {"epochs": 1.01, "max_steps": None},
            "epoch",
            r"eval.every=epoch of train.epochs=1.01 \(2 steps\): .*epochs above",
        ),
        (
            {"epochs": 2, "max_steps": None},
            50,
            r"eval.every=50 of train.epochs=2 \(3 steps\): .*set eval.every below 3",
        ),
        ({"max_steps": 2}, "epoch", r"eval.every=epoch of train.max_steps=2: .*set eval.every below 2"),
    ],
)
def test_one_evaluation_in_the_words_that_were_written(train: dict[str, Any], every: int | str, message: str) -> None:
    """Of seven rows, six a step: an epoch has two."""
    options = {"micro_batch_size": 3, "gradient_accumulation_steps": 2, **train}
    made = from_dict({"model": {"shape": "llama_9m"}, "train": options, "eval": {"every": every}})
    made.checkpoint.best = True
    validate(made)
    bundle: Any = DataBundle(None, None, {"num_rows": 7})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        resolve_steps(made, bundle, 1, None, say=print)
