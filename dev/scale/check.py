"""Both scripts, in two processes, on a small upcycled model: the loss before the first step and after the last one is
what `train_moe --eval` computes of the model that went in and of the one that came out, within 1e-5; the last one is
lower. Ends with `N passed, N failed`.

    python3 dev/scale/check.py [qwen3|olmoe]        after make
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent.parent
env = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1")
passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("ok    " if ok else "FAILED", what, flush=True)


def run(*command):
    r = subprocess.run([str(c) for c in command], cwd=root, env=env, text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT)
    if r.returncode:
        sys.exit(f"{' '.join(map(str, command))}:\n{r.stdout[-3000:]}\n{passed} passed, {failed + 1} failed")
    return r.stdout


def evaluate(model, val):
    return float(re.search(r"loss (\d+\.\d+)", run("./train_moe", "--model", model, "--data", val, "--eval", "--seq", 64,
                                                   "--batch", 8))[1])


with tempfile.TemporaryDirectory() as d:
    work = Path(d)
    text = (root / "train_moe.c").read_bytes()
    (work / "train.txt").write_bytes(text[:40000])
    (work / "val.txt").write_bytes(text[40000:45000])
    small = ["--layers", 2, "--hidden", 32, "--heads", 2, "--steps", 30, "--batch", 4, "--seq", 64, "--val", "none"]
    sources = {"qwen3": ["--dense", "--arch", "qwen3"], "olmoe": ["--arch", "olmoe", "--experts", 4, "--expert-ffn", 32]}
    if unknown := set(sys.argv[1:]) - set(sources):
        sys.exit(f"no model {', '.join(unknown)}; there are: {', '.join(sources)}")
    for name, more in sources.items():
        if name not in (sys.argv[1:] or sources):
            continue
        run("./train_moe", *small, *more, "--data", work / "train.txt", "--out", work / name)
        run("./upcycle", work / name, work / f"{name}-grown", "--experts", 8)
        model = work / f"{name}-grown"
        before = evaluate(model, work / "val.txt")
        for script in "fsdp", "trainer":
            out = work / f"{name}-{script}"
            said = run("torchrun", "--nproc-per-node", 2, here / f"{script}.py", model, "--data", work / "train.txt",
                       "--val", work / "val.txt", "--out", out, "--steps", 10, "--batch", 4, "--seq", 64)
            first, last = (float(x) for x in re.findall(r"val loss (\S+)", said))
            check(abs(first - before) < 1e-5, f"{name}, {script}: step 0: {first:.6f}, --eval {before:.6f}")
            after = evaluate(out, work / "val.txt")
            check(abs(last - after) < 1e-5, f"{name}, {script}: saved: {last:.6f}, --eval {after:.6f}")
            check(last < first - 0.01, f"{name}, {script}: {first:.3f} -> {last:.3f}")
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
