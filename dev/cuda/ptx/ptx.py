"""Reads the PTX that nvcc prints: Module(text).kernel(name) is a Kernel, whose code is a list of Instructions.

Only what train_moe.cu's kernels contain is understood (PTX ISA 4, Syntax; 5.4, Variables; 6, Operands); anything else
is an error, never passed over.
"""
import re

import numpy as np

TYPES = {"pred": np.bool_, "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16,
         "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64,
         "s64": np.int64, "b64": np.uint64, "f64": np.float64}
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in TYPES.items()}
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$")       # PTX ISA 10, Special Registers


def split(text):
    """Cuts at commas that are not inside of brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return parts + [current.strip()] if current.strip() else parts


def closing(text, start):
    """The place of the brace that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    raise ValueError("a brace is never closed")


class Instruction:
    """name: `mma.sync. ...`; parts: that, cut at its points; guard: (register, negated) or None; operands: tuples that
    begin with their kind; registers: the numbers of all that it names; target: where a branch leads."""
    __slots__ = ("text", "name", "parts", "guard", "operands", "registers", "target", "run")


class Kernel:
    """One .entry: its parameters {name: (offset, bytes)}, static shared variables {name: (alignment, bytes)}, the bits
    of each register (1: a predicate) and its code. block_end[i] is where the straight code that holds i ends."""

    def __init__(self, name, head, directives, body):
        self.name, self.parameters, self.shared, self.bits, self.code = name, {}, {}, [], []
        self.parameter_bytes = 0
        for parameter in split(head):
            m = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+.*?)?([\w$]+)(?:\[(\d+)\])?$",
                         " ".join(parameter.split()))
            size = SIZES[m[2]] * int(m[4] or 1)
            align = int(m[1] or size)
            offset = -(-self.parameter_bytes // align) * align
            self.parameters[m[3]] = (offset, size)
            self.parameter_bytes = offset + size
        m = re.search(r"\.maxntid\s+(\d+)", directives)
        self.threads = int(m[1]) if m else 1024
        self.scopes, labels = [{}], {}
        for kind, text in statements(body):
            if kind == "{":
                self.scopes.append({})
            elif kind == "}":
                self.scopes.pop()
            elif kind == "label":
                labels[text] = len(self.code)
            elif text.startswith(".reg"):
                self.declare(text)
            elif text.startswith(".shared"):
                m = re.match(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", text)
                self.shared[m[3]] = (int(m[1]), SIZES[m[2]] * int(m[4] or 1))
            elif not text.startswith(".pragma"):
                self.code.append(self.instruction(text))
        leaders = {0, *labels.values()}
        for at, ins in enumerate(self.code):
            if ins.parts[0] == "bra":
                ins.target = labels[ins.operands[0][1]]
            if ins.parts[0] in ("bra", "ret", "bar"):
                leaders.add(at + 1)
        end = len(self.code)
        self.block_end = [0] * end
        for at in reversed(range(len(self.code))):
            self.block_end[at] = end
            end = at if at in leaders else end
        seen = {}
        self.row = []           # of each register among those of its width
        for bits in self.bits:
            self.row.append(seen.get(bits, 0))
            seen[bits] = self.row[-1] + 1
        self.uses_wgmma = any(ins.parts[0] == "wgmma" for ins in self.code)

    def declare(self, text):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text).groups()
        for name in split(names):
            many = re.match(r"(%?\w+)<(\d+)>$", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][each] = len(self.bits)
                self.bits.append(1 if kind == "pred" else int(kind[1:]))

    def register(self, name):
        """The number of a register, by the innermost declaration, or None."""
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def instruction(self, text):
        ins = Instruction()
        ins.text, ins.guard, ins.target, ins.run = text, None, None, None
        m = re.match(r"@(!?)(%?\w+)\s+(.*)$", text)
        if m:
            ins.guard, text = (self.register(m[2]), m[1] == "!"), m[3]
        ins.name, rest = re.match(r"(\S+)\s*(.*)$", text).groups()
        ins.parts = ins.name.split(".")
        ins.operands = [self.operand(x) for x in split(rest)]
        ins.registers = frozenset(r for o in ins.operands for r in registers_of(o))
        return ins

    def operand(self, text):
        if text[0] == "{":
            return ("vector", [self.operand(x) for x in split(text[1:-1])])
        if text[0] == "[":
            base, offset = re.match(r"\[\s*(.+?)\s*(?:\+\s*(-?\d+))?\s*\]$", text).groups()
            return ("memory", self.operand(base), int(offset or 0))
        if text[0] == "!":
            return ("not", self.operand(text[1:]))
        if "|" in text:
            return ("pair", *(self.operand(x) for x in text.split("|")))
        if re.match(r"0[fF][0-9A-Fa-f]{8}$|0[dD][0-9A-Fa-f]{16}$", text):
            return ("bits", int(text[2:], 16))
        if re.match(r"-?(0x[0-9a-fA-F]+|\d+)$", text):
            return ("integer", int(text, 0))
        if SPECIAL.match(text):
            return ("special", text)
        number = self.register(text)
        return ("name", text) if number is None else ("register", number)


def registers_of(operand):
    kind = operand[0]
    if kind == "register":
        return [operand[1]]
    inner = operand[1] if kind == "vector" else operand[1:3] if kind in ("memory", "not", "pair") else []
    return [r for x in inner if isinstance(x, tuple) for r in registers_of(x)]


def statements(body):
    """Yields ("{", ""), ("}", ""), ("label", name) and ("statement", text) in their order."""
    current = ""
    for c in re.sub(r"//[^\n]*", "", body):
        if c in "{}" and not current.strip():
            yield c, ""
        elif c == ";":
            yield "statement", " ".join(current.split())
        elif c == ":" and re.fullmatch(r"\s*[\w$]+\s*", current):
            yield "label", current.strip()
        else:
            current += c
            continue
        current = ""


class Module:
    def __init__(self, text):
        self.text = re.sub(r"//[^\n]*", "", text)
        self.dynamic = {m[2]: int(m[1]) for m in
                        re.finditer(r"\.extern \.shared \.align (\d+) \.b8 ([\w$]+)\[\]", self.text)}
        self.entries = {m[1]: m.start() for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", self.text)}

    def cut(self, name):
        """The text of an entry: parameters, directives, body."""
        start = self.entries[name]
        first = self.text.index("(", start)
        last = self.text.index(")", first)
        brace = self.text.index("{", last)
        return (self.text[first + 1:last], self.text[last + 1:brace],
                self.text[brace + 1:closing(self.text, brace)])

    def kernel(self, name, change=None):
        """The kernel of that name; change(body) may plant a defect, and must change something."""
        head, directives, body = self.cut(name)
        changed = change(body) if change else body
        if change and changed == body:
            raise ValueError("the change changes nothing")
        return Kernel(name, head, directives, changed)
