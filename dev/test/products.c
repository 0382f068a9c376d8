/*
products.c: the matrix products' bits do not depend on how many rows or experts a call has, nor on the number of
threads. That they are the plain loop's stands in test_moe.c.
*/
// How products are computed: in fp32; in bf16 by fp32 arithmetic; by VDPBF16PS and by AMX, or their models, where the
// build has them.
#define WAYS (2 + PAIRS_TILE + (AMX_TILES && tiles_permitted()))
static const char* way_names[] = {"fp32", "bf16", PAIRS_TILE ? "bf16 by pairs" : "bf16 by AMX", "bf16 by AMX"};
static void use_way(int way) {
    bf16_products = way > 0;
    bf16_packing = way < 2 ? PACK_ROUNDED : PAIRS_TILE && way == 2 ? PACK_PAIRS : PACK_TILES;
}
static float operand(float x) { return bf16_products ? bf16_operand(x) : x; }

typedef struct {
    int E, C, OC, rows, *offsets; // `rows` of all experts together
    float *x, *W, *dy; // (rows, C), (E, OC, C), (rows, OC)
} Product;

static Product product_create(int E, const int* rows, int C, int OC) {
    Product p = {E, C, OC, 0, kept_ints(E + 1), NULL, NULL, NULL};
    p.offsets[0] = 0;
    for (int e = 0; e < E; e++) p.offsets[e + 1] = p.offsets[e] + rows[e];
    p.rows = p.offsets[E];
    p.x = random_floats((long)p.rows * C, 1);
    p.W = random_floats((long)E * OC * C, 2);
    p.dy = random_floats((long)p.rows * OC, 3);
    return p;
}

static long product_size(const Product* p, int kind) {
    return kind == FORWARD          ? (long)p->rows * p->OC
           : kind == BACKWARD_INPUT ? (long)p->rows * p->C
                                    : (long)p->E * p->OC * p->C;
}

// grouped = 0 calls the product for one weight matrix (E = 1)
static void product_run(const Product* p, int kind, int grouped, int add, float* out) {
    int C = p->C, OC = p->OC, E = p->E;
    long stride = (long)OC * C;
    if (kind == FORWARD && grouped)
        grouped_matmul_forward(out, p->x, p->W, stride, C, OC, E, p->offsets);
    else if (kind == FORWARD)
        matmul_forward(out, p->x, p->W, p->rows, C, OC);
    else if (kind == BACKWARD_INPUT && grouped)
        grouped_matmul_backward_input(out, p->dy, p->W, stride, C, OC, E, p->offsets, add);
    else if (kind == BACKWARD_INPUT)
        matmul_backward_input(out, p->dy, p->W, p->rows, C, OC, add);
    else if (grouped)
        grouped_matmul_backward_weight(out, p->dy, p->x, stride, C, OC, E, p->offsets);
    else
        matmul_backward_weight(out, p->dy, p->x, p->rows, C, OC);
}

static void test_matmul_bits(void) {
    static const int rows[] = {61}, shares[] = {9, 0, 23, 1, 30};
    int E = 5, C = 205, OC = 77;
    Product p = product_create(1, rows, C, OC), g = product_create(E, shares, C, OC);
    float *y = random_floats(61L * OC, 0), *one = random_floats(61L * OC, 0);
    memcpy(p.W + 50L * C, p.W + 3L * C, floats_bytes(C)); // twins
    memcpy(p.W + 76L * C, p.W + 3L * C, floats_bytes(C));
    matmul_forward(y, p.x, p.W, 61, C, OC);
    int same = 1;
    for (int r = 0; r < 61; r++) same &= y[r * OC + 3] == y[r * OC + 50] && y[r * OC + 3] == y[r * OC + 76];
    check(same, "equal rows of weights give equal bits, wherever they stand");
    for (int count = 1; count < 20; count++) {
        same = 1;
        for (int r = 0; r + count <= 61; r += count) {
            matmul_forward(one, p.x + (long)r * C, p.W, count, C, OC);
            same &= same_floats(one, y + (long)r * OC, count * OC);
        }
        if (count <= 3 || count == 8 || count == 9 || count == 19 || !same)
            check(same, "%d rows alone have the bits of 61 rows", count);
    }
    for (int kind = 0; kind < 3; kind++) {
        static const char* names[] = {"forward", "backward input", "backward weight"};
        long n = product_size(&g, kind);
        float *all = random_floats(n, 5), *single = random_floats(n, 5), *threads = NULL;
        product_run(&g, kind, 1, 1, all);
        for (int e = 0; e < E; e++) {
            int m = shares[e];
            float *x = g.x + (long)g.offsets[e] * C, *dy = g.dy + (long)g.offsets[e] * OC, *W = g.W + (long)e * OC * C;
            if (kind == FORWARD) matmul_forward(single + (long)g.offsets[e] * OC, x, W, m, C, OC);
            if (kind == BACKWARD_INPUT) matmul_backward_input(single + (long)g.offsets[e] * C, dy, W, m, C, OC, 1);
            if (kind == BACKWARD_WEIGHT) matmul_backward_weight(single + (long)e * OC * C, dy, x, m, C, OC);
        }
        check(same_floats(all, single, n), "%s: grouped has the bits of one call for each expert",
              names[kind]);
        same = 1;
        static const int counts[] = {1, 2, 3, 8};
        for (int i = 0; i < 4; i++) {
            set_threads(counts[i]);
            threads = random_floats(n, 5);
            product_run(&g, kind, 1, 1, threads);
            same &= same_floats(all, threads, n);
        }
        check(same, "%s: 1, 2, 3 and 8 threads have equal bits", names[kind]);
        threads = random_floats(n, 5);
        #pragma omp parallel
        #pragma omp single
        product_run(&g, kind, 1, 1, threads); // a parallel region within another one gets a single thread
        check(same_floats(all, threads, n), "%s: one thread where 8 were expected", names[kind]);
#if defined(_OPENMP) && !defined(__clang__)
        share_cores(1);
        int begun = sharing; // a product may end the team: it looks, now and then, whether others want the cores
        threads = random_floats(n, 5);
        product_run(&g, kind, 1, 1, threads);
        check(begun && same_floats(all, threads, n), "%s: with a second team asleep", names[kind]);
        share_cores(0);
        check(!sharing, "%s: the second team ends", names[kind]);
#endif
        set_threads(default_threads);
    }
}

// Element i of the result that `start` becomes, in double, and the sum of the magnitudes that went into it.
static double product_element(const Product* p, int kind, long i, float start, double* magnitude) {
    int C = p->C, OC = p->OC, e = 0, columns = kind == FORWARD ? OC : C, column = (int)(i % columns);
    int row = kind == BACKWARD_WEIGHT ? (int)(i / C % OC) : (int)(i / columns);
    if (kind == BACKWARD_WEIGHT) e = (int)(i / ((long)OC * C));
    else
        while (e < p->E - 1 && row >= p->offsets[e + 1]) e++;
    const float *W = p->W + (long)e * OC * C, *dy = p->dy + (long)p->offsets[e] * OC;
    const float* x = p->x + (long)p->offsets[e] * C;
    int depth = kind == FORWARD ? C : kind == BACKWARD_INPUT ? OC : p->offsets[e + 1] - p->offsets[e];
    double sum = start;
    *magnitude = fabs((double)start);
    for (int k = 0; k < depth; k++) {
        float a = kind == FORWARD          ? p->x[(long)row * C + k]
                  : kind == BACKWARD_INPUT ? p->dy[(long)row * OC + k]
                                           : dy[(long)k * OC + row];
        float b = kind == FORWARD          ? W[(long)column * C + k]
                  : kind == BACKWARD_INPUT ? W[(long)k * C + column]
                                           : x[(long)k * C + column];
        double term = (double)operand(a) * operand(b);
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}

// bf16's rounding, its order of sums by hand, and what is below 2^-126: the plain loops and the fast ones agree, no
// result lies there, and a thread computes with such numbers again afterwards.
static void test_bf16_products(void) {
    static const float rounds[][2] = {{1.00390625f, 1}, {1.01171875f, 1.015625f}, {-1.00390631f, -1.0078125f},
                                      {3.4e38f, INFINITY}, {0x1.FFFFFCp-127f, 0}, {-0x1.01p-126f, -0x1p-126f},
                                      {-0.0f, -0.0f}};
    int ok = 1;
    for (EACH(i, rounds)) {
        float x = bf16_operand(rounds[i][0]);
        ok &= same_floats(&x, &rounds[i][1], 1);
    }
    union { uint32_t bits; float value; } nan;
    for (nan.bits = 0x7F800001; nan.bits < 0x80000000u; nan.bits += 1021) ok &= isnan(bf16_operand(nan.value)) != 0;
    check(ok, "rounding to bf16: ties to even, to infinity; below 2^-126 to zero, not up; NaN stays NaN");
    ok = 1; // 2^24 swallows a 1 that comes after it
    static const int rows = 37;
    static const float ones[4] = {1, 1, 1, 1};
    static const float terms[][6] = { // and their sum, then that by AMX
        {1, 0x1p24f, -0x1p24f, 1, 0, 1}, {0x1p24f, 1, 1, -0x1p24f, 1, 1}, {0x1p24f, 1, -0x1p24f, 1, 0, 2}};
    for (int way = 1; way < WAYS; way++) {
        use_way(way);
        for (int plain = 0; plain < 2; plain++)
            for (EACH(i, terms)) {
                float sum = 0;
                plain_products = plain;
                matmul_forward(&sum, terms[i], ones, 1, 4, 1);
                ok &= sum == terms[i][bf16_packing == PACK_TILES ? 5 : 4];
            }
        plain_products = PLAIN;
        Product p = product_create(1, &rows, 35, 33);
        float* operands[] = {p.x, p.W, p.dy};
        long counts[] = {37 * 35, 33 * 35, 37 * 33}, zeros = 0, denormals = 0;
        for (int i = 0; i < 3; i++)
            for (long k = 0; k < counts[i]; k++)
                operands[i][k] *= ldexpf(1, k % 7 ? -60 - (int)(mix64((uint64_t)k) % 12) : -124 - (int)(k % 5));
        int same = 1, beyond = 1;
        for (int kind = 0; kind < 3; kind++) {
            long n = product_size(&p, kind);
            float *out = kept_floats(n), *plain = kept_floats(n);
            for (long i = 0; i < n; i++) out[i] = plain[i] = i % 3 ? 0x1p-127f : -0x1.8p-126f;
            product_run(&p, kind, 0, 1, out);
            plain_products = 1;
            product_run(&p, kind, 0, 1, plain);
            plain_products = PLAIN;
            same &= same_floats(out, plain, n);
            for (long i = 0; i < n; i++) zeros += out[i] == 0, denormals += out[i] != 0 && fabsf(out[i]) < 0x1p-126f;
        }
        for (int along = 0; along < 2; along++) { // k along rows of left, or across; first of infinities alone
            float *out = kept_floats(35 * 32), *plain = kept_floats(35 * 32);
            for (int finite = 0; finite < 2; finite++) {
                int depth = finite ? 33 : along ? 35 : 37;
                for (int i = 0; i < 37 * 35; i++)
                    p.x[i] = finite && (along ? i % 35 : i / 35) < 33 ? (float)(1 + i % 5) : INFINITY;
                for (int i = 0; i < 33 * 35; i++) p.W[i] = finite && i % 35 < 33 ? (float)(1 + i % 3) : INFINITY;
                multiply_block(out, 32, p.x, along ? 35 : 1, along ? 1 : 35, p.W, 1, 35, 35, 32, depth, 0);
            }
            plain_products = 1;
            multiply_block(plain, 32, p.x, along ? 35 : 1, along ? 1 : 35, p.W, 1, 35, 35, 32, 33, 0);
            plain_products = PLAIN;
            beyond &= same_floats(out, plain, 35 * 32) && isfinite(out[0]);
        }
        check(beyond, "%s: what lies beyond the depth does not count", way_names[way]);
        check(ok, "%s: the odd member of a pair is added first, then the even one; by AMX apart", way_names[way]);
        check(way < 2 || packing_holds(bf16_packing), "%s: what is checked at the start holds", way_names[way]);
        check(same && (!FLUSH_DENORMALS || (denormals == 0 && zeros > 0)) && arithmetic_holds(),
              "%s: sums around 2^-126: the plain loops' bits, %ld zeros, %ld denormals, and none elsewhere changed",
              way_names[way], zeros, denormals);
    }
    use_way(0);
}

// AMX's order of sums, written out: in each block of 32 the even k and the odd k, from zero. It is not VDPBF16PS's.
static void test_amx_order(void) {
    enum { ROWS = 5, DEPTH = 77, COLUMNS = 33, SIZE = ROWS * COLUMNS };
    float *x = random_floats(ROWS * DEPTH, 1), *W = random_floats(COLUMNS * DEPTH, 2);
    float *out[2] = {kept_floats(SIZE), kept_floats(SIZE)}, *right = kept_floats(SIZE);
    for (int i = 0; i < SIZE; i++) {
        right[i] = 0;
        for (int first = 0; first < DEPTH; first += 32) {
            float sums[2];
            for (int odd = 0; odd < 2; odd++) {
                sums[odd] = 0;
                for (int k = first + odd; k < imin(first + 32, DEPTH); k += 2)
                    sums[odd] = MULTIPLY_ADD(sums[odd], bf16_operand(x[i / COLUMNS * DEPTH + k]),
                                             bf16_operand(W[i % COLUMNS * DEPTH + k]));
            }
            right[i] += sums[0] + sums[1];
        }
    }
    for (int amx = 0; amx < 2; amx++) {
        bf16_products = plain_products = 1;
        bf16_packing = amx ? PACK_TILES : PACK_PAIRS;
        matmul_forward(out[amx], x, W, ROWS, DEPTH, COLUMNS);
    }
    plain_products = PLAIN;
    use_way(0);
    check(same_floats(out[1], right, SIZE), "bf16 in AMX's order by the plain loops: blocks of 32, even and odd apart");
    check(!same_floats(out[0], right, SIZE), "VDPBF16PS's order is another one");
}

// One product of a model against the fp32 product of the same operands, rounded to bf16: as near as fp32 is, and not as
// near to that of the operands as they are. (result, left, right) as in fast_product; result starts from base, or NULL.
static void check_place(const char* what, int kind, const float* result, const float* base, const float* left,
                        const float* right, int C, int OC, int E, const int* offsets) {
    long sizes[] = {(long)offsets[E] * OC, (long)offsets[E] * C, (long)E * OC * C}, n = sizes[kind];
    double errors[2];
    for (int round = 0; round < 2; round++) {
        long num_left = sizes[kind == FORWARD], num_right = sizes[kind == BACKWARD_WEIGHT ? 1 : 2];
        float *l = copy_floats(left, num_left), *r = copy_floats(right, num_right);
        float* out = base ? copy_floats(base, n) : (float*)memset(kept_floats(n), 0, floats_bytes(n));
        for (long i = 0; i < num_left && round; i++) l[i] = bf16_operand(l[i]);
        for (long i = 0; i < num_right && round; i++) r[i] = bf16_operand(r[i]);
        if (kind == FORWARD) IN_FP32(grouped_matmul_forward(out, l, r, (long)OC * C, C, OC, E, offsets));
        else if (kind == BACKWARD_INPUT)
            IN_FP32(grouped_matmul_backward_input(out, l, r, (long)OC * C, C, OC, E, offsets, 1));
        else IN_FP32(grouped_matmul_backward_weight(out, l, r, (long)OC * C, C, OC, E, offsets));
        for (long i = 0; i < n && kind == FORWARD && base; i++) out[i] += base[i];
        errors[round] = relative_error(out, result, n);
    }
    check(errors[1] < 3e-6 && errors[0] > 1e-4, "in bf16: %s, off by %.1e, from what is not rounded by %.1e", what,
          errors[1], errors[0]);
}

// Of attention: with one head and thread the blocks of scores are in scratch afterwards.
static void test_bf16_attention(void) {
    enum { T = 29, HD = 18, LAST = T - 1 };     // the last query sees all keys
    float *q = random_floats(T * HD, 1), *k = random_floats(T * HD, 2), *v = random_floats(T * HD, 3);
    float *dout = random_floats(T * HD, 4), *out = kept_floats(T * HD), *sums = kept_floats(T * HD);
    float *dq = kept_floats(T * HD), *dk = kept_floats(T * HD), *dv = kept_floats(T * HD);
    float *p = kept_floats(T * T), *ds = kept_floats(T * T), scores[T], dp[T], lse[T];
    float *scratch = kept_floats(attention_scratch_size(T)), *last = p + LAST * T;
    int all[] = {0, T}, one[] = {0, 1};
    double scale = 1 / sqrt((double)HD), total = 0, D = 0;
    set_threads(1);
    use_way(WAYS - 1);
    attention_forward(out, lse, q, HD, k, HD, v, HD, 1, T, T, 1, 1, HD, scratch);
    copy_rows(p, T, scratch, score_stride(T), T, T);            // exp(scale (score - max)), which were not yet divided
    for (int i = 0; i < T; i++, total = 0) {
        for (int j = 0; j < T; j++) total += p[i * T + j];
        for (int d = 0; d < HD; d++) sums[i * HD + d] = (float)(out[i * HD + d] * total);
        for (int j = 0; j < T && i == LAST; j++) scores[j] = (float)((log(last[j] / total) + lse[LAST]) / scale);
    }
    check_place("attention: q k^T", FORWARD, scores, NULL, q + LAST * HD, k, HD, T, 1, one);
    check_place("attention: p v", BACKWARD_INPUT, sums, NULL, p, v, HD, T, 1, all);
    attention_backward(dq, dk, dv, dout, out, lse, q, HD, k, HD, v, HD, HD, HD, 1, T, 1, 1, HD, scratch);
    copy_rows(p, T, scratch, score_stride(T), T, T);            // exp(scale score - lse)
    copy_rows(ds, T, scratch + QUERY_BLOCK * score_stride(T), score_stride(T), T, T);
    for (int d = 0; d < HD; d++) D += (double)dout[LAST * HD + d] * out[LAST * HD + d];
    for (int j = 0; j < T; j++) {
        scores[j] = (float)((log(last[j]) + lse[LAST]) / scale);
        dp[j] = (float)(ds[LAST * T + j] / (last[j] * scale) + D);
    }
    check_place("attention: q k^T again", FORWARD, scores, NULL, q + LAST * HD, k, HD, T, 1, one);
    check_place("attention: dout v^T", FORWARD, dp, NULL, dout + LAST * HD, v, HD, T, 1, one);
    check_place("attention: ds k", BACKWARD_INPUT, dq, NULL, ds, k, HD, T, 1, all);
    check_place("attention: ds^T q", BACKWARD_WEIGHT, dk, NULL, ds, q, HD, T, 1, all);
    check_place("attention: p^T dout", BACKWARD_WEIGHT, dv, NULL, p, dout, HD, T, 1, all);
    use_way(0);
    set_threads(default_threads);
}

// Of all linear layers, forward and backward, in models of one layer, with an arbitrary gradient of its output.
static void test_bf16_layers(void) {
    enum { B = 2, T = 13, N = B * T };
    use_way(WAYS - 1);
    for (int shared = 0; shared < 2; shared++) {
        Config c = tiny_config(shared ? QWEN2_MOE : QWEN3_MOE, 1, 5, 2);
        Model* m = new_model(&c, FOR_TRAINING, B, T);
        LayerWeights *w = m->weights.layers, *dw = m->dweights.layers;
        LayerActivations* s = m->layers;
        Scratch* t = &m->scratch;
        int tokens[N + 1], H = c.hidden_size, V = c.vocab_size, E = c.num_experts, K = 2, I = c.moe_intermediate_size;
        int Q = c.num_heads * c.head_dim, QKV = qkv_width(&c), S = shared_width(&c, 0), all[] = {0, N}, one[] = {0, 1};
        fill_tokens(tokens, N + 1, V, 3);
        fill_random(m->params, m->layout.total, 5);
        model_forward(m, tokens, tokens + 1, B, T);
        float *dx = random_floats((long)N * H, 6), *dy_rows = kept_floats((long)N * K * H);
        if (shared) {
            float* sum = kept_floats((long)N * H);
            copy_rows(t->dx, H, dx, H, N, H);
            check_place("shared expert, gate and up", FORWARD, s->shared_gate_up, NULL, s->ffn_in, w->shared_gate_up, H,
                        2 * S, 1, all);
            check_place("shared expert, down", FORWARD, t->y_rows, NULL, t->act, w->shared_down, S, H, 1, all);
            ffn_layer_backward(m, 0, 1);
            check_place("shared expert, down: dx", BACKWARD_INPUT, t->dact, NULL, dx, w->shared_down, S, H, 1, all);
            check_place("shared expert, down: dW", BACKWARD_WEIGHT, dw->shared_down, NULL, dx, t->gated_act, S, H, 1,
                        all);
            check_place("shared expert, gate and up: dW", BACKWARD_WEIGHT, dw->shared_gate_up, NULL, s->shared_gate_up,
                        s->ffn_in, H, 2 * S, 1, all);
            combine_rows(sum, NULL, t->dx_rows, NULL, s->row_of, N, K, H);      // what dnormed is the sum of besides
            IN_FP32(matmul_backward_input(sum, t->drouter, w->router, N, H, E, 1));
            IN_FP32(matmul_backward_input(sum, t->dgates, w->shared_gate, N, H, 1, 1));
            check_place("shared expert, gate and up: dx", BACKWARD_INPUT, t->dnormed, sum, s->shared_gate_up,
                        w->shared_gate_up, H, 2 * S, 1, all);
            continue;
        }
        check_place("LM head", FORWARD, m->logits, NULL, m->final_out, m->weights.lm_head, H, V, 1, all);
        check_place("q, k and v", FORWARD, s->qkv, NULL, s->attn_in, w->qkv, H, QKV, 1, all);
        check_place("attention's output", FORWARD, s->x_mid, s->x, s->attn, w->attn_out, Q, H, 1, all);
        check_place("experts, gate and up", FORWARD, s->gate_up, NULL, t->x_rows, w->gate_up, H, 2 * I, E, s->offsets);
        check_place("experts, down", FORWARD, t->y_rows, NULL, t->act, w->down, I, H, E, s->offsets);
        copy_rows(t->dx, H, dx, H, N, H);
        gather_rows(dy_rows, dx, s->assignment, N * K, K, H);
        ffn_layer_backward(m, 0, 1);
        check_place("experts, down: dx", BACKWARD_INPUT, t->dact, NULL, dy_rows, w->down, I, H, E, s->offsets);
        check_place("experts, down: dW", BACKWARD_WEIGHT, dw->down, NULL, dy_rows, t->gated_act, I, H, E, s->offsets);
        check_place("experts, gate and up: dW", BACKWARD_WEIGHT, dw->gate_up, NULL, s->gate_up, t->x_rows, H, 2 * I, E,
                    s->offsets);
        check_place("experts, gate and up: dx", BACKWARD_INPUT, t->dx_rows, NULL, s->gate_up, w->gate_up, H, 2 * I, E,
                    s->offsets);
        copy_rows(t->dx, H, dx, H, N, H);
        attention_layer_backward(m, 0);
        check_place("attention's output: dx", BACKWARD_INPUT, t->dattn, NULL, dx, w->attn_out, Q, H, 1, all);
        check_place("attention's output: dW", BACKWARD_WEIGHT, dw->attn_out, NULL, dx, s->attn, Q, H, 1, all);
        check_place("q, k and v: dx", BACKWARD_INPUT, t->dnormed, NULL, t->dqkv, w->qkv, H, QKV, 1, all);
        check_place("q, k and v: dW", BACKWARD_WEIGHT, dw->qkv, NULL, t->dqkv, s->attn_in, H, QKV, 1, all);
        model_forward(m, tokens, tokens + 1, B, T);
        model_backward(m, 1);
        check_place("LM head: dW", BACKWARD_WEIGHT, m->dweights.lm_head, NULL, m->logits, m->final_out, H, V, 1, all);
        // of one token the norm's gradient tells that of its output: dweight = dout x rstd
        float* dnorm = (float*)memset(m->dweights.final_norm, 0, floats_bytes(H));
        model_forward(m, tokens, tokens + 1, 1, 1);
        model_backward(m, 1);
        for (int i = 0; i < H; i++) dnorm[i] /= m->final_in[i] * m->final_rstd[0];
        check_place("LM head: dx", BACKWARD_INPUT, dnorm, NULL, m->logits, m->weights.lm_head, H, V, 1, one);
    }
    use_way(0);
}

// What stays fp32, of a model with all kinds: each is what that product is, by itself, of the same operands.
static void test_fp32_places(void) {
    enum { B = 2, T = 13, N = B * T };
    Model* m = open_model("dev/reference/golden/qwen2_moe", FOR_TRAINING, B, T);
    const Config* c = &m->config;
    int tokens[N + 1], H = c->hidden_size, V = c->vocab_size, E = c->num_experts, QKV = qkv_width(c), same = 1;
    const LayerWeights *w = m->weights.layers, *dw = m->dweights.layers;
    const LayerActivations* s = m->layers;
    fill_tokens(tokens, N + 1, V, 3);
    use_way(WAYS - 1);
    model_forward(m, tokens, tokens + 1, B, T);
    float *gates = copy_floats(s->shared_gates, N), *out = kept_floats((long)N * QKV);
    matmul_forward(out, s->attn_in, w->qkv, N, H, QKV);
    for (int i = 0; i < N * QKV; i++) out[i] += w->qkv_bias[i % QKV];
    check(same_floats(out, s->qkv, N * QKV), "the bias of q, k and v is fp32");
    use_way(0);
    matmul_forward(out, s->ffn_in, w->router, N, H, E);
    check(same_floats(out, s->router_logits, N * E), "the router's product is fp32");
    matmul_forward(out, s->ffn_in, w->shared_gate, N, H, 1);
    for (int n = 0; n < N; n++) same &= 1.0f / (1.0f + fast_exp(-out[n])) == gates[n];
    check(same, "that of the shared expert's gate is");
    use_way(WAYS - 1);
    model_backward(m, 1);
    use_way(0);     // the first layer's gradients are the last: scratch still holds them
    const float* from[] = {m->scratch.drouter, m->scratch.dgates, m->scratch.dqkv};
    const float* to[] = {dw->router, dw->shared_gate, dw->qkv_bias};
    for (int i = 0; i < 3; i++) {
        int rows = i == 0 ? E : i == 1 ? 1 : QKV, columns = i < 2 ? H : 1;
        float* sum = (float*)memset(kept_floats((long)rows * columns), 0, floats_bytes((long)rows * columns));
        matmul_backward_weight(sum, from[i], i < 2 ? s->ffn_in : m->ones, N, columns, rows);
        check(same_floats(sum, to[i], (long)rows * columns), "so is the gradient of %s",
              i == 0 ? "the router" : i == 1 ? "that gate" : "the bias");
    }
}

// Models against fp64: operands are off by up to 2^-9 each, and these models are small and sharp. A token whose experts
// score almost alike may get another one, and is another token from there on.
static const Tolerances of_bf16_products = {0.12, 0.02, 0.015, 0.2, 0.4, 3, 0.1};

static void test_bf16(void) {
    test_bf16_products();
    test_amx_order();
    test_bf16_attention();
    test_bf16_layers();
    test_fp32_places();
    use_way(WAYS - 1);
    for (EACH(i, golden_models))
        test_golden_model("golden", golden_models[i], of_bf16_products);
    for (EACH(i, golden_routers))
        test_golden_model("golden_routers", golden_routers[i], of_bf16_products);
    use_way(0);
}
