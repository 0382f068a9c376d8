// amx.h: AMX's instructions for bf16, or their semantics as C functions (make BF16=amx). Compiles alone.
//
// A thread has eight tiles of up to 16 rows of up to 64 bytes. LDTILECFG says how large each is, TILERELEASE gives them
// up; TILELOADD and TILESTORED move one whose rows lie `step` bytes apart; TDPBF16PS does C += A B, with C (rows,
// columns) in fp32, A (rows, pairs) and B (pairs, columns) in words of two bf16 numbers, the even k in the lower half.
#pragma once
#include <stdlib.h>
#include <string.h>
#include "bf16.h"

typedef struct { // 64 bytes, as LDTILECFG reads them; palette 1, and zero where nothing is said
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) && !defined(BF16_MODEL) && \
    !defined(__CUDACC__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX_TILES 1
#define AMX_NAME "TDPBF16PS"

// Linux gives a process the 8 KB of tiles when it asks for them: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
static int tiles_permitted(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// t, c, a, b: literal numbers. (The compilers' own functions do not say that a load reads memory.)
#define tile_shapes(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)))
#define tile_release() __asm__ volatile("tilerelease")
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t : :)
#define tile_load(t, from, step) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"((long)(step)) : "memory")
#define tile_store(t, to, step) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"((long)(step)) : "memory")
#define tile_multiply(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#elif defined(AMX_MODEL)
#define AMX_TILES 1
#define AMX_NAME "a model of TDPBF16PS"

typedef float TileRow __attribute__((vector_size(64)));
typedef uint32_t TileWords __attribute__((vector_size(64)));
static __thread TileShapes tile_shape;
static __thread TileWords tiles[8][16]; // beyond a tile's rows and their bytes always zero

static int tiles_permitted(void) { return 1; }
static void tile_fault_if(int wrong) { if (wrong) abort(); } // the processor's #UD and #GP

static void tile_shapes(const TileShapes* s) {
    tile_fault_if(s->palette != 1 || s->start_row);
    for (int t = 0; t < 16; t++)
        tile_fault_if(s->rows[t] > (t < 8 ? 16 : 0) || s->row_bytes[t] > 64 || !s->rows[t] != !s->row_bytes[t]);
    tile_shape = *s;
    memset(tiles, 0, sizeof tiles);
}

static void tile_release(void) { tile_shape.palette = 0; } // from there on every use is a fault

static void tile_zero(int t) {
    tile_fault_if(tile_shape.palette != 1 || !tile_shape.rows[t]);
    memset(tiles[t], 0, sizeof tiles[t]);
}

static void tile_load(int t, const float* from, long step) {
    tile_zero(t);
    for (int i = 0; i < tile_shape.rows[t]; i++)
        memcpy(&tiles[t][i], (const char*)from + i * step, tile_shape.row_bytes[t]);
}

static void tile_store(int t, float* to, long step) {
    tile_fault_if(tile_shape.palette != 1 || !tile_shape.rows[t]);
    for (int i = 0; i < tile_shape.rows[t]; i++)
        memcpy((char*)to + i * step, &tiles[t][i], tile_shape.row_bytes[t]);
}

// TDPBF16PS, from Intel's manual: of each row and column the products of even k are added up from zero by
// multiply-adds, those of odd k likewise; then the two are added, and their sum to C. Operands and results below 2^-126
// are zero, whatever MXCSR says. (Flushed as in add_pairs of products.h.)
static void tile_multiply(int c, int a, int b) {
    const TileShapes* s = &tile_shape;
    tile_fault_if(s->palette != 1 || !s->rows[c] || s->rows[c] != s->rows[a] || s->row_bytes[a] != 4 * s->rows[b] ||
                  s->row_bytes[c] != s->row_bytes[b] || s->row_bytes[b] % 4 || c == a || c == b || a == b);
#define FLUSHED(x) ((TileRow)FLUSHED_BITS((TileWords)(x)))
    for (int i = 0; i < s->rows[c]; i++) {
        TileRow even = {0}, odd = {0};
        for (int k = 0; k < s->rows[b]; k++) {
            TileWords zero = {0}, l = zero + tiles[a][i][k], r = tiles[b][k];
            even = FLUSHED(even + FLUSHED(l << 16) * FLUSHED(r << 16));
            odd = FLUSHED(odd + FLUSHED(l & 0xFFFF0000u) * FLUSHED(r & 0xFFFF0000u));
        }
        even = FLUSHED(even + odd);
        tiles[c][i] = (TileWords)FLUSHED(FLUSHED(tiles[c][i]) + even);
    }
#undef FLUSHED
}
#else
#define AMX_TILES 0
#define AMX_NAME ""
static inline int tiles_permitted(void) { return 0; }
#endif
