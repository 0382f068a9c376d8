// shards.h: methods whose experts are parts of the dense FFN.
#pragma once

// s of granular and partition. Each of the G shards of a group gets 1 / G of the group's gate when gates sum
// to 1, so s = G makes the group whole again: exactly, whatever the router. Without renormalisation every
// gate is about 1 / M and K are used, so s = M G / K restores the size, exactly only while the router is
// zero.
static double shard_scale(const Plan* p, int matrix) {
    double G = p->shards, s = p->config.norm_topk_prob ? G : p->M * G / p->config.num_experts_per_tok;
    return is(ask.scale, "none") ? 1 : is(ask.scale, "cuberoot") ? cbrt(s) : matrix == DOWN ? s : 1;
}

// Granular upcycling (virtual groups) and partition: expert j is shard j mod G of the FFN's units, in their
// order (granular) or shuffled once for all (partition). w = s w' makes dL/dw = dL/dw' / s. With --drop-ratio
// a share of each shard's units is drawn anew as well (Marco-MoE), before s.
static void shard_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    uint64_t key = stream_key(p, "shards", t->layer, 0, 0);
    long I = t->units, first = t->expert % p->shards * I;
    double s = shard_scale(p, t->matrix);
    t->factor = t->holds == WEIGHTS ? s : t->holds == EXP_AVG ? 1 / s : 1 / (s * s);
    int in_order = is(p->method->name, "granular");
    if (row == 0) t->order = NEW(int, I);
    for (long u = first; u < first + I && row == 0; u++)
        t->order[u - first] = (int)(in_order ? u : random_permutation(u, I * p->shards, key));
    if (row == 0 && asked("drop-ratio")) mark_dropped(p, t);
    ordered_rows(t, row, rows, out);
    if (t->marked) draw_rows(t, row, rows, out, 0, 1);
}
