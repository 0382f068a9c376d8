#!/usr/bin/env python3
"""What keeps the project readable and its README true. From the project's folder, after `make`:

    python3 dev/check_layout.py [WORD]      only the checks whose name contains WORD

Files keep to their ceilings, lines to their columns; headers of dev/lib that promise it ("Compiles alone.") compile alone; the files of
`make single` need nothing else; README.md keeps to 2,500 words and its commands run. Every block there, fenced or indented, has a mark on
the line before it:

    <!-- run -->                        its lines run, one after the other
    <!-- run: WHAT => BY; ... -->       the same, with these texts replaced: fewer steps, smaller inputs
    <!-- parse -->                      programs, scripts and targets of make exist, and the options of train_moe and upcycle
    <!-- show: NAME -->                 output, which dev/readme.py makes anew

They run in a folder of their own, which has a text my.txt and small models DENSE, DENSE2 and DENSE3.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

CEILINGS = {"train_moe.c": 1300, "upcycle.c": 850, "train_moe.cu": 2500, "test_moe.c": 450}
ALONE = {"products.h", "safetensors.h", "json.h"}       # whose promise may not be withdrawn
WORDS = 2500
PREPARED = """
for i in 1 2 3 4 5 6 7 8 9; do cat LICENSE; done >my.txt
cp my.txt other.txt
small="--data my.txt --steps 2 --batch 1 --seq 32 --layers 1 --hidden 32"
for name in DENSE DENSE2 DENSE3; do ./train_moe $small --dense --ffn 64 --out $name; done
"""
failed = passed = 0


def check(ok, what, said=""):
    global failed, passed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("ok    " if ok else "FAILED", what)
    if not ok and said:
        print("\n".join("       | " + line for line in said.strip().splitlines()[-12:]))


def run(command, **where):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **where)
    return done.returncode, done.stdout


def check_sizes():
    for name, most in CEILINGS.items():
        lines = len(pathlib.Path(name).read_text().splitlines())
        check(lines <= most, f"{name}: {lines} lines of at most {most}")
    suffixes = (".c", ".h", ".cu", ".cuh", ".cpp")
    for path in sorted(p for p in [*pathlib.Path().glob("*"), *pathlib.Path("dev").rglob("*")] if p.suffix in suffixes):
        most = 110 if path.name == "train_moe.c" else 120
        wide = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > most]
        if wide or str(path) in CEILINGS:
            check(not wide, f"{path}: lines of at most {most} columns", f"not so: {', '.join(map(str, wide))}")
    words = len(pathlib.Path("README.md").read_text().split())
    check(words <= WORDS, f"README.md: {words} words of at most {WORDS}")


def check_headers():
    for path in sorted(pathlib.Path("dev/lib").glob("*.h")):
        promises = "Compiles alone." in path.read_text().split("#pragma once")[0]
        if path.name in ALONE:
            check(promises, f"{path} promises to compile alone")
        for language, standard in (("c", "gnu11"), ("c++", "gnu++17")) if promises else ():
            code, said = run(["cc", "-x", language, f"-std={standard}", "-fsyntax-only", "-fopenmp", "-Wall", "-Werror",
                              "-Wno-unused-function", "-"], input=f'#include "{path.resolve()}"\n')
            check(code == 0, f"{path} compiles alone as {language}", said)


def check_single():
    code, said = run(["make", "single"])
    check(code == 0, "make single", said)
    for name in ("train_moe", "upcycle"):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(f"build/{name}_single.c", folder)
            compile_it = f"cc -O1 -fopenmp {name}_single.c -lm"     # -O3 says the same, later
            code, said = run(f"{compile_it} && ./a.out --version", shell=True, cwd=folder)
            check(code == 0 and said.startswith(name), f"{compile_it} in an empty folder", said)


def blocks_of(text):
    """(line, mark, lines) of each block of commands; the mark is None where there is none."""
    lines, mark, n = text.splitlines(), None, 0
    while n < len(lines):
        first = n
        if lines[n].startswith("```"):
            end = next(i for i in range(n + 1, len(lines)) if lines[i].startswith("```"))
            yield first + 1, mark, lines[n + 1:end]
            n = end
        elif lines[n].startswith("    ") and (n == 0 or not lines[n - 1].strip()):
            while n + 1 < len(lines) and lines[n + 1].startswith("    "):
                n += 1
            yield first + 1, mark, [line[4:] for line in lines[first:n + 1]]
        found = re.fullmatch(r"<!-- (.*) -->", lines[n])
        mark = found.group(1) if found else mark if not lines[n].strip() and n > 0 and mark else None
        n += 1


def parse(lines, options):
    """What is wrong with these commands, without running them."""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        for word in words:
            if re.match(r"(\./)?(data|dev)/.*\.(py|sh)$", word) and not pathlib.Path(word).exists():
                return f"{word} is not there"
        if words[:1] == ["make"] and run(["make", "-n", *words[1:]])[0]:
            return f"make does not know {' '.join(words[1:])}"
        program = "upcycle" if "./upcycle" in words else "train_moe"
        if "./upcycle" in words or any(w.startswith("./train_moe") for w in words) or line.startswith("--"):
            for option in re.findall(r"(?<![\w-])--([a-z0-9-]+)", line.split("#")[0].split("  ")[0] if line.startswith("--") else line):
                if option not in options[program]:
                    return f"{program} has no --{option}"
    return ""


def check_readme():
    options = {p: set(re.findall(r"--([a-z0-9-]+)", run([f"./{p}", "--help"])[1])) | {"help", "version"} for p in ("train_moe", "upcycle")}
    with tempfile.TemporaryDirectory() as folder:
        for name in os.listdir():
            if not name.startswith(".") and name != "out":
                os.symlink(os.path.abspath(name), os.path.join(folder, name))
        code, said = run(["bash", "-ec", PREPARED], cwd=folder)
        check(code == 0, "README.md: small models for its commands", said)
        for line, mark, lines in blocks_of(pathlib.Path("README.md").read_text()):
            kind, _, rest = (mark or "").partition(": ")
            what, said, text = f"README.md:{line}: {kind}", "the block has no mark", "\n".join(lines)
            if kind == "run":
                for pair in filter(None, rest.split("; ")):
                    old, new = pair.split(" => ")
                    said = "" if old in text else f"the block has no {old!r}"
                    text = text.replace(old, new)
                code, said = run(["bash", "-ec", text], cwd=folder)
                said = f"{said}\nexit code {code}" if code else ""
            elif kind == "parse":
                said = parse(lines, options)
            elif kind == "show":
                said = "" if rest else "what it shows has no name"
            check(not said, what, said)


def main():
    os.environ.update(OMP_WAIT_POLICY="passive", MAKEFLAGS="")
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, function in (("sizes", check_sizes), ("headers", check_headers), ("single", check_single), ("readme", check_readme)):
        if word in name:
            function()
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
