// The CPU stand-in for CUDA: what device code uses, as ordinary C++. See README.md for how to run a .cu file with it.
//
// Include this before everything else (g++ -include standin.h). Types and prototypes come from the real CUDA headers,
// so that a wrong call does not compile. A thread of a block is a fiber: it runs until it must wait (at a barrier, or
// for the other lanes of its warp), then the next thread of the block runs. Blocks run one after another, or a few at
// a time on several CPU threads. translate.py turns launches and __shared__ variables into the calls declared here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <functional>
#include <type_traits>

#define CUDA_STAND_IN 1

// In g++'s eyes there is one kind of function, and translate.py has dealt with shared memory and launch bounds.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)

// Indices are thread-local: each CPU thread runs one block at a time, and sets threadIdx when it changes fibers.
// (__thread instead of thread_local spares every access a check whether a constructor has run.)
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// How often a kernel whose name contains `part` (null: any) was launched since the start or the last reset. Products
// by cuBLAS count as launches of "cublas".
long standin_launches(const char* part = nullptr);
void standin_reset_counts();

namespace standin {

// ---------------------------------------------------------------------------------------------------------------------
// Launches: translate.py writes kernel<<<grid, block, shared, stream>>>(arguments) as
//     standin::Launch("kernel", STANDIN_ADDRESS(kernel), grid, block, shared, stream)(
//         [=](const auto&... a) { kernel(a...); }, arguments)

struct Launch {
    const char* name;
    const void* kernel;  // null if unknown: the kernel's template arguments are deduced from its arguments
    dim3 grid, block;
    size_t shared;       // bytes of dynamic shared memory

    Launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = 0)
        : name(name), kernel(kernel), grid(grid), block(block), shared(shared) {}

    // Arguments come by value: they are evaluated and copied now, as a launch does, even if the kernel runs later.
    template <class Kernel, class... Arguments> void operator()(Kernel call, Arguments... arguments) const {
        if (!valid()) return;
        int n = 0;
        (check_argument(++n, arguments), ...);
        Launch launch = *this;
        submit([=] {
            auto thread = [&] { call(arguments...); };
            launch.run([](const void* t) { (*(const decltype(thread)*)t)(); }, &thread);
        });
    }
    bool valid() const;                                       // else sets the error of cudaGetLastError
    void check_pointer(int number, const void* p) const;      // kernels must not be given the host's memory
    template <class T> void check_argument(int number, const T& value) const {
        if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>)
            check_pointer(number, (const void*)value);
    }
    void run(void (*call)(const void*), const void*) const;   // call(argument) in every thread of the grid
    static void submit(std::function<void()> work);           // now, or when the program waits for the device
};

template <class, class... P> const void* address_of(void (*kernel)(P...)) { return (const void*)kernel; }
template <class F> const void* address_if_known(F f) {
    if constexpr (std::is_invocable_v<F, int>) return f(0);
    else return nullptr;
}
#define STANDIN_ADDRESS(...) standin::address_if_known( \
    [=](auto x) -> decltype(standin::address_of<decltype(x)>(__VA_ARGS__)) { \
        return standin::address_of<decltype(x)>(__VA_ARGS__); })

// ---------------------------------------------------------------------------------------------------------------------
// What a running thread asks of the scheduler (standin.cpp)

// A warp's lanes as sets of bits: those that can run, and those that wait for the block or for other lanes.
struct Warp {
    unsigned lanes, alive, ready, at_barrier, at_operation;
    // of the lanes in at_operation: the lanes each waits for, which operation it is, and its operands
    unsigned masks[32];
    const void* operations[32];
    void* operands[32];
};

constexpr size_t SHARED_SPACE = 256 << 10;  // the address space of shared memory, of which 227 KB can be used
struct Running {                            // what runs on this CPU thread
    Warp* warp = nullptr;
    int thread = 0, lane = 0;               // number within the block, within the warp
    char* shared = nullptr;                 // the block's shared memory
    char* dynamic_shared = nullptr;
};
extern __thread Running running;
extern const int lazy;                      // STANDIN_LAZY

// Reports a defect, with the kernel and the thread that runs, and aborts.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(const char* file, int line, int id);
bool arrive(unsigned mask, void* operands, const void* operation);
void release(unsigned mask);
void launch_bounds(int threads);

// The lanes in `mask` meet. When the last has arrived it calls finish(mask, the lanes' operands), of which only those
// of the lanes in mask are there, and all go on. Every operation between lanes is built on this one.
template <class Operands, class Finish> inline void meet(unsigned mask, Operands& mine, Finish finish) {
    static const char operation = 0;        // its address tells operations apart
    mask &= running.warp->lanes;
    if (!arrive(mask, &mine, &operation)) return;
    finish(mask, (Operands* const*)running.warp->operands);
    release(mask);
}

// The same for operations of a whole warp
template <class Operands, class Finish> inline void meet_all(Operands& mine, Finish finish) {
    if (~running.warp->lanes) fail("a matrix instruction in a warp of less than 32 threads");
    meet(0xffffffffu, mine, [finish](unsigned, Operands* const* lanes) { finish(lanes); });
}

// A variable in shared memory: each block gets it at the first thread's first sight of the declaration.
struct SharedVariable { long block; void* at; };
void* new_shared_variable(SharedVariable* variable, size_t bytes, size_t alignment);
extern __thread long block_number;          // counts the blocks that this CPU thread has run
inline void* shared_variable(SharedVariable* variable, size_t bytes, size_t alignment) {
    return variable->block == block_number ? variable->at : new_shared_variable(variable, bytes, alignment);
}
inline void* dynamic_shared() { return running.dynamic_shared; }

// The offset of a pointer into shared memory, as a shared-memory address.
inline unsigned shared_offset(const void* p) {
    size_t offset = (const char*)p - running.shared;
    if (offset >= SHARED_SPACE) fail("%p is not an address in shared memory", p);
    return (unsigned)offset;
}

// Asynchronous work (STANDIN_LAZY), and the matrix instructions
void queue_copy(void* to, const void* from, bool wanted);
void commit_copies();
void wait_for_copies(int groups);
void mma_16_8_16(float* const d[32], const unsigned* const a[32], const unsigned* const b[32]);
void wgmma(int n, bool transposed_a, bool transposed_b, float* const d[32], uint64_t a, uint64_t b);
void commit_wgmma();
void wait_for_wgmma(int groups);

}  // namespace standin

// ---------------------------------------------------------------------------------------------------------------------
// Barriers, and operations between the lanes of a warp

#define __syncthreads() standin::barrier(__FILE__, __LINE__, __COUNTER__)

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    char none;
    standin::meet(mask, none, [](unsigned, char* const*) {});
}

namespace standin {
// Each lane of mask gets the value of lane `source`; an undefined one (all bits set) if that lane takes no part.
template <class T> inline T shuffle(unsigned mask, T value, int source) {
    struct Operands { T value, result; int source; } mine{value, value, source};
    meet(mask, mine, [](unsigned mask, Operands* const* lanes) {
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) {
                int from = lanes[l]->source & 31;
                if (mask >> from & 1) lanes[l]->result = lanes[from]->value;
                else memset((void*)&lanes[l]->result, 0xff, sizeof(T));
            }
    });
    return mine.result;
}
}  // namespace standin

// `width` splits the warp into groups of that many lanes, a power of two; a source outside of the group means itself.
template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    int lane = standin::running.lane;
    return standin::shuffle(mask, value, (lane & -width) | (source & (width - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int lane = standin::running.lane, source = lane ^ bits;
    return standin::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    int lane = standin::running.lane, place = lane & (width - 1);
    return standin::shuffle(mask, value, (int)distance <= place ? lane - (int)distance : lane);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    int lane = standin::running.lane, place = lane & (width - 1);
    return standin::shuffle(mask, value, place + (int)distance < width ? lane + (int)distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    struct Operands { int predicate; unsigned result; } mine{predicate, 0};
    standin::meet(mask, mine, [](unsigned mask, Operands* const* lanes) {
        unsigned result = 0;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1 && lanes[l]->predicate) result |= 1u << l;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) lanes[l]->result = result;
    });
    return mine.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// The lanes that have the same value as this one
template <class T> inline unsigned __match_any_sync(unsigned mask, T value) {
    struct Operands { T value; unsigned result; } mine{value, 0};
    standin::meet(mask, mine, [](unsigned mask, Operands* const* lanes) {
        for (int l = 0; l < 32; l++)
            for (int k = 0; k < 32; k++)
                if (mask >> l & mask >> k & 1 && !memcmp(&lanes[l]->value, &lanes[k]->value, sizeof(T)))
                    lanes[l]->result |= 1u << k;
    });
    return mine.result;
}

namespace standin {
template <class T, class F> inline T reduce(unsigned mask, T value, F f) {
    struct Operands { T value; } mine{value};
    meet(mask, mine, [f](unsigned mask, Operands* const* lanes) {
        T result = lanes[__builtin_ctz(mask)]->value;
        for (int l = __builtin_ctz(mask) + 1; l < 32; l++)
            if (mask >> l & 1) result = f(result, lanes[l]->value);
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) lanes[l]->value = result;
    });
    return mine.value;
}
}  // namespace standin
// integers only, as on the GPU
template <class T> inline T __reduce_add_sync(unsigned mask, T x) {
    static_assert(std::is_integral_v<T>);
    return standin::reduce(mask, x, [](T a, T b) { return (T)(a + b); });
}
template <class T> inline T __reduce_max_sync(unsigned mask, T x) {
    static_assert(std::is_integral_v<T>);
    return standin::reduce(mask, x, [](T a, T b) { return a > b ? a : b; });
}
template <class T> inline T __reduce_min_sync(unsigned mask, T x) {
    static_assert(std::is_integral_v<T>);
    return standin::reduce(mask, x, [](T a, T b) { return a < b ? a : b; });
}

// The lanes of a warp may be apart here at any time; those that are running together is an answer we do not have.
inline unsigned __activemask() { standin::fail("__activemask: pass the mask that the program means"); }

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
inline void __trap() { standin::fail("__trap()"); }

// ---------------------------------------------------------------------------------------------------------------------
// Atomic operations: on integers only, because a sum of floats would depend on the order

template <class T> using standin_same = std::common_type_t<T>;  // a parameter that takes no part in deducing T
template <class T> inline T atomicAdd(T* p, standin_same<T> x) {
    static_assert(std::is_integral_v<T>, "the sum of floats would depend on the order of threads");
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <class T> inline T atomicSub(T* p, standin_same<T> x) {
    static_assert(std::is_integral_v<T>, "the sum of floats would depend on the order of threads");
    return __atomic_fetch_sub(p, x, __ATOMIC_RELAXED);
}
template <class T> inline T atomicOr(T* p, standin_same<T> x) { return __atomic_fetch_or(p, x, __ATOMIC_RELAXED); }
template <class T> inline T atomicAnd(T* p, standin_same<T> x) { return __atomic_fetch_and(p, x, __ATOMIC_RELAXED); }
template <class T> inline T atomicXor(T* p, standin_same<T> x) { return __atomic_fetch_xor(p, x, __ATOMIC_RELAXED); }
template <class T> inline T atomicExch(T* p, standin_same<T> x) {
    static_assert(std::is_integral_v<T>);
    return __atomic_exchange_n(p, x, __ATOMIC_RELAXED);
}
template <class T> inline T atomicCAS(T* p, standin_same<T> expected, standin_same<T> x) {
    static_assert(std::is_integral_v<T>);
    __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <class T> inline T atomicMax(T* p, standin_same<T> x) {
    static_assert(std::is_integral_v<T>);
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < x && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
template <class T> inline T atomicMin(T* p, standin_same<T> x) {
    static_assert(std::is_integral_v<T>);
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (x < old && !__atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic and memory access that C++ has no names for. The fast versions are exact here.

#define __expf(x) expf(x)      // macros, because the C library has functions of these names
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __exp2f(x) exp2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }

template <class To, class From> inline To standin_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}
inline int __float_as_int(float x) { return standin_bits<int>(x); }
inline float __int_as_float(int x) { return standin_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return standin_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return standin_bits<float>(x); }

template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// accesses with a hint for the caches
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, standin_same<T> x) { *p = x; }
template <class T> inline void __stcg(T* p, standin_same<T> x) { *p = x; }

// ---------------------------------------------------------------------------------------------------------------------
// Instructions that a .cu file writes in assembly, in small functions which it hides from the stand-in under
// #ifdef __CUDACC__. These are their twins.

inline unsigned shared_address(const void* p) { return standin::shared_offset(p); }

// cp.async: 16 bytes from global to shared memory; zeros if !wanted. With STANDIN_LAZY & 1 the copy happens as late as
// the waits allow, else at once: a correct kernel cannot tell.
inline void cp_async_16(void* to, const void* from, bool wanted) {
    if (standin::shared_offset(to) % 16) standin::fail("cp.async to %p, which is not a multiple of 16 bytes", to);
    if ((uintptr_t)from % 16) standin::fail("cp.async from %p, which is not a multiple of 16 bytes", from);
    if (standin::lazy & 1) standin::queue_copy(to, from, wanted);
    else if (wanted) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
inline void cp_async_commit() {
    if (standin::lazy & 1) standin::commit_copies();
}
template <int N> inline void cp_async_wait() {
    if (standin::lazy & 1) standin::wait_for_copies(N);
}

// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix the numbers (l / 4,
// 2 (l % 4)) and the one to its right; TRANSPOSED: of each matrix's transpose.
template <bool TRANSPOSED> inline void ldmatrix_x4(unsigned r[4], const void* row) {
    struct Operands { const uint16_t* row; unsigned* r; } mine{(const uint16_t*)row, r};
    if (standin::shared_offset(row) % 16) standin::fail("ldmatrix from %p, which is not a multiple of 16 bytes", row);
    standin::meet_all(mine, [](Operands* const* lanes) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) {
                int i = l / 4, j = l % 4 * 2;
                unsigned low = TRANSPOSED ? lanes[m * 8 + j]->row[i] : lanes[m * 8 + i]->row[j];
                unsigned high = TRANSPOSED ? lanes[m * 8 + j + 1]->row[i] : lanes[m * 8 + i]->row[j + 1];
                lanes[l]->r[m] = low | high << 16;
            }
    });
}

// mma.sync: d (16 x 8) += a (16 x 16) b (16 x 8)
inline void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
    struct Operands { float* d; const unsigned *a, *b; } mine{d, a, b};
    standin::meet_all(mine, [](Operands* const* lanes) {
        float* d[32];
        const unsigned *a[32], *b[32];
        for (int l = 0; l < 32; l++) d[l] = lanes[l]->d, a[l] = lanes[l]->a, b[l] = lanes[l]->b;
        standin::mma_16_8_16(d, a, b);
    });
}

// wgmma: d (64 x N) += A (64 x 16) B (16 x N), A and B in shared memory with the 128-byte swizzle; a transposed
// operand lies with its row (A) or column (B) index contiguous, else k is. With STANDIN_LAZY & 2 it reads its operands
// and writes d as late as the waits allow, else at once.
inline void fence_async_proxy() {}
inline void wgmma_fence() {}
template <int N, int TRANSPOSED_A, int TRANSPOSED_B> inline void wgmma_bf16(float* d, uint64_t a, uint64_t b) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    struct Operands { float* d; uint64_t a, b; } mine{d, a, b};
    standin::meet_all(mine, [](Operands* const* lanes) {
        float* d[32];
        for (int l = 0; l < 32; l++) {
            d[l] = lanes[l]->d;
            if (lanes[l]->a != lanes[0]->a || lanes[l]->b != lanes[0]->b)
                standin::fail("wgmma: lanes 0 and %d have different descriptors", l);
        }
        standin::wgmma(N, TRANSPOSED_A, TRANSPOSED_B, d, lanes[0]->a, lanes[0]->b);
    });
}
inline void wgmma_commit() {
    char none;
    standin::meet_all(none, [](char* const*) { standin::commit_wgmma(); });
}
template <int N> inline void wgmma_wait() {
    char none;
    standin::meet_all(none, [](char* const*) { standin::wait_for_wgmma(N); });
}

// The C++ overload that nvcc brings along
template <class... P> inline cudaError_t cudaFuncSetAttribute(void (*f)(P...), cudaFuncAttribute a, int value) {
    return cudaFuncSetAttribute((const void*)f, a, value);
}

// ---------------------------------------------------------------------------------------------------------------------
// For cublas.cpp: what a library that runs on the device needs

namespace standin {

int cpu_threads();                               // STANDIN_THREADS
void count_launch(const char* name);
void add_time(const char* name, double ms);
double now_ms();
bool on_device(const void* p, size_t bytes);     // all of it lies in one allocation that the device can reach

// Says on stderr what is wrong with a call, and makes `error` what cudaGetLastError answers. A program that ends
// without having asked gets exit code 1.
cudaError_t refuse(cudaError_t error, const char* format, ...) __attribute__((format(printf, 2, 3)));

// With STANDIN_PROTECT, device memory can be touched only while one of these exists.
struct OpenMemory { OpenMemory(); ~OpenMemory(); };

}  // namespace standin
