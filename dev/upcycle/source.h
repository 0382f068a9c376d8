// source.h: sources: checkpoints of which each tensor's place is known and nothing is read before it is used.
#pragma once

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

typedef enum { OTHER, FFN_MATRIX, ROUTER_ROWS, ROUTER_CORRECTION, SHARED } RoleKind; // SHARED: of a shared expert
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
    if (!strncmp(rest, "mlp.shared_expert", 17)) {
        r.kind = SHARED;
        return r;
    }
    if (experts || !strncmp(rest, "mlp.", 4)) {
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
    optimizer_path(path, dir);
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

enum { WEIGHTS, EXP_AVG, EXP_AVG_SQ }; // what a tensor of the result holds: the model's numbers, or AdamW's moments

// A tensor of the result.
typedef struct {
    const Tensor* tensor;
    Role role;
    Dtype dtype;
    char name[120];
    int holds, file;
    long bytes, offset; // in the file's data
} Output;
