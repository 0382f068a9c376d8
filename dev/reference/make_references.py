#!/usr/bin/env python3
"""Golden references: tiny random models with awkward sizes, computed in fp64 by transformers.

For each model a directory with an ordinary checkpoint (config.json, model.safetensors) and reference.safetensors:
tokens, targets, logits, the losses, the experts chosen, the gradient of every parameter, and ten steps of AdamW.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import warnings

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf

STEPS = 10
MARGIN = 1e-4  # between router scores that decide something: fp32 must choose what fp64 chooses

# Every config is written as a file first and read by transformers. "rope" is written in the old style (rope_theta) or
# the new (rope_parameters); both are found in the wild. "unused": the (layer, expert) that no token may choose.
MODELS = {
    "llama": dict(
        config=dict(model_type="llama", vocab_size=37, hidden_size=21, intermediate_size=19, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-5,
                    tie_word_embeddings=False),
        rope=("new", 10000.0), T=11, lr=1e-2, clip=1.0),
    "llama_tied": dict(  # no head_dim: hidden_size / heads
        config=dict(model_type="llama", vocab_size=31, hidden_size=24, intermediate_size=13, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=True),
        rope=("old", 500000.0), T=9, lr=3e-3, beta2=0.999, weight_decay=0.0, clip=100.0),
    "mistral": dict(
        config=dict(model_type="mistral", vocab_size=41, hidden_size=20, intermediate_size=23, num_hidden_layers=2,
                    num_attention_heads=5, num_key_value_heads=5, head_dim=8, rms_norm_eps=1e-5, sliding_window=None,
                    tie_word_embeddings=False),
        rope=("old", 1000000.0), T=13, lr=1e-2, weight_decay=0.3),
    "mixtral": dict(
        config=dict(model_type="mixtral", vocab_size=37, hidden_size=18, intermediate_size=11, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=2,
                    rms_norm_eps=1e-5, sliding_window=None, tie_word_embeddings=False),
        rope=("old", 1000000.0), T=11, seed=7, aux=0.02, z_loss=0.001, lr=1e-2),
    "mixtral_top1": dict(  # a renormalised gate of one expert is 1: the router learns from the auxiliary loss alone
        config=dict(model_type="mixtral", vocab_size=29, hidden_size=19, intermediate_size=9, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=3, head_dim=4, num_local_experts=5,
                    num_experts_per_tok=1, rms_norm_eps=1e-6, tie_word_embeddings=False),
        rope=("new", 5000.0), T=12, seed=11, aux=0.05, aux_form="hf", lr=1e-2, unused=[(0, 3)]),
    "olmoe": dict(
        config=dict(model_type="olmoe", vocab_size=33, hidden_size=24, intermediate_size=7, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, num_experts=6, num_experts_per_tok=3,
                    norm_topk_prob=False, rms_norm_eps=1e-5, clip_qkv=None, tie_word_embeddings=False),
        rope=("old", 10000.0), T=10, seed=9, aux=0.01, lr=1e-2),
    "olmoe_norm": dict(
        config=dict(model_type="olmoe", vocab_size=35, hidden_size=18, intermediate_size=5, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=3, num_experts=7, num_experts_per_tok=2,
                    norm_topk_prob=True, rms_norm_eps=3e-6, tie_word_embeddings=True),
        rope=("new", 20000.0), T=13, seed=1, aux=0.02, aux_form="hf", z_loss=0.01, lr=1e-2, clip=0.5),
    "qwen2": dict(  # biases of q, k and v
        config=dict(model_type="qwen2", vocab_size=39, hidden_size=24, intermediate_size=17, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, use_sliding_window=False,
                    sliding_window=32, max_window_layers=2, tie_word_embeddings=True),
        rope=("old", 1000000.0), T=12, seed=3, lr=3e-3),
    "qwen3": dict(
        config=dict(model_type="qwen3", vocab_size=43, hidden_size=22, intermediate_size=15, num_hidden_layers=3,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=14, rms_norm_eps=1e-6,
                    tie_word_embeddings=True),
        rope=("new", 1000000.0), T=9, lr=3e-3),
    "qwen3_moe": dict(  # dense, sparse, dense, sparse
        config=dict(model_type="qwen3_moe", vocab_size=31, hidden_size=20, intermediate_size=17,
                    moe_intermediate_size=9, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1,
                    head_dim=6, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=2,
                    mlp_only_layers=[], rms_norm_eps=1e-6, tie_word_embeddings=False),
        rope=("old", 1000000.0), T=11, seed=4, aux=0.01, z_loss=0.001, lr=1e-2),
    "qwen3_moe_mlp_only": dict(  # sparse, dense, sparse
        config=dict(model_type="qwen3_moe", vocab_size=37, hidden_size=17, intermediate_size=13,
                    moe_intermediate_size=5, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=8, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True, decoder_sparse_step=1,
                    mlp_only_layers=[1], rms_norm_eps=1e-5, tie_word_embeddings=True),
        rope=("new", 50000.0), T=10, seed=9, aux=0.05, aux_form="hf", z_loss=0.002, lr=3e-3, beta2=0.99),
    "qwen3_moe_top1": dict(
        config=dict(model_type="qwen3_moe", vocab_size=29, hidden_size=16, intermediate_size=21,
                    moe_intermediate_size=7, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                    head_dim=6, num_experts=7, num_experts_per_tok=1, norm_topk_prob=False, decoder_sparse_step=1,
                    mlp_only_layers=[], rms_norm_eps=1e-6, tie_word_embeddings=False),
        rope=("new", 10000.0), T=12, seed=2, lr=1e-2, unused=[(0, 2), (1, 0)]),
    "qwen3_moe_all": dict(  # every expert for every token: the balance loss is 1 a layer and has no gradient
        config=dict(model_type="qwen3_moe", vocab_size=31, hidden_size=15, intermediate_size=11,
                    moe_intermediate_size=6, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
                    head_dim=4, num_experts=4, num_experts_per_tok=4, norm_topk_prob=False, decoder_sparse_step=1,
                    mlp_only_layers=[], rms_norm_eps=1e-6, tie_word_embeddings=False),
        rope=("old", 10000.0), T=9, seed=2, aux=0.01, z_loss=0.005, lr=1e-2),
    "dots1": dict(  # sigmoid scores; a bias that chooses and does not weigh. Without shared experts: empty tensors
        config=dict(model_type="dots1", vocab_size=33, hidden_size=20, intermediate_size=17, moe_intermediate_size=7,
                    num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=6, n_routed_experts=6,
                    num_experts_per_tok=2, n_shared_experts=0, n_group=1, topk_group=1, norm_topk_prob=True,
                    routed_scaling_factor=1.0, first_k_dense_replace=0, sliding_window=None, rms_norm_eps=1e-6,
                    tie_word_embeddings=False),
        rope=("new", 10000.0), T=10, seed=4, lr=1e-2),
    "rope_llama3": dict(  # pairs that stay, that are slowed down in part and in full
        config=dict(model_type="llama", vocab_size=31, hidden_size=21, intermediate_size=13, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-5,
                    tie_word_embeddings=True),
        rope=("old", 10000.0, dict(factor=32.0, high_freq_factor=8.0, low_freq_factor=1.0,
                                   original_max_position_embeddings=256, rope_type="llama3")), T=15, lr=1e-2),
    "rope_linear": dict(
        config=dict(model_type="llama", vocab_size=31, hidden_size=21, intermediate_size=13, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, head_dim=6, rms_norm_eps=1e-6,
                    tie_word_embeddings=True),
        rope=("old", 100000.0, dict(type="linear", factor=4.0)), T=13, lr=1e-2),
    "rope_yarn": dict(  # P is max_position_embeddings
        config=dict(model_type="qwen3", vocab_size=31, hidden_size=21, intermediate_size=13, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-6,
                    tie_word_embeddings=True),
        rope=("new", 100.0, dict(rope_type="yarn", factor=4.0, beta_fast=2.0)), T=15, lr=1e-2),
    "rope_yarn_moe": dict(
        config=dict(model_type="mixtral", vocab_size=31, hidden_size=21, intermediate_size=9, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, head_dim=8, num_local_experts=3,
                    num_experts_per_tok=2, rms_norm_eps=1e-5, sliding_window=None, tie_word_embeddings=True,
                    original_max_position_embeddings=40),
        rope=("old", 500.0, dict(rope_type="yarn", factor=8.0, beta_fast=4, beta_slow=0.5, mscale=1.2,
                                 mscale_all_dim=0.7, truncate=False, original_max_position_embeddings=32)),
        T=14, seed=5, aux=0.02, lr=1e-2),
    "dots1_shared": dict(  # as released: dense below, two shared experts, gates that sum to 2.5
        config=dict(model_type="dots1", vocab_size=35, hidden_size=18, intermediate_size=23, moe_intermediate_size=5,
                    num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3, head_dim=8, n_routed_experts=7,
                    num_experts_per_tok=3, n_shared_experts=2, n_group=1, topk_group=1, norm_topk_prob=True,
                    routed_scaling_factor=2.5, first_k_dense_replace=1, sliding_window=None, rms_norm_eps=1e-6,
                    tie_word_embeddings=False),
        rope=("new", 10000.0), T=9, seed=20, lr=1e-2),
    "dots1_raw": dict(  # gates that are not renormalised, and scaled
        config=dict(model_type="dots1", vocab_size=33, hidden_size=16, intermediate_size=17, moe_intermediate_size=6,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=5,
                    num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, norm_topk_prob=False,
                    routed_scaling_factor=0.7, first_k_dense_replace=0, sliding_window=None, rms_norm_eps=1e-6,
                    tie_word_embeddings=True),
        rope=("old", 10000.0), T=11, seed=1, lr=1e-2),
    "qwen2_moe": dict(  # as Qwen1.5-MoE: a shared expert with a gate, wider than the others
        config=dict(model_type="qwen2_moe", vocab_size=37, hidden_size=24, intermediate_size=21,
                    moe_intermediate_size=7, shared_expert_intermediate_size=26, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2,
                    norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], rms_norm_eps=1e-6,
                    use_sliding_window=False, tie_word_embeddings=False),
        rope=("old", 1000000.0), T=11, seed=3, aux=0.01, z_loss=0.001, lr=1e-2),
    "qwen2_moe_mixed": dict(  # sparse, dense, sparse, without biases; the shared expert is narrow
        config=dict(model_type="qwen2_moe", vocab_size=33, hidden_size=16, intermediate_size=19,
                    moe_intermediate_size=9, shared_expert_intermediate_size=3, num_hidden_layers=3,
                    num_attention_heads=2, num_key_value_heads=1, num_experts=5, num_experts_per_tok=3,
                    norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1], rms_norm_eps=1e-5,
                    qkv_bias=False, tie_word_embeddings=True),
        rope=("new", 20000.0), T=10, seed=7, aux=0.02, aux_form="hf", lr=3e-3),
}
DEFAULTS = dict(aux=0.0, aux_form="switch", z_loss=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0,
                unused=[], seed=0)
CLASSES = dict(llama="LlamaForCausalLM", mistral="MistralForCausalLM", mixtral="MixtralForCausalLM",
               olmoe="OlmoeForCausalLM", qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM",
               qwen2_moe="Qwen2MoeForCausalLM", qwen3_moe="Qwen3MoeForCausalLM", dots1="Dots1ForCausalLM")


def write_config(spec, directory):
    config = dict(architectures=[CLASSES[spec["config"]["model_type"]]], **spec["config"])
    config |= dict(hidden_act="silu", max_position_embeddings=64, attention_dropout=0.0,
                   bos_token_id=None, eos_token_id=None,
                   pad_token_id=None)  # OLMoE's default pad_token_id is 1, and the gradient of that row would be zero
    style, theta, *scaling = spec["rope"]
    if style == "old":
        config |= dict(rope_theta=theta, torch_dtype="float32")
        config |= dict(rope_scaling=scaling[0]) if scaling else {}
    else:
        config |= dict(rope_parameters=dict(rope_theta=theta, rope_type="default"), dtype="float32")
        config["rope_parameters"] |= scaling[0] if scaling else {}
    if "num_experts_per_tok" in config and config["model_type"] != "dots1":
        config["router_aux_loss_coef"] = spec["aux"]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_weights(spec, directory):
    """Random weights so large that logits are of order 1, attention is not uniform and routing is clear."""
    rng = np.random.default_rng(spec["seed"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    weights = {}
    for name, parameter in hf.parameters(model).items():
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
        if name.endswith("e_score_correction_bias"):
            weights[name] = 0.2 * noise
        elif name.endswith(".bias"):
            weights[name] = 0.5 * noise
        elif parameter.ndim == 1:
            weights[name] = 1 + 0.3 * noise
        elif "embed_tokens" in name:
            weights[name] = (0.3 if model.config.tie_word_embeddings else 0.7) * noise
        else:
            gain = 1.5 if name.endswith("mlp.gate.weight") else 1.0
            weights[name] = gain * noise / max(parameter.shape[-1], 1) ** 0.5
    for layer, expert in spec["unused"]:
        # The mean of the other rows gives the mean of the other logits, which is never the largest.
        gate = weights[f"model.layers.{layer}.mlp.gate.weight"]
        gate[expert] = (gate.sum(dim=0) - gate[expert]) / (len(gate) - 1)
    weights = hf.checkpoint_tensors(model, weights)
    hf.save(directory / "model.safetensors", weights)
    return weights


def objective(spec, logits, targets, routing):
    loss = hf.cross_entropy(logits, targets)
    aux, z = hf.aux_loss(routing, spec["aux_form"]), hf.z_loss(routing)
    return loss, aux, z, loss + spec["aux"] * aux + spec["z_loss"] * z


def check_margins(routing, name):
    """Every decision of the router is clear: which experts, and in which order."""
    smallest = float("inf")
    for layer in routing.values():
        top = layer.scores.sort(dim=-1, descending=True)[0][:, :layer.experts.shape[1] + 1]
        smallest = min(smallest, float((top[:, :-1] - top[:, 1:]).detach().min()))
    assert smallest > MARGIN, f"{name}: router margin {smallest:.1e}, choose another seed"
    return smallest


def train(model, spec, tokens, targets, name):
    """Ten AdamW steps on one batch. Matrices decay, vectors do not."""
    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=spec["weight_decay"]),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=spec["lr"], betas=(spec["beta1"], spec["beta2"]), eps=spec["eps"],
                                  foreach=False)
    losses, norms = [], []
    for _ in range(STEPS):
        logits, routing = hf.run(model, tokens)
        check_margins(routing, name)
        loss, _, _, total = objective(spec, logits, targets, routing)
        optimizer.zero_grad()
        total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])))
        losses.append(float(loss.detach()))
        optimizer.step()
    return torch.tensor(losses), torch.tensor(norms)


def make(name, out):
    """Writes one model and its reference. Returns a line to print."""
    spec = DEFAULTS | MODELS[name]
    directory = pathlib.Path(out) / name
    directory.mkdir(parents=True, exist_ok=True)
    write_config(spec, directory)
    weights = write_weights(spec, directory)

    # One stream cut into rows, as a data loader does it: the target of a row's last token is the next row's first.
    rng = np.random.default_rng(spec["seed"] + 1)
    stream = torch.from_numpy(rng.integers(0, spec["config"]["vocab_size"], 2 * spec["T"] + 1))
    tokens, targets = stream[:-1].view(2, -1), stream[1:].view(2, -1)

    model = hf.load(directory)
    stored = hf.checkpoint_tensors(model, hf.parameters(model))
    assert stored.keys() == weights.keys() and all(torch.equal(stored[k], weights[k].double()) for k in weights)
    logits, routing = hf.run(model, tokens)
    margin = check_margins(routing, name)
    loss, aux, z, total = objective(spec, logits, targets, routing)
    if routing and spec["config"]["model_type"] != "dots1":
        with torch.no_grad():
            ours, theirs = float(hf.aux_loss(routing, "hf")), float(hf.transformers_aux_loss(model, routing))
        assert abs(ours - theirs) < 1e-6 * theirs, (ours, theirs)  # theirs counts in fp32
    for layer, expert in spec["unused"]:
        assert not (routing[layer].experts == expert).any(), f"{name}: layer {layer} expert {expert} has a token"
    total.backward()

    reference = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits.detach(),
                 "loss": loss.detach().view(1), "aux_loss": aux.detach().view(1), "z_loss": z.detach().view(1)}
    if spec["config"]["model_type"] == "dots1":
        del reference["aux_loss"]  # transformers defines none for sigmoid scores
    for layer, chosen in routing.items():
        reference[f"router.{layer}"] = chosen.experts.int()
        reference[f"gate.{layer}"] = chosen.gates.detach()
    gradients = hf.gradients(model)
    assert gradients.keys() == {key for key in weights if not key.endswith("e_score_correction_bias")}
    for key, gradient in gradients.items():
        # What cancels to rounding noise is zero: the router of a renormalised top-1, an expert without tokens.
        if gradient.numel():
            reference[f"grad.{key}"] = gradient * (gradient.norm() > 1e-14)
    losses, norms = train(model, spec, tokens, targets, name)
    reference |= {"adamw.losses": losses, "adamw.grad_norms": norms}
    reference = {k: v.float().contiguous() if v.is_floating_point() else v.contiguous() for k, v in reference.items()}
    keys = ("aux", "aux_form", "z_loss", "lr", "beta1", "beta2", "eps", "weight_decay", "clip")
    hf.save(directory / "reference.safetensors", reference, {key: str(spec[key]) for key in keys})

    # transformers as it is, in fp32: what a correct fp32 program may be expected to reach.
    model = hf.load(directory, torch.float32, exact=False)
    logits, routing = hf.run(model, tokens)
    objective(spec, logits, targets, routing)[3].backward()
    logits_error = float((logits.detach() - reference["logits"]).abs().max())
    gradient_error = max(hf.relative_error(gradient, reference[f"grad.{key}"])
                         for key, gradient in hf.gradients(model).items() if gradient.numel())
    adamw_error = float((train(model, spec, tokens, targets, name)[0] - losses).abs().max())
    errors = f"logits {logits_error:.1e} gradients {gradient_error:.1e} adamw {adamw_error:.1e}"
    assert logits_error < 1e-5 and gradient_error < 1e-5 and adamw_error < 1e-4, f"{name}: in fp32 {errors}"
    return (f"{name:<20} loss {losses[0]:.4f} -> {losses[-1]:.4f}  logits std {logits.std():.2f}  "
            f"margin {margin:.1e}  stock fp32: {errors}")


def compare(name, new, old):
    """The largest relative error between two directories of one model; raises on a difference in names or integers."""
    assert (new / name / "config.json").read_text() == (old / name / "config.json").read_text(), "config.json differs"
    worst = (0.0, "")
    for file in ("model.safetensors", "reference.safetensors"):
        (mine, my_metadata), (theirs, their_metadata) = hf.read(new / name / file), hf.read(old / name / file)
        assert my_metadata == their_metadata, f"{file}: metadata differ"
        assert mine.keys() == theirs.keys(), f"{file}: {sorted(mine.keys() ^ theirs.keys())}"
        for key in mine:
            assert mine[key].shape == theirs[key].shape and mine[key].dtype == theirs[key].dtype, f"{file}: {key}"
            if mine[key].is_floating_point():
                worst = max(worst, (hf.relative_error(mine[key], theirs[key]), key))
            else:
                assert torch.equal(mine[key], theirs[key]), f"{file}: {key} differs"
    assert worst[0] <= 1e-6, f"{worst[1]}: relative error {worst[0]:.1e}"
    return worst


def main():
    golden = pathlib.Path(__file__).resolve().parent / "golden"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=golden, help="where to write, or with --check to read")
    parser.add_argument("--check", action="store_true", help="make all anew and compare; writes nothing")
    parser.add_argument("names", nargs="*", help="models (default: all): " + " ".join(MODELS))
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]}; known are: {' '.join(MODELS)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Initializing zero-element")  # the absent shared experts of Dots1
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.names or MODELS:
            if not args.check:
                print(make(name, args.out), flush=True)
                continue
            try:
                make(name, temporary)
                error, key = compare(name, pathlib.Path(temporary), args.out)
                print(f"{name:<20} ok, largest relative error {error:.1e} {key if error else ''}", flush=True)
            except (AssertionError, OSError) as problem:
                print(f"{name:<20} FAILED: {problem}", flush=True)
                failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
