"""What the demo model is trained on: its chat form, its vocabulary, and rows of documents."""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from engine.formats.gguf import GGUFFile
from engine.text.template import ChatError, ChatTemplate
from engine.text.tokenizer import Tokenizer, pre_tokenizer
from engine.text.vocab import CONTROL, NORMAL, USER_DEFINED
from tools.ggufwrite import write_gguf
from tools.train_demo import dialog, rows, tokenizer, words
from tools.train_demo.dialog import Message, Tool, assistant, calls, tool_result, user
from tools.train_demo.heldout import EVALUATED, completion, forms, held_out, prompt, shuffled
from tools.train_demo.rows import ANSWER, SHARE_OF, TEXT, Rows

QWEN = Path(__file__).parents[1] / "support/templates/qwen35_style.jinja"
MAKERS = (
    rows.conversation, rows.plain, rows.recall_document, rows.tools_document, rows.memory_document,
)  # fmt: skip
PYTHON = [["len", "Size."]]
LENGTH = 2048


@pytest.fixture
def draw(rng: np.random.Generator) -> Random:
    return Random(int(rng.integers(2**31)))


def some_text(draw: Random) -> str:
    words = [
        "two\nlines",
        "\n\n",
        "naïve",
        "日本",
        "🙂",
        '"quoted"',
        "<b>",
        "{{ x }}",
        "it's",
        "7 ",
    ]
    return " ".join(draw.choices(words, k=draw.randint(1, 5))).strip() or "word"


def some_tools(draw: Random) -> list[Tool]:
    return [{"type": "function", "function": {"name": f"f{i}", "description": some_text(draw)}}
            for i in range(draw.choice((0, 1, 3)))]  # fmt: skip


def some_calls(draw: Random, text: str, thought: str) -> Message:
    values = (some_text(draw), 3, -0.5, ["a", "é"], {"k": [1]})
    made = [(f"f{i}", {f"p{j}": draw.choice(values) for j in range(draw.randint(0, 3))})
            for i in range(draw.randint(1, 3))]  # fmt: skip
    return calls(*made, thought=thought) | {"content": text}


def some_chat(draw: Random) -> list[Message]:
    """A conversation of every kind of message that ends with an answer."""
    out: list[Message] = []
    if draw.random() < 0.5:
        out.append({"role": "system", "content": some_text(draw)})
    for _ in range(draw.randint(1, 3)):
        out.append(user(some_text(draw)))
        while draw.random() < 0.5:
            text, thought = (some_text(draw) if draw.random() < 0.5 else "" for _ in range(2))
            out.append(some_calls(draw, text, thought))
            out += [tool_result(some_text(draw)) for _ in range(draw.randint(1, 3))]
        out.append(assistant(some_text(draw), some_text(draw) if draw.random() < 0.5 else ""))
    return out


def rendered(template: ChatTemplate, messages: list[Message], tools: Any, **given: Any) -> str:
    more = {key: "yes" for key in ("preserve_thinking",) if given.get("preserve")}
    starts = given.get("starts", False)
    return template.render(messages, tools or None, given.get("thinks"), starts, more)


def test_pieces_are_what_the_template_renders(draw: Random) -> None:
    template = ChatTemplate(dialog.TEMPLATE)
    for _ in range(150):
        messages, tools, preserve = some_chat(draw), some_tools(draw), draw.random() < 0.5
        whole = rendered(template, messages, tools, preserve=preserve)
        for thinks in (False, True):
            pieces = dialog.pieces(messages, tools, thinks, preserve)
            assert "".join(text for text, _ in pieces) == whole
            asked = dialog.prompt(messages[:-1], tools, thinks)
            assert asked == rendered(template, messages[:-1], tools, thinks=thinks, starts=True)
        query = max(i for i, message in enumerate(messages) if message["role"] == "user")
        turns = whole.split("<|im_start|>assistant\n")[1:]
        said = [f"{turn.partition('<|im_end|>')[0]}<|im_end|>" for turn in turns]
        late = [i > query for i, m in enumerate(messages) if m["role"] == "assistant"]
        assert [text for text, is_answer in pieces if is_answer] == [
            turn.removeprefix("<think>\n" if preserve or is_late else "")
            for turn, is_late in zip(said, late, strict=True)
        ]


def test_answers_without_thoughts_begin_after_the_block(draw: Random) -> None:
    for _ in range(50):
        messages, tools = some_chat(draw), some_tools(draw)
        answers = [text for text, is_answer in dialog.pieces(messages, tools) if is_answer]
        said = [dialog.written(m) + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert answers == said
        assert not any("think>" in answer for answer in answers)


@pytest.mark.parametrize("task", EVALUATED)
def test_questions_are_asked_and_answered_as_the_template_does(task: str) -> None:
    template = ChatTemplate(dialog.TEMPLATE)
    for question, form in itertools.product(held_out(task, 3), forms(task)):
        asked, answer = prompt(question, form), completion(question, form)
        if form == "plain":
            text = f"Question: {question.text}\nAnswer: {question.answer}<|endoftext|>"
            assert asked + answer == text
            continue
        if form == "shuffled":
            before, question = question, shuffled(question)
            assert sorted(map(str, before.tools)) == sorted(map(str, question.tools))
        messages, thinks = question.messages(form == "think"), form == "think"
        start = rendered(template, messages, question.tools, thinks=thinks, starts=True)
        assert asked == start
        whole = [*messages, assistant(question.answer, question.thought if thinks else "")]
        assert f"{asked}{answer}\n" == rendered(template, whole, question.tools)


def without_instruction(text: str) -> str:
    """The text without what is said about how to call functions."""
    return text.replace("These functions can be called:\n\n", "").replace(
        "To call one, write it between <tool_call></tool_call>:\n\n", "Call a function like this:\n"
    )


def test_the_template_renders_as_qwens_does(draw: Random) -> None:
    """But for the instruction, thoughts that are kept, booleans, and what starts without a word of
    `enable_thinking`."""
    ours, qwens = ChatTemplate(dialog.TEMPLATE), ChatTemplate(QWEN.read_text())
    for _ in range(150):
        messages, tools = some_chat(draw), some_tools(draw)
        for message in messages:
            message["content"] = f"{draw.choice(('', ' ', chr(10)))}{message['content']}\n"
            if message["role"] == "assistant" and draw.random() < 0.3:
                del message["reasoning_content"]
                message["content"] = f"<think>\n{some_text(draw)}\n</think>\n\n{some_text(draw)}"
        given: dict[str, Any] = {"thinks": draw.random() < 0.5, "starts": draw.random() < 0.5}
        expected = without_instruction(rendered(qwens, messages, tools, **given))
        assert rendered(ours, messages, tools, **given) == expected


@pytest.mark.parametrize("message", [{"role": "system", "content": "."}, {"role": "robot"}])
def test_the_template_refuses_what_qwens_does(message: Message) -> None:
    for source in (dialog.TEMPLATE, QWEN.read_text()):
        with pytest.raises(ChatError, match=r"must come first|unknown role"):
            ChatTemplate(source).render([user("Hi"), message])


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """A pipeline trained on a module's source, and the engine's tokenizer of its GGUF metadata."""
    folder = tmp_path_factory.mktemp("vocabulary")
    source = "".join(Path(str(m.__file__)).read_text() for m in (random, argparse, words))
    source += (Path(words.__file__).with_name("lexicon.txt")).read_text().replace("\n", " ")
    pipeline = tokenizer.train_tokenizer(tokenizer.normal_text(source))
    pipeline.save(str(folder / "tokenizer.json"))
    values = tokenizer.gguf_vocabulary(folder / "tokenizer.json")
    write_gguf(folder / "made.gguf", values, [])
    loaded = tokenizer.load_tokenizer(folder / "tokenizer.json")
    return loaded, Tokenizer.from_gguf(GGUFFile(folder / "made.gguf")), values


def test_training_and_engine_cut_text_into_the_same_tokens(
    vocabulary: tuple[Any, Tokenizer, dict[str, Any]], draw: Random
) -> None:
    pipeline, engine, _ = vocabulary
    encode, pre = tokenizer.Encoder(pipeline), pre_tokenizer(tokenizer.PRE)
    ascii_ = [*map(chr, range(128)), "  ", "\r\n", "'s", "'Ll", "random", "Return", " the", " 12"]
    others = ["é", "ß", "日本", "🙂", "\u0301", "\u00a0", "\u2028", "\u0663", " Übung", "İ", "\x85"]
    near = ["<|im_end|", "<think", "<", "|>", "</"]
    for i in range(800):
        known = [*ascii_, *near, *tokenizer.SPECIAL, *(others if i % 2 else [])]
        text = "".join(draw.choices(known, k=draw.randint(1, 25)))
        for _ in range(2):  # The second time it knows the pieces.
            assert encode(text) == engine.encode(text, parse_special=True), repr(text)
        if text.isascii():  # A small vocabulary hides some cuts.
            pieces = [text[slice(*at)] for _, at in pre.pre_tokenize_str(text)]
            assert tokenizer._PIECE.findall(text) == pieces
    for question in (held_out(task, 1)[0] for task in EVALUATED):
        text = prompt(question, "chat") + completion(question, "chat")
        assert engine.decode(encode(text), special=True) == text


def test_only_three_special_tokens_are_not_shown(
    vocabulary: tuple[Any, Tokenizer, dict[str, Any]],
) -> None:
    _, engine, values = vocabulary
    tokens = values["tokenizer.ggml.tokens"]
    types = dict(zip(tokens, values["tokenizer.ggml.token_type"].tolist(), strict=True))
    control = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    tags = ("think", "tool_call", "tool_response")
    shown = {f"<{slash}{tag}>" for tag in tags for slash in ("", "/")}
    assert {token for token, kind in types.items() if kind == CONTROL} == control
    assert {token for token, kind in types.items() if kind == USER_DEFINED} == shown
    assert set(types.values()) == {NORMAL, CONTROL, USER_DEFINED}
    assert len(tokens) == len(types) == tokenizer.N_VOCAB
    for token in control | shown:
        assert engine.encode(token, parse_special=True) == [tokens.index(token)]
        assert engine.decode([tokens.index(token)]) == ("" if token in control else token)
    assert engine.eog_ids == {tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")}
    assert tokens[tokenizer.END_OF_TEXT] == "<|endoftext|>"
    assert tokens[tokenizer.IM_END] == "<|im_end|>"


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_documents_depend_on_the_seed_alone(make: Any) -> None:
    once, again, other = (make(Random(seed), PYTHON) for seed in (1, 1, 2))
    assert once == again != other
    assert any(kind == ANSWER for _, kind in once)


def made_rows(pipeline: Any, seed: str, length: int = LENGTH) -> Rows:
    """Rows whose text is one token, which nothing else has."""
    text = {kind: np.zeros(3 * length, np.uint16) for kind in rows.KINDS_OF_TEXT}
    return Rows(pipeline, text, PYTHON, length, seed)


def test_rows_depend_on_the_seed_alone(vocabulary: tuple[Any, Any, Any]) -> None:
    once, again, other = (
        np.array(list(itertools.islice(made_rows(vocabulary[0], seed), 3))) for seed in "112"
    )
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_no_answer_is_cut_except_at_the_length_of_a_row(vocabulary: tuple[Any, Any, Any]) -> None:
    ends = (tokenizer.END_OF_TEXT, tokenizer.IM_END)
    n_cut = n_whole = 0
    for length in (256, LENGTH):
        for ids, kinds in itertools.islice(made_rows(vocabulary[0], "cut", length), 40):
            assert len(ids) == len(kinds) == length
            edges = np.flatnonzero(np.diff(kinds == ANSWER, prepend=False, append=False))
            for end in edges[1::2]:
                if ids[end - 1] in ends:
                    n_whole += 1
                    continue
                # A document as long as the row and longer: no other one is in it.
                assert end == length
                assert tokenizer.END_OF_TEXT not in ids
                n_cut += 1
            # Nor is any other document cut, unless it is alone.
            assert ids[-1] == tokenizer.END_OF_TEXT or tokenizer.END_OF_TEXT not in ids
    assert n_whole > 500
    assert n_cut > 0


def test_tokens_are_shared_out_among_kinds_as_planned(
    vocabulary: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each maker's tokens are marked with a number of its own in place of what they are."""
    marks = {name: 10 + i for i, name in enumerate(rows._MAKERS)}

    def marked(name: str) -> Any:
        make = rows._MAKERS[name]
        return lambda rng, python: [(text, marks[name]) for text, _ in make(rng, python)]

    monkeypatch.setattr(rows, "_MAKERS", {name: marked(name) for name in marks})
    made = itertools.islice(made_rows(vocabulary[0], "shares", 1024), 300)
    kinds = np.concatenate([kinds for _, kinds in made])
    assert SHARE_OF.keys() == {*marks, "text"}
    for name, share in SHARE_OF.items():
        assert np.mean(kinds == marks.get(name, TEXT)) == pytest.approx(share, abs=0.05), name
