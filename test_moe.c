/*
test_moe.c: every check of train_moe.c. `make test` builds and runs it; it prints a line for each check, ends with
`N passed, N failed`, and its exit code says the same. `./test_moe WORD` runs only the groups whose name contains WORD.

The program under test is included, so functions are called directly. Where a whole run of the command line is tested,
this program starts itself with `--as-train-moe` as its first argument and then behaves as ./train_moe does.
*/
#define TRAIN_MOE_NO_MAIN
#include "train_moe.c"

#include <sys/resource.h>
#include <sys/wait.h>

// ---------------------------------------------------------------------------------------------------------------------
// Harness

static int passed = 0, failed = 0;
static const char* group_name = "";

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void check(int ok, const char* format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s %s: ", ok ? "ok    " : "FAILED", group_name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    if (ok) passed++;
    else failed++;
}

// |a - b| / |b| in the 2-norm; where b is zero, a must be zero as well. A permuted, missing or zero tensor gives about 1.
static double relative_error(const float* a, const float* b, long n) {
    double difference = 0, norm = 0;
    for (long i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    if (!(difference == difference)) return INFINITY;
    return norm > 0 ? sqrt(difference / norm) : difference > 0 ? INFINITY : 0;
}

static double max_error(const float* a, const float* b, long n) {
    double worst = 0;
    for (long i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

// a float tensor of a file, to be freed; ends the test program if it is not there
static float* reference_floats(SafeTensors* s, const char* name, long* count) {
    Error error = {""};
    StoredTensor* t = safetensors_find(s, name);
    if (!t) die(1, "the reference has no tensor %s", name);
    float* out = (float*)checked_malloc(sizeof(float) * (size_t)t->count);
    if (!safetensors_read(s, t, 0, t->count, out, &error)) die(1, "%s", error.text);
    if (count) *count = t->count;
    return out;
}

static int* reference_ints(SafeTensors* s, const char* name, long* shape) {
    StoredTensor* t = safetensors_find(s, name);
    if (!t || t->dtype != DTYPE_I32) die(1, "the reference has no I32 tensor %s", name);
    int* out = (int*)checked_malloc((size_t)t->bytes);
    if (!read_at(s->fds[t->file], out, (size_t)t->bytes, t->offset)) die(1, "cannot read %s", name);
    for (int i = 0; shape && i < t->ndim; i++) shape[i] = t->shape[i];
    return out;
}

static double metadata_number(const SafeTensors* s, const char* key) {
    const Json* j = json_get(s->metadata, key);
    return j ? strtod(j->string, NULL) : 0;
}

static int metadata_is(const SafeTensors* s, const char* key, const char* value) {
    const Json* j = json_get(s->metadata, key);
    return j && !strcmp(j->string, value);
}

// deterministic numbers in (-1, 1)
static void fill_random(float* x, long n, uint64_t key) {
    for (long i = 0; i < n; i++) x[i] = (float)(2 * random_uniform(mix64(key ^ (uint64_t)i)) - 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Against transformers in fp64 (dev/reference/make_references.py)

static const char* golden_models[] = {"llama", "llama_tied", "mistral", "mixtral", "mixtral_top1", "olmoe", "olmoe_norm", "qwen3",
                                      "qwen3_moe", "qwen3_moe_all", "qwen3_moe_mlp_only", "qwen3_moe_top1", "dots1"};
static const char* golden_routers[] = {"sigmoid", "sigmoid_top1", "lpr", "lpr_mean", "logit_norm", "aux_hf", "matryoshka", "family",
                                       "family_aux", "family_inf", "family_sigmoid", "family_sigmoid_inf", "family_twins",
                                       "family_twins_sigmoid"};

static Model* open_model(const char* dir, Purpose purpose, int B, int T) {
    Config c;
    Error error = {""};
    if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
    Model* m = model_create(&c, purpose, B, T, T, NULL);
    if (!checkpoint_load(m, dir, &error)) die(1, "%s", error.text);
    return m;
}

static void test_golden_model(const char* folder, const char* name) {
    char dir[PATH_SIZE], path[PATH_SIZE];
    Error error = {""};
    snprintf(dir, sizeof dir, "dev/reference/%s/%s", folder, name);
    join_path(path, dir, "reference.safetensors");
    SafeTensors* s = safetensors_open(path, &error);
    if (!s) die(1, "%s", error.text);
    long shape[4], n;
    int *tokens = reference_ints(s, "tokens", shape), *targets = reference_ints(s, "targets", NULL);
    int B = (int)shape[0], T = (int)shape[1], N = B * T;
    Config config;
    if (!config_read(&config, dir, &error)) die(1, "%s", error.text);
    double penalty = metadata_number(s, "family_penalty");
    config.topk_limit = config.num_experts;
    config.family_penalty = penalty;
    Model* m = model_create(&config, FOR_TRAINING, B, T, T, NULL);
    m->config.family_penalty = 0;           // the families are in the reference and not in an upcycle.json
    if (!checkpoint_load(m, dir, &error)) die(1, "%s", error.text);
    m->config.family_penalty = penalty;
    const Config* c = &m->config;
    m->noise_seed = (uint64_t)metadata_number(s, "seed");
    const Json* ks = json_get(s->metadata, "topk_layers");
    for (int l = 0, at = 0; l < c->num_layers; l++) {
        char tensor[64];
        snprintf(tensor, sizeof tensor, "family.%d", l);
        int* family = penalty > 0 && c->sparse[l] ? reference_ints(s, tensor, NULL) : NULL;
        if (family) memcpy(m->family + (long)l * c->num_experts, family, sizeof(int) * (size_t)c->num_experts);
        free(family);
        if (ks && c->sparse[l]) m->topk[l] = atoi(ks->string + 2 * at++);        // "3,1"
    }
    m->balance.aux = (float)metadata_number(s, "aux");
    m->balance.z = (float)metadata_number(s, "z_loss");
    m->balance.aux_form = metadata_is(s, "aux_form", "hf") ? AUX_HF : AUX_SWITCH;
    model_forward(m, tokens, targets, B, T);

    float* logits = reference_floats(s, "logits", &n);
    double e = max_error(m->logits, logits, n);
    check(n == (long)N * c->vocab_size && e <= 1e-5, "%s: logits, largest error %.1e", name, e);
    free(logits);
    static const char* losses[] = {"loss", "aux_loss", "z_loss", "lpr_loss"};
    for (int i = 0; i < 4; i++) {
        if (!safetensors_find(s, losses[i])) continue;      // transformers defines no aux loss for Dots1
        float* expected = reference_floats(s, losses[i], NULL);
        double got = i == 0 ? m->loss : i == 1 ? m->aux_loss : i == 2 ? m->z_loss : m->lpr_loss;
        check(fabs(got - expected[0]) <= 1e-5 * (1 + fabs(expected[0])), "%s: %s %.7f, expected %.7f", name, losses[i], got, expected[0]);
        free(expected);
    }
    for (int l = 0; l < c->num_layers; l++) {
        if (!c->sparse[l]) continue;
        char tensor[64];
        snprintf(tensor, sizeof tensor, "router.%d", l);
        int *experts = reference_ints(s, tensor, shape), same = shape[0] == N && shape[1] == m->topk[l];
        for (long i = 0; same && i < shape[0] * shape[1]; i++) same = experts[i] == m->layers[l].experts[i];
        check(same, "%s: layer %d: chosen experts", name, l);
        free(experts);
        snprintf(tensor, sizeof tensor, "gate.%d", l);
        float* gates = reference_floats(s, tensor, &n);
        check(max_error(m->layers[l].gates, gates, n) <= 1e-6, "%s: layer %d: gates", name, l);
        free(gates);
    }

    model_backward(m, 1);
    double worst = 0;
    const char* worst_name = "";
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        char tensor[160];
        snprintf(tensor, sizeof tensor, "grad.%s", t->name);
        // not trained by gradients, or without elements
        if (strstr(t->name, "e_score_correction_bias") || tensor_size(t) == 0) continue;
        float* expected = reference_floats(s, tensor, &n);
        e = n == tensor_size(t) ? relative_error(m->grads + t->offset, expected, n) : INFINITY;
        if (e >= worst) {
            worst = e;
            worst_name = t->name;
        }
        free(expected);
    }
    check(worst <= 1e-5, "%s: %d gradients, largest relative error %.1e (%s)", name, m->layout.count, worst, worst_name);

    for (int l = 0; l < c->num_layers; l++) {
        char tensor[64];
        snprintf(tensor, sizeof tensor, "bias_after.%d", l);
        if (!safetensors_find(s, tensor)) continue;
        float *expected = reference_floats(s, tensor, &n), *bias = m->weights.layers[l].router_bias;
        long counts[64];
        for (int e = 0; e < n; e++) counts[e] = m->layers[l].offsets[e + 1] - m->layers[l].offsets[e];
        update_router_bias(bias, counts, (int)n, metadata_number(s, "bias_rate"));
        check(max_error(bias, expected, n) <= 1e-7, "%s: layer %d: the bias after a step", name, l);
        free(expected);
    }
    if (safetensors_find(s, "aux_adaptive_after")) {
        float* expected = reference_floats(s, "aux_adaptive_after", &n);
        for (int l = 0, at = 0; l < c->num_layers; l++) {
            long counts[64];
            if (!c->sparse[l]) continue;
            for (int e = 0; e < c->num_experts; e++) counts[e] = m->layers[l].offsets[e + 1] - m->layers[l].offsets[e];
            double after = adapted_aux(metadata_number(s, "aux_alpha"), counts, c->num_experts);
            check(fabs(after / expected[at++] - 1) <= 1e-6, "%s: layer %d: the adapted balance coefficient", name, l);
        }
        free(expected);
    }

    if (safetensors_find(s, "adamw.losses")) {
        float *expected = reference_floats(s, "adamw.losses", &n), *norms = reference_floats(s, "adamw.grad_norms", NULL);
        AdamW o = {metadata_number(s, "beta1"), metadata_number(s, "beta2"), metadata_number(s, "eps"),
                   metadata_number(s, "weight_decay"), metadata_number(s, "clip")};
        double norm_error = 0;
        worst = 0;
        memset(m->grads, 0, sizeof(float) * (size_t)m->layout.total);
        for (int step = 0; step < n; step++) {
            double loss = model_forward(m, tokens, targets, B, T);
            model_backward(m, 1);
            double norm = model_update(m, &o, metadata_number(s, "lr"), step + 1);
            worst = fmax(worst, fabs(loss - expected[step]));
            norm_error = fmax(norm_error, fabs(norm / norms[step] - 1));
        }
        check(n == 10 && worst <= 1e-4, "%s: %ld AdamW steps, largest error of the loss %.1e", name, n, worst);
        check(norm_error <= 1e-3, "%s: gradient norms on the way, largest relative error %.1e", name, norm_error);
        free(expected);
        free(norms);
    }
    free(tokens);
    free(targets);
    safetensors_close(s);
    model_free(m);
}

static void test_golden(void) {
    for (size_t i = 0; i < sizeof golden_models / sizeof golden_models[0]; i++) test_golden_model("golden", golden_models[i]);
}

static void test_golden_routers(void) {
    for (size_t i = 0; i < sizeof golden_routers / sizeof golden_routers[0]; i++)
        test_golden_model("golden_routers", golden_routers[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Families: after every expert has been doubled (or more), an infinite penalty keeps the function bit for bit

// A model with `copies` of every expert of `source`, whose copies follow the originals.
static Model* multiply_experts(const Model* source, int copies) {
    Config c = source->config;
    int E = c.num_experts, H = c.hidden_size;
    c.num_experts = E * copies;
    c.family_penalty = INFINITY;
    Model* m = model_create(&c, source->purpose, source->B, source->T, source->positions, NULL);
    m->has_families = 1;
    memcpy(m->weights.embedding, source->weights.embedding, sizeof(float) * (size_t)c.vocab_size * (size_t)H);
    memcpy(m->weights.final_norm, source->weights.final_norm, sizeof(float) * (size_t)H);
    memcpy(m->weights.lm_head, source->weights.lm_head, sizeof(float) * (size_t)c.vocab_size * (size_t)H);
    for (int l = 0; l < c.num_layers; l++) {
        LayerWeights *to = &m->weights.layers[l], *from = &source->weights.layers[l];
        int dense_I = layer_width(&c, l), HD = c.head_dim, NH = c.num_heads;
        memcpy(to->attn_norm, from->attn_norm, sizeof(float) * (size_t)H);
        memcpy(to->ffn_norm, from->ffn_norm, sizeof(float) * (size_t)H);
        memcpy(to->qkv, from->qkv, sizeof(float) * (size_t)qkv_width(&c) * (size_t)H);
        memcpy(to->attn_out, from->attn_out, sizeof(float) * (size_t)H * (size_t)NH * (size_t)HD);
        if (to->q_norm) memcpy(to->q_norm, from->q_norm, sizeof(float) * (size_t)HD);
        if (to->k_norm) memcpy(to->k_norm, from->k_norm, sizeof(float) * (size_t)HD);
        for (int e = 0; e < layer_experts(&c, l); e++) {
            int source_expert = c.sparse[l] ? e % E : 0;
            long gate_up = 2L * dense_I * H, down = (long)H * dense_I;
            memcpy(to->gate_up + e * gate_up, from->gate_up + source_expert * gate_up, sizeof(float) * (size_t)gate_up);
            memcpy(to->down + e * down, from->down + source_expert * down, sizeof(float) * (size_t)down);
            if (!c.sparse[l]) continue;
            memcpy(to->router + (long)e * H, from->router + (long)source_expert * H, sizeof(float) * (size_t)H);
            if (to->router_bias) to->router_bias[e] = from->router_bias[source_expert];
            m->family[(long)l * c.num_experts + e] = source_expert;
        }
    }
    return m;
}

static void test_families(void) {
    static const struct { const char *folder, *name; } models[] = {
        {"golden", "qwen3_moe"}, {"golden", "mixtral"}, {"golden_routers", "sigmoid"}, {"golden_routers", "logit_norm"}};
    enum { B = 2, T = 9 };
    int tokens[B * T];
    for (int i = 0; i < 4; i++) {
        char dir[PATH_SIZE];
        snprintf(dir, sizeof dir, "dev/reference/%s/%s", models[i].folder, models[i].name);
        Config c;
        Error error = {""};
        if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
        c.topk_limit = c.num_experts;
        Model* source = model_create(&c, FOR_TRAINING, B, T, T, NULL);
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
                    same &= !memcmp(source->logits, grown->logits, sizeof(float) * (size_t)logits);
                    worst = fmax(worst, relative_error(grown->logits, source->logits, logits));
                    for (int l = 0; l < c.num_layers; l++)
                        for (int n = 0; c.sparse[l] && n < B * T * K; n++) {
                            const int* experts = grown->layers[l].experts;
                            places[experts[n] / E]++;
                            for (int k = n / K * K; k < n; k++) together += experts[k] % E == experts[n] % E;
                        }
                }
            int used = places[0] > 0 && places[1] > 0 && (copies == 2 || places[2] > 0);
            // sigmoid: bit for bit. The softmax's sum meets the same numbers in another order, and rounds differently.
            check(worst <= (c.router == ROUTER_SIGMOID ? 0 : 1e-6), "%s: %d copies of each expert, K = 1 to %d, renormalised or not: relative error %.1e%s",
                  models[i].name, copies, E, worst, same ? ", bit for bit" : "");
            check(together == 0 && used, "%s: %d copies: never two of one family, and each copy sees tokens (%d, %d, %d)",
                  models[i].name, copies, places[0], places[1], places[2]);
            model_free(grown);
        }
        model_free(source);
    }
    check(isinf(family_penalty_at(1, 0, 10)) && fabs(family_penalty_at(2, 4, 10) - 3) < 1e-12 &&
              family_penalty_at(2, 10, 10) == 0 && family_penalty_at(2, 11, 10) == 0,
          "the penalty falls from infinity to zero");
}

// ---------------------------------------------------------------------------------------------------------------------
// What the experts do

static void test_load_figures(void) {
    const long even[4] = {5, 5, 5, 5}, one[4] = {0, 0, 12, 0}, mixed[4] = {1, 2, 3, 4}, none[3] = {0, 0, 0};
    LoadFigures f = load_figures(even, 4);
    check(f.gini == 0 && f.min_max == 1 && f.max_vio == 0 && f.dead == 0, "equal loads");
    f = load_figures(one, 4);
    check(fabs(f.gini - 0.75) < 1e-12 && f.min_max == 0 && fabs(f.max_vio - 3) < 1e-12 && f.dead == 3, "one expert has all");
    f = load_figures(mixed, 4);
    // sum_i (2 i - n - 1) x_(i) / (n sum x) = (-3 - 2 + 3 + 12) / 40
    check(fabs(f.gini - 0.25) < 1e-12 && fabs(f.min_max - 0.25) < 1e-12 && fabs(f.max_vio - 0.6) < 1e-12, "1, 2, 3, 4");
    f = load_figures(none, 3);
    check(f.gini == 0 && f.dead == 3, "no tokens at all");
}

// ---------------------------------------------------------------------------------------------------------------------

static const struct { const char* name; void (*run)(void); } groups[] = {
    {"golden", test_golden},
    {"routers", test_golden_routers},
    {"families", test_families},
    {"load figures", test_load_figures},
};

int main(int argc, char** argv) {
    if (argc > 1 && !strcmp(argv[1], "--as-train-moe")) {
        argv[1] = argv[0];
        return train_moe_main(argc - 1, argv + 1);
    }
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++) {
        group_name = groups[i].name;
        if (argc < 2 || strstr(group_name, argv[1])) groups[i].run();
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
