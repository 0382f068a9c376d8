// shards.h: methods whose experts are parts of the dense FFN.
#pragma once

// s of granular and partition, on down (--scale exact). Each of the G shards of a group gets 1 / G of the group's gate
// when gates sum to 1, so s = G makes the group whole again: exactly, whatever the router (partition's one group only
// while gates are equal). Without renormalisation every gate is about 1 / M and K are used, so s = M G / K restores the
// size, exactly only while the router is zero.
static double shard_scale(const Plan* p, int matrix) {
    double G = p->shards, s = p->config.norm_topk_prob ? G : p->M * G / p->config.num_experts_per_tok;
    return is(ask.scale, "none") ? 1 : is(ask.scale, "cuberoot") ? cbrt(s) : matrix == DOWN ? s : 1;
}

// The matrix times s; w = s w' makes dL/dw = dL/dw' / s.
static void scale_target(Target* t, double s) {
    t->factor = t->holds == WEIGHTS ? s : t->holds == EXP_AVG ? 1 / s : 1 / (s * s);
}

// Granular upcycling (virtual groups) and partition: expert j is shard j mod G of the FFN's units, in their order
// (granular) or shuffled once for all (partition, G = M), its down times s: G where gates sum to 1, else M G / K
// (--scale exact; cuberoot: gate, up and down times the cube root of s). With --drop-ratio a share of each shard's
// units is drawn anew as well (Marco-MoE), before s.
static void shard_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    uint64_t key = stream_key(p, "shards", t->layer, 0, 0);
    long I = t->units, first = t->expert % p->shards * I;
    scale_target(t, shard_scale(p, t->matrix));
    int in_order = is(p->method->name, "granular");
    if (row == 0) t->order = NEW(int, I);
    for (long u = first; u < first + I && row == 0; u++)
        t->order[u - first] = (int)(in_order ? u : random_permutation(u, I * p->shards, key));
    if (row == 0 && asked("drop-ratio")) mark_dropped(p, t);
    ordered_rows(t, row, rows, out);
    if (t->marked) draw_rows(t, row, rows, out, 0, 1);
}

// Read-ME's domain masks (arXiv 2410.19123): expert j holds the units that are most active on text j of --calibrate,
//     the floor(share I) units u with the largest mean over its tokens of |act_u|,  act = silu(W_gate x) * (W_up x),
// in their order. A unit may be in several experts. Read-ME makes one expert that every token visits of those in all,
// as many as there are in a layer; here, where widths are equal, each expert keeps its own. Its router, one for all
// layers, is no class's: rows are new.
static void observe_activity(Model* m, int l) {
    long I = m->config.intermediate_size, N = (long)m->batch * m->length;
    double* sums = (double*)m->observer + l * I; // (L, I)
    for (long i = 0; i < N * I; i++) sums[i % I] += fabs(m->scratch.act[i]);
}

static void find_domains(Plan* p) {
    int L = p->config.num_layers, I = p->sources[0]->config.intermediate_size, width = p->config.moe_intermediate_size;
    const char* texts = ask.calibrate;
    char *names = copy_string(texts ? texts : ""), *rest = names;
    int count = 1;
    if (!texts) die(2, "--method domains wants --calibrate F,F,.., a text for each expert");
    for (const char* s = texts; *s; s++) count += *s == ',';
    if (count != p->M)
        die(2, "--experts %d: --method domains makes one of each text of --calibrate, and there are %d", p->M, count);
    p->units = NEW(int, (long)L * p->M * width);
    for (int j = 0; j < p->M; j++) {
        double* sums = NEW(double, (long)L * I);
        ask.calibrate = strsep(&rest, ",");
        calibrate(p->sources[0], observe_activity, sums, "--method domains");
        for (int l = 0; l < L; l++) keep_best(p->units + ((long)l * p->M + j) * width, sums + (long)l * I, I, width);
        free(sums);
    }
    ask.calibrate = texts;
    free(names);
}

// Expert j is the units of the FFN that the j-th text excites most, as Read-ME's masks choose them (2410.19123).
static void domain_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    long width = p->config.moe_intermediate_size;
    const int* units = p->units + ((long)t->layer * (p->M + p->num_shared) + t->expert) * width;
    if (row == 0) t->order = NEW(int, t->units);
    for (long u = 0; u < t->units; u++) t->order[u] = units[u];
    ordered_rows(t, row, rows, out);
}
