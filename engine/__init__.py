"""A minimal inference engine for hybrid language models: gated delta nets with full attention."""

from engine.engine import Engine
from engine.errors import EngineError
from engine.sampling.params import SamplingParams
from engine.text.template import ChatTemplate

__all__ = ["ChatTemplate", "Engine", "EngineError", "SamplingParams"]
