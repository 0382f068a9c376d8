/*
upcycle_calibration.c: what upcycle computes from data: utility of experts, pruning, clusters.
*/
// Begins a group with an LPR model, which may be changed and saved, and with random.bin for it.
static Model* up_begin_lpr(Config* c) {
    Error error = {""};
    up_begin();
    config_read(c, VARIANTS "lpr", &error);
    Model* m = new_model(c, FOR_TRAINING, 1, 8);
    checkpoint_load(m, VARIANTS "lpr", &error);
    up_make_random_shard("random.bin", 900, c->vocab_size);
    return m;
}

// Utility is made of gradients of the cross-entropy alone: LPR's own losses have none of it.
static void test_up_utility_lpr(void) {
    Config c;
    Model* m = up_begin_lpr(&c);
    double scores[2] = {0};
    for (int i = 0; i < 2; i++) {
        m->config.router.lpr_weight = i;
        remove_tree(up_path("source"));
        mkdir(up_path("source"), 0777);
        check(checkpoint_save(m, up_path("source"), 1) == NULL, "an LPR model with a weight of %d", i);
        UP("{}/source {}/grown --force --experts %d --select grad2 --calibrate {}/random.bin --batch 2 --seq 8",
           2 * c.num_experts);
        scores[i] = json_get(json_get(up_receipt(up_path("grown")), "layers")->items[0], "score")->items[0]->number;
    }
    check(scores[0] > 0 && scores[0] == scores[1], "LPR's losses have no part in grad2: %g, %g", scores[0], scores[1]);
}

// A token that the vocabulary does not have ends all that reads calibration data.
static void test_up_bad_tokens(void) {
    up_begin();
    int tokens[400];
    for (int i = 0; i < 400; i++) tokens[i] = i == 123 ? 60000 : i % 7;
    up_make_shard("bad.bin", tokens, 400);
    up_make("moe", QWEN3_MOE, 2, 24, 40, 4, 2, 1, 5);
    up_make("dense", QWEN3, 2, 24, 40, 0, 0, 0, 5);
    static const char* readers[] = {"moe {}/x --experts 8 --select grad2", "moe {}/x --experts 8 --select load",
                                    "moe {}/x --experts 2 --select reap", "moe {}/x --experts 2 --method merge",
                                    "moe {}/x --experts 4 --prune-weights 0.5",
                                    "dense {}/x --experts 4 --method cluster",
                                    "dense {}/x --experts 4 --method importance",
                                    "dense {}/x --experts 4 --method marks"};
    for (EACH(i, readers)) {
        int code = up_run("", "{}/%s --calibrate {}/bad.bin --calibrate-batches 6 --batch 2 --seq 32", readers[i]);
        check(code == 2 && strstr(up_output, "token 60000 at byte") && access(up_path("x"), F_OK),
              "%s: %d, %.200s", readers[i], code, up_output);
    }
}

// Scores against gradients that transformers made in fp64: the calibration data are the reference's tokens.
static void test_up_utility(void) {
    up_begin();
    static const char* models[] = {GOLDEN "qwen3_moe_top1", GOLDEN "dots1"};
    for (int i = 0; i < 2; i++) {
        char path[PATH_SIZE];
        Error error = {""};
        SafeTensors* s = keep_file(safetensors_open(join_path(path, models[i], "reference.safetensors"), &error));
        StoredTensor* t = safetensors_find(s, "tokens");
        Config c;
        config_read(&c, models[i], &error);
        int B = (int)t->shape[0], T = (int)t->shape[1], tokens[256], targets[256], E = c.num_experts;
        read_at(s->fds[0], tokens, (size_t)t->bytes, t->offset);
        StoredTensor* y = safetensors_find(s, "targets");
        read_at(s->fds[0], targets, (size_t)y->bytes, y->offset);
        tokens[B * T] = targets[B * T - 1];
        up_make_shard("reference.bin", tokens, B * T + 1);
        int layer = 0;
        while (!c.sparse[layer]) layer++;
        double g2[64][2], w2[64][2];
        for (int e = 0; e < E; e++)
            for (int m = 0; m < 3; m++) {
                static const char* matrices[] = {"gate_proj", "up_proj", "down_proj"};
                char name[128];
                long n;
                if (m == 0) g2[e][0] = g2[e][1] = w2[e][0] = w2[e][1] = 0;
                snprintf(name, sizeof name, "grad.model.layers.%d.mlp.experts.%d.%s.weight", layer, e, matrices[m]);
                StoredTensor* g = safetensors_find(s, name);
                float* x = kept_floats(g->count);
                safetensors_read(s, g, 0, g->count, x, &error);
                for (long k = 0; k < g->count; k++) g2[e][m == 2] += (double)x[k] * x[k];
                x = up_tensor(models[i], name + 5, &n);
                for (long k = 0; k < n; k++) w2[e][m == 2] += (double)x[k] * x[k];
            }
        // one batch of B, and B batches of one: gradients are averaged before the norm is taken, so both are the same
        static const struct {
            const char *select, *on;
            int batches;
        } cases[] = {{"grad2", "all", 1},     {"grad2", "all", 2},   {"saliency", "all", 1},  {"weight", "all", 1},
                     {"grad2", "gate-up", 1}, {"grad2", "down", 1},  {"grad2", "average", 1}, {"grad2", "product", 1},
                     {"saliency", "max", 1},  {"saliency", "min", 1}};
        for (int k = 0; k < 10; k++) {
            char name[32];
            snprintf(name, sizeof name, "util%d_%d", i, k);
            int grad = k != 3;
            if (grad)
                UP("%s {}/%s --experts %d --select %s --score-on %s --calibrate {}/reference.bin --calibrate-batches "
                   "%d --batch %d --seq %d",
                   models[i], name, 2 * E, cases[k].select, cases[k].on, cases[k].batches, B / cases[k].batches, T);
            else
                UP("%s {}/%s --experts %d --select %s --score-on %s", models[i], name, 2 * E, cases[k].select,
                   cases[k].on);
            Json* j = up_receipt(up_path(name));
            const Json* score = json_get(json_get(j, "layers")->items[0], "score");
            double worst = 0;
            for (int e = 0; e < E; e++) {
                double a, b, expected;
                int saliency = !strcmp(cases[k].select, "saliency"), weight = !strcmp(cases[k].select, "weight");
                a = saliency ? sqrt(w2[e][0] * g2[e][0]) : weight ? w2[e][0] : g2[e][0];
                b = saliency ? sqrt(w2[e][1] * g2[e][1]) : weight ? w2[e][1] : g2[e][1];
                const char* on = cases[k].on;
                if (!strcmp(on, "all"))
                    expected = saliency ? sqrt((w2[e][0] + w2[e][1]) * (g2[e][0] + g2[e][1])) : a + b;
                else
                    expected = !strcmp(on, "gate-up")   ? a
                               : !strcmp(on, "down")    ? b
                               : !strcmp(on, "average") ? (a + b) / 2
                               : !strcmp(on, "product") ? a * b
                               : !strcmp(on, "max")     ? larger(a, b)
                                                        : fmin(a, b);
                double got = score->items[e]->number;
                worst = larger(worst, expected == 0 ? got : fabs(got / expected - 1));
            }
            check(worst < 1e-4, "%s: %s on %s in %d batches, against fp64 gradients: %.1e", models[i], cases[k].select,
                  cases[k].on, cases[k].batches, worst);
        }
    }
    test_up_utility_lpr();
    test_up_bad_tokens();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make_random_shard("random.bin", 2000, 256);
    UP("{}/m3 {}/fisher --experts 6 --select fisher --calibrate {}/random.bin --calibrate-batches 2 --batch 2 --seq "
       "16");
    UP("{}/m3 {}/grad2 --experts 6 --select grad2 --calibrate {}/random.bin --calibrate-batches 2 --batch 2 --seq 16");
    Json *f = up_receipt(up_path("fisher")), *g = up_receipt(up_path("grad2"));
    double worst = 0;
    for (int e = 0; e < 3; e++) {
        double v2 = 0;
        static const char* matrices[] = {"gate_proj", "up_proj", "down_proj"};
        for (int m = 0; m < 3; m++) {
            char name[128];
            long n;
            snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.%s.weight.exp_avg_sq", e, matrices[m]);
            float* v = up_moment(up_path("m3"), name, &n);
            v2 += sum_of_squares(v, n);
        }
        double expected = json_get(json_get(g, "layers")->items[1], "score")->items[e]->number / (sqrt(v2) + 1e-8);
        double score = json_get(json_get(f, "layers")->items[1], "score")->items[e]->number;
        worst = larger(worst, fabs(score / expected - 1));
    }
    check(worst < 1e-5, "fisher is grad2 over the norm of Adam's second moment: %.1e", worst);
}

static void test_up_pruning(void) {
    up_begin();
    int E = 5, H = 24, I = 40, L = 2;
    up_make("big", QWEN3_MOE, L, H, I, E, 2, 1, 6);
    up_make("before", QWEN3_MOE, L, H, I, E, 2, 1, 7);
    up_make_random_shard("random.bin", 3000, 256);
    UP("{}/big {}/norms --experts 3 --select router-norm --reference {}/before");
    for (int l = 0; l < L; l++) {
        char name[64], expected[32] = "";
        snprintf(name, sizeof name, "model.layers.%d.mlp.gate.weight", l);
        float *now = up_tensor(up_path("big"), name, NULL), *then = up_tensor(up_path("before"), name, NULL);
        double change[5];
        for (int e = 0; e < E; e++)
            change[e] = sqrt(sum_of_squares(now + e * H, H)) - sqrt(sum_of_squares(then + e * H, H));
        for (int e = 0; e < E; e++) {
            int better = 0;
            for (int k = 0; k < E; k++) better += change[k] > change[e];
            if (better < 3) sprintf(expected + strlen(expected), "%s%d", *expected ? " " : "", e);
        }
        check(up_list_is(up_path("norms"), "source", l, expected), "router-norm keeps %s in layer %d", expected, l);
    }
    int second = up_listed(up_path("norms"), "source", 1, 1);
    char name[96];
    snprintf(name, sizeof name, EXPERT, second, "up_proj");
    check(up_same(up_path("big"), name, up_path("norms"), "model.layers.1.mlp.experts.1.up_proj.weight"),
          "experts that stay are untouched");
    float *rows = up_tensor(up_path("norms"), "model.layers.1.mlp.gate.weight", NULL),
          *all = up_tensor(up_path("big"), "model.layers.1.mlp.gate.weight", NULL);
    check(same_floats(rows + H, all + second * H, H), "and take their router rows along");
    // load and the norms of MoE-Pruner, counted here from a training model, which keeps every layer's activations
    UP("{}/big {}/load --experts 2 --select load --calibrate {}/random.bin --calibrate-batches 3 --batch 2 --seq 16");
    UP("{}/big {}/larger --experts 7 --select load --cap 1 --calibrate {}/random.bin --calibrate-batches 3 --batch 2 "
       "--seq 16");
    UP("{}/big {}/pruned --experts 5 --prune-weights 0.3 --calibrate {}/random.bin --calibrate-batches 3 --batch 2 "
       "--seq 16");
    Config c;
    Error error = {""};
    config_read(&c, up_path("big"), &error);
    Model* m = new_model(&c, FOR_TRAINING, 1, 16);
    checkpoint_load(m, up_path("big"), &error);
    Dataset* d = dataset_open(up_path("random.bin"), 16, 256, TRAIN_PART, BYTES);
    double load[5] = {0}, in[5][24] = {{0}}, hidden[5][40] = {{0}};
    for (int sequence = 0; sequence < 6; sequence++) {
        int tokens[16], targets[16];
        dataset_training_sequence(d, 1, sequence, tokens, targets);
        model_forward(m, tokens, targets, 1, 16);
        LayerActivations* s = &m->layers[1];
        for (int t = 0; t < 16; t++)
            for (int k = 0; k < 2; k++) {
                int e = s->experts[t * 2 + k];
                double gate = s->gates[t * 2 + k];
                load[e]++;
                for (int i = 0; i < H; i++) in[e][i] += pow(gate * s->ffn_in[t * H + i], 2);
                for (int i = 0; i < I; i++) {       // the hidden row anew, from the weights
                    const float *wg = m->weights.layers[1].gate_up + (long)e * 2 * I * H + (long)i * H,
                                *wu = wg + (long)I * H;
                    double a = 0, b = 0;
                    for (int q = 0; q < H; q++) {
                        a += (double)wg[q] * s->ffn_in[t * H + q];
                        b += (double)wu[q] * s->ffn_in[t * H + q];
                    }
                    hidden[e][i] += pow(gate * a / (1 + exp(-a)) * b, 2);
                }
            }
    }
    char expected[32] = "";
    for (int e = 0; e < E; e++) {
        int better = 0;
        for (int k = 0; k < E; k++) better += load[k] > load[e] || (load[k] == load[e] && k < e);
        if (better < 2) sprintf(expected + strlen(expected), "%s%d", *expected ? " " : "", e);
    }
    check(up_list_is(up_path("load"), "source", 1, expected), "load keeps %s", expected);
    char copied[48];
    snprintf(copied, sizeof copied, "0 1 2 3 4 %s", expected);
    check(up_list_is(up_path("larger"), "source", 1, copied), "or hands out copies: %s", copied);
    int right = 1, zeros = 1;
    for (int e = 0; e < E; e++)
        for (int which = 0; which < 2; which++) {
            int wide = which ? I : H, high = which ? H : I;
            float *w = up_expert("big", e, which ? "down_proj" : "gate_proj"),
                  *v = up_expert("pruned", e, which ? "down_proj" : "gate_proj");
            for (int r = 0; r < high; r++) {
                int gone = 0;
                double most_gone = 0, least_kept = 1e300;
                for (int k = 0; k < wide; k++) {
                    double norm = load[e] == 0 ? 1 : sqrt(which ? hidden[e][k] : in[e][k]),
                           score = fabs(w[r * wide + k]) * norm;
                    if (v[r * wide + k] == 0) {
                        gone++;
                        most_gone = larger(most_gone, score);
                    } else {
                        least_kept = fmin(least_kept, score);
                        right &= v[r * wide + k] == w[r * wide + k];
                    }
                }
                zeros &= gone == (int)floor(0.3 * wide + 1e-9);
                right &= most_gone <= least_kept * (1 + 1e-5);
            }
        }
    check(zeros && right, "MoE-Pruner: 30 %% of each row, those with the smallest |w| ||x gate||");
    dataset_close(d);
}

static void test_up_cluster(void) {
    up_begin();
    // tokens in three directions, with noise and lengths of their own
    enum { DIMENSION = 8, TOKENS = 300 };
    static float x[TOKENS * DIMENSION];
    float centroids[3 * DIMENSION];
    int cluster[TOKENS], same = 1;
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < DIMENSION; i++)
            x[t * DIMENSION + i] =
                (float)((1 + t % 7) *
                        ((i == t % 3) + 0.05 * random_normal(random_key(1, (uint64_t)t, (uint64_t)i, 0))));
    // start 4 is one in which the three first tokens lie in three directions; others may find a local optimum, as
    // k-means does
    int found = 0;
    for (uint64_t key = 0; key < 20 && !found; key++) {
        long start[3];
        for (int i = 0; i < 3; i++) start[i] = random_permutation(i, TOKENS, key);
        spherical_k_means(centroids, cluster, x, TOKENS, DIMENSION, 3, start);
        same = cluster[0] != cluster[1] && cluster[1] != cluster[2] && cluster[0] != cluster[2];
        for (int t = 0; t < TOKENS; t++) same &= cluster[t] == cluster[t % 3];
        found = same;
    }
    double length = 0;
    for (int i = 0; i < DIMENSION; i++) length += (double)centroids[i] * centroids[i];
    check(found && fabs(length - 1) < 1e-5 && centroids[cluster[1] * DIMENSION + 1] > 0.99,
          "spherical k-means finds three directions");
    // truncation: with unit covariance it is the plain truncated SVD; with another it minimises ||(W - W') S||
    float W[12 * 8], V[12 * 8];
    double S[64] = {0}, s[8], error = 0, expected = 0;
    for (int i = 0; i < 96; i++) V[i] = W[i] = (float)random_normal(mix64((uint64_t)i));
    for (int i = 0; i < 8; i++)
        for (int j = 0; j <= i; j++) S[i * 8 + j] = i == j ? 1 + 0.2 * i : 0.1 * (i - j);
    float WS[12 * 8];
    for (int r = 0; r < 12; r++)
        for (int j = 0; j < 8; j++) {
            double sum = 0;
            for (int i = 0; i < 8; i++) sum += W[r * 8 + i] * S[i * 8 + j];
            WS[r * 8 + j] = (float)sum;
        }
    up_singular_values(WS, 12, 8, s);
    double all = 0, kept = 0;
    for (int i = 0; i < 8; i++) all += s[i] * s[i];
    int rank = 0;
    while (kept < 0.8 * all) {
        kept += s[rank] * s[rank];
        rank++;
    }
    long got = truncate_whitened(V, 12, 8, S, 0.8);
    for (int r = 0; r < 12; r++)
        for (int j = 0; j < 8; j++) {
            double sum = 0;
            for (int i = 0; i < 8; i++) sum += ((double)W[r * 8 + i] - V[r * 8 + i]) * S[i * 8 + j];
            error += sum * sum;
        }
    for (int i = rank; i < 8; i++) expected += s[i] * s[i];
    check(got == rank && fabs(error / expected - 1) < 1e-4,
          "truncation keeps %d of 8 singular values and loses just the others: %.6f of %.6f", rank, error, expected);
    up_make("dense", QWEN3, 2, 32, 48, 0, 0, 0, 1);
    up_make_random_shard("random.bin", 3000, 256);
    UP("{}/dense {}/full --experts 4 --topk 2 --method cluster --energy 1 --calibrate {}/random.bin "
       "--calibrate-batches 3 --batch 2 --seq 32");
    double e = up_change(up_path("dense"), 0, up_path("full"));
    check(e < 1e-3, "all of the energy: the FFN itself, logits change by %.1e", e);
    long n;
    float* rows = up_tensor(up_path("full"), "model.layers.1.mlp.gate.weight", &n);
    double worst = 0;
    for (int i = 0; i < 4; i++) worst = larger(worst, fabs(sqrt(sum_of_squares(rows + i * 32, 32)) - 1));
    check(n == 128 && worst < 1e-5, "router rows are unit centroids: %.1e", worst);
}

// LPR's experts read the token with its read-out added, and pruning goes by that.
static void test_up_pruning_lpr(void) {
    Config c;
    Model* m = up_begin_lpr(&c);
    m->weights.layers[0].lpr_readout_bias[5] = 1000;
    mkdir(up_path("biased"), 0777);
    check(checkpoint_save(m, up_path("biased"), 1) == NULL, "an LPR model whose experts read one large number");
    UP("{}/biased {}/pruned --experts %d --prune-weights 0.9 --calibrate {}/random.bin --batch 2 --seq 8",
       c.num_experts);
    float* w = up_tensor(up_path("pruned"), "model.layers.0.mlp.experts.1.gate_proj.weight", NULL);
    int kept = 0;
    for (int r = 0; r < c.moe_intermediate_size; r++) kept += w[r * c.hidden_size + 5] != 0;
    check(kept > 0.9 * c.moe_intermediate_size, "LPR: %d of %d weights of that number are kept", kept,
          c.moe_intermediate_size);
}

#include "merge.c" // smaller mixtures
