"""Continues a checkpoint with PyTorch's FSDP2: parameters, gradients and moments are cut over all processes.

    torchrun --nproc-per-node 2 dev/scale/fsdp.py out/grown --data train.txt --val val.txt --out out/more
    torchrun --nnodes N --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 dev/scale/fsdp.py ...
                                                the same on each of N nodes

GPUs where there are some (NCCL), else processors (gloo).
"""
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common import arguments, evaluate, load, save, windows


def main():
    a = arguments(__doc__)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    train, val = windows(a.data, a.seq, a.vocab), windows(a.val, a.seq, a.vocab)

    model = load(a.model).to(device)
    mesh = init_device_mesh(kind, (world,))
    for layer in model.model.layers:            # what is gathered at a time: a layer, then embedding, norm and head
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def report(step):
        loss = evaluate(model, val, a.batch, device)
        if rank == 0:
            print(f"step {step}: val loss {loss:.6f}", flush=True)

    report(0)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))      # the same in all processes
    for step in range(a.steps):
        at = (step * world + rank) * a.batch
        tokens = train[order[[i % len(train) for i in range(at, at + a.batch)]]].to(device)
        # with labels the class adds its balance loss, where config.json asks for one; gradients are means over processes
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    report(a.steps)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save(a.model, a.out, state)
    dist.barrier()
    dist.destroy_process_group()


main()
