/*
balance.c: what balances the load or does without it. Rules of the sigmoid router's bias against the references, experts
that are skipped, routers that are not trained.
*/
static int compare_floats(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return x < y ? 1 : x > y ? -1 : 0;          // the largest first
}

// Ranks by counting against a sort, with ties and zeros of both signs.
static void test_ranks(void) {
    int right = 1;
    for (int N = 1; N < 60; N++) {
        float *x = random_floats(N, (uint64_t)N), *sorted;
        for (int n = 0; n < N; n++) x[n] = n % 5 ? n % 7 ? x[n] : roundf(4 * x[n]) : n % 2 ? x[n / 2] : -x[n] * 1e30f;
        if (N > 40) x[7] = -0.0f, x[9] = 0, x[11] = -3e38f;
        sorted = copy_floats(x, N);
        qsort(sorted, (size_t)N, sizeof(float), compare_floats);
        for (int rank = 0; rank < N; rank++) right &= number_of_rank(x, 1, N, rank) == sorted[rank];
        right &= number_of_rank(x, 2, (N + 1) / 2, 0) >= x[0];
    }
    check(right, "the number of each rank is that of a sort");
}

// The bias after a step by each rule, on the backend at hand.
static void test_bias_values(void) {
    static const char* names[] = {"sigmoid", "sigmoid_top1"};
    for (EACH(i, names)) {
        Reference r = reference_open("golden_routers", names[i], of_floats);
        Model* m = r.m;
        int E = m->config.num_experts, L = m->config.num_layers;
        RouterSchedule run = {metadata_number(r.file, "bias_rate"), 2, 0, 0, 0, 0, 0, NULL};
        float* start = copy_floats(m->params, m->layout.total);
        long* load = (long*)kept_malloc(sizeof(long) * (size_t)(L * E));
        double worst[2] = {0, 0};
        m->backend->send(m, PARAMETERS);
        m->counting_load = 1;
        m->config.router.bias_rule = BIAS_QUANTILE;
        for (int micro = 0; micro < 2; micro++) model_forward(m, r.tokens, r.targets, r.B, r.T);
        take_losses(m);
        for (int e = 0; e < L * E; e++) load[e] = m->step_load[e] / 2;
        for (int step = -1; step < 3; step++) {             // one by quantile, three by error
            for (int k = 0; k < L * E && step >= 0; k++) {
                long n = load[step == 2 ? k / E * E + E - 1 - k % E : k];
                m->step_load[k] = step == 1 ? n * n : n;
            }
            router_after_step(m, &run, 1);
            for (int l = 0; l < L; l++) {
                if (!m->config.sparse[l]) continue;
                const char* name = of_layer(step < 0 ? "bias_quantile" : "bias_id", l);
                float* expected = reference_floats(r.file, name, NULL) + (step > 0 ? step * E : 0);
                worst[step >= 0] = larger(worst[step >= 0], max_error(m->weights.layers[l].router_bias, expected, E));
            }
            if (step < 0) memcpy(m->params, start, floats_bytes(m->layout.total));
            m->config.router.bias_rule = BIAS_ID;
        }
        check(worst[0] <= 1e-6, "%s: quantile balancing, largest error of the bias %.1e", names[i], worst[0]);
        check(worst[1] <= 1e-7, "%s: three steps of ID balancing, largest error of the bias %.1e", names[i], worst[1]);
    }
}

// Experts with small gates left out: the references' logits, and at MU = 1 what K = 1 computes.
static void test_skipping(void) {
    int chosen[3] = {4, 2, 7};
    float scaled[3] = {1, 0.9f, 0.6f};          // of a router whose gates sum to 2.5
    skip_small_gates(chosen, scaled, 0.8f, 1, 3, 1, 2.5f);
    check(fabs(scaled[0] + scaled[1] - 2.5) < 1e-6 && chosen[2] == -1, "gates that are scaled stay so");
    // an expert that is skipped has no row: what lies before the rows is not read, not even times 0
    float lying[2] = {NAN, 3}, out, gates[2] = {2, 0};
    int rows[2] = {0, -1};
    combine_rows(&out, NULL, lying + 1, gates, rows, 1, 2, 1);
    check(out == 6, "the combination of one of two experts: %g", out);
    static const char* names[] = {"sigmoid", "lpr_mean", "matryoshka", "logit_norm"};
    for (EACH(i, names)) {
        Reference r = reference_open("golden_routers", names[i], of_floats);
        Model* m = r.m;
        long n, same = 1, V = m->config.vocab_size;
        int same_bits = !strcmp(names[i], "logit_norm");
        m->config.router.skip_below = same_bits ? 1 : metadata_number(r.file, "skip_below");
        model_forward(m, r.tokens, NULL, r.B, r.T);
        for (int l = 0; l < m->config.num_layers && !same_bits; l++) {
            if (!m->config.sparse[l]) continue;
            int* left = reference_ints(r.file, of_layer("skip.experts", l), NULL);
            for (int a = 0; a < r.B * r.T * m->topk[l]; a++)
                same &= (m->layers[l].experts[a] >= 0) == (a % m->topk[l] < left[a / m->topk[l]]);
        }
        float* logits = copy_floats(m->logits, n = r.B * r.T * V);
        if (same_bits) {
            m->config.router.skip_below = 0;
            for (int l = 0; l < m->config.num_layers; l++) m->topk[l] = 1;
            model_forward(m, r.tokens, NULL, r.B, r.T);
        }
        float* expected = same_bits ? m->logits : reference_floats(r.file, "skip.logits", NULL);
        double error = max_error(logits, expected, n);
        check(same && error <= (same_bits ? 0 : 1e-5), "%s: small gates skipped: logits, largest error %.1e", names[i],
              error);
    }
    static char text[2][sizeof ran.out];
    int ok = train_run("a", "--steps 10") == 0;
    for (int way = 0; way < 2; way++) {
        ok &= run_program("--model %s --prompt abc --tokens 40 --temperature 0 %s", temp("a"),
                          way ? "--topk 1" : "--skip-below 1") == 0;
        memcpy(text[way], ran.out, sizeof ran.out);
    }
    check(ok && !strcmp(text[0], text[1]) && strlen(text[0]) > 30, "--prompt: the text of --skip-below 1 and --topk 1");
    ok = run_program("--model %s --data %s --eval --load --seq 24 --skip-below 0.8 --trace %s", temp("a"),
                     temp("corpus.txt"), temp("trace.csv")) == 0;
    const char* said = strstr(ran.out, "tokens/s | ");
    double experts = said ? atof(said + 11) : 0;
    size_t bytes;
    char* trace = read_bytes(temp("trace.csv"), &bytes);
    check(ok && experts > 1 && experts < 2 && trace && strstr(trace, ",-1,1.000000,0.000000"),
          "--eval: %.3f experts a token, and the trace says which", experts);
}

// Routers that are not trained: the reference's blocks, and what training leaves of them.
static void test_fixed_routers(void) {
    Reference r = reference_open("golden_routers", "blocks", of_floats);
    long n = (long)r.m->config.num_experts * r.m->config.hidden_size;
    float* rows = r.m->weights.layers[1].router;
    fill_random(rows, n, 1);
    float* fixed = (float*)keep(A_BLOCK, fix_routers(r.m, 1));
    check(same_floats(rows, reference_floats(r.file, "blocks.1", NULL), n) && same_floats(rows, fixed + n, n),
          "blocks: the reference's rows");
    test_golden_model("golden_routers", "blocks", of_floats);
    for (int blocks = 0; blocks < 2; blocks++) {
        int ok = train_run("a", blocks ? "--steps 6 --fixed-router blocks" : "--steps 6 --fixed-router start") == 0;
        Model *m = open_model(temp("a"), FOR_SCORING, 1, 1), *start = new_model(&m->config, FOR_SCORING, 1, 1);
        model_init(start, 1);
        if (blocks) keep(A_BLOCK, fix_routers(start, 1));
        for (int l = 0; l < m->config.num_layers; l++)
            ok &= same_floats(m->weights.layers[l].router, start->weights.layers[l].router, 5 * 40);
        check(ok && !same_floats(m->weights.layers[1].down, start->weights.layers[1].down, 40),
              "%s: six steps leave every bit of the routers", blocks ? "blocks" : "start");
        show_failure(ok);
    }
    test_stop_and_resume("fixed router", "--fixed-router start");
}

// How many experts a token gets follows from its entropy: the references, and models that are trained, stopped, grown.
static void test_dynamic(void) {
    static const char* names[] = {"dynamic", "dynamic_norm"};
    for (EACH(i, names)) test_golden_model("golden_routers", names[i], of_floats);
    const char* some = "--router dynamic --experts 5 --topk 4 --dynamic-entropy 1.2 --dynamic-least 1";
    test_threads("dynamic", some);
    test_stop_and_resume("dynamic", some);
    char command[256];
    snprintf(command, sizeof command, "--steps 6 --dynamic-q 1.5 --dynamic-weight 0.1 %s", some);
    int ok = train_run("a", command) == 0;
    Config c;
    Error error = {""};
    ok &= config_read(&c, temp("a"), &error) && c.router.kind == ROUTER_DYNAMIC && c.router.dynamic_q == 1.5 &&
          c.router.dynamic_entropy == 1.2 && c.router.dynamic_share == 0.75 && c.router.dynamic_least == 1 &&
          c.router.dynamic_weight == 0.1;
    check(ok, "config.json says what the router is");
    show_failure(ok);
    ok = run_program("--model %s --data %s --eval --seq 24 --batch 2", temp("a"), temp("corpus.txt")) == 0;
    const char* said = strstr(ran.out, "tokens/s | ");
    double experts = said ? atof(said + 11) : 0;
    check(ok && experts >= 1 && experts < 4, "--eval: %.3f experts a token", experts);
    ok = run_program("--prompt X --model %s --tokens 8 --temperature 0", temp("a")) == 0;
    check(ok, "--prompt, with a cache");
    ok = train_run("b", "--steps 1 --router dynamic") == 0 && strstr(ran.out, "at most 5 per token") &&
         run_program("--model %s --data %s --eval --seq 24 --batch 2", temp("b"), temp("corpus.txt")) == 0;
    said = strstr(ran.out, "tokens/s | ");
    check(ok && said && atof(said + 11) > 2, "by default a token may get all: %s", said ? said : ran.out);
    snprintf(command, sizeof command, "--model %s --data %s --dynamic-q 2 --steps 1", temp("a"), temp("corpus.txt"));
    check_refused(2, command, "has 1.5; leave it out");
    up_begin();
    ok = train_run("one", "--steps 1 --router dynamic --experts 5 --topk 4 --dynamic-entropy 9 --dynamic-share 0.01 "
                          "--dynamic-least 1") == 0;
    UP("%s {}/one --experts 10 --check %s --check-batches 1 --seq 16", temp("one"), temp("corpus.txt"));
    check(ok && fabs(json_get(json_get(up_receipt(up_path("one")), "check"), "distinct_sources")->number - 1) < 1e-9,
          "where every token has one expert, a token reaches one source");
    UP(VARIANTS "dynamic {}/grown --experts 12 --topk 12");
    check(strstr(up_output, "not kept: how many experts a token gets depends on") != NULL, "growth: what is kept");
    UP(VARIANTS "dynamic {}/family --experts 12 --method family");
    double e = up_change(VARIANTS "dynamic", 0, up_path("family"));
    check(e <= 1e-6 && strstr(up_output, "kept exactly while"), "families: logits change by %.1e", e);
}

// ID's loads of the step before are of other experts than those of a grown model.
static void test_grown_bias(void) {
    Error error = {""};
    char path[PATH_SIZE];
    int ok = train_run("id", "--steps 4 --router sigmoid --bias-rule id") == 0;
    up_begin();
    UP("%s {}/id --experts 8 --optimizer copy", temp("id"));
    Json *old = keep_json(json_read(join_path(path, temp("id"), "trainer.json"), &error)),
         *grown = keep_json(json_read(join_path(path, up_path("id"), "trainer.json"), &error));
    check(ok && grown && json_get(old, "last_load")->count > 0 && json_get(grown, "last_load")->count == 0,
          "ID's loads of the last step stay behind");
    // the rule's own rate, also where it is new to a run that goes on; a rate that was given stays
    static const char* goes_on[][3] = {{"sign", "--steps 2 --router sigmoid", "--bias-rule id --steps 3"},
                                       {"given", "--steps 2 --router sigmoid --bias-rule id --bias-rate 0.01",
                                        "--bias-rule id --steps 3"}};
    for (int i = 0; i < 2; i++) {
        ok = train_run(goes_on[i][0], goes_on[i][1]) == 0 && resume_run(goes_on[i][0], goes_on[i][2]) == 0;
        Json* j = keep_json(json_read(join_path(path, temp("%s", goes_on[i][0]), "trainer.json"), &error));
        const Json* rate = json_get(json_get(j, "options"), "bias-rate");
        check(ok && rate && rate->number == (i ? 0.01 : 0.006), "%s: ID's rate is %s", goes_on[i][2],
              rate ? rate->string : "missing");
    }
}

static void test_balance(void) {
    static const char* refused[][2] = {{"--skip-below 0.5", "--skip-below: goes with --eval, --prompt"},
                                       {"--dense --skip-below 0.5", "a dense model has no experts"},
                                       {"--fixed-router blocks --experts 41 --hidden 40", "do not share a hidden"},
                                       {"--fixed-router start --router lpr", "use it with --router softmax or sig"},
                                       {"--dynamic-share 0.5", "--dynamic-share: belongs to --router dynamic"},
                                       {"--router dynamic --dynamic-q 1", "divides by Q - 1"},
                                       {"--router dynamic --topk 2 --dynamic-least 3", "a token gets at most --topk 2"},
                                       {"--bias-rule id", "only the router sigmoid has a bias"},
                                       {"--router sigmoid --bias-rule twice", "sign|quantile|id"},
                                       {"--router sigmoid --bias-rule quantile --bias-rate 0.1", "has no step"}};
    test_ranks();
    test_bias_values();
    write_corpus(temp("corpus.txt"), 20000);
    test_threads("quantile", "--router sigmoid --bias-rule quantile --topk-range 1:5");
    test_stop_and_resume("quantile", "--router sigmoid --bias-rule quantile");
    test_stop_and_resume("ID", "--router sigmoid --bias-rule id --bias-rate 0.01");
    test_grown_bias();
    test_skipping();
    test_fixed_routers();
    test_dynamic();
    for (EACH(i, refused)) check_refused(2, refused[i][0], refused[i][1]);
}
