// memory.cuh: where a model's arrays lie on a GPU: GpuLayer and GpuModel, how much memory they take (gpu_plan), taking
// it (gpu_allocate), giving it back (gpu_release). Needs Model and Arena of the CPU's model, and sections 3 to 7 of
// train_moe.cu.
#pragma once

// What a layer keeps for the backward pass: train_moe.c's arrays (NULL where a layer has none: for kernels that is
// ones, or rows in their order), and
template <class Real> struct GpuLayer {
    LAYER_ARRAYS(MEMBER)
    int* token;                     // (R)          where the rows of experts come from, and
    int2* tiles;                    // what blocks do with them, see gpu_group_by_expert
    int* shared_offsets;            // the same for the shared expert, all of whose N rows are one group
    int2* shared_tiles;
    Real* experts_in;               // (N, H)       what the experts read: ffn_in, or LPR's sum
    LprLayer lpr;
};

template <class Real> struct GpuModel {
    cublasHandle_t cublas;
    void* cublas_workspace;
    float *params, *grads, *exp_avg, *exp_avg_sq;       // (layout.total)
    Real* copy;                     // (layout.total) the parameters as products read them; with float: params
    Weights w, dw;                  // pointers into params and grads
    GpuLayer<Real>* layers;         // (L), on the host
    Real *final_in, *final_out, *logits;
    float *final_rstd, *losses, *cosines, *sines;
    Real *cache_k, *cache_v;        // (L, positions, NKV HD)
    int *tokens, *targets;          // (N)
    int *unique, *starts, *positions, num_unique;       // the tokens in groups, see gpu_embedding_backward
    // These five are one array here, and twice on the host, which fills the two in turn: `staged` tells when the copy
    // from one of them is done. counts (V) is for group_tokens.
    int *staging[2], *counts, turn;
    cudaEvent_t staged[2];
    // scratch
    Real *act, *rows, *projected, *dx, *dnormed, *dattn, *dqkv, *drotated;
    float *attention_d, *dgate_parts, *dgates, *drouter, *extra, *norm_parts, *k_norm_parts, *product_parts, *shift;
    int* chunk_counts;
    double *balance, *balance_parts, *bias_parts, *norm_sums, *all_counts, *all_probs;
    float* norm;                    // of the gradients
    // Sums since they were last read, one array: losses as in Losses (4 doubles), assignments (L, E) in all and in this
    // step (long long), then (L) Observed, and quantile balancing's cutoffs (L, E)
    double* losses_sum;
    long long *load, *step_load;
    double *observed, *cutoffs;
    void* sums_host;                // room for them on the host
    int* family;                    // (L, E)
    float* lpr_scratch;
    int loss_pending;               // 1: the last forward pass's loss has not been taken yet
    int fresh;                      // 1: gradients are to be overwritten, not added to
    void* memory;
    size_t bytes, sums_bytes;
};

// floats for partial results of products whose sum over k is split, see gpu_matmul_fp32
#define PRODUCT_PARTS (1L << 21)
// what NVIDIA recommends for Hopper; other cards need less
#define CUBLAS_WORKSPACE (32L << 20)
#define KERNELS_MEMORY (256L << 20) // left for kernels, which the driver loads when they are first used
#define MOST_GRID 65535         // blocks in the second and third dimension of a grid

template <class Real> static GpuModel<Real>* gpu_of(const Model* m) { return (GpuModel<Real>*)m->device; }

template <class Real> static Real* take_reals(Arena* a, long n) { return (Real*)take(a, sizeof(Real) * (size_t)n); }
static int* take_ints(Arena* a, long n) { return (int*)take(a, sizeof(int) * (size_t)n); }
static double* take_doubles(Arena* a, long n) { return (double*)take(a, sizeof(double) * (size_t)n); }

// Rows of logits lie this far apart: at multiples of 16 bytes, which cuBLAS wants for its fastest products.
static int logits_row(int V) { return (V + 7) / 8 * 8; }

static int most_tiles(long rows, int E) { return (int)(rows / GROUP_ROWS) + E; }

template <class Real> static void gpu_take_layer(Arena* a, GpuLayer<Real>* s, const Model* m, int l) {
    const Config* c = &m->config;
    long B = m->B, T = m->T, N = B * T, H = c->hidden_size, HD = c->head_dim, NH = c->num_heads;
    long NKV = c->num_kv_heads, E = layer_experts(c, l), sparse = c->sparse[l], K = sparse ? most_topk(c) : 1;
    long shared = shared_width(c, l) > 0, gated = shared && c->arch == QWEN2_MOE, training = m->purpose == FOR_TRAINING;
    long R = N * K, I = training * layer_width(c, l), S = training * shared_width(c, l), D = c->router.lpr_latent_dim;
    long lpr = 0;                   // its arrays are others than the CPU's, see below
    LAYER_ARRAYS(TAKE)
    if (c->router.logit_norm <= 0) s->router_raw = s->router_logits;
    s->token = take_ints(a, sparse * R);
    s->tiles = (int2*)take(a, sizeof(int2) * (size_t)most_tiles(R, (int)E));
    s->shared_offsets = take_ints(a, 2 * shared);
    s->shared_tiles = (int2*)take(a, sizeof(int2) * (size_t)(shared * most_tiles(N, 1)));
    s->experts_in = s->ffn_in;
    if (sparse && c->router.kind == ROUTER_LPR) {
        s->experts_in = take_reals<Real>(a, N * H);
        s->lpr.encoded = take_floats(a, N * 2 * D);
        s->lpr.read_out = take_floats(a, N * D);
        s->lpr.targets = take_floats(a, E * D);
        s->lpr.grams = take_floats(a, 2 * D * D);
    }
}

// Hands out the memory of the GPU, or counts it; see Arena.
template <class Real> static void gpu_take(Model* m, Arena* a) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    const Config* c = &m->config;
    long H = c->hidden_size, HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads, V = c->vocab_size;
    long N = (long)m->B * m->T, E = c->num_experts > 0 ? c->num_experts : 1, L = c->num_layers, total = m->layout.total;
    long K = 1, R = 0, RI = 0, chunks = 0, parts = 0;
    int training = m->purpose == FOR_TRAINING, typed = sizeof(Real) != sizeof(float);
    g->cublas_workspace = take(a, CUBLAS_WORKSPACE);     // at the start, which is aligned to 256 bytes
    size_t start = a->used;
    if (m->owner) {
        g->params = gpu_of<Real>(m->owner)->params;
        g->copy = gpu_of<Real>(m->owner)->copy;
    } else {
        g->params = take_floats(a, total);
        g->copy = typed ? take_reals<Real>(a, total) : (Real*)g->params;
    }
    m->bytes_params = a->used - start;
    start = a->used;
    if (training) {
        g->grads = take_floats(a, total);
        g->exp_avg = take_floats(a, total);
        g->exp_avg_sq = take_floats(a, total);
    }
    m->bytes_optimizer = a->used - start;
    size_t layers_start = a->used, layers_end = a->used;
    for (int l = 0; l < L; l++) {
        if (!training) a->used = layers_start;          // layers write over each other
        gpu_take_layer(a, &g->layers[l], m, l);
        if (a->used > layers_end) layers_end = a->used;
        long k = c->sparse[l] ? most_topk(c) : 1, I = layer_width(c, l);
        if (k > K) K = k;
        if (N * k > R) R = N * k;
        if (N * k * I > RI) RI = N * k * I;
        long S = shared_width(c, l);
        if (N * S > RI) RI = N * S;
        if (N * gpu_dgate_parts<Real>((int)S) > parts) parts = N * gpu_dgate_parts<Real>((int)S);
        if (gpu_group_chunks(N, k) * (long)layer_experts(c, l) > chunks)
            chunks = gpu_group_chunks(N, k) * (long)layer_experts(c, l);
        if (N * k * gpu_dgate_parts<Real>((int)I) > parts) parts = N * k * gpu_dgate_parts<Real>((int)I);
    }
    a->used = layers_end;
    g->final_in = training ? take_reals<Real>(a, N * H) : g->layers[0].x;
    g->final_out = take_reals<Real>(a, N * H);
    g->final_rstd = take_floats(a, N);
    g->logits = take_reals<Real>(a, (m->purpose == FOR_GENERATION ? 1 : N) * logits_row((int)V));
    g->losses = take_floats(a, N);
    g->cosines = take_floats(a, (long)m->positions * (HD / 2));
    g->sines = take_floats(a, (long)m->positions * (HD / 2));
    if (m->purpose == FOR_GENERATION) {
        g->cache_k = take_reals<Real>(a, L * m->positions * NKV * HD);
        g->cache_v = take_reals<Real>(a, L * m->positions * NKV * HD);
    }
    g->tokens = take_ints(a, 5 * N + 1);
    g->targets = g->tokens + N;
    g->unique = g->tokens + 2 * N;
    g->starts = g->tokens + 3 * N;
    g->positions = g->tokens + 4 * N + 1;
    g->act = take_reals<Real>(a, RI);
    g->rows = take_reals<Real>(a, R * H);
    g->projected = take_reals<Real>(a, N * H);
    g->chunk_counts = take_ints(a, chunks);
    g->balance_parts = take_doubles(a, gpu_balance_parts(E));
    g->all_counts = take_doubles(a, E);
    g->all_probs = take_doubles(a, E);
    g->product_parts = take_floats(a, PRODUCT_PARTS);
    g->norm = take_floats(a, 1);
    g->sums_bytes = sizeof(double) * (size_t)(4 + 3 * L * E + L * OBSERVED_NUMBERS);
    g->losses_sum = (double*)take(a, g->sums_bytes);
    g->load = (long long*)(g->losses_sum + 4);
    g->step_load = g->load + L * E;
    g->observed = (double*)(g->step_load + L * E);
    g->cutoffs = g->observed + L * OBSERVED_NUMBERS;
    g->family = take_ints(a, L * E);
    if (c->router.family_penalty > 0) g->shift = take_floats(a, N * E);
    if (c->router.kind == ROUTER_LPR)
        g->lpr_scratch = take_floats(a, gpu_lpr_scratch(N, H, E, c->router.lpr_latent_dim));
    if (training) {
        g->dx = take_reals<Real>(a, N * H);
        g->dnormed = take_reals<Real>(a, N * H);
        g->dattn = take_reals<Real>(a, N * NH * HD);
        g->dqkv = take_reals<Real>(a, N * qkv_width(c));
        g->drotated = take_reals<Real>(a, N * (NH + NKV) * HD);
        g->attention_d = take_floats(a, N * NH);
        g->dgate_parts = take_floats(a, parts);
        g->dgates = take_floats(a, N * K);
        g->drouter = take_floats(a, N * E);
        g->extra = take_floats(a, N * H);
        g->norm_parts = take_floats(a, (long)gpu_norm_parts((int)N) * (H > NH * HD ? H : NH * HD));
        g->k_norm_parts = take_floats(a, (long)gpu_norm_parts((int)N) * NKV * HD);
        g->balance = take_doubles(a, E);
        if (c->qkv_bias) g->bias_parts = take_doubles(a, (long)SLICES * qkv_width(c));
        g->norm_sums = take_doubles(a, GRADIENT_NORM_PARTS);
    }
    g->bytes = a->used;
    m->bytes_activations = g->bytes - m->bytes_params - m->bytes_optimizer;
}

// What the host has: the state of every model, and what read_back brings. Memory that is never touched costs nothing.
template <class Real> static void gpu_take_host(Model* m, Arena* a) {
    const Config* c = &m->config;
    long N = (long)m->B * m->T;
    take_state(m, a);
    for (int l = 0; l < c->num_layers; l++) {
        if (!c->sparse[l]) continue;
        m->layers[l].experts = take_ints(a, N * most_topk(c));
        m->layers[l].gates = take_floats(a, N * most_topk(c));
    }
    gpu_of<Real>(m)->sums_host = take(a, gpu_of<Real>(m)->sums_bytes);
}

// Starts the sums over forward passes from zero.
template <class Real> static void gpu_clear_sums(Model* m) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    CHECK(cudaMemsetAsync(g->losses_sum, 0, g->sums_bytes));
}

template <class Real> static void gpu_plan(Model* m) {
    const Config* c = &m->config;
    if (c->head_dim > gpu_attention_max_head_dim())
        die(2, "head size %d: the GPU's attention goes up to %d; train_moe, on the CPU, has no limit", c->head_dim,
            gpu_attention_max_head_dim());
    if (c->num_experts > MOST_GRID || m->B > MOST_GRID)
        die(2, "%s: on a GPU at most %d", c->num_experts > MOST_GRID ? "--experts" : "--batch", MOST_GRID);
    int dynamic = c->router.kind == ROUTER_DYNAMIC;
    if (c->router.skip_below > 0 || c->router.fixed || dynamic)
        die(2, "--%s: on the CPU alone, in train_moe",
            dynamic ? "router dynamic" : c->router.fixed ? "fixed-router" : "skip-below");
    int device, most;       // a block of gpu_combine_rmsnorm_backward keeps two rows of floats in shared memory
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (m->purpose == FOR_TRAINING && c->hidden_size > (most - 1024) / 8)
        die(2, "--hidden %d: this GPU has %d KB of shared memory, enough to train with %d", c->hidden_size, most >> 10,
            (most - 1024) / 8);
    Arena host = {NULL, 0}, gpu = {NULL, 0};
    GpuModel<Real>* g = (GpuModel<Real>*)checked_malloc(sizeof(GpuModel<Real>));
    memset(g, 0, sizeof *g);
    m->device = g;
    g->layers = (GpuLayer<Real>*)checked_malloc(sizeof(GpuLayer<Real>) * (size_t)c->num_layers);
    memset(g->layers, 0, sizeof(GpuLayer<Real>) * (size_t)c->num_layers);
    gpu_take<Real>(m, &gpu);
    size_t params = m->bytes_params, optimizer = m->bytes_optimizer;
    gpu_take_host<Real>(m, &host);
    m->bytes = host.used;
    m->bytes_params = params;       // what is printed is the GPU's memory
    m->bytes_optimizer = optimizer;
}

template <class Real> static void gpu_allocate(Model* m) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    const Config* c = &m->config;
    Arena host = {NULL, 0}, gpu = {NULL, 0};
    m->memory = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m->memory == MAP_FAILED) die(1, "out of memory: %zu bytes wanted", m->bytes);
    host.base = (char*)m->memory;
    gpu_take_host<Real>(m, &host);
    CHECK_CUBLAS(cublasCreate(&g->cublas));             // takes memory of its own
    size_t available = 0, in_all = 0;
    CHECK(cudaMemGetInfo(&available, &in_all));
    if (g->bytes + KERNELS_MEMORY > available || cudaMalloc(&g->memory, g->bytes) != cudaSuccess)
        die(1, "out of GPU memory: this model and batch need %.1f MB, %.1f MB are free; try a smaller --batch or --seq",
            g->bytes / 1e6, available / 1e6);
    gpu.base = (char*)g->memory;
    gpu_take<Real>(m, &gpu);
    if (m->purpose != FOR_TRAINING) {       // as in cpu_allocate
        ASAN_UNPOISON_MEMORY_REGION(g->memory, g->bytes);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(cudaMallocHost((void**)&g->staging[i], sizeof(int) * (5 * (size_t)m->B * m->T + 1)));
        CHECK(cudaEventCreateWithFlags(&g->staged[i], cudaEventDisableTiming));
    }
    g->counts = (int*)checked_malloc(sizeof(int) * ((size_t)c->vocab_size + 1));
    g->fresh = 1;
    weights_point(&g->w, c, &m->layout, g->params);
    if (g->grads) {
        weights_point(&g->dw, c, &m->layout, g->grads);
        CHECK(cudaMemset(g->grads, 0, sizeof(float) * (size_t)m->layout.total));   // not all have a gradient
        CHECK(cudaMemset(g->exp_avg, 0, sizeof(float) * (size_t)m->layout.total));
        CHECK(cudaMemset(g->exp_avg_sq, 0, sizeof(float) * (size_t)m->layout.total));
    }
    gpu_clear_sums<Real>(m);
    CHECK_CUBLAS(cublasSetWorkspace(g->cublas, g->cublas_workspace, CUBLAS_WORKSPACE));
    CHECK_CUBLAS(cublasSetMathMode(g->cublas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    // the rotary table, which model_allocate makes in the host's memory
    rope_table(m->cosines, m->sines, m->positions, c);
    size_t table = sizeof(float) * (size_t)m->positions * (size_t)(c->head_dim / 2);
    CHECK(cudaMemcpy(g->cosines, m->cosines, table, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(g->sines, m->sines, table, cudaMemcpyHostToDevice));
}

template <class Real> static void gpu_release(Model* m) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    CHECK(cudaDeviceSynchronize());
    if (g->cublas) CHECK_CUBLAS(cublasDestroy(g->cublas));
    for (int i = 0; i < 2 && g->staging[i]; i++) {
        CHECK(cudaFreeHost(g->staging[i]));
        CHECK(cudaEventDestroy(g->staged[i]));
    }
    CHECK(cudaFree(g->memory));
    free(g->w.layers);
    free(g->dw.layers);
    free(g->counts);
    free(g->layers);
    free(g);
    ASAN_UNPOISON_MEMORY_REGION(m->memory, m->bytes);
    munmap(m->memory, m->bytes);
}

// What gpu_lpr_forward and gpu_lpr_backward want to know of a layer.
template <class Real> static LprLayer lpr_layer(const Model* m, int l) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    const GpuLayer<Real>* s = &g->layers[l];
    const Config* c = &m->config;
    LprLayer r = s->lpr;            // encoded, read_out, targets, grams
    for (int d = 0; d < (g->dw.layers ? 2 : 1); d++) {
        const LayerWeights* w = d ? &g->dw.layers[l] : &g->w.layers[l];
        LprWeights* to = d ? &r.d : &r.w;
        to->norm_weight = w->lpr_norm_weight;
        to->norm_bias = w->lpr_norm_bias;
        to->encoder = w->lpr_encoder;
        to->encoder_bias = w->lpr_encoder_bias;
        to->prototypes = w->lpr_prototypes;
        to->readout = w->lpr_readout;
        to->readout_bias = w->lpr_readout_bias;
    }
    r.N = m->batch * m->length;
    r.H = c->hidden_size;
    r.E = c->num_experts;
    r.K = m->topk[l];
    r.D = c->router.lpr_latent_dim;
    r.weight = c->router.lpr_weight;
    r.diversity = c->router.lpr_diversity;
    r.kl = c->router.lpr_kl;
    r.align = c->router.lpr_align;
    r.align_mean = c->router.lpr_align_mean;
    r.z = s->router_logits;
    r.lse = s->router_lse;
    r.probs = s->probs;
    r.gates = s->gates;
    r.experts = s->experts;
    r.scratch = g->lpr_scratch;
    r.parts = g->product_parts;
    r.parts_floats = PRODUCT_PARTS;
    return r;
}
