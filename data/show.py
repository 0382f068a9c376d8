#!/usr/bin/env python3
"""Shows what is in a token shard: its header, the range of its tokens, and the first of them."""
import os

from common import FORMATS, HEADER, Parser, count, fail, load_tokenizer, need, run


def main():
    p = Parser("Shows what is in a token shard: its header, the range of its tokens, and the first of them.")
    p.add_argument("file", metavar="FILE.bin")
    p.add_argument("--tokenizer", metavar="DIR", help="a tokenizer.json, or the folder with one: shows text as well")
    p.add_argument("--n", type=count, default=64, metavar="N", help="how many tokens to show (default: 64)")
    args = p.parse_args()
    np = need("numpy", "this")
    if not os.path.isfile(args.file):
        fail(f"{args.file}: no such file")
    size = os.path.getsize(args.file)
    if size < 4 * HEADER:
        fail(f"{args.file}: {size} bytes, less than the {4 * HEADER} of a header")
    magic, version, n = (int(v) for v in np.fromfile(args.file, dtype="<i4", count=3))
    kind = next((k for k, v in FORMATS.items() if v == (magic, version)), None)
    if kind is None:
        fail(f"{args.file}: magic {magic}, version {version} at offset 0; expected one of "
             + " or ".join(f"{m}, {v}" for m, v in FORMATS.values()))
    dtype = np.dtype("<u2" if kind == "uint16" else "<u4")
    if n < 0 or size != 4 * HEADER + n * dtype.itemsize:
        fail(f"{args.file}: the header says {n} tokens, {4 * HEADER + n * dtype.itemsize} bytes; the file has {size}")
    print(f"{args.file}: magic {magic}, version {version}, {n:,} tokens, {kind}")
    if not n:
        return
    tokens = np.memmap(args.file, dtype=dtype, mode="r", offset=4 * HEADER)
    blocks = [tokens[i:i + (1 << 24)] for i in range(0, n, 1 << 24)]
    largest = max(int(b.max()) for b in blocks)
    print(f"ids from {min(int(b.min()) for b in blocks)} to {largest}; --vocab at least {largest + 1}")
    first = [int(t) for t in tokens[:args.n]]
    print(*first)
    if args.tokenizer:
        tokenizer, ids = load_tokenizer(args.tokenizer)
        if largest >= ids:
            fail(f"token {largest} is outside the tokenizer ({ids} ids): another tokenizer made this file")
        print(tokenizer.decode(first, skip_special_tokens=False))


if __name__ == "__main__":
    run(main)
