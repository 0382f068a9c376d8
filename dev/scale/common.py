"""What the two scripts share: their options, windows of data cut as train_moe cuts them, files that go with a model."""
import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

WEIGHTS = "model.safetensors"


def arguments(description):
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="a checkpoint of train_moe or upcycle")
    p.add_argument("--data", required=True, help="token shards (.bin), or a text for a model of bytes")
    p.add_argument("--val", required=True, help="the same, for the loss before and after")
    p.add_argument("--out", required=True, help="the folder that the trained model is written to")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--batch", type=int, default=8, help="sequences per process and step (8)")
    p.add_argument("--seq", type=int, default=128, help="tokens in a sequence (128)")
    p.add_argument("--lr", type=float, default=1e-3)
    a = p.parse_args()
    for name in "steps", "batch", "seq":
        if getattr(a, name) < 1:
            sys.exit(f"--{name} {getattr(a, name)}: expected at least 1")
    for name in Path(a.model, "config.json"), a.data, a.val:
        if not Path(name).is_file():
            sys.exit(f"{name}: no such file")
    if Path(a.out).exists() and (not Path(a.out).is_dir() or any(Path(a.out).iterdir())):
        sys.exit(f"{a.out} is no empty folder; choose another --out")
    a.vocab = json.loads(Path(a.model, "config.json").read_text())["vocab_size"]
    return a


def windows(path, seq, vocab):
    """(n, seq + 1) tokens: window i begins at token i * seq, and its last token is the next one's first."""
    data = Path(path).read_bytes()
    if path.endswith(".bin"):
        kinds = {20240520: np.uint16, 20240801: np.uint32}      # llm.c's shards: 256 numbers, then the tokens
        kind = kinds.get(int.from_bytes(data[:4], "little"))
        if kind is None or len(data) < 1024 or (len(data) - 1024) % np.dtype(kind).itemsize:
            sys.exit(f"{path}: no token shard; data/tokenize_text.py makes them")
        tokens = np.frombuffer(data, kind, offset=1024)
    elif vocab == 256:
        tokens = np.frombuffer(data, np.uint8)
    else:
        sys.exit(f"{path}: a text is for a model of bytes, and this one has {vocab} tokens; data/tokenize_text.py makes "
                 "shards")
    n = (len(tokens) - 1) // seq
    if n < 1:
        sys.exit(f"{path}: {len(tokens)} tokens are fewer than a window of {seq} + 1")
    if tokens.max() >= vocab:
        sys.exit(f"{path}: token {tokens.max()}; the model's vocabulary has 0 to {vocab - 1}")
    return torch.stack([torch.from_numpy(tokens[i * seq:i * seq + seq + 1].astype(np.int64)) for i in range(n)])


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def evaluate(model, val, batch, device):
    """The mean cross-entropy over all windows, as --eval prints it; without the balance loss. Every process takes its
    share in as many passes as the others, since a pass may gather parameters: the last may be one that counts nothing.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for at in range(0, len(val), batch * world):
        mine = val[at + rank * batch:at + (rank + 1) * batch]
        tokens = (mine if len(mine) else val[:1]).to(device)
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        total += len(mine) * loss.double()
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return total.item() / len(val)


def save(path, out, state):
    """The numbers of `state` under the names of the class, and what else the model's folder has, but for what was about
    its numbers or its run."""
    model = load(path)
    model.load_state_dict(state)
    model.save_pretrained(out)
    for f in Path(path).iterdir():
        stays = f.suffix in (".safetensors", ".csv") or f.name in ("trainer.json", "README.md", f"{WEIGHTS}.index.json")
        if f.is_file() and not stays and not Path(out, f.name).exists():
            shutil.copy(f, out)
