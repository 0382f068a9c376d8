/*
luggage.c: what this program reads of a config.json to take along: the base of rotary positions in all its places,
windows, every member that is somebody else's, and the files beside it. Nothing of it is lost, by either program.
*/
#define FOREIGN "\"router_jitter_noise\": 0.10, \"attention_dropout\": 1e-01, \"initializer_range\": 0.0416,\n" \
    "  \"use_cache\": false, \"eos_token_id\": [2, 7], \"bos_token_id\": 1, \"\\u00e9\\\"\": -0.0,\n" \
    "  \"id2label\": {\"1\": \"\\u4f60\\ud83d\\ude00\", \"0\": [1.50, {\"deep\": [[ ]]}]},\n" \
    "  \"dtype_note\": \"float32\", \"large\": 123456789012345678901234567890, \"nothing\": null,\n" \
    "  \"output_router_logits\": true"
static const char* foreign_keys[] = {"router_jitter_noise", "attention_dropout", "initializer_range", "use_cache",
                                     "eos_token_id", "bos_token_id", "\xC3\xA9\"", "id2label", "dtype_note", "large",
                                     "nothing", "output_router_logits"};
static const char* foreign_files[] = {"chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json",
                                      "merges.txt", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json",
                                      "special_tokens_map.json", "preprocessor_config.json", "generation_config.json",
                                      "LICENSE", "License.md", "notice.txt", "tokenization_x.py", "source.spm",
                                      "tekken.json", "additional_chat_templates/tool_use.jinja"};

// A configuration of make_config with more members.
static const char* config_with(const char* type, const char* members) {
    static char text[8000];
    char* plain = make_config(type, !strcmp(type, "dots1") ? "n_routed_experts" : "num_experts", "4");
    snprintf(text, sizeof text, "%.*s, \"n_shared_experts\": 0, %s}", (int)strlen(plain) - 1, plain, members);
    return text;
}

static Json* luggage_of(const char* text) {
    Error error = {""};
    Json* j = json_parse(text, strlen(text), &error);
    if (!j) die(1, "%s in %s", error.text, text);
    return j;
}

// Members that say the same in both; prints the first that does not.
static int same_members(const Json* a, const Json* b, const char** keys, int count) {
    for (int i = 0; i < count; i++) {
        const char *x = json_raw(a, keys[i]), *y = json_raw(b, keys[i]);
        if (x && y && !strcmp(x, y)) continue;
        printf("       %s is %.60s, was %.60s\n", keys[i], y ? y : "gone", x ? x : "not there");
        return 0;
    }
    return 1;
}

// transformers: `rope_parameters = rope_scaling or rope_parameters`, and the base beside it comes last. What is scaled
// is written under both names, as it was.
#define LLAMA3 "\"rope_type\": \"llama3\", \"factor\": 32.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0"
static void test_rope_bases(void) {
    static const struct {
        const char* members;
        double base;
        const char* refused;
    } ropes[] = {
        {"\"rope_scaling\": {\"rope_type\": \"default\", \"rope_theta\": 5e5}", 5e5, ""},
        {"\"rope_scaling\": {\"rope_theta\": 500000}", 5e5, ""},
        {"\"rope_scaling\": {\"type\": \"default\"}", 1e4, ""},
        {"\"rope_scaling\": {}, \"rope_parameters\": {\"rope_theta\": 5e5}", 5e5, ""},
        {"\"rope_scaling\": {\"rope_theta\": 5e5}, \"rope_parameters\": {\"rope_theta\": 77.0}", 5e5, ""},
        {"\"rope_scaling\": {\"type\": \"default\"}, \"rope_parameters\": {\"rope_theta\": 77.0}", 1e4, ""},
        {"\"rope_scaling\": {\"full_attention\": {\"rope_theta\": 5e5}}", 0, "full_attention"},
        {"\"rope_parameters\": {\"rope_theta\": 5e5, \"factor\": 4.0}", 0, "factor"},
        {"\"rope_scaling\": {\"rope_theta\": 0}", 0, "rope_theta is 0"},
        {"\"rope_scaling\": {" LLAMA3 ", \"original_max_position_embeddings\": 8192}", 1e4, ""},
        {"\"rope_scaling\": {" LLAMA3 "}, \"original_max_position_embeddings\": 32", 1e4, ""},
        {"\"rope_scaling\": {\"type\": \"linear\", \"factor\": 4}", 1e4, ""},
        {"\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2.0}", 1e4, ""},
        {"\"rope_parameters\": {\"rope_type\": \"yarn\", \"factor\": 4, \"attention_factor\": 0.5, "
         "\"truncate\": false, \"rope_theta\": 5e5}", 5e5, ""}};
    for (int arch = 0; arch < NUM_ARCHS; arch++)
        for (EACH(i, ropes)) {
            Config c, back;
            Error error;
            Text t = {NULL, 0, 0};
            const char* text = config_with(archs[arch].model_type, ropes[i].members);
            Json* k = luggage_of(text);
            int ok = config_parse(&c, text, &error);
            if (ok) config_to_json(&t, &c, k, "float32");
            check(*ropes[i].refused ? !ok && strstr(error.text, ropes[i].refused)
                                    : ok && c.rope_theta == ropes[i].base && config_parse(&back, t.data, &error) &&
                                          !memcmp(&c, &back, sizeof c),
                  "%s: %s makes the base %g %s", archs[arch].model_type, ropes[i].members, ok ? c.rope_theta : 0.0,
                  error.text);
            const char *name, *scaled = NULL;
            if (ok && c.rope.type != ROPE_DEFAULT && rope_of(k, &name)) scaled = json_raw(k, name);
            if (scaled) check(strstr(t.data, scaled) != NULL, "%s: it is written as it was", archs[arch].model_type);
            json_free(k);
            free(t.data);
        }
}

// Each class has a window by its own keys; of three layers the last `layers` have one.
static void test_class_windows(void) {
    static const struct {
        Arch arch;
        const char* members;
        int window, layers;
    } windows[] = {{LLAMA, "\"sliding_window\": 16, \"use_sliding_window\": true", 0, 0},
                   {OLMOE, "\"sliding_window\": 16", 0, 0},
                   {MISTRAL, "\"x\": 1", 4096, 3},
                   {MISTRAL, "\"sliding_window\": null", 0, 0},
                   {MISTRAL, "\"sliding_window\": 16, \"use_sliding_window\": false", 16, 3},
                   {MIXTRAL, "\"x\": 1", 0, 0},
                   {MIXTRAL, "\"sliding_window\": 16, \"use_sliding_window\": false", 16, 3},
                   {MIXTRAL, "\"sliding_window\": 16, \"max_window_layers\": 3", 16, 3},
                   {QWEN3, "\"sliding_window\": 16", 0, 0},
                   {QWEN3, "\"sliding_window\": 16, \"use_sliding_window\": true", 0, 0},
                   {QWEN3, "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 1", 16, 2},
                   {QWEN3, "\"use_sliding_window\": true, \"max_window_layers\": 0", 4096, 3},
                   {QWEN3, "\"use_sliding_window\": true, \"max_window_layers\": 0, "
                           "\"layer_types\": [\"full_attention\"]", 0, 0},
                   {QWEN3, "\"sliding_window\": 16, \"use_sliding_window\": false, \"max_window_layers\": 0", 0, 0},
                   {QWEN3_MOE, "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 3", 16, 3},
                   {QWEN3_MOE, "\"sliding_window\": 16, \"max_window_layers\": 0", 0, 0},
                   {QWEN2, "\"sliding_window\": 16, \"max_window_layers\": 1", 0, 0},
                   {QWEN2, "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 1", 16, 2},
                   {QWEN2_MOE, "\"sliding_window\": 16, \"use_sliding_window\": true", 16, 2},
                   {QWEN2_MOE, "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 1", 16, 1},
                   {DOTS1, "\"x\": 1", 0, 0},
                   {DOTS1, "\"sliding_window\": 16, \"max_window_layers\": 0", 16, 3},
                   {DOTS1, "\"sliding_window\": 16, \"use_sliding_window\": false, \"max_window_layers\": 2", 16, 1},
                   {DOTS1, "\"sliding_window\": null, \"max_window_layers\": 0", 0, 0}};
    for (EACH(i, windows)) {
        const char* type = archs[windows[i].arch].model_type;
        Json* k = luggage_of(config_with(type, windows[i].members));
        Config c = tiny_config(windows[i].arch, 3, 0, 0);
        int layers, window = active_window(k, &c, &layers);
        check(window == windows[i].window && layers == windows[i].layers, "%s with %s: a window of %d in %d layers",
              type, windows[i].members, window, layers);
        json_free(k);
    }
}

// What config.json says of itself stays, as text, whatever the class; a key that the program writes is there once.
static void test_foreign_members(void) {
    for (int arch = 0; arch < NUM_ARCHS; arch++) {
        const char* text = config_with(archs[arch].model_type, FOREIGN
            ", \"auto_map\": {\"AutoConfig\": \"configuration_x.X\"}"
            ", \"rope_scaling\": {\"type\": \"default\", \"mrope_section\": [1, 2]}, \"torch_dtype\": \"bfloat16\"");
        static const char* written[] = {"rms_norm_eps", "rope_theta"};
        Config c, back;
        Error error;
        Text t = {NULL, 0, 0};
        Json *k = luggage_of(text), *now;
        check(config_parse(&c, text, &error), "%s with members that are not ours %s", archs[arch].model_type,
              error.text);
        config_to_json(&t, &c, k, "float16");
        now = luggage_of(t.data);
        check(config_parse(&back, t.data, &error) && !memcmp(&c, &back, sizeof c), "%s: the model comes back %s",
              archs[arch].model_type, error.text);
        check(same_members(k, now, foreign_keys, sizeof foreign_keys / sizeof foreign_keys[0]) &&
                  strstr(t.data, "\"mrope_section\": [1, 2]") && !json_raw(now, "rope_scaling") &&
                  !json_raw(now, "auto_map"),
              "%s: members that are not ours come back as they were written", archs[arch].model_type);
        check(same_members(k, now, written, 2), "%s: numbers that are the same stay as they were written",
              archs[arch].model_type);
        check(!strcmp(json_raw(now, "torch_dtype"), "\"float16\"") && !strcmp(json_raw(now, "dtype"), "\"float16\""),
              "%s: dtype is that of the file", archs[arch].model_type);
        json_free(k);
        json_free(now);
        free(t.data);
    }
}

// Members for a saved config.json, in the place of those of the same name.
static void add_members(const char* dir, const char* members) {
    char path[PATH_SIZE];
    Text t = {NULL, 0, 0};
    Error error = {""};
    text_print(&t, "{%s}", members);
    Json *j = luggage_read(dir, &error), *more = luggage_of(t.data);
    for (int i = 0; i < more->count; i++) json_set_raw(j, more->items[i]->key, more->items[i]->raw);
    t.length = 0;
    for (int i = 0; i < j->count; i++) {
        text_print(&t, i ? ",\n  " : "{\n  ");
        text_json_string(&t, j->items[i]->key);
        text_print(&t, ": ");
        text_add(&t, j->items[i]->raw, strlen(j->items[i]->raw));
    }
    text_print(&t, "\n}\n");
    if (!write_file(join_path(path, dir, "config.json"), t.data, t.length, &error)) die(1, "%s", error.text);
    json_free(j);
    json_free(more);
    free(t.data);
}

static Json* saved_luggage(const char* dir) {
    Error error = {""};
    Json* k = luggage_read(dir, &error);
    if (!k) die(1, "%s", error.text);
    return k;
}

static void check_carried(const char* what, const char* from, const char* to) {
    char a[PATH_SIZE], b[PATH_SIZE];
    Json *k = saved_luggage(from), *now = saved_luggage(to);
    int same = 0, files = sizeof foreign_files / sizeof foreign_files[0];
    check(same_members(k, now, foreign_keys, sizeof foreign_keys / sizeof foreign_keys[0]),
          "%s: every member of config.json that is not ours is there", what);
    for (int i = 0; i < files; i++) {
        int equal = same_file(join_path(a, from, foreign_files[i]), join_path(b, to, foreign_files[i]));
        if (!equal) printf("       %s is lost\n", foreign_files[i]);
        same += equal;
    }
    check(same == files && !exists(join_path(a, to, "notes.txt")) && !exists(join_path(a, to, "pytorch_model.bin")),
          "%s: %d of %d files are there, and nothing else", what, same, files);
    json_free(k);
    json_free(now);
}

static void make_carried(const char* name, Arch arch, int experts) {
    char path[PATH_SIZE];
    up_make(name, arch, 2, 24, 40, experts, experts ? 2 : 0, 1, 5);
    add_members(up_path(name), FOREIGN);
    strcpy(path, up_path(name));
    mkdir(join_path(path, up_path(name), "additional_chat_templates"), 0777);
    for (EACH(i, foreign_files))
        write_text(join_path(path, up_path(name), foreign_files[i]), foreign_files[i]);
    write_text(join_path(path, up_path(name), "tokenizer_config.json"), "{\"chat_template\": \"{{ x }}\"}");
    write_text(join_path(path, up_path(name), "notes.txt"), "mine");
    write_text(join_path(path, up_path(name), "pytorch_model.bin"), "weights");
}

// Both programs, one after the other, and a run that goes on.
static void test_carried(void) {
    up_begin();
    up_make_random_shard("random.bin", 900, 256);
    make_carried("carried", MIXTRAL, 4);
    make_carried("carried_dense", QWEN3, 0);
    UP("{}/carried {}/more --experts 6 --dtype bf16");
    check_carried("upcycle", up_path("carried"), up_path("more"));
    UP("{}/carried {}/more --experts 8 --force");
    check(exists(up_path("more/LICENSE")), "upcycle --force replaces what it has made, templates included");
    UP("{}/carried_dense {}/grown --experts 4 --layers every-2");
    check_carried("upcycle of a dense model", up_path("carried_dense"), up_path("grown"));
    const char* run = "--data %s --val none --seq 8 --batch 1 --out %s";
    char arguments[3 * PATH_SIZE], data[PATH_SIZE];
    strcpy(data, up_path("random.bin"));
    snprintf(arguments, sizeof arguments, run, data, up_path("trained"));
    int code = run_program("--model %s --steps 1 %s", up_path("grown"), arguments);
    if (code) check(0, "training failed: %s", ran.err);
    else check_carried("train_moe --model", up_path("grown"), up_path("trained"));
    code = run_program("--resume --steps 3 --save-every 1 %s", arguments);
    if (code) check(0, "going on failed: %s", ran.err);
    else check_carried("train_moe --resume", up_path("grown"), up_path("trained"));
}

// The balance loss of which the receipt speaks is there for transformers, too, or the receipt says that it is not.
static void test_balance_key(void) {
    static const struct {
        Arch arch;
        int experts;
        const char *members, *says, *value;
    } sources[] = {{LLAMA, 0, "\"x\": 1", "has output_router_logits true and router_aux_loss_coef 0.01", "true"},
                   {QWEN3, 0, "\"output_router_logits\": false", "has output_router_logits true", "true"},
                   {MIXTRAL, 3, "\"output_router_logits\": true", "has output_router_logits true", "true"},
                   {QWEN3_MOE, 3, "\"output_router_logits\": false", "which SRC's config.json has not", "false"},
                   {OLMOE, 3, "\"x\": 1", "which SRC's config.json has not", NULL},
                   {DOTS1, 3, "\"output_router_logits\": true", "transformers has none", "true"}};
    up_begin();
    for (EACH(i, sources)) {
        const char* type = archs[sources[i].arch].model_type;
        up_make("source", sources[i].arch, 2, 24, 40, sources[i].experts, sources[i].experts ? 2 : 0, 1, 5);
        add_members(up_path("source"), sources[i].members);
        UP("{}/source {}/result --experts 4 --force");
        Error error = {""};
        Json* k = saved_luggage(up_path("result"));
        Json* receipt = json_read(up_path("result/upcycle.json"), &error);
        const char* value = json_raw(k, "output_router_logits");
        const Json* says = json_get(receipt, "balance_loss");
        check(value && sources[i].value ? !strcmp(value, sources[i].value) : !value && !sources[i].value,
              "%s with %s: output_router_logits is %s", type, sources[i].members, value ? value : "not there");
        check(says && says->string && strstr(says->string, sources[i].says) && strstr(up_output, says->string),
              "%s: the receipt says %s", type, says && says->string ? says->string : "nothing");
        check(sources[i].experts || !strcmp(json_raw(k, "router_aux_loss_coef"), "0.01"), "%s: its coefficient", type);
        json_free(receipt);
        json_free(k);
    }
}

// A window goes with the model under the keys of its new class, or the model is refused.
static void test_window_keys(void) {
    static const struct {
        Arch arch;
        const char *members, *size, *use;       // NULL: refused; use NULL: no such key
    } sources[] = {
        {LLAMA, "\"sliding_window\": 16", "null", NULL},
        {MISTRAL, "\"sliding_window\": null", "null", NULL},
        {MISTRAL, "\"sliding_window\": 16", "16", NULL},
        {MISTRAL, "\"sliding_window\": 16, \"use_sliding_window\": false", "16", "false"},
        {QWEN3, "\"sliding_window\": 16, \"max_window_layers\": 0", "null", "false"},
        {QWEN3, "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 0", "16", "true"},
        {QWEN3, "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 2", "null", "false"},
        {QWEN3, "\"sliding_window\": 16, \"use_sliding_window\": true, \"max_window_layers\": 1", NULL, NULL}};
    up_begin();
    up_make_random_shard("random.bin", 900, 256);
    for (EACH(i, sources)) {
        const char* type = archs[sources[i].arch].model_type;
        up_make("source", sources[i].arch, 2, 24, 40, 0, 0, 0, 5);
        add_members(up_path("source"), sources[i].members);
        int code = up_run("", "{}/source {}/result --experts 4 --force"), layers;
        Config c;
        Error error = {""};
        Json *from = saved_luggage(up_path("source")), *k = sources[i].size ? saved_luggage(up_path("result")) : NULL;
        const char *size = json_raw(k, "sliding_window"), *use = json_raw(k, "use_sliding_window");
        if (!sources[i].size)
            check(code == 2 && strstr(up_output, "sliding_window 16 in 1 of 2 layers"), "%s with %s is refused: %s",
                  type, sources[i].members, up_output);
        else
            check(code == 0 && size && !strcmp(size, sources[i].size) &&
                      (use && sources[i].use ? !strcmp(use, sources[i].use) : !use && !sources[i].use),
                  "%s with %s: sliding_window %s, use_sliding_window %s", type, sources[i].members,
                  size ? size : "lost", use ? use : "not there");
        // training below the window keeps the keys; above it, nothing is computed
        int window = config_read(&c, up_path("source"), &error) ? active_window(from, &c, &layers) : -1;
        remove_tree(up_path("kept"));
        code = run_program("--model %s --data %s --val none --steps 1 --batch 1 --seq 8 --out %s", up_path("source"),
                           up_path("random.bin"), up_path("kept"));
        Json* now = code == 0 ? saved_luggage(up_path("kept")) : NULL;
        static const char* keys[] = {"sliding_window", "use_sliding_window", "max_window_layers"};
        for (int j = 0; j < 3; j++)
            if (json_raw(from, keys[j]))
                check(now && same_members(from, now, &keys[j], 1), "%s: train_moe keeps %s", type, keys[j]);
        code = run_program("--model %s --data %s --eval --seq 32", up_path("source"), up_path("random.bin"));
        check(window ? code == 2 && strstr(ran.err, "sliding_window 16") : code == 0,
              "%s with %s: sequences of 32 tokens are %s %s", type, sources[i].members, window ? "refused" : "read",
              ran.err);
        json_free(from);
        json_free(k);
        json_free(now);
    }
}

static void test_ends(void) {
    up_begin();
    write_text(up_path("generation_config.json"), "{\"eos_token_id\": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]}");
    Tokenizer* t = tokenizer_open(up_path("."), 30);
    check(t->num_eos == 11 && t->eos[10] == 20, "all of %d ends of sequence are kept", t->num_eos);
    tokenizer_close(t);
}

static void test_luggage(void) {
    test_rope_bases();
    test_class_windows();
    test_foreign_members();
    test_ends();
    test_carried();
    test_balance_key();
    test_window_keys();
}
