/*
train_moe.cu: the mixture-of-experts GPT of train_moe.c on an NVIDIA GPU.

It is the same program with the same options (but --router dynamic, --fixed-router and --skip-below, which are refused),
data, checkpoints and training loop, which it takes from train_moe.c; here are only the kernels and what starts them.
Products and activations are bf16 (--precision bf16, the default) or float (fp32); master weights, moments, gradients of
weights, norms, the router, softmax and all sums are float or wider. Dense products are cuBLAS's, all else is here:

     1  Small things         errors, numbers in memory, sums over warps and blocks
     2  Instructions         asynchronous copies and tensor cores, for which C++ has no words [dev/lib/cuda]
     3  Products             the router's, and grouped ones for the experts, whose sizes only the GPU knows
     4  Attention            causal, grouped-query, in tiles, forward and backward
     5  Layers               norms and residual sums, rotary positions, the loss, the embedding, AdamW
     6  Routing              top-K, grouping tokens by expert, balance losses
     7  Router variants      sigmoid, logit norm, families of copies, Latent Prototype Routing [dev/lib/cuda]
     8  The model            memory, forward, backward, update
     9  The command line     train_moe.c's

There are no atomic additions: every sum has one order, and the same command gives the same bytes (on the same card,
with the same cuBLAS). The host does not wait for the GPU within a step: how many tokens an expert got stays on the
device.

What is not for a first reading stands in dev/lib/cuda and is included in its place: experts' products and attention
once more for tensor cores, router variants, the layout of memory, copies to and from the host.

Dimension letters are those of train_moe.c. A kernel takes pointers and sizes (the experts' also small structs of them).
The function to call, whose name begins with gpu_, stands below it and says what it computes; its last argument is the
stream, 0 by default. `make cut` copies the main ones out, each into a file that compiles alone (dev/cut).

Figures of every kernel, and the same products and attention as a lesson in steps, are in dev/cuda.
*/
#ifndef TRAIN_MOE_CU
#define TRAIN_MOE_CU

#ifndef TRAIN_MOE_NO_MAIN
#define TRAIN_MOE_NO_MAIN       // this file has one
#define TRAIN_MOE_CU_MAIN
#endif
#include "train_moe.c"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <type_traits>

// ---------------------------------------------------------------------------------------------------------------------
// 1. Small things

typedef __nv_bfloat16 bf16;

#include "dev/lib/cuda/device.cuh"      // CHECK(call), CHECK_CUBLAS(call), allow_shared(kernel, bytes), gpu_open()

__host__ __device__ static inline int ceil_div(long a, long b) { return (int)((a + b - 1) / b); }

// Numbers in memory are float or bf16; arithmetic is in float.
__device__ static inline float to_float(float x) { return x; }
__device__ static inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ static inline void store(float* p, float x) { *p = x; }
__device__ static inline void store(bf16* p, float x) { *p = __float2bfloat16(x); }

// Sum and maximum over the 32 lanes of a warp; every lane gets the result, and the order of additions is fixed. Sums
// are of floats or doubles.
template <class T> __device__ static inline T warp_sum(T x) {
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
__device__ static inline float warp_max(float x) {
    for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}
// Sum over a block of up to 1024 threads, a multiple of 32; every thread gets it. `shared` has room for 32 numbers
// and may be used again right away.
template <class T> __device__ static inline T block_sum(T x, T* shared) {
    int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared[warp] = x;
    __syncthreads();
    T sum = 0;
    for (int w = 0; w < warps; w++) sum += shared[w];
    __syncthreads();
    return sum;
}

// load_vector<W>(x, p) and store_vector<W>(p, x) move W neighbouring numbers, floats in x: one, or as many as fill
// accesses of 16 bytes, for which aligned_16(p, q, ...) must be 1. load4 and store4 move up to four numbers.
#include "dev/lib/cuda/vectors.cuh"

// x as it will be read back after having been stored as a T
template <class T> __device__ static inline float rounded(float x) {
    T y;
    store(&y, x);
    return to_float(y);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Instructions
//
// Copies that run while the program goes on (cp_async_16), the products of tensor cores (mma_m16n8k16_bf16,
// wgmma_bf16), 2^x (exp2_fast), each in a function of its own. Only the bf16 experts and attention use them.
#include "dev/lib/cuda/tensor_cores.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// 3. Products: a small one in fp32, for routers

// One step of a product by 256 threads: sum (4 x 4 a thread) += a (16 x TM)^T b (16 x TN), both in shared memory with
// rows of TM + 4 and TN + 4 floats. Every element is one chain of fmaf in the order of k.
template <int TM, int TN> __device__ static inline void fma_tile(float sum[4][4], const float* a, const float* b) {
    static_assert(TM * TN == 4096, "256 threads of 4 x 4");
    a += threadIdx.x / (TN / 4) * 4;
    b += threadIdx.x % (TN / 4) * 4;
    #pragma unroll
    for (int k = 0; k < 16; k++) {
        float4 u = *(const float4*)(a + k * (TM + 4)), v = *(const float4*)(b + k * (TN + 4));
        float left[4] = {u.x, u.y, u.z, u.w}, right[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int i = 0; i < 4; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
    }
}

// to[k][i] = from[i*step + k*k_step], 16 values of k by SIZE of i, zeros outside of `count` and `depth`. Neighbouring
// threads take neighbouring addresses, whichever of the steps is 1.
template <int SIZE, class T>
__device__ static inline void load_fp32_tile(float* to, const T* from, long step, long k_step, int count, int depth) {
    for (int n = threadIdx.x; n < 16 * SIZE; n += 256) {
        int i = k_step == 1 ? n / 16 : n % SIZE, k = k_step == 1 ? n % 16 : n / SIZE;
        to[k * (SIZE + 4) + i] = i < count && k < depth ? to_float(from[i * step + k * k_step]) : 0.0f;
    }
}

// Block (x, s) computes tile x of TM x TN elements over k = s*k_part .. (s+1)*k_part-1, to out + s*M*N.
template <int TM, int TN, class TA, class TB>
__global__ void __launch_bounds__(256, 3)
matmul_fp32_kernel(float* out, const TA* a, long a_row, long a_col, const TB* b, long b_row, long b_col, int M, int N,
                   int K, int k_part, int add) {
    __shared__ __align__(16) float a_tile[16 * (TM + 4)], b_tile[16 * (TN + 4)];
    int across = ceil_div(N, TN), m0 = blockIdx.x / across * TM, n0 = blockIdx.x % across * TN;
    int k_end = min(K, (int)(blockIdx.y + 1) * k_part);
    float sum[4][4] = {};
    for (int k = blockIdx.y * k_part; k < k_end; k += 16) {
        load_fp32_tile<TM>(a_tile, a + m0 * a_row + k * a_col, a_row, a_col, M - m0, k_end - k);
        load_fp32_tile<TN>(b_tile, b + n0 * b_col + k * b_row, b_col, b_row, N - n0, k_end - k);
        __syncthreads();
        fma_tile<TM, TN>(sum, a_tile, b_tile);
        __syncthreads();
    }
    out += (long)blockIdx.y * M * N;
    #pragma unroll
    for (int i = 0; i < 4; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            int m = m0 + threadIdx.x / (TN / 4) * 4 + i, n = n0 + threadIdx.x % (TN / 4) * 4 + j;
            if (m < M && n < N) out[(long)m * N + n] = add ? out[(long)m * N + n] + sum[i][j] : sum[i][j];
        }
}

// out (count) (+)= the sum over s of parts (splits, count), in the order of s
static __global__ void add_product_parts_kernel(float* out, const float* parts, long count, int splits, int add) {
    long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = 0;
    for (int s = 0; s < splits; s++) sum += parts[s * count + i];
    out[i] = add ? out[i] + sum : sum;
}

template <int TM, int TN, class TA, class TB>
static void launch_matmul_fp32(float* out, const TA* a, long a_row, long a_col, const TB* b, long b_row, long b_col,
                               int M, int N, int K, int add, float* parts, long parts_floats, cudaStream_t stream) {
    long tiles = (long)ceil_div(M, TM) * ceil_div(N, TN), splits = 512 / tiles;
    splits = min(splits, min((long)K / 512, parts_floats / ((long)M * N)));
    int k_part = splits > 1 ? ceil_div(ceil_div(K, splits), 16) * 16 : K;
    splits = splits > 1 ? ceil_div(K, k_part) : 1;
    matmul_fp32_kernel<TM, TN, TA, TB><<<dim3((unsigned)tiles, (unsigned)splits), 256, 0, stream>>>(
        splits > 1 ? parts : out, a, a_row, a_col, b, b_row, b_col, M, N, K, k_part, splits > 1 ? 0 : add);
    CHECK(cudaGetLastError());
    if (splits > 1) {
        add_product_parts_kernel<<<ceil_div((long)M * N, 256), 256, 0, stream>>>(
            out, parts, (long)M * N, (int)splits, add);
        CHECK(cudaGetLastError());
    }
}

// out (M, N) (+)= sum over k of a(m,k) b(k,n),  a(m,k) = a[m*a_row + k*a_col],  b(k,n) = b[k*b_row + n*b_col]
//
// fp32 arithmetic on float or bf16 operands; add = 0 overwrites. Every element is one chain of fmaf over k = 0, 1, ...:
// its bits depend on its row of a and its column of b only, so equal experts get equal logits, wherever they stand.
// For few elements and a long sum (a router's dW is (E, H), summed over all tokens) the k are split, if `parts` has
// room (parts_floats, 0 for never): each part is such a chain, and a second kernel adds the parts in order. The split
// depends on the shape and on parts_floats alone, not on the device. Tiles are 64 x 64, or narrow where M or N is small
// (8 experts): most of a square tile would be empty.
template <class TA, class TB>
static void gpu_matmul_fp32(float* out, const TA* a, long a_row, long a_col, const TB* b, long b_row, long b_col, int M,
                            int N, int K, int add, float* parts, long parts_floats, cudaStream_t stream = 0) {
    auto launch = N <= 16   ? launch_matmul_fp32<256, 16, TA, TB>
                  : M <= 16 ? launch_matmul_fp32<16, 256, TA, TB>
                            : launch_matmul_fp32<64, 64, TA, TB>;
    launch(out, a, a_row, a_col, b, b_row, b_col, M, N, K, add, parts, parts_floats, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// The experts' products
//
// Rows are grouped by expert, unpadded: rows offsets[e] .. offsets[e+1]-1 of the R = N K belong to expert e, and row r
// serves token token[r] (NULL: token r, as in a dense layer). Nobody on the host knows the offsets, so a launch covers
// the most tiles that there can be, R / 128 + E, and the list `tiles` (max_tiles), {expert, first row}, made on the
// device together with the offsets, tells each block what to do; expert -1 means nothing. The last tile of an expert
// may stick out over its rows: zeros are loaded for what is missing and nothing is stored.
//
// There are three kinds of product, named by their formulas; left and right are always row-major matrices:
//     X_WT   y (rows, OC)   = x (rows, C) W_e (OC, C)^T        k runs along the rows of both
//     DY_W   dx (rows, C)   = dy (rows, OC) W_e (OC, C)        k runs along the rows of dy, and across those of W
//     DYT_X  dW_e (OC, C)   = dy (rows, OC)^T x (rows, C)      k are the rows of expert e: across both
// Rows of x and dy are gathered inside the loads: token[r] is read where row r is wanted, so that no gathered copy is
// ever written (SonicMoE, arXiv 2512.14080).
//
// All kernels end alike. A tile's fp32 sums are left in shared memory, and then every thread takes four neighbouring
// columns of a row through an epilogue: the same code for all kinds of tiles, neighbouring threads at neighbouring
// addresses. SwiGLU and its derivative are done there, where the sums are still exact.

enum { X_WT, DY_W, DYT_X };

constexpr int GROUP_ROWS = 128; // rows in an entry of `tiles`

// A row-major matrix (rows, width). If there are tokens, its rows are those of tokens, and row r is that of token[r].
template <class T> struct Operand {
    const T* data;
    int width;
    const int* token;
    int vector; // rows start at multiples of 16 bytes
};

template <class T> static Operand<T> operand(const T* data, int width, const int* token) {
    return {data, width, token, (uintptr_t)data % 16 == 0 && width * sizeof(T) % 16 == 0};
}

// A tile: rows m0 .. m_end-1 and columns n0 .. of the result of expert e, over k .. k_end-1. No rows: nothing to do.
struct Job { int expert, m0, m_end, n0, k, k_end; };

// Tile `number` of down x across of each expert. Tiles are begun in the order of their numbers. Those that run at the
// same time should share what they read, through the L2 cache: 16 tiles that lie below each other come first, then the
// 16 beside them, and so on. So about 130 running blocks of 128 x 256 make a piece about as high as it is wide, which
// reads the fewest rows and columns. Below each other are mostly rows of one expert. In DYT_X experts come one after
// the other, for the same reason.
template <int PRODUCT, int BM>
__device__ static inline Job find_job(int number, const int* offsets, const int2* tiles, int down, int across,
                                      int width, int tile_columns) {
    int e = number / (down * across), b = number % (down * across);
    int group = b / (16 * across) * 16, height = min(16, down - group), parts = GROUP_ROWS / BM;
    b %= 16 * across;
    int i = group + b % height, n0 = b / height * tile_columns;
    if (PRODUCT == DYT_X) return {e, i * BM, width, n0, offsets[e], offsets[e + 1]};
    int2 tile = tiles[i / parts];
    if (tile.x < 0) return {0, 0, 0, n0, 0, 0};
    return {tile.x, tile.y + i % parts * BM, offsets[tile.x + 1], n0, 0, width};
}

// Epilogues: called by all threads, with four sums of row `row` from column `column` on; `real`: the row exists. PAIRS:
// the left half of a tile are columns of gate, the right half the same columns of up, and four sums of each are given.
// What an epilogue reads is fetched for several fours before the first is worked on, since each load is waited for and
// may not pass a store to the same matrix: fetch reads what apply will want, fetch_gate what follows from that.

// y (rows, width) = the sums
template <class T> struct StoreEpilogue {
    static constexpr bool PAIRS = false;
    struct Fetched {};
    T* y;
    int width, vector;
    __device__ void fetch(Fetched*, int, int, bool, int) const {}
    __device__ void fetch_gate(Fetched*) const {}
    __device__ void apply(const Fetched&, const float* sums, const float*, int, int row, bool real, int column) const {
        store4(y + (long)row * width + column, sums, real ? width - column : 0, vector);
    }
};

// dW_e (OC, C) (+)= the sums
struct WeightEpilogue {
    static constexpr bool PAIRS = false;
    struct Fetched { Four<float> before; };
    float* dW;
    int OC, C, add, vector;
    __device__ float* at(int expert, int row, int column) const { return dW + ((long)expert * OC + row) * C + column; }
    __device__ void fetch(Fetched* f, int expert, int row, bool real, int column) const {
        if (add) fetch4(&f->before, at(expert, row, column), real ? C - column : 0, vector);
    }
    __device__ void fetch_gate(Fetched*) const {}
    __device__ void apply(const Fetched& f, const float* sums, const float*, int expert, int row, bool real,
                          int column) const {
        float *p = at(expert, row, column), v[4] = {};
        int count = real ? C - column : 0;
        if (add) load4(v, f.before, p, count, vector);
        for (int j = 0; j < 4; j++) v[j] += sums[j];
        store4(p, v, count, vector);
    }
};

// gate_up (R, 2, I) = the sums, act (R, I) = silu(gate) up
template <class T> struct SwigluEpilogue {
    static constexpr bool PAIRS = true;
    struct Fetched {};
    T *gate_up, *act;
    int I, vector;
    __device__ void fetch(Fetched*, int, int, bool, int) const {}
    __device__ void fetch_gate(Fetched*) const {}
    __device__ void apply(const Fetched&, const float* gate, const float* up, int, int row, bool real,
                          int column) const {
        int count = real ? I - column : 0;
        float a[4];
        for (int j = 0; j < 4; j++) a[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
        store4(act + (long)row * I + column, a, count, vector);
        if (gate_up) {
            store4(gate_up + (long)row * 2 * I + column, gate, count, vector);
            store4(gate_up + (long)row * 2 * I + I + column, up, count, vector);
        }
    }
};

// The sums are dact; for each row and column
//     g' = gate dact u silu'(g),  u' = gate dact silu(g)  take the place of g and u,   silu'(g) = s (1 + g (1 - s))
//     gated_act = gate silu(g) u,    dgate_parts = the sum of dact silu(g) u over PART columns, added up by shuffles
template <class T> struct SwigluBackwardEpilogue {
    static constexpr bool PAIRS = false;
    static constexpr int PART = sizeof(T) == 4 ? 64 : 128;  // columns of a tile, and four for each lane of a warp
    struct Fetched {
        Four<T> g, u;
        int assignment;     // < 0: no gate
        float gate;
    };
    T *gate_up, *gated_act;
    float* dgate_parts;
    const float* gates;
    const int* assignment;
    int I, vector;
    __device__ void fetch(Fetched* f, int, int row, bool real, int column) const {
        const T* g_at = gate_up + (long)row * 2 * I + column;
        int count = real ? I - column : 0;
        f->assignment = !real || !gates ? -1 : assignment ? assignment[row] : row;
        fetch4(&f->g, g_at, count, vector);
        fetch4(&f->u, g_at + I, count, vector);
    }
    __device__ void fetch_gate(Fetched* f) const { f->gate = f->assignment < 0 ? 1 : gates[f->assignment]; }
    __device__ void apply(const Fetched& f, const float* dact, const float*, int, int row, bool real,
                          int column) const {
        int count = real ? I - column : 0;
        T *g_at = gate_up + (long)row * 2 * I + column, *u_at = g_at + I;
        float g[4], u[4], a[4], dgate = 0, gate = f.gate;
        load4(g, f.g, g_at, count, vector);
        load4(u, f.u, u_at, count, vector);
        for (int j = 0; j < 4; j++) {
            float s = 1.0f / (1.0f + expf(-g[j])), silu = g[j] * s, d = dact[j], u_j = u[j];
            dgate += d * silu * u_j;
            a[j] = gate * silu * u_j;
            g[j] = gate * d * u_j * s * (1.0f + g[j] * (1.0f - s));
            u[j] = gate * d * silu;
        }
        store4(gated_act + (long)row * I + column, a, count, vector);
        store4(g_at, g, count, vector);
        store4(u_at, u, count, vector);
        if (!dgate_parts) return;
        for (int o = PART / 8; o; o >>= 1) dgate += __shfl_xor_sync(0xffffffffu, dgate, o);
        if (column % PART == 0 && count > 0) dgate_parts[(long)row * ceil_div(I, PART) + column / PART] = dgate;
    }
};

// Sums of ROWS rows from row m0 on, `stride` floats apart in shared memory, go through the epilogue. THREADS threads do
// this together, of which this is number `thread`, BATCH fours each at a time.
template <int ROWS, int WIDTH, int THREADS, int BATCH, class Epilogue>
__device__ static inline void finish_rows(const float* sums, int stride, const Job& job, int m0, int thread,
                                          const Epilogue& epilogue) {
    static_assert(ROWS * WIDTH / 4 % (THREADS * BATCH) == 0, "");
    #pragma unroll 1
    for (int first = thread; first < ROWS * WIDTH / 4; first += THREADS * BATCH) {
        typename Epilogue::Fetched fetched[BATCH];
        int row[BATCH], column[BATCH];
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            row[b] = (first + b * THREADS) / (WIDTH / 4);
            column[b] = (first + b * THREADS) % (WIDTH / 4) * 4;
            epilogue.fetch(&fetched[b], job.expert, m0 + row[b], m0 + row[b] < job.m_end, job.n0 + column[b]);
        }
        #pragma unroll
        for (int b = 0; b < BATCH; b++) epilogue.fetch_gate(&fetched[b]);
        #pragma unroll
        for (int b = 0; b < BATCH; b++) {
            float v[4], up[4];
            load4(v, sums + row[b] * stride + column[b], 4, true);
            if (Epilogue::PAIRS) load4(up, sums + row[b] * stride + WIDTH + column[b], 4, true);
            epilogue.apply(fetched[b], v, up, job.expert, m0 + row[b], m0 + row[b] < job.m_end, job.n0 + column[b]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// float: 64 x 64 tiles, 4 x 4 sums a thread, 16 values of k at a time

// One operand's 64 lines of 16 values of k, or 16 lines of 64 values, as to[k][i]. line(l) is the row that line l of
// the tile lies in, < 0 for zeros; `column` the first column.
template <bool ALONG_K, class Line>
__device__ static inline void load_expert_tile(float* to, const Operand<float>& from, int column, Line line) {
    #pragma unroll
    for (int n = threadIdx.x; n < 16 * 64; n += 256) {
        int l = ALONG_K ? n / 16 : n / 64, c = ALONG_K ? n % 16 : n % 64, r = line(l);
        if (r >= 0 && from.token) r = from.token[r];
        to[ALONG_K ? c * 68 + l : l * 68 + c] =
            r >= 0 && column + c < from.width ? from.data[(long)r * from.width + column + c] : 0.0f;
    }
}

// One tile of a product; W_e is right.data + e * weight_stride, `columns` the number of columns of the result (of gate
// if there are pairs). Sums are chains of fmaf in the order of k from 0, as in train_moe.c (but for a sum that goes
// on, dW += ..: the finished chain is added to it): an element's bits depend on its two rows only.
template <int PRODUCT, class Epilogue>
__global__ void __launch_bounds__(256, 3)
experts_fp32_kernel(Operand<float> left, Operand<float> right, long weight_stride, const int* offsets,
                    const int2* tiles, int down, int across, int columns, Epilogue epilogue) {
    constexpr int WIDTH = Epilogue::PAIRS ? 32 : 64;
    __shared__ __align__(16) float a[16 * 68], b[16 * 68], sums[64 * 68];
    Job job = find_job<PRODUCT, 64>(blockIdx.x, offsets, tiles, down, across, left.width, WIDTH);
    if (job.m0 >= job.m_end) return;
    if (PRODUCT != DYT_X) right.data += job.expert * weight_stride;
    float sum[4][4] = {};
    for (int k = job.k; k < job.k_end; k += 16) {
        auto across_k = [&](int l) { return k + l < job.k_end ? k + l : -1; };
        if (PRODUCT == DYT_X) load_expert_tile<false>(a, left, job.m0, across_k);
        else load_expert_tile<true>(a, left, k, [&](int l) { return job.m0 + l < job.m_end ? job.m0 + l : -1; });
        if (PRODUCT != X_WT) load_expert_tile<false>(b, right, job.n0, across_k);
        else load_expert_tile<true>(b, right, k, [&](int l) {
            int n = job.n0 + l % WIDTH;
            return n < columns ? l / WIDTH * columns + n : -1;
        });
        __syncthreads();
        fma_tile<64, 64>(sum, a, b);
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        *(float4*)(sums + (threadIdx.x / 16 * 4 + i) * 68 + threadIdx.x % 16 * 4) =
            make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    __syncthreads();
    finish_rows<64, WIDTH, 256, 2>(sums, 68, job, job.m0, threadIdx.x, epilogue);
}

template <int PRODUCT, class Epilogue>
static void launch_experts(Operand<float> left, Operand<float> right, const int* offsets, const int2* tiles,
                           int max_tiles, int E, int columns, Epilogue epilogue, cudaStream_t stream) {
    long weight_stride = (long)(Epilogue::PAIRS ? 2 : 1) * columns * left.width;
    int down = PRODUCT == DYT_X ? ceil_div(left.width, 64) : max_tiles * (GROUP_ROWS / 64);
    int across = ceil_div(columns, Epilogue::PAIRS ? 32 : 64);
    experts_fp32_kernel<PRODUCT, Epilogue><<<down * across * E, 256, 0, stream>>>(
        left, right, weight_stride, offsets, tiles, down, across, columns, epilogue);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// bf16: launch_experts on tensor cores, with the same jobs and epilogues. A block computes 128 x 128 or 128 x 256
// sums, 64 values of k at a time; while one stage in shared memory is multiplied, the next ones are filled.
// dev/cuda/grouped_gemm.cu comes to that kernel in five steps.
#include "dev/lib/cuda/experts_bf16.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// The functions to call. T is float or bf16; offsets (E + 1), tiles (max_tiles) and token (R) as above.

// gate_up (R, 2, I) = x W_e^T,  act (R, I) = silu(gate) up;  x (N, H) gathered by token, W (E, 2, I, H). gate_up may be
// NULL where no backward pass follows. act is computed from unrounded sums.
template <class T>
static void gpu_experts_up(T* gate_up, T* act, const T* x, const int* token, const T* W, const int* offsets,
                           const int2* tiles, int max_tiles, int H, int I, cudaStream_t stream = 0) {
    int vector = by_fours(act, I) && by_fours(gate_up, I);
    launch_experts<X_WT>(operand(x, H, token), operand<T>(W, H, NULL), offsets, tiles, max_tiles, 1, I,
                         SwigluEpilogue<T>{gate_up, act, I, vector}, stream);
}

// y (R, H) = act (R, I) W_e^T,  W (E, H, I)
template <class T>
static void gpu_experts_down(T* y, const T* act, const T* W, const int* offsets, const int2* tiles, int max_tiles,
                             int I, int H, cudaStream_t stream = 0) {
    launch_experts<X_WT>(operand<T>(act, I, NULL), operand<T>(W, I, NULL), offsets, tiles, max_tiles, 1, H,
                         StoreEpilogue<T>{y, H, by_fours(y, H)}, stream);
}

// Columns that dgate_parts has for experts of width I.
template <class T> static int gpu_dgate_parts(int I) { return ceil_div(I, SwigluBackwardEpilogue<T>::PART); }

// The gradient of gate_r down(silu(g) u), back to g and u. dy (N, H), the gradient of the layer's output, is gathered
// by token; dact = dy W_e is never stored, W (E, H, I). In place of gate_up (R, 2, I) comes its gradient; gated_act
// (R, I) = gate silu(g) u; dgate_parts (R, gpu_dgate_parts<T>(I)) is to be added up by gpu_gate_gradients. Row r's
// gate is gates[assignment[r]], gates (N, K); gates NULL: all are 1, and then dgate_parts may be NULL.
template <class T>
static void gpu_experts_down_backward(T* gate_up, T* gated_act, float* dgate_parts, const T* dy, const int* token,
                                      const float* gates, const int* assignment, const T* W, const int* offsets,
                                      const int2* tiles, int max_tiles, int I, int H, cudaStream_t stream = 0) {
    int vector = by_fours(gate_up, I) && by_fours(gated_act, I);
    launch_experts<DY_W>(operand(dy, H, token), operand<T>(W, I, NULL), offsets, tiles, max_tiles, 1, I,
                         SwigluBackwardEpilogue<T>{gate_up, gated_act, dgate_parts, gates, assignment, I, vector},
                         stream);
}

// dgates[assignment[r]] = the sum of parts (R, P) over P, in order
static __global__ void gate_gradients_kernel(float* dgates, const float* parts, const int* assignment, int R, int P) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= R) return;
    float sum = 0;
    for (int p = 0; p < P; p++) sum += parts[(long)r * P + p];
    dgates[assignment ? assignment[r] : r] = sum;
}
static void gpu_gate_gradients(float* dgates, const float* parts, const int* assignment, int R, int P,
                               cudaStream_t stream = 0) {
    gate_gradients_kernel<<<ceil_div(R, 256), 256, 0, stream>>>(dgates, parts, assignment, R, P);
    CHECK(cudaGetLastError());
}

// drows (R, H) = dgate_up (R, 2 I) W_e,  W (E, 2, I, H)
template <class T>
static void gpu_experts_input_backward(T* drows, const T* dgate_up, const T* W, const int* offsets, const int2* tiles,
                                       int max_tiles, int H, int I, cudaStream_t stream = 0) {
    launch_experts<DY_W>(operand<T>(dgate_up, 2 * I, NULL), operand<T>(W, H, NULL), offsets, tiles, max_tiles, 1,
                         H, StoreEpilogue<T>{drows, H, by_fours(drows, H)}, stream);
}

// dW_e (OC, C) (+)= sum over the rows r of expert e of dy_r^T x_r, in fp32; add = 0 overwrites (with zeros for experts
// without rows). Each operand is (R, OC) or (R, C) by rows if its token is NULL, else (N, OC) or (N, C) by tokens.
template <class T>
static void gpu_experts_weight_backward(float* dW, const T* dy, const int* dy_token, const T* x, const int* x_token,
                                        const int* offsets, int E, int OC, int C, int add, cudaStream_t stream = 0) {
    launch_experts<DYT_X>(operand(dy, OC, dy_token), operand(x, C, x_token), offsets, NULL, 0, E, C,
                          WeightEpilogue{dW, OC, C, add, by_fours(dW, C)}, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Attention: causal, grouped-query
//
//     out_i = sum over j <= i of p_ij v_j,  p_ij = exp(q_i k_j / sqrt(HD)) / sum over j <= i,  lse_i = log of that sum
//
// and, with dp_ij = dout_i v_j and D_i = sum over j of p_ij dp_ij = dout_i out_i,
//
//     ds_ij = p_ij (dp_ij - D_i) / sqrt(HD)
//     dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i
//
// The T x T matrices never reach memory (FlashAttention-2, Dao 2023, arXiv 2307.08691). Forward (its Algorithm 1): a
// block of threads owns a block of queries and walks over the keys a tile at a time, carrying for each query the
// largest score m, the sum of exp(score - m) and the sum of exp(score - m) v; when a tile brings a larger m, both sums
// are multiplied by exp(old m - new m) first. Tiles in which every key comes after every query are skipped, and only
// tiles on the diagonal are masked (section 3.1.1). Backward (Algorithm 2): p is made again from the scores and lse.
//
// Algorithm 2 makes dk, dv and dq in one pass, with a block for each tile of keys, and adds to dq with atomics (section
// 3.2): the order of additions changes from run to run, and the rounded sums with it. Here a block of one kernel owns
// keys and sums dk and dv over the queries, a block of another owns queries and sums dq over the keys, both in a fixed
// order. The price is that scores and dp are computed twice: 7 products of tiles instead of 5.
//
// All three kernels have the same shape: a warp owns some rows (queries; in the dk and dv kernel, keys), so that warps
// have nothing to tell each other (section 3.3). The block walks over tiles of the other side, and per tile there are
// products "rows by tile" (scores, dp) and then sums "weights times tile" (out, dq, dk, dv), whose weights a warp
// already holds in its registers.

// the largest head size of these kernels; a smaller one is rounded up to 32, 64, 96 or 128 with zeros
constexpr int gpu_attention_max_head_dim() { return 128; }

// D (B, NH, T): D_i = dout_i . out_i; dout, out (B T, NH HD). One warp for each token and head.
template <class T>
__global__ void attention_dot_kernel(float* D, const T* dout, const T* out, int B, int length, int NH, int HD) {
    long i = ((long)blockIdx.x * blockDim.x + threadIdx.x) / 32, n = i / NH, h = i % NH;
    if (n >= (long)B * length) return;
    float sum = 0;
    for (int d = threadIdx.x % 32; d < HD; d += 32) sum += to_float(dout[i * HD + d]) * to_float(out[i * HD + d]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) D[(n / length * NH + h) * length + n % length] = sum;
}

// -- float: 32 rows in a block, 4 in each of its 8 warps, against tiles of 32 lines

constexpr int ATT_TILE = 32, ATT_ROWS = 4, ATT_THREADS = 256;
// Lines lie D + 4 floats apart: when 32 lanes each read 4 floats of their own line, the 8 lanes that are served
// together hit different banks, and 4 floats stay aligned to 16 bytes.
template <int D> __host__ __device__ constexpr int attention_tile_floats() { return ATT_TILE * (D + 4); }

// tile[j][d] = from[j ld + d] for j < lines and d < HD, zero elsewhere
template <int D>
__device__ inline void attention_load(float* tile, const float* from, long ld, int lines, int HD) {
    for (int i = threadIdx.x; i < ATT_TILE * D; i += ATT_THREADS) {
        int j = i / D, d = i % D;
        tile[j * (D + 4) + d] = j < lines && d < HD ? from[j * ld + d] : 0.0f;
    }
}

// s[r] = rows[r] . tile[lane]: each lane has a line of the tile for itself, and all share the rows
template <int D> __device__ inline void attention_dots(float s[ATT_ROWS], const float* rows, const float* tile) {
    #pragma unroll
    for (int r = 0; r < ATT_ROWS; r++) s[r] = 0;
    #pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        float4 t = *(const float4*)(tile + threadIdx.x % 32 * (D + 4) + d);
        #pragma unroll
        for (int r = 0; r < ATT_ROWS; r++) {
            float4 a = *(const float4*)(rows + r * (D + 4) + d);
            s[r] += a.x * t.x + a.y * t.y + a.z * t.z + a.w * t.w;
        }
    }
}

// sum[r][c] += sum over the tile's lines j of w_rj tile[j][lane + 32 c], where lane j holds w_rj: now the lanes have a
// column each
template <int D>
__device__ inline void attention_sums(float sum[ATT_ROWS][D / 32], const float w[ATT_ROWS], const float* tile) {
    #pragma unroll 4
    for (int j = 0; j < ATT_TILE; j++)
        #pragma unroll
        for (int r = 0; r < ATT_ROWS; r++) {
            float w_rj = __shfl_sync(0xffffffffu, w[r], j);
            #pragma unroll
            for (int c = 0; c < D / 32; c++) sum[r][c] += w_rj * tile[j * (D + 4) + threadIdx.x % 32 + 32 * c];
        }
}

// to[lane + 32 c] = factor sum[c]
template <int D> __device__ inline void attention_store(float* to, const float sum[D / 32], float factor, int HD) {
    #pragma unroll
    for (int c = 0; c < D / 32; c++) {
        int d = threadIdx.x % 32 + 32 * c;
        if (d < HD) to[d] = factor * sum[c];
    }
}

// Grid (NH, blocks of 32 queries, B). Queries late in the sequence have most keys to see, so their blocks come first:
// the short ones then fill the gaps at the end.
template <int D>
__global__ void __launch_bounds__(ATT_THREADS, 2)
attention_forward_kernel(float* out, float* lse, const float* q, long ld_q, const float* k, long ld_k, const float* v,
                         long ld_v, int Tq, int Tk, int NH, int NKV, int HD) {
    extern __shared__ __align__(16) float att_shared[];
    float *q_tile = att_shared, *k_tile = q_tile + attention_tile_floats<D>();
    float* v_tile = k_tile + attention_tile_floats<D>();
    int h = blockIdx.x, b = blockIdx.z, first = (gridDim.y - 1 - blockIdx.y) * ATT_TILE, past = Tk - Tq;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * ATT_ROWS, kv_head = h / (NH / NKV);
    int keys = min(Tk, past + first + ATT_TILE);    // what the last query of the block sees
    float scale = 1.0f / sqrtf((float)HD), max_score[ATT_ROWS], total[ATT_ROWS], sum[ATT_ROWS][D / 32] = {};
    #pragma unroll
    for (int r = 0; r < ATT_ROWS; r++) max_score[r] = -INFINITY, total[r] = 0;
    k += (long)b * Tk * ld_k + (long)kv_head * HD;
    v += (long)b * Tk * ld_v + (long)kv_head * HD;
    attention_load<D>(q_tile, q + ((long)b * Tq + first) * ld_q + (long)h * HD, ld_q, Tq - first, HD);
    for (int j0 = 0; j0 < keys; j0 += ATT_TILE) {
        __syncthreads();    // the last tile has been used by everyone
        attention_load<D>(k_tile, k + j0 * ld_k, ld_k, Tk - j0, HD);
        attention_load<D>(v_tile, v + j0 * ld_v, ld_v, Tk - j0, HD);
        __syncthreads();
        float p[ATT_ROWS];
        attention_dots<D>(p, q_tile + row * (D + 4), k_tile);
        #pragma unroll
        for (int r = 0; r < ATT_ROWS; r++) {
            // Every query sees key 0, so the maximum is a number from the first tile on. The mask also hides the zeros
            // after the last key from every query that exists.
            if (j0 + lane > past + first + row + r) p[r] = -INFINITY;
            float m = fmaxf(max_score[r], warp_max(p[r])), shrink = expf(scale * (max_score[r] - m));
            p[r] = expf(scale * (p[r] - m));
            total[r] = total[r] * shrink + warp_sum(p[r]);
            max_score[r] = m;
            #pragma unroll
            for (int c = 0; c < D / 32; c++) sum[r][c] *= shrink;
        }
        attention_sums<D>(sum, p, v_tile);
    }
    #pragma unroll
    for (int r = 0; r < ATT_ROWS; r++) {
        int i = first + row + r;
        if (i >= Tq) continue;
        attention_store<D>(out + (((long)b * Tq + i) * NH + h) * HD, sum[r], 1.0f / total[r], HD);
        if (lane == 0) lse[((long)b * NH + h) * Tq + i] = scale * max_score[r] + logf(total[r]);
    }
}

// Grid (NH, blocks of 32 queries, B), longest first.
template <int D>
__global__ void __launch_bounds__(ATT_THREADS, 2)
attention_backward_q_kernel(float* dq, const float* dout, const float* lse, const float* dots, const float* q,
                            long ld_q, const float* k, long ld_k, const float* v, long ld_v, long ld_dq, int T, int NH,
                            int NKV, int HD) {
    extern __shared__ __align__(16) float att_shared[];
    float *q_tile = att_shared, *dout_tile = q_tile + attention_tile_floats<D>();
    float *k_tile = dout_tile + attention_tile_floats<D>(), *v_tile = k_tile + attention_tile_floats<D>();
    int h = blockIdx.x, b = blockIdx.z, first = (gridDim.y - 1 - blockIdx.y) * ATT_TILE;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * ATT_ROWS, kv_head = h / (NH / NKV);
    float scale = 1.0f / sqrtf((float)HD), lse_r[ATT_ROWS], dot_r[ATT_ROWS], sum[ATT_ROWS][D / 32] = {};
    #pragma unroll
    for (int r = 0; r < ATT_ROWS; r++) {
        int i = min(first + row + r, T - 1);
        lse_r[r] = lse[((long)b * NH + h) * T + i];
        dot_r[r] = dots[((long)b * NH + h) * T + i];
    }
    k += (long)b * T * ld_k + (long)kv_head * HD;
    v += (long)b * T * ld_v + (long)kv_head * HD;
    attention_load<D>(q_tile, q + ((long)b * T + first) * ld_q + (long)h * HD, ld_q, T - first, HD);
    attention_load<D>(dout_tile, dout + (((long)b * T + first) * NH + h) * HD, (long)NH * HD, T - first, HD);
    for (int j0 = 0; j0 <= first; j0 += ATT_TILE) {
        __syncthreads();
        attention_load<D>(k_tile, k + j0 * ld_k, ld_k, T - j0, HD);
        attention_load<D>(v_tile, v + j0 * ld_v, ld_v, T - j0, HD);
        __syncthreads();
        float s[ATT_ROWS], dp[ATT_ROWS];
        attention_dots<D>(s, q_tile + row * (D + 4), k_tile);
        attention_dots<D>(dp, dout_tile + row * (D + 4), v_tile);
        #pragma unroll
        for (int r = 0; r < ATT_ROWS; r++) {
            bool seen = j0 + lane <= first + row + r;
            s[r] = seen ? expf(scale * s[r] - lse_r[r]) * (dp[r] - dot_r[r]) : 0.0f;
        }
        attention_sums<D>(sum, s, k_tile);
    }
    #pragma unroll
    for (int r = 0; r < ATT_ROWS; r++)
        if (first + row + r < T)
            attention_store<D>(dq + ((long)b * T + first + row + r) * ld_dq + (long)h * HD, sum[r], scale, HD);
}

// Grid (NKV, blocks of 32 keys, B): early keys are seen by most queries, and come first. The queries are those of all
// query heads that share this key and value head.
template <int D>
__global__ void __launch_bounds__(ATT_THREADS, 2)
attention_backward_kv_kernel(float* dk, float* dv, const float* dout, const float* lse, const float* dots,
                             const float* q, long ld_q, const float* k, long ld_k, const float* v, long ld_v,
                             long ld_dk, long ld_dv, int T, int NH, int NKV, int HD) {
    extern __shared__ __align__(16) float att_shared[];
    float *k_tile = att_shared, *v_tile = k_tile + attention_tile_floats<D>();
    float *q_tile = v_tile + attention_tile_floats<D>(), *dout_tile = q_tile + attention_tile_floats<D>();
    int kv_head = blockIdx.x, first = blockIdx.y * ATT_TILE, b = blockIdx.z, group = NH / NKV;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * ATT_ROWS;
    float scale = 1.0f / sqrtf((float)HD), dk_sum[ATT_ROWS][D / 32] = {}, dv_sum[ATT_ROWS][D / 32] = {};
    attention_load<D>(k_tile, k + ((long)b * T + first) * ld_k + (long)kv_head * HD, ld_k, T - first, HD);
    attention_load<D>(v_tile, v + ((long)b * T + first) * ld_v + (long)kv_head * HD, ld_v, T - first, HD);
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++)
        for (int i0 = first; i0 < T; i0 += ATT_TILE) {
            __syncthreads();
            attention_load<D>(q_tile, q + ((long)b * T + i0) * ld_q + (long)h * HD, ld_q, T - i0, HD);
            attention_load<D>(dout_tile, dout + (((long)b * T + i0) * NH + h) * HD, (long)NH * HD, T - i0, HD);
            __syncthreads();
            int i = i0 + lane;
            float lse_i = i < T ? lse[((long)b * NH + h) * T + i] : 0;
            float dot_i = i < T ? dots[((long)b * NH + h) * T + i] : 0;
            float p[ATT_ROWS], ds[ATT_ROWS];
            attention_dots<D>(p, k_tile + row * (D + 4), q_tile);
            attention_dots<D>(ds, v_tile + row * (D + 4), dout_tile);
            #pragma unroll
            for (int r = 0; r < ATT_ROWS; r++) {
                p[r] = first + row + r <= i ? expf(scale * p[r] - lse_i) : 0.0f;    // no query: q, dout are zero
                ds[r] = p[r] * (ds[r] - dot_i);
            }
            attention_sums<D>(dv_sum, p, dout_tile);
            attention_sums<D>(dk_sum, ds, q_tile);
        }
    #pragma unroll
    for (int r = 0; r < ATT_ROWS; r++)
        if (first + row + r < T) {
            long t = (long)b * T + first + row + r;
            attention_store<D>(dk + t * ld_dk + (long)kv_head * HD, dk_sum[r], scale, HD);
            attention_store<D>(dv + t * ld_dv + (long)kv_head * HD, dv_sum[r], 1, HD);
        }
}

template <int D>
static void attention_forward_launch(float* out, float* lse, const float* q, long ld_q, const float* k, long ld_k,
                                     const float* v, long ld_v, int B, int Tq, int Tk, int NH, int NKV, int HD,
                                     cudaStream_t stream) {
    size_t bytes = 3 * attention_tile_floats<D>() * sizeof(float);
    allow_shared(attention_forward_kernel<D>, bytes);
    attention_forward_kernel<D><<<dim3(NH, ceil_div(Tq, ATT_TILE), B), ATT_THREADS, bytes, stream>>>(
        out, lse, q, ld_q, k, ld_k, v, ld_v, Tq, Tk, NH, NKV, HD);
    CHECK(cudaGetLastError());
}
template <int D>
static void attention_backward_launch(float* dq, float* dk, float* dv, const float* dots, const float* dout,
                                      const float* lse, const float* q, long ld_q, const float* k, long ld_k,
                                      const float* v, long ld_v, long ld_dqk, long ld_dv, int B, int T, int NH, int NKV,
                                      int HD, cudaStream_t stream) {
    size_t bytes = 4 * attention_tile_floats<D>() * sizeof(float);
    int blocks = ceil_div(T, ATT_TILE);
    allow_shared(attention_backward_kv_kernel<D>, bytes);
    allow_shared(attention_backward_q_kernel<D>, bytes);
    attention_backward_kv_kernel<D><<<dim3(NKV, blocks, B), ATT_THREADS, bytes, stream>>>(
        dk, dv, dout, lse, dots, q, ld_q, k, ld_k, v, ld_v, ld_dqk, ld_dv, T, NH, NKV, HD);
    CHECK(cudaGetLastError());
    attention_backward_q_kernel<D><<<dim3(NH, blocks, B), ATT_THREADS, bytes, stream>>>(
        dq, dout, lse, dots, q, ld_q, k, ld_k, v, ld_v, ld_dqk, T, NH, NKV, HD);
    CHECK(cudaGetLastError());
}

// -- bf16: the same on tensor cores, 128 rows in a block, 16 or 32 in each warp; dev/cuda/attention.cu comes to it from
// the definition in four steps
#include "dev/lib/cuda/attention_bf16.cuh"

// Calls `launch` with the head size rounded up, as a number that the compiler knows.
template <class Launch> static void attention_sized(int HD, Launch launch) {
    if (HD <= 32) launch(std::integral_constant<int, 32>());
    else if (HD <= 64) launch(std::integral_constant<int, 64>());
    else if (HD <= 96) launch(std::integral_constant<int, 96>());
    else if (HD <= gpu_attention_max_head_dim()) launch(std::integral_constant<int, gpu_attention_max_head_dim()>());
    else die(1, "attention: head size %d, the largest is %d", HD, gpu_attention_max_head_dim());
}

// Attention of Tq queries, which are the last Tq of Tk positions, in B sequences (Tq < Tk when generating with a cache
// of keys and values). T is float or bf16; all sizes and strides are free, HD up to gpu_attention_max_head_dim().
//     out (B Tq, NH HD); lse (B, NH, Tq), of the scaled scores
//     row n of q at q + n ld_q; position t of sequence b of k and v at k + (b Tk + t) ld_k, v + (b Tk + t) ld_v; in
//     each, the heads one after the other. Query head h uses key and value head h / (NH / NKV).
// A query's result has the same bits whatever Tq is: tiles of keys start at key 0 in every call, and keys that a query
// may not see add exact zeros.
template <class T>
static void gpu_attention_forward(T* out, float* lse, const T* q, long ld_q, const T* k, long ld_k, const T* v,
                                  long ld_v, int B, int Tq, int Tk, int NH, int NKV, int HD, cudaStream_t stream = 0) {
    attention_sized(HD, [=](auto size) {
        attention_forward_launch<decltype(size)::value>(out, lse, q, ld_q, k, ld_k, v, ld_v, B, Tq, Tk, NH, NKV, HD,
                                                        stream);
    });
}

// The gradients of q, k, v, which are overwritten: rows of dq and dk lie ld_dqk apart, rows of dv ld_dv. Tq = Tk = T.
// dout, out (B T, NH HD); lse, and D as scratch, (B, NH, T).
template <class T>
static void gpu_attention_backward(T* dq, T* dk, T* dv, float* D, const T* dout, const T* out, const float* lse,
                                   const T* q, long ld_q, const T* k, long ld_k, const T* v, long ld_v, long ld_dqk,
                                   long ld_dv, int B, int length, int NH, int NKV, int HD, cudaStream_t stream = 0) {
    attention_dot_kernel<<<ceil_div((long)B * length * NH, 8), 256, 0, stream>>>(D, dout, out, B, length, NH, HD);
    CHECK(cudaGetLastError());
    attention_sized(HD, [=](auto size) {
        attention_backward_launch<decltype(size)::value>(dq, dk, dv, D, dout, lse, q, ld_q, k, ld_k, v, ld_v, ld_dqk,
                                                         ld_dv, B, length, NH, NKV, HD, stream);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Layers: norms and residual sums
//
// A block works on one row at a time, thread i on vectors i, i + threads, ... of it, the same ones in every pass, so
// that what a thread left in shared memory needs no barrier to be read again by it. One 16-byte vector of each operand
// a thread is the aim: an SM of an A100 or H100 needs about 40 KB of loads under way to saturate the memory, which
// 1024 threads with 3 loads of 16 bytes pass. Rows beyond ROW_THREADS vectors are walked in a loop: larger blocks would
// be few on an SM and wait for each other at the barriers together.
enum { ROW_THREADS = 256 };

static int row_threads(long vectors) { return vectors < ROW_THREADS ? ceil_div(vectors, 32) * 32 : ROW_THREADS; }

// Gradients of norm weights are sums over all rows. A fixed number of blocks makes as many partial sums, each of rows
// p, p + P, p + 2 P, ..., which gpu_add_parts adds up. P depends on N alone, so that every card adds in the same order.
// There are up to 1024 blocks, 8 for each of an H100's 132 SMs, and each has about 16 rows or more, so that its part is
// little beside what it reads.
static int gpu_norm_parts(int N) { return N > 16 * 1024 ? 1024 : ceil_div(N, 16); }

// x (W) += sum over k of gates_nk y[row_of_nk], in the order of k; gates NULL: ones; row_of NULL: y's row n, K = 1.
// The loads of U rows are under way together; U divides K, so that no load stands behind a condition.
template <class T, int W, int U>
__device__ static inline void add_rows(float* x, const T* y, const float* gates, const int* row_of, long n, int K,
                                       int H) {
    #pragma unroll 1
    for (long a = n * K; a < (n + 1) * K; a += U) {
        long rows[U];
        float gate[U], y_k[U][W];
        #pragma unroll
        for (int k = 0; k < U; k++) {
            rows[k] = row_of ? row_of[a + k] : n;
            gate[k] = gates ? gates[a + k] : 1.0f;
        }
        #pragma unroll
        for (int k = 0; k < U; k++) load_vector<W>(y_k[k], y + rows[k] * H);
        #pragma unroll
        for (int k = 0; k < U; k++)
            for (int j = 0; j < W; j++) x[j] += gate[k] * y_k[k][j];
    }
}

// One block per row n of
//     sum_n = residual_n + sum over k of gates_nk y[row_of_nk]
//     normed_n = weight * sum_n / sqrt(mean(sum_n^2) + eps)
// See gpu_combine_rmsnorm. W: numbers in a vector; U: rows of y loaded together; shared memory: a row of T.
template <class T, int W, int U>
__global__ void __launch_bounds__(ROW_THREADS)
combine_rmsnorm_kernel(T* __restrict__ sum, T* __restrict__ normed, float* __restrict__ rstd,
                       const T* __restrict__ residual, const T* __restrict__ y, const float* __restrict__ gates,
                       const int* __restrict__ row_of, int K, const float* __restrict__ weight, int H, float eps) {
    extern __shared__ uint4 combine_shared[];
    __shared__ float partial[32];
    T* row = (T*)combine_shared;
    long n = blockIdx.x;
    float squares = 0;
    for (int i = threadIdx.x * W; i < H; i += blockDim.x * W) {
        float x[W] = {0};
        if (residual) load_vector<W>(x, residual + n * H + i);
        add_rows<T, W, U>(x, y + i, gates, row_of, n, K, H);
        store_vector<W>(sum + n * H + i, x);
        if (!normed) continue;
        store_vector<W>(row + i, x);
        for (int j = 0; j < W; j++) squares += rounded<T>(x[j]) * rounded<T>(x[j]);
    }
    if (!normed) return;
    float r = 1.0f / sqrtf(block_sum(squares, partial) / H + eps);
    for (int i = threadIdx.x * W; i < H; i += blockDim.x * W) {
        float x[W], w[W];
        load_vector<W>(x, row + i);
        load_vector<W>(w, weight + i);
        for (int j = 0; j < W; j++) x[j] *= w[j] * r;
        store_vector<W>(normed + n * H + i, x);
    }
    if (threadIdx.x == 0) rstd[n] = r;
}

// The sum of the rows that belong to a token, the residual stream, and RMSNorm (Zhang and Sennrich 2019) of the result:
//     sum_n = residual_n + sum over k of gates_nk y[row_of_nk]      in the order of k
//     normed_n = weight * sum_n * rstd_n,  rstd_n = 1 / sqrt(mean(sum_n^2) + eps)
// sum, normed, residual (N, H); y (rows, H); rstd (N); weight (H); gates, row_of (N, K)
// residual NULL: zeros. gates NULL: ones. row_of NULL: y's row n, with K = 1. normed NULL: only the sum is made, and
// rstd and weight are not touched. It serves as
//     experts' combine + next norm       residual = x_mid, y = the experts' rows
//     attention's residual + next norm   residual = x, y = attention's projection, row_of NULL
//     embedding lookup + first norm      y = the table (V, H), row_of = tokens, residual NULL
// The norm is that of `sum` as stored, because that is what the backward pass will see. Outputs overlap nothing.
template <class T>
static void gpu_combine_rmsnorm(T* sum, T* normed, float* rstd, const T* residual, const T* y, const float* gates,
                                const int* row_of, int K, const float* weight, int N, int H, float eps,
                                cudaStream_t stream = 0) {
    if (N == 0) return;
    const int W = 16 / sizeof(T);
    int wide = H % W == 0 && aligned_16(sum, normed, residual, y, weight);
    auto combine_rmsnorm = !wide        ? combine_rmsnorm_kernel<T, 1, 1>
                           : K % 4 == 0 ? combine_rmsnorm_kernel<T, W, 4>
                           : K % 2 == 0 ? combine_rmsnorm_kernel<T, W, 2>
                                        : combine_rmsnorm_kernel<T, W, 1>;
    size_t shared = normed ? sizeof(T) * H : 0;
    allow_shared(combine_rmsnorm, shared);
    combine_rmsnorm<<<N, row_threads(wide ? H / W : H), shared, stream>>>(sum, normed, rstd, residual, y, gates, row_of,
                                                                          K, weight, H, eps);
    CHECK(cudaGetLastError());
}

// Block p of P works on rows p, p + P, ... See gpu_combine_rmsnorm_backward. Two rows of floats lie in shared memory:
// this block's part of dweight, and what is known of dx before the row's mean is. x is read twice, from L1 the
// second time.
template <class T, int W, int U>
__global__ void __launch_bounds__(ROW_THREADS, 4)
combine_rmsnorm_backward_kernel(T* __restrict__ dx, int add, float* __restrict__ dweight_parts,
                                const T* __restrict__ y, const float* __restrict__ extra,
                                const int* __restrict__ row_of, int K, const T* __restrict__ x,
                                const float* __restrict__ rstd, const float* __restrict__ weight, int N, int H) {
    extern __shared__ uint4 norm_backward_shared[];
    __shared__ float partial[32];
    float *dweight = (float*)norm_backward_shared, *direct = dweight + H;
    int first = threadIdx.x * W, step = blockDim.x * W;
    for (int i = first; i < H; i += step)
        for (int j = 0; j < W; j++) dweight[i + j] = 0;
    for (long n = blockIdx.x; n < N; n += gridDim.x) {
        float r = rstd[n], mean = 0;
        for (int i = first; i < H; i += step) {
            float d[W] = {0}, a[W] = {0}, b[W], x_i[W];
            load_vector<W>(x_i, x + n * H + i);         // first of all, so that all loads are under way together
            if (add) load_vector<W>(a, dx + n * H + i);
            if (extra) load_vector<W>(d, extra + n * H + i);
            add_rows<T, W, U>(d, y + i, NULL, row_of, n, K, H);
            load_vector<W>(b, dweight + i);
            for (int j = 0; j < W; j++) b[j] += d[j] * x_i[j] * r;
            store_vector<W>(dweight + i, b);
            load_vector<W>(b, weight + i);
            for (int j = 0; j < W; j++) {
                d[j] *= b[j];
                mean += d[j] * x_i[j];
                d[j] = a[j] + d[j] * r;
            }
            store_vector<W>(direct + i, d);
        }
        mean = block_sum(mean, partial) / H * (r * r * r);
        for (int i = first; i < H; i += step) {
            float d[W], a[W];
            load_vector<W>(d, direct + i);
            load_vector<W>(a, x + n * H + i);
            for (int j = 0; j < W; j++) d[j] -= a[j] * mean;
            store_vector<W>(dx + n * H + i, d);
        }
    }
    for (int i = first; i < H; i += step) {
        float d[W];
        load_vector<W>(d, dweight + i);
        store_vector<W>(dweight_parts + (long)blockIdx.x * H + i, d);
    }
}

// Backward of RMSNorm, whose output's gradient is still in K rows a token (the gradient of a gather) and a part of
// its own, from the router:
//     d_n = extra_n + sum over k of y[row_of_nk]            in the order of k
//     dx_n (+)= rstd_n d_n weight - x_n rstd_n^3 mean(d_n weight x_n)
//     dweight_parts_p = sum over n = p, p + P, ... of d_n x_n rstd_n        P = gpu_norm_parts(N)
// dx, x, extra (N, H); y (rows, H); row_of (N, K); rstd (N); weight (H); dweight_parts (P, H), for gpu_add_parts.
// add = 1 adds to dx: the gradient that flows past the norm on the residual stream. extra NULL: zeros. row_of NULL: y's
// row n, with K = 1. dx overlaps nothing.
template <class T>
static void gpu_combine_rmsnorm_backward(T* dx, int add, float* dweight_parts, const T* y, const float* extra,
                                         const int* row_of, int K, const T* x, const float* rstd, const float* weight,
                                         int N, int H, cudaStream_t stream = 0) {
    if (N == 0) return;
    const int W = 16 / sizeof(T);
    int wide = H % W == 0 && aligned_16(dx, dweight_parts, y, extra, x, weight);
    auto combine_rmsnorm_backward = !wide        ? combine_rmsnorm_backward_kernel<T, 1, 1>
                                    : K % 4 == 0 ? combine_rmsnorm_backward_kernel<T, W, 4>
                                    : K % 2 == 0 ? combine_rmsnorm_backward_kernel<T, W, 2>
                                                 : combine_rmsnorm_backward_kernel<T, W, 1>;
    size_t shared = sizeof(float) * 2 * H;
    allow_shared(combine_rmsnorm_backward, shared);
    combine_rmsnorm_backward<<<gpu_norm_parts(N), row_threads(wide ? H / W : H), shared, stream>>>(
        dx, add, dweight_parts, y, extra, row_of, K, x, rstd, weight, N, H);
    CHECK(cudaGetLastError());
}

// A block adds 32 columns: warp w the rows w, w + 32, ..., then the first warp the 32 warps' sums.
static __global__ void __launch_bounds__(1024)
add_parts_kernel(float* __restrict__ dweight, const float* __restrict__ parts, int P, long size, int add) {
    __shared__ float sums[32][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long i = blockIdx.x * 32L + lane;
    float sum = 0;
    if (i < size) {
        #pragma unroll 8
        for (int p = warp; p < P; p += 32) sum += parts[p * size + i];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || i >= size) return;
    for (int w = 1; w < 32; w++) sum += sums[w][lane];
    dweight[i] = add ? dweight[i] + sum : sum;
}

// dweight (size) (+)= sum over p of parts (P, size), in a fixed order
static void gpu_add_parts(float* dweight, const float* parts, int P, long size, int add, cudaStream_t stream = 0) {
    if (size == 0) return;
    add_parts_kernel<<<ceil_div(size, 32), 1024, 0, stream>>>(dweight, parts, P, size, add);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Norm of queries and keys, and rotary positions

// A head is worked on by `lanes` neighbouring threads (a power of two, at most a warp), each with vectors of the
// head's first half and their partners in the second. Sum over those threads; each gets it.
__device__ static inline float head_sum(float x, int lanes) {
    for (int o = lanes / 2; o; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
static int head_lanes(int vectors) {
    int lanes = 1;
    while (lanes < vectors && lanes < 32) lanes *= 2;
    return lanes;
}

// One block per token; see gpu_qk_norm_rope. The second time that a number is read it comes from L1.
template <class T, int W>
__global__ void __launch_bounds__(ROW_THREADS)
qk_norm_rope_kernel(T* __restrict__ rotated, float* __restrict__ q_rstd, float* __restrict__ k_rstd,
                    const T* __restrict__ qkv, const float* __restrict__ q_norm, const float* __restrict__ k_norm,
                    int mode, const float* __restrict__ cosines, const float* __restrict__ sines, int length, int start,
                    int NH, int NKV, int HD, float eps, int lanes) {
    __shared__ float partial[32];
    int heads = NH + NKV, half = HD / 2, step = lanes * W;
    int first = threadIdx.x % lanes * W, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    long n = blockIdx.x, position = start + (int)blockIdx.x % length;
    const T* x = qkv + n * (heads + NKV) * HD;
    float q_r = 1, k_r = 1;
    if (mode == QK_NORM_ROW) {
        float squares[2] = {0, 0};
        for (int h = group; h < heads; h += groups)
            for (int i = first; i < HD; i += step) {
                float a[W], sum = 0;
                load_vector<W>(a, x + (long)h * HD + i);
                for (int j = 0; j < W; j++) sum += a[j] * a[j];
                squares[0] += h < NH ? sum : 0;
                squares[1] += h < NH ? 0 : sum;
            }
        q_r = 1.0f / sqrtf(block_sum(squares[0], partial) / (NH * HD) + eps);
        k_r = 1.0f / sqrtf(block_sum(squares[1], partial) / (NKV * HD) + eps);
        if (threadIdx.x == 0) {
            q_rstd[n] = q_r;
            k_rstd[n] = k_r;
        }
    }
    for (int h = group; h - group < heads; h += groups) {       // all threads go round equally often: head_sum
        int is_q = h < NH, size = h < heads ? half : 0;         // and those beyond the last head idle
        float r = is_q ? q_r : k_r;
        const T* x_h = x + (long)h * HD;
        if (mode == QK_NORM_HEAD) {
            float sum = 0;
            for (int i = first; i < size; i += step) {
                float a[W], b[W];
                load_vector<W>(a, x_h + i);
                load_vector<W>(b, x_h + half + i);
                for (int j = 0; j < W; j++) sum += a[j] * a[j] + b[j] * b[j];
            }
            r = 1.0f / sqrtf(head_sum(sum, lanes) / HD + eps);
            if (size > 0 && first == 0) (is_q ? q_rstd + n * NH : k_rstd + n * NKV - NH)[h] = r;
        }
        const float* weight = (is_q ? q_norm : k_norm) + (mode == QK_NORM_ROW ? (long)(is_q ? h : h - NH) * HD : 0);
        for (int i = first; i < size; i += step) {
            float a[W], b[W], c[W], s[W];
            load_vector<W>(a, x_h + i);
            load_vector<W>(b, x_h + half + i);
            if (mode != QK_NORM_NONE) {
                load_vector<W>(c, weight + i);
                load_vector<W>(s, weight + half + i);
                for (int j = 0; j < W; j++) {
                    a[j] *= c[j] * r;
                    b[j] *= s[j] * r;
                }
            }
            load_vector<W>(c, cosines + position * half + i);
            load_vector<W>(s, sines + position * half + i);
            for (int j = 0; j < W; j++) {
                float a_j = a[j];
                a[j] = a_j * c[j] - b[j] * s[j];
                b[j] = b[j] * c[j] + a_j * s[j];
            }
            T* out = rotated + (n * heads + h) * HD + i;
            store_vector<W>(out, a);
            store_vector<W>(out + half, b);
        }
    }
}

// Queries and keys, normalised (mode QK_NORM_HEAD: each head by itself, QK_NORM_ROW: all heads of a token as one
// vector) and turned by their positions (Su et al. 2021): elements i of a head's two halves are a point in the plane,
//     (a, b) -> (a cos - b sin, b cos + a sin)        with cos and sin of position * theta^(-2 i / HD)
// rotated (N, (NH + NKV) HD): queries, keys; qkv (N, (NH + 2 NKV) HD): queries, keys, values; q_norm, k_norm (HD), for
// QK_NORM_ROW (NH HD) and (NKV HD), for QK_NORM_NONE NULL. q_rstd, k_rstd for the backward pass: (N, NH) and (N, NKV),
// for QK_NORM_ROW (N), for QK_NORM_NONE NULL. cosines, sines (positions, HD / 2); row n is at start + n % length.
template <class T>
static void gpu_qk_norm_rope(T* rotated, float* q_rstd, float* k_rstd, const T* qkv, const float* q_norm,
                             const float* k_norm, int mode, const float* cosines, const float* sines, int N, int length,
                             int start, int NH, int NKV, int HD, float eps, cudaStream_t stream = 0) {
    if (N == 0) return;
    const int W = 16 / sizeof(T);
    int wide = HD / 2 % W == 0 && aligned_16(rotated, qkv, q_norm, k_norm, cosines, sines);
    int lanes = head_lanes(wide ? HD / 2 / W : HD / 2);
    auto qk_norm_rope = wide ? qk_norm_rope_kernel<T, W> : qk_norm_rope_kernel<T, 1>;
    qk_norm_rope<<<N, row_threads((long)(NH + NKV) * lanes), 0, stream>>>(rotated, q_rstd, k_rstd, qkv, q_norm, k_norm,
                                                                          mode, cosines, sines, length, start, NH, NKV,
                                                                          HD, eps, lanes);
    CHECK(cudaGetLastError());
}

// The gradients of the halves' W numbers before the rotation: the point is turned back.
template <class T, int W>
__device__ static inline void load_unrotated(float* a, float* b, const T* drotated, int half, const float* cosines,
                                             const float* sines) {
    float c[W], s[W];
    load_vector<W>(a, drotated);
    load_vector<W>(b, drotated + half);
    load_vector<W>(c, cosines);
    load_vector<W>(s, sines);
    for (int j = 0; j < W; j++) {
        float a_j = a[j];
        a[j] = a_j * c[j] + b[j] * s[j];
        b[j] = b[j] * c[j] - a_j * s[j];
    }
}

// Sum over W numbers of gradient * weight * x: what the mean in RMSNorm's gradient is made of.
template <class T, int W>
__device__ static inline float norm_product(const float* d, const float* weight, const T* x) {
    float w[W], x_i[W], sum = 0;
    load_vector<W>(w, weight);
    load_vector<W>(x_i, x);
    for (int j = 0; j < W; j++) sum += d[j] * w[j] * x_i[j];
    return sum;
}

// RMSNorm's gradient for W numbers: dx = r (d weight - x mean), and d x r is added to `sums`.
template <class T, int W>
__device__ static inline void norm_gradient(T* dx, float* sums, const float* d, const float* weight, const T* x,
                                            float r, float mean) {
    float w[W], x_i[W], total[W];
    load_vector<W>(w, weight);
    load_vector<W>(x_i, x);
    load_vector<W>(total, sums);
    for (int j = 0; j < W; j++) {
        total[j] += d[j] * x_i[j] * r;
        w[j] = r * (d[j] * w[j] - x_i[j] * mean);
    }
    store_vector<W>(sums, total);
    store_vector<W>(dx, w);
}

// Block p of P works on tokens p, p + P, ...; see gpu_qk_norm_rope_backward. Shared memory holds the sums for the
// norms' weights, for each head its own, so that each has one thread that adds to it; heads are added at the end.
template <class T, int W>
__global__ void __launch_bounds__(ROW_THREADS)
qk_norm_rope_backward_kernel(T* __restrict__ dqkv, float* __restrict__ dq_norm_parts, float* __restrict__ dk_norm_parts,
                             const T* __restrict__ drotated, const T* __restrict__ qkv,
                             const float* __restrict__ q_rstd, const float* __restrict__ k_rstd,
                             const float* __restrict__ q_norm, const float* __restrict__ k_norm, int mode,
                             const float* __restrict__ cosines, const float* __restrict__ sines, int N, int length,
                             int NH, int NKV, int HD, int lanes) {
    extern __shared__ uint4 qk_shared[];
    __shared__ float partial[32];
    float* sums = (float*)qk_shared;
    int heads = NH + NKV, half = HD / 2, step = lanes * W, row = mode == QK_NORM_ROW;
    int first = threadIdx.x % lanes * W, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    if (mode != QK_NORM_NONE)
        for (int i = threadIdx.x; i < heads * HD; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    for (long n = blockIdx.x; n < N; n += gridDim.x) {
        const T *dout = drotated + n * heads * HD, *x = qkv + n * (heads + NKV) * HD;
        T* dx = dqkv + n * (heads + NKV) * HD;
        long position = (int)n % length;
        const float *cos_n = cosines + position * half, *sin_n = sines + position * half;
        float q_mean = 0, k_mean = 0;
        if (row) {
            for (int h = group; h < heads; h += groups)
                for (int i = first; i < half; i += step) {
                    float a[W], b[W];
                    const float* weight = h < NH ? q_norm + (long)h * HD : k_norm + (long)(h - NH) * HD;
                    long at = (long)h * HD + i;
                    load_unrotated<T, W>(a, b, dout + at, half, cos_n + i, sin_n + i);
                    float sum = norm_product<T, W>(a, weight + i, x + at) +
                                norm_product<T, W>(b, weight + half + i, x + at + half);
                    q_mean += h < NH ? sum : 0;
                    k_mean += h < NH ? 0 : sum;
                }
            q_mean = block_sum(q_mean, partial) / (NH * HD) * (q_rstd[n] * q_rstd[n]);
            k_mean = block_sum(k_mean, partial) / (NKV * HD) * (k_rstd[n] * k_rstd[n]);
        }
        for (int h = group; h - group < heads; h += groups) {       // all threads go round equally often: head_sum
            int is_q = h < NH, size = h < heads ? half : 0;
            const float* weight = (is_q ? q_norm : k_norm) + (row ? (long)(is_q ? h : h - NH) * HD : 0);
            float r = 1, mean = is_q ? q_mean : k_mean;
            if (row) r = is_q ? q_rstd[n] : k_rstd[n];
            if (mode == QK_NORM_HEAD) {
                float sum = 0;
                if (size > 0) r = is_q ? q_rstd[n * NH + h] : k_rstd[n * NKV + h - NH];
                for (int i = first; i < size; i += step) {
                    float a[W], b[W];
                    long at = (long)h * HD + i;
                    load_unrotated<T, W>(a, b, dout + at, half, cos_n + i, sin_n + i);
                    sum += norm_product<T, W>(a, weight + i, x + at) +
                           norm_product<T, W>(b, weight + half + i, x + at + half);
                }
                mean = head_sum(sum, lanes) / HD * (r * r);
            }
            for (int i = first; i < size; i += step) {
                float a[W], b[W];
                long at = (long)h * HD + i;
                load_unrotated<T, W>(a, b, dout + at, half, cos_n + i, sin_n + i);
                if (mode == QK_NORM_NONE) {
                    store_vector<W>(dx + at, a);
                    store_vector<W>(dx + at + half, b);
                } else {
                    norm_gradient<T, W>(dx + at, sums + at, a, weight + i, x + at, r, mean);
                    norm_gradient<T, W>(dx + at + half, sums + at + half, b, weight + half + i, x + at + half, r, mean);
                }
            }
        }
    }
    if (mode == QK_NORM_NONE) return;
    __syncthreads();
    int q_size = row ? NH * HD : HD, k_size = row ? NKV * HD : HD;
    for (int i = threadIdx.x; i < q_size + k_size; i += blockDim.x) {
        int is_q = i < q_size, column = is_q ? i : i - q_size;
        float sum = 0;
        for (int h = 0; h < (row ? 1 : is_q ? NH : NKV); h++) sum += sums[((is_q ? 0 : NH) + h) * HD + column];
        (is_q ? dq_norm_parts + (long)blockIdx.x * q_size : dk_norm_parts + (long)blockIdx.x * k_size)[column] = sum;
    }
}

// Backward of gpu_qk_norm_rope, for training (start = 0): the gradients of queries and keys are turned back and go
// through the norm. dqkv (N, (NH + 2 NKV) HD): queries' and keys' columns are written, values' are left alone.
// drotated (N, (NH + NKV) HD). dq_norm_parts, dk_norm_parts: P = gpu_norm_parts(N) partial sums, (P, HD) both, for
// QK_NORM_ROW (P, NH HD) and (P, NKV HD), for QK_NORM_NONE NULL; gpu_add_parts comes next. The others as there.
template <class T>
static void gpu_qk_norm_rope_backward(T* dqkv, float* dq_norm_parts, float* dk_norm_parts, const T* drotated,
                                      const T* qkv, const float* q_rstd, const float* k_rstd, const float* q_norm,
                                      const float* k_norm, int mode, const float* cosines, const float* sines, int N,
                                      int length, int NH, int NKV, int HD, cudaStream_t stream = 0) {
    if (N == 0) return;
    const int W = 16 / sizeof(T);
    int wide = HD / 2 % W == 0 && aligned_16(dqkv, drotated, qkv, q_norm, k_norm, cosines, sines);
    int lanes = head_lanes(wide ? HD / 2 / W : HD / 2);
    auto qk_norm_rope_backward = wide ? qk_norm_rope_backward_kernel<T, W> : qk_norm_rope_backward_kernel<T, 1>;
    size_t shared = mode == QK_NORM_NONE ? 0 : sizeof(float) * (NH + NKV) * HD;
    allow_shared(qk_norm_rope_backward, shared);
    qk_norm_rope_backward<<<gpu_norm_parts(N), row_threads((long)(NH + NKV) * lanes), shared, stream>>>(
        dqkv, dq_norm_parts, dk_norm_parts, drotated, qkv, q_rstd, k_rstd, q_norm, k_norm, mode, cosines, sines, N,
        length, NH, NKV, HD, lanes);
    CHECK(cudaGetLastError());
}

// Appends N tokens to one layer's cache of keys and values: rows past .. past + N - 1 of cache_k and cache_v
// (positions, NKV HD) from rotated (N, (NH + NKV) HD) and qkv (N, (NH + 2 NKV) HD).
template <class T>
__global__ void copy_cache_kernel(T* __restrict__ cache_k, T* __restrict__ cache_v, const T* __restrict__ rotated,
                                  const T* __restrict__ qkv, int N, int past, int NH, int NKV, int HD) {
    long width = (long)NKV * HD, i = blockIdx.x * (long)blockDim.x + threadIdx.x;
    if (i >= N * width) return;
    long n = i / width, column = i % width;
    cache_k[past * width + i] = rotated[n * (NH + NKV) * HD + NH * HD + column];
    cache_v[past * width + i] = qkv[n * (NH + 2 * NKV) * HD + (NH + NKV) * HD + column];
}
template <class T>
static void gpu_copy_cache(T* cache_k, T* cache_v, const T* rotated, const T* qkv, int N, int past, int NH, int NKV,
                           int HD, cudaStream_t stream = 0) {
    if (N == 0) return;
    copy_cache_kernel<<<ceil_div((long)N * NKV * HD, 256), 256, 0, stream>>>(cache_k, cache_v, rotated, qkv, N, past,
                                                                             NH, NKV, HD);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// The loss

enum { CLASSIFIER_THREADS = 1024 };
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
enum { CLASSIFIER_BLOCKS = 1 };     // on a multiprocessor that has 1536 threads
#else
enum { CLASSIFIER_BLOCKS = 2 };
#endif

// Adds e^x for W numbers to a running sum that is kept relative to the running maximum (online softmax, Milakov and
// Gimelshein 2018): sum_i e^(x_i) = sum e^max.
template <int W> __device__ static inline void add_exponentials(float* max, float* sum, const float* x) {
    float new_max = *max;
    for (int j = 0; j < W; j++) new_max = fmaxf(new_max, x[j]);
    *sum *= __expf(*max - new_max);
    for (int j = 0; j < W; j++) *sum += __expf(x[j] - new_max);
    *max = new_max;
}

// One block per token; see gpu_classifier. With V odd each row begins elsewhere, so a row is up to W - 1 numbers before
// the first multiple of 16 bytes, whole vectors, and up to W - 1 numbers behind. The second loop runs backwards: what
// was read last is still in the cache. Blocks are as large as can be, so that few rows are worked on at a time: two of
// V = 50304 bf16 numbers are 200 KB, near what the L1 of an SM holds.
template <class T>
__global__ void __launch_bounds__(CLASSIFIER_THREADS, sizeof(T) == 2 ? CLASSIFIER_BLOCKS : 1)
classifier_kernel(float* __restrict__ losses, T* __restrict__ logits, const int* __restrict__ targets, int V,
                  long row_size, float scale, int write_gradient) {
    const int W = 16 / sizeof(T);
    __shared__ float partial[32], maxima[32];
    long n = blockIdx.x;
    T* row = logits + n * row_size;
    int target = targets[n];
    float target_logit = to_float(row[target]);            // before the row is written, which barriers are between
    int before = (int)((16 - (uintptr_t)row % 16) % 16 / sizeof(T));
    if (before > V) before = V;
    int vectors = (V - before) / W, behind = V - before - vectors * W;
    int single = threadIdx.x < before ? threadIdx.x : vectors * W + threadIdx.x;    // the number outside of vectors
    bool has_single = threadIdx.x < before + behind;                                // that this thread sees to
    float max = -INFINITY, sum = 0, x[W];
    if (has_single) {
        x[0] = to_float(row[single]);
        add_exponentials<1>(&max, &sum, x);
    }
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        load_vector<W>(x, row + before + i * W);
        add_exponentials<W>(&max, &sum, x);
    }
    float row_max = warp_max(max);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = row_max;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; w++) row_max = fmaxf(row_max, maxima[w]);
    sum = block_sum(max == row_max ? sum : sum * __expf(max - row_max), partial);
    if (threadIdx.x == 0) losses[n] = row_max - target_logit + logf(sum);     // lse - logit would lose digits
    if (!write_gradient) return;
    float norm = scale / sum;
    for (int i = threadIdx.x + (vectors - 1) / (int)blockDim.x * blockDim.x; i >= 0; i -= blockDim.x) {
        if (i >= vectors) continue;
        int v = before + i * W;
        load_vector<W>(x, row + v);
        for (int j = 0; j < W; j++) x[j] = norm * __expf(x[j] - row_max) - (v + j == target ? scale : 0);
        store_vector<W>(row + v, x);
    }
    if (has_single)
        store(row + single, norm * __expf(to_float(row[single]) - row_max) - (single == target ? scale : 0));
}

// The loss of each token, and the logits turned into their gradient in place, so that no probabilities are stored:
//     losses_n = log sum_v exp(logits_nv) - logits_n,target
//     logits_nv = scale (exp(logits_nv) / sum_v exp(logits_nv) - [v = target])          if write_gradient
// losses (N), logits (N, V) in rows row_size apart, targets (N). __expf errs by |x| 2^-24 more than expf, on terms that
// are e^x of the sum.
template <class T>
static void gpu_classifier(float* losses, T* logits, const int* targets, int N, int V, long row_size, float scale,
                           int write_gradient, cudaStream_t stream = 0) {
    if (N == 0) return;
    int threads = ceil_div(ceil_div(V, 16 / sizeof(T)), 32) * 32;
    if (threads > CLASSIFIER_THREADS) threads = CLASSIFIER_THREADS;
    classifier_kernel<<<N, threads, 0, stream>>>(losses, logits, targets, V, row_size, scale, write_gradient);
    CHECK(cudaGetLastError());
}

// One block: 1024 sums of every 1024th loss, then their sum.
static __global__ void __launch_bounds__(1024)
add_losses_kernel(double* total, const float* __restrict__ losses, int N, double weight) {
    __shared__ double shared[32];
    double sum = 0;
    for (int n = threadIdx.x; n < N; n += 1024) sum += losses[n];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *total += weight * sum;
}

// total (1) += weight * sum of losses (N)
static void gpu_add_losses(double* total, const float* losses, int N, double weight, cudaStream_t stream = 0) {
    add_losses_kernel<<<1, 1024, 0, stream>>>(total, losses, N, weight);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// The embedding's gradient

// Which positions hold which token, by a counting sort on the host. tokens (N), all in 0 .. V-1; the *num_unique
// different ones go to `unique`, ascending, and the positions of unique[u], ascending, to positions[starts[u]] ..
// positions[starts[u+1]-1]. unique and positions have room for N numbers, starts for N + 1, counts_scratch for V.
static void group_tokens(int* unique, int* starts, int* positions, int* num_unique, const int* tokens, int N,
                         int* counts_scratch, int V) {
    int* next = counts_scratch;         // first how often a token occurs, then where its next position goes
    int u = 0, start = 0;
    memset(next, 0, sizeof(int) * V);
    for (int n = 0; n < N; n++) next[tokens[n]]++;
    for (int v = 0; v < V; v++) {
        int count = next[v];
        if (count == 0) continue;
        unique[u] = v;
        starts[u++] = next[v] = start;
        start += count;
    }
    starts[u] = N;
    *num_unique = u;
    for (int n = 0; n < N; n++) positions[next[tokens[n]]++] = n;
}

// Block (u, c) adds for one token 32 W columns. Its warps share the token's positions, so that one that makes up a
// tenth of a text does not hold up the rest; the warps' sums are added in order.
enum { EMBEDDING_WARPS = 8 };

template <class T, int W>
__global__ void __launch_bounds__(32 * EMBEDDING_WARPS)
embedding_backward_kernel(float* __restrict__ dtable, const T* __restrict__ dx, const int* __restrict__ unique,
                          const int* __restrict__ starts, const int* __restrict__ positions, int H) {
    __shared__ __align__(16) float sums[EMBEDDING_WARPS][32 * W];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, end = starts[blockIdx.x + 1];
    int first = blockIdx.y * 32 * W, column = first + lane * W;
    float sum[W] = {0}, d[W];
    if (column < H) {
        #pragma unroll 4
        for (int p = starts[blockIdx.x] + warp; p < end; p += EMBEDDING_WARPS) {
            load_vector<W>(d, dx + (long)positions[p] * H + column);
            for (int j = 0; j < W; j++) sum[j] += d[j];
        }
    }
    store_vector<W>(&sums[warp][lane * W], sum);
    __syncthreads();
    if (threadIdx.x >= 32 * W || first + (int)threadIdx.x >= H) return;
    float total = 0;
    for (int w = 0; w < EMBEDDING_WARPS; w++) total += sums[w][threadIdx.x];
    dtable[(long)unique[blockIdx.x] * H + first + threadIdx.x] += total;
}

// dtable[unique_u] += sum of dx's rows at the positions of that token: each row of the table has one block to add to
// it. dtable (V, H), dx (N, H); unique, starts and positions from group_tokens, on the device.
template <class T>
static void gpu_embedding_backward(float* dtable, const T* dx, const int* unique, const int* starts,
                                   const int* positions, int num_unique, int H, cudaStream_t stream = 0) {
    if (num_unique == 0) return;
    const int W = 16 / sizeof(T);
    int wide = H % W == 0 && aligned_16(dx);
    auto embedding_backward = wide ? embedding_backward_kernel<T, W> : embedding_backward_kernel<T, 1>;
    dim3 grid(num_unique, ceil_div(H, wide ? 32 * W : 32));
    embedding_backward<<<grid, 32 * EMBEDDING_WARPS, 0, stream>>>(dtable, dx, unique, starts, positions, H);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// The update

// Most partial sums of the gradient's norm. With 256 threads each, 8 blocks fill an SM: an H100 holds all of them at
// once.
enum { GRADIENT_NORM_PARTS = 1024 };

// parts_p = sum of squares of the numbers that block p takes: vectors i, i + threads, ... are those of the i-th of all
// threads. The squares of a vector are added as floats, the rest in doubles.
template <int W>
__global__ void __launch_bounds__(256) square_sums_kernel(double* __restrict__ parts, const float* __restrict__ x,
                                                          long n) {
    __shared__ double shared[32];
    long thread = blockIdx.x * 256L + threadIdx.x, threads = gridDim.x * 256L;
    double sum = 0;
    #pragma unroll 4
    for (long i = thread; i < n / W; i += threads) {
        float a[W], squares = 0;
        load_vector<W>(a, x + i * W);
        for (int j = 0; j < W; j++) squares += a[j] * a[j];
        sum += squares;
    }
    long i = n / W * W + thread;                    // less than a vector is left
    if (i < n) sum += x[i] * x[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(256) root_of_sum_kernel(float* norm, const double* __restrict__ parts,
                                                                     int count) {
    __shared__ double shared[32];
    double sum = 0;
    for (int p = threadIdx.x; p < count; p += 256) sum += parts[p];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

// norm (1) = 2-norm of grads (n); parts (GRADIENT_NORM_PARTS) is scratch
static void gpu_gradient_norm(float* norm, double* parts, const float* grads, long n, cudaStream_t stream = 0) {
    auto square_sums = aligned_16(grads) ? square_sums_kernel<4> : square_sums_kernel<1>;
    int count = n < 4096L * GRADIENT_NORM_PARTS ? ceil_div(n, 4096) : GRADIENT_NORM_PARTS;  // at least 16 a thread
    square_sums<<<count, 256, 0, stream>>>(parts, grads, n);
    root_of_sum_kernel<<<1, 256, 0, stream>>>(norm, parts, count);
    CHECK(cudaGetLastError());
}

// AdamW for W neighbouring numbers
template <class T, int W>
__device__ static inline void adamw_vector(T* copy, float* w, const float* grad, float* m, float* v, float clip_scale,
                                           float rate, float keep, float beta1, float beta2, float eps, float root) {
    float w_i[W], g_i[W], m_i[W], v_i[W];
    load_vector<W>(w_i, w);
    load_vector<W>(g_i, grad);
    load_vector<W>(m_i, m);
    load_vector<W>(v_i, v);
    for (int j = 0; j < W; j++) {
        float g = g_i[j] * clip_scale;
        m_i[j] = beta1 * m_i[j] + (1.0f - beta1) * g;
        v_i[j] = beta2 * v_i[j] + (1.0f - beta2) * g * g;
        w_i[j] = keep * w_i[j] - rate * m_i[j] / (sqrtf(v_i[j]) * root + eps);
    }
    store_vector<W>(w, w_i);
    store_vector<W>(m, m_i);
    store_vector<W>(v, v_i);
    if (copy) store_vector<W>(copy, w_i);
}

// A thread updates W numbers, the last one what is left; see gpu_adamw.
template <class T, int W>
__global__ void __launch_bounds__(256)
adamw_kernel(T* __restrict__ copy, float* __restrict__ w, const float* __restrict__ grad, float* __restrict__ m,
             float* __restrict__ v, long n, const float* __restrict__ norm, float clip, float rate, float keep,
             float beta1, float beta2, float eps, float root) {
    float norm_now = *norm, clip_scale = 1;
    if (!isfinite(norm_now)) return;
    if (clip > 0 && norm_now + 1e-6f > clip) clip_scale = clip / (norm_now + 1e-6f);
    long i = (blockIdx.x * 256L + threadIdx.x) * W;
    if (i + W <= n)
        adamw_vector<T, W>(copy ? copy + i : NULL, w + i, grad + i, m + i, v + i, clip_scale, rate, keep, beta1, beta2,
                           eps, root);
    else
        for (; i < n; i++)
            adamw_vector<T, 1>(copy ? copy + i : NULL, w + i, grad + i, m + i, v + i, clip_scale, rate, keep, beta1,
                               beta2, eps, root);
}

// One AdamW step (Loshchilov and Hutter 2019) on n parameters, with g the gradient, scaled so that the norm of all
// gradients, *norm, does not exceed `clip` (0: any norm will do), as PyTorch's clip_grad_norm_:
//     m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//     w -= lr (m / correction1) / (sqrt(v / correction2) + eps) + lr decay w           correction_i = 1 - beta_i^step
// copy (n) = w in the type of the products, NULL where that is float. If *norm is not finite, nothing changes.
template <class T>
static void gpu_adamw(T* copy, float* w, const float* grad, float* m, float* v, long n, const float* norm, float clip,
                      float lr, float decay, float beta1, float beta2, float eps, float correction1,
                      float correction2, cudaStream_t stream = 0) {
    if (n == 0) return;
    const int W = 16 / sizeof(T);
    int wide = aligned_16(copy, w, grad, m, v);
    auto adamw = wide ? adamw_kernel<T, W> : adamw_kernel<T, 1>;
    adamw<<<ceil_div(n, wide ? 256 * W : 256), 256, 0, stream>>>(copy, w, grad, m, v, n, norm, clip, lr / correction1,
                                                      1.0f - lr * decay, beta1, beta2, eps, 1.0f / sqrtf(correction2));
    CHECK(cudaGetLastError());
}

template <class T, int W>
__global__ void __launch_bounds__(256) convert_kernel(T* __restrict__ out, const float* __restrict__ in, long n) {
    long i = (blockIdx.x * 256L + threadIdx.x) * W;
    if (i + W <= n) {
        float x[W];
        load_vector<W>(x, in + i);
        store_vector<W>(out + i, x);
    } else {
        for (; i < n; i++) store(out + i, in[i]);
    }
}

// out (n) = in (n), in the type of the products
template <class T> static void gpu_convert(T* out, const float* in, long n, cudaStream_t stream = 0) {
    if (n == 0) return;
    const int W = 16 / sizeof(T);
    int wide = aligned_16(out, in);
    auto convert = wide ? convert_kernel<T, W> : convert_kernel<T, 1>;
    convert<<<ceil_div(n, wide ? 256 * W : 256), 256, 0, stream>>>(out, in, n);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Routing
//
// Most kernels here give each token a warp, whose lane i takes the numbers i, i + 32, i + 64 ... of the token's row and
// adds them up in that order: what a token gets depends on its own row alone, not on the batch. A row is read several
// times rather than kept in registers, so that any E will do; after the first time it comes from the first-level cache.

enum { TOKENS_A_BLOCK = 8, ROUTER_THREADS = 32 * TOKENS_A_BLOCK };     // for these kernels, a warp a row

__device__ static inline long warp_row() { return (long)blockIdx.x * TOKENS_A_BLOCK + threadIdx.x / 32; }

// The next of the K largest of E scores after `last`, the score of expert `last_e`: the largest of those that are
// smaller, or equal with a higher index; of equals the lowest index. To begin with: last = first_score(scores),
// last_e = -1. A warp's lanes call it together, and all get the result. As choose_topk of train_moe.c, also in this: if
// nothing is left, which happens only among NaN, the result is 0.
__device__ static int next_best(const float* scores, int E, float last, int last_e) {
    float best = -INFINITY;
    int best_e = INT_MAX;
    for (int e = threadIdx.x % 32; e < E; e += 32) {
        float score = scores[e];
        bool left = score < last || (score == last && e > last_e);
        if (left && (score > best || (score == best && e < best_e))) best = score, best_e = e;
    }
    for (int o = 16; o; o >>= 1) {
        float score = __shfl_xor_sync(0xffffffffu, best, o);
        int e = __shfl_xor_sync(0xffffffffu, best_e, o);
        if (score > best || (score == best && e < best_e)) best = score, best_e = e;
    }
    return best_e < E ? best_e : 0;
}
// what is above all scores; NaN if the first score is NaN, after which choose_topk finds nothing
__device__ static inline float first_score(const float* scores) {
    return scores[0] == scores[0] ? INFINITY : scores[0];
}

// softmax_router_forward of train_moe.c:
//     probs (N, E) = softmax(z)      lse (N) = log of its denominator      experts (N, K) best first (of equals the
//     lowest index first)            gates (N, K) = probs of the experts, divided by their sum if norm_topk
// z (N, E)
__global__ static void softmax_router_kernel(float* probs, float* lse, int* experts, float* gates, const float* z,
                                             int N, int E, int K, int norm_topk) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    z += n * E, probs += n * E, experts += n * K, gates += n * K;
    float max = -INFINITY, sum = 0, gate_sum = 0;
    for (int e = lane; e < E; e += 32) max = fmaxf(max, z[e]);
    max = warp_max(max);
    for (int e = lane; e < E; e += 32) sum += expf(z[e] - max);
    sum = warp_sum(sum);
    for (int e = lane; e < E; e += 32) probs[e] = expf(z[e] - max) / sum;
    if (lane == 0) lse[n] = max + logf(sum);
    float last = first_score(z);
    for (int k = 0, e = -1; k < K; k++) {
        e = next_best(z, E, last, e);
        last = z[e];
        float gate = expf(last - max) / sum;
        gate_sum += gate;
        if (lane == 0) experts[k] = e, gates[k] = gate;
    }
    __syncwarp();
    for (int k = lane; k < K && norm_topk; k += 32) gates[k] /= gate_sum;
}

static void gpu_softmax_router(float* probs, float* lse, int* experts, float* gates, const float* z, int N, int E,
                               int K, int norm_topk, cudaStream_t stream = 0) {
    softmax_router_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        probs, lse, experts, gates, z, N, E, K, norm_topk);
    CHECK(cudaGetLastError());
}

// softmax_router_backward and balance_backward of train_moe.c in one: dz (N, E) from dgates (N, K), the gradient with
// respect to the gates as they were used, and from the balance losses. With S a token's experts:
//     renormalised:  dz_e = gate_e (dgate_e - sum over S of gate_j dgate_j)  for e in S, 0 for the others
//     otherwise:     dz_e = p_e (dgate_e [e in S] - sum over S of p_j dgate_j)  for all e
//     balance:       dz_e += p_e (aux_weight (f_e - sum_j f_j p_j) + z_weight lse)
// probs (N, E), experts, gates (N, K), lse (N), f (E) by gpu_balance_weights
__global__ static void softmax_router_backward_kernel(float* dz, const float* dgates, const float* probs,
                                                      const int* experts, const float* gates, const float* lse,
                                                      const double* f, double aux_weight, double z_weight, int N,
                                                      int E, int K, int norm_topk) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    dz += n * E, probs += n * E, experts += n * K, gates += n * K, dgates += n * K;
    float mean = 0;
    double f_mean = 0;
    for (int k = lane; k < K; k += 32) mean += gates[k] * dgates[k];
    for (int e = lane; e < E; e += 32) f_mean += f[e] * probs[e];
    mean = warp_sum(mean);
    f_mean = warp_sum(f_mean);
    for (int e = lane; e < E; e += 32) {
        float p = probs[e];
        dz[e] = (norm_topk ? 0 : -p * mean) + (float)(p * (aux_weight * (f[e] - f_mean) + z_weight * lse[n]));
    }
    __syncwarp();
    for (int k = lane; k < K; k += 32) dz[experts[k]] += gates[k] * (norm_topk ? dgates[k] - mean : dgates[k]);
}

static void gpu_softmax_router_backward(float* dz, const float* dgates, const float* probs, const int* experts,
                                        const float* gates, const float* lse, const double* f, double aux_weight,
                                        double z_weight, int N, int E, int K, int norm_topk, cudaStream_t stream = 0) {
    softmax_router_backward_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        dz, dgates, probs, experts, gates, lse, f, aux_weight, z_weight, N, E, K, norm_topk);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Grouping by expert: a stable counting sort of the N K assignments in four small kernels, without atomics.
//     1. a block for each chunk of 256 assignments counts every expert's share of the chunk
//     2. 32 experts a block: sums over the chunks before each chunk
//     3. one block: sums over the experts before each expert; the tiles of the grouped products
//     4. row = the expert's first row + its assignments in earlier chunks + those before in this chunk

enum { GROUP_CHUNK = 256 };

static int gpu_group_chunks(int N, int K) { return ceil_div((long)N * K, GROUP_CHUNK); }

// chunk_counts (chunks, E): how often each expert occurs in each chunk; rank (N K): how often an assignment's expert
// occurs in its chunk before it. Each thread compares its assignment with the whole chunk; the last of each expert
// then knows, and alone writes, the expert's count.
__global__ static void group_count_kernel(int* chunk_counts, int* rank, const int* experts, long assignments, int E) {
    __shared__ int4 chunk[GROUP_CHUNK / 4];
    int i = threadIdx.x, before = 0, all = 0;
    long a = (long)blockIdx.x * GROUP_CHUNK + i;
    int e = a < assignments ? experts[a] : -1, *counts = chunk_counts + (long)blockIdx.x * E;
    ((int*)chunk)[i] = e;
    for (int j = i; j < E; j += GROUP_CHUNK) counts[j] = 0;
    __syncthreads();
    for (int j = 0; j < GROUP_CHUNK; j += 4) {
        int4 four = chunk[j / 4];
        int same[4] = {four.x == e, four.y == e, four.z == e, four.w == e};
        for (int k = 0; k < 4; k++) {
            all += same[k];
            before += j + k < i ? same[k] : 0;
        }
    }
    if (a >= assignments) return;
    rank[a] = before;
    if (before + 1 == all) counts[e] = all;
}

// In place: chunk_counts (chunks, E) become sums over the chunks before; offsets[e + 1] = sum over all. 32 x 32 threads
// to 32 experts: each sums a 32nd of the chunks of one expert.
__global__ static void __launch_bounds__(1024)
    group_scan_chunks_kernel(int* offsets, int* chunk_counts, int chunks, int E) {
    __shared__ int sums[32][32];
    int x = threadIdx.x, y = threadIdx.y, e = blockIdx.x * 32 + x, per_thread = ceil_div(chunks, 32);
    int first = min(y * per_thread, chunks), end = min(first + per_thread, chunks), sum = 0, before = 0;
    for (int c = first; c < end && e < E; c++) sum += chunk_counts[(long)c * E + e];
    sums[y][x] = sum;
    __syncthreads();
    if (e >= E) return;
    for (int i = 0; i < y; i++) before += sums[i][x];
    if (y == 31) offsets[e + 1] = before + sum;
    for (int c = first; c < end; c++) {
        int count = chunk_counts[(long)c * E + e];
        chunk_counts[(long)c * E + e] = before;
        before += count;
    }
}

// the sum of x over the threads up to this one, by 1024 threads; shared has room for 32 ints
__device__ static int block_prefix(int x, int* shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int o = 1; o < 32; o *= 2) {
        int other = __shfl_up_sync(0xffffffffu, x, o);
        if (lane >= o) x += other;
    }
    if (lane == 31) shared[warp] = x;
    __syncthreads();
    for (int w = 0; w < warp; w++) x += shared[w];
    __syncthreads();
    return x;
}

// One block of 1024 threads. In place: offsets[e + 1], expert e's count, becomes the sum of the counts up to e. tiles
// (max_tiles): for each expert in order {expert, first row} of every 128 of its rows, then {-1, 0}. rows >= 0 means a
// dense layer: one expert with that count.
__global__ static void __launch_bounds__(1024)
    group_tiles_kernel(int* offsets, int2* tiles, int max_tiles, int E, int rows) {
    __shared__ int shared[32], ends[1024], tile_ends[1024];
    int done = 0, tiles_done = 0;               // rows and tiles of earlier rounds
    if (threadIdx.x == 0) offsets[0] = 0;
    for (int round = 0; round < E; round += 1024) {
        int e = round + threadIdx.x, count = e >= E ? 0 : rows >= 0 ? rows : offsets[e + 1];
        int end = done + block_prefix(count, shared);
        int tile_end = tiles_done + block_prefix(ceil_div(count, GROUP_ROWS), shared);
        if (e < E) offsets[e + 1] = end;
        ends[threadIdx.x] = end;
        tile_ends[threadIdx.x] = tile_end;
        __syncthreads();
        for (int i = threadIdx.x / 32; i < 1024 && round + i < E; i += 32) {    // a warp lists an expert's tiles
            int first = i ? tile_ends[i - 1] : tiles_done, row = i ? ends[i - 1] : done;
            for (int t = first + threadIdx.x % 32; t < tile_ends[i]; t += 32)
                tiles[t] = make_int2(round + i, row + (t - first) * GROUP_ROWS);
        }
        done = ends[1023];
        tiles_done = tile_ends[1023];
        __syncthreads();
    }
    for (int t = tiles_done + threadIdx.x; t < max_tiles; t += 1024) tiles[t] = make_int2(-1, 0);
}

__global__ static void group_place_kernel(int* assignment, int* token, int* row_of, const int* offsets,
                                          const int* chunk_counts, const int* experts, long assignments, int K, int E) {
    long a = (long)blockIdx.x * GROUP_CHUNK + threadIdx.x;
    if (a >= assignments) return;
    int e = experts[a], row = offsets[e] + chunk_counts[(long)blockIdx.x * E + e] + row_of[a];
    row_of[a] = row;
    assignment[row] = (int)a;
    token[row] = (int)(a / K);
}

// group_by_expert of train_moe.c, and the list of tiles by which the grouped products are launched: sorts the N K
// assignments by expert; within an expert their order stays.
// offsets (E + 1): expert e's rows are offsets[e] .. offsets[e+1]-1
// tiles (max_tiles), max_tiles >= N K / 128 + E: up to 128 rows of one expert each: {expert, first row}; then {-1, 0}
// assignment (N K): row r serves assignment n K + k, the k-th expert of token n;  row_of (N, K): the inverse
// token (N K): n, so that those who gather rows need not divide
// chunk_counts: scratch (gpu_group_chunks(N, K), E);  experts (N, K)
static void gpu_group_by_expert(int* offsets, int2* tiles, int max_tiles, int* assignment, int* token, int* row_of,
                                int* chunk_counts, const int* experts, int N, int K, int E, cudaStream_t stream = 0) {
    int chunks = gpu_group_chunks(N, K);
    long assignments = (long)N * K;
    group_count_kernel<<<chunks, GROUP_CHUNK, 0, stream>>>(chunk_counts, row_of, experts, assignments, E);
    group_scan_chunks_kernel<<<ceil_div(E, 32), dim3(32, 32), 0, stream>>>(offsets, chunk_counts, chunks, E);
    group_tiles_kernel<<<1, 1024, 0, stream>>>(offsets, tiles, max_tiles, E, -1);
    group_place_kernel<<<chunks, GROUP_CHUNK, 0, stream>>>(assignment, token, row_of, offsets, chunk_counts, experts,
                                                           assignments, K, E);
    CHECK(cudaGetLastError());
}

// The same for a dense layer, one expert with all N rows in their order: offsets (2) = {0, N}; max_tiles >= N / 128 + 1
static void gpu_dense_group(int* offsets, int2* tiles, int max_tiles, int N, cudaStream_t stream = 0) {
    group_tiles_kernel<<<1, 1024, 0, stream>>>(offsets, tiles, max_tiles, 1, N);
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums over tokens are made in two stages of fixed order: SLICES blocks sum a slice of the tokens each, then the
// slices are added up (in doubles: there are few of them).

enum { SLICES = 32, OBSERVE_SLICES = 512 };
// doubles of scratch for gpu_balance_forward and gpu_observe
static long gpu_balance_parts(long E) { return SLICES * (E + 1) + OBSERVE_SLICES * 4; }

// The sum over this block's slice (blockIdx.y) of the N rows of value(n), which 32 x 32 threads make for 32 columns:
// thread (x, y) takes every 32nd row of column x, and thread (x, 0) gets the column's sum.
template <class F> __device__ static double slice_sum(F value, int N) {
    __shared__ double sums[32][32];
    int x = threadIdx.x, y = threadIdx.y;
    long rows = ceil_div(N, SLICES), first = blockIdx.y * rows, end = first + rows < N ? first + rows : N;
    double sum = 0;
    for (long n = first + y; n < end; n += 32) sum += value(n);
    sums[y][x] = sum;
    __syncthreads();
    for (int i = 1; i < 32 && y == 0; i++) sum += sums[i][x];
    return sum;
}

// parts (SLICES, E + 1): the slices' sums of each column of probs (N, E), and of lse (N) squared
__global__ static void __launch_bounds__(1024)
    balance_slices_kernel(double* parts, const float* probs, const float* lse, int N, int E) {
    int e = blockIdx.x * 32 + threadIdx.x;
    double sum = slice_sum([=](long n) {
        return e < E ? (double)probs[n * E + e] : e == E ? (double)lse[n] * lse[n] : 0;
    }, N);
    if (threadIdx.y == 0 && e <= E) parts[(long)blockIdx.y * (E + 1) + e] = sum;
}

__global__ static void __launch_bounds__(1024)
    balance_finish_kernel(double* losses, double* all_counts, double* all_probs, long long* load, long long* step_load,
                          const double* parts, const int* offsets, int per_layer, int N, int K, int E) {
    __shared__ double shared[32];
    double aux = 0;
    for (int e = threadIdx.x; e <= E; e += blockDim.x) {
        double sum = 0;
        for (int s = 0; s < SLICES; s++) sum += parts[(long)s * (E + 1) + e];
        if (e == E) {                           // one thread alone
            losses[1] += sum / N;
            continue;
        }
        int count = offsets[e + 1] - offsets[e];
        if (load) {
            load[e] += count;
            step_load[e] += count;
        }
        all_counts[e] += count;
        all_probs[e] += sum;
        aux += E * (count / ((double)N * K)) * (sum / N);
    }
    aux = block_sum(aux, shared);
    if (per_layer && threadIdx.x == 0) losses[0] += aux;
}

// count_balance of dev/lib/load.h, after the grouping of one layer: counts the load and adds the layer's share to the
// balance losses.
// losses {aux_loss, z_loss} += {E sum_e f_e P_e if per_layer (AUX_SWITCH), mean over tokens of lse^2}
// all_counts, all_probs (E) += the layer's assignments, its sums of probs over tokens
// load, step_load (E) += its assignments, or both NULL: not counted
// parts: scratch, gpu_balance_parts(E) doubles;  probs (N, E), lse (N), offsets (E + 1)
static void gpu_balance_forward(double* losses, double* all_counts, double* all_probs, long long* load,
                                long long* step_load, double* parts, const float* probs, const float* lse,
                                const int* offsets, int per_layer, int N, int K, int E, cudaStream_t stream = 0) {
    balance_slices_kernel<<<dim3(ceil_div(E + 1, 32), SLICES), dim3(32, 32), 0, stream>>>(parts, probs, lse, N, E);
    balance_finish_kernel<<<1, 1024, 0, stream>>>(losses, all_counts, all_probs, load, step_load, parts, offsets,
                                                  per_layer, N, K, E);
    CHECK(cudaGetLastError());
}

__global__ static void __launch_bounds__(1024)
    aux_hf_kernel(double* aux, const double* all_counts, const double* all_probs, int E, double tokens_seen) {
    __shared__ double shared[32];
    double sum = 0;
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        sum += E * (all_counts[e] / tokens_seen) * (all_probs[e] / tokens_seen);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *aux += sum;
}

// The balance loss of AUX_HF, once after the last layer: aux += E sum_e (counts_e / tokens) (probs_e / tokens), with
// the sums over all layers, all_counts and all_probs (E), and tokens_seen = N times the number of sparse layers.
static void gpu_aux_hf(double* aux, const double* all_counts, const double* all_probs, int E, double tokens_seen,
                       cudaStream_t stream = 0) {
    aux_hf_kernel<<<1, 1024, 0, stream>>>(aux, all_counts, all_probs, E, tokens_seen);
    CHECK(cudaGetLastError());
}

__global__ static void balance_weights_kernel(double* f, const int* offsets, const double* all_counts, int per_layer,
                                              double N, int K, int E, double tokens_seen) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e < E) f[e] = per_layer ? (offsets[e + 1] - offsets[e]) / (N * K) : all_counts[e] / tokens_seen;
}

// f (E) of the balance loss, for the backward pass: the layer's counts / (N K) if per_layer (AUX_SWITCH), else
// all_counts / tokens_seen. offsets (E + 1), all_counts (E)
static void gpu_balance_weights(double* f, const int* offsets, const double* all_counts, int per_layer, double N, int K,
                                int E, double tokens_seen, cudaStream_t stream = 0) {
    balance_weights_kernel<<<ceil_div(E, 256), 256, 0, stream>>>(f, offsets, all_counts, per_layer, N, K, E,
                                                                 tokens_seen);
    CHECK(cudaGetLastError());
}

#include "dev/lib/cuda/observe.cuh"     // gpu_observe: entropy, largest gate, distinct families, for reports

// ---------------------------------------------------------------------------------------------------------------------
// 7. Router variants
//
// Their formulas, with sources, are in dev/lib/routers.h. Two change the logits before experts are chosen, two
// choose in another way and leave what the softmax router leaves.
#include "dev/lib/cuda/routers.cuh"     // logit norm, families of copies; the sigmoid router
#include "dev/lib/cuda/lpr.cuh"         // Latent Prototype Routing

// ---------------------------------------------------------------------------------------------------------------------
// 8. The model on a GPU
//
// The same steps as section 5 of train_moe.c, with fewer passes over memory: an addition to the residual stream and the
// norm that follows it are one kernel, SwiGLU is the end of the experts' products, gathering their beginning, and the
// logits become their gradient while the loss is taken from them. `Real` is float or bf16, the type of activations and
// of the weights in products; master weights, moments, gradients of weights, statistics and the router are float.
//
// Nothing waits for the GPU within a step: sizes that depend on the routing stay on the device.

// GpuLayer is what a layer keeps for the backward pass, GpuModel has the rest; gpu_of<Real>(model) finds it.
#include "dev/lib/cuda/memory.cuh"      // gpu_plan, gpu_allocate, gpu_release

// y (rows, OC) = x (rows, C) W^T (OC, C), and its two gradients, by cuBLAS, on its handle's stream. It thinks in
// columns: to it, each of these matrices is transposed, and so the product is y^T = W x^T. Rows of y and dy lie y_row
// or dy_row apart, 0: OC.
static cudaDataType_t cuda_type(const float*) { return CUDA_R_32F; }
static cudaDataType_t cuda_type(const bf16*) { return CUDA_R_16BF; }

template <class Real> static void gpu_linear(cublasHandle_t h, Real* y, const Real* x, const Real* W, int rows, int C,
                                             int OC, int y_row = 0) {
    const float one = 1, zero = 0;
    cudaDataType_t type = cuda_type(x);
    CHECK_CUBLAS(cublasGemmEx(h, CUBLAS_OP_T, CUBLAS_OP_N, OC, rows, C, &one, W, type, C, x, type, C, &zero, y, type,
                              y_row ? y_row : OC, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// dx (rows, C) = dy (rows, OC) W (OC, C)
template <class Real> static void gpu_linear_backward_input(cublasHandle_t h, Real* dx, const Real* dy, const Real* W,
                                                            int rows, int C, int OC, int dy_row = 0) {
    const float one = 1, zero = 0;
    cudaDataType_t type = cuda_type(dy);
    CHECK_CUBLAS(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, C, rows, OC, &one, W, type, C, dy, type,
                              dy_row ? dy_row : OC, &zero, dx, type, C, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// dW (OC, C) (+)= dy^T (rows, OC) x (rows, C), in float
template <class Real> static void gpu_linear_backward_weight(cublasHandle_t h, float* dW, const Real* dy, const Real* x,
                                                             int rows, int C, int OC, int add, int dy_row = 0) {
    const float one = 1, beta = add ? 1 : 0;
    cudaDataType_t type = cuda_type(dy);
    CHECK_CUBLAS(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_T, C, OC, rows, &one, x, type, C, dy, type,
                              dy_row ? dy_row : OC, &beta, dW, CUDA_R_32F, C, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// The copy that products read of a parameter.
template <class Real> static const Real* in_products(const GpuModel<Real>* g, const float* w) {
    return g->copy + (w - g->params);
}

// x (N, C) += bias (C)
template <class Real> __global__ static void add_bias_kernel(Real* x, const float* bias, long n, int C) {
    long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
    if (i < n) store(&x[i], to_float(x[i]) + bias[i % C]);
}

template <class Real> static void gpu_add_bias(Real* x, const float* bias, int N, int C, cudaStream_t stream = 0) {
    add_bias_kernel<<<ceil_div((long)N * C, 256), 256, 0, stream>>>(x, bias, (long)N * C, C);
    CHECK(cudaGetLastError());
}

// Dimensions of layer l in this pass, as plain numbers.
typedef struct {
    int N, B, T, H, HD, NH, NKV, QK, QKV, E, K, I, V, tiles, sparse, past;
    float eps;
} LayerSizes;

static LayerSizes layer_sizes(const Model* m, int l) {
    const Config* c = &m->config;
    LayerSizes d;
    d.B = m->batch;
    d.T = m->length;
    d.N = d.B * d.T;
    d.H = c->hidden_size;
    d.HD = c->head_dim;
    d.NH = c->num_heads;
    d.NKV = c->num_kv_heads;
    d.QK = (d.NH + d.NKV) * d.HD;
    d.QKV = qkv_width(c);
    d.V = c->vocab_size;
    d.sparse = c->sparse[l];
    d.E = layer_experts(c, l);
    d.K = m->topk[l];
    d.I = layer_width(c, l);
    d.tiles = most_tiles((long)d.N * d.K, d.E);
    d.past = m->purpose == FOR_GENERATION ? m->cached : 0;
    d.eps = (float)c->rms_norm_eps;
    return d;
}

// From attn_in = n1(x) to x_mid = x + Wo attention(...) and ffn_in = n2(x_mid).
template <class Real> static void gpu_attention_layer_forward(Model* m, int l) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights* w = &g->w.layers[l];
    LayerSizes d = layer_sizes(m, l);
    gpu_linear(g->cublas, s->qkv, s->attn_in, in_products(g, w->qkv), d.N, d.H, d.QKV);
    if (w->qkv_bias) gpu_add_bias(s->qkv, w->qkv_bias, d.N, d.QKV);
    gpu_qk_norm_rope(s->rotated, s->q_rstd, s->k_rstd, s->qkv, w->q_norm, w->k_norm, m->config.qk_norm, g->cosines,
                     g->sines, d.N, d.T, d.past, d.NH, d.NKV, d.HD, d.eps);
    const Real *k = s->rotated + d.NH * d.HD, *v = s->qkv + d.QK;
    long ld_k = d.QK, ld_v = d.QKV;
    if (m->purpose == FOR_GENERATION) {
        long at = (long)l * m->positions * d.NKV * d.HD;
        gpu_copy_cache(g->cache_k + at, g->cache_v + at, s->rotated, s->qkv, d.N, d.past, d.NH, d.NKV, d.HD);
        k = g->cache_k + at;
        v = g->cache_v + at;
        ld_k = ld_v = d.NKV * d.HD;
    }
    gpu_attention_forward(s->attn, s->lse, s->rotated, d.QK, k, ld_k, v, ld_v, d.B, d.T, d.past + d.T, d.NH, d.NKV,
                          d.HD);
    gpu_linear(g->cublas, g->projected, s->attn, in_products(g, w->attn_out), d.N, d.NH * d.HD, d.H);
    gpu_combine_rmsnorm(s->x_mid, s->ffn_in, s->ffn_rstd, s->x, g->projected, NULL, NULL, 1, w->ffn_norm, d.N, d.H,
                        d.eps);
}

// In: dx, the gradient of x_mid. Out: dx, the gradient of x.
template <class Real> static void gpu_attention_layer_backward(Model* m, int l) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights *w = &g->w.layers[l], *dw = &g->dw.layers[l];
    LayerSizes d = layer_sizes(m, l);
    int add = !g->fresh, norm = m->config.qk_norm, parts = gpu_norm_parts(d.N);
    gpu_linear_backward_input(g->cublas, g->dattn, g->dx, in_products(g, w->attn_out), d.N, d.NH * d.HD, d.H);
    gpu_linear_backward_weight(g->cublas, dw->attn_out, g->dx, s->attn, d.N, d.NH * d.HD, d.H, add);
    gpu_attention_backward(g->drotated, g->drotated + d.NH * d.HD, g->dqkv + d.QK, g->attention_d, g->dattn, s->attn,
                           s->lse, s->rotated, d.QK, s->rotated + d.NH * d.HD, d.QK, s->qkv + d.QK, d.QKV, d.QK, d.QKV,
                           d.B, d.T, d.NH, d.NKV, d.HD);
    gpu_qk_norm_rope_backward(g->dqkv, g->norm_parts, g->k_norm_parts, g->drotated, s->qkv, s->q_rstd, s->k_rstd,
                              w->q_norm, w->k_norm, norm, g->cosines, g->sines, d.N, d.T, d.NH, d.NKV, d.HD);
    if (norm != QK_NORM_NONE) {
        gpu_add_parts(dw->q_norm, g->norm_parts, parts, norm == QK_NORM_ROW ? d.NH * d.HD : d.HD, add);
        gpu_add_parts(dw->k_norm, g->k_norm_parts, parts, norm == QK_NORM_ROW ? d.NKV * d.HD : d.HD, add);
    }
    gpu_linear_backward_input(g->cublas, g->dnormed, g->dqkv, in_products(g, w->qkv), d.N, d.H, d.QKV);
    gpu_linear_backward_weight(g->cublas, dw->qkv, g->dqkv, s->attn_in, d.N, d.H, d.QKV, add);
    if (w->qkv_bias)
        gpu_column_sums(dw->qkv_bias, g->bias_parts, g->dqkv, (const Real*)NULL, NULL, NULL, d.N, d.QKV, add);
    gpu_combine_rmsnorm_backward(g->dx, 1, g->norm_parts, g->dnormed, (const float*)NULL, (const int*)NULL, 1, s->x,
                                 s->attn_rstd, w->attn_norm, d.N, d.H);
    gpu_add_parts(dw->attn_norm, g->norm_parts, parts, d.H, add);
}

// The router of a sparse layer: from ffn_in to experts, gates and experts_in. dev/lib/routers.h has the kinds.
template <class Real> static void gpu_router_forward(Model* m, int l) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights* w = &g->w.layers[l];
    const Config* c = &m->config;
    LayerSizes d = layer_sizes(m, l);
    float *z = s->router_logits, *shift = NULL;
    if (c->router.kind == ROUTER_LPR) {
        LprLayer r = lpr_layer<Real>(m, l);
        uint64_t key = random_key(m->noise_seed, 0x4C5052, (uint64_t)m->noise_step, (uint64_t)l);
        gpu_lpr_forward(s->experts_in, m->purpose == FOR_TRAINING ? &g->losses_sum[3] : NULL, s->ffn_in, key, &r);
        return;
    }
    // not split: a logit depends on its token and its row of the router alone, so that twins tie
    gpu_matmul_fp32(s->router_raw, s->ffn_in, d.H, 1, w->router, 1, d.H, d.N, d.E, d.H, 0, NULL, 0);
    if (c->router.logit_norm > 0) gpu_logit_norm(z, s->router_raw, d.N, d.E, (float)c->router.logit_norm);
    if (c->router.family_penalty > 0) {
        shift = g->shift;
        if (c->router.kind == ROUTER_SIGMOID) gpu_sigmoid_scores(s->probs, z, w->router_bias, d.N, d.E);
        else CHECK(cudaMemcpyAsync(s->probs, z, sizeof(float) * (size_t)d.N * (size_t)d.E, cudaMemcpyDeviceToDevice));
        gpu_penalise_families(z, shift, s->probs, g->family + (long)l * d.E, (float)c->router.family_penalty, l,
                              d.N, d.T, d.past, d.E);
    }
    if (c->router.kind == ROUTER_SIGMOID)
        gpu_sigmoid_router(s->probs, s->router_lse, s->experts, s->gates, z, w->router_bias, shift, d.N, d.E, d.K,
                           c->norm_topk_prob, gate_scaling(c));
    else gpu_softmax_router(s->probs, s->router_lse, s->experts, s->gates, z, d.N, d.E, d.K, c->norm_topk_prob);
    if (c->router.bias_rule == BIAS_QUANTILE && m->counting_load)
        gpu_add_cutoffs(g->cutoffs + (long)l * d.E, g->drouter, z, w->router_bias, d.N, d.E, d.K);
}

// In: dgates, and with LPR in dnormed the gradient of the experts' input. Out: extra (N, H), the part of ffn_in's
// gradient that comes through the router; with LPR all of it.
template <class Real> static void gpu_router_backward(Model* m, int l, float scale) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights *w = &g->w.layers[l], *dw = &g->dw.layers[l];
    const Config* c = &m->config;
    LayerSizes d = layer_sizes(m, l);
    int per_layer = m->balance.aux_form == AUX_SWITCH, add = !g->fresh;
    double N = d.N, tokens_seen = N * count_sparse(c);
    double aux = m->balance.adaptive ? m->aux_coefficients[l] : m->balance.aux;
    double aux_weight = scale * aux * d.E / (per_layer ? N : tokens_seen), z_weight = 2.0 * scale * m->balance.z / N;
    float* dz = g->drouter;
    gpu_balance_weights(g->balance, s->offsets, g->all_counts, per_layer, N, d.K, d.E, tokens_seen);
    if (c->router.kind == ROUTER_LPR) {
        LprLayer r = lpr_layer<Real>(m, l);
        gpu_lpr_backward(g->extra, g->dnormed, s->ffn_in, g->dgates, g->balance, aux_weight, z_weight, scale, add, &r);
        return;
    }
    if (c->router.kind == ROUTER_SIGMOID)
        gpu_sigmoid_router_backward(dz, g->dgates, s->router_logits, s->probs, s->router_lse, s->experts, s->gates,
                                    g->balance, aux_weight, z_weight, d.N, d.E, d.K, c->norm_topk_prob,
                                    gate_scaling(c));
    else
        gpu_softmax_router_backward(dz, g->dgates, s->probs, s->experts, s->gates, s->router_lse, g->balance,
                                    aux_weight, z_weight, d.N, d.E, d.K, c->norm_topk_prob);
    if (c->router.logit_norm > 0) gpu_logit_norm_backward(dz, s->router_raw, d.N, d.E, (float)c->router.logit_norm);
    gpu_matmul_fp32(g->extra, dz, d.E, 1, w->router, d.H, 1, d.N, d.H, d.E, 0, NULL, 0);
    gpu_matmul_fp32(dw->router, dz, 1, d.E, s->ffn_in, d.H, 1, d.E, d.H, d.N, add, g->product_parts, PRODUCT_PARTS);
}

// Counts a layer's load and its share of the balance losses, as count_balance and observe_layer do.
template <class Real> static void gpu_count_layer(Model* m, int l) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    LayerSizes d = layer_sizes(m, l);
    long at = (long)l * d.E;
    gpu_balance_forward(&g->losses_sum[1], g->all_counts, g->all_probs, m->counting_load ? g->load + at : NULL,
                        m->counting_load ? g->step_load + at : NULL, g->balance_parts, s->probs, s->router_lse,
                        s->offsets, m->balance.aux_form == AUX_SWITCH, d.N, d.K, d.E);
    if (!m->counting_load) return;
    gpu_observe(g->observed + l * OBSERVED_NUMBERS, g->balance_parts, s->probs, s->gates, s->experts,
                m->has_families ? g->family + at : NULL, d.N, d.E, d.K);
    if (!m->trace) return;
    CHECK(cudaMemcpy(m->layers[l].experts, s->experts, sizeof(int) * (size_t)d.N * (size_t)d.K,
                     cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(m->layers[l].gates, s->gates, sizeof(float) * (size_t)d.N * (size_t)d.K, cudaMemcpyDeviceToHost));
    trace_layer(m, l);
}

// x (N) = sigmoid(x); with gates (N), their gradient x becomes that of their logits
static __global__ void gates_kernel(float* x, const float* gates, int N) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) x[n] = gates ? x[n] * gates[n] * (1.0f - gates[n]) : sigmoid(x[n]);
}

static void gpu_gates(float* x, const float* gates, int N, cudaStream_t stream = 0) {
    gates_kernel<<<ceil_div(N, 256), 256, 0, stream>>>(x, gates, N);
    CHECK(cudaGetLastError());
}

// out (n) += x
template <class Real> __global__ static void add_kernel(float* out, const Real* x, long n) {
    long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
    if (i < n) out[i] += to_float(x[i]);
}

template <class Real> static void gpu_add(float* out, const Real* x, long n, cudaStream_t stream = 0) {
    add_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(out, x, n);
    CHECK(cudaGetLastError());
}

// rows (N, H) = the shared expert's outputs, shared_gates = their gates
template <class Real> static void gpu_shared_expert_forward(Model* m, int l) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights* w = &g->w.layers[l];
    LayerSizes d = layer_sizes(m, l);
    int S = shared_width(&m->config, l), tiles = most_tiles(d.N, 1);
    if (w->shared_gate) {
        gpu_matmul_fp32(s->shared_gates, s->ffn_in, d.H, 1, w->shared_gate, 1, d.H, d.N, 1, d.H, 0, NULL, 0);
        gpu_gates(s->shared_gates, NULL, d.N);
    }
    gpu_dense_group(s->shared_offsets, s->shared_tiles, tiles, d.N);
    gpu_experts_up(s->shared_gate_up, g->act, s->ffn_in, (const int*)NULL, in_products(g, w->shared_gate_up),
                   s->shared_offsets, s->shared_tiles, tiles, d.H, S);
    gpu_experts_down(g->rows, g->act, in_products(g, w->shared_down), s->shared_offsets, s->shared_tiles, tiles, S,
                     d.H);
}

// In: dx, the gradient of the layer's output. Adds to extra (N, H), a part of ffn_in's gradient; dnormed is used up.
template <class Real> static void gpu_shared_expert_backward(Model* m, int l) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights *w = &g->w.layers[l], *dw = &g->dw.layers[l];
    LayerSizes d = layer_sizes(m, l);
    const int* none = NULL;
    int S = shared_width(&m->config, l), tiles = most_tiles(d.N, 1), add = !g->fresh;
    gpu_experts_down_backward(s->shared_gate_up, g->act, w->shared_gate ? g->dgate_parts : NULL, g->dx, none,
                              s->shared_gates, none, in_products(g, w->shared_down), s->shared_offsets,
                              s->shared_tiles, tiles, S, d.H);
    gpu_experts_weight_backward(dw->shared_down, g->dx, none, g->act, none, s->shared_offsets, 1, d.H, S, add);
    gpu_experts_weight_backward(dw->shared_gate_up, s->shared_gate_up, none, s->ffn_in, none, s->shared_offsets, 1,
                                2 * S, d.H, add);
    gpu_experts_input_backward(g->dnormed, s->shared_gate_up, in_products(g, w->shared_gate_up), s->shared_offsets,
                               s->shared_tiles, tiles, d.H, S);
    gpu_add(g->extra, g->dnormed, (long)d.N * d.H);
    if (!w->shared_gate) return;
    float* dz = g->dgates;
    gpu_gate_gradients(dz, g->dgate_parts, none, d.N, gpu_dgate_parts<Real>(S));
    gpu_gates(dz, s->shared_gates, d.N);
    gpu_matmul_fp32(g->extra, dz, 1, 1, w->shared_gate, d.H, 1, d.N, d.H, 1, 1, NULL, 0);
    gpu_matmul_fp32(dw->shared_gate, dz, 1, 1, s->ffn_in, d.H, 1, 1, d.H, d.N, add, g->product_parts, PRODUCT_PARTS);
}

// From ffn_in to the next residual stream and its norm, given where these go: out, normed, rstd, and the norm's weight.
template <class Real> static void gpu_ffn_layer_forward(Model* m, int l, Real* out, Real* normed, float* rstd,
                                                        const float* norm) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights* w = &g->w.layers[l];
    LayerSizes d = layer_sizes(m, l);
    if (d.sparse) {
        gpu_router_forward<Real>(m, l);
        gpu_group_by_expert(s->offsets, s->tiles, d.tiles, s->assignment, s->token, s->row_of, g->chunk_counts,
                            s->experts, d.N, d.K, d.E);
        gpu_count_layer<Real>(m, l);
    } else {
        gpu_dense_group(s->offsets, s->tiles, d.tiles, d.N);
    }
    gpu_experts_up(s->gate_up, g->act, s->experts_in, s->token,
                   in_products(g, w->gate_up), s->offsets, s->tiles, d.tiles, d.H, d.I);
    gpu_experts_down(g->rows, g->act, in_products(g, w->down), s->offsets, s->tiles, d.tiles, d.I, d.H);
    if (shared_width(&m->config, l) > 0) {          // first the routed experts' sum, then the shared one's
        gpu_combine_rmsnorm(g->projected, (Real*)NULL, (float*)NULL, s->x_mid, g->rows, s->gates, s->row_of, d.K,
                            (const float*)NULL, d.N, d.H, d.eps);
        gpu_shared_expert_forward<Real>(m, l);
        gpu_combine_rmsnorm(out, normed, rstd, g->projected, g->rows, s->shared_gates, (const int*)NULL, 1, norm, d.N,
                            d.H, d.eps);
        return;
    }
    gpu_combine_rmsnorm(out, normed, rstd, s->x_mid, g->rows, d.sparse ? s->gates : NULL, s->row_of, d.K, norm, d.N,
                        d.H, d.eps);
}

// In: dx, the gradient of the layer's output. Out: dx, the gradient of x_mid.
template <class Real> static void gpu_ffn_layer_backward(Model* m, int l, float scale) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    GpuLayer<Real>* s = &g->layers[l];
    const LayerWeights *w = &g->w.layers[l], *dw = &g->dw.layers[l];
    LayerSizes d = layer_sizes(m, l);
    int add = !g->fresh, parts = gpu_norm_parts(d.N), R = d.N * d.K;
    Real* dgate_up = s->gate_up;        // its gradient takes its place
    gpu_experts_down_backward(s->gate_up, g->act, d.sparse ? g->dgate_parts : NULL, g->dx, s->token,
                              d.sparse ? s->gates : NULL, s->assignment, in_products(g, w->down), s->offsets, s->tiles,
                              d.tiles, d.I, d.H);
    gpu_experts_weight_backward(dw->down, g->dx, s->token, g->act, (const int*)NULL, s->offsets, d.E, d.H, d.I, add);
    gpu_experts_weight_backward(dw->gate_up, dgate_up, (const int*)NULL, s->experts_in, s->token, s->offsets, d.E,
                                2 * d.I, d.H, add);
    gpu_experts_input_backward(g->rows, dgate_up, in_products(g, w->gate_up), s->offsets, s->tiles, d.tiles, d.H, d.I);
    const Real* rows = g->rows;
    const float* extra = NULL;
    int K = d.K;
    if (d.sparse) {
        gpu_gate_gradients(g->dgates, g->dgate_parts, s->assignment, R, gpu_dgate_parts<Real>(d.I));
        extra = g->extra;
        if (m->config.router.kind == ROUTER_LPR) {       // the read-out needs the sum of the rows itself
            gpu_combine_rmsnorm(g->dnormed, (Real*)NULL, (float*)NULL, (const Real*)NULL, g->rows, (const float*)NULL,
                                s->row_of, d.K, (const float*)NULL, d.N, d.H, d.eps);
            K = 0;                                  // it comes back as a part of `extra`
        }
        gpu_router_backward<Real>(m, l, scale);
        if (shared_width(&m->config, l) > 0) gpu_shared_expert_backward<Real>(m, l);
    }
    gpu_combine_rmsnorm_backward(g->dx, 1, g->norm_parts, rows, extra, s->row_of, K, s->x_mid, s->ffn_rstd, w->ffn_norm,
                                 d.N, d.H);
    gpu_add_parts(dw->ffn_norm, g->norm_parts, parts, d.H, add);
}

// Takes the last forward pass's loss, and turns its logits into their gradient if `scale` is not 0.
template <class Real> static void gpu_take_loss(Model* m, float scale) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    int N = m->batch * m->length;
    int V = m->config.vocab_size;
    gpu_classifier(g->losses, g->logits, g->targets, N, V, logits_row(V), scale, scale != 0);
    if (g->loss_pending) gpu_add_losses(&g->losses_sum[0], g->losses, N, 1.0 / N);
    g->loss_pending = 0;
}

// Returns 0: losses stay on the GPU until they are asked for.
template <class Real> static double gpu_forward(Model* m, const int* tokens, const int* targets, int B, int T) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    const Config* c = &m->config;
    int N = B * T, H = c->hidden_size, L = c->num_layers, V = c->vocab_size;
    if (g->loss_pending) gpu_take_loss<Real>(m, 0);
    m->batch = B;
    m->length = T;
    memcpy(m->tokens, tokens, sizeof(int) * (size_t)N);
    if (targets) memcpy(m->targets, targets, sizeof(int) * (size_t)N);
    // The copy to the GPU runs later; this buffer may be filled again only when the one before last is done.
    int* stage = g->staging[g->turn];
    long room = (long)m->B * m->T;
    CHECK(cudaEventSynchronize(g->staged[g->turn]));
    memcpy(stage, tokens, sizeof(int) * (size_t)N);
    if (targets) memcpy(stage + room, targets, sizeof(int) * (size_t)N);
    if (m->purpose == FOR_TRAINING)
        group_tokens(stage + 2 * room, stage + 3 * room, stage + 4 * room + 1, &g->num_unique, tokens, N, g->counts, V);
    size_t ints = m->purpose == FOR_TRAINING ? 5 * (size_t)room + 1 : (targets ? (size_t)room : 0) + (size_t)N;
    CHECK(cudaMemcpyAsync(g->tokens, stage, sizeof(int) * ints, cudaMemcpyHostToDevice));
    CHECK(cudaEventRecord(g->staged[g->turn]));
    g->turn ^= 1;
    CHECK(cudaMemsetAsync(g->all_counts, 0, sizeof(double) * (size_t)(c->num_experts > 0 ? c->num_experts : 1)));
    CHECK(cudaMemsetAsync(g->all_probs, 0, sizeof(double) * (size_t)(c->num_experts > 0 ? c->num_experts : 1)));

    GpuLayer<Real>* first = &g->layers[0];      // looking up an embedding is gathering one row
    gpu_combine_rmsnorm(first->x, first->attn_in, first->attn_rstd, (const Real*)NULL,
                        in_products(g, g->w.embedding), (const float*)NULL, g->tokens, 1, g->w.layers[0].attn_norm, N,
                        H, (float)c->rms_norm_eps);
    for (int l = 0; l < L; l++) {
        gpu_attention_layer_forward<Real>(m, l);
        if (l + 1 < L) {
            GpuLayer<Real>* next = &g->layers[l + 1];
            gpu_ffn_layer_forward<Real>(m, l, next->x, next->attn_in, next->attn_rstd, g->w.layers[l + 1].attn_norm);
        } else {
            gpu_ffn_layer_forward<Real>(m, l, g->final_in, g->final_out, g->final_rstd, g->w.final_norm);
        }
    }
    if (m->balance.aux_form == AUX_HF && count_sparse(c) > 0)
        gpu_aux_hf(&g->losses_sum[1], g->all_counts, g->all_probs, c->num_experts, (double)N * count_sparse(c));
    int wanted = N;                             // rows of logits
    const Real* x = g->final_out;
    if (m->purpose == FOR_GENERATION) {
        m->cached += T;
        wanted = 1;
        x += (long)(N - 1) * H;
    }
    gpu_linear(g->cublas, g->logits, x, in_products(g, g->w.lm_head), wanted, H, V, logits_row(V));
    if (!targets) return 0;
    m->sums.passes++;
    g->loss_pending = 1;        // taken by the backward pass, together with the gradient, or when it is asked for
    return 0;
}

template <class Real> static void gpu_backward(Model* m, float scale) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    const Config* c = &m->config;
    int N = m->batch * m->length, H = c->hidden_size, V = c->vocab_size, add = !g->fresh;
    gpu_take_loss<Real>(m, scale / N);
    gpu_linear_backward_input(g->cublas, g->dnormed, g->logits, in_products(g, g->w.lm_head), N, H, V, logits_row(V));
    gpu_linear_backward_weight(g->cublas, g->dw.lm_head, g->logits, g->final_out, N, H, V, add, logits_row(V));
    gpu_combine_rmsnorm_backward(g->dx, 0, g->norm_parts, g->dnormed, (const float*)NULL, (const int*)NULL, 1,
                                 g->final_in, g->final_rstd, g->w.final_norm, N, H);
    gpu_add_parts(g->dw.final_norm, g->norm_parts, gpu_norm_parts(N), H, add);
    for (int l = c->num_layers - 1; l >= 0; l--) {
        gpu_ffn_layer_backward<Real>(m, l, scale);
        gpu_attention_layer_backward<Real>(m, l);
    }
    // a tied embedding has the LM head's gradient already
    if (!add && !c->tie_word_embeddings)
        CHECK(cudaMemsetAsync(g->dw.embedding, 0, sizeof(float) * (size_t)V * (size_t)H));
    gpu_embedding_backward(g->dw.embedding, g->dx, g->unique, g->starts, g->positions, g->num_unique, H);
    g->fresh = 0;
}

template <class Real> static double gpu_update(Model* m, const AdamW* o, double lr, long step) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    long matrices = m->layout.matrices, total = m->layout.total;
    float correction1 = (float)(1 - pow(o->beta1, (double)step)),
          correction2 = (float)(1 - pow(o->beta2, (double)step)), norm;
    gpu_gradient_norm(g->norm, g->norm_sums, g->grads, total);
    for (int part = 0; part < 2; part++) {      // matrices, with weight decay, and vectors
        long first = part ? matrices : 0, n = part ? total - matrices : matrices;
        Real* copy = sizeof(Real) == sizeof(float) ? NULL : g->copy + first;
        gpu_adamw(copy, g->params + first, g->grads + first, g->exp_avg + first, g->exp_avg_sq + first, n, g->norm,
                  (float)o->clip, (float)lr, part ? 0 : (float)o->weight_decay, (float)o->beta1, (float)o->beta2,
                  (float)o->eps, correction1, correction2);
    }
    g->fresh = 1;
    CHECK(cudaMemcpy(&norm, g->norm, sizeof norm, cudaMemcpyDeviceToHost));     // waits for the step
    return norm;
}

// gpu_send takes parameters and moments to the GPU; gpu_read_back brings these, gradients, logits and sums back.
#include "dev/lib/cuda/transfer.cuh"

static const Backend gpu_backend_float = {gpu_plan<float>,     gpu_allocate<float>, gpu_release<float>,
                                          gpu_forward<float>,  gpu_backward<float>, gpu_update<float>,
                                          gpu_send<float>,     gpu_read_back<float>};
static const Backend gpu_backend_bf16 = {gpu_plan<bf16>,    gpu_allocate<bf16>, gpu_release<bf16>,
                                         gpu_forward<bf16>, gpu_backward<bf16>, gpu_update<bf16>,
                                         gpu_send<bf16>,    gpu_read_back<bf16>};

// ---------------------------------------------------------------------------------------------------------------------
// 9. The command line

static void gpu_use_precision(int bf16_too) { default_backend = bf16_too ? &gpu_backend_bf16 : &gpu_backend_float; }

int train_moe_cu_main(int argc, char** argv) {
    begin_program("train_moe_cu");
    option_find("precision")->start = "bf16";
    use_precision = gpu_use_precision;
    options_parse(argc, argv);
    gpu_open();
    return run_command();
}

#ifdef TRAIN_MOE_CU_MAIN
int main(int argc, char** argv) { return train_moe_cu_main(argc, argv); }
#endif
#endif
