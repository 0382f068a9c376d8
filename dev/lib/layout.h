// layout.h: the tensors of a model, their Hugging Face names and where their numbers lie. Needs Config, Weights.
#pragma once

// One tensor as a checkpoint knows it: its name there, and where its numbers lie in the block of all parameters.
typedef struct {
    char name[96];
    long offset, rows, cols;    // cols = NO_COLUMNS: a vector of `rows` numbers
} Tensor;
enum { NO_COLUMNS = -1 };

static int tensor_is_matrix(const Tensor* t) { return t->cols != NO_COLUMNS; }
static long tensor_size(const Tensor* t) { return tensor_is_matrix(t) ? t->rows * t->cols : t->rows; }

// All parameters are one block of memory: first the matrices, then the vectors, so that weight decay, which is for
// matrices alone, applies to one range.
typedef struct {
    Tensor* tensors;            // (count), in the order of layout_walk
    int count;
    long matrices, vectors;     // floats in all matrices and in all vectors that were listed
    long first_vector, total;   // where the vectors begin; floats in all parameters
    float* block;               // the parameters' memory, or NULL where only names and sizes are wanted
} Layout;

// The next tensor of the list; returns where it lies in the block.
static float* layout_add(Layout* layout, long rows, long cols, const char* format, ...) {
    long offset = cols != NO_COLUMNS ? layout->matrices : layout->first_vector + layout->vectors;
    if (layout->tensors) {
        Tensor* t = &layout->tensors[layout->count];
        va_list args;
        va_start(args, format);
        vsnprintf(t->name, sizeof t->name, format, args);
        va_end(args);
        t->rows = rows;
        t->cols = cols;
        t->offset = offset;
    }
    layout->count++;
    if (cols != NO_COLUMNS) layout->matrices += rows * cols;
    else layout->vectors += rows;
    return layout->block ? layout->block + offset : NULL;
}

// S, the width of the shared expert of a sparse layer; of layer l
static int shared_expert_width(const Config* c) {
    return c->shared_expert_intermediate_size + c->num_shared_experts * c->moe_intermediate_size;
}
static int shared_width(const Config* c, int l) { return c->sparse[l] ? shared_expert_width(c) : 0; }
static int has_shared_expert(const Config* c) { return c->arch == DOTS1 || c->arch == QWEN2_MOE; }

// The tensors of sigmoid routers and of Latent Prototype Routing.
static void layout_router_variant(Layout* layout, const Config* c, LayerWeights* p, int l,
                                  const char* moe) {
    int H = c->hidden_size, E = c->num_experts, D = c->router.lpr_latent_dim;
    if (c->router.kind == ROUTER_SIGMOID) {
        p->router_bias = layout_add(layout, E, NO_COLUMNS, "model.layers.%d.%s.gate.e_score_correction_bias", l, moe);
        return;
    }
    p->lpr_norm_weight = layout_add(layout, H, NO_COLUMNS, "model.layers.%d.%s.gate.norm.weight", l, moe);
    p->lpr_norm_bias = layout_add(layout, H, NO_COLUMNS, "model.layers.%d.%s.gate.norm.bias", l, moe);
    p->lpr_encoder = layout_add(layout, 2 * D, H, "model.layers.%d.%s.gate.encoder.weight", l, moe);
    p->lpr_encoder_bias = layout_add(layout, 2 * D, NO_COLUMNS, "model.layers.%d.%s.gate.encoder.bias", l, moe);
    p->lpr_prototypes = layout_add(layout, E, D, "model.layers.%d.%s.gate.prototypes", l, moe);
    p->lpr_readout = layout_add(layout, H, D, "model.layers.%d.%s.gate.readout.weight", l, moe);
    p->lpr_readout_bias = layout_add(layout, H, NO_COLUMNS, "model.layers.%d.%s.gate.readout.bias", l, moe);
}

// The shared expert of the classes that have one. Of width 0 it does nothing, but its tensors are expected.
static void layout_shared_expert(Layout* layout, const Config* c, LayerWeights* p, int l) {
    const char* name = c->arch == DOTS1 ? "shared_experts" : "shared_expert";
    long H = c->hidden_size, S = shared_width(c, l);
    p->shared_gate_up = layout_add(layout, S, H, "model.layers.%d.mlp.%s.gate_proj.weight", l, name);
    layout_add(layout, S, H, "model.layers.%d.mlp.%s.up_proj.weight", l, name);
    p->shared_down = layout_add(layout, H, S, "model.layers.%d.mlp.%s.down_proj.weight", l, name);
    if (c->arch == QWEN2_MOE)
        p->shared_gate = layout_add(layout, 1, H, "model.layers.%d.mlp.shared_expert_gate.weight", l);
}

// Lists every tensor of a model under its Hugging Face name and points `w` (if not NULL) at them.
static void layout_walk(Layout* layout, const Config* c, Weights* w) {
    int H = c->hidden_size, HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads, mixtral = c->arch == MIXTRAL;
    const char* moe = mixtral ? "block_sparse_moe" : "mlp";
    float* embedding = layout_add(layout, c->vocab_size, H, "model.embed_tokens.weight");
    for (int l = 0; l < c->num_layers; l++) {
        LayerWeights p;
        memset(&p, 0, sizeof p);
        p.attn_norm = layout_add(layout, H, NO_COLUMNS, "model.layers.%d.input_layernorm.weight", l);
        p.qkv = layout_add(layout, (long)NH * HD, H, "model.layers.%d.self_attn.q_proj.weight", l);
        layout_add(layout, (long)NKV * HD, H, "model.layers.%d.self_attn.k_proj.weight", l);
        layout_add(layout, (long)NKV * HD, H, "model.layers.%d.self_attn.v_proj.weight", l);
        for (int i = 0; c->qkv_bias && i < 3; i++) {
            float* bias = layout_add(layout, (long)(i ? NKV : NH) * HD, NO_COLUMNS,
                                     "model.layers.%d.self_attn.%c_proj.bias", l, "qkv"[i]);
            if (i == 0) p.qkv_bias = bias;
        }
        if (c->qk_norm != QK_NORM_NONE) {
            int row = c->qk_norm == QK_NORM_ROW;
            p.q_norm = layout_add(layout, row ? NH * HD : HD, NO_COLUMNS, "model.layers.%d.self_attn.q_norm.weight", l);
            p.k_norm = layout_add(layout, row ? NKV * HD : HD, NO_COLUMNS,
                                  "model.layers.%d.self_attn.k_norm.weight", l);
        }
        p.attn_out = layout_add(layout, H, (long)NH * HD, "model.layers.%d.self_attn.o_proj.weight", l);
        p.ffn_norm = layout_add(layout, H, NO_COLUMNS, "model.layers.%d.post_attention_layernorm.weight", l);
        int E = layer_experts(c, l), I = layer_width(c, l);
        if (c->sparse[l] && c->router.kind != ROUTER_LPR)
            p.router = layout_add(layout, E, H, "model.layers.%d.%s.gate.weight", l, moe);
        if (c->sparse[l] && (c->router.kind == ROUTER_SIGMOID || c->router.kind == ROUTER_LPR))
            layout_router_variant(layout, c, &p, l, moe);
        if (c->sparse[l] && has_shared_expert(c)) layout_shared_expert(layout, c, &p, l);
        for (int e = 0; e < E; e++) {           // all gates and ups first: the products want (E, 2, I, H)
            char expert[64] = "mlp";
            if (c->sparse[l]) snprintf(expert, sizeof expert, "%s.experts.%d", moe, e);
            float* gate = layout_add(layout, I, H, "model.layers.%d.%s.%s.weight", l, expert,
                                   mixtral && c->sparse[l] ? "w1" : "gate_proj");
            layout_add(layout, I, H, "model.layers.%d.%s.%s.weight", l, expert,
                       mixtral && c->sparse[l] ? "w3" : "up_proj");
            if (e == 0) p.gate_up = gate;
        }
        for (int e = 0; e < E; e++) {
            char expert[64] = "mlp";
            if (c->sparse[l]) snprintf(expert, sizeof expert, "%s.experts.%d", moe, e);
            float* down = layout_add(layout, H, I, "model.layers.%d.%s.%s.weight", l, expert,
                                   mixtral && c->sparse[l] ? "w2" : "down_proj");
            if (e == 0) p.down = down;
        }
        if (w) w->layers[l] = p;
    }
    float* norm = layout_add(layout, H, NO_COLUMNS, "model.norm.weight");
    float* head = c->tie_word_embeddings ? embedding : layout_add(layout, c->vocab_size, H, "lm_head.weight");
    if (w) {
        w->embedding = embedding;
        w->final_norm = norm;
        w->lm_head = head;
    }
}

// The names and sizes are walked through twice: to count, and to fill the list.
static Layout layout_create(const Config* c) {
    Layout layout;
    memset(&layout, 0, sizeof layout);
    layout_walk(&layout, c, NULL);
    layout.tensors = (Tensor*)checked_malloc(sizeof(Tensor) * (size_t)layout.count);
    layout.first_vector = layout.matrices;
    layout.total = layout.matrices + layout.vectors;
    layout.count = 0;
    layout.matrices = layout.vectors = 0;
    layout_walk(&layout, c, NULL);
    return layout;
}

// `block`: memory for layout->total parameters
static void weights_point(Weights* w, const Config* c, const Layout* layout, float* block) {
    Layout again = *layout;
    again.tensors = NULL;
    again.block = block;
    again.matrices = again.vectors = 0;
    w->layers = (LayerWeights*)checked_malloc(sizeof(LayerWeights) * c->num_layers);
    layout_walk(&again, c, w);
}

// Parameters in all, and parameters that one token uses (all but the experts it is not sent to).
static void count_parameters(const Config* c, long* total, long* active) {
    Layout layout;
    memset(&layout, 0, sizeof layout);
    layout_walk(&layout, c, NULL);
    *total = *active = layout.matrices + layout.vectors;
    for (int l = 0; l < c->num_layers; l++)
        *active -= (long)(layer_experts(c, l) - layer_topk(c, l)) * 3 * c->hidden_size * layer_width(c, l);
}

// Floating-point operations of training on one token: 2 for each active parameter forward and 4 backward (the LM head
// counts, looking up an embedding does not), and causal attention over T positions.
static double flops_per_token(const Config* c, int T) {
    long total, active;
    count_parameters(c, &total, &active);
    if (!c->tie_word_embeddings) active -= (long)c->vocab_size * c->hidden_size;
    return 6.0 * active + 6.0 * c->num_layers * c->num_heads * c->head_dim * T;
}

// the largest K of a pass
static int most_topk(const Config* c) {
    return c->topk_limit > c->num_experts_per_tok ? c->topk_limit : c->num_experts_per_tok;
}
