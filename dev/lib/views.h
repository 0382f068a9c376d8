// views.h: where the numbers of a model's tensors lie in its files. Needs safetensors.h, layout.h, Config.
//
// A checkpoint may hold its experts one by one or packed, in one file or many, in four formats, under names with or
// without "model.", and a tied embedding as the head. All that is resolved here, for both programs. Every tensor that
// the configuration asks for must be found; what is found besides is named and passed over, as transformers does.
#pragma once

typedef enum { OTHER, FFN_MATRIX, ROUTER_ROWS, ROUTER_CORRECTION, SHARED } RoleKind; // SHARED: of a shared expert
enum { GATE, UP, DOWN };

// What a tensor is, as its name says.
typedef struct {
    RoleKind kind;
    int layer, expert, matrix; // -1: none; a dense layer's FFN is expert 0, a shared expert has no number
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
    int shared = !strncmp(rest, "mlp.shared_expert", 17);
    if (experts || !strncmp(rest, "mlp.", 4)) {
        static const struct {
            const char* end;
            int matrix;
        } ends[] = {{"gate_proj.weight", GATE}, {"w1.weight", GATE},        {"up_proj.weight", UP},
                    {"w3.weight", UP},          {"down_proj.weight", DOWN}, {"w2.weight", DOWN}};
        for (int i = 0; i < 6 && r.matrix < 0; i++)
            if (ends_with(rest, ends[i].end)) r.matrix = ends[i].matrix;
        if (r.matrix >= 0 && !shared) r.expert = experts ? atoi(experts + 9) : 0;
        r.kind = shared ? SHARED : r.matrix >= 0 ? FFN_MATRIX : OTHER;
        if (r.kind != OTHER) return r;
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
    long stored_rows, stored_cols; // grown: so many are stored, and stand again and again, times `scale`; 0: not grown
    float scale;
} View;

// Whether two views hold the same numbers.
static int views_equal(const View* a, const View* b, Error* error) {
    enum { BLOCK = 16384 };
    long n = a->rows * a->cols;
    float x[BLOCK], y[BLOCK];
    for (long i = 0; i < n && n == b->rows * b->cols; i += BLOCK) {
        long count = lmin(BLOCK, n - i);
        if (!safetensors_read(a->files, a->stored, a->first + i, count, x, error) ||
            !safetensors_read(b->files, b->stored, b->first + i, count, y, error) ||
            memcmp(x, y, sizeof(float) * (size_t)count))
            return 0;
    }
    return n == b->rows * b->cols;
}

static StoredTensor* find_named(const SafeTensors* s, const char* name, const char* suffix) {
    char full[160];
    snprintf(full, sizeof full, "%s%s", name, suffix);
    StoredTensor* t = safetensors_find(s, full);
    return t || strncmp(full, "model.", 6) ? t : safetensors_find(s, full + 6);
}

static void shape_to_text(Text* t, int ndim, const long* shape) {
    text_print(t, "[");
    for (int i = 0; i < ndim; i++) text_print(t, "%s%ld", i ? "," : "", shape[i]);
    text_print(t, "]");
}

static void view_set(View* v, const SafeTensors* s, StoredTensor* t, long first, int ndim, const long* shape,
                     const Tensor* wanted, Error* error) {
    int same = t->ndim == ndim;
    for (int i = 0; same && i < ndim; i++) same = t->shape[i] == shape[i];
    if (!same) {
        Text found = {NULL, 0, 0};
        shape_to_text(&found, imin(t->ndim, MOST_DIMS), t->shape);
        text_print(&found, ", config.json makes it ");
        shape_to_text(&found, ndim, shape);
        set_error(error, "tensor %.100s has shape %s", t->name, found.data);
        free(found.data);
    } else if (t->dtype > DTYPE_F64) set_error(error, "tensor %.100s: " READABLE, t->name);
    View view = {s, t, first, wanted->rows, tensor_is_matrix(wanted) ? wanted->cols : 1, 0, 0, 0};
    *v = view;
    t->used = 1;
}

// Packed experts: mlp.experts.gate_up_proj (E, 2 I, H) and down_proj (E, H, I), with or without ".weight".
static void view_packed(View* v, const SafeTensors* s, const Config* c, const Tensor* wanted, const Role* r,
                        const char* suffix, Error* error) {
    int down = r->matrix == DOWN;
    long H = c->hidden_size, I = c->moe_intermediate_size, shape[3] = {c->num_experts, down ? H : 2 * I, down ? I : H};
    for (int form = 0; form < 4 && !v->stored; form++) {
        char name[160];
        snprintf(name, sizeof name, "model.layers.%d.%s.experts.%s%s", r->layer, form & 1 ? "block_sparse_moe" : "mlp",
                 down ? "down_proj" : "gate_up_proj", form & 2 ? ".weight" : "");
        StoredTensor* t = find_named(s, name, suffix);
        long first = r->expert * shape[1] * shape[2] + (r->matrix == UP ? I * H : 0);
        if (t) view_set(v, s, t, first, 3, shape, wanted, error);
    }
}

// Sets the views of all tensors of the layout (layout->count); suffix "": the model, ".exp_avg" or ".exp_avg_sq":
// AdamW's moments, of which those of a balancing bias, which has no gradient, may be absent. 0 and an error if anything
// is missing or of another shape. What is left over is an error among moments or with --strict, and else a note.
static int views_find(View* views, const Config* c, const Layout* layout, SafeTensors* s, const char* suffix,
                      Error* error) {
    NameList missing = {{NULL, 0, 0}, 0}, unused = {{NULL, 0, 0}, 0};
    const View* embedding = NULL;
    memset(views, 0, sizeof(View) * (size_t)layout->count);
    for (int i = 0; i < layout->count && !error->text[0]; i++) {
        const Tensor* wanted = &layout->tensors[i];
        Role r = role_of(wanted->name);
        char name[160];
        int is_embedding = !strcmp(wanted->name, "model.embed_tokens.weight"), matrix = tensor_is_matrix(wanted);
        long shape[2] = {wanted->rows, wanted->cols};
        if (is_embedding) embedding = &views[i];
        StoredTensor* t = find_named(s, wanted->name, suffix);
        if (!t && is_embedding && c->tie_word_embeddings && !*suffix) t = safetensors_find(s, "lm_head.weight");
        if (!t && strstr(wanted->name, "block_sparse_moe.gate.weight")) {       // its name beside packed experts
            snprintf(name, sizeof name, "model.layers.%d.mlp.gate.weight", r.layer);
            t = find_named(s, name, suffix);
        }
        if (t) view_set(&views[i], s, t, 0, matrix ? 2 : 1, shape, wanted, error);
        else if (r.kind == FFN_MATRIX && c->sparse[r.layer]) view_packed(&views[i], s, c, wanted, &r, suffix, error);
        if (views[i].stored || (*suffix && r.kind == ROUTER_CORRECTION)) continue;
        snprintf(name, sizeof name, "%s%s", wanted->name, suffix);
        list_name(&missing, name);
    }
    names_refuse(&missing, "missing tensors", error);
    const char* other = strcmp(suffix, ".exp_avg") ? ".exp_avg" : ".exp_avg_sq";
    for (int i = 0; i < s->num_tensors && !error->text[0]; i++) {
        StoredTensor* t = &s->tensors[i];
        if (t->used || ends_with(t->name, "rotary_emb.inv_freq") || (*suffix && ends_with(t->name, other))) continue;
        if (c->tie_word_embeddings && !*suffix && !strcmp(t->name, "lm_head.weight")) { // redundant: must be the same
            View head = {s, t, 0, t->ndim == 2 ? t->shape[0] : 0, t->ndim == 2 ? t->shape[1] : 0, 0, 0, 0};
            if (!views_equal(&head, embedding, error))
                set_error(error, "lm_head.weight differs from the embedding, but tie_word_embeddings is true; if both "
                          "are meant, set tie_word_embeddings to false in config.json");
        } else list_name(&unused, t->name);
    }
    if (*suffix) names_refuse(&unused, "tensors that do not belong to this model", error);
    else names_note(s, &unused, "tensors that do not belong to this model", error);
    return !error->text[0];
}
