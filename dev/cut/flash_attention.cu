/*
flash_attention.cu: causal attention with grouped queries, forward and backward, that never writes its T x T matrices.

    nvcc -std=c++17 -O3 -gencode arch=compute_80,code=sm_80 flash_attention.cu -o flash_attention
    ./flash_attention && ./flash_attention --bench

For H100 and H200 write compute_90a and sm_90a, for others what they are, 80 or later. Nothing but CUDA 12.9 or newer is
needed. T is __nv_bfloat16 (tensor cores, mma.sync) or float; softmax and sums are float.

    out_i = sum over j <= i of p_ij v_j,  p_ij = exp(q_i k_j / sqrt(HD) - lse_i)       gpu_attention_forward
    dq, dk, dv from dout, out and lse                                                  gpu_attention_backward

Shapes     B sequences; NH query heads, NKV key and value heads that divide them: query head h uses h / (NH / NKV); head
           size HD up to 128, rounded up to 32, 64, 96 or 128 by zeros. out, dout (B Tq, NH HD); lse (B, NH, Tq).
Layout     Row n of q begins at q + n ld_q, its heads one after the other; position t of sequence b of k at
           k + (b Tk + t) ld_k; v likewise. So q, k and v may be parts of one matrix (N, (NH + 2 NKV) HD), and their
           gradients of another: rows of dq and dk lie ld_dqk apart, those of dv ld_dv.
Lengths    The Tq queries are the last Tq of Tk positions: Tq = Tk in training, Tq < Tk with a cache. Any lengths. The
           backward pass wants Tq = Tk.
Alignment  Where HD and the strides are multiples of 8 and all pointers of 16 bytes (bf16), tiles come by cp.async; else
           number by number, which is slower.
Scratch    D (B, NH, T) floats in the backward pass. Gradients are overwritten, not added to.
Stream     The last argument, 0 by default. Nothing is allocated, nothing waits for the device. A failed call ends the
           program: `die`.
Results    There are no atomic additions: the same input gives the same bits, and a query's result does not depend on
           Tq. The price is 7 products of tiles in the backward pass where 5 would do.
Before     the projection to q, k, v, norms and rotary positions. After: the projection of out. Masks other than the
           causal one, dropout and windows are not here.
Speed      unmeasured: no GPU has run this file yet. It was tested on a CPU that executes CUDA C++, and its inline
           assembly by an interpreter of PTX (dev/cuda/README.md of the project).

Cut out of the mixture-of-experts trainer train_moe.cu, whose comments it keeps: section and file names are that
project's, and so are the dimension letters. The test compares with plain loops in doubles.
*/
#include "before.cuh"

// cut: gpu_attention_forward gpu_attention_backward

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the kernels are used

#include "test.cuh"

typedef std::vector<double> Doubles;

// The plain version, for head h of sequence b and query i of Tq: p (Tk), the logarithm of the denominator, and the size
// of each score. Pointers are to the whole arrays.
template <class T>
static double plain_scores(Doubles& p, Doubles& size, const T* q, long ld_q, const T* k, long ld_k, int b, int h, int i,
                           int Tq, int Tk, int group, int HD) {
    double max = -INFINITY, sum = 0;
    int seen = Tk - Tq + i + 1;
    for (int j = 0; j < seen; j++) {
        p[j] = size[j] = 0;
        for (int d = 0; d < HD; d++) {
            double term = as_double(q[((long)b * Tq + i) * ld_q + h * HD + d]) *
                          as_double(k[((long)b * Tk + j) * ld_k + h / group * HD + d]) / sqrt((double)HD);
            p[j] += term;
            size[j] += fabs(term);
        }
        max = fmax(max, p[j]);
    }
    for (int j = 0; j < seen; j++) sum += exp(p[j] - max);
    for (int j = 0; j < seen; j++) p[j] = exp(p[j] - max) / sum;
    return max + log(sum);
}

// Errors, as shares of the terms: bf16 rounds p and ds before they are summed. A score of size s is off by 1e-6 s, and
// p by that share of itself.
template <class T> static double terms_unit() { return sizeof(T) == 2 ? 1.0 / 200 : 3e-6; }

template <class T> static void test_forward(int B, int Tq, int Tk, int NH, int NKV, int HD, int shift) {
    long ld_q = (long)NH * HD + 8, ld_k = (long)2 * NKV * HD;       // k and v are halves of one matrix
    Array<T> q((long)B * Tq * ld_q, shift), kv((long)B * Tk * ld_k, shift), out((long)B * Tq * NH * HD, shift);
    Array<float> lse((long)B * NH * Tq);
    q.random(2), kv.random(2);
    gpu_attention_forward(out.gpu(), lse.gpu(), q.gpu(), ld_q, kv.gpu(), ld_k, kv.gpu() + NKV * HD, ld_k, B, Tq, Tk, NH,
                          NKV, HD, test_stream);
    Doubles want(out.n), size(out.n), want_lse(lse.n), size_lse(lse.n), p(Tk), s(Tk);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int i = 0; i < Tq; i++) {
                long row = ((long)b * NH + h) * Tq + i, seen = Tk - Tq + i + 1;
                want_lse[row] = plain_scores(p, s, q.x.data(), ld_q, kv.x.data(), ld_k, b, h, i, Tq, Tk, NH / NKV, HD);
                for (int j = 0; j < seen; j++) size_lse[row] = fmax(size_lse[row], s[j]);
                for (int d = 0; d < HD; d++)
                    for (int j = 0; j < seen; j++) {
                        long at = (((long)b * Tq + i) * NH + h) * HD + d;
                        double v = as_double(kv.x[((long)b * Tk + j) * ld_k + (NKV + h / (NH / NKV)) * HD + d]);
                        want[at] += p[j] * v;
                        size[at] += p[j] * fabs(v);
                    }
            }
    compare("out", out, want, size, result_unit<T>(), terms_unit<T>());
    compare("lse", lse, want_lse, size_lse, 1e-6, 2e-6);
}

// q, k and v are parts of one matrix, as a projection leaves them, and so are their gradients
template <class T> static void test_backward(int B, int length, int NH, int NKV, int HD, int shift) {
    long ld = (long)(NH + 2 * NKV) * HD, N = (long)B * length;
    int group = NH / NKV;
    Array<T> qkv(N * ld, shift), out(N * NH * HD, shift), dout(N * NH * HD, shift), dqkv(N * ld, shift);
    Array<float> lse((long)B * NH * length), D((long)B * NH * length);
    qkv.random(2), dout.random(0.5);
    const T *q = qkv.gpu(), *k = q + NH * HD, *v = k + NKV * HD;
    T *dq = dqkv.gpu(), *dk = dq + NH * HD, *dv = dk + NKV * HD;
    gpu_attention_forward(out.gpu(), lse.gpu(), q, ld, k, ld, v, ld, B, length, length, NH, NKV, HD, test_stream);
    gpu_attention_backward(dq, dk, dv, D.gpu(), dout.gpu(), out.gpu(), lse.gpu(), q, ld, k, ld, v, ld, ld, ld, B,
                           length, NH, NKV, HD, test_stream);
    check(out.fetch() && lse.fetch() && D.fetch(), "the backward pass keeps to its arrays");
    Doubles want(dqkv.n), size(dqkv.n), p(length), s(length);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int i = 0; i < length; i++) {
                long n = (long)b * length + i, q_at = n * ld + h * HD, row = n * NH * HD + h * HD;
                double dot = 0, dot_size = 0;
                plain_scores(p, s, qkv.x.data(), ld, qkv.x.data() + NH * HD, ld, b, h, i, length, length, group, HD);
                for (int d = 0; d < HD; d++) {
                    double term = as_double(dout.x[row + d]) * as_double(out.x[row + d]);    // out as it was rounded
                    dot += term;
                    dot_size += fabs(term);
                }
                for (int j = 0; j <= i; j++) {
                    long k_at = ((long)b * length + j) * ld + (NH + h / group) * HD, v_at = k_at + NKV * HD;
                    double dp = 0, dp_size = 0;
                    for (int d = 0; d < HD; d++) {
                        double term = as_double(dout.x[row + d]) * as_double(qkv.x[v_at + d]);
                        dp += term;
                        dp_size += fabs(term);
                    }
                    double ds = p[j] * (dp - dot) / sqrt((double)HD), ds_size = fabs(ds);
                    // what rounding leaves of it: scores and dp are sums of floats
                    if (sizeof(T) == 4) ds_size += p[j] * (dp_size + dot_size) / sqrt((double)HD) + s[j] * fabs(ds);
                    else ds_size += 1e-3 * p[j] * (dp_size + dot_size) / sqrt((double)HD);
                    for (int d = 0; d < HD; d++) {
                        double q_d = as_double(qkv.x[q_at + d]), k_d = as_double(qkv.x[k_at + d]);
                        double dout_d = as_double(dout.x[row + d]);
                        want[q_at + d] += ds * k_d, size[q_at + d] += ds_size * fabs(k_d);
                        want[k_at + d] += ds * q_d, size[k_at + d] += ds_size * fabs(q_d);
                        want[v_at + d] += p[j] * dout_d, size[v_at + d] += p[j] * fabs(dout_d) * (1 + 1e-2 * s[j]);
                    }
                }
            }
    compare("dq, dk, dv", dqkv, want, size, result_unit<T>(), terms_unit<T>());
}

static void bench(int N) {
    int length = N < 2048 ? N : 2048, B = N / length, NH = N < 2048 ? 2 : 16, NKV = NH / 2;
    printf("bf16, %d sequences of %d, %d query heads, %d key and value heads\n", B, length, NH, NKV);
    for (int HD = 64; HD <= 128; HD += 64) {
        long ld = (long)(NH + 2 * NKV) * HD, rows = (long)B * length;
        Array<bf16> qkv(rows * ld), out(rows * NH * HD), dout(rows * NH * HD), dqkv(rows * ld);
        Array<float> lse((long)NH * rows), D((long)NH * rows);
        qkv.random(1), dout.random(1);
        const bf16 *q = qkv.gpu(), *k = q + NH * HD, *v = k + NKV * HD;
        bf16 *dq = dqkv.gpu(), *dk = dq + NH * HD, *dv = dk + NKV * HD;
        double flops = 2.0 * rows * length * NH * HD;       // two products over half of the square; backward five
        char name[2][64];
        for (int i = 0; i < 2; i++)
            snprintf(name[i], sizeof name[i], "%s, heads of %d", i ? "backward" : "forward", HD);
        time_of(name[0], flops, "TFLOP/s", [&] {
            gpu_attention_forward(out.gpu(), lse.gpu(), q, ld, k, ld, v, ld, B, length, length, NH, NKV, HD,
                                  test_stream);
        });
        time_of(name[1], flops * 2.5, "TFLOP/s", [&] {
            gpu_attention_backward(dq, dk, dv, D.gpu(), dout.gpu(), out.gpu(), lse.gpu(), q, ld, k, ld, v, ld, ld, ld,
                                   B, length, NH, NKV, HD, test_stream);
        });
    }
}

template <class T> static void test_all() {
    test_forward<T>(2, 130, 130, 4, 2, 64, 0);      // more than one block of queries
    test_forward<T>(1, 5, 133, 2, 2, 32, 0);        // a few queries behind a past
    test_forward<T>(1, 1, 300, 3, 1, 96, 0);        // one
    test_forward<T>(1, 70, 70, 2, 1, 128, 0);
    test_forward<T>(2, 33, 40, 2, 1, 22, 1);        // nothing at multiples of 16 bytes
    test_backward<T>(2, 130, 4, 2, 64, 0);
    test_backward<T>(1, 140, 2, 1, 128, 0);
    test_backward<T>(1, 37, 2, 2, 80, 0);           // fewer than the 96 that its kernel is made for
    test_backward<T>(3, 40, 2, 1, 22, 1);
}

static void tests() {
    test_all<float>();
    test_all<bf16>();
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 16384); }
