// observe.cuh: the load figures that one forward pass adds to a layer's Observed. Needs block_sum and warp_sum of
// train_moe.cu, and OBSERVE_SLICES.
#pragma once

// parts (4, slices) = sums over the tokens of each slice, which has a block, of the entropy, the largest gate,
// the distinct families chosen, and whether there were fewer of them than K
__global__ static void __launch_bounds__(256)
    observe_slices_kernel(double* parts, const float* probs, const float* gates, const int* experts, const int* family,
                          int N, int E, int K) {
    __shared__ double shared[32];
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    long rows = ceil_div(N, gridDim.x), first = blockIdx.x * rows, end = first + rows < N ? first + rows : N;
    double entropy = 0, tops = 0, sources = 0, twins = 0;       // of this warp's tokens; the last three in lane 0 alone
    for (long n = first + threadIdx.x / 32; n < end; n += warps) {
        const float *p = probs + n * E, *gates_n = gates + n * K;
        const int* experts_n = experts + n * K;
        float top = 0, distinct = 0;
        for (int e = lane; e < E; e += 32) entropy -= p[e] > 1e-30f ? p[e] * logf(p[e]) : 0;
        for (int k = lane; k < K; k += 32) {
            bool known = false;
            for (int j = 0; j < k && family; j++) known |= family[experts_n[j]] == family[experts_n[k]];
            distinct += !known;
            top = fmaxf(top, gates_n[k]);
        }
        top = warp_max(top);
        distinct = warp_sum(distinct);
        if (lane == 0) {
            tops += top;
            sources += distinct;
            twins += distinct < K;
        }
    }
    entropy = block_sum(entropy, shared);
    tops = block_sum(tops, shared);
    sources = block_sum(sources, shared);
    twins = block_sum(twins, shared);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = entropy;
        parts[blockIdx.x + gridDim.x] = tops;
        parts[blockIdx.x + gridDim.x * 2] = sources;
        parts[blockIdx.x + gridDim.x * 3] = twins;
    }
}

// a warp for each of the four sums
__global__ static void observe_finish_kernel(double* observed, const double* parts, int slices, int N) {
    int i = threadIdx.x / 32, lane = threadIdx.x % 32;
    double sum = 0;
    for (int s = lane; s < slices; s += 32) sum += parts[i * slices + s];
    sum = warp_sum(sum);
    if (lane == 0) observed[1 + i] += sum;
    if (threadIdx.x == 0) observed[0] += N;
}

// observe_layer of dev/lib/load.h without its trace: adds a forward pass to a layer's Observed, five doubles {tokens,
// entropy, top_gate, sources, twins}. parts: scratch, gpu_balance_parts(E) doubles;  probs (N, E), gates, experts
// (N, K);  family (E): each expert's family, or NULL: every expert is a family of its own
static void gpu_observe(double* observed, double* parts, const float* probs, const float* gates, const int* experts,
                        const int* family, int N, int E, int K, cudaStream_t stream = 0) {
    int slices = N < 8 * OBSERVE_SLICES ? ceil_div(N, 8) : OBSERVE_SLICES;          // a block has 8 warps
    observe_slices_kernel<<<slices, 256, 0, stream>>>(parts, probs, gates, experts, family, N, E, K);
    observe_finish_kernel<<<1, 4 * 32, 0, stream>>>(observed, parts, slices, N);
    CHECK(cudaGetLastError());
}
