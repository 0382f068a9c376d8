#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer on your own text."""
import json
from pathlib import Path

from common import Outputs, Parser, Progress, check_files, count, fail, need, read_files, run

DESCRIPTION = """\
Trains a byte-level BPE tokenizer (the kind that GPT-2, Llama 3 and Qwen use) on your own text.

  train_bpe.py --vocab-size 4096 --out my-tokenizer *.txt

Writes DIR/tokenizer.json and DIR/tokenizer_config.json, which transformers' AutoTokenizer opens. Every text can be
encoded and decodes to itself. Token 0 is <|endoftext|>; where the text itself has it, it separates documents."""

END = "<|endoftext|>"


def main():
    p = Parser(DESCRIPTION)
    p.add_argument("inputs", nargs="+", metavar="FILE",
                   help="text files, JSON lines (*.jsonl, *.ndjson) or tables (*.parquet, *.arrow)")
    p.add_argument("--vocab-size", type=count, required=True, metavar="N",
                   help=f"number of tokens: 256 bytes, {END}, and N - 257 merges")
    p.add_argument("--out", required=True, metavar="DIR", help="the folder for the tokenizer")
    p.add_argument("--min-frequency", type=count, default=2, metavar="N",
                   help="merge only pairs seen this often (default: 2)")
    p.add_argument("--field", default="text", metavar="KEY",
                   help="where the text is in JSON lines and tables (default: text)")
    p.add_argument("--errors", default="strict", choices=("strict", "replace"),
                   help="bytes that are not UTF-8: stop, or replace them by U+FFFD (default: strict)")
    p.add_argument("--force", action="store_true", help="replace a tokenizer that is there already")
    args = p.parse_args()
    if args.vocab_size < 257:
        fail(f"--vocab-size {args.vocab_size}: at least 257, for 256 bytes and {END}")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        fail(f"--out {out}: a file; expected a folder")
    if (out / "tokenizer.json").exists() and not args.force:
        fail(f"{out / 'tokenizer.json'} exists; choose another --out, or --force to replace it")
    size = check_files(args.inputs)
    need("tokenizers", "this")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab_size, min_frequency=args.min_frequency, special_tokens=[END],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    progress, seen = Progress(size, "reading"), 0

    def texts():
        nonlocal seen
        for text, _ in read_files(args.inputs, 131072, END, args.field, args.errors, progress):
            seen += len(text)
            yield text
        progress.clear()

    tokenizer.train_from_iterator(texts(), trainer)
    if not seen:
        fail("no text in the input, nothing to train on")
    with Outputs() as outputs:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
                  "clean_up_tokenization_spaces": False, "model_max_length": 10**30}
        for name, text in (("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
                           ("tokenizer.json", tokenizer.to_str(pretty=True))):
            f = outputs.open(out / name)
            f.write(text.encode())
            outputs.close(f)
    got = tokenizer.get_vocab_size()
    short = f" (not {args.vocab_size}: the text has no more pairs to merge)" if got < args.vocab_size else ""
    print(f"{out}: {got} tokens{short}, from {seen:,} characters")


if __name__ == "__main__":
    run(main)
