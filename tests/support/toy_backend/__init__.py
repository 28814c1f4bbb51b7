"""A backend in one folder, the example of docs/adding-a-backend.md."""

from tests.support.toy_backend.backend import ToyBackend

__all__ = ["ToyBackend"]
