#!/usr/bin/env python3
"""Reference values for the routers and balancing options that no Hugging Face model has.

    python make_router_references.py              write golden_routers/NAME/ for every case
    python make_router_references.py --check      make all anew in a temporary directory; exit 1 if they differ
    python make_router_references.py --validate   compare the model with transformers' Qwen3MoeForCausalLM
    python make_router_references.py --only NAME  (with either of the first two) one case

A tiny Qwen3-MoE-shaped GPT in fp64, written from the formulas and differentiated by PyTorch's autograd; every gradient
is also compared with central differences before anything is written. Each golden_routers/NAME/ holds

    config.json, model.safetensors     the model (F32). model_type "train_moe": Qwen3-MoE plus the keys of train_moe.c
    reference.safetensors              what a correct program must find on it (everything F32 or int32):
        tokens, targets [B,T]          logits [B,T,V]          loss [1] (cross-entropy alone)
        aux_loss, z_loss [1]           not multiplied by their coefficients
        lpr_loss [1]                   LPR: the sum over the layers, times lpr_weight; dynamic: the same of the entropy
        router.L [N,K], gate.L [N,K]   sparse layer L: chosen experts, best first, and gates; N = B T, n = b T + t
                                       (dynamic: -1 and 0 behind those that a token gets)
        grad.NAME                      of  loss + aux aux_loss + z z_loss + lpr_loss,  for every parameter
        bias_after.L [E]               sigmoid: the loss-free bias after one step with rate "bias_rate"
        bias_quantile.L [E]            sigmoid without families: the same by quantile balancing,
        bias_id.L [3,E]                and by ID balancing after three steps: this load, its squares, it reversed
        skip.logits, skip.experts.L    some cases: logits with --skip-below "skip_below", how many experts are left
        blocks.L [E,H]                 blocks: the router's rows
        family.L [E]                   family cases: the number of each expert's family
        aux_adaptive_after [layers]    aux_hf: each sparse layer's adaptive coefficient after one step from aux_alpha
    and, as strings in its metadata: aux, aux_form, z_loss, logit_norm, seed, step, and what the case needs
    (bias_rate; skip_below; fixed, 1 if the router is not trained; family_penalty, "inf" or a number; topk_layers, the
    K of each sparse layer; aux_alpha).

Needs numpy and PyTorch; transformers for --validate only.
"""
import argparse, json, math, struct, sys, tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent / "golden_routers"
SEED, STEP = 1, 0                    # of the LPR noise
BIAS_RATE = 1e-3                     # loss-free balancing (arXiv 2408.15664)
ALPHA = 0.01                         # adaptive aux coefficient (arXiv 2406.06563) before its step
MARGIN = 1e-4                        # no routing decision may be closer than this: fp32 has to find the same one
torch.set_default_dtype(torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers that a C program can repeat: a function of counters, no state. mix64 is splitmix64.

M64 = (1 << 64) - 1


def mix64(z):
    z = (z + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def key(a, b, c, d):
    return mix64(mix64(mix64(mix64(a) ^ b) ^ c) ^ d)


def uniform(k):                      # 24 bits, never 0 or 1
    return ((k >> 40) + 0.5) * 2.0 ** -24


def normal(k):                       # Box-Muller
    return math.sqrt(-2 * math.log(uniform(k))) * math.cos(2 * math.pi * uniform(mix64(k)))


def lpr_noise(layer, N, D):          # eps[n, i]; 0x4C5052 is "LPR"
    k = key(SEED, 0x4C5052, STEP, layer)
    return torch.tensor([[normal(mix64(k ^ (n * D + i))) for i in range(D)] for n in range(N)])


def family_hash(layer, t, family):   # 0x46414D is "FAM"; t is the position in the sequence
    return key(0x46414D, layer, t, family) >> 32


# ---------------------------------------------------------------------------------------------------------------------
# The routers. x [N,H] is the block's input after its RMSNorm. Each returns, for every token,
#     z       [N,E]  the logits that softmax, aux loss and z-loss see (after normalisation and penalty)
#     p       [N,E]  what the aux loss averages; each row sums to 1
#     score   [N,E]  what top-K selects by
#     chosen  [N,K]  best first; equal scores: lowest index first
#     gates   [N,K]
#     unpenalised    score before any family penalty
# `frozen` holds the discrete decisions and stop-gradients of an earlier pass, by layer, so that finite differences can
# treat them as the constants that they are for the gradient.

def rows_dot(x, w):
    """x w^T, each element from its two rows alone: equal rows of w give equal bits, so exact twins tie exactly."""
    return (x[:, None, :] * w[None, :, :]).sum(-1)


def once(frozen, name, make):
    if name not in frozen:
        frozen[name] = make().detach()
    return frozen[name]


def top_k(score, K):
    return score.sort(dim=1, descending=True, stable=True).indices[:, :K]


def normalise_logits(z, lam):
    """Skywork-MoE (arXiv 2406.06563, gating logit normalisation): z' = lambda (z - mean z) / (std z + 1e-6), mean and
    population standard deviation over the E logits of one token. All that follows sees z': softmax, aux and z-loss."""
    centred = z - z.mean(1, keepdim=True)
    return lam * centred / (centred.pow(2).mean(1, keepdim=True).sqrt() + 1e-6)


def best_of_family(score, family, layer, T):
    """[N,E], true for the best member of each family. Of m members that tie exactly, ordered by index, the best is
    number (hash of layer, position and family) mod m."""
    best = torch.zeros_like(score, dtype=torch.bool)
    for f in sorted(set(family)):
        members = torch.tensor([e for e, g in enumerate(family) if g == f])
        s = score[:, members]
        tied = s == s.max(1, keepdim=True).values
        for n in range(len(s)):
            ties = members[tied[n]]
            best[n, ties[family_hash(layer, n % T, f) % len(ties)]] = True
    return best


def penalise(z, best, beta):
    """z - beta for all but the best of each family; `best` is a constant, so the gradient passes as by an identity.
    beta = infinity: -inf, so that softmax, sigmoid and logsumexp run over the best members alone."""
    return torch.where(best, z, torch.full_like(z, -math.inf) if math.isinf(beta) else z - beta)


def softmax_router(x, P, c, layer, K, frozen):
    z = rows_dot(x, P["gate.weight"])
    if c["logit_norm"]:
        z = normalise_logits(z, c["logit_norm"])
    unpenalised = z
    if c["family_penalty"]:
        best = once(frozen, "best", lambda: best_of_family(unpenalised, c["family"][layer], layer, c["T"]))
        z = penalise(z, best, c["family_penalty"])
    p = z.softmax(1)                                       # over all E, then top-K
    chosen = once(frozen, "chosen", lambda: top_k(z, K))
    gates = p.gather(1, chosen)
    if c["norm_topk_prob"]:
        gates = gates / gates.sum(1, keepdim=True)
    return dict(x=x, z=z, p=p, score=z, chosen=chosen, gates=gates, unpenalised=unpenalised)


def sigmoid_router(x, P, c, layer, K, frozen):
    """DeepSeek-V3 (arXiv 2412.19437, eqs. 12-16): s = sigmoid(z), top-K of s + b, gates from s alone.
    The bias has no gradient."""
    b = P["gate.e_score_correction_bias"]
    z = rows_dot(x, P["gate.weight"])
    if c["logit_norm"]:
        z = normalise_logits(z, c["logit_norm"])
    unpenalised = z.sigmoid() + b
    if c["family_penalty"]:                                # the best is judged as top-K would, by sigmoid(z) + b
        best = once(frozen, "best", lambda: best_of_family(unpenalised, c["family"][layer], layer, c["T"]))
        z = penalise(z, best, c["family_penalty"])
    s = z.sigmoid()                                        # sigmoid(-inf) = 0 ...
    score = s + b                                          # ... but 0 + b could still be selected, so the penalty is
    if c["family_penalty"]:                                # taken from s + b as well
        score = penalise(score, best, c["family_penalty"])
    chosen = once(frozen, "chosen", lambda: top_k(score, K))
    gates = s.gather(1, chosen)
    if c["norm_topk_prob"]:
        gates = gates / gates.sum(1, keepdim=True)
    p = s / s.sum(1, keepdim=True)                         # for the aux loss: DeepSeek-V3, eq. 19
    return dict(x=x, z=z, p=p, score=score, chosen=chosen, gates=gates, unpenalised=unpenalised)


def unit(v):
    return v / v.norm(dim=1, keepdim=True)


def diversity(v):
    """Mean over all M^2 entries of (Vn Vn^T - I)^2, rows of Vn normalised. Written as defined; a program would use
    |Vn Vn^T - I|^2 = |Vn^T Vn|^2 - M, which is linear in M."""
    vn = unit(v)
    return (vn @ vn.T - torch.eye(len(v))).pow(2).mean()


def lpr_router(x, P, c, layer, K, frozen):
    """Latent Prototype Routing (arXiv 2506.21328): a variational encoder to D dimensions, cosine to E prototypes."""
    D, proto = c["lpr_latent_dim"], P["gate.prototypes"]
    a = F.silu(F.layer_norm(x, x.shape[1:], P["gate.norm.weight"], P["gate.norm.bias"], 1e-5))
    mu, logvar = (a @ P["gate.encoder.weight"].T + P["gate.encoder.bias"]).split(D, dim=1)
    z = rows_dot(unit(mu), unit(proto))                    # scores in [-1, 1]; they take the place of the logits
    p = z.softmax(1)
    chosen = once(frozen, "chosen", lambda: top_k(z, K))
    picked = z.gather(1, chosen)
    gates = picked.softmax(1)
    # What the experts get: the input plus a read-out of all prototypes (as they are, not normalised).
    x_out = x + (p @ proto) @ P["gate.readout.weight"].T + P["gate.readout.bias"]

    kl = (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)).mean()

    def target():                                          # where alignment pulls each prototype: a stop-gradient
        latent = mu + (logvar / 2).exp() * lpr_noise(layer, len(x), D)
        rho = torch.zeros_like(z).scatter(1, chosen, picked).softmax(1)     # chosen scores, 0 elsewhere
        t = rho.T @ latent                                 # "sum" over the tokens, as published ...
        return t / len(x) if c["lpr_align_form"] == "mean" else t           # ... or their "mean": divided by N
    target = once(frozen, "target", target)
    align = (proto - target).abs().mean()
    terms = dict(div=c["lpr_diversity"] * (diversity(mu) + diversity(proto)), kl=c["lpr_kl"] * kl,
                 align=c["lpr_align"] * align)
    return dict(x=x_out, z=z, p=p, score=z, chosen=chosen, gates=gates, lpr=c["lpr_weight"] * sum(terms.values()),
                terms=terms, align_margin=(proto - target).abs().min().item())


def dynamic_router(x, P, c, layer, K, frozen):
    """DynMoLE (arXiv 2504.00661): Tsallis' entropy S of p. Where it is above the threshold a token gets all experts
    (here: K), else the best that have at most `share` together, `least` at any rate. The objective gets the mean S."""
    r = softmax_router(x, P, dict(c, norm_topk_prob=False), layer, K, frozen)
    q, p, gates = c["dynamic_q"], r["p"], r["gates"]
    entropy = (1 - (p ** q).sum(1)) / (q - 1)

    def kept():
        reached, place = gates.cumsum(1), torch.arange(K)
        few = (reached <= c["dynamic_share"]) | (place < c["dynamic_least"])
        margins = entropy - c["dynamic_entropy"], reached - c["dynamic_share"]
        r["margin"] = min(m.abs().min().item() for m in margins)
        return few | (entropy > c["dynamic_entropy"])[:, None]
    kept = once(frozen, "kept", kept)
    gates = torch.where(kept, gates, torch.zeros_like(gates))
    if c["norm_topk_prob"]:
        gates = gates / gates.sum(1, keepdim=True)
    chosen = torch.where(kept, r["chosen"], torch.full_like(r["chosen"], -1))
    return dict(r, chosen=chosen, gates=gates, lpr=c["dynamic_weight"] * entropy.mean(), scattered=r["chosen"])


ROUTERS = dict(softmax=softmax_router, sigmoid=sigmoid_router, lpr=lpr_router, dynamic=dynamic_router)


# ---------------------------------------------------------------------------------------------------------------------
# The model: Qwen3-MoE. Names are those of the checkpoint.

def rms_norm(x, w, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


def rope(x, theta):
    """rotate_half form; x [B,heads,T,HD]: pairs are (i, i + HD/2)."""
    T, HD = x.shape[-2:]
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, HD, 2) / HD)
    cos, sin = angle.cos(), angle.sin()
    lo, hi = x[..., :HD // 2], x[..., HD // 2:]
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1)


def attention(x, P, c):
    B, T, _ = x.shape
    NH, NKV, HD = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q = (x @ P["q_proj.weight"].T).view(B, T, NH, HD)
    k = (x @ P["k_proj.weight"].T).view(B, T, NKV, HD)
    v = (x @ P["v_proj.weight"].T).view(B, T, NKV, HD)
    q = rope(rms_norm(q, P["q_norm.weight"], c["rms_norm_eps"]).transpose(1, 2), c["rope_theta"])
    k = rope(rms_norm(k, P["k_norm.weight"], c["rms_norm_eps"]).transpose(1, 2), c["rope_theta"])
    k, v = (u.repeat_interleave(NH // NKV, dim=1) for u in (k, v.transpose(1, 2)))   # head h reads h // (NH / NKV)
    s = q @ k.transpose(-1, -2) / math.sqrt(HD)
    s = s.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return (s.softmax(-1) @ v).transpose(1, 2).reshape(B, T, NH * HD) @ P["o_proj.weight"].T


def swiglu(x, P, name=""):
    g, u, d = (P[f"{name}{m}_proj.weight"] for m in ("gate", "up", "down"))
    return (F.silu(x @ g.T) * (x @ u.T)) @ d.T


def is_sparse(c, l):
    return l not in c["mlp_only_layers"] and (l + 1) % c["decoder_sparse_step"] == 0


def sparse_layers(c):
    return [l for l in range(c["num_hidden_layers"]) if is_sparse(c, l)]


def topk_of(c, l):                   # Matryoshka (arXiv 2509.26520): every layer has its own K
    return c["topk_layers"][sparse_layers(c).index(l)] if c["topk_layers"] else c["num_experts_per_tok"]


def under(W, prefix):
    return {n[len(prefix):]: w for n, w in W.items() if n.startswith(prefix)}


def moe(x, P, c, l, frozen):
    """y = sum over the chosen experts of gate times expert. All experts see all tokens, unchosen ones with gate 0."""
    r = ROUTERS[c["router_type"]](x, P, c, l, topk_of(c, l), frozen)
    if c.get("skip_below"):          # experts with a small gate are left out (arXiv 2410.06270)
        ratio = r["gates"] / r["gates"].max(1, keepdim=True).values
        assert (ratio - c["skip_below"]).abs().min() > MARGIN
        r["left"] = (ratio >= c["skip_below"]).sum(1)
        r["gates"] = torch.where(ratio >= c["skip_below"], r["gates"], torch.zeros_like(ratio))
        if c["norm_topk_prob"]:
            r["gates"] = r["gates"] / r["gates"].sum(1, keepdim=True)
    gates = torch.zeros_like(r["z"]).scatter(1, r.get("scattered", r["chosen"]), r["gates"])
    y = sum(gates[:, e, None] * swiglu(r["x"], P, f"experts.{e}.") for e in range(c["num_experts"]))
    return y, r


def forward(W, c, tokens, targets, frozen=None):
    frozen = {} if frozen is None else frozen
    B, T = tokens.shape
    x, routings = W["model.embed_tokens.weight"][tokens], {}
    for l in range(c["num_hidden_layers"]):
        P = under(W, f"model.layers.{l}.")
        x = x + attention(rms_norm(x, P["input_layernorm.weight"], c["rms_norm_eps"]), under(P, "self_attn."), c)
        h = rms_norm(x, P["post_attention_layernorm.weight"], c["rms_norm_eps"])
        if is_sparse(c, l):
            y, routings[l] = moe(h.view(B * T, -1), under(P, "mlp."), c, l, frozen.setdefault(l, {}))
            x = x + y.view(B, T, -1)
        else:
            x = x + swiglu(h, under(P, "mlp."))
    head = W["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    logits = rms_norm(x, W["model.norm.weight"], c["rms_norm_eps"]) @ head.T
    out = dict(logits=logits, loss=F.cross_entropy(logits.view(B * T, -1), targets.view(-1)), routings=routings,
               aux_loss=aux_loss(routings, c), z_loss=z_loss(routings))
    out["objective"] = out["loss"] + c["aux"] * out["aux_loss"] + c["z"] * out["z_loss"]
    if c["router_type"] in ("lpr", "dynamic"):
        out["lpr_loss"] = sum(r["lpr"] for r in routings.values())
        out["objective"] = out["objective"] + out["lpr_loss"]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Balancing.

def counts(r):
    return torch.bincount(r["chosen"][r["chosen"] >= 0], minlength=r["z"].shape[1]).double()


def aux_loss(routings, c):
    E = c["num_experts"]
    if c["aux_form"] == "switch":    # Switch Transformer (arXiv 2101.03961, eqs. 4-6), f = share of the N K assignments
        return sum(E * (counts(r) / (r["chosen"] >= 0).sum() * r["p"].mean(0)).sum() for r in routings.values())
    # Hugging Face's load_balancing_loss_func: the tokens of all layers as one batch; f is per token, so it sums to K.
    rows = sum(len(r["p"]) for r in routings.values())
    f = sum(counts(r) for r in routings.values()) / rows
    return E * (f * torch.cat([r["p"] for r in routings.values()]).mean(0)).sum()


def z_loss(routings):                # ST-MoE (arXiv 2202.08906, eq. 5), summed over the layers
    return sum(r["z"].logsumexp(1).pow(2).mean() for r in routings.values())


def bias_after(b, r):                # b_e + rate sign(mean load - load_e) (arXiv 2408.15664, algorithm 1)
    load = counts(r)
    return b + BIAS_RATE * torch.sign(load.mean() - load)


def bias_by_quantile(b, r):          # one round of Su 2026 (kexue.fm/archives/11619)
    N, E, K = *r["z"].shape, r["chosen"].shape[1]
    s = r["z"].detach().numpy().astype(np.float64)
    s = 1 / (1 + np.exp(-s))
    alpha = np.sort(s + b.numpy(), axis=1)[:, E - K - 1]   # a token's best expert among those that it does not get
    beta = np.sort(s - alpha[:, None], axis=0)[::-1][N * K // E]
    return torch.from_numpy(beta.mean() - beta)


def bias_by_error(b, r):             # ID balancing (arXiv 2609.39137) with K_d = K_i
    n, before, after = counts(r), 0, []                    # no error before the first: its change does not count
    for load in (n, n * n, n.flip(0)):
        error = 1 - load / load.mean()
        change = error - before
        b = b + BIAS_RATE * torch.where(before * change > 0, error + change, error)
        before, b = error, b - b.mean()
        after.append(b)
    return torch.stack(after)


def overload(r):                     # the share of the assignments above an equal load
    f = counts(r) / (r["chosen"] >= 0).sum()
    return 0.5 * (f - 1 / len(f)).abs().sum()


def adaptive_after(alpha, r):        # Skywork-MoE (arXiv 2406.06563, adaptive auxiliary loss coefficients)
    return 0.99 * alpha + 0.01 * min(overload(r).item() / 5, 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The cases.

COMMON = dict(d=20, I=9, dense_I=9, NH=2, NKV=1, HD=4, V=50, L=2, B=2, T=10, mlp_only=[], step=1, tied=True,
              norm_topk=True, router="softmax", logit_norm=0.0, aux=0.0, aux_form="switch", z=0.0, family=None,
              penalty=0.0, topk_layers=None, twins=None, lpr=None, blocks=False)
BALANCE = dict(aux=0.02, z=0.003)
LPR = dict(lpr_latent_dim=16, lpr_diversity=1.0, lpr_kl=0.01, lpr_align=0.05, lpr_weight=0.01, lpr_align_form="sum")
LPR_OTHER = dict(lpr_latent_dim=7, lpr_diversity=0.7, lpr_kl=0.3, lpr_align=0.1, lpr_weight=0.5, lpr_align_form="mean")
DYNAMIC = dict(dynamic_q=1.1, dynamic_entropy=1.4, dynamic_share=0.75, dynamic_least=2, dynamic_weight=0.01)
DYNAMIC_OTHER = dict(dynamic_q=2.0, dynamic_entropy=0.8, dynamic_share=0.75, dynamic_least=1, dynamic_weight=0.5)
SKIP = dict(sigmoid=0.9, lpr_mean=0.8, matryoshka=0.5)      # these cases also with experts left out
ADAPTIVE = "aux_hf"                  # this case also carries the adaptive coefficient, which needs only its counts
INF = math.inf

CASES = {
    "sigmoid": dict(router="sigmoid", E=5, K=2, V=51, tied=False),
    "sigmoid_top1": dict(router="sigmoid", E=4, K=1, norm_topk=False, mlp_only=[0], **BALANCE),
    "lpr": dict(router="lpr", E=4, K=2, T=9, lpr=LPR),
    "lpr_mean": dict(router="lpr", E=7, K=3, d=22, step=2, lpr=LPR_OTHER),       # every term is felt in the gradient
    "logit_norm": dict(E=6, K=2, T=11, step=2, logit_norm=1.5, **BALANCE),
    "aux_hf": dict(E=4, K=2, L=3, NH=3, mlp_only=[1], norm_topk=False, aux_form="hf", **BALANCE),
    "matryoshka": dict(E=5, K=2, T=9, norm_topk=False, topk_layers=[3, 1], **BALANCE),
    "family": dict(E=6, K=2, step=2, family={1: [0, 1, 0, 2, 1, 0]}, penalty=0.7),
    "family_aux": dict(E=5, K=2, norm_topk=False, family={0: [0, 1, 0, 1, 2], 1: [0, 0, 1, 2, 2]}, penalty=0.7,
                       **BALANCE),
    "family_inf": dict(E=7, K=3, step=2, norm_topk=False, family={1: [0, 1, 2, 3, 1, 2, 1]}, penalty=INF, **BALANCE),
    "family_sigmoid": dict(router="sigmoid", E=6, K=2, step=2, family={1: [0, 1, 2, 1, 0, 2]}, penalty=0.7, z=0.003),
    "family_sigmoid_inf": dict(router="sigmoid", E=5, K=2, mlp_only=[1], family={0: [0, 1, 2, 0, 1]}, penalty=INF,
                               **BALANCE),
    # Exact copies: the first experts are a model of their own, expert i is a twin of expert twins[i]. With an infinite
    # penalty the larger model computes what the smaller one does, whatever the gates.
    "family_twins": dict(E=6, K=2, mlp_only=[1], norm_topk=False, twins=[0, 1, 2, 0, 1, 2], penalty=INF),
    "family_twins_sigmoid": dict(router="sigmoid", E=7, K=2, T=11, step=2, twins=[0, 1, 2, 0, 1, 2, 0], penalty=INF),
    "blocks": dict(E=5, K=2, d=22, mlp_only=[0], blocks=True, **BALANCE),
    "dynamic": dict(router="dynamic", E=6, K=6, norm_topk=False, lpr=DYNAMIC, **BALANCE),
    "dynamic_norm": dict(router="dynamic", E=7, K=4, d=22, mlp_only=[0], aux_form="hf", lpr=DYNAMIC_OTHER, **BALANCE),
}


def make_config(o):
    """One dict for all: config.json is made of it, less what is no property of a model."""
    c = dict(architectures=["TrainMoeForCausalLM"], model_type="train_moe", base_model_type="qwen3_moe",
             vocab_size=o["V"], hidden_size=o["d"], intermediate_size=o["dense_I"], num_hidden_layers=o["L"],
             num_attention_heads=o["NH"], num_key_value_heads=o["NKV"], head_dim=o["HD"], hidden_act="silu",
             max_position_embeddings=32, rms_norm_eps=1e-6, rope_theta=10000.0,
             rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=o["tied"],
             attention_bias=False, attention_dropout=0.0, use_sliding_window=False, sliding_window=None,
             decoder_sparse_step=o["step"], mlp_only_layers=o["mlp_only"], moe_intermediate_size=o["I"],
             num_experts=o["E"], num_local_experts=o["E"], num_experts_per_tok=o["K"], norm_topk_prob=o["norm_topk"],
             router_aux_loss_coef=o["aux"], output_router_logits=False, initializer_range=0.02, torch_dtype="float32",
             dtype="float32", router_type=o["router"], logit_norm=o["logit_norm"], **(o["lpr"] or {}))
    if o["router"] == "softmax" and not o["logit_norm"] and not o["penalty"]:      # ordinary: a plain Qwen3-MoE
        for k in ("base_model_type", "router_type", "logit_norm"):
            del c[k]
        c.update(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe")
    run = dict(B=o["B"], T=o["T"], aux=o["aux"], aux_form=o["aux_form"], z=o["z"], topk_layers=o["topk_layers"],
               family_penalty=o["penalty"], family=o["family"], blocks=o["blocks"])
    if o["twins"]:
        run["family"] = {l: o["twins"] for l in sparse_layers(c)}
    full = dict(dict(router_type="softmax", logit_norm=0.0), **c, **run)
    return c, full


def make_weights(c, seed, twins):
    """Random, rounded to F32, which is what the file will hold. RandomState's stream never changes between versions."""
    rng = np.random.RandomState(seed)
    W = {}

    def add(name, *shape, std=0.3, mean=0.0):
        W[name] = torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32)).double()

    d, I, E, V = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"], c["vocab_size"]
    NH, NKV, HD = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    E = len(set(twins)) if twins else E

    def add_ffn(p, I):
        add(p + "gate_proj.weight", I, d)
        add(p + "up_proj.weight", I, d)
        add(p + "down_proj.weight", d, I)

    add("model.embed_tokens.weight", V, d)
    for l in range(c["num_hidden_layers"]):
        p = f"model.layers.{l}."
        add(p + "input_layernorm.weight", d, std=0.1, mean=1)
        add(p + "self_attn.q_proj.weight", NH * HD, d)
        add(p + "self_attn.k_proj.weight", NKV * HD, d)
        add(p + "self_attn.v_proj.weight", NKV * HD, d)
        add(p + "self_attn.o_proj.weight", d, NH * HD)
        add(p + "self_attn.q_norm.weight", HD, std=0.1, mean=1)
        add(p + "self_attn.k_norm.weight", HD, std=0.1, mean=1)
        add(p + "post_attention_layernorm.weight", d, std=0.1, mean=1)
        if not is_sparse(c, l):
            add_ffn(p + "mlp.", c["intermediate_size"])
            continue
        if c["router_type"] == "lpr":
            D = c["lpr_latent_dim"]
            add(p + "mlp.gate.norm.weight", d, std=0.1, mean=1)
            add(p + "mlp.gate.norm.bias", d, std=0.1)
            add(p + "mlp.gate.encoder.weight", 2 * D, d)
            add(p + "mlp.gate.encoder.bias", 2 * D, std=0.1)
            add(p + "mlp.gate.prototypes", E, D, std=1)
            add(p + "mlp.gate.readout.weight", d, D)
            add(p + "mlp.gate.readout.bias", d, std=0.1)
        else:
            add(p + "mlp.gate.weight", E, d)
        if c["blocks"]:              # grouped average pooling (arXiv 2401.13920)
            block = torch.tensor([[float(i * E // d == e) for i in range(d)] for e in range(E)])
            W[p + "mlp.gate.weight"] = (block / block.sum(1, keepdim=True)).float().double()
        if c["router_type"] == "sigmoid":
            add(p + "mlp.gate.e_score_correction_bias", E, std=0.15)
        for e in range(E):
            add_ffn(p + f"mlp.experts.{e}.", I)
    add("model.norm.weight", d, std=0.1, mean=1)
    if not c["tie_word_embeddings"]:
        add("lm_head.weight", V, d)
    text = torch.from_numpy(rng.randint(0, V, (c["B"], c["T"] + 1)))
    return W, text[:, :-1].contiguous(), text[:, 1:].contiguous()


def copy_twins(W, c, twins):
    """The model whose expert i is a copy of expert twins[i] of W."""
    out = {n: w for n, w in W.items() if ".mlp.experts." not in n}
    for l in sparse_layers(c):
        p = f"model.layers.{l}.mlp."
        for n in (n for n in W if n.startswith(p + "gate.")):
            out[n] = W[n][twins].clone()
        for i, e in enumerate(twins):
            out.update({f"{p}experts.{i}.{n}": w.clone() for n, w in under(W, f"{p}experts.{e}.").items()})
    return out


def is_parameter(name):
    return not name.endswith("e_score_correction_bias")


def gaps(score, K):
    """Distances between neighbours among the K + 1 best scores of each token (-inf beyond the last is far away)."""
    s = score.detach().sort(dim=1, descending=True).values[:, :K + 1]
    return s[:, :-1] - s[:, 1:]


def why_not(name, W, c, out, twins):
    """None if the case shows what it is there for, with every decision clear enough for fp32; else the reason."""
    overloads, equal_load, two_of_a_family = [], False, False
    for l, r in out["routings"].items():
        K, chosen, score = topk_of(c, l), r["chosen"], r["unpenalised" if "unpenalised" in r else "score"].detach()
        if (gaps(r["score"], K) < MARGIN).any():
            return "two of the best K + 1 are too close"
        if c["router_type"] == "dynamic":
            numbers = (chosen >= 0).sum(1)
            if r["margin"] < MARGIN:
                return "a token's number of experts is too close to another"
            if len(numbers.unique()) < 3 or numbers.min() > c["dynamic_least"] or (numbers == K).all():
                return "the number of experts varies too little"
            if l == min(out["routings"]) and not (numbers == K).any():
                return "no token gets all"
        if r.get("align_margin", 1) < MARGIN:
            return "the alignment loss is too close to its kink"
        if c["router_type"] == "sigmoid" and not c["family_penalty"]:
            b = W[f"model.layers.{l}.mlp.gate.e_score_correction_bias"]
            if torch.equal(top_k(score - b, K), chosen):
                return "the bias changes no selection"
        if c["family_penalty"]:
            if torch.equal(top_k(score, K), chosen):
                return "the penalty changes no selection"
            family = torch.tensor(c["family"][l])
            for f in family.unique():
                g = gaps(score[:, family == f], 1)
                if not twins and (g < MARGIN).any() or twins and (g != 0).any():
                    return "members of a family are too close, or twins not equal"
            kinds = [len(set(row)) for row in family[chosen].tolist()]
            two_of_a_family |= min(kinds) < K
            if math.isinf(c["family_penalty"]) and min(kinds) < K:
                return "two members of one family chosen"
        if twins and (counts(r) == 0).any():
            return "a twin without tokens"
        equal_load |= bool((counts(r) == counts(r).mean()).any())
        overloads.append(overload(r).item())
    if name == "sigmoid_top1" and not equal_load:
        return "no expert has the mean load (sign 0)"
    if name == "family" and not two_of_a_family:
        return "the finite penalty never leaves two of a family"
    if name == ADAPTIVE and not 0 < min(overloads) < 0.04 < 0.06 < max(overloads):
        return "need one layer below and one above the cap xi d = 0.01, which is at d = 0.05"
    return None


def build(name):
    """The case's options, config.json, configuration, weights, text and forward pass: the first seed that serves."""
    o = dict(COMMON, **CASES[name])
    config, c = make_config(o)
    first = 1000 * list(CASES).index(name)
    for seed in range(first, first + 1000):
        W, tokens, targets = make_weights(c, seed, o["twins"])
        original = None
        if o["twins"]:
            small = dict(c, num_experts=len(set(o["twins"])), family_penalty=0.0)
            original = forward(W, small, tokens, targets)
            W = copy_twins(W, c, o["twins"])
        for n, w in W.items():
            w.requires_grad_(is_parameter(n) and not (c["blocks"] and ".gate." in n))
        frozen = {}
        out = forward(W, c, tokens, targets, frozen)
        if why_not(name, W, c, out, o["twins"]) is None:
            break
    else:
        raise SystemExit(f"{name}: no seed serves: {why_not(name, W, c, out, o['twins'])}")
    if original:                                           # the transition preserves the function
        assert (original["logits"] - out["logits"]).abs().max() < 1e-13
        out["logits"] = original["logits"]
    return o, config, c, W, tokens, targets, out, frozen


def check_gradients(name, W, c, tokens, targets, frozen):
    """Autograd against central differences along a random direction in some tensors: all routers', and a few more."""
    rng = np.random.RandomState(1)
    names = [n for n in W if W[n].requires_grad]
    picked = [n for n in names if ".gate." in n]
    picked += list(rng.choice([n for n in names if n not in picked], 6, replace=False))
    worst, h = 0.0, 1e-5
    with torch.no_grad():
        for n in picked:
            u = torch.from_numpy(rng.standard_normal(W[n].shape))
            u /= u.norm()
            f = [forward(dict(W, **{n: W[n] + s * h * u}), c, tokens, targets, frozen)["objective"] for s in (1, -1)]
            numeric, exact = ((f[0] - f[1]) / (2 * h)).item(), (W[n].grad * u).sum().item()
            error = abs(numeric - exact) / max(abs(exact), 1e-4)
            assert error < 1e-5, f"{name}: gradient of {n}: autograd {exact}, central difference {numeric}"
            worst = max(worst, error)
    return worst


def make_case(name, folder):
    o, config, c, W, tokens, targets, out, frozen = build(name)
    out["objective"].backward()
    worst = check_gradients(name, W, c, tokens, targets, frozen)

    ref = dict(tokens=tokens.int(), targets=targets.int(), logits=out["logits"])
    for n in ("loss", "aux_loss", "z_loss", "lpr_loss"):
        if n in out:
            ref[n] = out[n].reshape(1)
    meta = dict(format="pt", aux=str(c["aux"]), aux_form=c["aux_form"], z_loss=str(c["z"]),
                logit_norm=str(c["logit_norm"]), seed=str(SEED), step=str(STEP))
    for l, r in out["routings"].items():
        ref[f"router.{l}"], ref[f"gate.{l}"] = r["chosen"].int(), r["gates"]
        if c["blocks"]:
            ref[f"blocks.{l}"] = W[f"model.layers.{l}.mlp.gate.weight"]
        if c["family_penalty"]:
            ref[f"family.{l}"] = torch.tensor(c["family"][l]).int()
            meta["family_penalty"] = str(c["family_penalty"])
        if c["router_type"] == "sigmoid":
            b = W[f"model.layers.{l}.mlp.gate.e_score_correction_bias"]
            ref[f"bias_after.{l}"] = bias_after(b, r)
            if not c["family_penalty"]:
                ref[f"bias_quantile.{l}"], ref[f"bias_id.{l}"] = bias_by_quantile(b, r), bias_by_error(b, r)
            meta["bias_rate"] = str(BIAS_RATE)
    if name in SKIP:
        meta["skip_below"] = str(SKIP[name])
        skipped = forward(W, dict(c, skip_below=SKIP[name]), tokens, targets)
        ref["skip.logits"] = skipped["logits"]
        for l, r in skipped["routings"].items():
            assert r["left"].min() < r["left"].max() or topk_of(c, l) == 1
            ref[f"skip.experts.{l}"] = r["left"].int()
    if c["topk_layers"]:
        meta["topk_layers"] = ",".join(map(str, c["topk_layers"]))
    if name == ADAPTIVE:
        ref["aux_adaptive_after"] = torch.tensor([adaptive_after(ALPHA, r) for r in out["routings"].values()])
        meta["aux_alpha"] = str(ALPHA)
    if c["blocks"]:
        meta["fixed"] = "1"
    for n, w in W.items():
        if is_parameter(n) and not w.requires_grad:
            ref["grad." + n] = torch.zeros_like(w)
        elif is_parameter(n):        # a gradient is exactly zero (an expert without tokens) or well above rounding
            assert w.grad.norm() == 0 or w.grad.norm() > 1e-5, (name, n, w.grad.norm())
            ref["grad." + n] = w.grad

    folder = Path(folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(folder / "model.safetensors", W, dict(format="pt"))
    write_safetensors(folder / "reference.safetensors", ref, meta)
    size = sum(f.stat().st_size for f in folder.iterdir())
    zero = sum(1 for n in ref if n.startswith("grad.") and not ref[n].any())
    print(f"{name:22s} loss {out['loss'].item():.4f}  aux {out['aux_loss'].item():.4f}  z {out['z_loss'].item():.4f}"
          f"  worst gradient error {worst:.0e}  {len(ref)} tensors, {zero} zero gradients, {size / 1e3:.0f} kB")
    return size


# ---------------------------------------------------------------------------------------------------------------------
# safetensors, written here so that the same values give the same bytes (the library's own order of metadata varies).

def write_safetensors(path, tensors, metadata):
    header, blobs, at = {"__metadata__": metadata}, [], 0
    for n, t in tensors.items():
        integer = t.dtype == torch.int32
        blobs.append(t.detach().contiguous().numpy().astype("<i4" if integer else "<f4").tobytes())
        header[n] = dict(dtype="I32" if integer else "F32", shape=list(t.shape), data_offsets=[at, at + len(blobs[-1])])
        at += len(blobs[-1])
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(blobs))


def read_safetensors(path):
    raw = path.read_bytes()
    n, = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8:8 + n]), raw[8 + n:]
    metadata, kinds = header.pop("__metadata__"), dict(F32="<f4", I32="<i4")
    return metadata, {k: np.frombuffer(data[slice(*v["data_offsets"])], kinds[v["dtype"]]).reshape(v["shape"])
                      for k, v in header.items()}


def differences(old, new):
    """What differs between two cases, as lines of text. Floats may differ by a relative L2 error of 1e-6."""
    missing = [f.name for f in new.iterdir() if not (old / f.name).is_file()]
    if missing:
        return [f"missing: {', '.join(missing)}"]
    found = []
    if json.loads((old / "config.json").read_text()) != json.loads((new / "config.json").read_text()):
        found.append("config.json differs")
    for f in ("model.safetensors", "reference.safetensors"):
        (ma, a), (mb, b) = read_safetensors(old / f), read_safetensors(new / f)
        if ma != mb:
            found.append(f"{f}: metadata {ma}, now {mb}")
        if a.keys() != b.keys():
            found.append(f"{f}: other tensors: {sorted(a.keys() ^ b.keys())}")
        for n in a.keys() & b.keys():
            if a[n].dtype != b[n].dtype or a[n].shape != b[n].shape:
                found.append(f"{f}: {n}: {a[n].dtype} {a[n].shape}, now {b[n].dtype} {b[n].shape}")
                continue
            x, y = a[n].astype(np.float64), b[n].astype(np.float64)
            error, scale = np.linalg.norm(x - y), np.linalg.norm(y)
            if not error <= (0 if a[n].dtype.kind == "i" else 1e-6 * scale):
                found.append(f"{f}: {n}: relative error {error / max(scale, 1e-300):.1e}")
    return found


def check(names):
    stale = sorted(f.name for f in HERE.glob("*") if f.name not in CASES)
    for name in stale:
        print(f"  DIFFERS  {name}: no such case")
    bad = len(stale)
    with tempfile.TemporaryDirectory() as tmp:
        for name in names:
            make_case(name, tmp)
            for line in differences(HERE / name, Path(tmp) / name):
                print(f"  DIFFERS  {line}")
                bad += 1
    print("all as committed" if not bad else f"{bad} differences")
    return bad


# ---------------------------------------------------------------------------------------------------------------------
# The model against an independent one, where there is one: the ordinary softmax router.

def validate():
    """transformers keeps a few steps in fp32 even in a model of doubles; here its "float32" is made to mean float64."""
    import transformers
    import transformers.models.qwen3_moe.modeling_qwen3_moe as hf

    class Torch64:
        float32 = float = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    name = "aux_hf"                  # Hugging Face's form of the aux loss, a dense layer between sparse ones
    _, _, c, W, tokens, targets, _, _ = build(name)
    bad = False
    saved = hf.torch, torch.Tensor.float
    for norm_topk in (False, True):
        c = dict(c, norm_topk_prob=norm_topk, z=0.0)
        for w in W.values():
            w.grad = None
        ours = forward(W, c, tokens, targets)
        ours["objective"].backward()
        with tempfile.TemporaryDirectory() as tmp:
            config, _ = make_config({**COMMON, **CASES[name], "norm_topk": norm_topk})
            (Path(tmp) / "config.json").write_text(json.dumps(config))
            write_safetensors(Path(tmp) / "model.safetensors", W, dict(format="pt"))
            try:
                hf.torch, torch.Tensor.float = Torch64(), torch.Tensor.double
                model = hf.Qwen3MoeForCausalLM.from_pretrained(tmp, dtype=torch.float64, attn_implementation="eager")
                model.set_experts_implementation("eager")
                theirs = model(input_ids=tokens, output_router_logits=True)
                loss = F.cross_entropy(theirs.logits.reshape(-1, c["vocab_size"]), targets.reshape(-1))
                (loss + c["aux"] * theirs.aux_loss).backward()
            finally:
                hf.torch, torch.Tensor.float = saved
        errors = dict(logits=(ours["logits"] - theirs.logits).abs().max().item(),
                      loss=abs(ours["loss"] - loss).item(), aux_loss=abs(ours["aux_loss"] - theirs.aux_loss).item())
        grads = {n: p.grad for n, p in model.named_parameters()}
        worst = 0.0
        for n, w in W.items():
            g = hf_gradient(grads, n, c)
            worst = max(worst, ((g - w.grad).norm() / w.grad.norm().clamp(min=1e-30)).item() if w.grad.any()
                        else g.abs().max().item())
        errors["gradients (relative)"] = worst
        print(f"transformers {transformers.__version__}, norm_topk_prob {norm_topk}: largest differences: "
              + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        bad |= max(errors.values()) > 1e-10
    print("validated" if not bad else "TOO FAR APART")
    return bad


def hf_gradient(grads, name, c):
    """transformers 5 packs the experts: gate_up_proj [E,2I,H], down_proj [E,H,I]."""
    if name in grads:
        return grads[name]
    head, _, tail = name.partition(".experts.")
    e, matrix, _ = tail.split(".")
    I = c["moe_intermediate_size"]
    if matrix == "down_proj":
        return grads[f"{head}.experts.down_proj"][int(e)]
    both = grads[f"{head}.experts.gate_up_proj"][int(e)]
    return both[:I] if matrix == "gate_proj" else both[I:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is there; exit 1 if it differs")
    parser.add_argument("--validate", action="store_true", help="compare the model with transformers")
    parser.add_argument("--only", choices=CASES, help="one case")
    args = parser.parse_args()
    names = [args.only] if args.only else list(CASES)
    if args.validate:
        return int(validate())
    if args.check:
        return int(check(names) > 0)
    print(f"{sum(make_case(n, HERE) for n in names) / 1e3:.0f} kB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
