#!/usr/bin/env python3
"""Measures what ./upcycle needs on a large checkpoint: peak resident memory, and speed against cp + sync.

    python3 dev/upcycle/measure_streaming.py WORK [--gigabytes 4.3] [--runs 3] [-- upcycle options]

Writes a Mixtral checkpoint of that size into WORK (real bytes in three shards, BF16), runs ./upcycle on it, copies the
result with cp and sync to the same disk, and prints both. WORK needs room for about four times the size; everything that
was made there is removed at the end. Runs alternate, and the pages of the files are dropped from memory before each where
the system allows it, so that both read from the disk.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time

import numpy as np

HIDDEN, WIDTH, VOCAB, HEADS, EXPERTS = 2048, 5632, 32000, 16, 8


def tensors(layers):
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for l in range(layers):
        p = f"model.layers.{l}."
        yield p + "input_layernorm.weight", (HIDDEN,)
        for name in "qkvo":
            yield f"{p}self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        yield p + "post_attention_layernorm.weight", (HIDDEN,)
        yield p + "block_sparse_moe.gate.weight", (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for name, shape in (("w1", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH)), ("w3", (WIDTH, HIDDEN))):
                yield f"{p}block_sparse_moe.experts.{e}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_checkpoint(directory, gigabytes):
    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * EXPERTS * WIDTH * HIDDEN)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer + 0.5))
    os.makedirs(directory)
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": VOCAB,
              "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": layers,
              "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_local_experts": EXPERTS,
              "num_experts_per_tok": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
              "tie_word_embeddings": False, "sliding_window": None, "torch_dtype": "bfloat16"}
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(config, f)
    listed = list(tensors(layers))
    shards, weight_map = [listed[i::3] for i in range(3)], {}
    generator = np.random.default_rng(1)
    # normal numbers in BF16, a different piece of the same long vector for each tensor
    pool = (generator.normal(0, 0.02, 1 << 26).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for tensor, shape in shard:
            size = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(directory, name), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for tensor, shape in shard:
                count = int(np.prod(shape))
                start = int(generator.integers(0, len(pool) - count + 1)) if count < len(pool) else 0
                f.write(np.resize(pool[start:], count).tobytes())
            f.flush()
            os.fsync(f.fileno())
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": weight_map}, f)


def size_of(directory):
    return sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))


def forget_pages(directory):
    """Asks the system to drop the files from memory."""
    os.sync()
    for name in os.listdir(directory):
        fd = os.open(os.path.join(directory, name), os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def high_water_mark(pid):
    """Peak resident memory of a running process in bytes, 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/status") as f:
            return max((int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM")), default=0)
    except OSError:
        return 0


def timed(command):
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", metavar="WORK")
    parser.add_argument("--gigabytes", type=float, default=4.3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--upcycle", default="./upcycle")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    options = sys.argv[end + 1:] or ["--experts", "10"]
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(args.work)) or ".").free
    if free < 5 * args.gigabytes * 1e9:
        raise SystemExit(f"{free / 1e9:.0f} GB are free, {5 * args.gigabytes:.0f} GB are wanted")
    os.makedirs(args.work)
    source, result, copy = (os.path.join(args.work, name) for name in ("source", "result", "copy"))
    try:
        write_checkpoint(source, args.gigabytes)
        largest = max(2 * int(np.prod(shape)) for _, shape in tensors(1))
        print(f"source {size_of(source) / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB; upcycle {' '.join(options)}")
        ours, theirs, peak = [], [], 0
        for run in range(args.runs):
            forget_pages(source)
            process = subprocess.Popen([args.upcycle, source, result, *options], stdout=subprocess.DEVNULL)
            start = time.monotonic()
            while process.poll() is None:           # ru_maxrss would count this program's memory before the exec
                peak = max(peak, high_water_mark(process.pid))
                time.sleep(0.02)
            ours.append(time.monotonic() - start)
            if process.returncode:
                raise SystemExit("upcycle failed")
            bytes_written = size_of(result)
            forget_pages(result)
            theirs.append(timed(["sh", "-c", f"cp -r '{result}' '{copy}' && sync -f '{copy}'"]))
            print(f"run {run + 1}: upcycle {ours[-1]:.1f} s, cp + sync {theirs[-1]:.1f} s", flush=True)
            shutil.rmtree(result)
            shutil.rmtree(copy)
        best = min(ours), min(theirs)
        print(f"result {bytes_written / 1e9:.2f} GB: upcycle {bytes_written / best[0] / 1e6:.0f} MB/s, cp + sync "
              f"{bytes_written / best[1] / 1e6:.0f} MB/s, ratio {best[1] / best[0]:.2f} (best of {args.runs})")
        print(f"peak resident memory of upcycle {peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB: "
              f"{(peak - largest) / 1e6:+.0f} MB")
    finally:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
