"""Asynchronous copies, matrix instructions and what orders them. Section numbers are those of the PTX ISA 9.0.

Layouts are written here as the ISA states them, in numbers of lanes and registers or in units of 16 bytes, and not as
dev/cuda/standin has them: two derivations that agree.
"""
import functools
import re

import numpy as np

from block import bf16_to_float, executes
from memory import Fault, Shared

LANE = np.arange(32)
GROUP, IN_GROUP = LANE >> 2, LANE % 4       # groupID and threadID_in_group of 9.7.14.5.8


# -- cp.async (9.7.9.25.3.1 to .3): performed as late as its waits allow

@executes("cp")
def copy(block, ins, at, threads):
    if ins.parts[2] == "commit_group":      # all of this thread's copies that are in no group yet form one, maybe empty
        block.group[threads] += 1
    elif ins.parts[2] == "wait_group":      # until at most n of this thread's latest groups are pending
        wait(block, threads, ins.operands[0][1])
    else:
        if ins.name != "cp.async.cg.shared.global" or ins.operands[2][1] != 16:
            raise NotImplementedError(ins.text)
        to, source = (block.address(x, threads, at) for x in ins.operands[:2])
        size = block.value(ins.operands[3], "u32", at) if len(ins.operands) > 3 else np.array([16])
        size = np.broadcast_to(size, threads.shape)
        block.shared.write(to, 16, threads, copy=True)
        for group in np.unique(block.group[threads]):
            mine = block.group[threads] == group
            block.copies.setdefault(int(group), []).append((threads[mine], to[mine], source[mine], size[mine]))


def wait(block, threads, pending):
    for group in sorted(block.copies):
        rest = []
        for copies in block.copies[group]:
            ready = np.isin(copies[0], threads) & (group < block.group[copies[0]] - pending)
            if ready.any():
                perform(block, *(x[ready] for x in copies))
            if not ready.all():
                rest.append(tuple(x[~ready] for x in copies))
        block.copies[group] = rest


def perform(block, threads, to, source, size):
    """Of 16 bytes the first src-size are copied, the others are zero; with src-size 0 nothing is read."""
    data = np.zeros((threads.size, 16), np.uint8)
    for n in np.unique(size[size > 0]):
        mine = size == n
        at = block.memory.offsets(source[mine], int(n), 16)
        data[mine, :n] = block.memory.bytes[at[:, None] + np.arange(n)]
    block.shared.finish_copy(to, threads, data)


# -- a warp's matrices

@executes("ldmatrix")
def ldmatrix(block, ins, at, threads):
    """9.7.14.5.15: lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i; lane l gets elements 2 (l % 4) and
    the next of row l / 4, with .trans of column l / 4."""
    if not re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16", ins.name):
        raise NotImplementedError(ins.text)
    warps = block.whole_warps(ins, threads)
    where = block.address(ins.operands[1], threads, at)
    block.shared.read(where, 16, threads)
    matrices = block.shared.bytes[where[:, None] + np.arange(16)].view(np.uint16).reshape(warps, 4, 8, 8)
    if "trans" in ins.parts:
        matrices = matrices.transpose(0, 1, 3, 2)
    low, high = (matrices[:, :, GROUP, 2 * IN_GROUP + i].astype(np.uint32) for i in range(2))
    for i, register in enumerate(ins.operands[0][1]):
        block.put(register, (low[:, i] | high[:, i] << 16).reshape(-1), at)


def elements(block, registers, warps, at):
    """The bf16 numbers of these registers, (warps, 32 lanes, 2 a register), the lower half first."""
    x = np.stack([block.value(r, "u32", at).reshape(warps, 32) for r in registers], 2)
    return bf16_to_float(np.stack([x & 0xffff, x >> 16], 3).astype(np.uint16).reshape(warps, 32, -1))


@executes("mma")
def mma(block, ins, at, threads):
    """9.7.14.5.8, 9.7.14.5.14: where the fragments' elements stand in A (16 x 16), B (16 x 8), C and D (16 x 8). The
    sum is rounded once; hardware truncates within it."""
    if ins.name != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        raise NotImplementedError(ins.text)
    warps = block.whole_warps(ins, threads)
    d, a, b, c = (x[1] for x in ins.operands)
    a, b = elements(block, a, warps, at), elements(block, b, warps, at)
    A, B, C = (np.zeros((warps, 16, n)) for n in (16, 8, 8))
    for i in range(8):
        A[:, GROUP + (0 if i % 4 < 2 else 8), IN_GROUP * 2 + (i & 1) + (8 if i >= 4 else 0)] = a[:, :, i]
    for i in range(4):
        B[:, IN_GROUP * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP] = b[:, :, i]
    places = [(GROUP + (8 if i >= 2 else 0), IN_GROUP * 2 + (i & 1)) for i in range(4)]
    for place, register in zip(places, c):
        C[:, *place] = block.value(register, "f32", at).reshape(-1, 32 if register[0] == "register" else 1)
    D = (A @ B + C).astype(np.float32)
    for place, register in zip(places, d):
        block.put(register, D[:, *place].reshape(-1), at)


# -- wgmma: a warpgroup's products from shared memory

class Products:
    """Of one warpgroup. Groups of products in flight, the last of them still open: each holds the words that they read
    and the registers that they add to. touched: registers accessed since the last wgmma.fence by anything else."""

    def __init__(self):
        self.groups, self.touched = [([], set())], set()


@executes("registers")
def watch_registers(block, ins, groups):
    """9.7.15.7.1: accumulators must not be accessed while products are in flight, and after any other access they need
    wgmma.fence before the next product; products of the same shape follow each other without."""
    if ins.parts[0] == "wgmma" or not block.products or not ins.registers:
        return
    for group in groups:
        p = block.products.get(group)
        if p:
            if any(not registers.isdisjoint(ins.registers) for _, registers in p.groups):
                raise Fault(f"SUMS: {ins.text[:60]} accesses sums of a wgmma in flight")
            p.touched |= ins.registers


@executes("fence")
def fence(block, ins, at, threads):
    if ins.name != "fence.proxy.async.shared::cta":         # 9.7.13.4
        raise NotImplementedError(ins.text)
    block.shared.fence(threads, block.count)


@executes("wgmma")
def wgmma(block, ins, at, threads):
    block.whole_warps(ins, threads)
    for group in np.unique(threads // 128):
        mine = threads // 128 == group
        if mine.sum() != 128:
            raise Fault(f"ALIGN: {ins.name} by a part of a warpgroup")
        p = block.products.get(int(group))
        if ins.parts[1] == "fence":
            block.products.setdefault(int(group), Products()).touched = set()
        elif p is None:
            if ins.parts[1] == "mma_async":
                raise Fault("SUMS: a product without a wgmma.fence before it")
        elif ins.parts[1] == "commit_group":                # 9.7.15.7.2
            p.groups.append(([], set()))
        elif ins.parts[1] == "wait_group":                  # 9.7.15.7.3: at most n committed groups are pending
            if p.groups[-1][0]:
                raise Fault("SUMS: wgmma.wait_group, but the last products were never committed")
            while len(p.groups) > ins.operands[0][1] + 1:
                for words in p.groups.pop(0)[0]:
                    block.shared.multiplied_by_now(words)
        else:
            multiply(block, ins, at, threads[mine], mine, p)


def multiply(block, ins, at, threads, mine, p):
    """9.7.15.5.2: D (64 x N) = A (64 x 16) B (16 x N) + D, or without D if scale-d is false; 9.7.15.5.1.1.1: where the
    elements of D stand. Operands: d, a-desc, b-desc, scale-d, imm-scale-a, imm-scale-b, imm-trans-a, imm-trans-b."""
    m = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", ins.name)
    if not m:
        raise NotImplementedError(ins.text)
    N, d = int(m[1]), [x[1] for x in ins.operands[0][1]]
    if len(d) != N // 2:
        raise Fault(f"wgmma: {len(d)} accumulators for N = {N}")
    if p.touched & set(d):
        raise Fault("SUMS: accumulators were accessed since the last wgmma.fence")
    descriptors = [np.unique(np.broadcast_to(block.value(x, "u64", at), mine.shape)[mine]) for x in ins.operands[1:3]]
    if any(x.size > 1 for x in descriptors):
        raise Fault("wgmma: threads of a warpgroup give different descriptors")
    scale_d = np.broadcast_to(block.value(ins.operands[3], "pred", at), mine.shape)[mine]
    scale_a, scale_b, trans_a, trans_b = (x[1] for x in ins.operands[4:8])
    A = operand(block, int(descriptors[0][0]), 64, trans_a, p) * scale_a
    B = operand(block, int(descriptors[1][0]), N, trans_b, p) * scale_b
    p.groups[-1][1].update(d)
    D = A.astype(np.float64) @ B.T.astype(np.float64)
    rows = np.array([block.kernel.row[register] for register in d])[:, None]
    sums = block.files[32][rows, threads].view(np.float32)
    sums = D[places(N)] + np.where(scale_d, sums.astype(np.float64), 0)
    block.files[32][rows, threads] = sums.astype(np.float32).view(np.uint32)


@functools.lru_cache(None)
def places(N):
    """Rows and columns of register i of thread t, (N / 2, 128) each."""
    i, t = np.meshgrid(np.arange(N // 2), np.arange(128), indexing="ij")
    return 16 * (t // 32) + t % 32 // 4 + (i % 4 >= 2) * 8, 8 * (i // 4) + 2 * (t % 4) + (i & 1)


def operand(block, descriptor, rows, trans, p):
    """`rows` (M or N) by 16 numbers, by 9.7.15.5.1.2.1.3, the canonical layouts of the 128-byte swizzle, in units of
    T = 8 numbers = 16 bytes; 9.7.15.5.1.2.2 tells the descriptor's bits, whose offsets have that unit, too.
        K-major:   Swizzle<3,4,3> o ((8,m),(T,2k)):((8T,SBO),(1,T))
        MN-major:  Swizzle<3,4,3> o ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))
    The swizzle takes bits 7 to 9 of an address and flips bits 4 to 6 with them."""
    start, leading, stride = (descriptor >> i & 0x3fff for i in (0, 16, 32))
    if descriptor >> 62 != 1 or descriptor >> 49 & 7:
        raise Fault(f"wgmma: descriptor {descriptor:#x}: only the 128-byte swizzle at multiples of 1024 is known")
    if descriptor & ~(0x3fff | 0x3fff << 16 | 0x3fff << 32 | 1 << 62):
        raise Fault(f"wgmma: descriptor {descriptor:#x} has reserved bits")
    i, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    if trans:
        unit, within = i // 8 % 8 + i // 64 * leading + k % 8 * 8 + k // 8 * stride, i % 8
    else:
        unit, within = i % 8 * 8 + i // 8 * stride + k // 8, k % 8
    at = (start + unit) * 16 + within * 2
    at ^= at >> 3 & 0x70
    if at.min() < Shared.RESERVED or at.max() >= block.shared.end:
        raise Fault("BOUNDS: wgmma reads outside of the block's shared memory")
    words = np.unique(at >> 2)
    block.shared.multiply(words)
    p.groups[-1][0].append(words)
    return bf16_to_float(block.shared.bytes.view(np.uint16)[at >> 1])
