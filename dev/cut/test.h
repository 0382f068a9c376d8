// test.h: what stands between the functions and the test in the files for CPUs: comparisons, times. cut.py writes into
// each what it needs of it.
#pragma once

static int passed, failed;

// n floats between -size and size
static float* numbers(long n, double size) {
    static uint32_t state = 1;
    float* x = (float*)malloc(sizeof(float) * (size_t)(n ? n : 1));
    if (!x) exit(1);
    for (long i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(2 * size * ((state >> 8) / 16777216.0 - 0.5));
    }
    return x;
}

static void check(int good, const char* what) {
    good ? passed++ : failed++;
    if (!good) printf("FAILED %s\n", what);
}

// The greatest error of n elements that has been told so far: an element may be off by 1e-6 of `size`, the sum of the
// sizes of what it is the sum of.
static double worst;
static void compare(double got, double want, double size) {
    double error = fabs(got - want) / (1e-6 * (fabs(want) + size) + 1e-30);
    if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
}
static void check_compared(const char* what) {
    if (worst > 1) printf("%.3g times what rounding may do: ", worst);
    check(worst <= 1, what);
    worst = 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
// A loop whose body is timed until half a second has passed; then `fastest` is the shortest time of one pass.
static double fastest, timing_began, pass_began;
static int time_again(void) {
    double t = now();
    if (pass_began != 0) fastest = fmin(fastest, t - pass_began);
    else fastest = INFINITY, timing_began = t;
    int again = pass_began == 0 || t - timing_began < 0.5;
    pass_began = again ? now() : 0;
    return again;
}
static void print_time(const char* what, double amount, const char* unit) {
    printf("%-44s %9.3f ms %8.2f %s\n", what, fastest * 1e3, amount / fastest * 1e-9, unit);
}

// ./PROGRAM tests, ./PROGRAM --bench [SIZE] times; `usual`: the size where none is given
static int run(int argc, char** argv, void (*tests)(void), void (*bench)(int size), int usual) {
    int size = argc == 3 ? atoi(argv[2]) : usual;
    if (argc > 3 || (argc > 1 && strcmp(argv[1], "--bench")) || size < 1) {
        fprintf(stderr, "%s: no argument tests, --bench [%d] times, of that size\n", argv[0], usual);
        exit(2);
    }
    if (argc > 1) {
        bench(size);
        return 0;
    }
    tests();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
