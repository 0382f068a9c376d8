#!/usr/bin/env python3
"""What transformers makes of the windows that `./train_moe --eval` uses, or of a prompt: loss or tokens, and speed.

FILE is a token shard or a text. A text is encoded with DIR/tokenizer.json, or is bytes where there is none.
"""

import argparse
import math
import os
import time

import numpy as np
import torch

import encode
import hf

MAGICS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}


def read_tokens(path, directory):
    data = open(path, "rb").read()
    header = np.frombuffer(data[:1024], "<i4") if len(data) >= 1024 else [0, 0, 0]
    dtype = MAGICS.get((int(header[0]), int(header[1])))
    if dtype:
        tokens = np.frombuffer(data, dtype, offset=1024)
        assert len(tokens) == header[2], f"{path}: header says {header[2]} tokens, file has {len(tokens)}"
    elif os.path.exists(os.path.join(directory, "tokenizer.json")):
        tokens = encode.read_tokenizer(directory).encode(data.decode()).ids
    else:
        tokens = np.frombuffer(data, np.uint8)
    return torch.from_numpy(np.asarray(tokens, np.int64))


def evaluate(model, tokens, T, num_windows, batch):
    """Windows of T+1 tokens that start every T tokens, in file order."""
    available = (len(tokens) - 1) // T
    assert available > 0, f"{len(tokens)} tokens, but a window has {T + 1}"
    count = min(num_windows or available, available)
    total, start = 0.0, time.perf_counter()
    for first in range(0, count, batch):
        rows = [tokens[w * T:w * T + T + 1] for w in range(first, min(first + batch, count))]
        windows = torch.stack(rows)
        logits = model(windows[:, :-1], use_cache=False).logits.float()
        total += float(hf.cross_entropy(logits, windows[:, 1:])) * len(rows)
    seconds = time.perf_counter() - start
    loss = total / count
    print(f"windows {count} of {available}  loss {loss:.6f}  perplexity {math.exp(loss):.4f}  "
          f"tokens/s {count * T / seconds:.0f}")


def generate(model, ids, count, tokenizer):
    """Greedy, with a KV cache; stops at the end of sequence as generation_config says."""
    eos = model.generation_config.eos_token_id
    eos = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    new, cache, inputs, start = [], None, torch.tensor([ids]), time.perf_counter()
    while len(new) < count:
        output = model(inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        new.append(int(output.logits[0, -1].argmax()))
        if new[-1] in eos:
            break
        inputs = torch.tensor([new[-1:]])
    seconds = time.perf_counter() - start
    print("ids " + ",".join(map(str, new)))
    if tokenizer:
        print("text " + tokenizer.decode(ids + new))
    print(f"tokens {len(new)}  tokens/s {len(new) / seconds:.1f}")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("file", metavar="FILE", nargs="?")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--windows", type=int, default=0, help="how many (default: the whole file)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt-ids", help="generate after these ids, such as 1,2,3")
    parser.add_argument("--prompt", help="generate after this text, encoded with DIR/tokenizer.json")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    args = parser.parse_args()
    if [args.file, args.prompt_ids, args.prompt].count(None) != 2:
        parser.error("give one of FILE, --prompt-ids and --prompt")
    if args.threads:
        torch.set_num_threads(args.threads)
    model = hf.load(args.directory, torch.float32, exact=False)
    # transformers' usual kernels here, not the plain ones: this is also what we compare our speed with
    model.set_attn_implementation("sdpa")
    if args.file:
        evaluate(model, read_tokens(args.file, args.directory), args.seq, args.windows, args.batch)
        return
    has_tokenizer = os.path.exists(os.path.join(args.directory, "tokenizer.json"))
    tokenizer = encode.read_tokenizer(args.directory) if has_tokenizer else None
    if args.prompt is None:
        ids = [int(i) for i in args.prompt_ids.split(",")]
    else:
        ids = tokenizer.encode(args.prompt).ids if tokenizer else list(args.prompt.encode())
    generate(model, ids, args.tokens, tokenizer)


if __name__ == "__main__":
    main()
