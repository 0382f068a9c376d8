// attention_bf16.cuh: attention in bf16 on tensor cores, attention_forward_launch and attention_backward_launch for
// bf16: the formulas of section 4 of train_moe.cu. Needs tensor_cores.cuh and vectors.cuh.
#pragma once

// A block owns 128 rows, each warp 16 M of them: M = 2 where the registers allow. The tiles of the other side are read
// from shared memory by every warp, in pieces of 512 bytes that take 4 clocks. With M = 1 a piece feeds 2 mma.sync,
// which keep the tensor cores of a multiprocessor busy for 4 clocks of an A100 and less of an H100: shared memory would
// be the limit. With M = 2 it feeds 4. At least M blocks per multiprocessor are asked for, which leaves a thread all
// 255 registers that it can have. (Calculated from the rates in the data sheets.)
//
// How mma.m16n8k16 spreads its matrices over a warp (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lane = 4 g + t:
//     result, 16 x 8:    d[0], d[1] = row g, columns 2t, 2t + 1;  d[2], d[3] = row g + 8
//     left, 16 x 16:     a[0] = row g, columns 2t, 2t + 1;  a[1] = row g + 8;  a[2], a[3] = the same 8 columns further
//     right, 16 x 8:     b[0] = rows 2t, 2t + 1 of column g;  b[1] = rows 2t + 8, 2t + 9
// Two results side by side have the layout of a left operand: scores turn into weights where they are, and weights
// never pass through shared memory. (The dk and dv kernel needs p and ds transposed; it computes them transposed, with
// keys as the rows.)

constexpr int ATT_BLOCK = 128;      // rows of a block

// A tile has lines of D numbers, in chunks of 8 (16 bytes). Chunks trade places within their line, so that the 8
// chunks that ldmatrix reads at a time, from 8 successive lines, lie in different banks: with lines of 128 bytes, or a
// multiple, by line % 8; with 64 or 192 bytes, where every second line starts half-way, by line / 2 % 4.
template <int D> __device__ inline bf16* attention_chunk(bf16* tile, int line, int chunk) {
    return tile + line * D + (chunk ^ (D % 64 == 0 ? line & 7 : line >> 1 & 3)) * 8;
}

// May 16 bytes be read (8 numbers) or 4 written (2 numbers) at a time, for every head of every row?
__device__ inline bool attention_aligned(const void* p, long ld, int HD, int numbers) {
    return ((uintptr_t)p % (2 * numbers) | ld % numbers | HD % numbers) == 0;
}

// tile[l][d] = from[l ld + d] for l < lines and d < HD, zero elsewhere. With `wide`, the copies are under way when this
// returns, in the caller's open group of asynchronous copies. Every warp makes them in every tile, so few instructions
// are wanted for each: a thread keeps to one chunk of every STEP-th line, and places in lines repeat after 8 lines.
template <int D, int LINES, int THREADS>
__device__ inline void attention_load(bf16* tile, const bf16* from, long ld, int lines, int HD, bool wide) {
    constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
    int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS, d = chunk * 8;
    if (STEP * CHUNKS < THREADS && first >= STEP) return;
    // where the queries' and keys' tiles have 32 lines of 64, sm_100 has no registers for more
    if ((D != 64 || LINES != 32) && wide) {
        bf16* to = attention_chunk<D>(tile, first, chunk);
        const bf16* at = from + first * ld + d;
        int left = d < HD ? lines - first : 0;
        #pragma unroll (STEP % 8 == 0 ? LINES : 2)      // lines of 96 would take more registers than there are
        for (int l = 0; l < LINES; l += STEP, at += STEP * ld)
            if (LINES % STEP == 0 || first + l < LINES)
                cp_async_16(STEP % 8 == 0 ? to + l * D : attention_chunk<D>(tile, first + l, chunk),
                            l < left ? at : from, l < left);
        return;
    }
    #pragma unroll 1
    for (int line = first; line < LINES; line += STEP) {
        bf16* to = attention_chunk<D>(tile, line, chunk);
        bool wanted = line < lines && d < HD;
        const bf16* at = wanted ? from + line * ld + d : from;
        if (wide) cp_async_16(to, at, wanted);
        else {
            #pragma unroll 1
            for (int i = 0; i < 8; i++) to[i] = wanted && d + i < HD ? at[i] : __float2bfloat16(0.0f);
        }
    }
}

// A 16 x 16 piece of a tile as four 8 x 8 matrices: DOWN, the second lies below the first (a left operand, or with
// TRANSPOSED a right operand whose rows are lines); else beside it (a right operand whose columns are lines). Written
// so that one number, `mine`, holds all that depends on the lane: the rest are constants.
template <int D, bool DOWN, bool TRANSPOSED>
__device__ inline void attention_fragment(unsigned r[4], bf16* tile, int line, int column) {
    constexpr int SPAN = D % 64 == 0 ? 64 : 32;         // chunks trade places within so many numbers
    int lane = threadIdx.x % 32, second = lane / 8 % 2, third = lane / 16;
    int mine = (int)(attention_chunk<D>(tile, lane % 8 + (DOWN ? second : third) * 8, DOWN ? third : second) - tile);
    ldmatrix_x4<TRANSPOSED>(r, tile + line * D + column / SPAN * SPAN + (mine ^ column % SPAN));
}

// s (16 M x N) = rows `row` and on of one tile (16 M x D) times the lines of another (N x D), transposed
template <int D, int M, int N>
__device__ inline void attention_dots(float s[M][N / 8][4], bf16* rows, int row, bf16* tile) {
    #pragma unroll
    for (int i = 0; i < M * (N / 8) * 4; i++) s[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0;
    // not unrolled further, which would only let the compiler fetch pieces too early, and run out of registers
    #pragma unroll (D % 64 == 0 ? 4 : 2)
    for (int d = 0; d < D; d += 16) {
        unsigned a[M][4], b[4];
        #pragma unroll
        for (int m = 0; m < M; m++) attention_fragment<D, true, false>(a[m], rows, row + 16 * m, d);
        #pragma unroll
        for (int n = 0; n < N; n += 16) {
            attention_fragment<D, false, false>(b, tile, n, d);
            #pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16_bf16(s[m][n / 8], a[m], b);
                mma_m16n8k16_bf16(s[m][n / 8 + 1], a[m], b + 2);
            }
        }
    }
}

// sum (16 M x D) += w (16 M x N), rounded to bf16, times the lines of a tile (N x D)
template <int D, int M, int N>
__device__ inline void attention_sums(float sum[M][D / 8][4], const float w[M][N / 8][4], bf16* tile) {
    #pragma unroll
    for (int n = 0; n < N; n += 16) {
        unsigned a[M][4], b[4];
        #pragma unroll
        for (int m = 0; m < M; m++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* pair = w[m][n / 8 + j / 2] + j % 2 * 2;
                a[m][j] = pack_bf16(pair[0], pair[1]);
            }
        #pragma unroll
        for (int d = 0; d < D; d += 16) {
            attention_fragment<D, true, true>(b, tile, n, d);
            #pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16_bf16(sum[m][d / 8], a[m], b);
                mma_m16n8k16_bf16(sum[m][d / 8 + 1], a[m], b + 2);
            }
        }
    }
}

// to[r ld + d] = factor sum[r][d] for the 8 rows (r = lane / 4) of half `half` of a fragment, as far as r < rows
template <int D>
__device__ inline void attention_store(bf16* to, long ld, const float sum[D / 8][4], int half, float factor, int rows,
                                       int HD, bool pairs) {
    int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (r >= rows) return;
    #pragma unroll
    for (int j = 0; j < D / 8; j++) {
        int d = 8 * j + 2 * t;
        float x = factor * sum[j][2 * half], y = factor * sum[j][2 * half + 1];
        bf16* at = to + r * ld + d;
        if (pairs) {
            if (d < HD) *(unsigned*)at = pack_bf16(x, y);
        } else {
            if (d < HD) store(at, x);
            if (d + 1 < HD) store(at + 1, y);
        }
    }
}

// Grid (NH, blocks of 128 queries, B): the longest blocks come first, and those of one sequence, which read the same
// keys and values, together. A block holds one tile of keys and one of values; each is loaded while the product with
// the other runs, so that one buffer of each does and two blocks fit on a multiprocessor. Rows of a block that have no
// query cost little, since their warps skip the products; but for one query of a long past (generation), only NH blocks
// are at work.
template <int D, int M, int N>
__global__ void __launch_bounds__(ATT_BLOCK / M * 2, M)
attention_forward_mma_kernel(bf16* out, float* lse, const bf16* q, long ld_q, const bf16* k, long ld_k, const bf16* v,
                             long ld_v, int Tq, int Tk, int NH, int NKV, int HD) {
    constexpr int THREADS = ATT_BLOCK / M * 2;          // a warp for every 16 M rows
    extern __shared__ __align__(128) bf16 att_tiles[];
    bf16 *q_tile = att_tiles, *k_tile = q_tile + ATT_BLOCK * D, *v_tile = k_tile + N * D;
    int h = blockIdx.x, b = blockIdx.z, first = (gridDim.y - 1 - blockIdx.y) * ATT_BLOCK, past = Tk - Tq;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, kv_head = h / (NH / NKV);
    int keys = min(Tk, past + first + ATT_BLOCK);       // what the block's last query sees
    q += ((long)b * Tq + first) * ld_q + (long)h * HD;
    k += (long)b * Tk * ld_k + (long)kv_head * HD;
    v += (long)b * Tk * ld_v + (long)kv_head * HD;
    bool wide = attention_aligned(q, ld_q, HD, 8) && attention_aligned(k, ld_k, HD, 8) &&
                attention_aligned(v, ld_v, HD, 8);
    // exp(x / sqrt(HD)) = 2^(x factor): the maxima are kept in these units
    float factor = 1.44269504f / sqrtf((float)HD), sum[M][D / 8][4] = {}, max_score[M][2], total[M][2] = {};
    #pragma unroll
    for (int m = 0; m < M; m++) max_score[m][0] = max_score[m][1] = -INFINITY;

    attention_load<D, ATT_BLOCK, THREADS>(q_tile, q, ld_q, Tq - first, HD, wide);
    attention_load<D, N, THREADS>(k_tile, k, ld_k, Tk, HD, wide);
    cp_async_commit();
    for (int j0 = 0; j0 < keys; j0 += N) {
        cp_async_wait<0>();
        __syncthreads();            // the keys have arrived, and everyone is done with the last values
        attention_load<D, N, THREADS>(v_tile, v + j0 * ld_v, ld_v, Tk - j0, HD, wide);
        cp_async_commit();
        // a warp has nothing to do if its queries do not exist, or all keys of the tile lie after its last query
        int query = past + first + row;
        bool busy = first + row < Tq && j0 <= query + 16 * M - 1;
        float s[M][N / 8][4];
        if (busy) attention_dots<D, M, N>(s, q_tile, row, k_tile);
        cp_async_wait<0>();
        __syncthreads();            // the values have arrived, and everyone is done with the keys
        int next = j0 + N;
        if (next < keys) attention_load<D, N, THREADS>(k_tile, k + next * ld_k, ld_k, Tk - next, HD, wide);
        cp_async_commit();
        if (!busy) continue;
        // Every query sees key 0, so the maximum is a number from the first tile on. The mask also hides the zeros
        // after the last key from every query that exists.
        if (j0 + N - 1 > query) {
            #pragma unroll
            for (int i = 0; i < M * (N / 8) * 4; i++) {
                int m = i / (N / 2), n = i / 4 % (N / 8), e = i % 4;
                if (j0 + 8 * n + lane % 4 * 2 + e % 2 > query + 16 * m + lane / 4 + e / 2 * 8) s[m][n][e] = -INFINITY;
            }
        }
        #pragma unroll
        for (int m = 0; m < M; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {      // a row's scores are spread over 4 lanes
                float max = -INFINITY, p_sum = 0;
                #pragma unroll
                for (int n = 0; n < N / 8; n++) max = fmaxf(max, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
                max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
                max = fmaxf(max_score[m][half], max * factor);
                float shrink = exp2_fast(max_score[m][half] - max);
                max_score[m][half] = max;
                #pragma unroll
                for (int n = 0; n < N / 8; n++)
                    #pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[m][n][e] = exp2_fast(s[m][n][e] * factor - max);
                        p_sum += s[m][n][e];
                    }
                total[m][half] = total[m][half] * shrink + p_sum;      // this lane's share, until the end
                #pragma unroll
                for (int d = 0; d < D / 8; d++) sum[m][d][2 * half] *= shrink, sum[m][d][2 * half + 1] *= shrink;
            }
        attention_sums<D, M, N>(sum, s, v_tile);
    }
    bool pairs = attention_aligned(out, 2, HD, 2);
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = first + row + 16 * m + 8 * half;
            float all = total[m][half];
            all += __shfl_xor_sync(0xffffffffu, all, 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            attention_store<D>(out + (((long)b * Tq + i) * NH + h) * HD, (long)NH * HD, sum[m], half, 1.0f / all,
                               Tq - i, HD, pairs);
            if (i + lane / 4 < Tq && lane % 4 == 0)
                lse[((long)b * NH + h) * Tq + i + lane / 4] = 0.69314718f * (max_score[m][half] + log2f(all));
        }
}

// Grid (NH, blocks of 128 queries, B), as forward. Keys are used before and after values here, so both have two
// buffers: the next tile is on its way during all three products.
template <int D, int M, int N>
__global__ void __launch_bounds__(ATT_BLOCK / M * 2, M)
attention_backward_q_mma_kernel(bf16* dq, const bf16* dout, const float* lse, const float* dots, const bf16* q,
                                long ld_q, const bf16* k, long ld_k, const bf16* v, long ld_v, long ld_dq, int T,
                                int NH, int NKV, int HD) {
    constexpr int THREADS = ATT_BLOCK / M * 2;          // a warp for every 16 M rows
    extern __shared__ __align__(128) bf16 att_tiles[];
    bf16 *q_tile = att_tiles, *dout_tile = q_tile + ATT_BLOCK * D, *kv_tiles = dout_tile + ATT_BLOCK * D;
    int h = blockIdx.x, b = blockIdx.z, first = (gridDim.y - 1 - blockIdx.y) * ATT_BLOCK;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, query = first + row, kv_head = h / (NH / NKV);
    int keys = min(T, first + ATT_BLOCK);
    long ld_dout = (long)NH * HD, token = (long)b * T + first;
    q += token * ld_q + (long)h * HD;
    dout += token * ld_dout + (long)h * HD;
    k += (long)b * T * ld_k + (long)kv_head * HD;
    v += (long)b * T * ld_v + (long)kv_head * HD;
    bool wide = attention_aligned(q, ld_q, HD, 8) && attention_aligned(k, ld_k, HD, 8) &&
                attention_aligned(v, ld_v, HD, 8) && attention_aligned(dout, ld_dout, HD, 8);
    float factor = 1.44269504f / sqrtf((float)HD), sum[M][D / 8][4] = {};
    float* stats = (float*)(kv_tiles + 4 * N * D);      // lse of each row, in powers of 2, and its D
    for (int r = threadIdx.x; r < ATT_BLOCK; r += THREADS) {
        long i = ((long)b * NH + h) * T + min(first + r, T - 1);
        stats[r] = 1.44269504f * lse[i];
        stats[ATT_BLOCK + r] = dots[i];
    }
    auto load = [&](int j0) {
        bf16* k_tile = kv_tiles + j0 / N % 2 * 2 * N * D;
        attention_load<D, N, THREADS>(k_tile, k + j0 * ld_k, ld_k, T - j0, HD, wide);
        attention_load<D, N, THREADS>(k_tile + N * D, v + j0 * ld_v, ld_v, T - j0, HD, wide);
        cp_async_commit();
    };
    attention_load<D, ATT_BLOCK, THREADS>(q_tile, q, ld_q, T - first, HD, wide);
    attention_load<D, ATT_BLOCK, THREADS>(dout_tile, dout, ld_dout, T - first, HD, wide);
    load(0);
    for (int j0 = 0; j0 < keys; j0 += N) {
        cp_async_wait<0>();
        __syncthreads();            // this tile has arrived, and everyone is done with the one before
        if (j0 + N < keys) load(j0 + N);
        if (query >= T || j0 > query + 16 * M - 1) continue;
        bf16 *k_tile = kv_tiles + j0 / N % 2 * 2 * N * D, *v_tile = k_tile + N * D;
        float s[M][N / 8][4], dp[M][N / 8][4];
        attention_dots<D, M, N>(s, q_tile, row, k_tile);
        attention_dots<D, M, N>(dp, dout_tile, row, v_tile);
        bool mask = j0 + N - 1 > query;
        #pragma unroll
        for (int i = 0; i < M * (N / 8) * 4; i++) {
            int m = i / (N / 2), n = i / 4 % (N / 8), e = i % 4, r = row + 16 * m + e / 2 * 8 + lane / 4;
            float p = exp2_fast(s[m][n][e] * factor - stats[r]);
            if (mask && j0 + 8 * n + lane % 4 * 2 + e % 2 > first + r) p = 0;
            s[m][n][e] = p * (dp[m][n][e] - stats[ATT_BLOCK + r]);      // ds sqrt(HD)
        }
        attention_sums<D, M, N>(sum, s, k_tile);
    }
    dq += token * ld_dq + (long)h * HD;
    bool pairs = attention_aligned(dq, ld_dq, HD, 2);
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = row + 16 * m + 8 * half;
            attention_store<D>(dq + r * ld_dq, ld_dq, sum[m], half, 1.0f / sqrtf((float)HD), T - first - r, HD, pairs);
        }
}

// Grid (NKV, blocks of 128 keys, B): early keys are seen by most queries, and come first. Rows are keys, columns are
// queries: those of all query heads that share this key and value head, one head after the other.
template <int D, int M, int N>
__global__ void __launch_bounds__(ATT_BLOCK / M * 2, M)
attention_backward_kv_mma_kernel(bf16* dk, bf16* dv, const bf16* dout, const float* lse, const float* dots,
                                 const bf16* q, long ld_q, const bf16* k, long ld_k, const bf16* v, long ld_v,
                                 long ld_dk, long ld_dv, int T, int NH, int NKV, int HD) {
    constexpr int THREADS = ATT_BLOCK / M * 2;          // a warp for every 16 M rows
    extern __shared__ __align__(128) bf16 att_tiles[];
    bf16 *k_tile = att_tiles, *v_tile = k_tile + ATT_BLOCK * D, *q_tiles = v_tile + ATT_BLOCK * D;
    float* columns = (float*)(q_tiles + 4 * N * D);     // twice: lse of N queries, in powers of 2, and their D
    int kv_head = blockIdx.x, first = blockIdx.y * ATT_BLOCK, b = blockIdx.z;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M, key = first + row;
    int tiles = ceil_div(T - first, N), steps = NH / NKV * tiles;
    long ld_dout = (long)NH * HD, token = (long)b * T + first;
    q += token * ld_q;
    dout += token * ld_dout;
    k += token * ld_k + (long)kv_head * HD;
    v += token * ld_v + (long)kv_head * HD;
    bool wide = attention_aligned(q, ld_q, HD, 8) && attention_aligned(k, ld_k, HD, 8) &&
                attention_aligned(v, ld_v, HD, 8) && attention_aligned(dout, ld_dout, HD, 8);
    float factor = 1.44269504f / sqrtf((float)HD), dk_sum[M][D / 8][4] = {}, dv_sum[M][D / 8][4] = {};
    auto load = [&](int step) {
        long head = (long)(kv_head * (NH / NKV) + step / tiles) * HD;
        int i = step % tiles * N;       // queries are counted from the block's first key
        bf16* q_tile = q_tiles + step % 2 * 2 * N * D;
        attention_load<D, N, THREADS>(q_tile, q + i * ld_q + head, ld_q, T - first - i, HD, wide);
        attention_load<D, N, THREADS>(q_tile + N * D, dout + i * ld_dout + head, ld_dout, T - first - i, HD, wide);
        cp_async_commit();
    };
    // The first 2 N threads fetch one number each, lse or D; a step ahead, too. Where there is no query, q and dout are
    // zero and add nothing.
    auto fetch = [&](int step) {
        int h = kv_head * (NH / NKV) + step / tiles, i = first + step % tiles * N + threadIdx.x % N;
        bool is_lse = threadIdx.x < N;
        if (i >= T) return 0.0f;
        return is_lse ? 1.44269504f * lse[((long)b * NH + h) * T + i] : dots[((long)b * NH + h) * T + i];
    };
    attention_load<D, ATT_BLOCK, THREADS>(k_tile, k, ld_k, T - first, HD, wide);
    attention_load<D, ATT_BLOCK, THREADS>(v_tile, v, ld_v, T - first, HD, wide);
    load(0);
    if (threadIdx.x < 2 * N) columns[threadIdx.x] = fetch(0);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();            // this tile has arrived, and everyone is done with the one before
        bool more = step + 1 < steps, fetches = more && threadIdx.x < 2 * N;
        if (more) load(step + 1);
        float fetched = fetches ? fetch(step + 1) : 0;
        int i0 = first + step % tiles * N;
        if (key < T && i0 + N - 1 >= key) {
            bf16 *q_tile = q_tiles + step % 2 * 2 * N * D, *dout_tile = q_tile + N * D;
            const float *lse_c = columns + step % 2 * 2 * N, *dot_c = lse_c + N;
            float p[M][N / 8][4], ds[M][N / 8][4];
            attention_dots<D, M, N>(p, k_tile, row, q_tile);
            attention_dots<D, M, N>(ds, v_tile, row, dout_tile);
            bool mask = i0 < key + 16 * M - 1;
            #pragma unroll
            for (int i = 0; i < M * (N / 8) * 4; i++) {
                int m = i / (N / 2), n = i / 4 % (N / 8), e = i % 4, c = 8 * n + lane % 4 * 2 + e % 2;
                float x = exp2_fast(p[m][n][e] * factor - lse_c[c]);
                if (mask && i0 + c < key + 16 * m + lane / 4 + e / 2 * 8) x = 0;
                p[m][n][e] = x;
                ds[m][n][e] = x * (ds[m][n][e] - dot_c[c]);         // ds sqrt(HD)
            }
            attention_sums<D, M, N>(dv_sum, p, dout_tile);
            attention_sums<D, M, N>(dk_sum, ds, q_tile);
        }
        if (fetches) columns[(step + 1) % 2 * 2 * N + threadIdx.x] = fetched;
    }
    dk += token * ld_dk + (long)kv_head * HD;
    dv += token * ld_dv + (long)kv_head * HD;
    bool pairs = attention_aligned(dk, ld_dk, HD, 2) && attention_aligned(dv, ld_dv, HD, 2);
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = row + 16 * m + 8 * half, rows = T - first - r;
            attention_store<D>(dk + r * ld_dk, ld_dk, dk_sum[m], half, 1.0f / sqrtf((float)HD), rows, HD, pairs);
            attention_store<D>(dv + r * ld_dv, ld_dv, dv_sum[m], half, 1, rows, HD, pairs);
        }
}

template <int D>
static void attention_forward_launch(bf16* out, float* lse, const bf16* q, long ld_q, const bf16* k, long ld_k,
                                     const bf16* v, long ld_v, int B, int Tq, int Tk, int NH, int NKV, int HD,
                                     cudaStream_t stream) {
    constexpr int M = 2, N = D <= 96 ? 64 : 48;         // a warp's 32 x D sums and 32 x N scores must fit its registers
    auto kernel = attention_forward_mma_kernel<D, M, N>;
    size_t bytes = (ATT_BLOCK + 2 * N) * D * sizeof(bf16);
    allow_shared(kernel, bytes);
    kernel<<<dim3(NH, ceil_div(Tq, ATT_BLOCK), B), ATT_BLOCK / M * 2, bytes, stream>>>(
        out, lse, q, ld_q, k, ld_k, v, ld_v, Tq, Tk, NH, NKV, HD);
    CHECK(cudaGetLastError());
}
template <int D>
static void attention_backward_launch(bf16* dq, bf16* dk, bf16* dv, const float* dots, const bf16* dout,
                                      const float* lse, const bf16* q, long ld_q, const bf16* k, long ld_k,
                                      const bf16* v, long ld_v, long ld_dqk, long ld_dv, int B, int T, int NH, int NKV,
                                      int HD, cudaStream_t stream) {
    // dk and dv of 32 keys each fill the registers of a warp if the head is larger than 64; in the other kernel, tiles
    // of 32 keys leave too few to the products if it is larger than 96
    constexpr int M = 2, M_KV = D <= 64 ? 2 : 1, N = 32, N_Q = D <= 96 ? 32 : 16;
    auto kv_kernel = attention_backward_kv_mma_kernel<D, M_KV, N>;
    auto q_kernel = attention_backward_q_mma_kernel<D, M, N_Q>;
    size_t kv_bytes = (2 * ATT_BLOCK + 4 * N) * D * sizeof(bf16) + 4 * N * sizeof(float);
    size_t q_bytes = (2 * ATT_BLOCK + 4 * N_Q) * D * sizeof(bf16) + 2 * ATT_BLOCK * sizeof(float);
    int blocks = ceil_div(T, ATT_BLOCK);
    allow_shared(kv_kernel, kv_bytes);
    allow_shared(q_kernel, q_bytes);
    kv_kernel<<<dim3(NKV, blocks, B), ATT_BLOCK / M_KV * 2, kv_bytes, stream>>>(
        dk, dv, dout, lse, dots, q, ld_q, k, ld_k, v, ld_v, ld_dqk, ld_dv, T, NH, NKV, HD);
    CHECK(cudaGetLastError());
    q_kernel<<<dim3(NH, blocks, B), ATT_BLOCK / M * 2, q_bytes, stream>>>(
        dq, dout, lse, dots, q, ld_q, k, ld_k, v, ld_v, ld_dqk, T, NH, NKV, HD);
    CHECK(cudaGetLastError());
}
