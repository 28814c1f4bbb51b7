"""Options that the commands share, and how a mistake on the command line is answered."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from engine import backends
from engine.commands import summary
from engine.config import ACTIVATIONS, EngineConfig
from engine.engine import DEMO_MODEL, Engine
from engine.errors import EngineError
from engine.sampling.grammar import FORMS, Grammar
from engine.sampling.params import SamplingParams
from engine.sampling.steps import SAMPLER_NAMES

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "'": "'", '"': '"', "\\": "\\"}
ALL_LAYERS = 1 << 20  # More than any model has.
_BUFFERS = {"cpu": "cpu", "cuda": "cuda", "cuda0": "cuda"}  # As `-ot` names them -> the backend.
# Names; the field of an options class that they set; a conversion of the text or argparse's
# keywords; help.
OptionRow = tuple[str, str, Any, str]


class InputError(EngineError):
    """A file that can't be read or written."""


def at_least(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {text}")
        return value

    convert.__name__ = "integer"
    return convert


def integers(low: int) -> Callable[[str], list[int]]:
    """A conversion to integers of at least `low`, with commas between them."""

    def convert(text: str) -> list[int]:
        try:
            return [at_least(low)(part) for part in text.split(",")]
        except ValueError:
            message = f"expected integers and commas between them, got {text!r}"
            raise argparse.ArgumentTypeError(message) from None

    return convert


def _paths(text: str) -> list[str]:
    paths = text.split(",")
    if not all(paths):
        raise argparse.ArgumentTypeError(f"expected files and commas between them, got {text!r}")
    return paths


def _layers(text: str) -> int | None:
    """A number of layers; as in llama.cpp, -1 is auto, and less is all."""
    try:
        n = {"auto": -1, "all": -2}.get(text) or int(text)
    except ValueError:
        message = f"expected a number of layers, all or auto, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return None if n == -1 else ALL_LAYERS if n < 0 else n


def _overrides(text: str) -> list[str]:
    """Texts REGEX=BACKEND; a backend may have the name of llama.cpp's buffer on it."""
    parts = (part.rpartition("=") for part in text.split(","))
    return ["".join((*regex, _BUFFERS.get(name.lower(), name))) for *regex, name in parts]


def _threads(text: str) -> int | None:
    """As in llama.cpp, a number below 1 is all cores."""
    return n if (n := int(text)) > 0 else None


_PLACEMENT_OPTIONS: list[OptionRow] = [
    ("-ngl --n-gpu-layers", "n_gpu_layers", {"type": _layers, "metavar": "N|all|auto"},
     "put the last N layers on the GPU; the output head counts as one more (auto: all that fit)"),
    ("-ncmoe --n-cpu-moe", "n_cpu_moe", at_least(0),
     "keep the experts of the first N layers on the CPU (0)"),
    ("-cmoe --cpu-moe", "n_cpu_moe", {"action": "store_const", "const": ALL_LAYERS},
     "keep the experts of all layers on the CPU"),
    ("-ot --override-tensor", "override_tensor",
     {"action": "extend", "type": _overrides, "metavar": "REGEX=cpu|cuda"},
     "run products there whose weight's name matches"),
    ("--gpu-memory", "gpu_memory", {"type": at_least(1), "metavar": "MIB"},
     "take at most so much of the GPU's memory, as if it had no more (all)"),
]  # fmt: skip
_ENGINE_OPTIONS: list[OptionRow] = [
    ("-c --ctx-size", "n_ctx", at_least(0),
     "context in tokens (4096, or the model's if that is less; 0: the model's)"),
    ("-b --batch-size", "n_batch", at_least(1), "most tokens of a batch (2048, or -ub)"),
    ("-ub --ubatch-size", "n_ubatch", at_least(1), "most tokens of a step (512; cuda: 4096)"),
    ("-t --threads", "n_threads", {"type": _threads, "metavar": "N"}, "CPU threads (all cores)"),
    ("--cpu-isa", "cpu_isa", {"metavar": "NAME"},
     "instruction set of the CPU kernels (the best that this CPU has)"),
    ("--activations", "activations", {"type": int, "choices": ACTIVATIONS},
     "cpu: bits of rows outside row tiles (8; 15 are exact, and slower)"),
    ("-np --parallel", "n_parallel", at_least(1), "sequences that run at the same time (1)"),
    ("-cram --cache-ram", "cache_ram", at_least(-1),
     "MiB for what prompts leave to later ones (a quarter of what is free, at most 8192; 0: off, "
     "-1: all that is free)"),
    ("--cache-dir", "cache_dir", {"metavar": "DIR"},
     "directory for long prefixes that leave memory; processes may share it"),
    ("--cache-disk", "cache_disk", at_least(0),
     "MiB for that directory (a quarter of what is free there, at most 16384)"),
    ("--no-cache-prompt", "cache_prompt", {"action": "store_false"},
     "process every prompt from its start"),
    ("--cache-prompt", "cache_prompt", {"action": "store_true"},
     "reuse what earlier prompts left (on)"),
    ("-ctk --cache-type-k", "type_k", {"choices": ("f32", "f16")}, "type of the K cache"),
    ("-ctv --cache-type-v", "type_v", {"choices": ("f32", "f16")}, "type of the V cache"),
    ("--batch-invariant", "batch_invariant", {"action": "store_true"},
     "cuda: results of a sequence don't depend on the others of its batch; slower"),
    ("--gdn", "gdn", {"choices": ("auto", "scan", "chunk")}, "algorithm of the delta rule"),
]  # fmt: skip


CACHE = (
    "cache_ram",
    "cache_dir",
    "cache_disk",
    "cache_prompt",
)  # Fields of options that only prompts have.


def _names(text: str) -> tuple[str, ...]:
    return tuple(SAMPLER_NAMES.get(name, name) for name in text.split(";") if name)


def _most_tokens(text: str) -> int:
    """As in llama.cpp, -2 is until the context is full, too."""
    return max(-1, at_least(-2)(text))


_most_tokens.__name__ = _threads.__name__ = "integer"


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)([+-].+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a token id and a signed number, got {text}")
    return int(match[1]), float(match[2])


class _GrammarText(NamedTuple):
    """An option's grammar: which of FORMS, whether its text is the name of a file, and the text."""

    form: str
    is_file: bool
    text: str

    def read(self) -> Grammar:
        return FORMS[self.form](read_text(self.text) if self.is_file else self.text)


def _grammar(form: str, is_file: bool = False) -> dict[str, Any]:
    kind = "FILE" if is_file else "TEXT"
    return {"type": partial(_GrammarText, form, is_file), "metavar": kind}


_SAMPLING_OPTIONS: list[OptionRow] = [
    ("-n --predict --n-predict", "max_tokens", {"type": _most_tokens, "metavar": "N"},
     "most tokens (-1: until full)"),
    ("-s --seed", "seed", at_least(-1), "seed (-1: a random one)"),
    ("--temp", "temperature", float, "temperature (0.8; 0: greedy)"),
    ("--dynatemp-range", "dynatemp_range", float, "temperature ± this, by entropy (0)"),
    ("--dynatemp-exp", "dynatemp_exponent", float, "exponent of that (1)"),
    ("--top-k", "top_k", int, "keep the N likeliest (40; 0: all)"),
    ("--top-p", "top_p", float, "keep the likeliest up to this probability (0.95)"),
    ("--min-p", "min_p", float, "keep what has this share of the highest probability (0.05)"),
    ("--typical", "typical_p", float, "keep the most typical up to this probability (1)"),
    ("--top-nsigma", "top_n_sigma", float, "keep what is within N sigma of the best (-1: off)"),
    ("--xtc-probability", "xtc_probability", float, "chance to drop the likeliest (0)"),
    ("--xtc-threshold", "xtc_threshold", float, "probability from which that applies (0.1)"),
    ("--repeat-penalty", "repeat_penalty", float, "divides logits of recent tokens (1: off)"),
    ("--repeat-last-n", "repeat_last_n", at_least(-1), "how many (64; 0: none, -1: all)"),
    ("--presence-penalty", "presence_penalty", float, "lowers logits of recent tokens (0)"),
    ("--frequency-penalty", "frequency_penalty", float, "the same, for each occurrence (0)"),
    ("--dry-multiplier", "dry_multiplier", float, "strength of the repetition penalty DRY (0)"),
    ("--dry-base", "dry_base", float, "its growth with the length (1.75)"),
    ("--dry-allowed-length", "dry_allowed_length", int, "repetitions up to this are free (2)"),
    ("--dry-penalty-last-n", "dry_penalty_last_n", int, "how far back it looks (-1: all)"),
    ("--mirostat", "mirostat", int, "2: mirostat 2.0 instead of the samplers (0)"),
    ("--mirostat-ent", "mirostat_tau", float, "its target surprise in bits (5)"),
    ("--mirostat-lr", "mirostat_eta", float, "its learning rate (0.1)"),
    ("--samplers", "samplers", {"type": _names, "metavar": "A;B;…"}, "the samplers, in order"),
    ("--dry-sequence-breaker", "dry_sequence_breakers", {"action": "append", "metavar": "TEXT"},
     "text that ends a repetition for DRY; none: no such text (default: newline : \" *)"),
    ("-l --logit-bias", "logit_bias", {"type": _bias, "action": "append", "metavar": "ID±X"},
     "add X to the logit of token ID: 15043+1, 15043-inf"),
    ("-r --reverse-prompt", "stop", {"action": "append", "metavar": "TEXT"},
     "stop where the output has this text"),
    ("--ignore-eos", "ignore_eos", {"action": "store_true"},
     "don't stop at the end-of-generation token"),
    ("-j --json-schema", "grammar", _grammar("json_schema"),
     "the output is JSON that matches a schema ({}: any)"),
    ("-jf --json-schema-file", "grammar", _grammar("json_schema", True), "file with the schema"),
    ("--grammar", "grammar", _grammar("grammar"),
     "the output matches a grammar: GBNF, or Lark if it begins with %%llguidance"),
    ("--grammar-file", "grammar", _grammar("grammar", True), "file with the grammar"),
    ("--guided-regex", "grammar", _grammar("guided_regex"), "the output matches a regex"),
]  # fmt: skip


class Parser(argparse.ArgumentParser):
    """The options that commands share; answers a wrong command line in one line, with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def option(self, name: str) -> argparse.Action | None:
        """The option of this name, if there is one."""
        return self._option_string_actions.get(name)

    @property
    def names(self) -> list[str]:
        """The names of all options."""
        return list(self._option_string_actions)

    @property
    def has_positionals(self) -> bool:
        return any(not action.option_strings for action in self._actions)

    def number(self, names: str, about: str, low: int = 1, group: Any = None, **how: Any) -> None:
        add = (group or self).add_argument
        add(*names.split(), type=at_least(low), metavar="N", help=about, **how)

    def numbers(self, names: str, about: str, low: int = 1, **how: Any) -> None:
        """An option that takes integers of at least `low`; given again, it adds to them."""
        how |= {"type": integers(low), "action": "extend", "metavar": "N[,N…]"}
        self.add_argument(*names.split(), help=about, **how)

    def choice(self, names: str, about: str, *choices: str) -> None:
        first, about = choices[0], f"{about} ({choices[0]})"
        self.add_argument(*names.split(), choices=choices, default=first, help=about)

    def flag(self, names: str, about: str) -> None:
        self.add_argument(*names.split(), action="store_true", help=about)

    def table(self, title: str, rows: list[OptionRow]) -> None:
        """Options that leave their field at its default where they are not given."""
        group = self.add_argument_group(title)
        for names, field, values, about in rows:
            how = values if isinstance(values, dict) else {"type": values, "metavar": "N"}
            unset = argparse.SUPPRESS
            group.add_argument(*names.split(), dest=field, default=unset, help=about, **how)

    def common_options(self, many: bool = False) -> None:
        """The model, or with `many` a list of models, and --verbose."""
        how: Any = {"default": str(DEMO_MODEL), "metavar": "FILE"}
        if many:
            how = {"type": _paths, "action": "extend", "metavar": "FILE[,FILE…]"}
        about = (
            "GGUF file (default: the demo model that comes with the engine). Weights take about "
            "the memory of the file (TQ1_0 and Q1_0: up to half more); IQ1 to IQ3 take that of "
            "Q8_0, 2.5 to 5.4 times their file"
        )
        self.add_argument("-m", "--model", help=about, **how)
        self.flag("-v --verbose", "more detail; tracebacks of errors")

    def backend_options(self) -> None:
        self.add_argument("--backend", choices=backends.names(), default="auto",
            help="backend that runs the graph (auto: the fastest that works here)")  # fmt: skip
        self.flag("--strict-backend", "fail where that backend does not support a node, instead of "
            "running the node on another backend")  # fmt: skip
        self.table("placement", _PLACEMENT_OPTIONS)

    def engine_options(self, *without: str) -> None:
        self.backend_options()
        self.table("engine", [row for row in _ENGINE_OPTIONS if row[1] not in without])

    def sampling_options(self) -> None:
        self.table("sampling", _SAMPLING_OPTIONS)

    def seed(self) -> None:
        self.number("-s --seed", "seed of the random tokens (0)", low=0, default=0)

    def prompt_options(self, many: bool = False) -> None:
        """Where the prompt comes from; with `many`, a file of prompts too."""
        add = self.add_mutually_exclusive_group().add_argument
        if many:
            add("--prompts", metavar="FILE",
                help="complete each line of a file, text or JSON; print JSON lines")  # fmt: skip
        add("-p", "--prompt", metavar="TEXT", help="prompt (default: standard input)")
        add("-f", "--file", metavar="FILE", help="file with the prompt")
        self.add_argument("-e", "--escape", action=argparse.BooleanOptionalAction, default=True,
            help=r"in -p, -sys, -r and DRY's breakers, replace \n, \t, \\, \x2c … by what they "
            "mean (yes); -f is taken as it is")  # fmt: skip


def given_fields(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line sets."""
    given = {f.name: getattr(args, f.name) for f in fields(options) if hasattr(args, f.name)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    given = given_fields(args, SamplingParams)
    for name in {"stop", "dry_sequence_breakers"} & given.keys():
        given[name] = tuple(unescaped(args, text) for text in given[name])
    if breakers := given.get("dry_sequence_breakers"):
        given["dry_sequence_breakers"] = tuple(b for b in breakers if b != "none")
    if "grammar" in given:
        given["grammar"] = given["grammar"].read()
    if "logit_bias" in given:
        total: dict[int, float] = {}
        for token, bias in given["logit_bias"]:
            total[token] = total.get(token, 0.0) + bias
        given["logit_bias"] = total
    return SamplingParams(**given)


def load_engine(args: argparse.Namespace, **options: Any) -> Engine:
    """The engine of --model with the options of the command line; `options` go before them."""
    engine = Engine.load(args.model, **(given_fields(args, EngineConfig) | options))
    summary.show(engine, args.verbose)
    return engine


def read_prompt(parser: Parser, args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return unescaped(args, args.prompt)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("a prompt is needed: -p TEXT, -f FILE, or standard input")
    return read_text(args.file).removesuffix("\n")


def read_text(path: str | None) -> str:
    """The text of a file, or of standard input for None or `-`. Raises InputError."""
    is_stdin = path in (None, "-")
    name = "standard input" if is_stdin else path
    if is_stdin and sys.stdin is None:
        raise InputError(f"{name}: expected a text, got a closed stream")
    try:
        data = sys.stdin.buffer.read() if is_stdin else Path(str(path)).read_bytes()
        return data.decode()
    except UnicodeDecodeError as error:
        came = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise InputError(f"{name}: expected UTF-8, got {came}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def unescaped(args: argparse.Namespace, text: str) -> str:
    """A text of the command line with its escapes replaced, unless --no-escape."""
    if not args.escape:
        return text
    return re.sub(r"\\([ntr'\"\\])|((?:\\x[0-9a-fA-F]{2})+)", _meant, text)


def _meant(escape: re.Match[str]) -> str:
    """The character of an escape; several `\\x` are the bytes of UTF-8."""
    if escape[1]:
        return _ESCAPES[escape[1]]
    return bytes.fromhex(escape[2].replace(r"\x", "")).decode("utf-8", "replace")


def write_text(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, "utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
