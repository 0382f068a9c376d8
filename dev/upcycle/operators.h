// operators.h: expert operators that need algebra.h: orthogonal, svd-perturb, svd-mix, sparse-code-mix.
#pragma once

static double strength(double usual) { return asked("strength") ? ask.strength : usual; }

// orthogonal: W + 0.1 std(W) noise; the orthonormal vectors of that (QR; of the shorter side's kind), at W's Frobenius
// norm.
static void operator_orthogonal(float* W, long rows, long cols, double std, uint64_t key) {
    int rows_are_vectors = rows <= cols;
    long count = rows_are_vectors ? rows : cols, n = rows_are_vectors ? cols : rows;
    double *x = (double*)checked_malloc(sizeof(double) * (size_t)(count * n)),
           norm = sqrt(sum_of_squares(W, rows * cols));
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < cols; c++) {
            double noisy = W[r * cols + c] + strength(0.1) * std * random_normal(mix64(key ^ (uint64_t)(r * cols + c)));
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
static void operator_svd_perturb(float* W, long rows, long cols, uint64_t key, double amount) {
    Svd d = svd_of(W, rows, cols);
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
static void operator_svd_mix(float* W, const float* next, long rows, long cols, uint64_t key) {
    Svd d = svd_of(W, rows, cols), o = svd_of(next, rows, cols);
    unsigned char* swapped = draw_units(d.n, strength(0.3), key);
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
    double* gram = (double*)checked_malloc(sizeof(double) * (size_t)(atoms * atoms));
    double* DW = (double*)checked_malloc(sizeof(double) * (size_t)(atoms * cols));
    for (long a = 0; a < atoms; a++) {
        double sum = 0;
        for (long b = 0; b < atoms; b++) sum += fabs(gram[a * atoms + b] = dot(D + a * rows, D + b * rows, rows));
        step = fmax(step, sum);
        memset(DW + a * cols, 0, sizeof(double) * (size_t)cols);
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < cols; c++) DW[a * cols + c] += D[a * rows + r] * W[r * cols + c];
        for (long c = 0; c < cols; c++) largest = fmax(largest, fabs(DW[a * cols + c]));
    }
    double threshold = penalty * largest / step;
    memset(C, 0, sizeof(double) * (size_t)(atoms * cols));
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
static void operator_sparse_code_mix(float* W, const float* next, long rows, long cols, uint64_t key) {
    long atoms = lmin(64, lmin(rows, cols));
    double* D = (double*)checked_malloc(sizeof(double) * (size_t)(atoms * rows));
    double* codes = (double*)checked_malloc(sizeof(double) * 2 * (size_t)(atoms * cols));
    double* other = codes + atoms * cols;
    for (long a = 0; a < atoms; a++) {
        long column = random_permutation(a, cols, key);
        double length = 0;
        for (long r = 0; r < rows; r++) length += (double)W[r * cols + column] * W[r * cols + column];
        for (long r = 0; r < rows; r++) D[a * rows + r] = length > 0 ? W[r * cols + column] / sqrt(length) : 0;
    }
    sparse_codes(codes, D, W, atoms, rows, cols, 0.1);
    sparse_codes(other, D, next, atoms, rows, cols, 0.1);
    unsigned char* swapped = draw_units(atoms, strength(0.5), mix64(key ^ hash_string("swap")));
    #pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long a = 0; a < atoms; a++)
            for (long c = 0; swapped[a] && c < cols; c++)
                W[r * cols + c] += (float)(D[a * rows + r] * (other[a * cols + c] - codes[a * cols + c]));
    free(D);
    free(codes);
    free(swapped);
}
