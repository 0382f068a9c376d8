#!/usr/bin/env python3
"""Opens what ./train_moe and ./upcycle write as users do: transformers, vLLM's choice of files, lm_eval if installed.

    python3 dev/engines/files.py            in the repository, after `make`; under a minute

Ends with `N passed, N failed`. The models are tiny and read bytes. What is checked of each directory: AutoTokenizer
gives the bytes of any text and takes them back; generate continues a text greedily as train_moe does; the *.safetensors
beside the model hold nothing but its tensors (vLLM loads them all); keys that other programs want; the model card.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from safetensors import safe_open

from to_gguf import cut_as_gpt2

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXTS = ["Once upon a time, there was  a 'test'.\r\n\t", "Ā ÿ À Á ÀÁ ĀÀÁÿ Ġ Ċ", "日本語 🎉 e\u0301\u200d\ufeff", "\0 0\0",
         "<|endoftext|> <s> [PAD]", "".join(map(chr, range(0x3000))), " leading and trailing "]
passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("FAILED", what)


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr.decode()}")
    return done.stdout


def check_directory(directory, name):
    config = json.loads((directory / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    check(len(tokenizer) == 256 == config["vocab_size"], f"{name}: {len(tokenizer)} tokens")
    ends = tokenizer.eos_token_id, tokenizer.bos_token_id, config["eos_token_id"]
    check(ends == (0, None, None), f"{name}: end of text {ends}")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        check(ids == list(text.encode()), f"{name}: ids of {text[:20]!r}")
        check(tokenizer.decode(ids) == text, f"{name}: {text[:20]!r} comes back")
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        check(not any(report.values()), f"{name}: {report}")
        prompt = tokenizer("Permission is hereby", return_tensors="pt")
        text = tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0])
        ours = run("./train_moe", "--model", directory, "--prompt", "Permission is hereby", "--tokens", 40,
                   "--temperature", 0)
        ends = text if text.endswith("\n") else text + "\n"         # a sample ends its line
        check(ends.encode() == ours, f"{name}: generate says {text!r}, train_moe {ours!r}")
        longer = config["max_position_embeddings"] + 6
        length = model.generate(tokenizer("A" * longer, return_tensors="pt")["input_ids"]).shape[1]
        check(length == longer + 256, f"{name}: generate adds 256 tokens to any prompt, not {length - longer}")
    except Exception as problem:
        check(False, f"{name}: {problem!r}")
    # vLLM: without an index every *.safetensors of the directory is loaded, with one those that it names
    index = directory / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else \
        {path.name for path in directory.glob("*.safetensors")}
    tensors = [key for file in files for key in safe_open(directory / file, "pt").keys()]
    check(tensors and not [key for key in tensors if ".exp_avg" in key], f"{name}: tensors that vLLM would load")
    if config["model_type"].startswith("qwen3"):
        check(config["max_window_layers"] == config["num_hidden_layers"] and config["use_sliding_window"] is False,
              f"{name}: keys that mistral.rs wants")
    card = (directory / "README.md").read_text()
    check(card.startswith("---\n") and "## Commands" in card and config["architectures"][0] in card, f"{name}: card")
    check((directory / "generation_config.json").exists(), f"{name}: generation_config.json")


def main():
    work = pathlib.Path(tempfile.mkdtemp())
    options = "--data LICENSE --val none --steps 40 --batch 4 --seq 64 --layers 2 --hidden 64 --lr 0.01".split()
    kinds = {"qwen3_moe": "--experts 4", "qwen3": "--dense", "mixtral": "--arch mixtral --experts 4",
             "llama": "--arch mixtral --dense", "olmoe": "--arch olmoe --experts 4",
             "dots1": "--router sigmoid --experts 4"}
    for name, more in kinds.items():
        run("./train_moe", *options, *more.split(), "--out", work / name)
        check_directory(work / name, name)
    run("./upcycle", work / "llama", work / "upcycled", "--experts", 4, "--optimizer", "copy", "--shard-size", "100K")
    check_directory(work / "upcycled", "upcycled")
    olmoe = json.loads((work / "olmoe" / "config.json").read_text())
    check(olmoe["norm_topk_prob"] is False and olmoe["num_key_value_heads"] == olmoe["num_attention_heads"] and
          olmoe["rms_norm_eps"] == 1e-5, "olmoe: what vLLM and llama.cpp compute")
    # what to_gguf.py may tell llama.cpp's converter: bytes and GPT-2's rule, not Qwen2's, nor one after a normalizer
    cut = json.loads((work / "llama" / "tokenizer.json").read_text())
    check(cut_as_gpt2(work / "llama"), "a byte model is cut as GPT-2's")
    for what, pre, normalizer, fits in (
            ("GPT-2's rule", {"type": "ByteLevel", "add_prefix_space": False}, None, True),
            ("a space before", {"type": "ByteLevel", "add_prefix_space": True}, None, False),
            ("Qwen2's rule", {"type": "Sequence", "pretokenizers": []}, None, False),
            ("a normalizer", {"type": "ByteLevel"}, {"type": "NFC"}, False),
            ("no rule, and merges", {"type": "ByteLevel", "use_regex": False}, None, False)):
        cut["model"]["merges"] = ["a b"]
        (work / "tokenizer.json").write_text(json.dumps(cut | {"pre_tokenizer": pre, "normalizer": normalizer}))
        check(cut_as_gpt2(work) == fits, f"GGUF: {what}")
    # what transformers saves anew is still known as bytes
    transformers.AutoTokenizer.from_pretrained(work / "qwen3_moe").save_pretrained(work / "resaved")
    transformers.AutoModelForCausalLM.from_pretrained(work / "qwen3_moe").save_pretrained(work / "resaved")
    prompt = ["--prompt", "Permission", "--tokens", 20, "--temperature", 0]
    texts = [run("./train_moe", "--model", work / name, *prompt) for name in ("qwen3_moe", "resaved")]
    check(texts[0] == texts[1], "saved again by transformers: the same text")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
