#!/usr/bin/env python3
"""Makes what README.md and the pages of dev/ show anew, by running it. By hand, once an issue, after `make`:

    python3 dev/readme.py                all of it, half an hour; what cannot be made here is named and stays
    python3 dev/readme.py help counts    these alone: see MAKERS

A page has `<!-- show: NAME -->` before the fenced block or the table that NAME makes. Sentences around them, and speeds
that name their machine, are for a person to read again: the changes are listed at the end. `receipt` and `real_models` need
what dev/reference/real_models.sh says, in data/text.
"""
import csv
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import time

os.chdir(pathlib.Path(__file__).resolve().parent.parent)
PAGES = [pathlib.Path("README.md"), *sorted(pathlib.Path("dev").rglob("*.md"))]
SHAKESPEARE = "data/text/tinyshakespeare.txt"


def output(command):
    """stdout of a shell command; if it fails, the message is what tests said, and the end of stderr or stdout."""
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        raise RuntimeError("\n".join([f"{command}:", *failed, (done.stderr or done.stdout).strip()[-300:]]))
    return done.stdout.rstrip("\n")


def fenced(text):
    return f"```\n{text}\n```"


def make_help():
    return fenced(output("./train_moe --help"))


def make_story():
    output("make run")
    return fenced(pathlib.Path("out/story/table").read_text().rstrip("\n"))


def make_demonstration():
    lines = output("./train_moe 2>/dev/null").splitlines()
    last = max(n for n, line in enumerate(lines) if re.match(r"step \d+: validation loss", line))
    sample = lines.index("a sample:") + 1
    while not lines[sample].strip():
        sample += 1
    return fenced("\n".join([*lines[:5], "...", *lines[last:sample], "...", *lines[sample + 1:sample + 4], "..."]))


def make_receipt():
    output("[ -d out/smollm2 ] || python3 dev/reference/convert_smollm2.py out/smollm2; rm -rf out/smol8")
    if not os.path.exists("out/smollm2.bin"):
        raise RuntimeError("out/smollm2.bin is not there: make real_models first")
    return fenced(output("./upcycle out/smollm2 out/smol8 --experts 8 --topk 2 --check out/smollm2.bin"))


def make_routers():
    output(f"[ -f {SHAKESPEARE} ] || python3 data/fetch.py tinyshakespeare; rm -rf out/routers; LAB=out/routers make lab E=routers")
    return output("python3 dev/lab/report.py --table routers")


def make_lab():
    return output("python3 dev/lab/report.py --table readme")


def make_tinyshakespeare():
    output(f"[ -f {SHAKESPEARE} ] || python3 data/fetch.py tinyshakespeare")
    text = pathlib.Path("README.md").read_text().replace("\\\n", " ")
    table = ["| windows of | tokens | validation loss along the way, nats a byte | time |", "|---|---|---|---|"]
    for out, windows in (("out/a", 128), ("out/b", 256)):
        start = time.time()
        output(f"rm -rf {out}; " + re.search(rf"\./train_moe --data {SHAKESPEARE} .*--out {out}", text).group(0))
        minutes, seconds = divmod(round(time.time() - start), 60)
        with open(f"{out}/val.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        losses = [f"{float(row['val_loss']):.3f}" for row in rows[:-1]] + [f"**{float(rows[-1]['val_loss']):.4f}**"]
        table.append(f"| {windows} | {int(rows[-1]['tokens']) / 1e6:.1f}M | {' '.join(losses)} "
                     f"(every {int(rows[0]['step']):,} steps) | {minutes} min {seconds:02d} s |")
    return "\n".join(table)


def make_real_models():
    table = ["| model, on the first 60,000 bytes of wikitext2-valid | transformers | train_moe |", "|---|---|---|"]
    said = output("dev/reference/real_models.sh data/text")
    first, second = said.split("== smollm2", 1)
    for name, part in (("stories260K", first), ("SmolLM2-135M-Instruct", second)):
        loss = re.findall(r"\bloss ([\d.]+)", part)
        speed = [float(a or b) for a, b in re.findall(r"tokens/s ([\d.]+)|([\d.]+) tokens/s", part)]
        made = re.search(r"^tokens (\d+)", part, re.M).group(1)
        table += [f"| {name}: loss | {loss[0]} | {loss[1]} |",
                  f"| evaluation, tokens/s | {speed[0]:,.0f} | {speed[1]:,.0f} |",
                  f"| {made} tokens, greedy, tokens/s | {speed[2]:,.0f} | {speed[3]:,.0f} |"]
    return "\n".join(table)


def length_of(path, name):
    spec = importlib.util.spec_from_file_location("counted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return len(getattr(module, name))


def make_counts():
    """Numbers within sentences: (page, what stands before, what stands behind, the number)."""
    checks = re.search(r"(\d+) passed, 0 failed", output("make -s test")).group(1)
    models, routers = (len(list(pathlib.Path("dev/reference", d).iterdir())) for d in ("golden", "golden_routers"))
    for page, before, after, number in (
            ("dev/README.md", "", " checks, no Python", int(checks)),
            ("dev/README.md", "in ", " places, one at a time", length_of("dev/mutations.py", "MUTATIONS")),
            ("dev/cuda/README.md", r"\(", " of them, `plant.py`", length_of("dev/cuda/plant.py", "BUGS")),
            ("README.md", "compares ", " tiny models", models), ("README.md", "class and ", " routers", routers)):
        path = pathlib.Path(page)
        text, times = re.subn(f"({before})[\\d,]+({after})", rf"\g<1>{number:,}\g<2>", path.read_text())
        if times != 1:
            raise RuntimeError(f"{page}: {before}N{after} stands there {times} times")
        path.write_text(text)


MAKERS = {"help": make_help, "counts": make_counts, "demonstration": make_demonstration, "story": make_story,
          "routers": make_routers, "lab": make_lab, "tinyshakespeare": make_tinyshakespeare, "real_models": make_real_models,
          "receipt": make_receipt}


def main():
    names, failed = sys.argv[1:] or list(MAKERS), 0
    for name in names:
        if name not in MAKERS:
            sys.exit(f"{name} is none of {', '.join(MAKERS)}")
        try:
            made = MAKERS[name]()
            block = re.compile(rf"(<!-- show: {name} -->\n)(```\n.*?\n```(?=\n|\Z)|\|[^\n]*(?:\n\|[^\n]*)*)", re.S)
            times = 0
            for page in PAGES if made else ():
                text, n = block.subn(lambda m: m.group(1) + made, page.read_text())
                times += n
                if n:
                    page.write_text(text)
            if made and times == 0:
                raise RuntimeError("no page shows it")
            print(f"ok     {name}", flush=True)
        except (RuntimeError, OSError, ValueError, IndexError, AttributeError) as e:
            print(f"FAILED {name}: {e}", flush=True)
            failed += 1
    subprocess.run(["git", "--no-pager", "diff", "--stat", "--", *map(str, PAGES)])
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
