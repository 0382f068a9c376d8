// options.h: the command line: one table of options, and what they ask for. Needs everything above.
#pragma once
#include "texts.h"

// Everything that can be given. Text is NULL, a number is UNSET, where nothing was given and the default depends on
// more.
#define UNSET (-1)
static struct {
    // data and run
    const char *data, *val, *model, *out;
    long steps, batch, seq, accum, val_every, val_batches, save_every, sample_every, seed, threads;
    long resume, eval, load;
    const char *dump, *trace, *precision;
    // model from scratch
    long layers, hidden, heads, kv_heads, head_dim, ffn, experts, topk, expert_ffn, vocab, dense, tie, norm_topk,
        sparse_step;
    const char *qk_norm, *arch, *tokenizer;
    // router
    double aux, z_loss, bias_rate, logit_norm, family_penalty, skip_below;
    const char *aux_form, *router, *topk_range, *lpr_align_form, *bias_rule, *fixed_router;
    long aux_adaptive, family_steps, lpr_dim;
    double lpr_weight, lpr_diversity, lpr_kl, lpr_align;
    double dynamic_q, dynamic_entropy, dynamic_share, dynamic_weight;
    long dynamic_least;
    // optimiser
    double lr, min_lr, decay_frac, weight_decay, beta1, beta2, eps, clip;
    long warmup;
    const char* schedule;
    // sampling
    const char *prompt, *prompt_ids;
    long tokens, top_k;
    double temperature, top_p;
} options;

typedef enum { OPT_FLAG, OPT_WHOLE, OPT_REAL, OPT_TEXT, OPT_CHOICE } OptionType;
// What an option describes decides where it may stand: SHAPE only for a new model, RUN is remembered by --resume.
typedef enum { USE_RUN, USE_SHAPE, USE_OTHER, USE_DENSE, USE_MOE } OptionUse; // the last two: of upcycle, by SRC

typedef struct {
    const char* name;
    OptionType type;
    OptionUse use;
    void* value;
    double low, high;               // range of a number
    const char* start;              // default; NULL: see UNSET
    const char* argument;           // as --help shows it; the choices of an OPT_CHOICE
    const char* help;
    int given;
} Option;

#define BIG 1e15
static Option option_table[] = {
    {"data", OPT_TEXT, USE_RUN, &options.data, 0, 0, NULL, "F,..", "text or shards; names, patterns", 0},
    {"val", OPT_TEXT, USE_RUN, &options.val, 0, 0, NULL, "F|none", "validation data (the last tenth of a text)", 0},
    {"model", OPT_TEXT, USE_OTHER, &options.model, 0, 0, NULL, "DIR", "a Hugging Face directory", 0},
    {"strict", OPT_FLAG, USE_OTHER, &strict, 0, 0, "0", "", "refuse tensors in it that the model does not have", 0},
    {"out", OPT_TEXT, USE_OTHER, &options.out, 0, 0, NULL, "DIR", "for checkpoints and logs", 0},
    {"resume", OPT_FLAG, USE_OTHER, &options.resume, 0, 0, "0", "", "go on with the run in --out", 0},
    {"steps", OPT_WHOLE, USE_RUN, &options.steps, 0, BIG, "1000", "N", "training steps in all", 0},
    {"batch", OPT_WHOLE, USE_RUN, &options.batch, 1, 65536, "8", "B", "sequences in a batch", 0},
    {"seq", OPT_WHOLE, USE_RUN, &options.seq, 1, 1 << 20, "128", "T",
     "tokens in a sequence (--eval: at most 1024)", 0},
    {"accum", OPT_WHOLE, USE_RUN, &options.accum, 1, 65536, "1", "A", "batches in a step", 0},
    {"val-every", OPT_WHOLE, USE_RUN, &options.val_every, 0, BIG, "250", "N",
     "steps between validations; 0: only at the end", 0},
    {"val-batches", OPT_WHOLE, USE_RUN, &options.val_batches, 0, INT_MAX, "20", "N",
     "batches of one, 0: all; --eval: all unless given", 0},
    {"save-every", OPT_WHOLE, USE_RUN, &options.save_every, 0, BIG, "500", "N",
     "steps between saves; 0: only at the end", 0},
    {"sample-every", OPT_WHOLE, USE_RUN, &options.sample_every, 0, BIG, "0", "N",
     "steps between samples of --tokens; 0: never", 0},
    {"seed", OPT_WHOLE, USE_RUN, &options.seed, 0, BIG, "1", "S", "of weights, data order, samples", 0},
    {"threads", OPT_WHOLE, USE_OTHER, &options.threads, 1, 4096, NULL, "N", "all cores by default", 0},
    {"precision", OPT_CHOICE, USE_RUN, &options.precision, 0, 0, "fp32", "fp32|bf16", "of products", 0},

    {"arch", OPT_CHOICE, USE_SHAPE, &options.arch, 0, 0, "qwen3", "qwen3|mixtral|olmoe", "class",
     0},
    {"layers", OPT_WHOLE, USE_SHAPE, &options.layers, 1, MAX_LAYERS, "4", "L", "layers", 0},
    {"hidden", OPT_WHOLE, USE_SHAPE, &options.hidden, 1, 1 << 20, "128", "H", "hidden size", 0},
    {"heads", OPT_WHOLE, USE_SHAPE, &options.heads, 1, 1 << 14, "4", "NH", "attention heads", 0},
    {"kv-heads", OPT_WHOLE, USE_SHAPE, &options.kv_heads, 1, 1 << 14, NULL, "NKV",
     "key/value heads (NH / 2; olmoe: NH)", 0},
    {"head-dim", OPT_WHOLE, USE_SHAPE, &options.head_dim, 2, 1 << 14, NULL, "HD", "head size (H / NH)", 0},
    {"ffn", OPT_WHOLE, USE_SHAPE, &options.ffn, 1, 1 << 20, NULL, "I", "dense layers' width (3 H)", 0},
    {"experts", OPT_WHOLE, USE_SHAPE, &options.experts, 0, 1 << 16, "8", "E", "0: a dense model", 0},
    {"topk", OPT_WHOLE, USE_OTHER, &options.topk, 1, 1 << 16, NULL, "K", "experts per token (2; dynamic: up to E)", 0},
    {"expert-ffn", OPT_WHOLE, USE_SHAPE, &options.expert_ffn, 1, 1 << 20, NULL, "I", "experts' width (2 H)", 0},
    {"sparse-step", OPT_WHOLE, USE_SHAPE, &options.sparse_step, 1, MAX_LAYERS, "1", "S", "every S-th layer is sparse",
     0},
    {"dense", OPT_FLAG, USE_SHAPE, &options.dense, 0, 0, "0", "", "as --experts 0", 0},
    {"vocab", OPT_WHOLE, USE_SHAPE, &options.vocab, 1, 1 << 24, NULL, "V", "vocabulary (text: 256)", 0},
    {"tokenizer", OPT_TEXT, USE_SHAPE, &options.tokenizer, 0, 0, NULL, "DIR", "take tokenizer and vocabulary from it",
     0},
    {"tie", OPT_FLAG, USE_SHAPE, &options.tie, 0, 0, "0", "", "LM head = embedding", 0},
    {"qk-norm", OPT_CHOICE, USE_SHAPE, &options.qk_norm, 0, 0, NULL, "none|head|row", "(the class's)", 0},
    {"norm-topk", OPT_WHOLE, USE_SHAPE, &options.norm_topk, 0, 1, NULL, "0|1", "gates sum to 1 (1; olmoe: 0)", 0},

    {"aux", OPT_REAL, USE_RUN, &options.aux, 0, 1e6, NULL, "C",
     "of balance loss (.01 softmax, dynamic; the model's)", 0},
    {"aux-form", OPT_CHOICE, USE_RUN, &options.aux_form, 0, 0, "switch", "switch|hf",
     "that loss per layer, or for all together", 0},
    {"z-loss", OPT_REAL, USE_RUN, &options.z_loss, 0, 1e6, "0", "C", "keeps router logits small", 0},
    {"aux-adaptive", OPT_FLAG, USE_RUN, &options.aux_adaptive, 0, 0, "0", "", "--aux follows each layer's load", 0},
    {"router", OPT_CHOICE, USE_SHAPE, &options.router, 0, 0, "softmax", "softmax|sigmoid|lpr|dynamic",
     "how experts are chosen", 0},
    {"bias-rate", OPT_REAL, USE_RUN, &options.bias_rate, 0, 1, "0.001", "G",
     "step of sigmoid's bias; with id 0.006", 0},
    {"bias-rule", OPT_CHOICE, USE_RUN, &options.bias_rule, 0, 0, "sign", "sign|quantile|id", "how it moves", 0},
    {"fixed-router", OPT_CHOICE, USE_RUN, &options.fixed_router, 0, 0, "none", "none|start|blocks",
     "router not trained", 0},
    {"logit-norm", OPT_REAL, USE_SHAPE, &options.logit_norm, 0, 1e6, "0", "LAMBDA", "normalises logits; 0: off", 0},
    {"topk-range", OPT_TEXT, USE_RUN, &options.topk_range, 0, 0, NULL, "LO:HI",
     "K is drawn for each layer and step", 0},
    {"family-penalty", OPT_REAL, USE_RUN, &options.family_penalty, 0, 1e6, NULL, "B",
     "keeps copies of one expert apart (1, if new)", 0},
    {"family-steps", OPT_WHOLE, USE_RUN, &options.family_steps, 1, BIG, NULL, "S",
     "steps until that is 0 (half of all)", 0},
    {"lpr-dim", OPT_WHOLE, USE_SHAPE, &options.lpr_dim, 1, 1 << 14, "16", "D", "latent dimensions of LPR", 0},
    {"lpr-weight", OPT_REAL, USE_SHAPE, &options.lpr_weight, 0, 1e6, "0.01", "C", "of all LPR losses", 0},
    {"lpr-diversity", OPT_REAL, USE_SHAPE, &options.lpr_diversity, 0, 1e6, "1", "C", "of diversity", 0},
    {"lpr-kl", OPT_REAL, USE_SHAPE, &options.lpr_kl, 0, 1e6, "0.01", "C", "of the KL divergence", 0},
    {"lpr-align", OPT_REAL, USE_SHAPE, &options.lpr_align, 0, 1e6, "0.05", "C", "of alignment", 0},
    {"lpr-align-form", OPT_CHOICE, USE_SHAPE, &options.lpr_align_form, 0, 0, "sum", "sum|mean", "over tokens", 0},
    {"dynamic-q", OPT_REAL, USE_SHAPE, &options.dynamic_q, 1e-3, 100, "1.1", "Q", "order of a token's entropy", 0},
    {"dynamic-entropy", OPT_REAL, USE_SHAPE, &options.dynamic_entropy, 0, 1e6, "0.9", "S", "above it K experts", 0},
    {"dynamic-share", OPT_REAL, USE_SHAPE, &options.dynamic_share, 0, 1, "0.75", "P", "else those with so much", 0},
    {"dynamic-least", OPT_WHOLE, USE_SHAPE, &options.dynamic_least, 1, 1 << 16, "2", "N", "or so many", 0},
    {"dynamic-weight", OPT_REAL, USE_SHAPE, &options.dynamic_weight, 0, 1e6, "0.01", "C", "of the entropy loss", 0},

    {"lr", OPT_REAL, USE_RUN, &options.lr, 0, 1e6, NULL, "X", "learning rate (2e-3; 2e-4 with --model)", 0},
    {"min-lr", OPT_REAL, USE_RUN, &options.min_lr, 0, 1e6, "0", "X", "learning rate at the end of the decay", 0},
    {"warmup", OPT_WHOLE, USE_RUN, &options.warmup, 0, BIG, NULL, "N",
     "steps of rising rate (a 20th of all, at most 100)", 0},
    {"schedule", OPT_CHOICE, USE_RUN, &options.schedule, 0, 0, "wsd", "wsd|cosine|constant",
     "of the learning rate", 0},
    {"decay-frac", OPT_REAL, USE_RUN, &options.decay_frac, 0, 1, "0.1", "X",
     "wsd: share of the steps in which it decays", 0},
    {"weight-decay", OPT_REAL, USE_RUN, &options.weight_decay, 0, 1e6, "0.1", "X", "of matrices", 0},
    {"beta1", OPT_REAL, USE_RUN, &options.beta1, 0, 0.999999, "0.9", "X", "of AdamW", 0},
    {"beta2", OPT_REAL, USE_RUN, &options.beta2, 0, 0.999999, "0.95", "X", "of AdamW", 0},
    {"eps", OPT_REAL, USE_RUN, &options.eps, 1e-30, 1, "1e-8", "X", "of AdamW", 0},
    {"clip", OPT_REAL, USE_RUN, &options.clip, 0, 1e6, "1", "X", "largest gradient norm; 0: any", 0},

    {"eval", OPT_FLAG, USE_OTHER, &options.eval, 0, 0, "0", "", "loss of --model on --data", 0},
    {"skip-below", OPT_REAL, USE_OTHER, &options.skip_below, 0, 1, "0", "MU",
     "no expert whose gate is below MU of the largest", 0},
    {"load", OPT_FLAG, USE_OTHER, &options.load, 0, 0, "0", "", "and each layer's load", 0},
    {"trace", OPT_TEXT, USE_OTHER, &options.trace, 0, 0, NULL, "F.csv", "and each token's experts", 0},
    {"dump", OPT_TEXT, USE_OTHER, &options.dump, 0, 0, NULL, "F", "logits, gradients of a batch", 0},
    {"prompt", OPT_TEXT, USE_OTHER, &options.prompt, 0, 0, NULL, "TEXT", "continue this; - reads standard input", 0},
    {"prompt-ids", OPT_TEXT, USE_OTHER, &options.prompt_ids, 0, 0, NULL, "1,2,..", "the same as tokens", 0},
    {"tokens", OPT_WHOLE, USE_OTHER, &options.tokens, 0, 1 << 24, "256", "N", "to generate in a sample", 0},
    {"temperature", OPT_REAL, USE_OTHER, &options.temperature, 0, 100, "0.8", "X",
     "of sampling; 0: the likeliest token", 0},
    {"top-p", OPT_REAL, USE_OTHER, &options.top_p, 0, 1, "1", "X", "only the likeliest tokens, up to this share", 0},
    {"top-k", OPT_WHOLE, USE_OTHER, &options.top_k, 0, 1 << 24, "0", "N",
     "only so many of the likeliest tokens; 0: all", 0},
};
enum { NUM_OPTIONS = sizeof option_table / sizeof option_table[0] };

// What an option must find in the model or on the command line to mean something. With its default, or with the value
// named here, it asks for nothing, and that the model lacks it is no contradiction: one line serves every arm.
typedef enum { EXPERTS, DENSE_LAYERS, SIGMOID, LPR, DYNAMIC, FAMILIES, WSD_DECAY, ANY_DECAY, SCORING, NO_GRADIENT,
               NUM_NEEDS } Need;
static const char* need_missing[NUM_NEEDS] = {
    "a dense model has no experts and no router",
    "every layer is sparse, so there is no dense one; --expert-ffn is the width of an expert",
    "only the router sigmoid has a bias", "belongs to --router lpr", "belongs to --router dynamic",
    "a new, a dense or an lpr model has no families; they come with a --model from upcycle",
    "belongs to --schedule wsd", "--schedule constant has no decay that could end there", "goes with --eval",
    "goes with --eval, --prompt or a sample of --model"};
static const struct {
    const char* name;
    Need need;
    const char* off;
} option_needs[] = {
    {"topk", EXPERTS, "1|2"}, {"expert-ffn", EXPERTS, NULL}, {"sparse-step", EXPERTS, NULL}, {"router", EXPERTS, NULL},
    {"logit-norm", EXPERTS, NULL}, {"aux", EXPERTS, "0|0.01"}, {"z-loss", EXPERTS, NULL},
    {"aux-adaptive", EXPERTS, NULL},
    {"topk-range", EXPERTS, "1:1"}, {"load", EXPERTS, NULL}, {"trace", EXPERTS, NULL}, {"ffn", DENSE_LAYERS, NULL},
    {"bias-rate", SIGMOID, "0"}, {"bias-rule", SIGMOID, NULL}, {"lpr-dim", LPR, NULL},
    {"lpr-weight", LPR, "0"}, {"lpr-diversity", LPR, "0"}, {"lpr-kl", LPR, "0"}, {"lpr-align", LPR, "0"},
    {"lpr-align-form", LPR, NULL}, {"dynamic-q", DYNAMIC, NULL}, {"dynamic-entropy", DYNAMIC, NULL},
    {"dynamic-share", DYNAMIC, NULL}, {"dynamic-least", DYNAMIC, NULL}, {"dynamic-weight", DYNAMIC, "0"},
    {"family-penalty", FAMILIES, "0"}, {"family-steps", FAMILIES, NULL},
    {"decay-frac", WSD_DECAY, NULL}, {"min-lr", ANY_DECAY, NULL},
    {"load", SCORING, NULL}, {"trace", SCORING, NULL}, {"fixed-router", EXPERTS, NULL}, {"skip-below", EXPERTS, NULL},
    {"skip-below", NO_GRADIENT, NULL}};

// Whether an option has its default or a value of `off`, "a|b" (NULL: there is none).
static int asks_nothing(const Option* o, const char* off) {
    const char* values[] = {o->start, off};
    int nothing = 0, text = o->type == OPT_TEXT || o->type == OPT_CHOICE;
    double number = o->type == OPT_REAL ? *(double*)o->value : text ? 0 : (double)*(long*)o->value;
    for (int i = 0; i < 2; i++) {
        if (text) nothing |= values[i] && choice_index(values[i], *(const char**)o->value) >= 0;
        for (const char* s = text ? NULL : values[i]; s; s = strchr(s, '|') ? strchr(s, '|') + 1 : NULL)
            nothing |= number == strtod(s, NULL);
    }
    return nothing;
}

static Option* option_find(const char* name) {
    for (int i = 0; i < NUM_OPTIONS; i++)
        if (!strcmp(option_table[i].name, name)) return &option_table[i];
    return NULL;
}

static int option_given(const char* name) { return option_find(name)->given; }

// Ends the program because getopt_long knew no single option for `argument`, --name or --name=value.
static void option_unknown(const char* argument, const struct option* longs) {
    char candidates[256] = "";
    size_t length = strcspn(argument, "=");
    int found = 0;
    for (; longs->name; longs++) {
        if (length <= 2 || strncmp(argument + 2, longs->name, length - 2)) continue;
        size_t n = strlen(candidates);
        snprintf(candidates + n, sizeof candidates - n, "%s--%s", found++ ? ", " : "", longs->name);
    }
    if (found > 1) die(2, "%s: may be any of %s", argument, candidates);
    if (found == 1) die(2, "%s: the option takes no value", argument);
    die(2, "%s: unknown option; see --help", argument);
}

static void option_set(Option* o, const char* text) {
    char* end;
    if (o->type == OPT_TEXT) {
        if (!*text && strcmp(o->name, "prompt")) die(2, "--%s: empty; expected %s", o->name, o->argument);
        *(const char**)o->value = text;
    } else if (o->type == OPT_CHOICE) {
        if (choice_index(o->argument, text) < 0)
            die(2, "--%s %s: expected one of %s", o->name, text, o->argument);
        *(const char**)o->value = text;
    } else if (o->type == OPT_REAL) {
        errno = 0;
        double x = strtod(text, &end);
        if (end == text || *end || !(x >= o->low && x <= o->high))
            die(2, "--%s %s: expected a number from %g to %g", o->name, text, o->low, o->high);
        *(double*)o->value = x;
    } else {
        errno = 0;
        long x = strtol(text, &end, 10);
        if (end == text || *end || errno || (o->type == OPT_WHOLE && (x < o->low || x > o->high)))
            die(2, "--%s %s: expected a whole number from %.0f to %.0f", o->name, text, o->low, o->high);
        *(long*)o->value = x;
    }
}

static void options_reset_table(Option* table, int count) {
    for (Option* o = table; o < table + count; o++) {
        o->given = 0;
        if (o->start) option_set(o, o->start);
        else if (o->type == OPT_WHOLE) *(long*)o->value = UNSET;
        else if (o->type == OPT_REAL) *(double*)o->value = UNSET;
        else *(const char**)o->value = NULL;
    }
}

static void print_help(void) {
    static const struct {
        const char *first, *title;
    } groups[] = {{"data", "Data and run"},
                  {"arch", "A new model"},
                  {"aux", "Router"},
                  {"lr", "Optimiser"},
                  {"eval", "Instead of training"}};
    printf("train_moe %s: trains, evaluates and samples mixture-of-experts GPTs.\n"
           "Without options: a demonstration. With --model DIR alone: a sample.\n"
           "Examples\n"
           "  ./train_moe --data my.txt --steps 2000 --out out/my\n"
           "  ./train_moe --model out/my --prompt \"Once upon a time\" --tokens 300\n"
           "  ./train_moe --model out/my --data other.txt --eval\n", VERSION);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const Option* o = &option_table[i];
        char name[64], start[40] = "";
        for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++)
            if (!strcmp(o->name, groups[g].first)) printf("%s\n", groups[g].title);
        snprintf(name, sizeof name, "--%s %s", o->name, o->argument);
        if (o->start && o->type != OPT_FLAG) snprintf(start, sizeof start, " (%s)", o->start);
        printf("  %-24s %s%s\n", name, o->help, start);
    }
}

// Reads the command line into a table of options. What is no option is moved behind them; argv[optind] is its first.
enum { MOST_OPTIONS = 128 };
static void options_parse_table(Option* table, int count, void (*help)(void), int argc, char** argv) {
    struct option longs[MOST_OPTIONS + 3];
    memset(longs, 0, sizeof longs);
    options_reset_table(table, count);
    for (int i = 0; i < count; i++) {
        longs[i].name = table[i].name;
        longs[i].has_arg = table[i].type == OPT_FLAG ? no_argument : required_argument;
    }
    longs[count].name = "help";
    longs[count + 1].name = "version";
    // beyond any character; were they equal, getopt would not see that an abbreviation is ambiguous
    for (int i = 0; i < count + 2; i++) longs[i].val = 256 + i;
    opterr = 0;
    optind = 1;
    int c;
    while ((c = getopt_long(argc, argv, ":h", longs, NULL)) != -1) {
        int index = c - 256;
        if (c == ':') die(2, "%s wants a value; see --help", argv[optind - 1]);
        if (c == '?' && optopt > 0 && optopt < 256) die(2, "-%c: unknown option; see --help", optopt);
        if (c == '?') option_unknown(argv[optind - 1], longs);
        if (c == 'h' || index >= count) {
            if (c == 'h' || index == count)
                help(), printf("  %-24s %s\n", "--help, --version", "this; which version it is");
            else printf("%s %s\n", program_name, VERSION);
            exit(0);
        }
        option_set(&table[index], table[index].type == OPT_FLAG ? "1" : optarg);
        table[index].given = 1;
    }
}

static void options_parse(int argc, char** argv) {
    remember_command(argc, argv);
    options_parse_table(option_table, NUM_OPTIONS, print_help, argc, argv);
    if (optind < argc) die(2, "%s: unexpected argument; options start with --, see --help", argv[optind]);
}

#include "precision.h"

static Position begun;                      // where this process began
static const char* run_origin = NULL;       // the --model that the run was begun with; "": none; NULL: nobody knows
static Text run_files;                      // its data, as trainer.json lists them
static char run_tokenizer[20];              // the hash of its tokenizer.json; "": its tokens are bytes, or unknown

// "key": [{"file", "bytes", "hash"}, ..]: by what a resume knows its data.
static void files_to_json(Text* t, const char* key, const Dataset* d) {
    text_print(t, "  \"%s\": [", key);
    for (int i = 0; i < d->num_files; i++) {
        const DataFile* f = &d->files[i];
        text_print(t, "%s\n    {\"file\": ", i ? "," : "");
        text_json_string(t, f->path);
        text_print(t, ", \"bytes\": %ld, \"hash\": \"%016" PRIx64 "\"}", f->size, data_file_hash(f));
    }
    text_print(t, "],\n");
}

// trainer.json: the options of the run, where it stands, and the load counted since the last validation.
static void trainer_to_json(Text* t, const Model* m, long step) {
    const Config* c = &m->config;
    Position p = position_after(begun, step, options.batch * options.accum, options.seq);
    text_print(t, "{\n  \"version\": \"%s\",\n  \"step\": %ld,\n  \"sequences\": %ld,\n  \"tokens\": %ld,\n"
               "  \"family_start\": %ld,\n  \"reads_bytes\": %d,\n", VERSION, p.step, p.sequences, p.tokens,
               m->family_start, m->reads_bytes);
    if (run_origin) {
        text_print(t, "  \"model\": ");
        text_json_string(t, run_origin);
        text_print(t, ",\n");
    }
    if (*run_tokenizer) text_print(t, "  \"tokenizer\": \"%s\",\n", run_tokenizer);
    if (run_files.length) text_add(t, run_files.data, run_files.length);
    text_print(t, "  \"options\": {");
    for (int i = 0, listed = 0; i < NUM_OPTIONS; i++) {
        const Option* o = &option_table[i];
        int is_text = o->type == OPT_TEXT || o->type == OPT_CHOICE;
        if (o->use != USE_RUN || (is_text && !*(const char**)o->value)) continue;
        if (!is_text && (o->type == OPT_REAL ? *(double*)o->value : (double)*(long*)o->value) == UNSET) continue;
        text_print(t, "%s\n    \"%s\": ", listed++ ? "," : "", o->name);
        if (is_text) text_json_string(t, *(const char**)o->value);
        else if (o->type == OPT_REAL) text_json_double(t, *(double*)o->value);
        else text_print(t, "%ld", *(long*)o->value);
    }
    text_print(t, "\n  },\n  \"load\": [");
    for (long i = 0; i < (long)c->num_layers * c->num_experts; i++) text_print(t, "%s%ld", i ? "," : "", m->load[i]);
    text_print(t, "],\n  \"observed\": [");
    for (int i = 0; i < OBSERVED_NUMBERS * c->num_layers && c->num_experts > 0; i++) {
        text_print(t, i ? "," : "");
        text_json_double(t, ((const double*)m->observed)[i]);
    }
    text_print(t, "],\n  \"last_load\": [");
    for (long i = 0; i < (long)c->num_layers * c->num_experts && c->router.bias_rule == BIAS_ID; i++)
        text_print(t, "%s%ld", i ? "," : "", m->last_load[i]);
    text_print(t, "],\n  \"aux_coefficients\": [");
    for (int l = 0; l < c->num_layers && m->balance.adaptive; l++) {
        text_print(t, l ? "," : "");
        text_json_double(t, m->aux_coefficients[l]);
    }
    text_print(t, "]\n}\n");
}

// The reverse of the lists at the end of trainer_to_json.
static void trainer_restore(Model* m, const Json* state) {
    const Config* c = &m->config;
    const Json *load = json_get(state, "load"), *observed = json_get(state, "observed"),
               *aux = json_get(state, "aux_coefficients"), *last = json_get(state, "last_load");
    for (int i = 0; load && i < load->count && i < c->num_layers * c->num_experts; i++)
        m->load[i] = (long)load->items[i]->number;
    for (int i = 0; last && i < last->count && i < c->num_layers * c->num_experts; i++)
        m->last_load[i] = (long)last->items[i]->number;
    for (int i = 0; observed && i < observed->count && i < OBSERVED_NUMBERS * c->num_layers; i++)
        ((double*)m->observed)[i] = observed->items[i]->number;
    for (int l = 0; aux && l < aux->count && l < c->num_layers; l++) m->aux_coefficients[l] = aux->items[l]->number;
}

static Json* trainer_state = NULL;          // what --resume read

// Where the run of a trainer.json stands; step -1: it does not tell. Older ones hold no sequences: then all steps were
// alike.
static Position trainer_position(const Json* state) {
    const Json* saved = json_get(state, "options");
    long batch = json_whole(json_get(saved, "batch"), 65536), accum = json_whole(json_get(saved, "accum"), 65536),
         seq = json_whole(json_get(saved, "seq"), 1 << 20), most = (long)1e15;
    Position p = {saved ? json_whole(json_get(state, "step"), most) : -1,
                  json_whole(json_get(state, "sequences"), most), json_whole(json_get(state, "tokens"), most)};
    if (p.sequences < 0) p.sequences = (long)fmin(1e15, fabs((double)p.step * (double)batch * (double)accum));
    if (p.tokens < 0) p.tokens = (long)fmin(1e15, (double)p.sequences * fabs((double)seq));
    return p;
}

// Adds to `what` how the files of d differ from those that trainer.json lists, in number, size or hash.
static void list_other_files(Text* what, const char* kind, const Json* files, const Dataset* d) {
    int others = 0;
    char hash[20];
    if (!files || !d) return;
    for (int i = 0; i < files->count && i < d->num_files && !others; i++) {
        const Json *was = json_get(files->items[i], "hash"), *name = json_get(files->items[i], "file");
        long bytes = json_whole(json_get(files->items[i], "bytes"), LONG_MAX);
        snprintf(hash, sizeof hash, "%016" PRIx64, data_file_hash(&d->files[i]));
        others = bytes != d->files[i].size || !was || was->type != JSON_STRING || strcmp(was->string, hash);
        if (others)
            text_print(what, ", other %s (%.200s of %ld bytes)", kind,
                       name && name->type == JSON_STRING ? name->string : "a file", bytes);
    }
    if (!others && files->count != d->num_files) text_print(what, ", other %s (%d files)", kind, files->count);
}

// One line if the run was begun with other data, with options that decide which of it are read when, or in another
// precision.
static void tell_changes(const Json* state, const char* out, const Dataset* data, const Dataset* val) {
    static const char* kept[] = {"batch", "accum", "seq", "seed"};
    Text what = {NULL, 0, 0};
    int reordered = 0;
    for (int i = 0; i < 4; i++) {
        long was = json_whole(json_get(json_get(state, "options"), kept[i]), LONG_MAX);
        if (was < 0 || was == *(long*)option_find(kept[i])->value) continue;
        text_print(&what, ", --%s %ld", kept[i], was);
        reordered |= i >= 2;
    }
    const Json* precision = json_get(json_get(state, "options"), "precision");
    if (precision && precision->type == JSON_STRING && strcmp(precision->string, options.precision))
        text_print(&what, ", --precision %s", precision->string);
    size_t before = what.length;
    list_other_files(&what, "data", json_get(state, "data_files"), data);
    reordered |= what.length > before;
    list_other_files(&what, "validation data", json_get(state, "val_files"), val);
    if (what.length)
        fprintf(stderr, "%s: warning: until step %ld the run in %s had %s; it goes on with sequence %ld%s\n",
                program_name, begun.step, out, what.data + 2, begun.sequences,
                reordered ? ", and as windows or their order are others now, some text may come twice in this epoch"
                          : " of its data, and no window is read twice");
    free(what.data);
}

// Takes the options that were not given from OUT/trainer.json, and `begun`, where the run stands. The parsed file holds
// the texts of the options, and the load for the model, so it is kept.
static void trainer_read(const char* out, Json** kept) {
    char path[PATH_SIZE], was[PATH_SIZE], is[PATH_SIZE];
    Error error = {""};
    join_path(path, out, "trainer.json");
    *kept = json_read(path, &error);
    if (!*kept) die(2, "%s", error.text);
    begun = trainer_position(*kept);
    if (begun.step < 0) die(2, "%s: no options or step; this is not the trainer.json of a run", path);
    for (int i = 0; i < NUM_OPTIONS; i++) {
        Option* o = &option_table[i];
        const Json* value = json_get(json_get(*kept, "options"), o->name);
        if (o->use == USE_RUN && !o->given && value && value->string) option_set(o, value->string);
    }
    const Json* origin = json_get(*kept, "model");
    run_origin = origin && origin->type == JSON_STRING ? origin->string : options.model;
    if (options.model && strcmp(run_origin, options.model) &&
        (!realpath(run_origin, was) || !realpath(options.model, is) || strcmp(was, is)))
        die(2, "--model %s: the run in %s was begun %s%s; leave out --model, or choose another --out", options.model,
            out, *run_origin ? "with --model " : "without one", run_origin);
    options.model = NULL;
}

// Whether there is a run in OUT to go on with.
static int holds_run(const char* out) {
    char path[PATH_SIZE];
    return !access(join_path(path, out, "trainer.json"), F_OK) || !access(join_path(path, out, ".ready"), F_OK);
}

// A new model as the options describe it. vocab_size stays 0 if it was not given; the data decides.
static void config_from_options(Config* c) {
    memset(c, 0, sizeof *c);
    int dense = options.dense || options.experts == 0, kind = choice_index("qwen3|mixtral|olmoe", options.arch);
    if (kind == 2 && dense) die(2, "--arch olmoe: has no dense form; --arch qwen3 or mixtral (then a Llama) have one");
    c->arch = kind == 0 ? (dense ? QWEN3 : QWEN3_MOE) : kind == 1 ? (dense ? LLAMA : MIXTRAL) : OLMOE;
    c->num_layers = (int)options.layers;
    c->hidden_size = (int)options.hidden;
    c->num_heads = (int)options.heads;
    int kv = options.heads % 2 || kind == 2 ? (int)options.heads : (int)options.heads / 2;
    c->num_kv_heads = options.kv_heads == UNSET ? kv : (int)options.kv_heads;
    c->head_dim = options.head_dim == UNSET ? c->hidden_size / c->num_heads : (int)options.head_dim;
    c->intermediate_size = options.ffn == UNSET ? 3 * c->hidden_size : (int)options.ffn;
    c->vocab_size = options.vocab == UNSET ? 0 : (int)options.vocab;
    c->max_position_embeddings = (int)options.seq;
    c->tie_word_embeddings = (int)options.tie;
    c->rope_theta = 10000;
    c->rms_norm_eps = kind == 2 ? OLMOE_EPS : 1e-6;
    c->qk_norm = kind == 0 ? QK_NORM_HEAD : kind == 1 ? QK_NORM_NONE : QK_NORM_ROW;
    static const char* fits[] = {"mixtral", "qwen3", "olmoe"};          // by kind of norm
    if (options.qk_norm && choice_index("none|head|row", options.qk_norm) != (int)c->qk_norm)
        die(2, "--qk-norm %s: --arch %s has no such norm; --arch %s does", options.qk_norm, options.arch,
            fits[choice_index("none|head|row", options.qk_norm)]);
    if (c->num_heads % c->num_kv_heads)
        die(2, "--kv-heads %d: --heads %d is no multiple of it", c->num_kv_heads, c->num_heads);
    if (options.head_dim == UNSET && c->hidden_size % c->num_heads)
        die(2, "--hidden %d: no multiple of --heads %d; give --head-dim", c->hidden_size, c->num_heads);
    if (c->head_dim % 2 || c->head_dim < 2) die(2, "--head-dim %d: rotary positions need an even one", c->head_dim);
    if (kind == 2 && c->head_dim * c->num_heads != c->hidden_size)
        die(2, "--head-dim %d: --arch olmoe has hidden / heads; --arch qwen3 is free in it", c->head_dim);
    c->router.kind = (Router)choice_index("softmax|sigmoid|lpr|dynamic", options.router);
    if (dense) return;
    c->num_experts = (int)options.experts;
    int dynamic = c->router.kind == ROUTER_DYNAMIC;     // then K is the most that a token may get
    c->num_experts_per_tok = options.topk != UNSET ? (int)options.topk
                             : dynamic             ? c->num_experts
                                                   : imin(2, c->num_experts);
    c->moe_intermediate_size = options.expert_ffn == UNSET ? 2 * c->hidden_size : (int)options.expert_ffn;
    c->norm_topk_prob = options.norm_topk == UNSET ? kind != 2 : (int)options.norm_topk;
    if (c->num_experts_per_tok > c->num_experts)
        die(2, "--topk %d: there are only %d experts", c->num_experts_per_tok, c->num_experts);
    if (kind == 1 && !c->norm_topk_prob)
        die(2, "--norm-topk 0: --arch mixtral always renormalises; --arch qwen3 or olmoe fit");
    if (kind != 0 && options.sparse_step > 1)
        die(2, "--sparse-step %ld: in --arch %s all layers are sparse; --arch qwen3 fits", options.sparse_step,
            options.arch);
    for (int l = 0; l < c->num_layers; l++) c->sparse[l] = (l + 1) % options.sparse_step == 0;
    c->router.logit_norm = options.logit_norm;
    if (c->router.kind == ROUTER_LPR) {
        if (!c->norm_topk_prob) die(2, "--norm-topk 0: --router lpr always renormalises; softmax and sigmoid need not");
        if (c->router.logit_norm > 0)
            die(2, "--logit-norm: LPR's scores are cosines already; use it with --router softmax or sigmoid");
        c->router.lpr_latent_dim = (int)options.lpr_dim;
        c->router.lpr_weight = options.lpr_weight;
        c->router.lpr_diversity = options.lpr_diversity;
        c->router.lpr_kl = options.lpr_kl;
        c->router.lpr_align = options.lpr_align;
        c->router.lpr_align_mean = !strcmp(options.lpr_align_form, "mean");
    }
    if (c->router.kind == ROUTER_DYNAMIC) {
        if (options.dynamic_q == 1) die(2, "--dynamic-q 1: the entropy divides by Q - 1; 1.001 is near");
        if (option_given("dynamic-least") && options.dynamic_least > c->num_experts_per_tok)
            die(2, "--dynamic-least %ld: a token gets at most --topk %d", options.dynamic_least,
                c->num_experts_per_tok);
        c->router.dynamic_q = options.dynamic_q;
        c->router.dynamic_entropy = options.dynamic_entropy;
        c->router.dynamic_share = options.dynamic_share;
        c->router.dynamic_least = (int)options.dynamic_least;
        c->router.dynamic_weight = options.dynamic_weight;
    }
    // Qwen3-MoE with sigmoid scores is Dots1, which knows dense layers only below the sparse ones
    if (kind == 0 && c->router.kind == ROUTER_SIGMOID && c->router.logit_norm == 0 && options.sparse_step == 1 &&
        c->num_experts > 1)
        c->arch = DOTS1, c->router.scaling = 1;
    if (count_sparse(c) == 0)
        die(2, "--sparse-step %ld: leaves no sparse layer among %d; --dense does that", options.sparse_step,
            c->num_layers);
}

// Longer sequences than the model was made for are computed all the same, but not in silence.
static void check_length(Config* c, const char* dir, int T) {
    int window = sliding_window(dir, c);
    if (window && window < T)
        die(2, "--seq %d: the model has sliding_window %d, which is not supported; use a shorter --seq", T, window);
    if (T <= c->max_position_embeddings) return;
    if (c->rope.type == ROPE_DYNAMIC)
        die(2, "--seq %d: rope_type dynamic can be computed up to max_position_embeddings, %d; use a shorter --seq", T,
            c->max_position_embeddings);
    fprintf(stderr, "%s: warning: --seq %d goes beyond the model's max_position_embeddings, %d\n", program_name, T,
            c->max_position_embeddings);
    if (c->rope.type == ROPE_DEFAULT) c->max_position_embeddings = T;       // what others are stretched from stays
}

// The run in OUT goes on with the tokens that it began with, or not at all.
static void check_tokenizer(const Json* state, const char* out) {
    const Json* was = json_get(state, "tokenizer");
    char hash[20];
    int other = was ? was->type != JSON_STRING || strcmp(was->string, tokenizer_hash(out, hash))
                    : json_whole(json_get(state, "reads_bytes"), 1) == 1 && holds(out, "tokenizer.json") &&
                          !tokenizer_is_bytes(out);
    if (other)
        die(2, "%s/tokenizer.json is not the one that the run began with; put that back, or begin a run with --model "
            "and another --out", out);
}

static void print_model(const Model* m) {
    const Config* c = &m->config;
    long total, active;
    count_parameters(c, &total, &active);
    printf("model: %s, %d layers, hidden %d, %d/%d heads x %d, vocabulary %d", archs[c->arch].model_type, c->num_layers,
           c->hidden_size, c->num_heads, c->num_kv_heads, c->head_dim, c->vocab_size);
    if (c->num_experts)
        printf(", %d experts of width %d, %s%d per token", c->num_experts, c->moe_intermediate_size,
               c->router.kind == ROUTER_DYNAMIC ? "at most " : "", c->num_experts_per_tok);
    if (shared_expert_width(c)) printf(", and a shared one of width %d", shared_expert_width(c));
    printf("\nparameters: %ld, %ld of them active for a token\n", total, active);
    printf("memory: %.1f MB = parameters %.1f + gradients and moments %.1f + activations %.1f\n",
           (m->bytes_params + m->bytes_optimizer + m->bytes_activations) / 1e6, m->bytes_params / 1e6,
           m->bytes_optimizer / 1e6, m->bytes_activations / 1e6);
    fflush(stdout);
}

// A model with the parameters of --model.
static Model* load_model(Config* c, const char* dir, Purpose purpose, int B, int T, int positions) {
    Error error = {""};
    Model* m = model_plan(c, purpose, B, T, positions, NULL);
    if (purpose != FOR_GENERATION) print_model(m);      // what is generated stands alone
    model_allocate(m);
    if (!checkpoint_load(m, dir, &error)) die(2, "%s", error.text);
    m->backend->send(m, PARAMETERS);
    return m;
}

static Balance balance_from_options(const Config* c) {
    Balance b;
    b.aux = (float)(options.aux == UNSET ? c->router_aux_loss_coef : options.aux);
    b.z = (float)options.z_loss;
    b.aux_form = (AuxForm)choice_index("switch|hf", options.aux_form);
    b.adaptive = (int)options.aux_adaptive;
    if (b.adaptive && b.aux_form == AUX_HF)
        die(2, "--aux-adaptive: a coefficient for each layer wants --aux-form switch");
    return b;
}

// Model.observe: counts the experts' rows of a layer in *(long*)observer.
static void count_rows(Model* m, int l) {
    if (m->config.sparse[l]) *(long*)m->observer += m->layers[l].offsets[m->config.num_experts];
}

// " | bits per byte": the loss of the first `tokens` targets over the bytes that they print.
static void print_bits_per_byte(const Config* c, Dataset* d, long tokens, double loss, Batch b) {
    Tokenizer* t = tokenizer_open(options.model, c->vocab_size);
    double bytes = 0;
    for (long w = 0; w < tokens / d->T && (t->pieces || t->bytes); w++) {
        dataset_window(d, w, b.tokens, b.targets);
        for (int k = 0; k < d->T; k++)
            bytes += !t->pieces ? 1 : t->pieces[b.targets[k]] ? t->lengths[b.targets[k]] : 0;
    }
    if (bytes > 0) printf(" | bits per byte %.4f", loss / M_LN2 * (double)tokens / bytes);
    tokenizer_close(t);
}

static int is_same_file(const char* a, const char* b) {
    struct stat s, t;
    return !stat(a, &s) && !stat(b, &t) && s.st_dev == t.st_dev && s.st_ino == t.st_ino;
}

// What --trace or --dump makes is written beside its file, with .saving behind the name, until it is whole. What is no
// regular file, a pipe or /dev/null, is written as it is: then result_saving is empty.
static char result_file[PATH_SIZE], result_saving[PATH_SIZE];

static void result_drop(void) {
    if (*result_saving) unlink(result_saving);
}

static void result_refuse(const char* option, const char* file, const char* read) {
    if (is_same_file(file, read) || is_same_file(result_saving, read))
        die(2, "--%s %s: would write over %s, which is read; choose another name", option, file, read);
}

// Before anything is computed: refuses what cannot be written, or is read. Returns the path that is written.
static const char* result_begin(const char* option, const char* file, const Dataset* d) {
    char real[PATH_SIZE], path[PATH_SIZE];
    struct stat st;
    int there = !stat(file, &st), regular = !there || S_ISREG(st.st_mode);
    if (there && S_ISDIR(st.st_mode)) die(2, "--%s %s: is a directory; give the name of a file in it", option, file);
    const char* target = there && regular && realpath(file, real) ? real : file;       // the file, not a link to it
    if (strlen(target) + 8 > PATH_SIZE) die(2, "--%s %.60s...: the path is too long", option, file);
    strcpy(result_file, target);
    if (regular) strcat(strcpy(result_saving, target), ".saving");
    for (int i = 0; i < d->num_files; i++) result_refuse(option, file, d->files[i].path);
    DIR* model = opendir(options.model);
    for (struct dirent* entry; model && (entry = readdir(model)) != NULL;)
        if (travels(entry->d_name) || !fnmatch("model*.safetensors*", entry->d_name, 0) ||
            !strcmp(entry->d_name, "config.json"))
            result_refuse(option, file, join_path(path, options.model, entry->d_name));
    if (model) closedir(model);
    if (!regular) return result_file;
    if (there && access(file, W_OK)) die(2, "--%s %s: %s", option, file, strerror(errno));
    int fd = open(result_saving, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) die(2, "--%s: %s: %s", option, result_saving, strerror(errno));
    close(fd);
    atexit(result_drop);
    return result_saving;
}

// The moment from which the file is there.
static void result_end(const char* option) {
    if (*result_saving && rename(result_saving, result_file))
        die(1, "--%s %s: %s", option, result_file, strerror(errno));
    result_saving[0] = 0;
}

static int run_eval(Config* c) {
    if (!options.model) die(2, "--eval wants --model DIR");
    if (!options.data) die(2, "--eval wants --data FILE");
    if ((options.load || options.trace) && count_sparse(c) == 0)
        die(2, "--%s: a dense model has no experts", options.trace ? "trace" : "load");
    if (!option_given("seq")) options.seq = imin(1024, c->max_position_embeddings);
    int B = (int)options.batch, T = (int)options.seq;
    long batches = option_given("val-batches") ? options.val_batches : 0;
    Dataset* d = dataset_open(options.data, T, c->vocab_size, WHOLE, reads_bytes(c, options.model));
    check_length(c, options.model, T);
    const char* trace = options.trace ? result_begin("trace", options.trace, d) : NULL;
    Model* m = load_model(c, options.model, FOR_SCORING, B, T, T);
    Batch batch = batch_create(B, T);
    m->counting_load = options.load || options.trace;
    if (options.trace) {
        m->trace = fopen(trace, "w");
        if (!m->trace) die(2, "--trace %s: %s", options.trace, strerror(errno));
        fprintf(m->trace, "window,position,token,layer");
        for (int k = 0; k < c->num_experts_per_tok; k++) fprintf(m->trace, ",expert_%d", k + 1);
        for (int k = 0; k < c->num_experts_per_tok; k++) fprintf(m->trace, ",gate_%d", k + 1);
        fprintf(m->trace, "\n");
    }
    long rows = 0;
    if (c->router.skip_below > 0 || c->router.kind == ROUTER_DYNAMIC) m->observe = count_rows, m->observer = &rows;
    double start = seconds(), loss = evaluate(m, d, batches, batch), elapsed = seconds() - start;
    long tokens = (batches > 0 ? lmin(batches * B, d->windows) : d->windows) * T;
    if (d->error[0]) die(2, "%s", d->error);
    if (m->trace) {
        errno = 0;
        if (fflush(m->trace) || ferror(m->trace) || flush_to_disk(fileno(m->trace)))
            die(1, "--trace %s: %s", options.trace, errno ? strerror(errno) : "not all of it could be written");
        fclose(m->trace);
        result_end("trace");
    }
    printf("loss %.6f | perplexity %.4f", loss, exp(loss));
    if (d->raw) printf(" | bits per byte %.4f", loss / M_LN2);
    else print_bits_per_byte(c, d, tokens, loss, batch);
    printf(" | %ld tokens, %.0f tokens/s", tokens, tokens / elapsed);
    if (rows) printf(" | %.3f experts a token and layer", (double)rows / ((double)tokens * count_sparse(c)));
    printf("\n");
    if (options.load) report_load(m, 1, NULL, 0);
    free(batch.tokens);
    dataset_close(d);
    model_free(m);
    return 0;
}

static int run_dump(Config* c) {
    if (!options.data) die(2, "--dump wants --data FILE");
    int B = (int)options.batch, T = (int)options.seq, V = c->vocab_size, count = 0;
    Dataset* d = dataset_open(options.data, T, V, WHOLE, reads_bytes(c, options.model));
    if (d->windows < B) die(2, "--batch %d: %s has only %ld windows of %d tokens", B, options.data, d->windows, T + 1);
    check_length(c, options.model, T);
    const char* temporary = result_begin("dump", options.dump, d);
    Model* m = load_model(c, options.model, FOR_TRAINING, B, T, T);
    Batch batch = batch_create(B, T);
    for (int b = 0; b < B; b++) dataset_window(d, b, batch.tokens + (long)b * T, batch.targets + (long)b * T);
    m->balance = balance_from_options(c);
    model_forward(m, batch.tokens, batch.targets, B, T);
    m->backend->read_back(m, LOGITS | ROUTING);
    float* logits = (float*)checked_malloc(sizeof(float) * (size_t)B * T * V);      // the backward pass overwrites them
    memcpy(logits, m->logits, sizeof(float) * (size_t)B * T * V);
    model_backward(m, 1);
    m->backend->read_back(m, GRADIENTS);
    Losses losses = take_losses(m);
    OutTensor* out = (OutTensor*)checked_malloc(sizeof(OutTensor) * (size_t)(5 + c->num_layers + m->layout.count));
    char(*names)[128] = (char(*)[128])checked_malloc(sizeof(*names) * (size_t)(c->num_layers + m->layout.count));
    float loss = (float)losses.loss, aux_loss = (float)losses.aux;
    OutTensor first[] = {{"tokens", "I32", 2, {B, T, 0}, batch.tokens}, {"targets", "I32", 2, {B, T, 0}, batch.targets},
                         {"logits", "F32", 3, {B, T, V}, logits}, {"loss", "F32", 1, {1, 0, 0}, &loss},
                         {"aux_loss", "F32", 1, {1, 0, 0}, &aux_loss}};
    for (; count < 5; count++) out[count] = first[count];
    for (int l = 0; l < c->num_layers; l++) {
        if (!c->sparse[l]) continue;
        snprintf(names[count - 5], sizeof names[0], "router.%d", l);
        OutTensor o = {names[count - 5], "I32", 2, {(long)B * T, c->num_experts_per_tok, 0}, m->layers[l].experts};
        out[count++] = o;
    }
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        if (strstr(t->name, "e_score_correction_bias")) continue;       // is not trained by a gradient
        snprintf(names[count - 5], sizeof names[0], "grad.%s", t->name);
        OutTensor o = {
            names[count - 5], "F32", tensor_is_matrix(t) ? 2 : 1, {t->rows, t->cols, 0}, m->grads + t->offset};
        out[count++] = o;
    }
    Error error = {""};
    if (!safetensors_write(temporary, out, count, &error)) die(1, "%s", error.text);
    result_end("dump");
    printf("loss %.6f, aux loss %.6f; %d tensors in %s\n", losses.loss, losses.aux, count, options.dump);
    free(logits);
    free(out);
    free(names);
    free(batch.tokens);
    dataset_close(d);
    model_free(m);
    return 0;
}

// The tokens of a prompt, *count of them, with room for `more` behind them; the caller frees them.
static int* prompt_tokens(const Config* c, BytesAllowed bytes, const Text* text, int more, int* count) {
    Error error = {""};
    long n = (long)text->length;
    int* encoded = bytes ? NULL : encode(encoder_of_model("--prompt"), text->data, text->length, 1, &n, &error);
    if (!bytes && !encoded) die(2, "--prompt: %s", error.text);
    if (n == 0) die(2, "the prompt is empty; give at least one token to go on from");
    int* ids = (int*)checked_malloc(sizeof(int) * ((size_t)n + (size_t)more));
    for (long i = 0; i < n; i++) {
        ids[i] = encoded ? encoded[i] : (unsigned char)text->data[i];
        if (ids[i] < 0 || ids[i] >= c->vocab_size)
            die(2, "--prompt: token %ld is %d; the vocabulary has 0 to %d", i, ids[i], c->vocab_size - 1);
    }
    free(encoded);
    *count = (int)n;
    return ids;
}

// The next prompt of standard input: a line that somebody types there, otherwise all of it, without the newline at its
// end. 0 if there is no more.
static int read_prompt(Text* t, int typed) {
    int ch = 0;
    t->length = 0;
    text_add(t, "", 0);
    if (typed) fprintf(stderr, "> ");
    while ((ch = getchar()) != EOF && !(typed && ch == '\n')) {
        char byte = (char)ch;
        text_add(t, &byte, 1);
    }
    if (!typed && t->length && t->data[t->length - 1] == '\n') t->length--;
    if (typed && ch == EOF) fprintf(stderr, "\n");
    return t->length > 0 || ch == '\n';
}

static int* ids_from_option(const Config* c, int more, int* count) {
    const char *s = options.prompt_ids, *wrong = NULL;
    int* ids = (int*)checked_malloc(sizeof(int) * (strlen(s) + (size_t)more));
    while (*s && !wrong) {
        char* end;
        long id = strtol(s, &end, 10);
        if (end == s || (*end && *end != ',') || id < 0 || id >= c->vocab_size) wrong = s;
        else ids[(*count)++] = (int)id;
        s = *end ? end + 1 : end;
    }
    if (!wrong && *count > 0) return ids;
    free(ids);
    if (wrong)
        die(2, "--prompt-ids: expected numbers from 0 to %d with commas between them, found %.20s", c->vocab_size - 1,
            wrong);
    die(2, "the prompt is empty; give at least one token to go on from");
}

// Continues --prompt, --prompt-ids or nothing; with --prompt - what standard input has, line after line if somebody
// types it. No template is put around a prompt.
static int run_prompt(Config* c) {
    enum { TYPED_POSITIONS = 1024 };        // room for a line
    Tokenizer* tokenizer = tokenizer_open(options.model, c->vocab_size);
    Text text = {NULL, 0, 0};
    int reading = options.prompt && !strcmp(options.prompt, "-"), typed = reading && isatty(0);
    int tokens = (int)options.tokens, prompt = 0, *ids = NULL;
    BytesAllowed bytes = options.prompt ? reads_bytes(c, options.model) : NO_BYTES;
    if (options.prompt && bytes == NO_BYTES && !encode_file)
        die(2, "--prompt: this model reads tokens%s, but has no tokenizer; give --prompt-ids",
            c->vocab_size < 256 ? ", too few for bytes" : "");
    if (bytes == PERHAPS_BYTES) warn_of_bytes("--prompt", c->vocab_size);
    if (options.prompt_ids) ids = ids_from_option(c, tokens, &prompt);
    else if (reading && !typed) read_prompt(&text, 0);
    else if (options.prompt) text_add(&text, options.prompt, strlen(options.prompt));
    if (options.prompt && !typed) ids = prompt_tokens(c, bytes, &text, tokens, &prompt);
    if (!options.prompt && !ids) {
        ids = (int*)checked_malloc(sizeof(int) * ((size_t)tokens + 1));
        ids[prompt++] = first_token(c, tokenizer);
    }
    int positions = imin((typed ? TYPED_POSITIONS : prompt) + tokens, c->max_position_embeddings);
    int window = sliding_window(options.model, c);
    if (typed && window > tokens) positions = imin(positions, window);         // lines have less room
    if (window && window < positions)
        die(2, "--tokens %d: the model has sliding_window %d, which is not supported; ask for fewer", tokens, window);
    Model* g = load_model(c, options.model, FOR_GENERATION, 1, imin(positions, 256), positions);
    Sampling how = {options.temperature, options.top_p, (int)options.top_k, (uint64_t)options.seed};
    while (!typed || read_prompt(&text, 1)) {
        if (typed && !text.length) continue;
        if (typed) ids = prompt_tokens(c, bytes, &text, tokens, &prompt);
        signal(SIGINT, on_signal);
        double start = seconds();
        int made = generate(g, tokenizer, ids, prompt, tokens, &how, stdout);
        fprintf(stderr, "%d tokens, %.1f tokens/s%s\n", made, made / (seconds() - start), sample_of(c, tokenizer));
        free(ids);
        how.seed++;
        if (!typed || stop_signal) break;
        signal(SIGINT, SIG_DFL);
    }
    free(text.data);
    tokenizer_close(tokenizer);
    model_free(g);
    return stop_signal ? 130 : 0;
}

// --topk-range LO:HI
static void topk_range_from_options(Config* c, Run* run) {
    char rest;
    if (!options.topk_range || c->num_experts == 0) return;
    if (sscanf(options.topk_range, "%d:%d%c", &run->routers.topk_low, &run->routers.topk_high, &rest) != 2 ||
        run->routers.topk_low < 1 || run->routers.topk_high < run->routers.topk_low ||
        run->routers.topk_high > c->num_experts)
        die(2, "--topk-range %s: expected LO:HI with 1 <= LO <= HI <= %d experts", options.topk_range, c->num_experts);
    c->topk_limit = run->routers.topk_high;
}

// Makes OUT if it is not there, takes the lock that keeps a second run out (the system drops it when this one ends,
// however it ends), and refuses to write over a run.
static void open_out(const char* out) {
    char path[PATH_SIZE];
    Error error = {""};
    for (const char* end = strchr(out + 1, '/'); end && !options.resume; end = strchr(end + 1, '/')) {    // its parents
        snprintf(path, sizeof path, "%.*s", (int)(end - out), out);
        mkdir(path, 0777);
    }
    if (!options.resume && mkdir(out, 0777) && errno != EEXIST) die(2, "--out %s: %s", out, strerror(errno));
    int fd = open(out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) die(2, "--out %s: %s", out, strerror(errno));
    if (!lock_directory(fd, out)) die(2, "--out %s: another run is writing there", out);
    if (options.resume && !finish_save(out, &error)) die(1, "%s", error.text);
    static const char* signs[] = {"trainer.json", ".ready", "config.json", "model.safetensors"};
    for (int i = 0; !options.resume && i < 4; i++) {
        join_path(path, out, signs[i]);
        if (!access(path, F_OK))
            die(2, i < 2 ? "--out %s: holds %s; --resume goes on with that run, another --out starts a new one"
                         : "--out %s: holds %s, but no run; to train this model give it as --model and another --out",
                out, signs[i]);
    }
}

static int run_train(Config* c) {
    long first_step = begun.step;
    int B = (int)options.batch, T = (int)options.seq, demonstration = !options.data && !options.out && !options.model;
    Error error = {""};
    signal(SIGPIPE, SIG_IGN); // that nobody reads what is printed (`| head`) is no reason to lose the work
    if (options.resume) options.model = options.out, check_tokenizer(trainer_state, options.out);
    check_length(c, options.model, T);
    const char* tokenizer = options.model ? options.model : options.tokenizer;
    Text tokens = {NULL, 0, 0};
    if (!options.model && tokenizer) take_tokenizer(tokenizer, &c->vocab_size, &tokens);
    BytesAllowed bytes_are_tokens = tokenizer                                        ? reads_bytes(c, tokenizer)
                                    : c->vocab_size == 0 || c->vocab_size >= 256 ? BYTES
                                                                                   : NO_BYTES;
    if (!options.data) options.data = "<embedded>";
    const char* stored = options.resume ? " (so says trainer.json, relative to where the run was started; go there, or "
                                          "name the data again)" : "";
    data_advice = option_given("data") ? "" : stored;
    val_advice = "; --val none uses all";
    int split = !options.val;
    Dataset *data = dataset_open(options.data, T, INT_MAX, split ? TRAIN_PART : WHOLE, bytes_are_tokens), *val = NULL;
    if (c->vocab_size == 0 && !data->raw)
        die(2, "--vocab is missing: token shards do not say how many tokens there are; --tokenizer DIR does, too");
    if (c->vocab_size == 0) c->vocab_size = 256;
    if (data->raw && !options.model && c->vocab_size > 256)
        die(2, "%s: has no header of a token shard, and of its bytes there are 256, not --vocab %d; make shards with "
            "data/tokenize_text.py, give --tokenizer, or leave out --vocab", data->files[0].path, c->vocab_size);
    if (data->zeros)
        fprintf(stderr, "%s: warning: %s has zero bytes, as no text has; its bytes are the tokens all the same "
                "(data/tokenize_text.py makes shards of what has other tokens)\n", program_name, data->zeros);
    data->vocab_size = c->vocab_size;
    data_advice = option_given("val") ? "" : stored;
    if (split && (data->raw || data->encoded))
        val = dataset_open(options.data, T, c->vocab_size, VAL_PART, bytes_are_tokens);
    if (options.val && strcmp(options.val, "none"))
        val = dataset_open(options.val, T, c->vocab_size, WHOLE, bytes_are_tokens);
    if (data->windows < 1) die(2, "%s: no window of %d tokens", options.data, T + 1);
    if (val && val->raw != data->raw)
        die(2, "--val %s: --data is %s, and so --val must be", options.val, data->raw ? "text" : "token shards");

    if (!options.resume) {
        dataset_check(data);
        if (val) dataset_check(val);
    }

    // what was not given and depends on more
    if (options.lr == UNSET) options.lr = options.model ? 2e-4 : 2e-3;
    if (options.min_lr > options.lr && (option_given("min-lr") || option_given("lr")))
        die(2, "--min-lr %g: the decay ends there, so it must not be above --lr, %g", options.min_lr, options.lr);
    if (options.warmup == UNSET && options.steps > 0) options.warmup = lmin(100, options.steps / 20);
    if (options.aux == UNSET)
        options.aux = options.model ? c->router_aux_loss_coef
                      : c->router.kind == ROUTER_SOFTMAX || c->router.kind == ROUTER_DYNAMIC ? 0.01 : 0;
    c->router_aux_loss_coef = options.aux;
    Run run;
    memset(&run, 0, sizeof run);
    run.steps = options.steps;
    run.B = B;
    run.T = T;
    run.accum = (int)options.accum;
    run.lr = options.lr;
    run.min_lr = options.min_lr;
    run.decay_frac = options.decay_frac;
    run.warmup = options.warmup;
    run.schedule = (Schedule)choice_index("wsd|cosine|constant", options.schedule);
    run.adamw.beta1 = options.beta1;
    run.adamw.beta2 = options.beta2;
    run.adamw.eps = options.eps;
    run.adamw.weight_decay = options.weight_decay;
    run.adamw.clip = options.clip;
    run.seed = (uint64_t)options.seed;
    run.val_every = options.val_every;
    run.val_batches = options.val_batches;
    run.save_every = options.save_every;
    run.sample_every = options.sample_every;
    run.begun = begun;
    run.sampling.temperature = options.temperature;
    run.sampling.top_p = options.top_p;
    run.sampling.top_k = (int)options.top_k;
    run.sampling.seed = run.seed;
    run.sample_tokens = demonstration && !option_given("tokens") ? 600 : (int)options.tokens;
    run.routers.micro_batches = run.accum;
    c->router.bias_rule = choice_index("sign|quantile|id", options.bias_rule);
    const Json* rule = json_get(json_get(trainer_state, "options"), "bias-rule");       // of the run that goes on
    int was_id = rule && !strcmp(rule->string, "id");
    if (c->router.bias_rule == BIAS_ID && !was_id && !option_given("bias-rate")) options.bias_rate = 0.006;
    const Option* rate = option_find("bias-rate");
    if (c->router.bias_rule == BIAS_QUANTILE && rate->given && !asks_nothing(rate, "0"))
        die(2, "--bias-rate: --bias-rule quantile has no step; sign and id have one");
    run.routers.bias_rate = options.bias_rate;
    topk_range_from_options(c, &run);
    if (c->router.family_penalty > 0 || (options.model && c->num_experts > 0 && c->router.kind != ROUTER_LPR &&
                                  options.family_penalty != 0 &&
                                  (options.family_penalty != UNSET || options.family_steps != UNSET))) {
        if (options.family_penalty == UNSET) options.family_penalty = 1;
        // a run whose moments upcycle carried over goes on at its source's step, and the penalty starts there
        long start = json_whole(json_get(trainer_state, "family_start"), first_step), half;
        run.routers.family_start = start > 0 ? start : 0;
        half = (options.steps - run.routers.family_start) / 2;
        if (options.family_steps == UNSET && options.steps > 0) options.family_steps = half > 1 ? half : 1;
        run.routers.family_strength = options.family_penalty;
        run.routers.family_steps = options.family_steps;
        if (options.steps > 0)
            c->router.family_penalty = family_penalty_at(
                run.routers.family_strength, first_step - run.routers.family_start, run.routers.family_steps);
    }
    c->router.fixed = strcmp(options.fixed_router, "none") != 0;
    int blocks = !strcmp(options.fixed_router, "blocks");
    if (c->router.fixed && c->router.kind == ROUTER_LPR)
        die(2, "--fixed-router: LPR has more to train than rows; use it with --router softmax or sigmoid");
    if (blocks && c->num_experts > c->hidden_size)
        die(2, "--fixed-router blocks: %d experts do not share a hidden size of %d", c->num_experts, c->hidden_size);
    if (c->router.bias_rule == BIAS_QUANTILE && c->router.family_penalty > 0)
        die(2, "--bias-rule quantile: copies that are kept apart leave a token fewer choices; --family-penalty 0 fits");

    Model *m = model_plan(c, FOR_TRAINING, B, T, T, NULL), *generator = NULL;
    print_model(m);
    model_allocate(m);
    if (demonstration || run.sample_every > 0) {
        generator = model_create(c, FOR_GENERATION, 1, T, T, m);
    }
    m->balance = balance_from_options(c);
    m->family_start = run.routers.family_start;
    // what a model's tokens mean does not change when training goes on with other data
    m->reads_bytes = data->raw || (tokenizer && bytes_are_tokens == BYTES);
    for (int l = 0; l < c->num_layers; l++) m->aux_coefficients[l] = m->balance.aux;
    if (!options.model) {
        model_init(m, run.seed);
        m->tokenizer = tokenizer;
        if (tokenizer) m->luggage = luggage_new(c->arch, tokens.data);
    } else if (!checkpoint_load(m, options.model, &error)) die(2, "%s", error.text);
    if (options.resume && !optimizer_load(m, options.out, &error)) die(2, "%s", error.text);
    if (c->router.fixed) run.routers.fixed = fix_routers(m, blocks);
    m->backend->send(m, PARAMETERS | (options.resume ? MOMENTS : 0));
    if (options.out && !options.resume) open_out(options.out);      // not before everything else is known to be right
    if (!options.resume && option_given("resume"))
        fprintf(stderr, "%s: there is no run in %s to go on with, so this begins one\n", program_name, options.out);
    printf("data: %s, %ld tokens, %ld windows of %d\n", options.data, data->tokens, data->windows, T + 1);
    if (val) {
        long seen = run.val_batches > 0 ? lmin(val->windows, run.val_batches * B) : val->windows;
        printf("validation: %s, %ld of %ld windows%s\n", split ? "the last tenth" : options.val, seen, val->windows,
               seen < val->windows ? "; --val-batches 0 takes all" : "");
    }
    if (!options.out) printf("nothing will be saved: there is no --out\n");
    else print_engine_notes(c);
    fflush(stdout);
    if (options.resume) {
        trainer_restore(m, trainer_state);
        tell_changes(trainer_state, options.out, data, val);
    }
    if (tokenizer && !m->reads_bytes) tokenizer_hash(tokenizer, run_tokenizer);
    run_files.length = 0;
    files_to_json(&run_files, "data_files", data);
    if (val && !split) files_to_json(&run_files, "val_files", val);
    int code = train(m, &run, data, val, generator, options.out);
    if (code == 0 && demonstration && !is_due(run.sample_every, run.steps))
        print_sample(generator, m, &run.sampling, run.sample_tokens);
    dataset_close(data);
    if (val) dataset_close(val);
    if (generator) model_free(generator);
    model_free(m);
    free(run.routers.fixed);
    free(tokens.data);
    json_free(trainer_state);
    return code ? code : stop_signal ? 128 + stop_signal : 0;
}

// (C++ refuses integers among braces where doubles belong)
#define SHAPE(option, is) {&options.option, (double)(is)}

// An option that describes a model must agree with the one in `dir`.
static void check_shape(const Option* o, const Config* c, const char* dir) {
    if (o->value == &options.tokenizer) {
        if (!same_tokenizer(options.tokenizer, dir))
            die(2, "--tokenizer %s: its tokenizer.json is not that of the model in %s; leave it out", options.tokenizer,
                dir);
        return;
    }
    int dense = c->num_experts == 0, step = (int)options.sparse_step, l = 0;
    while (l < c->num_layers && c->sparse[l] == (!dense && (l + 1) % step == 0)) l++;
    const struct {
        const void* option;
        double is;
    } shape[] = {
        SHAPE(arch, c->qk_norm == QK_NORM_HEAD ? 0 : c->qk_norm == QK_NORM_NONE ? 1 : 2),
        SHAPE(layers, c->num_layers), SHAPE(hidden, c->hidden_size), SHAPE(heads, c->num_heads),
        SHAPE(kv_heads, c->num_kv_heads), SHAPE(head_dim, c->head_dim), SHAPE(ffn, c->intermediate_size),
        SHAPE(experts, dense && options.dense ? (double)options.experts : c->num_experts), SHAPE(dense, dense),
        SHAPE(topk, c->num_experts_per_tok), SHAPE(expert_ffn, c->moe_intermediate_size),
        SHAPE(sparse_step, l == c->num_layers ? step : 0), SHAPE(vocab, c->vocab_size),
        SHAPE(tie, c->tie_word_embeddings), SHAPE(qk_norm, c->qk_norm),
        SHAPE(norm_topk, dense ? (double)options.norm_topk : c->norm_topk_prob), SHAPE(router, c->router.kind),
        SHAPE(logit_norm, c->router.logit_norm), SHAPE(lpr_dim, c->router.lpr_latent_dim),
        SHAPE(lpr_weight, c->router.lpr_weight), SHAPE(lpr_diversity, c->router.lpr_diversity),
        SHAPE(lpr_kl, c->router.lpr_kl), SHAPE(lpr_align, c->router.lpr_align),
        SHAPE(lpr_align_form, c->router.lpr_align_mean), SHAPE(dynamic_q, c->router.dynamic_q),
        SHAPE(dynamic_entropy, c->router.dynamic_entropy), SHAPE(dynamic_share, c->router.dynamic_share),
        SHAPE(dynamic_least, c->router.dynamic_least), SHAPE(dynamic_weight, c->router.dynamic_weight)};
    size_t k = 0;
    while (shape[k].option != o->value) k++;
    if (o->type == OPT_CHOICE || o->type == OPT_FLAG) {
        const char* text = o->type == OPT_CHOICE ? *(const char**)o->value : "";
        if (shape[k].is != (o->type == OPT_CHOICE ? choice_index(o->argument, text) : 1))
            die(2, "--%s%s%s: the model in %s is not like that; leave it out", o->name, *text ? " " : "", text, dir);
    } else {
        double asked = o->type == OPT_REAL ? *(double*)o->value : (double)*(long*)o->value;
        if (shape[k].is != asked && o->value == &options.sparse_step)
            die(2, "--sparse-step %ld: other layers of the model in %s are sparse; leave it out", options.sparse_step,
                dir);
        if (shape[k].is != asked)
            die(2, "--%s %.15g: the model in %s has %.15g; leave it out", o->name, asked, dir, shape[k].is);
    }
}

// Refuses what contradicts the model, and nothing else. dir: where it comes from, NULL if it is new.
static void check_needs(const Config* c, const char* dir, int training) {
    if (options.dense && option_given("experts") && options.experts > 0)
        die(2, "--dense and --experts %ld contradict each other; --experts 0 is a dense model", options.experts);
    int families = dir && c->num_experts > 0 && c->router.kind != ROUTER_LPR;
    const int met[NUM_NEEDS] = {c->num_experts > 0, count_sparse(c) < c->num_layers, c->router.kind == ROUTER_SIGMOID,
                                c->router.kind == ROUTER_LPR, c->router.kind == ROUTER_DYNAMIC,
                                families || options.family_penalty == 0, !strcmp(options.schedule, "wsd"),
                                strcmp(options.schedule, "constant") != 0,
                                (int)options.eval, !training && !options.dump};
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const Option* o = &option_table[i];
        int idle = !o->given || (!training && o->use == USE_RUN);
        for (size_t k = 0; k < sizeof option_needs / sizeof option_needs[0] && !idle; k++) {
            if (strcmp(option_needs[k].name, o->name) || met[option_needs[k].need]) continue;
            if (!asks_nothing(o, option_needs[k].off)) die(2, "--%s: %s", o->name, need_missing[option_needs[k].need]);
            idle = 1;
        }
        if (dir && !idle && (o->use == USE_SHAPE || (training && o->value == &options.topk))) check_shape(o, c, dir);
    }
}

// Does what the options say, with default_backend; returns the exit code.
static int run_command(void) {
    Config config;
    Error error = {""};
#ifdef _OPENMP
    if (options.threads != UNSET) omp_set_num_threads((int)options.threads);
#endif
    look_for_others();
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);       // a file over the limit is an error of write
#endif
    // a model alone is sampled from: it is not to be trained on a text that nobody named
    int prompting = options.prompt || options.prompt_ids, other = options.eval || options.dump || prompting,
        alone = options.model && !options.data && !options.resume && !other, training = !other && !alone;
    if ((options.eval != 0) + (options.dump != NULL) + (options.prompt != NULL) + (options.prompt_ids != NULL) > 1)
        die(2, "--eval, --dump, --prompt and --prompt-ids: only one of them at a time");
    if (!training && !options.model)
        die(2, "--%s wants --model DIR", options.eval ? "eval" : options.dump ? "dump" : "prompt");
    // --eval, --dump and --prompt would ignore what describes a run, but for what means something to one of them
    static const char* meant[] = {"data", "batch", "seq", "seed", "aux", "aux-form", "aux-adaptive", "z-loss"};
    for (int i = 0; i < NUM_OPTIONS && !training; i++) {
        const Option* o = &option_table[i];
        int ignored = o->use == USE_RUN || o->value == &options.out || o->value == &options.resume;
        for (int k = 0; k < 8; k++) ignored &= strcmp(o->name, meant[k]) != 0;
        if (options.eval) ignored &= o->value != &options.val_batches;
        if (alone) ignored = (o->use == USE_RUN && o->value != &options.seed) || o->value == &options.out;
        ignored &= o->value != &options.precision;
        ignored &= o->given && !asks_nothing(o, o->type == OPT_TEXT ? "none" : "0");
        if (ignored && alone)
            die(2, "--%s belongs to training, which wants --data F; --model alone is sampled from", o->name);
        if (ignored)
            die(2, "--%s belongs to training, and --eval, --dump and --prompt do not train", o->name);
    }
    if (options.resume && !options.out) die(2, "--resume wants --out DIR, the run to go on with");
    memset(&begun, 0, sizeof begun);
    run_origin = options.model ? options.model : "";
    if (options.resume && !holds_run(options.out)) options.resume = 0;      // then it begins one
    if (options.resume) {
        open_out(options.out);
        trainer_read(options.out, &trainer_state);
    }
    use_precision(!strcmp(options.precision, "bf16"));
    const char* dir = options.resume ? options.out : options.model;
    if (dir) {
        if (!config_read(&config, dir, &error)) die(2, "%s", error.text);
    } else {
        config_from_options(&config);
    }
    check_needs(&config, dir, training);
    if (dir && options.topk != UNSET && config.num_experts > 0) {
        if (options.topk > config.num_experts)
            die(2, "--topk %ld: the model has %d experts", options.topk, config.num_experts);
        config.num_experts_per_tok = (int)options.topk;
    }
    config.router.skip_below = options.skip_below;
    // rows of tokens, and of the experts that they are sent to, are numbered with ints
    int per_token = config.num_experts > 0 ? config.num_experts : 1;
    if ((double)options.batch * (double)options.seq * per_token > INT_MAX)
        die(2, "--batch %ld: with --seq %ld and %d experts it must not exceed %ld; see --accum", options.batch,
            options.seq, per_token, INT_MAX / per_token / options.seq);
    return options.eval   ? run_eval(&config)
           : options.dump ? run_dump(&config)
           : !training    ? run_prompt(&config)
                          : run_train(&config);
}
