"""``hetero-ppo tokenizer``: train a byte-level BPE tokenizer on a data file."""

from __future__ import annotations

import argparse
from pathlib import Path

from hetero_ppo.cli.arguments import add_out_argument, clear_out

DEFAULT_KEYS = "messages,prompt,completion,chosen,rejected,text"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("tokenizer", help="train a byte-level BPE tokenizer on a data file")
    parser.add_argument("--input", type=Path, required=True, nargs="+", help=".jsonl, .parquet or .txt files")
    parser.add_argument("--keys", default=DEFAULT_KEYS, help="fields that hold text, comma-separated (%(default)s)")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries at most, special tokens included")
    add_out_argument(parser, "tokenizer")
    parser.add_argument("--chat-template", type=Path, default=None, help="Jinja file; default: ChatML")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    # transformers takes seconds to import; `hetero-ppo --help` should not.
    from hetero_ppo.data.tokenizer_training import CHATML_TEMPLATE, read_texts, train_tokenizer

    keys = [key.strip() for key in args.keys.split(",") if key.strip()]
    template = CHATML_TEMPLATE if args.chat_template is None else args.chat_template.read_text(encoding="utf-8")
    clear_out(args.out, ["tokenizer.json", "tokenizer.model"], overwrite=args.overwrite)
    texts = (text for path in args.input for text in read_texts(path, keys))
    tokenizer = train_tokenizer(texts, args.vocab_size, args.out, kind="bpe", chat_template=template)
    print(f"{args.out}: {len(tokenizer)} tokens; end of sequence {tokenizer.eos_token!r} = {tokenizer.eos_token_id}")
