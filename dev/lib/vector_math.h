// vector_math.h: e^x and the largest of many numbers, in loops that become vector code. Compiles alone.
#pragma once
#include <stdint.h>

// e^x with a relative error below 2e-7 and no library call, so that the loops around it become vector code. x is split
// into n ln 2 + r, |r| <= ln 2 / 2: e^r by its Taylor series, 2^n by writing n into the exponent's bits. Below -87 the
// result is e^-87 = 1.6e-38, which is 0 beside anything that it is added to here.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;            // adding 1.5 2^23 rounds to an integer
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;              // ln 2 in two parts: the first product is exact
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { uint32_t bits; float value; } power;
    power.bits = ((uint32_t)(int32_t)n + 127u) << 23;
    return p * power.value;
}

// The largest of n numbers: 16 running maxima become vector code, one would wait for itself at each step.
static float max_of(const float* x, long n) {
    float lanes[16], max;
    for (int j = 0; j < 16; j++) lanes[j] = x[0];
    long i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (; i < n; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    max = lanes[0];
    for (int j = 1; j < 16; j++) max = lanes[j] > max ? lanes[j] : max;
    return max;
}

// The sum of n squares: short sums in floats, side by side as vectors; their total in doubles.
static double sum_of_block(const float* x, long n) {
    enum { LANES = 64 };
    double sum = 0;
    long i = 0;
    while (i < n) {
        float lanes[LANES] = {0};
        for (long stop = i + 64 * LANES; i + LANES <= n && i < stop; i += LANES)
            for (int k = 0; k < LANES; k++) lanes[k] += x[i + k] * x[i + k];
        for (int k = 0; k < LANES; k++) sum += lanes[k];
        if (n - i < LANES)
            for (; i < n; i++) sum += (double)x[i] * x[i];
    }
    return sum;
}
