/*
growth.c: more experts for a token, growth in stages, and what everybody asks of an upcycled model first. The logits of
a grown model are compared with those that transformers computes in fp64 for its source.
*/
// The largest difference between a model's logits and those of a reference, on the reference's tokens.
static double up_error(const char* dir, SafeTensors* reference) {
    long shape[4], n;
    int* tokens = reference_ints(reference, "tokens", shape);
    float* expected = reference_floats(reference, "logits", &n);
    Model* m = open_model(dir, FOR_SCORING, (int)shape[0], (int)shape[1]);
    model_forward(m, tokens, tokens, (int)shape[0], (int)shape[1]);
    return n == shape[0] * shape[1] * m->config.vocab_size ? max_error(m->logits, expected, n) : INFINITY;
}

static SafeTensors* up_reference(const char* golden) {
    char path[PATH_SIZE];
    Error error = {""};
    return keep_file(safetensors_open(join_path(path, golden, "reference.safetensors"), &error));
}

static const char* up_said(const char* dir) { return json_get(up_receipt(dir), "function")->string; }

// The standard deviation of the difference of n numbers, over that of all N numbers of w
static double up_noise(const float* a, const float* b, long n, const float* w, long N) {
    double sum = 0, squares = 0, change = 0;
    for (long i = 0; i < N; i++) sum += w[i], squares += (double)w[i] * w[i];
    for (long i = 0; i < n; i++) change += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sqrt(change / (double)n) / sqrt((squares - sum * sum / (double)N) / (double)(N - 1));
}

// Orthogonal Growth: m E experts, m K of them for a token, compute what E and K do; with noise nearly.
static void test_up_multiply(void) {
    static const struct { const char *golden, *options, *says; } cases[] = {
        {GOLDEN "mixtral", "--experts 10", "kept exactly: the top 4 are 2 copies of each of SRC's 2"},
        {GOLDEN "mixtral_top1", "--experts 15 --topk 3", "kept exactly: the top 3 are 3 copies"},
        {GOLDEN "olmoe", "--experts 18", "kept exactly: the top 9 are 3 copies of each of SRC's 3"},
        {GOLDEN "qwen3_moe_mlp_only", "--experts 12", "kept exactly"},
        {GOLDEN "dots1", "--experts 12", "kept exactly"},
        {VARIANTS "sigmoid", "--experts 10", "kept exactly"},
        {VARIANTS "lpr", "--experts 12", "kept exactly"},
        {VARIANTS "logit_norm", "--experts 12", "kept exactly"},
        {VARIANTS "sigmoid_top1", "--experts 8", "not kept: sigmoid gates are not renormalised, so 2 copies add up"}};
    up_begin();
    for (EACH(i, cases)) {
        char name[16];
        snprintf(name, sizeof name, "m%d", (int)i);
        UP("%s {}/%s %s --method multiply", cases[i].golden, name, cases[i].options);
        double e = up_error(up_path(name), up_reference(cases[i].golden));
        int kept = cases[i].says[0] == 'k', right = kept ? e <= 1e-5 : e > 1e-2;
        check(right && !strncmp(up_said(up_path(name)), cases[i].says, strlen(cases[i].says)),
              "%s: logits within %.1e of fp64; %s", cases[i].golden, e, up_said(up_path(name)));
    }
    // all experts chosen: nothing can change but by the noise, which is first order in alpha
    double change[2];
    for (int i = 0; i < 2; i++) {
        UP(GOLDEN "qwen3_moe_all {}/n%d --experts 8 --method multiply --strength %g", i, i ? 0.01 : 0.005);
        change[i] = up_change(GOLDEN "qwen3_moe_all", 0, up_path(i ? "n1" : "n0"));
    }
    check(change[0] > 1e-4 && change[0] < 0.05 && fabs(change[1] / change[0] - 2) < 0.1 &&
              !strcmp(up_said(up_path("n1")), "not kept: copies differ from their sources"),
          "noise of 0.005 and 0.01 std changes the logits by %.1e and %.1e", change[0], change[1]);
    // the noise itself: alpha std of the source's matrix, the whole router, the whole bias; originals stay
    UP(VARIANTS "sigmoid {}/noisy --experts 200 --method multiply --strength 0.1");
    const char *src = VARIANTS "sigmoid", *dst = up_path("noisy");
    const char* down = "model.layers.0.mlp.experts.%d.down_proj.weight";
    static const char* routers[] = {"model.layers.0.mlp.gate.weight",
                                    "model.layers.0.mlp.gate.e_score_correction_bias"};
    for (int i = 0; i < 2; i++) {
        long n, N;
        float *w = up_tensor(src, routers[i], &n), *v = up_tensor(dst, routers[i], &N), *copies = kept_floats(N - n);
        for (long k = 0; k < N - n; k++) copies[k] = w[k % n];
        double std = up_noise(v + n, copies, N - n, w, n);
        check(N == 40 * n && same_floats(v, w, n) && fabs(std - 0.1) < 0.015, "%s: noise of %.3f std", routers[i], std);
    }
    double sum = 0;
    char name[96], source[96];
    for (int j = 5; j < 35; j++) {
        long n;
        snprintf(name, sizeof name, down, j);
        snprintf(source, sizeof source, down, j % 5);
        float *w = up_tensor(src, source, &n), *v = up_tensor(dst, name, NULL);
        sum += up_noise(v, w, n, w, n) / 30;
    }
    check(fabs(sum - 0.1) < 0.003, "experts: noise of %.4f std", sum);
    static const struct { const char *arguments, *says; } refused[] = {
        {"mixtral {}/x --experts 8", "wants a multiple of SRC's 5"},
        {"mixtral {}/x --experts 10 --topk 2", "makes it 4"},
        {"mixtral {}/x --experts 5", "as many experts as SRC"},
        {"mixtral {}/x --experts 10 --select weight", "wants equal ones"},
        {"qwen3 {}/x --experts 10", "is dense"},
        {"mixtral {}/x --experts 10 --router-bias reset", "have no bias"}};
    for (EACH(i, refused))
        check(up_run("", GOLDEN "%s --method multiply", refused[i].arguments) == 2 &&
                  strstr(up_output, refused[i].says), "refused: %s", refused[i].arguments);
}

// EMO: E -> 2 E -> 4 E, one command for each stage; new experts are random and the bias that selects starts again.
static void test_up_stages(void) {
    up_begin();
    UP(VARIANTS "sigmoid {}/two --experts 10 --method random --router-bias reset");
    UP("{}/two {}/four --experts 20 --method random --router-bias reset");
    long n;
    const char *router = "model.layers.1.mlp.gate.weight", *bias = "model.layers.1.mlp.gate.e_score_correction_bias";
    float *b = up_tensor(up_path("four"), bias, &n), *old = up_tensor(VARIANTS "sigmoid", bias, NULL), largest = 0;
    for (long j = 0; j < n; j++) largest = fmaxf(largest, fabsf(b[j]));
    check(n == 20 && largest == 0 && old[0] != 0, "the bias of all 20 experts is 0");
    float *w = up_tensor(VARIANTS "sigmoid", router, &n), *v = up_tensor(up_path("four"), router, NULL);
    float* stage = up_tensor(up_path("two"), router, NULL);
    check(same_floats(v, w, n) && same_floats(v, stage, 2 * n) && memcmp(v + 2 * n, v + n, floats_bytes(n)),
          "rows of the router: SRC's, the first stage's, the second's");
    check(up_same(VARIANTS "sigmoid", "model.layers.0.mlp.experts.4.up_proj.weight", up_path("four"),
                  "model.layers.0.mlp.experts.4.up_proj.weight") &&
              up_same(up_path("two"), "model.layers.0.mlp.experts.9.down_proj.weight", up_path("four"),
                      "model.layers.0.mlp.experts.9.down_proj.weight"),
          "experts of earlier stages stay, bit for bit");
    Json* j = up_receipt(up_path("four"));
    const Json* parent = json_get(j, "parent");
    check(json_get(j, "experts")->items[1]->number == 20 && json_get(parent, "experts")->items[0]->number == 5 &&
              up_list_is(up_path("two"), "source", 1, "0 1 2 3 4 -1 -1 -1 -1 -1") &&
              !strncmp(up_said(up_path("four")), "not kept: 10 experts of each sparse layer are new", 49),
          "lineage of both stages; %s", up_said(up_path("four")));
    check(up_run("", "--inspect {}/four") == 0 && strstr(up_output, "random, 10 -> 20") &&
              strstr(up_output, "random, 5 -> 10"), "--inspect prints both stages");
    UP(VARIANTS "sigmoid {}/same --experts 5 --router-bias reset");
    check(!strcmp(up_said(up_path("same")), "not kept: the bias that experts are selected by is 0 again") &&
              up_change(VARIANTS "sigmoid", 0, up_path("same")) > 1e-3, "a bias that is reset changes the routing");
}

// What users of upcycling ask first.
static void test_up_identity(void) {
    static const char* models[] = {GOLDEN "llama", GOLDEN "qwen3"};
    AdamW adamw = {0.9, 0.95, 1e-8, 0.1, 1e9};
    up_begin();
    for (EACH(i, models)) {
        SafeTensors* reference = up_reference(models[i]);
        long shape[4];
        int *tokens = reference_ints(reference, "tokens", shape), *targets = reference_ints(reference, "targets", NULL);
        int B = (int)shape[0], T = (int)shape[1], same = 1;
        char name[32];
        snprintf(name, sizeof name, "one%d", (int)i);
        UP("%s {}/%s --experts 1 --topk 1", models[i], name);
        Model* both[] = {open_model(models[i], FOR_TRAINING, B, T), open_model(up_path(name), FOR_TRAINING, B, T)};
        float losses[2][4];
        for (int step = 0; step < 4; step++) {
            for (int k = 0; k < 2; k++) {
                losses[k][step] = model_forward(both[k], tokens, targets, B, T);
                model_backward(both[k], 1);
            }
            same &= same_floats(both[0]->logits, both[1]->logits, (long)B * T * both[0]->config.vocab_size);
            for (int k = 0; k < 2; k++) model_update(both[k], &adamw, 1e-2, step + 1);
        }
        check(same && same_floats(losses[0], losses[1], 4) && losses[0][3] < losses[0][0],
              "%s: one expert is the dense model, bit for bit, in 4 steps of training", models[i]);
        for (int K = 1; K <= 5; K++) {
            snprintf(name, sizeof name, "any%d_%d", (int)i, K);
            UP("%s {}/%s --experts 5 --topk %d --norm-topk 1 --router-std 1", models[i], name, K);
            double e = up_error(up_path(name), reference);
            check(e <= 1e-5, "%s: %d of 5 copies: logits within %.1e of fp64", models[i], K, e);
        }
        // the router of copies learns from the balance loss alone, and that it learns
        Model* m = open_model(up_path(i ? "any1_2" : "any0_2"), FOR_TRAINING, B, T);
        int last = m->config.num_layers - 1;
        long n = 5L * m->config.hidden_size;
        float *w = m->weights.layers[last].router, *dw = m->dweights.layers[last].router, *was = copy_floats(w, n);
        float *direction = random_floats(n, 1), h = 1e-3f;
        double size[2], along = 0, aux[2];
        for (int k = 0; k < 2; k++) {
            memset(m->grads, 0, floats_bytes(m->layout.total));
            m->balance.aux = (float)k;
            model_forward(m, tokens, targets, B, T);
            model_backward(m, 1);
            size[k] = sqrt(sum_of_squares(dw, n));
        }
        for (long k = 0; k < n; k++) along += (double)dw[k] * direction[k];
        for (int k = 0; k < 2; k++) {
            for (long d = 0; d < n; d++) w[d] = was[d] + (k ? h : -h) * direction[d];
            take_losses(m);
            model_forward(m, tokens, targets, B, T);
            aux[k] = take_losses(m).aux;
        }
        double slope = (aux[1] - aux[0]) / (2 * h);
        check(size[0] < 1e-5 * size[1] && fabs(slope - along) < 0.02 * fabs(slope),
              "%s: d(aux)/d(router) is in the gradient: %.4f, by differences %.4f; without it %.1e of %.1e", models[i],
              along, slope, size[0], size[1]);
    }
}

// Depth and width: logits of transformers for models that were grown by dev/reference/make_growth_references.py.
static void test_up_depth(void) {
    static const struct { const char *reference, *arguments, *says; } cases[] = {
        {"qwen3_interpose", "qwen3 {}/%s --layers-to 5 --new-layers copy", "not kept: copied layers add"},
        {"llama_stack", "llama {}/%s --layers-to 5 --depth stack --new-layers copy --ffn-to 38", "not kept: copied"},
        {"qwen3_moe_interpose", "qwen3_moe {}/%s --layers-to 6 --new-layers copy --ffn-to 18 --experts 10 --method "
                                "multiply", "not kept: copied layers add"},
        {"olmoe_stack", "olmoe {}/%s --layers-to 3 --depth stack --new-layers copy --ffn-to 28 --experts 18 --method "
                        "multiply", "not kept: copied layers add"},
        {"qwen3_zero", "qwen3 {}/%s --layers-to 6 --depth stack --ffn-to 30", "kept exactly; the new layers add 0"},
        {"mixtral_zero", "mixtral {}/%s --layers-to 5 --ffn-to 22 --experts 15 --method multiply", "kept exactly: the"},
        {"dots1_zero", "dots1 {}/%s --layers-to 3 --depth stack --ffn-to 28 --experts 12 --method multiply", "kept ex"},
        {"qwen3_moe_zero", "qwen3_moe {}/%s --layers-to 7 --ffn-to 18 --experts 10 --method multiply", "kept exactly"},
        // up, then out, in one call
        {"qwen3_zero", "qwen3 {}/%s --layers-to 6 --ffn-to 30 --experts 4 --topk 3", "kept exactly: gates sum to 1"},
        {"qwen3_zero", "qwen3 {}/%s --layers-to 4 --ffn-to 60 --experts 8 --layers every-2 --method granular "
                       "--granularity 4", "kept exactly: gates sum to 1"},
        {"qwen3_interpose", "qwen3 {}/%s --layers-to 5 --new-layers copy --experts 2 --topk 1", "not kept: copied"}};
    up_begin();
    for (EACH(i, cases)) {
        char arguments[256], name[16], path[PATH_SIZE];
        Error error = {""};
        snprintf(name, sizeof name, "g%d", (int)i);
        const char* at = strstr(cases[i].arguments, "%s");
        int before = (int)(at - cases[i].arguments);
        snprintf(arguments, sizeof arguments, "%.*s%s%s", before, cases[i].arguments, name, at + 2);
        UP(GOLDEN "%s", arguments);
        snprintf(path, sizeof path, "dev/reference/golden_growth/%s.safetensors", cases[i].reference);
        double e = up_error(up_path(name), keep_file(safetensors_open(path, &error)));
        check(e <= 1e-5 && !strncmp(up_said(up_path(name)), cases[i].says, strlen(cases[i].says)),
              "%s: logits within %.1e of fp64; %s", cases[i].arguments, e, up_said(up_path(name)));
    }
    long n;
    float *o = up_tensor(up_path("g4"), "model.layers.5.self_attn.o_proj.weight", &n), largest = 0;
    for (long i = 0; i < n; i++) largest = fmaxf(largest, fabsf(o[i]));
    check(largest == 0 && up_same(up_path("g4"), "model.layers.5.self_attn.q_proj.weight", GOLDEN "qwen3",
                                  "model.layers.2.self_attn.q_proj.weight") &&
              up_same(up_path("g4"), "model.layers.2.self_attn.o_proj.weight", GOLDEN "qwen3",
                      "model.layers.2.self_attn.o_proj.weight"), "o_proj of a new layer is 0, all else a copy");
    const Json* growth = json_get(up_receipt(up_path("g9")), "growth");
    check(json_get(growth, "layers")->items[1]->number == 0 && json_get(growth, "new")->items[1]->number == 1 &&
              json_get(growth, "width")->items[1]->number == 60, "the receipt tells layers and width");
    // the lineage and the card tell it, too, those of a model that was made of it as well
    UP(GOLDEN "qwen3 {}/stacked --layers-to 6 --depth stack --ffn-to 30");
    UP("{}/stacked {}/out --experts 2");
    UP(GOLDEN "qwen3_moe {}/grown --layers-to 8 --ffn-to 36");
    char card[PATH_SIZE];
    size_t length;
    Error unread = {""};
    static const struct { const char *dir, *line; } grown[] = {
        {"stacked", "copy%s3 -> 6 layers by stack, FFN 15 -> 30"}, {"out", "copy%sdense -> 2 experts"},
        {"out", "copy%s3 -> 6 layers by stack, FFN 15 -> 30"}, {"g9", "granular%sdense -> 8 experts, 3 -> 4 layers by"},
        {"grown", "copy%s4 -> 8 layers by interpose, experts of width 9 -> 36"}};
    for (EACH(i, grown)) {
        char line[96], listed[96];
        snprintf(line, sizeof line, grown[i].line, ", ");
        snprintf(listed, sizeof listed, grown[i].line, "`: ");
        char* text = read_file(join_path(card, up_path(grown[i].dir), "README.md"), 1 << 20, &length, &unread);
        keep(A_BLOCK, text);
        int told = up_run("", "--inspect {}/%s", grown[i].dir) == 0 && strstr(up_output, line) != NULL;
        check(told && text && strstr(text, listed) &&
                  (strstr(text, "which expert came") != NULL) == (strcmp(grown[i].dir, "stacked") != 0),
              "%s: %s", grown[i].dir, line);
    }
    // copies of a unit: what separates them, and what does not
    UP(GOLDEN "qwen3 {}/drop2 --ffn-to 30 --experts 2 --method drop --drop-ratio 0.4");
    check(strstr(up_output, "about 36 % of the pairs of copies of a unit are still equal") != NULL, "drop: some pairs");
    UP(GOLDEN "qwen3 {}/noise2 --ffn-to 30 --experts 2 --method noise-replace");
    long width, hidden = 0;
    float* gate = up_tensor(up_path("noise2"), "model.layers.0.mlp.experts.1.gate_proj.weight", &width);
    int twins = 0;
    hidden = width / 30;
    for (int u = 0; u < 15; u++) twins += same_floats(gate + u * hidden, gate + (u + 15) * hidden, hidden);
    check(twins == 0 && !strstr(up_output, "of a unit"), "noise-replace: none");
    UP(GOLDEN "qwen3_moe {}/moe2 --ffn-to 18 --experts 8 --method drop");
    check(strstr(up_output, "own experts no method separates them") != NULL, "a mixture: its experts keep theirs");
    // what config.json says of layers is said of all of them
    up_make("w", QWEN3, 2, 24, 40, 0, 0, 0, 5);
    add_members(up_path("w"), "\"sliding_window\": 8, \"use_sliding_window\": true, \"max_window_layers\": 2");
    UP("{}/w {}/wide --layers-to 5");
    Json* k = keep_json(saved_luggage(up_path("wide")));
    check(!strcmp(json_raw(k, "max_window_layers"), "5"), "max_window_layers grows: no layer gets a window");
    UP("{}/w {}/wider --layers-to 5 --experts 4");      // with another class, the windows are looked at once more
    add_members(up_path("w"), "\"layer_types\": [\"full_attention\", \"full_attention\"]");
    UP("{}/w {}/typed --layers-to 3 --experts 2");
    const Json* types = json_get(keep_json(saved_luggage(up_path("typed"))), "layer_types");
    check(types && types->count == 3, "layer_types grows");
    up_make("w", QWEN3, 2, 24, 40, 0, 0, 0, 5);
    add_members(up_path("w"), "\"sliding_window\": 8, \"use_sliding_window\": true, \"max_window_layers\": 1");
    check(up_run("", "{}/w {}/x --layers-to 3") == 2 && strstr(up_output, "in 1 of 2 layers"), "refused: one window");
    const char* arguments[] = {"upcycle", GOLDEN "qwen3", "x", "--layers-to", "5", "--ffn-to", "60", "--experts", "3",
                               "--method", "drop"};
    static Plan plan; // what a plan owns lives as long as the program
    memset(&the_plan, 0, sizeof the_plan);
    read_options(11, (char**)arguments);
    plan = *plan_create(GOLDEN "qwen3");
    check(plan.num_outputs > 90 && up_pieces_differ(&plan) == 0, "grown and dropped, in pieces of 3 rows: the same");
    static const struct { const char *arguments, *says; } refused[] = {
        {"qwen3 {}/x --layers-to 2", "none can be taken away"},
        {"qwen3 {}/x --experts 2 --depth stack", "there are none; --layers-to"},
        {"qwen3 {}/x --ffn-to 45", "15 times 2, 4, 8"},
        {"qwen3 {}/x --ffn-to 5", "15 times 2, 4, 8"},
        {"qwen3 {}/x --layers-to 5 --topk 2", "DST has none; --experts"},
        {"qwen3 {}/x --layers-to 5 --layers every-2", "DST has none; --experts"},
        {"qwen3 {}/x --layers-to 5 --method drop", "--experts M is missing"},
        {"qwen3 {}/x --layers-to 5 --experts 4 --optimizer copy", "--optimizer reset fits"},
        {"qwen3 {}/x --layers-to 5 --experts 4 --method cluster --calibrate x", "grow first"}};
    for (EACH(i, refused))
        check(up_run("", GOLDEN "%s", refused[i].arguments) == 2 && strstr(up_output, refused[i].says), "refused: %s",
              refused[i].arguments);
}

static void test_up_growth(void) {
    test_up_depth();
    test_up_multiply();
    test_up_stages();
    test_up_identity();
}
