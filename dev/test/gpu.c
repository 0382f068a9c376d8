/*
gpu.c: train_moe.cu: the same references, and the same runs as on the CPU.
*/
// bf16 has 8 bits: a product's operands are off by up to 2^-9, and what is kept between layers is rounded again. A
// token whose experts score almost alike may get another one, and is another token from there on.
static const Tolerances of_bf16 = {0.2, 0.02, 0.02, 0.15, 0.3, 2, 0.1};

static void on_backend(const Backend* backend, void (*run)(void)) {
    default_backend = backend;
    run();
    default_backend = &cpu_backend;
}

static void gpu_golden(Tolerances most) {
    for (EACH(i, golden_models))
        test_golden_model("golden", golden_models[i], most);
    for (EACH(i, golden_routers))
        test_golden_model("golden_routers", golden_routers[i], most);
}
static void gpu_golden_floats(void) { gpu_golden(of_floats); }
static void gpu_golden_bf16(void) { gpu_golden(of_bf16); }
static void test_gpu_fp32(void) {
    on_backend(&gpu_backend_float, gpu_golden_floats);
    on_backend(&gpu_backend_float, test_bias_values);
}
static void test_gpu_bf16(void) { on_backend(&gpu_backend_bf16, gpu_golden_bf16); }

// Do both choose the same experts, but for tokens with two whose scores (the CPU's) nearly tie? Copies tie exactly, and
// which one is chosen then is no matter of rounding.
static int same_experts(const Model* a, const Model* b, int l) {
    long N = (long)a->batch * a->length;
    int E = a->config.num_experts, K = a->topk[l], same = 1;
    for (long i = 0; i < N * K; i++) {
        const float* z = a->layers[l].router_logits + i / K * E;
        int x = a->layers[l].experts[i], y = b->layers[l].experts[i];
        same &= x == y || (z[x] != z[y] && fabsf(z[x] - z[y]) <= 1e-5f * (1 + fabsf(z[x])));
    }
    return same;
}

// Models that are large enough for several tiles in every direction, with sizes that fill none of them: logits and
// gradients against the CPU's. All experts are chosen in bf16, where scores that are nearly equal could change places.
// There products round alike, so what is left comes from what the GPU keeps as bf16 between them.
// Passes are micro-batches: each has other tokens and adds to the gradients, and nothing waits for any but the first.
// With families, expert e and e + E/2 are copies whose scores are equal.
static void gpu_against_cpu(const char* name, const Config* c, int B, int T, int passes, double most_logits,
                            double most_gradient) {
    long n = (long)B * T, V = c->vocab_size, worst_at = 0;
    int *tokens = kept_ints(n + passes), all = 1, E = c->num_experts;
    float* logits[2];
    Model* m[2];
    for (long i = 0; i < n + passes; i++) tokens[i] = (int)(mix64((uint64_t)(i * i)) % (uint64_t)(i % 3 ? V : 3));
    for (int way = 0; way < 2; way++) {
        const Backend* gpu = default_backend;
        use_way(way == 0 && gpu == &gpu_backend_bf16 ? WAYS - 1 : 0);
        if (way == 0) default_backend = &cpu_backend;
        m[way] = model_create(c, FOR_TRAINING, B, T, T, NULL);
        default_backend = gpu;
        model_init(m[way], 1);
        for (long i = 0; i < m[way]->layout.matrices; i++) m[way]->params[i] *= 4;
        m[way]->balance.aux = m[way]->balance.z = 0.01f;
        m[way]->has_families = c->router.family_penalty > 0;
        for (int l = 0; l < c->num_layers && m[way]->has_families; l++) {
            for (int e = 0; e < E; e++) m[way]->family[l * E + e] = e % (E / 2);
            memcpy(m[way]->weights.layers[l].router + (long)E / 2 * c->hidden_size, m[way]->weights.layers[l].router,
                   floats_bytes((long)(E / 2) * c->hidden_size));
        }
        m[way]->backend->send(m[way], PARAMETERS);
        for (int pass = 0; pass < passes; pass++) {
            model_forward(m[way], tokens + pass, tokens + pass + 1, B, T);
            if (pass == 0) {        // the CPU's become their gradient in place
                m[way]->backend->read_back(m[way], LOGITS);
                logits[way] = copy_floats(m[way]->logits, n * V);
            }
            model_backward(m[way], 0.5f);
        }
        m[way]->backend->read_back(m[way], GRADIENTS | ROUTING);
    }
    double worst = 0, logit_error = relative_error(logits[1], logits[0], n * V);
    for (int l = 0; l < c->num_layers; l++)
        all &= !c->sparse[l] || c->num_experts_per_tok == c->num_experts || same_experts(m[0], m[1], l);
    for (int i = 0; i < m[0]->layout.count; i++) {
        const Tensor* t = &m[0]->layout.tensors[i];
        double e = relative_error(m[1]->grads + t->offset, m[0]->grads + t->offset, tensor_size(t));
        if (!(e <= worst)) worst = e, worst_at = i;
    }
    Losses a = take_losses(m[0]), b = take_losses(m[1]);
    double other = larger(fabs(a.aux - b.aux), larger(fabs(a.z - b.z), fabs(a.lpr - b.lpr)));
    check(all && logit_error <= most_logits && fabs(a.loss - b.loss) <= most_logits &&
              other <= most_logits * (1 + a.z + a.lpr),
          "%s: relative error of the logits %.1e, loss %.6f and %.6f, others differ by %.1e", name, logit_error, a.loss,
          b.loss, other);
    check(worst <= most_gradient, "%s: %d gradients, largest relative error %.1e (%s)", name, m[0]->layout.count, worst,
          m[0]->layout.tensors[worst_at].name);
    for (int way = 0; way < 2; way++) model_free(m[way]);
}

// A stable sort has one result only: the CPU's. Some experts get nothing, and expert 0 half of everything.
static void gpu_grouping(int N, int K, int E) {
    int R = N * K, most = R / GROUP_ROWS + E, ok = 1, t = 0;
    int sizes[] = {R, E + 1, R, R, R, 2 * most, gpu_group_chunks(N, K) * E}, *host[7], *got[7], *device[7];
    for (int i = 0; i < 7; i++) {
        host[i] = kept_ints(sizes[i]);
        got[i] = kept_ints(sizes[i]);
        CHECK(cudaMalloc((void**)&device[i], sizeof(int) * (size_t)sizes[i]));
    }
    int *experts = host[0], *offsets = host[1];
    for (int a = 0; a < R; a++)
        experts[a] = mix64((uint64_t)a) % 2 ? (int)(mix64((uint64_t)a * 3) % (uint64_t)E) / 5 * 5 : 0;
    group_by_expert(offsets, host[2], host[4], experts, N, K, E);
    for (int r = 0; r < R; r++) host[3][r] = host[2][r] / K;        // the token
    CHECK(cudaMemcpy(device[0], experts, sizeof(int) * (size_t)R, cudaMemcpyHostToDevice));
    gpu_group_by_expert(device[1], (int2*)device[5], most, device[2], device[3], device[4], device[6], device[0], N, K,
                        E);
    for (int i = 1; i < 6; i++)
        CHECK(cudaMemcpy(got[i], device[i], sizeof(int) * (size_t)sizes[i], cudaMemcpyDeviceToHost));
    for (int i = 1; i < 5; i++) ok &= !memcmp(got[i], host[i], sizeof(int) * (size_t)sizes[i]);
    for (int e = 0; e < E; e++)
        for (int row = offsets[e]; row < offsets[e + 1]; row += GROUP_ROWS, t++)
            ok &= got[5][2 * t] == e && got[5][2 * t + 1] == row;
    for (; t < most; t++) ok &= got[5][2 * t] == -1;
    check(ok, "%d assignments to %d experts are grouped as on the CPU", R, E);
    for (int i = 0; i < 7; i++) CHECK(cudaFree(device[i]));
}

static void test_gpu_tiles(void) {
    pretended_multiprocessors = 4;
    // The last two, in bf16 only, are what real models run: all loads by cp.async, more steps of k than the ring of the
    // experts' products has stages (X_WT 7 and 4, 4 and 8; DY_W 8 and 7, 16 and 4; DYT_X 5), three blocks of queries
    // with heads of 64 and 128; and among the tiles of the first one without rows, with others behind it.
    static const struct { int H, NH, NKV, HD, I, E, B, T; } sizes[] = {{144, 4, 2, 32, 136, 3, 2, 150},
                                                                        {100, 3, 1, 70, 77, 2, 2, 133},
                                                                        {72, 2, 2, 100, 264, 2, 2, 70},
                                                                        {424, 4, 2, 64, 256, 3, 1, 300},
                                                                        {256, 2, 1, 128, 512, 2, 1, 300}};
    for (int i = 0; i < 5; i++)
        for (int bf16_too = i >= 3; bf16_too < 2; bf16_too++) {
            Config c = tiny_config(i == 1 ? OLMOE : QWEN3_MOE, 2, sizes[i].E, bf16_too ? sizes[i].E : 2);
            char name[64];
            c.hidden_size = sizes[i].H;
            c.num_heads = sizes[i].NH;
            c.num_kv_heads = sizes[i].NKV;
            c.head_dim = sizes[i].HD;
            c.moe_intermediate_size = sizes[i].I;
            c.qk_norm = i == 1 ? QK_NORM_ROW : QK_NORM_HEAD;
            c.vocab_size = 301;
            snprintf(name, sizeof name, "hidden %d, heads of %d, %s", c.hidden_size, c.head_dim,
                     bf16_too ? "bf16" : "fp32");
            default_backend = bf16_too ? &gpu_backend_bf16 : &gpu_backend_float;
            gpu_against_cpu(name, &c, sizes[i].B, sizes[i].T, 2, bf16_too ? 0.02 : 1e-5, bf16_too ? 0.025 : 1e-5);
            default_backend = &cpu_backend;
        }
    // A shared expert, wider and narrower than the others, with and without a gate
    for (int i = 0; i < 4; i++) {
        Config c = tiny_config(i / 2 ? DOTS1 : QWEN2_MOE, 2, 3, i % 2 ? 3 : 2);
        c.hidden_size = 80;
        c.moe_intermediate_size = 35;
        c.shared_expert_intermediate_size = i / 2 ? 0 : 150;
        c.num_shared_experts = i / 2 ? 2 : 0;
        if (i / 2) c.router.kind = ROUTER_SIGMOID, c.router.scaling = 2.5;
        if (i / 2) c.qk_norm = QK_NORM_HEAD;
        default_backend = i % 2 ? &gpu_backend_bf16 : &gpu_backend_float;
        gpu_against_cpu(i / 2 ? "Dots1" : "Qwen2-MoE", &c, 2, 150, 2, i % 2 ? 0.02 : 1e-5, i % 2 ? 0.025 : 1e-5);
        default_backend = &cpu_backend;
    }
    // Many tokens of a small model: sums go round more than once, products are split along k, every kind of router
    for (int i = 0; i < 3; i++) {
        static const char* routers[] = {"softmax", "sigmoid, logit norm, families", "LPR"};
        Config c = tiny_config(QWEN3_MOE, 2, 6, 2);
        char name[64];
        c.num_heads = 2;
        c.num_kv_heads = 1;
        if (i == 1) c.router.kind = ROUTER_SIGMOID, c.router.logit_norm = 2, c.router.family_penalty = 0.25;
        if (i == 2) {
            c.router.kind = ROUTER_LPR;
            c.router.lpr_latent_dim = 5;
            c.router.lpr_weight = c.router.lpr_diversity = c.router.lpr_kl = c.router.lpr_align = 0.3;
        }
        snprintf(name, sizeof name, "1056 tokens, %s", routers[i]);
        default_backend = &gpu_backend_float;
        gpu_against_cpu(name, &c, 33, 32, 4, 1e-5, 1e-5);
        default_backend = &cpu_backend;
    }
    gpu_grouping(300, 3, 5);
    gpu_grouping(5000, 2, 1100);
    pretended_multiprocessors = 0;
}

// What is set once for a device must be set for each: all of this machine's GPUs, the first one twice.
static void test_gpu_devices(void) {
    int count;
    CHECK(cudaGetDeviceCount(&count));
    for (int i = 0; i <= count; i++) {
        Config c = tiny_config(QWEN3_MOE, 1, 2, 2);
        char name[64];
        CHECK(cudaSetDevice(i % count));
        snprintf(name, sizeof name, "device %d of %d, %s", i % count, count, gpu_products());
        c.moe_intermediate_size = 264;
        c.head_dim = 128;
        default_backend = &gpu_backend_bf16;
        gpu_against_cpu(name, &c, 1, 40, 1, 0.02, 0.025);
        default_backend = &cpu_backend;
    }
    int most, hidden;
    CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    hidden = most / 16 * 2;
    write_corpus(temp("few.txt"), 300);
    default_backend = &gpu_backend_bf16;
    int code = run_program("--data %s --layers 1 --heads 1 --head-dim 32 --hidden %d", temp("few.txt"), hidden);
    default_backend = &cpu_backend;
    check(code == 2 && strstr(ran.err, "KB of shared memory"), "--hidden %d: more than a block's shared memory holds",
          hidden);
}

// Feeding a cache token by token, in chunks, or everything at once gives the same logits, up to rounding.
static void gpu_cache(void) {
    static const int chunks[][4] = {{1, 0}, {7, 0}, {33, 1, 5, 0}, {CACHE_LENGTH, 0}};
    int tokens[CACHE_LENGTH];
    for (size_t i = 0; i < sizeof golden_models / sizeof golden_models[0]; i += 3) {
        char dir[PATH_SIZE];
        join_path(dir, "dev/reference/golden", golden_models[i]);
        Model* m = open_model(dir, FOR_SCORING, 1, CACHE_LENGTH);
        Model* g = keep_model(model_create(&m->config, FOR_GENERATION, 1, CACHE_LENGTH, CACHE_LENGTH, m));
        int V = m->config.vocab_size;
        double worst = 0;
        m->backend->send(m, PARAMETERS);
        fill_tokens(tokens, CACHE_LENGTH, V, 5);
        model_forward(m, tokens, NULL, 1, CACHE_LENGTH);
        m->backend->read_back(m, LOGITS);
        for (int way = 0; way < 4; way++) {
            const int* size = chunks[way];
            g->cached = 0;
            for (int fed = 0; fed < CACHE_LENGTH;) {
                int n = imin(*size, CACHE_LENGTH - fed);
                model_forward(g, tokens + fed, NULL, 1, n);
                g->backend->read_back(g, LOGITS);
                fed += n;
                worst = larger(worst, relative_error(g->logits, m->logits + (long)(fed - 1) * V, V));
                if (size[1]) size++;
            }
        }
        check(worst < 1e-5, "%s: four ways to feed a cache, largest relative error %.1e", golden_models[i], worst);
    }
}
static void test_gpu_cache(void) { on_backend(&gpu_backend_float, gpu_cache); }

// column `column` of each row of OUT/log.csv; returns the number of rows
static int log_column(const char* out, int column, double* values, int most) {
    size_t n = 0;
    char *text = read_bytes(temp("%s/log.csv", out), &n), *rest = text, *line;
    int rows = -1; // the header
    while (text && (line = strsep(&rest, "\n")) != NULL && *line && rows < most) {
        for (int i = 0; i < column; i++) line = strchr(line, ',') + 1;
        if (rows >= 0) values[rows] = atof(line);
        rows++;
    }
    return rows;
}

static int gpu_run(const char* out, const char* more) {
    int code = train_run(out, more);
    show_failure(code == 0);
    return code;
}

// 20 steps on the CPU and on the GPU: the same loss in every step, within rounding, in both precisions. Random numbers,
// order of the data and ties are the same, so differences come from the order of additions, and in bf16 from what the
// GPU keeps as such. They grow with the steps, and jump where two experts' scores lie closer together than they are:
// therefore the later steps' tolerance is wider.
static void compare_runs(const char* name, const char* more) {
    static const double tolerances[2][2] = {{1e-4, 0.03}, {0.01, 0.05}};
    double losses[4][20];       // fp32 on the CPU, on the GPU, bf16 on the CPU, on the GPU
    char arguments[1024];
    for (int way = 0; way < 4; way++) {
        default_backend = way % 2 ? &gpu_backend_float : &cpu_backend;
        snprintf(arguments, sizeof arguments, "--steps 20 --lr 0.003 --val-every 20 --precision %s %s",
                 way / 2 ? "bf16" : "fp32", more);
        int code = gpu_run("a", arguments), rows = log_column("a", 2, losses[way], 20);
        default_backend = &cpu_backend;
        if (code || rows != 20) {
            check(0, "%s: exit code %d, %d rows", name, code, rows);
            return;
        }
    }
    check(losses[0][19] < losses[0][0] - 0.3, "%s: the loss falls from %.3f to %.3f", name, losses[0][0],
          losses[0][19]);
    for (int way = 1; way < 4; way += 2) {
        double worst[2] = {0, 0};
        for (int i = 0; i < 20; i++) worst[i >= 10] = larger(worst[i >= 10], fabs(losses[way][i] - losses[way - 1][i]));
        check(worst[0] <= tolerances[way / 2][0] && worst[1] <= tolerances[way / 2][1],
              "%s: %s: the loss differs from the CPU's by %.1e in steps 1 to 10, by %.1e in steps 11 to 20", name,
              way == 1 ? "fp32" : "bf16", worst[0], worst[1]);
    }
}

static void test_gpu_training(void) {
    static const struct { const char *name, *flags; } runs[] = {
        {"softmax", ""},
        {"accumulation, clipping, z-loss", "--accum 2 --clip 0.5 --z-loss 0.01"},
        {"balance over all layers", "--aux-form hf --aux 0.1 --norm-topk 0"},
        {"adaptive balance", "--aux-adaptive --aux 0.05"},
        {"random K", "--topk-range 1:3"},
        {"logit norm", "--logit-norm 3"},
        {"sigmoid", "--router sigmoid --bias-rate 0.01"},
        {"sigmoid, quantile", "--router sigmoid --bias-rule quantile --accum 2"},
        {"sigmoid, ID", "--router sigmoid --bias-rule id --bias-rate 0.01"},
        {"sigmoid with logit norm", "--router sigmoid --logit-norm 2 --aux 0.02"},
        {"LPR", "--router lpr"},
        {"LPR, mean targets", "--router lpr --lpr-align-form mean --lpr-weight 0.1 --lpr-dim 5"},
        {"Mixtral", "--arch mixtral --kv-heads 1"},
        {"OLMoE", "--arch olmoe --tie"},
        {"sparse and dense layers", "--sparse-step 2 --ffn 50"},
        {"dense", "--dense --tie"}};
    write_corpus(temp("corpus.txt"), 20000);
    for (EACH(i, runs))
        compare_runs(runs[i].name, runs[i].flags);
}

// Copies of experts under a family penalty that falls over the run, and infinite ones.
static void test_gpu_families(void) {
    static const char* routers[] = {"", "--router sigmoid", "--logit-norm 3"};
    write_corpus(temp("corpus.txt"), 20000);
    for (int i = 0; i < 3; i++) {
        char arguments[1024];
        double losses[2][20], worst[2] = {0, 0};
        snprintf(arguments, sizeof arguments, "--steps 4 %s", routers[i]);
        int code = gpu_run("small", arguments), ok = code == 0;
        remove_tree(temp("grown"));
        ok = ok && up_run("", "%s %s --experts 10 --method family", temp("small"), temp("grown")) == 0;
        for (int way = 0; way < 2 && ok; way++) {
            default_backend = way ? &gpu_backend_float : &cpu_backend;
            remove_tree(temp("run"));
            ok = run_program("--model %s --data %s --out %s --steps 20 --batch 3 --seq 24 --lr 0.003 --val-every 4 "
                             "--val-batches 2 --family-steps 14 --precision fp32", temp("grown"), temp("corpus.txt"),
                             temp("run")) == 0 && log_column("run", 2, losses[way], 20) == 20;
            show_failure(ok);
            default_backend = &cpu_backend;
        }
        for (int k = 0; k < 20 && ok; k++) {
            worst[k >= 10] = larger(worst[k >= 10], fabs(losses[0][k] - losses[1][k]));
        }
        check(ok && worst[0] <= 1e-4 && worst[1] <= 0.03,
              "families, %s: upcycled, the loss differs from the CPU's by %.1e in steps 1 to 10, by %.1e in 11 to 20",
              *routers[i] ? routers[i] : "softmax", worst[0], worst[1]);
    }
}

// The same command twice: the same bytes. And a run that began on one side goes on on the other.
static void test_gpu_resume(void) {
    static const char* precisions[] = {"fp32", "bf16"};
    char arguments[1024];
    write_corpus(temp("corpus.txt"), 20000);
    for (int i = 0; i < 2; i++) {
        default_backend = &gpu_backend_float;
        snprintf(arguments, sizeof arguments, "--steps 6 --schedule constant --val-every 1 --accum 2 --precision %s",
                 precisions[i]);
        int ok = gpu_run("a", arguments) == 0 && gpu_run("b", arguments) == 0;
        check(ok && same_checkpoint("a", "b") && same_logs("a", "b"), "%s: two runs write the same bytes",
              precisions[i]);
        snprintf(arguments, sizeof arguments, "--steps 3 --schedule constant --val-every 1 --accum 2 --precision %s",
                 precisions[i]);
        ok = gpu_run("b", arguments) == 0;
        ok &= resume_run("b", "--steps 6") == 0;        // in the precision that trainer.json remembers
        check(ok && same_checkpoint("a", "b") && same_logs("a", "b"),
              "%s: stopping at step 3 and resuming changes no byte and no row", precisions[i]);
        show_failure(ok);
        default_backend = &cpu_backend;
    }
    for (int first = 0; first < 2; first++) {           // the first half here, the second there
        double whole[6], halves[6], worst = 0;
        int ok = gpu_run("a", "--steps 6 --schedule constant --router sigmoid --accum 2") == 0;
        default_backend = first ? &gpu_backend_float : &cpu_backend;
        ok &= gpu_run("b", "--steps 3 --schedule constant --router sigmoid --accum 2 --precision fp32") == 0;
        default_backend = first ? &cpu_backend : &gpu_backend_float;
        ok &= resume_run("b", "--steps 6 --precision fp32") == 0;
        default_backend = &cpu_backend;
        show_failure(ok);
        ok &= log_column("a", 2, whole, 6) == 6 && log_column("b", 2, halves, 6) == 6;
        for (int k = 0; k < 6; k++) worst = larger(worst, fabs(whole[k] - halves[k]));
        check(ok && worst <= 1e-4, "begun on the %s, resumed on the %s: the loss differs by %.1e",
              first ? "GPU" : "CPU", first ? "CPU" : "GPU", worst);
    }
}

// How many greedy tokens after `text` do not hang on rounding: those before the CPU's two largest logits nearly tie.
static int sure_tokens(const char* dir, const char* text, int most) {
    int ids[64], n = (int)strlen(text), first = n;
    Model* m = open_model(dir, FOR_SCORING, 1, 64);
    for (int i = 0; i < n; i++) ids[i] = (unsigned char)text[i];
    for (; n < first + most; n++) {
        model_forward(m, ids, NULL, 1, n);
        const float* z = m->logits + (long)(n - 1) * m->config.vocab_size;
        int best = 0;
        for (int v = 1; v < m->config.vocab_size; v++) best = z[v] > z[best] ? v : best;
        for (int v = 0; v < m->config.vocab_size; v++)
            if (v != best && z[best] - z[v] < 1e-3f) return n - first;
        ids[n] = best;
    }
    return most;
}

// The largest difference between the numbers of two texts, relative to 1 and to their size; 1e9 if they are not the
// same texts otherwise.
static double numbers_differ(const char* a, const char* b) {
    double worst = 0;
    while (a && b && *a && *b) {
        char *a_end, *b_end;
        double x = strtod(a, &a_end), y = strtod(b, &b_end);
        if ((a_end == a) != (b_end == b) || (a_end == a && *a != *b)) return 1e9;
        if (a_end != a) worst = larger(worst, fabs(x - y) / (1 + fabs(x)));
        a = a_end == a ? a + 1 : a_end;
        b = b_end == b ? b + 1 : b_end;
    }
    return a && b && *a == *b ? worst : 1e9;
}

// --eval with --load and --trace, --dump and --prompt say what they say on the CPU.
static void test_gpu_commands(void) {
    write_corpus(temp("corpus.txt"), 20000);
    write_corpus(temp("few.txt"), 300);
    int ok = gpu_run("a", "--steps 10") == 0, same = 1;
    default_backend = &gpu_backend_float;
    check_refused(2, "--fixed-router start --precision fp32", "--fixed-router: on the CPU alone");
    check_refused(2, "--router dynamic --precision fp32", "--router dynamic: on the CPU alone");
    default_backend = &cpu_backend;
    static char said[2][2][8192];
    for (int way = 0; way < 2; way++) {
        default_backend = way ? &gpu_backend_float : &cpu_backend;
        const char* precision = "--precision fp32";
        ok &= run_program("--model %s --data %s --eval --load --seq 20 --trace %s %s", temp("a"), temp("few.txt"),
                          temp("trace%d", way), precision) == 0;
        snprintf(said[way][0], sizeof said[way][0], "%s", ran.out);
        ok &= run_program("--model %s --data %s --seq 16 --batch 3 --dump %s %s", temp("a"), temp("few.txt"),
                          temp("dump%d", way), precision) == 0;
        ok &= run_program("--model %s --prompt abc --tokens 40 --temperature 0 %s", temp("a"), precision) == 0;
        snprintf(said[way][1], sizeof said[way][1], "%s", ran.out);
        show_failure(ok);
        default_backend = &cpu_backend;
    }
    double losses[2];
    for (int way = 0; way < 2; way++)
        losses[way] = strstr(said[way][0], "loss ") ? atof(strstr(said[way][0], "loss ") + 5) : 0;
    const char* loads[2] = {strstr(said[0][0], "layer 0"), strstr(said[1][0], "layer 0")};
    check(ok && losses[0] > 1 && fabs(losses[0] - losses[1]) <= 2e-5, "--eval: %.6f and %.6f", losses[0], losses[1]);
    // a token whose experts nearly tie is one more here and one less there
    double apart = numbers_differ(loads[0], loads[1]);
    check(apart <= 0.02, "--load: the same lines, numbers differ by %.1e", apart);
    int sure = sure_tokens(temp("a"), "abc", 40);
    check(ok && strlen(said[0][1]) > 30 && !strncmp(said[0][1], said[1][1], 3 + (size_t)sure),
          "--prompt: the same text in the %d tokens of 40 before a near tie", sure);
    size_t n[2];
    char* traces[2] = {read_bytes(temp("trace0"), &n[0]), read_bytes(temp("trace1"), &n[1])};
    // gates may differ in their last digit: compare what stands before them, the experts
    same = traces[0] && traces[1] && n[0] == n[1];
    long differing = 0;
    for (size_t i = 0; same && i < n[0]; i++) differing += traces[0][i] != traces[1][i];
    check(same && differing * 50 < (long)n[0], "--trace: the same lines, %ld of %zu digits differ", differing, n[0]);
    Error error = {""};
    SafeTensors *a = keep_file(safetensors_open(temp("dump0"), &error));
    SafeTensors* b = keep_file(safetensors_open(temp("dump1"), &error));
    double worst = 0;
    for (int i = 0; a && b && i < a->num_tensors; i++) {
        const char* name = a->tensors[i].name;
        if (a->tensors[i].dtype == DTYPE_I32) continue;
        float *x = reference_floats(a, name, NULL), *y = reference_floats(b, name, NULL);
        worst = larger(worst, relative_error(y, x, a->tensors[i].count));
    }
    check(a && b && a->num_tensors == b->num_tensors && worst <= 1e-5,
          "--dump: %d tensors, largest relative error %.1e", a ? a->num_tensors : 0, worst);
}
