/*
texts.c: new models with the tokenizer of --tokenizer: what they take of it and take along, what is refused, that a run
keeps to it; and prompts from standard input.
*/
#define CASE_TEXT "dev/tokenizer/cases/text.txt"
#define TINY "--layers 1 --hidden 32 --experts 2 --batch 1 --seq 16 --val none --warmup 0 --schedule constant"
#define IN(...) temp("texts/" __VA_ARGS__)
static const char* tokenizer_files[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                        "chat_template.jinja", "LICENSE"};

// A folder with a tokenizer as Hugging Face's have it, and what does not belong to one.
static void make_folder(const char* name, const char* kind) {
    char path[PATH_SIZE], json[PATH_SIZE];
    snprintf(path, sizeof path, "%s", IN("%s", name));
    mkdir(path, 0777);
    snprintf(json, sizeof json, "dev/tokenizer/cases/%s/tokenizer.json", kind);
    copy_file(json, IN("%s/tokenizer.json", name));
    write_text(IN("%s/tokenizer_config.json", name),
               "{\"tokenizer_class\": \"PreTrainedTokenizerFast\", \"bos_token\": \"<s>\", \"eos_token\": "
               "{\"content\": \"</s>\", \"lstrip\": false}}");
    write_text(IN("%s/special_tokens_map.json", name), "{\"eos_token\": \"<s>\", \"pad_token\": \"<unk>\"}");
    write_text(IN("%s/chat_template.jinja", name), "{{ messages }}");
    write_text(IN("%s/LICENSE", name), "a licence");
    write_text(IN("%s/upcycle.json", name), "{}");
    write_text(IN("%s/notes.txt", name), "mine");
}

static int has_member(const char* path, const char* key, const char* raw) {
    Error error = {""};
    const char* found = json_raw(keep_json(json_read(path, &error)), key);
    if (!found || strcmp(found, raw)) printf("       %s is %s, not %s\n", key, found ? found : "not there", raw);
    return found && !strcmp(found, raw);
}

static int same_files(const char* a, const char* b, const char* const* names, int count) {
    int same = 1;
    for (int i = 0; i < count; i++) {
        char x[PATH_SIZE], y[PATH_SIZE];
        int equal = same_file(join_path(x, IN("%s", a), names[i]), join_path(y, IN("%s", b), names[i]));
        if (!equal) printf("       %s is another\n", names[i]);
        same &= equal;
    }
    return same;
}

// 200 tokens beside a tokenizer.json of bytes
static void test_small_vocabulary(void) {
    int tokens[200];
    for (int i = 0; i < 200; i++) tokens[i] = i % 100;
    up_begin();
    up_make_shard("small.bin", tokens, 200);
    write_text(temp("ascii.txt"), "Nothing but letters below 128, several times over. Nothing but letters.");
    int code = run_program("--data " CASE_TEXT " " TINY " --steps 1 --out %s", IN("byte-run")) +
               run_program("--data %s --vocab 200 " TINY " --steps 1 --out %s", up_path("small.bin"), IN("small200"));
    rename(IN("byte-run/tokenizer.json"), IN("small200/tokenizer.json"));
    code += run_program("--model %s --data %s --eval --seq 16", IN("small200"), temp("ascii.txt"));
    double loss = 0, perplexity, bits = 0;
    const char* line = strstr(ran.out, "\nloss ");
    if (line) sscanf(line, "\nloss %lf | perplexity %lf | bits per byte %lf", &loss, &perplexity, &bits);
    check(code == 0 && loss > 0 && fabs(bits - loss / M_LN2) < 1e-3,
          "--eval with a vocabulary that is smaller than its tokenizer: %.4f nats, %.4f bits", loss, bits);
}

static void test_new_tokenizer(void) {
    make_folder("tok", "spm");
    int code = run_program("--tokenizer %s --data " CASE_TEXT " " TINY " --steps 4 --sample-every 2 --tokens 12 "
                           "--out %s", IN("tok"), IN("new"));
    const char* sample = strstr(ran.out, "a sample:\n");
    check(code == 0 && strstr(ran.out, "vocabulary 420,") && sample, "a new model with a tokenizer");
    check(sample && strstr(sample + 1, "a sample:\n"), "the last step has a sample if it is due");
    check(sample && strspn(sample + strlen("a sample:\n"), "0123456789 \n") < 12, "its samples are text");
    check(has_member(IN("new/config.json"), "vocab_size", "420") &&
              has_member(IN("new/config.json"), "bos_token_id", "1") &&
              has_member(IN("new/config.json"), "eos_token_id", "2") &&
              has_member(IN("new/config.json"), "pad_token_id", "0"), "config.json has its special tokens");
    check(has_member(IN("new/generation_config.json"), "eos_token_id", "2") &&
              has_member(IN("new/generation_config.json"), "max_new_tokens", "256"), "so has generation_config.json");
    check(same_files("tok", "new", tokenizer_files, 5) && !exists(IN("new/notes.txt")) &&
              !exists(IN("new/upcycle.json")), "its files go along, and no others");
    code = run_program("--model %s --data " CASE_TEXT " --eval", IN("new"));
    check(code == 0 && strstr(ran.out, "bits per byte"), "--eval of a text");
    code = run_program("--model %s --prompt the --tokens 8", IN("new"));
    check(code == 0 && !strncmp(ran.out, "the", 3), "--prompt with a text");
    // a model that does not move, so that its sample in training is that of what was saved
    code = run_program("--tokenizer %s --data " CASE_TEXT " " TINY " --lr 0 --steps 2 --sample-every 1 --tokens 12 "
                       "--temperature 0 --out %s", IN("tok"), IN("still"));
    char in_training[1024] = "";
    sample = strstr(ran.out, "a sample:\n");
    snprintf(in_training, sizeof in_training, "%.1000s", sample ? sample + strlen("a sample:\n") : "");
    code |= run_program("--model %s --tokens 12 --temperature 0", IN("still"));
    check(code == 0 && *ran.out && !strncmp(in_training, ran.out, strlen(ran.out)),
          "a sample in training goes on from the begin of a text");
    // stopped after two steps, and gone on
    static const char* saved[] = {"model.safetensors", "trainer/optimizer.safetensors", "config.json",
                                  "generation_config.json", "tokenizer_config.json", "tokenizer.json"};
    const char* go_on = "%s %s --data " CASE_TEXT " " TINY " --steps %d --sample-every 2 --tokens 12 --out %s";
    code = run_program(go_on, "--tokenizer", IN("tok"), 2, IN("halves"));
    code |= run_program(go_on, "--resume --tokenizer", IN("tok"), 4, IN("halves"));
    Error error = {""};
    const char* hash = json_raw(keep_json(json_read(IN("new/trainer.json"), &error)), "tokenizer");
    check(code == 0 && same_files("new", "halves", saved, 6) && hash &&
              has_member(IN("halves/trainer.json"), "tokenizer", hash), "a resumed run has the same files");
    // more experts
    code = up_run("", "%s %s --experts 4", IN("new"), IN("more"));
    check(code == 0 && same_files("tok", "more", tokenizer_files, 5) &&
              has_member(IN("more/config.json"), "eos_token_id", "2"), "upcycle takes them along");
}

// What a folder has in other places.
static void test_other_tokenizers(void) {
    make_folder("settings", "spm");
    write_text(IN("settings/generation_config.json"), "{\"eos_token_id\": [2, 1], \"temperature\": 0.6}");
    write_text(IN("settings/config.json"), "{\"eos_token_id\": 0, \"bos_token_id\": 420, \"pad_token_id\": 2}");
    int code = run_program("--tokenizer %s --data " CASE_TEXT " " TINY " --steps 1 --vocab 448 --out %s",
                           IN("settings"), IN("padded"));
    check(code == 0 && has_member(IN("padded/config.json"), "vocab_size", "448") &&
              has_member(IN("padded/config.json"), "eos_token_id", "[2, 1]") &&
              has_member(IN("padded/config.json"), "bos_token_id", "1") &&
              has_member(IN("padded/config.json"), "pad_token_id", "2"),
          "ids before names, none that it lacks, a larger vocabulary");
    check(same_file(IN("settings/generation_config.json"), IN("padded/generation_config.json")),
          "generation_config.json goes along as it is");
    mkdir(IN("bare"), 0777);
    copy_file("dev/tokenizer/cases/smollm/tokenizer.json", IN("bare/tokenizer.json"));
    write_shard(IN("tokens.bin"), SHARD_MAGIC_16, 1, 200, 2, 200, 0);
    code = run_program("--tokenizer %s --data %s " TINY " --steps 1 --out %s", IN("bare"), IN("tokens.bin"),
                       IN("from_bare"));
    check(code == 0 && has_member(IN("from_bare/config.json"), "vocab_size", "330") &&
              has_member(IN("from_bare/config.json"), "eos_token_id", "null") &&
              has_member(IN("from_bare/tokenizer_config.json"), "tokenizer_class", "\"PreTrainedTokenizerFast\""),
          "tokenizer.json alone, and shards");
    write_text(IN("bare/tokenizer_config.json"), "{\"model_max_length\": 1024, \"eos_token\": \"</s>\"}");
    code = run_program("--tokenizer %s --data %s " TINY " --steps 1 --out %s", IN("bare"), IN("tokens.bin"),
                       IN("from_classless"));
    check(code == 0 && has_member(IN("from_classless/tokenizer_config.json"), "model_max_length", "1024") &&
              has_member(IN("from_classless/tokenizer_config.json"), "eos_token", "\"</s>\"") &&
              has_member(IN("from_classless/tokenizer_config.json"), "tokenizer_class", "\"PreTrainedTokenizerFast\""),
          "a tokenizer_config.json without a class gets one, and keeps the rest");
    // fewer tokens than bytes
    mkdir(IN("few_tokens"), 0777);
    write_text(IN("few_tokens/tokenizer.json"), MODEL("\"a\": 0, \"b\": 1, \"ab\": 2", "\"a b\"") "}");
    Text t = {NULL, 0, 0};
    for (int i = 0; i < 40; i++) text_print(&t, "aab");
    write_text(IN("ab.txt"), t.data);
    free(t.data);
    code = run_program("--tokenizer %s --data %s " TINY " --steps 1 --out %s", IN("few_tokens"), IN("ab.txt"),
                       IN("letters"));
    int code2 = run_program("--model %s --prompt ab --tokens 1", IN("letters"));
    check(code == 0 && code2 == 0 && !strncmp(ran.out, "ab", 2), "a vocabulary of three tokens");
    // bytes
    code = run_program("--data " CASE_TEXT " " TINY " --steps 1 --out %s", IN("bytes"));
    code |= run_program("--tokenizer %s --data " CASE_TEXT " " TINY " --steps 1 --out %s", IN("bytes"),
                        IN("bytes2"));
    check(code == 0 && same_file(IN("bytes/model.safetensors"), IN("bytes2/model.safetensors")) &&
              same_file(IN("bytes/tokenizer.json"), IN("bytes2/tokenizer.json")), "a tokenizer of bytes");
}

static void refused(const char* what, const char* says) {
    int ok = ran.code == 2 && strstr(ran.err, says) && error_lines() == 1;
    check(ok, "refused, %s: %s", what, ran.err);
}

static void test_tokenizer_misuse(void) {
    const char* run = "--tokenizer %s --data " CASE_TEXT " " TINY " --steps 1 %s --out %s";
    run_program(run, IN("tok"), "--vocab 419", IN("none"));
    refused("too few tokens", "has ids up to 419, so it must be at least 420");
    run_program(run, temp_dir, "", IN("none"));
    refused("no tokenizer", "it has no tokenizer.json");
    mkdir(IN("unigram"), 0777);
    write_text(IN("unigram/tokenizer.json"),
               "{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", 0], [\"b\", -1]]}, "
               "\"added_tokens\": [{\"id\": 60, \"content\": \"x\"}]}");
    run_program(run, IN("unigram"), "", IN("none"));
    refused("no BPE", "its model is Unigram, not BPE, which is not supported; encode the text with "
                      "dev/reference/encode.py");
    run_program("--tokenizer %s --data %s " TINY " --steps 1 --vocab 60 --out %s", IN("unigram"), IN("tokens.bin"),
                IN("none"));
    refused("too few for an added token", "has ids up to 60, so it must be at least 61");
    check(!exists(IN("none")), "nothing is written");
    int code = run_program("--tokenizer %s --data %s " TINY " --steps 1 --vocab 330 --out %s", IN("unigram"),
                           IN("tokens.bin"), IN("from_unigram"));
    check(code == 0 && exists(IN("from_unigram/tokenizer.json")), "but it goes along with shards");
    run_program("--tokenizer %s --steps 1", IN("tok"));
    refused("no data", "name a text or token shards with --data FILE");
    run_program(run, IN("bare"), "--resume", IN("new"));
    refused("a resume with another", "its tokenizer.json is not that of the model in");
    run_program("--tokenizer %s --model %s --data " CASE_TEXT " --steps 1", IN("bare"), IN("new"));
    refused("another model's", "its tokenizer.json is not that of the model in");
    copy_file(IN("bare/tokenizer.json"), IN("new/tokenizer.json"));
    run_program("--resume --out %s --steps 9", IN("new"));
    refused("a resume after it was replaced", "new/tokenizer.json is not the one that the run began with");
    remove(IN("new/tokenizer.json"));
    run_program("--resume --out %s --steps 9", IN("new"));
    refused("or removed", "new/tokenizer.json is not the one that the run began with");
    copy_file(IN("tok/tokenizer.json"), IN("new/tokenizer.json"));
    code = run_program("--resume --out %s --steps 5", IN("new"));
    check(code == 0, "and it goes on with its own");
    copy_file(IN("tok/tokenizer.json"), IN("bytes/tokenizer.json"));
    run_program("--resume --out %s --steps 9", IN("bytes"));
    refused("bytes that became tokens", "bytes/tokenizer.json is not the one that the run began with");
}

// The parts of a text for training and validation come from one encoding.
static int encodings;
static int* (*encode_really)(const char* path, long* count);
static int* counted_encode(const char* path, long* count) {
    encodings++;
    return encode_really(path, count);
}

static void test_encoded_once(void) {
    Error error = {""};
    Config c;
    if (!config_read(&c, IN("new"), &error)) die(1, "%s", error.text);
    reads_bytes(&c, IN("new"));
    encode_really = encode_file;
    encode_file = counted_encode;
    encodings = 0;
    Dataset *train = dataset_open(CASE_TEXT, 8, 420, TRAIN_PART, NO_BYTES),
            *val = dataset_open(CASE_TEXT, 8, 420, VAL_PART, NO_BYTES);
    int window[8], targets[8], again[8];
    dataset_window(val, 0, window, targets);
    dataset_close(train);
    int held = encoded_texts != NULL;
    dataset_window(val, 0, again, targets);
    check(encodings == 1 && held && !memcmp(window, again, sizeof window), "the parts of a text are encoded once");
    dataset_close(val);
    dataset_close(dataset_open(CASE_TEXT, 8, 420, WHOLE, NO_BYTES));
    check(encodings == 2 && !encoded_texts, "and again when nobody holds its tokens");
    encode_file = NULL;
}

// The program with a file or a terminal for its standard input.
static int run_with_input(int fd, const char* arguments) {
    int kept_input = dup(0);
    dup2(fd, 0);
    close(fd);
    int code = run_program("%s", arguments);
    dup2(kept_input, 0);
    close(kept_input);
    return code;
}

static void test_prompt_input(void) {
    char first[1024], both[4096];
    char arguments[PATH_SIZE];
    write_text(IN("prompt"), "");
    snprintf(arguments, sizeof arguments, "--model %s --prompt -", IN("bytes2"));
    run_with_input(open(IN("prompt"), O_RDONLY), arguments);
    refused("an empty prompt", "the prompt is empty");
    snprintf(arguments, sizeof arguments, "--model %s --prompt - --tokens 8", IN("new"));
    run_program("--model %s --prompt the --tokens 8", IN("new"));
    snprintf(first, sizeof first, "%.1000s", ran.out);
    write_text(IN("prompt"), "the\n");
    int code = run_with_input(open(IN("prompt"), O_RDONLY), arguments);
    check(code == 0 && !strcmp(ran.out, first), "a prompt from a file");
    write_text(IN("prompt"), "one\ntwo");
    code = run_with_input(open(IN("prompt"), O_RDONLY), arguments);
    check(code == 0 && !strncmp(ran.out, "one\ntwo", 7), "all of it is one prompt");
    run_program("--model %s --prompt of --seed 2 --tokens 8", IN("new"));
    snprintf(both, sizeof both, "%s\n%.1000s", first, ran.out);
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) || unlockpt(master) || write(master, "the\n\nof\n\4", 9) != 9) {
        printf("       no pseudo-terminal here: lines that are typed are not tried\n");
        return;
    }
    code = run_with_input(open(ptsname(master), O_RDWR | O_NOCTTY), arguments);
    check(code == 0 && !strcmp(ran.out, both), "lines that are typed are prompts, one after the other");
    close(master);
}

static void test_texts(void) {
    mkdir(temp("texts"), 0777);
    test_new_tokenizer();
    test_small_vocabulary();
    test_other_tokenizers();
    test_tokenizer_misuse();
    test_encoded_once();
    test_prompt_input();
}
