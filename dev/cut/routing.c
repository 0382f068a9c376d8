/*
routing.c: the softmax top-K router of a mixture of experts in fp32, and its tokens grouped by expert.

    cc -O3 -march=native -fopenmp routing.c -o routing -lm && ./routing && ./routing --bench

(Without -march=native it runs on other machines of the same kind; without -fopenmp on one core. Not with -ffast-math or
-Ofast, which break the exponential.) A C compiler is needed, and nothing else.

    softmax_router_forward    probs = softmax(logits); the K best experts of each token and their gates
    group_by_expert           sorts the N K assignments by expert, stably, unpadded, none dropped
    gather_rows               the experts' input: row r is that of the token that it serves
    combine_rows              out_n = residual_n + sum over the token's K rows of gate y_row; and gather_rows' backward
    softmax_router_backward   dlogits from the gradient of the gates
    balance_backward          adds the gradients of the balance loss and the z-loss to dlogits

Shapes     logits, probs, dlogits (N, E); lse (N); experts (N, K), best first, of equals the lowest index first; gates,
           dgates (N, K), gates divided by their sum if norm_topk. 1 <= K <= E, any sizes. x, out, residual (N, H); y (N
           K, H) by rows.
Grouping   offsets (E + 1): rows offsets[e] .. offsets[e+1]-1 belong to expert e. assignment (N K): row r serves
           assignment n K + k, the k-th expert of token n. row_of (N, K): the inverse. An expert -1 in `experts` has no
           row.
Losses     balance loss (arXiv 2101.03961, eq. 4): aux_weight = coefficient E / N, f_e = count_e / (N K); z-loss (arXiv
           2202.08906, eq. 5): z_weight = 2 coefficient / N.
Results    A token's experts depend on its own row of logits alone. The bits do not depend on the number of threads.
Before     the router's product. After grouping: gather_rows, the experts' products (products.c), combine_rows.

Cut out of the mixture-of-experts trainer train_moe.c, whose comments it keeps. The test compares with plain loops in
doubles.
*/
#include "before.h"

// cut: softmax_router_forward softmax_router_backward balance_backward group_by_expert gather_rows combine_rows

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the functions are used

#include "test.h"

static int* integers(long n) { return (int*)numbers(n, 0); }

// steps: logits are multiples of 1 / steps, so that many are equal; 0: they are not
static void test(int N, int E, int K, int H, int norm_topk, int steps) {
    int R = N * K, *experts = integers(R), *offsets = integers(E + 1), *assignment = integers(R), *row_of = integers(R);
    float *z = numbers((long)N * E, 3), *probs = numbers((long)N * E, 0), *lse = numbers(N, 0), *gates = numbers(R, 0);
    float *dgates = numbers(R, 1), *dz = numbers((long)N * E, 0), *x = numbers((long)N * H, 1);
    float *rows = numbers((long)R * H, 0), *out = numbers((long)N * H, 0);
    double *p = (double*)malloc(sizeof(double) * (size_t)E), *f = (double*)malloc(sizeof(double) * (size_t)E);
    if (!p || !f) exit(1);
    for (long i = 0; i < (long)N * E && steps; i++) z[i] = roundf(z[i] * (float)steps) / (float)steps;

    softmax_router_forward(probs, lse, experts, gates, z, N, E, K, norm_topk);
    int right = 1;
    for (int n = 0; n < N; n++) {
        double sum = 0, chosen = 0;
        for (int e = 0; e < E; e++) sum += exp((double)z[n * E + e]);
        for (int e = 0; e < E; e++) compare(probs[n * E + e], exp((double)z[n * E + e]) / sum, probs[n * E + e]);
        compare(lse[n], log(sum), 3);
        for (int k = 0; k < K; k++) {               // as many are better as come before
            int e = experts[n * K + k], better = 0;
            for (int i = 0; i < E; i++)
                better += z[n * E + i] > z[n * E + e] || (z[n * E + i] == z[n * E + e] && i < e);
            right &= better == k;
            chosen += exp((double)z[n * E + e]) / sum;
        }
        for (int k = 0; k < K; k++) {
            double gate = exp((double)z[n * E + experts[n * K + k]]) / sum / (norm_topk ? chosen : 1);
            compare(gates[n * K + k], gate, gate);
        }
    }
    check_compared("probs, lse, gates");
    check(right, "experts");

    group_by_expert(offsets, assignment, row_of, experts, N, K, E);
    int r = 0;
    right = offsets[0] == 0;
    for (int e = 0; e < E; e++) {
        for (int a = 0; a < R; a++)
            if (experts[a] == e) {
                right &= assignment[r] == a && row_of[a] == r;
                r++;
            }
        right &= offsets[e + 1] == r;
    }
    check(right && r == R, "grouping");
    gather_rows(rows, x, assignment, R, K, H);
    combine_rows(out, x, rows, gates, row_of, N, K, H);
    for (int n = 0; n < N; n++)
        for (int i = 0; i < H; i++) {               // a token's rows are its own
            double sum = 1, terms = 1;
            for (int k = 0; k < K; k++) sum += gates[n * K + k], terms += fabs(gates[n * K + k]);
            compare(out[n * H + i], sum * x[n * H + i], terms * fabs(x[n * H + i]));
        }
    check_compared("gathered and combined");

    // The gradient, by the derivative of each gate with respect to each logit:
    //     dp_i/dz_e = p_i ([i = e] - p_e),  and of a quotient where gates are divided by their sum
    double aux_weight = 0.3, z_weight = 0.2;
    for (int e = 0; e < E; e++) f[e] = (offsets[e + 1] - offsets[e]) / ((double)N * K);
    softmax_router_backward(dz, dgates, probs, experts, gates, N, E, K, norm_topk);
    balance_backward(dz, lse, probs, f, aux_weight, z_weight, N, E);
    for (int n = 0; n < N; n++) {
        double sum = 0, chosen = 0;
        for (int e = 0; e < E; e++) sum += exp((double)z[n * E + e]);
        for (int e = 0; e < E; e++) p[e] = exp((double)z[n * E + e]) / sum;
        for (int k = 0; k < K; k++) chosen += p[experts[n * K + k]];
        for (int e = 0; e < E; e++) {
            double dchosen = 0, want = z_weight * log(sum) * p[e], size = fabs(want);
            for (int k = 0; k < K; k++) dchosen += p[experts[n * K + k]] * ((experts[n * K + k] == e) - p[e]);
            for (int k = 0; k < K; k++) {
                int i = experts[n * K + k];
                double gate = p[i], dgate = gate * ((i == e) - p[e]);
                if (norm_topk) dgate = dgate / chosen - gate * dchosen / (chosen * chosen), gate /= chosen;
                want += dgate * dgates[n * K + k];
                size += gate * fabs(dgates[n * K + k]);
            }
            for (int i = 0; i < E; i++) {
                want += aux_weight * f[i] * p[i] * ((i == e) - p[e]);
                size += aux_weight * f[i] * p[i];
            }
            compare(dz[n * E + e], want, size);
        }
    }
    check_compared("dlogits");
    free(experts), free(offsets), free(assignment), free(row_of), free(z), free(probs), free(lse), free(gates);
    free(dgates), free(dz), free(x), free(rows), free(out), free(p), free(f);
}

static void bench(int N) {
    int E = 64, K = 8, H = 512, R = N * K;
    int *experts = integers(R), *offsets = integers(E + 1), *assignment = integers(R), *row_of = integers(R);
    float *z = numbers((long)N * E, 3), *probs = numbers((long)N * E, 0), *lse = numbers(N, 0), *gates = numbers(R, 0);
    float *dgates = numbers(R, 1), *dz = numbers((long)N * E, 0), *x = numbers((long)N * H, 1),
          *y = numbers((long)R * H, 0);
    printf("%d tokens of %d numbers, %d of %d experts\n", N, H, K, E);
    while (time_again()) softmax_router_forward(probs, lse, experts, gates, z, N, E, K, 1);
    print_time("router", 1e3 * N, "Mtoken/s");
    while (time_again()) group_by_expert(offsets, assignment, row_of, experts, N, K, E);
    print_time("grouping", 1e3 * N, "Mtoken/s");
    while (time_again()) gather_rows(y, x, assignment, R, K, H);
    print_time("gathering", 8.0 * R * H, "GB/s");
    while (time_again()) combine_rows(x, NULL, y, gates, row_of, N, K, H);
    print_time("combining", 4.0 * (R + N) * H, "GB/s");
    while (time_again()) softmax_router_backward(dz, dgates, probs, experts, gates, N, E, K, 1);
    print_time("router, backward", 1e3 * N, "Mtoken/s");
    free(experts), free(offsets), free(assignment), free(row_of), free(z), free(probs), free(lse), free(gates);
    free(dgates), free(dz), free(x), free(y);
}

static void tests(void) {
    test(300, 8, 2, 20, 1, 0);
    test(100, 8, 2, 3, 0, 4);       // ties
    test(1, 1, 1, 1, 1, 0);
    test(77, 70, 5, 9, 0, 0);
    test(20, 5, 5, 1, 1, 2);        // all experts
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 4096); }
