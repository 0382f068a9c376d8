// card.h: what stands beside a model for other programs and for readers: the tokenizer of a byte model,
// generation_config.json, README.md (the model card) and the licence. Needs checkpoint.h and sampling.h.
#pragma once

// ---- the tokenizer of a byte model ----------------------------------------------------------------------------------

static int holds(const char* dir, const char* name) {
    char path[PATH_SIZE];
    return !access(join_path(path, dir, name), F_OK);
}

static int has_tokenizer(const char* dir) {
    return holds(dir, "tokenizer.json") || holds(dir, "tokenizer.model") || holds(dir, "vocab.json");
}

// Writes a file of a directory that will be moved into `out`, if `out` does not have the same already.
static int write_text_file(const char* out, const char* dir, const char* name, Text* t, Error* error) {
    char path[PATH_SIZE];
    size_t length = 0;
    Error ignored = {""};
    char* old = access(join_path(path, out, name), F_OK) ? NULL : read_file(path, 1 << 24, &length, &ignored);
    int ok = (old && length == t->length && !memcmp(old, t->data, length)) ||
             write_file(join_path(path, dir, name), t->data, t->length, error);
    free(old);
    free(t->data);
    memset(t, 0, sizeof *t);
    return ok;
}

// A byte-level BPE whose ids are the bytes of the text, and no others. The end of a text is the zero byte: as a special
// token it bears its own name, so no other text is taken for it. llama.cpp refuses a model without a merge; the one
// here joins C0 and C1, which UTF-8 never has, to FF, which it never has either.
static int write_byte_tokenizer(const char* out, const char* dir, Error* error) {
    Text t = {NULL, 0, 0};
    static const char* pre =
        "\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
        "\"use_regex\": false";
    text_print(&t,
               "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": "
               "[{\"id\": 0, \"content\": \"\\u0000\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
               "\"normalized\": false, \"special\": true}],\n");
    text_print(&t,
               "  \"normalizer\": null,\n  \"pre_tokenizer\": {%s},\n  \"post_processor\": null,\n"
               "  \"decoder\": {%s},\n",
               pre, pre);
    text_print(&t,
               "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
               "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n"
               "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"vocab\": {");
    for (uint32_t b = 0, n = 256; b < 256; b++) {
        char name[5] = "";
        name[utf8_write(name, is_printable(b) ? b : n)] = 0;
        n += !is_printable(b);
        text_print(&t, "%s", b == 0 ? "\n      " : b % 16 ? ", " : ",\n      ");
        text_json_string(&t, b == 0 ? "\xC0\x80" : b == 255 ? "\xC3\x80\xC3\x81" : name);
        text_print(&t, ": %u", b);
    }
    text_print(&t, "\n    },\n    \"merges\": [\"\xC3\x80 \xC3\x81\"]\n  }\n}\n");
    if (!write_text_file(out, dir, "tokenizer.json", &t, error)) return 0;
    text_print(&t,
               "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"eos_token\": \"\\u0000\",\n"
               "  \"pad_token\": \"\\u0000\",\n  \"clean_up_tokenization_spaces\": false\n}\n");
    return write_text_file(out, dir, "tokenizer_config.json", &t, error);
}

// generation_config.json of a new model: greedy, as many tokens as a sample here has. (With a max_length every longer
// prompt would be an error.)
static int write_generation_config(const Model* m, const char* out, const char* dir, Error* error) {
    static const char* keys[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    Text t = {NULL, 0, 0};
    for (int i = 0; i < 3; i++) {
        const char* ids = json_raw(m->luggage, keys[i]);
        text_print(&t, "%s\n  \"%s\": ", i ? "," : "{", keys[i]);
        text_add(&t, ids ? ids : "null", ids ? strlen(ids) : 4);
    }
    text_print(&t, ",\n  \"max_new_tokens\": 256\n}\n");
    return write_text_file(out, dir, "generation_config.json", &t, error);
}

// The class in tokenizer_config.json of a new model, beside a tokenizer.json that came without that file or with one
// that names none: transformers would take the class of the model's type, which cuts words by its own rule.
static int write_tokenizer_class(const char* out, const char* dir, Error* error) {
    char path[PATH_SIZE];
    Text t = {NULL, 0, 0};
    Error ignored = {""};
    text_print(&t, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\"");
    if (access(join_path(path, dir, "tokenizer_config.json"), F_OK)) {
        text_print(&t, ",\n  \"clean_up_tokenization_spaces\": false\n}\n");
        return write_text_file(out, dir, "tokenizer_config.json", &t, error);
    }
    Json* j = json_read(path, &ignored);
    const Json* named = json_get(j, "tokenizer_class");
    int ok = 1, adds = j && j->type == JSON_OBJECT && (!named || named->type == JSON_NULL);
    for (int i = 0; adds && i < j->count; i++) {
        if (j->items[i] == named) continue;
        text_print(&t, ",\n  ");
        text_json_string(&t, j->items[i]->key);
        text_print(&t, ": ");
        text_json_value(&t, j->items[i]);
    }
    text_print(&t, "\n}\n");
    if (adds) ok = write_file(path, t.data, t.length, error);
    json_free(j);
    free(t.data);
    return ok;
}

// ---- which programs open a model ------------------------------------------------------------------------------------

// Where a model leaves what an engine implements for its class, one line each in `lines`; returns how many. Seen with
// transformers 5.23, vLLM 0.32.0, llama.cpp of October 2026, mlx-lm 0.32.2 and mistral.rs 0.9.5.
static int engine_notes(const Config* c, char lines[4][256]) {
    int n = 0;
    if (!is_ordinary(c)) {
        snprintf(lines[n++], 256,
                 "no Hugging Face class is like this model: it is saved with model_type train_moe, which "
                 "only train_moe opens");
        return n;
    }
    if (c->arch == OLMOE && c->norm_topk_prob)
        snprintf(lines[n++], 256,
                 "vLLM and llama.cpp do not renormalise the gates of an OLMoE (norm_topk_prob is true) and "
                 "print other text; --norm-topk 0 is OLMoE's own");
    if (c->arch == OLMOE && c->num_kv_heads != c->num_heads)
        snprintf(lines[n++], 256,
                 "llama.cpp refuses an OLMoE with fewer key/value heads than heads; --kv-heads %d is "
                 "OLMoE's own",
                 c->num_heads);
    if (c->arch == OLMOE && c->rms_norm_eps != OLMOE_EPS)
        snprintf(lines[n++], 256, "llama.cpp's converter takes %g for the rms_norm_eps of an OLMoE; this one has %g",
                 OLMOE_EPS, c->rms_norm_eps);
    if (c->arch == QWEN3_MOE && !c->norm_topk_prob)
        snprintf(lines[n++], 256,
                 "llama.cpp renormalises the gates of a Qwen3-MoE (norm_topk_prob is false) and prints "
                 "other text");
    if (c->arch == QWEN3_MOE && count_sparse(c) < c->num_layers)
        snprintf(lines[n++], 256, "llama.cpp's converter knows no dense layers in a Qwen3-MoE; this one has some");
    if (c->arch == QWEN2_MOE && c->norm_topk_prob)
        snprintf(lines[n++], 256,
                 "llama.cpp and MLX do not renormalise the gates of a Qwen2-MoE (norm_topk_prob is true) and print "
                 "other text");
    if (c->arch == QWEN2_MOE && c->tie_word_embeddings)
        snprintf(lines[n++], 256, "llama.cpp and MLX want a Qwen2-MoE to have an lm_head.weight; this one is tied");
    if (c->arch == QWEN2_MOE && count_sparse(c) < c->num_layers)
        snprintf(lines[n++], 256, "llama.cpp and MLX know no dense layers in a Qwen2-MoE; this one has some");
    if (c->arch == DOTS1 && (!c->num_shared_experts || c->num_kv_heads != c->num_heads))
        snprintf(lines[n++], 256, "a Dots1 with%s opens in transformers%s, and mistral.rs has no such class",
                 c->num_shared_experts ? " fewer key/value heads than heads" : "out shared experts",
                 c->num_shared_experts ? ", vLLM and MLX; llama.cpp fails" : "; vLLM, llama.cpp and MLX fail");
    return n;
}

static void print_engine_notes(const Config* c) {
    char lines[4][256];
    for (int i = 0, n = engine_notes(c, lines); i < n; i++) printf("note: %s\n", lines[i]);
}

// ---- the model card -------------------------------------------------------------------------------------------------

#define CARD_MARK "# This card is written anew with every save; without this line it stays as you leave it."

// A card's text, to be freed; NULL if there is none.
static char* read_card(const char* dir) {
    char path[PATH_SIZE];
    size_t length;
    Error ignored = {""};
    if (access(join_path(path, dir, "README.md"), F_OK)) return NULL;
    return read_file(path, 1 << 24, &length, &ignored);
}

static int card_is_ours(const char* card) {
    const char* mark = card ? strstr(card, CARD_MARK) : NULL;
    return mark && mark - card < 1024;
}

static int copy_file_to(const char* from, const char* to, Error* error) {
    size_t length;
    char* data = read_file(from, (size_t)1 << 30, &length, error);
    int ok = data && write_file(to, data, length, error);
    free(data);
    return ok;
}

// The source's own card goes along as README.source.md.
static int carry_card(const char* from, const char* to, Error* error) {
    char old[PATH_SIZE], copy[PATH_SIZE], *card = read_card(from);
    int foreign = card && !card_is_ours(card), ok = 1;
    DIR* d = opendir(from);
    struct dirent* entry;
    struct stat st;
    free(card);
    while (ok && d && (entry = readdir(d)) != NULL) {
        join_path(old, from, entry->d_name);
        if (strcmp(entry->d_name, foreign ? "README.md" : "README.source.md") || stat(old, &st) || !S_ISREG(st.st_mode))
            continue;
        ok = copy_file_to(old, join_path(copy, to, "README.source.md"), error);
    }
    if (d) closedir(d);
    return ok;
}

static Text command_line; // as it was given, for the card

// Keeps the command, quoted for a shell, in one line.
static void remember_command(int argc, char** argv) {
    command_line.length = 0;
    text_print(&command_line, "    ./%s", program_name);
    for (int i = 1; i < argc; i++) {
        size_t safe = strspn(argv[i], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./,:=+@%");
        const char* quote = argv[i][0] && !argv[i][safe] ? "" : "'";
        text_print(&command_line, " %s", quote);
        for (const char* s = argv[i]; *s; s++)
            text_print(&command_line, *s == '\'' ? "'\\''" : "%c", (unsigned char)*s < 32 ? ' ' : *s);
        text_print(&command_line, "%s", quote);
    }
    text_print(&command_line, "\n");
}

static void add_command(Text* t, const char* line, size_t n) {
    for (const char* s = t->data; s && *s; s = strchr(s, '\n') + 1)
        if (!strncmp(s, line, n)) return;
    text_add(t, line, n);
}

// The commands that made the source, from its card, then this one.
static void card_commands(Text* t, const char* card) {
    static const char* title = "\n## Commands\n\n";
    const char* s = card_is_ours(card) ? strstr(card, title) : NULL;
    for (s = s ? s + strlen(title) : ""; !strncmp(s, "    ", 4) && strchr(s, '\n'); s = strchr(s, '\n') + 1)
        add_command(t, s, (size_t)(strchr(s, '\n') + 1 - s));
    if (command_line.length) add_command(t, command_line.data, command_line.length);
}

static const char* json_text(const Json* j, const char* key, const char* otherwise) {
    const Json* v = json_get(j, key);
    return v && v->string ? v->string : otherwise;
}

static const char* json_item(const Json* j, const char* key, int i) {
    const Json* v = json_get(j, key);
    return v && v->type == JSON_ARRAY && i < v->count && v->items[i]->string ? v->items[i]->string : NULL;
}

// What a receipt of upcycle says of experts, layers and widths, behind `start`: "2 -> 4 layers by stack, FFN 8 -> 16".
static const char* step_changes(char* text, size_t size, const char* start, const Json* r) {
    const Json *growth = json_get(r, "growth"), *fresh = json_get(growth, "new");
    const char *before = json_item(r, "experts", 0), *after = json_item(r, "experts", 1);
    const char *narrow = json_item(growth, "width", 0), *wide = json_item(growth, "width", 1);
    const char* depth = json_text(growth, "depth", NULL);
    int mixture = before && strcmp(before, "0"), layers = fresh && fresh->type == JSON_ARRAY ? fresh->count : 0;
    int old = 0;
    size_t n = 0;
    text[0] = 0;
    for (int l = 0; l < layers; l++) old += fresh->items[l]->number == 0;
    if (before && after && strcmp(after, "0") && (!growth || strcmp(before, after)))
        n = (size_t)snprintf(text, size, "%s%.20s -> %.20s experts", start, mixture ? before : "dense", after);
    if (old < layers)
        n += (size_t)snprintf(text + n, size - n, "%s%d -> %d layers%s%.20s", n ? ", " : start, old, layers,
                              depth ? " by " : "", depth ? depth : "");
    if (narrow && wide && strcmp(narrow, wide))
        snprintf(text + n, size - n, "%s%s %.20s -> %.20s", n ? ", " : start, mixture ? "experts of width" : "FFN",
                 narrow, wide);
    return text;
}

// The receipts in upcycle.json, the first upcycling first.
static void card_receipts(Text* t, const Json* r) {
    if (!r || r->type != JSON_OBJECT) return;
    card_receipts(t, json_get(r, "parent"));
    char changes[256];
    const char *before, *after, *item;
    text_print(t, "- `%s`%s", json_text(r, "method", "?"), step_changes(changes, sizeof changes, ": ", r));
    for (int i = 0; (item = json_item(r, "sources", i)) != NULL; i++)
        text_print(t, "%s`%s`", i ? ", " : ", from ", item);
    before = json_item(r, "parameters", 0), after = json_item(r, "parameters", 1);
    if (before && after) text_print(t, "; %s -> %s parameters", before, after);
    text_print(t, "\n  - function: %s\n", json_text(r, "function", "?"));
    for (int i = 0; (item = json_item(r, "warnings", i)) != NULL; i++) text_print(t, "  - warning: %s\n", item);
    const Json* check = json_get(r, "check");
    if (json_item(check, "loss", 1))
        text_print(t, "  - checked on %s tokens: loss %s before, %s after\n", json_text(check, "tokens", "?"),
                   json_item(check, "loss", 0), json_item(check, "loss", 1));
}

// tokenizer: what to add of it; NULL if there is none
static void card_engines(Text* t, const Config* c, const char* tokenizer) {
    char lines[4][256];
    int n = engine_notes(c, lines), shared = c->num_shared_experts > 0;
    int llama_cpp = is_ordinary(c) && (c->arch != DOTS1 || (shared && c->num_kv_heads == c->num_heads));
    int mistral_rs = c->arch != OLMOE && c->arch != QWEN2_MOE && c->arch != DOTS1;
    if (is_ordinary(c) && (c->arch != DOTS1 || shared))
        text_print(
            t,
            "transformers (`AutoModelForCausalLM`), vLLM%s%s MLX%s have the class %s.\n",
            llama_cpp ? ", llama.cpp (`convert_hf_to_gguf.py`)" : "", mistral_rs ? "," : " and",
            mistral_rs ? " and mistral.rs" : "", archs[c->arch].class_name);
    if (llama_cpp && tokenizer)
        text_print(t,
                   "- llama.cpp's converter knows BPE tokenizers by a hash and stops at one that it has not seen%s; "
                   "dev/engines/to_gguf.py of train_moe tells it the rule.\n",
                   tokenizer);
    for (int i = 0; i < n; i++) text_print(t, "- %s.\n", lines[i]);
}

static int has_licence(const char* dir) {
    DIR* d = opendir(dir);
    int found = 0;
    for (struct dirent* entry; d && (entry = readdir(d)) != NULL;)
        found |= !fnmatch(LICENCE, entry->d_name, 0) || !fnmatch("COPYING*", entry->d_name, 0);
    if (d) closedir(d);
    return found;
}

// README.md of the model in `dir`, whose files will be moved into `out`. It comes from the directory `from`, if not
// NULL; the last part of `name` is its name. A card in `out` that somebody has taken over stays.
static int write_readme(const Config* c, int bytes, const char* from, const char* name, const char* out,
                        const char* dir, Error* error) {
    char path[PATH_SIZE], resolved[PATH_SIZE], *own = read_card(out), *card = from ? read_card(from) : NULL;
    int taken_over = own && !card_is_ours(own);
    Error ignored = {""};
    free(own);
    if (taken_over) {
        free(card);
        return 1;
    }
    Text t = {NULL, 0, 0}, commands = {NULL, 0, 0};
    long total, active;
    count_parameters(c, &total, &active);
    if (realpath(name, resolved)) name = resolved;
    const char* last = strrchr(name, '/');
    text_print(&t, "---\n%s\n%spipeline_tag: text-generation\ntags: [%s]\n", CARD_MARK,
               is_ordinary(c) ? "library_name: transformers\n" : "",
               c->num_experts ? "mixture-of-experts" : "text-generation");
    // what the source's card says of its licence
    for (const char* s = card && !strncmp(card, "---\n", 4) ? card + 4 : "---"; *s && strncmp(s, "---", 3);) {
        size_t n = strcspn(s, "\n");
        if (!strncmp(s, "license", 7)) text_print(&t, "%.*s\n", (int)n, s);
        s += n + (s[n] == '\n');
    }
    text_print(&t, "---\n\n# %s\n\n%s of %d layer%s, hidden size %d, %d/%d heads of size %d, vocabulary %d%s.\n",
               last ? last + 1 : name, is_ordinary(c) ? archs[c->arch].class_name : "A model of train_moe's own type",
               c->num_layers, c->num_layers > 1 ? "s" : "", c->hidden_size, c->num_heads, c->num_kv_heads, c->head_dim,
               c->vocab_size,
               bytes ? ": its tokens are the bytes of the text" : "");
    if (c->num_experts)
        text_print(&t,
                   "%d expert%s of width %d in %s%d layer%s, %s%d per token: %ld parameters, %ld of them active "
                   "for a token.\n",
                   c->num_experts, c->num_experts > 1 ? "s" : "", c->moe_intermediate_size,
                   count_sparse(c) > 1 ? "each of " : "", count_sparse(c), count_sparse(c) > 1 ? "s" : "",
                   c->router.kind == ROUTER_DYNAMIC ? "at most " : "", c->num_experts_per_tok, total, active);
    else
        text_print(&t, "It is dense: %ld parameters.\n", total);
    card_commands(&commands, card);
    text_print(&t, "Made by %s %s.\n\n## Commands\n\n", program_name, VERSION);
    text_add(&t, commands.data ? commands.data : "", commands.length);
    Json* receipt = access(join_path(path, dir, "upcycle.json"), F_OK) ? NULL : json_read(path, &ignored);
    if (receipt) {
        text_print(&t, "\n## Lineage\n\n");
        card_receipts(&t, receipt);
        if (c->num_experts) text_print(&t, "\n`upcycle.json` says which expert came from which.\n");
    }
    text_print(&t, "\n## Engines\n\n");
    card_engines(&t, c, bytes ? ", as that of bytes, until its `get_vocab_base_pre` returns `gpt-2` for it"
                        : has_tokenizer(out) || has_tokenizer(dir) ? "" : NULL);
    text_print(&t,
               "\n## Files\n\n`trainer.json` and `trainer/`, where they are, serve `train_moe --resume` alone.\n");
    int card_came = holds(out, "README.source.md") || holds(dir, "README.source.md");
    int licence_came = has_licence(out) || has_licence(dir);
    if (card_came || licence_came)
        text_print(&t, "%s%s%s came with the model, or the tokenizer, that this one was made from.\n",
                   card_came ? "`README.source.md`" : "", card_came && licence_came ? " and " : "",
                   !licence_came ? "" : card_came ? "a licence" : "The licence");
    json_free(receipt);
    free(card);
    free(commands.data);
    return write_text_file(out, dir, "README.md", &t, error);
}

// All of this for a save of a run in OUT, written in `dir`.
static int write_card(const Model* m, const char* out, const char* dir, Error* error) {
    const Config* c = &m->config;
    return (!m->source || !strcmp(m->source, out) || carry_card(m->source, dir, error)) &&
           (!m->reads_bytes || c->vocab_size < 256 || has_tokenizer(dir) || write_byte_tokenizer(out, dir, error)) &&
           (m->source || holds(dir, "generation_config.json") || write_generation_config(m, out, dir, error)) &&
           (m->source || !m->tokenizer || write_tokenizer_class(out, dir, error)) &&
           write_readme(c, m->reads_bytes, m->source, out, out, dir, error);
}
