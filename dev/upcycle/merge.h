// merge.h: groups of experts become one expert each (UNCURL, arXiv 2409.01483; M-SMoE, 2310.01334).
//
// Alike are experts whose router logits are: s_ij is their cosine over the calibration tokens. The core of a group, its
// most used member, is W_0. The units of member i are put into the order P_i in which they fit the core's best, which
// leaves its function as it is; with w_i, its share of the group's load,
//     W = W_0 + sum over i of w_i (P_i W_i - W_0),
// so that equal experts merge into their own bits. The router keeps the core's row.
#pragma once

// Spectral clustering (Ng, Jordan and Weiss 2001) of n experts into k groups: the eigenvectors of the k largest
// eigenvalues of D^-1/2 A D^-1/2, with A = (1 + s) / 2 >= 0 and D its row sums, give each expert a row; the rows'
// directions are clustered, starting with those that are furthest from each other. group (n), s (n, n)
static void spectral_groups(int* group, const double* s, int n, int k) {
    float *rows = NEW(float, (long)n * (n + k + 1) + k * k), *A = rows + n * k, *cosine = A + n * n;
    float* centroids = cosine + n;
    double* degree = NEW(double, n);
    long* start = NEW(long, k);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) degree[i] += (1 + s[i * n + j]) / 2;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) A[i * n + j] = (float)((1 + s[i * n + j]) / 2 / sqrt(degree[i] * degree[j]));
    Svd d = svd_of(A, n, n); // of a symmetric matrix without negative eigenvalues
    for (int i = 0; i < n; i++) {
        cosine[i] = -2;
        for (int q = 0; q < k; q++)
            if (d.s[q] > 1e-6 * d.s[0]) rows[i * k + q] = (float)d.v[(long)q * n + i]; // of 0 any vector is one
        float length = (float)sqrt(sum_of_squares(rows + i * k, k));
        for (int q = 0; q < k; q++) rows[i * k + q] /= length;
    }
    for (int c = 0; c < k; c++) {
        for (int i = 0; i < n; i++)
            if (cosine[i] < cosine[start[c]]) start[c] = i;
        for (int i = 0; i < n; i++) {
            float product = 0;
            for (int q = 0; q < k; q++) product += rows[i * k + q] * rows[start[c] * k + q];
            cosine[i] = fmaxf(cosine[i], i == start[c] ? 2 : product);
        }
    }
    spherical_k_means(centroids, group, rows, n, k, k, start);
    svd_free(&d);
    free(rows);
    free(degree);
    free(start);
}

// M-SMoE's groups: the k most used experts are cores, and each other expert joins the one that it is most alike.
static void core_groups(int* group, const double* s, const double* load, int n, int k) {
    int* core = NEW(int, k);
    keep_best(core, load, n, k);
    for (int i = 0; i < n; i++) {
        double most = -2;
        for (int c = 0; c < k; c++) {
            double alike = core[c] == i ? 2 : s[i * n + core[c]];
            if (alike > most) group[i] = c;
            most = fmax(most, alike);
        }
    }
    free(core);
}

typedef struct Merged {
    float* units; // (I, 3, H), or NULL
    int layer, expert;
} Merged;

// p->group, numbered by their first members, and the load as p->score
static void find_groups(Plan* p) {
    int L = p->config.num_layers, E = p->E, M = p->M;
    Usage usage = {p->score, NULL, NULL, NEW(double, (long)L * E * E), 0, 0};
    measure_usage(p->sources[0], &usage, "--method merge");
    p->group = NEW(int, L * E);
    p->merged = NEW(Merged, 1);
    for (int l = 0; l < L; l++) {
        double *s = usage.products + (long)l * E * E, *length = NEW(double, E);
        int *group = p->group + l * E, *number = NEW(int, M), next = 0;
        for (int e = 0; e < E; e++) length[e] = sqrt(s[e * E + e]);
        for (int i = 0; i < E * E; i++) // a router of zeros finds no two experts alike
            s[i] = length[i / E] * length[i % E] > 0 ? s[i] / (length[i / E] * length[i % E]) : 0;
        if (p->config.sparse[l] && is(ask.group, "cores")) core_groups(group, s, p->score + (long)l * E, E, M);
        else if (p->config.sparse[l]) spectral_groups(group, s, E, M);
        for (int e = 0; e < E; e++) {
            if (!number[group[e]]) number[group[e]] = ++next;
            group[e] = number[group[e]] - 1;
        }
        free(length);
        free(number);
    }
    free(usage.products);
}

// The linear assignment of n rows to m columns, `room` rows to each, with the largest sum of fit (n, m); order (n) is
// each row's column. Shortest augmenting paths (Jonker and Volgenant 1987), O(n^2 m): row after row is taken in; v are
// the columns' prices.
static void assign_units(int* order, const float* fit, long n, long m, long room) {
    double *u = NEW(double, n + 2 * m), *v = u + n, *least = v + m;
    long *through = NEW(long, 2 * m), *used = through + m; // the row by which a column is reached; its rows
    char* settled = NEW(char, m);
    for (long i = 0; i < n; i++) {
        long column = -1, next = -1;
        double reached = 0;
        heed_signals();
        for (long j = 0; j < m; j++) least[j] = INFINITY, through[j] = i, settled[j] = 0;
        order[i] = -1;
        do { // the column that is cheapest to reach; if it is full, one of its rows must find another
            for (long row = 0; row <= i; row++) {
                if (order[row] != column) continue;
                for (long j = 0; j < m; j++) {
                    double cost = reached - fit[row * m + j] - u[row] - v[j];
                    if (!settled[j] && cost < least[j]) least[j] = cost, through[j] = row;
                }
            }
            for (long j = next = 0; j < m; j++)
                if (!settled[j] && (settled[next] || least[j] < least[next])) next = j;
            column = next;
            reached = least[column];
            settled[column] = 1;
        } while (used[column] == room);
        for (long row = 0; row < i; row++)
            if (settled[order[row]] && order[row] != column) u[row] -= least[order[row]] - reached;
        for (long j = 0; j < m; j++)
            if (settled[j] && j != column) v[j] += least[j] - reached;
        u[i] += reached;
        used[column]++;
        for (long before; column >= 0; column = before) {
            before = order[through[column]];
            order[through[column]] = (int)column;
        }
    }
    free(u);
    free(through);
    free(settled);
}

// An expert (I, 3, H): of each unit the row of gate, the row of up and the column of down
static float* expert_units(const Source* s, int l, int e) {
    long H = s->config.hidden_size, I = s->config.moe_intermediate_size;
    float* units = floats(I * 3 * H);
    for (int matrix = GATE; matrix <= DOWN; matrix++) {
        float* w = view_whole(source_ffn(s, l, e, matrix));
        for (long u = 0; u < I; u++)
            for (long h = 0; h < H; h++) units[(u * 3 + matrix) * H + h] = w[matrix == DOWN ? h * I + u : u * H + h];
        free(w);
    }
    return units;
}

// The merged expert of layer l and group j, (I, 3, H)
static float* merge_group(const Plan* p, int l, int j) {
    const Source* s = p->sources[0];
    const double* load = p->score + (long)l * p->E;
    int *group = p->group + l * p->E, core = plan_source(p, l, j), members = 0;
    long I = s->config.moe_intermediate_size, n = 3L * s->config.hidden_size;
    float *first = expert_units(s, l, core), *merged = floats(I * n), *fit = floats(I * I);
    int* order = NEW(int, I);
    double total = 0;
    memcpy(merged, first, sizeof(float) * (size_t)(I * n));
    for (int e = 0; e < p->E; e++)
        if (group[e] == j) members++, total += load[e];
    for (int e = 0; e < p->E; e++) {
        if (group[e] != j || e == core) continue;
        float* x = expert_units(s, l, e);
        double w = total > 0 ? load[e] / total : 1.0 / members;
        matmul_forward(fit, first, x, (int)I, (int)n, (int)I);
        assign_units(order, fit, I, I, 1);
        for (long u = 0; u < I; u++)
            for (long k = 0; k < n; k++)
                merged[u * n + k] += (float)(w * ((double)x[order[u] * n + k] - first[u * n + k]));
        free(x);
    }
    free(first);
    free(fit);
    free(order);
    return merged;
}

// An expert of DST is W0 + sum over its group of w_i (P_i W_i - W0): W0 the core, P_i the alignment of units, w_i the
// share of the group's load (2409.01483).
static void merge_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    Merged* last = p->merged; // an expert's three matrices come one after the other
    long H = p->config.hidden_size;
    if (!last->units || last->layer != t->layer || last->expert != t->expert) {
        free(last->units);
        last->units = merge_group(p, last->layer = t->layer, last->expert = t->expert);
    }
    for (long i = 0; i < rows * t->cols; i++) {
        long r = row + i / t->cols, c = i % t->cols;
        out[i] = last->units[t->by_column ? (c * 3 + DOWN) * H + r : (r * 3 + t->matrix) * H + c];
    }
}
