#!/usr/bin/env python3
"""Translates a CUDA source file for the stand-in:  translate.py IN.cu > OUT.cpp

Only what is not C++ changes, and only by adding calls to standin.h:
    kernel<<<grid, block>>>(a, b)      ->  a standin::Launch, called with a function that calls the kernel, and a, b
    __shared__ float x[32];            ->  float (&x)[32] = a place in the block's shared memory
    extern __shared__ float x[];       ->  float* x = the block's dynamic shared memory
    __launch_bounds__(256) f(...) {    ->  a check of the block's size at the head of the body
Includes in quotes are looked for next to the file, then in the working directory. Those that end in .cu or .cuh are
translated too, in their place; others stay, with the full path if they were found. #line makes the compiler speak of
the original lines.
"""
import os
import re
import sys

# What is not code: comments, strings, characters. A ' behind a letter or digit separates digits.
NOT_CODE = re.compile(r'//(?:\\\n|[^\n])*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|'
                      r'"(?:\\.|[^"\\\n])*"|(?<!\w)\'(?:\\.|[^\'\\\n])+\'', re.S)
OPEN, CLOSE = "([{", ")]}"


def blank(text):
    """The text with everything that is not code replaced by spaces, so that places in both correspond."""
    return NOT_CODE.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def closing(code, i):
    """The place behind the bracket that closes the one at i."""
    depth = 0
    while True:
        if code[i] in OPEN:
            depth += 1
        elif code[i] in CLOSE:
            depth -= 1
            if not depth:
                return i + 1
        i += 1


def opening(code, i):
    """The place of the bracket that the one at i closes."""
    depth = 0
    while True:
        if code[i] in CLOSE:
            depth += 1
        elif code[i] in OPEN:
            depth -= 1
            if not depth:
                return i
        i -= 1


def template_opening(code, i):
    """The place of the < that the > at i closes."""
    depth = 0
    while True:
        if code[i] in CLOSE:
            i = opening(code, i)
        elif code[i] == ">":
            depth += 1
        elif code[i - 1:i + 1] == "<<":  # a shift
            i -= 1
        elif code[i] == "<":
            depth -= 1
            if not depth:
                return i
        i -= 1


def kernel_start(code, i):
    """Where the expression that ends before i, the kernel of a launch, begins."""
    while code[i - 1].isspace():
        i -= 1
    if code[i - 1] == ">":
        i = template_opening(code, i - 1)
        while code[i - 1].isspace():
            i -= 1
    while code[i - 1].isalnum() or code[i - 1] in "_:)]":
        i = opening(code, i - 1) if code[i - 1] in CLOSE else i - 1
    return i


def configuration_end(code, i):
    """The place of the >>> of a launch whose <<< ends at i."""
    while True:
        if code[i] in OPEN:
            i = closing(code, i)
        elif re.match(r">>>\s*\(", code[i:i + 1000]):
            return i
        else:
            i += 1


def split(code, text):
    """Splits at the commas that are outside of all brackets, < and > being brackets as well."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(code):
        depth += (c in OPEN + "<") - (c in CLOSE + ">")
        if c == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return parts + [text[begin:]]


def launch(text, code, i):
    """Translates the launch whose <<< is at i; returns (begin, end, translation)."""
    begin = kernel_start(code, i)
    end_configuration = configuration_end(code, i + 3)
    open_arguments = code.index("(", end_configuration)
    end = closing(code, open_arguments)
    kernel = " ".join(text[begin:i].split())
    lines = "\n" * text[begin:i].count("\n")
    configuration = text[i + 3:end_configuration]
    arguments = re.sub(r"\bNULL\b", "nullptr", text[open_arguments + 1:end - 1])  # NULL would become an integer
    comma = ", " if arguments.strip() else ""
    name = kernel.replace("\\", "\\\\").replace('"', '\\"')
    return begin, end, (f'standin::Launch("{name}", STANDIN_ADDRESS({kernel}), {configuration})('
                        f"[=](const auto&... standin_a) {{ {kernel}(standin_a...); }}{comma}{arguments}){lines}")


def shared(text, code, i):
    """Translates the declaration of shared memory that has __shared__ at i."""
    begin = i
    while code[begin - 1] not in ";{}":
        begin -= 1
    begin += re.match(r"(\s*#[^\n]*\n)*\s*", code[begin:i]).end()  # such as #pragma
    end = code.index(";", i) + 1
    declaration = code[begin:end - 1]
    alignment = re.search(r"\b(?:__align__|alignas)\s*(?=\()", declaration)
    align = "1"
    if alignment:
        close = closing(declaration, alignment.end())
        align = declaration[alignment.end() + 1:close - 1]
        declaration = declaration[:alignment.start()] + " " + declaration[close:]
    dynamic = re.search(r"\bextern\b", declaration)
    declaration = re.sub(r"\b(?:extern|static|__shared__)\b", "", declaration).strip()
    first, *others = split(declaration, declaration)
    head = re.match(r"(.*?)(\w+)\s*((?:\[.*\])?)\s*$", first, re.S)
    kind = head.group(1).strip()
    out = []
    for declarator in [first[head.start(2):]] + others:
        name, size = re.match(r"\s*(\w+)\s*(.*?)\s*$", declarator, re.S).groups()
        if dynamic:
            out.append(f"{kind}* {name} = ({kind}*)standin::dynamic_shared();")
        else:
            reference = f"(&{name}){size}" if size else f"&{name}"
            out.append(f"static __thread standin::SharedVariable standin_{name}; {kind} {reference} = "
                       f"({kind} (&){size})*(char*)standin::shared_variable(&standin_{name}, sizeof({kind}{size}), "
                       f"alignof({kind}) > {align} ? alignof({kind}) : {align});")
    return begin, end, " ".join(" ".join(out).split()) + "\n" * text[begin:end].count("\n")


def bounds(text, code, i):
    """Puts a check of __launch_bounds__, which is at i, at the head of the kernel's body."""
    open_bounds = code.index("(", i)
    end = closing(code, open_bounds)
    threads = split(code[open_bounds + 1:end - 1], text[open_bounds + 1:end - 1])[0]
    after = closing(code, code.index("(", end))
    brace = re.match(r"\s*\{", code[after:after + 1000])
    if not brace:
        return i, end, ""
    body = after + brace.end()
    return i, body, text[end:body] + f" standin::launch_bounds({threads});"


def rewrite(text):
    """Translates a piece of code."""
    code = blank(text)
    # from the last to the first, so that places before the one at hand stay valid
    for m in reversed(list(re.finditer(r"<<<|\b__shared__\b|\b__launch_bounds__\b", code))):
        translate = {"<": launch, "__s": shared, "__l": bounds}[m.group()[:1 if m.group()[0] == "<" else 3]]
        begin, end, new = translate(text, code, m.start())
        text = text[:begin] + new + text[end:]
        code = code[:begin] + blank(new) + code[end:]
    return text


def include(path, guards):
    """The translation of a file, with the files that it includes."""
    with open(path) as f:
        text = rewrite(f.read())
    code = blank(text)
    lines, folder, once = [f'#line 1 "{path}"'], os.path.dirname(path), None
    for number, (line, bare) in enumerate(zip(text.split("\n"), code.split("\n")), 1):
        m = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
        target = m and next(filter(os.path.exists, (os.path.join(folder, m.group(1)), m.group(1))), None)
        if bare.strip() and re.match(r"\s*#\s*pragma\s+once\b", bare):
            once = guards.setdefault(os.path.abspath(path), f"STANDIN_ONCE_{len(guards) + 1}")
            lines.append("")
        elif not target or not bare.strip():
            lines.append(line)
        elif target.endswith((".cu", ".cuh")):
            lines += [include(target, guards), f'#line {number + 1} "{path}"']
        else:
            lines.append(f'#include "{os.path.abspath(target)}"')
    body = "\n".join(lines)
    return f"#ifndef {once}\n#define {once}\n{body}\n#endif" if once else body


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(include(sys.argv[1], {}))
