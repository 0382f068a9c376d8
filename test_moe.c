/*
test_moe.c: every check of train_moe.c and upcycle.c. `make test` builds and runs it; it prints a line for each check,
ends with `N passed, N failed`, and its exit code says the same. `./test_moe WORD ...` runs only the groups whose name
contains a WORD.

What the project promises is checked here, to be read: models and routers have the logits, gradients and training steps
of the references, and the products' bits are those of plain loops. The rest stands in dev/test by subject.

The program under test is included, so functions are called directly. Where a whole run of the command line is tested,
this program starts itself with `--as-train-moe` as its first argument and then behaves as ./train_moe does.

Compiled with -DTEST_GPU (make test_moe_cu, or dev/cuda/standin for machines without a GPU) it also includes
train_moe.cu, and has groups named "gpu ..." which check that against the references and against train_moe.c.
*/
#define UPCYCLE_NO_MAIN
#include "dev/test/file_systems.h"   // before the programs: they lock and flush through it
#ifdef TEST_GPU
#define TRAIN_MOE_NO_MAIN
#include "train_moe.cu"
#endif
#include "upcycle.c"          // which includes train_moe.c
#include "dev/test/harness.h"

// ---------------------------------------------------------------------------------------------------------------------
// Against transformers in fp64 (dev/reference/make_references.py)

static const char* golden_models[] = {"llama", "llama_tied", "mistral", "mixtral", "mixtral_top1", "olmoe",
                                      "olmoe_norm", "qwen3", "qwen3_moe", "qwen3_moe_all", "qwen3_moe_mlp_only",
                                      "qwen3_moe_top1", "dots1", "dots1_shared", "dots1_raw", "qwen2", "qwen2_moe",
                                      "qwen2_moe_mixed", "rope_llama3", "rope_linear", "rope_yarn", "rope_yarn_moe"};
static const char* golden_routers[] = {"sigmoid", "sigmoid_top1", "lpr", "lpr_mean", "logit_norm", "aux_hf",
                                       "matryoshka", "family", "family_aux", "family_inf", "family_sigmoid",
                                       "family_sigmoid_inf", "family_twins", "family_twins_sigmoid"};

// How far results may be from the reference: of each group the largest error.
typedef struct {
    double logits, losses, gates, gradients, steps, norms; // absolute, relative, absolute, relative, absolute, rel.
    // Share of a layer's tokens that may go to other experts. Where some do, their logits and the gradients are
    // others, too, and only the losses are compared.
    double other_choices;
} Tolerances;
static const Tolerances of_floats = {1e-5, 1e-5, 1e-6, 1e-5, 1e-4, 1e-3, 0};

// What the reference says of one model, and the model that must say the same.
typedef struct {
    const char* name;
    Tolerances most;
    SafeTensors* file;
    Model* m;
    int B, T, *tokens, *targets;
    int others; // tokens of all layers that go to other experts than in the reference
} Reference;

// the name of layer l's part of a tensor of the reference
static const char* of_layer(const char* what, int l) {
    static char name[64];
    snprintf(name, sizeof name, "%s.%d", what, l);
    return name;
}

static Reference reference_open(const char* folder, const char* name, Tolerances most) {
    char dir[PATH_SIZE], path[PATH_SIZE];
    Error error = {""};
    Config c;
    long shape[4];
    snprintf(dir, sizeof dir, "dev/reference/%s/%s", folder, name);
    SafeTensors* s = keep_file(safetensors_open(join_path(path, dir, "reference.safetensors"), &error));
    if (!s || !config_read(&c, dir, &error)) die(1, "%s", error.text);
    int *tokens = reference_ints(s, "tokens", shape), *targets = reference_ints(s, "targets", NULL);
    double penalty = metadata_number(s, "family_penalty");
    c.topk_limit = c.num_experts;
    c.router.family_penalty = penalty;
    Model* m = new_model(&c, FOR_TRAINING, (int)shape[0], (int)shape[1]);
    m->config.router.family_penalty = 0; // the families are in the reference and not in an upcycle.json
    if (!checkpoint_load(m, dir, &error)) die(1, "%s", error.text);
    m->config.router.family_penalty = penalty, m->config.router.fixed = (int)metadata_number(s, "fixed");
    m->noise_seed = (uint64_t)metadata_number(s, "seed");
    m->balance.aux = (float)metadata_number(s, "aux");
    m->balance.z = (float)metadata_number(s, "z_loss");
    m->balance.aux_form = metadata_is(s, "aux_form", "hf") ? AUX_HF : AUX_SWITCH;
    const Json* ks = json_get(s->metadata, "topk_layers");
    for (int l = 0, at = 0; l < c.num_layers; l++) {
        if (!c.sparse[l]) continue;
        if (ks) m->topk[l] = atoi(ks->string + 2 * at++); // "3,1"
        if (penalty > 0)
            memcpy(m->family + (long)l * c.num_experts, reference_ints(s, of_layer("family", l), NULL),
                   sizeof(int) * (size_t)c.num_experts);
    }
    Reference r = {name, most, s, m, (int)shape[0], (int)shape[1], tokens, targets, 0};
    return r;
}

// Cross-entropy, balance loss, z-loss and LPR's; transformers defines no balance loss for Dots1.
static void check_losses(const Reference* r, Losses found) {
    const char* names[] = {"loss", "aux_loss", "z_loss", "lpr_loss"};
    double losses[] = {found.loss, found.aux, found.z, found.lpr};
    for (int i = 0; i < 4; i++) {
        if (!safetensors_find(r->file, names[i])) continue;
        double expected = *reference_floats(r->file, names[i], NULL);
        check(fabs(losses[i] - expected) <= r->most.losses * (1 + fabs(expected)), "%s: %s %.7f, expected %.7f",
              r->name, names[i], losses[i], expected);
    }
}

// Every token goes to the same experts in the same order, with the same gates.
static void check_routing(Reference* r) {
    const Model* m = r->m;
    int N = r->B * r->T;
    for (int l = 0; l < m->config.num_layers; l++) {
        if (!m->config.sparse[l]) continue;
        long shape[4];
        int *experts = reference_ints(r->file, of_layer("router", l), shape), others = 0, K = m->topk[l];
        float* gates = reference_floats(r->file, of_layer("gate", l), NULL);
        check(shape[0] == N && shape[1] == K, "%s: layer %d: %d experts a token", r->name, l, K);
        double worst = 0;
        for (int i = 0; i < N; i++) {
            int same = !memcmp(experts + i * K, m->layers[l].experts + i * K, sizeof(int) * (size_t)K);
            if (same) worst = larger(worst, max_error(m->layers[l].gates + i * K, gates + i * K, K));
            others += !same, r->others += !same;
        }
        check(others <= r->most.other_choices * N, "%s: layer %d: chosen experts, %d of %d tokens differ", r->name, l,
              others, N);
        worst /= gate_scaling(&m->config);
        check(worst <= r->most.gates || r->others > 0, "%s: layer %d: gates, largest error %.1e", r->name, l, worst);
    }
}

static void check_logits(const Reference* r) {
    long n;
    float* expected = reference_floats(r->file, "logits", &n);
    double error = max_error(r->m->logits, expected, n);
    check(n == (long)r->B * r->T * r->m->config.vocab_size && (error <= r->most.logits || r->others > 0),
          "%s: logits, largest error %.1e", r->name, error);
}

// The gradient of every tensor that is trained by gradients.
static void check_gradients(const Reference* r) {
    const Layout* layout = &r->m->layout;
    double worst = 0;
    const char* worst_name = "";
    for (int i = 0; i < layout->count; i++) {
        const Tensor* t = &layout->tensors[i];
        char name[160];
        long n;
        if (strstr(t->name, "e_score_correction_bias") || tensor_size(t) == 0) continue;
        snprintf(name, sizeof name, "grad.%s", t->name);
        float* expected = reference_floats(r->file, name, &n);
        double e = n == tensor_size(t) ? relative_error(r->m->grads + t->offset, expected, n) : INFINITY;
        if (!(e < worst)) {
            worst = e;
            worst_name = t->name;
        }
    }
    check(worst <= r->most.gradients || r->others > 0, "%s: %d gradients, largest relative error %.1e (%s)", r->name,
          layout->count, worst, worst_name);
}

// What follows a step from the experts' load: the router's bias, and the coefficient of the balance loss.
static void check_balancing(const Reference* r) {
    const Model* m = r->m;
    const Config* c = &m->config;
    int adapted = safetensors_find(r->file, "aux_adaptive_after") != NULL, at = 0;
    for (int l = 0; l < c->num_layers; l++) {
        long load[64] = {0}, n;
        for (int i = 0; c->sparse[l] && i < r->B * r->T * m->topk[l]; i++)
            if (m->layers[l].experts[i] >= 0) load[m->layers[l].experts[i]]++;
        if (safetensors_find(r->file, of_layer("bias_after", l))) {
            float *expected = reference_floats(r->file, of_layer("bias_after", l), &n);
            float* bias = m->weights.layers[l].router_bias;
            update_router_bias(bias, load, (int)n, metadata_number(r->file, "bias_rate"));
            check(max_error(bias, expected, n) <= 1e-7, "%s: layer %d: the bias after a step", r->name, l);
        }
        if (adapted && c->sparse[l]) {
            double after = adapted_aux(metadata_number(r->file, "aux_alpha"), load, c->num_experts);
            double expected = reference_floats(r->file, "aux_adaptive_after", NULL)[at++];
            check(fabs(after / expected - 1) <= 1e-6, "%s: layer %d: the adapted balance coefficient", r->name, l);
        }
    }
}

// Ten steps of torch.optim.AdamW on the same batch, with clipping.
static void check_steps(const Reference* r) {
    Model* m = r->m;
    SafeTensors* s = r->file;
    if (!safetensors_find(s, "adamw.losses")) return;
    long n;
    float *losses = reference_floats(s, "adamw.losses", &n), *norms = reference_floats(s, "adamw.grad_norms", NULL);
    AdamW o = {metadata_number(s, "beta1"), metadata_number(s, "beta2"), metadata_number(s, "eps"),
               metadata_number(s, "weight_decay"), metadata_number(s, "clip")};
    double worst = 0, norm_error = 0;
    model_update(m, &o, 0, 1); // clears the gradients, and changes nothing but the moments,
    memset(m->exp_avg, 0, floats_bytes(m->layout.total));
    memset(m->exp_avg_sq, 0, floats_bytes(m->layout.total));
    m->backend->send(m, PARAMETERS | MOMENTS); // which are cleared, too
    for (int step = 0; step < n; step++) {
        model_forward(m, r->tokens, r->targets, r->B, r->T);
        model_backward(m, 1);
        double norm = model_update(m, &o, metadata_number(s, "lr"), step + 1);
        worst = larger(worst, fabs(take_losses(m).loss - losses[step]));
        norm_error = larger(norm_error, fabs(norm / norms[step] - 1));
    }
    check(n == 10 && worst <= r->most.steps, "%s: %ld AdamW steps, largest error of the loss %.1e", r->name, n, worst);
    check(norm_error <= r->most.norms, "%s: gradient norms on the way, largest relative error %.1e", r->name,
          norm_error);
}

static void test_golden_model(const char* folder, const char* name, Tolerances most) {
    Reference r = reference_open(folder, name, most);
    Model* m = r.m;
    m->backend->send(m, PARAMETERS);
    model_forward(m, r.tokens, r.targets, r.B, r.T);
    m->backend->read_back(m, LOGITS | ROUTING);
    check_losses(&r, take_losses(m));
    check_routing(&r);
    check_logits(&r);
    model_backward(m, 1);
    m->backend->read_back(m, GRADIENTS);
    check_gradients(&r);
    check_balancing(&r);
    check_steps(&r);
}

static void test_golden(void) {
    for (EACH(i, golden_models))
        test_golden_model("golden", golden_models[i], of_floats);
}

static void test_golden_routers(void) {
    for (EACH(i, golden_routers))
        test_golden_model("golden_routers", golden_routers[i], of_floats);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

#include "dev/test/products.c" // what a Product is, and that its bits do not depend on how it is called

// All three products (the second with and without adding): fast, each element within the bound on rounding, (terms)
// 2^-24 of the magnitudes, of the sum in double; and every bit that of the plain loops of train_moe.c.
static int product_check(const Product* p, int grouped) {
    int ok = 1;
    for (int variant = 0; variant < 4; variant++) {
        int kind = variant % 3, add = variant == 3 || kind == BACKWARD_WEIGHT;
        if (variant == 3) kind = BACKWARD_INPUT;
        long n = product_size(p, kind);
        float *before = random_floats(n, 4), *out = copy_floats(before, n), *plain = copy_floats(before, n);
        product_run(p, kind, grouped, add, out);
        plain_products = 1;
        product_run(p, kind, grouped, add, plain);
        plain_products = PLAIN;
        int depth = kind == FORWARD ? p->C : kind == BACKWARD_INPUT ? p->OC : p->rows;
        ok &= same_floats(out, plain, n);
        for (long i = 0; i < n; i++) {
            double magnitude, sum = product_element(p, kind, i, add ? before[i] : 0, &magnitude);
            ok &= fabs(out[i] - sum) <= (depth + 2) * magnitude * 0x1p-24;
        }
    }
    return ok;
}

// Attention's products: both orders of each operand, rows that are further apart than they are long.
static void test_blocks(void) {
    static const int sizes[][3] = {{1, 1, 1}, {5, 7, 16}, {13, 33, 300}, {64, 100, 65}, {97, 31, 1}, {6, 64, 530}};
    for (EACH(s, sizes)) {
        int rows = sizes[s][0], columns = sizes[s][1], depth = sizes[s][2], same = 1;
        long gap = 3, n = (long)rows * (columns + gap);
        float* left = random_floats((rows + gap) * (depth + gap), 1);
        float* right = random_floats((depth + gap) * (columns + gap), 2);
        for (int order = 0; order < 8; order++) {
            float *out = random_floats(n, 3), *plain = copy_floats(out, n);
            long left_i = order & 1 ? 1 : depth + gap, left_k = order & 1 ? rows + gap : 1;
            long right_k = order & 2 ? 1 : columns + gap, right_j = order & 2 ? depth + gap : 1;
            for (int way = 0; way < 2; way++) {
                plain_products = way;
                multiply_block(way ? plain : out, columns + gap, left, left_i, left_k, right, right_k, right_j, rows,
                               columns, depth, order >> 2);
            }
            plain_products = PLAIN;
            same &= same_floats(out, plain, n);
        }
        check(same, "a block of %d x %d, %d terms: the plain loops' bits for all strides", rows, columns, depth);
    }
}

// Twenty steps of training with the plain loops end with the bytes of twenty with the fast products.
static void test_plain_training(void) {
    enum { B = 2, T = 37, STEPS = 20 };
    float* ends[2];
    long total = 0;
    for (int way = 0; way < 2; way++) {
        Config c;
        Error error = {""};
        if (!config_read(&c, "dev/reference/golden/qwen3_moe", &error)) die(1, "%s", error.text);
        Model* m = new_model(&c, FOR_TRAINING, B, T);
        AdamW adamw = {0.9, 0.95, 1e-8, 0.1, 1};
        int tokens[B * T + 1];
        plain_products = way;
        model_init(m, 1);
        for (int step = 0; step < STEPS; step++) {
            for (int i = 0; i <= B * T; i++) tokens[i] = (int)(mix64((uint64_t)(step * 99 + i)) % c.vocab_size);
            model_forward(m, tokens, tokens + 1, B, T);
            model_backward(m, 1);
            model_update(m, &adamw, 1e-3, step + 1);
        }
        plain_products = PLAIN;
        total = m->layout.total;
        ends[way] = kept_floats(3 * total);
        memcpy(ends[way], m->params, floats_bytes(total));
        memcpy(ends[way] + total, m->exp_avg, floats_bytes(total));
        memcpy(ends[way] + 2 * total, m->exp_avg_sq, floats_bytes(total));
    }
    check(same_floats(ends[0], ends[1], 3 * total), "20 steps with plain and fast products: same parameters, moments");
}

static void test_matmul_values(void) {
    static const int rows[] = {0, 1, 3, 8, 9, 13, 14, 15, 29, 530},
                     sizes[][2] = {{1, 1}, {5, 3}, {17, 33}, {64, 96}, {193, 47}};
    for (EACH(s, sizes)) {
        int C = sizes[s][0], OC = sizes[s][1], ok = 1;
        for (EACH(r, rows)) {
            Product p = product_create(1, &rows[r], C, OC);
            ok &= product_check(&p, 0);
        }
        check(ok, "three products, 0 to 530 rows, %d -> %d", C, OC);
    }
    static const int large[][3] = {{660, 530, 70}, {300, 70, 600}, {9, 320, 700}, {25, 320, 520},
                                   {300, 320, 8},  {300, 330, 8},  {125, 58, 290}, {125, 20, 290}, {6, 512, 40},
                                   {20, 40, 1024}}; // the last: rows of dy are 4 KB apart, which dW packs
    for (EACH(s, large)) {
        Product p = product_create(1, large[s], large[s][1], large[s][2]);
        check(product_check(&p, 0), "three products, %d rows, %d -> %d", large[s][0], large[s][1], large[s][2]);
    }
    static const int shares[][5] = {
        {0, 0, 0, 0, 0}, {0, 7, 0, 1, 40}, {13, 0, 0, 0, 0}, {3, 3, 3, 3, 3}, {0, 0, 0, 0, 101}};
    for (EACH(s, shares)) {
        Product p = product_create(5, shares[s], 19, 35);
        check(product_check(&p, 1), "grouped products, rows %d %d %d %d %d", shares[s][0],
              shares[s][1], shares[s][2], shares[s][3], shares[s][4]);
    }
}

static void test_matmul(void) {
    for (int way = 0; way < WAYS; way++) {
        use_way(way);
        printf("      products in %s\n", way_names[way]);
        test_matmul_values();
        test_blocks();
        test_plain_training();
        test_matmul_bits();
    }
    use_way(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Everything else, by subject
#include "dev/test/layers.c"
#include "dev/test/routers.c"
#include "dev/test/json.c"
#include "dev/test/config.c"
#include "dev/test/checkpoints.c"
#include "dev/test/generation.c"
#include "dev/test/data.c"
#include "dev/test/runs.c"
#include "dev/test/commands.c"
#include "dev/test/upcycle.h"
#include "dev/test/balance.c"
#include "dev/test/upcycle_methods.c"
#include "dev/test/upcycle_calibration.c"
#include "dev/test/upcycle_files.c"
#include "dev/test/qwen2.c"
#include "dev/test/terminal.c"
#include "dev/test/engines.c"
#include "dev/test/luggage.c"
#include "dev/test/growth.c"
#include "dev/test/shared.c"
#include "dev/test/loader.c"
#include "dev/test/tokenizer.c"
#include "dev/test/texts.c"
#ifdef TEST_GPU
#include "dev/test/gpu.c"
#endif
static const struct {
    const char* name;
    void (*run)(void);
} groups[] = {
#ifdef TEST_GPU
    {"gpu fp32", test_gpu_fp32}, {"gpu bf16", test_gpu_bf16}, {"gpu tiles", test_gpu_tiles},
    {"gpu devices", test_gpu_devices}, {"gpu cache", test_gpu_cache}, {"gpu training", test_gpu_training},
    {"gpu families", test_gpu_families}, {"gpu resume", test_gpu_resume}, {"gpu commands", test_gpu_commands},
#endif
    {"matmul", test_matmul}, {"gradients", test_gradients}, {"golden", test_golden}, {"routers", test_golden_routers},
    {"bf16", test_bf16},
    {"families", test_families}, {"load figures", test_load_figures}, {"experts", test_experts},
    {"cache", test_cache}, {"schedule", test_schedule}, {"json", test_json}, {"checkpoints", test_checkpoints},
    {"luggage", test_luggage}, {"tokenizer", test_tokenizer}, {"texts", test_texts},
    {"loader", test_loader}, {"data", test_data}, {"sampling", test_sampling},
    {"command line", test_command_line}, {"terminal", test_terminal}, {"determinism", test_determinism},
    {"balance", test_balance}, {"disk full", test_disk_full}, {"upcycle formats", test_up_formats},
    {"upcycle allocation", test_up_allocation}, {"upcycle algebra", test_up_algebra}, {"upcycle copy", test_up_copy},
    {"upcycle drop", test_up_drop}, {"upcycle shards", test_up_shards}, {"upcycle pieces", test_up_pieces},
    {"upcycle sources", test_up_sources}, {"upcycle twins", test_up_twins},
    {"upcycle operators", test_up_operators}, {"upcycle routers", test_up_routers},
    {"upcycle utility", test_up_utility}, {"upcycle optimizer", test_up_optimizer},
    {"upcycle pruning", test_up_pruning}, {"upcycle cluster", test_up_cluster}, {"upcycle files", test_up_files},
    {"upcycle merge", test_up_merge}, {"upcycle shared", test_up_shared}, {"upcycle safety", test_up_safety},
    {"upcycle LPR pruning", test_up_pruning_lpr}, {"upcycle records", test_up_records}, {"engines", test_engines},
    {"upcycle refusals", test_up_refusals}, {"upcycle receipt", test_up_receipt}, {"upcycle growth", test_up_growth},
    {"qwen2", test_qwen2}};

int main(int argc, char** argv) {
    if (argc > 1 && !strcmp(argv[1], "--as-train-moe")) {
        argv[1] = argv[0];
        return train_moe_main(argc - 1, argv + 1);
    }
#ifdef TEST_GPU
    if (argc > 1 && !strcmp(argv[1], "--as-train-moe-cu")) {
        argv[1] = argv[0];
        return train_moe_cu_main(argc - 1, argv + 1);
    }
#endif
    if (argc > 1 && !strcmp(argv[1], "--as-upcycle")) {
        argv[1] = argv[0];
        return upcycle_main(argc - 1, argv + 1);
    }
    make_temp_dir(argv[0]);
    default_threads = thread_count();
#ifdef TEST_GPU
    gpu_open();         // or ends here, in one line
#endif
    for (EACH(i, groups)) {
        group_name = groups[i].name;
        double start = seconds();
        int wanted = argc == 1;
        for (int k = 1; k < argc; k++) wanted |= strstr(group_name, argv[k]) != NULL;
        if (!wanted) continue;
        groups[i].run();
        release_kept();
        printf("      %s: %.1f s\n", group_name, seconds() - start);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
