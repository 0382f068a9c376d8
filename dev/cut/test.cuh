// test.cuh: what stands between the kernels and the test in the files for GPUs: arrays on both sides, comparisons,
// times. cut.py writes into each what it needs of it.
#pragma once

static int passed, failed;
static cudaStream_t test_stream;    // not the default one, which does not wait for it

template <class T> static double as_double(T x) {
    if constexpr (sizeof(T) == 2) return __bfloat162float(x);
    else return x;
}
template <class T> static void put(T* p, double x) {
    if constexpr (sizeof(T) == 2) *p = __float2bfloat16((float)x);
    else *p = (T)x;
}

// in -1/2 .. 1/2
static double random_number() {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (state >> 8) / 16777216.0 - 0.5;
}

// n numbers on the host (x) and on the device (gpu()), there `shift` numbers behind a multiple of 16 bytes, and between
// guards that nobody may write to. At first all bits are set: NaN, or -1.
template <class T> struct Array {
    enum { GUARD = 64 };
    size_t n, shift;
    std::vector<T> x;
    T* memory;

    explicit Array(size_t n, size_t shift = 0) : n(n), shift(shift), x(n) {
        CHECK(cudaMalloc((void**)&memory, bytes()));
        CHECK(cudaMemset(memory, 0xff, bytes()));
        memset((void*)x.data(), 0xff, n * sizeof(T));
    }
    Array(const Array&) = delete;
    ~Array() { cudaFree(memory); }
    size_t bytes() const { return (n + shift + 2 * GUARD) * sizeof(T); }
    T* gpu() const { return memory + GUARD + shift; }
    void send() const { CHECK(cudaMemcpy(gpu(), x.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    Array& random(double size) {
        for (T& v : x) put(&v, 2 * size * random_number());
        send();
        return *this;
    }
    Array& set(const std::vector<double>& values) {
        for (size_t i = 0; i < n; i++) put(&x[i], values[i]);
        send();
        return *this;
    }
    // what the kernels before have left; 1 if the guards are as they were
    int fetch() {
        std::vector<unsigned char> all(bytes());
        CHECK(cudaStreamSynchronize(test_stream));
        CHECK(cudaMemcpy(all.data(), memory, bytes(), cudaMemcpyDeviceToHost));
        size_t begin = (GUARD + shift) * sizeof(T), end = begin + n * sizeof(T);
        memcpy((void*)x.data(), all.data() + begin, n * sizeof(T));
        for (size_t i = 0; i < all.size(); i++)
            if ((i < begin || i >= end) && all[i] != 0xff) return 0;
        return 1;
    }
};

static void check(int good, const char* what) {
    good ? passed++ : failed++;
    if (!good) printf("FAILED %s\n", what);
}

// Are all elements right? Each may be off by `result` of its own size, and by `terms` of `size`, the sum of the sizes
// of what it is the sum of. (bf16 has 8 bits: rounding to it errs by up to 2^-9.)
template <class T>
static void compare(const char* what, Array<T>& got, const std::vector<double>& want, const std::vector<double>& size,
                    double result, double terms) {
    double worst = 0;
    int whole = got.fetch();
    for (size_t i = 0; i < got.n; i++) {
        double error = fabs(as_double(got.x[i]) - want[i]) / (result * fabs(want[i]) + terms * size[i] + 1e-30);
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    int good = whole && worst <= 1;
    good ? passed++ : failed++;
    if (!good) printf("FAILED %s, %zu-byte numbers: %.3g times what rounding may do%s\n", what, sizeof(T), worst,
                      whole ? "" : "; written beyond its end");
}
template <class T> static void compare_exactly(const char* what, Array<T>& got, const std::vector<T>& want) {
    check(got.fetch() && got.x == want, what);
}
template <class T> static double result_unit() { return sizeof(T) == 2 ? 1.0 / 250 : 3e-7; }

// Prints the mean time of ten calls and what that makes in a second; amount: operations (unit TFLOP/s) or bytes (TB/s).
// `record` is what the project knows of this line: "unmeasured" as long as no GPU has run it. On the stand-in, a CPU
// that plays a GPU, a time says nothing.
template <class Call>
static void time_of(const char* what, double amount, const char* unit, Call call, const char* record = "unmeasured") {
    call();                                     // the first time is slower, and not counted
#ifdef CUDA_STAND_IN
    (void)amount;
    CHECK(cudaStreamSynchronize(test_stream));
    printf("%-44s %10s %8s %-8s on record: %s\n", what, "unmeasured", "", unit, record);
#else
    cudaEvent_t start, end;
    float ms = 0;
    const int runs = 10;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventRecord(start, test_stream));
    for (int i = 0; i < runs; i++) call();
    CHECK(cudaEventRecord(end, test_stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&ms, start, end));
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(end));
    printf("%-44s %7.3f ms %8.2f %-8s on record: %s\n", what, ms / runs, amount * runs / ms * 1e-9, unit, record);
#endif
}

// ./PROGRAM tests, ./PROGRAM --bench [SIZE] times; `usual`: the size where none is given
static int run(int argc, char** argv, void (*tests)(), void (*bench)(int size), int usual) {
    int size = argc == 3 ? atoi(argv[2]) : usual;
    if (argc > 3 || (argc > 1 && strcmp(argv[1], "--bench")) || size < 1)
        die(2, "%s: no argument tests, --bench [%d] times, of that size", argv[0], usual);
    CHECK(cudaStreamCreateWithFlags(&test_stream, cudaStreamNonBlocking));
    if (argc > 1) {
        bench(size);
        return 0;
    }
    tests();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
