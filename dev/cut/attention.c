/*
attention.c: causal attention with grouped queries in fp32, forward and backward, that keeps no T x T matrix.

    cc -O3 -march=native -fopenmp attention.c -o attention -lm && ./attention && ./attention --bench

(Without -march=native it runs on other machines of the same kind, and slower; without -fopenmp on one core. Not with
-ffast-math or -Ofast, which break the exponential.) gcc or clang is needed, for their vector types, and nothing else.

    attention_forward    out_i = sum over j <= i of p_ij v_j,  p_ij = exp(q_i k_j / sqrt(HD) - lse_i)
    attention_backward   dq, dk, dv from dout, out and lse

Shapes     B sequences; NH query heads, NKV key and value heads that divide them: query head h uses h / (NH / NKV); any
           head size HD. out, dout (B Tq, NH HD); lse (B, NH, Tq).
Layout     Row n of q begins at q + n ld_q, its heads one after the other; k and v likewise with ld_k and ld_v, Tk rows
           a sequence. So q, k and v may be parts of one matrix (N, (NH + 2 NKV) HD), and their gradients of another:
           rows of dq and dk lie ld_dqk apart, those of dv ld_dv. Gradients are overwritten.
Lengths    The Tq queries are the last Tq of Tk positions: Tq = Tk in training, Tq < Tk with a cache. The backward pass
           wants Tq = Tk = T.
Scratch    attention_scratch_size(Tk) floats: for each thread two blocks of 64 rows of scores.
Sums       In a fixed order: the bits do not depend on the number of threads, nor a query's result on Tq.
Before     the projection to q, k, v, norms and rotary positions. After: the projection of out.

Cut out of the mixture-of-experts trainer train_moe.c and dev/lib/products.h, whose comments it keeps. The test compares
with plain loops in doubles.
*/
#include "before.h"

// cut: attention_forward attention_backward attention_scratch_size -copy_rows

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the functions are used

#include "test.h"

// The plain version: p (seen) of a query and its keys, whose rows are ld floats apart. Returns lse; *size: the largest
// score's sum of sizes.
static double plain_scores(double* p, double* size, const float* q, const float* k, long ld, int seen, int HD) {
    double max = -INFINITY, sum = 0;
    *size = 0;
    for (int j = 0; j < seen; j++) {
        double terms = 0;
        p[j] = 0;
        for (int d = 0; d < HD; d++) {
            p[j] += (double)q[d] * k[j * ld + d] / sqrt((double)HD);
            terms += fabs((double)q[d] * k[j * ld + d]) / sqrt((double)HD);
        }
        max = fmax(max, p[j]);
        *size = fmax(*size, terms);
    }
    for (int j = 0; j < seen; j++) sum += exp(p[j] - max);
    for (int j = 0; j < seen; j++) p[j] = exp(p[j] - max) / sum;
    return max + log(sum);
}

static double* zeros(long n) {
    double* x = (double*)calloc((size_t)n, sizeof(double));
    if (!x) exit(1);
    return x;
}

static void test_forward(int B, int Tq, int Tk, int NH, int NKV, int HD) {
    long ld_q = (long)NH * HD + 3, ld_kv = 2L * NKV * HD;       // k and v are halves of one matrix
    float *q = numbers(B * Tq * ld_q, 2), *kv = numbers(B * Tk * ld_kv, 2), *out = numbers((long)B * Tq * NH * HD, 0);
    float *lse = numbers((long)B * NH * Tq, 0), *scratch = numbers(attention_scratch_size(Tk), 0);
    double *p = zeros(Tk), size;
    attention_forward(out, lse, q, ld_q, kv, ld_kv, kv + NKV * HD, ld_kv, B, Tq, Tk, NH, NKV, HD, scratch);
    for (long row = 0; row < (long)B * Tq * NH; row++) {
        long n = row / NH, h = row % NH, b = n / Tq, i = n % Tq;
        int seen = (int)(Tk - Tq + i + 1);
        const float* k = kv + b * Tk * ld_kv + h / (NH / NKV) * HD;
        double want = plain_scores(p, &size, q + n * ld_q + h * HD, k, ld_kv, seen, HD);
        compare(lse[(b * NH + h) * Tq + i], want, 1 + size);
        for (int d = 0; d < HD; d++) {
            double sum = 0, terms = 0;
            for (int j = 0; j < seen; j++) {
                sum += p[j] * k[j * ld_kv + NKV * HD + d];
                terms += p[j] * fabs(k[j * ld_kv + NKV * HD + d]);
            }
            compare(out[row * HD + d], sum, terms * (1 + size));
        }
    }
    check_compared("out and lse");
    free(q), free(kv), free(out), free(lse), free(scratch), free(p);
}

// q, k and v are parts of one matrix, as a projection leaves them, and so are their gradients
static void test_backward(int B, int T, int NH, int NKV, int HD) {
    long ld = (NH + 2L * NKV) * HD, N = (long)B * T;
    float *qkv = numbers(N * ld, 2), *dqkv = numbers(N * ld, 2), *out = numbers(N * NH * HD, 0);
    float *dout = numbers(N * NH * HD, 0.5), *lse = numbers(N * NH, 0),
          *scratch = numbers(attention_scratch_size(T), 0);
    const float *q = qkv, *k = q + NH * HD, *v = k + NKV * HD;
    double *want = zeros(N * ld), *size = zeros(N * ld), *p = zeros(T), scores;
    attention_forward(out, lse, q, ld, k, ld, v, ld, B, T, T, NH, NKV, HD, scratch);
    attention_backward(dqkv, dqkv + NH * HD, dqkv + (NH + NKV) * HD, dout, out, lse, q, ld, k, ld, v, ld, ld, ld, B, T,
                       NH, NKV, HD, scratch);
    for (long row = 0; row < N * NH; row++) {
        long n = row / NH, h = row % NH, b = n / T, i = n % T, q_at = n * ld + h * HD;
        long k_at = b * T * ld + (NH + h / (NH / NKV)) * HD, v_at = k_at + NKV * HD;
        double dot = 0, dot_size = 0;
        plain_scores(p, &scores, qkv + q_at, qkv + k_at, ld, (int)i + 1, HD);
        for (int d = 0; d < HD; d++) {
            dot += (double)dout[row * HD + d] * out[row * HD + d];
            dot_size += fabs((double)dout[row * HD + d] * out[row * HD + d]);
        }
        for (int j = 0; j <= i; j++) {
            double dp = 0, dp_size = 0;
            for (int d = 0; d < HD; d++) {
                dp += (double)dout[row * HD + d] * qkv[v_at + j * ld + d];
                dp_size += fabs((double)dout[row * HD + d] * qkv[v_at + j * ld + d]);
            }
            double ds = p[j] * (dp - dot) / sqrt((double)HD);
            double ds_size = p[j] * (dp_size + dot_size) / sqrt((double)HD) * (1 + scores);
            for (int d = 0; d < HD; d++) {
                long at_k = k_at + j * ld + d, at_v = v_at + j * ld + d;
                want[q_at + d] += ds * qkv[at_k], size[q_at + d] += ds_size * fabs(qkv[at_k]);
                want[at_k] += ds * qkv[q_at + d], size[at_k] += ds_size * fabs(qkv[q_at + d]);
                want[at_v] += p[j] * dout[row * HD + d];
                size[at_v] += p[j] * fabs(dout[row * HD + d]) * (1 + scores);
            }
        }
    }
    for (long i = 0; i < N * ld; i++) compare(dqkv[i], want[i], size[i]);
    check_compared("dq, dk, dv");
    free(qkv), free(dqkv), free(out), free(dout), free(lse), free(scratch), free(want), free(size), free(p);
}

static void bench(int N) {
    int T = N < 1024 ? N : 1024, B = N / T, NH = 8, NKV = 4, HD = 64;
    long ld = (NH + 2L * NKV) * HD, rows = (long)B * T;
    float *qkv = numbers(rows * ld, 1), *dqkv = numbers(rows * ld, 1), *out = numbers(rows * NH * HD, 0);
    float *dout = numbers(rows * NH * HD, 1), *lse = numbers(rows * NH, 0),
          *scratch = numbers(attention_scratch_size(T), 0);
    const float *q = qkv, *k = q + NH * HD, *v = k + NKV * HD;
    double flops = 2.0 * rows * T * NH * HD;            // two products over half of the square; backward five
    printf("fp32, %d sequences of %d, %d query heads of %d, %d key and value heads\n", B, T, NH, HD, NKV);
    while (time_again()) attention_forward(out, lse, q, ld, k, ld, v, ld, B, T, T, NH, NKV, HD, scratch);
    print_time("forward", flops, "GFLOP/s");
    while (time_again())
        attention_backward(dqkv, dqkv + NH * HD, dqkv + (NH + NKV) * HD, dout, out, lse, q, ld, k, ld, v, ld, ld, ld, B,
                           T, NH, NKV, HD, scratch);
    print_time("backward", flops * 2.5, "GFLOP/s");
    free(qkv), free(dqkv), free(out), free(dout), free(lse), free(scratch);
}

static void tests(void) {
    test_forward(2, 130, 130, 4, 2, 16);        // more than one block of queries
    test_forward(1, 5, 77, 2, 2, 64);           // a few queries behind a past
    test_forward(3, 1, 40, 3, 1, 22);           // one
    test_backward(2, 130, 4, 2, 16);
    test_backward(1, 33, 2, 1, 64);
    test_backward(3, 1, 2, 2, 22);
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 4096); }
