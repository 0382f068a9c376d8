/*
Lesson 2. An expert is copied, router row and all. Which experts does a token get then, and do the copies ever part?

Twins tie: z_e = z_e' for every token. So the K best of 2E are copies of the K/2 best of E:

    top-2 of 4   { A B C D }                     a token gets A and C
    top-2 of 8   { A B C D A' B' C' D' }         it gets A and A', which say the same: half of the experts are lost

Twins that are chosen together with equal gates get equal gradients, dW = sum over tokens of gate dL/dy ..., and stay
twins. Three ways out: the K best of twice as many with 2K (exact, twice the cost, and no parting), families (a penalty
on all copies but one, infinite at first: exact, and twins see different tokens), or noise that reaches the logits.
Noise on a bias that only selects (sigmoid's) reaches neither gate nor gradient: twins stay equal until the best scores
of some token come closer than the noise.
*/
#include "lesson.h"

enum { SOURCES = 4, H = 16, I = 16, N = 256, STEPS = 100 };

typedef struct {
    const char* name;
    Router kind;
    int E, K, of[8];            // of: the expert of the source that each is a copy of
    int family;
    double router_noise, bias_noise;
    int raw;                    // 1: gates as they are
} Growth;
#define DOUBLED {0, 1, 2, 3, 0, 1, 2, 3}
static const Growth growths[] = {
    {"the source: 4 experts, K = 2", ROUTER_SOFTMAX, 4, 2, {0, 1, 2, 3}, 0, 0, 0, 0},
    {"copies, K = 2", ROUTER_SOFTMAX, 8, 2, DOUBLED, 0, 0, 0, 0},
    {"copies, K = 4", ROUTER_SOFTMAX, 8, 4, DOUBLED, 0, 0, 0, 0},
    {"3, 2, 2 and 1 copies, K = 2", ROUTER_SOFTMAX, 8, 2, {0, 1, 2, 3, 0, 0, 1, 2}, 0, 0, 0, 0},
    {"copies, router rows + noise, K = 2", ROUTER_SOFTMAX, 8, 2, DOUBLED, 0, 0.01, 0, 0},
    {"families, K = 2", ROUTER_SOFTMAX, 8, 2, DOUBLED, 1, 0, 0, 0},
    {"gates as they are: the source, K = 1", ROUTER_SOFTMAX, 4, 1, {0, 1, 2, 3}, 0, 0, 0, 1},
    {"gates as they are: copies, K = 1", ROUTER_SOFTMAX, 8, 1, DOUBLED, 0, 0, 0, 1},
    {"sigmoid: the source", ROUTER_SIGMOID, 4, 2, {0, 1, 2, 3}, 0, 0, 0, 0},
    {"sigmoid: copies, bias + noise, K = 2", ROUTER_SIGMOID, 8, 2, DOUBLED, 0, 0, 0.001, 0},
};
enum { GROWTHS = sizeof growths / sizeof *growths };

static Model* grow(const Growth* g, const Model* source) {
    Config c = layer_config(g->E, g->K, H, I, N);
    c.router.kind = g->kind;
    c.norm_topk_prob = !g->raw;
    c.router.family_penalty = g->family ? INFINITY : 0;
    Model* m = layer_create(&c, 0, 0);
    const LayerWeights *from = &source->weights.layers[0], *to = &m->weights.layers[0];
    for (int e = 0; e < g->E; e++) {
        int s = m->family[e] = g->of[e];
        memcpy(to->gate_up + e * 2 * I * H, from->gate_up + s * 2 * I * H, sizeof(float) * 2 * I * H);
        memcpy(to->down + e * H * I, from->down + s * H * I, sizeof(float) * H * I);
        fill_normal(to->router + e * H, H, e < SOURCES ? 0 : g->router_noise, "noise", (uint64_t)e);
        for (int i = 0; i < H; i++) to->router[e * H + i] += from->router[s * H + i];
        if (to->router_bias && e >= SOURCES) fill_normal(to->router_bias + e, 1, g->bias_noise, "bias", (uint64_t)e);
    }
    return m;
}

// The largest relative difference between the expert matrices of an expert below SOURCES and its first copy.
static double parted(const Growth* g, const LayerWeights* w) {
    double most = 0;
    for (int a = 0; a < SOURCES && g->E > SOURCES; a++) {
        int b = SOURCES;
        while (b < g->E && g->of[b] != a) b++;
        if (b < g->E) most = fmax(most, distance(w->gate_up + b * 2 * I * H, w->gate_up + a * 2 * I * H, 2 * I * H));
    }
    return most;
}

int main(void) {
    static float x[N * H], target[N * H], out[N * H], before[N * H];
    static char picture[GROWTHS][128];
    Config c = layer_config(SOURCES, 2, H, I, N);
    Model *source = layer_create(&c, 1, 0.3), *teacher = layer_create(&c, 2, 0.3);
    AdamW adamw = {0.9, 0.95, 1e-8, 0, 0};
    fill_normal(x, N * H, 1, "x", 0);
    layer_forward(teacher, target, x);
    printf("%-38s %9s %9s %9s %10s %9s %8s\n%-38s %9s %9s %9s %10s %9s %8s\n", "", "output", "sources", "twins",
           "gradients", "apart in", "experts", "", "changed", "a token", "together", "differ by", "100 steps",
           "unused");
    for (int i = 0; i < GROWTHS; i++) {
        const Growth* g = &growths[i];
        Model* m = grow(g, source);
        LayerActivations* s = &m->layers[0];
        long distinct = 0, unused = 0, together = 0;
        layer_forward(m, out, x);
        if (g->E == SOURCES) memcpy(before, out, sizeof out);
        for (int n = 0; n < N; n++) {
            int seen = 0, found = 0;
            for (int k = 0; k < g->K; k++) seen |= 1 << g->of[s->experts[n * g->K + k]];
            for (int e = 0; e < SOURCES; e++) found += seen >> e & 1;
            distinct += found;
            together += found < g->K;
            char* p = picture[i] + strlen(picture[i]);
            if (n > 0 && n < 10) p += sprintf(p, "%*s", 6 - g->K, "");
            for (int k = 0; k < g->K && n < 10; k++) p += sprintf(p, "%c", 'A' + g->of[s->experts[n * g->K + k]]);
        }
        for (int e = 0; e < g->E; e++) unused += s->offsets[e] == s->offsets[e + 1];
        layer_backward(m, out, target);
        printf("%-38s %9.3f %9.2f %8.1f%% %10.2f", g->name, fabs(distance(out, before, N * H)), (double)distinct / N,
               100.0 * (double)together / N, parted(g, &m->dweights.layers[0]));
        for (int step = 1; step <= STEPS; step++) {
            model_update(m, &adamw, 0.003, step);
            if (g->family) m->config.router.family_penalty = family_penalty_at(1, step, STEPS / 2);
            layer_forward(m, out, x);
            layer_backward(m, out, target);
        }
        printf(" %9.2f %8ld\n", parted(g, &m->weights.layers[0]), unused);
        model_free(m);
    }
    printf("\nThe experts of ten tokens, best first; the letter is the expert of the source that each comes from\n\n");
    for (int i = 0; i < GROWTHS; i++) printf("%-38s %s\n", growths[i].name, picture[i]);
    return 0;
}
