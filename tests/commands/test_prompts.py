"""Many prompts from a file: what each kind of line means, and `cli.py --prompts FILE`.

A line that can't be used is named by its number; the others run, each as it would alone.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Engine, SamplingParams
from engine.commands import prompts
from engine.commands.prompts import PromptLine, read_prompts
from tests.support.helpers import Cli, Result

# A busy machine must not fail the tests.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
BASE = SamplingParams(temperature=0.5, max_tokens=7)


def read(*lines: str, params: SamplingParams = BASE) -> list[PromptLine]:
    return list(read_prompts(lines, params))


def one(line: str) -> PromptLine:
    (prompt,) = read(line)
    assert prompt.number == 1
    return prompt


# Lines.


@pytest.mark.parametrize(
    "text", ["Once upon", "  leading and trailing  ", "[1, 2]", "5", "null", "'q'", r"a\nb", "日本"]
)
def test_a_line_of_text_is_the_prompt(text: str) -> None:
    for end in ("", "\n", "\r\n"):
        assert one(text + end) == PromptLine(1, text, BASE)


@pytest.mark.parametrize("text", ["", "two\nlines", '{"a": 1}', "tab\t\x00", "\u2028", "😀"])
def test_a_json_string_is_its_text(text: str) -> None:
    for ascii_only in (True, False):
        assert one(json.dumps(text, ensure_ascii=ascii_only)) == PromptLine(1, text, BASE)
    assert one(f"  {json.dumps(text)} ").prompt == text


@RELAXED
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_json(text: str) -> None:
    assert one(json.dumps({"prompt": text})).prompt == text


def test_blank_lines_count_but_are_no_prompts() -> None:
    found = read("\n", "a\n", "   \n", "\t\r\n", '"b"\n', "\n", "c")
    assert [(p.number, p.prompt) for p in found] == [(2, "a"), (5, "b"), (7, "c")]
    assert read() == []


@pytest.mark.parametrize("prompt", ["text", "", [1, 2, 3], []])
def test_an_object_has_a_prompt(prompt: Any) -> None:
    assert one(json.dumps({"prompt": prompt})) == PromptLine(1, prompt, BASE)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1}, {"temperature": 1}),
        ({"temp": 0.2}, {"temperature": 0.2}),
        ({"n_predict": 3}, {"max_tokens": 3}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"typ_p": 0.5}, {"typical_p": 0.5}),
        ({"seed": 5, "top_k": 1}, {"seed": 5, "top_k": 1}),
        ({"temperature": None, "seed": None}, {"temperature": None, "seed": None}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "yz"]}, {"stop": ("x", "yz")}),
        ({"stop": []}, {"stop": ()}),
        ({"samplers": ["top_k"]}, {"samplers": ("top_k",)}),
        ({"dry_sequence_breakers": []}, {"dry_sequence_breakers": ()}),
        ({"logit_bias": {"5": -1, "6": "-inf"}}, {"logit_bias": {5: -1.0, 6: -math.inf}}),
        # llama.cpp's server: false bans.
        ({"logit_bias": {"5": False}}, {"logit_bias": {5: -math.inf}}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
    ],
)
def test_an_objects_options_are_its_own(options: Any, expected: Any) -> None:
    assert one(json.dumps({"prompt": "a", **options})).params == replace(BASE, **expected)
    # Other lines keep the defaults.
    assert read(json.dumps({"prompt": "a", **options}), "b")[1].params == BASE


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "expected JSON, got "),
        ('"open', "expected JSON, got "),
        ('{"prompt": "a"} x', "expected JSON, got "),
        ('{"prompt": 1' + "0" * 5000 + "}", "expected JSON, got "),
        ('{"a":' * 10000, "expected JSON, got "),
        ("{}", 'expected "prompt" with a text or token ids'),
        ('{"prompt": null}', 'expected "prompt" with a text or token ids'),
        ('{"prompt": 5}', 'expected "prompt" with a text or token ids'),
        ('{"prompt": [1, true]}', 'expected "prompt" with a text or token ids'),
        ('{"prompt": [1, "a"]}', 'expected "prompt" with a text or token ids'),
        ('{"prompt": [[1]]}', 'expected "prompt" with a text or token ids'),
        ('{"prompt": "a", "tempersture": 1}', "unknown option 'tempersture'"),
        ('{"prompt": "a", "top_p": 2}', "top_p: expected 0 to 1, got 2"),
        ('{"prompt": "a", "temp": "hot"}', "temperature: expected a number, got 'hot'"),
        ('{"prompt": "a", "temp": NaN}', "temperature: expected a number, got nan"),
        ('{"prompt": "a", "top_k": 1.5}', "top_k: expected an integer, got 1.5"),
        ('{"prompt": "a", "max_tokens": null}', "max_tokens: expected an integer, got None"),
        ('{"prompt": "a", "n_predict": -2}', "max_tokens: expected at least -1, got -2"),
        ('{"prompt": "a", "ignore_eos": "no"}', "ignore_eos: expected true or false, got 'no'"),
        ('{"prompt": "a", "stop": 5}', "stop: expected a sequence of texts, got 5"),
        ('{"prompt": "a", "stop": ["a", 5]}', "stop: expected texts, got 5"),
        ('{"prompt": "a", "stop": ""}', "stop: expected texts that are not empty"),
        ('{"prompt": "a", "samplers": ["top"]}', "samplers: expected one of "),
        ('{"prompt": "a", "logits_processors": []}', "unknown option 'logits_processors'"),
        ('{"messages": [], "prompt": "a"}', 'expected "prompt" with a text or token ids, or "mes'),
        ('{"tools": [], "prompt": "a"}', "unknown option 'tools'"),
        ('{"temprature": 1, "prompt": "a"}', "unknown option 'temprature' (did you mean tempe"),
        ('{"n_predict": 1, "max_tokens": 2, "prompt": "a"}', "a parameter twice, by two names: "),
        ('{"prompt": "a", "samplers": null}', "samplers: expected a sequence of names, got None"),
        ('{"prompt": "a", "logit_bias": [[5, 1]]}', "logit_bias: expected a mapping of "),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias: expected token ids, got 'x'"),
        ('{"prompt": "a", "logit_bias": {"5": null}}', "logit_bias: expected numbers or -inf, "),
        ('{"prompt": "a", "logit_bias": {"5": true}}', "logit_bias: expected numbers or -inf, "),
        ('{"prompt": "a", "logit_bias": {"5": NaN}}', "logit_bias: expected numbers or -inf, got"),
        ('{"prompt": "a", "logit_bias": {"5": 1' + "0" * 400 + "}}", "logit_bias: expected num"),
        ('{"prompt": "a", "temp": 1' + "0" * 400 + "}", "temperature: expected a number, got 10"),
        ('{"prompt": "a", "mirostat": 1}', "mirostat: expected 0 or 2, got 1"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_used_says_why(line: str, words: str) -> None:
    before, wrong, after = read("a", line, "b")
    assert (before.error, after.error) == ("", "")
    assert wrong.number == 2
    assert wrong.error.startswith(words)
    assert wrong.error.isprintable()


@RELAXED
@given(st.one_of(st.text(), st.text().map(lambda s: "{" + s), st.text().map(lambda s: '"' + s)))
def test_no_line_raises(line: str) -> None:
    assert all(p.number == 1 for p in read(line))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=2), x)),
    max_leaves=4,
)
keys = st.sampled_from([*vars(BASE), "temp", "n_predict"])


@RELAXED
@given(st.dictionaries(keys, json_values, max_size=3))
def test_no_object_raises(options: dict[str, Any]) -> None:
    prompt = one(json.dumps({"prompt": "a", **options}))
    if not prompt.error:
        # Accepted parameters can be sampled with.
        prompt.params.resolved({})


# The command line.


def answers(result: Result) -> list[dict[str, Any]]:
    assert result.out == "" or result.out.endswith("\n")
    return [json.loads(line) for line in result.out.split("\n")[:-1]]


GREEDY = ("--temp", 0, "-n", 6, "--ignore-eos")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def alone(path: Path, prompt: Any, **params: Any) -> dict[str, Any]:
    chosen = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, **params}
    with Engine.load(path) as engine:
        (done,) = engine.generate_batch([prompt], SamplingParams(**chosen))
        return {"text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason}


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_answers_are_those_of_single_runs_in_order(
    cli: Cli, tiny: Path, file: Path, n_parallel: int
) -> None:
    """The long prompt comes first, so later prompts end before it."""
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ('{"prompt": "The long one", "n_predict": 40}', "The long one", {"max_tokens": 40}),
        ("plain text", "plain text", {}),
        ("", None, {}),
        (r'"two\nlines"', "two\nlines", {}),
        ('{"prompt": [72, 105]}', [72, 105], {}),
        ('{"prompt": "x", "temp": 2, "seed": 4}', "x", {"temperature": 2.0, "seed": 4}),
        ('{"prompt": "none", "max_tokens": 0}', "none", {"max_tokens": 0}),
    ]
    file.write_text("\n".join(line for line, _, _ in cases) + "\n", "utf-8")
    result = cli("-m", tiny, "--prompts", file, "-np", n_parallel, *GREEDY)
    assert result.status == 0
    assert totals(result)[:2] == (6, 0)
    wanted = [(i, p, own) for i, (_, p, own) in enumerate(cases, 1) if p is not None]
    for answer, (number, prompt, own) in zip(answers(result), wanted, strict=True):
        head = {"line": number, "prompt": prompt}
        assert answer == head | alone(tiny, prompt, **own)


TOTALS = re.compile(
    r"(\d+) prompts( \((\d+) failed\))?: (\d+) tokens processed, (\d+) generated in \d+\.\d\d s "
    r"\(\d+\.\d\d tokens/s\)"
)


def totals(result: Result) -> tuple[int, int, int, int]:
    """Prompts, failures, tokens processed and generated, as the last line tells."""
    match = TOTALS.fullmatch(result.err.splitlines()[-1])
    assert match, result.err
    return int(match[1]), int(match[3] or 0), int(match[4]), int(match[5])


def test_verbose_says_what_each_line_reused(cli: Cli, tiny: Path, file: Path) -> None:
    """But one that failed."""
    ids = list(range(100))
    wanted: list[list[int]] = [ids, [], [*ids, 5], ids]
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in wanted))
    result = cli("-m", tiny, "--prompts", file, *GREEDY, "-v")
    error, *lines, total, cache = result.err.splitlines()
    assert error == "error: line 2: the prompt is empty: expected at least one token"
    assert lines == [
        "line 1: reused 0 of 100 tokens (nothing known begins like it)",
        "line 3: reused 100 of 101 tokens (the rest is new)",
        "line 4: reused 100 of 100 tokens",
    ]
    assert TOTALS.fullmatch(total)
    assert "; reused 200 of 301 tokens; " in cache
    assert totals(cli("-m", tiny, "--prompts", file, *GREEDY))[2] == 101


def test_chats_are_answered_as_by_chat(cli: Cli, file: Path) -> None:
    """The demo model has a template; a chat that can't be rendered is the line's own error."""
    messages = [{"role": "user", "content": "What is 23 times 45?"}]
    more = [*messages, {"role": "assistant", "content": "1035"}, *messages]
    bad = [{"role": "user"}]
    lines = [{"messages": messages}, {"messages": bad}, {"messages": more, "n_predict": 4},
             {"messages": messages, "tools": 5}]  # fmt: skip
    file.write_text("\ufeff" + "\n".join(map(json.dumps, lines)), "utf-8")
    result = cli("--prompts", file, "-np", 2, "--temp", 0)
    first, second, third, fourth = answers(result)
    with Engine.load() as engine:
        for found, asked, params in (
            (first, messages, SamplingParams(temperature=0)),
            (third, more, SamplingParams(temperature=0, max_tokens=4)),
        ):
            answer = engine.chat(asked, params, cache_prompt=False).wait()
            assert found["messages"] == asked
            assert (found["text"], found["tokens"]) == (answer.text, answer.tokens)
    assert second["error"].startswith("message 0: expected a content, got ")
    assert fourth["error"] == "tools: expected a sequence of JSON schemas, got 5"
    assert result.status == 1
    assert totals(result)[:2] == (4, 2)
    assert totals(result)[3] == len(first["tokens"]) + 4


def test_chats_have_the_template_that_was_chosen(cli: Cli, tiny: Path, file: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    template = "{{ messages[0].content }}{{ '!' if enable_thinking else '?' }}"
    file.write_text(json.dumps({"messages": messages}) + "\n"
        + json.dumps({"messages": messages, "reasoning": True}))  # fmt: skip
    command = ("-m", tiny, "--prompts", file, *GREEDY, "--chat-template", template)
    for switch, ends in (("on", "!!"), ("off", "?!")):
        found = answers(cli(*command, "--reasoning", switch))
        assert [a["text"] for a in found] == [alone(tiny, f"hi{end}")["text"] for end in ends]
    file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({
        "messages": [*messages, {"role": "assistant", "content": "It"}],
        "template_kwargs": {"end": ";"}, "continue_last": True}))  # fmt: skip
    source = "{% for m in messages %}{{ m.content }}{{ end }}{% endfor %}"
    found = answers(cli(*command[:-1], source, "--chat-template-kwargs", '{"end": "."}'))
    assert [a["text"] for a in found] == [alone(tiny, t)["text"] for t in ("hi.", "hi;It")]
    line = cli("-m", tiny, "--prompts", file, "--chat-template", "chatml", "-rea", "on").refused()
    assert line.endswith("takes no --reasoning on: it reads no enable_thinking")
    assert "finish_reason" in prompts.HELP
    assert prompts.HELP.split()[-3:] == cli("--help").out.split()[-3:]


def test_what_a_line_says_comes_back(cli: Cli, tiny: Path, file: Path) -> None:
    lines = ['{"prompt": "a", "id": ["x", 1]}', '{"prompt": 5, "id": 7}', r'"\ud800"']
    file.write_text("\n".join(lines))
    first, wrong, half = answers(cli("-m", tiny, "--prompts", file, *GREEDY))
    assert first["id"] == ["x", 1]
    assert wrong["prompt"] == lines[1]
    assert "id" not in half
    assert half["prompt"] == "\ud800"
    assert half["finish_reason"] == "error"


def test_log_probabilities_are_in_the_results(cli: Cli, tiny: Path, file: Path) -> None:
    file.write_text('{"prompt": "a", "n_probs": 2}\nb')
    first, second = answers(cli("-m", tiny, "--prompts", file, *GREEDY))
    assert "logprobs" not in second
    assert len(first["logprobs"]) == len(first["tokens"]) == 6
    for token, found in zip(first["tokens"], first["logprobs"], strict=True):
        (_, highest), (_, second_highest) = found["top"]
        assert second_highest <= highest < 0
        # The end token is never sampled here, but the model may find it likely.
        assert dict(found["top"]).get(token, found["logprob"]) == found["logprob"] <= highest


def test_prompts_from_standard_input(cli: Cli, tiny: Path, file: Path) -> None:
    text = 'naïve\r\n"b"\r\nlast'
    file.write_bytes(text.encode())
    from_file = cli("-m", tiny, "--prompts", file, *GREEDY)
    assert cli("-m", tiny, "--prompts", "-", *GREEDY, stdin=text.encode()).out == from_file.out
    assert [a["prompt"] for a in answers(from_file)] == ["naïve", "b", "last"]


def test_only_line_feeds_end_lines(cli: Cli, tiny: Path, file: Path) -> None:
    """JSON strings may contain other separators; the result has them unchanged."""
    text = "a\u2028b\u2029c\x85d\x7f"
    file.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\nb\x0cc\n", "utf-8")
    found = answers(cli("-m", tiny, "--prompts", file, *GREEDY))
    assert [(a["line"], a["prompt"]) for a in found] == [(1, text), (2, "b\x0cc")]


def test_wrong_lines_are_named_and_the_others_run(cli: Cli, tiny: Path, file: Path) -> None:
    lines = ["good", '{"prompt": 5}', "", '{"prompt": "a", "top_p": 7}', '{"prompt": [999]}',
             '""', r'"\ud800"', "also good"]  # fmt: skip
    file.write_text("\n".join(lines))
    result = cli("-m", tiny, "--prompts", file, *GREEDY, "-np", 2)
    assert result.status == 1
    found = answers(result)
    assert [a["line"] for a in found] == [1, 2, 4, 5, 6, 7, 8]
    assert [a["line"] for a in found if a["finish_reason"] == "error"] == [2, 4, 5, 6, 7]
    assert [bool(a.get("error")) for a in found] == [a["line"] not in (1, 8) for a in found]
    messages = result.err.splitlines()
    assert len(messages) == 6
    assert totals(result)[:2] == (7, 5)
    for number, words in ((2, "expected "), (4, "top_p: expected 0 to 1, got 7"),
                          (5, "token id 999: expected 0 to 319"), (6, "the prompt is empty"),
                          (7, "text cannot be encoded")):  # fmt: skip
        (line,) = [m for m in messages if m.startswith(f"error: line {number}: ")]
        assert words in line
    for answer in (found[0], found[-1]):
        text = answer["prompt"]
        assert answer == {"line": answer["line"], "prompt": text, **alone(tiny, text)}


def test_options_of_the_command_line_are_the_default(cli: Cli, tiny: Path, file: Path) -> None:
    stop = alone(tiny, "Once", max_tokens=12)["text"][2:4]
    file.write_text('Once\n{"prompt": "Once", "stop": []}\n')
    first, second = answers(cli("-m", tiny, "--prompts", file, *GREEDY, "-n", 12, "-r", stop))
    assert (first["finish_reason"], second["finish_reason"]) == ("stop", "length")
    assert stop not in first["text"]
    assert second["text"].startswith(first["text"] + stop)


@pytest.mark.parametrize("content", ["", "\n", "\n  \n\r\n"])
def test_nothing_to_do(cli: Cli, tiny: Path, file: Path, content: str) -> None:
    file.write_text(content, newline="")
    result = cli("-m", tiny, "--prompts", file, *GREEDY)
    assert (result.status, result.out, totals(result)) == (0, "", (0, 0, 0, 0))


def test_files_that_cannot_be_read(cli: Cli, tiny: Path, file: Path, tmp_path: Path) -> None:
    line = cli("-m", tiny, "--prompts", file).refused()
    assert line == f"{file}: No such file or directory"
    file.write_bytes(b"good\nna\xefve\n")
    line = cli("-m", tiny, "--prompts", file).refused()
    assert line == f"{file}: expected UTF-8, got byte 0xef at offset 7"
    line = cli("-m", tiny, "--prompts", "-", stdin=b"\xff").refused()
    assert line == "standard input: expected UTF-8, got byte 0xff at offset 0"


def test_prompts_go_with_no_other_prompt(cli: Cli, tiny: Path, file: Path) -> None:
    for other in (("-p", "a"), ("-f", file)):
        result = cli("-m", tiny, "--prompts", file, *other)
        assert (result.status, result.out) == (2, "")
        assert "not allowed with argument --prompts" in result.err


def test_wrong_options_of_the_command_line_run_nothing(cli: Cli, tiny: Path, file: Path) -> None:
    file.write_text("a\n")
    line = cli("-m", tiny, "--prompts", file, "--top-p", 3).refused()
    assert line == "top_p: expected 0 to 1, got 3.0"
