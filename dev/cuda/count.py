#!/usr/bin/env python3
"""What can be said about the speed of train_moe.cu without a GPU:

    dev/cuda/count.py > dev/cuda/figures.md       needs nvcc (--nvcc PATH, --cublas DIR with include/), takes minutes
    dev/cuda/count.py --log sm_90a=FILE ...       the same from what nvcc -Xptxas -v has printed before
    dev/cuda/count.py --check FILE --layers 2 ... is a step really made of these launches? FILE: what one training step
                                                  on the stand-in printed, with STANDIN_COUNT=1
    dev/cuda/count.py --sass FILE                 counts the loops of attention in what nvdisasm -c printed of a cubin

It counts operations and bytes of every launch of a training step (calc); the list of launches below reads like
gpu_forward, gpu_backward and gpu_update, for a softmax router in bf16. Numbers that nobody has measured (est) all stand
in EFFICIENCY and CARDS, with where they come from. What a change of a kernel does to a prediction stands in VERSIONS:
counts of its code, before and after, which the same formulas take.
"""
import argparse
import collections
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "train_moe.cu", *sorted((ROOT / "dev/lib/cuda").iterdir())]
MB, L2 = 1e6, 50e6

# tensor, hbm: bf16 FLOP/s and bytes/s as measured on such cards. fp32: NVIDIA's data sheet, without tensor cores. l2:
# from the L2 cache to all SMs (est). memory: what a program gets.
CARDS = {"H100": dict(tensor=798e12, hbm=3.0e12, fp32=67e12, l2=6e12, sms=132, memory=78 * 2**30),
         "H200": dict(tensor=790e12, hbm=4.3e12, fp32=67e12, l2=6e12, sms=132, memory=139 * 2**30)}

# N_total and N_active: 135M and 59M, 2.2B and 0.6B, 6.9B and 1.2B. T: what fits OLMoE's 163 ms of arithmetic.
CONFIGS = {
    "tiny": dict(L=8, H=512, NH=8, NKV=8, HD=64, I=1024, E=8, K=2, V=50304, T=1024, tie=1, qk="head", tokens=65536),
    "8x350M": dict(L=24, H=1024, NH=16, NKV=4, HD=64, I=3584, E=8, K=2, V=32000, T=2048, tie=0, qk="none",
                   tokens=65536),
    "OLMoE-1B-7B": dict(L=16, H=2048, NH=16, NKV=16, HD=128, I=1024, E=64, K=8, V=50304, T=4096, tie=0, qk="row",
                        tokens=16384)}

# All (est). Each is a share of the roof that the class of kernels meets, or a time.
EFFICIENCY = {
    "cublas": (0.90, "of `tensor`, which is what cuBLAS reaches with large squares"),
    "experts": (0.65, "of `tensor` in the loop over k: wgmma fed by cp.async, without TMA, multicast or specialised "
                "warps. SonicMoE, which has more of these, reaches 335 to 466 TFLOP/s (arXiv 2512.14080)"),
    "attention": (0.85, "of FlashAttention-2's speed on H100, mma.sync as well: causal forward 229, 262, 284 TFLOP/s "
                  "with heads of 64 and 260, 298, 319 with heads of 128 at T = 1k, 2k, 4k; backward 238, 264, 279 and "
                  "260, 291, 310, not causal (here times 0.9) (figures of FlashAttention-3, arXiv 2407.08608)"),
    "fp32": (0.35, "of `fp32`: 4 x 4 sums a thread load 8 numbers from shared memory for 16 products; one buffer"),
    "stream": (0.88, "of `hbm` for one pass over large arrays"),
    "rows": (0.80, "of `hbm` for blocks that wait at a barrier between two passes over a row"),
    "launch": (2.5e-6, "any kernel, from start to start of the next"),
    "access": (0.7e-6, "a load that the next step waits for; kernels of a few blocks consist of these")}
# Of an H100's SM: clocks a second, bytes a clock of its shared memory, FLOPs a clock of one of its four tensor cores by
# mma.sync, 62 % of what wgmma does (est).
CLOCK, SHARED, MMA = 1.755e9, 128, 0.62 * 1024
FLASH2 = {64: ((229, 262, 284), (238, 264, 279)), 128: ((260, 298, 319), (260, 291, 310))}


# What differs between versions of the kernels.
# Grouped products, for each tile of 128 x 256, while tensor cores idle: `first`, how many loads wait for each other
# before its first product (tiles, offsets, token, copy), by what a product is called; `epilogue`, how many wait for
# each other after its last one, where the epilogue reads memory (d down: gate and up; dW: what it adds to; that gates
# of d down wait for `assignment` is counted in neither version).
# Attention, by kernel and head size: SASS instructions, mma.sync and ldmatrix of a warp for a tile (--sass, sm_90a).
VERSIONS = {
    "before": dict(
        first={"gate, up, SwiGLU": 4, "down": 3, "d down, d SwiGLU": 4, "dW down": 3, "dW gate, up": 3,
               "d experts' input": 3}, epilogue=32,
        loops={("forward", 64): (1228, 128, 40), ("backward_kv", 64): (789, 128, 48), ("backward_q", 64): (630, 96, 40),
               ("forward", 128): (1553, 192, 64), ("backward_kv", 128): (838, 128, 80),
               ("backward_q", 128): (705, 96, 56)})}
# attention's copies: one branch for all of them, pointers that are added to, places in lines known to the compiler
VERSIONS["copies"] = dict(VERSIONS["before"], loops={
    ("forward", 64): (923, 128, 40), ("backward_kv", 64): (788, 128, 48), ("backward_q", 64): (621, 96, 40),
    ("forward", 128): (1086, 192, 64), ("backward_kv", 128): (753, 128, 80), ("backward_q", 128): (621, 96, 56)})
# persistent blocks: a tile's first copies are under way before the last one is done; an epilogue reads for 4 of the 32
# fours of a thread at a time
VERSIONS["persistent"] = dict(VERSIONS["copies"], first=dict.fromkeys(VERSIONS["copies"]["first"], 0), epilogue=8)
BASE, NOW = "before", list(VERSIONS)[-1]


def ceil(a, b):
    return -(-a // b)


def tile_clocks(version, kernel, HD):
    """Clocks that an SM with 8 warps takes for a tile of each: the limit is issue, tensor cores or shared memory, whose
    ldmatrix moves 512 bytes"""
    instructions, mma, ldmatrix = VERSIONS[version]["loops"][kernel, 64 if HD <= 64 else 128]
    return max(2 * instructions, 2 * mma * 4096 / MMA, 8 * ldmatrix * 512 / SHARED)


class Step:
    """The launches of one training step on one card, in order."""

    def __init__(self, c, card, version=NOW):
        self.c, self.card, self.version, self.rows, self.times = c, card, version, [], 1

    @contextmanager
    def repeat(self, times):
        self.times *= times
        yield
        self.times //= times

    def launch(self, kernel, what, read=0.0, write=0.0, flops=0.0, done=None, seconds=0.0, kind="stream"):
        """flops: what the formula needs; done: what the kernel computes; seconds: a floor by waiting (est)"""
        done = flops if done is None else done
        memory, card = (read + write) / self.card["hbm"], self.card
        compute = done / card["fp32" if kind == "fp32" else "tensor"]
        share = EFFICIENCY[kind][0] if kind in ("cublas", "fp32") else 1
        bandwidth = EFFICIENCY["rows" if kind == "rows" else "stream"][0]
        predicted = max(compute / share, memory / bandwidth, seconds, EFFICIENCY["launch"][0])
        self.rows.append(dict(kernel=kernel, what=what, times=self.times, flops=flops, done=done, read=read,
                              write=write, roof=max(memory, compute), limit="memory" if memory > compute else "compute",
                              predicted=predicted))

    # -- groups of launches with one shape

    def linear(self, what, M, N, K, c_bytes=2, add=0.0):
        """cuBLAS, M x N from K: each operand once. add: the share of launches that read the result first"""
        self.launch("cublas", what, 2 * (M + N) * K + add * 4 * M * N, c_bytes * M * N, 2 * M * N * K, kind="cublas")

    def experts(self, what, rows, N, K, read, write, weights=False, loads=0.0):
        """A grouped product: rows by N from K, in Hopper's tiles of 128 x 256. weights: for each expert, from its share
        of the K rows. loads: the share of launches whose epilogue reads memory. A block fills an SM, so that nothing
        else runs while it waits for loads and while its sums go through shared memory, written and read."""
        E, sms, tile = self.c["E"], self.card["sms"], 2 * 128 * 256         # FLOPs of a tile for each k
        if weights:
            tiles, depth = E * ceil(rows, 128) * ceil(N, 256), K / E + 32   # half of the last 64 rows is zeros
        else:
            tiles, depth = (rows / 128 + E / 2) * ceil(N, 256), ceil(K, 64) * 64    # half a tile an expert is empty
        rate = min(EFFICIENCY["experts"][0] * self.card["tensor"], self.card["l2"] * tile / (2 * (128 + 256)))
        v = VERSIONS[self.version]
        gap = EFFICIENCY["access"][0] * (v["first"][what] + loads * v["epilogue"]) + 2 * 4 * tile / 2 / SHARED / CLOCK
        seconds = ceil(int(tiles), sms) * (depth * tile * sms / rate + gap)
        self.launch("experts_bf16_kernel", what, read, write, 2 * rows * N * K, tiles * depth * tile, seconds)

    def matmul_fp32(self, what, M, N, K, read, write, splits_floats=0):
        """gpu_matmul_fp32: tiles of 256 x 16, 16 x 256 or 64 x 64; a long sum over few elements is split"""
        tm, tn = (256, 16) if N <= 16 else (16, 256) if M <= 16 else (64, 64)
        tiles = ceil(M, tm) * ceil(N, tn)
        splits = min(512 // tiles, K // 512, splits_floats // (M * N)) if splits_floats else 1
        flops = 2 * M * N * K
        self.launch("matmul_fp32_kernel", what, read, write + 4 * M * N * (splits if splits > 1 else 0), flops,
                    2 * tiles * tm * tn * ceil(K, 16) * 16, kind="fp32")
        if splits > 1:
            self.launch("add_product_parts_kernel", what + ", its parts", 4 * M * N * splits, 4 * M * N)

    def add_parts(self, what, size):
        P = norm_parts(self.c["N"])
        self.launch("add_parts_kernel", what, 4 * P * size, 4 * size)


def norm_parts(N):
    return 1024 if N > 16384 else ceil(N, 16)


def faster(s, kernel):
    """Clocks of an attention kernel's tile, by those of the version for which EFFICIENCY stands"""
    return tile_clocks(s.version, kernel, s.c["HD"]) / tile_clocks(BASE, kernel, s.c["HD"])


def attention_done(c, products, rows, N, own_queries):
    """FLOPs of causal products as computed: a warp's rows by whole tiles of N, as far as one row needs the tile"""
    T, pairs = c["T"], 0
    for first in range(0, T, rows):
        block = first // 128 * 128      # where the tiles of queries that a block of 128 keys walks over begin
        tiles = ceil(min(first + rows, T), N) if own_queries else ceil(T - block, N) - (first - block) // N
        pairs += rows * tiles * N
    return products * pairs / T * 2 * c["N"] * c["NH"] * c["HD"]


# ---------------------------------------------------------------------------------------------------------------------
# The launches, in the order of train_moe.cu's section 8. c: dimension letters, N tokens in a micro-batch, R = N K,
# add: the share of micro-batches that add to a gradient instead of overwriting it.

def attention_layer_forward(s, c):
    N, H, QK, QKV, T = c["N"], c["H"], c["QK"], c["QKV"], c["T"]
    s.linear("qkv", N, QKV, H)
    s.launch("qk_norm_rope_kernel", "norm, rotation of q, k", 2 * N * QK, 2 * N * QK + 4 * N * c["norms"], kind="rows")
    product = N * T * c["NH"] * c["HD"]     # FLOPs of a causal product: 2 T/2 HD for each query and head
    tile = 64 if c["HD"] <= 96 else 48
    index = min(max(T.bit_length() - 11, 0), 2)
    c["flash"] = [1e12 * x[index] * EFFICIENCY["attention"][0] for x in FLASH2[64 if c["HD"] <= 64 else 128]]
    s.launch("attention_forward_mma_kernel", "attention", 2 * N * QKV, 2 * N * c["NH"] * c["HD"] + 4 * N * c["NH"],
             2 * product, attention_done(c, 2, 32, tile, True), 2 * product / c["flash"][0] * faster(s, "forward"))
    s.linear("attention's projection", N, H, c["NH"] * c["HD"])
    s.launch("combine_rmsnorm_kernel", "residual, FFN's norm", 2 * 2 * N * H, 2 * 2 * N * H + 4 * N, kind="rows")


def router_forward(s, c):
    N, H, E, K = c["N"], c["H"], c["E"], c["K"]
    s.matmul_fp32("logits", N, E, H, 2 * N * H + 4 * E * H, 4 * N * E)
    s.launch("softmax_router_kernel", "probabilities, top K", 4 * N * E, 4 * N * (E + 1 + 2 * K))


def group_by_expert(s, c):
    R, E, wait = c["R"], c["E"], EFFICIENCY["access"][0]
    chunks = ceil(R, 256)
    s.launch("group_count_kernel", "experts in each 256", 4 * R, 4 * R + 4 * chunks * E)
    s.launch("group_scan_chunks_kernel", "experts before each 256", 2 * 4 * chunks * E, 4 * chunks * E,
             seconds=wait * (4 + 2 * ceil(chunks, 32) / 4))         # the compiler has 4 loads under way (est)
    s.launch("group_tiles_kernel", "first rows, tiles", 4 * E, 8 * (R / 128 + E), seconds=8 * wait)
    s.launch("group_place_kernel", "a row for each", 8 * R, 12 * R)


def count_layer(s, c):
    N, E, K, wait = c["N"], c["E"], c["K"], EFFICIENCY["access"][0]
    s.launch("balance_slices_kernel", "sums of probabilities", 4 * N * (E + 1), 0, seconds=wait * (4 + N / 32 / 32 / 4))
    s.launch("balance_finish_kernel", "balance losses", 8 * 32 * (E + 1), 0, seconds=16 * wait)
    s.launch("observe_slices_kernel", "entropy, top gate", 4 * N * (E + 2 * K), 0,
             seconds=wait * (4 + 2 * ceil(N, 8 * 512)))     # 512 blocks of 8 warps, each with its tokens in turn
    s.launch("observe_finish_kernel", "their sums", 8 * 128, 0, seconds=8 * wait)


def ffn_layer_forward(s, c):
    N, H, I, E, R = c["N"], c["H"], c["I"], c["E"], c["R"]
    router_forward(s, c)
    group_by_expert(s, c)
    count_layer(s, c)
    s.experts("gate, up, SwiGLU", R, 2 * I, H, gathered(c, H) + 2 * E * 2 * I * H, 2 * R * 3 * I)
    s.experts("down", R, H, I, 2 * R * I + 2 * E * I * H, 2 * R * H)
    s.launch("combine_rmsnorm_kernel", "sum of K, residual, norm", 2 * (R + N) * H + 8 * R, 2 * 2 * N * H + 4 * N,
             kind="rows")


def gathered(c, width):
    """Bytes from memory of rows of tokens that K experts read at different times: once if they stay in L2"""
    return 2 * width * (c["N"] if 2 * c["N"] * width < 0.6 * L2 else c["R"])


def weight_reads(c, down, across, left, right):
    """Bytes read for dW: blocks of an expert go through its rows together, but only 132 at a time"""
    passes = max(1, ceil(down, 128) * ceil(across, 256) / 132)
    return left + right * (1 if right / c["E"] < 0.6 * L2 else passes)


def ffn_layer_backward(s, c):
    N, H, I, E, K, R, add = c["N"], c["H"], c["I"], c["E"], c["K"], c["R"], c["add"]
    parts = ceil(I, 128)
    s.experts("d down, d SwiGLU", R, I, H, gathered(c, H) + 2 * E * I * H + 2 * R * 2 * I + 8 * R,
              2 * R * 3 * I + 4 * R * parts, loads=1)
    s.experts("dW down", H, I, R, weight_reads(c, H, I, gathered(c, H), 2 * R * I) + add * 4 * E * H * I,
              4 * E * H * I, weights=True, loads=add)
    s.experts("dW gate, up", 2 * I, H, R,
              weight_reads(c, 2 * I, H, 2 * R * 2 * I, gathered(c, H)) + add * 8 * E * H * I, 8 * E * H * I,
              weights=True, loads=add)
    s.experts("d experts' input", R, H, 2 * I, 2 * R * 2 * I + 2 * E * 2 * I * H, 2 * R * H)
    s.launch("gate_gradients_kernel", "d gates", 4 * R * (parts + 1), 4 * R)
    s.launch("balance_weights_kernel", "f of the balance loss", 8 * E, 8 * E)
    s.launch("softmax_router_backward_kernel", "d logits", 4 * N * (E + 1 + 3 * K), 4 * N * E)
    s.matmul_fp32("d FFN's input by the router", N, H, E, 4 * N * E + 4 * E * H, 4 * N * H)
    s.matmul_fp32("dW router", E, H, N, 4 * N * E + 2 * N * H, 4 * E * H, splits_floats=1 << 21)
    s.launch("combine_rmsnorm_backward_kernel", "sum of K, FFN's norm", 2 * (R + 2 * N) * H + 4 * N * H + 4 * R,
             2 * N * H + 4 * norm_parts(N) * H, kind="rows")
    s.add_parts("dW FFN's norm", H)


def attention_layer_backward(s, c):
    N, H, QK, QKV, NH, HD, add = c["N"], c["H"], c["QK"], c["QKV"], c["NH"], c["HD"], c["add"]
    A, kv_rows = NH * HD, 32 if HD <= 64 else 16
    s.linear("d attention's projection", N, A, H)
    s.linear("dW attention's projection", H, A, N, 4, add)
    s.launch("attention_dot_kernel", "dout out", 2 * 2 * N * A, 4 * N * NH)
    product, rate = N * c["T"] * NH * HD, 0.9 * c["flash"][1]
    read = 2 * N * (QKV + A) + 8 * N * NH
    # scores and dp are computed in both kernels: 7 products, of which the formulas need 4 (and FlashAttention-2 5)
    s.launch("attention_backward_kv_mma_kernel", "dk, dv", read, 2 * N * 2 * c["NKV"] * HD, 3 * product,
             attention_done(c, 4, kv_rows, 32, False), 4 * product / rate * faster(s, "backward_kv"))
    s.launch("attention_backward_q_mma_kernel", "dq", read, 2 * N * A, product,
             attention_done(c, 3, 32, 32, True), 3 * product / rate * faster(s, "backward_q"))
    parts = 4 * norm_parts(N) * c["norm_sizes"]
    s.launch("qk_norm_rope_backward_kernel", "rotation, norm of q, k", 2 * N * QK * (1 if c["qk"] == "none" else 2),
             2 * N * QK + parts, kind="rows")
    if c["qk"] != "none":
        s.add_parts("dW q's norm", A if c["qk"] == "row" else HD)
        s.add_parts("dW k's norm", c["NKV"] * HD if c["qk"] == "row" else HD)
    s.linear("d qkv", N, H, QKV)
    s.linear("dW qkv", QKV, H, N, 4, add)
    s.launch("combine_rmsnorm_backward_kernel", "attention's norm", 2 * 3 * N * H, 2 * N * H + 4 * norm_parts(N) * H,
             kind="rows")
    s.add_parts("dW attention's norm", H)


def forward(s, c):
    N, H = c["N"], c["H"]
    s.launch("combine_rmsnorm_kernel", "embedding, first norm", 2 * N * H + 4 * N, 2 * 2 * N * H + 4 * N, kind="rows")
    with s.repeat(c["L"]):
        attention_layer_forward(s, c)
        ffn_layer_forward(s, c)
    s.linear("logits", N, c["V"], H)


def backward(s, c):
    N, H, V, add = c["N"], c["H"], c["V"], c["add"]
    s.launch("classifier_kernel", "loss, d logits in place", 2 * N * V, 2 * N * V, kind="rows")
    s.launch("add_losses_kernel", "mean loss", 4 * N, 8, seconds=EFFICIENCY["access"][0] * (4 + N / 1024 / 4))
    s.linear("d LM head", N, H, V)
    s.linear("dW LM head", V, H, N, 4, add)
    s.launch("combine_rmsnorm_backward_kernel", "last norm", 2 * 2 * N * H, 2 * N * H + 4 * norm_parts(N) * H,
             kind="rows")
    s.add_parts("dW last norm", H)
    with s.repeat(c["L"]):
        ffn_layer_backward(s, c)
        attention_layer_backward(s, c)
    if not c["tie"]:
        s.launch("(memset)", "d embedding = 0", 0, 4 * V * H * (1 - add))
    unique, most = min(N, V) / 4, N / 20        # different tokens of a text, and the commonest one's share (est)
    s.launch("embedding_backward_kernel", "d embedding", 2 * N * H + 4 * unique * H, 4 * unique * H,
             seconds=EFFICIENCY["access"][0] * most / 8 / 4)        # 8 warps, 4 loads under way


def update(s, c):
    total = c["total"]
    s.launch("square_sums_kernel", "norm of the gradient", 4 * total, 0)
    s.launch("root_of_sum_kernel", "its root", 8 * 1024, 4, seconds=8 * EFFICIENCY["access"][0])
    s.launch("adamw_kernel", "matrices", 16 * c["matrices"], 14 * c["matrices"])
    s.launch("adamw_kernel", "vectors", 16 * (total - c["matrices"]), 14 * (total - c["matrices"]))


def train_step(config, card, batch, version=NOW):
    c = complete(config, batch)
    s = Step(c, card, version)
    with s.repeat(c["accum"]):
        forward(s, c)
        backward(s, c)
    update(s, c)
    return c, s


def complete(config, batch):
    """The dimensions that follow from the others, for micro-batches of `batch` sequences"""
    c = dict(config)
    c["N"] = batch * c["T"]
    c["accum"] = c["tokens"] // c["N"]
    c["add"] = (c["accum"] - 1) / c["accum"]
    c["R"] = c["N"] * c["K"]
    c["QK"], c["QKV"] = (c["NH"] + c["NKV"]) * c["HD"], (c["NH"] + 2 * c["NKV"]) * c["HD"]
    c["norms"] = {"none": 0, "row": 2, "head": c["NH"] + c["NKV"]}[c["qk"]]
    c["norm_sizes"] = {"none": 0, "row": c["QK"], "head": 2 * c["HD"]}[c["qk"]]
    expert, dense = 3 * c["H"] * c["I"], (c["QKV"] + c["NH"] * c["HD"]) * c["H"] + c["E"] * c["H"]
    c["matrices"] = c["L"] * (c["E"] * expert + dense) + (1 if c["tie"] else 2) * c["V"] * c["H"]
    c["total"] = c["matrices"] + c["L"] * (2 * c["H"] + c["norm_sizes"]) + c["H"]
    c["active"] = c["L"] * (c["K"] * expert + dense) + c["V"] * c["H"]
    return c


def memory(c):
    """Bytes that gpu_take hands out for training in bf16, but for a few MB"""
    N, H, R, I, E = c["N"], c["H"], c["R"], c["I"], c["E"]
    A, P = c["NH"] * c["HD"], norm_parts(N)
    layer = (2 * N * (4 * H + c["QKV"] + c["QK"] + A) + 2 * R * 2 * I + 4 * N * (2 + 2 * c["NH"] + c["NKV"])
             + 4 * N * (2 * E + 1) + 20 * R)
    whole = 2 * N * (2 * H + c["V"]) + 2 * R * (I + H) + 2 * N * H + (8 << 20) + (32 << 20)
    gradients = 2 * N * (2 * H + A + c["QKV"] + c["QK"]) + 4 * R * ceil(I, 128) + 4 * N * (E + H + c["NH"]) + 8 * P * H
    return 18 * c["total"] + c["L"] * layer + whole + gradients


def largest_batch(config, card):
    """The most sequences in a micro-batch that fit on the card and divide the step, 0 if none do"""
    sequences = config["tokens"] // config["T"]
    return next((b for b in range(sequences, 0, -1)
                 if sequences % b == 0 and memory(complete(config, b)) <= card["memory"]), 0)


def flops(c):
    """What the formulas need: 6 for each active parameter, and causal attention"""
    return c["tokens"] * 6 * (c["active"] + c["L"] * c["NH"] * c["HD"] * c["T"])


def floor(c, card):
    return flops(c) / card["tensor"] + 30 * c["total"] / card["hbm"]


# ---------------------------------------------------------------------------------------------------------------------
# Registers and occupancy, from the compiler

# Shared memory of an SM; a block takes 1 KB more than it asks for. Registers (65536) come by 256 for each warp. At most
# 64 warps and 32 blocks. (NVIDIA's CUDA C++ Programming Guide, technical specifications by compute capability)
ARCHES = {"sm_80": 164 << 10, "sm_90a": 228 << 10}


def occupancy(arch, registers, threads, shared):
    """Blocks on an SM, and what keeps them from being more"""
    warps = ceil(threads, 32)
    limits = {"registers": 65536 // 256 // (ceil(registers * 32, 256) * warps),
              "shared": ARCHES[arch] // (shared + 1024), "warps": 64 // warps, "blocks": 32}
    blocks = min(limits.values())
    return blocks, ", ".join(k for k, v in limits.items() if v == blocks)


def launched_with(name, arguments):
    """Threads of a block and bytes of dynamic shared memory, with the sizes of OLMoE-1B-7B where they matter"""
    c, n = complete(CONFIGS["OLMoE-1B-7B"], 1), [int(x) for x in arguments if x.isdigit()]
    if name == "experts_bf16_kernel":
        columns, stages = n[1], 2 if "false" in arguments else 3 if n[1] == 128 else 4
        return 256, max(stages * (128 + columns) * 64 * 2, 128 * (columns + 8) * 4)
    if "_mma_" in name:
        D, M, N = n
        tiles, extra = ((128 + 2 * N), 0) if "forward" in name else (256 + 4 * N, 1024 if "_q_" in name else 16 * N)
        return 256 // M, tiles * D * 2 + extra
    shared = {"combine_rmsnorm_kernel": 2 * c["H"], "combine_rmsnorm_backward_kernel": 8 * c["H"],
              "qk_norm_rope_backward_kernel": 4 * c["QK"]}.get(name, 0)
    return 1024 if name in ("classifier_kernel", "balance_slices_kernel", "column_slices_kernel") else 256, shared


def compiler_log(arch, nvcc, cublas):
    command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-cubin", "-o", "/dev/null", f"-I{ROOT}",
               str(SOURCES[0])]
    done = subprocess.run(command + ([f"-I{cublas}/include"] if cublas else []), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


def read_log(text):
    """(name, template arguments, registers, static shared memory, spilled bytes) of each kernel"""
    parts = text.split("Compiling entry function '")[1:]
    mangled = "\n".join(p[:p.index("'")] for p in parts)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout
    for name, part in zip(names.splitlines(), parts):
        base, arguments = re.match(r"(?:void )?(\w+)(?:<(.*?)>)?\(", name).groups()
        arguments = (arguments or "").replace("__nv_bfloat16", "bf16").strip().split(", ")
        shared = re.search(r"(\d+) bytes smem", part)
        yield (base, arguments, int(re.search(r"Used (\d+) registers", part)[1]), int(shared[1]) if shared else 0,
               sum(map(int, re.findall(r"(\d+) bytes spill", part))))


def readable(base, arguments):
    if base.startswith("experts"):
        arguments = [("X_WT", "DY_W", "DYT_X")[int(arguments[0])]] + [
            {"true": "wgmma", "false": "mma.sync"}.get(a, a) for a in arguments[1:]]
    return base.replace("_kernel", "") + ("<" + ", ".join(arguments) + ">" if arguments[0] else "")


# what is worth a row, in this order; the kernels' other versions are for fp32 or rows that are not aligned
SHOWN = ["experts_bf16.*wgmma, 256", "experts_bf16", r"attention_\w+_mma<64", r"attention_\w+_mma<128",
         "attention_dot<bf16", "matmul_fp32<.*bf16", "matmul_fp32<64, 64, float, float", "classifier<bf16",
         "combine_rmsnorm<bf16, 8", "combine_rmsnorm_backward<bf16, 8", "qk_norm_rope<bf16, 8",
         "qk_norm_rope_backward<bf16, 8", "adamw<bf16, 8", "square_sums<4", "embedding_backward<bf16, 8",
         "softmax_router$", "observe_slices", "balance_slices"]


def print_compiler(logs):
    print("""
## Registers, shared memory, occupancy (from the compiler)

Kernels of a training step in bf16, with rows aligned to 16 bytes. KB: shared memory, static and dynamic, with the sizes
of OLMoE-1B-7B. Occupancy: blocks x warps of a block on an SM, and what limits it.
""")
    print("| kernel | threads | KB |" + "".join(f" {a} registers | spilled | occupancy |" for a in logs))
    print("|---|---|---|" + "---|---|---|" * len(logs))
    figures, others = collections.defaultdict(dict), []
    for arch, text in logs.items():
        for base, arguments, registers, static, spilled in read_log(text):
            if arch == "sm_80" and "true" in arguments:
                continue                    # wgmma's kernels stand empty there and never run
            name = readable(base, arguments)
            place = next((i for i, pattern in enumerate(SHOWN) if re.match(pattern, name)), None)
            if place is None:
                others.append((registers, f"{name} ({arch})", spilled))
                continue
            threads, dynamic = launched_with(base, arguments)
            blocks, limit = occupancy(arch, registers, threads, static + dynamic)
            figures[place, name]["shape"] = f"{threads} | {(static + dynamic) / 1024:.1f}"
            figures[place, name][arch] = f"{registers} | {spilled} | {blocks} x {threads // 32}: {limit}"
    rows = collections.defaultdict(list)    # kernels with the same figures share a row
    for (place, name), f in sorted(figures.items()):
        rows[place, f["shape"] + " | " + " | ".join(f.get(a, "- | - | -") for a in logs)].append(f"`{name}`")
    for (_, cells), names in rows.items():
        print(f"| {', '.join(names)} | {cells} |")
    print(f"\nAll other kernels (small ones, fp32, unaligned rows, other head sizes and routers) use at most "
          f"{max(o[0] for o in others)} registers; spills: {', '.join(o[1] for o in others if o[2]) or 'none'}.")


# ---------------------------------------------------------------------------------------------------------------------
# Loops of attention, from the machine code

def functions(path):
    """(name, instructions, where labels stand) of each function that nvdisasm -c printed"""
    parts = re.split(r"^\s*\.section\s+\.text\.([^\s,]+),.*$", Path(path).read_text(), flags=re.M)
    for name, body in zip(parts[1::2], parts[2::2]):
        code, labels = [], {}
        for label, instruction in re.findall(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?);)", body, re.M):
            if label:
                labels[label] = len(code)
            else:
                code.append(instruction)
        yield name, code, labels


def tile_counts(name, code, labels):
    """(instructions, mma.sync, ldmatrix, copies) of a warp for a tile: what stands in the loop over tiles, times how
    often its inner loops go round. Copies without cp.async do not count, the mask of the diagonal does."""
    D, M, N = (int(x) for x in re.findall(r"Li(\d+)E", name)[:3])
    jumps = [(labels[m[1]], i) for i, text in enumerate(code) for m in [re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)] if m]
    loops = [(a, z) for a, z in jumps if a <= z]

    def holds(loop, what):
        return sum(what in text for text in code[loop[0]:loop[1] + 1])

    whole = min((x for x in loops if holds(x, "BAR.SYNC") and holds(x, "HMMA")), key=lambda x: x[1] - x[0])
    often = [1.0] * len(code)
    for loop in loops:
        if whole[0] < loop[0] and loop[1] < whole[1]:
            rounds = 0
            if holds(loop, "HMMA"):
                rounds = D / 16 * (M * N / 8) / holds(loop, "HMMA")
            elif holds(loop, "LDGSTS"):
                rounds = ceil(N, 256 // M // (D // 8)) / holds(loop, "LDGSTS")
            for i in range(loop[0], loop[1] + 1):
                often[i] *= rounds
    return [round(sum(often[i] for i in range(whole[0], whole[1] + 1) if what in code[i]))
            for what in ("", "HMMA", "LDSM", "LDGSTS")]


def print_loops(path):
    print("| kernel | instructions | mma.sync | ldmatrix | cp.async |\n|---|---|---|---|---|")
    for name, code, labels in functions(path):
        kernel = re.match(r"_Z\d+(attention_\w+_mma)_kernelI(\w+)EEv", name)
        if kernel:
            arguments = ", ".join(re.findall(r"Li(\d+)E?", kernel[2]))
            print(f"| `{kernel[1]}<{arguments}>` | {' | '.join(map(str, tile_counts(name, code, labels)))} |")


# ---------------------------------------------------------------------------------------------------------------------
# Tables

CLASSES = {"cuBLAS": ("cublas",), "experts' products": ("experts_bf16",), "attention": ("attention_f", "attention_b"),
           "router's products": ("matmul_fp32",), "classifier": ("classifier",),
           "norms, residuals, rotation": ("combine", "qk_norm", "attention_dot"), "update": ("adamw", "square", "root"),
           "counting, grouping, adding parts": ("",)}


def number(x):
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.001 else "0"


def total(s, key, starts=("",)):
    return sum(r["times"] * (r[key] if key else 1) for r in s.rows if r["kernel"].startswith(starts))


def print_step(name, card_name, c, s):
    print(f"""
### {name} on an {card_name}: {c['accum']} x {c['N']} tokens

GFLOP and MB of one launch, ms of all. In vain: tiles that stick out, products made again. Lost: (est) less roof.

| kernel | what | launches | GFLOP | in vain | MB read | MB written | roof ms | limit | (est) ms | lost |
|---|---|---|---|---|---|---|---|---|---|---|""")
    for r in s.rows:
        vain = f"{100 - 100 * r['flops'] / r['done']:.0f} %" if r["done"] else ""
        roof, predicted = (1e3 * r["times"] * r[k] for k in ("roof", "predicted"))
        print(f"| `{r['kernel'].replace('_kernel', '')}` | {r['what']} | {r['times']} | {number(r['done'] / 1e9)} "
              f"| {vain} | {number(r['read'] / MB)} | {number(r['write'] / MB)} | {number(roof)} | {r['limit']} "
              f"| {number(predicted)} | {number(predicted - roof)} |")
    print("\n| class | launches | roof ms | (est) ms | lost | (est) share of the step |\n|---|---|---|---|---|---|")
    left, part, time = s.rows, Step(c, s.card), total(s, "predicted")
    for k, starts in CLASSES.items():
        part.rows = [r for r in left if r["kernel"].startswith(starts)]
        left = [r for r in left if not r["kernel"].startswith(starts)]
        roof, predicted = total(part, "roof"), total(part, "predicted")
        print(f"| {k} | {total(part, '')} | {roof * 1e3:.1f} | {predicted * 1e3:.1f} | {(predicted - roof) * 1e3:.1f} "
              f"| {100 * predicted / time:.0f} % |")


def print_versions(cards):
    print("""
## Versions of the kernels

The same formulas with the counts of each version. All is (est).

| model | card | version | experts' products ms | attention ms | step ms | share of the floor | TFLOP/s |
|---|---|---|---|---|---|---|---|""")
    for name, config in CONFIGS.items():
        for card_name in cards:
            card, batch = CARDS[card_name], largest_batch(config, CARDS[card_name])
            for version in VERSIONS if batch else ():
                c, s = train_step(config, card, batch, version)
                time = total(s, "predicted")
                parts = (f"{1e3 * total(s, 'predicted', CLASSES[k]):.1f}" for k in ("experts' products", "attention"))
                print(f"| {name} | {card_name} | {version} | {' | '.join(parts)} | {1e3 * time:.1f} | "
                      f"{100 * floor(c, card) / time:.0f} % | {flops(c) / time / 1e12:.0f} |")


def print_figures(cards, logs):
    print("""# Figures of train_moe.cu

Written by `dev/cuda/count.py`; nothing here was measured on a GPU. Counts are (calc); a launch is "at its roof" if it
takes max(FLOPs / peak, bytes / bandwidth); (est) marks estimates, to be replaced by measurements.

## A training step

Floor: 6 N_active + 6 L NH HD T FLOPs a token, and AdamW's 30 bytes a parameter. Roof: all launches at their roofs, one
after the other. Shares: floor / time. Micro-batches are the largest that fit.

| model | card | micro-batches x tokens | GB | launches, of them cuBLAS | floor ms | roof ms | share | (est) ms \
| (est) share | (est) tokens/s | (est) TFLOP/s |
|---|---|---|---|---|---|---|---|---|---|---|---|""")
    steps = []
    for name, config in CONFIGS.items():
        for card_name, card in CARDS.items():
            batch = largest_batch(config, card)
            if not batch:
                least = memory(complete(config, 1)) / 1e9
                print(f"| {name} | {card_name} | one sequence needs {least:.0f} GB |" + " |" * 9)
                continue
            c, s = train_step(config, card, batch)
            least, roof, time = floor(c, card), total(s, "roof"), total(s, "predicted")
            print(f"| {name} | {card_name} | {c['accum']} x {c['N']} | {memory(c) / 1e9:.1f} | {total(s, '')}, "
                  f"{total(s, '', ('cublas',))} | {least * 1e3:.1f} | {roof * 1e3:.1f} | {100 * least / roof:.0f} % | "
                  f"{time * 1e3:.1f} | {100 * least / time:.0f} % | {c['tokens'] / time / 1e3:.0f}k | "
                  f"{flops(c) / time / 1e12:.0f} |")
            if card_name in cards:
                steps.append((name, card_name, c, s))
    if len(VERSIONS) > 1:
        print_versions(cards)
    print("""
Not counted: the host. After a step it waits for the gradient's norm, and then the GPU for the next batch to be read,
sorted by token and sent.

Assumed (est):
""")
    for k, (value, why) in EFFICIENCY.items():
        print(f"- {k}: {value:g} {why}" if value > 1e-3 else f"- {k}: {value * 1e6:g} microseconds for {why}")
    for name, card in CARDS.items():
        print(f"- {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in card.items()))
    print("- grouped products: tokens are spread evenly; every expert has half a tile of 128 rows too many; a\n"
          "  gathered operand larger than 30 MB is read by each expert anew; an expert's weights stay in the L2 cache")
    for step in steps:
        print_step(*step)
    print_compiler(logs)


# ---------------------------------------------------------------------------------------------------------------------
# Check against the stand-in

def kernels_of_variables():
    """Names of variables that hold a kernel when it is launched, with the kernels that they may hold"""
    found = collections.defaultdict(set)
    for name, value in re.findall(r"auto (\w+) = (.*?);", "".join(s.read_text() for s in SOURCES), re.S):
        found[name].update(re.findall(r"\b\w+_kernel\b(?=<)", value)[:1])
    return found


def check(path, c):
    """Compares with a log of one step: "N launches of NAME" (or a line "launch NAME ... grid" for each), and the
    program's own counts of parameters and memory; the sum of the list's FLOPs with the formula of the floor."""
    text, names, seen = Path(path).read_text(), kernels_of_variables(), collections.Counter()
    for n, name in re.findall(r"^standin: +(\d+) launches of (\w+)", text, re.M):
        seen[name] += int(n)
    seen.update(re.findall(r"launch (?:of )?(\w+).* grid", text, re.M))
    step = train_step(c, CARDS["H200"], c["tokens"] // c["T"] // c["accum"])
    expected = collections.Counter(convert_kernel=1)        # before the first step: the weights' bf16 copy
    for r in step[1].rows:
        expected[r["kernel"]] += r["times"] if r["kernel"] != "(memset)" else 0
    if "cublas" not in seen:
        del expected["cublas"]
    wrong = 0
    for name in sorted(set(seen)):
        kernels = names.get(name, {name}) & set(expected) or {name}
        wanted = sum(expected[k] for k in kernels)
        wrong += seen[name] != wanted
        print(f"{'ok' if seen[name] == wanted else 'WRONG'}: {name}: {seen[name]} launches, {wanted} expected")
        names[name] = kernels
    for kernel in set(expected) - set().union(*(names[n] for n in seen)) - {"(memset)"}:
        wrong += 1
        print(f"WRONG: {kernel}: no launches, {expected[kernel]} expected")
    numbers = [("parameters: ", step[0]["total"], 0), ("memory: ", memory(step[0]) / 1e6, 0.02)]
    numbers = [(what, float(x), wanted, off) for what, wanted, off in numbers
               for x in re.findall(rf"^{what}([\d.]+)", text, re.M)]
    for what, x, wanted, off in numbers + [("FLOPs of the list: ", total(step[1], "flops"), flops(step[0]), 1e-9)]:
        good = abs(x - wanted) <= off * wanted
        wrong += not good
        print(f"{'ok' if good else 'WRONG'}: {what}{x:.10g}, {wanted:.10g} expected")
    print(f"{wrong} wrong" if seen else "no launches in this log")
    return wrong > 0 or not seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--cublas", help="directory with include/, where the toolkit has no cuBLAS")
    parser.add_argument("--log", action="append", default=[], metavar="ARCH=FILE", help="instead of running nvcc")
    parser.add_argument("--sass", metavar="FILE", help="counts loops in what nvdisasm -c printed")
    parser.add_argument("--card", action="append", choices=CARDS, help="cards with a table of all launches (H200)")
    parser.add_argument("--check", metavar="FILE", help="with the shape and batch that follow, as for train_moe_cu")
    small = dict(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, experts=4, topk=2, expert_ffn=128, vocab=256,
                 batch=2, seq=32, accum=1, tie=0)
    for name, value in small.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--qk-norm", default="head", choices=("none", "head", "row"))
    o = parser.parse_args()
    if o.sass:
        return print_loops(o.sass)
    if o.check:
        c = dict(L=o.layers, H=o.hidden, NH=o.heads, NKV=o.kv_heads, HD=o.head_dim, I=o.expert_ffn, E=o.experts,
                 K=o.topk, V=o.vocab, T=o.seq, tie=o.tie, qk=o.qk_norm, tokens=o.batch * o.seq * o.accum, accum=o.accum)
        sys.exit(check(o.check, c))
    logs = dict((a, Path(f).read_text()) for a, f in (x.split("=", 1) for x in o.log))
    print_figures(o.card or ["H200"], logs or {a: compiler_log(a, o.nvcc, o.cublas) for a in ARCHES})


if __name__ == "__main__":
    main()
