"""Checks of what callers give: each raises one line that says what was expected and what came.

Every function takes the error's class first and the name of the value second, and returns the
value in the one form that the engine works with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, NoReturn

import numpy as np

from engine.errors import EngineError

_MAX_SHOWN = 80
# Tuples: a union is made anew, and slower, each time.
_INTEGERS = (int, np.integer)
_NUMBERS = (int, float, np.integer, np.floating)
Errors = type[EngineError]


def shown(value: object) -> str:
    """A value as an error's text shows it: in one line, cut short."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # The repr of a foreign class may raise anything.
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def refuse(error: Errors, name: str, expected: str, value: object) -> NoReturn:
    raise error(f"{name}: expected {expected}, got {shown(value)}")


def put(made: object, name: str, value: object) -> None:
    """Give a frozen dataclass, while it is made, a checked value in the engine's own form."""
    object.__setattr__(made, name, value)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean X?)`, or nothing if no known name is as near as `cutoff`, of 1."""
    near = difflib.get_close_matches(name, list(known), 1, cutoff)
    return f" (did you mean {near[0]}?)" if near else ""


def is_integer(value: object) -> bool:
    """True for Python's and numpy's integers, not for truth values."""
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def integer(error: Errors, name: str, value: Any, low: int = 0, high: int = 2**31 - 1) -> int:
    if not is_integer(value):
        refuse(error, name, "an integer", value)
    if not low <= value <= high:
        expected = f"at least {low}" if value < low else f"at most {high}"
        refuse(error, name, expected, value)
    return int(value)


def is_number(value: object) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A number as Python's own, where it is one of numpy's."""
    if not isinstance(value, np.generic):
        return value
    return int(value) if isinstance(value, np.integer) else float(value)


def flag(error: Errors, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        refuse(error, name, "true or false", value)
    return bool(value)


def text(error: Errors, name: str, value: Any) -> str:
    if not isinstance(value, str):
        refuse(error, name, "a text", value)
    return value


def path(error: Errors, name: str, value: Any) -> str:
    found = fspath(value) if isinstance(value, str | PathLike) else None
    if not isinstance(found, str) or not found:
        refuse(error, name, "a path", value)
    if "://" in found:
        refuse(error, name, "a file (nothing is downloaded here)", value)
    return found


def instance(error: Errors, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        refuse(error, name, f"a {kind.__name__}", value)


def one_of(error: Errors, name: str, value: Any, known: Sequence[str | None]) -> None:
    if not isinstance(value, str | None) or value not in known:
        is_word = isinstance(value, str) and value.isprintable() and len(value) <= _MAX_SHOWN
        came = value if is_word else shown(value)
        raise error(f"{name}: expected one of {', '.join(k for k in known if k)}, got {came}")


def sequence(error: Errors, name: str, value: Any, of: str) -> Sequence[Any]:
    """A list, tuple or array of what `of` says; texts, bytes and mappings are none."""
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    is_one = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    if not is_array and not is_one:
        refuse(error, name, f"a sequence of {of}", value)
    return value  # type: ignore[no-any-return]


def texts(error: Errors, name: str, value: Any) -> tuple[str, ...]:
    """Texts, none of them empty; one text stands for itself."""
    values = (value,) if isinstance(value, str) else sequence(error, name, value, "texts")
    for one in values:
        if not isinstance(one, str):
            refuse(error, name, "texts", one)
        if not one:
            raise error(f"{name}: expected texts that are not empty")
    return tuple(values)


def mapping(error: Errors, name: str, value: Any, of: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        refuse(error, name, f"a mapping of {of}", value)
    return value


def token_ids(error: Errors, name: str, ids: Any, n_vocab: int) -> list[int]:
    """Ids of a vocabulary, as a list; each is an integer from 0 to n_vocab - 1."""
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        ids = ids.tolist()
    found = list(sequence(error, name, ids, "token ids"))
    # Nearly all are: what is wrong is only looked for if something is.
    if not all(type(i) is int for i in found):
        for at, value in enumerate(found):
            if not is_integer(value):
                refuse(error, f"{name}: token {at}", "an integer", value)
        found = [int(i) for i in found]
    if found and not (min(found) >= 0 and max(found) < n_vocab):
        token = next(i for i in found if not 0 <= i < n_vocab)
        raise error(f"{name}: token id {shown(token)}: expected 0 to {n_vocab - 1}")
    return found
