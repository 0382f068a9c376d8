/*
upcycle.c: turns a dense model into a mixture of experts, and a mixture of experts into a larger or smaller one.

    ./upcycle SRC DST --experts N [--topk K] [--method M] ...        SRC and DST are Hugging Face directories
    ./upcycle --inspect DIR [--data F]                               how alike the experts of a checkpoint are

SRC is read once and DST written once, one tensor after the other, so that memory does not grow with the model. Read
the file from top to bottom; whoever wants a single method finds its formula and its source above it:

     1  Options              what can be asked for
     2  Number formats       F32, BF16, F16
     3  Sources              where every tensor of a checkpoint lies in its files
     4  The plan             what every expert of the result is made from
     5  Which experts        scores of utility, and how many copies each expert gets
     6  Linear algebra       singular values, orthonormal vectors, Cholesky
     7  Expert operators     how the numbers of one expert are made
     8  Routers              how the rows of a router are made
     9  Clusters             experts from clusters of a dense layer's inputs
    10  Writing              shards, streams, a directory that appears whole or not at all
    11  The receipt          what was done, what holds by construction, what to beware of
    12  Proof                loss and logits before and after
    13  Inspection
    14  Command line

A note on words. A unit is one of the I intermediate numbers of an expert f(x) = W_down (silu(W_gate x) * (W_up x)): row
u of W_gate and of W_up and column u of W_down belong together. Twins are experts made from the same one. Every random
draw is a hash of (seed, purpose, layer, expert, matrix, element): order, shards and threads do not change it.

Dimension letters are those of train_moe.c. N is the number of experts in each sparse layer of the result.
*/
#ifndef UPCYCLE_C
#define UPCYCLE_C
#ifndef TRAIN_MOE_NO_MAIN
#define TRAIN_MOE_NO_MAIN
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" // the training half of the library
#endif
#include "train_moe.c"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#include <sys/statvfs.h>
#include <sys/syscall.h>

// ---------------------------------------------------------------------------------------------------------------------
// 1. Options

static struct {
    const char *method, *layers, *sources, *arch, *drop_indices, *scale, *router_init;
    const char *select, *score_on, *allocate, *router, *optimizer;
    const char *calibrate, *reference, *dtype, *shard_size, *check, *inspect, *data;
    long experts, topk, norm_topk, granularity, cap, seed, calibrate_batches, check_batches, batch, seq, threads,
        dry_run, force;
    double drop_ratio, noise_std, noise_fraction, router_std, router_delta, strength, energy, prune_weights;
} ask;

#define METHODS                                                        \
    "copy|drop|noise|noise-replace|granular|partition|cluster|random|" \
    "family|copy-noise|scaled|interpolate|shuffle|orthogonal|svd-perturb|svd-mix|sparse-code-mix"
typedef enum {
    COPY,
    DROP,
    NOISE,
    NOISE_REPLACE,
    GRANULAR,
    PARTITION,
    CLUSTER,
    RANDOM,
    FAMILY,
    COPY_NOISE,
    SCALED,
    INTERPOLATE,
    SHUFFLE,
    ORTHOGONAL,
    SVD_PERTURB,
    SVD_MIX,
    SPARSE_CODE_MIX
} Method; // in the order of METHODS
#define ROUTERS "copy|bias|noise|interpolate|scaled|perturb-new|orthogonal|adversarial|temperature|svd-perturb"
typedef enum {
    ROUTER_COPY,
    ROUTER_BIAS,
    ROUTER_NOISE,
    ROUTER_INTERPOLATE,
    ROUTER_SCALED,
    ROUTER_PERTURB_NEW,
    ROUTER_ORTHOGONAL,
    ROUTER_ADVERSARIAL,
    ROUTER_TEMPERATURE,
    ROUTER_SVD_PERTURB
} RouterMethod; // in the order of ROUTERS
#define SELECTIONS "uniform|random|weight|saliency|grad2|fisher|load|router-norm"
typedef enum { UNIFORM, BY_CHANCE, WEIGHT, SALIENCY, GRAD2, FISHER, LOAD, ROUTER_NORM } Selection; // of SELECTIONS
#define SCORED_PARTS "all|gate-up|down|average|product|max|min"
typedef enum { MOMENTS_RESET, MOMENTS_COPY, MOMENTS_SCALE, MOMENTS_INTERPOLATE } Moments;

static Option ask_table[] = {
    {"experts", OPT_WHOLE, USE_OTHER, &ask.experts, 1, 1 << 16, NULL, "N", "experts of each sparse layer in DST", 0},
    {"topk", OPT_WHOLE, USE_OTHER, &ask.topk, 1, 1 << 16, NULL, "K",
     "experts per token (SRC's; dense SRC: 2, granular: G)", 0},
    {"method", OPT_CHOICE, USE_OTHER, &ask.method, 0, 0, "copy", METHODS, "", 0},
    {"seed", OPT_WHOLE, USE_OTHER, &ask.seed, 0, BIG, "1", "S", "of every random draw", 0},
    {"dtype", OPT_CHOICE, USE_OTHER, &ask.dtype, 0, 0, "keep", "keep|f32|bf16", "numbers in DST", 0},
    {"shard-size", OPT_TEXT, USE_OTHER, &ask.shard_size, 0, 0, "5G", "SIZE", "most bytes of weights in a file", 0},
    {"arch", OPT_CHOICE, USE_OTHER, &ask.arch, 0, 0, NULL, "qwen3|mixtral|olmoe", "(what SRC's class becomes)", 0},
    {"check", OPT_TEXT, USE_OTHER, &ask.check, 0, 0, NULL, "F", "loss and logits on F before and after", 0},
    {"check-batches", OPT_WHOLE, USE_OTHER, &ask.check_batches, 0, INT_MAX, "10", "N", "batches of it; 0: all", 0},
    {"dry-run", OPT_FLAG, USE_OTHER, &ask.dry_run, 0, 0, "0", "", "print the plan, write nothing", 0},
    {"force", OPT_FLAG, USE_OTHER, &ask.force, 0, 0, "0", "", "replace the checkpoint in DST", 0},
    {"threads", OPT_WHOLE, USE_OTHER, &ask.threads, 1, 4096, NULL, "N", "all cores by default", 0},

    {"norm-topk", OPT_WHOLE, USE_OTHER, &ask.norm_topk, 0, 1, NULL, "0|1", "gates sum to 1 (1)", 0},
    {"layers", OPT_TEXT, USE_OTHER, &ask.layers, 0, 0, "all", "LIST", "become sparse: all, every-2, or 1,3,8-11", 0},
    {"sources", OPT_TEXT, USE_OTHER, &ask.sources, 0, 0, NULL, "DIR,..", "more dense models; SRC is source 0", 0},
    {"granularity", OPT_WHOLE, USE_OTHER, &ask.granularity, 1, 1 << 16, NULL, "G", "shards that an FFN is cut into", 0},
    {"scale", OPT_CHOICE, USE_OTHER, &ask.scale, 0, 0, "exact", "exact|cuberoot|none", "of the shards", 0},
    {"router-init", OPT_CHOICE, USE_OTHER, &ask.router_init, 0, 0, NULL, "normal|uniform|zero",
     "new rows (normal; drop: uniform)", 0},
    {"router-std", OPT_REAL, USE_OTHER, &ask.router_std, 0, 1e6, "0.02", "S", "of new router rows", 0},
    {"energy", OPT_REAL, USE_OTHER, &ask.energy, 0, 1, "0.95", "X", "spectral energy kept by cluster", 0},

    {"drop-ratio", OPT_REAL, USE_OTHER, &ask.drop_ratio, 0, 1, "0.5", "R", "share of units that drop draws anew", 0},
    {"drop-indices", OPT_CHOICE, USE_OTHER, &ask.drop_indices, 0, 0, "shared", "shared|per-matrix", "", 0},
    {"noise-std", OPT_REAL, USE_OTHER, &ask.noise_std, 0, 1e6, "0.02", "S", "of noise, noise-replace, random", 0},
    {"noise-fraction", OPT_REAL, USE_OTHER, &ask.noise_fraction, 0, 1, "0.5", "P", "share of units or weights", 0},
    {"strength", OPT_REAL, USE_OTHER, &ask.strength, 0, 1e6, NULL, "X", "of an expert operator (its own)", 0},

    {"select", OPT_CHOICE, USE_OTHER, &ask.select, 0, 0, NULL, SELECTIONS,
     "which experts get copies, or stay (uniform)", 0},
    {"score-on", OPT_CHOICE, USE_OTHER, &ask.score_on, 0, 0, "all", SCORED_PARTS, "matrices that count", 0},
    {"allocate", OPT_CHOICE, USE_OTHER, &ask.allocate, 0, 0, "greedy", "greedy|sample", "", 0},
    {"cap", OPT_WHOLE, USE_OTHER, &ask.cap, 1, 1 << 16, "3", "N", "extra copies of an expert before others' turn", 0},
    {"router", OPT_CHOICE, USE_OTHER, &ask.router, 0, 0, NULL, ROUTERS,
     "rows of copies (bias if SRC has one, else copy)", 0},
    {"router-delta", OPT_REAL, USE_OTHER, &ask.router_delta, 0, 1e6, NULL, "D", "strength of --router (bias: 0.001)",
     0},
    {"optimizer", OPT_CHOICE, USE_OTHER, &ask.optimizer, 0, 0, "reset", "reset|copy|scale|interpolate",
     "AdamW's moments", 0},
    {"calibrate", OPT_TEXT, USE_OTHER, &ask.calibrate, 0, 0, NULL, "F,..", "text or token shards for scores", 0},
    {"calibrate-batches", OPT_WHOLE, USE_OTHER, &ask.calibrate_batches, 1, INT_MAX, "10", "N", "", 0},
    {"batch", OPT_WHOLE, USE_OTHER, &ask.batch, 1, 65536, "8", "B", "sequences in a batch", 0},
    {"seq", OPT_WHOLE, USE_OTHER, &ask.seq, 1, 1 << 20, NULL, "T", "tokens in one (at most 1024)", 0},
    {"reference", OPT_TEXT, USE_OTHER, &ask.reference, 0, 0, NULL, "DIR",
     "the model before fine-tuning, for router-norm", 0},
    {"prune-weights", OPT_REAL, USE_OTHER, &ask.prune_weights, 1e-9, 1, NULL, "P",
     "share of expert weights to zero", 0},

    {"inspect", OPT_TEXT, USE_OTHER, &ask.inspect, 0, 0, NULL, "DIR", "look at DIR, write nothing", 0},
    {"data", OPT_TEXT, USE_OTHER, &ask.data, 0, 0, NULL, "F", "with --inspect: load on F", 0},
};
enum { NUM_ASKED = sizeof ask_table / sizeof ask_table[0] };

static int asked(const char* name) {
    for (int i = 0; i < NUM_ASKED; i++)
        if (!strcmp(ask_table[i].name, name)) return ask_table[i].given;
    return 0;
}

// "5G", "500M", "64K" or bytes
static long parse_size(const char* text) {
    char* end;
    double x = strtod(text, &end), unit = 1;
    if (end != text && *end && strchr("kKmMgGtT", *end)) {
        for (const char* u = "kmgt"; *u; u++) {
            unit *= 1000;
            if (tolower((unsigned char)*end) == *u) break;
        }
        end++;
        if (*end == 'B') end++;
    }
    if (end == text || *end || !(x * unit >= 1 && x * unit < 9e18))
        die(2, "--shard-size %s: expected a number of bytes such as 5G, 500M or 1000000", text);
    return (long)(x * unit);
}

static int stop_exit_code(void) { return stop_signal == SIGTERM ? 143 : 130; }

// Between two pieces of work: a signal ends the program; what was begun is removed on the way out.
static void heed_signals(void) {
    if (!stop_signal) return;
    fprintf(stderr, "%s%s: stopped by a signal; nothing was written\n", isatty(2) ? "\n" : "", program_name);
    exit(stop_exit_code());
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Number formats

static const char* const dtype_names[] = {"F32", "BF16", "F16"}; // in the order of Dtype
static const char* const torch_names[] = {"float32", "bfloat16", "float16"};
static int dtype_size(Dtype d) { return d == DTYPE_F32 ? 4 : 2; }

// Rounds to the nearest number of 8 significant bits, ties to even. A NaN stays one.
static uint16_t float_to_bf16(float x) {
    union {
        float value;
        uint32_t bits;
    } u;
    u.value = x;
    if ((u.bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(u.bits >> 16 | 0x40);
    return (uint16_t)((u.bits + 0x7FFF + (u.bits >> 16 & 1)) >> 16);
}

// Rounds to the nearest number of 11 significant bits, ties to even; beyond 65519 to infinity, below 2^-14 with fewer
// bits.
static uint16_t float_to_f16(float x) {
    union {
        float value;
        uint32_t bits;
    } u;
    u.value = x;
    uint32_t sign = u.bits >> 16 & 0x8000, magnitude = u.bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (magnitude >> 13 & 0x1FF)); // NaN
    if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x38800000) { // a multiple of 2^-24: let the addition round
        u.bits = magnitude;
        u.value += 0.5f;
        return (uint16_t)(sign | (u.bits - 0x3F000000));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

// Returns how many finite numbers are too large for the format and became infinite.
static long floats_to_bytes(unsigned char* out, const float* x, long n, Dtype dtype) {
    long overflows = 0;
    if (dtype == DTYPE_F32)
        memcpy(out, x, sizeof(float) * (size_t)n);
    else
        for (long i = 0; i < n; i++) {
            uint16_t h = dtype == DTYPE_BF16 ? float_to_bf16(x[i]) : float_to_f16(x[i]);
            overflows += (h & 0x7FFF) == (dtype == DTYPE_BF16 ? 0x7F80 : 0x7C00) && isfinite(x[i]);
            out[2 * i] = (unsigned char)h;
            out[2 * i + 1] = (unsigned char)(h >> 8);
        }
    return overflows;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Sources
//
// A checkpoint may hold its experts one by one or packed, in one file or many, in three formats. All that is resolved
// here: a view says where the numbers of one tensor lie. Every tensor that the configuration asks for must be found,
// and every tensor found must be used.

typedef enum { OTHER, FFN_MATRIX, ROUTER_ROWS, ROUTER_CORRECTION } RoleKind;
enum { GATE, UP, DOWN };

// What a tensor is, as its name says.
typedef struct {
    RoleKind kind;
    int layer, expert, matrix; // -1: none; a dense layer's FFN is expert 0
} Role;

static int ends_with(const char* s, const char* end) {
    size_t n = strlen(s), k = strlen(end);
    return n >= k && !strcmp(s + n - k, end);
}

static Role role_of(const char* name) {
    Role r = {OTHER, -1, -1, -1};
    int at = 0;
    if (sscanf(name, "model.layers.%d.%n", &r.layer, &at) != 1 || !at) return r;
    const char *rest = name + at, *experts = strstr(rest, ".experts.");
    if (experts || (!strncmp(rest, "mlp.", 4) && !strstr(rest, "shared_experts."))) { // (Dots1's have width 0)
        static const struct {
            const char* end;
            int matrix;
        } ends[] = {{"gate_proj.weight", GATE}, {"w1.weight", GATE},        {"up_proj.weight", UP},
                    {"w3.weight", UP},          {"down_proj.weight", DOWN}, {"w2.weight", DOWN}};
        r.expert = experts ? atoi(experts + 9) : 0;
        for (int i = 0; i < 6; i++)
            if (ends_with(rest, ends[i].end)) {
                r.kind = FFN_MATRIX;
                r.matrix = ends[i].matrix;
                return r;
            }
        r.expert = -1;
    }
    if (ends_with(rest, ".gate.weight") || ends_with(rest, ".gate.prototypes")) r.kind = ROUTER_ROWS;
    if (ends_with(rest, ".gate.e_score_correction_bias")) r.kind = ROUTER_CORRECTION;
    return r;
}

// Where `rows` rows of `cols` numbers lie: from number `first` of a stored tensor on. A vector has one column.
typedef struct {
    const SafeTensors* files;
    const StoredTensor* stored; // NULL: nowhere
    long first, rows, cols;
} View;

typedef struct {
    char* dir;
    Config config;
    SafeTensors* files;
    Layout layout;
    View* views; // (layout.count)
    int* by_name; // (layout.count) positions in the layout, sorted by name
    int* ffn; // (L, E, 3) positions of the FFN matrices; -1: none
    int *router, *correction; // (L) positions; -1: none
} Source;

static const Layout* sorting_layout;
static int compare_layout_names(const void* a, const void* b) {
    return strcmp(sorting_layout->tensors[*(const int*)a].name, sorting_layout->tensors[*(const int*)b].name);
}

// The view of a tensor of that name, or NULL.
static const View* source_find(const Source* s, const char* name) {
    for (int low = 0, high = s->layout.count - 1; low <= high;) {
        int middle = (low + high) / 2, order = strcmp(name, s->layout.tensors[s->by_name[middle]].name);
        if (order == 0) return &s->views[s->by_name[middle]];
        if (order < 0)
            high = middle - 1;
        else
            low = middle + 1;
    }
    return NULL;
}

static const View* source_ffn(const Source* s, int l, int e, int matrix) {
    int E = s->config.num_experts > 0 ? s->config.num_experts : 1;
    return &s->views[s->ffn[((long)l * E + e) * 3 + matrix]];
}

// The numbers of `rows` rows from row `row` on, as floats.
static void view_read(const View* v, long row, long rows, float* out) {
    Error error = {""};
    if (!safetensors_read(v->files, v->stored, v->first + row * v->cols, rows * v->cols, out, &error))
        die(1, "%s", error.text);
}

static int view_set(View* v, const SafeTensors* files, StoredTensor* t, long first, const Tensor* wanted, int packed) {
    int matrix = tensor_is_matrix(wanted);
    long cols = matrix ? wanted->cols : 1;
    int same =
        packed || (t->ndim == (matrix ? 2 : 1) && t->shape[0] == wanted->rows && (!matrix || t->shape[1] == cols));
    if (same) {
        View view = {files, t, first, wanted->rows, cols};
        *v = view;
        t->used = 1;
    }
    return same;
}

// Packed experts: mlp.experts.gate_up_proj (E, 2 I, H) and down_proj (E, H, I), with or without ".weight".
static void source_find_packed(Source* s, const char* suffix, Error* error) {
    const Config* c = &s->config;
    long E = c->num_experts, I = c->moe_intermediate_size, H = c->hidden_size;
    for (int l = 0; l < c->num_layers; l++)
        for (int form = 0; c->sparse[l] && form < 8; form++) {
            int down = form & 1;
            char name[160];
            snprintf(name, sizeof name, "model.layers.%d.%s.experts.%s%s%s", l, form & 4 ? "block_sparse_moe" : "mlp",
                     down ? "down_proj" : "gate_up_proj", form & 2 ? ".weight" : "", suffix);
            StoredTensor* t = safetensors_find(s->files, name);
            if (!t) continue;
            long rows = down ? H : 2 * I, cols = down ? I : H;
            if (t->ndim != 3 || t->shape[0] != E || t->shape[1] != rows || t->shape[2] != cols) {
                set_error(error, "tensor %.100s does not have the shape [%ld,%ld,%ld] that config.json makes it", name,
                          E, rows, cols);
                return;
            }
            for (int i = 0; i < s->layout.count; i++) {
                Role r = role_of(s->layout.tensors[i].name);
                if (r.kind != FFN_MATRIX || r.layer != l || (r.matrix == DOWN) != down) continue;
                long first = r.expert * rows * cols + (r.matrix == UP ? I * H : 0);
                view_set(&s->views[i], s->files, t, first, &s->layout.tensors[i], 1);
            }
        }
}

// Whether two views hold the same bytes.
static int views_equal(const View* a, const View* b) {
    enum { BLOCK = 16384 };
    long n = a->rows * a->cols;
    float x[BLOCK], y[BLOCK];
    Error error = {""};
    if (n != b->rows * b->cols) return 0;
    for (long i = 0; i < n; i += BLOCK) {
        long count = lmin(BLOCK, n - i);
        if (!safetensors_read(a->files, a->stored, a->first + i, count, x, &error) ||
            !safetensors_read(b->files, b->stored, b->first + i, count, y, &error))
            die(1, "%s", error.text);
        if (memcmp(x, y, sizeof(float) * (size_t)count)) return 0;
    }
    return 1;
}

static void source_close(Source* s) {
    if (!s) return;
    safetensors_close(s->files);
    free(s->layout.tensors);
    free(s->views);
    free(s->by_name);
    free(s->ffn);
    free(s->router);
    free(s->correction);
    free(s->dir);
    free(s);
}

// Opens the files of DIR; suffix "": the model, ".exp_avg" or ".exp_avg_sq": AdamW's moments. NULL and an error if
// anything is missing, left over, or of another shape.
static Source* source_open(const char* dir, const char* suffix, Error* error) {
    Source* s = (Source*)checked_malloc(sizeof(Source));
    char path[PATH_SIZE];
    Error inner = {""};
    memset(s, 0, sizeof *s);
    s->dir = copy_string(dir);
    join_path(path, dir, "optimizer.safetensors");
    if (config_read(&s->config, dir, error))
        s->files = *suffix ? safetensors_open(path, error) : safetensors_open_model(dir, error);
    if (!s->files) {
        source_close(s);
        return NULL;
    }
    const Config* c = &s->config;
    int E = c->num_experts > 0 ? c->num_experts : 1, L = c->num_layers;
    s->layout = layout_create(c);
    int count = s->layout.count;
    s->views = (View*)checked_malloc(sizeof(View) * (size_t)count);
    s->by_name = (int*)checked_malloc(sizeof(int) * (size_t)count);
    s->ffn = (int*)checked_malloc(sizeof(int) * 3 * (size_t)E * (size_t)L);
    s->router = (int*)checked_malloc(sizeof(int) * (size_t)L);
    s->correction = (int*)checked_malloc(sizeof(int) * (size_t)L);
    memset(s->views, 0, sizeof(View) * (size_t)count);
    for (int i = 0; i < count; i++) s->by_name[i] = i;
    for (long i = 0; i < 3L * E * L; i++) s->ffn[i] = -1;
    for (int l = 0; l < L; l++) s->router[l] = s->correction[l] = -1;
    sorting_layout = &s->layout;
    qsort(s->by_name, (size_t)count, sizeof(int), compare_layout_names);
    source_find_packed(s, suffix, &inner);
    Text missing = {NULL, 0, 0}, unused = {NULL, 0, 0};
    int num_missing = 0, num_unused = 0;
    for (int i = 0; i < count && !inner.text[0]; i++) {
        const Tensor* t = &s->layout.tensors[i];
        Role r = role_of(t->name);
        if (r.kind == FFN_MATRIX) s->ffn[((long)r.layer * E + r.expert) * 3 + r.matrix] = i;
        if (r.kind == ROUTER_ROWS) s->router[r.layer] = i;
        if (r.kind == ROUTER_CORRECTION) s->correction[r.layer] = i;
        if (s->views[i].stored) continue;
        char name[160], *moe;
        snprintf(name, sizeof name, "%s%s", t->name, suffix);
        StoredTensor* stored = safetensors_find(s->files, name);
        // Mixtral's router stands beside packed experts under its new name
        if (!stored && (moe = strstr(name, "block_sparse_moe.gate.weight")) != NULL) {
            memmove(moe, "mlp.gate.weight", sizeof "mlp.gate.weight");
            strcat(name, suffix);
            stored = safetensors_find(s->files, name);
        }
        if (!stored && *suffix && r.kind == ROUTER_CORRECTION) continue; // it is not trained by gradients
        if (!stored)
            list_name(&missing, &num_missing, name);
        else if (stored->dtype > DTYPE_F16)
            set_error(&inner, "tensor %.100s: only F32, BF16 and F16 can be read", name);
        else if (!view_set(&s->views[i], s->files, stored, 0, t, 0))
            set_error(&inner, "tensor %.100s has another shape than config.json makes it", name);
    }
    const char* other = strcmp(suffix, ".exp_avg") ? ".exp_avg" : ".exp_avg_sq";
    for (int i = 0; i < s->files->num_tensors && !inner.text[0]; i++) {
        StoredTensor* t = &s->files->tensors[i];
        if (t->used || ends_with(t->name, "rotary_emb.inv_freq") || (*suffix && ends_with(t->name, other))) continue;
        if (c->tie_word_embeddings && !*suffix && !strcmp(t->name, "lm_head.weight")) { // redundant: must be the same
            View head = {s->files, t, 0, c->vocab_size, c->hidden_size};
            if (t->ndim != 2 || t->dtype > DTYPE_F16 || t->shape[0] != c->vocab_size || t->shape[1] != c->hidden_size ||
                !views_equal(&head, source_find(s, "model.embed_tokens.weight")))
                set_error(&inner, "lm_head.weight differs from the embedding, but tie_word_embeddings is true");
        } else {
            list_name(&unused, &num_unused, t->name);
        }
    }
    if (num_missing)
        set_error(&inner, "%d tensors are missing: %s", num_missing, missing.data);
    else if (num_unused)
        set_error(&inner, "%d tensors do not belong to this model: %s", num_unused, unused.data);
    free(missing.data);
    free(unused.data);
    if (!inner.text[0]) return s;
    set_error(error, "%s: %s", dir, inner.text);
    source_close(s);
    return NULL;
}

static Source* open_or_die(const char* dir, const char* suffix) {
    Error error = {""};
    Source* s = source_open(dir, suffix, &error);
    if (!s) die(2, "%s", error.text);
    return s;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. The plan

#define MAX_SOURCES 256

// A tensor of the result.
typedef struct {
    const Tensor* tensor;
    Role role;
    Dtype dtype;
    char name[120];
    int half; // of optimizer.safetensors: 0 exp_avg, 1 exp_avg_sq; -1: the model itself
    int file;
    long bytes, offset; // in the file's data
} Output;

typedef struct {
    Source* sources[MAX_SOURCES];
    int num_sources;
    Source* moments[2]; // of source 0, or NULL
    Config config; // of the result
    Layout layout;
    int dense; // 1: the sources are dense
    Method method;
    RouterMethod router;
    Selection selection;
    Moments carry;
    uint64_t seed;
    int E, N, groups; // experts of the source (dense: sources) and of the result; virtual groups
    int *source, *copy, *family; // (L, N): the expert it comes from or -1; its copy number, 0 = original; its family
    int* copies; // (L, E): experts made from each
    double* score; // (L, E), or NULL
    double* input_norms; // (L, E, H + I) for --prune-weights, or NULL
    float* centroids; // (L, N, H) of cluster, or NULL
    void* clusters; // see section 9
    Output* outputs;
    int num_outputs, num_files, model_files;
    Json *parent, *trainer; // SRC's upcycle.json and trainer.json, or NULL
} Plan;

static int plan_source(const Plan* p, int l, int j) { return p->source[(long)l * p->N + j]; }
static int plan_copy(const Plan* p, int l, int j) { return p->copy[(long)l * p->N + j]; }

// One stream of random numbers for each purpose, layer, expert and matrix.
static uint64_t stream_key(const Plan* p, const char* purpose, int layer, int expert, int matrix) {
    return random_key(random_key(p->seed, hash_string(purpose), 0, 0), (uint64_t)layer, (uint64_t)expert,
                      (uint64_t)matrix);
}

// Which layers become sparse: all, every-2 (every second, never the first), or a list such as 1,3,8-11.
static void parse_layers(const char* text, char* sparse, int L) {
    long step;
    char* end;
    memset(sparse, 0, MAX_LAYERS);
    if (!strcmp(text, "all")) {
        memset(sparse, 1, (size_t)L);
        return;
    }
    if (!strncmp(text, "every-", 6)) {
        step = strtol(text + 6, &end, 10);
        if (end == text + 6 || *end || step < 1 || step > L)
            die(2, "--layers %s: the model has %d layers; every-2 leaves every second dense", text, L);
        for (int l = 0; l < L; l++) sparse[l] = (l + 1) % step == 0;
        return;
    }
    for (const char* s = text; *s || s == text;) {
        long first = strtol(s, &end, 10), last = first;
        if (end != s && *end == '-') {
            const char* from = end + 1;
            last = strtol(from, &end, 10);
            if (end == from) last = -1;
        }
        if (end == s || (*end && *end != ',') || first < 0 || last < first || last >= L)
            die(2, "--layers %s: expected all, every-2, or numbers from 0 to %d such as 1,3,5-7", text, L - 1);
        for (long l = first; l <= last; l++) sparse[l] = 1;
        s = *end ? end + 1 : end;
        if (*end && !*s) die(2, "--layers %s: a number is missing after the last comma", text);
    }
}

// Copies follow the originals, ordered by copy number and then by source: with counts 3,1,2 the sources are 0 1 2 0 2
// 0.
static void place_copies(int* source, int* copy, const int* counts, int E, int N) {
    int j = 0;
    for (int number = 0; j < N; number++)
        for (int e = 0; e < E; e++)
            if (counts[e] > number) {
                source[j] = e;
                copy[j++] = number;
            }
}

// (E) counts for N experts: floor(N / E) each, and one more for the lowest indices.
static void allocate_uniform(int* counts, int E, int N) {
    for (int e = 0; e < E; e++) counts[e] = N / E + (e < N % E);
}

// Expert Upcycling (arXiv 2604.19835), Definition 3.1: rank by score (of equals the lower index first); the best expert
// gets extra copies until it has `cap` of them, then the next. When all are at their cap, the caps are cleared.
static void allocate_greedy(int* counts, const double* score, int E, int N, int cap) {
    char* full = (char*)checked_malloc((size_t)E);
    for (int e = 0; e < E; e++) counts[e] = 1;
    for (int left = N - E; left > 0;) {
        for (int e = 0; e < E; e++) full[e] = 0;
        for (int rank = 0; rank < E && left > 0; rank++) {
            int best = -1;
            for (int e = 0; e < E; e++)
                if (!full[e] && (best < 0 || score[e] > score[best])) best = e;
            int extra = imin(cap, left);
            counts[best] += extra;
            left -= extra;
            full[best] = 1;
        }
    }
    free(full);
}

// The same by chance: each extra copy goes to an expert drawn from softmax(z-scored scores), among those below their
// cap. (Scores have any scale, so they are made comparable with the temperature 1 first.)
static void allocate_sample(int* counts, const double* score, int E, int N, int cap, uint64_t key) {
    double mean = 0, variance = 0;
    int* extra = (int*)checked_malloc(sizeof(int) * (size_t)E);
    for (int e = 0; e < E; e++) mean += score[e] / E;
    for (int e = 0; e < E; e++) variance += (score[e] - mean) * (score[e] - mean) / E;
    double std = variance > 0 ? sqrt(variance) : 1;
    for (int e = 0; e < E; e++) {
        counts[e] = 1;
        extra[e] = 0;
    }
    for (int draw = 0; draw < N - E; draw++) {
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

// For a smaller model: the n experts with the highest score, in their old order (of equals the lower index stays).
static void keep_best(int* source, const double* score, int E, int n) {
    char* kept = (char*)checked_malloc((size_t)E);
    memset(kept, 0, (size_t)E);
    for (int i = 0; i < n; i++) {
        int best = -1;
        for (int e = 0; e < E; e++)
            if (!kept[e] && (best < 0 || score[e] > score[best])) best = e;
        kept[best] = 1;
    }
    for (int e = 0, j = 0; e < E; e++)
        if (kept[e]) source[j++] = e;
    free(kept);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Which experts
//
// Expert Upcycling 3.2. With g_e = dL/dw_e over the weights w_e of expert e, averaged over the calibration batches
// before any norm is taken, and v_e Adam's second moment:
//     grad2     ||g_e||^2                  saliency  ||w_e|| ||g_e||
//     weight    ||w_e||^2                  fisher    ||g_e||^2 / (||v_e|| + 1e-8)
// Each is formed for gate + up and for down; `all` takes all three matrices as one, as the paper has it.

typedef void (*Observer)(void* state, const Model* m, int l);

// model_forward for a model FOR_SCORING, whose layers write over each other: looks at each layer while it is there.
static double observed_forward(Model* m, const int* tokens, const int* targets, int B, int T, Observer observe,
                               void* state) {
    const Config* c = &m->config;
    int N = B * T, H = c->hidden_size, V = c->vocab_size, E = c->num_experts;
    m->batch = B;
    m->length = T;
    m->aux_loss = m->z_loss = m->lpr_loss = m->loss = 0;
    memcpy(m->tokens, tokens, sizeof(int) * (size_t)N);
    memcpy(m->targets, targets, sizeof(int) * (size_t)N);
    for (int e = 0; e < E; e++) m->all_counts[e] = m->all_probs[e] = 0;
    embedding_forward(m->layers[0].x, m->tokens, m->weights.embedding, N, H);
    for (int l = 0; l < c->num_layers; l++) {
        attention_layer_forward(m, l);
        ffn_layer_forward(m, l, l + 1 < c->num_layers ? m->layers[l + 1].x : m->final_in);
        if (observe) observe(state, m, l);
    }
    rmsnorm_forward(m->final_out, H, m->final_rstd, m->final_in, H, m->weights.final_norm, N, 1, H,
                    (float)c->rms_norm_eps);
    matmul_forward(m->logits, m->final_out, m->weights.lm_head, N, H, V);
    cross_entropy_forward(m->losses, m->losses_lse, m->logits, m->targets, N, V);
    for (int n = 0; n < N; n++) m->loss += m->losses[n];
    return m->loss /= N;
}

static int sequence_length(Config* c) {
    int T = asked("seq") ? (int)ask.seq : imin(1024, c->max_position_embeddings);
    if (!asked("seq") && c->sliding_window) T = imin(T, c->sliding_window);
    check_length(c, T);
    return T;
}

// Runs the calibration batches (windows of the training part in the order of epoch 0) through source 0.
typedef struct {
    Model* model;
    Dataset* data;
    Batch batch;
    int B, T;
    long batches;
} Calibration;

static Calibration calibration_open(const Source* s, Purpose purpose, const char* why) {
    Calibration k;
    Config c = s->config;
    Error error = {""};
    if (!ask.calibrate) die(2, "%s wants --calibrate F, a text or token shards", why);
    k.B = (int)ask.batch;
    k.T = sequence_length(&c);
    k.batches = ask.calibrate_batches;
    k.data = dataset_open(ask.calibrate, k.T, c.vocab_size, TRAIN_PART, reads_bytes(&c, s->dir));
    if (k.data->windows < k.B * k.batches)
        die(2,
            "--calibrate %s: too short: %ld windows of %d tokens, but %ld batches of %d need %ld; fewer "
            "--calibrate-batches, "
            "a smaller --batch or --seq fit",
            ask.calibrate, k.data->windows, k.T + 1, k.batches, k.B, k.batches * k.B);
    k.model = model_create(&c, purpose, k.B, k.T, k.T, NULL);
    if (!checkpoint_load(k.model, s->dir, &error)) die(2, "%s", error.text);
    k.batch = batch_create(k.B, k.T);
    return k;
}

static void calibration_batch(Calibration* k, long number) {
    heed_signals();
    if (isatty(2)) fprintf(stderr, "\rcalibration: batch %ld of %ld\033[K", number + 1, k->batches);
    for (int b = 0; b < k->B; b++)
        dataset_training_sequence(k->data, (uint64_t)ask.seed, number * k->B + b, k->batch.tokens + (long)b * k->T,
                                  k->batch.targets + (long)b * k->T);
}

static void calibration_close(Calibration* k) {
    if (isatty(2)) fprintf(stderr, "\r\033[K");
    free(k->batch.tokens);
    dataset_close(k->data);
    model_free(k->model);
}

static double sum_of_squares(const float* x, long n) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

enum { CHUNK_FLOATS = 1 << 20 }; // rows are worked on in pieces of about 4 MB
enum { DRAWS = 256 }; // random numbers made at a time, which gcc turns into vector code

static double view_sum_of_squares(const View* v) {
    long rows = CHUNK_FLOATS / v->cols < 1 ? 1 : CHUNK_FLOATS / v->cols;
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)(lmin(rows, v->rows) * v->cols));
    double sum = 0;
    for (long r = 0; r < v->rows; r += rows) {
        long n = lmin(rows, v->rows - r);
        view_read(v, r, n, x);
        sum += sum_of_squares(x, n * v->cols);
    }
    free(x);
    return sum;
}

// Squared norms of every expert's gate and up (part 0) and down (part 1): (L, E, 2).
static double* expert_norms(const Source* s) {
    int L = s->config.num_layers, E = s->config.num_experts;
    double* norms = (double*)checked_malloc(sizeof(double) * 2 * (size_t)L * (size_t)E);
    memset(norms, 0, sizeof(double) * 2 * (size_t)L * (size_t)E);
    for (int l = 0; l < L; l++)
        for (int e = 0; s->config.sparse[l] && e < E; e++)
            for (int matrix = GATE; matrix <= DOWN; matrix++)
                norms[((long)l * E + e) * 2 + (matrix == DOWN)] += view_sum_of_squares(source_ffn(s, l, e, matrix));
    return norms;
}

// (L, E, 2) squared norms of the gradient of the cross-entropy, averaged over the batches before the norm is taken
static double* gradient_norms(const Source* s, const char* why) {
    int L = s->config.num_layers, E = s->config.num_experts;
    long H = s->config.hidden_size, I = s->config.moe_intermediate_size;
    double* norms = (double*)checked_malloc(sizeof(double) * 2 * (size_t)L * (size_t)E);
    Calibration k = calibration_open(s, FOR_TRAINING, why);
    for (long b = 0; b < k.batches; b++) {
        calibration_batch(&k, b);
        model_forward(k.model, k.batch.tokens, k.batch.targets, k.B, k.T);
        model_backward(k.model, 1.0f / (float)k.batches); // adds to the gradients
    }
    for (int l = 0; l < L; l++)
        for (int e = 0; e < E; e++) {
            const LayerWeights* dw = &k.model->dweights.layers[l];
            double* n = norms + ((long)l * E + e) * 2;
            n[0] = s->config.sparse[l] ? sum_of_squares(dw->gate_up + e * 2 * I * H, 2 * I * H) : 0;
            n[1] = s->config.sparse[l] ? sum_of_squares(dw->down + e * H * I, H * I) : 0;
        }
    calibration_close(&k);
    return norms;
}

// One of the four scores, from squared norms.
static double utility(Selection how, double w2, double g2, double v2) {
    switch (how) {
        case GRAD2: return g2;
        case SALIENCY: return sqrt(w2) * sqrt(g2);
        case WEIGHT: return w2;
        case FISHER: return g2 / (sqrt(v2) + 1e-8);
        default: return 0;
    }
}

// Utility scores (L, E) from (L, E, 2) squared norms; those that are not needed may be NULL.
static void utility_scores(double* score, Selection how, const char* on, const double* w, const double* g,
                           const double* v, long n) {
    static const double none[2] = {0, 0};
    for (long i = 0; i < n; i++) {
        const double *wi = w ? w + 2 * i : none, *gi = g ? g + 2 * i : none, *vi = v ? v + 2 * i : none;
        double a = utility(how, wi[0], gi[0], vi[0]), b = utility(how, wi[1], gi[1], vi[1]);
        switch (choice_index(SCORED_PARTS, on)) {
            case 0: score[i] = utility(how, wi[0] + wi[1], gi[0] + gi[1], vi[0] + vi[1]); break;
            case 1: score[i] = a; break;
            case 2: score[i] = b; break;
            case 3: score[i] = (a + b) / 2; break;
            case 4: score[i] = a * b; break;
            case 5: score[i] = fmax(a, b); break;
            default: score[i] = fmin(a, b); break;
        }
    }
}

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
static void score_experts(Plan* p) {
    const Source* s = p->sources[0];
    int L = s->config.num_layers, E = p->E;
    long n = (long)L * E;
    char why[64];
    if (p->selection == UNIFORM) return;
    snprintf(why, sizeof why, "--select %s", ask.select);
    p->score = (double*)checked_malloc(sizeof(double) * (size_t)n);
    memset(p->score, 0, sizeof(double) * (size_t)n);
    double *w = NULL, *g = NULL, *v = NULL;
    Usage usage = {p->score, NULL};
    switch (p->selection) {
        case BY_CHANCE: // equal scores for the lots; a smaller model keeps those that drew the largest
            for (long i = 0; i < n; i++)
                p->score[i] =
                    p->N > E ? 0 : random_uniform(stream_key(p, "select", (int)(i / E), (int)(i % E), 0));
            return;
        case LOAD: measure_usage(s, &usage, why); return;
        case ROUTER_NORM: router_norm_scores(p->score, s); return;
        case FISHER: {
            Source* second = open_or_die(s->dir, ".exp_avg_sq");
            v = expert_norms(second);
            source_close(second);
            break;
        }
        case WEIGHT:
        case SALIENCY: w = expert_norms(s); break;
        default: break;
    }
    if (p->selection != WEIGHT) g = gradient_norms(s, why);
    utility_scores(p->score, p->selection, ask.score_on, w, g, v, n);
    free(w);
    free(g);
    free(v);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Linear algebra, in double precision, for the few methods that need it

static double dot(const double* a, const double* b, long n) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Makes `count` vectors of n >= count numbers orthonormal, each time with what those before it leave (Gram and Schmidt,
// twice for accuracy). A vector of which nothing is left is replaced by a unit vector of which something is.
static void orthonormalise(double* x, long count, long n) {
    for (long i = 0; i < count; i++) {
        double *xi = x + i * n, before = sqrt(dot(xi, xi, n)), length = 0;
        for (long unit = -1; unit < n; unit++) {
            if (unit >= 0) {
                memset(xi, 0, sizeof(double) * (size_t)n);
                xi[(i + unit) % n] = before = 1;
            }
            for (int twice = 0; twice < 2; twice++) {
                for (long j = 0; j < i; j++) {
                    double c = dot(xi, x + j * n, n);
                    for (long q = 0; q < n; q++) xi[q] -= c * x[j * n + q];
                }
            }
            length = sqrt(dot(xi, xi, n));
            if (length > 1e-10 * before && length > 0) break;
        }
        for (long q = 0; q < n; q++) xi[q] /= length;
    }
}

// W = sum over k of us_k v_k^T with orthonormal v_k and orthogonal us_k of length s_k, s falling. For W (rows, cols)
// with rows >= cols the us_k have `rows` numbers and the v_k `cols`; otherwise it is the decomposition of W^T.
typedef struct {
    long m, n; // n = min(rows, cols), m = the other
    int transposed;
    double *us, *v, *s; // (n, m), (n, n), (n)
} Svd;

static void svd_free(Svd* d) {
    free(d->us);
    free(d->v);
    free(d->s);
}

// One-sided Jacobi (Hestenes 1958): columns are rotated in pairs until all are orthogonal; the rotations make V. The
// pairs of a round, as in a tournament, have no column in common, so threads may share them without changing a bit.
static Svd svd_of(const float* W, long rows, long cols) {
    Svd d;
    d.transposed = rows < cols;
    d.m = d.transposed ? cols : rows;
    d.n = d.transposed ? rows : cols;
    long m = d.m, n = d.n, players = n + n % 2;
    d.us = (double*)checked_malloc(sizeof(double) * (size_t)(n * m));
    d.v = (double*)checked_malloc(sizeof(double) * (size_t)(n * n));
    d.s = (double*)checked_malloc(sizeof(double) * (size_t)n);
    for (long k = 0; k < n; k++)
        for (long i = 0; i < m; i++) d.us[k * m + i] = d.transposed ? W[k * cols + i] : W[i * cols + k];
    memset(d.v, 0, sizeof(double) * (size_t)(n * n));
    for (long k = 0; k < n; k++) d.v[k * n + k] = 1;
    for (int sweep = 0, rotations = 1; sweep < 40 && rotations > 0; sweep++) {
        rotations = 0;
        heed_signals();
        for (long round = 0; round < players - 1; round++) {
            #pragma omp parallel for reduction(+ : rotations)
            for (long pair = 0; pair < players / 2; pair++) {
                // the last player stays, the others move round the table
                long i = pair == 0 ? players - 1 : (round + pair) % (players - 1);
                long j = pair == 0 ? round : (round + players - 1 - pair) % (players - 1);
                if (i >= n || j >= n) continue;
                double *a = d.us + i * m, *b = d.us + j * m, *va = d.v + i * n, *vb = d.v + j * n;
                double aa = dot(a, a, m), bb = dot(b, b, m), ab = dot(a, b, m);
                if (fabs(ab) <= 1e-12 * sqrt(aa * bb) || ab == 0) continue;
                double zeta = (bb - aa) / (2 * ab), t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                double cosine = 1 / sqrt(1 + t * t), sine = cosine * t;
                for (long q = 0; q < m; q++) {
                    double x = a[q], y = b[q];
                    a[q] = cosine * x - sine * y;
                    b[q] = sine * x + cosine * y;
                }
                for (long q = 0; q < n; q++) {
                    double x = va[q], y = vb[q];
                    va[q] = cosine * x - sine * y;
                    vb[q] = sine * x + cosine * y;
                }
                rotations++;
            }
        }
    }
    for (long k = 0; k < n; k++) d.s[k] = sqrt(dot(d.us + k * m, d.us + k * m, m));
    for (long k = 0; k < n; k++) { // the largest first
        long best = k;
        for (long i = k + 1; i < n; i++)
            if (d.s[i] > d.s[best]) best = i;
        if (best == k) continue;
        double t = d.s[k];
        d.s[k] = d.s[best];
        d.s[best] = t;
        for (long q = 0; q < m; q++) {
            t = d.us[k * m + q];
            d.us[k * m + q] = d.us[best * m + q];
            d.us[best * m + q] = t;
        }
        for (long q = 0; q < n; q++) {
            t = d.v[k * n + q];
            d.v[k * n + q] = d.v[best * n + q];
            d.v[best * n + q] = t;
        }
    }
    return d;
}

// W = the sum over the first `rank` terms
static void svd_product(float* W, const Svd* d, long rank) {
    long m = d->m, n = d->n, rows = d->transposed ? n : m, cols = d->transposed ? m : n;
    #pragma omp parallel
    {
        double* row = (double*)checked_malloc(sizeof(double) * (size_t)cols);
        #pragma omp for
        for (long i = 0; i < rows; i++) {
            memset(row, 0, sizeof(double) * (size_t)cols);
            for (long k = 0; k < rank; k++) {
                double c = d->transposed ? d->v[k * n + i] : d->us[k * m + i];
                const double* other = d->transposed ? d->us + k * m : d->v + k * n;
                for (long j = 0; j < cols; j++) row[j] += c * other[j];
            }
            for (long j = 0; j < cols; j++) W[i * cols + j] = (float)row[j];
        }
        free(row);
    }
}

// C (n, n) symmetric and positive definite becomes the lower triangle S with S S^T = C. 0 if it is not positive
// definite.
static int cholesky(double* C, long n) {
    for (long j = 0; j < n; j++) {
        double diagonal = C[j * n + j] - dot(C + j * n, C + j * n, j);
        if (!(diagonal > 0)) return 0;
        diagonal = sqrt(diagonal);
        C[j * n + j] = diagonal;
        #pragma omp parallel for
        for (long i = j + 1; i < n; i++) C[i * n + j] = (C[i * n + j] - dot(C + i * n, C + j * n, j)) / diagonal;
    }
    for (long i = 0; i < n; i++)
        for (long j = i + 1; j < n; j++) C[i * n + j] = 0;
    return 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. Expert operators
//
// Most methods make each number of the result from one number of the source, so rows can be made as they are written. A
// maker says how. Only four operators (and cluster) need whole matrices; they put the finished one into `whole`.

typedef struct {
    View from; // nowhere: every number is new
    View next; // mixed in with the share `mix`
    double mix;
    View* average; // (num_average) with `from`: the mean of several models
    int num_average;
    int* units; // unit u of the result is unit units[u] of the source; NULL: the same
    long num_units;
    int by_column; // units are columns (down) and not rows
    unsigned char* fresh; // units that are drawn anew from N(mean, std)
    double mean, std;
    unsigned char* noisy; // units that N(0, noise) is added to; NULL and noise > 0: all numbers
    double noise;
    double replace; // this share of single numbers is drawn anew from N(0, std)
    double factor;
    const double* input_norm; // (cols) MoE-Pruner: in each row prune_count numbers become 0
    long prune_count;
    float* whole;
    uint64_t key;
    long rows, cols;
} Maker;

static void maker_free(Maker* k) {
    free(k->units);
    free(k->fresh);
    free(k->noisy);
    free(k->whole);
    free(k->average);
}

// nothing but `from`, number by number
static int maker_copies(const Maker* k) {
    return k->from.stored && !k->average && k->mix == 0 && !k->units && !k->fresh && k->noise == 0 && k->replace == 0 &&
           k->factor == 1 && !k->prune_count && !k->whole;
}

typedef struct {
    double score;
    long index;
} Scored;

static int compare_scored(const void* a, const void* b) {
    const Scored *x = (const Scored*)a, *y = (const Scored*)b;
    if (x->score != y->score) return x->score < y->score ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

// Rows row .. row + rows - 1 of the result.
static void make_rows(const Maker* k, long row, long rows, float* out) {
    long cols = k->cols, wide = k->from.stored ? k->from.cols : cols;
    if (k->whole) {
        memcpy(out, k->whole + row * cols, sizeof(float) * (size_t)(rows * cols));
    } else if (k->from.stored) {
        int gather = k->units && k->by_column;
        float* in =
            gather || k->mix != 0 || k->average ? (float*)checked_malloc(sizeof(float) * (size_t)(rows * wide)) : NULL;
        float* direct = gather ? in : out;
        if (k->units && !k->by_column)
            for (long r = 0; r < rows; r++) view_read(&k->from, k->units[row + r], 1, direct + r * wide);
        else
            view_read(&k->from, row, rows, direct);
        if (k->mix != 0) {
            view_read(&k->next, row, rows, in);
            for (long i = 0; i < rows * cols; i++) out[i] = (float)((1 - k->mix) * out[i] + k->mix * in[i]);
        }
        if (k->average) { // in double, rounded once
            double* sum = (double*)checked_malloc(sizeof(double) * (size_t)(rows * cols));
            for (long i = 0; i < rows * cols; i++) sum[i] = out[i];
            for (int a = 0; a < k->num_average; a++) {
                view_read(&k->average[a], row, rows, in);
                for (long i = 0; i < rows * cols; i++) sum[i] += in[i];
            }
            for (long i = 0; i < rows * cols; i++) out[i] = (float)(sum[i] / (1 + k->num_average));
            free(sum);
        }
        if (gather)
            for (long r = 0; r < rows; r++)
                for (long c = 0; c < cols; c++) out[r * cols + c] = in[r * wide + k->units[c]];
        free(in);
    }
    const unsigned char* marks = k->fresh ? k->fresh : k->noisy;
    int drawing = !k->from.stored || k->fresh || k->noise > 0 || k->replace > 0;
    if (!k->whole && (drawing || k->factor != 1)) {
        uint64_t again = mix64(k->key ^ hash_string("replace"));
        #pragma omp parallel for schedule(static)
        for (long r = 0; r < rows; r++) {
            int row_drawn = drawing && (!marks || k->by_column || marks[row + r]);
            for (long first = 0; first < cols; first += DRAWS) {
                int n = (int)lmin(DRAWS, cols - first);
                float* x = out + r * cols + first;
                double drawn[DRAWS] = {0};
                uint64_t element = (uint64_t)((row + r) * cols + first);
                if (row_drawn && (k->std != 0 || k->noise > 0)) // all, used or not: a loop without branches
                    for (int i = 0; i < n; i++) drawn[i] = random_normal(mix64(k->key ^ (element + (uint64_t)i)));
                for (int i = 0; i < n && row_drawn; i++) {
                    long u = k->by_column ? first + i : row + r;
                    if (!k->from.stored || (k->fresh && k->fresh[u]) ||
                        (k->replace > 0 && random_uniform(mix64(again ^ (element + (uint64_t)i))) < k->replace))
                        x[i] = (float)(k->mean + k->std * drawn[i]);
                    else if (k->noise > 0 && (!k->noisy || k->noisy[u]))
                        x[i] = (float)(x[i] + k->noise * drawn[i]);
                }
                if (k->factor != 1)
                    for (int i = 0; i < n; i++) x[i] = (float)(x[i] * k->factor);
            }
        }
    }
    if (k->prune_count > 0) {
        #pragma omp parallel
        {
            Scored* s = (Scored*)checked_malloc(sizeof(Scored) * (size_t)cols);
            #pragma omp for
            for (long r = 0; r < rows; r++) {
                for (long c = 0; c < cols; c++) {
                    s[c].score = fabs(out[r * cols + c]) * k->input_norm[c];
                    s[c].index = c;
                }
                qsort(s, (size_t)cols, sizeof(Scored), compare_scored);
                for (long c = 0; c < k->prune_count; c++) out[r * cols + s[c].index] = 0;
            }
            free(s);
        }
    }
}

// Mean and unbiased standard deviation of the rows or columns of a view that are marked; all of it if marked is NULL.
static void slice_statistics(const View* v, const unsigned char* marked, int by_column, double* mean, double* std) {
    long rows = CHUNK_FLOATS / v->cols < 1 ? 1 : CHUNK_FLOATS / v->cols, count = 0;
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)(lmin(rows, v->rows) * v->cols));
    double sum = 0, squares = 0;
    *mean = *std = 0;
    for (long first = 0; first < v->rows; first += rows) {
        long n = lmin(rows, v->rows - first);
        view_read(v, first, n, x);
        for (long r = 0; r < n; r++) {
            const float* row = x + r * v->cols;
            if (marked && !by_column && !marked[first + r]) continue;
            double row_sum = 0, row_squares = 0;
            long row_count = 0;
            if (marked && by_column) {
                for (long c = 0; c < v->cols; c++) {
                    double weight = marked[c];
                    row_sum += weight * row[c];
                    row_squares += weight * row[c] * row[c];
                    row_count += marked[c];
                }
            } else {
                for (long c = 0; c < v->cols; c++) row_sum += row[c];
                row_squares = sum_of_squares(row, v->cols);
                row_count = v->cols;
            }
            sum += row_sum;
            squares += row_squares;
            count += row_count;
        }
    }
    if (count > 0) *mean = sum / (double)count;
    squares = fmax(0, squares - (double)count * *mean * *mean); // in double: weights have 24 bits
    if (count > 1) *std = sqrt(squares / (double)(count - 1));
    free(x);
}

// floor(share * n) of n units, drawn without replacement
static unsigned char* draw_units(long n, double share, uint64_t key) {
    unsigned char* marked = (unsigned char*)checked_malloc((size_t)n);
    memset(marked, 0, (size_t)n);
    long count = lmin(n, (long)floor(share * (double)n + 1e-9)); // 0.7 * 10 is 7
    for (long i = 0; i < count; i++) marked[random_permutation(i, n, key)] = 1;
    return marked;
}

static float* view_whole(const View* v) {
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)(v->rows * v->cols));
    view_read(v, 0, v->rows, x);
    return x;
}

static double strength(double usual) { return asked("strength") ? ask.strength : usual; }

// orthogonal: W + 0.1 std(W) noise; the orthonormal vectors of that (QR; of the shorter side's kind), at W's Frobenius
// norm.
static void operator_orthogonal(float* W, long rows, long cols, double std, uint64_t key) {
    int rows_are_vectors = rows <= cols;
    long count = rows_are_vectors ? rows : cols, n = rows_are_vectors ? cols : rows;
    double *x = (double*)checked_malloc(sizeof(double) * (size_t)(count * n)),
           norm = sqrt(sum_of_squares(W, rows * cols));
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < cols; c++) {
            double noisy = W[r * cols + c] + strength(0.1) * std * random_normal(mix64(key ^ (uint64_t)(r * cols + c)));
            x[rows_are_vectors ? r * n + c : c * n + r] = noisy;
        }
    orthonormalise(x, count, n);
    double scale = norm / sqrt((double)count); // each vector has length 1
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < cols; c++) W[r * cols + c] = (float)(scale * x[rows_are_vectors ? r * n + c : c * n + r]);
    free(x);
}

// svd-perturb: singular values times 1 + 0.1 noise; to each singular vector noise of half that length (0.05; N(0,1) in
// every component would be 0.05 sqrt(m) long and drown the vector), orthonormalised again, the largest first.
static void operator_svd_perturb(float* W, long rows, long cols, uint64_t key, double amount) {
    Svd d = svd_of(W, rows, cols);
    uint64_t noise = mix64(key ^ hash_string("vectors"));
    long m = d.m, n = d.n;
    for (long k = 0; k < n; k++) {
        for (long i = 0; i < m; i++)
            d.us[k * m + i] = (d.s[k] > 0 ? d.us[k * m + i] / d.s[k] : 0) +
                              amount / 2 / sqrt((double)m) * random_normal(mix64(noise ^ (uint64_t)(k * m + i)));
        for (long i = 0; i < n; i++)
            d.v[k * n + i] +=
                amount / 2 / sqrt((double)n) * random_normal(mix64(noise ^ (uint64_t)(n * m + k * n + i)));
    }
    orthonormalise(d.us, n, m);
    orthonormalise(d.v, n, n);
    for (long k = 0; k < n; k++) {
        double s = d.s[k] * (1 + amount * random_normal(mix64(key ^ (uint64_t)k)));
        for (long i = 0; i < m; i++) d.us[k * m + i] *= s;
    }
    svd_product(W, &d, n);
    svd_free(&d);
}

// svd-mix: 30 % of the pairs of singular vectors, drawn at random, are those of the next expert; singular values stay.
static void operator_svd_mix(float* W, const float* next, long rows, long cols, uint64_t key) {
    Svd d = svd_of(W, rows, cols), o = svd_of(next, rows, cols);
    unsigned char* swapped = draw_units(d.n, strength(0.3), key);
    for (long k = 0; k < d.n; k++) {
        if (!swapped[k]) continue;
        for (long i = 0; i < d.m; i++) d.us[k * d.m + i] = o.s[k] > 0 ? o.us[k * d.m + i] / o.s[k] * d.s[k] : 0;
        memcpy(d.v + k * d.n, o.v + k * d.n, sizeof(double) * (size_t)d.n);
    }
    svd_product(W, &d, d.n);
    free(swapped);
    svd_free(&d);
    svd_free(&o);
}

// Sparse codes C (atoms, cols) of W (rows, cols) for unit-length atoms D (atoms, rows): ISTA (Daubechies et al. 2004)
// on
//     1/2 ||W - D^T C||^2 + penalty ||C||_1,    C <- shrink(C + D (W - D^T C) / step, penalty / step)
// with step >= the largest eigenvalue of D D^T, bounded by its largest absolute row sum. The penalty is relative: a
// tenth of the smallest one that would leave all codes at 0.
static void sparse_codes(double* C, const double* D, const float* W, long atoms, long rows, long cols, double penalty) {
    double step = 0, largest = 0;
    double* gram = (double*)checked_malloc(sizeof(double) * (size_t)(atoms * atoms));
    double* DW = (double*)checked_malloc(sizeof(double) * (size_t)(atoms * cols));
    for (long a = 0; a < atoms; a++) {
        double sum = 0;
        for (long b = 0; b < atoms; b++) sum += fabs(gram[a * atoms + b] = dot(D + a * rows, D + b * rows, rows));
        step = fmax(step, sum);
        memset(DW + a * cols, 0, sizeof(double) * (size_t)cols);
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < cols; c++) DW[a * cols + c] += D[a * rows + r] * W[r * cols + c];
        for (long c = 0; c < cols; c++) largest = fmax(largest, fabs(DW[a * cols + c]));
    }
    double threshold = penalty * largest / step;
    memset(C, 0, sizeof(double) * (size_t)(atoms * cols));
    #pragma omp parallel for
    for (long c = 0; c < cols; c++) { // columns are independent
        double old[64], now[64] = {0};
        for (int iteration = 0; iteration < 50; iteration++) {
            memcpy(old, now, sizeof old);
            for (long a = 0; a < atoms; a++) {
                double z = old[a] + (DW[a * cols + c] - dot(gram + a * atoms, old, atoms)) / step;
                now[a] = z > threshold ? z - threshold : z < -threshold ? z + threshold : 0;
            }
        }
        for (long a = 0; a < atoms; a++) C[a * cols + c] = now[a];
    }
    free(gram);
    free(DW);
}

// sparse-code-mix: both experts are coded with 64 atoms (columns of W, drawn at random, at length 1); for a random half
// of the atoms W takes over the other's codes. What the codes do not explain of W stays, so that nothing swapped is
// nothing changed.
static void operator_sparse_code_mix(float* W, const float* next, long rows, long cols, uint64_t key) {
    long atoms = lmin(64, lmin(rows, cols));
    double* D = (double*)checked_malloc(sizeof(double) * (size_t)(atoms * rows));
    double* codes = (double*)checked_malloc(sizeof(double) * 2 * (size_t)(atoms * cols));
    double* other = codes + atoms * cols;
    for (long a = 0; a < atoms; a++) {
        long column = random_permutation(a, cols, key);
        double length = 0;
        for (long r = 0; r < rows; r++) length += (double)W[r * cols + column] * W[r * cols + column];
        for (long r = 0; r < rows; r++) D[a * rows + r] = length > 0 ? W[r * cols + column] / sqrt(length) : 0;
    }
    sparse_codes(codes, D, W, atoms, rows, cols, 0.1);
    sparse_codes(other, D, next, atoms, rows, cols, 0.1);
    unsigned char* swapped = draw_units(atoms, strength(0.5), mix64(key ^ hash_string("swap")));
    #pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long a = 0; a < atoms; a++)
            for (long c = 0; swapped[a] && c < cols; c++)
                W[r * cols + c] += (float)(D[a * rows + r] * (other[a * cols + c] - codes[a * cols + c]));
    free(D);
    free(codes);
    free(swapped);
}

static const float* cluster_matrix(Plan* p, int l, int expert, int matrix); // section 9

// s of granular and partition. Each of the G shards of a group gets 1 / G of the group's gate when gates sum to 1, so s
// = G makes the group whole again: exactly, whatever the router. Without renormalisation every gate is about 1 / N and
// K are used, so s = N G / K restores the size, exactly only while the router is zero.
static double shard_scale(const Plan* p) {
    int G = (int)ask.granularity, N = p->N, K = p->config.num_experts_per_tok;
    if (!strcmp(ask.scale, "none")) return 1;
    return p->config.norm_topk_prob ? G : (double)N * G / K;
}

// The order in which the units of a layer are cut into shards: as they are (granular), or shuffled (partition).
static int* shard_units(const Plan* p, int l, int j, long I) {
    int* units = (int*)checked_malloc(sizeof(int) * (size_t)I);
    long G = ask.granularity, full = I * G, first = j % G * I;
    for (long u = 0; u < I; u++)
        units[u] = (int)(p->method == PARTITION ? random_permutation(first + u, full, stream_key(p, "shards", l, 0, 0))
                                                : first + u);
    return units;
}

// How expert j of layer l is made. half = -1: its weights; 0 or 1: AdamW's first or second moment of them, which go
// where their weights go and are 0 where a weight is new.
static Maker expert_maker(Plan* p, int l, int j, int matrix, long rows, long cols, int half) {
    Maker k;
    memset(&k, 0, sizeof k);
    int s = plan_source(p, l, j), is_copy = plan_copy(p, l, j) > 0, model = p->dense && s >= 0 ? s : 0,
        expert = p->dense ? 0 : s;
    const Source* from = half >= 0 ? p->moments[half] : p->sources[model];
    int E = p->sources[0]->config.num_experts;
    uint64_t key = stream_key(p, "weights", l, j, matrix);
    k.rows = rows;
    k.cols = cols;
    k.key = key;
    k.factor = 1;
    k.by_column = matrix == DOWN;
    k.num_units = k.by_column ? cols : rows;
    if (s < 0) { // a new expert
        k.std = half < 0 ? ask.noise_std : 0;
        return k;
    }
    k.from = *source_ffn(from, l, expert, matrix);
    const View* next = p->dense ? NULL : source_ffn(from, l, (s + 1) % E, matrix);
    if (p->method == GRANULAR || p->method == PARTITION) {
        double scale = shard_scale(p);
        k.units = shard_units(p, l, j, k.num_units);
        k.factor = !strcmp(ask.scale, "cuberoot") ? cbrt(scale) : matrix == DOWN ? scale : 1;
        // w = s w' makes dL/dw = dL/dw' / s
        if (half >= 0) k.factor = half ? 1 / (k.factor * k.factor) : 1 / k.factor;
    }
    // Twins share the tokens of their source: each sees about 1 / copies of its gradient.
    if (half >= 0 && p->carry == MOMENTS_SCALE) {
        double n = p->method == GRANULAR    ? p->groups
                   : p->method == PARTITION ? 1
                                            : p->copies[(long)l * p->E + s];
        k.factor /= half ? n * n : n;
    }
    if (half >= 0 && p->carry == MOMENTS_INTERPOLATE && is_copy && next && p->method != SHUFFLE) {
        k.next = *next;
        k.mix = 0.5;
    }
    int touched = p->dense || is_copy; // operators leave originals alone
    // Drop-Upcycling (arXiv 2502.19261): a random share of the units is drawn anew from N(mean, std) of what it
    // replaces, in each matrix by itself. `shared`: the same units in all three, as in the paper; `per-matrix`: as in
    // its code.
    int mask_matrix = strcmp(ask.drop_indices, "shared") ? matrix : 3;
    if (touched && p->method == DROP) {
        k.fresh = draw_units(k.num_units, ask.drop_ratio, stream_key(p, "drop", l, j, mask_matrix));
        if (half < 0) slice_statistics(&k.from, k.fresh, k.by_column, &k.mean, &k.std);
    }
    if (touched && p->method == NOISE_REPLACE) { // OLMoE's: half of the single weights become N(0, 0.02)
        k.replace = ask.noise_fraction;
        k.std = half < 0 ? ask.noise_std : 0; // the same weights' moments become 0
    }
    if (half < 0 && touched) {
        double mean, std;
        switch (p->method) {
            case NOISE: // Drop-Upcycling's baseline: N(0, 0.02) is added to half of the units
                k.noisy = draw_units(k.num_units, ask.noise_fraction, stream_key(p, "noise", l, j, mask_matrix));
                k.noise = ask.noise_std;
                break;
            case COPY_NOISE: // w + 0.01 std(w) N(0, 1)
                slice_statistics(&k.from, NULL, 0, &mean, &std);
                k.noise = strength(0.01) * std;
                break;
            case SCALED: k.factor = strength(0.95); break;
            case INTERPOLATE: // (1 - a) w_e + a w_next
                k.next = *next;
                k.mix = strength(0.5);
                break;
            case ORTHOGONAL:
                slice_statistics(&k.from, NULL, 0, &mean, &std);
                k.whole = view_whole(&k.from);
                operator_orthogonal(k.whole, rows, cols, std, key);
                break;
            case SVD_PERTURB:
                k.whole = view_whole(&k.from);
                operator_svd_perturb(k.whole, rows, cols, key, strength(0.1));
                break;
            case SVD_MIX:
            case SPARSE_CODE_MIX: {
                float* other = view_whole(next);
                k.whole = view_whole(&k.from);
                if (p->method == SVD_MIX)
                    operator_svd_mix(k.whole, other, rows, cols, key);
                else
                    operator_sparse_code_mix(k.whole, other, rows, cols, key);
                free(other);
                break;
            }
            case CLUSTER: {
                const float* made = cluster_matrix(p, l, j, matrix);
                k.whole = (float*)checked_malloc(sizeof(float) * (size_t)(rows * cols));
                memcpy(k.whole, made, sizeof(float) * (size_t)(rows * cols));
                break;
            }
            default: break;
        }
    }
    // A permutation of the units, the same in all three matrices, is another way to write the same function.
    if (is_copy && p->method == SHUFFLE) {
        k.units = (int*)checked_malloc(sizeof(int) * (size_t)k.num_units);
        for (long u = 0; u < k.num_units; u++)
            k.units[u] = (int)random_permutation(u, k.num_units, stream_key(p, "shuffle", l, j, 0));
    }
    if (half < 0 && p->input_norms && !p->dense) {
        long H = p->config.hidden_size, I = p->config.moe_intermediate_size;
        k.input_norm = p->input_norms + ((long)l * p->E + s) * (H + I) + (matrix == DOWN ? H : 0);
        k.prune_count = (long)floor(ask.prune_weights * (double)cols + 1e-9);
    }
    return k;
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Routers

// A new row: N(0, std), uniform with that standard deviation, or zero.
static void new_router_row(const Plan* p, float* row, int l, int number, long cols) {
    uint64_t key = stream_key(p, "router", l, number, 3);
    const char* how = ask.router_init ? ask.router_init : p->method == DROP ? "uniform" : "normal";
    // rows of LPR are prototypes, whose length counts in what is read out
    double std = p->config.router == ROUTER_LPR && !asked("router-std") ? 1 : ask.router_std;
    for (long c = 0; c < cols; c++) {
        uint64_t element = mix64(key ^ (uint64_t)c);
        double draw = !strcmp(how, "normal") ? random_normal(element) : sqrt(12.0) * (random_uniform(element) - 0.5);
        row[c] = !strcmp(how, "zero") ? 0 : (float)(std * draw);
    }
}

static double router_strength(double usual) { return asked("router-delta") ? ask.router_delta : usual; }

// The row of a copy, from the rows w (E, cols) of the source; e is its source, `row` holds w_e. Operators of the
// released code of arXiv 2604.19835, where their definition is unclear with the numbers of this project:
static void router_operator(const Plan* p, float* row, const float* w, int e, int E, long cols, double std,
                            uint64_t key) {
    const float* next = w + (long)((e + 1) % E) * cols;
    double *d = (double*)checked_malloc(sizeof(double) * (size_t)cols),
           length = sqrt(sum_of_squares(w + e * cols, cols)), along = 0, size;
    double a = 0;
    for (long c = 0; c < cols; c++) d[c] = random_normal(mix64(key ^ (uint64_t)c));
    switch (p->router) {
        case ROUTER_NOISE:
        case ROUTER_PERTURB_NEW: // w + 0.01 std(W) N(0, 1), std over the whole router
            for (long c = 0; c < cols; c++) row[c] = (float)(row[c] + router_strength(0.01) * std * d[c]);
            break;
        case ROUTER_INTERPOLATE: // (1 - a) w_e + a w_next
            a = router_strength(0.5);
            for (long c = 0; c < cols; c++) row[c] = (float)((1 - a) * row[c] + a * next[c]);
            break;
        case ROUTER_SCALED: // 0.95 w
            for (long c = 0; c < cols; c++) row[c] = (float)(row[c] * router_strength(0.95));
            break;
        case ROUTER_TEMPERATURE: // w / 1.1
            for (long c = 0; c < cols; c++) row[c] = (float)(row[c] / router_strength(1.1));
            break;
        case ROUTER_ORTHOGONAL: // w + 0.1 |w| times the unit vector of a random vector's part orthogonal to w
        case ROUTER_ADVERSARIAL: // w + 0.01 |w| times the unit vector away from the mean of the other rows
            if (p->router == ROUTER_ORTHOGONAL) {
                for (long c = 0; c < cols; c++) along += d[c] * row[c];
                for (long c = 0; c < cols && length > 0; c++) d[c] -= along / (length * length) * row[c];
            } else {
                for (long c = 0; c < cols; c++) {
                    double sum = 0;
                    for (int i = 0; i < E; i++) sum += i == e ? 0 : w[(long)i * cols + c];
                    d[c] = row[c] - (E > 1 ? sum / (E - 1) : 0);
                }
            }
            size = sqrt(dot(d, d, cols));
            a = router_strength(p->router == ROUTER_ORTHOGONAL ? 0.1 : 0.01);
            for (long c = 0; c < cols && size > 0; c++) row[c] = (float)(row[c] + a * length * d[c] / size);
            break;
        default: break; // copy; bias and svd-perturb are made elsewhere
    }
    free(d);
}

// All rows of a router at once (N, cols): it is small. half as in expert_maker.
static Maker router_maker(Plan* p, int l, long cols, int half) {
    Maker k;
    memset(&k, 0, sizeof k);
    int N = p->N, E = p->sources[0]->config.num_experts;
    k.factor = 1;
    k.rows = N;
    k.cols = cols;
    k.whole = (float*)checked_malloc(sizeof(float) * (size_t)(N * cols));
    memset(k.whole, 0, sizeof(float) * (size_t)(N * cols));
    if (p->dense) {
        for (int j = 0; half < 0 && j < N; j++) {
            if (p->centroids)
                memcpy(k.whole + j * cols, p->centroids + ((long)l * N + j) * cols, sizeof(float) * (size_t)cols);
            else
                new_router_row(p, k.whole + j * cols, l, p->method == GRANULAR ? j / (int)ask.granularity : j, cols);
        }
        return k;
    }
    const Source* s = half >= 0 ? p->moments[half] : p->sources[0];
    const View* from = &s->views[s->router[l]];
    float* w = view_whole(from);
    double mean, std;
    slice_statistics(from, NULL, 0, &mean, &std);
    int perturbed_for = -1;
    float* perturbed = NULL; // svd-perturb: the whole router, drawn anew for each copy number
    for (int j = 0; j < N; j++) {
        int e = plan_source(p, l, j), number = plan_copy(p, l, j);
        float* row = k.whole + j * cols;
        if (e < 0) {
            if (half < 0) new_router_row(p, row, l, j, cols);
            continue;
        }
        memcpy(row, w + e * cols, sizeof(float) * (size_t)cols);
        if (half >= 0) {
            double n = p->copies[(long)l * p->E + e];
            for (long c = 0; c < cols; c++) {
                if (p->carry == MOMENTS_INTERPOLATE && number > 0)
                    row[c] = 0.5f * row[c] + 0.5f * w[(long)((e + 1) % E) * cols + c];
                if (p->carry == MOMENTS_SCALE) row[c] = (float)(row[c] / (half ? n * n : n));
            }
        } else if (p->router == ROUTER_SVD_PERTURB && number > 0) {
            if (number != perturbed_for) {
                free(perturbed);
                perturbed = view_whole(from);
                operator_svd_perturb(perturbed, E, cols, stream_key(p, "router", l, number, 3), router_strength(0.1));
                perturbed_for = number;
            }
            memcpy(row, perturbed + e * cols, sizeof(float) * (size_t)cols);
        } else if (number > 0 || p->router == ROUTER_NOISE) {
            router_operator(p, row, w, e, E, cols, std, stream_key(p, "router", l, j, 3));
        }
    }
    free(w);
    free(perturbed);
    return k;
}

// The bias that sigmoid routers select by (N): the paper's operator adds U(-delta, delta), delta = 0.001, to that of
// copies.
static Maker correction_maker(Plan* p, int l, int half) {
    Maker k;
    memset(&k, 0, sizeof k);
    k.factor = 1;
    k.rows = p->N;
    k.cols = 1;
    k.whole = (float*)checked_malloc(sizeof(float) * (size_t)p->N);
    memset(k.whole, 0, sizeof(float) * (size_t)p->N);
    const Source* s = half >= 0 ? p->moments[half] : p->sources[0];
    if (p->dense || !s->views[s->correction[l]].stored) return k;
    float* w = view_whole(&s->views[s->correction[l]]);
    for (int j = 0; j < p->N; j++) {
        int e = plan_source(p, l, j);
        k.whole[j] = e < 0 ? 0 : w[e];
        if (half < 0 && e >= 0 && plan_copy(p, l, j) > 0 && p->router == ROUTER_BIAS)
            k.whole[j] += (float)(router_strength(1e-3) * (2 * random_uniform(stream_key(p, "bias", l, j, 0)) - 1));
    }
    free(w);
    return k;
}

// How a tensor of the result is made.
static Maker maker_for(Plan* p, const Output* o) {
    const Role* r = &o->role;
    long rows = o->tensor->rows, cols = tensor_is_matrix(o->tensor) ? o->tensor->cols : 1;
    if (r->kind == FFN_MATRIX && p->config.sparse[r->layer])
        return expert_maker(p, r->layer, r->expert, r->matrix, rows, cols, o->half);
    if (r->kind == ROUTER_ROWS) return router_maker(p, r->layer, cols, o->half);
    if (r->kind == ROUTER_CORRECTION) return correction_maker(p, r->layer, o->half);
    Maker k; // everything else is copied, or averaged over several models (Branch-Train-MiX)
    memset(&k, 0, sizeof k);
    k.factor = 1;
    k.rows = rows;
    k.cols = cols;
    const View* v = source_find(o->half < 0 ? p->sources[0] : p->moments[o->half], o->tensor->name);
    if (!v || v->rows != rows || v->cols != cols) die(1, "%s: SRC has no such tensor of this shape", o->tensor->name);
    k.from = *v;
    if (p->num_sources > 1) {
        k.num_average = p->num_sources - 1;
        k.average = (View*)checked_malloc(sizeof(View) * (size_t)k.num_average);
        for (int i = 1; i < p->num_sources; i++) k.average[i - 1] = *source_find(p->sources[i], o->tensor->name);
    }
    return k;
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. Clusters (Cluster-aware upcycling, arXiv 2604.13508)
//
// The inputs of a dense layer's FFN on calibration data are clustered; each cluster becomes an expert. The router's
// rows are the centroids at length 1, so that a token goes to the cluster that it is most alike. The router reads
// RMS-normed inputs of length about sqrt(H): its logits are sqrt(H) times a cosine. The matrices of expert i are the
// closest ones of low rank, as seen by the inputs X_i of its cluster:
//     S S^T = X_i^T X_i / n + ridge (Cholesky)         W S = U s V^T, truncated to the share `energy` of sum s^2
//     W_i = (U s V^T)_r S^-1

typedef struct {
    float** inputs; // (L) the FFN's inputs (tokens, H)
    int** cluster; // (L) (tokens) the cluster of each
    long tokens, filled;
    float* made[3]; // the matrices of (layer, expert) that were made last
    int layer, expert;
    double energy_kept;
    long ranks, matrices; // for the receipt
} Clusters;

static void observe_inputs(void* state, const Model* m, int l) {
    Clusters* k = (Clusters*)state;
    long H = m->config.hidden_size, n = (long)m->batch * m->length;
    if (k->inputs[l]) memcpy(k->inputs[l] + k->filled * H, m->layers[l].ffn_in, sizeof(float) * (size_t)(n * H));
}

// Spherical k-means (Dhillon and Modha 2001): a token goes to the centroid with the largest cosine, a centroid is the
// direction of the sum of its unit vectors. A cluster that ran empty starts again from the token that fits its centroid
// least. centroids (k, H) at length 1, cluster (n)
static void spherical_k_means(float* centroids, int* cluster, const float* x, long n, int H, int k, uint64_t key) {
    double* sums = (double*)checked_malloc(sizeof(double) * (size_t)k * (size_t)H);
    float* cosines = (float*)checked_malloc(sizeof(float) * (size_t)k);
    float* fit = (float*)checked_malloc(sizeof(float) * (size_t)n);
    long* count = (long*)checked_malloc(sizeof(long) * (size_t)k);
    for (int i = 0; i < k; i++) {
        const float* start = x + random_permutation(i, n, key) * H;
        double length = sqrt(sum_of_squares(start, H));
        for (int c = 0; c < H; c++) centroids[(long)i * H + c] = (float)(length > 0 ? start[c] / length : 0);
    }
    for (long t = 0; t < n; t++) cluster[t] = -1;
    for (int iteration = 0, moved = 1; iteration < 50 && moved; iteration++) {
        moved = 0;
        heed_signals();
        for (long t = 0; t < n; t++) {
            int best = 0;
            matmul_forward(cosines, x + t * H, centroids, 1, H, k);
            for (int i = 1; i < k; i++)
                if (cosines[i] > cosines[best]) best = i;
            double length = sqrt(sum_of_squares(x + t * H, H));
            fit[t] = (float)(length > 0 ? cosines[best] / length : 1);
            moved |= cluster[t] != best;
            cluster[t] = best;
        }
        memset(count, 0, sizeof(long) * (size_t)k);
        for (long t = 0; t < n; t++) count[cluster[t]]++;
        for (int i = 0; i < k; i++) {
            if (count[i] > 0) continue;
            long worst = -1;
            for (long t = 0; t < n; t++)
                if (count[cluster[t]] > 1 && (worst < 0 || fit[t] < fit[worst])) worst = t;
            if (worst < 0) continue;
            count[cluster[worst]]--;
            cluster[worst] = i;
            count[i] = moved = 1;
            fit[worst] = 1;
        }
        memset(sums, 0, sizeof(double) * (size_t)k * (size_t)H);
        for (long t = 0; t < n; t++) {
            double length = sqrt(sum_of_squares(x + t * H, H));
            for (int c = 0; c < H && length > 0; c++) sums[(long)cluster[t] * H + c] += x[t * H + c] / length;
        }
        for (int i = 0; i < k; i++) {
            double length = sqrt(dot(sums + (long)i * H, sums + (long)i * H, H));
            for (int c = 0; c < H && length > 0; c++)
                centroids[(long)i * H + c] = (float)(sums[(long)i * H + c] / length);
        }
    }
    free(sums);
    free(cosines);
    free(fit);
    free(count);
}

static void find_clusters(Plan* p) {
    const Config* c = &p->sources[0]->config;
    Clusters* k = (Clusters*)checked_malloc(sizeof(Clusters));
    memset(k, 0, sizeof *k);
    k->layer = k->expert = -1;
    Calibration calibration = calibration_open(p->sources[0], FOR_SCORING, "--method cluster");
    k->tokens = calibration.batches * calibration.B * calibration.T;
    if (k->tokens < p->N) die(2, "--calibrate: %ld tokens cannot make %d clusters", k->tokens, p->N);
    k->inputs = (float**)checked_malloc(sizeof(float*) * (size_t)c->num_layers);
    k->cluster = (int**)checked_malloc(sizeof(int*) * (size_t)c->num_layers);
    p->centroids =
        (float*)checked_malloc(sizeof(float) * (size_t)c->num_layers * (size_t)p->N * (size_t)c->hidden_size);
    p->clusters = k;
    for (int l = 0; l < c->num_layers; l++) {
        int wanted = p->config.sparse[l];
        k->inputs[l] = wanted ? (float*)checked_malloc(sizeof(float) * (size_t)(k->tokens * c->hidden_size)) : NULL;
        k->cluster[l] = wanted ? (int*)checked_malloc(sizeof(int) * (size_t)k->tokens) : NULL;
    }
    for (long b = 0; b < calibration.batches; b++) {
        calibration_batch(&calibration, b);
        observed_forward(calibration.model, calibration.batch.tokens, calibration.batch.targets, calibration.B,
                         calibration.T, observe_inputs, k);
        k->filled += (long)calibration.B * calibration.T;
    }
    calibration_close(&calibration);
    for (int l = 0; l < c->num_layers; l++)
        if (k->inputs[l])
            spherical_k_means(p->centroids + (long)l * p->N * c->hidden_size, k->cluster[l], k->inputs[l], k->tokens,
                              c->hidden_size, p->N, stream_key(p, "clusters", l, 0, 0));
}

// C (n, n) = X^T X / rows + ridge, the ridge being a thousandth of the mean of the diagonal: with fewer inputs than n
// the sum alone could not be inverted.
static void covariance(double* C, const float* X, long rows, long n) {
    memset(C, 0, sizeof(double) * (size_t)(n * n));
    #pragma omp parallel for
    for (long i = 0; i < n; i++)
        for (long r = 0; r < rows; r++) {
            double x = X[r * n + i] / (double)rows;
            for (long j = 0; j < n; j++) C[i * n + j] += x * X[r * n + j];
        }
    double trace = 0;
    for (long i = 0; i < n; i++) trace += C[i * n + i];
    for (long i = 0; i < n; i++) C[i * n + i] += trace > 0 ? 1e-3 * trace / (double)n : 1;
}

// W (rows, n) becomes the matrix of lowest rank that keeps the share `energy` of || W S ||^2. Returns the rank.
static long truncate_whitened(float* W, long rows, long n, const double* S, double energy) {
    float* WS = (float*)checked_malloc(sizeof(float) * (size_t)(rows * n));
    #pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < n; j++) {
            double sum = 0;
            for (long i = j; i < n; i++) sum += W[r * n + i] * S[i * n + j];
            WS[r * n + j] = (float)sum;
        }
    Svd d = svd_of(WS, rows, n);
    double all = dot(d.s, d.s, d.n), kept = 0;
    long rank = 0;
    while (rank < d.n && (rank == 0 || kept < energy * all)) {
        kept += d.s[rank] * d.s[rank];
        rank++;
    }
    svd_product(WS, &d, rank);
    svd_free(&d);
    #pragma omp parallel
    {
        double* w = (double*)checked_malloc(sizeof(double) * (size_t)n);
        #pragma omp for
        for (long r = 0; r < rows; r++) { // w S = row, from the last column to the first
            for (long j = n - 1; j >= 0; j--) {
                double sum = WS[r * n + j];
                for (long i = j + 1; i < n; i++) sum -= w[i] * S[i * n + j];
                w[j] = sum / S[j * n + j];
            }
            for (long j = 0; j < n; j++) W[r * n + j] = (float)w[j];
        }
        free(w);
    }
    free(WS);
    return rank;
}

// The matrix of expert j of layer l. The statistics of down are those of its own inputs: the hidden rows of the
// cluster's tokens.
static const float* cluster_matrix(Plan* p, int l, int j, int matrix) {
    Clusters* k = (Clusters*)p->clusters;
    const Config* c = &p->sources[0]->config;
    long H = c->hidden_size, I = c->intermediate_size, n = 0, size = H * I;
    if (k->layer != l || k->expert != j)
        for (int i = 0; i < 3; i++) {
            free(k->made[i]);
            k->made[i] = NULL;
        }
    k->layer = l;
    k->expert = j;
    if (k->made[matrix]) return k->made[matrix];
    for (long t = 0; t < k->tokens; t++) n += k->cluster[l][t] == j;
    float* X = (float*)checked_malloc(sizeof(float) * (size_t)(n * H));
    for (long t = 0, r = 0; t < k->tokens; t++)
        if (k->cluster[l][t] == j) memcpy(X + r++ * H, k->inputs[l] + t * H, sizeof(float) * (size_t)H);
    long width = matrix == DOWN ? I : H;
    if (matrix == DOWN && n > 0) {
        float* gate_up = (float*)checked_malloc(sizeof(float) * 2 * (size_t)size);
        float* both = (float*)checked_malloc(sizeof(float) * 2 * (size_t)(n * I));
        float* hidden = (float*)checked_malloc(sizeof(float) * (size_t)(n * I));
        view_read(source_ffn(p->sources[0], l, 0, GATE), 0, I, gate_up);
        view_read(source_ffn(p->sources[0], l, 0, UP), 0, I, gate_up + size);
        matmul_forward(both, X, gate_up, (int)n, (int)H, (int)(2 * I));
        swiglu_forward(hidden, both, (int)n, (int)I);
        free(gate_up);
        free(both);
        free(X);
        X = hidden;
    }
    double* C = (double*)checked_malloc(sizeof(double) * (size_t)(width * width));
    covariance(C, X, n, width);
    if (!cholesky(C, width)) die(1, "layer %d, expert %d: the inputs' covariance is not positive definite", l, j);
    for (int i = matrix == DOWN ? DOWN : GATE; i <= (matrix == DOWN ? DOWN : UP);
         i++) { // gate and up share their inputs
        k->made[i] = view_whole(source_ffn(p->sources[0], l, 0, i));
        k->ranks += truncate_whitened(k->made[i], i == DOWN ? H : I, width, C, ask.energy);
        k->matrices++;
    }
    free(C);
    free(X);
    return k->made[matrix];
}

// ---------------------------------------------------------------------------------------------------------------------
// 10. Writing
//
// Everything is written into the directory DST.saving, flushed, and renamed to DST at the end. What a killed run left
// behind there is removed by the next; the system drops the lock on it when a run ends, however it ends.

static char saving_path[PATH_SIZE]; // empty: there is nothing to remove
static int saving_lock = -1;

static void remove_saving(void) {
    Error ignored = {""};
    if (!saving_path[0]) return;
    move_files(saving_path, NULL, &ignored);
    rmdir(saving_path);
    saving_path[0] = 0;
    if (saving_lock >= 0) close(saving_lock);
    saving_lock = -1;
}

static struct {
    long done, total; // bytes
    long overflows; // numbers that the format could not hold
    double started, shown;
} progress;

static void progress_add(long bytes) {
    progress.done += bytes;
    heed_signals();
    double now = seconds();
    if (!isatty(2) || now - progress.shown < 0.2) return;
    progress.shown = now;
    char bar[31];
    double share = progress.total ? (double)progress.done / (double)progress.total : 1,
           rate = (double)progress.done / (now - progress.started + 1e-9);
    for (int i = 0; i < 30; i++) bar[i] = i < share * 30 ? '#' : '.';
    bar[30] = 0;
    fprintf(stderr, "\r%s %3.0f %% | %.2f of %.2f GB | %.0f MB/s | ", bar, 100 * share, progress.done * 1e-9,
            progress.total * 1e-9, rate * 1e-6);
    print_duration((double)(progress.total - progress.done) / (rate + 1e-9));
    fprintf(stderr, "\033[K");
}

static void write_all(int fd, const char* path, const void* data, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t put = write(fd, (const char*)data + done, n - done);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) die(1, "%s: %s; nothing was made", path, put < 0 ? strerror(errno) : "the disk takes no more");
        done += (size_t)put;
    }
}

// Asks the system to begin with the disk's work, so that the flush at the end does not wait for all of it.
static void start_flushing(int fd, long from, long to) {
#ifdef SYNC_FILE_RANGE_WRITE
    if (to > from) sync_file_range(fd, from, to - from, SYNC_FILE_RANGE_WRITE);
#else
    (void)fd, (void)from, (void)to;
#endif
}

typedef struct {
    float* floats; // (CHUNK_FLOATS), or one row if that is longer
    unsigned char* bytes; // room for the same in any format
    long capacity; // floats
} Buffers;

// Streams one tensor to the end of a file.
static void write_output(Plan* p, const Output* o, int fd, const char* path, Buffers* b) {
    Maker k = maker_for(p, o);
    long capacity_bytes = b->capacity * 4;
    if (maker_copies(&k) && k.from.stored->dtype == o->dtype) { // bit for bit
        long at = k.from.stored->offset + k.from.first * dtype_size(o->dtype);
        for (long done = 0; done < o->bytes;) {
            long n = lmin(capacity_bytes, o->bytes - done);
            if (!read_at(k.from.files->fds[k.from.stored->file], b->bytes, (size_t)n, at + done))
                die(1, "%s: tensor %s cannot be read", k.from.files->paths[k.from.stored->file], k.from.stored->name);
            write_all(fd, path, b->bytes, (size_t)n);
            progress_add(n);
            done += n;
        }
    } else {
        long wide = k.from.stored && k.from.cols > k.cols ? k.from.cols : k.cols,
             rows = wide == 0 || b->capacity / wide < 1 ? 1 : b->capacity / wide;
        for (long r = 0; r < k.rows; r += rows) {
            long n = lmin(rows, k.rows - r);
            make_rows(&k, r, n, b->floats);
            progress.overflows += floats_to_bytes(b->bytes, b->floats, n * k.cols, o->dtype);
            write_all(fd, path, b->bytes, (size_t)(n * k.cols * dtype_size(o->dtype)));
            progress_add(n * k.cols * dtype_size(o->dtype));
        }
    }
    maker_free(&k);
}

static void output_file_name(const Plan* p, int file, char* name, size_t size) {
    if (file >= p->model_files)
        snprintf(name, size, "optimizer.safetensors");
    else if (p->model_files == 1)
        snprintf(name, size, "model.safetensors");
    else
        snprintf(name, size, "model-%05d-of-%05d.safetensors", file + 1, p->model_files);
}

static void output_header(const Plan* p, int file, Text* header) {
    text_print(header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < p->num_outputs; i++) {
        const Output* o = &p->outputs[i];
        if (o->file != file) continue;
        text_print(header, ",");
        text_json_string(header, o->name);
        text_print(header, ":{\"dtype\":\"%s\",\"shape\":[%ld", dtype_names[o->dtype], o->tensor->rows);
        if (tensor_is_matrix(o->tensor)) text_print(header, ",%ld", o->tensor->cols);
        text_print(header, "],\"data_offsets\":[%ld,%ld]}", o->offset, o->offset + o->bytes);
    }
    text_print(header, "}");
    while (header->length % 8) text_print(header, " ");
}

static void write_tensors(Plan* p, const char* dir) {
    Buffers b;
    b.capacity = CHUNK_FLOATS;
    for (int i = 0; i < p->num_outputs; i++) {
        const Tensor* t = p->outputs[i].tensor;
        long wide = t->cols * (p->method == GRANULAR || p->method == PARTITION ? ask.granularity : 1);
        if (wide > b.capacity) b.capacity = wide;
    }
    b.floats = (float*)checked_malloc(sizeof(float) * (size_t)b.capacity);
    b.bytes = (unsigned char*)checked_malloc(4 * (size_t)b.capacity);
    progress.started = seconds();
    progress.shown = progress.started - 1;
    for (int file = 0; file < p->num_files; file++) {
        char path[PATH_SIZE], name[64];
        unsigned char prefix[8];
        Text header = {NULL, 0, 0};
        long flushed = 0, written;
        output_file_name(p, file, name, sizeof name);
        join_path(path, dir, name);
        int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
        if (fd < 0) die(1, "%s: %s", path, strerror(errno));
        output_header(p, file, &header);
        for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)header.length >> (8 * i));
        write_all(fd, path, prefix, 8);
        write_all(fd, path, header.data, header.length);
        written = 8 + (long)header.length;
        free(header.data);
        for (int i = 0; i < p->num_outputs; i++) {
            if (p->outputs[i].file != file) continue;
            write_output(p, &p->outputs[i], fd, path, &b);
            written += p->outputs[i].bytes;
            if (written - flushed < 32 << 20) continue;
            start_flushing(fd, flushed, written);
            flushed = written;
        }
        if (fsync(fd) || close(fd)) die(1, "%s: %s; nothing was made", path, strerror(errno));
    }
    if (isatty(2)) fprintf(stderr, "\r\033[K");
    free(b.floats);
    free(b.bytes);
}

// model.safetensors.index.json, for a model in several files
static void write_index(const Plan* p, const char* dir) {
    char path[PATH_SIZE], name[64];
    Error error = {""};
    Text t = {NULL, 0, 0};
    long total = 0;
    for (int i = 0; i < p->num_outputs; i++) total += p->outputs[i].half < 0 ? p->outputs[i].bytes : 0;
    text_print(&t, "{\n  \"metadata\": {\"total_size\": %ld},\n  \"weight_map\": {", total);
    for (int i = 0, listed = 0; i < p->num_outputs; i++) {
        if (p->outputs[i].half >= 0) continue;
        output_file_name(p, p->outputs[i].file, name, sizeof name);
        text_print(&t, "%s\n    ", listed++ ? "," : "");
        text_json_string(&t, p->outputs[i].name);
        text_print(&t, ": \"%s\"", name);
    }
    text_print(&t, "\n  }\n}\n");
    join_path(path, dir, "model.safetensors.index.json");
    if (!write_file(path, t.data, t.length, &error)) die(1, "%s", error.text);
    free(t.data);
}

// x with `digits` digits; JSON has no word for what is not a number.
static void text_json_number(Text* t, double x, int digits) {
    if (isfinite(x))
        text_print(t, "%.*g", digits, x);
    else
        text_print(t, "null");
}

// What a value looked like, members in the order of their names.
static void text_json_value(Text* t, const Json* j) {
    static const char* words[] = {"null", "false", "true"};
    if (j->type == JSON_STRING)
        text_json_string(t, j->string);
    else if (j->type == JSON_NUMBER)
        text_print(t, "%s", j->string);
    else if (j->type < JSON_NUMBER)
        text_print(t, "%s", words[j->type]);
    else {
        text_print(t, j->type == JSON_ARRAY ? "[" : "{");
        for (int i = 0; i < j->count; i++) {
            if (i) text_print(t, ", ");
            if (j->type == JSON_OBJECT) {
                text_json_string(t, j->items[i]->key);
                text_print(t, ": ");
            }
            text_json_value(t, j->items[i]);
        }
        text_print(t, j->type == JSON_ARRAY ? "]" : "}");
    }
}

// With moments carried over, the run goes on where it was: ./train_moe --resume --out DST continues the step count, the
// schedule and the bias correction. Only what was counted since the last validation starts again, and the penalty of
// families, if there are new ones.
static void write_trainer(const Plan* p, const char* dir) {
    char path[PATH_SIZE];
    Error error = {""};
    Text t = {NULL, 0, 0};
    const Json* j = p->trainer;
    text_print(&t, "{");
    for (int i = 0; i < j->count; i++) {
        text_print(&t, "%s\n  ", i ? "," : "");
        text_json_string(&t, j->items[i]->key);
        text_print(&t, ": ");
        // what was counted since the last validation was counted of other experts
        if (!strcmp(j->items[i]->key, "load") || !strcmp(j->items[i]->key, "observed"))
            text_print(&t, "[]");
        else if (!strcmp(j->items[i]->key, "family_start") && p->method == FAMILY)
            text_print(&t, "%ld", json_whole(json_get(j, "step"), LONG_MAX));
        else
            text_json_value(&t, j->items[i]);
    }
    text_print(&t, "\n}\n");
    join_path(path, dir, "trainer.json");
    if (!write_file(path, t.data, t.length, &error)) die(1, "%s", error.text);
    free(t.data);
}

// config.json of the result. It names the format of most of its numbers.
static void write_config(const Plan* p, const char* dir) {
    char path[PATH_SIZE];
    Error error = {""};
    Text t = {NULL, 0, 0}, out = {NULL, 0, 0};
    long bytes[3] = {0, 0, 0};
    for (int i = 0; i < p->num_outputs; i++)
        if (p->outputs[i].half < 0) bytes[p->outputs[i].dtype] += p->outputs[i].bytes;
    int most = bytes[1] > bytes[0] && bytes[1] >= bytes[2] ? 1 : bytes[2] > bytes[0] ? 2 : 0;
    config_to_json(&t, &p->config);
    for (const char *s = t.data, *found;; s = found + 7) {
        found = strstr(s, "float32");
        if (!found) {
            text_add(&out, s, strlen(s));
            break;
        }
        text_add(&out, s, (size_t)(found - s));
        text_add(&out, torch_names[most], strlen(torch_names[most]));
    }
    join_path(path, dir, "config.json");
    if (!write_file(path, out.data, out.length, &error)) die(1, "%s", error.text);
    free(t.data);
    free(out.data);
}

static void copy_travelling_files(const char* from, const char* to) {
    for (int i = 0; travelling_files[i]; i++) {
        char path[PATH_SIZE];
        size_t length;
        Error error = {""};
        join_path(path, from, travelling_files[i]);
        if (!strcmp(travelling_files[i], "upcycle.json") || access(path, F_OK)) continue;
        char* data = read_file(path, (size_t)1 << 30, &length, &error);
        join_path(path, to, travelling_files[i]);
        if (!data || !write_file(path, data, length, &error)) die(1, "%s", error.text);
        free(data);
    }
}

// 1 if one of two directories is the other or holds it; both are as realpath gives them
static int paths_overlap(const char* a, const char* b) {
    size_t n = strlen(a), k = strlen(b), shorter = n < k ? n : k;
    return !strncmp(a, b, shorter) && (n == k || a[shorter] == '/' || b[shorter] == '/');
}

#define SAVING_MARKER ".upcycle"
static int belongs_to_checkpoint(const char* name) {
    static const char* endings[] = {".safetensors", ".json", ".csv", ".lock"};
    size_t n = strlen(name);
    int known = 0;
    for (int i = 0; i < 4; i++) {
        size_t k = strlen(endings[i]);
        known |= n > k && !strcmp(name + n - k, endings[i]);
    }
    for (int i = 0; travelling_files[i]; i++) known |= !strcmp(name, travelling_files[i]);
    return known || !strcmp(name, SAVING_MARKER);
}

// DST without slashes at its end; it must not exist, or hold a checkpoint and --force be given. The source is never
// touched.
static void check_destination(const char* dst, char* clean, Source** sources, int num_sources) {
    char saving[PATH_SIZE], real_saving[PATH_SIZE] = "";
    char parent[PATH_SIZE], real_parent[PATH_SIZE], real[PATH_SIZE], path[PATH_SIZE];
    size_t n = strlen(dst);
    struct stat st;
    while (n > 1 && dst[n - 1] == '/') n--;
    if (n + 16 > PATH_SIZE) die(2, "the path %.60s... is too long", dst);
    memcpy(clean, dst, n);
    clean[n] = 0;
    const char *slash = strrchr(clean, '/'), *base = slash ? slash + 1 : clean;
    if (!*base || !strcmp(base, ".") || !strcmp(base, "..")) die(2, "%s: expected the name of a new directory", dst);
    snprintf(parent, sizeof parent, "%.*s", slash == clean ? 1 : slash ? (int)(slash - clean) : 1, slash ? clean : ".");
    if (!realpath(parent, real_parent)) die(2, "%s: %s; DST's parent directory must exist", parent, strerror(errno));
    if (access(real_parent, W_OK)) die(2, "%s: %s", parent, strerror(errno));
    join_path(path, strcmp(real_parent, "/") ? real_parent : "", base);
    int exists = !lstat(clean, &st);
    if (exists && !realpath(clean, path)) die(2, "%s: %s", dst, strerror(errno));
    // DST is written in DST.saving, which may be left from a run that was killed, but must be nothing else
    snprintf(saving, sizeof saving, "%.4000s.saving", clean);
    int stale = !lstat(saving, &st);
    if (stale && (!S_ISDIR(st.st_mode) || !realpath(saving, real_saving)))
        die(2, "%s is in the way and is not a directory; remove it, or choose another DST", saving);
    for (int i = 0; i < num_sources + (ask.reference != NULL); i++) {
        const char* source = i < num_sources ? sources[i]->dir : ask.reference;
        if (!realpath(source, real)) die(2, "%s: %s", source, strerror(errno));
        if (paths_overlap(path, real))
            die(2, "%s: DST must lie outside of the source %s, which is never changed", dst, source);
        if (stale && paths_overlap(real_saving, real))
            die(2, "%s is the source %s, but DST is written there first; choose another DST", saving, source);
    }
    if (exists) exists = !lstat(clean, &st);
    if (!exists) return;
    if (!ask.force) die(2, "%s exists; choose another DST, or --force replaces it", dst);
    if (!S_ISDIR(st.st_mode)) die(2, "%s is not a directory; --force replaces checkpoints only", dst);
    DIR* d = opendir(clean);
    struct dirent* entry;
    int files = 0, config = 0;
    while (d && (entry = readdir(d)) != NULL) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        join_path(path, clean, entry->d_name);
        if (!lstat(path, &st) && S_ISDIR(st.st_mode))
            die(2, "%s holds the directory %s; --force replaces plain checkpoints only", dst, entry->d_name);
        if (!belongs_to_checkpoint(entry->d_name))
            die(2, "%s holds %s, which is no part of a checkpoint; --force replaces checkpoints only", dst,
                entry->d_name);
        files++;
        config |= !strcmp(entry->d_name, "config.json");
    }
    if (d) closedir(d);
    if (files && !config) die(2, "%s holds no config.json; --force replaces checkpoints only", dst);
}

static void begin_saving(const char* dst) {
    char path[PATH_SIZE], marker[PATH_SIZE];
    Error error = {""};
    static int registered = 0;
    snprintf(path, sizeof path, "%.4000s.saving", dst);
    int made = !mkdir(path, 0777);
    if (!made && errno != EEXIST) die(2, "%s: %s", path, strerror(errno));
    // a marker tells what a killed run has left from a directory that somebody else has made (an empty one is no harm)
    join_path(marker, path, SAVING_MARKER);
    if (!made && access(marker, F_OK) && (rmdir(path) || mkdir(path, 0777)))
        die(2, "%s is in the way and was not made by upcycle; remove it, or choose another DST", path);
    saving_lock = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (saving_lock < 0) die(1, "%s: %s", path, strerror(errno));
    if (flock(saving_lock, LOCK_EX | LOCK_NB)) die(2, "%s: another run is writing there", path);
    move_files(path, NULL, &error);
    if (error.text[0] || !write_file(marker, "", 0, &error)) die(1, "%s", error.text);
    strcpy(saving_path, path);
    if (!registered) atexit(remove_saving);
    registered = 1;
}

#ifndef RENAME_NOREPLACE
#define RENAME_NOREPLACE 1
#endif
#ifndef RENAME_EXCHANGE
#define RENAME_EXCHANGE 2
#endif
static int rename_flags(const char* from, const char* to, unsigned flags) {
#ifdef SYS_renameat2
    if (!syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flags)) return 0;
    if (errno != ENOSYS && errno != EINVAL) return -1;
#endif
    if (flags == RENAME_NOREPLACE) return rename(from, to);
    char old[PATH_SIZE]; // without an exchange: two steps; the old one is whole at every moment
    snprintf(old, sizeof old, "%.4000s.old", to);
    if (rename(to, old)) return -1;
    if (rename(from, to)) {
        int reason = errno;
        rename(old, to);
        errno = reason;
        return -1;
    }
    return rename(old, from);
}

// The moment from which DST is there.
static void finish_saving(const char* dst) {
    Error error = {""};
    char parent[PATH_SIZE];
    const char* slash = strrchr(dst, '/');
    snprintf(parent, sizeof parent, "%.*s", slash == dst ? 1 : slash ? (int)(slash - dst) : 1, slash ? dst : ".");
    char marker[PATH_SIZE], old_marker[PATH_SIZE];
    unlink(join_path(marker, saving_path, SAVING_MARKER));
    if (!flush_directory(saving_path, &error)) die(1, "%s", error.text);
    heed_signals();
    int replace = !access(dst, F_OK) && ask.force;
    // what is replaced gets the marker: killed before it is removed, it is known as what upcycle may remove
    join_path(old_marker, dst, SAVING_MARKER);
    if (replace && !write_file(old_marker, "", 0, &error)) die(1, "%s", error.text);
    if (rename_flags(saving_path, dst, replace ? RENAME_EXCHANGE : RENAME_NOREPLACE)) {
        int reason = errno;
        if (replace) unlink(old_marker);
        die(1, "%s: %s", dst, strerror(reason));
    }
    if (replace) remove_saving(); // now holds what was replaced
    saving_path[0] = 0;
    if (saving_lock >= 0) close(saving_lock);
    saving_lock = -1;
    if (!flush_directory(parent, &error)) die(1, "%s", error.text);
}

// ---------------------------------------------------------------------------------------------------------------------
// Making the plan: what was asked for, checked against what SRC is and what the class of DST can express

static int uses(Method m, const char* list) {
    const char* end;
    const char* name = METHODS;
    for (int i = 0; i < (int)m; i++) name = strchr(name, '|') + 1;
    size_t n = (end = strchr(name, '|')) ? (size_t)(end - name) : strlen(name);
    for (const char* s = list; *s;) {
        size_t k = strcspn(s, "|");
        if (k == n && !strncmp(s, name, n)) return 1;
        s += k + (s[k] == '|');
    }
    return 0;
}

// Options that say nothing to this source or method are refused: whoever gives one expects something of it.
static void check_options(const Plan* p, const char* src) {
#define DENSE_METHODS "copy|drop|noise|noise-replace|granular|partition|cluster|random"
#define MOE_METHODS \
    "copy|family|copy-noise|scaled|drop|interpolate|shuffle|orthogonal|svd-perturb|svd-mix|sparse-code-mix|random"
    static const char* dense_only[] = {"norm-topk", "layers", "sources",       "granularity",
                                       "scale",     "energy", "noise-fraction"};
    static const char* moe_only[] = {"select",       "score-on",  "allocate",      "cap",     "router",
                                     "router-delta", "reference", "prune-weights", "strength"};
    static const struct {
        const char *option, *methods;
    } wants[] = {{"drop-ratio", "drop"},
                 {"drop-indices", "drop|noise"},
                 {"granularity", "granular"},
                 {"scale", "granular|partition"},
                 {"energy", "cluster"},
                 {"noise-std", "noise|noise-replace|random"},
                 {"noise-fraction", "noise|noise-replace"},
                 {"strength", "copy-noise|scaled|interpolate|orthogonal|svd-perturb|svd-mix|sparse-code-mix"},
                 {"sources", "copy|drop|noise|noise-replace"}};
    if (!uses(p->method, p->dense ? DENSE_METHODS : MOE_METHODS))
        die(2, "--method %s is for a %s source, and %s is %s; fitting are %s", ask.method,
            p->dense ? "mixture-of-experts" : "dense", src, p->dense ? "dense" : "a mixture of experts",
            p->dense ? DENSE_METHODS : MOE_METHODS);
    for (int i = 0; !p->dense && i < 7; i++)
        if (asked(dense_only[i]))
            die(2, "--%s is for a dense source, and %s is a mixture of experts", dense_only[i], src);
    for (int i = 0; p->dense && i < 9; i++)
        if (asked(moe_only[i])) die(2, "--%s is for a mixture-of-experts source, and %s is dense", moe_only[i], src);
    for (size_t i = 0; i < sizeof wants / sizeof wants[0]; i++)
        if (asked(wants[i].option) && !uses(p->method, wants[i].methods))
            die(2, "--%s belongs to --method %s, and the method is %s", wants[i].option, wants[i].methods, ask.method);
    if (!p->dense && (asked("router-init") || asked("router-std")) && p->method != RANDOM)
        die(2, "--router-%s draws new rows, which --method %s does not have; --method random does",
            asked("router-init") ? "init" : "std", ask.method);
    if (p->method == CLUSTER && (asked("router-init") || asked("router-std")))
        die(2, "--router-init: the router of --method cluster is made of the centroids");
    if (uses(p->method, "svd-mix|sparse-code-mix") && asked("strength") && ask.strength > 1)
        die(2, "--strength %g: for --method %s it is the share that is exchanged, 0 to 1", ask.strength, ask.method);
    if (p->method == RANDOM && asked("prune-weights"))
        die(2, "--prune-weights goes by the inputs of experts, and the new ones of --method random have seen none");
}

static void open_sources(Plan* p, const char* src) {
    p->sources[p->num_sources++] = open_or_die(src, "");
    char *names = copy_string(ask.sources ? ask.sources : ""), *rest = names, *name;
    while (ask.sources && (name = strsep(&rest, ",")) != NULL) {
        if (p->num_sources == MAX_SOURCES) die(2, "--sources: more than %d", MAX_SOURCES);
        if (!*name) die(2, "--sources %s: a directory is missing between commas", ask.sources);
        Source* s = open_or_die(name, "");
        const Config *a = &p->sources[0]->config, *b = &s->config;
        const char* differs = a->arch != b->arch                                 ? "model_type"
                              : a->num_layers != b->num_layers                   ? "num_hidden_layers"
                              : a->hidden_size != b->hidden_size                 ? "hidden_size"
                              : a->num_heads != b->num_heads                     ? "num_attention_heads"
                              : a->num_kv_heads != b->num_kv_heads               ? "num_key_value_heads"
                              : a->head_dim != b->head_dim                       ? "head_dim"
                              : a->intermediate_size != b->intermediate_size     ? "intermediate_size"
                              : a->vocab_size != b->vocab_size                   ? "vocab_size"
                              : a->tie_word_embeddings != b->tie_word_embeddings ? "tie_word_embeddings"
                              : a->rope_theta != b->rope_theta                   ? "rope_theta"
                              : a->rms_norm_eps != b->rms_norm_eps               ? "rms_norm_eps"
                                                                                 : NULL;
        if (differs) die(2, "--sources: %s has another %s than %s; sources must be alike", name, differs, src);
        p->sources[p->num_sources++] = s;
    }
    free(names);
}

// The configuration of DST.
static void plan_config(Plan* p) {
    const Config* from = &p->sources[0]->config;
    Config* c = &p->config;
    static const struct {
        const char* name;
        Arch arch;
    } targets[] = {{"qwen3", QWEN3_MOE}, {"mixtral", MIXTRAL}, {"olmoe", OLMOE}};
    *c = *from;
    int N = p->N;
    if (p->dense) {
        if (from->arch != LLAMA && from->arch != MISTRAL && from->arch != QWEN3)
            die(2, "%s: a dense %s model has no mixture-of-experts class; llama, mistral and qwen3 have",
                p->sources[0]->dir, archs[from->arch].model_type);
        c->arch = from->arch == QWEN3 ? QWEN3_MOE : MIXTRAL;
        int G = p->method == GRANULAR ? (int)ask.granularity : p->method == PARTITION ? N : 1;
        if (p->method == GRANULAR && !asked("granularity"))
            die(2, "--method granular wants --granularity G, the number of shards of an FFN");
        if (p->method == PARTITION) ask.granularity = N;
        if (from->intermediate_size % G)
            die(2, "--%s %d: the FFN's width, %d, is no multiple of it",
                p->method == GRANULAR ? "granularity" : "experts", G, from->intermediate_size);
        if (p->method == GRANULAR && N % G) die(2, "--experts %d: no multiple of --granularity %d", N, G);
        p->groups = N / G;
        c->num_experts_per_tok = asked("topk") ? (int)ask.topk : p->method == GRANULAR ? G : imin(2, N);
        if (p->method == GRANULAR && c->num_experts_per_tok % G)
            die(2, "--topk %d: no multiple of --granularity %d, so that groups would be torn apart",
                c->num_experts_per_tok, G);
        c->moe_intermediate_size = from->intermediate_size / G;
        c->norm_topk_prob = asked("norm-topk") ? (int)ask.norm_topk : 1;
        c->router_aux_loss_coef = 0.01;
        parse_layers(ask.layers, c->sparse, c->num_layers);
        if (count_sparse(c) == 0) die(2, "--layers %s: no layer becomes sparse", ask.layers);
        if (c->arch == MIXTRAL) c->intermediate_size = c->moe_intermediate_size;
        if (c->arch == MIXTRAL && count_sparse(c) < c->num_layers)
            die(2,
                "--layers %s: Mixtral, the class of a %s source, has no dense layers; --layers all fits, or a Qwen3 "
                "source (Qwen3-MoE has them)",
                ask.layers, archs[from->arch].model_type);
        if (c->arch == MIXTRAL && !c->norm_topk_prob)
            die(2,
                "--norm-topk 0: Mixtral, the class of a %s source, always renormalises; --norm-topk 1 fits, or a Qwen3 "
                "source (Qwen3-MoE has both)",
                archs[from->arch].model_type);
    } else if (asked("topk")) {
        c->num_experts_per_tok = (int)ask.topk;
    }
    if (!p->dense && count_sparse(c) == 0)
        die(2, "%s: has experts in name only: no layer is sparse", p->sources[0]->dir);
    if (c->sliding_window && c->arch == QWEN3_MOE)
        die(2, "%s: has sliding_window %d, and DST would look back without limit; if that is meant, set "
            "use_sliding_window to false in its config.json", p->sources[0]->dir, c->sliding_window);
    c->num_experts = N;
    for (int i = 0; ask.arch && i < 3; i++)
        if (!strcmp(ask.arch, targets[i].name) && c->arch != targets[i].arch)
            die(2, "--arch %s cannot express a %s source%s", ask.arch, archs[from->arch].model_type,
                c->arch == QWEN3_MOE ? "'s norms; qwen3 fits"
                : c->arch == MIXTRAL ? "'s norms; mixtral fits"
                : c->arch == OLMOE   ? "'s norms; olmoe fits"
                                     : "; leave it out");
    if (c->num_experts_per_tok > N)
        die(2, "--topk %d: there are only %d experts; --topk %d fits", c->num_experts_per_tok, N, N);
}

// Decides what every expert is made from.
static void plan_experts(Plan* p) {
    int L = p->config.num_layers, N = p->N, E = p->E;
    size_t size = sizeof(int) * (size_t)L * (size_t)N;
    p->source = (int*)checked_malloc(size);
    p->copy = (int*)checked_malloc(size);
    p->family = (int*)checked_malloc(size);
    p->copies = (int*)checked_malloc(sizeof(int) * (size_t)L * (size_t)E);
    memset(p->copies, 0, sizeof(int) * (size_t)L * (size_t)E);
    memset(p->source, 0, size);
    memset(p->copy, 0, size);
    memset(p->family, 0, size);
    if (!p->dense) score_experts(p);
    for (int l = 0; l < L; l++) {
        int *source = p->source + (long)l * N, *copy = p->copy + (long)l * N, *family = p->family + (long)l * N;
        int* counts = p->copies + (long)l * E;
        const double* score = p->score ? p->score + (long)l * E : NULL;
        if (!p->config.sparse[l]) continue;
        if (p->dense) {
            for (int j = 0; j < N; j++) {
                source[j] = p->method == RANDOM ? -1 : j % p->num_sources;
                copy[j] = j / p->num_sources;
                // Families are exact copies of one thing: with drop and noise half of an expert still is one.
                family[j] = p->method == GRANULAR ? j % (int)ask.granularity : source[j];
                if (p->method == PARTITION || p->method == CLUSTER || p->method == RANDOM) family[j] = j;
            }
        } else if (N < E) {
            keep_best(source, score, E, N);
            for (int j = 0; j < N; j++) family[j] = j;
        } else {
            if (!score)
                allocate_uniform(counts, E, N);
            else if (!strcmp(ask.allocate, "sample") || p->selection == BY_CHANCE)
                allocate_sample(counts, score, E, N, (int)ask.cap, stream_key(p, "allocate", l, 0, 0));
            else
                allocate_greedy(counts, score, E, N, (int)ask.cap);
            place_copies(source, copy, counts, E, N);
            for (int j = 0; j < N; j++) {
                if (p->method == RANDOM && copy[j] > 0) source[j] = -1;
                family[j] = source[j] < 0 ? j : source[j];
            }
        }
        memset(counts, 0, sizeof(int) * (size_t)E);
        for (int j = 0; j < N; j++)
            if (source[j] >= 0) counts[source[j]]++;
    }
}

// The format of a tensor of the result.
static Dtype output_dtype(const Plan* p, const Role* r, const char* name) {
    const Source* s = p->sources[0];
    if (r->kind == ROUTER_CORRECTION) return DTYPE_F32;
    if (!strcmp(ask.dtype, "f32")) return DTYPE_F32;
    if (!strcmp(ask.dtype, "bf16")) return DTYPE_BF16;
    if (r->kind == ROUTER_ROWS && !p->dense) return s->views[s->router[r->layer]].stored->dtype;
    if (r->kind == ROUTER_ROWS) return source_ffn(s, r->layer, 0, GATE)->stored->dtype;
    if (r->kind == FFN_MATRIX && p->config.sparse[r->layer]) {
        int e = plan_source(p, r->layer, r->expert);
        const Source* made_from = p->dense && e >= 0 ? p->sources[e] : s;
        return source_ffn(made_from, r->layer, p->dense || e < 0 ? 0 : e, r->matrix)->stored->dtype;
    }
    const View* v = source_find(s, name);
    return v ? v->stored->dtype : DTYPE_F32;
}

// Lists the tensors of DST and packs them into files of at most `most` bytes of data (one tensor may be larger).
static void plan_outputs(Plan* p, long most) {
    int halves = p->carry == MOMENTS_RESET ? 0 : 2;
    p->layout = layout_create(&p->config);
    p->outputs = (Output*)checked_malloc(sizeof(Output) * (size_t)(1 + halves) * (size_t)p->layout.count);
    long at = 0;
    int file = 0;
    for (int half = -1; half < halves; half++) {
        if (half == 0) {
            file++;
            at = 0;
        }
        for (int i = 0; i < p->layout.count; i++) {
            Output* o = &p->outputs[p->num_outputs];
            memset(o, 0, sizeof *o);
            o->tensor = &p->layout.tensors[i];
            o->role = role_of(o->tensor->name);
            o->half = half;
            o->dtype = half < 0 ? output_dtype(p, &o->role, o->tensor->name) : DTYPE_F32;
            if (half >= 0 && o->role.kind == ROUTER_CORRECTION) {
                const Source* s = p->moments[half];
                if (s->correction[o->role.layer] < 0 || !s->views[s->correction[o->role.layer]].stored) continue;
            }
            snprintf(o->name, sizeof o->name, "%s%s", o->tensor->name,
                     half < 0 ? ""
                     : half   ? ".exp_avg_sq"
                              : ".exp_avg");
            o->bytes = tensor_size(o->tensor) * dtype_size(o->dtype);
            if (half < 0 && at > 0 && at + o->bytes > most) {
                file++;
                at = 0;
            }
            o->file = file;
            o->offset = at;
            at += o->bytes;
            progress.total += o->bytes;
            p->num_outputs++;
        }
        if (half < 0) p->model_files = file + 1;
    }
    p->num_files = file + 1;
}

// What SRC tells of itself and DST will repeat, read now: a broken file is better found before the long work.
static void read_records(Plan* p) {
    enum { GENERATIONS = 12 }; // each is some levels of JSON, and readers know 64
    char path[PATH_SIZE];
    Error error = {""};
    join_path(path, p->sources[0]->dir, "upcycle.json");
    if (!access(path, F_OK)) p->parent = json_read(path, &error);
    if (error.text[0]) die(2, "%s", error.text);
    Json* ancestor = p->parent;
    for (int i = 0; ancestor && i < GENERATIONS; i++) ancestor = (Json*)json_get(ancestor, "parent");
    if (ancestor) ancestor->type = JSON_NULL;
    if (p->carry == MOMENTS_RESET) return;
    join_path(path, p->sources[0]->dir, "trainer.json");
    p->trainer = json_read(path, &error);
    if (!p->trainer || p->trainer->type != JSON_OBJECT)
        die(2, "--optimizer %s: %s", ask.optimizer, error.text[0] ? error.text : "trainer.json is no object");
}

static Plan* plan_create(const char* src) {
    Plan* p = (Plan*)checked_malloc(sizeof(Plan));
    Config c;
    Error error = {""};
    memset(p, 0, sizeof *p);
    if (!config_read(&c, src, &error)) die(2, "%s", error.text);
    p->method = (Method)choice_index(METHODS, ask.method);
    p->seed = (uint64_t)ask.seed;
    p->dense = c.num_experts == 0;
    if (c.family_penalty > 0)
        die(2, "%s: its families are still penalised; train it on to the end of --family-steps first", src);
    check_options(p, src);
    open_sources(p, src);
    if (!asked("experts")) die(2, "--experts N is missing: the number of experts of each sparse layer in DST");
    p->N = (int)ask.experts;
    p->E = p->dense ? p->num_sources : c.num_experts;
    p->groups = p->N;
    const Source* s = p->sources[0];
    if (p->N < p->E && p->dense) die(2, "--experts %d: there are %d sources, and each needs an expert", p->N, p->E);
    plan_config(p);

    // selection
    int shrinks = !p->dense && p->N < p->E;
    p->selection = ask.select ? (Selection)choice_index(SELECTIONS, ask.select) : UNIFORM;
    if (shrinks && (p->selection == UNIFORM || p->selection == SALIENCY || p->selection == FISHER))
        die(2,
            "--experts %d: %s has %d; to keep some of them, choose --select router-norm, load, grad2, weight or "
            "random%s",
            p->N, src, p->E, p->selection == UNIFORM ? "" : "; the selection asked for is for larger models");
    if (!p->dense && !shrinks && (p->selection == LOAD || p->selection == ROUTER_NORM))
        die(2,
            "--select %s chooses experts to keep, but DST is not smaller; uniform, random, weight, saliency, grad2 or "
            "fisher fit",
            ask.select);
    if (shrinks && p->method != COPY)
        die(2, "--method %s makes copies, but DST has fewer experts than SRC; leave it out", ask.method);
    if (!p->dense && p->N == p->E && p->method != COPY)
        die(2, "--method %s makes copies, but DST has as many experts as SRC, %d", ask.method, p->E);
    if (shrinks && p->config.num_experts_per_tok == p->N && p->N < c.num_experts_per_tok)
        p->config.num_experts_per_tok = p->N;
    if (ask.reference && p->selection != ROUTER_NORM) die(2, "--reference belongs to --select router-norm");
    if (asked("score-on") && (p->selection < WEIGHT || p->selection > FISHER))
        die(2, "--score-on belongs to --select weight, saliency, grad2 or fisher");
    if ((asked("allocate") || asked("cap")) && (p->selection == UNIFORM || shrinks))
        die(2, "--%s hands out copies by a score; --select weight, saliency, grad2 or fisher has one",
            asked("cap") ? "cap" : "allocate");
    if (asked("allocate") && p->selection == BY_CHANCE)
        die(2, "--allocate: --select random draws lots; weight, saliency, grad2 or fisher have scores");
    int calibrated =
        p->method == CLUSTER || asked("prune-weights") || (p->selection >= SALIENCY && p->selection <= LOAD);
    if (ask.calibrate && !calibrated)
        die(2, "--calibrate: nothing asked for needs data; --select grad2, --prune-weights or --method cluster do");

    // router
    int correction = 0;
    for (int l = 0; l < c.num_layers; l++) correction |= s->correction[l] >= 0;
    p->router = ask.router                          ? (RouterMethod)choice_index(ROUTERS, ask.router)
                : correction && p->method != FAMILY ? ROUTER_BIAS
                                                    : ROUTER_COPY;
    if (p->router == ROUTER_BIAS && !correction)
        die(2,
            "--router bias: the routers of %s have no bias to perturb; --router perturb-new changes the rows of copies",
            src);
    if (p->method == FAMILY && c.router == ROUTER_LPR)
        die(2, "--method family: %s has an lpr router, which knows no families; --method copy fits", src);
    if (p->method == FAMILY && p->config.num_experts_per_tok > p->E)
        die(2, "--topk %d: a token gets one member of a family at most, and there are %d families",
            p->config.num_experts_per_tok, p->E);
    if (p->method == FAMILY) p->config.family_penalty = INFINITY; // train_moe lowers it
    if (p->method == FAMILY && p->router != ROUTER_COPY)
        die(2, "--router %s: --method family keeps the function exactly, which needs --router copy", ask.router);
    if (p->router != ROUTER_COPY && ask.router && p->N <= p->E && !(p->N == p->E && p->router == ROUTER_NOISE))
        die(2, "--router %s is for copies, and DST has no more experts than SRC", ask.router);
    if (asked("router-delta") && p->router == ROUTER_COPY) die(2, "--router-delta: --router copy has no strength");
    if (asked("router-delta") && p->router == ROUTER_TEMPERATURE && ask.router_delta == 0)
        die(2, "--router-delta 0: --router temperature divides by it; expected a positive number");

    // AdamW's moments
    p->carry = (Moments)choice_index("reset|copy|scale|interpolate", ask.optimizer);
    if (p->carry != MOMENTS_RESET && (p->num_sources > 1 || p->method == CLUSTER || p->method == RANDOM) && p->dense)
        die(2,
            "--optimizer %s: the experts of this method have no weights that moments could go with; --optimizer reset "
            "fits",
            ask.optimizer);
    if (p->carry == MOMENTS_INTERPOLATE && (p->dense || p->method == SHUFFLE))
        die(2, "--optimizer interpolate: %s has no next expert to interpolate with; --optimizer copy fits",
            p->dense ? "a dense model" : "a permuted copy");
    for (int half = 0; p->carry != MOMENTS_RESET && half < 2; half++)
        p->moments[half] = open_or_die(src, half ? ".exp_avg_sq" : ".exp_avg");
    read_records(p);

    if (p->method == CLUSTER) find_clusters(p);
    plan_experts(p);
    if (asked("prune-weights")) {
        long n = (long)c.num_layers * p->E * (c.hidden_size + c.moe_intermediate_size);
        p->input_norms = (double*)checked_malloc(sizeof(double) * (size_t)n);
        memset(p->input_norms, 0, sizeof(double) * (size_t)n);
        double* load = (double*)checked_malloc(sizeof(double) * (size_t)c.num_layers * (size_t)p->E);
        memset(load, 0, sizeof(double) * (size_t)c.num_layers * (size_t)p->E);
        Usage usage = {load, p->input_norms};
        measure_usage(s, &usage, "--prune-weights");
        long width = c.hidden_size + c.moe_intermediate_size;
        for (long i = 0; i < n; i++)
            p->input_norms[i] = load[i / width] > 0 ? sqrt(p->input_norms[i]) : 1; // no token: by |w| alone
        free(load);
    }
    plan_outputs(p, parse_size(ask.shard_size));
    return p;
}

static void plan_free(Plan* p) {
    Clusters* k = (Clusters*)p->clusters;
    for (int l = 0; k && l < p->config.num_layers; l++) {
        free(k->inputs[l]);
        free(k->cluster[l]);
    }
    if (k) {
        for (int i = 0; i < 3; i++) free(k->made[i]);
        free(k->inputs);
        free(k->cluster);
        free(k);
    }
    for (int i = 0; i < p->num_sources; i++) source_close(p->sources[i]);
    for (int i = 0; i < 2; i++) source_close(p->moments[i]);
    free(p->layout.tensors);
    free(p->source);
    free(p->copy);
    free(p->family);
    free(p->copies);
    free(p->score);
    free(p->input_norms);
    free(p->centroids);
    free(p->outputs);
    json_free(p->parent);
    json_free(p->trainer);
    free(p);
}

// ---------------------------------------------------------------------------------------------------------------------
// 11. The receipt

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
    memset(f, 0, sizeof *f);
    f->function[0] = 0;
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
    if (asked("prune-weights"))
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
    printf("function: %s\n", f->function);
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

// ---------------------------------------------------------------------------------------------------------------------
// 12. Proof

typedef struct {
    const Plan* plan;
    double distinct;
    long tokens;
} DistinctSources;

// Counts, for each token, the different sources among its experts; an expert that is new is a source of its own.
static void observe_sources(void* state, const Model* m, int l) {
    DistinctSources* d = (DistinctSources*)state;
    const Config* c = &m->config;
    int K = m->topk[l], N = m->batch * m->length;
    if (!c->sparse[l]) return;
    for (int n = 0; n < N; n++) {
        const int* chosen = m->layers[l].experts + (long)n * K;
        for (int k = 0; k < K; k++) {
            int s = plan_source(d->plan, l, chosen[k]), seen = 0;
            for (int i = 0; i < k; i++) seen |= s >= 0 && plan_source(d->plan, l, chosen[i]) == s;
            d->distinct += !seen;
        }
    }
    d->tokens += N;
}

// The loss of SRC and of the result in `dir` on --check, and || logits - logits of SRC || / || logits of SRC ||.
static void prove(const Plan* p, const char* dir, Proof* proof) {
    Error error = {""};
    Config from = p->sources[0]->config, to;
    int T = sequence_length(&from), B = (int)ask.batch;
    if (!config_read(&to, dir, &error)) die(1, "%s", error.text);
    to.max_position_embeddings = from.max_position_embeddings;
    Dataset* d = dataset_open(ask.check, T, from.vocab_size, WHOLE, reads_bytes(&from, p->sources[0]->dir));
    long windows = ask.check_batches ? lmin(d->windows, ask.check_batches * B) : d->windows;
    if (windows < B) B = (int)windows;
    Model* before = model_create(&from, FOR_SCORING, B, T, T, NULL);
    Model* after = model_create(&to, FOR_SCORING, B, T, T, NULL);
    if (!checkpoint_load(before, p->sources[0]->dir, &error) || !checkpoint_load(after, dir, &error))
        die(1, "%s", error.text);
    Batch batch = batch_create(B, T);
    DistinctSources distinct = {p, 0, 0};
    double difference = 0, norm = 0;
    memset(proof, 0, sizeof *proof);
    for (long w = 0; w < windows; w += B) {
        int rows = (int)lmin(B, windows - w);
        heed_signals();
        if (isatty(2)) fprintf(stderr, "\rcheck: window %ld of %ld\033[K", w, windows);
        for (int b = 0; b < rows; b++)
            dataset_window(d, w + b, batch.tokens + (long)b * T, batch.targets + (long)b * T);
        proof->loss_before += observed_forward(before, batch.tokens, batch.targets, rows, T, NULL, NULL) * rows;
        proof->loss_after +=
            observed_forward(after, batch.tokens, batch.targets, rows, T, observe_sources, &distinct) * rows;
        for (long i = 0; i < (long)rows * T * from.vocab_size; i++) {
            double x = before->logits[i], y = after->logits[i];
            difference += (y - x) * (y - x);
            norm += x * x;
        }
    }
    if (isatty(2)) fprintf(stderr, "\r\033[K");
    proof->done = 1;
    proof->tokens = windows * T;
    proof->loss_before /= (double)windows;
    proof->loss_after /= (double)windows;
    proof->logits = norm == 0 && difference == 0 ? 0 : sqrt(difference / norm);
    if ((!p->dense || p->num_sources > 1) && distinct.tokens)
        proof->distinct = distinct.distinct / (double)distinct.tokens;
    printf("check   %s, %ld tokens: loss %.4f before, %.4f after; relative change of the logits %.1e\n", ask.check,
           proof->tokens, proof->loss_before, proof->loss_after, proof->logits);
    if (proof->distinct > 0)
        printf("        a token's %d experts come from %.2f distinct sources on average\n", to.num_experts_per_tok,
               proof->distinct);
    fflush(stdout);
    free(batch.tokens);
    dataset_close(d);
    model_free(before);
    model_free(after);
}

// ---------------------------------------------------------------------------------------------------------------------
// 13. Inspection

// Cosines between the experts of a layer, all their weights taken as one vector: gram (E, E) of inner products; hash
// (E) is equal for experts that are equal in every number.
static void expert_gram(const Source* s, int l, double* gram, uint64_t* hash) {
    int E = s->config.num_experts;
    long n = CHUNK_FLOATS / E < 1 ? 1 : CHUNK_FLOATS / E;
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)(n * E));
    float* products = (float*)checked_malloc(sizeof(float) * (size_t)E * (size_t)E);
    Error error = {""};
    memset(gram, 0, sizeof(double) * (size_t)E * (size_t)E);
    memset(hash, 0, sizeof(uint64_t) * (size_t)E);
    for (int matrix = GATE; matrix <= DOWN; matrix++) {
        long size = source_ffn(s, l, 0, matrix)->rows * source_ffn(s, l, 0, matrix)->cols;
        for (long first = 0; first < size; first += n) {
            long count = lmin(n, size - first);
            for (int e = 0; e < E; e++) {
                const View* v = source_ffn(s, l, e, matrix);
                if (!safetensors_read(v->files, v->stored, v->first + first, count, x + e * count, &error))
                    die(1, "%s", error.text);
                for (long i = 0; i < count; i++) {
                    uint32_t bits;
                    memcpy(&bits, x + e * count + i, 4);
                    hash[e] = (hash[e] ^ bits) * 0x9E3779B97F4A7C15ull;
                    hash[e] ^= hash[e] >> 29;
                }
            }
            matmul_forward(products, x, x, E, (int)count, E);
            for (long i = 0; i < (long)E * E; i++) gram[i] += products[i];
        }
    }
    free(x);
    free(products);
}

static void print_lineage(const char* dir) {
    char path[PATH_SIZE];
    Error error = {""};
    join_path(path, dir, "upcycle.json");
    if (access(path, F_OK)) return;
    Json* j = json_read(path, &error);
    if (!j) die(2, "%s", error.text);
    printf("lineage (the latest step first):\n");
    for (const Json* r = j; r && r->type == JSON_OBJECT; r = json_get(r, "parent")) {
        const Json *method = json_get(r, "method"), *sources = json_get(r, "sources"),
                   *experts = json_get(r, "experts"), *f = json_get(r, "function");
        printf("  %s", method && method->type == JSON_STRING ? method->string : "?");
        if (experts && experts->type == JSON_ARRAY && experts->count == 2 && experts->items[0]->string &&
            experts->items[1]->string)
            printf(", %s -> %s experts", strcmp(experts->items[0]->string, "0") ? experts->items[0]->string : "dense",
                   experts->items[1]->string);
        for (int i = 0; sources && i < sources->count; i++)
            if (sources->items[i]->type == JSON_STRING) printf("%s%s", i ? ", " : " from ", sources->items[i]->string);
        if (f && f->type == JSON_STRING) printf("\n    function: %s", f->string);
        printf("\n");
    }
    json_free(j);
}

static int run_inspect(void) {
    Source* s = open_or_die(ask.inspect, "");
    const Config* c = &s->config;
    int E = c->num_experts, L = c->num_layers;
    char path[PATH_SIZE];
    Error error = {""};
    print_config_line("model", s->dir, c, stored_bytes(s));
    long by_type[3] = {0, 0, 0};
    for (int i = 0; i < s->files->num_tensors; i++)
        if (s->files->tensors[i].dtype <= DTYPE_F16) by_type[s->files->tensors[i].dtype] += s->files->tensors[i].bytes;
    printf("        %d tensors in %d file%s:", s->files->num_tensors, s->files->num_files,
           s->files->num_files > 1 ? "s" : "");
    for (int i = 0; i < 3; i++)
        if (by_type[i]) printf(" %s %.1f MB", dtype_names[i], by_type[i] * 1e-6);
    printf("\n");
    print_lineage(s->dir);
    if (E == 0) {
        if (ask.data) die(2, "--data: %s is dense, it has no load", s->dir);
        source_close(s);
        return 0;
    }
    double *load = NULL, *gram = (double*)checked_malloc(sizeof(double) * (size_t)E * (size_t)E);
    long* whole_load = (long*)checked_malloc(sizeof(long) * (size_t)E);
    uint64_t* hash = (uint64_t*)checked_malloc(sizeof(uint64_t) * (size_t)E);
    if (ask.data) {
        Config config = *c;
        int T = sequence_length(&config), B = (int)ask.batch;
        Dataset* d = dataset_open(ask.data, T, c->vocab_size, WHOLE, reads_bytes(c, s->dir));
        long windows = lmin(d->windows, ask.calibrate_batches * B);
        Model* m = model_create(&config, FOR_SCORING, B, T, T, NULL);
        if (!checkpoint_load(m, s->dir, &error)) die(2, "%s", error.text);
        Batch batch = batch_create(B, T);
        load = (double*)checked_malloc(sizeof(double) * (size_t)L * (size_t)E);
        memset(load, 0, sizeof(double) * (size_t)L * (size_t)E);
        Usage usage = {load, NULL};
        double loss = 0;
        for (long w = 0; w < windows; w += B) {
            int rows = (int)lmin(B, windows - w);
            for (int b = 0; b < rows; b++)
                dataset_window(d, w + b, batch.tokens + (long)b * T, batch.targets + (long)b * T);
            loss += observed_forward(m, batch.tokens, batch.targets, rows, T, observe_usage, &usage) * rows;
        }
        printf("data    %s, %ld tokens: loss %.4f\n", ask.data, windows * T, loss / (double)windows);
        free(batch.tokens);
        dataset_close(d);
        model_free(m);
    }
    join_path(path, s->dir, "upcycle.json");
    Json* receipt = access(path, F_OK) ? NULL : json_read(path, &error);
    const Json* layers = json_get(receipt, "layers");
    printf("similarity of experts (cosine of all weights), pairs that are equal in every number%s\n",
           load ? "; load (share of the mean)" : "");
    for (int l = 0; l < L; l++) {
        if (!c->sparse[l]) continue;
        double mean = 0, most = -1, twin_mean = 0;
        long pairs = 0, equal = 0, twins = 0;
        const Json* family = NULL;
        for (int i = 0; layers && i < layers->count; i++)
            if (json_whole(json_get(layers->items[i], "layer"), MAX_LAYERS) == l)
                family = json_get(layers->items[i], "family");
        if (family && family->count != E) family = NULL;
        expert_gram(s, l, gram, hash);
        for (int a = 0; a < E; a++)
            for (int b = 0; b < a; b++) {
                double size = sqrt(gram[(long)a * E + a] * gram[(long)b * E + b]),
                       cosine = size > 0 ? gram[(long)a * E + b] / size : 0;
                mean += cosine;
                if (cosine > most) most = cosine;
                equal += hash[a] == hash[b];
                pairs++;
                if (family && family->items[a]->string && family->items[b]->string &&
                    !strcmp(family->items[a]->string, family->items[b]->string)) {
                    twin_mean += cosine;
                    twins++;
                }
            }
        printf("  layer %d:", l);
        if (pairs) printf(" mean %.4f, max %.4f, %ld of %ld pairs equal", mean / (double)pairs, most, equal, pairs);
        if (twins) printf(", within families %.4f", twin_mean / (double)twins);
        if (load) {
            const double* x = load + (long)l * E;
            double sum = 0;
            for (int e = 0; e < E; e++) {
                whole_load[e] = (long)x[e];
                sum += x[e];
            }
            LoadFigures figures = load_figures(whole_load, E);
            printf("; Gini %.3f, MaxVio %.2f, %d dead", figures.gini, figures.max_vio, figures.dead);
            if (E <= 16) {
                printf(", load");
                for (int e = 0; e < E; e++) printf(" %.2f", sum > 0 ? x[e] * E / sum : 0);
            }
        }
        printf("\n");
        fflush(stdout);
        heed_signals();
    }
    json_free(receipt);
    free(load);
    free(whole_load);
    free(gram);
    free(hash);
    source_close(s);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// 14. Command line

static void print_upcycle_help(void) {
    static const struct {
        const char *first, *title;
    } titles[] = {{"experts", "The result"},
                  {"norm-topk", "From a dense model"},
                  {"drop-ratio", "Methods"},
                  {"select", "From a mixture of experts"},
                  {"inspect", "Instead of an upcycle"}};
    printf(
        "upcycle %s: SRC DST --experts N [options]: a dense model becomes a mixture of experts, a mixture of experts a "
        "larger\n"
        "or smaller one. SRC and DST are Hugging Face directories; SRC is only read, DST must not exist.\n",
        VERSION);
    for (int i = 0; i < NUM_ASKED; i++) {
        const Option* o = &ask_table[i];
        char start[48] = "";
        for (size_t g = 0; g < sizeof titles / sizeof titles[0]; g++)
            if (!strcmp(o->name, titles[g].first)) printf("%s\n", titles[g].title);
        if (o->start && o->type != OPT_FLAG) snprintf(start, sizeof start, "%s(%s)", *o->help ? " " : "", o->start);
        if (!strcmp(o->name, "method")) {
            printf("  --method M (copy)\n      dense SRC: %s\n      MoE SRC:   %s\n", DENSE_METHODS, MOE_METHODS);
            continue;
        }
        if (!strcmp(o->name, "router") || !strcmp(o->name, "select")) {
            printf("  --%s %s\n      %s%s\n", o->name, o->argument, o->help, start);
            continue;
        }
        char text[80];
        snprintf(text, sizeof text, "  --%s %s", o->name, o->argument);
        printf("%-44s %s%s\n", text, o->help, start);
    }
}

static void ask_parse(int argc, char** argv) {
    struct option longs[NUM_ASKED + 3];
    memset(longs, 0, sizeof longs);
    for (int i = 0; i < NUM_ASKED; i++) {
        Option* o = &ask_table[i];
        o->given = 0;
        if (o->start)
            option_set(o, o->start);
        else if (o->type == OPT_WHOLE)
            *(long*)o->value = UNSET;
        else if (o->type == OPT_REAL)
            *(double*)o->value = UNSET;
        else
            *(const char**)o->value = NULL;
        longs[i].name = o->name;
        longs[i].has_arg = o->type == OPT_FLAG ? no_argument : required_argument;
    }
    longs[NUM_ASKED].name = "help";
    longs[NUM_ASKED + 1].name = "version";
    for (int i = 0; i < NUM_ASKED + 2; i++) longs[i].val = 256 + i; // see options_parse
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, ":", longs, NULL)) != -1) {
        int index = c - 256;
        if (c == ':') die(2, "%s wants a value; see --help", argv[optind - 1]);
        if (c == '?' && optopt > 0 && optopt < 256) die(2, "-%c: unknown option; see --help", optopt);
        if (c == '?') option_unknown(argv[optind - 1], longs);
        if (index == NUM_ASKED) {
            print_upcycle_help();
            exit(0);
        }
        if (index == NUM_ASKED + 1) {
            printf("upcycle %s\n", VERSION);
            exit(0);
        }
        option_set(&ask_table[index], ask_table[index].type == OPT_FLAG ? "1" : optarg);
        ask_table[index].given = 1;
    }
}

static int upcycle_main(int argc, char** argv) {
    char dst[PATH_SIZE];
    Findings findings;
    Proof proof;
    struct statvfs disk;
    program_name = "upcycle";
    // what the receipt repeats: the options as they were given, without SRC and DST
    char** arguments = (char**)checked_malloc(sizeof(char*) * (size_t)(argc + 1));
    int num_arguments = 0;
    memset(&proof, 0, sizeof proof);
    memset(&progress, 0, sizeof progress);
    stop_signal = 0;
    ask_parse(argc, argv); // moves SRC and DST behind the options
#ifdef _OPENMP
    if (ask.threads != UNSET) omp_set_num_threads((int)ask.threads);
#endif
    for (int i = 1; i < optind; i++) arguments[num_arguments++] = argv[i];
    catch_signals();
    signal(SIGPIPE, SIG_IGN); // that nobody reads what is printed (`| head`) is no reason to lose the work
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a file over the limit is an error of write
#endif
    static const char* of_inspect[] = {"inspect", "data", "calibrate-batches", "batch", "seq", "threads"};
    for (int i = 0; i < NUM_ASKED; i++) {
        int fits = !ask.inspect;
        for (int k = 0; k < 6; k++) fits |= !strcmp(ask_table[i].name, of_inspect[k]);
        if (ask_table[i].given && !fits) die(2, "--inspect only looks; leave out --%s", ask_table[i].name);
    }
    static const char* of_data[] = {"batch", "seq", "calibrate-batches", "check-batches"};
    for (int i = 0; i < 4; i++) {
        const char* wanted = ask.inspect ? "data" : i == 2 ? "calibrate" : i == 3 ? "check" : "calibrate or --check";
        int used = ask.data || (i != 3 && ask.calibrate) || (i != 2 && ask.check);
        if (asked(of_data[i]) && !used) die(2, "--%s is about data, and there is no --%s", of_data[i], wanted);
    }
    if (ask.data && !ask.inspect) die(2, "--data goes with --inspect; --check and --calibrate are for an upcycle");
    if (ask.inspect) {
        if (optind < argc) die(2, "%s: --inspect DIR takes no SRC and DST", argv[optind]);
        free(arguments);
        return run_inspect();
    }
    if (argc - optind != 2)
        die(2, "expected SRC DST --experts N, found %d director%s; see --help", argc - optind,
            argc - optind == 1 ? "y" : "ies");
    const char *src = argv[optind], *wanted = argv[optind + 1];
    Error error = {""};
    Config c;
    if (!config_read(&c, src, &error)) die(2, "%s", error.text);
    Source early;
    memset(&early, 0, sizeof early);
    early.dir = (char*)src;
    Source* only[1] = {&early};
    check_destination(wanted, dst, only, 1); // what can be refused is refused before any long work
    if (ask.check) {
        Config checked = c;
        dataset_close(dataset_open(ask.check, sequence_length(&checked), c.vocab_size, WHOLE, reads_bytes(&c, src)));
    }
    Plan* p = plan_create(src);
    check_destination(wanted, dst, p->sources, p->num_sources);
    find_properties(p, &findings);
    print_plan(p, dst);
    if (ask.dry_run) {
        printf("files   %d with %d tensors, %.1f MB; memory while writing at most about %.0f MB and the program's 3\n",
               p->num_files, p->num_outputs, (double)progress.total * 1e-6, plan_memory(p) * 1e-6);
        print_findings(&findings);
        printf("nothing was written%s: --dry-run\n", ask.check ? " and nothing checked" : "");
    } else {
        begin_saving(dst);
        long room = statvfs(saving_path, &disk) ? LONG_MAX : (long)disk.f_bavail * (long)disk.f_frsize;
        if (room < progress.total)
            die(2, "%s: %.1f MB wanted, but the disk has only %.1f MB left", dst, progress.total * 1e-6, room * 1e-6);
        write_tensors(p, saving_path);
        double elapsed = seconds() - progress.started;
        if (p->model_files > 1) write_index(p, saving_path);
        write_config(p, saving_path);
        if (p->carry != MOMENTS_RESET) write_trainer(p, saving_path);
        copy_travelling_files(src, saving_path);
        find_properties(p, &findings); // cluster knows its ranks only now
        if (progress.overflows)
            warn(&findings, "%ld numbers are too large for their format and became infinite; --dtype f32 holds them",
                 progress.overflows);
        write_receipt(p, saving_path, &findings, NULL, arguments, num_arguments);
        printf("written %.1f MB in %d file%s in %.1f s\n", progress.total * 1e-6, p->num_files,
               p->num_files > 1 ? "s" : "", elapsed);
        fflush(stdout);
        if (ask.check) {
            prove(p, saving_path, &proof);
            if (!isfinite(proof.logits))
                warn(&findings, "the logits on %s are not numbers, or infinite; does SRC hold weights that are not?",
                     ask.check);
            write_receipt(p, saving_path, &findings, &proof, arguments, num_arguments);
        }
        finish_saving(dst);
        print_findings(&findings);
        if (p->carry != MOMENTS_RESET)
            printf("moments: --optimizer %s; `train_moe --out %s --resume --steps N` uses them, --model does not\n",
                   ask.optimizer, dst);
    }
    plan_free(p);
    free(arguments);
    return 0;
}

#ifndef UPCYCLE_NO_MAIN
int main(int argc, char** argv) { return upcycle_main(argc, argv); }
#endif
#endif
