// options.h: what can be asked of upcycle: methods, selections, routers and the other options.
#pragma once

static struct {
    const char *method, *layers, *sources, *arch, *drop_indices, *scale, *router_init;
    const char *select, *score_on, *allocate, *router, *optimizer;
    const char *calibrate, *reference, *dtype, *shard_size, *check, *inspect, *data;
    long experts, topk, norm_topk, granularity, cap, seed, calibrate_batches, check_batches, batch, seq, threads,
        dry_run, force;
    double drop_ratio, noise_std, noise_fraction, router_std, router_delta, strength, energy, prune_weights;
} ask;

#define METHODS                                                        \
    "copy|drop|noise|noise-replace|granular|partition|cluster|random|" \
    "family|copy-noise|scaled|interpolate|shuffle|orthogonal|svd-perturb|svd-mix|sparse-code-mix"
typedef enum {
    COPY,
    DROP,
    NOISE,
    NOISE_REPLACE,
    GRANULAR,
    PARTITION,
    CLUSTER,
    RANDOM,
    FAMILY,
    COPY_NOISE,
    SCALED,
    INTERPOLATE,
    SHUFFLE,
    ORTHOGONAL,
    SVD_PERTURB,
    SVD_MIX,
    SPARSE_CODE_MIX
} Method; // in the order of METHODS
#define ROUTERS "copy|bias|noise|interpolate|scaled|perturb-new|orthogonal|adversarial|temperature|svd-perturb"
typedef enum {
    ROUTER_COPY,
    ROUTER_BIAS,
    ROUTER_NOISE,
    ROUTER_INTERPOLATE,
    ROUTER_SCALED,
    ROUTER_PERTURB_NEW,
    ROUTER_ORTHOGONAL,
    ROUTER_ADVERSARIAL,
    ROUTER_TEMPERATURE,
    ROUTER_SVD_PERTURB
} RouterMethod; // in the order of ROUTERS
#define SELECTIONS "uniform|random|weight|saliency|grad2|fisher|load|router-norm"
typedef enum { UNIFORM, BY_CHANCE, WEIGHT, SALIENCY, GRAD2, FISHER, LOAD, ROUTER_NORM } Selection; // of SELECTIONS
#define SCORED_PARTS "all|gate-up|down|average|product|max|min"
typedef enum { MOMENTS_RESET, MOMENTS_COPY, MOMENTS_SCALE, MOMENTS_INTERPOLATE } Moments;

static Option ask_table[] = {
    {"experts", OPT_WHOLE, USE_OTHER, &ask.experts, 1, 1 << 16, NULL, "N", "experts of each sparse layer in DST", 0},
    {"topk", OPT_WHOLE, USE_OTHER, &ask.topk, 1, 1 << 16, NULL, "K",
     "experts per token (SRC's; dense SRC: 2, granular: G)", 0},
    {"method", OPT_CHOICE, USE_OTHER, &ask.method, 0, 0, "copy", METHODS, "", 0},
    {"seed", OPT_WHOLE, USE_OTHER, &ask.seed, 0, BIG, "1", "S", "of every random draw", 0},
    {"dtype", OPT_CHOICE, USE_OTHER, &ask.dtype, 0, 0, "keep", "keep|f32|bf16", "numbers in DST", 0},
    {"shard-size", OPT_TEXT, USE_OTHER, &ask.shard_size, 0, 0, "5G", "SIZE", "most bytes of weights in a file", 0},
    {"arch", OPT_CHOICE, USE_OTHER, &ask.arch, 0, 0, NULL, "qwen3|mixtral|olmoe", "(what SRC's class becomes)", 0},
    {"check", OPT_TEXT, USE_OTHER, &ask.check, 0, 0, NULL, "F", "loss and logits on F before and after", 0},
    {"check-batches", OPT_WHOLE, USE_OTHER, &ask.check_batches, 0, INT_MAX, "10", "N", "batches of it; 0: all", 0},
    {"dry-run", OPT_FLAG, USE_OTHER, &ask.dry_run, 0, 0, "0", "", "print the plan, write nothing", 0},
    {"force", OPT_FLAG, USE_OTHER, &ask.force, 0, 0, "0", "", "replace the checkpoint in DST", 0},
    {"threads", OPT_WHOLE, USE_OTHER, &ask.threads, 1, 4096, NULL, "N", "all cores by default", 0},

    {"norm-topk", OPT_WHOLE, USE_OTHER, &ask.norm_topk, 0, 1, NULL, "0|1", "gates sum to 1 (1)", 0},
    {"layers", OPT_TEXT, USE_OTHER, &ask.layers, 0, 0, "all", "LIST", "become sparse: all, every-2, or 1,3,8-11", 0},
    {"sources", OPT_TEXT, USE_OTHER, &ask.sources, 0, 0, NULL, "DIR,..", "more dense models; SRC is source 0", 0},
    {"granularity", OPT_WHOLE, USE_OTHER, &ask.granularity, 1, 1 << 16, NULL, "G", "shards that an FFN is cut into", 0},
    {"scale", OPT_CHOICE, USE_OTHER, &ask.scale, 0, 0, "exact", "exact|cuberoot|none", "of the shards", 0},
    {"router-init", OPT_CHOICE, USE_OTHER, &ask.router_init, 0, 0, NULL, "normal|uniform|zero",
     "new rows (normal; drop: uniform)", 0},
    {"router-std", OPT_REAL, USE_OTHER, &ask.router_std, 0, 1e6, "0.02", "S", "of new router rows", 0},
    {"energy", OPT_REAL, USE_OTHER, &ask.energy, 0, 1, "0.95", "X", "spectral energy kept by cluster", 0},

    {"drop-ratio", OPT_REAL, USE_OTHER, &ask.drop_ratio, 0, 1, "0.5", "R", "share of units that drop draws anew", 0},
    {"drop-indices", OPT_CHOICE, USE_OTHER, &ask.drop_indices, 0, 0, "shared", "shared|per-matrix", "", 0},
    {"noise-std", OPT_REAL, USE_OTHER, &ask.noise_std, 0, 1e6, "0.02", "S", "of noise, noise-replace, random", 0},
    {"noise-fraction", OPT_REAL, USE_OTHER, &ask.noise_fraction, 0, 1, "0.5", "P", "share of units or weights", 0},
    {"strength", OPT_REAL, USE_OTHER, &ask.strength, 0, 1e6, NULL, "X", "of an expert operator (its own)", 0},

    {"select", OPT_CHOICE, USE_OTHER, &ask.select, 0, 0, NULL, SELECTIONS,
     "which experts get copies, or stay (uniform)", 0},
    {"score-on", OPT_CHOICE, USE_OTHER, &ask.score_on, 0, 0, "all", SCORED_PARTS, "matrices that count", 0},
    {"allocate", OPT_CHOICE, USE_OTHER, &ask.allocate, 0, 0, "greedy", "greedy|sample", "", 0},
    {"cap", OPT_WHOLE, USE_OTHER, &ask.cap, 1, 1 << 16, "3", "N", "extra copies of an expert before others' turn", 0},
    {"router", OPT_CHOICE, USE_OTHER, &ask.router, 0, 0, NULL, ROUTERS,
     "rows of copies (bias if SRC has one, else copy)", 0},
    {"router-delta", OPT_REAL, USE_OTHER, &ask.router_delta, 0, 1e6, NULL, "D", "strength of --router (bias: 0.001)",
     0},
    {"optimizer", OPT_CHOICE, USE_OTHER, &ask.optimizer, 0, 0, "reset", "reset|copy|scale|interpolate",
     "AdamW's moments", 0},
    {"calibrate", OPT_TEXT, USE_OTHER, &ask.calibrate, 0, 0, NULL, "F,..", "text or token shards for scores", 0},
    {"calibrate-batches", OPT_WHOLE, USE_OTHER, &ask.calibrate_batches, 1, INT_MAX, "10", "N", "", 0},
    {"batch", OPT_WHOLE, USE_OTHER, &ask.batch, 1, 65536, "8", "B", "sequences in a batch", 0},
    {"seq", OPT_WHOLE, USE_OTHER, &ask.seq, 1, 1 << 20, NULL, "T", "tokens in one (at most 1024)", 0},
    {"reference", OPT_TEXT, USE_OTHER, &ask.reference, 0, 0, NULL, "DIR",
     "the model before fine-tuning, for router-norm", 0},
    {"prune-weights", OPT_REAL, USE_OTHER, &ask.prune_weights, 0, 1, NULL, "P",
     "share of expert weights to zero", 0},

    {"inspect", OPT_TEXT, USE_OTHER, &ask.inspect, 0, 0, NULL, "DIR", "look at DIR, write nothing", 0},
    {"data", OPT_TEXT, USE_OTHER, &ask.data, 0, 0, NULL, "F", "with --inspect: load on F", 0},
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
                                   {"noise-fraction", "0"}};
    const char* switched_off = NULL;
    int i = 0;
    for (int k = 0; k < (int)(sizeof off / sizeof off[0]); k++)
        if (!strcmp(off[k][0], name)) switched_off = off[k][1];
    while (strcmp(ask_table[i].name, name)) i++;
    return ask_table[i].given && !asks_nothing(&ask_table[i], switched_off);
}

// "5G", "500M", "64K" or bytes
static long parse_size(const char* text) {
    char* end;
    double x = strtod(text, &end), unit = 1;
    if (end != text && *end && strchr("kKmMgGtT", *end)) {
        for (const char* u = "kmgt"; *u; u++) {
            unit *= 1000;
            if (tolower((unsigned char)*end) == *u) break;
        }
        end++;
        if (*end == 'B') end++;
    }
    if (end == text || *end || !(x * unit >= 1 && x * unit < 9e18))
        die(2, "--shard-size %s: expected a number of bytes such as 5G, 500M or 1000000", text);
    return (long)(x * unit);
}

static int stop_exit_code(void) { return stop_signal == SIGTERM ? 143 : 130; }

// Between two pieces of work: a signal ends the program; what was begun is removed on the way out.
static void heed_signals(void) {
    if (!stop_signal) return;
    end_progress();
    fprintf(stderr, "%s: stopped by a signal; nothing was written\n", program_name);
    exit(stop_exit_code());
}
