"""The names that the package `engine` exports."""

from engine.config import ConfigError
from engine.engine import Engine
from engine.errors import EngineError
from engine.formats.gguf import GGUFError
from engine.kvcache.pool import MemoryFullError
from engine.kvcache.sequences import Checkpoint, CheckpointError, SequenceError
from engine.runtime.batch import BatchError, Chunk, Logits
from engine.runtime.completion import Completion, GenerationError
from engine.runtime.finite import NonFiniteError
from engine.runtime.owner import OwnerError
from engine.runtime.request import FinishReason, Timings, Token
from engine.runtime.requests import PromptError, PromptTooLongError
from engine.sampling.grammar import Grammar, GrammarError
from engine.sampling.logprobs import Logprobs
from engine.sampling.params import LogitsProcessor, SamplingError, SamplingParams
from engine.text.template import ChatError, ChatTemplate, Message, Sampled
from engine.text.tokenizer import Tokenizer, TokenizerError
from engine.version import __version__

__all__ = [
    "BatchError", "ChatError", "ChatTemplate", "Checkpoint", "CheckpointError", "Chunk",
    "Completion", "ConfigError", "Engine", "EngineError", "FinishReason", "GGUFError",
    "GenerationError", "Grammar", "GrammarError", "Logits", "LogitsProcessor", "Logprobs",
    "MemoryFullError", "Message", "NonFiniteError", "OwnerError", "PromptError",
    "PromptTooLongError", "Sampled", "SamplingError", "SamplingParams", "SequenceError", "Timings",
    "Token", "Tokenizer", "TokenizerError", "__version__",
]  # fmt: skip
