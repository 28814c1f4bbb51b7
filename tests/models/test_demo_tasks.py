"""The demo model's questions: right, reproducible, and split so that no held-out one is trained.

test_demo_tools.py has those with functions and JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import pytest

from tools.train_demo import recall
from tools.train_demo.dialog import Message
from tools.train_demo.heldout import EVALUATED, TOOLS, held_out, prompt
from tools.train_demo.questions import Question, is_held_out
from tools.train_demo.recall import held_out_question, text_of_facts, training_text
from tools.train_demo.smalltalk import PAIRS
from tools.train_demo.story import story
from tools.train_demo.tasks import TASKS
from tools.train_demo.words import NAMES

N = 200
BY_KEY = [task for task in EVALUATED if task not in (*TOOLS, "json")]
SIGNS = {"plus": "+", "Add": "+", "minus": "-", "Subtract": "-", "times": "*", "Multiply": "*"}
# Questions about a long text, and the sentence that says the answer.
RECALLED = {
    r"What is the code of the (.+)\?": r"The code of the {} is (\d{{4}})\.",
    r"Where does (\w+) live\?": r"{} lives in (\w+)\.",
    r"Where does (\w+) work\?": r"{} works in the (\w+)\.",
    r"Which animal does (\w+) like best\?": r"{} likes the (\w+) best\.",
}
# What a chat remembers, what it is asked then, and the answer.
REMEMBERED = (
    (r"(?:My name is|I am|Call me) (\w+)\.", "(What is my name|Who am I|Do you know my name)",
     "Your name is {}."),
    (r"My favorite (animal|color|city) is (\w+)\.",
     "(What is my favorite {0}|Which {0} do I like best)", "Your favorite {} is {}."),
    (r"(?:Remember that the|The) code of my (\w+) is (\d{4})\.", "What is the code of my {}",
     "The code of your {} is {}."),
    (r"(?:I have to buy these|My list): (.+)", "(What is on my list|What did I want to buy)", "{}"),
)  # fmt: skip


def sign_of(text: str) -> str:
    """The operation of a text that asks for one."""
    return next((sign for word, sign in SIGNS.items() if word in text), None) or next(
        sign for sign in "+-*" if f" {sign} " in text
    )


def task_of(text: str) -> str:
    """The task of a plain question of training, or nothing."""
    begins = {
        "Repeat this": "copy", "Say this again": "copy", "Copy the": "copy",
        "Say this backwards": "reverse", "Reverse": "reverse", "Put these": "sort_words",
        "Sort these words": "sort_words", "Sort": "sort", "How many": "count",
        "Which is": "compare", "Start with": "chain",
    }  # fmt: skip
    if found := [task for begin, task in begins.items() if text.startswith(begin)]:
        return found[0]
    if re.search(r"What color is the \w+\?$", text):
        return "colors"
    if re.match(r"\w+ has \d+ ", text):
        return "word_sum"
    if re.match(r"(What is|Add|Subtract|Multiply)? ?\d+ ([-+*]|[a-z]+) \d+( = )?[.?]$", text):
        return "small"
    is_story = re.search(r"(Where is|Who has) [ \w]+\?$", text) and text.split()[0] in NAMES
    return "story" if is_story else ""


def key_of(text: str) -> str:
    """The key of a plain question of training, made anew from its text, or nothing."""
    numbers, listed = sorted(map(int, re.findall(r"\d+", text))), text.partition(": ")[2]
    items = re.findall(r"\w+", listed)
    match task := task_of(text):
        case "small":
            return f"{sign_of(text)} {numbers[0]} {numbers[1]}"
        case "word_sum":
            return f"{'+' if ' more. ' in text else '-'} {numbers[0]} {numbers[1]}"
        case "compare":
            return f"< {numbers[0]} {numbers[1]}"
        case "copy" | "reverse":
            return f"{task} {listed}"
        case "sort":
            return f"sort {numbers}"
        case "sort_words":
            return f"sort {', '.join(sorted(items))}"
        case "count":
            wanted = re.search("does ([a-z]+) appear", text)
            return f"count {wanted[1]} {items}" if wanted else f"count {items}"
        case "chain":
            first, *steps = text.removesuffix(" What is the result?").split(". ")
            asked = [f"{step.rstrip('.')}." for step in steps]
            return f"chain {first.split()[-1]} {asked}"
    return text if task else ""


def chain_is_right(question: Question) -> bool:
    """Whether each line of the thought follows from the line before and from the text."""
    said = re.findall(r"(Start with|Add|Subtract|Multiply by) (\d+)\.", question.text)
    value, lines = int(said[0][1]), question.thought.split("\n")
    for (word, n), line in zip(said[1:], lines, strict=True):
        left, _, result = line.partition(" = ")
        if left != f"{value} {sign_of(word)} {n}" or eval(left) != int(result):
            return False
        value = int(result)
    return 0 <= value <= 999 and question.answer == str(value)


def memory_is_right(asked: str, answer: str, before: tuple[Message, ...]) -> bool:
    """Whether the answer follows from the messages before it; these have to be right as well."""
    texts = [message["content"] for message in before]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    answers: list[str] = []
    for said, ask, form in REMEMBERED:
        for text, reply in turns:
            if found := re.fullmatch(said, text):
                assert reply == (
                    f"Hello, {found[1]}!" if "name" in form else "I will remember that."
                )
                if re.fullmatch(f"{ask.format(*found.groups())}\\?", asked):
                    answers.append(form.format(*found.groups()))
    if step := re.fullmatch(
        r"(Add|And|Subtract) (\d+)( to that.| from that.| more\?| less\?)", asked
    ):
        takes = step[1] == "Subtract" or "less" in step[3]
        answers.append(str(int(texts[-1]) + (-1 if takes else 1) * int(step[2])))
    elif asked == "Now from large to small.":
        answers.append(", ".join(texts[-1].split(", ")[::-1]))
    others = [(t, a) for t, a in turns if not any(re.fullmatch(said, t) for said, *_ in REMEMBERED)]
    assert all(right(Question(task_of(text), text, reply, "")) for text, reply in others)
    return answers == [answer]


def right_about_a_text(question: Question) -> bool:
    text, answer = question.text, question.answer
    match question.task:
        case "colors":
            thing = re.search(r"color is the ([a-z]+)\?", text)
            return thing is not None and f"The {thing[1]} is {answer}." in text
        case "story":
            return story_is_right(text, answer)
        case "chain":
            return chain_is_right(question)
        case "memory":
            return memory_is_right(text, answer, question.before)
        case "recall" | "recall_far" | "recall_2000":
            facts, _, asked = text.rpartition(". ")
            pairs = ((re.fullmatch(ask, asked), said) for ask, said in RECALLED.items())
            sentences = [said.format(found[1]) for found, said in pairs if found]
            return [re.findall(said, facts + ".") for said in sentences] == [[answer]]
    return False


def right(question: Question) -> bool:
    """Whether the answer is right, computed anew from what the model is shown."""
    text, answer = question.text, question.answer
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    listed = text.partition(": ")[2]
    match question.task:
        case "add" | "subtract" | "small":
            sign = sign_of(text)
            results = {"+": sum(numbers), "-": abs(numbers[0] - numbers[1])}
            return int(answer) == (results | {"*": numbers[0] * numbers[1]})[sign]
        case "multiply":
            steps = [step.split(" = ") for step in answer.split(", ")]
            return (
                all(eval(left) == int(right) for left, right in steps)
                and int(steps[-1][1]) == numbers[0] * numbers[1]
            )
        case "compare":
            return int(answer) == (max if "larger" in text else min)(numbers)
        case "word_sum":
            gains = "more" in text.split("How many")[0]
            return int(answer) == numbers[0] + (numbers[1] if gains else -numbers[1])
        case "copy":
            return answer == listed
        case "reverse":
            return answer.split() == listed.split()[::-1]
        case "sort":
            ordered = sorted(numbers, reverse="large to small" in text)
            return answer == ", ".join(map(str, ordered))
        case "sort_words":
            return answer == ", ".join(sorted(listed.split(", ")))
        case "count":
            words = re.findall("[a-z]+", listed)
            wanted = re.search("does ([a-z]+) appear", text)
            return int(answer) == (words.count(wanted[1]) if wanted else len(words))
    return right_about_a_text(question)


@pytest.mark.parametrize("task", BY_KEY)
def test_answers_are_right_and_held_out(task: str) -> None:
    questions = held_out(task, 10 if task.startswith("recall") else 60)
    assert len({prompt(q, "chat") for q in questions}) == len(questions)
    for question in questions:
        assert is_held_out(question.key)
        assert question.task == task
        assert right(question), question


def test_held_out_questions_are_the_same_in_every_run() -> None:
    """Also with another Python: the trainer's may be another one than the engine's."""
    words = "Put these words in alphabetical order: attic, hat, market"
    steps = "Multiply by 7. Add 87. Subtract 97. Subtract 2. Subtract 8. Subtract 96."
    expected = {
        "add": "What is 92 + 15?",
        "sort_words": words,
        "chain": f"Start with 38. {steps} What is the result?",
        "memory": "Now from large to small.",
    }
    assert {task: held_out(task, 1)[0].text for task in expected} == expected
    listed = "white harbor harbor harbor clock white clock harbor"
    asked = held_out("memory", 1)[0].before[0]["content"]
    assert asked == f"How many times does harbor appear here: {listed}?"
    assert held_out("recall_2000", 1)[0].text.startswith("Sam lives in Rome. Maria works in the ")


def trained_questions(rng: Random) -> Iterator[Question]:
    for task in BY_KEY:
        for _ in range(N if task in TASKS else 0):
            yield TASKS[task](rng, False)


def test_training_never_draws_a_held_out_key(rng_of_tasks: Random) -> None:
    """Nor is one asked earlier in a chat, nor does a chain of sums have one as a step."""
    held = {q.key for task in BY_KEY if task in TASKS for q in held_out(task, N)}
    for question in trained_questions(rng_of_tasks):
        assert right(question), question
        assert not is_held_out(question.key)
        assert question.key not in held
        if question.is_plain:
            assert key_of(question.text) == question.key
        for message in question.before[::2]:
            key = key_of(message["content"])
            assert not (key and is_held_out(key)), question
        if question.task == "chain":
            for step in question.thought.split("\n"):
                assert not is_held_out(key_of(f"{step.partition('=')[0]}= ?")), question


@pytest.fixture
def rng_of_tasks(rng: object) -> Random:
    return Random(int(rng.integers(2**31)))  # type: ignore[attr-defined]


def test_both_orders_and_the_story_of_a_sum_are_held_out_together(rng_of_tasks: Random) -> None:
    """12 + 34 in any form has one key; the multiset of a list to sort as well."""
    keys: dict[str, set[frozenset[int]]] = {}
    for task in ("add", "word_sum", "small"):
        for _ in range(N):
            question = TASKS[task](rng_of_tasks, bool(rng_of_tasks.randrange(2)))
            if question.key.startswith("+"):
                numbers = frozenset(int(n) for n in re.findall(r"\d+", question.text))
                keys.setdefault(question.key, set()).add(numbers)
    assert all(len(operands) == 1 for operands in keys.values())
    for _ in range(N):
        question = TASKS["sort"](rng_of_tasks, False)
        assert (
            question.key == f"sort {sorted(int(n) for n in re.findall(r'[0-9]+', question.text))}"
        )


def test_recall_trains_on_no_held_out_pair(rng_of_tasks: Random) -> None:
    for _ in range(20):
        text, facts = training_text(rng_of_tasks, 50)
        assert all(not is_held_out(f"{text} {fact.question}") for fact in facts)


def test_facts_of_a_text_have_one_answer_each(rng_of_tasks: Random) -> None:
    for _ in range(20):
        text, facts = text_of_facts(rng_of_tasks, rng_of_tasks.randint(32, 1400), 0.5)
        assert len({fact.question for fact in facts}) == len(facts)
        assert all(text.count(fact.sentence) == 1 for fact in facts)


def test_far_recall_asks_about_the_first_sentence() -> None:
    question = held_out_question("recall_far", Random(1))
    assert recall.size(question.text) > 1000
    assert question.answer in question.text.split(". ")[0]


def follow(text: str) -> dict[str, str]:
    """Where everybody and everything of a story is in the end, read from its sentences."""
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    for sentence in text.split(". "):
        who = sentence.split()[0]
        if place := re.search(r"(?:went|walked|moved|ran) to the (\w+)", sentence):
            at[who] = place[1]
        elif taken := re.search(r"(?:took|picked up|grabbed) the (\w+)", sentence):
            holder[taken[1]] = who
            at.pop(taken[1], None)
        elif dropped := re.search(r"(?:dropped|put down|left) the (\w+)", sentence):
            at[dropped[1]] = at[holder.pop(dropped[1])]
        elif met := re.search(r"(\w+) met (\w+) there", sentence):
            at[met[1]] = at[met[2]]
        elif given := re.search(r"gave the (\w+) to (\w+)", sentence):
            holder[given[1]] = given[2].rstrip(".")
    return (
        at
        | {thing: at[who] for thing, who in holder.items()}
        | {f"has {thing}": who for thing, who in holder.items()}
    )


def story_is_right(text: str, answer: str) -> bool:
    events, question = text.rsplit(". ", 1)
    state = follow(events + ".")
    if owned := re.match(r"Who has the (\w+)\?", question):
        return answer == f"{state[f'has {owned[1]}']} has the {owned[1]}."
    name = question.rstrip("?").split()[-1]
    subject = question.removeprefix("Where is ").rstrip("?")
    return answer == f"{subject[0].upper()}{subject[1:]} is in the {state[name]}."


def test_stories_have_the_answers_that_follow_from_them(rng_of_tasks: Random) -> None:
    for _ in range(N):
        assert story_is_right(*story(rng_of_tasks))


def test_smalltalk_is_not_ambiguous() -> None:
    assert len({ask for ask, _ in PAIRS}) == len(PAIRS)
