/*
layers.c: each layer against a plain formula in double, its gradient against numeric differences of that formula, and
a batch in parts against the whole.
*/
typedef double (*Function)(const double* x, const void* context);

// central difference of f at x in direction i; f is evaluated in double, so that a small step is exact enough
static double numeric_derivative(Function f, double* x, long i, const void* context) {
    double h = 1e-5, kept = x[i];
    x[i] = kept + h;
    double up = f(x, context);
    x[i] = kept - h;
    double down = f(x, context);
    x[i] = kept;
    return (up - down) / (2 * h);
}

static double* to_double(const float* x, long n) {
    double* out = kept_doubles(n);
    for (long i = 0; i < n; i++) out[i] = x[i];
    return out;
}

// largest |got - numeric derivative| over every step-th of n inputs, relative to the largest derivative
static double gradient_error(Function f, const float* x, const float* got, long n, long step, const void* context) {
    double *point = to_double(x, n), worst = 0, scale = 1e-30;
    for (long i = 0; i < n; i += step) {
        double expected = numeric_derivative(f, point, i, context), error = fabs(got[i] - expected);
        if (!(error <= worst)) worst = error;
        scale = larger(scale, fabs(expected));
    }
    return worst / scale;
}

// RMSNorm. The inputs are x (N, groups, size), then weight (size); the value is <out, dout>.
typedef struct {
    int N, groups, size;
    const float* dout;
    double* out;
} NormContext;

static double norm_plain(const double* x, const void* context) {
    const NormContext* c = (const NormContext*)context;
    const double* weight = x + (long)c->N * c->groups * c->size;
    double value = 0;
    for (int v = 0; v < c->N * c->groups; v++) {
        double mean = 0;
        for (int i = 0; i < c->size; i++) mean += x[(long)v * c->size + i] * x[(long)v * c->size + i] / c->size;
        for (int i = 0; i < c->size; i++) {
            double out = weight[i] * x[(long)v * c->size + i] / sqrt(mean + 1e-5);
            if (c->out) c->out[(long)v * c->size + i] = out;
            value += out * c->dout[(long)v * c->size + i];
        }
    }
    return value;
}

static void test_rmsnorm(int groups, int size) {
    int N = RMSNORM_ROWS + 3, gap = 3; // two blocks of rows; rows of x are further apart than they are long
    long row = (long)groups * size, ld = row + gap, n = N * row;
    float *inputs = random_floats(n + size, 10), *x = random_floats(N * ld, 0), *out = random_floats(n, 0),
          *rstd = random_floats(N * groups, 0);
    float *dout = random_floats(n, 11), *gradient = random_floats(n + size, 12), *dx = random_floats(N * ld, 13),
          *weight = inputs + n;
    NormContext c = {N, groups, size, dout, kept_doubles(n)};
    for (int r = 0; r < N; r++) memcpy(x + r * ld, inputs + r * row, floats_bytes(row));
    rmsnorm_forward(out, row, rstd, x, ld, weight, N, groups, size, 1e-5f);
    double *point = to_double(inputs, n + size), worst = 0;
    norm_plain(point, &c);
    for (long i = 0; i < n; i++) worst = larger(worst, fabs(out[i] - c.out[i]));
    check(worst < 2e-6, "rmsnorm, %d groups of %d: forward, error %.1e", groups, size, worst);
    c.out = NULL;
    float *kept = random_floats(N * ld, 13), *sums = random_floats(rmsnorm_sums_size(N, size), 14);
    memset(gradient, 0, floats_bytes(n + size));
    rmsnorm_backward(dx, ld, 1, gradient + n, dout, row, x, ld, weight, rstd, N, groups, size, sums);
    for (int r = 0; r < N; r++)
        for (long i = 0; i < row; i++) gradient[r * row + i] = dx[r * ld + i] - kept[r * ld + i];
    worst = gradient_error(norm_plain, inputs, gradient, n + size, 1, &c);
    check(worst < 2e-6, "rmsnorm, %d groups of %d: gradients, added to what was there, error %.1e", groups, size,
          worst);
    memset(gradient + n, 0, floats_bytes(size));
    rmsnorm_backward(gradient, row, 0, gradient + n, dout, row, inputs, row, weight, rstd, N, groups, size, sums);
    worst = gradient_error(norm_plain, inputs, gradient, n + size, 1, &c);
    check(worst < 2e-6, "rmsnorm, %d groups of %d: gradients, overwriting, error %.1e", groups, size, worst);
}

static void test_rope(void) {
    int B = 2, T = 11, heads = 3, HD = 10, start = 5, N = B * T;
    long ld = heads * HD + 4;
    float *x = random_floats(N * ld, 20), *y = random_floats(N * ld, 20), *cosines = random_floats(40 * 5, 0),
          *sines = random_floats(40 * 5, 0);
    Config c = tiny_config(LLAMA, 1, 0, 0);
    c.head_dim = HD;
    c.rope_theta = 500;
    rope_table(cosines, sines, 40, &c);
    rope(y, ld, heads, N, T, start, HD, cosines, sines, 1);
    double worst = 0, back = 0, norm = 0, dot = 0;
    for (int n = 0; n < N; n++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < HD; i++) { // rotate_half: out = x cos + (-x2, x1) sin
                const float* v = x + n * ld + h * HD;
                double angle = (start + n % T) / pow(500.0, 2.0 * (i % 5) / HD);
                double half = i < 5 ? -v[i + 5] : v[i - 5];
                worst = larger(worst, fabs(y[n * ld + h * HD + i] - (v[i] * cos(angle) + half * sin(angle))));
            }
    check(worst < 1e-6, "rope: rotate_half at positions from %d on, error %.1e", start, worst);
    int outside = 1;
    for (int n = 0; n < N; n++) outside &= !memcmp(x + n * ld + heads * HD, y + n * ld + heads * HD, floats_bytes(4));
    check(outside, "rope: leaves what stands between the rows alone");
    // a rotation's gradient is its transpose: <rope(x), g> = <x, rope'(g)>
    float *g = random_floats(N * ld, 21), *dx = random_floats(N * ld, 21);
    rope(dx, ld, heads, N, T, start, HD, cosines, sines, -1);
    for (int n = 0; n < N; n++)
        for (int i = 0; i < heads * HD; i++) {
            dot += (double)y[n * ld + i] * g[n * ld + i];
            back += (double)x[n * ld + i] * dx[n * ld + i];
            norm += fabs((double)y[n * ld + i] * g[n * ld + i]);
        }
    check(fabs(dot - back) < 1e-6 * norm, "rope: backward is the transpose");
    double w[8], factor;
    RopeScaling r = {ROPE_YARN, 4, 64, 1, 32, 0.7, 0, 0, 1};
    factor = rope_frequencies(w, &r, 16, 500);
    check(factor == 0.7 && w[0] == 1 && w[7] < pow(500, -7 / 8.0) / 3.99, 
          "rope: a multiplier that is given; yarn's ends");
}

// SwiGLU and its gate. Inputs: gate_up (rows, 2, I), then one gate for each row; value: <gate act, dact>.
typedef struct {
    int rows, I;
    const float* dact;
} SwigluContext;

static double swiglu_plain(const double* x, const void* context) {
    const SwigluContext* c = (const SwigluContext*)context;
    double value = 0;
    for (int r = 0; r < c->rows; r++)
        for (int i = 0; i < c->I; i++) {
            double g = x[(long)r * 2 * c->I + i], u = x[(long)r * 2 * c->I + c->I + i];
            value += x[(long)c->rows * 2 * c->I + r] * g / (1 + exp(-g)) * u * c->dact[(long)r * c->I + i];
        }
    return value;
}

static void test_swiglu(void) {
    int rows = 6, I = 13, assignment[] = {3, 0, 5, 1, 4, 2};
    long n = (long)rows * 2 * I;
    float *inputs = random_floats(n + rows, 30), *act = random_floats(rows * I, 0), *gated = random_floats(rows * I, 0);
    float *dact = random_floats(rows * I, 31), *gradient = random_floats(n + rows, 0), gates[6], dgates[6];
    for (long i = 0; i < n; i++) inputs[i] *= 8; // far out, where sigmoid saturates, as well
    for (int r = 0; r < rows; r++) gates[assignment[r]] = inputs[n + r];
    swiglu_forward(act, inputs, rows, I);
    double worst = 0;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < I; i++) {
            double g = inputs[(long)r * 2 * I + i], u = inputs[(long)r * 2 * I + I + i];
            worst = larger(worst, fabs(act[r * I + i] - g / (1 + exp(-g)) * u));
        }
    check(worst < 1e-5, "swiglu: forward, error %.1e of values up to 64", worst);
    SwigluContext c = {rows, I, dact};
    swiglu_backward(gradient, gated, dgates, dact, inputs, gates, assignment, rows, I);
    for (int r = 0; r < rows; r++) gradient[n + r] = dgates[assignment[r]];
    worst = gradient_error(swiglu_plain, inputs, gradient, n + rows, 1, &c);
    check(worst < 2e-6, "swiglu: gradients of gate_up and of the experts' gates, error %.1e", worst);
    worst = 0;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < I; i++)
            worst = larger(worst, fabs(gated[r * I + i] - (double)gates[assignment[r]] * act[r * I + i]));
    check(worst < 1e-5, "swiglu: backward makes gate * act again, error %.1e", worst);
    swiglu_backward(inputs, gated, dgates, dact, inputs, gates, assignment, rows, I);
    check(same_floats(inputs, gradient, n), "swiglu: backward in place has the same bits");
}

typedef struct {
    int N, V;
    const int* targets;
} EntropyContext;

static double entropy_plain(const double* x, const void* context) {
    const EntropyContext* c = (const EntropyContext*)context;
    double value = 0;
    for (int n = 0; n < c->N; n++) {
        double sum = 0;
        for (int v = 0; v < c->V; v++) sum += exp(x[(long)n * c->V + v]);
        value += (log(sum) - x[(long)n * c->V + c->targets[n]]) / c->N;
    }
    return value;
}

static void test_cross_entropy(void) {
    int N = 9, V = 37, targets[9];
    float *logits = random_floats(N * V, 40), *gradient = random_floats(N * V, 40), losses[9], lse[9], sum = 0;
    for (int n = 0; n < N; n++) targets[n] = (n * 11) % V;
    for (int i = 0; i < N * V; i++) logits[i] = gradient[i] = 6 * logits[i];
    EntropyContext c = {N, V, targets};
    double *point = to_double(logits, N * V), expected = entropy_plain(point, &c);
    cross_entropy_forward(losses, lse, logits, targets, N, V);
    for (int n = 0; n < N; n++) sum += losses[n] / N;
    check(fabs(sum - expected) < 2e-6, "cross-entropy: forward, error %.1e", fabs(sum - expected));
    cross_entropy_backward(gradient, lse, targets, N, V, 1.0f / N);
    double worst = gradient_error(entropy_plain, logits, gradient, N * V, 1, &c);
    check(worst < 2e-6, "cross-entropy: gradient, error %.1e", worst);
    for (int i = 0; i < N * V; i++) logits[i] = i % V == 3 ? 1000.0f : -1000.0f * (float)(i % 5);
    cross_entropy_forward(losses, lse, logits, targets, N, V);
    check(losses[0] == 1000 && isfinite(losses[4]) && lse[0] == 1000, "cross-entropy: logits of 1000 do not overflow");
}

// Attention. Inputs: q (B, T, NH, HD), k, v (B, T, NKV, HD) one behind the other; value: <out, dout>.
typedef struct {
    int B, T, NH, NKV, HD;
    const float* dout;
    double *out, *lse;
} AttentionContext;

static double attention_plain(const double* x, const void* context) {
    const AttentionContext* c = (const AttentionContext*)context;
    int T = c->T, HD = c->HD;
    long nq = (long)c->B * T * c->NH * HD, nk = (long)c->B * T * c->NKV * HD;
    double value = 0, *p = (double*)checked_malloc(sizeof(double) * (size_t)T);
    for (int b = 0; b < c->B; b++)
        for (int h = 0; h < c->NH; h++)
            for (int i = 0; i < T; i++) {
                int kv = h * c->NKV / c->NH;
                const double* q = x + (((long)b * T + i) * c->NH + h) * HD;
                double sum = 0;
                for (int j = 0; j <= i; j++) {
                    const double* k = x + nq + (((long)b * T + j) * c->NKV + kv) * HD;
                    p[j] = 0;
                    for (int d = 0; d < HD; d++) p[j] += q[d] * k[d] / sqrt(HD);
                    sum += p[j] = exp(p[j]);
                }
                if (c->lse) c->lse[((long)b * c->NH + h) * T + i] = log(sum);
                for (int d = 0; d < HD; d++) {
                    double out = 0;
                    for (int j = 0; j <= i; j++)
                        out += p[j] / sum * x[nq + nk + (((long)b * T + j) * c->NKV + kv) * HD + d];
                    long at = (((long)b * T + i) * c->NH + h) * HD + d;
                    if (c->out) c->out[at] = out;
                    value += out * c->dout[at];
                }
            }
    free(p); // at once: gradients come from many calls
    return value;
}

static void test_attention(int B, int T, int NH, int NKV, int HD) {
    long nq = (long)B * T * NH * HD, nk = (long)B * T * NKV * HD, n = nq + 2 * nk, QK = (NH + NKV) * HD + 2,
         QKV = (NH + 2 * NKV) * HD;
    int N = B * T;
    float *inputs = random_floats(n, 50), *qk = random_floats(N * QK, 0), *qkv = random_floats(N * QKV, 0),
          *gradient = random_floats(n, 0);
    float *out = random_floats(nq, 0), *lse = random_floats((long)B * NH * T, 0), *dout = random_floats(nq, 51);
    float *dqk = random_floats(N * QK, 52), *dqkv = random_floats(N * QKV, 53),
          *scratch = random_floats(attention_scratch_size(T), 54);
    for (long i = 0; i < n; i++) inputs[i] *= 3;
    for (int t = 0; t < N; t++) { // as in the model: queries and keys in one array, values in another
        memcpy(qk + t * QK, inputs + (long)t * NH * HD, floats_bytes(NH * HD));
        memcpy(qk + t * QK + NH * HD, inputs + nq + (long)t * NKV * HD, floats_bytes(NKV * HD));
        memcpy(qkv + t * QKV + (NH + NKV) * HD, inputs + nq + nk + (long)t * NKV * HD,
               floats_bytes(NKV * HD));
    }
    const float *k = qk + NH * HD, *v = qkv + (NH + NKV) * HD;
    AttentionContext c = {B,
                          T,
                          NH,
                          NKV,
                          HD,
                          dout,
                          kept_doubles(nq),
                          kept_doubles(B * NH * T)};
    attention_forward(out, lse, qk, QK, k, QK, v, QKV, B, T, T, NH, NKV, HD, scratch);
    double *point = to_double(inputs, n), worst = 0;
    attention_plain(point, &c);
    for (long i = 0; i < nq; i++) worst = larger(worst, fabs(out[i] - c.out[i]));
    for (long i = 0; i < (long)B * NH * T; i++) worst = larger(worst, fabs(lse[i] - c.lse[i]));
    check(worst < 5e-6, "attention, T = %d, %d heads on %d: forward, error %.1e", T, NH, NKV, worst);
    c.out = c.lse = NULL;
    attention_backward(dqk, dqk + NH * HD, dqkv + (NH + NKV) * HD, dout, out, lse, qk, QK, k, QK, v, QKV, QK, QKV, B, T,
                       NH, NKV, HD, scratch);
    for (int t = 0; t < N; t++) {
        memcpy(gradient + (long)t * NH * HD, dqk + t * QK, floats_bytes(NH * HD));
        memcpy(gradient + nq + (long)t * NKV * HD, dqk + t * QK + NH * HD, floats_bytes(NKV * HD));
        memcpy(gradient + nq + nk + (long)t * NKV * HD, dqkv + t * QKV + (NH + NKV) * HD,
               floats_bytes(NKV * HD));
    }
    worst = gradient_error(attention_plain, inputs, gradient, n, n / 150 | 1, &c);
    check(worst < 5e-6, "attention, T = %d, %d heads on %d: 150 of the gradient's numbers, error %.1e", T, NH, NKV,
          worst);
    // all numbers of the gradient at once: the derivative along a random direction
    float* direction = random_floats(n, 55);
    double along = 0, h = 1e-5;
    for (long i = 0; i < n; i++) {
        along += (double)gradient[i] * direction[i];
        point[i] = inputs[i] + h * direction[i];
    }
    double up = attention_plain(point, &c);
    for (long i = 0; i < n; i++) point[i] = inputs[i] - h * direction[i];
    double expected = (up - attention_plain(point, &c)) / (2 * h);
    check(fabs(along - expected) < 1e-4 * (1 + fabs(expected)), "attention, T = %d: derivative along a direction, %.5f",
          T, along);
}

// All scores of a query are -infinity: their softmax is not a number, and must not look like one.
static void test_attention_overflow(int T) {
    int HD = 8;
    float *q = random_floats(T * HD, 0), *k = random_floats(T * HD, 0), *v = random_floats(T * HD, 0),
          *out = random_floats(T * HD, 0), *lse = random_floats(T, 0),
          *scratch = random_floats(attention_scratch_size(T), 56);
    for (int i = 0; i < T * HD; i++) {
        q[i] = 1e20f;
        k[i] = -1e20f;
    }
    attention_forward(out, lse, q, HD, k, HD, v, HD, 1, T, T, 1, 1, HD, scratch);
    check(isnan(out[(T - 1) * HD]), "attention, T = %d: scores that overflow show in the output", T);
}

static void test_accumulation(void) {
    enum { B = 6, T = 40 };
    int tokens[B * T], targets[B * T];
    Config c = tiny_config(QWEN3_MOE, 2, 5, 2);
    Model* m = new_model(&c, FOR_TRAINING, B, T);
    model_init(m, 3);
    for (long i = 0; i < m->layout.total; i++) m->params[i] *= i < m->layout.matrices ? 8 : 1; // far from symmetric
    fill_tokens(tokens, B * T, 50, 1);
    fill_tokens(targets, B * T, 50, 2);
    double whole = model_forward(m, tokens, targets, B, T), parts = 0;
    model_backward(m, 1);
    float* expected = copy_floats(m->grads, m->layout.total);
    memset(m->grads, 0, floats_bytes(m->layout.total));
    for (int micro = 0; micro < 3; micro++) {
        parts += model_forward(m, tokens + micro * 2 * T, targets + micro * 2 * T, 2, T) / 3;
        model_backward(m, 1.0f / 3);
    }
    double error = relative_error(m->grads, expected, m->layout.total);
    check(fabs(whole - parts) < 1e-5, "accumulation: the loss of three batches is that of one, %.6f and %.6f", parts,
          whole);
    check(error < 1e-5, "accumulation: the gradient of three batches is that of one, relative error %.1e", error);
}

static void test_gradients(void) {
    test_rmsnorm(1, 37);
    test_rmsnorm(3, 8);
    test_rope();
    test_swiglu();
    test_cross_entropy();
    test_attention(2, 83, 6, 2, 10);
    test_attention(1, 100, 3, 3, 6);
    test_attention(1, 70, 4, 1, 16);
    test_attention_overflow(15);
    test_attention_overflow(16);
    test_accumulation();
}
