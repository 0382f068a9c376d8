/*
grouped_gemm.cu: the matrix product of a mixture of experts, from the obvious loop to the kernel of train_moe.cu in five
steps. Every step computes the same thing:

    y_r = W_e x_n      for every row r = 0 .. R-1,  n: the token that row r serves,  e: the expert that row r belongs to

    x           (N, C)      bf16  a vector for each token
    W           (E, OC, C)  bf16  a matrix for each expert
    y           (R, OC)     bf16  the results, R = N K
    token       (R)         int   row r serves token token[r]
    offsets     (E + 1)     int   the rows of expert e are offsets[e] .. offsets[e+1]-1
    tiles       (max_tiles) int2  {expert, first row} of up to 128 rows that are computed together, then {-1, -1}

Every token is served by K experts, in K rows that lie wherever these experts' rows lie: rows are sorted by expert, so
that many of them in a row use the same matrix. How many rows an expert has is known on the GPU only and differs from
step to step, and asking would make the GPU wait for the host. So the host starts as many blocks as could be needed: the
R rows fill at most R / 128 tiles, and the last tile of each of E experts may be incomplete, max_tiles = R / 128 + E. A
block finds its expert and its rows in the list `tiles`, and returns if there is nothing.

What to count. The product takes 2 R C OC operations, of which an H100 does up to 67 TFLOP/s in fp32, and about 800 in
bf16 on its tensor cores. For each c, a block that computes BM x BN elements does 2 BM BN operations, and reads BM
numbers of x and BN of W, 2 (BM + BN) bytes: BM BN / (BM + BN) operations per byte. These reads are served by the L2
cache, at about 6 TB/s. So 32 operations per byte allow 190 TFLOP/s, and 133 would be wanted for 800.

    grouped_gemm                        checks every step on small ragged cases
    grouped_gemm N [K [E [C [OC]]]]     times them as well, by default with K = 2, E = 8, C = OC = 2048

In the project's directory, on Hopper; on others with -arch=native (dev/cuda/lessons.sh checks it without a GPU):

    nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -diag-suppress 177 -I. dev/cuda/grouped_gemm.cu \
        -o grouped_gemm -lcublas
*/
#define TRAIN_MOE_NO_MAIN
#include "../../train_moe.cu"
#include <vector>

// ---------------------------------------------------------------------------------------------------------------------
// Step 1: a thread computes one number
//
// A block has 8 x 32 threads for 8 rows and 32 columns of y. A thread reads two numbers for every multiply-add. The
// sums are right, and the arithmetic units are idle nearly all of the time:
//   - Reading takes longer than multiplying. Every number of x is wanted by OC threads, every number of W by as many as
//     the expert has rows. Caches keep most of that off the memory, but each is a read of its own: 2 reads of 2 bytes
//     for 2 operations, half an operation per byte.
//   - The 32 threads of a warp have neighbouring columns of y, which are rows of W. In one instruction they read 32
//     numbers that lie 2 C bytes apart, from 32 lines of the cache instead of one.
__global__ void step1_kernel(bf16* y, const bf16* x, const int* token, const bf16* W, const int* offsets,
                             const int2* tiles, int C, int OC) {
    int2 tile = tiles[blockIdx.x / 16];             // 16 blocks of 8 rows for each tile
    if (tile.x < 0) return;                         // nothing is left for this block
    int row = tile.y + blockIdx.x % 16 * 8 + threadIdx.y, column = blockIdx.y * 32 + threadIdx.x;
    if (row >= offsets[tile.x + 1] || column >= OC) return;
    const bf16 *x_n = x + (long)token[row] * C, *w = W + ((long)tile.x * OC + column) * C;
    float sum = 0;
    for (int c = 0; c < C; c++) sum += to_float(x_n[c]) * to_float(w[c]);
    store(y + (long)row * OC + column, sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Step 2: a block shares what it reads, a thread computes 4 x 4 numbers
//
// The 256 threads of a block compute 64 x 64 elements of y, 16 values of c at a time. Together they read 64 x 16
// numbers of x and of W, each once, with neighbouring threads at neighbouring addresses, and leave them in shared
// memory. A number is used 64 times after one read from L2: 32 operations per byte, more than enough for arithmetic in
// fp32.
//
// Now the reads from shared memory count. With one element a thread there would still be 2 for a multiply-add. With
// 4 x 4 there are 4 of x and 4 of W for 16 multiply-adds, and the sums stay in registers.
//
// Two barriers: nobody may multiply before everybody has stored, or store again before everybody has multiplied.
//
// In shared memory c is the outer dimension, so that a thread's four numbers lie side by side and come in one read of
// 16 bytes. Shared memory has 32 banks, each 4 bytes wide, and threads of a warp that want different numbers of one
// bank wait for each other. Here they store 16 values of c for two lines: in rows of 64 floats, a multiple of 32, all
// 16 would go to one bank; in rows of 68 they go to 8 banks, and four floats still begin at a multiple of 16 bytes.
__global__ void __launch_bounds__(256)
step2_kernel(bf16* y, const bf16* x, const int* token, const bf16* W, const int* offsets, const int2* tiles,
             int C, int OC) {
    __shared__ __align__(16) float x_tile[16][68], w_tile[16][68];
    int2 tile = tiles[blockIdx.x / 2];              // 2 blocks of 64 rows for each tile
    if (tile.x < 0) return;                         // no thread of the block will wait at a barrier
    int row0 = tile.y + blockIdx.x % 2 * 64, row_end = offsets[tile.x + 1], column0 = blockIdx.y * 64;
    const bf16* w = W + (long)tile.x * OC * C;
    int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16 * 4;     // of this thread's elements in the block's
    float sum[4][4] = {};
    for (int c0 = 0; c0 < C; c0 += 16) {
        for (int i = threadIdx.x; i < 64 * 16; i += 256) {
            int line = i / 16, c = c0 + i % 16, row = row0 + line, column = column0 + line;
            x_tile[i % 16][line] = row < row_end && c < C ? to_float(x[(long)token[row] * C + c]) : 0.0f;
            w_tile[i % 16][line] = column < OC && c < C ? to_float(w[(long)column * C + c]) : 0.0f;
        }
        __syncthreads();
        for (int c = 0; c < 16; c++) {
            float4 a = *(const float4*)&x_tile[c][m], b = *(const float4*)&w_tile[c][n];
            float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) sum[i][j] += left[i] * right[j];
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            if (row0 + m + i < row_end && column0 + n + j < OC)
                store(y + (long)(row0 + m + i) * OC + column0 + n + j, sum[i][j]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Step 3: tensor cores
//
// From here on a warp works as one. mma.sync multiplies 16 x 16 by 16 x 8 numbers of type bf16 and adds the product to
// 16 x 8 floats: 2048 multiply-adds in one instruction, where step 2 needs 64. Each of the matrices is spread over the
// registers of the warp's 32 threads in a fixed pattern, and ldmatrix brings it there from shared memory: it reads four
// 8 x 8 matrices, 512 bytes, of which thread l names the address of row l % 8 of matrix l / 8.
//
// So much arithmetic wants to be fed. A block computes 128 x 128 elements, 64 operations for each byte read from L2,
// and each of its 8 warps 64 x 32 of them: 4 x 4 products for 4 + 2 ldmatrix. Global memory is read in pieces of 16
// bytes or 8 numbers, the most that a thread can read at once (so C must be a multiple of 8), 64 values of c at a time.
//
// The 8 rows of an 8 x 8 matrix are 16 bytes each and fill all 32 banks, if no two of them begin in the same. Rows of
// 64 numbers are 128 bytes, so all would: 8 reads one after the other. With 8 numbers more, each row begins 4 banks
// after the one above it.
//
// What is missing: loading and multiplying take turns. From the first address to the last byte a stage takes some 600
// clocks (an estimate), which go by in waiting; multiplying it, 2 * 128 * 128 * 64 operations, takes 1024 on an A100
// and 512 on an H100. Only a second block on the same multiprocessor can fill the gaps.

// Writes the 64 x 32 sums of a warp at y (R, OC) from `row` and `column` on. Of a 16 x 8 result thread l has columns
// l % 4 * 2 and the next, in rows l / 4 and l / 4 + 8.
__device__ static void store_sums(bf16* y, const float sum[4][4][4], int row, int row_end, int column, int OC) {
    #pragma unroll
    for (int i = 0; i < 64; i++) {
        int r = row + i / 16 * 16 + threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
        int c = column + i / 4 % 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (r < row_end && c < OC) store(y + (long)r * OC + c, sum[i / 16][i / 4 % 4][i % 4]);
    }
}

__global__ void __launch_bounds__(256, 2)
step3_kernel(bf16* y, const bf16* x, const int* token, const bf16* W, const int* offsets, const int2* tiles,
             int C, int OC) {
    __shared__ __align__(16) bf16 x_tile[128][64 + 8], w_tile[128][64 + 8];
    int2 tile = tiles[blockIdx.x];
    if (tile.x < 0) return;
    int row0 = tile.y, row_end = offsets[tile.x + 1], column0 = blockIdx.y * 128;
    const bf16* w = W + (long)tile.x * OC * C;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp / 4 * 64, n = warp % 4 * 32;
    float sum[4][4][4] = {};                        // 4 x 4 results of 16 x 8, of which a thread has four numbers
    for (int c0 = 0; c0 < C; c0 += 64) {
        for (int i = threadIdx.x; i < 128 * 8; i += 256) {
            int line = i / 8, piece = i % 8 * 8, c = c0 + piece, row = row0 + line, column = column0 + line;
            uint4 zero = make_uint4(0, 0, 0, 0);
            *(uint4*)&x_tile[line][piece] =
                row < row_end && c < C ? *(const uint4*)(x + (long)token[row] * C + c) : zero;
            *(uint4*)&w_tile[line][piece] = column < OC && c < C ? *(const uint4*)(w + (long)column * C + c) : zero;
        }
        __syncthreads();
        for (int k = 0; k < 64; k += 16) {
            unsigned a[4][4], b[2][4];
            // 16 rows of x by 16 of c: the upper and the lower 8 rows of the left half, then those of the right half
            for (int i = 0; i < 4; i++) ldmatrix_x4<false>(a[i], &x_tile[m + i * 16 + lane % 16][k + lane / 16 * 8]);
            // 16 rows of W, which are columns of y, by 16 of c: both halves of the first 8 rows, then of the other 8
            for (int j = 0; j < 2; j++)
                ldmatrix_x4<false>(b[j], &w_tile[n + j * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) mma_m16n8k16_bf16(sum[i][j], a[i], &b[j / 2][j % 2 * 2]);
        }
        __syncthreads();
    }
    store_sums(y, sum, row0 + m, row_end, column0 + n, OC);
}

// ---------------------------------------------------------------------------------------------------------------------
// Step 4: copies that go on while the block multiplies
//
// cp.async copies 16 bytes from global to shared memory without the thread: it gives the order and goes on. So there
// are two stages in shared memory, and while one is multiplied the other is on its way. The wait for memory is over
// before anybody asks, and the numbers do not pass through registers.
//
// One barrier a stage is enough now. Behind it, this stage's copies have arrived for all threads (each has waited for
// its own), and all are done with the stage before, whose place the next copies take.
//
// Where a thread's pieces come from does not change with c: token[row] is read once, not once for each stage.
//
// Two stages with rows of 72 numbers would be 74 KB, of 64 numbers 64 KB. Instead of a gap, the eight pieces of a row
// trade places: piece p of row r is stored at place p ^ (r % 8) ("swizzle"). Eight rows below each other then have
// their piece p at eight different places, in different banks, and nothing is wasted.
__device__ static bf16* piece_at(bf16* tile, int line, int piece) { return tile + line * 64 + (piece ^ line % 8) * 8; }

constexpr int STEP4_STAGE = 2 * 128 * 64;           // numbers in a stage: a tile (128, 64) of x, and one of W

__global__ void __launch_bounds__(256, 2)
step4_kernel(bf16* y, const bf16* x, const int* token, const bf16* W, const int* offsets, const int2* tiles,
             int C, int OC) {
    extern __shared__ __align__(128) bf16 stages[];
    int2 tile = tiles[blockIdx.x];
    if (tile.x < 0) return;
    int row0 = tile.y, row_end = offsets[tile.x + 1], column0 = blockIdx.y * 128;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m = warp / 4 * 64, n = warp % 4 * 32;
    // This thread copies piece threadIdx.x % 8 of 4 rows of x and 4 of W, each 32 rows apart; NULL: there is no such
    // row
    const bf16 *x_row[4], *w_row[4];
    for (int i = 0; i < 4; i++) {
        int line = threadIdx.x / 8 + i * 32, row = row0 + line, column = column0 + line;
        x_row[i] = row < row_end ? x + (long)token[row] * C : NULL;
        w_row[i] = column < OC ? W + ((long)tile.x * OC + column) * C : NULL;
    }
    auto load = [&](int c0) {
        bf16 *x_tile = stages + c0 / 64 % 2 * STEP4_STAGE, *w_tile = x_tile + STEP4_STAGE / 2;
        int line = threadIdx.x / 8, piece = threadIdx.x % 8, c = c0 + piece * 8;
        for (int i = 0; i < 4; i++) {
            bool in_x = x_row[i] && c < C, in_w = w_row[i] && c < C;    // else zeros are stored
            cp_async_16(piece_at(x_tile, line + i * 32, piece), in_x ? x_row[i] + c : x, in_x);
            cp_async_16(piece_at(w_tile, line + i * 32, piece), in_w ? w_row[i] + c : W, in_w);
        }
        cp_async_commit();                          // these copies can be waited for, as a group
    };
    float sum[4][4][4] = {};
    load(0);
    for (int c0 = 0; c0 < C; c0 += 64) {
        cp_async_wait<0>();
        __syncthreads();
        if (c0 + 64 < C) load(c0 + 64);
        bf16 *x_tile = stages + c0 / 64 % 2 * STEP4_STAGE, *w_tile = x_tile + STEP4_STAGE / 2;
        #pragma unroll 2    // fewer registers than all four: two blocks are to fit into a multiprocessor
        for (int p = 0; p < 8; p += 2) {            // 16 values of c are two pieces; the rest is as in step 3
            unsigned a[4][4], b[2][4];
            for (int i = 0; i < 4; i++)
                ldmatrix_x4<false>(a[i], piece_at(x_tile, m + i * 16 + lane % 16, p + lane / 16));
            for (int j = 0; j < 2; j++)
                ldmatrix_x4<false>(b[j], piece_at(w_tile, n + j * 16 + lane / 16 * 8 + lane % 8, p + lane / 8 % 2));
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) mma_m16n8k16_bf16(sum[i][j], a[i], &b[j / 2][j % 2 * 2]);
        }
    }
    store_sums(y, sum, row0 + m, row_end, column0 + n, OC);
}

// ---------------------------------------------------------------------------------------------------------------------
// Step 5: experts_bf16_kernel, in dev/lib/cuda/experts_bf16.cuh
//
// It is step 4 with the rest of what the model needs. What makes it faster:
//   - wgmma, on Hopper. In step 4 a warp reads 6 x 512 bytes from shared memory for 16 mma.sync. At 128 bytes a clock
//     that is 24 clocks; the products take an A100 32 clocks and an H100 16, so on an H100 shared memory is the limit.
//     wgmma adds 16 values of c to 64 x 256 sums of four warps at once, straight from shared memory, and while it runs
//     the warps order the next copies. It expects tiles in the swizzled order of step 4.
//   - Tiles of 128 x 256 with wgmma: 85 operations for each byte from L2, instead of 64.
//   - An order of blocks. Those that run at the same time read the same rows of x and W as far as possible, so that L2
//     has them (find_job).
//   - Blocks that fill an SM are persistent: each makes one tile after the other, and while it stores one, the next
//     one's copies are on their way. Otherwise nothing would hide what a tile begins and ends with.
//   - Sums go through shared memory once more, so that a warp writes whole rows of y and not 16 bytes here and there.
//     What follows the product, SwiGLU or its derivative, is done on the way: an Epilogue, here one that just stores.
// And what makes it general: any C and any alignment, operands read along or across the dimension that is summed, which
// the two gradients need.

// ---------------------------------------------------------------------------------------------------------------------
// The same problem for all steps

struct Problem {
    int N, K, E, C, OC, R, max_tiles;
    std::vector<int> token, expert;                 // both (R): of each row
    std::vector<bf16> x, W, y;                      // y has GROUP_ROWS rows more, which nobody should touch
    bf16 *gpu_x, *gpu_W, *gpu_y;
    int *gpu_offsets, *gpu_token;
    int2* gpu_tiles;
};

template <class T> static T* to_gpu(const std::vector<T>& v) {
    T* p;
    CHECK(cudaMalloc((void**)&p, v.size() * sizeof(T)));
    CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

// numbers in -1/2 .. 1/2
static float random_number(uint32_t* state) {
    *state = *state * 1664525u + 1013904223u;
    return (*state >> 8) / 16777216.0f - 0.5f;
}

static Problem make_problem(int N, int K, int E, int C, int OC) {
    Problem p;
    p.N = N, p.K = K, p.E = E, p.C = C, p.OC = OC, p.R = N * K, p.max_tiles = p.R / GROUP_ROWS + E;
    uint32_t state = 1;
    p.x.resize((size_t)N * C);
    p.W.resize((size_t)E * OC * C);
    p.y.resize((size_t)(p.R + GROUP_ROWS) * OC);
    for (bf16& v : p.x) v = __float2bfloat16(random_number(&state));
    for (bf16& v : p.W) v = __float2bfloat16(random_number(&state));
    // A token's experts are K neighbours, low numbers more often than high ones: uneven, as routers are.
    std::vector<std::vector<int>> rows(E);
    for (int n = 0; n < N; n++) {
        float u = random_number(&state) + 0.5f;
        int first = (int)(u * u * E);
        for (int k = 0; k < K; k++) rows[(first + k) % E].push_back(n);
    }
    std::vector<int> offsets;
    std::vector<int2> tiles;
    for (int e = 0; e < E; e++) {
        int first = (int)p.token.size(), count = (int)rows[e].size();
        offsets.push_back(first);
        for (int r = 0; r < count; r += GROUP_ROWS) tiles.push_back(make_int2(e, first + r));
        for (int n : rows[e]) p.token.push_back(n), p.expert.push_back(e);
    }
    offsets.push_back(p.R);
    tiles.resize(p.max_tiles, make_int2(-1, -1));
    p.gpu_x = to_gpu(p.x), p.gpu_W = to_gpu(p.W), p.gpu_y = to_gpu(p.y);
    p.gpu_offsets = to_gpu(offsets), p.gpu_token = to_gpu(p.token), p.gpu_tiles = to_gpu(tiles);
    return p;
}

static void free_problem(Problem* p) {
    void* arrays[] = {p->gpu_x, p->gpu_W, p->gpu_y, p->gpu_offsets, p->gpu_token, p->gpu_tiles};
    for (void* array : arrays) CHECK(cudaFree(array));
}

static const int STEPS = 5;
static const char* step_name(int step) {
    const char* names[STEPS - 1] = {"a thread, a number", "shared memory, 4 x 4 a thread", "tensor cores",
                                    "copies while multiplying"};
    if (step < STEPS) return names[step - 1];
    return gpu_has_wgmma() ? "train_moe.cu, with wgmma" : "train_moe.cu, with mma.sync";
}

static void run_step(int step, const Problem& p) {
    auto launch = [&](auto kernel, dim3 grid, dim3 block, size_t shared) {
        allow_shared(kernel, shared);
        kernel<<<grid, block, shared>>>(p.gpu_y, p.gpu_x, p.gpu_token, p.gpu_W, p.gpu_offsets, p.gpu_tiles,
                                        p.C, p.OC);
        CHECK(cudaGetLastError());
    };
    if (step == 1) launch(step1_kernel, dim3(p.max_tiles * 16, ceil_div(p.OC, 32)), dim3(32, 8), 0);
    if (step == 2) launch(step2_kernel, dim3(p.max_tiles * 2, ceil_div(p.OC, 64)), 256, 0);
    if (step == 3) launch(step3_kernel, dim3(p.max_tiles, ceil_div(p.OC, 128)), 256, 0);
    if (step == 4)
        launch(step4_kernel, dim3(p.max_tiles, ceil_div(p.OC, 128)), 256, 2 * STEP4_STAGE * sizeof(bf16));
    if (step == 5)
        launch_experts<X_WT>(operand<bf16>(p.gpu_x, p.C, p.gpu_token), operand<bf16>(p.gpu_W, p.C, NULL),
                             p.gpu_offsets, p.gpu_tiles, p.max_tiles, 1, p.OC,
                             StoreEpilogue<bf16>{p.gpu_y, p.OC, by_fours(p.gpu_y, p.OC)}, 0);
}

static int passed, failed;

// Runs a step and compares `samples` elements (0: all) with sums in double precision. The error of an element is told
// in units of what rounding may do to it: bf16 has 8 significant bits, so that the result is off by up to 1/256 of its
// size, and the sum of floats by 1e-6 of the sizes of its terms. Right kernels come close to 1 and do not pass it.
static double error_of(int step, Problem& p, size_t samples) {
    CHECK(cudaMemset(p.gpu_y, 0xff, p.y.size() * sizeof(bf16)));   // NaN: elements that are left out are found
    run_step(step, p);
    CHECK(cudaMemcpy(p.y.data(), p.gpu_y, p.y.size() * sizeof(bf16), cudaMemcpyDeviceToHost));
    double worst = 0;
    size_t real = (size_t)p.R * p.OC, count = samples ? samples : real;
    for (size_t s = 0; s < count; s++) {
        size_t i = samples ? s * 2654435761u % real : s, r = i / p.OC, o = i % p.OC;
        const bf16 *x = &p.x[(size_t)p.token[r] * p.C], *w = &p.W[((size_t)p.expert[r] * p.OC + o) * p.C];
        double sum = 0, size = 0;
        for (int c = 0; c < p.C; c++) {
            double product = (double)__bfloat162float(x[c]) * __bfloat162float(w[c]);
            sum += product;
            size += fabs(product);
        }
        double error = fabs(__bfloat162float(p.y[i]) - sum) / (fabs(sum) / 256 + 1e-6 * size);
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    for (size_t i = real; i < p.y.size(); i++)
        if (!isnan(__bfloat162float(p.y[i]))) worst = INFINITY;     // somebody wrote behind the last row
    return worst;
}

// Prints the time of run(), the mean of ten, and how fast that is.
template <class Run> static void print_time(const Problem& p, Run run) {
    const int runs = 10;
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    run();                                          // the first time is slower, and not counted
    CHECK(cudaEventRecord(start));
    for (int i = 0; i < runs; i++) run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(end));
    printf(" %11.3f %9.2f", ms / runs, 2.0 * p.R * p.C * p.OC * runs / ms * 1e-9);
}

static void run_problem(int N, int K, int E, int C, int OC, bool timed) {
    Problem p = make_problem(N, K, E, C, OC);
    printf("N %d, K %d, E %d, C %d, OC %d\n", N, K, E, C, OC);
    printf("  %-33s %9s%s\n", "step", "max error", timed ? "          ms   TFLOP/s" : "");
    for (int step = 1; step <= STEPS; step++) {
        double error = error_of(step, p, timed ? 1000 : 0);
        bool good = error <= 1;
        good ? passed++ : failed++;
        printf("  %d %-31s %9.2f", step, step_name(step), error);
        if (timed) print_time(p, [&] { run_step(step, p); });
        printf(good ? "\n" : "  FAILED\n");
    }
    if (timed) {    // as much arithmetic without gathering: all tokens to experts 0 .. K-1
        cublasHandle_t handle;
        CHECK_CUBLAS(cublasCreate(&handle));
        printf("  %-43s", "  cuBLAS, one dense product");
        print_time(p, [&] { gpu_linear<bf16>(handle, p.gpu_y, p.gpu_x, p.gpu_W, N, C, K * OC); });
        printf("\n");
        CHECK_CUBLAS(cublasDestroy(handle));
    }
    free_problem(&p);
}

int main(int argc, char** argv) {
    begin_program("grouped_gemm");
    int s[5] = {0, 2, 8, 2048, 2048};               // N K E C OC
    for (int i = 1; i < argc && i <= 5; i++) s[i - 1] = atoi(argv[i]);
    if (argc > 6 || (argc > 1 && s[0] < 1) || s[1] < 1 || s[2] < s[1] || s[3] < 8 || s[3] % 8 || s[4] < 1)
        die(2, "N [K [E [C [OC]]]] are wanted, with K <= E and C a multiple of 8");
    printf("Errors are told in units of what rounding to bf16 may do: 1 is the limit.\n");
    run_problem(75, 2, 5, 40, 72, false);           // no dimension fills a tile
    run_problem(1, 1, 3, 8, 1, false);              // one token, experts without rows
    run_problem(300, 1, 3, 328, 136, false);        // tiles and a rest in every direction; 6 stages, which share memory
    if (argc > 1) run_problem(s[0], s[1], s[2], s[3], s[4], true);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
