/*
loader.c: checkpoints as people have them: other names, forms and leftovers, which both programs read as transformers
does, and folders without a safetensors file, of which one line says what they are and what to do.
*/
static int note_says(const char* dir, const char* expected) {
    Error error = {""};
    Config c;
    if (!config_read(&c, dir, &error)) return 0;
    Source* s = source_open(dir, "", &error);
    const char* notes = s && s->files->notes.length ? s->files->notes.data : "";
    int says = s && (expected ? strstr(notes, expected) != NULL : !*notes);
    source_close(s);
    return says;
}

// The model is the same; the note, NULL: none, says what was passed over, and --strict refuses it.
static void check_same(const char* what, const char* dir, const Model* expected, const char* note) {
    Error error = {""};
    notes_were_said = 1;
    Model* m = try_load(dir, &error);
    check(m && same_floats(m->params, expected->params, m->layout.total), "%s: the same model %s", what, error.text);
    check(note_says(dir, note), "%s: %s", what, note ? note : "nothing was passed over");
    strict = 1;
    m = try_load(dir, &error);
    check(note ? !m && strstr(error.text, note) : m != NULL, "%s: with --strict %s", what, error.text);
    strict = notes_were_said = 0;
}

static Model* golden(const char* name) {
    char dir[PATH_SIZE];
    return open_model(join_path(dir, "dev/reference/golden", name), FOR_SCORING, 1, 4);
}

static void test_names(void) {
    static const char* models[] = {"llama_tied", "mixtral", "qwen3_moe", "dots1"};
    for (EACH(i, models)) {
        char dir[PATH_SIZE];
        Pieces p = pieces_read(join_path(dir, "dev/reference/golden", models[i]));
        for (int k = 0; k < p.count; k++)
            if (!strncmp(p.pieces[k].name, "model.", 6)) memmove(p.pieces[k].name, p.pieces[k].name + 6, 100);
        check_same("names without model.", pieces_save(&p, dir), golden(models[i]), NULL);
    }
    const char* dir = GOLDEN "llama_tied";
    Pieces p = pieces_read(dir);
    Piece* embedding = piece_find(&p, "model.embed_tokens.weight");
    strcpy(embedding->name, "lm_head.weight");
    check_same("a tied model under its head alone", pieces_save(&p, dir), golden("llama_tied"), NULL);
    embedding->shard = -1;
    check_load_refused("neither embedding nor head", pieces_save(&p, dir), "missing tensors (1): model.embed_tokens");
    embedding->shard = 0;
    Piece* other = piece_add(&p, "model.embed_tokens.weight", embedding);
    other->values[7] += 1;
    check_load_refused("tied, but not the same", pieces_save(&p, dir), "set tie_word_embeddings to false");
}

static void test_leftovers(void) {
    static const char* extra[] = {"v_head.summary.weight", "model.layers.7.input_layernorm.weight", "q.cos_cached",
                                  "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_scale"};
    const char* dir = GOLDEN "llama";
    for (EACH(i, extra)) {
        Pieces p = pieces_read(dir);
        piece_add(&p, extra[i], piece_find(&p, "model.norm.weight"));
        check_same("a tensor too many", pieces_save(&p, dir), golden("llama"), extra[i]);
    }
    // as much may be said of an index: its entries are only what names the shards
    static const char* names[3] = {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                   "model-00003-of-00003.safetensors"};
    Pieces p = pieces_read(dir);
    const char* made = pieces_save(&p, dir);
    unlink(temp("model/model.safetensors"));
    for (int i = 0; i < p.count; i++) p.pieces[i].shard = i % 3;
    for (int i = 0; i < 3; i++) pieces_write(&p, temp("model/%s", names[i]), i);
    piece_add(&p, "model.rotary_emb.inv_freq", &p.pieces[0]);
    write_shard_index(&p, names);
    check_same("an entry without a tensor", made, golden("llama"),
               "entries of the index whose shard does not hold the tensor (1): model.rotary_emb.inv_freq");
    p.count -= 2;
    write_shard_index(&p, names);
    check_same("a tensor without an entry", made, golden("llama"),
               "that the index does not name tensors, which are used (1): ");
    p.pieces[0].shard = 1;
    p.count++;
    write_shard_index(&p, names);
    check_same("an entry that names another shard", made, golden("llama"), "does not hold the tensor (1)");
}

// The programs say what they pass over once, and go on; with --strict they end.
static void test_said_once(void) {
    const char* dir = GOLDEN "llama";
    Pieces p = pieces_read(dir);
    piece_add(&p, "v_head.bias", piece_find(&p, "model.norm.weight"));
    const char* made = pieces_save(&p, dir);
    up_make_random_shard("shard.bin", 400, 37);
    for (int with = 0; with < 2; with++) {
        const char* flag = with ? "--strict" : "";
        int code = up_run("", "%s {}/x --experts 2 --seq 16 --batch 1 --check {}/shard.bin %s --force", made, flag);
        const char* said = strstr(up_output, "v_head.bias");
        check(code == 2 * with && said && !strstr(said + 1, "v_head.bias"), "upcycle %s: said once: %.90s", flag,
              said ? said : up_output);
        code = run_program("--model %s --data %s --eval --seq 16 %s", made, up_path("shard.bin"), flag);
        check(code == 2 * with && error_lines() == 1 && strstr(ran.err, "v_head.bias"), "train_moe %s: %s", flag,
              ran.err);
    }
}

static void test_other_formats(void) {
    static const struct {
        const char *files, *expected, *command;
    } folders[] = {
        {"pytorch_model.bin", "pytorch_model.bin is PyTorch's format",
         "T; [X.from_pretrained('@').save_pretrained('OUT')"},
        {"pytorch_model-00002-of-00002.bin", "is PyTorch's format", "@').save_pretrained('OUT')"},
        {"training_args.bin", "No such file", ""},
        {"tiny-q8_0.gguf", "tiny-q8_0.gguf is a GGUF file", "'@', gguf_file='tiny-q8_0.gguf')"},
        {"adapter_model.safetensors pytorch_model.bin", "adapter_model.safetensors is an adapter",
         "merge_and_unload()"},
        {"consolidated.00.pth", "Meta's format", "convert_llama_weights_to_hf.py --input_dir @ --output_dir"},
        {"consolidated.safetensors", "Mistral's format", "convert_mistral_weights_to_hf.py @ OUT"},
        {"checkpoint-500", "checkpoint-500 is a folder of a Trainer", "name that one: @/checkpoint-500"},
        {"model.fp16.safetensors", "model.fp16.safetensors is a file of tensors", "call it model.safetensors"},
        {"model-00001-of-00002.safetensors", "shards, but not their model.safetensors.index.json",
         "download that file"}};
    for (EACH(i, folders)) {
        char command[PATH_SIZE], names[100], *rest = names, *name;
        const char* made = temp("foreign");
        remove_tree(made);
        mkdir(made, 0777);
        copy_file(GOLDEN "llama/config.json", temp("foreign/config.json"));
        strcpy(names, folders[i].files);
        while ((name = strsep(&rest, " ")) != NULL) write_text(temp("foreign/%s", name), "x");
        made = temp("foreign");
        const char* at = strchr(folders[i].command, '@');
        snprintf(command, sizeof command, "%.*s%s%s", at ? (int)(at - folders[i].command) : 99, folders[i].command,
                 at ? made : "", at ? at + 1 : "");
        check_load_refused(folders[i].files, made, folders[i].expected);
        check_load_refused(folders[i].files, made, command);
        unlink(temp("foreign/config.json"));        // these often come without
        int code = run_program("--model %s --prompt a", temp("foreign"));
        check(code == 2 && error_lines() == 1 && strstr(ran.err, folders[i].expected), "without config.json: %s",
              ran.err);
    }
    copy_file(GOLDEN "llama/config.json", temp("foreign/config.json"));
    write_text(temp("foreign/model.safetensors"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n");
    check_load_refused("a git-lfs pointer", temp("foreign"), "git lfs pull");
    write_text(temp("foreign/config.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n");
    check_load_refused("config.json is one", temp("foreign"), "config.json: a git-lfs pointer");
    // a name that a shell would take apart is not put into a command
    mkdir(temp("it's"), 0777);
    write_text(temp("it's/pytorch_model.bin"), "x");
    copy_file(GOLDEN "llama/config.json", temp("it's/config.json"));
    check_load_refused("a folder with a quote", temp("it's"), "X.from_pretrained('DIR')");
}

static void test_null_heads(void) {
    for (int arch = 0; arch < NUM_ARCHS; arch++) {
        Config c;
        Error error;
        char text[8000];
        static const char key[] = "\"num_key_value_heads\": ";
        const char *plain = config_with(archs[arch].model_type, "\"x\": 1"), *at = strstr(plain, key) + strlen(key);
        snprintf(text, sizeof text, "%.*snull%s", (int)(at - plain), plain, at + strcspn(at, ",}"));
        int ok = config_parse(&c, text, &error);
        check(ok && c.num_kv_heads == c.num_heads, "%s: heads that are null are as many as the others %s",
              archs[arch].model_type, error.text);
    }
}

static void test_loader(void) {
    up_begin();
    test_names();
    test_leftovers();
    test_said_once();
    test_other_formats();
    test_null_heads();
}
