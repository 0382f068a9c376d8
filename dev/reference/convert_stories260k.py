#!/usr/bin/env python3
"""Converts a model of llama2.c (legacy .bin, such as stories260K) and its tokenizer into a Hugging Face directory."""

import argparse
import struct

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

import hf


def read_model(path):
    """Returns config, weights. Header: 7 int32; then F32 matrices, each kind for all layers together."""
    data = open(path, "rb").read()
    H, I, L, NH, NKV, V, T = struct.unpack("<7i", data[:28])
    tied, V = V > 0, abs(V)
    HD = H // NH
    values, at = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy()), 0

    def take(*shape):
        nonlocal at
        size = int(np.prod(shape))
        assert at + size <= len(values), f"{path}: ends after {len(values)} numbers, more expected"
        at += size
        return values[at - size:at].view(*shape)

    embedding = take(V, H)
    attention_norm = take(L, H)
    q, k, v, o = take(L, H, H), take(L, NKV * HD, H), take(L, NKV * HD, H), take(L, H, H)
    mlp_norm = take(L, H)
    gate, down, up = take(L, I, H), take(L, H, I), take(L, I, H)
    norm = take(H)
    take(2, T, HD // 2)  # cos and sin of the rotary embedding: computed, not read
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}
    if not tied:
        weights["lm_head.weight"] = take(V, H)
    assert at == len(values), f"{path}: {len(values)} numbers, {at} expected"
    for layer in range(L):
        # llama2.c rotates neighbours (2i, 2i+1), Hugging Face rotates i with i + head_dim / 2.
        parts = {"input_layernorm": attention_norm, "post_attention_layernorm": mlp_norm, "self_attn.v_proj": v,
                 "self_attn.o_proj": o, "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}
        layer_weights = {name: tensor[layer] for name, tensor in parts.items()}
        layer_weights["self_attn.q_proj"] = hf.rotate_half_rows(q[layer], NH)
        layer_weights["self_attn.k_proj"] = hf.rotate_half_rows(k[layer], NKV)
        weights |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in layer_weights.items()}
    config = dict(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=L, num_attention_heads=NH,
                  num_key_value_heads=NKV, head_dim=HD, max_position_embeddings=T, rms_norm_eps=1e-5,
                  rope_theta=10000.0, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    return config, {name: tensor.clone() for name, tensor in weights.items()}


def read_pieces(path, vocab_size):
    """[(piece, score)]. File: int32 longest piece; then for each token float score, int32 length, bytes."""
    data, pieces, at = open(path, "rb").read(), [], 4
    while len(pieces) < vocab_size:
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8:at + 8 + length].decode(), score))
        at += 8 + length
    assert at == len(data), f"{path}: {len(data) - at} bytes after the last of {vocab_size} tokens"
    return pieces


def make_tokenizer(pieces):
    """Byte-pair encoding whose merges are all pairs that form a piece, in the order of the piece's score."""
    special = ["<unk>", "<s>", "</s>"]
    names = special + [piece.replace(" ", "▁") for piece, _ in pieces[3:]]
    vocab = {name: token for token, name in enumerate(names)}
    assert len(vocab) == len(names), "two tokens have the same text"
    merges = []
    for name, (_, score) in list(zip(names, pieces))[3:]:
        splits = [(name[:i], name[i:]) for i in range(1, len(name))]
        merges += [(-score, vocab[name], pair) for pair in splits if pair[0] in vocab and pair[1] in vocab]
    merges = [pair for _, _, pair in sorted(merges, key=lambda merge: merge[:2])]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    # Not <unk>: with byte fallback it never occurs, and a text that contains "<unk>" keeps it.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[1:]])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL.bin")
    parser.add_argument("tokenizer", metavar="TOKENIZER.bin")
    parser.add_argument("out", metavar="OUT")
    args = parser.parse_args()
    config, weights = read_model(args.model)
    tokenizer = make_tokenizer(read_pieces(args.tokenizer, config["vocab_size"]))
    hf.write_llama(
        args.out, config, weights, tokenizer,
        dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>",
             model_max_length=config["max_position_embeddings"]),
        # The stories were joined by BOS, without EOS: a new BOS is where a story ends.
        dict(bos_token_id=1, eos_token_id=[1, 2]))
    print(f"{args.out}: {sum(w.numel() for w in weights.values())} parameters, {config['vocab_size']} tokens")


if __name__ == "__main__":
    main()
