// precision.h: --precision: what products are computed in, and whether the processor's bf16 is the one that section 2
// of train_moe.c defines. Needs that and options.
#pragma once

// A number with an exponent from 2^lowest on, one of 8; lowest = -127: a denormal is among them. Never infinite.
static float scaled_number(uint64_t key, int lowest) {
    uint64_t random = mix64(key);
    union { uint32_t bits; float value; } u;
    u.bits = (uint32_t)(random & 0x807FFFFFu) | (uint32_t)(lowest + 127 + (int)(random >> 40 & 7)) << 23;
    return u.value;
}

// Do products packed this way have the definition's bits? 256 rows times 48 columns of 37 terms, which meet in sums
// from far below to far above 2^-126, of AMX also infinite. NaN may have any bits: a step that meets it ends the run.
static int packing_holds(Packing packing) {
    enum { ROWS = 256, COLUMNS = 48, DEPTH = 37 };
    static const int scales[][2] = {{-4, -4}, {-66, -66}, {-127, -4}, {-127, 40}, {-70, -62}, {62, 58}};
    static float left[ROWS * DEPTH], right[COLUMNS * DEPTH], sums[2][ROWS * COLUMNS];
    int were_plain = plain_products, hold = 1;
    Packing before = bf16_packing;
    for (int s = 0; s < (packing == PACK_TILES ? 6 : 5); s++) {
        for (int i = 0; i < ROWS * DEPTH; i++) left[i] = scaled_number((uint64_t)i, scales[s][0]);
        for (int i = 0; i < COLUMNS * DEPTH; i++) right[i] = scaled_number(~(uint64_t)i, scales[s][1]);
        for (int i = 0; i < ROWS * COLUMNS; i++)
            sums[0][i] = sums[1][i] = scaled_number((uint64_t)i << 20, imax(-127, scales[s][0] + scales[s][1]));
        for (int way = 0; way < 2; way++) {
            plain_products = way;
            bf16_packing = packing;
            multiply_block(sums[way], COLUMNS, left, DEPTH, 1, right, 1, DEPTH, ROWS, COLUMNS, DEPTH, 1);
            for (int i = 0; i < ROWS * COLUMNS; i++) sums[way][i] = isnan(sums[way][i]) ? 0 : sums[way][i];
        }
        hold &= !memcmp(sums[0], sums[1], sizeof sums[0]);
    }
    plain_products = were_plain;
    bf16_packing = before;
    return hold;
}

// Of the CPU: a line says how bf16 is computed, unless a text is generated, which stands alone.
static void cpu_use_precision(int bf16_too) {
    bf16_products = bf16_too;
    if (!bf16_too) return;
    int tiles = AMX_TILES && tiles_permitted() && packing_holds(PACK_TILES);
    int hold = !tiles && PAIRS_TILE && packing_holds(PACK_PAIRS);
    bf16_packing = tiles ? PACK_TILES : hold ? PACK_PAIRS : PACK_ROUNDED;
    const char* how = plain_products ? (tiles ? "by the plain loops, in the order of AMX" : "by the plain loops")
                      : tiles        ? "by " AMX_NAME
                      : hold         ? "by " PAIRS_NAME
                      : PAIRS_TILE   ? "in fp32 arithmetic, slower: " PAIRS_NAME " does not add as section 2 says"
                                     : "in fp32 arithmetic, slower: it was built for processors without VDPBF16PS";
    if (!options.prompt && !options.prompt_ids)
        printf("products: bf16, %s%s\n", how,
               tiles || !AMX_TILES ? "" : "; " AMX_NAME " is not permitted, or does not add as section 2 says");
}

static void (*use_precision)(int bf16_too) = cpu_use_precision;        // train_moe.cu has its own
