"""Hugging Face models as an exact reference: loading with the report checked, fp64 throughout, checkpoint names."""

import json
import math
import pathlib
import struct
import sys
import types
import typing

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(directory, dtype=torch.float64, exact=True):
    """Opens a checkpoint; refuses a missing, unexpected or mismatched key, of which transformers only warns."""
    # F32 holds every dtype that a checkpoint may have exactly; the cast comes after.
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True, local_files_only=True)
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    assert not problems, f"{directory}: {problems}"
    model = model.to(dtype).eval()
    return make_exact(model) if exact else model


# ---- no casts to fp32 ----------------------------------------------------------------------------------------------
# model.double() is not enough: RMSNorm, both softmaxes, the sigmoid router and the rotary angles are written with casts
# to fp32. The functions below are the same formulas in the dtype of their input.

def exact_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def exact_frequencies(config):
    """Inverse frequencies and what cosines and sines are multiplied by."""
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "dynamic"):  # transformers' functions name fp32 in so many words
        single = torch.float, torch.float32
        torch.float = torch.float32 = torch.float64
        try:
            return ROPE_INIT_FUNCTIONS[kind](config)
        finally:
            torch.float, torch.float32 = single
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim), 1.0


def exact_rope(self, x, position_ids):
    frequencies, factor = exact_frequencies(self.config)
    assert (frequencies / self.inv_freq - 1).abs().max() < 1e-5, (frequencies, self.inv_freq)
    angle = position_ids[..., None].to(x.dtype) * frequencies.to(x.dtype)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * factor, angle.sin() * factor


def exact_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    group = module.num_key_value_groups
    scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scaling + attention_mask
    probs = F.softmax(scores, dim=-1)
    return (probs @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous(), probs


def choose(scores, count):
    """The best experts, best first, and of equal ones the lower index, which topk does not promise.

    Rounded to fp32, because copies of an expert may differ in the last bit of fp64 and are still equal.
    """
    return torch.sort(scores.float(), dim=-1, descending=True, stable=True)[1][:, :count]


def exact_router(self, x):
    logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    probs = F.softmax(logits, dim=-1)
    experts = choose(probs, self.top_k)
    gates = probs.gather(1, experts)
    if getattr(self, "norm_topk_prob", True):  # Mixtral has no such switch: it always renormalises
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return logits, gates, experts


def exact_sigmoid_router(self, x):
    """Dots1 with one group of experts: the bias chooses, and enters nothing else."""
    assert self.num_group == 1 and self.topk_group == 1
    logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    scores = logits.sigmoid()
    experts = choose(scores + self.e_score_correction_bias, self.top_k)
    gates = scores.gather(1, experts)
    if self.norm_topk_prob:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, gates * self.routed_scaling_factor, experts


def is_router(module):
    return type(module).__name__.lower().endswith("topkrouter")


def make_exact(model):
    sys.modules[type(model).__module__].eager_attention_forward = exact_attention
    for module in model.modules():
        name, forward = type(module).__name__, None
        if name.endswith("RMSNorm"):
            forward = exact_norm
        elif name.endswith("RotaryEmbedding"):
            forward = exact_rope
        elif is_router(module):
            forward = exact_sigmoid_router if hasattr(module, "e_score_correction_bias") else exact_router
        if forward:
            module.forward = types.MethodType(forward, module)
    return model


# ---- forward pass and losses ---------------------------------------------------------------------------------------

class Routing(typing.NamedTuple):
    logits: torch.Tensor   # [N,E]
    gates: torch.Tensor    # [N,K]
    experts: torch.Tensor  # [N,K], best first
    scores: torch.Tensor   # [N,E], what the choice is made by


def run(model, tokens):
    """Logits [B,T,V], and {sparse layer: Routing}."""
    routing, hooks = {}, []

    def keep(layer):
        def hook(module, args, output):
            logits, gates, experts = output
            biased = hasattr(module, "e_score_correction_bias")
            scores = logits.sigmoid() + module.e_score_correction_bias if biased else logits
            routing[layer] = Routing(logits, gates, experts, scores)
        return hook

    for name, module in model.named_modules():
        if is_router(module):
            layer = int(name.split(".layers.")[1].split(".")[0])
            hooks.append(module.register_forward_hook(keep(layer)))
    try:
        logits = model(tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits, dict(sorted(routing.items()))


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def aux_loss(routing, form):
    """switch: sum over layers of E sum_e f_e P_e, 1 per layer when balanced. hf: all layers as one, K when balanced."""
    total = torch.zeros((), dtype=torch.float64)
    f_all, p_all = [], []
    for layer in routing.values():
        num_tokens, num_experts = layer.logits.shape
        counts = torch.bincount(layer.experts.flatten(), minlength=num_experts).to(layer.logits.dtype)
        probs = F.softmax(layer.logits, dim=-1).mean(dim=0)
        total = total + num_experts * (counts / layer.experts.numel() * probs).sum()
        f_all.append(counts / num_tokens)
        p_all.append(probs)
    if form == "hf" and routing:
        total = num_experts * (torch.stack(f_all).mean(dim=0) * torch.stack(p_all).mean(dim=0)).sum()
    return total


def transformers_aux_loss(model, routing):
    logits = tuple(layer.logits for layer in routing.values())
    top_k = next(iter(routing.values())).experts.shape[1]
    return sys.modules[type(model).__module__].load_balancing_loss_func(logits, logits[0].shape[1], top_k)


def z_loss(routing):
    return sum((layer.logits.logsumexp(dim=-1).pow(2).mean() for layer in routing.values()),
               torch.zeros((), dtype=torch.float64))


# ---- names in a checkpoint -----------------------------------------------------------------------------------------

def checkpoint_tensors(model, tensors):
    """Renames {parameter name: tensor} as on disk: transformers packs the experts of a layer, checkpoints do not."""
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    out = {}
    for name, tensor in tensors.items():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for e, packed in enumerate(tensor):
                for part, half in zip((gate, up), packed.chunk(2)):
                    out[f"{prefix}{e}.{part}.weight"] = half.contiguous()
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for e, matrix in enumerate(tensor):
                out[f"{prefix}{e}.{down}.weight"] = matrix.contiguous()
        else:
            out[name] = tensor
    return out


def parameters(model):
    """Everything a checkpoint holds, once: parameters, and the bias of a sigmoid router, which is a buffer."""
    return dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def gradients(model):
    """Gradients by checkpoint name; a tied lm_head is the embedding and appears once."""
    return checkpoint_tensors(model, {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                                      for name, parameter in model.named_parameters()})


def relative_error(value, reference):
    """L2 of the difference over L2 of the reference; the plain L2 of the difference where the reference is zero."""
    error = float((value.double() - reference.double()).norm() / (reference.double().norm() or 1.0))
    return float("inf") if math.isnan(error) else error


# ---- files ---------------------------------------------------------------------------------------------------------

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}


def save(path, tensors, metadata={}):
    """A safetensors file whose bytes depend on its content alone: the library writes metadata in random order."""
    header, end = {"__metadata__": {"format": "pt"} | metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")  # the old file may be mapped: the tensors may come from it
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().view(torch.uint8).numpy())
    partial.replace(path)


def read(path):
    """Returns {name: tensor}, metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


# ---- writing a Llama directory from another format -----------------------------------------------------------------

def rotate_half_rows(weight, heads):
    """Rows of a q or k matrix: in each head from interleaved pairs (x0 y0 x1 y1 ..) to halves (x0 x1 .. y0 y1 ..)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def write_llama(out, config, weights, tokenizer, tokenizer_config, generation_config):
    """config: what LlamaConfig needs besides the dtype; weights: {checkpoint name: tensor of one dtype}."""
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    theta = config["rope_theta"]
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", attention_bias=False,
                  mlp_bias=False, attention_dropout=0.0, **config)
    config |= dict(rope_parameters=dict(rope_theta=theta, rope_type="default"), torch_dtype=dtype, dtype=dtype)
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config),
                          ("generation_config.json", generation_config)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    save(out / "model.safetensors", weights)
    load(out, torch.float32, exact=False)  # refuses what does not fit
