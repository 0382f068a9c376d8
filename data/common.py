"""What the scripts in this folder share: errors, outputs that appear whole or not at all, reading text in pieces."""
import argparse
import codecs
import json
import os
import signal
import sys
import time
from pathlib import Path

JSONL = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")


def fail(message, code=2):
    """One line that says what was wrong and what would be right. 2: the call was wrong, 1: something failed later."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse prints the whole usage above an error; one line is easier to read."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        fail(f"{message} (--help lists the options)")


def count(text):
    """A positive number, with the usual suffixes: 5000, 100M, 1.5B."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}.get(text[-1:].upper(), 1)
    try:
        value = round(float(text[:-1]) * scale) if scale > 1 else int(text)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number such as 5000, 100M or 1.5B")
    return value


def run(main):
    """Ends every script in the same way: Ctrl-C, SIGTERM and a full disk all pass through the clean-up of Outputs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted, nothing was written", 130)
    except BrokenPipeError:                         # show.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as e:
        fail(f"{e.filename or 'reading or writing'}: {e.strerror or e}", 1)


class Outputs:
    """with Outputs() as out: f = out.open(path): files get their names when the block has ended well, else they go."""

    def __init__(self):
        self.names, self.made = {}, []              # path of each open or closed file -> its final path; folders made

    def open(self, path):
        path = Path(path)
        missing = [d for d in path.parents if not d.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.made = missing + self.made             # innermost first, the order in which they can be removed
        f = open(f"{path}.{os.getpid()}.tmp", "w+b")
        self.names[f.name] = path
        return f

    @staticmethod
    def close(f):
        f.flush()
        os.fsync(f.fileno())                        # a disk that is full says so here at the latest
        f.close()

    def drop(self, f):
        f.close()
        os.unlink(f.name)
        del self.names[f.name]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            for temporary, path in self.names.items():
                os.replace(temporary, path)
            return
        for temporary in self.names:
            Path(temporary).unlink(missing_ok=True)
        for folder in self.made:
            try:
                folder.rmdir()
            except OSError:                         # somebody else put something there
                pass


class Progress:
    """A bar on stderr, when that is a terminal."""

    def __init__(self, total, label=""):
        self.total, self.label, self.start, self.shown = total, label, time.time(), 0.0

    def show(self, done, text=""):
        now = time.time()
        if not sys.stderr.isatty() or now - self.shown < 0.1:
            return
        self.shown = now
        if self.total:
            part = min(done / self.total, 1.0)
            left = (now - self.start) * (1 - part) / part if part > 0 else 0
            bar = "#" * int(30 * part)
            head = f"[{bar:<30}] {100 * part:3.0f} %  {int(left) // 60}:{int(left) % 60:02d} left"
        else:
            head = f"{done:,}"
        print(f"\r{self.label} {head}  {text}\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self):
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# Text comes as pieces (text, last): a document of any length is a few pieces, `last` being true for its final one.

def cut(text, begin, end):
    """Where to cut before `end`. A single line break between two words is best: the common pre-tokenizers split there
    too, so the tokens are those of the uncut text."""
    at = text.rfind("\n", begin, end)
    newline = at
    while at > begin:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", begin, at)
    if newline >= begin:
        return newline + 1
    space = text.rfind(" ", begin + 1, end)
    return space if space > begin else end


def split_long(text, size, keep=0):
    """Pieces of at most `size` characters; the final one may be longer by `keep`."""
    at = 0
    while len(text) - at > size + keep:
        end = cut(text, at, at + size)
        yield text[at:end]
        at = end
    yield text[at:]


def pieces(blocks, size, split_on=None):
    """Cuts the text that arrives in `blocks` into documents at each `split_on`, and long documents into pieces."""
    rest, begun = "", False                         # begun: a piece of the document in `rest` is out already
    margin = len(split_on) if split_on else 0       # never cut where half of the separator may have arrived
    for block in blocks:
        parts = (rest + block).split(split_on) if split_on else [rest + block]
        rest = parts.pop()
        for part in parts:
            part = part.rstrip() if begun else part.strip()
            if part or begun:
                *full, tail = split_long(part, size)
                yield from ((p, False) for p in full)
                yield tail, True
            begun = False
        if split_on and not begun:
            rest = rest.lstrip()
        *full, rest = split_long(rest, size, margin)
        yield from ((p, False) for p in full)
        begun = begun or bool(full)
    rest = rest.rstrip() if split_on else rest
    if rest or begun:
        yield rest, True


def text_blocks(path, f, errors):
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0
    while True:
        data = f.read(1 << 20)
        pending = len(decoder.getstate()[0])        # bytes of a character that the last block cut in two
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as e:
            if offset == 0 and data.startswith(b"PAR1"):
                fail(f"{path}: a Parquet table; give it a name that ends with .parquet")
            fail(f"{path}: not UTF-8 at byte {offset - pending + e.start:,}; convert it, or use --errors replace")
        if not data:
            return
        offset += len(data)


def field_of(record, field, where, errors):
    if not isinstance(record, dict):
        fail(f"{where}: expected an object with a field '{field}', found {type(record).__name__}")
    if field not in record:
        fail(f"{where}: no field '{field}'; there are: {', '.join(map(str, record)) or 'none'} (see --field)")
    text = record[field]
    if not isinstance(text, str):
        fail(f"{where}: field '{field}' is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:                      # "\ud800" alone is legal JSON, and no character
        if errors == "strict":
            fail(f"{where}: field '{field}' has half a surrogate pair; use --errors replace")
        text = text.encode("utf-8", "replace").decode()
    return text


def read_files(paths, size, split_on=None, field="text", errors="strict", progress=None):
    """Pieces of all files: JSON lines and tables have a document a line, text files are split at `split_on`."""
    before = 0
    for path in paths:
        with open(path, "rb") as f:
            position = f.tell if f.seekable() else (lambda: 0)      # a pipe such as <(zcat text.gz) has none
            if path.endswith(JSONL):
                stream = json_lines(path, f, size, field, errors)
            elif path.endswith(TABLES):
                stream = table_rows(path, f, size, field, errors)
            else:
                stream = pieces(text_blocks(path, f, errors), size, split_on)
            for piece in stream:
                if progress:
                    progress.show(before + position())
                yield piece
            before += position()


def json_lines(path, f, size, field, errors):
    for number, line in enumerate(iter(f.readline, b""), 1):    # not `in f`: that would disable tell()
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8", errors))
        except ValueError as e:
            fail(f"{path}, line {number}: not JSON ({e}); expected one object a line")
        yield from pieces([field_of(record, field, f"{path}, line {number}", errors)], size)


def table_rows(path, f, size, field, errors):
    """A column of a Parquet file, or of an Arrow file or stream: a Hugging Face data set's files are the latter."""
    arrow = need("pyarrow", "a table")
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet
            table = parquet.ParquetFile(f)
            names, batches = table.schema_arrow.names, lambda: table.iter_batches(1000, columns=[field])
        else:
            from pyarrow import ipc
            stream = f.read(4) == b"\xff\xff\xff\xff"
            f.seek(0)
            table = ipc.open_stream(f) if stream else ipc.open_file(f)
            names = table.schema.names
            batches = lambda: table if stream else map(table.get_batch, range(table.num_record_batches))
        if field not in names:
            fail(f"{path}: no column '{field}'; there are: {', '.join(names) or 'none'} (see --field)")
        number = 0
        for batch in batches():
            for text in batch.column(names.index(field) if batch.num_columns > 1 else 0).to_pylist():
                number += 1
                yield from pieces([field_of({field: text}, field, f"{path}, row {number}", errors)], size)
    except (arrow.ArrowException, OSError) as e:      # OSError: pages that cannot be read
        fail(f"{path}: not a table that pyarrow reads ({' '.join(str(e).split())})")


def files_in(folder):
    """A pattern of files in it, for a message."""
    for ending in (*TABLES, *JSONL):
        for path in sorted(Path(folder).rglob("*" + ending), key=lambda p: (p.parent.name != "train", p)):
            return f"{path.parent}/*{ending}"
    return os.path.join(folder, "*.txt")


def check_files(paths):
    """Found out before any work is done. Returns the bytes there are."""
    total = 0
    for path in paths:
        if not os.path.exists(path):
            fail(f"{path}: no such file")
        if os.path.isdir(path):
            fail(f"{path}: a folder; name the files in it, for example {files_in(path)}")
        if path.endswith(".bin"):
            fail(f"{path}: *.bin is a token shard; expected text, JSON lines or tables")
        if not os.access(path, os.R_OK):
            fail(f"{path}: you may not read this file")
        total += os.path.getsize(path)
    return total


def need(module, why):
    try:
        return __import__(module)
    except ImportError:
        fail(f"{why} needs the Python package '{module}': pip install {module}")


def load_tokenizer(path):
    """A tokenizer.json or the folder that has one. Returns (tokenizer, ids), ids being 1 + the largest token id."""
    tokenizers = need("tokenizers", "--tokenizer")
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        fail(f"{file}: no such file; --tokenizer takes a tokenizer.json or the folder that has one")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:                          # the library raises a bare Exception
        fail(f"{file}: not a tokenizer.json of the tokenizers library ({e})")
    tokenizer.no_truncation()                       # some files cut every text at 512 tokens, or fill it up to them
    tokenizer.no_padding()
    return tokenizer, max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


# Token shards, as llm.c writes them: 256 int32 (magic, version, number of tokens, zeros), then the tokens.

HEADER = 256
FORMATS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}
MAX_TOKENS = 2**31 - 1                              # the number of tokens is an int32
