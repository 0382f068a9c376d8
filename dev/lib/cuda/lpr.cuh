// lpr.cuh: Latent Prototype Routing (Yang 2025, 2506.21328), gpu_lpr_forward and gpu_lpr_backward. Needs routers.cuh,
// and gpu_matmul_fp32, gpu_softmax_router and its backward, SLICES and slice_sum of train_moe.cu.
//
// The formulas are in dev/lib/routers.h. Here all is done with unit vectors, which turns the two gradients that need
// care into one: with n = mu / |mu| and q = prototype / |prototype|
//     scores = n q^T        diversity of M vectors x = (|G|^2 - M) / M^2,  G = X^T X  (D, D),  x = n or q
// and the gradient dx by a unit vector x = v / |v| goes on as dv = (dx - (x dx) x) / |v|. With dz the scores' gradient,
//     dn = dz q + 4 weight / N^2 G n             dq = dz^T n + 4 weight / E^2 G q
// (the gradient of |G|^2 - M is 4 (G x - x), but what lies along x is lost anyway.)
#pragma once

// One layer's parameters, or their gradients.
typedef struct {
    float *norm_weight, *norm_bias;         // (H)
    float *encoder, *encoder_bias;          // (2 D, H), (2 D)
    float* prototypes;                      // (E, D)
    float *readout, *readout_bias;          // (H, D), (H)
} LprWeights;

typedef struct {
    int N, H, E, K, D;
    LprWeights w, d;                        // parameters; their gradients (unused without a backward pass)
    double weight, diversity, kl, align;    // of the losses: weight (diversity .. + kl .. + align ..)
    int align_mean;                         // 1: Align's targets are means over tokens, 0: sums
    // kept from the forward pass for the backward pass
    float *z, *lse, *probs, *gates;         // scores (N, E), (N), (N, E), (N, K)
    int* experts;                           // (N, K)
    float* encoded;                         // (N, 2 D)     mu and logvar
    float* read_out;                        // (N, D)
    float* targets;                         // (E, D)
    float* grams;                           // (2, D, D)    of mu, of the prototypes
    // used up within a call
    float* scratch;                         // gpu_lpr_scratch(N, H, E, D) floats, 16-byte aligned
    float* parts;                           // for gpu_matmul_fp32
    long parts_floats;
} LprLayer;

typedef struct {
    double* sums;                           // (SLICES, max(H, 2 D))
    float* wide;                            // (N, H)       a; the read-out's part of the experts' input; da
    float *mean, *rstd, *kl;                // (N)
    float *units, *prototype_units;         // (N, D), (E, D)       n and q
    float *by_expert, *dz;                  // (N, E)       rho, dprobs; dz
    float *latent, *dencoded;               // (N, D), (N, 2 D)     mu + noise, dread_out, dn; the encoder's gradient
    float* dunits;                          // (E, D)       dq
} LprScratch;

// hands out the scratch; returns its size in floats
static long lpr_scratch_walk(LprScratch* s, float* base, long N, long H, long E, long D) {
    float** pointers[] = {(float**)&s->sums, &s->wide, &s->mean, &s->rstd, &s->kl, &s->units, &s->prototype_units,
                          &s->by_expert, &s->dz, &s->latent, &s->dencoded, &s->dunits};
    long sizes[] = {2 * SLICES * (H > 2 * D ? H : 2 * D), N * H, N, N, N, N * D, E * D, N * E, N * E, N * D, N * 2 * D,
                    E * D};
    long used = 0;
    for (int i = 0; i < 12; i++) {
        *pointers[i] = base ? base + used : NULL;
        used += (sizes[i] + 3) / 4 * 4;
    }
    return used;
}
static long gpu_lpr_scratch(long N, long H, long E, long D) {
    LprScratch s;
    return lpr_scratch_walk(&s, NULL, N, H, E, D);
}

// a (N, H) = silu(LayerNorm(h)); mean, rstd (N)
template <class T>
__global__ static void lpr_normalise_kernel(float* a, float* mean, float* rstd, const T* h, const float* weight,
                                            const float* bias, int N, int H) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    h += n * H, a += n * H;
    float sum = 0, square = 0;
    for (int i = lane; i < H; i += 32) sum += to_float(h[i]);
    float m = warp_sum(sum) / H;
    for (int i = lane; i < H; i += 32) square += (to_float(h[i]) - m) * (to_float(h[i]) - m);
    float r = 1.0f / sqrtf(warp_sum(square) / H + LPR_EPS);
    for (int i = lane; i < H; i += 32) {
        float u = (to_float(h[i]) - m) * r * weight[i] + bias[i];
        a[i] = u * sigmoid(u);
    }
    if (lane == 0) mean[n] = m, rstd[n] = r;
}

// In place da (N, H), the gradient of a, becomes that of u, the LayerNorm's output; dh (N, H) = dinput + that of h, and
// may be dinput.
//     silu'(u) = s (1 + u (1 - s))      dh = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)),  dxhat = du weight
template <class T, class TD>
__global__ static void lpr_normalise_backward_kernel(float* dh, const TD* dinput, float* da, const T* h,
                                                     const float* mean, const float* rstd, const float* weight,
                                                     const float* bias, int N, int H) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    h += n * H, da += n * H;
    float m = mean[n], r = rstd[n], d_mean = 0, d_along = 0;
    for (int i = lane; i < H; i += 32) {
        float xhat = (to_float(h[i]) - m) * r, u = xhat * weight[i] + bias[i], s = sigmoid(u);
        float du = da[i] * s * (1.0f + u * (1.0f - s));
        da[i] = du;
        d_mean += du * weight[i];
        d_along += du * weight[i] * xhat;
    }
    d_mean = warp_sum(d_mean) / H;
    d_along = warp_sum(d_along) / H;
    for (int i = lane; i < H; i += 32) {
        float xhat = (to_float(h[i]) - m) * r;
        dh[n * H + i] = to_float(dinput[n * H + i]) + r * (da[i] * weight[i] - d_mean - xhat * d_along);
    }
}

// parts (SLICES, C): the slices' sums of the columns of x (N, C); with h (N, C): of x xhat, xhat = (h - mean) rstd
template <class T, class TX>
__global__ static void __launch_bounds__(1024)
    column_slices_kernel(double* parts, const TX* x, const T* h, const float* mean, const float* rstd, int N, int C) {
    int c = blockIdx.x * 32 + threadIdx.x;
    double sum = slice_sum([=](long n) {
        if (c >= C) return 0.0;
        return (double)(to_float(x[n * C + c]) * (h ? (to_float(h[n * C + c]) - mean[n]) * rstd[n] : 1));
    }, N);
    if (threadIdx.y == 0 && c < C) parts[(long)blockIdx.y * C + c] = sum;
}
// out (C) = the sums of the parts, or += them
__global__ static void column_finish_kernel(float* out, const double* parts, int C, int add) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    double sum = 0;
    for (int s = 0; s < SLICES; s++) sum += parts[(long)s * C + c];
    out[c] = (float)(add ? out[c] + sum : sum);
}
// the gradient of a bias or of a LayerNorm's weight; parts: scratch (SLICES, C)
template <class T, class TX>
static void gpu_column_sums(float* out, double* parts, const TX* x, const T* h, const float* mean, const float* rstd,
                            int N, int C, int add, cudaStream_t stream = 0) {
    column_slices_kernel<<<dim3(ceil_div(C, 32), SLICES), dim3(32, 32), 0, stream>>>(parts, x, h, mean, rstd, N, C);
    column_finish_kernel<<<ceil_div(C, 256), 256, 0, stream>>>(out, parts, C, add);
    CHECK(cudaGetLastError());
}

// units (M, D) = x / |x| for M vectors x of D numbers, `step` floats apart. With a bias (C), the rows are first
// completed: x (M, C) += bias.
__global__ static void lpr_units_kernel(float* units, float* x, int step, const float* bias, int C, int M, int D) {
    long m = warp_row();
    int lane = threadIdx.x % 32;
    if (m >= M) return;
    x += m * step;
    for (int i = lane; i < C && bias; i += 32) x[i] += bias[i];
    float square = 0;                           // of numbers that this lane has just written itself
    for (int d = lane; d < D; d += 32) square += x[d] * x[d];
    float length = sqrtf(warp_sum(square));
    for (int d = lane; d < D; d += 32) units[m * D + d] = x[d] / length;
}

// Through the units: dx (M of D numbers, step floats apart) = (or +=) (du - (u du) u) / |x|, du = dunits + factor G u.
// dunits (M, D) is used up; gram (D, D), symmetric; x as dx; units (M, D).
__global__ static void lpr_units_backward_kernel(float* dx, float* dunits, const float* gram, const float* units,
                                                 const float* x, int step, float factor, int add, int M, int D) {
    long m = warp_row();
    int lane = threadIdx.x % 32;
    if (m >= M) return;
    dx += m * step, x += m * step, dunits += m * D, units += m * D;
    float square = 0, along = 0;
    for (int d = lane; d < D; d += 32) {
        float sum = 0;
        for (int k = 0; k < D; k++) sum += gram[(long)k * D + d] * units[k];
        float du = dunits[d] + factor * sum;
        dunits[d] = du;
        along += units[d] * du;
        square += x[d] * x[d];
    }
    along = warp_sum(along);
    float length = sqrtf(warp_sum(square));
    for (int d = lane; d < D; d += 32) dx[d] = (add ? dx[d] : 0) + (dunits[d] - along * units[d]) / length;
}

// input (N, H) = h + wide + bias
template <class T>
__global__ static void lpr_input_kernel(T* input, const T* h, const float* wide, const float* bias, int N, int H) {
    long n = warp_row();
    for (int i = threadIdx.x % 32; n < N && i < H; i += 32)
        store(&input[n * H + i], to_float(h[n * H + i]) + wide[n * H + i] + bias[i]);
}

// rho (N, E) = softmax over all experts of the scores z of the chosen ones and 0 for the others (divided by N for
// targets that are means), latent (N, D) = mu + exp(logvar / 2) noise, kl (N) = -1/2 sum(1 + logvar - mu^2 -
// exp(logvar)). Doubles, as the noise is made of them. encoded (N, 2 D), z (N, E), experts (N, K)
__global__ static void lpr_noise_kernel(float* rho, float* latent, float* kl, const float* encoded, const float* z,
                                        const int* experts, uint64_t layer_key, int mean, int N, int E, int K, int D) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    z += n * E, rho += n * E, experts += n * K, encoded += n * 2 * D;
    double sum = 0, kl_sum = 0, shares = mean ? N : 1;
    for (int k = lane; k < K; k += 32) sum += exp((double)z[experts[k]]);
    sum = (warp_sum(sum) + E - K) * shares;     // exp(0) for each expert that was not chosen
    for (int e = lane; e < E; e += 32) rho[e] = (float)(1 / sum);
    __syncwarp();
    for (int k = lane; k < K; k += 32) rho[experts[k]] = (float)(exp((double)z[experts[k]]) / sum);
    for (int d = lane; d < D; d += 32) {
        double mu = encoded[d], logvar = encoded[D + d], var = exp(logvar);
        latent[n * D + d] = (float)(mu + sqrt(var) * lpr_noise(layer_key, n, d, D));
        kl_sum -= 0.5 * (1 + logvar - mu * mu - var);
    }
    kl_sum = warp_sum(kl_sum);
    if (lane == 0) kl[n] = (float)kl_sum;
}

// loss += weight (diversity (Div(mu) + Div(prototypes)) + kl_weight mean(kl) + align mean |prototypes - targets|), one
// block of 1024 threads. grams (2, D, D), kl (N), prototypes, targets (E, D)
__global__ static void __launch_bounds__(1024)
    lpr_loss_kernel(double* loss, const float* grams, const float* kl, const float* prototypes, const float* targets,
                    double weight, double diversity, double kl_weight, double align, int N, int E, int D) {
    __shared__ double shared[32];
    double sums[4] = {0, 0, 0, 0};
    for (long i = threadIdx.x; i < (long)D * D; i += 1024) {
        sums[0] += (double)grams[i] * grams[i];
        sums[1] += (double)grams[(long)D * D + i] * grams[(long)D * D + i];
    }
    for (int n = threadIdx.x; n < N; n += 1024) sums[2] += kl[n];
    for (long i = threadIdx.x; i < (long)E * D; i += 1024) sums[3] += fabs((double)prototypes[i] - targets[i]);
    for (int i = 0; i < 4; i++) sums[i] = block_sum(sums[i], shared);
    double spread = (sums[0] - N) / ((double)N * N) + (sums[1] - E) / ((double)E * E);
    if (threadIdx.x == 0)
        *loss += weight * (diversity * spread + kl_weight * sums[2] / N + align * sums[3] / ((double)E * D));
}

// dz (N, E) += p (dprobs - sum_j p_j dprobs_j)
__global__ static void lpr_probs_backward_kernel(float* dz, const float* dprobs, const float* probs, int N, int E) {
    long n = warp_row();
    int lane = threadIdx.x % 32;
    if (n >= N) return;
    dz += n * E, dprobs += n * E, probs += n * E;
    float mean = 0;
    for (int e = lane; e < E; e += 32) mean += probs[e] * dprobs[e];
    mean = warp_sum(mean);
    for (int e = lane; e < E; e += 32) dz[e] += probs[e] * (dprobs[e] - mean);
}

// KL's gradient, weight mu and -weight / 2 (1 - exp(logvar)): dencoded (N, 2 D): added to the first half of each row,
// the second half is overwritten. encoded (N, 2 D)
__global__ static void lpr_kl_backward_kernel(float* dencoded, const float* encoded, double weight, int N, int D) {
    long n = warp_row();
    if (n >= N) return;
    dencoded += n * 2 * D, encoded += n * 2 * D;
    for (int d = threadIdx.x % 32; d < D; d += 32) {
        dencoded[d] += (float)(weight * encoded[d]);
        dencoded[D + d] = (float)(weight * -0.5 * (1 - exp((double)encoded[D + d])));
    }
}

// dprototypes (n) += weight sign(prototypes - targets)
__global__ static void lpr_align_backward_kernel(float* dprototypes, const float* prototypes, const float* targets,
                                                 float weight, long n) {
    long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float above = prototypes[i] - targets[i];
    dprototypes[i] += weight * (float)((above > 0) - (above < 0));
}

// From h (N, H), a layer's ffn_in, to everything that is kept (see LprLayer) and to input (N, H), the experts' input.
// In training (loss not NULL) the layer's losses are added to *loss, a double on the device, and their targets are
// kept; layer_key = random_key(noise_seed, 0x4C5052, noise_step, layer) names its noise. Only sums over tokens are
// split into `parts`: what a token gets does not depend on its batch.
template <class T>
static void gpu_lpr_forward(T* input, double* loss, const T* h, uint64_t layer_key, const LprLayer* r,
                            cudaStream_t stream = 0) {
    int N = r->N, H = r->H, E = r->E, K = r->K, D = r->D, blocks = ceil_div(N, TOKENS_A_BLOCK);
    float* parts = r->parts;
    long room = r->parts_floats;
    LprScratch s;
    lpr_scratch_walk(&s, r->scratch, N, H, E, D);
    lpr_normalise_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.wide, s.mean, s.rstd, h, r->w.norm_weight,
                                                                r->w.norm_bias, N, H);
    gpu_matmul_fp32(r->encoded, s.wide, H, 1, r->w.encoder, 1, H, N, 2 * D, H, 0, NULL, 0, stream);
    lpr_units_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.units, r->encoded, 2 * D, r->w.encoder_bias, 2 * D, N, D);
    lpr_units_kernel<<<ceil_div(E, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        s.prototype_units, r->w.prototypes, D, NULL, 0, E, D);
    gpu_matmul_fp32(r->z, s.units, D, 1, s.prototype_units, 1, D, N, E, D, 0, NULL, 0, stream);
    gpu_softmax_router(r->probs, r->lse, r->experts, r->gates, r->z, N, E, K, 1, stream);
    gpu_matmul_fp32(r->read_out, r->probs, E, 1, r->w.prototypes, D, 1, N, D, E, 0, NULL, 0, stream);
    gpu_matmul_fp32(s.wide, r->read_out, D, 1, r->w.readout, 1, D, N, H, D, 0, NULL, 0, stream);
    lpr_input_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(input, h, s.wide, r->w.readout_bias, N, H);
    if (loss) {
        gpu_matmul_fp32(r->grams, s.units, 1, D, s.units, D, 1, D, D, N, 0, parts, room, stream);
        gpu_matmul_fp32(r->grams + (long)D * D, s.prototype_units, 1, D, s.prototype_units, D, 1, D, D, E, 0, parts,
                        room, stream);
        lpr_noise_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.by_expert, s.latent, s.kl, r->encoded, r->z,
                                                                r->experts, layer_key, r->align_mean, N, E, K, D);
        gpu_matmul_fp32(r->targets, s.by_expert, 1, E, s.latent, D, 1, E, D, N, 0, parts, room, stream);
        lpr_loss_kernel<<<1, 1024, 0, stream>>>(loss, r->grams, s.kl, r->w.prototypes, r->targets, r->weight,
                                                r->diversity, r->kl, r->align, N, E, D);
    }
    CHECK(cudaGetLastError());
}

// The backward pass of gpu_lpr_forward, of its losses times `scale`, and of the balance losses (f, aux_weight, z_weight
// as in gpu_softmax_router_backward). dgates (N, K); dinput (N, H): the gradient of the experts' input. dh (N, H) = the
// gradient of h, dinput included; it may be dinput if that is float. The parameters' gradients r->d are overwritten, or
// with add = 1 added to. a, its moments and the unit vectors are made once more, which is cheaper than keeping (N, H)
// floats for every layer.
template <class T, class TD>
static void gpu_lpr_backward(float* dh, const TD* dinput, const T* h, const float* dgates, const double* f,
                             double aux_weight, double z_weight, double scale, int add, const LprLayer* r,
                             cudaStream_t stream = 0) {
    int N = r->N, H = r->H, E = r->E, K = r->K, D = r->D, blocks = ceil_div(N, TOKENS_A_BLOCK);
    float* parts = r->parts;
    long room = r->parts_floats;
    double weight = scale * r->weight, spread = 4 * weight * r->diversity;
    LprScratch s;
    lpr_scratch_walk(&s, r->scratch, N, H, E, D);
    gpu_softmax_router_backward(s.dz, dgates, r->probs, r->experts, r->gates, r->lse, f, aux_weight, z_weight, N, E, K,
                                1, stream);
    // the read-out: probs -> read_out -> experts' input
    float* dread_out = s.latent;
    gpu_matmul_fp32(r->d.readout, dinput, 1, H, r->read_out, D, 1, H, D, N, add, parts, room, stream);
    gpu_column_sums(r->d.readout_bias, s.sums, dinput, (const T*)NULL, NULL, NULL, N, H, add, stream);
    gpu_matmul_fp32(dread_out, dinput, H, 1, r->w.readout, D, 1, N, D, H, 0, parts, room, stream);
    gpu_matmul_fp32(r->d.prototypes, r->probs, 1, E, dread_out, D, 1, E, D, N, add, parts, room, stream);
    gpu_matmul_fp32(s.by_expert, dread_out, D, 1, r->w.prototypes, 1, D, N, E, D, 0, parts, room, stream);
    lpr_probs_backward_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.dz, s.by_expert, r->probs, N, E);
    // the scores and the losses
    lpr_units_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.units, r->encoded, 2 * D, NULL, 0, N, D);
    lpr_units_kernel<<<ceil_div(E, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        s.prototype_units, r->w.prototypes, D, NULL, 0, E, D);
    float* dn = s.latent;
    gpu_matmul_fp32(dn, s.dz, E, 1, s.prototype_units, D, 1, N, D, E, 0, parts, room, stream);
    gpu_matmul_fp32(s.dunits, s.dz, 1, E, s.units, D, 1, E, D, N, 0, parts, room, stream);
    lpr_units_backward_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.dencoded, dn, r->grams, s.units, r->encoded,
                                                                     2 * D, (float)(spread / ((double)N * N)), 0, N, D);
    lpr_units_backward_kernel<<<ceil_div(E, TOKENS_A_BLOCK), ROUTER_THREADS, 0, stream>>>(
        r->d.prototypes, s.dunits, r->grams + (long)D * D, s.prototype_units, r->w.prototypes, D,
        (float)(spread / ((double)E * E)), 1, E, D);
    lpr_kl_backward_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.dencoded, r->encoded, weight * r->kl / N, N, D);
    lpr_align_backward_kernel<<<ceil_div((long)E * D, 256), 256, 0, stream>>>(
        r->d.prototypes, r->w.prototypes, r->targets, (float)(weight * r->align / ((double)E * D)), (long)E * D);
    // the encoder and the LayerNorm
    lpr_normalise_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(s.wide, s.mean, s.rstd, h, r->w.norm_weight,
                                                                r->w.norm_bias, N, H);
    gpu_matmul_fp32(r->d.encoder, s.dencoded, 1, 2 * D, s.wide, H, 1, 2 * D, H, N, add, parts, room, stream);
    gpu_column_sums(r->d.encoder_bias, s.sums, s.dencoded, (const T*)NULL, NULL, NULL, N, 2 * D, add, stream);
    gpu_matmul_fp32(s.wide, s.dencoded, 2 * D, 1, r->w.encoder, H, 1, N, H, 2 * D, 0, parts, room, stream);
    lpr_normalise_backward_kernel<<<blocks, ROUTER_THREADS, 0, stream>>>(dh, dinput, s.wide, h, s.mean, s.rstd,
                                                                         r->w.norm_weight, r->w.norm_bias, N, H);
    gpu_column_sums(r->d.norm_weight, s.sums, s.wide, h, s.mean, s.rstd, N, H, add, stream);
    gpu_column_sums(r->d.norm_bias, s.sums, s.wide, (const T*)NULL, NULL, NULL, N, H, add, stream);
    CHECK(cudaGetLastError());
}
