#!/usr/bin/env python3
"""Writes dev/lib/unicode.h, what tokenizers ask of Unicode's characters: letters and numbers as the expressions of
`tokenizers` find them, the rest from Python's own table. With --check: says whether the file is that, for these
versions."""
import pathlib
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, pre_tokenizers

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-"


def number(n):
    text = ""
    while n >= 32:
        text += DIGITS[32 + n % 32]
        n //= 32
    return text + DIGITS[n]


def table(name, wanted, meaning):
    text, last, inside = "", 0, False
    for c in range(0x110001):
        now = c < 0x110000 and wanted(chr(c))
        if now != inside:
            text, last, inside = text + number(c - last), c, now
    lines = [text[i:i + 112] for i in range(0, len(text), 112)]
    return f"// {meaning}\nstatic const char {name}[] =\n" + "\n".join(f'    "{line}"' for line in lines) + ";\n"


def second_in_composition():
    found = {chr(c) for c in [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]}     # Hangul
    for c in map(chr, range(0x110000)):
        parts = unicodedata.decomposition(c).split()
        if len(parts) == 2 and not parts[0].startswith("<") and unicodedata.normalize("NFC", c) == c:
            found.add(chr(int(parts[1], 16)))
    return found


seconds = second_in_composition()
surrogate = range(0xD800, 0xE000)


def found_by(expression):
    """Whether an expression finds a character."""
    cut = pre_tokenizers.Split(Regex(expression), "removed")
    return lambda c: ord(c) not in surrogate and not cut.pre_tokenize_str(c)


text = f"""// unicode.h: what tokenizers ask of characters. Made by dev/tokenizer/make_unicode.py with tokenizers
// {tokenizers.__version__} and Unicode {unicodedata.unidata_version}.
#pragma once

// Each text is the lengths of the runs of characters that are not and are of a kind, in turns, from U+0000 on. Numbers
// are written in base 32, lowest digit first: digits 0 to 31 of "A-Za-z0-9+-" end a number, 32 to 63 are followed.
""" + table("unicode_letters", found_by(r"\p{L}"), "\\p{L}") \
    + table("unicode_numbers", found_by(r"\p{N}"), "\\p{N}") \
    + table("unicode_marks", lambda c: unicodedata.combining(c) != 0, "combining: their order matters to NFC") \
    + table("unicode_not_nfc", lambda c: ord(c) not in surrogate and
            (c in seconds or unicodedata.normalize("NFC", c) != c), "what NFC changes, or may change after others")
path = pathlib.Path(__file__).parents[1] / "lib/unicode.h"
if "--check" in sys.argv:
    sys.exit(0 if path.read_text() == text else f"{path} is not what Unicode {unicodedata.unidata_version} makes of it")
path.write_text(text)
