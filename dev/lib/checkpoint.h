// checkpoint.h: Hugging Face directories, and saves that survive kill -9. Needs safetensors.h, layout.h,
// a Model; to save one trainer_to_json of options.h and write_card of card.h, which come later.
//
// A checkpoint is a Hugging Face directory: config.json, model.safetensors and the tokenizer's files; beside them our
// trainer.json (options and step) and trainer/optimizer.safetensors (AdamW's moments; vLLM loads every *.safetensors
// that lies beside a model). What is not ours travels as it is: members of config.json as text (Model.luggage), files
// as bytes (copy_travelling_files).
#pragma once
#include "safetensors.h"
#include "views.h"
#include <stddef.h>

// The classes, in the order of Arch.
static const struct {
    const char *model_type, *class_name;
    QKNorm qk_norm;
} archs[NUM_ARCHS] = {
    {"llama", "LlamaForCausalLM", QK_NORM_NONE},          {"mistral", "MistralForCausalLM", QK_NORM_NONE},
    {"mixtral", "MixtralForCausalLM", QK_NORM_NONE},      {"olmoe", "OlmoeForCausalLM", QK_NORM_ROW},
    {"qwen3", "Qwen3ForCausalLM", QK_NORM_HEAD},          {"qwen3_moe", "Qwen3MoeForCausalLM", QK_NORM_HEAD},
    {"dots1", "Dots1ForCausalLM", QK_NORM_HEAD},          {"qwen2", "Qwen2ForCausalLM", QK_NORM_NONE},
    {"qwen2_moe", "Qwen2MoeForCausalLM", QK_NORM_NONE}};

#define OLMOE_EPS 1e-5          // of its norms, whatever config.json says, in llama.cpp's converter

static int names_dense_layers(Arch arch) { return arch == QWEN3_MOE || arch == QWEN2_MOE; }     // mlp_only_layers
static int is_moe(Arch arch) { return arch == MIXTRAL || arch == OLMOE || arch == DOTS1 || names_dense_layers(arch); }

// 1 if transformers has a class for the model. Dots1 is the class with sigmoid scores and a balancing bias. All others
// are saved with the model_type "train_moe", and only then does config.json have keys of ours.
static int is_ordinary(const Config* c) {
    int known = c->router.kind == ROUTER_SOFTMAX || (c->router.kind == ROUTER_SIGMOID && c->arch == DOTS1);
    return known && c->router.logit_norm == 0 &&
           c->router.family_penalty == 0;
}

// A key of config.json. One with a member is the model's: it is read into a Config and written from it. One without is
// looked at, because this program computes only some of its values, and travels as it was written.
typedef struct {
    const char* names;              // a|b: the first that is there is read, all are written
    size_t member;                  // its offset in Config, or 0
    const char* type;               // one of the next three, or the words that it may be: a|b
    double least, most;             // of the number, or of the word's index
    double fallback[NUM_ARCHS];     // what transformers' class takes if the key is not there, or one of the next four
} Key;
static const char a_whole[] = "a whole number", a_number[] = "a positive number", a_switch[] = "true or false";
enum { NO_KEY = -1, REQUIRED = -2, AS_HEADS = -3, HIDDEN_BY_HEADS = -4, AS_POSITIONS = -5 }; // NO_KEY: none
#define CONFIG(name) offsetof(Config, name)
#define ALL(x) {x, x, x, x, x, x, x, x, x}
#define DENSE(llama, mistral, qwen3, qwen2) {llama, mistral, NO_KEY, NO_KEY, qwen3, NO_KEY, NO_KEY, qwen2, NO_KEY}
#define SPARSE(mixtral, olmoe, qwen3_moe, dots1, qwen2_moe) \
    {NO_KEY, NO_KEY, mixtral, olmoe, NO_KEY, qwen3_moe, dots1, NO_KEY, qwen2_moe}

static const Key config_keys[] = {      // fallbacks: llama, mistral, mixtral, olmoe, qwen3, qwen3_moe, dots1, qwen2,
                                        // qwen2_moe
    {"vocab_size", CONFIG(vocab_size), a_whole, 1, 1 << 24,
     {32000, 32000, 32000, 50304, 151936, 151936, 152064, 151936, 151936}},
    {"hidden_size", CONFIG(hidden_size), a_whole, 1, 1 << 20, {4096, 4096, 4096, 2048, 4096, 2048, 4608, 4096, 2048}},
    {"num_hidden_layers", CONFIG(num_layers), a_whole, 1, MAX_LAYERS, {32, 32, 32, 16, 32, 24, 62, 32, 24}},
    {"num_attention_heads", CONFIG(num_heads), a_whole, 1, 1 << 14, {32, 32, 32, 16, 32, 32, 32, 32, 16}},
    {"num_key_value_heads", CONFIG(num_kv_heads), a_whole, 1, 1 << 14, {AS_HEADS, 8, 8, AS_HEADS, 32, 4, 32, 32, 16}},
    {"head_dim", CONFIG(head_dim), a_whole, 1, 1 << 14,
     {HIDDEN_BY_HEADS, HIDDEN_BY_HEADS, HIDDEN_BY_HEADS, HIDDEN_BY_HEADS, 128, HIDDEN_BY_HEADS, HIDDEN_BY_HEADS,
      HIDDEN_BY_HEADS, HIDDEN_BY_HEADS}},
    {"intermediate_size", CONFIG(intermediate_size), a_whole, 1, 1 << 20,
     {11008, 14336, NO_KEY, NO_KEY, 22016, 6144, 10944, 22016, 5632}},
    {"intermediate_size", CONFIG(moe_intermediate_size), a_whole, 1, 1 << 20,
     SPARSE(14336, 2048, NO_KEY, NO_KEY, NO_KEY)},
    {"moe_intermediate_size", CONFIG(moe_intermediate_size), a_whole, 1, 1 << 20,
     SPARSE(NO_KEY, NO_KEY, 768, 1408, 1408)},
    {"max_position_embeddings", CONFIG(max_position_embeddings), a_whole, 1, 1 << 30,
     {2048, 131072, 131072, 4096, 32768, 32768, 2048, 32768, 32768}},
    {"rms_norm_eps", CONFIG(rms_norm_eps), a_number, 0, 1e30, {1e-6, 1e-6, 1e-5, 1e-5, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6}},
    {"rope_theta", CONFIG(rope_theta), a_number, 1e-30, 1e30, {1e4, 1e4, 1e6, 1e4, 1e4, 1e4, 1e4, 1e4, 1e4}},
    {"tie_word_embeddings", CONFIG(tie_word_embeddings), a_switch, 0, 1, ALL(0)},
    {"num_experts|num_local_experts", CONFIG(num_experts), a_whole, 1, 1 << 16, SPARSE(8, 64, 128, NO_KEY, 60)},
    {"n_routed_experts|num_local_experts|num_experts", CONFIG(num_experts), a_whole, 1, 1 << 16,
     SPARSE(NO_KEY, NO_KEY, NO_KEY, REQUIRED, NO_KEY)},
    {"num_experts_per_tok", CONFIG(num_experts_per_tok), a_whole, 1, 1 << 16, SPARSE(2, 8, 8, REQUIRED, 4)},
    {"norm_topk_prob", CONFIG(norm_topk_prob), a_switch, 0, 1, SPARSE(NO_KEY, 0, 0, 0, 0)},
    {"shared_expert_intermediate_size", CONFIG(shared_expert_intermediate_size), a_whole, 0, 1 << 20,
     SPARSE(NO_KEY, NO_KEY, NO_KEY, NO_KEY, 5632)},
    {"n_shared_experts", CONFIG(num_shared_experts), a_whole, 0, 64, SPARSE(NO_KEY, NO_KEY, NO_KEY, REQUIRED, NO_KEY)},
    {"routed_scaling_factor", CONFIG(router.scaling), a_number, 1e-30, 1e30, SPARSE(NO_KEY, NO_KEY, NO_KEY, 1, NO_KEY)},
    {"qkv_bias", CONFIG(qkv_bias), a_switch, 0, 1, SPARSE(NO_KEY, NO_KEY, NO_KEY, NO_KEY, 1)},
    {"router_aux_loss_coef", CONFIG(router_aux_loss_coef), a_number, 0, 1e30, SPARSE(1e-3, 1e-2, 1e-3, 0, 1e-3)},
    // only with the model_type train_moe, see key_applies
    {"router_type", CONFIG(router.kind), "softmax|sigmoid|lpr|dynamic", 0, 3, {0, 0, 0, 0, 0, 0, ROUTER_SIGMOID, 0, 0}},
    {"logit_norm", CONFIG(router.logit_norm), a_number, 0, 1e30, ALL(0)},
    {"family_penalty", CONFIG(router.family_penalty), a_number, 0, INFINITY, ALL(0)},
    {"lpr_latent_dim", CONFIG(router.lpr_latent_dim), a_whole, 1, 1 << 14, ALL(16)},
    {"lpr_weight", CONFIG(router.lpr_weight), a_number, 0, 1e30, ALL(0.01)},
    {"lpr_diversity", CONFIG(router.lpr_diversity), a_number, 0, 1e30, ALL(1)},
    {"lpr_kl", CONFIG(router.lpr_kl), a_number, 0, 1e30, ALL(0.01)},
    {"lpr_align", CONFIG(router.lpr_align), a_number, 0, 1e30, ALL(0.05)},
    {"lpr_align_form", CONFIG(router.lpr_align_mean), "sum|mean", 0, 1, ALL(0)},
    {"dynamic_q", CONFIG(router.dynamic_q), a_number, 1e-3, 100, ALL(1.1)},
    {"dynamic_entropy", CONFIG(router.dynamic_entropy), a_number, 0, 1e30, ALL(0.9)},
    {"dynamic_share", CONFIG(router.dynamic_share), a_number, 0, 1, ALL(0.75)},
    {"dynamic_least", CONFIG(router.dynamic_least), a_whole, 1, 1 << 16, ALL(2)},
    {"dynamic_weight", CONFIG(router.dynamic_weight), a_number, 0, 1e30, ALL(0.01)},
    // these and mlp_only_layers make Config.sparse
    {"decoder_sparse_step", 0, a_whole, 1, 1 << 20, SPARSE(NO_KEY, NO_KEY, 1, NO_KEY, 1)},
    {"first_k_dense_replace", 0, a_whole, 0, 1 << 20, SPARSE(NO_KEY, NO_KEY, NO_KEY, 0, NO_KEY)},
    // what travels: only one value can be computed here, none at all, or it is about windows (see active_window)
    {"hidden_act", 0, "silu|swish", 0, 1, ALL(0)},
    {"attention_bias", 0, a_switch, 0, 0, {0, NO_KEY, NO_KEY, 0, 0, 0, 0, NO_KEY, NO_KEY}},
    {"mlp_bias", 0, a_switch, 0, 0, DENSE(0, NO_KEY, NO_KEY, NO_KEY)},
    {"n_group", 0, a_whole, 1, 1, SPARSE(NO_KEY, NO_KEY, NO_KEY, 1, NO_KEY)},
    {"topk_group", 0, a_whole, 1, 1, SPARSE(NO_KEY, NO_KEY, NO_KEY, 1, NO_KEY)},
    {"clip_qkv|quantization_config|kv_lora_rank|q_lora_rank", 0, "", 1, 0, ALL(0)},
    {"sliding_window", 0, a_whole, 0, 1 << 30, {NO_KEY, 4096, 0, NO_KEY, 4096, 4096, 4096, 4096, 4096}},
    {"use_sliding_window", 0, a_switch, 0, 1, {NO_KEY, NO_KEY, NO_KEY, NO_KEY, 0, 0, NO_KEY, 0, 0}},
    {"max_window_layers", 0, a_whole, 0, 1 << 20, {NO_KEY, NO_KEY, NO_KEY, NO_KEY, 28, NO_KEY, 62, 28, 28}}};
enum { NUM_KEYS = sizeof config_keys / sizeof config_keys[0] };

// The members of rope_scaling or rope_parameters that rope.h computes with, and the rope_types that have them.
static const struct {
    const char* types;
    Key key;
} rope_keys[] = {
    {"dynamic|linear|llama3|yarn", {"factor", CONFIG(rope.factor), a_number, 1e-30, 1e30, ALL(REQUIRED)}},
    {"llama3|yarn", {"original_max_position_embeddings", CONFIG(rope.original), a_number, 1, 1e30, ALL(AS_POSITIONS)}},
    {"llama3", {"low_freq_factor", CONFIG(rope.low), a_number, 1e-30, 1e30, ALL(REQUIRED)}},
    {"llama3", {"high_freq_factor", CONFIG(rope.high), a_number, 1e-30, 1e30, ALL(REQUIRED)}},
    {"yarn", {"beta_slow", CONFIG(rope.low), a_number, 1e-30, 1e30, ALL(1)}},
    {"yarn", {"beta_fast", CONFIG(rope.high), a_number, 1e-30, 1e30, ALL(32)}},
    {"yarn", {"attention_factor", CONFIG(rope.attention), a_number, 1e-30, 1e30, ALL(0)}},
    {"yarn", {"mscale", CONFIG(rope.mscale), a_number, 0, 1e30, ALL(0)}},
    {"yarn", {"mscale_all_dim", CONFIG(rope.mscale_all), a_number, 0, 1e30, ALL(0)}},
    {"yarn", {"truncate", CONFIG(rope.whole_pairs), a_switch, 0, 1, ALL(1)}}};

static int key_applies(const Key* k, const Config* c, int ours) {
    if (k->fallback[c->arch] == NO_KEY) return 0;
    if (!strncmp(k->names, "lpr_", 4)) return c->router.kind == ROUTER_LPR;
    if (!strncmp(k->names, "dynamic_", 8)) return c->router.kind == ROUTER_DYNAMIC;
    return ours || choice_index("router_type|logit_norm|family_penalty", k->names) < 0;
}

// The value that j has for the key, as a number (of words: their index); 0 and an error if it is none that may be.
static int key_value(const Key* k, const Config* c, const Json* j, double* value, Error* error) {
    char first[64] = "", name[64] = "";
    const Json* v = NULL;
    for (const char* s = k->names; *s && json_absent(v); s += strspn(s, "|")) {
        size_t n = strcspn(s, "|");
        snprintf(name, sizeof name, "%.*s", (int)n, s);
        if (s == k->names) strcpy(first, name);
        v = json_get(j, name);
        s += n;
    }
    double x = k->fallback[c->arch];
    if (json_absent(v)) {
        if (v && k->member == CONFIG(num_kv_heads)) x = AS_HEADS;       // null, which is not the same as nothing
        if (x == REQUIRED) return set_error(error, "%s is missing", first);
        *value = x == HIDDEN_BY_HEADS ? c->hidden_size / c->num_heads : x == AS_HEADS ? c->num_heads :
                 x == AS_POSITIONS ? c->max_position_embeddings : x;
        return 1;
    }
    if (k->type == a_whole) x = (double)json_whole(v, (long)k->most);
    else if (k->type == a_switch) x = v->type == JSON_TRUE ? 1 : v->type == JSON_FALSE ? 0 : NAN;
    else if (k->type == a_number && v->type == JSON_NUMBER) x = v->number;
    else x = v->type != JSON_STRING ? NAN : k->type != a_number ? choice_index(k->type, v->string) :
             strcmp(v->string, "inf") ? NAN : INFINITY;
    *value = x;
    if (x >= k->least && x <= k->most) return 1;
    static const char* words[] = {"null", "false", "true", "", "", "a list", "an object"};
    const char* found = v->string ? v->string : words[v->type];
    if (k->least > k->most) set_error(error, "%s is %.40s, which is not supported", name, found);
    else if (k->least == k->most && k->type == a_switch)
        set_error(error, "%s is %.40s, only false is supported", name, found);
    else if (k->least == k->most) set_error(error, "%s is %.40s, only %g is supported", name, found, k->least);
    else if (k->type == a_whole)
        set_error(error, "%s is %.40s, expected a whole number from %.0f to %.0f", name, found, k->least, k->most);
    else if (k->type == a_number || k->type == a_switch)
        set_error(error, "%s is %.40s, expected %s", name, found, k->type);
    else set_error(error, "%s is %.40s, only %s is supported", name, found, k->type);
    return 0;
}

// Reads the key into its member.
static int key_read(const Key* k, Config* c, const Json* j, Error* error) {
    double x;
    if (!key_value(k, c, j, &x, error)) return 0;
    int whole = (int)fmin(x, INT_MAX);
    if (k->member && k->type == a_number) memcpy((char*)c + k->member, &x, sizeof x);
    else if (k->member) memcpy((char*)c + k->member, &whole, sizeof whole);
    return 1;
}

static void key_to_json(Text* t, const Key* k, double x) {
    const char* word = k->type;
    if (k->type == a_whole) text_print(t, "%.0f", x);
    else if (k->type == a_switch) text_print(t, x != 0 ? "true" : "false");
    else if (k->type == a_number && !isinf(x)) text_json_double(t, x);
    else {
        for (; x > 0 && !isinf(x); x--) word = strchr(word, '|') + 1;
        text_print(t, "\"%.*s\"", (int)strcspn(word, "|"), k->type == a_number ? "inf" : word);
    }
}

// What a new model has: of the keys that travel, those with one value, no window, and the special tokens `tokens`
// (members of an object; NULL: none).
static Json* luggage_new(Arch arch, const char* tokens) {
    Text t = {NULL, 0, 0};
    Error error = {""};
    text_print(&t, "{");
    for (int i = 0; i < NUM_KEYS; i++) {
        const Key* k = &config_keys[i];
        int one = k->least == k->most || !strcmp(k->names, "hidden_act");
        if (k->member || !one || k->fallback[arch] == NO_KEY) continue;
        text_print(&t, "\"%s\": ", k->names);
        key_to_json(&t, k, k->least);
        text_print(&t, ", ");
    }
    if (!tokens) tokens = "\"bos_token_id\": null, \"eos_token_id\": null, \"pad_token_id\": null";
    text_print(&t, "\"sliding_window\": null, %s}", tokens);
    Json* j = json_parse(t.data, t.length, &error);
    free(t.data);
    return j;
}

// A key that travels as a number, 0 for null and false, the class's fallback if it is not there.
static double luggage_number(const Json* j, Arch arch, const char* name) {
    const Json* v = json_get(j, name);
    int i = 0;
    while (strcmp(config_keys[i].names, name)) i++;
    if (!v || config_keys[i].fallback[arch] == NO_KEY) return config_keys[i].fallback[arch];
    return v->type == JSON_TRUE ? 1 : v->number;
}

// How many positions a token of the original sees, 0: all; *layers: how many layers, the last ones, are so. Mistral and
// Mixtral have a window if they have its size, the Qwens if use_sliding_window says so; Qwen2, Qwen3 and Dots1 only
// above max_window_layers, or in the layers that layer_types names (config_from_json refuses those); Qwen2-MoE in every
// second one below it.
static int active_window(const Json* j, const Config* c, int* layers) {
    double window = luggage_number(j, c->arch, "sliding_window");
    double below = luggage_number(j, c->arch, "max_window_layers");
    int off = window <= 0 || luggage_number(j, c->arch, "use_sliding_window") == 0 ||
              (below != NO_KEY && !json_absent(json_get(j, "layer_types")));
    *layers = off ? 0 : below == NO_KEY ? c->num_layers : imax(0, c->num_layers - (int)below);
    if (!off && c->arch == QWEN2_MOE) *layers = (imin(c->num_layers, (int)below) + 1) / 2;
    return *layers ? (int)window : 0;
}

static Json* luggage_read(const char* dir, Error* error) {
    char path[PATH_SIZE];
    return json_read(join_path(path, dir, "config.json"), error);
}

// The window of the model in `dir`, which config_read has read; dir may be NULL.
static int sliding_window(const char* dir, const Config* c) {
    Error ignored = {""};
    int layers;
    Json* j = dir ? luggage_read(dir, &ignored) : NULL;
    int window = j ? active_window(j, c, &layers) : 0;
    json_free(j);
    return window;
}

// Rotary positions: transformers takes rope_scaling, if there is anything in it, for rope_parameters.
static const Json* rope_of(const Json* j, const char** name) {
    const Json* rope = json_get(j, *name = "rope_scaling");
    if (!json_absent(rope) && (rope->type != JSON_OBJECT || rope->count > 0)) return rope;
    return json_get(j, *name = "rope_parameters");
}

// What this program cannot compute must not be computed wrongly in silence. The base in there comes before that beside
// it.
static void rope_from_json(Config* c, const Json* j, Error* error) {
    const char* name;
    const Json *rope = rope_of(j, &name), *type = json_get(rope, "rope_type");
    if (json_absent(type)) type = json_get(rope, "type");
    if (!json_absent(rope) && rope->type != JSON_OBJECT) set_error(error, "%s is not an object", name);
    else if (!json_absent(type) && (type->type != JSON_STRING || choice_index(rope_types, type->string) < 0))
        set_error(error, "%s has rope_type %.40s, only %s is supported", name, type->string ? type->string : "?",
                  rope_types);
    else if (json_absent(type) && !json_absent(json_get(rope, "factor")))
        set_error(error, "%s has a factor, but no rope_type", name);
    else if (!json_absent(type)) c->rope.type = (RopeType)choice_index(rope_types, type->string);
    for (size_t i = 0; i < sizeof rope_keys / sizeof rope_keys[0] && !error->text[0]; i++) {
        const Key* k = &rope_keys[i].key;       // one of them may also stand outside, and then counts
        if (c->rope.type == ROPE_DEFAULT || choice_index(rope_keys[i].types, type->string) < 0) continue;
        Error inner = {""};
        int outside = k->member == CONFIG(rope.original) && !json_absent(json_get(j, k->names));
        if (!key_read(k, c, outside ? j : rope, &inner)) set_error(error, "%s: %s", name, inner.text);
    }
    if (c->rope.type == ROPE_LLAMA3 && c->rope.high <= c->rope.low)
        set_error(error, "%s: high_freq_factor is not above low_freq_factor", name);
    for (int i = 0; rope && rope->type == JSON_OBJECT && i < rope->count; i++) {
        const char* part = rope->items[i]->key;
        if (rope->items[i]->type == JSON_OBJECT)
            set_error(error, "%s has a part %.40s, but layers that differ are not supported", name, part);
        for (int k = 0; k < NUM_KEYS && !strcmp(part, "rope_theta") && !json_absent(rope->items[i]); k++)
            if (!strcmp(config_keys[k].names, part)) key_value(&config_keys[k], c, rope, &c->rope_theta, error);
    }
    for (int i = 0; i < 2; i++) {
        const Json* part = json_get(i ? j : rope, "partial_rotary_factor");
        if (!json_absent(part) && (part->type != JSON_NUMBER || part->number != 1))
            set_error(error, "partial_rotary_factor is %.40s, only 1 is supported", part->string ? part->string : "?");
    }
}

// Fills a Config from config.json; 0 and an error naming key and value if it describes anything that is not supported.
static int config_from_json(Config* c, const Json* j, Error* error) {
    memset(c, 0, sizeof *c);
    const Json* type = json_get(j, "model_type");
    int arch = 0, ours = type && type->type == JSON_STRING && !strcmp(type->string, "train_moe");
    if (ours) type = json_get(j, "base_model_type");
    if (!type || type->type != JSON_STRING)
        return set_error(error, "%s is missing", ours ? "base_model_type" : "model_type");
    while (arch < NUM_ARCHS && strcmp(type->string, archs[arch].model_type)) arch++;
    if (arch == NUM_ARCHS)
        return set_error(
            error,
            "model_type is %.40s, supported are llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe, "
            "dots1 and train_moe",
            type->string);
    c->arch = (Arch)arch;
    c->qk_norm = archs[arch].qk_norm;
    c->qkv_bias = arch == QWEN2;
    if (arch == DOTS1) c->router.kind = ROUTER_SIGMOID;
    for (int i = 0; i < NUM_KEYS; i++) {
        const Key* k = &config_keys[i];
        if (key_applies(k, c, ours) && !key_read(k, c, j, error)) return 0;
    }
    rope_from_json(c, j, error);
    const Json* types = json_get(j, "layer_types");
    for (int i = 0; types && i < types->count; i++)
        if (types->items[i]->type != JSON_STRING || strcmp(types->items[i]->string, "full_attention"))
            set_error(error, "layer_types has %.40s, only full_attention is supported",
                      types->items[i]->string ? types->items[i]->string : "no string");
    if (c->router.kind == ROUTER_LPR && (c->router.logit_norm > 0 || c->router.family_penalty > 0))
        set_error(error, "router_type lpr has neither logit_norm nor family_penalty");
    if (c->router.kind == ROUTER_DYNAMIC && c->router.dynamic_q == 1)
        set_error(error, "dynamic_q is 1, but the entropy divides by dynamic_q - 1");
    if (is_moe(c->arch)) {
        if (!c->intermediate_size) c->intermediate_size = c->moe_intermediate_size;
        c->norm_topk_prob |= arch == MIXTRAL;
        int step = (int)luggage_number(j, c->arch, "decoder_sparse_step");         // NO_KEY: every layer is sparse
        int first = (int)luggage_number(j, c->arch, "first_k_dense_replace");
        const Json* dense = names_dense_layers(c->arch) ? json_get(j, "mlp_only_layers") : NULL;
        for (int l = 0; l < c->num_layers; l++) c->sparse[l] = l >= first && (l + 1) % imax(step, 1) == 0;
        for (int i = 0; dense && i < dense->count; i++) {
            long l = json_whole(dense->items[i], c->num_layers - 1);
            if (l < 0) return set_error(error, "mlp_only_layers names a layer that the model does not have");
            c->sparse[l] = 0;
        }
        if (c->num_experts_per_tok > c->num_experts)
            set_error(error, "num_experts_per_tok is %d, but num_experts is %d", c->num_experts_per_tok,
                      c->num_experts);
        // each of these is in its range, but the sizes computed from them must not overflow
        double size = 3.0 * c->num_layers * c->num_experts * c->hidden_size * c->moe_intermediate_size;
        if (size > 1e15) set_error(error, "num_experts is %d, which makes %.0e parameters", c->num_experts, size);
    }
    if (c->num_heads % c->num_kv_heads)
        set_error(error, "num_attention_heads is %d, not a multiple of num_key_value_heads, %d", c->num_heads,
                  c->num_kv_heads);
    if (c->head_dim < 1)
        set_error(error, "hidden_size is %d, less than num_attention_heads, %d", c->hidden_size, c->num_heads);
    if (c->head_dim % 2) set_error(error, "head_dim is %d, but rotary positions need an even one", c->head_dim);
    if (arch == OLMOE && c->head_dim * c->num_heads != c->hidden_size)
        set_error(error, "head_dim is %d, but OLMoE's is hidden_size / num_attention_heads", c->head_dim);
    return !error->text[0];
}

// 1 if config_to_json writes this key from the Config.
static int key_is_owned(const Config* c, const char* name) {
    for (int i = 0; i < NUM_KEYS; i++)
        if (config_keys[i].member && config_keys[i].fallback[c->arch] != NO_KEY &&
            choice_index(config_keys[i].names, name) >= 0)
            return 1;
    // (auto_map would name a file of code that does not travel, and what is written is transformers' own class)
    static const char always[] =
        "architectures|auto_map|model_type|base_model_type|rope_parameters|rope_scaling|dtype|torch_dtype";
    return choice_index(always, name) >= 0 ||
           (names_dense_layers(c->arch) && choice_index("decoder_sparse_step|mlp_only_layers", name) >= 0) ||
           (c->arch == DOTS1 && !strcmp(name, "first_k_dense_replace"));
}

// The reverse: the model's numbers, under the names of older and newer versions of transformers, and its luggage (NULL:
// a new model's). dtype names the format of most of its numbers.
static void config_to_json(Text* t, const Config* c, const Json* luggage, const char* dtype) {
    Json* made = luggage ? NULL : luggage_new(c->arch, NULL);
    int ordinary = is_ordinary(c), first = 0;
    const char* model_type = archs[c->arch].model_type;
    if (!luggage) luggage = made;
    text_print(t, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n",
               ordinary ? archs[c->arch].class_name : "TrainMoeForCausalLM", ordinary ? model_type : "train_moe");
    if (!ordinary) text_print(t, "  \"base_model_type\": \"%s\",\n", model_type);
    for (int i = 0; i < NUM_KEYS; i++) {
        const Key* k = &config_keys[i];
        double x = 0;
        int whole = 0;
        if (!k->member || !key_applies(k, c, !ordinary)) continue;
        if (k->type == a_number) memcpy(&x, (const char*)c + k->member, sizeof x);
        else memcpy(&whole, (const char*)c + k->member, sizeof whole), x = whole;
        for (const char* s = k->names; *s; s += strspn(s, "|")) {
            char name[64];
            size_t n = strcspn(s, "|");
            snprintf(name, sizeof name, "%.*s", (int)n, s);
            text_print(t, "  \"%s\": ", name);
            const char* was = json_raw(luggage, name);      // a number that is the same stays as it was written
            if (was && isdigit((unsigned char)*was) && atof(was) == x) text_add(t, was, strlen(was));
            else key_to_json(t, k, x);
            text_print(t, ",\n");
            s += n;
        }
    }
    const char *name, *type = rope_types;
    for (int i = 0; i < (int)c->rope.type; i++) type = strchr(type, '|') + 1;
    text_print(t, "  \"rope_parameters\": {\"rope_type\": \"%.*s\", \"rope_theta\": ", (int)strcspn(type, "|"), type);
    text_json_double(t, c->rope_theta);
    const Json* rope = rope_of(luggage, &name);
    for (int i = 0; rope && i < rope->count; i++) {
        if (choice_index("rope_type|type|rope_theta", rope->items[i]->key) >= 0) continue;
        text_print(t, ", ");
        text_json_string(t, rope->items[i]->key);
        text_print(t, ": ");
        text_json_value(t, rope->items[i]);
    }
    text_print(t, "},\n");
    if (c->rope.type != ROPE_DEFAULT) text_print(t, "  \"rope_scaling\": %s,\n", json_raw(luggage, name));
    if (names_dense_layers(c->arch)) {
        text_print(t, "  \"decoder_sparse_step\": 1,\n  \"mlp_only_layers\": [");
        for (int l = 0, listed = 0; l < c->num_layers; l++)
            if (!c->sparse[l]) text_print(t, "%s%d", listed++ ? ", " : "", l);
        text_print(t, "],\n");
    }
    while (first < c->num_layers && !c->sparse[first]) first++;
    if (c->arch == DOTS1) text_print(t, "  \"first_k_dense_replace\": %d,\n", first);
    // the luggage, sorted by name, and among it keys that engines want: mistral.rs of a Qwen3, llama.cpp of a Dots1
    char layers[16];
    snprintf(layers, sizeof layers, "%d", c->num_layers);
    int qwen3 = c->arch == QWEN3 || c->arch == QWEN3_MOE;
    const struct {
        const char *key, *value;
        int wanted;
    } engines[] = {{"max_window_layers", layers, qwen3},
                   {"scoring_func", "\"sigmoid\"", c->arch == DOTS1},
                   {"use_sliding_window", "false", qwen3}};
    for (int i = 0, next = 0; i <= luggage->count; i++) {
        const Json* v = i < luggage->count ? luggage->items[i] : NULL;
        for (; next < 3 && (!v || strcmp(engines[next].key, v->key) <= 0); next++)
            if (engines[next].wanted && !json_get(luggage, engines[next].key))
                text_print(t, "  \"%s\": %s,\n", engines[next].key, engines[next].value);
        if (!v || key_is_owned(c, v->key)) continue;
        text_print(t, "  ");
        text_json_string(t, v->key);
        text_print(t, ": ");
        text_add(t, v->raw, strlen(v->raw));
        text_print(t, ",\n");
    }
    text_print(t, "  \"torch_dtype\": \"%s\",\n  \"dtype\": \"%s\"\n}\n", dtype, dtype);
    json_free(made);
}

static int config_read(Config* c, const char* dir, Error* error) {
    char path[PATH_SIZE];
    Error inner = {""};
    join_path(path, dir, ".ready");
    if (!access(path, F_OK))
        return set_error(error, "%s holds a save that was interrupted while it moved in; --resume --out %s finishes it",
                         dir, dir);
    if (access(join_path(path, dir, "config.json"), F_OK)) {
        char model[PATH_SIZE], index[PATH_SIZE];
        join_path(model, dir, "model.safetensors");
        join_path(index, dir, "model.safetensors.index.json");
        if (access(model, F_OK) && access(index, F_OK)) explain_missing(dir, error);    // an adapter, a GGUF file
        if (error->text[0]) return 0;
    }
    Json* j = json_read(path, error);
    if (j && !config_from_json(c, j, &inner)) set_error(error, "%s: %s", path, inner.text);
    json_free(j);
    return !error->text[0];
}

// Reads every tensor of the layout; block is model parameters or moments, `suffix` is put behind each name.
static int load_tensors(const Model* m, SafeTensors* s, float* block, const char* suffix, Error* error) {
    View* views = (View*)checked_malloc(sizeof(View) * (size_t)m->layout.count);
    views_find(views, &m->config, &m->layout, s, suffix, error);
    for (int i = 0; i < m->layout.count && !error->text[0]; i++) {
        const View* v = &views[i];
        float* out = block + m->layout.tensors[i].offset;
        if (v->stored) safetensors_read(s, v->stored, v->first, v->rows * v->cols, out, error);
    }
    free(views);
    return !error->text[0];
}

// Reads which experts are copies of one from DIR/upcycle.json; 1 with has_families = 0 if there is no such file.
static int families_load(Model* m, const char* dir, Error* error) {
    const Config* c = &m->config;
    char path[PATH_SIZE];
    int E = c->num_experts, described = 0;
    m->has_families = 0;
    join_path(path, dir, "upcycle.json");
    if (E == 0 || access(path, F_OK)) return 1;
    Json* j = json_read(path, error);
    if (!j) return 0;
    const Json* layers = json_get(j, "layers");
    for (int i = 0; layers && i < layers->count; i++) {
        const Json *family = json_get(layers->items[i], "family");
        long l = json_whole(json_get(layers->items[i], "layer"), c->num_layers - 1);
        if (l < 0 || !c->sparse[l] || !family || family->type != JSON_ARRAY || family->count != E) {
            set_error(error, "%s: entry %d of layers does not name a sparse layer and the family of its %d experts",
                      path, i, E);
            break;
        }
        for (int e = 0; e < E; e++) {
            long number = json_whole(family->items[e], E - 1);
            if (number < 0)
                set_error(error, "%s: layer %ld: the family of expert %d is not a number from 0 to %d", path, l, e,
                          E - 1);
            m->family[l * E + e] = (int)number;
            for (int k = 0; k < e; k++) m->has_families |= m->family[l * E + k] == number;
        }
        described++;
    }
    json_free(j);
    if (!error->text[0] && described != count_sparse(c))
        set_error(error, "%s: describes %d layers, but the model has %d sparse ones", path, described, count_sparse(c));
    return !error->text[0];
}

// The smallest number of families in a layer.
static int count_families(const Model* m) {
    int E = m->config.num_experts, least = E;
    for (int l = 0; l < m->config.num_layers && m->has_families; l++) {
        int families = 0;
        for (int e = 0; e < E && m->config.sparse[l]; e++) {
            int known = 0;
            for (int k = 0; k < e; k++) known |= m->family[l * E + k] == m->family[l * E + e];
            families += !known;
        }
        if (m->config.sparse[l]) least = imin(least, families);
    }
    return least;
}

static int notes_were_said;         // by upcycle, when it opened its sources

// Reads the parameters from DIR/model.safetensors (or shards).
static int checkpoint_load(Model* m, const char* dir, Error* error) {
    Error inner = {""};
    SafeTensors* s = safetensors_open_model(dir, error);
    if (!s) return 0;
    if (!load_tensors(m, s, m->params, "", &inner)) set_error(error, "%s: %s", dir, inner.text);
    else if (!notes_were_said) safetensors_say_notes(s, dir);
    safetensors_close(s);
    m->source = m->tokenizer = dir;
    if (m->purpose == FOR_TRAINING && !error->text[0]) m->luggage = luggage_read(dir, error);
    if (!error->text[0] && families_load(m, dir, error) && m->config.router.family_penalty > 0) {
        if (!m->has_families)
            set_error(error, "%s: families are penalised, but there is no upcycle.json that tells them", dir);
        else if (isinf(m->config.router.family_penalty) && count_families(m) < most_topk(&m->config))
            set_error(error, "%s: %d experts a token, but only %d families, of which one member each may be chosen",
                      dir, most_topk(&m->config), count_families(m));
    }
    return !error->text[0];
}

// Where AdamW's moments lie: version 0.1 had them beside the model.
#define OPTIMIZER_FILE "trainer/optimizer.safetensors"
static const char* optimizer_path(char* path, const char* dir) {
    if (!access(join_path(path, dir, OPTIMIZER_FILE), F_OK)) return path;
    if (!access(join_path(path, dir, "optimizer.safetensors"), F_OK)) return path;
    return join_path(path, dir, OPTIMIZER_FILE);
}

// Reads AdamW's moments.
static int optimizer_load(Model* m, const char* dir, Error* error) {
    char path[PATH_SIZE];
    Error inner = {""};
    optimizer_path(path, dir);
    SafeTensors* s = safetensors_open(path, error);
    if (!s) return 0;
    for (int half = 0; half < 2 && !inner.text[0]; half++)      // both are in one file
        load_tensors(m, s, half ? m->exp_avg_sq : m->exp_avg, half ? ".exp_avg_sq" : ".exp_avg", &inner);
    if (inner.text[0]) set_error(error, "%s: %s", path, inner.text);
    safetensors_close(s);
    return !error->text[0];
}

// Files that belong to the tokenizer, to the licence or to the model's history travel from the source to every save.
#define LICENCE "[Ll][Ii][Cc][Ee][Nn][CScs][Ee]*"
static const char templates_dir[] = "additional_chat_templates";   // the one directory among them
static int travels(const char* name) {
    static const char* patterns[] = {"tokenizer*", "vocab.*", "merges.txt", "tekken.json", "*.tiktoken",
                                     "tiktoken.model", "*piece*.model", "*.spm", "bpe.codes", "normalizer.json",
                                     "tokenization_*.py", "special_tokens_map.json", "added_tokens.json",
                                     "generation_config.json", "*processor_config.json", "chat_template*", "*.jinja",
                                     LICENCE, "COPYING*", "[Nn][Oo][Tt][Ii][Cc][Ee]*", "USE_POLICY*", "upcycle.json"};
    int found = 0;
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) found |= !fnmatch(patterns[i], name, 0);
    return found;
}

static int write_file(const char* path, const char* data, size_t length, Error* error) {
    FILE* f = fopen(path, "wb");
    int ok = f && (length == 0 || fwrite(data, length, 1, f) == 1) && fflush(f) == 0 && flush_to_disk(fileno(f)) == 0;
    if (!ok) set_error(error, "%s: %s", path, strerror(errno));
    if (f && fclose(f) && ok) ok = set_error(error, "%s: %s", path, strerror(errno));
    return ok;
}

static int flush_directory(const char* path, Error* error) {
    int fd = open(path, O_RDONLY);
    int ok = fd >= 0 && flush_to_disk(fd) == 0;
    if (!ok) set_error(error, "%s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

static int copy_travelling_files(const char* from, const char* to, Error* error) {
    DIR* d = opendir(from);
    struct dirent* entry;
    if (!d) set_error(error, "%s: %s", from, strerror(errno));
    while (d && !error->text[0] && (entry = readdir(d)) != NULL) {
        char old[PATH_SIZE], target[PATH_SIZE];
        struct stat st;
        size_t length;
        join_path(target, to, entry->d_name);
        if (stat(join_path(old, from, entry->d_name), &st)) continue;
        if (S_ISREG(st.st_mode) && travels(entry->d_name)) {
            char* data = read_file(old, (size_t)1 << 30, &length, error);
            if (data) write_file(target, data, length, error);
            free(data);
        } else if (S_ISDIR(st.st_mode) && !strcmp(entry->d_name, templates_dir)) {
            if (mkdir(target, 0777) && errno != EEXIST) set_error(error, "%s: %s", target, strerror(errno));
            else if (copy_travelling_files(old, target, error)) flush_directory(target, error);
        }
    }
    if (d) closedir(d);
    return !error->text[0];
}

// Moves every file of a directory, and of the directories that a checkpoint may have, into the directory `to`, or
// deletes it if `to` is NULL.
static void move_files(const char* from, const char* to, Error* error) {
    DIR* d = opendir(from);
    struct dirent* entry;
    struct stat st;
    while (d && (entry = readdir(d)) != NULL) {
        char old[PATH_SIZE], target[PATH_SIZE];
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        join_path(old, from, entry->d_name);
        if (to) join_path(target, to, entry->d_name);
        if ((!strcmp(entry->d_name, "trainer") || !strcmp(entry->d_name, templates_dir)) && !lstat(old, &st) &&
            S_ISDIR(st.st_mode)) {
            Error inner = {""};
            if (to && mkdir(target, 0777) && errno != EEXIST) set_error(&inner, "%s: %s", target, strerror(errno));
            if (!inner.text[0]) move_files(old, to ? target : NULL, &inner);
            if (to && !inner.text[0]) flush_directory(target, &inner);
            if (!inner.text[0] && rmdir(old)) set_error(&inner, "%s: %s", old, strerror(errno));
            if (inner.text[0]) set_error(error, "%s", inner.text);
        } else if (to ? rename(old, target) : unlink(old)) set_error(error, "%s: %s", old, strerror(errno));
    }
    if (d) closedir(d);
}

// Removes the shards that OUT/model.safetensors takes the place of; first the index, which leads readers to them.
static void remove_shards(const char* out, Error* error) {
    char path[PATH_SIZE];
    struct dirent* entry;
    if (access(join_path(path, out, "model.safetensors"), F_OK)) return;
    if (unlink(join_path(path, out, "model.safetensors.index.json")) && errno != ENOENT) {
        set_error(error, "%s: %s", path, strerror(errno));
        return;
    }
    DIR* d = opendir(out);
    if (!d) set_error(error, "%s: %s", out, strerror(errno));
    while (d && (entry = readdir(d)) != NULL)
        if (!fnmatch("model-[0-9]*-of-[0-9]*.safetensors", entry->d_name, 0) &&
            unlink(join_path(path, out, entry->d_name)))
            set_error(error, "%s: %s", path, strerror(errno));
    if (d) closedir(d);
}

// The last step of a save, also made by --resume if a save was interrupted here: moves OUT/.ready's files into OUT.
// Shards that lie there, and moments of version 0.1 beside the model, are then those of an earlier step. What is killed
// before all of them are gone leaves OUT/.ready, and so is finished by --resume.
static int finish_save(const char* out, Error* error) {
    char ready[PATH_SIZE], path[PATH_SIZE];
    join_path(ready, out, ".ready");
    if (access(ready, F_OK)) return 1;
    move_files(ready, out, error);
    if (!error->text[0] && !access(join_path(path, out, OPTIMIZER_FILE), F_OK) &&
        unlink(join_path(path, out, "optimizer.safetensors")) && errno != ENOENT)
        set_error(error, "%s: %s", path, strerror(errno));
    if (!error->text[0]) remove_shards(out, error);
    if (error->text[0] || !flush_directory(out, error)) return 0;
    if (rmdir(ready)) return set_error(error, "%s: %s", ready, strerror(errno));
    return 1;
}

static void trainer_to_json(Text* t, const Model* m, long step);        // in options.h
static int write_card(const Model* m, const char* out, const char* dir, Error* error);          // in card.h

// Writes a checkpoint of OUT into the directory `dir`.
static int save_files(const Model* m, const char* out, const char* dir, long step, Error* error) {
    char path[PATH_SIZE];
    Text text = {NULL, 0, 0};
    config_to_json(&text, &m->config, m->luggage, "float32");
    join_path(path, dir, "config.json");
    int ok = write_file(path, text.data, text.length, error);
    text.length = 0;
    trainer_to_json(&text, m, step);
    join_path(path, dir, "trainer.json");
    ok = ok && write_file(path, text.data, text.length, error);
    free(text.data);
    int count = m->layout.count;
    OutTensor* tensors = (OutTensor*)checked_malloc(sizeof(OutTensor) * 2 * (size_t)count);
    char(*names)[128] = (char(*)[128])checked_malloc(sizeof(*names) * 2 * (size_t)count);
    for (int pass = 0; pass < 2 && ok; pass++) {            // the model, then the optimizer
        for (int i = 0; i < count * (pass + 1); i++) {
            const Tensor* t = &m->layout.tensors[i % count];
            const float* block = pass == 0 ? m->params : i < count ? m->exp_avg : m->exp_avg_sq;
            snprintf(names[i], sizeof names[i], "%s%s", t->name,
                     pass == 0   ? ""
                     : i < count ? ".exp_avg"
                                 : ".exp_avg_sq");
            OutTensor o = {names[i], "F32", tensor_is_matrix(t) ? 2 : 1, {t->rows, t->cols, 0}, block + t->offset};
            tensors[i] = o;
        }
        if (pass && mkdir(join_path(path, dir, "trainer"), 0777))
            ok = set_error(error, "%s: %s", path, strerror(errno));
        join_path(path, dir, pass ? OPTIMIZER_FILE : "model.safetensors");
        ok = ok && safetensors_write(path, tensors, count * (pass + 1), error);
    }
    ok = ok && flush_directory(join_path(path, dir, "trainer"), error);
    free(tensors);
    free(names);
    const char* from = m->tokenizer;
    if (from && access(from, F_OK)) {           // gone since the run began; if there is a last save, it has its files
        if (access(join_path(path, out, "trainer.json"), F_OK)) {
            end_progress();
            fprintf(stderr, "%s: %s is gone; %s lacks the tokenizer's files and upcycle.json, if it had them\n",
                    program_name, from, out);
        }
        from = out;
    }
    ok = ok && (!from || copy_travelling_files(from, dir, error));
    if (!m->source) unlink(join_path(path, dir, "upcycle.json"));       // not the history of a new model
    return ok && write_card(m, out, dir, error) && flush_directory(dir, error);
}

// Saves model, optimizer and options of a run, as a whole or not at all: everything is written and flushed in
// OUT/.saving; renaming that to OUT/.ready is the moment from which the new checkpoint counts; then its files are moved
// in. Returns NULL, or why it failed; then the last checkpoint is untouched. (Names and texts
// are allocated while it runs.)
static const char* checkpoint_save(const Model* m, const char* out, long step) {
    static Error error;
    char saving[PATH_SIZE], ready[PATH_SIZE];
    error.text[0] = 0;
    join_path(saving, out, ".saving");
    join_path(ready, out, ".ready");
    if (mkdir(saving, 0777) && errno != EEXIST) set_error(&error, "%s: %s", saving, strerror(errno));
    move_files(saving, NULL, &error);
    if (!error.text[0] && save_files(m, out, saving, step, &error) && finish_save(out, &error)) {
        if (rename(saving, ready)) set_error(&error, "%s: %s", ready, strerror(errno));
        else if (flush_directory(out, &error)) finish_save(out, &error);
    }
    if (!error.text[0]) return NULL;
    Error ignored = {""};
    move_files(saving, NULL, &ignored);        // give the disk its space back
    rmdir(saving);
    return error.text;
}
