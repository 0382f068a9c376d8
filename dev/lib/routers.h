// routers.h: every router but softmax top-K. Needs train_moe.c's Model and its layers.
//
// Everything that a router can be besides softmax top-K. Two things can happen to the logits z on their way to the
// choice, in this order, and there are two kinds of scores besides softmax:
//
//     logit norm    z' = lambda (z - mean z) / (std z + 1e-6)                                             Skywork-MoE
//     families      z'_e = z_e - penalty for every copy of an expert but the best one                        see below
//     sigmoid       s = sigmoid(z'), the K largest s + bias are chosen, gates from s alone                 DeepSeek-V3
//     LPR           z = cosine of an encoding of the token and a prototype of the expert       Latent Prototype Routing
//     dynamic       softmax(z'), whose entropy says how many experts a token gets                               DynMoLE
//
// variant_router_forward and variant_router_backward at the end of this file put them together.
#pragma once

// z' (N, E) = lambda (z - mean) / (std + 1e-6), with each token's mean and (population) standard deviation over the
// experts (Wei et al. 2024, 2406.06563, section 3.1)
static void logit_norm_forward(float* out, const float* z, int N, int E, float lambda) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* z_n = z + (long)n * E;
        double mean = 0, square = 0;
        for (int e = 0; e < E; e++) mean += (double)z_n[e] / E;
        for (int e = 0; e < E; e++) square += (z_n[e] - mean) * (z_n[e] - mean) / E;
        for (int e = 0; e < E; e++) out[(long)n * E + e] = (float)(lambda * (z_n[e] - mean) / (sqrt(square) + 1e-6));
    }
}

// In place: the gradient of z' becomes that of z. With c = z - mean, r = std + 1e-6:
//     dc_e = lambda / r (dz'_e - c_e sum_j(dz'_j c_j) / (E std r))            dz_e = dc_e - mean(dc)
static void logit_norm_backward(float* dz, const float* z, int N, int E, float lambda) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* z_n = z + (long)n * E;
        float* dz_n = dz + (long)n * E;
        double mean = 0, square = 0, along = 0, dmean = 0;
        for (int e = 0; e < E; e++) mean += (double)z_n[e] / E;
        for (int e = 0; e < E; e++) square += (z_n[e] - mean) * (z_n[e] - mean) / E;
        for (int e = 0; e < E; e++) along += dz_n[e] * (z_n[e] - mean);
        double std = sqrt(square), r = std + 1e-6;
        for (int e = 0; e < E; e++) {
            double through_std = std > 0 ? (z_n[e] - mean) * along / (E * std * r) : 0;
            dz_n[e] = (float)(lambda / r * (dz_n[e] - through_std));
            dmean += (double)dz_n[e] / E;
        }
        for (int e = 0; e < E; e++) dz_n[e] -= (float)dmean;
    }
}

// Families. Copies of one expert score alike, so plain top-K would pick the copies of the best expert and not the K
// best experts. A penalty on all members of a family but its best one puts that off: while it is infinite, at most one
// copy of each expert is chosen and every gate is what it was before the copying, so the model computes what it did
// before. Equal members, as exact copies are at first, are told apart by a hash of (layer, position in the sequence,
// family): so copies see different tokens, and a cache, a resumed run and a GPU agree. In place; the gradient passes
// unchanged. scores (N, E): what the best member has most of: z, or sigmoid(z) + bias. shift (N, E): what was
// subtracted, 0 or the penalty. family (E): each expert's family. Row n is at position start + n % T of its sequence.
static void penalise_families(float* z, float* shift, const float* scores, const int* family, float penalty, int layer,
                              int N, int T, int start, int E) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* scores_n = scores + (long)n * E;
        for (int e = 0; e < E; e++) {
            int beaten = 0, tied = 0, before = 0;       // is a member better; members that equal e; those ahead of e
            for (int j = 0; j < E; j++) {
                if (family[j] != family[e]) continue;
                beaten |= scores_n[j] > scores_n[e];
                tied += scores_n[j] == scores_n[e];
                before += scores_n[j] == scores_n[e] && j < e;
            }
            uint64_t hash = random_key(0x46414D, (uint64_t)layer, (uint64_t)(start + n % T), (uint64_t)family[e]);
            int best = !beaten && before == (int)((hash >> 32) % (uint64_t)(tied > 0 ? tied : 1));
            shift[(long)n * E + e] = best ? 0 : penalty;
            z[(long)n * E + e] -= shift[(long)n * E + e];
        }
    }
}

// The penalty in step t of S: infinite at first, then strength (S / t - 1), nothing from S on.
static double family_penalty_at(double strength, long t, long S) {
    if (t >= S) return 0;
    return t == 0 ? INFINITY : strength * ((double)S / (double)t - 1);
}

// scores (N, E) = sigmoid(z) + bias, by which experts are chosen; bias (E)
static void sigmoid_scores(float* scores, const float* z, const float* bias, int N, int E) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int e = 0; e < E; e++) scores[(long)n * E + e] = 1.0f / (1.0f + fast_exp(-z[(long)n * E + e])) + bias[e];
}

// Sigmoid scores with a bias that balances the load without a loss (DeepSeek-V3, 2412.19437; Wang et al., 2408.15664):
//     s = sigmoid(z)     S = the K experts with the largest s + bias - shift
//     gate_e = scaling s_e, or scaling s_e / sum over S of s
// The bias takes part in nothing else. probs (N, E) = s / sum of s stands in for the probabilities in the balance loss;
// lse (N) = logsumexp(z). shift (N, E) or NULL is what families subtracted from z: it is taken from s + bias as well,
// because s of a penalised expert tends to 0, but s + bias would not fall below all others.
static void sigmoid_router_forward(float* probs, float* lse, int* experts, float* gates, const float* z,
                                   const float* bias, const float* shift, int N, int E, int K, int norm_topk,
                                   float scaling) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* z_n = z + (long)n * E;
        float *p = probs + (long)n * E, *gates_n = gates + (long)n * K, max = z_n[0], exp_sum = 0, sum = 0,
              gate_sum = 0;
        int* experts_n = experts + (long)n * K;
        for (int e = 1; e < E; e++) max = z_n[e] > max ? z_n[e] : max;
        for (int e = 0; e < E; e++) exp_sum += fast_exp(z_n[e] - max);
        lse[n] = max + logf(exp_sum);
        for (int e = 0; e < E; e++)
            p[e] = 1.0f / (1.0f + fast_exp(-z_n[e])) + bias[e] - (shift ? shift[(long)n * E + e] : 0);
        choose_topk(experts_n, p, E, K);
        for (int e = 0; e < E; e++) sum += p[e] = 1.0f / (1.0f + fast_exp(-z_n[e]));
        for (int k = 0; k < K; k++) gate_sum += gates_n[k] = p[experts_n[k]];
        for (int k = 0; k < K; k++) gates_n[k] = scaling * (norm_topk ? gates_n[k] / gate_sum : gates_n[k]);
        for (int e = 0; e < E; e++) p[e] /= sum;
    }
}

// dz (N, E) from dgates (N, K), and from the balance losses (aux_weight, z_weight and f as in balance_backward):
//     renormalised: ds_e = (scaling dgate_e - sum over S of gate_j dgate_j) / sum over S of s
//     otherwise:    ds_e = scaling dgate_e
//     balance:      ds_e += aux_weight (f_e - sum_j f_j p_j) / sum of s,  p = s / sum of s
//     dz_e = ds_e s_e (1 - s_e) + z_weight lse exp(z_e - lse)
static void sigmoid_router_backward(float* dz, const float* dgates, const float* z, const float* probs,
                                    const float* lse, const int* experts, const float* gates, const double* f,
                                    double aux_weight, double z_weight, int N, int E, int K, int norm_topk,
                                    float scaling) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *z_n = z + (long)n * E, *p = probs + (long)n * E, *gates_n = gates + (long)n * K;
        const float* dgates_n = dgates + (long)n * K;
        const int* experts_n = experts + (long)n * K;
        float *dz_n = dz + (long)n * E, sum = 0, chosen_sum = 0, mean = 0;
        double f_mean = 0;
        for (int e = 0; e < E; e++) {
            sum += 1.0f / (1.0f + fast_exp(-z_n[e]));
            f_mean += f[e] * p[e];
        }
        for (int e = 0; e < E; e++) dz_n[e] = (float)(aux_weight * (f[e] - f_mean)) / sum;
        for (int k = 0; k < K; k++) {
            chosen_sum += 1.0f / (1.0f + fast_exp(-z_n[experts_n[k]]));
            mean += gates_n[k] * dgates_n[k];
        }
        for (int k = 0; k < K; k++) {
            float dgate = scaling * dgates_n[k];
            dz_n[experts_n[k]] += norm_topk ? (dgate - mean) / chosen_sum : dgate;
        }
        for (int e = 0; e < E; e++) {
            float s = 1.0f / (1.0f + fast_exp(-z_n[e]));
            dz_n[e] = dz_n[e] * s * (1.0f - s) + (float)z_weight * lse[n] * fast_exp(z_n[e] - lse[n]);
        }
    }
}

// Three rules move the bias, once a step, each from the whole batch. The last two centre it: only differences count.
//     sign        b_e += rate sign(mean load - load_e)                                  (Wang et al. 2024, algorithm 1)
//     quantile    b_e = -beta_e, which s_e - alpha exceeds for N K / E of the N tokens; alpha = a token's (K + 1)-th
//                 largest s + b. A step towards the optimal balanced assignment      (Su 2026, kexue.fm/archives/11619)
//     id          b_e += rate (err_e + [err'_e d_e > 0] d_e),  err_e = 1 - load_e / mean load, err' = that of the step
//                 before, d = err - err': its change counts while it grows                                 (2609.39137)
typedef enum { BIAS_SIGN, BIAS_QUANTILE, BIAS_ID } BiasRule;

static void centre_bias(float* bias, int E) {
    double mean = 0;
    for (int e = 0; e < E; e++) mean += (double)bias[e] / E;
    for (int e = 0; e < E; e++) bias[e] = (float)(bias[e] - mean);
}

// rule id. counts, bias (E); last (E): the counts of the step before, all 0 in the first, and then those of this one
static void update_bias_by_error(float* bias, const long* counts, long* last, int E, double rate) {
    double total = 0, before = 0;
    for (int e = 0; e < E; e++) total += (double)counts[e], before += (double)last[e];
    for (int e = 0; e < E; e++) {
        double error = 1 - (double)counts[e] * E / total, old = before > 0 ? 1 - (double)last[e] * E / before : 0;
        double change = error - old;
        bias[e] += (float)(rate * (error + (old * change > 0 ? change : 0)));
        last[e] = counts[e];
    }
    centre_bias(bias, E);
}

// Whole numbers as floats, in the same order.
ALSO_ON_GPU static float float_in_order(uint32_t key) {
    uint32_t bits = key >> 31 ? key ^ 0x80000000u : ~key;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Of N finite numbers, `stride` floats apart, the one that `rank` others exceed. Its bits are found from the highest
// on, by counting: exactly, and whatever the order of the numbers.
static float number_of_rank(const float* x, long stride, int N, long rank) {
    uint32_t found = 0;
    for (int bit = 31; bit >= 0; bit--) {
        float tried = float_in_order(found | 1u << bit);
        long reached = 0;
        for (int n = 0; n < N; n++) reached += x[n * stride] >= tried;
        if (reached > rank) found |= 1u << bit;
    }
    return float_in_order(found);
}

// Rule quantile: cutoffs (E) += beta of one micro-batch; a step takes the mean of its micro-batches'. z (N, E),
// bias (E); work: N E floats
static void add_cutoffs(double* cutoffs, float* work, const float* z, const float* bias, int N, int E, int K) {
    if (K == E) return;                                 // all are chosen, whatever the bias
    sigmoid_scores(work, z, bias, N, E);
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        float *work_n = work + (long)n * E, alpha = number_of_rank(work_n, 1, E, K);
        for (int e = 0; e < E; e++) work_n[e] -= bias[e] + alpha;
    }
    #pragma omp parallel for
    for (int e = 0; e < E; e++) cutoffs[e] += number_of_rank(work + e, E, N, (long)N * K / E);
}

// rule sign. counts, bias (E)
static void update_router_bias(float* bias, const long* counts, int E, double rate) {
    long total = 0;
    for (int e = 0; e < E; e++) total += counts[e];
    for (int e = 0; e < E; e++) {
        long over = counts[e] * E - total;              // E (load - mean load), exactly: an expert at the mean stays
        bias[e] += (float)(over < 0 ? rate : over > 0 ? -rate : 0);
    }
}

// The balance loss's coefficient can follow each layer's imbalance (Skywork-MoE, 2406.06563, section 3.2):
//     coefficient <- .99 coefficient + .01 min(imbalance / 5, .01),       imbalance = 1/2 sum_e |f_e - 1/E|
// where the paper's rate of dropped tokens becomes the share of assignments over an even load, as nothing is dropped
// here.
static double adapted_aux(double coefficient, const long* counts, int E) {
    double total = 0, imbalance = 0;
    for (int e = 0; e < E; e++) total += (double)counts[e];
    for (int e = 0; e < E; e++) imbalance += 0.5 * fabs((double)counts[e] / total - 1.0 / E);
    return 0.99 * coefficient + 0.01 * fmin(imbalance / 5, 0.01);
}

// Latent Prototype Routing (Yang 2025, 2506.21328). A token and an expert meet in a space of D dimensions:
//     a = silu(LayerNorm(h))        [mu, logvar] = a W_enc^T + b_enc        score_e = cos(mu, prototype_e)
//     chosen = the K best scores, gates = softmax over them      read_out = sum over e of softmax(score)_e prototype_e
//     the experts' input is  h + read_out W_out^T + b_out,  and the objective gets
//     weight (diversity (Div(mu) + Div(prototypes)) + kl KL + align Align)
//     Div(X) = mean over pairs (i, j) of (n_i n_j - [i = j])^2, n = x / |x|. Over T tokens it is
//              (|Xn^T Xn|^2 - T) / T^2, which needs a D x D matrix and not a T x T one
//     KL = mean over tokens of -1/2 sum(1 + logvar - mu^2 - exp(logvar))
//     Align = mean over (e, d) of |prototype_e - target_e|; the target is a constant:
//             target_e = sum over tokens of rho_e (mu + exp(logvar / 2) eps), rho = softmax over all experts of the
//             scores of the chosen ones and 0 for the others

#define LPR_EPS 1e-5f           // of the LayerNorm

// a (N, H) = silu(LayerNorm(h)); mean, rstd (N) are kept
static void lpr_normalise_forward(float* a, float* mean, float* rstd, const float* h, const float* weight,
                                  const float* bias, int N, int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* h_n = h + (long)n * H;
        float sum = 0, square = 0;
        for (int i = 0; i < H; i++) sum += h_n[i];
        float m = sum / H;
        for (int i = 0; i < H; i++) square += (h_n[i] - m) * (h_n[i] - m);
        float r = 1.0f / sqrtf(square / H + LPR_EPS);
        for (int i = 0; i < H; i++) {
            float u = (h_n[i] - m) * r * weight[i] + bias[i];
            a[(long)n * H + i] = u / (1.0f + fast_exp(-u));
        }
        mean[n] = m;
        rstd[n] = r;
    }
}

// dh += the gradient of h; da (N, H) is overwritten by the gradient of u, the LayerNorm's output.
//     silu'(u) = s (1 + u (1 - s))      dh = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)),  dxhat = du weight
static void lpr_normalise_backward(float* dh, float* dweight, float* dbias, float* da, const float* h,
                                   const float* mean, const float* rstd, const float* weight, const float* bias, int N,
                                   int H) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* h_n = h + (long)n * H;
        float *du = da + (long)n * H, d_mean = 0, d_along = 0;
        for (int i = 0; i < H; i++) {
            float xhat = (h_n[i] - mean[n]) * rstd[n], u = xhat * weight[i] + bias[i], s = 1.0f / (1.0f + fast_exp(-u));
            du[i] *= s * (1.0f + u * (1.0f - s));
            d_mean += du[i] * weight[i] / H;
            d_along += du[i] * weight[i] * xhat / H;
        }
        for (int i = 0; i < H; i++) {
            float xhat = (h_n[i] - mean[n]) * rstd[n];
            dh[(long)n * H + i] += rstd[n] * (du[i] * weight[i] - d_mean - xhat * d_along);
        }
    }
    #pragma omp parallel for
    for (int i = 0; i < H; i++)
        for (int n = 0; n < N; n++) {
            dweight[i] += da[(long)n * H + i] * (h[(long)n * H + i] - mean[n]) * rstd[n];
            dbias[i] += da[(long)n * H + i];
        }
}

static void add_bias(float* x, const float* bias, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++)
        for (int i = 0; i < C; i++) x[(long)n * C + i] += bias[i];
}

static void add_bias_gradient(float* dbias, const float* dx, int N, int C) {
    for (int n = 0; n < N; n++)
        for (int i = 0; i < C; i++) dbias[i] += dx[(long)n * C + i];
}

static float norm_of(const float* x, int D) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += x[d] * x[d];
    return sqrtf(sum);
}

// scores (N, E) = cosines of mu (the first half of each row of encoded (N, 2 D)) and prototypes (E, D)
static void lpr_scores(float* scores, const float* encoded, const float* prototypes, int N, int E, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* mu = encoded + (long)n * 2 * D;
        float length = norm_of(mu, D);
        for (int e = 0; e < E; e++) {
            const float* p = prototypes + (long)e * D;
            float dot = 0;
            for (int d = 0; d < D; d++) dot += mu[d] * p[d];
            scores[(long)n * E + e] = dot / (length * norm_of(p, D));
        }
    }
}

// With n = mu / |mu| and q = p / |p|:    dmu += dscore (q - score n) / |mu|        dp += dscore (n - score q) / |p|
static void lpr_scores_backward(float* dencoded, float* dprototypes, const float* dscores, const float* scores,
                                const float* encoded, const float* prototypes, int N, int E, int D) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* mu = encoded + (long)n * 2 * D;
        float length = norm_of(mu, D);
        for (int e = 0; e < E; e++) {
            const float* p = prototypes + (long)e * D;
            float p_length = norm_of(p, D), score = scores[(long)n * E + e], dscore = dscores[(long)n * E + e];
            for (int d = 0; d < D; d++)
                dencoded[(long)n * 2 * D + d] += dscore * (p[d] / p_length - score * mu[d] / length) / length;
        }
    }
    #pragma omp parallel for
    for (int e = 0; e < E; e++) {
        const float* p = prototypes + (long)e * D;
        float p_length = norm_of(p, D);
        for (int n = 0; n < N; n++) {
            const float* mu = encoded + (long)n * 2 * D;
            float length = norm_of(mu, D), score = scores[(long)n * E + e], dscore = dscores[(long)n * E + e];
            for (int d = 0; d < D; d++)
                dprototypes[(long)e * D + d] += dscore * (mu[d] / length - score * p[d] / p_length) / p_length;
        }
    }
}

// The diversity of M vectors of D numbers, row_step floats apart, and (if dx is not NULL) weight times its gradient
// added to dx. With n = x / |x| and G = Xn^T Xn (gram, (D, D)):
//     Div = (sum of G^2 - M) / M^2        dx += weight 4 / M^2 (G n - (n G n) n) / |x|
// The gradient by n is 4 (G n - n) / M^2; as |n| = 1, its part along n is lost.
static double lpr_diversity(float* dx, double* gram, const float* x, long row_step, int M, int D, double weight) {
    double sum = 0;
    memset(gram, 0, sizeof(double) * (size_t)D * (size_t)D);
    for (int i = 0; i < M; i++) {
        const float* x_i = x + i * row_step;
        double square = 0;
        for (int d = 0; d < D; d++) square += (double)x_i[d] * x_i[d];
        for (int d = 0; d < D; d++)
            for (int k = 0; k < D; k++) gram[d * D + k] += x_i[d] * x_i[k] / square;
    }
    for (int i = 0; i < D * D; i++) sum += gram[i] * gram[i];
    for (int i = 0; dx && i < M; i++) {
        const float* x_i = x + i * row_step;
        double square = 0, along = 0;
        for (int d = 0; d < D; d++) square += (double)x_i[d] * x_i[d];
        for (int d = 0; d < D; d++)
            for (int k = 0; k < D; k++) along += gram[d * D + k] * x_i[d] * x_i[k] / square;
        for (int d = 0; d < D; d++) {
            double g = 0;
            for (int k = 0; k < D; k++) g += gram[d * D + k] * x_i[k];
            dx[i * row_step + d] += (float)(weight * 4 / ((double)M * M) * (g - along * x_i[d]) / square);
        }
    }
    return (sum - M) / ((double)M * M);
}

// The noise of Align: N(0, 1) for token n and dimension d of a layer, a hash of what it is for.
ALSO_ON_GPU static float lpr_noise(uint64_t layer_key, long n, int d, int D) {
    return (float)random_normal(mix64(layer_key ^ (uint64_t)(n * D + d)));
}

// KL, and the targets of Align: target (E, D) = sum (or mean) over tokens of rho_e (mu + exp(logvar / 2) eps)
static double lpr_targets(double* targets, const float* encoded, const float* scores, const int* experts,
                          uint64_t layer_key, int mean, int N, int E, int K, int D) {
    double kl = 0;
    for (long i = 0; i < (long)E * D; i++) targets[i] = 0;
    for (int n = 0; n < N; n++) {
        const float *mu = encoded + (long)n * 2 * D, *logvar = mu + D;
        const int* experts_n = experts + (long)n * K;
        double sum = E - K;                             // exp(0) for each expert that was not chosen
        for (int k = 0; k < K; k++) sum += exp((double)scores[(long)n * E + experts_n[k]]);
        for (int d = 0; d < D; d++) {
            double var = exp((double)logvar[d]), z = mu[d] + sqrt(var) * lpr_noise(layer_key, n, d, D);
            kl -= 0.5 * (1 + logvar[d] - (double)mu[d] * mu[d] - var) / N;
            if (mean) z /= N;
            for (int e = 0; e < E; e++) targets[(long)e * D + d] += z / sum;
            for (int k = 0; k < K; k++)
                targets[(long)experts_n[k] * D + d] += z * (exp((double)scores[(long)n * E + experts_n[k]]) - 1) / sum;
        }
    }
    return kl;
}

// LPR's part of the objective for one layer, and its targets for the backward pass.
static void lpr_losses_forward(Model* m, int l) {
    const Config* c = &m->config;
    LayerActivations* s = &m->layers[l];
    const LayerWeights* w = &m->weights.layers[l];
    int N = m->batch * m->length, E = c->num_experts, D = c->router.lpr_latent_dim;
    uint64_t layer_key = random_key(m->noise_seed, 0x4C5052, (uint64_t)m->noise_step, (uint64_t)l);
    double kl = lpr_targets(s->lpr_targets, s->lpr_encoded, s->router_logits, s->experts, layer_key,
                            c->router.lpr_align_mean, N, E, m->topk[l], D);
    double align = 0, *gram = m->scratch.lpr_gram;
    for (long i = 0; i < (long)E * D; i++) align += fabs(w->lpr_prototypes[i] - s->lpr_targets[i]) / ((double)E * D);
    double diversity = lpr_diversity(NULL, gram, s->lpr_encoded, 2 * D, N, D, 0) +
                       lpr_diversity(NULL, gram, w->lpr_prototypes, D, E, D, 0);
    const RouterConfig* r = &c->router;
    m->lpr_loss += r->lpr_weight * (r->lpr_diversity * diversity + r->lpr_kl * kl + r->lpr_align * align);
}

// Adds the gradient of scale * that objective to dencoded (N, 2 D) and to the prototypes' gradient.
static void lpr_losses_backward(Model* m, int l, float* dencoded, double scale) {
    const Config* c = &m->config;
    LayerActivations* s = &m->layers[l];
    float *prototypes = m->weights.layers[l].lpr_prototypes, *dprototypes = m->dweights.layers[l].lpr_prototypes;
    int N = m->batch * m->length, E = c->num_experts, D = c->router.lpr_latent_dim;
    double weight = scale * c->router.lpr_weight;
    lpr_diversity(dencoded, m->scratch.lpr_gram, s->lpr_encoded, 2 * D, N, D, weight * c->router.lpr_diversity);
    lpr_diversity(dprototypes, m->scratch.lpr_gram, prototypes, D, E, D, weight * c->router.lpr_diversity);
    for (long i = 0; i < (long)E * D; i++) {
        double above = prototypes[i] - s->lpr_targets[i];
        dprototypes[i] += (float)(weight * c->router.lpr_align / ((double)E * D) * ((above > 0) - (above < 0)));
    }
    for (int n = 0; n < N; n++) {
        const float *mu = s->lpr_encoded + (long)n * 2 * D, *logvar = mu + D;
        float* dmu = dencoded + (long)n * 2 * D;
        for (int d = 0; d < D; d++) {
            dmu[d] += (float)(weight * c->router.lpr_kl / N * mu[d]);
            dmu[D + d] += (float)(weight * c->router.lpr_kl / N * -0.5 * (1 - exp((double)logvar[d])));
        }
    }
}

static float gate_scaling(const Config* c) { return c->router.scaling > 0 ? (float)c->router.scaling : 1; }

static int has_router_variant(const Config* c) {
    const RouterConfig* r = &c->router;
    return r->kind != ROUTER_SOFTMAX || r->logit_norm > 0 || r->family_penalty > 0 || r->skip_below > 0 || r->fixed;
}

// What the experts of layer l read (N, H): the norm's output, but with LPR what it reads out of the probabilities.
static const float* experts_input(const Model* m, int l) {
    return m->config.router.kind == ROUTER_LPR && m->config.sparse[l] ? m->layers[l].lpr_input : m->layers[l].ffn_in;
}

// Dynamic pruning of a trained model (Lu et al. 2024, 2402.14800; online in Huang et al. 2024, 2410.06270, whose
// protection of important tokens is left out): experts whose gate is below `share` of the token's largest are not run.
//     S' = {e in S: gate_e >= share max of gate}
//     gate'_e = gate_e, or  scaling gate_e / sum over S' of gate  (norm_topk)
// In place: experts, gates (N, K), those left first, then -1 and 0.
static void skip_small_gates(int* experts, float* gates, float share, int N, int K, int norm_topk, float scaling) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        int *experts_n = experts + (long)n * K, left = 0;
        float *gates_n = gates + (long)n * K, largest = 0, sum = 0;
        for (int k = 0; k < K; k++) largest = gates_n[k] > largest ? gates_n[k] : largest;
        for (int k = 0; k < K; k++) {
            if (gates_n[k] < share * largest) continue;
            sum += gates_n[k];
            experts_n[left] = experts_n[k];
            gates_n[left++] = gates_n[k];
        }
        for (int k = 0; k < left && left < K && norm_topk; k++) gates_n[k] = scaling * (gates_n[k] / sum);
        for (int k = left; k < K; k++) experts_n[k] = -1, gates_n[k] = 0;
    }
}

// DynMoLE (Li et al. 2025, 2504.00661; made for LoRA experts): how many experts a token gets, at most K, follows from
// Tsallis' entropy of its probabilities:
//     S = (1 - sum p_e^q) / (q - 1)     S > entropy: K of them, else the best that have at most `share` together, but
//                                       `least` at any rate
//     gate_e = p_e, or  p_e / sum over those chosen of p  (norm_topk);   the objective gets  weight * mean S
// In: experts and gates = p of the best K, best first. Out: those left first, then -1 and 0. probs (N, E); experts,
// gates (N, K). Returns the mean of S over the N tokens.
static double choose_dynamically(int* experts, float* gates, const float* probs, const RouterConfig* r, int N, int E,
                                 int K, int norm_topk) {
    double mean = 0;
    for (int n = 0; n < N; n++, experts += K, gates += K, probs += E) {
        double powers = 0;
        for (int e = 0; e < E; e++) powers += pow(probs[e], r->dynamic_q);
        double entropy = (1 - powers) / (r->dynamic_q - 1);
        int left = 0, all = entropy > r->dynamic_entropy;
        float reached = 0;
        while (left < K && (all || left < r->dynamic_least || reached + gates[left] <= (float)r->dynamic_share))
            reached += gates[left++];
        for (int k = 0; k < left && norm_topk; k++) gates[k] /= reached;
        for (int k = left; k < K; k++) experts[k] = -1, gates[k] = 0;
        mean += entropy / N;
    }
    return mean;
}

// dz (N, E) += weight dS/dz = -weight q / (q - 1) (p_e^q - p_e sum_j p_j^q); weight is that of one token
static void add_entropy_gradient(float* dz, const float* probs, double q, double weight, int N, int E) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float* p = probs + (long)n * E;
        double powers = 0;
        for (int e = 0; e < E; e++) powers += pow(p[e], q);
        for (int e = 0; e < E; e++)
            dz[(long)n * E + e] -= (float)(weight * q / (q - 1) * (pow(p[e], q) - p[e] * powers));
    }
}

// From ffn_in (N, H) to router_logits, probs, experts and gates of layer l.
static void score_experts(Model* m, int l) {
    const Config* c = &m->config;
    const LayerWeights* w = &m->weights.layers[l];
    LayerActivations* s = &m->layers[l];
    int N = m->batch * m->length, H = c->hidden_size, E = c->num_experts, K = m->topk[l], D = c->router.lpr_latent_dim;
    int start = m->purpose == FOR_GENERATION ? m->cached : 0;
    float* z = s->router_logits;
    if (c->router.kind == ROUTER_LPR) {
        lpr_normalise_forward(s->lpr_a, s->lpr_mean, s->lpr_rstd, s->ffn_in, w->lpr_norm_weight, w->lpr_norm_bias, N,
                              H);
        matmul_forward(s->lpr_encoded, s->lpr_a, w->lpr_encoder, N, H, 2 * D);
        add_bias(s->lpr_encoded, w->lpr_encoder_bias, N, 2 * D);
        lpr_scores(z, s->lpr_encoded, w->lpr_prototypes, N, E, D);
        softmax_router_forward(s->probs, s->router_lse, s->experts, s->gates, z, N, E, K, 1);
        matmul_backward_input(s->lpr_read_out, s->probs, w->lpr_prototypes, N, D, E, 0);       // probs times prototypes
        matmul_forward(s->lpr_input, s->lpr_read_out, w->lpr_readout, N, D, H);
        add_bias(s->lpr_input, w->lpr_readout_bias, N, H);
        for (long i = 0; i < (long)N * H; i++) s->lpr_input[i] += s->ffn_in[i];
        if (m->purpose == FOR_TRAINING) lpr_losses_forward(m, l);
        return;
    }
    matmul_forward(c->router.logit_norm > 0 ? s->router_raw : z, s->ffn_in, w->router, N, H, E);
    if (c->router.logit_norm > 0) logit_norm_forward(z, s->router_raw, N, E, (float)c->router.logit_norm);
    float* shift = NULL;
    if (c->router.family_penalty > 0) {
        shift = m->scratch.family_shift;
        if (c->router.kind == ROUTER_SIGMOID) sigmoid_scores(s->probs, z, w->router_bias, N, E);
        else memcpy(s->probs, z, sizeof(float) * (size_t)N * (size_t)E);
        penalise_families(z, shift, s->probs, m->family + (long)l * E, (float)c->router.family_penalty, l, N,
                          m->length, start, E);
    }
    if (c->router.kind == ROUTER_SIGMOID)
        sigmoid_router_forward(s->probs, s->router_lse, s->experts, s->gates, z, w->router_bias, shift, N, E, K,
                               c->norm_topk_prob, gate_scaling(c));
    else softmax_router_forward(s->probs, s->router_lse, s->experts, s->gates, z, N, E, K,
                                c->norm_topk_prob && c->router.kind != ROUTER_DYNAMIC);
    if (c->router.kind == ROUTER_DYNAMIC) {
        double entropy = choose_dynamically(s->experts, s->gates, s->probs, &c->router, N, E, K, c->norm_topk_prob);
        if (m->purpose == FOR_TRAINING) m->lpr_loss += c->router.dynamic_weight * entropy;
    }
    if (c->router.bias_rule == BIAS_QUANTILE && m->counting_load)
        add_cutoffs(m->cutoffs + (long)l * E, m->scratch.drouter, z, w->router_bias, N, E, K);
}

// The same, and what follows from it.
static void variant_router_forward(Model* m, int l) {
    const Config* c = &m->config;
    LayerActivations* s = &m->layers[l];
    score_experts(m, l);
    if (c->router.skip_below > 0)
        skip_small_gates(s->experts, s->gates, (float)c->router.skip_below, m->batch * m->length, m->topk[l],
                         c->norm_topk_prob || c->router.kind == ROUTER_LPR, gate_scaling(c));
}

// In: scratch.dgates, and in scratch.dnormed the gradient of the experts' input. Out: scratch.dnormed, that of ffn_in.
// f, aux_weight, z_weight as in balance_backward.
static void variant_router_backward(Model* m, int l, const double* f, double aux_weight, double z_weight, float scale) {
    const Config* c = &m->config;
    const LayerWeights *w = &m->weights.layers[l], *dw = &m->dweights.layers[l];
    LayerActivations* s = &m->layers[l];
    Scratch* t = &m->scratch;
    int N = m->batch * m->length, H = c->hidden_size, E = c->num_experts, K = m->topk[l], D = c->router.lpr_latent_dim;
    float* dz = t->drouter;
    if (c->router.kind == ROUTER_SIGMOID) {
        sigmoid_router_backward(dz, t->dgates, s->router_logits, s->probs, s->router_lse, s->experts, s->gates, f,
                                aux_weight, z_weight, N, E, K, c->norm_topk_prob, gate_scaling(c));
    } else {
        softmax_router_backward(dz, t->dgates, s->probs, s->experts, s->gates, N, E, K,
                                c->router.kind == ROUTER_LPR || c->norm_topk_prob);
        balance_backward(dz, s->router_lse, s->probs, f, aux_weight, z_weight, N, E);
    }
    if (c->router.kind == ROUTER_DYNAMIC)
        add_entropy_gradient(dz, s->probs, c->router.dynamic_q, scale * c->router.dynamic_weight / N, N, E);
    if (c->router.kind != ROUTER_LPR) {
        if (c->router.logit_norm > 0) logit_norm_backward(dz, s->router_raw, N, E, (float)c->router.logit_norm);
        matmul_backward_input(t->dnormed, dz, w->router, N, H, E, 1);
        if (!c->router.fixed) matmul_backward_weight(dw->router, dz, s->ffn_in, N, H, E);
        return;
    }
    // the read-out: probs -> read_out -> experts' input
    matmul_backward_weight(dw->lpr_readout, t->dnormed, s->lpr_read_out, N, D, H);
    add_bias_gradient(dw->lpr_readout_bias, t->dnormed, N, H);
    matmul_backward_input(t->lpr_dread_out, t->dnormed, w->lpr_readout, N, D, H, 0);
    matmul_backward_weight(dw->lpr_prototypes, s->probs, t->lpr_dread_out, N, D, E);
    matmul_forward(t->lpr_dprobs, t->lpr_dread_out, w->lpr_prototypes, N, D, E);
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const float *p = s->probs + (long)n * E, *dp = t->lpr_dprobs + (long)n * E;
        float mean = 0;
        for (int e = 0; e < E; e++) mean += p[e] * dp[e];
        for (int e = 0; e < E; e++) dz[(long)n * E + e] += p[e] * (dp[e] - mean);
    }
    // the scores and the encoder
    memset(t->lpr_dencoded, 0, sizeof(float) * (size_t)N * 2 * (size_t)D);
    lpr_losses_backward(m, l, t->lpr_dencoded, scale);
    lpr_scores_backward(t->lpr_dencoded, dw->lpr_prototypes, dz, s->router_logits, s->lpr_encoded, w->lpr_prototypes, N,
                        E, D);
    matmul_backward_weight(dw->lpr_encoder, t->lpr_dencoded, s->lpr_a, N, H, 2 * D);
    add_bias_gradient(dw->lpr_encoder_bias, t->lpr_dencoded, N, 2 * D);
    matmul_backward_input(t->lpr_da, t->lpr_dencoded, w->lpr_encoder, N, H, 2 * D, 0);
    lpr_normalise_backward(t->dnormed, dw->lpr_norm_weight, dw->lpr_norm_bias, t->lpr_da, s->ffn_in, s->lpr_mean,
                           s->lpr_rstd, w->lpr_norm_weight, w->lpr_norm_bias, N, H);
}

// What of a router changes from step to step.
typedef struct {
    double bias_rate;                   // of the sigmoid router's bias
    int micro_batches;                  // in a step
    int topk_low, topk_high;            // each layer draws its K in every step; 0: the model's K
    double family_strength;             // penalty of families, and over how many steps it goes
    long family_steps, family_start;    // from the step in which the copies were made
    float* fixed;                       // (L, E, H) what every step leaves of the routers, or NULL: they are trained
} RouterSchedule;

// Routers that are not trained, as controls: as they are, or (blocks) grouped average pooling (LocMoE, Li et al. 2024,
// 2401.13920): expert e scores a token by the mean over block e of its H numbers, those with floor(i E / H) = e.
//     W_ei = [i in block e] / (size of block e),  so rows are orthogonal
// Returns RouterSchedule.fixed, to be freed.
static float* fix_routers(Model* m, int blocks) {
    const Config* c = &m->config;
    long E = c->num_experts, H = c->hidden_size;
    float* fixed = (float*)checked_malloc(sizeof(float) * (size_t)(c->num_layers * E * H));
    for (int l = 0; l < c->num_layers; l++) {
        float* rows = m->weights.layers[l].router;
        if (!c->sparse[l]) continue;
        for (long e = 0; e < E && blocks; e++) {
            long begin = (e * H + E - 1) / E, end = ((e + 1) * H + E - 1) / E;
            for (long i = 0; i < H; i++) rows[e * H + i] = i >= begin && i < end ? 1.0f / (float)(end - begin) : 0;
        }
        memcpy(fixed + l * E * H, rows, sizeof(float) * (size_t)(E * H));
    }
    return fixed;
}

// Before each training step: draws each layer's K from topk_low .. topk_high (Matryoshka training, 2509.26520).
static void router_before_step(Model* m, const RouterSchedule* run, uint64_t seed, long step) {
    for (int l = 0; l < m->config.num_layers && run->topk_high > 0; l++) {
        uint64_t draw = random_key(seed, hash_string("topk"), (uint64_t)step, (uint64_t)l);
        if (m->config.sparse[l])
            m->topk[l] = run->topk_low + (int)(draw % (uint64_t)(run->topk_high - run->topk_low + 1));
    }
    m->noise_seed = seed;
}

// Moves the bias of layer l by the run's rule.
static void move_router_bias(Model* m, const RouterSchedule* run, int l) {
    int E = m->config.num_experts, rule = m->config.router.bias_rule;
    float* bias = m->weights.layers[l].router_bias;
    double* cutoffs = m->cutoffs + (long)l * E;
    if (rule == BIAS_SIGN) update_router_bias(bias, m->step_load + (long)l * E, E, run->bias_rate);
    if (rule == BIAS_ID)
        update_bias_by_error(bias, m->step_load + (long)l * E, m->last_load + (long)l * E, E, run->bias_rate);
    if (rule != BIAS_QUANTILE || m->topk[l] == E) return;
    for (int e = 0; e < E; e++) bias[e] = (float)(-cutoffs[e] / run->micro_batches);
    centre_bias(bias, E);
    memset(cutoffs, 0, sizeof(double) * (size_t)E);
}

// After it, from the load of its whole batch: moves the sigmoid router's bias and the layers' balance coefficients (if
// they adapt), lowers the penalty of families, and goes back to the model's own K, with which it is validated and
// saved.
static void router_after_step(Model* m, const RouterSchedule* run, long done) {
    Config* c = &m->config;
    for (int l = 0; l < c->num_layers; l++) {
        long* counts = m->step_load + (long)l * c->num_experts;
        if (c->sparse[l] && c->router.kind == ROUTER_SIGMOID) move_router_bias(m, run, l);
        if (c->sparse[l] && run->fixed)                     // weight decay does not shrink it either
            memcpy(m->weights.layers[l].router, run->fixed + (long)l * c->num_experts * c->hidden_size,
                   sizeof(float) * (size_t)c->num_experts * (size_t)c->hidden_size);
        if (c->sparse[l] && m->balance.adaptive)
            m->aux_coefficients[l] = adapted_aux(m->aux_coefficients[l], counts, c->num_experts);
        m->topk[l] = layer_topk(c, l);
    }
    if (c->router.kind == ROUTER_SIGMOID) m->backend->send(m, ROUTER_BIASES);
    memset(m->step_load, 0, sizeof(long) * (size_t)c->num_layers * (size_t)c->num_experts);
    if (run->family_steps > 0)
        c->router.family_penalty = family_penalty_at(run->family_strength, done - run->family_start, run->family_steps);
}
