/*
products.c: the matrix products of train_moe.c beside those of BLAS libraries, at every shape of bench.c's models.

    make products BLAS="LIBRARY.so ..."      libraries with a Fortran sgemm_ (OpenBLAS, MKL, PyTorch's libtorch_cpu.so)
    MODEL=small make products                only one of the models

Each line is one product: E matrices (OC, C), `rows` rows of x in all. Libraries are called once for each expert.
Figures are GFLOP/s of the fastest of many calls; the weights are taken from a ring of copies that is larger than the
caches of a core, as in a training step, where other layers' weights come in between. Every measurement has a process of
its own, because the threads of two libraries would disturb each other.
*/
#define TRAIN_MOE_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../../train_moe.c"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { MAX_LIBRARIES = 4, ROUNDS = 3, MOST_EXPERTS = 64 };
static const double ROUND_SECONDS = 0.06, RING_BYTES = 2e8;

typedef void Sgemm(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                   const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                   const int* ldc);

// MKL asks this function whether to use its code for AVX-512; on other makers' processors that have it, the answer
// should be yes, or MKL runs at half its speed. (It is found here because the program is linked with -rdynamic.)
int mkl_serv_intel_cpu_true(void) { return 1; }

// A row-major product as Fortran sees it: all matrices are transposed, and left and right change places.
static void library_product(Sgemm* sgemm, int kind, float* result, const float* left, const float* right, int rows,
                            int C, int OC) {
    float one = 1, zero = 0;
    if (rows == 0) return;
    if (kind == FORWARD) sgemm("T", "N", &OC, &rows, &C, &one, right, &C, left, &C, &zero, result, &OC);
    if (kind == BACKWARD_INPUT) sgemm("N", "N", &C, &rows, &OC, &one, right, &C, left, &OC, &zero, result, &C);
    if (kind == BACKWARD_WEIGHT) sgemm("N", "T", &C, &OC, &rows, &one, right, &C, left, &OC, &one, result, &C);
}

// Experts get rows in proportion to 1 .. 3, as a router with a balance loss might leave them.
static void share_rows(int* offsets, int E, int rows) {
    double weight = 0, total = 0;
    for (int e = 0; e < E; e++) total += 1 + 2 * random_uniform(mix64((uint64_t)e));
    for (int e = 0; e <= E; e++) {
        offsets[e] = (int)(rows * weight / total + 0.5);
        weight += 1 + 2 * random_uniform(mix64((uint64_t)e));
    }
}

// As the model's memory is: in pages of 2 MB, where the system has them.
static float* aligned_floats(long n) {
    size_t page = 1 << 21, bytes = ((size_t)n * sizeof(float) + page - 1) / page * page;
    float* p = (float*)aligned_alloc(page, bytes);
    if (!p) die(1, "out of memory");
    madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

// GFLOP/s of a product, ours if sgemm is NULL.
static double measure(Sgemm* sgemm, int kind, int rows, int C, int OC, int E) {
    long W = (long)C * OC, set = W * E, copies = (long)(RING_BYTES / 4 / set) + 1;
    float *ring = aligned_floats(set * copies), *x = aligned_floats((long)rows * C),
          *y = aligned_floats((long)rows * OC), scale = 1e-3f;
    int offsets[MOST_EXPERTS + 1];
    share_rows(offsets, E, rows);
    #pragma omp parallel for schedule(static)
    for (long i = 0; i < set * copies; i++) ring[i] = scale * (float)(i % 7 - 3);
    for (long i = 0; i < (long)rows * C; i++) x[i] = scale * (float)(i % 5 - 2);
    for (long i = 0; i < (long)rows * OC; i++) y[i] = scale * (float)(i % 3 - 1);
    double best = INFINITY, end = seconds() + ROUND_SECONDS;
    for (long call = 0; call < 3 || seconds() < end; call++) {
        float *w = ring + call % copies * set, *result = kind == FORWARD ? y : kind == BACKWARD_INPUT ? x : w;
        const float *left = kind == FORWARD ? x : y, *right = kind == BACKWARD_WEIGHT ? x : w;
        double t = seconds();
        if (!sgemm) fast_product(kind, result, left, right, W, C, OC, E, offsets, kind == BACKWARD_WEIGHT);
        for (int e = 0; sgemm && e < E; e++) {
            long first = offsets[e], wide = kind == FORWARD ? OC : C, narrow = kind == FORWARD ? C : OC;
            if (kind == BACKWARD_WEIGHT)
                library_product(sgemm, kind, w + e * W, y + first * OC, x + first * C, offsets[e + 1] - (int)first, C,
                                OC);
            else
                library_product(sgemm, kind, result + first * wide, left + first * narrow, w + e * W,
                                offsets[e + 1] - (int)first, C, OC);
        }
        t = seconds() - t;
        if (call > 0 && t < best) best = t;
    }
    free(ring);
    free(x);
    free(y);
    return 2.0 * rows * C * OC / best * 1e-9;
}

static Sgemm* libraries[MAX_LIBRARIES];
static const char* library_names[MAX_LIBRARIES];
static int num_libraries = 0, lines = 0, behind = 0;
static double worst = INFINITY, log_sum = 0;
static double* shared; // written by the processes that measure

static double in_process(Sgemm* sgemm, int kind, int rows, int C, int OC, int E) {
    int status;
    pid_t child = fork();
    if (child < 0) die(1, "fork: %s", strerror(errno));
    if (child == 0) {
        *shared = measure(sgemm, kind, rows, C, OC, E);
        _exit(0);
    }
    if (waitpid(child, &status, 0) != child || status != 0) die(1, "a process that measured failed");
    return *shared;
}

static void print_product(const char* model, const char* name, int rows, int C, int OC, int E) {
    static const char* kinds[] = {"y", "dx", "dW"};
    for (int kind = FORWARD; kind <= BACKWARD_WEIGHT; kind++) {
        double ours = 0, theirs[MAX_LIBRARIES] = {0}, best = 0;
        for (int round = 0; round < ROUNDS; round++) {
            ours = fmax(ours, in_process(NULL, kind, rows, C, OC, E));
            for (int i = 0; i < num_libraries; i++)
                theirs[i] = fmax(theirs[i], in_process(libraries[i], kind, rows, C, OC, E));
        }
        printf("%-8s %-8s %5d %5d %6d %3d  %-2s %8.0f", model, name, rows, C, OC, E, kinds[kind], ours);
        for (int i = 0; i < num_libraries; i++) {
            printf(" %12.0f", theirs[i]);
            best = fmax(best, theirs[i]);
        }
        if (num_libraries) {
            printf(" %9.2f", ours / best);
            lines++;
            behind += ours < best;
            worst = fmin(worst, ours / best);
            log_sum += log(ours / best);
        }
        printf("\n");
        fflush(stdout);
    }
}

typedef struct {
    const char* name;
    int H, Q, KV, I, E, K, V, N;
} Shape;

int main(int argc, char** argv) {
    static const Shape shapes[] = {
        //          H    Q    KV   I     E   K  V      N tokens
        {"default", 128, 128, 64,  256,  8,  2, 256,   1024},
        {"small",   256, 256, 128, 512,  8,  2, 512,   1024},
        {"medium",  512, 512, 256, 1024, 8,  2, 8192,  1024},
        {"large",   768, 768, 256, 1024, 8,  2, 32000, 512},
        {"fine",    384, 384, 384, 192,  64, 8, 4096,  1024},
        {"few",     512, 512, 256, 1024, 8,  2, 8192,  64},
    };
    const char* only = getenv("MODEL");
    begin_program("products");
    shared = (double*)mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 1; i < argc && num_libraries < MAX_LIBRARIES; i++) {
        void* library = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
        if (!library) die(2, "%s", dlerror());
        const char* slash = strrchr(argv[i], '/');
        *(void**)&libraries[num_libraries] = dlsym(library, "sgemm_");
        if (!libraries[num_libraries]) *(void**)&libraries[num_libraries] = dlsym(library, "scipy_sgemm_");
        if (!libraries[num_libraries]) die(2, "%s has no sgemm_; give a BLAS library", argv[i]);
        library_names[num_libraries++] = slash ? slash + 1 : argv[i];
    }
    printf("%-8s %-8s %5s %5s %6s %3s     %8s", "model", "weight", "rows", "C", "OC", "E", "ours");
    for (int i = 0; i < num_libraries; i++) printf(" %12.12s", library_names[i]);
    printf("%s\n", num_libraries ? "  our ratio to the best" : "");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const Shape* s = &shapes[i];
        if (only && strcmp(only, s->name)) continue;
        print_product(s->name, "qkv", s->N, s->H, s->Q + 2 * s->KV, 1);
        print_product(s->name, "attn_out", s->N, s->Q, s->H, 1);
        print_product(s->name, "router", s->N, s->H, s->E, 1);
        print_product(s->name, "gate_up", s->N * s->K, s->H, 2 * s->I, s->E);
        print_product(s->name, "down", s->N * s->K, s->I, s->H, s->E);
        print_product(s->name, "lm_head", s->N, s->H, s->V, 1);
    }
    if (lines)
        printf("ahead in %d of %d, geometric mean of the ratios %.2f, smallest %.2f\n", lines - behind, lines,
               exp(log_sum / lines), worst);
    return 0;
}
