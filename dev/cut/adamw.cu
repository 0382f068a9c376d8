/*
adamw.cu: one AdamW step, with the gradient's norm and its clipping, that the host need not wait for.

    nvcc -std=c++17 -O3 -gencode arch=compute_80,code=sm_80 adamw.cu -o adamw && ./adamw && ./adamw --bench

(compute_90a and sm_90a for H100 and H200, or what your card is, 80 or later.) Nothing but CUDA is needed.

    gpu_gradient_norm   *norm = the 2-norm of all gradients, on the device
    gpu_adamw           g = the gradient, scaled so that *norm does not exceed `clip` (0: any norm will do)
                        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
                        w -= lr (m / correction1) / (sqrt(v / correction2) + eps) + lr decay w
                        copy = w in the type T of the products (__nv_bfloat16), or NULL with T = float

Shapes     w, grad, m, v (n) floats, copy (n). n is a long. The gradient is read only: clear or overwrite it yourself.
           correction_i = 1 - beta_i^step, step counted from 1. Weight decay is a number for the call: call once for
           matrices, once with decay 0 for vectors.
Not finite If *norm is not, nothing changes, and the host can find out later.
Alignment  Multiples of 16 bytes are read and written 16 bytes at a time; other addresses number by number.
Scratch    parts: GRADIENT_NORM_PARTS doubles.
Stream     The last argument, 0 by default. Nothing is allocated, nothing waits for the device. A failed call ends the
           program: `die`.
Results    Squares are summed in a fixed order, in floats for four neighbours and in doubles from there: the same bits
           each time. w, m, v lie in fp32; 30 bytes are moved for a parameter with a copy in bf16.
Before     the backward pass, and on several devices the sum of the gradients. After: the next forward pass reads copy.
Speed      unmeasured: no GPU has run this file yet. It was tested on a CPU that executes CUDA C++.

Cut out of the mixture-of-experts trainer train_moe.cu, whose comments it keeps. The test compares with plain loops in
doubles.
*/
#include "before.cuh"

// cut: gpu_gradient_norm gpu_adamw

// ---------------------------------------------------------------------------------------------------------------------
// Test and benchmark: nothing from here on is needed where the kernels are used

#include "test.cuh"

typedef std::vector<double> Doubles;

template <class T> static void test(long n, int shift, float clip, int finite) {
    const double lr = 0.01, decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
    Array<float> w(n, shift), grad(n, shift), m(n, shift), v(n, shift), norm(1);
    Array<T> copy(n, shift);
    Array<double> parts(GRADIENT_NORM_PARTS);
    bool copied = sizeof(T) == 2;
    w.random(1), grad.random(1), m.random(1), v.random(1), norm.random(1);
    for (float& x : v.x) x = fabsf(x);
    if (!finite) grad.x[n / 2] = NAN;
    v.send(), grad.send();
    double squares = 0;
    for (float g : grad.x) squares += (double)g * g;
    double correction1 = 1 - pow(beta1, 3), correction2 = 1 - pow(beta2, 3), scale = 1;
    if (clip > 0 && sqrt(squares) + 1e-6 > clip) scale = clip / (sqrt(squares) + 1e-6);
    Doubles want_w(n), size_w(n), want_m(n), size_m(n), want_v(n);
    for (long i = 0; i < n; i++) {
        double g = finite ? grad.x[i] * scale : 0, m_i = m.x[i], v_i = v.x[i];
        want_w[i] = w.x[i], size_w[i] = fabs(w.x[i]), want_m[i] = m_i, want_v[i] = v_i;
        if (!finite) continue;
        want_m[i] = beta1 * m_i + (1 - beta1) * g;
        want_v[i] = beta2 * v_i + (1 - beta2) * g * g;
        double root = sqrt(want_v[i] / correction2) + eps, step = lr * want_m[i] / correction1 / root;
        size_m[i] = fabs(m_i) + fabs(g);
        want_w[i] -= step + lr * decay * w.x[i];
        size_w[i] += fabs(step) + lr * size_m[i] / correction1 / root;
    }
    gpu_gradient_norm(norm.gpu(), parts.gpu(), grad.gpu(), n, test_stream);
    gpu_adamw(copied ? copy.gpu() : (T*)NULL, w.gpu(), grad.gpu(), m.gpu(), v.gpu(), n, norm.gpu(), clip, (float)lr,
              (float)decay, (float)beta1, (float)beta2, (float)eps, (float)correction1, (float)correction2,
              test_stream);
    if (finite) compare("the norm", norm, {sqrt(squares)}, {0}, 1e-6, 0);
    else check(norm.fetch() && isnan(norm.x[0]), "the norm of what is not finite");
    compare("w", w, want_w, size_w, 1e-6, 1e-6);
    compare("m", m, want_m, size_m, 1e-6, 1e-6);
    compare("v", v, want_v, want_v, 1e-6, 1e-6);
    check(parts.fetch() && grad.fetch(), "the gradient and the scratch are not left");
    if (copied && finite) compare("the copy", copy, want_w, size_w, 1.0 / 250, 1e-6);
}

static void bench(int thousands) {
    long n = thousands * 1024L;
    Array<float> w(n), grad(n), m(n), v(n), norm(1);
    Array<bf16> copy(n);
    Array<double> parts(GRADIENT_NORM_PARTS);
    w.random(1), grad.random(1), m.random(1);
    CHECK(cudaMemset(v.gpu(), 0, n * sizeof(float)));
    printf("%ld parameters\n", n);
    time_of("norm", 4.0 * n, "TB/s", [&] { gpu_gradient_norm(norm.gpu(), parts.gpu(), grad.gpu(), n, test_stream); });
    time_of("AdamW with a copy in bf16", 30.0 * n, "TB/s", [&] {
        gpu_adamw(copy.gpu(), w.gpu(), grad.gpu(), m.gpu(), v.gpu(), n, norm.gpu(), 1, 1e-3f, 0.1f, 0.9f, 0.95f, 1e-8f,
                  0.1f, 0.05f, test_stream);
    });
}

static void tests() {
    test<float>(1, 0, 0, 1);
    test<bf16>(10007, 0, 1, 1);         // clipped; a rest behind the last vector
    test<float>(10007, 0, 0, 1);
    test<bf16>(777, 1, 1e6, 1);         // nothing at multiples of 16 bytes, and a norm below the bound
    test<bf16>(777, 0, 1, 0);           // a gradient that is not finite
}

int main(int argc, char** argv) { return run(argc, argv, tests, bench, 65536); }
