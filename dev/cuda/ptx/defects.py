"""Defects planted in the PTX of kernels that are right: (what it is, part of the kernel's name, pattern, replacement).
Each must be found, as a fault or as a wrong result. In an inline assembly string each would be one edit.
"""
UP, DOWN = "experts_bf16_kernelILi0ELb1ELi256E14Swiglu", "experts_bf16_kernelILi0ELb1ELi256E13Store"
NARROW, BACK = "experts_bf16_kernelILi0ELb1ELi128E13Store", "experts_bf16_kernelILi1ELb1ELi256E13Store"
WEIGHT, WARP = "experts_bf16_kernelILi2ELb1ELi256E", "experts_bf16_kernelILi0ELb0ELi128E13Store"
WARP_BACK = "experts_bf16_kernelILi1ELb0ELi128E13Store"
FORWARD, KV, Q = "attention_forward_mma_kernelILi64E", "kv_mma_kernelILi64E", "backward_q_mma_kernelILi64E"
K_MAJOR = 1 << 62 | 64 << 32 | 1 << 16          # the constant part of a descriptor: swizzle, SBO, LBO
MN_MAJOR = 1 << 62 | 64 << 32 | 512 << 16
FENCE, BARRIER = r"fence\.proxy\.async\.shared::cta;", r"bar\.sync\s+0;"

DEFECTS = [
    ("no fence.proxy.async", UP, FENCE, ""),
    ("no barrier between fence.proxy.async and wgmma", UP, rf"({FENCE}\s*){BARRIER}", r"\1"),
    ("fence.proxy.async before the wait for the copies", UP, rf"(cp\.async\.wait_group 1;)\s*({FENCE})", r"\2 \1"),
    ("no wgmma.fence", UP, r"wgmma\.fence\.sync\.aligned;", ""),
    ("cp.async.wait_group 1 -> 2: a stage is read before it has arrived", UP, r"cp\.async\.wait_group 1;",
     "cp.async.wait_group 2;"),
    ("wgmma.wait_group 1 -> 2: a stage is overwritten too early", UP, r"wgmma\.wait_group\.sync\.aligned 1;",
     "wgmma.wait_group.sync.aligned 2;"),
    ("no wait for the last products", UP, r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
    ("products that are never committed", UP, r"wgmma\.commit_group\.sync\.aligned;", ""),
    ("no barrier before the sums are stored over the stages", UP,
     rf"(wait_group\.sync\.aligned 0;[^;]*?){BARRIER}", r"\1"),
    ("persistent: no barrier between the two halves of the sums", UP,
     rf"(setp\.ne\.s32\s+%p\d+, %r\d+, 1;\s*@%p\d+ bra\s+\S+;\s*){BARRIER}", r"\1"),
    ("persistent: the sums lie where the next tile arrives", UP,
     r"(wait_group\.sync\.aligned 0;[\s\S]*?add\.s32\s+%r\d+, %r\d+, )2;", r"\g<1>0;"),
    ("persistent: the next tile is begun a step too late", UP, r"(add\.s32\s+%r\d+, %r\d+, )-2;", r"\g<1>-1;"),
    ("imm-trans-b 1 for a K-major operand", UP, r"p, 1, 1, 0, 0;", "p, 1, 1, 0, 1;"),
    ("imm-trans-a and -b swapped", BACK, r"p, 1, 1, 0, 1;", "p, 1, 1, 1, 0;"),
    ("a-desc and b-desc swapped", NARROW, r"\}, ?(%rd\d+), (%rd\d+), p,", r"}, \2, \1, p,"),
    ("scale-d false", DOWN, r"setp\.eq\.u32 p, 0, 0", "setp.eq.u32 p, 0, 1"),
    ("imm-scale-b -1", DOWN, r"p, 1, 1, 0, 0;", "p, 1, -1, 0, 0;"),
    ("two accumulators swapped", DOWN, r"(mma_async\S+\s*\{)(%\w+),\s*(%\w+),", r"\1\3,\2,"),
    ("SBO 1024 -> 512", DOWN, str(K_MAJOR), str(1 << 62 | 32 << 32 | 1 << 16)),
    ("swizzle of 128 -> 64 bytes", DOWN, str(K_MAJOR), str(2 << 62 | 64 << 32 | 1 << 16)),
    ("a base offset", DOWN, str(K_MAJOR), str(K_MAJOR | 1 << 49)),
    ("LBO and SBO swapped, MN-major", WEIGHT, str(MN_MAJOR), str(1 << 62 | 512 << 32 | 64 << 16)),
    ("ldmatrix without .trans", WARP_BACK, r"\.x4\.trans", ".x4"),
    ("mma: B's registers swapped", WARP,
     r"(mma\.sync\S+\s*\{[^}]*\}, \{[^}]*\}, )\{(%r\d+),\s*(%r\d+)\}", r"\1{\3,\2}"),
    ("mma: A's registers 1 and 2 swapped", WARP,
     r"(mma\.sync\S+\s*\{[^}]*\}, )\{(%r\d+),\s*(%r\d+),\s*(%r\d+),\s*(%r\d+)\}", r"\1{\2,\4,\3,\5}"),
    ("cp.async: src-size is always 16", WARP, r"(cp\.async\.cg\S+ \[[^]]*\], \[[^]]*\], 16), %r\d+;", r"\1, 16;"),
    ("cp.async.wait_group 0 -> 1", WARP, r"cp\.async\.wait_group 0;", "cp.async.wait_group 1;"),
    ("copies that are never committed", WARP, r"cp\.async\.commit_group;", ""),
    ("attention: no wait for keys and values", FORWARD, r"cp\.async\.wait_group 0;", "cp.async.wait_group 1;"),
    ("attention: no barriers", FORWARD, BARRIER, ""),
    ("attention: values loaded by columns", FORWARD, r"\.x4\.trans", ".x4"),
    ("attention: lanes keep their own maximum and sum", FORWARD,
     r"(shfl\.sync\.bfly\.b32\s+\S+, )(%r\d+), %r\d+", r"\1\2, 0"),
    ("dk, dv: no barrier in the loop", KV, rf"(wait_group 0;\s*){BARRIER}", r"\1"),
    ("dq: no wait in the loop", Q, r"cp\.async\.wait_group 0;", ""),
    ("dq: queries loaded transposed", Q, r"\.x4\.shared", ".x4.trans.shared"),
]
