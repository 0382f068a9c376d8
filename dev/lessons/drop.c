/*
Lesson 5. Drop-Upcycling: every expert is the dense FFN with a share r of its units drawn anew. What is left of a unit,
and what does r cost?

A unit u of f(x) = W_down (silu(W_gate x) * W_up x) is row u of W_gate, row u of W_up and column u of W_down. In each
matrix the chosen units are drawn anew from N(mean, std) of what they replace.

    shared        one set of units for the three matrices (the paper)          a share 1 - r stays whole
    per matrix    a set for each matrix (the released code)                    only (1 - r)^3 stays whole

The same holds for any operator on units: shuffling them changes nothing if all three matrices shuffle alike. A scale s
belongs on W_down alone: s^(1/3) on each matrix is not s f, because silu is not linear.
*/
#include "lesson.h"

enum { H = 16, I = 32, N = 256, E = 4, K = 2, RATIOS = 5, DENSE_STEPS = 400, MORE_STEPS = 100 };

static float x[N * H], target[N * H], out[N * H], before[N * H];

// AdamW steps; returns the loss after them.
static double train_layer(Model* m, int steps) {
    AdamW adamw = {0.9, 0.95, 1e-8, 0, 0};
    for (int step = 1; step <= steps; step++) {
        layer_forward(m, out, x);
        layer_backward(m, out, target);
        model_update(m, &adamw, 0.003, step);
    }
    layer_forward(m, out, x);
    return pow(distance(out, target, N * H), 2) / 2;
}

// Draws the marked units of one matrix anew; element i of unit u is w[u unit_step + i step].
static void redraw(float* w, const char* marked, long unit_step, long step, uint64_t key) {
    double n = 0, mean = 0, square = 0;
    for (long j = 0; j < I * H; j++) {
        double v = w[j / H * unit_step + j % H * step];
        if (marked[j / H]) n++, mean += v, square += v * v;
    }
    double std = n > 1 ? sqrt((square - mean * mean / n) / (n - 1)) : 0;
    for (long j = 0; j < I * H; j++)
        if (marked[j / H])
            w[j / H * unit_step + j % H * step] = (float)(mean / n + std * random_normal(mix64(key ^ (uint64_t)j)));
}

// Makes each expert of m of the dense FFN; returns the share of the units that are whole.
static double upcycle(Model* m, const Model* dense, double r, int shared) {
    const LayerWeights *w = &m->weights.layers[0], *from = &dense->weights.layers[0];
    int whole = 0;
    memcpy(w->ffn_norm, from->ffn_norm, sizeof(float) * H);
    for (int e = 0; e < E; e++) {
        float* matrix[3] = {w->gate_up + e * 2 * I * H, w->gate_up + e * 2 * I * H + I * H, w->down + e * H * I};
        char marked[3][I] = {{0}};
        memcpy(matrix[0], from->gate_up, sizeof(float) * 2 * I * H);
        memcpy(matrix[2], from->down, sizeof(float) * H * I);
        for (int i = 0; i < 3; i++) {
            uint64_t key = random_key(5, (uint64_t)e, shared ? 0 : (uint64_t)i, 0);
            for (long j = 0; j < (long)(r * I); j++) marked[i][random_permutation(j, I, key)] = 1;
            redraw(matrix[i], marked[i], i < 2 ? H : 1, i < 2 ? 1 : I, random_key(6, (uint64_t)e, (uint64_t)i, 0));
        }
        for (int u = 0; u < I; u++) whole += !marked[0][u] && !marked[1][u] && !marked[2][u];
    }
    return (double)whole / (E * I);
}

// How far the dense FFN's output is from `scale` times what it was, after its units were shuffled (alike: in all three
// matrices) and its matrices multiplied by `up` (gate, up) and `down`.
static double changed(const Model* dense, int shuffled, int alike, float up, float down, float scale) {
    Model* m = layer_create(&dense->config, 2, 0);
    const LayerWeights *w = &m->weights.layers[0], *from = &dense->weights.layers[0];
    memcpy(m->params, dense->params, sizeof(float) * m->layout.total);
    for (long u = 0; u < I; u++)
        for (long i = 0; i < H; i++) {
            long v = shuffled ? random_permutation(u, I, 7) : u, other = shuffled && !alike ? u : v;
            w->gate_up[u * H + i] = up * from->gate_up[v * H + i];
            w->gate_up[(I + u) * H + i] = up * from->gate_up[(I + v) * H + i];
            w->down[i * I + u] = down * from->down[i * I + other];
        }
    layer_forward(m, out, x);
    for (long i = 0; i < N * H; i++) out[i] /= scale;
    return distance(out, before, N * H);
}

static void print_row(const char* name, const double* values, int digits) {
    printf("%-34s", name);
    for (int i = 0; i < RATIOS; i++) printf("%8.*f%s", digits, values[i], i < RATIOS - 1 ? "" : "\n");
}

int main(void) {
    static const double ratios[RATIOS] = {0, 0.25, 0.5, 0.75, 1};
    Config c = layer_config(0, 0, H, 2 * I, N), d = layer_config(0, 0, H, I, N), e = layer_config(E, K, H, I, N);
    Model *teacher = layer_create(&c, 1, 0), *dense = layer_create(&d, 2, 0);
    double start[2][RATIOS];
    fill_normal(x, N * H, 1, "x", 0);
    layer_forward(teacher, target, x);
    printf("A dense FFN learned to a loss of %.3f; it becomes 4 experts, K = 2\n", train_layer(dense, DENSE_STEPS));
    memcpy(before, out, sizeof before);
    for (int shared = 1; shared >= 0; shared--) {
        double whole[RATIOS], after[RATIOS];
        for (int i = 0; i < RATIOS; i++) {
            Model* m = layer_create(&e, 3, 0.1);
            whole[i] = upcycle(m, dense, ratios[i], shared);
            start[shared][i] = train_layer(m, 0);
            after[i] = train_layer(m, MORE_STEPS);
        }
        print_row(shared ? "\nr, shared indices                 " : "\nr, indices per matrix             ", ratios, 2);
        print_row(shared ? "whole units, expected 1 - r" : "whole units, expected (1 - r)^3", whole, 2);
        print_row("loss before any step", start[shared], 2);
        print_row("loss after 100 steps", after, 2);
    }
    printf("\nThe dense FFN's output is changed, relatively, by\n\n");
    printf("units in another order, the same in gate, up and down     %6.3f\n", changed(dense, 1, 1, 1, 1, 1));
    printf("units in another order, another one in down               %6.3f\n", changed(dense, 1, 0, 1, 1, 1));
    printf("twice down, against twice the output                      %6.3f\n", changed(dense, 0, 1, 1, 2, 2));
    printf("2^(1/3) times all three, against twice the output         %6.3f\n", changed(dense, 0, 1, 1.26f, 1.26f, 2));
    printf("\nLoss before any step against r (# is 0.03)\n\n");
    for (int i = 0; i < RATIOS; i++)
        for (int s = 1; s >= 0; s--)
            printf("r %4.2f %-10s |%s\n", ratios[i], s ? "shared" : "per matrix", bar(start[s][i] / 0.03, 60, '#'));
    return 0;
}
