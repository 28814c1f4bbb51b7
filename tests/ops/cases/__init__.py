"""Cases by op name: `cases()` of the module here that is named as the op's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

from engine.ops import OPS
from tests.support.cases import Case

CASES: dict[str, Callable[[], Iterable[Case]]] = {
    name: import_module(f"tests.ops.cases.{name.lower()}").cases for name in OPS
}
