/*
train_moe.c: a complete mixture-of-experts GPT in one C file.

It trains, evaluates and samples Llama, Mistral, Mixtral, OLMoE, Qwen3, Qwen3-MoE and Dots1 models on a CPU in fp32,
reads and writes their Hugging Face directories, and needs a C compiler and nothing else. Every forward pass is followed
by its backward pass, written by hand. Read it from top to bottom; where something of a later section is met, the
section is named:

     1  Configuration        what a model is: a dozen numbers
     2  Random numbers       counter-based, so that results do not depend on the number of threads
     3  Matrix products      y = x W^T and its two gradients, also for many experts at once
     4  Layers               embedding, RMSNorm, rotary positions, attention, SwiGLU, cross-entropy
     5  Mixture of experts   top-K routing, grouping tokens by expert, balance losses
     6  The model            parameters, activations, forward, backward, AdamW
     7  Data                 text and token shards, in an order that is a function of the step
     8  Training loop        learning rate, accumulation, validation, logs

To be skipped on first reading:

     9  Router variants      sigmoid with a balancing bias, logit norm, families of copies, LPR; what the experts do
    10  JSON                 a small strict parser
    11  safetensors          reading and writing tensors, with every check that a hostile file needs
    12  Checkpoints          Hugging Face directories; saves that survive kill -9
    13  Sampling             generation with a key/value cache
    14  Command line         one table of options

Dimension letters, the same everywhere:
    B  sequences in a batch         H   hidden size                     E  experts in a layer
    T  positions in a sequence      I   width of an expert (or FFN)     K  experts that each token uses
    N  tokens in a batch, B T       NH  attention heads                 V  vocabulary
    L  layers                       NKV key/value heads, HD head size
Arrays are row-major and written with the outermost dimension first: (N, H) is N rows of H floats. `dx` is the gradient
of the loss with respect to `x`. Functions write their first arguments and read the others.

The file is also a library: upcycle.c and test_moe.c define TRAIN_MOE_NO_MAIN and include it. It is written in the
common subset of C11 (with gcc's vector types) and C++17, because the CUDA compiler reads it as C++.
*/
#ifndef TRAIN_MOE_C
#define TRAIN_MOE_C
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
enum { ARRAY_GAP = 64 };        // bytes between arrays, which nothing may touch
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes)
enum { ARRAY_GAP = 0 };
#endif

#define VERSION "0.1"

// The CUDA compiler reads this file as part of train_moe.cu, whose kernels draw the same random numbers.
#ifdef __CUDACC__
#define ALSO_ON_GPU __host__ __device__
#else
#define ALSO_ON_GPU
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Small helpers

static const char* program_name = "train_moe";

// Bad input ends the program with one line and exit code 2 (the user's to mend), a failure while running with 1.
#if defined(__GNUC__)
__attribute__((noreturn, format(printf, 2, 3)))
#endif
static void die(int code, const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "%s: ", program_name);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(code);
}

static void* checked_malloc(size_t bytes) {
    void* p = malloc(bytes ? bytes : 1);
    if (!p) die(1, "out of memory: %zu bytes wanted", bytes);
    return p;
}

static char* copy_string(const char* s) {
    char* p = (char*)checked_malloc(strlen(s) + 1);
    strcpy(p, s);
    return p;
}

// "dir/name" in `path`, which has room for PATH_SIZE bytes
enum { PATH_SIZE = 4096 };
static const char* join_path(char* path, const char* dir, const char* name) {
    size_t n = strlen(dir), k = strlen(name);
    if (n + k + 2 > PATH_SIZE) die(2, "the path %.60s.../%s is too long", dir, name);
    memcpy(path, dir, n);
    path[n] = '/';
    memcpy(path + n + 1, name, k + 1);
    return path;
}

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }
static long lmin(long a, long b) { return a < b ? a : b; }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

#ifdef _OPENMP
static int thread_count(void) { return omp_get_max_threads(); }
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_count(void) { return 1; }
static int thread_number(void) { return 0; }
#endif

// Work for all threads, in units that take unequal time: OpenMP's dynamic schedule, but with regard to where rows lie
// (to be skipped on first reading). Loops over tokens give the threads contiguous shares of the rows (OpenMP's static
// schedule), and units are dealt out likewise: a thread first does those of its own share, whose rows are in its own
// cache, and then helps the others. (With units for whoever was free, a step of a small model took 4 % longer where the
// cores did not share a cache.)
enum { MOST_SHARES = 256 };     // beyond that, threads share shares
typedef struct {
    struct { int next, end, unused[14]; } share[MOST_SHARES];           // no two in one line of the cache
    int shares;
} Work;

static void work_begin(Work* w) {
    w->shares = imin(thread_count(), MOST_SHARES);
    for (int s = 0; s < w->shares; s++) w->share[s].next = w->share[s].end = 0;
}

// Adds the next unit, with its position among the rows, 0 to 1. Units are added in order, from number 0 on, and
// positions do not decrease.
static void work_add(Work* w, int unit, double position) {
    int s = imin((int)(position * w->shares), w->shares - 1);
    if (w->share[s].end == 0) w->share[s].next = unit;
    w->share[s].end = unit + 1;
}

// Units 0 .. units - 1 that are spread evenly (attention: sequences, then heads).
static void work_deal(Work* w, int units) {
    work_begin(w);
    for (int unit = 0; unit < units; unit++) work_add(w, unit, (unit + 0.5) / units);
}

// A unit for this thread, or -1 if all are taken. `helped`, 0 at first, is how many shares it is through with.
static int work_take(Work* w, int* helped) {
    for (; *helped < w->shares; ++*helped) {
        int s = (thread_number() + *helped) % w->shares, unit;
        #pragma omp atomic capture
        unit = w->share[s].next++;
        if (unit < w->share[s].end) return unit;
    }
    return -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. Configuration
//
// One block, repeated L times, with few switches (x is a row of H numbers, one per token):
//
//     x += Wo attention( rope(qknorm(Wq n1(x))), rope(qknorm(Wk n1(x))), Wv n1(x) )        causal, grouped-query
//     x += sum over the token's K experts e of  gate_e  f_e(n2(x))                         f_e is a SwiGLU network
//
// n1, n2 are RMSNorms. A dense layer is a layer with one expert whose gate is 1: there is one code path.

typedef enum { LLAMA, MISTRAL, MIXTRAL, OLMOE, QWEN3, QWEN3_MOE, DOTS1, NUM_ARCHS } Arch;    // the Hugging Face class
typedef enum { QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_ROW } QKNorm;    // none; each head; all heads of a token as one row
typedef enum { AUX_SWITCH, AUX_HF } AuxForm;                        // the two published balance losses, see section 5
typedef enum { ROUTER_SOFTMAX, ROUTER_SIGMOID, ROUTER_LPR } Router; // how experts are scored; the last two: section 9

#define MAX_LAYERS 512

typedef struct {
    Arch arch;
    int num_layers;                 // L
    int hidden_size;                // H
    int num_heads;                  // NH
    int num_kv_heads;               // NKV: every NH / NKV query heads share one key and value head
    int head_dim;                   // HD, even; NH HD need not be H
    int intermediate_size;          // width of the FFN of a dense layer
    int num_experts;                // E of a sparse layer; 0 for a dense model
    int num_experts_per_tok;        // K
    int moe_intermediate_size;      // I, the width of an expert
    int norm_topk_prob;             // 1: the K gates of a token are divided by their sum
    int vocab_size;                 // V
    int max_position_embeddings;    // the longest sequence that the model is meant for
    int sliding_window;             // 0, or the length beyond which the original would stop looking back
    QKNorm qk_norm;
    int tie_word_embeddings;        // 1: the LM head is the embedding
    double rope_theta;
    double rms_norm_eps;
    double router_aux_loss_coef;
    int topk_limit;                 // the largest K that training may draw for a layer, 0: num_experts_per_tok
    char sparse[MAX_LAYERS];        // 1: layer l is a mixture of experts, 0: it is dense
    char token_ids[3][256];         // bos, eos, pad as written in config.json, empty where absent
    // router variants, section 9; all zero with a softmax router
    Router router;
    double logit_norm;              // lambda of the logits' normalisation, 0: none
    double family_penalty;          // of the copies of an expert, INFINITY just after they were made, 0: none
    int lpr_latent_dim;             // D of Latent Prototype Routing, and the weights of its losses
    double lpr_weight, lpr_diversity, lpr_kl, lpr_align;
    int lpr_align_mean;
} Config;

static int layer_experts(const Config* c, int l) { return c->sparse[l] ? c->num_experts : 1; }
static int layer_topk(const Config* c, int l) { return c->sparse[l] ? c->num_experts_per_tok : 1; }
static int layer_width(const Config* c, int l) {
    return c->sparse[l] ? c->moe_intermediate_size : c->intermediate_size;
}
static int most_topk(const Config* c) {
    return c->topk_limit > c->num_experts_per_tok ? c->topk_limit : c->num_experts_per_tok;
}
static int qkv_width(const Config* c) { return (c->num_heads + 2 * c->num_kv_heads) * c->head_dim; }
static int has_router_variant(const Config* c) {
    return c->router != ROUTER_SOFTMAX || c->logit_norm > 0 || c->family_penalty > 0;
}
static int count_sparse(const Config* c) {
    int n = 0;
    for (int l = 0; l < c->num_layers; l++) n += c->sparse[l];
    return n;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Random numbers
//
// There is no generator with a state: every draw is a hash of what it is for (the seed, the tensor, the element). So
// the same seed gives the same numbers in any order, on any number of threads, and after a resume.

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

// ---------------------------------------------------------------------------------------------------------------------
// 3. Matrix products
//
// A linear layer needs three of them, all matrices row-major:
//     forward          y  = x W^T       y (rows, OC), x (rows, C), W (OC, C)
//     backward input   dx = dy W        dx (rows, C), or dx += dy W
//     backward weight  dW += dy^T x     dW (OC, C)
// All three are one product, result(i,j) = sum over k of left(i,k) * right(k,j): only the roles of i, j, k change. The
// six functions at the end of the section are what the rest of the file calls; on first reading, go on with those.
//
// Order of summation. Every element of a result is the plain loop
//     sum = 0 (or what the result held);  for k = 0, 1, 2, ...: sum = sum + left(i,k) * right(k,j)
// in just that order. Blocks, vectors and threads only decide which elements are computed when, and where a sum
// waits while it is unfinished. So bits never depend on the number of rows, threads or experts in the call, on the
// place of a row in the batch, or on the block sizes below: a token generated alone equals the same token in a batch.
//
// Speed. The innermost routine, multiply_tile, keeps TILE_ROWS x TILE_COLUMNS sums in registers. For each k it loads
// two vectors of `right`, and each number of `left` it broadcasts is used for two multiply-adds. Its operands are
// copies ("packed"), made just before use in the order in which the tile reads them, small enough for the caches,
// except where they lie that way already, or where each number would be used once or twice only.

#if !defined(__GNUC__) // plain C for compilers without vector types
#define VECTOR_LENGTH 1
#elif defined(__AVX512F__)
#define VECTOR_LENGTH 16
#elif defined(__AVX__)
#define VECTOR_LENGTH 8
#else
#define VECTOR_LENGTH 4 // SSE, NEON; other machines: the compiler splits vectors into what they have
#endif

#if VECTOR_LENGTH == 1
typedef float vector;
#define UNROLL
#define ALWAYS_INLINE static inline
#define PREFETCH(address)
#else
typedef float vector __attribute__((vector_size(4 * VECTOR_LENGTH), aligned(4), may_alias)); // any float's address
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address) // a hint to the cache: any address is allowed
#if defined(__CUDACC__)
#define UNROLL // unknown to nvcc's front end; the host compiler unrolls short loops by itself
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#endif

// gcc, tuning for some processors (seen for Zen 2 and Zen 3), splits the multiply-add into two roundings in a loop that
// adds to a single sum, but not in loops with several. That would break the promise above, so where there can be a
// single sum it is hidden from gcc: an empty piece of assembly "changes" it in its register.
#if VECTOR_LENGTH > 1 && defined(__x86_64__)
#define HIDE(sum) __asm__("" : "+v"(sum))
#elif VECTOR_LENGTH > 1 && defined(__aarch64__)
#define HIDE(sum) __asm__("" : "+w"(sum))
#else
#define HIDE(sum)
#endif

enum {
    TILE_VECTORS = 2,                            // vectors in a row of the tile; with one, see HIDE
    TILE_COLUMNS = TILE_VECTORS * VECTOR_LENGTH,
#if VECTOR_LENGTH == 16 || defined(__aarch64__)
    TILE_ROWS = 14,                              // 14*2 sums + 2 of right + 1 of left = 31 of 32 vector registers
    FEW_ROWS = 8,                                // 16 of W + 8 sums + some for the transpose
#else
    TILE_ROWS = 6,                               // 6*2 sums + 2 of right + 1 of left = 15 of 16 vector registers
    FEW_ROWS = 4,                                // 8 of W + 4 sums + some for the transpose
#endif
    // numbers of `left` stored for each k: TILE_ROWS rounded up to whole vectors
    LEFT_WIDTH = (TILE_ROWS + VECTOR_LENGTH - 1) / VECTOR_LENGTH * VECTOR_LENGTH,
    LINE = 16,                                   // floats in a line of the cache
    CHUNK = 256,                                 // most values of k done at a time, a multiple of LINE
    // most packed floats of `right`: one panel of TILE_COLUMNS columns for a whole chunk, or several for a shallow one.
    // With AVX-512 32 KB: on the processors measured `left` passes beside it through a first-level cache of 48 KB.
    RIGHT_FLOATS = CHUNK * TILE_COLUMNS,
    // most packed floats of `left`: 768 KB of the 1 to 2 MB of second-level cache that servers with AVX-512 have;
    // elsewhere 512 KB, which is faster than 256 KB with 1 MB of cache (it has not been measured with less)
    LEFT_FLOATS = VECTOR_LENGTH == 16 ? 3 << 16 : 1 << 17,
    // most rows and columns in a thread's unit of work: the rows of which one chunk can be packed (a tile is followed
    // by an empty line, see pack_left), and so few columns that the unit's part of the result is not far away in the
    // caches when the next pass over k adds to it
    UNIT_ROWS = LEFT_FLOATS / (CHUNK * LEFT_WIDTH + LINE) * TILE_ROWS,
    UNIT_COLUMNS = 1024,
    UNITS_A_THREAD = 4,                          // so many units that nobody waits long for the last one
    // a tile looks ahead (see Ahead) every STEP values of k, often enough for all its rows within a chunk; what it
    // asked for is copied COPY_DELAY values of k later, LOOK_ROWS rows each time
    STEP = TILE_ROWS == 14 ? 8 : 32,
    COPY_DELAY = 64,
    LOOK_ROWS = 2
};

ALWAYS_INLINE int blocks_of(int n, int size) { return (n + size - 1) / size; }

// Transposes a square of VECTOR_LENGTH vectors. One round interleaves vector i with vector i + VECTOR_LENGTH/2, as a
// perfect shuffle of cards; log2(VECTOR_LENGTH) rounds move every element to its place.
ALWAYS_INLINE void transpose(vector* r) {
#if VECTOR_LENGTH > 1
#if VECTOR_LENGTH == 16
#define LOW_HALVES  0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VECTOR_LENGTH == 8
#define LOW_HALVES  0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW_HALVES  0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
    vector t[VECTOR_LENGTH];
    UNROLL
    for (int half = 1; half < VECTOR_LENGTH; half *= 2) {
        UNROLL
        for (int i = 0; i < VECTOR_LENGTH / 2; i++) {
            t[2 * i] = __builtin_shufflevector(r[i], r[i + VECTOR_LENGTH / 2], LOW_HALVES);
            t[2 * i + 1] = __builtin_shufflevector(r[i], r[i + VECTOR_LENGTH / 2], HIGH_HALVES);
        }
        UNROLL
        for (int i = 0; i < VECTOR_LENGTH; i++) r[i] = t[i];
    }
#else
    (void)r;
#endif
}

// Copies packed[k*width + q] = source[q*q_step + k*k_step] for q < count, k < depth, and fills up with zeros to whole
// vectors. (Vectors beyond that, in a panel cut off, keep what they held: only columns that are thrown away see it.)
// One of the steps is 1: if it is k_step, squares are transposed.
ALWAYS_INLINE void pack(float* packed, const int width, const float* source, long q_step, long k_step, int count,
                        int depth) {
    for (int q = 0; q < count; q += VECTOR_LENGTH) {
        int valid = imin(VECTOR_LENGTH, count - q), k = 0;
        const float* s = source + q * q_step;
        float* p = packed + q;
        if (k_step == 1) {
            for (; k + VECTOR_LENGTH <= depth; k += VECTOR_LENGTH) {
                vector square[VECTOR_LENGTH], zero = {0};
                UNROLL
                for (int i = 0; i < VECTOR_LENGTH; i++)
                    square[i] = i < valid ? *(const vector*)(s + i * q_step + k) : zero;
                transpose(square);
                UNROLL
                for (int i = 0; i < VECTOR_LENGTH; i++) *(vector*)(p + (k + i) * width) = square[i];
            }
        } else if (valid == VECTOR_LENGTH) {
            for (; k < depth; k++) *(vector*)(p + k * width) = *(const vector*)(s + k * k_step);
        }
        for (; k < depth; k++) { // what is left over at the edges
            vector zero = {0};
            *(vector*)(p + k * width) = zero;
            for (int i = 0; i < valid; i++) p[k * width + i] = s[i * q_step + k * k_step];
        }
    }
}

// The first of the things in part i, if n things are cut into `parts` parts of about equal size.
ALWAYS_INLINE int part_begin(int i, int parts, int n) { return i * (n / parts) + imin(i, n % parts); }

// Packs all tiles of `left` for a chunk of k. Where the rows of a tile are contiguous (dy in backward weight, if it is
// packed at all, see multiply_unit), the source is read a whole row at a time, which is how processors foresee what
// comes: 3 times as fast as tile by tile. The writes then go to all tiles in turn. If tiles began a multiple of 4 KB
// apart, each write would land in the same set of the first-level cache; the empty line between tiles makes packing 4
// times as fast.
static void pack_left(float* packed, long tile_floats, const float* left, long left_i, long left_k, int rows, int tiles,
                      int depth) {
    int whole = 0; // tiles that can be read in full width, where rows are contiguous
    if (left_k != 1) {
        while (whole < tiles && part_begin(whole, tiles, rows) + LEFT_WIDTH <= rows) whole++;
        for (int k = 0; k < depth; k++) {
            for (int t = 0; t < whole; t++) {
                const float* s = left + k * left_k + part_begin(t, tiles, rows);
                PREFETCH(s + 4 * left_k); // brings up to 6 % in dW
                UNROLL
                for (int v = 0; v < LEFT_WIDTH; v += VECTOR_LENGTH) {
                    *(vector*)(packed + t * tile_floats + k * LEFT_WIDTH + v) = *(const vector*)(s + v);
                }
            }
        }
    }
    for (int t = whole; t < tiles; t++) {
        int i = part_begin(t, tiles, rows), width = imin(LEFT_WIDTH, rows - i); // full width is quicker than the tile's
        pack(packed + t * tile_floats, LEFT_WIDTH, left + i * left_i, left_i, left_k, width, depth);
    }
}

// What a tile does, between its multiplications, for what comes after it. Its loop leaves room for that, and nothing is
// waited for: without that, 5 to 15 % of a product's time would be spent waiting for numbers to come from memory.
typedef struct {
    // The tile of the result that comes next. Each look fetches `fetch_rows` of its rows to the cache; later looks copy
    // its first `copy_rows` rows to `buffer`, from where the next tile starts. If it started from its own place, and
    // rows were a multiple of 4 KB apart, it would have to wait for the stores of the tile above, since processors
    // cannot tell in time whether an address that is read has just been written (6 % at 1024 columns, 2 % at 512).
    const float* result;
    long result_step;
    int fetch_rows, copy_rows;
    float* buffer;
    // What will be packed or read next: `lines` more lines of the cache, of which each look fetches `fetch_lines`. A
    // run is `run_lines` lines that follow each other, source_step to the next; `line` lines of this run are done.
    const float* source;
    long source_step;
    int lines, fetch_lines, run_lines, line;
} Ahead;

ALWAYS_INLINE void look_ahead(Ahead* a, int k) {
    int look = k / STEP, fetch_row = look * a->fetch_rows, copy_row = (k - COPY_DELAY) / STEP * LOOK_ROWS;
    for (int n = imin(a->fetch_lines, a->lines); n > 0; n--) {
        PREFETCH(a->source + a->line * LINE);
        if (++a->line == a->run_lines) {
            a->line = 0;
            a->source += a->source_step;
        }
    }
    a->lines -= a->fetch_lines;
    for (int i = fetch_row; i < imin(TILE_ROWS, fetch_row + a->fetch_rows); i++) {
        PREFETCH(a->result + i * a->result_step);
        PREFETCH(a->result + i * a->result_step + TILE_COLUMNS - 1);
    }
    for (int i = imax(copy_row, 0); i < imin(a->copy_rows, copy_row + LOOK_ROWS); i++) {
        UNROLL
        for (int v = 0; v < TILE_COLUMNS; v += VECTOR_LENGTH) {
            *(vector*)(a->buffer + i * TILE_COLUMNS + v) = *(const vector*)(a->result + i * a->result_step + v);
        }
    }
}

// result(i,j) = start(i,j) + sum over k of left(i,k) * right(k,j), i < rows, j < TILE_COLUMNS; start may be NULL for
// zeros. left(i,k) = left[k*left_step + i] and right(k,j) = right[k*right_step + j], packed or where they are. `rows`
// is a constant wherever this is inlined, so that the sums live in registers.
ALWAYS_INLINE void multiply_tile(const int rows, float* result, long result_step, const float* start, long start_step,
                                 const float* left, long left_step, const float* right, long right_step, int depth,
                                 Ahead* ahead) {
    vector sum[TILE_ROWS][TILE_VECTORS], zero = {0};
    UNROLL
    for (int i = 0; i < rows; i++) {
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) {
            sum[i][v] = start ? *(const vector*)(start + i * start_step + v * VECTOR_LENGTH) : zero;
        }
    }
    for (int k = 0; k < depth; k += STEP) {
        look_ahead(ahead, k);
        for (int n = imin(STEP, depth - k); n > 0; n--) {
            vector r[TILE_VECTORS];
            UNROLL
            for (int v = 0; v < TILE_VECTORS; v++) r[v] = *(const vector*)(right + v * VECTOR_LENGTH);
            UNROLL
            for (int i = 0; i < rows; i++) {
                UNROLL
                for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] += left[i] * r[v];
            }
            left += left_step;
            right += right_step;
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        UNROLL
        for (int v = 0; v < TILE_VECTORS; v++) *(vector*)(result + i * result_step + v * VECTOR_LENGTH) = sum[i][v];
    }
}

// The same for any number of rows up to TILE_ROWS: each has compiled code of its own. (imin only keeps cases
// that cannot occur on machines with a smaller tile within the bounds of `sum`.)
static void multiply_rows(int rows, float* result, long result_step, const float* start, long start_step,
                          const float* left, long left_step, const float* right, long right_step, int depth,
                          Ahead* ahead) {
    switch (rows) {
#define TILE_CASE(n) \
        case n: multiply_tile(imin(n, TILE_ROWS), result, result_step, start, start_step, left, left_step, right, \
                              right_step, depth, ahead); break;
        TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4) TILE_CASE(5) TILE_CASE(6) TILE_CASE(7)
        TILE_CASE(8) TILE_CASE(9) TILE_CASE(10) TILE_CASE(11) TILE_CASE(12) TILE_CASE(13) TILE_CASE(14)
#undef TILE_CASE
    }
}

// A tile cut off at the right edge is computed in a full tile of its own, from which the valid columns are copied.
static void multiply_edge(int rows, int columns, float* result, long result_step, const float* left, long left_step,
                          const float* right, int depth, int add, Ahead* ahead) {
    float full[TILE_ROWS * TILE_COLUMNS] = {0};
    for (int i = 0; i < rows && add; i++) {
        memcpy(full + i * TILE_COLUMNS, result + i * result_step, columns * sizeof(float));
    }
    multiply_rows(rows, full, TILE_COLUMNS, full, TILE_COLUMNS, left, left_step, right, TILE_COLUMNS, depth, ahead);
    for (int i = 0; i < rows; i++) {
        memcpy(result + i * result_step, full + i * TILE_COLUMNS, columns * sizeof(float));
    }
}

// A rectangle in memory: `runs` runs of `floats` numbers, `step` numbers from one to the next.
typedef struct {
    const float* start;
    long step;
    int runs, floats;
} Rectangle;

// The numbers start[q*q_step + k*k_step], q < count, k < depth; one of the steps is 1.
ALWAYS_INLINE Rectangle rectangle(const float* start, long q_step, long k_step, int count, int depth) {
    Rectangle along_k = {start, q_step, count, depth}, along_q = {start, k_step, depth, count};
    return k_step == 1 ? along_k : along_q;
}

// One side of a product, as tiles read it: rows of `left` or columns of `right` beside each other, and `step` numbers
// further on those of the next k. Packed, tile number t is at start + t*tile; not packed (tile = 0), it is at its first
// row or column.
typedef struct {
    const float* start;
    long tile, step;
} Side;

ALWAYS_INLINE const float* side_at(const Side* s, int t, int first) {
    return s->start + (s->tile ? t * s->tile : first);
}

// All tiles of a result (rows, columns) for `depth` values of k: result = [result if adding] + left right. `copied`:
// the first tile is in `buffer` already. `after` is the tile that the caller computes next; after_rows of its rows are
// copied to `buffer`, if there is time. Returns 1 if that was done: the next call's `copied`. `next` is what the caller
// packs or reads next.
static int multiply_panels(float* result, long result_step, int rows, int columns, int adding, const Side* left,
                           const Side* right, int depth, float* buffer, int copied, const float* after, int after_rows,
                           Rectangle next) {
    int tiles = blocks_of(rows, TILE_ROWS), panels = blocks_of(columns, TILE_COLUMNS), looks = blocks_of(depth, STEP);
    int time_to_copy = depth >= COPY_DELAY + blocks_of(TILE_ROWS, LOOK_ROWS) * STEP, may_copy = adding && time_to_copy;
    Ahead a;
    a.result_step = result_step;
    a.fetch_rows = imax(LOOK_ROWS, blocks_of(TILE_ROWS, looks));
    a.buffer = buffer;
    a.source = next.start;
    a.source_step = next.step;
    a.run_lines = blocks_of(next.floats, LINE);
    a.lines = next.runs * a.run_lines;
    a.fetch_lines = blocks_of(a.lines, tiles * panels * looks);
    a.line = 0;
    for (int t = 0; t < tiles; t++) {
        int i = part_begin(t, tiles, rows), below = part_begin(t + 1, tiles, rows), height = below - i;
        const float* tile = side_at(left, t, i);
        for (int p = 0; p < panels; p++) {
            int j = p * TILE_COLUMNS, width = imin(TILE_COLUMNS, columns - j);
            float* r = result + i * result_step + j;
            const float *start = copied ? buffer : adding ? r : NULL, *panel = side_at(right, p, j);
            if (p + 1 < panels) { // the next tile is to the right, or the first one below, or the caller's
                a.result = r + TILE_COLUMNS;
                a.copy_rows = may_copy && j + 2 * TILE_COLUMNS <= columns ? height : 0;
            } else if (t + 1 < tiles) {
                a.result = result + below * result_step;
                a.copy_rows = may_copy && columns >= TILE_COLUMNS ? part_begin(t + 2, tiles, rows) - below : 0;
            } else {
                a.result = after; // a single tile follows itself and is not finished yet
                a.copy_rows = time_to_copy && after != r ? after_rows : 0;
            }
            if (width < TILE_COLUMNS) {
                multiply_edge(height, width, r, result_step, tile, left->step, panel, depth, adding, &a);
            } else {
                multiply_rows(height, r, result_step, start, copied ? TILE_COLUMNS : result_step, tile, left->step,
                              panel, right->step, depth, &a);
            }
            copied = a.copy_rows > 0;
        }
    }
    return copied;
}

// One unit of work, by one thread: result (rows, columns) = [result if add] + left right, where
// left(i,k) = left[i*left_i + k*left_k] and right(k,j) = right[k*right_k + j*right_j]; 0 < rows <= UNIT_ROWS.
// `left` is packed to the second-level cache, as many chunks of k as fit; `right` a panel of columns at a time to the
// first level, or some panels if k has few values: then the result is walked through along its rows, as memory likes.
// (Either may be read where it is instead.)
static void multiply_unit(float* result, long result_step, const float* left, long left_i, long left_k,
                          const float* right, long right_k, long right_j, int rows, int columns, int depth, int add) {
    static __thread float* scratch = NULL; // one per thread, kept for the life of the thread
    if (!scratch) {
        int buffer_floats = blocks_of(TILE_ROWS * TILE_COLUMNS, LINE) * LINE;
        scratch = (float*)aligned_alloc(64, sizeof(float) * (size_t)(LEFT_FLOATS + RIGHT_FLOATS + buffer_floats));
    }
    if (!scratch) { fprintf(stderr, "out of memory\n"); exit(EXIT_FAILURE); }
    if (depth == 0) return; // dW of an expert without tokens: there is nothing to add
    float *packed_right = scratch + LEFT_FLOATS, *buffer = packed_right + RIGHT_FLOATS;
    int tiles = blocks_of(rows, TILE_ROWS), first_rows = part_begin(1, tiles, rows);
    // Where the numbers of a tile lie together as they are (dW), packing them costs more than it saves, 1 to 12 % of a
    // product, unless rows are a multiple of 4 KB apart: then they push each other out of the cache (AVX2: - 28 %).
    int left_direct = left_i == 1 && left_k % 1024 != 0;
    // For a tile or two, the time is that of reading `right`, which goes faster in longer runs: 4 panels of 64 values
    // of k instead of one of 256 (dx for 16 rows an expert: + 40 %). For a single tile packed numbers would
    // be used only once, so it reads them where they are, in rows of all columns, unless they must be transposed or cut
    // off.
    int right_direct = tiles == 1 && right_j == 1 && columns % TILE_COLUMNS == 0;
    int most = tiles <= 2 && right_j == 1 ? CHUNK / 4 : CHUNK;
    // chunks of about equal depth, all but the last of whole squares to transpose; tiles of `left`: see pack_left
    int chunk = blocks_of(blocks_of(depth, blocks_of(depth, most)), LINE) * LINE;
    int tile_floats = chunk * LEFT_WIDTH + LINE, panel_floats = chunk * TILE_COLUMNS;
    int pass = LEFT_FLOATS / tile_floats / tiles * chunk; // values of k for which `left` fits
    int group = right_direct ? columns : RIGHT_FLOATS / panel_floats * TILE_COLUMNS; // columns for which `right` fits
    Side left_side = {NULL, left_direct ? 0 : tile_floats, left_direct ? left_k : LEFT_WIDTH};
    Side right_side = {packed_right, right_direct ? 0 : panel_floats, right_direct ? right_k : TILE_COLUMNS};
    for (int k0 = 0; k0 < depth; k0 += pass) {
        int k1 = imin(depth, k0 + pass), copied = 0;
        float* packed = scratch;
        for (int k = k0; k < k1 && !left_direct; k += chunk, packed += tiles * tile_floats) {
            pack_left(packed, tile_floats, left + k * left_k, left_i, left_k, rows, tiles, imin(chunk, k1 - k));
        }
        for (int j = 0; j < columns; j += group) {
            int width = imin(group, columns - j);
            packed = scratch;
            for (int k = k0; k < k1; k += chunk, packed += tiles * tile_floats) {
                int n = imin(chunk, k1 - k), next_k = k + chunk, next_j = j;
                const float *source = right + k * right_k + j * right_j, *after;
                Rectangle next = {NULL, 0, 0, 0};
                for (int p = 0; p < (right_direct ? 0 : blocks_of(width, TILE_COLUMNS)); p++) {
                    int first = p * TILE_COLUMNS;
                    pack(packed_right + p * panel_floats, TILE_COLUMNS, source + first * right_j, right_j, right_k,
                         imin(TILE_COLUMNS, width - first), n);
                }
                if (next_k >= k1) { next_k = k0; next_j += group; }
                if (next_j < columns) {
                    next = rectangle(right + next_k * right_k + next_j * right_j, right_j, right_k,
                                     imin(group, columns - next_j), imin(chunk, k1 - next_k));
                } else if (k1 < depth) {
                    next = rectangle(left + k1 * left_k, left_i, left_k, rows, imin(pass, depth - k1));
                }
                after = result + (next_j < columns ? next_j : 0);
                int next_adds = add || next_k > 0;
                left_side.start = left_direct ? left + k * left_k : packed;
                if (right_direct) right_side.start = source;
                copied = multiply_panels(result + j, result_step, rows, width, add || k > 0, &left_side, &right_side, n,
                                         buffer, copied, after,
                                         next_adds && next_j + TILE_COLUMNS <= columns ? first_rows : 0, next);
            }
        }
    }
}

// The same for any number of rows: attention's products, which are small and have strides of their own.
static void multiply_block(float* result, long result_step, const float* left, long left_i, long left_k,
                           const float* right, long right_k, long right_j, int rows, int columns, int depth, int add) {
    for (int i = 0; i < rows; i += UNIT_ROWS)
        multiply_unit(result + i * result_step, result_step, left + i * left_i, left_i, left_k, right, right_k, right_j,
                      imin(UNIT_ROWS, rows - i), columns, depth, add);
}

// y = x W^T for a few rows of x, as in generation: the time is that of reading W, and packed numbers would be used only
// once. So squares of W are transposed in registers and used for all rows. The order of summation is the same.
// These are too many streams for the hardware to foresee: fetching ahead brings 25 % at 1 row, 90 % at 8 (AVX-512).
ALWAYS_INLINE void forward_few_rows(const int rows, float* y, long y_row, long y_column, const float* x, const float* W,
                                    int C, int columns) {
    for (int o = 0; o < columns; o += VECTOR_LENGTH) {
        int valid = imin(VECTOR_LENGTH, columns - o), c = 0;
        const float* w = W + (long)o * C;
        vector sum[FEW_ROWS], zero = {0};
        float edge[VECTOR_LENGTH] = {0};
        UNROLL
        for (int i = 0; i < rows; i++) sum[i] = zero;
        for (; c + VECTOR_LENGTH <= C; c += VECTOR_LENGTH) {
            vector square[VECTOR_LENGTH];
            UNROLL
            for (int q = 0; q < VECTOR_LENGTH; q++) {
                square[q] = q < valid ? *(const vector*)(w + (long)q * C + c) : zero;
                PREFETCH(w + (long)(q + VECTOR_LENGTH) * C + c);
            }
            transpose(square);
            UNROLL
            for (int q = 0; q < VECTOR_LENGTH; q++) {
                UNROLL
                for (int i = 0; i < rows; i++) {
                    sum[i] += x[(long)i * C + c + q] * square[q];
                    HIDE(sum[i]);
                }
            }
        }
        for (; c < C; c++) {
            for (int q = 0; q < valid; q++) edge[q] = w[(long)q * C + c];
            UNROLL
            for (int i = 0; i < rows; i++) {
                sum[i] += x[(long)i * C + c] * *(const vector*)edge;
                HIDE(sum[i]);
            }
        }
        UNROLL
        for (int i = 0; i < rows; i++) {
            *(vector*)edge = sum[i];
            for (int q = 0; q < valid; q++) y[i * y_row + (o + q) * y_column] = edge[q];
        }
    }
}

// For few rows of W, as routers have, the same is computed as y^T = W x^T: x and W change places, and so do the roles
// of rows and columns.
static void forward_unit(float* y, long y_step, const float* x, const float* W, int C, int rows, int columns) {
    long y_row = y_step, y_column = 1;
    int few = rows;
    if (columns <= FEW_ROWS && columns < rows) {
        const float* swap = x;
        x = W;
        W = swap;
        few = columns;
        columns = rows;
        y_row = 1;
        y_column = y_step;
    }
    switch (few <= FEW_ROWS ? few : 0) {
#define FEW_CASE(n) \
        case n: forward_few_rows(n < FEW_ROWS ? n : FEW_ROWS, y, y_row, y_column, x, W, C, columns); break;
        FEW_CASE(1) FEW_CASE(2) FEW_CASE(3) FEW_CASE(4) FEW_CASE(5) FEW_CASE(6) FEW_CASE(7) FEW_CASE(8)
#undef FEW_CASE
        default: multiply_unit(y, y_step, x, C, 1, W, 1, C, rows, columns, C, 0);
    }
}

enum { FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT };

// The work behind the functions below, in one parallel region. (result, left, right) is (y, x, W) forward, (dx, dy, W)
// or (dW, dy, x) backward.
static void grouped_product(int kind, float* result, const float* left, const float* right, long weight_stride, int C,
                            int OC, int E, const int* offsets, int add) {
    int threads = thread_count(), columns = kind == FORWARD ? OC : C, most_rows = 0, units, unit_rows;
    Work work;
#define RESULT_ROWS(e) (kind == BACKWARD_WEIGHT ? OC : offsets[(e) + 1] - offsets[e])
    for (int e = 0; e < E; e++) most_rows = imax(most_rows, RESULT_ROWS(e));
    if (most_rows == 0) return;
    // A unit of work is a block of a result. Start with large ones (less packing) and cut the longer side into more
    // until there are enough to go round: an equal number for each thread (a single product may be cut finer, to find
    // such a number), or some for each, so that threads can help each other. (For few rows one a thread: reading W goes
    // fastest in long runs.) A large result is cut into `down` times `across` units.
    int enough = threads * (most_rows <= FEW_ROWS ? 1 : E > 1 ? UNITS_A_THREAD : 4 * UNITS_A_THREAD);
    int down = blocks_of(most_rows, UNIT_ROWS), across = blocks_of(columns, UNIT_COLUMNS);
    int tiles = blocks_of(most_rows, TILE_ROWS), panels = blocks_of(columns, TILE_COLUMNS);
    for (;;) {
        unit_rows = blocks_of(tiles, down) * TILE_ROWS;
        units = 0;
        for (int e = 0; e < E; e++) units += blocks_of(RESULT_ROWS(e), unit_rows) * across;
        if (((E == 1 || threads == 1) && units % threads == 0) || units >= enough) break;
        if (down < tiles && (unit_rows > columns / across || across == panels)) down++;
        else if (across < panels) across++;
        else break;
    }
    work_begin(&work);
    for (int e = 0, unit = 0; e < E; e++) { // a unit belongs to where its expert's rows are, also for dW
        int count = blocks_of(RESULT_ROWS(e), unit_rows) * across, rows = offsets[e + 1] - offsets[e];
        for (int u = 0; u < count; u++)
            work_add(&work, unit++, (offsets[e] + rows * (u + 0.5) / count) / imax(1, offsets[E]));
    }
    #pragma omp parallel
    for (int helped = 0, unit; (unit = work_take(&work, &helped)) >= 0;) {
        int e = 0, u = unit; // find expert e and the unit's number u among those of this expert
        for (; u >= blocks_of(RESULT_ROWS(e), unit_rows) * across; e++) {
            u -= blocks_of(RESULT_ROWS(e), unit_rows) * across;
        }
        int blocks = blocks_of(RESULT_ROWS(e), unit_rows);
        int i = part_begin(u / across, blocks, RESULT_ROWS(e));
        int rows = part_begin(u / across + 1, blocks, RESULT_ROWS(e)) - i;
        int j = part_begin(u % across, across, panels) * TILE_COLUMNS;
        int width = imin(columns, part_begin(u % across + 1, across, panels) * TILE_COLUMNS) - j;
        long first = offsets[e], w = e * weight_stride;
        if (kind == FORWARD) {
            forward_unit(result + (first + i) * OC + j, OC, left + (first + i) * C, right + w + (long)j * C, C, rows,
                         width);
        } else if (kind == BACKWARD_INPUT) {
            multiply_unit(result + (first + i) * C + j, C, left + (first + i) * OC, OC, 1, right + w + j, C, 1,
                          rows, width, OC, add);
        } else {
            multiply_unit(result + w + (long)i * C + j, C, left + first * OC + i, 1, OC, right + first * C + j, C, 1,
                          rows, width, offsets[e + 1] - offsets[e], 1);
        }
    }
#undef RESULT_ROWS
}

// E products at once: rows offsets[e] .. offsets[e + 1] - 1 of x and y belong to matrix number e, which is (OC, C) and
// starts at W + e * weight_stride. No rows is allowed.
//     y = x W_e^T          y (rows, OC), x (rows, C), offsets (E + 1)
void grouped_matmul_forward(float* y, const float* x, const float* W, long weight_stride, int C, int OC, int E,
                            const int* offsets) {
    grouped_product(FORWARD, y, x, W, weight_stride, C, OC, E, offsets, 0);
}

//     dx = dy W_e, or with add = 1 dx += dy W_e
void grouped_matmul_backward_input(float* dx, const float* dy, const float* W, long weight_stride, int C, int OC, int E,
                                   const int* offsets, int add) {
    grouped_product(BACKWARD_INPUT, dx, dy, W, weight_stride, C, OC, E, offsets, add);
}

//     dW_e += dy^T x
void grouped_matmul_backward_weight(float* dW, const float* dy, const float* x, long weight_stride, int C, int OC,
                                    int E, const int* offsets) {
    grouped_product(BACKWARD_WEIGHT, dW, dy, x, weight_stride, C, OC, E, offsets, 1);
}

// The same for one matrix and `rows` rows.
void matmul_forward(float* y, const float* x, const float* W, int rows, int C, int OC) {
    int offsets[2] = {0, rows};
    grouped_matmul_forward(y, x, W, 0, C, OC, 1, offsets);
}

void matmul_backward_input(float* dx, const float* dy, const float* W, int rows, int C, int OC, int add) {
    int offsets[2] = {0, rows};
    grouped_matmul_backward_input(dx, dy, W, 0, C, OC, 1, offsets, add);
}

void matmul_backward_weight(float* dW, const float* dy, const float* x, int rows, int C, int OC) {
    int offsets[2] = {0, rows};
    grouped_matmul_backward_weight(dW, dy, x, 0, C, OC, 1, offsets);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Layers

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

// out (N, H) = table[tokens]       table (V, H), tokens (N)
// (Here and below, one row, as in generation, is not worth waking the other threads for.)
static void embedding_forward(float* out, const int* tokens, const float* table, int N, int H) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) memcpy(out + (long)n * H, table + (long)tokens[n] * H, sizeof(float) * H);
}

// dtable[tokens] += dout. Two positions may hold the same token, so threads share the columns and not the rows: each
// sum is then made by one thread, in the order of the positions.
static void embedding_backward(float* dtable, const float* dout, const int* tokens, int N, int H) {
    #pragma omp parallel for
    for (int column = 0; column < H; column += 16) {
        int width = imin(16, H - column);
        for (int n = 0; n < N; n++) {
            float* drow = dtable + (long)tokens[n] * H + column;
            const float* dout_row = dout + (long)n * H + column;
            for (int i = 0; i < width; i++) drow[i] += dout_row[i];
        }
    }
}

// RMSNorm (Zhang and Sennrich 2019):  out = weight * x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)
// x is N rows, `ld_x` floats apart, each of `groups` vectors of `size`; every vector is normalised by itself with the
// same weight (size). Layer norms have one group a row; per-head norms of queries and keys have one for each head.
// rstd (N, groups) is kept for the backward pass.
static void rmsnorm_forward(float* out, long ld_out, float* rstd, const float* x, long ld_x, const float* weight, int N,
                            int groups, int size, float eps) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++)
        for (int g = 0; g < groups; g++) {
            const float* x_ng = x + n * ld_x + (long)g * size;
            float* out_ng = out + n * ld_out + (long)g * size;
            float sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int i = 0; i < size; i++) sum += x_ng[i] * x_ng[i];
            float r = 1.0f / sqrtf(sum / size + eps);
            for (int i = 0; i < size; i++) out_ng[i] = weight[i] * x_ng[i] * r;
            rstd[(long)n * groups + g] = r;
        }
}

// Rows whose share of a norm's dweight is summed up while they are at hand. Blocks of rows are then added in order, so
// that the number of threads changes nothing.
#define RMSNORM_ROWS 16
static long rmsnorm_sums_size(int N, int size) { return (long)(N + RMSNORM_ROWS - 1) / RMSNORM_ROWS * size; }

// With xhat = x rstd and s = mean(dout weight xhat):
//     dweight += sum over rows of dout xhat        dx (+)= rstd (dout weight - xhat s)
// add = 1 adds to dx, which then is the gradient that flows past the norm on the residual stream.
// sums: rmsnorm_sums_size(N, size) floats of scratch.
static void rmsnorm_backward(float* dx, long ld_dx, int add, float* dweight, const float* dout, long ld_dout,
                             const float* x, long ld_x, const float* weight, const float* rstd, int N, int groups,
                             int size, float* sums) {
    int blocks = (N + RMSNORM_ROWS - 1) / RMSNORM_ROWS;
    #pragma omp parallel for
    for (int b = 0; b < blocks; b++) {
        float* sums_b = sums + (long)b * size;
        memset(sums_b, 0, sizeof(float) * size);
        for (int n = b * RMSNORM_ROWS; n < imin(N, (b + 1) * RMSNORM_ROWS); n++)
            for (int g = 0; g < groups; g++) {
                const float *x_ng = x + n * ld_x + (long)g * size, *dout_ng = dout + n * ld_dout + (long)g * size;
                float *dx_ng = dx + n * ld_dx + (long)g * size, r = rstd[(long)n * groups + g], s = 0;
                #pragma omp simd reduction(+ : s)
                for (int i = 0; i < size; i++) s += dout_ng[i] * weight[i] * x_ng[i];
                s *= r * r / size;
                for (int i = 0; i < size; i++) {
                    float d = r * (dout_ng[i] * weight[i] - x_ng[i] * s);
                    sums_b[i] += dout_ng[i] * x_ng[i] * r;
                    dx_ng[i] = add ? dx_ng[i] + d : d;
                }
            }
    }
    #pragma omp parallel for
    for (int column = 0; column < size; column += 16) {
        int width = imin(16, size - column);
        float total[16] = {0};
        for (int b = 0; b < blocks; b++)
            for (int i = 0; i < width; i++) total[i] += sums[(long)b * size + column + i];
        for (int i = 0; i < width; i++) dweight[column + i] += total[i];
    }
}

// cos and sin of position * theta^(-2 i / HD), both (positions, HD / 2)
static void rope_table(float* cosines, float* sines, int positions, int HD, double theta) {
    #pragma omp parallel for
    for (int t = 0; t < positions; t++)
        for (int i = 0; i < HD / 2; i++) {
            double angle = t * pow(theta, -2.0 * i / HD);
            cosines[(long)t * (HD / 2) + i] = (float)cos(angle);
            sines[(long)t * (HD / 2) + i] = (float)sin(angle);
        }
}

// Rotary positions (Su et al. 2021), in place, on `heads` heads of each of N = B T rows that are ld floats apart.
// Element i of a head's first half and element i of its second half are a point in the plane (Hugging Face's
// rotate_half), turned by position * theta^(-2 i / HD). Row n is at position start + n % T of its sequence; the angles'
// cosines and sines are rope_table's. The gradient of a rotation is the rotation back, direction = -1.
static void rope(float* x, long ld, int heads, int N, int T, int start, int HD, const float* cosines,
                 const float* sines, int direction) {
    int half = HD / 2;
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const float *cos_t = cosines + (long)(start + n % T) * half, *sin_t = sines + (long)(start + n % T) * half;
        for (int h = 0; h < heads; h++) {
            float *a = x + n * ld + (long)h * HD, *b = a + half;
            for (int i = 0; i < half; i++) {
                float s = direction * sin_t[i], a_i = a[i], b_i = b[i];
                a[i] = a_i * cos_t[i] - b_i * s;
                b[i] = b_i * cos_t[i] + a_i * s;
            }
        }
    }
}

// Attention works on blocks of this many queries: their scores against all keys stay in the cache between the products.
#define QUERY_BLOCK 64
// rows of scores are this far apart: a power of two would map all of them to one cache set
static long score_stride(int T) { return (T + 15) / 16 * 16 + 16; }
// floats that attention needs for T keys: two blocks of scores for each thread
static long attention_scratch_size(int T) { return (long)thread_count() * 2 * QUERY_BLOCK * score_stride(T); }

static float* attention_scratch(float* scratch, int T) {
    return scratch + (long)thread_number() * 2 * QUERY_BLOCK * score_stride(T);
}

// Causal attention of Tq queries, which are the last Tq of Tk positions, in B sequences:
//     out_i = sum over j <= i of p_ij v_j,  p_ij = exp(q_i k_j / sqrt(HD)) / sum over j <= i,  lse_i = log of that sum
// Row n of q, k, v starts at q + n ld_q (k, v with ld_k, ld_v); query head h uses key and value head h / (NH / NKV).
// out (B Tq, NH HD), lse (B, NH, Tq). scratch: attention_scratch_size(Tk) floats.
static void attention_forward(float* out, float* lse, const float* q, long ld_q, const float* k, long ld_k,
                              const float* v, long ld_v, int B, int Tq, int Tk, int NH, int NKV, int HD,
                              float* scratch) {
    int blocks = (Tq + QUERY_BLOCK - 1) / QUERY_BLOCK;
    float scale = 1.0f / sqrtf((float)HD);
    Work work;
    work_deal(&work, B * NH * blocks);
    #pragma omp parallel
    for (int helped = 0, unit; (unit = work_take(&work, &helped)) >= 0;) {
        int b = unit / (NH * blocks), h = unit / blocks % NH, block = unit % blocks;
        int first = block * QUERY_BLOCK, rows = imin(QUERY_BLOCK, Tq - first);
        int past = Tk - Tq + first; // keys that even the block's first query sees, but for its own
        int keys = past + rows, kv_head = h / (NH / NKV);
        const float* q_bh = q + ((long)b * Tq + first) * ld_q + (long)h * HD;
        const float* k_bh = k + (long)b * Tk * ld_k + (long)kv_head * HD;
        const float* v_bh = v + (long)b * Tk * ld_v + (long)kv_head * HD;
        float *p = attention_scratch(scratch, Tk), inverse_sums[QUERY_BLOCK];
        long ld = score_stride(Tk);
        multiply_block(p, ld, q_bh, ld_q, 1, k_bh, 1, ld_k, rows, keys, HD, 0);
        for (int i = 0; i < rows; i++) {
            int seen = past + i + 1, padded = (seen + 15) / 16 * 16;
            float *p_i = p + i * ld, sum = 0;
            // up to a multiple of 16, so that the sum has the same order of additions in every call
            for (int j = seen; j < padded; j++) p_i[j] = -INFINITY;
            float max = max_of(p_i, padded);
            #pragma omp simd reduction(+ : sum)
            for (int j = 0; j < padded; j++) sum += p_i[j] = fast_exp(scale * (p_i[j] - max));
            for (int j = seen; j < keys; j++) p_i[j] = 0;
            inverse_sums[i] = 1.0f / sum;
            lse[((long)b * NH + h) * Tq + first + i] = scale * max + logf(sum);
        }
        float* out_bh = out + ((long)b * Tq + first) * NH * HD + (long)h * HD;
        multiply_block(out_bh, (long)NH * HD, p, ld, 1, v_bh, ld_v, 1, rows, HD, keys, 0);
        for (int i = 0; i < rows; i++)
            for (int d = 0; d < HD; d++) out_bh[(long)i * NH * HD + d] *= inverse_sums[i];
    }
}

// The probabilities are made again from the scores and lse, which is cheaper than having kept T^2 of them. With
// dp_ij = dout_i v_j and D_i = sum over j of p_ij dp_ij = dout_i out_i:
//     ds_ij = p_ij (dp_ij - D_i) / sqrt(HD)
//     dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i      dv_j = sum_i p_ij dout_i
// Here Tq = Tk = T. A thread owns a key/value head with all its query heads, so that dk and dv are sums in a fixed
// order. dq, dk, dv have the strides of q, k, v, and are overwritten. dout (B T, NH HD).
static void attention_backward(float* dq, float* dk, float* dv, const float* dout, const float* out, const float* lse,
                               const float* q, long ld_q, const float* k, long ld_k, const float* v, long ld_v,
                               long ld_dqk, long ld_dv, int B, int T, int NH, int NKV, int HD, float* scratch) {
    float scale = 1.0f / sqrtf((float)HD);
    long ld = score_stride(T), ld_out = (long)NH * HD;
    Work work;
    work_deal(&work, B * NKV);
    #pragma omp parallel
    for (int helped = 0, unit; (unit = work_take(&work, &helped)) >= 0;) {
        int b = unit / NKV, kv_head = unit % NKV;
        const float *k_b = k + (long)b * T * ld_k + (long)kv_head * HD,
                    *v_b = v + (long)b * T * ld_v + (long)kv_head * HD;
        float *dk_b = dk + (long)b * T * ld_dqk + (long)kv_head * HD,
              *dv_b = dv + (long)b * T * ld_dv + (long)kv_head * HD;
        float *p = attention_scratch(scratch, T), *ds = p + QUERY_BLOCK * ld;
        // from the last block of queries, which see all keys: the very first products overwrite dk and dv
        for (int h = kv_head * (NH / NKV), add = 0; h < (kv_head + 1) * (NH / NKV); h++)
            for (int first = (T - 1) / QUERY_BLOCK * QUERY_BLOCK; first >= 0; first -= QUERY_BLOCK, add = 1) {
                int rows = imin(QUERY_BLOCK, T - first), keys = first + rows;
                long row = (long)b * T + first;
                const float *q_bh = q + row * ld_q + (long)h * HD, *out_bh = out + row * ld_out + (long)h * HD;
                const float *dout_bh = dout + row * ld_out + (long)h * HD;
                multiply_block(p, ld, q_bh, ld_q, 1, k_b, 1, ld_k, rows, keys, HD, 0);
                multiply_block(ds, ld, dout_bh, ld_out, 1, v_b, 1, ld_v, rows, keys, HD, 0);       // dp
                for (int i = 0; i < rows; i++) {
                    float *p_i = p + i * ld, *ds_i = ds + i * ld, D = 0;
                    float lse_i = lse[((long)b * NH + h) * T + first + i];
                    int seen = first + i + 1;
                    #pragma omp simd reduction(+ : D)
                    for (int d = 0; d < HD; d++) D += dout_bh[i * ld_out + d] * out_bh[i * ld_out + d];
                    // whole vectors: what that computes beyond `seen` is cleared below or never read
                    for (int j = 0; j < (seen + 15) / 16 * 16; j++) {
                        p_i[j] = fast_exp(scale * p_i[j] - lse_i);
                        ds_i[j] = p_i[j] * (ds_i[j] - D) * scale;
                    }
                    for (int j = seen; j < keys; j++) p_i[j] = ds_i[j] = 0;
                }
                multiply_block(dq + row * ld_dqk + (long)h * HD, ld_dqk, ds, ld, 1, k_b, ld_k, 1, rows, HD, keys, 0);
                multiply_block(dk_b, ld_dqk, ds, 1, ld, q_bh, ld_q, 1, keys, HD, rows, add);
                multiply_block(dv_b, ld_dv, p, 1, ld, dout_bh, ld_out, 1, keys, HD, rows, add);
            }
    }
}

// SwiGLU (Shazeer 2020):  act = silu(g) * u,  silu(g) = g sigmoid(g)
// gate_up (rows, 2, I): g = W_gate x, then u = W_up x; act (rows, I)
static void swiglu_forward(float* act, const float* gate_up, int rows, int I) {
    #pragma omp parallel for if (rows > 8)
    for (int r = 0; r < rows; r++) {
        const float *g = gate_up + (long)r * 2 * I, *u = g + I;
        float* act_r = act + (long)r * I;
        for (int i = 0; i < I; i++) act_r[i] = g[i] / (1.0f + fast_exp(-g[i])) * u[i];
    }
}

// The loss of each token and the log of its softmax's denominator:
//     lse_n = log sum_v exp(logits_nv)        losses_n = lse_n - logits_n,target        logits (N, V); losses, lse (N)
static void cross_entropy_forward(float* losses, float* lse, const float* logits, const int* targets, int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* logits_n = logits + (long)n * V;
        float max = max_of(logits_n, V), sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += fast_exp(logits_n[v] - max);
        lse[n] = max + logf(sum);
        losses[n] = lse[n] - logits_n[targets[n]];
    }
}

// The logits become their own gradient in place:  dlogits_nv = scale (exp(logits_nv - lse_n) - [v = target])
static void cross_entropy_backward(float* logits, const float* lse, const int* targets, int N, int V, float scale) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        float* logits_n = logits + (long)n * V;
        for (int v = 0; v < V; v++) logits_n[v] = scale * fast_exp(logits_n[v] - lse[n]);
        logits_n[targets[n]] -= scale;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Mixture of experts
//
// The router scores every expert for a token, the best K are run, and their results are added up, weighted by gates:
//
//     z = W_router x          p = softmax(z) over all E experts          S = the K experts with the largest p
//     gate_e = p_e, or p_e / sum over S of p  (norm_topk_prob)          y = sum over S of gate_e f_e(x)

// The indices of the K largest of E scores, largest first, of equals the lowest index first.
static void choose_topk(int* chosen, const float* scores, int E, int K) {
    for (int k = 0; k < K; k++) {
        int best = -1;
        for (int e = 0; e < E; e++) {
            // after the k-th choice come the smaller scores, and equal ones with a higher index
            float last = k ? scores[chosen[k - 1]] : 0;
            int available = k == 0 || scores[e] < last || (scores[e] == last && e > chosen[k - 1]);
            if (available && (best < 0 || scores[e] > scores[best])) best = e;
        }
        chosen[k] = best < 0 ? 0 : best;        // nothing is left only among NaN, which the loss will show too
    }
}

// probs (N, E) = softmax(logits), lse (N) = log of its denominator, experts (N, K) best first (of equals the lowest
// index first), gates (N, K)
static void softmax_router_forward(float* probs, float* lse, int* experts, float* gates, const float* logits, int N,
                                   int E, int K, int norm_topk) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const float* z = logits + (long)n * E;
        float *p = probs + (long)n * E, *gates_n = gates + (long)n * K, max = z[0], sum = 0;
        int* experts_n = experts + (long)n * K;
        for (int e = 1; e < E; e++) max = z[e] > max ? z[e] : max;
        for (int e = 0; e < E; e++) sum += p[e] = fast_exp(z[e] - max);
        for (int e = 0; e < E; e++) p[e] /= sum;
        lse[n] = max + logf(sum);
        choose_topk(experts_n, z, E, K);
        float gate_sum = 0;
        for (int k = 0; k < K; k++) gate_sum += gates_n[k] = p[experts_n[k]];
        for (int k = 0; k < K && norm_topk; k++) gates_n[k] /= gate_sum;
    }
}

// dlogits (N, E) from dgates (N, K), the gradient with respect to the gates as they were used. With S a token's
// experts:
//     renormalised:  dz_e = gate_e (dgate_e - sum over S of gate_j dgate_j)  for e in S, 0 for the others
//     otherwise:     dz_e = p_e (dgate_e [e in S] - sum over S of p_j dgate_j)  for all e
static void softmax_router_backward(float* dlogits, const float* dgates, const float* probs, const int* experts,
                                    const float* gates, int N, int E, int K, int norm_topk) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *p = probs + (long)n * E, *gates_n = gates + (long)n * K, *dgates_n = dgates + (long)n * K;
        float *dz = dlogits + (long)n * E, mean = 0;
        for (int k = 0; k < K; k++) mean += gates_n[k] * dgates_n[k];
        for (int e = 0; e < E; e++) dz[e] = norm_topk ? 0 : -p[e] * mean;
        for (int k = 0; k < K; k++)
            dz[experts[(long)n * K + k]] += gates_n[k] * (norm_topk ? dgates_n[k] - mean : dgates_n[k]);
    }
}

// Sorts the N K assignments by expert, so that each expert runs once over rows that lie together. Nothing is padded and
// no assignment is dropped, however uneven the experts' shares.
// offsets (E + 1): expert e's rows are offsets[e] .. offsets[e+1]-1
// assignment (N K): row r serves assignment n K + k, the k-th expert of token n;  row_of (N, K): the inverse
static void group_by_expert(int* offsets, int* assignment, int* row_of, const int* experts, int N, int K, int E) {
    memset(offsets, 0, sizeof(int) * (E + 1));
    for (int a = 0; a < N * K; a++) offsets[experts[a] + 1]++;
    for (int e = 0; e < E; e++) offsets[e + 1] += offsets[e];
    for (int a = 0; a < N * K; a++) {           // offsets[e] serves as expert e's next free row ...
        row_of[a] = offsets[experts[a]]++;
        assignment[row_of[a]] = a;
    }
    for (int e = E; e > 0; e--) offsets[e] = offsets[e - 1];            // ... and is moved back
    offsets[0] = 0;
}

// out row r (rows, H) = x (N, H) at the token that row r serves
static void gather_rows(float* out, const float* x, const int* assignment, int rows, int K, int H) {
    #pragma omp parallel for if (rows > 8)
    for (int r = 0; r < rows; r++) memcpy(out + (long)r * H, x + (long)(assignment[r] / K) * H, sizeof(float) * H);
}

// out_n = residual_n + sum over k of gates_nk y[row_of_nk], in the order of k;  gates = NULL: all gates are 1,
// residual = NULL: zero. The same function is the backward of gather_rows. out, residual (N, H), y (rows, H)
static void combine_rows(float* out, const float* residual, const float* y, const float* gates, const int* row_of,
                         int N, int K, int H) {
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        float* out_n = out + (long)n * H;
        for (int i = 0; i < H; i++) out_n[i] = residual ? residual[(long)n * H + i] : 0;
        for (int k = 0; k < K; k++) {
            const float* y_r = y + (long)row_of[(long)n * K + k] * H;
            float gate = gates ? gates[(long)n * K + k] : 1;
            for (int i = 0; i < H; i++) out_n[i] += gate * y_r[i];
        }
    }
}

// The backward pass of gate * down(silu(g) * u) for the rows of all experts, between the two matrix products. Here gate
// is the router's number for the row, and g and u are as in swiglu_forward. Given
// dact (rows, I) = W_down^T dy, with dy the gradient of the layer's output at the row's token:
//     dgate = <dy, W_down act> = <dact, act>, so the experts' outputs need not have been kept (SonicMoE, 2512.14080)
//     dgate_up: g' = gate dact u silu'(g),  u' = gate dact silu(g),     silu'(g) = s (1 + g (1 - s)),  s = sigmoid(g)
// gated_act (rows, I) = gate * act is what the gradient of W_down needs: dW_down += dy^T (gate act).
// dgate_up may be the same memory as gate_up; dgates (N, K).
static void swiglu_backward(float* dgate_up, float* gated_act, float* dgates, const float* dact, const float* gate_up,
                            const float* gates, const int* assignment, int rows, int I) {
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        const float *g = gate_up + (long)r * 2 * I, *u = g + I, *dact_r = dact + (long)r * I;
        float *dg = dgate_up + (long)r * 2 * I, *du = dg + I, *act = gated_act + (long)r * I;
        float gate = gates[assignment[r]], dgate = 0;
        #pragma omp simd reduction(+ : dgate)
        for (int i = 0; i < I; i++) {
            float s = 1.0f / (1.0f + fast_exp(-g[i])), silu = g[i] * s, u_i = u[i];
            dgate += dact_r[i] * silu * u_i;
            act[i] = gate * silu * u_i;
            dg[i] = gate * dact_r[i] * u_i * s * (1.0f + g[i] * (1.0f - s));
            du[i] = gate * dact_r[i] * silu;
        }
        dgates[assignment[r]] = dgate;
    }
}

// Left alone, a router sends everything to a few experts. The balance loss (Fedus et al. 2021, eq. 4) pushes back:
//     f_e = share of the assignments that went to expert e (a constant),  P_e = mean over tokens of p_e
//     AUX_SWITCH: the sum over sparse layers of E sum_e f_e P_e: 1 a layer when balanced
//     AUX_HF: as in transformers, once over all layers' tokens together, with f_e counted per token: K when balanced
// Their gradients have one form:      dz_ne += aux_weight p_ne (f_e - sum_j f_j p_nj)
// The z-loss (Zoph et al. 2022, eq. 5), mean over tokens of lse_n^2 with lse_n = logsumexp(z_n), keeps logits small:
//                                     dz_ne += z_weight lse_n p_ne

// sums (E) = the sums of the columns of x (N, E)
static void sum_columns(double* sums, const float* x, int N, int E) {
    for (int e = 0; e < E; e++) sums[e] = 0;
    for (int n = 0; n < N; n++)
        for (int e = 0; e < E; e++) sums[e] += x[(long)n * E + e];
}

// Adds both gradients to dlogits (N, E). aux_weight and f (E) belong to one of
//     AUX_SWITCH: coefficient E / N, counts / (N K)
//     AUX_HF:     coefficient E / M, counts of all layers / M,  M = N times the number of sparse layers
// and z_weight is 2 coefficient / N. lse (N), probs (N, E).
static void balance_backward(float* dlogits, const float* lse, const float* probs, const double* f, double aux_weight,
                             double z_weight, int N, int E) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* p = probs + (long)n * E;
        double mean = 0;
        for (int e = 0; e < E; e++) mean += f[e] * p[e];
        for (int e = 0; e < E; e++)
            dlogits[(long)n * E + e] += (float)(p[e] * (aux_weight * (f[e] - mean) + z_weight * lse[n]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. The model

// One layer's parameters. Gradients are kept in the same structure.
typedef struct {
    float* attn_norm;           // (H)
    float* qkv;                 // ((NH + 2 NKV) HD, H)     q_proj, k_proj and v_proj, one below the other
    float* q_norm;              // (HD) per head, (NH HD) per row, or NULL
    float* k_norm;              // (HD) per head, (NKV HD) per row, or NULL
    float* attn_out;            // (H, NH HD)               o_proj
    float* ffn_norm;            // (H)
    float* router;              // (E, H), or NULL in a dense layer
    float* gate_up;             // (E, 2, I, H)             each expert's gate_proj and up_proj
    float* down;                // (E, H, I)
    // router variants, NULL elsewhere
    float* router_bias;         // (E)                      sigmoid
    float *lpr_norm_weight, *lpr_norm_bias;         // (H)  Latent Prototype Routing; D is its latent dimension
    float *lpr_encoder, *lpr_encoder_bias;          // (2 D, H), (2 D)
    float* lpr_prototypes;                          // (E, D)
    float *lpr_readout, *lpr_readout_bias;          // (H, D), (H)
} LayerWeights;

typedef struct {
    float* embedding;           // (V, H)
    LayerWeights* layers;       // (L)
    float* final_norm;          // (H)
    float* lm_head;             // (V, H), the embedding itself if tied
} Weights;

// One tensor as a checkpoint knows it: its name there, and where its numbers lie in the block of all parameters.
typedef struct {
    char name[96];
    long offset, rows, cols;    // cols = VECTOR: a vector of `rows` numbers
} Tensor;
enum { VECTOR = -1 };

static int tensor_is_matrix(const Tensor* t) { return t->cols != VECTOR; }
static long tensor_size(const Tensor* t) { return tensor_is_matrix(t) ? t->rows * t->cols : t->rows; }

// All parameters are one block of memory: first the matrices, then the vectors, so that weight decay, which is for
// matrices alone, applies to one range.
typedef struct {
    Tensor* tensors;            // (count), in the order of layout_walk
    int count;
    long matrices, total;       // floats in all matrices; in all parameters (while they are counted: in all vectors)
    float* block;               // the parameters' memory, or NULL where only names and sizes are wanted
} Layout;

// The next tensor of the list; returns where it lies in the block.
static float* layout_add(Layout* layout, long rows, long cols, const char* format, ...) {
    long offset = cols != VECTOR ? layout->matrices : layout->total;
    if (layout->tensors) {
        Tensor* t = &layout->tensors[layout->count];
        va_list args;
        va_start(args, format);
        vsnprintf(t->name, sizeof t->name, format, args);
        va_end(args);
        t->rows = rows;
        t->cols = cols;
        t->offset = offset;
    }
    layout->count++;
    if (cols != VECTOR) layout->matrices += rows * cols;
    else layout->total += rows;
    return layout->block ? layout->block + offset : NULL;
}

// The tensors of sigmoid routers and of Latent Prototype Routing.
static void layout_router_variant(Layout* layout, const Config* c, LayerWeights* p, int l,
                                  const char* moe) {
    int H = c->hidden_size, E = c->num_experts, D = c->lpr_latent_dim;
    if (c->router == ROUTER_SIGMOID) {
        p->router_bias = layout_add(layout, E, VECTOR, "model.layers.%d.%s.gate.e_score_correction_bias", l, moe);
        // Dots1 has an expert for all tokens, too; of width 0 it does nothing, but its tensors are expected
        for (int i = 0; c->arch == DOTS1 && i < 2; i++)
            layout_add(layout, 0, H, "model.layers.%d.mlp.shared_experts.%s_proj.weight", l, i ? "up" : "gate");
        if (c->arch == DOTS1) layout_add(layout, H, 0, "model.layers.%d.mlp.shared_experts.down_proj.weight", l);
        return;
    }
    p->lpr_norm_weight = layout_add(layout, H, VECTOR, "model.layers.%d.%s.gate.norm.weight", l, moe);
    p->lpr_norm_bias = layout_add(layout, H, VECTOR, "model.layers.%d.%s.gate.norm.bias", l, moe);
    p->lpr_encoder = layout_add(layout, 2 * D, H, "model.layers.%d.%s.gate.encoder.weight", l, moe);
    p->lpr_encoder_bias = layout_add(layout, 2 * D, VECTOR, "model.layers.%d.%s.gate.encoder.bias", l, moe);
    p->lpr_prototypes = layout_add(layout, E, D, "model.layers.%d.%s.gate.prototypes", l, moe);
    p->lpr_readout = layout_add(layout, H, D, "model.layers.%d.%s.gate.readout.weight", l, moe);
    p->lpr_readout_bias = layout_add(layout, H, VECTOR, "model.layers.%d.%s.gate.readout.bias", l, moe);
}

// Lists every tensor of a model under its Hugging Face name and points `w` (if not NULL) at them.
static void layout_walk(Layout* layout, const Config* c, Weights* w) {
    int H = c->hidden_size, HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads, mixtral = c->arch == MIXTRAL;
    const char* moe = mixtral ? "block_sparse_moe" : "mlp";
    float* embedding = layout_add(layout, c->vocab_size, H, "model.embed_tokens.weight");
    for (int l = 0; l < c->num_layers; l++) {
        LayerWeights p;
        memset(&p, 0, sizeof p);
        p.attn_norm = layout_add(layout, H, VECTOR, "model.layers.%d.input_layernorm.weight", l);
        p.qkv = layout_add(layout, (long)NH * HD, H, "model.layers.%d.self_attn.q_proj.weight", l);
        layout_add(layout, (long)NKV * HD, H, "model.layers.%d.self_attn.k_proj.weight", l);
        layout_add(layout, (long)NKV * HD, H, "model.layers.%d.self_attn.v_proj.weight", l);
        if (c->qk_norm != QK_NORM_NONE) {
            int row = c->qk_norm == QK_NORM_ROW;
            p.q_norm = layout_add(layout, row ? NH * HD : HD, VECTOR, "model.layers.%d.self_attn.q_norm.weight", l);
            p.k_norm = layout_add(layout, row ? NKV * HD : HD, VECTOR, "model.layers.%d.self_attn.k_norm.weight", l);
        }
        p.attn_out = layout_add(layout, H, (long)NH * HD, "model.layers.%d.self_attn.o_proj.weight", l);
        p.ffn_norm = layout_add(layout, H, VECTOR, "model.layers.%d.post_attention_layernorm.weight", l);
        int E = layer_experts(c, l), I = layer_width(c, l);
        if (c->sparse[l] && c->router != ROUTER_LPR)
            p.router = layout_add(layout, E, H, "model.layers.%d.%s.gate.weight", l, moe);
        if (c->sparse[l] && c->router != ROUTER_SOFTMAX) layout_router_variant(layout, c, &p, l, moe);
        for (int e = 0; e < E; e++) {           // all gates and ups first: the products want (E, 2, I, H)
            char expert[64] = "mlp";
            if (c->sparse[l]) snprintf(expert, sizeof expert, "%s.experts.%d", moe, e);
            float* gate = layout_add(layout, I, H, "model.layers.%d.%s.%s.weight", l, expert,
                                   mixtral && c->sparse[l] ? "w1" : "gate_proj");
            layout_add(layout, I, H, "model.layers.%d.%s.%s.weight", l, expert,
                       mixtral && c->sparse[l] ? "w3" : "up_proj");
            if (e == 0) p.gate_up = gate;
        }
        for (int e = 0; e < E; e++) {
            char expert[64] = "mlp";
            if (c->sparse[l]) snprintf(expert, sizeof expert, "%s.experts.%d", moe, e);
            float* down = layout_add(layout, H, I, "model.layers.%d.%s.%s.weight", l, expert,
                                   mixtral && c->sparse[l] ? "w2" : "down_proj");
            if (e == 0) p.down = down;
        }
        if (w) w->layers[l] = p;
    }
    float* norm = layout_add(layout, H, VECTOR, "model.norm.weight");
    float* head = c->tie_word_embeddings ? embedding : layout_add(layout, c->vocab_size, H, "lm_head.weight");
    if (w) {
        w->embedding = embedding;
        w->final_norm = norm;
        w->lm_head = head;
    }
}

static Layout layout_create(const Config* c) {
    Layout count = {NULL, 0, 0, 0, NULL}, layout;
    layout_walk(&count, c, NULL);
    layout.tensors = (Tensor*)checked_malloc(sizeof(Tensor) * count.count);
    layout.count = 0;
    layout.matrices = 0;
    layout.block = NULL;
    layout.total = count.matrices;      // vectors are placed behind the matrices
    layout_walk(&layout, c, NULL);
    return layout;
}

// `block`: memory for layout->total parameters
static void weights_point(Weights* w, const Config* c, const Layout* layout, float* block) {
    Layout again = {NULL, 0, 0, layout->matrices, block};
    w->layers = (LayerWeights*)checked_malloc(sizeof(LayerWeights) * c->num_layers);
    layout_walk(&again, c, w);
}

// What one layer keeps of the forward pass for the backward pass. R = N K rows of experts (N in a dense layer).
typedef struct {
    float* x;                   // (N, H)       the residual stream as it enters the layer
    float* attn_in;             // (N, H)       n1(x)
    float* attn_rstd;           // (N)
    float* qkv;                 // (N, (NH + 2 NKV) HD)
    float* q_rstd;              // (N, NH) per head, (N) per row
    float* k_rstd;              // (N, NKV) per head, (N) per row
    float* rotated;             // (N, (NH + NKV) HD)       queries and keys, normed and rotated
    float* attn;                // (N, NH HD)
    float* lse;                 // (B, NH, T)
    float* x_mid;               // (N, H)       the residual stream after attention
    float* ffn_in;              // (N, H)       n2(x_mid)
    float* ffn_rstd;            // (N)
    float* router_logits;       // (N, E)
    float* router_lse;          // (N)
    float* probs;               // (N, E)
    float* gates;               // (N, K)
    float* gate_up;             // (R, 2, I)
    int* experts;               // (N, K)       chosen, best first
    int* offsets;               // (E + 1)      see group_by_expert
    int* assignment;            // (R)
    int* row_of;                // (N, K)
    // router variants
    float* router_raw;          // (N, E)       logits before their normalisation
    float *lpr_a, *lpr_input;   // (N, H)
    float *lpr_mean, *lpr_rstd; // (N)
    float* lpr_encoded;         // (N, 2 D)
    float* lpr_read_out;        // (N, D)
    double* lpr_targets;        // (E, D)
} LayerActivations;

// Memory that is written and used up within one layer; all layers share it.
typedef struct {
    float* rows_in;             // (R, H)       experts' inputs, gathered; backward: their gradient
    float* rows_out;            // (R, H)       experts' outputs; backward: the gradient of the output, gathered
    float* act;                 // (R, I)
    float* dact;                // (R, I)
    float* dgates;              // (N, K)
    float* drouter;             // (N, E)
    float* dx;                  // (N, H)       the gradient that flows back along the residual stream
    float* dnormed;             // (N, H)
    float* dattn;               // (N, NH HD)
    float* dqkv;                // (N, (NH + 2 NKV) HD)
    float* drotated;            // (N, (NH + NKV) HD)
    float* attention;           // see attention_scratch_size
    double* balance;            // (E)          f of the balance loss
    double* prob_sums;          // (E)          sum over tokens of probs
    float* norm_sums;           // see rmsnorm_backward
    double* norms;              // partial sums of the gradient's norm
    // router variants
    float* family_shift;        // (N, E)
    float* lpr_dread_out;       // (N, D)
    float* lpr_dprobs;          // (N, E)
    float* lpr_dencoded;        // (N, 2 D)
    float* lpr_da;              // (N, H)
    double* lpr_gram;           // (D, D)
} Scratch;

// What a model is made for decides what memory it gets.
typedef enum {
    FOR_TRAINING,               // everything
    FOR_SCORING,                // forward passes: one layer's activations serve all, no gradients
    FOR_GENERATION              // the same with a key/value cache, B = 1
} Purpose;

typedef struct {
    float aux, z;               // coefficients of the balance loss and the z-loss
    AuxForm aux_form;
    int adaptive;               // 1: each layer has a coefficient of its own, Model.aux_coefficients
} Balance;

// The parts of the objective, summed over forward passes: cross-entropy, and the balance loss and the z-loss without
// their coefficients, LPR's losses with them.
typedef struct {
    double loss, aux, z, lpr;
    long passes;
} Losses;

// Sums over tokens of what routing looks like in one layer, gathered while Model.counting_load is 1.
typedef struct {
    double tokens, entropy, top_gate;           // entropy of probs in nats; the largest gate
    double sources, twins;                      // with families: distinct families chosen; tokens that chose two of one
} Observed;
enum { OBSERVED_NUMBERS = sizeof(Observed) / sizeof(double) };

typedef struct {
    double beta1, beta2, eps, weight_decay, clip;       // clip = 0: no clipping
} AdamW;

typedef struct Model Model;

// What the rest of the file does with a model. This file's functions do it on the CPU, train_moe.cu's on a GPU, where
// parameters, moments, gradients and results lie in memory of the GPU's own. There the host's copies, which saving,
// loading and reporting work on, are brought up to date by `send` and `read_back`; here these have nothing to do.
enum { PARAMETERS = 1, MOMENTS = 2, GRADIENTS = 4, LOGITS = 8, ROUTING = 16, LOSSES = 32, ROUTER_BIASES = 64 };
typedef struct {
    void (*plan)(Model* m);             // counts the memory: Model.bytes and its parts
    void (*allocate)(Model* m);         // takes it
    void (*release)(Model* m);          // and gives it back
    // model_forward, model_backward and model_update below; but a GPU's losses come later, so take_losses fetches them
    void (*forward)(Model* m, const int* tokens, const int* targets, int B, int T);
    void (*backward)(Model* m, float scale);
    double (*update)(Model* m, const AdamW* o, double lr, long step);
    void (*send)(Model* m, int what);       // PARAMETERS, MOMENTS, ROUTER_BIASES; always: the families
    void (*read_back)(Model* m, int what);  // any of the above; ROUTING: experts, gates; LOSSES: Model.sums, load
} Backend;

struct Model {
    const Backend* backend;
    Config config;
    Purpose purpose;
    int B, T;                   // the largest batch; a shorter one may be given
    int positions;              // the longest sequence: T, or the capacity of the cache
    Layout layout;
    float *params, *grads;      // (layout.total); grads are NULL without training, as are the next two
    float *exp_avg, *exp_avg_sq;// AdamW's moments
    Weights weights, dweights;
    LayerActivations* layers;   // (L)
    Scratch scratch;
    float* final_in;            // (N, H)       the residual stream after the last layer
    float* final_out;           // (N, H)       after the final norm
    float* final_rstd;          // (N)
    float* logits;              // (N, V), or (1, V) for generation: only the last token's
    float *losses, *losses_lse; // (N)
    float *cosines, *sines;     // (positions, HD / 2)
    float *cache_k, *cache_v;   // (L, positions, NKV HD)
    int cached;                 // positions in the cache
    int *tokens, *targets;      // (N)
    float* ones;                // (N)          gates of a dense layer
    int* identity;              // (N)          its assignment
    int batch, length;          // B and T of the last forward pass
    Balance balance;
    long *load;                 // (L, E)       assignments, counted while counting_load is 1, cleared by the caller
    Observed* observed;         // (L)
    FILE* trace;                // NULL, or where each token's experts and gates are listed
    long trace_window;          // the number of the batch's first window
    int counting_load;
    int* topk; // (L)          K of each layer in the next pass; all the config's unless training draws them
    // router variants
    int* family;                // (L, E)       the family of each expert: the copies of one expert share it
    int has_families;           // 1: some experts do
    int reads_bytes;            // 1: its tokens are the bytes of a text, for trainer.json
    long family_start;          // the step in which the copies were made, for trainer.json
    long* step_load;            // (L, E)       assignments of this optimizer step
    double* aux_coefficients;   // (L)
    uint64_t noise_seed;        // of LPR's noise,
    long noise_step;            // which differs in each pass
    double lpr_loss;            // of the last forward pass, with its weight
    double *all_counts, *all_probs;     // (E)  assignments and sums of probs over all sparse layers, for AUX_HF
    double loss, aux_loss, z_loss; // of the last forward pass: cross-entropy alone; the other two without coefficients
    Losses sums;                // of the forward passes since take_losses
    size_t bytes_params, bytes_optimizer, bytes_activations, bytes;
    void* memory;
    const char* source;         // the directory that the parameters were read from, or NULL
    const Model* owner;         // NULL, or the model whose parameters these are
    void* device;               // what the backend of a GPU keeps
};

// One allocation serves everything. The walk over what is needed is made twice: with base = NULL to count the bytes,
// then with the memory to hand it out.
typedef struct {
    char* base;
    size_t used;
} Arena;

static void* take(Arena* a, size_t bytes) {
    char* p = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 63) / 64 * 64 + ARRAY_GAP;
    if (p) {
        ASAN_POISON_MEMORY_REGION(p + bytes, a->base + a->used - (p + bytes));
    }
    return p;
}
static float* take_floats(Arena* a, long n) { return (float*)take(a, sizeof(float) * n); }

static void layer_activations_take(Arena* a, LayerActivations* s, const Config* c, int l, int max_topk, long N, int B,
                                   int T) {
    long H = c->hidden_size, HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads;
    long E = layer_experts(c, l), K = c->sparse[l] ? max_topk : 1, I = layer_width(c, l), D = c->lpr_latent_dim;
    s->x = take_floats(a, N * H);
    s->attn_in = take_floats(a, N * H);
    s->attn_rstd = take_floats(a, N);
    s->qkv = take_floats(a, N * qkv_width(c));
    s->q_rstd = take_floats(a, N * NH);
    s->k_rstd = take_floats(a, N * NKV);
    s->rotated = take_floats(a, N * (NH + NKV) * HD);
    s->attn = take_floats(a, N * NH * HD);
    s->lse = take_floats(a, (long)B * NH * T);
    s->x_mid = take_floats(a, N * H);
    s->ffn_in = take_floats(a, N * H);
    s->ffn_rstd = take_floats(a, N);
    s->gate_up = take_floats(a, N * K * 2 * I);
    s->offsets = (int*)take(a, sizeof(int) * (E + 1));
    if (c->sparse[l]) {
        s->router_logits = take_floats(a, N * E);
        s->router_lse = take_floats(a, N);
        s->probs = take_floats(a, N * E);
        s->gates = take_floats(a, N * K);
        s->experts = (int*)take(a, sizeof(int) * N * K);
        s->assignment = (int*)take(a, sizeof(int) * N * K);
        s->row_of = (int*)take(a, sizeof(int) * N * K);
        if (c->logit_norm > 0) s->router_raw = take_floats(a, N * E);
        if (c->router == ROUTER_LPR) {
            s->lpr_a = take_floats(a, N * H);
            s->lpr_input = take_floats(a, N * H);
            s->lpr_mean = take_floats(a, N);
            s->lpr_rstd = take_floats(a, N);
            s->lpr_encoded = take_floats(a, N * 2 * D);
            s->lpr_read_out = take_floats(a, N * D);
            s->lpr_targets = (double*)take(a, sizeof(double) * E * D);
        }
    }
}

#define NORM_BLOCK 65536        // floats in a partial sum of the gradient's norm,
#define NORM_LANES 64           // which is itself made of this many sums side by side

// What a model has on the host whichever backend computes it.
static void take_state(Model* m, Arena* a) {
    const Config* c = &m->config;
    long N = (long)m->B * m->T, E = c->num_experts > 0 ? c->num_experts : 1;
    size_t start = a->used;
    if (!m->owner) m->params = take_floats(a, m->layout.total);
    m->bytes_params = a->used - start;
    start = a->used;
    if (m->purpose == FOR_TRAINING) {
        m->grads = take_floats(a, m->layout.total);
        m->exp_avg = take_floats(a, m->layout.total);
        m->exp_avg_sq = take_floats(a, m->layout.total);
    }
    m->bytes_optimizer = a->used - start;
    m->logits = take_floats(a, (m->purpose == FOR_GENERATION ? 1 : N) * c->vocab_size);
    m->cosines = take_floats(a, (long)m->positions * (c->head_dim / 2));
    m->sines = take_floats(a, (long)m->positions * (c->head_dim / 2));
    m->tokens = (int*)take(a, sizeof(int) * N);
    m->targets = (int*)take(a, sizeof(int) * N);
    m->load = (long*)take(a, sizeof(long) * c->num_layers * E);
    m->step_load = (long*)take(a, sizeof(long) * c->num_layers * E);
    m->observed = (Observed*)take(a, sizeof(Observed) * c->num_layers);
    m->topk = (int*)take(a, sizeof(int) * c->num_layers);
    m->aux_coefficients = (double*)take(a, sizeof(double) * c->num_layers);
    m->family = (int*)take(a, sizeof(int) * c->num_layers * E);
}

// What the CPU's functions write and read besides.
static void take_activations(Model* m, Arena* a) {
    const Config* c = &m->config;
    long H = c->hidden_size, HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads;
    long N = (long)m->B * m->T, E = c->num_experts > 0 ? c->num_experts : 1, K = 1, RI = 0, R = 0;
    int training = m->purpose == FOR_TRAINING;
    size_t layers_start = a->used, layers_end = a->used;
    for (int l = 0; l < c->num_layers; l++) {
        if (!training) a->used = layers_start;      // layers write over each other
        layer_activations_take(a, &m->layers[l], c, l, most_topk(c), N, m->B, m->T);
        if (a->used > layers_end) layers_end = a->used;
        long rows = N * (c->sparse[l] ? most_topk(c) : 1);
        if (rows > R) R = rows;
        if (rows * layer_width(c, l) > RI) RI = rows * layer_width(c, l);
        if (c->sparse[l]) K = most_topk(c);
    }
    a->used = layers_end;
    Scratch* s = &m->scratch;
    s->rows_in = take_floats(a, R * H);
    s->rows_out = take_floats(a, R * H);
    s->act = take_floats(a, RI);
    s->attention = take_floats(a, attention_scratch_size(m->positions));
    s->balance = (double*)take(a, sizeof(double) * E);
    s->prob_sums = (double*)take(a, sizeof(double) * E);
    if (training) {
        s->dact = take_floats(a, RI);
        s->dgates = take_floats(a, N * K);
        s->drouter = take_floats(a, N * E);
        s->dx = take_floats(a, N * H);
        s->dnormed = take_floats(a, N * H);
        s->dattn = take_floats(a, N * NH * HD);
        s->dqkv = take_floats(a, N * qkv_width(c));
        s->drotated = take_floats(a, N * (NH + NKV) * HD);
        s->norm_sums = take_floats(a, rmsnorm_sums_size((int)N, imax(H, NH * HD)));
        s->norms = (double*)take(a, sizeof(double) * (m->layout.total / NORM_BLOCK + 1));
    }
    if (c->family_penalty > 0) s->family_shift = take_floats(a, N * E);
    if (c->router == ROUTER_LPR && training) {
        long D = c->lpr_latent_dim;
        s->lpr_dread_out = take_floats(a, N * D);
        s->lpr_dprobs = take_floats(a, N * E);
        s->lpr_dencoded = take_floats(a, N * 2 * D);
        s->lpr_da = take_floats(a, N * H);
        s->lpr_gram = (double*)take(a, sizeof(double) * D * D);
    }
    m->final_in = training ? take_floats(a, N * H) : m->layers[0].x;
    m->final_out = take_floats(a, N * H);
    m->final_rstd = take_floats(a, N);
    m->losses = take_floats(a, N);
    m->losses_lse = take_floats(a, N);
    if (m->purpose == FOR_GENERATION) {
        m->cache_k = take_floats(a, (long)c->num_layers * m->positions * NKV * HD);
        m->cache_v = take_floats(a, (long)c->num_layers * m->positions * NKV * HD);
    }
    m->ones = take_floats(a, N);
    m->identity = (int*)take(a, sizeof(int) * N);
    m->all_counts = (double*)take(a, sizeof(double) * E);
    m->all_probs = (double*)take(a, sizeof(double) * E);
}

static void model_take(Model* m, Arena* a) {
    take_state(m, a);
    take_activations(m, a);
    m->bytes = a->used;
    m->bytes_activations = m->bytes - m->bytes_params - m->bytes_optimizer;
}

// Counts what model_take will take.
static void cpu_plan(Model* m) {
    Arena arena = {NULL, 0};
    model_take(m, &arena);
}

static void cpu_allocate(Model* m) {
    Arena arena = {NULL, 0};
    if (posix_memalign(&m->memory, 1 << 21, m->bytes))
        die(1, "out of memory: this model and batch need %.1f MB; try a smaller --batch or --seq", m->bytes / 1e6);
#ifdef MADV_HUGEPAGE
    madvise(m->memory, m->bytes, MADV_HUGEPAGE);        // pages of 2 MB: 4 % of a step of a model of 100 M parameters
#endif
    memset(m->memory, 0, m->bytes);
    arena.base = (char*)m->memory;
    model_take(m, &arena);
    if (m->purpose != FOR_TRAINING) {       // layers lie over each other, and one's gaps in another's arrays
        ASAN_UNPOISON_MEMORY_REGION(m->memory, m->bytes);
    }
    for (int n = 0; n < m->B * m->T; n++) {
        m->ones[n] = 1;
        m->identity[n] = n;
    }
}

static void cpu_release(Model* m) { free(m->memory); }

static double model_forward(Model* m, const int* tokens, const int* targets, int B, int T);
static void model_backward(Model* m, float scale);
static double model_update(Model* m, const AdamW* o, double lr, long step);
static void cpu_forward(Model* m, const int* tokens, const int* targets, int B, int T) {
    model_forward(m, tokens, targets, B, T);
}
static void cpu_copy(Model* m, int what) { (void)m, (void)what; }       // there are no copies

static const Backend cpu_backend = {cpu_plan,       cpu_allocate, cpu_release, cpu_forward,
                                    model_backward, model_update, cpu_copy,    cpu_copy};
static const Backend* default_backend = &cpu_backend;       // of new models

// A model for batches of up to B sequences of T tokens, whose memory is counted (Model.bytes) but not yet allocated.
// For generation T is the largest number of tokens in one forward pass and `positions` the cache's capacity; otherwise
// positions = T. With an owner the new model uses the owner's parameters; without, they are to be set by model_init or
// checkpoint_load.
static Model* model_plan(const Config* c, Purpose purpose, int B, int T, int positions, const Model* owner) {
    Model* m = (Model*)checked_malloc(sizeof(Model));
    memset(m, 0, sizeof *m);
    m->config = *c;
    m->purpose = purpose;
    m->B = B;
    m->T = T;
    m->positions = positions;
    m->owner = owner;
    m->params = owner ? owner->params : NULL;
    m->layout = layout_create(c);
    m->layers = (LayerActivations*)checked_malloc(sizeof(LayerActivations) * c->num_layers);
    memset(m->layers, 0, sizeof(LayerActivations) * c->num_layers);
    m->backend = default_backend;
    m->backend->plan(m);
    return m;
}

// Gives a planned model its memory.
static void model_allocate(Model* m) {
    const Config* c = &m->config;
    m->backend->allocate(m);
    weights_point(&m->weights, c, &m->layout, m->params);
    if (m->grads) weights_point(&m->dweights, c, &m->layout, m->grads);
    rope_table(m->cosines, m->sines, m->positions, c->head_dim, c->rope_theta);
    for (int l = 0; l < c->num_layers; l++) m->topk[l] = layer_topk(c, l);
}

static Model* model_create(const Config* c, Purpose purpose, int B, int T, int positions, const Model* owner) {
    Model* m = model_plan(c, purpose, B, T, positions, owner);
    model_allocate(m);
    return m;
}

static void model_free(Model* m) {
    free(m->weights.layers);
    free(m->dweights.layers);
    free(m->layout.tensors);
    free(m->layers);
    m->backend->release(m);
    free(m);
}

// Training from scratch starts from N(0, 0.02); projections that add to the residual stream from N(0, 0.02 / sqrt(2
// L)), so that its variance does not grow with the depth (GPT-2); norms from 1. Each tensor draws from a stream of its
// own.
static void model_init(Model* m, uint64_t seed) {
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        float* w = m->params + t->offset;
        long size = tensor_size(t);
        int residual = strstr(t->name, "o_proj") || strstr(t->name, "down_proj") || strstr(t->name, ".w2.");
        double std = residual ? 0.02 / sqrt(2.0 * m->config.num_layers) : 0.02;
        if (strstr(t->name, "prototypes")) std = 1;         // LPR compares directions
        float constant = strstr(t->name, "bias") ? 0.0f : 1.0f;
        uint64_t key = random_key(seed, hash_string("init"), hash_string(t->name), 0);
        #pragma omp parallel for
        for (long j = 0; j < size; j++)
            w[j] = tensor_is_matrix(t) ? (float)(std * random_normal(mix64(key ^ (uint64_t)j))) : constant;
    }
}

// Parameters in all, and parameters that one token uses (all but the experts it is not sent to).
static void count_parameters(const Config* c, long* total, long* active) {
    Layout layout = {NULL, 0, 0, 0, NULL};
    layout_walk(&layout, c, NULL);
    *total = *active = layout.matrices + layout.total;
    for (int l = 0; l < c->num_layers; l++)
        *active -= (long)(layer_experts(c, l) - layer_topk(c, l)) * 3 * c->hidden_size * layer_width(c, l);
}

// Floating-point operations of training on one token: 2 for each active parameter forward and 4 backward (the LM head
// counts, looking up an embedding does not), and causal attention over T positions.
static double flops_per_token(const Config* c, int T) {
    long total, active;
    count_parameters(c, &total, &active);
    if (!c->tie_word_embeddings) active -= (long)c->vocab_size * c->hidden_size;
    return 6.0 * active + 6.0 * c->num_layers * c->num_heads * c->head_dim * T;
}

// Where layer l's keys and values are: in its own activations, or in the cache, which also holds the past.
typedef struct {
    const float *k, *v;
    long ld_k, ld_v;
} KeysValues;

static KeysValues layer_keys_values(const Model* m, int l) {
    const Config* c = &m->config;
    long HD = c->head_dim, NH = c->num_heads, NKV = c->num_kv_heads;
    KeysValues kv;
    if (m->purpose == FOR_GENERATION) {
        kv.k = m->cache_k + (long)l * m->positions * NKV * HD;
        kv.v = m->cache_v + (long)l * m->positions * NKV * HD;
        kv.ld_k = kv.ld_v = NKV * HD;
    } else {
        kv.k = m->layers[l].rotated + NH * HD;
        kv.v = m->layers[l].qkv + (NH + NKV) * HD;
        kv.ld_k = (NH + NKV) * HD;
        kv.ld_v = qkv_width(c);
    }
    return kv;
}

// x_mid = x + Wo attention(...)
static void attention_layer_forward(Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, T = m->length, H = c->hidden_size, HD = c->head_dim, NH = c->num_heads;
    int NKV = c->num_kv_heads, row = c->qk_norm == QK_NORM_ROW, past = m->purpose == FOR_GENERATION ? m->cached : 0;
    long QKV = qkv_width(c), QK = (long)(NH + NKV) * HD;
    float eps = (float)c->rms_norm_eps;
    rmsnorm_forward(s->attn_in, H, s->attn_rstd, s->x, H, w->attn_norm, N, 1, H, eps);
    matmul_forward(s->qkv, s->attn_in, w->qkv, N, H, (int)QKV);
    if (c->qk_norm == QK_NORM_NONE) {
        #pragma omp parallel for if (N > 1)
        for (int n = 0; n < N; n++) memcpy(s->rotated + n * QK, s->qkv + n * QKV, sizeof(float) * QK);
    } else {        // per head: NH vectors of HD; per row: one of NH HD
        rmsnorm_forward(s->rotated, QK, s->q_rstd, s->qkv, QKV, w->q_norm, N, row ? 1 : NH, row ? NH * HD : HD, eps);
        rmsnorm_forward(s->rotated + NH * HD, QK, s->k_rstd, s->qkv + NH * HD, QKV, w->k_norm, N, row ? 1 : NKV,
                        row ? NKV * HD : HD, eps);
    }
    rope(s->rotated, QK, NH + NKV, N, T, past, HD, m->cosines, m->sines, 1);
    if (m->purpose == FOR_GENERATION)
        for (int n = 0; n < N; n++) {
            long at = ((long)l * m->positions + past + n) * NKV * HD;
            memcpy(m->cache_k + at, s->rotated + n * QK + NH * HD, sizeof(float) * NKV * HD);
            memcpy(m->cache_v + at, s->qkv + n * QKV + QK, sizeof(float) * NKV * HD);
        }
    KeysValues kv = layer_keys_values(m, l);
    attention_forward(s->attn, s->lse, s->rotated, QK, kv.k, kv.ld_k, kv.v, kv.ld_v, m->batch, T, past + T, NH, NKV, HD,
                      m->scratch.attention);
    matmul_forward(s->x_mid, s->attn, w->attn_out, N, NH * HD, H);
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++)
        for (int i = 0; i < H; i++) s->x_mid[(long)n * H + i] += s->x[(long)n * H + i];
}

// In: scratch.dx, the gradient of x_mid. Out: scratch.dx, the gradient of x.
static void attention_layer_backward(Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, T = m->length, H = c->hidden_size, HD = c->head_dim, NH = c->num_heads;
    int NKV = c->num_kv_heads, row = c->qk_norm == QK_NORM_ROW;
    long QKV = qkv_width(c), QK = (long)(NH + NKV) * HD;
    matmul_backward_input(t->dattn, t->dx, w->attn_out, N, NH * HD, H, 0);
    matmul_backward_weight(dw->attn_out, t->dx, s->attn, N, NH * HD, H);
    KeysValues kv = layer_keys_values(m, l);
    attention_backward(t->drotated, t->drotated + NH * HD, t->dqkv + QK, t->dattn, s->attn, s->lse, s->rotated, QK,
                       kv.k, kv.ld_k, kv.v, kv.ld_v, QK, QKV, m->batch, T, NH, NKV, HD, t->attention);
    rope(t->drotated, QK, NH + NKV, N, T, 0, HD, m->cosines, m->sines, -1);
    if (c->qk_norm == QK_NORM_NONE) {
        #pragma omp parallel for
        for (int n = 0; n < N; n++) memcpy(t->dqkv + n * QKV, t->drotated + n * QK, sizeof(float) * QK);
    } else {
        rmsnorm_backward(t->dqkv, QKV, 0, dw->q_norm, t->drotated, QK, s->qkv, QKV, w->q_norm, s->q_rstd, N,
                         row ? 1 : NH, row ? NH * HD : HD, t->norm_sums);
        rmsnorm_backward(t->dqkv + NH * HD, QKV, 0, dw->k_norm, t->drotated + NH * HD, QK, s->qkv + NH * HD, QKV,
                         w->k_norm, s->k_rstd, N, row ? 1 : NKV, row ? NKV * HD : HD, t->norm_sums);
    }
    matmul_backward_input(t->dnormed, t->dqkv, w->qkv, N, H, (int)QKV, 0);
    matmul_backward_weight(dw->qkv, t->dqkv, s->attn_in, N, H, (int)QKV);
    rmsnorm_backward(t->dx, H, 1, dw->attn_norm, t->dnormed, H, s->x, H, w->attn_norm, s->attn_rstd, N, 1, H,
                     t->norm_sums);
}

// After routing: counts the load, and adds this layer's share to the balance losses.
static void balance_layer_forward(Model* m, int l) {
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, E = m->config.num_experts, K = m->topk[l];
    double* prob_sums = m->scratch.prob_sums;
    sum_columns(prob_sums, s->probs, N, E);
    for (int e = 0; e < E; e++) {
        long count = s->offsets[e + 1] - s->offsets[e];
        if (m->counting_load) {
            m->load[(long)l * E + e] += count;
            m->step_load[(long)l * E + e] += count;
        }
        m->all_counts[e] += count;
        m->all_probs[e] += prob_sums[e];
        if (m->balance.aux_form == AUX_SWITCH) m->aux_loss += E * (count / ((double)N * K)) * (prob_sums[e] / N);
    }
    for (int n = 0; n < N; n++) m->z_loss += (double)s->router_lse[n] * s->router_lse[n] / N;
}

// What balance_backward needs to know of layer l for the gradient of  scale * (aux * aux_loss + z * z_loss). f (E)
static void balance_weights(const Model* m, int l, float scale, double* f, double* aux_weight, double* z_weight) {
    const int* offsets = m->layers[l].offsets;
    int E = m->config.num_experts, per_layer = m->balance.aux_form == AUX_SWITCH;
    double N = (double)m->batch * m->length, tokens_seen = N * count_sparse(&m->config);
    for (int e = 0; e < E; e++)
        f[e] = per_layer ? (offsets[e + 1] - offsets[e]) / (N * m->topk[l]) : m->all_counts[e] / tokens_seen;
    double aux = m->balance.adaptive ? m->aux_coefficients[l] : m->balance.aux;
    *aux_weight = scale * aux * E / (per_layer ? N : tokens_seen);
    *z_weight = 2.0 * scale * m->balance.z / N;
}

// Section 9, to be skipped: routers other than softmax top-K, and figures of what the router does.
static const float* variant_router_forward(Model* m, int l);
static void variant_router_backward(Model* m, int l, const double* f, double aux_weight, double z_weight, float scale);
static void observe_layer(Model* m, int l);

// out = x_mid + sum over the token's experts of gate f(n2(x_mid))
static void ffn_layer_forward(Model* m, int l, float* out) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, H = c->hidden_size, sparse = c->sparse[l];
    int E = layer_experts(c, l), K = m->topk[l], I = layer_width(c, l);
    const float* experts_in = s->ffn_in;        // (N, H)       what the experts read, in the order of the tokens;
    const float* rows_in = s->ffn_in;           // (N K, H)     the same, sorted by expert
    rmsnorm_forward(s->ffn_in, H, s->ffn_rstd, s->x_mid, H, w->ffn_norm, N, 1, H, (float)c->rms_norm_eps);
    if (sparse) {
        if (has_router_variant(c)) {
            experts_in = variant_router_forward(m, l);
        } else {
            matmul_forward(s->router_logits, s->ffn_in, w->router, N, H, E);
            softmax_router_forward(s->probs, s->router_lse, s->experts, s->gates, s->router_logits, N, E, K,
                                   c->norm_topk_prob);
        }
        group_by_expert(s->offsets, s->assignment, s->row_of, s->experts, N, K, E);
        gather_rows(m->scratch.rows_in, experts_in, s->assignment, N * K, K, H);
        rows_in = m->scratch.rows_in;
        balance_layer_forward(m, l);
        if (m->counting_load) observe_layer(m, l);
    } else {
        s->offsets[0] = 0;
        s->offsets[1] = N;
    }
    grouped_matmul_forward(s->gate_up, rows_in, w->gate_up, 2L * I * H, H, 2 * I, E, s->offsets);
    swiglu_forward(m->scratch.act, s->gate_up, N * K, I);
    grouped_matmul_forward(m->scratch.rows_out, m->scratch.act, w->down, (long)H * I, I, H, E, s->offsets);
    combine_rows(out, s->x_mid, m->scratch.rows_out, sparse ? s->gates : NULL, sparse ? s->row_of : m->identity, N, K,
                 H);
}

// In: scratch.dx, the gradient of the layer's output. Out: scratch.dx, the gradient of x_mid.
static void ffn_layer_backward(Model* m, int l, float scale) {
    const Config* c = &m->config;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = c->hidden_size, sparse = c->sparse[l];
    int E = layer_experts(c, l), K = m->topk[l], I = layer_width(c, l);
    const float *rows_in = s->ffn_in, *rows_dout = t->dx;
    if (sparse) {
        gather_rows(t->rows_in, c->router == ROUTER_LPR ? s->lpr_input : s->ffn_in, s->assignment, N * K, K, H);
        gather_rows(t->rows_out, t->dx, s->assignment, N * K, K, H);
        rows_in = t->rows_in;
        rows_dout = t->rows_out;
    }
    grouped_matmul_backward_input(t->dact, rows_dout, w->down, (long)H * I, I, H, E, s->offsets, 0);
    float* dgate_up = s->gate_up;       // the last use of gate_up: its gradient takes its place
    swiglu_backward(dgate_up, t->act, t->dgates, t->dact, s->gate_up, sparse ? s->gates : m->ones,
                    sparse ? s->assignment : m->identity, N * K, I);
    grouped_matmul_backward_weight(dw->down, rows_dout, t->act, (long)H * I, I, H, E, s->offsets);
    grouped_matmul_backward_weight(dw->gate_up, dgate_up, rows_in, 2L * I * H, H, 2 * I, E, s->offsets);
    float* drows = t->rows_out;         // the experts' inputs' gradient; rows_dout has been used up
    if (!sparse) drows = t->dnormed;
    grouped_matmul_backward_input(drows, dgate_up, w->gate_up, 2L * I * H, H, 2 * I, E, s->offsets, 0);
    if (sparse) {
        combine_rows(t->dnormed, NULL, drows, NULL, s->row_of, N, K, H);
        double aux_weight, z_weight;
        balance_weights(m, l, scale, t->balance, &aux_weight, &z_weight);
        if (has_router_variant(c)) {
            variant_router_backward(m, l, t->balance, aux_weight, z_weight, scale);
        } else {
            softmax_router_backward(t->drouter, t->dgates, s->probs, s->experts, s->gates, N, E, K, c->norm_topk_prob);
            balance_backward(t->drouter, s->router_lse, s->probs, t->balance, aux_weight, z_weight, N, E);
            matmul_backward_input(t->dnormed, t->drouter, w->router, N, H, E, 1);
            matmul_backward_weight(dw->router, t->drouter, s->ffn_in, N, H, E);
        }
    }
    rmsnorm_backward(t->dx, H, 1, dw->ffn_norm, t->dnormed, H, s->x_mid, H, w->ffn_norm, s->ffn_rstd, N, 1, H,
                     t->norm_sums);
}

// Runs B sequences of T tokens (B T) through the model. With targets (B T), the next tokens, it returns the mean
// cross-entropy in nats; with NULL it only makes logits. For generation (B = 1) the tokens follow those in the cache.
static double model_forward(Model* m, const int* tokens, const int* targets, int B, int T) {
    const Config* c = &m->config;
    int N = B * T, H = c->hidden_size, V = c->vocab_size, E = c->num_experts;
    m->batch = B;
    m->length = T;
    memcpy(m->tokens, tokens, sizeof(int) * N);
    m->aux_loss = m->z_loss = m->lpr_loss = m->loss = 0;
    for (int e = 0; e < E; e++) m->all_counts[e] = m->all_probs[e] = 0;
    embedding_forward(m->layers[0].x, m->tokens, m->weights.embedding, N, H);
    for (int l = 0; l < c->num_layers; l++) {
        attention_layer_forward(m, l);
        ffn_layer_forward(m, l, l + 1 < c->num_layers ? m->layers[l + 1].x : m->final_in);
    }
    if (m->balance.aux_form == AUX_HF && count_sparse(c) > 0) {
        double tokens_seen = (double)N * count_sparse(c);
        for (int e = 0; e < E; e++) m->aux_loss += E * m->all_counts[e] / tokens_seen * m->all_probs[e] / tokens_seen;
    }
    int wanted = N;                     // rows of logits
    const float* x = m->final_in;
    if (m->purpose == FOR_GENERATION) {
        m->cached += T;
        wanted = 1;
        x += (long)(N - 1) * H;
    }
    rmsnorm_forward(m->final_out, H, m->final_rstd, x, H, m->weights.final_norm, wanted, 1, H, (float)c->rms_norm_eps);
    matmul_forward(m->logits, m->final_out, m->weights.lm_head, wanted, H, V);
    if (!targets) return 0;
    memcpy(m->targets, targets, sizeof(int) * N);
    cross_entropy_forward(m->losses, m->losses_lse, m->logits, m->targets, N, V);
    for (int n = 0; n < N; n++) m->loss += m->losses[n];
    m->loss /= N;
    m->sums.loss += m->loss;
    m->sums.aux += m->aux_loss;
    m->sums.z += m->z_loss;
    m->sums.lpr += m->lpr_loss;
    m->sums.passes++;
    return m->loss;
}

// Adds to the gradients that of  scale * (loss + aux * aux_loss + z * z_loss + lpr_loss)  of the last forward pass,
// which must have had targets. It uses up the activations: the logits become their gradient.
static void model_backward(Model* m, float scale) {
    const Config* c = &m->config;
    int N = m->batch * m->length, H = c->hidden_size, V = c->vocab_size;
    Scratch* t = &m->scratch;
    cross_entropy_backward(m->logits, m->losses_lse, m->targets, N, V, scale / N);
    matmul_backward_input(t->dnormed, m->logits, m->weights.lm_head, N, H, V, 0);
    matmul_backward_weight(m->dweights.lm_head, m->logits, m->final_out, N, H, V);
    rmsnorm_backward(t->dx, H, 0, m->dweights.final_norm, t->dnormed, H, m->final_in, H, m->weights.final_norm,
                     m->final_rstd, N, 1, H, t->norm_sums);
    for (int l = c->num_layers - 1; l >= 0; l--) {
        ffn_layer_backward(m, l, scale);
        attention_layer_backward(m, l);
    }
    embedding_backward(m->dweights.embedding, t->dx, m->tokens, N, H);
}

// The 2-norm of all gradients together. The sum is made of fixed blocks, added in order: any number of threads agrees.
static double gradient_norm(Model* m) {
    long blocks = m->layout.total / NORM_BLOCK + 1;
    #pragma omp parallel for
    for (long b = 0; b < blocks; b++) {
        long end = lmin((b + 1) * NORM_BLOCK, m->layout.total), i = b * NORM_BLOCK;
        double sum = 0;
        while (i < end) {                       // short sums in floats, side by side as vectors; their total in doubles
            float lanes[NORM_LANES] = {0};
            for (long stop = i + 64 * NORM_LANES; i + NORM_LANES <= end && i < stop; i += NORM_LANES)
                for (int k = 0; k < NORM_LANES; k++) lanes[k] += m->grads[i + k] * m->grads[i + k];
            for (int k = 0; k < NORM_LANES; k++) sum += lanes[k];
            if (end - i < NORM_LANES)
                for (; i < end; i++) sum += (double)m->grads[i] * m->grads[i];
        }
        m->scratch.norms[b] = sum;
    }
    double sum = 0;
    for (long b = 0; b < blocks; b++) sum += m->scratch.norms[b];
    return sqrt(sum);
}

// One AdamW step (Loshchilov and Hutter 2019) on n parameters, with g the gradient times `clip_scale`:
//     m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//     w -= lr (m / correction1) / (sqrt(v / correction2) + eps) + lr decay w           correction_i = 1 - beta_i^step
// and the gradient is cleared for the next step while it is at hand.
static void adamw(float* w, float* grad, float* m, float* v, long n, float clip_scale, float lr, float decay,
                  float beta1, float beta2, float eps, float correction1, float correction2) {
    float rate = lr / correction1, root = 1.0f / sqrtf(correction2), keep = 1.0f - lr * decay;
    #pragma omp parallel for simd schedule(static)
    for (long i = 0; i < n; i++) {
        float g = grad[i] * clip_scale;
        float m_i = beta1 * m[i] + (1.0f - beta1) * g, v_i = beta2 * v[i] + (1.0f - beta2) * g * g;
        m[i] = m_i;
        v[i] = v_i;
        w[i] = keep * w[i] - rate * m_i / (sqrtf(v_i) * root + eps);
        grad[i] = 0;
    }
}

// Updates the parameters from the gradients and clears them; step counts from 1. Weight decay is for matrices alone.
// Returns the norm of the gradients before they were clipped; if it is not finite, nothing is updated.
static double model_update(Model* m, const AdamW* o, double lr, long step) {
    double norm = gradient_norm(m), scale = 1;
    if (!isfinite(norm)) return norm;
    if (o->clip > 0 && norm + 1e-6 > o->clip) scale = o->clip / (norm + 1e-6);          // as clip_grad_norm_
    float correction1 = (float)(1 - pow(o->beta1, (double)step)),
          correction2 = (float)(1 - pow(o->beta2, (double)step));
    long matrices = m->layout.matrices, vectors = m->layout.total - matrices;
    adamw(m->params, m->grads, m->exp_avg, m->exp_avg_sq, matrices, (float)scale, (float)lr, (float)o->weight_decay,
          (float)o->beta1, (float)o->beta2, (float)o->eps, correction1, correction2);
    adamw(m->params + matrices, m->grads + matrices, m->exp_avg + matrices, m->exp_avg_sq + matrices, vectors,
          (float)scale, (float)lr, 0, (float)o->beta1, (float)o->beta2, (float)o->eps, correction1, correction2);
    return norm;
}

// The means over the forward passes (with targets) since the last call.
static Losses take_losses(Model* m) {
    m->backend->read_back(m, LOSSES);
    Losses mean = m->sums;
    mean.loss /= (double)mean.passes;
    mean.aux /= (double)mean.passes;
    mean.z /= (double)mean.passes;
    mean.lpr /= (double)mean.passes;
    memset(&m->sums, 0, sizeof m->sums);
    return mean;
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. Data
//
// Raw text, in which every byte is a token, or shards of tokens as llm.c writes them: a header of 256 int32 (magic,
// version, number of tokens), then the tokens. Windows of T + 1 tokens start every T tokens and never cross files.

enum { SHARD_HEADER = 1024, SHARD_MAGIC_16 = 20240520, SHARD_MAGIC_32 = 20240801 };

// The text that is trained on when no --data is given: the project's own source files, written into this header when
// the program is built. Without `make` there is none.
#if defined(__has_include)
#if __has_include("build/embedded.h")
#include "build/embedded.h"
#define HAVE_EMBEDDED 1
#endif
#endif
#ifndef HAVE_EMBEDDED
static const unsigned char embedded_text[1] = {0};
static const long embedded_size = 0;
#endif

typedef enum { WHOLE, TRAIN_PART, VAL_PART } Part;      // of a raw text: all, all but the last tenth, the last tenth

typedef struct {
    char* path;
    int fd;                 // -1: the embedded text
    int width;              // bytes in a token: 1 raw text, 2 or 4 in shards
    long start;             // where this part's tokens start in the file, in bytes
    long count;             // tokens in this part
    long windows;
} DataFile;

typedef struct {
    DataFile* files;
    int num_files;
    int T, vocab_size, raw;             // raw = 1: bytes are tokens
    long windows, tokens;
    unsigned char* buffer;              // (T + 1, 4) a window as it is in the file
    char error[512];                    // what was wrong with the last window
} Dataset;

static int32_t read_i32(const unsigned char* p) {
    return (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}

// reads exactly n bytes at an offset; 0 if the file ends before or cannot be read
static int read_at(int fd, void* buffer, size_t n, long offset) {
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (char*)buffer + done, n - done, offset + (long)done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        done += (size_t)got;
    }
    return 1;
}

// Whether the model's tokens are the bytes of a text. PERHAPS: nothing says so, and nothing says otherwise.
typedef enum { NO_BYTES, BYTES, PERHAPS_BYTES } BytesAllowed;

static void warn_of_bytes(const char* text, int vocab_size) {
    fprintf(stderr, "%s: warning: %s is read as bytes, but nothing says what the model's %d tokens mean\n",
            program_name, text, vocab_size);
}

// Finds out what a file is and which part of it is used. Bad files end the program with one line.
static void data_file_open(DataFile* f, const char* path, int T, Part part, BytesAllowed raw_allowed) {
    memset(f, 0, sizeof *f);
    f->path = copy_string(path);
    long size;
    unsigned char header[SHARD_HEADER];
    if (!strcmp(path, "<embedded>")) {
        f->fd = -1;
        size = embedded_size;
        if (size == 0) die(2, "this build has no embedded text: build with `make`, or name a text with --data FILE");
    } else {
        struct stat st;
        f->fd = open(path, O_RDONLY);
        if (f->fd < 0) die(2, "%s: %s; expected a text or a .bin file of tokens", path, strerror(errno));
        if (fstat(f->fd, &st) || !S_ISREG(st.st_mode)) die(2, "%s: not a regular file", path);
        size = (long)st.st_size;
    }
    int magic = size >= 4 && f->fd >= 0 && read_at(f->fd, header, 4, 0) ? read_i32(header) : 0;
    size_t length = strlen(path);
    int named_bin = length > 4 && !strcmp(path + length - 4, ".bin");
    if (magic == SHARD_MAGIC_16 || magic == SHARD_MAGIC_32) {
        int version = magic == SHARD_MAGIC_16 ? 1 : 7;
        if (!read_at(f->fd, header, SHARD_HEADER, 0))
            die(2, "%s: the header ends at byte %ld; a token shard's has 1024", path, size);
        if (read_i32(header + 4) != version)
            die(2, "%s: version %d at byte 4, expected %d for magic %d", path, read_i32(header + 4), version, magic);
        f->width = magic == SHARD_MAGIC_16 ? 2 : 4;
        f->start = SHARD_HEADER;
        f->count = read_i32(header + 8);
        if (f->count < 0 || SHARD_HEADER + f->count * f->width != size)
            die(2, "%s: the header at byte 8 promises %ld tokens, which makes %ld bytes, but the file has %ld", path,
                f->count, SHARD_HEADER + f->count * f->width, size);
        if (f->count < T + 1) die(2, "%s: %ld tokens, but --seq %d needs at least %d", path, f->count, T, T + 1);
    } else {
        if (named_bin)
            die(2, "%s: magic %d at byte 0; a .bin file of tokens starts with %d (uint16) or %d (uint32)", path, magic,
                SHARD_MAGIC_16, SHARD_MAGIC_32);
        if (!raw_allowed)
            die(2, "%s: text, but this model does not read bytes; make token shards with data/tokenize_text.py", path);
        f->width = 1;
        long val = size / 10 > T + 1 ? size / 10 : T + 1;          // the last tenth, at least one window
        f->start = part == VAL_PART ? size - val : 0;
        f->count = part == WHOLE ? size : part == VAL_PART ? val : size - val;
        if (part == WHOLE && size < T + 1)
            die(2, "%s: %ld bytes, but --seq %d needs at least %d", path, size, T, T + 1);
        if (part != WHOLE && size < 2L * (T + 1))
            die(2, "%s: %ld bytes, but --seq %d needs at least %d (half of them for validation; --val none uses all)",
                path, size, T, 2 * (T + 1));
    }
    f->windows = (f->count - 1) / T;
}

// Opens the files of a comma-separated list of names and patterns; each pattern's files are sorted by name.
// raw_allowed = NO_BYTES refuses text: the model has a tokenizer, or fewer than 256 tokens.
static Dataset* dataset_open(const char* list, int T, int vocab_size, Part part, BytesAllowed raw_allowed) {
    Dataset* d = (Dataset*)checked_malloc(sizeof(Dataset));
    memset(d, 0, sizeof *d);
    d->T = T;
    d->vocab_size = vocab_size;
    d->buffer = (unsigned char*)checked_malloc(4 * ((size_t)T + 1));
    struct rlimit limit;            // each shard stays open: allow as many as the system does
    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    char *names = copy_string(list), *rest = names, *name;
    while ((name = strsep(&rest, ",")) != NULL) {
        glob_t found;
        memset(&found, 0, sizeof found);
        // a name without a match stands for itself, so that opening it says what is wrong
        if (glob(name, GLOB_NOCHECK, NULL, &found)) die(2, "%s: the file name or pattern cannot be read", name);
        for (size_t i = 0; i < found.gl_pathc; i++) {
            d->files = (DataFile*)realloc(d->files, sizeof(DataFile) * (d->num_files + 1));
            if (!d->files) die(1, "out of memory");
            DataFile* f = &d->files[d->num_files++];
            data_file_open(f, found.gl_pathv[i], T, part, raw_allowed);
            if (d->num_files > 1 && (f->width == 1) != d->raw)
                die(2, "%s: text and token shards cannot be mixed in one run", f->path);
            d->raw = f->width == 1;
            d->windows += f->windows;
            d->tokens += f->count;
        }
        globfree(&found);
    }
    free(names);
    if (d->raw && raw_allowed == PERHAPS_BYTES && part != VAL_PART) warn_of_bytes(list, vocab_size);
    return d;
}

static void dataset_close(Dataset* d) {
    for (int i = 0; i < d->num_files; i++) {
        if (d->files[i].fd >= 0) close(d->files[i].fd);
        free(d->files[i].path);
    }
    free(d->files);
    free(d->buffer);
    free(d);
}

// Window number w (in file order): tokens (T) and targets (T), the tokens that follow them. 0 and d->error if it cannot
// be read or holds a token that the vocabulary does not have.
static int dataset_read(Dataset* d, long w, int* tokens, int* targets) {
    DataFile* f = d->files;
    for (; w >= f->windows; f++) w -= f->windows;
    int T = d->T;
    long offset = f->start + w * T * f->width;
    const unsigned char* p = embedded_text + offset;
    if (f->fd >= 0) {
        p = d->buffer;
        if (!read_at(f->fd, d->buffer, ((size_t)T + 1) * f->width, offset)) {
            snprintf(d->error, sizeof d->error, "%.300s: cannot read %d tokens at byte %ld; has the file changed?",
                     f->path, T + 1, offset);
            return 0;
        }
    }
    for (int t = 0; t <= T; t++) {
        long token = f->width == 1 ? p[t] : f->width == 2 ? p[2 * t] | p[2 * t + 1] << 8 : read_i32(p + 4L * t);
        if (token < 0 || token >= d->vocab_size) {
            snprintf(d->error, sizeof d->error, "%.300s: token %ld at byte %ld; the vocabulary has 0 to %d", f->path,
                     token, offset + (long)t * f->width, d->vocab_size - 1);
            return 0;
        }
        if (t < T) tokens[t] = (int)token;
        if (t > 0) targets[t - 1] = (int)token;
    }
    return 1;
}

// The same where there is nothing to lose: bad data ends the program.
static void dataset_window(Dataset* d, long w, int* tokens, int* targets) {
    if (!dataset_read(d, w, tokens, targets)) die(2, "%s", d->error);
}

// Reads all shards once before a new run starts: a token that the vocabulary does not have is better found now than in
// the middle of the night. (A text's bytes are all in its vocabulary.)
static void dataset_check(Dataset* d) {
    enum { MOST = 16384 };
    unsigned char buffer[MOST * 4];
    for (int i = 0; i < d->num_files && !d->raw; i++) {
        const DataFile* f = &d->files[i];
        for (long first = 0; first < f->count; first += MOST) {
            long n = lmin(MOST, f->count - first), offset = f->start + first * f->width;
            if (!read_at(f->fd, buffer, (size_t)(n * f->width), offset))
                die(1, "%s: cannot be read at byte %ld", f->path, offset);
            for (long k = 0; k < n; k++) {
                long token = f->width == 2 ? buffer[2 * k] | buffer[2 * k + 1] << 8 : read_i32(buffer + 4 * k);
                if (token < 0 || token >= d->vocab_size)
                    die(2, "%s: token %ld at byte %ld; the vocabulary has 0 to %d", f->path, token,
                        offset + k * f->width, d->vocab_size - 1);
            }
        }
    }
}

// Sequence number `index` of training: every window once an epoch, in an order that (seed, epoch) fixes. So the
// position in the data is a function of the step, and a resumed run needs to remember nothing else. Returns as
// dataset_read.
static int dataset_training_sequence(Dataset* d, uint64_t seed, long index, int* tokens, int* targets) {
    uint64_t key = random_key(seed, hash_string("order"), (uint64_t)(index / d->windows), 0);
    return dataset_read(d, random_permutation(index % d->windows, d->windows, key), tokens, targets);
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Training loop

typedef enum { WSD, COSINE, CONSTANT } Schedule;

// All that decides what a run computes; --resume reads it back from trainer.json.
typedef struct {
    const char* data;
    const char* val;                    // NULL: the last tenth of a raw text; "none": no validation
    long steps;                         // in all, also after a resume
    int B, T, accum;                    // sequences, their length, micro-batches in a step
    double lr, min_lr, decay_frac;
    long warmup;
    Schedule schedule;
    AdamW adamw;
    uint64_t seed;
    long val_every, val_batches, save_every, sample_every;
    // router variants, section 9
    double bias_rate;                   // of the sigmoid router's bias
    int topk_low, topk_high;            // each layer draws its K in every step; 0: the model's K
    double family_strength;             // penalty of families, and over how many steps it goes
    long family_steps, family_start;    // from the step in which the copies were made
} Run;

// The learning rate of step 0, 1, ..: a linear rise over `warmup` steps, then
//     WSD       constant, and a linear fall to min_lr over the last decay_frac of all steps
//     COSINE    half a cosine wave down to min_lr
static double learning_rate(const Run* r, long step) {
    if (step < r->warmup) return r->lr * (double)(step + 1) / (double)r->warmup;
    if (r->schedule == COSINE) {
        double done = (double)(step - r->warmup) / (double)(r->steps - r->warmup > 0 ? r->steps - r->warmup : 1);
        return r->min_lr + (r->lr - r->min_lr) * 0.5 * (1 + cos(M_PI * (done < 1 ? done : 1)));
    }
    if (r->schedule == WSD) {
        double decay_steps = r->decay_frac * (double)r->steps, left = (double)(r->steps - step);
        if (left < decay_steps) return r->min_lr + (r->lr - r->min_lr) * (left > 0 ? left : 0) / decay_steps;
    }
    return r->lr;
}

// Room for one batch.
typedef struct {
    int *tokens, *targets;              // (B, T)
} Batch;

static Batch batch_create(int B, int T) {
    Batch batch;
    batch.tokens = (int*)checked_malloc(sizeof(int) * 2 * B * T);
    batch.targets = batch.tokens + (long)B * T;
    return batch;
}

// Mean loss over the first `batches` batches of a data set in file order (0: all of it).
static double evaluate(Model* m, Dataset* d, long batches, Batch batch) {
    long windows = batches > 0 ? lmin(batches * m->B, d->windows) : d->windows;
    double sum = 0;
    for (long w = 0; w < windows; w += m->B) {
        int B = (int)lmin(m->B, windows - w);
        for (int b = 0; b < B; b++)
            dataset_window(d, w + b, batch.tokens + (long)b * d->T, batch.targets + (long)b * d->T);
        m->trace_window = w;
        m->backend->forward(m, batch.tokens, batch.targets, B, d->T);
        sum += take_losses(m).loss * B;
    }
    return sum / (double)windows;
}

// Explained in sections 9, 12 and 13.
static void router_before_step(Model* m, const Run* run, long step);
static void router_after_step(Model* m, const Run* run, long done);
static void report_load(const Model* m, int each, FILE* log, long step);
#define LOAD_HEADER \
    "step,layer,expert,assignments,gini,min_max,max_vio,dead,entropy,top_gate,twin_cosine,twins_together,sources"
static void clear_load(Model* m);
static const char* checkpoint_save(const Model* m, const char* out, long step);
static void print_sample(Model* generator, const Model* trained, uint64_t seed, int tokens);

static volatile sig_atomic_t stop_signal = 0;
// The first Ctrl-C or SIGTERM ends the run after the step at hand, a second one at once: saves are whole or not at all.
// (What comes within a second is the same one: timeout(1) signals the process and then its group.)
static void on_signal(int signal_number) {
    static double first;
    if (!stop_signal) {
        first = seconds();
        stop_signal = signal_number;
    } else if (seconds() - first > 1) {
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
}

// Also for a terminal that is closed, unless nohup has seen to that.
static void catch_signals(void) {
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN);
}

// Opens OUT/name for appending. A run that continues at `step` first drops the rows of later steps, which it will make
// again; a new run starts with the header.
static FILE* log_open(const char* out, const char* name, const char* header, long step) {
    char path[PATH_SIZE], temporary[PATH_SIZE], line[1024];
    join_path(path, out, name);
    join_path(temporary, out, ".log");
    FILE *kept = fopen(temporary, "w"), *old = step > 0 ? fopen(path, "r") : NULL;
    if (!kept) die(1, "%s: %s", temporary, strerror(errno));
    fprintf(kept, "%s\n", header);
    if (old) {
        if (fgets(line, sizeof line, old))
            while (fgets(line, sizeof line, old))
                if (strchr(line, '\n') && atol(line) <= step) fputs(line, kept);
        fclose(old);
    }
    if (fclose(kept) || rename(temporary, path)) die(1, "%s: %s", path, strerror(errno));
    FILE* log = fopen(path, "a");
    if (!log) die(1, "%s: %s", path, strerror(errno));
    return log;
}

static void print_duration(double s) {
    long left = (long)(s + 0.5);
    if (left >= 3600) fprintf(stderr, "%ld:%02ld:%02ld left", left / 3600, left / 60 % 60, left % 60);
    else fprintf(stderr, "%ld:%02ld left", left / 60, left % 60);
}

// Trains from first_step (0, or where the checkpoint in `out` stopped) to run->steps. out, val and generator may be
// NULL: then nothing is written, validated or sampled. Returns the exit code: 0, 1 after a failure, 128 + its number
// after a signal.
static int train(Model* m, const Run* run, Dataset* data, Dataset* val, Model* generator, const char* out,
                 long first_step) {
    int E = m->config.num_experts, T = run->T, terminal = isatty(2), exit_code = 0, stopping = 0, log_failed = 0;
    long saved = first_step, tokens_per_step = (long)run->B * T * run->accum;
    double flops = flops_per_token(&m->config, T), started = seconds();
    Batch batch = batch_create(run->B, T);
    FILE *log = NULL, *val_log = NULL, *load_log = NULL;
    if (out) {
        log = log_open(out, "log.csv", "step,tokens,train_loss,aux_loss,z_loss,lr,grad_norm,tokens_per_s,lpr_loss",
                       first_step);
        val_log = log_open(out, "val.csv", "step,tokens,val_loss", first_step);
        load_log = log_open(out, "load.csv", LOAD_HEADER, first_step);
    }
    catch_signals();
    if (out && run->steps == 0 && first_step == 0) { // a run of no steps saves the model as it starts
        const char* error = checkpoint_save(m, out, 0);
        if (error) fprintf(stderr, "%s: the model could not be saved: %s\n", program_name, error);
        else printf("no steps: the model is saved in %s as it starts\n", out);
        exit_code = error != NULL;
    } else if (first_step >= run->steps) {
        printf("nothing left to do: step %ld of %ld is reached\n", first_step, run->steps);
    }
    for (long step = first_step; step < run->steps && !stopping; step++) {
        double t0 = seconds(), lr = learning_rate(run, step), norm = NAN;
        const char* problem = NULL;
        Losses mean = {NAN, 0, 0, 0, 0};
        router_before_step(m, run, step);
        m->counting_load = 1;
        for (int micro = 0; micro < run->accum; micro++) {
            for (int b = 0; b < run->B && !problem; b++) {
                long index = (step * run->accum + micro) * run->B + b, at = (long)b * T;
                if (!dataset_training_sequence(data, run->seed, index, batch.tokens + at, batch.targets + at))
                    problem = data->error;
            }
            if (problem) break;
            m->backend->forward(m, batch.tokens, batch.targets, run->B, T);
            m->noise_step++;
            m->backend->backward(m, 1.0f / run->accum);
        }
        m->counting_load = 0;
        if (!problem) {             // (an infinite loss has no finite gradient, and then nothing is updated)
            norm = m->backend->update(m, &run->adamw, lr, step + 1);
            mean = take_losses(m);
        }
        if (!isfinite(norm)) {
            const char* advice = problem ? "" : "; try a lower --lr";
            if (!problem) problem = isfinite(mean.loss) ? "the gradient is not finite" : "the loss is not finite";
            fprintf(stderr, "%s%s: step %ld: %s; ", terminal ? "\n" : "", program_name, step + 1, problem);
            if (out && saved > 0) fprintf(stderr, "the checkpoint of step %ld in %s is intact%s\n", saved, out, advice);
            else fprintf(stderr, "nothing had been saved%s\n", advice);
            exit_code = 1;
            break;
        }
        router_after_step(m, run, step + 1);
        double elapsed = seconds() - t0, rate = tokens_per_step / elapsed;
        long done = step + 1;
        fprintf(stderr, "%sstep %ld/%ld | loss %.4f | lr %.2e | norm %.2f | %.0f tokens/s | %.1f GFLOP/s | ",
                terminal ? "\r" : "", done, run->steps, mean.loss, lr, norm, rate, rate * flops * 1e-9);
        print_duration((seconds() - started) / (done - first_step) * (run->steps - done));
        fprintf(stderr, terminal ? "\033[K" : "\n");
        if (log) {
            fprintf(log, "%ld,%ld,%.6f,%.6f,%.6f,%.6e,%.6f,%.1f,%.6f\n", done, done * tokens_per_step, mean.loss,
                    mean.aux, mean.z, lr, norm, rate, mean.lpr);
        }
        int last = done == run->steps;
        if (last || (run->val_every > 0 && done % run->val_every == 0)) {
            fprintf(stderr, "%s", terminal ? "\n" : "");
            if (val) {
                double val_loss = evaluate(m, val, run->val_batches, batch);
                printf("step %ld: validation loss %.4f", done, val_loss);
                if (val->raw) printf(" nats (%.4f bits) a byte", val_loss / M_LN2);
                printf("\n");
                if (out) fprintf(val_log, "%ld,%ld,%.6f\n", done, done * tokens_per_step, val_loss);
            }
            if (m->has_families) m->backend->read_back(m, PARAMETERS);         // their similarity is reported
            if (E > 0) report_load(m, 0, load_log, done);
            fflush(stdout);
            clear_load(m);
        }
        if (out && (fflush(log) || fflush(val_log) || fflush(load_log)) && !log_failed) {
            fprintf(stderr, "%s%s: warning: the logs in %s are incomplete from step %ld on: %s\n", terminal ? "\n" : "",
                    program_name, out, done, strerror(errno));
            log_failed = 1;
        }
        if (generator && run->sample_every > 0 && done % run->sample_every == 0 && !last) {
            fprintf(stderr, "%s", terminal ? "\n" : "");
            print_sample(generator, m, run->seed, 200);
        }
        stopping = stop_signal && !last;        // looked at once a step: a signal that comes later stops the next one
        if (out && (last || stopping || (run->save_every > 0 && done % run->save_every == 0))) {
            m->backend->read_back(m, PARAMETERS | MOMENTS);
            const char* error = checkpoint_save(m, out, done);
            if (error) {
                fprintf(stderr, "%s%s: step %ld could not be saved: %s; ", terminal ? "\n" : "", program_name, done,
                        error);
                if (saved > 0) fprintf(stderr, "the checkpoint of step %ld in %s is intact\n", saved, out);
                else fprintf(stderr, "%s holds no checkpoint\n", out);
                exit_code = 1;
                break;
            }
            saved = done;
        }
    }
    fprintf(stderr, "%s", terminal ? "\n" : "");
    if (stopping && !exit_code) {
        if (out && saved > 0)
            fprintf(stderr, "%s: stopped by a signal; step %ld is saved in %s, --resume goes on\n", program_name, saved,
                    out);
        else
            fprintf(stderr, "%s: stopped by a signal; nothing was saved, as there was no %s\n", program_name,
                    out ? "step to save" : "--out");
        exit_code = 128 + stop_signal;
    }
    if (log) {
        fclose(log);
        fclose(val_log);
        fclose(load_log);
    }
    free(batch.tokens);
    return exit_code;
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. Router variants
//
// Everything that a router can be besides softmax top-K. Two things can happen to the logits z on their way to the
// choice, in this order, and there are two kinds of scores besides softmax:
//
//     logit norm    z' = lambda (z - mean z) / (std z + 1e-6)                                             Skywork-MoE
//     families      z'_e = z_e - penalty for every copy of an expert but the best one                        see below
//     sigmoid       s = sigmoid(z'), the K largest s + bias are chosen, gates from s alone                 DeepSeek-V3
//     LPR           z = cosine of an encoding of the token and a prototype of the expert       Latent Prototype Routing
//
// variant_router_forward and variant_router_backward at the end of this section put them together.

// z' (N, E) = lambda (z - mean) / (std + 1e-6), with each token's mean and (population) standard deviation over the
// experts (Wei et al. 2024, 2406.06563, section 3.1)
static void logit_norm_forward(float* out, const float* z, int N, int E, float lambda) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* z_n = z + (long)n * E;
        double mean = 0, square = 0;
        for (int e = 0; e < E; e++) mean += (double)z_n[e] / E;
        for (int e = 0; e < E; e++) square += (z_n[e] - mean) * (z_n[e] - mean) / E;
        for (int e = 0; e < E; e++) out[(long)n * E + e] = (float)(lambda * (z_n[e] - mean) / (sqrt(square) + 1e-6));
    }
}

// In place: the gradient of z' becomes that of z. With c = z - mean, r = std + 1e-6:
//     dc_e = lambda / r (dz'_e - c_e sum_j(dz'_j c_j) / (E std r))            dz_e = dc_e - mean(dc)
static void logit_norm_backward(float* dz, const float* z, int N, int E, float lambda) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* z_n = z + (long)n * E;
        float* dz_n = dz + (long)n * E;
        double mean = 0, square = 0, along = 0, dmean = 0;
        for (int e = 0; e < E; e++) mean += (double)z_n[e] / E;
        for (int e = 0; e < E; e++) square += (z_n[e] - mean) * (z_n[e] - mean) / E;
        for (int e = 0; e < E; e++) along += dz_n[e] * (z_n[e] - mean);
        double std = sqrt(square), r = std + 1e-6;
        for (int e = 0; e < E; e++) {
            double through_std = std > 0 ? (z_n[e] - mean) * along / (E * std * r) : 0;
            dz_n[e] = (float)(lambda / r * (dz_n[e] - through_std));
            dmean += (double)dz_n[e] / E;
        }
        for (int e = 0; e < E; e++) dz_n[e] -= (float)dmean;
    }
}

// Families. Copies of one expert score alike, so plain top-K would pick the copies of the best expert and not the K
// best experts. A penalty on all members of a family but its best one puts that off: while it is infinite, at most one
// copy of each expert is chosen and every gate is what it was before the copying, so the model computes what it did
// before. Equal members, as exact copies are at first, are told apart by a hash of (layer, position in the sequence,
// family): so copies see different tokens, and a cache, a resumed run and a GPU agree. In place; the gradient passes
// unchanged. scores (N, E): what the best member has most of: z, or sigmoid(z) + bias. shift (N, E): what was
// subtracted, 0 or the penalty. family (E): each expert's family. Row n is at position start + n % T of its sequence.
static void penalise_families(float* z, float* shift, const float* scores, const int* family, float penalty, int layer,
                              int N, int T, int start, int E) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* scores_n = scores + (long)n * E;
        for (int e = 0; e < E; e++) {
            int beaten = 0, tied = 0, before = 0;       // is a member better; members that equal e; those ahead of e
            for (int j = 0; j < E; j++) {
                if (family[j] != family[e]) continue;
                beaten |= scores_n[j] > scores_n[e];
                tied += scores_n[j] == scores_n[e];
                before += scores_n[j] == scores_n[e] && j < e;
            }
            uint64_t hash = random_key(0x46414D, (uint64_t)layer, (uint64_t)(start + n % T), (uint64_t)family[e]);
            int best = !beaten && before == (int)((hash >> 32) % (uint64_t)(tied > 0 ? tied : 1));
            shift[(long)n * E + e] = best ? 0 : penalty;
            z[(long)n * E + e] -= shift[(long)n * E + e];
        }
    }
}

// The penalty in step t of S: infinite at first, then strength (S / t - 1), nothing from S on.
static double family_penalty_at(double strength, long t, long S) {
    if (t >= S) return 0;
    return t == 0 ? INFINITY : strength * ((double)S / (double)t - 1);
}

// scores (N, E) = sigmoid(z) + bias, by which experts are chosen; bias (E)
static void sigmoid_scores(float* scores, const float* z, const float* bias, int N, int E) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int e = 0; e < E; e++) scores[(long)n * E + e] = 1.0f / (1.0f + fast_exp(-z[(long)n * E + e])) + bias[e];
}

// Sigmoid scores with a bias that balances the load without a loss (DeepSeek-V3, 2412.19437; Wang et al., 2408.15664):
//     s = sigmoid(z)     S = the K experts with the largest s + bias - shift     gate_e = s_e, or s_e / sum over S of s
// The bias takes part in nothing else. probs (N, E) = s / sum of s stands in for the probabilities in the balance loss;
// lse (N) = logsumexp(z). shift (N, E) or NULL is what families subtracted from z: it is taken from s + bias as well,
// because s of a penalised expert tends to 0, but s + bias would not fall below all others.
static void sigmoid_router_forward(float* probs, float* lse, int* experts, float* gates, const float* z,
                                   const float* bias, const float* shift, int N, int E, int K, int norm_topk) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* z_n = z + (long)n * E;
        float *p = probs + (long)n * E, *gates_n = gates + (long)n * K, max = z_n[0], exp_sum = 0, sum = 0,
              gate_sum = 0;
        int* experts_n = experts + (long)n * K;
        for (int e = 1; e < E; e++) max = z_n[e] > max ? z_n[e] : max;
        for (int e = 0; e < E; e++) exp_sum += fast_exp(z_n[e] - max);
        lse[n] = max + logf(exp_sum);
        for (int e = 0; e < E; e++)
            p[e] = 1.0f / (1.0f + fast_exp(-z_n[e])) + bias[e] - (shift ? shift[(long)n * E + e] : 0);
        choose_topk(experts_n, p, E, K);
        for (int e = 0; e < E; e++) sum += p[e] = 1.0f / (1.0f + fast_exp(-z_n[e]));
        for (int k = 0; k < K; k++) gate_sum += gates_n[k] = p[experts_n[k]];
        for (int k = 0; k < K && norm_topk; k++) gates_n[k] /= gate_sum;
        for (int e = 0; e < E; e++) p[e] /= sum;
    }
}

// dz (N, E) from dgates (N, K), and from the balance losses (aux_weight, z_weight and f as in balance_backward):
//     renormalised: ds_e = (dgate_e - sum over S of gate_j dgate_j) / sum over S of s;    otherwise ds_e = dgate_e
//     balance:      ds_e += aux_weight (f_e - sum_j f_j p_j) / sum of s,  p = s / sum of s
//     dz_e = ds_e s_e (1 - s_e) + z_weight lse exp(z_e - lse)
static void sigmoid_router_backward(float* dz, const float* dgates, const float* z, const float* probs,
                                    const float* lse, const int* experts, const float* gates, const double* f,
                                    double aux_weight, double z_weight, int N, int E, int K, int norm_topk) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *z_n = z + (long)n * E, *p = probs + (long)n * E, *gates_n = gates + (long)n * K;
        const float* dgates_n = dgates + (long)n * K;
        const int* experts_n = experts + (long)n * K;
        float *dz_n = dz + (long)n * E, sum = 0, chosen_sum = 0, mean = 0;
        double f_mean = 0;
        for (int e = 0; e < E; e++) {
            sum += 1.0f / (1.0f + fast_exp(-z_n[e]));
            f_mean += f[e] * p[e];
        }
        for (int e = 0; e < E; e++) dz_n[e] = (float)(aux_weight * (f[e] - f_mean)) / sum;
        for (int k = 0; k < K; k++) {
            chosen_sum += 1.0f / (1.0f + fast_exp(-z_n[experts_n[k]]));
            mean += gates_n[k] * dgates_n[k];
        }
        for (int k = 0; k < K; k++) dz_n[experts_n[k]] += norm_topk ? (dgates_n[k] - mean) / chosen_sum : dgates_n[k];
        for (int e = 0; e < E; e++) {
            float s = 1.0f / (1.0f + fast_exp(-z_n[e]));
            dz_n[e] = dz_n[e] * s * (1.0f - s) + (float)z_weight * lse[n] * fast_exp(z_n[e] - lse[n]);
        }
    }
}

// Once a step, from the load of the whole batch: bias_e += rate sign(mean load - load_e). counts, bias (E)
static void update_router_bias(float* bias, const long* counts, int E, double rate) {
    long total = 0;
    for (int e = 0; e < E; e++) total += counts[e];
    for (int e = 0; e < E; e++) {
        long over = counts[e] * E - total;              // E (load - mean load), exactly: an expert at the mean stays
        bias[e] += (float)(over < 0 ? rate : over > 0 ? -rate : 0);
    }
}

// The balance loss's coefficient can follow each layer's imbalance (Skywork-MoE, 2406.06563, section 3.2):
//     coefficient <- .99 coefficient + .01 min(imbalance / 5, .01),       imbalance = 1/2 sum_e |f_e - 1/E|
// where the paper's rate of dropped tokens becomes the share of assignments over an even load, as nothing is dropped
// here.
static double adapted_aux(double coefficient, const long* counts, int E) {
    double total = 0, imbalance = 0;
    for (int e = 0; e < E; e++) total += (double)counts[e];
    for (int e = 0; e < E; e++) imbalance += 0.5 * fabs((double)counts[e] / total - 1.0 / E);
    return 0.99 * coefficient + 0.01 * fmin(imbalance / 5, 0.01);
}

// Latent Prototype Routing (Yang 2025, 2506.21328). A token and an expert meet in a space of D dimensions:
//     a = silu(LayerNorm(h))        [mu, logvar] = a W_enc^T + b_enc        score_e = cos(mu, prototype_e)
//     chosen = the K best scores, gates = softmax over them      read_out = sum over e of softmax(score)_e prototype_e
//     the experts' input is  h + read_out W_out^T + b_out,  and the objective gets
//     weight (diversity (Div(mu) + Div(prototypes)) + kl KL + align Align)
//     Div(X) = mean over pairs (i, j) of (n_i n_j - [i = j])^2, n = x / |x|. Over T tokens it is
//              (|Xn^T Xn|^2 - T) / T^2, which needs a D x D matrix and not a T x T one
//     KL = mean over tokens of -1/2 sum(1 + logvar - mu^2 - exp(logvar))
//     Align = mean over (e, d) of |prototype_e - target_e|; the target is a constant:
//             target_e = sum over tokens of rho_e (mu + exp(logvar / 2) eps), rho = softmax over all experts of the
//             scores of the chosen ones and 0 for the others

#define LPR_EPS 1e-5f           // of the LayerNorm

// a (N, H) = silu(LayerNorm(h)); mean, rstd (N) are kept
static void lpr_normalise_forward(float* a, float* mean, float* rstd, const float* h, const float* weight,
                                  const float* bias, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* h_n = h + (long)n * H;
        float sum = 0, square = 0;
        for (int i = 0; i < H; i++) sum += h_n[i];
        float m = sum / H;
        for (int i = 0; i < H; i++) square += (h_n[i] - m) * (h_n[i] - m);
        float r = 1.0f / sqrtf(square / H + LPR_EPS);
        for (int i = 0; i < H; i++) {
            float u = (h_n[i] - m) * r * weight[i] + bias[i];
            a[(long)n * H + i] = u / (1.0f + fast_exp(-u));
        }
        mean[n] = m;
        rstd[n] = r;
    }
}

// dh += the gradient of h; da (N, H) is overwritten by the gradient of u, the LayerNorm's output.
//     silu'(u) = s (1 + u (1 - s))      dh = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)),  dxhat = du weight
static void lpr_normalise_backward(float* dh, float* dweight, float* dbias, float* da, const float* h,
                                   const float* mean, const float* rstd, const float* weight, const float* bias, int N,
                                   int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* h_n = h + (long)n * H;
        float *du = da + (long)n * H, d_mean = 0, d_along = 0;
        for (int i = 0; i < H; i++) {
            float xhat = (h_n[i] - mean[n]) * rstd[n], u = xhat * weight[i] + bias[i], s = 1.0f / (1.0f + fast_exp(-u));
            du[i] *= s * (1.0f + u * (1.0f - s));
            d_mean += du[i] * weight[i] / H;
            d_along += du[i] * weight[i] * xhat / H;
        }
        for (int i = 0; i < H; i++) {
            float xhat = (h_n[i] - mean[n]) * rstd[n];
            dh[(long)n * H + i] += rstd[n] * (du[i] * weight[i] - d_mean - xhat * d_along);
        }
    }
    #pragma omp parallel for
    for (int i = 0; i < H; i++)
        for (int n = 0; n < N; n++) {
            dweight[i] += da[(long)n * H + i] * (h[(long)n * H + i] - mean[n]) * rstd[n];
            dbias[i] += da[(long)n * H + i];
        }
}

static void add_bias(float* x, const float* bias, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int i = 0; i < C; i++) x[(long)n * C + i] += bias[i];
}

static void add_bias_gradient(float* dbias, const float* dx, int N, int C) {
    for (int n = 0; n < N; n++)
        for (int i = 0; i < C; i++) dbias[i] += dx[(long)n * C + i];
}

static float norm_of(const float* x, int D) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += x[d] * x[d];
    return sqrtf(sum);
}

// scores (N, E) = cosines of mu (the first half of each row of encoded (N, 2 D)) and prototypes (E, D)
static void lpr_scores(float* scores, const float* encoded, const float* prototypes, int N, int E, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* mu = encoded + (long)n * 2 * D;
        float length = norm_of(mu, D);
        for (int e = 0; e < E; e++) {
            const float* p = prototypes + (long)e * D;
            float dot = 0;
            for (int d = 0; d < D; d++) dot += mu[d] * p[d];
            scores[(long)n * E + e] = dot / (length * norm_of(p, D));
        }
    }
}

// With n = mu / |mu| and q = p / |p|:    dmu += dscore (q - score n) / |mu|        dp += dscore (n - score q) / |p|
static void lpr_scores_backward(float* dencoded, float* dprototypes, const float* dscores, const float* scores,
                                const float* encoded, const float* prototypes, int N, int E, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* mu = encoded + (long)n * 2 * D;
        float length = norm_of(mu, D);
        for (int e = 0; e < E; e++) {
            const float* p = prototypes + (long)e * D;
            float p_length = norm_of(p, D), score = scores[(long)n * E + e], dscore = dscores[(long)n * E + e];
            for (int d = 0; d < D; d++)
                dencoded[(long)n * 2 * D + d] += dscore * (p[d] / p_length - score * mu[d] / length) / length;
        }
    }
    #pragma omp parallel for
    for (int e = 0; e < E; e++) {
        const float* p = prototypes + (long)e * D;
        float p_length = norm_of(p, D);
        for (int n = 0; n < N; n++) {
            const float* mu = encoded + (long)n * 2 * D;
            float length = norm_of(mu, D), score = scores[(long)n * E + e], dscore = dscores[(long)n * E + e];
            for (int d = 0; d < D; d++)
                dprototypes[(long)e * D + d] += dscore * (mu[d] / length - score * p[d] / p_length) / p_length;
        }
    }
}

// The diversity of M vectors of D numbers, row_step floats apart, and (if dx is not NULL) weight times its gradient
// added to dx. With n = x / |x| and G = Xn^T Xn (gram, (D, D)):
//     Div = (sum of G^2 - M) / M^2        dx += weight 4 / M^2 (G n - (n G n) n) / |x|
// The gradient by n is 4 (G n - n) / M^2; as |n| = 1, its part along n is lost.
static double lpr_diversity(float* dx, double* gram, const float* x, long row_step, int M, int D, double weight) {
    double sum = 0;
    memset(gram, 0, sizeof(double) * (size_t)D * (size_t)D);
    for (int i = 0; i < M; i++) {
        const float* x_i = x + i * row_step;
        double square = 0;
        for (int d = 0; d < D; d++) square += (double)x_i[d] * x_i[d];
        for (int d = 0; d < D; d++)
            for (int k = 0; k < D; k++) gram[d * D + k] += x_i[d] * x_i[k] / square;
    }
    for (int i = 0; i < D * D; i++) sum += gram[i] * gram[i];
    for (int i = 0; dx && i < M; i++) {
        const float* x_i = x + i * row_step;
        double square = 0, along = 0;
        for (int d = 0; d < D; d++) square += (double)x_i[d] * x_i[d];
        for (int d = 0; d < D; d++)
            for (int k = 0; k < D; k++) along += gram[d * D + k] * x_i[d] * x_i[k] / square;
        for (int d = 0; d < D; d++) {
            double g = 0;
            for (int k = 0; k < D; k++) g += gram[d * D + k] * x_i[k];
            dx[i * row_step + d] += (float)(weight * 4 / ((double)M * M) * (g - along * x_i[d]) / square);
        }
    }
    return (sum - M) / ((double)M * M);
}

// The noise of Align: N(0, 1) for token n and dimension d of a layer, a hash of what it is for.
ALSO_ON_GPU static float lpr_noise(uint64_t layer_key, long n, int d, int D) {
    return (float)random_normal(mix64(layer_key ^ (uint64_t)(n * D + d)));
}

// KL, and the targets of Align: target (E, D) = sum (or mean) over tokens of rho_e (mu + exp(logvar / 2) eps)
static double lpr_targets(double* targets, const float* encoded, const float* scores, const int* experts,
                          uint64_t layer_key, int mean, int N, int E, int K, int D) {
    double kl = 0;
    for (long i = 0; i < (long)E * D; i++) targets[i] = 0;
    for (int n = 0; n < N; n++) {
        const float *mu = encoded + (long)n * 2 * D, *logvar = mu + D;
        const int* experts_n = experts + (long)n * K;
        double sum = E - K;                             // exp(0) for each expert that was not chosen
        for (int k = 0; k < K; k++) sum += exp((double)scores[(long)n * E + experts_n[k]]);
        for (int d = 0; d < D; d++) {
            double var = exp((double)logvar[d]), z = mu[d] + sqrt(var) * lpr_noise(layer_key, n, d, D);
            kl -= 0.5 * (1 + logvar[d] - (double)mu[d] * mu[d] - var) / N;
            if (mean) z /= N;
            for (int e = 0; e < E; e++) targets[(long)e * D + d] += z / sum;
            for (int k = 0; k < K; k++)
                targets[(long)experts_n[k] * D + d] += z * (exp((double)scores[(long)n * E + experts_n[k]]) - 1) / sum;
        }
    }
    return kl;
}

// LPR's part of the objective for one layer, and its targets for the backward pass.
static void lpr_losses_forward(Model* m, int l) {
    const Config* c = &m->config;
    LayerActivations* s = &m->layers[l];
    const LayerWeights* w = &m->weights.layers[l];
    int N = m->batch * m->length, E = c->num_experts, D = c->lpr_latent_dim;
    uint64_t layer_key = random_key(m->noise_seed, 0x4C5052, (uint64_t)m->noise_step, (uint64_t)l);
    double kl = lpr_targets(s->lpr_targets, s->lpr_encoded, s->router_logits, s->experts, layer_key, c->lpr_align_mean,
                            N, E, m->topk[l], D);
    double align = 0, *gram = m->scratch.lpr_gram;
    for (long i = 0; i < (long)E * D; i++) align += fabs(w->lpr_prototypes[i] - s->lpr_targets[i]) / ((double)E * D);
    double diversity = lpr_diversity(NULL, gram, s->lpr_encoded, 2 * D, N, D, 0) +
                       lpr_diversity(NULL, gram, w->lpr_prototypes, D, E, D, 0);
    m->lpr_loss += c->lpr_weight * (c->lpr_diversity * diversity + c->lpr_kl * kl + c->lpr_align * align);
}

// Adds the gradient of scale * that objective to dencoded (N, 2 D) and to the prototypes' gradient.
static void lpr_losses_backward(Model* m, int l, float* dencoded, double scale) {
    const Config* c = &m->config;
    LayerActivations* s = &m->layers[l];
    float *prototypes = m->weights.layers[l].lpr_prototypes, *dprototypes = m->dweights.layers[l].lpr_prototypes;
    int N = m->batch * m->length, E = c->num_experts, D = c->lpr_latent_dim;
    double weight = scale * c->lpr_weight;
    lpr_diversity(dencoded, m->scratch.lpr_gram, s->lpr_encoded, 2 * D, N, D, weight * c->lpr_diversity);
    lpr_diversity(dprototypes, m->scratch.lpr_gram, prototypes, D, E, D, weight * c->lpr_diversity);
    for (long i = 0; i < (long)E * D; i++) {
        double above = prototypes[i] - s->lpr_targets[i];
        dprototypes[i] += (float)(weight * c->lpr_align / ((double)E * D) * ((above > 0) - (above < 0)));
    }
    for (int n = 0; n < N; n++) {
        const float *mu = s->lpr_encoded + (long)n * 2 * D, *logvar = mu + D;
        float* dmu = dencoded + (long)n * 2 * D;
        for (int d = 0; d < D; d++) {
            dmu[d] += (float)(weight * c->lpr_kl / N * mu[d]);
            dmu[D + d] += (float)(weight * c->lpr_kl / N * -0.5 * (1 - exp((double)logvar[d])));
        }
    }
}

// From ffn_in (N, H) to router_logits, probs, experts and gates of layer l. Returns the experts' input (N, H).
static const float* variant_router_forward(Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, H = c->hidden_size, E = c->num_experts, K = m->topk[l], D = c->lpr_latent_dim;
    int start = m->purpose == FOR_GENERATION ? m->cached : 0;
    float* z = s->router_logits;
    if (c->router == ROUTER_LPR) {
        lpr_normalise_forward(s->lpr_a, s->lpr_mean, s->lpr_rstd, s->ffn_in, w->lpr_norm_weight, w->lpr_norm_bias, N,
                              H);
        matmul_forward(s->lpr_encoded, s->lpr_a, w->lpr_encoder, N, H, 2 * D);
        add_bias(s->lpr_encoded, w->lpr_encoder_bias, N, 2 * D);
        lpr_scores(z, s->lpr_encoded, w->lpr_prototypes, N, E, D);
        softmax_router_forward(s->probs, s->router_lse, s->experts, s->gates, z, N, E, K, 1);
        matmul_backward_input(s->lpr_read_out, s->probs, w->lpr_prototypes, N, D, E, 0);       // probs times prototypes
        matmul_forward(s->lpr_input, s->lpr_read_out, w->lpr_readout, N, D, H);
        add_bias(s->lpr_input, w->lpr_readout_bias, N, H);
        for (long i = 0; i < (long)N * H; i++) s->lpr_input[i] += s->ffn_in[i];
        if (m->purpose == FOR_TRAINING) lpr_losses_forward(m, l);
        return s->lpr_input;
    }
    matmul_forward(c->logit_norm > 0 ? s->router_raw : z, s->ffn_in, w->router, N, H, E);
    if (c->logit_norm > 0) logit_norm_forward(z, s->router_raw, N, E, (float)c->logit_norm);
    float* shift = NULL;
    if (c->family_penalty > 0) {
        shift = m->scratch.family_shift;
        if (c->router == ROUTER_SIGMOID) sigmoid_scores(s->probs, z, w->router_bias, N, E);
        else memcpy(s->probs, z, sizeof(float) * (size_t)N * (size_t)E);
        penalise_families(z, shift, s->probs, m->family + (long)l * E, (float)c->family_penalty, l, N, m->length, start,
                          E);
    }
    if (c->router == ROUTER_SIGMOID)
        sigmoid_router_forward(s->probs, s->router_lse, s->experts, s->gates, z, w->router_bias, shift, N, E, K,
                               c->norm_topk_prob);
    else softmax_router_forward(s->probs, s->router_lse, s->experts, s->gates, z, N, E, K, c->norm_topk_prob);
    return s->ffn_in;
}

// In: scratch.dgates, and in scratch.dnormed the gradient of the experts' input. Out: scratch.dnormed, that of ffn_in.
// f, aux_weight, z_weight as in balance_backward.
static void variant_router_backward(Model* m, int l, const double* f, double aux_weight, double z_weight, float scale) {
    const Config* c = &m->config;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = c->hidden_size, E = c->num_experts, K = m->topk[l], D = c->lpr_latent_dim;
    float* dz = t->drouter;
    if (c->router == ROUTER_SIGMOID) {
        sigmoid_router_backward(dz, t->dgates, s->router_logits, s->probs, s->router_lse, s->experts, s->gates, f,
                                aux_weight, z_weight, N, E, K, c->norm_topk_prob);
    } else {
        softmax_router_backward(dz, t->dgates, s->probs, s->experts, s->gates, N, E, K,
                                c->router == ROUTER_LPR || c->norm_topk_prob);
        balance_backward(dz, s->router_lse, s->probs, f, aux_weight, z_weight, N, E);
    }
    if (c->router != ROUTER_LPR) {
        if (c->logit_norm > 0) logit_norm_backward(dz, s->router_raw, N, E, (float)c->logit_norm);
        matmul_backward_input(t->dnormed, dz, w->router, N, H, E, 1);
        matmul_backward_weight(dw->router, dz, s->ffn_in, N, H, E);
        return;
    }
    // the read-out: probs -> read_out -> experts' input
    matmul_backward_weight(dw->lpr_readout, t->dnormed, s->lpr_read_out, N, D, H);
    add_bias_gradient(dw->lpr_readout_bias, t->dnormed, N, H);
    matmul_backward_input(t->lpr_dread_out, t->dnormed, w->lpr_readout, N, D, H, 0);
    matmul_backward_weight(dw->lpr_prototypes, s->probs, t->lpr_dread_out, N, D, E);
    matmul_forward(t->lpr_dprobs, t->lpr_dread_out, w->lpr_prototypes, N, D, E);
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *p = s->probs + (long)n * E, *dp = t->lpr_dprobs + (long)n * E;
        float mean = 0;
        for (int e = 0; e < E; e++) mean += p[e] * dp[e];
        for (int e = 0; e < E; e++) dz[(long)n * E + e] += p[e] * (dp[e] - mean);
    }
    // the scores and the encoder
    memset(t->lpr_dencoded, 0, sizeof(float) * (size_t)N * 2 * (size_t)D);
    lpr_losses_backward(m, l, t->lpr_dencoded, scale);
    lpr_scores_backward(t->lpr_dencoded, dw->lpr_prototypes, dz, s->router_logits, s->lpr_encoded, w->lpr_prototypes, N,
                        E, D);
    matmul_backward_weight(dw->lpr_encoder, t->lpr_dencoded, s->lpr_a, N, H, 2 * D);
    add_bias_gradient(dw->lpr_encoder_bias, t->lpr_dencoded, N, 2 * D);
    matmul_backward_input(t->lpr_da, t->lpr_dencoded, w->lpr_encoder, N, H, 2 * D, 0);
    lpr_normalise_backward(t->dnormed, dw->lpr_norm_weight, dw->lpr_norm_bias, t->lpr_da, s->ffn_in, s->lpr_mean,
                           s->lpr_rstd, w->lpr_norm_weight, w->lpr_norm_bias, N, H);
}

// Before each training step: draws each layer's K from topk_low .. topk_high (Matryoshka training, 2509.26520).
static void router_before_step(Model* m, const Run* run, long step) {
    for (int l = 0; l < m->config.num_layers && run->topk_high > 0; l++) {
        uint64_t draw = random_key(run->seed, hash_string("topk"), (uint64_t)step, (uint64_t)l);
        if (m->config.sparse[l])
            m->topk[l] = run->topk_low + (int)(draw % (uint64_t)(run->topk_high - run->topk_low + 1));
    }
    m->noise_seed = run->seed;
    m->noise_step = step * run->accum;
}

// After it, from the load of its whole batch: moves the sigmoid router's bias and the layers' balance coefficients (if
// they adapt), lowers the penalty of families, and goes back to the model's own K, with which it is validated and
// saved.
static void router_after_step(Model* m, const Run* run, long done) {
    Config* c = &m->config;
    for (int l = 0; l < c->num_layers; l++) {
        long* counts = m->step_load + (long)l * c->num_experts;
        if (c->sparse[l] && c->router == ROUTER_SIGMOID)
            update_router_bias(m->weights.layers[l].router_bias, counts, c->num_experts, run->bias_rate);
        if (c->sparse[l] && m->balance.adaptive)
            m->aux_coefficients[l] = adapted_aux(m->aux_coefficients[l], counts, c->num_experts);
        m->topk[l] = layer_topk(c, l);
    }
    if (c->router == ROUTER_SIGMOID) m->backend->send(m, ROUTER_BIASES);
    memset(m->step_load, 0, sizeof(long) * (size_t)c->num_layers * (size_t)c->num_experts);
    if (run->family_steps > 0)
        c->family_penalty = family_penalty_at(run->family_strength, done - run->family_start, run->family_steps);
}

// What users of mixtures of experts look at.

// One layer's load: x_e assignments of expert e, with mean over the E experts.
typedef struct {
    double gini;                // sum over pairs |x_i - x_j| / (2 E^2 mean): 0 all equal, 1 - 1/E one expert has all
    double min_max;             // smallest / largest
    double max_vio;             // (largest - mean) / mean
    int dead;                   // experts without a token
} LoadFigures;

static LoadFigures load_figures(const long* load, int E) {
    LoadFigures f = {0, 0, 0, 0};
    double sum = 0, differences = 0;
    long least = load[0], most = load[0];
    for (int i = 0; i < E; i++) {
        sum += (double)load[i];
        least = lmin(least, load[i]);
        most = load[i] > most ? load[i] : most;
        f.dead += load[i] == 0;
        for (int j = 0; j < i; j++) differences += 2 * fabs((double)load[i] - (double)load[j]);
    }
    if (sum == 0) return f;
    f.gini = differences / (2 * E * sum);
    f.min_max = (double)least / (double)most;
    f.max_vio = (double)most * E / sum - 1;
    return f;
}

// Lists each token's experts and gates in Model.trace.
static void trace_layer(const Model* m, int l) {
    const LayerActivations* s = &m->layers[l];
    int K = m->topk[l];
    for (long n = 0; n < (long)m->batch * m->length; n++) {
        fprintf(m->trace, "%ld,%ld,%d,%d", m->trace_window + n / m->length, n % m->length, m->tokens[n], l);
        for (int k = 0; k < K; k++) fprintf(m->trace, ",%d", s->experts[n * K + k]);
        for (int k = 0; k < K; k++) fprintf(m->trace, ",%.6f", s->gates[n * K + k]);
        fprintf(m->trace, "\n");
    }
}

// Adds a forward pass to layer l's Observed and writes its trace.
static void observe_layer(Model* m, int l) {
    LayerActivations* s = &m->layers[l];
    Observed* o = &m->observed[l];
    int N = m->batch * m->length, E = m->config.num_experts, K = m->topk[l];
    const int* family = m->family + (long)l * E;
    for (int n = 0; n < N; n++) {
        const float *p = s->probs + (long)n * E, *gates = s->gates + (long)n * K;
        const int* experts = s->experts + (long)n * K;
        int distinct = 0;
        double entropy = 0, top = 0;
        for (int e = 0; e < E; e++) entropy -= p[e] > 1e-30f ? p[e] * logf(p[e]) : 0;
        for (int k = 0; k < K; k++) {
            int known = 0;
            for (int j = 0; j < k && m->has_families; j++) known |= family[experts[j]] == family[experts[k]];
            distinct += !known;
            top = gates[k] > top ? gates[k] : top;
        }
        o->entropy += entropy;
        o->top_gate += top;
        o->sources += distinct;
        o->twins += distinct < K;
    }
    o->tokens += N;
    if (m->trace) trace_layer(m, l);
}

// Mean cosine between the weights (gate, up and down as one vector) of experts of the same family in layer l.
static double twin_similarity(const Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    long E = c->num_experts, size = (long)c->moe_intermediate_size * c->hidden_size, pairs = 0;
    double sum = 0;
    for (long a = 0; a < E; a++)
        for (long b = 0; b < a; b++) {
            if (m->family[l * E + a] != m->family[l * E + b]) continue;
            const float* parts[2][2] = {{w->gate_up + a * 2 * size, w->down + a * size},
                                        {w->gate_up + b * 2 * size, w->down + b * size}};
            double ab = 0, aa = 0, bb = 0;
            for (int part = 0; part < 2; part++) {
                const float *x = parts[0][part], *y = parts[1][part];
                #pragma omp simd reduction(+ : ab, aa, bb)
                for (long i = 0; i < (part ? 1 : 2) * size; i++) {
                    ab += (double)x[i] * y[i];
                    aa += (double)x[i] * x[i];
                    bb += (double)y[i] * y[i];
                }
            }
            sum += ab / sqrt(aa * bb);
            pairs++;
        }
    return pairs ? sum / (double)pairs : 0;
}

static void clear_load(Model* m) {
    size_t L = (size_t)m->config.num_layers, E = (size_t)(m->config.num_experts > 0 ? m->config.num_experts : 1);
    memset(m->load, 0, sizeof(long) * L * E);
    memset(m->observed, 0, sizeof(Observed) * L);
}

// All figures of one layer since the last clear_load; the last three are 0 without families.
typedef struct {
    LoadFigures load;
    double entropy, top_gate, twin_cosine, twins_together, sources;
} LayerFigures;

static LayerFigures layer_figures(const Model* m, int l) {
    const Observed* o = &m->observed[l];
    double tokens = o->tokens > 0 ? o->tokens : 1;
    LayerFigures f;
    f.load = load_figures(m->load + (long)l * m->config.num_experts, m->config.num_experts);
    f.entropy = o->entropy / tokens;
    f.top_gate = o->top_gate / tokens;
    f.twin_cosine = m->has_families ? twin_similarity(m, l) : 0;
    f.twins_together = m->has_families ? o->twins / tokens : 0;
    f.sources = m->has_families ? o->sources / tokens : 0;
    return f;
}

static int count_families(const Model* m);          // section 12
static void print_figures(const Model* m, const char* name, const LayerFigures* f) {
    printf("%s: Gini %.3f, min/max %.3f, MaxVio %.2f, dead %d, entropy %.3f, top gate %.3f", name, f->load.gini,
           f->load.min_max, f->load.max_vio, f->load.dead, f->entropy, f->top_gate);
    if (m->has_families) printf(", twins' cosine %.4f", f->twin_cosine);
    if (m->has_families && count_families(m) > 1)       // copies of one FFN are always chosen together
        printf(", chosen together %.3f, sources/token %.3f", f->twins_together, f->sources);
}

// Prints a line of means over the sparse layers (of dead experts: the sum), with each = 1 also one for each layer, and
// adds rows to `log` (NULL: none) as load.csv has them: a row for each expert, its layer's figures behind.
static void report_load(const Model* m, int each, FILE* log, long step) {
    const Config* c = &m->config;
    LayerFigures mean;
    memset(&mean, 0, sizeof mean);
    for (int l = 0; l < c->num_layers; l++) {
        if (!c->sparse[l]) continue;
        const long* load = m->load + (long)l * c->num_experts;
        LayerFigures f = layer_figures(m, l);
        double share = 1.0 / count_sparse(c);
        mean.load.gini += share * f.load.gini;
        mean.load.min_max += share * f.load.min_max;
        mean.load.max_vio += share * f.load.max_vio;
        mean.load.dead += f.load.dead;
        mean.entropy += share * f.entropy;
        mean.top_gate += share * f.top_gate;
        mean.twin_cosine += share * f.twin_cosine;
        mean.twins_together += share * f.twins_together;
        mean.sources += share * f.sources;
        if (each) {
            char name[32];
            snprintf(name, sizeof name, "layer %d", l);
            print_figures(m, name, &f);
            printf(", load");
            for (int e = 0; e < c->num_experts; e++) printf(" %ld", load[e]);
            printf("\n");
        }
        for (int e = 0; log && e < c->num_experts; e++) {
            fprintf(log, "%ld,%d,%d,%ld,%.6f,%.6f,%.6f,%d,%.6f,%.6f", step, l, e, load[e], f.load.gini, f.load.min_max,
                    f.load.max_vio, f.load.dead, f.entropy, f.top_gate);
            if (m->has_families) fprintf(log, ",%.6f,%.6f,%.6f\n", f.twin_cosine, f.twins_together, f.sources);
            else fprintf(log, ",,,\n");
        }
    }
    print_figures(m, "load", &mean);
    printf("\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// 10. JSON
//
// Functions of this and the next section are given files that may be broken or hostile. They return an error instead of
// ending the program, so that tests and fuzzers can call them: the first problem found is written to an Error.

typedef struct {
    char text[512];                 // empty: no error
} Error;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static int set_error(Error* error, const char* format, ...) {
    if (!error->text[0]) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
    }
    return 0;
}

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    char* key;                      // in an object: the member's name
    char* string;                   // JSON_STRING: its text; JSON_NUMBER: as it was written
    size_t length;                  // bytes of `string`, which may contain zeros
    double number;
    int count;                      // members of an array or object
    struct Json** items;            // (count); an object's are sorted by key
} Json;

// Values in a text: a tokenizer of 250,000 tokens has a million. More would only serve to fill up the memory.
enum { JSON_MOST_VALUES = 4000000 };

typedef struct {
    const char *start, *at, *end;
    Error* error;
    long values;                    // so far
} JsonReader;

static void json_free(Json* j) {
    if (!j) return;
    for (int i = 0; i < j->count; i++) json_free(j->items[i]);
    free(j->items);
    free(j->key);
    free(j->string);
    free(j);
}

static void json_space(JsonReader* r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) r->at++;
}

static int json_error(JsonReader* r, const char* expected) {
    return set_error(r->error, "not JSON: byte %ld: expected %s", (long)(r->at - r->start), expected);
}

// the bytes of a valid UTF-8 character at s, or 0
static int utf8_length(const char* s, const char* end) {
    const unsigned char* p = (const unsigned char*)s;
    int n = p[0] < 0x80                   ? 1
            : p[0] >= 0xC2 && p[0] < 0xE0 ? 2
            : (p[0] & 0xF0) == 0xE0       ? 3
            : p[0] >= 0xF0 && p[0] < 0xF5 ? 4
                                          : 0;
    if (n == 0 || end - s < n) return 0;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if (n == 3 && ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] >= 0xA0))) return 0; // overlong; surrogate
    if (n == 4 && ((p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] >= 0x90))) return 0; // overlong; too large
    return n;
}

static int utf8_write(char* out, uint32_t c) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)((n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | c);
    return n;
}

static int json_hex4(JsonReader* r, uint32_t* value) {
    *value = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        if (r->at >= r->end || !isxdigit((unsigned char)*r->at)) return json_error(r, "four hexadecimal digits");
        int c = tolower((unsigned char)*r->at);
        *value = *value * 16 + (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    return 1;
}

// the text between quotes, decoded; NULL on error
static char* json_string(JsonReader* r, size_t* length) {
    if (r->at >= r->end || *r->at != '"') {
        json_error(r, "a string");
        return NULL;
    }
    const char* close = ++r->at;
    while (close < r->end && *close != '"') close += *close == '\\' && close + 1 < r->end ? 2 : 1;
    char *out = (char*)checked_malloc((size_t)(close - r->at) + 1), *p = out;   // decoding never makes it longer
    while (r->at < r->end && *r->at != '"') {
        if (*r->at == '\\') {
            static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
            char c = r->at + 1 < r->end ? r->at[1] : 0;
            const char* found = c ? strchr(escapes, c) : NULL;
            uint32_t code, low;
            if (found) {
                *p++ = meanings[found - escapes];
                r->at += 2;
                continue;
            }
            if (c != 'u') { json_error(r, "an escape sequence"); break; }
            r->at += 2;
            if (!json_hex4(r, &code)) break;
            if (code >= 0xD800 && code < 0xDC00) {      // the first half of a pair
                if (r->end - r->at < 2 || r->at[0] != '\\' || r->at[1] != 'u') {
                    json_error(r, "a surrogate pair");
                    break;
                }
                r->at += 2;
                if (!json_hex4(r, &low)) break;
                if (low < 0xDC00 || low >= 0xE000) { json_error(r, "a surrogate pair"); break; }
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            } else if (code >= 0xDC00 && code < 0xE000) { json_error(r, "a surrogate pair"); break; }
            p += utf8_write(p, code);
        } else {
            int n = utf8_length(r->at, r->end);
            if (n == 0) { json_error(r, "UTF-8"); break; }
            if ((unsigned char)*r->at < 0x20) { json_error(r, "an escaped control character"); break; }
            memcpy(p, r->at, (size_t)n);
            p += n;
            r->at += n;
        }
    }
    if (!r->error->text[0] && r->at >= r->end) json_error(r, "a closing quote");
    if (r->error->text[0]) {
        free(out);
        return NULL;
    }
    r->at++;
    *p = 0;
    *length = (size_t)(p - out);
    return out;
}

static int json_compare_keys(const void* a, const void* b) {
    return strcmp((*(Json* const*)a)->key, (*(Json* const*)b)->key);
}

// Strict JSON numbers: no leading zeros, no plus sign, no bare point.
static int json_number(JsonReader* r, Json* j) {
    const char* start = r->at;
    if (r->at < r->end && *r->at == '-') r->at++;
    if (r->at < r->end && *r->at == '0') r->at++;
    else if (r->at < r->end && *r->at >= '1' && *r->at <= '9')
        while (r->at < r->end && isdigit((unsigned char)*r->at)) r->at++;
    else return json_error(r, "a value");
    if (r->at < r->end && *r->at == '.') {
        if (++r->at >= r->end || !isdigit((unsigned char)*r->at)) return json_error(r, "a digit");
        while (r->at < r->end && isdigit((unsigned char)*r->at)) r->at++;
    }
    if (r->at < r->end && (*r->at == 'e' || *r->at == 'E')) {
        r->at++;
        if (r->at < r->end && (*r->at == '+' || *r->at == '-')) r->at++;
        if (r->at >= r->end || !isdigit((unsigned char)*r->at)) return json_error(r, "a digit");
        while (r->at < r->end && isdigit((unsigned char)*r->at)) r->at++;
    }
    j->type = JSON_NUMBER;
    j->length = (size_t)(r->at - start);
    j->string = (char*)checked_malloc(j->length + 1);
    memcpy(j->string, start, j->length);
    j->string[j->length] = 0;
    j->number = strtod(j->string, NULL);
    return 1;
}

static Json* json_value(JsonReader* r, int depth) {
    Json* j = (Json*)checked_malloc(sizeof(Json));
    memset(j, 0, sizeof *j);
    json_space(r);
    char c = r->at < r->end ? *r->at : 0;
    if (depth > 64) {
        json_error(r, "at most 64 levels");
    } else if (++r->values > JSON_MOST_VALUES) {
        json_error(r, "at most 4 million values");
    } else if (c == '{' || c == '[') {
        char close = c == '{' ? '}' : ']';
        int capacity = 0;
        j->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        r->at++;
        json_space(r);
        if (r->at < r->end && *r->at == close) {
            r->at++;
            return j;
        }
        for (;;) {
            char* key = NULL;
            size_t length;
            json_space(r);
            if (c == '{') {
                key = json_string(r, &length);
                if (!key) break;
                if (strlen(key) != length) json_error(r, "a key without zero bytes");
                json_space(r);
                if (r->at >= r->end || *r->at != ':') json_error(r, "a colon");
                r->at++;
            }
            Json* item = r->error->text[0] ? NULL : json_value(r, depth + 1);
            if (!item) {
                free(key);
                break;
            }
            item->key = key;
            if (j->count == capacity) {
                capacity = capacity ? capacity * 2 : 8;
                j->items = (Json**)realloc(j->items, sizeof(Json*) * (size_t)capacity);
                if (!j->items) die(1, "out of memory");
            }
            j->items[j->count++] = item;
            json_space(r);
            if (r->at < r->end && *r->at == ',') {
                r->at++;
                continue;
            }
            if (r->at < r->end && *r->at == close) r->at++;
            else json_error(r, close == '}' ? "a comma or }" : "a comma or ]");
            break;
        }
        if (j->type == JSON_OBJECT && !r->error->text[0]) {
            qsort(j->items, (size_t)j->count, sizeof(Json*), json_compare_keys);
            for (int i = 1; i < j->count; i++)
                if (!strcmp(j->items[i - 1]->key, j->items[i]->key))
                    set_error(r->error, "not JSON: the name \"%.80s\" appears twice", j->items[i]->key);
        }
    } else if (c == '"') {
        j->type = JSON_STRING;
        j->string = json_string(r, &j->length);
    } else if (r->end - r->at >= 4 && !memcmp(r->at, "null", 4)) {
        j->type = JSON_NULL;
        r->at += 4;
    } else if (r->end - r->at >= 4 && !memcmp(r->at, "true", 4)) {
        j->type = JSON_TRUE;
        r->at += 4;
    } else if (r->end - r->at >= 5 && !memcmp(r->at, "false", 5)) {
        j->type = JSON_FALSE;
        r->at += 5;
    } else {
        json_number(r, j);
    }
    if (r->error->text[0]) {
        json_free(j);
        return NULL;
    }
    return j;
}

// The value of a whole text, to be freed with json_free; NULL and an error if it is not JSON.
static Json* json_parse(const char* text, size_t length, Error* error) {
    JsonReader r = {text, text, text + length, error, 0};
    Json* j = json_value(&r, 0);
    json_space(&r);
    if (j && r.at != r.end) json_error(&r, "the end");
    if (error->text[0]) {
        json_free(j);
        return NULL;
    }
    return j;
}

// The member of an object, or NULL (also if j is NULL or no object).
static const Json* json_get(const Json* j, const char* key) {
    if (!j || j->type != JSON_OBJECT) return NULL;
    for (int low = 0, high = j->count - 1; low <= high;) {
        int middle = (low + high) / 2, order = strcmp(key, j->items[middle]->key);
        if (order == 0) return j->items[middle];
        if (order < 0) high = middle - 1;
        else low = middle + 1;
    }
    return NULL;
}

// A member that is absent or null.
static int json_absent(const Json* j) { return !j || j->type == JSON_NULL; }

// The text of a file, to be freed; NULL and an error if it cannot be read or is larger than `limit`.
static char* read_file(const char* path, size_t limit, size_t* length, Error* error) {
    struct stat st;
    int fd = open(path, O_RDONLY);
    char* text = NULL;
    if (fd < 0 || fstat(fd, &st)) set_error(error, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode)) set_error(error, "%s: not a regular file", path);
    else if ((size_t)st.st_size > limit)
        set_error(error, "%s: %lld bytes, at most %zu expected", path, (long long)st.st_size, limit);
    else {
        *length = (size_t)st.st_size;
        text = (char*)checked_malloc(*length + 1);
        text[*length] = 0;
        if (!read_at(fd, text, *length, 0)) {
            set_error(error, "%s: cannot be read", path);
            free(text);
            text = NULL;
        }
    }
    if (fd >= 0) close(fd);
    return text;
}

static Json* json_read(const char* path, Error* error) {
    size_t length;
    Error inner = {""};
    char* text = read_file(path, 1 << 30, &length, error);
    if (!text) return NULL;
    Json* j = json_parse(text, length, &inner);
    if (!j) set_error(error, "%s: %s", path, inner.text);
    free(text);
    return j;
}

// A text that grows as it is written.
typedef struct {
    char* data;
    size_t length, capacity;
} Text;

static void text_add(Text* t, const char* bytes, size_t n) {
    if (t->length + n + 1 > t->capacity) {
        t->capacity = (t->length + n + 1) * 2;
        t->data = (char*)realloc(t->data, t->capacity);
        if (!t->data) die(1, "out of memory");
    }
    memcpy(t->data + t->length, bytes, n);
    t->length += n;
    t->data[t->length] = 0;
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void text_print(Text* t, const char* format, ...) {
    char buffer[1024];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    text_add(t, buffer, (size_t)imin(n, (int)sizeof buffer - 1));
}

// a string with quotes and escapes
static void text_json_string(Text* t, const char* s) {
    const char* end = s + strlen(s);
    text_print(t, "\"");
    for (int n; s < end; s += n) {
        n = utf8_length(s, end);
        if (*s == '"' || *s == '\\') text_print(t, "\\%c", *s);
        else if ((unsigned char)*s < 0x20) text_print(t, "\\u%04x", *s);
        else if (n > 0) text_add(t, s, (size_t)n);
        else text_print(t, "\\ufffd"); // the name of a file may be any bytes
        n = n > 0 ? n : 1;
    }
    text_print(t, "\"");
}

// The shortest decimal that reads back as the same number, always with a point or an exponent: 1e-06 must not become 0.
static void text_json_double(Text* t, double x) {
    char buffer[40];
    for (int precision = 1; precision <= 17; precision++) {
        snprintf(buffer, sizeof buffer, "%.*g", precision, x);
        if (strtod(buffer, NULL) == x) break;
    }
    text_print(t, strpbrk(buffer, ".en") ? "%s" : "%s.0", buffer);
}

// ---------------------------------------------------------------------------------------------------------------------
// 11. safetensors
//
// A file is 8 bytes with the length of a JSON header, the header, and the tensors' bytes. A model is one file, or
// several ("shards") with an index that names the file of each tensor.

typedef enum { DTYPE_F32, DTYPE_BF16, DTYPE_F16, DTYPE_I32, DTYPE_OTHER } Dtype; // OTHER is known but never converted

typedef struct {
    char* name;
    int file;                       // which of the opened files
    Dtype dtype;
    int ndim;
    long shape[4];
    long count;                     // numbers in the tensor
    long offset, bytes;             // where its bytes are in the file
    int used;                       // for the caller
} StoredTensor;

typedef struct {
    int num_files, num_tensors;
    int* fds;
    char** paths;
    StoredTensor* tensors;          // sorted by name
    Json* metadata;                 // of the first file, or NULL
} SafeTensors;

static void safetensors_close(SafeTensors* s) {
    if (!s) return;
    for (int i = 0; i < s->num_files; i++) {
        if (s->fds[i] >= 0) close(s->fds[i]);
        free(s->paths[i]);
    }
    for (int i = 0; i < s->num_tensors; i++) free(s->tensors[i].name);
    free(s->fds);
    free(s->paths);
    free(s->tensors);
    json_free(s->metadata);
    free(s);
}

static int compare_tensor_names(const void* a, const void* b) {
    return strcmp(((const StoredTensor*)a)->name, ((const StoredTensor*)b)->name);
}

static int compare_tensor_offsets(const void* a, const void* b) {
    const StoredTensor *x = (const StoredTensor*)a, *y = (const StoredTensor*)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);       // empty tensors first
}

// A whole number in 0 .. limit from JSON; -1 if it is none.
static long json_whole(const Json* j, long limit) {
    if (!j || j->type != JSON_NUMBER || strpbrk(j->string, "-.eE") || j->length > 18) return -1;
    long value = atol(j->string);
    return value <= limit ? value : -1;
}

// One entry of the header. `data` bytes of tensors follow the header.
static int parse_tensor(StoredTensor* t, const Json* entry, long data, Error* error) {
    static const struct { const char* name; int bytes; Dtype dtype; } known[] = {
        {"F32", 4, DTYPE_F32}, {"BF16", 2, DTYPE_BF16}, {"F16", 2, DTYPE_F16}, {"I32", 4, DTYPE_I32},
        {"F64", 8, DTYPE_OTHER}, {"I64", 8, DTYPE_OTHER}, {"U64", 8, DTYPE_OTHER}, {"U32", 4, DTYPE_OTHER},
        {"I16", 2, DTYPE_OTHER}, {"U16", 2, DTYPE_OTHER}, {"I8", 1, DTYPE_OTHER}, {"U8", 1, DTYPE_OTHER},
        {"BOOL", 1, DTYPE_OTHER}, {"F8_E4M3", 1, DTYPE_OTHER}, {"F8_E5M2", 1, DTYPE_OTHER}};
    const Json *dtype = json_get(entry, "dtype"), *shape = json_get(entry, "shape"),
               *offsets = json_get(entry, "data_offsets");
    const char* name = entry->key;
    int size = 0;
    if (!dtype || dtype->type != JSON_STRING) return set_error(error, "tensor %.100s: no dtype", name);
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(dtype->string, known[i].name)) {
            size = known[i].bytes;
            t->dtype = known[i].dtype;
        }
    if (!size) return set_error(error, "tensor %.100s: unknown dtype %.20s", name, dtype->string);
    if (!shape || shape->type != JSON_ARRAY || shape->count > 4)
        return set_error(error, "tensor %.100s: shape is not a list of at most 4 numbers", name);
    t->ndim = shape->count;
    t->count = 1;
    for (int i = 0; i < shape->count; i++) {
        t->shape[i] = json_whole(shape->items[i], LONG_MAX);
        if (t->shape[i] < 0) return set_error(error, "tensor %.100s: shape is not a list of whole numbers", name);
        if (__builtin_mul_overflow(t->count, t->shape[i], &t->count))
            return set_error(error, "tensor %.100s: the shape overflows", name);
    }
    if (__builtin_mul_overflow(t->count, (long)size, &t->bytes))
        return set_error(error, "tensor %.100s: the shape overflows", name);
    long begin =
        offsets && offsets->type == JSON_ARRAY && offsets->count == 2 ? json_whole(offsets->items[0], LONG_MAX) : -1;
    long end = begin >= 0 ? json_whole(offsets->items[1], LONG_MAX) : -1;
    if (begin < 0 || end < begin) return set_error(error, "tensor %.100s: data_offsets are not [begin, end]", name);
    if (end > data)
        return set_error(error,
                         "tensor %.100s: its data end at byte %ld, but the file has %ld bytes of data (truncated?)",
                         name, end, data);
    if (end - begin != t->bytes)
        return set_error(error, "tensor %.100s: its shape needs %ld bytes, data_offsets give %ld", name, t->bytes,
                         end - begin);
    t->offset = begin;
    return 1;
}

// Appends the tensors of one file. The tensors must fill the file from end to end, without holes and overlaps.
static int safetensors_add_file(SafeTensors* s, const char* path, Error* error) {
    Error inner = {""};
    struct stat st;
    unsigned char prefix[8];
    s->fds = (int*)realloc(s->fds, sizeof(int) * (size_t)(s->num_files + 1));
    s->paths = (char**)realloc(s->paths, sizeof(char*) * (size_t)(s->num_files + 1));
    if (!s->fds || !s->paths) die(1, "out of memory");
    int fd = open(path, O_RDONLY), file = s->num_files++;
    s->fds[file] = fd;
    s->paths[file] = copy_string(path);
    if (fd < 0 || fstat(fd, &st)) return set_error(error, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return set_error(error, "%s: not a regular file", path);
    long size = (long)st.st_size, length = 0;
    if (size < 8 || !read_at(fd, prefix, 8, 0))
        return set_error(error, "%s: %ld bytes are too short for safetensors", path, size);
    for (int i = 7; i >= 0; i--)
        length = i == 7 && prefix[i] > 127 ? LONG_MAX : length == LONG_MAX ? length : length << 8 | prefix[i];
    if (length > 100000000)
        return set_error(error, "%s: the header's length is over 100 MB; is this a safetensors file?", path);
    if (8 + length > size)
        return set_error(error, "%s: the header's %ld bytes go past the end of the file", path, length);
    char* text = (char*)checked_malloc((size_t)length + 1);
    Json* header = NULL;
    if (!read_at(fd, text, (size_t)length, 8)) set_error(error, "%s: the header cannot be read", path);
    else if (length == 0 || text[0] != '{') set_error(error, "%s: the header does not start with {", path);
    else header = json_parse(text, (size_t)length, &inner);
    free(text);
    if (!header) return set_error(error, "%s: %s", path, inner.text);
    int first = s->num_tensors;
    s->tensors = (StoredTensor*)realloc(s->tensors, sizeof(StoredTensor) * (size_t)(first + header->count + 1));
    if (!s->tensors) die(1, "out of memory");
    long at = 0;
    for (int i = 0; i < header->count; i++) {
        Json* entry = header->items[i];
        if (!strcmp(entry->key, "__metadata__")) {
            for (int k = 0; k < entry->count || entry->type != JSON_OBJECT; k++)
                if (entry->type != JSON_OBJECT || entry->items[k]->type != JSON_STRING) {
                    set_error(error, "%s: __metadata__ is not a map of strings", path);
                    break;
                }
            if (file == 0) {
                s->metadata = entry;
                header->items[i] = (Json*)checked_malloc(sizeof(Json));         // taken out of the tree
                memset(header->items[i], 0, sizeof(Json));
            }
            continue;
        }
        StoredTensor* t = &s->tensors[s->num_tensors];
        memset(t, 0, sizeof *t);
        t->file = file;
        if (!parse_tensor(t, entry, size - 8 - length, &inner)) break;
        t->name = copy_string(entry->key);
        s->num_tensors++;
    }
    json_free(header);
    qsort(s->tensors + first, (size_t)(s->num_tensors - first), sizeof(StoredTensor), compare_tensor_offsets);
    for (int i = first; i < s->num_tensors && !inner.text[0]; i++) {
        StoredTensor* t = &s->tensors[i];
        if (t->offset != at)
            set_error(&inner, "tensor %.100s starts at byte %ld of the data, expected %ld: %s", t->name, t->offset, at,
                      t->offset > at ? "a hole" : "an overlap");
        at = t->offset + t->bytes;
        t->offset += 8 + length;
    }
    if (!inner.text[0] && 8 + length + at != size)
        set_error(&inner, "%ld bytes follow the last tensor", size - 8 - length - at);
    if (inner.text[0]) set_error(error, "%s: %s", path, inner.text);
    return !error->text[0];
}

// The tensor of that name, or NULL.
static StoredTensor* safetensors_find(const SafeTensors* s, const char* name) {
    StoredTensor key;
    key.name = (char*)name;
    return (StoredTensor*)bsearch(&key, s->tensors, (size_t)s->num_tensors, sizeof(StoredTensor), compare_tensor_names);
}

static int safetensors_finish(SafeTensors* s, Error* error) {
    qsort(s->tensors, (size_t)s->num_tensors, sizeof(StoredTensor), compare_tensor_names);
    for (int i = 1; i < s->num_tensors; i++)
        if (!strcmp(s->tensors[i - 1].name, s->tensors[i].name))
            return set_error(error, "tensor %.100s is in two files: %s and %s", s->tensors[i].name,
                             s->paths[s->tensors[i - 1].file], s->paths[s->tensors[i].file]);
    return !error->text[0];
}

// Opens one file. NULL and an error if anything about it is wrong.
static SafeTensors* safetensors_open(const char* path, Error* error) {
    SafeTensors* s = (SafeTensors*)checked_malloc(sizeof(SafeTensors));
    memset(s, 0, sizeof *s);
    if (safetensors_add_file(s, path, error) && safetensors_finish(s, error)) return s;
    safetensors_close(s);
    return NULL;
}

// Opens DIR/model.safetensors, or the shards that DIR/model.safetensors.index.json names.
static SafeTensors* safetensors_open_model(const char* dir, Error* error) {
    char path[PATH_SIZE], index_path[PATH_SIZE];
    join_path(path, dir, "model.safetensors");
    join_path(index_path, dir, "model.safetensors.index.json");
    if (access(index_path, F_OK) || !access(path, F_OK)) return safetensors_open(path, error);
    Json* index = json_read(index_path, error);
    if (!index) return NULL;
    const Json* map = json_get(index, "weight_map");
    SafeTensors* s = (SafeTensors*)checked_malloc(sizeof(SafeTensors));
    memset(s, 0, sizeof *s);
    if (!map || map->type != JSON_OBJECT || map->count == 0) set_error(error, "%s: no weight_map", index_path);
    for (int i = 0; map && i < map->count && !error->text[0]; i++) {
        const char* file = map->items[i]->type == JSON_STRING ? map->items[i]->string : "";
        if (!*file || strchr(file, '/') || strchr(file, '\\') || file[0] == '.' || strlen(file) > 255) {
            set_error(error, "%s: weight_map sends %.80s to \"%.80s\", which is not a file name in this directory",
                      index_path, map->items[i]->key, file);
            break;
        }
        join_path(path, dir, file);
        int known = 0;
        for (int k = 0; k < s->num_files; k++) known |= !strcmp(s->paths[k], path);
        if (!known) safetensors_add_file(s, path, error);
    }
    if (!error->text[0]) safetensors_finish(s, error);
    for (int i = 0; map && i < map->count && !error->text[0]; i++) {
        StoredTensor* t = safetensors_find(s, map->items[i]->key);
        const char* file = t ? strrchr(s->paths[t->file], '/') + 1 : NULL;
        if (!t || strcmp(file, map->items[i]->string))
            set_error(error, "%s: tensor %.100s is not in %.80s", index_path, map->items[i]->key,
                      map->items[i]->string);
    }
    if (!error->text[0] && map->count != s->num_tensors)
        set_error(error, "%s: the shards hold %d tensors, weight_map lists %d", index_path, s->num_tensors, map->count);
    json_free(index);
    if (!error->text[0]) return s;
    safetensors_close(s);
    return NULL;
}

static float bf16_to_float(uint16_t h) {
    union { uint32_t bits; float value; } u;
    u.bits = (uint32_t)h << 16;
    return u.value;
}

static float f16_to_float(uint16_t h) {
    union { uint32_t bits; float value; } u;
    uint32_t exponent = (h >> 10) & 31, fraction = h & 1023u;
    if (exponent == 0) u.value = (float)fraction * 5.9604644775390625e-08f;             // subnormal: fraction 2^-24
    else u.bits = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;      // 112 = 127 - 15, the biases
    u.bits |= (uint32_t)(h & 0x8000) << 16;
    return u.value;
}

// Reads `count` numbers from number `first` of a tensor on, as floats.
static int safetensors_read(const SafeTensors* s, const StoredTensor* t, long first, long count, float* out,
                            Error* error) {
    int size = t->dtype == DTYPE_F32 ? 4 : 2;
    if (t->dtype != DTYPE_F32 && t->dtype != DTYPE_BF16 && t->dtype != DTYPE_F16)
        return set_error(error, "tensor %.100s: only F32, BF16 and F16 can be read", t->name);
    unsigned char buffer[65536];
    for (long done = 0; done < count;) {
        long n = lmin(count - done, (long)sizeof buffer / size);
        if (!read_at(s->fds[t->file], buffer, (size_t)(n * size), t->offset + (first + done) * size))
            return set_error(error, "%s: tensor %.100s cannot be read", s->paths[t->file], t->name);
        if (size == 4) memcpy(out + done, buffer, (size_t)n * 4);
        else
            for (long i = 0; i < n; i++) {
                uint16_t h = (uint16_t)(buffer[2 * i] | buffer[2 * i + 1] << 8);
                out[done + i] = t->dtype == DTYPE_BF16 ? bf16_to_float(h) : f16_to_float(h);
            }
        done += n;
    }
    return 1;
}

// A tensor to be written.
typedef struct {
    const char* name;
    const char* dtype;              // "F32" or "I32"
    int ndim;
    long shape[3];
    const void* data;
} OutTensor;

static long out_tensor_bytes(const OutTensor* t) {
    long bytes = 4;
    for (int i = 0; i < t->ndim; i++) bytes *= t->shape[i];
    return bytes;
}

// Writes a file and flushes it to the disk. On failure the error says why, and the file must not be used.
static int safetensors_write(const char* path, const OutTensor* tensors, int count, Error* error) {
    Text header = {NULL, 0, 0};
    text_print(&header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (long i = 0, at = 0; i < count; i++) {
        const OutTensor* t = &tensors[i];
        text_print(&header, ",");
        text_json_string(&header, t->name);
        text_print(&header, ":{\"dtype\":\"%s\",\"shape\":[", t->dtype);
        for (int k = 0; k < t->ndim; k++) text_print(&header, "%s%ld", k ? "," : "", t->shape[k]);
        text_print(&header, "],\"data_offsets\":[%ld,%ld]}", at, at + out_tensor_bytes(t));
        at += out_tensor_bytes(t);
    }
    text_print(&header, "}");
    while (header.length % 8) text_print(&header, " ");
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)header.length >> (8 * i));
    FILE* f = fopen(path, "wb");
    int ok = f && fwrite(prefix, 8, 1, f) == 1 && fwrite(header.data, header.length, 1, f) == 1;
    for (int i = 0; i < count && ok; i++) {
        size_t bytes = (size_t)out_tensor_bytes(&tensors[i]);
        ok = bytes == 0 || fwrite(tensors[i].data, bytes, 1, f) == 1;
    }
    ok = ok && fflush(f) == 0 && fsync(fileno(f)) == 0;
    if (!ok) set_error(error, "%s: %s", path, strerror(errno));
    if (f && fclose(f) && ok) ok = set_error(error, "%s: %s", path, strerror(errno));
    free(header.data);
    return ok;
}

// ---------------------------------------------------------------------------------------------------------------------
// 12. Checkpoints
//
// A checkpoint is a Hugging Face directory: config.json, model.safetensors and the tokenizer's files; beside them our
// trainer.json (options and step) and optimizer.safetensors (AdamW's moments).

// The classes, in the order of Arch, with what transformers takes for a key that config.json does not have (0: see
// config_from_json).
static const struct {
    const char *model_type, *class_name;
    QKNorm qk_norm;
    int vocab, hidden, layers, heads, kv_heads, head_dim, width, expert_width, experts, topk, positions, window;
    double rope_theta, rms_norm_eps, aux;
} archs[NUM_ARCHS] = {
    {"llama", "LlamaForCausalLM", QK_NORM_NONE, 32000, 4096, 32, 32, 0, 0, 11008, 0, 0, 0, 2048, 0, 1e4, 1e-6, 0},
    {"mistral", "MistralForCausalLM", QK_NORM_NONE, 32000, 4096, 32, 32, 8, 0, 14336, 0, 0, 0, 131072, 4096, 1e4, 1e-6,
     0},
    {"mixtral", "MixtralForCausalLM", QK_NORM_NONE, 32000, 4096, 32, 32, 8, 0, 14336, 0, 8, 2, 131072, 0, 1e6, 1e-5,
     1e-3},
    {"olmoe", "OlmoeForCausalLM", QK_NORM_ROW, 50304, 2048, 16, 16, 0, 0, 2048, 0, 64, 8, 4096, 0, 1e4, 1e-5, 1e-2},
    {"qwen3", "Qwen3ForCausalLM", QK_NORM_HEAD, 151936, 4096, 32, 32, 32, 128, 22016, 0, 0, 0, 32768, 0, 1e4, 1e-6, 0},
    {"qwen3_moe", "Qwen3MoeForCausalLM", QK_NORM_HEAD, 151936, 2048, 24, 32, 4, 0, 6144, 768, 128, 8, 32768, 0, 1e4,
     1e-6, 1e-3},
    {"dots1", "Dots1ForCausalLM", QK_NORM_HEAD, 152064, 4608, 62, 32, 32, 0, 10944, 1408, 0, 0, 2048, 0, 1e4, 1e-6, 0}};

static int is_moe(Arch arch) { return arch == MIXTRAL || arch == OLMOE || arch == QWEN3_MOE || arch == DOTS1; }

// 1 if transformers has a class for the model. Dots1 is the class with sigmoid scores and a balancing bias. All others
// are saved with the model_type "train_moe", and only then does config.json have keys of ours.
static int is_ordinary(const Config* c) {
    return (c->router == ROUTER_SOFTMAX || (c->router == ROUTER_SIGMOID && c->arch == DOTS1)) && c->logit_norm == 0 &&
           c->family_penalty == 0;
}
static const char* routers[] = {"softmax", "sigmoid", "lpr"};           // in the order of Router

// A whole number under `key` (or `other`, if not NULL); fallback < 0: it must be there.
static int config_int(const Json* j, const char* key, const char* other, int fallback, int low, int high,
                      Error* error) {
    const Json* v = json_get(j, key);
    if (json_absent(v) && other) v = json_get(j, other);
    if (json_absent(v)) {
        if (fallback < 0) set_error(error, "%s is missing", key);
        return fallback;
    }
    long value = json_whole(v, high);
    if (value < low) {
        set_error(error, "%s is %.40s, expected a whole number from %d to %d", key, v->string ? v->string : "no number",
                  low, high);
        return fallback;
    }
    return (int)value;
}

static double config_double(const Json* j, const char* key, double fallback, Error* error) {
    const Json* v = json_get(j, key);
    if (json_absent(v)) return fallback;
    if (v->type == JSON_NUMBER && v->number >= 0 && v->number < 1e30) return v->number;
    set_error(error, "%s is %.40s, expected a positive number", key, v->string ? v->string : "no number");
    return fallback;
}

static int config_bool(const Json* j, const char* key, int fallback, Error* error) {
    const Json* v = json_get(j, key);
    if (json_absent(v)) return fallback;
    if (v->type != JSON_TRUE && v->type != JSON_FALSE) set_error(error, "%s must be true or false", key);
    return v->type == JSON_TRUE;
}

// What this program cannot compute must not be computed wrongly in silence.
static void config_refuse_unsupported(const Json* j, Error* error) {
    static const char* must_be_absent[] = {"clip_qkv", "quantization_config", "kv_lora_rank", "q_lora_rank"};
    static const char* must_be_false[] = {"attention_bias", "mlp_bias"};
    const Json* act = json_get(j, "hidden_act");
    if (!json_absent(act) && (act->type != JSON_STRING || strcmp(act->string, "silu")))
        set_error(error, "hidden_act is %.40s, only silu is supported", act->string ? act->string : "no string");
    for (int i = 0; i < 4; i++) {
        const Json* v = json_get(j, must_be_absent[i]);
        if (json_absent(v)) continue;
        set_error(error, "%s is %.40s, which is not supported", must_be_absent[i], v->string ? v->string : "set");
    }
    for (int i = 0; i < 2; i++)
        if (config_bool(j, must_be_false[i], 0, error))
            set_error(error, "%s is true, which is not supported", must_be_false[i]);
    static const char* ropes[] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++) {
        const Json *rope_json = json_get(j, ropes[i]), *type = json_get(rope_json, "rope_type");
        if (json_absent(type)) type = json_get(rope_json, "type");
        if (json_absent(rope_json)) continue;
        if (rope_json->type != JSON_OBJECT) set_error(error, "%s is not an object", ropes[i]);
        else if (!json_absent(type) && (type->type != JSON_STRING || strcmp(type->string, "default")))
            set_error(error, "%s has rope_type %.40s, only default is supported", ropes[i],
                      type->string ? type->string : "?");
        else if (json_absent(type) && i == 0) set_error(error, "rope_scaling is set, which is not supported");
        double part = config_double(rope_json, "partial_rotary_factor", 1, error);
        if (part != 1) set_error(error, "partial_rotary_factor is %g, only 1 is supported", part);
    }
    double part = config_double(j, "partial_rotary_factor", 1, error);
    if (part != 1) set_error(error, "partial_rotary_factor is %g, only 1 is supported", part);
    const Json* types = json_get(j, "layer_types");
    for (int i = 0; types && i < types->count; i++)
        if (types->items[i]->type != JSON_STRING || strcmp(types->items[i]->string, "full_attention"))
            set_error(error, "layer_types has %.40s, only full_attention is supported",
                      types->items[i]->string ? types->items[i]->string : "no string");
}

// The keys of a model_type of our own.
static int router_variant_from_json(Config* c, const Json* j, Error* error) {
    const Json *router = json_get(j, "router_type"), *penalty = json_get(j, "family_penalty"),
               *form = json_get(j, "lpr_align_form");
    if (router && router->type == JSON_STRING) {
        int kind = 0;
        while (kind < 3 && strcmp(routers[kind], router->string)) kind++;
        if (kind == 3)
            return set_error(error, "router_type is %.40s, expected softmax, sigmoid or lpr", router->string);
        c->router = (Router)kind;
    }
    c->logit_norm = config_double(j, "logit_norm", 0, error);
    if (penalty && penalty->type == JSON_STRING && !strcmp(penalty->string, "inf")) c->family_penalty = INFINITY;
    else c->family_penalty = config_double(j, "family_penalty", 0, error);
    if (c->router == ROUTER_LPR) {
        c->lpr_latent_dim = config_int(j, "lpr_latent_dim", NULL, 16, 1, 1 << 14, error);
        c->lpr_weight = config_double(j, "lpr_weight", 0.01, error);
        c->lpr_diversity = config_double(j, "lpr_diversity", 1, error);
        c->lpr_kl = config_double(j, "lpr_kl", 0.01, error);
        c->lpr_align = config_double(j, "lpr_align", 0.05, error);
        c->lpr_align_mean = form && form->type == JSON_STRING && !strcmp(form->string, "mean");
        if (c->logit_norm > 0 || c->family_penalty > 0)
            set_error(error, "router_type lpr has neither logit_norm nor family_penalty");
    }
    return !error->text[0];
}

static void router_variant_to_json(Text* t, const Config* c) {
    text_print(t, "  \"base_model_type\": \"%s\",\n  \"router_type\": \"%s\",\n  \"logit_norm\": ",
               archs[c->arch].model_type, routers[c->router]);
    text_json_double(t, c->logit_norm);
    text_print(t, ",\n  \"family_penalty\": ");
    if (isinf(c->family_penalty)) text_print(t, "\"inf\"");
    else text_json_double(t, c->family_penalty);
    if (c->router == ROUTER_LPR) {
        static const char* keys[] = {"lpr_weight", "lpr_diversity", "lpr_kl", "lpr_align"};
        const double values[] = {c->lpr_weight, c->lpr_diversity, c->lpr_kl, c->lpr_align};
        text_print(t, ",\n  \"lpr_latent_dim\": %d,\n  \"lpr_align_form\": \"%s\"", c->lpr_latent_dim,
                   c->lpr_align_mean ? "mean" : "sum");
        for (int i = 0; i < 4; i++) {
            text_print(t, ",\n  \"%s\": ", keys[i]);
            text_json_double(t, values[i]);
        }
    }
    text_print(t, ",\n");
}

// Fills a Config from config.json; 0 and an error naming key and value if it describes anything that is not supported.
static int config_from_json(Config* c, const Json* j, Error* error) {
    memset(c, 0, sizeof *c);
    const Json* type = json_get(j, "model_type");
    if (!type || type->type != JSON_STRING) return set_error(error, "model_type is missing");
    int arch = 0, ours = !strcmp(type->string, "train_moe");
    if (ours) {
        type = json_get(j, "base_model_type");
        if (!type || type->type != JSON_STRING) return set_error(error, "base_model_type is missing");
    }
    while (arch < NUM_ARCHS && strcmp(type->string, archs[arch].model_type)) arch++;
    if (arch == NUM_ARCHS)
        return set_error(
            error,
            "model_type is %.40s, supported are llama, mistral, mixtral, olmoe, qwen3, qwen3_moe, dots1 and "
            "train_moe",
            type->string);
    c->arch = (Arch)arch;
    if (arch == DOTS1) c->router = ROUTER_SIGMOID;
    if (ours && !router_variant_from_json(c, j, error)) return 0;
    config_refuse_unsupported(j, error);
    c->num_layers = config_int(j, "num_hidden_layers", NULL, archs[arch].layers, 1, MAX_LAYERS, error);
    c->hidden_size = config_int(j, "hidden_size", NULL, archs[arch].hidden, 1, 1 << 20, error);
    c->num_heads = config_int(j, "num_attention_heads", NULL, archs[arch].heads, 1, 1 << 14, error);
    c->vocab_size = config_int(j, "vocab_size", NULL, archs[arch].vocab, 1, 1 << 24, error);
    if (error->text[0]) return 0;
    int kv_heads = archs[arch].kv_heads ? archs[arch].kv_heads : c->num_heads;
    int head_dim = archs[arch].head_dim ? archs[arch].head_dim : c->hidden_size / c->num_heads;
    c->num_kv_heads = config_int(j, "num_key_value_heads", NULL, kv_heads, 1, 1 << 14, error);
    c->head_dim = config_int(j, "head_dim", NULL, head_dim, 1, 1 << 14, error);
    c->intermediate_size = config_int(j, "intermediate_size", NULL, archs[arch].width, 1, 1 << 20, error);
    c->max_position_embeddings =
        config_int(j, "max_position_embeddings", NULL, archs[arch].positions, 1, 1 << 30, error);
    c->tie_word_embeddings = config_bool(j, "tie_word_embeddings", 0, error);
    c->rms_norm_eps = config_double(j, "rms_norm_eps", archs[arch].rms_norm_eps, error);
    c->rope_theta = config_double(j, "rope_theta", archs[arch].rope_theta, error);
    c->rope_theta = config_double(json_get(j, "rope_parameters"), "rope_theta", c->rope_theta, error);
    if (c->rope_theta <= 0) set_error(error, "rope_theta is 0, expected a positive number");
    c->qk_norm = archs[arch].qk_norm;
    const Json* window = json_get(j, "sliding_window");
    int window_default = window ? 0 : archs[arch].window;       // an explicit null means none
    c->sliding_window = config_int(j, "sliding_window", NULL, window_default, 0, 1 << 30, error);
    int window_wanted = config_bool(j, "use_sliding_window", arch == MISTRAL || arch == MIXTRAL, error);
    if (!window_wanted) c->sliding_window = 0;
    if (arch == DOTS1) {
        static const char* only[] = {"n_group", "topk_group"};
        for (int i = 0; i < 2; i++)
            if (config_int(j, only[i], NULL, 1, 0, 1 << 16, error) != 1)
                set_error(error, "%s is not 1, which is not supported", only[i]);
        if (config_int(j, "n_shared_experts", NULL, -1, 0, 1 << 16, error) != 0)
            set_error(error, "n_shared_experts is not 0, and shared experts are not supported");
        if (config_double(j, "routed_scaling_factor", 1, error) != 1)
            set_error(error, "routed_scaling_factor is not 1, which is not supported");
    }
    if (is_moe(c->arch)) {
        const char* experts_key = arch == DOTS1 ? "n_routed_experts" : "num_experts";
        int experts = archs[arch].experts ? archs[arch].experts : -1, topk = archs[arch].topk ? archs[arch].topk : -1;
        c->num_experts = config_int(j, experts_key, "num_local_experts", experts, 1, 1 << 16, error);
        c->num_experts_per_tok = config_int(j, "num_experts_per_tok", NULL, topk, 1, 1 << 16, error);
        c->norm_topk_prob = arch == MIXTRAL ? 1 : config_bool(j, "norm_topk_prob", 0, error);
        c->moe_intermediate_size = c->intermediate_size;
        if (archs[arch].expert_width)
            c->moe_intermediate_size =
                config_int(j, "moe_intermediate_size", NULL, archs[arch].expert_width, 1, 1 << 20, error);
        c->router_aux_loss_coef = config_double(j, "router_aux_loss_coef", archs[arch].aux, error);
        int step = arch == QWEN3_MOE ? config_int(j, "decoder_sparse_step", NULL, 1, 1, 1 << 20, error) : 1;
        int first = arch == DOTS1 ? config_int(j, "first_k_dense_replace", NULL, 0, 0, 1 << 20, error) : 0;
        for (int l = 0; l < c->num_layers; l++) c->sparse[l] = l >= first && (l + 1) % step == 0;
        const Json* dense = arch == QWEN3_MOE ? json_get(j, "mlp_only_layers") : NULL;
        for (int i = 0; dense && i < dense->count; i++) {
            long l = json_whole(dense->items[i], c->num_layers - 1);
            if (l < 0) return set_error(error, "mlp_only_layers names a layer that the model does not have");
            c->sparse[l] = 0;
        }
        if (c->num_experts_per_tok > c->num_experts)
            set_error(error, "num_experts_per_tok is %d, but num_experts is %d", c->num_experts_per_tok,
                      c->num_experts);
        // each of these is in its range, but the sizes computed from them must not overflow
        double size = 3.0 * c->num_layers * c->num_experts * c->hidden_size * c->moe_intermediate_size;
        if (size > 1e15) set_error(error, "num_experts is %d, which makes %.0e parameters", c->num_experts, size);
    }
    if (c->num_heads % c->num_kv_heads)
        set_error(error, "num_attention_heads is %d, not a multiple of num_key_value_heads, %d", c->num_heads,
                  c->num_kv_heads);
    if (c->head_dim < 1)
        set_error(error, "hidden_size is %d, less than num_attention_heads, %d", c->hidden_size, c->num_heads);
    if (c->head_dim % 2) set_error(error, "head_dim is %d, but rotary positions need an even one", c->head_dim);
    if (arch == OLMOE && c->head_dim * c->num_heads != c->hidden_size)
        set_error(error, "head_dim is %d, but OLMoE's is hidden_size / num_attention_heads", c->head_dim);
    static const char* ids[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    for (int i = 0; i < 3; i++) {
        const Json* id = json_get(j, ids[i]);
        Text text = {NULL, 0, 0};
        if (id && id->type == JSON_NULL) text_print(&text, "null");
        if (id && id->type == JSON_NUMBER) text_print(&text, "%s", id->string);
        if (id && id->type == JSON_ARRAY) {
            text_print(&text, "[");
            for (int k = 0; k < id->count; k++) {
                if (id->items[k]->type != JSON_NUMBER) set_error(error, "%s holds what is not a number", ids[i]);
                else text_print(&text, "%s%s", k ? ", " : "", id->items[k]->string);
            }
            text_print(&text, "]");
        }
        if (text.length >= sizeof c->token_ids[i])
            set_error(error, "%s is longer than %d characters", ids[i], (int)sizeof c->token_ids[i] - 1);
        else if (text.data) strcpy(c->token_ids[i], text.data);
        free(text.data);
    }
    return !error->text[0];
}

// The reverse: what transformers needs to open the checkpoint, under the names of its older and newer versions.
static void config_to_json(Text* t, const Config* c) {
    int moe = is_moe(c->arch);
    text_print(t, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n",
               is_ordinary(c) ? archs[c->arch].class_name : "TrainMoeForCausalLM",
               is_ordinary(c) ? archs[c->arch].model_type : "train_moe");
    if (!is_ordinary(c)) router_variant_to_json(t, c);
    text_print(t, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n  \"num_hidden_layers\": %d,\n", c->vocab_size,
               c->hidden_size, c->num_layers);
    text_print(t, "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n", c->num_heads,
               c->num_kv_heads, c->head_dim);
    text_print(t, "  \"intermediate_size\": %d,\n",
               c->arch == QWEN3_MOE || c->arch == DOTS1 || !moe ? c->intermediate_size : c->moe_intermediate_size);
    text_print(t, "  \"hidden_act\": \"silu\",\n  \"max_position_embeddings\": %d,\n  \"rms_norm_eps\": ",
               c->max_position_embeddings);
    text_json_double(t, c->rms_norm_eps);
    text_print(t, ",\n  \"rope_theta\": ");
    text_json_double(t, c->rope_theta);
    text_print(t, ",\n  \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": ");
    text_json_double(t, c->rope_theta);
    text_print(t, "},\n  \"attention_bias\": false,\n  \"tie_word_embeddings\": %s,\n",
               c->tie_word_embeddings ? "true" : "false");
    if (c->arch == MISTRAL || c->arch == MIXTRAL || c->arch == DOTS1) {
        if (c->sliding_window) text_print(t, "  \"sliding_window\": %d,\n", c->sliding_window);
        else text_print(t, "  \"sliding_window\": null,\n");
    }
    if (moe) {
        text_print(t, "  \"num_experts\": %d,\n  \"num_local_experts\": %d,\n  \"num_experts_per_tok\": %d,\n",
                   c->num_experts, c->num_experts, c->num_experts_per_tok);
        text_print(t, "  \"norm_topk_prob\": %s,\n  \"router_aux_loss_coef\": ", c->norm_topk_prob ? "true" : "false");
        text_json_double(t, c->router_aux_loss_coef);
        text_print(t, ",\n  \"output_router_logits\": false,\n");
    }
    if (c->arch == QWEN3_MOE) {
        text_print(t, "  \"moe_intermediate_size\": %d,\n  \"decoder_sparse_step\": 1,\n  \"mlp_only_layers\": [",
                   c->moe_intermediate_size);
        for (int l = 0, listed = 0; l < c->num_layers; l++)
            if (!c->sparse[l]) text_print(t, "%s%d", listed++ ? ", " : "", l);
        text_print(t, "],\n");
    }
    if (c->arch == DOTS1) {
        int first = 0;
        while (first < c->num_layers && !c->sparse[first]) first++;
        text_print(t,
                   "  \"moe_intermediate_size\": %d,\n  \"n_routed_experts\": %d,\n  \"n_shared_experts\": 0,\n  "
                   "\"n_group\": 1,\n"
                   "  \"topk_group\": 1,\n  \"routed_scaling_factor\": 1.0,\n  \"first_k_dense_replace\": %d,\n",
                   c->moe_intermediate_size, c->num_experts, first);
    }
    static const char* ids[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    for (int i = 0; i < 3; i++)
        if (c->token_ids[i][0]) text_print(t, "  \"%s\": %s,\n", ids[i], c->token_ids[i]);
    text_print(t, "  \"torch_dtype\": \"float32\",\n  \"dtype\": \"float32\"\n}\n");
}

static int config_read(Config* c, const char* dir, Error* error) {
    char path[PATH_SIZE];
    Error inner = {""};
    join_path(path, dir, ".ready");
    if (!access(path, F_OK))
        return set_error(error, "%s holds a save that was interrupted while it moved in; --resume --out %s finishes it",
                         dir, dir);
    join_path(path, dir, "config.json");
    Json* j = json_read(path, error);
    if (j && !config_from_json(c, j, &inner)) set_error(error, "%s: %s", path, inner.text);
    json_free(j);
    return !error->text[0];
}

// One tensor of the checkpoint into `out`, if it is there: 1. A wrong shape is an error.
static int load_tensor(SafeTensors* s, const char* name, int ndim, const long* shape, float* out, Error* error) {
    StoredTensor* t = safetensors_find(s, name);
    if (!t) return 0;
    int same = t->ndim == ndim;
    for (int i = 0; same && i < ndim; i++) same = t->shape[i] == shape[i];
    if (!same) {
        Text found = {NULL, 0, 0}, expected = {NULL, 0, 0};
        for (int i = 0; i < t->ndim; i++) text_print(&found, "%s%ld", i ? "," : "", t->shape[i]);
        for (int i = 0; i < ndim; i++) text_print(&expected, "%s%ld", i ? "," : "", shape[i]);
        set_error(error, "tensor %.100s has shape [%s], config.json makes it [%s]", name, found.data ? found.data : "",
                  expected.data);
        free(found.data);
        free(expected.data);
    }
    t->used = 1;
    return same && safetensors_read(s, t, 0, t->count, out, error);
}

// A list of names for an error message, cut off after a few.
static void list_name(Text* list, int* count, const char* name) {
    if (++*count <= 6) text_print(list, "%s%s", *count > 1 ? ", " : "", name);
    else if (*count == 7) text_print(list, ", ...");
}

// Reads every tensor of the layout; block is model parameters or moments, `suffix` is put behind each name. Experts may
// also be packed, as newer files have them: mlp.experts.gate_up_proj (E, 2 I, H) and down_proj (E, H, I), which is just
// how they lie in memory. Every tensor expected must be found and every tensor found must be used.
static int load_tensors(const Model* m, SafeTensors* s, float* block, const char* suffix, Error* error) {
    const Config* c = &m->config;
    Weights w;
    weights_point(&w, c, &m->layout, block);
    char* loaded = (char*)checked_malloc((size_t)m->layout.count);
    memset(loaded, 0, (size_t)m->layout.count);
    for (int l = 0; l < c->num_layers; l++) {
        long E = c->num_experts, I = c->moe_intermediate_size, H = c->hidden_size;
        for (int form = 0; c->sparse[l] && form < 8; form++) {
            int down = form & 1;
            char name[160];
            snprintf(name, sizeof name, "model.layers.%d.%s.experts.%s%s%s", l, form & 4 ? "block_sparse_moe" : "mlp",
                     down ? "down_proj" : "gate_up_proj", form & 2 ? ".weight" : "", suffix);
            long shape[3] = {E, down ? H : 2 * I, down ? I : H};
            float* out = down ? w.layers[l].down : w.layers[l].gate_up;
            if (!load_tensor(s, name, 3, shape, out, error)) continue;
            for (int i = 0; i < m->layout.count; i++) {
                const Tensor* t = &m->layout.tensors[i];
                if (tensor_is_matrix(t) && tensor_size(t) > 0 && t->offset >= out - block &&
                    t->offset < out - block + shape[0] * shape[1] * shape[2])
                    loaded[i] = 1;
            }
        }
    }
    Text missing = {NULL, 0, 0}, unused = {NULL, 0, 0};
    int num_missing = 0, num_unused = 0;
    for (int i = 0; i < m->layout.count && !error->text[0]; i++) {
        const Tensor* t = &m->layout.tensors[i];
        char name[160], newer[160];
        int layer, used = 0;
        long shape[2] = {t->rows, t->cols};
        snprintf(name, sizeof name, "%s%s", t->name, suffix);
        if (loaded[i] || load_tensor(s, name, tensor_is_matrix(t) ? 2 : 1, shape, block + t->offset, error)) continue;
        // Mixtral's router stands beside packed experts under its new name
        if (sscanf(name, "model.layers.%d.block_sparse_moe.gate.weight%n", &layer, &used) == 1 && used && !name[used]) {
            snprintf(newer, sizeof newer, "model.layers.%d.mlp.gate.weight", layer);
            if (load_tensor(s, newer, 2, shape, block + t->offset, error)) continue;
        }
        list_name(&missing, &num_missing, name);
    }
    for (int i = 0; i < s->num_tensors && !error->text[0]; i++) {
        StoredTensor* t = &s->tensors[i];
        size_t length = strlen(t->name);
        if (t->used || (length > 19 && !strcmp(t->name + length - 19, "rotary_emb.inv_freq"))) continue;
        if (c->tie_word_embeddings && !*suffix && !strcmp(t->name, "lm_head.weight")) { // redundant: must be the same
            long shape[2] = {c->vocab_size, c->hidden_size}, size = shape[0] * shape[1];
            float* head = (float*)checked_malloc(sizeof(float) * (size_t)size);
            if (load_tensor(s, t->name, 2, shape, head, error) &&
                memcmp(head, w.embedding, sizeof(float) * (size_t)size))
                set_error(error, "lm_head.weight differs from the embedding, but tie_word_embeddings is true");
            free(head);
        } else {
            list_name(&unused, &num_unused, t->name);
        }
    }
    if (num_missing) set_error(error, "missing tensors (%d): %s", num_missing, missing.data);
    else if (num_unused) set_error(error, "tensors that do not belong to this model (%d): %s", num_unused, unused.data);
    free(missing.data);
    free(unused.data);
    free(loaded);
    free(w.layers);
    return !error->text[0];
}

// Reads which experts are copies of one from DIR/upcycle.json; 1 with has_families = 0 if there is no such file.
static int families_load(Model* m, const char* dir, Error* error) {
    const Config* c = &m->config;
    char path[PATH_SIZE];
    int E = c->num_experts, described = 0;
    m->has_families = 0;
    join_path(path, dir, "upcycle.json");
    if (E == 0 || access(path, F_OK)) return 1;
    Json* j = json_read(path, error);
    if (!j) return 0;
    const Json* layers = json_get(j, "layers");
    for (int i = 0; layers && i < layers->count; i++) {
        const Json *family = json_get(layers->items[i], "family");
        long l = json_whole(json_get(layers->items[i], "layer"), c->num_layers - 1);
        if (l < 0 || !c->sparse[l] || !family || family->type != JSON_ARRAY || family->count != E) {
            set_error(error, "%s: entry %d of layers does not name a sparse layer and the family of its %d experts",
                      path, i, E);
            break;
        }
        for (int e = 0; e < E; e++) {
            long number = json_whole(family->items[e], E - 1);
            if (number < 0)
                set_error(error, "%s: layer %ld: the family of expert %d is not a number from 0 to %d", path, l, e,
                          E - 1);
            m->family[l * E + e] = (int)number;
            for (int k = 0; k < e; k++) m->has_families |= m->family[l * E + k] == number;
        }
        described++;
    }
    json_free(j);
    if (!error->text[0] && described != count_sparse(c))
        set_error(error, "%s: describes %d layers, but the model has %d sparse ones", path, described, count_sparse(c));
    return !error->text[0];
}

// The smallest number of families in a layer.
static int count_families(const Model* m) {
    int E = m->config.num_experts, least = E;
    for (int l = 0; l < m->config.num_layers && m->has_families; l++) {
        int families = 0;
        for (int e = 0; e < E && m->config.sparse[l]; e++) {
            int known = 0;
            for (int k = 0; k < e; k++) known |= m->family[l * E + k] == m->family[l * E + e];
            families += !known;
        }
        if (m->config.sparse[l]) least = imin(least, families);
    }
    return least;
}

// Reads the parameters from DIR/model.safetensors (or shards).
static int checkpoint_load(Model* m, const char* dir, Error* error) {
    Error inner = {""};
    SafeTensors* s = safetensors_open_model(dir, error);
    if (!s) return 0;
    if (!load_tensors(m, s, m->params, "", &inner)) set_error(error, "%s: %s", dir, inner.text);
    safetensors_close(s);
    m->source = dir;
    if (!error->text[0] && families_load(m, dir, error) && m->config.family_penalty > 0) {
        if (!m->has_families)
            set_error(error, "%s: families are penalised, but there is no upcycle.json that tells them", dir);
        else if (isinf(m->config.family_penalty) && count_families(m) < most_topk(&m->config))
            set_error(error, "%s: %d experts a token, but only %d families, of which one member each may be chosen",
                      dir, most_topk(&m->config), count_families(m));
    }
    return !error->text[0];
}

// Reads AdamW's moments from DIR/optimizer.safetensors.
static int optimizer_load(Model* m, const char* dir, Error* error) {
    char path[PATH_SIZE];
    Error inner = {""};
    join_path(path, dir, "optimizer.safetensors");
    SafeTensors* s = safetensors_open(path, error);
    if (!s) return 0;
    // both halves are in one file: tensors of the other one are marked as used while one is read
    for (int half = 0; half < 2 && !inner.text[0]; half++) {
        const char* suffix = half ? ".exp_avg_sq" : ".exp_avg";
        for (int i = 0; i < s->num_tensors; i++) {
            size_t length = strlen(s->tensors[i].name), n = strlen(suffix);
            const char* end = length > n ? s->tensors[i].name + length - n : "";
            const char* other = half ? ".exp_avg" : ".exp_avg_sq";
            size_t k = strlen(other);
            s->tensors[i].used = strcmp(end, suffix) && length > k && !strcmp(s->tensors[i].name + length - k, other);
        }
        load_tensors(m, s, half ? m->exp_avg_sq : m->exp_avg, suffix, &inner);
    }
    if (inner.text[0]) set_error(error, "%s: %s", path, inner.text);
    safetensors_close(s);
    return !error->text[0];
}

// Files that belong to the tokenizer or to the model's history travel from the source to every save.
static const char* travelling_files[] = {"tokenizer.json",
                                         "tokenizer_config.json",
                                         "tokenizer.model",
                                         "special_tokens_map.json",
                                         "added_tokens.json",
                                         "vocab.json",
                                         "merges.txt",
                                         "generation_config.json",
                                         "chat_template.jinja",
                                         "upcycle.json",
                                         NULL};

static int write_file(const char* path, const char* data, size_t length, Error* error) {
    FILE* f = fopen(path, "wb");
    int ok = f && (length == 0 || fwrite(data, length, 1, f) == 1) && fflush(f) == 0 && fsync(fileno(f)) == 0;
    if (!ok) set_error(error, "%s: %s", path, strerror(errno));
    if (f && fclose(f) && ok) ok = set_error(error, "%s: %s", path, strerror(errno));
    return ok;
}

static int flush_directory(const char* path, Error* error) {
    int fd = open(path, O_RDONLY);
    int ok = fd >= 0 && fsync(fd) == 0;
    if (!ok) set_error(error, "%s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

// Moves every file of a directory into the directory `to`, or deletes it if `to` is NULL.
static void move_files(const char* from, const char* to, Error* error) {
    DIR* d = opendir(from);
    struct dirent* entry;
    while (d && (entry = readdir(d)) != NULL) {
        char old[PATH_SIZE], target[PATH_SIZE];
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        join_path(old, from, entry->d_name);
        if (to) join_path(target, to, entry->d_name);
        if (to ? rename(old, target) : unlink(old)) set_error(error, "%s: %s", old, strerror(errno));
    }
    if (d) closedir(d);
}

// The last step of a save, also made by --resume if a save was interrupted here: moves OUT/.ready's files into OUT.
static int finish_save(const char* out, Error* error) {
    char ready[PATH_SIZE];
    join_path(ready, out, ".ready");
    if (access(ready, F_OK)) return 1;
    move_files(ready, out, error);
    if (error->text[0] || !flush_directory(out, error)) return 0;
    if (rmdir(ready)) return set_error(error, "%s: %s", ready, strerror(errno));
    return 1;
}

static void trainer_to_json(Text* t, const Model* m, long step);        // in section 14, where the options are

static int save_files(const Model* m, const char* dir, long step, Error* error) {
    char path[PATH_SIZE];
    Text text = {NULL, 0, 0};
    config_to_json(&text, &m->config);
    join_path(path, dir, "config.json");
    int ok = write_file(path, text.data, text.length, error);
    text.length = 0;
    trainer_to_json(&text, m, step);
    join_path(path, dir, "trainer.json");
    ok = ok && write_file(path, text.data, text.length, error);
    free(text.data);
    int count = m->layout.count;
    OutTensor* tensors = (OutTensor*)checked_malloc(sizeof(OutTensor) * 2 * (size_t)count);
    char(*names)[128] = (char(*)[128])checked_malloc(sizeof(*names) * 2 * (size_t)count);
    for (int pass = 0; pass < 2 && ok; pass++) {            // the model, then the optimizer
        for (int i = 0; i < count * (pass + 1); i++) {
            const Tensor* t = &m->layout.tensors[i % count];
            const float* block = pass == 0 ? m->params : i < count ? m->exp_avg : m->exp_avg_sq;
            snprintf(names[i], sizeof names[i], "%s%s", t->name,
                     pass == 0   ? ""
                     : i < count ? ".exp_avg"
                                 : ".exp_avg_sq");
            OutTensor o = {names[i], "F32", tensor_is_matrix(t) ? 2 : 1, {t->rows, t->cols, 0}, block + t->offset};
            tensors[i] = o;
        }
        join_path(path, dir, pass ? "optimizer.safetensors" : "model.safetensors");
        ok = safetensors_write(path, tensors, count * (pass + 1), error);
    }
    free(tensors);
    free(names);
    for (int i = 0; travelling_files[i] && m->source && ok; i++) {
        size_t length;
        join_path(path, m->source, travelling_files[i]);
        if (access(path, F_OK)) continue;
        char* data = read_file(path, (size_t)1 << 30, &length, error);
        join_path(path, dir, travelling_files[i]);
        ok = data && write_file(path, data, length, error);
        free(data);
    }
    return ok && flush_directory(dir, error);
}

// Saves model, optimizer and options of a run, as a whole or not at all: everything is written and flushed in
// OUT/.saving; renaming that to OUT/.ready is the moment from which the new checkpoint counts; then its files are moved
// in. Returns NULL, or why it failed; then the last checkpoint is untouched. (Names and texts
// are allocated while it runs.)
static const char* checkpoint_save(const Model* m, const char* out, long step) {
    static Error error;
    char saving[PATH_SIZE], ready[PATH_SIZE];
    error.text[0] = 0;
    join_path(saving, out, ".saving");
    join_path(ready, out, ".ready");
    if (mkdir(saving, 0777) && errno != EEXIST) set_error(&error, "%s: %s", saving, strerror(errno));
    move_files(saving, NULL, &error);
    if (!error.text[0] && save_files(m, saving, step, &error) && finish_save(out, &error)) {
        if (rename(saving, ready)) set_error(&error, "%s: %s", ready, strerror(errno));
        else if (flush_directory(out, &error)) finish_save(out, &error);
    }
    if (!error.text[0]) return NULL;
    Error ignored = {""};
    move_files(saving, NULL, &ignored);        // give the disk its space back
    rmdir(saving);
    return error.text;
}

// ---------------------------------------------------------------------------------------------------------------------
// 13. Sampling

// From tokenizer.json: what each token prints. Without one, a token is a byte, if there are 256 of them.
typedef struct {
    int count;                      // the model's vocabulary
    char** pieces;                  // NULL: prints nothing (special tokens)
    int* lengths;
    int byte_level; // 1: pieces are in GPT-2's alphabet of bytes; 0: in SentencePiece's, with ▁ for a space
    int eos[8], num_eos;
} Tokenizer;

// GPT-2's alphabet gives every byte a printable character: the printable bytes of Latin-1 are themselves, the others
// are numbered from 256 on.
static int byte_of_character(uint32_t c) {
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255)) return (int)c;
    for (int b = 0, n = 256; b < 256; b++) {
        int printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
        if (!printable && (uint32_t)n++ == c) return b;
    }
    return -1;
}

static int json_contains_type(const Json* j, const char* type) {
    const Json* t = json_get(j, "type");
    if (t && t->type == JSON_STRING && !strcmp(t->string, type)) return 1;
    for (int i = 0; j && i < j->count; i++)
        if (json_contains_type(j->items[i], type)) return 1;
    return 0;
}

static void tokenizer_add(Tokenizer* t, long id, const char* piece, int special) {
    if (id < 0 || id >= t->count) return;
    free(t->pieces[id]);
    t->pieces[id] = NULL;
    if (special) return;
    char *out = (char*)checked_malloc(strlen(piece) + 1), *p = out;
    const char* end = piece + strlen(piece);
    unsigned byte;
    int used = 0;
    if (!t->byte_level && sscanf(piece, "<0x%2X>%n", &byte, &used) == 1 && used == 6 && piece[6] == 0) {
        *p++ = (char)byte;
    } else {
        while (piece < end) {
            int n = utf8_length(piece, end);
            if (n == 0) n = 1;
            const unsigned char* u = (const unsigned char*)piece;
            uint32_t c = n == 1 ? u[0] : n == 2 ? (uint32_t)(u[0] & 31) << 6 | (u[1] & 63) : 0xFFFF;
            int b = t->byte_level ? byte_of_character(c) : -1;
            if (b >= 0) *p++ = (char)b;
            else if (!t->byte_level && n == 3 && !memcmp(piece, "\xE2\x96\x81", 3)) *p++ = ' ';
            else {
                memcpy(p, piece, (size_t)n);
                p += n;
            }
            piece += n;
        }
    }
    t->pieces[id] = out;
    t->lengths[id] = (int)(p - out);
}

static void tokenizer_add_eos(Tokenizer* t, const Json* j) {
    if (json_whole(j, INT_MAX) >= 0 && t->num_eos < 8) t->eos[t->num_eos++] = (int)json_whole(j, INT_MAX);
    for (int i = 0; j && j->type == JSON_ARRAY && i < j->count; i++) tokenizer_add_eos(t, j->items[i]);
}

// Reads DIR's tokenizer.json, if any, and the end-of-sequence tokens; dir may be NULL.
static Tokenizer* tokenizer_open(const char* dir, int vocab_size) {
    Tokenizer* t = (Tokenizer*)checked_malloc(sizeof(Tokenizer));
    char path[PATH_SIZE];
    Error error = {""};
    memset(t, 0, sizeof *t);
    t->count = vocab_size;
    static const char* eos_files[] = {"generation_config.json", "config.json"};
    for (int i = 0; dir && i < 2 && t->num_eos == 0; i++) {
        join_path(path, dir, eos_files[i]);
        Json* j = access(path, F_OK) ? NULL : json_read(path, &error);
        tokenizer_add_eos(t, json_get(j, "eos_token_id"));
        json_free(j);
    }
    join_path(path, dir ? dir : "", "tokenizer.json");
    if (!dir || access(path, F_OK)) return t;
    Json* j = json_read(path, &error);
    if (!j) die(2, "%s", error.text);
    const Json *vocab = json_get(json_get(j, "model"), "vocab"), *added = json_get(j, "added_tokens");
    t->byte_level = json_contains_type(json_get(j, "decoder"), "ByteLevel");
    t->pieces = (char**)checked_malloc(sizeof(char*) * (size_t)vocab_size);
    t->lengths = (int*)checked_malloc(sizeof(int) * (size_t)vocab_size);
    memset(t->pieces, 0, sizeof(char*) * (size_t)vocab_size);
    memset(t->lengths, 0, sizeof(int) * (size_t)vocab_size);
    if (!vocab) die(2, "%s: no model.vocab", path);
    for (int i = 0; i < vocab->count; i++) {
        const Json* v = vocab->items[i];
        if (vocab->type == JSON_OBJECT && v->type == JSON_NUMBER) tokenizer_add(t, json_whole(v, INT_MAX), v->key, 0);
        // Unigram: a list of [piece, score]
        if (vocab->type == JSON_ARRAY && v->count > 0 && v->items[0]->type == JSON_STRING)
            tokenizer_add(t, i, v->items[0]->string, 0);
    }
    for (int i = 0; added && i < added->count; i++) {
        const Json *id = json_get(added->items[i], "id"), *content = json_get(added->items[i], "content");
        const Json* special = json_get(added->items[i], "special");
        if (id && content && content->type == JSON_STRING)
            tokenizer_add(t, json_whole(id, INT_MAX), content->string, special && special->type == JSON_TRUE);
    }
    json_free(j);
    return t;
}

static void tokenizer_close(Tokenizer* t) {
    for (int i = 0; i < t->count && t->pieces; i++) free(t->pieces[i]);
    free(t->pieces);
    free(t->lengths);
    free(t);
}

// Prints a token to `out`. SentencePiece puts a space before the first word, which is not part of the text.
static void tokenizer_print(const Tokenizer* t, int token, int first, FILE* out) {
    if (!t->pieces) {
        if (t->count == 256) fputc(token, out);
        else fprintf(out, "%s%d", first ? "" : " ", token);         // what its numbers mean nobody has told
    } else if (token < t->count && t->pieces[token]) {
        int skip = first && !t->byte_level && t->lengths[token] > 0 && t->pieces[token][0] == ' ';
        fwrite(t->pieces[token] + skip, 1, (size_t)(t->lengths[token] - skip), out);
    }
}

typedef struct {
    float probability;
    int token;
} Candidate;

static int compare_candidates(const void* a, const void* b) {
    const Candidate *x = (const Candidate*)a, *y = (const Candidate*)b;
    if (x->probability != y->probability) return x->probability > y->probability ? -1 : 1;
    return x->token - y->token;
}

// A token drawn from softmax(logits / temperature), limited to the top_k likeliest (0: all) and to the smallest set
// whose probability reaches top_p. temperature = 0: the likeliest. uniform is a random number in (0, 1); candidates has
// room for V.
static int sample_token(const float* logits, int V, double temperature, int top_k, double top_p, double uniform,
                        Candidate* candidates) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (temperature <= 0) return best;
    double sum = 0, kept = 0;
    for (int v = 0; v < V; v++) {
        candidates[v].token = v;
        candidates[v].probability = (float)exp((logits[v] - logits[best]) / temperature);
        sum += candidates[v].probability;
    }
    int n = V;
    if (top_k > 0 || top_p < 1) {
        qsort(candidates, (size_t)V, sizeof(Candidate), compare_candidates);
        if (top_k > 0 && top_k < n) {       // top-p is then of what is left
            n = top_k;
            sum = 0;
            for (int i = 0; i < n; i++) sum += candidates[i].probability;
        }
        for (int i = 0; i < n; i++) {
            kept += candidates[i].probability;
            if (kept >= top_p * sum) n = i + 1;
        }
        sum = kept;
    }
    double target = uniform * sum, reached = 0;
    for (int i = 0; i < n; i++) {
        reached += candidates[i].probability;
        if (target < reached) return candidates[i].token;
    }
    return candidates[n - 1].token;
}

typedef struct {
    double temperature, top_p;
    int top_k;
    uint64_t seed;
} Sampling;

// Feeds tokens to the cache, at most T at a time. When the cache is full, it starts again from the later half of what
// it held: so the model never sees positions beyond those it was made for. `history` holds all `count` tokens so far.
static void generator_feed(Model* g, const int* history, int fed, int count) {
    while (fed < count) {
        if (g->cached == g->positions) {
            int keep = g->positions / 2;
            g->cached = 0;
            fed -= keep;
        }
        int n = imin(imin(count - fed, g->T), g->positions - g->cached);
        g->backend->forward(g, history + fed, NULL, 1, n);
        fed += n;
    }
    g->backend->read_back(g, LOGITS);
}

// Continues the prompt (ids: room for prompt + tokens) by up to `tokens` tokens and prints all of it. Returns the
// number of tokens made, which is smaller if the model ended the sequence.
static int generate(Model* g, const Tokenizer* tokenizer, int* ids, int prompt, int tokens, const Sampling* how,
                    FILE* out) {
    int V = g->config.vocab_size, count = prompt;
    Candidate* candidates = (Candidate*)checked_malloc(sizeof(Candidate) * (size_t)V);
    g->cached = 0;
    int first = tokenizer->pieces && !tokenizer->pieces[ids[0]] ? 1 : 0;        // after a begin-of-sequence token
    for (int i = 0; i < prompt; i++) tokenizer_print(tokenizer, ids[i], i <= first, out);
    generator_feed(g, ids, 0, count);
    for (int i = 0; i < tokens && !stop_signal; i++) {
        double uniform = random_uniform(random_key(how->seed, hash_string("sample"), (uint64_t)i, 0));
        int token = sample_token(g->logits, V, how->temperature, how->top_k, how->top_p, uniform, candidates),
            ended = 0;
        for (int k = 0; k < tokenizer->num_eos; k++) ended |= token == tokenizer->eos[k];
        if (ended) break;
        ids[count++] = token;
        tokenizer_print(tokenizer, token, count - 1 <= first, out);
        fflush(out);
        if (i + 1 < tokens) generator_feed(g, ids, count - 1, count);
    }
    free(candidates);
    return count - prompt;
}

// ---------------------------------------------------------------------------------------------------------------------
// 14. Command line

// Everything that can be given. Text is NULL, a number is UNSET, where nothing was given and the default depends on
// more.
#define UNSET (-1)
static struct {
    // data and run
    const char *data, *val, *model, *out;
    long steps, batch, seq, accum, val_every, val_batches, save_every, sample_every, seed, threads;
    long resume, eval, load;
    const char *dump, *trace, *precision;
    // model from scratch
    long layers, hidden, heads, kv_heads, head_dim, ffn, experts, topk, expert_ffn, vocab, dense, tie, norm_topk,
        sparse_step;
    const char *qk_norm, *arch;
    // router
    double aux, z_loss, bias_rate, logit_norm, family_penalty;
    const char *aux_form, *router, *topk_range, *lpr_align_form;
    long aux_adaptive, family_steps, lpr_dim;
    double lpr_weight, lpr_diversity, lpr_kl, lpr_align;
    // optimiser
    double lr, min_lr, decay_frac, weight_decay, beta1, beta2, eps, clip;
    long warmup;
    const char* schedule;
    // sampling
    const char *prompt, *prompt_ids;
    long tokens, top_k;
    double temperature, top_p;
} options;

typedef enum { OPT_FLAG, OPT_WHOLE, OPT_REAL, OPT_TEXT, OPT_CHOICE } OptionType;
// What an option describes decides where it may stand: SHAPE only for a new model, RUN is remembered by --resume.
typedef enum { USE_RUN, USE_SHAPE, USE_OTHER } OptionUse;

typedef struct {
    const char* name;
    OptionType type;
    OptionUse use;
    void* value;
    double low, high;               // range of a number
    const char* start;              // default; NULL: see UNSET
    const char* argument;           // as --help shows it; the choices of an OPT_CHOICE
    const char* help;
    int given;
} Option;

#ifndef PRECISIONS      // train_moe.cu has more
#define PRECISIONS "fp32"
#define DEFAULT_PRECISION "fp32"
#endif

#define BIG 1e15
static Option option_table[] = {
    {"data", OPT_TEXT, USE_RUN, &options.data, 0, 0, NULL, "F,..", "text or shards; names, patterns", 0},
    {"val", OPT_TEXT, USE_RUN, &options.val, 0, 0, NULL, "F|none", "validation data (last tenth of text)", 0},
    {"model", OPT_TEXT, USE_OTHER, &options.model, 0, 0, NULL, "DIR", "a Hugging Face directory", 0},
    {"out", OPT_TEXT, USE_OTHER, &options.out, 0, 0, NULL, "DIR", "for checkpoints and logs", 0},
    {"resume", OPT_FLAG, USE_OTHER, &options.resume, 0, 0, "0", "", "go on with the run in --out", 0},
    {"steps", OPT_WHOLE, USE_RUN, &options.steps, 0, BIG, "1000", "N", "training steps in all", 0},
    {"batch", OPT_WHOLE, USE_RUN, &options.batch, 1, 65536, "8", "B", "sequences in a batch", 0},
    {"seq", OPT_WHOLE, USE_RUN, &options.seq, 1, 1 << 20, "128", "T", "tokens in one (--eval: at most 1024)", 0},
    {"accum", OPT_WHOLE, USE_RUN, &options.accum, 1, 65536, "1", "A", "batches in a step", 0},
    {"val-every", OPT_WHOLE, USE_RUN, &options.val_every, 0, BIG, "250", "N", "steps; 0: only at the end", 0},
    {"val-batches", OPT_WHOLE, USE_RUN, &options.val_batches, 0, INT_MAX, "20", "N", "batches in one; 0: all", 0},
    {"save-every", OPT_WHOLE, USE_RUN, &options.save_every, 0, BIG, "500", "N", "steps; 0: only at the end", 0},
    {"sample-every", OPT_WHOLE, USE_RUN, &options.sample_every, 0, BIG, "0", "N", "steps; 0: never", 0},
    {"seed", OPT_WHOLE, USE_RUN, &options.seed, 0, BIG, "1", "S", "of weights, data order, samples", 0},
    {"threads", OPT_WHOLE, USE_OTHER, &options.threads, 1, 4096, NULL, "N", "all cores by default", 0},
    {"precision", OPT_CHOICE, USE_OTHER, &options.precision, 0, 0, DEFAULT_PRECISION, PRECISIONS, "of products", 0},

    {"arch", OPT_CHOICE, USE_SHAPE, &options.arch, 0, 0, "qwen3", "qwen3|mixtral|olmoe", "class",
     0},
    {"layers", OPT_WHOLE, USE_SHAPE, &options.layers, 1, MAX_LAYERS, "4", "L", "layers", 0},
    {"hidden", OPT_WHOLE, USE_SHAPE, &options.hidden, 1, 1 << 20, "128", "H", "hidden size", 0},
    {"heads", OPT_WHOLE, USE_SHAPE, &options.heads, 1, 1 << 14, "4", "NH", "attention heads", 0},
    {"kv-heads", OPT_WHOLE, USE_SHAPE, &options.kv_heads, 1, 1 << 14, NULL, "NKV", "key/value heads (NH / 2)", 0},
    {"head-dim", OPT_WHOLE, USE_SHAPE, &options.head_dim, 2, 1 << 14, NULL, "HD", "head size (H / NH)", 0},
    {"ffn", OPT_WHOLE, USE_SHAPE, &options.ffn, 1, 1 << 20, NULL, "I", "dense layers' width (3 H)", 0},
    {"experts", OPT_WHOLE, USE_SHAPE, &options.experts, 0, 1 << 16, "8", "E", "0: a dense model", 0},
    {"topk", OPT_WHOLE, USE_OTHER, &options.topk, 1, 1 << 16, NULL, "K", "experts per token (2)", 0},
    {"expert-ffn", OPT_WHOLE, USE_SHAPE, &options.expert_ffn, 1, 1 << 20, NULL, "I", "experts' width (2 H)", 0},
    {"sparse-step", OPT_WHOLE, USE_SHAPE, &options.sparse_step, 1, MAX_LAYERS, "1", "S", "every S-th layer is sparse",
     0},
    {"dense", OPT_FLAG, USE_SHAPE, &options.dense, 0, 0, "0", "", "as --experts 0", 0},
    {"vocab", OPT_WHOLE, USE_SHAPE, &options.vocab, 1, 1 << 24, NULL, "V", "vocabulary (text: 256)", 0},
    {"tie", OPT_FLAG, USE_SHAPE, &options.tie, 0, 0, "0", "", "LM head = embedding", 0},
    {"qk-norm", OPT_CHOICE, USE_SHAPE, &options.qk_norm, 0, 0, NULL, "none|head|row", "(the class's)", 0},
    {"norm-topk", OPT_WHOLE, USE_SHAPE, &options.norm_topk, 0, 1, NULL, "0|1", "gates sum to 1 (1)", 0},

    {"aux", OPT_REAL, USE_RUN, &options.aux, 0, 1e6, NULL, "C", "balance (0.01 softmax; the model's)", 0},
    {"aux-form", OPT_CHOICE, USE_RUN, &options.aux_form, 0, 0, "switch", "switch|hf", "per layer, or all layers", 0},
    {"z-loss", OPT_REAL, USE_RUN, &options.z_loss, 0, 1e6, "0", "C", "keeps router logits small", 0},
    {"aux-adaptive", OPT_FLAG, USE_RUN, &options.aux_adaptive, 0, 0, "0", "", "--aux follows each layer's load", 0},
    {"router", OPT_CHOICE, USE_SHAPE, &options.router, 0, 0, "softmax", "softmax|sigmoid|lpr", "", 0},
    {"bias-rate", OPT_REAL, USE_RUN, &options.bias_rate, 0, 1, "0.001", "G", "of sigmoid's bias", 0},
    {"logit-norm", OPT_REAL, USE_SHAPE, &options.logit_norm, 0, 1e6, "0", "LAMBDA", "normalises logits; 0: off", 0},
    {"topk-range", OPT_TEXT, USE_RUN, &options.topk_range, 0, 0, NULL, "LO:HI", "draw K per layer and step", 0},
    {"family-penalty", OPT_REAL, USE_RUN, &options.family_penalty, 0, 1e6, NULL, "B", "of copies (1, if they are new)",
     0},
    {"family-steps", OPT_WHOLE, USE_RUN, &options.family_steps, 1, BIG, NULL, "S", "until it is 0 (half of all)", 0},
    {"lpr-dim", OPT_WHOLE, USE_SHAPE, &options.lpr_dim, 1, 1 << 14, "16", "D", "latent dimensions", 0},
    {"lpr-weight", OPT_REAL, USE_SHAPE, &options.lpr_weight, 0, 1e6, "0.01", "C", "of all LPR losses", 0},
    {"lpr-diversity", OPT_REAL, USE_SHAPE, &options.lpr_diversity, 0, 1e6, "1", "C", "of diversity", 0},
    {"lpr-kl", OPT_REAL, USE_SHAPE, &options.lpr_kl, 0, 1e6, "0.01", "C", "of the KL divergence", 0},
    {"lpr-align", OPT_REAL, USE_SHAPE, &options.lpr_align, 0, 1e6, "0.05", "C", "of alignment", 0},
    {"lpr-align-form", OPT_CHOICE, USE_SHAPE, &options.lpr_align_form, 0, 0, "sum", "sum|mean", "over tokens", 0},

    {"lr", OPT_REAL, USE_RUN, &options.lr, 0, 1e6, NULL, "X", "rate (2e-3; 2e-4 with --model)", 0},
    {"min-lr", OPT_REAL, USE_RUN, &options.min_lr, 0, 1e6, "0", "X", "at the end of the decay", 0},
    {"warmup", OPT_WHOLE, USE_RUN, &options.warmup, 0, BIG, NULL, "N", "steps (a 20th of all, at most 100)", 0},
    {"schedule", OPT_CHOICE, USE_RUN, &options.schedule, 0, 0, "wsd", "wsd|cosine|constant", "", 0},
    {"decay-frac", OPT_REAL, USE_RUN, &options.decay_frac, 0, 1, "0.1", "X", "last part of the steps, wsd", 0},
    {"weight-decay", OPT_REAL, USE_RUN, &options.weight_decay, 0, 1e6, "0.1", "X", "of matrices", 0},
    {"beta1", OPT_REAL, USE_RUN, &options.beta1, 0, 0.999999, "0.9", "X", "AdamW", 0},
    {"beta2", OPT_REAL, USE_RUN, &options.beta2, 0, 0.999999, "0.95", "X", "AdamW", 0},
    {"eps", OPT_REAL, USE_RUN, &options.eps, 1e-30, 1, "1e-8", "X", "AdamW", 0},
    {"clip", OPT_REAL, USE_RUN, &options.clip, 0, 1e6, "1", "X", "gradient norm; 0: never", 0},

    {"eval", OPT_FLAG, USE_OTHER, &options.eval, 0, 0, "0", "", "loss of --model on --data", 0},
    {"load", OPT_FLAG, USE_OTHER, &options.load, 0, 0, "0", "", "and each layer's load", 0},
    {"trace", OPT_TEXT, USE_OTHER, &options.trace, 0, 0, NULL, "F.csv", "and each token's experts", 0},
    {"dump", OPT_TEXT, USE_OTHER, &options.dump, 0, 0, NULL, "F", "logits, gradients of a batch", 0},
    {"prompt", OPT_TEXT, USE_OTHER, &options.prompt, 0, 0, NULL, "TEXT", "continue this", 0},
    {"prompt-ids", OPT_TEXT, USE_OTHER, &options.prompt_ids, 0, 0, NULL, "1,2,..", "the same as tokens", 0},
    {"tokens", OPT_WHOLE, USE_OTHER, &options.tokens, 0, 1 << 24, "256", "N", "to generate", 0},
    {"temperature", OPT_REAL, USE_OTHER, &options.temperature, 0, 100, "0.8", "X", "0: greedy", 0},
    {"top-p", OPT_REAL, USE_OTHER, &options.top_p, 0, 1, "1", "X", "nucleus", 0},
    {"top-k", OPT_WHOLE, USE_OTHER, &options.top_k, 0, 1 << 24, "0", "N", "likeliest; 0: all", 0},
};
enum { NUM_OPTIONS = sizeof option_table / sizeof option_table[0] };

static Option* option_find(const char* name) {
    for (int i = 0; i < NUM_OPTIONS; i++)
        if (!strcmp(option_table[i].name, name)) return &option_table[i];
    return NULL;
}

static int option_given(const char* name) { return option_find(name)->given; }

// the position of a choice among "a|b|c", or -1
static int choice_index(const char* choices, const char* text) {
    size_t n = strlen(text);
    for (int i = 0;; i++) {
        const char* end = strchr(choices, '|');
        size_t length = end ? (size_t)(end - choices) : strlen(choices);
        if (n == length && !strncmp(choices, text, n)) return i;
        if (!end) return -1;
        choices = end + 1;
    }
}

// Ends the program because getopt_long knew no single option for `argument`, --name or --name=value.
static void option_unknown(const char* argument, const struct option* longs) {
    char candidates[256] = "";
    size_t length = strcspn(argument, "=");
    int found = 0;
    for (; longs->name; longs++) {
        if (length <= 2 || strncmp(argument + 2, longs->name, length - 2)) continue;
        size_t n = strlen(candidates);
        snprintf(candidates + n, sizeof candidates - n, "%s--%s", found++ ? ", " : "", longs->name);
    }
    if (found > 1) die(2, "%s: may be any of %s", argument, candidates);
    if (found == 1) die(2, "%s: the option takes no value", argument);
    die(2, "%s: unknown option; see --help", argument);
}

static void option_set(Option* o, const char* text) {
    char* end;
    if (o->type == OPT_TEXT) {
        *(const char**)o->value = text;
    } else if (o->type == OPT_CHOICE) {
        if (choice_index(o->argument, text) < 0) {
            if (!strcmp(o->name, "precision")) die(2, "--precision %s: the CPU program computes in fp32", text);
            die(2, "--%s %s: expected one of %s", o->name, text, o->argument);
        }
        *(const char**)o->value = text;
    } else if (o->type == OPT_REAL) {
        errno = 0;
        double x = strtod(text, &end);
        if (end == text || *end || !(x >= o->low && x <= o->high))
            die(2, "--%s %s: expected a number from %g to %g", o->name, text, o->low, o->high);
        *(double*)o->value = x;
    } else {
        errno = 0;
        long x = strtol(text, &end, 10);
        if (end == text || *end || errno || (o->type == OPT_WHOLE && (x < o->low || x > o->high)))
            die(2, "--%s %s: expected a whole number from %.0f to %.0f", o->name, text, o->low, o->high);
        *(long*)o->value = x;
    }
}

static void options_reset(void) {
    for (int i = 0; i < NUM_OPTIONS; i++) {
        Option* o = &option_table[i];
        o->given = 0;
        if (o->start) option_set(o, o->start);
        else if (o->type == OPT_WHOLE) *(long*)o->value = UNSET;
        else if (o->type == OPT_REAL) *(double*)o->value = UNSET;
        else *(const char**)o->value = NULL;
    }
}

static void print_help(void) {
    static const struct {
        const char *first, *title;
    } groups[] = {{"data", "Data and run"},
                  {"arch", "A new model"},
                  {"aux", "Router"},
                  {"lr", "Optimiser"},
                  {"eval", "Instead of training"}};
    printf("train_moe %s: trains, evaluates and samples mixture-of-experts GPTs. Without options: a demonstration.\n",
           VERSION);
    int column = 0;         // two options in a line
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const Option* o = &option_table[i];
        char name[64], text[160], start[40] = "";
        for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++)
            if (!strcmp(o->name, groups[g].first)) {
                printf("%s%s\n", column ? "\n" : "", groups[g].title);
                column = 0;
            }
        snprintf(name, sizeof name, "--%s %s", o->name, o->argument);
        if (o->start && o->type != OPT_FLAG) snprintf(start, sizeof start, " (%s)", o->start);
        snprintf(text, sizeof text, "  %-19s %s%s", name, o->help, start);
        printf(column ? "%s\n" : "%-59s", text);
        column = !column;
    }
    printf("%s", column ? "\n" : "");
}

static void options_parse(int argc, char** argv) {
    struct option longs[NUM_OPTIONS + 3];
    memset(longs, 0, sizeof longs);
    options_reset();
    for (int i = 0; i < NUM_OPTIONS; i++) {
        longs[i].name = option_table[i].name;
        longs[i].has_arg = option_table[i].type == OPT_FLAG ? no_argument : required_argument;
    }
    longs[NUM_OPTIONS].name = "help";
    longs[NUM_OPTIONS + 1].name = "version";
    // beyond any character; were they equal, getopt would not see that an abbreviation is ambiguous
    for (int i = 0; i < NUM_OPTIONS + 2; i++) longs[i].val = 256 + i;
    opterr = 0;
    optind = 1;
    int c;
    while ((c = getopt_long(argc, argv, ":", longs, NULL)) != -1) {
        int index = c - 256;
        if (c == ':') die(2, "%s wants a value; see --help", argv[optind - 1]);
        if (c == '?' && optopt > 0 && optopt < 256) die(2, "-%c: unknown option; see --help", optopt);
        if (c == '?') option_unknown(argv[optind - 1], longs);
        if (index == NUM_OPTIONS) {
            print_help();
            exit(0);
        }
        if (index == NUM_OPTIONS + 1) {
            printf("%s %s\n", program_name, VERSION);
            exit(0);
        }
        option_set(&option_table[index], option_table[index].type == OPT_FLAG ? "1" : optarg);
        option_table[index].given = 1;
    }
    if (optind < argc) die(2, "%s: unexpected argument; options start with --, see --help", argv[optind]);
}

// trainer.json: the options of the run, the step it has reached, and the load counted since the last validation.
static void trainer_to_json(Text* t, const Model* m, long step) {
    const Config* c = &m->config;
    text_print(t, "{\n  \"version\": \"%s\",\n  \"step\": %ld,\n  \"family_start\": %ld,\n  \"reads_bytes\": %d,\n"
               "  \"options\": {", VERSION, step, m->family_start, m->reads_bytes);
    for (int i = 0, listed = 0; i < NUM_OPTIONS; i++) {
        const Option* o = &option_table[i];
        int is_text = o->type == OPT_TEXT || o->type == OPT_CHOICE;
        if (o->use != USE_RUN || (is_text && !*(const char**)o->value)) continue;
        if (!is_text && (o->type == OPT_REAL ? *(double*)o->value : (double)*(long*)o->value) == UNSET) continue;
        text_print(t, "%s\n    \"%s\": ", listed++ ? "," : "", o->name);
        if (is_text) text_json_string(t, *(const char**)o->value);
        else if (o->type == OPT_REAL) text_json_double(t, *(double*)o->value);
        else text_print(t, "%ld", *(long*)o->value);
    }
    text_print(t, "\n  },\n  \"load\": [");
    for (long i = 0; i < (long)c->num_layers * c->num_experts; i++) text_print(t, "%s%ld", i ? "," : "", m->load[i]);
    text_print(t, "],\n  \"observed\": [");
    for (int i = 0; i < OBSERVED_NUMBERS * c->num_layers && c->num_experts > 0; i++) {
        text_print(t, i ? "," : "");
        text_json_double(t, ((const double*)m->observed)[i]);
    }
    text_print(t, "],\n  \"aux_coefficients\": [");
    for (int l = 0; l < c->num_layers && m->balance.adaptive; l++) {
        text_print(t, l ? "," : "");
        text_json_double(t, m->aux_coefficients[l]);
    }
    text_print(t, "]\n}\n");
}

// The reverse of the lists at the end of trainer_to_json.
static void trainer_restore(Model* m, const Json* state) {
    const Config* c = &m->config;
    const Json *load = json_get(state, "load"), *observed = json_get(state, "observed"),
               *aux = json_get(state, "aux_coefficients");
    for (int i = 0; load && i < load->count && i < c->num_layers * c->num_experts; i++)
        m->load[i] = (long)load->items[i]->number;
    for (int i = 0; observed && i < observed->count && i < OBSERVED_NUMBERS * c->num_layers; i++)
        ((double*)m->observed)[i] = observed->items[i]->number;
    for (int l = 0; aux && l < aux->count && l < c->num_layers; l++) m->aux_coefficients[l] = aux->items[l]->number;
}

static Json* trainer_state = NULL;          // what --resume read

// Takes the options that were not given from OUT/trainer.json and returns the step that it has reached. The parsed file
// holds the texts of the options, and the load for the model, so it is kept.
static long trainer_read(const char* out, Json** kept) {
    char path[PATH_SIZE];
    Error error = {""};
    join_path(path, out, "trainer.json");
    *kept = json_read(path, &error);
    char model[PATH_SIZE];
    if (access(path, F_OK))
        die(2, access(join_path(model, out, "config.json"), F_OK)
                   ? "--out %s holds no checkpoint to go on from; leave out --resume to start"
                   : "--out %s holds no checkpoint to go on from, but a model; give it as --model and another --out",
            out);
    if (!*kept) die(2, "%s", error.text);
    const Json* saved = json_get(*kept, "options");
    long step = json_whole(json_get(*kept, "step"), LONG_MAX);
    if (!saved || step < 0) die(2, "%s: no options or step; this is not the trainer.json of a run", path);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        Option* o = &option_table[i];
        const Json* value = json_get(saved, o->name);
        if (o->use == USE_RUN && !o->given && value && value->string) option_set(o, value->string);
    }
    return step;
}

// A new model as the options describe it. vocab_size stays 0 if it was not given; the data decides.
static void config_from_options(Config* c) {
    memset(c, 0, sizeof *c);
    int dense = options.dense || options.experts == 0, kind = choice_index("qwen3|mixtral|olmoe", options.arch);
    if (kind == 2 && dense) die(2, "--arch olmoe: has no dense form; --arch qwen3 or mixtral (then a Llama) have one");
    c->arch = kind == 0 ? (dense ? QWEN3 : QWEN3_MOE) : kind == 1 ? (dense ? LLAMA : MIXTRAL) : OLMOE;
    c->num_layers = (int)options.layers;
    c->hidden_size = (int)options.hidden;
    c->num_heads = (int)options.heads;
    int kv = options.heads % 2 ? (int)options.heads : (int)options.heads / 2;
    c->num_kv_heads = options.kv_heads == UNSET ? kv : (int)options.kv_heads;
    c->head_dim = options.head_dim == UNSET ? c->hidden_size / c->num_heads : (int)options.head_dim;
    c->intermediate_size = options.ffn == UNSET ? 3 * c->hidden_size : (int)options.ffn;
    c->vocab_size = options.vocab == UNSET ? 0 : (int)options.vocab;
    c->max_position_embeddings = (int)options.seq;
    c->tie_word_embeddings = (int)options.tie;
    c->rope_theta = 10000;
    c->rms_norm_eps = 1e-6;
    c->qk_norm = kind == 0 ? QK_NORM_HEAD : kind == 1 ? QK_NORM_NONE : QK_NORM_ROW;
    static const char* fits[] = {"mixtral", "qwen3", "olmoe"};          // by kind of norm
    if (options.qk_norm && choice_index("none|head|row", options.qk_norm) != (int)c->qk_norm)
        die(2, "--qk-norm %s: --arch %s has no such norm; --arch %s does", options.qk_norm, options.arch,
            fits[choice_index("none|head|row", options.qk_norm)]);
    if (c->num_heads % c->num_kv_heads)
        die(2, "--kv-heads %d: --heads %d is no multiple of it", c->num_kv_heads, c->num_heads);
    if (options.head_dim == UNSET && c->hidden_size % c->num_heads)
        die(2, "--hidden %d: no multiple of --heads %d; give --head-dim", c->hidden_size, c->num_heads);
    if (c->head_dim % 2 || c->head_dim < 2) die(2, "--head-dim %d: rotary positions need an even one", c->head_dim);
    if (kind == 2 && c->head_dim * c->num_heads != c->hidden_size)
        die(2, "--head-dim %d: --arch olmoe has hidden / heads; --arch qwen3 is free in it", c->head_dim);
    for (int i = 0; i < 3; i++) strcpy(c->token_ids[i], "null");
    static const char* moe_only[] = {"topk", "expert-ffn", "norm-topk", "sparse-step"};
    for (int i = 0; dense && i < 4; i++)
        if (option_given(moe_only[i]))
            die(2, "--%s: a dense model has no experts; leave out --dense or --experts 0", moe_only[i]);
    static const char* variants[] = {"router",        "logit-norm", "lpr-dim",   "lpr-weight",
                                     "lpr-diversity", "lpr-kl",     "lpr-align", "lpr-align-form"};
    c->router = (Router)choice_index("softmax|sigmoid|lpr", options.router);
    for (int i = 0; dense && i < 8; i++)
        if (option_given(variants[i]))
            die(2, "--%s: a dense model has no router; leave out --dense or --experts 0", variants[i]);
    for (int i = 2; c->router != ROUTER_LPR && i < 8; i++)
        if (option_given(variants[i])) die(2, "--%s: belongs to --router lpr", variants[i]);
    if (dense) return;
    if (options.sparse_step == 1 && option_given("ffn"))
        die(2, "--ffn: every layer is sparse, so there is no dense one; --expert-ffn is the width of an expert");
    c->num_experts = (int)options.experts;
    c->num_experts_per_tok = options.topk == UNSET ? imin(2, c->num_experts) : (int)options.topk;
    c->moe_intermediate_size = options.expert_ffn == UNSET ? 2 * c->hidden_size : (int)options.expert_ffn;
    c->norm_topk_prob = options.norm_topk == UNSET ? 1 : (int)options.norm_topk;
    if (c->num_experts_per_tok > c->num_experts)
        die(2, "--topk %d: there are only %d experts", c->num_experts_per_tok, c->num_experts);
    if (kind == 1 && !c->norm_topk_prob)
        die(2, "--norm-topk 0: --arch mixtral always renormalises; --arch qwen3 or olmoe fit");
    if (kind != 0 && options.sparse_step > 1)
        die(2, "--sparse-step %ld: in --arch %s all layers are sparse; --arch qwen3 fits", options.sparse_step,
            options.arch);
    for (int l = 0; l < c->num_layers; l++) c->sparse[l] = (l + 1) % options.sparse_step == 0;
    c->logit_norm = options.logit_norm;
    if (c->router == ROUTER_LPR) {
        if (c->logit_norm > 0)
            die(2, "--logit-norm: LPR's scores are cosines already; use it with --router softmax or sigmoid");
        c->norm_topk_prob = 1;
        c->lpr_latent_dim = (int)options.lpr_dim;
        c->lpr_weight = options.lpr_weight;
        c->lpr_diversity = options.lpr_diversity;
        c->lpr_kl = options.lpr_kl;
        c->lpr_align = options.lpr_align;
        c->lpr_align_mean = !strcmp(options.lpr_align_form, "mean");
    }
    // Qwen3-MoE with sigmoid scores is Dots1, which knows dense layers only below the sparse ones
    if (kind == 0 && c->router == ROUTER_SIGMOID && c->logit_norm == 0 && options.sparse_step == 1 &&
        c->num_experts > 1)
        c->arch = DOTS1;
    if (count_sparse(c) == 0)
        die(2, "--sparse-step %ld: leaves no sparse layer among %d; --dense does that", options.sparse_step,
            c->num_layers);
}

static int has_tokenizer(const char* dir) {
    static const char* signs[] = {"tokenizer.json", "tokenizer.model", "vocab.json"};
    char path[PATH_SIZE];
    int found = 0;
    for (int i = 0; i < 3; i++) found |= !access(join_path(path, dir, signs[i]), F_OK);
    return found;
}

// Whether the tokens of the model in `dir` are bytes: never with a tokenizer or fewer tokens than bytes, always with
// 256. Otherwise the run that made the model told, or the upcycle after it, or nobody.
static BytesAllowed reads_bytes(const Config* c, const char* dir) {
    static const char* records[] = {"trainer.json", "upcycle.json"};
    char path[PATH_SIZE];
    Error ignored = {""};
    if (has_tokenizer(dir) || c->vocab_size < 256) return NO_BYTES;
    if (c->vocab_size == 256) return BYTES;
    long told = -1;
    for (int i = 0; i < 2 && told < 0; i++) {
        Json* record = access(join_path(path, dir, records[i]), F_OK) ? NULL : json_read(path, &ignored);
        told = json_whole(json_get(record, "reads_bytes"), 1);
        json_free(record);
    }
    return told == 0 ? NO_BYTES : told == 1 ? BYTES : PERHAPS_BYTES;
}

// Longer sequences than the model was made for are computed all the same, but not in silence.
static void check_length(Config* c, int T) {
    if (c->sliding_window && c->sliding_window < T)
        die(2, "--seq %d: the model has sliding_window %d, which is not supported; use a shorter --seq", T,
            c->sliding_window);
    if (T <= c->max_position_embeddings) return;
    fprintf(stderr, "%s: warning: --seq %d goes beyond the model's max_position_embeddings, %d\n", program_name, T,
            c->max_position_embeddings);
    c->max_position_embeddings = T;
}

static void print_model(const Model* m) {
    const Config* c = &m->config;
    long total, active;
    count_parameters(c, &total, &active);
    printf("model: %s, %d layers, hidden %d, %d/%d heads x %d, vocabulary %d", archs[c->arch].model_type, c->num_layers,
           c->hidden_size, c->num_heads, c->num_kv_heads, c->head_dim, c->vocab_size);
    if (c->num_experts)
        printf(", %d experts of width %d, %d per token", c->num_experts, c->moe_intermediate_size,
               c->num_experts_per_tok);
    printf("\nparameters: %ld, %ld of them active for a token\n", total, active);
    printf("memory: %.1f MB = parameters %.1f + gradients and moments %.1f + activations %.1f\n",
           (m->bytes_params + m->bytes_optimizer + m->bytes_activations) / 1e6, m->bytes_params / 1e6,
           m->bytes_optimizer / 1e6, m->bytes_activations / 1e6);
    fflush(stdout);
}

// A model with the parameters of --model.
static Model* load_model(Config* c, const char* dir, Purpose purpose, int B, int T, int positions) {
    Error error = {""};
    Model* m = model_plan(c, purpose, B, T, positions, NULL);
    if (purpose != FOR_GENERATION) print_model(m);      // what is generated stands alone
    model_allocate(m);
    if (!checkpoint_load(m, dir, &error)) die(2, "%s", error.text);
    m->backend->send(m, PARAMETERS);
    return m;
}

static Balance balance_from_options(const Config* c) {
    Balance b;
    b.aux = (float)(options.aux == UNSET ? c->router_aux_loss_coef : options.aux);
    b.z = (float)options.z_loss;
    b.aux_form = (AuxForm)choice_index("switch|hf", options.aux_form);
    b.adaptive = (int)options.aux_adaptive;
    if (b.adaptive && b.aux_form == AUX_HF)
        die(2, "--aux-adaptive: a coefficient for each layer wants --aux-form switch");
    return b;
}

static int run_eval(Config* c) {
    if (!options.model) die(2, "--eval wants --model DIR");
    if (!options.data) die(2, "--eval wants --data FILE");
    if (!option_given("seq")) options.seq = imin(1024, c->max_position_embeddings);
    int B = (int)options.batch, T = (int)options.seq;
    Dataset* d = dataset_open(options.data, T, c->vocab_size, WHOLE, reads_bytes(c, options.model));
    check_length(c, T);
    Model* m = load_model(c, options.model, FOR_SCORING, B, T, T);
    Batch batch = batch_create(B, T);
    m->counting_load = options.load || options.trace;
    if (m->counting_load && count_sparse(c) == 0)
        die(2, "--%s: a dense model has no experts", options.trace ? "trace" : "load");
    if (options.trace) {
        m->trace = fopen(options.trace, "w");
        if (!m->trace) die(2, "--trace %s: %s", options.trace, strerror(errno));
        fprintf(m->trace, "window,position,token,layer");
        for (int k = 0; k < c->num_experts_per_tok; k++) fprintf(m->trace, ",expert_%d", k + 1);
        for (int k = 0; k < c->num_experts_per_tok; k++) fprintf(m->trace, ",gate_%d", k + 1);
        fprintf(m->trace, "\n");
    }
    double start = seconds(), loss = evaluate(m, d, 0, batch), elapsed = seconds() - start;
    if (m->trace && fclose(m->trace)) die(1, "--trace %s: %s", options.trace, strerror(errno));
    printf("loss %.6f | perplexity %.4f", loss, exp(loss));
    if (d->raw) printf(" | bits per byte %.4f", loss / M_LN2);
    printf(" | %ld tokens, %.0f tokens/s\n", d->windows * T, d->windows * T / elapsed);
    if (options.load) report_load(m, 1, NULL, 0);
    free(batch.tokens);
    dataset_close(d);
    model_free(m);
    return 0;
}

static int run_dump(Config* c) {
    if (!options.data) die(2, "--dump wants --data FILE");
    int B = (int)options.batch, T = (int)options.seq, V = c->vocab_size, count = 0;
    Dataset* d = dataset_open(options.data, T, V, WHOLE, reads_bytes(c, options.model));
    if (d->windows < B) die(2, "--batch %d: %s has only %ld windows of %d tokens", B, options.data, d->windows, T + 1);
    check_length(c, T);
    Model* m = load_model(c, options.model, FOR_TRAINING, B, T, T);
    Batch batch = batch_create(B, T);
    for (int b = 0; b < B; b++) dataset_window(d, b, batch.tokens + (long)b * T, batch.targets + (long)b * T);
    m->balance = balance_from_options(c);
    m->backend->forward(m, batch.tokens, batch.targets, B, T);
    m->backend->read_back(m, LOGITS | ROUTING);
    float* logits = (float*)checked_malloc(sizeof(float) * (size_t)B * T * V);      // the backward pass overwrites them
    memcpy(logits, m->logits, sizeof(float) * (size_t)B * T * V);
    m->backend->backward(m, 1);
    m->backend->read_back(m, GRADIENTS);
    Losses losses = take_losses(m);
    OutTensor* out = (OutTensor*)checked_malloc(sizeof(OutTensor) * (size_t)(5 + c->num_layers + m->layout.count));
    char(*names)[128] = (char(*)[128])checked_malloc(sizeof(*names) * (size_t)(c->num_layers + m->layout.count));
    float loss = (float)losses.loss, aux_loss = (float)losses.aux;
    OutTensor first[] = {{"tokens", "I32", 2, {B, T, 0}, batch.tokens}, {"targets", "I32", 2, {B, T, 0}, batch.targets},
                         {"logits", "F32", 3, {B, T, V}, logits}, {"loss", "F32", 1, {1, 0, 0}, &loss},
                         {"aux_loss", "F32", 1, {1, 0, 0}, &aux_loss}};
    for (; count < 5; count++) out[count] = first[count];
    for (int l = 0; l < c->num_layers; l++) {
        if (!c->sparse[l]) continue;
        snprintf(names[count - 5], sizeof names[0], "router.%d", l);
        OutTensor o = {names[count - 5], "I32", 2, {(long)B * T, c->num_experts_per_tok, 0}, m->layers[l].experts};
        out[count++] = o;
    }
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        if (strstr(t->name, "e_score_correction_bias")) continue;       // is not trained by a gradient
        snprintf(names[count - 5], sizeof names[0], "grad.%s", t->name);
        OutTensor o = {
            names[count - 5], "F32", tensor_is_matrix(t) ? 2 : 1, {t->rows, t->cols, 0}, m->grads + t->offset};
        out[count++] = o;
    }
    Error error = {""};
    char temporary[PATH_SIZE];
    snprintf(temporary, sizeof temporary, "%s.saving", options.dump);
    if (!safetensors_write(temporary, out, count, &error) || rename(temporary, options.dump)) {
        unlink(temporary);
        die(1, "%s", error.text[0] ? error.text : strerror(errno));
    }
    printf("loss %.6f, aux loss %.6f; %d tensors in %s\n", losses.loss, losses.aux, count, options.dump);
    free(logits);
    free(out);
    free(names);
    free(batch.tokens);
    dataset_close(d);
    model_free(m);
    return 0;
}

static int run_prompt(Config* c) {
    Tokenizer* tokenizer = tokenizer_open(options.model, c->vocab_size);
    int prompt = 0, tokens = (int)options.tokens;
    size_t room = strlen(options.prompt ? options.prompt : options.prompt_ids) + (size_t)tokens + 1;
    int* ids = (int*)checked_malloc(sizeof(int) * room);
    if (options.prompt_ids) {
        for (const char* s = options.prompt_ids; *s;) {
            char* end;
            long id = strtol(s, &end, 10);
            if (end == s || (*end && *end != ',') || id < 0 || id >= c->vocab_size)
                die(2, "--prompt-ids: expected numbers from 0 to %d with commas between them, found %.20s",
                    c->vocab_size - 1, s);
            ids[prompt++] = (int)id;
            s = *end ? end + 1 : end;
        }
    } else {
        if (c->vocab_size < 256)
            die(2, "--prompt: this model's vocabulary has %d tokens, too few for bytes; give --prompt-ids",
                c->vocab_size);
        BytesAllowed bytes = reads_bytes(c, options.model);
        if (bytes == NO_BYTES)
            die(2,
                "--prompt: this model reads tokens; encode the text with dev/reference/encode.py and give "
                "--prompt-ids");
        if (bytes == PERHAPS_BYTES) warn_of_bytes("--prompt", c->vocab_size);
        for (const char* s = options.prompt; *s; s++) ids[prompt++] = (unsigned char)*s;
    }
    if (prompt == 0) die(2, "the prompt is empty; give at least one token to go on from");
    int positions = imin(prompt + tokens, c->max_position_embeddings);
    if (c->sliding_window && c->sliding_window < positions)
        die(2, "--tokens %d: the model has sliding_window %d, which is not supported; ask for fewer", tokens,
            c->sliding_window);
    Model* g = load_model(c, options.model, FOR_GENERATION, 1, imin(positions, 256), positions);
    Sampling how = {options.temperature, options.top_p, (int)options.top_k, (uint64_t)options.seed};
    signal(SIGINT, on_signal);
    double start = seconds();
    int made = generate(g, tokenizer, ids, prompt, tokens, &how, stdout);
    fprintf(stderr, "\n%d tokens, %.1f tokens/s\n", made, made / (seconds() - start));
    free(ids);
    tokenizer_close(tokenizer);
    model_free(g);
    return stop_signal ? 130 : 0;
}

// The generator shares the parameters of the model in training; what else decides its routing is copied.
static void print_sample(Model* generator, const Model* trained, uint64_t seed, int tokens) {
    generator->has_families = trained->has_families;
    generator->config.family_penalty = trained->config.family_penalty;
    memcpy(generator->family, trained->family,
           sizeof(int) * (size_t)trained->config.num_layers * (size_t)trained->config.num_experts);
    generator->backend->send(generator, 0);
    Tokenizer* tokenizer = tokenizer_open(generator->source, generator->config.vocab_size);
    int* ids = (int*)checked_malloc(sizeof(int) * (size_t)(tokens + 1));
    Sampling how = {options.temperature, options.top_p, (int)options.top_k, seed};
    int bos = atoi(generator->config.token_ids[0]);     // "" and null, as in byte models, give 0
    ids[0] = tokenizer->pieces && bos < generator->config.vocab_size ? bos : '\n' % generator->config.vocab_size;
    generate(generator, tokenizer, ids, 1, tokens, &how, stdout);
    printf("\n");
    free(ids);
    tokenizer_close(tokenizer);
}

// --topk-range LO:HI
static void topk_range_from_options(Config* c, Run* run) {
    char rest;
    if (!options.topk_range) return;
    if (sscanf(options.topk_range, "%d:%d%c", &run->topk_low, &run->topk_high, &rest) != 2 || run->topk_low < 1 ||
        run->topk_high < run->topk_low || run->topk_high > c->num_experts)
        die(2, "--topk-range %s: expected LO:HI with 1 <= LO <= HI <= %d experts", options.topk_range, c->num_experts);
    c->topk_limit = run->topk_high;
}

// Makes OUT if it is not there, takes the lock that keeps a second run out (the system drops it when this one ends,
// however it ends), and refuses to write over a run.
static void open_out(const char* out) {
    char path[PATH_SIZE];
    Error error = {""};
    for (const char* end = strchr(out + 1, '/'); end && !options.resume; end = strchr(end + 1, '/')) {    // its parents
        snprintf(path, sizeof path, "%.*s", (int)(end - out), out);
        mkdir(path, 0777);
    }
    if (!options.resume && mkdir(out, 0777) && errno != EEXIST) die(2, "--out %s: %s", out, strerror(errno));
    int fd = open(out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) die(2, "--out %s: %s", out, strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB)) die(2, "--out %s: another run is writing there", out);
    if (options.resume && !finish_save(out, &error)) die(1, "%s", error.text);
    static const char* signs[] = {"trainer.json", ".ready", "config.json", "model.safetensors"};
    for (int i = 0; !options.resume && i < 4; i++) {
        join_path(path, out, signs[i]);
        if (!access(path, F_OK))
            die(2, i < 2 ? "--out %s: holds %s; --resume goes on with that run, another --out starts a new one"
                         : "--out %s: holds %s, but no run; to train this model give it as --model and another --out",
                out, signs[i]);
    }
}

static int run_train(Config* c, long first_step) {
    int B = (int)options.batch, T = (int)options.seq, demonstration = !options.data && !options.out && !options.model;
    Error error = {""};
    signal(SIGPIPE, SIG_IGN); // that nobody reads what is printed (`| head`) is no reason to lose the work
    if (options.resume) options.model = options.out;
    check_length(c, T);
    BytesAllowed bytes_are_tokens = options.model                                    ? reads_bytes(c, options.model)
                                    : c->vocab_size == 0 || c->vocab_size >= 256 ? BYTES
                                                                                   : NO_BYTES;
    if (!options.data) options.data = "<embedded>";
    int split = !options.val;
    Dataset *data = dataset_open(options.data, T, INT_MAX, split ? TRAIN_PART : WHOLE, bytes_are_tokens), *val = NULL;
    if (c->vocab_size == 0 && !data->raw)
        die(2, "--vocab is missing: token shards do not say how many tokens there are");
    if (c->vocab_size == 0) c->vocab_size = 256;
    data->vocab_size = c->vocab_size;
    if (split && data->raw) val = dataset_open(options.data, T, c->vocab_size, VAL_PART, bytes_are_tokens);
    if (options.val && strcmp(options.val, "none"))
        val = dataset_open(options.val, T, c->vocab_size, WHOLE, bytes_are_tokens);
    if (data->windows < 1) die(2, "%s: no window of %d tokens", options.data, T + 1);
    if (val && val->raw != data->raw)
        die(2, "--val %s: --data is %s, and so --val must be", options.val, data->raw ? "text" : "token shards");

    if (!options.resume) {
        dataset_check(data);
        if (val) dataset_check(val);
    }

    // what was not given and depends on more
    if (options.lr == UNSET) options.lr = options.model ? 2e-4 : 2e-3;
    if (options.min_lr > options.lr && (option_given("min-lr") || option_given("lr")))
        die(2, "--min-lr %g: the decay ends there, so it must not be above --lr, %g", options.min_lr, options.lr);
    static const char* of_routers[] = {"aux", "aux-form", "z-loss", "aux-adaptive", "topk-range"};
    for (int i = 0; i < 5 && c->num_experts == 0; i++)
        if (option_given(of_routers[i])) die(2, "--%s: a dense model has no router", of_routers[i]);
    if (option_given("bias-rate") && c->router != ROUTER_SIGMOID)
        die(2, "--bias-rate: only the router sigmoid has a bias");
    if (options.warmup == UNSET && options.steps > 0) options.warmup = lmin(100, options.steps / 20);
    if (options.aux == UNSET)
        options.aux = options.model ? c->router_aux_loss_coef : c->router == ROUTER_SOFTMAX ? 0.01 : 0;
    c->router_aux_loss_coef = options.aux;
    Run run;
    memset(&run, 0, sizeof run);
    run.steps = options.steps;
    run.B = B;
    run.T = T;
    run.accum = (int)options.accum;
    run.lr = options.lr;
    run.min_lr = options.min_lr;
    run.decay_frac = options.decay_frac;
    run.warmup = options.warmup;
    run.schedule = (Schedule)choice_index("wsd|cosine|constant", options.schedule);
    run.adamw.beta1 = options.beta1;
    run.adamw.beta2 = options.beta2;
    run.adamw.eps = options.eps;
    run.adamw.weight_decay = options.weight_decay;
    run.adamw.clip = options.clip;
    run.seed = (uint64_t)options.seed;
    run.val_every = options.val_every;
    run.val_batches = options.val_batches;
    run.save_every = options.save_every;
    run.sample_every = options.sample_every;
    run.bias_rate = options.bias_rate;
    topk_range_from_options(c, &run);
    if (c->family_penalty > 0 || options.family_penalty != UNSET || options.family_steps != UNSET) {
        if (!options.model)
            die(2, "--family-penalty: a new model has no families; they come with a --model from upcycle");
        if (c->num_experts == 0 || c->router == ROUTER_LPR)
            die(2, "--family-penalty: a model %s has no families to penalise",
                c->num_experts ? "with the router lpr" : "without experts");
        if (options.family_penalty == UNSET) options.family_penalty = 1;
        // a run whose moments upcycle carried over goes on at its source's step, and the penalty starts there
        long start = json_whole(json_get(trainer_state, "family_start"), first_step), half;
        run.family_start = start > 0 ? start : 0;
        half = (options.steps - run.family_start) / 2;
        if (options.family_steps == UNSET && options.steps > 0) options.family_steps = half > 1 ? half : 1;
        run.family_strength = options.family_penalty;
        run.family_steps = options.family_steps;
        if (options.steps > 0)
            c->family_penalty = family_penalty_at(run.family_strength, first_step - run.family_start, run.family_steps);
    }

    Model *m = model_plan(c, FOR_TRAINING, B, T, T, NULL), *generator = NULL;
    print_model(m);
    model_allocate(m);
    if (demonstration || run.sample_every > 0) {
        generator = model_create(c, FOR_GENERATION, 1, T, T, m);
    }
    m->balance = balance_from_options(c);
    m->family_start = run.family_start;
    // what a model's tokens mean does not change when training goes on with other data
    m->reads_bytes = data->raw || (options.model && bytes_are_tokens == BYTES);
    for (int l = 0; l < c->num_layers; l++) m->aux_coefficients[l] = m->balance.aux;
    if (!options.model) model_init(m, run.seed);
    else if (!checkpoint_load(m, options.model, &error)) die(2, "%s", error.text);
    if (options.resume && !optimizer_load(m, options.out, &error)) die(2, "%s", error.text);
    m->backend->send(m, PARAMETERS | (options.resume ? MOMENTS : 0));
    if (generator) generator->source = m->source;
    if (options.out && !options.resume) open_out(options.out);      // not before everything else is known to be right
    printf("data: %s, %ld tokens, %ld windows of %d\n", options.data, data->tokens, data->windows, T + 1);
    if (val) {
        long seen = run.val_batches > 0 ? lmin(val->windows, run.val_batches * B) : val->windows;
        printf("validation: %s, %ld of %ld windows%s\n", split ? "the last tenth" : options.val, seen, val->windows,
               seen < val->windows ? "; --val-batches 0 takes all" : "");
    }
    if (!options.out) printf("nothing will be saved: there is no --out\n");
    else if (!is_ordinary(c))
        printf("no Hugging Face class is like this model: it will be saved with model_type train_moe\n");
    fflush(stdout);
    if (options.resume) {
        trainer_restore(m, trainer_state);
    }
    int code = train(m, &run, data, val, generator, options.out, first_step);
    if (code == 0 && demonstration) {
        printf("\na sample:\n");
        print_sample(generator, m, run.seed, 600);
    }
    dataset_close(data);
    if (val) dataset_close(val);
    if (generator) model_free(generator);
    model_free(m);
    json_free(trainer_state);
    return code ? code : stop_signal ? 128 + stop_signal : 0;
}

// Does what the options say, with default_backend; returns the exit code.
static int run_command(void) {
    Config config;
    Error error = {""};
#ifdef _OPENMP
    if (options.threads != UNSET) omp_set_num_threads((int)options.threads);
#endif
    int prompting = options.prompt || options.prompt_ids, training = !options.eval && !options.dump && !prompting;
    if ((options.eval != 0) + (options.dump != NULL) + (options.prompt != NULL) + (options.prompt_ids != NULL) > 1)
        die(2, "--eval, --dump, --prompt and --prompt-ids: only one of them at a time");
    if (!training && !options.model)
        die(2, "--%s wants --model DIR", options.eval ? "eval" : options.dump ? "dump" : "prompt");
    // --eval, --dump and --prompt would ignore what describes a run, but for what means something to one of them
    static const char* meant[] = {"data", "batch", "seq", "seed", "aux", "aux-form", "aux-adaptive", "z-loss"};
    for (int i = 0; i < NUM_OPTIONS && !training; i++) {
        const Option* o = &option_table[i];
        int ignored = o->use == USE_RUN || o->value == &options.out || o->value == &options.resume;
        for (int k = 0; k < 8; k++) ignored &= strcmp(o->name, meant[k]) != 0;
        if (o->given && ignored)
            die(2, "--%s belongs to training, and --eval, --dump and --prompt do not train", o->name);
    }
    if (options.resume && !options.out) die(2, "--resume wants --out DIR, the run to go on with");
    if (options.resume && options.model) die(2, "--resume goes on with the model in --out; leave out --model");
    char shape[512] = "";
    for (int i = 0; i < NUM_OPTIONS && (options.model || options.resume); i++) {
        const Option* o = &option_table[i];
        size_t n = strlen(shape);
        if (o->given && (o->use == USE_SHAPE || (training && !strcmp(o->name, "topk"))))
            snprintf(shape + n, sizeof shape - n, "%s--%s", n ? ", " : "", o->name);
    }
    if (shape[0])
        die(2, "a new model is described by %s, but %s has one already; leave out what describes it", shape,
            options.resume ? "--out" : "--model");
    long first_step = 0;
    if (options.resume) {
        open_out(options.out);
        first_step = trainer_read(options.out, &trainer_state);
    }
    const char* dir = options.resume ? options.out : options.model;
    if (dir) {
        if (!config_read(&config, dir, &error)) die(2, "%s", error.text);
    } else {
        config_from_options(&config);
    }
    if ((options.load || options.trace) && !options.eval) die(2, "--load and --trace go with --eval");
    if (dir && options.topk != UNSET) {
        if (options.topk > config.num_experts)
            die(2, "--topk %ld: the model has %d experts", options.topk, config.num_experts);
        config.num_experts_per_tok = (int)options.topk;
    }
    // rows of tokens, and of the experts that they are sent to, are numbered with ints
    int per_token = config.num_experts > 0 ? config.num_experts : 1;
    if ((double)options.batch * (double)options.seq * per_token > INT_MAX)
        die(2, "--batch %ld: with --seq %ld and %d experts it must not exceed %ld; see --accum", options.batch,
            options.seq, per_token, INT_MAX / per_token / options.seq);
    return options.eval   ? run_eval(&config)
           : options.dump ? run_dump(&config)
           : prompting    ? run_prompt(&config)
                          : run_train(&config, first_step);
}

int train_moe_main(int argc, char** argv) {
    options_parse(argc, argv);
    return run_command();
}

#ifndef TRAIN_MOE_NO_MAIN
int main(int argc, char** argv) { return train_moe_main(argc, argv); }
#endif
#endif
