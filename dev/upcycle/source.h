// source.h: sources: checkpoints of which each tensor's place is known and nothing is read before it is used.
#pragma once

static const char* const dtype_names[] = {"F32", "BF16", "F16", "F64"}; // in the order of Dtype; F64 is never written
static const char* const torch_names[] = {"float32", "bfloat16", "float16"};
static int dtype_size(Dtype d) { return d == DTYPE_F64 ? 8 : d == DTYPE_F32 ? 4 : 2; }

// Rounds to the nearest number of 8 significant bits, ties to even. A NaN stays one.
static uint16_t float_to_bf16(float x) {
    union {
        float value;
        uint32_t bits;
    } u;
    u.value = x;
    return (uint16_t)(ROUND_TO_BF16(u.bits) >> 16);
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
// Of each tensor its view, see views.h.

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
    long pieces = v->stored_rows ? rows : 1, cols = v->stored_rows ? v->stored_cols : rows * v->cols;
    for (long r = 0; r < pieces; r++, out += v->cols) {
        long from = v->stored_rows ? (row + r) % v->stored_rows * cols : row * v->cols;
        if (!safetensors_read(v->files, v->stored, v->first + from, cols, out, &error)) die(1, "%s", error.text);
        for (long c = v->stored_rows ? v->cols - 1 : -1; c >= 0; c--) // from the end: what is copied is not yet scaled
            out[c] = v->scale == 0 ? 0 : v->scale * out[c % cols];
    }
}

// The lists of tensors that the configuration asks for; views are still to be found.
static void source_index(Source* s) {
    int E = s->config.num_experts > 0 ? s->config.num_experts : 1, L = s->config.num_layers;
    s->layout = layout_create(&s->config);
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
    for (int i = 0; i < count; i++) {
        Role r = role_of(s->layout.tensors[i].name);
        if (r.kind == FFN_MATRIX) s->ffn[((long)r.layer * E + r.expert) * 3 + r.matrix] = i;
        if (r.kind == ROUTER_ROWS) s->router[r.layer] = i;
        if (r.kind == ROUTER_CORRECTION) s->correction[r.layer] = i;
    }
}

static void source_free_index(Source* s) {
    free(s->layout.tensors);
    free(s->views);
    free(s->by_name);
    free(s->ffn);
    free(s->router);
    free(s->correction);
}

static void source_close(Source* s) {
    if (!s) return;
    safetensors_close(s->files);
    source_free_index(s);
    free(s->dir);
    free(s);
}

// Opens the files of DIR; suffix "": the model, ".exp_avg" or ".exp_avg_sq": AdamW's moments. NULL and an error if
// anything is missing or of another shape.
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
    source_index(s);
    views_find(s->views, c, &s->layout, s->files, suffix, &inner);
    if (!inner.text[0]) return s;
    set_error(error, "%s: %s", dir, inner.text);
    source_close(s);
    return NULL;
}

static Source* open_or_die(const char* dir, const char* suffix) {
    Error error = {""};
    Source* s = source_open(dir, suffix, &error);
    if (!s) die(2, "%s", error.text);
    safetensors_say_notes(s->files, dir);
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
