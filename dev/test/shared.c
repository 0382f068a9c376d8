/*
shared.c: a dense FFN as a shared expert and routed ones, against fp64 references of importance and marks: which units
each holds, the router's rows, and that all experts together are the FFN.
*/
static const char* shared_matrices[] = {"gate_proj", "up_proj", "down_proj"};

// Whether the parts of layer l of a result hold the source's units in this order, down times its scale.
static int shared_units_are(const char* src, const char* dst, int l, const int* units, const Config* c, double routed,
                            double shared, const char* moment) {
    long H = c->hidden_size, w = c->moe_intermediate_size, n;
    int M = c->num_experts, right = 1;
    for (int m = 0; m < 3; m++)
        for (int e = 0; e <= M; e++) {
            char name[128];
            float* (*read)(const char*, const char*, long*) = *moment ? up_moment : up_tensor;
            snprintf(name, sizeof name, "model.layers.%d.mlp.%s.weight%s", l, shared_matrices[m], moment);
            float* all = read(src, name, &n);
            long I = n / H, size = e < M ? w : shared_expert_width(c);
            char part_name[32] = "shared_experts";
            if (e < M) snprintf(part_name, sizeof part_name, "experts.%d", e);
            else if (c->arch == QWEN2_MOE) strcpy(part_name, "shared_expert");
            snprintf(name, sizeof name, "model.layers.%d.mlp.%s.%s.weight%s", l, part_name, shared_matrices[m], moment);
            float* part = read(dst, name, &n);
            double s = m < 2 ? 1 : e < M ? routed : shared;
            if (*moment) s = strcmp(moment, ".exp_avg") ? 1 / (s * s) : 1 / s;
            right &= n == size * H;
            for (long u = 0; right && u < size; u++)
                for (long h = 0, from = units[e * w + u]; h < H; h++)
                    right &= m == 2 ? part[h * size + u] == (float)(s * all[h * I + from])
                                    : part[u * H + h] == (float)(s * all[from * H + h]);
        }
    return right;
}

static void test_up_shared(void) {
    static const struct {
        const char* name;
        int N, M;
        const char* marks;
    } models[] = {{"qwen3", 2, 3, "--marks 7"}, {"qwen2", 5, 12, "--marks 4"}};
    static const char* ways[] = {"importance", "marks"};
    up_begin();
    Error error = {""};
    SafeTensors* s = keep_file(safetensors_open("dev/reference/shared.safetensors", &error));
    for (EACH(i, models))
        for (EACH(k, ways)) {
            char model[PATH_SIZE], name[96], options[256], dst[PATH_SIZE];
            int N = models[i].N, M = models[i].M, qwen2 = i == 1, right = 1;
            double worst = 0;
            snprintf(model, sizeof model, GOLDEN "%s", models[i].name);
            SafeTensors* reference = up_reference(model);
            long shape[2], n, count;
            reference_ints(reference, "tokens", shape);
            merge_calibration(model);
            snprintf(options, sizeof options,
                     "--method %s --experts %d --shared %d --calibrate {}/reference.bin --calibrate-batches %ld "
                     "--batch 1 --seq %ld %s", ways[k], M, N, shape[0], shape[1], k ? models[i].marks : "");
            strcpy(dst, up_path(ways[k]));
            for (int norm = 0; norm < 2; norm++) { // all experts, equal gates: the FFN
                UP("%s %s --force %s --topk %d --norm-topk %d --router-init zero", model, dst, options, M, norm);
                double e = up_error(dst, reference);
                check(e <= 1e-5 && !strncmp(up_said(dst), "kept exactly while the router is zero", 37),
                      "%s, %s, norm_topk %d: all %d parts: logits within %.1e", models[i].name, ways[k], norm, M, e);
            }
            UP("%s %s --force %s --topk 2", model, dst, options);
            Config c;
            config_read(&c, dst, &error);
            check(c.arch == (qwen2 ? QWEN2_MOE : DOTS1) &&
                      shared_expert_width(&c) == N * c.moe_intermediate_size && strstr(up_output, "parts of the FFN"),
                  "%s, %s: %s; %s", models[i].name, ways[k], archs[c.arch].class_name, up_said(dst));
            for (int l = 0; l < c.num_layers; l++) {
                snprintf(name, sizeof name, "%s.%s.%d", models[i].name, ways[k], l);
                right &= shared_units_are(model, dst, l, reference_ints(s, name, NULL), &c, 2, qwen2 ? 2 : 1, "");
                snprintf(name, sizeof name, "%s.router.%d", models[i].name, l);
                float* rows = reference_floats(s, name, &n);
                snprintf(name, sizeof name, "model.layers.%d.mlp.gate.weight", l);
                float* made = up_tensor(dst, name, &count);
                if (k) worst = larger(worst, n == count ? relative_error(made, rows, n) : INFINITY);
            }
            check(right, "%s, %s: the units of every expert", models[i].name, ways[k]);
            if (qwen2) { // gates of a softmax over all are about 1 / M, whatever K
                UP("%s %s --force %s --topk 2 --norm-topk 0", model, dst, options);
                config_read(&c, dst, &error);
                snprintf(name, sizeof name, "%s.%s.0", models[i].name, ways[k]);
                check(shared_units_are(model, dst, 0, reference_ints(s, name, NULL), &c, M, 2, ""),
                      "%s, %s: gates that do not sum to 1: down times M", models[i].name, ways[k]);
            }
            if (k) check(worst < 1e-4, "%s: the router's rows against fp64: %.1e", models[i].name, worst);
        }
    // a Mixtral has no shared expert, and is the FFN without one
    merge_calibration(GOLDEN "llama");
    UP(GOLDEN "llama {}/mixtral --experts 19 --topk 19 --shared 0 --router-init zero --method importance --calibrate "
       "{}/reference.bin --calibrate-batches 1 --batch 1 --seq 9");
    double e = up_error(up_path("mixtral"), up_reference(GOLDEN "llama"));
    check(e <= 1e-5, "llama, 19 parts of one unit, none shared: logits within %.1e of fp64", e);
    // moments go where their weights go, and a run goes on with them
    write_corpus(temp("corpus.txt"), 4000);
    up_make("dense", QWEN3, 2, 24, 40, 0, 0, 0, 1);
    for (EACH(k, ways)) {
        const char *dst = up_path("m"), *src = up_path("dense");
        int units[40], right = 1;
        UP("{}/dense {}/m --force --experts 3 --topk 2 --layers 1 --method %s --optimizer copy --calibrate %s --seq 16",
           ways[k], temp("corpus.txt"));
        Config c;
        config_read(&c, dst, &error);
        float *all = up_tensor(src, "model.layers.1.mlp.up_proj.weight", NULL); // each unit's place, by its row of up
        for (int u = 0; u < 40; u++) {
            char name[96];
            snprintf(name, sizeof name, u / 10 < 3 ? "model.layers.1.mlp.experts.%d.up_proj.weight"
                                                   : "model.layers.1.mlp.shared_experts.up_proj.weight", u / 10);
            float* part = up_tensor(dst, name, NULL);
            for (units[u] = 0; memcmp(all + units[u] * 24, part + u % 10 * 24, floats_bytes(24)); units[u]++)
                if (units[u] == 39) break;
        }
        for (int h = 0; h < 3; h++) {
            static const char* holds[] = {"", ".exp_avg", ".exp_avg_sq"};
            right &= shared_units_are(src, dst, 1, units, &c, 2, 1, holds[h]);
        }
        check(right, "%s: moments of all units, of shared ones too", ways[k]);
        remove_tree(temp("run"));
        int code = run_program("--model %s --data %s --batch 2 --seq 16 --steps 2 --out %s", dst, temp("corpus.txt"),
                               temp("run"));
        check(code == 0, "%s: trains on", ways[k]);
    }
    static const struct { const char *arguments, *says; } refused[] = {
        {"llama {}/x --experts 4 --method marks --calibrate a", "has no shared expert; --shared 0 fits"},
        {"qwen3 {}/x --experts 4 --method importance", "wants --calibrate"},
        {"qwen3 {}/x --experts 4 --method marks", "wants --calibrate"},
        {"qwen3 {}/x --experts 5 --method marks --calibrate a", "no multiple of that and --shared, 6"},
        {"qwen3 {}/x --experts 4 --shared 2", "belongs to --method importance|marks"},
        {"qwen3 {}/x --experts 4 --method importance --marks 3 --calibrate a", "belongs to --method marks"},
        {"qwen3 {}/x --experts 4 --layers 0,1 --method marks --calibrate a", "come before all others"},
        {"mixtral {}/x --experts 10 --method marks", "is a mixture"}};
    for (EACH(i, refused))
        check(up_run("", GOLDEN "%s", refused[i].arguments) == 2 && strstr(up_output, refused[i].says) &&
                  !exists(up_path("x")), "refused: %s: %.90s", refused[i].arguments, up_output);
}
