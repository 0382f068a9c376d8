/*
train_moe.c: a complete mixture-of-experts GPT.

It trains, evaluates and samples Llama, Mistral, Mixtral, OLMoE, Qwen2, Qwen3 (both also as MoE) and Dots1
models on a CPU in fp32 or bf16, reads and writes their Hugging Face directories, and needs a C compiler and
nothing else. Every forward pass is followed by its backward pass, by hand. To be read from top to bottom:

    1  Configuration        what a model is: two dozen numbers
    2  Matrix products      y = x W^T and its two gradients, also for many experts at once
    3  Layers               embedding, cross-entropy, RMSNorm, rotary positions, attention
    4  Mixture of experts   top-K routing, balance losses, grouping tokens by expert, SwiGLU
    5  The model            parameters, activations, forward, backward, AdamW
    6  Training             learning rate, accumulation, the loop

One evening: the block (section 1), the three formulas (2), RMSNorm (3), all of 4, of 5 what a layer keeps
and its five steps, and train_step. dev/reading.md has their lines, and one token's way as a list of calls.

What is hardened or fast stands in the headers of dev/lib, included where they are needed; nobody has to read
them. How to go on: routers beyond softmax, dev/lib/routers.h; the same on a GPU, train_moe.cu; more experts
for a trained model, upcycle.c.

Dimension letters, the same everywhere:
    B  sequences in a batch         H   hidden size                     E  experts in a layer
    T  positions in a sequence      I   width of an expert (or FFN)     K  experts that each token uses
    N  tokens in a batch, B T       NH  attention heads                 V  vocabulary
    L  layers                       NKV key/value heads, HD head size   S  width of the shared expert
Arrays are row-major, outermost dimension first: (N, H) is N rows of H floats. `dx` is the gradient of the
loss with respect to `x`. Functions write their first arguments, and scratch, the last, and read the others.

The file is also a library: upcycle.c, test_moe.c and train_moe.cu define TRAIN_MOE_NO_MAIN and include it. It
is written in the common subset of C11 (with gcc's vector types) and C++17: the CUDA compiler reads it as C++.
*/
#ifndef TRAIN_MOE_C
#define TRAIN_MOE_C
#include "dev/lib/util.h"         // die, memory, paths, imin, seconds, threads
#include "dev/lib/rope.h"         // rotary positions of models for long texts

// -----------------------------------------------------------------------------------------------------------
// 1. Configuration
//
// One block, repeated L times, with few switches (x is a row of H numbers, one per token):
//
//     x += Wo attention( rope(qknorm(Wq n1(x))), rope(qknorm(Wk n1(x))), Wv n1(x) )  causal, grouped-query
//     x += sum over the token's K experts e of  gate_e  f_e(n2(x))                   f_e is a SwiGLU network
//          + gate_s f_s(n2(x))       in Qwen2-MoE and Dots1: a shared expert, which every token uses
//
// n1, n2 are RMSNorms. A dense layer is a layer with one expert whose gate is 1: there is one code path.

typedef enum { LLAMA, MISTRAL, MIXTRAL, OLMOE, QWEN3, QWEN3_MOE, DOTS1, QWEN2, QWEN2_MOE, NUM_ARCHS } Arch;
typedef enum { QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_ROW } QKNorm;    // none; each head; all heads as one row
typedef enum { AUX_SWITCH, AUX_HF } AuxForm;                        // two balance losses, see section 4
typedef enum { ROUTER_SOFTMAX, ROUTER_SIGMOID, ROUTER_LPR, ROUTER_DYNAMIC } Router; // see routers.h

#define MAX_LAYERS 512

#include "dev/lib/model_parts.h"  // what other routers and reports need of a model: nothing to read now

typedef struct {
    Arch arch;
    int num_layers;                 // L
    int hidden_size;                // H
    int num_heads;                  // NH
    int num_kv_heads;               // NKV: every NH / NKV query heads share one key and value head
    int head_dim;                   // HD, even; NH HD need not be H
    int intermediate_size;          // width of the FFN of a dense layer
    int num_experts;                // E of a sparse layer; 0 for a dense model
    int num_experts_per_tok;        // K
    int moe_intermediate_size;      // I, the width of an expert
    int shared_expert_intermediate_size, num_shared_experts;    // Qwen2-MoE: S; Dots1: S / I. 0: none
    int norm_topk_prob;             // 1: the K gates of a token are divided by their sum
    int vocab_size;                 // V
    int max_position_embeddings;    // the longest sequence that the model is meant for
    QKNorm qk_norm;
    int qkv_bias;                   // 1: q, k and v are W n1(x) + b
    int tie_word_embeddings;        // 1: the LM head is the embedding
    double rope_theta;
    RopeScaling rope;
    double rms_norm_eps;
    double router_aux_loss_coef;
    int topk_limit;                 // steps may draw their K, up to this; 0: it is num_experts_per_tok
    char sparse[MAX_LAYERS];        // 1: layer l is a mixture of experts, 0: it is dense
    RouterConfig router;            // all zero: softmax top-K; else routers.h
} Config;

static int layer_experts(const Config* c, int l) { return c->sparse[l] ? c->num_experts : 1; }
static int layer_topk(const Config* c, int l) { return c->sparse[l] ? c->num_experts_per_tok : 1; }
static int layer_width(const Config* c, int l) {
    return c->sparse[l] ? c->moe_intermediate_size : c->intermediate_size;
}
static int qkv_width(const Config* c) { return (c->num_heads + 2 * c->num_kv_heads) * c->head_dim; }
static int count_sparse(const Config* c) {
    int n = 0;
    for (int l = 0; l < c->num_layers; l++) n += c->sparse[l];
    return n;
}

#include "dev/lib/random.h"       // random numbers: each is a hash of what it is for

// -----------------------------------------------------------------------------------------------------------
// 2. Matrix products
//
// A linear layer, C numbers in and OC out, needs three of them, all matrices row-major:
//     forward          y  = x W^T       y (rows, OC), x (rows, C), W (OC, C)
//     backward input   dx = dy W        dx (rows, C), or dx += dy W where x has several readers
//     backward weight  dW += dy^T x     dW (OC, C), always a sum: micro-batches add to one gradient
//
// sum_products and the loops below define them exactly, down to the order of additions and every rounding.
// dev/lib/products.h computes the same bits many times faster: blocks, vectors and threads only decide when
// an element is computed, and where its sum waits meanwhile. So bits never depend on how many rows, threads
// or experts a call has: a token generated alone equals the same token in a batch.

#include "dev/lib/products.h"     // fast_product, fast_block: these sums; blocks_of: n / size, rounded up

// 1: the loops below compute (make PLAIN=1), 0: products.h does. A test compares them, byte by byte.
#ifndef PLAIN
#define PLAIN 0
#endif
static int plain_products = PLAIN;

// sum + a b, rounded once where the processor can do so
#if defined(__FMA__) || defined(__aarch64__) || defined(__FP_FAST_FMAF)
#define MULTIPLY_ADD(sum, a, b) fmaf(a, b, sum)
#else
#define MULTIPLY_ADD(sum, a, b) ((sum) + (a) * (b))
#endif

// Products that stay fp32 with --precision bf16: of routers, of the shared expert's gate, of biases
#define IN_FP32(call) do { int was = bf16_products; bf16_products = 0; call; bf16_products = was; } while (0)

// *result = [*result if add] + sum over k < depth of left[k left_k] right[k right_k], by multiply-adds:
//     fp32  k = 0, 1, 2, ..
//     bf16  k = 1, 0, 3, 2, .., of numbers rounded to the nearest bf16, ties to even; as 0 count terms beyond
//           the depth, and operands (before rounding) and (x86-64, ARM) sums below 2^-126, as in VDPBF16PS
//     AMX   in place of that order, where TDPBF16PS computes: of every 32 values of k the even ones and the
//           odd ones each make a sum from zero; the two are added, then to what was before
static void sum_products(float* result, int add, const float* left, long left_k, const float* right,
                         long right_k, int depth) {
    float sum = add ? *result : 0, halves[2] = {0, 0};
    if (!bf16_products) {
        for (int k = 0; k < depth; k++) sum = MULTIPLY_ADD(sum, left[k * left_k], right[k * right_k]);
        *result = sum;
        return;
    }
    FloatMode mode = flush_denormals();         // until restore_mode numbers below 2^-126 count as 0
    int amx = bf16_packing == PACK_TILES, block = amx ? 32 : 2, end = blocks_of(depth, block) * block;
    for (int n = 0, k = 1; n < end; k = ++n ^ 1) {
        float* s = amx ? &halves[k % 2] : &sum;
        *s = MULTIPLY_ADD(*s, k < depth ? bf16_operand(left[k * left_k]) : 0,
                          k < depth ? bf16_operand(right[k * right_k]) : 0);
        if (!amx || n % 32 < 31) continue;
        sum += halves[0] + halves[1];
        halves[0] = halves[1] = 0;
    }
    *result = sum;
    restore_mode(mode);
}

// E products at once, one for each expert: rows offsets[e] .. offsets[e + 1] - 1 of x and y belong to matrix
// number e, which is (OC, C) and starts at W + e * weight_stride. An expert may have no rows.
//     y = x W_e^T          y (rows, OC), x (rows, C), offsets (E + 1)
void grouped_matmul_forward(float* y, const float* x, const float* W, long weight_stride, int C, int OC,
                            int E, const int* offsets) {
    if (!plain_products) fast_product(FORWARD, y, x, W, weight_stride, C, OC, E, offsets, 0);
    for (int e = 0; e < E && plain_products; e++) {
        #pragma omp parallel for
        for (long r = offsets[e]; r < offsets[e + 1]; r++)
            for (int o = 0; o < OC; o++)
                sum_products(&y[r * OC + o], 0, x + r * C, 1, W + e * weight_stride + (long)o * C, 1, C);
    }
}

//     dx = dy W_e, or with add = 1 dx += dy W_e
void grouped_matmul_backward_input(float* dx, const float* dy, const float* W, long weight_stride, int C,
                                   int OC, int E, const int* offsets, int add) {
    if (!plain_products) fast_product(BACKWARD_INPUT, dx, dy, W, weight_stride, C, OC, E, offsets, add);
    for (int e = 0; e < E && plain_products; e++) {
        #pragma omp parallel for
        for (long r = offsets[e]; r < offsets[e + 1]; r++)
            for (int c = 0; c < C; c++)
                sum_products(&dx[r * C + c], add, dy + r * OC, 1, W + e * weight_stride + c, C, OC);
    }
}

//     dW_e += dy^T x
void grouped_matmul_backward_weight(float* dW, const float* dy, const float* x, long weight_stride, int C,
                                    int OC, int E, const int* offsets) {
    if (!plain_products) fast_product(BACKWARD_WEIGHT, dW, dy, x, weight_stride, C, OC, E, offsets, 1);
    for (int e = 0; e < E && plain_products; e++) {
        long first = offsets[e];
        #pragma omp parallel for
        for (int o = 0; o < OC; o++)
            for (int c = 0; c < C; c++)
                sum_products(&dW[e * weight_stride + (long)o * C + c], 1, dy + first * OC + o, OC,
                             x + first * C + c, C, offsets[e + 1] - offsets[e]);
    }
}

// The three products of one matrix, which all rows belong to.
void matmul_forward(float* y, const float* x, const float* W, int rows, int C, int OC) {
    int offsets[2] = {0, rows};
    grouped_matmul_forward(y, x, W, 0, C, OC, 1, offsets);
}

void matmul_backward_input(float* dx, const float* dy, const float* W, int rows, int C, int OC, int add) {
    int offsets[2] = {0, rows};
    grouped_matmul_backward_input(dx, dy, W, 0, C, OC, 1, offsets, add);
}

void matmul_backward_weight(float* dW, const float* dy, const float* x, int rows, int C, int OC) {
    int offsets[2] = {0, rows};
    grouped_matmul_backward_weight(dW, dy, x, 0, C, OC, 1, offsets);
}

// The same sums for attention, by one thread, on matrices with rows and columns any number of floats apart:
//     result(i,j) = [result(i,j) if add] + sum over k of left(i,k) right(k,j)
// result (rows, columns), left (rows, depth), right (depth, columns); left(i,k) is left[i*left_i + k*left_k],
// right(k,j) likewise, result(i,j) is result[i*result_i + j].
static void multiply_block(float* result, long result_i, const float* left, long left_i, long left_k,
                           const float* right, long right_k, long right_j, int rows, int columns, int depth,
                           int add) {
    if (!plain_products) fast_block(result, result_i, left, left_i, left_k, right, right_k, right_j, rows,
                                    columns, depth, add);
    for (int i = 0; i < rows && plain_products; i++)
        for (int j = 0; j < columns; j++)
            sum_products(&result[i * result_i + j], add, left + i * left_i, left_k, right + j * right_j,
                         right_k, depth);
}

// -----------------------------------------------------------------------------------------------------------
// 3. Layers

#include "dev/lib/vector_math.h"  // fast_exp, max_of

// out (N, H) = table[tokens]       table (V, H), tokens (N)
// (`if (N > 1)`, here and below: one token, or its experts' few rows, is too little to wake threads for.)
static void embedding_forward(float* out, const int* tokens, const float* table, int N, int H) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) memcpy(out + (long)n * H, table + (long)tokens[n] * H, sizeof(float) * H);
}

// dtable[tokens] += dout. Two positions may hold the same token, so threads divide the columns (16 at a time,
// a cache line) and not the rows: one thread makes each sum, in the order of the positions.
static void embedding_backward(float* dtable, const float* dout, const int* tokens, int N, int H) {
    #pragma omp parallel for
    for (int column = 0; column < H; column += 16) {
        int width = imin(16, H - column);
        for (int n = 0; n < N; n++) {
            float* drow = dtable + (long)tokens[n] * H + column;
            const float* dout_row = dout + (long)n * H + column;
            for (int i = 0; i < width; i++) drow[i] += dout_row[i];
        }
    }
}

// The loss of each token and the log of its softmax's denominator:
//     lse_n = log sum_v exp(logits_nv)   losses_n = lse_n - logits_n,target  logits (N, V); losses, lse (N)
static void cross_entropy_forward(float* losses, float* lse, const float* logits, const int* targets, int N,
                                  int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* logits_n = logits + (long)n * V;
        float max = max_of(logits_n, V), sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += fast_exp(logits_n[v] - max);
        lse[n] = max + logf(sum);
        losses[n] = lse[n] - logits_n[targets[n]];
    }
}

// The logits become their own gradient in place:  dlogits_nv = scale (exp(logits_nv - lse_n) - [v = target])
static void cross_entropy_backward(float* logits, const float* lse, const int* targets, int N, int V,
                                   float scale) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        float* logits_n = logits + (long)n * V;
        for (int v = 0; v < V; v++) logits_n[v] = scale * fast_exp(logits_n[v] - lse[n]);
        logits_n[targets[n]] -= scale;
    }
}

// RMSNorm (Zhang and Sennrich 2019):  out = weight * x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)
// x is N rows, `ld_x` floats apart, each of `groups` vectors of `size`; every vector is normalised by itself,
// with the same weight (size). Layer norms have one group a row, per-head norms of q and k one a head.
// rstd (N, groups) is kept for the backward pass.
static void rmsnorm_forward(float* out, long ld_out, float* rstd, const float* x, long ld_x,
                            const float* weight, int N, int groups, int size, float eps) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++)
        for (int g = 0; g < groups; g++) {
            const float* x_ng = x + n * ld_x + (long)g * size;
            float* out_ng = out + n * ld_out + (long)g * size;
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int i = 0; i < size; i++) sum += x_ng[i] * x_ng[i];
            float r = 1.0f / sqrtf(sum / size + eps);
            for (int i = 0; i < size; i++) out_ng[i] = weight[i] * x_ng[i] * r;
            rstd[(long)n * groups + g] = r;
        }
}

// dweight is a sum over vectors: within blocks of this many rows, then over these in order, for any threads.
#define RMSNORM_ROWS 16
static long rmsnorm_sums_size(int N, int size) { return (long)(N + RMSNORM_ROWS - 1) / RMSNORM_ROWS * size; }

// With xhat = x rstd and s = rstd mean(dout weight xhat):
//     dweight += sum over all vectors of dout xhat        dx (+)= rstd (dout weight - x s)
// add = 1 adds to dx, which then is the gradient that flows past the norm on the residual stream.
// sums: rmsnorm_sums_size(N, size) floats of scratch.
static void rmsnorm_backward(float* dx, long ld_dx, int add, float* dweight, const float* dout, long ld_dout,
                             const float* x, long ld_x, const float* weight, const float* rstd, int N,
                             int groups, int size, float* sums) {
    int blocks = (N + RMSNORM_ROWS - 1) / RMSNORM_ROWS;
    #pragma omp parallel for
    for (int b = 0; b < blocks; b++) {
        float* sums_b = sums + (long)b * size;
        memset(sums_b, 0, sizeof(float) * size);
        for (int n = b * RMSNORM_ROWS; n < imin(N, (b + 1) * RMSNORM_ROWS); n++)
            for (int g = 0; g < groups; g++) {
                const float *x_ng = x + n * ld_x + (long)g * size,
                            *dout_ng = dout + n * ld_dout + (long)g * size;
                float *dx_ng = dx + n * ld_dx + (long)g * size, r = rstd[(long)n * groups + g], s = 0;
                #pragma omp simd reduction(+ : s)
                for (int i = 0; i < size; i++) s += dout_ng[i] * weight[i] * x_ng[i];
                s *= r * r / size;
                for (int i = 0; i < size; i++) {
                    float d = r * (dout_ng[i] * weight[i] - x_ng[i] * s);
                    sums_b[i] += dout_ng[i] * x_ng[i] * r;
                    dx_ng[i] = add ? dx_ng[i] + d : d;
                }
            }
    }
    #pragma omp parallel for
    for (int column = 0; column < size; column += 16) {
        int width = imin(16, size - column);
        float total[16] = {0};
        for (int b = 0; b < blocks; b++)
            for (int i = 0; i < width; i++) total[i] += sums[(long)b * size + column + i];
        for (int i = 0; i < width; i++) dweight[column + i] += total[i];
    }
}

// Rotary positions (Su et al. 2021), in place, on `heads` heads of each of N = B T rows that are ld floats
// apart. Element i of a head's first half and element i of its second half are a point in the plane (Hugging
// Face's rotate_half), turned by position * theta^(-2 i / HD). Row n is at position start + n % T of its
// sequence; the cosines and sines are dev/lib/memory.h's. direction = -1: the rotation back, the gradient's.
static void rope(float* x, long ld, int heads, int N, int T, int start, int HD, const float* cosines,
                 const float* sines, int direction) {
    int half = HD / 2;
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const float *cos_t = cosines + (long)(start + n % T) * half,
                    *sin_t = sines + (long)(start + n % T) * half;
        for (int h = 0; h < heads; h++) {
            float *a = x + n * ld + (long)h * HD, *b = a + half;
            for (int i = 0; i < half; i++) {
                float s = direction * sin_t[i], a_i = a[i], b_i = b[i];
                a[i] = a_i * cos_t[i] - b_i * s;
                b[i] = b_i * cos_t[i] + a_i * s;
            }
        }
    }
}

// Attention works on blocks of this many queries: their scores against all keys stay in the cache.
#define QUERY_BLOCK 64
// rows of scores are a cache line longer than T: a power of two apart, all would map to one cache set
static long score_stride(int T) { return (T + 15) / 16 * 16 + 16; }
// floats that attention needs for T keys: for each thread two blocks of scores, p and, backward, ds
static long attention_scratch_size(int T) { return (long)thread_count() * 2 * QUERY_BLOCK * score_stride(T); }

static float* attention_scratch(float* scratch, int T) {
    return scratch + (long)thread_number() * 2 * QUERY_BLOCK * score_stride(T);
}

// Causal attention of Tq queries, which are the last Tq of Tk positions, in B sequences:
//     out_i = sum over j <= i of p_ij v_j,  p_ij = exp(q_i k_j / sqrt(HD) - lse_i),  so that sum_j p_ij = 1
// Row n of q, k, v starts at q + n ld_q (k, v with ld_k, ld_v); head h uses key/value head h / (NH / NKV).
// out (B Tq, NH HD), lse (B, NH, Tq). scratch: attention_scratch_size(Tk) floats.
static void attention_forward(float* out, float* lse, const float* q, long ld_q, const float* k, long ld_k,
                              const float* v, long ld_v, int B, int Tq, int Tk, int NH, int NKV, int HD,
                              float* scratch) {
    int blocks = (Tq + QUERY_BLOCK - 1) / QUERY_BLOCK;
    float scale = 1.0f / sqrtf((float)HD);
    Work work;
    work_deal(&work, B * NH * blocks);  // each thread runs the loop below: work_take: its next unit, or -1
    #pragma omp parallel
    for (int helped = 0, unit; (unit = work_take(&work, &helped)) >= 0;) {
        int b = unit / (NH * blocks), h = unit / blocks % NH, block = unit % blocks;
        int first = block * QUERY_BLOCK, rows = imin(QUERY_BLOCK, Tq - first);
        int past = Tk - Tq + first; // keys before the block's first query
        int keys = past + rows, kv_head = h / (NH / NKV);
        const float* q_bh = q + ((long)b * Tq + first) * ld_q + (long)h * HD;
        const float* k_bh = k + (long)b * Tk * ld_k + (long)kv_head * HD;
        const float* v_bh = v + (long)b * Tk * ld_v + (long)kv_head * HD;
        float *p = attention_scratch(scratch, Tk), inverse_sums[QUERY_BLOCK];
        long ld = score_stride(Tk);
        multiply_block(p, ld, q_bh, ld_q, 1, k_bh, 1, ld_k, rows, keys, HD, 0);
        for (int i = 0; i < rows; i++) {
            int seen = past + i + 1, padded = (seen + 15) / 16 * 16;
            float *p_i = p + i * ld, sum = 0;
            // to a multiple of 16: the order of additions then does not depend on how many keys a call has
            for (int j = seen; j < padded; j++) p_i[j] = -INFINITY;
            float max = max_of(p_i, padded);
            #pragma omp simd reduction(+ : sum)
            for (int j = 0; j < padded; j++) sum += p_i[j] = fast_exp(scale * (p_i[j] - max));
            for (int j = seen; j < keys; j++) p_i[j] = 0;
            inverse_sums[i] = 1.0f / sum;       // for out, not for p: HD products a row and not `keys`
            lse[((long)b * NH + h) * Tq + first + i] = scale * max + logf(sum);
        }
        float* out_bh = out + ((long)b * Tq + first) * NH * HD + (long)h * HD;
        multiply_block(out_bh, (long)NH * HD, p, ld, 1, v_bh, ld_v, 1, rows, HD, keys, 0);
        for (int i = 0; i < rows; i++)
            for (int d = 0; d < HD; d++) out_bh[(long)i * NH * HD + d] *= inverse_sums[i];
    }
}

// The probabilities are made again from the scores and lse, which is cheaper than having kept T^2 of them.
// With dp_ij = dout_i v_j and D_i = sum over j of p_ij dp_ij = dout_i out_i:
//     ds_ij = p_ij (dp_ij - D_i) / sqrt(HD)
//     dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i
// Here Tq = Tk = T. A thread owns a key/value head with all its query heads, so that dk and dv are sums in a
// fixed order. Overwrites dq and dk, whose rows are ld_dqk apart, and dv, ld_dv. dout, out (B T, NH HD).
static void attention_backward(float* dq, float* dk, float* dv, const float* dout, const float* out,
                               const float* lse, const float* q, long ld_q, const float* k, long ld_k,
                               const float* v, long ld_v, long ld_dqk, long ld_dv, int B, int T, int NH,
                               int NKV, int HD, float* scratch) {
    float scale = 1.0f / sqrtf((float)HD);
    long ld = score_stride(T), ld_out = (long)NH * HD;
    Work work;
    work_deal(&work, B * NKV);
    #pragma omp parallel
    for (int helped = 0, unit; (unit = work_take(&work, &helped)) >= 0;) {
        int b = unit / NKV, kv_head = unit % NKV;
        const float *k_b = k + (long)b * T * ld_k + (long)kv_head * HD,
                    *v_b = v + (long)b * T * ld_v + (long)kv_head * HD;
        float *dk_b = dk + (long)b * T * ld_dqk + (long)kv_head * HD,
              *dv_b = dv + (long)b * T * ld_dv + (long)kv_head * HD;
        float *p = attention_scratch(scratch, T), *ds = p + QUERY_BLOCK * ld;
        // from the last block of queries, which see all keys: the very first products overwrite dk and dv
        for (int h = kv_head * (NH / NKV), add = 0; h < (kv_head + 1) * (NH / NKV); h++)
            for (int first = (T - 1) / QUERY_BLOCK * QUERY_BLOCK; first >= 0; first -= QUERY_BLOCK, add = 1) {
                int rows = imin(QUERY_BLOCK, T - first), keys = first + rows;
                long row = (long)b * T + first;
                const float *q_bh = q + row * ld_q + (long)h * HD,
                            *out_bh = out + row * ld_out + (long)h * HD;
                const float *dout_bh = dout + row * ld_out + (long)h * HD;
                multiply_block(p, ld, q_bh, ld_q, 1, k_b, 1, ld_k, rows, keys, HD, 0);
                multiply_block(ds, ld, dout_bh, ld_out, 1, v_b, 1, ld_v, rows, keys, HD, 0);       // dp
                for (int i = 0; i < rows; i++) {
                    float *p_i = p + i * ld, *ds_i = ds + i * ld, D = 0;
                    float lse_i = lse[((long)b * NH + h) * T + first + i];
                    int seen = first + i + 1;
                    #pragma omp simd reduction(+ : D)
                    for (int d = 0; d < HD; d++) D += dout_bh[i * ld_out + d] * out_bh[i * ld_out + d];
                    // whole vectors: what that computes beyond `seen` is cleared below or never read
                    for (int j = 0; j < (seen + 15) / 16 * 16; j++) {
                        p_i[j] = fast_exp(scale * p_i[j] - lse_i);
                        ds_i[j] = p_i[j] * (ds_i[j] - D) * scale;
                    }
                    for (int j = seen; j < keys; j++) p_i[j] = ds_i[j] = 0;
                }
                multiply_block(dq + row * ld_dqk + (long)h * HD, ld_dqk, ds, ld, 1, k_b, ld_k, 1, rows, HD,
                               keys, 0);
                multiply_block(dk_b, ld_dqk, ds, 1, ld, q_bh, ld_q, 1, keys, HD, rows, add);
                multiply_block(dv_b, ld_dv, p, 1, ld, dout_bh, ld_out, 1, keys, HD, rows, add);
            }
    }
}

// -----------------------------------------------------------------------------------------------------------
// 4. Mixture of experts
//
// The router scores every expert for a token, the best K are run, and their results, times gates, added up:
//
//     z = W_router x          p = softmax(z) over all E experts     chosen = the K experts with the largest p
//     gate_e = p_e, or p_e / sum over chosen of p  (norm_topk_prob)     y = sum over chosen of gate_e f_e(x)

// The indices of the K largest of E scores, largest first, of equals the lowest index first.
static void choose_topk(int* chosen, const float* scores, int E, int K) {
    for (int k = 0; k < K; k++) {
        int best = -1;
        for (int e = 0; e < E; e++) {
            // after the k-th choice come the smaller scores, and equal ones with a higher index
            float last = k ? scores[chosen[k - 1]] : 0;
            int available = k == 0 || scores[e] < last || (scores[e] == last && e > chosen[k - 1]);
            if (available && (best < 0 || scores[e] > scores[best])) best = e;
        }
        chosen[k] = best < 0 ? 0 : best;        // nothing is left only among NaN; the loss shows them
    }
}

// probs (N, E) = softmax(logits), lse (N) = log of its denominator, experts (N, K) best first (of equals the
// lowest index first), gates (N, K)
static void softmax_router_forward(float* probs, float* lse, int* experts, float* gates, const float* logits,
                                   int N, int E, int K, int norm_topk) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const float* z = logits + (long)n * E;
        float *p = probs + (long)n * E, *gates_n = gates + (long)n * K, max = z[0], sum = 0;
        int* experts_n = experts + (long)n * K;
        for (int e = 1; e < E; e++) max = z[e] > max ? z[e] : max;
        for (int e = 0; e < E; e++) sum += p[e] = fast_exp(z[e] - max);
        for (int e = 0; e < E; e++) p[e] /= sum;
        lse[n] = max + logf(sum);
        choose_topk(experts_n, z, E, K);        // not by p, in which rounding can make different z equal
        float gate_sum = 0;
        for (int k = 0; k < K; k++) gate_sum += gates_n[k] = p[experts_n[k]];
        for (int k = 0; k < K && norm_topk; k++) gates_n[k] /= gate_sum;
    }
}

// dlogits (N, E) from dgates (N, K), of the gates as used. With mean = sum over chosen j of gate_j dgate_j:
//     renormalised:  dz_e = gate_e (dgate_e - mean)  for chosen e, 0 for the others
//     otherwise:     dz_e = p_e (dgate_e [e chosen] - mean)  for all e
static void softmax_router_backward(float* dlogits, const float* dgates, const float* probs,
                                    const int* experts, const float* gates, int N, int E, int K,
                                    int norm_topk) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *p = probs + (long)n * E, *gates_n = gates + (long)n * K,
                    *dgates_n = dgates + (long)n * K;
        float *dz = dlogits + (long)n * E, mean = 0;
        for (int k = 0; k < K && experts[(long)n * K + k] >= 0; k++) mean += gates_n[k] * dgates_n[k];
        for (int e = 0; e < E; e++) dz[e] = norm_topk ? 0 : -p[e] * mean;
        for (int k = 0; k < K && experts[(long)n * K + k] >= 0; k++)        // -1: a token gets fewer
            dz[experts[(long)n * K + k]] += gates_n[k] * (norm_topk ? dgates_n[k] - mean : dgates_n[k]);
    }
}

// Sorts the N K assignments by expert, so that each expert runs once over rows that lie together. Nothing is
// padded and no assignment is dropped, however uneven the shares. Expert -1, a skipped gate, has no row.
// offsets (E + 1): expert e's rows are offsets[e] .. offsets[e+1]-1
// assignment (N K): row r serves assignment n K + k, the k-th expert of token n;  row_of (N, K): the inverse
static void group_by_expert(int* offsets, int* assignment, int* row_of, const int* experts, int N, int K,
                            int E) {
    memset(offsets, 0, sizeof(int) * (E + 1));
    for (int a = 0; a < N * K; a++) offsets[experts[a] + 1] += experts[a] >= 0;
    for (int e = 0; e < E; e++) offsets[e + 1] += offsets[e];
    for (int a = 0; a < N * K; a++) {           // offsets[e] serves as expert e's next free row ...
        row_of[a] = experts[a] < 0 ? -1 : offsets[experts[a]]++;
        if (row_of[a] >= 0) assignment[row_of[a]] = a;
    }
    for (int e = E; e > 0; e--) offsets[e] = offsets[e - 1];            // ... and is moved back
    offsets[0] = 0;
}

// Left alone, a router sends everything to a few experts. The balance loss (2101.03961, eq. 4) pushes back:
//     f_e = share of the assignments that went to expert e (a constant),  P_e = mean over tokens of p_e
//     AUX_SWITCH: the sum over sparse layers of E sum_e f_e P_e: 1 a layer when balanced
//     AUX_HF: as in transformers, once over all layers' tokens, with f_e counted per token: K when balanced
// Their gradients have one form:      dz_ne += aux_weight p_ne (f_e - sum_j f_j p_nj)
// The values: count_balance (dev/lib/load.h) adds up AUX_SWITCH and z-loss, model_forward computes AUX_HF.
// The z-loss (2202.08906, eq. 5), mean over tokens of lse_n^2, lse_n = logsumexp(z_n), keeps logits small:
//                                     dz_ne += z_weight lse_n p_ne

// Adds both gradients to dlogits (N, E). aux_weight and f (E) belong to one of
//     AUX_SWITCH: coefficient E / N, counts / all assignments
//     AUX_HF:     coefficient E / M, counts of all layers / M,  M = N times the number of sparse layers
// and z_weight is 2 coefficient / N; a coefficient here contains the gradient's scale. lse (N), probs (N, E).
static void balance_backward(float* dlogits, const float* lse, const float* probs, const double* f,
                             double aux_weight, double z_weight, int N, int E) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* p = probs + (long)n * E;
        double mean = 0;
        for (int e = 0; e < E; e++) mean += f[e] * p[e];
        for (int e = 0; e < E; e++)
            dlogits[(long)n * E + e] += (float)(p[e] * (aux_weight * (f[e] - mean) + z_weight * lse[n]));
    }
}

// out row r (rows, H) = x (N, H) at the token that row r serves
static void gather_rows(float* out, const float* x, const int* assignment, int rows, int K, int H) {
    #pragma omp parallel for if (rows > 8)
    for (int r = 0; r < rows; r++)
        memcpy(out + (long)r * H, x + (long)(assignment[r] / K) * H, sizeof(float) * H);
}

// out_n = residual_n + sum over k of gates_nk y[row_of_nk], in the order of k, until row -1;  gates = NULL:
// all are 1, residual = NULL: zero. out, residual (N, H), y (rows, H). Without gates this and gather_rows
// are each other's transpose, so each the other's backward; dgates are made in swiglu_backward.
static void combine_rows(float* out, const float* residual, const float* y, const float* gates,
                         const int* row_of, int N, int K, int H) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        float* out_n = out + (long)n * H;
        for (int i = 0; i < H; i++) out_n[i] = residual ? residual[(long)n * H + i] : 0;
        for (int k = 0; k < K && row_of[(long)n * K + k] >= 0; k++) {
            const float* y_r = y + (long)row_of[(long)n * K + k] * H;
            float gate = gates ? gates[(long)n * K + k] : 1;
            for (int i = 0; i < H; i++) out_n[i] += gate * y_r[i];
        }
    }
}

// SwiGLU (Shazeer 2020):  act = silu(g) * u,  silu(g) = g sigmoid(g)
// gate_up (rows, 2, I): g = W_gate x, then u = W_up x; act (rows, I). g is not the router's gate.
static void swiglu_forward(float* act, const float* gate_up, int rows, int I) {
    #pragma omp parallel for if (rows > 8)
    for (int r = 0; r < rows; r++) {
        const float *g = gate_up + (long)r * 2 * I, *u = g + I;
        float* act_r = act + (long)r * I;
        for (int i = 0; i < I; i++) act_r[i] = g[i] / (1.0f + fast_exp(-g[i])) * u[i];
    }
}

// The backward pass of gate * down(silu(g) * u) for the rows of all experts, between the two matrix products.
// Here gate is the router's number for the row, and g and u are as in swiglu_forward. Given
// dact (rows, I) = W_down^T dy, with dy the gradient of the layer's output at the row's token:
//     dgate = <dy, W_down act> = <dact, act>, so outputs need not have been kept (SonicMoE, 2512.14080)
//     dgate_up: g' = gate dact u silu'(g), u' = gate dact silu(g), silu' = s (1 + g (1 - s)), s = sigmoid(g)
// gated_act (rows, I) = gate * act, a row of it is `act` below, serves W_down: dW_down += dy^T (gate act).
// dgate_up may be the same memory as gate_up; dgates (N, K).
static void swiglu_backward(float* dgate_up, float* gated_act, float* dgates, const float* dact,
                            const float* gate_up, const float* gates, const int* assignment, int rows,
                            int I) {
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        const float *g = gate_up + (long)r * 2 * I, *u = g + I, *dact_r = dact + (long)r * I;
        float *dg = dgate_up + (long)r * 2 * I, *du = dg + I, *act = gated_act + (long)r * I;
        float gate = gates[assignment[r]], dgate = 0;
        #pragma omp simd reduction(+ : dgate)
        for (int i = 0; i < I; i++) {
            float s = 1.0f / (1.0f + fast_exp(-g[i])), silu = g[i] * s, u_i = u[i];
            dgate += dact_r[i] * silu * u_i;
            act[i] = gate * silu * u_i;
            dg[i] = gate * dact_r[i] * u_i * s * (1.0f + g[i] * (1.0f - s));
            du[i] = gate * dact_r[i] * silu;
        }
        dgates[assignment[r]] = dgate;
    }
}

// -----------------------------------------------------------------------------------------------------------
// 5. The model

// One layer's parameters. Gradients are kept in the same structure.
typedef struct {
    float* attn_norm;           // (H)
    float* qkv;                 // ((NH + 2 NKV) HD, H)     q_proj, k_proj and v_proj, one below the other
    float* qkv_bias;            // ((NH + 2 NKV) HD), or NULL
    float* q_norm;              // (HD) per head, (NH HD) per row, or NULL
    float* k_norm;              // (HD) per head, (NKV HD) per row, or NULL
    float* attn_out;            // (H, NH HD)               o_proj
    float* ffn_norm;            // (H)
    float* router;              // (E, H), or NULL in a dense layer
    float* gate_up;             // (E, 2, I, H)             each expert's gate_proj and up_proj
    float* down;                // (E, H, I)
    float *shared_gate_up, *shared_down, *shared_gate;      // (2, S, H), (H, S), (1, H): the shared expert
    ROUTER_LAYER_WEIGHTS        // those of other routers
} LayerWeights;

typedef struct {
    float* embedding;           // (V, H)
    LayerWeights* layers;       // (L)
    float* final_norm;          // (H)
    float* lm_head;             // (V, H), the embedding itself if tied
} Weights;

#include "dev/lib/layout.h"       // the tensors' names and places

// The arrays of the forward and backward pass are two tables of {type, name, number of elements}, "X-macros":
// MEMBER, below, makes structures of them, TAKE, in dev/lib/memory.h, the memory. Letters as above, R = N K
// rows of experts; for a dense layer E = K = 1. D: the dimension of latent prototypes (LPR). `sparse`,
// `training` and what else stands as a factor is 1 or 0: an array that a model does not need has no elements.
typedef float Real;             // of activations; on a GPU, which has the first table too, also bfloat16

// What each layer keeps for its backward pass.
#define LAYER_ARRAYS(ARRAY)                                                                                 \
    ARRAY(Real, x, N * H)                           /* the residual stream as it enters the layer */        \
    ARRAY(Real, attn_in, N * H)                     /* n1(x) */                                             \
    ARRAY(float, attn_rstd, N)                                                                              \
    ARRAY(Real, qkv, N * (NH + 2 * NKV) * HD)                                                               \
    ARRAY(float, q_rstd, N * NH)                    /* (N, NH) per head, (N) per row */                     \
    ARRAY(float, k_rstd, N * NKV)                   /* (N, NKV) per head, (N) per row */                    \
    ARRAY(Real, rotated, N * (NH + NKV) * HD)       /* queries and keys, normed and rotated */              \
    ARRAY(Real, attn, N * NH * HD)                                                                          \
    ARRAY(float, lse, B * NH * T)                   /* (B, NH, T) */                                        \
    ARRAY(Real, x_mid, N * H)                       /* the residual stream after attention */               \
    ARRAY(Real, ffn_in, N * H)                      /* n2(x_mid) */                                         \
    ARRAY(float, ffn_rstd, N)                                                                               \
    ARRAY(float, router_logits, sparse * N * E)     /* z */                                                 \
    ARRAY(float, router_lse, sparse * N)            /* logsumexp(z) */                                      \
    ARRAY(float, probs, sparse * N * E)             /* softmax(z) */                                        \
    ARRAY(float, gates, sparse * N * K)             /* of a dense layer: Model.ones */                      \
    ARRAY(int, experts, sparse * N * K)             /* (N, K) chosen, best first; -1 after the last */  \
    ARRAY(int, offsets, E + 1)                      /* these three: see group_by_expert */                  \
    ARRAY(int, assignment, sparse * R)              /* of a dense layer: Model.identity */                  \
    ARRAY(int, row_of, sparse * R)                  /* (N, K); of a dense layer: Model.identity */          \
    ARRAY(Real, gate_up, R * 2 * I)                 /* (R, 2, I) */                                         \
    ARRAY(Real, shared_gate_up, N * 2 * S)          /* (N, 2, S) of the shared expert, and */                \
    ARRAY(float, shared_gates, gated * N)           /* its gates; without them: Model.ones */               \
    ROUTER_LAYER_ARRAYS(ARRAY)

// What is written and used up within one layer. All share it: R and RI, rows times width, are the largest.
#define SCRATCH_ARRAYS(ARRAY)                                                                               \
    ARRAY(float, x_rows, R * H)                     /* experts' inputs, gathered */                         \
    ARRAY(float, y_rows, R * H)                     /* experts' outputs */                                  \
    ARRAY(float, act, RI)                           /* (R, I) */                                            \
    ARRAY(float, attention, attention_scratch_size(m->positions))                                           \
    ARRAY(double, balance, E)                       /* f of the balance loss */                             \
    ARRAY(double, prob_sums, E)                     /* sum over tokens of probs */                          \
    ARRAY(float, dx, training * N * H)              /* flows back along the residual stream */              \
    ARRAY(float, dnormed, training * N * H)         /* the gradient of a norm's output */                   \
    ARRAY(float, dattn, training * N * NH * HD)                                                             \
    ARRAY(float, drotated, training * N * (NH + NKV) * HD)                                                  \
    ARRAY(float, dqkv, training * N * (NH + 2 * NKV) * HD)                                                  \
    ARRAY(float, dact, training * RI)                                                                       \
    ARRAY(float, dgates, training * N * K)                                                                  \
    ARRAY(float, drouter, training * N * E)         /* dz */                                                \
    ARRAY(float, norm_sums, training * rmsnorm_sums_size(N, H > NH * HD ? H : NH * HD))                     \
    ARRAY(double, norms, training * norm_blocks(m))         /* partial sums of the gradient's norm */       \
    ROUTER_SCRATCH_ARRAYS(ARRAY)

#define MEMBER(type, name, count) type* name;
typedef struct {
    LAYER_ARRAYS(MEMBER)
} LayerActivations;

typedef struct {
    SCRATCH_ARRAYS(MEMBER)
    float *dy_rows, *dx_rows;   // (R, H)   gradients of y_rows and x_rows: memory of y_rows, in turns
    float* gated_act;           // (R, I)   gate * act: memory of act
} Scratch;

// What a model is made for decides what memory it gets.
typedef enum {
    FOR_TRAINING,               // everything
    FOR_SCORING,                // forward passes: one layer's activations serve all, no gradients
    FOR_GENERATION              // the same with a key/value cache, B = 1
} Purpose;

typedef struct {
    float aux, z;               // coefficients of the balance loss and the z-loss
    AuxForm aux_form;
    int adaptive;               // 1: each layer has a coefficient of its own, Model.aux_coefficients
} Balance;

typedef struct {
    double beta1, beta2, eps, weight_decay, clip;       // clip = 0: no clipping
} AdamW;

#include "dev/lib/backend.h"      // where a model is computed: here, or on a GPU

struct Model {
    // what it is
    Config config;
    Purpose purpose;
    int B, T;                   // the largest batch; a shorter one may be given
    int positions;              // the longest sequence: T, or the capacity of the cache
    const Backend* backend;
    const char *source, *tokenizer;     // the directories of its parameters and of its tokenizer, or NULL
    struct Json* luggage;       // its config.json, so that keys unknown here are written back; or NULL
    int reads_bytes;            // 1: its tokens are the bytes of a text, for trainer.json
    // its parameters, (layout.total) each, and the places of their tensors
    Layout layout;
    float *params, *grads;      // grads and the moments are NULL without training
    float *exp_avg, *exp_avg_sq;// AdamW's moments
    Weights weights, dweights;
    const Model* owner;         // NULL, or the model whose parameters these are
    // this pass
    int batch, length;          // its B and T
    int *tokens, *targets;      // (N)
    int* topk;                  // (L)          K of each layer; the config's unless training draws them
    LayerActivations* layers;   // (L)
    Scratch scratch;
    float* final_in;            // (N, H)       the residual stream after the last layer
    float* final_out;           // (N, H)       after the final norm
    float* final_rstd;          // (N)
    float* logits;              // (N, V), or (1, V) for generation: only the last token's
    float *losses, *losses_lse; // (N)
    float *cosines, *sines;     // (positions, HD / 2)      of rope_table
    float* ones;                // (N)          gates of a dense layer's one expert
    int* identity;              // (N)          its assignment and row_of: every token, in order
    float *cache_k, *cache_v;   // (L, positions, NKV HD)
    int cached;                 // positions in the cache
    double loss, aux_loss, z_loss, lpr_loss;    // loss: cross-entropy; lpr_loss: of other routers, weighted
    double *all_counts, *all_probs;     // (E)  assignments, sums of probs over all sparse layers, for AUX_HF
    // what a run adds
    Balance balance;
    RUN_MEMBERS                 // model_parts.h: sums, load, observe, aux_coefficients, families, noise
    // its memory, in bytes
    size_t bytes_params, bytes_optimizer, bytes_activations, bytes;
    void* memory;
    void* device;               // what the backend of a GPU keeps
};

#include "dev/lib/memory.h"       // model_create, model_free

// Training from scratch starts from N(mean, std) = N(0, 0.02); what adds to the residual stream (o_proj and
// down_proj, Mixtral's w2) from N(0, 0.02 / sqrt(2 L)), so that its variance does not grow with the depth
// (GPT-2); norms from 1, biases from 0. Each tensor draws from a stream of its own.
static void model_init(Model* m, uint64_t seed) {
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        float* w = m->params + t->offset;
        long size = tensor_size(t);
        int residual = strstr(t->name, "o_proj") || strstr(t->name, "down_proj") || strstr(t->name, ".w2.");
        double std = residual ? 0.02 / sqrt(2.0 * m->config.num_layers) : 0.02;
        if (strstr(t->name, "prototypes")) std = 1;         // LPR compares directions
        float constant = strstr(t->name, "bias") ? 0.0f : 1.0f;
        uint64_t key = random_key(seed, hash_string("init"), hash_string(t->name), 0);
        #pragma omp parallel for
        for (long j = 0; j < size; j++)
            w[j] = tensor_is_matrix(t) ? (float)(std * random_normal(mix64(key ^ (uint64_t)j))) : constant;
    }
}

// out (N, width) = x (N, width), whose rows are ld_out and ld_x floats apart
static void copy_rows(float* out, long ld_out, const float* x, long ld_x, long N, long width) {
    #pragma omp parallel for if (N > 1)
    for (long n = 0; n < N; n++) memcpy(out + n * ld_out, x + n * ld_x, sizeof(float) * (size_t)width);
}

#include "dev/lib/cache.h"        // layer_keys_values: in the layer's arrays, or in the cache

// out += x, both (N, H)
static void add_rows(float* out, const float* x, int N, int H) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++)
        for (int i = 0; i < H; i++) out[(long)n * H + i] += x[(long)n * H + i];
}

// In a layer's functions w and dw are its parameters and gradients, s what it keeps (saved), t scratch.

// rotated = the norms of queries and keys, where the model has them: NH vectors of HD, or one of NH HD
static void qk_norm_forward(const Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    const LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, HD = c->head_dim, Q = c->num_heads * HD, KV = c->num_kv_heads * HD;
    long QKV = qkv_width(c), QK = Q + KV;
    int q_size = c->qk_norm == QK_NORM_ROW ? Q : HD, k_size = c->qk_norm == QK_NORM_ROW ? KV : HD;
    if (c->qk_norm == QK_NORM_NONE) {
        copy_rows(s->rotated, QK, s->qkv, QKV, N, QK);
        return;
    }
    float eps = (float)c->rms_norm_eps;
    rmsnorm_forward(s->rotated, QK, s->q_rstd, s->qkv, QKV, w->q_norm, N, Q / q_size, q_size, eps);
    rmsnorm_forward(s->rotated + Q, QK, s->k_rstd, s->qkv + Q, QKV, w->k_norm, N, KV / k_size, k_size, eps);
}

// from scratch.drotated to the queries and keys of scratch.dqkv
static void qk_norm_backward(const Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    const LayerActivations* s = &m->layers[l];
    const Scratch* t = &m->scratch;
    int N = m->batch * m->length, HD = c->head_dim, Q = c->num_heads * HD, KV = c->num_kv_heads * HD;
    long QKV = qkv_width(c), QK = Q + KV;
    int q_size = c->qk_norm == QK_NORM_ROW ? Q : HD, k_size = c->qk_norm == QK_NORM_ROW ? KV : HD;
    if (c->qk_norm == QK_NORM_NONE) {
        copy_rows(t->dqkv, QKV, t->drotated, QK, N, QK);
        return;
    }
    rmsnorm_backward(t->dqkv, QKV, 0, dw->q_norm, t->drotated, QK, s->qkv, QKV, w->q_norm, s->q_rstd, N,
                     Q / q_size, q_size, t->norm_sums);
    rmsnorm_backward(t->dqkv + Q, QKV, 0, dw->k_norm, t->drotated + Q, QK, s->qkv + Q, QKV, w->k_norm,
                     s->k_rstd, N, KV / k_size, k_size, t->norm_sums);
}

// x_mid = x + Wo attention(rope(qknorm(Wq n1(x))), rope(qknorm(Wk n1(x))), Wv n1(x)), in five steps
static void attention_layer_forward(Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, T = m->length, H = c->hidden_size, HD = c->head_dim;
    int NH = c->num_heads, NKV = c->num_kv_heads, past = m->purpose == FOR_GENERATION ? m->cached : 0;
    float eps = (float)c->rms_norm_eps;
    long QK = (long)(NH + NKV) * HD;
    // 1. attn_in = n1(x)
    rmsnorm_forward(s->attn_in, H, s->attn_rstd, s->x, H, w->attn_norm, N, 1, H, eps);
    // 2. (q, k, v) = W_qkv attn_in; in some models + b, as dx += dy W: dy = ones (N, 1), W = b (1, QKV)
    matmul_forward(s->qkv, s->attn_in, w->qkv, N, H, qkv_width(c));
    if (w->qkv_bias) IN_FP32(matmul_backward_input(s->qkv, m->ones, w->qkv_bias, N, qkv_width(c), 1, 1));
    // 3. rotated = rope(qknorm(q)), rope(qknorm(k))
    qk_norm_forward(m, l);
    rope(s->rotated, QK, NH + NKV, N, T, past, HD, m->cosines, m->sines, 1);
    // 4. attn_i = sum over j <= i of p_ij v_j
    KeysValues kv = layer_keys_values(m, l);
    attention_forward(s->attn, s->lse, s->rotated, QK, kv.k, kv.ld_k, kv.v, kv.ld_v, m->batch, T, past + T,
                      NH, NKV, HD, m->scratch.attention);
    // 5. x_mid = x + W_o attn
    matmul_forward(s->x_mid, s->attn, w->attn_out, N, NH * HD, H);
    add_rows(s->x_mid, s->x, N, H);
}

// In: scratch.dx, the gradient of x_mid. Out: scratch.dx, the gradient of x. The five steps, from the last.
static void attention_layer_backward(Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, T = m->length, H = c->hidden_size, HD = c->head_dim;
    int NH = c->num_heads, NKV = c->num_kv_heads, QKV = qkv_width(c);
    long QK = (long)(NH + NKV) * HD;
    // 5 was  x_mid = x + W_o attn;  the gradient of x stays in dx
    matmul_backward_input(t->dattn, t->dx, w->attn_out, N, NH * HD, H, 0);
    matmul_backward_weight(dw->attn_out, t->dx, s->attn, N, NH * HD, H);
    // 4 was  attn_i = sum over j <= i of p_ij v_j
    KeysValues kv = layer_keys_values(m, l);
    attention_backward(t->drotated, t->drotated + NH * HD, t->dqkv + QK, t->dattn, s->attn, s->lse,
                       s->rotated, QK, kv.k, kv.ld_k, kv.v, kv.ld_v, QK, QKV, m->batch, T, NH, NKV, HD,
                       t->attention);
    // 3 was  rotated = rope(qknorm(q)), rope(qknorm(k));  a rotation's gradient is the rotation back
    rope(t->drotated, QK, NH + NKV, N, T, 0, HD, m->cosines, m->sines, -1);
    qk_norm_backward(m, l);
    // 2 was  (q, k, v) = W_qkv attn_in
    matmul_backward_input(t->dnormed, t->dqkv, w->qkv, N, H, QKV, 0);
    matmul_backward_weight(dw->qkv, t->dqkv, s->attn_in, N, H, QKV);
    if (w->qkv_bias) IN_FP32(matmul_backward_weight(dw->qkv_bias, t->dqkv, m->ones, N, 1, QKV));
    // 1 was  attn_in = n1(x)
    rmsnorm_backward(t->dx, H, 1, dw->attn_norm, t->dnormed, H, s->x, H, w->attn_norm, s->attn_rstd, N, 1, H,
                     t->norm_sums);
}

#include "dev/lib/routers.h"      // routers other than softmax top-K
#include "dev/lib/load.h"         // count_balance, and what experts did, for reports

// out += gate f(ffn_in), the shared expert of Qwen2-MoE and Dots1:  gate = sigmoid(w_gate ffn_in), or 1
static void shared_expert_forward(Model* m, int l, float* out) {
    const LayerWeights* w = &m->weights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = m->config.hidden_size, S = shared_width(&m->config, l);
    float* g = s->shared_gates;
    if (w->shared_gate) IN_FP32(matmul_forward(g, s->ffn_in, w->shared_gate, N, H, 1));
    for (int n = 0; w->shared_gate && n < N; n++) g[n] = 1.0f / (1.0f + fast_exp(-g[n]));
    matmul_forward(s->shared_gate_up, s->ffn_in, w->shared_gate_up, N, H, 2 * S);
    swiglu_forward(t->act, s->shared_gate_up, N, S);
    matmul_forward(t->y_rows, t->act, w->shared_down, N, S, H);
    combine_rows(out, out, t->y_rows, g, m->identity, N, 1, H);
}

// In: scratch.dx, the gradient of the layer's output. Adds to dnormed, that of ffn_in.
static void shared_expert_backward(Model* m, int l) {
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = m->config.hidden_size, S = shared_width(&m->config, l);
    float *g = s->shared_gates, *dz = t->dgates, *dgate_up = s->shared_gate_up;
    matmul_backward_input(t->dact, t->dx, w->shared_down, N, S, H, 0);
    swiglu_backward(dgate_up, t->gated_act, dz, t->dact, s->shared_gate_up, g, m->identity, N, S);
    matmul_backward_weight(dw->shared_down, t->dx, t->gated_act, N, S, H);
    matmul_backward_weight(dw->shared_gate_up, dgate_up, s->ffn_in, N, H, 2 * S);
    matmul_backward_input(t->dnormed, dgate_up, w->shared_gate_up, N, H, 2 * S, 1);
    if (!w->shared_gate) return;
    for (int n = 0; n < N; n++) dz[n] *= g[n] * (1.0f - g[n]);          // until here it was dgate
    IN_FP32(matmul_backward_weight(dw->shared_gate, dz, s->ffn_in, N, H, 1));
    IN_FP32(matmul_backward_input(t->dnormed, dz, w->shared_gate, N, H, 1, 1));
}

// From ffn_in to the token's experts and gates, and the rows of each expert.
static void router_forward(Model* m, int l) {
    const Config* c = &m->config;
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, H = c->hidden_size, E = c->num_experts, K = m->topk[l];
    if (has_router_variant(c)) {
        variant_router_forward(m, l);
    } else {
        matmul_forward(s->router_logits, s->ffn_in, m->weights.layers[l].router, N, H, E);
        softmax_router_forward(s->probs, s->router_lse, s->experts, s->gates, s->router_logits, N, E, K,
                               c->norm_topk_prob);
    }
    group_by_expert(s->offsets, s->assignment, s->row_of, s->experts, N, K, E);
    count_balance(m, l);
}

// In: scratch.dgates, and in scratch.dnormed the gradient of what the experts read. Out: dnormed, of ffn_in.
static void router_backward(Model* m, int l, float scale) {
    const Config* c = &m->config;
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = c->hidden_size, E = c->num_experts, K = m->topk[l];
    // the balance loss's f and the weights of both losses, see balance_backward
    int per_layer = m->balance.aux_form == AUX_SWITCH;
    double tokens = per_layer ? N : (double)N * count_sparse(c), z_weight = 2.0 * scale * m->balance.z / N;
    double aux = m->balance.adaptive ? m->aux_coefficients[l] : m->balance.aux,
           aux_weight = scale * aux * E / tokens;
    for (int e = 0; e < E; e++)
        t->balance[e] = per_layer ? (s->offsets[e + 1] - s->offsets[e]) / (double)s->offsets[E]
                                  : m->all_counts[e] / tokens;
    if (has_router_variant(c)) {
        variant_router_backward(m, l, t->balance, aux_weight, z_weight, scale);
        return;
    }
    softmax_router_backward(t->drouter, t->dgates, s->probs, s->experts, s->gates, N, E, K,
                            c->norm_topk_prob);
    balance_backward(t->drouter, s->router_lse, s->probs, t->balance, aux_weight, z_weight, N, E);
    matmul_backward_input(t->dnormed, t->drouter, m->weights.layers[l].router, N, H, E, 1);
    matmul_backward_weight(m->dweights.layers[l].router, t->drouter, s->ffn_in, N, H, E);
}

// out = x_mid + sum over the token's experts of gate f(n2(x_mid)), in five steps. A dense layer skips the
// second: all rows are its one expert's, in the tokens' order, with gates of 1.
static void ffn_layer_forward(Model* m, int l, float* out) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = c->hidden_size, I = layer_width(c, l);
    int E = layer_experts(c, l), K = m->topk[l];
    long gate_up_size = (long)2 * I * H, down_size = (long)H * I;       // of one expert
    // 1. ffn_in = n2(x_mid)
    rmsnorm_forward(s->ffn_in, H, s->ffn_rstd, s->x_mid, H, w->ffn_norm, N, 1, H, (float)c->rms_norm_eps);
    // 2. z = W_router ffn_in,  p = softmax z,  gates = p of the K best
    if (c->sparse[l]) IN_FP32(router_forward(m, l));
    else s->offsets[0] = 0, s->offsets[1] = N;
    // 3. x_row = ffn_in of the row's token (with LPR lpr_input);  each expert's rows lie together
    gather_rows(t->x_rows, experts_input(m, l), s->assignment, s->offsets[E], K, H);
    // 4. (g, u) = W_gate_up x,  act = silu(g) u,  y = W_down act:  each expert on its own rows
    grouped_matmul_forward(s->gate_up, t->x_rows, w->gate_up, gate_up_size, H, 2 * I, E, s->offsets);
    swiglu_forward(t->act, s->gate_up, s->offsets[E], I);
    grouped_matmul_forward(t->y_rows, t->act, w->down, down_size, I, H, E, s->offsets);
    // 5. out_n = x_mid_n + sum over k of gate_nk y_row(n,k)
    combine_rows(out, s->x_mid, t->y_rows, s->gates, s->row_of, N, K, H);
    if (m->observe) m->observe(m, l);           // while act and y_rows are the experts'
    if (shared_width(c, l) > 0) shared_expert_forward(m, l, out);
}

// In: scratch.dx, the gradient of the layer's output; out: that of x_mid. The five steps, from the last.
static void ffn_layer_backward(Model* m, int l, float scale) {
    const Config* c = &m->config;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = c->hidden_size, I = layer_width(c, l);
    int E = layer_experts(c, l), K = m->topk[l], R = s->offsets[E];
    long gate_up_size = (long)2 * I * H, down_size = (long)H * I;       // of one expert
    // 5 was  out_n = x_mid_n + sum over k of gate_nk y_row(n,k).  dy_row = dx of its token
    gather_rows(t->dy_rows, t->dx, s->assignment, R, K, H);
    // 4 was  (g, u) = W_gate_up x,  act = silu(g) u,  y = W_down act;  x_rows was not kept, gates join here
    gather_rows(t->x_rows, experts_input(m, l), s->assignment, R, K, H);
    grouped_matmul_backward_input(t->dact, t->dy_rows, w->down, down_size, I, H, E, s->offsets, 0);
    float* dgate_up = s->gate_up;       // it is read for the last time: its gradient takes its place
    swiglu_backward(dgate_up, t->gated_act, t->dgates, t->dact, s->gate_up, s->gates, s->assignment, R, I);
    grouped_matmul_backward_weight(dw->down, t->dy_rows, t->gated_act, down_size, I, H, E, s->offsets);
    grouped_matmul_backward_weight(dw->gate_up, dgate_up, t->x_rows, gate_up_size, H, 2 * I, E, s->offsets);
    grouped_matmul_backward_input(t->dx_rows, dgate_up, w->gate_up, gate_up_size, H, 2 * I, E, s->offsets, 0);
    // 3 was  x_row = ffn_in of the row's token.  A token's gradient is the sum over its rows.
    combine_rows(t->dnormed, NULL, t->dx_rows, NULL, s->row_of, N, K, H);
    // 2 was  z = W_router ffn_in,  p = softmax z,  gates = p of the K best
    if (c->sparse[l]) IN_FP32(router_backward(m, l, scale));
    if (shared_width(c, l) > 0) shared_expert_backward(m, l);           // after the router: it reuses dgates
    // 1 was  ffn_in = n2(x_mid)
    rmsnorm_backward(t->dx, H, 1, dw->ffn_norm, t->dnormed, H, s->x_mid, H, w->ffn_norm, s->ffn_rstd, N, 1, H,
                     t->norm_sums);
}

// Runs B sequences of T tokens (B T) through the model. With targets (B T), the next tokens, it returns the
// mean cross-entropy in nats; with NULL, logits alone. In generation (B = 1) tokens follow the cached ones.
static double model_forward(Model* m, const int* tokens, const int* targets, int B, int T) {
    const Config* c = &m->config;
    int N = B * T, H = c->hidden_size, V = c->vocab_size, E = c->num_experts;
    if (m->backend->forward) return m->backend->forward(m, tokens, targets, B, T);
    m->batch = B;
    m->length = T;
    memcpy(m->tokens, tokens, sizeof(int) * N);
    m->aux_loss = m->z_loss = m->lpr_loss = m->loss = 0;
    for (int e = 0; e < E; e++) m->all_counts[e] = m->all_probs[e] = 0;
    embedding_forward(m->layers[0].x, m->tokens, m->weights.embedding, N, H);
    for (int l = 0; l < c->num_layers; l++) {
        attention_layer_forward(m, l);
        ffn_layer_forward(m, l, l + 1 < c->num_layers ? m->layers[l + 1].x : m->final_in);
        if (m->counting_load && c->sparse[l]) observe_layer(m, l);
    }
    if (m->balance.aux_form == AUX_HF && count_sparse(c) > 0) {
        double tokens_seen = (double)N * count_sparse(c);
        for (int e = 0; e < E; e++)
            m->aux_loss += E * m->all_counts[e] / tokens_seen * m->all_probs[e] / tokens_seen;
    }
    int wanted = N;                     // rows of logits
    const float* x = m->final_in;
    if (m->purpose == FOR_GENERATION) {
        m->cached += T;
        wanted = 1;
        x += (long)(N - 1) * H;
    }
    rmsnorm_forward(m->final_out, H, m->final_rstd, x, H, m->weights.final_norm, wanted, 1, H,
                    (float)c->rms_norm_eps);
    matmul_forward(m->logits, m->final_out, m->weights.lm_head, wanted, H, V);
    if (!targets) return 0;
    memcpy(m->targets, targets, sizeof(int) * N);
    cross_entropy_forward(m->losses, m->losses_lse, m->logits, m->targets, N, V);
    for (int n = 0; n < N; n++) m->loss += m->losses[n];
    m->loss /= N;
    m->sums.loss += m->loss;
    m->sums.aux += m->aux_loss;
    m->sums.z += m->z_loss;
    m->sums.lpr += m->lpr_loss;
    m->sums.passes++;
    return m->loss;
}

// Adds to the gradients that of  scale * (loss + aux * aux_loss + z * z_loss + lpr_loss)  of the last forward
// pass, which must have had targets. It uses up the activations: the logits become their gradient.
static void model_backward(Model* m, float scale) {
    const Config* c = &m->config;
    int N = m->batch * m->length, H = c->hidden_size, V = c->vocab_size;
    Scratch* t = &m->scratch;
    if (m->backend->backward) {
        m->backend->backward(m, scale);
        return;
    }
    cross_entropy_backward(m->logits, m->losses_lse, m->targets, N, V, scale / N);
    matmul_backward_input(t->dnormed, m->logits, m->weights.lm_head, N, H, V, 0);
    matmul_backward_weight(m->dweights.lm_head, m->logits, m->final_out, N, H, V);
    rmsnorm_backward(t->dx, H, 0, m->dweights.final_norm, t->dnormed, H, m->final_in, H,
                     m->weights.final_norm, m->final_rstd, N, 1, H, t->norm_sums);
    for (int l = c->num_layers - 1; l >= 0; l--) {
        ffn_layer_backward(m, l, scale);
        attention_layer_backward(m, l);
    }
    embedding_backward(m->dweights.embedding, t->dx, m->tokens, N, H);
}

// The 2-norm of all gradients: squares are summed by fixed blocks, in order: any number of threads agrees.
static double gradient_norm(Model* m) {
    long total = m->layout.total, blocks = norm_blocks(m);
    #pragma omp parallel for
    for (long b = 0; b < blocks; b++)
        m->scratch.norms[b] =
            sum_of_block(m->grads + b * NORM_BLOCK, lmin(NORM_BLOCK, total - b * NORM_BLOCK));
    double sum = 0;
    for (long b = 0; b < blocks; b++) sum += m->scratch.norms[b];
    return sqrt(sum);
}

// One AdamW step (Loshchilov and Hutter 2019) on n parameters, with g the gradient times `clip_scale`:
//     m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//     w -= lr (m / correction1) / (sqrt(v / correction2) + eps) + lr decay w;  correction_i = 1 - beta_i^step
// and the gradient is cleared for the next step while it is at hand.
static void adamw(float* w, float* grad, float* m, float* v, long n, float clip_scale, float lr, float decay,
                  float beta1, float beta2, float eps, float correction1, float correction2) {
    float rate = lr / correction1, root = 1.0f / sqrtf(correction2), keep = 1.0f - lr * decay;
    #pragma omp parallel for simd schedule(static)
    for (long i = 0; i < n; i++) {
        float g = grad[i] * clip_scale;
        float m_i = beta1 * m[i] + (1.0f - beta1) * g, v_i = beta2 * v[i] + (1.0f - beta2) * g * g;
        m[i] = m_i;
        v[i] = v_i;
        w[i] = keep * w[i] - rate * m_i / (sqrtf(v_i) * root + eps);
        grad[i] = 0;
    }
}

// Updates the parameters and clears the gradients; step counts from 1. Weight decay is for matrices alone.
// Returns the norm of the gradients before they were clipped; if it is not finite, nothing is updated.
static double model_update(Model* m, const AdamW* o, double lr, long step) {
    if (m->backend->update) return m->backend->update(m, o, lr, step);
    double norm = gradient_norm(m), scale = 1;
    if (!isfinite(norm)) return norm;
    if (o->clip > 0 && norm + 1e-6 > o->clip) scale = o->clip / (norm + 1e-6);          // as clip_grad_norm_
    float correction1 = (float)(1 - pow(o->beta1, (double)step)),
          correction2 = (float)(1 - pow(o->beta2, (double)step));
    long matrices = m->layout.matrices, vectors = m->layout.total - matrices;     // matrices lie first
    adamw(m->params, m->grads, m->exp_avg, m->exp_avg_sq, matrices, (float)scale, (float)lr,
          (float)o->weight_decay, (float)o->beta1, (float)o->beta2, (float)o->eps, correction1, correction2);
    adamw(m->params + matrices, m->grads + matrices, m->exp_avg + matrices, m->exp_avg_sq + matrices, vectors,
          (float)scale, (float)lr, 0, (float)o->beta1, (float)o->beta2, (float)o->eps, correction1,
          correction2);
    return norm;
}

// -----------------------------------------------------------------------------------------------------------
// 6. Training loop

#include "dev/lib/data.h"         // texts and shards of tokens
#include "dev/lib/checkpoint.h"   // Hugging Face directories
#include "dev/lib/sampling.h"     // generation

typedef enum { WSD, COSINE, CONSTANT } Schedule;

// All that decides what a run computes; --resume reads it back from trainer.json.
typedef struct {
    const char* data;
    const char* val;                    // NULL: the last tenth of a raw text; "none": no validation
    long steps;                         // in all, also after a resume
    int B, T, accum;                    // sequences, their length, micro-batches in a step
    double lr, min_lr, decay_frac;
    long warmup;
    Schedule schedule;
    AdamW adamw;
    uint64_t seed;
    long val_every, val_batches, save_every, sample_every;
    Position begun;                     // where this process began
    Sampling sampling;
    int sample_tokens;
    RouterSchedule routers;             // what of a router changes from step to step, routers.h
} Run;

// The learning rate of step 0, 1, ..: a linear rise over `warmup` steps, then `lr`, except for
//     WSD       (warmup, stable, decay)  a linear fall to min_lr over the last decay_frac of all steps
//     COSINE    half a cosine wave down to min_lr
static double learning_rate(const Run* r, long step) {
    if (step < r->warmup) return r->lr * (double)(step + 1) / (double)r->warmup;
    if (r->schedule == COSINE) {
        double done =
            (double)(step - r->warmup) / (double)(r->steps - r->warmup > 0 ? r->steps - r->warmup : 1);
        return r->min_lr + (r->lr - r->min_lr) * 0.5 * (1 + cos(M_PI * (done < 1 ? done : 1)));
    }
    if (r->schedule == WSD) {
        double decay_steps = r->decay_frac * (double)r->steps, left = (double)(r->steps - step);
        if (left < decay_steps) return r->min_lr + (r->lr - r->min_lr) * (left > 0 ? left : 0) / decay_steps;
    }
    return r->lr;
}

// What one step did.
typedef struct {
    double lr, norm, seconds;           // norm: of the gradient, before it was clipped
    Losses mean;                        // over the step's micro-batches
    const char *problem, *advice;       // NULL, or why nothing was updated, and what may help
} Step;

// Step number `step`, counted from 0. The micro-batches' gradients add up to that of the mean of their
// losses. All data are read before anything is computed: if they are bad, the model stays as it is.
static Step train_step(Model* m, const Run* run, Dataset* data, Batch batch, long step) {
    Step s = {learning_rate(run, step), NAN, seconds(), {NAN, 0, 0, 0, 0}, NULL, ""};   // seconds: the start
    long sequences = (long)run->B * run->accum;
    long first = position_after(run->begun, step, sequences, run->T).sequences;
    for (long i = 0; i < sequences && !s.problem; i++)
        if (!dataset_training_sequence(data, run->seed, first + i, batch.tokens + i * run->T,
                                       batch.targets + i * run->T)) s.problem = data->error;
    if (s.problem) return s;
    router_before_step(m, &run->routers, run->seed, step);
    m->noise_step = step * run->accum;  // the number of the pass, for LPR's noise
    m->counting_load = 1;
    for (int micro = 0; micro < run->accum; micro++) {
        long at = (long)micro * run->B * run->T;
        model_forward(m, batch.tokens + at, batch.targets + at, run->B, run->T);
        m->noise_step++;
        model_backward(m, 1.0f / run->accum);
    }
    m->counting_load = 0;
    s.norm = model_update(m, &run->adamw, s.lr, step + 1);        // if it is not finite, nothing is updated
    s.mean = take_losses(m);
    if (!isfinite(s.norm)) {            // (an infinite loss has no finite gradient)
        s.problem = isfinite(s.mean.loss) ? "the gradient is not finite" : "the loss is not finite";
        s.advice = "; try a lower --lr";
        return s;
    }
    router_after_step(m, &run->routers, step + 1);
    s.seconds = seconds() - s.seconds;
    return s;
}

#include "dev/lib/log.h"          // csv files, what is printed

// Trains from run->begun to run->steps. out, val and generator may be NULL: then nothing is written,
// validated or sampled. Returns the exit code: 0, 1 after a failure, 128 + its number after a signal. A step
// is saved before it is validated; --resume makes up for a validation that was not finished.
static int train(Model* m, const Run* run, Dataset* data, Dataset* val, Model* generator, const char* out) {
    Batch batch = batch_create((long)run->B * run->accum, run->T);
    Reports r = reports_open(m, run, val, out);
    catch_signals();
    Step s = {0, 0, 0, {0, 0, 0, 0, 0}, resume_validation(&r, m, val, batch), ""};
    int exit_code = s.problem ? report_problem(&r, m, &s, r.first_step, 0) : 0, stopping = stop_signal != 0;
    if (r.first_step >= run->steps && !exit_code && !stopping) exit_code = nothing_to_do(&r, m);
    for (long step = r.first_step; step < run->steps && !stopping && !exit_code; step++) {
        long done = step + 1;
        int last = done == run->steps;
        s = train_step(m, run, data, batch, step);
        if (s.problem) {
            exit_code = report_problem(&r, m, &s, step, 1);
            break;
        }
        report_step(&r, &s, done);
        if (out && (last || is_due(run->save_every, done))) save_step(&r, m, done);
        if ((last || is_due(run->val_every, done)) && !stop_signal)
            s.problem = validate(&r, m, val, batch, done);
        if (generator && is_due(run->sample_every, done) && !stop_signal) {
            end_progress();
            print_sample(generator, m, &run->sampling, run->sample_tokens);
        }
        if (s.problem) exit_code = report_problem(&r, m, &s, done, 0);
        stopping = stop_signal && !(last && r.validated == done);   // all done: nothing to stop
        if (out && stopping && r.tried < done) save_step(&r, m, done);
    }
    end_progress();
    if (stopping && !exit_code) exit_code = report_signal(&r);
    if (r.saved < r.tried) exit_code = 1;           // the last save failed
    reports_close(&r);
    free(batch.tokens);
    return exit_code;
}

#include "dev/lib/card.h"         // what other programs and readers want beside a model
#include "dev/lib/options.h"      // the command line

int train_moe_main(int argc, char** argv) {
    begin_program("train_moe");
    options_parse(argc, argv);
    return run_command();
}

#ifndef TRAIN_MOE_NO_MAIN
int main(int argc, char** argv) { return train_moe_main(argc, argv); }
#endif
#endif
