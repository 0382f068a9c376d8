// operators.h: operators of the released code of arXiv 2604.19835: for experts, and for the router's rows of copies.
#pragma once

// ---------------------------------------------------------------------------------------------------------------------
// Experts, number by number

static double strength(const Plan* p) { return asked("strength") ? ask.strength : p->method->strength; }

// w + alpha std(W) N(0, 1), std of the source's matrix; alpha (--strength): 0.01. (multiply: alpha 0, a copy; with m
// times the experts, K becomes m K, so that a token gets all m copies of its experts.)
static void copy_noise_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    if (row == 0) {
        slice_statistics(&t->from, NULL, 0, &t->mean, &t->std);
        t->std *= strength(p);
    }
    source_rows(p, t, row, rows, out);
    draw_rows(t, row, rows, out, 1, 1);
}

// 0.95 w
static void scaled_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    t->factor = strength(p);
    source_rows(p, t, row, rows, out);
}

// (1 - a) w_e + a w_next, a = 0.5
static void interpolate_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    source_rows(p, t, row, rows, out);
    mix_next(t, row, rows, out, strength(p));
}

// Units in another order, the same in all three matrices, are another way to write the same function.
static void shuffle_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    uint64_t key = stream_key(p, "shuffle", t->layer, t->expert, 0);
    if (row == 0) t->order = NEW(int, t->units);
    for (long u = 0; u < t->units && row == 0; u++) t->order[u] = (int)random_permutation(u, t->units, key);
    ordered_rows(t, row, rows, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// Experts, a whole matrix at a time

// orthogonal: W + amount noise, 0.1 std(W); the orthonormal vectors of that (QR; of the shorter side's kind), at W's
// Frobenius norm.
static void operator_orthogonal(float* W, const float* next, long rows, long cols, double amount, uint64_t key) {
    int rows_are_vectors = rows <= cols;
    long count = rows_are_vectors ? rows : cols, n = rows_are_vectors ? cols : rows;
    double *x = NEW(double, count * n), norm = sqrt(sum_of_squares(W, rows * cols));
    (void)next;
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < cols; c++) {
            double noisy = W[r * cols + c] + amount * random_normal(mix64(key ^ (uint64_t)(r * cols + c)));
            x[rows_are_vectors ? r * n + c : c * n + r] = noisy;
        }
    orthonormalise(x, count, n);
    double scale = norm / sqrt((double)count); // each vector has length 1
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < cols; c++) W[r * cols + c] = (float)(scale * x[rows_are_vectors ? r * n + c : c * n + r]);
    free(x);
}

// svd-perturb: singular values times 1 + 0.1 noise; to each singular vector noise of half that length (0.05; N(0,1) in
// every component would be 0.05 sqrt(m) long and drown the vector), orthonormalised again, the largest first.
static void operator_svd_perturb(float* W, const float* next, long rows, long cols, double amount, uint64_t key) {
    Svd d = svd_of(W, rows, cols);
    (void)next;
    uint64_t noise = mix64(key ^ hash_string("vectors"));
    long m = d.m, n = d.n;
    for (long k = 0; k < n; k++) {
        for (long i = 0; i < m; i++)
            d.us[k * m + i] = (d.s[k] > 0 ? d.us[k * m + i] / d.s[k] : 0) +
                              amount / 2 / sqrt((double)m) * random_normal(mix64(noise ^ (uint64_t)(k * m + i)));
        for (long i = 0; i < n; i++)
            d.v[k * n + i] +=
                amount / 2 / sqrt((double)n) * random_normal(mix64(noise ^ (uint64_t)(n * m + k * n + i)));
    }
    orthonormalise(d.us, n, m);
    orthonormalise(d.v, n, n);
    for (long k = 0; k < n; k++) {
        double s = d.s[k] * (1 + amount * random_normal(mix64(key ^ (uint64_t)k)));
        for (long i = 0; i < m; i++) d.us[k * m + i] *= s;
    }
    svd_product(W, &d, n);
    svd_free(&d);
}

// svd-mix: 30 % of the pairs of singular vectors, drawn at random, are those of the next expert; singular values stay.
static void operator_svd_mix(float* W, const float* next, long rows, long cols, double amount, uint64_t key) {
    Svd d = svd_of(W, rows, cols), o = svd_of(next, rows, cols);
    unsigned char* swapped = draw_units(d.n, amount, key);
    for (long k = 0; k < d.n; k++) {
        if (!swapped[k]) continue;
        for (long i = 0; i < d.m; i++) d.us[k * d.m + i] = o.s[k] > 0 ? o.us[k * d.m + i] / o.s[k] * d.s[k] : 0;
        memcpy(d.v + k * d.n, o.v + k * d.n, sizeof(double) * (size_t)d.n);
    }
    svd_product(W, &d, d.n);
    free(swapped);
    svd_free(&d);
    svd_free(&o);
}

// Sparse codes C (atoms, cols) of W (rows, cols) for unit-length atoms D (atoms, rows): ISTA (Daubechies et al. 2004)
// on
//     1/2 ||W - D^T C||^2 + penalty ||C||_1,    C <- shrink(C + D (W - D^T C) / step, penalty / step)
// with step >= the largest eigenvalue of D D^T, bounded by its largest absolute row sum. The penalty is relative: a
// tenth of the smallest one that would leave all codes at 0.
static void sparse_codes(double* C, const double* D, const float* W, long atoms, long rows, long cols, double penalty) {
    double step = 0, largest = 0;
    double *gram = NEW(double, atoms * atoms), *DW = NEW(double, atoms * cols);
    for (long a = 0; a < atoms; a++) {
        double sum = 0;
        for (long b = 0; b < atoms; b++) sum += fabs(gram[a * atoms + b] = dot(D + a * rows, D + b * rows, rows));
        step = fmax(step, sum);
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < cols; c++) DW[a * cols + c] += D[a * rows + r] * W[r * cols + c];
        for (long c = 0; c < cols; c++) largest = fmax(largest, fabs(DW[a * cols + c]));
    }
    double threshold = penalty * largest / step;
    #pragma omp parallel for
    for (long c = 0; c < cols; c++) { // columns are independent
        double old[64], now[64] = {0};
        for (int iteration = 0; iteration < 50; iteration++) {
            memcpy(old, now, sizeof old);
            for (long a = 0; a < atoms; a++) {
                double z = old[a] + (DW[a * cols + c] - dot(gram + a * atoms, old, atoms)) / step;
                now[a] = z > threshold ? z - threshold : z < -threshold ? z + threshold : 0;
            }
        }
        for (long a = 0; a < atoms; a++) C[a * cols + c] = now[a];
    }
    free(gram);
    free(DW);
}

// sparse-code-mix: both experts are coded with 64 atoms (columns of W, drawn at random, at length 1); for a random half
// of the atoms W takes over the other's codes. What the codes do not explain of W stays, so that nothing swapped is
// nothing changed.
static void operator_sparse_code_mix(float* W, const float* next, long rows, long cols, double amount, uint64_t key) {
    long atoms = lmin(64, lmin(rows, cols));
    double *D = NEW(double, atoms * rows), *codes = NEW(double, 2 * atoms * cols), *other = codes + atoms * cols;
    for (long a = 0; a < atoms; a++) {
        long column = random_permutation(a, cols, key);
        double length = 0;
        for (long r = 0; r < rows; r++) length += (double)W[r * cols + column] * W[r * cols + column];
        for (long r = 0; r < rows; r++) D[a * rows + r] = length > 0 ? W[r * cols + column] / sqrt(length) : 0;
    }
    sparse_codes(codes, D, W, atoms, rows, cols, 0.1);
    sparse_codes(other, D, next, atoms, rows, cols, 0.1);
    unsigned char* swapped = draw_units(atoms, amount, mix64(key ^ hash_string("swap")));
    #pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long a = 0; a < atoms; a++)
            for (long c = 0; swapped[a] && c < cols; c++)
                W[r * cols + c] += (float)(D[a * rows + r] * (other[a * cols + c] - codes[a * cols + c]));
    free(D);
    free(codes);
    free(swapped);
}

// The whole matrix when row = 0 is asked for
typedef void (*Operator)(float* W, const float* next, long rows, long cols, double amount, uint64_t key);
static void operated_rows(Operator operate, double amount, const Plan* p, Target* t, long row, long rows, float* out) {
    if (row == 0) {
        float* next = view_whole(&t->next);
        t->whole = view_whole(&t->from);
        operate(t->whole, next, t->rows, t->cols, amount, t->key);
        free(next);
    }
    whole_rows(p, t, row, rows, out);
}
static void orthogonal_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    if (row == 0) slice_statistics(&t->from, NULL, 0, &t->mean, &t->std);
    operated_rows(operator_orthogonal, strength(p) * t->std, p, t, row, rows, out);
}
static void svd_perturb_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    operated_rows(operator_svd_perturb, strength(p), p, t, row, rows, out);
}
static void svd_mix_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    operated_rows(operator_svd_mix, strength(p), p, t, row, rows, out);
}
static void sparse_code_mix_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    operated_rows(operator_sparse_code_mix, strength(p), p, t, row, rows, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// The router's rows of copies. Where the paper's definition is unclear, the numbers are this project's.

typedef struct RouterRows {
    const Plan* p;
    int layer;
    const View* view;
    float* w; // (E, cols) SRC's rows
    int E, e, copy; // of the row at hand: its source and copy number
    long cols;
    double std; // of the whole router
    float* perturbed; // svd-perturb: the whole router, drawn anew for each copy number
    int perturbed_for;
} RouterRows;

static RouterRows router_rows_open(const Plan* p, int layer, const View* view) {
    double mean;
    RouterRows r = {p, layer, view, view_whole(view), (int)view->rows, 0, 0, view->cols, 0, NULL, -1};
    slice_statistics(view, NULL, 0, &mean, &r.std);
    return r;
}

static void router_rows_close(RouterRows* r) {
    free(r->w);
    free(r->perturbed);
}

static double router_strength(const Plan* p) {
    if (asked("router-delta")) return ask.router_delta;
    return is(p->method->name, "multiply") && asked("strength") ? ask.strength : p->router->strength;
}

// w + 0.01 std(W) N(0, 1)
static void row_noise(float* w, RouterRows* r, double a, uint64_t key) {
    for (long c = 0; c < r->cols; c++) w[c] = (float)(w[c] + a * r->std * random_normal(mix64(key ^ (uint64_t)c)));
}

// (1 - a) w_e + a w_next, a = 0.5
static void row_interpolate(float* w, RouterRows* r, double a, uint64_t key) {
    const float* next = r->w + (long)((r->e + 1) % r->E) * r->cols;
    (void)key;
    for (long c = 0; c < r->cols; c++) w[c] = (float)((1 - a) * w[c] + a * next[c]);
}

// 0.95 w
static void row_scaled(float* w, RouterRows* r, double a, uint64_t key) {
    (void)key;
    for (long c = 0; c < r->cols; c++) w[c] = (float)(w[c] * a);
}

// w / 1.1
static void row_temperature(float* w, RouterRows* r, double a, uint64_t key) {
    (void)key;
    for (long c = 0; c < r->cols; c++) w[c] = (float)(w[c] / a);
}

// w + a |w| d / |d|
static void row_step(float* w, const double* d, double a, double length, long cols) {
    double size = sqrt(dot(d, d, cols));
    for (long c = 0; c < cols && size > 0; c++) w[c] = (float)(w[c] + a * length * d[c] / size);
}

// a step of 0.1 |w| along a random vector's part orthogonal to w
static void row_orthogonal(float* w, RouterRows* r, double a, uint64_t key) {
    double *d = NEW(double, r->cols), length = sqrt(sum_of_squares(w, r->cols)), along = 0;
    for (long c = 0; c < r->cols; c++) d[c] = random_normal(mix64(key ^ (uint64_t)c));
    for (long c = 0; c < r->cols; c++) along += d[c] * w[c];
    for (long c = 0; c < r->cols && length > 0; c++) d[c] -= along / (length * length) * w[c];
    row_step(w, d, a, length, r->cols);
    free(d);
}

// a step of 0.01 |w| away from the mean of the other rows
static void row_adversarial(float* w, RouterRows* r, double a, uint64_t key) {
    double *d = NEW(double, r->cols), length = sqrt(sum_of_squares(w, r->cols));
    (void)key;
    for (long c = 0; c < r->cols; c++) {
        double sum = 0;
        for (int i = 0; i < r->E; i++) sum += i == r->e ? 0 : r->w[(long)i * r->cols + c];
        d[c] = w[c] - (r->E > 1 ? sum / (r->E - 1) : 0);
    }
    row_step(w, d, a, length, r->cols);
    free(d);
}

// the same row of the whole router, perturbed as operator_svd_perturb does
static void row_svd_perturb(float* w, RouterRows* r, double a, uint64_t key) {
    (void)key;
    if (r->perturbed_for != r->copy) {
        free(r->perturbed);
        r->perturbed = view_whole(r->view);
        operator_svd_perturb(r->perturbed, NULL, r->E, r->cols, a,
                             stream_key(r->p, "router", r->layer, r->copy, ALL_MATRICES));
        r->perturbed_for = r->copy;
    }
    memcpy(w, r->perturbed + r->e * r->cols, sizeof(float) * (size_t)r->cols);
}
