// random.h: random numbers that are hashes of what they are for. Compiles alone.
//
// There is no generator with a state: every draw is a hash of what it is for (the seed, the tensor, the element). So
// the same seed gives the same numbers in any order, on any number of threads, and after a resume.
#pragma once
#include "util.h"

// splitmix64's output function (Steele, Lea, Flood 2014): a bijection of 64 bits in which every input bit matters.
ALSO_ON_GPU static uint64_t mix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

ALSO_ON_GPU static uint64_t random_key(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    return mix64(mix64(mix64(mix64(a) ^ b) ^ c) ^ d);
}

// uniform in (0, 1), from the upper 24 bits
ALSO_ON_GPU static inline double random_uniform(uint64_t key) { return ((double)(int)(key >> 40) + 0.5) / 16777216.0; }

// ln u for u in (0, 1). u = m 2^e with m in [1/sqrt 2, sqrt 2), and ln m = 2 artanh t, t = (m - 1) / (m + 1), by its
// series: |t| < .172, so that what is left out after t^19 is below 1e-17.
ALSO_ON_GPU static inline double unit_log(double u) {
    union { double value; uint64_t bits; } x;
    x.value = u;
    int e = (int)(x.bits >> 52) - 1023;
    x.bits = (x.bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    int halve = x.value > 1.4142135623730951;
    double m = halve ? x.value * 0.5 : x.value, t = (m - 1) / (m + 1), t2 = t * t, p = 2.0 / 19;
    p = p * t2 + 2.0 / 17;
    p = p * t2 + 2.0 / 15;
    p = p * t2 + 2.0 / 13;
    p = p * t2 + 2.0 / 11;
    p = p * t2 + 2.0 / 9;
    p = p * t2 + 2.0 / 7;
    p = p * t2 + 2.0 / 5;
    p = p * t2 + 2.0 / 3;
    p = p * t2 + 2.0;
    return (e + halve) * 0.69314718055994530942 + t * p;
}

// cos(2 pi u) for u in (0, 1): sin x, x = 2 pi (|u - 1/2| - 1/4), by its Taylor series up to x^19
ALSO_ON_GPU static inline double unit_cos(double u) {
    double x = (fabs(u - 0.5) - 0.25) * 6.283185307179586477, x2 = x * x, p = -1.0 / 121645100408832000;
    p = p * x2 + 1.0 / 355687428096000;
    p = p * x2 - 1.0 / 1307674368000;
    p = p * x2 + 1.0 / 6227020800;
    p = p * x2 - 1.0 / 39916800;
    p = p * x2 + 1.0 / 362880;
    p = p * x2 - 1.0 / 5040;
    p = p * x2 + 1.0 / 120;
    p = p * x2 - 1.0 / 6;
    return x + x * x2 * p;
}

// N(0, 1) by Box and Muller. With the library's log and cos a loop of draws could not become vector code and would take
// ten times as long.
ALSO_ON_GPU static inline double random_normal(uint64_t key) {
    return sqrt(-2.0 * unit_log(random_uniform(key))) * unit_cos(random_uniform(mix64(key)));
}

// FNV-1a: names a stream of random numbers after a tensor
static uint64_t hash_string(const char* s) {
    uint64_t h = 0xCBF29CE484222325ull;
    for (; *s; s++) h = (h ^ (unsigned char)*s) * 0x100000001B3ull;
    return h;
}

// Element i of a random permutation of 0..n-1. A Feistel network with four rounds permutes 0..2^(2 half)-1 >= n;
// results of n and more are sent round again until they fall inside. Nothing is stored, whatever n.
static long random_permutation(long i, long n, uint64_t key) {
    int half = 1;
    while ((1L << (2 * half)) < n) half++;
    uint64_t mask = (1ull << half) - 1, left, right;
    do {
        left = (uint64_t)i >> half;
        right = (uint64_t)i & mask;
        for (int round = 0; round < 4; round++) {
            uint64_t next = left ^ (mix64(key ^ (right * 4 + round)) & mask);
            left = right;
            right = next;
        }
        i = (long)(left << half | right);
    } while (i >= n);
    return i;
}
