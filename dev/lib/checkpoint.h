// checkpoint.h: Hugging Face directories, and saves that survive kill -9. Needs safetensors.h, layout.h, a Model.
//
// A checkpoint is a Hugging Face directory: config.json, model.safetensors and the tokenizer's files; beside them our
// trainer.json (options and step) and optimizer.safetensors (AdamW's moments).
#pragma once
#include "safetensors.h"

// The classes, in the order of Arch, with what transformers takes for a key that config.json does not have (0: see
// config_from_json).
static const struct {
    const char *model_type, *class_name;
    QKNorm qk_norm;
    int vocab, hidden, layers, heads, kv_heads, head_dim, width, expert_width, experts, topk, positions, window;
    double rope_theta, rms_norm_eps, aux;
} archs[NUM_ARCHS] = {
    {"llama", "LlamaForCausalLM", QK_NORM_NONE, 32000, 4096, 32, 32, 0, 0, 11008, 0, 0, 0, 2048, 0, 1e4, 1e-6, 0},
    {"mistral", "MistralForCausalLM", QK_NORM_NONE, 32000, 4096, 32, 32, 8, 0, 14336, 0, 0, 0, 131072, 4096, 1e4, 1e-6,
     0},
    {"mixtral", "MixtralForCausalLM", QK_NORM_NONE, 32000, 4096, 32, 32, 8, 0, 14336, 0, 8, 2, 131072, 0, 1e6, 1e-5,
     1e-3},
    {"olmoe", "OlmoeForCausalLM", QK_NORM_ROW, 50304, 2048, 16, 16, 0, 0, 2048, 0, 64, 8, 4096, 0, 1e4, 1e-5, 1e-2},
    {"qwen3", "Qwen3ForCausalLM", QK_NORM_HEAD, 151936, 4096, 32, 32, 32, 128, 22016, 0, 0, 0, 32768, 0, 1e4, 1e-6, 0},
    {"qwen3_moe", "Qwen3MoeForCausalLM", QK_NORM_HEAD, 151936, 2048, 24, 32, 4, 0, 6144, 768, 128, 8, 32768, 0, 1e4,
     1e-6, 1e-3},
    {"dots1", "Dots1ForCausalLM", QK_NORM_HEAD, 152064, 4608, 62, 32, 32, 0, 10944, 1408, 0, 0, 2048, 0, 1e4, 1e-6, 0}};

static int is_moe(Arch arch) { return arch == MIXTRAL || arch == OLMOE || arch == QWEN3_MOE || arch == DOTS1; }

// 1 if transformers has a class for the model. Dots1 is the class with sigmoid scores and a balancing bias. All others
// are saved with the model_type "train_moe", and only then does config.json have keys of ours.
static int is_ordinary(const Config* c) {
    return (c->router == ROUTER_SOFTMAX || (c->router == ROUTER_SIGMOID && c->arch == DOTS1)) && c->logit_norm == 0 &&
           c->family_penalty == 0;
}
static const char* routers[] = {"softmax", "sigmoid", "lpr"};           // in the order of Router

// A whole number under `key` (or `other`, if not NULL); fallback < 0: it must be there.
static int config_int(const Json* j, const char* key, const char* other, int fallback, int low, int high,
                      Error* error) {
    const Json* v = json_get(j, key);
    if (json_absent(v) && other) v = json_get(j, other);
    if (json_absent(v)) {
        if (fallback < 0) set_error(error, "%s is missing", key);
        return fallback;
    }
    long value = json_whole(v, high);
    if (value < low) {
        set_error(error, "%s is %.40s, expected a whole number from %d to %d", key, v->string ? v->string : "no number",
                  low, high);
        return fallback;
    }
    return (int)value;
}

static double config_double(const Json* j, const char* key, double fallback, Error* error) {
    const Json* v = json_get(j, key);
    if (json_absent(v)) return fallback;
    if (v->type == JSON_NUMBER && v->number >= 0 && v->number < 1e30) return v->number;
    set_error(error, "%s is %.40s, expected a positive number", key, v->string ? v->string : "no number");
    return fallback;
}

static int config_bool(const Json* j, const char* key, int fallback, Error* error) {
    const Json* v = json_get(j, key);
    if (json_absent(v)) return fallback;
    if (v->type != JSON_TRUE && v->type != JSON_FALSE) set_error(error, "%s must be true or false", key);
    return v->type == JSON_TRUE;
}

// What this program cannot compute must not be computed wrongly in silence.
static void config_refuse_unsupported(const Json* j, Error* error) {
    static const char* must_be_absent[] = {"clip_qkv", "quantization_config", "kv_lora_rank", "q_lora_rank"};
    static const char* must_be_false[] = {"attention_bias", "mlp_bias"};
    const Json* act = json_get(j, "hidden_act");
    if (!json_absent(act) && (act->type != JSON_STRING || strcmp(act->string, "silu")))
        set_error(error, "hidden_act is %.40s, only silu is supported", act->string ? act->string : "no string");
    for (int i = 0; i < 4; i++) {
        const Json* v = json_get(j, must_be_absent[i]);
        if (json_absent(v)) continue;
        set_error(error, "%s is %.40s, which is not supported", must_be_absent[i], v->string ? v->string : "set");
    }
    for (int i = 0; i < 2; i++)
        if (config_bool(j, must_be_false[i], 0, error))
            set_error(error, "%s is true, which is not supported", must_be_false[i]);
    static const char* ropes[] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++) {
        const Json *rope_json = json_get(j, ropes[i]), *type = json_get(rope_json, "rope_type");
        if (json_absent(type)) type = json_get(rope_json, "type");
        if (json_absent(rope_json)) continue;
        if (rope_json->type != JSON_OBJECT) set_error(error, "%s is not an object", ropes[i]);
        else if (!json_absent(type) && (type->type != JSON_STRING || strcmp(type->string, "default")))
            set_error(error, "%s has rope_type %.40s, only default is supported", ropes[i],
                      type->string ? type->string : "?");
        else if (json_absent(type) && i == 0) set_error(error, "rope_scaling is set, which is not supported");
        double part = config_double(rope_json, "partial_rotary_factor", 1, error);
        if (part != 1) set_error(error, "partial_rotary_factor is %g, only 1 is supported", part);
    }
    double part = config_double(j, "partial_rotary_factor", 1, error);
    if (part != 1) set_error(error, "partial_rotary_factor is %g, only 1 is supported", part);
    const Json* types = json_get(j, "layer_types");
    for (int i = 0; types && i < types->count; i++)
        if (types->items[i]->type != JSON_STRING || strcmp(types->items[i]->string, "full_attention"))
            set_error(error, "layer_types has %.40s, only full_attention is supported",
                      types->items[i]->string ? types->items[i]->string : "no string");
}

// The keys of a model_type of our own.
static int router_variant_from_json(Config* c, const Json* j, Error* error) {
    const Json *router = json_get(j, "router_type"), *penalty = json_get(j, "family_penalty"),
               *form = json_get(j, "lpr_align_form");
    if (router && router->type == JSON_STRING) {
        int kind = 0;
        while (kind < 3 && strcmp(routers[kind], router->string)) kind++;
        if (kind == 3)
            return set_error(error, "router_type is %.40s, expected softmax, sigmoid or lpr", router->string);
        c->router = (Router)kind;
    }
    c->logit_norm = config_double(j, "logit_norm", 0, error);
    if (penalty && penalty->type == JSON_STRING && !strcmp(penalty->string, "inf")) c->family_penalty = INFINITY;
    else c->family_penalty = config_double(j, "family_penalty", 0, error);
    if (c->router == ROUTER_LPR) {
        c->lpr_latent_dim = config_int(j, "lpr_latent_dim", NULL, 16, 1, 1 << 14, error);
        c->lpr_weight = config_double(j, "lpr_weight", 0.01, error);
        c->lpr_diversity = config_double(j, "lpr_diversity", 1, error);
        c->lpr_kl = config_double(j, "lpr_kl", 0.01, error);
        c->lpr_align = config_double(j, "lpr_align", 0.05, error);
        c->lpr_align_mean = form && form->type == JSON_STRING && !strcmp(form->string, "mean");
        if (c->logit_norm > 0 || c->family_penalty > 0)
            set_error(error, "router_type lpr has neither logit_norm nor family_penalty");
    }
    return !error->text[0];
}

static void router_variant_to_json(Text* t, const Config* c) {
    text_print(t, "  \"base_model_type\": \"%s\",\n  \"router_type\": \"%s\",\n  \"logit_norm\": ",
               archs[c->arch].model_type, routers[c->router]);
    text_json_double(t, c->logit_norm);
    text_print(t, ",\n  \"family_penalty\": ");
    if (isinf(c->family_penalty)) text_print(t, "\"inf\"");
    else text_json_double(t, c->family_penalty);
    if (c->router == ROUTER_LPR) {
        static const char* keys[] = {"lpr_weight", "lpr_diversity", "lpr_kl", "lpr_align"};
        const double values[] = {c->lpr_weight, c->lpr_diversity, c->lpr_kl, c->lpr_align};
        text_print(t, ",\n  \"lpr_latent_dim\": %d,\n  \"lpr_align_form\": \"%s\"", c->lpr_latent_dim,
                   c->lpr_align_mean ? "mean" : "sum");
        for (int i = 0; i < 4; i++) {
            text_print(t, ",\n  \"%s\": ", keys[i]);
            text_json_double(t, values[i]);
        }
    }
    text_print(t, ",\n");
}

// Fills a Config from config.json; 0 and an error naming key and value if it describes anything that is not supported.
static int config_from_json(Config* c, const Json* j, Error* error) {
    memset(c, 0, sizeof *c);
    const Json* type = json_get(j, "model_type");
    if (!type || type->type != JSON_STRING) return set_error(error, "model_type is missing");
    int arch = 0, ours = !strcmp(type->string, "train_moe");
    if (ours) {
        type = json_get(j, "base_model_type");
        if (!type || type->type != JSON_STRING) return set_error(error, "base_model_type is missing");
    }
    while (arch < NUM_ARCHS && strcmp(type->string, archs[arch].model_type)) arch++;
    if (arch == NUM_ARCHS)
        return set_error(
            error,
            "model_type is %.40s, supported are llama, mistral, mixtral, olmoe, qwen3, qwen3_moe, dots1 and "
            "train_moe",
            type->string);
    c->arch = (Arch)arch;
    if (arch == DOTS1) c->router = ROUTER_SIGMOID;
    if (ours && !router_variant_from_json(c, j, error)) return 0;
    config_refuse_unsupported(j, error);
    c->num_layers = config_int(j, "num_hidden_layers", NULL, archs[arch].layers, 1, MAX_LAYERS, error);
    c->hidden_size = config_int(j, "hidden_size", NULL, archs[arch].hidden, 1, 1 << 20, error);
    c->num_heads = config_int(j, "num_attention_heads", NULL, archs[arch].heads, 1, 1 << 14, error);
    c->vocab_size = config_int(j, "vocab_size", NULL, archs[arch].vocab, 1, 1 << 24, error);
    if (error->text[0]) return 0;
    int kv_heads = archs[arch].kv_heads ? archs[arch].kv_heads : c->num_heads;
    int head_dim = archs[arch].head_dim ? archs[arch].head_dim : c->hidden_size / c->num_heads;
    c->num_kv_heads = config_int(j, "num_key_value_heads", NULL, kv_heads, 1, 1 << 14, error);
    c->head_dim = config_int(j, "head_dim", NULL, head_dim, 1, 1 << 14, error);
    c->intermediate_size = config_int(j, "intermediate_size", NULL, archs[arch].width, 1, 1 << 20, error);
    c->max_position_embeddings =
        config_int(j, "max_position_embeddings", NULL, archs[arch].positions, 1, 1 << 30, error);
    c->tie_word_embeddings = config_bool(j, "tie_word_embeddings", 0, error);
    c->rms_norm_eps = config_double(j, "rms_norm_eps", archs[arch].rms_norm_eps, error);
    c->rope_theta = config_double(j, "rope_theta", archs[arch].rope_theta, error);
    c->rope_theta = config_double(json_get(j, "rope_parameters"), "rope_theta", c->rope_theta, error);
    if (c->rope_theta <= 0) set_error(error, "rope_theta is 0, expected a positive number");
    c->qk_norm = archs[arch].qk_norm;
    const Json* window = json_get(j, "sliding_window");
    int window_default = window ? 0 : archs[arch].window;       // an explicit null means none
    c->sliding_window = config_int(j, "sliding_window", NULL, window_default, 0, 1 << 30, error);
    int window_wanted = config_bool(j, "use_sliding_window", arch == MISTRAL || arch == MIXTRAL, error);
    if (!window_wanted) c->sliding_window = 0;
    if (arch == DOTS1) {
        static const char* only[] = {"n_group", "topk_group"};
        for (int i = 0; i < 2; i++)
            if (config_int(j, only[i], NULL, 1, 0, 1 << 16, error) != 1)
                set_error(error, "%s is not 1, which is not supported", only[i]);
        if (config_int(j, "n_shared_experts", NULL, -1, 0, 1 << 16, error) != 0)
            set_error(error, "n_shared_experts is not 0, and shared experts are not supported");
        if (config_double(j, "routed_scaling_factor", 1, error) != 1)
            set_error(error, "routed_scaling_factor is not 1, which is not supported");
    }
    if (is_moe(c->arch)) {
        const char* experts_key = arch == DOTS1 ? "n_routed_experts" : "num_experts";
        int experts = archs[arch].experts ? archs[arch].experts : -1, topk = archs[arch].topk ? archs[arch].topk : -1;
        c->num_experts = config_int(j, experts_key, "num_local_experts", experts, 1, 1 << 16, error);
        c->num_experts_per_tok = config_int(j, "num_experts_per_tok", NULL, topk, 1, 1 << 16, error);
        c->norm_topk_prob = arch == MIXTRAL ? 1 : config_bool(j, "norm_topk_prob", 0, error);
        c->moe_intermediate_size = c->intermediate_size;
        if (archs[arch].expert_width)
            c->moe_intermediate_size =
                config_int(j, "moe_intermediate_size", NULL, archs[arch].expert_width, 1, 1 << 20, error);
        c->router_aux_loss_coef = config_double(j, "router_aux_loss_coef", archs[arch].aux, error);
        int step = arch == QWEN3_MOE ? config_int(j, "decoder_sparse_step", NULL, 1, 1, 1 << 20, error) : 1;
        int first = arch == DOTS1 ? config_int(j, "first_k_dense_replace", NULL, 0, 0, 1 << 20, error) : 0;
        for (int l = 0; l < c->num_layers; l++) c->sparse[l] = l >= first && (l + 1) % step == 0;
        const Json* dense = arch == QWEN3_MOE ? json_get(j, "mlp_only_layers") : NULL;
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
    static const char* ids[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    for (int i = 0; i < 3; i++) {
        const Json* id = json_get(j, ids[i]);
        Text text = {NULL, 0, 0};
        if (id && id->type == JSON_NULL) text_print(&text, "null");
        if (id && id->type == JSON_NUMBER) text_print(&text, "%s", id->string);
        if (id && id->type == JSON_ARRAY) {
            text_print(&text, "[");
            for (int k = 0; k < id->count; k++) {
                if (id->items[k]->type != JSON_NUMBER) set_error(error, "%s holds what is not a number", ids[i]);
                else text_print(&text, "%s%s", k ? ", " : "", id->items[k]->string);
            }
            text_print(&text, "]");
        }
        if (text.length >= sizeof c->token_ids[i])
            set_error(error, "%s is longer than %d characters", ids[i], (int)sizeof c->token_ids[i] - 1);
        else if (text.data) strcpy(c->token_ids[i], text.data);
        free(text.data);
    }
    return !error->text[0];
}

// The reverse: what transformers needs to open the checkpoint, under the names of its older and newer versions.
static void config_to_json(Text* t, const Config* c) {
    int moe = is_moe(c->arch);
    text_print(t, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n",
               is_ordinary(c) ? archs[c->arch].class_name : "TrainMoeForCausalLM",
               is_ordinary(c) ? archs[c->arch].model_type : "train_moe");
    if (!is_ordinary(c)) router_variant_to_json(t, c);
    text_print(t, "  \"vocab_size\": %d,\n  \"hidden_size\": %d,\n  \"num_hidden_layers\": %d,\n", c->vocab_size,
               c->hidden_size, c->num_layers);
    text_print(t, "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n  \"head_dim\": %d,\n", c->num_heads,
               c->num_kv_heads, c->head_dim);
    text_print(t, "  \"intermediate_size\": %d,\n",
               c->arch == QWEN3_MOE || c->arch == DOTS1 || !moe ? c->intermediate_size : c->moe_intermediate_size);
    text_print(t, "  \"hidden_act\": \"silu\",\n  \"max_position_embeddings\": %d,\n  \"rms_norm_eps\": ",
               c->max_position_embeddings);
    text_json_double(t, c->rms_norm_eps);
    text_print(t, ",\n  \"rope_theta\": ");
    text_json_double(t, c->rope_theta);
    text_print(t, ",\n  \"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": ");
    text_json_double(t, c->rope_theta);
    text_print(t, "},\n  \"attention_bias\": false,\n  \"tie_word_embeddings\": %s,\n",
               c->tie_word_embeddings ? "true" : "false");
    if (c->arch == MISTRAL || c->arch == MIXTRAL || c->arch == DOTS1) {
        if (c->sliding_window) text_print(t, "  \"sliding_window\": %d,\n", c->sliding_window);
        else text_print(t, "  \"sliding_window\": null,\n");
    }
    if (moe) {
        text_print(t, "  \"num_experts\": %d,\n  \"num_local_experts\": %d,\n  \"num_experts_per_tok\": %d,\n",
                   c->num_experts, c->num_experts, c->num_experts_per_tok);
        text_print(t, "  \"norm_topk_prob\": %s,\n  \"router_aux_loss_coef\": ", c->norm_topk_prob ? "true" : "false");
        text_json_double(t, c->router_aux_loss_coef);
        text_print(t, ",\n  \"output_router_logits\": false,\n");
    }
    if (c->arch == QWEN3_MOE) {
        text_print(t, "  \"moe_intermediate_size\": %d,\n  \"decoder_sparse_step\": 1,\n  \"mlp_only_layers\": [",
                   c->moe_intermediate_size);
        for (int l = 0, listed = 0; l < c->num_layers; l++)
            if (!c->sparse[l]) text_print(t, "%s%d", listed++ ? ", " : "", l);
        text_print(t, "],\n");
    }
    if (c->arch == DOTS1) {
        int first = 0;
        while (first < c->num_layers && !c->sparse[first]) first++;
        text_print(t,
                   "  \"moe_intermediate_size\": %d,\n  \"n_routed_experts\": %d,\n  \"n_shared_experts\": 0,\n  "
                   "\"n_group\": 1,\n"
                   "  \"topk_group\": 1,\n  \"routed_scaling_factor\": 1.0,\n  \"first_k_dense_replace\": %d,\n",
                   c->moe_intermediate_size, c->num_experts, first);
    }
    static const char* ids[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    for (int i = 0; i < 3; i++)
        if (c->token_ids[i][0]) text_print(t, "  \"%s\": %s,\n", ids[i], c->token_ids[i]);
    text_print(t, "  \"torch_dtype\": \"float32\",\n  \"dtype\": \"float32\"\n}\n");
}

static int config_read(Config* c, const char* dir, Error* error) {
    char path[PATH_SIZE];
    Error inner = {""};
    join_path(path, dir, ".ready");
    if (!access(path, F_OK))
        return set_error(error, "%s holds a save that was interrupted while it moved in; --resume --out %s finishes it",
                         dir, dir);
    join_path(path, dir, "config.json");
    Json* j = json_read(path, error);
    if (j && !config_from_json(c, j, &inner)) set_error(error, "%s: %s", path, inner.text);
    json_free(j);
    return !error->text[0];
}

// One tensor of the checkpoint into `out`, if it is there: 1. A wrong shape is an error.
static int load_tensor(SafeTensors* s, const char* name, int ndim, const long* shape, float* out, Error* error) {
    StoredTensor* t = safetensors_find(s, name);
    if (!t) return 0;
    int same = t->ndim == ndim;
    for (int i = 0; same && i < ndim; i++) same = t->shape[i] == shape[i];
    if (!same) {
        Text found = {NULL, 0, 0}, expected = {NULL, 0, 0};
        for (int i = 0; i < t->ndim; i++) text_print(&found, "%s%ld", i ? "," : "", t->shape[i]);
        for (int i = 0; i < ndim; i++) text_print(&expected, "%s%ld", i ? "," : "", shape[i]);
        set_error(error, "tensor %.100s has shape [%s], config.json makes it [%s]", name, found.data ? found.data : "",
                  expected.data);
        free(found.data);
        free(expected.data);
    }
    t->used = 1;
    return same && safetensors_read(s, t, 0, t->count, out, error);
}

// A list of names for an error message, cut off after a few.
static void list_name(Text* list, int* count, const char* name) {
    if (++*count <= 6) text_print(list, "%s%s", *count > 1 ? ", " : "", name);
    else if (*count == 7) text_print(list, ", ...");
}

// Reads every tensor of the layout; block is model parameters or moments, `suffix` is put behind each name. Experts may
// also be packed, as newer files have them: mlp.experts.gate_up_proj (E, 2 I, H) and down_proj (E, H, I), which is just
// how they lie in memory. Every tensor expected must be found and every tensor found must be used.
static int load_tensors(const Model* m, SafeTensors* s, float* block, const char* suffix, Error* error) {
    const Config* c = &m->config;
    Weights w;
    weights_point(&w, c, &m->layout, block);
    char* loaded = (char*)checked_malloc((size_t)m->layout.count);
    memset(loaded, 0, (size_t)m->layout.count);
    for (int l = 0; l < c->num_layers; l++) {
        long E = c->num_experts, I = c->moe_intermediate_size, H = c->hidden_size;
        for (int form = 0; c->sparse[l] && form < 8; form++) {
            int down = form & 1;
            char name[160];
            snprintf(name, sizeof name, "model.layers.%d.%s.experts.%s%s%s", l, form & 4 ? "block_sparse_moe" : "mlp",
                     down ? "down_proj" : "gate_up_proj", form & 2 ? ".weight" : "", suffix);
            long shape[3] = {E, down ? H : 2 * I, down ? I : H};
            float* out = down ? w.layers[l].down : w.layers[l].gate_up;
            if (!load_tensor(s, name, 3, shape, out, error)) continue;
            for (int i = 0; i < m->layout.count; i++) {
                const Tensor* t = &m->layout.tensors[i];
                if (tensor_is_matrix(t) && tensor_size(t) > 0 && t->offset >= out - block &&
                    t->offset < out - block + shape[0] * shape[1] * shape[2])
                    loaded[i] = 1;
            }
        }
    }
    Text missing = {NULL, 0, 0}, unused = {NULL, 0, 0};
    int num_missing = 0, num_unused = 0;
    for (int i = 0; i < m->layout.count && !error->text[0]; i++) {
        const Tensor* t = &m->layout.tensors[i];
        char name[160], newer[160];
        int layer, used = 0;
        long shape[2] = {t->rows, t->cols};
        snprintf(name, sizeof name, "%s%s", t->name, suffix);
        if (loaded[i] || load_tensor(s, name, tensor_is_matrix(t) ? 2 : 1, shape, block + t->offset, error)) continue;
        // Mixtral's router stands beside packed experts under its new name
        if (sscanf(name, "model.layers.%d.block_sparse_moe.gate.weight%n", &layer, &used) == 1 && used && !name[used]) {
            snprintf(newer, sizeof newer, "model.layers.%d.mlp.gate.weight", layer);
            if (load_tensor(s, newer, 2, shape, block + t->offset, error)) continue;
        }
        list_name(&missing, &num_missing, name);
    }
    for (int i = 0; i < s->num_tensors && !error->text[0]; i++) {
        StoredTensor* t = &s->tensors[i];
        size_t length = strlen(t->name);
        if (t->used || (length > 19 && !strcmp(t->name + length - 19, "rotary_emb.inv_freq"))) continue;
        if (c->tie_word_embeddings && !*suffix && !strcmp(t->name, "lm_head.weight")) { // redundant: must be the same
            long shape[2] = {c->vocab_size, c->hidden_size}, size = shape[0] * shape[1];
            float* head = (float*)checked_malloc(sizeof(float) * (size_t)size);
            if (load_tensor(s, t->name, 2, shape, head, error) &&
                memcmp(head, w.embedding, sizeof(float) * (size_t)size))
                set_error(error, "lm_head.weight differs from the embedding, but tie_word_embeddings is true");
            free(head);
        } else {
            list_name(&unused, &num_unused, t->name);
        }
    }
    if (num_missing) set_error(error, "missing tensors (%d): %s", num_missing, missing.data);
    else if (num_unused) set_error(error, "tensors that do not belong to this model (%d): %s", num_unused, unused.data);
    free(missing.data);
    free(unused.data);
    free(loaded);
    free(w.layers);
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

// Reads the parameters from DIR/model.safetensors (or shards).
static int checkpoint_load(Model* m, const char* dir, Error* error) {
    Error inner = {""};
    SafeTensors* s = safetensors_open_model(dir, error);
    if (!s) return 0;
    if (!load_tensors(m, s, m->params, "", &inner)) set_error(error, "%s: %s", dir, inner.text);
    safetensors_close(s);
    m->source = dir;
    if (!error->text[0] && families_load(m, dir, error) && m->config.family_penalty > 0) {
        if (!m->has_families)
            set_error(error, "%s: families are penalised, but there is no upcycle.json that tells them", dir);
        else if (isinf(m->config.family_penalty) && count_families(m) < most_topk(&m->config))
            set_error(error, "%s: %d experts a token, but only %d families, of which one member each may be chosen",
                      dir, most_topk(&m->config), count_families(m));
    }
    return !error->text[0];
}

// Reads AdamW's moments from DIR/optimizer.safetensors.
static int optimizer_load(Model* m, const char* dir, Error* error) {
    char path[PATH_SIZE];
    Error inner = {""};
    join_path(path, dir, "optimizer.safetensors");
    SafeTensors* s = safetensors_open(path, error);
    if (!s) return 0;
    // both halves are in one file: tensors of the other one are marked as used while one is read
    for (int half = 0; half < 2 && !inner.text[0]; half++) {
        const char* suffix = half ? ".exp_avg_sq" : ".exp_avg";
        for (int i = 0; i < s->num_tensors; i++) {
            size_t length = strlen(s->tensors[i].name), n = strlen(suffix);
            const char* end = length > n ? s->tensors[i].name + length - n : "";
            const char* other = half ? ".exp_avg" : ".exp_avg_sq";
            size_t k = strlen(other);
            s->tensors[i].used = strcmp(end, suffix) && length > k && !strcmp(s->tensors[i].name + length - k, other);
        }
        load_tensors(m, s, half ? m->exp_avg_sq : m->exp_avg, suffix, &inner);
    }
    if (inner.text[0]) set_error(error, "%s: %s", path, inner.text);
    safetensors_close(s);
    return !error->text[0];
}

// Files that belong to the tokenizer or to the model's history travel from the source to every save.
static const char* travelling_files[] = {"tokenizer.json",
                                         "tokenizer_config.json",
                                         "tokenizer.model",
                                         "special_tokens_map.json",
                                         "added_tokens.json",
                                         "vocab.json",
                                         "merges.txt",
                                         "generation_config.json",
                                         "chat_template.jinja",
                                         "upcycle.json",
                                         NULL};

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

// Moves every file of a directory into the directory `to`, or deletes it if `to` is NULL.
static void move_files(const char* from, const char* to, Error* error) {
    DIR* d = opendir(from);
    struct dirent* entry;
    while (d && (entry = readdir(d)) != NULL) {
        char old[PATH_SIZE], target[PATH_SIZE];
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        join_path(old, from, entry->d_name);
        if (to) join_path(target, to, entry->d_name);
        if (to ? rename(old, target) : unlink(old)) set_error(error, "%s: %s", old, strerror(errno));
    }
    if (d) closedir(d);
}

// The last step of a save, also made by --resume if a save was interrupted here: moves OUT/.ready's files into OUT.
static int finish_save(const char* out, Error* error) {
    char ready[PATH_SIZE];
    join_path(ready, out, ".ready");
    if (access(ready, F_OK)) return 1;
    move_files(ready, out, error);
    if (error->text[0] || !flush_directory(out, error)) return 0;
    if (rmdir(ready)) return set_error(error, "%s: %s", ready, strerror(errno));
    return 1;
}

static void trainer_to_json(Text* t, const Model* m, long step);        // in options.h

static int save_files(const Model* m, const char* dir, long step, Error* error) {
    char path[PATH_SIZE];
    Text text = {NULL, 0, 0};
    config_to_json(&text, &m->config);
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
        join_path(path, dir, pass ? "optimizer.safetensors" : "model.safetensors");
        ok = safetensors_write(path, tensors, count * (pass + 1), error);
    }
    free(tensors);
    free(names);
    for (int i = 0; travelling_files[i] && m->source && ok; i++) {
        size_t length;
        join_path(path, m->source, travelling_files[i]);
        if (access(path, F_OK)) continue;
        char* data = read_file(path, (size_t)1 << 30, &length, error);
        join_path(path, dir, travelling_files[i]);
        ok = data && write_file(path, data, length, error);
        free(data);
    }
    return ok && flush_directory(dir, error);
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
    if (!error.text[0] && save_files(m, saving, step, &error) && finish_save(out, &error)) {
        if (rename(saving, ready)) set_error(&error, "%s: %s", ready, strerror(errno));
        else if (flush_directory(out, &error)) finish_save(out, &error);
    }
    if (!error.text[0]) return NULL;
    Error ignored = {""};
    move_files(saving, NULL, &ignored);        // give the disk its space back
    rmdir(saving);
    return error.text;
}
