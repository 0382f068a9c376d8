// cluster.h: Cluster-aware upcycling (arXiv 2604.13508).
//
// The inputs of a dense layer's FFN on calibration data are clustered; each cluster becomes an expert. The router's
// rows are the centroids at length 1, so that a token goes to the cluster that it is most alike. The router reads
// RMS-normed inputs of length about sqrt(H): its logits are sqrt(H) times a cosine. The matrices of expert i are the
// closest ones of low rank, as seen by the inputs X_i of its cluster:
//     S S^T = X_i^T X_i / n + ridge (Cholesky)         W S = U s V^T, truncated to the share `energy` of sum s^2
//     W_i = (U s V^T)_r S^-1
#pragma once

typedef struct Clusters {
    float** inputs; // (L) the FFN's inputs (tokens, H)
    int** cluster; // (L) (tokens) the cluster of each
    float* centroids; // (L, M, H): rows of the router
    long tokens, filled;
    float* made[3]; // the matrices of (layer, expert) that were made last
    int layer, expert;
    double energy_kept;
    long ranks, matrices; // for the receipt
} Clusters;

static void observe_inputs(Model* m, int l) {
    Clusters* k = (Clusters*)m->observer;
    long H = m->config.hidden_size, n = (long)m->batch * m->length;
    if (k->inputs[l]) memcpy(k->inputs[l] + k->filled * H, m->layers[l].ffn_in, sizeof(float) * (size_t)(n * H));
}

// Spherical k-means (Dhillon and Modha 2001): a token goes to the centroid with the largest cosine, a centroid is the
// direction of the sum of its unit vectors. A cluster that ran empty starts again from the token that fits its centroid
// least. centroids (k, H) at length 1, cluster (n), start (k): the tokens that it starts from
static void spherical_k_means(float* centroids, int* cluster, const float* x, long n, int H, int k,
                              const long* start) {
    double* sums = NEW(double, (long)k * H);
    float *cosines = floats(k), *fit = floats(n);
    long* count = NEW(long, k);
    for (int i = 0; i < k; i++) {
        const float* token = x + start[i] * H;
        double length = sqrt(sum_of_squares(token, H));
        for (int c = 0; c < H; c++) centroids[(long)i * H + c] = (float)(length > 0 ? token[c] / length : 0);
    }
    for (long t = 0; t < n; t++) cluster[t] = -1;
    for (int iteration = 0, moved = 1; iteration < 50 && moved; iteration++) {
        moved = 0;
        heed_signals();
        for (long t = 0; t < n; t++) {
            int best = 0;
            matmul_forward(cosines, x + t * H, centroids, 1, H, k);
            for (int i = 1; i < k; i++)
                if (cosines[i] > cosines[best]) best = i;
            double length = sqrt(sum_of_squares(x + t * H, H));
            fit[t] = (float)(length > 0 ? cosines[best] / length : 1);
            moved |= cluster[t] != best;
            cluster[t] = best;
        }
        memset(count, 0, sizeof(long) * (size_t)k);
        for (long t = 0; t < n; t++) count[cluster[t]]++;
        for (int i = 0; i < k; i++) {
            if (count[i] > 0) continue;
            long worst = -1;
            for (long t = 0; t < n; t++)
                if (count[cluster[t]] > 1 && (worst < 0 || fit[t] < fit[worst])) worst = t;
            if (worst < 0) continue;
            count[cluster[worst]]--;
            cluster[worst] = i;
            count[i] = moved = 1;
            fit[worst] = 1;
        }
        memset(sums, 0, sizeof(double) * (size_t)k * (size_t)H);
        for (long t = 0; t < n; t++) {
            double length = sqrt(sum_of_squares(x + t * H, H));
            for (int c = 0; c < H && length > 0; c++) sums[(long)cluster[t] * H + c] += x[t * H + c] / length;
        }
        for (int i = 0; i < k; i++) {
            double length = sqrt(dot(sums + (long)i * H, sums + (long)i * H, H));
            for (int c = 0; c < H && length > 0; c++)
                centroids[(long)i * H + c] = (float)(sums[(long)i * H + c] / length);
        }
    }
    free(sums);
    free(cosines);
    free(fit);
    free(count);
}

// What the FFNs read that become sparse
static Clusters* gather_inputs(const Plan* p, const char* why) {
    const Config* c = &p->config;
    int L = c->num_layers;
    Clusters* k = NEW(Clusters, 1);
    Feed f = feed_calibration(p->sources[0], why);
    Model* m = feed_model(&f, p->sources[0]->dir, FOR_SCORING, 2);
    k->layer = k->expert = -1;
    k->tokens = f.windows * f.T;
    if (k->tokens < p->M) die(2, "--calibrate: %ld tokens are too few for %d experts", k->tokens, p->M);
    k->inputs = NEW(float*, L);
    for (int l = 0; l < L; l++) k->inputs[l] = c->sparse[l] ? floats(k->tokens * c->hidden_size) : NULL;
    m->observe = observe_inputs;
    m->observer = k;
    for (int rows; (rows = feed_next(&f)) > 0; k->filled += (long)rows * f.T)
        model_forward(m, f.batch.tokens, f.batch.targets, rows, f.T);
    model_free(m);
    feed_close(&f);
    return k;
}

static void find_clusters(Plan* p) {
    int L = p->config.num_layers, M = p->M, H = p->config.hidden_size;
    Clusters* k = p->clusters = gather_inputs(p, "--method cluster");
    k->cluster = NEW(int*, L);
    k->centroids = NEW(float, (long)L * M * H);
    long* start = NEW(long, M);
    for (int l = 0; l < L; l++) {
        if (!k->inputs[l]) continue;
        k->cluster[l] = NEW(int, k->tokens);
        for (int i = 0; i < M; i++) start[i] = random_permutation(i, k->tokens, stream_key(p, "clusters", l, 0, 0));
        spherical_k_means(k->centroids + (long)l * M * H, k->cluster[l], k->inputs[l], k->tokens, H, M, start);
    }
    free(start);
}

static void cluster_router_row(const Plan* p, float* row, int l, int j) {
    long H = p->config.hidden_size;
    memcpy(row, p->clusters->centroids + ((long)l * p->M + j) * H, sizeof(float) * (size_t)H);
}

// C (n, n), 0 before, = X^T X / rows + ridge, the ridge being a thousandth of the mean of the diagonal: with fewer
// inputs than n the sum alone could not be inverted.
static void covariance(double* C, const float* X, long rows, long n) {
    #pragma omp parallel for
    for (long i = 0; i < n; i++)
        for (long r = 0; r < rows; r++) {
            double x = X[r * n + i] / (double)rows;
            for (long j = 0; j < n; j++) C[i * n + j] += x * X[r * n + j];
        }
    double trace = 0;
    for (long i = 0; i < n; i++) trace += C[i * n + i];
    for (long i = 0; i < n; i++) C[i * n + i] += trace > 0 ? 1e-3 * trace / (double)n : 1;
}

// W (rows, n) becomes the matrix of lowest rank that keeps the share `energy` of || W S ||^2. Returns the rank.
static long truncate_whitened(float* W, long rows, long n, const double* S, double energy) {
    float* WS = floats(rows * n);
    #pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < n; j++) {
            double sum = 0;
            for (long i = j; i < n; i++) sum += W[r * n + i] * S[i * n + j];
            WS[r * n + j] = (float)sum;
        }
    Svd d = svd_of(WS, rows, n);
    double all = dot(d.s, d.s, d.n), kept = 0;
    long rank = 0;
    while (rank < d.n && (rank == 0 || kept < energy * all)) {
        kept += d.s[rank] * d.s[rank];
        rank++;
    }
    svd_product(WS, &d, rank);
    svd_free(&d);
    #pragma omp parallel
    {
        double* w = NEW(double, n);
        #pragma omp for
        for (long r = 0; r < rows; r++) { // w S = row, from the last column to the first
            for (long j = n - 1; j >= 0; j--) {
                double sum = WS[r * n + j];
                for (long i = j + 1; i < n; i++) sum -= w[i] * S[i * n + j];
                w[j] = sum / S[j * n + j];
            }
            for (long j = 0; j < n; j++) W[r * n + j] = (float)w[j];
        }
        free(w);
    }
    free(WS);
    return rank;
}

// The matrix of expert j of layer l. The statistics of down are those of its own inputs: the hidden rows of the
// cluster's tokens.
static const float* cluster_matrix(const Plan* p, int l, int j, int matrix) {
    Clusters* k = p->clusters;
    const Config* c = &p->sources[0]->config;
    long H = c->hidden_size, I = c->intermediate_size, n = 0, size = H * I;
    if (k->layer != l || k->expert != j)
        for (int i = 0; i < 3; i++) {
            free(k->made[i]);
            k->made[i] = NULL;
        }
    k->layer = l;
    k->expert = j;
    if (k->made[matrix]) return k->made[matrix];
    for (long t = 0; t < k->tokens; t++) n += k->cluster[l][t] == j;
    float* X = floats(n * H);
    for (long t = 0, r = 0; t < k->tokens; t++)
        if (k->cluster[l][t] == j) memcpy(X + r++ * H, k->inputs[l] + t * H, sizeof(float) * (size_t)H);
    long width = matrix == DOWN ? I : H;
    if (matrix == DOWN && n > 0) {
        float *gate_up = floats(2 * size), *both = floats(2 * n * I), *hidden = floats(n * I);
        view_read(source_ffn(p->sources[0], l, 0, GATE), 0, I, gate_up);
        view_read(source_ffn(p->sources[0], l, 0, UP), 0, I, gate_up + size);
        matmul_forward(both, X, gate_up, (int)n, (int)H, (int)(2 * I));
        swiglu_forward(hidden, both, (int)n, (int)I);
        free(gate_up);
        free(both);
        free(X);
        X = hidden;
    }
    double* C = NEW(double, width * width);
    covariance(C, X, n, width);
    if (!cholesky(C, width)) die(1, "layer %d, expert %d: the inputs' covariance is not positive definite", l, j);
    // gate and up share their inputs
    for (int i = matrix == DOWN ? DOWN : GATE; i <= (matrix == DOWN ? DOWN : UP); i++) {
        k->made[i] = view_whole(source_ffn(p->sources[0], l, 0, i));
        k->ranks += truncate_whitened(k->made[i], i == DOWN ? H : I, width, C, ask.energy);
        k->matrices++;
    }
    free(C);
    free(X);
    return k->made[matrix];
}

// The matrix that gives what W gives for the inputs X_i of cluster i, at a low rank:  S S^T = X_i^T X_i / n + ridge,
// W S = U s V^T cut to the share `energy` of sum s^2,  W_i = (U s V^T)_r S^-1.
static void cluster_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    const float* made = cluster_matrix(p, t->layer, t->expert, t->matrix);
    memcpy(out, made + row * t->cols, sizeof(float) * (size_t)(rows * t->cols));
}
