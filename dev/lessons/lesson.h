// lesson.h: what the lessons share: train_moe.c as a library, a sparse layer to play with, bars for the pictures.
#pragma once
#define TRAIN_MOE_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../../train_moe.c"

static float* floats(long n) { return (float*)memset(checked_malloc(sizeof(float) * n), 0, sizeof(float) * n); }
static int* ints(long n) { return (int*)memset(checked_malloc(sizeof(int) * n), 0, sizeof(int) * n); }

// x (n) = std N(0, 1), the stream that `name` and `key` stand for
static void fill_normal(float* x, long n, double std, const char* name, uint64_t key) {
    uint64_t stream = random_key(hash_string(name), key, 0, 0);
    for (long i = 0; i < n; i++) x[i] = (float)(std * random_normal(mix64(stream ^ (uint64_t)i)));
}

static double dot_of(const float* a, const float* b, long n) {
    double sum = 0;
    for (long i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

// || a - b || / || b ||
static double distance(const float* a, const float* b, long n) {
    double sum = 0;
    for (long i = 0; i < n; i++) sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sqrt(sum / dot_of(b, b, n));
}

// What layer_create wants: one sparse layer with E experts of width I, K per token, for N tokens of H numbers; E = 0: a
// dense layer. Gates are divided by their sum.
static Config layer_config(int E, int K, int H, int I, int N) {
    Config c;
    memset(&c, 0, sizeof c);
    c.arch = MIXTRAL;
    c.num_layers = c.num_heads = c.num_kv_heads = 1;
    c.hidden_size = c.head_dim = H;
    c.intermediate_size = c.moe_intermediate_size = I;
    c.num_experts = E;
    c.num_experts_per_tok = E ? K : 0;
    c.norm_topk_prob = 1;
    c.vocab_size = 8;
    c.max_position_embeddings = N;
    c.rope_theta = 1e4;
    c.rms_norm_eps = 1e-6;
    c.sparse[0] = E > 0;
    return c;
}

// A model of that layer alone: experts N(0, 1 / sqrt(inputs)), router N(0, router_std), one sequence of N tokens.
static Model* layer_create(const Config* c, uint64_t seed, double router_std) {
    int N = c->max_position_embeddings, H = c->hidden_size, I = layer_width(c, 0), E = layer_experts(c, 0);
    Model* m = model_create(c, FOR_TRAINING, 1, N, N, NULL);
    LayerWeights* w = &m->weights.layers[0];
    m->batch = 1;
    m->length = N;
    for (int i = 0; i < H; i++) w->ffn_norm[i] = 1;
    fill_normal(w->gate_up, 2L * E * I * H, 1 / sqrt((double)H), "gate_up", seed);
    fill_normal(w->down, (long)E * H * I, 1 / sqrt((double)I), "down", seed);
    if (c->sparse[0]) fill_normal(w->router, (long)E * H, router_std, "router", seed);
    return m;
}

// out (N, H) = the layer's addition to x (N, H):  sum over a token's experts of gate_e f_e(n2(x))
static void layer_forward(Model* m, float* out, const float* x) {
    long n = (long)m->length * m->config.hidden_size;
    memcpy(m->layers[0].x_mid, x, sizeof(float) * n);
    ffn_layer_forward(m, 0, out);
    for (long i = 0; i < n; i++) out[i] -= x[i];
}

// The gradient of 1/2 || out - target ||^2 / || target ||^2, which is returned, is added to the weights' gradients.
static double layer_backward(Model* m, const float* out, const float* target) {
    long n = (long)m->length * m->config.hidden_size;
    double size = dot_of(target, target, n), error = distance(out, target, n);
    for (long i = 0; i < n; i++) m->scratch.dx[i] = (float)((out[i] - target[i]) / size);
    ffn_layer_backward(m, 0, 1);
    return error * error / 2;
}

// x, but 0 where it would be shown as -0.00 with so many digits
static double tidy(double x, int digits) { return fabs(x) < 0.5 * pow(10, -digits) ? 0 : x; }

// A bar of `length` times the sign (of at most `most`): what the pictures are drawn with.
static const char* bar(double length, int most, char sign) {
    static char text[8][128];
    static int turn = 0;
    char* out = text[turn++ % 8];
    int n = (int)(length + 0.5);
    n = imax(0, imin(n, imin(most, 127)));
    memset(out, sign, (size_t)n);
    out[n] = 0;
    return out;
}
