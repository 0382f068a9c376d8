// rows.h: what methods do with rows of a matrix: statistics, units drawn by lot, other orders, pruning.
#pragma once

enum { CHUNK_FLOATS = 1 << 20 }; // rows are worked on in pieces of about 4 MB

static double sum_of_squares(const float* x, long n) {
    double sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

static float* view_whole(const View* v) {
    float* x = floats(v->rows * v->cols);
    view_read(v, 0, v->rows, x);
    return x;
}

// Mean and unbiased standard deviation of the rows or columns of a view that are marked; all of it if marked is NULL.
static void slice_statistics(const View* v, const unsigned char* marked, int by_column, double* mean, double* std) {
    long rows = CHUNK_FLOATS / v->cols < 1 ? 1 : CHUNK_FLOATS / v->cols, count = 0;
    float* x = floats(lmin(rows, v->rows) * v->cols);
    double sum = 0, squares = 0;
    *mean = *std = 0;
    for (long first = 0; first < v->rows; first += rows) {
        long n = lmin(rows, v->rows - first);
        view_read(v, first, n, x);
        for (long r = 0; r < n; r++) {
            const float* row = x + r * v->cols;
            if (marked && !by_column && !marked[first + r]) continue;
            double row_sum = 0, row_squares = 0;
            long row_count = 0;
            if (marked && by_column) {
                for (long c = 0; c < v->cols; c++) {
                    double weight = marked[c];
                    row_sum += weight * row[c];
                    row_squares += weight * row[c] * row[c];
                    row_count += marked[c];
                }
            } else {
                for (long c = 0; c < v->cols; c++) row_sum += row[c];
                row_squares = sum_of_squares(row, v->cols);
                row_count = v->cols;
            }
            sum += row_sum;
            squares += row_squares;
            count += row_count;
        }
    }
    if (count > 0) *mean = sum / (double)count;
    squares = fmax(0, squares - (double)count * *mean * *mean); // in double: weights have 24 bits
    if (count > 1) *std = sqrt(squares / (double)(count - 1));
    free(x);
}

// (L, E, 2) squared norms of every expert's gate and up (0) and down (1)
static double* expert_norms(const Source* s) {
    int L = s->config.num_layers, E = s->config.num_experts;
    double* norms = NEW(double, (long)L * E * 2);
    for (int l = 0; l < L; l++)
        for (int e = 0; s->config.sparse[l] && e < E; e++)
            for (int matrix = GATE; matrix <= DOWN; matrix++) {
                const View* v = source_ffn(s, l, e, matrix);
                long rows = CHUNK_FLOATS / v->cols < 1 ? 1 : CHUNK_FLOATS / v->cols;
                float* x = floats(lmin(rows, v->rows) * v->cols);
                double sum = 0;
                for (long r = 0; r < v->rows; r += rows) {
                    long n = lmin(rows, v->rows - r);
                    view_read(v, r, n, x);
                    sum += sum_of_squares(x, n * v->cols);
                }
                norms[((long)l * E + e) * 2 + (matrix == DOWN)] += sum;
                free(x);
            }
    return norms;
}

// floor(share * n) of n units, drawn without replacement
static unsigned char* draw_units(long n, double share, uint64_t key) {
    unsigned char* marked = NEW(unsigned char, n);
    long count = lmin(n, (long)floor(share * (double)n + 1e-9)); // 0.7 * 10 is 7
    for (long i = 0; i < count; i++) marked[random_permutation(i, n, key)] = 1;
    return marked;
}

// out = (1 - a) out + a next
static void mix_next(const Target* t, long row, long rows, float* out, double a) {
    float* next = a == 0 ? NULL : floats(rows * t->cols);
    if (next) view_read(&t->next, row, rows, next);
    for (long i = 0; next && i < rows * t->cols; i++) out[i] = (float)((1 - a) * out[i] + a * next[i]);
    free(next);
}

// Unit u is unit t->order[u] of the source, whose matrix may be the wider one.
static void ordered_rows(const Target* t, long row, long rows, float* out) {
    long cols = t->cols, wide = t->from.cols;
    float* in = t->by_column ? floats(rows * wide) : NULL;
    if (in) view_read(&t->from, row, rows, in);
    for (long r = 0; r < rows; r++) {
        if (!in) view_read(&t->from, t->order[row + r], 1, out + r * cols);
        for (long c = 0; in && c < cols; c++) out[r * cols + c] = in[r * wide + t->order[c]];
    }
    free(in);
}

static void whole_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    (void)p;
    memcpy(out, t->whole + row * t->cols, sizeof(float) * (size_t)(rows * t->cols));
}

// Tensors that belong to no expert, from several models (Branch-Train-MiX): their mean, in double, rounded once.
static void average_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    long n = rows * t->cols;
    double* sum = NEW(double, n);
    for (int i = 0; i < p->num_sources; i++) {
        view_read(source_find(p->sources[i], t->output->tensor->name), row, rows, out);
        for (long k = 0; k < n; k++) sum[k] += out[k];
    }
    for (long k = 0; k < n; k++) out[k] = (float)(sum[k] / p->num_sources);
    free(sum);
}

typedef struct {
    double score;
    long index;
} Scored;

static int compare_scored(const void* a, const void* b) {
    const Scored *x = (const Scored*)a, *y = (const Scored*)b;
    if (x->score != y->score) return x->score < y->score ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

// MoE-Pruner (arXiv 2410.12013): in each row the share of the numbers with the smallest |w| norm(input) becomes 0.
static void prune_rows(const Target* t, long rows, float* out) {
    long cols = t->cols, count = (long)floor(ask.prune_weights * (double)cols + 1e-9);
    #pragma omp parallel
    {
        Scored* s = NEW(Scored, cols);
        #pragma omp for
        for (long r = 0; r < rows; r++) {
            for (long c = 0; c < cols; c++) {
                s[c].score = fabs(out[r * cols + c]) * t->input_norm[c];
                s[c].index = c;
            }
            qsort(s, (size_t)cols, sizeof(Scored), compare_scored);
            for (long c = 0; c < count; c++) out[r * cols + s[c].index] = 0;
        }
        free(s);
    }
}
