// options.h: what can be asked of upcycle: methods, selections, routers and the other options.
#pragma once

static struct {
    const char *method, *layers, *sources, *rest, *arch, *drop_indices, *scale, *router_init;
    const char *select, *score_on, *allocate, *group, *router, *router_bias, *optimizer;
    const char *calibrate, *reference, *dtype, *shard_size, *check, *inspect, *data;
    const char *depth, *new_layers;
    long layers_to, ffn_to;
    long experts, topk, norm_topk, granularity, cap, seed, calibrate_batches, check_batches, batch, seq, threads,
        dry_run, force, methods, shared, marks;
    double drop_ratio, noise_std, noise_fraction, router_std, router_delta, strength, energy, unit_share,
        prune_weights;
} ask;

static Option ask_table[] = {
    {"experts", OPT_WHOLE, USE_OTHER, &ask.experts, 1, 1 << 16, NULL, "M", "experts of each sparse layer in DST", 0},
    {"topk", OPT_WHOLE, USE_OTHER, &ask.topk, 1, 1 << 16, NULL, "K",
     "experts per token (SRC's; dense SRC: 2, granular: G)", 0},
    {"layers-to", OPT_WHOLE, USE_OTHER, &ask.layers_to, 1, MAX_LAYERS, NULL, "N", "layers in DST (SRC's)", 0},
    {"depth", OPT_CHOICE, USE_OTHER, &ask.depth, 0, 0, "interpose", "interpose|stack", "order of new layers", 0},
    {"new-layers", OPT_CHOICE, USE_OTHER, &ask.new_layers, 0, 0, "zero", "zero|copy", "their o_proj, down_proj", 0},
    {"ffn-to", OPT_WHOLE, USE_OTHER, &ask.ffn_to, 1, 1 << 20, NULL, "I", "width of FFN, expert: times 2, 4, ..", 0},
    {"method", OPT_CHOICE, USE_OTHER, &ask.method, 0, 0, "copy", NULL, "", 0},
    {"seed", OPT_WHOLE, USE_OTHER, &ask.seed, 0, BIG, "1", "S", "of every random draw", 0},
    {"dtype", OPT_CHOICE, USE_OTHER, &ask.dtype, 0, 0, "keep", "keep|f32|bf16", "numbers in DST", 0},
    {"shard-size", OPT_TEXT, USE_OTHER, &ask.shard_size, 0, 0, "5G", "SIZE", "most bytes of weights in a file", 0},
    {"arch", OPT_CHOICE, USE_OTHER, &ask.arch, 0, 0, NULL, "qwen3|mixtral|olmoe", "(what SRC's class becomes)", 0},
    {"check", OPT_TEXT, USE_OTHER, &ask.check, 0, 0, NULL, "F", "loss and logits on F before and after", 0},
    {"check-batches", OPT_WHOLE, USE_OTHER, &ask.check_batches, 0, INT_MAX, "10", "N", "batches of it; 0: all", 0},
    {"dry-run", OPT_FLAG, USE_OTHER, &ask.dry_run, 0, 0, "0", "", "print the plan, write nothing", 0},
    {"force", OPT_FLAG, USE_OTHER, &ask.force, 0, 0, "0", "", "replace the checkpoint in DST", 0},
    {"strict", OPT_FLAG, USE_OTHER, &strict, 0, 0, "0", "", "refuse tensors that SRC's class does not have", 0},
    {"threads", OPT_WHOLE, USE_OTHER, &ask.threads, 1, 4096, NULL, "N", "all cores by default", 0},

    {"norm-topk", OPT_WHOLE, USE_DENSE, &ask.norm_topk, 0, 1, NULL, "0|1", "gates sum to 1 (1)", 0},
    {"layers", OPT_TEXT, USE_OTHER, &ask.layers, 0, 0, "all", "LIST", "become sparse: all, every-2, or 1,3,8-11", 0},
    {"sources", OPT_TEXT, USE_DENSE, &ask.sources, 0, 0, NULL, "DIR,..", "more dense models; SRC is source 0", 0},
    {"rest", OPT_CHOICE, USE_DENSE, &ask.rest, 0, 0, NULL, "mean|base",
     "of sources, but FFNs: mean or SRC's (mean, if alike)", 0},
    {"granularity", OPT_WHOLE, USE_DENSE, &ask.granularity, 1, 1 << 16, NULL, "G", "shards that an FFN is cut into", 0},
    {"scale", OPT_CHOICE, USE_DENSE, &ask.scale, 0, 0, "exact", "exact|cuberoot|none", "of the shards", 0},
    {"router-init", OPT_CHOICE, USE_OTHER, &ask.router_init, 0, 0, NULL, "normal|uniform|zero",
     "new rows (normal; drop: uniform)", 0},
    {"router-std", OPT_REAL, USE_OTHER, &ask.router_std, 0, 1e6, "0.02", "S", "of new router rows", 0},
    {"energy", OPT_REAL, USE_DENSE, &ask.energy, 0, 1, "0.95", "X", "spectral energy kept by cluster", 0},
    {"unit-share", OPT_REAL, USE_DENSE, &ask.unit_share, 0, 1, "0.5", "P", "of the units in an expert of domains", 0},
    {"shared", OPT_WHOLE, USE_DENSE, &ask.shared, 0, 64, "1", "N", "parts in the shared expert (importance, marks)", 0},
    {"marks", OPT_WHOLE, USE_DENSE, &ask.marks, 1, 1 << 20, "10", "N", "units that a token marks", 0},

    {"drop-ratio", OPT_REAL, USE_OTHER, &ask.drop_ratio, 0, 1, "0.5", "R", "share of units that drop draws anew", 0},
    {"drop-indices", OPT_CHOICE, USE_OTHER, &ask.drop_indices, 0, 0, "shared", "shared|per-matrix", "", 0},
    {"noise-std", OPT_REAL, USE_OTHER, &ask.noise_std, 0, 1e6, "0.02", "S", "of noise, noise-replace, random", 0},
    {"noise-fraction", OPT_REAL, USE_DENSE, &ask.noise_fraction, 0, 1, "0.5", "P", "share of units or weights", 0},
    {"strength", OPT_REAL, USE_MOE, &ask.strength, 0, 1e6, NULL, "X", "of an expert operator (its own)", 0},

    {"select", OPT_CHOICE, USE_MOE, &ask.select, 0, 0, NULL, NULL,
     "which experts get copies, or stay (uniform)", 0},
    {"score-on", OPT_CHOICE, USE_MOE, &ask.score_on, 0, 0, "all", "all|gate-up|down|average|product|max|min",
     "matrices that count", 0},
    {"allocate", OPT_CHOICE, USE_MOE, &ask.allocate, 0, 0, "greedy", "greedy|sample", "", 0},
    {"cap", OPT_WHOLE, USE_MOE, &ask.cap, 1, 1 << 16, "3", "N", "extra copies of an expert before others' turn", 0},
    {"group", OPT_CHOICE, USE_MOE, &ask.group, 0, 0, "spectral", "spectral|cores", "how merge groups experts", 0},
    {"router", OPT_CHOICE, USE_MOE, &ask.router, 0, 0, NULL, NULL,
     "rows of copies (bias if SRC has one, else copy)", 0},
    {"router-delta", OPT_REAL, USE_MOE, &ask.router_delta, 0, 1e6, NULL, "D", "strength of --router (bias: 0.001)",
     0},
    {"router-bias", OPT_CHOICE, USE_MOE, &ask.router_bias, 0, 0, "keep", "keep|reset", "that selects; reset: all 0", 0},
    {"optimizer", OPT_CHOICE, USE_OTHER, &ask.optimizer, 0, 0, "reset", "reset|copy|scale|interpolate",
     "AdamW's moments", 0},
    {"calibrate", OPT_TEXT, USE_OTHER, &ask.calibrate, 0, 0, NULL, "F,..", "text or token shards for scores", 0},
    {"calibrate-batches", OPT_WHOLE, USE_OTHER, &ask.calibrate_batches, 1, INT_MAX, "10", "N", "", 0},
    {"batch", OPT_WHOLE, USE_OTHER, &ask.batch, 1, 65536, "8", "B", "sequences in a batch", 0},
    {"seq", OPT_WHOLE, USE_OTHER, &ask.seq, 1, 1 << 20, NULL, "T", "tokens in one (at most 1024)", 0},
    {"reference", OPT_TEXT, USE_OTHER, &ask.reference, 0, 0, NULL, "DIR",
     "the model before fine-tuning, for router-norm", 0},
    {"prune-weights", OPT_REAL, USE_MOE, &ask.prune_weights, 0, 1, NULL, "P",
     "share of expert weights to zero", 0},

    {"inspect", OPT_TEXT, USE_OTHER, &ask.inspect, 0, 0, NULL, "DIR", "look at DIR, write nothing", 0},
    {"data", OPT_TEXT, USE_OTHER, &ask.data, 0, 0, NULL, "F", "with --inspect: load on F", 0},
    {"methods", OPT_FLAG, USE_OTHER, &ask.methods, 0, 0, "0", "", "print the table of methods", 0},
};
enum { NUM_ASKED = sizeof ask_table / sizeof ask_table[0] };

static int asked(const char* name) {
    for (int i = 0; i < NUM_ASKED; i++)
        if (!strcmp(ask_table[i].name, name)) return ask_table[i].given;
    return 0;
}

// Given, and neither with its default nor with the value that switches it off: whoever gives one expects something of
// it, and what it is about must be there.
static int insists(const char* name) {
    static const char* off[][2] = {{"select", "uniform"}, {"router", "copy"}, {"router-init", "normal"},
                                   {"strength", "0"}, {"router-delta", "0"}, {"prune-weights", "0"},
                                   {"granularity", "1"}, {"drop-ratio", "0"}, {"noise-std", "0"},
                                   {"noise-fraction", "0"}, {"shared", "0"}};
    const char* switched_off = NULL;
    int i = 0;
    for (int k = 0; k < (int)(sizeof off / sizeof off[0]); k++)
        if (!strcmp(off[k][0], name)) switched_off = off[k][1];
    while (strcmp(ask_table[i].name, name)) i++;
    return ask_table[i].given && !asks_nothing(&ask_table[i], switched_off);
}

// 1 if a value was given and is this word
static int is(const char* value, const char* word) { return value && !strcmp(value, word); }

// 1 if the word is in a list such as "scale,granularity"
static int lists(const char* list, const char* word) {
    size_t n = strlen(word);
    for (const char* s = list; s; s = strchr(s, ',') ? strchr(s, ',') + 1 : NULL)
        if (strcspn(s, ",") == n && !strncmp(s, word, n)) return 1;
    return 0;
}

// "a|b|c", put together name by name
typedef struct {
    char text[512];
} Names;
static void names_add(Names* names, const char* name) {
    size_t n = strlen(names->text);
    snprintf(names->text + n, sizeof names->text - n, "%s%s", n ? "|" : "", name);
}

// Memory for `count` elements, all 0
static void* zeros(long count, size_t size) {
    return memset(checked_malloc((size_t)count * size), 0, (size_t)count * size);
}
#define NEW(type, count) ((type*)zeros((long)(count), sizeof(type)))
static float* floats(long count) { return (float*)checked_malloc(sizeof(float) * (size_t)count); }

// DIR/NAME, whose text is freed
static void save_text(const char* dir, const char* name, Text* t) {
    char path[PATH_SIZE];
    Error error = {""};
    if (!write_file(join_path(path, dir, name), t->data, t->length, &error)) die(1, "%s", error.text);
    free(t->data);
}

// "5G", "500M", "64K" or bytes
static long parse_size(const char* text) {
    static const char units[] = "kmgt";
    char* end;
    double x = strtod(text, &end);
    const char* unit = end != text && *end ? strchr(units, tolower((unsigned char)*end)) : NULL;
    for (const char* u = units; unit && u <= unit; u++) x *= 1000;
    if (unit) end += end[1] == 'B' ? 2 : 1;
    if (end == text || *end || !(x >= 1 && x < 9e18))
        die(2, "--shard-size %s: expected a number of bytes such as 5G, 500M or 1000000", text);
    return (long)x;
}

// Which layers become sparse: all, every-2 (every second, never the first), or a list such as 1,3,8-11.
static void parse_layers(const char* text, char* sparse, int L) {
    long step;
    char* end;
    memset(sparse, 0, MAX_LAYERS);
    if (is(text, "all")) {
        memset(sparse, 1, (size_t)L);
    } else if (!strncmp(text, "every-", 6)) {
        step = strtol(text + 6, &end, 10);
        if (end == text + 6 || *end || step < 1 || step > L)
            die(2, "--layers %s: the model has %d layers; every-2 leaves every second dense", text, L);
        for (int l = 0; l < L; l++) sparse[l] = (l + 1) % step == 0;
    } else for (const char* s = text; *s || s == text;) {
        long first = strtol(s, &end, 10), last = first;
        if (end != s && *end == '-') {
            const char* from = end + 1;
            last = strtol(from, &end, 10);
            if (end == from) last = -1;
        }
        if (end == s || (*end && *end != ',') || first < 0 || last < first || last >= L)
            die(2, "--layers %s: expected all, every-2, or numbers from 0 to %d such as 1,3,5-7", text, L - 1);
        for (long l = first; l <= last; l++) sparse[l] = 1;
        s = *end ? end + 1 : end;
        if (*end && !*s) die(2, "--layers %s: a number is missing after the last comma", text);
    }
}

static int stop_exit_code(void) { return stop_signal == SIGTERM ? 143 : 130; }

// Between two pieces of work: a signal ends the program; what was begun is removed on the way out.
static void heed_signals(void) {
    if (!stop_signal) return;
    end_progress();
    fprintf(stderr, "%s: stopped by a signal; nothing was written\n", program_name);
    exit(stop_exit_code());
}

static void print_usage(FILE* out) {
    fprintf(out,
            "upcycle %s: makes a dense model a mixture of experts, or a mixture of experts a\n"
            "larger or smaller one.\n"
            "  ./upcycle SRC DST --experts M [options]\n"
            "SRC and DST are Hugging Face directories; SRC is only read, DST must not exist.\n"
            "Examples\n"
            "  ./upcycle DENSE MOE --experts 8 --topk 2\n"
            "  ./upcycle MOE LARGER --experts 16 --method family\n"
            "  ./upcycle --inspect MOE --data my.txt\n",
            VERSION);
}

// The choices of an option that has too many for its line, in lines of their own.
static void print_choices(const char* title, const char* choices) {
    int column = printf("      %s", title);
    while (*choices) {
        int n = (int)strcspn(choices, "|");
        n += choices[n] == '|';
        if (column + n > 79) column = printf("\n      ") - 1;
        column += printf("%.*s", n, choices);
        choices += n;
    }
    printf("\n");
}

// --help; the methods that start from a dense model and from a mixture
static void print_asked(const char* from_dense, const char* from_mixture) {
    static const struct {
        const char *first, *title;
    } titles[] = {{"experts", "The result"},
                  {"norm-topk", "From a dense model"},
                  {"drop-ratio", "Methods"},
                  {"select", "From a mixture of experts"},
                  {"inspect", "Instead of an upcycle"}};
    print_usage(stdout);
    for (int i = 0; i < NUM_ASKED; i++) {
        const Option* o = &ask_table[i];
        char start[48] = "";
        for (size_t g = 0; g < sizeof titles / sizeof titles[0]; g++)
            if (!strcmp(o->name, titles[g].first)) printf("%s\n", titles[g].title);
        if (o->start && o->type != OPT_FLAG) snprintf(start, sizeof start, "%s(%s)", *o->help ? " " : "", o->start);
        char text[80];
        snprintf(text, sizeof text, "  --%s %s", o->name, o->argument);
        if (is(o->name, "method")) {
            printf("  --method NAME (copy)\n");
            print_choices("dense SRC: ", from_dense);
            print_choices("MoE SRC: ", from_mixture);
        } else if (is(o->name, "router") || is(o->name, "select")) {
            printf("  --%s NAME: %s%s\n", o->name, o->help, start);
            print_choices("", o->argument);
        } else {
            printf("%-25s %s%s\n", text, o->help, start);
        }
    }
}

// Options that --inspect, or a run without data, would ignore are refused.
static void refuse_idle_options(void) {
    static const char* of_inspect[] = {"inspect", "data", "calibrate-batches", "batch", "seq", "threads", "strict"};
    static const char* of_data[] = {"batch", "seq", "calibrate-batches", "check-batches"};
    for (int i = 0; i < NUM_ASKED; i++) {
        int fits = !ask.inspect;
        for (int k = 0; k < 7; k++) fits |= is(ask_table[i].name, of_inspect[k]);
        if (insists(ask_table[i].name) && !fits) die(2, "--inspect only looks; leave out --%s", ask_table[i].name);
    }
    for (int i = 0; i < 4; i++) {
        const char* wanted = ask.inspect ? "data" : i == 2 ? "calibrate" : i == 3 ? "check" : "calibrate or --check";
        int used = ask.data || (i != 3 && ask.calibrate) || (i != 2 && ask.check);
        if (insists(of_data[i]) && !used) die(2, "--%s is about data, and there is no --%s", of_data[i], wanted);
    }
    if (ask.rest && !ask.sources) die(2, "--rest is about --sources, and there are none");
    if (ask.data && !ask.inspect) die(2, "--data goes with --inspect; --check and --calibrate are for an upcycle");
}
