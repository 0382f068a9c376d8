/*
upcycle.c: a dense model becomes a mixture of experts, a mixture of experts a larger or smaller one.

    ./upcycle SRC DST --experts M [--topk K] [--method NAME] ...   SRC and DST are Hugging Face directories
    ./upcycle SRC DST --layers-to N        (also with --experts)       more layers, or wider FFNs: --ffn-to I
    ./upcycle --inspect DIR [--data F]                             how alike the experts of a checkpoint are
    ./upcycle --methods                                            the table of dev/upcycle/README.md

Sections 1 to 4 are the methods; three of them, complete:
    sparse upcycling (2212.05055)     source_rows, new_router_row
    Drop-Upcycling (2502.19261)       drop_rows with draw_rows, new_router_row
    Expert Upcycling (2604.19835)     allocate_uniform, or gradient_norms, utility_grad2, allocate_greedy;
                                      place_copies, source_rows, router_rows, correction_rows

    1  Which expert comes from which     evenly, or greedily by a score
    2  Utility                           scores from gradients
    3  What an expert is made of         one function for each method
    4  The router's rows
    5  The table of methods              help, refusals, receipt and dev/upcycle/README.md follow it
    6  Refusals                          what was insisted on and would mean nothing
    7  The plan
    8  main

A method is a row of `methods` and a function that makes rows of one matrix of one expert. SRC is read where
it is needed and DST written once, a piece of a matrix at a time: memory does not grow with the model, but
for --calibrate, --check and methods of whole matrices. dev/upcycle/ holds what is not for a first reading.

A note on words. A unit is one of the I intermediate numbers of an expert
    f(x) = W_down (silu(W_gate x) * (W_up x)):
row u of W_gate and of W_up and column u of W_down belong together. Twins are experts made from the same one.
Every random draw is a hash of (seed, purpose, layer, expert, matrix, element), so that order does not matter.

Dimension letters are those of train_moe.c; E counts the experts of SRC (or its models), M those of DST. In
the help and in messages N is any number.
*/
#ifndef UPCYCLE_C
#define UPCYCLE_C
#ifndef TRAIN_MOE_NO_MAIN
#define TRAIN_MOE_NO_MAIN
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" // the training half of the library
#endif
#include "train_moe.c"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#include "dev/upcycle/options.h" // ask: the options; asked: given; insists: not the usual; is: equal; NEW: 0s
#include "dev/upcycle/source.h"  // where each tensor of a source lies, number formats

#define MAX_SOURCES 256

typedef struct Plan Plan;
typedef struct Target Target;

// Makes rows row .. row + rows - 1 of one matrix of the result. writer.h calls it piece by piece, from the
// top: what a matrix needs once is worked out at row = 0.
typedef void (*MakeRows)(const Plan* p, Target* t, long row, long rows, float* out);

enum { FROM_DENSE = 1, FROM_MOE = 2 };
enum { // traits
    EQUAL = 1,    // its experts compute what their sources compute
    UNLIKE = 2,   // no two of its experts are twins
    NEW_ROWS = 4, // experts without a source, and new rows of the router for them
    SHARE = 8,    // --strength is a share, 0 to 1
    MERGES = 16,  // makes fewer experts, each from several
    PARTS = 32    // shares the FFN's units out, some to a shared expert
};
typedef struct {
    const char* name;
    int from;            // FROM_DENSE, FROM_MOE or both
    MakeRows make;       // makes an expert: of a dense SRC every one, of a mixture only the copies
    MakeRows carry;      // its AdamW moments, which go where weights go; NULL: a dense SRC's cannot
    const char* options; // that mean something to it and not to every method
    double strength;     // of --strength where it is not given
    int traits;
    const char* made;    // what the plan says of experts of one FFN
    const char* changed; // what the receipt says of a dense SRC's function where it is not kept
    const char* kept;    // when the function is kept, for the table of methods
    const char* paper;
} Method;

struct RouterRows; // operators.h
typedef struct {
    const char* name;
    // changes the row of a copy, which holds its source's; NULL: nothing
    void (*change)(float* row, struct RouterRows* from, double strength, uint64_t key);
    double strength; // of --router-delta where it is not given
    int originals_too;
} RouterOperator;

enum { SMALLER = 1, LARGER = 2 };
enum { OF_WEIGHTS = 1, OF_GRADIENTS = 2, OF_SECOND_MOMENTS = 4, NORMS = 1 | 2 | 4, OF_LOAD = 8 };
typedef struct {
    const char* name;
    int fits;          // results that are SMALLER, LARGER or both
    int made_of;       // what copies are handed out by: norms that the utility is made of, or load; or 0
    double (*utility)(double w2, double g2, double v2); // of norms, section 2; or NULL
    // makes Plan.score, or NULL: none needed; why: what wants --calibrate, for the message if it is missing
    void (*score)(Plan* p, const char* why);
} Selection;

struct Plan {
    Source* sources[MAX_SOURCES]; // SRC and further dense models
    int num_sources, rest_is_mean; // 1: what is no FFN is the mean of all sources, 0: it is SRC's
    const char* unlike;           // a key of config.json that forbids the mean, or NULL
    Source* states[3];            // SRC's weights and moments; NULL where they are not carried over
    const Method* method;
    const RouterOperator* router;
    const Selection* selection;
    int dense, carries;           // 1: SRC is dense; AdamW's moments are carried over
    int E, M, shards, num_shared; // experts of SRC, of the result; parts of an FFN; those in a shared expert
    uint64_t seed;
    Config config;                // of the result
    Json* luggage;                // what its config.json says besides
    Layout layout;
    int *source, *copy;           // (L, M): the expert it comes from or -1; its copy number, 0 = original
    int* family;                  // (L, M): experts that are copies of one thing share it
    int* copies;                  // (L, E): experts made from each
    int* units;                   // (L, M + num_shared, I): the source's units in each expert, or NULL
    int* group;                   // (L, E): of merge, the expert of the result that it goes into; or NULL
    struct Merged* merged;        // the expert that merge made last
    double* score;                // (L, E), or NULL
    double* input_norms;          // (L, E, H + I) for --prune-weights, or NULL
    struct Clusters* clusters;    // of cluster and marks, or NULL
    Output* outputs;
    int num_outputs, num_files, model_files;
    struct Growth* growth;        // of SRC, before all else, or NULL
    Json *parent, *trainer;       // SRC's upcycle.json and trainer.json, or NULL
};

// One matrix of the result while it is made.
struct Target {
    const Output* output;
    int layer, expert;
    int matrix, holds;        // GATE, UP or DOWN; WEIGHTS, EXP_AVG or EXP_AVG_SQ
    long rows, cols, units;   // units: rows of gate and up, columns of down
    int by_column;            // 1: units are columns
    uint64_t key;             // of its random draws
    View from, next;          // the source's matrix, and that of the expert after the source
    MakeRows make;
    double mix;               // this share is taken from `next`, only of moments (--optimizer interpolate)
    double factor, divisor;   // all numbers are multiplied by factor / divisor
    const double* input_norm; // (cols) of --prune-weights, or NULL
    unsigned char* marked;    // from here on what methods work out at row 0: (units) 1 for those that change
    int* order;               // (units) unit u is unit order[u] of the source
    double mean, std;         // of new numbers
    float* whole;             // (rows, cols), where all must be known before any
};

#include "dev/upcycle/rows.h"      // statistics, units drawn by lot, other orders of rows
#include "dev/upcycle/feed.h"      // batches of calibration texts
#include "dev/upcycle/growth.h"    // more layers, wider FFNs

static int plan_source(const Plan* p, int l, int j) { return p->source[(long)l * p->M + j]; }
static int plan_copy(const Plan* p, int l, int j) { return p->copy[(long)l * p->M + j]; }

// One stream of random numbers for each purpose, layer, expert and matrix, or the same for ALL_MATRICES
enum { ALL_MATRICES = 3 }; // after GATE, UP, DOWN
static uint64_t stream_key(const Plan* p, const char* purpose, int layer, int expert, int matrix) {
    return random_key(random_key(p->seed, hash_string(purpose), 0, 0), (uint64_t)layer, (uint64_t)expert,
                      (uint64_t)matrix);
}

// -----------------------------------------------------------------------------------------------------------
// 1. Which expert comes from which

// (E) counts for M experts: floor(M / E) each, and one more for the lowest indices.
static void allocate_uniform(int* counts, int E, int M) {
    for (int e = 0; e < E; e++) counts[e] = M / E + (e < M % E);
}

// The expert with the highest score that is not marked; of equals the lower index
static int best_expert(const double* score, const char* marked, int E) {
    int best = -1;
    for (int e = 0; e < E; e++)
        if (!marked[e] && (best < 0 || score[e] > score[best])) best = e;
    return best;
}

// Expert Upcycling, Definition 3.1: rank by score (of equals the lower index first); the best expert gets
// extra copies until it has `cap` of them, then the next. When all are at their cap, the caps are cleared.
static void allocate_greedy(int* counts, const double* score, int E, int M, int cap) {
    char* full = NEW(char, E);
    for (int e = 0; e < E; e++) counts[e] = 1;
    for (int left = M - E; left > 0;) {
        for (int e = 0; e < E; e++) full[e] = 0;
        for (int rank = 0; rank < E && left > 0; rank++) {
            int best = best_expert(score, full, E), extra = imin(cap, left);
            counts[best] += extra;
            left -= extra;
            full[best] = 1;
        }
    }
    free(full);
}

// Originals (number 0) first, then copies number 1, then 2: with counts 3,1,2 the sources are 0 1 2 0 2 0.
static void place_copies(int* source, int* copy, const int* counts, int E, int M) {
    for (int number = 0, j = 0; j < M; number++)
        for (int e = 0; e < E; e++)
            if (counts[e] > number) {
                source[j] = e;
                copy[j++] = number;
            }
}

// -----------------------------------------------------------------------------------------------------------
// 2. Utility
//
// Expert Upcycling 3.2. A utility is made of w2 = ||w_e||^2, g2 = ||g_e||^2 and v2 = ||v_e||^2: the weights
// of expert e, their gradients dL/dw_e, averaged over the calibration batches before any norm is taken, and
// Adam's second moments. Each has a norm of gate + up and one of down; --score-on says what becomes of the
// two: `all` takes all three matrices as one, as the paper has it.

static double utility_grad2(double w2, double g2, double v2) { return (void)w2, (void)v2, g2; } // ||g_e||^2
static double utility_weight(double w2, double g2, double v2) { return (void)g2, (void)v2, w2; } // ||w_e||^2
// ||w_e|| ||g_e||
static double utility_saliency(double w2, double g2, double v2) { return (void)v2, sqrt(w2) * sqrt(g2); }
// ||g_e||^2 / (||v_e|| + 1e-8)
static double utility_fisher(double w2, double g2, double v2) { return (void)w2, g2 / (sqrt(v2) + 1e-8); }

// (L, E, 2) squared norms of the experts' gradients of the cross-entropy: gate and up, down
static double* gradient_norms(const Source* s, const char* why) {
    int L = s->config.num_layers, E = s->config.num_experts;
    long H = s->config.hidden_size, I = s->config.moe_intermediate_size;
    double* norms = NEW(double, (long)L * E * 2);
    Feed f = feed_calibration(s, why);
    Model* m = feed_model(&f, s->dir, FOR_TRAINING, 2); // 2: the exit code if it cannot be read
    for (int sequences; (sequences = feed_next(&f)) > 0;) {
        model_forward(m, f.batch.tokens, f.batch.targets, sequences, f.T);
        model_backward(m, 1.0f / (float)ask.calibrate_batches); // adds to the gradients
    }
    for (int l = 0; l < L; l++)
        for (int e = 0; s->config.sparse[l] && e < E; e++) {
            const LayerWeights* dw = &m->dweights.layers[l];
            double* n = norms + ((long)l * E + e) * 2;
            n[0] = sum_of_squares(dw->gate_up + e * 2 * I * H, 2 * I * H);
            n[1] = sum_of_squares(dw->down + e * H * I, H * I);
        }
    model_free(m);
    feed_close(&f);
    return norms;
}

#include "dev/upcycle/selection.h" // other scores: by chance, load, router norm; what a smaller model keeps

// The sources of all experts. A family is all that is copied from one thing, be it in part (drop, noise).
static void plan_experts(Plan* p) {
    int L = p->config.num_layers, M = p->M, E = p->E, granular = is(p->method->name, "granular");
    p->source = NEW(int, L * M);
    p->copy = NEW(int, L * M);
    p->family = NEW(int, L * M);
    p->copies = NEW(int, L * E);
    for (int l = 0; l < L; l++) {
        int *source = p->source + l * M, *copy = p->copy + l * M, *family = p->family + l * M;
        int* counts = p->copies + l * E;
        const double* score = p->score ? p->score + (long)l * E : NULL;
        if (!p->config.sparse[l]) continue;
        if (M < E) {
            if (p->group) keep_cores(source, p->group + l * E, score, E, M);
            else keep_best(source, score, E, M);
        } else if (p->dense) { // models in turn; all experts of one model come from its FFN
            for (int j = 0; j < M; j++) {
                source[j] = j % E;
                copy[j] = j / E;
            }
        } else {
            uint64_t key = stream_key(p, "allocate", l, 0, 0);
            if (!score) allocate_uniform(counts, E, M);
            else if (is(ask.allocate, "sample") || is(p->selection->name, "random"))
                allocate_sample(counts, score, E, M, (int)ask.cap, key);
            else allocate_greedy(counts, score, E, M, (int)ask.cap);
            place_copies(source, copy, counts, E, M);
        }
        memset(counts, 0, sizeof(int) * (size_t)E); // and counted again: new experts have no source
        for (int j = 0; j < M; j++) {
            if (p->method->traits & NEW_ROWS && (p->dense || copy[j] > 0)) source[j] = -1;
            int alone = M < E || source[j] < 0 || p->method->traits & UNLIKE;
            family[j] = alone ? j : granular ? j % p->shards : source[j];
            if (source[j] >= 0) counts[source[j]]++;
        }
    }
}

// -----------------------------------------------------------------------------------------------------------
// 3. What an expert is made of

// Copies, as they are. (family: while train_moe's penalty is infinite, a token gets one of an expert's.)
static void source_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    (void)p;
    view_read(&t->from, row, rows, out);
    if (t->mix > 0) mix_next(t, row, rows, out, t->mix);
}

// Draws the numbers of the marked units (NULL: of all), with share < 1 only that share of them, by lot:
//     x = mean + std N(0, 1), or with `add`  x += std N(0, 1)
static void draw_rows(const Target* t, long row, long rows, float* out, int add, double share) {
    enum { DRAWS = 256 }; // made at a time, used or not: a loop without branches, which becomes vector code
    uint64_t lots = mix64(t->key ^ hash_string("replace"));
    if (add && t->std == 0) return;
    #pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        if (t->marked && !t->by_column && !t->marked[row + r]) continue;
        for (long first = 0; first < t->cols; first += DRAWS) {
            int n = (int)lmin(DRAWS, t->cols - first);
            float* x = out + r * t->cols + first;
            double z[DRAWS] = {0};
            uint64_t element = (uint64_t)((row + r) * t->cols + first);
            for (int i = 0; i < n && t->std != 0; i++)
                z[i] = random_normal(mix64(t->key ^ (element + (uint64_t)i)));
            for (int i = 0; i < n; i++) {
                if (t->marked && t->by_column && !t->marked[first + i]) continue;
                if (share < 1 && random_uniform(mix64(lots ^ (element + (uint64_t)i))) >= share) continue;
                x[i] = (float)((add ? x[i] : t->mean) + t->std * z[i]);
            }
        }
    }
}

// Which units are drawn anew, and the mean and std of what they replace.
static void mark_dropped(const Plan* p, Target* t) {
    int matrix = is(ask.drop_indices, "shared") ? ALL_MATRICES : t->matrix;
    t->marked = draw_units(t->units, ask.drop_ratio, stream_key(p, "drop", t->layer, t->expert, matrix));
    if (t->holds != WEIGHTS) return; // moments of new numbers are 0, as mean and std are then
    // the marks in the source's order
    unsigned char* replaced = NEW(unsigned char, t->by_column ? t->from.cols : t->from.rows);
    for (long u = 0; u < t->units; u++) replaced[t->order ? t->order[u] : u] = t->marked[u];
    slice_statistics(&t->from, replaced, t->by_column, &t->mean, &t->std);
    free(replaced);
}

// Drop-Upcycling: a random share of the units is drawn anew from N(mean, std) of what it replaces, in each
// matrix by itself. `shared`: the same units in all three, as in the paper; `per-matrix`: as in its code.
static void drop_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    if (row == 0) mark_dropped(p, t);
    source_rows(p, t, row, rows, out);
    draw_rows(t, row, rows, out, 0, 1);
}

// An expert of N(0, --noise-std). From a mixture only copies are made so: its originals stay as they are.
static void random_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    (void)p;
    t->std = t->holds == WEIGHTS ? ask.noise_std : 0;
    draw_rows(t, row, rows, out, 0, 1);
}

// Drop-Upcycling's baseline: N(0, 0.02) is added to half of the units.
static void noise_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    int matrix = is(ask.drop_indices, "shared") ? ALL_MATRICES : t->matrix;
    uint64_t key = stream_key(p, "noise", t->layer, t->expert, matrix);
    if (row == 0) t->marked = draw_units(t->units, ask.noise_fraction, key);
    t->std = ask.noise_std; // moments never come here: Method.carry
    source_rows(p, t, row, rows, out);
    draw_rows(t, row, rows, out, 1, 1);
}

// OLMoE's "random noise": half of the single weights become N(0, 0.02); the same weights' moments become 0.
static void noise_replace_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    t->std = t->holds == WEIGHTS ? ask.noise_std : 0;
    source_rows(p, t, row, rows, out);
    draw_rows(t, row, rows, out, 0, ask.noise_fraction);
}

#include "dev/upcycle/shards.h"    // granular, partition, domains: parts of an FFN
#include "dev/upcycle/algebra.h"   // singular values, orthonormal vectors, Cholesky
#include "dev/upcycle/operators.h" // ten further methods and operators for the router's rows
#include "dev/upcycle/cluster.h"   // cluster-aware upcycling
#include "dev/upcycle/merge.h"     // several experts become one
#include "dev/upcycle/shared.h"    // importance, marks: a shared expert and routed ones
#include "dev/upcycle/moments.h"   // AdamW's moments

// -----------------------------------------------------------------------------------------------------------
// 4. The router's rows

// A new row: N(0, std), uniform with that standard deviation (Drop-Upcycling's), or zero. `number` is the
// expert's or, with `granular`, its group's: shards of a group get the same row.
static void new_router_row(const Plan* p, float* row, int l, int number, long cols) {
    uint64_t key = stream_key(p, "router", l, number, ALL_MATRICES);
    const char* how = ask.router_init ? ask.router_init : is(p->method->name, "drop") ? "uniform" : "normal";
    // rows of LPR are prototypes, whose length counts in what is read out
    double std = p->config.router.kind == ROUTER_LPR && !asked("router-std") ? 1 : ask.router_std;
    for (long c = 0; c < cols; c++) {
        uint64_t element = mix64(key ^ (uint64_t)c);
        double uniform = sqrt(12.0) * (random_uniform(element) - 0.5); // variance 12 / 12
        double draw = is(how, "normal") ? random_normal(element) : uniform;
        row[c] = is(how, "zero") ? 0 : (float)(std * draw);
    }
}

// All rows of a router (M, cols), which is small: the call with row = 0 makes them, each hands out its own.
// From a dense SRC they are new; the shards of a group share theirs: so the top K choose whole groups. From a
// mixture a copy gets its source's row, changed by --router.
static void router_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    RouterRows from;
    memset(&from, 0, sizeof from);
    if (row == 0) t->whole = NEW(float, t->rows * t->cols);
    if (row == 0 && !p->dense) from = router_rows_open(p, t->layer, &t->from);
    for (int j = 0; j < p->M && row == 0; j++) {
        int number = is(p->method->name, "granular") ? j / p->shards : j;
        float* w = t->whole + j * t->cols;
        from.e = plan_source(p, t->layer, j);
        from.copy = plan_copy(p, t->layer, j);
        if (p->dense || from.e < 0) {
            if (t->holds != WEIGHTS) continue; // new rows have no moments
            if (p->clusters && p->clusters->centroids) cluster_router_row(p, w, t->layer, j);
            else new_router_row(p, w, t->layer, number, t->cols);
            continue;
        }
        memcpy(w, from.w + from.e * t->cols, sizeof(float) * (size_t)t->cols);
        if (t->holds != WEIGHTS) carry_router_row(p, t, w, &from);
        else if (p->router->change && (from.copy > 0 || p->router->originals_too))
            p->router->change(w, &from, router_strength(p),
                              stream_key(p, "router", t->layer, j, ALL_MATRICES));
    }
    if (row == 0) router_rows_close(&from);
    whole_rows(p, t, row, rows, out);
}

// The bias that sigmoid routers select by (M, 1): the paper's operator, --router bias, adds U(-delta, delta),
// delta = --router-delta, to that of copies; the gates do not see it. --method multiply adds strength std(b)
// N(0, 1), as to everything of a copy.
static void correction_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    int moved = t->holds == WEIGHTS && is(p->router->name, "bias");
    float* b = t->from.stored && !is(ask.router_bias, "reset") ? view_whole(&t->from) : NULL;
    double mean, std = 0;
    if (b && is(p->method->name, "multiply")) slice_statistics(&t->from, NULL, 0, &mean, &std);
    for (long j = row; j < row + rows; j++) {
        int e = plan_source(p, t->layer, (int)j);
        out[j - row] = b && e >= 0 ? b[e] : 0;
        if (std > 0 && plan_copy(p, t->layer, (int)j) > 0)
            out[j - row] += (float)(strength(p) * std *
                                    random_normal(stream_key(p, "bias noise", t->layer, (int)j, 0)));
        if (!moved || e < 0 || plan_copy(p, t->layer, (int)j) == 0) continue;
        double u = random_uniform(stream_key(p, "bias", t->layer, (int)j, 0));
        out[j - row] += (float)(router_strength(p) * (2 * u - 1));
    }
    free(b);
}

// -----------------------------------------------------------------------------------------------------------
// 5. The table of methods
//
// Who adds one writes a row and a function. The columns are Method's members: name, from, make, carry,
// options, strength, traits, made, changed, kept, paper. Braces in `made` and `changed` are for receipt.h.

#define SHARED_AND_ROUTED                                                                                   \
    "not kept: {shared} of {G} parts of the FFN are shared, and of the others a token sees {K} of {M}",     \
    "K = M and a zero router" // changed, kept
static const Method methods[] = {
    {"copy", FROM_DENSE | FROM_MOE, source_rows, source_rows, "sources", 0, EQUAL,
     "all {M} experts are the FFN",
     "not kept: gates are not renormalised, so every FFN's output shrinks to about K / N = {K} / {M}",
     "dense: gates sum to 1; mixture: K = 1, or K a multiple of the copies", "2212.05055, 2604.19835"},
    {"drop", FROM_DENSE | FROM_MOE, drop_rows, drop_rows, "drop-ratio,drop-indices,sources", 0, 0,
     "{M} experts from the FFN, each with other units drawn anew",
     "not kept: {drop} % of the units of every expert are drawn anew", "no", "2502.19261"},
    {"noise", FROM_DENSE, noise_rows, source_rows, "drop-indices,noise-std,noise-fraction,sources", 0, 0,
     "{M} experts from the FFN, each with other noise", "not kept: noise was added to the experts", "no",
     "2502.19261"},
    {"noise-replace", FROM_DENSE, noise_replace_rows, noise_replace_rows, "noise-std,noise-fraction,sources",
     0, 0, "{M} experts from the FFN, each with other weights drawn anew",
     "not kept: weights were drawn anew", "no", "2409.02060"},
    {"granular", FROM_DENSE, shard_rows, shard_rows, "granularity,scale,drop-ratio,drop-indices", 0, 0,
     "{M} experts: the shards of the FFN, group after group",
     "nearly kept: without renormalisation the scale is exact only while the router is zero",
     "gates sum to 1, --scale exact, no --drop-ratio", "2410.07524, 2604.25578"},
    {"partition", FROM_DENSE, shard_rows, shard_rows, "scale,drop-ratio,drop-indices", 0, UNLIKE,
     "{M} experts: the shards of the FFN",
     "not kept: a token sees {K} of {M} shards of the FFN, scaled to its size",
     "K = M, a zero router, --scale exact, no --drop-ratio", "2406.16554, 2604.25578"},
    {"domains", FROM_DENSE, domain_rows, domain_rows, "unit-share", 0, UNLIKE,
     "{M} experts, each the FFN's units that are most active on one text",
     "not kept: every expert holds {share} % of the FFN's units, those most active on its text", "no",
     "2410.19123"},
    {"importance", FROM_DENSE, important_rows, important_rows, "shared", 0, UNLIKE | PARTS,
     "{M} experts of the FFN's units, dealt out by importance", SHARED_AND_ROUTED, "2204.07675"},
    {"marks", FROM_DENSE, marked_rows, marked_rows, "shared,marks", 0, UNLIKE | PARTS,
     "{M} experts of the FFN's units, alike in what marks them", SHARED_AND_ROUTED, "2502.04416"},
    {"cluster", FROM_DENSE, cluster_rows, NULL, "energy", 0, UNLIKE,
     "{M} experts, one for each cluster of the FFN's inputs",
     "not kept: experts are approximations of the FFN for their clusters, at mean rank {rank}", "no",
     "2604.13508"},
    {"multiply", FROM_MOE, copy_noise_rows, source_rows, "strength", 0, EQUAL, "", "",
     "without --strength: gates sum to 1 or are a softmax's", "2510.08008"},
    {"family", FROM_MOE, source_rows, source_rows, "", 0, EQUAL, "", "",
     "while train_moe's family penalty is infinite, for every K", "ours"},
    {"copy-noise", FROM_MOE, copy_noise_rows, source_rows, "strength", 0.01, 0, "", "", "no", "2604.19835"},
    {"scaled", FROM_MOE, scaled_rows, source_rows, "strength", 0.95, 0, "", "", "no", "2604.19835"},
    {"interpolate", FROM_MOE, interpolate_rows, source_rows, "strength", 0.5, 0, "", "", "no", "2604.19835"},
    {"shuffle", FROM_MOE, shuffle_rows, shuffle_rows, "", 0, EQUAL, "", "", "as copy", "2604.19835"},
    {"orthogonal", FROM_MOE, orthogonal_rows, source_rows, "strength", 0.1, 0, "", "", "no", "2604.19835"},
    {"svd-perturb", FROM_MOE, svd_perturb_rows, source_rows, "strength", 0.1, 0, "", "", "no", "2604.19835"},
    {"svd-mix", FROM_MOE, svd_mix_rows, source_rows, "strength", 0.3, SHARE, "", "", "no", "2604.19835"},
    {"sparse-code-mix", FROM_MOE, sparse_code_mix_rows, source_rows, "strength", 0.5, SHARE, "", "", "no",
     "2604.19835"},
    {"random", FROM_DENSE | FROM_MOE, random_rows, NULL, "noise-std", 0, NEW_ROWS,
     "{M} new experts", "not kept: the experts are new", "no", "2604.19835"},
    {"merge", FROM_MOE, merge_rows, NULL, "group", 0, MERGES, "", "",
     "only equal experts merged, K = 1, gates sum to 1", "2409.01483, 2310.01334"}};

static const RouterOperator router_operators[] = {
    {"copy", NULL, 0, 0},
    {"bias", NULL, 1e-3, 0}, // see correction_rows
    {"noise", row_noise, 0.01, 1},
    {"interpolate", row_interpolate, 0.5, 0},
    {"scaled", row_scaled, 0.95, 0},
    {"perturb-new", row_noise, 0.01, 0},
    {"orthogonal", row_orthogonal, 0.1, 0},
    {"adversarial", row_adversarial, 0.01, 0},
    {"temperature", row_temperature, 1.1, 0},
    {"svd-perturb", row_svd_perturb, 0.1, 0}};

static const Selection selections[] = {
    {"uniform", LARGER, 0, NULL, NULL},
    {"random", SMALLER | LARGER, 0, NULL, score_by_chance},
    {"weight", SMALLER | LARGER, OF_WEIGHTS, utility_weight, score_by_utility},
    {"saliency", LARGER, OF_WEIGHTS | OF_GRADIENTS, utility_saliency, score_by_utility},
    {"grad2", SMALLER | LARGER, OF_GRADIENTS, utility_grad2, score_by_utility},
    {"fisher", LARGER, OF_GRADIENTS | OF_SECOND_MOMENTS, utility_fisher, score_by_utility},
    {"load", SMALLER | LARGER, OF_LOAD, NULL, score_by_load},
    {"router-norm", SMALLER, 0, NULL, score_by_router_norm},
    {"reap", SMALLER, 0, NULL, score_by_reap},
    {"man", SMALLER, 0, NULL, score_by_man},
    {"msan", SMALLER, 0, NULL, score_by_msan}};

enum {
    NUM_METHODS = sizeof methods / sizeof methods[0],
    NUM_ROUTERS = sizeof router_operators / sizeof router_operators[0],
    NUM_SELECTIONS = sizeof selections / sizeof selections[0]
};

#include "dev/upcycle/config.h" // the configuration of the result
#include "dev/upcycle/writer.h" // tensors of the result, streamed into a directory that appears whole

// -----------------------------------------------------------------------------------------------------------
// 6. Refusals
//
// What was asked for explicitly (insists, in options.h) and would have no effect is refused.

// The names of the methods that start from a dense model (FROM_DENSE) or from a mixture
static Names methods_from(int from) {
    Names names = {""};
    for (int i = 0; i < NUM_METHODS; i++)
        if (methods[i].from & from) names_add(&names, methods[i].name);
    return names;
}

// The names of the selections that fit a SMALLER or LARGER result; made of one of these at least, if not 0
static Names selections_for(int fits, int made_of) {
    Names names = {""};
    for (int i = 0; i < NUM_SELECTIONS; i++)
        if (selections[i].fits & fits && (!made_of || selections[i].made_of & made_of))
            names_add(&names, selections[i].name);
    return names;
}

static void refuse_options(const Plan* p, const Config* c, const char* src) {
    const Method* m = p->method;
    const char* kind = p->dense ? "dense" : "a mixture of experts";
    const char* other = p->dense ? "mixture-of-experts" : "dense";
    int from = p->dense ? FROM_DENSE : FROM_MOE, new_rows = insists("router-init") || insists("router-std");
    int same_norm = !p->dense && ask.norm_topk == c->norm_topk_prob;
    if (!(m->from & from))
        die(2, "--method %s is for a %s source, and %s is %s; fitting are %s", m->name, other, src, kind,
            methods_from(from).text);
    for (int i = 0; i < NUM_ASKED; i++)
        if (insists(ask_table[i].name) && ask_table[i].use == (p->dense ? USE_MOE : USE_DENSE) &&
            !(same_norm && is(ask_table[i].name, "norm-topk")))
            die(2, "--%s is for a %s source, and %s is %s", ask_table[i].name, other, src, kind);
    for (int i = 0; i < NUM_ASKED; i++) {
        Names fitting = {""};
        for (int k = 0; k < NUM_METHODS; k++)
            if (lists(methods[k].options, ask_table[i].name)) names_add(&fitting, methods[k].name);
        if (insists(ask_table[i].name) && *fitting.text && !lists(m->options, ask_table[i].name))
            die(2, "--%s belongs to --method %s, and the method is %s", ask_table[i].name, fitting.text,
                m->name);
    }
    if (!p->dense && new_rows && !(m->traits & NEW_ROWS))
        die(2, "--router-%s draws new rows, which --method %s does not have; --method random does",
            insists("router-init") ? "init" : "std", m->name);
    if (lists(m->options, "scale") && insists("drop-indices") && !asked("drop-ratio"))
        die(2, "--drop-indices: --method %s draws units anew only with --drop-ratio", m->name);
    if (is(m->name, "cluster") && new_rows)
        die(2, "--router-init: the router of --method cluster is made of the centroids");
    if (m->traits & SHARE && asked("strength") && ask.strength > 1)
        die(2, "--strength %g: for --method %s it is the share that is exchanged, 0 to 1", ask.strength,
            m->name);
    if (m->traits & (NEW_ROWS | MERGES) && insists("prune-weights"))
        die(2, "--prune-weights goes by the inputs of experts; those of --method %s have seen none", m->name);
}

static void refuse_selection(const Plan* p, const char* src) {
    const Selection* by = p->selection;
    int shrinks = p->M < p->E, merges = p->method->traits & MERGES;
    if (merges && !shrinks)
        die(2, "--experts %d: --method merge makes fewer experts of the %d of %s", p->M, p->E, src);
    if (merges && !is(by->name, "load"))
        die(2, "--select %s: --method merge weighs experts by their load; leave it out", by->name);
    if (shrinks && !(by->fits & SMALLER))
        die(2, "--experts %d: %s has %d; to keep some of them, choose --select %s%s", p->M, src, p->E,
            selections_for(SMALLER, 0).text,
            ask.select ? "; the selection asked for is for larger models" : "");
    if (!p->dense && !shrinks && !(by->fits & LARGER))
        die(2, "--select %s chooses experts to keep, but DST is not smaller; %s fit", by->name,
            selections_for(LARGER, 0).text);
    if (!p->dense && p->M <= p->E && !merges && !is(p->method->name, "copy"))
        die(2, shrinks ? "--method %s makes copies, but DST has fewer experts than SRC; leave it out"
                       : "--method %s makes copies, but DST has as many experts as SRC, %d",
            p->method->name, p->E);
    if (insists("score-on") && !by->utility)
        die(2, "--score-on belongs to --select %s", selections_for(SMALLER | LARGER, NORMS).text);
    if ((insists("allocate") || insists("cap")) && (!by->score || shrinks))
        die(2, "--%s hands out copies by a score; --select %s has one", insists("cap") ? "cap" : "allocate",
            selections_for(LARGER, NORMS | OF_LOAD).text);
    if (by->score && is(p->method->name, "multiply"))
        die(2, "--select %s: copies in unequal numbers, and --method multiply wants equal ones", by->name);
    if (asked("allocate") && is(by->name, "random"))
        die(2, "--allocate: --select random draws lots; %s have scores",
            selections_for(LARGER, NORMS | OF_LOAD).text);
}

static void refuse_router(const Plan* p, const char* src, int correction) {
    const char* name = p->router->name;
    int family = is(p->method->name, "family"), K = p->config.num_experts_per_tok, plain = is(name, "copy");
    if (is(name, "bias") && !correction)
        die(2, "--router bias: the routers of %s have no bias to perturb; --router perturb-new changes the "
               "rows of copies", src);
    if (insists("router-bias") && !correction)
        die(2, "--router-bias reset: the routers of %s have no bias", src);
    if (family && p->config.router.kind == ROUTER_LPR)
        die(2, "--method family: %s has an lpr router, which knows no families; --method copy fits", src);
    if (family && K > p->E)
        die(2, "--topk %d: a token gets one member of a family at most, and there are %d families", K, p->E);
    if (family && !plain)
        die(2, "--router %s: --method family keeps the function exactly, which needs --router copy", name);
    if (!plain && ask.router && p->M <= p->E && !(p->M == p->E && is(name, "noise")))
        die(2, "--router %s is for copies, and DST has no more experts than SRC", name);
    if (insists("router-delta") && plain) die(2, "--router-delta: --router copy has no strength");
    if (asked("router-delta") && is(name, "temperature") && ask.router_delta == 0)
        die(2, "--router-delta 0: --router temperature divides by it; expected a positive number");
}

// -----------------------------------------------------------------------------------------------------------
// 7. The plan

// the names of all rows, filled in before options are read
static Names method_choices, router_choices, selection_choices;

static Plan the_plan; // with what it owns it lives as long as the program

static Plan* plan_create(const char* src) {
    Plan* p = &the_plan;
    Config c;
    Error error = {""};
    if (!config_read(&c, src, &error)) die(2, "%s", error.text);
    p->method = &methods[choice_index(method_choices.text, ask.method)];
    p->seed = (uint64_t)ask.seed;
    p->dense = c.num_experts == 0;
    if (c.router.family_penalty > 0)
        die(2, "%s: its families are still penalised; train it on to the end of --family-steps first", src);
    refuse_options(p, &c, src);
    open_sources(p, src);
    plan_growth(p);
    c = p->sources[0]->config;
    if (!asked("experts") && !(p->growth && is(p->method->name, "copy")))
        die(2, "--experts M is missing: the number of experts of each sparse layer in DST");
    p->E = p->dense ? p->num_sources : c.num_experts;
    p->M = asked("experts") ? (int)ask.experts : p->E;
    const Source* s = p->sources[0];
    if (p->M < p->E && p->dense)
        die(2, "--experts %d: there are %d sources, and each needs an expert", p->M, p->E);
    plan_config(p);
    plan_luggage(p);
    int merges = p->method->traits & MERGES;
    const char* select = ask.select ? ask.select : merges ? "load" : "uniform";
    p->selection = &selections[choice_index(selection_choices.text, select)];
    refuse_selection(p, src);

    int correction = 0, family = is(p->method->name, "family");
    for (int l = 0; l < c.num_layers; l++) correction |= s->correction[l] >= 0;
    int noisy = is(p->method->name, "multiply") ? strength(p) > 0 : -1; // -1: another method
    const char* usual = noisy > 0 ? "perturb-new" : correction && !family && noisy < 0 ? "bias" : "copy";
    p->router = &router_operators[choice_index(router_choices.text, ask.router ? ask.router : usual)];
    refuse_router(p, src, correction);
    if (family) p->config.router.family_penalty = INFINITY; // train_moe lowers it

    p->carries = !is(ask.optimizer, "reset");
    if (p->carries) {
        refuse_moments(p, src);
        p->states[EXP_AVG] = open_or_die(src, ".exp_avg");
        p->states[EXP_AVG_SQ] = open_or_die(src, ".exp_avg_sq");
    }
    read_records(p);

    char why[64];
    snprintf(why, sizeof why, "--select %s", p->selection->name);
    if (is(p->method->name, "cluster")) find_clusters(p);
    if (is(p->method->name, "domains")) find_domains(p);
    if (p->method->traits & PARTS) find_parts(p);
    if (p->selection->score) p->score = NEW(double, (long)c.num_layers * p->E);
    if (merges) find_groups(p);
    else if (p->selection->score) p->selection->score(p, why);
    plan_experts(p);
    if (insists("prune-weights")) measure_inputs(p);
    plan_outputs(p, parse_size(ask.shard_size));
    return p;
}

#include "dev/upcycle/receipt.h" // what was done and what it means
#include "dev/upcycle/inspect.h" // --check and --inspect

// -----------------------------------------------------------------------------------------------------------
// 8. main

static void print_help_of_upcycle(void) {
    print_asked(methods_from(FROM_DENSE).text, methods_from(FROM_MOE).text);
}

// --methods: the table of dev/upcycle/README.md
static void print_methods(void) {
    static const char* from[] = {"", "dense", "mixture", "dense, mixture"};
    printf("| `--method` | from | function kept | options | source |\n|---|---|---|---|---|\n");
    for (int i = 0; i < NUM_METHODS; i++) {
        const Method* m = &methods[i];
        printf("| `%s` | %s | %s | %s | %s |\n", m->name, from[m->from], m->kept, m->options, m->paper);
    }
}

static void read_options(int argc, char** argv) {
    method_choices.text[0] = router_choices.text[0] = selection_choices.text[0] = 0;
    for (int i = 0; i < NUM_METHODS; i++) names_add(&method_choices, methods[i].name);
    for (int i = 0; i < NUM_ROUTERS; i++) names_add(&router_choices, router_operators[i].name);
    for (int i = 0; i < NUM_SELECTIONS; i++) names_add(&selection_choices, selections[i].name);
    for (Option* o = ask_table; o < ask_table + NUM_ASKED; o++)
        o->argument = is(o->name, "method") ? method_choices.text
                      : is(o->name, "router") ? router_choices.text
                      : is(o->name, "select") ? selection_choices.text
                                              : o->argument;
    // moves SRC and DST behind the options
    options_parse_table(ask_table, NUM_ASKED, print_help_of_upcycle, argc, argv);
    refuse_idle_options();
    if (ask.inspect && optind < argc) die(2, "%s: --inspect DIR takes no SRC and DST", argv[optind]);
    for (int i = optind; i < argc; i++) if (!*argv[i]) die(2, "SRC or DST is empty; expected a directory");
    if (!ask.inspect && !ask.methods && argc - optind != 2)
        die(2, "expected SRC DST --experts M, found %d director%s; see --help", argc - optind,
            argc - optind == 1 ? "y" : "ies");
}

// Writes the result and its receipt, which repeats the options as they were given; checks it; then it
// appears.
static void write_result(Plan* p, const char* dst, Findings* findings, char** arguments, int num_arguments) {
    Proof proof;
    struct statvfs disk;
    Error error = {""};
    memset(&proof, 0, sizeof proof);
    begin_saving(dst);
    long room = statvfs(saving_path, &disk) ? LONG_MAX : (long)disk.f_bavail * (long)disk.f_frsize;
    if (room < progress.total)
        die(2, "%s: %.1f MB wanted, but the disk has only %.1f MB left", dst, progress.total * 1e-6,
            room * 1e-6);
    write_tensors(p, saving_path);
    double elapsed = seconds() - progress.started;
    if (p->model_files > 1) write_index(p, saving_path);
    write_config(p, saving_path);
    if (p->carries) write_trainer(p, saving_path);
    if (!copy_travelling_files(p->sources[0]->dir, saving_path, &error)) die(1, "%s", error.text);
    find_properties(p, findings); // cluster knows its ranks only now
    Words words = {{NULL}, {""}, 0};
    add_word(&words, "overflows", "%ld", progress.overflows);
    add_word(&words, "text", "%s", ask.check ? ask.check : "");
    if (progress.overflows)
        warn(findings, "{overflows} numbers are too large for their format and became infinite; --dtype f32 "
                       "holds them", &words);
    write_receipt(p, saving_path, findings, NULL, arguments, num_arguments);
    printf("written %.1f MB in %d file%s in %.1f s\n", progress.total * 1e-6, p->num_files,
           p->num_files > 1 ? "s" : "", elapsed);
    fflush(stdout);
    if (ask.check) {
        prove(p, saving_path, &proof);
        if (!isfinite(proof.logits))
            warn(findings, "the logits on {text} are not numbers, or infinite; does SRC hold weights that "
                           "are not?", &words);
        write_receipt(p, saving_path, findings, &proof, arguments, num_arguments);
    }
    write_cards(p, dst, saving_path);
    finish_saving(dst);
    print_findings(findings);
    if (p->carries)
        printf("moments: --optimizer %s; `train_moe --out %s --resume --steps N` uses them, --model does "
               "not\n", ask.optimizer, dst);
}

static int upcycle_main(int argc, char** argv) {
    char dst[PATH_SIZE];
    Findings findings;
    Error error = {""};
    Config c;
    begin_program("upcycle");
    notes_were_said = 1;
    if (argc == 1) {
        print_usage(stderr);
        die(2, "SRC and DST are missing; --help lists every option");
    }
    memset(&progress, 0, sizeof progress);
    stop_signal = 0;
    remember_command(argc, argv);
    read_options(argc, argv);
#ifdef _OPENMP
    if (ask.threads != UNSET) omp_set_num_threads((int)ask.threads);
#endif
    look_for_others();
    catch_signals();
    signal(SIGPIPE, SIG_IGN); // that nobody reads what is printed (`| head`) is no reason to lose the work
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a file over the limit is an error of write
#endif
    if (ask.methods) return print_methods(), 0;
    if (ask.inspect) return run_inspect();
    const char *src = argv[optind], *wanted = argv[optind + 1];
    if (!config_read(&c, src, &error)) die(2, "%s", error.text);
    Source early, *only = &early;
    memset(&early, 0, sizeof early);
    early.dir = (char*)src;
    early.config = c;
    check_destination(wanted, dst, &only, 1); // what can be refused is refused before any long work
    Feed text;
    if (ask.check) text = feed_open("check: window", ask.check, WHOLE, &early, 1), feed_close(&text);
    Plan* p = plan_create(src);
    check_destination(wanted, dst, p->sources, p->num_sources);
    find_properties(p, &findings);
    print_plan(p, dst);
    print_engine_notes(&p->config);
    if (ask.dry_run) {
        printf("files   %d with %d tensors, %.1f MB; memory while writing at most about %.0f MB and the "
               "program's 3\n", p->num_files, p->num_outputs, progress.total * 1e-6, plan_memory(p) * 1e-6);
        print_findings(&findings);
        printf("nothing was written%s: --dry-run\n", ask.check ? " and nothing checked" : "");
    } else {
        write_result(p, dst, &findings, argv + 1, optind - 1);
    }
    return 0;
}

#ifndef UPCYCLE_NO_MAIN
int main(int argc, char** argv) { return upcycle_main(argc, argv); }
#endif
#endif
