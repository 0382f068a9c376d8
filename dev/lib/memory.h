// memory.h: a model's memory, counted and taken once: model_create, model_free. Needs layout.h
// and json_free of json.h, which comes later.
#pragma once

#define TAKE(type, name, count) s->name = (type*)take(a, sizeof(type) * (size_t)(count));

static void layer_activations_take(Arena* a, LayerActivations* s, const Config* c, int l, long N, long B, long T) {
    long H = c->hidden_size, HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads, sparse = c->sparse[l];
    long E = layer_experts(c, l), K = sparse ? most_topk(c) : 1, R = N * K, I = layer_width(c, l);
    long D = c->router.lpr_latent_dim, lpr = sparse && c->router.kind == ROUTER_LPR;
    long S = shared_width(c, l), gated = S > 0 && c->arch == QWEN2_MOE;
    LAYER_ARRAYS(TAKE)
}

// What a model has on the host whichever backend computes it.
static void take_state(Model* m, Arena* a) {
    const Config* c = &m->config;
    long N = (long)m->B * m->T, E = c->num_experts > 0 ? c->num_experts : 1;
    size_t start = a->used;
    if (!m->owner) m->params = take_floats(a, m->layout.total);
    m->bytes_params = a->used - start;
    start = a->used;
    if (m->purpose == FOR_TRAINING) {
        m->grads = take_floats(a, m->layout.total);
        m->exp_avg = take_floats(a, m->layout.total);
        m->exp_avg_sq = take_floats(a, m->layout.total);
    }
    m->bytes_optimizer = a->used - start;
    m->logits = take_floats(a, (m->purpose == FOR_GENERATION ? 1 : N) * c->vocab_size);
    m->cosines = take_floats(a, (long)m->positions * (c->head_dim / 2));
    m->sines = take_floats(a, (long)m->positions * (c->head_dim / 2));
    m->tokens = (int*)take(a, sizeof(int) * N);
    m->targets = (int*)take(a, sizeof(int) * N);
    m->load = (long*)take(a, sizeof(long) * c->num_layers * E);
    m->step_load = (long*)take(a, sizeof(long) * c->num_layers * E);
    m->last_load = (long*)take(a, sizeof(long) * c->num_layers * E);
    m->cutoffs = (double*)take(a, sizeof(double) * c->num_layers * E);
    m->observed = (Observed*)take(a, sizeof(Observed) * c->num_layers);
    m->topk = (int*)take(a, sizeof(int) * c->num_layers);
    m->aux_coefficients = (double*)take(a, sizeof(double) * c->num_layers);
    m->family = (int*)take(a, sizeof(int) * c->num_layers * E);
}

// What the CPU's functions write and read besides.
static void take_activations(Model* m, Arena* a) {
    const Config* c = &m->config;
    long H = c->hidden_size, HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads, D = c->router.lpr_latent_dim;
    long N = (long)m->B * m->T, E = c->num_experts > 0 ? c->num_experts : 1, K = 1, RI = 0, R = 0;
    int training = m->purpose == FOR_TRAINING, lpr = c->router.kind == ROUTER_LPR;
    size_t layers_start = a->used, layers_end = a->used;
    for (int l = 0; l < c->num_layers; l++) {
        if (!training) a->used = layers_start;      // layers write over each other
        layer_activations_take(a, &m->layers[l], c, l, N, m->B, m->T);
        if (a->used > layers_end) layers_end = a->used;
        long rows = N * (c->sparse[l] ? most_topk(c) : 1);
        if (rows > R) R = rows;
        if (rows * layer_width(c, l) > RI) RI = rows * layer_width(c, l);
        if (N * shared_width(c, l) > RI) RI = N * shared_width(c, l);
        if (c->sparse[l]) K = most_topk(c);
    }
    a->used = layers_end;
    Scratch* s = &m->scratch;
    SCRATCH_ARRAYS(TAKE)
    s->dy_rows = s->dx_rows = s->y_rows;        // each is used up before the next is written
    s->gated_act = s->act;
    m->final_in = training ? take_floats(a, N * H) : m->layers[0].x;
    m->final_out = take_floats(a, N * H);
    m->final_rstd = take_floats(a, N);
    m->losses = take_floats(a, N);
    m->losses_lse = take_floats(a, N);
    if (m->purpose == FOR_GENERATION) {
        m->cache_k = take_floats(a, (long)c->num_layers * m->positions * NKV * HD);
        m->cache_v = take_floats(a, (long)c->num_layers * m->positions * NKV * HD);
    }
    m->ones = take_floats(a, N);
    m->identity = (int*)take(a, sizeof(int) * N);
    m->all_counts = (double*)take(a, sizeof(double) * E);
    m->all_probs = (double*)take(a, sizeof(double) * E);
}

static void model_take(Model* m, Arena* a) {
    take_state(m, a);
    take_activations(m, a);
    m->bytes = a->used;
    m->bytes_activations = m->bytes - m->bytes_params - m->bytes_optimizer;
}

// Counts what model_take will take.
static void cpu_plan(Model* m) {
    Arena arena = {NULL, 0};
    model_take(m, &arena);
}

static void cpu_allocate(Model* m) {
    Arena arena = {NULL, 0};
    if (posix_memalign(&m->memory, 1 << 21, m->bytes))
        die(1, "out of memory: this model and batch need %.1f MB; try a smaller --batch or --seq", m->bytes / 1e6);
#ifdef MADV_HUGEPAGE
    madvise(m->memory, m->bytes, MADV_HUGEPAGE);        // pages of 2 MB: fewer misses of their table
#endif
    memset(m->memory, 0, m->bytes);
    arena.base = (char*)m->memory;
    model_take(m, &arena);
    if (m->purpose != FOR_TRAINING) {       // layers lie over each other, and one's gaps in another's arrays
        ASAN_UNPOISON_MEMORY_REGION(m->memory, m->bytes);
    }
    for (int n = 0; n < m->B * m->T; n++) {
        m->ones[n] = 1;
        m->identity[n] = n;
    }
    for (int l = 0; l < m->config.num_layers; l++)
        if (!m->config.sparse[l]) {
            m->layers[l].gates = m->ones;
            m->layers[l].assignment = m->layers[l].row_of = m->identity;
        } else if (m->config.arch == DOTS1) m->layers[l].shared_gates = m->ones;
}

static void cpu_release(Model* m) { free(m->memory); }

static void cpu_copy(Model* m, int what) { (void)m, (void)what; }       // there are no copies

static const Backend cpu_backend = {cpu_plan, cpu_allocate, cpu_release, NULL, NULL, NULL, cpu_copy, cpu_copy};
static const Backend* default_backend = &cpu_backend;       // of new models

// A model for batches of up to B sequences of T tokens, whose memory is counted (Model.bytes) but not yet allocated.
// For generation T is the largest number of tokens in one forward pass and `positions` the cache's capacity; otherwise
// positions = T. With an owner the new model uses the owner's parameters; without, they are to be set by model_init or
// checkpoint_load.
static Model* model_plan(const Config* c, Purpose purpose, int B, int T, int positions, const Model* owner) {
    Model* m = (Model*)checked_malloc(sizeof(Model));
    memset(m, 0, sizeof *m);
    m->config = *c;
    m->purpose = purpose;
    m->B = B;
    m->T = T;
    m->positions = positions;
    m->owner = owner;
    m->params = owner ? owner->params : NULL;
    m->layout = layout_create(c);
    m->layers = (LayerActivations*)checked_malloc(sizeof(LayerActivations) * c->num_layers);
    memset(m->layers, 0, sizeof(LayerActivations) * c->num_layers);
    m->backend = default_backend;
    m->backend->plan(m);
    return m;
}

// cos and sin of position * w_i, w_i = theta^(-2 i / HD) and a factor 1 unless rope.h says otherwise; both
// (positions, HD / 2)
static void rope_table(float* cosines, float* sines, int positions, const Config* c) {
    int half = c->head_dim / 2;
    double* w = (double*)checked_malloc(sizeof(double) * half);
    double factor = rope_frequencies(w, &c->rope, c->head_dim, c->rope_theta);
    #pragma omp parallel for
    for (int t = 0; t < positions; t++)
        for (int i = 0; i < half; i++) {
            cosines[(long)t * half + i] = (float)(factor * cos(t * w[i]));
            sines[(long)t * half + i] = (float)(factor * sin(t * w[i]));
        }
    free(w);
}

// Gives a planned model its memory.
static void model_allocate(Model* m) {
    const Config* c = &m->config;
    m->backend->allocate(m);
    weights_point(&m->weights, c, &m->layout, m->params);
    if (m->grads) weights_point(&m->dweights, c, &m->layout, m->grads);
    rope_table(m->cosines, m->sines, m->positions, c);
    for (int l = 0; l < c->num_layers; l++) m->topk[l] = layer_topk(c, l);
}

static Model* model_create(const Config* c, Purpose purpose, int B, int T, int positions, const Model* owner) {
    Model* m = model_plan(c, purpose, B, T, positions, owner);
    model_allocate(m);
    return m;
}

static void json_free(struct Json* j);      // in json.h

static void model_free(Model* m) {
    json_free(m->luggage);
    free(m->weights.layers);
    free(m->dweights.layers);
    free(m->layout.tensors);
    free(m->layers);
    m->backend->release(m);
    free(m);
}
