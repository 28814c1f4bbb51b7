"""`cli.py tokenize`: a text's tokens."""

from __future__ import annotations

import argparse

from engine.commands.options import Parser, read_prompt
from engine.formats.gguf import GGUFFile
from engine.text.tokenizer import Tokenizer

ABOUT = "Show a text's tokens."


def add_options(p: Parser) -> None:
    p.common_options()
    p.prompt_options()
    p.flag("--ids", "print the ids only, as a list")
    p.flag("--no-bos", "add no BOS or EOS token")
    p.flag("--no-parse-special", "treat special tokens in the text as plain text")


def run(parser: Parser, args: argparse.Namespace) -> int:
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
