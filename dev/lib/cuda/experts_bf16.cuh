// experts_bf16.cuh: the experts' products in bf16 on tensor cores: launch_experts for Operand<bf16>. Needs
// tensor_cores.cuh, and Operand, find_job, finish_rows and the epilogues of section 3 of train_moe.cu.
#pragma once

// A block of 256 threads computes 128 rows by BN columns, 64 values of k at a time, from tiles in shared memory. While
// one stage (a tile of each operand) is multiplied, cp.async fills the next ones.
//     mma.sync (sm_80 and later): each warp multiplies 64 x 32 from registers. 2 stages, so that two blocks fit into an
//         SM (A100) and one multiplies while the other waits or stores.
//     wgmma (sm_90a): four warps multiply 64 x BN straight from shared memory, asynchronously. At Hopper's speed the
//         way from L2 is the limit: 128 x 256 tiles load 3/4 of the bytes per product that 128 x 128 tiles do. One
//         such block fills an SM, so nothing else would run at a tile's ends: a block of these is persistent. It makes
//         every gridDim.x-th tile, and the stages of the next one are on their way, through the same ring, while the
//         last products of a tile run and its sums are stored.

constexpr int BK = 64;

// One operand's tile in shared memory: SIZE rows or columns of the result by BK values of k, in lines as in memory.
// ALONG_K: SIZE lines of BK numbers, k contiguous ("K-major"); otherwise BK lines of SIZE numbers ("MN-major").
// Lines are cut into pieces of 128 bytes, and pieces with the same columns lie below each other. Of the eight 16-byte
// chunks of a piece, chunk c is stored at place c ^ (line % 8): then neither eight chunks along a line nor eight below
// each other share a memory bank. That is also wgmma's 128-byte swizzle, if the tile starts at a multiple of 1024.
template <int SIZE, bool ALONG_K> struct Tile {
    static constexpr int LINES = ALONG_K ? SIZE : BK, CHUNKS = (ALONG_K ? BK : SIZE) / 8;
    static constexpr int STEP = 256 / CHUNKS, COUNT = LINES / STEP; // a thread loads COUNT chunks, STEP lines apart

    static __device__ bf16* at(bf16* tile, int line, int chunk) {
        return tile + (chunk / 8 * LINES + line) * 64 + ((chunk ^ line) & 7) * 8;
    }
    // Fills the tile from the rows `row` (< 0: zeros) of the operand, from column `column` on.
    static __device__ void load(bf16* tile, const Operand<bf16>& from, const int row[COUNT], int column) {
        int line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        column += chunk * 8;
        auto source = [&](int r) { return from.data + (long)r * from.width + column; };
        if (from.vector) {
            #pragma unroll
            for (int i = 0; i < COUNT; i++) {
                bool real = row[i] >= 0 && column < from.width;
                cp_async_16(at(tile, line + i * STEP, chunk), real ? source(row[i]) : from.data, real);
            }
        } else {
            #pragma unroll
            for (int i = 0; i < COUNT; i++) {
                bf16* to = at(tile, line + i * STEP, chunk);
                #pragma unroll 1
                for (int j = 0; j < 8; j++)
                    to[j] = row[i] >= 0 && column + j < from.width ? source(row[i])[j] : __float2bfloat16(0.0f);
            }
        }
    }
    // 16 x 16 numbers as mma.sync wants them, of a left or right operand
    static __device__ void fragment(unsigned r[4], bf16* tile, int i0, int k0, bool left) {
        int lane = threadIdx.x % 32, low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
        int i = i0 + (ALONG_K ? low : 0) + (left ? middle : high) * 8;
        int k = k0 + (ALONG_K ? 0 : low) + (left ? high : middle) * 8;
        if (ALONG_K) ldmatrix_x4<false>(r, at(tile, i, k / 8));
        else ldmatrix_x4<true>(r, at(tile, k, i / 8));
    }
    // wgmma's descriptor of rows (or columns) i0 .. by k0 .. k0+15 (PTX ISA, "Matrix descriptor"): the address, the
    // distance from one piece of a line to the next (not used along k, where 16 values are within a piece), the
    // distance from eight lines to the next eight, and the 128-byte swizzle, each distance in units of 16 bytes.
    static __device__ uint64_t descriptor(bf16* tile, int i0, int k0) {
        uint64_t address = shared_address(ALONG_K ? tile + i0 * 64 + k0 : tile + i0 / 64 * LINES * 64 + k0 * 64);
        return (address & 0x3ffff) / 16 | (uint64_t)(ALONG_K ? 1 : LINES * 128 / 16) << 16 |
               (uint64_t)(1024 / 16) << 32 | 1ull << 62;
    }
};

template <bool WGMMA, int BN> struct Bf16Shape {
    static constexpr int STAGES = !WGMMA ? 2 : BN == 128 ? 3 : 4, STAGE = (128 + BN) * BK; // numbers of a stage
    static constexpr int SUMS = BN + 8; // floats in a row of the sums: with 8 more, stores meet no bank conflicts
    static constexpr bool PERSISTENT = WGMMA && BN == 256;
    static constexpr int SHARED = STAGES * STAGE * 2 > 128 * SUMS * 4 ? STAGES * STAGE * 2 : 128 * SUMS * 4;
};

// Arguments as in experts_fp32_kernel; jobs: how many tiles there are.
template <int PRODUCT, bool WGMMA, int BN, class Epilogue>
__global__ void __launch_bounds__(256, BN == 128 ? 2 : 1)
experts_bf16_kernel(Operand<bf16> left, Operand<bf16> right, long weight_stride, const int* offsets, const int2* tiles,
                    int down, int across, int jobs, int columns, Epilogue epilogue) {
    if constexpr (WGMMA && !wgmma_compiled) {
        __trap();
    } else {
        extern __shared__ __align__(1024) char experts_shared[];
        using Shape = Bf16Shape<WGMMA, BN>;
        using Left = Tile<128, PRODUCT != DYT_X>;
        using Right = Tile<BN, PRODUCT == X_WT>;
        constexpr int WIDTH = Epilogue::PAIRS ? BN / 2 : BN, STAGES = Shape::STAGES;
        // With wgmma, the product of the step before may still be reading its stage when the next is loaded.
        constexpr int AHEAD = WGMMA ? STAGES - 2 : STAGES - 1;
        constexpr bool PERSISTENT = Shape::PERSISTENT;
        auto find = [&](int number) {
            return find_job<PRODUCT, 128>(number, offsets, tiles, down, across, left.width, WIDTH);
        };
        // A persistent block loads at most one tile ahead, as each has at least AHEAD steps: those after its last k add
        // zeros.
        auto steps_of = [](const Job& j) {
            int steps = ceil_div(j.k_end - j.k, BK);
            return PERSISTENT ? max(steps, AHEAD) : steps;
        };
        auto stage_at = [&](int stage) { return (bf16*)experts_shared + stage % STAGES * Shape::STAGE; };

        // What is loaded: the steps that are left of tile `from`, the next one's k, and the rows that this thread's
        // chunks come from. Along k they stay; across k they are fetched for the next stage when one has been loaded,
        // so that reading `token` is not waited for.
        Job job = find(blockIdx.x), from;
        if (!PERSISTENT && job.m0 >= job.m_end) return;
        const bf16* weights = right.data;
        int unloaded, k, left_row[Left::COUNT], right_row[Right::COUNT];
        auto fetch_rows = [&](bool first) {
            #pragma unroll
            for (int i = 0; i < Left::COUNT; i++) {
                int line = threadIdx.x / Left::CHUNKS + i * Left::STEP;
                if (PRODUCT == DYT_X) {
                    int r = k + line;
                    left_row[i] = r >= from.k_end ? -1 : left.token ? left.token[r] : r;
                } else if (first) {
                    int r = from.m0 + line;
                    left_row[i] = r >= from.m_end ? -1 : left.token ? left.token[r] : r;
                }
            }
            #pragma unroll
            for (int i = 0; i < Right::COUNT; i++) {
                int line = threadIdx.x / Right::CHUNKS + i * Right::STEP;
                if (PRODUCT != X_WT) {
                    int r = k + line;
                    right_row[i] = r >= from.k_end ? -1 : right.token ? right.token[r] : r;
                } else if (first) {
                    int n = from.n0 + line % WIDTH;
                    right_row[i] = n >= columns ? -1 : line / WIDTH * columns + n;
                }
            }
        };
        auto begin = [&](const Job& next) {
            from = next, k = from.k, unloaded = steps_of(from);
            if (PRODUCT != DYT_X) right.data = weights + from.expert * weight_stride;
            fetch_rows(true);
        };
        auto load_stage = [&](int stage) {
            if (unloaded > 0) {
                Left::load(stage_at(stage), left, left_row, PRODUCT == DYT_X ? from.m0 : k);
                Right::load(stage_at(stage) + 128 * BK, right, right_row, PRODUCT == X_WT ? k : from.n0);
                k += BK, unloaded--;
                fetch_rows(false);
            }
            cp_async_commit();
        };

        // mma.sync: a warp's 64 x 32 are 4 x 4 fragments of 16 x 8; wgmma: a warpgroup's 64 x BN, of which each warp
        // holds 16 rows, 1 x BN/8 fragments
        constexpr int FM = WGMMA ? 1 : 4, FN = WGMMA ? BN / 8 : 4;
        static_assert(WGMMA || BN == 128, "");
        int warp = threadIdx.x / 32, m = WGMMA ? warp * 16 : warp / 4 * 64, n = WGMMA ? 0 : warp % 4 * 32;
        int lane = threadIdx.x % 32;    // holds two neighbouring columns of two rows of each fragment
        begin(job);
        for (int stage = 0; stage < AHEAD; stage++) load_stage(stage);
        for (int number = blockIdx.x, stage = 0;; number += gridDim.x) {
            bool more = PERSISTENT && number + (int)gridDim.x < jobs;
            Job next;
            float sum[FM][FN][4] = {};
            wgmma_hold<FM * FN * 4>(&sum[0][0][0]);
            int steps = steps_of(job);
            for (int step = 0; step < steps; step++, stage++) {
                bf16 *a = stage_at(stage), *b = a + 128 * BK;
                cp_async_wait<AHEAD - 1>();
                if (WGMMA) fence_async_proxy();
                __syncthreads();    // this step's stage has arrived for all threads; that of step + AHEAD is free
                if (WGMMA) {
                    wgmma_fence();
                    #pragma unroll
                    for (int k16 = 0; k16 < BK; k16 += 16)
                        wgmma_bf16<BN, PRODUCT == DYT_X, PRODUCT != X_WT>(
                            &sum[0][0][0], Left::descriptor(a, warp / 4 * 64, k16), Right::descriptor(b, 0, k16));
                    wgmma_commit();
                    // while that runs, there is time to read where the next tile lies, and later its tokens
                    if (more && step == 0) next = find(number + gridDim.x);
                    if (more && step == steps - AHEAD) begin(next);
                    load_stage(stage + AHEAD);
                    wgmma_wait<1>();
                } else {
                    load_stage(stage + AHEAD);
                    #pragma unroll 2 // all four would take more registers than two blocks in an SM have
                    for (int k16 = 0; k16 < BK; k16 += 16) {
                        unsigned fa[FM][4], fb[FN / 2][4];
                        #pragma unroll
                        for (int i = 0; i < FM; i++) Left::fragment(fa[i], a, m + i * 16, k16, true);
                        #pragma unroll
                        for (int j = 0; j < FN / 2; j++) Right::fragment(fb[j], b, n + j * 16, k16, false);
                        #pragma unroll
                        for (int i = 0; i < FM; i++)
                            #pragma unroll
                            for (int j = 0; j < FN; j++) mma_m16n8k16_bf16(sum[i][j], fa[i], &fb[j / 2][j % 2 * 2]);
                    }
                }
            }
            wgmma_wait<0>();
            wgmma_hold<FM * FN * 4>(&sum[0][0][0]);
            __syncthreads();        // all products are done: their stages' memory is free for the sums

            if constexpr (PERSISTENT) {
                // The next tile's first AHEAD stages are arriving, two are free: one for each warpgroup, whose warps
                // pass 8 rows at a time.
                static_assert(AHEAD + 2 <= STAGES && 4 * 8 * Shape::SUMS * 4 <= Shape::STAGE * 2, "");
                float* sums = (float*)stage_at(stage + AHEAD + warp / 4) + warp % 4 * 8 * Shape::SUMS;
                #pragma unroll 1    // the epilogue's code is long
                for (int h = 0; h < 2; h++) {
                    if (h > 0) __syncthreads();
                    #pragma unroll
                    for (int j = 0; j < FN; j++) {
                        *(float2*)(sums + lane / 4 * Shape::SUMS + j * 8 + lane % 4 * 2) =
                            make_float2(sum[0][j][0], sum[0][j][1]);
                        sum[0][j][0] = sum[0][j][2], sum[0][j][1] = sum[0][j][3];
                        sum[0][j][2] = sum[0][j][3] = 0;    // not needed any more, and so not kept
                    }
                    __syncthreads();
                    if (job.m0 < job.m_end)
                        finish_rows<8, WIDTH, 32, 4>(sums, Shape::SUMS, job, job.m0 + m + h * 8, lane, epilogue);
                }
                if (!more) return;
                job = next;
            } else {
                float* sums = (float*)experts_shared;
                #pragma unroll
                for (int i = 0; i < FM; i++)
                    #pragma unroll
                    for (int j = 0; j < FN; j++)
                        #pragma unroll
                        for (int h = 0; h < 2; h++)
                            *(float2*)(sums + (m + i * 16 + h * 8 + lane / 4) * Shape::SUMS + n + j * 8 +
                                       lane % 4 * 2) = make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
                __syncthreads();
                finish_rows<128, WIDTH, 256, 4>(sums, Shape::SUMS, job, job.m0, threadIdx.x, epilogue);
                return;
            }
        }
    }
}

template <int PRODUCT, bool WGMMA, int BN, class Epilogue>
static void launch_experts_bf16(Operand<bf16> left, Operand<bf16> right, const int* offsets, const int2* tiles,
                                int max_tiles, int E, int columns, Epilogue epilogue, cudaStream_t stream) {
    auto kernel = experts_bf16_kernel<PRODUCT, WGMMA, BN, Epilogue>;
    using Shape = Bf16Shape<WGMMA, BN>;
    constexpr int shared = Shape::SHARED;
    allow_shared(kernel, shared);
    long weight_stride = (long)(Epilogue::PAIRS ? 2 : 1) * columns * left.width;
    int down = PRODUCT == DYT_X ? ceil_div(left.width, 128) : max_tiles;
    int across = ceil_div(columns, Epilogue::PAIRS ? BN / 2 : BN), jobs = down * across * E;
    kernel<<<Shape::PERSISTENT ? min(jobs, gpu_multiprocessors()) : jobs, 256, shared, stream>>>(
        left, right, weight_stride, offsets, tiles, down, across, jobs, columns, epilogue);
    CHECK(cudaGetLastError());
}

template <int PRODUCT, class Epilogue>
static void launch_experts(Operand<bf16> left, Operand<bf16> right, const int* offsets, const int2* tiles,
                           int max_tiles, int E, int columns, Epilogue epilogue, cudaStream_t stream) {
    // 256 columns at a time, unless more than an eighth of the work would be on columns that do not exist
    int narrow = ceil_div((Epilogue::PAIRS ? 2L : 1L) * columns, 128);
    auto launch = !gpu_has_wgmma()                   ? launch_experts_bf16<PRODUCT, false, 128, Epilogue>
                  : narrow % 2 == 0 || narrow >= 8 ? launch_experts_bf16<PRODUCT, true, 256, Epilogue>
                                                     : launch_experts_bf16<PRODUCT, true, 128, Epilogue>;
    launch(left, right, offsets, tiles, max_tiles, E, columns, epilogue, stream);
}
