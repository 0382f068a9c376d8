#!/usr/bin/env python3
"""The table of METHODS.md, made from upcycle.c: the rows of `methods`, and the comment above the function of each.

    python3 dev/upcycle/methods.py             writes it
    python3 dev/upcycle/methods.py --check     fails if the page has another one
"""
import os
import pathlib
import re
import sys

FOLDER = pathlib.Path(__file__).resolve().parent
SOURCES = {path: path.read_text() for path in [FOLDER.parents[1] / "upcycle.c", *sorted(FOLDER.glob("*.h"))]}


def explained(function):
    """A link to a function's line, and the comment above it as one line; or those of the operator that it calls."""
    for path, text in SOURCES.items():
        above, found, body = text.partition(f"\nstatic void {function}(")
        comment = []
        for line in reversed(above.splitlines() if found else []):
            if not line.startswith("//"):
                break
            comment.insert(0, line[2:].strip())
        operator = re.search(r"operator_\w+", body.split("\n}\n")[0])
        if found and not comment and operator:
            return explained(operator[0])
        if comment:
            line = above.count("\n") + 2
            link = f"{os.path.relpath(path, FOLDER)}#L{line}"
            return f"[`{function}`]({link}), {path.name}:{line}", " ".join(comment).replace("|", "\\|")
    sys.exit(f"{function}: no such function with a comment above it")


def table():
    text = next(iter(SOURCES.values()))
    rows = text.split("static const Method methods[] = {\n")[1].split("\n};")[0].split("}};")[0]
    yield "| name | here | the line that does it | from |"
    yield "|---|---|---|---|"
    for row in re.split(r"\n    (?=\{\")", "\n" + rows)[1:]:
        name, function = re.match(r'\{"([a-z-]+)", [A-Z_| ]+,\s*(\w+)', row).groups()
        place, comment = explained(function)
        paper = re.findall(r'"([^"]*)"', row)[-1]
        yield f"| `{name}` | {comment} | {place} | {paper} |"


def main():
    page = FOLDER / "METHODS.md"
    text = page.read_text()
    before, rest = text.split("<!-- methods.py -->\n")
    after = rest[rest.index("\n\n"):]
    new = before + "<!-- methods.py -->\n" + "\n".join(table()) + after
    if "--check" in sys.argv:
        sys.exit(new != text and f"{page.name} has another table; python3 dev/upcycle/methods.py writes it")
    page.write_text(new)


if __name__ == "__main__":
    main()
