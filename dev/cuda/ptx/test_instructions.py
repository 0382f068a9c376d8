"""Single instructions against worked examples and against CuTe's layouts, and each hazard once as it should be and once
as it should not. CHECKS is a list of (name, function); a function raises if its check fails.
"""
import numpy as np

import kernels
from block import bf16_to_float, float_to_bf16
from memory import Fault, Global
from ptx import Module

HEAD = """
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry test(.param .u64 in, .param .u64 out) .maxntid 256
{ .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<300>; .reg .b64 %d<99>;
ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, dynamic;
mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;
"""
# %r0: thread, %r1: dynamic shared memory, %r3: this thread's word of it; %d0: `in`, %d1: `out`; %d3, %d4: this thread's
# words of these
CHECKS = []


def run(body, given=np.zeros(256, np.uint32), out=256, threads=32, dynamic=64 << 10):
    """Executes `body`; returns what it left in `out` words at %d1."""
    module, memory = Module(HEAD + body + "\nret;\n}\n"), Global(4 << 20)
    source, result = memory.put(given), memory.take(4 * out)
    kernels.launch(module, module.kernel("test"), memory, kernels.pack(kernels.q(source), kernels.q(result)), (1, 1, 1),
                   (threads, 1, 1), dynamic)
    return memory.get(result, np.uint32, out)


def check(name):
    def enter(function):
        CHECKS.append((name, function))
        return function
    return enter


def equal(got, want, what=""):
    if not np.array_equal(got, want):
        raise AssertionError(f"{what}: {got} instead of {want}")


def close(got, want):
    error = kernels.relative_error(np.asarray(got, np.float64), np.asarray(want, np.float64))
    if error > 1e-6:
        raise AssertionError(f"relative error {error:.1e}")


# -- scalar instructions: operands and result as bits, integers or floats; a result of 64 bits is given as (low, high)
INF, NAN = np.float32(np.inf), np.float32(np.nan)
SCALARS = [
    ("add.s32 R, A, B", (2**31 - 1, 1), -2**31), ("sub.s32 R, A, B", (3, 5), -2),
    ("mul.lo.s32 R, A, B", (1 << 20, 1 << 13), 0), ("mul.wide.s32 W, A, B", (-3, 1 << 30), (1 << 30, -1)),
    ("mul.wide.u32 W, A, B", (-1, 2), (-2, 1)), ("mad.lo.s32 R, A, B, C", (3, -4, 5), -7),
    ("div.s32 R, A, B", (-7, 2), -3), ("rem.s32 R, A, B", (-7, 2), -1), ("div.u32 R, A, B", (-2, 2), 2**31 - 1),
    ("min.s32 R, A, B", (-1, 1), -1), ("max.s32 R, A, B", (-1, 1), 1), ("min.u32 R, A, B", (-1, 1), 1),
    ("shl.b32 R, A, B", (1, 31), -2**31), ("shl.b32 R, A, B", (1, 32), 0), ("shr.u32 R, A, B", (-1, 33), 0),
    ("shr.s32 R, A, B", (-8, 1), -4), ("shr.s32 R, A, B", (-8, 40), -1), ("not.b32 R, A", (5,), -6),
    ("bfi.b32 R, A, B, 8, 4", (0xff, 0x12345678), 0x12345f78), ("mov.b64 W, {A, B}", (1, 2), (1, 2)),
    ("cvt.s64.s32 W, A", (-5,), (-5, -1)), ("cvt.rn.f32.s32 R, A", (-5,), -5.0),
    ("fma.rn.f32 R, A, B, C", (1 + 2.0**-12, 1 + 2.0**-12, -1.0), 2.0**-11 + 2.0**-24),
    ("fma.rm.f32 R, A, B, C", (1.0, 1.0, -2.0**-30), 1 - 2.0**-24), ("div.rn.f32 R, A, B", (1.0, 3.0), 1 / 3),
    ("rcp.rn.f32 R, A", (4.0,), 0.25), ("sqrt.rn.f32 R, A", (9.0,), 3.0), ("neg.f32 R, A", (9.0,), -9.0),
    ("max.f32 R, A, B", (NAN, 1.0), 1.0), ("min.f32 R, A, B", (2.0, NAN), 2.0),
    ("ex2.approx.ftz.f32 R, A", (3.0,), 8.0), ("ex2.approx.ftz.f32 R, A", (-INF,), 0.0),
    ("ex2.approx.ftz.f32 R, A", (-127.0,), 0.0), ("cvt.sat.f32.f32 R, A", (-1.0,), 0.0),
    ("cvt.sat.f32.f32 R, A", (NAN,), 0.0), ("cvt.sat.f32.f32 R, A", (1.5,), 1.0),
    # to bf16, ties to even: 1 + 2^-8 is half-way between 1 and 1 + 2^-7, 1 + 3 2^-8 half-way to 1 + 2^-6
    ("cvt.rn.bf16x2.f32 R, A, B", (1 + 2.0**-8, 1 + 3 * 2.0**-8), 0x3f803f82),
    ("cvt.rn.bf16x2.f32 R, A, B", (NAN, -2.0), 0x7fffc000),
]
COMPARED = [("lt.f32", NAN, 1.0, 0), ("ltu.f32", NAN, 1.0, 1), ("ne.f32", NAN, NAN, 0), ("neu.f32", NAN, NAN, 1),
            ("eq.f32", 0.0, -0.0, 1), ("num.f32", 1.0, NAN, 0), ("lt.s32", -1, 1, 1), ("lt.u32", -1, 1, 0)]


def bits(x):
    return int(np.float32(x).view(np.uint32)) if isinstance(x, (float, np.floating)) else x & 0xffffffff


def scalar(text, operands, result):
    for name, register in {"R": "%r20", "W": "%d20", "A": "%r10", "B": "%r11", "C": "%r12"}.items():
        text = text.replace(f" {name}", f" {register}").replace(f"{{{name}", f"{{{register}")
    wide = "%d20" in text
    loads = "".join(f"ld.global.u32 %r{10 + i}, [%d0+{4 * i}];" for i in range(len(operands)))
    store = "st.global.u64 [%d1], %d20;" if wide else "st.global.u32 [%d1], %r20;"
    got = run(f"{loads} {text}; {store}", np.array([bits(x) for x in operands], np.uint32), 2)
    equal([int(x) for x in got[:1 + wide]], [bits(x) for x in (result if wide else (result,))])


for row in SCALARS:
    CHECKS.append((f"{row[0]} with {row[1]}", lambda row=row: scalar(*row)))
for compared, a, b, result in COMPARED:
    CHECKS.append((f"setp.{compared} of {a} and {b}", lambda c=compared, a=a, b=b, r=result: scalar(
        f"setp.{c} %p1, A, B; selp.b32 R, 1, 0, %p1", (a, b), r)))


@check("selp, @p, @!p, not.pred, and.pred")
def predicates():
    got = run("""setp.lt.u32 %p1, %r0, 9; setp.gt.u32 %p2, %r0, 4; and.pred %p3, %p1, %p2; not.pred %p4, %p3;
                 mov.u32 %r5, 1; @%p3 mov.u32 %r5, 2; @!%p1 add.s32 %r5, %r5, 4; selp.b32 %r6, 100, 0, %p4;
                 add.s32 %r5, %r5, %r6; st.global.u32 [%d4], %r5;""", out=32)
    equal(got, [101] * 5 + [2] * 4 + [105] * 23)


@check("a loop of other lengths in each thread; threads meet again")
def loop():
    got = run("""mov.u32 %r5, 0; mov.u32 %r6, 0; A: setp.ge.u32 %p1, %r5, %r0; @%p1 bra B; add.s32 %r6, %r6, %r5;
                 add.s32 %r5, %r5, 1; bra.uni A; B: shfl.sync.bfly.b32 %r7, %r6, 0, 31, -1;
                 st.global.u32 [%d4], %r7;""", out=32)
    equal(got, [i * (i - 1) // 2 for i in range(32)])


@check("shfl.sync.bfly, also in segments of 8 lanes")
def butterfly():
    got = run("shfl.sync.bfly.b32 %r5|%p1, %r0, 5, 31, -1; shfl.sync.bfly.b32 %r6, %r0, 8, 0x1807, -1;"
              "st.global.u32 [%d4], %r5; st.global.u32 [%d4+128], %r6;", out=64)
    equal(got[:32], np.arange(32) ^ 5)
    # a lane of a later segment is refused, and one keeps one's own number; one of an earlier segment is not
    equal(got[32:], np.minimum(np.arange(32), np.arange(32) ^ 8))


@check("ld and st of vectors of 16-bit numbers")
def vectors():
    given = np.arange(64, dtype=np.uint32) * 0x10003
    got = run("""mul.wide.u32 %d5, %r0, 8; add.s64 %d6, %d0, %d5; add.s64 %d7, %d1, %d5;
                 ld.global.v4.u16 {%h1, %h2, %h3, %h4}, [%d6]; st.global.v4.u16 [%d7], {%h2, %h1, %h4, %h3};""",
              given, 64)
    equal(got, given >> 16 | given << 16)


# -- matrices, by CuTe's layouts: a function from (thread, value) to a place in a column-major matrix

def cute(shape, stride, count):
    """The place of coordinate 0 .. count - 1, the first mode fastest."""
    n, place = np.arange(count), 0
    for size, step in zip(shape, stride):
        place, n = place + n % size * step, n // size
    return place


def layout(threads, thread_mode, value_mode):
    """(threads, values) places"""
    values = int(np.prod(value_mode[0]))
    return cute(*thread_mode, threads)[:, None] + cute(*value_mode, values)[None, :]


def load_registers(first, count, at):
    """count words of each thread, `at` bytes into `in`, thread after thread"""
    return f"mul.wide.u32 %d5, %r0, {4 * count}; add.s64 %d6, %d0, %d5;" + "".join(
        f"ld.global.u32 %r{first + i}, [%d6+{at + 4 * i}];" for i in range(count))


@check("mma.m16n8k16 is CuTe's SM80_16x8x16")
def mma():
    random = np.random.default_rng(3)
    A, B, C = random.integers(-8, 8, (16, 16)), random.integers(-8, 8, (8, 16)), random.integers(-8, 8, (16, 8))
    place_a = layout(32, ((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)))
    place_b = layout(32, ((4, 8), (16, 1)), ((2, 2), (8, 64)))
    place_c = layout(32, ((4, 8), (32, 1)), ((2, 2), (16, 8)))
    given = [float_to_bf16(A.T.reshape(-1)[place_a].astype(np.float32)).view(np.uint32),
             float_to_bf16(B.T.reshape(-1)[place_b].astype(np.float32)).view(np.uint32),
             C.T.reshape(-1)[place_c].astype(np.float32).view(np.uint32)]
    got = run(load_registers(10, 4, 0) + load_registers(20, 2, 512) + load_registers(30, 4, 768) + """
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r40,%r41,%r42,%r43}, {%r10,%r11,%r12,%r13}, {%r20,%r21},
        {%r30,%r31,%r32,%r33}; mul.wide.u32 %d5, %r0, 16; add.s64 %d6, %d1, %d5;
        st.global.v4.f32 [%d6], {%r40,%r41,%r42,%r43};""",
              np.concatenate([x.reshape(-1) for x in given]), 128).view(np.float32)
    equal(got.reshape(32, 4), (A @ B.T + C).T.reshape(-1)[place_c])


# Thread t copies 16 bytes from `in` to the same place of shared memory, `rounds` times, threads * 16 bytes further.
def fill(rounds, threads):
    return "shl.b32 %r4, %r0, 4; add.s32 %r4, %r4, %r1; mul.wide.u32 %d5, %r0, 16; add.s64 %d6, %d0, %d5;" + "".join(
        f"cp.async.cg.shared.global [%r4+{i * threads * 16}], [%d6+{i * threads * 16}], 16;" for i in range(rounds)) + \
        "cp.async.commit_group; cp.async.wait_group 0;"


@check("ldmatrix and ldmatrix.trans, element by element")
def ldmatrix():
    numbers = np.arange(256, dtype=np.uint16)               # matrix m, row r, column c: 64 m + 8 r + c
    for trans in ("", ".trans"):
        got = run(fill(1, 32) + f"""bar.sync 0; ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16
            {{%r10,%r11,%r12,%r13}}, [%r4]; mul.wide.u32 %d7, %r0, 16; add.s64 %d8, %d1, %d7;
            st.global.v4.u32 [%d8], {{%r10,%r11,%r12,%r13}};""", numbers, 128).view(np.uint16).reshape(32, 4, 2)
        # the example of the ISA's figure: lane 5 holds columns 2 and 3 of row 1, transposed rows 2 and 3 of column 1
        equal(got[5, 2], [128 + 17, 128 + 25] if trans else [128 + 10, 128 + 11], trans)
        every = numbers.reshape(4, 8, 8).transpose(0, 2, 1) if trans else numbers.reshape(4, 8, 8)
        equal(got.transpose(1, 0, 2).reshape(4, 8, 8), every, trans)


def tile(matrix, across):
    """(rows, 64) numbers as dev/lib/cuda/experts_bf16.cuh stores them: lines of 128 bytes, whose chunk c of 16 stands
    at place c ^ (line % 8); across: lines along the rows, in pieces of 64 rows."""
    lines = matrix.T.reshape(64, -1, 64).transpose(1, 0, 2).reshape(-1, 64) if across else matrix
    chunks = float_to_bf16(lines.astype(np.float32)).reshape(-1, 8, 8)
    return np.stack([chunk[np.arange(8) ^ i % 8] for i, chunk in enumerate(chunks)]).view(np.uint32).reshape(-1)


def descriptor(at, across):
    """Of the tile `at` bytes into dynamic shared memory, which begins at 1024."""
    return (1024 + at) // 16 | (512 if across else 1) << 16 | 64 << 32 | 1 << 62


def wgmma(N, trans_a, trans_b, before="wgmma.fence.sync.aligned;", after="wgmma.wait_group.sync.aligned 0;",
          fence="fence.proxy.async.shared::cta; bar.sync 0;", flags="%p1, 1, 1", k=0, a=None, b=None, threads=128):
    """The body of one product of tiles 64 x 64 and N x 64, values k .. k + 15; sums are 1 before it."""
    step = [2 * k if not across else 128 * k for across in (trans_a, trans_b)]
    a = descriptor(step[0], trans_a) if a is None else a
    b = descriptor(8192 + step[1], trans_b) if b is None else b
    sums = ",".join(f"%r{100 + i}" for i in range(N // 2))
    return (fill((64 + N) * 128 // (threads * 16), threads) + fence
            + "setp.eq.u32 %p1, 0, 0; setp.eq.u32 %p2, 0, 1;"
            + "".join(f"mov.f32 %r{100 + i}, 0f3F800000;" for i in range(N // 2))
            + f"mov.u64 %d10, {a}; mov.u64 %d11, {b};" + before
            + f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{sums}}}, %d10, %d11, {flags}, "
            f"{trans_a}, {trans_b};" + "wgmma.commit_group.sync.aligned;" + after
            + f"mul.wide.u32 %d7, %r0, {2 * N}; add.s64 %d8, %d1, %d7;"
            + "".join(f"st.global.f32 [%d8+{4 * i}], %r{100 + i};" for i in range(N // 2)))


def product(N, trans_a, trans_b, scale=1, keeps=1, **more):
    random = np.random.default_rng(N + trans_a)
    A, B = random.integers(-8, 8, (64, 64)), random.integers(-8, 8, (N, 64))
    k = more.get("k", 0)
    got = run(wgmma(N, trans_a, trans_b, **more), np.concatenate([tile(A, trans_a), tile(B, trans_b)]), 64 * N, 128)
    want = scale * A[:, k:k + 16] @ B[:, k:k + 16].T + keeps
    place = layout(128, ((4, 8, 4), (128, 1, 16)), ((2, 2, N // 8), (64, 8, 512)))      # CuTe's CLayout_64xN
    equal(got.view(np.float32).reshape(128, N // 2), want.T.reshape(-1)[place])


for N in (128, 256):
    for trans_a in range(2):
        for trans_b in range(2):
            CHECKS.append((f"wgmma m64n{N}k16, A {'M' if trans_a else 'K'}-major, B {'N' if trans_b else 'K'}-major",
                           lambda n=N, a=trans_a, b=trans_b: product(n, a, b, k=48 if a else 16)))
CHECKS.append(("wgmma: scale-d false forgets the sums", lambda: product(128, 0, 0, keeps=0, flags="%p2, 1, 1")))
CHECKS.append(("wgmma: imm-scale-a -1", lambda: product(128, 0, 0, scale=-1, flags="%p1, -1, 1")))


@check("cp.async: src-size 0 and 4, and zeros for the rest; nothing is read with 0")
def sizes():
    given = np.arange(1, 129, dtype=np.uint32)
    got = run("""shl.b32 %r4, %r0, 4; add.s32 %r4, %r4, %r1; mul.wide.u32 %d5, %r0, 16; add.s64 %d6, %d0, %d5;
        setp.lt.u32 %p1, %r0, 16; selp.b32 %r5, 4, 0, %p1; selp.b64 %d6, %d6, 0, %p1;
        cp.async.cg.shared.global [%r4], [%d6], 16, %r5; cp.async.commit_group; cp.async.wait_group 0;
        add.s64 %d7, %d1, %d5; ld.shared.v4.u32 {%r10,%r11,%r12,%r13}, [%r4];
        st.global.v4.u32 [%d7], {%r10,%r11,%r12,%r13};""", given, 128).reshape(32, 4)
    equal(got[:16, 0], given.reshape(32, 4)[:16, 0])
    equal(got[:16, 1:], np.zeros((16, 3)))
    equal(got[16:], np.zeros((16, 4)))


# -- hazards: (name, what is right, what is not, the word that the fault begins with)

def lines(x):
    return np.arange(x, dtype=np.uint32)


STORE, LOAD = "st.shared.u32 [%r3], %r0;", "ld.shared.u32 %r5, [%r6];"
OTHER = "xor.b32 %r6, %r2, 4; add.s32 %r6, %r6, %r1;"                   # the word of the neighbour
COPY = "shl.b32 %r4, %r0, 4; add.s32 %r4, %r4, %r1; mul.wide.u32 %d5, %r0, 16; add.s64 %d6, %d0, %d5;" \
       "cp.async.cg.shared.global [%r4], [%d6], 16; cp.async.commit_group;"
SECOND = "cp.async.cg.shared.global [%r4+512], [%d6], 16; cp.async.commit_group;"
NEXT = "xor.b32 %r6, %r2, 4; shl.b32 %r6, %r6, 2; add.s32 %r6, %r6, %r1;"   # the first word of the neighbour's copy
WAIT = "cp.async.wait_group 0;"
MATRICES = COPY + WAIT + "bar.sync 0; setp.lt.u32 %p1, %r0, LANES;" \
    "@%p1 ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10,%r11,%r12,%r13}, [%r4];"
HAZARDS = [
    ("another thread's word", OTHER + STORE + "bar.sync 0;" + LOAD, OTHER + STORE + LOAD, "RAW"),
    ("a word over what another thread reads", OTHER + STORE + "bar.sync 0;" + LOAD + "bar.sync 0;" + STORE,
     OTHER + STORE + "bar.sync 0;" + LOAD + STORE, "WAR"),
    ("one word by all threads", "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r1], %r0;",
     "st.shared.u32 [%r1], %r0;", "WAW"),
    ("a word twice", STORE + "bar.sync 0; xor.b32 %r6, %r2, 4; add.s32 %r6, %r6, %r1; st.shared.u32 [%r6], %r0;",
     STORE + "xor.b32 %r6, %r2, 4; add.s32 %r6, %r6, %r1; st.shared.u32 [%r6], %r0;", "WAW"),
    ("shared memory before anything is there", STORE + "ld.shared.u32 %r5, [%r3];", "ld.shared.u32 %r5, [%r3];",
     "UNSET"),
    ("one's own copy", COPY + WAIT + "ld.shared.u32 %r5, [%r4];", COPY + "ld.shared.u32 %r5, [%r4];", "RAW"),
    ("another thread's copy", COPY + WAIT + "bar.sync 0;" + NEXT + LOAD, COPY + WAIT + NEXT + LOAD, "RAW"),
    ("another thread's copy, waited for after the barrier", COPY + WAIT + "bar.sync 0;" + NEXT + LOAD,
     COPY + "bar.sync 0;" + WAIT + NEXT + LOAD, "RAW"),
    ("the older of two groups", COPY + SECOND + "cp.async.wait_group 1; ld.shared.u32 %r5, [%r4];",
     COPY + SECOND + "cp.async.wait_group 1; ld.shared.u32 %r5, [%r4+512];", "RAW"),
    ("a store over a copy", COPY + WAIT + "st.shared.u32 [%r4], %r0;", COPY + "st.shared.u32 [%r4], %r0;", "WAW"),
    ("two copies to one place", COPY + WAIT + COPY, COPY + COPY, "WAW"),
    ("an address in shared memory", STORE, "st.shared.v2.u32 [%r3+4], {%r0, %r0};", "ALIGN"),
    ("the end of shared memory", STORE, "st.shared.u32 [%r3+65536], %r0;", "BOUNDS"),
    ("the end of an array", "ld.global.u32 %r5, [%d3];", "ld.global.u32 %r5, [%d3+1024];", "BOUNDS"),
    ("a copy from an odd place", COPY + WAIT, COPY.replace("[%d6]", "[%d6+4]") + WAIT, "ALIGN"),
    ("ldmatrix by a whole warp", MATRICES.replace("LANES", "32"), MATRICES.replace("LANES", "16"), "ALIGN"),
    ("a shuffle's mask", "shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;",
     "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;", "shfl"),
]
OVERWRITE = "st.shared.u32 [%r3], %r0;"
HAZARDS_WGMMA = [
    ("fence.proxy.async before wgmma", {}, {"fence": "bar.sync 0;"}, "PROXY"),
    ("a barrier after fence.proxy.async", {}, {"fence": "bar.sync 0; fence.proxy.async.shared::cta;"}, "PROXY"),
    ("fence.proxy.async after the writes", {}, {"fence": "fence.proxy.async.shared::cta; bar.sync 0;" + OVERWRITE
                                                + "bar.sync 0;"}, "PROXY"),
    ("wgmma.fence before the first product", {}, {"before": ""}, "SUMS"),
    ("sums set after wgmma.fence", {}, {"before": "wgmma.fence.sync.aligned; mov.f32 %r100, 0f3F800000;"}, "SUMS"),
    ("sums read before the wait", {}, {"after": ""}, "SUMS"),
    ("sums read while one group is pending", {}, {"after": "wgmma.wait_group.sync.aligned 1;"}, "SUMS"),
    ("a stage overwritten under a product", {"after": "wgmma.wait_group.sync.aligned 0; bar.sync 0;" + OVERWRITE},
     {"after": OVERWRITE}, "WAR"),
    ("a stage overwritten while the other warps may not know", {"after": "wgmma.wait_group.sync.aligned 0; bar.sync 0;"
                                                                + OVERWRITE},
     {"after": "wgmma.wait_group.sync.aligned 0;" + OVERWRITE}, "WAR"),
    ("the whole warpgroup", {}, {"before": "wgmma.fence.sync.aligned; setp.ge.u32 %p3, %r0, 64; @%p3 bra END;",
                                 "after": "wgmma.wait_group.sync.aligned 0; END: mov.u32 %r5, 0;"}, "ALIGN"),
    ("one descriptor for all threads", {}, {"before": "wgmma.fence.sync.aligned; cvt.u64.u32 %d12, %r0; shr.u64 %d12,"
                                            " %d12, 6; add.s64 %d10, %d10, %d12;"}, "wgmma"),
    ("the 64-byte swizzle", {}, {"a": descriptor(0, 0) ^ 3 << 62}, "wgmma"),
    ("reserved bits", {}, {"b": descriptor(8192, 0) | 1 << 14}, "wgmma"),
    ("an operand outside of shared memory", {}, {"a": descriptor(60 << 10, 0)}, "BOUNDS"),
]


def hazard(right, wrong, word, **how):
    run(right, **how)
    try:
        run(wrong, **how)
    except Fault as fault:
        if str(fault).startswith(word):
            return
        raise AssertionError(f"not {word}, but {fault}") from None
    raise AssertionError(f"no {word}")


for name, right, wrong, word in HAZARDS:
    CHECKS.append((f"{word}: {name}", lambda r=right, w=wrong, f=word: hazard(r, w, f)))
for name, right, wrong, word in HAZARDS_WGMMA:
    CHECKS.append((f"{word}: {name}", lambda r=right, w=wrong, f=word: hazard(
        wgmma(128, 0, 0, **r), wgmma(128, 0, 0, **w), f, given=lines(6144), out=8192, threads=128)))


@check("threads wait at different barriers")
def barriers():
    hazard("bar.sync 0;", "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 0; bra.uni B; A: bar.sync 0;"
           "B: mov.u32 %r5, 0;", "threads wait", threads=64)


@check("what is not known is refused")
def unknown():
    for text in ("atom.global.add.u32 %r5, [%d1], 1;", "mul.hi.s32 %r5, %r0, %r0;",
                 "cp.async.ca.shared.global [%r1], [%d0], 4;", "fence.proxy.async;"):
        try:
            run(text)
        except (NotImplementedError, KeyError, IndexError):
            continue
        raise AssertionError(f"executes {text}")


@check("bf16 and back is the identity")
def identity():
    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = bf16_to_float(every)
    equal(float_to_bf16(numbers)[~np.isnan(numbers)], every[~np.isnan(numbers)])
