#!/usr/bin/env python3
"""Plants bugs in train_moe.cu and dev/lib/cuda, one at a time, and checks that the tests notice. Needs no GPU. From the
project's folder:

    python3 dev/cuda/plant.py [WORD] [--quick N]      only the bugs whose text contains WORD; of those only the first N

Needs g++ (CXX), the CUDA headers in $CUDA_HOME/include (default /usr/local/cuda), those of cuBLAS there or in
$CUBLAS/include, and `make build/embedded.h`. Each bug replaces a piece of text, which must stand in these files exactly
once. It is hunted on the stand-in (dev/cuda/standin) by STAGES until one turns red: groups of tests in
test_moe.c, some of them under the stand-in's own checks. Prints a line a bug, with what caught it, and ends with
`N passed, N failed`; passed means caught. The unplanted files must pass all stages first. While one bug is hunted, the
next is compiled, so two cores are of use. The first three bugs are for a quick look.

The stand-in cannot see missing fences (fence_async_proxy, wgmma_fence) and what stands in assembly: ptx/defects.py.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

# name, group of tests, environment
STAGES = [
    ("values", "gpu tiles", {}),
    ("values on sm_80", "gpu tiles", {"STANDIN_ARCH": "80"}),
    ("late copies", "gpu tiles", {"STANDIN_LAZY": "7"}),
    ("late copies on sm_80", "gpu tiles", {"STANDIN_LAZY": "7", "STANDIN_ARCH": "80"}),
    ("order check", "gpu tiles", {"STANDIN_CHECK": "1"}),
    ("second device", "gpu devices", {"STANDIN_DEVICES": "2"}),
    ("references in fp32", "gpu fp32", {}),
    ("references in bf16", "gpu bf16", {}),
]
SANITIZER = ("sanitizer", "gpu tiles", {})      # only for what is out of bounds: a build of its own, and a slow one
TIMEOUT = 300                                   # seconds of a stage; a bug may hang
# Where a kind of bug, which is the word before the colon, is expected to show: that stage comes first.
EXPECTED = {"wait": "late copies", "wgmma": "late copies", "race": "order check", "syncwarp": "order check",
            "AdamW": "references in fp32", "norm": "references in fp32", "LPR": "references in fp32",
            "families": "references in fp32", "device": "second device", "out of bounds, shared": "sanitizer"}
TELLING = re.compile(r"standin: |FAILED|.*ERROR: AddressSanitizer|.*runtime error:")

# (what stands in one of the files, what takes its place, what that is); "out of bounds" calls for the sanitizer
BUGS = [
    # a quick look: a missing barrier, a copy that is not waited for, a race
    ("        fma_tile<TM, TN>(sum, a_tile, b_tile);\n        __syncthreads();",
     "        fma_tile<TM, TN>(sum, a_tile, b_tile);",
     "barrier: the router's product loads a tile that others still read"),
    ("cp_async_wait<AHEAD - 1>();", "cp_async_wait<AHEAD>();", "wait: experts' products wait for one group too few"),
    ("if (before + 1 == all) counts[e] = all;", "counts[e] = before + 1;",
     "race: all threads with an expert write its count"),
    ("if (m < M && n < N) out[", "if (m < M) out[",
     "out of bounds: the router's product writes columns that are not there"),
    # barriers
    ("    __syncthreads();\n    T sum = 0;\n    for (int w = 0; w < warps; w++)",
     "    T sum = 0;\n    for (int w = 0; w < warps; w++)",
     "barrier: block_sum reads before all have written"),
    ("    T sum = 0;\n    for (int w = 0; w < warps; w++) sum += shared[w];\n    __syncthreads();",
     "    T sum = 0;\n    for (int w = 0; w < warps; w++) sum += shared[w];",
     "barrier: two block_sums in succession, the second writes what the first still reads"),
    ("        __syncthreads();\n        fma_tile<64, 64>", "        fma_tile<64, 64>",
     "barrier: fp32 experts multiply tiles that are being loaded"),
    ("        __syncthreads();        // all products are done", "        // all products are done",
     "barrier: sums overwrite stages that others still multiply"),
    ("                __syncthreads();\n                finish_rows<128", "                finish_rows<128",
     "barrier: epilogue before all sums are there"),
    ("                    if (h > 0) __syncthreads();\n", "",
     "barrier: a persistent block's second sums overwrite the first, which others still read"),
    ("        __syncthreads();    // the last tile has been used by everyone", "",
     "barrier: fp32 attention loads keys over those in use"),
    ("        __syncthreads();            // the values have arrived, and",
     "            // the values have arrived, and",
     "barrier: bf16 attention loads keys over those in use"),
    ("        __syncthreads();            // this tile has arrived, and everyone is done with the one before\n"
     "        bool more",
     "        bool more",
     "barrier: bf16 attention's dk and dv"),
    ("maxima[threadIdx.x / 32] = row_max;\n    __syncthreads();", "maxima[threadIdx.x / 32] = row_max;",
     "barrier: the classifier's maximum"),
    ("        tile_ends[threadIdx.x] = tile_end;\n        __syncthreads();",
     "        tile_ends[threadIdx.x] = tile_end;",
     "barrier: the list of tiles"),
    # warps
    ("    __syncwarp();\n    for (int k = lane; k < K && norm_topk; k += 32) gates[k] /= gate_sum;\n}",
     "    for (int k = lane; k < K && norm_topk; k += 32) gates[k] /= gate_sum;\n}",
     "syncwarp: gates are divided before lane 0 has written them"),
    ("    __syncwarp();\n    for (int k = lane; k < K; k += 32) dz[experts[k]] += gates[k]",
     "    for (int k = lane; k < K; k += 32) dz[experts[k]] += gates[k]",
     "syncwarp: the chosen logits' gradients are added to before they are written"),
    ("    __syncwarp();\n    for (int e = lane; e < E; e += 32) {\n        float s = sigmoid(z[e]);",
     "    for (int e = lane; e < E; e += 32) {\n        float s = sigmoid(z[e]);",
     "syncwarp: the sigmoid router's gradient"),
    ("h - group < heads; h += groups) {       // all threads go round equally often: head_sum\n        int is_q",
     "h < heads; h += groups) {\n        int is_q",
     "shuffle: lanes beyond the last head do not take part"),
    # indices
    ("sum[i][j] = fmaf(left[i], right[j], sum[i][j]);", "sum[i][j] = fmaf(left[j], right[i], sum[i][j]);",
     "index: rows and columns swapped in a product"),
    ("int k = k0 + (ALONG_K ? 0 : low) + (left ? high : middle) * 8;",
     "int k = k0 + (ALONG_K ? 0 : low) + (left ? middle : high) * 8;",
     "index: quarters of a fragment swapped for mma.sync"),
    ("((chunk ^ line) & 7) * 8;", "((chunk ^ line >> 1) & 7) * 8;", "index: a swizzle that is not wgmma's"),
    ("if (j0 + lane > past + first + row + r) p[r] = -INFINITY;",
     "if (j0 + lane > past + first + row + r + 1) p[r] = -INFINITY;",
     "index: fp32 attention sees the next token"),
    # asynchronous copies and products
    ("        cp_async_wait<0>();\n        __syncthreads();            // the values",
     "        __syncthreads();            // the values",
     "wait: bf16 attention does not wait for the values"),
    ("            wgmma_wait<0>();\n            wgmma_hold", "            wgmma_hold",
     "wgmma: sums are read before the last product is done"),
    ("                wgmma_wait<1>();\n", "", "wgmma: no wait for the product before, whose stage is overwritten"),
    ("AHEAD = WGMMA ? STAGES - 2 : STAGES - 1;", "AHEAD = STAGES - 1;",
     "wgmma: a stage is overwritten a step too early"),
    ("    CHECK(cudaEventSynchronize(g->staged[g->turn]));", "",
     "wait: the host refills a buffer that is still being copied"),
    # out of bounds, uninitialised
    ("tile[j * (D + 4) + d] = j < lines && d < HD ?", "tile[j * (D + 4) + d] = d < HD ?",
     "out of bounds: fp32 attention reads rows after the last token"),
    ("b[16 * 68], sums[64 * 68];", "b[16 * 64], sums[64 * 68];", "out of bounds, shared: a tile without its padding"),
    ("        for (int j = 0; j < W; j++) dweight[i + j] = 0;", "        ;",
     "uninitialised: shared sums are not cleared"),
    ("    for (int j = i; j < E; j += GROUP_CHUNK) counts[j] = 0;\n", "",
     "uninitialised: counts of experts that a chunk does not have"),
    ("        CHECK(cudaMemsetAsync(g->dw.embedding, 0,", "        if (0) CHECK(cudaMemsetAsync(g->dw.embedding, 0,",
     "uninitialised: the embedding's gradient is not cleared after an update"),
    ("tiles[t] = make_int2(-1, 0);", "(void)t;", "uninitialised: the end of the list of tiles"),
    ("for (int w = 0; w < (int)blockDim.x / 32; w++) row_max",
     "for (int w = 0; w <= (int)blockDim.x / 32; w++) row_max",
     "uninitialised: the classifier's maximum includes a warp that is not there"),
    # tails
    ("int steps = ceil_div(j.k_end - j.k, BK);", "int steps = (j.k_end - j.k) / BK;",
     "tail: the last values of k"),
    ("int down = PRODUCT == DYT_X ? ceil_div(left.width, 64)", "int down = PRODUCT == DYT_X ? left.width / 64",
     "tail: the last rows of fp32 weights' gradients"),
    ("int across = ceil_div(columns, Epilogue::PAIRS ? BN / 2 : BN), jobs",
     "int across = max(1, columns / (Epilogue::PAIRS ? BN / 2 : BN)), jobs",
     "tail: the last columns of bf16 experts"),
    ("        for (; i < n; i++)\n            adamw_vector", "        for (; i < n - 1; i++)\n            adamw_vector",
     "AdamW: the last parameter is not updated"),
    ("for (int s = 0; s < splits; s++) sum += parts[s * count + i];",
     "for (int s = 1; s < splits; s++) sum += parts[s * count + i];",
     "tail: a part of a product that is split along k"),
    # persistent blocks
    ("stage_at(stage + AHEAD + warp / 4)", "stage_at(stage + warp / 4)",
     "persistent: sums lie where the next tile's stages are arriving"),
    ("return PERSISTENT ? max(steps, AHEAD) : steps;", "return steps;",
     "persistent: a tile of less than two steps, when the block is to load two ahead"),
    ("if (PRODUCT != DYT_X) right.data = weights + from.expert * weight_stride;",
     "if (PRODUCT != DYT_X) right.data = weights + job.expert * weight_stride;",
     "persistent: the next tile with this one's weights"),
    ("            fetch_rows(true);\n", "            fetch_rows(false);\n",
     "persistent: the next tile with this one's rows"),
    # routing
    ("tiles[t] = make_int2(round + i, row", "tiles[t] = make_int2(round + (i ? i - 1 : 0), row",
     "experts: a tile is given to the expert before"),
    ("before += j + k < i ? same[k] : 0;", "before += j + k > i ? same[k] : 0;",
     "grouping: not stable, assignments of a chunk in reverse"),
    ("    int first = min(y * per_thread, chunks),", "    int first = min(y, chunks),",
     "grouping: sums over chunks, when there are more than 32"),
    # attention
    ("        if (j0 + N - 1 > query) {", "        if (j0 + N - 1 > query + 16 * M - 1) {",
     "mask: bf16 attention, a tile that ends among a warp's queries"),
    ("bool mask = j0 + N - 1 > query;", "bool mask = j0 > query;",
     "mask: bf16 dq, a tile that begins before a warp's queries"),
    ("sum[m][d][2 * half] *= shrink, sum[m][d][2 * half + 1] *= shrink;", "sum[m][d][2 * half] *= shrink;",
     "softmax: bf16 attention rescales every second column"),
    ("    *sum *= __expf(*max - new_max);\n", "", "softmax: the classifier does not rescale its sum"),
    ("steps = NH / NKV * tiles;", "steps = tiles;", "heads: bf16 dk and dv from the first query head of a group only"),
    # gates, sums, gradients
    ("x[j] += gate[k] * y_k[k][j];", "x[j] += y_k[k][j];", "gate: not applied when experts' rows are added up"),
    ("            a[j] = gate * silu * u_j;", "            a[j] = silu * u_j;",
     "gate: missing in the gradient of down_proj"),
    ("        if (add) load4(v, f.before, p, count, vector);\n", "",
     "accumulation: experts' gradients of the last micro-batch only"),
    ("out[c] = (float)(add ? out[c] + sum : sum);", "out[c] = (float)sum;", "accumulation: LPR's biases"),
    ("losses[n] = row_max - target_logit + logf(sum);", "losses[n] = row_max - to_float(row[target]) + logf(sum);",
     "race: the target's logit is read when its gradient may have taken its place"),
    ("for (int p = warp; p < P; p += 32) sum +=", "for (int p = warp; p < P && p < 32; p += 32) sum +=",
     "norms: parts beyond the 32nd are dropped"),
    ("for (long n = first + y; n < end; n += 32) sum += value(n);", "if (first + y < end) sum += value(first + y);",
     "slices: tokens beyond the 32nd of a slice are dropped"),
    # more than one device, rows with a gap
    ("    allow_shared(kernel, shared);\n    long weight_stride",
     "    static bool ready = false;\n    if (!ready) allow_shared(kernel, shared);\n    ready = true;\n"
     "    long weight_stride", "device: experts may use more shared memory on the first device only"),
    ("T* row = logits + n * row_size;", "T* row = logits + n * V;",
     "rows: the classifier knows of no gap between logits"),
    # the update
    ("eps, 1.0f / sqrtf(correction2));", "eps, 1.0f / correction2);", "AdamW: wrong correction of the second moment"),
    ("p < count; p += 256) sum += parts[p];", "p < count - 1; p += 256) sum += parts[p];",
     "norm: the gradient's last partial sum is dropped"),
    ("    if (copy) store_vector<W>(copy, w_i);\n", "", "AdamW: the bf16 copy is not updated"),
    # router variants
    ("shift[e] = !beaten && before == winner ? 0 : penalty;", "shift[e] = !beaten && before == 0 ? 0 : penalty;",
     "families: a tie always goes to the first copy"),
    (" + align * sums[3] / ((double)E * D));", ");", "LPR: the align loss is dropped"),
    ("        float du = dunits[d] + factor * sum;", "        float du = dunits[d];",
     "LPR: the gradient of the diversity loss is dropped"),
]


class Workplace:
    """A copy of what the tests need, in a temporary folder, as it is now: later edits do not matter."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("train_moe.c", "upcycle.c", "test_moe.c", "build/embedded.h"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(name, folder / name)
        shutil.copytree("dev", folder / "dev", symlinks=True)
        self.source = {f: f.read_text() for f in [pathlib.Path("train_moe.cu"),
                                                  *sorted(pathlib.Path("dev/lib/cuda").iterdir())]}
        top = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
        self.compiler = [os.environ.get("CXX", "g++"), "-std=gnu++17", "-O1", "-march=native", "-fno-math-errno",
                         "-fopenmp", "-DTEST_GPU", "-I.", "-Idev/cuda/standin", "-include", "standin.h",
                         f"-I{top}/include"]
        if os.environ.get("CUBLAS"):
            self.compiler.append(f"-I{os.environ['CUBLAS']}/include")
        for name in ("standin", "cublas"):
            self.call([*self.compiler, "-c", f"dev/cuda/standin/{name}.cpp", "-o", f"{name}.o"])

    def call(self, command):
        """Runs a command that must succeed; returns what it prints."""
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"{command[0]}: {errors[0] if errors else done.stderr[:160]}")
        return done.stdout

    def build(self, source, program, sanitize=False):
        """Compiles the tests with these files; returns the program's path."""
        for file, text in source.items():
            (self.folder / file).write_text(text)
        (self.folder / "test.cpp").write_text(
            self.call([sys.executable, "dev/cuda/standin/translate.py", "test_moe.c"]))
        rest = ["dev/cuda/standin/standin.cpp", "dev/cuda/standin/cublas.cpp", "-fsanitize=address,undefined",
                "-fno-sanitize-recover=undefined"] if sanitize else ["standin.o", "cublas.o"]
        self.call([*self.compiler, "test.cpp", *rest, "-o", program, "-lm"])
        return self.folder / program

    def run(self, program, stage):
        """Runs a stage; returns None if it is green, else what it says."""
        _, group, settings = stage
        # one thread, and what is idle leaves the processor to the compiler
        environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TMPDIR=str(self.folder),
                           ASAN_OPTIONS="color=never", **settings)
        # to a terminal lines are written at once, and the first telling one ends the run
        terminal, output = os.openpty()
        process = subprocess.Popen([program, group], cwd=self.folder, stdout=output, stderr=output, env=environment)
        os.close(output)
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        last = said = ""
        with os.fdopen(terminal, errors="replace") as lines:
            try:
                for line in lines:
                    last = line.strip() or last
                    if TELLING.match(line):
                        said = last
                        process.kill()
                        break
            except OSError:                     # the end of what a terminal has to say
                pass
        code = process.wait()
        timer.cancel()
        return said or (f"ended with {code}: {last}" if code else None)


def hunt(workplace, compiler, program, source, what):
    """The first stage that notices, as (its name, what it says), or None."""
    first = EXPECTED.get(what.split(":")[0])
    stages = STAGES + ([SANITIZER] if "out of bounds" in what else [])
    for stage in sorted(stages, key=lambda stage: stage[0] != first):
        if stage is SANITIZER:
            clean = compiler.submit(workplace.build, workplace.source, "sanitized", True).result()
            said = workplace.run(clean, stage)
            if said:
                sys.exit(f"without a bug the tests fail already: {stage[0]}: {said}")
            sanitized = compiler.submit(workplace.build, source, "sanitized", True).result()
            said = workplace.run(sanitized, stage)
        else:
            said = workplace.run(program, stage)
        if said:
            return stage[0], said
    return None


def main():
    parser = argparse.ArgumentParser(description="Plants bugs in the GPU's code and checks that the tests notice.")
    parser.add_argument("word", nargs="?", default="", help="only the bugs whose text contains it")
    parser.add_argument("--quick", type=int, metavar="N", help="only the first N of them")
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if options.word in " ".join(bug)][:options.quick]
    caught = missed = 0
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(1) as compiler:
        workplace = Workplace(pathlib.Path(folder))
        sources = [workplace.source]
        for right, wrong, what in bugs:
            times = sum(text.count(right) for text in workplace.source.values())
            if times != 1:
                print(f"FAILED {what}: its text stands {times} times in the GPU's code: {right!r}", flush=True)
                missed += 1
                sources.append(None)
            else:
                sources.append({f: text.replace(right, wrong) for f, text in workplace.source.items()})
        todo = [(what, source) for what, source in zip(["no bug"] + [bug[2] for bug in bugs], sources) if source]
        builds = [None] * (len(todo) + 1)
        builds[0] = compiler.submit(workplace.build, todo[0][1], "test0")
        for i, (what, source) in enumerate(todo):
            start, found, said = time.time(), None, "NOT CAUGHT"
            if i + 1 < len(todo):
                builds[i + 1] = compiler.submit(workplace.build, todo[i + 1][1], f"test{(i + 1) % 2}")
            try:
                found = hunt(workplace, compiler, builds[i].result(), source, what)
            except RuntimeError as e:
                said = f"does not compile: {e}"
            if i == 0:
                if found or said != "NOT CAUGHT":
                    sys.exit(f"without a bug the tests fail already: {' '.join(found) if found else said}")
                continue
            if found:
                said = f"caught by {found[0]}: {found[1][:160]}"
            print(f"{'ok    ' if found else 'FAILED'} {what}: {said}  ({time.time() - start:.0f} s)", flush=True)
            caught, missed = caught + bool(found), missed + (not found)
    print(f"{caught} passed, {missed} failed")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
