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
        {"llama", "rope_scaling", "{\"type\": \"linear\", \"factor\": 2.0}", NULL},
        {"llama", "rope_scaling", "{\"type\": \"linear\"}", "rope_scaling: factor is missing"},
        {"llama", "rope_scaling", "{\"rope_type\": \"longrope\", \"factor\": 2.0}", "longrope"},
        {"llama", "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8.0}", "low_freq_factor is missing"},
        {"llama", "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
                                  "\"high_freq_factor\": 4}", "high_freq_factor is not above"},
        {"llama", "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": -4}", "factor is -4"},
        {"llama", "rope_scaling", "{\"rope_type\": \"yarn\", \"factor\": 4, \"beta_fast\": 16}", NULL},
        {"llama", "rope_scaling", "{\"rope_type\": \"dynamic\", \"factor\": 4}", NULL},
        {"llama", "rope_scaling", "{\"factor\": 2.0}", "rope_scaling"},
        {"llama", "rope_scaling", "5", "not an object"},
        {"llama", "rope_scaling", "null", NULL},
        {"llama", "rope_scaling", "{\"rope_type\": \"default\"}", NULL},
        {"qwen3", "rope_parameters", "{\"rope_type\": \"yarn\", \"rope_theta\": 1e6}", "rope_parameters: factor"},
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
        int kv, head_dim, positions, experts, topk, width;
        double theta, eps, aux;
    } classes[] = {{"llama", 64, 8, 2048, 0, 0, 0, 1e4, 1e-6, 0},
                   {"mistral", 8, 8, 131072, 0, 0, 0, 1e4, 1e-6, 0},
                   {"mixtral", 8, 8, 131072, 8, 2, 20, 1e6, 1e-5, 0.001},
                   {"olmoe", 64, 8, 4096, 64, 8, 20, 1e4, 1e-5, 0.01},
                   {"qwen3", 32, 128, 32768, 0, 0, 0, 1e4, 1e-6, 0},
                   {"qwen3_moe", 4, 8, 32768, 128, 8, 768, 1e4, 1e-6, 0.001},
                   {"qwen2", 32, 8, 32768, 0, 0, 0, 1e4, 1e-6, 0},
                   {"qwen2_moe", 16, 8, 32768, 60, 4, 1408, 1e4, 1e-6, 0.001}};
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
        check(ok && c.num_experts == classes[i].experts &&
                  c.num_experts_per_tok == classes[i].topk && c.moe_intermediate_size == classes[i].width &&
                  c.router_aux_loss_coef == classes[i].aux && c.norm_topk_prob == (c.arch == MIXTRAL) &&
                  count_sparse(&c) == (classes[i].experts ? 2 : 0),
              "%s: defaults of experts", classes[i].type);
    }
}

static void test_config_values(void) {
    Config c;
    Error error;
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
        if (arch == DOTS1) c.router.kind = ROUTER_SIGMOID;
        if (arch == DOTS1) c.qk_norm = QK_NORM_HEAD;
        if (arch == DOTS1) c.num_shared_experts = 2, c.router.scaling = 2.5;
        if (arch == QWEN2_MOE) c.qkv_bias = 0;
        if (names_dense_layers(c.arch) || arch == OLMOE) c.norm_topk_prob = 0;
        if (names_dense_layers(c.arch)) c.sparse[1] = 0;
        if (moe && !names_dense_layers(c.arch) && arch != DOTS1) c.intermediate_size = c.moe_intermediate_size;
        Text t = {NULL, 0, 0};
        Error error;
        config_to_json(&t, &c, NULL, "float32");
        int ok = config_parse(&back, t.data, &error);
        check(ok && !memcmp(&c, &back, sizeof c), "%s: config.json and back %s", archs[arch].model_type, error.text);
        check(strstr(t.data, "\"rms_norm_eps\": 1e-06") && strstr(t.data, "\"rope_theta\": 123457.0"),
              "%s: floats stay floats", archs[arch].model_type);
        free(t.data);
    }
}
