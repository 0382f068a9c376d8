// routers.cuh: logit norm, families of copies, the sigmoid router; formulas with sources are in dev/lib/routers.h.
// Needs warp_row, next_best and first_score of section 6 of train_moe.cu, and random_key.
#pragma once

__device__ static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// a row's mean and (population) variance, by a warp
__device__ static void row_moments(double* mean, double* variance, const float* z, int E) {
    double sum = 0, square = 0;
    for (int e = threadIdx.x % 32; e < E; e += 32) sum += z[e];
    *mean = warp_sum(sum) / E;
    for (int e = threadIdx.x % 32; e < E; e += 32) square += (z[e] - *mean) * (z[e] - *mean);
    *variance = warp_sum(square) / E;
}

__global__ static void logit_norm_kernel(float* out, const float* z, int N, int E, float lambda) {
    long n = warp_row();
    if (n >= N) return;
    double mean, variance;
    row_moments(&mean, &variance, z + n * E, E);
    for (int e = threadIdx.x % 32; e < E; e += 32)
        out[n * E + e] = (float)(lambda * (z[n * E + e] - mean) / (sqrt(variance) + 1e-6));
}

// out (N, E) = lambda (z - mean) / (std + 1e-6), with each token's mean and standard deviation over the experts
static void gpu_logit_norm(float* out, const float* z, int N, int E, float lambda, cudaStream_t stream = 0) {
    logit_norm_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(out, z, N, E, lambda);
    CHECK(cudaGetLastError());
}

__global__ static void logit_norm_backward_kernel(float* dz, const float* z, int N, int E, float lambda) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    dz += n * E, z += n * E;
    double mean, variance, along = 0, dmean = 0;
    row_moments(&mean, &variance, z, E);
    for (int e = lane; e < E; e += 32) {
        dmean += dz[e];
        along += dz[e] * (z[e] - mean);
    }
    dmean = warp_sum(dmean) / E;
    along = warp_sum(along);
    double std = sqrt(variance), r = std + 1e-6;
    for (int e = lane; e < E; e += 32) {
        double through_std = std > 0 ? (z[e] - mean) * along / (E * std * r) : 0;
        dz[e] = (float)(lambda / r * (dz[e] - dmean - through_std));
    }
}

// In place: dz (N, E), the gradient of gpu_logit_norm's result, becomes that of z (N, E). With c = z - mean and
// r = std + 1e-6:  lambda / r (dz_e - mean(dz) - c_e sum_j(dz_j c_j) / (E std r))
static void gpu_logit_norm_backward(float* dz, const float* z, int N, int E, float lambda, cudaStream_t stream = 0) {
    logit_norm_backward_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(dz, z, N, E, lambda);
    CHECK(cudaGetLastError());
}

__global__ static void penalise_families_kernel(float* z, float* shift, const float* scores, const int* family,
                                                float penalty, int layer, int N, int T, int start, int E) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    z += n * E, shift += n * E;
    scores = scores ? scores + n * E : z;
    for (int e = lane; e < E; e += 32) {
        int beaten = 0, tied = 0, before = 0;           // is a member better; members that equal e; those ahead of e
        for (int j = 0; j < E; j++) {
            if (family[j] != family[e]) continue;
            beaten |= scores[j] > scores[e];
            tied += scores[j] == scores[e];
            before += scores[j] == scores[e] && j < e;
        }
        int winner = 0;                         // of those that tie; without a tie there is no need for the hash
        if (tied > 1) {
            uint64_t hash = random_key(0x46414D, (uint64_t)layer, (uint64_t)(start + n % T), (uint64_t)family[e]);
            winner = (int)((hash >> 32) % (uint64_t)tied);
        }
        shift[e] = !beaten && before == winner ? 0 : penalty;
    }
    __syncwarp();                               // z may be the scores
    for (int e = lane; e < E; e += 32) z[e] -= shift[e];
}

// penalise_families of dev/lib/routers.h: in place, z (N, E) -= shift (N, E), which is 0 for the best member of each
// family (by scores (N, E), NULL: by z itself) and `penalty` for its other members; equal members are told apart by a
// hash of (layer, position, family). family (E). Row n is at position start + n % T of its sequence.
static void gpu_penalise_families(float* z, float* shift, const float* scores, const int* family, float penalty,
                                  int layer, int N, int T, int start, int E, cudaStream_t stream = 0) {
    penalise_families_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        z, shift, scores, family, penalty, layer, N, T, start, E);
    CHECK(cudaGetLastError());
}

__global__ static void sigmoid_scores_kernel(float* scores, const float* z, const float* bias, int N, int E) {
    long n = warp_row();
    for (int e = threadIdx.x % 32; n < N && e < E; e += 32) scores[n * E + e] = sigmoid(z[n * E + e]) + bias[e];
}

// scores (N, E) = sigmoid(z) + bias, by which experts are chosen; bias (E)
static void gpu_sigmoid_scores(float* scores, const float* z, const float* bias, int N, int E,
                               cudaStream_t stream = 0) {
    sigmoid_scores_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(scores, z, bias, N, E);
    CHECK(cudaGetLastError());
}

__global__ static void sigmoid_router_kernel(float* probs, float* lse, int* experts, float* gates, const float* z,
                                             const float* bias, const float* shift, int N, int E, int K,
                                             int norm_topk, float scaling) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    z += n * E, probs += n * E, experts += n * K, gates += n * K;
    float max = -INFINITY, exp_sum = 0, sum = 0, gate_sum = 0;
    for (int e = lane; e < E; e += 32) {
        max = fmaxf(max, z[e]);
        probs[e] = sigmoid(z[e]) + bias[e] - (shift ? shift[n * E + e] : 0);    // for now the scores
    }
    max = warp_max(max);
    for (int e = lane; e < E; e += 32) {
        exp_sum += expf(z[e] - max);
        sum += sigmoid(z[e]);
    }
    exp_sum = warp_sum(exp_sum);
    sum = warp_sum(sum);
    if (lane == 0) lse[n] = max + logf(exp_sum);
    __syncwarp();
    float last = first_score(probs);
    for (int k = 0, e = -1; k < K; k++) {
        e = next_best(probs, E, last, e);
        last = probs[e];
        float gate = sigmoid(z[e]);
        gate_sum += gate;
        if (lane == 0) experts[k] = e, gates[k] = gate;
    }
    __syncwarp();
    for (int k = lane; k < K; k += 32) gates[k] = scaling * (norm_topk ? gates[k] / gate_sum : gates[k]);
    for (int e = lane; e < E; e += 32) probs[e] = sigmoid(z[e]) / sum;
}

// sigmoid_router_forward of dev/lib/routers.h: with s = sigmoid(z),
//     experts (N, K): the K largest s + bias - shift, best first (of equals the lowest index first)
//     gates (N, K) = scaling s of the experts, divided by their sum if norm_topk     probs (N, E) = s / sum of s
//     lse (N) = logsumexp(z)
// z (N, E), bias (E), shift (N, E) by gpu_penalise_families or NULL
static void gpu_sigmoid_router(float* probs, float* lse, int* experts, float* gates, const float* z, const float* bias,
                               const float* shift, int N, int E, int K, int norm_topk, float scaling,
                               cudaStream_t stream = 0) {
    sigmoid_router_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        probs, lse, experts, gates, z, bias, shift, N, E, K, norm_topk, scaling);
    CHECK(cudaGetLastError());
}

// work (N, E) = s - alpha, alpha = the (K + 1)-th largest s + bias of a token
__global__ static void cutoff_scores_kernel(float* work, const float* z, const float* bias, int N, int E, int K) {
    long n = warp_row();
    if (n >= N) return;
    work += n * E, z += n * E;
    for (int e = threadIdx.x % 32; e < E; e += 32) work[e] = sigmoid(z[e]) + bias[e];
    __syncwarp();
    float alpha = first_score(work);
    for (int k = 0, e = -1; k <= K; k++) e = next_best(work, E, alpha, e), alpha = work[e];
    __syncwarp();
    for (int e = threadIdx.x % 32; e < E; e += 32) work[e] -= bias[e] + alpha;
}

// number_of_rank of dev/lib/routers.h in each column of work (N, E), added to cutoffs (E)
__global__ static void __launch_bounds__(1024)
    cutoffs_kernel(double* cutoffs, const float* work, int N, int E, long rank) {
    __shared__ int shared[32];
    uint32_t found = 0;
    for (int bit = 31; bit >= 0; bit--) {
        float tried = float_in_order(found | 1u << bit);
        int reached = 0;
        for (long n = threadIdx.x; n < N; n += blockDim.x) reached += work[n * E + blockIdx.x] >= tried;
        if (block_sum(reached, shared) > rank) found |= 1u << bit;
    }
    if (threadIdx.x == 0) cutoffs[blockIdx.x] += float_in_order(found);
}

// add_cutoffs of dev/lib/routers.h: cutoffs (E) += beta of quantile balancing; work: N E floats; z (N, E), bias (E)
static void gpu_add_cutoffs(double* cutoffs, float* work, const float* z, const float* bias, int N, int E, int K,
                            cudaStream_t stream = 0) {
    if (K == E) return;
    cutoff_scores_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(work, z, bias, N, E, K);
    cutoffs_kernel<<<E, 1024, 0, stream>>>(cutoffs, work, N, E, (long)N * K / E);
    CHECK(cudaGetLastError());
}

__global__ static void sigmoid_router_backward_kernel(float* dz, const float* dgates, const float* z,
                                                      const float* probs, const float* lse, const int* experts,
                                                      const float* gates, const double* f, double aux_weight,
                                                      double z_weight, int N, int E, int K, int norm_topk,
                                                      float scaling) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    dz += n * E, z += n * E, probs += n * E, experts += n * K, gates += n * K, dgates += n * K;
    float sum = 0, chosen_sum = 0, mean = 0;
    double f_mean = 0;
    for (int e = lane; e < E; e += 32) {
        sum += sigmoid(z[e]);
        f_mean += f[e] * probs[e];
    }
    for (int k = lane; k < K; k += 32) {
        chosen_sum += sigmoid(z[experts[k]]);
        mean += gates[k] * dgates[k];
    }
    sum = warp_sum(sum), f_mean = warp_sum(f_mean), chosen_sum = warp_sum(chosen_sum), mean = warp_sum(mean);
    for (int e = lane; e < E; e += 32) dz[e] = (float)(aux_weight * (f[e] - f_mean)) / sum;     // for now ds
    __syncwarp();
    for (int k = lane; k < K; k += 32) {
        float dgate = scaling * dgates[k];
        dz[experts[k]] += norm_topk ? (dgate - mean) / chosen_sum : dgate;
    }
    __syncwarp();
    for (int e = lane; e < E; e += 32) {
        float s = sigmoid(z[e]);
        dz[e] = dz[e] * s * (1.0f - s) + (float)z_weight * lse[n] * expf(z[e] - lse[n]);
    }
}

// sigmoid_router_backward of dev/lib/routers.h: dz (N, E) from dgates (N, K) and the balance losses:
//     renormalised: ds_e = (scaling dgate_e - sum over S of gate_j dgate_j) / sum over S of s
//     otherwise:    ds_e = scaling dgate_e
//     balance:      ds_e += aux_weight (f_e - sum_j f_j p_j) / sum of s,  p = s / sum of s
//     dz_e = ds_e s_e (1 - s_e) + z_weight lse exp(z_e - lse)
// z, probs (N, E), lse (N), experts, gates (N, K), f (E)
static void gpu_sigmoid_router_backward(float* dz, const float* dgates, const float* z, const float* probs,
                                        const float* lse, const int* experts, const float* gates, const double* f,
                                        double aux_weight, double z_weight, int N, int E, int K, int norm_topk,
                                        float scaling, cudaStream_t stream = 0) {
    sigmoid_router_backward_kernel<<<ceil_div(N, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        dz, dgates, z, probs, lse, experts, gates, f, aux_weight, z_weight, N, E, K, norm_topk, scaling);
    CHECK(cudaGetLastError());
}
