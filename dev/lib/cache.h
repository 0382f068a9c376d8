// cache.h: where attention finds keys and values. Needs train_moe.c's Model and copy_rows.
#pragma once

// Where layer l's keys and values are: in its own activations, or in the cache, which also holds the past.
typedef struct {
    const float *k, *v;
    long ld_k, ld_v;
} KeysValues;

static KeysValues layer_keys_values(const Model* m, int l) {
    const Config* c = &m->config;
    const LayerActivations* s = &m->layers[l];
    long HD = c->head_dim, Q = c->num_heads * HD, KV = c->num_kv_heads * HD, N = (long)m->batch * m->length;
    KeysValues kv = {s->rotated + Q, s->qkv + Q + KV, Q + KV, Q + 2 * KV};
    if (m->purpose != FOR_GENERATION) return kv;
    float *cache_k = m->cache_k + (long)l * m->positions * KV,
          *cache_v = m->cache_v + (long)l * m->positions * KV;
    copy_rows(cache_k + m->cached * KV, KV, kv.k, kv.ld_k, N, KV);         // what is new joins the past
    copy_rows(cache_v + m->cached * KV, KV, kv.v, kv.ld_v, N, KV);
    KeysValues cache = {cache_k, cache_v, KV, KV};
    return cache;
}
