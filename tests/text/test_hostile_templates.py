"""What a chat template may take: hostile ones end soon, honest ones render as in Jinja."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jinja2
import pytest
from jinja2 import ext, meta

from engine.text.template import BUILT_IN, ChatError, ChatTemplate
from tests.support.chats import CHATML, QWEN35_STYLE, TOOLS
from tests.support.hostile import HOSTILE, HOSTILE_SOURCES

ROOT = Path(__file__).parents[2]
ALL = (*HOSTILE, *HOSTILE_SOURCES)
USER = [{"role": "user", "content": "a"}]


def test_hostile_templates_end_in_one_line() -> None:
    command = [sys.executable, "-m", "tests.support.hostile"]
    runs = [
        subprocess.Popen([*command, str(i), "2"], cwd=ROOT, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    said: dict[int, str] = {}
    for run in runs:
        *lines, (grown, peak) = map(json.loads, run.communicate(timeout=300)[0].splitlines())
        assert run.returncode == 0
        said |= dict(lines)
        # In MiB: an output of 10 MB is read, and a source of 10 MB allows 900.
        assert grown < 100
        assert peak < 600
    assert sorted(said) == list(range(len(ALL)))
    wrong = [(ALL[i], error) for i, error in said.items() if ALL[i][1] not in error]
    assert not wrong
    assert all(error.isprintable() for error in said.values())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3, "2 seconds of work"),
        # One call of C, which Python can't interrupt.
        ("{{ (9 ** 99999999) is odd }}", "2 seconds of work"),
        ("{{ 'a' * 10**9 }}", "256 MiB of memory .or what ulimit -v leaves."),
        ("{{ 'a' * 3 * 10**6 }}", "2,09[0-9],[0-9]{3} bytes of text"),
    ],
)
def test_what_a_template_may_take(source: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ChatError, match=f"^chat template: expected at most {words}, and it "):
        ChatTemplate(source).render(USER)
    # In two seconds of work, and this process does none: other tests may run at once.
    assert time.monotonic() - start < 60
    assert ChatTemplate("{{ messages[0].content }}").render(USER) == "a"


@pytest.mark.parametrize("source", [QWEN35_STYLE, CHATML, BUILT_IN["chatml"]])
@pytest.mark.parametrize(("n", "size"), [(1_000, 10_000), (5_000, 10), (2, 5_000_000)])
def test_long_chats_stay_below_the_limits(source: str, n: int, size: int) -> None:
    words = "words and more\U0001f600\n" * (size // 15)
    answer = {"role": "assistant", "content": f"<think>\n{words}\n</think>\n\n{words}"}
    chat = [{"role": "user", "content": words}, answer] * (n // 2) + USER
    text = ChatTemplate(source).render(chat, TOOLS)
    assert text.count("<|im_start|>user") == n // 2 + 1
    assert text.count(words.strip()) >= n // 2


HONEST = (
    "{{ 'a-b'.split('-') }}{{ 'a b'.rsplit(maxsplit=1) }}{{ 'abcb'.rsplit('b', 1) }}",
    "{{ ' a '.strip() }}{{ 'xax'.lstrip('x') }}{{ 'xax'.rstrip('x') }}{{ 'xax' | trim('x') }}",
    "{{ 'aba'.replace('a', 'c', 1) }}{{ 'aba' | replace('a', 'c') }}{{ 7 | replace(7, 8) }}",
    "{{ '-'.join(['a', 'b']) }}{{ ['a', 1] | join('-') }}{{ 'ab' | join('-') }}",
    "{{ '-'.join(['a'] | map('upper')) }}{{ [{'a': 1}, {'a': 2}] | join('-', attribute='a') }}",
    "{{ 'a'.center(5) }}{{ 'a'.ljust(3) }}{{ '7'.zfill(3) }}{{ 'a' | center(9) }}",
    "{{ '%s %5d %%' % ('a', 7) }}{{ '%(a)s' % {'a': 1} }}{{ '%s-%s' | format(1, 2) }}",
    "{{ '{} {:>5} {a[b]}'.format(1, 2, a={'b': 3}) }}{{ '{{{a}}}'.format_map({'a': 1}) }}",
    "{{ 'a\n\nb' | indent }}{{ 'a\nb' | indent(2, true) }}{{ 'a\nb' | indent(width='> ') }}",
    "{{ 'a b c d' | truncate(5, true, '') }}{{ 'ab' | title }}{{ 'A' | lower }}",
    "{{ 2 ** 10 }}{{ 7 // 2 }}{{ -7 % 3 }}{{ 7 / 2 }}{{ 1.5 * 2 }}{{ 'ab' * 3 }}{{ [1] * 2 }}",
    "{{ [1] + [2] }}{{ (1,) + (2,) }}{{ 1 ~ 'a' ~ none ~ x }}{{ 'a' + 'b' + 'c' }}{{ 1 - 2 + 3 }}",
    "{{ [3, 1] | sort }}{{ ['b', 'A'] | sort }}{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') }}",
    "{{ [1, 2, 1] | unique | list }}{{ [1, 2] | sum }}{{ [1, 2] | max }}{{ [] | min }}",
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1} | items | list }}{{ {'a': 1}.items() }}",
    "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ 'abc' | reverse }}",
    "{{ ['1', 'x'] | map('int', 9) | list }}{{ 'ff' | int(base=16) }}{{ 2.567 | round(1) }}",
    "{{ [1, none] | select | list }}{{ [1, 2] | reject('eq', 1) | list }}{{ x | default('d') }}",
    "{{ [{'a': 1}, {}] | selectattr('a', 'defined') | list }}"
    "{{ [{'a': {'b': 1}}] | map(attribute='a.b') | first }}",
    "{% for k, v in [{'k': 1, 'v': 2}] | groupby('k') %}{{ k }}{{ v }}{% endfor %}{{ '<' | e }}",
    "{% for a in [1, 2, 3] if a != 2 %}{{ loop.index }}{{ loop.last }}{{ a }}{% endfor %}",
    "{% for a in [] %}{% else %}none{% endfor %}{% for a in [1, [2, [3]]] recursive %}"
    "{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}{{ loop.depth }}{% endif %}{% endfor %}",
    "{% macro m(a, b=2) %}<{{ a }}{{ b }}{{ caller() if caller }}>{% endmacro %}{{ m(1) }}"
    "{{ m(1, b=3) }}{% call m(4) %}c{% endcall %}"
    "{% for i in [1, 2] %}{% set j = i %}{{ m(j, b=i) }}{% endfor %}",
    "{% set ns = namespace(a=1) %}"
    "{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}a{{ x }}{% endfilter %}"
    "{% raw %}{{{% endraw %}",
    "{% set l = 'abcdef' %}{{ l[1:3] }}{{ l[::-1] }}{{ l[-1] }}{{ [1, 2][5] }}"
    "{{ {'a': 1}['b'] is defined }}",
    "{% set k = 'a' %}{{ {'a': 1}[k] }}{{ {k: 1, (k, 1): 2} }}"
    "{{ {'a': 1}.get('b', 3) }}{{ (1, (2, 3)) }}",
    "{{ 1 < 2 <= 2 != 3 }}{{ 'a' in 'ab' }}{{ 1 not in [1] }}{{ 'a' in {'a': 1} }}{{ [1] == [1] }}",
    "{{ 'A' is upper }}{{ 3 is odd }}{{ 4 is divisibleby 2 }}{{ 1 is in [1] }}{{ none is none }}",
    "{{ cycler('a', 'b').next() }}{% set j = joiner('-') %}{{ j() }}{{ j() }}{{ dict(a=1) }}",
    "{{ 'a' if x is defined }}{{ not x }}{{ x or 'b' }}{{ 'é\U0001f600' | urlencode }}"
    "{{ 1.0 }}{{ true }}",
    "{{ {'b': [1], 'a': 'x'} | pprint }}{{ '<b>a</b>  c' | striptags }}{{ 'a.bc' | urlize }}"
    "{{ 'a b c' | wordwrap(3) }}{{ {'a': 1} | xmlattr }}{{ 'a'.encode() }}{{ 'a'.translate({}) }}",
    "{% block a %}b{{ self.c() }}{% endblock %}{% block c %}d{% endblock %}"
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
)


@pytest.mark.parametrize("source", HONEST)
def test_what_jinja_renders(source: str) -> None:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
    )
    assert ChatTemplate(source).render(USER) == environment.from_string(source).render()


@pytest.mark.parametrize("source", [*HONEST, CHATML, BUILT_IN["chatml"]])
def test_the_names_that_a_template_reads(source: str) -> None:
    environment = jinja2.Environment(extensions=[ext.loopcontrols])
    expected = meta.find_undeclared_variables(environment.parse(source))
    assert ChatTemplate(source).variables == expected
