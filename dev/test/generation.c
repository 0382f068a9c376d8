/*
generation.c: one token at a time. The key/value cache against whole forward passes, draws, tokenizers, samples.
*/
// ---------------------------------------------------------------------------------------------------------------------
// Generation with the key/value cache against whole forward passes: the same bits

enum { CACHE_LENGTH = 45 }; // more than a block of queries

// Feeds tokens in chunks as `sizes` says (ending with 0, the last size repeats). The logits after each chunk must be
// the row of its last token.
static int cache_equals(Model* g, const int* tokens, const float* logits, const int* sizes) {
    int same = 1, V = g->config.vocab_size;
    g->cached = 0;
    for (int fed = 0; fed < CACHE_LENGTH;) {
        int n = imin(*sizes, CACHE_LENGTH - fed);
        model_forward(g, tokens + fed, NULL, 1, n);
        fed += n;
        same &= same_floats(g->logits, logits + (long)(fed - 1) * V, V);
        if (sizes[1]) sizes++;
    }
    return same && g->cached == CACHE_LENGTH;
}

static void test_cache_model(const char* dir, const char* name) {
    static const int chunks[][6] = {{1, 0}, {3, 0}, {7, 0}, {CACHE_LENGTH, 0}, {33, 1, 0}, {1, 20, 2, 16, 1, 0}};
    int tokens[CACHE_LENGTH], same = 1;
    Config c;
    Error error = {""};
    if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
    fill_tokens(tokens, CACHE_LENGTH, c.vocab_size, 5);
    Model* m = open_model(dir, FOR_SCORING, 1, CACHE_LENGTH);
    Model* g = keep_model(model_create(&c, FOR_GENERATION, 1, CACHE_LENGTH, CACHE_LENGTH, m));
    model_forward(m, tokens, NULL, 1, CACHE_LENGTH);
    for (EACH(i, chunks)) same &= cache_equals(g, tokens, m->logits, chunks[i]);
    check(same, "%s: six ways to cut %d tokens into chunks", name, CACHE_LENGTH);

    // a prefix, and a row of a batch, have the bits of the whole sequence alone
    long V = c.vocab_size, n = 19;
    float* alone = copy_floats(m->logits, CACHE_LENGTH * V);
    model_forward(m, tokens, NULL, 1, (int)n);
    same = same_floats(alone, m->logits, n * V);
    int batch[3 * CACHE_LENGTH];
    fill_tokens(batch, 3 * CACHE_LENGTH, c.vocab_size, 6);
    memcpy(batch + CACHE_LENGTH, tokens, sizeof tokens);
    m = open_model(dir, FOR_TRAINING, 3, CACHE_LENGTH);
    model_forward(m, batch, NULL, 3, CACHE_LENGTH);
    same &= same_floats(alone, m->logits + CACHE_LENGTH * V, CACHE_LENGTH * V);
    check(same, "%s: a prefix, and a sequence among others, have the bits of the sequence alone", name);
}

// When the cache is full, generation starts again from the later half of it.
static void test_cache_restart(int positions, int chunk) {
    int tokens[CACHE_LENGTH], start = 0, same = 1, restarts = 0;
    Model* m = open_model("dev/reference/golden/qwen3_moe", FOR_SCORING, 1, CACHE_LENGTH);
    Model* g = keep_model(model_create(&m->config, FOR_GENERATION, 1, imin(chunk, positions), positions, m));
    fill_tokens(tokens, CACHE_LENGTH, m->config.vocab_size, 9);
    for (int fed = 0; fed < CACHE_LENGTH;) {
        int n = imin(chunk, CACHE_LENGTH - fed);
        generator_feed(g, tokens, fed, fed + n);
        for (int t = fed; t < fed + n; t++)
            if (t - start == positions) {
                start = t - positions / 2;
                restarts++;
            }
        fed += n;
        model_forward(m, tokens + start, NULL, 1, fed - start);
        long V = m->config.vocab_size;
        same &= g->cached == fed - start;
        same &= same_floats(g->logits, m->logits + (long)(fed - start - 1) * V, V);
    }
    check(same && restarts > 1, "a cache of %d, fed by %d: %d restarts from the later half", positions, chunk,
          restarts);
}

static void test_cache(void) {
    for (int way = 0; way < WAYS; way++)
        for (EACH(i, golden_models)) {
            char dir[PATH_SIZE], name[64];
            use_way(way);
            join_path(dir, "dev/reference/golden", golden_models[i]);
            snprintf(name, sizeof name, "%s, %s", golden_models[i], way_names[way]);
            test_cache_model(dir, name);
        }
    use_way(0);
    test_cache_restart(16, 1);
    test_cache_restart(16, 5);
    test_cache_restart(7, 3);
    test_cache_restart(1, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling

// how often each token comes in n draws that cover (0, 1) evenly
static void count_draws(const float* logits, int V, double temperature, int top_k, double top_p, int n, int* counts) {
    Candidate candidates[16];
    memset(counts, 0, sizeof(int) * (size_t)V);
    for (int i = 0; i < n; i++) counts[sample_token(logits, V, temperature, top_k, top_p, (i + 0.5) / n, candidates)]++;
}

static void test_draws(void) {
    enum { V = 6, N = 60000 };
    // probabilities 0.4, 0.05, 0.3, 0.1, 0.1, 0.05
    static const double p[V] = {0.4, 0.05, 0.3, 0.1, 0.1, 0.05};
    float logits[V];
    int counts[V], ok = 1;
    for (int v = 0; v < V; v++) logits[v] = (float)log(p[v]) + 3;
    count_draws(logits, V, 0, 0, 1, 100, counts);
    check(counts[0] == 100, "temperature 0 takes the likeliest");
    logits[2] = logits[0];
    count_draws(logits, V, 0, 0, 1, 100, counts);
    check(counts[0] == 100, "of equally likely ones temperature 0 takes the first");
    logits[2] = (float)log(0.3) + 3;
    count_draws(logits, V, 1, 0, 1, N, counts);
    for (int v = 0; v < V; v++) ok &= abs(counts[v] - (int)(N * p[v])) <= 2;
    check(ok, "temperature 1 draws by probability");
    double sum = 0;
    for (int v = 0; v < V; v++) sum += sqrt(p[v]);
    count_draws(logits, V, 2, 0, 1, N, counts);
    ok = 1;
    for (int v = 0; v < V; v++) ok &= abs(counts[v] - (int)(N * sqrt(p[v]) / sum)) <= 2;
    check(ok, "temperature 2 draws by the root of the probability");
    count_draws(logits, V, 1, 2, 1, N, counts);
    check(abs(counts[0] - N * 4 / 7) <= 2 && abs(counts[2] - N * 3 / 7) <= 2, "top-k 2 draws from the two likeliest");
    count_draws(logits, V, 1, 4, 1, N, counts);
    check(counts[3] > 0 && counts[4] > 0 && counts[1] + counts[5] == 0, "top-k 4 leaves out the two least likely");
    count_draws(logits, V, 1, 100, 1, N, counts);
    check(counts[1] > 0 && counts[5] > 0, "a top-k beyond the vocabulary is no limit");
    count_draws(logits, V, 1, 0, 0.65, N, counts);
    check(counts[0] > 0 && counts[2] > 0 && counts[0] + counts[2] == N, "top-p 0.65 keeps 0.4 + 0.3");
    count_draws(logits, V, 1, 0, 0.75, N, counts);
    check(counts[3] > 0 && counts[0] + counts[2] + counts[3] == N, "top-p 0.75 keeps a third, of equals the first");
    count_draws(logits, V, 1, 0, 0, N, counts);
    check(counts[0] == N, "top-p 0 keeps the likeliest");
    count_draws(logits, V, 1, 1, 1, N, counts);
    check(counts[0] == N, "top-k 1 keeps the likeliest");
    // top-p is of what top-k leaves, as in transformers: 0.4 of 0.4 + 0.3 is more than half of it, but not of all
    count_draws(logits, V, 1, 2, 0.5, N, counts);
    check(counts[0] == N, "top-k comes before top-p");
    count_draws(logits, V, 1, 2, 0.6, N, counts);
    check(counts[0] + counts[2] == N && counts[2] > 0, "top-k and top-p together");
    for (int v = 0; v < V; v++) logits[v] = v == 4 ? 30000.0f : -30000.0f;
    count_draws(logits, V, 0.01, 0, 1, 100, counts);
    check(counts[4] == 100, "large logits do not overflow");
}

static Tokenizer* make_tokenizer(const char* json, const char* config, int V) {
    remove_tree(temp("tokenizer"));
    mkdir(temp("tokenizer"), 0777);
    if (json) write_text(temp("tokenizer/tokenizer.json"), json);
    write_text(temp("tokenizer/config.json"), config);
    return tokenizer_open(temp("tokenizer"), V);
}

// what these tokens print, one after the other
static void check_printed(const Tokenizer* t, const char* what, const int* ids, int n, const char* expected,
                          size_t length) {
    char* text = NULL;
    size_t size = 0;
    FILE* out = open_memstream(&text, &size);
    int first = t->pieces && !t->pieces[ids[0]] ? 1 : 0;
    Printer printer = {out, {0}, 0, '\n'};
    for (int i = 0; i < n; i++) tokenizer_print(t, ids[i], i <= first, &printer);
    fclose(out);
    keep(A_BLOCK, text);
    check(size == length && !memcmp(text, expected, length), "%s", what);
}

static void test_tokenizers(void) {
    // GPT-2's alphabet: \u0120 is a space, \u010a a newline, \u00c3 \u00a9 the two bytes of an e with an acute accent
    Tokenizer* t = make_tokenizer(
        "{\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"ByteLevel\"}]}, \"model\": {\"type\": "
        "\"BPE\", \"vocab\": "
        "{\"Hello\": 0, \"\\u0120world\": 1, \"\\u010a\": 2, \"\\u00c3\\u00a9\": 3, \"\\u0100\": 4, \"far\": 99}}, "
        "\"added_tokens\": "
        "[{\"id\": 5, \"content\": \"<|end|>\", \"special\": true}, {\"id\": 6, \"content\": \"<tool>\", \"special\": "
        "false}]}",
        "{\"eos_token_id\": 5}", 8);
    int a[] = {0, 1, 2, 3, 4, 5, 6, 7}, b[] = {5, 1}, c[] = {1};
    check_printed(t, "byte-level pieces, special tokens print nothing", a, 8, "Hello world\n\xC3\xA9\xEF\xBF\xBD<tool>",
                  23);
    check_printed(t, "byte-level: a first space is kept", b, 2, " world", 6);
    check_printed(t, "byte-level: a first space is kept without a special token before it", c, 1, " world", 6);
    check(t->num_eos == 1 && t->eos[0] == 5, "one end-of-sequence token");
    tokenizer_close(t);

    // SentencePiece's alphabet: \u2581 is a space; bytes that have no piece are <0xNN>
    t = make_tokenizer(
        "{\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\"}, {\"type\": "
        "\"ByteFallback\"}]}, \"model\": "
        "{\"type\": \"BPE\", \"vocab\": {\"<s>\": 0, \"\\u2581Once\": 1, \"\\u2581upon\": 2, \"<0x0A>\": 3, "
        "\"<0xC3>\": 4, \"<0xA9>\": 5, "
        "\"\\u00e9t\": 6, \"<0x4>\": 7}}, \"added_tokens\": [{\"id\": 0, \"content\": \"<s>\", \"special\": true}]}",
        "{\"eos_token_id\": [2, 7, 9]}", 8);
    int d[] = {0, 1, 2, 3, 4, 5, 6, 7}, e[] = {1, 1}, f[] = {0, 2, 2};
    check_printed(t, "SentencePiece pieces with byte fallback", d, 8, "Once upon\n\xC3\xA9\xC3\xA9t<0x4>", 20);
    check_printed(t, "SentencePiece: no space before the first word", e, 2, "Once Once", 9);
    check_printed(t, "SentencePiece: nor after a begin-of-sequence token", f, 3, "upon upon", 9);
    check(t->num_eos == 3 && t->eos[0] == 2 && t->eos[2] == 9, "a list of end-of-sequence tokens");
    tokenizer_close(t);

    t = make_tokenizer(
        "{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"<unk>\", 0.0], [\"\\u2581a\", -1.5], [\"b\", -2]]}}", "{}",
        3);
    int g[] = {1, 2, 1};
    check_printed(t, "a Unigram vocabulary", g, 3, "ab a", 4);
    tokenizer_close(t);
    t = make_tokenizer(NULL, "{\"eos_token_id\": null}", 256);
    int h[] = {72, 105, 200, 10};
    check_printed(t, "without tokenizer.json tokens are bytes", h, 4, "Hi\xEF\xBF\xBD\n", 6);
    check(t->num_eos == 0, "no end-of-sequence token");
    tokenizer_close(t);
    write_text(temp("tokenizer/generation_config.json"), "{\"eos_token_id\": 3}");
    write_text(temp("tokenizer/config.json"), "{\"eos_token_id\": 4}");
    t = tokenizer_open(temp("tokenizer"), 256);
    check(t->num_eos == 1 && t->eos[0] == 3, "generation_config.json comes before config.json");
    tokenizer_close(t);
    t = make_tokenizer("{\"model\": {\"vocab\": {\"a\": -1, \"b\": 1e300, \"c\": 2, \"d\": 0.5}}}",
                       "{\"eos_token_id\": 1e300}", 3);
    int i[] = {2};
    check_printed(t, "numbers that are no token are left out", i, 1, "c", 1);
    tokenizer_close(t);
}

// Generation stops at the end-of-sequence token, and otherwise after so many tokens.
static void test_generation(void) {
    const char* dir = "dev/reference/golden/qwen3_moe";
    int ids[64] = {1, 2, 3}, again[64] = {1, 2, 3}, V;
    Model* m = open_model(dir, FOR_SCORING, 1, 32);
    Model* g = keep_model(model_create(&m->config, FOR_GENERATION, 1, 32, 32, m));
    Tokenizer* t = tokenizer_open(dir, V = m->config.vocab_size);
    Sampling greedy = {0, 1, 0, 1}, random = {1, 0.95, 20, 5};
    FILE* nowhere = fopen("/dev/null", "w");
    check(generate(g, t, ids, 3, 20, &greedy, nowhere) == 20, "generates as many tokens as asked for");
    model_forward(m, ids, NULL, 1, 23);
    int greatest = 1;
    for (int n = 2; n < 22; n++)
        for (int v = 0; v < V; v++) greatest &= m->logits[n * V + ids[n + 1]] >= m->logits[n * V + v];
    check(greatest, "greedy tokens have the largest logits of a whole forward pass");
    t->eos[t->num_eos++] = ids[9];
    int before = 0;
    while (ids[3 + before] != ids[9]) before++;
    check(generate(g, t, again, 3, 20, &greedy, nowhere) == before &&
              !memcmp(ids, again, sizeof(int) * (size_t)(3 + before)),
          "stops before the end-of-sequence token, after %d", before);
    t->num_eos = 0;
    generate(g, t, ids, 3, 28, &random, nowhere);
    generate(g, t, again, 3, 28, &random, nowhere);
    int same = !memcmp(ids, again, sizeof(int) * 31);
    random.seed = 6;
    generate(g, t, again, 3, 28, &random, nowhere);
    check(same && memcmp(ids, again, sizeof(int) * 31), "the same seed gives the same text, another seed another one");
    fclose(nowhere);
    tokenizer_close(t);
}

static void test_sampling(void) {
    test_draws();
    test_tokenizers();
    test_generation();
}
