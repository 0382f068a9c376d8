// tensor_cores.cuh: what C++ has no words for, each in a function of its own: asynchronous copies into shared memory
// (cp.async), the warp's matrix product (ldmatrix, mma.sync), Hopper's (wgmma), 2^x. Needs CHECK. The stand-in
// (dev/cuda/standin, a CPU playing GPU) brings functions of the same names.
#pragma once

#ifdef __CUDACC__
__device__ static inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
// 16 bytes from global to shared memory while the program goes on; zeros if !wanted
__device__ static inline void cp_async_16(void* to, const void* from, bool wanted) {
    int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
__device__ static inline void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ static inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }
// four 8 x 8 matrices of 16-bit numbers from shared memory into a warp's registers, lane l giving the address of row
// l % 8 of matrix l / 8
template <bool TRANSPOSED> __device__ static inline void ldmatrix_x4(unsigned r[4], const void* p) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(p)));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(p)));
}
// d (16 x 8) += a (16 x 16) b (16 x 8), spread over a warp
__device__ static inline void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// 2^x within 2 units in the last place, 0 for -infinity: one instruction, where exp2f guards tiny results as well
#ifdef __CUDACC__
__device__ static inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
static inline float exp2_fast(float x) { return exp2f(x); }
#endif

// Hopper's matrix instructions. They exist only in code made for sm_90a, and only devices of compute capability 9.0 run
// that: wgmma_compiled tells what this pass of the compiler makes, gpu_has_wgmma() what will run.
#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "sm_90 has no wgmma: compile for sm_90a, -gencode arch=compute_90a,code=sm_90a (-arch= makes sm_90, too)"
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool wgmma_compiled = true;
// What ordinary stores and cp.async wrote to shared memory is seen by the matrix unit only after this fence.
__device__ static inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// orders registers written by other instructions before the wgmma that follow
__device__ static inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ static inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// until at most N groups are unfinished
template <int N> __device__ static inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Nothing at run time: keeps the compiler from moving uses of these registers past this place.
template <int N> __device__ static inline void wgmma_hold(float* d) {
    #pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// d (64 x N, over the 128 threads of a warpgroup) += a (64 x 16) b (16 x N), both in shared memory, told by
// descriptors. A_ACROSS, B_ACROSS: 0 if k is the operand's contiguous dimension there, 1 if it is the other one.
#define TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9,"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D32(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12), D4(i + 16), D4(i + 20), D4(i + 24), D4(i + 28)
template <int N, int A_ACROSS, int B_ACROSS>
__device__ static inline void wgmma_bf16(float* d, uint64_t a, uint64_t b) {
    static_assert(N == 128 || N == 256, "");
    if constexpr (N == 128)
        asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                     TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") "%60,%61,%62,%63},"
                     "%64, %65, p, 1, 1, %66, %67; }"
                     : D32(0), D32(32)
                     : "l"(a), "l"(b), "n"(A_ACROSS), "n"(B_ACROSS));
    else
        asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                     TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") TEN("6") TEN("7") TEN("8") TEN("9") TEN("10")
                     TEN("11") "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, p, 1, 1, %130, %131; }"
                     : D32(0), D32(32), D32(64), D32(96)
                     : "l"(a), "l"(b), "n"(A_ACROSS), "n"(B_ACROSS));
}
#undef TEN
#undef D4
#undef D32
#else
constexpr bool wgmma_compiled = false;
__device__ static inline void fence_async_proxy() {}
__device__ static inline void wgmma_fence() {}
__device__ static inline void wgmma_commit() {}
template <int N> __device__ static inline void wgmma_wait() {}
template <int N> __device__ static inline void wgmma_hold(float*) {}
template <int N, int A_ACROSS, int B_ACROSS> __device__ static inline void wgmma_bf16(float*, uint64_t, uint64_t) {}
#endif
// Never run: its greatest block tells whether the image that the driver chose for this device was made for sm_90a.
__global__ static void __launch_bounds__(wgmma_compiled ? 64 : 32) wgmma_mark_kernel() {}
#else // the stand-in has twins of these
constexpr bool wgmma_compiled = true;
template <int N> static inline void wgmma_hold(float*) {}
#endif

// Compute capability 9.0, of the current device.
static bool gpu_is_hopper(void) {
    int device, major, minor;
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major == 9 && minor == 0;
}
// Asked before each product, and remembered for the device that was asked last.
static bool gpu_has_wgmma(void) {
    static int asked = -1, has;
    int device;
    CHECK(cudaGetDevice(&device));
    if (device != asked) {
        has = gpu_is_hopper();
#ifdef __CUDACC__
        cudaFuncAttributes mark;
        CHECK(cudaFuncGetAttributes(&mark, wgmma_mark_kernel));
        has = has && mark.maxThreadsPerBlock == 64;
#endif
        asked = device;
    }
    return has;
}
// What multiplies the experts' rows in bf16, for the program's first line.
static const char* gpu_products(void) {
    return gpu_has_wgmma()   ? "wgmma"
           : gpu_is_hopper() ? "mma.sync: this program was not compiled for sm_90a (make GPUS=90a)"
                             : "mma.sync";
}
