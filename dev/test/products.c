/*
products.c: the matrix products' bits do not depend on how many rows or experts a call has, nor on the number of
threads. That they are the plain loop's stands in test_moe.c.
*/
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
        threads = random_floats(n, 5);
        product_run(&g, kind, 1, 1, threads);
        check(sharing && same_floats(all, threads, n), "%s: with a second team asleep", names[kind]);
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
        double term = kind == FORWARD          ? (double)p->x[(long)row * C + k] * W[(long)column * C + k]
                      : kind == BACKWARD_INPUT ? (double)p->dy[(long)row * OC + k] * W[(long)k * C + column]
                                               : (double)dy[(long)k * OC + row] * x[(long)k * C + column];
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}
