// machine.h: what these sources ask of compilers and processors. What can be seen while compiling is refused there.
// Compiles alone.
#pragma once
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <unistd.h>
#include "vector_math.h"

#ifndef __GNUC__
#error "gcc or clang is needed, for their vector types (tested from gcc 11 and clang 13 on)"
#endif
#if LONG_MAX <= INT_MAX
#error "a 64-bit machine is needed: sizes of files and of models are counted in `long`, which has only 4 bytes here"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a little-endian machine is needed: the numbers of safetensors files are read as they lie there"
#endif
// -Ofast, -ffast-math and what they stand for; gcc says with __GCC_IEC_559 == 0 that some such flag is there
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0)
#error "flags that change values (-Ofast, -ffast-math, ...) make every result wrong: use -O3, icx -fp-model=precise"
#endif

// The same for flags that leave no trace in macros (clang's -fassociative-math, say). Returns 1 if arithmetic is exact:
// nothing is reordered (which takes away the rounding, fast_exp's too), a division is one, infinities are seen, small
// numbers are not 0.
static int arithmetic_holds(void) {
    volatile float one = 1, five = 5, third = 1.0f / 3, infinite = INFINITY, small = 1e-38f;
    float e = fast_exp(one), rounded = (third + 12582912.0f) - 12582912.0f, ratio = five / 49.0f;
    return ratio == 0x1.a1f58ep-4f && e > 2.71828f && e < 2.71829f && rounded == 0 && !isfinite(infinite) &&
           small * 0.5f > 0;
}

// A processor without an instruction that the compiler chose (-march=native on another machine) stops the program with
// SIGILL. The handler is set before main, and both functions are too short for such instructions.
static void refuse_processor(int number) {
    static const char line[] = "this processor lacks instructions of the one that the program was built for: build it "
                               "here (make clean, make), or with make ARCH=... for the oldest one it is to run on\n";
    (void)number;
    if (write(2, line, sizeof line - 1) < 0) _exit(2);
    _exit(1);
}

__attribute__((constructor)) static void watch_for_foreign_processors(void) { signal(SIGILL, refuse_processor); }
