// bf16.h: products of bf16 numbers, which have 8 significant bits (--precision bf16). Compiles alone.
#pragma once
#include <stdint.h>

// 1: products round their operands to bf16 and add as section 2 of train_moe.c says
static int bf16_products = 0;

// The bits of an fp32 number, rounded to the nearest bf16 number, ties to even: the upper half of the word, the lower
// is zero. A NaN is made a quiet one instead, as a carry could reach its sign. For words and vectors of them.
#define NAN_MASK(bits) (0u - ((((bits) & 0x7FFFFFFFu) + 0x7FFFFFu) >> 31))
#define ROUND_TO_BF16(bits) \
    ((((bits) + ((0x7FFFu + ((bits) >> 16 & 1u)) & ~NAN_MASK(bits))) | (NAN_MASK(bits) & 0x400000u)) & 0xFFFF0000u)

// The bits of an fp32 number, zero of its sign if it is below 2^-126: if its exponent is zero.
#define FLUSHED_BITS(bits) ((bits) & (0x80000000u | (0u - ((((bits) & 0x7F800000u) + 0x7F800000u) >> 31))))

// An operand of a product in bf16: below 2^-126 it is zero before it is rounded (VCVTNEPS2BF16), even if it would be
// rounded up to 2^-126.
#define BF16_OPERAND(bits) ROUND_TO_BF16(FLUSHED_BITS(bits))

static inline float bf16_operand(float x) {
    union { float value; uint32_t bits; } u;
    u.value = x;
    u.bits = BF16_OPERAND(u.bits);
    return u.value;
}

// How this thread computes with numbers below 2^-126: with FLUSH_DENORMALS among the bits, operands and results count
// as zero, as in VDPBF16PS. (x86's MXCSR: DAZ and FTZ; ARM's FPCR: FZ. Other processors are left as they are.)
#if defined(__x86_64__)
#define FLUSH_DENORMALS 0x8040u
#define GET_MODE(mode) __asm__ volatile("stmxcsr %0" : "=m"(mode) : : "memory")
#define SET_MODE(mode) __asm__ volatile("ldmxcsr %0" : : "m"(mode) : "memory")
typedef uint32_t FloatMode;
#elif defined(__aarch64__)
#define FLUSH_DENORMALS (1u << 24)
#define GET_MODE(mode) __asm__ volatile("mrs %0, fpcr" : "=r"(mode) : : "memory")
#define SET_MODE(mode) __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory")
typedef uint64_t FloatMode;
#else
#define FLUSH_DENORMALS 0u
#define GET_MODE(mode) (void)(mode)
#define SET_MODE(mode) (void)(mode)
typedef uint32_t FloatMode;
#endif

// Sets these bits and returns what was there before, for restore_mode. What lies between is ordered by its memory:
// operands are read after the first, results are stored before the second.
static inline FloatMode flush_denormals(void) {
    FloatMode before = 0, now;
    GET_MODE(before);
    now = before | FLUSH_DENORMALS;
    SET_MODE(now);
    return before;
}

static inline void restore_mode(FloatMode mode) { SET_MODE(mode); }
