"""`cli.py tokenize`: a text's tokens."""

from __future__ import annotations

import argparse

from engine.commands.options import Parser, common_options, prompt_options, read_prompt
from engine.formats.gguf import GGUFFile
from engine.text.tokenizer import Tokenizer

ABOUT = "Show a text's tokens."


def add_options(p: Parser) -> None:
    """Its options."""
    common_options(p)
    prompt_options(p)
    p.add_argument("--ids", action="store_true", help="print the ids only, as a list")
    p.add_argument("--no-bos", action="store_true", help="add no BOS or EOS token")
    p.add_argument("--no-parse-special", action="store_true", help="take special tokens as text")


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Print them."""
    text = read_prompt(parser, args)
    tokenizer = Tokenizer.from_gguf(GGUFFile(args.model))
    ids = tokenizer.encode(text, not args.no_bos, not args.no_parse_special)
    if args.ids:
        print(ids)
        return 0
    for i in ids:
        piece = tokenizer.token_bytes(i, special=True).decode("utf-8", "replace")
        print(f"{i:6d} -> '{piece}'")
    return 0
