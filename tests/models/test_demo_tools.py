"""The demo model's questions with functions and JSON: right, and with words of their own.

Everything is computed anew from what the model is shown: texts, functions as JSON, calls as tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from tools.train_demo import words
from tools.train_demo.dialog import Message, Tool
from tools.train_demo.heldout import EVALUATED, TOOLS, held_out, prompt
from tools.train_demo.questions import Question, is_held_out
from tools.train_demo.rows import conversation, plain, tools_document
from tools.train_demo.tasks import TASKS
from tools.train_demo.toolcalls import session

N = 50
Call = tuple[str, dict[str, Any]]
_PAIRS = (
    words.VERBS, words.NOUNS, words.FIELDS, words.SWITCHES, words.LISTS, words.CHOICES,
    words.VALUES,
)  # fmt: skip
HELD_OUT = {word.lower() for pair in _PAIRS for word in pair[1]}
# What every schema, call and response has.
_KEYWORDS = set(
    re.findall(
        "[a-z]+",
        "type function name description parameters properties required object string enum integer "
        "number boolean array items use this to a an status ok error true false",
    )
)
_VALUES = {
    "string": "[A-Za-z]+(?: [A-Za-z]+)?", "integer": r"\d+", "number": r"\d+\.\d+",
    "boolean": "true|false|yes|no", "array": "[A-Za-z]+(?:, [A-Za-z]+)+",
}  # fmt: skip


def pattern(schema: dict[str, Any]) -> str:
    """How a value that fits a schema is written in a text."""
    return "|".join(schema["enum"]) if "enum" in schema else _VALUES[schema["type"]]


def read(said: str, schema: dict[str, Any]) -> Any:
    """The value that a text says."""
    match schema["type"]:
        case "integer":
            return int(said)
        case "number":
            return float(said)
        case "boolean":
            return said in ("true", "yes")
        case "array":
            return said.split(", ")
    return said


def purpose(tool: Tool) -> tuple[str, str]:
    """The verb and the noun of a function's description."""
    found = re.fullmatch(r"Use this to (\w+) an? (\w+)\.", tool["function"]["description"])
    assert found is not None
    return found[1], found[2]


def as_asked(text: str, tool: Tool) -> Call | None:
    """The call that a text asks for, if it asks for this function in one of the known ways."""
    (verb, noun), parameters = purpose(tool), tool["function"]["parameters"]
    fields = {name.replace("_", " "): schema for name, schema in parameters["properties"].items()}

    def item(link: str) -> str:
        return "(?:" + "|".join(f"{n}{link}(?:{pattern(s)})" for n, s in fields.items()) + ")"

    a, is_ = "an" if noun[0] in "aeiou" else "a", item(" is ")
    forms = (
        rf"Please {verb} the {noun} with {item(' ')}(?: and {item(' ')})*\.",
        rf"{verb.capitalize()} {a} {noun}: {is_}(?:, {is_})*\.",
        rf"I want to {verb} {a} {noun}\.(?: The {is_}\.)+",
        rf"(?:The {is_}\. )+Can you {verb} the {noun}\?",
    )
    if not any(re.fullmatch(form, text) for form in forms):
        return None
    given: dict[str, Any] = {}
    for name, schema in fields.items():
        before, after = r"(?:with|and|The|,|:)", r"(?=\.(?: |$)|, | and )"
        said = re.findall(rf"{before} {name}(?: is)? ({pattern(schema)}){after}", text)
        if len(said) > 1:
            return None
        given |= {name.replace(" ", "_"): read(value, schema) for value in said}
    return (tool["function"]["name"], given) if given.keys() >= {*parameters["required"]} else None


def all_asked(text: str, tools: tuple[Tool, ...], n: int) -> list[list[Call]]:
    """Every way to read a text as `n` calls."""
    if n == 1:
        return [[call] for tool in tools if (call := as_asked(text, tool))]
    cuts = [match.end() for match in re.finditer(r"[.?] ", text)]
    return [
        first + last
        for cut in cuts
        for first in all_asked(text[: cut - 1], tools, 1)
        for last in all_asked(text[cut:], tools, n - 1)
    ]


def calls_in(written: str, tools: tuple[Tool, ...]) -> list[Call]:
    """The calls of an answer, which is nothing else; each value as its schema says."""
    form = r"<tool_call>\n<function=(\w+)>\n((?:<parameter=\w+>\n.*\n</parameter>\n)*)</function>"
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    assert len(schemas) == len(tools)
    out: list[Call] = []
    for name, text in re.findall(rf"{form}\n</tool_call>", written):
        values = re.findall(r"<parameter=(\w+)>\n(.*)\n</parameter>", text)
        types = {key: schemas[name]["properties"][key]["type"] for key, _ in values}
        arguments = {k: v if types[k] == "string" else json.loads(v) for k, v in values}
        assert list(arguments) == [k for k in schemas[name]["properties"] if k in arguments]
        out.append((name, arguments))
    assert re.sub(rf"{form}\n</tool_call>\n?", "", written) == ""
    return out


def same(got: Any, expected: Any) -> bool:
    """Whether values and their types are equal: 3 is not 3.0."""
    return json.dumps(got, sort_keys=True) == json.dumps(expected, sort_keys=True)


def answer_is_right(question: Question) -> bool:
    """Whether an answer says what the function returned, and the call before was right."""
    call, response = question.after
    request, asked = question.text, None
    result = json.loads(response["content"])
    if not result.keys() & {"status", "error"}:
        found = re.fullmatch(r"(.*) (?:What is|Tell me) the ([\w ]+)[.?]", request)
        assert found is not None
        request, asked = found[1], found[2]
    (made,) = call["tool_calls"]
    expected = [[(made["function"]["name"], made["function"]["arguments"])]]
    assert same(all_asked(request, question.tools, 1), expected)
    assert question.thought == f"{made['function']['name']} returned {response['content']}."
    if asked is not None:
        return question.answer == f"The {asked} is {result[asked.replace(' ', '_')]}."
    failed = f"It failed: {result.get('error')}."
    return question.answer == ("It is done." if result == {"status": "ok"} else failed)


def record_is_right(question: Question) -> bool:
    """Whether the object has the schema's properties, as the facts state them for its owner."""
    found = re.fullmatch(
        r"(.*) (?:Describe|Write) the (\w+) as JSON(?: by this schema|\. Schema): ({.*})",
        question.text,
    )
    assert found is not None

    def stated(owner: str, schema: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, of in schema["properties"].items():
            name = key.replace("_", " ")
            if of["type"] == "object":
                values[key] = stated(name, of)
                continue
            forms = (
                f"The {name} of the {owner} is", f"The {owner} has the {name}",
                f"{name.capitalize()} of the {owner}:",
            )  # fmt: skip
            said = re.findall(rf"(?:{'|'.join(forms)}) ({pattern(of)})\.(?= |$)", found[1])
            assert len(said) == 1, (owner, key, question.text)
            values[key] = read(said[0], of)
        assert list(values) == schema["required"]
        return values

    return question.answer == json.dumps(stated(found[2], json.loads(found[3])))


def right(question: Question) -> bool:
    """Whether the answer is the only right one, computed anew from what the model is shown."""
    text, tools = question.text, question.tools
    match question.task:
        case "json":
            return record_is_right(question)
        case "tool_answer":
            return answer_is_right(question)
        case "tool_none":
            named = ("{} (the|an?) {}[ .:?]".format(*purpose(tool)) for tool in tools)
            fits = any(re.search(name, text, re.IGNORECASE) for name in named)
            return not fits and question.answer == "I have no function for that."
    calls = calls_in(question.answer, tools)
    n = 2 if question.task == "tool_calls" else 1
    assert question.thought == f"I call {' and '.join(name for name, _ in calls)}."
    return same(all_asked(text, tools, n), [calls])


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("task", ["json", *TOOLS])
def test_answers_are_right(task: str, held: bool, rng: Any) -> None:
    trained = (TASKS[task](Random(int(rng.integers(2**31))), False) for _ in range(N))
    questions = held_out(task, N) if held else list(trained)
    assert task in EVALUATED
    assert len({prompt(q, "chat") for q in questions}) == N
    for question in questions:
        assert question.task == task
        assert right(question), question


def test_held_out_questions_are_the_same_in_every_run() -> None:
    """Also with another Python: the trainer's may be another one than the engine's."""
    got = {task: held_out(task, 1)[0] for task in ("json", *TOOLS)}
    assert got["json"].answer == '{"marble_altitude": "Kyoto", "destination": 1108, "deadline": 49}'
    assert {task: question.text for task, question in got.items() if task in TOOLS} == {
        "tool_call": "Please harvest the lantern with walnut destination rural.",
        "tool_calls": "I want to decorate a suitcase. The category is 651.1. The discount is 186.5."
        " Can you deliver the prescription?",
        "tool_none": "Please unpack the prescription with frequency 467 and granite material"
        " Granite.",
        "tool_answer": "I want to decorate a lantern. The destination is Penguin comet. The"
        " frequency is 247.",
    }


def kind(schema: dict[str, Any]) -> str:
    return "enum" if "enum" in schema else schema["type"]


def shape(schema: dict[str, Any], marked: bool) -> str:
    """The form in which shapes are held out, made anew from a schema; marked: what is required."""
    flat = [(k, kind(s)) for k, s in schema["properties"].items() if s["type"] != "object"]
    return "shape " + " ".join(t + "!" * (marked and k in schema["required"]) for k, t in flat)


def shapes(question: Question) -> list[str]:
    if question.task == "json":
        return [shape(json.loads(question.text[question.text.index("{") :]), False)]
    return [shape(tool["function"]["parameters"], True) for tool in question.tools]


def spelled(value: Any) -> set[str]:
    """All words of names and values in JSON, without capitals."""
    if isinstance(value, dict):
        return {word for item in value.items() for part in item for word in spelled(part)}
    if isinstance(value, list):
        return {word for part in value for word in spelled(part)}
    found = re.findall("[A-Z]?[a-z]+", value) if isinstance(value, str) else []
    return {word.lower() for word in found} - _KEYWORDS


def spelled_in(question: Question) -> set[str]:
    """The words of a question's functions, calls and responses, or of its schema and object."""
    out = spelled(list(question.tools))
    if question.task == "json":
        out |= spelled(json.loads(question.text[question.text.index("{") :]))
        return out | spelled(json.loads(question.answer))
    for message in question.after:
        out |= spelled(json.loads(message["content"] or "{}")) | spelled_calls(message)
    made = calls_in(question.answer, question.tools) if "<tool_call>" in question.answer else []
    return out | spelled([list(call) for call in made])


def spelled_calls(message: Message) -> set[str]:
    made = [call["function"] for call in message.get("tool_calls", ())]
    return spelled([[call["name"], call["arguments"]] for call in made])


@pytest.mark.parametrize("task", ["json", *TOOLS])
def test_evaluation_has_only_words_and_shapes_of_its_own(task: str, rng: Any) -> None:
    draw = Random(int(rng.integers(2**31)))
    for question in held_out(task, N):
        assert spelled_in(question) <= HELD_OUT
        assert all(is_held_out(shape) for shape in shapes(question))
    for question in (TASKS[task](draw, False) for _ in range(4 * N)):
        assert not spelled_in(question) & HELD_OUT
        assert not any(is_held_out(shape) for shape in shapes(question))


def documents(rng: Random) -> Iterator[str]:
    for _ in range(200):
        for make in (tools_document, conversation, plain):
            yield "".join(text for text, _ in make(rng, []))


def test_training_has_none_of_the_words_and_shapes(rng: Any) -> None:
    draw = Random(int(rng.integers(2**31)))
    for _ in range(1000):
        messages, tools = session(draw, lambda rng: [])
        assert not spelled(tools) & HELD_OUT
        assert not any(is_held_out(shape(t["function"]["parameters"], True)) for t in tools)
        for message in messages:
            assert not spelled_calls(message) & HELD_OUT
            if message["role"] == "tool":
                assert not spelled(json.loads(message["content"])) & HELD_OUT
    n_found = 0
    tags = "tools|tool_call|tool_response"
    for text in documents(draw):
        parts = [part for _, part in re.findall(rf"<({tags})>(.*?)</\1>", text, re.DOTALL)]
        parts += re.findall(r"(?:schema|Schema): ({.*})", text) + re.findall("^({.*})", text)
        n_found += len(parts)
        assert not {word for part in parts for word in spelled(part)} & HELD_OUT
    assert n_found > 500


def test_invented_words_are_no_held_out_ones_in_capitals_either() -> None:
    """A string may get a capital, so that `lisa` would become the held-out `Lisa`."""
    assert words.HELD_OUT_WORDS == HELD_OUT
    trained = {word.lower() for pair in _PAIRS for word in pair[0]}
    assert not trained & HELD_OUT
