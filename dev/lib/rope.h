// rope.h: rotary positions of models that were stretched to longer texts. Compiles alone.
//
// Pair i of a head turns by w_i = theta^(-2 i / HD) a position: the first ones fast, the last ones slowly. Stretching
// by a factor s leaves what turned often within the P positions of the first training, and slows down the rest:
//     w_i' = w_i ((1 - a_i) / s + a_i)
//     linear (Chen et al. 2023)    a_i = 0
//     dynamic                      a_i = 1 up to max_position_embeddings; beyond it is refused
//     llama3 (Llama 3.1)           a_i = (n_i - low) / (high - low) in 0 .. 1, with n_i = P w_i / 2 pi, the turns in P
//     yarn (Peng et al. 2023)      a_i = 1 - (i - first) / (last - first) in 0 .. 1, between the pairs that turn `high`
//                                  and `low` times in P; and cosines and sines are multiplied by 0.1 log(s) + 1
// They are those of transformers, in double.
#pragma once
#include <math.h>

typedef enum { ROPE_DEFAULT, ROPE_DYNAMIC, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN } RopeType;
static const char rope_types[] = "default|dynamic|linear|llama3|yarn";

typedef struct {
    RopeType type;
    double factor, original;        // s, P
    double low, high;               // llama3: low_freq_factor, high_freq_factor; yarn: beta_slow, beta_fast
    double attention, mscale, mscale_all;       // yarn: the multiplier, or weights of log(s) in it; 0: not given
    int whole_pairs;                // yarn: first and last are rounded outwards
} RopeScaling;

// w (HD / 2); returns what cosines and sines are multiplied by.
static double rope_frequencies(double* w, const RopeScaling* r, int HD, double theta) {
    double s = r->factor, turns = r->original / 6.283185307179586, first = 0, last = 1, ends[2];
    for (int i = 0; i < 2 && r->type == ROPE_YARN; i++)
        ends[i] = HD * log(turns / (i ? r->low : r->high)) / (2 * log(theta));
    if (r->type == ROPE_YARN) {
        first = fmax(r->whole_pairs ? floor(ends[0]) : ends[0], 0);
        last = fmin(r->whole_pairs ? ceil(ends[1]) : ends[1], HD - 1);
        if (first == last) last += 0.001;
    }
    for (int i = 0; i < HD / 2; i++) {
        w[i] = pow(theta, -2.0 * i / HD);
        if (r->type <= ROPE_DYNAMIC) continue;
        double a = r->type == ROPE_LLAMA3 ? (turns * w[i] - r->low) / (r->high - r->low)
                   : r->type == ROPE_YARN ? 1 - (i - first) / (last - first) : 0;
        a = fmin(fmax(a, 0), 1);
        w[i] *= (1 - a) / s + a;
    }
    if (r->type != ROPE_YARN) return 1;
    double grown = s > 1 ? 0.1 * log(s) : 0;
    if (r->attention > 0) return r->attention;
    return r->mscale > 0 && r->mscale_all > 0 ? (grown * r->mscale + 1) / (grown * r->mscale_all + 1) : grown + 1;
}
