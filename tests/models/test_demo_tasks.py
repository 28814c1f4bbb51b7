"""The demo model's questions: right, reproducible, and split so that no held-out one is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import pytest

from tools.train_demo import recall
from tools.train_demo.heldout import EVALUATED, held_out
from tools.train_demo.recall import held_out_question, text_of_facts, training_text
from tools.train_demo.rows import ANSWER, conversation, plain, recall_document
from tools.train_demo.smalltalk import PAIRS
from tools.train_demo.story import story
from tools.train_demo.tasks import TASKS, Question, draw, is_held_out

N = 200


def right(question: Question) -> bool:  # noqa: C901
    """Whether the answer is right, computed anew from the text of the question."""
    text, answer = question.text, question.answer
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    listed = text.partition(": ")[2]
    match question.task:
        case "add":
            return int(answer) == sum(numbers)
        case "subtract":
            return int(answer) == abs(numbers[0] - numbers[1])
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
        case "colors":
            thing = re.search(r"color is the ([a-z]+)\?", text)
            return thing is not None and f"The {thing[1]} is {answer}." in text
        case "recall" | "recall_far":
            return answer in text
    return question.task in ("small", "story")  # tested below, and not evaluated


@pytest.mark.parametrize("task", EVALUATED)
def test_answers_are_right_and_held_out(task: str) -> None:
    questions = held_out(task, 10 if task.startswith("recall") else 60)
    assert len({q.text for q in questions}) == len(questions)
    for question in questions:
        assert is_held_out(question.key)
        assert question.task == task
        assert right(question), question


def test_held_out_questions_are_the_same_in_every_run() -> None:
    """Also with another Python: the trainer's may be another one than the engine's."""
    words = "Put these words in alphabetical order: attic, hat, market"
    expected = {"add": "What is 92 + 15?", "sort_words": words}
    assert {task: held_out(task, 1)[0].text for task in expected} == expected


def trained_questions(rng: Random) -> Iterator[Question]:
    for task in TASKS:
        for _ in range(N):
            yield draw(task, rng, held_out=False)


def test_training_never_draws_a_held_out_key(rng_of_tasks: Random) -> None:
    held = {q.key for task in TASKS if task != "small" for q in held_out(task, N)}
    for question in trained_questions(rng_of_tasks):
        assert not is_held_out(question.key)
        assert question.key not in held


@pytest.fixture
def rng_of_tasks(rng: object) -> Random:
    return Random(int(rng.integers(2**31)))  # type: ignore[attr-defined]


def test_both_orders_and_the_story_of_a_sum_are_held_out_together(rng_of_tasks: Random) -> None:
    """12 + 34 in any form has one key; the multiset of a list to sort as well."""
    keys: dict[str, set[frozenset[int]]] = {}
    for task in ("add", "word_sum", "small"):
        for _ in range(N):
            question = TASKS[task](rng_of_tasks)
            if question.key.startswith("+"):
                numbers = frozenset(int(n) for n in re.findall(r"\d+", question.text))
                keys.setdefault(question.key, set()).add(numbers)
    assert all(len(operands) == 1 for operands in keys.values())
    for _ in range(N):
        question = TASKS["sort"](rng_of_tasks)
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


def test_stories_have_the_answers_that_follow_from_them(rng_of_tasks: Random) -> None:
    for _ in range(N):
        text, answer = story(rng_of_tasks)
        events, question = text.rsplit(". ", 1)
        state = follow(events + ".")
        if owned := re.match(r"Who has the (\w+)\?", question):
            assert answer == f"{state[f'has {owned[1]}']} has the {owned[1]}."
        else:
            name = question.rstrip("?").split()[-1]
            subject = question.removeprefix("Where is ").rstrip("?")
            assert answer == f"{subject[0].upper()}{subject[1:]} is in the {state[name]}."


def test_documents_depend_on_the_seed_alone() -> None:
    for make in (conversation, plain, recall_document):
        once, again, other = (make(Random(seed), [["len", "Size."]]) for seed in (1, 1, 2))
        assert once == again != other
        assert any(kind == ANSWER for _, kind in once)


def test_smalltalk_is_not_ambiguous() -> None:
    assert len({ask for ask, _ in PAIRS}) == len(PAIRS)
