/*
commands.c: the command line of train_moe: what is refused and in which words, --help, --eval, --dump, --trace.
*/
// Runs a command line that must fail: exit code, one line on stderr with these words in it, and no new file.
static void check_refused(int expected_code, const char* arguments, const char* expected) {
    char where[PATH_SIZE], all[2048], *p = all;
    snprintf(where, sizeof where, "%s", temp("new"));
    for (const char* s = arguments; *s && p < all + 1500; s++) { // @ stands for the temporary directory
        if (*s == '@')
            p += sprintf(p, "%s", temp_dir);
        else
            *p++ = *s;
    }
    *p = 0;
    remove_tree(where);
    int code = run_program("%s", all), lines = error_lines();
    int ok = code == expected_code && lines == 1 && strstr(ran.err, expected) && !exists(where);
    check(ok, "%.100s: %s", arguments, ran.err);
    if (!ok)
        printf("       exit code %d, %d lines, %s\n", code, lines,
               exists(where) ? "something was written" : "nothing written");
}

static void test_bad_commands(void) {
    static const struct {
        const char *arguments, *expected;
    } bad[] = {{"--nonsense", "--nonsense: unknown"},
               {"--steps", "--steps wants a value"},
               {"-x", "-x: unknown"},
               {"-xyz", "-x: unknown"},
               {"--val-", "--val-: may be any of --val-every, --val-batches"},
               {"--expert 4", "--expert: may be any of --experts, --expert-ffn"},
               {"--dense=1", "--dense=1: the option takes no value"},
               {"--model= --prompt a", "--model: empty; expected DIR"},
               {"--data= --steps 1", "--data: empty; expected F,.."},
               {"words", "words: unexpected"},
               {"--steps 5 more", "more: unexpected"},
               {"--steps five", "--steps five: expected a whole number from 0"},
               {"--steps -1", "--steps -1"},
               {"--steps 1e3", "--steps 1e3"},
               {"--steps 1.5", "--steps 1.5"},
               {"--steps 99999999999999999999", "--steps 99999999999999999999"},
               {"--batch 0", "from 1 to 65536"},
               {"--seq 0", "--seq 0"},
               {"--seq 2000000", "--seq 2000000"},
               {"--threads 0", "--threads 0"},
               {"--accum 0", "--accum 0"},
               {"--lr -1", "--lr -1: expected a number from 0"},
               {"--lr nan", "--lr nan"},
               {"--lr inf", "--lr inf"},
               {"--lr 1e-3x", "--lr 1e-3x"},
               {"--beta1 1", "--beta1 1"},
               {"--beta2 -0.1", "--beta2"},
               {"--eps 0", "--eps 0"},
               {"--decay-frac 1.1", "--decay-frac"},
               {"--top-p 2", "--top-p 2"},
               {"--schedule linear", "expected one of wsd|cosine|constant"},
               {"--arch gpt2", "expected one of qwen3"},
               {"--aux-form both", "expected one of switch|hf"},
               {"--qk-norm yes", "expected one of none|head|row"},
               {"--router top", "softmax|sigmoid|lpr"},
               {"--precision fp16", "--precision fp16: expected one of fp32|bf16"},
               {"--norm-topk 2", "from 0 to 1"},
               {"--schedule ws", "--schedule ws"},
               {"--layers 513", "--layers 513"},
               {"--layers 0", "--layers 0"},
               {"--experts 70000", "--experts 70000"},
               {"--topk 0", "--topk 0"},
               {"--batch 65536 --seq 1048576", "--batch 65536: with --seq 1048576"},
               // a class and its switches
               {"--arch olmoe --dense", "--arch qwen3 or mixtral"},
               {"--arch mixtral --norm-topk 0", "--arch qwen3 or olmoe"},
               {"--arch mixtral --sparse-step 2", "--arch qwen3 fits"},
               {"--arch olmoe --sparse-step 2", "--arch qwen3 fits"},
               {"--arch mixtral --qk-norm head", "--arch qwen3 does"},
               {"--arch mixtral --qk-norm row", "--arch olmoe does"},
               {"--arch qwen3 --qk-norm none", "--arch mixtral does"},
               {"--arch olmoe --qk-norm head", "--arch qwen3 does"},
               {"--arch olmoe --head-dim 64", "--arch qwen3 is free in it"},
               {"--dense --topk 3", "--topk: a dense model has no experts"},
               {"--dense --experts 16", "contradict each other"},
               {"--experts 0 --expert-ffn 64", "--expert-ffn: a dense model"},
               {"--topk 9", "--topk 9: there are only 8"},
               {"--heads 3", "--hidden 128: no multiple of --heads 3"},
               {"--heads 4 --kv-heads 3", "no multiple"},
               {"--head-dim 7", "--head-dim 7: rotary positions need an even one"},
               {"--layers 2 --sparse-step 3", "leaves no sparse layer"},
               {"--heads 128 --hidden 128", "--head-dim 1: rotary"},
               {"--lpr-dim 4", "--router lpr"},
               {"--topk-range 3", "LO:HI"},
               {"--topk-range 2:9", "LO:HI"},
               {"--aux-adaptive --aux-form hf", "--aux-form switch"},
               // what belongs together
               {"--resume", "--resume wants --out"},
               {"--resume --out @/trained --model @/window", "was begun without one"},
               {"--router lpr --norm-topk 0", "always renormalises"},
               {"--data @/corpus.txt --vocab 300", "leave out --vocab"},
               {"--dense --logit-norm 1", "--logit-norm: a dense model"},
               {"--lpr-kl 0.5 --router sigmoid", "--lpr-kl: belongs to --router lpr"},
               {"--family-penalty 0.5", "--family-penalty: a new"},
               {"--data @/corpus.txt --family-penalty 1 --out @/new", "has no families"},
               {"--data @/corpus.txt --eval --prompt x --model @/trained", "only one of them"},
               {"--eval", "--eval wants --model"},
               {"--dump @/new", "--dump wants --model"},
               {"--prompt x", "--prompt wants --model"},
               {"--model @/trained --eval", "--eval wants --data"},
               {"--model @/trained --dump @/new", "--dump wants --data"},
               {"--load", "--load: goes with --eval"},
               {"--model @/trained --layers 3 --data @/corpus.txt", "--layers 3: the model in"},
               {"--model @/trained --sparse-step 2 --data @/corpus.txt", "--sparse-step 2: other layers of the model"},
               {"--model @/trained --topk 1 --data @/corpus.txt", "--topk 1: the model in"},
               {"--model @/absent --data @/corpus.txt", "@/absent/config.json: No such file"},
               {"--out @/trained --data @/corpus.txt", "--resume goes on with that run"},
               {"--out @/trained --resume --hidden 8 --dense", "--hidden 8: the model in"},
               {"--out @/bare --data @/corpus.txt", "but no run; to train this model give it as --model"},
               {"--out @/bare --resume", "but no run; to train this model give it as --model"},
               {"--model @/trained --eval --data @/corpus.txt --val @/corpus.txt", "--val belongs to training"},
               {"--model @/trained --eval --data @/corpus.txt --lr 1", "--lr belongs to training"},
               {"--model @/trained --prompt x --out @/new", "--out belongs to training"},
               {"--lr 1e-3 --min-lr 2e-3", "must not be above --lr, 0.001"},
               {"--schedule cosine --decay-frac 0.2", "--decay-frac: belongs to --schedule wsd"},
               {"--schedule constant --min-lr 1e-4", "--min-lr: --schedule constant has no decay"},
               {"--dense --aux 0.1", "--aux: a dense model has no experts and no router"},
               {"--dense --topk-range 1:2", "--topk-range: a dense model has no experts"},
               {"--bias-rate 0.1", "only the router sigmoid has a bias"},
               {"--ffn 96", "--expert-ffn is the width of an expert"},
               {"--out @/corpus.txt --data @/corpus.txt --steps 1", "Not a directory"},
               {"--out @/corpus.txt/x --data @/corpus.txt --steps 1", "Not a directory"},
               {"--model @/trained --data @/corpus.txt --eval --topk 6", "--topk 6: the model has 5"},
               {"--model @/trained --data @/absent --eval", "No such file"},
               {"--model @/trained --data @/corpus.txt --eval --seq 100000", "needs at least"},
               {"--model @/trained --data @/corpus.txt --batch 999 --seq 24 --dump @/new", "has only 833 windows"},
               {"--model @/trained --data @/corpus.txt --seq 24 --dump @/absent/dump", "absent/dump.saving: No such"},
               {"--model @/trained --data @/corpus.txt --seq 24 --dump @/trained", "is a directory; give the name of"},
               {"--model @/trained --data @/corpus.txt --eval --seq 24 --trace @/trained", "is a directory"},
               {"--model @/trained --prompt-ids 1,x", "found x"},
               {"--model @/trained --prompt-ids 256", "numbers from 0 to 255"},
               {"--model @/trained --prompt-ids -1", "numbers from 0 to 255"},
               {"--model @/trained --prompt-ids ,", "found ,"},
               {"--model dev/reference/golden/llama --prompt x", "too few for bytes"},
               {"--model dev/reference/golden/llama --data @/corpus.txt --eval", "does not read bytes"},
               {"--model @/window --data @/corpus.txt --eval --seq 128", "sliding_window 64"},
               {"--model @/window --data @/corpus.txt --seq 128", "sliding_window 64"},
               {"--model @/window --prompt a --tokens 200", "sliding_window 64"},
               {"--model @/dynamic --data @/corpus.txt --eval --seq 128", "up to max_position_embeddings, 100;"},
               {"--model @/words --prompt x", "its model has no vocab and merges"},
               {"--model @/words --data @/corpus.txt --eval --seq 8", "encode the text with"}};
    for (EACH(i, bad)) {
        // the models and files above are named with @, the expected text as well
        const char* expected = bad[i].expected[0] == '@' ? bad[i].expected + 1 : bad[i].expected;
        char with_out[600];
        int writes = !strstr(bad[i].arguments, "--out") && !strstr(bad[i].arguments, "--resume") &&
                     !strstr(bad[i].arguments, "--dump") && !strstr(bad[i].arguments, "--eval") &&
                     !strstr(bad[i].arguments, "--prompt");
        snprintf(with_out, sizeof with_out, "%s%s", writes ? "--out @/new " : "", bad[i].arguments);
        check_refused(2, with_out, expected);
    }
}

// Options that say what is so already, or switch off what is not there: one line for every arm, one for the start of a
// job and its going on.
static void test_agreement(void) {
    static const char* lines[] = {
        "--dense --aux 0.01 --z-loss 0 --logit-norm 0 --bias-rate 0 --family-penalty 0 --family-steps 9 --topk 1 "
        "--norm-topk 0 --router softmax --experts 0 --topk-range 1:1 --aux-form hf --lpr-weight 0 --lpr-diversity 0 "
        "--lpr-kl 0 --lpr-align 0 --lpr-dim 16 --lpr-align-form sum --sparse-step 1 --ffn 48 --qk-norm head "
        "--vocab 256 --tie --kv-heads 2",
        "--experts 5 --topk 2 --expert-ffn 24 --bias-rate 0.001 --family-penalty 0 --lpr-kl 0 --lpr-align-form sum "
        "--router softmax --logit-norm 0.5 --sparse-step 2 --ffn 32 --norm-topk 0 --head-dim 12 --arch qwen3",
        "--experts 4 --router lpr --lpr-dim 8 --lpr-weight 0.1 --lpr-diversity 0.7 --lpr-kl 0.3 --lpr-align 0.2 "
        "--lpr-align-form mean --logit-norm 0 --bias-rate 0",
        "--experts 4 --arch mixtral --router sigmoid --bias-rate 0.01 --norm-topk 1 --qk-norm none",
        "--dense --topk 2 --aux 0", "--experts 4 --router sigmoid --bias-rule quantile --bias-rate 0"};
    for (size_t i = 0; i < sizeof lines / sizeof lines[0]; i++) {
        char run[1024];
        snprintf(run, sizeof run, "--data %s %s %s", temp("corpus.txt"), small_run, lines[i]);
        remove_tree(temp("job"));
        int code = run_program("%s --steps 1 --out %s --resume", run, temp("job"));
        check(code == 0 && error_lines() == 1 && strstr(ran.err, "so this begins one"), "%.60s: --resume begins a run",
              lines[i]);
        show_failure(code == 0);
        code = run_program("%s --steps 2 --out %s --resume", run, temp("job"));
        check(code == 0 && error_lines() == 0 && saved_step("job") == 2, "the same line goes on");
        show_failure(code == 0);
        code = run_program("%s --steps 1 --model %s", run, temp("job"));
        check(code == 0, "and fits the model that it made");
        show_failure(code == 0);
    }
    for (int i = 1; i <= 2; i++) {
        int code = run_program("--model %s --data %s --seq 24 --batch 2 --steps %d --out %s --resume", temp("trained"),
                               temp("corpus.txt"), i, temp("tuned"));
        check(code == 0 && saved_step("tuned") == i, "--model and --resume in one line, time %d", i);
        show_failure(code == 0);
    }
    int code = run_program("--model %s --eval --data %s --seq 24 --val none --save-every 0 --steps 1000",
                           temp("trained"), temp("corpus.txt"));
    check(code == 0, "--eval with options of training that ask for nothing");
    show_failure(code == 0);
}

static void test_help(void) {
    int code = run_program("--help");
    int all = 1;
    for (int i = 0; i < NUM_OPTIONS; i++) all &= strstr(ran.out, option_table[i].name) != NULL;
    check(code == 0 && all && !*ran.err, "--help: exit code 0, lists every option on stdout");
    code = run_program("--version");
    check(code == 0 && !*ran.err && strstr(ran.out, VERSION), "--version: %s", ran.out);
    code = run_program("--steps nonsense --help");
    check(code == 2, "an error before --help is an error");
}

// Output that cannot be written is a failure and takes nothing else with it; that nobody reads it is none.
static void test_full_output(void) {
    static const char* runs[] = {"--as-train-moe --help", "--as-train-moe --version",
                                 "--as-train-moe --model trained --prompt ab",
                                 "--as-train-moe --model trained --data corpus.txt --eval --seq 24",
                                 "--as-train-moe --data corpus.txt --steps 3 --layers 1 --hidden 16 --out full",
                                 "--as-upcycle --help", "--as-upcycle --methods", "--as-upcycle --inspect trained",
                                 "--as-upcycle trained full_up --experts 7"};
    static const char said[] = ": standard output: No space left on device";
    char command[PATH_SIZE * 3];
    for (int i = 0; i < (int)(sizeof runs / sizeof runs[0]); i++) {
        snprintf(command, sizeof command, "cd %s; rm -rf full full_up; (sleep 0.05; %s %s 2>stderr) | true", temp_dir,
                 self_path, runs[i]);
        int code = system(command);
        read_output("stderr", ran.err, sizeof ran.err);
        check(code == 0 && !strstr(ran.err, "standard output"), "%s: nobody reads what it prints", runs[i]);
        if (!exists("/dev/full")) continue;         // only Linux has it
        snprintf(command, sizeof command, "cd %s; rm -rf full full_up; %s %s 2>stderr >/dev/full", temp_dir, self_path,
                 runs[i]);
        code = system(command);
        read_output("stderr", ran.err, sizeof ran.err);
        const char* line = strstr(ran.err, said);
        int saved = !strstr(runs[i], "--out") || saved_step("full") == 3;
        if (strstr(runs[i], "full_up")) saved = exists(temp("full_up/config.json"));
        check(code >> 8 == 1 && line && strlen(line) == strlen(said) && saved, "%s: a disk is full%s", runs[i], said);
        if (!line) printf("       exit code %d, stderr: %s\n", code >> 8, ran.err);
        snprintf(command, sizeof command, "cd %s; rm -rf full full_up; %s %s 2>/dev/null >&-", temp_dir, self_path,
                 runs[i]);
        check(system(command) == 0, "%s: an output that is closed is none", runs[i]);
    }
}

static void test_not_finite(void) {
    // a norm so large that the next layer's squares overflow
    remove_tree(temp("b"));
    copy_directory(temp("trained"), temp("b"));
    Error error = {""};
    Model* m = try_load(temp("b"), &error);
    for (int l = 0; l < m->config.num_layers; l++)
        for (int i = 0; i < m->config.hidden_size; i++)
            m->weights.layers[l].attn_norm[i] = m->weights.layers[l].ffn_norm[i] = 3e38f;
    Pieces p = pieces_read(temp("b"));
    for (int i = 0; i < m->layout.count; i++)
        memcpy(piece_find(&p, m->layout.tensors[i].name)->values, m->params + m->layout.tensors[i].offset,
               floats_bytes(tensor_size(&m->layout.tensors[i])));
    pieces_write(&p, temp("b/model.safetensors"), 0);
    copy_directory(temp("b"), temp("c"));
    int code = run_program("--out %s --resume --steps 9", temp("b"));
    check(code == 1 && error_lines() == 1 &&
              strstr(ran.err, "step 5: the loss is not finite; the checkpoint of step 4 in"),
          "a loss that is not finite: %s", ran.err);
    show_failure(code == 1);
    check(same_checkpoint("b", "c"), "the checkpoint is as it was");
    code = run_program("--model %s --data %s --seq 24 --steps 2 --out %s", temp("c"), temp("corpus.txt"), temp("new"));
    check(code == 1 && strstr(ran.err, "step 1: the loss is not finite; nothing had been saved"),
          "the same in a first step: %s", ran.err);
    check(!exists(temp("new/model.safetensors")), "nothing is saved");
    remove_tree(temp("new"));
    code = train_run("b", "--steps 400 --lr 1000000 --clip 0 --weight-decay 1000 --save-every 1 --schedule constant");
    check(code == 1 && error_lines() == 1 && strstr(ran.err, "is not finite") && saved_step("b") > 0,
          "a learning rate of 10^6: %s", strstr(ran.err, "train_moe:") ? strstr(ran.err, "train_moe:") : "");
    m = try_load(temp("b"), &error);
    check(m != NULL, "its last checkpoint can be loaded");
}

// --eval against evaluate(), which is checked against model_forward here
static void test_eval(void) {
    int T = 24, B = 3, tokens[24], targets[24];
    char expected[100];
    Dataset* d = dataset_open(temp("corpus.txt"), T, 256, WHOLE, BYTES);
    Model *batch_model = open_model(temp("trained"), FOR_SCORING, B, T),
          *m = open_model(temp("trained"), FOR_SCORING, 1, T);
    double sum = 0;
    for (long w = 0; w < d->windows; w++) {
        dataset_window(d, w, tokens, targets);
        sum += model_forward(m, tokens, targets, 1, T);
    }
    double loss = sum / (double)d->windows;
    snprintf(expected, sizeof expected, "loss %.5f", loss);
    int code = run_program("--model %s --data %s --eval --seq 24 --batch 3", temp("trained"), temp("corpus.txt"));
    check(code == 0 && strstr(ran.out, expected), "--eval prints the mean over all windows, %s", expected);
    double printed = 0, perplexity = 0, bits = 0;
    const char* line = strstr(ran.out, "loss ");
    int found =
        line && sscanf(line, "loss %lf | perplexity %lf | bits per byte %lf", &printed, &perplexity, &bits) == 3;
    check(found && fabs(printed - loss) < 2e-6 && fabs(perplexity / exp(loss) - 1) < 1e-4 &&
              fabs(bits - loss / log(2)) < 1e-4,
          "--eval prints perplexity %.4f and %.4f bits per byte", perplexity, bits);
    Batch batch = batch_create(B, T);
    check(fabs(evaluate(batch_model, d, 0, batch) - loss) < 1e-9,
          "evaluate: all windows, also a last batch that is not full");
    sum = 0;
    for (long w = 0; w < 6; w++) {
        dataset_window(d, w, tokens, targets);
        sum += model_forward(m, tokens, targets, 1, T);
    }
    check(fabs(evaluate(batch_model, d, 2, batch) - sum / 6) < 1e-9, "evaluate: the first two batches");
    free(batch.tokens);
    dataset_close(d);
}

static int tensor_is(SafeTensors* s, const char* name, Dtype dtype, int ndim, long a, long b, long c) {
    StoredTensor* t = safetensors_find(s, name);
    return t && t->dtype == dtype && t->ndim == ndim && t->shape[0] == a && (ndim < 2 || t->shape[1] == b) &&
           (ndim < 3 || t->shape[2] == c);
}

static int floats_are(SafeTensors* s, const char* name, const float* expected, long n) {
    long count = 0;
    float* values = reference_floats(s, name, &count);
    return count == n && same_floats(values, expected, n);
}

static void test_dump(void) {
    int B = 2, T = 16, L = 2, K = 2, V = 256;
    int code = run_program("--model %s --data %s --batch 2 --seq 16 --aux 0.03 --dump %s", temp("trained"),
                           temp("corpus.txt"), temp("d.safetensors"));
    Error error = {""};
    SafeTensors* s = keep_file(safetensors_open(temp("d.safetensors"), &error));
    check(code == 0 && s, "--dump writes a file %s", error.text);
    if (!s) return;
    Model* m = open_model(temp("trained"), FOR_TRAINING, B, T);
    Dataset* d = dataset_open(temp("corpus.txt"), T, V, WHOLE, BYTES);
    Batch batch = batch_create(B, T);
    for (int b = 0; b < B; b++) dataset_window(d, b, batch.tokens + b * T, batch.targets + b * T);
    int *tokens = reference_ints(s, "tokens", NULL), *targets = reference_ints(s, "targets", NULL);
    check(tensor_is(s, "tokens", DTYPE_I32, 2, B, T, 0) &&
              !memcmp(tokens, batch.tokens, sizeof(int) * (size_t)(B * T)) &&
              tensor_is(s, "targets", DTYPE_I32, 2, B, T, 0) &&
              !memcmp(targets, batch.targets, sizeof(int) * (size_t)(B * T)),
          "--dump: tokens and targets are the file's first windows");
    m->balance.aux = 0.03f;
    model_forward(m, batch.tokens, batch.targets, B, T);
    float loss = (float)m->loss, aux = (float)m->aux_loss;
    check(tensor_is(s, "logits", DTYPE_F32, 3, B, T, V) && floats_are(s, "logits", m->logits, (long)B * T * V),
          "--dump: logits have the bits of a direct call");
    check(tensor_is(s, "loss", DTYPE_F32, 1, 1, 0, 0) && floats_are(s, "loss", &loss, 1) &&
              tensor_is(s, "aux_loss", DTYPE_F32, 1, 1, 0, 0) && floats_are(s, "aux_loss", &aux, 1) && aux > 0,
          "--dump: loss and aux loss");
    int routers = 1, gradients = 1, expected_count = 5 + L + m->layout.count;
    for (int l = 0; l < L; l++) {
        char name[32];
        snprintf(name, sizeof name, "router.%d", l);
        int* experts = reference_ints(s, name, NULL);
        routers &= tensor_is(s, name, DTYPE_I32, 2, B * T, K, 0) &&
                   !memcmp(experts, m->layers[l].experts, sizeof(int) * (size_t)(B * T * K));
    }
    check(routers, "--dump: the experts of every sparse layer");
    model_backward(m, 1);
    for (int i = 0; i < m->layout.count; i++) {
        const Tensor* t = &m->layout.tensors[i];
        char name[160];
        snprintf(name, sizeof name, "grad.%s", t->name);
        gradients &= tensor_is(s, name, DTYPE_F32, tensor_is_matrix(t) ? 2 : 1, t->rows, t->cols, 0) &&
                     floats_are(s, name, m->grads + t->offset, tensor_size(t));
    }
    check(gradients && s->num_tensors == expected_count,
          "--dump: every gradient, under the name of its tensor, and nothing else");
    free(batch.tokens);
    dataset_close(d);
}

// --trace and --load against forward passes of one window at a time, with another K than the model's
static void test_trace(void) {
    enum { T = 24, K = 3 };
    int code = run_program("--model %s --data %s --eval --seq %d --batch 3 --topk %d --load --trace %s",
                           temp("trained"), temp("corpus.txt"), T, K, temp("trace.csv"));
    Config config;
    Error error = {""};
    if (!config_read(&config, temp("trained"), &error)) die(1, "%s", error.text);
    config.num_experts_per_tok = K;
    Model* m = new_model(&config, FOR_SCORING, 1, T);
    if (!checkpoint_load(m, temp("trained"), &error)) die(1, "%s", error.text);
    const Config* c = &config;
    Dataset* d = dataset_open(temp("corpus.txt"), T, c->vocab_size, WHOLE, BYTES);
    FILE* f = fopen(temp("trace.csv"), "r");
    char line[512] = "";
    int *experts = kept_ints(c->num_layers * T * K), same = 1, tokens[T], targets[T];
    float* gates = kept_floats(c->num_layers * T * K);
    long rows = 0, load[64] = {0};
    check(code == 0 && f && fgets(line, sizeof line, f) &&
              !strcmp(line, "window,position,token,layer,expert_1,expert_2,expert_3,gate_1,gate_2,gate_3\n"),
          "--trace: the header %.40s ...", line);
    // rows come batch by batch, in a batch layer by layer; a layer's activations are overwritten by the next one's, so
    // each layer is scored by a model that ends with it
    for (long window = 0; f && window < 6; window++) {
        for (int l = 0; l < c->num_layers; l++) {
            m->config.num_layers = l + 1;
            dataset_window(d, window, tokens, targets);
            model_forward(m, tokens, targets, 1, T);
            memcpy(experts + (long)l * T * K, m->layers[l].experts, sizeof(int) * T * K);
            memcpy(gates + (long)l * T * K, m->layers[l].gates, sizeof(float) * T * K);
        }
        rewind(f);
        long w, position, token, layer, e[K], found = 0;
        double g[K];
        while (fgets(line, sizeof line, f))
            if (sscanf(line, "%ld,%ld,%ld,%ld,%ld,%ld,%ld,%lf,%lf,%lf", &w, &position, &token, &layer, &e[0], &e[1],
                       &e[2], &g[0], &g[1], &g[2]) == 10 &&
                w == window) {
                const int* chosen = experts + (layer * T + position) * K;
                same &= token == tokens[position];
                for (int k = 0; k < K; k++)
                    same &= e[k] == chosen[k] && fabs(g[k] - gates[(layer * T + position) * K + k]) < 1e-5;
                found++;
            }
        same &= found == (long)T * c->num_layers;
        rows += found;
    }
    check(same && rows == 6L * T * c->num_layers, "--trace: tokens, experts and gates of %ld rows", rows);
    // the load that --load prints for layer 0 is the number of times each expert stands in the trace
    if (f) rewind(f);
    while (f && fgets(line, sizeof line, f)) {
        long layer, e[K];
        if (sscanf(line, "%*d,%*d,%*d,%ld,%ld,%ld,%ld", &layer, &e[0], &e[1], &e[2]) == 4 && layer == 0)
            for (int k = 0; k < K; k++) load[e[k]]++;
    }
    Text expected = {NULL, 0, 0};
    text_print(&expected, ", load");
    for (int e = 0; e < c->num_experts; e++) text_print(&expected, " %ld", load[e]);
    check(strstr(ran.out, expected.data) != NULL, "--load prints what the trace counts:%s", expected.data);
    free(expected.data);
    if (f) fclose(f);
    dataset_close(d);
}

// What --trace and --dump write takes its place when it is whole, and is never what is read.
static void test_results(void) {
    static const char* over[] = {"--eval --trace @/mine", "--eval --trace @/mine.link",
                                 "--eval --trace @/trained/config.json", "--dump @/mine",
                                 "--dump @/trained/model.safetensors"};
    char arguments[512], command[PATH_SIZE * 3];
    copy_file(temp("corpus.txt"), temp("mine"));
    copy_file(temp("corpus.txt"), temp("other.saving"));
    if (symlink("mine", temp("mine.link")) || symlink("traced.csv", temp("traced.link")))
        die(1, "%s: %s", temp_dir, strerror(errno));
    for (EACH(i, over)) {
        snprintf(arguments, sizeof arguments, "--model @/trained --data @/mine --seq 24 %s", over[i]);
        check_refused(2, arguments, "which is read; choose another name");
    }
    check_refused(2, "--model @/trained --data @/other.saving --seq 24 --eval --trace @/other", "which is read");
    check(same_file(temp("mine"), temp("corpus.txt")) && same_file(temp("other.saving"), temp("corpus.txt")) &&
              !exists(temp("mine.saving")), "the data are as they were");
    // token 256 is beyond the vocabulary, and comes late
    write_shard(temp("late.bin"), SHARD_MAGIC_16, 1, 300, 2, 300, 0);
    write_text(temp("traced.csv"), "old");
    int code = run_program("--model %s --data %s --eval --seq 8 --batch 1 --trace %s", temp("trained"),
                           temp("late.bin"), temp("traced.csv"));
    check(code == 2 && count_lines(temp("traced.csv")) == 0 && !exists(temp("traced.csv.saving")),
          "a trace that stops half-way leaves the old one: %s", ran.err);
    code = run_program("--model %s --data %s --eval --seq 24 --val-batches 1 --trace %s", temp("trained"), temp("mine"),
                       temp("traced.link"));
    struct stat st;
    check(code == 0 && count_lines(temp("traced.csv")) > 1 && !lstat(temp("traced.link"), &st) && S_ISLNK(st.st_mode),
          "a trace through a link");
    snprintf(command, sizeof command, "cd %s; %s --as-train-moe --model trained --data mine --eval --seq 24 "
             "--val-batches 1 --trace /dev/fd/3 3>&1 >/dev/null | cat >piped.csv", temp_dir, self_path);
    check(system(command) == 0 && same_file(temp("traced.csv"), temp("piped.csv")), "a trace into a pipe");
}

static void test_command_line(void) {
    write_corpus(temp("corpus.txt"), 20000);
    check(train_run("trained", "--steps 4 --save-every 2") == 0, "a model to work with");
    show_failure(ran.code == 0);
    mkdir(temp("empty"), 0777);
    // the same model as a Mistral would have it, with a window; and one with a tokenizer
    remove_tree(temp("window"));
    check(train_run("window", "--steps 1 --dense --arch mixtral --seq 16") == 0, "a dense model");
    Error error = {""};
    Config c;
    Text t = {NULL, 0, 0};
    if (config_read(&c, temp("window"), &error)) {
        c.arch = MISTRAL;
        c.max_position_embeddings = 1000;
        Json* k = luggage_new(MISTRAL, NULL);
        json_set_raw(k, "sliding_window", "64");
        config_to_json(&t, &c, k, "float32");
        write_text(temp("window/config.json"), t.data);
        check(mkdir(temp("bare"), 0777) == 0, "a directory with nothing but a config.json");
        write_text(temp("bare/config.json"), t.data);
        copy_directory(temp("window"), temp("dynamic"));
        static const char stretched[] = "{\"sliding_window\": null, \"rope_scaling\": "
                                        "{\"type\": \"dynamic\", \"factor\": 2.0}}";
        json_free(k);
        k = json_parse(stretched, strlen(stretched), &error);
        c.max_position_embeddings = 100;
        c.rope.type = ROPE_DYNAMIC;
        t.length = 0;
        config_to_json(&t, &c, k, "float32");
        write_text(temp("dynamic/config.json"), t.data);
        json_free(k);
        free(t.data);
    }
    copy_directory(temp("trained"), temp("words"));
    write_text(temp("words/tokenizer.json"),
               "{\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": {\"vocab\": {\"a\": 0}}}");
    test_help();
    test_full_output();
    test_bad_commands();
    test_agreement();
    char arguments[1024];
    test_eval();
    test_trace();
    test_results();
    test_dump();
    test_not_finite();
    int code =
        run_program("--model %s --data %s --seq 24 --steps 1 --out %s", temp("words"), temp("corpus.txt"), temp("new"));
    check(code == 2 && !exists(temp("new")), "text for a model with a tokenizer is refused in training");
    write_shard(temp("ids.bin"), SHARD_MAGIC_16, 1, 200, 2, 200, 0);
    code = run_program("--model %s --data %s --seq 24 --steps 1 --out %s", temp("words"), temp("ids.bin"), temp("new"));
    check(code == 0 && same_in("words", "new", "tokenizer.json"), "the tokenizer travels to the output");
    show_failure(code == 0);
    // tokens that nobody can name are not taken for bytes
    write_shard(temp("ids.bin"), SHARD_MAGIC_16, 1, 290, 2, 290, 0);
    snprintf(arguments, sizeof arguments, "%s --vocab 300 --data %s --steps 1 --out %s", small_run, temp("ids.bin"),
             temp("bpe"));
    check(run_program("%s", arguments) == 0, "a model trained on token shards");
    snprintf(arguments, sizeof arguments, "--model %s --data %s --seq 24 --eval", temp("bpe"), temp("corpus.txt"));
    check(run_program("%s", arguments) == 2 && strstr(ran.err, "does not read bytes"), "text is refused there: %s",
          ran.err);
    code = run_program("--model %s --prompt x", temp("bpe"));
    check(code == 2 && strstr(ran.err, "this model reads tokens"), "and so is a prompt: %s", ran.err);
    // an upcycle passes on what was told
    char command[5 * PATH_SIZE];
    snprintf(command, sizeof command, "%s --as-upcycle %s %s --experts 12 > /dev/null", self_path, temp("bpe"),
             temp("bpe12"));
    check(system(command) == 0, "an upcycle of the model whose tokens are no bytes");
    check(run_program("--model %s --data %s --seq 24 --eval", temp("bpe12"), temp("corpus.txt")) == 2 &&
              strstr(ran.err, "does not read bytes"),
          "text is refused there, too: %s", ran.err);
    unlink(temp("bpe/trainer.json"));
    snprintf(arguments, sizeof arguments, "--model %s --data %s --seq 24 --eval", temp("bpe"), temp("corpus.txt"));
    check(run_program("%s", arguments) == 0 && strstr(ran.err, "is read as bytes, but nothing says"),
          "with nothing to tell, text is read as bytes and the program says so: %s", ran.err);
    code = run_program("--model %s --data %s --seq 24 --eval", temp("trained"), temp("corpus.txt"));
    check(code == 0 && !strstr(ran.err, "warning"), "256 tokens are bytes");
    code = run_program("--model %s --data %s --seq 24 --eval", temp("bpe"), temp("ids.bin"));
    check(code == 0 && !strstr(ran.err, "warning"), "and nothing is said of bytes where token shards are read");
    // a run of no steps saves what it starts from
    check(train_run("none", "--steps 0") == 0 && saved_step("none") == 0 && strstr(ran.out, "as it starts"),
          "--steps 0 saves the model as it starts");
    char small[512]; // without --warmup, which follows from the number of steps
    snprintf(small, sizeof small, "--data %s --layers 1 --hidden 16 --experts 3 --seq 16 --batch 2",
             temp("corpus.txt"));
    check(run_program("%s --steps 40 --out %s", small, temp("once")) == 0 &&
              run_program("%s --steps 0 --out %s", small, temp("twice")) == 0 &&
              resume_run("twice", "--steps 40") == 0 && same_in("once", "twice", "model.safetensors"),
          "and a run that goes on from there is one that started there");
    show_failure(ran.code == 0);
    check(resume_run("twice", "--steps 0") == 0 && saved_step("twice") == 40, "which --steps 0 does not undo");
    // bytes stay bytes when training goes on with shards of them
    write_shard(temp("as_ids.bin"), SHARD_MAGIC_16, 1, 200, 2, 200, 0);
    run_program("--model %s --data %s --seq 24 --batch 2 --steps 1 --out %s", temp("trained"), temp("as_ids.bin"),
                temp("still"));
    check(run_program("--model %s --data %s --seq 24 --eval", temp("still"), temp("corpus.txt")) == 0,
          "256 tokens are bytes, whatever the last data were: %s", ran.err);
    // a text model of more tokens stays one, too
    run_program("--model %s --data %s --seq 24 --steps 1 --out %s", temp("bpe"), temp("corpus.txt"), temp("spare"));
    run_program("--model %s --data %s --seq 16 --batch 2 --steps 1 --out %s", temp("spare"), temp("ids.bin"),
                temp("spare2"));
    code = run_program("--model %s --data %s --seq 16 --eval", temp("spare2"), temp("corpus.txt"));
    check(code == 0 && !strstr(ran.err, "warning"), "a text model that went on with shards reads bytes: %s", ran.err);
    // copies of one FFN are always chosen together, which says nothing; those of several experts are not
    for (int dense = 0; dense < 2; dense++) {
        const char *from = temp(dense ? "flat" : "once"), *to = temp(dense ? "flat_up" : "once_up");
        if (dense) run_program("%s --experts 0 --steps 1 --out %s", small, from);
        snprintf(command, sizeof command, "%s --as-upcycle %s %s --experts 6 > /dev/null", self_path, from, to);
        check(system(command) == 0, "an upcycle of %s", dense ? "a dense model" : "a mixture");
        code = run_program("--model %s --data %s --seq 16 --batch 2 --steps 1", to, temp("corpus.txt"));
        check(code == 0 && strstr(ran.out, "twins' cosine") && (strstr(ran.out, "chosen together") == NULL) == dense &&
                  (strstr(ran.out, "sources/token: different originals") == NULL) == dense,
              "twins chosen together: %s", dense ? "not said of copies of one FFN" : "said of copies of experts");
    }
    snprintf(command, sizeof command, "%s --as-train-moe %s --steps 3 --out %s 2>/dev/null | head -n 1 > %s", self_path,
             small, temp("piped"), temp("piped.txt"));
    check(system(command) == 0 && saved_step("piped") == 3, "a pipe that is closed early does not stop a run");
    code = run_program("--model %s --prompt-ids 97,98 --tokens 5 --temperature 0", temp("trained"));
    check(code == 0 && strlen(ran.out) >= 6 && !strncmp(ran.out, "ab", 2),
          "--prompt-ids prints the prompt and goes on");
    remove_tree(temp("new"));
    code = run_program("--data %s --steps 2 --layers 1 --hidden 16 --seq 16", temp("corpus.txt"));
    check(code == 0 && strstr(ran.out, "nothing will be saved"),
          "without --out nothing is written, and the program says so");
}
