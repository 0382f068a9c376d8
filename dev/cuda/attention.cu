/*
attention.cu: attention on a GPU, from the definition to the kernels of train_moe.cu in four steps. Causal, with grouped
queries: NH / NKV query heads share a head of keys and values. For every sequence, query head and position i

    s_ij = q_i k_j / sqrt(HD) for j <= i        p_ij = exp(s_ij) / sum_j exp(s_ij)        out_i = sum_j p_ij v_j

and, given dout, the gradient of the loss with respect to out,

    dv_j = sum_i p_ij dout_i        dp_ij = dout_i v_j        ds_ij = p_ij (dp_ij - D_i)        D_i = sum_j p_ij dp_ij
    dq_i = sum_j ds_ij k_j / sqrt(HD)        dk_j = sum_i ds_ij q_i / sqrt(HD)

D_i is there because raising one score lowers all other p. Since sum_j p_ij (dout_i v_j) = dout_i (sum_j p_ij v_j), it
is also D_i = dout_i out_i: HD multiply-adds, and no p.

    q, out, dq, dout    (B, T, NH, HD)
    k, v, dk, dv        (B, T, NKV, HD)
    lse, D              (B, NH, T)          lse_i = log sum_j exp(s_ij), from which the backward pass makes p again

The forward pass has two products, s and out: 4 HD operations for each pair of a query and a key, and half of the T^2
pairs are masked, 2 B NH T^2 HD operations in all. The backward pass has five, s again, dp, dv, dq and dk: 2.5 times as
many. The TFLOP/s printed are these numbers divided by the time, whatever else a step computes on the way.

    attention                               checks every step against sums in double precision
    attention T [NH [NKV [HD [B]]]]         times them as well, by default with NH = 16, NKV = 4, HD = 128, B = 4

In the project's directory, on Hopper; on others with -arch=native (dev/cuda/lessons.sh checks it without a GPU):

    nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -diag-suppress 177 -I. dev/cuda/attention.cu \
        -o attention -lcublas
*/
#define TRAIN_MOE_NO_MAIN
#include "../../train_moe.cu"
#include <functional>
#include <vector>

struct Shape { int B, T, NH, NKV, HD; };

// In the GPU's memory. Steps 1 to 3 are in float; step 4 is in float and in bf16.
template <class T> struct Arrays {
    T *q, *k, *v, *dout;
    T *out, *dq, *dk, *dv;
    float *lse, *D;
    float *p, *ds;      // (B, NH, T, T), only of step 1
};

// ---------------------------------------------------------------------------------------------------------------------
// Step 1: the definition
//
// A kernel for each formula, a thread for each number, and p, T x T for every head, in memory.
//
// What is wrong with it is the traffic. Each of the B NH T^2 scores is written, read by softmax, written as p, and read
// again for out. At T = 4096 with 16 heads that is 4 times 1.07 GB for a sequence, 1.4 ms of an H100's memory (3 TB/s);
// the arithmetic, 69 GFLOP with HD = 128, would take its tensor cores 0.09 ms. And until the backward pass has come by,
// p must be kept: 1.07 GB for each layer.

// s (B, NH, T, T); scores of keys that a query may not see are -infinity
__global__ void scores_kernel(float* s, const float* q, const float* k, int T, int NH, int NKV, int HD) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y, h = blockIdx.z % NH, b = blockIdx.z / NH;
    if (j >= T) return;
    const float* q_i = q + (((long)b * T + i) * NH + h) * HD;
    const float* k_j = k + (((long)b * T + j) * NKV + h / (NH / NKV)) * HD;
    float sum = 0;
    if (j <= i)
        for (int d = 0; d < HD; d++) sum += q_i[d] * k_j[d];
    s[((long)blockIdx.z * T + i) * T + j] = j <= i ? sum / sqrtf((float)HD) : -INFINITY;
}

// s (rows, T) becomes p, in place; a warp for each row. The largest score is subtracted from all, because exp(89) is
// more than a float can hold; in the quotient it cancels.
__global__ void softmax_kernel(float* s, float* lse, int T, long rows) {
    long row = ((long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    float *s_i = s + row * T, largest = -INFINITY, sum = 0;
    for (int j = threadIdx.x % 32; j < T; j += 32) largest = fmaxf(largest, s_i[j]);
    largest = warp_max(largest);
    for (int j = threadIdx.x % 32; j < T; j += 32) sum += expf(s_i[j] - largest);
    sum = warp_sum(sum);
    for (int j = threadIdx.x % 32; j < T; j += 32) s_i[j] = expf(s_i[j] - largest) / sum;
    if (threadIdx.x % 32 == 0) lse[row] = largest + logf(sum);
}

// x_i = factor sum_j<=i w_ij y_j: out (w = p, y = v), dq (w = ds, y = k). x (B, T, NH, HD), w (B, NH, T, T), y (B, T,
// NKV, HD). A block shares i, and its threads have neighbouring columns d, so that a warp reads y in one piece.
__global__ void rows_kernel(float* x, const float* w, const float* y, float factor, int T, int NH, int NKV, int HD) {
    int i = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
    const float *w_i = w + (((long)b * NH + h) * T + i) * T, *y_b = y + ((long)b * T * NKV + h / (NH / NKV)) * HD;
    for (int d = threadIdx.x; d < HD; d += blockDim.x) {
        float sum = 0;
        for (int j = 0; j <= i; j++) sum += w_i[j] * y_b[(long)j * NKV * HD + d];
        x[(((long)b * T + i) * NH + h) * HD + d] = factor * sum;
    }
}

static void step1_forward(const Arrays<float>& a, Shape s) {
    long rows = (long)s.B * s.NH * s.T;
    scores_kernel<<<dim3(ceil_div(s.T, 128), s.T, s.B * s.NH), 128>>>(a.p, a.q, a.k, s.T, s.NH, s.NKV, s.HD);
    softmax_kernel<<<ceil_div(rows, 4), 128>>>(a.p, a.lse, s.T, rows);
    rows_kernel<<<dim3(s.T, s.NH, s.B), 64>>>(a.out, a.p, a.v, 1, s.T, s.NH, s.NKV, s.HD);
    CHECK(cudaGetLastError());
}

// D_i = dout_i out_i
__global__ void dot_kernel(float* D, const float* dout, const float* out, int T, int NH, int HD) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, b = blockIdx.z;
    if (i >= T) return;
    long at = (((long)b * T + i) * NH + h) * HD;
    float sum = 0;
    for (int d = 0; d < HD; d++) sum += dout[at + d] * out[at + d];
    D[((long)b * NH + h) * T + i] = sum;
}

// ds (B, NH, T, T)
__global__ void ds_kernel(float* ds, const float* p, const float* D, const float* dout, const float* v, int T, int NH,
                          int NKV, int HD) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y, h = blockIdx.z % NH, b = blockIdx.z / NH;
    if (j >= T) return;
    long row = (long)blockIdx.z * T + i;
    const float* dout_i = dout + (((long)b * T + i) * NH + h) * HD;
    const float* v_j = v + (((long)b * T + j) * NKV + h / (NH / NKV)) * HD;
    float dp = 0;
    if (j <= i)
        for (int d = 0; d < HD; d++) dp += dout_i[d] * v_j[d];
    ds[row * T + j] = j <= i ? p[row * T + j] * (dp - D[row]) : 0.0f;
}

// y_j = factor sum_i>=j w_ij x_i, over all query heads that share the key and value: dv (w = p, x = dout), dk (w = ds,
// x = q). Arrays as in rows_kernel. A thread owns its sum, so nothing is added from two sides.
__global__ void columns_kernel(float* y, const float* w, const float* x, float factor, int T, int NH, int NKV, int HD) {
    int j = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z, group = NH / NKV;
    for (int d = threadIdx.x; d < HD; d += blockDim.x) {
        float sum = 0;
        for (int h = kv_head * group; h < (kv_head + 1) * group; h++)
            for (int i = j; i < T; i++)
                sum += w[(((long)b * NH + h) * T + i) * T + j] * x[(((long)b * T + i) * NH + h) * HD + d];
        y[(((long)b * T + j) * NKV + kv_head) * HD + d] = factor * sum;
    }
}

static void step1_backward(const Arrays<float>& a, Shape s) {
    float scale = 1.0f / sqrtf((float)s.HD);
    dot_kernel<<<dim3(ceil_div(s.T, 64), s.NH, s.B), 64>>>(a.D, a.dout, a.out, s.T, s.NH, s.HD);
    ds_kernel<<<dim3(ceil_div(s.T, 128), s.T, s.B * s.NH), 128>>>(a.ds, a.p, a.D, a.dout, a.v, s.T, s.NH, s.NKV, s.HD);
    rows_kernel<<<dim3(s.T, s.NH, s.B), 64>>>(a.dq, a.ds, a.k, scale, s.T, s.NH, s.NKV, s.HD);
    columns_kernel<<<dim3(s.T, s.NKV, s.B), 64>>>(a.dk, a.ds, a.q, scale, s.T, s.NH, s.NKV, s.HD);
    columns_kernel<<<dim3(s.T, s.NKV, s.B), 64>>>(a.dv, a.p, a.dout, 1, s.T, s.NH, s.NKV, s.HD);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Step 2: online softmax, and no T x T matrix
//
// Softmax seems to need all scores before it can give the first p. But suppose that only some keys have been seen, with
// largest score m, total l = sum exp(s_j - m) and o = sum exp(s_j - m) v_j. A key with a larger score m' changes the
// unit in which l and o are measured, and nothing else. With m' the larger of m and s:
//
//     l <- l exp(m - m') + exp(s - m')        o <- o exp(m - m') + exp(s - m') v        m <- m'
//
// and at the end out = o / l, lse = m + log l (Milakov and Gimelshein 2018, arXiv 1805.02867; with o: FlashAttention,
// Dao et al. 2022, arXiv 2205.14135). The backward pass makes p again, as exp(s_ij - lse_i). That costs one more
// product, where storing p cost memory and traffic that grow with T^2.
//
// A warp owns a query, and its lanes share the columns of a row: lane l has columns l, l + 32, ... of q_i and of o.
// What is wrong with it: every warp reads all keys and values for one query. From the caches, mostly, but these are 2
// numbers or 8 bytes for 4 operations, half an operation per byte, with 5 shuffles for every score.

constexpr int MAX_COLUMNS = 4;      // of a lane, for HD up to 128

__global__ void online_kernel(float* out, float* lse, const float* q, const float* k, const float* v, int T, int NH,
                              int NKV, int HD) {
    int i = blockIdx.x, h = blockIdx.y, b = blockIdx.z, lane = threadIdx.x;
    long at = (((long)b * T + i) * NH + h) * HD, kv_at = ((long)b * T * NKV + h / (NH / NKV)) * HD;
    float scale = 1.0f / sqrtf((float)HD), largest = -INFINITY, total = 0, q_i[MAX_COLUMNS], sum[MAX_COLUMNS] = {};
    #pragma unroll
    for (int c = 0; c < MAX_COLUMNS; c++) q_i[c] = lane + 32 * c < HD ? q[at + lane + 32 * c] : 0.0f;
    for (int j = 0; j <= i; j++) {
        const float *k_j = k + kv_at + (long)j * NKV * HD, *v_j = v + kv_at + (long)j * NKV * HD;
        float score = 0;
        #pragma unroll
        for (int c = 0; c < MAX_COLUMNS; c++)
            if (lane + 32 * c < HD) score += q_i[c] * k_j[lane + 32 * c];
        score = scale * warp_sum(score);
        float new_largest = fmaxf(largest, score), shrink = expf(largest - new_largest), p = expf(score - new_largest);
        largest = new_largest;      // for the first key, shrink = exp(-infinity) = 0
        total = total * shrink + p;
        #pragma unroll
        for (int c = 0; c < MAX_COLUMNS; c++)
            if (lane + 32 * c < HD) sum[c] = sum[c] * shrink + p * v_j[lane + 32 * c];
    }
    #pragma unroll
    for (int c = 0; c < MAX_COLUMNS; c++)
        if (lane + 32 * c < HD) out[at + lane + 32 * c] = sum[c] / total;
    if (lane == 0) lse[((long)b * NH + h) * T + i] = largest + logf(total);
}

static void step2_forward(const Arrays<float>& a, Shape s) {
    online_kernel<<<dim3(s.T, s.NH, s.B), 32>>>(a.out, a.lse, a.q, a.k, a.v, s.T, s.NH, s.NKV, s.HD);
    CHECK(cudaGetLastError());
}

// {p_ij, ds_ij} of one pair, for a whole warp
__device__ static float2 recompute(const float* q_i, const float* k_j, const float* dout_i, const float* v_j,
                                   float lse_i, float D_i, int HD) {
    float score = 0, dp = 0;
    for (int d = threadIdx.x; d < HD; d += 32) score += q_i[d] * k_j[d], dp += dout_i[d] * v_j[d];
    float p = expf(warp_sum(score) / sqrtf((float)HD) - lse_i);
    return make_float2(p, p * (warp_sum(dp) - D_i));
}

// dq belongs to a query, dk and dv to a key. A kernel that visits each pair once has to add to one of them from many
// warps at the same time, with atomics: in an order that changes from run to run, and the rounded sums with it. Two
// kernels, one for each owner, visit each pair twice, and the same input gives the same bits.
__global__ void dq_kernel(float* dq, const float* dout, const float* lse, const float* D, const float* q,
                          const float* k, const float* v, int T, int NH, int NKV, int HD) {
    int i = blockIdx.x, h = blockIdx.y, b = blockIdx.z, lane = threadIdx.x;
    long at = (((long)b * T + i) * NH + h) * HD, kv_at = ((long)b * T * NKV + h / (NH / NKV)) * HD;
    long stat = ((long)b * NH + h) * T + i;
    float sum[MAX_COLUMNS] = {};
    for (int j = 0; j <= i; j++) {
        long at_j = kv_at + (long)j * NKV * HD;
        float ds = recompute(q + at, k + at_j, dout + at, v + at_j, lse[stat], D[stat], HD).y;
        #pragma unroll
        for (int c = 0; c < MAX_COLUMNS; c++)
            if (lane + 32 * c < HD) sum[c] += ds * k[at_j + lane + 32 * c];
    }
    #pragma unroll
    for (int c = 0; c < MAX_COLUMNS; c++)
        if (lane + 32 * c < HD) dq[at + lane + 32 * c] = sum[c] / sqrtf((float)HD);
}

__global__ void dk_dv_kernel(float* dk, float* dv, const float* dout, const float* lse, const float* D, const float* q,
                             const float* k, const float* v, int T, int NH, int NKV, int HD) {
    int j = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z, group = NH / NKV, lane = threadIdx.x;
    long at_j = (((long)b * T + j) * NKV + kv_head) * HD;
    float dk_sum[MAX_COLUMNS] = {}, dv_sum[MAX_COLUMNS] = {};
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++)
        for (int i = j; i < T; i++) {
            long at = (((long)b * T + i) * NH + h) * HD, stat = ((long)b * NH + h) * T + i;
            float2 p_ds = recompute(q + at, k + at_j, dout + at, v + at_j, lse[stat], D[stat], HD);
            #pragma unroll
            for (int c = 0; c < MAX_COLUMNS; c++)
                if (lane + 32 * c < HD) {
                    dv_sum[c] += p_ds.x * dout[at + lane + 32 * c];
                    dk_sum[c] += p_ds.y * q[at + lane + 32 * c];
                }
        }
    #pragma unroll
    for (int c = 0; c < MAX_COLUMNS; c++)
        if (lane + 32 * c < HD) {
            dk[at_j + lane + 32 * c] = dk_sum[c] / sqrtf((float)HD);
            dv[at_j + lane + 32 * c] = dv_sum[c];
        }
}

static void step2_backward(const Arrays<float>& a, Shape s) {
    dot_kernel<<<dim3(ceil_div(s.T, 64), s.NH, s.B), 64>>>(a.D, a.dout, a.out, s.T, s.NH, s.HD);
    dq_kernel<<<dim3(s.T, s.NH, s.B), 32>>>(a.dq, a.dout, a.lse, a.D, a.q, a.k, a.v, s.T, s.NH, s.NKV, s.HD);
    dk_dv_kernel<<<dim3(s.T, s.NKV, s.B), 32>>>(a.dk, a.dv, a.dout, a.lse, a.D, a.q, a.k, a.v, s.T, s.NH, s.NKV, s.HD);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Step 3: tiles in shared memory
//
// A block owns 32 queries, 4 in each of its 8 warps, and all warps work on the same 32 keys and values, which they have
// fetched together: a number read from the caches serves 32 queries, 16 operations per byte instead of a half.
//
// Within a warp a number read from shared memory serves 4 queries. For the scores a lane has a key for itself: the sum
// over HD needs no other lane, and the online softmax goes 32 keys at a time, with one exchange of the largest score
// and one of the total for all of them. For out the lanes change roles and have columns of v; lane j, which has p of
// key j, passes it around with a shuffle.
//
// Lanes that read column d of 32 keys want 32 different banks. Bank = address in floats modulo 32, so the distance
// between rows should be odd: HD, or HD + 1. With HD = 64 and no gap all 32 would wait for the same bank.
//
// Only the forward pass is shown. The backward pass is made of the same pieces: products of rows with a tile, weights,
// sums over a tile (attention_backward_q_kernel and attention_backward_kv_kernel of train_moe.cu).

constexpr int TILE = 32, ROWS = 4;      // queries of a block and keys in a tile; queries of a warp

__global__ void __launch_bounds__(256)
tiles_kernel(float* out, float* lse, const float* q, const float* k, const float* v, int T, int NH, int NKV, int HD) {
    extern __shared__ float shared[];
    int stride = HD | 1;
    float *q_tile = shared, *k_tile = q_tile + TILE * stride, *v_tile = k_tile + TILE * stride;
    // blocks start in this order: those with most keys first, so that the short ones fill the gaps at the end
    int h = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * TILE, b = blockIdx.z;
    int row = threadIdx.x / 32 * ROWS, lane = threadIdx.x % 32;     // the first query of this warp is first + row
    long kv_at = ((long)b * T * NKV + h / (NH / NKV)) * HD;
    float scale = 1.0f / sqrtf((float)HD), largest[ROWS], total[ROWS] = {}, sum[ROWS][MAX_COLUMNS] = {};
    #pragma unroll
    for (int r = 0; r < ROWS; r++) largest[r] = -INFINITY;
    for (int x = threadIdx.x; x < TILE * HD; x += 256) {
        int i = x / HD, d = x % HD;
        q_tile[i * stride + d] = first + i < T ? q[(((long)b * T + first + i) * NH + h) * HD + d] : 0.0f;
    }
    for (int j0 = 0; j0 <= first; j0 += TILE) {     // the tiles behind are masked for all queries of the block
        __syncthreads();                            // everybody is done with the last tile
        for (int x = threadIdx.x; x < TILE * HD; x += 256) {
            int j = x / HD, d = x % HD;
            bool exists = j0 + j < T;
            k_tile[j * stride + d] = exists ? k[kv_at + (long)(j0 + j) * NKV * HD + d] : 0.0f;
            v_tile[j * stride + d] = exists ? v[kv_at + (long)(j0 + j) * NKV * HD + d] : 0.0f;
        }
        __syncthreads();
        float p[ROWS] = {};                         // of key j0 + lane: first the score, then p
        for (int d = 0; d < HD; d++)
            #pragma unroll
            for (int r = 0; r < ROWS; r++) p[r] += q_tile[(row + r) * stride + d] * k_tile[lane * stride + d];
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            // the mask also hides keys that do not exist from all queries that do
            float score = j0 + lane <= first + row + r ? scale * p[r] : -INFINITY;
            float new_largest = fmaxf(largest[r], warp_max(score)), shrink = expf(largest[r] - new_largest);
            p[r] = expf(score - new_largest);
            largest[r] = new_largest;
            total[r] = total[r] * shrink + warp_sum(p[r]);
            #pragma unroll
            for (int c = 0; c < MAX_COLUMNS; c++) sum[r][c] *= shrink;
        }
        for (int j = 0; j < TILE; j++)
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float p_j = __shfl_sync(0xffffffffu, p[r], j);
                #pragma unroll
                for (int c = 0; c < MAX_COLUMNS; c++)
                    if (lane + 32 * c < HD) sum[r][c] += p_j * v_tile[j * stride + lane + 32 * c];
            }
    }
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int i = first + row + r;
        if (i >= T) continue;
        #pragma unroll
        for (int c = 0; c < MAX_COLUMNS; c++)
            if (lane + 32 * c < HD) out[(((long)b * T + i) * NH + h) * HD + lane + 32 * c] = sum[r][c] / total[r];
        if (lane == 0) lse[((long)b * NH + h) * T + i] = largest[r] + logf(total[r]);
    }
}

static void step3_forward(const Arrays<float>& a, Shape s) {
    size_t bytes = 3 * TILE * (s.HD | 1) * sizeof(float);
    allow_shared(tiles_kernel, bytes);
    tiles_kernel<<<dim3(s.NH, ceil_div(s.T, TILE), s.B), 256, bytes>>>(a.out, a.lse, a.q, a.k, a.v, s.T, s.NH, s.NKV,
                                                                      s.HD);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Step 4: section 4 of train_moe.cu, and for bf16 dev/lib/cuda/attention_bf16.cuh
//
// For floats it is step 3, with reads of 16 bytes, so that the scores spend less than half the time at shared memory,
// and its backward pass. For bf16 it is made for tensor cores:
//   - mma.sync multiplies 16 x 16 by 16 x 8 numbers in one instruction, with sums in float: 16 times the rate of floats
//     on an A100. The scores are as exact as before; for p v, p is rounded to bf16. A result of mma.sync lies in a
//     warp's registers just as its left operand must, so p stays where it is: no shared memory, no shuffles.
//   - A block owns 128 queries, 128 operations for each byte of k and v. A warp owns 32 of them, because on an A100
//     reading k and v from shared memory for 16 would take as long as multiplying them, on an H100 longer.
//   - cp.async copies the next tile to shared memory while the present one is multiplied.
//   - Pieces of 16 bytes trade places within their row ("swizzle"), so that the eight rows that ldmatrix reads at once
//     are in different banks without a gap.
//   - exp(s) is 2^(s log2 e), one instruction, and log2 e is part of the scale.
//   - A warp whose queries all come before the keys of a tile skips it; only tiles on the diagonal are masked.

// Between rows of dq and of dk there is one distance (in the model they are parts of one array): here NH HD for both.
template <class T> static void step4_forward(const Arrays<T>& a, Shape s) {
    long ld_q = (long)s.NH * s.HD, ld_kv = (long)s.NKV * s.HD;
    gpu_attention_forward<T>(a.out, a.lse, a.q, ld_q, a.k, ld_kv, a.v, ld_kv, s.B, s.T, s.T, s.NH, s.NKV, s.HD);
}
template <class T> static void step4_backward(const Arrays<T>& a, Shape s) {
    long ld_q = (long)s.NH * s.HD, ld_kv = (long)s.NKV * s.HD;
    gpu_attention_backward<T>(a.dq, a.dk, a.dv, a.D, a.dout, a.out, a.lse, a.q, ld_q, a.k, ld_kv, a.v, ld_kv, ld_q,
                              ld_kv, s.B, s.T, s.NH, s.NKV, s.HD);
}

// ---------------------------------------------------------------------------------------------------------------------
// The formulas in double precision

struct Reference { std::vector<double> out, lse, dq, dk, dv; };

static Reference attention_reference(const std::vector<float>& q, const std::vector<float>& k,
                                     const std::vector<float>& v, const std::vector<float>& dout, Shape s) {
    Reference r;
    r.out.assign(q.size(), 0), r.dq = r.out, r.dk.assign(k.size(), 0), r.dv = r.dk;
    r.lse.assign((size_t)s.B * s.NH * s.T, 0);
    double scale = 1 / sqrt((double)s.HD);
    for (int b = 0; b < s.B; b++)
        for (int h = 0; h < s.NH; h++)
            for (int i = 0; i < s.T; i++) {
                long at = ((long)(b * s.T + i) * s.NH + h) * s.HD;
                auto at_k = [&](int j) { return ((long)(b * s.T + j) * s.NKV + h / (s.NH / s.NKV)) * s.HD; };
                std::vector<double> p(i + 1), dp(i + 1);
                double largest = -INFINITY, sum = 0, D = 0;
                for (int j = 0; j <= i; j++) {
                    for (int d = 0; d < s.HD; d++) p[j] += scale * q[at + d] * k[at_k(j) + d];
                    for (int d = 0; d < s.HD; d++) dp[j] += (double)dout[at + d] * v[at_k(j) + d];
                    largest = fmax(largest, p[j]);
                }
                for (int j = 0; j <= i; j++) sum += p[j] = exp(p[j] - largest);
                for (int j = 0; j <= i; j++) p[j] /= sum, D += p[j] * dp[j];
                for (int j = 0; j <= i; j++)
                    for (int d = 0; d < s.HD; d++) {
                        double ds = p[j] * (dp[j] - D) * scale;
                        r.out[at + d] += p[j] * v[at_k(j) + d];
                        r.dq[at + d] += ds * k[at_k(j) + d];
                        r.dk[at_k(j) + d] += ds * q[at + d];
                        r.dv[at_k(j) + d] += p[j] * dout[at + d];
                    }
                r.lse[((long)b * s.NH + h) * s.T + i] = largest + log(sum);
            }
    return r;
}

static float number(float x) { return x; }
static float number(bf16 x) { return __bfloat162float(x); }

// The largest error of an array on the GPU, whose rows of `width` numbers are `ld` apart, relative to the largest
// number
template <class T> static double error_of(const T* on_gpu, const std::vector<double>& wanted, long width, long ld) {
    long rows = (long)wanted.size() / width;
    std::vector<T> x((rows - 1) * ld + width);
    CHECK(cudaMemcpy(x.data(), on_gpu, x.size() * sizeof(T), cudaMemcpyDeviceToHost));
    double worst = 0, largest = 0;
    for (long i = 0; i < rows * width; i++) {
        double error = fabs(number(x[i / width * ld + i % width]) - wanted[i]);
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
        largest = fmax(largest, fabs(wanted[i]));
    }
    return worst / largest;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checking and timing

struct LessonStep {
    const char* name;
    bool is_bf16;
    std::function<void()> forward, backward;
    int dk_heads;       // a row of dk has room for so many heads
};

template <class T> static T* device_array(long n) {
    T* p;
    CHECK(cudaMalloc((void**)&p, n * sizeof(T)));
    CHECK(cudaMemset(p, 0xff, n * sizeof(T)));      // NaN
    return p;
}
static float* copy_to_gpu(const float*, const std::vector<float>& x) {
    float* p = device_array<float>(x.size());
    CHECK(cudaMemcpy(p, x.data(), x.size() * sizeof(float), cudaMemcpyHostToDevice));
    return p;
}
static bf16* copy_to_gpu(const bf16*, const std::vector<float>& x) {
    std::vector<bf16> rounded(x.size());
    for (size_t i = 0; i < x.size(); i++) rounded[i] = __float2bfloat16(x[i]);
    bf16* p = device_array<bf16>(x.size());
    CHECK(cudaMemcpy(p, rounded.data(), x.size() * sizeof(bf16), cudaMemcpyHostToDevice));
    return p;
}

// numbers in -2 .. 2, the same in float and in bf16
static std::vector<float> random_numbers(long n, unsigned seed) {
    std::vector<float> x(n);
    for (float& v : x) {
        seed = seed * 1664525u + 1013904223u;
        v = __bfloat162float(__float2bfloat16((float)(seed >> 8) / (1 << 22) - 2));
    }
    return x;
}

template <class T> static Arrays<T> make_arrays(Shape s, const std::vector<float> inputs[4]) {
    Arrays<T> a = {};
    long rows = (long)s.B * s.NH * s.T, q_size = rows * s.HD, kv_size = (long)s.B * s.T * s.NKV * s.HD;
    a.q = copy_to_gpu(a.q, inputs[0]), a.k = copy_to_gpu(a.k, inputs[1]), a.v = copy_to_gpu(a.v, inputs[2]);
    a.dout = copy_to_gpu(a.dout, inputs[3]);
    a.out = device_array<T>(q_size), a.dq = device_array<T>(q_size), a.dv = device_array<T>(kv_size);
    a.dk = device_array<T>(q_size);                 // step 4 has its rows NH HD apart
    a.lse = device_array<float>(rows), a.D = device_array<float>(rows);
    return a;
}
// What a step left is wiped out before the next one.
template <class T> static void wipe(const Arrays<T>& a, Shape s) {
    long rows = (long)s.B * s.NH * s.T;
    T* wide[] = {a.out, a.dq, a.dk};
    float* narrow[] = {a.lse, a.D};
    for (T* p : wide) CHECK(cudaMemset(p, 0xff, rows * s.HD * sizeof(T)));
    for (float* p : narrow) CHECK(cudaMemset(p, 0xff, rows * sizeof(float)));
    CHECK(cudaMemset(a.dv, 0xff, (long)s.B * s.T * s.NKV * s.HD * sizeof(T)));
}
template <class T> static void free_arrays(const Arrays<T>& a) {
    void* arrays[] = {a.q, a.k, a.v, a.dout, a.out, a.dq, a.dk, a.dv, a.lse, a.D, a.p, a.ds};
    for (void* p : arrays) CHECK(cudaFree(p));
}

static int passed, failed;

static void print_error(double error, double limit, bool* good) {
    printf(" %8.1e", error);
    *good = *good && error <= limit;
}

// bf16 results have 8 significant bits and so have p and ds before their last product: each is off by up to 1/256. What
// comes before that, lse, is as good as in float.
template <class T> static void check_step(const LessonStep& step, const Arrays<T>& a, Shape s, const Reference& r) {
    double limit = step.is_bf16 ? 1e-2 : 3e-6;
    long ld_q = (long)s.NH * s.HD, ld_kv = (long)s.NKV * s.HD;
    bool good = true;
    wipe(a, s);
    step.forward();
    print_error(error_of(a.out, r.out, ld_q, ld_q), limit, &good);
    print_error(error_of(a.lse, r.lse, s.T, s.T), 3e-6, &good);
    if (step.backward) {
        step.backward();
        print_error(error_of(a.dq, r.dq, ld_q, ld_q), limit, &good);
        print_error(error_of(a.dk, r.dk, ld_kv, (long)step.dk_heads * s.HD), limit, &good);
        print_error(error_of(a.dv, r.dv, ld_kv, ld_kv), limit, &good);
    }
    printf(good ? "\n" : "  FAILED\n");
    good ? passed++ : failed++;
}

// Prints the mean time of run(), after one that does not count, and its speed. Takes about half a second.
static void print_time(const std::function<void()>& run, double flops) {
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    float ms = 0;
    for (int runs = 1, round = 0; round < 3; round++) {     // not counted, how many runs?, the mean of so many
        if (round == 2) runs = ms < 5 ? 100 : ms < 250 ? (int)(500 / ms) : 1;
        CHECK(cudaEventRecord(start));
        for (int i = 0; i < runs; i++) run();
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, start, end));
        ms /= runs;
    }
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(end));
    printf(" %11.3f %9.2f", ms, flops / ms * 1e-9);
}

static void run_shape(Shape s, bool timed) {
    long q_size = (long)s.B * s.T * s.NH * s.HD, kv_size = (long)s.B * s.T * s.NKV * s.HD;
    double flops = 2.0 * q_size * s.T;
    std::vector<float> inputs[4] = {random_numbers(q_size, 1), random_numbers(kv_size, 2), random_numbers(kv_size, 3),
                                    random_numbers(q_size, 4)};
    Arrays<float> a = make_arrays<float>(s, inputs);
    Arrays<bf16> h = make_arrays<bf16>(s, inputs);
    std::vector<LessonStep> steps = {
        {"1 the definition", false, [&] { step1_forward(a, s); }, [&] { step1_backward(a, s); }, s.NKV},
        {"2 online softmax", false, [&] { step2_forward(a, s); }, [&] { step2_backward(a, s); }, s.NKV},
        {"3 tiles", false, [&] { step3_forward(a, s); }, nullptr, s.NKV},
        {"4 train_moe.cu, float", false, [&] { step4_forward(a, s); }, [&] { step4_backward(a, s); }, s.NH},
        {"4 train_moe.cu, bf16", true, [&] { step4_forward(h, s); }, [&] { step4_backward(h, s); }, s.NH}};
    long scores = (long)s.B * s.NH * s.T * s.T;
    size_t free_bytes, all_bytes;
    CHECK(cudaMemGetInfo(&free_bytes, &all_bytes));
    bool room = 2.0 * scores * sizeof(float) < 0.9 * free_bytes;
    if (room) a.p = device_array<float>(scores), a.ds = device_array<float>(scores);

    printf("B %d, T %d, NH %d, NKV %d, HD %d\n", s.B, s.T, s.NH, s.NKV, s.HD);
    if (timed) printf("  %-22s  forward ms   TFLOP/s backward ms   TFLOP/s\n", "step");
    else printf("  %-22s      out      lse       dq       dk       dv\n", "step: max error");
    Reference r;
    if (!timed) r = attention_reference(inputs[0], inputs[1], inputs[2], inputs[3], s);
    for (size_t i = room ? 0 : 1; i < steps.size(); i++) {
        printf("  %-22s", steps[i].name);
        if (!timed) {
            if (steps[i].is_bf16) check_step(steps[i], h, s, r);
            else check_step(steps[i], a, s, r);
        } else {
            print_time(steps[i].forward, flops);
            if (steps[i].backward) print_time(steps[i].backward, 2.5 * flops);
            printf("\n");
        }
    }
    if (!room) printf("  1 has no room for its matrices of %.1f GB\n", 2e-9 * scores * sizeof(float));
    CHECK(cudaDeviceSynchronize());
    free_arrays(a);
    free_arrays(h);
}

int main(int argc, char** argv) {
    begin_program("attention");
    Shape s = {4, 1, 16, 4, 128};
    int* fields[] = {&s.T, &s.NH, &s.NKV, &s.HD, &s.B};
    for (int i = 1; i < argc && i <= 5; i++) *fields[i - 1] = atoi(argv[i]);
    if (argc > 6 || s.T < 1 || s.T > 65535 || s.NKV < 1 || s.NH < s.NKV || s.NH % s.NKV || s.HD < 1 || s.HD > 128 ||
        s.B < 1 || (long)s.B * s.NH > 65535)
        die(2, "T [NH [NKV [HD [B]]]] are wanted: T up to 65535, NH a multiple of NKV, HD up to 128, B NH up to 65535");
    printf("Errors are the largest of an array, relative to its largest number.\n");
    run_shape({2, 37, 4, 2, 20}, false);    // nothing fills a tile
    run_shape({1, 33, 3, 1, 99}, false);    // odd heads; a tile of one query
    run_shape({1, 130, 2, 2, 64}, false);   // several tiles and a bit, every query head with keys of its own
    if (argc > 1) run_shape(s, true);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
