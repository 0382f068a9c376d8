// selection.h: which experts get copies or stay, but for the allocations and the utility that stand in upcycle.c.
#pragma once

// As greedy, by chance: each extra copy goes to an expert drawn from softmax(z-scored scores), among those below their
// cap. (Scores have any scale, so they are made comparable with the temperature 1 first.)
static void allocate_sample(int* counts, const double* score, int E, int M, int cap, uint64_t key) {
    double mean = 0, variance = 0;
    int* extra = NEW(int, E);
    for (int e = 0; e < E; e++) mean += score[e] / E;
    for (int e = 0; e < E; e++) variance += (score[e] - mean) * (score[e] - mean) / E;
    double std = variance > 0 ? sqrt(variance) : 1;
    for (int e = 0; e < E; e++) counts[e] = 1;
    for (int draw = 0; draw < M - E; draw++) {
        double sum = 0, reached = 0;
        if (draw > 0 && draw % (E * cap) == 0) memset(extra, 0, sizeof(int) * (size_t)E);
        for (int e = 0; e < E; e++) sum += extra[e] < cap ? exp((score[e] - mean) / std) : 0;
        double target = random_uniform(mix64(key ^ (uint64_t)draw)) * sum;
        int chosen = -1;
        for (int e = 0; e < E; e++) {
            if (extra[e] >= cap) continue;
            chosen = e;
            reached += exp((score[e] - mean) / std);
            if (target < reached) break;
        }
        extra[chosen]++;
        counts[chosen]++;
    }
    free(extra);
}

// For a smaller model: the M experts with the highest score, in their old order.
static void keep_best(int* source, const double* score, int E, int M) {
    char* kept = NEW(char, E);
    for (int i = 0; i < M; i++) kept[best_expert(score, kept, E)] = 1;
    for (int e = 0, j = 0; e < E; e++)
        if (kept[e]) source[j++] = e;
    free(kept);
}

// Equal scores for the lots of allocate_sample; a smaller model keeps those that drew the largest.
static void score_by_chance(Plan* p, const char* why) {
    (void)why;
    for (long i = 0; i < (long)p->config.num_layers * p->E && p->M < p->E; i++)
        p->score[i] = random_uniform(stream_key(p, "select", (int)(i / p->E), (int)(i % p->E), 0));
}

// For merge: of each of the M groups of experts, group (E), the most used member.
static void keep_cores(int* source, const int* group, const double* load, int E, int M) {
    for (int j = 0; j < M; j++) source[j] = -1;
    for (int e = 0; e < E; e++) {
        int* core = &source[group[e]];
        if (*core < 0 || load[e] > load[*core]) *core = e;
    }
}

// Load, and for MoE-Pruner (arXiv 2410.12013) the norms of the experts' inputs, each row multiplied by its gate:
//     norm_j = || x_j gate ||_2 over the tokens of the expert      x: the input of gate and up; the hidden row for down
// outputs: for each expert the sum over its tokens of  gate^gate_power || f(x) ||^norm_power
// products: for each pair of experts the sum over all tokens of the product of their router logits
typedef struct {
    double *load, *squares, *outputs, *products; // (L, E), (L, E, H + I), (L, E), (L, E, E); each may be NULL
    double gate_power, norm_power;
} Usage;

static void observe_usage(Model* m, int l) {
    Usage* u = (Usage*)m->observer;
    const Config* c = &m->config;
    const LayerActivations* s = &m->layers[l];
    int E = c->num_experts, K = m->topk[l];
    long H = c->hidden_size, I = c->moe_intermediate_size, N = (long)m->batch * m->length;
    if (!c->sparse[l]) return;
    #pragma omp parallel for schedule(dynamic)
    for (int e = 0; e < E; e++) {
        if (u->load) u->load[(long)l * E + e] += s->offsets[e + 1] - s->offsets[e];
        double* squares = u->squares ? u->squares + ((long)l * E + e) * (H + I) : NULL;
        for (int r = s->offsets[e]; squares && r < s->offsets[e + 1]; r++) {
            const float* in = c->router.kind == ROUTER_LPR ? s->lpr_input : s->ffn_in;
            const float *x = in + s->assignment[r] / K * H, *hidden = m->scratch.act + r * I;
            double g = s->gates[s->assignment[r]], g2 = g * g;
            for (long i = 0; i < H; i++) squares[i] += g2 * x[i] * x[i];
            for (long i = 0; i < I; i++) squares[H + i] += g2 * hidden[i] * hidden[i];
        }
        for (int r = s->offsets[e]; u->outputs && r < s->offsets[e + 1]; r++)
            u->outputs[(long)l * E + e] += pow(s->gates[s->assignment[r]], u->gate_power) *
                                           pow(sqrt(sum_of_squares(m->scratch.y_rows + r * H, H)), u->norm_power);
        for (long n = 0; u->products && n < N; n++) {
            const float* z = s->router_logits + n * E;
            for (int i = 0; i < E; i++) u->products[((long)l * E + e) * E + i] += (double)z[e] * z[i];
        }
    }
}

// Runs SRC over the calibration texts; observe sees each layer.
static void calibrate(const Source* s, void (*observe)(Model*, int), void* observer, const char* why) {
    Feed f = feed_calibration(s, why);
    Model* m = feed_model(&f, s->dir, FOR_SCORING, 2);
    m->observe = observe;
    m->observer = observer;
    for (int rows; (rows = feed_next(&f)) > 0;) model_forward(m, f.batch.tokens, f.batch.targets, rows, f.T);
    model_free(m);
    feed_close(&f);
}

static void measure_usage(const Source* s, Usage* usage, const char* why) {
    calibrate(s, observe_usage, usage, why);
}

static void score_by_load(Plan* p, const char* why) {
    Usage usage = {p->score, NULL, NULL, NULL, 0, 0};
    measure_usage(p->sources[0], &usage, why);
}

// Means over the tokens of an expert, 0 for one that has none:
//     REAP (arXiv 2510.13999, eq. 9): gate || f(x) ||     MAN (2606.15716): || f(x) ||     MSAN: || f(x) ||^2
static void score_by_outputs(Plan* p, const char* why, double gate_power, double norm_power) {
    Usage usage = {NEW(double, p->config.num_layers * p->E), NULL, p->score, NULL, gate_power, norm_power};
    measure_usage(p->sources[0], &usage, why);
    for (long i = 0; i < (long)p->config.num_layers * p->E; i++) p->score[i] /= fmax(1, usage.load[i]);
    free(usage.load);
}
static void score_by_reap(Plan* p, const char* why) { score_by_outputs(p, why, 1, 1); }
static void score_by_man(Plan* p, const char* why) { score_by_outputs(p, why, 0, 1); }
static void score_by_msan(Plan* p, const char* why) { score_by_outputs(p, why, 0, 2); }

// p->input_norms for --prune-weights; an expert that got no token is pruned by |w| alone.
static void measure_inputs(Plan* p) {
    const Config* c = &p->sources[0]->config;
    long width = c->hidden_size + c->moe_intermediate_size, n = (long)c->num_layers * p->E;
    Usage usage = {NEW(double, n), NEW(double, n * width), NULL, NULL, 0, 0};
    measure_usage(p->sources[0], &usage, "--prune-weights");
    for (long i = 0; i < n * width; i++) usage.squares[i] = usage.load[i / width] > 0 ? sqrt(usage.squares[i]) : 1;
    free(usage.load);
    p->input_norms = usage.squares;
}

// (L, E) ||row of SRC's router|| - ||row of the reference's||: experts whose rows fine-tuning made longer are used more
// (arXiv 2405.16646 prunes those with the smallest change).
static void score_by_router_norm(Plan* p, const char* why) {
    const Source* s = p->sources[0];
    int L = s->config.num_layers, E = s->config.num_experts;
    if (!ask.reference) die(2, "%s wants --reference DIR, the model before fine-tuning", why);
    Source* reference = open_or_die(ask.reference, "");
    const Config *a = &s->config, *b = &reference->config;
    if (a->num_layers != b->num_layers || a->num_experts != b->num_experts || a->hidden_size != b->hidden_size ||
        a->router.lpr_latent_dim != b->router.lpr_latent_dim || memcmp(a->sparse, b->sparse, (size_t)L))
        die(2, "--reference %s: has other layers, experts, hidden size or router than %s", ask.reference, s->dir);
    for (int l = 0; l < L; l++) {
        if (!s->config.sparse[l]) continue;
        const View *now = &s->views[s->router[l]], *before = &reference->views[reference->router[l]];
        float* row = floats(now->cols);
        for (int e = 0; e < E; e++) {
            view_read(now, e, 1, row);
            p->score[(long)l * E + e] = sqrt(sum_of_squares(row, now->cols));
            view_read(before, e, 1, row);
            p->score[(long)l * E + e] -= sqrt(sum_of_squares(row, now->cols));
        }
        free(row);
    }
    source_close(reference);
}

// p->score from (L, E, 2) squared norms of weights, gradients and second moments
static void combine_norms(Plan* p, const double* w, const double* g, const double* v) {
    double (*utility)(double, double, double) = p->selection->utility;
    for (long i = 0; i < 2L * p->config.num_layers * p->E; i += 2) {
        double gate_up = utility(w[i], g[i], v[i]), down = utility(w[i + 1], g[i + 1], v[i + 1]);
        p->score[i / 2] = is(ask.score_on, "all") ? utility(w[i] + w[i + 1], g[i] + g[i + 1], v[i] + v[i + 1])
                          : is(ask.score_on, "gate-up") ? gate_up
                          : is(ask.score_on, "down")    ? down
                          : is(ask.score_on, "average") ? (gate_up + down) / 2
                          : is(ask.score_on, "product") ? gate_up * down
                          : is(ask.score_on, "max")     ? fmax(gate_up, down)
                                                        : fmin(gate_up, down);
    }
}

static void score_by_utility(Plan* p, const char* why) {
    const Source* s = p->sources[0];
    int made_of = p->selection->made_of;
    long n = 2L * s->config.num_layers * p->E;
    Source* second = made_of & OF_SECOND_MOMENTS ? open_or_die(s->dir, ".exp_avg_sq") : NULL;
    double* v = second ? expert_norms(second) : NEW(double, n);
    double* w = made_of & OF_WEIGHTS ? expert_norms(s) : NEW(double, n);
    double* g = made_of & OF_GRADIENTS ? gradient_norms(s, why) : NEW(double, n);
    combine_norms(p, w, g, v);
    source_close(second);
    free(w);
    free(g);
    free(v);
}
