"""Questions with one right answer, drawn from a `random.Random`. All words are in words.py."""

from __future__ import annotations

from random import Random

from tools.train_demo.chains import chain
from tools.train_demo.memory import memory
from tools.train_demo.questions import Draw, Question, by_key, pair_key
from tools.train_demo.records import record
from tools.train_demo.toolcalls import tool_answer, tool_call, tool_calls, tool_none
from tools.train_demo.words import COLORS, COUNTED, NAMES, OBJECTS, WORDS


def _sum_text(rng: Random, a: int, b: int) -> str:
    forms = (f"What is {a} plus {b}?", f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} + {b} = ?")
    return rng.choice(forms)


def _difference_text(rng: Random, a: int, b: int) -> str:
    forms = (f"What is {a} minus {b}?", f"What is {a} - {b}?", f"{a} - {b} = ?")
    return rng.choice((*forms, f"Subtract {b} from {a}."))


def _product_text(rng: Random, a: int, b: int) -> str:
    forms = (f"What is {a} times {b}?", f"What is {a} * {b}?", f"{a} * {b} = ?")
    return rng.choice((*forms, f"Multiply {a} by {b}."))


def _two_digits(rng: Random) -> tuple[int, int]:
    return rng.randrange(10, 100), rng.randrange(10, 100)


def _add(rng: Random) -> Question:
    a, b = _two_digits(rng)
    return Question("add", _sum_text(rng, a, b), str(a + b), pair_key("+", a, b))


def _subtract(rng: Random) -> Question:
    b, a = sorted(_two_digits(rng))
    return Question("subtract", _difference_text(rng, a, b), str(a - b), pair_key("-", a, b))


def _multiply(rng: Random) -> Question:
    """The answer has the steps: 12 * 30 = 360, 12 * 4 = 48, 360 + 48 = 408."""
    a, b = _two_digits(rng)
    tens, ones = b - b % 10, b % 10
    steps = f"{a} * {tens} = {a * tens}"
    if ones:
        steps += f", {a} * {ones} = {a * ones}, {a * tens} + {a * ones} = {a * b}"
    return Question("multiply", _product_text(rng, a, b), steps, pair_key("*", a, b))


def _small(rng: Random) -> Question:
    """Sums, differences and products of a number with one digit; not among the evaluated."""
    a, b, sign = rng.randrange(100), rng.randrange(10), rng.choice("+-*")
    if sign == "-":
        b, a = sorted((a, b))
        return Question("small", _difference_text(rng, a, b), str(a - b), pair_key("-", a, b))
    if rng.random() < 0.5:
        a, b = b, a
    text, answer = (_sum_text, a + b) if sign == "+" else (_product_text, a * b)
    return Question("small", text(rng, a, b), str(answer), pair_key(sign, a, b))


def _compare(rng: Random) -> Question:
    a, b = rng.sample(range(100), 2)
    largest = rng.random() < 0.5
    text = f"Which is {'larger' if largest else 'smaller'}, {a} or {b}?"
    answer = str(max(a, b) if largest else min(a, b))
    return Question("compare", text, answer, pair_key("<", a, b))


def _word_sum(rng: Random) -> Question:
    """A sum or difference in a story; its key is that of the bare sum or difference."""
    a, b, (one, two), thing = *_two_digits(rng), rng.sample(NAMES, 2), rng.choice(COUNTED)
    if rng.random() < 0.5:
        more = rng.choice((f"{two} gives {one} {b} more.", f"Then {one} finds {b} more."))
        answer, key = str(a + b), pair_key("+", a, b)
    else:
        b, a = sorted((a, b))
        more = rng.choice((f"{one} gives {b} of them to {two}.", f"Then {one} loses {b} of them."))
        answer, key = str(a - b), pair_key("-", a, b)
    text = f"{one} has {a} {thing}. {more} How many {thing} does {one} have now?"
    return Question("word_sum", text, answer, key)


def _items(rng: Random, n: int) -> list[str]:
    """Words, letters or digits."""
    kind = rng.randrange(4)
    if kind == 0:
        return [str(rng.randrange(100)) for _ in range(n)]
    if kind == 1:
        return [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(n)]
    return [rng.choice(WORDS) for _ in range(n)]


def _copy(rng: Random) -> Question:
    words = " ".join(_items(rng, rng.randint(3, 16)))
    asks = (f"Repeat this: {words}", f"Say this again: {words}", f"Copy the following: {words}")
    return Question("copy", rng.choice(asks), words, f"copy {words}")


def _reverse(rng: Random) -> Question:
    items = _items(rng, rng.randint(3, 7))
    words = " ".join(items)
    asks = (f"Say this backwards: {words}", f"Reverse the order of this list: {words}")
    return Question("reverse", rng.choice(asks), " ".join(items[::-1]), f"reverse {words}")


def _sort(rng: Random) -> Question:
    numbers = rng.sample(range(100), rng.randint(3, 6))
    key = f"sort {sorted(numbers)}"
    listed = ", ".join(map(str, numbers))
    if rng.random() < 0.75:
        text = rng.choice((f"Sort these numbers: {listed}", f"Sort from small to large: {listed}"))
        numbers.sort()
    else:
        text = f"Sort from large to small: {listed}"
        numbers.sort(reverse=True)
    return Question("sort", text, ", ".join(map(str, numbers)), key)


def _sort_words(rng: Random) -> Question:
    words = rng.sample(WORDS, rng.randint(3, 5))
    listed = ", ".join(words)
    asks = (f"Sort these words: {listed}", f"Put these words in alphabetical order: {listed}")
    ordered = ", ".join(sorted(words))
    return Question("sort_words", rng.choice(asks), ordered, f"sort {ordered}")


def _count(rng: Random) -> Question:
    """How many words, or how often one of them."""
    if rng.random() < 0.4:
        words = rng.sample(WORDS, rng.randint(2, 10))
        text = f"How many words are in this list: {', '.join(words)}?"
        return Question("count", text, str(len(words)), f"count {words}")
    wanted, *others = rng.sample(WORDS, rng.randint(3, 5))
    words = [wanted] * rng.randint(0, 6) + [rng.choice(others) for _ in range(rng.randint(2, 7))]
    rng.shuffle(words)
    text = f"How many times does {wanted} appear here: {' '.join(words)}?"
    return Question("count", text, str(words.count(wanted)), f"count {wanted} {words}")


def _colors(rng: Random) -> Question:
    """A few properties, and a question about one: recall over a short distance."""
    things = rng.sample(OBJECTS, rng.randint(2, 6))
    colors = [rng.choice(COLORS) for _ in things]
    facts = " ".join(f"The {t} is {c}." for t, c in zip(things, colors, strict=True))
    i = rng.randrange(len(things))
    text = f"{facts} What color is the {things[i]}?"
    return Question("colors", text, colors[i], text)


def _story(rng: Random) -> Question:
    from tools.train_demo.story import story

    text, answer = story(rng)
    return Question("story", text, answer, text)


_BETWEEN = ("small", "compare", "sort", "copy", "count", "colors")


def _memory(rng: Random) -> Question:
    def other(rng: Random) -> tuple[str, str]:
        question = TASKS[rng.choice(_BETWEEN)](rng, False)
        return question.text, question.answer

    return memory(rng, other)


TASKS: dict[str, Draw] = {
    "add": by_key(_add),
    "subtract": by_key(_subtract),
    "multiply": by_key(_multiply),
    "small": by_key(_small),
    "compare": by_key(_compare),
    "word_sum": by_key(_word_sum),
    "copy": by_key(_copy),
    "reverse": by_key(_reverse),
    "sort": by_key(_sort),
    "sort_words": by_key(_sort_words),
    "count": by_key(_count),
    "colors": by_key(_colors),
    "story": by_key(_story),
    "chain": by_key(chain),
    "memory": by_key(_memory),
    "json": record,
    "tool_call": tool_call,
    "tool_calls": tool_calls,
    "tool_none": tool_none,
    "tool_answer": tool_answer,
}
# How often a question of a conversation is of which task, relative to each other.
SHARES = {
    "add": 4, "subtract": 4, "multiply": 5, "small": 2, "compare": 1, "word_sum": 3, "copy": 3,
    "reverse": 2, "sort": 4, "sort_words": 3, "count": 6, "colors": 1, "story": 4, "chain": 8,
    "json": 16,
}  # fmt: skip
