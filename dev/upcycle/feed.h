// feed.h: batches of a text for a model: for calibration, --check, and --inspect --data.
#pragma once

typedef struct {
    const char* what; // for the line of progress
    double started;
    Config config;
    Dataset* data;
    Batch batch;
    int B, T, training; // training: windows in the order in which epoch 0 of a training run would see them
    long windows, next;
} Feed;

static int sequence_length(const Source* s) {
    Config copy = s->config;
    int T = asked("seq") ? (int)ask.seq : imin(1024, copy.max_position_embeddings);
    int window = sliding_window(s->dir, &copy);
    if (!asked("seq") && window) T = imin(T, window);
    check_length(&copy, s->dir, T);
    return T;
}

// At most `batches` batches (0: all) of a text or of token shards, for models like s
static Feed feed_open(const char* what, const char* list, Part part, const Source* s, long batches) {
    Feed f;
    memset(&f, 0, sizeof f);
    f.what = what;
    f.started = seconds();
    f.config = s->config;
    f.training = part == TRAIN_PART;
    f.T = sequence_length(s);
    f.data = dataset_open(list, f.T, s->config.vocab_size, part, reads_bytes(&s->config, s->dir));
    f.windows = batches ? lmin(f.data->windows, batches * ask.batch) : f.data->windows;
    f.B = (int)lmin(ask.batch, f.windows > 0 ? f.windows : 1);
    f.batch = batch_create(f.B, f.T);
    return f;
}

static Feed feed_calibration(const Source* s, const char* why) {
    if (!ask.calibrate) die(2, "%s wants --calibrate F, a text or token shards", why);
    Feed f = feed_open("calibration: window", ask.calibrate, TRAIN_PART, s, ask.calibrate_batches);
    if (f.windows < ask.batch * ask.calibrate_batches)
        die(2,
            "--calibrate %s: too short: %ld windows of %d tokens, but %ld batches of %ld need %ld; fewer "
            "--calibrate-batches, a smaller --batch or --seq fit",
            ask.calibrate, f.windows, f.T + 1, ask.calibrate_batches, ask.batch, ask.batch * ask.calibrate_batches);
    return f;
}

// The model in `dir`, whose vocabulary is the feed's; it ends the program with `code` if it cannot be read.
static Model* feed_model(const Feed* f, const char* dir, Purpose purpose, int code) {
    Error error = {""};
    Config c;
    if (!config_read(&c, dir, &error)) die(code, "%s", error.text);
    c.max_position_embeddings = f->config.max_position_embeddings;
    c.router.lpr_weight = c.router.dynamic_weight = 0; // a router's own losses are not the data's
    Model* m = model_create(&c, purpose, f->B, f->T, f->T, NULL);
    if (!checkpoint_load(m, dir, &error)) die(code, "%s", error.text);
    return m;
}

// Fills f->batch; returns how many sequences it holds, 0 at the end.
static int feed_next(Feed* f) {
    int rows = (int)lmin(f->B, f->windows - f->next);
    heed_signals();
    show_count(f->what, f->next, f->windows, f->started);
    for (int b = 0; b < rows; b++) {
        int *tokens = f->batch.tokens + (long)b * f->T, *targets = f->batch.targets + (long)b * f->T;
        if (!(f->training ? dataset_training_sequence(f->data, (uint64_t)ask.seed, f->next + b, tokens, targets)
                          : dataset_read(f->data, f->next + b, tokens, targets)))
            die(2, "%s", f->data->error);
    }
    f->next += rows;
    return rows;
}

static void feed_close(Feed* f) {
    clear_progress();
    free(f->batch.tokens);
    dataset_close(f->data);
}
