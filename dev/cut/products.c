/*
products.c: y = x W^T and its two gradients in fp32 or bf16, for one matrix or the matrices of many experts at once.

    cc -O3 -march=native -fopenmp products.c -o products -lm && ./products && ./products --bench

(Without -march=native it runs on other machines of the same kind, and slower; without -fopenmp on one core. Not with
-ffast-math or -Ofast, which reorder sums.) gcc or clang is needed, for their vector types, and nothing else.

    matmul_forward           y = x W^T                grouped_matmul_forward            y = x W_e^T
    matmul_backward_input    dx = dy W, or dx +=      grouped_matmul_backward_input     dx = dy W_e, or dx +=
    matmul_backward_weight   dW += dy^T x             grouped_matmul_backward_weight    dW_e += dy^T x

Shapes     x (rows, C), W (OC, C), y (rows, OC), row-major without gaps; W_e is (OC, C) and begins at W + e
           weight_stride. Rows offsets[e] .. offsets[e+1]-1 belong to expert e of E; offsets (E + 1), and an expert may
           have no rows. Any sizes, any alignment of floats.
Sums       Each element is one chain of multiply-adds in the order of its index, as the plain loops in the same
           functions write it (plain_products = 1 lets them compute): the bits depend neither on the number of threads
           nor on the other rows, so that a row alone gives what it gives in a batch.
bf16       With bf16_products = 1 operands are rounded to bf16 and added in the order of the instruction VDPBF16PS: in
           fp32 arithmetic as long as bf16_packing is PACK_ROUNDED, by the instruction with PACK_PAIRS, which wants
           PAIRS_TILE to be 1 (-march names a processor with AVX-512 BF16). With PACK_TILES AMX's TDPBF16PS computes,
           which adds in another order: where AMX_TILES is 1, after tiles_permitted() has returned 1. The test says
           whether a processor's instructions add as the plain loops do.
Memory     Each thread keeps 0.5 to 0.8 MB of scratch from its first product on.
Before     gathering rows by expert (routing.c). After: SwiGLU, and adding up each token's rows.

Cut out of the mixture-of-experts trainer train_moe.c and dev/lib/products.h, whose comments it keeps. The test compares
with plain loops in doubles, and bit by bit with those in floats, in fp32 and in each way of bf16.
*/
#include "before.h"

// cut: grouped_matmul_forward grouped_matmul_backward_input grouped_matmul_backward_weight
// cut: matmul_forward matmul_backward_input matmul_backward_weight tiles_permitted -copy_rows

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the functions are used

#include "test.h"

enum { MOST_EXPERTS = 8 };

// experts share the rows unevenly; the second has none
static void share_rows(int* offsets, int E, int rows) {
    for (int e = 0; e <= E; e++) offsets[e] = (int)((long)rows * e * e / (E * E));
    if (E > 1) offsets[2] = offsets[1];
}

// A number as the products see it: in bf16 8 significant bits are left of it, ties to even.
static double seen(float x) {
    int exponent;
    double digits = frexp(x, &exponent);
    return bf16_products ? ldexp(rint(digits * 256), exponent - 8) : x;
}

// The products by which = 0 .. 2 (forward, dx, dW), added to what result holds where that is asked for.
static void product(int which, float* result, const float* left, const float* right, int C, int OC, int E,
                    const int* offsets, int add) {
    long stride = (long)OC * C;
    if (E == 1 && which == 0) matmul_forward(result, left, right, offsets[1], C, OC);
    else if (E == 1 && which == 1) matmul_backward_input(result, left, right, offsets[1], C, OC, add);
    else if (E == 1) matmul_backward_weight(result, left, right, offsets[1], C, OC);
    else if (which == 0) grouped_matmul_forward(result, left, right, stride, C, OC, E, offsets);
    else if (which == 1) grouped_matmul_backward_input(result, left, right, stride, C, OC, E, offsets, add);
    else grouped_matmul_backward_weight(result, left, right, stride, C, OC, E, offsets);
}

static void test(int E, int rows, int C, int OC) {
    int offsets[MOST_EXPERTS + 1];
    const char* names[3] = {"forward", "dx", "dW"};
    share_rows(offsets, E, rows);
    for (int which = 0; which < 3; which++)
        for (int add = which == 2; add < (which ? 2 : 1); add++) {
            long sizes[3] = {(long)rows * OC, (long)rows * C, (long)E * OC * C}, n = sizes[which];
            float *left = numbers(sizes[which ? 0 : 1], 0.5), *right = numbers(sizes[which == 2 ? 1 : 2], 0.5);
            float *start = numbers(n, 0.5), *fast = numbers(n, 0), *plain = numbers(n, 0), *alone = numbers(OC, 0);
            memcpy(fast, start, sizeof(float) * (size_t)n);
            memcpy(plain, start, sizeof(float) * (size_t)n);
            product(which, fast, left, right, C, OC, E, offsets, add);
            plain_products = 1;
            product(which, plain, left, right, C, OC, E, offsets, add);
            plain_products = 0;
            for (int e = 0; e < E; e++) {
                const float* W = right + (long)e * OC * C;
                long first = offsets[e], end = offsets[e + 1], I = which == 2 ? OC : end - first;
                long J = which ? C : OC, depth = which == 0 ? C : which == 1 ? OC : end - first;
                for (long i = 0; i < I; i++)
                    for (long j = 0; j < J; j++) {
                        long at = which == 2 ? ((long)e * OC + i) * C + j : (first + i) * J + j;
                        double sum = add ? start[at] : 0, size = fabs(sum);
                        for (long k = 0; k < depth; k++) {
                            double term = seen(left[which == 2 ? (first + k) * OC + i : (first + i) * depth + k]) *
                                          seen(which == 0   ? W[j * C + k]
                                               : which == 1 ? W[k * C + j]
                                                            : right[(first + k) * C + j]);
                            sum += term;
                            size += fabs(term);
                        }
                        compare(fast[at], sum, size);
                    }
            }
            check_compared(names[which]);
            check(!memcmp(fast, plain, sizeof(float) * (size_t)n), "the plain loops' bits");
            if (which == 0 && E == 1) {
                matmul_forward(alone, left + (rows - 1L) * C, right, 1, C, OC);
                check(!memcmp(alone, fast + (rows - 1L) * OC, sizeof(float) * (size_t)OC), "the bits of a row alone");
            }
            free(left), free(right), free(start), free(fast), free(plain), free(alone);
        }
}

static void bench(int rows) {
    int C = 1024, OC = 1024, E = MOST_EXPERTS, offsets[MOST_EXPERTS + 1];
    long W = (long)OC * C;
    float *x = numbers((long)rows * C, 0.5), *y = numbers((long)rows * OC, 0.5), *w = numbers(W * E, 0.5);
    double flops = 2.0 * rows * C * OC;
    share_rows(offsets, E, rows);
    printf("fp32, %d rows, (%d, %d)\n", rows, OC, C);
    while (time_again()) matmul_forward(y, x, w, rows, C, OC);
    print_time("forward", flops, "GFLOP/s");
    while (time_again()) matmul_backward_input(x, y, w, rows, C, OC, 0);
    print_time("dx", flops, "GFLOP/s");
    while (time_again()) matmul_backward_weight(w, y, x, rows, C, OC);
    print_time("dW", flops, "GFLOP/s");
    while (time_again()) grouped_matmul_forward(y, x, w, W, C, OC, E, offsets);
    print_time("forward, 8 experts", flops, "GFLOP/s");
    free(x), free(y), free(w);
}

static void tests(void) {
    for (int way = PACK_FP32; way <= PACK_TILES; way++) {
        if ((way == PACK_PAIRS && !PAIRS_TILE) || (way == PACK_TILES && !(AMX_TILES && tiles_permitted()))) continue;
        bf16_products = way != PACK_FP32;
        bf16_packing = (Packing)way;
        test(1, 1, 1, 1);
        test(1, 3, 70, 41);             // few rows
        test(1, 130, 33, 5);            // few columns
        test(1, 67, 600, 90);           // several chunks of k
        test(5, 160, 48, 65);           // experts, one without rows
    }
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 2048); }
