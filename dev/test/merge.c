/*
merge.c: what makes a mixture smaller: scores that experts stay by, and merging, against fp64 references.
*/
// {}/reference.bin: the tokens of a golden model's reference as a shard of B windows of T; its calibration options
static const char* merge_calibration(const char* model) {
    static char options[128];
    char path[PATH_SIZE];
    Error error = {""};
    SafeTensors* s = keep_file(safetensors_open(join_path(path, model, "reference.safetensors"), &error));
    long shape[2];
    int *tokens = reference_ints(s, "tokens", shape), *targets = reference_ints(s, "targets", NULL);
    long n = shape[0] * shape[1];
    int* stream = kept_ints(n + 1);
    memcpy(stream, tokens, sizeof(int) * (size_t)n);
    stream[n] = targets[n - 1];
    up_make_shard("reference.bin", stream, (int)n + 1);
    snprintf(options, sizeof options, "--calibrate {}/reference.bin --calibrate-batches 1 --batch %ld --seq %ld",
             shape[0], shape[1]);
    return options;
}

// item `key` of the n-th sparse layer of a receipt against a tensor of the reference: the largest relative error
static double merge_listed(const char* dir, const char* key, int n, const float* expected, long count) {
    const Json* list = json_get(json_get(up_receipt(up_path(dir)), "layers")->items[n], key);
    double worst = list && list->count == count ? 0 : INFINITY;
    for (long i = 0; i < count && worst < 1; i++)
        worst = larger(worst, fabs(list->items[i]->number - expected[i]) / larger(1e-30, fabs(expected[i])));
    return worst;
}

static double merge_loss(const char* dir) {
    run_program("--eval --model %s --data LICENSE --seq 32", up_path(dir));
    const char* at = strstr(ran.out, "loss ");
    return at ? atof(at + 5) : NAN;
}

static void test_up_merge_values(void) {
    static const struct {
        const char* name;
        int M;
    } models[] = {{"qwen3_moe", 3}, {"olmoe", 4}, {"mixtral", 3}, {"dots1", 2}};
    static const char* scores[] = {"reap", "man", "msan"};
    static const char* matrices[][3] = {{"gate_proj", "up_proj", "down_proj"}, {"w1", "w3", "w2"}};
    up_begin();
    Error error = {""};
    SafeTensors* s = keep_file(safetensors_open("dev/reference/shrinking.safetensors", &error));
    for (EACH(i, models)) {
        char model[PATH_SIZE], name[160];
        snprintf(model, sizeof model, GOLDEN "%s", models[i].name);
        const char* calibration = merge_calibration(model);
        Config c;
        config_read(&c, model, &error);
        for (EACH(k, scores))
            UP("%s {}/%s%zu --experts %d --select %s %s", model, scores[k], i, models[i].M, scores[k], calibration);
        UP("%s {}/spectral%zu --experts %d --method merge %s", model, i, models[i].M, calibration);
        UP("%s {}/cores%zu --experts %d --method merge --group cores %s", model, i, models[i].M, calibration);
        double worst_score = 0, worst_weight = 0;
        int grouped = 1;
        for (int l = 0, n = 0; l < c.num_layers; l++) {
            if (!c.sparse[l]) continue;
            long count;
            char made[32];
            for (EACH(k, scores)) {
                snprintf(name, sizeof name, "%s.%d.%s", models[i].name, l, scores[k]);
                float* expected = reference_floats(s, name, &count);
                snprintf(made, sizeof made, "%s%zu", scores[k], i);
                worst_score = larger(worst_score, merge_listed(made, "score", n, expected, count));
            }
            for (int way = 0; way < 2; way++) {
                snprintf(made, sizeof made, "%s%zu", way ? "cores" : "spectral", i);
                snprintf(name, sizeof name, "%s.%d.%s", models[i].name, l, way ? "cores" : "spectral");
                int* groups = reference_ints(s, name, NULL);
                float* expected = kept_floats(c.num_experts);
                for (int e = 0; e < c.num_experts; e++) expected[e] = (float)groups[e];
                grouped &= merge_listed(made, "group", n, expected, c.num_experts) == 0;
            }
            snprintf(made, sizeof made, "spectral%zu", i);
            for (int matrix = 0; matrix < 3; matrix++) {
                static const char* kinds[] = {"gate", "up", "down"};
                snprintf(name, sizeof name, "%s.%d.%s", models[i].name, l, kinds[matrix]);
                float* expected = reference_floats(s, name, &count);
                long size = count / models[i].M;
                for (int j = 0; j < models[i].M; j++) {
                    snprintf(name, sizeof name, "model.layers.%d.%s.experts.%d.%s.weight", l,
                             c.arch == MIXTRAL ? "block_sparse_moe" : "mlp", j, matrices[c.arch == MIXTRAL][matrix]);
                    float* got = up_tensor(up_path(made), name, NULL);
                    worst_weight = larger(worst_weight, relative_error(got, expected + j * size, size));
                }
            }
            n++;
        }
        check(worst_score < 2e-6, "%s: reap, man and msan against fp64: %.1e", models[i].name, worst_score);
        check(grouped, "%s: spectral groups and groups round cores", models[i].name);
        check(worst_weight < 1e-6, "%s: merged experts against fp64: %.1e", models[i].name, worst_weight);
    }
}

// Growth by copies, undone: every byte of the source, whatever its format, router and number of copies of each expert.
static void test_up_merge_back(void) {
    up_begin();
    up_make("m5", QWEN3_MOE, 2, 24, 40, 5, 2, 1, 5);
    up_make_random_shard("random.bin", 3000, 29);
    UP("{}/m5 {}/half --experts 5 --dtype bf16");
    static const struct {
        const char *source, *grow, *back;
    } cases[] = {{"{}/m5", "--experts 10", "--experts 5"},
                 {"{}/m5", "--experts 13 --select weight", "--experts 5"},
                 {"{}/half", "--experts 15 --topk 6", "--experts 5 --topk 2"},
                 {GOLDEN "mixtral_top1", "--experts 10", "--experts 5"},
                 {GOLDEN "dots1", "--experts 12 --router copy", "--experts 6"},
                 {VARIANTS "logit_norm", "--experts 12", "--experts 6"},
                 {VARIANTS "lpr", "--experts 8", "--experts 4"}};
    for (EACH(i, cases)) {
        static const char* names[] = {"grown", "same", "back"};
        char at[3][PATH_SIZE], options[128];
        for (int k = 0; k < 3; k++) snprintf(at[k], PATH_SIZE, "{}/%s%zu", names[k], i);
        snprintf(options, sizeof options, "--calibrate {}/random.bin --calibrate-batches 2 --batch 2 --seq 24");
        UP("%s %s %s", cases[i].source, at[0], cases[i].grow);
        UP("%s %s --method merge %s %s", at[0], at[2], cases[i].back, options);
        UP("%s %s %s", cases[i].source, at[1], cases[i].back); // written by upcycle, but with nothing added
        for (int k = 1; k < 3; k++) snprintf(at[k], PATH_SIZE, "%s/%s%zu/model.safetensors", up_dir, names[k], i);
        check(same_file(at[1], at[2]), "%s, %s, merged again: every byte", cases[i].source, cases[i].grow);
        for (int k = 1; k < 3; k++) snprintf(at[k], PATH_SIZE, "%s/%s%zu/config.json", up_dir, names[k], i);
        check(same_file(at[1], at[2]), "%s, %s: and its config.json", cases[i].source, cases[i].grow);
    }
}

// Grown by copies, trained for a while, merged: the loss lies between the source's and that of what was merged.
static void test_up_merge_trained(void) {
    up_begin();
    const char* run = "--data LICENSE --steps 40 --batch 4 --seq 32 --lr 0.003";
    run_program("%s --out %s --layers 2 --hidden 32 --experts 4", run, up_path("source"));
    UP("{}/source {}/grown --experts 8");
    run_program("%s --model %s --out %s", run, up_path("grown"), up_path("trained"));
    UP("{}/trained {}/merged --experts 4 --method merge --calibrate LICENSE --calibrate-batches 3 --seq 32");
    check(strstr(up_output, "each the mean of a group") != NULL, "the receipt says what became of the function");
    check(up_list_is(up_path("merged"), "group", 0, "0 1 2 3 0 1 2 3"), "twins find each other");
    double source = merge_loss("source"), merged = merge_loss("merged"), trained = merge_loss("trained");
    check(trained < merged && merged < source, "loss %.4f; of more experts %.4f; merged %.4f", source, trained, merged);
    static const struct {
        const char *arguments, *says;
    } refused[] = {{"--experts 8 --method merge --calibrate LICENSE", "makes fewer experts of the 8"},
                   {"--experts 4 --method merge", "--method merge wants --calibrate"},
                   {"--experts 4 --select reap", "--select reap wants --calibrate"},
                   {"--experts 16 --select man", "DST is not smaller"},
                   {"--experts 4 --method merge --select reap --calibrate LICENSE", "by their load"},
                   {"--experts 4 --select load --group cores --calibrate LICENSE", "belongs to --method merge"},
                   {"--experts 4 --method merge --prune-weights 0.5 --calibrate LICENSE", "seen none"},
                   {"--experts 4 --method merge --optimizer copy --calibrate LICENSE", "moments could go with"},
                   {"--experts 4 --method merge --router noise --calibrate LICENSE", "is for copies"}};
    for (EACH(i, refused)) {
        int code = up_run("", "{}/trained {}/x %s", refused[i].arguments), lines = 0;
        for (const char* s = up_output; *s; s++) lines += *s == '\n';
        check(code == 2 && lines == 1 && strstr(up_output, refused[i].says) && access(up_path("x"), F_OK), "%s: %.90s",
              refused[i].arguments, up_output);
    }
}

// Domain masks: each row of the reference's tokens is a text, whose most active units make an expert.
static void test_up_domains(void) {
    up_begin();
    char path[PATH_SIZE], name[96];
    long shape[2], n;
    Error error = {""};
    SafeTensors* s = keep_file(safetensors_open("dev/reference/shrinking.safetensors", &error));
    SafeTensors* r = keep_file(safetensors_open(join_path(path, GOLDEN "qwen3", "reference.safetensors"), &error));
    int *tokens = reference_ints(r, "tokens", shape), B = (int)shape[0], T = (int)shape[1];
    Text texts = {NULL, 0, 0};
    for (int b = 0; b < B; b++) {
        snprintf(name, sizeof name, "text%d.bin", b);
        int* text = kept_ints(T + 1);
        memcpy(text, tokens + b * T, sizeof(int) * (size_t)T);
        text[T] = 0; // a target
        up_make_shard(name, text, T + 1);
        text_print(&texts, "%s{}/%s", b ? "," : "", name);
    }
    UP(GOLDEN "qwen3 {}/domains --experts %d --method domains --calibrate %s --calibrate-batches 1 --batch 1 --seq %d",
       B, texts.data, T);
    free(texts.data);
    check(strstr(up_output, "every expert holds 50 % of the FFN's units") != NULL, "the receipt of domains");
    int right = 1;
    for (int l = 0; l < 3; l++) {
        snprintf(name, sizeof name, "qwen3.%d.units", l);
        int *units = reference_ints(s, name, shape), width = (int)shape[1];
        for (int m = 0; m < 3; m++)
            for (int j = 0; j < B; j++) {
                static const char* projections[] = {"gate_proj", "up_proj", "down_proj"};
                snprintf(name, sizeof name, "model.layers.%d.mlp.%s.weight", l, projections[m]);
                float* all = up_tensor(GOLDEN "qwen3", name, &n);
                snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s.weight", l, j, projections[m]);
                long count, I = 0, H;
                float* part = up_tensor(up_path("domains"), name, &count);
                H = count / width, I = n / H;
                for (long u = 0; u < width; u++)
                    for (long h = 0, from = units[j * width + u]; h < H; h++)
                        right &= m == 2 ? part[h * width + u] == all[h * I + from]
                                        : part[u * H + h] == all[from * H + h];
            }
    }
    check(right, "domains: the most active half of the units of each text, in gate, up and down");
}

static void test_up_merge(void) {
    test_up_domains();
    test_up_merge_values();
    test_up_merge_back();
    test_up_merge_trained();
}
