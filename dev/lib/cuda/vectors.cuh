// vectors.cuh: neighbouring numbers in one access of memory, and whether pointers allow that. Needs to_float and store
// of train_moe.cu.
#pragma once

// W neighbouring numbers as floats, from and to memory. Either W = 1, or W numbers fill accesses of 16 bytes, the
// widest that a thread can make, and p is a multiple of 16.
template <int W, class T> __device__ static inline void load_vector(float* x, const T* p) {
    if constexpr (W == 1) {
        x[0] = to_float(p[0]);
    } else {
        const int each = 16 / sizeof(T);
        #pragma unroll
        for (int i = 0; i < W; i += each) {
            uint4 bits = *(const uint4*)(p + i);
            T numbers[each];
            memcpy(numbers, &bits, 16);
            #pragma unroll
            for (int j = 0; j < each; j++) x[i + j] = to_float(numbers[j]);
        }
    }
}

template <int W, class T> __device__ static inline void store_vector(T* p, const float* x) {
    if constexpr (W == 1) {
        store(p, x[0]);
    } else {
        const int each = 16 / sizeof(T);
        #pragma unroll
        for (int i = 0; i < W; i += each) {
            uint4 bits;
            T numbers[each];
            #pragma unroll
            for (int j = 0; j < each; j++) store(&numbers[j], x[i + j]);
            memcpy(&bits, numbers, 16);
            *(uint4*)(p + i) = bits;
        }
    }
}

__device__ static inline unsigned pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(unsigned*)&pair;
}

// 1: all pointers are multiples of 16 (NULL is)
static inline int aligned_16() { return 1; }
template <class P, class... Q> static inline int aligned_16(P p, Q... others) {
    return (uintptr_t)p % 16 == 0 && aligned_16(others...);
}

// Four neighbouring numbers, of which the first `count` exist; in one access if `vector`. That access may come well
// before its use: fetch4, then load4 with what it fetched.
template <class T> struct alignas(4 * sizeof(T)) Four { T x[4]; };
template <class T> __device__ static inline void fetch4(Four<T>* four, const T* p, int count, bool vector) {
    if (vector && count >= 4) *four = *(const Four<T>*)p;
}
template <class T>
__device__ static inline void load4(float v[4], const Four<T>& four, const T* p, int count, bool vector) {
    #pragma unroll
    for (int j = 0; j < 4; j++) v[j] = count <= j ? 0.0f : to_float(vector ? four.x[j] : p[j]);
}
template <class T> __device__ static inline void load4(float v[4], const T* p, int count, bool vector) {
    Four<T> four;
    fetch4(&four, p, count, vector);
    load4(v, four, p, count, vector);
}
template <class T> __device__ static inline void store4(T* p, const float v[4], int count, bool vector) {
    Four<T> four;
    #pragma unroll
    for (int j = 0; j < 4; j++) store(&four.x[j], v[j]);
    if (vector && count >= 4) *(Four<T>*)p = four;
    #pragma unroll
    for (int j = 0; j < 4; j++)
        if (!vector && j < count) p[j] = four.x[j];
}
// May rows of `width` numbers of T at p be accessed by fours? Then all fours are whole or entirely outside.
template <class T> static bool by_fours(const T* p, int width) {
    return (uintptr_t)p % (4 * sizeof(T)) == 0 && width % 4 == 0;
}
