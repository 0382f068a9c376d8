/*
upcycle_files.c: what upcycle reads and writes: number formats, moments, packed and sharded files, records, the
receipt; what it refuses; and that the destination is whole or absent.
*/
// Every finite BF16 and F16 number comes back from its float; halfway between two neighbours the even one is nearest.
static void test_up_formats(void) {
    static const float large[] = {1, 65519, 65520, -70000, INFINITY, 3.4e38f};
    unsigned char bytes[24];
    check(floats_to_bytes(bytes, large, 6, DTYPE_F16) == 3 && floats_to_bytes(bytes, large, 6, DTYPE_BF16) == 1 &&
              floats_to_bytes(bytes, large, 6, DTYPE_F32) == 0,
          "numbers that become infinite are counted");
    up_begin();
    for (int f16 = 0; f16 < 2; f16++) {
        int wrong = 0, wrong_round = 0;
        for (uint32_t h = 0; h < 65536; h++) {
            float x = f16 ? f16_to_float((uint16_t)h) : bf16_to_float((uint16_t)h);
            uint16_t back = f16 ? float_to_f16(x) : float_to_bf16(x);
            float again = f16 ? f16_to_float(back) : bf16_to_float(back);
            wrong += isnan(x) ? !isnan(again) : back != h;
            uint32_t magnitude = h & 0x7FFF, largest = f16 ? 0x7BFF : 0x7F7F;
            if (magnitude >= largest) continue;
            float next = f16 ? f16_to_float((uint16_t)(h + 1)) : bf16_to_float((uint16_t)(h + 1));
            float middle = (float)(((double)x + next) / 2), up = nextafterf(middle, next), down = nextafterf(middle, x);
            if (!f16 && magnitude == 0) continue;      // the float's own subnormals
            uint16_t even = (uint16_t)(h & 1 ? h + 1 : h);
            wrong_round += (f16 ? float_to_f16(middle) : float_to_bf16(middle)) != even;
            wrong_round += (f16 ? float_to_f16(up) : float_to_bf16(up)) != h + 1;
            wrong_round += (f16 ? float_to_f16(down) : float_to_bf16(down)) != h;
        }
        check(!wrong && !wrong_round, "%s: all 65536 numbers there and back, and between neighbours: %d and %d wrong",
              f16 ? "F16" : "BF16", wrong, wrong_round);
    }
    check(float_to_f16(65520.0f) == 0x7C00 && float_to_f16(65519.0f) == 0x7BFF && float_to_f16(-1e30f) == 0xFC00,
          "F16: overflow");
    check(float_to_bf16(3.4e38f) == 0x7F80 && float_to_bf16(-INFINITY) == 0xFF80, "BF16: overflow");
}

static void test_up_optimizer(void) {
    up_begin();
    int H = 24, I = 40;
    long n;
    up_make("m3", QWEN3_MOE, 2, H, I, 3, 2, 1, 5);
    static const char* kinds[] = {"copy", "scale", "interpolate"};
    for (int k = 0; k < 3; k++) {
        char name[32];
        snprintf(name, sizeof name, "adam_%s", kinds[k]);
        UP("{}/m3 {}/%s --experts 7 --optimizer %s", name, kinds[k]);
        double worst = 0;
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < 7; j++) {
                int s = j % 3, copies = s == 0 ? 3 : 2;
                char a[128], b[128], c[128];
                const char* suffix = half ? "exp_avg_sq" : "exp_avg";
                snprintf(a, sizeof a, EXPERT ".%s", j, "down_proj", suffix);
                snprintf(b, sizeof b, EXPERT ".%s", s, "down_proj", suffix);
                snprintf(c, sizeof c, EXPERT ".%s", (s + 1) % 3, "down_proj", suffix);
                float *got = up_moment(up_path(name), a, &n), *from = up_moment(up_path("m3"), b, NULL),
                      *next = up_moment(up_path("m3"), c, NULL);
                for (long i = 0; i < n; i++) {
                    double expected = k == 1             ? from[i] / (half ? copies * copies : copies)
                                      : k == 2 && j >= 3 ? 0.5 * (from[i] + next[i])
                                                         : from[i];
                    worst = larger(worst, fabs(got[i] - expected));
                }
            }
        float *router = up_moment(up_path(name), "model.layers.0.mlp.gate.weight.exp_avg_sq", &n),
              *from = up_moment(up_path("m3"), "model.layers.0.mlp.gate.weight.exp_avg_sq", NULL);
        double expected = k == 0   ? from[1 * H + 5]
                          : k == 1 ? from[1 * H + 5] / 4
                                   : 0.5 * (from[1 * H + 5] + from[2 * H + 5]);
        check(worst < 1e-6 && n == 7 * H && fabs(router[4 * H + 5] - expected) < 1e-6,
              "%s: moments of experts and router, largest error %.1e", kinds[k], worst);
    }
    // moments go where their weights go
    UP("{}/m3 {}/adam_shuffle --experts 4 --method shuffle --optimizer copy");
    check(strstr(up_output, "--resume --steps N` uses them") != NULL, "the receipt says how moments are used");
    UP("{}/m3 {}/adam_drop --experts 4 --method drop --optimizer copy");
    float *w = up_expert("m3", 0, "up_proj"), *v = up_expert("adam_shuffle", 3, "up_proj"),
          *x = up_expert("adam_drop", 3, "up_proj");
    float *m = up_moment(up_path("m3"), "model.layers.1.mlp.experts.0.up_proj.weight.exp_avg", NULL);
    float *mv = up_moment(up_path("adam_shuffle"), "model.layers.1.mlp.experts.3.up_proj.weight.exp_avg", NULL);
    float *mx = up_moment(up_path("adam_drop"), "model.layers.1.mlp.experts.3.up_proj.weight.exp_avg", NULL);
    int right = 1, dropped = 0;
    for (int i = 0; i < I; i++) {
        int from = -1;
        for (int k = 0; k < I; k++)
            if (same_floats(v + i * H, w + k * H, H)) from = k;
        right &= from >= 0 && same_floats(mv + i * H, m + from * H, H);
        int fresh = x[i * H] != w[i * H];
        dropped += fresh;
        for (int c = 0; c < H; c++) right &= mx[i * H + c] == (fresh ? 0 : m[i * H + c]);
    }
    check(right && dropped == I / 2, "moments are permuted with their units, and 0 where a weight is new");
    check(access(join_path(up_output, up_path("adam_copy"), "trainer.json"), F_OK) == 0, "trainer.json goes with them");
    UP("{}/m3 {}/adam_family --experts 6 --method family --optimizer copy");
    Error trainer_error = {""};
    Json* trainer = keep_json(json_read(join_path(up_output, up_path("adam_family"), "trainer.json"), &trainer_error));
    long step = json_whole(json_get(trainer, "step"), LONG_MAX),
         start = json_whole(json_get(trainer, "family_start"), LONG_MAX);
    check(step > 0 && start == step, "new families are penalised from the step at which the run goes on: %ld", start);
    UP("{}/m3 {}/adam_twice --experts 6 --optimizer copy");
    join_path(up_output, up_path("adam_twice"), "trainer.json");
    write_text(up_output, "{\"step\": 4, \"options\": {\"family-penalty\": 3, \"family-steps\": 2, \"steps\": 9}}");
    UP("{}/adam_twice {}/adam_again --experts 12 --method family --optimizer copy");
    trainer = keep_json(json_read(join_path(up_output, up_path("adam_again"), "trainer.json"), &trainer_error));
    const Json* options_left = json_get(trainer, "options");
    check(options_left && options_left->count == 1 && json_get(options_left, "steps"),
          "... with no strength or length of families before them");
    // twins of a shard: one in each group, or none
    up_make("dense", QWEN3, 2, H, I, 0, 0, 0, 8);
    static const struct { const char *arguments; int twins; } shards[] = {
        {"--experts 8 --method granular --granularity 4 --topk 4", 2}, {"--experts 4 --method partition", 1}};
    for (int i = 0; i < 2; i++) {
        UP("{}/dense {}/shards_copy --force %s --optimizer copy", shards[i].arguments);
        UP("{}/dense {}/shards_scale --force %s --optimizer scale", shards[i].arguments);
        float *kept = up_moment(up_path("shards_copy"), "model.layers.1.mlp.experts.2.up_proj.weight.exp_avg", &n),
              *scaled = up_moment(up_path("shards_scale"), "model.layers.1.mlp.experts.2.up_proj.weight.exp_avg", NULL);
        double worst = 0;
        for (long k = 0; k < n; k++) worst = larger(worst, fabs(scaled[k] - kept[k] / shards[i].twins));
        check(worst < 1e-6 && n > 0, "%s: moments are divided by %d", shards[i].arguments, shards[i].twins);
    }
    UP("{}/m3 {}/adam_reset --experts 7");
    check(access(join_path(up_output, up_path("adam_reset"), OPTIMIZER_FILE), F_OK) != 0 &&
              access(join_path(up_output, up_path("adam_reset"), "trainer.json"), F_OK) != 0,
          "reset: neither moments nor trainer.json");
    Config c;
    Error error = {""};
    config_read(&c, up_path("adam_copy"), &error);
    Model* model = new_model(&c, FOR_TRAINING, 1, 4);
    check(checkpoint_load(model, up_path("adam_copy"), &error) && optimizer_load(model, up_path("adam_copy"), &error),
          "train_moe reads them: %s", error.text);
}

// Writes the model of `from` with each layer's experts in two packed tensors, as newer files have them, and Mixtral's
// router under its new name.
static int up_pack(const char* from, const char* to) {
    Config c;
    Error error = {""};
    config_read(&c, from, &error);
    Model* m = new_model(&c, FOR_SCORING, 1, 4);
    int ok = checkpoint_load(m, from, &error), E = c.num_experts, count = 0;
    long H = c.hidden_size, I = c.moe_intermediate_size;
    OutTensor* out = (OutTensor*)kept_malloc(sizeof(OutTensor) * (size_t)(m->layout.count + 2 * c.num_layers));
    char(*names)[128] = (char(*)[128])kept_malloc(128 * (size_t)(m->layout.count + 2 * c.num_layers));
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        if (strstr(t->name, ".experts.")) continue;
        char* moe;
        snprintf(names[count], 128, "%s", t->name);
        if ((moe = strstr(names[count], "block_sparse_moe")) != NULL) strcpy(moe, "mlp.gate.weight");
        OutTensor o = {names[count], "F32", tensor_is_matrix(t) ? 2 : 1, {t->rows, t->cols, 0}, m->params + t->offset};
        out[count++] = o;
    }
    for (int l = 0; l < c.num_layers; l++)
        for (int down = 0; down < 2; down++) {
            snprintf(names[count], 128, "model.layers.%d.mlp.experts.%s", l, down ? "down_proj" : "gate_up_proj");
            OutTensor o = {names[count],
                           "F32",
                           3,
                           {E, down ? H : 2 * I, down ? I : H},
                           down ? m->weights.layers[l].down : m->weights.layers[l].gate_up};
            out[count++] = o;
        }
    char path[PATH_SIZE];
    Text text = {NULL, 0, 0};
    mkdir(to, 0777);
    ok &= safetensors_write(join_path(path, to, "model.safetensors"), out, count, &error);
    config_to_json(&text, &c, NULL, "float32");
    ok &= write_file(join_path(path, to, "config.json"), text.data, text.length, &error);
    free(text.data);
    return ok;
}

// Files: shards, formats, packed and sharded sources, threads; bits.
static void test_up_files(void) {
    up_begin();
    static const char* tensors[] = {"model.embed_tokens.weight", "model.layers.0.block_sparse_moe.gate.weight",
                                    "model.layers.1.block_sparse_moe.experts.6.w2.weight", "model.norm.weight",
                                    "lm_head.weight"};
    UP(GOLDEN "mixtral {}/one --experts 7");
    UP(GOLDEN "mixtral {}/many --experts 7 --shard-size 9K");
    UP("{}/many {}/again --experts 7");
    UP(GOLDEN "mixtral {}/half --experts 7 --dtype bf16");
    UP("{}/half {}/half2 --experts 7 --method copy --shard-size 5000");
    UP("{}/half2 {}/float --experts 7 --dtype f32");
    int same = 1, rounded = 1;
    for (int i = 0; i < 5; i++) {
        same &= up_same(up_path("one"), tensors[i], up_path("many"), tensors[i]) &&
                up_same(up_path("one"), tensors[i], up_path("again"), tensors[i]);
        same &= up_same(up_path("half"), tensors[i], up_path("half2"), tensors[i]) &&
                up_same(up_path("half"), tensors[i], up_path("float"), tensors[i]);
        long n;
        float *a = up_tensor(up_path("one"), tensors[i], &n), *b = up_tensor(up_path("half"), tensors[i], NULL);
        for (long k = 0; k < n; k++) rounded &= fabs(a[k] - b[k]) <= fabs(a[k]) / 256;
    }
    check(same, "one file or many, in and out: the same bits");
    check(rounded, "BF16 is the nearest");
    struct stat st;
    char path[PATH_SIZE], command[PATH_SIZE];
    int files = 0, within = 1;
    DIR* d = opendir(up_path("many"));
    struct dirent* entry;
    while ((entry = readdir(d)) != NULL) {
        Error error = {""};
        long bytes = 0;
        if (!strstr(entry->d_name, ".safetensors") || strstr(entry->d_name, "index")) continue;
        SafeTensors* s = keep_file(safetensors_open(join_path(path, up_path("many"), entry->d_name), &error));
        for (int i = 0; s && i < s->num_tensors; i++) bytes += s->tensors[i].bytes;
        within &= s && (bytes <= 9000 || s->num_tensors == 1);
        files++;
    }
    closedir(d);
    check(files > 3 && within, "%d shards of at most 9000 bytes of data", files);
    for (int i = 0; i < 2; i++) {
        static const char* methods[] = {"--method drop", "--method svd-perturb"};
        UP(GOLDEN "mixtral {}/t1_%d --experts 7 %s --threads 1", i, methods[i]);
        UP(GOLDEN "mixtral {}/t2_%d --experts 7 %s --threads 3 --shard-size 9K", i, methods[i]);
        char a[32], b[32];
        snprintf(a, sizeof a, "t1_%d", i);
        snprintf(b, sizeof b, "t2_%d", i);
        int equal = 1;
        for (int k = 0; k < 5; k++) equal &= up_same(up_path(a), tensors[k], up_path(b), tensors[k]);
        check(equal, "%s: the same bits with 1 and 3 threads, in one file and many", methods[i]);
    }
    UP(GOLDEN "mixtral {}/seed2 --experts 7 --method drop --seed 2");
    check(!up_same(up_path("seed2"), tensors[2], up_path("t1_0"), tensors[2]), "another seed draws other numbers");
    // packed experts, as newer files have them, under Mixtral's new names
    {
        Error error = {""};
        check(up_pack(GOLDEN "mixtral", up_path("packed")), "a packed source");
        UP("{}/packed {}/unpacked --experts 7");
        int equal = 1;
        for (int k = 0; k < 5; k++) equal &= up_same(up_path("one"), tensors[k], up_path("unpacked"), tensors[k]);
        equal &= up_same(up_path("one"), "model.layers.1.block_sparse_moe.experts.3.w3.weight", up_path("unpacked"),
                         "model.layers.1.block_sparse_moe.experts.3.w3.weight");
        check(equal, "packed experts: the same result");
        // Dots1 has tensors of width 0 beside its experts
        up_make("dots", DOTS1, 2, 24, 40, 4, 2, 1, 3);
        check(up_pack(up_path("dots"), up_path("dots_packed")), "a packed Dots1");
        for (int half = 0; half < 2; half++) {
            const char* dtype = half ? "bf16" : "keep";
            UP("{}/dots {}/dots_a --experts 6 --force --dtype %s", dtype);
            UP("{}/dots_packed {}/dots_b --experts 6 --force --dtype %s", dtype);
            equal = up_same(up_path("dots_a"), "model.layers.1.mlp.experts.5.up_proj.weight", up_path("dots_b"),
                            "model.layers.1.mlp.experts.5.up_proj.weight") &&
                    up_same(up_path("dots_a"), "model.layers.0.mlp.gate.weight", up_path("dots_b"),
                            "model.layers.0.mlp.gate.weight");
            check(equal, "packed Dots1, --dtype %s: the same result", dtype);
        }
        Config c;
        check(config_read(&c, up_path("dots_packed"), &error), "packed Dots1 has a configuration");
        Model* dots = new_model(&c, FOR_SCORING, 1, 4);
        check(checkpoint_load(dots, up_path("dots_packed"), &error), "train_moe reads it: %s", error.text);
    }
    // files of the tokenizer travel
    snprintf(command, sizeof command,
             "cp -r " GOLDEN
             "mixtral %s/tok && rm %s/tok/reference.safetensors && echo '{}' > %s/tok/tokenizer_config.json",
             up_dir, up_dir, up_dir);
    check(system(command) == 0, "a source with a tokenizer");
    UP("{}/tok {}/tok2 --experts 7");
    check(!stat(up_path("tok2/tokenizer_config.json"), &st) && st.st_size == 3, "its files travel");
}

static int up_exists(const char* name) { return !access(up_path(name), F_OK); }

// 1 if a directory holds one model.safetensors, and neither shards nor their index.
static int up_is_one_file(const char* name) {
    DIR* d = opendir(up_path(name));
    struct dirent* entry;
    char path[PATH_SIZE];
    int others = 0;
    while (d && (entry = readdir(d)) != NULL) others += strstr(entry->d_name, "model") == entry->d_name;
    if (d) closedir(d);
    return others == 1 && up_exists(join_path(path, name, "model.safetensors"));
}

// A run that goes on from shards leaves none of them, wherever it is killed.
static void test_up_sharded_run(void) {
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    write_corpus(up_path("text.txt"), 20000);
    UP("{}/m3 {}/source --experts 6 --optimizer copy --shard-size 20K");
    char run[1024], kill_at[16];
    snprintf(run, sizeof run, "--resume --out %s --data %s --val none --steps 9 --seq 16 --batch 2 --save-every 1",
             up_path("sharded"), up_path("text.txt"));
    copy_directory(up_path("source"), up_path("sharded"));
    int code = run_program("%s", run);
    check(code == 0 && up_is_one_file("sharded"), "a run that goes on from shards leaves one model.safetensors");
    show_failure(code == 0);
    copy_directory(up_path("sharded"), up_path("expected"));
    int ok = 1, kills = 0;
    for (code = 1; code && ok && kills < 100;) {
        remove_tree(up_path("sharded"));
        copy_directory(up_path("source"), up_path("sharded"));
        snprintf(kill_at, sizeof kill_at, "%d", ++kills);
        setenv("KILL_AT_FLUSH", kill_at, 1);
        code = run_program("%s", run);
        unsetenv("KILL_AT_FLUSH");
        ok = (code == 0 || code == -SIGKILL) && (!code || run_program("%s", run) == 0) && up_is_one_file("sharded") &&
             same_file(up_path("sharded/model.safetensors"), up_path("expected/model.safetensors")) &&
             same_file(up_path("sharded/" OPTIMIZER_FILE), up_path("expected/" OPTIMIZER_FILE));
    }
    check(ok && kills > 6, "killed at each of %d flushes: it ends with the same bytes, and no shards", kills - 1);
    show_failure(ok);
    // a shard that cannot be removed
    remove_tree(up_path("sharded"));
    copy_directory(up_path("source"), up_path("sharded"));
    mkdir(up_path("sharded/model-00099-of-00099.safetensors"), 0777);
    code = run_program("%s", run);
    check(code == 1 && strstr(ran.err, "model-00099-of-00099.safetensors: ") &&
              !up_exists("sharded/model.safetensors.index.json"),
          "a shard that cannot be removed is named");
    rmdir(up_path("sharded/model-00099-of-00099.safetensors"));
    code = run_program("%s", run);
    check(code == 0 && up_is_one_file("sharded") &&
              same_file(up_path("sharded/model.safetensors"), up_path("expected/model.safetensors")),
          "and without it the run goes on to the same bytes");
    show_failure(code == 0);
}

// Starts upcycle --force, which is stopped while it writes: 12 MB an expert, so that there is time.
static pid_t up_stopped(const char* src, const char* dst, int experts) {
    char saving[PATH_SIZE], number[16];
    snprintf(saving, sizeof saving, "%.4000s.saving", up_path(dst));
    snprintf(number, sizeof number, "%d", experts);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        if (!freopen("/dev/null", "w", stdout) || !freopen(up_path("errors"), "w", stderr)) _exit(9);
        execl(self_path, self_path, "--as-upcycle", up_path(src), up_path(dst), "--experts", number, "--force",
              (char*)NULL);
        _exit(9);
    }
    for (int wait = 0; wait < 10000 && access(saving, F_OK); wait++) usleep(1000);
    kill(pid, SIGSTOP);
    return pid;
}

// --force leaves a run alone that trains in DST, and no run begins there while upcycle works.
static void test_up_locks(void) {
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make("large", QWEN3, 1, 512, 2048, 0, 0, 0, 1);
    copy_directory(up_path("m3"), up_path("run"));
    int run = open(up_path("run"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    flock(run, LOCK_EX | LOCK_NB);
    int code = up_run("", "{}/m3 {}/run --experts 6 --force");
    check(code == 2 && strstr(up_output, "run: a run is writing there; stop it first") && !up_exists("run.saving") &&
              same_file(up_path("run/model.safetensors"), up_path("m3/model.safetensors")),
          "--force does not replace what a run writes: %.*s", (int)strcspn(up_output, "\n"), up_output);
    flock(run, LOCK_UN);
    pid_t pid = up_stopped("large", "run", 48);
    code = run_program("--resume --out %s --steps 9", up_path("run"));
    check(up_exists("run.saving") && code == 2 && strstr(ran.err, "run: another run is writing there"),
          "no run begins in what is being replaced: %.100s", ran.err);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(run);
    UP("{}/m3 {}/run --experts 6 --force");
    check(!up_exists("run.saving") && !up_exists("run/trainer"), "afterwards it is replaced");
    pid = up_stopped("large", "late", 12);
    copy_directory(up_path("m3"), up_path("late"));
    kill(pid, SIGCONT);
    int status;
    waitpid(pid, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 1 && !up_exists("late.saving") &&
              same_file(up_path("late/trainer.json"), up_path("m3/trainer.json")),
          "nor does it replace what has come there while it worked");
}

// The destination is whole or absent.
static void test_up_safety(void) {
    test_up_sharded_run();
    test_up_locks();
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    UP("{}/m3 {}/here --experts 6");
    check(up_run("", "{}/m3 {}/here --experts 9") == 2 && strstr(up_output, "exists"), "an existing DST is refused");
    UP("{}/m3 {}/here --experts 9 --force");
    Config c;
    Error error = {""};
    check(config_read(&c, up_path("here"), &error) && c.num_experts == 9 && !up_exists("here.saving") &&
              !up_exists("here.old"),
          "--force replaces it");
    check(up_run("", "{}/m3 {}/m3 --experts 6 --force") == 2 && up_run("", "{}/m3 {}/m3/inside --experts 6") == 2 &&
              up_run("", "{}/m3 {} --experts 6 --force") == 2,
          "DST in, at or around SRC is refused");
    mkdir(up_path("left.saving"), 0777);
    FILE* f = fopen(up_path("left.saving/model.safetensors"), "w");
    fclose(f);
    check(up_run("", "{}/m3 {}/left --experts 6") == 2 && strstr(up_output, "not made by upcycle") &&
              up_exists("left.saving/model.safetensors"),
          "a directory of somebody else's is left alone");
    f = fopen(up_path("left.saving/" SAVING_MARKER), "w");
    fclose(f);
    check(up_run("", "{}/left.saving {}/left --experts 6") == 2, "a source is never taken for what a killed run left");
    UP("{}/m3 {}/left --experts 6");
    check(up_exists("left/config.json") && !up_exists("left/" SAVING_MARKER) && !up_exists("left.saving"),
          "what a killed run left is removed");
    // killed at each of its flushes: DST is absent or whole, and what is left is never in the way of the next run
    int kills = 0, absent_or_whole = 1, next_works = 1;
    for (int code = 1; code && kills < 100;) {
        char environment[32];
        snprintf(environment, sizeof environment, "KILL_AT_FLUSH=%d", ++kills);
        remove_tree(up_path("cut"));
        code = up_run(environment, "{}/m3 {}/cut --experts 6");
        if (up_exists("cut")) absent_or_whole &= up_change(up_path("left"), 0, up_path("cut")) == 0;
        else next_works &= up_run("", "{}/m3 {}/cut --experts 6") == 0;
    }
    check(kills > 3 && absent_or_whole && next_works, "killed at each of %d flushes: DST %s, and the next run %s",
          kills - 1, absent_or_whole ? "is absent or whole" : "is half written", next_works ? "works" : "is refused");
    check(up_run("ulimit -f 20;", "{}/m3 {}/disk_full --experts 12") == 1 && !up_exists("disk_full") &&
              !up_exists("disk_full.saving"),
          "a full disk: exit 1, nothing left: %.80s", up_output);
    // killed while it writes: 600 MB, so that there is time
    up_make("large", QWEN3, 1, 512, 2048, 0, 0, 0, 1);
    char command[PATH_SIZE * 3];
    int clean = 1, killed = 0;
    for (int i = 0; i < 5; i++) {
        static const int signals[] = {SIGKILL, SIGTERM, SIGKILL, SIGINT, SIGKILL};
        if (signals[i] != SIGKILL) remove_tree(up_path("killed.saving"));       // whose coming is waited for
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            if (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)) _exit(9);
            execl(self_path, self_path, "--as-upcycle", up_path("large"), up_path("killed"), "--experts", "48",
                  "--method", "noise", (char*)NULL);
            _exit(9);
        }
        for (int wait = 0; wait < 10000 && !up_exists("killed.saving"); wait++) usleep(1000);
        usleep(20000 * (useconds_t)i);
        kill(pid, signals[i]);
        usleep(500);
        kill(pid, signals[i]);          // as timeout(1) does
        int status;
        waitpid(pid, &status, 0);
        if (signals[i] == SIGTERM)
            clean &= WIFEXITED(status) && WEXITSTATUS(status) == 143 && !up_exists("killed.saving");
        else if (signals[i] == SIGINT)
            clean &= WIFEXITED(status) && WEXITSTATUS(status) == 130 && !up_exists("killed.saving");
        else killed += WIFSIGNALED(status) && up_exists("killed.saving");
        clean &= !up_exists("killed");
    }
    check(clean && killed > 0, "killed five times: never a DST; SIGINT and SIGTERM tidy up, exit 130 and 143");
    UP("{}/large {}/killed --experts 2");
    check(up_exists("killed/model.safetensors") && !up_exists("killed.saving"), "the next run works");
    f = fopen(up_path("here/" SAVING_MARKER), "w"); // killed after it had marked what it was about to replace
    fclose(f);
    UP("{}/m3 {}/here --experts 6 --force");
    check(config_read(&c, up_path("here"), &error) && c.num_experts == 6 && !up_exists("here/" SAVING_MARKER) &&
              !up_exists("here.saving"),
          "a marked checkpoint is replaced all the same");
    snprintf(command, sizeof command, "cd %s && %s --as-upcycle m3 piped --experts 6 | head -n 1 > piped.txt", up_dir,
             self_path);
    check(system(command) == 0 && up_exists("piped/model.safetensors") && !up_exists("piped.saving"),
          "a pipe that is closed early loses nothing");
    snprintf(command, sizeof command,
             "cd %s && find m3 -type f | xargs sha256sum > sums && %s --as-upcycle m3 m3x --experts 9 --method drop "
             ">/dev/null && sha256sum -c --quiet sums",
             up_dir, self_path);
    check(system(command) == 0, "the source's files are untouched");
    UP("{}/m3 {}/dry --experts 6 --dry-run");
    check(!up_exists("dry") && !up_exists("dry.saving") && strstr(up_output, "memory"), "--dry-run writes nothing");
}

// What is written can be read again, whatever SRC holds.
static void test_up_records(void) {
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make("nan", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make_random_shard("few.bin", 600, 256);
    Config c;
    Error error = {""};
    config_read(&c, up_path("nan"), &error);
    Model* m = new_model(&c, FOR_TRAINING, 1, 4);
    checkpoint_load(m, up_path("nan"), &error);
    m->weights.layers[1].down[3] = NAN;
    check(checkpoint_save(m, up_path("nan"), 1) == NULL, "a model with a number that is none");
    UP("{}/nan {}/nan2 --experts 5 --select weight --check {}/few.bin --seq 8");
    check(strstr(up_output, "are not numbers") != NULL, "--check says that logits are not numbers");
    Json* j = up_receipt(up_path("nan2"));
    check(j && json_absent(json_get(json_get(j, "check"), "logits")), "and the receipt is JSON all the same");
    const Json* bytes = json_get(j, "bytes");
    struct stat st;
    check(bytes && bytes->count == 2 && !stat(up_path("nan2/model.safetensors"), &st) &&
              bytes->items[1]->number < (double)st.st_size && bytes->items[1]->number > 0.9 * (double)st.st_size,
          "it names the bytes of both");
    checkpoint_load(m = new_model(&c, FOR_TRAINING, 1, 4), up_path("m3"), &error);
    m->weights.layers[1].down[3] = 3.4e38f; // BF16 ends at 3.39e38
    mkdir(up_path("huge"), 0777);
    check(checkpoint_save(m, up_path("huge"), 1) == NULL, "a model with a large number");
    UP("{}/huge {}/huge2 --experts 3 --dtype bf16");
    check(strstr(up_output, "1 numbers are too large") != NULL, "that BF16 does not hold it is said");
    UP("{}/huge {}/huge3 --experts 3");
    check(!strstr(up_output, "too large"), "and nothing where it is held");
    // a long line of ancestors
    char from[PATH_SIZE], to[PATH_SIZE];
    snprintf(from, sizeof from, "%s", up_path("m3"));
    for (int i = 0; i < 30; i++) {
        snprintf(to, sizeof to, "%s", up_path(i % 2 ? "odd" : "even"));
        UP("%s %s --force --experts 3", from, to);
        strcpy(from, to);
    }
    check(up_run("", "--inspect {}/odd") == 0, "the thirtieth upcycle can be read");
    int generations = 0;
    for (const char* s = up_output; (s = strstr(s, "3 -> 3 experts")) != NULL; s++) generations++;
    check(generations == 13, "and tells of %d", generations);
    // lots: every number of copies occurs, not blocks of cap + 1
    up_make("m8", QWEN3_MOE, 4, 24, 8, 8, 2, 1, 5);
    UP("{}/m8 {}/lots --experts 16 --select random");
    int twice = 0;
    for (int l = 0; l < 4; l++) {
        int counts[8] = {0};
        for (int e = 0; e < 16; e++) counts[up_listed(up_path("lots"), "source", l, e)]++;
        for (int e = 0; e < 8; e++) twice += counts[e] == 2;
    }
    check(twice >= 4, "--select random draws lots: %d of 32 experts are there twice (by rank it would be none)", twice);
    // prototypes that are drawn have the length of others
    UP(VARIANTS "lpr {}/lpr_random --experts 8 --method random");
    long n;
    float* prototypes = up_tensor(up_path("lpr_random"), "model.layers.0.mlp.gate.prototypes", &n);
    double squares = sum_of_squares(prototypes + n - n / 4, n / 4) / (double)(n / 4);
    check(squares > 0.2 && squares < 4, "LPR: new prototypes from N(0, 1): mean square %.2f", squares);
}

// Sources that are not right, for the refusals below.
static void up_make_bad_sources(void) {
    Config c;
    Error error = {""};
    Text t = {NULL, 0, 0};
    up_make("like_lpr", QWEN3_MOE, 2, 20, 12, 4, 2, 1, 5); // as the LPR model among the references, but for the router
    up_make("llama7", LLAMA, 2, 24, 40, 0, 0, 0, 5);
    up_make("dots", DOTS1, 2, 24, 40, 4, 2, 1, 5);
    up_make("none_sparse", QWEN3, 2, 24, 40, 0, 0, 0, 5);
    config_read(&c, up_path("none_sparse"), &error);
    c.arch = QWEN3_MOE;
    c.num_experts = 3;
    c.num_experts_per_tok = 2;
    c.moe_intermediate_size = 40;
    config_to_json(&t, &c, NULL, "float32");
    write_text(up_path("none_sparse/config.json"), t.data);
    copy_directory(up_path("m3"), up_path("broken"));
    write_text(up_path("broken/upcycle.json"), "{\"layers\": ");
    copy_directory(up_path("m3"), up_path("broken_trainer"));
    write_text(up_path("broken_trainer/trainer.json"), "{\"step\"");
    // tied, and the head has the embedding's rows and three more
    config_read(&c, up_path("llama7"), &error);
    c.tie_word_embeddings = 1;
    Model* m = new_model(&c, FOR_SCORING, 1, 4);
    OutTensor* out = (OutTensor*)kept_malloc(sizeof(OutTensor) * (size_t)(m->layout.count + 1));
    float* head = kept_floats((long)(c.vocab_size + 3) * c.hidden_size);
    memset(head, 0, floats_bytes((long)(c.vocab_size + 3) * c.hidden_size)); // as all of the model is
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* s = &m->layout.tensors[i];
        OutTensor o = {s->name, "F32", tensor_is_matrix(s) ? 2 : 1, {s->rows, s->cols, 0}, m->params + s->offset};
        out[i] = o;
    }
    OutTensor last = {"lm_head.weight", "F32", 2, {c.vocab_size + 3, c.hidden_size, 0}, head};
    out[m->layout.count] = last;
    mkdir(up_path("head"), 0777);
    check(safetensors_write(up_path("head/model.safetensors"), out, m->layout.count + 1, &error), "a head too long");
    t.length = 0;
    config_to_json(&t, &c, NULL, "float32");
    write_text(up_path("head/config.json"), t.data);
    free(t.data);
}

// One line, exit 2, nothing left behind.
static void test_up_refusals(void) {
    up_begin();
    up_make("m3", QWEN3_MOE, 2, 24, 40, 3, 2, 1, 5);
    up_make_random_shard("short.bin", 200, 256);
    up_make_bad_sources();
    static const struct { const char *arguments, *says;
    } cases[] = {{GOLDEN "llama {}/x", "--experts"},
                 {GOLDEN "llama --experts 4", "SRC DST"},
                 {"{}/nowhere {}/x --experts 4", "config.json"},
                 {GOLDEN "llama {}/x --experts 4 --topk 5", "only 4 experts"},
                 {GOLDEN "llama {}/x --experts 4 --layers every-2", "Qwen3"},
                 {GOLDEN "llama {}/x --experts 4 --norm-topk 0", "always renormalises"},
                 {GOLDEN "llama {}/x --experts 4 --arch qwen3", "mixtral fits"},
                 {GOLDEN "qwen3 {}/x --experts 4 --layers 3", "0 to 2"},
                 {GOLDEN "qwen3 {}/x --experts 4 --layers 1,", "after the last comma"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method granular", "--granularity"},
                 {GOLDEN "qwen3 {}/x --experts 8 --method granular --granularity 4", "no multiple"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method granular --granularity 3", "no multiple"},
                 {GOLDEN "qwen3 {}/x --experts 6 --method granular --granularity 3 --topk 4", "torn"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method partition", "no multiple"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method partition --drop-indices per-matrix", "only with --drop"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method domains", "--calibrate F,F"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method domains --calibrate a,b,c", "there are 3"},
                 {GOLDEN "qwen3 {}/x --experts 4 --unit-share 0.3", "belongs to --method domains"},
                 {GOLDEN "qwen3 {}/x --experts 2 --method domains --calibrate a,b --unit-share 0.01", "no unit"},
                 {GOLDEN "qwen3 {}/x --experts 4 --method family", "is dense"},
                 {GOLDEN "qwen3 {}/x --experts 4 --select grad2", "is dense"},
                 {"{}/m3 {}/x --experts 6 --method granular", "fitting are"},
                 {"{}/m3 {}/x --experts 6 --layers every-2", "other layers of"},
                 {"{}/m3 {}/x --experts 6 --norm-topk 0", "is a mixture"},
                 {"{}/m3 {}/x --experts 2", "load|router-norm"},
                 {"{}/m3 {}/x --experts 6 --select reap", "keep"},
                 {"{}/m3 {}/x --experts 6 --select load", "--calibrate"},
                 {"{}/m3 {}/x --experts 6 --score-on max --select load", "fisher\n"},
                 {"{}/m3 {}/x --experts 2 --select router-norm", "--reference"},
                 {"{}/m3 {}/x --experts 2 --select weight --method drop", "fewer"},
                 {"{}/m3 {}/x --experts 6 --select grad2", "--calibrate"},
                 {"{}/m3 {}/x --experts 6 --select grad2 --calibrate {}/short.bin --seq 64", "too short"},
                 {"{}/m3 {}/x --experts 6 --check {}/none.bin", "none.bin"},
                 {"{}/m3 {}/x --experts 6 --router bias", "no bias"},
                 {"{}/m3 {}/x --experts 6 --method family --router noise", "exactly"},
                 {"{}/m3 {}/x --experts 6 --method family --topk 4", "one member"},
                 {"{}/m3 {}/x --experts 6 --drop-ratio 0.3", "belongs to --method drop"},
                 {"{}/m3 {}/x --experts 6 --method drop --drop-ratio 1.5", "from 0 to 1"},
                 {"{}/m3 {}/x --experts 6 --methd copy", "unknown"},
                 {"{}/m3 {}/x --experts 6 --s 5", "--s: may be any of --seed"},
                 {"{}/m3 {}/x -k2 --experts 6", "-k: unknown"},
                 {"{}/m3 {}/x --experts 6 --shard-size 5X", "5G"},
                 {"{}/m3 {}/x --experts 6 --prune-weights 0.5", "--calibrate"},
                 {"{}/m3 {}/absent/x --experts 6", "parent"},
                 {GOLDEN "mixtral {}/x --experts 10 --optimizer copy", "optimizer.safetensors"},
                 {GOLDEN "llama {}/x --experts 2 --sources " GOLDEN "qwen3", "has another model_type than"},
                 {GOLDEN "llama {}/x --experts 1 --sources " GOLDEN "llama", "each needs an expert"},
                 {GOLDEN "llama {}/x --experts 2 --sources " GOLDEN "mistral", "has another hidden_size than"},
                 {GOLDEN "rope_llama3 {}/x --experts 2 --sources " GOLDEN "rope_linear --rest mean",
                  "another head_dim than"},
                 {GOLDEN "llama {}/x --experts 2 --sources " GOLDEN "mixtral", "has another model_type than"},
                 {GOLDEN "llama {}/x --experts 2 --rest base", "--rest is about --sources"},
                 {"{}/m3 {}/x --experts 6 --cap 2", "--select weight|saliency|grad2|fisher|load has one"},
                 {"{}/m3 {}/x --experts 6 --check-batches 2", "there is no --check"},
                 {"{}/m3 {}/x --experts 6 --method svd-mix --strength 1.1", "0 to 1"},
                 {"{}/m3 {}/x --experts 6 --method sparse-code-mix --strength 2", "0 to 1"},
                 {"{}/m3 {}/x --experts 2 --select router-norm --reference " VARIANTS "lpr", "router than"},
                 {VARIANTS "lpr {}/x --experts 2 --select router-norm --reference {}/like_lpr", "router than"},
                 {"{}/none_sparse {}/x --experts 6", "no layer is sparse"},
                 {"{}/head {}/x --experts 4", "lm_head.weight differs"},
                 {"{}/m3 {}/x --experts 3 --method family", "as many experts as SRC"},
                 {"{}/m3 {}/x --experts 3 --method drop", "as many experts as SRC"},
                 {"{}/m3 {}/x --experts 3 --router perturb-new", "no more experts than SRC"},
                 {"{}/m3 {}/x --experts 6 --method random --prune-weights 0.5 --calibrate {}/short.bin", "seen none"},
                 {"{}/m3 {}/x --experts 3 --prune-weights 1.5 --calibrate {}/short.bin", "from 0 to 1"},
                 {"{}/m3 {}/x --experts 6 --select random --allocate greedy", "draws lots"},
                 {"{}/m3 {}/x --experts 6 --method shuffle --optimizer interpolate", "no next expert"},
                 {"{}/llama7 {}/x --experts 6 --optimizer interpolate", "no next expert"},
                 {"{}/broken {}/x --experts 6 --dry-run", "upcycle.json"},
                 {"{}/broken_trainer {}/x --experts 6 --optimizer copy --dry-run", "trainer.json"},
                 {"{}/dots {}/x --experts 8 --arch olmoe", "leave it out"},
                 {"{}/m3 {}/x --experts 6 --batch 2", "there is no --calibrate or --check"},
                 {"{}/m3 {}/x --experts 6 --data {}/short.bin", "--data goes with --inspect"},
                 {"--inspect {}/m3 --experts 6", "leave out --experts"},
                 {"--inspect {}/m3 --seq 8", "there is no --data"},
                 {GOLDEN "llama {}/x --experts 2 --sources {}/m3", "has another model_type than"},
                 {"{}/m3 {}/x --experts 6 --strength 2", "belongs to"},
                 {"{}/m3 {}/x --experts six", "whole number"}};
    // what agrees with the source or switches off what is not there is no error
    static const char* agree[] = {
        "{}/m3 --experts 6 --layers all --norm-topk 1 --granularity 1 --scale exact --energy 0.95 --drop-ratio 0 "
        "--noise-std 0 --noise-fraction 0 --strength 0 --router copy --router-delta 0 --router-std 0.02 "
        "--router-init normal --prune-weights 0 --cap 3 --score-on all --calibrate {}/short.bin --reference {}/m3 "
        "--arch qwen3",
        GOLDEN "qwen3 --experts 4 --select uniform --score-on all --cap 3 --router copy --router-delta 0 "
        "--prune-weights 0 --strength 0 --batch 8 --check-batches 10 --calibrate-batches 10 --reference {}/m3 "
        "--shared 0",
        "{}/m3 --experts 6 --layers every-1", "{}/m3 --experts 6 --layers 0-1"};
    for (EACH(i, agree)) {
        int code = up_run("", "%s {}/agrees", agree[i]);
        check(code == 0 && up_exists("agrees/config.json"), "options that agree, %d: %.200s", (int)i,
              code ? up_output : "");
        remove_tree(up_path("agrees"));
    }
    setenv("NO_LOCKS", "1", 1);
    setenv("NO_FLUSH", "1", 1);
    check(up_run("", "{}/m3 {}/agrees --experts 6") == 0 && strstr(up_output, "no locks here"),
          "a file system without locks and flushes is warned of: %.200s", up_output);
    unsetenv("NO_LOCKS");
    unsetenv("NO_FLUSH");
    for (EACH(i, cases)) {
        int code = up_run("", "%s", cases[i].arguments), lines = 0;
        for (const char* s = up_output; *s; s++) lines += *s == '\n';
        check(code == 2 && lines == 1 && strstr(up_output, cases[i].says) && !up_exists("x") && !up_exists("x.saving"),
              "%s: %d, %.200s", cases[i].arguments, code, up_output);
    }
}

// Every method with every option that can make a claim of the receipt true or false, on some sources: what is "kept
// exactly" is, and what is not said to be is not.
static void test_up_claims(void) {
    static const struct { const char *source, *arguments; int from; } bases[] = {
        {"dense", "--experts 6 --topk 3", FROM_DENSE},
        {"dense", "--experts 6 --topk 6 --norm-topk 0", FROM_DENSE},
        {"dense", "--experts 6 --topk 6 --router-init zero", FROM_DENSE},
        {"dense", "--experts 6 --topk 3 --norm-topk 0 --router-init zero", FROM_DENSE},
        {"one", "--experts 4 --topk 2", FROM_MOE}, // a mixture of one expert
        {"one", "--experts 4 --topk 4 --router perturb-new", FROM_MOE},
        {"norm", "--experts 6 --topk 4", FROM_MOE},
        {"raw", "--experts 6 --topk 3", FROM_MOE},
        {"raw", "--experts 6 --topk 4 --router perturb-new --router-delta 0", FROM_MOE}};
    static const struct { const char *name, *value; } options[] = {
        {"method", NULL}, {"scale", "cuberoot"}, {"scale", "none"}, {"drop-ratio", "0"}, {"noise-fraction", "0"},
        {"noise-std", "0"}, {"unit-share", "1"}, {"shared", "0"}, {"strength", "0"}, {"strength", "1"},
        {"strength", "0.01"}};
    int runs = 0, kept = 0, wrong = 0;
    up_make("dense", QWEN3, 2, 24, 24, 0, 0, 0, 1);
    up_make("one", QWEN3_MOE, 2, 24, 24, 1, 1, 1, 2);
    up_make("norm", QWEN3_MOE, 2, 24, 24, 3, 2, 1, 3);
    up_make("raw", QWEN3_MOE, 2, 24, 24, 3, 2, 0, 4);
    for (int i = 0; i < NUM_METHODS; i++)
        for (EACH(b, bases))
            for (EACH(o, options)) {
                const Method* m = &methods[i];
                char more[256] = "";
                if (!(m->from & bases[b].from) || (o > 0 && !lists(m->options, options[o].name))) continue;
                if (o > 0) snprintf(more, sizeof more, "--%s %s", options[o].name, options[o].value);
                if (is(m->name, "granular")) strcat(more, " --granularity 3");
                if (lists("importance,marks,cluster", m->name)) strcat(more, " --calibrate {}/few.bin");
                if (is(m->name, "domains"))
                    strcat(more, " --calibrate {}/few.bin,{}/few.bin,{}/few.bin,{}/few.bin,{}/few.bin,{}/few.bin");
                int code = up_run("", "{}/%s {}/claim %s --method %s %s --check {}/few.bin --seq 12 --batch 2 --force",
                                  bases[b].source, bases[b].arguments, m->name, more);
                if (code == 2) continue; // refused: one of the options is not for this method
                const char *function = strstr(up_output, "function: "), *logits = strstr(up_output, "of the logits ");
                int exactly = function && !strncmp(function, "function: kept exactly", 22);
                int right = logits && exactly == (atof(logits + 14) < 3e-6);
                runs++, kept += exactly, wrong += !right;
                if (!right)
                    printf("       %s %s --method %s %s: %s\n", bases[b].source, bases[b].arguments, m->name, more,
                           up_output);
            }
    check(wrong == 0 && runs > 150 && kept > 40, "%d claims, %d of them kept exactly: %d wrong", runs, kept, wrong);
}

// What the receipt says of the function must agree with what --check finds.
static void test_up_receipt(void) {
    up_begin();
    up_make_random_shard("few.bin", 600, 29);
    test_up_claims();
    static const struct { const char *arguments, *function, *warning; double least, most; } cases[] = {
        {GOLDEN "llama {}/r%d --experts 4", "kept exactly", "no language-model gradient", 0, 1e-6},
        {GOLDEN "qwen3 {}/r%d --experts 4 --norm-topk 0", "not kept", "shrinks by about E / K = 2", 1e-2, 2},
        {GOLDEN "qwen3 {}/r%d --experts 4 --topk 1", "kept exactly", "never learns", 0, 1e-6},
        {GOLDEN "qwen3 {}/r%d --experts 6 --method granular --granularity 3", "kept exactly", NULL, 0, 1e-6},
        {GOLDEN "qwen3 {}/r%d --experts 4 --method drop", "not kept", NULL, 1e-3, 2},
        {GOLDEN "mixtral {}/r%d --experts 10", "that of SRC with 1 expert per token", "1 distinct source", 1e-4, 2},
        {GOLDEN "olmoe {}/r%d --experts 12", "not kept", "each shrinks by about 2", 1e-4, 2},
        {GOLDEN "mixtral {}/r%d --experts 10 --method family", "kept exactly", NULL, 0, 1e-6},
        {GOLDEN "mixtral_top1 {}/r%d --experts 10", "kept exactly", "copies get no token", 0, 1e-6},
        {GOLDEN "olmoe {}/r%d --experts 12 --method drop --topk 3", "not kept", "transformers may choose", 1e-4, 2},
        {GOLDEN "olmoe {}/r%d --experts 12 --method multiply", "kept exactly", "--strength 0.01", 0, 1e-6},
        {GOLDEN "olmoe {}/r%d --experts 12 --method multiply --strength 0.1", "not kept", NULL, 1e-3, 2},
        {GOLDEN "qwen3 {}/r%d --layers-to 5 --ffn-to 30", "kept exactly; the new", "2 copies of a unit", 0, 1e-6},
        {GOLDEN "olmoe {}/r%d --layers-to 3 --new-layers copy", "not kept: copied layers", NULL, 1e-2, 2},
        {GOLDEN "mixtral {}/r%d --experts 3 --select weight", "not kept: 2 of 5 experts are gone", NULL, 1e-4, 2},
        {GOLDEN "mixtral {}/r%d --experts 5", "kept exactly", NULL, 0, 1e-6},
        {GOLDEN "mixtral {}/r%d --experts 8 --method scaled", "not kept", "1 distinct source", 1e-4, 2},
        {GOLDEN "qwen3 {}/r%d --experts 5 --topk 5 --method partition", "nearly kept: gates weigh", NULL, 1e-4, 2},
        {GOLDEN "mixtral_top1 {}/r%d --experts 15 --topk 2", "kept exactly: the top 2 are copies of SRC's one", NULL, 0,
         1e-6}};
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        char arguments[256], name[16];
        snprintf(name, sizeof name, "r%d", i);
        snprintf(arguments, sizeof arguments, "%.*s{}/%s%s --check {}/few.bin --seq 12 --batch 3",
                 (int)(strstr(cases[i].arguments, "{}") - cases[i].arguments), cases[i].arguments, name,
                 strstr(cases[i].arguments, "%d") + 2);
        UP("%s", arguments);
        Json* j = up_receipt(up_path(name));
        const Json *function = json_get(j, "function"), *warnings = json_get(j, "warnings"),
                   *proof = json_get(j, "check");
        int warned = cases[i].warning == NULL;
        for (int k = 0; k < warnings->count; k++)
            warned |= cases[i].warning && strstr(warnings->items[k]->string, cases[i].warning);
        double change = json_get(proof, "logits")->number, before = json_get(proof, "loss")->items[0]->number;
        check(!strncmp(function->string, cases[i].function, strlen(cases[i].function)) && warned &&
                  change >= cases[i].least && change <= cases[i].most && before > 1,
              "%s: %s (%.1e), %d warnings", cases[i].arguments, function->string, change, warnings->count);
    }
    Json* j = up_receipt(up_path("r5"));
    check(fabs(json_get(json_get(j, "check"), "distinct_sources")->number - 1) < 1e-9,
          "copy x 2, K = 2: every token reaches 1 distinct source");
    j = up_receipt(up_path("r7"));
    check(fabs(json_get(json_get(j, "check"), "distinct_sources")->number - 2) < 1e-9,
          "family x 2, K = 2: every token reaches 2");
    UP("{}/one {}/four --experts 4 --topk 2 --check {}/few.bin --seq 12");
    check(strstr(up_output, "kept exactly: gates sum to 1, and every expert is SRC's one") &&
              strstr(up_output, "never separate") && !strstr(up_output, "family") && !strstr(up_output, "reach only"),
          "copies of one: no advice that would be refused");
    UP(VARIANTS "dynamic {}/dynamic --experts 6 --check {}/few.bin --seq 12");
    const char* experts = strstr(up_output, "a token's ");
    const char* sources = experts ? strstr(experts, "experts come from ") : NULL;
    check(sources && atof(experts + 10) > 1 && atof(experts + 10) < 4 && atof(experts + 10) >= atof(sources + 18),
          "dynamic: %.80s", experts ? experts : up_output);
    check(up_run("", "--inspect {}/r5 --data {}/few.bin --seq 12") == 0 && strstr(up_output, "5 of 45 pairs equal") &&
              strstr(up_output, "within families 1.0000") && strstr(up_output, "copy, 5 -> 10 experts") &&
              strstr(up_output, "Gini"),
          "--inspect finds the twins, the lineage and the load");
}
