// model_parts.h: parts of a model for routers other than softmax top-K and for reports. Needs train_moe.c's Router;
// its macros are filled in there, see LAYER_ARRAYS.
#pragma once

// What differs from a softmax over the experts; all zero without. routers.h explains each.
typedef struct {
    Router kind;
    double scaling;                 // of a sigmoid router's gates, 0: none
    double logit_norm;              // lambda of the logits' normalisation, 0: none
    double family_penalty;          // of the copies of an expert, INFINITY just after they were made, 0: none
    int lpr_latent_dim;             // D of Latent Prototype Routing, and the weights of its losses
    double lpr_weight, lpr_diversity, lpr_kl, lpr_align;
    int lpr_align_mean;
    double dynamic_q, dynamic_entropy, dynamic_share, dynamic_weight; // of choose_dynamically
    int dynamic_least;
    // of a run and not of a model
    int bias_rule;                  // a BiasRule: what moves the bias of a sigmoid router
    int fixed;                      // 1: the router is not trained
    double skip_below;              // the share of a token's largest gate below which an expert is left out
} RouterConfig;

// Of LayerWeights; NULL without such a router.
#define ROUTER_LAYER_WEIGHTS \
    float* router_bias;                         /* (E)              sigmoid */ \
    float *lpr_norm_weight, *lpr_norm_bias;     /* (H)              Latent Prototype Routing, of latent dimension D */ \
    float *lpr_encoder, *lpr_encoder_bias;      /* (2 D, H), (2 D) */ \
    float* lpr_prototypes;                      /* (E, D) */ \
    float *lpr_readout, *lpr_readout_bias;      /* (H, D), (H) */

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
    ARRAY(double, entropies, N)                                             /* of each token's probs */             \
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
// without their coefficients, LPR's losses, or the entropy of ROUTER_DYNAMIC, with them.
typedef struct {
    double loss, aux, z, lpr;
    long passes;
} Losses;

// Of Model: what a run adds.
#define RUN_MEMBERS                                                                                                 \
    Losses sums;                /* of the forward passes since take_losses */                                       \
    int counting_load;          /* 1: load and step_load are counted */                                             \
    long *load, *step_load;     /* (L, E)       assignments since the last report; in this optimizer step */        \
    long* last_load;            /* (L, E)       in the step before, for BIAS_ID */                                  \
    double* cutoffs;            /* (L, E)       this step's sums for BIAS_QUANTILE, see add_cutoffs */              \
    double* aux_coefficients;   /* (L) */                                                                           \
    int* family;                /* (L, E)       the family of each expert: the copies of one expert share it */     \
    int has_families;           /* 1: some experts do */                                                            \
    long family_start;          /* the step in which the copies were made, for trainer.json */                      \
    uint64_t noise_seed;        /* of LPR's noise, */                                                               \
    long noise_step;            /* which differs in each pass */                                                    \
    void (*observe)(Model* m, int l);   /* NULL, or what looks at each layer after its experts, */             \
    void* observer;             /* with this at hand */                                                             \
    struct Observed* observed;  /* (L)          figures for reports, load.h */                                      \
    FILE* trace;                /* NULL, or where each token's experts and gates are listed */                      \
    long trace_window;          /* the number of the batch's first window */

#define NORM_BLOCK 65536        // floats in a partial sum of the gradient's norm,
#define NORM_LANES 64           // which is itself made of this many sums side by side
#define norm_blocks(m) ((m)->layout.total / NORM_BLOCK + 1)
