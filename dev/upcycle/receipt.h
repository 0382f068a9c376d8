// receipt.h: the receipt: what was done, what holds by construction, what to beware of.
//
//  - Twins tie, so for K >= 2 top-K picks both copies of the best expert instead of the two best experts.
//  - A softmax over m times the experts makes every gate m times smaller, unless the K gates are renormalised.
//  - Twins that are always chosen together with equal gates get equal gradients and stay twins for ever.
//  - dL/dlogit_e is proportional to <dL/dy, f_e(x) - y>: 0 if all chosen experts are equal, or K = 1 and the gate is 1.
#pragma once

// What --check measured.
typedef struct {
    int done;
    double loss_before, loss_after; // nats a token
    double logits; // || after - before || / || before ||
    double distinct; // mean number of different sources among a token's K experts; 0: not counted
    long tokens;
} Proof;

enum { MAX_NOTES = 16 };
typedef struct {
    char function[512]; // whether DST computes what SRC computed
    char balance[160]; // whether transformers, too, trains DST with a balance loss
    char notes[MAX_NOTES][512]; // warnings
    int count;
} Findings;

// A sentence that is said if its condition holds; braces stand for a word.
typedef struct {
    int holds;
    const char* sentence;
} Finding;
enum { MAX_WORDS = 48 };
typedef struct {
    const char* name[MAX_WORDS];
    char text[MAX_WORDS][256];
    int count;
} Words;

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static void
add_word(Words* w, const char* name, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(w->text[w->count], sizeof w->text[0], format, args);
    va_end(args);
    w->name[w->count++] = name;
}

// The sentence with its words
static void fill_in(char* out, size_t size, const char* sentence, const Words* words) {
    size_t n = 0;
    for (const char* s = sentence; *s && n + 1 < size; s++) {
        size_t length = strcspn(s, "}");
        int i = *s == '{' ? 0 : words->count;
        while (i < words->count && (strlen(words->name[i]) != length - 1 || memcmp(words->name[i], s + 1, length - 1)))
            i++;
        int found = i < words->count;
        n += (size_t)snprintf(out + n, size - n, "%.*s", found ? 256 : 1, found ? words->text[i] : s);
        s += i < words->count ? length : 0;
    }
}

static void warn(Findings* f, const char* sentence, const Words* words) {
    if (f->count < MAX_NOTES) fill_in(f->notes[f->count++], sizeof f->notes[0], sentence, words);
}

// Most copies of one expert in any layer, and whether all experts have equally many.
static int most_copies(const Plan* p, int* equal) {
    int most = 0, least = INT_MAX;
    for (int l = 0; l < p->config.num_layers; l++)
        for (int e = 0; p->config.sparse[l] && e < p->E; e++) {
            most = imax(most, p->copies[(long)l * p->E + e]);
            least = imin(least, p->copies[(long)l * p->E + e]);
        }
    *equal = most == least;
    return most;
}

// 1 if all experts that are made from one source compute what it computes: by their method, or since nothing of them is
// drawn, mixed or cut with these options.
static int copies_are_equal(const Plan* p) {
    const char* name = p->method->name;
    long n = imin(p->config.hidden_size, p->config.moe_intermediate_size); // singular vectors
    double a = strength(p);
    if (lists("granular,partition", name)) return p->shards == 1 && (!asked("drop-ratio") || ask.drop_ratio == 0);
    if (is(name, "drop")) return ask.drop_ratio == 0;
    if (lists("noise,noise-replace", name))
        return ask.noise_fraction == 0 || (is(name, "noise") && ask.noise_std == 0);
    if (is(name, "domains")) return ask.unit_share == 1;
    if (is(name, "interpolate") && p->E == 1) return 1; // the next expert is the same one
    if (lists("multiply,copy-noise,interpolate,svd-perturb", name)) return a == 0;
    if (is(name, "scaled")) return a == 1;
    if (is(name, "sparse-code-mix")) n = lmin(n, 64); // atoms
    if (p->method->traits & SHARE) return p->E == 1 || floor(a * (double)n + 1e-9) == 0; // as draw_units counts
    return (p->method->traits & EQUAL) != 0;
}

#define NOT_KEPT "not kept: "
static void find_properties(const Plan* p, Findings* f) {
    const Config *from = &p->sources[0]->config, *to = &p->config;
    const char* name = p->method->name;
    int K = to->num_experts_per_tok, K0 = from->num_experts_per_tok, M = p->M, E = p->E, norm = to->norm_topk_prob;
    int equal, m = imax(1, most_copies(p, &equal)), G = p->shards, multiply = is(name, "multiply");
    int twins = copies_are_equal(p), all_copies = equal && K == m * K0;
    int mixture = !p->dense, one_model = p->num_sources == 1, larger = M > E, one = K == 1 && K0 == 1;
    int family = is(name, "family"), granular = is(name, "granular"), parts = p->method->traits & PARTS;
    int shards = granular || is(name, "partition"), sharded = shards || parts;
    int sums = norm || (K == M && to->router.kind == ROUTER_SOFTMAX); // a token's gates sum to 1
    int dropped = asked("drop-ratio") && ask.drop_ratio > 0; // also of shards
    int zero_router = is(ask.router_init, "zero"), exponent;
    double scale = parts ? (norm ? K : M) : norm ? G : (double)M * G / K; // as in part_scale and shard_scale
    int is_new = p->method->traits & NEW_ROWS, lpr = from->router.kind == ROUTER_LPR;
    int sigmoid = from->router.kind == ROUTER_SIGMOID, raw = sigmoid && !norm, biased = is(p->router->name, "bias");
    double nothing = lists("scaled,temperature", p->router->name) ? 1 : 0; // the strength that leaves rows as they are
    int plain_router = is(p->router->name, "copy") || biased || router_strength(p) == nothing;
    // the mean of all logits, and the mean of all prototypes, are those of SRC only if every expert has as many copies
    int unequal_sums = (from->router.logit_norm > 0 || lpr) && !equal;
    // down times a number that is no power of two has more digits than BF16 and F16 hold
    int l = 0, near = (K + m - 1) / m;
    while (!to->sparse[l] && l + 1 < to->num_layers) l++;
    int half = is(ask.dtype, "keep") && dtype_size(source_ffn(p->sources[0], l, 0, DOWN)->stored->dtype) == 2;
    int copied = p->growth && p->growth->num_new && !p->growth->zero, dense = p->dense && !stays_dense(p);
    int f16 = p->growth && p->growth->times > 1 && source_ffn(p->sources[0], l, 0, DOWN)->stored->dtype == DTYPE_F16;
    char grown[256];
    growth_words(p, grown, sizeof grown);
    int rounds = (dense && sharded && half && frexp(scale, &exponent) != 0.5) || f16;
    const char* rounding = !is(ask.dtype, "keep") && !is(ask.dtype, "f32") ? ", up to rounding to bf16"
                           : rounds                                        ? ", up to rounding of down"
                                                                           : "";
    const Clusters* clusters = p->clusters;
    Words words = {{NULL}, {""}, 0};
    add_word(&words, "K", "%d", K);
    add_word(&words, "K0", "%d", K0);
    add_word(&words, "K-1", "%d", K - 1);
    add_word(&words, "M", "%d", M);
    add_word(&words, "E", "%d", E);
    add_word(&words, "E-M", "%d", E - M);
    add_word(&words, "M-E", "%d", M - E);
    add_word(&words, "G", "%d", G);
    add_word(&words, "scale", "%.3g", scale);
    add_word(&words, "exact is", "%s", !granular ? "" : sums ? "; --scale exact is"
                                                             : "; --scale exact with --norm-topk 1 is");
    add_word(&words, "shared", "%d", p->num_shared);
    add_word(&words, "rest", p->rest_is_mean ? "their mean" : p->unlike ? "SRC's, as they differ in " : "SRC's");
    if (p->unlike) strcat(words.text[words.count - 1], p->unlike);
    add_word(&words, "m", "%d", m);
    add_word(&words, "K/m", "%d", K / m);
    add_word(&words, "K/m experts", "%d expert%s", K / m, K / m > 1 ? "s" : "");
    add_word(&words, "near sources", "%d distinct source%s", near, near > 1 ? "s" : "");
    add_word(&words, "M/K", "%.3g", (double)M / K);
    add_word(&words, "drop", "%.0f", 100 * ask.drop_ratio);
    add_word(&words, "share", "%.0f", 100 * ask.unit_share);
    add_word(&words, "prune", "%.0f", 100 * ask.prune_weights);
    add_word(&words, "rank", "%.1f", clusters && clusters->matrices ? (double)clusters->ranks / clusters->matrices : 0);
    add_word(&words, "coefficient", "%g", to->router_aux_loss_coef);
    add_word(&words, "up to", "%s", rounding);
    add_word(&words, "router", "%s", p->router->name);
    int new_layers = p->growth ? p->growth->num_new : 0;
    add_word(&words, "new", "%d new layer%s", new_layers, new_layers > 1 ? "s" : "");
    add_word(&words, "L", "%d", to->num_layers);
    add_word(&words, "times", "%d", p->growth ? p->growth->times : 1);
    add_word(&words, "sums", "%s",
             lpr ? "the read-out of the prototypes" : "the mean and spread that logit_norm divides by");
    add_word(&words, "gate", "%s", raw ? "does not change" : "is 1");
    add_word(&words, "never learns",
             "K = 1 with renormalised gates: every gate is 1, so the router never learns from the loss");
    add_word(&words, "never separate",
             "equal gates get equal gradients and never separate in a deterministic trainer");
    int families_fit = K <= E && !lpr; // see refuse_router
    add_word(&words, "family", "%s", families_fit ? "; --method family avoids it" : "");
    add_word(&words, "or family", "%s", families_fit ? " or --method family avoid it" : " avoids it");
    add_word(&words, "family or", "%s", families_fit ? "--method family or drop, or" : "--method drop or");
    // of the pairs of copies of a unit: those of which neither is drawn anew
    double stay = 1 - (is(name, "noise") ? ask.noise_fraction : ask.drop_ratio);
    add_word(&words, "pairs", "%.0f", 100 * pow(stay, is(ask.drop_indices, "shared") ? 2 : 6));

    // the first that holds
    const Finding of_copied = {1, NOT_KEPT "copied layers add their part once more: {new} of {L}"};
    const Finding of_dense[] = {
        {!dense, "kept exactly{up to}"},
        {sharded && dropped,
         NOT_KEPT "{drop} % of the units of every shard are drawn anew"},
        {!one_model, NOT_KEPT "experts come from {E} models and everything else is {rest}"},
        {sums && twins, "kept exactly{up to}: gates sum to 1, and every expert is the dense FFN"},
        {twins && !sharded,
         NOT_KEPT "gates are not renormalised, so every FFN's output shrinks to about K / N = {K} / {M}"},
        {shards && is(ask.scale, "cuberoot"),
         NOT_KEPT "the cube root of the scale on gate, up and down is not exact for SwiGLU{exact is}"},
        {shards && is(ask.scale, "none"),
         NOT_KEPT "--scale none leaves a token with about 1 / {scale} of the FFN's output"},
        {sums && granular,
         "kept exactly{up to}: gates sum to 1, and down is scaled by {G} for the {G} shards of a group"},
        {sharded && zero_router && (granular || K == M),
         "kept exactly{up to} while the router is zero, as it is now: all gates are equal"},
        {sharded && !granular && K == M,
         "nearly kept: gates weigh the parts of the FFN; exactly while the router is zero (--router-init zero)"},
        {1, p->method->changed}};
    const Finding of_mixture[] = {
        {insists("prune-weights"), NOT_KEPT "{prune} % of the weights of every expert are zero"},
        {p->group != NULL,
         NOT_KEPT "the {E} experts of each sparse layer became {M}, each the mean of a group, weighted by load; only "
                  "groups of equal experts lose nothing"},
        {M < E, NOT_KEPT "{E-M} of {E} experts are gone from each sparse layer"},
        {M == E && K != K0, NOT_KEPT "{K} experts per token instead of {K0}"},
        {is_new, NOT_KEPT "{M-E} experts of each sparse layer are new, with new rows of the router"},
        {is(ask.router_bias, "reset"), NOT_KEPT "the bias that experts are selected by is 0 again"},
        {M == E && (plain_router || !is(p->router->name, "noise")),
         p->growth ? "kept exactly{up to}" : "kept exactly{up to}: nothing was added"},
        {unequal_sums, NOT_KEPT "unequal numbers of copies shift {sums}"},
        {family && K != K0, "that of SRC with {K} experts per token while train_moe's family penalty is infinite"},
        {family,
         "kept exactly{up to} while train_moe's family penalty is infinite (t = 0 of --family-steps), for every K; "
         "only train_moe opens it until the penalty has ended"},
        {E == 1 && sums && twins, "kept exactly{up to}: gates sum to 1, and every expert is SRC's one"},
        {from->router.kind == ROUTER_DYNAMIC,
         NOT_KEPT "how many experts a token gets depends on the entropy over all of them, {M} instead of {E}"},
        {!twins, NOT_KEPT "copies differ from their sources"},
        {!plain_router, NOT_KEPT "routing changes (--router {router})"},
        {one && sigmoid && biased,
         "kept{up to} but for tokens whose best scores are closer than twice the bias' delta: K = 1, and the one gate "
         "{gate}"},
        {one && (norm || sigmoid), "kept exactly{up to}: K = 1, and the one gate {gate}"},
        {one, "kept up to the gate: the same expert is chosen, but its gate shrinks"},
        {K == 1, NOT_KEPT "1 expert per token instead of {K0}"},
        {biased, NOT_KEPT "with K = {K} a token gets copies of one expert instead of different experts"},
        {raw && equal && K % m == 0,
         NOT_KEPT "sigmoid gates are not renormalised, so {m} copies add up to {m} times an expert's output"},
        {norm && K0 == 1 && equal && K < m, "kept exactly{up to}: the top {K} are copies of SRC's one"},
        {all_copies, "kept exactly{up to}: the top {K} are {m} copies of each of SRC's {K0}"},
        {equal && K % m == 0,
         "that of SRC with {K/m experts} per token{up to}: the top {K} are {m} copies each of the best {K/m}"},
        {1, NOT_KEPT "with K = {K} a token gets copies of one expert instead of different experts"}};
    const Finding of_balance[] = {
        {stays_dense(p), "none: DST is dense"},
        {!is_ordinary(to) || to->arch == DOTS1, "only in train_moe; transformers has none for this class"},
        {is(json_raw(p->luggage, "output_router_logits"), "true"),
         "in transformers, too: config.json has output_router_logits true and router_aux_loss_coef {coefficient}"},
        {1, "only in train_moe; transformers wants output_router_logits true, which SRC's config.json has not"}};
    const Finding *first = copied ? &of_copied : p->dense ? of_dense : of_mixture, *balance = of_balance;
    while (!first->holds) first++;
    while (!balance->holds) balance++;
    memset(f, 0, sizeof *f);
    fill_in(f->function, sizeof f->function, first->sentence, &words);
    fill_in(f->balance, sizeof f->balance, balance->sentence, &words);
    size_t n = strlen(f->function);
    snprintf(f->function + n, sizeof f->function - n, "%s%s",
             is(name, "shuffle") ? " (permuted units change the order of additions, nothing else)" : "",
             copied ? "" : grown);

    // all that hold
    mixture = mixture && larger && !is_new;
    const int wider = p->growth && p->growth->times > 1;
    const int tied = twins && !family, collapse = mixture && K >= 2 && !family;
    const Finding warnings[] = {
        {wider && !p->dense,
         "the {times} copies of a unit get equal gradients and never separate in a deterministic trainer; in SRC's own "
         "experts no method separates them"},
        {wider && p->dense && (twins || (granular && !dropped)),
         "the {times} copies of a unit get equal gradients and never separate in a deterministic trainer; upcycling by "
         "--method noise-replace separates them (drop: those of which it draws one anew)"},
        {wider && lists("drop,noise,granular", name) && !twins && (dropped || !granular) && stay > 0,
         "about {pairs} % of the pairs of copies of a unit are still equal: these get equal gradients and never "
         "separate in a deterministic trainer; --method noise-replace separates all"},
        {dense && twins && sums && one_model && M > 1,
         "equal experts give the router no language-model gradient at step 0; only the balance loss moves it. Experts "
         "separate because different tokens reach them; --method drop makes them differ from the start"},
        {dense && (norm || (sums && M == 1)) && K == 1,
         M == 1                ? "with one expert its gate is always 1, and the router never learns from the loss"
         : to->arch == MIXTRAL ? "{never learns}; --topk 2 avoids it"
                               : "{never learns}; --norm-topk 0 or --topk 2 avoid it"},
        {dense && !sums && !sharded,
         "gates are not renormalised: the FFN's output shrinks by about E / K = {M/K} at step 0; --norm-topk 1 avoids "
         "it"},
        {dense && zero_router && !sharded && K < M,
         "a zero router ties all experts: every token goes to experts 0 to {K-1} until it moves; --router-init normal "
         "avoids it"},
        {collapse && !all_copies && E > 1,
         "K = {K}: twins (copies of one expert) tie or nearly tie, so most tokens reach only about {near sources}"
         "{family}"},
        {mixture && is(p->router->name, "copy") && !twins && !family && !(equal && K % m == 0),
         "the router's rows of copies are equal, and the copies are not: where a tie decides, transformers may choose "
         "another copy, with other logits; --router perturb-new avoids it"},
        {mixture && K == 1 && is(p->router->name, "copy") && !family,
         "K = 1: here a tie goes to the lower index, so copies get no token until the router moves; --router "
         "perturb-new{or family}"},
        {mixture && !norm && !sigmoid && !family && !all_copies,
         K == 1 ? "gates are not renormalised: each shrinks by about {m}, the number of copies, and with K = 1 the "
                  "output does too{family}"
                : "gates are not renormalised: each shrinks by about {m}, the number of copies{family}"},
        {collapse && tied && sums && K <= m && equal && plain_router,
         "all {K} experts of a token are copies of one, so the router gets no language-model gradient at step 0; only "
         "balancing moves it{family}"},
        {mixture && norm && K == 1, "{never learns}; --topk 2 avoids it"},
        {collapse && tied && plain_router,
         multiply ? "a token that gets one copy of an expert gets all of them, and copies with {never separate}; "
                    "--strength 0.01 avoids it"
         : biased ? "copies of one expert that a token gets together with {never separate} (a bias for selection does "
                    "not reach the gates); {family or} --router perturb-new avoid it"
                  : "copies of one expert that a token gets together with {never separate}; {family or} --router "
                    "perturb-new avoid it"}};
    for (size_t i = 0; i < sizeof warnings / sizeof warnings[0]; i++)
        if (warnings[i].holds) warn(f, warnings[i].sentence, &words);
}

static long model_bytes(const Plan* p) {
    long bytes = 0;
    for (int i = 0; i < p->num_outputs; i++) bytes += p->outputs[i].holds == WEIGHTS ? p->outputs[i].bytes : 0;
    return bytes;
}

static long stored_bytes(const Source* s) {
    long bytes = 0;
    for (int i = 0; i < s->files->num_tensors; i++) bytes += s->files->tensors[i].bytes;
    return bytes;
}

static const char* class_of(const Config* c) {
    return is_ordinary(c) ? archs[c->arch].class_name : "a model_type of train_moe's own";
}

static void print_config_line(const char* what, const char* dir, const Config* c, long bytes) {
    long total, active;
    count_parameters(c, &total, &active);
    printf("%-8s%s: %s", what, dir, class_of(c));
    if (c->num_experts)
        printf(", %d of %d layer%s sparse, %d expert%s of width %d, %d per token", count_sparse(c), c->num_layers,
               c->num_layers > 1 ? "s" : "", c->num_experts, c->num_experts > 1 ? "s" : "", c->moe_intermediate_size,
               c->num_experts_per_tok);
    if (shared_expert_width(c)) printf(", and a shared one of width %d", shared_expert_width(c));
    if (!c->num_experts)
        printf(", %d dense layer%s of width %d", c->num_layers, c->num_layers > 1 ? "s" : "", c->intermediate_size);
    printf("\n        %ld parameters, %ld active for a token, %.1f MB\n", total, active, bytes * 1e-6);
}

static int same_layer(const Plan* p, int a, int b) {
    size_t n = sizeof(int) * (size_t)p->M;
    return p->config.sparse[a] == p->config.sparse[b] &&
           (!p->config.sparse[a] || !memcmp(p->source + (long)a * p->M, p->source + (long)b * p->M, n));
}

// Which expert came from which; layers that are alike share a line.
static void print_layers(const Plan* p) {
    int L = p->config.num_layers;
    for (int l = 0, last; l < L; l = last + 1) {
        for (last = l; last + 1 < L && same_layer(p, l, last + 1);) last++;
        if (l == last)
            printf("  layer %d: ", l);
        else
            printf("  layers %d-%d: ", l, last);
        if (!p->config.sparse[l]) {
            printf(p->growth ? "dense\n" : "dense, as in SRC\n");
            continue;
        }
        if (p->dense && p->num_sources == 1) {
            char made[128];
            Words words = {{"M"}, {""}, 1};
            snprintf(words.text[0], sizeof words.text[0], "%d", p->M);
            fill_in(made, sizeof made, p->method->made, &words);
            printf("%s", made);
        } else {
            printf("experts from %s", p->dense ? "models" : "experts");
            for (int j = 0; j < p->M; j++) {
                if (p->M > 40 && j == 32) {
                    printf(" ... (%d in all, see upcycle.json)", p->M);
                    break;
                }
                if (plan_source(p, l, j) < 0)
                    printf(" new");
                else
                    printf(" %d", plan_source(p, l, j));
            }
        }
        printf("\n");
    }
}

static void print_plan(const Plan* p, const char* dst) {
    const Source* s = p->sources[0];
    print_config_line("source", s->dir, source_config(p), stored_bytes(s));
    for (int i = 1; i < p->num_sources; i++) printf("        and %s\n", p->sources[i]->dir);
    print_config_line("result", dst, &p->config, model_bytes(p));
    print_growth(p->growth, p->config.num_layers);
    printf("method  %s, seed %ld", ask.method, ask.seed);
    if (is(p->method->name, "granular"))
        printf(", %d groups of %d shards, --scale %s", p->M / p->shards, p->shards, ask.scale);
    if (is(p->method->name, "drop") || (p->shards > 1 && asked("drop-ratio")))
        printf(", ratio %g, indices %s", ask.drop_ratio, ask.drop_indices);
    if (!p->dense) printf(", router %s%s", p->router->name, is(ask.router_bias, "reset") ? ", its bias reset" : "");
    if (!p->dense && p->score) printf(", selected by %s", p->selection->name);
    printf("\n");
    print_layers(p);
    fflush(stdout);
}

static void print_findings(const Findings* f) {
    printf("function: %s\nbalance loss: %s\n", f->function, f->balance);
    for (int i = 0; i < f->count; i++) printf("warning: %s\n", f->notes[i]);
    fflush(stdout);
}

// An upper bound of the memory that writing needs beside the tables of names: the buffers, whole matrices for four
// operators, the tokens' inputs for clusters, and a sum of several sources.
static double plan_memory(const Plan* p) {
    double H = p->config.hidden_size, I = p->config.moe_intermediate_size, n = H < I ? H : I, router = 8.0 * p->M * H,
           matrix = 0;
    const char* name = p->method->name;
    if (is(name, "orthogonal")) matrix = 12 * H * I;
    if (is(name, "svd-perturb")) matrix = 12 * H * I + 8 * n * n;
    if (is(name, "svd-mix")) matrix = 24 * H * I + 16 * n * n;
    if (is(name, "sparse-code-mix")) matrix = 8 * H * I + 8.0 * 64 * (H + I + 2 * fmax(H, I));
    if (p->clusters && p->clusters->cluster) {
        // the tokens' FFN inputs of all layers and their clusters; two matrices of one cluster
        double tokens = p->clusters->tokens, L = count_sparse(&p->config);
        matrix = L * tokens * (4 * H + 4) + 4 * L * p->M * H + 4 * tokens * (H + 3 * I) + 24 * H * I + 16 * n * n +
                 8 * fmax(H, I) * fmax(H, I);
    }
    if (p->group) matrix = 4 * (10 * H * I + I * I);
    if (p->rest_is_mean) matrix += 8.0 * CHUNK_FLOATS; // their sum
    return 3.0 * 4 * CHUNK_FLOATS + router + matrix;
}

// x with `digits` digits; JSON has no word for what is not a number.
static void text_json_number(Text* t, double x, int digits) {
    if (isfinite(x))
        text_print(t, "%.*g", digits, x);
    else
        text_print(t, "null");
}

static void write_receipt(const Plan* p, const char* dir, const Findings* f, const Proof* proof, char** arguments,
                          int num_arguments) {
    Text t = {NULL, 0, 0};
    const Config *from = source_config(p), *to = &p->config;
    long total[2], active[2];
    count_parameters(from, &total[0], &active[0]);
    count_parameters(to, &total[1], &active[1]);
    text_print(&t, "{\n  \"version\": \"%s\",\n  \"sources\": [", VERSION);
    for (int i = 0; i < p->num_sources; i++) {
        text_print(&t, "%s", i ? ", " : "");
        text_json_string(&t, p->sources[i]->dir);
    }
    text_print(&t, "],\n  \"method\": \"%s\",\n  \"seed\": %ld,\n  \"arguments\": [", ask.method, ask.seed);
    for (int i = 0; i < num_arguments; i++) {
        text_print(&t, "%s", i ? ", " : "");
        text_json_string(&t, arguments[i]);
    }
    text_print(&t, "],\n");
    BytesAllowed bytes = reads_bytes(from, p->sources[0]->dir);
    if (bytes != PERHAPS_BYTES) text_print(&t, "  \"reads_bytes\": %d,\n", bytes == BYTES);
    text_print(&t, "  \"class\": [\"%s\", \"%s\"],\n", class_of(from), class_of(to));
    text_print(&t, "  \"experts\": [%d, %d],\n  \"experts_per_token\": [%d, %d],\n", from->num_experts, to->num_experts,
               from->num_experts_per_tok, to->num_experts_per_tok);
    text_print(&t, "  \"parameters\": [%ld, %ld],\n  \"active_parameters\": [%ld, %ld],\n", total[0], total[1],
               active[0], active[1]);
    text_print(&t, "  \"bytes\": [%ld, %ld],\n  \"function\": ", stored_bytes(p->sources[0]), model_bytes(p));
    text_json_string(&t, f->function);
    text_print(&t, ",\n  \"balance_loss\": ");
    text_json_string(&t, f->balance);
    text_print(&t, ",\n  \"warnings\": [");
    for (int i = 0; i < f->count; i++) {
        text_print(&t, "%s\n    ", i ? "," : "");
        text_json_string(&t, f->notes[i]);
    }
    text_print(&t, "],\n");
    if (proof && proof->done) {
        text_print(&t, "  \"check\": {\"tokens\": %ld, \"loss\": [", proof->tokens);
        text_json_number(&t, proof->loss_before, 7);
        text_print(&t, ", ");
        text_json_number(&t, proof->loss_after, 7);
        text_print(&t, "], \"logits\": ");
        text_json_number(&t, proof->logits, 4);
        if (proof->distinct > 0) text_print(&t, ", \"distinct_sources\": %.4f", proof->distinct);
        text_print(&t, "},\n");
    }
    growth_to_json(&t, p->growth, to->num_layers);
    text_print(&t, "  \"layers\": [");
    for (int l = 0, listed = 0; l < to->num_layers; l++) {
        if (!to->sparse[l]) continue;
        text_print(&t, "%s\n    {\"layer\": %d, \"source\": [", listed++ ? "," : "", l);
        for (int j = 0; j < p->M; j++) text_print(&t, "%s%d", j ? ", " : "", plan_source(p, l, j));
        text_print(&t, "], \"family\": [");
        for (int j = 0; j < p->M; j++) text_print(&t, "%s%d", j ? ", " : "", p->family[(long)l * p->M + j]);
        for (int e = 0; p->group && e < p->E; e++)
            text_print(&t, "%s%d", e ? ", " : "], \"group\": [", p->group[(long)l * p->E + e]);
        text_print(&t, "]");
        int scored = p->score && !is(p->selection->name, "random");
        for (int e = 0; scored && e < p->E; e++) {
            text_print(&t, e ? ", " : ", \"score\": [");
            text_json_number(&t, p->score[(long)l * p->E + e], 7);
        }
        text_print(&t, scored ? "]}" : "}");
    }
    text_print(&t, "\n  ],\n  \"parent\": ");
    if (p->parent)
        text_json_value(&t, p->parent);
    else
        text_print(&t, "null");
    text_print(&t, "\n}\n");
    save_text(dir, "upcycle.json", &t);
}
