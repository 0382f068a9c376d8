/*
classifier.cu: the cross-entropy of each token, and the logits turned into their gradient in place, in one kernel.

    nvcc -std=c++17 -O3 -gencode arch=compute_80,code=sm_80 classifier.cu -o classifier && ./classifier
    ./classifier --bench

(compute_90a and sm_90a for H100 and H200, or what your card is, 80 or later.) Nothing but CUDA is needed.

    losses_n = log sum_v exp(logits_nv) - logits_n,target                                       gpu_classifier
    logits_nv = scale (exp(logits_nv) / sum_v exp(logits_nv) - [v = target])  if write_gradient
    *total += weight * sum of losses                                                            gpu_add_losses

Shapes     losses (N) floats, targets (N) ints in 0 .. V-1, logits N rows of V numbers that lie row_size apart: T is
           __nv_bfloat16 or float. Neither probabilities nor logarithms are stored. scale is 1 / N for the mean of one
           batch. What lies between V and row_size is left alone.
Alignment  Any V and any row_size. Vectors of 16 bytes are used from the first multiple of 16 bytes of each row on, so
           that odd V (50257) is no slower here; the products before and after like a row_size that is a multiple of 8.
Stream     The last argument, 0 by default. Nothing is allocated, nothing waits for the device. A failed call ends the
           program: `die`.
Results    One order of all sums: the same bits each time. __expf errs by |x| 2^-24 more than expf.
Before     the product of the LM head. After: that product's two backward ones, which read the gradient from the logits.
Speed      unmeasured: no GPU has run this file yet. It was tested on a CPU that executes CUDA C++.

Cut out of the mixture-of-experts trainer train_moe.cu, whose comments it keeps. The test compares with plain loops in
doubles.
*/
#include "before.cuh"

// cut: gpu_classifier gpu_add_losses

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the kernels are used

#include "test.cuh"

typedef std::vector<double> Doubles;

template <class T> static void test(int N, int V, long row_size, int shift, double size, int write_gradient) {
    Array<T> logits(N * row_size, shift);
    Array<float> losses(N);
    Array<int> targets(N);
    Array<double> total(1);
    float scale = 0.25f;
    logits.random(size);
    for (int n = 0; n < N; n++) targets.x[n] = n ? (int)((random_number() + 0.5) * V) : V - 1;
    targets.send();
    total.x[0] = 2;
    total.send();
    Doubles want(logits.n), sizes(logits.n), want_losses(N), size_losses(N);
    double sum_of_losses = 2;
    for (int n = 0; n < N; n++) {
        double max = -INFINITY, sum = 0, *row = &want[n * row_size];
        for (long v = 0; v < row_size; v++) row[v] = as_double(logits.x[n * row_size + v]);
        for (int v = 0; v < V; v++) max = fmax(max, row[v]);
        for (int v = 0; v < V; v++) sum += exp(row[v] - max);
        want_losses[n] = max + log(sum) - row[targets.x[n]];
        size_losses[n] = 2 * size;
        sum_of_losses += want_losses[n] / N;
        for (int v = 0; v < V && write_gradient; v++) {
            double p = exp(row[v] - max) / sum;
            row[v] = scale * (p - (v == targets.x[n]));
            sizes[n * row_size + v] = scale * p * (1 + size);
        }
    }
    gpu_classifier(losses.gpu(), logits.gpu(), targets.gpu(), N, V, row_size, scale, write_gradient, test_stream);
    gpu_add_losses(total.gpu(), losses.gpu(), N, 1.0 / N, test_stream);
    compare("the losses", losses, want_losses, size_losses, 1e-6, 1e-6);
    compare(write_gradient ? "the gradient" : "the logits, left alone", logits, want, sizes,
            write_gradient ? result_unit<T>() : 0, 1e-6);
    compare("the total", total, {sum_of_losses}, {2 * size}, 1e-6, 1e-6);
}

static void bench(int N) {
    int V = N < 1024 ? 1000 : 50304;
    Array<bf16> logits((long)N * V);
    Array<float> losses(N);
    Array<int> targets(N);
    logits.random(1);
    for (int& t : targets.x) t = (int)((random_number() + 0.5) * V);
    targets.send();
    printf("bf16, %d tokens, %d logits each\n", N, V);
    time_of("losses and gradient", 4.0 * N * V, "TB/s", [&] {       // a row is read twice, the second time from a cache
        gpu_classifier(losses.gpu(), logits.gpu(), targets.gpu(), N, V, V, 1e-3f, 1, test_stream);
    });
}

template <class T> static void test_all() {
    test<T>(3, 1000, 1000, 0, 5, 1);
    test<T>(2, 1, 1, 0, 5, 1);
    test<T>(4, 257, 264, 0, 5, 1);          // rows with a gap behind them
    test<T>(3, 7, 7, 1, 5, 1);              // less than a vector, at odd addresses
    test<T>(2, 20011, 20011, 1, 300, 1);    // large logits; several turns of 1024 threads
    test<T>(5, 600, 600, 0, 5, 0);
}

static void tests() {
    test_all<float>();
    test_all<bf16>();
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 16384); }
