/*
Lesson 3. A router prefers some experts. How fast do three cures balance it?

The router's logits are z = W x, and x_0 = 1 in all tokens: column 0 of W is a preference. Every step brings new tokens.
Load x_e counts the assignments of expert e; MaxVio = (max x - mean x) / mean x, 0 when balanced.

    auxiliary loss    a E sum_e f_e P_e, f_e = x_e / (N K), P_e = mean of p_e; its gradient trains W (here by AdamW):
                      dz_e = a E / N  p_e (f_e - sum_j f_j p_j)        balances P through W, and pulls at the loss
    sign bias         the K largest of s + b are chosen, gates are of s:  b_e += rate sign(mean x - x_e)
    quantile bias     alpha_n = the (K+1)-th largest of s + b of token n; b_e = -(the 1 - K/E quantile over tokens of
                      s_ne - alpha_n): so that a share K/E of the tokens has s_e + b_e above its alpha

Neither bias enters a gate or a gradient. The sign rule's speed is its rate: too small is slow, too large never rests.
*/
#include "lesson.h"

enum { E = 8, K = 2, H = 16, N = 4096, STEPS = 200 };
typedef enum { NOTHING, AUX, SIGN, QUANTILE } Cure;
static const struct {
    const char* name;
    Cure cure;
    double strength;
} cures[] = {
    {"nothing", NOTHING, 0},           {"auxiliary loss, lr 0.003", AUX, 0.003}, {"sign bias, rate 0.001", SIGN, 0.001},
    {"sign bias, rate 0.02", SIGN, 0.02}, {"quantile bias", QUANTILE, 0},
};
enum { CURES = sizeof cures / sizeof *cures };

static float x[N * H], z[N * E], probs[N * E], lse[N], gates[N * K], dz[N * E], bias[E], scores[N * E];
static float W[E * H], dW[E * H], M[E * H], V[E * H];                           // with AdamW's moments
static int experts[N * K], offsets[E + 1], assignment[N * K], row_of[N * K];

static int ascending(const void* a, const void* b) {
    float u = *(const float*)a, v = *(const float*)b;
    return (u > v) - (u < v);
}

// b_e = -(the 1 - K/E quantile over tokens of s_ne - alpha_n); scores (N, E) = s + b are used up
static void quantile_bias(float* b) {
    static float alpha[N], above[E][N];
    for (int n = 0; n < N; n++) {
        int best[K + 1];
        choose_topk(best, scores + n * E, E, K + 1);
        alpha[n] = scores[n * E + best[K]];
        for (int e = 0; e < E; e++) above[e][n] = scores[n * E + e] - b[e] - alpha[n];
    }
    for (int e = 0; e < E; e++) {
        qsort(above[e], N, sizeof(float), ascending);
        b[e] = -above[e][N - N * K / E];
    }
}

// The router as it is at first: preferences from 1 to -1.
static void skew(void) {
    fill_normal(W, E * H, 0.3, "W", 0);
    for (int e = 0; e < E; e++) W[e * H] = 1.0f - 2.0f * (float)e / (E - 1);
    for (int i = 0; i < E * H; i++) bias[i / H] = M[i] = V[i] = 0;
}

// Routes new tokens, then applies the cure. Returns MaxVio before it.
static double step(Cure cure, double strength, int t) {
    long load[E];
    double f[E];
    fill_normal(x, N * H, 1, "x", (uint64_t)t);
    for (int n = 0; n < N; n++) x[n * H] = 1;
    matmul_forward(z, x, W, N, H, E);
    if (cure >= SIGN) sigmoid_router_forward(probs, lse, experts, gates, z, bias, NULL, N, E, K, 1, 1);
    else softmax_router_forward(probs, lse, experts, gates, z, N, E, K, 1);
    group_by_expert(offsets, assignment, row_of, experts, N, K, E);
    for (int e = 0; e < E; e++) f[e] = (double)(load[e] = offsets[e + 1] - offsets[e]) / (N * K);
    if (cure == AUX) {
        memset(dz, 0, sizeof dz);
        balance_backward(dz, lse, probs, f, (double)E / N, 0, N, E);
        matmul_backward_weight(dW, dz, x, N, H, E);
        adamw(W, dW, M, V, E * H, 1, (float)strength, 0, 0.9f, 0.95f, 1e-8f, 1 - powf(0.9f, (float)t + 1),
              1 - powf(0.95f, (float)t + 1));
    }
    if (cure == SIGN) update_router_bias(bias, load, E, strength);
    sigmoid_scores(scores, z, bias, N, E);
    if (cure == QUANTILE) quantile_bias(bias);
    return load_figures(load, E).max_vio;
}

int main(void) {
    static const int shown[] = {0, 1, 2, 5, 10, 20, 50, 100, 200};
    static double violation[CURES][STEPS + 1];
    float last_bias[CURES][E] = {{0}};
    printf("MaxVio of %d tokens in each step, %d experts, K = %d\n\n%-26s", N, E, K, "step");
    for (int i = 0; i < 9; i++) printf("%7d", shown[i]);
    printf("\n");
    for (int c = 0; c < CURES; c++) {
        skew();
        for (int t = 0; t <= STEPS; t++) violation[c][t] = step(cures[c].cure, cures[c].strength, t);
        for (int i = 0; i < E * E; i++) last_bias[c][i / E] += (bias[i / E] - bias[i % E]) / E;    // differences matter
        printf("%-26s", cures[c].name);
        for (int i = 0; i < 9; i++) printf("%7.2f", violation[c][shown[i]]);
        printf("\n");
    }
    printf("\nThe biases they end with, for the experts from the most to the least preferred\n\n");
    for (int c = 2; c < CURES; c++) {
        printf("%-26s", cures[c].name);
        for (int e = 0; e < E; e++) printf("%7.2f", tidy(last_bias[c][e], 2));
        printf("\n");
    }
    // two layers with opposite preferences, f and P of the second those of the first backwards
    double f[E], P[E], each = 0, together = 0;
    skew();
    step(NOTHING, 0, 0);
    sum_columns(P, probs, N, E);
    for (int e = 0; e < E; e++) f[e] = (double)(offsets[e + 1] - offsets[e]) / N;
    for (int e = 0; e < E; e++) each += E * f[e] / K * P[e] / N;
    for (int e = 0; e < E; e++) together += E * (f[e] + f[E - 1 - e]) / 2 * (P[e] + P[E - 1 - e]) / 2 / N;
    printf("\nThe balance loss of two layers with opposite preferences\n\nsum over the layers       %7.2f, balanced 2\n"
           "over all layers' tokens   %7.2f, balanced 2 (K): the layers cancel each other\n", 2 * each, together);
    printf("\nMaxVio, a row of 25 steps each: # is 0.05\n");
    for (int c = 0; c < CURES; c++)
        for (int t = 0; t <= STEPS; t += 25)
            printf("%-26s %3d |%s\n", t ? "" : cures[c].name, t, bar(violation[c][t] / 0.05, 60, '#'));
    return 0;
}
