"""A backend in one folder, the example of docs/adding-a-backend.md."""

from engine.backends.base import Registration
from tests.support.toy_backend.backend import ToyBackend

REGISTRATION = Registration(
    "toy",
    ToyBackend.traits,
    make=lambda options: ToyBackend(),
    missing=lambda: "it is a toy",
    describe=lambda: "toy",
)

__all__ = ["REGISTRATION", "ToyBackend"]
