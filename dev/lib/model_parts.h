// model_parts.h: parts of a model for routers other than softmax top-K (see LAYER_ARRAYS of train_moe.c) and reports.
#pragma once

#define ROUTER_LAYER_ARRAYS(ARRAY)                                                                                  \
    ARRAY(float, router_raw, sparse * (c->router.logit_norm > 0) * N * E)   /* logits before their normalisation */ \
    ARRAY(float, lpr_a, lpr * N * H)                                                                                \
    ARRAY(float, lpr_input, lpr * N * H)                                    /* what the experts read */             \
    ARRAY(float, lpr_mean, lpr * N)                                                                                 \
    ARRAY(float, lpr_rstd, lpr * N)                                                                                 \
    ARRAY(float, lpr_encoded, lpr * N * 2 * D)                                                                      \
    ARRAY(float, lpr_read_out, lpr * N * D)                                                                         \
    ARRAY(double, lpr_targets, lpr * E * D)

#define ROUTER_SCRATCH_ARRAYS(ARRAY)                                                                                \
    ARRAY(float, family_shift, (c->router.family_penalty > 0) * N * E)                                              \
    ARRAY(float, lpr_dread_out, training * lpr * N * D)                                                             \
    ARRAY(float, lpr_dprobs, training * lpr * N * E)                                                                \
    ARRAY(float, lpr_dencoded, training * lpr * N * 2 * D)                                                          \
    ARRAY(float, lpr_da, training * lpr * N * H)                                                                    \
    ARRAY(double, lpr_gram, training * lpr * D * D)

// Sums over tokens of what routing looks like in one layer, gathered while Model.counting_load is 1.
typedef struct Observed {
    double tokens, entropy, top_gate;           // entropy of probs in nats; the largest gate
    double sources, twins;                      // with families: distinct families chosen; tokens that chose two of one
} Observed;
enum { OBSERVED_NUMBERS = sizeof(Observed) / sizeof(double) };

// The parts of the objective, summed over forward passes: cross-entropy, and the balance loss and the z-loss
// without their coefficients, LPR's losses with them.
typedef struct {
    double loss, aux, z, lpr;
    long passes;
} Losses;

#define NORM_BLOCK 65536        // floats in a partial sum of the gradient's norm,
#define NORM_LANES 64           // which is itself made of this many sums side by side
#define norm_blocks(m) ((m)->layout.total / NORM_BLOCK + 1)
