/*
routers.c: where tokens go. Families of copies, figures of the experts' load, grouping by expert, ties, idle experts.
*/
// ---------------------------------------------------------------------------------------------------------------------
// Families: after every expert has been doubled (or more), an infinite penalty keeps the function bit for bit

// A model with `copies` of every expert of `source`, whose copies follow the originals.
static Model* multiply_experts(const Model* source, int copies) {
    Config c = source->config;
    int E = c.num_experts, H = c.hidden_size;
    c.num_experts = E * copies;
    c.router.family_penalty = INFINITY;
    Model* m = keep_model(model_create(&c, source->purpose, source->B, source->T, source->positions, NULL));
    m->has_families = 1;
    memcpy(m->weights.embedding, source->weights.embedding, floats_bytes((long)c.vocab_size * H));
    memcpy(m->weights.final_norm, source->weights.final_norm, floats_bytes(H));
    memcpy(m->weights.lm_head, source->weights.lm_head, floats_bytes((long)c.vocab_size * H));
    for (int l = 0; l < c.num_layers; l++) {
        LayerWeights *to = &m->weights.layers[l], *from = &source->weights.layers[l];
        int dense_I = layer_width(&c, l), HD = c.head_dim, NH = c.num_heads;
        memcpy(to->attn_norm, from->attn_norm, floats_bytes(H));
        memcpy(to->ffn_norm, from->ffn_norm, floats_bytes(H));
        memcpy(to->qkv, from->qkv, floats_bytes((long)qkv_width(&c) * H));
        memcpy(to->attn_out, from->attn_out, floats_bytes((long)H * NH * HD));
        if (to->q_norm) memcpy(to->q_norm, from->q_norm, floats_bytes(HD));
        if (to->k_norm) memcpy(to->k_norm, from->k_norm, floats_bytes(HD));
        for (int e = 0; e < layer_experts(&c, l); e++) {
            int source_expert = c.sparse[l] ? e % E : 0;
            long gate_up = 2L * dense_I * H, down = (long)H * dense_I;
            memcpy(to->gate_up + e * gate_up, from->gate_up + source_expert * gate_up, floats_bytes(gate_up));
            memcpy(to->down + e * down, from->down + source_expert * down, floats_bytes(down));
            if (!c.sparse[l]) continue;
            memcpy(to->router + (long)e * H, from->router + (long)source_expert * H, floats_bytes(H));
            if (to->router_bias) to->router_bias[e] = from->router_bias[source_expert];
            m->family[(long)l * c.num_experts + e] = source_expert;
        }
    }
    return m;
}

static void test_families(void) {
    static const struct {
        const char *folder, *name;
    } models[] = {{"golden", "qwen3_moe"},
                  {"golden", "mixtral"},
                  {"golden_routers", "sigmoid"},
                  {"golden_routers", "logit_norm"}};
    enum { B = 2, T = 9 };
    int tokens[B * T];
    for (int i = 0; i < 4; i++) {
        char dir[PATH_SIZE];
        snprintf(dir, sizeof dir, "dev/reference/%s/%s", models[i].folder, models[i].name);
        Config c;
        Error error = {""};
        if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
        c.topk_limit = c.num_experts;
        Model* source = new_model(&c, FOR_TRAINING, B, T);
        if (!checkpoint_load(source, dir, &error)) die(1, "%s", error.text);
        for (int n = 0; n < B * T; n++) tokens[n] = (n * 7 + 3) % c.vocab_size;
        for (int copies = 2; copies <= 3; copies++) {
            Model* grown = multiply_experts(source, copies);
            long logits = (long)B * T * c.vocab_size;
            int same = 1, together = 0, places[3] = {0, 0, 0}, E = c.num_experts;
            double worst = 0;
            for (int renormalised = 0; renormalised < 2; renormalised++)
                for (int K = 1; K <= E; K++) {
                    source->config.norm_topk_prob = grown->config.norm_topk_prob = renormalised;
                    for (int l = 0; l < c.num_layers; l++)
                        if (c.sparse[l]) source->topk[l] = grown->topk[l] = K;
                    model_forward(source, tokens, NULL, B, T);
                    model_forward(grown, tokens, NULL, B, T);
                    same &= same_floats(source->logits, grown->logits, logits);
                    worst = larger(worst, relative_error(grown->logits, source->logits, logits));
                    for (int l = 0; l < c.num_layers; l++)
                        for (int n = 0; c.sparse[l] && n < B * T * K; n++) {
                            const int* experts = grown->layers[l].experts;
                            places[experts[n] / E]++;
                            for (int k = n / K * K; k < n; k++) together += experts[k] % E == experts[n] % E;
                        }
                }
            int used = places[0] > 0 && places[1] > 0 && (copies == 2 || places[2] > 0);
            // sigmoid: bit for bit. The softmax's sum meets the same numbers in another order, and rounds differently.
            check(worst <= (c.router.kind == ROUTER_SIGMOID ? 0 : 1e-6),
                  "%s: %d copies of each expert, K = 1 to %d, renormalised or not: relative error %.1e%s",
                  models[i].name, copies, E, worst, same ? ", bit for bit" : "");
            check(together == 0 && used,
                  "%s: %d copies: never two of one family, and each copy sees tokens (%d, %d, %d)", models[i].name,
                  copies, places[0], places[1], places[2]);
        }
    }
    check(isinf(family_penalty_at(1, 0, 10)) && fabs(family_penalty_at(2, 4, 10) - 3) < 1e-12 &&
              family_penalty_at(2, 10, 10) == 0 && family_penalty_at(2, 11, 10) == 0,
          "the penalty falls from infinity to zero");
}

// ---------------------------------------------------------------------------------------------------------------------
// What the experts do

static void test_load_figures(void) {
    for (int E = 2; E <= 48; E++) {         // E (load - mean) is compared exactly
        float bias[48] = {0};
        long loads[48];
        int still = 1;
        for (int e = 0; e < E; e++) loads[e] = 7 + (E > 2 && e == 0) - (E > 2 && e == 1);
        update_router_bias(bias, loads, E, 0.5);
        for (int e = E > 2 ? 2 : 0; e < E; e++) still &= bias[e] == 0;
        check(still && (E == 2 || (bias[0] == -0.5f && bias[1] == 0.5f)),
              "%d experts: those with the mean load keep their bias", E);
    }
    const long even[4] = {5, 5, 5, 5}, one[4] = {0, 0, 12, 0}, mixed[4] = {1, 2, 3, 4}, none[3] = {0, 0, 0};
    LoadFigures f = load_figures(even, 4);
    check(f.gini == 0 && f.min_max == 1 && f.max_vio == 0 && f.dead == 0, "equal loads");
    f = load_figures(one, 4);
    check(fabs(f.gini - 0.75) < 1e-12 && f.min_max == 0 && fabs(f.max_vio - 3) < 1e-12 && f.dead == 3,
          "one expert has all");
    f = load_figures(mixed, 4);
    // sum_i (2 i - n - 1) x_(i) / (n sum x) = (-3 - 2 + 3 + 12) / 40
    check(fabs(f.gini - 0.25) < 1e-12 && fabs(f.min_max - 0.25) < 1e-12 && fabs(f.max_vio - 0.6) < 1e-12, "1, 2, 3, 4");
    f = load_figures(none, 3);
    check(f.gini == 0 && f.dead == 3, "no tokens at all");
}

// ---------------------------------------------------------------------------------------------------------------------
// Experts

static void test_grouping(const char* what, int N, int K, int E, const int* experts) {
    int R = N * K, *offsets = kept_ints(E + 1),
        *row_of = kept_ints(R);
    int *assignment = kept_ints(R), counted = 1, inverse = 1, own = 1, stable = 1;
    group_by_expert(offsets, assignment, row_of, experts, N, K, E);
    for (int e = 0; e < E; e++) {
        int count = 0;
        for (int a = 0; a < R; a++) count += experts[a] == e;
        counted &= offsets[e + 1] - offsets[e] == count;
        for (int r = offsets[e]; r < offsets[e + 1]; r++) {
            own &= experts[assignment[r]] == e;
            stable &= r == offsets[e] || assignment[r - 1] < assignment[r];
        }
    }
    for (int a = 0; a < R; a++) inverse &= row_of[a] >= 0 && row_of[a] < R && assignment[row_of[a]] == a;
    check(offsets[0] == 0 && offsets[E] == R && counted, "grouping, %s: the counts", what);
    check(own && inverse && stable, "grouping, %s: every assignment once, with its expert, in order", what);
}

// gradient of expert e's three matrices in layer 0: 0 if it is zero everywhere, 1 if some of it is not
static int expert_has_gradient(const Model* m, int e) {
    long H = m->config.hidden_size, I = m->config.moe_intermediate_size;
    const LayerWeights* dw = &m->dweights.layers[0];
    for (long i = 0; i < 2 * I * H; i++)
        if (dw->gate_up[e * 2 * I * H + i] != 0) return 1;
    for (long i = 0; i < I * H; i++)
        if (dw->down[e * I * H + i] != 0) return 1;
    return 0;
}

static void test_experts(void) {
    int mixed[] = {3, 1, 0, 3, 5, 1, 3, 0, 1, 5, 0, 1}, one[12], spread[12];
    for (int i = 0; i < 12; i++) {
        one[i] = 4;
        spread[i] = i % 6;
    }
    test_grouping("two of six experts idle", 6, 2, 6, mixed);
    test_grouping("all to one", 12, 1, 6, one);
    test_grouping("evenly", 6, 2, 6, spread);

    enum { T = 5 };
    int tokens[T], targets[T];
    fill_tokens(tokens, T, 50, 7);
    fill_tokens(targets, T, 50, 8);
    Config c = tiny_config(QWEN3_MOE, 1, 12, 1);
    c.norm_topk_prob = 0;
    Model* m = new_model(&c, FOR_TRAINING, 1, T);
    model_init(m, 1);
    m->counting_load = 1;
    model_forward(m, tokens, targets, 1, T);
    model_backward(m, 1);
    int idle = 0, wrong = 0;
    for (int e = 0; e < 12; e++) {
        idle += m->load[e] == 0;
        wrong += expert_has_gradient(m, e) != (m->load[e] > 0);
    }
    check(idle >= 7 && wrong == 0, "%d idle experts have a gradient of exactly zero, the others have one", idle);
    long sum = 0;
    for (int e = 0; e < 12; e++) sum += m->load[e];
    check(sum == T, "the load counts each assignment once");

    // equal rows of the router: equal scores
    memset(m->weights.layers[0].router, 0, floats_bytes(12 * 24));
    memset(m->load, 0, sizeof(long) * 12);
    memset(m->grads, 0, floats_bytes(m->layout.total));
    model_forward(m, tokens, targets, 1, T);
    int lowest = 1;
    for (int n = 0; n < T; n++) lowest &= m->layers[0].experts[n] == 0;
    model_backward(m, 1);
    check(lowest && m->load[0] == T && expert_has_gradient(m, 0),
          "a tie goes to the lowest index, which has all tokens and a gradient");

    c.num_experts_per_tok = 4;
    m = new_model(&c, FOR_TRAINING, 1, T);
    model_init(m, 1);
    fill_random(m->weights.layers[0].router, 12 * 24, 9);
    float* router = m->weights.layers[0].router;
    static const int twins[] = {2, 7, 11}; // equal bits, so equal scores wherever they come
    for (int i = 1; i < 3; i++) memcpy(router + twins[i] * 24, router + 2 * 24, floats_bytes(24));
    model_forward(m, tokens, targets, 1, T);
    int ordered = 1, descending = 1, seen = 0;
    for (int n = 0; n < T; n++)
        for (int k = 0; k < 4; k++) {
            const int* chosen = m->layers[0].experts + n * 4;
            const float* z = m->layers[0].router_logits + n * 12;
            if (k > 0)
                descending &=
                    z[chosen[k - 1]] > z[chosen[k]] || (z[chosen[k - 1]] == z[chosen[k]] && chosen[k - 1] < chosen[k]);
            if (chosen[k] == 7 || chosen[k] == 11) {
                ordered &= k > 0 && chosen[k - 1] == (chosen[k] == 7 ? 2 : 7);
                seen++;
            }
        }
    check(descending, "experts are listed best first, of equals the lowest index first");
    check(ordered && seen > 0, "twin rows of the router are chosen lowest index first, seen %d times", seen);

    c.num_experts_per_tok = 12;
    m = new_model(&c, FOR_TRAINING, 1, T);
    model_init(m, 1);
    m->counting_load = 1;
    model_forward(m, tokens, targets, 1, T);
    model_backward(m, 1);
    int all = 1;
    for (int e = 0; e < 12; e++) all &= m->load[e] == T && expert_has_gradient(m, e);
    check(all, "K = E: every expert has every token and a gradient");
}
