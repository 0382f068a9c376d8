#!/usr/bin/env python3
"""Executes the tensor-core kernels of train_moe.cu, as nvcc's PTX, on the CPU, and checks the interpreter itself:

    python3 dev/cuda/ptx/test_ptx.py [--short] [--jobs N] [--only WORD] sm_80.ptx sm_90a.ptx      (make test_ptx)

1. single instructions and hazards (test_instructions.py); 2. every kernel that holds mma.sync or wgmma against the
formulas in doubles, in several shapes; 3. defects planted in that PTX (defects.py), each of which must be found.
--short: small shapes, sm_90a alone (it has both kinds of products), and every second defect. Needs numpy. Prints a line
for each kernel, each defect and what fails, and ends with `N passed, N failed`.
"""
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")      # a process for each core; the products are small

import argparse
import functools
import multiprocessing
import pathlib
import re
import sys
import time

import defects
import kernels
import test_instructions
from memory import Fault
from ptx import Module

# rows of each expert, tokens, H, I. The first: 7, 5 and 9 steps of k through a ring of 4 stages, by cp.async; 2 and 3
# tiles of columns; an expert without rows. The second: nothing is a multiple of anything, and loads are scalar.
EXPERTS = [((150, 0, 201), 90, 424, 264), ((130, 5), 40, 99, 77)]
EXPERTS_SHORT = {0: ((40, 0, 30), 50, 264, 264), 1: ((40, 0, 30), 50, 264, 264), 2: ((270, 0), 50, 72, 264)}   # 5 steps
# B, T, query heads, other heads, head size, positions asked. Three blocks of queries; heads that do not fill D; grouped
# heads; generation, with one block of many keys or with two blocks behind a past
ATTENTION = {32: [(2, 133, 3, 1, 32), (1, 70, 2, 2, 20)], 64: [(1, 300, 2, 1, 64), (1, 197, 2, 1, 64, 5)],
             96: [(1, 150, 2, 2, 96), (1, 133, 1, 1, 70)],
             128: [(1, 300, 1, 1, 128), (1, 40, 1, 1, 101), (1, 300, 1, 1, 128, 130)]}
ATTENTION_SHORT = {D: [(1, 140 if D == 64 else 70, 1, 1, D)] for D in ATTENTION}
modules = {}


@functools.lru_cache(None)
def experts_case(*case):
    rows, *sizes = case
    return kernels.Experts(list(rows), *sizes)


attention_case = functools.lru_cache(None)(kernels.Attention)


def error_of(arch, name, case, change=None):
    if "experts" in name:
        return kernels.run_experts(modules[arch], name, experts_case(*case), change)
    return kernels.run_attention(modules[arch], name, attention_case(*case), change)


def tolerance(name):
    return kernels.TOLERANCE["experts" if "experts" in name else "attention"]


def check_instruction(number):
    name, function = test_instructions.CHECKS[number]
    try:
        function()
    except Exception as e:          # whatever it is, it is this check's
        return False, f"{name}: {type(e).__name__}: {e}"
    return True, ""


def check_kernel(arch, name, case):
    what, numbers, rest = kernels.template(name)
    epilogue = re.match(r"\d+([A-Za-z]+?Epilogue)", rest)
    title = f"{arch} {what}<{', '.join(map(str, numbers))}{', ' + epilogue[1] if epilogue else ''}>, {case}"
    start = time.time()
    try:
        error = error_of(arch, name, case)
    except (Fault, KeyError, NotImplementedError) as e:
        return False, f"{title}: {type(e).__name__}: {e}"
    return error <= tolerance(name), f"{title}: relative error {error:.1e}  ({time.time() - start:.0f} s)"


def check_defect(number):
    title, part, pattern, replacement = defects.DEFECTS[number]
    (name,) = [n for n in modules["sm_90a"].entries if part in n]
    case = EXPERTS_SHORT[kernels.template(name)[1][0]] if "experts" in name else (1, 140, 1, 1, 64)
    try:
        error = error_of("sm_90a", name, case, lambda body: re.sub(pattern, replacement, body))
        found, said = not error <= tolerance(name), f"relative error {error:.1e}"
    except Fault as e:
        found, said = True, str(e)
    except ValueError as e:         # its text is not there
        found, said = False, str(e)
    return found, f"{'found' if found else 'NOT FOUND'}: {title}: {said}"


def call(task):
    function, *arguments = task
    return function, *function(*arguments)


def main():
    parser = argparse.ArgumentParser(description="Executes nvcc's PTX of the tensor-core kernels.")
    parser.add_argument("--short", action="store_true", help="small shapes, sm_90a alone, every second defect")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: the number of cores)")
    parser.add_argument("--only", default="", metavar="WORD", help="kernels whose name contains WORD; no instructions")
    parser.add_argument("ptx", nargs="+", type=pathlib.Path, help="files named for their architecture: sm_90a.ptx")
    options = parser.parse_args()
    files = {path.stem[path.stem.index("sm_"):]: path for path in options.ptx}
    tasks = [] if options.only else [(check_instruction, i) for i in range(len(test_instructions.CHECKS))]
    for arch in ["sm_90a"] if options.short else sorted(files, reverse=True):
        modules[arch] = Module(files[arch].read_text())
        for name in kernels.tensor_core_kernels(modules[arch]):
            if "experts" in name:
                cases = [EXPERTS_SHORT[kernels.template(name)[1][0]]] if options.short else EXPERTS
            else:
                D = kernels.template(name)[1][0]
                cases = (ATTENTION_SHORT if options.short else ATTENTION)[D]
                cases = [c for c in cases if len(c) < 6 or "forward" in name]   # backward has no past
            tasks += [(check_kernel, arch, name, case) for case in cases if options.only in name]
    chosen = range(0, len(defects.DEFECTS), 2 if options.short else 1)
    tasks += [] if options.only or "sm_90a" not in modules else [(check_defect, i) for i in chosen]
    passed = failed = 0
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for function, ok, said in pool.imap(call, tasks):
            passed, failed = passed + ok, failed + (not ok)
            if not ok or function is not check_instruction:
                print("ok    " if ok else "FAILED", said, flush=True)
    if not any(f is check_kernel for f, *_ in tasks):
        sys.exit("no kernel was run")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
