// plan.h: what was asked for becomes a plan, or is refused.
#pragma once

static int uses(Method m, const char* list) {
    const char* end;
    const char* name = METHODS;
    for (int i = 0; i < (int)m; i++) name = strchr(name, '|') + 1;
    size_t n = (end = strchr(name, '|')) ? (size_t)(end - name) : strlen(name);
    for (const char* s = list; *s;) {
        size_t k = strcspn(s, "|");
        if (k == n && !strncmp(s, name, n)) return 1;
        s += k + (s[k] == '|');
    }
    return 0;
}

// Options that say nothing to this source or method are refused: whoever gives one expects something of it.
static void check_options(const Plan* p, const Config* c, const char* src) {
#define DENSE_METHODS "copy|drop|noise|noise-replace|granular|partition|cluster|random"
#define MOE_METHODS \
    "copy|family|copy-noise|scaled|drop|interpolate|shuffle|orthogonal|svd-perturb|svd-mix|sparse-code-mix|random"
    static const char* dense_only[] = {"norm-topk", "layers", "sources",       "granularity",
                                       "scale",     "energy", "noise-fraction"};
    static const char* moe_only[] = {"select", "score-on",     "allocate",      "cap",
                                     "router", "router-delta", "prune-weights", "strength"};
    static const struct {
        const char *option, *methods;
    } wants[] = {{"drop-ratio", "drop"},
                 {"drop-indices", "drop|noise"},
                 {"granularity", "granular"},
                 {"scale", "granular|partition"},
                 {"energy", "cluster"},
                 {"noise-std", "noise|noise-replace|random"},
                 {"noise-fraction", "noise|noise-replace"},
                 {"strength", "copy-noise|scaled|interpolate|orthogonal|svd-perturb|svd-mix|sparse-code-mix"},
                 {"sources", "copy|drop|noise|noise-replace"}};
    if (!uses(p->method, p->dense ? DENSE_METHODS : MOE_METHODS))
        die(2, "--method %s is for a %s source, and %s is %s; fitting are %s", ask.method,
            p->dense ? "mixture-of-experts" : "dense", src, p->dense ? "dense" : "a mixture of experts",
            p->dense ? DENSE_METHODS : MOE_METHODS);
    for (int i = 0; !p->dense && i < 7; i++)
        if (insists(dense_only[i]) && (i > 0 || ask.norm_topk != c->norm_topk_prob))
            die(2, "--%s is for a dense source, and %s is a mixture of experts", dense_only[i], src);
    for (int i = 0; p->dense && i < 8; i++)
        if (insists(moe_only[i])) die(2, "--%s is for a mixture-of-experts source, and %s is dense", moe_only[i], src);
    for (size_t i = 0; i < sizeof wants / sizeof wants[0]; i++)
        if (insists(wants[i].option) && !uses(p->method, wants[i].methods))
            die(2, "--%s belongs to --method %s, and the method is %s", wants[i].option, wants[i].methods, ask.method);
    if (!p->dense && (insists("router-init") || insists("router-std")) && p->method != RANDOM)
        die(2, "--router-%s draws new rows, which --method %s does not have; --method random does",
            insists("router-init") ? "init" : "std", ask.method);
    if (p->method == CLUSTER && (insists("router-init") || insists("router-std")))
        die(2, "--router-init: the router of --method cluster is made of the centroids");
    if (uses(p->method, "svd-mix|sparse-code-mix") && asked("strength") && ask.strength > 1)
        die(2, "--strength %g: for --method %s it is the share that is exchanged, 0 to 1", ask.strength, ask.method);
    if (p->method == RANDOM && insists("prune-weights"))
        die(2, "--prune-weights goes by the inputs of experts, and the new ones of --method random have seen none");
}

static void open_sources(Plan* p, const char* src) {
    p->sources[p->num_sources++] = open_or_die(src, "");
    char *names = copy_string(ask.sources ? ask.sources : ""), *rest = names, *name;
    while (ask.sources && (name = strsep(&rest, ",")) != NULL) {
        if (p->num_sources == MAX_SOURCES) die(2, "--sources: more than %d", MAX_SOURCES);
        if (!*name) die(2, "--sources %s: a directory is missing between commas", ask.sources);
        Source* s = open_or_die(name, "");
        const Config *a = &p->sources[0]->config, *b = &s->config;
        const char* differs = a->arch != b->arch                                 ? "model_type"
                              : a->num_layers != b->num_layers                   ? "num_hidden_layers"
                              : a->hidden_size != b->hidden_size                 ? "hidden_size"
                              : a->num_heads != b->num_heads                     ? "num_attention_heads"
                              : a->num_kv_heads != b->num_kv_heads               ? "num_key_value_heads"
                              : a->head_dim != b->head_dim                       ? "head_dim"
                              : a->intermediate_size != b->intermediate_size     ? "intermediate_size"
                              : a->vocab_size != b->vocab_size                   ? "vocab_size"
                              : a->tie_word_embeddings != b->tie_word_embeddings ? "tie_word_embeddings"
                              : a->rope_theta != b->rope_theta                   ? "rope_theta"
                              : a->rms_norm_eps != b->rms_norm_eps               ? "rms_norm_eps"
                                                                                 : NULL;
        if (differs) die(2, "--sources: %s has another %s than %s; sources must be alike", name, differs, src);
        p->sources[p->num_sources++] = s;
    }
    free(names);
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
    if (!p->dense) return;
    window = active_window(p->luggage, &s->config, &layers);
    if (window && layers < s->config.num_layers)
        die(2, "%s: has sliding_window %d in %d of %d layers, and %s has one in all or none; if none is meant, set "
            "use_sliding_window to false in its config.json", s->dir, window, layers, s->config.num_layers,
            archs[p->config.arch].class_name);
    if (window) snprintf(size, sizeof size, "%d", window);
    json_set_raw(p->luggage, "sliding_window", size);
    if (p->config.arch == QWEN3_MOE) json_set_raw(p->luggage, "use_sliding_window", window ? "true" : "false");
    json_set_raw(p->luggage, "output_router_logits", "true");
}

// The configuration of DST.
static void plan_config(Plan* p) {
    const Config* from = &p->sources[0]->config;
    Config* c = &p->config;
    static const struct {
        const char* name;
        Arch arch;
    } targets[] = {{"qwen3", QWEN3_MOE}, {"mixtral", MIXTRAL}, {"olmoe", OLMOE}};
    *c = *from;
    int N = p->N;
    if (p->dense) {
        if (from->arch != LLAMA && from->arch != MISTRAL && from->arch != QWEN3)
            die(2, "%s: a dense %s model has no mixture-of-experts class; llama, mistral and qwen3 have",
                p->sources[0]->dir, archs[from->arch].model_type);
        c->arch = from->arch == QWEN3 ? QWEN3_MOE : MIXTRAL;
        int G = p->method == GRANULAR ? (int)ask.granularity : p->method == PARTITION ? N : 1;
        if (p->method == GRANULAR && !asked("granularity"))
            die(2, "--method granular wants --granularity G, the number of shards of an FFN");
        if (p->method == PARTITION) ask.granularity = N;
        if (from->intermediate_size % G)
            die(2, "--%s %d: the FFN's width, %d, is no multiple of it",
                p->method == GRANULAR ? "granularity" : "experts", G, from->intermediate_size);
        if (p->method == GRANULAR && N % G) die(2, "--experts %d: no multiple of --granularity %d", N, G);
        p->groups = N / G;
        c->num_experts_per_tok = asked("topk") ? (int)ask.topk : p->method == GRANULAR ? G : imin(2, N);
        if (p->method == GRANULAR && c->num_experts_per_tok % G)
            die(2, "--topk %d: no multiple of --granularity %d, so that groups would be torn apart",
                c->num_experts_per_tok, G);
        c->moe_intermediate_size = from->intermediate_size / G;
        c->norm_topk_prob = asked("norm-topk") ? (int)ask.norm_topk : 1;
        c->router_aux_loss_coef = 0.01;
        parse_layers(ask.layers, c->sparse, c->num_layers);
        if (count_sparse(c) == 0) die(2, "--layers %s: no layer becomes sparse", ask.layers);
        if (c->arch == MIXTRAL) c->intermediate_size = c->moe_intermediate_size;
        if (c->arch == MIXTRAL && count_sparse(c) < c->num_layers)
            die(2,
                "--layers %s: Mixtral, the class of a %s source, has no dense layers; --layers all fits, or a Qwen3 "
                "source (Qwen3-MoE has them)",
                ask.layers, archs[from->arch].model_type);
        if (c->arch == MIXTRAL && !c->norm_topk_prob)
            die(2,
                "--norm-topk 0: Mixtral, the class of a %s source, always renormalises; --norm-topk 1 fits, or a Qwen3 "
                "source (Qwen3-MoE has both)",
                archs[from->arch].model_type);
    } else if (asked("topk")) {
        c->num_experts_per_tok = (int)ask.topk;
    }
    if (!p->dense && count_sparse(c) == 0)
        die(2, "%s: has experts in name only: no layer is sparse", p->sources[0]->dir);
    c->num_experts = N;
    for (int i = 0; ask.arch && i < 3; i++)
        if (!strcmp(ask.arch, targets[i].name) && c->arch != targets[i].arch)
            die(2, "--arch %s cannot express a %s source%s", ask.arch, archs[from->arch].model_type,
                c->arch == QWEN3_MOE ? "'s norms; qwen3 fits"
                : c->arch == MIXTRAL ? "'s norms; mixtral fits"
                : c->arch == OLMOE   ? "'s norms; olmoe fits"
                                     : "; leave it out");
    if (c->num_experts_per_tok > N)
        die(2, "--topk %d: there are only %d experts; --topk %d fits", c->num_experts_per_tok, N, N);
}

// Decides what every expert is made from.
static void plan_experts(Plan* p) {
    int L = p->config.num_layers, N = p->N, E = p->E;
    size_t size = sizeof(int) * (size_t)L * (size_t)N;
    p->source = (int*)checked_malloc(size);
    p->copy = (int*)checked_malloc(size);
    p->family = (int*)checked_malloc(size);
    p->copies = (int*)checked_malloc(sizeof(int) * (size_t)L * (size_t)E);
    memset(p->copies, 0, sizeof(int) * (size_t)L * (size_t)E);
    memset(p->source, 0, size);
    memset(p->copy, 0, size);
    memset(p->family, 0, size);
    if (!p->dense) score_experts(p);
    for (int l = 0; l < L; l++) {
        int *source = p->source + (long)l * N, *copy = p->copy + (long)l * N, *family = p->family + (long)l * N;
        int* counts = p->copies + (long)l * E;
        const double* score = p->score ? p->score + (long)l * E : NULL;
        if (!p->config.sparse[l]) continue;
        if (p->dense) {
            for (int j = 0; j < N; j++) {
                source[j] = p->method == RANDOM ? -1 : j % p->num_sources;
                copy[j] = j / p->num_sources;
                // Families are exact copies of one thing: with drop and noise half of an expert still is one.
                family[j] = p->method == GRANULAR ? j % (int)ask.granularity : source[j];
                if (p->method == PARTITION || p->method == CLUSTER || p->method == RANDOM) family[j] = j;
            }
        } else if (N < E) {
            keep_best(source, score, E, N);
            for (int j = 0; j < N; j++) family[j] = j;
        } else {
            if (!score)
                allocate_uniform(counts, E, N);
            else if (!strcmp(ask.allocate, "sample") || p->selection == BY_CHANCE)
                allocate_sample(counts, score, E, N, (int)ask.cap, stream_key(p, "allocate", l, 0, 0));
            else
                allocate_greedy(counts, score, E, N, (int)ask.cap);
            place_copies(source, copy, counts, E, N);
            for (int j = 0; j < N; j++) {
                if (p->method == RANDOM && copy[j] > 0) source[j] = -1;
                family[j] = source[j] < 0 ? j : source[j];
            }
        }
        memset(counts, 0, sizeof(int) * (size_t)E);
        for (int j = 0; j < N; j++)
            if (source[j] >= 0) counts[source[j]]++;
    }
}

// The format of a tensor of the result.
static Dtype output_dtype(const Plan* p, const Role* r, const char* name) {
    const Source* s = p->sources[0];
    if (r->kind == ROUTER_CORRECTION) return DTYPE_F32;
    if (!strcmp(ask.dtype, "f32")) return DTYPE_F32;
    if (!strcmp(ask.dtype, "bf16")) return DTYPE_BF16;
    if (r->kind == ROUTER_ROWS && !p->dense) return s->views[s->router[r->layer]].stored->dtype;
    if (r->kind == ROUTER_ROWS) return source_ffn(s, r->layer, 0, GATE)->stored->dtype;
    if (r->kind == FFN_MATRIX && p->config.sparse[r->layer]) {
        int e = plan_source(p, r->layer, r->expert);
        const Source* made_from = p->dense && e >= 0 ? p->sources[e] : s;
        return source_ffn(made_from, r->layer, p->dense || e < 0 ? 0 : e, r->matrix)->stored->dtype;
    }
    const View* v = source_find(s, name);
    return v ? v->stored->dtype : DTYPE_F32;
}

// Lists the tensors of DST and packs them into files of at most `most` bytes of data (one tensor may be larger).
static void plan_outputs(Plan* p, long most) {
    int halves = p->carry == MOMENTS_RESET ? 0 : 2;
    p->layout = layout_create(&p->config);
    p->outputs = (Output*)checked_malloc(sizeof(Output) * (size_t)(1 + halves) * (size_t)p->layout.count);
    long at = 0;
    int file = 0;
    for (int half = -1; half < halves; half++) {
        if (half == 0) {
            file++;
            at = 0;
        }
        for (int i = 0; i < p->layout.count; i++) {
            Output* o = &p->outputs[p->num_outputs];
            memset(o, 0, sizeof *o);
            o->tensor = &p->layout.tensors[i];
            o->role = role_of(o->tensor->name);
            o->half = half;
            o->dtype = half < 0 ? output_dtype(p, &o->role, o->tensor->name) : DTYPE_F32;
            if (half >= 0 && o->role.kind == ROUTER_CORRECTION) {
                const Source* s = p->moments[half];
                if (s->correction[o->role.layer] < 0 || !s->views[s->correction[o->role.layer]].stored) continue;
            }
            snprintf(o->name, sizeof o->name, "%s%s", o->tensor->name,
                     half < 0 ? ""
                     : half   ? ".exp_avg_sq"
                              : ".exp_avg");
            o->bytes = tensor_size(o->tensor) * dtype_size(o->dtype);
            if (half < 0 && at > 0 && at + o->bytes > most) {
                file++;
                at = 0;
            }
            o->file = file;
            o->offset = at;
            at += o->bytes;
            progress.total += o->bytes;
            p->num_outputs++;
        }
        if (half < 0) p->model_files = file + 1;
    }
    p->num_files = file + 1;
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
    if (p->carry == MOMENTS_RESET) return;
    join_path(path, p->sources[0]->dir, "trainer.json");
    p->trainer = json_read(path, &error);
    if (!p->trainer || p->trainer->type != JSON_OBJECT)
        die(2, "--optimizer %s: %s", ask.optimizer, error.text[0] ? error.text : "trainer.json is no object");
}

static Plan* plan_create(const char* src) {
    Plan* p = (Plan*)checked_malloc(sizeof(Plan));
    Config c;
    Error error = {""};
    memset(p, 0, sizeof *p);
    if (!config_read(&c, src, &error)) die(2, "%s", error.text);
    p->method = (Method)choice_index(METHODS, ask.method);
    p->seed = (uint64_t)ask.seed;
    p->dense = c.num_experts == 0;
    if (c.family_penalty > 0)
        die(2, "%s: its families are still penalised; train it on to the end of --family-steps first", src);
    check_options(p, &c, src);
    open_sources(p, src);
    if (!asked("experts")) die(2, "--experts N is missing: the number of experts of each sparse layer in DST");
    p->N = (int)ask.experts;
    p->E = p->dense ? p->num_sources : c.num_experts;
    p->groups = p->N;
    const Source* s = p->sources[0];
    if (p->N < p->E && p->dense) die(2, "--experts %d: there are %d sources, and each needs an expert", p->N, p->E);
    plan_config(p);
    plan_luggage(p);

    // selection
    int shrinks = !p->dense && p->N < p->E;
    p->selection = ask.select ? (Selection)choice_index(SELECTIONS, ask.select) : UNIFORM;
    if (shrinks && (p->selection == UNIFORM || p->selection == SALIENCY || p->selection == FISHER))
        die(2,
            "--experts %d: %s has %d; to keep some of them, choose --select router-norm, load, grad2, weight or "
            "random%s",
            p->N, src, p->E, p->selection == UNIFORM ? "" : "; the selection asked for is for larger models");
    if (!p->dense && !shrinks && (p->selection == LOAD || p->selection == ROUTER_NORM))
        die(2,
            "--select %s chooses experts to keep, but DST is not smaller; uniform, random, weight, saliency, grad2 or "
            "fisher fit",
            ask.select);
    if (shrinks && p->method != COPY)
        die(2, "--method %s makes copies, but DST has fewer experts than SRC; leave it out", ask.method);
    if (!p->dense && p->N == p->E && p->method != COPY)
        die(2, "--method %s makes copies, but DST has as many experts as SRC, %d", ask.method, p->E);
    if (shrinks && p->config.num_experts_per_tok == p->N && p->N < c.num_experts_per_tok)
        p->config.num_experts_per_tok = p->N;
    if (insists("score-on") && (p->selection < WEIGHT || p->selection > FISHER))
        die(2, "--score-on belongs to --select weight, saliency, grad2 or fisher");
    if ((insists("allocate") || insists("cap")) && (p->selection == UNIFORM || shrinks))
        die(2, "--%s hands out copies by a score; --select weight, saliency, grad2 or fisher has one",
            insists("cap") ? "cap" : "allocate");
    if (asked("allocate") && p->selection == BY_CHANCE)
        die(2, "--allocate: --select random draws lots; weight, saliency, grad2 or fisher have scores");

    // router
    int correction = 0;
    for (int l = 0; l < c.num_layers; l++) correction |= s->correction[l] >= 0;
    p->router = ask.router                          ? (RouterMethod)choice_index(ROUTERS, ask.router)
                : correction && p->method != FAMILY ? ROUTER_BIAS
                                                    : ROUTER_COPY;
    if (p->router == ROUTER_BIAS && !correction)
        die(2,
            "--router bias: the routers of %s have no bias to perturb; --router perturb-new changes the rows of copies",
            src);
    if (p->method == FAMILY && c.router == ROUTER_LPR)
        die(2, "--method family: %s has an lpr router, which knows no families; --method copy fits", src);
    if (p->method == FAMILY && p->config.num_experts_per_tok > p->E)
        die(2, "--topk %d: a token gets one member of a family at most, and there are %d families",
            p->config.num_experts_per_tok, p->E);
    if (p->method == FAMILY) p->config.family_penalty = INFINITY; // train_moe lowers it
    if (p->method == FAMILY && p->router != ROUTER_COPY)
        die(2, "--router %s: --method family keeps the function exactly, which needs --router copy", ask.router);
    if (p->router != ROUTER_COPY && ask.router && p->N <= p->E && !(p->N == p->E && p->router == ROUTER_NOISE))
        die(2, "--router %s is for copies, and DST has no more experts than SRC", ask.router);
    if (insists("router-delta") && p->router == ROUTER_COPY) die(2, "--router-delta: --router copy has no strength");
    if (asked("router-delta") && p->router == ROUTER_TEMPERATURE && ask.router_delta == 0)
        die(2, "--router-delta 0: --router temperature divides by it; expected a positive number");

    // AdamW's moments
    p->carry = (Moments)choice_index("reset|copy|scale|interpolate", ask.optimizer);
    if (p->carry != MOMENTS_RESET && (p->num_sources > 1 || p->method == CLUSTER || p->method == RANDOM) && p->dense)
        die(2,
            "--optimizer %s: the experts of this method have no weights that moments could go with; --optimizer reset "
            "fits",
            ask.optimizer);
    if (p->carry == MOMENTS_INTERPOLATE && (p->dense || p->method == SHUFFLE))
        die(2, "--optimizer interpolate: %s has no next expert to interpolate with; --optimizer copy fits",
            p->dense ? "a dense model" : "a permuted copy");
    for (int half = 0; p->carry != MOMENTS_RESET && half < 2; half++)
        p->moments[half] = open_or_die(src, half ? ".exp_avg_sq" : ".exp_avg");
    read_records(p);

    if (p->method == CLUSTER) find_clusters(p);
    plan_experts(p);
    if (insists("prune-weights")) {
        long n = (long)c.num_layers * p->E * (c.hidden_size + c.moe_intermediate_size);
        p->input_norms = (double*)checked_malloc(sizeof(double) * (size_t)n);
        memset(p->input_norms, 0, sizeof(double) * (size_t)n);
        double* load = (double*)checked_malloc(sizeof(double) * (size_t)c.num_layers * (size_t)p->E);
        memset(load, 0, sizeof(double) * (size_t)c.num_layers * (size_t)p->E);
        Usage usage = {load, p->input_norms};
        measure_usage(s, &usage, "--prune-weights");
        long width = c.hidden_size + c.moe_intermediate_size;
        for (long i = 0; i < n; i++)
            p->input_norms[i] = load[i / width] > 0 ? sqrt(p->input_norms[i]) : 1; // no token: by |w| alone
        free(load);
    }
    plan_outputs(p, parse_size(ask.shard_size));
    return p;
}

static void plan_free(Plan* p) {
    Clusters* k = (Clusters*)p->clusters;
    for (int l = 0; k && l < p->config.num_layers; l++) {
        free(k->inputs[l]);
        free(k->cluster[l]);
    }
    if (k) {
        for (int i = 0; i < 3; i++) free(k->made[i]);
        free(k->inputs);
        free(k->cluster);
        free(k);
    }
    for (int i = 0; i < p->num_sources; i++) source_close(p->sources[i]);
    for (int i = 0; i < 2; i++) source_close(p->moments[i]);
    free(p->layout.tensors);
    free(p->source);
    free(p->copy);
    free(p->family);
    free(p->copies);
    free(p->score);
    free(p->input_norms);
    free(p->centroids);
    free(p->outputs);
    json_free(p->luggage);
    json_free(p->parent);
    json_free(p->trainer);
    free(p);
}
