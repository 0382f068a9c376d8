"""The corpus `debian`: three kinds of text out of packages of Debian 12, in fixed shares. For fetch.py."""
import gzip
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

from common import Outputs, Progress, fail

KINDS = {   # kind: bytes of training text, packages, what is taken out of them
    "prose": (36_000_000, ["dict-gcide"], ["usr/share/dictd/gcide.dict.dz"]),
    "manuals": (32_000_000, ["linux-doc-6.1"], ["**/Documentation/**/*.rst*", "**/Documentation/**/*.txt*",
                                                "**/Documentation/**/*.yaml*"]),
    "code": (32_000_000, ["python3.11-doc", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-testsuite",
                          "idle-python3.11"], ["**/_sources/**/*.txt", "usr/lib/python3.11/**/*.py"]),
}
WINDOW = 1024                       # validation texts hold whole windows of up to so many bytes, and one byte more
VALIDATION = 171                    # windows of each kind: 0.5 MB in all
SHORT = {"prose": 22, "manuals": 21, "code": 21}        # of them, in the 64 KB that a run reads on its way
PIECE = 1 << 13                     # most bytes of one document in a validation text
BLOCK = 1 << 16                     # the dictionary is one file: it is cut into documents of about this size
NAMES = ["debian-train.txt", "debian-val.txt", *(f"debian-val-{kind}.txt" for kind in KINDS), "debian.json"]


def documents(folder, patterns):
    """(name, bytes) of all texts, in an order that depends on names alone and mixes folders."""
    paths = sorted({p for pattern in patterns for p in Path(folder).glob(pattern)
                    if p.is_file() and not p.is_symlink()})
    found = []
    for path in paths:
        text, name = path.read_bytes(), str(path.relative_to(folder))
        text = gzip.decompress(text) if text[:2] == b"\x1f\x8b" else text
        begin = 0
        while path.suffix == ".dz" and len(text) - begin > BLOCK:
            end = text.find(b"\n\n", begin + BLOCK) + 2 or len(text)
            found.append((f"{name}/{begin}", text[begin:end]))
            begin = end
        found.append((f"{name}/{begin}", text[begin:]))
    return sorted(found, key=lambda d: hashlib.sha256(d[0].encode()).digest())


def download(packages, folder):
    """Fetches and unpacks packages; returns what they are."""
    said = subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True)
    if said.returncode:
        fail(f"apt-get download: {(said.stderr.strip().splitlines() or ['failed'])[-1]}; try apt-get update", 1)
    rows = []
    for path in sorted(Path(folder).glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", path, folder], check=True)
        shown = subprocess.run(["dpkg-deb", "-f", path, "Package", "Version"], capture_output=True, text=True,
                               check=True)
        fields = dict(line.split(": ", 1) for line in shown.stdout.splitlines())
        rows.append(dict(package=fields["Package"], version=fields["Version"],
                         sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
        path.unlink()
    return rows


def make(out):
    """debian-train.txt, validation texts of all kinds and of each, and debian.json, which says what is where."""
    out = Path(out)
    if all((out / name).is_file() for name in NAMES):
        print(f"{out}/debian-train.txt: already there")
        return
    packages, ranges, train, short, validation, begin = [], [], [], [], {}, 0
    progress = Progress(len(KINDS), "debian")
    for n, (kind, (size, names, patterns)) in enumerate(KINDS.items()):
        progress.show(n, kind)
        with tempfile.TemporaryDirectory() as folder:
            try:
                packages += download(names, folder)
            except (FileNotFoundError, subprocess.CalledProcessError) as e:
                fail(f"debian: {e}; it is made with apt-get and dpkg-deb, on Debian 12; elsewhere take any text", 1)
            texts = documents(folder, patterns)
        held = b""                          # the beginnings of some documents, which training sees nothing of
        while texts and len(held) <= VALIDATION * WINDOW:
            held += texts.pop(0)[1][:PIECE]
        text = b"".join(text for _, text in texts)
        if len(text) < size:
            fail(f"debian: the packages hold {len(text):,} bytes of {kind}, expected {size:,}", 1)
        ranges.append(dict(kind=kind, begin=begin, end=begin + size))
        begin += size
        train.append(text[:size])
        validation[kind] = held[:VALIDATION * WINDOW + 1]
        firsts = (WINDOW * (n * VALIDATION // SHORT[kind]) for n in range(SHORT[kind]))
        short += [held[first:first + WINDOW] for first in firsts]
    progress.clear()
    files = {"debian-train.txt": b"".join(train), "debian-val.txt": b"".join(short) + b"\n",
             **{f"debian-val-{kind}.txt": text for kind, text in validation.items()}}
    sums = {name: hashlib.sha256(text).hexdigest() for name, text in files.items()}
    files["debian.json"] = json.dumps(dict(ranges=ranges, sha256=sums, packages=packages), indent=1).encode() + b"\n"
    with Outputs() as outputs:
        for name, text in files.items():
            f = outputs.open(out / name)
            f.write(text)
            outputs.close(f)
    for name, text in files.items():
        print(f"{out / name}: {len(text):,} bytes")
