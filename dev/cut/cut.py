#!/usr/bin/env python3
"""Cuts kernels out of the programs, as files that compile alone:  dev/cut/cut.py [NAME.cu|NAME.c ...]

Each file of dev/cut is a manual, a test and a benchmark, and has one line `// cut: NAME ...`. In its place in
build/cut/FILE come the definitions of these names from train_moe.cu or train_moe.c with the headers that they include,
and of all names that those use, with their comments, in the order of the sources. What the file itself defines before
that line takes the place of the sources' (`die`, say). A name with several definitions (overloads, branches of #if)
brings all of them. The sources are not run through a compiler: a definition at the outermost level is found by its
brackets, a use is a name that is not behind a dot.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev/cuda/standin"))
from translate import blank, closing  # noqa: E402

HERE, OUT = ROOT / "dev/cut", ROOT / "build/cut"
TEMPLATES = sorted(path.name for path in HERE.glob("*.c*") if path.suffix in (".c", ".cu"))
INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
# what stands around a name that is being defined, and defines nothing itself
AROUND = re.compile(r"\b(?:__attribute__|__launch_bounds__|__align__|alignas)\s*(?=\()")


class Group:
    """An #if with its branches. `guard`: it only keeps a header from being read twice."""
    def __init__(self, parent, guard):
        self.parent, self.guard, self.wanted, self.names = parent, guard, False, 0


class Item:
    """A definition, declaration, directive or free-standing comment: the lines first .. last of a file."""
    def __init__(self, path, first, lines, code, group, kind):
        self.path, self.first, self.last, self.lines = path, first, first + len(lines) - 1, lines
        self.code, self.group, self.kind, self.wanted = code, group, kind, False
        self.names = defined(code) if kind == "code" else re.findall(r"#\s*(?:define|undef)\s+(\w+)", code)


def without_brackets(code, keep=""):
    """The code at the outermost level: what stands in brackets is left out, and so are the brackets but (."""
    out, i = "", 0
    while i < len(code):
        if code[i] in "([{" and code[i] not in keep:
            out += code[i]
            i = closing(code, i)
        else:
            out += code[i]
            i += 1
    return out


def defined(code):
    """The names that a piece of code at the outermost level defines or declares."""
    code, names = code.strip(), []
    template = re.match(r"template\s*<", code)
    if template:
        depth, i = 1, template.end()
        while depth:
            depth += (code[i] == "<") - (code[i] == ">")
            i += 1
        code = code[i:].strip()
    while (m := AROUND.search(code)):
        code = code[:m.start()] + " " + code[closing(code, m.end()):]
    if re.match(r"(?:static_assert|_Static_assert)\b", code):
        return []
    record = re.match(r"(typedef\s+)?(?:struct|union|class|enum(?:\s+class)?)\b\s*(\w*)[^;{(=]*([;{])", code)
    if record:
        names += [record.group(2)] if record.group(2) else []
        if record.group(3) == ";":
            return names + (code[:record.end()].rstrip(" ;").split()[-1:] if record.group(1) else [])
        body = record.end() - 1
        end = closing(code, body)
        if "enum" in code[:body]:
            names += re.findall(r"(?:^|,)\s*(\w+)", without_brackets(code[body + 1:end - 1]))
        return names + re.findall(r"(\w+)\s*(?:\[|[,;=]|$)", without_brackets(code[end:]))
    if code.startswith("typedef"):
        return [re.findall(r"\w+", without_brackets(code).replace("(", " ").replace("[", " "))[-1]]
    if (pointer := re.match(r"[^=;({]*\(\s*\*\s*(\w+)", code)):      # to a function
        return [pointer.group(1)]
    plain = without_brackets(code)
    function = re.match(r"[^=;{(]*?([\w]+)\s*\(", plain)
    if function:
        return [function.group(1)]
    plain = re.sub(r"<[^<>;]*>", " ", plain)
    return re.findall(r"(\w+)\s*(?:\[\s*)*(?:=[^,;]*)?[,;]", plain)


def uses(item):
    """The names that it mentions: not members, and not what only stands in comments."""
    return set(re.findall(r"(?<![\w.])(?<!->)[A-Za-z_]\w*", item.code)) - set(item.names)


def parse(path, seen, items, group):
    """Adds the items of a file, and in their places those of the files that it includes in quotes."""
    if path in seen:
        return group
    seen.add(path)
    text = path.read_text()
    lines, bare = text.split("\n"), blank(text).split("\n")
    inside = {text.count("\n", 0, m.start()) + n for m in re.finditer(r"/\*.*?\*/", text, re.S)
              for n in range(m.group().count("\n"))}    # of a comment over several lines
    n, comment = 0, None            # comment: where the comment lines begin that stand directly above line n

    def add(first, end, kind):
        items.append(Item(path, first, lines[first:end], "\n".join(bare[first:end]), group, kind))

    while n < len(lines):
        if not bare[n].strip():                     # empty, or a comment
            if lines[n].strip() or n in inside:
                comment = n if comment is None else comment
            elif comment is not None:
                add(comment, n, "comment")
                comment = None
            n += 1
            continue
        first, begin, depth = (n if comment is None else comment), n, 0
        comment = None
        directive = re.match(r"\s*#\s*(\w+)(.*)", bare[n])
        if directive:
            while lines[n].endswith("\\"):
                n += 1
            n += 1
            word, included = directive.group(1), INCLUDE.match(lines[begin])
            if included:
                name = included.group(1)
                target = next((p for p in (path.parent / name, ROOT / name) if p.exists()), None)
                # (the text that is built in is not there before `make`; kernels need nothing of the CPU's program)
                if target and name != "train_moe.c":
                    group = parse(target.resolve(), seen, items, group)
            elif word in ("if", "ifdef", "ifndef"):
                guard = word == "ifndef" and re.match(r"\s*#\s*define\s+\w+\s*$", bare[n] if n < len(bare) else "")
                group = Group(group, bool(guard))
                add(first, n, "if")
            elif word in ("else", "elif"):
                add(begin, n, "if")
            elif word == "endif":
                add(begin, n, "if")
                group = group.parent
            elif word in ("define", "undef", "error", "include", "pragma") and "once" not in bare[begin]:
                add(first, n, word)
            continue
        while True:                                 # a definition ends with a ; or } outside of all brackets
            if depth == 0 and re.match(r"\s*#", bare[n]):   # an attribute of its own under #if: nobody's definition
                break
            if not re.match(r"\s*#", bare[n]):
                depth += sum((c in "([{") - (c in ")]}") for c in bare[n])
            elif lines[n].endswith("\\"):
                while lines[n].endswith("\\"):
                    n += 1
            n += 1
            if depth == 0 and re.search(r"[;}]\s*$", bare[n - 1]):
                break
        add(first, n, "code")
    return group


def sources(program):
    """All items of a program, and which of them define a name."""
    items, where = [], {}
    parse(ROOT / program, set(), items, None)
    for item in items:
        for name in item.names:
            where.setdefault(name, []).append(item)
        group = item.group
        while group and item.kind != "if":
            group.names += len(item.names)
            group = group.parent
    return items, where


def select(items, where, names, own):
    """Marks what the names need. `own` are the names that are defined already."""
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        for item in where.get(name, ()) if name not in own else ():
            if item.wanted:
                continue
            item.wanted, group = True, item.group
            waiting += uses(item)
            while group and not group.wanted:
                group.wanted = True
                if not group.guard:
                    waiting += [word for other in items if other.kind == "if" and other.group is group
                                for word in uses(other)]
                group = group.parent
    following = None
    for item in reversed(items):
        if item.kind == "error":                    # a refusal goes with the branch that it stands in
            outer = item.group.parent if item.group else None
            while outer and outer.guard:
                outer = outer.parent
            if outer and outer.wanted and not item.group.names:
                item.wanted = item.group.wanted = True
        elif item.kind == "include":                # one under #if goes with what else is wanted there
            item.wanted |= bool(item.group and item.group.wanted and not item.group.guard)
        elif item.kind == "comment":
            # a text goes with what follows it, unless it is a heading: a line, and nothing below it
            text = [line for line in item.lines if not re.match(r"// ?-+$", line)]
            item.wanted = bool(following and following.wanted and len(text) > (len(text) < len(item.lines)))
        if item.kind in ("code", "define"):
            following = item


def emit(items):
    """The text of what is wanted."""
    out, last = [], None
    for item in items:
        if not (item.group.wanted and not item.group.guard if item.kind == "if" else item.wanted):
            continue
        if last and (item.path != last.path or item.first != last.last + 1):
            out.append("")
        if item.kind == "comment":                  # sections have numbers in the program, and a line above
            out += [re.sub(r"^// \d+\. ", "// ", line) for line in item.lines if not re.match(r"// ?-+$", line)]
        else:
            out += item.lines
        last = item
    return out


def cut(name, programs):
    """Writes build/cut/NAME; returns its number of lines."""
    program = "train_moe.cu" if name.endswith(".cu") else "train_moe.c"
    if program not in programs:
        programs[program] = sources(program)
    items, where = programs[program]
    for item in items:
        item.wanted, group = False, item.group
        while group:
            group.wanted, group = False, group.parent
    lines = (HERE / name).read_text().splitlines()
    support = {m.group(1): sources(f"dev/cut/{m.group(1)}") for m in map(INCLUDE.match, lines) if m}
    own = {name: items for _, where in support.values() for name, items in where.items()}
    marks = [n for n, line in enumerate(lines) if line.startswith("// cut: ")]
    names = [word for n in marks for word in lines[n][len("// cut: "):].split()]
    missing = [word for word in names if word.strip("-") not in where]
    if missing:
        sys.exit(f"dev/cut/{name}: nothing in {program} and its headers is called {', '.join(missing)}")
    select(items, where, names, set(own) | {word[1:] for word in names if word[0] == "-"})
    text = emit(items)
    rest = [line for n, line in enumerate(lines) if n not in marks and not INCLUDE.match(line)]
    every = [item for items, _ in support.values() for item in items]
    for item in every:
        item.wanted, group = item.kind in ("include", "pragma"), item.group     # of the system's headers
        while group and item.wanted:
            group.wanted, group = True, group.parent
    select(every, own, re.findall(r"[A-Za-z_]\w*", blank("\n".join(text + rest))), ())
    out = []
    for n, line in enumerate(lines):
        if (m := INCLUDE.match(line)):
            out += emit(support[m.group(1)][0])
        elif n == marks[0]:
            out += [f"// Cut from {program} by dev/cut/cut.py: its lines, which are to be changed there.", "", *text]
        elif n not in marks:
            out.append(line)
    out += ["", "/*", *(ROOT / "LICENSE").read_text().splitlines(), "*/"]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / name).write_text("\n".join(out) + "\n")
    return len(out)


def main():
    wrong = [name for name in sys.argv[1:] if name not in TEMPLATES]
    if wrong:
        print(f"cut.py: {wrong[0]} is none of {', '.join(TEMPLATES)}", file=sys.stderr)
        return 2
    programs = {}
    for name in sys.argv[1:] or TEMPLATES:
        print(f"build/cut/{name}: {cut(name, programs)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
