#!/usr/bin/env python3
"""Turns text into shards of tokens for `train_moe --data`, with any tokenizer.json."""
import json
import os
import sys
import time
from pathlib import Path

from common import FORMATS, HEADER, MAX_TOKENS, Outputs, Parser, Progress, check_files, count, fail, field_of, files_in
from common import load_tokenizer, need, pieces, read_files, run

DESCRIPTION = """\
Turns text into shards of tokens for `train_moe --data`, with any tokenizer.json.

  tokenize_text.py --tokenizer DIR --out tokens/mine --val-tokens 100K *.txt
  tokenize_text.py --tokenizer DIR --out tokens/web  --field content web.jsonl
  tokenize_text.py --tokenizer DIR --out tokens/fw   --dataset HuggingFaceFW/fineweb-edu --config sample-10BT

A file *.jsonl or *.ndjson has a document a line, *.parquet and *.arrow have one a row, every other file is plain UTF-8
text. A folder that save_to_disk of `datasets` wrote: name its *.arrow files. Written are
PREFIX_train_000000.bin, ... and, with --val-tokens, PREFIX_val_000000.bin: 256 int32 (magic, version, number of
tokens), then uint16 tokens; uint32 when the vocabulary is larger than 65,536. No BOS or other special tokens are
added, except the separator after each document. Memory stays bounded however large the input is."""

# Tokens that end a document, for a tokenizer.json without a configuration beside it.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


def options():
    p = Parser(DESCRIPTION)
    p.add_argument("inputs", nargs="*", metavar="FILE", help="text files, JSON lines, *.parquet, *.arrow")
    p.add_argument("--tokenizer", required=True, metavar="DIR", help="a tokenizer.json, or the folder that has one")
    p.add_argument("--out", required=True, metavar="PREFIX", help="where the shards go, for example tokens/mine")
    p.add_argument("--name", default="train", choices=("train", "val"),
                   help="val: the input is a validation text; writes PREFIX_val_000000.bin, ... (default: train)")
    p.add_argument("--val-tokens", type=count, default=0, metavar="N",
                   help="put the first N tokens into PREFIX_val_000000.bin instead (default: none)")
    p.add_argument("--shard-tokens", type=count, default=100_000_000, metavar="N",
                   help="tokens in a shard; the last one has up to a tenth more, which spares a tiny rest "
                        "(default: 100M)")
    p.add_argument("--separator", metavar="TOKEN", help="id or text of the token after each document, or 'none' "
                   "(default: the tokenizer's end-of-text token if it names one, else none)")
    p.add_argument("--split-on", metavar="TEXT", help="a text file is many documents with TEXT between them, for "
                   "example '<|endoftext|>'; white space around each is removed (default: one document a file)")
    p.add_argument("--field", default="text", metavar="KEY",
                   help="where the text is in JSON lines, tables and data sets (default: text)")
    p.add_argument("--dataset", metavar="NAME", help="a Hugging Face data set, or a folder with one, instead of files")
    p.add_argument("--config", metavar="C", help="the data set's configuration")
    p.add_argument("--split", default="train", metavar="S", help="the data set's split (default: train)")
    p.add_argument("--chunk", type=count, default=131072, metavar="CHARS",
                   help="longer documents are encoded in chunks of this many characters, cut at line ends. Byte-level "
                        "tokenizers (GPT-2, Llama 3, Qwen, ...) rarely give other tokens at such a cut and always "
                        "decode to the same text; those that put a space before a text (Llama 2, Mistral) put one "
                        "there as well (default: 131072)")
    p.add_argument("--errors", default="strict", choices=("strict", "replace"),
                   help="bytes that are not UTF-8: stop, or replace them by U+FFFD (default: strict)")
    p.add_argument("--force", action="store_true", help="replace shards that are there already")
    return p.parse_args()


def find_separator(wanted, tokenizer, ids, folder):
    """The id of the token after each document, or None."""
    if wanted == "none":
        return None
    if wanted is not None:
        number = int(wanted) if wanted.isdecimal() else tokenizer.token_to_id(wanted)
        if number is None:
            fail(f"--separator {wanted}: no such token in the tokenizer; give an id or the text of one of its tokens")
        if number >= ids:
            fail(f"--separator {wanted}: out of range; the tokenizer's ids are 0 to {ids - 1}")
        return number
    for name, key in (("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id"),
                      ("tokenizer_config.json", "eos_token"), ("special_tokens_map.json", "eos_token")):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue                                # not there, or not what it should be: only a default is at stake
        value = value.get("content") if isinstance(value, dict) else value
        found = [tokenizer.token_to_id(v) if isinstance(v, str) else v
                 for v in (value if isinstance(value, list) else [value])]
        found = [v for v in found if isinstance(v, int) and 0 <= v < ids]
        if found:                                   # chat models list the end of a turn as well: prefer that of a text
            return next((v for v in found if tokenizer.id_to_token(v) in ENDS), found[0])
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    return next((special[t] for t in ENDS if t in special), None)


class Shards:
    """Tokens in, files of `limit` tokens out."""

    def __init__(self, outputs, prefix, name, limit, kind):
        self.outputs, self.prefix, self.name, self.limit, self.kind = outputs, prefix, name, limit, kind
        self.files, self.counts = [], []            # the last two files stay open: a tiny last one joins its neighbour

    def path(self, i):
        return f"{self.prefix}_{self.name}_{i:06d}.bin"

    def write(self, tokens):
        while len(tokens):
            if not self.files or self.counts[-1] == self.limit:
                if len(self.files) >= 2:
                    self.finish(-2)
                self.files.append(self.outputs.open(self.path(len(self.files))))
                self.counts.append(0)
                self.files[-1].write(bytes(4 * HEADER))
            part = tokens[:self.limit - self.counts[-1]]
            self.files[-1].write(part.astype("<u2" if self.kind == "uint16" else "<u4").tobytes())
            self.counts[-1] += len(part)
            tokens = tokens[len(part):]

    def finish(self, i):
        header = (*FORMATS[self.kind], self.counts[i])
        self.files[i].seek(0)
        self.files[i].write(b"".join(n.to_bytes(4, "little") for n in header))
        self.outputs.close(self.files[i])

    def close(self):
        if len(self.files) >= 2 and self.counts[-1] < self.limit // 10:
            last, n = self.files.pop(), self.counts.pop()
            last.seek(4 * HEADER)
            self.files[-1].write(last.read())
            self.counts[-1] += n
            self.outputs.drop(last)
        for i, f in enumerate(self.files):
            if not f.closed:
                self.finish(i)


def read_dataset(args, progress):
    datasets = need("datasets", "--dataset")
    if os.path.isfile(args.dataset):
        fail(f"--dataset {args.dataset}: a file; name it without --dataset")
    if any(os.path.exists(os.path.join(args.dataset, name)) for name in ("state.json", "dataset_dict.json")):
        fail(f"--dataset {args.dataset}: save_to_disk wrote it; name its files without --dataset: "
             f"{files_in(args.dataset)}")
    try:
        rows = datasets.load_dataset(args.dataset, args.config, split=args.split, streaming=True)
    except Exception as e:                          # a wrong name, configuration or split; no network: any class at all
        fail(f"--dataset {args.dataset}: {' '.join(str(e).split())}")
    for i, row in enumerate(rows):
        progress.show(i, "documents")
        yield from pieces([field_of(row, args.field, f"{args.dataset}, row {i}", args.errors)], args.chunk)


def batches(stream, chars):
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece[0]) + 64                  # many tiny documents take memory as well
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def main():
    args = options()
    if bool(args.inputs) == bool(args.dataset):
        fail("nothing to do: give text files, or --dataset NAME" if not args.inputs else
             "both files and --dataset given; choose one")
    if args.name == "val" and args.val_tokens:
        fail("--val-tokens takes from a training text; leave it out with --name val")
    for option, value in (("--shard-tokens", args.shard_tokens), ("--val-tokens", args.val_tokens)):
        if value > MAX_TOKENS // 2:
            fail(f"{option} {value}: a shard has at most {MAX_TOKENS // 2} tokens")
    if args.split_on == "":
        fail("--split-on is empty; expected the text between two documents, for example '<|endoftext|>'")
    np = need("numpy", "this")
    size = check_files(args.inputs)
    tokenizer, ids = load_tokenizer(args.tokenizer)
    folder = Path(args.tokenizer)
    folder = folder if folder.is_dir() else folder.parent
    separator = find_separator(args.separator, tokenizer, ids, folder)
    kind = "uint16" if ids <= 65536 else "uint32"
    prefix = Path(args.out)
    if not prefix.name or args.out.endswith(os.sep) or prefix.is_dir():
        fail(f"--out {args.out}: a folder; expected the beginning of a file name, for example {prefix / 'mine'}")
    names = [args.name] + (["val"] if args.val_tokens else [])
    old = {p for n in names for p in prefix.parent.glob(f"{prefix.name}_{n}_*.bin")}
    if old and not args.force:
        fail(f"{min(old)} exists; choose another --out, or --force to replace it")

    progress = Progress(size, "tokenizing")
    stream = read_dataset(args, progress) if args.dataset else \
        read_files(args.inputs, args.chunk, args.split_on, args.field, args.errors, progress)
    # Big enough that every core has something to do, small enough that the encodings (some 50 bytes a token) fit.
    batch_chars = min(args.chunk, 131072) * max(16, 2 * (os.cpu_count() or 1))
    documents, start = 0, time.time()
    with Outputs() as outputs:
        train = Shards(outputs, prefix, args.name, args.shard_tokens, kind)
        val = Shards(outputs, prefix, "val", args.val_tokens, kind)
        for batch in batches(stream, batch_chars):
            flat = []
            for (_, last), encoding in zip(batch, tokenizer.encode_batch_fast([t for t, _ in batch],
                                                                              add_special_tokens=False)):
                flat += encoding.ids
                if last:
                    documents += 1
                    if separator is not None:
                        flat.append(separator)
            tokens = np.array(flat, dtype=np.uint32)
            head = max(0, args.val_tokens - sum(val.counts))
            val.write(tokens[:head])
            train.write(tokens[head:])
        progress.clear()
        if not train.counts:
            fail(f"--val-tokens {args.val_tokens}: the text has only {sum(val.counts)} tokens, none are left for "
                 "training" if val.counts else "no text in the input, nothing to write")
        train.close()
        val.close()
    for path in old - {Path(s.path(i)) for s in (train, val) for i in range(len(s.files))}:
        path.unlink()                               # of an earlier, longer run: a glob would mix the two
    seconds = max(time.time() - start, 1e-9)
    for shards in (train, val):
        if shards.counts:
            n = len(shards.counts)
            print(f"{shards.path(0)}{f' and {n - 1} more' if n > 1 else ''}: {sum(shards.counts):,} {kind} tokens")
    total = sum(train.counts) + sum(val.counts)
    named = Path(args.tokenizer).is_dir() or Path(args.tokenizer).name == "tokenizer.json"
    print(f"{documents:,} document{'s' * (documents != 1)}, "
          + ("no separator between them" if separator is None else
             f"after each {tokenizer.id_to_token(separator) or 'token'} ({separator})")
          + f"; {total / seconds / 1e6:.2f} M tokens/s. For a new model of train_moe: "
          + (f"--tokenizer {folder}" if named else f"--tokenizer DIR that has {args.tokenizer} as DIR/tokenizer.json"))
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
