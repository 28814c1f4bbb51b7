"""Grammars that an output must follow, and the masks of tokens that may come next.

llguidance compiles grammars and computes masks; it is imported when the first grammar comes. A
grammar is compiled once, apart from the threads that run steps. The mask of the next token is
computed in a thread of its own, from the time its predecessor is known.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import checks
from engine.errors import EngineError, thread_refused
from engine.sampling import gbnf, schema
from engine.text.tokenizer import Tokenizer

_MAX_BYTES, _MAX_GBNF = 512 << 10, 64 << 10  # GBNF is read in Python.
_MAX_COMPILED, _COMPILE_S = 64, 20.0
_N_COMPILERS, _N_MASKERS = 2, 2
# llguidance follows references by calls: a thousand in each other take 8 MB, and where there is
# no more the process dies. This is enough for all that _MAX_BYTES have room for.
_STACK_BYTES = 256 << 20
_KINDS = ("json_schema", "gbnf", "lark", "regex")
# As llama.cpp has it: between two tokens of JSON is a space, or a line's end and an indentation.
_SPACE = r" |\n{1,2}[ \t]{0,20}"
# A token is allowed if any text goes on with it, not if it is how the tokenizer would cut the text.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_LARK = "%llguidance"  # Begins texts in Lark, as in llama.cpp.
# Items of llguidance's parser: in one mask, some 100 ms; and after a character, which takes 5 ms of
# the thread that runs steps: an object of 1,000 properties.
_ITEMS, _ROW = 1_000_000, 4_000
_STATES = 50_000  # The lexer keeps so many for a grammar; a state takes 1 to 2 kB.
_MAX_NAMED, _MAX_TOLD = 4, 300
# Tokens of such characters are allowed together where a lexeme takes them all: within texts of JSON
# and of XML, which masks then have in 60 us, not in 1.5 ms (152k tokens).
_PLAIN = r'[^"\\<>\x00-\x1F\x7F]'
_SLICES = [r"[ \t\r\n]+", _PLAIN + "{1,10}", _PLAIN + "{1,30}", _PLAIN + "+"]


class GrammarError(EngineError):
    """A grammar that can't be used; `why` is the text without the name of the parameter."""

    def __init__(self, why: str) -> None:
        self.why = "".join(c if c.isprintable() else " " for c in why)
        super().__init__(f"grammar: {self.why}")


@dataclass(frozen=True)
class Grammar:
    """A description that an output must match. Make one with `json`, `gbnf`, `lark` or `regex`.

    after: it holds for what follows this text in the output (`</think>`), from the start where this
    is empty. Raises GrammarError.
    """

    kind: str
    text: str
    after: str = ""

    def __post_init__(self) -> None:
        checks.one_of(GrammarError, "kind", self.kind, _KINDS)
        for name in ("text", "after"):
            value = checks.text(GrammarError, name, getattr(self, name))
            try:
                n = len(value.encode())
            except UnicodeEncodeError:
                checks.refuse(GrammarError, name, "Unicode", value)
            most = _MAX_GBNF if self.kind == "gbnf" else _MAX_BYTES
            if n > most:
                raise GrammarError(f"expected at most {most} bytes, got {n}")
        if not self.text.strip() and self.kind != "regex":
            raise GrammarError(f"expected a grammar ({self.kind}), got an empty text")

    @classmethod
    def json(cls, schema: Any = None) -> Grammar:
        """JSON that matches a schema: an object, true, or their JSON text; None for any object."""
        schema = {"type": "object"} if schema is None else schema
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            if isinstance(value, dict | bool):
                return cls("json_schema", json.dumps(value, allow_nan=False))
        except (ValueError, TypeError, RecursionError) as error:
            raise GrammarError(f"expected a JSON schema, got {error}") from None
        raise GrammarError(f"expected a JSON schema, an object, got {checks.shown(value)}")

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """llama.cpp's notation; the rule `root` is the output. As there, a text that begins with
        %llguidance is Lark."""
        is_lark = isinstance(text, str) and text.startswith(_LARK)
        return cls("lark" if is_lark else "gbnf", text)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """llguidance's dialect of Lark; the rule `start` is the output."""
        return cls("lark", text)

    @classmethod
    def regex(cls, text: str) -> Grammar:
        """A regular expression of Rust's, without look-around, for the whole output."""
        return cls("regex", text)


# The fields in which requests have one, as llama.cpp's and vLLM's servers name them.
FORMS: dict[str, Callable[[Any], Grammar]] = {
    "grammar": Grammar.gbnf, "json_schema": Grammar.json, "guided_regex": Grammar.regex,
}  # fmt: skip


class Matcher:
    """Follows one output. One thread at a time may use it. `is_complete`: whether the output is
    whole, and nothing may follow."""

    def __init__(
        self, inner: Any, first: NDArray[np.uint32], tokenizer: Tokenizer,
        submit: Callable[[Callable[[], Any]], Future[Any]],
    ) -> None:  # fmt: skip
        self._inner, self._tokenizer, self._submit = inner, tokenizer, submit
        self._n_words, self.is_complete = len(first), False
        self._mask: Future[NDArray[np.uint32]] = Future()
        self._mask.set_result(first)

    @property
    def is_ready(self) -> bool:
        """Say whether the mask is there, so that `bits` returns at once."""
        return self._mask.done()

    def wait(self, seconds: float) -> None:
        """Until it is ready, or the time is over."""
        try:
            self._mask.exception(seconds)
        except TimeoutError:
            return

    def bits(self) -> NDArray[np.uint32]:
        """A bit for each token, from the lowest of each word on: whether it may come next. Raises
        GrammarError where the grammar takes too much."""
        return self._mask.result()

    def allowed(self, n_vocab: int) -> NDArray[np.intp]:
        """The tokens that may come next, of n_vocab. Raises GrammarError if there are none."""
        bits = np.unpackbits(self.bits().view(np.uint8), bitorder="little")
        found = np.flatnonzero(bits[:n_vocab])
        if not len(found):
            raise GrammarError(_NOTHING)
        return found

    def accept(self, *tokens: int) -> None:
        """Go on behind tokens, and begin with the next mask. Raises GrammarError if the grammar
        does not allow them."""
        self.bits()
        for token in tokens:
            if not self._inner.consume_token(token):
                told = self._inner.get_error()
                if "satisfy the grammar" in told or self.is_complete:
                    told = f"expected a token that it allows, got {self.named([token])}"
                raise GrammarError(_told(told))
            self.is_complete = self._inner.is_stopped()
        self._mask = self._submit(partial(_mask, self._inner, self._n_words))

    def named(self, tokens: Sequence[int]) -> str:
        """Tokens as an error shows them."""
        pieces = (self._tokenizer.token_bytes(i, special=True) for i in tokens[:_MAX_NAMED])
        texts = [checks.shown(raw.decode("utf-8", "replace")) for raw in pieces]
        return ", ".join(texts) + ", …" * (len(tokens) > _MAX_NAMED)


_NOTHING = "expected one that tokens of the vocabulary can spell, got one that none goes on with"


def _mask(inner: Any, n_words: int) -> NDArray[np.uint32]:
    bits = np.zeros(n_words, np.uint32)
    inner.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    if inner.is_error():
        raise GrammarError(_told(inner.get_error()))
    return bits


class Grammars:
    """The grammars of one vocabulary, compiled; any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self._tokenizer, self._n_vocab = tokenizer, max(n_vocab, tokenizer.n_vocab)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Future[Any]] = OrderedDict()
        self._own: Any = None
        self._compilers = ThreadPoolExecutor(_N_COMPILERS, "grammars")
        self._maskers = ThreadPoolExecutor(_N_MASKERS, "masks")

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher for a new output. Waits until the grammar is compiled. Raises GrammarError."""
        with self._lock:
            if (found := self._compiled.get(grammar)) is None:
                found = _submitted(self._compilers, partial(self._compile, grammar))
                self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        try:
            inner, first = found.result(_COMPILE_S)
        except TimeoutError:
            expected = f"one that compiles within {_COMPILE_S:.0f} s"
            raise GrammarError(f"expected {expected}, got a larger one") from None
        except BaseException:
            with self._lock:
                self._compiled.pop(grammar, None)
            raise
        return Matcher(
            inner.deep_copy(), first, self._tokenizer, partial(_submitted, self._maskers)
        )

    def _compile(self, grammar: Grammar) -> tuple[Any, NDArray[np.uint32]]:
        """The matcher at its start, and the first mask."""
        library = _library()
        with self._lock:
            if self._own is None:
                self._own = _tokens(library, self._tokenizer, self._n_vocab)
        limits = library.LLParserLimits(
            max_items_in_row=_ROW, step_max_items=_ITEMS, max_lexer_states=_STATES,
            verbose_errors=False,
        )  # fmt: skip
        text = _composed(grammar, self._tokenizer)
        inner = library.LLMatcher(self._own, text, log_level=0, limits=limits)
        if inner.is_error():
            raise GrammarError(_told(inner.get_error()))
        first = _mask(inner, (self._own.vocab_size + 31) // 32)
        if not first.any():
            raise GrammarError(_NOTHING)
        return inner, first


def _submitted(pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Future[Any]:
    before = threading.stack_size(_STACK_BYTES)
    try:
        return pool.submit(work)
    except RuntimeError as error:
        raise thread_refused("a thread for grammars", error) from None
    finally:
        threading.stack_size(before)


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise GrammarError("it needs llguidance: pip install 'gdn-engine[constraints]'") from None
    return llguidance


class _Vocabulary:
    """Our vocabulary as llguidance takes it. Control tokens have no text; nor has a token that
    begins with the byte 0xFF, which is llguidance's mark, and in no UTF-8."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.tokens, self.special_token_ids = list[bytes](), list[int]()
        for i in range(tokenizer.n_vocab):
            text, name = tokenizer.token_bytes(i), tokenizer.token_bytes(i, special=True)
            is_special = i in tokenizer.eog_ids or (not text and bool(name))
            self.special_token_ids += [i] * is_special
            self.tokens.append(name if is_special else b"" if text[:1] == b"\xff" else text)
        self.tokens += [b""] * (n_vocab - len(self.tokens))
        # Without an end token in the vocabulary, one that is never sampled.
        self.ends = sorted(tokenizer.eog_ids) or [n_vocab]
        if not tokenizer.eog_ids:
            self.tokens.append(b"<end>")
            self.special_token_ids.append(n_vocab)
        self.eos_token_id, self.bos_token_id = self.ends[0], None

    def __call__(self, text: bytes | str) -> list[int]:
        """Only to show texts in llguidance's messages."""
        return []


def _tokens(library: Any, tokenizer: Tokenizer, n_vocab: int) -> Any:
    own = _Vocabulary(tokenizer, n_vocab)
    wrapped = library.TokenizerWrapper(own)
    return library.LLTokenizer(wrapped, len(own.tokens), own.ends, _SLICES)


def _composed(grammar: Grammar, tokenizer: Tokenizer) -> str:
    """A grammar as llguidance takes it."""
    parts = [{"name": "body", "lark_grammar": _body(grammar, tokenizer)}]
    if grammar.after:
        text, i = "/(?s:.)*", token_id(tokenizer, grammar.after)
        if i is None or tokenizer.token_bytes(i):  # It is a text.
            before = f"before[lazy]: {text}{spelled(grammar.after)}/"
        else:
            before = f"before: {text}/ <[{i}]>"
        lark = f'start: before "\\n"{{0,2}} @body\n{before}\n{_OPTIONS}'
        parts.insert(0, {"name": "all", "lark_grammar": lark})
    return json.dumps({"grammars": parts})


def token_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the token that is a text; None if several tokens are."""
    ids = tokenizer.encode(text, parse_special=True)
    return ids[0] if len(ids) == 1 else None


def spelled(text: str) -> str:
    """A regex that matches a text."""
    return "".join(rf"\x{{{ord(c):x}}}" for c in text)


def _body(grammar: Grammar, tokenizer: Tokenizer) -> str:
    text = grammar.text
    try:
        if grammar.kind == "gbnf":
            text = gbnf.to_lark(text, partial(token_id, tokenizer))
        elif grammar.kind == "json_schema":
            text = f"start: {embedded(json.loads(text))}"
        elif grammar.kind == "regex":
            text = f"start: /{slashed(text)}/"
    except (gbnf.GbnfError, schema.SchemaError) as error:
        raise GrammarError(str(error)) from None
    return f"{text}\n{_OPTIONS}"


def embedded(value: Any, is_lenient: bool = False) -> str:
    """A schema within Lark. Raises schema.SchemaError."""
    made = schema.checked(value, is_lenient)
    made = {"allOf": [made]} if isinstance(made, bool) else made
    own = {"whitespace_pattern": _SPACE, "lenient": is_lenient, "coerce_one_of": is_lenient}
    return "%json " + json.dumps({**made, "x-guidance": own})


def slashed(regex: str) -> str:
    """A regex as Lark writes it between slashes."""
    return re.sub(r"(\\.)|/", lambda m: m[1] or r"\/", regex, flags=re.DOTALL)


def _told(text: str) -> str:
    """llguidance's message in one line: the reason, after the place in a user's text if there is
    one."""
    if "NoExtension" in text:
        return _NOTHING
    if found := re.search("^error: (.*)", text, re.M):  # A regex stands above its error.
        return f"expected a regex that can be used, got one where {found[1]}"
    line = " ".join(text.strip().split("\n")[0].split())
    _, _, why = line.partition(": failed to compile JSON schema: ")
    if why:
        why = "oneOf whose options overlap" if why.startswith("oneOf") else why
        return f"expected a schema that can be enforced, got: {why}"[:_MAX_TOLD]
    if re.search("panic|fuel|[Tt]oo |max is", line):  # Its limits, of which some are assertions.
        line = f"expected a smaller grammar, got one with {line}"
    return re.sub(r"^at (\d+)\((\d+)\): ", r"line \1, column \2: ", line)[:_MAX_TOLD]
