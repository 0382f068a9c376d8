#!/usr/bin/env python3
"""Compiles and runs the files that cut.py makes, each alone in an empty folder:  make test_cut [CUT=WORD]

CUT: cpu, gpu, or a part of a file's name; --all before it: all planted bugs, not one a file. Files for CPUs are
compiled as C by the command in their manuals, for other processors and for the sanitizers, and read as C++. Files for
GPUs are compiled by nvcc ($NVCC; without one they are left out) for sm_80 and sm_90a, and run on the GPU, where there
is one, and on the stand-in (dev/cuda/standin), with the CUDA headers of $CUDA_TOP: as an H100, and as an H100 and an
A100 whose copies come as late as they may. No compiler may warn. Then bugs are planted in each file, whose test must
turn red. Ends with `N passed, N failed`.
"""
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
STANDIN = ROOT / "dev/cuda/standin"
NVCC, TOP = os.environ.get("NVCC", ""), os.environ.get("CUDA_TOP") or "/usr/local/cuda"
GPUS = ("-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a "
        "-gencode arch=compute_80,code=compute_80")         # PTX, for other cards
PLAYED = f"g++ -std=gnu++17 -O1 -fopenmp -Wall -Wno-unknown-pragmas -I{STANDIN} -include standin.h -I{TOP}/include"
NOT_OURS = "-Wno-maybe-uninitialized -Wno-class-memaccess -Wno-sign-compare"    # nvcc does not know these warnings
HERE = "-O3 -march=native -fopenmp"                                             # what the files for CPUs tell to use
ELSEWHERE = ("haswell", "znver3", "skylake-avx512", "cooperlake", "sapphirerapids")     # AVX2, AVX-512, BF16, AMX
AS = [{}, {"STANDIN_LAZY": "7"}, {"STANDIN_LAZY": "7", "STANDIN_ARCH": "80"}]       # what the stand-in plays

# file: (what stands in it exactly once, what takes its place) ...
BUGS = {
    "grouped_gemm.cu": [
        ("right.data = weights + from.expert * weight_stride;", "right.data = weights + job.expert * weight_stride;"),
        ("real ? width - column : 0", "width - column"),
        ("s * (1.0f + g[j] * (1.0f - s));", "s * (1.0f - g[j] * (1.0f - s));"),
        ("if (r >= 0 && from.token) r = from.token[r];", ""),
    ],
    "flash_attention.cu": [
        ("ds[r] = p[r] * (ds[r] - dot_i);", "ds[r] = p[r] * (ds[r] + dot_i);"),
        ("float shrink = exp2_fast(max_score[m][half] - max);", "float shrink = 1;"),
        ("if (j0 + lane > past + first + row + r)", "if (j0 + lane > past + first + row + r + 1)"),
    ],
    "topk_routing.cu": [
        ("before += j + k < i ? same[k] : 0;", "before += same[k];"),
        ("gates[k] /= gate_sum;", ";"),
        ("p * (aux_weight * (f[e] - f_mean)", "p * (aux_weight * f[e]"),
    ],
    "classifier.cu": [
        ("(v + j == target ? scale : 0)", "0"),
        ("*sum *= __expf(*max - new_max);", ""),
        ("*total += weight * sum;", "*total = weight * sum;"),
    ],
    "adamw.cu": [
        ("v_i[j] = beta2 * v_i[j] + (1.0f - beta2) * g * g;", "v_i[j] = beta2 * v_i[j] + (1.0f - beta2) * g;"),
        ("if (!isfinite(norm_now)) return;", ""),
        ("for (; i < n; i++)\n            adamw", "if (i < n)\n            adamw"),
    ],
    "products.c": [
        ("copied ? buffer : adding ? r : NULL", "copied ? buffer : NULL"),
        ("for (; c < C; c++) {\n            for (int q", "for (; c < 0; c++) {\n            for (int q"),
        ("Packing how = bf16_products ? bf16_packing : PACK_FP32;", "Packing how = PACK_FP32;"),
    ],
    "attention.c": [
        ("(ds_i[j] - D) * scale", "ds_i[j] * scale"),
        ("int seen = past + i + 1, padded", "int seen = past + i + 2, padded"),
    ],
    "routing.c": [
        ("(scores[e] == last && e > chosen[k - 1])", "scores[e] == last"),
        ("norm_topk ? 0 : -p[e] * mean", "norm_topk ? 0 : -p[e]"),
        ("? -1 : offsets[experts[a]]++;", "? -1 : offsets[experts[a]];"),
    ],
}
passed = failed = 0


def check(ok, what, said=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("ok    " if ok else "FAILED", what, flush=True)
    for line in said.strip().splitlines()[-12:] if not ok else ():
        print("       |", line)
    return ok


def run(command, folder, **environment):
    done = subprocess.run(shlex.split(command), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          errors="replace", env={**os.environ, **environment}, timeout=600)
    return done.returncode, done.stdout


def check_run(what, command, folder):
    code, said = run(command, folder)
    return check(code == 0, what, said)


def its_lines(name):
    """Is the middle of a file its program's text, line by line?"""
    program = ROOT / ("train_moe.cu" if name.endswith(".cu") else "train_moe.c")
    paths = [program, *(ROOT / "dev/lib").rglob("*.*h")]
    known = {line.strip() for path in paths for line in path.read_text().splitlines()}
    text = (ROOT / "build/cut" / name).read_text()
    own = set((ROOT / "dev/cut" / name).read_text().splitlines())
    middle = text[text.index("// Cut from"):text.index("// Test and benchmark")].splitlines()[1:]
    strange = [line for line in middle if line.strip() not in known and line not in own and
               not any(k.endswith(line[3:]) for k in known if re.match(r"// \d+\. ", k))]
    check(not strange, f"{name}: its lines are the program's", "\n".join(strange))


def build(name, folder):
    """Compiles a file for its test: for a CPU, or for the CPU that plays a GPU. Returns the code and what was said."""
    if name.endswith(".c"):
        return run(f"cc {HERE} -Wall -Wextra -Werror {name} -o test -lm", folder)
    played = run(f"{sys.executable} {STANDIN}/translate.py {name}", folder)
    (folder / "test.cpp").write_text(played[1])
    return played if played[0] else run(f"{PLAYED} {NOT_OURS} -Werror test.cpp ../standin.o -o test", folder)


def passes(folder, environment):
    code, said = run("./test", folder, **environment)
    return code == 0 and re.search(r"^[1-9]\d* passed, 0 failed$", said, re.M), said


def test(name, folder):
    shutil.copy(ROOT / "build/cut" / name, folder)
    if name.endswith(".c"):
        check(f"cc {HERE} {name} -o {name[:-2]} -lm" in (folder / name).read_text(), f"{name}: its command is tested")
        for cc, arch in itertools.product(filter(shutil.which, ("gcc", "clang")), ELSEWHERE):
            if run(f"{cc} -march={arch} -fopenmp -include omp.h -E -x c /dev/null", folder)[0] == 0:
                check_run(f"{name}: {cc} -march={arch}", f"{cc} -O1 -march={arch} -fopenmp -Wall -Wextra -Werror -c "
                          f"{name} -o test.o", folder)
        check_run(f"{name}: as C++", "cc -x c++ -std=gnu++17 -march=native -fopenmp -fsyntax-only -Wall -Werror "
                  f"{name}", folder)
        if check_run(f"{name}: for the sanitizers", "cc -O2 -g -march=native -fsanitize=address,undefined "
                     f"-fno-sanitize-recover=undefined {name} -o test -lm", folder):
            good, said = passes(folder, {})
            check(good, f"{name}: under the sanitizers", said)
        settings = [{}]
    else:
        check_run(f"{name}: nvcc, sm_80 and sm_90a, alone",
                  f"{NVCC} -std=c++17 -O3 {GPUS} -Werror all-warnings {name} -o gpu", folder)
        if shutil.which("nvidia-smi") and run("nvidia-smi -L", folder)[0] == 0:
            check_run(f"{name}: on the GPU", "./gpu", folder)
        settings = AS
    code, said = build(name, folder)
    if check(code == 0, f"{name}: compiles alone", said):
        for setting in settings:
            good, said = passes(folder, setting)
            check(good, f"{name}: test {' '.join(f'{k}={v}' for k, v in setting.items())}".rstrip(), said)
        code, said = run("./test --bench 64", folder)
        check(code == 0 and ("unmeasured" in said or name.endswith(".c")), f"{name}: --bench 64", said)
        check(run("./test --nonsense", folder)[0] == 2, f"{name}: --nonsense is refused")


def plant(name, folder, bugs):
    text = (ROOT / "build/cut" / name).read_text()
    for old, new in bugs:
        what = f"{name}: {' '.join(old.split())}  ->  {' '.join(new.split())}"
        if not check(text.count(old) == 1, f"{what}: stands there once"):
            continue
        (folder / name).write_text(text.replace(old, new))
        code, said = build(name, folder)
        red = code == 0 and not all(passes(folder, setting)[0] for setting in (AS if name.endswith(".cu") else [{}]))
        check(red, f"{what}: is found", said)


def main():
    words = [word for word in sys.argv[1:] if word != "--all"]
    os.environ.update(OMP_WAIT_POLICY="passive", MAKEFLAGS="")
    files = sorted(f.name for f in pathlib.Path(ROOT, "dev/cut").iterdir() if f.suffix in (".c", ".cu"))
    check(sorted(BUGS) == files, f"bugs are known of each file: {', '.join(files)}")
    if unknown := [word for word in words if word not in ("cpu", "gpu") and not any(word in name for name in BUGS)]:
        sys.exit(f"no file has {', '.join(unknown)} in its name; there are: {', '.join(files)}")
    check(run(f"{sys.executable} dev/cut/cut.py nosuch.cu", ROOT)[0] == 2, "cut.py nosuch.cu is refused")
    check_run("cut.py", f"{sys.executable} dev/cut/cut.py", ROOT)
    tested = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, bugs in BUGS.items():
            kind = "gpu" if name.endswith(".cu") else "cpu"
            if words and not any(word == kind or word in name for word in words) or kind == "gpu" and not NVCC:
                continue
            tested += 1
            its_lines(name)
            if kind == "gpu" and not os.path.exists(f"{folder}/standin.o"):
                check_run("the stand-in", f"{PLAYED} -c {STANDIN}/standin.cpp -o standin.o", folder)
            alone = pathlib.Path(folder, f"{name}.alone")
            alone.mkdir()
            test(name, alone)
            plant(name, alone, bugs if "--all" in sys.argv else bugs[:1])
    check(tested, "some file was tested (those for GPUs want nvcc)")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
