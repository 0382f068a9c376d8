// growth.h: a deeper and wider SRC. Its views are changed once, before all else: methods then work on a source that has
// these layers and widths, so that a model grows up and out in one call, as AquilaMoE's does (arXiv 2408.06567).
#pragma once

// The layer of SRC, of L, that layer l of DST, of `depth`, comes from. The first from each is that layer itself, others
// are new.
static int interposed(int l, int L, int depth) { return (int)((long)l * L / depth); } // 0 0 1 1 2 2
static int stacked(int l, int L, int depth) { return (void)depth, l % L; }            // 0 1 2 0 1 2
static const struct {
    const char* name;
    int (*source)(int l, int L, int depth);
} depths[] = {{"interpose", interposed}, {"stack", stacked}};

typedef struct Growth {
    Config from;            // SRC's configuration as it is stored
    int source[MAX_LAYERS]; // the layer of SRC that each layer comes from
    char is_new[MAX_LAYERS];
    int num_new, zero;      // zero: new layers begin with o_proj and down_proj 0 and add nothing to the residual stream
    int width[2], times;    // of an FFN or expert, before and after; copies of each unit
} Growth;

// 1 if only layers or widths were asked for
static int stays_dense(const Plan* p) { return p->dense && !asked("experts"); }

// The views of s become those of a model with configuration c (Net2Net, 1511.05641; bert2BERT). Each unit of an FFN
// stands n times, with its column of down divided by n:  the sum over copies of  w_down / n (silu(w_gate x) (w_up x))
// is what the one unit gave, exactly so where n is a power of two.
static void source_grow(Source* s, const Growth* g, const Config* c) {
    Source old = *s;
    s->config = *c;
    source_index(s);
    for (int i = 0; i < s->layout.count; i++) {
        const Tensor* t = &s->layout.tensors[i];
        char name[120];
        int l = 0, at = 0, in_layer = sscanf(t->name, "model.layers.%d.%n", &l, &at) == 1 && at;
        snprintf(name, sizeof name, "%s", t->name);
        if (in_layer) snprintf(name, sizeof name, "model.layers.%d.%s", g->source[l], t->name + at);
        View* v = &s->views[i];
        const View* from = source_find(&old, name);
        if (!from) continue; // only SRC has it: the rest is then SRC's
        *v = *from;
        int ends = ends_with(name, ".o_proj.weight") || ends_with(name, ".down_proj.weight") ||
                   ends_with(name, ".w2.weight");
        int zero = in_layer && g->zero && g->is_new[l] && ends;
        long rows = t->rows, cols = tensor_is_matrix(t) ? t->cols : 1;
        if (!zero && v->rows == rows && v->cols == cols) continue;
        v->scale = zero ? 0 : ends ? 1.0f / (float)g->times : 1;
        v->stored_rows = v->rows;
        v->stored_cols = v->cols;
        v->rows = rows;
        v->cols = cols;
    }
    source_free_index(&old);
}

static void plan_growth(Plan* p) {
    Config c = p->sources[0]->config;
    int* width = p->dense ? &c.intermediate_size : &c.moe_intermediate_size;
    int L = c.num_layers, depth = asked("layers-to") ? (int)ask.layers_to : L, I = *width, seen[MAX_LAYERS] = {0};
    int times = asked("ffn-to") ? (int)ask.ffn_to / I : 1, kind = choice_index("interpose|stack", ask.depth);
    if (depth < L) die(2, "--layers-to %d: SRC has %d layers, and none can be taken away", depth, L);
    if (depth == L && (insists("depth") || insists("new-layers")))
        die(2, "--%s is about new layers, and there are none; --layers-to N adds some",
            insists("depth") ? "depth" : "new-layers");
    if (asked("ffn-to") && (times < 1 || times * (long)I != ask.ffn_to || times & (times - 1)))
        die(2, "--ffn-to %ld: expected %d times 2, 4, 8, ..., by which dividing is exact", ask.ffn_to, I);
    if (depth == L && times == 1) return;
    if (ask.calibrate)
        die(2, "--calibrate: SRC has other layers or widths than what it grows into; grow first, then upcycle that");
    if (!is(ask.optimizer, "reset"))
        die(2, "--optimizer %s: the layers or widths of the moments are others; --optimizer reset fits", ask.optimizer);
    for (int i = 0; i < NUM_ASKED && stays_dense(p); i++)
        if (insists(ask_table[i].name) &&
            (ask_table[i].use == USE_DENSE || lists("arch,layers,topk,router-init,router-std", ask_table[i].name)))
            die(2, "--%s is about experts, and DST has none; --experts M makes it a mixture", ask_table[i].name);
    Growth* g = p->growth = NEW(Growth, 1);
    g->from = c;
    g->times = times;
    g->width[0] = I;
    g->width[1] = *width = I * times;
    g->zero = is(ask.new_layers, "zero");
    if (c.arch == MIXTRAL || c.arch == OLMOE) c.intermediate_size = *width; // one key for both
    c.num_layers = depth;
    for (int l = 0; l < depth; l++) {
        int from = g->source[l] = depths[kind].source(l, L, depth);
        g->is_new[l] = (char)(seen[from]++ > 0);
        g->num_new += g->is_new[l];
        c.sparse[l] = g->from.sparse[from];
        if (c.arch == DOTS1 && l > 0 && c.sparse[l - 1] && !c.sparse[l])
            die(2, "--depth stack: the dense layers of a Dots1 come before all others; --depth interpose fits");
    }
    for (int i = 0; i < p->num_sources; i++) source_grow(p->sources[i], g, &c);
}

// SRC's configuration as it is stored
static const Config* source_config(const Plan* p) { return p->growth ? &p->growth->from : &p->sources[0]->config; }

// What growth leaves as it was, for the receipt. Methods with --noise-std fill zeroed matrices, too.
static void growth_words(const Plan* p, char* text, size_t size) {
    const Growth* g = p->growth;
    size_t n = 0;
    text[0] = 0;
    if (g && g->num_new && !lists(p->method->options, "noise-std"))
        n = (size_t)snprintf(text, size, "; the new layers add 0, as their o_proj and down_proj are 0");
    if (g && g->times > 1)
        snprintf(text + n, size - n, "; each unit stands %d times, with down divided by %d", g->times, g->times);
}

static void print_growth(const Growth* g, int layers) {
    if (!g) return;
    printf("growth  layers");
    for (int l = 0; l < layers; l++) printf(" %d%s", g->source[l], g->is_new[l] ? "+" : "");
    if (g->num_new) printf(" (+ new, --new-layers %s)", ask.new_layers);
    printf(", width %d -> %d\n", g->width[0], g->width[1]);
}

static void growth_to_json(Text* t, const Growth* g, int layers) {
    if (!g) return;
    text_print(t, "  \"growth\": {\"layers\": [");
    for (int l = 0; l < layers; l++) text_print(t, "%s%d", l ? ", " : "", g->source[l]);
    text_print(t, "], \"new\": [");
    for (int l = 0; l < layers; l++) text_print(t, "%s%d", l ? ", " : "", g->is_new[l]);
    text_print(t, "], \"depth\": \"%s\", \"new_layers\": \"%s\", \"width\": [%d, %d]},\n",
               ask.depth, g->zero ? "zero" : "copy", g->width[0], g->width[1]);
}
