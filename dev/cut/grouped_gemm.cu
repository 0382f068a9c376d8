/*
grouped_gemm.cu: products of rows with the matrices of their experts, on tensor cores (bf16) or in fp32.

    nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a grouped_gemm.cu -o grouped_gemm
    ./grouped_gemm && ./grouped_gemm --bench

H100 and H200 want sm_90a (wgmma; sm_90 is refused), A100 sm_80, others what they are (mma.sync). Nothing but CUDA 12.9
or newer is needed. T is __nv_bfloat16 or float; sums are fp32, gradients of weights float.

What there is (R rows, grouped by expert without padding; E experts, N tokens):

    forward  y (R, OC) = x W_e^T                         gpu_grouped_forward         W (E, OC, C)
    forward  with SwiGLU: act = silu(gate) up            gpu_experts_up              W (E, 2, I, H): gate, then up
    dX       dx (R, C) = dy W_e                          gpu_grouped_dx              W (E, OC, C)
    dX       back through gate * down(SwiGLU)            gpu_experts_down_backward   W (E, H, I), of down
    dgates   from the dgate_parts that this leaves       gpu_gate_gradients          (R, gpu_dgate_parts<T>(I))
    dW       dW_e (E, OC, C) (+)= dy^T x                 gpu_experts_weight_backward

Rows       Rows offsets[e] .. offsets[e+1]-1 belong to expert e; offsets (E + 1) lies on the device, and the host need
           not know it. An expert may have no rows.
Gathering  With `token` (R), row r of x (or dy) is row token[r] of a matrix (N, C): it is read there, no gathered copy
           is written. NULL: the rows lie as they are grouped.
tiles      A list (max_tiles) of {expert, first row} for every 128 rows of each expert, then {-1, 0}; max_tiles =
           R / 128 + E is always enough. topk_routing.cu makes offsets, tiles and token on the device; make_tiles below
           makes tiles on the host. Without experts: E = 1, offsets {0, R}.
Layout     Row-major, without gaps. Any sizes, any address that suits the type. In bf16, operands whose rows begin at
           multiples of 16 bytes (widths that are multiples of 8) are copied 16 bytes at a time by cp.async, others
           number by number, which is many times slower.
Stream     The last argument, 0 by default. Nothing is allocated, nothing waits for the device. A failed call ends the
           program: `die`.
Results    There are no atomic additions: the same input gives the same bits.
Before     routing and grouping (topk_routing.cu). After: each token adds up its K rows, times gates; backward, the
           gradient of x is the sum of a token's K rows of dx.
Speed      unmeasured: no GPU has run this file yet. It was tested on a CPU that executes CUDA C++, and its inline
           assembly by an interpreter of PTX (dev/cuda/README.md of the project).

Cut out of the mixture-of-experts trainer train_moe.cu, whose comments it keeps: section and file names are that
project's, and so are the dimension letters. The test compares with plain loops in doubles.
*/
#include "before.cuh"

// cut: launch_experts StoreEpilogue gpu_experts_up gpu_experts_down_backward gpu_dgate_parts gpu_gate_gradients
// cut: gpu_experts_weight_backward

// y (R, OC) = x W_e^T for the rows of each expert; x (R, C), or with token (N, C); W (E, OC, C)
template <class T>
static void gpu_grouped_forward(T* y, const T* x, const int* token, const T* W, const int* offsets, const int2* tiles,
                                int max_tiles, int C, int OC, cudaStream_t stream = 0) {
    launch_experts<X_WT>(operand(x, C, token), operand<T>(W, C, NULL), offsets, tiles, max_tiles, 1, OC,
                         StoreEpilogue<T>{y, OC, by_fours(y, OC)}, stream);
}

// dx (R, C) = dy W_e; dy (R, OC), or with token (N, OC)
template <class T>
static void gpu_grouped_dx(T* dx, const T* dy, const int* token, const T* W, const int* offsets, const int2* tiles,
                           int max_tiles, int C, int OC, cudaStream_t stream = 0) {
    launch_experts<DY_W>(operand(dy, OC, token), operand<T>(W, C, NULL), offsets, tiles, max_tiles, 1, C,
                         StoreEpilogue<T>{dx, C, by_fours(dx, C)}, stream);
}

// tiles of offsets (E + 1), on the host
static std::vector<int2> make_tiles(const std::vector<int>& offsets) {
    std::vector<int2> tiles;
    int E = (int)offsets.size() - 1;
    for (int e = 0; e < E; e++)
        for (int r = offsets[e]; r < offsets[e + 1]; r += GROUP_ROWS) tiles.push_back(make_int2(e, r));
    tiles.resize(offsets[E] / GROUP_ROWS + E, make_int2(-1, 0));
    return tiles;
}

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the kernels are used

#include "test.cuh"

// N tokens with K neighbouring experts each, low numbers more often than high ones
struct Problem {
    int N, K, E, R, max_tiles;
    Array<int> offsets, token, assignment;
    Array<int2> tiles;
    std::vector<int> expert;        // of each row

    Problem(int N, int K, int E)
        : N(N), K(K), E(E), R(N * K), max_tiles(R / GROUP_ROWS + E), offsets(E + 1), token(R), assignment(R),
          tiles(max_tiles) {
        std::vector<std::vector<int>> of(E);
        for (int n = 0; n < N; n++) {
            double u = random_number() + 0.5;
            for (int k = 0; k < K; k++) of[((int)(u * u * E) + k) % E].push_back(n * K + k);
        }
        int r = 0;
        for (int e = 0; e < E; e++) {
            offsets.x[e] = r;
            for (int a : of[e]) {
                token.x[r] = a / K;
                assignment.x[r++] = a;
                expert.push_back(e);
            }
        }
        offsets.x[E] = r;
        tiles.x = make_tiles(offsets.x);
        offsets.send(), token.send(), assignment.send(), tiles.send();
    }
};

typedef std::vector<double> Doubles;

// The plain version: sum and size of the sum over k of a[i*step_a] b[i*step_b], i < count
template <class T>
static void dot(double* sum, double* size, const T* a, long step_a, const T* b, long step_b, int count) {
    *sum = *size = 0;
    for (long i = 0; i < count; i++) {
        double product = as_double(a[i * step_a]) * as_double(b[i * step_b]);
        *sum += product;
        *size += fabs(product);
    }
}

// shift: numbers by which all pointers miss a multiple of 16 bytes
template <class T> static void test(int N, int K, int E, int C, int OC, int shift) {
    Problem p(N, K, E);
    int R = p.R, parts = gpu_dgate_parts<T>(OC);
    Array<T> x((long)N * C, shift), W((long)E * OC * C, shift), up_W((long)E * 2 * OC * C, shift),
        y((long)R * OC, shift);
    Array<T> dy((long)N * OC, shift), dy_rows((long)R * OC, shift), dx((long)R * C, shift), dx_rows((long)R * C, shift);
    Array<T> gate_up((long)R * 2 * OC, shift), act((long)R * OC, shift), gated((long)R * OC, shift);
    Array<T> dout((long)N * C, shift), down((long)E * C * OC, shift);
    Array<float> dW((long)E * OC * C, shift), gates((long)N * K), dgates((long)N * K), dgate_parts((long)R * parts);
    for (Array<T>* a : {&x, &W, &up_W, &dy, &dy_rows, &dout, &down}) a->random(0.5);
    gates.random(0.5);
    double unit = result_unit<T>();
    Doubles want(y.n), size(y.n), want_u(y.n), size_u(y.n), both(gate_up.n), size_both(gate_up.n);

    // forward, gathered
    gpu_grouped_forward(y.gpu(), x.gpu(), p.token.gpu(), W.gpu(), p.offsets.gpu(), p.tiles.gpu(), p.max_tiles, C, OC,
                        test_stream);
    for (long r = 0; r < R; r++)
        for (long o = 0; o < OC; o++)
            dot(&want[r * OC + o], &size[r * OC + o], &x.x[(long)p.token.x[r] * C], 1,
                &W.x[(p.expert[r] * (long)OC + o) * C], 1, C);
    compare("forward", y, want, size, unit, 1e-6);

    // forward with SwiGLU
    gpu_experts_up(gate_up.gpu(), act.gpu(), x.gpu(), p.token.gpu(), up_W.gpu(), p.offsets.gpu(), p.tiles.gpu(),
                   p.max_tiles, C, OC, test_stream);
    for (long r = 0; r < R; r++)
        for (long o = 0; o < OC; o++) {
            const T *row = &x.x[(long)p.token.x[r] * C], *w = &up_W.x[(p.expert[r] * 2L * OC + o) * C];
            double g, g_size, u, u_size;
            dot(&g, &g_size, row, 1, w, 1, C);
            dot(&u, &u_size, row, 1, w + (long)OC * C, 1, C);
            both[r * 2 * OC + o] = g, both[r * 2 * OC + OC + o] = u;
            size_both[r * 2 * OC + o] = g_size, size_both[r * 2 * OC + OC + o] = u_size;
            want[r * OC + o] = g / (1 + exp(-g)) * u;
            size[r * OC + o] = 2 * (g_size * fabs(u) + u_size * fabs(g) + fabs(g * u));
        }
    compare("gate_up", gate_up, both, size_both, unit, 1e-6);
    compare("act", act, want, size, unit, 1e-6);

    // back through gate * down(SwiGLU): from the gate_up that the forward pass has left
    gpu_experts_down_backward(gate_up.gpu(), gated.gpu(), dgate_parts.gpu(), dout.gpu(), p.token.gpu(), gates.gpu(),
                              p.assignment.gpu(), down.gpu(), p.offsets.gpu(), p.tiles.gpu(), p.max_tiles, OC, C,
                              test_stream);
    gpu_gate_gradients(dgates.gpu(), dgate_parts.gpu(), p.assignment.gpu(), R, parts, test_stream);
    Doubles want_gates(N * K), size_gates(N * K);
    for (long r = 0; r < R; r++)
        for (long o = 0; o < OC; o++) {
            double d, d_size, gate = gates.x[p.assignment.x[r]], g = as_double(gate_up.x[r * 2 * OC + o]);
            double u = as_double(gate_up.x[r * 2 * OC + OC + o]), s = 1 / (1 + exp(-g)), slope = s * (1 + g * (1 - s));
            dot(&d, &d_size, &dout.x[(long)p.token.x[r] * C], 1, &down.x[p.expert[r] * (long)C * OC + o], OC, C);
            want_gates[p.assignment.x[r]] += d * g * s * u;
            size_gates[p.assignment.x[r]] += 2 * d_size * fabs(g * s * u);
            want[r * OC + o] = gate * g * s * u;
            size[r * OC + o] = 2 * fabs(gate * g * u);
            both[r * 2 * OC + o] = gate * d * u * slope, size_both[r * 2 * OC + o] = 2 * fabs(gate * d_size * u);
            both[r * 2 * OC + OC + o] = gate * d * g * s;
            size_both[r * 2 * OC + OC + o] = 2 * fabs(gate * d_size * g);
        }
    compare("the gradient of gate_up", gate_up, both, size_both, unit, 1e-6);
    compare("gated_act", gated, want, size, unit, 1e-6);
    compare("the gradient of the gates", dgates, want_gates, size_gates, 3e-7, 1e-6);

    // dX, of rows by expert and of rows by token
    want.assign(dx.n, 0), size.assign(dx.n, 0), want_u.assign(dx.n, 0), size_u.assign(dx.n, 0);
    gpu_grouped_dx(dx.gpu(), dy.gpu(), p.token.gpu(), W.gpu(), p.offsets.gpu(), p.tiles.gpu(), p.max_tiles, C, OC,
                   test_stream);
    gpu_grouped_dx(dx_rows.gpu(), dy_rows.gpu(), NULL, W.gpu(), p.offsets.gpu(), p.tiles.gpu(), p.max_tiles, C, OC,
                   test_stream);
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) {
            const T* w = &W.x[p.expert[r] * (long)OC * C + c];
            dot(&want[r * C + c], &size[r * C + c], &dy.x[(long)p.token.x[r] * OC], 1, w, C, OC);
            dot(&want_u[r * C + c], &size_u[r * C + c], &dy_rows.x[r * OC], 1, w, C, OC);
        }
    compare("dX by tokens", dx, want, size, unit, 1e-6);
    compare("dX", dx_rows, want_u, size_u, unit, 1e-6);

    // dW, overwritten and then added to: of an expert without rows, zeros
    want.assign(dW.n, 0), size.assign(dW.n, 0);
    for (long r = 0; r < R; r++)
        for (long o = 0; o < OC; o++)
            for (long c = 0; c < C; c++) {
                double term = as_double(dy_rows.x[r * OC + o]) * as_double(x.x[(long)p.token.x[r] * C + c]);
                want[(p.expert[r] * (long)OC + o) * C + c] += term;
                size[(p.expert[r] * (long)OC + o) * C + c] += fabs(term);
            }
    for (int add = 0; add < 2; add++) {
        gpu_experts_weight_backward(dW.gpu(), dy_rows.gpu(), (const int*)NULL, x.gpu(), p.token.gpu(), p.offsets.gpu(),
                                    E, OC, C, add, test_stream);
        if (add)
            for (double& v : want) v *= 2;
        compare(add ? "dW added to" : "dW", dW, want, size, 3e-7, 2e-6);
    }
}

static void bench(int N) {
    int K = 2, E = 8, C = 2048, OC = N < 1024 ? 256 : 2048;
    Problem p(N, K, E);
    Array<bf16> x((long)N * C), W((long)E * OC * C), y((long)p.R * OC), dx((long)p.R * C);
    Array<float> dW((long)E * OC * C);
    x.random(0.5), W.random(0.5), y.random(0.5);
    double flops = 2.0 * p.R * C * OC;
    printf("bf16, %d tokens, %d of %d experts (%d, %d), %s\n", N, K, E, OC, C, gpu_has_wgmma() ? "wgmma" : "mma.sync");
    time_of("forward, gathered", flops, "TFLOP/s", [&] {
        gpu_grouped_forward(y.gpu(), x.gpu(), p.token.gpu(), W.gpu(), p.offsets.gpu(), p.tiles.gpu(), p.max_tiles, C,
                            OC, test_stream);
    });
    time_of("dX", flops, "TFLOP/s", [&] {
        gpu_grouped_dx(dx.gpu(), y.gpu(), (const int*)NULL, W.gpu(), p.offsets.gpu(), p.tiles.gpu(), p.max_tiles, C, OC,
                       test_stream);
    });
    time_of("dW, gathered", flops, "TFLOP/s", [&] {
        gpu_experts_weight_backward(dW.gpu(), y.gpu(), (const int*)NULL, x.gpu(), p.token.gpu(), p.offsets.gpu(), E, OC,
                                    C, 0, test_stream);
    });
}

static void tests() {
    pretended_multiprocessors = 4;
    int shapes[][6] = {{75, 2, 5, 40, 72, 0},       // no dimension fills a tile
                       {1, 1, 3, 8, 1, 0},          // one token, experts without rows
                       {70, 2, 3, 41, 30, 1},       // nothing at multiples of 16 bytes
                       {300, 1, 3, 328, 136, 0},    // tiles and a rest in every direction; 6 stages, which share memory
                       {140, 2, 3, 456, 200, 0},    // all in tiles of 256 columns, several for a block
                       {140, 2, 3, 201, 197, 1}};   // the same at odd addresses
    for (auto& s : shapes) {
        test<float>(s[0], s[1], s[2], s[3], s[4], s[5]);
        test<bf16>(s[0], s[1], s[2], s[3], s[4], s[5]);
    }
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 16384); }
