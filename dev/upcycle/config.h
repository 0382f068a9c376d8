// config.h: the configuration of the result, its sources, and what they tell of themselves.
#pragma once

static void open_sources(Plan* p, const char* src) {
    p->sources[p->num_sources++] = p->states[WEIGHTS] = open_or_die(src, "");
    char *names = copy_string(ask.sources ? ask.sources : ""), *rest = names, *name;
    while (ask.sources && (name = next_path(&rest)) != NULL) {
        if (p->num_sources == MAX_SOURCES) die(2, "--sources: more than %d", MAX_SOURCES);
        if (!*name) die(2, "--sources %s: a directory is missing between commas", ask.sources);
        Source* s = open_or_die(name, "");
        const Config *a = &p->sources[0]->config, *b = &s->config;
        int other_block = archs[a->arch].qk_norm != archs[b->arch].qk_norm || is_moe(b->arch);
        const char* differs = other_block                                    ? "model_type"
                              : a->num_layers != b->num_layers               ? "num_hidden_layers"
                              : a->hidden_size != b->hidden_size             ? "hidden_size"
                              : a->intermediate_size != b->intermediate_size ? "intermediate_size"
                                                                             : NULL;
        if (differs) die(2, "--sources: %s has another %s than %s; FFNs must be alike", name, differs, src);
        const char* unlike = a->qkv_bias != b->qkv_bias                         ? "model_type"
                             : a->num_heads != b->num_heads                     ? "num_attention_heads"
                             : a->num_kv_heads != b->num_kv_heads               ? "num_key_value_heads"
                             : a->head_dim != b->head_dim                       ? "head_dim"
                             : a->vocab_size != b->vocab_size                   ? "vocab_size"
                             : a->tie_word_embeddings != b->tie_word_embeddings ? "tie_word_embeddings"
                             : a->rope_theta != b->rope_theta                   ? "rope_theta"
                             : memcmp(&a->rope, &b->rope, sizeof a->rope)       ? "rope_scaling"
                             : a->rms_norm_eps != b->rms_norm_eps               ? "rms_norm_eps"
                                                                                : NULL;
        if (unlike && is(ask.rest, "mean"))
            die(2, "--rest mean: %s has another %s than %s; with --rest base all but FFNs is SRC's", name, unlike, src);
        if (unlike) p->unlike = unlike;
        p->sources[p->num_sources++] = s;
    }
    free(names);
    p->rest_is_mean = p->num_sources > 1 && !p->unlike && !is(ask.rest, "base");
}

// Width of the shared expert that Qwen2-MoE must have: vLLM and llama.cpp do not open one of width 0, and 32 is what a
// block of llama.cpp's formats holds.
enum { SHARED_WIDTH = 32 };

// A dense SRC's part of the configuration of DST: Qwen2 and Qwen3 become their MoEs, Llama and Mistral become Mixtral.
static void plan_config_of_dense(Plan* p, const Config* from, Config* c) {
    int granular = is(p->method->name, "granular"), partition = is(p->method->name, "partition"), M = p->M;
    int parts = p->method->traits & PARTS, shared = p->num_shared = parts ? (int)ask.shared : 0;
    const char* type = archs[from->arch].model_type;
    if (is_moe(from->arch))
        die(2, "%s: a dense %s model has no mixture-of-experts class; llama, mistral, qwen2 and qwen3 have",
            p->sources[0]->dir, type);
    c->arch = from->arch == QWEN2 ? QWEN2_MOE : from->arch != QWEN3 ? MIXTRAL : shared ? DOTS1 : QWEN3_MOE;
    if (shared && c->arch == MIXTRAL)
        die(2,
            "--shared %d: Mixtral, the class of a %s source, has no shared expert; --shared 0 fits, or a Qwen2 or "
            "Qwen3 source (Qwen2-MoE and Dots1 have one)",
            shared, type);
    if (c->arch == QWEN2_MOE) c->shared_expert_intermediate_size = SHARED_WIDTH;
    if (granular && !asked("granularity"))
        die(2, "--method granular wants --granularity G, the number of shards of an FFN");
    int G = p->shards = granular ? (int)ask.granularity : partition || parts ? M + shared : 1;
    if (from->intermediate_size % G)
        die(2, "--%s %d: the FFN's width, %d, is no multiple of %s%d", granular ? "granularity" : "experts", G - shared,
            from->intermediate_size, shared ? "that and --shared, " : "it, ", G);
    if (granular && M % G) die(2, "--experts %d: no multiple of --granularity %d", M, G);
    c->num_experts_per_tok = asked("topk") ? (int)ask.topk : granular ? G : imin(2, M);
    if (granular && c->num_experts_per_tok % G)
        die(2, "--topk %d: no multiple of --granularity %d, so that groups would be torn apart",
            c->num_experts_per_tok, G);
    c->moe_intermediate_size = from->intermediate_size / G;
    if (is(p->method->name, "domains"))
        c->moe_intermediate_size = (int)floor(ask.unit_share * from->intermediate_size + 1e-9);
    if (c->moe_intermediate_size < 1)
        die(2, "--unit-share %g: no unit of %d is left", ask.unit_share, from->intermediate_size);
    c->norm_topk_prob = asked("norm-topk") ? (int)ask.norm_topk : 1;
    c->router_aux_loss_coef = 0.01;
    parse_layers(ask.layers, c->sparse, c->num_layers);
    if (count_sparse(c) == 0) die(2, "--layers %s: no layer becomes sparse", ask.layers);
    if (c->arch == QWEN2_MOE && shared) c->shared_expert_intermediate_size = shared * c->moe_intermediate_size;
    if (c->arch == DOTS1) { // whose experts are chosen by sigmoids, and balanced by a bias
        c->num_shared_experts = shared;
        c->router.kind = ROUTER_SIGMOID;
        c->router.scaling = 1;
        c->router_aux_loss_coef = 0;
        for (int l = 1; l < c->num_layers; l++)
            if (c->sparse[l - 1] && !c->sparse[l])
                die(2, "--layers %s: the dense layers of a Dots1, the class with a shared expert of a %s source, come "
                    "before all others", ask.layers, type);
    }
    if (c->arch != MIXTRAL) return;
    c->intermediate_size = c->moe_intermediate_size;
    if (count_sparse(c) < c->num_layers)
        die(2,
            "--layers %s: Mixtral, the class of a %s source, has no dense layers; --layers all fits, or a Qwen3 "
            "source (Qwen3-MoE has them)",
            ask.layers, type);
    if (!c->norm_topk_prob)
        die(2,
            "--norm-topk 0: Mixtral, the class of a %s source, always renormalises; --norm-topk 1 fits, or a Qwen3 "
            "source (Qwen3-MoE has both)",
            type);
}

// Orthogonal Growth (arXiv 2510.08008): E and K become m E and m K, so that a token gets all m copies of its experts.
static int multiplied_topk(const Plan* p, const Config* from) {
    int E = from->num_experts, K = from->num_experts_per_tok * (p->M / E);
    if (p->M % E || p->M < E) die(2, "--experts %d: --method multiply wants a multiple of SRC's %d", p->M, E);
    if (asked("topk") && ask.topk != K)
        die(2, "--topk %ld: --method multiply makes it %d, as many times SRC's as experts", ask.topk, K);
    return K;
}

// The configuration of DST.
static void plan_config(Plan* p) {
    static const Arch targets[] = {QWEN3_MOE, MIXTRAL, OLMOE}; // in the order of --arch's choices
    static const char* names[] = {"qwen3", "mixtral", "olmoe"};
    const Source* s = p->sources[0];
    const Config* from = &s->config;
    Config* c = &p->config;
    const char* fits = "; leave it out";
    *c = *from;
    p->shards = 1;
    if (stays_dense(p)) return;
    if (p->dense) plan_config_of_dense(p, from, c);
    else if (is(p->method->name, "multiply")) c->num_experts_per_tok = multiplied_topk(p, from);
    else if (asked("topk")) c->num_experts_per_tok = (int)ask.topk;
    if (!p->dense && count_sparse(c) == 0) die(2, "%s: has experts in name only: no layer is sparse", s->dir);
    char sparse[MAX_LAYERS];
    parse_layers(ask.layers, sparse, c->num_layers);
    if (!p->dense && asked("layers") && memcmp(sparse, c->sparse, (size_t)c->num_layers))
        die(2, "--layers %s: other layers of %s are sparse, and stay so; leave it out", ask.layers, s->dir);
    c->num_experts = p->M;
    for (int i = 0; i < 3; i++)
        if (c->arch == targets[i]) fits = names[i];
    if (ask.arch && !is(ask.arch, fits))
        die(2, "--arch %s cannot express a %s source%s%s%s", ask.arch, archs[from->arch].model_type,
            *fits == ';' ? "" : "'s norms; ", fits, *fits == ';' ? "" : " fits");
    if (c->num_experts_per_tok > p->M)
        die(2, "--topk %d: there are only %d experts; --topk %d fits", c->num_experts_per_tok, p->M, p->M);
}

// Another text in the place of a member's, or a new member.
static void json_set_raw(Json* j, const char* key, const char* raw) {
    Json* v = (Json*)json_get(j, key);
    if (!v) {
        v = (Json*)checked_malloc(sizeof(Json));
        memset(v, 0, sizeof *v);
        v->key = copy_bytes(key, strlen(key));
        j->items = (Json**)realloc(j->items, sizeof(Json*) * (size_t)(j->count + 1));
        if (!j->items) die(1, "out of memory");
        j->items[j->count++] = v;
        qsort(j->items, (size_t)j->count, sizeof(Json*), json_compare_keys);
    }
    free(v->raw);
    v->raw = copy_bytes(raw, strlen(raw));
    v->number = atof(raw);
}

// Members of config.json that tell layers apart, for a model with more of them.
static void grow_luggage(Plan* p) {
    const Growth* g = p->growth;
    const Json* types = json_get(p->luggage, "layer_types");
    char count[16];
    int layers, L = source_config(p)->num_layers, depth = p->config.num_layers;
    if (depth == L) return;
    if (active_window(p->luggage, &g->from, &layers) && layers < L)
        die(2, "--layers-to: %s has a sliding window in %d of %d layers, and new layers belong to neither kind",
            p->sources[0]->dir, layers, L);
    snprintf(count, sizeof count, "%d", depth);
    if (!layers && luggage_number(p->luggage, g->from.arch, "max_window_layers") >= L)
        json_set_raw(p->luggage, "max_window_layers", count);
    if (json_absent(types) || types->count != L) return;
    Text t = {NULL, 0, 0};
    for (int l = 0; l < depth; l++) text_print(&t, "%s\"%s\"", l ? ", " : "[", types->items[g->source[l]]->string);
    text_print(&t, "]");
    json_set_raw(p->luggage, "layer_types", t.data);
    free(t.data);
}

// What config.json says besides: all that SRC says. A dense model gets the balance loss that the receipt speaks of, and
// its window under the keys of its new class, in which every layer has one or none.
static void plan_luggage(Plan* p) {
    const Source* s = p->sources[0];
    Error error = {""};
    char size[16] = "null";
    int layers, window;
    p->luggage = luggage_read(s->dir, &error);
    if (!p->luggage) die(2, "%s", error.text);
    grow_luggage(p);
    if (!p->dense || stays_dense(p)) return;
    window = active_window(p->luggage, &s->config, &layers);
    if (window && (layers < s->config.num_layers || p->config.arch == QWEN2_MOE))
        die(2, "%s: has sliding_window %d in %d of %d layers, which %s cannot have; if none is meant, set "
            "use_sliding_window to false in its config.json", s->dir, window, layers, s->config.num_layers,
            archs[p->config.arch].class_name);
    if (window) snprintf(size, sizeof size, "%d", window);
    json_set_raw(p->luggage, "sliding_window", size);
    if (names_dense_layers(p->config.arch)) json_set_raw(p->luggage, "use_sliding_window", window ? "true" : "false");
    json_set_raw(p->luggage, "output_router_logits", "true");
}

// What SRC tells of itself and DST will repeat, read now: a broken file is better found before the long work.
static void read_records(Plan* p) {
    enum { GENERATIONS = 12 }; // each is some levels of JSON, and readers know 64
    char path[PATH_SIZE];
    Error error = {""};
    join_path(path, p->sources[0]->dir, "upcycle.json");
    if (!access(path, F_OK)) p->parent = json_read(path, &error);
    if (error.text[0]) die(2, "%s", error.text);
    Json* ancestor = p->parent;
    for (int i = 0; ancestor && i < GENERATIONS; i++) ancestor = (Json*)json_get(ancestor, "parent");
    if (ancestor) ancestor->type = JSON_NULL;
    if (!p->carries) return;
    join_path(path, p->sources[0]->dir, "trainer.json");
    p->trainer = json_read(path, &error);
    if (!p->trainer || p->trainer->type != JSON_OBJECT)
        die(2, "--optimizer %s: %s", ask.optimizer, error.text[0] ? error.text : "trainer.json is no object");
}
