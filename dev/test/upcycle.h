/*
upcycle.h: what the tests of upcycle.c use. Whole runs are made by this program starting itself with --as-upcycle; their
results are read back and compared with statements of what they must be that do not use upcycle.c's own functions.
*/
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

// A tensor of an open file, which is closed; `where` is its name in messages.
static float* up_take(SafeTensors* s, const char* where, const char* name, long* count) {
    if (!s || !safetensors_find(s, name)) die(1, "%s: no tensor %s", where, name);
    float* out = reference_floats(s, name, count);
    safetensors_close(s); // at once: a model may have many files
    return out;
}

static float* up_tensor(const char* dir, const char* name, long* count) {
    Error error = {""};
    return up_take(safetensors_open_model(dir, &error), dir, name, count);
}

static float* up_moment(const char* dir, const char* name, long* count) {
    char path[PATH_SIZE];
    Error error = {""};
    return up_take(safetensors_open(optimizer_path(path, dir), &error), path, name, count);
}

// 1 if two tensors have the same numbers, bit for bit
static int up_same(const char* dir_a, const char* name_a, const char* dir_b, const char* name_b) {
    long n, k;
    float *a = up_tensor(dir_a, name_a, &n), *b = up_tensor(dir_b, name_b, &k);
    return n == k && same_floats(a, b, n);
}

static Json* up_receipt(const char* dir) {
    char path[PATH_SIZE];
    Error error = {""};
    Json* j = keep_json(json_read(join_path(path, dir, "upcycle.json"), &error));
    if (!j) die(1, "%s", error.text);
    return j;
}

// entry i of "source" or "family" of the receipt's n-th sparse layer
static int up_listed(const char* dir, const char* key, int n, int i) {
    Json* j = up_receipt(dir);
    const Json* list = json_get(json_get(j, "layers")->items[n], key);
    return i < list->count ? (int)list->items[i]->number : -2;
}

static int up_list_is(const char* dir, const char* key, int n, const char* expected) {
    Json* j = up_receipt(dir);
    const Json* list = json_get(json_get(j, "layers")->items[n], key);
    Text t = {NULL, 0, 0};
    for (int i = 0; i < list->count; i++) text_print(&t, "%s%s", i ? " " : "", list->items[i]->string);
    int same = !strcmp(t.data, expected);
    free(t.data);
    return same;
}

// logits of a checkpoint on random tokens, with another K if topk > 0
static float* up_logits(const char* dir, int topk, long* count) {
    Config c;
    Error error = {""};
    int B = 2, T = 12, tokens[24], targets[24];
    if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
    if (topk > 0) c.num_experts_per_tok = topk;
    Model* m = new_model(&c, FOR_SCORING, B, T);
    if (!checkpoint_load(m, dir, &error)) die(1, "%s", error.text);
    for (int i = 0; i < B * T; i++) tokens[i] = targets[i] = (int)(mix64((uint64_t)i) % (uint64_t)c.vocab_size);
    model_forward(m, tokens, targets, B, T);
    *count = (long)B * T * c.vocab_size;
    return m->logits;
}

static double up_change(const char* a, int topk, const char* b) {
    long n, k;
    float *x = up_logits(a, topk, &n), *y = up_logits(b, 0, &k);
    return n == k ? relative_error(y, x, n) : INFINITY;
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
    c.qkv_bias = arch == QWEN2 || arch == QWEN2_MOE;
    c.shared_expert_intermediate_size = arch == QWEN2_MOE ? width / 2 : 0;
    c.router.scaling = arch == DOTS1;
    c.router.kind = arch == DOTS1 ? ROUTER_SIGMOID : ROUTER_SOFTMAX;
    for (int l = 0; l < layers; l++) c.sparse[l] = experts > 0;
    options_reset_table(option_table, NUM_OPTIONS);
    Model* m = new_model(&c, FOR_TRAINING, 1, 4);
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
    int* tokens = (int*)kept_malloc(sizeof(int) * (size_t)n);
    for (int i = 0; i < n; i++) tokens[i] = (int)(mix64((uint64_t)i + 99) % (uint64_t)vocabulary);
    up_make_shard(name, tokens, n);
}

#define EXPERT "model.layers.1.mlp.experts.%d.%s.weight"
static float* up_expert(const char* dir, int e, const char* matrix) {
    char name[96];
    snprintf(name, sizeof name, EXPERT, e, matrix);
    return up_tensor(up_path(dir), name, NULL);
}
