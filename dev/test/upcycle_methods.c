/*
upcycle_methods.c: which expert comes from which, what each method makes of it, and when the function is kept.
*/
static int up_counts_are(const int* counts, int n, const char* expected) {
    Text t = {NULL, 0, 0};
    for (int i = 0; i < n; i++) text_print(&t, "%s%d", i ? "," : "", counts[i]);
    int same = !strcmp(t.data, expected);
    if (!same) printf("       found %s, expected %s\n", t.data, expected);
    free(t.data);
    return same;
}

// The paper's examples, and what follows from the rules.
static void test_up_allocation(void) {
    up_begin();
    double falling[8] = {8, 7, 6, 5, 4, 3, 2, 1}, mixed[4] = {1, 9, 9, 3};
    int counts[16], source[32], copy[32];
    allocate_greedy(counts, falling, 8, 16, 3);
    check(up_counts_are(counts, 8, "4,4,3,1,1,1,1,1"), "greedy, m = 2, cap 3, E = 8");
    allocate_greedy(counts, falling, 8, 24, 3);
    check(up_counts_are(counts, 8, "4,4,4,4,4,2,1,1"), "greedy, m = 3");
    allocate_greedy(counts, falling, 8, 8 + 24 + 4, 3);
    check(up_counts_are(counts, 8, "7,5,4,4,4,4,4,4"), "greedy starts over when all are at their cap");
    allocate_greedy(counts, mixed, 4, 7, 2);
    check(up_counts_are(counts, 4, "1,3,2,1"), "greedy, equal scores: the lower index first");
    allocate_uniform(counts, 5, 13);
    check(up_counts_are(counts, 5, "3,3,3,2,2"), "uniform, no multiple: the rest to the lowest indices");
    int given[3] = {3, 1, 2};
    place_copies(source, copy, given, 3, 6);
    check(up_counts_are(source, 6, "0,1,2,0,2,0") && up_counts_are(copy, 6, "0,0,0,1,1,2"),
          "copies by copy number, then source");
    double far[4] = {0, 0, 0, 1000};
    long total[4] = {0, 0, 0, 0};
    int within = 1;
    for (int i = 0; i < 2000; i++) {
        allocate_sample(counts, far, 4, 8, 3, mix64((uint64_t)i));
        int sum = 0;
        for (int e = 0; e < 4; e++) {
            within &= counts[e] >= 1 && counts[e] <= 4;
            total[e] += counts[e] - 1;
            sum += counts[e];
        }
        within &= sum == 8;
    }
    // z-scores -.577 three times and 1.732: weights .5616 and 5.652, the chance of the best in the first draw .770
    check(within, "sample: between 1 and cap + 1, N in all");
    check(total[3] > 2.0 * 2000 && total[0] > 300 && total[1] > 300,
          "sample: the best most often, others too: %ld %ld %ld %ld", total[0], total[1], total[2], total[3]);
    double mean = (total[0] + total[1] + total[2]) / 3.0;
    check(fabs(total[0] / mean - 1) < 0.12 && fabs(total[1] / mean - 1) < 0.12,
          "sample: equal scores, equal chances, also beside one at its cap");
    allocate_sample(counts, far, 4, 4 + 12, 3, 1);
    check(up_counts_are(counts, 4, "4,4,4,4"), "sample: all at their cap");
    double keep[5] = {3, 1, 4, 1, 5};
    keep_best(source, keep, 5, 3);
    check(up_counts_are(source, 3, "0,2,4"), "the best three of five, in their order");
}

// Dense to MoE, copy: the function is kept, experts are the FFN bit for bit, everything else as it was.
static void test_up_copy(void) {
    up_begin();
    static const char* models[] = {"llama", "llama_tied", "mistral", "qwen3"};
    for (int i = 0; i < 4; i++) {
        char source[PATH_SIZE], result[PATH_SIZE];
        snprintf(source, sizeof source, GOLDEN "%s", models[i]);
        snprintf(result, sizeof result, "%s/copy_%s", up_dir, models[i]);
        UP("%s {}/copy_%s --experts 5 --topk 3", source, models[i]);
        double e = up_change(source, 0, result);
        check(e <= 1e-6, "%s: logits change by %.1e", models[i], e);
        check(up_same(source, "model.embed_tokens.weight", result, "model.embed_tokens.weight") &&
                  up_same(source, "model.layers.1.self_attn.o_proj.weight", result,
                          "model.layers.1.self_attn.o_proj.weight"),
              "%s: other tensors are as they were", models[i]);
    }
    const char* r = up_path("copy_llama");
    check(up_same(GOLDEN "llama", "model.layers.1.mlp.gate_proj.weight", r,
                  "model.layers.1.block_sparse_moe.experts.4.w1.weight") &&
              up_same(GOLDEN "llama", "model.layers.1.mlp.up_proj.weight", r,
                      "model.layers.1.block_sparse_moe.experts.0.w3.weight") &&
              up_same(GOLDEN "llama", "model.layers.0.mlp.down_proj.weight", r,
                      "model.layers.0.block_sparse_moe.experts.2.w2.weight"),
          "Mixtral: w1, w3, w2 are gate, up, down");
    check(up_list_is(r, "source", 1, "0 0 0 0 0") && up_list_is(r, "family", 0, "0 0 0 0 0"), "the receipt's lineage");
    UP(GOLDEN "qwen3 {}/mixed --experts 4 --layers every-2 --norm-topk 1");
    double e = up_change(GOLDEN "qwen3", 0, up_path("mixed"));
    Config c;
    Error error = {""};
    check(
        config_read(&c, up_path("mixed"), &error) && !c.sparse[0] && c.sparse[1] && !c.sparse[2] && c.arch == QWEN3_MOE,
        "every-2: layer 1 of 3 is sparse");
    check(e <= 1e-6, "every-2: logits change by %.1e", e);
    UP(GOLDEN "qwen3 {}/listed --experts 4 --layers 0,2-2");
    check(config_read(&c, up_path("listed"), &error) && c.sparse[0] && !c.sparse[1] && c.sparse[2] &&
              up_change(GOLDEN "qwen3", 0, up_path("listed")) <= 1e-6,
          "a list of layers");
    // router rows: mean 0, the given standard deviation, different in every layer and row
    up_make("dense", QWEN3, 2, 64, 96, 0, 0, 0, 1);
    for (int kind = 0; kind < 3; kind++) {
        static const char* kinds[] = {"normal", "uniform", "zero"};
        char name[32];
        long n;
        snprintf(name, sizeof name, "rows_%s", kinds[kind]);
        UP("{}/dense {}/%s --experts 64 --router-init %s --router-std 0.1", name, kinds[kind]);
        float* w = up_tensor(up_path(name), "model.layers.1.mlp.gate.weight", &n);
        double sum = 0, squares = 0, fourth = 0, largest = 0;
        for (long i = 0; i < n; i++) {
            sum += w[i];
            squares += (double)w[i] * w[i];
            fourth += pow(w[i], 4);
            largest = larger(largest, fabs(w[i]));
        }
        double std = sqrt(squares / n), kurtosis = kind < 2 ? fourth / n / pow(std, 4) : 0;
        check(n == 64 * 64 && fabs(sum / n) < 0.006 && (kind == 2 ? largest == 0 : fabs(std - 0.1) < 0.004) &&
                  (kind == 0   ? fabs(kurtosis - 3) < 0.4
                   : kind == 1 ? fabs(kurtosis - 1.8) < 0.1 && largest <= 0.1 * sqrt(3.0)
                               : 1),
              "router rows %s: std %.4f, kurtosis %.2f", kinds[kind], std, kurtosis);
    }
    check(!up_same(up_path("rows_normal"), "model.layers.0.mlp.gate.weight", up_path("rows_normal"),
                   "model.layers.1.mlp.gate.weight"),
          "layers draw different rows");
}

// Which units of matrix `matrix` of two (I, H) or (H, I) tensors differ.
static int up_changed_units(const float* a, const float* b, int H, int I, int down, char* changed) {
    int count = 0;
    for (int u = 0; u < I; u++) {
        int differ = 0;
        for (int i = 0; i < H; i++)
            differ += down ? a[(long)i * I + u] != b[(long)i * I + u] : a[(long)u * H + i] != b[(long)u * H + i];
        changed[u] = differ > 0;
        count += differ > 0;
        if (differ > 0 && differ < H) count += 10000;        // units change as a whole
    }
    return count;
}

static void up_statistics(const float* w, int H, int I, int down, const char* marked, double* mean, double* std) {
    double sum = 0, squares = 0;
    long n = 0;
    for (int u = 0; u < I; u++)
        for (int i = 0; i < H && marked[u]; i++, n++) sum += down ? w[(long)i * I + u] : w[(long)u * H + i];
    *mean = sum / n;
    for (int u = 0; u < I; u++)
        for (int i = 0; i < H && marked[u]; i++)
            squares += pow((down ? w[(long)i * I + u] : w[(long)u * H + i]) - *mean, 2);
    *std = sqrt(squares / (n - 1));
}

// Drop-Upcycling: |S| = floor(r I) units, the same or different ones in the three matrices, with the statistics of what
// they replace; everything else bit for bit. And the noises.
static void test_up_drop(void) {
    up_begin();
    static const char* projections[] = {"gate_proj", "up_proj", "down_proj"};
    int H = 64, I = 96, expected = 33;          // floor(0.35 * 96) = 33
    up_make("dense", QWEN3, 2, H, I, 0, 0, 0, 1);
    for (int mode = 0; mode < 4; mode++) {      // drop shared, drop per-matrix, noise, MoE drop
        static const char* options[] = {
            "--method drop --drop-ratio 0.35", "--method drop --drop-ratio 0.35 --drop-indices per-matrix",
            "--method noise --noise-fraction 0.35 --noise-std 0.07", "--method drop --drop-ratio 0.35"};
        char name[32], changed[3][2][96], source_name[96], result_name[96];
        int right = 1, same_set = 1, experts_differ = 0;
        double worst_mean = 0, worst_std = 0;
        snprintf(name, sizeof name, "drop%d", mode);
        if (mode == 3) up_make("moe", QWEN3_MOE, 2, H, I, 2, 1, 1, 4);
        UP("{}/%s {}/%s --experts 4 %s", mode == 3 ? "moe" : "dense", name, options[mode]);
        for (int j = 2; j < 4; j++)
            for (int m = 0; m < 3; m++) {
                long n;
                if (mode == 3)
                    snprintf(source_name, sizeof source_name, "model.layers.1.mlp.experts.%d.%s.weight", j - 2,
                             projections[m]);
                else snprintf(source_name, sizeof source_name, "model.layers.1.mlp.%s.weight", projections[m]);
                snprintf(result_name, sizeof result_name, "model.layers.1.mlp.experts.%d.%s.weight", j, projections[m]);
                float *a = up_tensor(up_path(mode == 3 ? "moe" : "dense"), source_name, &n),
                      *b = up_tensor(up_path(name), result_name, NULL);
                int count = up_changed_units(a, b, H, I, m == 2, changed[m][j - 2]);
                right &= count == expected;
                if (mode != 1) same_set &= !memcmp(changed[0][j - 2], changed[m][j - 2], (size_t)I);
                double mean_a, std_a, mean_b, std_b;
                if (mode == 2)
                    for (long i = 0; i < n; i++) b[i] -= a[i];
                up_statistics(a, H, I, m == 2, changed[m][j - 2], &mean_a, &std_a);
                up_statistics(b, H, I, m == 2, changed[m][j - 2], &mean_b, &std_b);
                if (mode == 2) {
                    mean_a = 0;
                    std_a = 0.07;
                }
                worst_mean = larger(worst_mean, fabs(mean_b - mean_a) / std_a);
                worst_std = larger(worst_std, fabs(std_b / std_a - 1));
            }
        experts_differ = memcmp(changed[0][0], changed[0][1], (size_t)I) != 0;
        if (mode == 1)
            same_set =
                memcmp(changed[0][0], changed[1][0], (size_t)I) && memcmp(changed[1][0], changed[2][0], (size_t)I);
        check(right, "%s: floor(r I) = %d whole units change", options[mode], expected);
        check(same_set, "%s: %s", options[mode],
              mode == 1 ? "every matrix has its own units" : "the same units in the three matrices");
        check(experts_differ, "%s: every expert has its own units", options[mode]);
        // 33 * 64 draws: the mean is within 5 / sqrt(2112) of std, the std within 5 / sqrt(2 * 2112)
        check(worst_mean < 0.11 && worst_std < 0.077, "%s: new numbers: mean %.3f std away, std %.3f", options[mode],
              worst_mean, worst_std);
    }
    check(up_same(up_path("moe"), "model.layers.0.mlp.experts.1.up_proj.weight", up_path("drop3"),
                  "model.layers.0.mlp.experts.1.up_proj.weight"),
          "MoE drop: originals stay");
    UP("{}/dense {}/replace --experts 2 --method noise-replace --noise-fraction 0.25 --noise-std 0.02");
    long n, changed = 0, outside = 0;
    float *a = up_tensor(up_path("dense"), "model.layers.0.mlp.up_proj.weight", &n),
          *b = up_tensor(up_path("replace"), "model.layers.0.mlp.experts.1.up_proj.weight", NULL);
    double squares = 0;
    for (long i = 0; i < n; i++)
        if (a[i] != b[i]) {
            changed++;
            squares += (double)b[i] * b[i];
            outside += fabs(b[i]) > 0.11;
        }
    check(fabs((double)changed / n - 0.25) < 0.03 && fabs(sqrt(squares / changed) - 0.02) < 0.002 && !outside,
          "noise-replace: %.3f of single weights, std %.4f", (double)changed / n, sqrt(squares / changed));
    UP("{}/dense {}/zero --experts 2 --method drop --drop-ratio 0 --router-init normal");
    check(up_change(up_path("dense"), 0, up_path("zero")) <= 1e-6, "drop 0 is copy");
    UP("{}/dense {}/new --experts 2 --method random --noise-std 0.03");
    a = up_tensor(up_path("new"), "model.layers.0.mlp.experts.1.down_proj.weight", &n);
    double std = sqrt(sum_of_squares(a, n) / n);
    check(fabs(std - 0.03) < 0.002 && up_listed(up_path("new"), "source", 0, 1) == -1, "random: std %.4f, no source",
          std);
}

// Granular: shards of consecutive units, router rows repeated in each group, down scaled; exact at K = G and K = 2 G.
static void test_up_shards(void) {
    up_begin();
    int H = 64, I = 96, G = 4, width = 24;
    up_make("dense", QWEN3, 2, H, I, 0, 0, 0, 1);
    for (int k = 1; k <= 2; k++) {
        char name[16];
        snprintf(name, sizeof name, "gran%d", k);
        UP("{}/dense {}/%s --experts 12 --method granular --granularity 4 --topk %d --router-std 1", name, k * G);
        double e = up_change(up_path("dense"), 0, up_path(name));
        check(e <= 1e-6, "granular exact, K = %d: logits change by %.1e", k * G, e);
    }
    long n;
    float *gate = up_tensor(up_path("dense"), "model.layers.1.mlp.gate_proj.weight", NULL),
          *down = up_tensor(up_path("dense"), "model.layers.1.mlp.down_proj.weight", NULL);
    float *rows = up_tensor(up_path("gran1"), "model.layers.1.mlp.gate.weight", &n);
    int right = 1, repeated = n == 12L * H;
    for (int j = 0; j < 12; j++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.gate_proj.weight", j);
        float* g = up_tensor(up_path("gran1"), name, &n);
        right &= n == (long)width * H && same_floats(g, gate + (long)(j % G) * width * H, n);
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.down_proj.weight", j);
        float* d = up_tensor(up_path("gran1"), name, &n);
        for (int i = 0; i < H; i++)
            for (int u = 0; u < width; u++) right &= d[i * width + u] == 4 * down[i * I + j % G * width + u];
        repeated &= same_floats(rows + (long)j * H, rows + (long)(j / G * G) * H, H);
        if (j >= G) repeated &= memcmp(rows + (long)j * H, rows + (long)(j - G) * H, floats_bytes(H)) != 0;
    }
    check(right, "granular: gate is cut, down is cut and multiplied by G");
    check(repeated, "granular: one router row for each group");
    UP("{}/dense {}/cube --experts 8 --method granular --granularity 4 --scale cuberoot --norm-topk 0");
    // without renormalisation s = E G^2 / K, E groups: 2 * 16 / 4 = 8, the cube root 2
    float *g = up_tensor(up_path("cube"), "model.layers.1.mlp.experts.6.gate_proj.weight", &n),
          *d = up_tensor(up_path("cube"), "model.layers.1.mlp.experts.6.down_proj.weight", NULL);
    double worst = 0;
    for (long i = 0; i < n; i++) worst = larger(worst, fabs(g[i] - 2 * gate[2L * width * H + i]));
    for (int i = 0; i < H; i++)
        for (int u = 0; u < width; u++) worst = larger(worst, fabs(d[i * width + u] - 2 * down[i * I + 2 * width + u]));
    check(worst < 1e-5, "granular cuberoot: each matrix times 2, largest error %.1e", worst);
    UP("{}/dense {}/gzero --experts 8 --method granular --granularity 4 --norm-topk 0 --topk 8 --router-init zero");
    check(up_change(up_path("dense"), 0, up_path("gzero")) <= 1e-6,
          "granular, not renormalised: exact with a zero router");
    for (int norm = 0; norm < 2; norm++) {
        char name[16];
        snprintf(name, sizeof name, "part%d", norm);
        UP("{}/dense {}/%s --experts 6 --topk 6 --method partition --router-init zero --norm-topk %d", name, norm);
        double e = up_change(up_path("dense"), 0, up_path(name));
        check(e <= 1e-6, "partition, K = E, norm_topk %d, zero router: logits change by %.1e", norm, e);
    }
    // every unit is in one shard, and not just cut in order
    int seen[96] = {0}, moved = 0;
    for (int j = 0; j < 6; j++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.gate_proj.weight", j);
        float* shard = up_tensor(up_path("part1"), name, &n);
        for (int u = 0; u < 16; u++)
            for (int s = 0; s < I; s++)
                if (same_floats(shard + u * H, gate + (long)s * H, H)) {
                    seen[s]++;
                    moved += s != j * 16 + u;
                }
    }
    int once = 1;
    for (int s = 0; s < I; s++) once &= seen[s] == 1;
    check(once && moved > 48, "partition: every unit once, %d of %d elsewhere", moved, I);
    // shards with units drawn anew, from what they replace, in both copies of a shard others; the same in all matrices
    UP("{}/dense {}/both --experts 8 --method granular --granularity 4 --drop-ratio 0.25");
    check(strstr(up_output, "25 % of the units of every shard") != NULL, "the receipt says so");
    UP("{}/dense {}/whole --experts 8 --method granular --granularity 4");
    char changed[3][8][24];
    double worst_mean = 0, worst_std = 0, mean[2], std[2];
    int count = 0;
    for (int m = 0; m < 3; m++)
        for (int j = 0; j < 8; j++) {
            static const char* projections[] = {"gate_proj", "up_proj", "down_proj"};
            float *x = up_expert("whole", j, projections[m]), *y = up_expert("both", j, projections[m]);
            count += up_changed_units(x, y, H, width, m == 2, changed[m][j]);
            up_statistics(x, H, width, m == 2, changed[m][j], &mean[0], &std[0]);
            up_statistics(y, H, width, m == 2, changed[m][j], &mean[1], &std[1]);
            worst_mean = larger(worst_mean, fabs(mean[1] - mean[0]) / std[0]);
            worst_std = larger(worst_std, fabs(std[1] / std[0] - 1));
        }
    check(count == 3 * 8 * 6 && !memcmp(changed[0], changed[1], 192) && !memcmp(changed[0], changed[2], 192) &&
              memcmp(changed[0][1], changed[0][5], 24) && worst_mean < 0.26 && worst_std < 0.18,
          "granular and drop: a quarter of each shard's units, mean %.2f std away, std %.2f", worst_mean, worst_std);
}

// Branch-Train-MiX: expert i from source i, everything else the mean.
static void test_up_sources(void) {
    up_begin();
    up_make("s0", LLAMA, 2, 32, 48, 0, 0, 0, 1);
    up_make("s1", LLAMA, 2, 32, 48, 0, 0, 0, 2);
    up_make("s2", LLAMA, 2, 32, 48, 0, 0, 0, 3);
    UP("{}/s0 {}/btm --experts 5 --sources {}/s1,{}/s2");
    check(up_same(up_path("s2"), "model.layers.0.mlp.up_proj.weight", up_path("btm"),
                  "model.layers.0.block_sparse_moe.experts.2.w3.weight") &&
              up_same(up_path("s1"), "model.layers.1.mlp.down_proj.weight", up_path("btm"),
                      "model.layers.1.block_sparse_moe.experts.4.w2.weight") &&
              up_same(up_path("s0"), "model.layers.1.mlp.gate_proj.weight", up_path("btm"),
                      "model.layers.1.block_sparse_moe.experts.3.w1.weight"),
          "expert i is the FFN of source i mod 3");
    long n;
    float *mean = up_tensor(up_path("btm"), "model.layers.1.self_attn.q_proj.weight", &n), *x[3];
    static const char* names[] = {"s0", "s1", "s2"};
    double worst = 0;
    for (int i = 0; i < 3; i++) x[i] = up_tensor(up_path(names[i]), "model.layers.1.self_attn.q_proj.weight", NULL);
    for (long i = 0; i < n; i++) worst = larger(worst, fabs(mean[i] - (x[0][i] + x[1][i] + x[2][i]) / 3));
    check(worst < 1e-7, "attention is the mean of three, largest error %.1e", worst);
    check(up_list_is(up_path("btm"), "source", 0, "0 1 2 0 1"), "lineage names the sources");
    // --rest base, and what forbids a mean: the FFNs are the same as before, all else is SRC's
    up_make("mistral", MISTRAL, 2, 32, 48, 0, 0, 0, 2);
    const char* tests[] = {"--sources {}/s1 --rest base", "--sources {}/more", "--sources {}/mistral --rest base"};
    Config c;
    Error error = {""};
    if (!config_read(&c, up_path("s1"), &error)) die(1, "%s", error.text);
    c.vocab_size = 258;
    Model* m = new_model(&c, FOR_TRAINING, 1, 4);
    model_init(m, 1);
    mkdir(up_path("more"), 0777);
    if (checkpoint_save(m, up_path("more"), 7)) die(1, "a model with two more tokens");
    for (EACH(i, tests)) {
        UP("{}/s0 {}/base --experts 2 --force %s", tests[i]);
        check(strstr(up_output, "everything else is SRC's") != NULL, "%s: said", tests[i]);
        check(up_same(up_path("s0"), "model.embed_tokens.weight", up_path("base"), "model.embed_tokens.weight") &&
                  up_same(up_path("s0"), "model.layers.1.self_attn.q_proj.weight", up_path("base"),
                          "model.layers.1.self_attn.q_proj.weight") &&
                  up_same(up_path(i == 1 ? "more" : "s1"), "model.layers.1.mlp.down_proj.weight", up_path("base"),
                          "model.layers.1.block_sparse_moe.experts.1.w2.weight"),
              "%s: FFNs from each, all else from SRC", tests[i]);
    }
    check(strstr(up_output, "vocab_size") == NULL && up_run("", "{}/s0 {}/y --experts 2 --sources {}/more") == 0 &&
              strstr(up_output, "as they differ in vocab_size"), "and why, where it was not asked for");
    UP("{}/s0 {}/both --experts 2 --sources {}/mistral");
    check(strstr(up_output, "everything else is their mean") != NULL, "Llama and Mistral are one block, with a mean");
}

// MoE to MoE, the paper's copy: where what is kept.
static void test_up_twins(void) {
    up_begin();
    UP(GOLDEN "mixtral_top1 {}/k1 --experts 13");
    double e = up_change(GOLDEN "mixtral_top1", 0, up_path("k1"));
    check(e <= 1e-6, "K = 1, renormalised, 5 -> 13: logits change by %.1e", e);
    check(up_list_is(up_path("k1"), "source", 0, "0 1 2 3 4 0 1 2 3 4 0 1 2"),
          "originals keep their places, copies follow");
    check(up_same(GOLDEN "mixtral_top1", "model.layers.0.block_sparse_moe.experts.1.w2.weight", up_path("k1"),
                  "model.layers.0.block_sparse_moe.experts.11.w2.weight"),
          "expert 11 is expert 1");
    UP(GOLDEN "mixtral {}/m2 --experts 10");
    e = up_change(GOLDEN "mixtral", 1, up_path("m2"));
    check(e <= 1e-6, "K = 2 of twice the experts is K = 1 of the source: %.1e", e);
    check(up_change(GOLDEN "mixtral", 0, up_path("m2")) > 1e-3, "and not K = 2 of it");
    UP(GOLDEN "olmoe {}/times3 --experts 18");
    e = up_change(GOLDEN "olmoe", 1, up_path("times3"));
    check(e <= 1e-6, "K = 3 of three times the experts, not renormalised, is K = 1: %.1e", e);
    UP(GOLDEN "mixtral {}/shuffled --experts 10 --method shuffle");
    e = up_change(GOLDEN "mixtral", 1, up_path("shuffled"));
    check(e <= 1e-6, "shuffle is a no-op on the function: %.1e", e);
    check(!up_same(up_path("shuffled"), "model.layers.0.block_sparse_moe.experts.0.w1.weight", up_path("shuffled"),
                   "model.layers.0.block_sparse_moe.experts.5.w1.weight"),
          "shuffle moves units");
    UP(GOLDEN "olmoe {}/k6 --experts 12 --topk 6");
    e = up_change(GOLDEN "olmoe", 0, up_path("k6"));
    check(e <= 1e-6, "twice the experts and twice K: %.1e", e);
    UP(VARIANTS "logit_norm {}/norm2 --experts 12 --method family");
    e = up_change(VARIANTS "logit_norm", 0, up_path("norm2"));
    check(e <= 1e-6, "family with logit norm, all experts doubled: %.1e", e);
    UP(VARIANTS "lpr {}/lpr2 --experts 8 --topk 4");
    e = up_change(VARIANTS "lpr", 0, up_path("lpr2"));
    check(e <= 1e-6, "LPR, twice the experts and twice K: %.1e", e);
    // family routing keeps the function for every K, and for targets that are no multiple
    static const char* models[] = {GOLDEN "mixtral",        GOLDEN "olmoe",
                                   GOLDEN "olmoe_norm",     GOLDEN "qwen3_moe_mlp_only",
                                   GOLDEN "qwen3_moe_top1", VARIANTS "sigmoid"};
    for (int i = 0; i < 6; i++) {
        char name[32];
        snprintf(name, sizeof name, "family%d", i);
        UP("%s {}/%s --experts 13 --method family", models[i], name);
        e = up_change(models[i], 0, up_path(name));
        check(e <= 1e-6, "family, %s: logits change by %.1e", models[i], e);
    }
    check(up_list_is(up_path("family1"), "family", 0, "0 1 2 3 4 5 0 1 2 3 4 5 0"), "families are the sources");
    UP("{}/m2 {}/m4 --experts 12");
    Json* j = up_receipt(up_path("m4"));
    const Json *parent = json_get(j, "parent"), *method = json_get(parent, "experts");
    check(method && method->items[1]->number == 10 && json_get(j, "experts")->items[1]->number == 12,
          "a receipt holds its source's receipt");
    UP(GOLDEN "mixtral {}/rnd --experts 8 --method random");
    check(up_list_is(up_path("rnd"), "source", 0, "0 1 2 3 4 -1 -1 -1") &&
              up_list_is(up_path("rnd"), "family", 0, "0 1 2 3 4 5 6 7"),
          "random: new experts have no source");
}

// The singular values of a small matrix, from the eigenvalues of W^T W by cyclic Jacobi rotations.
static void up_singular_values(const float* W, int rows, int cols, double* s) {
    double* A = kept_doubles(cols * cols);
    for (int i = 0; i < cols; i++)
        for (int j = 0; j < cols; j++) {
            A[i * cols + j] = 0;
            for (int r = 0; r < rows; r++) A[i * cols + j] += (double)W[r * cols + i] * W[r * cols + j];
        }
    for (int sweep = 0; sweep < 60; sweep++)
        for (int p = 0; p < cols; p++)
            for (int q = p + 1; q < cols; q++) {
                if (fabs(A[p * cols + q]) < 1e-300) continue;
                double theta = 0.5 * atan2(2 * A[p * cols + q], A[q * cols + q] - A[p * cols + p]), c = cos(theta),
                       t = sin(theta);
                for (int i = 0; i < cols; i++) {
                    double x = A[i * cols + p], y = A[i * cols + q];
                    A[i * cols + p] = c * x - t * y;
                    A[i * cols + q] = t * x + c * y;
                }
                for (int i = 0; i < cols; i++) {
                    double x = A[p * cols + i], y = A[q * cols + i];
                    A[p * cols + i] = c * x - t * y;
                    A[q * cols + i] = t * x + c * y;
                }
            }
    for (int i = 0; i < cols; i++) s[i] = sqrt(larger(0, A[i * cols + i]));
    for (int i = 0; i < cols; i++)
        for (int j = i + 1; j < cols; j++)
            if (s[j] > s[i]) {
                double t = s[i];
                s[i] = s[j];
                s[j] = t;
            }
}

static void test_up_algebra(void) {
    up_begin();
    int shapes[3][2] = {{23, 9}, {8, 21}, {12, 12}};
    for (int i = 0; i < 3; i++) {
        int rows = shapes[i][0], cols = shapes[i][1], n = imin(rows, cols);
        float W[500], back[500], T[500];
        double expected[32], worst = 0, orthogonal = 0;
        for (int k = 0; k < rows * cols; k++) W[k] = (float)random_normal(mix64((uint64_t)k + 7));
        if (i == 2)
            for (int k = 0; k < cols; k++) W[11 * cols + k] = W[10 * cols + k] = W[k];         // rank 10
        Svd d = svd_of(W, rows, cols);
        svd_product(back, &d, n);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) T[c * rows + r] = W[r * cols + c];
        if (rows >= cols) up_singular_values(W, rows, cols, expected);
        else up_singular_values(T, cols, rows, expected);
        for (int k = 0; k < n; k++) worst = larger(worst, fabs(d.s[k] - expected[k]));
        for (int a = 0; a < n; a++)
            for (int b = 0; b <= a; b++)
                orthogonal = larger(orthogonal, fabs(dot(d.v + a * n, d.v + b * n, n) - (a == b)));
        check(relative_error(back, W, rows * cols) < 1e-6 && worst < 1e-6 && orthogonal < 1e-9,
              "SVD of %d x %d: product, values (%.1e), orthonormal vectors (%.1e)", rows, cols, worst, orthogonal);
        svd_free(&d);
    }
    double x[4 * 6], C[25], S[25], worst = 0;
    for (int i = 0; i < 24; i++) x[i] = random_normal(mix64((uint64_t)i));
    memcpy(x + 12, x + 6, sizeof(double) * 6);         // nothing is left of the third
    orthonormalise(x, 4, 6);
    for (int a = 0; a < 4; a++)
        for (int b = 0; b <= a; b++) worst = larger(worst, fabs(dot(x + a * 6, x + b * 6, 6) - (a == b)));
    check(worst < 1e-12, "orthonormal vectors, also where one depended on another: %.1e", worst);
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++) C[i * 5 + j] = S[i * 5 + j] = 1.0 / (i + j + 1) + (i == j);
    int ok = cholesky(S, 5);
    worst = 0;
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++) worst = larger(worst, fabs(dot(S + i * 5, S + j * 5, 5) - C[i * 5 + j]));
    C[0] = -1;
    check(ok && worst < 1e-14 && !cholesky(C, 5), "Cholesky: %.1e; refuses what is not positive definite", worst);
    // ISTA with orthonormal atoms has a closed form: soft thresholding
    double D[2 * 3] = {1, 0, 0, 0, 1, 0}, code[2 * 2];
    float W[3 * 2] = {3.0f, -0.2f, 0.5f, -4.0f, 9.0f, 9.0f};
    sparse_codes(code, D, W, 2, 3, 2, 0.1);            // the largest |D W| is 4, so the penalty is 0.4
    check(fabs(code[0] - 2.6) < 1e-6 && code[1] == 0 && fabs(code[2] - 0.1) < 1e-6 && fabs(code[3] + 3.6) < 1e-6,
          "ISTA: soft thresholding");
}

// Each operator by what defines it; originals never change.
static void test_up_operators(void) {
    up_begin();
    int H = 24, I = 40;
    long n = H * I;
    static const char* matrices[] = {"gate_proj", "up_proj", "down_proj"};
    up_make("m3", QWEN3_MOE, 2, H, I, 3, 2, 1, 5);
    static const char* methods[] = {"copy", "copy-noise", "scaled",      "interpolate", "shuffle",
                                    "drop", "orthogonal", "svd-perturb", "svd-mix",     "sparse-code-mix"};
    for (int k = 0; k < 10; k++) {
        char name[32];
        snprintf(name, sizeof name, "op_%s", methods[k]);
        UP("{}/m3 {}/%s --experts 7 --method %s", name, methods[k]);
        int originals = 1;
        for (int m = 0; m < 3; m++)
            for (int e = 0; e < 3; e++) {
                float *a = up_expert("m3", e, matrices[m]), *b = up_expert(name, e, matrices[m]);
                originals &= same_floats(a, b, n);
            }
        double worst = 0;
        int right = 1;
        for (int m = 0; m < 3; m++)
            for (int j = 3; j < 7; j++) {
                int s = j % 3;
                float *w = up_expert("m3", s, matrices[m]), *next = up_expert("m3", (s + 1) % 3, matrices[m]),
                      *v = up_expert(name, j, matrices[m]);
                double mean = 0, std = 0, sum = 0, squares = 0, norm_w = sum_of_squares(w, n),
                       norm_v = sum_of_squares(v, n), change = 0;
                int rows = m == 2 ? H : I, cols = m == 2 ? I : H;
                double s_w[40], s_v[40];
                float T[960];
                for (long i = 0; i < n; i++) {
                    mean += w[i] / (double)n;
                    sum += v[i] - w[i];
                    squares += pow(v[i] - w[i], 2);
                }
                for (long i = 0; i < n; i++) std += pow(w[i] - mean, 2) / (double)(n - 1);
                std = sqrt(std);
                change = sqrt(squares / norm_w);
                if (k >= 6 && k <= 8) {
                    for (int r = 0; r < rows; r++)
                        for (int c = 0; c < cols; c++) T[c * rows + r] = w[r * cols + c];
                    if (rows >= cols) up_singular_values(w, rows, cols, s_w);
                    else up_singular_values(T, cols, rows, s_w);
                    for (int r = 0; r < rows; r++)
                        for (int c = 0; c < cols; c++) T[c * rows + r] = v[r * cols + c];
                    if (rows >= cols) up_singular_values(v, rows, cols, s_v);
                    else up_singular_values(T, cols, rows, s_v);
                }
                switch (k) {
                case 0: right &= same_floats(v, w, n); break;
                case 1:
                    worst = larger(worst, fabs(sqrt(squares / n) / (0.01 * std) - 1));
                    right &= worst < 0.1 && fabs(sum / n) < 0.01 * std * 0.2;
                    break;
                case 2:
                    for (long i = 0; i < n; i++) worst = larger(worst, fabs(v[i] - 0.95 * w[i]));
                    right &= worst < 1e-6;
                    break;
                case 3:
                    for (long i = 0; i < n; i++) worst = larger(worst, fabs(v[i] - 0.5 * (w[i] + next[i])));
                    right &= worst < 1e-6;
                    break;
                case 5: {
                    char changed[40];
                    right &= up_changed_units(w, v, H, I, m == 2, changed) == 20;
                    break;
                }
                case 6:     // all singular values equal, the Frobenius norm that of w
                    worst = larger(worst, fabs(sqrt(norm_v / norm_w) - 1));
                    for (int i = 1; i < H; i++) worst = larger(worst, fabs(s_v[i] / s_v[0] - 1));
                    right &= worst < 1e-5;
                    break;
                case 7: // close, but neither equal nor far: the size of S's noise is .1, of U's and V's about .05 each
                    right &= change > 0.02 && change < 0.35;
                    worst = larger(worst, change);
                    break;
                case 8:     // 7 of 24 pairs exchanged: the rest of the energy is w's own
                    right &= change > 0.05 && change < 1.6;
                    worst = larger(worst, change);
                    break;
                case 9: right &= change > 1e-3 && change < 1.5; worst = larger(worst, change); break;
                default: break;
                }
            }
        check(originals, "%s: originals are untouched", methods[k]);
        check(right, "%s: copies are what the formula says (%.2e)", methods[k], worst);
    }
    // shuffle: one permutation for the three matrices
    float *g = up_expert("m3", 1, "gate_proj"), *u = up_expert("m3", 1, "up_proj"),
          *d = up_expert("m3", 1, "down_proj");
    float *sg = up_expert("op_shuffle", 4, "gate_proj"), *su = up_expert("op_shuffle", 4, "up_proj"),
          *sd = up_expert("op_shuffle", 4, "down_proj");
    int right = 1, moved = 0;
    for (int i = 0; i < I; i++) {
        int from = -1;
        for (int k = 0; k < I; k++)
            if (same_floats(sg + i * H, g + k * H, H)) from = k;
        right &= from >= 0 && same_floats(su + i * H, u + from * H, H);
        for (int r = 0; r < H && from >= 0; r++) right &= sd[r * I + i] == d[r * I + from];
        moved += from != i;
    }
    check(right && moved > I / 2, "shuffle: the same permutation in gate, up and down; %d of %d units moved", moved, I);
    // svd-mix with everything exchanged: the singular values of w on the vectors of the next expert, so V' = V_next
    // diagonalises it
    UP("{}/m3 {}/mix1 --experts 4 --method svd-mix --strength 1");
    UP("{}/m3 {}/mix0 --experts 4 --method svd-mix --strength 0");
    UP("{}/m3 {}/code0 --experts 4 --method sparse-code-mix --strength 0");
    float *w = up_expert("m3", 0, "gate_proj"), *next = up_expert("m3", 1, "gate_proj"),
          *all = up_expert("mix1", 3, "gate_proj"), *none = up_expert("mix0", 3, "gate_proj");
    float* code = up_expert("code0", 3, "gate_proj");
    double a[40], b[40], off = 0, size = 0;
    up_singular_values(w, I, H, a);
    up_singular_values(all, I, H, b);
    double worst = 0;
    for (int i = 0; i < H; i++) worst = larger(worst, fabs(a[i] - b[i]) / a[0]);
    // both Gram matrices have the same eigenvectors exactly if they commute
    double G1[576], G2[576];
    for (int i = 0; i < H; i++)
        for (int j = 0; j < H; j++) {
            G1[i * H + j] = G2[i * H + j] = 0;
            for (int r = 0; r < I; r++) {
                G1[i * H + j] += (double)next[r * H + i] * next[r * H + j];
                G2[i * H + j] += (double)all[r * H + i] * all[r * H + j];
            }
        }
    for (int i = 0; i < H; i++)
        for (int j = 0; j < H; j++) {
            double xy = 0, yx = 0;
            for (int k = 0; k < H; k++) {
                xy += G1[i * H + k] * G2[k * H + j];
                yx += G2[i * H + k] * G1[k * H + j];
            }
            off = larger(off, fabs(xy - yx));
            size = larger(size, fabs(xy));
        }
    check(worst < 1e-5 && off / size < 1e-5,
          "svd-mix of everything: w's singular values (%.1e) on the other's vectors (%.1e)", worst, off / size);
    check(relative_error(none, w, n) < 1e-6 && relative_error(code, w, n) < 1e-6,
          "svd-mix and sparse-code-mix of nothing change nothing");
}

static void test_up_routers(void) {
    up_begin();
    int E = 3, H = 24;
    up_make("m3", QWEN3_MOE, 2, H, 40, E, 2, 1, 5);
    static const char* routers_[] = {"copy",       "noise",       "interpolate", "scaled",     "perturb-new",
                                     "orthogonal", "adversarial", "temperature", "svd-perturb"};
    float* w = up_tensor(up_path("m3"), "model.layers.1.mlp.gate.weight", NULL);
    double std = 0, mean = 0;
    for (int i = 0; i < E * H; i++) mean += w[i] / (double)(E * H);
    for (int i = 0; i < E * H; i++) std += pow(w[i] - mean, 2) / (E * H - 1);
    std = sqrt(std);
    for (int k = 0; k < 9; k++) {
        char name[32];
        snprintf(name, sizeof name, "router_%s", routers_[k]);
        UP("{}/m3 {}/%s --experts 8 --router %s", name, routers_[k]);
        float* v = up_tensor(up_path(name), "model.layers.1.mlp.gate.weight", NULL);
        int originals = same_floats(v, w, E * H), right = 1;
        double worst = 0, noise = 0;
        for (int j = 3; j < 8; j++) {
            const float *x = w + j % 3 * H, *next = w + (j + 1) % 3 * H, *y = v + j * H;
            double xx = 0, xd = 0, dd = 0;
            for (int c = 0; c < H; c++) {
                double d = (double)y[c] - x[c];
                xx += (double)x[c] * x[c];
                xd += x[c] * d;
                dd += d * d;
                if (k == 0) right &= d == 0;
                if (k == 2) worst = larger(worst, fabs(y[c] - 0.5 * (x[c] + next[c])));
                if (k == 3) worst = larger(worst, fabs(y[c] - 0.95 * x[c]));
                if (k == 7) worst = larger(worst, fabs(y[c] - x[c] / 1.1));
                if (k == 6) {
                    double other = 0, away = 0, length = 0;
                    for (int i = 0; i < H; i++) {
                        other = (w[(j + 1) % 3 * H + i] + w[(j + 2) % 3 * H + i]) / 2.0;
                        length += pow(x[i] - other, 2);
                    }
                    other = (w[(j + 1) % 3 * H + c] + w[(j + 2) % 3 * H + c]) / 2.0;
                    away = (x[c] - other) / sqrt(length);
                    double norm = 0;
                    for (int i = 0; i < H; i++) norm += (double)x[i] * x[i];
                    worst = larger(worst, fabs(d - 0.01 * sqrt(norm) * away));
                }
            }
            noise += dd;
            if (k == 5) {       // orthogonal, a tenth of the length
                worst = larger(worst, fabs(xd) / xx);
                right &= fabs(sqrt(dd / xx) - 0.1) < 1e-5;
            }
            if (k == 8) right &= dd > 0 && sqrt(dd / xx) < 0.5;
        }
        noise = sqrt(noise / (5 * H));
        if (k == 1 || k == 4) right &= fabs(noise / (0.01 * std) - 1) < 0.2;
        check(right && worst < 1e-6, "%s: copies' rows (%.1e)", routers_[k], worst);
        check(originals == (k != 1), "%s: originals' rows are %s", routers_[k], k == 1 ? "perturbed too" : "untouched");
    }
    // the selection bias: U(-delta, delta) for copies; refused where there is none
    UP(VARIANTS "sigmoid {}/bias --experts 200 --router-delta 0.5");
    long n;
    float *b = up_tensor(up_path("bias"), "model.layers.0.mlp.gate.e_score_correction_bias", &n),
          *b0 = up_tensor(VARIANTS "sigmoid", "model.layers.0.mlp.gate.e_score_correction_bias", NULL);
    double largest = 0, sum = 0, squares = 0;
    int same = 1;
    for (int j = 0; j < 5; j++) same &= b[j] == b0[j];
    for (int j = 5; j < 200; j++) {
        double d = b[j] - b0[j % 5];
        largest = larger(largest, fabs(d));
        sum += d;
        squares += d * d;
    }
    check(same && n == 200 && largest <= 0.5 && largest > 0.45 && fabs(sum / 195) < 0.1 &&
              fabs(sqrt(squares / 195) - 0.5 / sqrt(3)) < 0.04,
          "bias: U(-delta, delta) for copies alone");
    check(up_same(VARIANTS "sigmoid", "model.layers.0.mlp.experts.3.up_proj.weight", up_path("bias"),
                  "model.layers.0.mlp.experts.198.up_proj.weight"),
          "bias: experts are copies");
    check(up_run("", GOLDEN "mixtral {}/none --experts 10 --router bias") == 2 && strstr(up_output, "no bias"),
          "bias: refused without a bias");
    UP(VARIANTS "lpr {}/lpr --experts 9 --router scaled --router-delta 0.5");
    float *p0 = up_tensor(VARIANTS "lpr", "model.layers.0.mlp.gate.prototypes", NULL),
          *p = up_tensor(up_path("lpr"), "model.layers.0.mlp.gate.prototypes", &n);
    check(n == 9 * 16 && p[6 * 16 + 3] == 0.5f * p0[2 * 16 + 3] && p[2 * 16] == p0[2 * 16],
          "LPR: a copy has a prototype of its own");
}

// How many tensors of the result differ when they are made in pieces of 3 rows
static int up_pieces_differ(const Plan* p) {
    int wrong = 0;
    for (int o = 0; o < p->num_outputs; o++) {
        Target whole = target_open(p, &p->outputs[o]), pieces = target_open(p, &p->outputs[o]);
        float *a = floats(whole.rows * whole.cols), *b = floats(whole.rows * whole.cols);
        target_rows(p, &whole, 0, whole.rows, a);
        for (long row = 0; row < whole.rows; row += 3)
            target_rows(p, &pieces, row, lmin(3, whole.rows - row), b + row * whole.cols);
        wrong += memcmp(a, b, sizeof(float) * (size_t)(whole.rows * whole.cols)) != 0;
        target_close(&whole);
        target_close(&pieces);
        free(a);
        free(b);
    }
    return wrong;
}

// Matrices are made a piece at a time, and every method, with every kind of moments, must make the same numbers in
// pieces of any size: of all rows at once, and of 3.
static void test_up_pieces(void) {
    up_begin();
    up_make("pieces_dense", QWEN3, 1, 16, 24, 0, 0, 1, 5);
    up_make("pieces_mixture", QWEN3_MOE, 1, 16, 24, 3, 2, 1, 6);
    up_make_random_shard("pieces.bin", 400, 256);
    static Plan plans[2 * 4 * NUM_METHODS];
    int threads = thread_count(); // waking them for each piece would take most of the time
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
    static const char* carried[] = {"reset", "copy", "scale", "interpolate"};
    for (int i = 0; i < 2 * 4 * NUM_METHODS; i++) {
        const Method* method = &methods[i / 8];
        int dense = i % 2, granular = is(method->name, "granular"), domains = is(method->name, "domains");
        int merges = is(method->name, "merge"), parts = method->traits & PARTS;
        int calibrates = merges || domains || parts || is(method->name, "cluster");
        const char* carry = carried[i / 2 % 4];
        int refused = is(carry, "interpolate") && (dense || is(method->name, "shuffle"));
        if (!(method->from & (dense ? FROM_DENSE : FROM_MOE)) || refused) continue;
        if (!is(carry, "reset") && (dense || merges) && !method->carry) continue;
        char src[PATH_SIZE], data[2 * PATH_SIZE];
        strcpy(src, up_path(dense ? "pieces_dense" : "pieces_mixture"));
        snprintf(data, sizeof data, domains ? "%s,%s" : "%s", up_path("pieces.bin"), up_path("pieces.bin"));
        const char* arguments[16] = {"upcycle",  src,          "x",           "--experts", dense ? "8" : "9",
                                     "--method", method->name, "--optimizer", carry};
        int count = 9;
        if (merges || domains) arguments[4] = "2";
        if (parts) arguments[4] = "5"; // and a shared one
        if (granular) arguments[count++] = "--granularity", arguments[count++] = "4";
        const char* with_data[] = {"--calibrate", data, "--calibrate-batches", "2", "--seq", "16"};
        for (int k = 0; k < 6 && calibrates; k++) arguments[count++] = with_data[k];
        memset(&the_plan, 0, sizeof the_plan);
        read_options(count, (char**)arguments);
        plans[i] = *plan_create(src); // what a plan owns lives as long as the program
        const Plan* p = &plans[i];
        int wrong = up_pieces_differ(p);
        check(p->num_outputs > 0 && wrong == 0, "%s, %s, --optimizer %s: in pieces of 3 rows %d tensors differ",
              method->name, dense ? "dense" : "mixture", carry, wrong);
    }
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    (void)threads;
}
