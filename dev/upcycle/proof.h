// proof.h: --check: loss and logits of source and result.
#pragma once

typedef struct {
    const Plan* plan;
    double distinct;
    long tokens;
} DistinctSources;

// Counts, for each token, the different sources among its experts; an expert that is new is a source of its own.
static void observe_sources(void* state, const Model* m, int l) {
    DistinctSources* d = (DistinctSources*)state;
    const Config* c = &m->config;
    int K = m->topk[l], N = m->batch * m->length;
    if (!c->sparse[l]) return;
    for (int n = 0; n < N; n++) {
        const int* chosen = m->layers[l].experts + (long)n * K;
        for (int k = 0; k < K; k++) {
            int s = plan_source(d->plan, l, chosen[k]), seen = 0;
            for (int i = 0; i < k; i++) seen |= s >= 0 && plan_source(d->plan, l, chosen[i]) == s;
            d->distinct += !seen;
        }
    }
    d->tokens += N;
}

// The loss of SRC and of the result in `dir` on --check, and || logits - logits of SRC || / || logits of SRC ||.
static void prove(const Plan* p, const char* dir, Proof* proof) {
    Error error = {""};
    Config from = p->sources[0]->config, to;
    int T = sequence_length(&from, p->sources[0]->dir), B = (int)ask.batch;
    if (!config_read(&to, dir, &error)) die(1, "%s", error.text);
    to.max_position_embeddings = from.max_position_embeddings;
    Dataset* d = dataset_open(ask.check, T, from.vocab_size, WHOLE, reads_bytes(&from, p->sources[0]->dir));
    long windows = ask.check_batches ? lmin(d->windows, ask.check_batches * B) : d->windows;
    if (windows < B) B = (int)windows;
    Model* before = model_create(&from, FOR_SCORING, B, T, T, NULL);
    Model* after = model_create(&to, FOR_SCORING, B, T, T, NULL);
    if (!checkpoint_load(before, p->sources[0]->dir, &error) || !checkpoint_load(after, dir, &error))
        die(1, "%s", error.text);
    Batch batch = batch_create(B, T);
    DistinctSources distinct = {p, 0, 0};
    double difference = 0, norm = 0, started = seconds();
    memset(proof, 0, sizeof *proof);
    for (long w = 0; w < windows; w += B) {
        int rows = (int)lmin(B, windows - w);
        heed_signals();
        show_count("check: window", w, windows, started);
        for (int b = 0; b < rows; b++)
            dataset_window(d, w + b, batch.tokens + (long)b * T, batch.targets + (long)b * T);
        proof->loss_before += observed_forward(before, batch.tokens, batch.targets, rows, T, NULL, NULL) * rows;
        proof->loss_after +=
            observed_forward(after, batch.tokens, batch.targets, rows, T, observe_sources, &distinct) * rows;
        for (long i = 0; i < (long)rows * T * from.vocab_size; i++) {
            double x = before->logits[i], y = after->logits[i];
            difference += (y - x) * (y - x);
            norm += x * x;
        }
    }
    clear_progress();
    proof->done = 1;
    proof->tokens = windows * T;
    proof->loss_before /= (double)windows;
    proof->loss_after /= (double)windows;
    proof->logits = norm == 0 && difference == 0 ? 0 : sqrt(difference / norm);
    if ((!p->dense || p->num_sources > 1) && distinct.tokens)
        proof->distinct = distinct.distinct / (double)distinct.tokens;
    printf("check   %s, %ld tokens: loss %.4f before, %.4f after; relative change of the logits %.1e\n", ask.check,
           proof->tokens, proof->loss_before, proof->loss_after, proof->logits);
    if (proof->distinct > 0)
        printf("        a token's %d experts come from %.2f distinct sources on average\n", to.num_experts_per_tok,
               proof->distinct);
    fflush(stdout);
    free(batch.tokens);
    dataset_close(d);
    model_free(before);
    model_free(after);
}
