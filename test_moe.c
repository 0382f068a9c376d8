/*
test_moe.c: every check of train_moe.c and upcycle.c. `make test` builds and runs it; it prints a line for each check,
ends with `N passed, N failed`, and its exit code says the same. `./test_moe WORD` runs only the groups whose name
contains WORD.

The program under test is included, so functions are called directly. Where a whole run of the command line is tested,
this program starts itself with `--as-train-moe` as its first argument and then behaves as ./train_moe does.

Compiled with -DTEST_GPU (make test_moe_cu, or dev/cuda/standin for machines without a GPU) it also includes
train_moe.cu, and has groups named "gpu ..." which check that against the references and against train_moe.c.
*/
#define UPCYCLE_NO_MAIN
#ifdef TEST_GPU
#define TRAIN_MOE_NO_MAIN
#include "train_moe.cu"
#endif
#include "upcycle.c"          // which includes train_moe.c

#include <ftw.h>
#include <sys/resource.h>
#include <sys/wait.h>

// ---------------------------------------------------------------------------------------------------------------------
// Harness

static int passed = 0, failed = 0;
static const char* group_name = "";
static int default_threads = 1;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
check(int ok, const char* format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s %s: ", ok ? "ok    " : "FAILED", group_name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    if (ok)
        passed++;
    else
        failed++;
}

// |a - b| / |b| in the 2-norm; where b is zero, a must be zero as well. A permuted or missing tensor gives about 1.
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

// The larger one, which is NaN if b is: a comparison with a tolerance then fails.
static double larger(double a, double b) { return b <= a ? a : b; }

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
// Files and programs

static char self_path[PATH_SIZE], temp_dir[PATH_SIZE];

// A path in the temporary directory, in one of a few buffers that take turns.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static const char*
temp(const char* format, ...) {
    static char buffers[16][512];
    static int next = 0;
    char* path = buffers[next++ % 16];
    int n = snprintf(path, sizeof buffers[0], "%.200s/", temp_dir);
    va_list args;
    va_start(args, format);
    vsnprintf(path + n, sizeof buffers[0] - (size_t)n, format, args);
    va_end(args);
    return path;
}

static int remove_entry(const char* path, const struct stat* st, int type, struct FTW* walk) {
    (void)st;
    (void)type;
    (void)walk;
    return remove(path);
}
static void remove_tree(const char* path) { nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }
static void remove_temp_dir(void) { remove_tree(temp_dir); }

static int exists(const char* path) { return !access(path, F_OK); }

static void write_bytes(const char* path, const void* data, size_t n) {
    FILE* f = fopen(path, "wb");
    if (!f || (n && fwrite(data, n, 1, f) != 1) || fclose(f)) die(1, "%s: %s", path, strerror(errno));
}
static void write_text(const char* path, const char* text) { write_bytes(path, text, strlen(text)); }

// The bytes of a file, to be freed, with a zero behind them; NULL if it is not there.
static char* read_bytes(const char* path, size_t* n) {
    Error error = {""};
    return read_file(path, (size_t)1 << 30, n, &error);
}

static int same_file(const char* a, const char* b) {
    size_t n = 0, k = 0;
    char *x = read_bytes(a, &n), *y = read_bytes(b, &k);
    int same = x && y && n == k && !memcmp(x, y, n);
    free(x);
    free(y);
    return same;
}

static void copy_file(const char* from, const char* to) {
    size_t n;
    char* data = read_bytes(from, &n);
    if (!data) die(1, "%s cannot be read", from);
    write_bytes(to, data, n);
    free(data);
}

static void copy_directory(const char* from, const char* to) {
    DIR* d = opendir(from);
    struct dirent* entry;
    if (!d || (mkdir(to, 0777) && errno != EEXIST)) die(1, "%s: %s", from, strerror(errno));
    while ((entry = readdir(d)) != NULL) {
        char source[PATH_SIZE], target[PATH_SIZE];
        struct stat st;
        join_path(source, from, entry->d_name);
        join_path(target, to, entry->d_name);
        if (!stat(source, &st) && S_ISREG(st.st_mode)) copy_file(source, target);
    }
    closedir(d);
}

static int count_lines(const char* path) {
    size_t n = 0;
    char* text = read_bytes(path, &n);
    int lines = 0;
    for (size_t i = 0; i < n; i++) lines += text[i] == '\n';
    free(text);
    return lines;
}

// a text that looks a little like language, so that there is something to learn
static void write_corpus(const char* path, long n) {
    static const char* words[] = {"the ", "expert ", "router ", "sends ", "tokens ",
                                  "to ",  "a ",      "layer. ", "and\n",  "again, "};
    Text text = {NULL, 0, 0};
    for (uint64_t i = 0; (long)text.length < n; i++) {
        const char* word = words[mix64(i) % 10];
        text_add(&text, word, strlen(word));
    }
    write_bytes(path, text.data, (size_t)n);
    free(text.data);
}

// A run of the program under test: exit code (or minus the signal that ended it) and what it printed.
typedef struct {
    int code;
    char out[32768], err[32768];
} Ran;

static Ran ran; // the last one

// Starts it with arguments that are separated by single spaces. file_limit > 0: no file may grow beyond so many bytes.
static pid_t start_program(const char* arguments, long file_limit) {
    char *copy = copy_string(arguments), *rest = copy, *word, *argv[96];
    int argc = 0;
    argv[argc++] = self_path;
    argv[argc++] = (char*)(default_backend == &cpu_backend ? "--as-train-moe" : "--as-train-moe-cu");
    while ((word = strsep(&rest, " ")) != NULL && argc < 95)
        if (*word) argv[argc++] = word;
    argv[argc] = NULL;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(300); // a test that hangs should fail
        setenv("OMP_WAIT_POLICY", "passive", 1); // more threads than cores should not wait by turning round
        if (file_limit > 0) {
            struct rlimit limit = {(rlim_t)file_limit, (rlim_t)file_limit};
            signal(SIGXFSZ, SIG_IGN); // the write fails instead
            setrlimit(RLIMIT_FSIZE, &limit);
        }
        if (!freopen(temp("stdout"), "w", stdout) || !freopen(temp("stderr"), "w", stderr)) _exit(99);
        execv(self_path, argv);
        _exit(99);
    }
    free(copy);
    if (pid < 0) die(1, "fork: %s", strerror(errno));
    return pid;
}

static void read_output(const char* name, char* buffer, size_t size) {
    size_t n = 0;
    char* text = read_bytes(temp("%s", name), &n);
    snprintf(buffer, size, "%s", text ? text : "");
    if (*buffer && buffer[strlen(buffer) - 1] == '\n') buffer[strlen(buffer) - 1] = 0;
    free(text);
}

static int finish_program(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    read_output("stdout", ran.out, sizeof ran.out);
    read_output("stderr", ran.err, sizeof ran.err);
    return ran.code;
}

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static int
run_program(const char* format, ...) {
    char arguments[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    return finish_program(start_program(arguments, 0));
}

// the lines on stderr that are not the progress of training
static int error_lines(void) {
    int lines = 0;
    for (const char* s = ran.err; *s; s = strchr(s, '\n') ? strchr(s, '\n') + 1 : s + strlen(s))
        lines += strncmp(s, "step ", 5) != 0 || strstr(s, "could not") == s;
    return lines;
}

// ends a failed check's output with what the program said
static void show_failure(int ok) {
    if (!ok) printf("       exit code %d, stderr: %.600s\n", ran.code, ran.err);
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// memory of exactly n floats, so that a sanitizer or valgrind sees every access outside
static float* random_floats(long n, uint64_t key) {
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)n);
    fill_random(x, n, key);
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Against transformers in fp64 (dev/reference/make_references.py)

static const char* golden_models[] = {
    "llama",      "llama_tied", "mistral",   "mixtral",       "mixtral_top1",       "olmoe",
    "olmoe_norm", "qwen3",      "qwen3_moe", "qwen3_moe_all", "qwen3_moe_mlp_only", "qwen3_moe_top1",
    "dots1"};
static const char* golden_routers[] = {"sigmoid",
                                       "sigmoid_top1",
                                       "lpr",
                                       "lpr_mean",
                                       "logit_norm",
                                       "aux_hf",
                                       "matryoshka",
                                       "family",
                                       "family_aux",
                                       "family_inf",
                                       "family_sigmoid",
                                       "family_sigmoid_inf",
                                       "family_twins",
                                       "family_twins_sigmoid"};

static Model* open_model(const char* dir, Purpose purpose, int B, int T) {
    Config c;
    Error error = {""};
    if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
    Model* m = model_create(&c, purpose, B, T, T, NULL);
    if (!checkpoint_load(m, dir, &error)) die(1, "%s", error.text);
    return m;
}

// How far results may be from the reference: of each group the largest error.
typedef struct {
    double logits, losses, gates, gradients, steps, norms; // absolute, relative, absolute, relative, absolute, rel.
    // Share of a layer's tokens that may go to other experts. Where some do, their logits and the gradients are others,
    // too, and only the losses are compared.
    double other_choices;
} Tolerances;
static const Tolerances of_floats = {1e-5, 1e-5, 1e-6, 1e-5, 1e-4, 1e-3, 0};

// tokens of layer l that each expert got in the last pass
static void count_choices(long* counts, const Model* m, int l) {
    memset(counts, 0, sizeof(long) * (size_t)m->config.num_experts);
    for (int i = 0; i < m->batch * m->length * m->topk[l]; i++) counts[m->layers[l].experts[i]]++;
}

static void test_golden_model(const char* folder, const char* name, Tolerances most) {
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
    m->config.family_penalty = 0; // the families are in the reference and not in an upcycle.json
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
        if (ks && c->sparse[l]) m->topk[l] = atoi(ks->string + 2 * at++); // "3,1"
    }
    m->balance.aux = (float)metadata_number(s, "aux");
    m->balance.z = (float)metadata_number(s, "z_loss");
    m->balance.aux_form = metadata_is(s, "aux_form", "hf") ? AUX_HF : AUX_SWITCH;
    const Backend* on = m->backend;
    on->send(m, PARAMETERS);
    on->forward(m, tokens, targets, B, T);
    on->read_back(m, LOGITS | ROUTING);
    Losses sums = take_losses(m);

    static const char* losses[] = {"loss", "aux_loss", "z_loss", "lpr_loss"};
    for (int i = 0; i < 4; i++) {
        if (!safetensors_find(s, losses[i])) continue; // transformers defines no aux loss for Dots1
        float* expected = reference_floats(s, losses[i], NULL);
        double got = i == 0 ? sums.loss : i == 1 ? sums.aux : i == 2 ? sums.z : sums.lpr;
        check(fabs(got - expected[0]) <= most.losses * (1 + fabs(expected[0])), "%s: %s %.7f, expected %.7f", name,
              losses[i], got, expected[0]);
        free(expected);
    }
    int all_others = 0;
    for (int l = 0; l < c->num_layers; l++) {
        if (!c->sparse[l]) continue;
        char tensor[64];
        snprintf(tensor, sizeof tensor, "router.%d", l);
        int *experts = reference_ints(s, tensor, shape), others = 0, K = m->topk[l];
        check(shape[0] == N && shape[1] == K, "%s: layer %d: %d experts a token", name, l, K);
        snprintf(tensor, sizeof tensor, "gate.%d", l);
        float* gates = reference_floats(s, tensor, &n);
        double worst_gate = 0;
        for (int i = 0; i < N; i++) {
            int same = !memcmp(experts + i * K, m->layers[l].experts + i * K, sizeof(int) * (size_t)K);
            if (same) worst_gate = larger(worst_gate, max_error(m->layers[l].gates + i * K, gates + i * K, K));
            others += !same;
        }
        check(others <= most.other_choices * N, "%s: layer %d: chosen experts, %d of %d tokens differ", name, l, others,
              N);
        all_others += others;
        check(worst_gate <= most.gates || all_others > 0, "%s: layer %d: gates, largest error %.1e", name, l,
              worst_gate);
        free(experts);
        free(gates);
    }

    float* logits = reference_floats(s, "logits", &n);
    double e = max_error(m->logits, logits, n);
    check(n == (long)N * c->vocab_size && (e <= most.logits || all_others > 0), "%s: logits, largest error %.1e", name,
          e);
    free(logits);

    on->backward(m, 1);
    on->read_back(m, GRADIENTS);
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
        if (!(e < worst)) {
            worst = e;
            worst_name = t->name;
        }
        free(expected);
    }
    check(worst <= most.gradients || all_others > 0, "%s: %d gradients, largest relative error %.1e (%s)", name,
          m->layout.count, worst, worst_name);

    for (int l = 0; l < c->num_layers; l++) {
        char tensor[64];
        snprintf(tensor, sizeof tensor, "bias_after.%d", l);
        if (!safetensors_find(s, tensor)) continue;
        float *expected = reference_floats(s, tensor, &n), *bias = m->weights.layers[l].router_bias;
        long counts[64];
        count_choices(counts, m, l);
        update_router_bias(bias, counts, (int)n, metadata_number(s, "bias_rate"));
        check(max_error(bias, expected, n) <= 1e-7, "%s: layer %d: the bias after a step", name, l);
        free(expected);
    }
    if (safetensors_find(s, "aux_adaptive_after")) {
        float* expected = reference_floats(s, "aux_adaptive_after", &n);
        for (int l = 0, at = 0; l < c->num_layers; l++) {
            long counts[64];
            if (!c->sparse[l]) continue;
            count_choices(counts, m, l);
            double after = adapted_aux(metadata_number(s, "aux_alpha"), counts, c->num_experts);
            check(fabs(after / expected[at++] - 1) <= 1e-6, "%s: layer %d: the adapted balance coefficient", name, l);
        }
        free(expected);
    }

    if (safetensors_find(s, "adamw.losses")) {
        float *expected = reference_floats(s, "adamw.losses", &n),
              *norms = reference_floats(s, "adamw.grad_norms", NULL);
        AdamW o = {metadata_number(s, "beta1"), metadata_number(s, "beta2"), metadata_number(s, "eps"),
                   metadata_number(s, "weight_decay"), metadata_number(s, "clip")};
        double norm_error = 0;
        worst = 0;
        on->update(m, &o, 0, 1);        // clears the gradients, and changes nothing but the moments,
        memset(m->exp_avg, 0, sizeof(float) * (size_t)m->layout.total);
        memset(m->exp_avg_sq, 0, sizeof(float) * (size_t)m->layout.total);
        on->send(m, PARAMETERS | MOMENTS);      // which are cleared, too
        for (int step = 0; step < n; step++) {
            on->forward(m, tokens, targets, B, T);
            on->backward(m, 1);
            double norm = on->update(m, &o, metadata_number(s, "lr"), step + 1), loss = take_losses(m).loss;
            worst = larger(worst, fabs(loss - expected[step]));
            norm_error = larger(norm_error, fabs(norm / norms[step] - 1));
        }
        check(n == 10 && worst <= most.steps, "%s: %ld AdamW steps, largest error of the loss %.1e", name, n, worst);
        check(norm_error <= most.norms, "%s: gradient norms on the way, largest relative error %.1e", name, norm_error);
        free(expected);
        free(norms);
    }
    free(tokens);
    free(targets);
    safetensors_close(s);
    model_free(m);
}

static void test_golden(void) {
    for (size_t i = 0; i < sizeof golden_models / sizeof golden_models[0]; i++)
        test_golden_model("golden", golden_models[i], of_floats);
}

static void test_golden_routers(void) {
    for (size_t i = 0; i < sizeof golden_routers / sizeof golden_routers[0]; i++)
        test_golden_model("golden_routers", golden_routers[i], of_floats);
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
            check(worst <= (c.router == ROUTER_SIGMOID ? 0 : 1e-6),
                  "%s: %d copies of each expert, K = 1 to %d, renormalised or not: relative error %.1e%s",
                  models[i].name, copies, E, worst, same ? ", bit for bit" : "");
            check(together == 0 && used,
                  "%s: %d copies: never two of one family, and each copy sees tokens (%d, %d, %d)", models[i].name,
                  copies, places[0], places[1], places[2]);
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
// Matrix products

typedef struct {
    int E, C, OC, rows, *offsets; // `rows` of all experts together
    float *x, *W, *dy; // (rows, C), (E, OC, C), (rows, OC)
} Product;

static Product product_create(int E, const int* rows, int C, int OC) {
    Product p = {E, C, OC, 0, (int*)checked_malloc(sizeof(int) * (size_t)(E + 1)), NULL, NULL, NULL};
    p.offsets[0] = 0;
    for (int e = 0; e < E; e++) p.offsets[e + 1] = p.offsets[e] + rows[e];
    p.rows = p.offsets[E];
    p.x = random_floats((long)p.rows * C, 1);
    p.W = random_floats((long)E * OC * C, 2);
    p.dy = random_floats((long)p.rows * OC, 3);
    return p;
}

static void product_free(Product* p) {
    free(p->offsets);
    free(p->x);
    free(p->W);
    free(p->dy);
}

static long product_size(const Product* p, int kind) {
    return kind == FORWARD          ? (long)p->rows * p->OC
           : kind == BACKWARD_INPUT ? (long)p->rows * p->C
                                    : (long)p->E * p->OC * p->C;
}

// grouped = 0 calls the product for one weight matrix (E = 1)
static void product_run(const Product* p, int kind, int grouped, int add, float* out) {
    int C = p->C, OC = p->OC, E = p->E;
    long stride = (long)OC * C;
    if (kind == FORWARD && grouped)
        grouped_matmul_forward(out, p->x, p->W, stride, C, OC, E, p->offsets);
    else if (kind == FORWARD)
        matmul_forward(out, p->x, p->W, p->rows, C, OC);
    else if (kind == BACKWARD_INPUT && grouped)
        grouped_matmul_backward_input(out, p->dy, p->W, stride, C, OC, E, p->offsets, add);
    else if (kind == BACKWARD_INPUT)
        matmul_backward_input(out, p->dy, p->W, p->rows, C, OC, add);
    else if (grouped)
        grouped_matmul_backward_weight(out, p->dy, p->x, stride, C, OC, E, p->offsets);
    else
        matmul_backward_weight(out, p->dy, p->x, p->rows, C, OC);
}

// Element i of the result that `start` becomes, in double, and the sum of the magnitudes that went into it. `ordered`
// gets the same sum in float, in the order that train_moe.c promises: with one rounding a step (fused) or two.
static double product_element(const Product* p, int kind, long i, float start, int fused, double* magnitude,
                              float* ordered) {
    int C = p->C, OC = p->OC, E = p->E, e = 0, depth;
    const float *left, *right;
    long left_step, right_step;
    if (kind == BACKWARD_WEIGHT) {
        e = (int)(i / ((long)OC * C));
        left = p->dy + (long)p->offsets[e] * OC + i / C % OC;
        right = p->x + (long)p->offsets[e] * C + i % C;
        left_step = OC;
        right_step = C;
        depth = p->offsets[e + 1] - p->offsets[e];
    } else {
        int columns = kind == FORWARD ? OC : C, row = (int)(i / columns), column = (int)(i % columns);
        while (e < E - 1 && row >= p->offsets[e + 1]) e++;
        const float* W = p->W + (long)e * OC * C;
        left = kind == FORWARD ? p->x + (long)row * C : p->dy + (long)row * OC;
        right = kind == FORWARD ? W + (long)column * C : W + column;
        left_step = 1;
        right_step = kind == FORWARD ? 1 : C;
        depth = kind == FORWARD ? C : OC;
    }
    double sum = start;
    volatile float s = start; // volatile: rounded to a float after each operation
    *magnitude = fabs((double)start);
    for (int k = 0; k < depth; k++) {
        float a = left[k * left_step], b = right[k * right_step];
        sum += (double)a * b;
        *magnitude += fabs((double)a * b);
        if (fused)
            s = fmaf(a, b, s);
        else {
            volatile float product = a * b;
            s = s + product;
        }
    }
    *ordered = s;
    return sum;
}

// Checks every element of all three products (the second with and without adding). Returns 0 if one is outside the
// bound on rounding, (terms) 2^-24 of the magnitudes; *unfused and *fused stay 1 while all bits are the plain loop's.
static int product_check(const Product* p, int grouped, int* unfused, int* fused) {
    int ok = 1;
    for (int variant = 0; variant < 4; variant++) {
        int kind = variant % 3, add = variant == 3 || kind == BACKWARD_WEIGHT;
        if (variant == 3) kind = BACKWARD_INPUT;
        long n = product_size(p, kind);
        float *before = random_floats(n, 4), *out = (float*)checked_malloc(sizeof(float) * (size_t)n), ordered;
        memcpy(out, before, sizeof(float) * (size_t)n);
        product_run(p, kind, grouped, add, out);
        int depth = kind == FORWARD ? p->C : kind == BACKWARD_INPUT ? p->OC : p->rows;
        for (long i = 0; i < n; i++) {
            double magnitude, sum = product_element(p, kind, i, add ? before[i] : 0, 0, &magnitude, &ordered);
            if (!(fabs(out[i] - sum) <= (depth + 2) * magnitude * 0x1p-24)) ok = 0;
            *unfused &= ordered == out[i];
            product_element(p, kind, i, add ? before[i] : 0, 1, &magnitude, &ordered);
            *fused &= ordered == out[i];
        }
        free(before);
        free(out);
    }
    return ok;
}

static void test_matmul_values(void) {
    static const int rows[] = {0, 1, 3, 8, 9, 13, 14, 15, 29, 530},
                     sizes[][2] = {{1, 1}, {5, 3}, {17, 33}, {64, 96}, {193, 47}};
    int unfused = 1, fused = 1;
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        int C = sizes[s][0], OC = sizes[s][1], ok = 1;
        for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
            Product p = product_create(1, &rows[r], C, OC);
            ok &= product_check(&p, 0, &unfused, &fused);
            product_free(&p);
        }
        check(ok, "three products, 0 to 530 rows, %d -> %d", C, OC);
    }
    static const int large[][3] = {{660, 530, 70}, {300, 70, 600}, {9, 320, 700}, {25, 320, 520},
                                   {300, 320, 8},  {300, 330, 8},  {125, 58, 290}, {125, 20, 290}, {6, 512, 40},
                                   {20, 40, 1024}}; // the last: rows of dy are 4 KB apart, which dW packs
    for (size_t s = 0; s < sizeof large / sizeof large[0]; s++) {
        Product p = product_create(1, large[s], large[s][1], large[s][2]);
        check(product_check(&p, 0, &unfused, &fused), "three products, %d rows, %d -> %d", large[s][0], large[s][1],
              large[s][2]);
        product_free(&p);
    }
    static const int shares[][5] = {
        {0, 0, 0, 0, 0}, {0, 7, 0, 1, 40}, {13, 0, 0, 0, 0}, {3, 3, 3, 3, 3}, {0, 0, 0, 0, 101}};
    for (size_t s = 0; s < sizeof shares / sizeof shares[0]; s++) {
        Product p = product_create(5, shares[s], 19, 35);
        check(product_check(&p, 1, &unfused, &fused), "grouped products, rows %d %d %d %d %d", shares[s][0],
              shares[s][1], shares[s][2], shares[s][3], shares[s][4]);
        product_free(&p);
    }
    check(unfused || fused, "every bit is that of the plain loop over k, %s", fused ? "fused" : "two roundings a step");
}

static void test_matmul_bits(void) {
    static const int rows[] = {61}, shares[] = {9, 0, 23, 1, 30};
    int E = 5, C = 205, OC = 77;
    Product p = product_create(1, rows, C, OC), g = product_create(E, shares, C, OC);
    float *y = random_floats(61L * OC, 0), *one = random_floats(61L * OC, 0);
    memcpy(p.W + 50L * C, p.W + 3L * C, sizeof(float) * (size_t)C); // twins
    memcpy(p.W + 76L * C, p.W + 3L * C, sizeof(float) * (size_t)C);
    matmul_forward(y, p.x, p.W, 61, C, OC);
    int same = 1;
    for (int r = 0; r < 61; r++) same &= y[r * OC + 3] == y[r * OC + 50] && y[r * OC + 3] == y[r * OC + 76];
    check(same, "equal rows of weights give equal bits, wherever they stand");
    for (int count = 1; count < 20; count++) {
        same = 1;
        for (int r = 0; r + count <= 61; r += count) {
            matmul_forward(one, p.x + (long)r * C, p.W, count, C, OC);
            same &= !memcmp(one, y + (long)r * OC, sizeof(float) * (size_t)(count * OC));
        }
        if (count <= 3 || count == 8 || count == 9 || count == 19 || !same)
            check(same, "%d rows alone have the bits of 61 rows", count);
    }
    for (int kind = 0; kind < 3; kind++) {
        static const char* names[] = {"forward", "backward input", "backward weight"};
        long n = product_size(&g, kind);
        float *all = random_floats(n, 5), *single = random_floats(n, 5), *threads = NULL;
        product_run(&g, kind, 1, 1, all);
        for (int e = 0; e < E; e++) {
            int m = shares[e];
            float *x = g.x + (long)g.offsets[e] * C, *dy = g.dy + (long)g.offsets[e] * OC, *W = g.W + (long)e * OC * C;
            if (kind == FORWARD) matmul_forward(single + (long)g.offsets[e] * OC, x, W, m, C, OC);
            if (kind == BACKWARD_INPUT) matmul_backward_input(single + (long)g.offsets[e] * C, dy, W, m, C, OC, 1);
            if (kind == BACKWARD_WEIGHT) matmul_backward_weight(single + (long)e * OC * C, dy, x, m, C, OC);
        }
        check(!memcmp(all, single, sizeof(float) * (size_t)n), "%s: grouped has the bits of one call for each expert",
              names[kind]);
        same = 1;
        static const int counts[] = {1, 2, 3, 8};
        for (int i = 0; i < 4; i++) {
            set_threads(counts[i]);
            threads = random_floats(n, 5);
            product_run(&g, kind, 1, 1, threads);
            same &= !memcmp(all, threads, sizeof(float) * (size_t)n);
            free(threads);
        }
        check(same, "%s: 1, 2, 3 and 8 threads have equal bits", names[kind]);
        threads = random_floats(n, 5);
        #pragma omp parallel
        #pragma omp single
        product_run(&g, kind, 1, 1, threads); // a parallel region within another one gets a single thread
        check(!memcmp(all, threads, sizeof(float) * (size_t)n), "%s: one thread where 8 were expected", names[kind]);
        free(threads);
        set_threads(default_threads);
        free(all);
        free(single);
    }
    free(y);
    free(one);
    product_free(&p);
    product_free(&g);
}

static void test_matmul(void) {
    test_matmul_values();
    test_matmul_bits();
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers against plain formulas in double, and their gradients against numeric differences of those formulas

typedef double (*Function)(const double* x, const void* context);

// central difference of f at x in direction i; f is evaluated in double, so that a small step is exact enough
static double numeric_derivative(Function f, double* x, long i, const void* context) {
    double h = 1e-5, kept = x[i];
    x[i] = kept + h;
    double up = f(x, context);
    x[i] = kept - h;
    double down = f(x, context);
    x[i] = kept;
    return (up - down) / (2 * h);
}

static double* to_double(const float* x, long n) {
    double* out = (double*)checked_malloc(sizeof(double) * (size_t)n);
    for (long i = 0; i < n; i++) out[i] = x[i];
    return out;
}

// largest |got - numeric derivative| over every step-th of n inputs, relative to the largest derivative
static double gradient_error(Function f, const float* x, const float* got, long n, long step, const void* context) {
    double *point = to_double(x, n), worst = 0, scale = 1e-30;
    for (long i = 0; i < n; i += step) {
        double expected = numeric_derivative(f, point, i, context), error = fabs(got[i] - expected);
        if (!(error <= worst)) worst = error;
        scale = fmax(scale, fabs(expected));
    }
    free(point);
    return worst / scale;
}

// RMSNorm. The inputs are x (N, groups, size), then weight (size); the value is <out, dout>.
typedef struct {
    int N, groups, size;
    const float* dout;
    double* out;
} NormContext;

static double norm_plain(const double* x, const void* context) {
    const NormContext* c = (const NormContext*)context;
    const double* weight = x + (long)c->N * c->groups * c->size;
    double value = 0;
    for (int v = 0; v < c->N * c->groups; v++) {
        double mean = 0;
        for (int i = 0; i < c->size; i++) mean += x[(long)v * c->size + i] * x[(long)v * c->size + i] / c->size;
        for (int i = 0; i < c->size; i++) {
            double out = weight[i] * x[(long)v * c->size + i] / sqrt(mean + 1e-5);
            if (c->out) c->out[(long)v * c->size + i] = out;
            value += out * c->dout[(long)v * c->size + i];
        }
    }
    return value;
}

static void test_rmsnorm(int groups, int size) {
    int N = RMSNORM_ROWS + 3, gap = 3; // two blocks of rows; rows of x are further apart than they are long
    long row = (long)groups * size, ld = row + gap, n = N * row;
    float *inputs = random_floats(n + size, 10), *x = random_floats(N * ld, 0), *out = random_floats(n, 0),
          *rstd = random_floats(N * groups, 0);
    float *dout = random_floats(n, 11), *gradient = random_floats(n + size, 12), *dx = random_floats(N * ld, 13),
          *weight = inputs + n;
    NormContext c = {N, groups, size, dout, (double*)checked_malloc(sizeof(double) * (size_t)n)};
    for (int r = 0; r < N; r++) memcpy(x + r * ld, inputs + r * row, sizeof(float) * (size_t)row);
    rmsnorm_forward(out, row, rstd, x, ld, weight, N, groups, size, 1e-5f);
    double *point = to_double(inputs, n + size), worst = 0;
    norm_plain(point, &c);
    for (long i = 0; i < n; i++) worst = fmax(worst, fabs(out[i] - c.out[i]));
    check(worst < 2e-6, "rmsnorm, %d groups of %d: forward, error %.1e", groups, size, worst);
    free(c.out);
    c.out = NULL;
    float *kept = random_floats(N * ld, 13), *sums = random_floats(rmsnorm_sums_size(N, size), 14);
    memset(gradient, 0, sizeof(float) * (size_t)(n + size));
    rmsnorm_backward(dx, ld, 1, gradient + n, dout, row, x, ld, weight, rstd, N, groups, size, sums);
    for (int r = 0; r < N; r++)
        for (long i = 0; i < row; i++) gradient[r * row + i] = dx[r * ld + i] - kept[r * ld + i];
    worst = gradient_error(norm_plain, inputs, gradient, n + size, 1, &c);
    check(worst < 2e-6, "rmsnorm, %d groups of %d: gradients, added to what was there, error %.1e", groups, size,
          worst);
    memset(gradient + n, 0, sizeof(float) * (size_t)size);
    rmsnorm_backward(gradient, row, 0, gradient + n, dout, row, inputs, row, weight, rstd, N, groups, size, sums);
    worst = gradient_error(norm_plain, inputs, gradient, n + size, 1, &c);
    check(worst < 2e-6, "rmsnorm, %d groups of %d: gradients, overwriting, error %.1e", groups, size, worst);
    free(inputs);
    free(x);
    free(out);
    free(rstd);
    free(dout);
    free(gradient);
    free(dx);
    free(kept);
    free(sums);
    free(point);
}

static void test_rope(void) {
    int B = 2, T = 11, heads = 3, HD = 10, start = 5, N = B * T;
    long ld = heads * HD + 4;
    float *x = random_floats(N * ld, 20), *y = random_floats(N * ld, 20), *cosines = random_floats(40 * 5, 0),
          *sines = random_floats(40 * 5, 0);
    rope_table(cosines, sines, 40, HD, 500.0);
    rope(y, ld, heads, N, T, start, HD, cosines, sines, 1);
    double worst = 0, back = 0, norm = 0, dot = 0;
    for (int n = 0; n < N; n++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < HD; i++) { // rotate_half: out = x cos + (-x2, x1) sin
                const float* v = x + n * ld + h * HD;
                double angle = (start + n % T) / pow(500.0, 2.0 * (i % 5) / HD);
                double half = i < 5 ? -v[i + 5] : v[i - 5];
                worst = fmax(worst, fabs(y[n * ld + h * HD + i] - (v[i] * cos(angle) + half * sin(angle))));
            }
    check(worst < 1e-6, "rope: rotate_half at positions from %d on, error %.1e", start, worst);
    int outside = 1;
    for (int n = 0; n < N; n++) outside &= !memcmp(x + n * ld + heads * HD, y + n * ld + heads * HD, sizeof(float) * 4);
    check(outside, "rope: leaves what stands between the rows alone");
    // a rotation's gradient is its transpose: <rope(x), g> = <x, rope'(g)>
    float *g = random_floats(N * ld, 21), *dx = random_floats(N * ld, 21);
    rope(dx, ld, heads, N, T, start, HD, cosines, sines, -1);
    for (int n = 0; n < N; n++)
        for (int i = 0; i < heads * HD; i++) {
            dot += (double)y[n * ld + i] * g[n * ld + i];
            back += (double)x[n * ld + i] * dx[n * ld + i];
            norm += fabs((double)y[n * ld + i] * g[n * ld + i]);
        }
    check(fabs(dot - back) < 1e-6 * norm, "rope: backward is the transpose");
    free(x);
    free(y);
    free(cosines);
    free(sines);
    free(g);
    free(dx);
}

// SwiGLU and its gate. Inputs: gate_up (rows, 2, I), then one gate for each row; value: <gate act, dact>.
typedef struct {
    int rows, I;
    const float* dact;
} SwigluContext;

static double swiglu_plain(const double* x, const void* context) {
    const SwigluContext* c = (const SwigluContext*)context;
    double value = 0;
    for (int r = 0; r < c->rows; r++)
        for (int i = 0; i < c->I; i++) {
            double g = x[(long)r * 2 * c->I + i], u = x[(long)r * 2 * c->I + c->I + i];
            value += x[(long)c->rows * 2 * c->I + r] * g / (1 + exp(-g)) * u * c->dact[(long)r * c->I + i];
        }
    return value;
}

static void test_swiglu(void) {
    int rows = 6, I = 13, assignment[] = {3, 0, 5, 1, 4, 2};
    long n = (long)rows * 2 * I;
    float *inputs = random_floats(n + rows, 30), *act = random_floats(rows * I, 0), *gated = random_floats(rows * I, 0);
    float *dact = random_floats(rows * I, 31), *gradient = random_floats(n + rows, 0), gates[6], dgates[6];
    for (long i = 0; i < n; i++) inputs[i] *= 8; // far out, where sigmoid saturates, as well
    for (int r = 0; r < rows; r++) gates[assignment[r]] = inputs[n + r];
    swiglu_forward(act, inputs, rows, I);
    double worst = 0;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < I; i++) {
            double g = inputs[(long)r * 2 * I + i], u = inputs[(long)r * 2 * I + I + i];
            worst = fmax(worst, fabs(act[r * I + i] - g / (1 + exp(-g)) * u));
        }
    check(worst < 1e-5, "swiglu: forward, error %.1e of values up to 64", worst);
    SwigluContext c = {rows, I, dact};
    swiglu_backward(gradient, gated, dgates, dact, inputs, gates, assignment, rows, I);
    for (int r = 0; r < rows; r++) gradient[n + r] = dgates[assignment[r]];
    worst = gradient_error(swiglu_plain, inputs, gradient, n + rows, 1, &c);
    check(worst < 2e-6, "swiglu: gradients of gate_up and of the experts' gates, error %.1e", worst);
    worst = 0;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < I; i++)
            worst = fmax(worst, fabs(gated[r * I + i] - (double)gates[assignment[r]] * act[r * I + i]));
    check(worst < 1e-5, "swiglu: backward makes gate * act again, error %.1e", worst);
    swiglu_backward(inputs, gated, dgates, dact, inputs, gates, assignment, rows, I);
    check(!memcmp(inputs, gradient, sizeof(float) * (size_t)n), "swiglu: backward in place has the same bits");
    free(inputs);
    free(act);
    free(gated);
    free(dact);
    free(gradient);
}

typedef struct {
    int N, V;
    const int* targets;
} EntropyContext;

static double entropy_plain(const double* x, const void* context) {
    const EntropyContext* c = (const EntropyContext*)context;
    double value = 0;
    for (int n = 0; n < c->N; n++) {
        double sum = 0;
        for (int v = 0; v < c->V; v++) sum += exp(x[(long)n * c->V + v]);
        value += (log(sum) - x[(long)n * c->V + c->targets[n]]) / c->N;
    }
    return value;
}

static void test_cross_entropy(void) {
    int N = 9, V = 37, targets[9];
    float *logits = random_floats(N * V, 40), *gradient = random_floats(N * V, 40), losses[9], lse[9], sum = 0;
    for (int n = 0; n < N; n++) targets[n] = (n * 11) % V;
    for (int i = 0; i < N * V; i++) logits[i] = gradient[i] = 6 * logits[i];
    EntropyContext c = {N, V, targets};
    double *point = to_double(logits, N * V), expected = entropy_plain(point, &c);
    cross_entropy_forward(losses, lse, logits, targets, N, V);
    for (int n = 0; n < N; n++) sum += losses[n] / N;
    check(fabs(sum - expected) < 2e-6, "cross-entropy: forward, error %.1e", fabs(sum - expected));
    cross_entropy_backward(gradient, lse, targets, N, V, 1.0f / N);
    double worst = gradient_error(entropy_plain, logits, gradient, N * V, 1, &c);
    check(worst < 2e-6, "cross-entropy: gradient, error %.1e", worst);
    for (int i = 0; i < N * V; i++) logits[i] = i % V == 3 ? 1000.0f : -1000.0f * (float)(i % 5);
    cross_entropy_forward(losses, lse, logits, targets, N, V);
    check(losses[0] == 1000 && isfinite(losses[4]) && lse[0] == 1000, "cross-entropy: logits of 1000 do not overflow");
    free(logits);
    free(gradient);
    free(point);
}

// Attention. Inputs: q (B, T, NH, HD), k, v (B, T, NKV, HD) one behind the other; value: <out, dout>.
typedef struct {
    int B, T, NH, NKV, HD;
    const float* dout;
    double *out, *lse;
} AttentionContext;

static double attention_plain(const double* x, const void* context) {
    const AttentionContext* c = (const AttentionContext*)context;
    int T = c->T, HD = c->HD;
    long nq = (long)c->B * T * c->NH * HD, nk = (long)c->B * T * c->NKV * HD;
    double value = 0, *p = (double*)checked_malloc(sizeof(double) * (size_t)T);
    for (int b = 0; b < c->B; b++)
        for (int h = 0; h < c->NH; h++)
            for (int i = 0; i < T; i++) {
                int kv = h * c->NKV / c->NH;
                const double* q = x + (((long)b * T + i) * c->NH + h) * HD;
                double sum = 0;
                for (int j = 0; j <= i; j++) {
                    const double* k = x + nq + (((long)b * T + j) * c->NKV + kv) * HD;
                    p[j] = 0;
                    for (int d = 0; d < HD; d++) p[j] += q[d] * k[d] / sqrt(HD);
                    sum += p[j] = exp(p[j]);
                }
                if (c->lse) c->lse[((long)b * c->NH + h) * T + i] = log(sum);
                for (int d = 0; d < HD; d++) {
                    double out = 0;
                    for (int j = 0; j <= i; j++)
                        out += p[j] / sum * x[nq + nk + (((long)b * T + j) * c->NKV + kv) * HD + d];
                    long at = (((long)b * T + i) * c->NH + h) * HD + d;
                    if (c->out) c->out[at] = out;
                    value += out * c->dout[at];
                }
            }
    free(p);
    return value;
}

static void test_attention(int B, int T, int NH, int NKV, int HD) {
    long nq = (long)B * T * NH * HD, nk = (long)B * T * NKV * HD, n = nq + 2 * nk, QK = (NH + NKV) * HD + 2,
         QKV = (NH + 2 * NKV) * HD;
    int N = B * T;
    float *inputs = random_floats(n, 50), *qk = random_floats(N * QK, 0), *qkv = random_floats(N * QKV, 0),
          *gradient = random_floats(n, 0);
    float *out = random_floats(nq, 0), *lse = random_floats((long)B * NH * T, 0), *dout = random_floats(nq, 51);
    float *dqk = random_floats(N * QK, 52), *dqkv = random_floats(N * QKV, 53),
          *scratch = random_floats(attention_scratch_size(T), 54);
    for (long i = 0; i < n; i++) inputs[i] *= 3;
    for (int t = 0; t < N; t++) { // as in the model: queries and keys in one array, values in another
        memcpy(qk + t * QK, inputs + (long)t * NH * HD, sizeof(float) * (size_t)(NH * HD));
        memcpy(qk + t * QK + NH * HD, inputs + nq + (long)t * NKV * HD, sizeof(float) * (size_t)(NKV * HD));
        memcpy(qkv + t * QKV + (NH + NKV) * HD, inputs + nq + nk + (long)t * NKV * HD,
               sizeof(float) * (size_t)(NKV * HD));
    }
    const float *k = qk + NH * HD, *v = qkv + (NH + NKV) * HD;
    AttentionContext c = {B,
                          T,
                          NH,
                          NKV,
                          HD,
                          dout,
                          (double*)checked_malloc(sizeof(double) * (size_t)nq),
                          (double*)checked_malloc(sizeof(double) * (size_t)(B * NH * T))};
    attention_forward(out, lse, qk, QK, k, QK, v, QKV, B, T, T, NH, NKV, HD, scratch);
    double *point = to_double(inputs, n), worst = 0;
    attention_plain(point, &c);
    for (long i = 0; i < nq; i++) worst = fmax(worst, fabs(out[i] - c.out[i]));
    for (long i = 0; i < (long)B * NH * T; i++) worst = fmax(worst, fabs(lse[i] - c.lse[i]));
    check(worst < 5e-6, "attention, T = %d, %d heads on %d: forward, error %.1e", T, NH, NKV, worst);
    free(c.out);
    free(c.lse);
    c.out = c.lse = NULL;
    attention_backward(dqk, dqk + NH * HD, dqkv + (NH + NKV) * HD, dout, out, lse, qk, QK, k, QK, v, QKV, QK, QKV, B, T,
                       NH, NKV, HD, scratch);
    for (int t = 0; t < N; t++) {
        memcpy(gradient + (long)t * NH * HD, dqk + t * QK, sizeof(float) * (size_t)(NH * HD));
        memcpy(gradient + nq + (long)t * NKV * HD, dqk + t * QK + NH * HD, sizeof(float) * (size_t)(NKV * HD));
        memcpy(gradient + nq + nk + (long)t * NKV * HD, dqkv + t * QKV + (NH + NKV) * HD,
               sizeof(float) * (size_t)(NKV * HD));
    }
    worst = gradient_error(attention_plain, inputs, gradient, n, n / 150 | 1, &c);
    check(worst < 5e-6, "attention, T = %d, %d heads on %d: 150 of the gradient's numbers, error %.1e", T, NH, NKV,
          worst);
    // all numbers of the gradient at once: the derivative along a random direction
    float* direction = random_floats(n, 55);
    double along = 0, h = 1e-5;
    for (long i = 0; i < n; i++) {
        along += (double)gradient[i] * direction[i];
        point[i] = inputs[i] + h * direction[i];
    }
    double up = attention_plain(point, &c);
    for (long i = 0; i < n; i++) point[i] = inputs[i] - h * direction[i];
    double expected = (up - attention_plain(point, &c)) / (2 * h);
    check(fabs(along - expected) < 1e-4 * (1 + fabs(expected)), "attention, T = %d: derivative along a direction, %.5f",
          T, along);
    free(inputs);
    free(qk);
    free(qkv);
    free(gradient);
    free(out);
    free(lse);
    free(dout);
    free(dqk);
    free(dqkv);
    free(scratch);
    free(point);
    free(direction);
}

// All scores of a query are -infinity: their softmax is not a number, and must not look like one.
static void test_attention_overflow(int T) {
    int HD = 8;
    float *q = random_floats(T * HD, 0), *k = random_floats(T * HD, 0), *v = random_floats(T * HD, 0),
          *out = random_floats(T * HD, 0), *lse = random_floats(T, 0),
          *scratch = random_floats(attention_scratch_size(T), 56);
    for (int i = 0; i < T * HD; i++) {
        q[i] = 1e20f;
        k[i] = -1e20f;
    }
    attention_forward(out, lse, q, HD, k, HD, v, HD, 1, T, T, 1, 1, HD, scratch);
    check(isnan(out[(T - 1) * HD]), "attention, T = %d: scores that overflow show in the output", T);
    free(q);
    free(k);
    free(v);
    free(out);
    free(lse);
    free(scratch);
}

// A small model; 0 experts: dense.
static Config tiny_config(Arch arch, int layers, int experts, int topk) {
    Config c;
    memset(&c, 0, sizeof c);
    c.arch = arch;
    c.num_layers = layers;
    c.hidden_size = 24;
    c.num_heads = 4;
    c.num_kv_heads = 2;
    c.head_dim = 6;
    c.intermediate_size = 20;
    c.num_experts = experts;
    c.num_experts_per_tok = topk;
    c.moe_intermediate_size = experts ? 10 : 0;
    c.norm_topk_prob = experts > 0;
    c.vocab_size = 50;
    c.max_position_embeddings = 128;
    c.qk_norm = arch == OLMOE ? QK_NORM_ROW : arch == QWEN3 || arch == QWEN3_MOE ? QK_NORM_HEAD : QK_NORM_NONE;
    c.rope_theta = 1e4;
    c.rms_norm_eps = 1e-6;
    for (int l = 0; l < layers; l++) c.sparse[l] = experts > 0;
    return c;
}

static void fill_tokens(int* tokens, int n, int V, uint64_t key) {
    for (int i = 0; i < n; i++) tokens[i] = (int)(mix64(key * 1000003 + (uint64_t)i) % (uint64_t)V);
}

static void test_accumulation(void) {
    enum { B = 6, T = 40 };
    int tokens[B * T], targets[B * T];
    Config c = tiny_config(QWEN3_MOE, 2, 5, 2);
    Model* m = model_create(&c, FOR_TRAINING, B, T, T, NULL);
    model_init(m, 3);
    for (long i = 0; i < m->layout.total; i++) m->params[i] *= i < m->layout.matrices ? 8 : 1; // far from symmetric
    fill_tokens(tokens, B * T, 50, 1);
    fill_tokens(targets, B * T, 50, 2);
    double whole = model_forward(m, tokens, targets, B, T), parts = 0;
    model_backward(m, 1);
    float* expected = random_floats(m->layout.total, 0);
    memcpy(expected, m->grads, sizeof(float) * (size_t)m->layout.total);
    memset(m->grads, 0, sizeof(float) * (size_t)m->layout.total);
    for (int micro = 0; micro < 3; micro++) {
        parts += model_forward(m, tokens + micro * 2 * T, targets + micro * 2 * T, 2, T) / 3;
        model_backward(m, 1.0f / 3);
    }
    double error = relative_error(m->grads, expected, m->layout.total);
    check(fabs(whole - parts) < 1e-5, "accumulation: the loss of three batches is that of one, %.6f and %.6f", parts,
          whole);
    check(error < 1e-5, "accumulation: the gradient of three batches is that of one, relative error %.1e", error);
    free(expected);
    model_free(m);
}

static void test_gradients(void) {
    test_rmsnorm(1, 37);
    test_rmsnorm(3, 8);
    test_rope();
    test_swiglu();
    test_cross_entropy();
    test_attention(2, 83, 6, 2, 10);
    test_attention(1, 100, 3, 3, 6);
    test_attention(1, 70, 4, 1, 16);
    test_attention_overflow(15);
    test_attention_overflow(16);
    test_accumulation();
}

// ---------------------------------------------------------------------------------------------------------------------
// Experts

static void test_grouping(const char* what, int N, int K, int E, const int* experts) {
    int R = N * K, *offsets = (int*)checked_malloc(sizeof(int) * (size_t)(E + 1)),
        *row_of = (int*)checked_malloc(sizeof(int) * (size_t)R);
    int *assignment = (int*)checked_malloc(sizeof(int) * (size_t)R), counted = 1, inverse = 1, own = 1, stable = 1;
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
    free(offsets);
    free(row_of);
    free(assignment);
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
    Model* m = model_create(&c, FOR_TRAINING, 1, T, T, NULL);
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
    memset(m->weights.layers[0].router, 0, sizeof(float) * 12 * 24);
    memset(m->load, 0, sizeof(long) * 12);
    memset(m->grads, 0, sizeof(float) * (size_t)m->layout.total);
    model_forward(m, tokens, targets, 1, T);
    int lowest = 1;
    for (int n = 0; n < T; n++) lowest &= m->layers[0].experts[n] == 0;
    model_backward(m, 1);
    check(lowest && m->load[0] == T && expert_has_gradient(m, 0),
          "a tie goes to the lowest index, which has all tokens and a gradient");
    model_free(m);

    c.num_experts_per_tok = 4;
    m = model_create(&c, FOR_TRAINING, 1, T, T, NULL);
    model_init(m, 1);
    fill_random(m->weights.layers[0].router, 12 * 24, 9);
    float* router = m->weights.layers[0].router;
    static const int twins[] = {2, 7, 11}; // equal bits, so equal scores wherever they come
    for (int i = 1; i < 3; i++) memcpy(router + twins[i] * 24, router + 2 * 24, sizeof(float) * 24);
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
    model_free(m);

    c.num_experts_per_tok = 12;
    m = model_create(&c, FOR_TRAINING, 1, T, T, NULL);
    model_init(m, 1);
    m->counting_load = 1;
    model_forward(m, tokens, targets, 1, T);
    model_backward(m, 1);
    int all = 1;
    for (int e = 0; e < 12; e++) all &= m->load[e] == T && expert_has_gradient(m, e);
    check(all, "K = E: every expert has every token and a gradient");
    model_free(m);
}

// ---------------------------------------------------------------------------------------------------------------------
// Generation with the key/value cache against whole forward passes: the same bits

enum { CACHE_LENGTH = 45 }; // more than a block of queries

// Feeds tokens in chunks as `sizes` says (ending with 0, the last size repeats). The logits after each chunk must be
// the row of its last token.
static int cache_equals(Model* g, const int* tokens, const float* logits, const int* sizes) {
    int same = 1, V = g->config.vocab_size;
    g->cached = 0;
    for (int fed = 0; fed < CACHE_LENGTH;) {
        int n = imin(*sizes, CACHE_LENGTH - fed);
        model_forward(g, tokens + fed, NULL, 1, n);
        fed += n;
        same &= !memcmp(g->logits, logits + (long)(fed - 1) * V, sizeof(float) * (size_t)V);
        if (sizes[1]) sizes++;
    }
    return same && g->cached == CACHE_LENGTH;
}

static void test_cache_model(const char* dir, const char* name) {
    static const int chunks[][6] = {{1, 0}, {3, 0}, {7, 0}, {CACHE_LENGTH, 0}, {33, 1, 0}, {1, 20, 2, 16, 1, 0}};
    int tokens[CACHE_LENGTH], same = 1;
    Config c;
    Error error = {""};
    if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
    fill_tokens(tokens, CACHE_LENGTH, c.vocab_size, 5);
    Model *m = open_model(dir, FOR_SCORING, 1, CACHE_LENGTH), *full = m;
    Model* g = model_create(&c, FOR_GENERATION, 1, CACHE_LENGTH, CACHE_LENGTH, m);
    model_forward(m, tokens, NULL, 1, CACHE_LENGTH);
    for (size_t i = 0; i < sizeof chunks / sizeof chunks[0]; i++) same &= cache_equals(g, tokens, m->logits, chunks[i]);
    check(same, "%s: six ways to cut %d tokens into chunks", name, CACHE_LENGTH);

    // a prefix, and a row of a batch, have the bits of the whole sequence alone
    long V = c.vocab_size, n = 19;
    float* alone = random_floats(CACHE_LENGTH * V, 0);
    memcpy(alone, m->logits, sizeof(float) * (size_t)(CACHE_LENGTH * V));
    model_forward(m, tokens, NULL, 1, (int)n);
    same = !memcmp(alone, m->logits, sizeof(float) * (size_t)(n * V));
    int batch[3 * CACHE_LENGTH];
    fill_tokens(batch, 3 * CACHE_LENGTH, c.vocab_size, 6);
    memcpy(batch + CACHE_LENGTH, tokens, sizeof tokens);
    m = open_model(dir, FOR_TRAINING, 3, CACHE_LENGTH);
    model_forward(m, batch, NULL, 3, CACHE_LENGTH);
    same &= !memcmp(alone, m->logits + CACHE_LENGTH * V, sizeof(float) * (size_t)(CACHE_LENGTH * V));
    check(same, "%s: a prefix, and a sequence among others, have the bits of the sequence alone", name);
    free(alone);
    model_free(m);
    model_free(g);
    model_free(full);
}

// When the cache is full, generation starts again from the later half of it.
static void test_cache_restart(int positions, int chunk) {
    int tokens[CACHE_LENGTH], start = 0, same = 1, restarts = 0;
    Model* m = open_model("dev/reference/golden/qwen3_moe", FOR_SCORING, 1, CACHE_LENGTH);
    Model* g = model_create(&m->config, FOR_GENERATION, 1, imin(chunk, positions), positions, m);
    fill_tokens(tokens, CACHE_LENGTH, m->config.vocab_size, 9);
    for (int fed = 0; fed < CACHE_LENGTH;) {
        int n = imin(chunk, CACHE_LENGTH - fed);
        generator_feed(g, tokens, fed, fed + n);
        for (int t = fed; t < fed + n; t++)
            if (t - start == positions) {
                start = t - positions / 2;
                restarts++;
            }
        fed += n;
        model_forward(m, tokens + start, NULL, 1, fed - start);
        long V = m->config.vocab_size;
        same &= g->cached == fed - start;
        same &= !memcmp(g->logits, m->logits + (long)(fed - start - 1) * V, sizeof(float) * (size_t)V);
    }
    check(same && restarts > 1, "a cache of %d, fed by %d: %d restarts from the later half", positions, chunk,
          restarts);
    model_free(g);
    model_free(m);
}

static void test_cache(void) {
    for (size_t i = 0; i < sizeof golden_models / sizeof golden_models[0]; i++) {
        char dir[PATH_SIZE];
        join_path(dir, "dev/reference/golden", golden_models[i]);
        test_cache_model(dir, golden_models[i]);
    }
    test_cache_restart(16, 1);
    test_cache_restart(16, 5);
    test_cache_restart(7, 3);
    test_cache_restart(1, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Learning rate and AdamW

static void check_rate(const Run* r, long step, double expected) {
    static const char* names[] = {"wsd", "cosine", "constant"};
    double got = learning_rate(r, step);
    check(fabs(got - expected) <= 1e-12, "%s: step %ld of %ld: %.6f, expected %.6f", names[r->schedule], step, r->steps,
          got, expected);
}

static void test_learning_rate(void) {
    Run r;
    memset(&r, 0, sizeof r);
    r.steps = 100;
    r.warmup = 10;
    r.lr = 0.02;
    r.min_lr = 0.004;
    r.decay_frac = 0.2;
    for (int s = 0; s < 3; s++) {
        r.schedule = (Schedule)s;
        check_rate(&r, 0, 0.002); // a tenth of the way up, not 0
        check_rate(&r, 4, 0.010);
        check_rate(&r, 9, 0.020);
        check_rate(&r, 10, 0.020);
    }
    r.schedule = WSD; // falls over the steps 80 .. 99, and would reach min_lr at 100
    check_rate(&r, 80, 0.020);
    check_rate(&r, 81, 0.020 - 0.016 / 20);
    check_rate(&r, 90, 0.012);
    check_rate(&r, 99, 0.004 + 0.016 / 20);
    r.schedule = COSINE;
    check_rate(&r, 55, 0.012); // half way between 10 and 100
    check_rate(&r, 40, 0.004 + 0.016 * 0.75); // a third: cos(60 degrees) = 1/2
    check_rate(&r, 100, 0.004);
    check_rate(&r, 500, 0.004);
    r.schedule = CONSTANT;
    check_rate(&r, 99, 0.020);
    r.warmup = 0;
    check_rate(&r, 0, 0.020);
    r.schedule = COSINE;
    check_rate(&r, 0, 0.020);
    r.schedule = WSD;
    r.decay_frac = 0;
    check_rate(&r, 99, 0.020);
    r.decay_frac = 1;
    check_rate(&r, 50, 0.012);
}

// AdamW as torch.optim.AdamW and clip_grad_norm_ describe it, in double
static void adamw_plain(double* w, double* m, double* v, const float* g, long n, long matrices, const AdamW* o,
                        double lr, long step) {
    double norm = 0, clip = 1;
    for (long i = 0; i < n; i++) norm += (double)g[i] * g[i];
    norm = sqrt(norm);
    if (o->clip > 0) clip = fmin(1, o->clip / (norm + 1e-6));
    for (long i = 0; i < n; i++) {
        double grad = g[i] * clip;
        if (i < matrices) w[i] *= 1 - lr * o->weight_decay;
        m[i] += (1 - o->beta1) * (grad - m[i]);
        v[i] = o->beta2 * v[i] + (1 - o->beta2) * grad * grad;
        double m_hat = m[i] / (1 - pow(o->beta1, (double)step)), v_hat = v[i] / (1 - pow(o->beta2, (double)step));
        w[i] -= lr * m_hat / (sqrt(v_hat) + o->eps);
    }
}

static void test_adamw(double clip, double size) {
    AdamW o = {0.9, 0.95, 1e-8, 0.5, clip};
    Config c = tiny_config(QWEN3_MOE, 1, 3, 2);
    Model* model = model_create(&c, FOR_TRAINING, 1, 4, 4, NULL);
    long n = model->layout.total, matrices = model->layout.matrices;
    fill_random(model->params, n, 60);
    double *w = to_double(model->params, n), *m = to_double(model->exp_avg, n), *v = to_double(model->exp_avg, n);
    double error = 0, norm_error = 0;
    int cleared = 1;
    for (long step = 1; step <= 5; step++) {
        double norm = 0, lr = 0.01 * (double)step;
        fill_random(model->grads, n, 60 + (uint64_t)step);
        for (long i = 0; i < n; i++) {
            model->grads[i] *= (float)size;
            norm += (double)model->grads[i] * model->grads[i];
        }
        adamw_plain(w, m, v, model->grads, n, matrices, &o, lr, step);
        norm_error = fmax(norm_error, fabs(model_update(model, &o, lr, step) / sqrt(norm) - 1));
        for (long i = 0; i < n; i++) {
            error = fmax(error, fabs(w[i] - model->params[i]));
            cleared &= model->grads[i] == 0;
        }
    }
    check(error < 2e-6, "AdamW, clip %g: five steps, error %.1e", clip, error);
    check(norm_error < 1e-6 && cleared, "AdamW, clip %g: the norm before clipping; gradients are cleared", clip);

    // no gradient: matrices shrink by lr * decay, vectors stay
    memset(model->exp_avg, 0, sizeof(float) * (size_t)n);
    float* before = random_floats(n, 0);
    memcpy(before, model->params, sizeof(float) * (size_t)n);
    model_update(model, &o, 0.1, 1);
    int decayed = 1, kept = 1;
    for (int i = 0; i < model->layout.count; i++) {
        const Tensor* t = &model->layout.tensors[i];
        int is_vector = strstr(t->name, "norm") != NULL;
        for (long k = t->offset; k < t->offset + tensor_size(t); k++) {
            if (is_vector)
                kept &= model->params[k] == before[k];
            else
                decayed &= fabs(model->params[k] - 0.95 * before[k]) < 1e-6;
        }
    }
    check(decayed && kept, "AdamW, clip %g: weight decay is for matrices alone", clip);

    memcpy(before, model->params, sizeof(float) * (size_t)n);
    model->grads[7] = NAN;
    check(!isfinite(model_update(model, &o, 0.1, 1)) && !memcmp(before, model->params, sizeof(float) * (size_t)n),
          "AdamW, clip %g: a gradient that is not finite changes nothing", clip);
    free(before);
    free(w);
    free(m);
    free(v);
    model_free(model);
}

static void test_schedule(void) {
    test_learning_rate();
    test_adamw(1, 1); // the norm is about 30: clipped
    test_adamw(1, 1e-3); // below 1: left alone
    test_adamw(0, 1); // never clipped
}

// ---------------------------------------------------------------------------------------------------------------------
// JSON

static Json* parse(const char* text, size_t n, Error* error) {
    char* exact = (char*)checked_malloc(n); // no zero behind it, for the sanitizer
    memcpy(exact, text, n);
    error->text[0] = 0;
    Json* j = json_parse(exact, n, error);
    free(exact);
    return j;
}

// for one line of output
static const char* printable(const char* text) {
    static char out[256];
    int n = 0;
    for (const char* s = text; *s && n < 240; s++)
        n += (unsigned char)*s >= 32 && (unsigned char)*s < 127 ? sprintf(out + n, "%c", *s)
                                                                : sprintf(out + n, "<%02x>", *s & 255);
    out[n] = 0;
    return out;
}

static void check_valid(const char* text) {
    Error error;
    Json* j = parse(text, strlen(text), &error);
    check(j && !error.text[0], "accepts %.60s", printable(text));
    json_free(j);
}

static void check_invalid(const char* text, size_t n, const char* expected) {
    Error error;
    Json* j = parse(text, n, &error);
    check(!j && strstr(error.text, expected), "refuses %.40s: %s", printable(text), error.text);
    json_free(j);
}

static void check_decoded(const char* text, const char* expected, size_t n) {
    Error error;
    Json* j = parse(text, strlen(text), &error);
    check(j && j->type == JSON_STRING && j->length == n && !memcmp(j->string, expected, n), "decodes %.60s", text);
    json_free(j);
}

static void test_json(void) {
    static const char* valid[] = {"null",
                                  " true ",
                                  "false",
                                  "0",
                                  "-0",
                                  "-1.5e+10",
                                  "1E5",
                                  "0.0",
                                  "\"\"",
                                  "[]",
                                  "{}",
                                  "\t[ ]\r\n",
                                  "[1, [2, {\"a\": [null]}]]",
                                  "{\"b\": 1, \"a\": {\"a\": 2}}",
                                  "\"\\u00e9\"",
                                  "\"\xC3\xA9\xE2\x96\x81\xF0\x9F\x98\x80\"",
                                  "\"\x7f\""};
    for (size_t i = 0; i < sizeof valid / sizeof valid[0]; i++) check_valid(valid[i]);

    static const struct {
        const char *text, *expected;
    } invalid[] = {{"", "expected a value"},
                   {" ", "expected a value"},
                   {"nul", "expected a value"},
                   {"nullx", "the end"},
                   {"TRUE", "a value"},
                   {"01", "the end"},
                   {"+1", "a value"},
                   {".5", "a value"},
                   {"1.", "a digit"},
                   {"1.e5", "a digit"},
                   {"1e", "a digit"},
                   {"1e+", "a digit"},
                   {"-", "a value"},
                   {"0x10", "the end"},
                   {"NaN", "a value"},
                   {"Infinity", "a value"},
                   {"[", "a value"},
                   {"[1", "a comma or ]"},
                   {"[1,", "a value"},
                   {"[1,]", "a value"},
                   {"[1 2]", "a comma or ]"},
                   {"[1}", "a comma or ]"},
                   {"{", "a string"},
                   {"{\"a\"", "a colon"},
                   {"{\"a\":", "a value"},
                   {"{\"a\":1", "a comma or }"},
                   {"{\"a\":1,}", "a string"},
                   {"{a:1}", "a string"},
                   {"{1:1}", "a string"},
                   {"{\"a\" 1}", "a colon"},
                   {"]", "a value"},
                   {"\"", "a closing quote"},
                   {"\"a", "a closing quote"},
                   {"\"\\", "an escape"},
                   {"\"\\\"", "a closing quote"},
                   {"\"\\x\"", "an escape"},
                   {"\"\\u12\"", "four hexadecimal"},
                   {"\"\\u12g4\"", "four hexadecimal"},
                   {"\"\\ud800\"", "a surrogate pair"},
                   {"\"\\ud800x\"", "a surrogate pair"},
                   {"\"\\ud800\\u0041\"", "a surrogate pair"},
                   {"\"\\udc00\"", "a surrogate pair"},
                   {"\"a\nb\"", "control character"},
                   {"\"\t\"", "control character"},
                   {"\"\x80\"", "UTF-8"},
                   {"\"\xC3\"", "UTF-8"},
                   {"\"\xC3(\"", "UTF-8"},
                   {"\"\xC0\x80\"", "UTF-8"},
                   {"\"\xC1\xBF\"", "UTF-8"},
                   {"\"\xE0\x80\x80\"", "UTF-8"},
                   {"\"\xED\xA0\x80\"", "UTF-8"},
                   {"\"\xF0\x80\x80\x80\"", "UTF-8"},
                   {"\"\xF4\x90\x80\x80\"", "UTF-8"},
                   {"\"\xF5\x80\x80\x80\"", "UTF-8"},
                   {"\"\xFF\"", "UTF-8"},
                   {"\xEF\xBB\xBF{}", "a value"},
                   {"{\"a\":1,\"a\":2}", "\"a\" appears twice"},
                   {"{\"a\":1,\"b\":0,\"\\u0061\":2}", "\"a\" appears twice"},
                   {"{\"a\\u0000b\":1}", "without zero bytes"},
                   {"[1] 2", "the end"},
                   {"// comment\n1", "a value"},
                   {"'a'", "a value"}};
    for (size_t i = 0; i < sizeof invalid / sizeof invalid[0]; i++)
        check_invalid(invalid[i].text, strlen(invalid[i].text), invalid[i].expected);
    check_invalid("1\0", 2, "the end");

    check_decoded("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8);
    check_decoded("\"\\u0041\\u00e9\\u2581\"", "A\xC3\xA9\xE2\x96\x81", 6);
    check_decoded("\"\\uD83D\\uDE00\\uffff\"", "\xF0\x9F\x98\x80\xEF\xBF\xBF", 7);
    check_decoded("\"a\\u0000b\"", "a\0b", 3);

    Error error;
    char deep[400];
    for (int levels = 60; levels <= 70; levels++) {
        memset(deep, '[', (size_t)levels);
        memset(deep + levels, ']', (size_t)levels);
        Json* j = parse(deep, 2 * (size_t)levels, &error);
        if (levels == 64 || levels == 66 || (j != NULL) != (levels <= 65))
            check((j != NULL) == (levels <= 65), "%d levels of arrays: %s", levels, j ? "accepted" : error.text);
        json_free(j);
    }
    memset(deep, '[', sizeof deep);
    check_invalid(deep, sizeof deep, "64 levels");

    const char* text = "{\"z\": 1.5e3, \"a\": [true, \"x\"], \"m\": -7, \"big\": 18446744073709551616, \"null\": null}";
    Json* j = parse(text, strlen(text), &error);
    check(json_get(j, "z")->number == 1500 && json_get(j, "m")->number == -7, "finds members by name");
    check(!json_get(j, "q") && !json_get(json_get(j, "a"), "z") && !json_get(NULL, "a"),
          "finds nothing where there is nothing");
    check(json_get(j, "a")->count == 2 && !strcmp(json_get(j, "a")->items[1]->string, "x"),
          "keeps the order of arrays");
    check(json_whole(json_get(j, "z"), 9999) == -1 && json_whole(json_get(j, "m"), 9999) == -1 &&
              json_whole(json_get(j, "big"), LONG_MAX) == -1,
          "a whole number has no point, exponent or sign and is not too large");
    check(json_absent(json_get(j, "null")) && json_absent(json_get(j, "q")) && !json_absent(json_get(j, "z")),
          "null is absent");
    json_free(j);

    static const double numbers[] = {
        1e-6, 1, 0, 0.1, 1e6, 1e4, 0.001, 123456789.0, 1.0 / 3, 5e-324, 1.7976931348623157e308};
    int same = 1, floats = 1;
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        Text t = {NULL, 0, 0};
        text_json_double(&t, numbers[i]);
        same &= strtod(t.data, NULL) == numbers[i];
        floats &= strpbrk(t.data, ".e") != NULL;
        free(t.data);
    }
    check(same && floats, "numbers are written so that they read back the same and stay floats");
    Text t = {NULL, 0, 0};
    text_json_string(&t, "a\"b\\c\n\x01\xC3\xA9");
    j = parse(t.data, t.length, &error);
    check(j && !strcmp(j->string, "a\"b\\c\n\x01\xC3\xA9"), "strings are written so that they read back the same");
    Text broken = {NULL, 0, 0};
    text_json_string(&broken, "a\xFFz\xC3");
    Json* mended = parse(broken.data, broken.length, &error);
    check(mended && !strcmp(mended->string, "a\xEF\xBF\xBDz\xEF\xBF\xBD"), "bytes that are not UTF-8 are replaced");
    json_free(mended);
    free(broken.data);
    json_free(j);
    free(t.data);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints: safetensors files

// a file with this header and `data` bytes of tensors behind it
static void write_safetensors(const char* path, const char* header, size_t data) {
    size_t n = strlen(header);
    unsigned char* file = (unsigned char*)checked_malloc(8 + n + data);
    memset(file, 0, 8 + n + data);
    for (int i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(file + 8, header, n);
    write_bytes(path, file, 8 + n + data);
    free(file);
}

static void check_open(const char* what, const char* path, const char* expected) {
    Error error = {""};
    SafeTensors* s = safetensors_open(path, &error);
    if (!expected)
        check(s && !error.text[0], "safetensors, %s: opens %s", what, error.text);
    else
        check(!s && strstr(error.text, expected) && strstr(error.text, path) && !strchr(error.text, '\n'),
              "safetensors, %s: %s", what, error.text[0] ? error.text : "not refused");
    safetensors_close(s);
}

#define A_TENSOR "\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"

static void test_safetensors_refusals(void) {
    static const struct {
        const char* what;
        const char* header;
        size_t data;
        const char* expected;
    } files[] = {
        {"one tensor", "{\"a\":{" A_TENSOR "}}", 8, NULL},
        {"padded header", "{\"a\":{" A_TENSOR "}}       ", 8, NULL},
        {"no tensors", "{}", 0, NULL},
        {"metadata", "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{" A_TENSOR "}}", 8, NULL},
        {"empty tensor", "{\"a\":{" A_TENSOR "},\"b\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[8,8]}}", 8,
         NULL},
        {"scalar", "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, NULL},
        {"not JSON", "{\"a\":{" A_TENSOR "}", 8, "not JSON"},
        {"no object", "[]", 0, "does not start with {"},
        {"not UTF-8", "{\"\xFF\":{" A_TENSOR "}}", 8, "UTF-8"},
        {"space before the header", " {\"a\":{" A_TENSOR "}}", 8, "does not start with {"},
        {"text after the header", "{\"a\":{" A_TENSOR "}}x", 8, "not JSON"},
        {"unknown dtype", "{\"a\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown dtype F31"},
        {"no dtype", "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "no dtype"},
        {"dtype a number", "{\"a\":{\"dtype\":1,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "no dtype"},
        {"no shape", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"negative shape", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"shape a float", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"shape of text", "{\"a\":{\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"five dimensions", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,2],\"data_offsets\":[0,8]}}", 8,
         "shape is not"},
        {"shape overflow", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}", 8,
         "overflows"},
        {"overflow in bytes", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,8]}}", 8,
         "shape is not"},
        {"overflow in bytes", "{\"a\":{\"dtype\":\"F64\",\"shape\":[99999999999,99999999],\"data_offsets\":[0,8]}}", 8,
         "overflows"},
        {"no offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "data_offsets"},
        {"one offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8]}}", 8, "data_offsets"},
        {"three offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, "data_offsets"},
        {"offsets backwards", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, "data_offsets"},
        {"negative offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, "data_offsets"},
        {"huge offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]}}", 8,
         "data_offsets"},
        {"size too small", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "needs 8 bytes"},
        {"size too large", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,12]}}", 12, "needs 8 bytes"},
        {"hole at the start", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "a hole"},
        {"hole", "{\"a\":{" A_TENSOR "},\"b\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16,
         "a hole"},
        {"overlap", "{\"a\":{" A_TENSOR "},\"b\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8,
         "an overlap"},
        {"the same bytes twice", "{\"a\":{" A_TENSOR "},\"b\":{" A_TENSOR "}}", 8, "an overlap"},
        {"trailing bytes", "{\"a\":{" A_TENSOR "}}", 9, "1 bytes follow"},
        {"trailing bytes, no tensors", "{}", 3, "3 bytes follow"},
        {"truncated", "{\"a\":{" A_TENSOR "}}", 7, "truncated?"},
        {"a name twice", "{\"a\":{" A_TENSOR "},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12,
         "appears twice"},
        {"entry not an object", "{\"a\":5}", 0, "no dtype"},
        {"metadata not strings", "{\"__metadata__\":{\"format\":1}}", 0, "__metadata__ is not"},
        {"metadata no object", "{\"__metadata__\":[1]}", 0, "__metadata__ is not"}};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        const char* path = temp("crafted.safetensors");
        write_safetensors(path, files[i].header, files[i].data);
        check_open(files[i].what, path, files[i].expected);
    }
    const char* path = temp("crafted.safetensors");
    write_bytes(path, "", 0);
    check_open("empty file", path, "too short");
    write_bytes(path, "\2\0\0\0\0\0\0", 7);
    check_open("7 bytes", path, "too short");
    write_bytes(path, "\3\0\0\0\0\0\0\0{}", 10);
    check_open("header past the end", path, "past the end");
    write_bytes(path, "\0\0\0\0\0\0\0\0", 8);
    check_open("no header", path, "does not start with {");
    write_bytes(path, "\1\xE1\xF5\5\0\0\0\0{}", 10);
    check_open("header of 100000001 bytes", path, "over 100 MB");
    write_bytes(path, "\0\xE1\xF5\5\0\0\0\0{}", 10);
    check_open("header of 100000000 bytes", path, "past the end");
    write_bytes(path, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}", 10);
    check_open("header of 2^64 - 1 bytes", path, "over 100 MB");
    write_bytes(path, "\0\0\0\0\0\0\0\x80{}", 10);
    check_open("header of 2^63 bytes", path, "over 100 MB");
    check_open("directory", temp_dir, "not a regular file");
    check_open("missing", temp("missing"), "No such file");
}

// every half, against the definition of its format
static void test_halves(void) {
    int bf16 = 1, f16 = 1;
    for (int h = 0; h < 65536; h++) {
        double sign = h & 0x8000 ? -1 : 1;
        int exponent = h >> 7 & 255, fraction = h & 127, e = h >> 10 & 31, f = h & 1023;
        double b = exponent == 255 ? (fraction ? NAN : sign * INFINITY)
                                   : sign * (exponent ? ldexp(128 + fraction, exponent - 134) : ldexp(fraction, -133));
        double a = e == 31 ? (f ? NAN : sign * INFINITY) : sign * (e ? ldexp(1024 + f, e - 25) : ldexp(f, -24));
        float x = bf16_to_float((uint16_t)h), y = f16_to_float((uint16_t)h);
        bf16 &= isnan(b) ? isnan(x) : x == b && !signbit(x) == !signbit(b);
        f16 &= isnan(a) ? isnan(y) : y == a && !signbit(y) == !signbit(a);
    }
    check(bf16, "all 65536 BF16 numbers");
    check(f16, "all 65536 F16 numbers");
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints: models

// A tensor to be written in any type and shape: what tests change before they load a model.
typedef struct {
    char name[128];
    const char* dtype;
    int ndim;
    long shape[4], count;
    float* values;
    int shard; // -1: in no file
} Piece;

typedef struct {
    Piece* pieces;
    int count;
} Pieces;

static Pieces pieces_read(const char* dir) {
    Error error = {""};
    SafeTensors* s = safetensors_open_model(dir, &error);
    if (!s) die(1, "%s", error.text);
    Pieces p = {(Piece*)checked_malloc(sizeof(Piece) * ((size_t)s->num_tensors + 8)), s->num_tensors};
    for (int i = 0; i < p.count; i++) {
        const StoredTensor* t = &s->tensors[i];
        Piece* piece = &p.pieces[i];
        memset(piece, 0, sizeof *piece);
        snprintf(piece->name, sizeof piece->name, "%s", t->name);
        piece->dtype = "F32";
        piece->ndim = t->ndim;
        piece->count = t->count;
        memcpy(piece->shape, t->shape, sizeof piece->shape);
        piece->values = reference_floats(s, t->name, NULL);
    }
    safetensors_close(s);
    return p;
}

static void pieces_free(Pieces* p) {
    for (int i = 0; i < p->count; i++) free(p->pieces[i].values);
    free(p->pieces);
}

static Piece* piece_find(Pieces* p, const char* name) {
    for (int i = 0; i < p->count; i++)
        if (!strcmp(p->pieces[i].name, name)) return &p->pieces[i];
    die(1, "there is no tensor %s", name);
}

static Piece* piece_add(Pieces* p, const char* name, const Piece* like) {
    Piece* piece = &p->pieces[p->count++];
    *piece = *like;
    snprintf(piece->name, sizeof piece->name, "%s", name);
    piece->values = (float*)checked_malloc(sizeof(float) * (size_t)like->count);
    memcpy(piece->values, like->values, sizeof(float) * (size_t)like->count);
    return piece;
}

// Writes one shard. Halves are the float's upper bits: the values that are left are put back into the piece.
static void pieces_write(Pieces* p, const char* path, int shard) {
    Text header = {NULL, 0, 0}, data = {NULL, 0, 0}, file = {NULL, 0, 0};
    text_print(&header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < p->count; i++) {
        Piece* piece = &p->pieces[i];
        if (piece->shard != shard) continue;
        text_print(&header, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", piece->name, piece->dtype);
        for (int k = 0; k < piece->ndim; k++) text_print(&header, "%s%ld", k ? "," : "", piece->shape[k]);
        size_t begin = data.length;
        for (long k = 0; k < piece->count; k++) {
            union {
                float value;
                uint32_t bits;
            } u;
            u.value = piece->values[k];
            if (!strcmp(piece->dtype, "F32")) {
                text_add(&data, (const char*)&u, 4);
                continue;
            }
            uint16_t half = (uint16_t)(u.bits >> 16);
            if (!strcmp(piece->dtype, "F16")) { // the golden weights are within the normal range, or too small
                int exponent = (int)(u.bits >> 23 & 255) - 112;
                half = (uint16_t)((u.bits >> 16 & 0x8000) |
                                  (exponent > 0 ? (uint32_t)exponent << 10 | (u.bits >> 13 & 1023) : 0));
                piece->values[k] = f16_to_float(half);
            } else {
                piece->values[k] = bf16_to_float(half);
            }
            char bytes[2] = {(char)(half & 255), (char)(half >> 8)};
            text_add(&data, bytes, 2);
        }
        text_print(&header, "],\"data_offsets\":[%zu,%zu]}", begin, data.length);
    }
    text_print(&header, "}");
    for (int i = 0; i < 8; i++) {
        char byte = (char)((uint64_t)header.length >> (8 * i));
        text_add(&file, &byte, 1);
    }
    text_add(&file, header.data, header.length);
    if (data.length) text_add(&file, data.data, data.length);
    write_bytes(path, file.data, file.length);
    free(header.data);
    free(data.data);
    free(file.data);
}

// A directory with the configuration of `dir` and these tensors in one file.
static const char* pieces_save(Pieces* p, const char* dir) {
    char config[PATH_SIZE];
    static char made[PATH_SIZE];
    snprintf(made, sizeof made, "%s", temp("model"));
    remove_tree(made);
    if (mkdir(made, 0777)) die(1, "%s: %s", made, strerror(errno));
    copy_file(join_path(config, dir, "config.json"), temp("model/config.json"));
    pieces_write(p, temp("model/model.safetensors"), 0);
    return made;
}

// Loads a directory; NULL if it is refused.
static Model* try_load(const char* dir, Error* error) {
    Config c;
    error->text[0] = 0;
    if (!config_read(&c, dir, error)) return NULL;
    Model* m = model_create(&c, FOR_SCORING, 1, 4, 4, NULL);
    if (checkpoint_load(m, dir, error)) return m;
    model_free(m);
    return NULL;
}

// Every parameter that has a piece of its name is equal to it; returns how many have.
static int count_equal(const Model* m, Pieces* p) {
    int equal = 0;
    for (int i = 0; i < m->layout.count; i++)
        for (int k = 0; k < p->count; k++)
            if (!strcmp(m->layout.tensors[i].name, p->pieces[k].name))
                equal += !memcmp(m->params + m->layout.tensors[i].offset, p->pieces[k].values,
                                 sizeof(float) * (size_t)p->pieces[k].count);
    return equal;
}

static void check_loads(const char* what, const char* dir, Pieces* p) {
    Error error;
    Model* m = try_load(dir, &error);
    check(m && count_equal(m, p) == m->layout.count, "%s: loads, with equal values %s", what, error.text);
    if (m) model_free(m);
}

static void check_load_refused(const char* what, const char* dir, const char* expected) {
    Error error;
    Model* m = try_load(dir, &error);
    check(!m && strstr(error.text, expected) && !strchr(error.text, '\n'), "%s: %s", what,
          error.text[0] ? error.text : "not refused");
    if (m) model_free(m);
}

static void test_load_dtypes(const char* dir) {
    static const char* dtypes[] = {"F32", "BF16", "F16"};
    for (int i = 0; i < 3; i++) {
        Pieces p = pieces_read(dir);
        char what[200];
        snprintf(what, sizeof what, "%s as %s", strrchr(dir, '/') + 1, dtypes[i]);
        for (int k = 0; k < p.count; k++) p.pieces[k].dtype = dtypes[i];
        const char* made = pieces_save(&p, dir);
        check_loads(what, made, &p);
        pieces_free(&p);
    }
    Pieces p = pieces_read(dir);
    Piece* t = piece_find(&p, "model.norm.weight");
    t->dtype = "I16";
    check_load_refused("a tensor of whole numbers", pieces_save(&p, dir), "only F32, BF16 and F16");
    pieces_free(&p);
}

// Packs the experts of every sparse layer as newer transformers does: the model must be equal.
static void test_load_packed(const char* dir, const char* moe, const char* suffix) {
    Error error;
    Model* expected = try_load(dir, &error);
    const Config* c = &expected->config;
    Pieces p = pieces_read(dir);
    long E = c->num_experts, I = c->moe_intermediate_size, H = c->hidden_size;
    for (int i = 0; i < p.count; i++) p.pieces[i].shard = strstr(p.pieces[i].name, ".experts.") ? -1 : 0;
    for (int l = 0; l < c->num_layers; l++) {
        char name[128];
        if (!c->sparse[l]) continue;
        snprintf(name, sizeof name, "model.layers.%d.block_sparse_moe.gate.weight", l);
        if (c->arch == MIXTRAL) snprintf(piece_find(&p, name)->name, sizeof name, "model.layers.%d.mlp.gate.weight", l);
        for (int down = 0; down < 2; down++) {
            Piece packed = {"", "F32", 3, {E, down ? H : 2 * I, down ? I : H, 0}, E * H * I * (2 - down), NULL, 0};
            packed.values = down ? expected->weights.layers[l].down : expected->weights.layers[l].gate_up;
            snprintf(name, sizeof name, "model.layers.%d.%s.experts.%s%s", l, moe, down ? "down_proj" : "gate_up_proj",
                     suffix);
            piece_add(&p, name, &packed);
        }
    }
    Model* m = try_load(pieces_save(&p, dir), &error);
    check(m && !memcmp(m->params, expected->params, sizeof(float) * (size_t)m->layout.total),
          "%s: packed experts (%s.experts.down_proj%s) %s", strrchr(dir, '/') + 1, moe, suffix, error.text);
    if (m) model_free(m);
    p.pieces[p.count - 1].shape[1]++;
    p.pieces[p.count - 1].shape[2]--;
    check_load_refused("packed experts with a wrong shape", pieces_save(&p, dir), "");
    model_free(expected);
    pieces_free(&p);
}

static void write_shard_index(Pieces* p, const char* names[3]) {
    Text t = {NULL, 0, 0};
    text_print(&t, "{\"metadata\": {\"total_size\": 0}, \"weight_map\": {");
    for (int i = 0; i < p->count; i++)
        text_print(&t, "%s\"%s\": \"%s\"", i ? ", " : "", p->pieces[i].name, names[p->pieces[i].shard]);
    text_print(&t, "}}");
    write_text(temp("model/model.safetensors.index.json"), t.data);
    free(t.data);
}

// in three shards, as large models are
static void test_load_shards(const char* dir) {
    const char* names[3] = {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                            "model-00003-of-00003.safetensors"};
    Pieces p = pieces_read(dir);
    const char* made = pieces_save(&p, dir);
    unlink(temp("model/model.safetensors"));
    for (int i = 0; i < p.count; i++) p.pieces[i].shard = (i * 7) % 3;
    for (int i = 0; i < 3; i++) pieces_write(&p, temp("model/%s", names[i]), i);
    write_shard_index(&p, names);
    check_loads("three shards", made, &p);

    const char* bad[] = {
        "../model-00001-of-00003.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\\\b", ".hidden"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char what[100];
        const char* changed[3] = {bad[i], names[1], names[2]};
        write_shard_index(&p, changed);
        snprintf(what, sizeof what, "weight_map with \"%s\"", bad[i]);
        check_load_refused(what, made, "not a file name in this directory");
    }
    write_text(temp("model/model.safetensors.index.json"), "{\"weight_map\": {\"a\": 5}}");
    check_load_refused("weight_map with a number", made, "not a file name");
    write_text(temp("model/model.safetensors.index.json"), "{\"weight_map\": []}");
    check_load_refused("weight_map a list", made, "no weight_map");
    write_text(temp("model/model.safetensors.index.json"), "{}");
    check_load_refused("no weight_map", made, "no weight_map");
    write_text(temp("model/model.safetensors.index.json"), "{");
    check_load_refused("index not JSON", made, "not JSON");

    write_shard_index(&p, names);
    unlink(temp("model/%s", names[2]));
    check_load_refused("a shard is missing", made, "No such file");
    p.pieces[0].shard = 2; // in shard 0 as well
    pieces_write(&p, temp("model/%s", names[2]), 2);
    check_load_refused("a tensor in two shards", made, "is in two files");
    p.pieces[0].shard = 0;
    pieces_write(&p, temp("model/%s", names[2]), 2);
    p.pieces[0].shard = 1;
    write_shard_index(&p, names);
    check_load_refused("weight_map names the wrong shard", made, "is not in");
    p.pieces[0].shard = 0;
    p.count--;
    write_shard_index(&p, names);
    p.count++;
    check_load_refused("weight_map is too short", made, "weight_map lists");
    pieces_free(&p);
}

static void test_load_refusals(void) {
    const char* dir = "dev/reference/golden/qwen3_moe";
    Pieces p = pieces_read(dir);
    Piece* norm = piece_find(&p, "model.norm.weight");
    norm->shard = -1;
    check_load_refused("a missing tensor", pieces_save(&p, dir), "missing tensors (1): model.norm.weight");
    norm->shard = 0;
    piece_add(&p, "model.layers.0.mlp.experts.99.up_proj.weight", norm);
    check_load_refused("an unexpected tensor", pieces_save(&p, dir), "experts.99.up_proj.weight");
    p.pieces[p.count - 1].shard = -1;
    piece_add(&p, "model.layers.0.self_attn.rotary_emb.inv_freq", norm);
    check_loads("inv_freq is ignored", pieces_save(&p, dir), &p);
    snprintf(p.pieces[p.count - 1].name, sizeof p.pieces[0].name, "model.rotary_emb.inv_freq");
    check_loads("inv_freq of all layers is ignored", pieces_save(&p, dir), &p);
    p.pieces[p.count - 1].shard = -1;
    norm->ndim = 2;
    norm->shape[1] = 1;
    check_load_refused("a vector that is a matrix", pieces_save(&p, dir), "model.norm.weight has shape");
    norm->ndim = 1;
    Piece* q = piece_find(&p, "model.layers.0.self_attn.q_proj.weight");
    long rows = q->shape[0];
    q->shape[0] = q->shape[1];
    q->shape[1] = rows;
    check_load_refused("a transposed matrix", pieces_save(&p, dir), "q_proj.weight has shape");
    q->shape[1] = q->shape[0];
    q->shape[0] = rows;
    check_loads("the same, put right", pieces_save(&p, dir), &p);
    pieces_free(&p);

    dir = "dev/reference/golden/llama_tied";
    p = pieces_read(dir);
    check_loads("tied", pieces_save(&p, dir), &p);
    Piece* head = piece_add(&p, "lm_head.weight", piece_find(&p, "model.embed_tokens.weight"));
    check_loads("tied, with an equal lm_head", pieces_save(&p, dir), &p);
    head->values[5] += 1;
    check_load_refused("tied, with another lm_head", pieces_save(&p, dir), "lm_head.weight differs");
    pieces_free(&p);
    write_text(temp("model/config.json"), "{");
    check_load_refused("config.json not JSON", temp("model"), "not JSON");
    unlink(temp("model/config.json"));
    check_load_refused("no config.json", temp("model"), "No such file");
    copy_file("dev/reference/golden/llama/config.json", temp("model/config.json"));
    unlink(temp("model/model.safetensors"));
    check_load_refused("no weights", temp("model"), "No such file");
    mkdir(temp("model/.ready"), 0777);
    check_load_refused("an interrupted save", temp("model"), "--resume");
}

// What checkpoint_save writes is read back with the same bits, for every class, with the optimizer's moments.
static void test_round_trip(const char* dir, const char* name) {
    Error error = {""};
    Model *m = open_model(dir, FOR_TRAINING, 1, 4), *back = NULL;
    fill_random(m->exp_avg, m->layout.total, 1);
    fill_random(m->exp_avg_sq, m->layout.total, 2);
    options_reset();
    const char *out = temp("saved"), *failure;
    remove_tree(out);
    mkdir(out, 0777);
    failure = checkpoint_save(m, out, 17);
    size_t bytes = sizeof(float) * (size_t)m->layout.total;
    Config c;
    if (!failure && config_read(&c, out, &error)) {
        back = model_create(&c, FOR_TRAINING, 1, 4, 4, NULL);
        if (!checkpoint_load(back, out, &error) || !optimizer_load(back, out, &error)) failure = error.text;
    }
    check(!failure && back && !memcmp(&m->config, &c, sizeof c), "%s: the configuration comes back %s", name,
          failure ? failure : error.text);
    check(back && back->layout.total == m->layout.total && !memcmp(m->params, back->params, bytes) &&
              !memcmp(m->exp_avg, back->exp_avg, bytes) && !memcmp(m->exp_avg_sq, back->exp_avg_sq, bytes),
          "%s: parameters and moments come back with the same bits", name);
    check(!exists(temp("saved/.saving")) && !exists(temp("saved/.ready")), "%s: nothing is left over", name);
    size_t n = 0;
    unsigned char* file = (unsigned char*)read_bytes(temp("saved/model.safetensors"), &n);
    long header = 0;
    for (int i = 7; i >= 0 && file; i--) header = header << 8 | file[i];
    check(file && header % 8 == 0 && strstr((const char*)file + 8, "\"__metadata__\":{\"format\":\"pt\"}"),
          "%s: padded header with format pt", name);
    free(file);
    Json* j = json_read(temp("saved/trainer.json"), &error);
    check(json_whole(json_get(j, "step"), 100) == 17, "%s: trainer.json has the step", name);
    json_free(j);
    if (back) model_free(back);
    model_free(m);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints: config.json

// A small valid configuration; `key` gets `value` (NULL: it is left out).
static char* make_config(const char* model_type, const char* key, const char* value) {
    static const char* pairs[][2] = {
        {"vocab_size", "50"},         {"hidden_size", "32"},        {"num_hidden_layers", "3"},
        {"num_attention_heads", "4"}, {"num_key_value_heads", "2"}, {"head_dim", "8"},
        {"intermediate_size", "20"},  {"hidden_act", "\"silu\""},   {"max_position_embeddings", "64"},
        {"rms_norm_eps", "1e-05"},    {"rope_theta", "10000.0"},    {"tie_word_embeddings", "false"},
        {"num_experts_per_tok", "2"}, {"num_experts", "4"},         {"moe_intermediate_size", "10"},
        {"norm_topk_prob", "true"}};
    Text t = {NULL, 0, 0};
    int set = !value;
    text_print(&t, "{\"model_type\": \"%s\"", model_type);
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        const char* v = strcmp(pairs[i][0], key) ? pairs[i][1] : value;
        if (v) text_print(&t, ", \"%s\": %s", pairs[i][0], v);
        set |= !strcmp(pairs[i][0], key);
    }
    if (!set && *key) text_print(&t, ", \"%s\": %s", key, value);
    text_print(&t, "}");
    return t.data;
}

static int config_parse(Config* c, const char* text, Error* error) {
    error->text[0] = 0;
    Json* j = json_parse(text, strlen(text), error);
    int ok = j && config_from_json(c, j, error);
    json_free(j);
    return ok;
}

static void check_config(const char* type, const char* key, const char* value, const char* expected) {
    Config c;
    Error error;
    char* text = make_config(type, key, value);
    int ok = config_parse(&c, text, &error);
    if (!expected)
        check(ok, "%s accepts %s %s %s", type, key, value ? value : "left out", error.text);
    else
        check(!ok && strstr(error.text, expected) && (strstr(error.text, key) || strstr(expected, "partial")),
              "%s refuses %s %s: %s", type, key, value ? value : "left out", error.text);
    free(text);
}

static void test_config_refusals(void) {
    static const struct {
        const char *type, *key, *value, *expected;
    } configs[] = {
        {"llama", "", "", NULL},
        {"mistral", "", "", NULL},
        {"mixtral", "", "", NULL},
        {"olmoe", "", "", NULL},
        {"qwen3", "", "", NULL},
        {"qwen3_moe", "", "", NULL},
        {"llama", "hidden_act", "\"gelu\"", "gelu"},
        {"llama", "hidden_act", "7", "only silu"},
        {"qwen3", "attention_bias", "true", "true"},
        {"qwen3", "attention_bias", "false", NULL},
        {"llama", "mlp_bias", "true", "true"},
        {"olmoe", "clip_qkv", "8.0", "clip_qkv"},
        {"olmoe", "clip_qkv", "null", NULL},
        {"llama", "rope_scaling", "{\"type\": \"linear\", \"factor\": 2.0}", "linear"},
        {"llama", "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8.0}", "llama3"},
        {"llama", "rope_scaling", "{\"factor\": 2.0}", "rope_scaling"},
        {"llama", "rope_scaling", "5", "not an object"},
        {"llama", "rope_scaling", "null", NULL},
        {"llama", "rope_scaling", "{\"rope_type\": \"default\"}", NULL},
        {"qwen3", "rope_parameters", "{\"rope_type\": \"yarn\", \"rope_theta\": 1e6}", "yarn"},
        {"qwen3", "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 1e6}", NULL},
        {"qwen3", "rope_parameters", "{\"rope_theta\": 1e6, \"partial_rotary_factor\": 0.5}", "partial_rotary_factor"},
        {"llama", "partial_rotary_factor", "0.25", "partial_rotary_factor"},
        {"llama", "quantization_config", "{\"bits\": 4}", "quantization_config"},
        {"qwen3_moe", "kv_lora_rank", "512", "kv_lora_rank"},
        {"llama", "hidden_size", "0", "is 0"},
        {"llama", "hidden_size", "\"32\"", "32"},
        {"llama", "hidden_size", "32.5", "32.5"},
        {"llama", "hidden_size", "-32", "-32"},
        {"llama", "num_hidden_layers", "513", "513"},
        {"llama", "vocab_size", "0", "is 0"},
        {"llama", "num_key_value_heads", "3", "is 4, not a multiple"},
        {"llama", "head_dim", "7", "is 7"},
        {"olmoe", "head_dim", "16", "OLMoE"},
        {"mixtral", "num_experts_per_tok", "5", "is 5, but num_experts is 4"},
        {"mixtral", "num_experts_per_tok", "0", "is 0"},
        {"mixtral", "num_experts", "0", "is 0"},
        {"qwen3_moe", "mlp_only_layers", "[3]", "mlp_only_layers"},
        {"qwen3_moe", "mlp_only_layers", "[-1]", "mlp_only_layers"},
        {"qwen3_moe", "mlp_only_layers", "[0, 2]", NULL},
        {"qwen3_moe", "decoder_sparse_step", "0", "is 0"},
        {"qwen3_moe", "decoder_sparse_step", "2", NULL},
        {"qwen3_moe", "norm_topk_prob", "1", "true or false"},
        {"llama", "tie_word_embeddings", "\"no\"", "true or false"},
        {"llama", "rms_norm_eps", "-1e-5", "-1e-5"},
        {"llama", "rms_norm_eps", "\"small\"", "small"},
        {"llama", "rope_theta", "1e99", "1e99"},
        {"qwen3", "layer_types", "[\"full_attention\", \"sliding_attention\"]", "sliding_attention"},
        {"qwen3", "layer_types", "[\"full_attention\", \"full_attention\", \"full_attention\"]", NULL},
        {"mistral", "sliding_window", "-5", "-5"}};
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++)
        check_config(configs[i].type, configs[i].key, configs[i].value, configs[i].expected);
    Config c;
    Error error;
    static const char* types[] = {"gpt2", "deepseek_v3", "Llama", ""};
    for (int i = 0; i < 4; i++) {
        char* text = make_config(types[i], "", "");
        check(!config_parse(&c, text, &error) && strstr(error.text, types[i]) && strstr(error.text, "model_type"),
              "refuses model_type \"%s\": %s", types[i], error.text);
        free(text);
    }
    check(!config_parse(&c, "{}", &error) && strstr(error.text, "model_type"), "refuses an empty configuration: %s",
          error.text);
    check(!config_parse(&c, "[]", &error) && strstr(error.text, "model_type"), "refuses a list: %s", error.text);
    check(!config_parse(&c,
                        "{\"model_type\": \"llama\", \"vocab_size\": 50, \"hidden_size\": 4, \"num_hidden_layers\": 1, "
                        "\"num_attention_heads\": 8, \"intermediate_size\": 5}",
                        &error) &&
              strstr(error.text, "hidden_size is 4"),
          "refuses heads without a dimension: %s", error.text);
    // sizes that are each allowed, but whose product is not
    check(
        !config_parse(
            &c,
            "{\"model_type\": \"qwen3_moe\", \"vocab_size\": 50, \"hidden_size\": 1048576, \"num_hidden_layers\": 512, "
            "\"num_attention_heads\": 4, \"moe_intermediate_size\": 1048576, \"num_experts\": 65536}",
            &error) &&
            strstr(error.text, "parameters"),
        "refuses 10^20 parameters: %s", error.text);
}

// keys that are left out take what transformers' class has as its default
static void test_config_defaults(void) {
    static const struct {
        const char* type;
        int kv, head_dim, positions, window, experts, topk, width;
        double theta, eps, aux;
    } classes[] = {{"llama", 64, 8, 2048, 0, 0, 0, 0, 1e4, 1e-6, 0},
                   {"mistral", 8, 8, 131072, 4096, 0, 0, 0, 1e4, 1e-6, 0},
                   {"mixtral", 8, 8, 131072, 0, 8, 2, 20, 1e6, 1e-5, 0.001},
                   {"olmoe", 64, 8, 4096, 0, 64, 8, 20, 1e4, 1e-5, 0.01},
                   {"qwen3", 32, 128, 32768, 0, 0, 0, 0, 1e4, 1e-6, 0},
                   {"qwen3_moe", 4, 8, 32768, 0, 128, 8, 768, 1e4, 1e-6, 0.001}};
    for (size_t i = 0; i < sizeof classes / sizeof classes[0]; i++) {
        Config c;
        Error error;
        char text[400];
        snprintf(text, sizeof text,
                 "{\"model_type\": \"%s\", \"vocab_size\": 50, \"hidden_size\": 512, \"num_hidden_layers\": 2, "
                 "\"num_attention_heads\": 64, \"intermediate_size\": 20}",
                 classes[i].type);
        int ok = config_parse(&c, text, &error);
        check(ok && c.num_kv_heads == classes[i].kv && c.head_dim == classes[i].head_dim &&
                  c.max_position_embeddings == classes[i].positions && c.rope_theta == classes[i].theta &&
                  c.rms_norm_eps == classes[i].eps && !c.tie_word_embeddings,
              "%s: defaults %s", classes[i].type, error.text);
        check(ok && c.sliding_window == classes[i].window && c.num_experts == classes[i].experts &&
                  c.num_experts_per_tok == classes[i].topk && c.moe_intermediate_size == classes[i].width &&
                  c.router_aux_loss_coef == classes[i].aux && c.norm_topk_prob == (c.arch == MIXTRAL) &&
                  count_sparse(&c) == (classes[i].experts ? 2 : 0),
              "%s: defaults of window and experts", classes[i].type);
    }
}

static void test_config_values(void) {
    Config c;
    Error error;
    char ids[400] = "[1", with_ids[512];
    for (int i = 0; i < 60; i++) strcat(ids, ", 7");
    snprintf(with_ids, sizeof with_ids, "{\"model_type\": \"mixtral\", \"eos_token_id\": %s]}", ids);
    check(config_parse(&c, with_ids, &error) && !strncmp(c.token_ids[1], ids, strlen(ids)), "61 ends of a sequence");
    for (int i = 0; i < 60; i++) strcat(ids, ",7");
    snprintf(with_ids, sizeof with_ids, "{\"model_type\": \"mixtral\", \"eos_token_id\": %s]}", ids);
    check(!config_parse(&c, with_ids, &error) && strstr(error.text, "eos_token_id is longer than 255"),
          "more than can be kept is refused: %s", error.text);
    check(!config_parse(&c, "{\"model_type\": \"mixtral\", \"pad_token_id\": [\"a\"]}", &error) &&
              strstr(error.text, "pad_token_id holds what is not a number"),
          "a token that is no number: %s", error.text);
    check(config_parse(&c, "{\"model_type\": \"mixtral\"}", &error) && c.vocab_size == 32000 && c.hidden_size == 4096 &&
              c.num_layers == 32 && c.num_heads == 32 && c.intermediate_size == 14336,
          "a configuration without sizes is the class's own: %s", error.text);
    check(!config_parse(&c, "{\"model_type\": \"dots1\", \"n_shared_experts\": 0}", &error) &&
              strstr(error.text, "n_routed_experts"),
          "but Dots1 has no number of experts of its own: %s", error.text);
    char* text = make_config("qwen3", "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 777.0}");
    check(config_parse(&c, text, &error) && c.rope_theta == 777, "rope_parameters come before rope_theta");
    free(text);
    text = make_config("mixtral", "num_experts", NULL);
    check(config_parse(&c, text, &error) && c.num_experts == 8, "mixtral: eight experts by default");
    text[strlen(text) - 1] = 0;
    char longer[2000];
    snprintf(longer, sizeof longer, "%s, \"num_local_experts\": 6}", text);
    check(config_parse(&c, longer, &error) && c.num_experts == 6, "num_local_experts is read as well");
    free(text);
    static const struct {
        const char *type, *use, *window;
        int expected;
    } windows[] = {{"mistral", "", "16", 16},
                   {"mistral", "", "null", 0},
                   {"qwen3", "false", "16", 0},
                   {"qwen3", "true", "16", 16},
                   {"llama", "", "16", 0}};
    for (size_t i = 0; i < sizeof windows / sizeof windows[0]; i++) {
        text = make_config(windows[i].type, "sliding_window", windows[i].window);
        text[strlen(text) - 1] = 0;
        snprintf(longer, sizeof longer, "%s%s%s}", text, *windows[i].use ? ", \"use_sliding_window\": " : "",
                 windows[i].use);
        check(config_parse(&c, longer, &error) && c.sliding_window == windows[i].expected,
              "%s: sliding_window %s, use_sliding_window %s: %d", windows[i].type, windows[i].window,
              *windows[i].use ? windows[i].use : "left out", c.sliding_window);
        free(text);
    }
    text = make_config("qwen3_moe", "decoder_sparse_step", "2");
    config_parse(&c, text, &error);
    check(!c.sparse[0] && c.sparse[1] && !c.sparse[2], "decoder_sparse_step 2: the second of three layers");
    free(text);
    text = make_config("qwen3_moe", "mlp_only_layers", "[0, 2]");
    config_parse(&c, text, &error);
    check(!c.sparse[0] && c.sparse[1] && !c.sparse[2], "mlp_only_layers");
    free(text);
}

// config_to_json and back, for all classes, with every switch away from its default
static void test_config_round_trip(void) {
    for (int arch = 0; arch < NUM_ARCHS; arch++) {
        int moe = is_moe((Arch)arch);
        Config c = tiny_config((Arch)arch, 3, moe ? 5 : 0, moe ? 2 : 0), back;
        c.rms_norm_eps = 1e-6;
        c.rope_theta = 123457;
        c.tie_word_embeddings = 1;
        c.router_aux_loss_coef = moe ? 0.02 : 0;
        if (arch == MISTRAL || arch == MIXTRAL) c.sliding_window = 77;
        if (arch == DOTS1) c.router = ROUTER_SIGMOID;
        if (arch == DOTS1) c.qk_norm = QK_NORM_HEAD;
        if (arch == QWEN3_MOE || arch == OLMOE) c.norm_topk_prob = 0;
        if (arch == QWEN3_MOE) c.sparse[1] = 0;
        if (moe && arch != QWEN3_MOE && arch != DOTS1) c.intermediate_size = c.moe_intermediate_size;
        strcpy(c.token_ids[0], "1");
        strcpy(c.token_ids[1], arch == LLAMA ? "[]" : "[2, 7]");
        strcpy(c.token_ids[2], "null");
        Text t = {NULL, 0, 0};
        Error error;
        config_to_json(&t, &c);
        int ok = config_parse(&back, t.data, &error);
        check(ok && !memcmp(&c, &back, sizeof c), "%s: config.json and back %s", archs[arch].model_type, error.text);
        check(strstr(t.data, "\"rms_norm_eps\": 1e-06") && strstr(t.data, "\"rope_theta\": 123457.0"),
              "%s: floats stay floats", archs[arch].model_type);
        free(t.data);
    }
}

static void test_checkpoints(void) {
    test_safetensors_refusals();
    test_halves();
    for (size_t i = 0; i < sizeof golden_models / sizeof golden_models[0]; i++) {
        char dir[PATH_SIZE];
        test_round_trip(join_path(dir, "dev/reference/golden", golden_models[i]), golden_models[i]);
    }
    test_load_dtypes("dev/reference/golden/llama_tied");
    test_load_dtypes("dev/reference/golden/mixtral");
    for (int weight = 0; weight < 2; weight++) {
        const char* suffix = weight ? ".weight" : "";
        test_load_packed("dev/reference/golden/qwen3_moe", "mlp", suffix);
        test_load_packed("dev/reference/golden/olmoe", "mlp", suffix);
        test_load_packed("dev/reference/golden/mixtral", "mlp", suffix);
        test_load_packed("dev/reference/golden/mixtral", "block_sparse_moe", suffix);
    }
    test_load_shards("dev/reference/golden/qwen3_moe");
    test_load_refusals();
    test_config_refusals();
    test_config_defaults();
    test_config_values();
    test_config_round_trip();
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole runs: the same bytes whatever the number of threads, and whatever happens on the way

// a run that is short, but has everything: accumulation, validation, a schedule that depends on the step
static const char* small_run =
    "--val-every 2 --val-batches 2 --layers 2 --hidden 40 --heads 4 --seq 24 --batch 3 --lr 0.01 --warmup 2";
static const char* small_experts = "--experts 5 --expert-ffn 24";

// Starts a training run in OUT under the temporary directory, on the corpus there.
static pid_t start_training(const char* out, const char* more, long file_limit) {
    char arguments[4096];
    snprintf(arguments, sizeof arguments, "--data %s --out %s %s", temp("corpus.txt"), temp("%s", out), more);
    return start_program(arguments, file_limit);
}

static int train_run(const char* out, const char* more) {
    remove_tree(temp("%s", out));
    char arguments[2048];
    snprintf(arguments, sizeof arguments, "%s %s %s", small_run, strstr(more, "--dense") ? "" : small_experts, more);
    return finish_program(start_training(out, arguments, 0));
}

static int resume_run(const char* out, const char* more) {
    return run_program("--out %s --resume %s", temp("%s", out), more);
}

static int same_in(const char* a, const char* b, const char* name) {
    return same_file(temp("%s/%s", a, name), temp("%s/%s", b, name));
}

// model, optimizer, configuration and trainer.json have the same bytes
static int same_checkpoint(const char* a, const char* b) {
    return same_in(a, b, "model.safetensors") && same_in(a, b, "optimizer.safetensors") &&
           same_in(a, b, "config.json") && same_in(a, b, "trainer.json");
}

// log.csv without its column tokens_per_s, which is a time
static char* read_log(const char* out) {
    size_t n = 0, kept = 0;
    char* text = read_bytes(temp("%s/log.csv", out), &n);
    int column = 0;
    for (size_t i = 0; i < n; i++) {
        if (column != 7) text[kept++] = text[i];
        column = text[i] == '\n' ? 0 : column + (text[i] == ',');
    }
    if (text) text[kept] = 0;
    return text;
}

static int same_logs(const char* a, const char* b) {
    char *x = read_log(a), *y = read_log(b);
    int same = x && y && strlen(x) > 100 && !strcmp(x, y);
    free(x);
    free(y);
    return same && same_in(a, b, "val.csv") && same_in(a, b, "load.csv");
}

// the step of the checkpoint in OUT; 0: there is none
static long saved_step(const char* out) {
    Error error = {""};
    const char* path = temp("%s/trainer.json", out);
    Json* j = exists(path) ? json_read(path, &error) : NULL;
    long step = j ? json_whole(json_get(j, "step"), LONG_MAX) : 0;
    json_free(j);
    return step;
}

static void sleep_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

// waits until log.csv in OUT has so many rows, or the run has ended: 0
static int wait_for_rows(pid_t pid, const char* out, int rows) {
    siginfo_t info;
    for (int i = 0; i < 60000; i++) {
        memset(&info, 0, sizeof info);
        if (count_lines(temp("%s/log.csv", out)) > rows) return 1;
        if (!waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid) return 0;
        sleep_ms(1);
    }
    return 0;
}

static void test_threads(const char* name, const char* more) {
    static const int counts[] = {1, 2, 3, 8};
    char arguments[512];
    int same = 1, ok = 1;
    for (int i = 0; i < 4; i++) {
        snprintf(arguments, sizeof arguments, "--steps 3 --accum 2 --threads %d %s", counts[i], more);
        ok &= train_run(i ? "b" : "a", arguments) == 0;
        if (i) same &= same_checkpoint("a", "b") && same_logs("a", "b");
    }
    check(ok && same, "%s: 1, 2, 3 and 8 threads write the same bytes", name);
    show_failure(ok);
}

// Stops at each step (a constant schedule: then the number of steps changes nothing else) and goes on.
static void test_stop_and_resume(const char* name, const char* more) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "--schedule constant --val-every 1 --steps 6 --accum 2 %s", more);
    int ok = train_run("a", arguments) == 0;
    for (int stop = 1; stop <= 5; stop += 2) {
        snprintf(arguments, sizeof arguments, "--schedule constant --val-every 1 --steps %d --accum 2 %s", stop, more);
        ok &= train_run("b", arguments) == 0;
        ok &= saved_step("b") == stop;
        ok &= resume_run("b", "--steps 6") == 0;
        ok &= same_checkpoint("a", "b") && same_logs("a", "b");
    }
    check(ok, "%s: stopping at steps 1, 3, 5 and resuming changes no byte and no row", name);
    show_failure(ok);
}

static void test_signal(int signal_number, const char* name, const char* reference, int steps) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "%s %s --steps %d", small_run, small_experts, steps);
    remove_tree(temp("b"));
    pid_t pid = start_training("b", arguments, 0);
    int in_time = wait_for_rows(pid, "b", 7);
    kill(pid, signal_number);
    usleep(500);
    kill(pid, signal_number);           // as timeout(1) does: first the process, then its group
    int code = finish_program(pid);
    long step = saved_step("b");
    check(in_time && code == 128 + signal_number && step >= 7 && step < steps, "%s: exit code %d, step %ld is saved",
          name, code, step);
    show_failure(code == 128 + signal_number);
    char said[64];
    snprintf(said, sizeof said, "step %ld is saved", step);
    check(error_lines() == 1 && strstr(ran.err, said), "%s: says so in one line", name);
    // rows that were written after the checkpoint are dropped by --resume
    Text torn = {NULL, 0, 0};
    size_t n = 0;
    char* log = read_bytes(temp("b/log.csv"), &n);
    if (log) text_add(&torn, log, n);
    text_print(&torn, "%ld,999,9.9\n%ld,9", step + 1, step + 2);
    write_bytes(temp("b/log.csv"), torn.data, torn.length);
    free(log);
    free(torn.data);
    code = resume_run("b", "");
    check(code == 0 && same_checkpoint(reference, "b") && same_logs(reference, "b"),
          "%s: resuming gives the bytes of a run that was not stopped", name);
    show_failure(code == 0);
}

// Under nohup a run survives the end of its terminal; SIGTERM still ends it.
static void test_nohup(void) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "%s %s --steps 100000", small_run, small_experts);
    remove_tree(temp("b"));
    signal(SIGHUP, SIG_IGN); // which the run inherits
    pid_t pid = start_training("b", arguments, 0);
    signal(SIGHUP, SIG_DFL);
    int running = wait_for_rows(pid, "b", 3);
    kill(pid, SIGHUP);
    usleep(50000);
    kill(pid, SIGTERM);
    int code = finish_program(pid);
    check(running && code == 128 + SIGTERM, "nohup: SIGHUP is ignored, SIGTERM is not: exit code %d", code);
}

// kill -9 at random moments of a run that saves every step: the last checkpoint is always whole.
static void test_kill(void) {
    int ok = train_run("a", "--steps 25 --save-every 1") == 0, kills = 0, finished = 0, unreadable = 0, backwards = 0,
        none = 0, ready = 0;
    long step = 0;
    remove_tree(temp("b"));
    for (int turn = 0; turn < 60 && !finished; turn++) {
        int started = saved_step("b") > 0 || exists(temp("b/.ready"));
        char arguments[512];
        snprintf(arguments, sizeof arguments, "%s %s --steps 25 --save-every 1", small_run, small_experts);
        pid_t pid = started ? start_training("b", "--resume", 0) : start_training("b", arguments, 0);
        wait_for_rows(pid, "b", (int)step + 1); // at least one step further, then any moment
        struct timespec moment = {0, (long)(random_uniform(mix64((uint64_t)turn)) * 4e7)};
        nanosleep(&moment, NULL);
        if (kills < 40) kill(pid, SIGKILL);
        int code = finish_program(pid);
        if (code == 0)
            finished = 1;
        else if (code == -SIGKILL)
            kills++;
        else
            unreadable++;
        none += !started;
        ready += exists(temp("b/.ready"));
        long now = saved_step("b");
        backwards += now < step;
        step = now > step ? now : step;
        if (unreadable) break;
    }
    check(ok && finished && unreadable == 0,
          "killed %d times (%d with a save half moved in): each time --resume could go on", kills, ready);
    show_failure(unreadable == 0);
    check(kills >= 5 && backwards == 0 && none < 4, "no step was lost twice");
    check(same_checkpoint("a", "b") && same_logs("a", "b"), "after all that, the same bytes as without it");
}

// A save that was interrupted while it moved in: any of the new files may be in OUT already, the others are in .ready.
static void test_ready(void) {
    static const char* files[] = {"config.json", "trainer.json", "model.safetensors", "optimizer.safetensors"};
    int ok = train_run("a", "--schedule constant --val-every 1 --steps 4") == 0 &&
             train_run("old", "--schedule constant --val-every 1 --steps 2") == 0;
    int refused = 1, same = 1, cleaned = 1;
    for (int moved = 0; moved < 16; moved += 3) {
        remove_tree(temp("b"));
        copy_directory(temp("old"), temp("b"));
        copy_file(temp("a/log.csv"), temp("b/log.csv"));
        copy_file(temp("a/val.csv"), temp("b/val.csv"));
        copy_file(temp("a/load.csv"), temp("b/load.csv"));
        mkdir(temp("b/.ready"), 0777);
        for (int f = 0; f < 4; f++)
            copy_file(temp("a/%s", files[f]), moved >> f & 1 ? temp("b/%s", files[f]) : temp("b/.ready/%s", files[f]));
        refused &= run_program("--model %s --data %s --seq 8 --eval", temp("b"), temp("corpus.txt")) == 2 &&
                   strstr(ran.err, "--resume");
        ok &= resume_run("b", "--steps 4") == 0;
        same &= same_checkpoint("a", "b") && same_logs("a", "b");
        cleaned &= !exists(temp("b/.ready"));
    }
    check(refused, "a half-moved save is not read as a model");
    check(ok && same && cleaned, "--resume finishes a half-moved save, whichever files had been moved");
    show_failure(ok);
    mkdir(temp("b/.ready"), 0777);
    check(resume_run("b", "--steps 4") == 0 && !exists(temp("b/.ready")) && same_checkpoint("a", "b"),
          "an empty .ready is finished too");
    mkdir(temp("b/.saving"), 0777);
    write_text(temp("b/.saving/model.safetensors"), "half");
    check(resume_run("b", "--steps 5") == 0 && !exists(temp("b/.saving")) && saved_step("b") == 5,
          "the remains of a save that failed are overwritten");
    show_failure(ran.code == 0);
}

static void test_lock(void) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "%s --steps 100000", small_run);
    remove_tree(temp("b"));
    pid_t pid = start_training("b", arguments, 0);
    int running = wait_for_rows(pid, "b", 1);
    int code = resume_run("b", "--steps 5");
    check(running && code == 2 && strstr(ran.err, "another run is writing there") && error_lines() == 1,
          "a second run in the same --out: %s", ran.err);
    snprintf(arguments, sizeof arguments, "--data %s --out %s %s", temp("corpus.txt"), temp("b"), small_run);
    code = run_program("%s", arguments);
    check(code == 2 && strstr(ran.err, "another run is writing there"), "the same without --resume");
    kill(pid, SIGTERM);
    check(finish_program(pid) == 143, "the first run is not disturbed");
    code = run_program("%s", arguments);
    check(code == 2 && strstr(ran.err, "--resume goes on with that run"), "a new run in --out with a run in it: %s",
          ran.err);
}

static void test_determinism(void) {
    write_corpus(temp("corpus.txt"), 20000);
    test_threads("qwen3_moe", "");
    test_threads("mixtral", "--arch mixtral --head-dim 14 --z-loss 0.001 --aux-form hf");
    test_threads("olmoe", "--arch olmoe --norm-topk 0 --tie");
    test_threads("dense", "--dense --kv-heads 1");
    test_threads("sigmoid, random K, logit norm", "--router sigmoid --topk-range 1:3 --logit-norm 5");
    test_threads("LPR", "--router lpr");
    test_stop_and_resume("qwen3_moe", "--sparse-step 2");
    test_stop_and_resume("dense", "--dense --tie");
    test_stop_and_resume("adaptive aux, random K", "--aux-adaptive --topk-range 1:4");
    test_stop_and_resume("sigmoid", "--router sigmoid --bias-rate 0.01");
    test_stop_and_resume("LPR", "--router lpr");
    train_run("a", "--steps 60");
    test_signal(SIGTERM, "SIGTERM", "a", 60);
    test_signal(SIGINT, "SIGINT", "a", 60);
    test_signal(SIGHUP, "SIGHUP", "a", 60);
    test_nohup();
    test_kill();
    test_ready();
    test_lock();
}

// ---------------------------------------------------------------------------------------------------------------------
// Disk full

// The limit on the size of a file makes longer writes fail, as a full disk does. dev/full_disk.sh fills a real one.
static void test_limit(const char* what, long limit) {
    int code = train_run("a", "--schedule constant --val-every 1 --steps 2");
    remove_tree(temp("b"));
    copy_directory(temp("a"), temp("b"));
    char arguments[512];
    snprintf(arguments, sizeof arguments, "--out %s --resume --steps 4", temp("b"));
    int failed_code = finish_program(start_program(arguments, limit));
    check(code == 0 && failed_code == 1 && error_lines() == 1 && strstr(ran.err, "could not be saved") &&
              strstr(ran.err, "the checkpoint of step 2") && strstr(ran.err, "File too large"),
          "%s: exit code 1 and one line", what);
    show_failure(failed_code == 1 && error_lines() == 1);
    check(same_checkpoint("a", "b") && !exists(temp("b/.saving")) && !exists(temp("b/.ready")),
          "%s: the last checkpoint is intact, nothing else is left", what);
    Error error = {""};
    Model* m = try_load(temp("b"), &error);
    check(m != NULL, "%s: the last checkpoint can be loaded %s", what, error.text);
    if (m) model_free(m);
    code = resume_run("b", "--steps 4");
    train_run("a", "--schedule constant --val-every 1 --steps 4");
    check(code == 0 && same_checkpoint("a", "b") && same_logs("a", "b"),
          "%s: with room again, --resume gives the bytes of an undisturbed run", what);
}

static void test_disk_full(void) {
    struct stat model, optimizer;
    write_corpus(temp("corpus.txt"), 20000);
    train_run("a", "--steps 1");
    remove_tree(temp("c"));
    remove_tree(temp("d.safetensors"));
    if (stat(temp("a/model.safetensors"), &model) || stat(temp("a/optimizer.safetensors"), &optimizer)) {
        check(0, "a run that saves");
        show_failure(0);
        return;
    }
    test_limit("half a model fits", (long)model.st_size / 2);
    test_limit("all but the last byte of the model fits", (long)model.st_size - 1);
    test_limit("the model fits, its optimizer does not", (long)optimizer.st_size - 1);

    char arguments[1024];
    snprintf(arguments, sizeof arguments, "--data %s --out %s --steps 2 %s", temp("corpus.txt"), temp("c"), small_run);
    int code = finish_program(start_program(arguments, (long)model.st_size / 2));
    check(code == 1 && error_lines() == 1 && strstr(ran.err, "holds no checkpoint"),
          "the first save fails: says that there is none");
    show_failure(code == 1);
    check(!exists(temp("c/.saving")) && !exists(temp("c/model.safetensors")), "the first save fails: nothing is left");
    snprintf(arguments, sizeof arguments, "--model %s --data %s --batch 2 --seq 8 --dump %s", temp("a"),
             temp("corpus.txt"), temp("d.safetensors"));
    code = finish_program(start_program(arguments, 10000));
    check(code == 1 && error_lines() == 1, "--dump fails: exit code 1 and one line");
    check(!exists(temp("d.safetensors")) && !exists(temp("d.safetensors.saving")), "--dump fails: no file is left");
}

// ---------------------------------------------------------------------------------------------------------------------
// Data

static void put_i32(Text* t, long value) {
    char bytes[4] = {(char)value, (char)(value >> 8), (char)(value >> 16), (char)(value >> 24)};
    text_add(t, bytes, 4);
}

// A shard of `count` tokens (token i is first + i) whose header has these numbers; it promises `promised` tokens.
static void write_shard(const char* path, long magic, long version, long promised, int width, long count, long first) {
    Text t = {NULL, 0, 0};
    put_i32(&t, magic);
    put_i32(&t, version);
    put_i32(&t, promised);
    while (t.length < SHARD_HEADER) put_i32(&t, 0);
    for (long i = 0; i < count; i++) {
        char bytes[4] = {(char)(first + i), (char)((first + i) >> 8), (char)((first + i) >> 16),
                         (char)((first + i) >> 24)};
        text_add(&t, bytes, (size_t)width);
    }
    write_bytes(path, t.data, t.length);
    free(t.data);
}

// window w of the data set starts with token `first` and goes on by ones
static int window_is(Dataset* d, long w, int first) {
    int tokens[64], targets[64], ok = 1;
    dataset_window(d, w, tokens, targets);
    for (int t = 0; t < d->T; t++) ok &= tokens[t] == first + t && targets[t] == first + t + 1;
    return ok;
}

static void test_windows(void) {
    unsigned char text[250];
    for (int i = 0; i < 250; i++) text[i] = (unsigned char)i;
    write_bytes(temp("text"), text, 250);
    // T = 8: windows of 9 tokens start every 8; the last tenth, 25 bytes, is for validation
    Dataset *all = dataset_open(temp("text"), 8, 256, WHOLE, BYTES),
            *part = dataset_open(temp("text"), 8, 256, TRAIN_PART, BYTES);
    Dataset* val = dataset_open(temp("text"), 8, 256, VAL_PART, BYTES);
    check(all->raw && all->tokens == 250 && all->windows == 31 && window_is(all, 0, 0) && window_is(all, 1, 8) &&
              window_is(all, 30, 240),
          "text: windows of T + 1 tokens start every T");
    check(part->tokens == 225 && part->windows == 28 && window_is(part, 27, 216),
          "text: training has all but the last tenth");
    check(val->tokens == 25 && val->windows == 3 && window_is(val, 0, 225) && window_is(val, 2, 241),
          "text: validation has the last tenth");
    dataset_close(all);
    dataset_close(part);
    dataset_close(val);
    write_bytes(temp("text"), text, 60);
    part = dataset_open(temp("text"), 8, 256, TRAIN_PART, BYTES);
    val = dataset_open(temp("text"), 8, 256, VAL_PART, BYTES);
    check(part->tokens == 51 && val->tokens == 9 && val->windows == 1 && window_is(val, 0, 51),
          "short text: validation has one whole window");
    dataset_close(part);
    dataset_close(val);
    write_bytes(temp("text"), text, 9);
    all = dataset_open(temp("text"), 8, 256, WHOLE, BYTES);
    check(all->windows == 1 && window_is(all, 0, 0), "a text of T + 1 bytes is one window");
    dataset_close(all);
    write_bytes(temp("text"), text, 17);
    all = dataset_open(temp("text"), 8, 256, WHOLE, BYTES);
    check(all->windows == 2 && window_is(all, 1, 8), "a text of 2 T + 1 bytes is two windows");
    dataset_close(all);
}

static void test_shards(void) {
    write_shard(temp("s_1.bin"), SHARD_MAGIC_16, 1, 9, 2, 9, 60000); // exactly one window
    write_shard(temp("s_0.bin"), SHARD_MAGIC_32, 7, 30, 4, 30, 100000); // 3 windows, 5 tokens are left over
    write_shard(temp("other.bin"), SHARD_MAGIC_16, 1, 17, 2, 17, 500);
    Dataset* d = dataset_open(temp("s_1.bin"), 8, 70000, TRAIN_PART, NO_BYTES);
    check(!d->raw && d->windows == 1 && d->tokens == 9 && window_is(d, 0, 60000),
          "uint16 shard of T + 1 tokens: used whole, one window");
    dataset_close(d);
    d = dataset_open(temp("s_0.bin"), 8, 200000, VAL_PART, NO_BYTES);
    check(d->windows == 3 && d->tokens == 30 && window_is(d, 2, 100016), "uint32 shard");
    dataset_close(d);
    char list[2000];
    snprintf(list, sizeof list, "%s,%s", temp("other.bin"), temp("s_*.bin"));
    d = dataset_open(list, 8, 200000, WHOLE, NO_BYTES);
    check(d->num_files == 3 && d->windows == 6 && window_is(d, 0, 500) && window_is(d, 1, 508) &&
              window_is(d, 2, 100000) && window_is(d, 4, 100016) && window_is(d, 5, 60000),
          "a list and a pattern: in the list's order, a pattern's files by name");
    // training visits every window once an epoch; batches may straddle epochs
    int tokens[8], targets[8], seen[6], firsts[30], same_order = 1, other_seed = 1, once = 1;
    static const int starts[] = {500, 508, 100000, 100008, 100016, 60000};
    for (int epoch = 0; epoch < 5; epoch++) {
        memset(seen, 0, sizeof seen);
        for (int i = 0; i < 6; i++) {
            dataset_training_sequence(d, 3, epoch * 6 + i, tokens, targets);
            for (int w = 0; w < 6; w++) seen[w] += tokens[0] == starts[w];
            firsts[epoch * 6 + i] = tokens[0];
            same_order &= tokens[0] == firsts[i];
            dataset_training_sequence(d, 4, epoch * 6 + i, tokens, targets);
            other_seed &= tokens[0] == firsts[epoch * 6 + i];
        }
        for (int w = 0; w < 6; w++) once &= seen[w] == 1;
    }
    check(once, "training visits each window once an epoch");
    check(!same_order && !other_seed, "the order is another one in every epoch and for every seed");
    dataset_close(d);
}

// Our logarithm and cosine against the library's, at the ends and at a million places between; moments of the draws.
static void test_normal(void) {
    double log_error = 0, cos_error = 0, sum = 0, squares = 0;
    enum { COUNT = 1 << 20 };
    for (long i = 0; i < COUNT; i++) {
        long k = i < 1000 ? i : i < 2000 ? (1 << 24) - 1 - (i - 1000) : (long)(mix64((uint64_t)i) >> 40);
        double u = ((double)k + 0.5) / 16777216.0, x = random_normal(mix64((uint64_t)i));
        log_error = fmax(log_error, fabs(unit_log(u) / log(u) - 1));
        cos_error = fmax(cos_error, fabs(unit_cos(u) - cos(2 * M_PI * u)));
        sum += x;
        squares += x * x;
    }
    check(log_error < 1e-15, "ln u: relative error %.1e", log_error);
    check(cos_error < 1e-15, "cos 2 pi u: error %.1e", cos_error);
    check(fabs(sum / COUNT) < 4e-3 && fabs(squares / COUNT - 1) < 6e-3, "normal draws: mean %.1e, variance %.4f",
          sum / COUNT, squares / COUNT);
}

static void test_permutation(void) {
    static const long sizes[] = {1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 65537};
    int bijection = 1, moved = 1;
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        char* hit = (char*)checked_malloc((size_t)sizes[s]);
        long fixed = 0;
        memset(hit, 0, (size_t)sizes[s]);
        for (long i = 0; i < sizes[s]; i++) {
            long p = random_permutation(i, sizes[s], 12345 + s);
            bijection &= p >= 0 && p < sizes[s] && !hit[p];
            if (p >= 0 && p < sizes[s]) hit[p] = 1;
            fixed += p == i;
        }
        if (sizes[s] >= 255) moved &= fixed < 12;
        free(hit);
    }
    check(bijection, "the random permutation is a bijection for 1 to 65537 elements");
    check(moved, "the random permutation leaves few elements in place");
}

// what a run says to data that it cannot use; nothing is written
static void check_data_error(const char* what, const char* data, const char* more, const char* expected,
                             const char* file) {
    int code = run_program("--data %s --out %s --layers 1 --hidden 8 --heads 1 --batch 1 --seq 8 --steps 3 %s", data,
                           temp("none"), more);
    check(code == 2 && error_lines() == 1 && strstr(ran.err, expected) && strstr(ran.err, file), "%s: %s", what,
          ran.err);
    if (strstr(what, "token ")) remove_tree(temp("none")); // found while training: the run has begun
    check(!exists(temp("none")), "%s: nothing is written", what);
    remove_tree(temp("none"));
}

static void test_data_errors(void) {
    char bin[512], text[512], list[1100];
    snprintf(bin, sizeof bin, "%s", temp("bad.bin"));
    snprintf(text, sizeof text, "%s", temp("text"));
    write_bytes(bin, "\1\2\3\4 something else", 19);
    check_data_error("wrong magic", bin, "", "magic 67305985 at byte 0", "bad.bin");
    write_bytes(bin, "", 0);
    check_data_error("empty .bin", bin, "", "magic", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 2, 30, 2, 30, 0);
    check_data_error("wrong version", bin, "--vocab 50", "version 2 at byte 4, expected 1", "bad.bin");
    write_shard(bin, SHARD_MAGIC_32, 1, 30, 4, 30, 0);
    check_data_error("wrong version of uint32", bin, "--vocab 50", "version 1 at byte 4, expected 7", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 31, 2, 30, 0);
    check_data_error("fewer tokens than promised", bin, "--vocab 50",
                     "promises 31 tokens, which makes 1086 bytes, but the file has 1084", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 29, 2, 30, 0);
    check_data_error("more tokens than promised", bin, "--vocab 50", "promises 29 tokens", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, -1, 2, 30, 0);
    check_data_error("negative count", bin, "--vocab 50", "promises -1 tokens", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 8, 2, 8, 0);
    check_data_error("shard too short", bin, "--vocab 50", "8 tokens, but --seq 8 needs at least 9", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 30, 2, 30, 30);
    check_data_error("token outside the vocabulary", bin, "--vocab 50",
                     "token 50 at byte 1064; the vocabulary has 0 to 49", "bad.bin");
    write_shard(bin, SHARD_MAGIC_32, 7, 12, 4, 12, -3);
    check_data_error("token below zero", bin, "--vocab 50", "token -3 at byte 1024; the vocabulary has 0 to 49",
                     "bad.bin");
    check_data_error("no --vocab", bin, "", "--vocab is missing", "");
    if (truncate(bin, 100)) die(1, "truncate: %s", strerror(errno));
    check_data_error("half a header", bin, "", "the header ends at byte 100", "bad.bin");
    write_text(text, "short");
    check_data_error("text too short", text, "--val none", "5 bytes, but --seq 8 needs at least 9", "text");
    write_text(text, "seventeen letters");
    check_data_error("text too short for two parts", text, "", "17 bytes, but --seq 8 needs at least 18 (half of them",
                     "text");
    write_text(text, "");
    check_data_error("empty text", text, "", "0 bytes", "text");
    write_corpus(text, 500);
    check_data_error("text for a small vocabulary", text, "--vocab 100", "does not read bytes", "text");
    write_shard(bin, SHARD_MAGIC_16, 1, 30, 2, 30, 0);
    snprintf(list, sizeof list, "%s,%s", text, bin);
    check_data_error("text and shards together", list, "--val none", "cannot be mixed", "bad.bin");
    check_data_error("missing file", temp("absent.txt"), "", "No such file", "absent.txt");
    check_data_error("pattern without a match", temp("absent*.txt"), "", "No such file", "absent*.txt");
    snprintf(list, sizeof list, "%s,", text);
    check_data_error("a comma too many", list, "", "No such file", "");
    check_data_error("directory", temp_dir, "", "not a regular file", temp_dir);
    snprintf(list, sizeof list, "--val %s", temp("absent.txt"));
    check_data_error("missing --val", text, list, "No such file", "absent.txt");
}

static void test_data(void) {
    test_windows();
    test_shards();
    test_normal();
    test_permutation();
    test_data_errors();
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling

// how often each token comes in n draws that cover (0, 1) evenly
static void count_draws(const float* logits, int V, double temperature, int top_k, double top_p, int n, int* counts) {
    Candidate candidates[16];
    memset(counts, 0, sizeof(int) * (size_t)V);
    for (int i = 0; i < n; i++) counts[sample_token(logits, V, temperature, top_k, top_p, (i + 0.5) / n, candidates)]++;
}

static void test_draws(void) {
    enum { V = 6, N = 60000 };
    // probabilities 0.4, 0.05, 0.3, 0.1, 0.1, 0.05
    static const double p[V] = {0.4, 0.05, 0.3, 0.1, 0.1, 0.05};
    float logits[V];
    int counts[V], ok = 1;
    for (int v = 0; v < V; v++) logits[v] = (float)log(p[v]) + 3;
    count_draws(logits, V, 0, 0, 1, 100, counts);
    check(counts[0] == 100, "temperature 0 takes the likeliest");
    logits[2] = logits[0];
    count_draws(logits, V, 0, 0, 1, 100, counts);
    check(counts[0] == 100, "of equally likely ones temperature 0 takes the first");
    logits[2] = (float)log(0.3) + 3;
    count_draws(logits, V, 1, 0, 1, N, counts);
    for (int v = 0; v < V; v++) ok &= abs(counts[v] - (int)(N * p[v])) <= 2;
    check(ok, "temperature 1 draws by probability");
    double sum = 0;
    for (int v = 0; v < V; v++) sum += sqrt(p[v]);
    count_draws(logits, V, 2, 0, 1, N, counts);
    ok = 1;
    for (int v = 0; v < V; v++) ok &= abs(counts[v] - (int)(N * sqrt(p[v]) / sum)) <= 2;
    check(ok, "temperature 2 draws by the root of the probability");
    count_draws(logits, V, 1, 2, 1, N, counts);
    check(abs(counts[0] - N * 4 / 7) <= 2 && abs(counts[2] - N * 3 / 7) <= 2, "top-k 2 draws from the two likeliest");
    count_draws(logits, V, 1, 4, 1, N, counts);
    check(counts[3] > 0 && counts[4] > 0 && counts[1] + counts[5] == 0, "top-k 4 leaves out the two least likely");
    count_draws(logits, V, 1, 100, 1, N, counts);
    check(counts[1] > 0 && counts[5] > 0, "a top-k beyond the vocabulary is no limit");
    count_draws(logits, V, 1, 0, 0.65, N, counts);
    check(counts[0] > 0 && counts[2] > 0 && counts[0] + counts[2] == N, "top-p 0.65 keeps 0.4 + 0.3");
    count_draws(logits, V, 1, 0, 0.75, N, counts);
    check(counts[3] > 0 && counts[0] + counts[2] + counts[3] == N, "top-p 0.75 keeps a third, of equals the first");
    count_draws(logits, V, 1, 0, 0, N, counts);
    check(counts[0] == N, "top-p 0 keeps the likeliest");
    count_draws(logits, V, 1, 1, 1, N, counts);
    check(counts[0] == N, "top-k 1 keeps the likeliest");
    // top-p is of what top-k leaves, as in transformers: 0.4 of 0.4 + 0.3 is more than half of it, but not of all
    count_draws(logits, V, 1, 2, 0.5, N, counts);
    check(counts[0] == N, "top-k comes before top-p");
    count_draws(logits, V, 1, 2, 0.6, N, counts);
    check(counts[0] + counts[2] == N && counts[2] > 0, "top-k and top-p together");
    for (int v = 0; v < V; v++) logits[v] = v == 4 ? 30000.0f : -30000.0f;
    count_draws(logits, V, 0.01, 0, 1, 100, counts);
    check(counts[4] == 100, "large logits do not overflow");
}

static Tokenizer* make_tokenizer(const char* json, const char* config, int V) {
    remove_tree(temp("tokenizer"));
    mkdir(temp("tokenizer"), 0777);
    if (json) write_text(temp("tokenizer/tokenizer.json"), json);
    write_text(temp("tokenizer/config.json"), config);
    return tokenizer_open(temp("tokenizer"), V);
}

// what these tokens print, one after the other
static void check_printed(const Tokenizer* t, const char* what, const int* ids, int n, const char* expected,
                          size_t length) {
    char* text = NULL;
    size_t size = 0;
    FILE* out = open_memstream(&text, &size);
    int first = t->pieces && !t->pieces[ids[0]] ? 1 : 0;
    for (int i = 0; i < n; i++) tokenizer_print(t, ids[i], i <= first, out);
    fclose(out);
    check(size == length && !memcmp(text, expected, length), "%s", what);
    free(text);
}

static void test_tokenizers(void) {
    // GPT-2's alphabet: \u0120 is a space, \u010a a newline, \u00c3 \u00a9 the two bytes of an e with an acute accent
    Tokenizer* t = make_tokenizer(
        "{\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"ByteLevel\"}]}, \"model\": {\"type\": "
        "\"BPE\", \"vocab\": "
        "{\"Hello\": 0, \"\\u0120world\": 1, \"\\u010a\": 2, \"\\u00c3\\u00a9\": 3, \"\\u0100\": 4, \"far\": 99}}, "
        "\"added_tokens\": "
        "[{\"id\": 5, \"content\": \"<|end|>\", \"special\": true}, {\"id\": 6, \"content\": \"<tool>\", \"special\": "
        "false}]}",
        "{\"eos_token_id\": 5}", 8);
    int a[] = {0, 1, 2, 3, 4, 5, 6, 7}, b[] = {5, 1}, c[] = {1};
    check_printed(t, "byte-level pieces, special tokens print nothing", a, 8, "Hello world\n\xC3\xA9\0<tool>", 21);
    check_printed(t, "byte-level: a first space is kept", b, 2, " world", 6);
    check_printed(t, "byte-level: a first space is kept without a special token before it", c, 1, " world", 6);
    check(t->num_eos == 1 && t->eos[0] == 5, "one end-of-sequence token");
    tokenizer_close(t);

    // SentencePiece's alphabet: \u2581 is a space; bytes that have no piece are <0xNN>
    t = make_tokenizer(
        "{\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\"}, {\"type\": "
        "\"ByteFallback\"}]}, \"model\": "
        "{\"type\": \"BPE\", \"vocab\": {\"<s>\": 0, \"\\u2581Once\": 1, \"\\u2581upon\": 2, \"<0x0A>\": 3, "
        "\"<0xC3>\": 4, \"<0xA9>\": 5, "
        "\"\\u00e9t\": 6, \"<0x4>\": 7}}, \"added_tokens\": [{\"id\": 0, \"content\": \"<s>\", \"special\": true}]}",
        "{\"eos_token_id\": [2, 7, 9]}", 8);
    int d[] = {0, 1, 2, 3, 4, 5, 6, 7}, e[] = {1, 1}, f[] = {0, 2, 2};
    check_printed(t, "SentencePiece pieces with byte fallback", d, 8, "Once upon\n\xC3\xA9\xC3\xA9t<0x4>", 20);
    check_printed(t, "SentencePiece: no space before the first word", e, 2, "Once Once", 9);
    check_printed(t, "SentencePiece: nor after a begin-of-sequence token", f, 3, "upon upon", 9);
    check(t->num_eos == 3 && t->eos[0] == 2 && t->eos[2] == 9, "a list of end-of-sequence tokens");
    tokenizer_close(t);

    t = make_tokenizer(
        "{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"<unk>\", 0.0], [\"\\u2581a\", -1.5], [\"b\", -2]]}}", "{}",
        3);
    int g[] = {1, 2, 1};
    check_printed(t, "a Unigram vocabulary", g, 3, "ab a", 4);
    tokenizer_close(t);
    t = make_tokenizer(NULL, "{\"eos_token_id\": null}", 256);
    int h[] = {72, 105, 200, 10};
    check_printed(t, "without tokenizer.json tokens are bytes", h, 4, "Hi\xC8\n", 4);
    check(t->num_eos == 0, "no end-of-sequence token");
    tokenizer_close(t);
    write_text(temp("tokenizer/generation_config.json"), "{\"eos_token_id\": 3}");
    write_text(temp("tokenizer/config.json"), "{\"eos_token_id\": 4}");
    t = tokenizer_open(temp("tokenizer"), 256);
    check(t->num_eos == 1 && t->eos[0] == 3, "generation_config.json comes before config.json");
    tokenizer_close(t);
    t = make_tokenizer("{\"model\": {\"vocab\": {\"a\": -1, \"b\": 1e300, \"c\": 2, \"d\": 0.5}}}",
                       "{\"eos_token_id\": 1e300}", 3);
    int i[] = {2};
    check_printed(t, "numbers that are no token are left out", i, 1, "c", 1);
    tokenizer_close(t);
}

// Generation stops at the end-of-sequence token, and otherwise after so many tokens.
static void test_generation(void) {
    const char* dir = "dev/reference/golden/qwen3_moe";
    int ids[64] = {1, 2, 3}, again[64] = {1, 2, 3}, V;
    Model *m = open_model(dir, FOR_SCORING, 1, 32), *g = model_create(&m->config, FOR_GENERATION, 1, 32, 32, m);
    Tokenizer* t = tokenizer_open(dir, V = m->config.vocab_size);
    Sampling greedy = {0, 1, 0, 1}, random = {1, 0.95, 20, 5};
    FILE* nowhere = fopen("/dev/null", "w");
    check(generate(g, t, ids, 3, 20, &greedy, nowhere) == 20, "generates as many tokens as asked for");
    model_forward(m, ids, NULL, 1, 23);
    int greatest = 1;
    for (int n = 2; n < 22; n++)
        for (int v = 0; v < V; v++) greatest &= m->logits[n * V + ids[n + 1]] >= m->logits[n * V + v];
    check(greatest, "greedy tokens have the largest logits of a whole forward pass");
    t->eos[t->num_eos++] = ids[9];
    int before = 0;
    while (ids[3 + before] != ids[9]) before++;
    check(generate(g, t, again, 3, 20, &greedy, nowhere) == before &&
              !memcmp(ids, again, sizeof(int) * (size_t)(3 + before)),
          "stops before the end-of-sequence token, after %d", before);
    t->num_eos = 0;
    generate(g, t, ids, 3, 28, &random, nowhere);
    generate(g, t, again, 3, 28, &random, nowhere);
    int same = !memcmp(ids, again, sizeof(int) * 31);
    random.seed = 6;
    generate(g, t, again, 3, 28, &random, nowhere);
    check(same && memcmp(ids, again, sizeof(int) * 31), "the same seed gives the same text, another seed another one");
    fclose(nowhere);
    tokenizer_close(t);
    model_free(g);
    model_free(m);
}

static void test_sampling(void) {
    test_draws();
    test_tokenizers();
    test_generation();
}

// ---------------------------------------------------------------------------------------------------------------------
// Command line

// Runs a command line that must fail: exit code, one line on stderr with these words in it, and no new file.
static void check_refused(int expected_code, const char* arguments, const char* expected) {
    char where[PATH_SIZE], all[2048], *p = all;
    snprintf(where, sizeof where, "%s", temp("new"));
    for (const char* s = arguments; *s && p < all + 1500; s++) { // @ stands for the temporary directory
        if (*s == '@')
            p += sprintf(p, "%s", temp_dir);
        else
            *p++ = *s;
    }
    *p = 0;
    remove_tree(where);
    int code = run_program("%s", all), lines = error_lines();
    int ok = code == expected_code && lines == 1 && strstr(ran.err, expected) && !exists(where);
    check(ok, "%.100s: %s", arguments, ran.err);
    if (!ok)
        printf("       exit code %d, %d lines, %s\n", code, lines,
               exists(where) ? "something was written" : "nothing written");
}

static void test_bad_commands(void) {
    static const struct {
        const char *arguments, *expected;
    } bad[] = {{"--nonsense", "--nonsense: unknown"},
               {"--steps", "--steps wants a value"},
               {"-x", "-x: unknown"},
               {"-xyz", "-x: unknown"},
               {"--val-", "--val-: may be any of --val-every, --val-batches"},
               {"--expert 4", "--expert: may be any of --experts, --expert-ffn"},
               {"--dense=1", "--dense=1: the option takes no value"},
               {"words", "words: unexpected"},
               {"--steps 5 more", "more: unexpected"},
               {"--steps five", "--steps five: expected a whole number from 0"},
               {"--steps -1", "--steps -1"},
               {"--steps 1e3", "--steps 1e3"},
               {"--steps 1.5", "--steps 1.5"},
               {"--steps 99999999999999999999", "--steps 99999999999999999999"},
               {"--batch 0", "from 1 to 65536"},
               {"--seq 0", "--seq 0"},
               {"--seq 2000000", "--seq 2000000"},
               {"--threads 0", "--threads 0"},
               {"--accum 0", "--accum 0"},
               {"--lr -1", "--lr -1: expected a number from 0"},
               {"--lr nan", "--lr nan"},
               {"--lr inf", "--lr inf"},
               {"--lr 1e-3x", "--lr 1e-3x"},
               {"--beta1 1", "--beta1 1"},
               {"--beta2 -0.1", "--beta2"},
               {"--eps 0", "--eps 0"},
               {"--decay-frac 1.1", "--decay-frac"},
               {"--top-p 2", "--top-p 2"},
               {"--schedule linear", "expected one of wsd|cosine|constant"},
               {"--arch gpt2", "expected one of qwen3"},
               {"--aux-form both", "expected one of switch|hf"},
               {"--qk-norm yes", "expected one of none|head|row"},
               {"--router top", "softmax|sigmoid|lpr"},
               {"--precision bf16", "the CPU program computes in fp32"},
               {"--norm-topk 2", "from 0 to 1"},
               {"--schedule ws", "--schedule ws"},
               {"--layers 513", "--layers 513"},
               {"--layers 0", "--layers 0"},
               {"--experts 70000", "--experts 70000"},
               {"--topk 0", "--topk 0"},
               {"--batch 65536 --seq 1048576", "--batch 65536: with --seq 1048576"},
               // a class and its switches
               {"--arch olmoe --dense", "--arch qwen3 or mixtral"},
               {"--arch mixtral --norm-topk 0", "--arch qwen3 or olmoe"},
               {"--arch mixtral --sparse-step 2", "--arch qwen3 fits"},
               {"--arch olmoe --sparse-step 2", "--arch qwen3 fits"},
               {"--arch mixtral --qk-norm head", "--arch qwen3 does"},
               {"--arch mixtral --qk-norm row", "--arch olmoe does"},
               {"--arch qwen3 --qk-norm none", "--arch mixtral does"},
               {"--arch olmoe --qk-norm head", "--arch qwen3 does"},
               {"--arch olmoe --head-dim 64", "--arch qwen3 is free in it"},
               {"--dense --topk 2", "--topk: a dense model has no experts"},
               {"--experts 0 --expert-ffn 64", "--expert-ffn: a dense model"},
               {"--dense --norm-topk 0", "--norm-topk: a dense model"},
               {"--topk 9", "--topk 9: there are only 8"},
               {"--heads 3", "--hidden 128: no multiple of --heads 3"},
               {"--heads 4 --kv-heads 3", "no multiple"},
               {"--head-dim 7", "--head-dim 7: rotary positions need an even one"},
               {"--layers 2 --sparse-step 3", "leaves no sparse layer"},
               {"--heads 128 --hidden 128", "--head-dim 1: rotary"},
               {"--lpr-dim 4", "--router lpr"},
               {"--topk-range 3", "LO:HI"},
               {"--topk-range 2:9", "LO:HI"},
               {"--aux-adaptive --aux-form hf", "--aux-form switch"},
               // what belongs together
               {"--resume", "--resume wants --out"},
               {"--resume --out @/new", "No such file"},
               {"--resume --out @/empty", "holds no checkpoint"},
               {"--data @/corpus.txt --family-penalty 1 --out @/new", "has no families"},
               {"--data @/corpus.txt --eval --prompt x --model @/trained", "only one of them"},
               {"--resume --out @/empty --model @/trained", "leave out --model"},
               {"--eval", "--eval wants --model"},
               {"--dump @/new", "--dump wants --model"},
               {"--prompt x", "--prompt wants --model"},
               {"--model @/trained --eval", "--eval wants --data"},
               {"--model @/trained --dump @/new", "--dump wants --data"},
               {"--load", "--load and --trace go with --eval"},
               {"--model @/trained --layers 3 --data @/corpus.txt", "described by --layers, but --model has one"},
               {"--model @/trained --topk 1 --data @/corpus.txt", "described by --topk, but --model has one"},
               {"--model @/absent --data @/corpus.txt", "@/absent/config.json: No such file"},
               {"--out @/trained --data @/corpus.txt", "--resume goes on with that run"},
               {"--out @/trained --resume --hidden 8 --dense", "described by --hidden, --dense, but --out has one"},
               {"--out @/bare --data @/corpus.txt", "but no run; to train this model give it as --model"},
               {"--out @/bare --resume", "but a model; give it as --model"},
               {"--model @/trained --eval --data @/corpus.txt --val none", "--val belongs to training"},
               {"--model @/trained --eval --data @/corpus.txt --lr 1", "--lr belongs to training"},
               {"--model @/trained --prompt x --out @/new", "--out belongs to training"},
               {"--lr 1e-3 --min-lr 2e-3", "must not be above --lr, 0.001"},
               {"--dense --aux 0.1", "--aux: a dense model has no router"},
               {"--dense --topk-range 1:2", "--topk-range: a dense model has no router"},
               {"--bias-rate 0.1", "only the router sigmoid has a bias"},
               {"--ffn 96", "--expert-ffn is the width of an expert"},
               {"--out @/corpus.txt --data @/corpus.txt --steps 1", "Not a directory"},
               {"--out @/corpus.txt/x --data @/corpus.txt --steps 1", "Not a directory"},
               {"--model @/trained --data @/corpus.txt --eval --topk 6", "--topk 6: the model has 5"},
               {"--model @/trained --data @/absent --eval", "No such file"},
               {"--model @/trained --data @/corpus.txt --eval --seq 100000", "needs at least"},
               {"--model @/trained --data @/corpus.txt --batch 999 --seq 24 --dump @/new", "has only 833 windows"},
               {"--model @/trained --prompt-ids 1,x", "found x"},
               {"--model @/trained --prompt-ids 256", "numbers from 0 to 255"},
               {"--model @/trained --prompt-ids -1", "numbers from 0 to 255"},
               {"--model @/trained --prompt-ids ,", "found ,"},
               {"--model dev/reference/golden/llama --prompt x", "too few for bytes"},
               {"--model dev/reference/golden/llama --data @/corpus.txt --eval", "does not read bytes"},
               {"--model @/window --data @/corpus.txt --eval --seq 128", "sliding_window 64"},
               {"--model @/window --data @/corpus.txt --seq 128", "sliding_window 64"},
               {"--model @/window --prompt a --tokens 200", "sliding_window 64"},
               {"--model @/words --prompt x", "give --prompt-ids"},
               {"--model @/words --data @/corpus.txt --eval --seq 8", "does not read bytes"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        // the models and files above are named with @, the expected text as well
        const char* expected = bad[i].expected[0] == '@' ? bad[i].expected + 1 : bad[i].expected;
        char with_out[600];
        int writes = !strstr(bad[i].arguments, "--out") && !strstr(bad[i].arguments, "--resume") &&
                     !strstr(bad[i].arguments, "--dump") && !strstr(bad[i].arguments, "--eval") &&
                     !strstr(bad[i].arguments, "--prompt");
        snprintf(with_out, sizeof with_out, "%s%s", writes ? "--out @/new " : "", bad[i].arguments);
        check_refused(2, with_out, expected);
    }
    check_refused(1, "--model @/trained --data @/corpus.txt --batch 1 --seq 8 --dump @/absent/dump", "No such file");
}

static void test_help(void) {
    int code = run_program("--help");
    int all = 1;
    for (int i = 0; i < NUM_OPTIONS; i++) all &= strstr(ran.out, option_table[i].name) != NULL;
    check(code == 0 && all && !*ran.err, "--help: exit code 0, lists every option on stdout");
    code = run_program("--version");
    check(code == 0 && !*ran.err && strstr(ran.out, VERSION), "--version: %s", ran.out);
    code = run_program("--steps nonsense --help");
    check(code == 2, "an error before --help is an error");
}

static void test_not_finite(void) {
    // a norm so large that the next layer's squares overflow
    remove_tree(temp("b"));
    copy_directory(temp("trained"), temp("b"));
    Error error = {""};
    Model* m = try_load(temp("b"), &error);
    for (int l = 0; l < m->config.num_layers; l++)
        for (int i = 0; i < m->config.hidden_size; i++)
            m->weights.layers[l].attn_norm[i] = m->weights.layers[l].ffn_norm[i] = 3e38f;
    Pieces p = pieces_read(temp("b"));
    for (int i = 0; i < m->layout.count; i++)
        memcpy(piece_find(&p, m->layout.tensors[i].name)->values, m->params + m->layout.tensors[i].offset,
               sizeof(float) * (size_t)tensor_size(&m->layout.tensors[i]));
    pieces_write(&p, temp("b/model.safetensors"), 0);
    pieces_free(&p);
    model_free(m);
    copy_directory(temp("b"), temp("c"));
    int code = run_program("--out %s --resume --steps 9", temp("b"));
    check(code == 1 && error_lines() == 1 &&
              strstr(ran.err, "step 5: the loss is not finite; the checkpoint of step 4 in"),
          "a loss that is not finite: %s", ran.err);
    show_failure(code == 1);
    check(same_checkpoint("b", "c"), "the checkpoint is as it was");
    code = run_program("--model %s --data %s --seq 24 --steps 2 --out %s", temp("c"), temp("corpus.txt"), temp("new"));
    check(code == 1 && strstr(ran.err, "step 1: the loss is not finite; nothing had been saved"),
          "the same in a first step: %s", ran.err);
    check(!exists(temp("new/model.safetensors")), "nothing is saved");
    remove_tree(temp("new"));
    code = train_run("b", "--steps 400 --lr 1000000 --clip 0 --weight-decay 1000 --save-every 1 --schedule constant");
    check(code == 1 && error_lines() == 1 && strstr(ran.err, "is not finite") && saved_step("b") > 0,
          "a learning rate of 10^6: %s", strstr(ran.err, "train_moe:") ? strstr(ran.err, "train_moe:") : "");
    m = try_load(temp("b"), &error);
    check(m != NULL, "its last checkpoint can be loaded");
    if (m) model_free(m);
}

// --eval against evaluate(), which is checked against model_forward here
static void test_eval(void) {
    int T = 24, B = 3, tokens[24], targets[24];
    char expected[100];
    Dataset* d = dataset_open(temp("corpus.txt"), T, 256, WHOLE, BYTES);
    Model *batch_model = open_model(temp("trained"), FOR_SCORING, B, T),
          *m = open_model(temp("trained"), FOR_SCORING, 1, T);
    double sum = 0;
    for (long w = 0; w < d->windows; w++) {
        dataset_window(d, w, tokens, targets);
        sum += model_forward(m, tokens, targets, 1, T);
    }
    double loss = sum / (double)d->windows;
    snprintf(expected, sizeof expected, "loss %.5f", loss);
    int code = run_program("--model %s --data %s --eval --seq 24 --batch 3", temp("trained"), temp("corpus.txt"));
    check(code == 0 && strstr(ran.out, expected), "--eval prints the mean over all windows, %s", expected);
    double printed = 0, perplexity = 0, bits = 0;
    const char* line = strstr(ran.out, "loss ");
    int found =
        line && sscanf(line, "loss %lf | perplexity %lf | bits per byte %lf", &printed, &perplexity, &bits) == 3;
    check(found && fabs(printed - loss) < 2e-6 && fabs(perplexity / exp(loss) - 1) < 1e-4 &&
              fabs(bits - loss / log(2)) < 1e-4,
          "--eval prints perplexity %.4f and %.4f bits per byte", perplexity, bits);
    Batch batch = batch_create(B, T);
    check(fabs(evaluate(batch_model, d, 0, batch) - loss) < 1e-9,
          "evaluate: all windows, also a last batch that is not full");
    sum = 0;
    for (long w = 0; w < 6; w++) {
        dataset_window(d, w, tokens, targets);
        sum += model_forward(m, tokens, targets, 1, T);
    }
    check(fabs(evaluate(batch_model, d, 2, batch) - sum / 6) < 1e-9, "evaluate: the first two batches");
    free(batch.tokens);
    dataset_close(d);
    model_free(m);
    model_free(batch_model);
}

static int tensor_is(SafeTensors* s, const char* name, Dtype dtype, int ndim, long a, long b, long c) {
    StoredTensor* t = safetensors_find(s, name);
    return t && t->dtype == dtype && t->ndim == ndim && t->shape[0] == a && (ndim < 2 || t->shape[1] == b) &&
           (ndim < 3 || t->shape[2] == c);
}

static int floats_are(SafeTensors* s, const char* name, const float* expected, long n) {
    long count = 0;
    float* values = reference_floats(s, name, &count);
    int same = count == n && !memcmp(values, expected, sizeof(float) * (size_t)n);
    free(values);
    return same;
}

static void test_dump(void) {
    int B = 2, T = 16, L = 2, K = 2, V = 256;
    int code = run_program("--model %s --data %s --batch 2 --seq 16 --aux 0.03 --dump %s", temp("trained"),
                           temp("corpus.txt"), temp("d.safetensors"));
    Error error = {""};
    SafeTensors* s = safetensors_open(temp("d.safetensors"), &error);
    check(code == 0 && s, "--dump writes a file %s", error.text);
    if (!s) return;
    Model* m = open_model(temp("trained"), FOR_TRAINING, B, T);
    Dataset* d = dataset_open(temp("corpus.txt"), T, V, WHOLE, BYTES);
    Batch batch = batch_create(B, T);
    for (int b = 0; b < B; b++) dataset_window(d, b, batch.tokens + b * T, batch.targets + b * T);
    int *tokens = reference_ints(s, "tokens", NULL), *targets = reference_ints(s, "targets", NULL);
    check(tensor_is(s, "tokens", DTYPE_I32, 2, B, T, 0) &&
              !memcmp(tokens, batch.tokens, sizeof(int) * (size_t)(B * T)) &&
              tensor_is(s, "targets", DTYPE_I32, 2, B, T, 0) &&
              !memcmp(targets, batch.targets, sizeof(int) * (size_t)(B * T)),
          "--dump: tokens and targets are the file's first windows");
    m->balance.aux = 0.03f;
    model_forward(m, batch.tokens, batch.targets, B, T);
    float loss = (float)m->loss, aux = (float)m->aux_loss;
    check(tensor_is(s, "logits", DTYPE_F32, 3, B, T, V) && floats_are(s, "logits", m->logits, (long)B * T * V),
          "--dump: logits have the bits of a direct call");
    check(tensor_is(s, "loss", DTYPE_F32, 1, 1, 0, 0) && floats_are(s, "loss", &loss, 1) &&
              tensor_is(s, "aux_loss", DTYPE_F32, 1, 1, 0, 0) && floats_are(s, "aux_loss", &aux, 1) && aux > 0,
          "--dump: loss and aux loss");
    int routers = 1, gradients = 1, expected_count = 5 + L + m->layout.count;
    for (int l = 0; l < L; l++) {
        char name[32];
        snprintf(name, sizeof name, "router.%d", l);
        int* experts = reference_ints(s, name, NULL);
        routers &= tensor_is(s, name, DTYPE_I32, 2, B * T, K, 0) &&
                   !memcmp(experts, m->layers[l].experts, sizeof(int) * (size_t)(B * T * K));
        free(experts);
    }
    check(routers, "--dump: the experts of every sparse layer");
    model_backward(m, 1);
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        char name[160];
        snprintf(name, sizeof name, "grad.%s", t->name);
        gradients &= tensor_is(s, name, DTYPE_F32, tensor_is_matrix(t) ? 2 : 1, t->rows, t->cols, 0) &&
                     floats_are(s, name, m->grads + t->offset, tensor_size(t));
    }
    check(gradients && s->num_tensors == expected_count,
          "--dump: every gradient, under the name of its tensor, and nothing else");
    free(tokens);
    free(targets);
    free(batch.tokens);
    safetensors_close(s);
    dataset_close(d);
    model_free(m);
}

// --trace and --load against forward passes of one window at a time, with another K than the model's
static void test_trace(void) {
    enum { T = 24, K = 3 };
    int code = run_program("--model %s --data %s --eval --seq %d --batch 3 --topk %d --load --trace %s",
                           temp("trained"), temp("corpus.txt"), T, K, temp("trace.csv"));
    Config config;
    Error error = {""};
    if (!config_read(&config, temp("trained"), &error)) die(1, "%s", error.text);
    config.num_experts_per_tok = K;
    Model* m = model_create(&config, FOR_SCORING, 1, T, T, NULL);
    if (!checkpoint_load(m, temp("trained"), &error)) die(1, "%s", error.text);
    const Config* c = &config;
    Dataset* d = dataset_open(temp("corpus.txt"), T, c->vocab_size, WHOLE, BYTES);
    FILE* f = fopen(temp("trace.csv"), "r");
    char line[512] = "";
    int *experts = (int*)checked_malloc(sizeof(int) * (size_t)(c->num_layers * T * K)), same = 1, tokens[T], targets[T];
    float* gates = (float*)checked_malloc(sizeof(float) * (size_t)(c->num_layers * T * K));
    long rows = 0, load[64] = {0};
    check(code == 0 && f && fgets(line, sizeof line, f) &&
              !strcmp(line, "window,position,token,layer,expert_1,expert_2,expert_3,gate_1,gate_2,gate_3\n"),
          "--trace: the header %.40s ...", line);
    // rows come batch by batch, in a batch layer by layer; a layer's activations are overwritten by the next one's, so
    // each layer is scored by a model that ends with it
    for (long window = 0; f && window < 6; window++) {
        for (int l = 0; l < c->num_layers; l++) {
            m->config.num_layers = l + 1;
            dataset_window(d, window, tokens, targets);
            model_forward(m, tokens, targets, 1, T);
            memcpy(experts + (long)l * T * K, m->layers[l].experts, sizeof(int) * T * K);
            memcpy(gates + (long)l * T * K, m->layers[l].gates, sizeof(float) * T * K);
        }
        rewind(f);
        long w, position, token, layer, e[K], found = 0;
        double g[K];
        while (fgets(line, sizeof line, f))
            if (sscanf(line, "%ld,%ld,%ld,%ld,%ld,%ld,%ld,%lf,%lf,%lf", &w, &position, &token, &layer, &e[0], &e[1],
                       &e[2], &g[0], &g[1], &g[2]) == 10 &&
                w == window) {
                const int* chosen = experts + (layer * T + position) * K;
                same &= token == tokens[position];
                for (int k = 0; k < K; k++)
                    same &= e[k] == chosen[k] && fabs(g[k] - gates[(layer * T + position) * K + k]) < 1e-5;
                found++;
            }
        same &= found == (long)T * c->num_layers;
        rows += found;
    }
    check(same && rows == 6L * T * c->num_layers, "--trace: tokens, experts and gates of %ld rows", rows);
    // the load that --load prints for layer 0 is the number of times each expert stands in the trace
    if (f) rewind(f);
    while (f && fgets(line, sizeof line, f)) {
        long layer, e[K];
        if (sscanf(line, "%*d,%*d,%*d,%ld,%ld,%ld,%ld", &layer, &e[0], &e[1], &e[2]) == 4 && layer == 0)
            for (int k = 0; k < K; k++) load[e[k]]++;
    }
    Text expected = {NULL, 0, 0};
    text_print(&expected, ", load");
    for (int e = 0; e < c->num_experts; e++) text_print(&expected, " %ld", load[e]);
    check(strstr(ran.out, expected.data) != NULL, "--load prints what the trace counts:%s", expected.data);
    free(expected.data);
    if (f) fclose(f);
    free(experts);
    free(gates);
    dataset_close(d);
    model_free(m);
}

static void test_command_line(void) {
    write_corpus(temp("corpus.txt"), 20000);
    check(train_run("trained", "--steps 4 --save-every 2") == 0, "a model to work with");
    show_failure(ran.code == 0);
    mkdir(temp("empty"), 0777);
    // the same model as a Mistral would have it, with a window; and one with a tokenizer
    remove_tree(temp("window"));
    check(train_run("window", "--steps 1 --dense --arch mixtral --seq 16") == 0, "a dense model");
    Error error = {""};
    Config c;
    Text t = {NULL, 0, 0};
    if (config_read(&c, temp("window"), &error)) {
        c.arch = MISTRAL;
        c.sliding_window = 64;
        c.max_position_embeddings = 1000;
        config_to_json(&t, &c);
        write_text(temp("window/config.json"), t.data);
        check(mkdir(temp("bare"), 0777) == 0, "a directory with nothing but a config.json");
        write_text(temp("bare/config.json"), t.data);
        free(t.data);
    }
    copy_directory(temp("trained"), temp("words"));
    write_text(temp("words/tokenizer.json"),
               "{\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": {\"vocab\": {\"a\": 0}}}");
    test_help();
    test_bad_commands();
    char arguments[1024];
    test_eval();
    test_trace();
    test_dump();
    test_not_finite();
    int code =
        run_program("--model %s --data %s --seq 24 --steps 1 --out %s", temp("words"), temp("corpus.txt"), temp("new"));
    check(code == 2 && !exists(temp("new")), "text for a model with a tokenizer is refused in training");
    write_shard(temp("ids.bin"), SHARD_MAGIC_16, 1, 200, 2, 200, 0);
    code = run_program("--model %s --data %s --seq 24 --steps 1 --out %s", temp("words"), temp("ids.bin"), temp("new"));
    check(code == 0 && same_in("words", "new", "tokenizer.json"), "the tokenizer travels to the output");
    show_failure(code == 0);
    // tokens that nobody can name are not taken for bytes
    write_shard(temp("ids.bin"), SHARD_MAGIC_16, 1, 290, 2, 290, 0);
    snprintf(arguments, sizeof arguments, "%s --vocab 300 --data %s --steps 1 --out %s", small_run, temp("ids.bin"),
             temp("bpe"));
    check(run_program("%s", arguments) == 0, "a model trained on token shards");
    snprintf(arguments, sizeof arguments, "--model %s --data %s --seq 24 --eval", temp("bpe"), temp("corpus.txt"));
    check(run_program("%s", arguments) == 2 && strstr(ran.err, "does not read bytes"), "text is refused there: %s",
          ran.err);
    code = run_program("--model %s --prompt x", temp("bpe"));
    check(code == 2 && strstr(ran.err, "this model reads tokens"), "and so is a prompt: %s", ran.err);
    // an upcycle passes on what was told
    char command[5 * PATH_SIZE];
    snprintf(command, sizeof command, "%s --as-upcycle %s %s --experts 12 > /dev/null", self_path, temp("bpe"),
             temp("bpe12"));
    check(system(command) == 0, "an upcycle of the model whose tokens are no bytes");
    check(run_program("--model %s --data %s --seq 24 --eval", temp("bpe12"), temp("corpus.txt")) == 2 &&
              strstr(ran.err, "does not read bytes"),
          "text is refused there, too: %s", ran.err);
    unlink(temp("bpe/trainer.json"));
    snprintf(arguments, sizeof arguments, "--model %s --data %s --seq 24 --eval", temp("bpe"), temp("corpus.txt"));
    check(run_program("%s", arguments) == 0 && strstr(ran.err, "is read as bytes, but nothing says"),
          "with nothing to tell, text is read as bytes and the program says so: %s", ran.err);
    code = run_program("--model %s --data %s --seq 24 --eval", temp("trained"), temp("corpus.txt"));
    check(code == 0 && !strstr(ran.err, "warning"), "256 tokens are bytes");
    code = run_program("--model %s --data %s --seq 24 --eval", temp("bpe"), temp("ids.bin"));
    check(code == 0 && !strstr(ran.err, "warning"), "and nothing is said of bytes where token shards are read");
    // a run of no steps saves what it starts from
    check(train_run("none", "--steps 0") == 0 && saved_step("none") == 0 && strstr(ran.out, "as it starts"),
          "--steps 0 saves the model as it starts");
    char small[512]; // without --warmup, which follows from the number of steps
    snprintf(small, sizeof small, "--data %s --layers 1 --hidden 16 --experts 3 --seq 16 --batch 2",
             temp("corpus.txt"));
    check(run_program("%s --steps 40 --out %s", small, temp("once")) == 0 &&
              run_program("%s --steps 0 --out %s", small, temp("twice")) == 0 &&
              resume_run("twice", "--steps 40") == 0 && same_in("once", "twice", "model.safetensors"),
          "and a run that goes on from there is one that started there");
    show_failure(ran.code == 0);
    check(resume_run("twice", "--steps 0") == 0 && saved_step("twice") == 40, "which --steps 0 does not undo");
    // bytes stay bytes when training goes on with shards of them
    write_shard(temp("as_ids.bin"), SHARD_MAGIC_16, 1, 200, 2, 200, 0);
    run_program("--model %s --data %s --seq 24 --batch 2 --steps 1 --out %s", temp("trained"), temp("as_ids.bin"),
                temp("still"));
    check(run_program("--model %s --data %s --seq 24 --eval", temp("still"), temp("corpus.txt")) == 0,
          "256 tokens are bytes, whatever the last data were: %s", ran.err);
    // a text model of more tokens stays one, too
    run_program("%s --vocab 300 --steps 1 --out %s", small, temp("spare"));
    run_program("--model %s --data %s --seq 16 --batch 2 --steps 1 --out %s", temp("spare"), temp("ids.bin"),
                temp("spare2"));
    code = run_program("--model %s --data %s --seq 16 --eval", temp("spare2"), temp("corpus.txt"));
    check(code == 0 && !strstr(ran.err, "warning"), "a text model that went on with shards reads bytes: %s", ran.err);
    // copies of one FFN are always chosen together, which says nothing; those of several experts are not
    for (int dense = 0; dense < 2; dense++) {
        const char *from = temp(dense ? "flat" : "once"), *to = temp(dense ? "flat_up" : "once_up");
        if (dense) run_program("%s --dense --steps 1 --out %s", small, from);
        snprintf(command, sizeof command, "%s --as-upcycle %s %s --experts 6 > /dev/null", self_path, from, to);
        check(system(command) == 0, "an upcycle of %s", dense ? "a dense model" : "a mixture");
        code = run_program("--model %s --data %s --seq 16 --batch 2 --steps 1", to, temp("corpus.txt"));
        check(code == 0 && strstr(ran.out, "twins' cosine") && (strstr(ran.out, "chosen together") == NULL) == dense,
              "twins chosen together: %s", dense ? "not said of copies of one FFN" : "said of copies of experts");
    }
    snprintf(command, sizeof command, "%s --as-train-moe %s --steps 3 --out %s 2>/dev/null | head -n 1 > %s", self_path,
             small, temp("piped"), temp("piped.txt"));
    check(system(command) == 0 && saved_step("piped") == 3, "a pipe that is closed early does not stop a run");
    code = run_program("--model %s --prompt-ids 97,98 --tokens 5 --temperature 0", temp("trained"));
    check(code == 0 && strlen(ran.out) >= 6 && !strncmp(ran.out, "ab", 2),
          "--prompt-ids prints the prompt and goes on");
    remove_tree(temp("new"));
    code = run_program("--data %s --steps 2 --layers 1 --hidden 16 --seq 16", temp("corpus.txt"));
    check(code == 0 && strstr(ran.out, "nothing will be saved"),
          "without --out nothing is written, and the program says so");
}

// ---------------------------------------------------------------------------------------------------------------------
// upcycle.c. Whole runs are made by this program starting itself with --as-upcycle; their results are read back and
// compared with statements of what they must be that do not use upcycle.c's own functions.

static char up_dir[300]; // inside temp_dir

// up_path("a") is the directory a among the tests' own
static const char* up_path(const char* name) {
    static char paths[8][PATH_SIZE];
    static int next = 0;
    return join_path(paths[next++ % 8], up_dir, name);
}

// Runs upcycle with these arguments; {} stands for the tests' directory. Returns the exit code; up_output is what it
// printed.
static char up_output[65536];
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static int up_run(const char* before, const char* format, ...) {
    char arguments[4096], command[16384], *at = command;
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    at += sprintf(at, "%s %s --as-upcycle ", before, self_path);
    for (const char* s = arguments; *s; s++)
        if (s[0] == '{' && s[1] == '}') {
            at += sprintf(at, "%s", up_dir);
            s++;
        } else {
            *at++ = *s;
        }
    sprintf(at, " >%s/output 2>&1", up_dir);
    int status = system(command);
    FILE* f = fopen(up_path("output"), "r");
    size_t n = f ? fread(up_output, 1, sizeof up_output - 1, f) : 0;
    up_output[n] = 0;
    if (f) fclose(f);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// The run must succeed.
#define UP(...)                                                                                                  \
    do {                                                                                                         \
        if (up_run("", __VA_ARGS__)) check(0, "upcycle failed: %s", up_output);                                  \
    } while (0)

static float* up_tensor(const char* dir, const char* name, long* count) {
    Error error = {""};
    SafeTensors* s = safetensors_open_model(dir, &error);
    StoredTensor* t = s ? safetensors_find(s, name) : NULL;
    if (!t) die(1, "%s: no tensor %s", dir, name);
    float* out = (float*)checked_malloc(sizeof(float) * (size_t)t->count);
    if (!safetensors_read(s, t, 0, t->count, out, &error)) die(1, "%s", error.text);
    if (count) *count = t->count;
    safetensors_close(s);
    return out;
}

static float* up_moment(const char* dir, const char* name, long* count) {
    char path[PATH_SIZE];
    Error error = {""};
    SafeTensors* s = safetensors_open(join_path(path, dir, "optimizer.safetensors"), &error);
    StoredTensor* t = s ? safetensors_find(s, name) : NULL;
    if (!t) die(1, "%s: no tensor %s", path, name);
    float* out = (float*)checked_malloc(sizeof(float) * (size_t)t->count);
    if (!safetensors_read(s, t, 0, t->count, out, &error)) die(1, "%s", error.text);
    if (count) *count = t->count;
    safetensors_close(s);
    return out;
}

// 1 if two tensors have the same numbers, bit for bit
static int up_same(const char* dir_a, const char* name_a, const char* dir_b, const char* name_b) {
    long n, k;
    float *a = up_tensor(dir_a, name_a, &n), *b = up_tensor(dir_b, name_b, &k);
    int same = n == k && !memcmp(a, b, sizeof(float) * (size_t)n);
    free(a);
    free(b);
    return same;
}

static Json* up_receipt(const char* dir) {
    char path[PATH_SIZE];
    Error error = {""};
    Json* j = json_read(join_path(path, dir, "upcycle.json"), &error);
    if (!j) die(1, "%s", error.text);
    return j;
}

// entry i of "source" or "family" of the receipt's n-th sparse layer
static int up_listed(const char* dir, const char* key, int n, int i) {
    Json* j = up_receipt(dir);
    const Json* list = json_get(json_get(j, "layers")->items[n], key);
    int value = i < list->count ? (int)list->items[i]->number : -2;
    json_free(j);
    return value;
}

static int up_list_is(const char* dir, const char* key, int n, const char* expected) {
    Json* j = up_receipt(dir);
    const Json* list = json_get(json_get(j, "layers")->items[n], key);
    Text t = {NULL, 0, 0};
    for (int i = 0; i < list->count; i++) text_print(&t, "%s%s", i ? " " : "", list->items[i]->string);
    int same = !strcmp(t.data, expected);
    free(t.data);
    json_free(j);
    return same;
}

// logits of a checkpoint on random tokens, with another K if topk > 0
static float* up_logits(const char* dir, int topk, long* count) {
    Config c;
    Error error = {""};
    int B = 2, T = 12, tokens[24], targets[24];
    if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
    if (topk > 0) c.num_experts_per_tok = topk;
    Model* m = model_create(&c, FOR_SCORING, B, T, T, NULL);
    if (!checkpoint_load(m, dir, &error)) die(1, "%s", error.text);
    for (int i = 0; i < B * T; i++) tokens[i] = targets[i] = (int)(mix64((uint64_t)i) % (uint64_t)c.vocab_size);
    model_forward(m, tokens, targets, B, T);
    *count = (long)B * T * c.vocab_size;
    float* out = (float*)checked_malloc(sizeof(float) * (size_t)*count);
    memcpy(out, m->logits, sizeof(float) * (size_t)*count);
    model_free(m);
    return out;
}

static double up_change(const char* a, int topk, const char* b) {
    long n, k;
    float *x = up_logits(a, topk, &n), *y = up_logits(b, 0, &k);
    double e = n == k ? relative_error(y, x, n) : INFINITY;
    free(x);
    free(y);
    return e;
}

// every group starts with an empty directory
static void up_begin(void) {
    char command[PATH_SIZE];
    snprintf(command, sizeof command, "rm -rf %s/*", up_dir);
    if (system(command)) die(1, "%s: cannot be emptied", up_dir);
}

#define GOLDEN "dev/reference/golden/"
#define VARIANTS "dev/reference/golden_routers/"

// A checkpoint with weights of order 1 in every tensor, and moments, in the tests' directory. experts = 0: dense.
static void up_make(const char* name, Arch arch, int layers, int hidden, int width, int experts, int topk,
                    int norm_topk, uint64_t seed) {
    Config c;
    memset(&c, 0, sizeof c);
    c.arch = arch;
    c.num_layers = layers;
    c.hidden_size = hidden;
    c.num_heads = c.num_kv_heads = 2;
    c.head_dim = hidden / 2;
    c.intermediate_size = c.moe_intermediate_size = width;
    c.num_experts = experts;
    c.num_experts_per_tok = topk;
    c.norm_topk_prob = norm_topk;
    c.vocab_size = 256;
    c.max_position_embeddings = 64;
    c.rope_theta = 10000;
    c.rms_norm_eps = 1e-6;
    int per_head = arch == QWEN3 || arch == QWEN3_MOE || arch == DOTS1;
    c.qk_norm = arch == OLMOE ? QK_NORM_ROW : per_head ? QK_NORM_HEAD : QK_NORM_NONE;
    c.router = arch == DOTS1 ? ROUTER_SIGMOID : ROUTER_SOFTMAX;
    for (int l = 0; l < layers; l++) c.sparse[l] = experts > 0;
    options_reset();
    Model* m = model_create(&c, FOR_TRAINING, 1, 4, 4, NULL);
    for (long i = 0; i < m->layout.total; i++) {
        m->params[i] = (float)(0.3 * random_normal(random_key(seed, 1, (uint64_t)i, 0)));
        m->exp_avg[i] = (float)random_normal(random_key(seed, 2, (uint64_t)i, 0));
        m->exp_avg_sq[i] = (float)random_uniform(random_key(seed, 3, (uint64_t)i, 0));
    }
    for (int l = 0; l < layers; l++)            // slices with means that differ from 0
        for (long i = 0; i < (experts ? experts : 1) * 2L * hidden * width; i++)
            m->weights.layers[l].gate_up[i] += 0.5f;
    mkdir(up_path(name), 0777);
    const char* error = checkpoint_save(m, up_path(name), 7);
    if (error) die(1, "%s", error);
    model_free(m);
}

// a token shard of n random tokens below `vocabulary`
static void up_make_shard(const char* name, const int* tokens, int n) {
    int32_t header[256] = {SHARD_MAGIC_16, 1, n};
    FILE* f = fopen(up_path(name), "wb");
    fwrite(header, sizeof header, 1, f);
    for (int i = 0; i < n; i++) {
        uint16_t t = (uint16_t)tokens[i];
        fwrite(&t, 2, 1, f);
    }
    fclose(f);
}
static void up_make_random_shard(const char* name, int n, int vocabulary) {
    int* tokens = (int*)checked_malloc(sizeof(int) * (size_t)n);
    for (int i = 0; i < n; i++) tokens[i] = (int)(mix64((uint64_t)i + 99) % (uint64_t)vocabulary);
    up_make_shard(name, tokens, n);
    free(tokens);
}

// Every finite BF16 and F16 number comes back from its float; halfway between two neighbours the even one is nearest.
static void test_up_formats(void) {
    static const float large[] = {1, 65519, 65520, -70000, INFINITY, 3.4e38f};
    unsigned char bytes[24];
    check(floats_to_bytes(bytes, large, 6, DTYPE_F16) == 3 && floats_to_bytes(bytes, large, 6, DTYPE_BF16) == 1 &&
              floats_to_bytes(bytes, large, 6, DTYPE_F32) == 0,
          "numbers that become infinite are counted");
    up_begin();
    for (int f16 = 0; f16 < 2; f16++) {
        int wrong = 0, wrong_round = 0;
        for (uint32_t h = 0; h < 65536; h++) {
            float x = f16 ? f16_to_float((uint16_t)h) : bf16_to_float((uint16_t)h);
            uint16_t back = f16 ? float_to_f16(x) : float_to_bf16(x);
            float again = f16 ? f16_to_float(back) : bf16_to_float(back);
            wrong += isnan(x) ? !isnan(again) : back != h;
            uint32_t magnitude = h & 0x7FFF, largest = f16 ? 0x7BFF : 0x7F7F;
            if (magnitude >= largest) continue;
            float next = f16 ? f16_to_float((uint16_t)(h + 1)) : bf16_to_float((uint16_t)(h + 1));
            float middle = (float)(((double)x + next) / 2), up = nextafterf(middle, next), down = nextafterf(middle, x);
            if (!f16 && magnitude == 0) continue;      // the float's own subnormals
            uint16_t even = (uint16_t)(h & 1 ? h + 1 : h);
            wrong_round += (f16 ? float_to_f16(middle) : float_to_bf16(middle)) != even;
            wrong_round += (f16 ? float_to_f16(up) : float_to_bf16(up)) != h + 1;
            wrong_round += (f16 ? float_to_f16(down) : float_to_bf16(down)) != h;
        }
        check(!wrong && !wrong_round, "%s: all 65536 numbers there and back, and between neighbours: %d and %d wrong",
              f16 ? "F16" : "BF16", wrong, wrong_round);
    }
    check(float_to_f16(65520.0f) == 0x7C00 && float_to_f16(65519.0f) == 0x7BFF && float_to_f16(-1e30f) == 0xFC00,
          "F16: overflow");
    check(float_to_bf16(3.4e38f) == 0x7F80 && float_to_bf16(-INFINITY) == 0xFF80, "BF16: overflow");
}

static int up_counts_are(const int* counts, int n, const char* expected) {
    Text t = {NULL, 0, 0};
    for (int i = 0; i < n; i++) text_print(&t, "%s%d", i ? "," : "", counts[i]);
    int same = !strcmp(t.data, expected);
    if (!same) printf("       found %s, expected %s\n", t.data, expected);
    free(t.data);
    return same;
}

// The paper's examples, and what follows from the rules.
static void test_up_allocation(void) {
    up_begin();
    double falling[8] = {8, 7, 6, 5, 4, 3, 2, 1}, mixed[4] = {1, 9, 9, 3};
    int counts[16], source[32], copy[32];
    allocate_greedy(counts, falling, 8, 16, 3);
    check(up_counts_are(counts, 8, "4,4,3,1,1,1,1,1"), "greedy, m = 2, cap 3, E = 8");
    allocate_greedy(counts, falling, 8, 24, 3);
    check(up_counts_are(counts, 8, "4,4,4,4,4,2,1,1"), "greedy, m = 3");
    allocate_greedy(counts, falling, 8, 8 + 24 + 4, 3);
    check(up_counts_are(counts, 8, "7,5,4,4,4,4,4,4"), "greedy starts over when all are at their cap");
    allocate_greedy(counts, mixed, 4, 7, 2);
    check(up_counts_are(counts, 4, "1,3,2,1"), "greedy, equal scores: the lower index first");
    allocate_uniform(counts, 5, 13);
    check(up_counts_are(counts, 5, "3,3,3,2,2"), "uniform, no multiple: the rest to the lowest indices");
    int given[3] = {3, 1, 2};
    place_copies(source, copy, given, 3, 6);
    check(up_counts_are(source, 6, "0,1,2,0,2,0") && up_counts_are(copy, 6, "0,0,0,1,1,2"),
          "copies by copy number, then source");
    double far[4] = {0, 0, 0, 1000};
    long total[4] = {0, 0, 0, 0};
    int within = 1;
    for (int i = 0; i < 2000; i++) {
        allocate_sample(counts, far, 4, 8, 3, mix64((uint64_t)i));
        int sum = 0;
        for (int e = 0; e < 4; e++) {
            within &= counts[e] >= 1 && counts[e] <= 4;
            total[e] += counts[e] - 1;
            sum += counts[e];
        }
        within &= sum == 8;
    }
    // z-scores -.577 three times and 1.732: weights .5616 and 5.652, the chance of the best in the first draw .770
    check(within, "sample: between 1 and cap + 1, N in all");
    check(total[3] > 2.0 * 2000 && total[0] > 300 && total[1] > 300,
          "sample: the best most often, others too: %ld %ld %ld %ld", total[0], total[1], total[2], total[3]);
    double mean = (total[0] + total[1] + total[2]) / 3.0;
    check(fabs(total[0] / mean - 1) < 0.12 && fabs(total[1] / mean - 1) < 0.12,
          "sample: equal scores, equal chances, also beside one at its cap");
    allocate_sample(counts, far, 4, 4 + 12, 3, 1);
    check(up_counts_are(counts, 4, "4,4,4,4"), "sample: all at their cap");
    double keep[5] = {3, 1, 4, 1, 5};
    keep_best(source, keep, 5, 3);
    check(up_counts_are(source, 3, "0,2,4"), "the best three of five, in their order");
}

// Dense to MoE, copy: the function is kept, experts are the FFN bit for bit, everything else as it was.
static void test_up_copy(void) {
    up_begin();
    static const char* models[] = {"llama", "llama_tied", "mistral", "qwen3"};
    for (int i = 0; i < 4; i++) {
        char source[PATH_SIZE], result[PATH_SIZE];
        snprintf(source, sizeof source, GOLDEN "%s", models[i]);
        snprintf(result, sizeof result, "%s/copy_%s", up_dir, models[i]);
        UP("%s {}/copy_%s --experts 5 --topk 3", source, models[i]);
        double e = up_change(source, 0, result);
        check(e <= 1e-6, "%s: logits change by %.1e", models[i], e);
        check(up_same(source, "model.embed_tokens.weight", result, "model.embed_tokens.weight") &&
                  up_same(source, "model.layers.1.self_attn.o_proj.weight", result,
                          "model.layers.1.self_attn.o_proj.weight"),
              "%s: other tensors are as they were", models[i]);
    }
    const char* r = up_path("copy_llama");
    check(up_same(GOLDEN "llama", "model.layers.1.mlp.gate_proj.weight", r,
                  "model.layers.1.block_sparse_moe.experts.4.w1.weight") &&
              up_same(GOLDEN "llama", "model.layers.1.mlp.up_proj.weight", r,
                      "model.layers.1.block_sparse_moe.experts.0.w3.weight") &&
              up_same(GOLDEN "llama", "model.layers.0.mlp.down_proj.weight", r,
                      "model.layers.0.block_sparse_moe.experts.2.w2.weight"),
          "Mixtral: w1, w3, w2 are gate, up, down");
    check(up_list_is(r, "source", 1, "0 0 0 0 0") && up_list_is(r, "family", 0, "0 0 0 0 0"), "the receipt's lineage");
    UP(GOLDEN "qwen3 {}/mixed --experts 4 --layers every-2 --norm-topk 1");
    double e = up_change(GOLDEN "qwen3", 0, up_path("mixed"));
    Config c;
    Error error = {""};
    check(
        config_read(&c, up_path("mixed"), &error) && !c.sparse[0] && c.sparse[1] && !c.sparse[2] && c.arch == QWEN3_MOE,
        "every-2: layer 1 of 3 is sparse");
    check(e <= 1e-6, "every-2: logits change by %.1e", e);
    UP(GOLDEN "qwen3 {}/listed --experts 4 --layers 0,2-2");
    check(config_read(&c, up_path("listed"), &error) && c.sparse[0] && !c.sparse[1] && c.sparse[2] &&
              up_change(GOLDEN "qwen3", 0, up_path("listed")) <= 1e-6,
          "a list of layers");
    // router rows: mean 0, the given standard deviation, different in every layer and row
    up_make("dense", QWEN3, 2, 64, 96, 0, 0, 0, 1);
    for (int kind = 0; kind < 3; kind++) {
        static const char* kinds[] = {"normal", "uniform", "zero"};
        char name[32];
        long n;
        snprintf(name, sizeof name, "rows_%s", kinds[kind]);
        UP("{}/dense {}/%s --experts 64 --router-init %s --router-std 0.1", name, kinds[kind]);
        float* w = up_tensor(up_path(name), "model.layers.1.mlp.gate.weight", &n);
        double sum = 0, squares = 0, fourth = 0, largest = 0;
        for (long i = 0; i < n; i++) {
            sum += w[i];
            squares += (double)w[i] * w[i];
            fourth += pow(w[i], 4);
            largest = fmax(largest, fabs(w[i]));
        }
        double std = sqrt(squares / n), kurtosis = kind < 2 ? fourth / n / pow(std, 4) : 0;
        check(n == 64 * 64 && fabs(sum / n) < 0.006 && (kind == 2 ? largest == 0 : fabs(std - 0.1) < 0.004) &&
                  (kind == 0   ? fabs(kurtosis - 3) < 0.4
                   : kind == 1 ? fabs(kurtosis - 1.8) < 0.1 && largest <= 0.1 * sqrt(3.0)
                               : 1),
              "router rows %s: std %.4f, kurtosis %.2f", kinds[kind], std, kurtosis);
        free(w);
    }
    check(!up_same(up_path("rows_normal"), "model.layers.0.mlp.gate.weight", up_path("rows_normal"),
                   "model.layers.1.mlp.gate.weight"),
          "layers draw different rows");
}

// Which units of matrix `matrix` of two (I, H) or (H, I) tensors differ.
static int up_changed_units(const float* a, const float* b, int H, int I, int down, char* changed) {
    int count = 0;
    for (int u = 0; u < I; u++) {
        int differ = 0;
        for (int i = 0; i < H; i++)
            differ += down ? a[(long)i * I + u] != b[(long)i * I + u] : a[(long)u * H + i] != b[(long)u * H + i];
        changed[u] = differ > 0;
        count += differ > 0;
        if (differ > 0 && differ < H) count += 10000;        // units change as a whole
    }
    return count;
}

static void up_statistics(const float* w, int H, int I, int down, const char* marked, double* mean, double* std) {
    double sum = 0, squares = 0;
    long n = 0;
    for (int u = 0; u < I; u++)
        for (int i = 0; i < H && marked[u]; i++, n++) sum += down ? w[(long)i * I + u] : w[(long)u * H + i];
    *mean = sum / n;
    for (int u = 0; u < I; u++)
        for (int i = 0; i < H && marked[u]; i++)
            squares += pow((down ? w[(long)i * I + u] : w[(long)u * H + i]) - *mean, 2);
    *std = sqrt(squares / (n - 1));
}

// Drop-Upcycling: |S| = floor(r I) units, the same or different ones in the three matrices, with the statistics of what
// they replace; everything else bit for bit. And the noises.
static void test_up_drop(void) {
    up_begin();
    static const char* projections[] = {"gate_proj", "up_proj", "down_proj"};
    int H = 64, I = 96, expected = 33;          // floor(0.35 * 96) = 33
    up_make("dense", QWEN3, 2, H, I, 0, 0, 0, 1);
    for (int mode = 0; mode < 4; mode++) {      // drop shared, drop per-matrix, noise, MoE drop
        static const char* options[] = {
            "--method drop --drop-ratio 0.35", "--method drop --drop-ratio 0.35 --drop-indices per-matrix",
            "--method noise --noise-fraction 0.35 --noise-std 0.07", "--method drop --drop-ratio 0.35"};
        char name[32], changed[3][2][96], source_name[96], result_name[96];
        int right = 1, same_set = 1, experts_differ = 0;
        double worst_mean = 0, worst_std = 0;
        snprintf(name, sizeof name, "drop%d", mode);
        if (mode == 3) up_make("moe", QWEN3_MOE, 2, H, I, 2, 1, 1, 4);
        UP("{}/%s {}/%s --experts 4 %s", mode == 3 ? "moe" : "dense", name, options[mode]);
        for (int j = 2; j < 4; j++)
            for (int m = 0; m < 3; m++) {
                long n;
                if (mode == 3)
                    snprintf(source_name, sizeof source_name, "model.layers.1.mlp.experts.%d.%s.weight", j - 2,
                             projections[m]);
                else snprintf(source_name, sizeof source_name, "model.layers.1.mlp.%s.weight", projections[m]);
                snprintf(result_name, sizeof result_name, "model.layers.1.mlp.experts.%d.%s.weight", j, projections[m]);
                float *a = up_tensor(up_path(mode == 3 ? "moe" : "dense"), source_name, &n),
                      *b = up_tensor(up_path(name), result_name, NULL);
                int count = up_changed_units(a, b, H, I, m == 2, changed[m][j - 2]);
                right &= count == expected;
                if (mode != 1) same_set &= !memcmp(changed[0][j - 2], changed[m][j - 2], (size_t)I);
                double mean_a, std_a, mean_b, std_b;
                if (mode == 2)
                    for (long i = 0; i < n; i++) b[i] -= a[i];
                up_statistics(a, H, I, m == 2, changed[m][j - 2], &mean_a, &std_a);
                up_statistics(b, H, I, m == 2, changed[m][j - 2], &mean_b, &std_b);
                if (mode == 2) {
                    mean_a = 0;
                    std_a = 0.07;
                }
                worst_mean = fmax(worst_mean, fabs(mean_b - mean_a) / std_a);
                worst_std = fmax(worst_std, fabs(std_b / std_a - 1));
                free(a);
                free(b);
            }
        experts_differ = memcmp(changed[0][0], changed[0][1], (size_t)I) != 0;
        if (mode == 1)
            same_set =
                memcmp(changed[0][0], changed[1][0], (size_t)I) && memcmp(changed[1][0], changed[2][0], (size_t)I);
        check(right, "%s: floor(r I) = %d whole units change", options[mode], expected);
        check(same_set, "%s: %s", options[mode],
              mode == 1 ? "every matrix has its own units" : "the same units in the three matrices");
        check(experts_differ, "%s: every expert has its own units", options[mode]);
        // 33 * 64 draws: the mean is within 5 / sqrt(2112) of std, the std within 5 / sqrt(2 * 2112)
        check(worst_mean < 0.11 && worst_std < 0.077, "%s: new numbers: mean %.3f std away, std %.3f", options[mode],
              worst_mean, worst_std);
    }
    check(up_same(up_path("moe"), "model.layers.0.mlp.experts.1.up_proj.weight", up_path("drop3"),
                  "model.layers.0.mlp.experts.1.up_proj.weight"),
          "MoE drop: originals stay");
    UP("{}/dense {}/replace --experts 2 --method noise-replace --noise-fraction 0.25 --noise-std 0.02");
    long n, changed = 0, outside = 0;
    float *a = up_tensor(up_path("dense"), "model.layers.0.mlp.up_proj.weight", &n),
          *b = up_tensor(up_path("replace"), "model.layers.0.mlp.experts.1.up_proj.weight", NULL);
    double squares = 0;
    for (long i = 0; i < n; i++)
        if (a[i] != b[i]) {
            changed++;
            squares += (double)b[i] * b[i];
            outside += fabs(b[i]) > 0.11;
        }
    check(fabs((double)changed / n - 0.25) < 0.03 && fabs(sqrt(squares / changed) - 0.02) < 0.002 && !outside,
          "noise-replace: %.3f of single weights, std %.4f", (double)changed / n, sqrt(squares / changed));
    free(a);
    free(b);
    UP("{}/dense {}/zero --experts 2 --method drop --drop-ratio 0 --router-init normal");
    check(up_change(up_path("dense"), 0, up_path("zero")) <= 1e-6, "drop 0 is copy");
    UP("{}/dense {}/new --experts 2 --method random --noise-std 0.03");
    a = up_tensor(up_path("new"), "model.layers.0.mlp.experts.1.down_proj.weight", &n);
    double std = sqrt(sum_of_squares(a, n) / n);
    check(fabs(std - 0.03) < 0.002 && up_listed(up_path("new"), "source", 0, 1) == -1, "random: std %.4f, no source",
          std);
    free(a);
}

// Granular: shards of consecutive units, router rows repeated in each group, down scaled; exact at K = G and K = 2 G.
static void test_up_shards(void) {
    up_begin();
    int H = 64, I = 96, G = 4, width = 24;
    up_make("dense", QWEN3, 2, H, I, 0, 0, 0, 1);
    for (int k = 1; k <= 2; k++) {
        char name[16];
        snprintf(name, sizeof name, "gran%d", k);
        UP("{}/dense {}/%s --experts 12 --method granular --granularity 4 --topk %d --router-std 1", name, k * G);
        double e = up_change(up_path("dense"), 0, up_path(name));
        check(e <= 1e-6, "granular exact, K = %d: logits change by %.1e", k * G, e);
    }
    long n;
    float *gate = up_tensor(up_path("dense"), "model.layers.1.mlp.gate_proj.weight", NULL),
          *down = up_tensor(up_path("dense"), "model.layers.1.mlp.down_proj.weight", NULL);
    float *rows = up_tensor(up_path("gran1"), "model.layers.1.mlp.gate.weight", &n);
    int right = 1, repeated = n == 12L * H;
    for (int j = 0; j < 12; j++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.gate_proj.weight", j);
        float* g = up_tensor(up_path("gran1"), name, &n);
        right &= n == (long)width * H && !memcmp(g, gate + (long)(j % G) * width * H, sizeof(float) * (size_t)n);
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.down_proj.weight", j);
        float* d = up_tensor(up_path("gran1"), name, &n);
        for (int i = 0; i < H; i++)
            for (int u = 0; u < width; u++) right &= d[i * width + u] == 4 * down[i * I + j % G * width + u];
        repeated &= !memcmp(rows + (long)j * H, rows + (long)(j / G * G) * H, sizeof(float) * (size_t)H);
        if (j >= G) repeated &= memcmp(rows + (long)j * H, rows + (long)(j - G) * H, sizeof(float) * (size_t)H) != 0;
        free(g);
        free(d);
    }
    check(right, "granular: gate is cut, down is cut and multiplied by G");
    check(repeated, "granular: one router row for each group");
    free(rows);
    UP("{}/dense {}/cube --experts 8 --method granular --granularity 4 --scale cuberoot --norm-topk 0");
    // without renormalisation s = E G^2 / K, E groups: 2 * 16 / 4 = 8, the cube root 2
    float *g = up_tensor(up_path("cube"), "model.layers.1.mlp.experts.6.gate_proj.weight", &n),
          *d = up_tensor(up_path("cube"), "model.layers.1.mlp.experts.6.down_proj.weight", NULL);
    double worst = 0;
    for (long i = 0; i < n; i++) worst = fmax(worst, fabs(g[i] - 2 * gate[2L * width * H + i]));
    for (int i = 0; i < H; i++)
        for (int u = 0; u < width; u++) worst = fmax(worst, fabs(d[i * width + u] - 2 * down[i * I + 2 * width + u]));
    check(worst < 1e-5, "granular cuberoot: each matrix times 2, largest error %.1e", worst);
    free(g);
    free(d);
    UP("{}/dense {}/gzero --experts 8 --method granular --granularity 4 --norm-topk 0 --topk 8 --router-init zero");
    check(up_change(up_path("dense"), 0, up_path("gzero")) <= 1e-6,
          "granular, not renormalised: exact with a zero router");
    for (int norm = 0; norm < 2; norm++) {
        char name[16];
        snprintf(name, sizeof name, "part%d", norm);
        UP("{}/dense {}/%s --experts 6 --topk 6 --method partition --router-init zero --norm-topk %d", name, norm);
        double e = up_change(up_path("dense"), 0, up_path(name));
        check(e <= 1e-6, "partition, K = E, norm_topk %d, zero router: logits change by %.1e", norm, e);
    }
    // every unit is in one shard, and not just cut in order
    int seen[96] = {0}, moved = 0;
    for (int j = 0; j < 6; j++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.gate_proj.weight", j);
        float* shard = up_tensor(up_path("part1"), name, &n);
        for (int u = 0; u < 16; u++)
            for (int s = 0; s < I; s++)
                if (!memcmp(shard + u * H, gate + (long)s * H, sizeof(float) * (size_t)H)) {
                    seen[s]++;
                    moved += s != j * 16 + u;
                }
        free(shard);
    }
    int once = 1;
    for (int s = 0; s < I; s++) once &= seen[s] == 1;
    check(once && moved > 48, "partition: every unit once, %d of %d elsewhere", moved, I);
    free(gate);
    free(down);
}

// Branch-Train-MiX: expert i from source i, everything else the mean.
static void test_up_sources(void) {
    up_begin();
    up_make("s0", LLAMA, 2, 32, 48, 0, 0, 0, 1);
    up_make("s1", LLAMA, 2, 32, 48, 0, 0, 0, 2);
    up_make("s2", LLAMA, 2, 32, 48, 0, 0, 0, 3);
    UP("{}/s0 {}/btm --experts 5 --sources {}/s1,{}/s2");
    check(up_same(up_path("s2"), "model.layers.0.mlp.up_proj.weight", up_path("btm"),
                  "model.layers.0.block_sparse_moe.experts.2.w3.weight") &&
              up_same(up_path("s1"), "model.layers.1.mlp.down_proj.weight", up_path("btm"),
                      "model.layers.1.block_sparse_moe.experts.4.w2.weight") &&
              up_same(up_path("s0"), "model.layers.1.mlp.gate_proj.weight", up_path("btm"),
                      "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
          "expert i is the FFN of source i mod 3");
    long n;
    float *mean = up_tensor(up_path("btm"), "model.layers.1.self_attn.q_proj.weight", &n), *x[3];
    static const char* names[] = {"s0", "s1", "s2"};
    double worst = 0;
    for (int i = 0; i < 3; i++) x[i] = up_tensor(up_path(names[i]), "model.layers.1.self_attn.q_proj.weight", NULL);
    for (long i = 0; i < n; i++) worst = fmax(worst, fabs(mean[i] - (x[0][i] + x[1][i] + x[2][i]) / 3));
    check(worst < 1e-7, "attention is the mean of three, largest error %.1e", worst);
    check(up_list_is(up_path("btm"), "source", 0, "0 1 2 0 1"), "lineage names the sources");
    free(mean);
    for (int i = 0; i < 3; i++) free(x[i]);
}

// MoE to MoE, the paper's copy: where what is kept.
static void test_up_twins(void) {
    up_begin();
    UP(GOLDEN "mixtral_top1 {}/k1 --experts 13");
    double e = up_change(GOLDEN "mixtral_top1", 0, up_path("k1"));
    check(e <= 1e-6, "K = 1, renormalised, 5 -> 13: logits change by %.1e", e);
    check(up_list_is(up_path("k1"), "source", 0, "0 1 2 3 4 0 1 2 3 4 0 1 2"),
          "originals keep their places, copies follow");
    check(up_same(GOLDEN "mixtral_top1", "model.layers.0.block_sparse_moe.experts.1.w2.weight", up_path("k1"),
                  "model.layers.0.block_sparse_moe.experts.11.w2.weight"),
          "expert 11 is expert 1");
    UP(GOLDEN "mixtral {}/m2 --experts 10");
    e = up_change(GOLDEN "mixtral", 1, up_path("m2"));
    check(e <= 1e-6, "K = 2 of twice the experts is K = 1 of the source: %.1e", e);
    check(up_change(GOLDEN "mixtral", 0, up_path("m2")) > 1e-3, "and not K = 2 of it");
    UP(GOLDEN "olmoe {}/times3 --experts 18");
    e = up_change(GOLDEN "olmoe", 1, up_path("times3"));
    check(e <= 1e-6, "K = 3 of three times the experts, not renormalised, is K = 1: %.1e", e);
    UP(GOLDEN "mixtral {}/shuffled --experts 10 --method shuffle");
    e = up_change(GOLDEN "mixtral", 1, up_path("shuffled"));
    check(e <= 1e-6, "shuffle is a no-op on the function: %.1e", e);
    check(!up_same(up_path("shuffled"), "model.layers.0.block_sparse_moe.experts.0.w1.weight", up_path("shuffled"),
                   "model.layers.0.block_sparse_moe.experts.5.w1.weight"),
          "shuffle moves units");
    UP(GOLDEN "olmoe {}/k6 --experts 12 --topk 6");
    e = up_change(GOLDEN "olmoe", 0, up_path("k6"));
    check(e <= 1e-6, "twice the experts and twice K: %.1e", e);
    UP(VARIANTS "logit_norm {}/norm2 --experts 12 --method family");
    e = up_change(VARIANTS "logit_norm", 0, up_path("norm2"));
    check(e <= 1e-6, "family with logit norm, all experts doubled: %.1e", e);
    UP(VARIANTS "lpr {}/lpr2 --experts 8 --topk 4");
    e = up_change(VARIANTS "lpr", 0, up_path("lpr2"));
    check(e <= 1e-6, "LPR, twice the experts and twice K: %.1e", e);
    // family routing keeps the function for every K, and for targets that are no multiple
    static const char* models[] = {GOLDEN "mixtral",        GOLDEN "olmoe",
                                   GOLDEN "olmoe_norm",     GOLDEN "qwen3_moe_mlp_only",
                                   GOLDEN "qwen3_moe_top1", VARIANTS "sigmoid"};
    for (int i = 0; i < 6; i++) {
        char name[32];
        snprintf(name, sizeof name, "family%d", i);
        UP("%s {}/%s --experts 13 --method family", models[i], name);
        e = up_change(models[i], 0, up_path(name));
        check(e <= 1e-6, "family, %s: logits change by %.1e", models[i], e);
    }
    check(up_list_is(up_path("family1"), "family", 0, "0 1 2 3 4 5 0 1 2 3 4 5 0"), "families are the sources");
    UP("{}/m2 {}/m4 --experts 12");
    Json* j = up_receipt(up_path("m4"));
    const Json *parent = json_get(j, "parent"), *method = json_get(parent, "experts");
    check(method && method->items[1]->number == 10 && json_get(j, "experts")->items[1]->number == 12,
          "a receipt holds its source's receipt");
    json_free(j);
    UP(GOLDEN "mixtral {}/rnd --experts 8 --method random");
    check(up_list_is(up_path("rnd"), "source", 0, "0 1 2 3 4 -1 -1 -1") &&
              up_list_is(up_path("rnd"), "family", 0, "0 1 2 3 4 5 6 7"),
          "random: new experts have no source");
}

// The singular values of a small matrix, from the eigenvalues of W^T W by cyclic Jacobi rotations.
static void up_singular_values(const float* W, int rows, int cols, double* s) {
    double* A = (double*)checked_malloc(sizeof(double) * (size_t)(cols * cols));
    for (int i = 0; i < cols; i++)
        for (int j = 0; j < cols; j++) {
            A[i * cols + j] = 0;
            for (int r = 0; r < rows; r++) A[i * cols + j] += (double)W[r * cols + i] * W[r * cols + j];
        }
    for (int sweep = 0; sweep < 60; sweep++)
        for (int p = 0; p < cols; p++)
            for (int q = p + 1; q < cols; q++) {
                if (fabs(A[p * cols + q]) < 1e-300) continue;
                double theta = 0.5 * atan2(2 * A[p * cols + q], A[q * cols + q] - A[p * cols + p]), c = cos(theta),
                       t = sin(theta);
                for (int i = 0; i < cols; i++) {
                    double x = A[i * cols + p], y = A[i * cols + q];
                    A[i * cols + p] = c * x - t * y;
                    A[i * cols + q] = t * x + c * y;
                }
                for (int i = 0; i < cols; i++) {
                    double x = A[p * cols + i], y = A[q * cols + i];
                    A[p * cols + i] = c * x - t * y;
                    A[q * cols + i] = t * x + c * y;
                }
            }
    for (int i = 0; i < cols; i++) s[i] = sqrt(fmax(0, A[i * cols + i]));
    for (int i = 0; i < cols; i++)
        for (int j = i + 1; j < cols; j++)
            if (s[j] > s[i]) {
                double t = s[i];
                s[i] = s[j];
                s[j] = t;
            }
    free(A);
}

static void test_up_algebra(void) {
    up_begin();
    int shapes[3][2] = {{23, 9}, {8, 21}, {12, 12}};
    for (int i = 0; i < 3; i++) {
        int rows = shapes[i][0], cols = shapes[i][1], n = imin(rows, cols);
        float W[500], back[500], T[500];
        double expected[32], worst = 0, orthogonal = 0;
        for (int k = 0; k < rows * cols; k++) W[k] = (float)random_normal(mix64((uint64_t)k + 7));
        if (i == 2)
            for (int k = 0; k < cols; k++) W[11 * cols + k] = W[10 * cols + k] = W[k];         // rank 10
        Svd d = svd_of(W, rows, cols);
        svd_product(back, &d, n);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) T[c * rows + r] = W[r * cols + c];
        if (rows >= cols) up_singular_values(W, rows, cols, expected);
        else up_singular_values(T, cols, rows, expected);
        for (int k = 0; k < n; k++) worst = fmax(worst, fabs(d.s[k] - expected[k]));
        for (int a = 0; a < n; a++)
            for (int b = 0; b <= a; b++)
                orthogonal = fmax(orthogonal, fabs(dot(d.v + a * n, d.v + b * n, n) - (a == b)));
        check(relative_error(back, W, rows * cols) < 1e-6 && worst < 1e-6 && orthogonal < 1e-9,
              "SVD of %d x %d: product, values (%.1e), orthonormal vectors (%.1e)", rows, cols, worst, orthogonal);
        svd_free(&d);
    }
    double x[4 * 6], C[25], S[25], worst = 0;
    for (int i = 0; i < 24; i++) x[i] = random_normal(mix64((uint64_t)i));
    memcpy(x + 12, x + 6, sizeof(double) * 6);         // nothing is left of the third
    orthonormalise(x, 4, 6);
    for (int a = 0; a < 4; a++)
        for (int b = 0; b <= a; b++) worst = fmax(worst, fabs(dot(x + a * 6, x + b * 6, 6) - (a == b)));
    check(worst < 1e-12, "orthonormal vectors, also where one depended on another: %.1e", worst);
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++) C[i * 5 + j] = S[i * 5 + j] = 1.0 / (i + j + 1) + (i == j);
    int ok = cholesky(S, 5);
    worst = 0;
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++) worst = fmax(worst, fabs(dot(S + i * 5, S + j * 5, 5) - C[i * 5 + j]));
    C[0] = -1;
    check(ok && worst < 1e-14 && !cholesky(C, 5), "Cholesky: %.1e; refuses what is not positive definite", worst);
    // ISTA with orthonormal atoms has a closed form: soft thresholding
    double D[2 * 3] = {1, 0, 0, 0, 1, 0}, code[2 * 2];
    float W[3 * 2] = {3.0f, -0.2f, 0.5f, -4.0f, 9.0f, 9.0f};
    sparse_codes(code, D, W, 2, 3, 2, 0.1);            // the largest |D W| is 4, so the penalty is 0.4
    check(fabs(code[0] - 2.6) < 1e-6 && code[1] == 0 && fabs(code[2] - 0.1) < 1e-6 && fabs(code[3] + 3.6) < 1e-6,
          "ISTA: soft thresholding");
}

#define EXPERT "model.layers.1.mlp.experts.%d.%s.weight"
static float* up_expert(const char* dir, int e, const char* matrix) {
    char name[96];
    snprintf(name, sizeof name, EXPERT, e, matrix);
    return up_tensor(up_path(dir), name, NULL);
}

// Each operator by what defines it; originals never change.
static void test_up_operators(void) {
    up_begin();
    int H = 24, I = 40;
    long n = H * I;
    static const char* matrices[] = {"gate_proj", "up_proj", "down_proj"};
    up_make("m3", QWEN3_MOE, 2, H, I, 3, 2, 1, 5);
    static const char* methods[] = {"copy", "copy-noise", "scaled",      "interpolate", "shuffle",
                                    "drop", "orthogonal", "svd-perturb", "svd-mix",     "sparse-code-mix"};
    for (int k = 0; k < 10; k++) {
        char name[32];
        snprintf(name, sizeof name, "op_%s", methods[k]);
        UP("{}/m3 {}/%s --experts 7 --method %s", name, methods[k]);
        int originals = 1;
        for (int m = 0; m < 3; m++)
            for (int e = 0; e < 3; e++) {
                float *a = up_expert("m3", e, matrices[m]), *b = up_expert(name, e, matrices[m]);
                originals &= !memcmp(a, b, sizeof(float) * (size_t)n);
                free(a);
                free(b);
            }
        double worst = 0;
        int right = 1;
        for (int m = 0; m < 3; m++)
            for (int j = 3; j < 7; j++) {
                int s = j % 3;
                float *w = up_expert("m3", s, matrices[m]), *next = up_expert("m3", (s + 1) % 3, matrices[m]),
                      *v = up_expert(name, j, matrices[m]);
                double mean = 0, std = 0, sum = 0, squares = 0, norm_w = sum_of_squares(w, n),
                       norm_v = sum_of_squares(v, n), change = 0;
                int rows = m == 2 ? H : I, cols = m == 2 ? I : H;
                double s_w[40], s_v[40];
                float T[960];
                for (long i = 0; i < n; i++) {
                    mean += w[i] / (double)n;
                    sum += v[i] - w[i];
                    squares += pow(v[i] - w[i], 2);
                }
                for (long i = 0; i < n; i++) std += pow(w[i] - mean, 2) / (double)(n - 1);
                std = sqrt(std);
                change = sqrt(squares / norm_w);
                if (k >= 6 && k <= 8) {
                    for (int r = 0; r < rows; r++)
                        for (int c = 0; c < cols; c++) T[c * rows + r] = w[r * cols + c];
                    if (rows >= cols) up_singular_values(w, rows, cols, s_w);
                    else up_singular_values(T, cols, rows, s_w);
                    for (int r = 0; r < rows; r++)
                        for (int c = 0; c < cols; c++) T[c * rows + r] = v[r * cols + c];
                    if (rows >= cols) up_singular_values(v, rows, cols, s_v);
                    else up_singular_values(T, cols, rows, s_v);
                }
                switch (k) {
                case 0: right &= !memcmp(v, w, sizeof(float) * (size_t)n); break;
                case 1:
                    worst = fmax(worst, fabs(sqrt(squares / n) / (0.01 * std) - 1));
                    right &= worst < 0.1 && fabs(sum / n) < 0.01 * std * 0.2;
                    break;
                case 2:
                    for (long i = 0; i < n; i++) worst = fmax(worst, fabs(v[i] - 0.95 * w[i]));
                    right &= worst < 1e-6;
                    break;
                case 3:
                    for (long i = 0; i < n; i++) worst = fmax(worst, fabs(v[i] - 0.5 * (w[i] + next[i])));
                    right &= worst < 1e-6;
                    break;
                case 5: {
                    char changed[40];
                    right &= up_changed_units(w, v, H, I, m == 2, changed) == 20;
                    break;
                }
                case 6:     // all singular values equal, the Frobenius norm that of w
                    worst = fmax(worst, fabs(sqrt(norm_v / norm_w) - 1));
                    for (int i = 1; i < H; i++) worst = fmax(worst, fabs(s_v[i] / s_v[0] - 1));
                    right &= worst < 1e-5;
                    break;
                case 7: // close, but neither equal nor far: the size of S's noise is .1, of U's and V's about .05 each
                    right &= change > 0.02 && change < 0.35;
                    worst = fmax(worst, change);
                    break;
                case 8:     // 7 of 24 pairs exchanged: the rest of the energy is w's own
                    right &= change > 0.05 && change < 1.6;
                    worst = fmax(worst, change);
                    break;
                case 9: right &= change > 1e-3 && change < 1.5; worst = fmax(worst, change); break;
                default: break;
                }
                free(w);
                free(next);
                free(v);
            }
        check(originals, "%s: originals are untouched", methods[k]);
        check(right, "%s: copies are what the formula says (%.2e)", methods[k], worst);
    }
    // shuffle: one permutation for the three matrices
    float *g = up_expert("m3", 1, "gate_proj"), *u = up_expert("m3", 1, "up_proj"),
          *d = up_expert("m3", 1, "down_proj");
    float *sg = up_expert("op_shuffle", 4, "gate_proj"), *su = up_expert("op_shuffle", 4, "up_proj"),
          *sd = up_expert("op_shuffle", 4, "down_proj");
    int right = 1, moved = 0;
    for (int i = 0; i < I; i++) {
        int from = -1;
        for (int k = 0; k < I; k++)
            if (!memcmp(sg + i * H, g + k * H, sizeof(float) * (size_t)H)) from = k;
        right &= from >= 0 && !memcmp(su + i * H, u + from * H, sizeof(float) * (size_t)H);
        for (int r = 0; r < H && from >= 0; r++) right &= sd[r * I + i] == d[r * I + from];
        moved += from != i;
    }
    check(right && moved > I / 2, "shuffle: the same permutation in gate, up and down; %d of %d units moved", moved, I);
    free(g); free(u); free(d); free(sg); free(su); free(sd);
    // svd-mix with everything exchanged: the singular values of w on the vectors of the next expert, so V' = V_next
    // diagonalises it
    UP("{}/m3 {}/mix1 --experts 4 --method svd-mix --strength 1");
    UP("{}/m3 {}/mix0 --experts 4 --method svd-mix --strength 0");
    UP("{}/m3 {}/code0 --experts 4 --method sparse-code-mix --strength 0");
    float *w = up_expert("m3", 0, "gate_proj"), *next = up_expert("m3", 1, "gate_proj"),
          *all = up_expert("mix1", 3, "gate_proj"), *none = up_expert("mix0", 3, "gate_proj");
    float* code = up_expert("code0", 3, "gate_proj");
    double a[40], b[40], off = 0, size = 0;
    up_singular_values(w, I, H, a);
    up_singular_values(all, I, H, b);
    double worst = 0;
    for (int i = 0; i < H; i++) worst = fmax(worst, fabs(a[i] - b[i]) / a[0]);
    // both Gram matrices have the same eigenvectors exactly if they commute
    double G1[576], G2[576];
    for (int i = 0; i < H; i++)
        for (int j = 0; j < H; j++) {
            G1[i * H + j] = G2[i * H + j] = 0;
            for (int r = 0; r < I; r++) {
                G1[i * H + j] += (double)next[r * H + i] * next[r * H + j];
                G2[i * H + j] += (double)all[r * H + i] * all[r * H + j];
            }
        }
    for (int i = 0; i < H; i++)
        for (int j = 0; j < H; j++) {
            double xy = 0, yx = 0;
            for (int k = 0; k < H; k++) {
                xy += G1[i * H + k] * G2[k * H + j];
                yx += G2[i * H + k] * G1[k * H + j];
            }
            off = fmax(off, fabs(xy - yx));
            size = fmax(size, fabs(xy));
        }
    check(worst < 1e-5 && off / size < 1e-5,
          "svd-mix of everything: w's singular values (%.1e) on the other's vectors (%.1e)", worst, off / size);
    check(relative_error(none, w, n) < 1e-6 && relative_error(code, w, n) < 1e-6,
          "svd-mix and sparse-code-mix of nothing change nothing");
    free(w); free(next); free(all); free(none); free(code);
}

static void test_up_routers(void) {
    up_begin();
    int E = 3, H = 24;
    up_make("m3", QWEN3_MOE, 2, H, 40, E, 2, 1, 5);
    static const char* routers_[] = {"copy",       "noise",       "interpolate", "scaled",     "perturb-new",
                                     "orthogonal", "adversarial", "temperature", "svd-perturb"};
    float* w = up_tensor(up_path("m3"), "model.layers.1.mlp.gate.weight", NULL);
    double std = 0, mean = 0;
    for (int i = 0; i < E * H; i++) mean += w[i] / (double)(E * H);
    for (int i = 0; i < E * H; i++) std += pow(w[i] - mean, 2) / (E * H - 1);
    std = sqrt(std);
    for (int k = 0; k < 9; k++) {
        char name[32];
        snprintf(name, sizeof name, "router_%s", routers_[k]);
        UP("{}/m3 {}/%s --experts 8 --router %s", name, routers_[k]);
        float* v = up_tensor(up_path(name), "model.layers.1.mlp.gate.weight", NULL);
        int originals = !memcmp(v, w, sizeof(float) * (size_t)(E * H)), right = 1;
        double worst = 0, noise = 0;
        for (int j = 3; j < 8; j++) {
            const float *x = w + j % 3 * H, *next = w + (j + 1) % 3 * H, *y = v + j * H;
            double xx = 0, xd = 0, dd = 0;
            for (int c = 0; c < H; c++) {
                double d = (double)y[c] - x[c];
                xx += (double)x[c] * x[c];
                xd += x[c] * d;
                dd += d * d;
                if (k == 0) right &= d == 0;
                if (k == 2) worst = fmax(worst, fabs(y[c] - 0.5 * (x[c] + next[c])));
                if (k == 3) worst = fmax(worst, fabs(y[c] - 0.95 * x[c]));
                if (k == 7) worst = fmax(worst, fabs(y[c] - x[c] / 1.1));
                if (k == 6) {
                    double other = 0, away = 0, length = 0;
                    for (int i = 0; i < H; i++) {
                        other = (w[(j + 1) % 3 * H + i] + w[(j + 2) % 3 * H + i]) / 2.0;
                        length += pow(x[i] - other, 2);
                    }
                    other = (w[(j + 1) % 3 * H + c] + w[(j + 2) % 3 * H + c]) / 2.0;
                    away = (x[c] - other) / sqrt(length);
                    double norm = 0;
                    for (int i = 0; i < H; i++) norm += (double)x[i] * x[i];
                    worst = fmax(worst, fabs(d - 0.01 * sqrt(norm) * away));
                }
            }
            noise += dd;
            if (k == 5) {       // orthogonal, a tenth of the length
                worst = fmax(worst, fabs(xd) / xx);
                right &= fabs(sqrt(dd / xx) - 0.1) < 1e-5;
            }
            if (k == 8) right &= dd > 0 && sqrt(dd / xx) < 0.5;
        }
        noise = sqrt(noise / (5 * H));
        if (k == 1 || k == 4) right &= fabs(noise / (0.01 * std) - 1) < 0.2;
        check(right && worst < 1e-6, "%s: copies' rows (%.1e)", routers_[k], worst);
        check(originals == (k != 1), "%s: originals' rows are %s", routers_[k], k == 1 ? "perturbed too" : "untouched");
        free(v);
    }
    free(w);
    // the selection bias: U(-delta, delta) for copies; refused where there is none
    UP(VARIANTS "sigmoid {}/bias --experts 200 --router-delta 0.5");
    long n;
    float *b = up_tensor(up_path("bias"), "model.layers.0.mlp.gate.e_score_correction_bias", &n),
          *b0 = up_tensor(VARIANTS "sigmoid", "model.layers.0.mlp.gate.e_score_correction_bias", NULL);
    double largest = 0, sum = 0, squares = 0;
    int same = 1;
    for (int j = 0; j < 5; j++) same &= b[j] == b0[j];
    for (int j = 5; j < 200; j++) {
        double d = b[j] - b0[j % 5];
        largest = fmax(largest, fabs(d));
        sum += d;
        squares += d * d;
    }
    check(same && n == 200 && largest <= 0.5 && largest > 0.45 && fabs(sum / 195) < 0.1 &&
              fabs(sqrt(squares / 195) - 0.5 / sqrt(3)) < 0.04,
          "bias: U(-delta, delta) for copies alone");
    check(up_same(VARIANTS "sigmoid", "model.layers.0.mlp.experts.3.up_proj.weight", up_path("bias"),
                  "model.layers.0.mlp.experts.198.up_proj.weight"),
          "bias: experts are copies");
    free(b);
    free(b0);
    check(up_run("", GOLDEN "mixtral {}/none --experts 10 --router bias") == 2 && strstr(up_output, "no bias"),
          "bias: refused without a bias");
    UP(VARIANTS "lpr {}/lpr --experts 9 --router scaled --router-delta 0.5");
    float *p0 = up_tensor(VARIANTS "lpr", "model.layers.0.mlp.gate.prototypes", NULL),
          *p = up_tensor(up_path("lpr"), "model.layers.0.mlp.gate.prototypes", &n);
    check(n == 9 * 16 && p[6 * 16 + 3] == 0.5f * p0[2 * 16 + 3] && p[2 * 16] == p0[2 * 16],
          "LPR: a copy has a prototype of its own");
    free(p0);
    free(p);
}

// Scores against gradients that transformers made in fp64: the calibration data are the reference's tokens.
static void test_up_utility(void) {
    up_begin();
    static const char* models[] = {GOLDEN "qwen3_moe_top1", GOLDEN "dots1"};
    for (int i = 0; i < 2; i++) {
        char path[PATH_SIZE];
        Error error = {""};
        SafeTensors* s = safetensors_open(join_path(path, models[i], "reference.safetensors"), &error);
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
                float* x = (float*)checked_malloc(sizeof(float) * (size_t)g->count);
                safetensors_read(s, g, 0, g->count, x, &error);
                for (long k = 0; k < g->count; k++) g2[e][m == 2] += (double)x[k] * x[k];
                free(x);
                x = up_tensor(models[i], name + 5, &n);
                for (long k = 0; k < n; k++) w2[e][m == 2] += (double)x[k] * x[k];
                free(x);
            }
        safetensors_close(s);
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
                               : !strcmp(on, "max")     ? fmax(a, b)
                                                        : fmin(a, b);
                double got = score->items[e]->number;
                worst = fmax(worst, expected == 0 ? got : fabs(got / expected - 1));
            }
            check(worst < 1e-4, "%s: %s on %s in %d batches, against fp64 gradients: %.1e", models[i], cases[k].select,
                  cases[k].on, cases[k].batches, worst);
            json_free(j);
        }
    }
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
            free(v);
        }
        double expected = json_get(json_get(g, "layers")->items[1], "score")->items[e]->number / (sqrt(v2) + 1e-8);
        worst = fmax(worst, fabs(json_get(json_get(f, "layers")->items[1], "score")->items[e]->number / expected - 1));
    }
    check(worst < 1e-5, "fisher is grad2 over the norm of Adam's second moment: %.1e", worst);
    json_free(f);
    json_free(g);
}

static void test_up_optimizer(void) {
    up_begin();
    int H = 24, I = 40;
    long n;
    up_make("m3", QWEN3_MOE, 2, H, I, 3, 2, 1, 5);
    static const char* kinds[] = {"copy", "scale", "interpolate"};
    for (int k = 0; k < 3; k++) {
        char name[32];
        snprintf(name, sizeof name, "adam_%s", kinds[k]);
        UP("{}/m3 {}/%s --experts 7 --optimizer %s", name, kinds[k]);
        double worst = 0;
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < 7; j++) {
                int s = j % 3, copies = s == 0 ? 3 : 2;
                char a[128], b[128], c[128];
                const char* suffix = half ? "exp_avg_sq" : "exp_avg";
                snprintf(a, sizeof a, EXPERT ".%s", j, "down_proj", suffix);
                snprintf(b, sizeof b, EXPERT ".%s", s, "down_proj", suffix);
                snprintf(c, sizeof c, EXPERT ".%s", (s + 1) % 3, "down_proj", suffix);
                float *got = up_moment(up_path(name), a, &n), *from = up_moment(up_path("m3"), b, NULL),
                      *next = up_moment(up_path("m3"), c, NULL);
                for (long i = 0; i < n; i++) {
                    double expected = k == 1             ? from[i] / (half ? copies * copies : copies)
                                      : k == 2 && j >= 3 ? 0.5 * (from[i] + next[i])
                                                         : from[i];
                    worst = fmax(worst, fabs(got[i] - expected));
                }
                free(got);
                free(from);
                free(next);
            }
        float *router = up_moment(up_path(name), "model.layers.0.mlp.gate.weight.exp_avg_sq", &n),
              *from = up_moment(up_path("m3"), "model.layers.0.mlp.gate.weight.exp_avg_sq", NULL);
        double expected = k == 0   ? from[1 * H + 5]
                          : k == 1 ? from[1 * H + 5] / 4
                                   : 0.5 * (from[1 * H + 5] + from[2 * H + 5]);
        check(worst < 1e-6 && n == 7 * H && fabs(router[4 * H + 5] - expected) < 1e-6,
              "%s: moments of experts and router, largest error %.1e", kinds[k], worst);
        free(router);
        free(from);
    }
    // moments go where their weights go
    UP("{}/m3 {}/adam_shuffle --experts 4 --method shuffle --optimizer copy");
    check(strstr(up_output, "--resume --steps N` uses them") != NULL, "the receipt says how moments are used");
    UP("{}/m3 {}/adam_drop --experts 4 --method drop --optimizer copy");
    float *w = up_expert("m3", 0, "up_proj"), *v = up_expert("adam_shuffle", 3, "up_proj"),
          *x = up_expert("adam_drop", 3, "up_proj");
    float *m = up_moment(up_path("m3"), "model.layers.1.mlp.experts.0.up_proj.weight.exp_avg", NULL);
    float *mv = up_moment(up_path("adam_shuffle"), "model.layers.1.mlp.experts.3.up_proj.weight.exp_avg", NULL);
    float *mx = up_moment(up_path("adam_drop"), "model.layers.1.mlp.experts.3.up_proj.weight.exp_avg", NULL);
    int right = 1, dropped = 0;
    for (int i = 0; i < I; i++) {
        int from = -1;
        for (int k = 0; k < I; k++)
            if (!memcmp(v + i * H, w + k * H, sizeof(float) * (size_t)H)) from = k;
        right &= from >= 0 && !memcmp(mv + i * H, m + from * H, sizeof(float) * (size_t)H);
        int fresh = x[i * H] != w[i * H];
        dropped += fresh;
        for (int c = 0; c < H; c++) right &= mx[i * H + c] == (fresh ? 0 : m[i * H + c]);
    }
    check(right && dropped == I / 2, "moments are permuted with their units, and 0 where a weight is new");
    free(w); free(v); free(x); free(m); free(mv); free(mx);
    check(access(join_path(up_output, up_path("adam_copy"), "trainer.json"), F_OK) == 0, "trainer.json goes with them");
    UP("{}/m3 {}/adam_family --experts 6 --method family --optimizer copy");
    Error trainer_error = {""};
    Json* trainer = json_read(join_path(up_output, up_path("adam_family"), "trainer.json"), &trainer_error);
    long step = json_whole(json_get(trainer, "step"), LONG_MAX),
         start = json_whole(json_get(trainer, "family_start"), LONG_MAX);
    check(step > 0 && start == step, "new families are penalised from the step at which the run goes on: %ld", start);
    json_free(trainer);
    // twins of a shard: one in each group, or none
    up_make("dense", QWEN3, 2, H, I, 0, 0, 0, 8);
    static const struct { const char *arguments; int twins; } shards[] = {
        {"--experts 8 --method granular --granularity 4 --topk 4", 2}, {"--experts 4 --method partition", 1}};
    for (int i = 0; i < 2; i++) {
        UP("{}/dense {}/shards_copy --force %s --optimizer copy", shards[i].arguments);
        UP("{}/dense {}/shards_scale --force %s --optimizer scale", shards[i].arguments);
        float *kept = up_moment(up_path("shards_copy"), "model.layers.1.mlp.experts.2.up_proj.weight.exp_avg", &n),
              *scaled = up_moment(up_path("shards_scale"), "model.layers.1.mlp.experts.2.up_proj.weight.exp_avg", NULL);
        double worst = 0;
        for (long k = 0; k < n; k++) worst = fmax(worst, fabs(scaled[k] - kept[k] / shards[i].twins));
        check(worst < 1e-6 && n > 0, "%s: moments are divided by %d", shards[i].arguments, shards[i].twins);
        free(kept);
        free(scaled);
    }
    UP("{}/m3 {}/adam_reset --experts 7");
    check(access(join_path(up_output, up_path("adam_reset"), "optimizer.safetensors"), F_OK) != 0 &&
              access(join_path(up_output, up_path("adam_reset"), "trainer.json"), F_OK) != 0,
          "reset: neither moments nor trainer.json");
    Config c;
    Error error = {""};
    config_read(&c, up_path("adam_copy"), &error);
    Model* model = model_create(&c, FOR_TRAINING, 1, 4, 4, NULL);
    check(checkpoint_load(model, up_path("adam_copy"), &error) && optimizer_load(model, up_path("adam_copy"), &error),
          "train_moe reads them: %s", error.text);
    model_free(model);
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
        free(now);
        free(then);
    }
    int second = up_listed(up_path("norms"), "source", 1, 1);
    char name[96];
    snprintf(name, sizeof name, EXPERT, second, "up_proj");
    check(up_same(up_path("big"), name, up_path("norms"), "model.layers.1.mlp.experts.1.up_proj.weight"),
          "experts that stay are untouched");
    float *rows = up_tensor(up_path("norms"), "model.layers.1.mlp.gate.weight", NULL),
          *all = up_tensor(up_path("big"), "model.layers.1.mlp.gate.weight", NULL);
    check(!memcmp(rows + H, all + second * H, sizeof(float) * (size_t)H), "and take their router rows along");
    free(rows);
    free(all);
    // load and the norms of MoE-Pruner, counted here from a training model, which keeps every layer's activations
    UP("{}/big {}/load --experts 2 --select load --calibrate {}/random.bin --calibrate-batches 3 --batch 2 --seq 16");
    UP("{}/big {}/pruned --experts 5 --prune-weights 0.3 --calibrate {}/random.bin --calibrate-batches 3 --batch 2 "
       "--seq 16");
    Config c;
    Error error = {""};
    config_read(&c, up_path("big"), &error);
    Model* m = model_create(&c, FOR_TRAINING, 1, 16, 16, NULL);
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
                        most_gone = fmax(most_gone, score);
                    } else {
                        least_kept = fmin(least_kept, score);
                        right &= v[r * wide + k] == w[r * wide + k];
                    }
                }
                zeros &= gone == (int)floor(0.3 * wide + 1e-9);
                right &= most_gone <= least_kept * (1 + 1e-5);
            }
            free(w);
            free(v);
        }
    check(zeros && right, "MoE-Pruner: 30 %% of each row, those with the smallest |w| ||x gate||");
    dataset_close(d);
    model_free(m);
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
        spherical_k_means(centroids, cluster, x, TOKENS, DIMENSION, 3, key);
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
    for (int i = 0; i < 4; i++) worst = fmax(worst, fabs(sqrt(sum_of_squares(rows + i * 32, 32)) - 1));
    check(n == 128 && worst < 1e-5, "router rows are unit centroids: %.1e", worst);
    free(rows);
}

// Writes the model of `from` with each layer's experts in two packed tensors, as newer files have them, and Mixtral's
// router under its new name.
static int up_pack(const char* from, const char* to) {
    Config c;
    Error error = {""};
    config_read(&c, from, &error);
    Model* m = model_create(&c, FOR_SCORING, 1, 4, 4, NULL);
    int ok = checkpoint_load(m, from, &error), E = c.num_experts, count = 0;
    long H = c.hidden_size, I = c.moe_intermediate_size;
    OutTensor* out = (OutTensor*)checked_malloc(sizeof(OutTensor) * (size_t)(m->layout.count + 2 * c.num_layers));
    char(*names)[128] = (char(*)[128])checked_malloc(128 * (size_t)(m->layout.count + 2 * c.num_layers));
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        if (strstr(t->name, ".experts.")) continue;
        char* moe;
        snprintf(names[count], 128, "%s", t->name);
        if ((moe = strstr(names[count], "block_sparse_moe")) != NULL) strcpy(moe, "mlp.gate.weight");
        OutTensor o = {names[count], "F32", tensor_is_matrix(t) ? 2 : 1, {t->rows, t->cols, 0}, m->params + t->offset};
        out[count++] = o;
    }
    for (int l = 0; l < c.num_layers; l++)
        for (int down = 0; down < 2; down++) {
            snprintf(names[count], 128, "model.layers.%d.mlp.experts.%s", l, down ? "down_proj" : "gate_up_proj");
            OutTensor o = {names[count],
                           "F32",
                           3,
                           {E, down ? H : 2 * I, down ? I : H},
                           down ? m->weights.layers[l].down : m->weights.layers[l].gate_up};
            out[count++] = o;
        }
    char path[PATH_SIZE];
    Text text = {NULL, 0, 0};
    mkdir(to, 0777);
    ok &= safetensors_write(join_path(path, to, "model.safetensors"), out, count, &error);
    config_to_json(&text, &c);
    ok &= write_file(join_path(path, to, "config.json"), text.data, text.length, &error);
    free(text.data);
    free(out);
    free(names);
    model_free(m);
    return ok;
}

// Files: shards, formats, packed and sharded sources, threads; bits.
static void test_up_files(void) {
    up_begin();
    static const char* tensors[] = {"model.embed_tokens.weight", "model.layers.0.block_sparse_moe.gate.weight",
                                    "model.layers.1.block_sparse_moe.experts.6.w2.weight", "model.norm.weight",
                                    "lm_head.weight"};
    UP(GOLDEN "mixtral {}/one --experts 7");
    UP(GOLDEN "mixtral {}/many --experts 7 --shard-size 9K");
    UP("{}/many {}/again --experts 7");
    UP(GOLDEN "mixtral {}/half --experts 7 --dtype bf16");
    UP("{}/half {}/half2 --experts 7 --method copy --shard-size 5000");
    UP("{}/half2 {}/float --experts 7 --dtype f32");
    int same = 1, rounded = 1;
    for (int i = 0; i < 5; i++) {
        same &= up_same(up_path("one"), tensors[i], up_path("many"), tensors[i]) &&
                up_same(up_path("one"), tensors[i], up_path("again"), tensors[i]);
        same &= up_same(up_path("half"), tensors[i], up_path("half2"), tensors[i]) &&
                up_same(up_path("half"), tensors[i], up_path("float"), tensors[i]);
        long n;
        float *a = up_tensor(up_path("one"), tensors[i], &n), *b = up_tensor(up_path("half"), tensors[i], NULL);
        for (long k = 0; k < n; k++) rounded &= fabs(a[k] - b[k]) <= fabs(a[k]) / 256;
        free(a);
        free(b);
    }
    check(same, "one file or many, in and out: the same bits");
    check(rounded, "BF16 is the nearest");
    struct stat st;
    char path[PATH_SIZE], command[PATH_SIZE];
    int files = 0, within = 1;
    DIR* d = opendir(up_path("many"));
    struct dirent* entry;
    while ((entry = readdir(d)) != NULL) {
        Error error = {""};
        long bytes = 0;
        if (!strstr(entry->d_name, ".safetensors") || strstr(entry->d_name, "index")) continue;
        SafeTensors* s = safetensors_open(join_path(path, up_path("many"), entry->d_name), &error);
        for (int i = 0; s && i < s->num_tensors; i++) bytes += s->tensors[i].bytes;
        within &= s && (bytes <= 9000 || s->num_tensors == 1);
        files++;
        safetensors_close(s);
    }
    closedir(d);
    check(files > 3 && within, "%d shards of at most 9000 bytes of data", files);
    for (int i = 0; i < 2; i++) {
        static const char* methods[] = {"--method drop", "--method svd-perturb"};
        UP(GOLDEN "mixtral {}/t1_%d --experts 7 %s --threads 1", i, methods[i]);
        UP(GOLDEN "mixtral {}/t2_%d --experts 7 %s --threads 3 --shard-size 9K", i, methods[i]);
        char a[32], b[32];
        snprintf(a, sizeof a, "t1_%d", i);
        snprintf(b, sizeof b, "t2_%d", i);
        int equal = 1;
        for (int k = 0; k < 5; k++) equal &= up_same(up_path(a), tensors[k], up_path(b), tensors[k]);
        check(equal, "%s: the same bits with 1 and 3 threads, in one file and many", methods[i]);
    }
    UP(GOLDEN "mixtral {}/seed2 --experts 7 --method drop --seed 2");
    check(!up_same(up_path("seed2"), tensors[2], up_path("t1_0"), tensors[2]), "another seed draws other numbers");
    // packed experts, as newer files have them, under Mixtral's new names
    {
        Error error = {""};
        check(up_pack(GOLDEN "mixtral", up_path("packed")), "a packed source");
        UP("{}/packed {}/unpacked --experts 7");
        int equal = 1;
        for (int k = 0; k < 5; k++) equal &= up_same(up_path("one"), tensors[k], up_path("unpacked"), tensors[k]);
        equal &= up_same(up_path("one"), "model.layers.1.block_sparse_moe.experts.3.w3.weight", up_path("unpacked"),
                         "model.layers.1.block_sparse_moe.experts.3.w3.weight");
        check(equal, "packed experts: the same result");
        // Dots1 has tensors of width 0 beside its experts
        up_make("dots", DOTS1, 2, 24, 40, 4, 2, 1, 3);
        check(up_pack(up_path("dots"), up_path("dots_packed")), "a packed Dots1");
        for (int half = 0; half < 2; half++) {
            const char* dtype = half ? "bf16" : "keep";
            UP("{}/dots {}/dots_a --experts 6 --force --dtype %s", dtype);
            UP("{}/dots_packed {}/dots_b --experts 6 --force --dtype %s", dtype);
            equal = up_same(up_path("dots_a"), "model.layers.1.mlp.experts.5.up_proj.weight", up_path("dots_b"),
                            "model.layers.1.mlp.experts.5.up_proj.weight") &&
                    up_same(up_path("dots_a"), "model.layers.0.mlp.gate.weight", up_path("dots_b"),
                            "model.layers.0.mlp.gate.weight");
            check(equal, "packed Dots1, --dtype %s: the same result", dtype);
        }
        Config c;
        check(config_read(&c, up_path("dots_packed"), &error), "packed Dots1 has a configuration");
        Model* dots = model_create(&c, FOR_SCORING, 1, 4, 4, NULL);
        check(checkpoint_load(dots, up_path("dots_packed"), &error), "train_moe reads it: %s", error.text);
        model_free(dots);
    }
    // files of the tokenizer travel
    snprintf(command, sizeof command,
             "cp -r " GOLDEN
             "mixtral %s/tok && rm %s/tok/reference.safetensors && echo '{}' > %s/tok/tokenizer_config.json",
             up_dir, up_dir, up_dir);
    check(system(command) == 0, "a source with a tokenizer");
    UP("{}/tok {}/tok2 --experts 7");
    check(!stat(up_path("tok2/tokenizer_config.json"), &st) && st.st_size == 3, "its files travel");
}

static int up_exists(const char* name) { return !access(up_path(name), F_OK); }

// The destination is whole or absent.
static void test_up_safety(void) {
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    UP("{}/m3 {}/here --experts 6");
    check(up_run("", "{}/m3 {}/here --experts 9") == 2 && strstr(up_output, "exists"), "an existing DST is refused");
    UP("{}/m3 {}/here --experts 9 --force");
    Config c;
    Error error = {""};
    check(config_read(&c, up_path("here"), &error) && c.num_experts == 9 && !up_exists("here.saving") &&
              !up_exists("here.old"),
          "--force replaces it");
    check(up_run("", "{}/m3 {}/m3 --experts 6 --force") == 2 && up_run("", "{}/m3 {}/m3/inside --experts 6") == 2 &&
              up_run("", "{}/m3 {} --experts 6 --force") == 2,
          "DST in, at or around SRC is refused");
    mkdir(up_path("left.saving"), 0777);
    FILE* f = fopen(up_path("left.saving/model.safetensors"), "w");
    fclose(f);
    check(up_run("", "{}/m3 {}/left --experts 6") == 2 && strstr(up_output, "not made by upcycle") &&
              up_exists("left.saving/model.safetensors"),
          "a directory of somebody else's is left alone");
    f = fopen(up_path("left.saving/" SAVING_MARKER), "w");
    fclose(f);
    check(up_run("", "{}/left.saving {}/left --experts 6") == 2, "a source is never taken for what a killed run left");
    UP("{}/m3 {}/left --experts 6");
    check(up_exists("left/config.json") && !up_exists("left.saving"), "what a killed run left is removed");
    check(up_run("ulimit -f 20;", "{}/m3 {}/disk_full --experts 12") == 1 && !up_exists("disk_full") &&
              !up_exists("disk_full.saving"),
          "a full disk: exit 1, nothing left: %.80s", up_output);
    // killed while it writes: 600 MB, so that there is time
    up_make("large", QWEN3, 1, 512, 2048, 0, 0, 0, 1);
    char command[PATH_SIZE * 3];
    int clean = 1, killed = 0;
    for (int i = 0; i < 5; i++) {
        static const int signals[] = {SIGKILL, SIGTERM, SIGKILL, SIGINT, SIGKILL};
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)) _exit(9);
            execl(self_path, self_path, "--as-upcycle", up_path("large"), up_path("killed"), "--experts", "48",
                  "--method", "noise", (char*)NULL);
            _exit(9);
        }
        usleep(20000 + 20000 * (useconds_t)i);
        kill(pid, signals[i]);
        usleep(500);
        kill(pid, signals[i]);          // as timeout(1) does
        int status;
        waitpid(pid, &status, 0);
        if (signals[i] == SIGTERM)
            clean &= WIFEXITED(status) && WEXITSTATUS(status) == 143 && !up_exists("killed.saving");
        else if (signals[i] == SIGINT)
            clean &= WIFEXITED(status) && WEXITSTATUS(status) == 130 && !up_exists("killed.saving");
        else killed += WIFSIGNALED(status) && up_exists("killed.saving");
        clean &= !up_exists("killed");
    }
    check(clean && killed > 0, "killed five times: never a DST; SIGINT and SIGTERM tidy up, exit 130 and 143");
    UP("{}/large {}/killed --experts 2");
    check(up_exists("killed/model.safetensors") && !up_exists("killed.saving"), "the next run works");
    f = fopen(up_path("here/" SAVING_MARKER), "w"); // killed after it had marked what it was about to replace
    fclose(f);
    UP("{}/m3 {}/here --experts 6 --force");
    check(config_read(&c, up_path("here"), &error) && c.num_experts == 6 && !up_exists("here/" SAVING_MARKER) &&
              !up_exists("here.saving"),
          "a marked checkpoint is replaced all the same");
    snprintf(command, sizeof command, "cd %s && %s --as-upcycle m3 piped --experts 6 | head -n 1 > piped.txt", up_dir,
             self_path);
    check(system(command) == 0 && up_exists("piped/model.safetensors") && !up_exists("piped.saving"),
          "a pipe that is closed early loses nothing");
    snprintf(command, sizeof command,
             "cd %s && sha256sum m3/* > sums && %s --as-upcycle m3 m3x --experts 9 --method drop >/dev/null && "
             "sha256sum -c --quiet sums",
             up_dir, self_path);
    check(system(command) == 0, "the source's files are untouched");
    UP("{}/m3 {}/dry --experts 6 --dry-run");
    check(!up_exists("dry") && !up_exists("dry.saving") && strstr(up_output, "memory"), "--dry-run writes nothing");
}

// What is written can be read again, whatever SRC holds.
static void test_up_records(void) {
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make("nan", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make_random_shard("few.bin", 600, 256);
    Config c;
    Error error = {""};
    config_read(&c, up_path("nan"), &error);
    Model* m = model_create(&c, FOR_TRAINING, 1, 4, 4, NULL);
    checkpoint_load(m, up_path("nan"), &error);
    m->weights.layers[1].down[3] = NAN;
    check(checkpoint_save(m, up_path("nan"), 1) == NULL, "a model with a number that is none");
    model_free(m);
    UP("{}/nan {}/nan2 --experts 5 --select weight --check {}/few.bin --seq 8");
    check(strstr(up_output, "are not numbers") != NULL, "--check says that logits are not numbers");
    Json* j = up_receipt(up_path("nan2"));
    check(j && json_absent(json_get(json_get(j, "check"), "logits")), "and the receipt is JSON all the same");
    const Json* bytes = json_get(j, "bytes");
    struct stat st;
    check(bytes && bytes->count == 2 && !stat(up_path("nan2/model.safetensors"), &st) &&
              bytes->items[1]->number < (double)st.st_size && bytes->items[1]->number > 0.9 * (double)st.st_size,
          "it names the bytes of both");
    json_free(j);
    checkpoint_load(m = model_create(&c, FOR_TRAINING, 1, 4, 4, NULL), up_path("m3"), &error);
    m->weights.layers[1].down[3] = 3.4e38f; // BF16 ends at 3.39e38
    mkdir(up_path("huge"), 0777);
    check(checkpoint_save(m, up_path("huge"), 1) == NULL, "a model with a large number");
    model_free(m);
    UP("{}/huge {}/huge2 --experts 3 --dtype bf16");
    check(strstr(up_output, "1 numbers are too large") != NULL, "that BF16 does not hold it is said");
    UP("{}/huge {}/huge3 --experts 3");
    check(!strstr(up_output, "too large"), "and nothing where it is held");
    // a long line of ancestors
    char from[PATH_SIZE], to[PATH_SIZE];
    snprintf(from, sizeof from, "%s", up_path("m3"));
    for (int i = 0; i < 30; i++) {
        snprintf(to, sizeof to, "%s", up_path(i % 2 ? "odd" : "even"));
        UP("%s %s --force --experts 3", from, to);
        strcpy(from, to);
    }
    check(up_run("", "--inspect {}/odd") == 0, "the thirtieth upcycle can be read");
    int generations = 0;
    for (const char* s = up_output; (s = strstr(s, "3 -> 3 experts")) != NULL; s++) generations++;
    check(generations == 13, "and tells of %d", generations);
    // lots: every number of copies occurs, not blocks of cap + 1
    up_make("m8", QWEN3_MOE, 4, 24, 8, 8, 2, 1, 5);
    UP("{}/m8 {}/lots --experts 16 --select random");
    int twice = 0;
    for (int l = 0; l < 4; l++) {
        int counts[8] = {0};
        for (int e = 0; e < 16; e++) counts[up_listed(up_path("lots"), "source", l, e)]++;
        for (int e = 0; e < 8; e++) twice += counts[e] == 2;
    }
    check(twice >= 4, "--select random draws lots: %d of 32 experts are there twice (by rank it would be none)", twice);
    // prototypes that are drawn have the length of others
    UP(VARIANTS "lpr {}/lpr_random --experts 8 --method random");
    long n;
    float* prototypes = up_tensor(up_path("lpr_random"), "model.layers.0.mlp.gate.prototypes", &n);
    double squares = sum_of_squares(prototypes + n - n / 4, n / 4) / (double)(n / 4);
    check(squares > 0.2 && squares < 4, "LPR: new prototypes from N(0, 1): mean square %.2f", squares);
    free(prototypes);
}

// LPR's experts read the token with its read-out added, and pruning goes by that.
static void test_up_pruning_lpr(void) {
    up_begin();
    Config c;
    Error error = {""};
    config_read(&c, VARIANTS "lpr", &error);
    Model* m = model_create(&c, FOR_TRAINING, 1, 8, 8, NULL);
    checkpoint_load(m, VARIANTS "lpr", &error);
    m->weights.layers[0].lpr_readout_bias[5] = 1000;
    mkdir(up_path("biased"), 0777);
    check(checkpoint_save(m, up_path("biased"), 1) == NULL, "an LPR model whose experts read one large number");
    model_free(m);
    up_make_random_shard("random.bin", 900, c.vocab_size);
    UP("{}/biased {}/pruned --experts %d --prune-weights 0.9 --calibrate {}/random.bin --batch 2 --seq 8",
       c.num_experts);
    float* w = up_tensor(up_path("pruned"), "model.layers.0.mlp.experts.1.gate_proj.weight", NULL);
    int kept = 0;
    for (int r = 0; r < c.moe_intermediate_size; r++) kept += w[r * c.hidden_size + 5] != 0;
    check(kept > 0.9 * c.moe_intermediate_size, "LPR: %d of %d weights of that number are kept", kept,
          c.moe_intermediate_size);
    free(w);
}

// Sources that are not right, for the refusals below.
static void up_make_bad_sources(void) {
    Config c;
    Error error = {""};
    Text t = {NULL, 0, 0};
    up_make("like_lpr", QWEN3_MOE, 2, 20, 12, 4, 2, 1, 5); // as the LPR model among the references, but for the router
    up_make("llama7", LLAMA, 2, 24, 40, 0, 0, 0, 5);
    up_make("dots", DOTS1, 2, 24, 40, 4, 2, 1, 5);
    up_make("none_sparse", QWEN3, 2, 24, 40, 0, 0, 0, 5);
    up_make("window", QWEN3, 2, 24, 40, 0, 0, 0, 5);
    config_read(&c, up_path("none_sparse"), &error);
    c.arch = QWEN3_MOE;
    c.num_experts = 3;
    c.num_experts_per_tok = 2;
    c.moe_intermediate_size = 40;
    config_to_json(&t, &c);
    write_text(up_path("none_sparse/config.json"), t.data);
    size_t n = 0;
    char* window = read_bytes(up_path("window/config.json"), &n);
    t.length = 0;
    text_print(&t, "{\"use_sliding_window\": true, \"sliding_window\": 16, \"max_window_layers\": 0, %.*s", (int)n - 1,
               window + 1);
    write_bytes(up_path("window/config.json"), t.data, t.length);
    free(window);
    copy_directory(up_path("m3"), up_path("broken"));
    write_text(up_path("broken/upcycle.json"), "{\"layers\": ");
    copy_directory(up_path("m3"), up_path("broken_trainer"));
    write_text(up_path("broken_trainer/trainer.json"), "{\"step\"");
    // tied, and the head has the embedding's rows and three more
    config_read(&c, up_path("llama7"), &error);
    c.tie_word_embeddings = 1;
    Model* m = model_create(&c, FOR_SCORING, 1, 4, 4, NULL);
    OutTensor* out = (OutTensor*)checked_malloc(sizeof(OutTensor) * (size_t)(m->layout.count + 1));
    float* head = (float*)checked_malloc(sizeof(float) * (size_t)(c.vocab_size + 3) * (size_t)c.hidden_size);
    memset(head, 0, sizeof(float) * (size_t)(c.vocab_size + 3) * (size_t)c.hidden_size); // as all of the model is
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* s = &m->layout.tensors[i];
        OutTensor o = {s->name, "F32", tensor_is_matrix(s) ? 2 : 1, {s->rows, s->cols, 0}, m->params + s->offset};
        out[i] = o;
    }
    OutTensor last = {"lm_head.weight", "F32", 2, {c.vocab_size + 3, c.hidden_size, 0}, head};
    out[m->layout.count] = last;
    mkdir(up_path("head"), 0777);
    check(safetensors_write(up_path("head/model.safetensors"), out, m->layout.count + 1, &error), "a head too long");
    t.length = 0;
    config_to_json(&t, &c);
    write_text(up_path("head/config.json"), t.data);
    free(head);
    free(out);
    free(t.data);
    model_free(m);
}

// One line, exit 2, nothing left behind.
static void test_up_refusals(void) {
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make_random_shard("short.bin", 200, 256);
    up_make_bad_sources();
    static const struct { const char *arguments, *says;
    } cases[] = {{GOLDEN "llama {}/x", "--experts"},
                 {GOLDEN "llama --experts 4", "SRC DST"},
                 {"{}/nowhere {}/x --experts 4", "config.json"},
                 {GOLDEN "llama {}/x --experts 4 --topk 5", "only 4 experts"},
                 {GOLDEN "llama {}/x --experts 4 --layers every-2", "Qwen3"},
                 {GOLDEN "llama {}/x --experts 4 --norm-topk 0", "always renormalises"},
                 {GOLDEN "llama {}/x --experts 4 --arch qwen3", "mixtral fits"},
                 {GOLDEN "qwen3 {}/x --experts 4 --layers 3", "0 to 2"},
                 {GOLDEN "qwen3 {}/x --experts 4 --layers 1,", "after the last comma"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method granular", "--granularity"},
                 {GOLDEN "qwen3 {}/x --experts 8 --method granular --granularity 4", "no multiple"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method granular --granularity 3", "no multiple"},
                 {GOLDEN "qwen3 {}/x --experts 6 --method granular --granularity 3 --topk 4", "torn"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method partition", "no multiple"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method family", "is dense"},
                 {GOLDEN "qwen3 {}/x --experts 4 --select grad2", "is dense"},
                 {"{}/m3 {}/x --experts 6 --method granular", "fitting are"},
                 {"{}/m3 {}/x --experts 6 --layers all", "is a mixture"},
                 {"{}/m3 {}/x --experts 2", "--select router-norm"},
                 {"{}/m3 {}/x --experts 6 --select load", "keep"},
                 {"{}/m3 {}/x --experts 2 --select router-norm", "--reference"},
                 {"{}/m3 {}/x --experts 2 --select weight --method drop", "fewer"},
                 {"{}/m3 {}/x --experts 6 --select grad2", "--calibrate"},
                 {"{}/m3 {}/x --experts 6 --select grad2 --calibrate {}/short.bin --seq 64", "too short"},
                 {"{}/m3 {}/x --experts 6 --calibrate {}/short.bin", "nothing asked"},
                 {"{}/m3 {}/x --experts 6 --check {}/none.bin", "none.bin"},
                 {"{}/m3 {}/x --experts 6 --router bias", "no bias"},
                 {"{}/m3 {}/x --experts 6 --method family --router noise", "exactly"},
                 {"{}/m3 {}/x --experts 6 --method family --topk 4", "one member"},
                 {"{}/m3 {}/x --experts 6 --drop-ratio 0.3", "belongs to --method drop"},
                 {"{}/m3 {}/x --experts 6 --method drop --drop-ratio 1.5", "from 0 to 1"},
                 {"{}/m3 {}/x --experts 6 --methd copy", "unknown"},
                 {"{}/m3 {}/x --experts 6 --s 5", "--s: may be any of --seed"},
                 {"{}/m3 {}/x -k2 --experts 6", "-k: unknown"},
                 {"{}/m3 {}/x --experts 6 --shard-size 5X", "5G"},
                 {"{}/m3 {}/x --experts 6 --prune-weights 0.5", "--calibrate"},
                 {"{}/m3 {}/absent/x --experts 6", "parent"},
                 {GOLDEN "mixtral {}/x --experts 10 --optimizer copy", "optimizer.safetensors"},
                 {GOLDEN "llama {}/x --experts 2 --sources " GOLDEN "qwen3", "has another model_type than"},
                 {GOLDEN "llama {}/x --experts 1 --sources " GOLDEN "llama", "each needs an expert"},
                 {"{}/m3 {}/x --experts 6 --cap 2", "score"},
                 {"{}/m3 {}/x --experts 6 --check-batches 2", "there is no --check"},
                 {"{}/m3 {}/x --experts 6 --method svd-mix --strength 1.1", "0 to 1"},
                 {"{}/m3 {}/x --experts 6 --method sparse-code-mix --strength 2", "0 to 1"},
                 {"{}/m3 {}/x --experts 2 --select router-norm --reference " VARIANTS "lpr", "router than"},
                 {VARIANTS "lpr {}/x --experts 2 --select router-norm --reference {}/like_lpr", "router than"},
                 {"{}/none_sparse {}/x --experts 6", "no layer is sparse"},
                 {"{}/window {}/x --experts 4", "sliding_window 16"},
                 {"{}/head {}/x --experts 4", "lm_head.weight differs"},
                 {"{}/m3 {}/x --experts 3 --method family", "as many experts as SRC"},
                 {"{}/m3 {}/x --experts 3 --method drop", "as many experts as SRC"},
                 {"{}/m3 {}/x --experts 3 --router perturb-new", "no more experts than SRC"},
                 {"{}/m3 {}/x --experts 6 --method random --prune-weights 0.5 --calibrate {}/short.bin", "seen none"},
                 {"{}/m3 {}/x --experts 3 --prune-weights 0 --calibrate {}/short.bin", "--prune-weights 0"},
                 {"{}/m3 {}/x --experts 6 --select random --allocate greedy", "draws lots"},
                 {"{}/m3 {}/x --experts 6 --method shuffle --optimizer interpolate", "no next expert"},
                 {"{}/llama7 {}/x --experts 6 --optimizer interpolate", "no next expert"},
                 {"{}/broken {}/x --experts 6 --dry-run", "upcycle.json"},
                 {"{}/broken_trainer {}/x --experts 6 --optimizer copy --dry-run", "trainer.json"},
                 {"{}/dots {}/x --experts 8 --arch olmoe", "leave it out"},
                 {"{}/m3 {}/x --experts 6 --batch 2", "there is no --calibrate or --check"},
                 {"{}/m3 {}/x --experts 6 --data {}/short.bin", "--data goes with --inspect"},
                 {"--inspect {}/m3 --experts 6", "leave out --experts"},
                 {"--inspect {}/m3 --seq 8", "there is no --data"},
                 {GOLDEN "llama {}/x --experts 2 --sources {}/m3", "has another model_type than"},
                 {"{}/m3 {}/x --experts 6 --strength 2", "belongs to"},
                 {"{}/m3 {}/x --experts six", "whole number"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int code = up_run("", "%s", cases[i].arguments), lines = 0;
        for (const char* s = up_output; *s; s++) lines += *s == '\n';
        check(code == 2 && lines == 1 && strstr(up_output, cases[i].says) && !up_exists("x") && !up_exists("x.saving"),
              "%s: %d, %.200s", cases[i].arguments, code, up_output);
    }
}

// What the receipt says of the function must agree with what --check finds.
static void test_up_receipt(void) {
    up_begin();
    up_make_random_shard("few.bin", 600, 29);
    static const struct { const char *arguments, *function, *warning; double least, most; } cases[] = {
        {GOLDEN "llama {}/r%d --experts 4", "kept exactly", "no language-model gradient", 0, 1e-6},
        {GOLDEN "qwen3 {}/r%d --experts 4 --norm-topk 0", "not kept", "shrinks by about E / K = 2", 1e-2, 2},
        {GOLDEN "qwen3 {}/r%d --experts 4 --topk 1", "kept exactly", "never learns", 0, 1e-6},
        {GOLDEN "qwen3 {}/r%d --experts 6 --method granular --granularity 3", "kept exactly", NULL, 0, 1e-6},
        {GOLDEN "qwen3 {}/r%d --experts 4 --method drop", "not kept", NULL, 1e-3, 2},
        {GOLDEN "mixtral {}/r%d --experts 10", "that of SRC with 1 expert per token", "1 distinct source", 1e-4, 2},
        {GOLDEN "olmoe {}/r%d --experts 12", "not kept", "each shrinks by about 2", 1e-4, 2},
        {GOLDEN "mixtral {}/r%d --experts 10 --method family", "kept exactly", NULL, 0, 1e-6},
        {GOLDEN "mixtral_top1 {}/r%d --experts 10", "kept exactly", "copies get no token", 0, 1e-6},
        {GOLDEN "mixtral {}/r%d --experts 3 --select weight", "not kept: 2 of 5 experts are gone", NULL, 1e-4, 2},
        {GOLDEN "mixtral {}/r%d --experts 5", "kept exactly", NULL, 0, 1e-6},
        {GOLDEN "mixtral {}/r%d --experts 8 --method scaled", "not kept", "1 distinct source", 1e-4, 2}};
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        char arguments[256], name[16];
        snprintf(name, sizeof name, "r%d", i);
        snprintf(arguments, sizeof arguments, "%.*s{}/%s%s --check {}/few.bin --seq 12 --batch 3",
                 (int)(strstr(cases[i].arguments, "{}") - cases[i].arguments), cases[i].arguments, name,
                 strstr(cases[i].arguments, "%d") + 2);
        UP("%s", arguments);
        Json* j = up_receipt(up_path(name));
        const Json *function = json_get(j, "function"), *warnings = json_get(j, "warnings"),
                   *proof = json_get(j, "check");
        int warned = cases[i].warning == NULL;
        for (int k = 0; k < warnings->count; k++)
            warned |= cases[i].warning && strstr(warnings->items[k]->string, cases[i].warning);
        double change = json_get(proof, "logits")->number, before = json_get(proof, "loss")->items[0]->number;
        check(!strncmp(function->string, cases[i].function, strlen(cases[i].function)) && warned &&
                  change >= cases[i].least && change <= cases[i].most && before > 1,
              "%s: %s (%.1e), %d warnings", cases[i].arguments, function->string, change, warnings->count);
        json_free(j);
    }
    Json* j = up_receipt(up_path("r5"));
    check(fabs(json_get(json_get(j, "check"), "distinct_sources")->number - 1) < 1e-9,
          "copy x 2, K = 2: every token reaches 1 distinct source");
    json_free(j);
    j = up_receipt(up_path("r7"));
    check(fabs(json_get(json_get(j, "check"), "distinct_sources")->number - 2) < 1e-9,
          "family x 2, K = 2: every token reaches 2");
    json_free(j);
    check(up_run("", "--inspect {}/r5 --data {}/few.bin --seq 12") == 0 && strstr(up_output, "5 of 45 pairs equal") &&
              strstr(up_output, "within families 1.0000") && strstr(up_output, "copy, 5 -> 10 experts") &&
              strstr(up_output, "Gini"),
          "--inspect finds the twins, the lineage and the load");
}

// ---------------------------------------------------------------------------------------------------------------------
// train_moe.cu: the same references, and the same runs as on the CPU

#ifdef TEST_GPU
// bf16 has 8 bits: a product's operands are off by up to 2^-9, and what is kept between layers is rounded again. A
// token whose experts score almost alike may get another one, and is another token from there on.
static const Tolerances of_bf16 = {0.2, 0.02, 0.02, 0.15, 0.3, 2, 0.1};

static void on_backend(const Backend* backend, void (*run)(void)) {
    default_backend = backend;
    run();
    default_backend = &cpu_backend;
}

static void gpu_golden(Tolerances most) {
    for (size_t i = 0; i < sizeof golden_models / sizeof golden_models[0]; i++)
        test_golden_model("golden", golden_models[i], most);
    for (size_t i = 0; i < sizeof golden_routers / sizeof golden_routers[0]; i++)
        test_golden_model("golden_routers", golden_routers[i], most);
}
static void gpu_golden_floats(void) { gpu_golden(of_floats); }
static void gpu_golden_bf16(void) { gpu_golden(of_bf16); }
static void test_gpu_fp32(void) { on_backend(&gpu_backend_float, gpu_golden_floats); }
static void test_gpu_bf16(void) { on_backend(&gpu_backend_bf16, gpu_golden_bf16); }

// Models that are large enough for several tiles in every direction, with sizes that fill none of them: logits and
// gradients against the CPU's. All experts are chosen in bf16, where scores that are nearly equal could change places.
// Passes are micro-batches: each has other tokens and adds to the gradients, and nothing waits for any but the first.
// With families, expert e and e + E/2 are copies whose scores are equal.
static void gpu_against_cpu(const char* name, const Config* c, int B, int T, int passes, double most_logits,
                            double most_gradient) {
    long n = (long)B * T, V = c->vocab_size, worst_at = 0;
    int *tokens = (int*)checked_malloc(sizeof(int) * (size_t)(n + passes)), all = 1, E = c->num_experts;
    float* logits[2];
    Model* m[2];
    for (long i = 0; i < n + passes; i++) tokens[i] = (int)(mix64((uint64_t)(i * i)) % (uint64_t)(i % 3 ? V : 3));
    for (int way = 0; way < 2; way++) {
        const Backend* gpu = default_backend;
        if (way == 0) default_backend = &cpu_backend;
        m[way] = model_create(c, FOR_TRAINING, B, T, T, NULL);
        default_backend = gpu;
        model_init(m[way], 1);
        for (long i = 0; i < m[way]->layout.matrices; i++) m[way]->params[i] *= 4;
        m[way]->balance.aux = m[way]->balance.z = 0.01f;
        m[way]->has_families = c->family_penalty > 0;
        for (int l = 0; l < c->num_layers && m[way]->has_families; l++) {
            for (int e = 0; e < E; e++) m[way]->family[l * E + e] = e % (E / 2);
            memcpy(m[way]->weights.layers[l].router + (long)E / 2 * c->hidden_size, m[way]->weights.layers[l].router,
                   sizeof(float) * (size_t)(E / 2) * (size_t)c->hidden_size);
        }
        m[way]->backend->send(m[way], PARAMETERS);
        for (int pass = 0; pass < passes; pass++) {
            m[way]->backend->forward(m[way], tokens + pass, tokens + pass + 1, B, T);
            if (pass == 0) {        // the CPU's become their gradient in place
                m[way]->backend->read_back(m[way], LOGITS);
                logits[way] = (float*)checked_malloc(sizeof(float) * (size_t)(n * V));
                memcpy(logits[way], m[way]->logits, sizeof(float) * (size_t)(n * V));
            }
            m[way]->backend->backward(m[way], 0.5f);
        }
        m[way]->backend->read_back(m[way], GRADIENTS | ROUTING);
    }
    double worst = 0, logit_error = relative_error(logits[1], logits[0], n * V);
    for (int l = 0; l < c->num_layers; l++)
        all &= !c->sparse[l] || !memcmp(m[0]->layers[l].experts, m[1]->layers[l].experts,
                                        sizeof(int) * (size_t)(c->num_experts_per_tok < c->num_experts ? n * 2 : 0));
    for (int i = 0; i < m[0]->layout.count; i++) {
        const Tensor* t = &m[0]->layout.tensors[i];
        double e = relative_error(m[1]->grads + t->offset, m[0]->grads + t->offset, tensor_size(t));
        if (!(e <= worst)) worst = e, worst_at = i;
    }
    Losses a = take_losses(m[0]), b = take_losses(m[1]);
    double other = larger(fabs(a.aux - b.aux), larger(fabs(a.z - b.z), fabs(a.lpr - b.lpr)));
    check(all && logit_error <= most_logits && fabs(a.loss - b.loss) <= most_logits &&
              other <= most_logits * (1 + a.z + a.lpr),
          "%s: relative error of the logits %.1e, loss %.6f and %.6f, others differ by %.1e", name, logit_error, a.loss,
          b.loss, other);
    check(worst <= most_gradient, "%s: %d gradients, largest relative error %.1e (%s)", name, m[0]->layout.count, worst,
          m[0]->layout.tensors[worst_at].name);
    for (int way = 0; way < 2; way++) {
        model_free(m[way]);
        free(logits[way]);
    }
    free(tokens);
}

// A stable sort has one result only: the CPU's. Some experts get nothing, and expert 0 half of everything.
static void gpu_grouping(int N, int K, int E) {
    int R = N * K, most = R / GROUP_ROWS + E, ok = 1, t = 0;
    int sizes[] = {R, E + 1, R, R, R, 2 * most, gpu_group_chunks(N, K) * E}, *host[7], *got[7], *device[7];
    for (int i = 0; i < 7; i++) {
        host[i] = (int*)checked_malloc(sizeof(int) * (size_t)sizes[i]);
        got[i] = (int*)checked_malloc(sizeof(int) * (size_t)sizes[i]);
        CHECK(cudaMalloc((void**)&device[i], sizeof(int) * (size_t)sizes[i]));
    }
    int *experts = host[0], *offsets = host[1];
    for (int a = 0; a < R; a++)
        experts[a] = mix64((uint64_t)a) % 2 ? (int)(mix64((uint64_t)a * 3) % (uint64_t)E) / 5 * 5 : 0;
    group_by_expert(offsets, host[2], host[4], experts, N, K, E);
    for (int r = 0; r < R; r++) host[3][r] = host[2][r] / K;        // the token
    CHECK(cudaMemcpy(device[0], experts, sizeof(int) * (size_t)R, cudaMemcpyHostToDevice));
    gpu_group_by_expert(device[1], (int2*)device[5], most, device[2], device[3], device[4], device[6], device[0], N, K,
                        E);
    for (int i = 1; i < 6; i++)
        CHECK(cudaMemcpy(got[i], device[i], sizeof(int) * (size_t)sizes[i], cudaMemcpyDeviceToHost));
    for (int i = 1; i < 5; i++) ok &= !memcmp(got[i], host[i], sizeof(int) * (size_t)sizes[i]);
    for (int e = 0; e < E; e++)
        for (int row = offsets[e]; row < offsets[e + 1]; row += GROUP_ROWS, t++)
            ok &= got[5][2 * t] == e && got[5][2 * t + 1] == row;
    for (; t < most; t++) ok &= got[5][2 * t] == -1;
    check(ok, "%d assignments to %d experts are grouped as on the CPU", R, E);
    for (int i = 0; i < 7; i++) {
        free(host[i]);
        free(got[i]);
        CHECK(cudaFree(device[i]));
    }
}

static void test_gpu_tiles(void) {
    static const struct { int H, NH, NKV, HD, I, E, T; } sizes[] = {{144, 4, 2, 32, 136, 3, 150},
                                                                     {100, 3, 1, 70, 77, 2, 133},
                                                                     {72, 2, 2, 100, 264, 2, 70}};
    for (int i = 0; i < 3; i++)
        for (int bf16_too = 0; bf16_too < 2; bf16_too++) {
            Config c = tiny_config(i == 1 ? OLMOE : QWEN3_MOE, 2, sizes[i].E, bf16_too ? sizes[i].E : 2);
            char name[64];
            c.hidden_size = sizes[i].H;
            c.num_heads = sizes[i].NH;
            c.num_kv_heads = sizes[i].NKV;
            c.head_dim = sizes[i].HD;
            c.moe_intermediate_size = sizes[i].I;
            c.qk_norm = i == 1 ? QK_NORM_ROW : QK_NORM_HEAD;
            c.vocab_size = 301;
            snprintf(name, sizeof name, "hidden %d, heads of %d, %s", c.hidden_size, c.head_dim,
                     bf16_too ? "bf16" : "fp32");
            default_backend = bf16_too ? &gpu_backend_bf16 : &gpu_backend_float;
            gpu_against_cpu(name, &c, 2, sizes[i].T, 2, bf16_too ? 0.03 : 1e-5, bf16_too ? 0.1 : 1e-5);
            default_backend = &cpu_backend;
        }
    // Many tokens of a small model: sums go round more than once, products are split along k, every kind of router
    for (int i = 0; i < 3; i++) {
        static const char* routers[] = {"softmax", "sigmoid, logit norm, families", "LPR"};
        Config c = tiny_config(QWEN3_MOE, 2, 6, 2);
        char name[64];
        c.num_heads = 2;
        c.num_kv_heads = 1;
        if (i == 1) c.router = ROUTER_SIGMOID, c.logit_norm = 2, c.family_penalty = 0.25;
        if (i == 2) {
            c.router = ROUTER_LPR;
            c.lpr_latent_dim = 5;
            c.lpr_weight = c.lpr_diversity = c.lpr_kl = c.lpr_align = 0.3;
        }
        snprintf(name, sizeof name, "1056 tokens, %s", routers[i]);
        default_backend = &gpu_backend_float;
        gpu_against_cpu(name, &c, 33, 32, 4, 1e-5, 1e-5);
        default_backend = &cpu_backend;
    }
    gpu_grouping(300, 3, 5);
    gpu_grouping(5000, 2, 1100);
}

// Feeding a cache token by token, in chunks, or everything at once gives the same logits, up to rounding.
static void gpu_cache(void) {
    static const int chunks[][4] = {{1, 0}, {7, 0}, {33, 1, 5, 0}, {CACHE_LENGTH, 0}};
    int tokens[CACHE_LENGTH];
    for (size_t i = 0; i < sizeof golden_models / sizeof golden_models[0]; i += 3) {
        char dir[PATH_SIZE];
        join_path(dir, "dev/reference/golden", golden_models[i]);
        Model* m = open_model(dir, FOR_SCORING, 1, CACHE_LENGTH);
        Model* g = model_create(&m->config, FOR_GENERATION, 1, CACHE_LENGTH, CACHE_LENGTH, m);
        int V = m->config.vocab_size;
        double worst = 0;
        m->backend->send(m, PARAMETERS);
        fill_tokens(tokens, CACHE_LENGTH, V, 5);
        m->backend->forward(m, tokens, NULL, 1, CACHE_LENGTH);
        m->backend->read_back(m, LOGITS);
        for (int way = 0; way < 4; way++) {
            const int* size = chunks[way];
            g->cached = 0;
            for (int fed = 0; fed < CACHE_LENGTH;) {
                int n = imin(*size, CACHE_LENGTH - fed);
                g->backend->forward(g, tokens + fed, NULL, 1, n);
                g->backend->read_back(g, LOGITS);
                fed += n;
                worst = larger(worst, relative_error(g->logits, m->logits + (long)(fed - 1) * V, V));
                if (size[1]) size++;
            }
        }
        check(worst < 1e-5, "%s: four ways to feed a cache, largest relative error %.1e", golden_models[i], worst);
        model_free(g);
        model_free(m);
    }
}
static void test_gpu_cache(void) { on_backend(&gpu_backend_float, gpu_cache); }

// column `column` of each row of OUT/log.csv; returns the number of rows
static int log_column(const char* out, int column, double* values, int most) {
    size_t n = 0;
    char *text = read_bytes(temp("%s/log.csv", out), &n), *rest = text, *line;
    int rows = -1; // the header
    while (text && (line = strsep(&rest, "\n")) != NULL && *line && rows < most) {
        for (int i = 0; i < column; i++) line = strchr(line, ',') + 1;
        if (rows >= 0) values[rows] = atof(line);
        rows++;
    }
    free(text);
    return rows;
}

static int gpu_run(const char* out, const char* more) {
    int code = train_run(out, more);
    show_failure(code == 0);
    return code;
}

// 20 steps on the CPU and on the GPU: the same loss in every step, within rounding. Random numbers, order of the data
// and ties are the same, so differences come from the order of additions. They grow with the steps, and jump where two
// experts' scores lie closer together than they are: therefore the later steps' tolerance is wider.
static void compare_runs(const char* name, const char* more) {
    static const double tolerances[3][2] = {{0, 0}, {1e-4, 0.03}, {0.05, 0.3}};
    double losses[3][20];
    char arguments[1024];
    for (int way = 0; way < 3; way++) {
        default_backend = way ? &gpu_backend_float : &cpu_backend;
        snprintf(arguments, sizeof arguments, "--steps 20 --lr 0.003 --val-every 20 --precision %s %s",
                 way == 2 ? "bf16" : "fp32", more);
        int code = gpu_run("a", arguments), rows = log_column("a", 2, losses[way], 20);
        default_backend = &cpu_backend;
        if (code || rows != 20) {
            check(0, "%s: exit code %d, %d rows", name, code, rows);
            return;
        }
    }
    check(losses[0][19] < losses[0][0] - 0.3, "%s: the loss falls from %.3f to %.3f", name, losses[0][0],
          losses[0][19]);
    for (int way = 1; way < 3; way++) {
        double worst[2] = {0, 0};
        for (int i = 0; i < 20; i++) worst[i >= 10] = larger(worst[i >= 10], fabs(losses[way][i] - losses[0][i]));
        check(worst[0] <= tolerances[way][0] && worst[1] <= tolerances[way][1],
              "%s: %s: the loss differs from the CPU's by %.1e in steps 1 to 10, by %.1e in steps 11 to 20", name,
              way == 1 ? "fp32" : "bf16", worst[0], worst[1]);
    }
}

static void test_gpu_training(void) {
    static const struct { const char *name, *flags; } runs[] = {
        {"softmax", ""},
        {"accumulation, clipping, z-loss", "--accum 2 --clip 0.5 --z-loss 0.01"},
        {"balance over all layers", "--aux-form hf --aux 0.1 --norm-topk 0"},
        {"adaptive balance", "--aux-adaptive --aux 0.05"},
        {"random K", "--topk-range 1:3"},
        {"logit norm", "--logit-norm 3"},
        {"sigmoid", "--router sigmoid --bias-rate 0.01"},
        {"sigmoid with logit norm", "--router sigmoid --logit-norm 2 --aux 0.02"},
        {"LPR", "--router lpr"},
        {"LPR, mean targets", "--router lpr --lpr-align-form mean --lpr-weight 0.1 --lpr-dim 5"},
        {"Mixtral", "--arch mixtral --kv-heads 1"},
        {"OLMoE", "--arch olmoe --tie"},
        {"sparse and dense layers", "--sparse-step 2 --ffn 50"},
        {"dense", "--dense --tie"}};
    write_corpus(temp("corpus.txt"), 20000);
    for (size_t i = 0; i < sizeof runs / sizeof runs[0]; i++)
        compare_runs(runs[i].name, runs[i].flags);
}

// Copies of experts under a family penalty that falls over the run, and infinite ones.
static void test_gpu_families(void) {
    static const char* routers[] = {"", "--router sigmoid", "--logit-norm 3"};
    write_corpus(temp("corpus.txt"), 20000);
    for (int i = 0; i < 3; i++) {
        char arguments[1024];
        double losses[2][20], worst[2] = {0, 0};
        snprintf(arguments, sizeof arguments, "--steps 4 %s", routers[i]);
        int code = gpu_run("small", arguments), ok = code == 0;
        remove_tree(temp("grown"));
        ok = ok && up_run("", "%s %s --experts 10 --method family", temp("small"), temp("grown")) == 0;
        for (int way = 0; way < 2 && ok; way++) {
            default_backend = way ? &gpu_backend_float : &cpu_backend;
            remove_tree(temp("run"));
            ok = run_program("--model %s --data %s --out %s --steps 20 --batch 3 --seq 24 --lr 0.003 --val-every 4 "
                             "--val-batches 2 --family-steps 14 --precision fp32", temp("grown"), temp("corpus.txt"),
                             temp("run")) == 0 && log_column("run", 2, losses[way], 20) == 20;
            show_failure(ok);
            default_backend = &cpu_backend;
        }
        for (int k = 0; k < 20 && ok; k++) {
            worst[k >= 10] = larger(worst[k >= 10], fabs(losses[0][k] - losses[1][k]));
        }
        check(ok && worst[0] <= 1e-4 && worst[1] <= 0.03,
              "families, %s: upcycled, the loss differs from the CPU's by %.1e in steps 1 to 10, by %.1e in 11 to 20",
              *routers[i] ? routers[i] : "softmax", worst[0], worst[1]);
    }
}

// The same command twice: the same bytes. And a run that began on one side goes on on the other.
static void test_gpu_resume(void) {
    static const char* precisions[] = {"fp32", "bf16"};
    char arguments[1024];
    write_corpus(temp("corpus.txt"), 20000);
    for (int i = 0; i < 2; i++) {
        default_backend = &gpu_backend_float;
        snprintf(arguments, sizeof arguments, "--steps 6 --schedule constant --val-every 1 --accum 2 --precision %s",
                 precisions[i]);
        int ok = gpu_run("a", arguments) == 0 && gpu_run("b", arguments) == 0;
        check(ok && same_checkpoint("a", "b") && same_logs("a", "b"), "%s: two runs write the same bytes",
              precisions[i]);
        snprintf(arguments, sizeof arguments, "--steps 3 --schedule constant --val-every 1 --accum 2 --precision %s",
                 precisions[i]);
        ok = gpu_run("b", arguments) == 0;
        snprintf(arguments, sizeof arguments, "--steps 6 --precision %s", precisions[i]);
        ok &= resume_run("b", arguments) == 0;
        check(ok && same_checkpoint("a", "b") && same_logs("a", "b"),
              "%s: stopping at step 3 and resuming changes no byte and no row", precisions[i]);
        show_failure(ok);
        default_backend = &cpu_backend;
    }
    for (int first = 0; first < 2; first++) {           // the first half here, the second there
        double whole[6], halves[6], worst = 0;
        int ok = gpu_run("a", "--steps 6 --schedule constant --router sigmoid --accum 2") == 0;
        default_backend = first ? &gpu_backend_float : &cpu_backend;
        ok &= gpu_run("b", "--steps 3 --schedule constant --router sigmoid --accum 2 --precision fp32") == 0;
        default_backend = first ? &cpu_backend : &gpu_backend_float;
        ok &= resume_run("b", "--steps 6 --precision fp32") == 0;
        default_backend = &cpu_backend;
        show_failure(ok);
        ok &= log_column("a", 2, whole, 6) == 6 && log_column("b", 2, halves, 6) == 6;
        for (int k = 0; k < 6; k++) worst = larger(worst, fabs(whole[k] - halves[k]));
        check(ok && worst <= 1e-4, "begun on the %s, resumed on the %s: the loss differs by %.1e",
              first ? "GPU" : "CPU", first ? "CPU" : "GPU", worst);
    }
}

// --eval with --load and --trace, --dump and --prompt say what they say on the CPU.
static void test_gpu_commands(void) {
    write_corpus(temp("corpus.txt"), 20000);
    write_corpus(temp("few.txt"), 300);
    int ok = gpu_run("a", "--steps 10") == 0, same = 1;
    static char said[2][2][8192];
    for (int way = 0; way < 2; way++) {
        default_backend = way ? &gpu_backend_float : &cpu_backend;
        const char* precision = "--precision fp32";
        ok &= run_program("--model %s --data %s --eval --load --seq 20 --trace %s %s", temp("a"), temp("few.txt"),
                          temp("trace%d", way), precision) == 0;
        snprintf(said[way][0], sizeof said[way][0], "%s", ran.out);
        ok &= run_program("--model %s --data %s --seq 16 --batch 3 --dump %s %s", temp("a"), temp("few.txt"),
                          temp("dump%d", way), precision) == 0;
        ok &= run_program("--model %s --prompt abc --tokens 40 --temperature 0 %s", temp("a"), precision) == 0;
        snprintf(said[way][1], sizeof said[way][1], "%s", ran.out);
        show_failure(ok);
        default_backend = &cpu_backend;
    }
    double losses[2];
    for (int way = 0; way < 2; way++)
        losses[way] = strstr(said[way][0], "loss ") ? atof(strstr(said[way][0], "loss ") + 5) : 0;
    const char* loads[2] = {strstr(said[0][0], "layer 0"), strstr(said[1][0], "layer 0")};
    check(ok && losses[0] > 1 && fabs(losses[0] - losses[1]) <= 2e-5, "--eval: %.6f and %.6f", losses[0], losses[1]);
    check(loads[0] && loads[1] && !strcmp(loads[0], loads[1]), "--load: the same lines");
    check(ok && !strcmp(said[0][1], said[1][1]) && strlen(said[0][1]) > 30, "--prompt: the same text");
    size_t n[2];
    char* traces[2] = {read_bytes(temp("trace0"), &n[0]), read_bytes(temp("trace1"), &n[1])};
    // gates may differ in their last digit: compare what stands before them, the experts
    same = traces[0] && traces[1] && n[0] == n[1];
    long differing = 0;
    for (size_t i = 0; same && i < n[0]; i++) differing += traces[0][i] != traces[1][i];
    check(same && differing * 50 < (long)n[0], "--trace: the same lines, %ld of %zu digits differ", differing, n[0]);
    free(traces[0]);
    free(traces[1]);
    Error error = {""};
    SafeTensors *a = safetensors_open(temp("dump0"), &error), *b = safetensors_open(temp("dump1"), &error);
    double worst = 0;
    for (int i = 0; a && b && i < a->num_tensors; i++) {
        const char* name = a->tensors[i].name;
        if (a->tensors[i].dtype == DTYPE_I32) continue;
        float *x = reference_floats(a, name, NULL), *y = reference_floats(b, name, NULL);
        worst = larger(worst, relative_error(y, x, a->tensors[i].count));
        free(x);
        free(y);
    }
    check(a && b && a->num_tensors == b->num_tensors && worst <= 1e-5,
          "--dump: %d tensors, largest relative error %.1e", a ? a->num_tensors : 0, worst);
    safetensors_close(a);
    safetensors_close(b);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------

static const struct {
    const char* name;
    void (*run)(void);
} groups[] = {
#ifdef TEST_GPU
    {"gpu fp32", test_gpu_fp32},           {"gpu bf16", test_gpu_bf16},
    {"gpu tiles", test_gpu_tiles},
    {"gpu cache", test_gpu_cache},         {"gpu training", test_gpu_training},
    {"gpu families", test_gpu_families},   {"gpu resume", test_gpu_resume},
    {"gpu commands", test_gpu_commands},
#endif
    {"matmul", test_matmul},           {"gradients", test_gradients},
    {"golden", test_golden},           {"routers", test_golden_routers},
    {"families", test_families},       {"load figures", test_load_figures},
    {"experts", test_experts},         {"cache", test_cache},
    {"schedule", test_schedule},       {"json", test_json},
    {"checkpoints", test_checkpoints}, {"data", test_data},
    {"sampling", test_sampling},       {"command line", test_command_line},
    {"determinism", test_determinism}, {"disk full", test_disk_full},
    {"upcycle formats", test_up_formats},
    {"upcycle allocation", test_up_allocation},
    {"upcycle algebra", test_up_algebra},
    {"upcycle copy", test_up_copy},
    {"upcycle drop", test_up_drop},
    {"upcycle shards", test_up_shards},
    {"upcycle sources", test_up_sources},
    {"upcycle twins", test_up_twins},
    {"upcycle operators", test_up_operators},
    {"upcycle routers", test_up_routers},
    {"upcycle utility", test_up_utility},
    {"upcycle optimizer", test_up_optimizer},
    {"upcycle pruning", test_up_pruning},
    {"upcycle cluster", test_up_cluster},
    {"upcycle files", test_up_files},
    {"upcycle safety", test_up_safety},
    {"upcycle LPR pruning", test_up_pruning_lpr},
    {"upcycle records", test_up_records},
    {"upcycle refusals", test_up_refusals},
    {"upcycle receipt", test_up_receipt}};

// What threads keep for products is theirs until they end, which is when a test asks for fewer threads.
#if defined(__SANITIZE_ADDRESS__)
const char* __lsan_default_suppressions(void);
const char* __lsan_default_suppressions(void) { return "leak:grouped_product\nleak:multiply_unit\nleak:attention_\n"; }
#endif

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
    if (!realpath("/proc/self/exe", self_path) && !realpath(argv[0], self_path))
        die(1, "%s: %s", argv[0], strerror(errno));
    const char* directory = getenv("TMPDIR");
    snprintf(temp_dir, sizeof temp_dir, "%.150s/test_moe.XXXXXX",
             directory && !strchr(directory, ' ') ? directory : "/tmp");
    if (!mkdtemp(temp_dir)) die(1, "%s: %s", temp_dir, strerror(errno));
    snprintf(up_dir, sizeof up_dir, "%.280s/upcycle", temp_dir);
    if (mkdir(up_dir, 0777)) die(1, "%s: %s", up_dir, strerror(errno));
    atexit(remove_temp_dir);
    default_threads = thread_count();
#ifdef TEST_GPU
    gpu_open();         // or ends here, in one line
#endif
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++) {
        group_name = groups[i].name;
        double start = seconds();
        if (argc > 1 && !strstr(group_name, argv[1])) continue;
        groups[i].run();
        printf("      %s: %.1f s\n", group_name, seconds() - start);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", passed, failed);
    fflush(stdout);
    return failed > 0;
}
