"""Starts the tensor-core kernels of train_moe.cu in the interpreter and compares with the formulas in doubles. Template
arguments are read from the kernels' names; everything else that the functions launch_experts and attention_..._launch
pass is repeated here.
"""
import re
import struct

import numpy as np

import tensor_cores     # enters its instructions into RUN
from block import Block, bf16_to_float, float_to_bf16
from memory import Global

GROUP_ROWS, BK, ATT_BLOCK = 128, 64, 128        # as in train_moe.cu and dev/lib/cuda
MULTIPROCESSORS = 2                             # of the device that is played: persistent blocks make every second tile
X_WT, DY_W, DYT_X = range(3)
TOLERANCE = {"experts": 4e-3, "attention": 8e-3}        # relative error of results in bf16


def ceil_div(a, b):
    return -(-a // b)


def values(bits):
    return bf16_to_float(bits).astype(np.float64)


def relative_error(a, b):
    error = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return error if np.isfinite(error) else np.inf


def launch(module, kernel, memory, arguments, grid, threads, dynamic, blocks=None):
    """arguments: packed bytes, one for each parameter; blocks: only these (x, y, z)."""
    parameters = np.zeros(kernel.parameter_bytes + 16, np.uint8)
    for (offset, size), argument in zip(kernel.parameters.values(), arguments, strict=True):
        assert size == len(argument), f"{kernel.name}: an argument of {len(argument)} bytes where {size} are wanted"
        parameters[offset:offset + size] = np.frombuffer(argument, np.uint8)
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                if blocks is None or (x, y, z) in blocks:
                    Block(module, kernel, memory, parameters, grid, threads, (x, y, z), dynamic).run()


def pack(*numbers):
    """Pointers and longs are given as ("q", n)."""
    return [struct.pack("<q", n[1]) if isinstance(n, tuple) else struct.pack("<i", n) for n in numbers]


def q(n):
    return ("q", n)


def tensor_core_kernels(module):
    return [name for name in module.entries if re.search(r"mma\.sync|wgmma\.mma_async", module.cut(name)[2])]


def template(name):
    """(kernel, its integer and bool template arguments, the rest of the name)"""
    m = re.match(r"_Z\d+(\w+?_kernel)I((?:L[ib]\d+E)+)(.*)", name)
    return m[1], [int(x) for x in re.findall(r"L[ib](\d+)E", m[2])], m[3]


class Experts:
    """Rows grouped by expert, as gpu_group_by_expert leaves them, and the operands of all five products."""

    def __init__(self, rows_of, N, H, I, seed=1):
        r = self.random = np.random.default_rng(seed)
        self.N, self.H, self.I, self.E, self.R = N, H, I, len(rows_of), sum(rows_of)
        self.offsets = np.concatenate([[0], np.cumsum(rows_of)]).astype(np.int32)
        self.token = r.integers(0, N, self.R).astype(np.int32)
        tiles = [(e, row) for e in range(self.E) for row in range(self.offsets[e], self.offsets[e + 1], GROUP_ROWS)]
        self.max_tiles = self.R // GROUP_ROWS + self.E
        self.tiles = np.array(tiles + [(-1, 0)] * (self.max_tiles - len(tiles)), np.int32)
        self.x, self.dy = self.bf16(N, H), self.bf16(N, H)
        self.gate_up, self.act = self.bf16(self.R, 2, I), self.bf16(self.R, I)
        self.up, self.down = self.bf16(self.E, 2, I, H, scale=0.1), self.bf16(self.E, H, I, scale=0.1)

    def bf16(self, *shape, scale=1.0):
        return float_to_bf16((self.random.standard_normal(shape) * scale).astype(np.float32))

    def products(self, left, W):
        """left (R, width), W (E, width, columns): each row times its expert's matrix"""
        rows = zip(self.offsets, self.offsets[1:])
        return np.concatenate([left[a:b] @ w for (a, b), w in zip(rows, W)])


def silu(x):
    return x / (1 + np.exp(-x))


def run_experts(module, name, c, change=None):
    """Runs an instance of experts_bf16_kernel on the case c; returns its relative error."""
    _, (product, wgmma, BN), rest = template(name)
    epilogue = re.match(r"\d+([A-Za-z]+?)Epilogue", rest)[1]
    kernel, memory, H, I, R, E = module.kernel(name, change), Global(), c.H, c.I, c.R, c.E
    stages = 2 if not wgmma else 3 if BN == 128 else 4                                  # Bf16Shape
    dynamic = max(stages * (128 + BN) * BK * 2, 128 * (BN + 8) * 4)

    def operand(array, width, token=0):
        return struct.pack("<QiiQii", memory.put(array), width, 0, token, width % 8 == 0, 0)

    def fours(width):
        return int(width % 4 == 0)

    offsets, tiles, token = memory.put(c.offsets), memory.put(c.tiles), memory.put(c.token)
    pairs = epilogue == "Swiglu"
    if pairs:                                                                           # gpu_experts_up
        left, right, columns, width = operand(c.x, H, token), operand(c.up, H), I, H
        sums = c.products(values(c.x)[c.token], values(c.up).reshape(E, 2 * I, H).swapaxes(1, 2)).reshape(R, 2, I)
        wants = [sums, silu(sums[:, 0]) * sums[:, 1]]
        out = [memory.take(R * 2 * I * 2), memory.take(R * I * 2)]
        end = struct.pack("<QQii", *out, I, fours(I))
    elif (product, epilogue) == (X_WT, "Store"):                                        # gpu_experts_down
        left, right, columns, width = operand(c.act, I), operand(c.down, I), H, I
        wants = [c.products(values(c.act), values(c.down).swapaxes(1, 2))]
        out = [memory.take(R * H * 2)]
        end = struct.pack("<Qii", *out, H, fours(H))
    elif epilogue == "SwigluBackward":                                                  # gpu_experts_down_backward
        left, right, columns, width = operand(c.dy, H, token), operand(c.down, I), I, H
        gates, assignment = c.random.random(R).astype(np.float32), c.random.permutation(R).astype(np.int32)
        d = c.products(values(c.dy)[c.token], values(c.down))
        g, u, gate = values(c.gate_up)[:, 0], values(c.gate_up)[:, 1], gates[assignment][:, None].astype(np.float64)
        s = 1 / (1 + np.exp(-g))
        parts = np.add.reduceat(d * g * s * u, np.arange(0, I, 128), axis=1)
        wants = [np.stack([gate * d * u * s * (1 + g * (1 - s)), gate * d * g * s], 1), gate * g * s * u, parts]
        out = [memory.put(c.gate_up), memory.take(R * I * 2), memory.take(R * ceil_div(I, 128) * 4)]
        end = struct.pack("<QQQQQii", *out, memory.put(gates), memory.put(assignment), I, fours(I))
    elif product == DY_W:                                                               # gpu_experts_input_backward
        left, right, columns, width = operand(c.gate_up, 2 * I), operand(c.up, H), H, 2 * I
        wants = [c.products(values(c.gate_up).reshape(R, 2 * I), values(c.up).reshape(E, 2 * I, H))]
        out = [memory.take(R * H * 2)]
        end = struct.pack("<Qii", *out, H, fours(H))
    else:                                                                               # gpu_experts_weight_backward
        left, right, columns, width = operand(c.dy, H, token), operand(c.act, I), I, H
        before = c.random.standard_normal((E, H, I)).astype(np.float32)
        rows = [slice(*c.offsets[e:e + 2]) for e in range(E)]
        wants = [before + np.stack([values(c.dy)[c.token[r]].T @ values(c.act)[r] for r in rows])]
        out = [memory.put(before)]
        end = struct.pack("<Qiiii", *out, H, I, 1, fours(I))
    down = ceil_div(width, 128) if product == DYT_X else c.max_tiles                    # launch_experts_bf16
    across = ceil_div(columns, BN // 2 if pairs else BN)
    jobs = down * across * (E if product == DYT_X else 1)
    launch(module, kernel, memory,
           [left, right,
            *pack(q((2 if pairs else 1) * columns * width), q(offsets), q(tiles), down, across, jobs, columns), end],
           (min(jobs, MULTIPROCESSORS) if wgmma and BN == 256 else jobs, 1, 1), (256, 1, 1), dynamic)
    floats = [product == DYT_X or i == 2 for i in range(len(wants))]
    got = [memory.get(a, np.float32, w.shape).astype(np.float64) if is_float
           else values(memory.get(a, np.uint16, w.shape)) for a, w, is_float in zip(out, wants, floats)]
    return max(map(relative_error, got, wants))


class Attention:
    """B sequences of T positions of which the last Tq are asked, NH query heads and NKV others of size HD, and all
    results: out and lse, with Tq = T also dots, dq, dk and dv."""

    def __init__(self, B, T, NH, NKV, HD, Tq=None, seed=2):
        random = np.random.default_rng(seed)

        def bf16(*shape):
            return float_to_bf16(random.standard_normal(shape).astype(np.float32))

        self.B, self.T, self.NH, self.NKV, self.HD, self.Tq = B, T, NH, NKV, HD, Tq or T
        self.rotated, self.qkv = bf16(B, T, (NH + NKV) * HD), bf16(B, T, (NH + 2 * NKV) * HD)
        self.dout = bf16(B, self.Tq, NH, HD)
        self.asked = self.rotated[:, T - self.Tq:].copy()       # q begins at the front of these rows
        query = values(self.asked)[:, :, :NH * HD].reshape(B, self.Tq, NH, HD)
        key = values(self.rotated)[:, :, NH * HD:].reshape(B, T, NKV, HD)
        value = values(self.qkv)[:, :, (NH + NKV) * HD:].reshape(B, T, NKV, HD)
        k, v = (np.repeat(x, NH // NKV, 2) for x in (key, value))
        s = np.einsum("bihd,bjhd->bhij", query, k) / np.sqrt(HD)
        s[:, :, np.arange(T)[None, :] > np.arange(self.Tq)[:, None] + T - self.Tq] = -np.inf
        largest = s.max(-1, keepdims=True)
        p = np.exp(s - largest)
        total = p.sum(-1, keepdims=True)
        p /= total
        self.lse = (largest + np.log(total))[..., 0]
        self.out = np.einsum("bhij,bjhd->bihd", p, v)
        dout = values(self.dout)
        dp = np.einsum("bihd,bjhd->bhij", dout, v)
        self.dots = (p * dp).sum(-1)
        ds = p * (dp - self.dots[..., None]) / np.sqrt(HD)
        self.dq = np.einsum("bhij,bjhd->bihd", ds, k)
        heads = (B, T, NKV, NH // NKV, HD)
        self.dk = np.einsum("bhij,bihd->bjhd", ds, query).reshape(heads).sum(3)
        self.dv = np.einsum("bhij,bihd->bjhd", p, dout).reshape(heads).sum(3)


def run_attention(module, name, c, change=None):
    """Runs one of the three attention kernels on the case c; returns its relative error."""
    what, (D, M, N), _ = template(name)
    kernel, memory, B, T, NH, NKV, HD = module.kernel(name, change), Global(), c.B, c.T, c.NH, c.NKV, c.HD
    rows, row, qkv_row = memory.put(c.rotated), (NH + NKV) * HD, (NH + 2 * NKV) * HD
    asked = rows if c.Tq == T else memory.put(c.asked)
    operands = [q(asked), q(row), q(rows + NH * HD * 2), q(row),
                q(memory.put(c.qkv) + (NH + NKV) * HD * 2), q(qkv_row)]
    threads, blocks = (kernel.threads, 1, 1), ceil_div(c.Tq, ATT_BLOCK)
    if "forward" in what:
        out = [memory.take(c.out.size * 2), memory.take(c.lse.size * 4)]
        launch(module, kernel, memory, pack(*map(q, out), *operands, c.Tq, T, NH, NKV, HD), (NH, blocks, B), threads,
               (ATT_BLOCK + 2 * N) * D * 2)
        return max(relative_error(values(memory.get(out[0], np.uint16, c.out.shape)), c.out),
                   relative_error(memory.get(out[1], np.float32, c.lse.shape).astype(np.float64), c.lse))
    given = [q(memory.put(x)) for x in (c.dout, c.lse.astype(np.float32), c.dots.astype(np.float32))]
    if "_kv_" in what:
        wants, lines, grid, dynamic = [c.dk, c.dv], [q(NKV * HD)] * 2, NKV, (2 * ATT_BLOCK + 4 * N) * D * 2 + 16 * N
    else:
        wants, lines, grid, dynamic = [c.dq], [q(NH * HD)], NH, (2 * ATT_BLOCK + 4 * N) * D * 2 + 8 * ATT_BLOCK
    out = [memory.take(x.size * 2) for x in wants]
    launch(module, kernel, memory, pack(*map(q, out), *given, *operands, *lines, T, NH, NKV, HD), (grid, blocks, B),
           threads, dynamic)
    return max(relative_error(values(memory.get(a, np.uint16, w.shape)), w) for a, w in zip(out, wants))
