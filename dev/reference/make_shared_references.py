#!/usr/bin/env python3
"""References of a dense FFN as a shared expert and routed ones, as upcycle makes them: units and routers, in fp64.

    python3 make_shared_references.py             writes shared.safetensors
    python3 make_shared_references.py --check     makes it anew and compares

The models and the tokens are those of golden/; what the FFNs read comes from transformers, gradients from autograd. The
rest is written here from the papers. An FFN of I units is cut into N + M parts of w units: N shared ones, M experts.

Importance (MoEBERT, 2204.07675), each row of the tokens a sample:
    I_j = sum over samples | <gate_j, dL/dgate_j> + <up_j, dL/dup_j> + <down_j, dL/ddown_j> |   (rows, rows, columns)
    The first N w units are shared, of the others unit i of the order goes to expert i mod M.

Marks (CMoE, 2502.04416), x and the rows of gate and up being brought to length 1, written ^:
    h = silu(gate^ x^) * (up^ x^); a token marks the A units with the largest |h|
    shared  the N w units that most tokens mark
    others  the M most marked of them are centroids; experts of w units each, so that the sum of the L1 distances
            between the units' marks and their centroid is least (a linear assignment)
    router  r, the unit of expert e with the least L1 distance to the mean of its marks;
            y_e = |silu(gate^_r x) (up^_r x)|;
            rows W = argmin sum |W x - y|^2 + n c |W|^2 (ridge, c a thousandth of the mean of x_i^2), minus their mean,
            at a root mean square of 0.02

Tensors NAME.METHOD.L (I): the units of expert 0, 1, .. and then of the shared one, an importance's in the order in
which they are dealt, else rising; NAME.router.L (M, H).
"""

import argparse
import pathlib

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import hf

HERE = pathlib.Path(__file__).resolve().parent
CASES = {"qwen3": (2, 3, 7), "qwen2": (5, 12, 4)}  # name: N, M, A
MARGIN = 1e-4  # relative: decisions are clear


def importance(name, N, M):
    directory = HERE / "golden" / name
    reference = hf.read(directory / "reference.safetensors")[0]
    model, total = hf.load(directory), {}
    for tokens, targets in zip(reference["tokens"].long(), reference["targets"].long()):
        model.zero_grad()
        hf.cross_entropy(model(tokens[None]).logits, targets[None]).backward()
        for l, layer in enumerate(model.model.layers):
            f = layer.mlp
            of = lambda p, axis: (p.weight.detach() * p.weight.grad).sum(axis)
            total[l] = total.get(l, 0) + (of(f.gate_proj, 1) + of(f.up_proj, 1) + of(f.down_proj, 0)).abs()
    out = {}
    for l, value in total.items():
        value, order = value.sort(descending=True)
        assert (value[:-1] - value[1:] > MARGIN * value[:-1]).all(), value
        w = len(order) // (N + M)
        rest = order[N * w:]
        out[f"{name}.importance.{l}"] = torch.cat([rest[e::M] for e in range(M)] + [order[:N * w]]).int()
    return out


def silu(z):
    return z / (1 + np.exp(-z))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def most(count, number):
    """The units with the largest counts; of equals the lower index."""
    return sorted(range(len(count)), key=lambda u: (-count[u], u))[:number]


def only_assignment(cost, w):
    """Each row's column, w rows a column, at the least cost; no other assignment is as good."""
    near = (cost + 1e-4 * np.random.default_rng(i).random(cost.shape) for i in range(50))
    found = {tuple(linear_sum_assignment(np.repeat(c, w, axis=1))[1] // w) for c in near}
    assert len(found) == 1, f"{len(found)} optima"
    return np.array(found.pop())


def carve(x, gate, up, N, M, A):
    """Units of the experts and the shared one, rows of the router."""
    I, w = len(gate), len(gate) // (N + M)
    h = np.abs(silu(unit(x) @ unit(gate).T) * (unit(x) @ unit(up).T))
    ordered = -np.sort(-h, axis=1)
    assert (ordered[:, A - 1] - ordered[:, A] > MARGIN * ordered[:, A - 1]).all()
    marks = (h >= ordered[:, A - 1:A]).astype(float)  # (tokens, I)
    shared = most(marks.sum(0), N * w)
    rest = np.array([u for u in range(I) if u not in shared])
    count = marks.sum(0)[rest]
    centroids = marks[:, rest[most(count, M)]]
    distance = lambda units, centroid: np.abs(marks[:, units].T[:, None] - centroid.T[None]).sum(2)
    expert = only_assignment(distance(rest, centroids), w)
    groups = [rest[expert == e] for e in range(M)]
    y = []
    for g in groups:
        d = distance(g, marks[:, g].mean(1, keepdims=True))[:, 0]
        assert len(d) == 1 or np.sort(d)[1] - np.sort(d)[0] > 1e-9, d
        r = g[d.argmin()]
        y.append(np.abs(silu(x @ unit(gate)[r]) * (x @ unit(up)[r])))
    n, H = x.shape
    covariance = x.T @ x / n
    W = np.linalg.solve(covariance + 1e-3 * np.trace(covariance) / H * np.eye(H), x.T @ np.stack(y, 1) / n).T
    W -= W.mean(0)
    return np.concatenate(groups + [np.array(sorted(shared))]), W * 0.02 / np.sqrt((W ** 2).mean())


def marks(name, N, M, A):
    directory = HERE / "golden" / name
    tokens = hf.read(directory / "reference.safetensors")[0]["tokens"].long()
    model = hf.load(directory)
    inputs, out = {}, {}
    for l, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, l=l: inputs.__setitem__(l, args[0]))
    with torch.no_grad():
        model(tokens)
    for l, layer in enumerate(model.model.layers):
        numbers = lambda t: t.detach().flatten(0, -2).numpy()
        units, rows = carve(numbers(inputs[l]), numbers(layer.mlp.gate_proj.weight), numbers(layer.mlp.up_proj.weight),
                            N, M, A)
        out[f"{name}.marks.{l}"] = torch.tensor(units, dtype=torch.int32)
        out[f"{name}.router.{l}"] = torch.tensor(rows).float()
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    check, path, new = parser.parse_args().check, HERE / "shared.safetensors", {}
    for name, (N, M, A) in CASES.items():
        new |= importance(name, N, M) | marks(name, N, M, A)
    if not check:
        return hf.save(path, new)
    old = hf.read(path)[0]
    assert old.keys() == new.keys(), "other tensors"
    worst = max(hf.relative_error(new[name], old[name]) for name in new)
    print(f"shared.safetensors: {len(new)} tensors, largest relative difference {worst:.1e}")
    assert worst < 1e-6


if __name__ == "__main__":
    main()
