// receipt.h: the receipt: what was done and what it means.
#pragma once

// What --check measured.
typedef struct {
    int done;
    double loss_before, loss_after; // nats a token
    double logits; // || after - before || / || before ||
    double distinct; // mean number of different sources among a token's K experts; 0: not counted
    long tokens;
} Proof;

#define MAX_NOTES 16
typedef struct {
    char function[512]; // whether DST computes what SRC computed
    char balance[160]; // whether transformers, too, trains DST with a balance loss
    char notes[MAX_NOTES][512]; // warnings
    int count;
} Findings;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
warn(Findings* f, const char* format, ...) {
    va_list args;
    if (f->count == MAX_NOTES) return;
    va_start(args, format);
    vsnprintf(f->notes[f->count++], sizeof f->notes[0], format, args);
    va_end(args);
}

// Most copies of one expert in any layer, and whether all experts have equally many.
static int most_copies(const Plan* p, int* equal) {
    int most = 0, least = INT_MAX;
    for (int l = 0; l < p->config.num_layers; l++)
        for (int e = 0; p->config.sparse[l] && e < p->E; e++) {
            int n = p->copies[(long)l * p->E + e];
            if (n > most) most = n;
            if (n < least) least = n;
        }
    *equal = most == least;
    return most;
}

// What holds by construction, and what is known to go wrong:
//  - Twins tie, so for K >= 2 top-K picks both copies of the best expert instead of the two best experts.
//  - A softmax over m times the experts makes every gate m times smaller, unless the K gates are renormalised.
//  - Twins that are always chosen together with equal gates get equal gradients and stay twins for ever.
//  - dL/dlogit_e is proportional to <dL/dy, f_e(x) - y>: 0 if all chosen experts are equal, or K = 1 and the gate is 1.
static void find_properties(const Plan* p, Findings* f) {
    const Config *from = &p->sources[0]->config, *to = &p->config;
    int K = to->num_experts_per_tok, N = p->N, norm = to->norm_topk_prob, equal, m = most_copies(p, &equal);
    int sigmoid = from->router == ROUTER_SIGMOID, raw = sigmoid && !norm,
        converted = strcmp(ask.dtype, "keep") != 0 && strcmp(ask.dtype, "f32") != 0;
    const char* rounding = converted ? ", up to rounding to bf16" : "";
    // the mean of all logits, and the mean of all prototypes, are those of SRC only if every expert has as many copies
    int unequal_sums = (from->logit_norm > 0 || from->router == ROUTER_LPR) && !equal;
    const char* in_loss = json_raw(p->luggage, "output_router_logits");
    memset(f, 0, sizeof *f);
    if (!is_ordinary(to) || to->arch == DOTS1)
        snprintf(f->balance, sizeof f->balance, "only in train_moe; transformers has none for this class");
    else if (in_loss && !strcmp(in_loss, "true"))
        snprintf(f->balance, sizeof f->balance,
                 "in transformers, too: config.json has output_router_logits true and router_aux_loss_coef %g",
                 to->router_aux_loss_coef);
    else
        snprintf(f->balance, sizeof f->balance,
                 "only in train_moe; transformers wants output_router_logits true, which SRC's config.json has not");
#define FUNCTION(...) snprintf(f->function, sizeof f->function, __VA_ARGS__)
    if (p->dense) {
        int exact = norm && p->num_sources == 1 &&
                    ((p->method == COPY) || (p->method == GRANULAR && !strcmp(ask.scale, "exact")) ||
                     (p->method == DROP && ask.drop_ratio == 0));
        // down times a number that is no power of two has more digits than BF16 and F16 hold
        int l = 0, scaled = p->method == GRANULAR && (ask.granularity & (ask.granularity - 1));
        while (!to->sparse[l]) l++;
        if (scaled && !strcmp(ask.dtype, "keep") && source_ffn(p->sources[0], l, 0, DOWN)->stored->dtype != DTYPE_F32)
            rounding = ", up to rounding of down";
        if (exact && p->method == GRANULAR)
            FUNCTION("kept exactly%s: gates sum to 1, and down is scaled by %ld for the %ld shards of a group",
                     rounding, ask.granularity, ask.granularity);
        else if (exact)
            FUNCTION("kept exactly%s: gates sum to 1, and every expert is the dense FFN", rounding);
        else if (p->num_sources > 1)
            FUNCTION("not kept: experts come from %d models and everything else is their mean", p->num_sources);
        else if (p->method == COPY)
            FUNCTION("not kept: gates are not renormalised, so every FFN's output shrinks to about K / N = %d / %d", K,
                     N);
        else if (p->method == GRANULAR && !strcmp(ask.scale, "cuberoot"))
            FUNCTION(
                "not kept: the cube root of the scale on gate, up and down is not exact for SwiGLU; --scale exact%s is",
                norm ? "" : " with --norm-topk 1");
        else if (p->method == GRANULAR && !strcmp(ask.scale, "none"))
            FUNCTION("not kept: --scale none leaves a token with 1 / %ld of the FFN's output or less", ask.granularity);
        else if (p->method == GRANULAR)
            FUNCTION("nearly kept: without renormalisation the scale is exact only while the router is zero");
        else if (p->method == PARTITION && K == N)
            FUNCTION(
                "kept exactly while the router is zero (--router-init zero), otherwise nearly: gates weigh the shards");
        else if (p->method == PARTITION)
            FUNCTION("not kept: a token sees %d of %d shards of the FFN, scaled to its size", K, N);
        else if (p->method == DROP)
            FUNCTION("not kept: %.0f %% of the units of every expert are drawn anew", 100 * ask.drop_ratio);
        else if (p->method == CLUSTER)
            FUNCTION("not kept: experts are approximations of the FFN for their clusters, at mean rank %.1f",
                     p->clusters && ((Clusters*)p->clusters)->matrices
                         ? (double)((Clusters*)p->clusters)->ranks / ((Clusters*)p->clusters)->matrices
                         : 0.0);
        else if (p->method == RANDOM)
            FUNCTION("not kept: the experts are new");
        else
            FUNCTION("not kept: noise was added to the experts");
        if (p->method == COPY && norm && p->num_sources == 1)
            warn(
                f,
                "equal experts give the router no language-model gradient at step 0; only the balance loss moves it. "
                "Experts separate because different tokens reach them; --method drop makes them differ from the start");
        if (norm && K == 1)
            warn(f, "K = 1 with renormalised gates: every gate is 1, so the router never learns from the loss; %s",
                 N == 1                ? "with one expert nothing avoids it"
                 : to->arch == MIXTRAL ? "--topk 2 avoids it"
                                       : "--norm-topk 0 or --topk 2 avoid it");
        if (!norm && p->method != GRANULAR && p->method != PARTITION)
            warn(f,
                 "gates are not renormalised: the FFN's output shrinks by about E / K = %.3g at step 0; --norm-topk 1 "
                 "avoids it",
                 (double)N / K);
        if (ask.router_init && !strcmp(ask.router_init, "zero") && p->method != GRANULAR && p->method != PARTITION)
            warn(f,
                 "a zero router ties all experts: every token goes to experts 0 to %d until it moves; --router-init "
                 "normal avoids it",
                 K - 1);
        return;
    }
    if (insists("prune-weights"))
        FUNCTION("not kept: %.0f %% of the weights of every expert are zero", 100 * ask.prune_weights);
    else if (N < p->E)
        FUNCTION("not kept: %d of %d experts are gone from each sparse layer", p->E - N, p->E);
    else if (K != from->num_experts_per_tok && N == p->E)
        FUNCTION("not kept: %d experts per token instead of %d", K, from->num_experts_per_tok);
    else if (N == p->E && p->router != ROUTER_NOISE)
        FUNCTION("kept exactly%s: nothing was added", rounding);
    else if (unequal_sums)
        FUNCTION("not kept: unequal numbers of copies shift %s",
                 from->router == ROUTER_LPR ? "the read-out of the prototypes"
                                            : "the mean and spread that logit_norm divides by");
    else if (p->method == FAMILY && K != from->num_experts_per_tok)
        FUNCTION("that of SRC with %d experts per token while train_moe's family penalty is infinite", K);
    else if (p->method == FAMILY)
        FUNCTION(
            "kept exactly%s while train_moe's family penalty is infinite (t = 0 of --family-steps), for every K; only "
            "train_moe opens it until the penalty has ended",
            rounding);
    else if (!uses(p->method,
                   "copy|shuffle|copy-noise|scaled|drop|interpolate|orthogonal|svd-perturb|svd-mix|sparse-code-mix") ||
             (p->method != COPY && p->method != SHUFFLE))
        FUNCTION("not kept: copies differ from their sources");
    else if (p->router != ROUTER_COPY && p->router != ROUTER_BIAS)
        FUNCTION("not kept: routing changes (--router %s)", ask.router);
    else if (K == 1 && sigmoid && from->num_experts_per_tok == 1 && p->router == ROUTER_BIAS)
        FUNCTION(
            "kept%s but for tokens whose best scores are closer than twice the bias' delta: K = 1, and the one gate "
            "%s",
            rounding, raw ? "does not change" : "is 1");
    else if (K == 1 && (norm || sigmoid) && from->num_experts_per_tok == 1)
        FUNCTION("kept exactly%s: K = 1, and the one gate %s", rounding, raw ? "does not change" : "is 1");
    else if (K == 1 && from->num_experts_per_tok == 1)
        FUNCTION("kept up to the gate: the same expert is chosen, but its gate shrinks");
    else if (K == 1)
        FUNCTION("not kept: 1 expert per token instead of %d", from->num_experts_per_tok);
    else if (p->router == ROUTER_BIAS)
        FUNCTION("not kept: with K = %d a token gets copies of one expert instead of different experts", K);
    else if (raw && equal && K % m == 0)
        FUNCTION("not kept: sigmoid gates are not renormalised, so %d copies add up to %d times an expert's output", m,
                 m);
    else if (equal && K == m * from->num_experts_per_tok)
        FUNCTION("kept exactly%s: the top %d are %d copies of each of SRC's %d", rounding, K, m,
                 from->num_experts_per_tok);
    else if (equal && K % m == 0)
        FUNCTION("that of SRC with %d expert%s per token%s: the top %d are %d copies each of the best %d", K / m,
                 K / m > 1 ? "s" : "", rounding, K, m, K / m);
    else
        FUNCTION("not kept: with K = %d a token gets copies of one expert instead of different experts", K);
    if (p->method == SHUFFLE) {
        size_t n = strlen(f->function);
        snprintf(f->function + n, sizeof f->function - n,
                 " (permuted units change the order of additions, nothing else)");
    }
    if (N <= p->E) return;
    int twins = p->method == COPY || p->method == SHUFFLE;
    if (uses(p->method, "random")) return;
    if (K >= 2 && p->method != FAMILY)
        warn(f,
             "K = %d: twins tie or nearly tie, so most tokens reach only about %d distinct source%s; --method family "
             "avoids it",
             K, (K + m - 1) / m, (K + m - 1) / m > 1 ? "s" : "");
    if (K == 1 && p->router == ROUTER_COPY && p->method != FAMILY)
        warn(f,
             "K = 1: a tie goes to the lower index, so copies get no token until the router moves; --router "
             "perturb-new or --method family avoid it");
    if (!norm && !sigmoid && p->method != FAMILY)
        warn(f,
             "gates are not renormalised: each shrinks by about %d, the number of copies%s; --method family avoids it",
             m, K == 1 ? ", and with K = 1 the output does too" : "");
    if (twins && norm && K >= 2 && K <= m && equal && (p->router == ROUTER_COPY || p->router == ROUTER_BIAS))
        warn(f,
             "all %d experts of a token are copies of one, so the router gets no language-model gradient at step 0; "
             "only balancing moves it; --method family avoids it",
             K);
    if (norm && K == 1)
        warn(f, "K = 1 with renormalised gates: every gate is 1, so the router never learns from the loss; --topk 2 "
                "avoids it");
    if (twins && K >= 2 && (p->router == ROUTER_COPY || p->router == ROUTER_BIAS))
        warn(f,
             "twins that are chosen together with equal gates get equal gradients and never separate in a "
             "deterministic trainer%s; --method family or drop, or --router perturb-new avoid it",
             p->router == ROUTER_BIAS ? " (a bias for selection does not reach the gates)" : "");
}

static long model_bytes(const Plan* p) {
    long bytes = 0;
    for (int i = 0; i < p->num_outputs; i++) bytes += p->outputs[i].half < 0 ? p->outputs[i].bytes : 0;
    return bytes;
}

static long stored_bytes(const Source* s) {
    long bytes = 0;
    for (int i = 0; i < s->files->num_tensors; i++) bytes += s->files->tensors[i].bytes;
    return bytes;
}

static const char* class_of(const Config* c) {
    return is_ordinary(c) ? archs[c->arch].class_name : "a model_type of train_moe's own";
}

static void print_config_line(const char* what, const char* dir, const Config* c, long bytes) {
    long total, active;
    count_parameters(c, &total, &active);
    printf("%-8s%s: %s", what, dir, class_of(c));
    if (c->num_experts)
        printf(", %d of %d layers sparse, %d experts of width %d, %d per token", count_sparse(c), c->num_layers,
               c->num_experts, c->moe_intermediate_size, c->num_experts_per_tok);
    else
        printf(", %d dense layers of width %d", c->num_layers, c->intermediate_size);
    printf("\n        %ld parameters, %ld active for a token, %.1f MB\n", total, active, bytes * 1e-6);
}

static int same_layer(const Plan* p, int a, int b) {
    size_t n = sizeof(int) * (size_t)p->N;
    return p->config.sparse[a] == p->config.sparse[b] &&
           (!p->config.sparse[a] || !memcmp(p->source + (long)a * p->N, p->source + (long)b * p->N, n));
}

// Which expert came from which; layers that are alike share a line.
static void print_layers(const Plan* p) {
    int L = p->config.num_layers;
    for (int l = 0, last; l < L; l = last + 1) {
        for (last = l; last + 1 < L && same_layer(p, l, last + 1);) last++;
        if (l == last)
            printf("  layer %d: ", l);
        else
            printf("  layers %d-%d: ", l, last);
        if (!p->config.sparse[l]) {
            printf("dense, as in SRC\n");
            continue;
        }
        if (p->dense && p->num_sources == 1) {
            static const char* made[] = {"all %d experts are the FFN",
                                         "%d experts from the FFN, each with other units drawn anew",
                                         "%d experts from the FFN, each with other noise",
                                         "%d experts from the FFN, each with other weights drawn anew",
                                         "%d experts: the shards of the FFN, group after group",
                                         "%d experts: the shards of the FFN",
                                         "%d experts, one for each cluster of the FFN's inputs",
                                         "%d new experts"};
            printf(made[p->method], p->N);
        } else {
            printf("experts from %s", p->dense ? "models" : "experts");
            for (int j = 0; j < p->N; j++) {
                if (p->N > 40 && j == 32) {
                    printf(" ... (%d in all, see upcycle.json)", p->N);
                    break;
                }
                if (plan_source(p, l, j) < 0)
                    printf(" new");
                else
                    printf(" %d", plan_source(p, l, j));
            }
        }
        printf("\n");
    }
}

static void print_plan(const Plan* p, const char* dst) {
    const Source* s = p->sources[0];
    print_config_line("source", s->dir, &s->config, stored_bytes(s));
    for (int i = 1; i < p->num_sources; i++) printf("        and %s\n", p->sources[i]->dir);
    print_config_line("result", dst, &p->config, model_bytes(p));
    printf("method  %s, seed %ld", ask.method, ask.seed);
    if (p->method == GRANULAR) printf(", %d groups of %ld shards, --scale %s", p->groups, ask.granularity, ask.scale);
    if (p->method == DROP) printf(", ratio %g, indices %s", ask.drop_ratio, ask.drop_indices);
    if (!p->dense) printf(", router %s", ask.router ? ask.router : p->router == ROUTER_BIAS ? "bias" : "copy");
    if (!p->dense && p->selection != UNIFORM) printf(", selected by %s", ask.select);
    printf("\n");
    print_layers(p);
    fflush(stdout);
}

static void print_findings(const Findings* f) {
    printf("function: %s\nbalance loss: %s\n", f->function, f->balance);
    for (int i = 0; i < f->count; i++) printf("warning: %s\n", f->notes[i]);
    fflush(stdout);
}

// An upper bound of the memory that writing needs beside the tables of names: the buffers, whole matrices for four
// operators, the tokens' inputs for clusters, and a sum of several sources.
static double plan_memory(const Plan* p) {
    double H = p->config.hidden_size, I = p->config.moe_intermediate_size, n = H < I ? H : I, router = 8.0 * p->N * H,
           matrix = 0;
    if (p->method == ORTHOGONAL) matrix = 12 * H * I;
    if (p->method == SVD_PERTURB) matrix = 12 * H * I + 8 * n * n;
    if (p->method == SVD_MIX) matrix = 24 * H * I + 16 * n * n;
    if (p->method == SPARSE_CODE_MIX) matrix = 8 * H * I + 8.0 * 64 * (H + I + 2 * fmax(H, I));
    if (p->method == CLUSTER) { // the tokens' FFN inputs of all layers and their clusters; two matrices of one cluster
        double tokens = ((const Clusters*)p->clusters)->tokens, L = count_sparse(&p->config);
        matrix = L * tokens * (4 * H + 4) + 4 * L * p->N * H + 4 * tokens * (H + 3 * I) + 24 * H * I + 16 * n * n +
                 8 * fmax(H, I) * fmax(H, I);
    }
    if (p->num_sources > 1) matrix += 8.0 * CHUNK_FLOATS; // their sum
    return 3.0 * 4 * CHUNK_FLOATS + router + matrix;
}

static void write_receipt(const Plan* p, const char* dir, const Findings* f, const Proof* proof, char** arguments,
                          int num_arguments) {
    char path[PATH_SIZE];
    Error error = {""};
    Text t = {NULL, 0, 0};
    const Config *from = &p->sources[0]->config, *to = &p->config;
    long total[2], active[2];
    count_parameters(from, &total[0], &active[0]);
    count_parameters(to, &total[1], &active[1]);
    text_print(&t, "{\n  \"version\": \"%s\",\n  \"sources\": [", VERSION);
    for (int i = 0; i < p->num_sources; i++) {
        text_print(&t, "%s", i ? ", " : "");
        text_json_string(&t, p->sources[i]->dir);
    }
    text_print(&t, "],\n  \"method\": \"%s\",\n  \"seed\": %ld,\n  \"arguments\": [", ask.method, ask.seed);
    for (int i = 0; i < num_arguments; i++) {
        text_print(&t, "%s", i ? ", " : "");
        text_json_string(&t, arguments[i]);
    }
    text_print(&t, "],\n");
    BytesAllowed bytes = reads_bytes(from, p->sources[0]->dir);
    if (bytes != PERHAPS_BYTES) text_print(&t, "  \"reads_bytes\": %d,\n", bytes == BYTES);
    text_print(&t, "  \"class\": [\"%s\", \"%s\"],\n", class_of(from), class_of(to));
    text_print(&t, "  \"experts\": [%d, %d],\n  \"experts_per_token\": [%d, %d],\n", from->num_experts, to->num_experts,
               from->num_experts_per_tok, to->num_experts_per_tok);
    text_print(&t, "  \"parameters\": [%ld, %ld],\n  \"active_parameters\": [%ld, %ld],\n", total[0], total[1],
               active[0], active[1]);
    text_print(&t, "  \"bytes\": [%ld, %ld],\n  \"function\": ", stored_bytes(p->sources[0]), model_bytes(p));
    text_json_string(&t, f->function);
    text_print(&t, ",\n  \"balance_loss\": ");
    text_json_string(&t, f->balance);
    text_print(&t, ",\n  \"warnings\": [");
    for (int i = 0; i < f->count; i++) {
        text_print(&t, "%s\n    ", i ? "," : "");
        text_json_string(&t, f->notes[i]);
    }
    text_print(&t, "],\n");
    if (proof && proof->done) {
        text_print(&t, "  \"check\": {\"tokens\": %ld, \"loss\": [", proof->tokens);
        text_json_number(&t, proof->loss_before, 7);
        text_print(&t, ", ");
        text_json_number(&t, proof->loss_after, 7);
        text_print(&t, "], \"logits\": ");
        text_json_number(&t, proof->logits, 4);
        if (proof->distinct > 0) text_print(&t, ", \"distinct_sources\": %.4f", proof->distinct);
        text_print(&t, "},\n");
    }
    text_print(&t, "  \"layers\": [");
    for (int l = 0, listed = 0; l < to->num_layers; l++) {
        if (!to->sparse[l]) continue;
        text_print(&t, "%s\n    {\"layer\": %d, \"source\": [", listed++ ? "," : "", l);
        for (int j = 0; j < p->N; j++) text_print(&t, "%s%d", j ? ", " : "", plan_source(p, l, j));
        text_print(&t, "], \"family\": [");
        for (int j = 0; j < p->N; j++) text_print(&t, "%s%d", j ? ", " : "", p->family[(long)l * p->N + j]);
        text_print(&t, "]");
        int scored = p->score && p->selection != BY_CHANCE;
        for (int e = 0; scored && e < p->E; e++) {
            text_print(&t, e ? ", " : ", \"score\": [");
            text_json_number(&t, p->score[(long)l * p->E + e], 7);
        }
        text_print(&t, scored ? "]}" : "}");
    }
    text_print(&t, "\n  ],\n  \"parent\": ");
    if (p->parent)
        text_json_value(&t, p->parent);
    else
        text_print(&t, "null");
    text_print(&t, "\n}\n");
    join_path(path, dir, "upcycle.json");
    if (!write_file(path, t.data, t.length, &error)) die(1, "%s", error.text);
    free(t.data);
}
