/*
Lesson 1. What does the loss tell the router, and why nothing when K = 1 and gates are divided by their sum?

y = sum over S of g_e f_e(x), S a token's K experts. With q_e = <dL/dy, f_e(x)>, how much the loss rises with gate e:

    gates divided by their sum    dL/dz_e = g_e (q_e - sum over S of g_j q_j)                  e in S, else 0
    softmax p as it is            dL/dz_e = p_e (q_e [e in S] - sum over S of p_j q_j)         all e
    sigmoid s, divided            dL/ds_e = (q_e - sum over S of g_j q_j) / sum over S of s    e in S, ds = s (1 - s) dz

The first is 0 if S has one expert (its gate is 1 whatever z is), and if all experts say the same (q_e is their mean).
Beside it, L is measured at z_e + h and z_e - h: (L(z + h) - L(z - h)) / 2h.
*/
#include "lesson.h"

enum { E = 6, H = 8, I = 16 };

typedef struct {
    const char* name;
    int sigmoid, K, norm_topk, equal_experts;
} Case;
static const Case cases[] = {
    {"softmax, divided by their sum, K = 2", 0, 2, 1, 0}, {"softmax, as they are, K = 2", 0, 2, 0, 0},
    {"sigmoid, divided by their sum, K = 2", 1, 2, 1, 0}, {"softmax, divided by their sum, K = 1", 0, 1, 1, 0},
    {"softmax, as they are, K = 1", 0, 1, 0, 0},          {"sigmoid, as they are, K = 1", 1, 1, 0, 0},
    {"softmax, divided, K = 2, equal experts", 0, 2, 1, 1}, {"softmax, as they are, K = 2, equal experts", 0, 2, 0, 1},
};
enum { CASES = sizeof cases / sizeof *cases };

// The token's expert outputs f (E, H), from train_moe.c's products: x to all experts, one row each.
static void expert_outputs(float* f, int equal) {
    float x[E * H], gate_up[E * 2 * I], act[E * I], *w = floats(E * 2 * I * H), *down = floats(E * H * I);
    int offsets[E + 1];
    for (int e = 0; e < E; e++) {
        fill_normal(x + e * H, H, 1, "x", 0);
        fill_normal(w + e * 2 * I * H, 2 * I * H, 1 / sqrt(H), "gate_up", equal ? 0 : (uint64_t)e);
        fill_normal(down + e * H * I, H * I, 1 / sqrt(I), "down", equal ? 0 : (uint64_t)e);
    }
    for (int e = 0; e <= E; e++) offsets[e] = e;
    grouped_matmul_forward(gate_up, x, w, 2 * I * H, H, 2 * I, E, offsets);
    swiglu_forward(act, gate_up, E, I);
    grouped_matmul_forward(f, act, down, H * I, I, H, E, offsets);
    free(w);
    free(down);
}

// What a router makes of logits z (E): experts and gates (K), and the loss <r, y>.
typedef struct {
    float probs[E], lse, gates[E];
    int experts[E];
} Routed;

static double loss(Routed* t, const Case* c, const float* z, const float* f, const float* r) {
    float y[H], no_bias[E] = {0};
    if (c->sigmoid)
        sigmoid_router_forward(t->probs, &t->lse, t->experts, t->gates, z, no_bias, NULL, 1, E, c->K, c->norm_topk, 1);
    else softmax_router_forward(t->probs, &t->lse, t->experts, t->gates, z, 1, E, c->K, c->norm_topk);
    combine_rows(y, NULL, f, t->gates, t->experts, 1, c->K, H);         // expert e's row is row e
    return dot_of(r, y, H);
}

int main(void) {
    const float z[E] = {0.2f, 1.1f, -0.7f, 0.6f, -0.1f, 1.9f}, h = 0.01f;
    float f[E * H], r[H], dz[CASES][E];
    fill_normal(r, H, 1, "r", 0);                                       // dL/dy
    printf("dL/dz_e of one token, by the formula and by differences; its logits are\n%44s", "");
    for (int e = 0; e < E; e++) printf("%8.1f", z[e]);
    printf("\n\n%-44s", "gates");
    for (int e = 0; e < E; e++) printf("     z_%d", e);
    printf("\n");
    for (int i = 0; i < CASES; i++) {
        const Case* c = &cases[i];
        Routed t, ignored;
        float dgates[E];
        double zeros[E] = {0}, worst = 0, differences[E];
        expert_outputs(f, c->equal_experts);
        loss(&t, c, z, f, r);
        for (int k = 0; k < c->K; k++) dgates[k] = (float)dot_of(r, f + t.experts[k] * H, H);   // q
        if (c->sigmoid)
            sigmoid_router_backward(dz[i], dgates, z, t.probs, &t.lse, t.experts, t.gates, zeros, 0, 0, 1, E, c->K,
                                    c->norm_topk, 1);
        else softmax_router_backward(dz[i], dgates, t.probs, t.experts, t.gates, 1, E, c->K, c->norm_topk);
        for (int e = 0; e < E; e++) {
            float up[E], down[E];
            memcpy(up, z, sizeof up);
            memcpy(down, z, sizeof down);
            up[e] += h;
            down[e] -= h;
            differences[e] = (loss(&ignored, c, up, f, r) - loss(&ignored, c, down, f, r)) / (2.0 * h);
            worst = fmax(worst, fabs(differences[e] - dz[i][e]));
        }
        printf("%-44s", c->name);
        for (int e = 0; e < E; e++) printf("%8.3f", tidy(dz[i][e], 3));
        printf("\n%-44s", worst < 1e-3 ? "    differences, which agree to 0.001" : "    differences, which DISAGREE");
        for (int e = 0; e < E; e++) printf("%8.3f", tidy(differences[e], 3));
        printf("\n");
    }
    printf("\nWhere it pushes (left: the logit falls, right: it rises); experts 5 and 1 are the best two\n");
    for (int i = 0; i < CASES; i++) {
        if (i == 2 || i == 5) continue;
        printf("\n%s\n", cases[i].name);
        for (int e = 0; e < E; e++)
            printf("  z_%d %24s|%s\n", e, bar(40 * dz[i][e], 24, '<'), bar(-40 * dz[i][e], 24, '>'));
    }
    return 0;
}
