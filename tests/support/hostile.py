"""Chat templates that take far more than a chat needs, and how they end.

`python -m tests.support.hostile START STEP` renders every STEP-th of them with a short limit of
time, and writes a line of JSON for each: its index, and the error. The last line has the MiB by
which this process grew, and the peak of the processes that ran them.
"""

from __future__ import annotations

import json
import resource
import sys

from engine.text import jinja_process
from engine.text.template import ChatError, ChatTemplate

_DOUBLED = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
_DEEP = "{% set ns = namespace(x=()) %}{% for i in range(9000) %}"
_BIG = "{% set b = 'a ' * 500000 %}"
_MANY = "{% set many = range(100000) | list %}"
_LOOPS = "{% for a in range(99999) %}"
LIMIT = "expected at most"
# What a template does, and a word of its error; empty where it may render.
HOSTILE = (
    # Loops and calls.
    (_LOOPS * 3 + "{% endfor %}" * 3, LIMIT),
    (_LOOPS * 2 + "{% if b %}{% endif %}" + "{% endfor %}" * 2, LIMIT),
    (_LOOPS + "{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}", LIMIT),
    (_LOOPS + "{% for b in range(99999) if false %}{% endfor %}{% endfor %}", LIMIT),
    ("{% for a in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}", "ecursion"),
    ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
     LIMIT),
    ("{% macro m() %}{{ caller() }}{% endmacro %}" + _LOOPS * 2
     + "{% call m() %}{% endcall %}{% endfor %}{% endfor %}", LIMIT),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "ecursion"),
    (_MANY + _LOOPS + "{% set x = many | select('none') | list %}{% endfor %}", LIMIT),
    (_MANY + _LOOPS + "{% set x = many | map('string') | list %}{% endfor %}", LIMIT),
    (_MANY + _LOOPS + "{% set x = many | sort %}{% endfor %}", LIMIT),
    (_MANY + _LOOPS + "{% set x = many | reverse | list | length %}{% endfor %}", LIMIT),
    (_MANY + _LOOPS + "{% set x = -1 in many %}{% endfor %}", LIMIT),
    (_MANY + _LOOPS + "{% set x = many.index(99999) %}{% endfor %}", LIMIT),
    (_MANY + _LOOPS + "{% set x = many | unique | list | last %}{% endfor %}", LIMIT),
    ("{% for c in 'a' * 1000000 %}{% endfor %}", ""),
    ("{{ range(100) | slice(10 ** 9) | list | length }}", LIMIT),
    ("{% for i in range(50000) %}{{ cycler(*range(50000)).next() }}{% endfor %}", LIMIT),
    ("{{ (['a'] * 999) | sort(attribute='0.' * 100000 ~ '0') }}", LIMIT),
    ("{{ (['a'] * 999) | map(attribute='0.' * 100000 ~ '0') | list }}", LIMIT),
    # Output, captured or not.
    (_LOOPS * 2 + "a" * 9999 + "{% endfor %}" * 2, LIMIT),
    (_LOOPS + "{{ 'a' * 9999 }}{% endfor %}", LIMIT),
    ("{% set x %}" + _LOOPS + "a" * 9999 + "{% endfor %}{% endset %}", LIMIT),
    ("{% filter upper %}" + _LOOPS + "a" * 9999 + "{% endfor %}{% endfilter %}", LIMIT),
    ("{% macro m() %}" + _LOOPS + "a" * 9999 + "{% endfor %}{% endmacro %}{{ m() }}", LIMIT),
    ("{% generation %}" + _LOOPS + "a" * 9999 + "{% endfor %}{% endgeneration %}", LIMIT),
    ("{% set x %}" + _LOOPS + "{{ a }}" * 3000 + "{% endfor %}{% endset %}", LIMIT),
    ("{% set x = 'a' * 999 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}", LIMIT),
    # Texts and lists that grow.
    ("{{ 'a' * 10 ** 9 }}", LIMIT),
    ("{{ 10 ** 9 * 'a' }}", LIMIT),
    ("{{ ([0] * 10 ** 9) | length }}", LIMIT),
    ("{{ (0,) * 10 ** 9 }}", LIMIT),
    ("{% set ns = namespace(x='ab') %}" + _LOOPS
     + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", LIMIT),
    ("{% set ns = namespace(x='ab') %}" + _LOOPS
     + "{% set ns.x = ns.x + ns.x %}{% endfor %}", LIMIT),
    ("{% set ns = namespace(x=[1]) %}" + _LOOPS
     + "{% set ns.x = ns.x + ns.x %}{% endfor %}", LIMIT),
    ("{% set l = [] %}" + _LOOPS * 2 + "{% set _ = l.append(many) %}" + "{% endfor %}" * 2, LIMIT),
    ("{% set l = [] %}" + _LOOPS
     + "{% set _ = l.append([" + "a," * 3000 + "]) %}{% endfor %}", LIMIT),
    ("{% set ns = namespace(x=0) %}" + _LOOPS + "{% set ns.x = [ns.x, [" + "a," * 3000
     + "]] %}{% endfor %}", LIMIT),
    ("{% set ns = namespace(x=0) %}{% macro m(l, a=[" + "a," * 3000 + "]) %}"
     "{% set _ = l.append(a) %}{% endmacro %}{% set l = [] %}" + _LOOPS + "{{ m(l) }}{% endfor %}",
     LIMIT),
    (_MANY + "{% set l = [] %}" + _LOOPS + "{% set _ = l.append(many[:]) %}{% endfor %}", LIMIT),
    (_MANY + "{% set l = [] %}" + _LOOPS
     + "{% set _ = l.append(many.copy()) %}{% endfor %}", LIMIT),
    (_BIG + "{% set l = [] %}" + _LOOPS + "{% set _ = l.append(b[1:]) %}{% endfor %}", LIMIT),
    (_BIG + "{% set l = [] %}" + _LOOPS
     + "{% set _ = l.append(b.split(' ')) %}{% endfor %}", LIMIT),
    ("{% set b = 'éā' * 500000 %}" + _LOOPS + "{% set x = b | list %}{% endfor %}", LIMIT),
    (_BIG + _LOOPS + "{% set x = b.upper() %}{% endfor %}", LIMIT),
    (_BIG + _LOOPS + "{% set x = b | title %}{% endfor %}", LIMIT),
    (_BIG + _LOOPS + "{% set x = 'b' in b %}{% endfor %}", ""),
    (_BIG + _LOOPS + "{% set x = b.count('b') %}{% endfor %}", LIMIT),
    (_BIG + _LOOPS + "{% set x = b == b ~ '' %}{% endfor %}", LIMIT),
    ("{% set b = 'a' * 900000 %}{{ b.replace('a', b) }}", LIMIT),
    ("{% set b = 'a' * 900000 %}{{ b | replace('a', b) }}", LIMIT),
    ("{% set b = 'a' * 900000 %}{{ b.replace('', b) }}", LIMIT),
    ("{% set b = 'a' * 900000 %}{{ ([b] * 9000) | join }}", LIMIT),
    ("{% set b = 'a' * 900000 %}{{ range(90000) | join(b) }}", LIMIT),
    ("{% set b = 'a' * 900000 %}{{ b.join(range(90000) | map('string')) }}", LIMIT),
    ("{{ 'a'.center(10 ** 9) }}", LIMIT),
    ("{{ 'a' | center(10 ** 9) }}", LIMIT),
    ("{{ 'a'.ljust(10 ** 9) ~ 'a'.rjust(10 ** 9) ~ 'a'.zfill(10 ** 9) }}", LIMIT),
    ("{{ 'a\n' | indent(10 ** 9) }}", LIMIT),
    ("{{ ('\n' * 9999) | indent('a' * 99999) }}", ""),
    ("{{ '%1000000000d' % 1 }}", LIMIT),
    ("{{ '%*d' % (10 ** 9, 1) }}", LIMIT),
    ("{{ '%.*f' | format(10 ** 9, 1) }}", LIMIT),
    ("{{ '%(a)1000000000s' | format(a=1) }}", LIMIT),
    ("{{ ('%(a)s' * 99999) % {'a': 'a' * 99999} }}", LIMIT),
    ("{{ '{:1000000000}'.format(1) }}", LIMIT),
    ("{{ '{:{}}'.format(1, 10 ** 9) }}", LIMIT),
    ("{{ '{a:>{w}}'.format_map({'a': 1, 'w': 10 ** 9}) }}", LIMIT),
    ("{{ ('{0}' * 99999).format('a' * 99999) }}", LIMIT),
    ("{{ '\t'.expandtabs(10 ** 9) }}", LIMIT),
    ("{{ 'a'.translate({97: 'a' * 99}) }}", ""),
    ("{{ ('ä' * 9999).encode('punycode') }}", ""),
    ("{{ (1).to_bytes(10 ** 9, 'big') }}", LIMIT),
    ("{{ {}.fromkeys(range(9)) }}", ""),
    ("{{ dict.update(messages[0], a=1) }}", ""),
    ("{{ ('<' | e).striptags() }}", ""),
    ("{{ [1] | batch(10 ** 9, 'a') | list }}", LIMIT),
    ("{{ ([[1]] * 9999) | sum(start=[]) }}", ""),
    ("{{ [1] | tojson(indent=10 ** 9) }}", LIMIT),
    ("{{ range(99999) | list | tojson(indent='a' * 9999) }}", LIMIT),
    ("{{ range(99999) | list | tojson(separators=('a' * 9999, ':')) }}", LIMIT),
    ("{{ strftime_now('%c' * 200000) }}", LIMIT),
    ("{{ lipsum(10 ** 9) }}", LIMIT),
    # Values that hold themselves many times, or deeply.
    (_DOUBLED + "{% endfor %}{{ ns.x }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ ns.x ~ '' }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ ns.x | tojson }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ ns.x | string | length }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ ns.x == [ns.x, 1] }}", ""),
    (_DOUBLED + "{% endfor %}{{ [] | join(ns.x) }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ '%s' % ns.x }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ '{}'.format(ns.x) }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ '{_a}'.format(_a=ns.x) }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ raise_exception(ns.x) }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ [].index(ns.x) }}", LIMIT),
    (_DOUBLED + "{% endfor %}{{ [1][ns.x].a }}", LIMIT),
    (_DEEP + "{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}", ""),
    (_DEEP + "{% set ns.x = {'a': ns.x}.items() | list | first %}{% endfor %}{{ {ns.x: 1} }}", ""),
    (_DEEP + "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}", "ecursion"),
    (_DEEP + "{% set ns.x = ns.x | map('string') %}{% endfor %}{{ ns.x | list }}",
     "ecursion"),
    ("{% set l = [] %}{% set _ = l.append(l) %}{{ l == l }}{{ l | tojson }}", ""),
    ("{% set ns = namespace() %}{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}"
     "{% endfor %}{{ ns.x }}{{ ns.x + 1 }}", LIMIT),
    # Numbers.
    ("{{ 10 ** 5000 }}", "digits"),
    ("{{ 9 ** 9 ** 9 }}", ""),
    ("{% set ns = namespace(x=3) %}" + _LOOPS + "{% set ns.x = ns.x * ns.x %}{% endfor %}", LIMIT),
    ("{{ ('f' * 900000) | int(base=16) % 7 }}", ""),
    ("{{ 1.5 | round(10 ** 9, 'ceil') }}", LIMIT),
    ("{{ 1e308 | int + 1 }}", ""),
    # Texts that CPython searches in quadratic time.
    ("{% set a = 'a' * 400000 %}{{ (a + a).rfind(a + 'b' + a) }}", ""),
    ("{% set a = 'a' * 200000 %}{{ (a + a).rsplit(sep=a + 'b' + a) }}", ""),
    ("{% set a = 'a' * 200000 %}{{ (a + a) | trim('b' * 200000 + 'a') }}", ""),
)  # fmt: skip
# What takes too much before it runs.
HOSTILE_SOURCES = (
    ("a" * 10**7, ""),
    ("{#" + " " * 10**7 + "#}", ""),
    ("{{a}}" * 50_000, LIMIT),
    ("{{ [" + "1," * 20_000 + "] }}", ""),
    ("{{ " + "x+" * 5_000 + "1 }}", "ecursion"),
    ("{{ " + "not " * 9_000 + "1 }}", "ecursion"),
    ("{{ x" + ".a" * 5_000 + " }}", "ecursion"),
    ("{{ x" + "|e" * 5_000 + " }}", "ecursion"),
    ("{{ " + "[" * 5_000 + "]" * 5_000 + " }}", "ecursion"),
    ("{% if a %}" * 2_000 + "{% endif %}" * 2_000, "ecursion"),
    ("{% generation %}" * 2_000 + "{% endgeneration %}" * 2_000, "ecursion"),
    ("{% for a in b %}" * 40 + "{{ a }}" * 2_000 + "{% endfor %}" * 40, ""),
    ("{% for x in y %}" + "".join(f"{{% set v{i} = 1 %}}" for i in range(1_000))
     + "{% include 'x' %}" * 1_000 + "{% endfor %}", LIMIT),
    ("{{ 0x" + "f" * 200_000 + " }}", "digits"),
    ("{% autoescape true %}{% endautoescape %}", ""),
    ("{% block a %}{% endblock %}", ""),
    ("{{ x | urlize }}", ""),
)  # fmt: skip


def said(source: str) -> str:
    """The error of a template; empty if there is none."""
    try:
        ChatTemplate(source).render([{"role": "user", "content": "a"}])
    except ChatError as error:
        return str(error)
    return ""


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss >> 10


def main() -> None:
    start, step = map(int, sys.argv[1:])
    jinja_process._SECONDS = 0.2
    before = _peak(resource.RUSAGE_SELF)
    for i, (source, _) in list(enumerate((*HOSTILE, *HOSTILE_SOURCES)))[start::step]:
        print(json.dumps([i, said(source)]), flush=True)
    jinja_process._process.end()
    grown = _peak(resource.RUSAGE_SELF) - before
    print(json.dumps([grown, _peak(resource.RUSAGE_CHILDREN)]))


if __name__ == "__main__":
    main()
