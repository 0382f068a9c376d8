/*
Lesson 6. Why does a token alone have the bits of a token in a batch, and why not everywhere?

Additions of floats do not associate, so a result has the bits of the order in which its sum was made:

    one after the other     (((0 + a_0 b_0) + a_1 b_1) + a_2 b_2) + a_3 b_3
    split in two halves     ((0 + a_0 b_0) + a_1 b_1) + ((0 + a_2 b_2) + a_3 b_3)

Libraries split long sums when there are few rows, to give all cores work: then bits depend on the number of rows. Here
each sum runs over k = 0, 1, 2, ... whatever the batch. Nor may a token's experts depend on the other tokens: with a
capacity, C = factor N K / E tokens for each expert, those who come too late are dropped.
*/
#include "lesson.h"

enum { H = 256, I = 32, E = 8, K = 2, MOST = 64, V = 50, T = 24 };

static float x[MOST * H], W[H * H];

static int differing(const float* a, const float* b, int n) {
    int count = 0;
    for (int i = 0; i < n; i++) count += memcmp(a + i, b + i, sizeof(float)) != 0;
    return count;
}

// The same product as a library might make it: the fewer the rows, the more parts a sum has.
static void splitting_product(float* y, const float* rows, int N) {
    int parts = imax(1, 16 / N);
    for (int i = 0; i < N * H; i++) {
        y[i] = 0;
        for (int p = 0; p < parts; p++) {
            float sum = 0;
            for (int k = p * H / parts; k < (p + 1) * H / parts; k++) sum += rows[i / H * H + k] * W[i % H * H + k];
            y[i] += sum;
        }
    }
}

// Clears the gates of assignments beyond an expert's capacity, first come, first served, and adds up anew.
static void drop_above_capacity(Model* m, float* out, double factor) {
    LayerActivations* s = &m->layers[0];
    int N = m->length, capacity = imax(1, (int)(factor * N * K / E));
    for (int e = 0; e < E; e++)
        for (int r = s->offsets[e] + capacity; r < s->offsets[e + 1]; r++) s->gates[s->assignment[r]] = 0;
    combine_rows(out, NULL, m->scratch.y_rows, s->gates, s->row_of, N, K, H);
}

int main(void) {
    static const int sizes[] = {1, 4, 16, 64};
    static float alone[MOST * H], y[MOST * H], out[MOST * H], one[H];
    volatile float big = 1e8f, minus = -1e8f, small = 1;        // read when the program runs, so no compiler adds them
    float left = big + small, right = minus + small, in_turn = left + minus;
    printf("100000000 + 1 - 100000000 + 1 in floats: one after the other %g, in two halves %g\n\n", in_turn + small,
           left + right);

    fill_normal(x, MOST * H, 1, "x", 0);
    fill_normal(W, H * H, 1, "W", 0);
    printf("Of %d numbers, those that have other bits than for the token alone\n\n%-44s", H, "tokens in the batch");
    for (int i = 0; i < 4; i++) printf("%6d", sizes[i]);
    printf("\n%-44s", "product as in train_moe.c");
    for (int i = 0; i < 4; i++) {
        int last = (sizes[i] - 1) * H;
        matmul_forward(alone, x + last, W, 1, H, H);
        matmul_forward(y, x, W, sizes[i], H, H);
        printf("%6d", differing(y + last, alone, H));
    }
    printf("\n%-44s", "product that splits the sums of few rows");
    splitting_product(alone, x, 1);
    for (int i = 0; i < 4; i++) {
        splitting_product(y, x, sizes[i]);
        printf("%6s", differing(y, alone, H) > H / 10 ? "many" : "0");
    }

    Config c = layer_config(E, K, H, I, MOST);
    Model* m = layer_create(&c, 0, 0.1);
    for (int capped = 0; capped < 3; capped++) {
        static const char* names[] = {"MoE layer as in train_moe.c", "MoE layer with capacity factor 1",
                                      "MoE layer with capacity factor 2"};
        printf("\n%s%-44s", capped ? "" : "\nTokens whose output changes in the batch\n\n", names[capped]);
        for (int i = 0; i < 4; i++) {
            int changed = 0, N = sizes[i];
            m->length = N;
            layer_forward(m, out, x);
            if (capped) drop_above_capacity(m, out, capped);
            memcpy(y, out, sizeof y);
            for (int n = 0; n < N; n++) {
                m->length = 1;
                layer_forward(m, one, x + n * H);
                if (capped) drop_above_capacity(m, one, capped);
                changed += differing(y + n * H, one, H) > 0;
            }
            printf("%6d", changed);
        }
    }

    // a whole model: all tokens at once, and one after the other with a cache of keys and values
    int tokens[T];
    Config whole = layer_config(E, K, 32, I, T);
    whole.vocab_size = V;
    whole.num_heads = 4, whole.num_kv_heads = 2, whole.head_dim = 8;
    Model *full = model_create(&whole, FOR_SCORING, 1, T, T, NULL);
    model_init(full, 1);
    Model* cached = model_create(&whole, FOR_GENERATION, 1, 1, T, full);
    for (int t = 0; t < T; t++) tokens[t] = (int)(mix64((uint64_t)t) % V);
    model_forward(full, tokens, NULL, 1, T);
    int count = 0;
    for (int t = 0; t < T; t++) {
        model_forward(cached, tokens + t, NULL, 1, 1);
        count += differing(cached->logits, full->logits + t * V, V);
    }
    printf("\n\nA model with a cache, one token at a time, against all %d at once: %d of %d logits differ\n", T,
           count, T * V);
    printf("\nHow a sum of 8 is made; the fewer the rows, the more cores are idle, the more a library splits it\n\n"
           "  many rows   0-+-+-+-+-+-+-+-+->\n                a b c d e f g h\n\n"
           "  few rows    0-+-+-+-+->.\n                a b c d   +->\n"
           "              0-+-+-+-+->'\n                e f g h\n");
    return 0;
}
