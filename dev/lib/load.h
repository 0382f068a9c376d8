// load.h: what the experts of a model do: load, entropy, similarity of twins. Needs train_moe.c's Model
// and count_families of checkpoint.h, which comes later.
#pragma once

// of load.csv
#define LOAD_HEADER \
    "step,layer,expert,assignments,gini,min_max,max_vio,dead,entropy,top_gate,twin_cosine,twins_together,sources"

// sums (E) = the sums of the columns of x (N, E)
static void sum_columns(double* sums, const float* x, int N, int E) {
    for (int e = 0; e < E; e++) sums[e] = 0;
    for (int n = 0; n < N; n++)
        for (int e = 0; e < E; e++) sums[e] += x[(long)n * E + e];
}

// After routing: counts the load, and adds this layer's share to the balance losses' values. (Their gradient is
// balance_backward.)
static void count_balance(Model* m, int l) {
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, E = m->config.num_experts;
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
        if (m->balance.aux_form == AUX_SWITCH)
            m->aux_loss += E * (count / (double)s->offsets[E]) * (prob_sums[e] / N);
    }
    for (int n = 0; n < N; n++) m->z_loss += (double)s->router_lse[n] * s->router_lse[n] / N;
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

// Lists each token's experts (-1: none) and gates in Model.trace.
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
    double* entropies = m->scratch.entropies;
    #pragma omp parallel for if (N > 1)     // N E logarithms; their sums below are in the order of the tokens
    for (int n = 0; n < N; n++) {
        const float* p = s->probs + (long)n * E;
        entropies[n] = 0;
        for (int e = 0; e < E; e++) entropies[n] -= p[e] > 1e-30f ? p[e] * logf(p[e]) : 0;
    }
    for (int n = 0; n < N; n++) {
        const float* gates = s->gates + (long)n * K;
        const int* experts = s->experts + (long)n * K;
        int distinct = 0, chosen = 0;
        double top = 0;
        for (int k = 0; k < K && experts[k] >= 0; k++, chosen++) {
            int known = 0;
            for (int j = 0; j < k && m->has_families; j++) known |= family[experts[j]] == family[experts[k]];
            distinct += !known;
            top = gates[k] > top ? gates[k] : top;
        }
        o->entropy += entropies[n];
        o->top_gate += top;
        o->sources += distinct;
        o->twins += distinct < chosen;
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

static int count_families(const Model* m);          // in checkpoint.h
static void print_figures(const Model* m, const char* name, const LayerFigures* f) {
    printf("%s: Gini %.3f, min/max %.3f, MaxVio %.2f, dead %d, entropy %.3f, top gate %.3f", name, f->load.gini,
           f->load.min_max, f->load.max_vio, f->load.dead, f->entropy, f->top_gate);
    if (m->has_families) printf(", twins' cosine %.4f", f->twin_cosine);
    if (m->has_families && count_families(m) > 1)       // copies of one FFN are always chosen together
        printf(", chosen together %.3f, sources/token %.3f", f->twins_together, f->sources);
}

// Once, below the first figures: how to read them.
static void explain_figures(const Model* m) {
    static int explained;
    const char* twins =
        !m->has_families         ? ""
        : count_families(m) == 1 ? ";\n      twins: experts copied from one"
                                 : ";\n      twins: experts copied from one; chosen together: share of tokens with "
                                   "two of\n      them; sources/token: different originals among a token's experts";
    if (explained++) return;
    printf("      (all experts used alike: Gini 0, min/max 1, MaxVio 0; entropy in nats, of the\n"
           "      router, %.3f: it prefers none; top gate: the largest weight of an expert%s)\n",
           log((double)m->config.num_experts), twins);
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
    explain_figures(m);
}
