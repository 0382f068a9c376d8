// texts.h: how a model's texts become tokens: the tokenizer that it has, and what a new model takes of one that
// --tokenizer names. Needs card.h.
#pragma once

// ---- the tokenizer of a new model -----------------------------------------------------------------------------------

// How many tokens a tokenizer.json has, added ones included: its largest id and one.
static int tokenizer_size(const Json* tokenizer) {
    const Json *vocab = json_get(json_get(tokenizer, "model"), "vocab"), *added = json_get(tokenizer, "added_tokens");
    long size = vocab && vocab->type == JSON_ARRAY ? vocab->count : 0;          // Unigram: ids are places in a list
    for (int i = 0; vocab && vocab->type == JSON_OBJECT && i < vocab->count; i++)
        if (json_whole(vocab->items[i], INT_MAX - 1) >= size) size = json_whole(vocab->items[i], INT_MAX - 1) + 1;
    for (int i = 0; added && i < added->count; i++) {
        long id = json_whole(json_get(added->items[i], "id"), INT_MAX - 1);
        if (id >= size) size = id + 1;
    }
    return (int)size;
}

// The id of a token by its name, or -1.
static long token_named(const Json* tokenizer, const char* name) {
    const Json* added = json_get(tokenizer, "added_tokens");
    for (int i = 0; added && i < added->count; i++)
        if (!strcmp(json_string_of(added->items[i], "content"), name))
            return json_whole(json_get(added->items[i], "id"), INT_MAX);
    return json_whole(json_get(json_get(json_get(tokenizer, "model"), "vocab"), name), INT_MAX);
}

// 1 if j is an id of a vocabulary of `size` tokens, or a list of them.
static int are_ids(const Json* j, int size) {
    int all = j && j->type == JSON_ARRAY && j->count > 0;
    for (int i = 0; all && i < j->count; i++) all = are_ids(j->items[i], size);
    return all || json_whole(j, size - 1) >= 0;
}

// The members bos_token_id, eos_token_id and pad_token_id of a new model's config.json, for the tokenizer in `dir`: as
// generation_config.json or config.json there has them, else by the names in tokenizer_config.json or
// special_tokens_map.json, else null.
static void special_tokens(Text* t, const char* dir, const Json* tokenizer) {
    static const char* files[] = {"generation_config.json", "config.json", "tokenizer_config.json",
                                  "special_tokens_map.json"};
    static const char* names[][2] = {{"bos_token_id", "bos_token"}, {"eos_token_id", "eos_token"},
                                     {"pad_token_id", "pad_token"}};
    int size = tokenizer_size(tokenizer);
    for (int k = 0; k < 3; k++) {
        int found = 0;
        text_print(t, "%s\"%s\": ", k ? ", " : "", names[k][0]);
        for (int i = 0; i < 4 && !found; i++) {
            char path[PATH_SIZE];
            Error ignored = {""};
            Json* j = access(join_path(path, dir, files[i]), F_OK) ? NULL : json_read(path, &ignored);
            const Json *ids = json_get(j, names[k][0]), *name = json_get(j, names[k][1]);
            if (json_get(name, "content")) name = json_get(name, "content");
            long id = i >= 2 && name && name->type == JSON_STRING ? token_named(tokenizer, name->string) : -1;
            found = id >= 0 || (i < 2 && ids && (ids->type == JSON_NULL || are_ids(ids, size)));
            if (id >= 0) text_print(t, "%ld", id);
            else if (found) text_add(t, ids->raw, strlen(ids->raw));
            json_free(j);
        }
        if (!found) text_print(t, "null");
    }
}

// What a new model takes of --tokenizer DIR: the size of the vocabulary, if *vocab_size is 0, and the special tokens.
// Ends the program if it has none, or more tokens than *vocab_size.
static void take_tokenizer(const char* dir, int* vocab_size, Text* tokens) {
    char path[PATH_SIZE];
    Error error = {""};
    if (access(join_path(path, dir, "tokenizer.json"), F_OK))
        die(2, "--tokenizer %s: it has no tokenizer.json; expected a folder that has one", dir);
    Json* j = json_read(path, &error);
    if (!j) die(2, "%s", error.text);
    int size = tokenizer_size(j);
    special_tokens(tokens, dir, j);
    json_free(j);
    if (size < 1 || size > 1 << 24) die(2, "%s: no model.vocab with ids from 0 to %d", path, (1 << 24) - 1);
    if (*vocab_size == 0) *vocab_size = size;
    if (*vocab_size < size)
        die(2, "--vocab %d: %s has ids up to %d, so it must be at least %d", *vocab_size, path, size - 1, size);
}

// A hash of DIR/tokenizer.json, by which a resume knows it; "" if there is none.
static const char* tokenizer_hash(const char* dir, char hash[20]) {
    char path[PATH_SIZE];
    size_t length = 0;
    Error ignored = {""};
    char* text = read_file(join_path(path, dir, "tokenizer.json"), (size_t)1 << 30, &length, &ignored);
    *hash = 0;
    if (text) snprintf(hash, 20, "%016" PRIx64, piece_hash(text, length));
    free(text);
    return hash;
}

static int same_tokenizer(const char* a, const char* b) {
    char x[20], y[20];
    return *tokenizer_hash(a, x) && !strcmp(x, tokenizer_hash(b, y));
}

// ---- the tokenizer of a model ---------------------------------------------------------------------------------------

// The tokenizer of the model in encoder_dir, made when a text is first met; it ends the program if it cannot be.
static const char* encoder_dir;
static const Encoder* encoder_of_model(const char* what) {
    static Encoder* encoder;
    static char* made_of;
    char path[PATH_SIZE];
    Error error = {""};
    if (encoder && !strcmp(made_of, encoder_dir)) return encoder;
    join_path(path, encoder_dir, "tokenizer.json");
    if (access(path, F_OK))
        die(2, "%s: this model reads tokens, and %s is not there to make them; %s", what, path,
            strcmp(what, "--prompt") ? "make shards with data/tokenize_text.py" : "give them with --prompt-ids");
    Json* j = json_read(path, &error);
    if (!j) die(2, "%s", error.text);
    encoder_free(encoder);
    encoder = encoder_make(j, &error);
    if (!encoder)
        die(2, "%s: %s: %s, which is not supported; encode the text with dev/reference/encode.py, for shards "
            "data/tokenize_text.py", what, path, error.text);
    json_free(j);
    free(made_of);
    made_of = copy_string(encoder_dir);
    return encoder;
}

static int* encode_with_tokenizer(const char* path, long* count) {
    Error error = {""};
    size_t length = 0;
    const Encoder* e = encoder_of_model(path);
    char* text = read_file(path, INT_MAX, &length, &error);
    if (!text) die(2, "%s; make shards of it with data/tokenize_text.py", error.text);
    int* ids = encode(e, text, length, 1, count, &error);
    if (!ids) die(2, "%s: %s", path, error.text);
    free(text);
    return ids;
}

// Whether the tokens of the model in `dir` are bytes: a tokenizer tells; never with fewer tokens than bytes, always
// with 256. Otherwise the run that made the model told, or the upcycle after it, or nobody.
static BytesAllowed reads_bytes(const Config* c, const char* dir) {
    static const char* records[] = {"trainer.json", "upcycle.json"};
    char path[PATH_SIZE];
    Error ignored = {""};
    encode_file = NULL;
    if (has_tokenizer(dir)) {
        if (c->vocab_size >= 256 && tokenizer_is_bytes(dir)) return BYTES;
        encoder_dir = dir;
        encode_file = encode_with_tokenizer;
        return NO_BYTES;
    }
    if (c->vocab_size <= 256) return c->vocab_size == 256 ? BYTES : NO_BYTES;
    long told = -1;
    for (int i = 0; i < 2 && told < 0; i++) {
        Json* record = access(join_path(path, dir, records[i]), F_OK) ? NULL : json_read(path, &ignored);
        told = json_whole(json_get(record, "reads_bytes"), 1);
        json_free(record);
    }
    return told == 0 ? NO_BYTES : told == 1 ? BYTES : PERHAPS_BYTES;
}
