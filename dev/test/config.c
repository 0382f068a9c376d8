/*
config.c: config.json, what is refused, what is assumed where it says nothing, and that it survives a round trip.
*/
// A small valid configuration; `key` gets `value` (NULL: it is left out).
static char* make_config(const char* model_type, const char* key, const char* value) {
    static const char* pairs[][2] = {
        {"vocab_size", "50"},         {"hidden_size", "32"},        {"num_hidden_layers", "3"},
        {"num_attention_heads", "4"}, {"num_key_value_heads", "2"}, {"head_dim", "8"},
        {"intermediate_size", "20"},  {"hidden_act", "\"silu\""},   {"max_position_embeddings", "64"},
        {"rms_norm_eps", "1e-05"},    {"rope_theta", "10000.0"},    {"tie_word_embeddings", "false"},
        {"num_experts_per_tok", "2"}, {"num_experts", "4"},         {"moe_intermediate_size", "10"},
        {"norm_topk_prob", "true"}};
    Text t = {NULL, 0, 0};
    int set = !value;
    text_print(&t, "{\"model_type\": \"%s\"", model_type);
    for (EACH(i, pairs)) {
        const char* v = strcmp(pairs[i][0], key) ? pairs[i][1] : value;
        if (v) text_print(&t, ", \"%s\": %s", pairs[i][0], v);
        set |= !strcmp(pairs[i][0], key);
    }
    if (!set && *key) text_print(&t, ", \"%s\": %s", key, value);
    text_print(&t, "}");
    return (char*)keep(A_BLOCK, t.data);
}

static int config_parse(Config* c, const char* text, Error* error) {
    error->text[0] = 0;
    Json* j = keep_json(json_parse(text, strlen(text), error));
    return j && config_from_json(c, j, error);
}

static void check_config(const char* type, const char* key, const char* value, const char* expected) {
    Config c;
    Error error;
    char* text = make_config(type, key, value);
    int ok = config_parse(&c, text, &error);
    if (!expected)
        check(ok, "%s accepts %s %s %s", type, key, value ? value : "left out", error.text);
    else
        check(!ok && strstr(error.text, expected) && (strstr(error.text, key) || strstr(expected, "partial")),
              "%s refuses %s %s: %s", type, key, value ? value : "left out", error.text);
}

static void test_config_refusals(void) {
    static const struct {
        const char *type, *key, *value, *expected;
    } configs[] = {
        {"llama", "", "", NULL},
        {"mistral", "", "", NULL},
        {"mixtral", "", "", NULL},
        {"olmoe", "", "", NULL},
        {"qwen3", "", "", NULL},
        {"qwen3_moe", "", "", NULL},
        {"llama", "hidden_act", "\"gelu\"", "gelu"},
        {"llama", "hidden_act", "7", "only silu"},
        {"qwen3", "attention_bias", "true", "true"},
        {"qwen3", "attention_bias", "false", NULL},
        {"llama", "mlp_bias", "true", "true"},
        {"olmoe", "clip_qkv", "8.0", "clip_qkv"},
        {"olmoe", "clip_qkv", "null", NULL},
        {"llama", "rope_scaling", "{\"type\": \"linear\", \"factor\": 2.0}", "linear"},
        {"llama", "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8.0}", "llama3"},
        {"llama", "rope_scaling", "{\"factor\": 2.0}", "rope_scaling"},
        {"llama", "rope_scaling", "5", "not an object"},
        {"llama", "rope_scaling", "null", NULL},
        {"llama", "rope_scaling", "{\"rope_type\": \"default\"}", NULL},
        {"qwen3", "rope_parameters", "{\"rope_type\": \"yarn\", \"rope_theta\": 1e6}", "yarn"},
        {"qwen3", "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 1e6}", NULL},
        {"qwen3", "rope_parameters", "{\"rope_theta\": 1e6, \"partial_rotary_factor\": 0.5}", "partial_rotary_factor"},
        {"llama", "partial_rotary_factor", "0.25", "partial_rotary_factor"},
        {"llama", "quantization_config", "{\"bits\": 4}", "quantization_config"},
        {"qwen3_moe", "kv_lora_rank", "512", "kv_lora_rank"},
        {"llama", "hidden_size", "0", "is 0"},
        {"llama", "hidden_size", "\"32\"", "32"},
        {"llama", "hidden_size", "32.5", "32.5"},
        {"llama", "hidden_size", "-32", "-32"},
        {"llama", "num_hidden_layers", "513", "513"},
        {"llama", "vocab_size", "0", "is 0"},
        {"llama", "num_key_value_heads", "3", "is 4, not a multiple"},
        {"llama", "head_dim", "7", "is 7"},
        {"olmoe", "head_dim", "16", "OLMoE"},
        {"mixtral", "num_experts_per_tok", "5", "is 5, but num_experts is 4"},
        {"mixtral", "num_experts_per_tok", "0", "is 0"},
        {"mixtral", "num_experts", "0", "is 0"},
        {"qwen3_moe", "mlp_only_layers", "[3]", "mlp_only_layers"},
        {"qwen3_moe", "mlp_only_layers", "[-1]", "mlp_only_layers"},
        {"qwen3_moe", "mlp_only_layers", "[0, 2]", NULL},
        {"qwen3_moe", "decoder_sparse_step", "0", "is 0"},
        {"qwen3_moe", "decoder_sparse_step", "2", NULL},
        {"qwen3_moe", "norm_topk_prob", "1", "true or false"},
        {"llama", "tie_word_embeddings", "\"no\"", "true or false"},
        {"llama", "rms_norm_eps", "-1e-5", "-1e-5"},
        {"llama", "rms_norm_eps", "\"small\"", "small"},
        {"llama", "rope_theta", "1e99", "1e99"},
        {"qwen3", "layer_types", "[\"full_attention\", \"sliding_attention\"]", "sliding_attention"},
        {"qwen3", "layer_types", "[\"full_attention\", \"full_attention\", \"full_attention\"]", NULL},
        {"mistral", "sliding_window", "-5", "-5"}};
    for (EACH(i, configs))
        check_config(configs[i].type, configs[i].key, configs[i].value, configs[i].expected);
    Config c;
    Error error;
    static const char* types[] = {"gpt2", "deepseek_v3", "Llama", ""};
    for (int i = 0; i < 4; i++) {
        char* text = make_config(types[i], "", "");
        check(!config_parse(&c, text, &error) && strstr(error.text, types[i]) && strstr(error.text, "model_type"),
              "refuses model_type \"%s\": %s", types[i], error.text);
    }
    check(!config_parse(&c, "{}", &error) && strstr(error.text, "model_type"), "refuses an empty configuration: %s",
          error.text);
    check(!config_parse(&c, "[]", &error) && strstr(error.text, "model_type"), "refuses a list: %s", error.text);
    check(!config_parse(&c,
                        "{\"model_type\": \"llama\", \"vocab_size\": 50, \"hidden_size\": 4, \"num_hidden_layers\": 1, "
                        "\"num_attention_heads\": 8, \"intermediate_size\": 5}",
                        &error) &&
              strstr(error.text, "hidden_size is 4"),
          "refuses heads without a dimension: %s", error.text);
    // sizes that are each allowed, but whose product is not
    check(
        !config_parse(
            &c,
            "{\"model_type\": \"qwen3_moe\", \"vocab_size\": 50, \"hidden_size\": 1048576, \"num_hidden_layers\": 512, "
            "\"num_attention_heads\": 4, \"moe_intermediate_size\": 1048576, \"num_experts\": 65536}",
            &error) &&
            strstr(error.text, "parameters"),
        "refuses 10^20 parameters: %s", error.text);
}

// keys that are left out take what transformers' class has as its default
static void test_config_defaults(void) {
    static const struct {
        const char* type;
        int kv, head_dim, positions, window, experts, topk, width;
        double theta, eps, aux;
    } classes[] = {{"llama", 64, 8, 2048, 0, 0, 0, 0, 1e4, 1e-6, 0},
                   {"mistral", 8, 8, 131072, 4096, 0, 0, 0, 1e4, 1e-6, 0},
                   {"mixtral", 8, 8, 131072, 0, 8, 2, 20, 1e6, 1e-5, 0.001},
                   {"olmoe", 64, 8, 4096, 0, 64, 8, 20, 1e4, 1e-5, 0.01},
                   {"qwen3", 32, 128, 32768, 0, 0, 0, 0, 1e4, 1e-6, 0},
                   {"qwen3_moe", 4, 8, 32768, 0, 128, 8, 768, 1e4, 1e-6, 0.001}};
    for (EACH(i, classes)) {
        Config c;
        Error error;
        char text[400];
        snprintf(text, sizeof text,
                 "{\"model_type\": \"%s\", \"vocab_size\": 50, \"hidden_size\": 512, \"num_hidden_layers\": 2, "
                 "\"num_attention_heads\": 64, \"intermediate_size\": 20}",
                 classes[i].type);
        int ok = config_parse(&c, text, &error);
        check(ok && c.num_kv_heads == classes[i].kv && c.head_dim == classes[i].head_dim &&
                  c.max_position_embeddings == classes[i].positions && c.rope_theta == classes[i].theta &&
                  c.rms_norm_eps == classes[i].eps && !c.tie_word_embeddings,
              "%s: defaults %s", classes[i].type, error.text);
        check(ok && c.sliding_window == classes[i].window && c.num_experts == classes[i].experts &&
                  c.num_experts_per_tok == classes[i].topk && c.moe_intermediate_size == classes[i].width &&
                  c.router_aux_loss_coef == classes[i].aux && c.norm_topk_prob == (c.arch == MIXTRAL) &&
                  count_sparse(&c) == (classes[i].experts ? 2 : 0),
              "%s: defaults of window and experts", classes[i].type);
    }
}

static void test_config_values(void) {
    Config c;
    Error error;
    char ids[400] = "[1", with_ids[512];
    for (int i = 0; i < 60; i++) strcat(ids, ", 7");
    snprintf(with_ids, sizeof with_ids, "{\"model_type\": \"mixtral\", \"eos_token_id\": %s]}", ids);
    check(config_parse(&c, with_ids, &error) && !strncmp(c.token_ids[1], ids, strlen(ids)), "61 ends of a sequence");
    for (int i = 0; i < 60; i++) strcat(ids, ",7");
    snprintf(with_ids, sizeof with_ids, "{\"model_type\": \"mixtral\", \"eos_token_id\": %s]}", ids);
    check(!config_parse(&c, with_ids, &error) && strstr(error.text, "eos_token_id is longer than 255"),
          "more than can be kept is refused: %s", error.text);
    check(!config_parse(&c, "{\"model_type\": \"mixtral\", \"pad_token_id\": [\"a\"]}", &error) &&
              strstr(error.text, "pad_token_id holds what is not a number"),
          "a token that is no number: %s", error.text);
    check(config_parse(&c, "{\"model_type\": \"mixtral\"}", &error) && c.vocab_size == 32000 && c.hidden_size == 4096 &&
              c.num_layers == 32 && c.num_heads == 32 && c.intermediate_size == 14336,
          "a configuration without sizes is the class's own: %s", error.text);
    check(!config_parse(&c, "{\"model_type\": \"dots1\", \"n_shared_experts\": 0}", &error) &&
              strstr(error.text, "n_routed_experts"),
          "but Dots1 has no number of experts of its own: %s", error.text);
    char* text = make_config("qwen3", "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 777.0}");
    check(config_parse(&c, text, &error) && c.rope_theta == 777, "rope_parameters come before rope_theta");
    text = make_config("mixtral", "num_experts", NULL);
    check(config_parse(&c, text, &error) && c.num_experts == 8, "mixtral: eight experts by default");
    text[strlen(text) - 1] = 0;
    char longer[2000];
    snprintf(longer, sizeof longer, "%s, \"num_local_experts\": 6}", text);
    check(config_parse(&c, longer, &error) && c.num_experts == 6, "num_local_experts is read as well");
    static const struct {
        const char *type, *use, *window;
        int expected;
    } windows[] = {{"mistral", "", "16", 16},
                   {"mistral", "", "null", 0},
                   {"qwen3", "false", "16", 0},
                   {"qwen3", "true", "16", 16},
                   {"llama", "", "16", 0}};
    for (EACH(i, windows)) {
        text = make_config(windows[i].type, "sliding_window", windows[i].window);
        text[strlen(text) - 1] = 0;
        snprintf(longer, sizeof longer, "%s%s%s}", text, *windows[i].use ? ", \"use_sliding_window\": " : "",
                 windows[i].use);
        check(config_parse(&c, longer, &error) && c.sliding_window == windows[i].expected,
              "%s: sliding_window %s, use_sliding_window %s: %d", windows[i].type, windows[i].window,
              *windows[i].use ? windows[i].use : "left out", c.sliding_window);
    }
    text = make_config("qwen3_moe", "decoder_sparse_step", "2");
    config_parse(&c, text, &error);
    check(!c.sparse[0] && c.sparse[1] && !c.sparse[2], "decoder_sparse_step 2: the second of three layers");
    text = make_config("qwen3_moe", "mlp_only_layers", "[0, 2]");
    config_parse(&c, text, &error);
    check(!c.sparse[0] && c.sparse[1] && !c.sparse[2], "mlp_only_layers");
}

// config_to_json and back, for all classes, with every switch away from its default
static void test_config_round_trip(void) {
    for (int arch = 0; arch < NUM_ARCHS; arch++) {
        int moe = is_moe((Arch)arch);
        Config c = tiny_config((Arch)arch, 3, moe ? 5 : 0, moe ? 2 : 0), back;
        c.rms_norm_eps = 1e-6;
        c.rope_theta = 123457;
        c.tie_word_embeddings = 1;
        c.router_aux_loss_coef = moe ? 0.02 : 0;
        if (arch == MISTRAL || arch == MIXTRAL) c.sliding_window = 77;
        if (arch == DOTS1) c.router = ROUTER_SIGMOID;
        if (arch == DOTS1) c.qk_norm = QK_NORM_HEAD;
        if (arch == QWEN3_MOE || arch == OLMOE) c.norm_topk_prob = 0;
        if (arch == QWEN3_MOE) c.sparse[1] = 0;
        if (moe && arch != QWEN3_MOE && arch != DOTS1) c.intermediate_size = c.moe_intermediate_size;
        strcpy(c.token_ids[0], "1");
        strcpy(c.token_ids[1], arch == LLAMA ? "[]" : "[2, 7]");
        strcpy(c.token_ids[2], "null");
        Text t = {NULL, 0, 0};
        Error error;
        config_to_json(&t, &c);
        int ok = config_parse(&back, t.data, &error);
        check(ok && !memcmp(&c, &back, sizeof c), "%s: config.json and back %s", archs[arch].model_type, error.text);
        check(strstr(t.data, "\"rms_norm_eps\": 1e-06") && strstr(t.data, "\"rope_theta\": 123457.0"),
              "%s: floats stay floats", archs[arch].model_type);
        free(t.data);
    }
}
