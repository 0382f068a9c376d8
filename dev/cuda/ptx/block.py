"""Executes one block of threads: control flow, scalar instructions, loads and stores. All threads that are at the same
instruction execute it together, as numpy vectors; of several places in the code, the first one's threads go on, so that
threads meet again where their ways do. Which threads run first cannot matter: memory.py reports every access of shared
memory that no barrier orders.

Fresh registers and shared memory hold NaN.
"""
import numpy as np

from memory import Fault, Shared
from ptx import SIZES, TYPES

np.seterr(all="ignore")
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
RUN = {}        # the first word of an instruction's name: what executes it


def executes(*names):
    def enter(function):
        RUN.update(dict.fromkeys(names, function))
        return function
    return enter


def bf16_to_float(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(x):
    """Round to nearest, ties to even (PTX ISA 9.7.9.21, cvt.rn); NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), np.uint16(0x7fff), ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16))


class Block:
    """threads: (x, y, z) of the block; parameters: their bytes; dynamic: bytes of dynamic shared memory."""

    def __init__(self, module, kernel, memory, parameters, grid, threads, place, dynamic):
        self.kernel, self.memory, self.parameters, self.shared = kernel, memory, parameters, Shared()
        self.count = int(np.prod(threads))
        if self.count > kernel.threads:
            raise Fault(f"{self.count} threads in a block, .maxntid is {kernel.threads}")
        n = np.arange(self.count)
        self.special = {"tid": (n % threads[0], n // threads[0] % threads[1], n // (threads[0] * threads[1])),
                        "ntid": threads, "ctaid": place, "nctaid": grid}
        # registers of one width are the rows of one array
        self.files = {}
        for bits in set(kernel.bits):
            shape = kernel.bits.count(bits), self.count
            self.files[bits] = np.zeros(shape, np.bool_) if bits == 1 else np.full(shape, ~UNSIGNED[bits // 8](0))
        rows = {bits: iter(file) for bits, file in self.files.items()}
        self.registers = [next(rows[bits]) for bits in kernel.bits]
        self.symbols, end = {}, Shared.RESERVED
        for name, (align, size) in kernel.shared.items():
            self.symbols[name] = -(-end // align) * align
            end = self.symbols[name] + size
        start = -(-end // max(module.dynamic.values(), default=16)) * max(module.dynamic.values(), default=16)
        self.symbols.update(dict.fromkeys(module.dynamic, start))       # all dynamic arrays are the same memory
        self.shared.end = (start if dynamic else end) + dynamic
        self.copies, self.group = {}, np.zeros(self.count, np.int64)    # tensor_cores.py: cp.async
        self.products = {}                                              # and wgmma, by warpgroup

    # -- operands: `at` says which threads, as a slice or an array of numbers

    def value(self, operand, kind, at):
        """The operand as `kind`; constants have one element."""
        what, dtype = operand[0], TYPES[kind]
        if what == "register":
            x = self.registers[operand[1]][at]
            if kind == "pred":
                return x
            if x.itemsize != SIZES[kind]:                               # 9.4.1: a wider register, cut
                x = x.astype(UNSIGNED[SIZES[kind]])
            return np.ascontiguousarray(x).view(dtype)
        if what == "integer" and kind[0] == "f":
            return np.array([operand[1]], dtype)
        if what in ("integer", "bits"):
            if kind == "pred":
                return np.array([bool(operand[1])])
            return np.array([operand[1] & (1 << 8 * SIZES[kind]) - 1], UNSIGNED[SIZES[kind]]).view(dtype)
        if what == "special":
            name, axis = operand[1][1:].split(".")
            x = self.special[name]["xyz".index(axis)]
            return np.array(x[at] if name == "tid" else [x]).astype(UNSIGNED[SIZES[kind]]).view(dtype)
        if what == "not":
            return ~self.value(operand[1], "pred", at)
        return np.array([self.symbols[operand[1]]], UNSIGNED[SIZES[kind]]).view(dtype)

    def put(self, operand, x, at):
        """A narrower result is extended by its own sign, a wider one cut (9.4.1)."""
        register = self.registers[operand[1]]
        x = np.asarray(x)
        if register.dtype != np.bool_ and x.itemsize != register.itemsize:
            x = x.astype(np.int64 if x.dtype.kind == "i" else np.uint64).astype(register.dtype)
        register[at] = x if register.dtype == np.bool_ else np.ascontiguousarray(x).view(register.dtype)

    def address(self, operand, threads, at):
        base = self.value(operand[1], "u64" if operand[1][0] == "register" else "u32", at).astype(np.int64)
        return np.broadcast_to(base + operand[2], threads.shape)

    def whole_warps(self, ins, threads):
        """How many warps these are; .aligned asks for whole ones."""
        warps = threads.reshape(-1, 32) if threads.size % 32 == 0 else None
        if warps is None or (warps[:, :1] % 32).any() or (warps != warps[:, :1] + np.arange(32)).any():
            raise Fault(f"ALIGN: {ins.name} by a part of a warp")
        return len(warps)

    # -- control flow

    def run(self):
        code, ends = self.kernel.code, self.kernel.block_end
        at_code, waiting, done = (np.zeros(self.count, t) for t in (np.int64, np.bool_, np.bool_))
        while not done.all():
            ready = ~(waiting | done)
            if not ready.any():
                if np.unique(at_code[waiting]).size > 1:
                    raise Fault("threads wait at different barriers")
                waiting[:] = False
                self.shared.epoch += 1
                continue
            pc = at_code[ready].min()
            threads = np.flatnonzero(ready & (at_code == pc))
            everybody = threads.size == self.count
            at, end = slice(None) if everybody else threads, ends[pc]
            groups = np.unique(threads // 128).tolist() if self.kernel.uses_wgmma else ()
            while pc < end:
                ins = code[pc]
                kind = ins.parts[0]
                chosen = None
                if ins.guard:
                    chosen = self.registers[ins.guard[0]][at] ^ ins.guard[1]
                if kind == "bra":
                    at_code[threads] = ins.target if chosen is None else np.where(chosen, ins.target, pc + 1)
                    break
                if kind == "ret":
                    at_code[threads] = pc + 1
                    done[threads if chosen is None else threads[chosen]] = True
                    break
                if ins.name == "bar.sync":
                    self.whole_warps(ins, threads)
                    waiting[threads] = True
                    at_code[threads] = pc + 1
                    break
                if groups:
                    RUN["registers"](self, ins, groups)
                if chosen is None:
                    RUN[kind](self, ins, at, threads)
                elif chosen.any():
                    RUN[kind](self, ins, threads[chosen], threads[chosen])
                pc += 1
            else:
                at_code[threads] = pc


# -- arithmetic (PTX ISA 9.7.1 integer, 9.7.3 floating point, 9.7.6 comparison, 9.7.8 logic and shift)

def binary(integer, floating=None):
    def run(block, ins, at, threads):
        kind = ins.parts[-1]
        a, b = (block.value(x, kind, at) for x in ins.operands[1:3])
        f = floating if kind[0] == "f" and floating else integer
        block.put(ins.operands[0], f(a, b).astype(TYPES[kind], copy=False), at)
    return run


def truncated(a, b):
    """Integer division towards zero."""
    return a // b if a.dtype.kind == "u" else np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


# fmin and fmax: if one operand is NaN, the other is the result
for name, run in {"add": binary(np.add), "sub": binary(np.subtract), "and": binary(np.bitwise_and),
                  "or": binary(np.bitwise_or), "xor": binary(np.bitwise_xor), "min": binary(np.minimum, np.fmin),
                  "max": binary(np.maximum, np.fmax), "div": binary(truncated, np.divide),
                  "rem": binary(np.fmod)}.items():
    RUN[name] = run


@executes("mul", "mad")
def multiply(block, ins, at, threads):
    kind, form = ins.parts[-1], ins.parts[1]
    a, b = (block.value(x, kind, at) for x in ins.operands[1:3])
    if form == "wide":
        wide = TYPES[kind[0] + str(int(kind[1:]) * 2)]
        a, b = a.astype(wide), b.astype(wide)
    elif kind[0] != "f" and form != "lo":
        raise NotImplementedError(ins.text)
    x = a * b
    block.put(ins.operands[0], x + block.value(ins.operands[3], kind, at) if ins.parts[0] == "mad" else x, at)


@executes("fma")
def fused(block, ins, at, threads):
    """The product of two floats is exact as a double; .rm rounds to minus infinity."""
    x, b, c = (block.value(o, "f32", at).astype(np.float64) for o in ins.operands[1:4])
    x = x * b + c
    y = x.astype(np.float32)
    if ins.parts[1] == "rm":
        y = np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y)
    block.put(ins.operands[0], y, at)


def flushed(x, ins):
    """.ftz: subnormal numbers become zero."""
    return np.where(np.abs(x) < 2.0 ** -126, x.dtype.type(0), x) if "ftz" in ins.parts else x


def unary(f):
    def run(block, ins, at, threads):
        kind = ins.parts[-1]
        x = flushed(f(flushed(block.value(ins.operands[1], kind, at), ins)), ins)
        block.put(ins.operands[0], x.astype(TYPES[kind], copy=False), at)
    return run


# approximations are exact here, up to rounding
for name, run in {"abs": unary(np.abs), "neg": unary(np.negative), "not": unary(np.invert), "sqrt": unary(np.sqrt),
                  "rcp": unary(np.reciprocal), "ex2": unary(np.exp2), "lg2": unary(np.log2)}.items():
    RUN[name] = run


@executes("shl", "shr")
def shift(block, ins, at, threads):
    """Shifts by the register's width or more give what shifting on and on gives."""
    kind = ins.parts[-1]
    bits = 8 * SIZES[kind]
    a, n = block.value(ins.operands[1], kind, at), block.value(ins.operands[2], "u32", at)
    by = np.minimum(n, bits - 1).astype(a.dtype)
    x = a << by if ins.parts[0] == "shl" else a >> by
    keeps = ins.parts[0] == "shr" and kind[0] == "s"
    block.put(ins.operands[0], x if keeps else np.where(n < bits, x, a.dtype.type(0)), at)


@executes("bfi")
def insert_bits(block, ins, at, threads):
    a, b, start, length = (block.value(o, "u32", at).astype(np.uint64) for o in ins.operands[1:5])
    mask = (np.uint64(1) << length) - np.uint64(1) << start
    block.put(ins.operands[0], (b & ~mask | a << start & mask).astype(np.uint32), at)


@executes("selp")
def select(block, ins, at, threads):
    a, b = (block.value(x, ins.parts[-1], at) for x in ins.operands[1:3])
    block.put(ins.operands[0], np.where(block.value(ins.operands[3], "pred", at), a, b), at)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal}


@executes("setp")
def compare(block, ins, at, threads):
    """9.7.6.2: ordered comparisons are false with NaN, those that end in u are true."""
    kind, which = ins.parts[2], ins.parts[1]
    a, b = (block.value(x, kind, at) for x in ins.operands[1:3])
    nan = np.isnan(a) | np.isnan(b) if kind[0] == "f" else np.array([False])
    if which in ("num", "nan"):
        x = nan == (which == "nan")
    elif which in COMPARISONS:
        x = COMPARISONS[which](a, b) & ~nan
    else:
        x = COMPARISONS[which[:2]](a, b) | nan
    block.put(ins.operands[0], x, at)


# -- moving data (9.7.9)

@executes("mov")
def move(block, ins, at, threads):
    """9.7.9.2: between a register and a vector of narrower ones, the first of which holds the lowest bits."""
    kind, (to, source) = ins.parts[-1], ins.operands
    if to[0] == "vector":
        bits = 8 * SIZES[kind] // len(to[1])
        x = block.value(source, f"u{8 * SIZES[kind]}", at)
        for i, part in enumerate(to[1]):
            block.put(part, (x >> x.dtype.type(bits * i)).astype(UNSIGNED[bits // 8]), at)
    elif source[0] == "vector":
        bits, x = 8 * SIZES[kind] // len(source[1]), 0
        for i, part in enumerate(source[1]):
            x = x | block.value(part, f"u{bits}", at).astype(TYPES[kind]) << TYPES[kind](bits * i)
        block.put(to, x, at)
    else:
        block.put(to, block.value(source, kind, at), at)


@executes("cvta")
def convert_address(block, ins, at, threads):
    """Addresses are the same in every space here: shared ones are small, global ones begin at Global.BASE."""
    block.put(ins.operands[0], block.value(ins.operands[1], ins.parts[-1], at), at)


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@executes("cvt")
def convert(block, ins, at, threads):
    """9.7.9.21. bf16x2 takes its upper half from the first operand."""
    (to, source), operands = ins.parts[-2:], ins.operands
    if to == "bf16x2":
        high, low = (float_to_bf16(block.value(x, "f32", at)).astype(np.uint32) for x in operands[1:3])
        return block.put(operands[0], low | high << 16, at)
    if to == "bf16":
        return block.put(operands[0], float_to_bf16(block.value(operands[1], "f32", at)), at)
    if source == "bf16":
        return block.put(operands[0], bf16_to_float(block.value(operands[1], "u16", at)), at)
    x = block.value(operands[1], source, at)
    if "sat" in ins.parts:
        x = np.clip(np.where(np.isnan(x), 0, x), 0, 1)
    if source[0] == "f" and to[0] != "f":
        x = ROUNDINGS[ins.parts[1]](x)
    return block.put(operands[0], x.astype(TYPES[to]), at)


@executes("ld", "st")
def load_store(block, ins, at, threads):
    """9.7.9.8, 9.7.9.11. Vectors are aligned to their whole size (5.4.2)."""
    space, kind, loads = ins.parts[1], ins.parts[-1], ins.parts[0] == "ld"
    registers, place = ins.operands if loads else ins.operands[::-1]
    registers = registers[1] if registers[0] == "vector" else [registers]
    size = SIZES[kind] * len(registers)
    if space == "param":
        start = block.kernel.parameters[place[1][1]][0] + place[2]
        for i, x in enumerate(block.parameters[start:start + size].view(TYPES[kind])):
            block.put(registers[i], np.full(threads.size, x), at)
        return
    where = block.address(place, threads, at)
    if space == "global":
        where, data = block.memory.offsets(where, size), block.memory.bytes
    elif space == "shared":
        (block.shared.read if loads else block.shared.write)(where, size, threads)
        data = block.shared.bytes
    else:
        raise NotImplementedError(ins.text)
    data, where = data.view(TYPES[kind]), where // SIZES[kind]
    for i, register in enumerate(registers):
        if loads:
            block.put(register, data[where + i], at)
        else:
            data[where + i] = block.value(register, kind, at)


@executes("shfl")
def shuffle(block, ins, at, threads):
    """9.7.9.6, shfl.sync.bfly: lane l reads lane l ^ b, within the segment and the clamp that c tells."""
    if ins.parts[2] != "bfly":
        raise NotImplementedError(ins.text)
    to, also = ins.operands[0][1:] if ins.operands[0][0] == "pair" else (ins.operands[0], None)
    values, takes_part = np.zeros(block.count, np.uint32), np.zeros(block.count, np.bool_)
    values[threads], takes_part[threads] = block.value(ins.operands[1], "b32", at), True
    b, c, mask = (np.broadcast_to(block.value(x, "u32", at), threads.shape).astype(np.int64)
                  for x in ins.operands[2:5])
    lane = threads % 32
    source = lane ^ b & 31
    within = source <= (lane & c >> 8 & 31 | c & 31 & ~(c >> 8))
    source = threads - lane + np.where(within, source, lane)
    warp = threads - lane
    if any(not takes_part[warp[mask >> i & 1 == 1] + i].all() for i in range(32)) or not takes_part[source].all():
        raise Fault("shfl.sync: a lane of the mask takes no part")
    block.put(to, values[source], at)
    if also:
        block.put(also, within, at)
