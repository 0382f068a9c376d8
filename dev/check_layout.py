#!/usr/bin/env python3
"""What keeps the project readable and its README true. From the project's folder, after `make`:

    python3 dev/check_layout.py [sizes|headers|single|readme]

Files keep to their ceilings, lines to their columns; headers of dev/lib that say "Compiles alone." do; the files of
`make single` need nothing else; README.md keeps to its words, and its commands run. Every block there, fenced or
indented, has a mark before it:

    <!-- run -->                        its lines run, one after the other
    <!-- run: WHAT => BY; ... -->       the same, with these texts replaced: fewer steps, smaller inputs
    <!-- parse -->                      scripts and targets of make exist, and the options of train_moe and upcycle
    <!-- show: NAME -->                 output, which dev/readme.py makes anew

They run in a folder of their own, which has texts my.txt and other.txt and small models DENSE, DENSE2, DENSE3 and a run, RUN.
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
PREPARED = """
for i in 1 2 3 4 5 6 7 8 9; do cat LICENSE; done >my.txt
cp my.txt other.txt
small="--data my.txt --steps 2 --batch 1 --seq 32 --layers 1 --hidden 32"
for name in DENSE DENSE2 DENSE3; do ./train_moe $small --dense --ffn 64 --out $name; done
./train_moe $small --experts 4 --out RUN
"""
failed = passed = 0


def check(ok, what, said=""):
    global failed, passed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("ok    " if ok else "FAILED", what)
    for line in said.strip().splitlines()[-12:] if said and not ok else ():
        print("       |", line)


def run(command, **where):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", **where)
    return done.returncode, done.stdout


def check_sizes():
    for name, most in CEILINGS.items():
        lines = len(pathlib.Path(name).read_text().splitlines())
        check(lines <= most, f"{name}: {lines} lines of at most {most}")
    paths = [*pathlib.Path().glob("*"), *pathlib.Path("dev").rglob("*")]
    for path in sorted(p for p in paths if p.suffix in (".c", ".h", ".cu", ".cuh", ".cpp")):
        most = 110 if path.name in ("train_moe.c", "upcycle.c") else 120
        wide = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > most]
        if wide or str(path) in CEILINGS:
            check(not wide, f"{path}: lines of at most {most} columns", f"not so: {', '.join(map(str, wide))}")
    check((words := len(pathlib.Path("README.md").read_text().split())) <= 2500, f"README.md: {words} words of at most 2500")


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
    """Each single file, compiled alone by README's command, writes what the program of a plain `make` writes."""
    code, said = run(["make", "single"])
    check(code == 0, "make single", said)
    options = re.search(r"`cc (.*) build/train_moe_single.c -lm`", pathlib.Path("README.md").read_text()).group(1)
    train = "--steps 20 --batch 2 --seq 32 --layers 2 --hidden 64 --out small"
    here = pathlib.Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name, use in (("train_moe", train), ("upcycle", "small large --experts 16 --method drop")):
            shutil.copy(f"build/{name}_single.c", folder)
            result, models = use.split()[-1] if name == "train_moe" else "large", []
            for program in (f"cc {options} {name}_single.c -lm && ./a.out", f"{here}/{name}"):
                shutil.rmtree(f"{folder}/{result}", ignore_errors=True)
                code, said = run(f"{program} {use}", shell=True, cwd=folder)
                written = pathlib.Path(folder, result, "model.safetensors")
                models.append(code == 0 and written.is_file() and written.read_bytes())
            check(models[0], f"cc {options} {name}_single.c -lm in an empty folder", said)
            check(models[0] == models[1], f"the single {name} writes the same bytes as ./{name}", "other bytes")


def blocks_of(text):
    """(line, mark, lines) of each block of commands; without a mark, None."""
    lines, mark, n = text.splitlines(), None, 0
    while n < len(lines):
        first, found = n, re.fullmatch(r"<!-- (.*) -->", lines[n])
        if lines[n].startswith("```"):
            n = lines.index("```", n + 1)
            yield first + 1, mark, lines[first + 1:n]
        elif lines[n].startswith("    ") and not lines[n - 1].strip():
            while n + 1 < len(lines) and lines[n + 1].startswith("    "):
                n += 1
            yield first + 1, mark, [line[4:] for line in lines[first:n + 1]]
        mark = found.group(1) if found else mark if not lines[n].strip() else None
        n += 1


def parse(text, options):
    """What is wrong with these commands, without running them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        for script in (w for w in words if re.fullmatch(r"(\./)?(data|dev)/.*\.(py|sh)", w)):
            if not pathlib.Path(script).exists():
                return f"{script} is not there"
        if words[:1] == ["make"] and run(["make", "-n", *words[1:]])[0]:
            return f"make does not know {' '.join(words[1:])}"
        for program in ("train_moe", "upcycle"):
            if any(w in (f"./{program}", f"./{program}_cu") for w in words):
                for option in re.findall(r"(?<!\S)--([a-z0-9-]+)", " ".join(words)):
                    if option not in options[program]:
                        return f"{program} has no --{option}"
    return ""


def check_readme():
    options = {p: set(re.findall(r"--([a-z0-9-]+)", run([f"./{p}", "--help"])[1])) for p in ("train_moe", "upcycle")}
    with tempfile.TemporaryDirectory() as folder:
        for name in (n for n in os.listdir() if n[0] != "." and n != "out"):
            os.symlink(os.path.abspath(name), os.path.join(folder, name))
        code, said = run(["bash", "-ec", PREPARED], cwd=folder)
        check(code == 0, "README.md: small models for its commands", said)
        for line, mark, lines in blocks_of(pathlib.Path("README.md").read_text()):
            (kind, _, rest), text, said = (mark or "").partition(": "), "\n".join(lines), "the block has no mark"
            if kind == "run":
                for old, new in (pair.split(" => ") for pair in rest.split("; ") if pair):
                    text = text.replace(old, new) if old in text else f"echo 'the block has no {old}' && false"
                code, said = run(["bash", "-ec", text], cwd=folder)
                said = code and f"{said}\nexit code {code}"
            elif kind == "parse":
                said = parse(text, options)
            elif kind == "show":
                said = "" if rest else "what it shows has no name"
            check(not said, f"README.md:{line}: {kind}", said)


def main():
    os.environ.update(OMP_WAIT_POLICY="passive", MAKEFLAGS="")
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    for function in (check_sizes, check_headers, check_single, check_readme):
        if word in function.__name__:
            function()
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
