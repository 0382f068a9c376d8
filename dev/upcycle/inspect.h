// inspect.h: --check: loss and logits of source and result. --inspect: what a checkpoint's experts are like and where
// they come from.
#pragma once

typedef struct {
    const Plan* plan;
    double distinct, experts;
    long tokens;
} DistinctSources;

// Counts, for each token, the different sources among its experts; an expert that is new is a source of its own.
static void observe_sources(Model* m, int l) {
    DistinctSources* d = (DistinctSources*)m->observer;
    const Config* c = &m->config;
    int K = m->topk[l], N = m->batch * m->length;
    if (!c->sparse[l]) return;
    for (int n = 0; n < N; n++) {
        const int* chosen = m->layers[l].experts + (long)n * K;
        for (int k = 0; k < K && chosen[k] >= 0; k++) { // a dynamic router's token may have fewer
            int s = plan_source(d->plan, l, chosen[k]), seen = 0;
            for (int i = 0; i < k; i++) seen |= s >= 0 && plan_source(d->plan, l, chosen[i]) == s;
            d->distinct += !seen;
            d->experts++;
        }
    }
    d->tokens += N;
}

// The loss of SRC and of the result in `dir` on --check, and || logits - logits of SRC || / || logits of SRC ||.
static void prove(const Plan* p, const char* dir, Proof* proof) {
    const Source* s = p->sources[0];
    Feed f = feed_open("check: window", ask.check, WHOLE, s, ask.check_batches);
    Model *before = feed_model(&f, s->dir, FOR_SCORING, 1), *after = feed_model(&f, dir, FOR_SCORING, 1);
    DistinctSources distinct = {p, 0, 0, 0};
    double difference = 0, norm = 0;
    memset(proof, 0, sizeof *proof);
    after->observe = observe_sources;
    after->observer = &distinct;
    for (int rows; (rows = feed_next(&f)) > 0;) {
        proof->loss_before += model_forward(before, f.batch.tokens, f.batch.targets, rows, f.T) * rows;
        proof->loss_after += model_forward(after, f.batch.tokens, f.batch.targets, rows, f.T) * rows;
        for (long i = 0; i < (long)rows * f.T * s->config.vocab_size; i++) {
            double x = before->logits[i], y = after->logits[i];
            difference += (y - x) * (y - x);
            norm += x * x;
        }
    }
    feed_close(&f);
    proof->done = 1;
    proof->tokens = f.windows * f.T;
    proof->loss_before /= (double)f.windows;
    proof->loss_after /= (double)f.windows;
    proof->logits = norm == 0 && difference == 0 ? 0 : sqrt(difference / norm);
    if ((!p->dense || p->num_sources > 1) && distinct.tokens)
        proof->distinct = distinct.distinct / (double)distinct.tokens;
    printf("check   %s, %ld tokens: loss %.4f before, %.4f after; relative change of the logits %.1e\n", ask.check,
           proof->tokens, proof->loss_before, proof->loss_after, proof->logits);
    if (proof->distinct > 0)
        printf("        a token's %.3g experts come from %.2f distinct sources on average\n",
               distinct.experts / (double)distinct.tokens, proof->distinct);
    fflush(stdout);
    model_free(before);
    model_free(after);
}

// Cosines between the experts of a layer, all their weights taken as one vector: gram (E, E) of inner products; hash
// (E) is equal for experts that are equal in every number.
static void expert_gram(const Source* s, int l, double* gram, uint64_t* hash) {
    int E = s->config.num_experts;
    long n = CHUNK_FLOATS / E < 1 ? 1 : CHUNK_FLOATS / E;
    float *x = floats(n * E), *products = floats((long)E * E);
    Error error = {""};
    memset(gram, 0, sizeof(double) * (size_t)E * (size_t)E);
    memset(hash, 0, sizeof(uint64_t) * (size_t)E);
    for (int matrix = GATE; matrix <= DOWN; matrix++) {
        long size = source_ffn(s, l, 0, matrix)->rows * source_ffn(s, l, 0, matrix)->cols;
        for (long first = 0; first < size; first += n) {
            long count = lmin(n, size - first);
            for (int e = 0; e < E; e++) {
                const View* v = source_ffn(s, l, e, matrix);
                if (!safetensors_read(v->files, v->stored, v->first + first, count, x + e * count, &error))
                    die(1, "%s", error.text);
                for (long i = 0; i < count; i++) {
                    uint32_t bits;
                    memcpy(&bits, x + e * count + i, 4);
                    hash[e] = (hash[e] ^ bits) * 0x9E3779B97F4A7C15ull;
                    hash[e] ^= hash[e] >> 29;
                }
            }
            matmul_forward(products, x, x, E, (int)count, E);
            for (long i = 0; i < (long)E * E; i++) gram[i] += products[i];
        }
    }
    free(x);
    free(products);
}

static void print_lineage(const char* dir) {
    char path[PATH_SIZE];
    Error error = {""};
    join_path(path, dir, "upcycle.json");
    if (access(path, F_OK)) return;
    Json* j = json_read(path, &error);
    if (!j) die(2, "%s", error.text);
    printf("lineage (the latest step first):\n");
    for (const Json* r = j; r && r->type == JSON_OBJECT; r = json_get(r, "parent")) {
        const Json *method = json_get(r, "method"), *sources = json_get(r, "sources"), *f = json_get(r, "function");
        char changes[256];
        printf("  %s%s", method && method->type == JSON_STRING ? method->string : "?",
               step_changes(changes, sizeof changes, ", ", r));
        for (int i = 0; sources && i < sources->count; i++)
            if (sources->items[i]->type == JSON_STRING) printf("%s%s", i ? ", " : " from ", sources->items[i]->string);
        if (f && f->type == JSON_STRING) printf("\n    function: %s", f->string);
        printf("\n");
    }
    json_free(j);
}

static int run_inspect(void) {
    Source* s = open_or_die(ask.inspect, "");
    const Config* c = &s->config;
    int E = c->num_experts, L = c->num_layers;
    char path[PATH_SIZE];
    Error error = {""};
    print_config_line("model", s->dir, c, stored_bytes(s));
    long by_type[DTYPE_F64 + 1] = {0, 0, 0, 0};
    for (int i = 0; i < s->files->num_tensors; i++)
        if (s->files->tensors[i].dtype <= DTYPE_F64) by_type[s->files->tensors[i].dtype] += s->files->tensors[i].bytes;
    printf("        %d tensors in %d file%s:", s->files->num_tensors, s->files->num_files,
           s->files->num_files > 1 ? "s" : "");
    for (int i = 0; i <= DTYPE_F64; i++)
        if (by_type[i]) printf(" %s %.1f MB", dtype_names[i], by_type[i] * 1e-6);
    printf("\n");
    print_lineage(s->dir);
    if (E == 0) {
        if (ask.data) die(2, "--data: %s is dense, it has no load", s->dir);
        source_close(s);
        return 0;
    }
    double *load = NULL, *gram = NEW(double, (long)E * E);
    long* whole_load = NEW(long, E);
    uint64_t* hash = NEW(uint64_t, E);
    if (ask.data) {
        Feed f = feed_open("load: window", ask.data, WHOLE, s, ask.calibrate_batches);
        Model* m = feed_model(&f, s->dir, FOR_SCORING, 2);
        Usage usage = {load = NEW(double, L * E), NULL, NULL, NULL, 0, 0};
        double loss = 0;
        m->observe = observe_usage;
        m->observer = &usage;
        for (int rows; (rows = feed_next(&f)) > 0;)
            loss += model_forward(m, f.batch.tokens, f.batch.targets, rows, f.T) * rows;
        feed_close(&f);
        printf("data    %s, %ld tokens: loss %.4f\n", ask.data, f.windows * f.T, loss / (double)f.windows);
        model_free(m);
    }
    join_path(path, s->dir, "upcycle.json");
    Json* receipt = access(path, F_OK) ? NULL : json_read(path, &error);
    const Json* layers = json_get(receipt, "layers");
    printf("similarity of experts (cosine of all weights; family: copies of one expert), pairs that are equal in\n"
           "every number%s\n", load ? "; load, as a share of the mean (all used alike: Gini 0, MaxVio 0)" : "");
    for (int l = 0; l < L; l++) {
        if (!c->sparse[l]) continue;
        double mean = 0, most = -1, twin_mean = 0;
        long pairs = 0, equal = 0, twins = 0;
        const Json* family = NULL;
        for (int i = 0; layers && i < layers->count; i++)
            if (json_whole(json_get(layers->items[i], "layer"), MAX_LAYERS) == l)
                family = json_get(layers->items[i], "family");
        if (family && family->count != E) family = NULL;
        expert_gram(s, l, gram, hash);
        for (int a = 0; a < E; a++)
            for (int b = 0; b < a; b++) {
                double size = sqrt(gram[(long)a * E + a] * gram[(long)b * E + b]),
                       cosine = size > 0 ? gram[(long)a * E + b] / size : 0;
                mean += cosine;
                if (cosine > most) most = cosine;
                equal += hash[a] == hash[b];
                pairs++;
                if (family && family->items[a]->string && family->items[b]->string &&
                    !strcmp(family->items[a]->string, family->items[b]->string)) {
                    twin_mean += cosine;
                    twins++;
                }
            }
        printf("  layer %d:", l);
        if (pairs) printf(" mean %.4f, max %.4f, %ld of %ld pairs equal", mean / (double)pairs, most, equal, pairs);
        if (twins) printf(", within families %.4f", twin_mean / (double)twins);
        if (load) {
            const double* x = load + (long)l * E;
            double sum = 0;
            for (int e = 0; e < E; e++) {
                whole_load[e] = (long)x[e];
                sum += x[e];
            }
            LoadFigures figures = load_figures(whole_load, E);
            printf("; Gini %.3f, MaxVio %.2f, %d dead", figures.gini, figures.max_vio, figures.dead);
            if (E <= 16) {
                printf(", load");
                for (int e = 0; e < E; e++) printf(" %.2f", sum > 0 ? x[e] * E / sum : 0);
            }
        }
        printf("\n");
        fflush(stdout);
        heed_signals();
    }
    json_free(receipt);
    free(load);
    free(whole_load);
    free(gram);
    free(hash);
    source_close(s);
    return 0;
}
