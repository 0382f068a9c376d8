"""What the two scripts share: their options, windows of data cut as train_moe cuts them, files that go with a model."""
import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM


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
    for name in a.model, a.data, a.val:
        if not Path(name).exists():
            sys.exit(f"{name}: no such file or folder")
    if Path(a.out).exists() and any(Path(a.out).iterdir()):
        sys.exit(f"{a.out} is not empty; choose another --out")
    return a


def windows(path, seq):
    """(n, seq + 1) tokens: window i begins at token i * seq, and its last token is the next one's first."""
    data = Path(path).read_bytes()
    if path.endswith(".bin"):
        kinds = {20240520: np.uint16, 20240801: np.uint32}      # llm.c's shards: 256 numbers, then the tokens
        kind = kinds.get(int.from_bytes(data[:4], "little"))
        if kind is None:
            sys.exit(f"{path}: no token shard; data/tokenize_text.py makes them")
        tokens = np.frombuffer(data, kind, offset=1024)
    else:
        tokens = np.frombuffer(data, np.uint8)
    n = (len(tokens) - 1) // seq
    if n < 1:
        sys.exit(f"{path}: {len(tokens)} tokens are fewer than a window of {seq} + 1")
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
    """The numbers of `state` under the names of the class, and the files that the model came with."""
    model = load(path)
    model.load_state_dict(state)
    model.save_pretrained(out)
    for f in Path(path).iterdir():
        if f.is_file() and (f.name.startswith(("tokenizer", "LICENSE", "NOTICE")) or f.name == "upcycle.json"):
            shutil.copy(f, out)
