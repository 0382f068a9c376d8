#!/usr/bin/env python3
"""Golden references of growth: models of golden/ made deeper and wider here, and computed in fp64 by transformers.

    python3 make_growth_references.py             writes golden_growth/NAME.safetensors: tokens, logits
    python3 make_growth_references.py --check     makes all anew and compares

Written from the formulas; upcycle has no part in it. With L' layers, an FFN n times as wide and m copies of every expert:

    layer l comes from   floor(l L / L') (interpose) or l mod L (stack); the first from each layer is the layer itself
    new layers           o_proj and down_proj are 0 (zero), or what they were (copy)
    unit u of n I        unit u mod I, with its column of down / n
    expert e of m E      expert e mod E, with its row of the router; K' = m K

Where new layers are zero, logits must be those of the source: this is asserted to 1e-12.
"""
import argparse
import json
import pathlib
import re
import sys
import tempfile
import warnings

import torch

import hf

HERE = pathlib.Path(__file__).resolve().parent
GROWN = {  # source, layers, order, new layers, n, m
    "qwen3_interpose": ("qwen3", 5, "interpose", "copy", 1, 1),
    "llama_stack": ("llama", 5, "stack", "copy", 2, 1),
    "qwen3_moe_interpose": ("qwen3_moe", 6, "interpose", "copy", 2, 2),
    "olmoe_stack": ("olmoe", 3, "stack", "copy", 4, 3),
    "qwen3_zero": ("qwen3", 6, "stack", "zero", 2, 1),
    "mixtral_zero": ("mixtral", 5, "interpose", "zero", 2, 3),
    "dots1_zero": ("dots1", 3, "stack", "zero", 4, 2),
    "qwen3_moe_zero": ("qwen3_moe", 7, "interpose", "zero", 2, 2),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def grow(name, folder):
    """Writes the grown checkpoint, and returns the source's tokens and logits."""
    source, layers, order, new, n, m = GROWN[name]
    config = json.loads((HERE / "golden" / source / "config.json").read_text())
    weights, _ = hf.read(HERE / "golden" / source / "model.safetensors")
    old, moe = config["num_hidden_layers"], any(key in config for key in EXPERTS)
    origin = [l * old // layers if order == "interpose" else l % old for l in range(layers)]
    sparse = [moe and not any(f"layers.{l}.mlp.gate_proj" in key for key in weights) for l in range(old)]
    num_experts = next((config[key] for key in EXPERTS if key in config), 0)
    grown = {}
    for key, weight in weights.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", key)
        for l in [l for l in range(layers) if layer and origin[l] == int(layer[1])] or ([] if layer else [None]):
            w, ffn = weight.double(), re.search(r"(experts\.(\d+)|mlp)\.(gate_proj|up_proj|down_proj|w[123])\.", key)
            wide = ffn and ((ffn[2] is not None) == moe)
            down = ffn and ffn[3] in ("down_proj", "w2")
            if wide and down:
                w = torch.cat([w] * n, dim=1) / n
            elif wide:
                w = torch.cat([w] * n, dim=0)
            if re.search(r"\.gate\.(weight|e_score_correction_bias)$", key):
                w = torch.cat([w] * m, dim=0)
            if new == "zero" and layer and l in (l for l in range(layers) if origin[l] in origin[:l]):
                w = w * 0 if down or ".o_proj." in key else w
            renamed = f"model.layers.{l}.{layer[2]}" if layer else key
            for copy in range(m if ffn and ffn[2] else 1):
                e = f"experts.{int(ffn[2]) + copy * num_experts}." if ffn and ffn[2] else ""
                grown[re.sub(r"experts\.\d+\.", e, renamed)] = w.float().contiguous()
    config["num_hidden_layers"] = layers
    for key in EXPERTS:
        if key in config:
            config[key] *= m
    if moe:
        config["num_experts_per_tok"] *= m
    width = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    config[width] *= n
    if "mlp_only_layers" in config:
        config |= dict(decoder_sparse_step=1, mlp_only_layers=[l for l in range(layers) if not sparse[origin[l]]])
    (folder / "config.json").write_text(json.dumps(config))
    hf.save(folder / "model.safetensors", grown)
    reference, _ = hf.read(HERE / "golden" / source / "reference.safetensors")
    return source, reference["tokens"]


def make(name):
    with tempfile.TemporaryDirectory() as folder:
        source, tokens = grow(name, pathlib.Path(folder))
        with torch.no_grad():
            logits, routing = hf.run(hf.load(folder), tokens.long())
            before, _ = hf.run(hf.load(HERE / "golden" / source), tokens.long())
    for layer in routing.values():  # between the last chosen and the next
        top = layer.scores.sort(dim=-1, descending=True)[0]
        k = layer.experts.shape[1]
        assert float((top[:, k - 1] - top[:, k]).min()) > 1e-4, f"{name}: an unclear choice"
    change = float((logits - before).abs().max())
    assert (change < 1e-12) == (GROWN[name][3] == "zero"), f"{name}: logits change by {change:.1e}"
    return {"tokens": tokens, "logits": logits.float()}, change


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="make all anew and compare; writes nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Initializing zero-element")  # the absent shared experts of Dots1
    failed = False
    for name in GROWN:
        tensors, change = make(name)
        path = HERE / "golden_growth" / f"{name}.safetensors"
        if not check:
            path.parent.mkdir(exist_ok=True)
            hf.save(path, tensors)
        error = hf.relative_error(tensors["logits"], hf.read(path)[0]["logits"])
        failed |= error > 1e-6
        print(f"{name:<20} logits change by {change:.1e}; {'FAILED' if error > 1e-6 else 'ok'}, {error:.1e}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
