/*
bench.c: how fast train_moe.c is, compared with what the machine could do.

    make bench                      everything, about two minutes
    build/bench --short             a few seconds: shows that it works, not how fast it is
    build/bench --config medium     one of the configurations; --seconds S: for how long (peers.sh uses both)
    build/bench --bf16              steps in fp32 and bf16 in turns, a row for each

A step is forward, backward, clipping and AdamW on a fixed batch. Times are those of the fastest step: other programs on
the machine can only add to them. The peak of the machine is measured again between the steps.
*/
#include "timed.h"
#define TRAIN_MOE_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../../train_moe.c"

#include <sys/wait.h>
#include <sys/resource.h>

typedef struct {
    const char* name;
    int L, H, NH, NKV, HD, I, E, K, V, B, T;
} Shape;

static const Shape shapes[] = {
    //           L   H    NH NKV HD  I     E   K  V      B  T
    {"default",  4,  128, 4,  2, 32, 256,  8,  2, 256,   8, 128},
    {"small",    6,  256, 8,  4, 32, 512,  8,  2, 512,   4, 256},
    {"medium",   8,  512, 8,  4, 64, 1024, 8,  2, 8192,  4, 256},
    {"large",    12, 768, 12, 4, 64, 1024, 8,  2, 32000, 2, 256},
    {"fine",     6,  384, 6,  6, 64, 192,  64, 8, 4096,  4, 256},
};
enum { NUM_SHAPES = sizeof shapes / sizeof *shapes };

static Config shape_config(const Shape* s) {
    Config c;
    memset(&c, 0, sizeof c);
    c.arch = QWEN3_MOE;
    c.qk_norm = QK_NORM_HEAD;
    c.num_layers = s->L;
    c.hidden_size = s->H;
    c.num_heads = s->NH;
    c.num_kv_heads = s->NKV;
    c.head_dim = s->HD;
    c.moe_intermediate_size = s->I;
    c.num_experts = s->E;
    c.num_experts_per_tok = s->K;
    c.norm_topk_prob = 1;
    c.vocab_size = s->V;
    c.max_position_embeddings = s->T;
    c.rope_theta = 10000;
    c.rms_norm_eps = 1e-6;
    c.router_aux_loss_coef = 0.01;
    memset(c.sparse, 1, sizeof c.sparse);
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// The machine

// Multiply-adds between registers, 2 flops each: sums that are independent, and enough to hide a latency, 12 where
// there are 16 registers. VDPBF16PS does two in each place of a vector, TDPBF16PS 16 * 16 * 32 with two tiles.
enum { PEAK_SUMS = VECTOR_LENGTH == 16 ? 16 : 12 };

static double peak_seconds(long rounds, Packing way, double* multiply_adds) {
    double t = seconds(), done = 0;
    float result = 0;
    #pragma omp parallel reduction(+ : result, done)
    {
        vector sum[PEAK_SUMS], zero = {0}, x = zero + 1.0000001f, y = zero + 1e-9f;
        float pair = 1;
        UNROLL
        for (int i = 0; i < PEAK_SUMS; i++) sum[i] = zero + (float)i;
        if (way == PACK_FP32 || way == PACK_ROUNDED) {
            for (long r = 0; r < rounds; r++) {
                UNROLL
                for (int i = 0; i < PEAK_SUMS; i++) sum[i] = sum[i] * x + y;
            }
            done = (double)rounds * PEAK_SUMS * VECTOR_LENGTH;
        } else if (way == PACK_PAIRS) {
            for (long r = 0; r < rounds; r++) {
                UNROLL
                for (int i = 0; i < PEAK_SUMS; i++) sum[i] = add_pairs(sum[i], &pair, y);
            }
            done = (double)rounds * PEAK_SUMS * VECTOR_LENGTH * 2;
        }
#if AMX_TILES
        if (way == PACK_TILES) {
            TileShapes tiles = {1, 0, {0}, {0}, {0}};
            for (int i = 0; i < 8; i++) {
                tiles.row_bytes[i] = 64;
                tiles.rows[i] = 16;
            }
            tile_shapes(&tiles); // which clears them
            for (long r = 0; r < rounds / 16; r++) {
                tile_multiply(0, 4, 6);
                tile_multiply(1, 4, 7);
                tile_multiply(2, 5, 6);
                tile_multiply(3, 5, 7);
            }
            tile_release();
            done = rounds / 16 * 4.0 * 16 * 16 * 32;
        }
#endif
        UNROLL
        for (int i = 1; i < PEAK_SUMS; i++) sum[0] += sum[i];
        for (int i = 0; i < VECTOR_LENGTH; i++) result += ((float*)&sum[0])[i];
    }
    t = seconds() - t;
    volatile float sink = result; // so that the compiler does not leave the work out
    (void)sink;
    *multiply_adds = done;
    return t;
}

static double peak_flops(int bf16) {
    const long rounds = 200000; // about a millisecond, so that some try is not interrupted
    double best = 0;
    for (int i = 0; i < 20; i++) {
        double multiply_adds, t = peak_seconds(rounds, bf16 ? bf16_packing : PACK_FP32, &multiply_adds);
        best = fmax(best, 2 * multiply_adds / t);
    }
    return best;
}

// a = b + k c. 16 bytes are moved for each element, because a's line is read before it is written. (STREAM counts 12.)
static double triad_bytes_per_second(float* a, const float* b, const float* c, long n) {
    double best = 0;
    for (int i = 0; i < 5; i++) {
        double t = seconds();
        #pragma omp parallel for simd schedule(static)
        for (long j = 0; j < n; j++) a[j] = b[j] + 0.5f * c[j];
        t = 16.0 * n / (seconds() - t);
        if (t > best) best = t;
    }
    return best;
}

static double read_bytes_per_second(const float* a, long n) {
    double best = 0;
    for (int i = 0; i < 5; i++) {
        float sum = 0;
        double t = seconds();
        #pragma omp parallel for simd schedule(static) reduction(+ : sum)
        for (long j = 0; j < n; j++) sum += a[j];
        t = 4.0 * n / (seconds() - t);
        volatile float sink = sum;
        (void)sink;
        if (t > best) best = t;
    }
    return best;
}

// ---------------------------------------------------------------------------------------------------------------------
// Training

typedef struct {
    double step_seconds[2], peak[2], flops, phase[2][NUM_PHASES], predicted;   // [1]: bf16's, with --bf16
    int steps;
} Result;
static int bf16_too = 0;

static void random_tokens(int* tokens, int n, int V, uint64_t key) {
    for (int i = 0; i < n; i++) tokens[i] = (int)(random_uniform(mix64(key + (uint64_t)i)) * V);
}

static Result bench_training(const Shape* s, double for_seconds, int least_steps) {
    Config c = shape_config(s);
    Model* m = model_create(&c, FOR_TRAINING, s->B, s->T, s->T, NULL);
    model_init(m, 1);
    m->balance.aux = (float)c.router_aux_loss_coef;
    m->counting_load = 1; // as the training loop has it
    int N = s->B * s->T;
    int* tokens = (int*)checked_malloc(sizeof(int) * 2 * N);
    random_tokens(tokens, 2 * N, s->V, 7);
    AdamW o = {0.9, 0.95, 1e-8, 0.1, 1.0};
    Result result;
    memset(&result, 0, sizeof result);
    result.flops = flops_per_token(&c, s->T) * N;
    result.predicted = (double)(m->bytes_params + m->bytes_optimizer + m->bytes_activations);
    result.step_seconds[0] = result.step_seconds[1] = INFINITY;
    double end = 0;
    for (int step = 0; step < (least_steps + 1) * (1 + bf16_too) || seconds() < end; step++) {
        int way = bf16_products = bf16_too && step % 2;
        if (step == 1) end = seconds() + for_seconds * (1 + bf16_too); // the first step does not count
        memset(phase_seconds, 0, sizeof phase_seconds);
        double start = seconds();
        model_forward(m, tokens, tokens + N, s->B, s->T);
        model_backward(m, 1);
        phase_enter(PHASE_ADAMW);
        model_update(m, &o, 1e-4, step + 1);
        phase_leave();
        double elapsed = seconds() - start;
        if (step > 0 && elapsed < result.step_seconds[way]) {
            result.step_seconds[way] = elapsed;
            memcpy(result.phase[way], phase_seconds, sizeof phase_seconds);
        }
        if (step % 8 == 1) {
            for (int bf16 = 0; bf16 <= bf16_too; bf16++) result.peak[bf16] = fmax(result.peak[bf16], peak_flops(bf16));
        }
        result.steps = step;
    }
    free(tokens);
    model_free(m);
    return result;
}

// Runs a measurement in a process of its own, so that its memory can be told from that of the others.
static Result in_process(const Shape* s, double for_seconds, int least_steps, double* peak_memory) {
    int channel[2], status = 0;
    Result result;
    fflush(stdout);
    if (pipe(channel)) die(1, "pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0) die(1, "fork: %s", strerror(errno));
    if (child == 0) {
        result = bench_training(s, for_seconds, least_steps);
        _exit(write(channel[1], &result, sizeof result) != sizeof result);
    }
    struct rusage usage;
    if (wait4(child, &status, 0, &usage) != child || status != 0 ||
        read(channel[0], &result, sizeof result) != sizeof result)
        die(1, "the process that measured %s failed", s->name);
    close(channel[0]);
    close(channel[1]);
    *peak_memory = usage.ru_maxrss * 1024.0;
    return result;
}

static void print_training_header(void) {
    printf("%-8s %9s %8s %7s", "config", "tokens/s", "GFLOP/s", "% peak");
    for (int p = 0; p < NUM_PHASES; p++) printf(" %9s", phase_names[p]);
    printf(" %8s %7s  steps\n", "peak MB", "predic.");
}

static void print_training(const Shape* s, const Result* r, double peak_memory) {
    for (int way = 0; way <= bf16_too; way++) {
        double step = r->step_seconds[way], rest = step;
        printf("%-8s %9.0f %8.1f %7.1f", way ? "  bf16" : s->name, s->B * s->T / step, r->flops / step * 1e-9,
               100 * r->flops / step / r->peak[way]);
        for (int p = 0; p < PHASE_REST; p++) rest -= r->phase[way][p];
        for (int p = 0; p < NUM_PHASES; p++)
            printf(" %7.1f %%", 100 * (p == PHASE_REST ? rest : r->phase[way][p]) / step);
        if (way) printf(" %.2f times fp32, its peak %.2f times\n", r->step_seconds[0] / step, r->peak[1] / r->peak[0]);
        else printf(" %8.1f %7.1f  %d\n", peak_memory * 1e-6, r->predicted * 1e-6, r->steps);
    }
    fflush(stdout);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is bound by memory

static void bench_adamw(long n) {
    float *w = (float*)checked_malloc(sizeof(float) * (size_t)n * 4), *g = w + n, *m = g + n, *v = m + n;
    #pragma omp parallel for
    for (long i = 0; i < 4 * n; i++) w[i] = 1e-3f;
    double best = 0, triad = 0, bytes = 32.0 * n; // w, g, m, v are read and written
    for (int i = 0; i < 5; i++) {
        double now = triad_bytes_per_second(w, g, m, n);
        if (now > triad) triad = now;
        double t = seconds();
        adamw(w, g, m, v, n, 1, 1e-4f, 0.1f, 0.9f, 0.95f, 1e-8f, 0.5f, 0.5f);
        t = bytes / (seconds() - t);
        if (t > best) best = t;
    }
    printf("AdamW and clearing gradients, %ld M parameters: %.1f GB/s, %.0f %% of a triad's %.1f GB/s\n",
           n / 1000000, best * 1e-9, 100 * best / triad, triad * 1e-9);
    free(w);
}

// Tokens/s with a key/value cache. A token reads the matrices that it uses and the cache.
static void bench_generation(const Shape* s, int tokens) {
    Config c = shape_config(s);
    int positions = 2 * tokens + 16;
    Model* m = model_create(&c, FOR_GENERATION, 1, 1, positions, NULL);
    model_init(m, 1);
    long total, active;
    count_parameters(&c, &total, &active);
    double cache = 0, best = INFINITY, bytes = 4.0 * (active - (double)c.vocab_size * c.hidden_size);
    double bandwidth = read_bytes_per_second(m->params, total);
    for (int i = 0; i < 2 * tokens; i++) {
        int token = (int)(random_uniform(mix64((uint64_t)i)) * s->V);
        double t = seconds();
        model_forward(m, &token, NULL, 1, 1);
        t = seconds() - t;
        if (t < best) {
            best = t;
            cache = 8.0 * c.num_layers * c.num_kv_heads * c.head_dim * m->cached;
        }
    }
    double now = read_bytes_per_second(m->params, total);
    if (now > bandwidth) bandwidth = now;
    printf("generation, %s: %.0f tokens/s, %.1f MB a token, %.1f GB/s, %.0f %% of the %.1f GB/s of reading alone\n",
           s->name, 1 / best, (bytes + cache) * 1e-6, (bytes + cache) / best * 1e-9,
           100 * (bytes + cache) / best / bandwidth, bandwidth * 1e-9);
    model_free(m);
}

// ---------------------------------------------------------------------------------------------------------------------
// How time grows with B and T

static void bench_growth(const Shape* base, double for_seconds, int short_form) {
    printf("\n%s, by batch and length:\n   B      T  us/token  GFLOP/s  %% peak\n", base->name);
    static const int grid[][2] = {{1, 256}, {2, 256}, {4, 256}, {8, 256}, {16, 256}, {4, 512}, {2, 1024}, {1, 2048}};
    double gflops[8];
    for (int i = 0; i < (short_form ? 2 : 8); i++) {
        Shape s = *base;
        double memory;
        s.B = grid[i][0];
        s.T = grid[i][1];
        Result r = in_process(&s, for_seconds, 1, &memory);
        gflops[i] = r.flops / r.step_seconds[0] * 1e-9;
        printf("%4d %6d %9.2f %8.1f %7.1f\n", s.B, s.T, r.step_seconds[0] / (s.B * s.T) * 1e6, gflops[i],
               100 * r.flops / r.step_seconds[0] / r.peak[0]);
        fflush(stdout);
    }
    if (!short_form)
        printf("T = 2048 is %.0f %% %s per FLOP than T = 256 with as many tokens\n",
               100 * fabs(gflops[3] / gflops[7] - 1), gflops[7] < gflops[3] ? "slower" : "faster");
}

int main(int argc, char** argv) {
    const char* only = NULL;
    int short_form = 0;
    double for_seconds = 8;
    begin_program("bench");
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--short")) short_form = 1;
        else if (!strcmp(argv[i], "--bf16")) bf16_too = 1;
        else if (!strcmp(argv[i], "--config") && i + 1 < argc) only = argv[++i];
        else if (!strcmp(argv[i], "--seconds") && i + 1 < argc) for_seconds = atof(argv[++i]);
        else die(2, "unknown argument %s; there are --short, --bf16, --config NAME, --seconds S", argv[i]);
    }
    if (short_form) for_seconds = 0;
    int known = 0;
    use_precision(bf16_too);        // says how bf16 is computed
    print_training_header();
    for (int i = 0; i < NUM_SHAPES; i++) {
        if (only ? strcmp(only, shapes[i].name) : short_form && i > 0) continue;
        double memory;
        Result r = in_process(&shapes[i], for_seconds, 3, &memory);
        print_training(&shapes[i], &r, memory);
        known = 1;
    }
    if (!known) die(2, "there is no configuration %s", only);
    if (only) return 0;
    use_precision(bf16_too = 0);
    bench_growth(&shapes[short_form ? 0 : 1], for_seconds / 3, short_form);
    printf("\n"); // from here on this process uses threads: no more forks
    bench_adamw(short_form ? 1 << 20 : 1 << 25);
    for (int i = 0; i < (short_form ? 1 : 4); i++)
        if (short_form || i >= 2) bench_generation(&shapes[i], short_form ? 8 : 32);
    printf("peak: %.1f GFLOP/s on %d threads\n", peak_flops(0) * 1e-9, thread_count());
    return 0;
}
