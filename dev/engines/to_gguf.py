#!/usr/bin/env python3
"""A model's directory as a GGUF file, by llama.cpp's own converter; also where that does not know the tokenizer.

    python3 dev/engines/to_gguf.py LLAMA_CPP DIR OUT.gguf [options of the converter, such as --outtype f32]

LLAMA_CPP is a copy of llama.cpp's repository; its converter wants pip install gguf sentencepiece torch transformers. It
knows how a tokenizer cuts words by a hash, and stops at one that it has not seen. Here such a one is told to be gpt-2,
if that is so: a byte-level tokenizer with GPT-2's rule (those of data/train_bpe.py), or of bytes, which joins nothing.
"""
import json
import pathlib
import runpy
import sys

# The one merge of a byte model, of bytes that no text has: whatever the rule, nothing is joined.
IMPOSSIBLE = [["À", "Á"]]


def cut_as_gpt2(directory):
    """Whether GPT-2's rule gives this tokenizer's tokens: it is byte-level and cuts by that rule, or joins nothing."""
    tokenizer = json.loads((pathlib.Path(directory) / "tokenizer.json").read_text())
    cut = tokenizer.get("pre_tokenizer") or {}
    merges = [m.split(" ") if isinstance(m, str) else m for m in tokenizer["model"].get("merges", [])]
    return not tokenizer.get("normalizer") and cut.get("type") == "ByteLevel" and not cut.get("add_prefix_space") and \
        (cut.get("use_regex", True) or merges == IMPOSSIBLE)


def convert(llama_cpp, directory, out, *options):
    sys.path[:0] = [str(llama_cpp), str(pathlib.Path(llama_cpp) / "gguf-py")]
    from conversion.base import TextModel
    known = TextModel.get_vocab_base_pre

    def rule_of(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if cut_as_gpt2(directory):
                return "gpt-2"
            sys.exit(f"{directory}: tokenizer.json cuts words by a rule that llama.cpp's converter does not know, and "
                     "that is not GPT-2's")

    TextModel.get_vocab_base_pre = rule_of
    sys.argv = ["convert_hf_to_gguf.py", str(directory), "--outfile", str(out), *options]
    runpy.run_path(str(pathlib.Path(llama_cpp) / "convert_hf_to_gguf.py"), run_name="__main__")


def main():
    if len(sys.argv) < 4 or not (pathlib.Path(sys.argv[1]) / "convert_hf_to_gguf.py").is_file():
        sys.exit("usage: to_gguf.py LLAMA_CPP DIR OUT.gguf [options]; LLAMA_CPP has convert_hf_to_gguf.py")
    convert(*sys.argv[1:])


if __name__ == "__main__":
    main()
