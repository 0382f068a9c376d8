#!/usr/bin/env python3
"""Prints the token ids of a text, separated by commas, by DIR/tokenizer.json: for `./train_moe --prompt-ids`.

With --file and --out: writes a whole text file as a token shard, for `./train_moe --data`.
"""

import argparse
import os
import struct

import numpy as np
from tokenizers import Tokenizer


def read_tokenizer(directory):
    return Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))


def write_shard(path, ids, vocab_size):
    """llm.c's format: 256 int32 (magic, version, count), then uint16, or uint32 for a vocabulary above 65536."""
    magic, version, dtype = (20240520, 1, "<u2") if vocab_size <= 65536 else (20240801, 7, "<u4")
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", magic, version, len(ids), *[0] * 253))
        file.write(np.asarray(ids, dtype).tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--file", help="a text file instead of TEXT")
    parser.add_argument("--out", help="write a token shard, print only the count")
    args = parser.parse_args()
    if (args.text is None) == (args.file is None):
        parser.error("give a text or --file, one of them")
    tokenizer = read_tokenizer(args.directory)
    try:
        text = args.text if args.file is None else open(args.file, encoding="utf-8", newline="").read()
    except OSError as e:
        parser.exit(2, f"encode.py: {args.file}: {e.strerror}\n")
    except UnicodeDecodeError:
        parser.exit(2, f"encode.py: {args.file}: no UTF-8 text; data/tokenize_text.py reads JSON lines and tables, too\n")
    ids = tokenizer.encode(text).ids
    if args.out:
        write_shard(args.out, ids, tokenizer.get_vocab_size())
        print(f"{args.out}: {len(ids)} tokens")
    else:
        print(",".join(map(str, ids)))


if __name__ == "__main__":
    main()
