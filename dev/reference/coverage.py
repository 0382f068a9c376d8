#!/usr/bin/env python3
"""Which well-known models open: makes COVERAGE.md. From the project's folder, after `make`:

    python3 dev/reference/coverage.py [WORD ...]     only rows whose name contains a word: printed, nothing written

Each row has the keys of a model's config.json that say what is to be computed, with small sizes. Where both programs take
the configuration, transformers makes random weights for it; train_moe evaluates these files, upcycle makes a mixture of
them (or twice the experts, twice as many for a token, as copies), and transformers evaluates both. Nothing here says what is
supported: the programs do.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf

ROOT = pathlib.Path(__file__).resolve().parents[2]
T, WINDOWS, VOCABULARY, TOLERANCE = 128, 4, 320, 1e-6         # of losses that are printed with six digits


def dense(kind, heads, head_dim=None, **keys):
    """heads: (queries, keys and values), in lowest terms."""
    config = dict(model_type=kind, vocab_size=VOCABULARY, hidden_size=16 * heads[0], intermediate_size=72,
                  num_hidden_layers=2, num_attention_heads=heads[0], num_key_value_heads=heads[1], hidden_act="silu",
                  bos_token_id=1, eos_token_id=2)
    return config | ({"head_dim": head_dim} if head_dim else {}) | keys


def llama(heads, theta=10000.0, eps=1e-5, positions=2048, tied=False, **keys):
    return dense("llama", heads, max_position_embeddings=positions, rms_norm_eps=eps, rope_theta=theta,
                 tie_word_embeddings=tied, attention_bias=False, mlp_bias=False, **{"rope_scaling": None} | keys)


def mistral(theta, window, positions=32768, **keys):
    return dense("mistral", (4, 1), max_position_embeddings=positions, rms_norm_eps=1e-5, rope_theta=theta,
                 sliding_window=window, tie_word_embeddings=False, **keys)


def qwen3(heads, tied, **keys):
    return dense("qwen3", heads, 24, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=None,
                 use_sliding_window=False, max_window_layers=28, attention_bias=False, tie_word_embeddings=tied, **keys)


def qwen2(heads, tied, theta=1e6, window=32768, positions=32768):
    return dense("qwen2", heads, max_position_embeddings=positions, rms_norm_eps=1e-6, rope_theta=theta,
                 sliding_window=window, use_sliding_window=False, max_window_layers=21, tie_word_embeddings=tied)


LLAMA3 = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
              rope_type="llama3")


def only(kind):
    return dict(model_type=kind)


DENSE = {
    "Qwen2.5-0.5B": qwen2((7, 1), True), "Qwen2.5-1.5B": qwen2((6, 1), True, positions=131072),
    "Qwen2.5-7B": qwen2((7, 1), False, window=131072, positions=131072),
    "Qwen3-0.6B": qwen3((2, 1), True), "Qwen3-4B": qwen3((4, 1), True),
    "Llama-3.2-1B": llama((4, 1), 5e5, positions=131072, tied=True, head_dim=16, rope_scaling=LLAMA3),
    "Llama-3.2-3B": llama((3, 1), 5e5, positions=131072, tied=True, head_dim=32, rope_scaling=LLAMA3),
    "SmolLM2-135M": llama((3, 1), 1e5, positions=8192, tied=True, rope_interleaved=False),
    "SmolLM2-360M": llama((3, 1), 1e5, positions=8192, tied=True, rope_interleaved=False),
    "SmolLM2-1.7B": llama((4, 4), 130000, positions=8192, tied=True),
    "SmolLM3-3B": only("smollm3"), "TinyLlama-1.1B": llama((8, 1)),
    "gemma-2b": only("gemma"), "gemma-2-2b": only("gemma2"), "gemma-3-1b": only("gemma3_text"),
    "OLMo-2-0425-1B": only("olmo2"), "Phi-3-mini": only("phi3"), "Phi-4-mini": only("phi3"), "phi-2": only("phi"),
    "granite-3.1-2b": only("granite"), "gpt2": only("gpt2"), "pythia-160m": only("gpt_neox"), "opt-125m": only("opt"),
    "Falcon3-1B": llama((2, 1), 1000042, 1e-6, 4096, head_dim=32),
    "Falcon3-3B": llama((3, 1), 1000042, 1e-6, 32768, head_dim=32),
    "DeepSeek-R1-Distill-Qwen-1.5B": qwen2((6, 1), False, 10000, 4096, 131072),
    "deepseek-coder-1.3b": llama((4, 4), 1e5, 1e-6, 16384, rope_scaling=dict(factor=4.0, type="linear")),
    "stablelm-2-1_6b": only("stablelm"), "EXAONE-4.0-1.2B": only("exaone4")}
MORE = {
    "Llama-2-7b": llama((4, 4), positions=4096, pretraining_tp=1), "Meta-Llama-3-8B": llama((4, 1), 5e5, positions=8192),
    "Llama-3.1-8B": llama((4, 1), 5e5, positions=131072, rope_scaling=LLAMA3 | dict(factor=8.0)),
    "Yi-1.5-6B": llama((8, 1), 5e6, 1e-6, 4096), "open_llama_3b": llama((4, 4), eps=1e-6),
    "llama-68m": llama((4, 4), eps=1e-6), "h2o-danube3-500m": llama((2, 1), 1e5, positions=8192, head_dim=24),
    "Mistral-7B-v0.1, zephyr": mistral(10000.0, 4096), "Mistral-7B-v0.3": mistral(1e6, None),
    "Mistral-Nemo": mistral(1e6, None, 131072, head_dim=24),
    "Qwen3-8B": qwen3((4, 1), False),
    "DeepSeek-R1-0528-Qwen3-8B": qwen3((4, 1), False, rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, attn_factor=0.8782488562869419)),
    "Ministral-3-3B": only("ministral3"), "starcoder2-3b": only("starcoder2"), "Minitron-4B": only("nemotron"),
    "Hunyuan-0.5B": only("hunyuan_v1_dense"), "LFM2-350M": only("lfm2"), "bloom-560m": only("bloom"),
    "TinyStories-33M": only("gpt_neo"), "OLMo-1B-0724": only("olmo")}
MOE = dict(num_experts_per_tok=2, router_aux_loss_coef=0.01, output_router_logits=False)
MIXTURES = {
    "Mixtral-8x7B": dense("mixtral", (4, 1), max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6,
                          sliding_window=None, num_local_experts=8, tie_word_embeddings=False, **MOE),
    "OLMoE-1B-7B-0924": dense("olmoe", (4, 4), max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
                              num_experts=8, norm_topk_prob=False, clip_qkv=None, attention_bias=False, **MOE),
    "Qwen3-30B-A3B": dense("qwen3_moe", (8, 1), 24, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
                           num_experts=8, moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1,
                           mlp_only_layers=[], sliding_window=None, use_sliding_window=False, **MOE),
    "dots.llm1": dense("dots1", (4, 4), 24, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e7,
                       n_routed_experts=8, n_shared_experts=2, moe_intermediate_size=24, num_experts_per_tok=2,
                       first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="noaux_tc",
                       n_group=1, topk_group=1, sliding_window=None, max_window_layers=62, attention_bias=False),
    "Qwen1.5-MoE-A2.7B": dense("qwen2_moe", (4, 4), max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=1e6,
                               num_experts=8, moe_intermediate_size=24, shared_expert_intermediate_size=40,
                               norm_topk_prob=False, decoder_sparse_step=1, sliding_window=32768,
                               use_sliding_window=False, max_window_layers=21, **MOE),
    "granite-3.0-1b-a400m": only("granitemoe"), "Phi-3.5-MoE": only("phimoe"), "gpt-oss-20b": only("gpt_oss"),
    "Jamba": only("jamba"), "DeepSeek-V2-Lite": only("deepseek_v2"), "DeepSeek-V3, Moonlight": only("deepseek_v3"),
    "FlexOlmo-7x7B": only("flex_olmo"), "ERNIE-4.5-21B-A3B": only("ernie4_5_moe"), "GLM-4.5-Air": only("glm4_moe"),
    "LFM2-8B-A1B": only("lfm2_moe")}


def run(*command):
    done = subprocess.run([str(ROOT / command[0]), *map(str, command[1:])], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def make_weights(directory):
    """Of order 1 where it matters: no bias is 0, no norm 1, so that whatever is left out shows in the loss."""
    generator = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    weights = {}
    for name, parameter in hf.parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = name.endswith("norm.weight")
        weights[name] = 1 + 0.3 * noise if norm else 0.3 * noise if parameter.ndim == 1 else 0.2 * noise
    hf.save(directory / "model.safetensors", hf.checkpoint_tensors(model, weights))


def loss_of(directory, tokens):
    model = hf.load(directory, torch.float32, exact=False)
    with torch.no_grad():
        losses = [float(hf.cross_entropy(model(tokens[None, w:w + T], use_cache=False).logits.double(),
                                         tokens[None, w + 1:w + T + 1])) for w in range(0, T * WINDOWS, T)]
    return sum(losses) / WINDOWS


def our_loss(directory, shard):
    code, said = run("train_moe", "--model", directory, "--data", shard, "--eval", "--seq", T)
    found = re.search(r"loss ([0-9.]+) \| perplexity", said)
    return (float(found[1]), said) if code == 0 and found else (None, said.strip().splitlines()[-1])


def row(name, config, folder):
    """A row of the table; 1 if the model opens; 1 if something is wrong."""
    directory, result = folder / "src", folder / "dst"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, VOCABULARY, T * WINDOWS + 1))
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    shard = folder / "tokens.bin"
    shard.write_bytes(header.tobytes() + tokens.numpy().astype("<u2").tobytes())
    said = our_loss(directory, shard)[1]
    if "config.json: " in said:
        reason = re.sub(r", (supported are|only) .*", "", said.split("config.json: ")[1])
        return f"| {name} | no | | | {reason} |", 0, 0
    make_weights(directory)
    reference, (ours, said) = loss_of(directory, tokens), our_loss(directory, shard)
    if ours is None:
        return f"| {name} | no | {reference:.6f} | | {said.removeprefix('train_moe: ')} |", 0, 1
    experts = next((config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config), 0)
    count = (2 * experts, 2 * config["num_experts_per_tok"]) if experts else (4, 2)
    exact = ["--router", "copy"] if experts else []     # dots1's usual choice moves the bias of the copies
    code, said = run("upcycle", directory, result, "--experts", count[0], "--topk", count[1], *exact)
    if code:
        return f"| {name} | yes | {reference:.6f} | {abs(ours - reference):.0e} | {said.splitlines()[-1]} |", 0, 1
    after, ours_after = loss_of(result, tokens), our_loss(result, shard)[0]
    wrong = max(abs(ours - reference), abs(after - reference), abs(ours_after - reference)) > TOLERANCE
    kind = json.loads((result / "config.json").read_text())["model_type"]
    return (f"| {name} | {'WRONG' if wrong else 'yes'} | {reference:.6f} | {abs(ours - reference):.0e} | "
            f"{kind}, {abs(after - reference):.0e} |", not wrong, wrong)


def main():
    torch.set_num_threads(1)
    words, failed, page = sys.argv[1:], 0, [__doc__.split("\n\n")[2].strip()]
    titles = {"Dense models up to about 4B": DENSE, "Further dense models": MORE, "Mixtures": MIXTURES}
    for title, models in titles.items():
        rows, opened = [], 0
        for name, config in models.items():
            if words and not any(word in name for word in words):
                continue
            with tempfile.TemporaryDirectory() as folder:
                line, opens, wrong = row(name, config, pathlib.Path(folder))
            print(line, flush=True)
            rows, opened, failed = [*rows, line], opened + opens, failed + wrong
        page += [f"## {title}: {opened} of {len(models)} open", "| model | opens | loss in transformers | off by, here | "
                 "becomes, off by there; or what stops it |\n|---|---|---|---|---|\n" + "\n".join(rows)]
    if not words:
        head = "# Which models open\n\nMade by `python3 dev/reference/coverage.py`, random weights, nothing downloaded."
        (ROOT / "dev/reference/COVERAGE.md").write_text("\n\n".join([head, *page]) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
