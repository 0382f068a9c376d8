// Tests of the stand-in: kernels with planted defects, each of which it must find, and correct programs, which it must
// leave alone. Without an argument the program runs itself once for each test of the table at the end, with that test's
// settings, and compares what comes out with what the table expects; with the name of a test it runs that one.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <string>
#include <vector>
#include "test_part.cuh"
#include "test_part.cuh"

typedef __nv_bfloat16 bf16;

#define CHECK(call) check((call), __LINE__)
static void check(cudaError_t e, int line) {
    if (e) printf("line %d: %s (%s)\n", line, cudaGetErrorString(e), cudaGetErrorName(e)), exit(1);
}
static void expect(bool good, const char* what) {
    if (!good) printf("WRONG: %s\n", what), exit(1);
}

template <class T> struct Device {  // n numbers in device memory
    T* p;
    size_t n;
    explicit Device(size_t n) : n(n) { CHECK(cudaMalloc(&p, n * sizeof(T))); }
    explicit Device(const std::vector<T>& x) : Device(x.size()) {
        CHECK(cudaMemcpy(p, x.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~Device() { CHECK(cudaFree(p)); }
    Device(const Device&) = delete;
    std::vector<T> host() const {
        std::vector<T> x(n);
        CHECK(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
};
static std::vector<float> ramp(int n) {
    std::vector<float> x(n);
    for (int i = 0; i < n; i++) x[i] = (float)i;
    return x;
}
static float noise() {
    static unsigned state = 1;
    return (float)((state = state * 1664525 + 1013904223) >> 16) / 65536 - 0.5f;
}
static std::vector<bf16> noise_bf16(int n) {
    std::vector<bf16> x(n);
    for (bf16& v : x) v = __float2bfloat16(noise());
    return x;
}

__device__ static float warp_sum(float x) {
    for (int o = 16; o; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Planted defects

enum Defect { NONE, NO_BARRIER, NO_SECOND_BARRIER, OUT_OF_BOUNDS };

// out[b] = sum of in[b n .. b n + n - 1], in rounds of 256, one block each
template <Defect DEFECT> __global__ void sum_kernel(float* out, const float* in, int n) {
    __shared__ float sums[8];
    float total = 0;
    for (int round = 0; round < n; round += 256) {
        float x = round + (int)threadIdx.x < n ? in[(long)blockIdx.x * n + round + threadIdx.x] : 0;
        x = warp_sum(x);
        float* sum = sums + (DEFECT == OUT_OF_BOUNDS);
        if (threadIdx.x % 32 == 0) sum[threadIdx.x / 32] = x;
        if (DEFECT != NO_BARRIER) __syncthreads();
        for (int w = 0; w < 8; w++) total += sums[w];
        if (DEFECT != NO_SECOND_BARRIER) __syncthreads();
    }
    if (threadIdx.x == 255) out[blockIdx.x] = total;
}
template <Defect DEFECT> static void sum_test() {
    Device<float> x(ramp(1024)), sum(1);
    sum_kernel<DEFECT><<<1, 256>>>(sum.p, x.p, 1024);
    CHECK(cudaGetLastError());
    printf("sum %g\n", sum.host()[0]);
}

__global__ static void no_syncwarp_kernel(int* out) {
    __shared__ int s[32];
    s[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = s[threadIdx.x ^ 1];
}
static void no_syncwarp() {
    Device<int> out(32);
    no_syncwarp_kernel<<<1, 32>>>(out.p);
}

__global__ static void no_bounds_kernel(float* x) { x[blockIdx.x * blockDim.x + threadIdx.x] = 1; }
static void past_end() {
    Device<float> x(1000);
    no_bounds_kernel<<<1, 1001>>>(x.p);
}
static void past_end_far() {
    Device<float> x(1024);
    no_bounds_kernel<<<2, 1024>>>(x.p);
}
static void use_after_free() {
    float* p;
    {
        Device<float> x(256);
        p = x.p;
    }
    no_bounds_kernel<<<1, 256>>>(p);
}
static void host_pointer() {
    std::vector<float> x(256);
    no_bounds_kernel<<<1, 256>>>(x.data());
}
static void null_pointer() {
    static float* volatile nothing;  // not known to the compiler
    no_bounds_kernel<<<1, 256>>>(nothing);
}
static void block_too_large() {
    Device<float> x(4096);
    no_bounds_kernel<<<1, 2048>>>(x.p);
    CHECK(cudaGetLastError());
}
static void grid_too_large() {
    Device<float> x(4096);
    no_bounds_kernel<<<dim3(1, 65536), 1>>>(x.p);
    CHECK(cudaGetLastError());
}
static void grid_empty() {
    Device<float> x(4096);
    no_bounds_kernel<<<0, 32>>>(x.p);
    CHECK(cudaGetLastError());
}
static void error_ignored() {
    Device<float> x(4096);
    no_bounds_kernel<<<0, 32>>>(x.p);
    printf("went on\n");
}

__global__ static void __launch_bounds__(128) bounded_kernel(float* x) { x[threadIdx.x] = 1; }
static void launch_bounds() {
    Device<float> x(256);
    bounded_kernel<<<1, 256>>>(x.p);
}

__global__ static void dynamic_kernel(float* x, int past) {
    extern __shared__ float s[];
    s[threadIdx.x + past] = 1;
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x];
}
static void dynamic_past_end() {
    Device<float> x(256);
    dynamic_kernel<<<1, 256, 1024>>>(x.p, 1);
}
static void too_much_shared() {
    Device<float> x(256);
    dynamic_kernel<<<1, 256, 60000>>>(x.p, 0);
    CHECK(cudaGetLastError());
}
template <int N> __global__ void big_static_kernel(float* x) {
    __shared__ float s[N];
    s[threadIdx.x] = 1;
    x[threadIdx.x] = s[threadIdx.x];
}
static void too_much_static() {
    Device<float> x(256);
    big_static_kernel<20000><<<1, 256>>>(x.p);
}
__global__ static void fresh_shared_kernel(float* x) {
    __shared__ float s;
    if (blockIdx.x == 0) s = 1;  // what one block leaves behind is nothing to another
    __syncthreads();
    if (threadIdx.x == 0) x[blockIdx.x] = s;
}
static void uninitialised_shared() {
    Device<float> x(2);
    fresh_shared_kernel<<<2, 32>>>(x.p);
    printf("%g %g\n", x.host()[0], x.host()[1]);
}
static void uninitialised_device() {
    Device<float> x(256), sum(1);
    sum_kernel<NONE><<<1, 256>>>(sum.p, x.p, 256);
    printf("sum %g\n", sum.host()[0]);
}

__global__ static void divergent_kernel(float* x) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        x[threadIdx.x] = 1;
        __syncthreads();
    }
}
static void divergent_barrier() {
    Device<float> x(64);
    divergent_kernel<<<1, 64>>>(x.p);
}
__global__ static void deadlock_kernel(float* x) {
    if (threadIdx.x == 40) x[0] = warp_sum(1);
    else __syncthreads();
}
static void deadlock() {
    Device<float> x(64);
    deadlock_kernel<<<1, 64>>>(x.p);
}
__global__ static void exited_kernel(float* x, int n) {
    if ((int)threadIdx.x >= n) return;
    x[threadIdx.x] = warp_sum(1);
}
static void exited_lanes() {
    Device<float> x(64);
    exited_kernel<<<1, 64>>>(x.p, 50);
}
__global__ static void mixed_kernel(int* x) {
    x[threadIdx.x] = threadIdx.x & 1 ? __shfl_sync(0xffffffffu, 1, 0) : (int)__ballot_sync(0xffffffffu, 1);
}
static void mixed_operations() {
    Device<int> x(32);
    mixed_kernel<<<1, 32>>>(x.p);
}
static void partial_warp() {
    Device<float> x(48);
    exited_kernel<<<1, 48>>>(x.p, 48);
    printf("%g %g\n", x.host()[0], x.host()[40]);
}

__global__ static void scatter_kernel(float* x, const int* to, const float* from, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[to[i]] = from[i];
}
static void scatter_collision() {
    Device<float> x(16), from(ramp(1024));
    Device<int> to(std::vector<int>(1024, 3));
    scatter_kernel<<<4, 256>>>(x.p, to.p, from.p, 1024);
}
__global__ static void lost_update_kernel(int* x) {
    int old = *x;
    __syncthreads();
    *x = old + threadIdx.x;
}
static void lost_update() {
    Device<int> x(std::vector<int>{5});
    lost_update_kernel<<<1, 64>>>(x.p);
}
__global__ static void slot_kernel(int* x, int* count) { x[atomicAdd(count, 1)] = threadIdx.x; }
static void atomic_placement() {
    Device<int> x(64), count(std::vector<int>{0});
    slot_kernel<<<1, 64>>>(x.p, count.p);
}

__global__ static void float4_kernel(float* x) { x[threadIdx.x] = ((const float4*)(x + 33))->w; }
static void misaligned_float4() {
    Device<float> x(64);
    float4_kernel<<<1, 1>>>(x.p);
}
__global__ static void misaligned_copy_kernel(const float* x) {
    extern __shared__ float s[];
    cp_async_16(s, x + 1, true);
}
static void misaligned_copy() {
    Device<float> x(64);
    misaligned_copy_kernel<<<1, 1, 1024>>>(x.p);
}
__global__ static void deep_kernel(int* x) {
    volatile char big[200 << 10];
    for (int i = 0; i < (int)sizeof big; i += 64) big[i] = 1;
    x[0] = big[64];
}
static void stack_overflow() {
    Device<int> x(1);
    deep_kernel<<<1, 2>>>(x.p);
}

// out = in, by way of shared memory, in steps of 32 threads x 16 bytes, one step ahead
template <bool WAIT, bool BARRIER> __global__ void pipeline_kernel(float* out, const float* in, int steps) {
    extern __shared__ __align__(16) float s[];
    auto load = [&](int step) {
        if (step < steps) cp_async_16(s + step % 2 * 128 + threadIdx.x * 4, in + step * 128 + threadIdx.x * 4, true);
        cp_async_commit();
    };
    load(0);
    for (int step = 0; step < steps; step++) {
        load(step + 1);
        if (WAIT) cp_async_wait<1>();
        __syncthreads();
        for (int i = 0; i < 4; i++) out[step * 128 + i * 32 + threadIdx.x] = s[step % 2 * 128 + i * 32 + threadIdx.x];
        if (BARRIER) __syncthreads();
    }
}
template <bool WAIT, bool BARRIER> static void pipeline() {
    std::vector<float> x = ramp(128 * 5);
    Device<float> in(x), out(x.size());
    pipeline_kernel<WAIT, BARRIER><<<1, 32, 1024>>>(out.p, in.p, 5);
    expect(out.host() == x, "the copy");
}

// D (64 x N) = A (64 x 16) B (16 x N) by one wgmma. In memory, both operands lie as shared memory will have them, but
// without the swizzle: A (64, 16) and B (N, 16) or, transposed, (16, 64) and (16, N).
template <int N, int TA, int TB, bool WAIT> __global__ void wgmma_kernel(float* out, const bf16* a, const bf16* b) {
    extern __shared__ __align__(1024) bf16 s[];
    // lines of 64 numbers (128 bytes); transposed, 64 indices are one group of 16 lines (one for each k)
    auto place = [&](bf16* base, int index, int k, bool transposed) {
        int line = transposed ? index / 64 * 16 + k : index, at = transposed ? index % 64 : k;
        return base + line * 64 + ((at / 8 ^ line % 8) * 8 + at % 8);
    };
    bf16* sb = s + 64 * 64;
    for (int i = threadIdx.x; i < 64 * 16; i += 128) *place(s, TA ? i % 64 : i / 16, TA ? i / 64 : i % 16, TA) = a[i];
    for (int i = threadIdx.x; i < N * 16; i += 128) *place(sb, TB ? i % N : i / 16, TB ? i / N : i % 16, TB) = b[i];
    fence_async_proxy();
    __syncthreads();
    auto descriptor = [&](bf16* p) {
        uint64_t at = shared_address(p), leading = 2048, stride = 1024;
        return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1ull << 62;
    };
    float d[N / 2] = {};
    wgmma_fence();
    wgmma_bf16<N, TA, TB>(d, descriptor(s), descriptor(sb));
    wgmma_commit();
    if (WAIT) wgmma_wait<0>();
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int j = 0; j < N / 8; j++)
        for (int h = 0; h < 2; h++)
            for (int c = 0; c < 2; c++) out[(row + 8 * h) * N + 8 * j + lane % 4 * 2 + c] = d[4 * j + 2 * h + c];
    if (!WAIT) wgmma_wait<0>();
}
template <int N, int TA, int TB, bool WAIT = true> static void wgmma_test() {
    std::vector<bf16> a = noise_bf16(64 * 16), b = noise_bf16(N * 16);
    Device<bf16> da(a), db(b);
    Device<float> out(64 * N);
    const int bytes = (64 + (N > 128 ? N : 128)) * 128;
    CHECK(cudaFuncSetAttribute(wgmma_kernel<N, TA, TB, WAIT>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    wgmma_kernel<N, TA, TB, WAIT><<<1, 128, bytes>>>(out.p, da.p, db.p);
    CHECK(cudaGetLastError());
    std::vector<float> d = out.host();
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0;
            for (int k = 0; k < 16; k++)
                sum += (double)__bfloat162float(a[TA ? k * 64 + i : i * 16 + k]) *
                       (double)__bfloat162float(b[TB ? k * N + j : j * 16 + k]);
            expect(fabs(sum - d[i * N + j]) < 1e-5, "wgmma");
        }
}

static void host_reads_device() {
    Device<float> x(ramp(64));
    printf("%g\n", x.p[3]);
}
static void copy_wrong_way() {
    Device<float> x(ramp(64));
    float host[64];
    CHECK(cudaMemcpy(host, x.p, sizeof host, cudaMemcpyHostToDevice));
}
static void copy_too_much() {
    Device<float> x(64);
    std::vector<float> host(65);
    CHECK(cudaMemcpy(x.p, host.data(), 65 * 4, cudaMemcpyHostToDevice));
}
template <bool WAIT> static void reuse_buffer() {
    float* buffer;
    CHECK(cudaMallocHost(&buffer, 4));
    Device<float> x(2);
    for (int i = 0; i < 2; i++) {
        buffer[0] = (float)i;
        CHECK(cudaMemcpyAsync(x.p + i, buffer, 4, cudaMemcpyHostToDevice, 0));
        if (WAIT) CHECK(cudaStreamSynchronize(0));
    }
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaFreeHost(buffer));
    expect(x.host() == ramp(2), "the copies");
}
static void free_twice() {
    float* p;
    CHECK(cudaMalloc(&p, 4));
    CHECK(cudaFree(p));
    CHECK(cudaFree(p));
}
static void no_device() {
    int n;
    CHECK(cudaGetDeviceCount(&n));
}
static void out_of_memory() {
    float* p;
    CHECK(cudaMalloc(&p, 100 << 20));
}

// C (m x n) = alpha op(A) op(B) + beta C, and against the definition
template <class TA, class TC>
static void product(bool ta, bool tb, int m, int n, int k, float alpha, float beta, int lda, int ldb, int ldc,
                    int count = 1, int short_of = 0) {
    int columns_a = ta ? m : k, columns_b = tb ? k : n;
    std::vector<TA> a((size_t)lda * columns_a * count), b((size_t)ldb * columns_b * count);
    std::vector<TC> c((size_t)ldc * n * count), d;
    for (auto& x : a) x = TA(noise());
    for (auto& x : b) x = TA(noise());
    for (auto& x : c) x = beta != 0 ? TC(noise()) : TC(NAN);
    Device<TA> da(a), db(b);
    Device<TC> dc(c.size() - short_of);
    CHECK(cudaMemcpy(dc.p, c.data(), dc.n * sizeof(TC), cudaMemcpyHostToDevice));
    cublasHandle_t handle;
    expect(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cublasCreate");
    cudaDataType type = sizeof(TA) == 4 ? CUDA_R_32F : CUDA_R_16BF, type_c = sizeof(TC) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    cublasStatus_t status = cublasGemmStridedBatchedEx(
        handle, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &alpha, da.p, type, lda,
        (long long)lda * columns_a, db.p, type, ldb, (long long)ldb * columns_b, &beta, dc.p, type_c, ldc,
        (long long)ldc * n, count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status) printf("%s\n", cublasGetStatusString(status)), exit(1);
    d = dc.host();
    for (int e = 0; e < count; e++)
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                double sum = 0;
                const TA *x = a.data() + (size_t)e * lda * columns_a, *y = b.data() + (size_t)e * ldb * columns_b;
                for (int l = 0; l < k; l++)
                    sum += (double)(float)x[ta ? l + i * lda : i + l * lda] *
                           (double)(float)y[tb ? j + l * ldb : l + j * ldb];
                size_t at = (size_t)e * ldc * n + i + (long)j * ldc;
                double wanted = alpha * sum + (beta != 0 ? beta * (float)c[at] : 0);
                expect(fabs(wanted - (float)d[at]) < (sizeof(TC) == 2 ? 0.01 : 1e-5) * (1 + fabs(wanted)), "a product");
            }
    cublasDestroy(handle);
}
static void product_short() { product<float, float>(false, false, 8, 8, 8, 1, 0, 8, 8, 8, 1, 1); }
static void product_bad_ld() { product<float, float>(false, false, 8, 8, 8, 1, 0, 7, 8, 8); }

// ---------------------------------------------------------------------------------------------------------------------
// Correct programs

template <class T> struct Scale {
    T factor;
    __device__ T operator()(T x, int i) const { return x * factor + (T)i; }
};

__global__ static void warp_kernel(int* out) {
    unsigned all = 0xffffffffu;
    int lane = threadIdx.x % 32, k = 0;
    auto put = [&](int x) { out[k++ * 32 + lane] = x; };
    put(__shfl_sync(all, lane * 3, 5));
    put(__shfl_sync(all, lane * 3, lane + 1, 8));
    put(__shfl_xor_sync(all, lane, 9));
    put(__shfl_up_sync(all, lane, 3));
    put(__shfl_down_sync(all, lane, 3, 16));
    put((int)__ballot_sync(all, lane % 3 == 0));
    put(__any_sync(all, lane == 7) + 2 * __all_sync(all, lane < 32) + 4 * __all_sync(all, lane < 31));
    put((int)__match_any_sync(all, lane / 5));
    put(__reduce_add_sync(all, lane) + __reduce_max_sync(all, lane) + __reduce_min_sync(all, lane + 1));
    // two halves of a warp on different ways
    unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    if (lane < 16) {
        put(__shfl_sync(half, lane, 2));
        put(__shfl_xor_sync(half, lane, 1));
    } else {
        put((int)__ballot_sync(half, lane & 1));
        put(__shfl_sync(half, lane, 20));
    }
    __syncwarp();
    put((int)__shfl_sync(all, (double)lane / 2, 31));
}
static void warp_operations() {
    Device<int> out(12 * 32);
    warp_kernel<<<1, 32>>>(out.p);
    std::vector<int> x = out.host();
    for (int l = 0; l < 32; l++) {
        unsigned ballot = 0, match = 0;
        for (int i = 0; i < 32; i++) ballot |= (i % 3 == 0 ? 1u : 0) << i, match |= (i / 5 == l / 5 ? 1u : 0) << i;
        int wanted[12] = {15, (l / 8 * 8 + (l + 1) % 8) * 3, l ^ 9, l < 3 ? l : l - 3, l % 16 + 3 < 16 ? l + 3 : l,
                          (int)ballot, 3, (int)match, 496 + 31 + 1,
                          l < 16 ? 2 : (int)0xaaaa0000u, l < 16 ? l ^ 1 : 20, 15};
        for (int k = 0; k < 12; k++)
            expect(x[k * 32 + l] == wanted[k], ("warp operation " + std::to_string(k)).c_str());
    }
}

// one 16 x 16 x 16 product by ldmatrix and mma; a (16, 16), and b by rows n (16, 16) or, TRANSPOSED, by rows k
template <bool TRANSPOSED> __global__ void mma_kernel(float* out, const bf16* a, const bf16* b) {
    __shared__ __align__(16) bf16 sa[16][16], sb[16][16];
    for (int i = threadIdx.x; i < 256; i += 32) sa[i / 16][i % 16] = a[i], sb[i / 16][i % 16] = b[i];
    __syncthreads();
    unsigned fa[4], fb[4];
    int l = threadIdx.x, low = l % 8, middle = l / 8 % 2 * 8, high = l / 16 * 8;
    ldmatrix_x4<false>(fa, &sa[low + middle][high]);
    if (TRANSPOSED) ldmatrix_x4<true>(fb, &sb[low + middle][high]);
    else ldmatrix_x4<false>(fb, &sb[low + high][middle]);
    for (int j = 0; j < 2; j++) {
        float d[4] = {};
        mma_m16n8k16_bf16(d, fa, fb + 2 * j);
        for (int i = 0; i < 4; i++) out[(l / 4 + i / 2 * 8) * 16 + j * 8 + l % 4 * 2 + i % 2] = d[i];
    }
}
template <bool TRANSPOSED> static void mma_test() {
    std::vector<bf16> a = noise_bf16(256), b = noise_bf16(256);
    Device<bf16> da(a), db(b);
    Device<float> out(256);
    mma_kernel<TRANSPOSED><<<1, 32>>>(out.p, da.p, db.p);
    std::vector<float> d = out.host();
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += (float)a[i * 16 + k] * (float)b[TRANSPOSED ? k * 16 + j : j * 16 + k];
            expect(fabsf(sum - d[i * 16 + j]) < 1e-5f, "mma");
        }
}

__global__ static void index_kernel(int* x) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    x[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
__global__ static void shared_kernel(int* out) {
    __shared__ int a[4][8], b, /* , c; */ c[2];
    extern __shared__ __align__(128) unsigned char d[];
    int* e = (int*)d;
    if (threadIdx.x < 32) a[threadIdx.x / 8][threadIdx.x % 8] = threadIdx.x;
    if (threadIdx.x == 0) b = 100, c[0] = 1000, c[1] = 2000;
    e[threadIdx.x] = threadIdx.x * 2;
    __syncthreads();
    int next = (threadIdx.x + 1) % blockDim.x;
    out[threadIdx.x] = a[threadIdx.x / 8 % 4][threadIdx.x % 8] + b + c[threadIdx.x & 1] + e[next];
}
__global__ static void atomics_kernel(int* x, unsigned long long* y) {
    atomicAdd(&x[0], 2);
    atomicMax(&x[1], (int)threadIdx.x);
    atomicMin(&x[2], -(int)threadIdx.x);
    atomicOr(&x[3], 1 << threadIdx.x % 8);
    atomicAdd(y, 1ull << 40);
}

#define LAUNCH_MAP(x, f, n) map_kernel<<<((n) + 31) / 32, 32>>>(x, f, n)

template <class T> static void launches() {  // what translate.py must understand: "kernel<<<1, 2>>>(x)", '"', // <<<
    Device<T> x(std::vector<T>(100, T(2)));
    std::vector<T> y;
    map_kernel<T, Scale<T>><<<1, 1>>>(NULL, Scale<T>{T(1)}, 0);
    constexpr int N = 100;
    int grid = 4, calls = 0;
    auto count = [&] { return calls++, N; };
    map_kernel<T, Scale<T>> <<<grid++, 1 << 5>>>(x.p, Scale<T>{T(3)}, count());  // each argument once
    expect(grid == 5 && calls == 1, "arguments are evaluated once");
    y = x.host();
    for (int i = 0; i < N; i++) expect(y[i] == T(6 + i), "a functor");
    T add = 5;
    map_kernel<<<dim3(4), dim3(32), 0, cudaStream_t(0)>>>(
        x.p,
        [=] __device__(T v, int) { return v + add; },
        N);
    LAUNCH_MAP(x.p, Scale<T>{T(1)}, N);
    void (*kernel)(T*, Scale<T>, int) = map_kernel<T, Scale<T>>;
    kernel<<<(N > 64 ? 4 : 2), 32>>>(x.p, Scale<T>{T(2)}, N);
    y = x.host();
    for (int i = 0; i < N; i++) expect(y[i] == T((6 + i + 5 + i) * 2 + i), "a lambda, a macro, a pointer");
}

template <bool TALL> static void correct() {
    sum_test<NONE>();
    warp_operations();
    mma_test<false>();
    mma_test<true>();
    launches<int>();
    launches<float>();
    pipeline<true, true>();
    reuse_buffer<true>();
    {
        Device<int> x(2 * 3 * 2 * 5 * 4 * 3), y(64);
        index_kernel<<<dim3(2, 3, 2), dim3(5, 4, 3)>>>(x.p);
        std::vector<int> h = x.host();
        for (int i = 0; i < (int)h.size(); i++) expect(h[i] == i / 60 * 1000 + i % 60, "indices");
        shared_kernel<<<3, 64, 64 * sizeof(int)>>>(y.p);
        h = y.host();
        for (int i = 0; i < 64; i++)
            expect(h[i] == i / 8 % 4 * 8 + i % 8 + 100 + (i & 1 ? 2000 : 1000) + (i + 1) % 64 * 2, "shared memory");
    }
    {
        Device<int> x(std::vector<int>(4, 0));
        Device<unsigned long long> y(std::vector<unsigned long long>{5});
        atomics_kernel<<<10, 100>>>(x.p, y.p);
        expect(x.host() == std::vector<int>{2000, 99, -99, 255} && y.host()[0] == 5 + (1000ull << 40), "atomics");
    }
    {
        Device<float> x(1000 * 256), sums(1000);
        CHECK(cudaMemset(x.p, 0, x.n * 4));
        standin_reset_counts();
        for (int i = 0; i < 3; i++) sum_kernel<NONE><<<1000, 256>>>(sums.p, x.p, 256);
        CHECK(cudaDeviceSynchronize());
        expect(standin_launches("sum_kernel") == 3 && standin_launches() == 3, "counts");
    }
    product<float, float>(false, false, 33, 17, 9, 1, 0, 40, 9, 35);
    product<float, float>(true, false, 100, 64, 200, 0.5f, 1, 200, 200, 100);
    product<bf16, bf16>(true, false, 31, 70, 24, 1, 0, 24, 24, 31);
    product<bf16, float>(false, true, 20, 50, 64, 1, 1, 20, 50, 20, 3);
    product<float, float>(true, true, 5, 3, 0, 1, 2, 1, 3, 5);
    if (TALL) {
        wgmma_test<64, 0, 0>();
        wgmma_test<128, 1, 0>();
        wgmma_test<192, 0, 1>();
        wgmma_test<256, 1, 1>();
    }
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    CHECK(cudaEventRecord(from));
    CHECK(cudaEventRecord(to));
    CHECK(cudaEventSynchronize(to));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, from, to));
    CHECK(cudaEventDestroy(from));
    CHECK(cudaEventDestroy(to));
    printf("all correct\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

enum Build { ANY, PLAIN, SANITIZED };  // with which builds a test makes sense
static const struct Test { const char* name; void (*run)(); Build build; const char *settings, *expected; } tests[] = {
    {"correct", correct<true>, ANY, "", "all correct"},
    {"correct, reverse", correct<true>, ANY, "STANDIN_ORDER=reverse", "all correct"},
    {"correct, shuffled", correct<true>, ANY, "STANDIN_ORDER=shuffle STANDIN_THREADS=2", "all correct"},
    {"correct, all orders", correct<true>, ANY, "STANDIN_CHECK=1", "all correct"},
    {"correct, all orders, two CPU threads", correct<true>, ANY, "STANDIN_CHECK=1 STANDIN_THREADS=2", "all correct"},
    {"correct, late copies", correct<true>, ANY, "STANDIN_LAZY=1", "all correct"},
    {"correct, late wgmma", correct<true>, ANY, "STANDIN_LAZY=2", "all correct"},
    {"correct, late stream", correct<true>, ANY, "STANDIN_LAZY=4", "all correct"},
    {"correct, all late, all orders", correct<true>, ANY, "STANDIN_LAZY=7 STANDIN_CHECK=1", "all correct"},
    {"correct, protected", correct<true>, ANY, "STANDIN_PROTECT=1", "all correct"},
    {"correct on sm_80", correct<false>, ANY, "STANDIN_ARCH=80", "all correct"},
    {"wgmma on sm_80", correct<true>, ANY, "STANDIN_ARCH=80", "compute capability 8.0"},

    {"missing barrier", sum_test<NO_BARRIER>, ANY, "STANDIN_CHECK=1", "depends on the order"},
    {"missing second barrier", sum_test<NO_SECOND_BARRIER>, ANY, "STANDIN_CHECK=1", "depends on the order"},
    {"missing __syncwarp", no_syncwarp, ANY, "STANDIN_CHECK=1", "depends on the order"},
    {"scatter to one place", scatter_collision, ANY, "STANDIN_CHECK=1", "depends on the order"},
    {"lost update", lost_update, ANY, "STANDIN_CHECK=1", "depends on the order"},
    {"placement by an atomic", atomic_placement, ANY, "STANDIN_CHECK=1", "depends on the order"},

    {"write past the end", past_end, PLAIN, "", "wrote past an end: to byte 4000"},
    {"write past the end", past_end, SANITIZED, "", "AddressSanitizer"},
    {"write far past the end", past_end_far, PLAIN, "", "past the end of an allocation of 4096 bytes"},
    {"use after free", use_after_free, PLAIN, "", "freed"},
    {"use after free", use_after_free, SANITIZED, "", "AddressSanitizer"},
    {"past the end of a shared array", sum_test<OUT_OF_BOUNDS>, SANITIZED, "", "AddressSanitizer"},
    {"past the end of dynamic shared memory", dynamic_past_end, SANITIZED, "", "AddressSanitizer"},
    {"host pointer as an argument", host_pointer, ANY, "", "pointer to the host's memory"},
    {"null pointer", null_pointer, PLAIN, "", "no_bounds_kernel, block (0, 0, 0), thread (0, 0, 0): touches address"},
    {"misaligned float4", misaligned_float4, SANITIZED, "", "misaligned address"},
    {"misaligned cp.async", misaligned_copy, ANY, "", "not a multiple of 16"},
    {"stack overflow", stack_overflow, PLAIN, "", "stack is full"},
    {"uninitialised device memory", uninitialised_device, ANY, "", "nan"},
    {"uninitialised shared memory", uninitialised_shared, ANY, "STANDIN_THREADS=1", "1 -nan"},

    {"divergent barrier", divergent_barrier, ANY, "", "different __syncthreads()"},
    {"deadlock", deadlock, ANY, "", "deadlock: of 64 threads 0 have ended; 63 wait at __syncthreads()"},
    {"shuffle with lanes that have ended", exited_lanes, ANY, "", "waits for it"},
    {"the same, reverse order", exited_lanes, ANY, "STANDIN_ORDER=reverse", "which have ended"},
    {"lanes in different operations", mixed_operations, ANY, "", "meet in different operations"},
    {"shuffle in a partial warp", partial_warp, ANY, "", "32 -nan"},

    {"block too large", block_too_large, ANY, "", "invalid configuration"},
    {"grid too large", grid_too_large, ANY, "", "invalid configuration"},
    {"grid empty", grid_empty, ANY, "", "invalid configuration"},
    {"error never asked for", error_ignored, ANY, "", "never asked for"},
    {"more threads than __launch_bounds__", launch_bounds, ANY, "", "__launch_bounds__(128)"},
    {"shared memory without the attribute", too_much_shared, ANY, "", "invalid argument"},
    {"too much static shared memory", too_much_static, ANY, "", "more than 48 KB"},

    {"copy without wait", pipeline<false, true>, ANY, "STANDIN_LAZY=1", "WRONG: the copy"},
    {"buffer overwritten too early", pipeline<true, false>, ANY, "", "WRONG: the copy"},
    {"wgmma without wait", wgmma_test<128, 0, 0, false>, ANY, "STANDIN_LAZY=2", "WRONG: wgmma"},
    {"pinned buffer used again", reuse_buffer<false>, ANY, "STANDIN_LAZY=4", "WRONG: the copies"},
    {"host reads device memory", host_reads_device, PLAIN, "STANDIN_PROTECT=1", "host touches device memory: byte 12"},
    {"copy in the wrong direction", copy_wrong_way, ANY, "", "invalid argument"},
    {"copy of too much", copy_too_much, ANY, "", "invalid argument"},
    {"free twice", free_twice, ANY, "", "invalid argument"},
    {"no device", no_device, ANY, "STANDIN_DEVICES=0", "no CUDA-capable device"},
    {"out of memory", out_of_memory, ANY, "STANDIN_MEMORY=64", "out of memory"},
    {"cuBLAS: matrix too short", product_short, ANY, "", "not all in an allocation"},
    {"cuBLAS: leading dimension", product_bad_ld, ANY, "", "CUBLAS_STATUS_INVALID_VALUE"},
};

#ifdef __has_feature  // clang
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
static const Build build = SANITIZED;
#else
static const Build build = PLAIN;
#endif

int main(int argc, char** argv) {
    if (argc > 1) {
        tests[atoi(argv[1])].run();
        return 0;
    }
    int passed = 0, failed = 0;
    for (const Test& test : tests) {
        if (test.build != ANY && test.build != build) continue;
        // the shell stands between, so that it, not this program, hears of the abort
        std::string command = std::string("env ") + test.settings + " " + argv[0] + " " +
                              std::to_string(&test - tests) + " 2>&1; echo \"exit code $?\"", output;
        FILE* f = popen(("exec 2>&1; " + command).c_str(), "r");
        char buffer[4096];
        for (size_t n; (n = fread(buffer, 1, sizeof buffer, f));) output.append(buffer, n);
        pclose(f);
        // a defect must not only be seen: what is reported must also end the program, unless the result shows it
        bool well = strstr(output.c_str(), "exit code 0");
        bool shown = !strncmp(test.expected, "all correct", 11) || strstr(test.expected, "nan");
        bool good = strstr(output.c_str(), test.expected) && well == shown;
        (good ? passed : failed)++;
        if (!good)
            printf("FAILED: %s (%s): expected \"%s\", but:\n%s\n", test.name, test.settings, test.expected,
                   output.c_str());
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
