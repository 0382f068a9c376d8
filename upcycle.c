/*
upcycle.c: turns a dense model into a mixture of experts, and a mixture of experts into a larger or smaller one.

    ./upcycle SRC DST --experts N [--topk K] [--method M] ...        SRC and DST are Hugging Face directories
    ./upcycle --inspect DIR [--data F]                               how alike the experts of a checkpoint are

SRC is read once and DST written once, one tensor after the other, so that memory does not grow with the model. Read
the file from top to bottom; whoever wants a single method finds its formula and its source above it:

     1  Options              what can be asked for
     2  Number formats       F32, BF16, F16
     3  Sources              where every tensor of a checkpoint lies in its files
     4  The plan             what every expert of the result is made from
     5  Which experts        scores of utility, and how many copies each expert gets
     6  Linear algebra       singular values, orthonormal vectors, Cholesky
     7  Expert operators     how the numbers of one expert are made
     8  Routers              how the rows of a router are made
     9  Clusters             experts from clusters of a dense layer's inputs
    10  Writing              shards, streams, a directory that appears whole or not at all
    11  The receipt          what was done, what holds by construction, what to beware of
    12  Proof                loss and logits before and after
    13  Inspection
    14  Command line

A note on words. A unit is one of the I intermediate numbers of an expert f(x) = W_down (silu(W_gate x) * (W_up x)): row
u of W_gate and of W_up and column u of W_down belong together. Twins are experts made from the same one. Every random
draw is a hash of (seed, purpose, layer, expert, matrix, element): order, shards and threads do not change it.

Dimension letters are those of train_moe.c. N is the number of experts in each sparse layer of the result.
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

#include <sys/statvfs.h>
#include <sys/syscall.h>

#include "dev/upcycle/options.h"      // what can be asked for: the tables of methods, selections and routers

#include "dev/upcycle/source.h"       // where each tensor of a source lies, number formats

// ---------------------------------------------------------------------------------------------------------------------
// 4. The plan

#define MAX_SOURCES 256

// A tensor of the result.
typedef struct {
    const Tensor* tensor;
    Role role;
    Dtype dtype;
    char name[120];
    int half; // of trainer/optimizer.safetensors: 0 exp_avg, 1 exp_avg_sq; -1: the model itself
    int file;
    long bytes, offset; // in the file's data
} Output;

typedef struct {
    Source* sources[MAX_SOURCES];
    int num_sources;
    Source* moments[2]; // of source 0, or NULL
    Config config; // of the result
    Json* luggage; // what its config.json says besides
    Layout layout;
    int dense; // 1: the sources are dense
    Method method;
    RouterMethod router;
    Selection selection;
    Moments carry;
    uint64_t seed;
    int E, N, groups; // experts of the source (dense: sources) and of the result; virtual groups
    int *source, *copy, *family; // (L, N): the expert it comes from or -1; its copy number, 0 = original; its family
    int* copies; // (L, E): experts made from each
    double* score; // (L, E), or NULL
    double* input_norms; // (L, E, H + I) for --prune-weights, or NULL
    float* centroids; // (L, N, H) of cluster, or NULL
    void* clusters; // see cluster.h
    Output* outputs;
    int num_outputs, num_files, model_files;
    Json *parent, *trainer; // SRC's upcycle.json and trainer.json, or NULL
} Plan;

static int plan_source(const Plan* p, int l, int j) { return p->source[(long)l * p->N + j]; }
static int plan_copy(const Plan* p, int l, int j) { return p->copy[(long)l * p->N + j]; }

// One stream of random numbers for each purpose, layer, expert and matrix.
static uint64_t stream_key(const Plan* p, const char* purpose, int layer, int expert, int matrix) {
    return random_key(random_key(p->seed, hash_string(purpose), 0, 0), (uint64_t)layer, (uint64_t)expert,
                      (uint64_t)matrix);
}

// Which layers become sparse: all, every-2 (every second, never the first), or a list such as 1,3,8-11.
static void parse_layers(const char* text, char* sparse, int L) {
    long step;
    char* end;
    memset(sparse, 0, MAX_LAYERS);
    if (!strcmp(text, "all")) {
        memset(sparse, 1, (size_t)L);
        return;
    }
    if (!strncmp(text, "every-", 6)) {
        step = strtol(text + 6, &end, 10);
        if (end == text + 6 || *end || step < 1 || step > L)
            die(2, "--layers %s: the model has %d layers; every-2 leaves every second dense", text, L);
        for (int l = 0; l < L; l++) sparse[l] = (l + 1) % step == 0;
        return;
    }
    for (const char* s = text; *s || s == text;) {
        long first = strtol(s, &end, 10), last = first;
        if (end != s && *end == '-') {
            const char* from = end + 1;
            last = strtol(from, &end, 10);
            if (end == from) last = -1;
        }
        if (end == s || (*end && *end != ',') || first < 0 || last < first || last >= L)
            die(2, "--layers %s: expected all, every-2, or numbers from 0 to %d such as 1,3,5-7", text, L - 1);
        for (long l = first; l <= last; l++) sparse[l] = 1;
        s = *end ? end + 1 : end;
        if (*end && !*s) die(2, "--layers %s: a number is missing after the last comma", text);
    }
}

// Copies follow the originals, ordered by copy number and then by source: with counts 3,1,2 the sources are 0 1 2 0 2
// 0.
static void place_copies(int* source, int* copy, const int* counts, int E, int N) {
    int j = 0;
    for (int number = 0; j < N; number++)
        for (int e = 0; e < E; e++)
            if (counts[e] > number) {
                source[j] = e;
                copy[j++] = number;
            }
}

// (E) counts for N experts: floor(N / E) each, and one more for the lowest indices.
static void allocate_uniform(int* counts, int E, int N) {
    for (int e = 0; e < E; e++) counts[e] = N / E + (e < N % E);
}

// Expert Upcycling (arXiv 2604.19835), Definition 3.1: rank by score (of equals the lower index first); the best expert
// gets extra copies until it has `cap` of them, then the next. When all are at their cap, the caps are cleared.
static void allocate_greedy(int* counts, const double* score, int E, int N, int cap) {
    char* full = (char*)checked_malloc((size_t)E);
    for (int e = 0; e < E; e++) counts[e] = 1;
    for (int left = N - E; left > 0;) {
        for (int e = 0; e < E; e++) full[e] = 0;
        for (int rank = 0; rank < E && left > 0; rank++) {
            int best = -1;
            for (int e = 0; e < E; e++)
                if (!full[e] && (best < 0 || score[e] > score[best])) best = e;
            int extra = imin(cap, left);
            counts[best] += extra;
            left -= extra;
            full[best] = 1;
        }
    }
    free(full);
}

// The same by chance: each extra copy goes to an expert drawn from softmax(z-scored scores), among those below their
// cap. (Scores have any scale, so they are made comparable with the temperature 1 first.)
static void allocate_sample(int* counts, const double* score, int E, int N, int cap, uint64_t key) {
    double mean = 0, variance = 0;
    int* extra = (int*)checked_malloc(sizeof(int) * (size_t)E);
    for (int e = 0; e < E; e++) mean += score[e] / E;
    for (int e = 0; e < E; e++) variance += (score[e] - mean) * (score[e] - mean) / E;
    double std = variance > 0 ? sqrt(variance) : 1;
    for (int e = 0; e < E; e++) {
        counts[e] = 1;
        extra[e] = 0;
    }
    for (int draw = 0; draw < N - E; draw++) {
        double sum = 0, reached = 0;
        if (draw > 0 && draw % (E * cap) == 0) memset(extra, 0, sizeof(int) * (size_t)E);
        for (int e = 0; e < E; e++) sum += extra[e] < cap ? exp((score[e] - mean) / std) : 0;
        double target = random_uniform(mix64(key ^ (uint64_t)draw)) * sum;
        int chosen = -1;
        for (int e = 0; e < E; e++) {
            if (extra[e] >= cap) continue;
            chosen = e;
            reached += exp((score[e] - mean) / std);
            if (target < reached) break;
        }
        extra[chosen]++;
        counts[chosen]++;
    }
    free(extra);
}

// For a smaller model: the n experts with the highest score, in their old order (of equals the lower index stays).
static void keep_best(int* source, const double* score, int E, int n) {
    char* kept = (char*)checked_malloc((size_t)E);
    memset(kept, 0, (size_t)E);
    for (int i = 0; i < n; i++) {
        int best = -1;
        for (int e = 0; e < E; e++)
            if (!kept[e] && (best < 0 || score[e] > score[best])) best = e;
        kept[best] = 1;
    }
    for (int e = 0, j = 0; e < E; e++)
        if (kept[e]) source[j++] = e;
    free(kept);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Which experts
//
// Expert Upcycling 3.2. With g_e = dL/dw_e over the weights w_e of expert e, averaged over the calibration batches
// before any norm is taken, and v_e Adam's second moment:
//     grad2     ||g_e||^2                  saliency  ||w_e|| ||g_e||
//     weight    ||w_e||^2                  fisher    ||g_e||^2 / (||v_e|| + 1e-8)
// Each is formed for gate + up and for down; `all` takes all three matrices as one, as the paper has it.

typedef void (*Observer)(void* state, const Model* m, int l);

// model_forward for a model FOR_SCORING, whose layers write over each other: looks at each layer while it is there.
static double observed_forward(Model* m, const int* tokens, const int* targets, int B, int T, Observer observe,
                               void* state) {
    const Config* c = &m->config;
    int N = B * T, H = c->hidden_size, V = c->vocab_size, E = c->num_experts;
    m->batch = B;
    m->length = T;
    m->aux_loss = m->z_loss = m->lpr_loss = m->loss = 0;
    memcpy(m->tokens, tokens, sizeof(int) * (size_t)N);
    memcpy(m->targets, targets, sizeof(int) * (size_t)N);
    for (int e = 0; e < E; e++) m->all_counts[e] = m->all_probs[e] = 0;
    embedding_forward(m->layers[0].x, m->tokens, m->weights.embedding, N, H);
    for (int l = 0; l < c->num_layers; l++) {
        attention_layer_forward(m, l);
        ffn_layer_forward(m, l, l + 1 < c->num_layers ? m->layers[l + 1].x : m->final_in);
        if (observe) observe(state, m, l);
    }
    rmsnorm_forward(m->final_out, H, m->final_rstd, m->final_in, H, m->weights.final_norm, N, 1, H,
                    (float)c->rms_norm_eps);
    matmul_forward(m->logits, m->final_out, m->weights.lm_head, N, H, V);
    cross_entropy_forward(m->losses, m->losses_lse, m->logits, m->targets, N, V);
    for (int n = 0; n < N; n++) m->loss += m->losses[n];
    return m->loss /= N;
}

static int sequence_length(Config* c, const char* dir) {
    int T = asked("seq") ? (int)ask.seq : imin(1024, c->max_position_embeddings), window = sliding_window(dir, c);
    if (!asked("seq") && window) T = imin(T, window);
    check_length(c, dir, T);
    return T;
}

// Runs the calibration batches (windows of the training part in the order of epoch 0) through source 0.
typedef struct {
    Model* model;
    Dataset* data;
    Batch batch;
    int B, T;
    long batches;
    double started;
} Calibration;

static Calibration calibration_open(const Source* s, Purpose purpose, const char* why) {
    Calibration k;
    Config c = s->config;
    Error error = {""};
    if (!ask.calibrate) die(2, "%s wants --calibrate F, a text or token shards", why);
    k.B = (int)ask.batch;
    k.T = sequence_length(&c, s->dir);
    k.batches = ask.calibrate_batches;
    k.data = dataset_open(ask.calibrate, k.T, c.vocab_size, TRAIN_PART, reads_bytes(&c, s->dir));
    if (k.data->windows < k.B * k.batches)
        die(2,
            "--calibrate %s: too short: %ld windows of %d tokens, but %ld batches of %d need %ld; fewer "
            "--calibrate-batches, "
            "a smaller --batch or --seq fit",
            ask.calibrate, k.data->windows, k.T + 1, k.batches, k.B, k.batches * k.B);
    k.model = model_create(&c, purpose, k.B, k.T, k.T, NULL);
    if (!checkpoint_load(k.model, s->dir, &error)) die(2, "%s", error.text);
    k.batch = batch_create(k.B, k.T);
    k.started = seconds();
    return k;
}

static void calibration_batch(Calibration* k, long number) {
    heed_signals();
    show_count("calibration: batch", number, k->batches, k->started);
    for (int b = 0; b < k->B; b++)
        dataset_training_sequence(k->data, (uint64_t)ask.seed, number * k->B + b, k->batch.tokens + (long)b * k->T,
                                  k->batch.targets + (long)b * k->T);
}

static void calibration_close(Calibration* k) {
    clear_progress();
    free(k->batch.tokens);
    dataset_close(k->data);
    model_free(k->model);
}

static double sum_of_squares(const float* x, long n) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

enum { CHUNK_FLOATS = 1 << 20 }; // rows are worked on in pieces of about 4 MB
enum { DRAWS = 256 }; // random numbers made at a time, which gcc turns into vector code

static double view_sum_of_squares(const View* v) {
    long rows = CHUNK_FLOATS / v->cols < 1 ? 1 : CHUNK_FLOATS / v->cols;
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)(lmin(rows, v->rows) * v->cols));
    double sum = 0;
    for (long r = 0; r < v->rows; r += rows) {
        long n = lmin(rows, v->rows - r);
        view_read(v, r, n, x);
        sum += sum_of_squares(x, n * v->cols);
    }
    free(x);
    return sum;
}

// Squared norms of every expert's gate and up (part 0) and down (part 1): (L, E, 2).
static double* expert_norms(const Source* s) {
    int L = s->config.num_layers, E = s->config.num_experts;
    double* norms = (double*)checked_malloc(sizeof(double) * 2 * (size_t)L * (size_t)E);
    memset(norms, 0, sizeof(double) * 2 * (size_t)L * (size_t)E);
    for (int l = 0; l < L; l++)
        for (int e = 0; s->config.sparse[l] && e < E; e++)
            for (int matrix = GATE; matrix <= DOWN; matrix++)
                norms[((long)l * E + e) * 2 + (matrix == DOWN)] += view_sum_of_squares(source_ffn(s, l, e, matrix));
    return norms;
}

// (L, E, 2) squared norms of the gradient of the cross-entropy, averaged over the batches before the norm is taken
static double* gradient_norms(const Source* s, const char* why) {
    int L = s->config.num_layers, E = s->config.num_experts;
    long H = s->config.hidden_size, I = s->config.moe_intermediate_size;
    double* norms = (double*)checked_malloc(sizeof(double) * 2 * (size_t)L * (size_t)E);
    Calibration k = calibration_open(s, FOR_TRAINING, why);
    for (long b = 0; b < k.batches; b++) {
        calibration_batch(&k, b);
        model_forward(k.model, k.batch.tokens, k.batch.targets, k.B, k.T);
        model_backward(k.model, 1.0f / (float)k.batches); // adds to the gradients
    }
    for (int l = 0; l < L; l++)
        for (int e = 0; e < E; e++) {
            const LayerWeights* dw = &k.model->dweights.layers[l];
            double* n = norms + ((long)l * E + e) * 2;
            n[0] = s->config.sparse[l] ? sum_of_squares(dw->gate_up + e * 2 * I * H, 2 * I * H) : 0;
            n[1] = s->config.sparse[l] ? sum_of_squares(dw->down + e * H * I, H * I) : 0;
        }
    calibration_close(&k);
    return norms;
}

// One of the four scores, from squared norms.
static double utility(Selection how, double w2, double g2, double v2) {
    switch (how) {
        case GRAD2: return g2;
        case SALIENCY: return sqrt(w2) * sqrt(g2);
        case WEIGHT: return w2;
        case FISHER: return g2 / (sqrt(v2) + 1e-8);
        default: return 0;
    }
}

// Utility scores (L, E) from (L, E, 2) squared norms; those that are not needed may be NULL.
static void utility_scores(double* score, Selection how, const char* on, const double* w, const double* g,
                           const double* v, long n) {
    static const double none[2] = {0, 0};
    for (long i = 0; i < n; i++) {
        const double *wi = w ? w + 2 * i : none, *gi = g ? g + 2 * i : none, *vi = v ? v + 2 * i : none;
        double a = utility(how, wi[0], gi[0], vi[0]), b = utility(how, wi[1], gi[1], vi[1]);
        switch (choice_index(SCORED_PARTS, on)) {
            case 0: score[i] = utility(how, wi[0] + wi[1], gi[0] + gi[1], vi[0] + vi[1]); break;
            case 1: score[i] = a; break;
            case 2: score[i] = b; break;
            case 3: score[i] = (a + b) / 2; break;
            case 4: score[i] = a * b; break;
            case 5: score[i] = fmax(a, b); break;
            default: score[i] = fmin(a, b); break;
        }
    }
}
#include "dev/upcycle/usage.h"        // other scores: load, norm of the router's rows

static void score_experts(Plan* p) {
    const Source* s = p->sources[0];
    int L = s->config.num_layers, E = p->E;
    long n = (long)L * E;
    char why[64];
    if (p->selection == UNIFORM) return;
    snprintf(why, sizeof why, "--select %s", ask.select);
    p->score = (double*)checked_malloc(sizeof(double) * (size_t)n);
    memset(p->score, 0, sizeof(double) * (size_t)n);
    double *w = NULL, *g = NULL, *v = NULL;
    Usage usage = {p->score, NULL};
    switch (p->selection) {
        case BY_CHANCE: // equal scores for the lots; a smaller model keeps those that drew the largest
            for (long i = 0; i < n; i++)
                p->score[i] =
                    p->N > E ? 0 : random_uniform(stream_key(p, "select", (int)(i / E), (int)(i % E), 0));
            return;
        case LOAD: measure_usage(s, &usage, why); return;
        case ROUTER_NORM: router_norm_scores(p->score, s); return;
        case FISHER: {
            Source* second = open_or_die(s->dir, ".exp_avg_sq");
            v = expert_norms(second);
            source_close(second);
            break;
        }
        case WEIGHT:
        case SALIENCY: w = expert_norms(s); break;
        default: break;
    }
    if (p->selection != WEIGHT) g = gradient_norms(s, why);
    utility_scores(p->score, p->selection, ask.score_on, w, g, v, n);
    free(w);
    free(g);
    free(v);
}

#include "dev/upcycle/algebra.h"      // Gram-Schmidt, singular values, Cholesky

// ---------------------------------------------------------------------------------------------------------------------
// 7. Expert operators
//
// Most methods make each number of the result from one number of the source, so rows can be made as they are written. A
// maker says how. Only four operators (and cluster) need whole matrices; they put the finished one into `whole`.

typedef struct {
    View from; // nowhere: every number is new
    View next; // mixed in with the share `mix`
    double mix;
    View* average; // (num_average) with `from`: the mean of several models
    int num_average;
    int* units; // unit u of the result is unit units[u] of the source; NULL: the same
    long num_units;
    int by_column; // units are columns (down) and not rows
    unsigned char* fresh; // units that are drawn anew from N(mean, std)
    double mean, std;
    unsigned char* noisy; // units that N(0, noise) is added to; NULL and noise > 0: all numbers
    double noise;
    double replace; // this share of single numbers is drawn anew from N(0, std)
    double factor;
    const double* input_norm; // (cols) MoE-Pruner: in each row prune_count numbers become 0
    long prune_count;
    float* whole;
    uint64_t key;
    long rows, cols;
} Maker;

static void maker_free(Maker* k) {
    free(k->units);
    free(k->fresh);
    free(k->noisy);
    free(k->whole);
    free(k->average);
}

// nothing but `from`, number by number
static int maker_copies(const Maker* k) {
    return k->from.stored && !k->average && k->mix == 0 && !k->units && !k->fresh && k->noise == 0 && k->replace == 0 &&
           k->factor == 1 && !k->prune_count && !k->whole;
}

typedef struct {
    double score;
    long index;
} Scored;

static int compare_scored(const void* a, const void* b) {
    const Scored *x = (const Scored*)a, *y = (const Scored*)b;
    if (x->score != y->score) return x->score < y->score ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

// Rows row .. row + rows - 1 of the result.
static void make_rows(const Maker* k, long row, long rows, float* out) {
    long cols = k->cols, wide = k->from.stored ? k->from.cols : cols;
    if (k->whole) {
        memcpy(out, k->whole + row * cols, sizeof(float) * (size_t)(rows * cols));
    } else if (k->from.stored) {
        int gather = k->units && k->by_column;
        float* in =
            gather || k->mix != 0 || k->average ? (float*)checked_malloc(sizeof(float) * (size_t)(rows * wide)) : NULL;
        float* direct = gather ? in : out;
        if (k->units && !k->by_column)
            for (long r = 0; r < rows; r++) view_read(&k->from, k->units[row + r], 1, direct + r * wide);
        else
            view_read(&k->from, row, rows, direct);
        if (k->mix != 0) {
            view_read(&k->next, row, rows, in);
            for (long i = 0; i < rows * cols; i++) out[i] = (float)((1 - k->mix) * out[i] + k->mix * in[i]);
        }
        if (k->average) { // in double, rounded once
            double* sum = (double*)checked_malloc(sizeof(double) * (size_t)(rows * cols));
            for (long i = 0; i < rows * cols; i++) sum[i] = out[i];
            for (int a = 0; a < k->num_average; a++) {
                view_read(&k->average[a], row, rows, in);
                for (long i = 0; i < rows * cols; i++) sum[i] += in[i];
            }
            for (long i = 0; i < rows * cols; i++) out[i] = (float)(sum[i] / (1 + k->num_average));
            free(sum);
        }
        if (gather)
            for (long r = 0; r < rows; r++)
                for (long c = 0; c < cols; c++) out[r * cols + c] = in[r * wide + k->units[c]];
        free(in);
    }
    const unsigned char* marks = k->fresh ? k->fresh : k->noisy;
    int drawing = !k->from.stored || k->fresh || k->noise > 0 || k->replace > 0;
    if (!k->whole && (drawing || k->factor != 1)) {
        uint64_t again = mix64(k->key ^ hash_string("replace"));
        #pragma omp parallel for schedule(static)
        for (long r = 0; r < rows; r++) {
            int row_drawn = drawing && (!marks || k->by_column || marks[row + r]);
            for (long first = 0; first < cols; first += DRAWS) {
                int n = (int)lmin(DRAWS, cols - first);
                float* x = out + r * cols + first;
                double drawn[DRAWS] = {0};
                uint64_t element = (uint64_t)((row + r) * cols + first);
                if (row_drawn && (k->std != 0 || k->noise > 0)) // all, used or not: a loop without branches
                    for (int i = 0; i < n; i++) drawn[i] = random_normal(mix64(k->key ^ (element + (uint64_t)i)));
                for (int i = 0; i < n && row_drawn; i++) {
                    long u = k->by_column ? first + i : row + r;
                    if (!k->from.stored || (k->fresh && k->fresh[u]) ||
                        (k->replace > 0 && random_uniform(mix64(again ^ (element + (uint64_t)i))) < k->replace))
                        x[i] = (float)(k->mean + k->std * drawn[i]);
                    else if (k->noise > 0 && (!k->noisy || k->noisy[u]))
                        x[i] = (float)(x[i] + k->noise * drawn[i]);
                }
                if (k->factor != 1)
                    for (int i = 0; i < n; i++) x[i] = (float)(x[i] * k->factor);
            }
        }
    }
    if (k->prune_count > 0) {
        #pragma omp parallel
        {
            Scored* s = (Scored*)checked_malloc(sizeof(Scored) * (size_t)cols);
            #pragma omp for
            for (long r = 0; r < rows; r++) {
                for (long c = 0; c < cols; c++) {
                    s[c].score = fabs(out[r * cols + c]) * k->input_norm[c];
                    s[c].index = c;
                }
                qsort(s, (size_t)cols, sizeof(Scored), compare_scored);
                for (long c = 0; c < k->prune_count; c++) out[r * cols + s[c].index] = 0;
            }
            free(s);
        }
    }
}

// Mean and unbiased standard deviation of the rows or columns of a view that are marked; all of it if marked is NULL.
static void slice_statistics(const View* v, const unsigned char* marked, int by_column, double* mean, double* std) {
    long rows = CHUNK_FLOATS / v->cols < 1 ? 1 : CHUNK_FLOATS / v->cols, count = 0;
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)(lmin(rows, v->rows) * v->cols));
    double sum = 0, squares = 0;
    *mean = *std = 0;
    for (long first = 0; first < v->rows; first += rows) {
        long n = lmin(rows, v->rows - first);
        view_read(v, first, n, x);
        for (long r = 0; r < n; r++) {
            const float* row = x + r * v->cols;
            if (marked && !by_column && !marked[first + r]) continue;
            double row_sum = 0, row_squares = 0;
            long row_count = 0;
            if (marked && by_column) {
                for (long c = 0; c < v->cols; c++) {
                    double weight = marked[c];
                    row_sum += weight * row[c];
                    row_squares += weight * row[c] * row[c];
                    row_count += marked[c];
                }
            } else {
                for (long c = 0; c < v->cols; c++) row_sum += row[c];
                row_squares = sum_of_squares(row, v->cols);
                row_count = v->cols;
            }
            sum += row_sum;
            squares += row_squares;
            count += row_count;
        }
    }
    if (count > 0) *mean = sum / (double)count;
    squares = fmax(0, squares - (double)count * *mean * *mean); // in double: weights have 24 bits
    if (count > 1) *std = sqrt(squares / (double)(count - 1));
    free(x);
}

// floor(share * n) of n units, drawn without replacement
static unsigned char* draw_units(long n, double share, uint64_t key) {
    unsigned char* marked = (unsigned char*)checked_malloc((size_t)n);
    memset(marked, 0, (size_t)n);
    long count = lmin(n, (long)floor(share * (double)n + 1e-9)); // 0.7 * 10 is 7
    for (long i = 0; i < count; i++) marked[random_permutation(i, n, key)] = 1;
    return marked;
}

static float* view_whole(const View* v) {
    float* x = (float*)checked_malloc(sizeof(float) * (size_t)(v->rows * v->cols));
    view_read(v, 0, v->rows, x);
    return x;
}

#include "dev/upcycle/operators.h"    // orthogonal, svd-perturb, svd-mix, sparse-code-mix

static const float* cluster_matrix(Plan* p, int l, int expert, int matrix); // cluster.h

// s of granular and partition. Each of the G shards of a group gets 1 / G of the group's gate when gates sum to 1, so s
// = G makes the group whole again: exactly, whatever the router. Without renormalisation every gate is about 1 / N and
// K are used, so s = N G / K restores the size, exactly only while the router is zero.
static double shard_scale(const Plan* p) {
    int G = (int)ask.granularity, N = p->N, K = p->config.num_experts_per_tok;
    if (!strcmp(ask.scale, "none")) return 1;
    return p->config.norm_topk_prob ? G : (double)N * G / K;
}

// The order in which the units of a layer are cut into shards: as they are (granular), or shuffled (partition).
static int* shard_units(const Plan* p, int l, int j, long I) {
    int* units = (int*)checked_malloc(sizeof(int) * (size_t)I);
    long G = ask.granularity, full = I * G, first = j % G * I;
    for (long u = 0; u < I; u++)
        units[u] = (int)(p->method == PARTITION ? random_permutation(first + u, full, stream_key(p, "shards", l, 0, 0))
                                                : first + u);
    return units;
}

// How expert j of layer l is made. half = -1: its weights; 0 or 1: AdamW's first or second moment of them, which go
// where their weights go and are 0 where a weight is new.
static Maker expert_maker(Plan* p, int l, int j, int matrix, long rows, long cols, int half) {
    Maker k;
    memset(&k, 0, sizeof k);
    int s = plan_source(p, l, j), is_copy = plan_copy(p, l, j) > 0, model = p->dense && s >= 0 ? s : 0,
        expert = p->dense ? 0 : s;
    const Source* from = half >= 0 ? p->moments[half] : p->sources[model];
    int E = p->sources[0]->config.num_experts;
    uint64_t key = stream_key(p, "weights", l, j, matrix);
    k.rows = rows;
    k.cols = cols;
    k.key = key;
    k.factor = 1;
    k.by_column = matrix == DOWN;
    k.num_units = k.by_column ? cols : rows;
    if (s < 0) { // a new expert
        k.std = half < 0 ? ask.noise_std : 0;
        return k;
    }
    k.from = *source_ffn(from, l, expert, matrix);
    const View* next = p->dense ? NULL : source_ffn(from, l, (s + 1) % E, matrix);
    if (p->method == GRANULAR || p->method == PARTITION) {
        double scale = shard_scale(p);
        k.units = shard_units(p, l, j, k.num_units);
        k.factor = !strcmp(ask.scale, "cuberoot") ? cbrt(scale) : matrix == DOWN ? scale : 1;
        // w = s w' makes dL/dw = dL/dw' / s
        if (half >= 0) k.factor = half ? 1 / (k.factor * k.factor) : 1 / k.factor;
    }
    // Twins share the tokens of their source: each sees about 1 / copies of its gradient.
    if (half >= 0 && p->carry == MOMENTS_SCALE) {
        double n = p->method == GRANULAR    ? p->groups
                   : p->method == PARTITION ? 1
                                            : p->copies[(long)l * p->E + s];
        k.factor /= half ? n * n : n;
    }
    if (half >= 0 && p->carry == MOMENTS_INTERPOLATE && is_copy && next && p->method != SHUFFLE) {
        k.next = *next;
        k.mix = 0.5;
    }
    int touched = p->dense || is_copy; // operators leave originals alone
    // Drop-Upcycling (arXiv 2502.19261): a random share of the units is drawn anew from N(mean, std) of what it
    // replaces, in each matrix by itself. `shared`: the same units in all three, as in the paper; `per-matrix`: as in
    // its code.
    int mask_matrix = strcmp(ask.drop_indices, "shared") ? matrix : 3;
    if (touched && p->method == DROP) {
        k.fresh = draw_units(k.num_units, ask.drop_ratio, stream_key(p, "drop", l, j, mask_matrix));
        if (half < 0) slice_statistics(&k.from, k.fresh, k.by_column, &k.mean, &k.std);
    }
    if (touched && p->method == NOISE_REPLACE) { // OLMoE's: half of the single weights become N(0, 0.02)
        k.replace = ask.noise_fraction;
        k.std = half < 0 ? ask.noise_std : 0; // the same weights' moments become 0
    }
    if (half < 0 && touched) {
        double mean, std;
        switch (p->method) {
            case NOISE: // Drop-Upcycling's baseline: N(0, 0.02) is added to half of the units
                k.noisy = draw_units(k.num_units, ask.noise_fraction, stream_key(p, "noise", l, j, mask_matrix));
                k.noise = ask.noise_std;
                break;
            case COPY_NOISE: // w + 0.01 std(w) N(0, 1)
                slice_statistics(&k.from, NULL, 0, &mean, &std);
                k.noise = strength(0.01) * std;
                break;
            case SCALED: k.factor = strength(0.95); break;
            case INTERPOLATE: // (1 - a) w_e + a w_next
                k.next = *next;
                k.mix = strength(0.5);
                break;
            case ORTHOGONAL:
                slice_statistics(&k.from, NULL, 0, &mean, &std);
                k.whole = view_whole(&k.from);
                operator_orthogonal(k.whole, rows, cols, std, key);
                break;
            case SVD_PERTURB:
                k.whole = view_whole(&k.from);
                operator_svd_perturb(k.whole, rows, cols, key, strength(0.1));
                break;
            case SVD_MIX:
            case SPARSE_CODE_MIX: {
                float* other = view_whole(next);
                k.whole = view_whole(&k.from);
                if (p->method == SVD_MIX)
                    operator_svd_mix(k.whole, other, rows, cols, key);
                else
                    operator_sparse_code_mix(k.whole, other, rows, cols, key);
                free(other);
                break;
            }
            case CLUSTER: {
                const float* made = cluster_matrix(p, l, j, matrix);
                k.whole = (float*)checked_malloc(sizeof(float) * (size_t)(rows * cols));
                memcpy(k.whole, made, sizeof(float) * (size_t)(rows * cols));
                break;
            }
            default: break;
        }
    }
    // A permutation of the units, the same in all three matrices, is another way to write the same function.
    if (is_copy && p->method == SHUFFLE) {
        k.units = (int*)checked_malloc(sizeof(int) * (size_t)k.num_units);
        for (long u = 0; u < k.num_units; u++)
            k.units[u] = (int)random_permutation(u, k.num_units, stream_key(p, "shuffle", l, j, 0));
    }
    if (half < 0 && p->input_norms && !p->dense) {
        long H = p->config.hidden_size, I = p->config.moe_intermediate_size;
        k.input_norm = p->input_norms + ((long)l * p->E + s) * (H + I) + (matrix == DOWN ? H : 0);
        k.prune_count = (long)floor(ask.prune_weights * (double)cols + 1e-9);
    }
    return k;
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Routers

// A new row: N(0, std), uniform with that standard deviation, or zero.
static void new_router_row(const Plan* p, float* row, int l, int number, long cols) {
    uint64_t key = stream_key(p, "router", l, number, 3);
    const char* how = ask.router_init ? ask.router_init : p->method == DROP ? "uniform" : "normal";
    // rows of LPR are prototypes, whose length counts in what is read out
    double std = p->config.router == ROUTER_LPR && !asked("router-std") ? 1 : ask.router_std;
    for (long c = 0; c < cols; c++) {
        uint64_t element = mix64(key ^ (uint64_t)c);
        double draw = !strcmp(how, "normal") ? random_normal(element) : sqrt(12.0) * (random_uniform(element) - 0.5);
        row[c] = !strcmp(how, "zero") ? 0 : (float)(std * draw);
    }
}

static double router_strength(double usual) { return asked("router-delta") ? ask.router_delta : usual; }

// The row of a copy, from the rows w (E, cols) of the source; e is its source, `row` holds w_e. Operators of the
// released code of arXiv 2604.19835, where their definition is unclear with the numbers of this project:
static void router_operator(const Plan* p, float* row, const float* w, int e, int E, long cols, double std,
                            uint64_t key) {
    const float* next = w + (long)((e + 1) % E) * cols;
    double *d = (double*)checked_malloc(sizeof(double) * (size_t)cols),
           length = sqrt(sum_of_squares(w + e * cols, cols)), along = 0, size;
    double a = 0;
    for (long c = 0; c < cols; c++) d[c] = random_normal(mix64(key ^ (uint64_t)c));
    switch (p->router) {
        case ROUTER_NOISE:
        case ROUTER_PERTURB_NEW: // w + 0.01 std(W) N(0, 1), std over the whole router
            for (long c = 0; c < cols; c++) row[c] = (float)(row[c] + router_strength(0.01) * std * d[c]);
            break;
        case ROUTER_INTERPOLATE: // (1 - a) w_e + a w_next
            a = router_strength(0.5);
            for (long c = 0; c < cols; c++) row[c] = (float)((1 - a) * row[c] + a * next[c]);
            break;
        case ROUTER_SCALED: // 0.95 w
            for (long c = 0; c < cols; c++) row[c] = (float)(row[c] * router_strength(0.95));
            break;
        case ROUTER_TEMPERATURE: // w / 1.1
            for (long c = 0; c < cols; c++) row[c] = (float)(row[c] / router_strength(1.1));
            break;
        case ROUTER_ORTHOGONAL: // w + 0.1 |w| times the unit vector of a random vector's part orthogonal to w
        case ROUTER_ADVERSARIAL: // w + 0.01 |w| times the unit vector away from the mean of the other rows
            if (p->router == ROUTER_ORTHOGONAL) {
                for (long c = 0; c < cols; c++) along += d[c] * row[c];
                for (long c = 0; c < cols && length > 0; c++) d[c] -= along / (length * length) * row[c];
            } else {
                for (long c = 0; c < cols; c++) {
                    double sum = 0;
                    for (int i = 0; i < E; i++) sum += i == e ? 0 : w[(long)i * cols + c];
                    d[c] = row[c] - (E > 1 ? sum / (E - 1) : 0);
                }
            }
            size = sqrt(dot(d, d, cols));
            a = router_strength(p->router == ROUTER_ORTHOGONAL ? 0.1 : 0.01);
            for (long c = 0; c < cols && size > 0; c++) row[c] = (float)(row[c] + a * length * d[c] / size);
            break;
        default: break; // copy; bias and svd-perturb are made elsewhere
    }
    free(d);
}

// All rows of a router at once (N, cols): it is small. half as in expert_maker.
static Maker router_maker(Plan* p, int l, long cols, int half) {
    Maker k;
    memset(&k, 0, sizeof k);
    int N = p->N, E = p->sources[0]->config.num_experts;
    k.factor = 1;
    k.rows = N;
    k.cols = cols;
    k.whole = (float*)checked_malloc(sizeof(float) * (size_t)(N * cols));
    memset(k.whole, 0, sizeof(float) * (size_t)(N * cols));
    if (p->dense) {
        for (int j = 0; half < 0 && j < N; j++) {
            if (p->centroids)
                memcpy(k.whole + j * cols, p->centroids + ((long)l * N + j) * cols, sizeof(float) * (size_t)cols);
            else
                new_router_row(p, k.whole + j * cols, l, p->method == GRANULAR ? j / (int)ask.granularity : j, cols);
        }
        return k;
    }
    const Source* s = half >= 0 ? p->moments[half] : p->sources[0];
    const View* from = &s->views[s->router[l]];
    float* w = view_whole(from);
    double mean, std;
    slice_statistics(from, NULL, 0, &mean, &std);
    int perturbed_for = -1;
    float* perturbed = NULL; // svd-perturb: the whole router, drawn anew for each copy number
    for (int j = 0; j < N; j++) {
        int e = plan_source(p, l, j), number = plan_copy(p, l, j);
        float* row = k.whole + j * cols;
        if (e < 0) {
            if (half < 0) new_router_row(p, row, l, j, cols);
            continue;
        }
        memcpy(row, w + e * cols, sizeof(float) * (size_t)cols);
        if (half >= 0) {
            double n = p->copies[(long)l * p->E + e];
            for (long c = 0; c < cols; c++) {
                if (p->carry == MOMENTS_INTERPOLATE && number > 0)
                    row[c] = 0.5f * row[c] + 0.5f * w[(long)((e + 1) % E) * cols + c];
                if (p->carry == MOMENTS_SCALE) row[c] = (float)(row[c] / (half ? n * n : n));
            }
        } else if (p->router == ROUTER_SVD_PERTURB && number > 0) {
            if (number != perturbed_for) {
                free(perturbed);
                perturbed = view_whole(from);
                operator_svd_perturb(perturbed, E, cols, stream_key(p, "router", l, number, 3), router_strength(0.1));
                perturbed_for = number;
            }
            memcpy(row, perturbed + e * cols, sizeof(float) * (size_t)cols);
        } else if (number > 0 || p->router == ROUTER_NOISE) {
            router_operator(p, row, w, e, E, cols, std, stream_key(p, "router", l, j, 3));
        }
    }
    free(w);
    free(perturbed);
    return k;
}

// The bias that sigmoid routers select by (N): the paper's operator adds U(-delta, delta), delta = 0.001, to that of
// copies.
static Maker correction_maker(Plan* p, int l, int half) {
    Maker k;
    memset(&k, 0, sizeof k);
    k.factor = 1;
    k.rows = p->N;
    k.cols = 1;
    k.whole = (float*)checked_malloc(sizeof(float) * (size_t)p->N);
    memset(k.whole, 0, sizeof(float) * (size_t)p->N);
    const Source* s = half >= 0 ? p->moments[half] : p->sources[0];
    if (p->dense || !s->views[s->correction[l]].stored) return k;
    float* w = view_whole(&s->views[s->correction[l]]);
    for (int j = 0; j < p->N; j++) {
        int e = plan_source(p, l, j);
        k.whole[j] = e < 0 ? 0 : w[e];
        if (half < 0 && e >= 0 && plan_copy(p, l, j) > 0 && p->router == ROUTER_BIAS)
            k.whole[j] += (float)(router_strength(1e-3) * (2 * random_uniform(stream_key(p, "bias", l, j, 0)) - 1));
    }
    free(w);
    return k;
}

// How a tensor of the result is made.
static Maker maker_for(Plan* p, const Output* o) {
    const Role* r = &o->role;
    long rows = o->tensor->rows, cols = tensor_is_matrix(o->tensor) ? o->tensor->cols : 1;
    if (r->kind == FFN_MATRIX && p->config.sparse[r->layer])
        return expert_maker(p, r->layer, r->expert, r->matrix, rows, cols, o->half);
    if (r->kind == ROUTER_ROWS) return router_maker(p, r->layer, cols, o->half);
    if (r->kind == ROUTER_CORRECTION) return correction_maker(p, r->layer, o->half);
    Maker k; // everything else is copied, or averaged over several models (Branch-Train-MiX)
    memset(&k, 0, sizeof k);
    k.factor = 1;
    k.rows = rows;
    k.cols = cols;
    const View* v = source_find(o->half < 0 ? p->sources[0] : p->moments[o->half], o->tensor->name);
    if (!v || v->rows != rows || v->cols != cols) die(1, "%s: SRC has no such tensor of this shape", o->tensor->name);
    k.from = *v;
    if (p->num_sources > 1) {
        k.num_average = p->num_sources - 1;
        k.average = (View*)checked_malloc(sizeof(View) * (size_t)k.num_average);
        for (int i = 1; i < p->num_sources; i++) k.average[i - 1] = *source_find(p->sources[i], o->tensor->name);
    }
    return k;
}

#include "dev/upcycle/cluster.h"      // cluster-aware upcycling

#include "dev/upcycle/writer.h"       // the result, whole or not at all

#include "dev/upcycle/plan.h"         // what was asked for becomes a plan, or is refused

#include "dev/upcycle/receipt.h"      // what was done and what it means

#include "dev/upcycle/proof.h"        // loss and logits before and after

#include "dev/upcycle/inspect.h"      // --inspect

#include "dev/upcycle/command.h"      // --help and the command line

static int upcycle_main(int argc, char** argv) {
    char dst[PATH_SIZE];
    Findings findings;
    Proof proof;
    struct statvfs disk;
    begin_program("upcycle");
    // what the receipt repeats: the options as they were given, without SRC and DST
    char** arguments = (char**)checked_malloc(sizeof(char*) * (size_t)(argc + 1));
    int num_arguments = 0;
    memset(&proof, 0, sizeof proof);
    memset(&progress, 0, sizeof progress);
    stop_signal = 0;
    if (argc == 1) {
        print_usage(stderr);
        die(2, "SRC and DST are missing; --help lists every option");
    }
    remember_command(argc, argv);
    ask_parse(argc, argv); // moves SRC and DST behind the options
#ifdef _OPENMP
    if (ask.threads != UNSET) omp_set_num_threads((int)ask.threads);
#endif
    look_for_others();
    for (int i = 1; i < optind; i++) arguments[num_arguments++] = argv[i];
    catch_signals();
    signal(SIGPIPE, SIG_IGN); // that nobody reads what is printed (`| head`) is no reason to lose the work
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); // a file over the limit is an error of write
#endif
    static const char* of_inspect[] = {"inspect", "data", "calibrate-batches", "batch", "seq", "threads"};
    for (int i = 0; i < NUM_ASKED; i++) {
        int fits = !ask.inspect;
        for (int k = 0; k < 6; k++) fits |= !strcmp(ask_table[i].name, of_inspect[k]);
        if (insists(ask_table[i].name) && !fits) die(2, "--inspect only looks; leave out --%s", ask_table[i].name);
    }
    static const char* of_data[] = {"batch", "seq", "calibrate-batches", "check-batches"};
    for (int i = 0; i < 4; i++) {
        const char* wanted = ask.inspect ? "data" : i == 2 ? "calibrate" : i == 3 ? "check" : "calibrate or --check";
        int used = ask.data || (i != 3 && ask.calibrate) || (i != 2 && ask.check);
        if (insists(of_data[i]) && !used) die(2, "--%s is about data, and there is no --%s", of_data[i], wanted);
    }
    if (ask.data && !ask.inspect) die(2, "--data goes with --inspect; --check and --calibrate are for an upcycle");
    if (ask.inspect) {
        if (optind < argc) die(2, "%s: --inspect DIR takes no SRC and DST", argv[optind]);
        free(arguments);
        return run_inspect();
    }
    if (argc - optind != 2)
        die(2, "expected SRC DST --experts N, found %d director%s; see --help", argc - optind,
            argc - optind == 1 ? "y" : "ies");
    const char *src = argv[optind], *wanted = argv[optind + 1];
    Error error = {""};
    Config c;
    if (!config_read(&c, src, &error)) die(2, "%s", error.text);
    Source early;
    memset(&early, 0, sizeof early);
    early.dir = (char*)src;
    Source* only[1] = {&early};
    check_destination(wanted, dst, only, 1); // what can be refused is refused before any long work
    if (ask.check) {
        Config checked = c;
        int T = sequence_length(&checked, src);
        dataset_close(dataset_open(ask.check, T, c.vocab_size, WHOLE, reads_bytes(&c, src)));
    }
    Plan* p = plan_create(src);
    check_destination(wanted, dst, p->sources, p->num_sources);
    find_properties(p, &findings);
    print_plan(p, dst);
    print_engine_notes(&p->config);
    if (ask.dry_run) {
        printf("files   %d with %d tensors, %.1f MB; memory while writing at most about %.0f MB and the program's 3\n",
               p->num_files, p->num_outputs, (double)progress.total * 1e-6, plan_memory(p) * 1e-6);
        print_findings(&findings);
        printf("nothing was written%s: --dry-run\n", ask.check ? " and nothing checked" : "");
    } else {
        begin_saving(dst);
        long room = statvfs(saving_path, &disk) ? LONG_MAX : (long)disk.f_bavail * (long)disk.f_frsize;
        if (room < progress.total)
            die(2, "%s: %.1f MB wanted, but the disk has only %.1f MB left", dst, progress.total * 1e-6, room * 1e-6);
        write_tensors(p, saving_path);
        double elapsed = seconds() - progress.started;
        if (p->model_files > 1) write_index(p, saving_path);
        write_config(p, saving_path);
        if (p->carry != MOMENTS_RESET) write_trainer(p, saving_path);
        if (!copy_travelling_files(src, saving_path, &error)) die(1, "%s", error.text);
        find_properties(p, &findings); // cluster knows its ranks only now
        if (progress.overflows)
            warn(&findings, "%ld numbers are too large for their format and became infinite; --dtype f32 holds them",
                 progress.overflows);
        write_receipt(p, saving_path, &findings, NULL, arguments, num_arguments);
        printf("written %.1f MB in %d file%s in %.1f s\n", progress.total * 1e-6, p->num_files,
               p->num_files > 1 ? "s" : "", elapsed);
        fflush(stdout);
        if (ask.check) {
            prove(p, saving_path, &proof);
            if (!isfinite(proof.logits))
                warn(&findings, "the logits on %s are not numbers, or infinite; does SRC hold weights that are not?",
                     ask.check);
            write_receipt(p, saving_path, &findings, &proof, arguments, num_arguments);
        }
        write_cards(p, dst, saving_path);
        finish_saving(dst);
        print_findings(&findings);
        if (p->carry != MOMENTS_RESET)
            printf("moments: --optimizer %s; `train_moe --out %s --resume --steps N` uses them, --model does not\n",
                   ask.optimizer, dst);
    }
    plan_free(p);
    free(arguments);
    return 0;
}

#ifndef UPCYCLE_NO_MAIN
int main(int argc, char** argv) { return upcycle_main(argc, argv); }
#endif
#endif
