/*
checkpoints.c: safetensors files and models in them, right ones in all forms and wrong ones; with json.c and config.c
all that is read from a checkpoint.
*/
// ---------------------------------------------------------------------------------------------------------------------
// Safetensors files

// a file with this header and `data` bytes of tensors behind it
static void write_safetensors(const char* path, const char* header, size_t data) {
    size_t n = strlen(header);
    unsigned char* file = (unsigned char*)kept_malloc(8 + n + data);
    memset(file, 0, 8 + n + data);
    for (int i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(file + 8, header, n);
    write_bytes(path, file, 8 + n + data);
}

static void check_open(const char* what, const char* path, const char* expected) {
    Error error = {""};
    SafeTensors* s = keep_file(safetensors_open(path, &error));
    if (!expected)
        check(s && !error.text[0], "safetensors, %s: opens %s", what, error.text);
    else
        check(!s && strstr(error.text, expected) && strstr(error.text, path) && !strchr(error.text, '\n'),
              "safetensors, %s: %s", what, error.text[0] ? error.text : "not refused");
}

#define A_TENSOR "\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"

static void test_safetensors_refusals(void) {
    static const struct {
        const char* what;
        const char* header;
        size_t data;
        const char* expected;
    } files[] = {
        {"one tensor", "{\"a\":{" A_TENSOR "}}", 8, NULL},
        {"padded header", "{\"a\":{" A_TENSOR "}}       ", 8, NULL},
        {"no tensors", "{}", 0, NULL},
        {"metadata", "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{" A_TENSOR "}}", 8, NULL},
        {"empty tensor", "{\"a\":{" A_TENSOR "},\"b\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[8,8]}}", 8,
         NULL},
        {"scalar", "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, NULL},
        {"not JSON", "{\"a\":{" A_TENSOR "}", 8, "not JSON"},
        {"no object", "[]", 0, "does not start with {"},
        {"not UTF-8", "{\"\xFF\":{" A_TENSOR "}}", 8, "UTF-8"},
        {"space before the header", " {\"a\":{" A_TENSOR "}}", 8, "does not start with {"},
        {"text after the header", "{\"a\":{" A_TENSOR "}}x", 8, "not JSON"},
        {"unknown dtype", "{\"a\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, NULL},
        {"no dtype", "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "no dtype"},
        {"dtype a number", "{\"a\":{\"dtype\":1,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "no dtype"},
        {"no shape", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"negative shape", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"shape a float", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"shape of text", "{\"a\":{\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]}}", 8, "shape is not"},
        {"five dimensions", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,2],\"data_offsets\":[0,8]}}", 8, NULL},
        {"shape overflow", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}", 8,
         "overflows"},
        {"overflow in bytes", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,8]}}", 8,
         "shape is not"},
        {"overflow in bytes", "{\"a\":{\"dtype\":\"F64\",\"shape\":[99999999999,99999999],\"data_offsets\":[0,8]}}", 8,
         "overflows"},
        {"no offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "data_offsets"},
        {"one offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8]}}", 8, "data_offsets"},
        {"three offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, "data_offsets"},
        {"offsets backwards", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, "data_offsets"},
        {"negative offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, "data_offsets"},
        {"huge offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]}}", 8,
         "data_offsets"},
        {"size too small", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "needs 8 bytes"},
        {"size too large", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,12]}}", 12, "needs 8 bytes"},
        {"hole at the start", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "a hole"},
        {"hole", "{\"a\":{" A_TENSOR "},\"b\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16,
         "a hole"},
        {"overlap", "{\"a\":{" A_TENSOR "},\"b\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8,
         "an overlap"},
        {"the same bytes twice", "{\"a\":{" A_TENSOR "},\"b\":{" A_TENSOR "}}", 8, "an overlap"},
        {"trailing bytes", "{\"a\":{" A_TENSOR "}}", 9, "1 bytes follow"},
        {"trailing bytes, no tensors", "{}", 3, "3 bytes follow"},
        {"truncated", "{\"a\":{" A_TENSOR "}}", 7, "truncated?"},
        {"a name twice", "{\"a\":{" A_TENSOR "},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12,
         "appears twice"},
        {"entry not an object", "{\"a\":5}", 0, "no dtype"},
        {"metadata null", "{\"__metadata__\":null,\"a\":{" A_TENSOR "}}", 8, NULL},
        {"metadata not strings", "{\"__metadata__\":{\"format\":1}}", 0, "__metadata__ is not"},
        {"metadata no object", "{\"__metadata__\":[1]}", 0, "__metadata__ is not"}};
    for (EACH(i, files)) {
        const char* path = temp("crafted.safetensors");
        write_safetensors(path, files[i].header, files[i].data);
        check_open(files[i].what, path, files[i].expected);
    }
    const char* path = temp("crafted.safetensors");
    write_bytes(path, "", 0);
    check_open("empty file", path, "too short");
    write_bytes(path, "\2\0\0\0\0\0\0", 7);
    check_open("7 bytes", path, "too short");
    write_bytes(path, "\3\0\0\0\0\0\0\0{}", 10);
    check_open("header past the end", path, "past the end");
    write_bytes(path, "\0\0\0\0\0\0\0\0", 8);
    check_open("no header", path, "does not start with {");
    write_bytes(path, "\1\xE1\xF5\5\0\0\0\0{}", 10);
    check_open("header of 100000001 bytes", path, "over 100 MB");
    write_bytes(path, "\0\xE1\xF5\5\0\0\0\0{}", 10);
    check_open("header of 100000000 bytes", path, "past the end");
    write_bytes(path, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}", 10);
    check_open("header of 2^64 - 1 bytes", path, "over 100 MB");
    write_bytes(path, "\0\0\0\0\0\0\0\x80{}", 10);
    check_open("header of 2^63 bytes", path, "over 100 MB");
    check_open("directory", temp_dir, "not a regular file");
    check_open("missing", temp("missing"), "No such file");
}

// every half, against the definition of its format
static void test_halves(void) {
    int bf16 = 1, f16 = 1;
    for (int h = 0; h < 65536; h++) {
        double sign = h & 0x8000 ? -1 : 1;
        int exponent = h >> 7 & 255, fraction = h & 127, e = h >> 10 & 31, f = h & 1023;
        double b = exponent == 255 ? (fraction ? NAN : sign * INFINITY)
                                   : sign * (exponent ? ldexp(128 + fraction, exponent - 134) : ldexp(fraction, -133));
        double a = e == 31 ? (f ? NAN : sign * INFINITY) : sign * (e ? ldexp(1024 + f, e - 25) : ldexp(f, -24));
        float x = bf16_to_float((uint16_t)h), y = f16_to_float((uint16_t)h);
        bf16 &= isnan(b) ? isnan(x) : x == b && !signbit(x) == !signbit(b);
        f16 &= isnan(a) ? isnan(y) : y == a && !signbit(y) == !signbit(a);
    }
    check(bf16, "all 65536 BF16 numbers");
    check(f16, "all 65536 F16 numbers");
}

// ---------------------------------------------------------------------------------------------------------------------
// Models

// A tensor to be written in any type and shape: what tests change before they load a model.
typedef struct {
    char name[128];
    const char* dtype;
    int ndim;
    long shape[4], count;
    float* values;
    int shard; // -1: in no file
} Piece;

typedef struct {
    Piece* pieces;
    int count;
} Pieces;

static Pieces pieces_read(const char* dir) {
    Error error = {""};
    SafeTensors* s = keep_file(safetensors_open_model(dir, &error));
    if (!s) die(1, "%s", error.text);
    Pieces p = {(Piece*)kept_malloc(sizeof(Piece) * ((size_t)s->num_tensors + 8)), s->num_tensors};
    for (int i = 0; i < p.count; i++) {
        const StoredTensor* t = &s->tensors[i];
        Piece* piece = &p.pieces[i];
        memset(piece, 0, sizeof *piece);
        snprintf(piece->name, sizeof piece->name, "%s", t->name);
        piece->dtype = "F32";
        piece->ndim = t->ndim;
        piece->count = t->count;
        memcpy(piece->shape, t->shape, sizeof piece->shape);
        piece->values = reference_floats(s, t->name, NULL);
    }
    return p;
}

static Piece* piece_find(Pieces* p, const char* name) {
    for (int i = 0; i < p->count; i++)
        if (!strcmp(p->pieces[i].name, name)) return &p->pieces[i];
    die(1, "there is no tensor %s", name);
}

static Piece* piece_add(Pieces* p, const char* name, const Piece* like) {
    Piece* piece = &p->pieces[p->count++];
    *piece = *like;
    snprintf(piece->name, sizeof piece->name, "%s", name);
    piece->values = copy_floats(like->values, like->count);
    return piece;
}

// Writes one shard. Halves are the float's upper bits: the values that are left are put back into the piece.
static void pieces_write(Pieces* p, const char* path, int shard) {
    Text header = {NULL, 0, 0}, data = {NULL, 0, 0}, file = {NULL, 0, 0};
    text_print(&header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < p->count; i++) {
        Piece* piece = &p->pieces[i];
        if (piece->shard != shard) continue;
        text_print(&header, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", piece->name, piece->dtype);
        for (int k = 0; k < piece->ndim; k++) text_print(&header, "%s%ld", k ? "," : "", piece->shape[k]);
        size_t begin = data.length;
        for (long k = 0; k < piece->count; k++) {
            union {
                float value;
                uint32_t bits;
            } u;
            u.value = piece->values[k];
            if (!strcmp(piece->dtype, "F32")) {
                text_add(&data, (const char*)&u, 4);
                continue;
            }
            if (!strcmp(piece->dtype, "F64")) {
                double wide = u.value;
                text_add(&data, (const char*)&wide, 8);
                continue;
            }
            uint16_t half = (uint16_t)(u.bits >> 16);
            if (!strcmp(piece->dtype, "F16")) { // the golden weights are within the normal range, or too small
                int exponent = (int)(u.bits >> 23 & 255) - 112;
                half = (uint16_t)((u.bits >> 16 & 0x8000) |
                                  (exponent > 0 ? (uint32_t)exponent << 10 | (u.bits >> 13 & 1023) : 0));
                piece->values[k] = f16_to_float(half);
            } else {
                piece->values[k] = bf16_to_float(half);
            }
            char bytes[2] = {(char)(half & 255), (char)(half >> 8)};
            text_add(&data, bytes, 2);
        }
        text_print(&header, "],\"data_offsets\":[%zu,%zu]}", begin, data.length);
    }
    text_print(&header, "}");
    for (int i = 0; i < 8; i++) {
        char byte = (char)((uint64_t)header.length >> (8 * i));
        text_add(&file, &byte, 1);
    }
    text_add(&file, header.data, header.length);
    if (data.length) text_add(&file, data.data, data.length);
    write_bytes(path, file.data, file.length);
    free(header.data);
    free(data.data);
    free(file.data);
}

// A directory with the configuration of `dir` and these tensors in one file.
static const char* pieces_save(Pieces* p, const char* dir) {
    char config[PATH_SIZE];
    static char made[PATH_SIZE];
    snprintf(made, sizeof made, "%s", temp("model"));
    remove_tree(made);
    if (mkdir(made, 0777)) die(1, "%s: %s", made, strerror(errno));
    copy_file(join_path(config, dir, "config.json"), temp("model/config.json"));
    pieces_write(p, temp("model/model.safetensors"), 0);
    return made;
}

// Loads a directory; NULL if it is refused.
static Model* try_load(const char* dir, Error* error) {
    Config c;
    error->text[0] = 0;
    if (!config_read(&c, dir, error)) return NULL;
    Model* m = new_model(&c, FOR_SCORING, 1, 4);
    return checkpoint_load(m, dir, error) ? m : NULL;
}

// Every parameter that has a piece of its name is equal to it; returns how many have.
static int count_equal(const Model* m, Pieces* p) {
    int equal = 0;
    for (int i = 0; i < m->layout.count; i++)
        for (int k = 0; k < p->count; k++)
            if (!strcmp(m->layout.tensors[i].name, p->pieces[k].name))
                equal += same_floats(m->params + m->layout.tensors[i].offset, p->pieces[k].values, p->pieces[k].count);
    return equal;
}

static void check_loads(const char* what, const char* dir, Pieces* p) {
    Error error;
    Model* m = try_load(dir, &error);
    check(m && count_equal(m, p) == m->layout.count, "%s: loads, with equal values %s", what, error.text);
}

static void check_load_refused(const char* what, const char* dir, const char* expected) {
    Error error;
    Model* m = try_load(dir, &error);
    check(!m && strstr(error.text, expected) && !strchr(error.text, '\n'), "%s: %s", what,
          error.text[0] ? error.text : "not refused");
}

static void test_load_dtypes(const char* dir) {
    static const char* dtypes[] = {"F32", "BF16", "F16", "F64"};
    for (int i = 0; i < 4; i++) {
        Pieces p = pieces_read(dir);
        char what[200];
        snprintf(what, sizeof what, "%s as %s", strrchr(dir, '/') + 1, dtypes[i]);
        for (int k = 0; k < p.count; k++) p.pieces[k].dtype = dtypes[i];
        const char* made = pieces_save(&p, dir);
        check_loads(what, made, &p);
    }
    Pieces p = pieces_read(dir);
    Piece* t = piece_find(&p, "model.norm.weight");
    t->dtype = "I16";
    check_load_refused("a tensor of whole numbers", pieces_save(&p, dir), READABLE);
}

// Packs the experts of every sparse layer as newer transformers does: the model must be equal.
static void test_load_packed(const char* dir, const char* moe, const char* suffix) {
    Error error;
    Model* expected = try_load(dir, &error);
    const Config* c = &expected->config;
    Pieces p = pieces_read(dir);
    long E = c->num_experts, I = c->moe_intermediate_size, H = c->hidden_size;
    for (int i = 0; i < p.count; i++) p.pieces[i].shard = strstr(p.pieces[i].name, ".experts.") ? -1 : 0;
    for (int l = 0; l < c->num_layers; l++) {
        char name[128];
        if (!c->sparse[l]) continue;
        snprintf(name, sizeof name, "model.layers.%d.block_sparse_moe.gate.weight", l);
        if (c->arch == MIXTRAL) snprintf(piece_find(&p, name)->name, sizeof name, "model.layers.%d.mlp.gate.weight", l);
        for (int down = 0; down < 2; down++) {
            Piece packed = {"", "F32", 3, {E, down ? H : 2 * I, down ? I : H, 0}, E * H * I * (2 - down), NULL, 0};
            packed.values = down ? expected->weights.layers[l].down : expected->weights.layers[l].gate_up;
            snprintf(name, sizeof name, "model.layers.%d.%s.experts.%s%s", l, moe, down ? "down_proj" : "gate_up_proj",
                     suffix);
            piece_add(&p, name, &packed);
        }
    }
    Model* m = try_load(pieces_save(&p, dir), &error);
    check(m && same_floats(m->params, expected->params, m->layout.total),
          "%s: packed experts (%s.experts.down_proj%s) %s", strrchr(dir, '/') + 1, moe, suffix, error.text);
    p.pieces[p.count - 1].shape[1]++;
    p.pieces[p.count - 1].shape[2]--;
    check_load_refused("packed experts with a wrong shape", pieces_save(&p, dir), "");
}

static void write_shard_index(Pieces* p, const char* names[3]) {
    Text t = {NULL, 0, 0};
    text_print(&t, "{\"metadata\": {\"total_size\": 0}, \"weight_map\": {");
    for (int i = 0; i < p->count; i++)
        text_print(&t, "%s\"%s\": \"%s\"", i ? ", " : "", p->pieces[i].name, names[p->pieces[i].shard]);
    text_print(&t, "}}");
    write_text(temp("model/model.safetensors.index.json"), t.data);
    free(t.data);
}

// in three shards, as large models are
static void test_load_shards(const char* dir) {
    const char* names[3] = {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                            "model-00003-of-00003.safetensors"};
    Pieces p = pieces_read(dir);
    const char* made = pieces_save(&p, dir);
    unlink(temp("model/model.safetensors"));
    for (int i = 0; i < p.count; i++) p.pieces[i].shard = (i * 7) % 3;
    for (int i = 0; i < 3; i++) pieces_write(&p, temp("model/%s", names[i]), i);
    write_shard_index(&p, names);
    check_loads("three shards", made, &p);

    const char* bad[] = {
        "../model-00001-of-00003.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\\\b", ".hidden"};
    for (EACH(i, bad)) {
        char what[100];
        const char* changed[3] = {bad[i], names[1], names[2]};
        write_shard_index(&p, changed);
        snprintf(what, sizeof what, "weight_map with \"%s\"", bad[i]);
        check_load_refused(what, made, "not a file name in this directory");
    }
    write_text(temp("model/model.safetensors.index.json"), "{\"weight_map\": {\"a\": 5}}");
    check_load_refused("weight_map with a number", made, "not a file name");
    write_text(temp("model/model.safetensors.index.json"), "{\"weight_map\": []}");
    check_load_refused("weight_map a list", made, "no weight_map");
    write_text(temp("model/model.safetensors.index.json"), "{}");
    check_load_refused("no weight_map", made, "no weight_map");
    write_text(temp("model/model.safetensors.index.json"), "{");
    check_load_refused("index not JSON", made, "not JSON");

    write_shard_index(&p, names);
    unlink(temp("model/%s", names[2]));
    check_load_refused("a shard is missing", made, "No such file");
    p.pieces[0].shard = 2; // in shard 0 as well
    pieces_write(&p, temp("model/%s", names[2]), 2);
    check_load_refused("a tensor in two shards", made, "is in two files");
}

static void test_load_refusals(void) {
    const char* dir = "dev/reference/golden/qwen3_moe";
    Pieces p = pieces_read(dir);
    Piece* norm = piece_find(&p, "model.norm.weight");
    norm->shard = -1;
    check_load_refused("a missing tensor", pieces_save(&p, dir), "missing tensors (1): model.norm.weight");
    norm->shard = 0;
    piece_add(&p, "model.layers.0.mlp.experts.99.up_proj.weight", norm);
    strict = 1;
    check_load_refused("an unexpected tensor", pieces_save(&p, dir), "experts.99.up_proj.weight");
    strict = 0;
    p.pieces[p.count - 1].shard = -1;
    piece_add(&p, "model.layers.0.self_attn.rotary_emb.inv_freq", norm);
    check_loads("inv_freq is ignored", pieces_save(&p, dir), &p);
    snprintf(p.pieces[p.count - 1].name, sizeof p.pieces[0].name, "model.rotary_emb.inv_freq");
    check_loads("inv_freq of all layers is ignored", pieces_save(&p, dir), &p);
    p.pieces[p.count - 1].shard = -1;
    norm->ndim = 2;
    norm->shape[1] = 1;
    check_load_refused("a vector that is a matrix", pieces_save(&p, dir), "model.norm.weight has shape");
    norm->ndim = 1;
    Piece* q = piece_find(&p, "model.layers.0.self_attn.q_proj.weight");
    long rows = q->shape[0];
    q->shape[0] = q->shape[1];
    q->shape[1] = rows;
    check_load_refused("a transposed matrix", pieces_save(&p, dir), "q_proj.weight has shape");
    q->shape[1] = q->shape[0];
    q->shape[0] = rows;
    check_loads("the same, put right", pieces_save(&p, dir), &p);

    dir = "dev/reference/golden/llama_tied";
    p = pieces_read(dir);
    check_loads("tied", pieces_save(&p, dir), &p);
    Piece* head = piece_add(&p, "lm_head.weight", piece_find(&p, "model.embed_tokens.weight"));
    check_loads("tied, with an equal lm_head", pieces_save(&p, dir), &p);
    head->values[5] += 1;
    check_load_refused("tied, with another lm_head", pieces_save(&p, dir), "lm_head.weight differs");
    write_text(temp("model/config.json"), "{");
    check_load_refused("config.json not JSON", temp("model"), "not JSON");
    unlink(temp("model/config.json"));
    check_load_refused("no config.json", temp("model"), "No such file");
    copy_file("dev/reference/golden/llama/config.json", temp("model/config.json"));
    unlink(temp("model/model.safetensors"));
    check_load_refused("no weights", temp("model"), "No such file");
    mkdir(temp("model/.ready"), 0777);
    check_load_refused("an interrupted save", temp("model"), "--resume");
}

// The tokenizer's files come from the model's directory, which may go while a run goes on.
static void test_source_gone(void) {
    char dir[PATH_SIZE];
    Error error = {""};
    snprintf(dir, sizeof dir, "%s", temp("gone"));
    copy_directory("dev/reference/golden/mixtral", dir);
    write_text(temp("gone/tokenizer_config.json"), "{}");
    options_reset_table(option_table, NUM_OPTIONS);
    Model* m = open_model(dir, FOR_TRAINING, 1, 4);
    mkdir(temp("kept"), 0777);
    mkdir(temp("first"), 0777);
    const char* failure = checkpoint_save(m, temp("kept"), 1);
    remove_tree(dir);
    if (!failure) failure = checkpoint_save(m, temp("kept"), 2);
    Json* j = keep_json(json_read(temp("kept/trainer.json"), &error));
    check(!failure && exists(temp("kept/tokenizer_config.json")) && json_whole(json_get(j, "step"), 100) == 2,
          "a source that is gone: the last save has its files %s", failure ? failure : "");
    int kept = dup(2), said = open(temp("said.txt"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(said, 2);
    failure = checkpoint_save(m, temp("first"), 1);
    dup2(kept, 2);
    close(kept);
    close(said);
    size_t length = 0;
    const char* text = read_bytes(temp("said.txt"), &length);
    check(!failure && exists(temp("first/config.json")) && !exists(temp("first/tokenizer_config.json")) && length > 0 &&
              strstr(text, "gone is gone"),
          "without one the weights are saved alone, and a line says so");
}

// What checkpoint_save writes is read back with the same bits, for every class, with the optimizer's moments.
static void test_round_trip(const char* dir, const char* name) {
    Error error = {""};
    Model *m = open_model(dir, FOR_TRAINING, 1, 4), *back = NULL;
    fill_random(m->exp_avg, m->layout.total, 1);
    fill_random(m->exp_avg_sq, m->layout.total, 2);
    options_reset_table(option_table, NUM_OPTIONS);
    const char *out = temp("saved"), *failure;
    remove_tree(out);
    mkdir(out, 0777);
    failure = checkpoint_save(m, out, 17);
    size_t bytes = floats_bytes(m->layout.total);
    Config c;
    if (!failure && config_read(&c, out, &error)) {
        back = new_model(&c, FOR_TRAINING, 1, 4);
        if (!checkpoint_load(back, out, &error) || !optimizer_load(back, out, &error)) failure = error.text;
    }
    check(!failure && back && !memcmp(&m->config, &c, sizeof c), "%s: the configuration comes back %s", name,
          failure ? failure : error.text);
    check(back && back->layout.total == m->layout.total && !memcmp(m->params, back->params, bytes) &&
              !memcmp(m->exp_avg, back->exp_avg, bytes) && !memcmp(m->exp_avg_sq, back->exp_avg_sq, bytes),
          "%s: parameters and moments come back with the same bits", name);
    check(!exists(temp("saved/.saving")) && !exists(temp("saved/.ready")), "%s: nothing is left over", name);
    size_t n = 0;
    unsigned char* file = (unsigned char*)read_bytes(temp("saved/model.safetensors"), &n);
    long header = 0;
    for (int i = 7; i >= 0 && file; i--) header = header << 8 | file[i];
    check(file && header % 8 == 0 && strstr((const char*)file + 8, "\"__metadata__\":{\"format\":\"pt\"}"),
          "%s: padded header with format pt", name);
    Json* j = keep_json(json_read(temp("saved/trainer.json"), &error));
    check(json_whole(json_get(j, "step"), 100) == 17, "%s: trainer.json has the step", name);
}

static void test_checkpoints(void) {
    test_safetensors_refusals();
    test_halves();
    for (EACH(i, golden_models)) {
        char dir[PATH_SIZE];
        test_round_trip(join_path(dir, "dev/reference/golden", golden_models[i]), golden_models[i]);
    }
    test_load_dtypes("dev/reference/golden/llama_tied");
    test_load_dtypes("dev/reference/golden/mixtral");
    for (int weight = 0; weight < 2; weight++) {
        const char* suffix = weight ? ".weight" : "";
        test_load_packed("dev/reference/golden/qwen3_moe", "mlp", suffix);
        test_load_packed("dev/reference/golden/olmoe", "mlp", suffix);
        test_load_packed("dev/reference/golden/mixtral", "mlp", suffix);
        test_load_packed("dev/reference/golden/mixtral", "block_sparse_moe", suffix);
    }
    test_load_shards("dev/reference/golden/qwen3_moe");
    test_load_refusals();
    test_config_refusals();
    test_config_defaults();
    test_config_values();
    test_config_round_trip();
    test_source_gone();
}
