/*
qwen2.c: Qwen2, whose q, k and v have biases, and mixtures with a shared expert, Qwen2-MoE and Dots1 as released: what
upcycle makes of them, their moments, runs that stop. Their logits and gradients are among the golden models'.
*/
#define SHARED_EXPERT "model.layers.1.mlp.shared_expert"
static const char* shared_tensors[] = {SHARED_EXPERT ".gate_proj.weight", SHARED_EXPERT ".up_proj.weight",
                                       SHARED_EXPERT ".down_proj.weight", SHARED_EXPERT "_gate.weight",
                                       "model.layers.1.self_attn.q_proj.bias", "model.layers.1.self_attn.v_proj.bias"};
enum { SHARED_DOWN = 2, BIASES = 4 };

static double largest_of(const float* x, long n) {
    double largest = 0;
    for (long i = 0; i < n; i++) largest = larger(largest, fabs((double)x[i]));
    return largest;
}

// Every method for a dense source: Qwen2 becomes Qwen2-MoE, whose shared expert has a down of zeros and nothing else.
static void test_qwen2_from_dense(void) {
    up_make("q2", QWEN2, 2, 24, 40, 0, 0, 0, 1);
    up_make_random_shard("text.bin", 2000, 256);
    char r[PATH_SIZE];
    join_path(r, up_dir, "result");
    for (int i = 0; i < NUM_METHODS; i++) {
        const char* name = methods[i].name;
        int kept = is(name, "copy") || is(name, "granular"), ok = 1, others = methods[i].traits & PARTS; // see shared.c
        if (!(methods[i].from & FROM_DENSE) || is(name, "domains") || others) continue; // a text for each expert
        UP("{}/q2 {}/result --force --experts 4 --method %s --optimizer %s %s", name,
           methods[i].carry ? "copy" : "reset",
           is(name, "granular")  ? "--granularity 2"
           : is(name, "cluster") ? "--calibrate {}/text.bin --calibrate-batches 1 --seq 16"
                                 : "");
        Config c;
        Error error = {""};
        ok &= config_read(&c, r, &error) && c.arch == QWEN2_MOE && c.qkv_bias && shared_expert_width(&c) == 32;
        for (int k = 0; k < BIASES; k++) {
            long n;
            float* x = up_tensor(r, shared_tensors[k], &n);
            ok &= k == SHARED_DOWN ? largest_of(x, n) == 0 : largest_of(x, n) > 0.03 && largest_of(x, n) < 0.1;
            char moment[96];
            snprintf(moment, sizeof moment, "%s.exp_avg", shared_tensors[k]);
            if (methods[i].carry) x = up_moment(r, moment, &n), ok &= largest_of(x, n) == 0;
        }
        for (int k = BIASES; k < 6; k++) ok &= up_same(up_path("q2"), shared_tensors[k], r, shared_tensors[k]);
        double change = up_change(up_path("q2"), 0, r);
        check(ok && isfinite(change) && (!kept || change <= 1e-6),
              "Qwen2, --method %s: a Qwen2-MoE, logits change by %.1e", name, change);
        if (is(name, "copy"))
            check(strstr(up_output, "kept exactly") && strstr(up_output, "a shared one of width 32") &&
                      strstr(up_output, "llama.cpp and MLX do not renormalise"),
                  "what is printed of it: %s", up_output);
    }
    // training on: what is added to the shared expert's zeros; stopping and resuming changes nothing
    write_corpus(temp("corpus.txt"), 4000);
    const char* run = "--model %s --data %s --batch 2 --seq 16 --val-every 1 --schedule constant --steps %d --out %s";
    long n;
    remove_tree(temp("a"));
    remove_tree(temp("b"));
    UP("{}/q2 {}/result --force --experts 4 --layers every-2");
    int code = run_program(run, r, temp("corpus.txt"), 4, temp("a"));
    code += run_program(run, r, temp("corpus.txt"), 2, temp("b")) + resume_run("b", "--steps 4");
    check(code == 0 && same_checkpoint("a", "b"), "a Qwen2-MoE with a dense layer: resuming is not stopping");
    float* down = up_tensor(temp("a"), shared_tensors[SHARED_DOWN], &n);
    check(largest_of(down, n) > 0, "and the shared expert has learned, %.1e", largest_of(down, n));
}

// Every method for a mixture: the shared expert is copied, with its moments.
static void test_qwen2_from_mixture(void) {
    char source[PATH_SIZE], r[PATH_SIZE];
    join_path(source, up_dir, "q2moe");
    join_path(r, up_dir, "larger");
    up_make("q2moe", QWEN2_MOE, 2, 24, 16, 3, 2, 1, 5);
    for (int i = 0; i < NUM_METHODS; i++) {
        int ok = 1, family = is(methods[i].name, "family");
        if (!(methods[i].from & FROM_MOE) || is(methods[i].name, "merge")) continue;      // makes fewer
        UP("{}/q2moe {}/larger --force --experts 6 --topk %d --method %s --optimizer %s", family ? 2 : 4,
           methods[i].name, methods[i].carry ? "scale" : "reset");
        for (int k = 0; k < 6; k++) {
            long n, m;
            char moment[96];
            snprintf(moment, sizeof moment, "%s.exp_avg_sq", shared_tensors[k]);
            ok &= up_same(source, shared_tensors[k], r, shared_tensors[k]);
            if (!methods[i].carry) continue;
            float *x = up_moment(source, moment, &n), *y = up_moment(r, moment, &m);
            ok &= n == m && same_floats(x, y, n);
        }
        double change = up_change(source, 0, r);
        check(ok && isfinite(change) && (!(methods[i].traits & EQUAL) || change <= 1e-6),
              "Qwen2-MoE, --method %s: the shared expert as it was, logits change by %.1e", methods[i].name, change);
    }
    UP("{}/q2moe {}/larger --force --experts 2 --select weight");
    check(up_same(source, shared_tensors[0], r, shared_tensors[0]), "a smaller Qwen2-MoE");
    UP(GOLDEN "dots1_shared {}/larger --force --experts 14 --topk 6 --router copy");
    double change = up_change(GOLDEN "dots1_shared", 0, r);
    check(change <= 1e-6, "Dots1 as released, 7 -> 14 experts: logits change by %.1e", change);
    UP(GOLDEN "dots1_shared {}/larger --force --ffn-to 10");
    change = up_change(GOLDEN "dots1_shared", 0, r);
    check(change <= 1e-6, "Dots1 as released, --ffn-to widens the shared expert, too: logits change by %.1e", change);
    up_make("none", QWEN2_MOE, 2, 24, 1, 3, 2, 1, 5);
    UP("{}/none {}/larger --force --experts 6 --topk 4");
    change = up_change(up_path("none"), 0, r);
    check(change <= 1e-6, "a shared expert of width 0: logits change by %.1e", change);
}

// Model.observe: whether scratch.act is what the routed experts, not the shared one, have made of gate_up.
static void act_is_the_experts(Model* m, int l) {
    const LayerActivations* s = &m->layers[l];
    int I = layer_width(&m->config, l), R = m->batch * m->length * m->topk[l];
    float* act = (float*)checked_malloc(sizeof(float) * (size_t)R * I);
    swiglu_forward(act, s->gate_up, R, I);
    *(int*)m->observer &= same_floats(act, m->scratch.act, (long)R * I);
    free(act);
}

static void test_qwen2_observed(void) {
    Error error = {""};
    Config c;
    int tokens[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, ok = 1;
    config_read(&c, GOLDEN "qwen2_moe", &error);
    Model* m = model_create(&c, FOR_SCORING, 1, 12, 12, NULL);
    checkpoint_load(m, GOLDEN "qwen2_moe", &error);
    m->observe = act_is_the_experts;
    m->observer = &ok;
    model_forward(m, tokens, NULL, 1, 12);
    check(ok, "what calibration looks at is the routed experts', beside a shared expert");
    model_free(m);
}

static void test_qwen2(void) {
    up_begin();
    test_qwen2_observed();
    // sources with and without biases: all but the FFNs is SRC's, also where layers are added
    up_make("plain", LLAMA, 2, 24, 40, 0, 0, 0, 1);
    up_make("biased", QWEN2, 2, 24, 40, 0, 0, 0, 1);
    int mixed = up_run("", "{}/biased {}/mixed --sources {}/plain --experts 4 --layers-to 3");
    check(mixed == 0 && strstr(up_output, "as they differ in model_type"), "Qwen2 and Llama mixed: %.80s", up_output);
    check(up_run("", "{}/biased {}/mean --sources {}/plain --experts 4 --rest mean") == 2,
          "no mean with and without biases");
    test_qwen2_from_dense();
    test_qwen2_from_mixture();
    // a window in all layers: Qwen2-MoE has one in every second
    up_make("window", QWEN2, 2, 24, 40, 0, 0, 0, 1);
    size_t n;
    char *text = read_bytes(up_path("window/config.json"), &n), *end = strrchr(text, '"');
    while (end > text && *end != ',') end--;    // its last member goes
    *end = 0;
    FILE* f = fopen(up_path("window/config.json"), "w");
    char* none = strstr(text, "\"sliding_window\": null");
    fprintf(f, "%.*s\"use_sliding_window\": true, \"max_window_layers\": 0, \"sliding_window\": 8%s}",
            (int)(none - text), text, none + strlen("\"sliding_window\": null"));
    fclose(f);
    int code = up_run("", "{}/window {}/windowed --experts 4");
    check(code == 2 && strstr(up_output, "sliding_window 8 in 2 of 2 layers"), "a Qwen2 with a window: %s", up_output);
}
