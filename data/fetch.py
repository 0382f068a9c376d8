#!/usr/bin/env python3
"""Downloads a corpus as plain text and checks that it arrived whole."""
import hashlib
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import namedtuple
from pathlib import Path

import debian
from common import Outputs, Parser, Progress, fail, run

# check: a sha256 (64 hex digits) or a git blob id (40). member: the file to take out of a zip.
File = namedtuple("File", "name url size check member", defaults=(None, None, None))

CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/" \
           "word_language_model/data/wikitext-2/"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/" \
              "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-"

CORPORA = {
    "tinyshakespeare": ("40,000 lines of Shakespeare", [
        File("tinyshakespeare.txt", CHAR_RNN, 1115394,
             "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")]),
    "wikitext2": ("Wikipedia articles, WikiText-2 with <unk> for rare words; about 13 MB", [
        File("wikitext2-train.txt", WIKITEXT + "train.txt", None, "2d84b35af79e411d73ea7cae83c73964c6ac83b4"),
        File("wikitext2-valid.txt", WIKITEXT + "valid.txt", 1121681,
             "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
        File("wikitext2-test.txt", WIKITEXT + "test.txt", 1256449,
             "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0")]),
    "tinystories": ("short stories written by GPT-4, <|endoftext|> between them", [
        File("tinystories-valid.txt", TINYSTORIES + "valid.txt", 22502601,
             "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
        File("tinystories-train.txt", TINYSTORIES + "train.txt", 2227753162,
             "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443")]),
    "enwik8": ("the first 100 MB of a Wikipedia dump of 2006, with markup; downloads 36 MB", [
        File("enwik8.txt", "https://mattmahoney.net/dc/enwik8.zip", 100000000,
             "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8", "enwik8")]),
}


def copy(source, target, total, label):
    progress, done = Progress(total, label), 0
    while block := source.read(1 << 18):
        target.write(block)
        done += len(block)
        progress.show(done, f"{done / 1e6:.1f} MB")
    progress.clear()
    return done


def digest(f, size, check):
    """The sha256 of an open file, or what git calls it if `check` is as short as that."""
    h = hashlib.sha256() if len(check) == 64 else hashlib.sha1(b"blob %d\0" % size)
    f.seek(0)
    while block := f.read(1 << 20):
        h.update(block)
    return h.hexdigest()


def wrong(f, size, file):
    """What is wrong with a file's size or content, or None."""
    if file.size is not None and size != file.size:
        return f"{size:,} bytes, expected {file.size:,}"
    if file.check and (got := digest(f, size, file.check)) != file.check:
        return f"checksum {got}, expected {file.check}"
    return None


def download(file, folder):
    path = Path(folder) / file.name
    if path.is_file() and file.check:
        with open(path, "rb") as f:
            if not wrong(f, path.stat().st_size, file):
                print(f"{path}: already there")
                return
    with Outputs() as outputs:
        try:
            request = urllib.request.Request(file.url, headers={"User-Agent": "train_moe"})
            with urllib.request.urlopen(request, timeout=60) as response:
                target = outputs.open(path)
                length = response.headers.get("Content-Length")
                size = copy(response, target, int(length) if length else file.size, file.name)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
            fail(f"{file.url}: {getattr(e, 'reason', None) or e}", 1)
        if length and size != int(length):
            fail(f"{file.url}: broke off after {size:,} of {int(length):,} bytes; try again", 1)
        if file.member:
            archive, target = target, outputs.open(path.with_name(path.name + ".unpacked"))
            try:
                with zipfile.ZipFile(archive) as z, z.open(file.member) as member:
                    size = copy(member, target, file.size, "unpacking")
            except (zipfile.BadZipFile, KeyError) as e:
                fail(f"{file.url}: not a zip with '{file.member}' in it ({e})", 1)
            outputs.drop(archive)
            outputs.names[target.name] = path
        if message := wrong(target, size, file):
            fail(f"{file.url}: {message}; the file there has changed, or something on the way altered it", 1)
        outputs.close(target)
    checked = "checksum right" if file.check else "no checksum known"
    print(f"{path}: {size:,} bytes, {checked}")


def listing():
    lines = []
    for name, (text, files) in CORPORA.items():
        sizes = ", ".join(f"{f.name} {f.size / 1e6:,.1f} MB" if f.size else f.name for f in files)
        lines += [f"  {name:<16} {text}", f"  {'':<16} {sizes}"]
    lines += [f"  {'debian':<16} a dictionary, manuals, code: made from packages of Debian 12, on Debian 12",
              f"  {'':<16} debian-train.txt 100.0 MB, validation texts of each kind; downloads 71 MB"]
    return "\n".join(lines)


def main():
    p = Parser(f"Downloads a corpus as plain text and checks that it arrived whole.\n\n{listing()}")
    p.add_argument("name", nargs="?", metavar="NAME", help="one of the corpora above, or any http://, https:// or "
                   "file:// address of a text")
    p.add_argument("--out", default=str(Path(__file__).resolve().parent / "text"), metavar="DIR",
                   help="the folder the files go to (default: text/ beside this script)")
    p.add_argument("--sha256", metavar="HEX", help="with an address: what the file's SHA-256 must be")
    p.add_argument("--list", action="store_true", help="list the corpora and stop")
    args = p.parse_args()
    if args.list:
        print(listing())
        return
    if not args.name:
        fail(f"name a corpus ({', '.join(CORPORA)}, debian) or an address; --list says more")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f"--out {args.out}: a file; expected a folder")
    if args.name == "debian":
        debian.make(args.out)
        return
    if args.name in CORPORA:
        if args.sha256:
            fail("--sha256 is for addresses; the checksums of the corpora are known")
        files = CORPORA[args.name][1]
    else:
        url = urllib.parse.urlsplit(args.name)
        name = Path(urllib.parse.unquote(url.path)).name
        if url.scheme not in ("http", "https", "file") or not name:
            fail(f"'{args.name}' is no corpus ({', '.join(CORPORA)}, debian) and no address of a file")
        check = (args.sha256 or "").lower()
        if args.sha256 is not None and (len(check) != 64 or set(check) - set("0123456789abcdef")):
            fail(f"--sha256 {args.sha256}: expected 64 hexadecimal digits")
        files = [File(name, args.name, None, check or None)]
    for file in files:
        download(file, args.out)
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
