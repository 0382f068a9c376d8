// usage.h: scores of experts by what a calibration text sends to them, and by the router's rows.
#pragma once

// Load, and for MoE-Pruner (arXiv 2410.12013) the norms of the experts' inputs, each row multiplied by its gate:
//     norm_j = || x_j gate ||_2 over the tokens of the expert      x: the input of gate and up; the hidden row for down
typedef struct {
    double *load, *squares; // (L, E), (L, E, H + I); either may be NULL
} Usage;

static void observe_usage(void* state, const Model* m, int l) {
    Usage* u = (Usage*)state;
    const Config* c = &m->config;
    const LayerActivations* s = &m->layers[l];
    int E = c->num_experts, K = m->topk[l];
    long H = c->hidden_size, I = c->moe_intermediate_size;
    if (!c->sparse[l]) return;
    #pragma omp parallel for schedule(dynamic)
    for (int e = 0; e < E; e++) {
        if (u->load) u->load[(long)l * E + e] += s->offsets[e + 1] - s->offsets[e];
        double* squares = u->squares ? u->squares + ((long)l * E + e) * (H + I) : NULL;
        for (int r = s->offsets[e]; squares && r < s->offsets[e + 1]; r++) {
            const float* in = c->router == ROUTER_LPR ? s->lpr_input : s->ffn_in;
            const float *x = in + s->assignment[r] / K * H, *hidden = m->scratch.act + r * I;
            double g = s->gates[s->assignment[r]], g2 = g * g;
            for (long i = 0; i < H; i++) squares[i] += g2 * x[i] * x[i];
            for (long i = 0; i < I; i++) squares[H + i] += g2 * hidden[i] * hidden[i];
        }
    }
}

static void measure_usage(const Source* s, Usage* usage, const char* why) {
    Calibration k = calibration_open(s, FOR_SCORING, why);
    for (long b = 0; b < k.batches; b++) {
        calibration_batch(&k, b);
        observed_forward(k.model, k.batch.tokens, k.batch.targets, k.B, k.T, observe_usage, usage);
    }
    calibration_close(&k);
}

// (L, E) ||row of SRC's router|| - ||row of the reference's||: experts whose rows fine-tuning made longer are used more
// (arXiv 2405.16646 prunes those with the smallest change).
static void router_norm_scores(double* score, const Source* s) {
    int L = s->config.num_layers, E = s->config.num_experts;
    if (!ask.reference) die(2, "--select router-norm wants --reference DIR, the model before fine-tuning");
    Source* reference = open_or_die(ask.reference, "");
    const Config *a = &s->config, *b = &reference->config;
    if (a->num_layers != b->num_layers || a->num_experts != b->num_experts || a->hidden_size != b->hidden_size ||
        a->lpr_latent_dim != b->lpr_latent_dim || memcmp(a->sparse, b->sparse, (size_t)L))
        die(2, "--reference %s: has other layers, experts, hidden size or router than %s", ask.reference, s->dir);
    for (int l = 0; l < L; l++) {
        if (!s->config.sparse[l]) continue;
        const View *now = &s->views[s->router[l]], *before = &reference->views[reference->router[l]];
        float* row = (float*)checked_malloc(sizeof(float) * (size_t)now->cols);
        for (int e = 0; e < E; e++) {
            view_read(now, e, 1, row);
            score[(long)l * E + e] = sqrt(sum_of_squares(row, now->cols));
            view_read(before, e, 1, row);
            score[(long)l * E + e] -= sqrt(sum_of_squares(row, now->cols));
        }
        free(row);
    }
    source_close(reference);
}

// Fills p->score for the selection asked for; uniform needs none.
