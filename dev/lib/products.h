// products.h: the sums of train_moe.c's section 2, fast and with the same bits. Compiles alone.
#pragma once
#include "threads.h"
#include "amx.h"

// Work for all threads, in units that take unequal time: OpenMP's dynamic schedule, but with regard to where rows lie
// (to be skipped on first reading). Loops over tokens give the threads contiguous shares of the rows (OpenMP's static
// schedule), and units are dealt out likewise: a thread first does those of its own share, whose rows are in its own
// cache, and then helps the others. (dev/bench/README.md: what this and the other choices below bought.)
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

// Speed. The innermost routine, multiply_tile, keeps TILE_ROWS x TILE_COLUMNS sums in registers. For each k it loads
// two vectors of `right`, and each number of `left` it broadcasts is used for two multiply-adds. Its operands are
// copies ("packed"), made just before use in the order in which the tile reads them, small enough for the caches,
// except where they lie that way already, or where each number would be used once or twice only.

#if defined(__AVX512F__)
#define VECTOR_LENGTH 16
#elif defined(__AVX__)
#define VECTOR_LENGTH 8
#else
#define VECTOR_LENGTH 4 // SSE, NEON; other machines: the compiler splits vectors into what they have
#endif

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
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else // the name that older versions of gcc have for it
typedef int places __attribute__((vector_size(4 * VECTOR_LENGTH)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

// How operands are packed: as they are, or for bf16 rounded. Rounded numbers stay floats, with the two of each pair
// along k in each other's place, so that the fp32 tile adds them in the order that section 2 of train_moe.c states. Or
// the pair lies in one word, the even k in its lower half, and one VDPBF16PS adds both products. AMX's TDPBF16PS takes
// LINE pairs at once, and adds in another order: of `left` the LINE words of a row lie together, one row of the tile
// after the other, and words beyond the depth are zero.
typedef enum { PACK_FP32, PACK_ROUNDED, PACK_PAIRS, PACK_TILES } Packing;
static Packing bf16_packing = PACK_ROUNDED; // of bf16: PACK_TILES or PACK_PAIRS where precision.h finds them sound

typedef uint32_t words __attribute__((vector_size(4 * VECTOR_LENGTH), aligned(4), may_alias));
typedef uint32_t word __attribute__((may_alias));

// sum + the two products of a pair from `left`, for all, and the pairs of `right`. Without the instruction, or with
// make BF16=model, its semantics as Intel's manual has them, for tests: a multiply-add of the odd k, then one of the
// even; operands and results below 2^-126 are zero, whatever MXCSR says. (This model flushes after a result was rounded
// as a denormal, FTZ if it would be one with any exponent: just below 2^-126 they may differ.)
#if defined(__AVX512BF16__) && !defined(BF16_MODEL) && !defined(__CUDACC__)
#include <immintrin.h>
#define PAIRS_TILE 1
#define PAIRS_NAME "VDPBF16PS"
ALWAYS_INLINE vector add_pairs(vector sum, const float* left, vector right) {
    uint32_t pair;
    memcpy(&pair, left, sizeof pair);
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)right);
}

// The rounded numbers of k and k + 1 in one word. (VCVTNEPS2BF16 flushes as BF16_OPERAND does.)
ALWAYS_INLINE words half_words(vector x) {
    return (words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
}
ALWAYS_INLINE words pair_up(vector even, vector odd) { return half_words(even) | half_words(odd) << 16; }
#else
#ifdef BF16_MODEL
#define PAIRS_TILE 1
#else
#define PAIRS_TILE 0
#endif
#define PAIRS_NAME "a model of VDPBF16PS"
ALWAYS_INLINE vector flushed(words x) { return (vector)FLUSHED_BITS(x); }

ALWAYS_INLINE vector add_pairs(vector sum, const float* left, vector right) {
    uint32_t pair;
    memcpy(&pair, left, sizeof pair);
    words zero = {0}, l = zero + pair, r = (words)right;
    sum = flushed((words)(flushed((words)sum) + flushed(l & 0xFFFF0000u) * flushed(r & 0xFFFF0000u)));
    return flushed((words)(sum + flushed(l << 16) * flushed(r << 16)));
}

ALWAYS_INLINE words pair_up(vector even, vector odd) {
    return BF16_OPERAND((words)even) >> 16 | BF16_OPERAND((words)odd);
}
#endif

// gcc, tuning for some processors (seen for Zen 2 and Zen 3), splits the multiply-add into two roundings in a loop that
// adds to a single sum, but not in loops with several. That would break the promise of train_moe.c's section 2, so
// where there can be a single sum it is hidden from gcc: an empty piece of assembly "changes" it in its register.
#if defined(__x86_64__)
#define HIDE(sum) __asm__("" : "+v"(sum))
#elif defined(__aarch64__)
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
            t[2 * i] = SHUFFLE(r[i], r[i + VECTOR_LENGTH / 2], LOW_HALVES);
            t[2 * i + 1] = SHUFFLE(r[i], r[i + VECTOR_LENGTH / 2], HIGH_HALVES);
        }
        UNROLL
        for (int i = 0; i < VECTOR_LENGTH; i++) r[i] = t[i];
    }
}

// Stores the numbers of k at their place in a packed copy; of bf16 those of k and k + 1, k even.
ALWAYS_INLINE void put(const Packing how, float* packed, const int width, int k, vector row, vector next) {
    if (how == PACK_FP32) {
        *(vector*)(packed + k * width) = row;
    } else if (how == PACK_ROUNDED) {
        *(words*)(packed + k * width) = BF16_OPERAND((words)next);
        *(words*)(packed + (k + 1) * width) = BF16_OPERAND((words)row);
    } else {
        *(words*)(packed + k / 2 * width) = pair_up(row, next);
    }
}

// The same for numbers that lie together in memory; next = NULL: there are none.
ALWAYS_INLINE void put_rows(const Packing how, float* packed, const int width, int k, const float* row,
                            const float* next) {
    vector zero = {0};
    put(how, packed, width, k, *(const vector*)row, how != PACK_FP32 && next ? *(const vector*)next : zero);
}

// Copies packed[k*width + q] = source[q*q_step + k*k_step] for q < count, k < depth, and fills up with zeros to whole
// vectors. (Vectors beyond that, in a panel cut off, keep what they held: only columns that are thrown away see it.)
// One of the steps is 1: if it is k_step, squares are transposed. In bf16 pairs take the place of single values of k,
// and zero that of a partner beyond the depth.
ALWAYS_INLINE void pack(const Packing how, float* packed, const int width, const float* source, long q_step,
                        long k_step, int count, int depth) {
    for (int q = 0; q < count; q += VECTOR_LENGTH) {
        int valid = imin(VECTOR_LENGTH, count - q), k = 0, together = how == PACK_FP32 ? 1 : 2;
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
                for (int i = 0; i < VECTOR_LENGTH; i += together) {
                    put(how, p, width, k + i, square[i], square[i + together - 1]);
                }
            }
        } else if (valid == VECTOR_LENGTH) {
            for (; k < depth; k += together) {
                const float* row = s + k * k_step;
                put_rows(how, p, width, k, row, k + 1 < depth ? row + k_step : NULL);
            }
        }
        for (; k < depth && how != PACK_FP32; k += 2) { // what is left over at the edges
            float pair[2][VECTOR_LENGTH] = {{0}};
            for (int n = 0; n < imin(2, depth - k); n++) {
                for (int i = 0; i < valid; i++) pair[n][i] = s[i * q_step + (k + n) * k_step];
            }
            put_rows(how, p, width, k, pair[0], pair[1]);
        }
        for (; k < depth; k++) {
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
// comes. The writes then go to all tiles in turn. If tiles began a multiple of 4 KB apart, each write would land in the
// same set of the first-level cache; hence the empty line between tiles.
ALWAYS_INLINE void pack_left(const Packing how, float* packed, long tile_floats, const float* left, long left_i,
                             long left_k, int rows, int tiles, int depth) {
    int whole = 0; // tiles that can be read in full width, where rows are contiguous
    if (left_k != 1) {
        while (whole < tiles && part_begin(whole, tiles, rows) + LEFT_WIDTH <= rows) whole++;
        for (int k = 0; k < depth; k += how == PACK_FP32 ? 1 : 2) {
            for (int t = 0; t < whole; t++) {
                const float* s = left + k * left_k + part_begin(t, tiles, rows);
                PREFETCH(s + 4 * left_k);
                UNROLL
                for (int v = 0; v < LEFT_WIDTH; v += VECTOR_LENGTH) {
                    put_rows(how, packed + t * tile_floats + v, LEFT_WIDTH, k, s + v,
                             k + 1 < depth ? s + left_k + v : NULL);
                }
            }
        }
    }
    for (int t = whole; t < tiles; t++) {
        int i = part_begin(t, tiles, rows), width = imin(LEFT_WIDTH, rows - i); // full width is quicker than the tile's
        pack(how, packed + t * tile_floats, LEFT_WIDTH, left + i * left_i, left_i, left_k, width, depth);
    }
}

// For AMX. Where a row's values of k are contiguous, its words are made where they belong; else LINE rows of pack_left,
// each with one pair of all rows of the tile, are transposed.
static void pack_rows(float* packed, long tile_floats, const float* left, long left_i, long left_k, int rows, int tiles,
                      int depth) {
    float edge[2 * LINE] = {0};
    if (left_k != 1) pack_left(PACK_PAIRS, packed, tile_floats, left, left_i, left_k, rows, tiles, depth);
    for (int t = 0; t < tiles; t++) {
        int first = part_begin(t, tiles, rows), height = part_begin(t + 1, tiles, rows) - first;
        for (int k = 0; k < depth; k += 2 * LINE) {
            int count = imin(2 * LINE, depth - k);
            float* block = packed + t * tile_floats + k / 2 * LEFT_WIDTH;
            for (int i = 0; i < height && left_k == 1; i++) {
                const float* row = left + (first + i) * left_i + k;
                const word* from = (const word*)(count < 2 * LINE ? memcpy(edge, row, count * sizeof(float)) : row);
                word* to = (word*)block + i * LINE;
                for (int q = 0; q < LINE; q++)
                    to[q] = BF16_OPERAND(from[2 * q]) >> 16 | BF16_OPERAND(from[2 * q + 1]);
            }
            if (left_k == 1) continue;
            float pairs[LINE * LEFT_WIDTH] = {0};
            memcpy(pairs, block, blocks_of(count, 2) * LEFT_WIDTH * sizeof(float));
            for (int q = 0; q < LINE; q += VECTOR_LENGTH)
                for (int i = 0; i < LEFT_WIDTH; i += VECTOR_LENGTH) {
                    vector square[VECTOR_LENGTH];
                    UNROLL
                    for (int n = 0; n < VECTOR_LENGTH; n++) square[n] = *(vector*)(pairs + (q + n) * LEFT_WIDTH + i);
                    transpose(square);
                    UNROLL
                    for (int n = 0; n < VECTOR_LENGTH; n++) *(vector*)(block + (i + n) * LINE + q) = square[n];
                }
        }
    }
}

// The same, and one panel of `right`: each way to pack has compiled code of its own.
static void pack_tiles(Packing how, float* packed, long tile_floats, const float* left, long left_i, long left_k,
                       int rows, int tiles, int depth) {
#define PACK_AS(way) if (how == way) pack_left(way, packed, tile_floats, left, left_i, left_k, rows, tiles, depth)
    PACK_AS(PACK_FP32);
    else PACK_AS(PACK_ROUNDED);
    else if (AMX_TILES && how == PACK_TILES)
        pack_rows(packed, tile_floats, left, left_i, left_k, rows, tiles, depth);
    else if (PAIRS_TILE) PACK_AS(PACK_PAIRS);
#undef PACK_AS
}

static void pack_panel(Packing how, float* packed, const float* right, long right_j, long right_k, int count,
                       int depth) {
#define PACK_AS(way) if (how == way) pack(way, packed, TILE_COLUMNS, right, right_j, right_k, count, depth)
    PACK_AS(PACK_FP32);
    else PACK_AS(PACK_ROUNDED);
    else if (PAIRS_TILE || AMX_TILES) pack(PACK_PAIRS, packed, TILE_COLUMNS, right, right_j, right_k, count, depth);
#undef PACK_AS
    int pairs = blocks_of(depth, 2), beyond = blocks_of(depth, 2 * LINE) * LINE - pairs;
    if (how == PACK_TILES) memset(packed + pairs * TILE_COLUMNS, 0, beyond * TILE_COLUMNS * sizeof(float));
}

// What a tile does, between its multiplications, for what comes after it. Its loop leaves room for that, and nothing is
// waited for: a tile would otherwise begin with numbers that are still on their way from memory.
typedef struct {
    // The tile of the result that comes next. Each look fetches `fetch_rows` of its rows to the cache; later looks copy
    // its first `copy_rows` rows to `buffer`, from where the next tile starts. If it started from its own place, and
    // rows were a multiple of 4 KB apart, it would have to wait for the stores of the tile above, since processors
    // cannot tell in time whether an address that is read has just been written.
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
// is a constant wherever this is inlined, so that the sums live in registers. `pairs`: each k stands for a pair.
ALWAYS_INLINE void multiply_tile(const int pairs, const int rows, float* result, long result_step, const float* start,
                                 long start_step, const float* left, long left_step, const float* right,
                                 long right_step, int depth, Ahead* ahead) {
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
                for (int v = 0; v < TILE_VECTORS; v++) {
                    if (pairs) sum[i][v] = add_pairs(sum[i][v], left + i, r[v]);
                    else sum[i][v] += left[i] * r[v];
                }
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

#if AMX_TILES
// The same by AMX, LINE pairs at a time: sums in tiles 0 and 1, `left` in 2, `right` in 3 and 4 (with vectors of 8 or
// less 0, 2 and 3 hold all). A thread says how large they are when it meets another number of rows, and gives them up
// when its unit of work ends. Tiles have `rows` rows: nothing beyond is read or written.
static __thread int shaped_rows = 0;

static void multiply_amx(int rows, float* result, long result_step, const float* start, long start_step,
                         const float* left, const float* right, int depth, Ahead* ahead) {
    const int two = TILE_COLUMNS > LINE, row_bytes = LINE * sizeof(float), step = TILE_COLUMNS * sizeof(float);
    if (rows != shaped_rows) {
        TileShapes s = {1, 0, {0}, {0}, {0}};
        for (int t = 0; t < 5; t++) {
            s.rows[t] = (uint8_t)(t < 3 ? rows : LINE);
            s.row_bytes[t] = (uint16_t)(t == 2 ? row_bytes : imin(row_bytes, step));
        }
        tile_shapes(&s);
        shaped_rows = rows;
    }
    tile_zero(0);
    tile_zero(1);
    if (start) tile_load(0, start, start_step * sizeof(float));
    if (start && two) tile_load(1, start + LINE, start_step * sizeof(float));
    for (int k = 0; k < depth; k += imin(LINE, STEP)) {
        if (k % STEP == 0) look_ahead(ahead, k);
        if (k % LINE) continue;
        tile_load(2, left + k * LEFT_WIDTH, row_bytes);
        tile_load(3, right + k * TILE_COLUMNS, step);
        tile_multiply(0, 2, 3);
        if (!two) continue;
        tile_load(4, right + k * TILE_COLUMNS + LINE, step);
        tile_multiply(1, 2, 4);
    }
    tile_store(0, result, result_step * sizeof(float));
    if (two) tile_store(1, result + LINE, result_step * sizeof(float));
}
#endif

// The same for any number of rows up to TILE_ROWS: each has compiled code of its own. (imin only keeps cases
// that cannot occur on machines with a smaller tile within the bounds of `sum`.)
static void multiply_rows(Packing how, int rows, float* result, long result_step, const float* start,
                          long start_step, const float* left, long left_step, const float* right, long right_step,
                          int depth, Ahead* ahead) {
#if AMX_TILES
    if (how == PACK_TILES) {
        multiply_amx(rows, result, result_step, start, start_step, left, right, depth, ahead);
        return;
    }
#endif
    switch (rows + (PAIRS_TILE && how == PACK_PAIRS ? 16 : 0)) {
#define TILE_OF(pairs, n) \
        multiply_tile(pairs, imin(n, TILE_ROWS), result, result_step, start, start_step, left, left_step, right, \
                      right_step, depth, ahead)
#define TILE_CASE(n) \
        case n: TILE_OF(0, n); break; \
        case 16 + n: if (PAIRS_TILE) TILE_OF(1, n); break;
        TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4) TILE_CASE(5) TILE_CASE(6) TILE_CASE(7)
        TILE_CASE(8) TILE_CASE(9) TILE_CASE(10) TILE_CASE(11) TILE_CASE(12) TILE_CASE(13) TILE_CASE(14)
#undef TILE_CASE
#undef TILE_OF
    }
}

// A tile cut off at the right edge is computed in a full tile of its own, from which the valid columns are copied.
static void multiply_edge(Packing how, int rows, int columns, float* result, long result_step, const float* left,
                          long left_step, const float* right, int depth, int add, Ahead* ahead) {
    float full[TILE_ROWS * TILE_COLUMNS] = {0};
    for (int i = 0; i < rows && add; i++) {
        memcpy(full + i * TILE_COLUMNS, result + i * result_step, columns * sizeof(float));
    }
    multiply_rows(how, rows, full, TILE_COLUMNS, full, TILE_COLUMNS, left, left_step, right, TILE_COLUMNS, depth,
                  ahead);
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
static int multiply_panels(Packing how, float* result, long result_step, int rows, int columns, int adding,
                           const Side* left, const Side* right, int depth, float* buffer, int copied,
                           const float* after, int after_rows, Rectangle next) {
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
                multiply_edge(how, height, width, r, result_step, tile, left->step, panel, depth, adding, &a);
            } else {
                multiply_rows(how, height, r, result_step, start, copied ? TILE_COLUMNS : result_step, tile, left->step,
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
    // Where the numbers of a tile lie together as they are (dW), packing them costs more than it saves,
    // unless rows are a multiple of 4 KB apart: then they push each other out of the cache.
    Packing how = bf16_products ? bf16_packing : PACK_FP32; // bf16 is always packed, to be rounded
    int left_direct = how == PACK_FP32 && left_i == 1 && left_k % 1024 != 0;
    // For a tile or two, the time is that of reading `right`, which goes faster in longer runs: 4 panels of 64 values
    // of k instead of one of 256. A single tile would use packed numbers only once, so it reads them where they are, in
    // rows of all columns, unless they must be transposed or cut off.
    int right_direct = how == PACK_FP32 && tiles == 1 && right_j == 1 && columns % TILE_COLUMNS == 0;
    int most = tiles <= 2 && right_j == 1 ? CHUNK / 4 : CHUNK;
    // from here on `depth` and k count steps of packed copies, each of `values` of the summed index
    int values = how >= PACK_PAIRS ? 2 : 1, all = depth;
    if (how != PACK_FP32) depth = (all + all % 2) / values;
    FloatMode mode = how == PACK_ROUNDED ? flush_denormals() : 0;
    long left_step = left_k * values, right_step = right_k * values;
    // chunks of about equal depth, all but the last of whole squares and AMX tiles; tiles of `left`: see pack_left
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
            pack_tiles(how, packed, tile_floats, left + k * left_step, left_i, left_k, rows, tiles,
                       imin(imin(chunk, k1 - k) * values, all - k * values));
        }
        for (int j = 0; j < columns; j += group) {
            int width = imin(group, columns - j);
            packed = scratch;
            for (int k = k0; k < k1; k += chunk, packed += tiles * tile_floats) {
                int n = imin(chunk, k1 - k), next_k = k + chunk, next_j = j;
                const float *source = right + k * right_step + j * right_j, *after;
                Rectangle next = {NULL, 0, 0, 0};
                for (int p = 0; p < (right_direct ? 0 : blocks_of(width, TILE_COLUMNS)); p++) {
                    int first = p * TILE_COLUMNS;
                    pack_panel(how, packed_right + p * panel_floats, source + first * right_j, right_j, right_k,
                               imin(TILE_COLUMNS, width - first), imin(n * values, all - k * values));
                }
                if (next_k >= k1) { next_k = k0; next_j += group; }
                if (next_j < columns) {
                    next = rectangle(right + next_k * right_step + next_j * right_j, right_j, right_k,
                                     imin(group, columns - next_j), imin(chunk, k1 - next_k) * values);
                } else if (k1 < depth) {
                    next = rectangle(left + k1 * left_step, left_i, left_k, rows, imin(pass, depth - k1) * values);
                }
                after = result + (next_j < columns ? next_j : 0);
                int next_adds = add || next_k > 0;
                left_side.start = left_direct ? left + k * left_step : packed;
                if (right_direct) right_side.start = source;
                copied = multiply_panels(how, result + j, result_step, rows, width, add || k > 0, &left_side,
                                         &right_side, n, buffer, copied, after,
                                         next_adds && next_j + TILE_COLUMNS <= columns ? first_rows : 0, next);
            }
        }
    }
    if (how == PACK_ROUNDED) restore_mode(mode);
#if AMX_TILES
    if (shaped_rows) tile_release();
    shaped_rows = 0;
#endif
}

// The same for any number of rows: attention's products, which are small and have strides of their own.
static void fast_block(float* result, long result_step, const float* left, long left_i, long left_k,
                       const float* right, long right_k, long right_j, int rows, int columns, int depth, int add) {
    for (int i = 0; i < rows; i += UNIT_ROWS)
        multiply_unit(result + i * result_step, result_step, left + i * left_i, left_i, left_k, right, right_k, right_j,
                      imin(UNIT_ROWS, rows - i), columns, depth, add);
}

// y = x W^T for a few rows of x, as in generation: the time is that of reading W, and packed numbers would be used only
// once. So squares of W are transposed in registers and used for all rows. The order of summation is the same.
// These are too many streams for the hardware to foresee, so each is fetched ahead.
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
    int few = bf16_products ? FEW_ROWS + 1 : rows; // what is read where it is was not rounded
    if (!bf16_products && columns <= FEW_ROWS && columns < rows) {
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

// The grouped products of train_moe.c's section 2, in one parallel region. (result, left, right) is (y, x, W)
// forward, (dx, dy, W) or (dW, dy, x) backward.
static void fast_product(int kind, float* result, const float* left, const float* right, long weight_stride, int C,
                         int OC, int E, const int* offsets, int add) {
    look_for_others();
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
