#!/usr/bin/env python3
"""References of what upcycle makes smaller mixtures by: scores that experts stay by, and merged experts, in fp64.

    python3 make_shrinking_references.py             writes shrinking.safetensors
    python3 make_shrinking_references.py --check     makes it anew and compares

The models and the tokens are those of golden/. Inputs of the experts, logits and gates come from transformers; the rest
is written here from the papers. With X_j the tokens of expert j, g_j its gate and f_j(x) its output:

    reap (2510.13999, eq. 9)   mean over X_j of g_j ||f_j||        man, msan (2606.15716)   of ||f_j||, of ||f_j||^2

Merging (UNCURL 2409.01483, M-SMoE 2310.01334), with s_ij the cosine of the logits of experts i and j over all tokens:
    spectral   Ng, Jordan and Weiss on (1 + s) / 2; of all partitions of the rows of unit length into M groups the one
               with the largest sum over groups of || sum of rows ||, which is what spherical k-means looks for
    cores      the M most used; the others join the core that they are most alike
    member i   its units in the order P that maximises the sum over units of <w_0u, w_iP(u)>, over gate, up and down
    merged     W_0 + sum_i w_i (P W_i - W_0), w_i the share of i in the load of its group, 0 its most used member

Domain masks (Read-ME, 2410.19123) of the dense model qwen3, each row of the tokens being a text: the half of the units with
the largest mean of |input of down_proj| on it. Tensors qwen3.L.units (B, floor(I / 2)), in their order.

Tensors NAME.L.what for sparse layer L: reap, man, msan (E); spectral, cores (E) the group of each expert, groups in the
order of their first members; gate, up (M,I,H) and down (M,H,I) of the spectral groups.
"""

import argparse
import itertools
import pathlib

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import hf

HERE = pathlib.Path(__file__).resolve().parent
MODELS = {"qwen3_moe": 3, "olmoe": 4, "mixtral": 3, "dots1": 2}  # name: experts of the result
MARGIN = 1e-4  # by which the best partition wins, relative


def in_order(groups):
    """Numbers groups in the order of their first members."""
    order = list(dict.fromkeys(groups))
    return [order.index(g) for g in groups]


def spectral(s, M):
    affinity = (1 + s) / 2
    root = affinity.sum(1) ** -0.5
    rows = np.linalg.eigh(root[:, None] * affinity * root)[1][:, -M:]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = {}
    for groups in itertools.product(range(M), repeat=len(s)):
        if len(set(groups)) == M:
            key = tuple(in_order(groups))
            if key not in found:
                found[key] = sum(np.linalg.norm(rows[np.array(key) == g].sum(0)) for g in range(M))
    best, second = sorted(found.values(), reverse=True)[:2]
    assert best - second > MARGIN * best, (best, second)
    return list(max(found, key=found.get))


def cores(s, load, M):
    kept = sorted(sorted(range(len(s)), key=lambda e: (-load[e], e))[:M])
    return in_order([e if e in kept else max(kept, key=lambda c: s[e, c]) for e in range(len(s))])


def merge(units, load, groups, M):
    """units (E,I,3H): gate row, up row and down column of each unit."""
    merged = []
    for g in range(M):
        members = [e for e in range(len(load)) if groups[e] == g]
        core = max(members, key=lambda e: (load[e], -e))
        share = load[members] / load[members].sum()
        out = units[core].copy()
        for w, i in zip(share, members):
            order = linear_sum_assignment(units[core] @ units[i].T, maximize=True)[1]
            out += w * (units[i][order] - units[core])
        merged.append(out)
    return np.stack(merged)


def references(name, M):
    directory = HERE / "golden" / name
    tokens = hf.read(directory / "reference.safetensors")[0]["tokens"].long()
    model = hf.load(directory)
    inputs, hooks = {}, []
    for l, layer in enumerate(model.model.layers):
        hooks.append(layer.mlp.register_forward_pre_hook(lambda module, args, l=l: inputs.__setitem__(l, args[0])))
    with torch.no_grad():
        routing = hf.run(model, tokens)[1]
    weights = hf.checkpoint_tensors(model, hf.parameters(model))
    out = {}
    for l, r in routing.items():
        E, H = r.logits.shape[1], model.config.hidden_size
        x = inputs[l].reshape(-1, H).numpy()
        find = lambda e, *names: next(w.detach().numpy() for key, w in weights.items() for n in names
                                      if f"layers.{l}." in key and key.endswith(f"experts.{e}.{n}.weight"))
        gate, up, down = (np.stack([find(e, *n) for e in range(E)])
                          for n in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")))
        score, load = {"reap": [], "man": [], "msan": []}, np.zeros(E)
        for e in range(E):
            token, k = (r.experts == e).nonzero().numpy().T
            z = x[token] @ gate[e].T
            y = (z / (1 + np.exp(-z)) * (x[token] @ up[e].T)) @ down[e].T
            norm, g = np.linalg.norm(y, axis=1), r.gates.numpy()[token, k]
            load[e] = len(token)
            for what, values in (("reap", g * norm), ("man", norm), ("msan", norm ** 2)):
                score[what].append(values.mean() if len(values) else 0)
        z = r.logits.numpy()
        length = np.linalg.norm(z, axis=0)
        s = z.T @ z / length[:, None] / length
        groups = spectral(s, M)
        merged = merge(np.concatenate([gate, up, down.transpose(0, 2, 1)], axis=2), load, groups, M)
        found = score | {"gate": merged[..., :H], "up": merged[..., H:2 * H], "down": merged[..., 2 * H:].swapaxes(1, 2)}
        out |= {f"{name}.{l}.{what}": torch.tensor(np.array(value)).float() for what, value in found.items()}
        out |= {f"{name}.{l}.{what}": torch.tensor(value, dtype=torch.int32)
                for what, value in (("spectral", groups), ("cores", cores(s, load, M)))}
        print(f"{name} layer {l}: load {load.astype(int)}, spectral {groups}, cores {cores(s, load, M)}")
    return out


def domains(name):
    directory = HERE / "golden" / name
    tokens = hf.read(directory / "reference.safetensors")[0]["tokens"].long()
    model = hf.load(directory)
    units = {}
    for l, layer in enumerate(model.model.layers):
        def keep(module, args, l=l):
            activity = args[0].flatten(0, 1).abs().mean(0)
            value, order = activity.sort(descending=True)
            half = len(order) // 2
            assert value[half - 1] - value[half] > MARGIN * value[half]
            units.setdefault(f"{name}.{l}.units", []).append(order[:half].sort()[0].int())
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    with torch.no_grad():
        for text in tokens:
            model(text[None])
    return {key: torch.stack(rows) for key, rows in units.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    path, new = HERE / "shrinking.safetensors", domains("qwen3")
    check = parser.parse_args().check
    for name, M in MODELS.items():
        new |= references(name, M)
    if not check:
        return hf.save(path, new)
    old = hf.read(path)[0]
    assert old.keys() == new.keys(), "other tensors"
    worst = max(hf.relative_error(new[name], old[name]) for name in new)
    print(f"shrinking.safetensors: {len(new)} tensors, largest relative difference {worst:.1e}")
    assert worst < 1e-6


if __name__ == "__main__":
    main()
