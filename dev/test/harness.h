/*
harness.h: what all tests use: a check prints a line and counts, errors between arrays, files in a directory of the
tests' own, runs of the program under test, small models.
*/
#include <ftw.h>
#include <sys/resource.h>
#include <sys/wait.h>

static int passed = 0, failed = 0;
static const char* group_name = "";
static int default_threads = 1;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
check(int ok, const char* format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s %s: ", ok ? "ok    " : "FAILED", group_name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    if (ok)
        passed++;
    else
        failed++;
}

// What a group allocates and opens is released when it ends, the last thing first: tests need not say so.
typedef enum { A_BLOCK, A_MODEL, A_FILE, A_JSON } Kind;
static struct {
    Kind kind;
    void* what;
} kept[1 << 16];
static int num_kept = 0;

static void* keep(Kind kind, void* what) {
    if (num_kept == (int)(sizeof kept / sizeof kept[0])) die(1, "%s: too many blocks to keep", group_name);
    kept[num_kept].kind = kind;
    kept[num_kept++].what = what;
    return what;
}
static Model* keep_model(Model* m) { return (Model*)keep(A_MODEL, m); }
static SafeTensors* keep_file(SafeTensors* s) { return (SafeTensors*)keep(A_FILE, s); }
static Json* keep_json(Json* j) { return (Json*)keep(A_JSON, j); }
static void* kept_malloc(size_t bytes) { return keep(A_BLOCK, checked_malloc(bytes)); }

static size_t floats_bytes(long n) { return sizeof(float) * (size_t)n; }
// memory of exactly n floats, so that a sanitizer or valgrind sees every access outside
static float* kept_floats(long n) { return (float*)kept_malloc(floats_bytes(n)); }
static double* kept_doubles(long n) { return (double*)kept_malloc(sizeof(double) * (size_t)n); }
static int* kept_ints(long n) { return (int*)kept_malloc(sizeof(int) * (size_t)n); }
static float* copy_floats(const float* x, long n) { return (float*)memcpy(kept_floats(n), x, floats_bytes(n)); }

static Model* new_model(const Config* c, Purpose purpose, int B, int T) {
    return keep_model(model_create(c, purpose, B, T, T, NULL));
}

static void release_kept(void) {
    while (num_kept > 0) {
        void* what = kept[--num_kept].what;
        if (!what) continue; // what could not be opened
        switch (kept[num_kept].kind) {
        case A_BLOCK: free(what); break;
        case A_MODEL: model_free((Model*)what); break;
        case A_FILE: safetensors_close((SafeTensors*)what); break;
        case A_JSON: json_free((Json*)what); break;
        }
    }
}

// for (EACH(i, array)) counts the array's elements
#define EACH(i, array) size_t i = 0; i < sizeof array / sizeof array[0]; i++

static int same_floats(const float* a, const float* b, long n) { return !memcmp(a, b, floats_bytes(n)); }

// |a - b| / |b| in the 2-norm; where b is zero, a must be zero as well. A permuted or missing tensor gives about 1.
static double relative_error(const float* a, const float* b, long n) {
    double difference = 0, norm = 0;
    for (long i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    if (!(difference == difference)) return INFINITY;
    return norm > 0 ? sqrt(difference / norm) : difference > 0 ? INFINITY : 0;
}

static double max_error(const float* a, const float* b, long n) {
    double worst = 0;
    for (long i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

// a float tensor of a file; ends the test program if it is not there
static float* reference_floats(SafeTensors* s, const char* name, long* count) {
    Error error = {""};
    StoredTensor* t = safetensors_find(s, name);
    if (!t) die(1, "the reference has no tensor %s", name);
    float* out = kept_floats(t->count);
    if (!safetensors_read(s, t, 0, t->count, out, &error)) die(1, "%s", error.text);
    if (count) *count = t->count;
    return out;
}

static int* reference_ints(SafeTensors* s, const char* name, long* shape) {
    StoredTensor* t = safetensors_find(s, name);
    if (!t || t->dtype != DTYPE_I32) die(1, "the reference has no I32 tensor %s", name);
    int* out = (int*)kept_malloc((size_t)t->bytes);
    if (!read_at(s->fds[t->file], out, (size_t)t->bytes, t->offset)) die(1, "cannot read %s", name);
    for (int i = 0; shape && i < t->ndim; i++) shape[i] = t->shape[i];
    return out;
}

// The larger one, or NaN if one of them is: a comparison with a tolerance then fails. (fmax would hide it.)
static double larger(double a, double b) { return b <= a || a != a ? a : b; }

static double metadata_number(const SafeTensors* s, const char* key) {
    const Json* j = json_get(s->metadata, key);
    return j ? strtod(j->string, NULL) : 0;
}

static int metadata_is(const SafeTensors* s, const char* key, const char* value) {
    const Json* j = json_get(s->metadata, key);
    return j && !strcmp(j->string, value);
}

// deterministic numbers in (-1, 1)
static void fill_random(float* x, long n, uint64_t key) {
    for (long i = 0; i < n; i++) x[i] = (float)(2 * random_uniform(mix64(key ^ (uint64_t)i)) - 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Files and programs

static char self_path[PATH_SIZE], temp_dir[PATH_SIZE];
static char up_dir[300]; // inside temp_dir, for upcycle

// A path in the temporary directory, in one of a few buffers that take turns.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static const char*
temp(const char* format, ...) {
    static char buffers[16][512];
    static int next = 0;
    char* path = buffers[next++ % 16];
    int n = snprintf(path, sizeof buffers[0], "%.200s/", temp_dir);
    va_list args;
    va_start(args, format);
    vsnprintf(path + n, sizeof buffers[0] - (size_t)n, format, args);
    va_end(args);
    return path;
}

static int remove_entry(const char* path, const struct stat* st, int type, struct FTW* walk) {
    (void)st;
    (void)type;
    (void)walk;
    return remove(path);
}
static void remove_tree(const char* path) { nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }
static void remove_temp_dir(void) { remove_tree(temp_dir); }

// Finds this program's own path, and makes the directories, which go when it ends.
static void make_temp_dir(const char* program) {
    if (!realpath("/proc/self/exe", self_path) && !realpath(program, self_path))
        die(1, "%s: %s", program, strerror(errno));
    const char* directory = getenv("TMPDIR");
    snprintf(temp_dir, sizeof temp_dir, "%.150s/test_moe.XXXXXX",
             directory && !strchr(directory, ' ') ? directory : "/tmp");
    if (!mkdtemp(temp_dir)) die(1, "%s: %s", temp_dir, strerror(errno));
    snprintf(up_dir, sizeof up_dir, "%.280s/upcycle", temp_dir);
    if (mkdir(up_dir, 0777)) die(1, "%s: %s", up_dir, strerror(errno));
    atexit(remove_temp_dir);
}

static int exists(const char* path) { return !access(path, F_OK); }

static void write_bytes(const char* path, const void* data, size_t n) {
    FILE* f = fopen(path, "wb");
    if (!f || (n && fwrite(data, n, 1, f) != 1) || fclose(f)) die(1, "%s: %s", path, strerror(errno));
}
static void write_text(const char* path, const char* text) { write_bytes(path, text, strlen(text)); }

// The bytes of a file, with a zero behind them; NULL if it is not there.
static char* read_bytes(const char* path, size_t* n) {
    Error error = {""};
    return (char*)keep(A_BLOCK, read_file(path, (size_t)1 << 30, n, &error));
}

static int same_file(const char* a, const char* b) {
    size_t n = 0, k = 0;
    char *x = read_bytes(a, &n), *y = read_bytes(b, &k);
    return x && y && n == k && !memcmp(x, y, n);
}

static void copy_file(const char* from, const char* to) {
    size_t n;
    char* data = read_bytes(from, &n);
    if (!data) die(1, "%s cannot be read", from);
    write_bytes(to, data, n);
}

static void copy_directory(const char* from, const char* to) {
    DIR* d = opendir(from);
    struct dirent* entry;
    if (!d || (mkdir(to, 0777) && errno != EEXIST)) die(1, "%s: %s", from, strerror(errno));
    while ((entry = readdir(d)) != NULL) {
        char source[PATH_SIZE], target[PATH_SIZE];
        struct stat st;
        join_path(source, from, entry->d_name);
        join_path(target, to, entry->d_name);
        if (!stat(source, &st) && S_ISREG(st.st_mode)) copy_file(source, target);
        if (!strcmp(entry->d_name, "trainer") && S_ISDIR(st.st_mode)) copy_directory(source, target);
    }
    closedir(d);
}

static int count_lines(const char* path) {
    Error error = {""};
    size_t n = 0;
    char* text = read_file(path, (size_t)1 << 30, &n, &error); // not kept: tests wait for lines
    int lines = 0;
    for (size_t i = 0; i < n; i++) lines += text[i] == '\n';
    free(text);
    return lines;
}

// a text that looks a little like language, so that there is something to learn
static void write_corpus(const char* path, long n) {
    static const char* words[] = {"the ", "expert ", "router ", "sends ", "tokens ",
                                  "to ",  "a ",      "layer. ", "and\n",  "again, "};
    Text text = {NULL, 0, 0};
    for (uint64_t i = 0; (long)text.length < n; i++) {
        const char* word = words[mix64(i) % 10];
        text_add(&text, word, strlen(word));
    }
    write_bytes(path, text.data, (size_t)n);
    free(text.data);
}

// A run of the program under test: exit code (or minus the signal that ended it) and what it printed.
typedef struct {
    int code;
    char out[32768], err[32768];
} Ran;

static Ran ran; // the last one

// Starts it with arguments that are separated by single spaces. file_limit > 0: no file may grow beyond so many bytes.
static pid_t start_program(const char* arguments, long file_limit) {
    char *copy = copy_string(arguments), *rest = copy, *word, *argv[96];
    int argc = 0;
    argv[argc++] = self_path;
    argv[argc++] = (char*)(default_backend == &cpu_backend ? "--as-train-moe" : "--as-train-moe-cu");
    while ((word = strsep(&rest, " ")) != NULL && argc < 95)
        if (*word) argv[argc++] = word;
    argv[argc] = NULL;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(300); // a test that hangs should fail
        setenv("OMP_WAIT_POLICY", "passive", 1); // more threads than cores should not wait by turning round
        if (file_limit > 0) {
            struct rlimit limit = {(rlim_t)file_limit, (rlim_t)file_limit};
            setrlimit(RLIMIT_FSIZE, &limit);
        }
        if (!freopen(temp("stdout"), "w", stdout) || !freopen(temp("stderr"), "w", stderr)) _exit(99);
        execv(self_path, argv);
        _exit(99);
    }
    free(copy);
    if (pid < 0) die(1, "fork: %s", strerror(errno));
    return pid;
}

static void read_output(const char* name, char* buffer, size_t size) {
    size_t n = 0;
    char* text = read_bytes(temp("%s", name), &n);
    snprintf(buffer, size, "%s", text ? text : "");
    if (*buffer && buffer[strlen(buffer) - 1] == '\n') buffer[strlen(buffer) - 1] = 0;
}

static int finish_program(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    read_output("stdout", ran.out, sizeof ran.out);
    read_output("stderr", ran.err, sizeof ran.err);
    return ran.code;
}

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static int
run_program(const char* format, ...) {
    char arguments[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(arguments, sizeof arguments, format, args);
    va_end(args);
    return finish_program(start_program(arguments, 0));
}

// the lines on stderr that are not the progress of training
static int error_lines(void) {
    int lines = 0;
    for (const char* s = ran.err; *s; s = strchr(s, '\n') ? strchr(s, '\n') + 1 : s + strlen(s))
        lines += strncmp(s, "step ", 5) != 0 || strstr(s, "could not") == s;
    return lines;
}

// ends a failed check's output with what the program said
static void show_failure(int ok) {
    if (!ok) printf("       exit code %d, stderr: %.600s\n", ran.code, ran.err);
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory and models

static float* random_floats(long n, uint64_t key) {
    float* x = kept_floats(n);
    fill_random(x, n, key);
    return x;
}

static Model* open_model(const char* dir, Purpose purpose, int B, int T) {
    Config c;
    Error error = {""};
    if (!config_read(&c, dir, &error)) die(1, "%s", error.text);
    Model* m = new_model(&c, purpose, B, T);
    if (!checkpoint_load(m, dir, &error)) die(1, "%s", error.text);
    return m;
}

// A small model; 0 experts: dense.
static Config tiny_config(Arch arch, int layers, int experts, int topk) {
    Config c;
    memset(&c, 0, sizeof c);
    c.arch = arch;
    c.num_layers = layers;
    c.hidden_size = 24;
    c.num_heads = 4;
    c.num_kv_heads = 2;
    c.head_dim = 6;
    c.intermediate_size = 20;
    c.num_experts = experts;
    c.num_experts_per_tok = topk;
    c.moe_intermediate_size = experts ? 10 : 0;
    c.norm_topk_prob = experts > 0;
    c.vocab_size = 50;
    c.max_position_embeddings = 128;
    c.qkv_bias = arch == QWEN2 || arch == QWEN2_MOE;
    c.shared_expert_intermediate_size = arch == QWEN2_MOE ? 7 : 0;
    c.router.scaling = arch == DOTS1;
    c.qk_norm = arch == OLMOE ? QK_NORM_ROW : arch == QWEN3 || arch == QWEN3_MOE ? QK_NORM_HEAD : QK_NORM_NONE;
    c.rope_theta = 1e4;
    c.rms_norm_eps = 1e-6;
    for (int l = 0; l < layers; l++) c.sparse[l] = experts > 0;
    return c;
}

static void fill_tokens(int* tokens, int n, int V, uint64_t key) {
    for (int i = 0; i < n; i++) tokens[i] = (int)(mix64(key * 1000003 + (uint64_t)i) % (uint64_t)V);
}

// What threads keep for products is theirs until they end, which is when a test asks for fewer threads.
#if defined(__SANITIZE_ADDRESS__)
const char* __lsan_default_suppressions(void);
const char* __lsan_default_suppressions(void) { return "leak:fast_product\nleak:multiply_unit\nleak:attention_\n"; }
#endif
