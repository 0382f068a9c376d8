/*
topk_routing.cu: the softmax top-K router of a mixture of experts and the grouping of tokens by expert, without atomics.

    nvcc -std=c++17 -O3 -gencode arch=compute_80,code=sm_80 topk_routing.cu -o topk_routing && ./topk_routing
    ./topk_routing --bench

(compute_90a and sm_90a for H100 and H200, or what your card is, 80 or later.) Nothing but CUDA is needed.

    gpu_softmax_router            probs = softmax(z); the K best experts of each token and their gates
    gpu_group_by_expert           sorts the N K assignments by expert, stably, unpadded, none dropped
    gpu_balance_weights           f_e, the experts' shares, for the gradient of the balance loss
    gpu_softmax_router_backward   dz from the gradient of the gates, with those of the balance loss and the z-loss

Shapes     z, probs, dz (N, E) floats; lse (N); experts (N, K) ints, best first, of equals the lowest index first;
           gates, dgates (N, K), gates divided by their sum if norm_topk. 1 <= K <= E, any E.
Grouping   offsets (E + 1): rows offsets[e] .. offsets[e+1]-1 belong to expert e. assignment (N K): row r serves
           assignment n K + k, the k-th expert of token n. row_of (N, K): the inverse. token (N K): n. tiles (max_tiles
           >= N K / 128 + E): {expert, first row} for every 128 rows of an expert, then {-1, 0}: what grouped_gemm.cu
           is launched by. chunk_counts: scratch, gpu_group_chunks(N, K) E ints. Sizes stay on the device.
Losses     balance loss (arXiv 2101.03961, eq. 4): f (E) doubles by gpu_balance_weights, with all_counts NULL,
           per_layer 1 and tokens_seen 1; aux_weight = coefficient E / N. z-loss (arXiv 2202.08906, eq. 5): z_weight =
           2 coefficient / N. Both weights 0: none.
Alignment  none.
Stream     The last argument, 0 by default. Nothing is allocated, nothing waits for the device. A failed call ends the
           program: `die`.
Results    A token's experts depend on its own row of z alone, not on the batch. The same bits each time.
Before     the router's product z = x W^T, best in fp32: where copies of an expert are to stay equal, each logit must be
           one chain of additions. After: grouped_gemm.cu by token and tiles, then for each token the sum of its rows
           row_of[n K + k], times gates.
Speed      unmeasured: no GPU has run this file yet. It was tested on a CPU that executes CUDA C++.

Cut out of the mixture-of-experts trainer train_moe.cu, whose comments it keeps. The test compares with plain loops in
doubles.
*/
#include "before.cuh"

// cut: gpu_softmax_router gpu_softmax_router_backward gpu_balance_weights gpu_group_by_expert

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the kernels are used

#include "test.cuh"

typedef std::vector<double> Doubles;

// steps: logits are multiples of 1 / steps, so that many are equal; 0: they are not
static void test(int N, int E, int K, int norm_topk, int steps) {
    int R = N * K, max_tiles = R / GROUP_ROWS + E;
    Array<float> z((long)N * E), probs((long)N * E), lse(N), gates(R), dgates(R), dz((long)N * E);
    Array<int> experts(R), offsets(E + 1), assignment(R), token(R), row_of(R), counts((long)gpu_group_chunks(N, K) * E);
    Array<int2> tiles(max_tiles);
    Array<double> f(E);
    z.random(3), dgates.random(1);
    for (float& x : z.x) x = steps ? roundf(x * steps) / steps : x;
    z.send();

    gpu_softmax_router(probs.gpu(), lse.gpu(), experts.gpu(), gates.gpu(), z.gpu(), N, E, K, norm_topk, test_stream);
    std::vector<int> want_experts;
    Doubles p((long)N * E), want_lse(N), want_gates;
    for (int n = 0; n < N; n++) {
        double sum = 0, gate_sum = 0;
        std::vector<int> taken(E);
        for (int e = 0; e < E; e++) sum += exp((double)z.x[n * E + e]);
        for (int e = 0; e < E; e++) p[n * E + e] = exp((double)z.x[n * E + e]) / sum;
        want_lse[n] = log(sum);
        for (int k = 0; k < K; k++) {
            int best = -1;
            for (int e = 0; e < E; e++)
                if (!taken[e] && (best < 0 || z.x[n * E + e] > z.x[n * E + best])) best = e;
            taken[best] = 1;
            want_experts.push_back(best);
            want_gates.push_back(p[n * E + best]);
            gate_sum += p[n * E + best];
        }
        for (int k = 0; k < K && norm_topk; k++) want_gates[n * K + k] /= gate_sum;
    }
    compare("probs", probs, p, p, 2e-6, 0);
    compare("lse", lse, want_lse, Doubles(N, 3), 1e-6, 1e-6);
    compare_exactly("experts", experts, want_experts);
    compare("gates", gates, want_gates, want_gates, 2e-6, 0);

    gpu_group_by_expert(offsets.gpu(), tiles.gpu(), max_tiles, assignment.gpu(), token.gpu(), row_of.gpu(),
                        counts.gpu(), experts.gpu(), N, K, E, test_stream);
    std::vector<int> want_offsets(1), want_assignment, want_token, want_rows(R);
    std::vector<int2> want_tiles;
    for (int e = 0; e < E; e++) {
        for (int a = 0; a < R; a++)
            if (want_experts[a] == e) {
                want_rows[a] = (int)want_assignment.size();
                want_assignment.push_back(a);
                want_token.push_back(a / K);
            }
        for (int r = want_offsets[e]; r < (int)want_assignment.size(); r += GROUP_ROWS)
            want_tiles.push_back(make_int2(e, r));
        want_offsets.push_back((int)want_assignment.size());
    }
    want_tiles.resize(max_tiles, make_int2(-1, 0));
    compare_exactly("offsets", offsets, want_offsets);
    compare_exactly("assignment", assignment, want_assignment);
    compare_exactly("token", token, want_token);
    compare_exactly("row_of", row_of, want_rows);
    check(tiles.fetch() && !memcmp(tiles.x.data(), want_tiles.data(), max_tiles * sizeof(int2)), "tiles");
    check(counts.fetch(), "grouping keeps to its scratch");

    // The gradient, by the derivative of each gate with respect to each logit:
    //     dp_i/dz_e = p_i ([i = e] - p_e),  and of a quotient where gates are divided by their sum
    double aux_weight = 0.3, z_weight = 0.2;
    gpu_balance_weights(f.gpu(), offsets.gpu(), (const double*)NULL, 1, N, K, E, 1, test_stream);
    gpu_softmax_router_backward(dz.gpu(), dgates.gpu(), probs.gpu(), experts.gpu(), gates.gpu(), lse.gpu(), f.gpu(),
                                aux_weight, z_weight, N, E, K, norm_topk, test_stream);
    Doubles want_f(E), want(dz.n), size(dz.n);
    for (int e = 0; e < E; e++) want_f[e] = (want_offsets[e + 1] - want_offsets[e]) / ((double)N * K);
    for (int n = 0; n < N; n++) {
        const double* p_n = &p[n * E];
        double chosen = 0;
        for (int k = 0; k < K; k++) chosen += p_n[want_experts[n * K + k]];
        for (int e = 0; e < E; e++) {
            double dchosen = 0, term = z_weight * want_lse[n] * p_n[e];
            want[n * E + e] = term, size[n * E + e] = fabs(term);
            for (int k = 0; k < K; k++) {
                int i = want_experts[n * K + k];
                dchosen += p_n[i] * ((i == e) - p_n[e]);
            }
            for (int k = 0; k < K; k++) {
                int i = want_experts[n * K + k];
                double gate = p_n[i], dgate = gate * ((i == e) - p_n[e]);
                if (norm_topk) dgate = dgate / chosen - gate * dchosen / (chosen * chosen), gate /= chosen;
                want[n * E + e] += dgate * dgates.x[n * K + k];
                size[n * E + e] += gate * fabs(dgates.x[n * K + k]);
            }
            for (int i = 0; i < E; i++) {
                term = aux_weight * want_f[i] * p_n[i] * ((i == e) - p_n[e]);
                want[n * E + e] += term;
                size[n * E + e] += fabs(term);
            }
        }
    }
    compare("f", f, want_f, want_f, 1e-12, 0);
    compare("dz", dz, want, size, 2e-6, 2e-6);
}

static void bench(int N) {
    int E = 64, K = 8, R = N * K, max_tiles = R / GROUP_ROWS + E;
    Array<float> z((long)N * E), probs((long)N * E), lse(N), gates(R), dgates(R), dz((long)N * E);
    Array<int> experts(R), offsets(E + 1), assignment(R), token(R), row_of(R), counts((long)gpu_group_chunks(N, K) * E);
    Array<int2> tiles(max_tiles);
    Array<double> f(E);
    z.random(3), dgates.random(1);
    printf("%d tokens, %d of %d experts\n", N, K, E);
    time_of("router", N * (8.0 * E + 8.0 * K), "TB/s", [&] {
        gpu_softmax_router(probs.gpu(), lse.gpu(), experts.gpu(), gates.gpu(), z.gpu(), N, E, K, 1, test_stream);
    });
    time_of("grouping", R * 20.0, "TB/s", [&] {
        gpu_group_by_expert(offsets.gpu(), tiles.gpu(), max_tiles, assignment.gpu(), token.gpu(), row_of.gpu(),
                            counts.gpu(), experts.gpu(), N, K, E, test_stream);
    });
    gpu_balance_weights(f.gpu(), offsets.gpu(), (const double*)NULL, 1, N, K, E, 1, test_stream);
    time_of("router, backward", N * (8.0 * E + 12.0 * K), "TB/s", [&] {
        gpu_softmax_router_backward(dz.gpu(), dgates.gpu(), probs.gpu(), experts.gpu(), gates.gpu(), lse.gpu(), f.gpu(),
                                    0.01, 0.001, N, E, K, 1, test_stream);
    });
}

static void tests() {
    test(600, 8, 2, 1, 0);
    test(300, 8, 2, 0, 4);          // ties
    test(1, 1, 1, 1, 0);
    test(77, 70, 5, 0, 0);
    test(20, 5, 5, 1, 2);           // all experts
    test(9, 1100, 3, 1, 0);         // more experts than threads in a block
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 16384); }
