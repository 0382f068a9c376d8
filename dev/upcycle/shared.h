// shared.h: a dense FFN becomes a shared expert and routed ones, each of its units in one of them.
//
// The I units are cut into G = N + M parts (--shared N, --experts M): N parts are the shared expert, which every token
// visits, each of the others is an expert. Where a token gets all M, gates of 1 / M (a zero router) and down times M
// give what the FFN gave; with K of them each still counts whole, as in CMoE. Plan.units (L, I) lists the units of
// expert 0, 1, .., then those of the shared one.
#pragma once

// What makes an expert count whole: gates of about 1 / K (renormalised), 1 / M (of a softmax), 1 / 2 (a sigmoid's), of
// the shared expert 1 / 2 in Qwen2-MoE and 1 in Dots1. Only down is scaled.
static double part_scale(const Plan* p, const Target* t) {
    const Config* c = &p->config;
    if (t->matrix != DOWN) return 1;
    if (t->expert == p->M) return c->arch == QWEN2_MOE ? 2 : 1;
    return c->norm_topk_prob ? c->num_experts_per_tok : c->router.kind == ROUTER_SIGMOID ? 2 : p->M;
}

static void part_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    scale_target(t, part_scale(p, t));
    domain_rows(p, t, row, rows, out);
}

// MoEBERT (2204.07675): importance of unit j: the sum over batches of | gate_j . dL/dgate_j + up_j . dL/dup_j +
// down_j . dL/ddown_j | (rows of gate and up, columns of down). The most important ones are shared, the others dealt
// out in turn. MoEBERT has the shared ones in every expert, and leaves out what its experts cannot hold.
static void important_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    part_rows(p, t, row, rows, out);
}

// CMoE (2502.04416): each token marks the --marks units with the largest |h|, h = silu(gate x) (up x) with x and the
// rows of gate and up at length 1. The units marked most often are shared; the M most marked of the others are
// centroids, to which all are assigned, equally many to each, with the least sum of L1 distances of their marks. The
// router is the ridge regression to |silu(gate_r x) (up_r x)|, x as it is, of the unit r of each expert whose marks are
// nearest to the mean.
static void marked_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    part_rows(p, t, row, rows, out);
}

// order (n) = 0 .. n - 1 by falling score, of equals the lower index first
static void rank_units(int* order, const double* score, long n) {
    Scored* s = NEW(Scored, n);
    for (long i = 0; i < n; i++) s[i].score = -score[i], s[i].index = i;
    qsort(s, (size_t)n, sizeof *s, compare_scored);
    for (long i = 0; i < n; i++) order[i] = (int)s[i].index;
    free(s);
}

// Plan.units by importance; a batch of calibration data is a sample.
static void find_important(Plan* p) {
    const Source* s = p->sources[0];
    long L = s->config.num_layers, H = s->config.hidden_size, I = s->config.intermediate_size, M = p->M;
    long width = p->config.moe_intermediate_size, S = p->num_shared * width;
    double* score = NEW(double, L * I);
    int* order = NEW(int, I);
    Feed f = feed_calibration(s, "--method importance");
    Model* m = feed_model(&f, s->dir, FOR_TRAINING, 2);
    for (int sequences; (sequences = feed_next(&f)) > 0;) {
        model_forward(m, f.batch.tokens, f.batch.targets, sequences, f.T);
        model_backward(m, 1);
        for (long i = 0; i < L * I; i++) {
            const LayerWeights *w = &m->weights.layers[i / I], *dw = &m->dweights.layers[i / I];
            double sum = 0;
            for (long h = 0, u = i % I; h < H; h++)
                sum += (double)w->gate_up[u * H + h] * dw->gate_up[u * H + h] +
                       (double)w->gate_up[(I + u) * H + h] * dw->gate_up[(I + u) * H + h] +
                       (double)w->down[h * I + u] * dw->down[h * I + u];
            score[i] += fabs(sum);
        }
        memset(m->grads, 0, sizeof(float) * (size_t)m->layout.total);
    }
    model_free(m);
    feed_close(&f);
    p->units = NEW(int, L * I);
    for (long l = 0; l < L; l++) {
        rank_units(order, score + l * I, I);
        for (long r = 0; r < I; r++) // ranks below S are shared, the others dealt
            p->units[l * I + (r < S ? M * width + r : (r - S) % M * width + (r - S) / M)] = order[r];
    }
    free(score);
    free(order);
}

// L1 distances (I, M) between each unit's marks and the mean of the marks of each cluster's members, from marks (n, A),
// member (I): the cluster of a unit or -1, `size` members each. With m_t the mean at token t,
//     |1 - m_t| - |0 - m_t| = 1 - 2 m_t,  so that  distance = sum over t of m_t + sum over marked t of (1 - 2 m_t)
static void mark_distances(double* distance, const int* marks, long n, long A, const int* member, long size, long I,
                           int M) {
    double *mean = NEW(double, 2 * M), *total = mean + M;
    memset(distance, 0, sizeof(double) * (size_t)(I * M));
    for (long t = 0; t < n; t++, marks += A) {
        memset(mean, 0, sizeof(double) * (size_t)M);
        for (long a = 0; a < A; a++)
            if (member[marks[a]] >= 0) mean[member[marks[a]]] += 1.0 / (double)size;
        for (int e = 0; e < M; e++) total[e] += mean[e];
        for (long a = 0; a < A; a++)
            for (int e = 0; e < M; e++) distance[(long)marks[a] * M + e] += 1 - 2 * mean[e];
    }
    for (long i = 0; i < I * M; i++) distance[i] += total[i % M];
    free(mean);
}

// x (rows, n): each row at length 1
static void unit_length(float* x, long rows, long n) {
    for (long r = 0; r < rows; r++) {
        double length = sqrt(sum_of_squares(x + r * n, n));
        for (long i = 0; i < n && length > 0; i++) x[r * n + i] = (float)(x[r * n + i] / length);
    }
}

// |silu(W_gate x) (W_up x)| (n, units) from x (n, H), gate_up (2, units, H)
static void activity(float* act, const float* x, const float* gate_up, long n, long H, long units) {
    float* both = floats(2 * n * units);
    matmul_forward(both, x, gate_up, (int)n, (int)H, (int)(2 * units));
    swiglu_forward(act, both, (int)n, (int)units);
    for (long i = 0; i < n * units; i++) act[i] = fabsf(act[i]);
    free(both);
}

// marks (n, A): of each row of x (n, H) the units with the largest activity, in pieces that memory holds
static void mark_units(int* marks, const float* x, const float* gate_up, long n, long H, long I, long A) {
    enum { ROWS = 256 };
    float *piece = floats(ROWS * (H + I)), *act = piece + ROWS * H;
    for (long first = 0, rows; first < n; first += rows) {
        rows = lmin(ROWS, n - first);
        heed_signals();
        memcpy(piece, x + first * H, sizeof(float) * (size_t)(rows * H));
        unit_length(piece, rows, H);
        activity(act, piece, gate_up, rows, H, I);
        for (long t = 0; t < rows; t++) choose_topk(marks + (first + t) * A, act + t * I, (int)I, (int)A);
    }
    free(piece);
}

// W (M, H) = argmin over W of sum over tokens |W x - y|^2 + n ridge |W|^2, from x (n, H), y (n, M); ridge as for
// clusters. Equal for every expert is what a softmax does not see: the mean row is taken away. Rows get the root mean
// square `size`.
static void ridge_rows(float* W, const float* x, const float* y, long n, long H, long M, double size) {
    double *C = NEW(double, H * H), *w = NEW(double, M * H), squares = 0;
    covariance(C, x, n, H);
    if (!cholesky(C, H)) die(1, "--method marks: the covariance of the FFN's inputs is not positive definite");
    for (long e = 0; e < M; e++) {
        double* row = w + e * H;
        for (long t = 0; t < n; t++)
            for (long i = 0; i < H; i++) row[i] += (double)y[t * M + e] * x[t * H + i] / (double)n;
        for (long i = 0; i < H; i++) row[i] = (row[i] - dot(C + i * H, row, i)) / C[i * H + i];
        for (long i = H - 1; i >= 0; i--) {
            for (long j = i + 1; j < H; j++) row[i] -= C[j * H + i] * row[j];
            row[i] /= C[i * H + i];
        }
    }
    for (long i = 0; i < H; i++) {
        double mean = 0;
        for (long e = 0; e < M; e++) mean += w[e * H + i] / (double)M;
        for (long e = 0; e < M; e++) squares += pow(w[e * H + i] -= mean, 2);
    }
    for (long i = 0; i < M * H; i++) W[i] = (float)(squares > 0 ? w[i] * size / sqrt(squares / (double)(M * H)) : 0);
    free(C);
    free(w);
}

// One layer's units, and with rows (M, H) its router
static void carve_layer(Plan* p, int l, const float* x, long n, float* rows) {
    const Source* s = p->sources[0];
    long H = s->config.hidden_size, I = s->config.intermediate_size, A = lmin(ask.marks, I), M = p->M;
    long width = p->config.moe_intermediate_size, S = p->num_shared * width, rest = I - S;
    float *gate_up = floats(2 * I * H), *fit = floats(rest * M), *core = floats(2 * M * H), *y = floats(n * M);
    double *count = NEW(double, I), *distance = NEW(double, I * M);
    int *marks = NEW(int, n * A), *order = NEW(int, 2 * I), *member = order + I, *units = p->units + l * I;
    for (int matrix = GATE; matrix <= UP; matrix++)
        view_read(source_ffn(s, l, 0, matrix), 0, I, gate_up + matrix * I * H);
    unit_length(gate_up, 2 * I, H);
    mark_units(marks, x, gate_up, n, H, I, A);
    for (long i = 0; i < n * A; i++) count[marks[i]]++;
    rank_units(order, count, I);
    for (long r = 0; r < I; r++) member[order[r]] = r >= S && r < S + M ? (int)(r - S) : -1;
    mark_distances(distance, marks, n, A, member, 1, I, p->M);
    for (long r = 0; r < rest; r++)
        for (long e = 0; e < M; e++) fit[r * M + e] = (float)-distance[order[S + r] * M + e];
    int* expert = NEW(int, rest);
    assign_units(expert, fit, rest, M, width);
    for (long r = 0; r < I; r++) member[order[r]] = r < S ? -1 : expert[r - S];
    mark_distances(distance, marks, n, A, member, width, I, p->M);
    for (long e = 0, at = 0; e <= M; e++) { // the shared expert is the last one
        long best = -1;
        for (long u = 0; u < I; u++) {
            if (member[u] != (e < M ? e : -1)) continue;
            if (e < M && (best < 0 || distance[u * M + e] < distance[best * M + e])) best = u;
            units[at++] = (int)u;
        }
        for (long i = 0; i < 2 && best >= 0; i++)
            memcpy(core + (i * M + e) * H, gate_up + (i * I + best) * H, sizeof(float) * (size_t)H);
    }
    activity(y, x, core, n, H, M);
    if (rows) ridge_rows(rows, x, y, n, H, M, ask.router_std);
    free(gate_up), free(fit), free(core), free(y), free(count), free(distance), free(marks), free(order), free(expert);
}

// Plan.units by marks; the router's rows unless --router-init wants others
static void find_marked(Plan* p) {
    Clusters* k = p->clusters = gather_inputs(p, "--method marks");
    long L = p->config.num_layers, size = (long)p->M * p->config.hidden_size;
    p->units = NEW(int, L * p->sources[0]->config.intermediate_size);
    if (!ask.router_init) k->centroids = NEW(float, L * size);
    for (int l = 0; l < L; l++) {
        if (!k->inputs[l]) continue;
        carve_layer(p, l, k->inputs[l], k->tokens, k->centroids ? k->centroids + l * size : NULL);
        free(k->inputs[l]);
    }
}

static void find_parts(Plan* p) {
    if (is(p->method->name, "importance")) find_important(p);
    else find_marked(p);
}
