// algebra.h: linear algebra in double precision, for the few methods that need it.
#pragma once

static double dot(const double* a, const double* b, long n) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Makes `count` vectors of n >= count numbers orthonormal, each time with what those before it leave (Gram and Schmidt,
// twice for accuracy). A vector of which nothing is left is replaced by a unit vector of which something is.
static void orthonormalise(double* x, long count, long n) {
    for (long i = 0; i < count; i++) {
        double *xi = x + i * n, before = sqrt(dot(xi, xi, n)), length = 0;
        for (long unit = -1; unit < n; unit++) {
            if (unit >= 0) {
                memset(xi, 0, sizeof(double) * (size_t)n);
                xi[(i + unit) % n] = before = 1;
            }
            for (int twice = 0; twice < 2; twice++) {
                for (long j = 0; j < i; j++) {
                    double c = dot(xi, x + j * n, n);
                    for (long q = 0; q < n; q++) xi[q] -= c * x[j * n + q];
                }
            }
            length = sqrt(dot(xi, xi, n));
            if (length > 1e-10 * before && length > 0) break;
        }
        for (long q = 0; q < n; q++) xi[q] /= length;
    }
}

// W = sum over k of us_k v_k^T with orthonormal v_k and orthogonal us_k of length s_k, s falling. For W (rows, cols)
// with rows >= cols the us_k have `rows` numbers and the v_k `cols`; otherwise it is the decomposition of W^T.
typedef struct {
    long m, n; // n = min(rows, cols), m = the other
    int transposed;
    double *us, *v, *s; // (n, m), (n, n), (n)
} Svd;

static void svd_free(Svd* d) {
    free(d->us);
    free(d->v);
    free(d->s);
}

static void rotate(double* a, double* b, long n, double cosine, double sine) {
    for (long q = 0; q < n; q++) {
        double x = a[q], y = b[q];
        a[q] = cosine * x - sine * y;
        b[q] = sine * x + cosine * y;
    }
}

static void swap(double* a, double* b, long n) {
    for (long q = 0; q < n; q++) {
        double t = a[q];
        a[q] = b[q];
        b[q] = t;
    }
}

// One-sided Jacobi (Hestenes 1958): columns are rotated in pairs until all are orthogonal; the rotations make V. The
// pairs of a round, as in a tournament, have no column in common, so threads may share them without changing a bit.
static Svd svd_of(const float* W, long rows, long cols) {
    Svd d;
    d.transposed = rows < cols;
    d.m = d.transposed ? cols : rows;
    d.n = d.transposed ? rows : cols;
    long m = d.m, n = d.n, players = n + n % 2;
    d.us = NEW(double, n * m);
    d.v = NEW(double, n * n);
    d.s = NEW(double, n);
    for (long k = 0; k < n; k++)
        for (long i = 0; i < m; i++) d.us[k * m + i] = d.transposed ? W[k * cols + i] : W[i * cols + k];
    for (long k = 0; k < n; k++) d.v[k * n + k] = 1;
    for (int sweep = 0, rotations = 1; sweep < 40 && rotations > 0; sweep++) {
        rotations = 0;
        heed_signals();
        for (long round = 0; round < players - 1; round++) {
            #pragma omp parallel for reduction(+ : rotations)
            for (long pair = 0; pair < players / 2; pair++) {
                // the last player stays, the others move round the table
                long i = pair == 0 ? players - 1 : (round + pair) % (players - 1);
                long j = pair == 0 ? round : (round + players - 1 - pair) % (players - 1);
                if (i >= n || j >= n) continue;
                double *a = d.us + i * m, *b = d.us + j * m, *va = d.v + i * n, *vb = d.v + j * n;
                double aa = dot(a, a, m), bb = dot(b, b, m), ab = dot(a, b, m);
                if (fabs(ab) <= 1e-12 * sqrt(aa * bb) || ab == 0) continue;
                double zeta = (bb - aa) / (2 * ab), t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
                double cosine = 1 / sqrt(1 + t * t), sine = cosine * t;
                rotate(a, b, m, cosine, sine);
                rotate(va, vb, n, cosine, sine);
                rotations++;
            }
        }
    }
    for (long k = 0; k < n; k++) d.s[k] = sqrt(dot(d.us + k * m, d.us + k * m, m));
    for (long k = 0; k < n; k++) { // the largest first
        long best = k;
        for (long i = k + 1; i < n; i++)
            if (d.s[i] > d.s[best]) best = i;
        if (best == k) continue;
        swap(d.s + k, d.s + best, 1);
        swap(d.us + k * m, d.us + best * m, m);
        swap(d.v + k * n, d.v + best * n, n);
    }
    return d;
}

// W = the sum over the first `rank` terms
static void svd_product(float* W, const Svd* d, long rank) {
    long m = d->m, n = d->n, rows = d->transposed ? n : m, cols = d->transposed ? m : n;
    #pragma omp parallel
    {
        double* row = NEW(double, cols);
        #pragma omp for
        for (long i = 0; i < rows; i++) {
            memset(row, 0, sizeof(double) * (size_t)cols);
            for (long k = 0; k < rank; k++) {
                double c = d->transposed ? d->v[k * n + i] : d->us[k * m + i];
                const double* other = d->transposed ? d->us + k * m : d->v + k * n;
                for (long j = 0; j < cols; j++) row[j] += c * other[j];
            }
            for (long j = 0; j < cols; j++) W[i * cols + j] = (float)row[j];
        }
        free(row);
    }
}

// C (n, n) symmetric and positive definite becomes the lower triangle S with S S^T = C. 0 if it is not positive
// definite.
static int cholesky(double* C, long n) {
    for (long j = 0; j < n; j++) {
        double diagonal = C[j * n + j] - dot(C + j * n, C + j * n, j);
        if (!(diagonal > 0)) return 0;
        diagonal = sqrt(diagonal);
        C[j * n + j] = diagonal;
        #pragma omp parallel for
        for (long i = j + 1; i < n; i++) C[i * n + j] = (C[i * n + j] - dot(C + i * n, C + j * n, j)) / diagonal;
    }
    for (long i = 0; i < n; i++)
        for (long j = i + 1; j < n; j++) C[i * n + j] = 0;
    return 1;
}
