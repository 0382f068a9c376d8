// engines.c: what other programs find in a directory: where the moments lie, the tokenizer of bytes, keys, the model
// card; and what version 0.1 wrote. Python looks at the same directories in dev/engines/files.py.

// The text of a file in the temporary directory; "" if there is none.
static const char* text_of(const char* name) {
    size_t n = 0;
    char* text = exists(temp("%s", name)) ? read_bytes(temp("%s", name), &n) : NULL;
    return text ? text : "";
}

static int says(const char* name, const char* what) { return strstr(text_of(name), what) != NULL; }

// Moves the moments of a run to where version 0.1 had them.
static void age_run(const char* out) {
    if (rename(temp("%s/" OPTIMIZER_FILE, out), temp("%s/optimizer.safetensors", out)) ||
        rmdir(temp("%s/trainer", out)))
        die(1, "%s: %s", out, strerror(errno));
}

static void test_moments_place(void) {
    const char* run = "--schedule constant --val-every 1 --save-every 0 --warmup 1 --steps";
    char steps[128];
    write_corpus(temp("corpus.txt"), 20000);
    snprintf(steps, sizeof steps, "%s 2", run);
    check(train_run("old", steps) == 0 && exists(temp("old/" OPTIMIZER_FILE)) &&
              !exists(temp("old/optimizer.safetensors")),
          "beside the model lies no other safetensors file");
    snprintf(steps, sizeof steps, "%s 4", run);
    train_run("a", steps);
    remove_tree(temp("b"));
    copy_directory(temp("old"), temp("b"));
    age_run("b");
    check(resume_run("b", "--steps 4") == 0 && same_checkpoint("a", "b") && !exists(temp("b/optimizer.safetensors")),
          "a run of version 0.1 goes on, its moments move");
    // version 0.1 was killed while its save moved in
    remove_tree(temp("b"));
    copy_directory(temp("old"), temp("b"));
    age_run("b");
    mkdir(temp("b/.ready"), 0777);
    copy_file(temp("b/optimizer.safetensors"), temp("b/.ready/optimizer.safetensors"));
    write_text(temp("b/optimizer.safetensors"), "of an earlier step");
    check(resume_run("b", "--steps 4") == 0 && same_checkpoint("a", "b"), "a save of version 0.1 is finished");
    // this version was killed between moving its moments in and removing those of version 0.1
    remove_tree(temp("b"));
    copy_directory(temp("old"), temp("b"));
    write_text(temp("b/optimizer.safetensors"), "of an earlier step");
    mkdir(temp("b/.ready"), 0777);
    check(resume_run("b", "--steps 2") == 0 && !exists(temp("b/optimizer.safetensors")) && same_checkpoint("old", "b"),
          "old moments beside new ones are removed before anything is read");
    // upcycle
    remove_tree(temp("b"));
    remove_tree(temp("up"));
    remove_tree(temp("up_old"));
    copy_directory(temp("old"), temp("b"));
    int code = up_run("", "%s %s --experts 6 --optimizer copy", temp("b"), temp("up"));
    age_run("b");
    code += up_run("", "%s %s --experts 6 --optimizer copy", temp("b"), temp("up_old"));
    check(code == 0 && same_in("up", "up_old", OPTIMIZER_FILE) && !exists(temp("up_old/optimizer.safetensors")),
          "upcycle reads both places and writes the new one: %.80s", up_output);
    check(resume_run("up", "--steps 3") == 0, "and train_moe goes on there: %s", ran.err);
}

// 1 if a text tokenizer.json is one of bytes
static int is_bytes_with(const char* old, const char* replacement) {
    Error error = {""};
    Text t = {NULL, 0, 0};
    const char *text = text_of("a/tokenizer.json"), *at = strstr(text, old);
    if (!at) return -1;
    text_add(&t, text, (size_t)(at - text));
    text_print(&t, "%s%s", replacement, "");
    text_add(&t, at + strlen(old), strlen(at + strlen(old)));
    Json* j = json_parse(t.data, t.length, &error);
    int bytes = j ? vocabulary_is_bytes(j) : -2;
    json_free(j);
    free(t.data);
    return bytes;
}

static void test_byte_tokenizer(void) {
    Error error = {""};
    train_run("a", "--steps 1");
    Json* j = json_read(temp("a/tokenizer.json"), &error);
    const Json *model = json_get(j, "model"), *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
    int named = j && vocab && json_whole(json_get(vocab, "\xC0\x80"), 255) == 0 &&
                json_whole(json_get(vocab, "A"), 255) == 65 && json_whole(json_get(vocab, "\xC4\xA0"), 255) == ' ' &&
                json_whole(json_get(vocab, "\xC3\x80\xC3\x81"), 255) == 255;
    check(named && vocab->count == 256 && merges && merges->count == 1, "256 tokens, one merge: %s", error.text);
    json_free(j);
    check(is_bytes_with("\"A\": 65", "\"A\": 65") == 1, "it is known as bytes");
    check(is_bytes_with("\"\\u0000\": 0", "\"\xC4\x80\": 0") == 1, "also with the usual name of byte 0");
    check(is_bytes_with("\"A\": 65", "\"A\": 66") == 0, "not with two tokens for one byte");
    check(is_bytes_with("\"A\": 65, \"B\": 66", "\"A\": 66, \"B\": 65") == 0, "not with bytes that are exchanged");
    check(is_bytes_with("\"A\": 65, ", "") == 0, "not without a byte");
    check(is_bytes_with("\xC3\x80\xC3\x81\": 255", "th\": 255") == 0, "not with a merge that a text can hold");
    check(is_bytes_with("\"id\": 0", "\"id\": 256") == 0, "not with tokens beyond the bytes");
    check(run_program("--model %s --data %s --eval", temp("a"), temp("corpus.txt")) == 0, "text is read: %s", ran.err);
    check(run_program("--model %s --prompt a --tokens 3 --temperature 0", temp("a")) == 0 && strlen(ran.out) == 4,
          "and printed: %s", ran.err);
    j = json_read(temp("a/config.json"), &error);
    check(json_whole(json_get(j, "vocab_size"), 999) == 256 && json_absent(json_get(j, "eos_token_id")) &&
              says("a/tokenizer_config.json", "\"eos_token\": \"\\u0000\""),
          "the model's vocabulary stays 256, the end of a text is known to the tokenizer alone");
    json_free(j);
    check(says("a/generation_config.json", "\"max_new_tokens\": 256"), "a new model has a generation_config.json");
    // another tokenizer in its place
    copy_file(temp("a/tokenizer.json"), temp("b/tokenizer.json"));
    char* text = copy_string(text_of("b/tokenizer.json"));
    memcpy(strstr(text, "\"A\": 65"), "\"A\": 66", 7);
    memcpy(strstr(text, "\"B\": 66"), "\"B\": 65", 7);
    write_text(temp("b/tokenizer.json"), text);
    free(text);
    int code = run_program("--model %s --prompt A --tokens 0", temp("b"));
    check(code == 0 && ran.out[0] == 'A', "other ids are not bytes, but tokens of a text: %s%s", ran.out, ran.err);
    // a source without one, as version 0.1 left it
    remove_tree(temp("up"));
    unlink(temp("a/tokenizer.json"));
    check(up_run("", "%s %s --experts 6", temp("a"), temp("up")) == 0 && tokenizer_is_bytes(temp("up")),
          "upcycle gives it to a source without: %.80s", up_output);
}

static void test_engine_choices(void) {
    static const struct {
        const char *options, *says; // NULL: nothing to say
    } cases[] = {{"--arch olmoe", NULL},
                 {"", NULL},
                 {"--arch mixtral", NULL},
                 {"--arch olmoe --norm-topk 1", "do not renormalise"},
                 {"--arch olmoe --kv-heads 2", "--kv-heads 4"},
                 {"--norm-topk 0", "llama.cpp renormalises"},
                 {"--sparse-step 2", "knows no dense layers"},
                 {"--router sigmoid", "Dots1"},
                 {"--router lpr", "only train_moe"}};
    for (EACH(i, cases)) {
        char options[256];
        snprintf(options, sizeof options, "--steps 0 --heads 4 %s", cases[i].options);
        int code = train_run("a", options), noted = strstr(ran.out, "note: ") != NULL;
        check(code == 0 && noted == (cases[i].says != NULL) && (!noted || strstr(ran.out, cases[i].says)), "%s: %s",
              *cases[i].options ? cases[i].options : "by default",
              cases[i].says ? cases[i].says : "every engine computes it");
        check(!noted || !cases[i].says || strstr(text_of("a/README.md"), cases[i].says), "and the card says so");
    }
    Config c;
    Error error = {""};
    Text t = {NULL, 0, 0};
    int read = config_read(&c, "dev/reference/golden/dots1_shared", &error);
    c.num_kv_heads = c.num_heads / 2;
    card_engines(&t, &c, NULL);
    check(read && strstr(t.data, "), vLLM and MLX have the class Dots1ForCausalLM.") &&
              strstr(t.data, "key/value heads than heads opens in transformers, vLLM and MLX; llama.cpp fails, and"),
          "a Dots1 with shared experts: %s", t.data);
    t.length = 0;
    c.num_kv_heads = c.num_heads;
    card_engines(&t, &c, NULL);
    check(strstr(t.data, ", llama.cpp (`convert_hf_to_gguf.py`) and MLX have the class Dots1ForCausalLM.\n") &&
              !strstr(t.data, "\n- "), "a Dots1 that llama.cpp computes, too: %s", t.data);
    free(t.data);
    train_run("a", "--steps 0 --heads 4 --arch olmoe");
    check(config_read(&c, temp("a"), &error) && !c.norm_topk_prob && c.num_kv_heads == 4 && c.rms_norm_eps == 1e-5,
          "--arch olmoe has OLMoE's own gates, heads and eps");
    train_run("a", "--steps 0");
    check(says("a/config.json", "\"use_sliding_window\": false") && says("a/config.json", "\"max_window_layers\": "),
          "Qwen3-MoE has the keys that mistral.rs wants");
    train_run("a", "--steps 0 --router sigmoid");
    check(says("a/config.json", "\"scoring_func\": \"sigmoid\""), "Dots1 has the key that llama.cpp wants");
}

static void test_cards(void) {
    train_run("a", "--steps 1");
    check(says("a/README.md", "    ./train_moe --data ") && says("a/README.md", "Qwen3MoeForCausalLM"),
          "a run's card has its command and class");
    check(!says("a/README.md", "came with") && says("a/README.md", "as that of bytes, until its `get_vocab_base_pre`"),
          "nothing of files that are not there; llama.cpp and bytes");
    train_run("a1", "--steps 0 --layers 1 --experts 2");
    check(says("a1/README.md", "of 1 layer, hidden") && says("a1/README.md", " in 1 layer, "), "one layer");
    check(resume_run("a", "--steps 2") == 0 && says("a/README.md", "    ./train_moe --data ") &&
              says("a/README.md", "--resume --steps 2\n"),
          "resumed: both commands");
    // a source with a card and a licence of its own
    write_text(temp("a/README.md"), "---\nlicense: apache-2.0\n---\n# theirs\n");
    write_text(temp("a/LICENSE.txt"), "terms");
    remove_tree(temp("up"));
    remove_tree(temp("up2"));
    int code = up_run("", "%s %s --experts 6 --method shuffle", temp("a"), temp("up"));
    check(code == 0 && same_file(temp("a/README.md"), temp("up/README.source.md")) && says("up/LICENSE.txt", "terms") &&
              says("up/README.md", "\nlicense: apache-2.0\n"),
          "the source's card goes along as README.source.md, its licence as it is: %.80s", up_output);
    check(says("up/README.md", "- `shuffle`: 5 -> 6 experts, from `") && says("up/README.md", "  - function: ") &&
              says("up/README.md", "  - warning: ") && says("up/README.md", "--experts 6 --method shuffle\n"),
          "the card has lineage, receipt and command");
    code = up_run("", "%s %s --experts 12 --topk 1", temp("up"), temp("up2"));
    const char* shuffle = strstr(text_of("up2/README.md"), "- `shuffle`");
    check(code == 0 && same_file(temp("a/README.md"), temp("up2/README.source.md")) &&
              says("up2/README.md", "--method shuffle\n") && says("up2/README.md", "- `copy`: 6 -> 12 experts") &&
              says("up2/README.md", "\nlicense: apache-2.0\n") &&
              shuffle && strstr(shuffle, "- `copy`"),
          "the next generation's too, the first step first");
    write_text(temp("up2/README.md"), "mine");
    check(run_program("--model %s --data %s --out %s --steps 1 --seq 8", temp("up"), temp("corpus.txt"),
                      temp("up2/on")) == 0 &&
              same_in("up", "up2/on", "README.source.md") && same_in("up", "up2/on", "LICENSE.txt") &&
              says("up2/on/README.md", "- `shuffle`"),
          "training carries them on: %s", ran.err);
    write_text(temp("up2/on/README.md"), "mine");
    check(
        run_program("--out %s --resume --steps 2", temp("up2/on")) == 0 && !strcmp(text_of("up2/on/README.md"), "mine"),
        "a card that somebody has taken over stays");
    // --force replaces what a checkpoint may hold
    remove_tree(temp("up"));
    up_run("", "%s %s --experts 6 --optimizer copy", temp("a"), temp("up"));
    write_text(temp("up/.gitattributes"), "*.safetensors filter=lfs");
    write_text(temp("up/README.md"), "mine");
    check(up_run("", "%s %s --experts 9 --force", temp("a"), temp("up")) == 0 && !exists(temp("up/trainer")) &&
              !strcmp(text_of("up/README.md"), "mine") && same_file(temp("a/README.md"), temp("up/README.source.md")),
          "--force accepts cards, licences, .gitattributes and trainer/, and leaves a card as it is: %.80s", up_output);
    remove(temp("up/README.md"));
    check(up_run("", "%s %s --experts 9 --force", temp("a"), temp("up")) == 0 && says("up/README.md", "## Commands") &&
              says("up/README.md", "`README.source.md` and a licence came with"), "one of its own is written anew");
    mkdir(temp("up/trainer"), 0777);
    write_text(temp("up/trainer/notes"), "mine");
    check(up_run("", "%s %s --experts 6 --force", temp("a"), temp("up")) == 2 && says("up/trainer/notes", "mine"),
          "but not what somebody has put there");
}

// dev/reference/version_0.1: made by version 0.1 on LICENSE, as each trainer.json and upcycle.json tells.
static void test_version_0_1(void) {
#define OLD "dev/reference/version_0.1/"
    Error error = {""};
    long n = 0, k = 0;
    for (int i = 0; i < 2; i++) { // a run, and one that upcycle made of it with its moments
        const char *name = i ? OLD "family" : OLD "run", *out = i ? "old_family" : "old_run";
        remove_tree(temp("%s", out));
        copy_directory(name, temp("%s", out));
        check(run_program("--out %s --resume --steps 6", temp("%s", out)) == 0 && saved_step(out) == 6,
              "%s: goes on: %s", name, ran.err);
        check(exists(temp("%s/" OPTIMIZER_FILE, out)) && !exists(temp("%s/optimizer.safetensors", out)) &&
                  exists(temp("%s/README.md", out)),
              "%s: is then as this version leaves it", name);
    }
    check(count_lines(temp("old_run/log.csv")) == 7, "its logs go on");
    remove_tree(temp("b"));
    int code = run_program(
        "--data LICENSE --steps 6 --batch 2 --seq 16 --layers 2 --hidden 8 --heads 2 --tie --val-every 2 "
        "--save-every 2 --seed 5 --warmup 0 --experts 3 --expert-ffn 8 --out %s",
        temp("b"));
    float *x = up_tensor(temp("b"), "model.embed_tokens.weight", &n),
          *y = up_tensor(temp("old_run"), "model.embed_tokens.weight", &k);
    check(code == 0 && n == k && max_error(x, y, n) < 1e-2, "and ends near a run of this version");
    static const char* names[] = {"run", "olmoe", "experts", "family"};
    for (int i = 0; i < 4; i++) {
        check(run_program("--model " OLD "%s --data LICENSE --eval", names[i]) == 0 && strstr(ran.out, "bits per byte"),
              "%s: opens and reads bytes: %s", names[i], ran.err);
        check(up_run("", "--inspect " OLD "%s --data LICENSE", names[i]) == 0, "%s: inspects: %.80s", names[i],
              up_output);
        if (i >= 2)
            check(strstr(up_output, i == 2 ? "drop, dense -> 3 experts" : "family, 3 -> 6 experts") != NULL,
                  "%s: lineage", names[i]);
    }
    Config c;
    check(config_read(&c, OLD "olmoe", &error) && c.norm_topk_prob && c.num_kv_heads == 1,
          "olmoe: what its config.json says counts");
    remove_tree(temp("up"));
    check(up_run("", OLD "experts %s --experts 6", temp("up")) == 0 &&
              says("up/README.md", "- `drop`: dense -> 3 experts"),
          "receipts of version 0.1 are read: %.80s", up_output);
}

static void test_engines(void) {
    write_corpus(temp("corpus.txt"), 20000);
    up_begin();
    test_moments_place();
    test_byte_tokenizer();
    test_engine_choices();
    test_cards();
    test_version_0_1();
}
