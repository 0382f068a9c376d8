/*
Lesson 4. Tokens are sorted by expert on the way in and added up on the way out. What is the gradient of that? And what
becomes of an expert that no token chose?

Row r of the sorted tokens serves token n(r): a matrix G of R rows and N columns with one 1 in each row.

    gather     rows = G x            R = N K rows, one for each token and each of its experts
    combine    y = G^T D rows        D = the gates on the diagonal

The gradient of a matrix is its transpose: <G x, u> = <x, G^T u>. So combining (with gates of 1) is the backward pass of
gathering, gathering that of combining, and no function of its own is needed. Rows of one expert lie together; an expert
without tokens has none: no product, a gradient of exactly 0, and no division by the number of its tokens.
*/
#include "lesson.h"

enum { N = 6, H = 8, I = 8, E = 4, K = 2, R = N * K };

static void print_matrix(int transposed, const int* assignment, const int* offsets, const float* gates) {
    int expert = 0;
    if (!transposed) printf("    gather: rows of  from tokens 0 .. %d\n", N - 1);
    for (int r = 0; r < R && !transposed; r++) {
        while (r >= offsets[expert + 1]) expert++;
        printf("    row %2d, expert %d ", r, expert);
        for (int n = 0; n < N; n++) printf("  %s", assignment[r] / K == n ? "1" : ".");
        printf("\n");
    }
    if (transposed) printf("    combine: from rows 0 .. %d, with gates\n", R - 1);
    for (int n = 0; n < N && transposed; n++) {
        printf("    token %d ", n);
        for (int r = 0; r < R; r++)
            if (assignment[r] / K == n) printf(" %4.2f", gates[assignment[r]]);
            else printf("    .");
        printf("\n");
    }
    printf("\n");
}

// The layer's weights and tokens such that no token is drawn to expert 2.
static Model* layer_without_2(int norm_topk, float* x) {
    Config c = layer_config(E, K, H, I, N);
    c.norm_topk_prob = norm_topk;
    Model* m = layer_create(&c, 0, 0.5);
    float* router = m->weights.layers[0].router;
    fill_normal(x, N * H, 1, "x", 4);
    for (int n = 0; n < N; n++) x[n * H] = 2;
    for (int e = 0; e < E; e++) router[e * H] = e == 2 ? -3 : 0;        // its logit gets -3 times a number above 0
    return m;
}

int main(void) {
    static float x[N * H], out[N * H], target[N * H], u[R * H], rows[R * H], back[N * H];
    Model* m = layer_without_2(1, x);
    LayerActivations* s = &m->layers[0];
    layer_forward(m, out, x);
    printf("%d tokens, %d experts, K = %d; none chose expert 2\n\n", N, E, K);
    print_matrix(0, s->assignment, s->offsets, s->gates);
    print_matrix(1, s->assignment, s->offsets, s->gates);

    fill_normal(u, R * H, 1, "u", 0);
    gather_rows(rows, x, s->assignment, R, K, H);
    combine_rows(back, NULL, u, NULL, s->row_of, N, K, H);
    printf("<gather x, u> = %.3f      <x, combine u> = %.3f\n", dot_of(rows, u, R * H), dot_of(x, back, N * H));
    gather_rows(rows, x, s->assignment, R, K, H);       // with gates: combine's backward is gather, times the gate
    combine_rows(back, NULL, u, s->gates, s->row_of, N, K, H);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < H; i++) rows[r * H + i] *= s->gates[s->assignment[r]];
    printf("with gates    = %.3f      and            = %.3f\n\n", dot_of(rows, u, R * H), dot_of(x, back, N * H));

    fill_normal(target, N * H, 1, "target", 0);
    printf("%-42s expert 0        1        2        3\n", "the size of a gradient");
    for (int norm_topk = 1; norm_topk >= 0; norm_topk--) {
        Model* layer = layer_without_2(norm_topk, x);
        LayerWeights* dw = &layer->dweights.layers[0];
        layer_forward(layer, out, x);
        layer_backward(layer, out, target);
        printf("%-42s", norm_topk ? "its matrices, gates divided by their sum" : "its matrices, gates as they are");
        for (int e = 0; e < E; e++) {
            const float *a = dw->gate_up + e * 2 * I * H, *b = dw->down + e * H * I;
            printf("%9.4f", sqrt(dot_of(a, a, 2 * I * H) + dot_of(b, b, H * I)));
        }
        printf("\n%-42s", "  its row of the router");
        for (int e = 0; e < E; e++) printf("%9.4f", sqrt(dot_of(dw->router + e * H, dw->router + e * H, H)));
        printf("\n");
        model_free(layer);
    }

    // an expert that had tokens for 20 steps and then has none: AdamW goes on without a gradient
    printf("\nA weight of an expert whose tokens stay away after step 20 (gradient 1 before, lr 0.01, decay 0.1)\n\n");
    float w = 1, g = 0, moment = 0, square = 0;
    for (int step = 1; step <= 200; step++) {
        g = step <= 20 ? 1 : 0;
        adamw(&w, &g, &moment, &square, 1, 1, 0.01f, 0.1f, 0.9f, 0.95f, 1e-8f, 1 - powf(0.9f, (float)step),
              1 - powf(0.95f, (float)step));
        if (step == 1 || (step <= 30 && step % 10 == 0) || step % 50 == 0)
            printf("step %3d  %5.3f |%s\n", step, w, bar(60 * w, 60, '#'));
    }
    printf("\nThe old moments push on for some 20 steps, then only the decay is left.\n");
    return 0;
}
