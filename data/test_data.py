#!/usr/bin/env python3
"""Checks the scripts in this folder with small generated texts, offline:  python data/test_data.py"""
import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import debian
import fetch
from common import cut, pieces

HERE = Path(__file__).resolve().parent
WORDS = "the small model of experts learns to route tokens Ünïcödé 日本語 🙂 don't 3.14 x=y; (and)".split()
results = {"passed": 0, "failed": 0, "skipped": 0}


def check(name, good, detail=""):
    result = "passed" if good else "failed"
    results[result] += 1
    print(f"{result}  {name}{'' if good else '   ' + str(detail)[-600:]}", flush=True)


def skip(name, why):
    results["skipped"] += 1
    print(f"skipped {name}: {why}")


def call(script, *args):
    return subprocess.run([sys.executable, HERE / script, *map(str, args)], capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"})


def works(name, script, *args):
    r = call(script, *args)
    check(name, r.returncode == 0, r.stderr)
    return r.stdout


def refused(name, expected, folder, script, *args, code=2):
    """Ends with `code`, one line that has `expected` in it, and the folder as it was."""
    before = sorted(folder.rglob("*"))
    r = call(script, *args)
    lines = r.stderr.splitlines()
    good = r.returncode == code and len(lines) == 1 and expected in lines[0] and sorted(folder.rglob("*")) == before
    check(f"refused: {name}", good, f"exit {r.returncode}, {r.stderr!r}, {set(folder.rglob('*')) - set(before)}")


def generate(n, seed):
    rng = random.Random(seed)
    ends = [" "] * 12 + ["\n", "\n\n", "\r\n", "  ", "\t", ". "]
    return "".join(rng.choice(WORDS) + rng.choice(ends) for _ in range(n))


def read_shard(path):
    data = Path(path).read_bytes()
    magic, version, n = (int.from_bytes(data[i:i + 4], "little") for i in (0, 4, 8))
    width = {(20240520, 1): 2, (20240801, 7): 4}[magic, version]
    assert len(data) == 1024 + n * width and not any(data[12:1024])
    return [int.from_bytes(data[i:i + width], "little") for i in range(1024, len(data), width)], width


def test_pieces():
    rng = random.Random(1)
    good, exact = True, True
    for trial in range(300):
        documents = [generate(rng.randrange(0, 60), trial * 100 + i) for i in range(rng.randrange(1, 6))]
        text = "<|end|>".join(documents)
        step = rng.randrange(1, 200)
        blocks = [text[i:i + step] for i in range(0, len(text), step)]
        got, now = [], ""
        for piece, last in pieces(blocks, 50, "<|end|>"):
            now += piece
            if last:
                got.append(now)
                now = ""
        good = good and not now and got == [d.strip() for d in documents if d.strip()]
        exact = exact and "".join(p for p, _ in pieces(blocks, 50)) == text
    check("text in blocks of any size is split into the same documents", good)
    check("without --split-on no character is lost", exact)
    check("a cut goes after a single line break", cut("ab\ncd\n\nef gh", 0, 11) == 3)


def test_round_trip(tokenizers, d):
    text = generate(30000, 0) + "no line break at the end"
    (d / "a.txt").write_bytes(text.encode())
    works("train_bpe.py", "train_bpe.py", d / "a.txt", "--vocab-size", 300, "--out", d / "tok")
    tokenizer = tokenizers.Tokenizer.from_file(str(d / "tok/tokenizer.json"))
    check("vocabulary of 300, <|endoftext|> is 0",
          tokenizer.get_vocab_size() == 300 and tokenizer.token_to_id("<|endoftext|>") == 0)
    check("nothing else in the folder", sorted(os.listdir(d / "tok")) == ["tokenizer.json", "tokenizer_config.json"])

    works("tokenize_text.py, small shards and chunks", "tokenize_text.py", "--tokenizer", d / "tok", "--out", d / "s/a",
          "--shard-tokens", 20000, "--val-tokens", 1000, "--chunk", 5000, d / "a.txt")
    val, width = read_shard(d / "s/a_val_000000.bin")
    files = sorted((d / "s").glob("a_train_*.bin"))
    shards = [read_shard(f)[0] for f in files]
    tokens = val + sum(shards, [])
    check("several shards, all uint16", len(shards) > 2 and width == 2)
    check("sizes of shards", all(len(s) == 20000 for s in shards[:-1]) and 2000 <= len(shards[-1]) <= 22000)
    check("validation shard of 1,000 tokens", len(val) == 1000)
    check("text -> BPE -> shards -> text", tokens[-1] == 0 and tokenizer.decode(tokens[:-1]) == text)
    whole = tokenizer.encode(text).ids
    check("chunks give the tokens of the whole text", tokens[:-1] == whole)

    n = len(whole) + 1
    out = works("a tiny last shard joins its neighbour", "tokenize_text.py", "--tokenizer", d / "tok/tokenizer.json",
                "--out", d / "s/b", "--shard-tokens", n // 2 - 100, d / "a.txt")
    check("... the advice for train_moe is the tokenizer's folder", out.endswith(f"--tokenizer {d / 'tok'}\n"))
    files = sorted((d / "s").glob("b_train_*.bin"))
    check("... two shards with all tokens", len(files) == 2 and sum(len(read_shard(f)[0]) for f in files) == n)
    works("--force", "tokenize_text.py", "--tokenizer", d / "tok", "--out", d / "s/b", "--force", d / "a.txt")
    check("... removes shards of the longer run", len(list((d / "s").glob("b_*"))) == 1)

    (d / "docs.txt").write_text("one story\n<|endoftext|>\n\nanother\n<|endoftext|>\n<|endoftext|>last")
    works("--split-on", "tokenize_text.py", "--tokenizer", d / "tok", "--out", d / "s/c", "--split-on",
          "<|endoftext|>", d / "docs.txt")
    tokens, _ = read_shard(d / "s/c_train_000000.bin")
    check("... documents end with the separator", tokenizer.decode(tokens, skip_special_tokens=False)
          == "one story<|endoftext|>another<|endoftext|>last<|endoftext|>")
    rows = ["first\nrow", "zweite Zeile ü", "third"]
    (d / "rows.jsonl").write_text("".join(json.dumps({"id": i, "body": r}) + "\n" for i, r in enumerate(rows)))
    works("JSON lines, --separator none, --name val", "tokenize_text.py", "--tokenizer", d / "tok", "--out", d / "s/d",
          "--field", "body", "--separator", "none", "--name", "val", d / "rows.jsonl")
    check("... same text", tokenizer.decode(read_shard(d / "s/d_val_000000.bin")[0]) == "".join(rows))
    works("--separator by id", "tokenize_text.py", "--tokenizer", d / "tok", "--out", d / "s/e", "--separator", 7,
          "--field", "body", d / "rows.jsonl")
    check("... three of them", read_shard(d / "s/e_train_000000.bin")[0].count(7) == 3)
    check("show.py decodes", "another<|endoftext|>last" in
          works("show.py", "show.py", d / "s/c_train_000000.bin", "--tokenizer", d / "tok"))

    limited = tokenizers.Tokenizer.from_file(str(d / "tok/tokenizer.json"))
    limited.enable_truncation(16)
    limited.enable_padding(length=64)
    limited.save(str(d / "limited.json"))
    works("a tokenizer.json with truncation and padding", "tokenize_text.py", "--tokenizer", d / "limited.json",
          "--out", d / "s/f", d / "a.txt")
    check("... cuts nothing off", read_shard(d / "s/f_train_000000.bin")[0][:-1] == whole)

    vocabulary = {f"w{i}": i for i in range(70000)}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    large.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    large.save(str(d / "large.json"))
    (d / "w.txt").write_text("w69999 w1\nw65536 w12")
    out = works("70,000 tokens", "tokenize_text.py", "--tokenizer", d / "large.json", "--out", d / "s/g", d / "w.txt")
    check("... are uint32", read_shard(d / "s/g_train_000000.bin") == ([69999, 1, 65536, 12], 4))
    check("... whose tokenizer is to be called tokenizer.json",
          f"--tokenizer DIR that has {d / 'large.json'} as DIR/tokenizer.json" in out)
    for size, width in ((65536, 2), (65537, 4)):
        large = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
        large.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        large.save(str(d / "edge.json"))
        (d / "edge.txt").write_text(f"w{size - 1} w1")
        works(f"{size:,} tokens", "tokenize_text.py", "--tokenizer", d / "edge.json", "--out", d / f"s/{size}",
              d / "edge.txt")
        check(f"... are uint{8 * width}", read_shard(d / f"s/{size}_train_000000.bin") == ([size - 1, 1], width))


def test_eos(tokenizers, d):
    """Which separator is taken: generation_config.json, config.json, tokenizer_config.json, then well-known names."""
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t.add_special_tokens(["<|im_end|>", "</s>"])
    (d / "eos").mkdir()
    t.save(str(d / "eos/tokenizer.json"))
    (d / "ab.txt").write_text("a b")
    for i, (name, text, expected) in enumerate((
            (None, None, 3), ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}}, 2),
            ("config.json", {"eos_token_id": 1}, 1), ("generation_config.json", {"eos_token_id": [2, 3]}, 3))):
        if name:
            (d / "eos" / name).write_text(json.dumps(text))
        works(f"separator from {name or 'the special tokens'}", "tokenize_text.py", "--tokenizer", d / "eos",
              "--out", d / f"eos/x{i}", d / "ab.txt")
        check("... is right", read_shard(d / f"eos/x{i}_train_000000.bin")[0] == [0, 1, expected])


def test_dataset(d):
    if not importlib.util.find_spec("datasets"):
        skip("--dataset", "the package datasets is not installed")
        return
    (d / "set").mkdir()
    (d / "set/train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(100)))
    os.environ["HF_HOME"] = str(d / "hf")
    works("--dataset with a local folder", "tokenize_text.py", "--tokenizer", d / "tok", "--out", d / "ds/x",
          "--dataset", d / "set")
    out = call("show.py", d / "ds/x_train_000000.bin", "--tokenizer", d / "tok", "--n", 1000).stdout
    check("... all rows, in order", out.endswith("".join(f"row {i}<|endoftext|>" for i in range(100)) + "\n"), out)
    refused("a field that the data set lacks", "there are: text", d / "ds", "tokenize_text.py", "--tokenizer",
            d / "tok", "--out", d / "ds/y", "--dataset", d / "set", "--field", "body")
    refused("a split that the data set lacks", "--dataset", d / "ds", "tokenize_text.py", "--tokenizer", d / "tok",
            "--out", d / "ds/y", "--dataset", d / "set", "--split", "nonsense")


def test_tables(d):
    """Parquet and Arrow files, and folders of a data set, give the shards of the same rows as JSON lines."""
    if not importlib.util.find_spec("datasets"):
        skip("tables", "the package datasets is not installed")
        return
    import datasets
    import pyarrow.feather
    import pyarrow.parquet
    datasets.disable_progress_bars()
    rows = [f"row {i}: {generate(20, i)}" for i in range(2500)]
    base = ("tokenize_text.py", "--tokenizer", d / "tok", "--field", "body")
    (d / "tables/saved").mkdir(parents=True)
    (d / "tables/rows.jsonl").write_text("".join(json.dumps({"id": i, "body": r}) + "\n" for i, r in enumerate(rows)))
    table = pyarrow.table({"id": list(range(len(rows))), "body": rows})
    pyarrow.parquet.write_table(table, d / "tables/rows.parquet", row_group_size=700)
    pyarrow.feather.write_feather(table, d / "tables/rows.arrow", compression="uncompressed")
    saved = datasets.DatasetDict({"train": datasets.Dataset(table)})
    saved.save_to_disk(d / "tables/dict")
    saved["train"].save_to_disk(d / "tables/one", num_shards=3)
    works("rows as JSON lines", *base, "--out", d / "tables/jsonl", d / "tables/rows.jsonl")
    wanted = read_shard(d / "tables/jsonl_train_000000.bin")
    for name, *files in (("parquet", d / "tables/rows.parquet"), ("arrow", d / "tables/rows.arrow"),
                         ("dict", *sorted((d / "tables/dict/train").glob("*.arrow"))),
                         ("one", *sorted((d / "tables/one").glob("*.arrow")))):
        works(f"a table: {name}", *base, "--out", d / f"tables/out_{name}", *files)
        check("... the same tokens", read_shard(d / f"tables/out_{name}_train_000000.bin") == wanted)
    works("a tokenizer of a table", "train_bpe.py", "--vocab-size", 300, "--field", "body", "--out", d / "tables/tok",
          d / "tables/rows.parquet")
    for name, expected, *args in (
            ("a column that a table lacks", "no column 'text'; there are: id, body", *base[:3],
             d / "tables/rows.parquet"),
            ("a column of numbers", "row 1: field 'id' is int", *base[:3], "--field", "id", d / "tables/rows.arrow"),
            ("a folder of tables", f"for example {d / 'tables/one'}/*.arrow", *base, d / "tables/one"),
            ("--dataset with a folder of save_to_disk", f"without --dataset: {d / 'tables/dict/train'}/*.arrow", *base,
             "--dataset", d / "tables/dict"),
            ("--dataset with a file", "name it without --dataset", *base, "--dataset", d / "tables/rows.parquet")):
        refused(name, expected, d, *args, "--out", d / "tables/no")
    (d / "rows.parquet").write_bytes(b"PAR1\x15\x04\xff\xfe" + bytes(100))
    refused("a broken table", "not a table", d, *base, "--out", d / "tables/no", d / "rows.parquet")


def test_refusals(d):
    (d / "latin1.txt").write_bytes(b"fine\n" * 300000 + b"caf\xe9 \n")
    (d / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (d / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (d / "empty.txt").write_text("")
    (d / "rows").write_bytes(b"PAR1\x15\x04\xff\xfe" + bytes(100))
    (d / "notes.json").write_text("{}")
    (d / "x.bin").write_bytes(b"GGUF" + bytes(2000))
    base = ("tokenize_text.py", "--tokenizer", d / "tok", "--out", d / "new/folder/x")
    for name, expected, *args in (
            ("a missing file", "missing.txt: no such file", *base, d / "missing.txt"),
            ("a folder as input", "a folder", *base, d),
            ("no input", "nothing to do", *base),
            ("text that is not UTF-8", "byte 1,500,003", *base, d / "latin1.txt"),
            ("a table that is not called so", "ends with .parquet", *base, d / "rows"),
            ("an empty text", "no text", *base, d / "empty.txt"),
            ("a field that is no string", "line 2: field 'text' is int", *base, d / "bad.jsonl"),
            ("a field that is missing", "there are: text", *base, "--field", "body", d / "bad.jsonl"),
            ("a broken line", "line 2: not JSON", *base, d / "broken.jsonl"),
            ("a file that is no tokenizer", "not a tokenizer.json", base[0], "--tokenizer", d / "notes.json",
             *base[3:], d / "a.txt"),
            ("a folder without tokenizer", "no such file", *base[:1], "--tokenizer", d / "s", *base[3:], d / "a.txt"),
            ("an unknown separator", "no such token", *base, "--separator", "<|nope|>", d / "a.txt"),
            ("a separator out of range", "0 to 299", *base, "--separator", "300", d / "a.txt"),
            ("an empty --split-on", "--split-on is empty", *base, "--split-on", "", d / "a.txt"),
            ("--val-tokens beyond the text", "none are left", *base, "--val-tokens", "10M", d / "a.txt"),
            ("--shard-tokens 0", "not a positive number", *base, "--shard-tokens", "0", d / "a.txt"),
            ("an unknown option", "unrecognized", *base, "--nonsense", d / "a.txt"),
            ("shards that exist", "exists", *base[:3], "--out", d / "s/a", d / "a.txt"),
            ("a folder as --out", "a folder", *base[:3], "--out", d / "s", d / "a.txt"),
            ("a vocabulary under 257", "at least 257", "train_bpe.py", "--vocab-size", 256, "--out", d / "t2",
             d / "a.txt"),
            ("a tokenizer that exists", "exists", "train_bpe.py", "--vocab-size", 300, "--out", d / "tok", d / "a.txt"),
            ("training on nothing", "no text", "train_bpe.py", "--vocab-size", 300, "--out", d / "t2", d / "empty.txt"),
            ("a .bin as text", "token shard", "train_bpe.py", "--vocab-size", 300, "--out", d / "t2", d / "x.bin"),
            ("a .bin of another kind", "magic", "show.py", d / "x.bin"),
            ("a tokenizer too small for the shard", "another tokenizer", "show.py", d / "s/g_train_000000.bin",
             "--tokenizer", d / "tok")):
        refused(name, expected, d, *args)
    works("--errors replace", *base[:3], "--out", d / "s/r", "--errors", "replace", d / "latin1.txt")


def test_interrupt(d):
    """Ctrl-C in the middle of a text that takes some seconds."""
    (d / "long.txt").write_text("some words and a line break\n" * 1500000)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        p = subprocess.Popen([sys.executable, HERE / "tokenize_text.py", "--tokenizer", d / "tok", "--out",
                              d / "int/x", d / "long.txt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while p.poll() is None and not any(d.glob("int/*.tmp")):
            time.sleep(0.01)
        p.send_signal(number)
        p.communicate()
        check(f"{number.name}: exit {code}, nothing left behind", p.returncode == code and not (d / "int").exists(),
              f"exit {p.returncode}")


class Handler(http.server.BaseHTTPRequestHandler):
    """/text is whole, /short breaks off half-way, everything else is missing."""
    body = b"some text over the wire\n" * 20000

    def do_GET(self):
        if self.path not in ("/text", "/short"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body if self.path == "/text" else self.body[:len(self.body) // 2])

    def log_message(self, *_):
        pass


def test_fetch(d):
    d = d / "fetch"
    d.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}"
    right = hashlib.sha256(Handler.body).hexdigest()
    works("fetch over http, with checksum", "fetch.py", f"{home}/text", "--sha256", right, "--out", d / "o")
    check("... the same bytes", (d / "o/text").read_bytes() == Handler.body)
    check("... and nothing else", os.listdir(d / "o") == ["text"])
    check("fetched again: already there", "already there" in
          works("fetch twice", "fetch.py", f"{home}/text", "--sha256", right, "--out", d / "o"))
    works("fetch from file://", "fetch.py", (d / "o/text").as_uri(), "--out", d / "p")
    check("... the same bytes", (d / "p/text").read_bytes() == Handler.body)
    for name, expected, code, *args in (
            ("a wrong checksum", "checksum", 1, f"{home}/text", "--sha256", "0" * 64),
            ("a download that breaks off", "broke off", 1, f"{home}/short"),
            ("an address with nothing there", "Not Found", 1, f"{home}/nothing"),
            ("a server that does not answer", "127.0.0.1:9", 1, "http://127.0.0.1:9/text"),
            ("a name that is no corpus", "no corpus", 2, "shakespear"),
            ("no name", "name a corpus", 2),
            ("half a checksum", "64 hexadecimal", 2, f"{home}/text", "--sha256", "abc")):
        refused(f"fetch: {name}", expected, d, "fetch.py", *args, "--out", d / "new/folder", code=code)
    server.shutdown()

    # What the corpora use besides: a git blob id, and a file inside a zip.
    blob = hashlib.sha1(b"blob %d\0" % len(Handler.body) + Handler.body).hexdigest()
    with zipfile.ZipFile(d / "z.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("inside", Handler.body)
    with contextlib.redirect_stdout(io.StringIO()):
        fetch.download(fetch.File("z.txt", (d / "z.zip").as_uri(), len(Handler.body), blob, "inside"), d / "q")
    check("a file out of a zip, git checksum", (d / "q/z.txt").read_bytes() == Handler.body
          and os.listdir(d / "q") == ["z.txt"])
    for name, file in (("wrong size", fetch.File("n", (d / "o/text").as_uri(), 5)),
                       ("wrong git checksum", fetch.File("n", (d / "o/text").as_uri(), None, "0" * 40)),
                       ("not a zip", fetch.File("n", (d / "o/text").as_uri(), None, None, "inside"))):
        code = 0
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                fetch.download(file, d / "r")
            except SystemExit as e:
                code = e.code
        check(f"refused: fetch, {name}", code == 1 and not (d / "r").exists(), code)
    listing = call("fetch.py", "--list").stdout
    check("fetch.py --list names every corpus", all(name in listing for name in fetch.CORPORA))


def test_debian(d):
    """Made from packages that hold little, by the rules that hold for the real ones."""
    def download(packages, folder):
        folder = Path(folder)
        for name in packages:
            (folder / "usr" / name).mkdir(parents=True)
            for n in range(40):
                text = f"{name} {n}: ".encode() * 100
                (folder / "usr" / name / f"{n}.txt").write_bytes(text if n % 2 else gzip.compress(text))
        return [dict(package=name, version="1", sha256="0") for name in packages]

    kept = debian.download, debian.KINDS, debian.VALIDATION, debian.SHORT, debian.PIECE
    debian.KINDS = {kind: (20_000, [kind], ["**/*.txt"]) for kind in debian.KINDS}
    debian.download, debian.VALIDATION, debian.PIECE, debian.SHORT = download, 5, 500, dict.fromkeys(debian.KINDS, 2)
    with contextlib.redirect_stdout(io.StringIO()):
        debian.make(d / "a")
        debian.make(d / "b")
    same = all((d / "a" / name).read_bytes() == (d / "b" / name).read_bytes() for name in debian.NAMES)
    manifest = json.loads((d / "a/debian.json").read_text())
    train = (d / "a/debian-train.txt").read_bytes()
    check("debian: the same bytes each time",
          same and [p["package"] for p in manifest["packages"]] == list(debian.KINDS))
    check("debian: kinds are where the manifest says", all(
        r["kind"].encode() in train[r["begin"]:r["end"]] and
        not any(k.encode() in train[r["begin"]:r["end"]] for k in debian.KINDS if k != r["kind"])
        for r in manifest["ranges"]))
    held = (d / "a/debian-val-prose.txt").read_bytes()
    check("debian: validation has whole windows, and documents that training has not", len(held) == 5 * 1024 + 1 and
          held[:9] not in train and len((d / "a/debian-val.txt").read_bytes()) == 3 * 2 * 1024 + 1)
    debian.KINDS = {kind: (10**6, [kind], ["**/*.txt"]) for kind in debian.KINDS}
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            debian.make(d / "c")
    except SystemExit as e:
        check("refused: packages with too little text", e.code == 1 and "expected 1,000,000" in said.getvalue()
              and not (d / "c").exists(), said.getvalue())
    debian.download, debian.KINDS, debian.VALIDATION, debian.SHORT, debian.PIECE = kept


def main():
    with tempfile.TemporaryDirectory() as folder:
        d = Path(folder)
        test_pieces()
        test_fetch(d)
        test_debian(d / "debian")
        for script in ("fetch.py", "tokenize_text.py", "train_bpe.py", "show.py"):
            check(f"{script} --help", "usage" in call(script, "--help").stdout)
        try:
            import numpy                            # noqa: F401, the scripts need it
            import tokenizers
        except ImportError as e:
            skip("everything with a tokenizer", f"{e}; pip install -r data/requirements.txt")
        else:
            test_round_trip(tokenizers, d)
            test_eos(tokenizers, d)
            test_dataset(d)
            test_tables(d)
            test_refusals(d)
            test_interrupt(d)
            if importlib.util.find_spec("transformers"):
                from transformers import AutoTokenizer
                t = AutoTokenizer.from_pretrained(d / "tok")
                text = generate(100, 9)
                good = t.decode(t(text)["input_ids"]) == text and t.eos_token_id == 0
                check("transformers opens the tokenizer", good)
            else:
                skip("AutoTokenizer", "the package transformers is not installed")
        left = list(d.rglob("*.tmp"))
        check("no temporary file is left", not left, left)
    skipped = f", {results['skipped']} skipped" if results["skipped"] else ""
    print(f"{results['passed']} passed, {results['failed']} failed{skipped}")
    sys.exit(results["failed"] > 0)


if __name__ == "__main__":
    main()
