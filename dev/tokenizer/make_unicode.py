#!/usr/bin/env python3
"""Writes dev/lib/unicode.h, what tokenizers ask of Unicode's characters: as `tokenizers` knows them, which is an older
Unicode than Python's. With --check: says whether the file is that, for the version that is installed."""
import pathlib
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-"
PATH = pathlib.Path(__file__).parents[1] / "lib/unicode.h"
SURROGATES = range(0xD800, 0xE000)
HANGUL = range(0xAC00, 0xD7A4)                          # is made and taken apart by arithmetic
CHARACTERS = [chr(c) for c in range(0x110000) if c not in SURROGATES]
nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str


def number(n):
    text = ""
    while n >= 32:
        text += DIGITS[32 + n % 32]
        n //= 32
    return text + DIGITS[n]


def literal(name, text, meaning):
    lines = [text[i:i + 112] for i in range(0, len(text), 112)]
    return f"// {meaning}\nstatic const char {name}[] =\n" + "\n".join(f'    "{line}"' for line in lines) + ";\n"


def runs(values):
    """(from, to, value) of each run of characters of one value; values: character -> value, those without left out."""
    found = []
    for c in sorted(map(ord, values)):
        if found and found[-1][1] == c and found[-1][2] == values[chr(c)]:
            found[-1][1] = c + 1
        else:
            found.append([c, c + 1, values[chr(c)]])
    return found


def runs_text(values, entry):
    """The distance from the run before, the length, and what entry says of the run, one after the other."""
    text, last = "", 0
    for begin, end, value in runs(values):
        text, last = text + number(begin - last) + number(end - begin) + entry(range(begin, end), value), end
    return text


def found_by(expression):
    """The characters that an expression finds."""
    cut = pre_tokenizers.Split(Regex(expression), "removed")
    return {c: 1 for c in CHARACTERS if not cut.pre_tokenize_str(c)}


def combining_classes():
    """Those of the marks that `tokenizers` puts in order, between the classes 240 and 1, as ranks from 1 on."""
    known = {c: unicodedata.combining(c) for c in CHARACTERS
             if unicodedata.combining(c) and nfd(f"\u0345{c}\u0334") != f"\u0345{c}\u0334"}
    ranks = {class_: i for i, class_ in enumerate(sorted(set(known.values())), 1)}
    return {c: ranks[class_] for c, class_ in known.items()}


def decompositions(parts):
    """character -> its canonical decomposition into so many characters, where `tokenizers` has it."""
    found = {}
    for c in CHARACTERS:
        made_of = unicodedata.decomposition(c).split()
        if len(made_of) == parts and made_of[0][0] != "<" and ord(c) not in HANGUL and nfd(c) != c:
            found[c] = [int(part, 16) for part in made_of]
    return found


def decompositions_text(parts):
    found, before, seconds = decompositions(parts), [0] * parts, []

    def entry(characters, _):
        text = ""
        for c in map(chr, characters):
            first = found[c][0]
            distance = first - before.pop(0)
            before.append(first)
            text += number(2 * distance if distance >= 0 else -2 * distance - 1)
            if parts == 2:
                second = 2 * found[c][1] + (nfc(c) != c)
                new = second not in seconds
                if new:
                    seconds.append(second)
                text += number(seconds.index(second)) + (number(second) if new else "")
        return text

    return runs_text(dict.fromkeys(found, 1), entry)


def header():
    nothing = lambda characters, value: ""
    return f"""// unicode.h: what tokenizers ask of characters. Made by dev/tokenizer/make_unicode.py with tokenizers
// {tokenizers.__version__}.
#pragma once

// Each text is runs of characters, from U+0000 on: how many characters are between it and the run before, and its
// length. Numbers are written in base 32, lowest digit first: digits 0 to 31 of "A-Za-z0-9+-" end a number, 32 to 63
// are followed.
""" + literal("unicode_letters", runs_text(found_by(r"\p{L}"), nothing), "\\p{L}") \
        + literal("unicode_numbers", runs_text(found_by(r"\p{N}"), nothing), "\\p{N}") \
        + literal("unicode_marks", runs_text(combining_classes(), lambda characters, rank: DIGITS[rank]),
                  "then a digit, 1 to 63: the rank of the run's canonical combining class") \
        + literal("unicode_pairs", decompositions_text(2),
                  "then for each character of the run the two that it is made of: of the first its distance d from "
                  "the first of the\n// pair before the last one, as 2 d or, if negative, -2 d - 1; the second is one "
                  "of the numbers told so far, which are\n// counted, or the one that follows: twice the second, "
                  "plus 1 where NFC keeps the two apart") \
        + literal("unicode_singles", decompositions_text(1),
                  "then for each the one character that it stands for: its distance from the last one, so written")


def main():
    text = header()
    if "--check" in sys.argv:
        sys.exit(0 if PATH.read_text() == text else
                 f"{PATH} is not what tokenizers {tokenizers.__version__} knows; make it with {sys.argv[0]}")
    PATH.write_text(text)


if __name__ == "__main__":
    main()
