/*
runs.c: training. Learning rate and AdamW against their formulas; whole runs give the same bytes whatever the number of
threads and whatever happens on the way: stops, kills, a full disk.
*/
// ---------------------------------------------------------------------------------------------------------------------
// Learning rate and AdamW

static void check_rate(const Run* r, long step, double expected) {
    static const char* names[] = {"wsd", "cosine", "constant"};
    double got = learning_rate(r, step);
    check(fabs(got - expected) <= 1e-12, "%s: step %ld of %ld: %.6f, expected %.6f", names[r->schedule], step, r->steps,
          got, expected);
}

static void test_learning_rate(void) {
    Run r;
    memset(&r, 0, sizeof r);
    r.steps = 100;
    r.warmup = 10;
    r.lr = 0.02;
    r.min_lr = 0.004;
    r.decay_frac = 0.2;
    for (int s = 0; s < 3; s++) {
        r.schedule = (Schedule)s;
        check_rate(&r, 0, 0.002); // a tenth of the way up, not 0
        check_rate(&r, 4, 0.010);
        check_rate(&r, 9, 0.020);
        check_rate(&r, 10, 0.020);
    }
    r.schedule = WSD; // falls over the steps 80 .. 99, and would reach min_lr at 100
    check_rate(&r, 80, 0.020);
    check_rate(&r, 81, 0.020 - 0.016 / 20);
    check_rate(&r, 90, 0.012);
    check_rate(&r, 99, 0.004 + 0.016 / 20);
    r.schedule = COSINE;
    check_rate(&r, 55, 0.012); // half way between 10 and 100
    check_rate(&r, 40, 0.004 + 0.016 * 0.75); // a third: cos(60 degrees) = 1/2
    check_rate(&r, 100, 0.004);
    check_rate(&r, 500, 0.004);
    r.schedule = CONSTANT;
    check_rate(&r, 99, 0.020);
    r.warmup = 0;
    check_rate(&r, 0, 0.020);
    r.schedule = COSINE;
    check_rate(&r, 0, 0.020);
    r.schedule = WSD;
    r.decay_frac = 0;
    check_rate(&r, 99, 0.020);
    r.decay_frac = 1;
    check_rate(&r, 50, 0.012);
}

// AdamW as torch.optim.AdamW and clip_grad_norm_ describe it, in double
static void adamw_plain(double* w, double* m, double* v, const float* g, long n, long matrices, const AdamW* o,
                        double lr, long step) {
    double norm = 0, clip = 1;
    for (long i = 0; i < n; i++) norm += (double)g[i] * g[i];
    norm = sqrt(norm);
    if (o->clip > 0) clip = fmin(1, o->clip / (norm + 1e-6));
    for (long i = 0; i < n; i++) {
        double grad = g[i] * clip;
        if (i < matrices) w[i] *= 1 - lr * o->weight_decay;
        m[i] += (1 - o->beta1) * (grad - m[i]);
        v[i] = o->beta2 * v[i] + (1 - o->beta2) * grad * grad;
        double m_hat = m[i] / (1 - pow(o->beta1, (double)step)), v_hat = v[i] / (1 - pow(o->beta2, (double)step));
        w[i] -= lr * m_hat / (sqrt(v_hat) + o->eps);
    }
}

static void test_adamw(double clip, double size) {
    AdamW o = {0.9, 0.95, 1e-8, 0.5, clip};
    Config c = tiny_config(QWEN3_MOE, 1, 3, 2);
    Model* model = new_model(&c, FOR_TRAINING, 1, 4);
    long n = model->layout.total, matrices = model->layout.matrices;
    fill_random(model->params, n, 60);
    double *w = to_double(model->params, n), *m = to_double(model->exp_avg, n), *v = to_double(model->exp_avg, n);
    double error = 0, norm_error = 0;
    int cleared = 1;
    for (long step = 1; step <= 5; step++) {
        double norm = 0, lr = 0.01 * (double)step;
        fill_random(model->grads, n, 60 + (uint64_t)step);
        for (long i = 0; i < n; i++) {
            model->grads[i] *= (float)size;
            norm += (double)model->grads[i] * model->grads[i];
        }
        adamw_plain(w, m, v, model->grads, n, matrices, &o, lr, step);
        norm_error = larger(norm_error, fabs(model_update(model, &o, lr, step) / sqrt(norm) - 1));
        for (long i = 0; i < n; i++) {
            error = larger(error, fabs(w[i] - model->params[i]));
            cleared &= model->grads[i] == 0;
        }
    }
    check(error < 2e-6, "AdamW, clip %g: five steps, error %.1e", clip, error);
    check(norm_error < 1e-6 && cleared, "AdamW, clip %g: the norm before clipping; gradients are cleared", clip);

    // no gradient: matrices shrink by lr * decay, vectors stay
    memset(model->exp_avg, 0, floats_bytes(n));
    float* before = copy_floats(model->params, n);
    model_update(model, &o, 0.1, 1);
    int decayed = 1, kept = 1;
    for (int i = 0; i < model->layout.count; i++) {
        const Tensor* t = &model->layout.tensors[i];
        int is_vector = strstr(t->name, "norm") != NULL;
        for (long k = t->offset; k < t->offset + tensor_size(t); k++) {
            if (is_vector)
                kept &= model->params[k] == before[k];
            else
                decayed &= fabs(model->params[k] - 0.95 * before[k]) < 1e-6;
        }
    }
    check(decayed && kept, "AdamW, clip %g: weight decay is for matrices alone", clip);

    memcpy(before, model->params, floats_bytes(n));
    model->grads[7] = NAN;
    check(!isfinite(model_update(model, &o, 0.1, 1)) && same_floats(before, model->params, n),
          "AdamW, clip %g: a gradient that is not finite changes nothing", clip);
}

static void test_schedule(void) {
    test_learning_rate();
    test_adamw(1, 1); // the norm is about 30: clipped
    test_adamw(1, 1e-3); // below 1: left alone
    test_adamw(0, 1); // never clipped
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole runs: the same bytes whatever the number of threads, and whatever happens on the way

// a run that is short, but has everything: accumulation, validation, a schedule that depends on the step
static const char* small_run =
    "--val-every 2 --val-batches 2 --layers 2 --hidden 40 --heads 4 --seq 24 --batch 3 --lr 0.01 --warmup 2";
static const char* small_experts = "--experts 5 --expert-ffn 24";

// Starts a training run in OUT under the temporary directory, on the corpus there.
static pid_t start_training(const char* out, const char* more, long file_limit) {
    char arguments[4096];
    snprintf(arguments, sizeof arguments, "--data %s --out %s %s", temp("corpus.txt"), temp("%s", out), more);
    return start_program(arguments, file_limit);
}

static int train_run(const char* out, const char* more) {
    remove_tree(temp("%s", out));
    char arguments[2048];
    snprintf(arguments, sizeof arguments, "%s %s %s", small_run, strstr(more, "--dense") ? "" : small_experts, more);
    return finish_program(start_training(out, arguments, 0));
}

static int resume_run(const char* out, const char* more) {
    return run_program("--out %s --resume %s", temp("%s", out), more);
}

static int same_in(const char* a, const char* b, const char* name) {
    return same_file(temp("%s/%s", a, name), temp("%s/%s", b, name));
}

// model, optimizer, configuration and trainer.json have the same bytes
static int same_checkpoint(const char* a, const char* b) {
    return same_in(a, b, "model.safetensors") && same_in(a, b, OPTIMIZER_FILE) &&
           same_in(a, b, "config.json") && same_in(a, b, "trainer.json");
}

// log.csv without its column tokens_per_s, which is a time
static char* read_log(const char* out) {
    size_t n = 0, kept = 0;
    char* text = read_bytes(temp("%s/log.csv", out), &n);
    int column = 0;
    for (size_t i = 0; i < n; i++) {
        if (column != 7) text[kept++] = text[i];
        column = text[i] == '\n' ? 0 : column + (text[i] == ',');
    }
    if (text) text[kept] = 0;
    return text;
}

static int same_logs(const char* a, const char* b) {
    char *x = read_log(a), *y = read_log(b);
    int same = x && y && strlen(x) > 100 && !strcmp(x, y);
    return same && same_in(a, b, "val.csv") && same_in(a, b, "load.csv");
}

// the step of the checkpoint in OUT; 0: there is none
static long saved_step(const char* out) {
    Error error = {""};
    const char* path = temp("%s/trainer.json", out);
    Json* j = exists(path) ? keep_json(json_read(path, &error)) : NULL;
    return j ? json_whole(json_get(j, "step"), LONG_MAX) : 0;
}

static void sleep_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

// waits until log.csv in OUT has so many rows, or the run has ended: 0
static int wait_for_rows(pid_t pid, const char* out, int rows) {
    siginfo_t info;
    for (int i = 0; i < 60000; i++) {
        memset(&info, 0, sizeof info);
        if (count_lines(temp("%s/log.csv", out)) > rows) return 1;
        if (!waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid) return 0;
        sleep_ms(1);
    }
    return 0;
}

static void test_threads(const char* name, const char* more) {
    static const int counts[] = {1, 2, 3, 8};
    char arguments[512];
    int same = 1, ok = 1;
    for (int i = 0; i < 4; i++) {
        snprintf(arguments, sizeof arguments, "--steps 3 --accum 2 --threads %d %s", counts[i], more);
        ok &= train_run(i ? "b" : "a", arguments) == 0;
        if (i) same &= same_checkpoint("a", "b") && same_logs("a", "b");
    }
    check(ok && same, "%s: 1, 2, 3 and 8 threads write the same bytes", name);
    show_failure(ok);
}

// Stops at each step (a constant schedule: then the number of steps changes nothing else) and goes on.
static void test_stop_and_resume(const char* name, const char* more) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "--schedule constant --val-every 1 --steps 6 --accum 2 %s", more);
    int ok = train_run("a", arguments) == 0;
    for (int stop = 1; stop <= 5; stop += 2) {
        snprintf(arguments, sizeof arguments, "--schedule constant --val-every 1 --steps %d --accum 2 %s", stop, more);
        ok &= train_run("b", arguments) == 0;
        ok &= saved_step("b") == stop;
        ok &= resume_run("b", "--steps 6") == 0;
        ok &= same_checkpoint("a", "b") && same_logs("a", "b");
    }
    check(ok, "%s: stopping at steps 1, 3, 5 and resuming changes no byte and no row", name);
    show_failure(ok);
}

// What says how bf16 is computed stands above everything but a generated text.
static void test_precision(void) {
    write_corpus(temp("few.txt"), 300);
    int ok = train_run("a", "--steps 2 --precision bf16") == 0 && !strncmp(ran.out, "products: bf16, ", 16);
    ok &= run_program("--model %s --data %s --eval --seq 20 --precision bf16", temp("a"), temp("few.txt")) == 0;
    ok &= !strncmp(ran.out, "products: bf16, ", 16);
    ok &= run_program("--model %s --prompt abc --tokens 5 --precision bf16", temp("a")) == 0;
    ok &= !strncmp(ran.out, "abc", 3);
    ok &= run_program("--model %s --precision bf16", temp("a")) == 0 && !strncmp(ran.out, "products: bf16, ", 16);
    check(ok, "training, --eval, --prompt and a sample in bf16");
    show_failure(ok);
    ok = resume_run("a", "--steps 3") == 0 && error_lines() == 0 && !strncmp(ran.out, "products: bf16, ", 16);
    check(ok, "a resume goes on in bf16, and says no more");
    ok = resume_run("a", "--steps 4 --precision fp32") == 0 && error_lines() == 1;
    check(ok && strstr(ran.err, "until step 3") && strstr(ran.err, "had --precision bf16; it goes on"),
          "one in fp32 says what it was: %.300s", ran.err);
    ok = resume_run("a", "--steps 5") == 0 && error_lines() == 0 && !strstr(ran.out, "products: bf16");
    check(ok, "and is remembered");
}

// What diverges does so in bf16 as in fp32: as late, with the same line, and the last checkpoint stays whole.
static void test_divergence(void) {
    long steps[2] = {0, 0};
    char said[2][200] = {"", ""}, arguments[256];
    int whole = 1;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        snprintf(arguments, sizeof arguments, "--lr 1000 --clip 0 --steps 40 --save-every 1 --val none --precision %s",
                 bf16 ? "bf16" : "fp32");
        int code = train_run("a", arguments);
        const char* line = strstr(ran.err, "train_moe: step ");
        sscanf(line ? line : "", "train_moe: step %ld: %199[^;]", &steps[bf16], said[bf16]);
        Error error = {""};
        whole &= code == 1 && saved_step("a") == steps[bf16] - 1 && strstr(ran.err, "is intact") &&
                 !exists(temp("a/.saving")) && !exists(temp("a/.ready")) && try_load(temp("a"), &error) != NULL;
    }
    check(steps[0] > 1 && steps[1] >= steps[0] - 1 && !strcmp(said[0], "the gradient is not finite") &&
              !strcmp(said[0], said[1]),
          "a run that diverges: fp32 at step %ld, bf16 at step %ld: %s", steps[0], steps[1], said[1]);
    check(whole, "its last checkpoint is whole in both");
    show_failure(whole);
}

static void test_signal(int signal_number, const char* name, const char* reference, int steps) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "%s %s --steps %d", small_run, small_experts, steps);
    remove_tree(temp("b"));
    pid_t pid = start_training("b", arguments, 0);
    int in_time = wait_for_rows(pid, "b", 7);
    kill(pid, signal_number);
    usleep(500);
    kill(pid, signal_number);           // as timeout(1) does: first the process, then its group
    int code = finish_program(pid);
    long step = saved_step("b");
    check(in_time && code == 128 + signal_number && step >= 7 && step < steps, "%s: exit code %d, step %ld is saved",
          name, code, step);
    show_failure(code == 128 + signal_number);
    char said[64];
    snprintf(said, sizeof said, "step %ld is saved", step);
    check(error_lines() == 2 && strstr(ran.err, "a signal: stops after") && strstr(ran.err, said),
          "%s: one line at once, one at the end", name);
    // rows that were written after the checkpoint are dropped by --resume
    Text torn = {NULL, 0, 0};
    size_t n = 0;
    char* log = read_bytes(temp("b/log.csv"), &n);
    if (log) text_add(&torn, log, n);
    text_print(&torn, "%ld,999,9.9\n%ld,9", step + 1, step + 2);
    write_bytes(temp("b/log.csv"), torn.data, torn.length);
    free(torn.data);
    code = resume_run("b", "");
    check(code == 0 && same_checkpoint(reference, "b") && same_logs(reference, "b"),
          "%s: resuming gives the bytes of a run that was not stopped", name);
    show_failure(code == 0);
}

// Under nohup a run survives the end of its terminal; SIGTERM still ends it.
static void test_nohup(void) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "%s %s --steps 100000", small_run, small_experts);
    remove_tree(temp("b"));
    signal(SIGHUP, SIG_IGN); // which the run inherits
    pid_t pid = start_training("b", arguments, 0);
    signal(SIGHUP, SIG_DFL);
    int running = wait_for_rows(pid, "b", 3);
    kill(pid, SIGHUP);
    usleep(50000);
    kill(pid, SIGTERM);
    int code = finish_program(pid);
    check(running && code == 128 + SIGTERM, "nohup: SIGHUP is ignored, SIGTERM is not: exit code %d", code);
}

// Killed at each of its flushes, the last of which are of a save that counts already: the same line goes on from there.
static void test_kill_at_flushes(void) {
    const char* run = "--schedule constant --steps 2 --save-every 1 --val-every 1";
    char again[1024], count[16];
    snprintf(again, sizeof again, "%s %s %s --resume", small_run, small_experts, run);
    int ok = train_run("a", run) == 0, kills = 0;
    for (int code = 1; code && kills < 100;) {
        snprintf(count, sizeof count, "%d", ++kills);
        setenv("KILL_AT_FLUSH", count, 1);
        code = train_run("b", run);
        unsetenv("KILL_AT_FLUSH");
        ok &= code == 0 || code == -SIGKILL;
        if (code) ok &= finish_program(start_training("b", again, 0)) == 0;
        ok &= same_checkpoint("a", "b") && same_logs("a", "b");
        if (!ok) break;
    }
    check(ok && kills > 6, "killed at each of %d flushes: the same line ends with the same bytes and rows", kills - 1);
    show_failure(ok);
}

// kill -9 at random moments of a run that saves every step: the last checkpoint is always whole.
static void test_kill(void) {
    int ok = train_run("a", "--steps 25 --save-every 1") == 0, kills = 0, finished = 0, unreadable = 0, backwards = 0,
        ready = 0;
    long step = 0;
    remove_tree(temp("b"));
    for (int turn = 0; turn < 60 && !finished; turn++) {
        int started = saved_step("b") > 0 || exists(temp("b/.ready"));
        char arguments[512];
        snprintf(arguments, sizeof arguments, "%s %s --steps 25 --save-every 1", small_run, small_experts);
        pid_t pid = started ? start_training("b", "--resume", 0) : start_training("b", arguments, 0);
        wait_for_rows(pid, "b", (int)step + 1); // at least one step further, then any moment
        struct timespec moment = {0, (long)(random_uniform(mix64((uint64_t)turn)) * 4e7)};
        nanosleep(&moment, NULL);
        if (kills < 40) kill(pid, SIGKILL);
        int code = finish_program(pid);
        if (code == 0)
            finished = 1;
        else if (code == -SIGKILL)
            kills++;
        else
            unreadable++;
        ready += exists(temp("b/.ready"));
        long now = saved_step("b");
        backwards += now < step;
        step = now > step ? now : step;
        if (unreadable) break;
    }
    check(ok && finished && unreadable == 0,
          "killed %d times (%d with a save half moved in): each time --resume could go on", kills, ready);
    show_failure(unreadable == 0);
    check(kills >= 5 && backwards == 0, "no step was lost twice");
    check(same_checkpoint("a", "b") && same_logs("a", "b"), "after all that, the same bytes as without it");
}

// A save that was interrupted while it moved in: any of the new files may be in OUT already, the others are in .ready.
static void test_ready(void) {
    static const char* files[] = {"config.json", "trainer.json", "model.safetensors", OPTIMIZER_FILE};
    int ok = train_run("a", "--schedule constant --val-every 1 --steps 4") == 0 &&
             train_run("old", "--schedule constant --val-every 1 --steps 2") == 0;
    int refused = 1, same = 1, cleaned = 1;
    for (int moved = 0; moved < 16; moved += 3) {
        remove_tree(temp("b"));
        copy_directory(temp("old"), temp("b"));
        copy_file(temp("a/log.csv"), temp("b/log.csv"));
        copy_file(temp("a/val.csv"), temp("b/val.csv"));
        copy_file(temp("a/load.csv"), temp("b/load.csv"));
        mkdir(temp("b/.ready"), 0777);
        mkdir(temp("b/.ready/trainer"), 0777);
        for (int f = 0; f < 4; f++)
            copy_file(temp("a/%s", files[f]), moved >> f & 1 ? temp("b/%s", files[f]) : temp("b/.ready/%s", files[f]));
        refused &= run_program("--model %s --data %s --seq 8 --eval", temp("b"), temp("corpus.txt")) == 2 &&
                   strstr(ran.err, "--resume");
        ok &= resume_run("b", "--steps 4") == 0;
        same &= same_checkpoint("a", "b") && same_logs("a", "b");
        cleaned &= !exists(temp("b/.ready"));
    }
    check(refused, "a half-moved save is not read as a model");
    check(ok && same && cleaned, "--resume finishes a half-moved save, whichever files had been moved");
    show_failure(ok);
    mkdir(temp("b/.ready"), 0777);
    check(resume_run("b", "--steps 4") == 0 && !exists(temp("b/.ready")) && same_checkpoint("a", "b"),
          "an empty .ready is finished too");
    mkdir(temp("b/.saving"), 0777);
    write_text(temp("b/.saving/model.safetensors"), "half");
    check(resume_run("b", "--steps 5") == 0 && !exists(temp("b/.saving")) && saved_step("b") == 5,
          "the remains of a save that failed are overwritten");
    show_failure(ran.code == 0);
}

static void test_lock(void) {
    char arguments[512];
    snprintf(arguments, sizeof arguments, "%s --steps 100000", small_run);
    remove_tree(temp("b"));
    pid_t pid = start_training("b", arguments, 0);
    int running = wait_for_rows(pid, "b", 1);
    int code = resume_run("b", "--steps 5");
    check(running && code == 2 && strstr(ran.err, "another run is writing there") && error_lines() == 1,
          "a second run in the same --out: %s", ran.err);
    snprintf(arguments, sizeof arguments, "--data %s --out %s %s", temp("corpus.txt"), temp("b"), small_run);
    code = run_program("%s", arguments);
    check(code == 2 && strstr(ran.err, "another run is writing there"), "the same without --resume");
    kill(pid, SIGTERM);
    check(finish_program(pid) == 143, "the first run is not disturbed");
    code = run_program("%s", arguments);
    check(code == 2 && strstr(ran.err, "--resume goes on with that run"), "a new run in --out with a run in it: %s",
          ran.err);
}

// What the training loop reads, recorded: the first bytes of every sequence.
static long seen_windows[64];
static int num_seen;
static double recording_forward(Model* m, const int* tokens, const int* targets, int B, int T) {
    for (int b = 0; b < B && num_seen < 64; b++) {
        const int* t = tokens + (long)b * T;
        seen_windows[num_seen++] = t[0] | t[1] << 8;
    }
    const Backend* recording = m->backend;
    m->backend = &cpu_backend;
    double loss = model_forward(m, tokens, targets, B, T);
    m->backend = recording;
    return loss;
}

// The gradient of step 4 is not finite; with `ruined`, its loss is more than guessing has.
static int ruined;
static double failing_update(Model* m, const AdamW* o, double lr, long step) {
    if (step == 4) m->grads[0] = INFINITY;
    if (step == 4 && ruined) m->sums.loss = 1e3 * (double)m->sums.passes;
    const Backend* failing = m->backend;
    m->backend = &cpu_backend;
    double norm = model_update(m, o, lr, step);
    m->backend = failing;
    return norm;
}

// train() on 64 windows of 8 tokens; what it prints is not shown
static int train_here(const Backend* backend, int B, int accum, Position begun_at, long steps, const char* out) {
    Config c;
    options_reset_table(option_table, NUM_OPTIONS);
    options.layers = 1, options.hidden = 16, options.heads = 2, options.experts = 2, options.batch = B,
    options.accum = accum, options.seq = 8, options.data = "here";
    config_from_options(&c);
    c.vocab_size = 256;
    Model* m = model_create(&c, FOR_TRAINING, B, 8, 8, NULL);
    model_init(m, 1);
    m->backend = backend;
    Dataset* d = dataset_open(temp("numbers"), 8, 256, WHOLE, BYTES);
    Run run;
    memset(&run, 0, sizeof run);
    run.steps = steps, run.B = B, run.T = 8, run.accum = accum, run.lr = 1e-3, run.schedule = CONSTANT, run.seed = 1;
    run.adamw.beta1 = 0.9, run.adamw.beta2 = 0.95, run.adamw.eps = 1e-8;
    begun = run.begun = begun_at;
    int kept[2] = {dup(1), dup(2)}, quiet = open("/dev/null", O_WRONLY);
    fflush(stdout);
    for (int i = 0; i < 2; i++) dup2(quiet, i + 1);
    int code = train(m, &run, d, NULL, NULL, out);
    fflush(stdout);
    for (int i = 0; i < 2; i++) {
        dup2(kept[i], i + 1);
        close(kept[i]);
    }
    close(quiet);
    dataset_close(d);
    model_free(m);
    memset(&begun, 0, sizeof begun);
    return code;
}

// A resume with another batch, length, order or data says so, and its place is kept in sequences.
static void test_resume_changes(void) {
    unsigned char numbers[8 * 64 + 1];
    for (int i = 0; i <= 8 * 64; i++) numbers[i] = (unsigned char)(i % 8 ? i / 8 : 7);
    write_bytes(temp("numbers"), numbers, sizeof numbers);
    Backend recording = cpu_backend;
    recording.forward = recording_forward;
    Position start = {0, 0, 0}, then = {4, 24, 24 * 8};
    num_seen = 0;
    train_here(&recording, 3, 2, start, 4, NULL);
    train_here(&recording, 5, 1, then, 12, NULL);
    int twice = 0;
    for (int i = 0; i < num_seen; i++)
        for (int k = 0; k < i; k++) twice += seen_windows[i] == seen_windows[k];
    check(num_seen == 64 && twice == 0, "4 steps of 3 x 2, 8 of 5: %d windows, %d of them twice", num_seen, twice);

    check(train_run("a", "--steps 3 --accum 2") == 0 && resume_run("a", "--steps 3") == 0 && error_lines() == 0,
          "a resume of which nothing differs says nothing");
    int code = resume_run("a", "--steps 5 --batch 2 --accum 1");
    check(code == 0 && error_lines() == 1 && strstr(ran.err, "until step 3") &&
              strstr(ran.err, "--batch 3, --accum 2;") &&
              strstr(ran.err, "sequence 18 of its data, and no window is read twice"),
          "another batch: %.300s", ran.err);
    Error error = {""};
    Json* j = json_read(temp("a/trainer.json"), &error);
    char* log = read_log("a");
    check(j && json_whole(json_get(j, "sequences"), 1000) == 22 && json_whole(json_get(j, "tokens"), 1000) == 22 * 24 &&
              log && strstr(log, "\n4,480,") && strstr(log, "\n5,528,"),
          "trainer.json and log.csv count on from there");
    json_free(j);
    code = resume_run("a", "--steps 6 --seq 12 --seed 5");
    check(code == 0 && error_lines() == 1 && strstr(ran.err, "--seq 24, --seed 1") && strstr(ran.err, "may come twice"),
          "another length and order: %.300s", ran.err);
    // the same data under another name are the same; others under the same name are not
    copy_file(temp("corpus.txt"), temp("moved.txt"));
    code = run_program("--resume --out %s --data %s --steps 7", temp("a"), temp("moved.txt"));
    check(code == 0 && error_lines() == 0, "data that were renamed: %.300s", ran.err);
    size_t n;
    char* text = read_bytes(temp("moved.txt"), &n);
    for (size_t i = 0; i < n; i++) text[i] = (char)toupper((unsigned char)text[i]);
    write_bytes(temp("moved.txt"), text, n);
    code = resume_run("a", "--steps 8");
    check(code == 0 && error_lines() == 1 && strstr(ran.err, "other data (") &&
              strstr(ran.err, "moved.txt of 20000 bytes"),
          "data with other bytes: %.300s", ran.err);
    code = resume_run("a", "--steps 9 --seq 30000");
    check(code == 2 && !strstr(ran.err, "so says"), "too long a --seq: %.300s", ran.err);
    unlink(temp("moved.txt"));
    code = resume_run("a", "--steps 9");
    check(code == 2 && error_lines() == 1 && strstr(ran.err, "so says trainer.json"), "data that are gone: %.300s",
          ran.err);
    char with_val[512];
    snprintf(with_val, sizeof with_val, "--steps 2 --val %s", temp("numbers"));
    check(train_run("b", with_val) == 0, "a run with validation data of its own");
    write_corpus(temp("numbers"), 600);
    code = resume_run("b", "--steps 3");
    check(code == 0 && strstr(ran.err, "other validation data ("), "other validation data: %.300s", ran.err);

    // trainer.json as older versions wrote it
    train_run("a", "--schedule constant --steps 4");
    train_run("b", "--schedule constant --steps 2");
    text = read_bytes(temp("b/trainer.json"), &n);
    char *from = strstr(text, "  \"sequences\""), *to = strstr(text, "  \"family_start\""),
         *from2 = strstr(text, "  \"model\""), *to2 = strstr(text, "  \"options\"");
    Text old = {NULL, 0, 0};
    text_add(&old, text, (size_t)(from - text));
    text_add(&old, to, (size_t)(from2 - to));
    text_add(&old, to2, strlen(to2));
    write_text(temp("b/trainer.json"), old.data);
    free(old.data);
    code = resume_run("b", "--steps 4");
    check(code == 0 && error_lines() == 0 && same_in("a", "b", "model.safetensors") && same_logs("a", "b"),
          "an older trainer.json goes on as before");
    show_failure(code == 0);
}

// A run that must stop keeps the last sound step.
static void test_last_sound_step(void) {
    Position start = {0, 0, 0};
    Backend failing = cpu_backend;
    failing.update = failing_update;
    for (ruined = 0; ruined < 2; ruined++) {
        remove_tree(temp("sound"));
        mkdir(temp("sound"), 0777);
        int code = train_here(&failing, 2, 1, start, 8, temp("sound"));
        check(code == 1 && saved_step("sound") == (ruined ? 0 : 3),
              "a gradient that is not finite, %s: step %ld is saved", ruined ? "of a ruined model" : "of a sound one",
              saved_step("sound"));
    }
    write_corpus(temp("shrinks.txt"), 20000);
    remove_tree(temp("b"));
    char arguments[1024];
    snprintf(arguments, sizeof arguments, "--data %s --out %s %s --steps 1000000 --save-every 0 --val none",
             temp("shrinks.txt"), temp("b"), small_run);
    pid_t pid = start_program(arguments, 0);
    wait_for_rows(pid, "b", 5);
    if (truncate(temp("shrinks.txt"), 5000)) die(1, "truncate: %s", strerror(errno));
    int code = finish_program(pid);
    long step = saved_step("b");
    snprintf(arguments, sizeof arguments, "the checkpoint of step %ld in", step);
    check(code == 1 && step >= 5 && error_lines() == 1 && strstr(ran.err, arguments) &&
              strstr(ran.err, "has the file changed"),
          "data that shrink: %.300s", strstr(ran.err, "train_moe:") ? strstr(ran.err, "train_moe:") : "");
    // the same in validation
    write_corpus(temp("shrinks.txt"), 20000);
    snprintf(arguments, sizeof arguments, "--val %s --steps 3 --val-every 3", temp("shrinks.txt"));
    check(train_run("a", arguments) == 0, "a run to go on with");
    check(truncate(temp("shrinks.txt"), 60) == 0, "its validation data shrink");
    code = resume_run("a", "--steps 6 --val-batches 0");
    check(code == 0 && strstr(ran.err, "other validation data"), "which is said: %.300s", ran.err);
    // a save that fails is tried again
    remove_tree(temp("b"));
    mkdir(temp("b"), 0777);
    write_text(temp("b/.saving"), "in the way");
    snprintf(arguments, sizeof arguments, "%s --steps 1000000 --save-every 2", small_run);
    pid = start_training("b", arguments, 0);
    wait_for_rows(pid, "b", 5);
    int none = saved_step("b") == 0;
    unlink(temp("b/.saving"));
    for (int i = 0; i < 60000 && !saved_step("b"); i++) sleep_ms(1);
    kill(pid, SIGTERM);
    code = finish_program(pid);
    check(none && code == 128 + SIGTERM && saved_step("b") > 5 && strstr(ran.err, "step 4 could not be saved"),
          "a save that fails is tried again with the next one: %d, step %ld", code, saved_step("b"));
}

// Saved before it is validated; a signal does not wait for the end of a validation, and --resume makes up for it.
static void test_validation_last(void) {
    char arguments[1024];
    write_corpus(temp("long.txt"), 4000000);
    snprintf(arguments, sizeof arguments, "--val %s --val-every 2 --val-batches 0 --save-every 2 --steps 4",
             temp("long.txt"));
    remove_tree(temp("b"));
    char all[2048];
    snprintf(all, sizeof all, "%s %s %s", small_run, small_experts, arguments);
    pid_t pid = start_training("b", all, 0);
    for (int i = 0; i < 60000 && saved_step("b") < 2; i++) sleep_ms(1);
    kill(pid, SIGTERM);
    int code = finish_program(pid);
    check(code == 128 + SIGTERM && saved_step("b") == 2 && count_lines(temp("b/val.csv")) == 1,
          "a signal in a validation: exit code %d, step %ld, %d rows", code, saved_step("b"),
          count_lines(temp("b/val.csv")) - 1);
    snprintf(arguments, sizeof arguments, "--val %s --val-batches 2 --steps 4", temp("corpus.txt"));
    code = resume_run("b", arguments);
    size_t n;
    char* rows = read_bytes(temp("b/val.csv"), &n);
    check(code == 0 && count_lines(temp("b/val.csv")) == 3 && rows && strstr(rows, "\n2,144,") &&
              strstr(rows, "\n4,288,"),
          "--resume makes up for it");
    show_failure(code == 0);
    code = resume_run("b", "");
    check(code == 0 && strstr(ran.out, "nothing left to do") && !strstr(ran.out, "validation loss"),
          "once: %.300s", ran.out);
}

// File systems without locks, and without a flush of directories.
static void test_file_systems(void) {
    setenv("NO_LOCKS", "1", 1);
    int code = train_run("b", "--steps 1");
    check(code == 0 && error_lines() == 1 && strstr(ran.err, "no locks here"), "no locks: one warning: %.200s",
          ran.err);
    unsetenv("NO_LOCKS");
    setenv("NO_FLUSH", "1", 1);
    code = train_run("b", "--steps 1");
    check(code == 0 && error_lines() == 0 && saved_step("b") == 1, "directories that cannot be flushed: %.200s",
          ran.err);
    unsetenv("NO_FLUSH");
}

static void test_determinism(void) {
    write_corpus(temp("corpus.txt"), 20000);
    test_resume_changes();
    test_last_sound_step();
    test_validation_last();
    test_file_systems();
    test_threads("qwen3_moe", "");
    test_threads("mixtral", "--arch mixtral --head-dim 14 --z-loss 0.001 --aux-form hf");
    test_threads("olmoe", "--arch olmoe --norm-topk 0 --tie");
    test_threads("dense", "--dense --kv-heads 1");
    test_threads("sigmoid, random K, logit norm", "--router sigmoid --topk-range 1:3 --logit-norm 5");
    test_threads("LPR", "--router lpr");
    test_threads("bf16", "--precision bf16 --router sigmoid");
    test_stop_and_resume("qwen3_moe", "--sparse-step 2");
    test_stop_and_resume("dense", "--dense --tie");
    test_stop_and_resume("adaptive aux, random K", "--aux-adaptive --topk-range 1:4");
    test_stop_and_resume("sigmoid", "--router sigmoid --bias-rate 0.01");
    test_stop_and_resume("LPR", "--router lpr");
    test_precision();
    test_divergence();
    test_stop_and_resume("bf16, which trainer.json remembers", "--precision bf16");
    train_run("a", "--steps 60");
    test_signal(SIGTERM, "SIGTERM", "a", 60);
    test_signal(SIGINT, "SIGINT", "a", 60);
    signal(SIGHUP, SIG_DFL);        // under nohup it is ignored, and so it would be by what is started here
    test_signal(SIGHUP, "SIGHUP", "a", 60);
    test_nohup();
    test_kill();
    test_kill_at_flushes();
    test_ready();
    test_lock();
}

// ---------------------------------------------------------------------------------------------------------------------
// Disk full

// The limit on the size of a file makes longer writes fail, as a full disk does. dev/full_disk.sh fills a real one.
static void test_limit(const char* what, long limit) {
    int code = train_run("a", "--schedule constant --val-every 1 --steps 2");
    remove_tree(temp("b"));
    copy_directory(temp("a"), temp("b"));
    char arguments[512];
    snprintf(arguments, sizeof arguments, "--out %s --resume --steps 4", temp("b"));
    int failed_code = finish_program(start_program(arguments, limit));
    check(code == 0 && failed_code == 1 && error_lines() == 1 && strstr(ran.err, "could not be saved") &&
              strstr(ran.err, "the checkpoint of step 2") && strstr(ran.err, "File too large"),
          "%s: exit code 1 and one line", what);
    show_failure(failed_code == 1 && error_lines() == 1);
    check(same_checkpoint("a", "b") && !exists(temp("b/.saving")) && !exists(temp("b/.ready")),
          "%s: the last checkpoint is intact, nothing else is left", what);
    Error error = {""};
    Model* m = try_load(temp("b"), &error);
    check(m != NULL, "%s: the last checkpoint can be loaded %s", what, error.text);
    code = resume_run("b", "--steps 4");
    train_run("a", "--schedule constant --val-every 1 --steps 4");
    check(code == 0 && same_checkpoint("a", "b") && same_logs("a", "b"),
          "%s: with room again, --resume gives the bytes of an undisturbed run", what);
}

static void test_disk_full(void) {
    struct stat model, optimizer;
    write_corpus(temp("corpus.txt"), 20000);
    train_run("a", "--steps 1");
    remove_tree(temp("c"));
    remove_tree(temp("d.safetensors"));
    if (stat(temp("a/model.safetensors"), &model) || stat(temp("a/" OPTIMIZER_FILE), &optimizer)) {
        check(0, "a run that saves");
        show_failure(0);
        return;
    }
    test_limit("half a model fits", (long)model.st_size / 2);
    test_limit("all but the last byte of the model fits", (long)model.st_size - 1);
    test_limit("the model fits, its optimizer does not", (long)optimizer.st_size - 1);

    char arguments[1024];
    snprintf(arguments, sizeof arguments, "--data %s --out %s --steps 2 %s", temp("corpus.txt"), temp("c"), small_run);
    int code = finish_program(start_program(arguments, (long)model.st_size / 2));
    check(code == 1 && error_lines() == 1 && strstr(ran.err, "holds no checkpoint"),
          "the first save fails: says that there is none");
    show_failure(code == 1);
    check(!exists(temp("c/.saving")) && !exists(temp("c/model.safetensors")), "the first save fails: nothing is left");
    snprintf(arguments, sizeof arguments, "--model %s --data %s --batch 2 --seq 8 --dump %s", temp("a"),
             temp("corpus.txt"), temp("d.safetensors"));
    code = finish_program(start_program(arguments, 10000));
    check(code == 1 && error_lines() == 1, "--dump fails: exit code 1 and one line");
    check(!exists(temp("d.safetensors")) && !exists(temp("d.safetensors.saving")), "--dump fails: no file is left");
}
