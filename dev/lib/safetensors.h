// safetensors.h: tensors in files, with every check that a hostile file needs. Compiles alone.
//
// A file is 8 bytes with the length of a JSON header, the header, and the tensors' bytes. A model is one file, or
// several ("shards") with an index that names the file of each tensor.
#pragma once
#include "json.h"
#include <dirent.h>
#include <fnmatch.h>

typedef enum { DTYPE_F32, DTYPE_BF16, DTYPE_F16, DTYPE_F64, DTYPE_I32, DTYPE_OTHER } Dtype; // OTHER: never read
#define READABLE "only F32, BF16, F16 and F64 can be read"
enum { MOST_DIMS = 4 };             // of tensors that are read

static long strict;                 // --strict: what transformers passes over is refused

typedef struct {
    char* name;
    int file;                       // which of the opened files
    Dtype dtype;
    int ndim;
    long shape[MOST_DIMS];          // the first ones
    long count;                     // numbers in the tensor
    long offset, bytes;             // where its bytes are in the file
    int used;                       // for the caller
} StoredTensor;

typedef struct {
    int num_files, num_tensors;
    int* fds;
    char** paths;
    StoredTensor* tensors;          // sorted by name
    Json* metadata;                 // of the first file, or NULL
    Text notes;                     // what was passed over, for the caller to say
} SafeTensors;

// Names for a message, cut off after a few.
typedef struct {
    Text text;
    int count;
} NameList;

static void list_name(NameList* list, const char* name) {
    if (++list->count <= 6) text_print(&list->text, "%s%.100s", list->count > 1 ? ", " : "", name);
    else if (list->count == 7) text_print(&list->text, ", ...");
}

// An error if there are any. Frees the list.
static void names_refuse(NameList* list, const char* what, Error* error) {
    if (list->count) set_error(error, "%s (%d): %s", what, list->count, list->text.data);
    free(list->text.data);
}

// A note, or with --strict an error. Frees the list.
static void names_note(SafeTensors* s, NameList* list, const char* what, Error* error) {
    if (list->count && !strict)
        text_print(&s->notes, "%s%s (%d): %s", s->notes.length ? "; " : "", what, list->count, list->text.data);
    if (strict) names_refuse(list, what, error);
    else free(list->text.data);
}

static void safetensors_say_notes(const SafeTensors* s, const char* dir) {
    if (s->notes.length)
        fprintf(stderr, "%s: warning: %s: ignored, as transformers does: %s\n", program_name, dir, s->notes.data);
}

static void safetensors_close(SafeTensors* s) {
    if (!s) return;
    for (int i = 0; i < s->num_files; i++) {
        if (s->fds[i] >= 0) close(s->fds[i]);
        free(s->paths[i]);
    }
    for (int i = 0; i < s->num_tensors; i++) free(s->tensors[i].name);
    free(s->fds);
    free(s->paths);
    free(s->tensors);
    json_free(s->metadata);
    free(s->notes.data);
    free(s);
}

static int compare_tensor_names(const void* a, const void* b) {
    return strcmp(((const StoredTensor*)a)->name, ((const StoredTensor*)b)->name);
}

static int compare_tensor_offsets(const void* a, const void* b) {
    const StoredTensor *x = (const StoredTensor*)a, *y = (const StoredTensor*)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);       // empty tensors first
}

// A whole number in 0 .. limit from JSON; -1 if it is none.
static long json_whole(const Json* j, long limit) {
    if (!j || j->type != JSON_NUMBER || strpbrk(j->string, "-.eE") || j->length > 18) return -1;
    long value = atol(j->string);
    return value <= limit ? value : -1;
}

// One entry of the header. `data` bytes of tensors follow the header.
static int parse_tensor(StoredTensor* t, const Json* entry, long data, Error* error) {
    static const struct { const char* name; int bytes; Dtype dtype; } known[] = {
        {"F32", 4, DTYPE_F32}, {"BF16", 2, DTYPE_BF16}, {"F16", 2, DTYPE_F16}, {"I32", 4, DTYPE_I32},
        {"F64", 8, DTYPE_F64}, {"I64", 8, DTYPE_OTHER}, {"U64", 8, DTYPE_OTHER}, {"U32", 4, DTYPE_OTHER},
        {"I16", 2, DTYPE_OTHER}, {"U16", 2, DTYPE_OTHER}, {"I8", 1, DTYPE_OTHER}, {"U8", 1, DTYPE_OTHER},
        {"BOOL", 1, DTYPE_OTHER}, {"F8_E4M3", 1, DTYPE_OTHER}, {"F8_E5M2", 1, DTYPE_OTHER}};
    const Json *dtype = json_get(entry, "dtype"), *shape = json_get(entry, "shape"),
               *offsets = json_get(entry, "data_offsets");
    const char* name = entry->key;
    int size = 0;
    if (!dtype || dtype->type != JSON_STRING) return set_error(error, "tensor %.100s: no dtype", name);
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(dtype->string, known[i].name)) {
            size = known[i].bytes;
            t->dtype = known[i].dtype;
        }
    if (!size) t->dtype = DTYPE_OTHER;          // a newer one, which is nobody's business unless the tensor is wanted
    if (!shape || shape->type != JSON_ARRAY)
        return set_error(error, "tensor %.100s: shape is not a list of whole numbers", name);
    t->ndim = shape->count;
    t->count = 1;
    for (int i = 0; i < shape->count; i++) {
        long n = json_whole(shape->items[i], LONG_MAX);
        if (n < 0) return set_error(error, "tensor %.100s: shape is not a list of whole numbers", name);
        if (i < MOST_DIMS) t->shape[i] = n;
        if (__builtin_mul_overflow(t->count, n, &t->count))
            return set_error(error, "tensor %.100s: the shape overflows", name);
    }
    if (__builtin_mul_overflow(t->count, (long)size, &t->bytes))
        return set_error(error, "tensor %.100s: the shape overflows", name);
    long begin =
        offsets && offsets->type == JSON_ARRAY && offsets->count == 2 ? json_whole(offsets->items[0], LONG_MAX) : -1;
    long end = begin >= 0 ? json_whole(offsets->items[1], LONG_MAX) : -1;
    if (begin < 0 || end < begin) return set_error(error, "tensor %.100s: data_offsets are not [begin, end]", name);
    if (end > data)
        return set_error(error,
                         "tensor %.100s: its data end at byte %ld, but the file has %ld bytes of data (truncated?)",
                         name, end, data);
    if (!size) t->bytes = end - begin;
    if (end - begin != t->bytes)
        return set_error(error, "tensor %.100s: its shape needs %ld bytes, data_offsets give %ld", name, t->bytes,
                         end - begin);
    t->offset = begin;
    return 1;
}

// Appends the tensors of one file. The tensors must fill the file from end to end, without holes and overlaps.
static int safetensors_add_file(SafeTensors* s, const char* path, Error* error) {
    Error inner = {""};
    struct stat st;
    unsigned char prefix[8];
    s->fds = (int*)realloc(s->fds, sizeof(int) * (size_t)(s->num_files + 1));
    s->paths = (char**)realloc(s->paths, sizeof(char*) * (size_t)(s->num_files + 1));
    if (!s->fds || !s->paths) die(1, "out of memory");
    int fd = open(path, O_RDONLY), file = s->num_files++;
    s->fds[file] = fd;
    s->paths[file] = copy_string(path);
    if (fd < 0 || fstat(fd, &st)) return set_error(error, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return set_error(error, "%s: not a regular file", path);
    long size = (long)st.st_size, length = 0;
    if (size < 8 || !read_at(fd, prefix, 8, 0))
        return set_error(error, "%s: %ld bytes are too short for safetensors", path, size);
    for (int i = 7; i >= 0; i--)
        length = i == 7 && prefix[i] > 127 ? LONG_MAX : length == LONG_MAX ? length : length << 8 | prefix[i];
    if (!memcmp(prefix, "version ", 8))
        return set_error(error, "%s: a git-lfs pointer, not the file; git lfs pull in its folder fetches that", path);
    if (length > 100000000)
        return set_error(error, "%s: the header's length is over 100 MB; is this a safetensors file?", path);
    if (8 + length > size)
        return set_error(error, "%s: the header's %ld bytes go past the end of the file", path, length);
    char* text = (char*)checked_malloc((size_t)length + 1);
    Json* header = NULL;
    if (!read_at(fd, text, (size_t)length, 8)) set_error(error, "%s: the header cannot be read", path);
    else if (length == 0 || text[0] != '{') set_error(error, "%s: the header does not start with {", path);
    else header = json_parse(text, (size_t)length, &inner);
    free(text);
    if (!header) return set_error(error, "%s: %s", path, inner.text);
    int first = s->num_tensors;
    s->tensors = (StoredTensor*)realloc(s->tensors, sizeof(StoredTensor) * (size_t)(first + header->count + 1));
    if (!s->tensors) die(1, "out of memory");
    long at = 0;
    for (int i = 0; i < header->count; i++) {
        Json* entry = header->items[i];
        if (!strcmp(entry->key, "__metadata__")) {
            for (int k = 0; entry->type != JSON_NULL && (k < entry->count || entry->type != JSON_OBJECT); k++)
                if (entry->type != JSON_OBJECT || entry->items[k]->type != JSON_STRING) {
                    set_error(error, "%s: __metadata__ is not a map of strings", path);
                    break;
                }
            if (file == 0) {
                s->metadata = entry;
                header->items[i] = (Json*)checked_malloc(sizeof(Json));         // taken out of the tree
                memset(header->items[i], 0, sizeof(Json));
            }
            continue;
        }
        StoredTensor* t = &s->tensors[s->num_tensors];
        memset(t, 0, sizeof *t);
        t->file = file;
        if (!parse_tensor(t, entry, size - 8 - length, &inner)) break;
        t->name = copy_string(entry->key);
        s->num_tensors++;
    }
    json_free(header);
    qsort(s->tensors + first, (size_t)(s->num_tensors - first), sizeof(StoredTensor), compare_tensor_offsets);
    for (int i = first; i < s->num_tensors && !inner.text[0]; i++) {
        StoredTensor* t = &s->tensors[i];
        if (t->offset != at)
            set_error(&inner, "tensor %.100s starts at byte %ld of the data, expected %ld: %s", t->name, t->offset, at,
                      t->offset > at ? "a hole" : "an overlap");
        at = t->offset + t->bytes;
        t->offset += 8 + length;
    }
    if (!inner.text[0] && 8 + length + at != size)
        set_error(&inner, "%ld bytes follow the last tensor", size - 8 - length - at);
    if (inner.text[0]) set_error(error, "%s: %s", path, inner.text);
    return !error->text[0];
}

// The tensor of that name, or NULL.
static StoredTensor* safetensors_find(const SafeTensors* s, const char* name) {
    StoredTensor key;
    key.name = (char*)name;
    return (StoredTensor*)bsearch(&key, s->tensors, (size_t)s->num_tensors, sizeof(StoredTensor), compare_tensor_names);
}

static int safetensors_finish(SafeTensors* s, Error* error) {
    qsort(s->tensors, (size_t)s->num_tensors, sizeof(StoredTensor), compare_tensor_names);
    for (int i = 1; i < s->num_tensors; i++)
        if (!strcmp(s->tensors[i - 1].name, s->tensors[i].name))
            return set_error(error, "tensor %.100s is in two files: %s and %s", s->tensors[i].name,
                             s->paths[s->tensors[i - 1].file], s->paths[s->tensors[i].file]);
    return !error->text[0];
}

// Opens one file. NULL and an error if anything about it is wrong.
static SafeTensors* safetensors_open(const char* path, Error* error) {
    SafeTensors* s = (SafeTensors*)checked_malloc(sizeof(SafeTensors));
    memset(s, 0, sizeof *s);
    if (safetensors_add_file(s, path, error) && safetensors_finish(s, error)) return s;
    safetensors_close(s);
    return NULL;
}

// What a folder without model.safetensors holds instead, and what makes one of it. In a remedy @ is the folder, # the
// file, by a name of its own if a shell would take the true one for something else; the first row that fits counts.
// (The conversions of Meta's and Mistral's formats were not run.)
static void explain_missing(const char* dir, Error* error) {
    static const struct { const char *pattern, *what, *remedy; } others[] = {
        {"model-*-of-*.safetensors", "shards, but not their model.safetensors.index.json", "download that file too"},
        {"adapter_model.*", "an adapter", "python3 -c \"from peft import AutoPeftModelForCausalLM as M; "
         "M.from_pretrained('@').merge_and_unload().save_pretrained('OUT'); from transformers import AutoTokenizer "
         "as T; T.from_pretrained('@').save_pretrained('OUT')\""},
        {"pytorch_model*.bin", "PyTorch's format", "python3 -c \"from transformers import AutoModelForCausalLM as M, "
         "AutoTokenizer as T; [X.from_pretrained('@').save_pretrained('OUT') for X in (M, T)]\""},
        {"*.gguf", "a GGUF file", "pip install gguf accelerate && python3 -c \"from transformers import "
         "AutoModelForCausalLM as M, AutoTokenizer as T; m = M.from_pretrained('@', gguf_file='#'); "
         "m.hf_quantizer = None; del m.config.quantization_config; m.save_pretrained('OUT'); "
         "T.from_pretrained('@', gguf_file='#').save_pretrained('OUT')\""},
        {"consolidated*.pth", "Meta's format, or Mistral's", "python3 src/transformers/models/llama/"
         "convert_llama_weights_to_hf.py --input_dir @ --output_dir OUT, in transformers' repository, or "
         "mistral/convert_mistral_weights_to_hf.py @ OUT"},
        {"consolidated*.safetensors", "Mistral's format", "python3 src/transformers/models/mistral/"
         "convert_mistral_weights_to_hf.py @ OUT, in transformers' repository"},
        {"checkpoint-*", "a folder of a Trainer", "name that one: @/#"},
        {"*.safetensors", "a file of tensors", "if it is the whole model, call it model.safetensors"}};
    int best = (int)(sizeof others / sizeof others[0]);
    char found[256] = "";
    DIR* d = opendir(dir);
    for (struct dirent* entry; d && (entry = readdir(d)) != NULL;)
        for (int i = 0; i < best; i++)
            if (!fnmatch(others[i].pattern, entry->d_name, 0)) {
                snprintf(found, sizeof found, "%s", entry->d_name);
                best = i;
            }
    if (d) closedir(d);
    if (!*found) return;
    Text t = {NULL, 0, 0};
    for (const char* s = others[best].remedy; *s; s++)
        if (*s == '@' || *s == '#') {
            const char* name = *s == '@' ? dir : found;
            text_print(&t, "%s", strpbrk(name, " '\"$`\\*?!&|;<>()") ? *s == '@' ? "DIR" : "FILE" : name);
        }
        else text_add(&t, s, 1);
    set_error(error, "%s: no model.safetensors; %s is %s: %s", dir, found, others[best].what, t.data);
    free(t.data);
}

// Opens DIR/model.safetensors, or the shards that DIR/model.safetensors.index.json names; of these every tensor counts,
// as in transformers, whatever the index says of it.
static SafeTensors* safetensors_open_model(const char* dir, Error* error) {
    char path[PATH_SIZE], index_path[PATH_SIZE];
    join_path(path, dir, "model.safetensors");
    join_path(index_path, dir, "model.safetensors.index.json");
    if (access(index_path, F_OK) && access(path, F_OK)) explain_missing(dir, error);
    if (access(index_path, F_OK) || !access(path, F_OK)) return error->text[0] ? NULL : safetensors_open(path, error);
    Json* index = json_read(index_path, error);
    if (!index) return NULL;
    const Json* map = json_get(index, "weight_map");
    SafeTensors* s = (SafeTensors*)checked_malloc(sizeof(SafeTensors));
    memset(s, 0, sizeof *s);
    if (!map || map->type != JSON_OBJECT || map->count == 0) set_error(error, "%s: no weight_map", index_path);
    for (int i = 0; map && i < map->count && !error->text[0]; i++) {
        const char* file = map->items[i]->type == JSON_STRING ? map->items[i]->string : "";
        if (!*file || strchr(file, '/') || strchr(file, '\\') || file[0] == '.' || strlen(file) > 255) {
            set_error(error, "%s: weight_map sends %.80s to \"%.80s\", which is not a file name in this directory",
                      index_path, map->items[i]->key, file);
            break;
        }
        join_path(path, dir, file);
        int known = 0;
        for (int k = 0; k < s->num_files; k++) known |= !strcmp(s->paths[k], path);
        if (!known) safetensors_add_file(s, path, error);
    }
    if (!error->text[0]) safetensors_finish(s, error);
    NameList absent = {{NULL, 0, 0}, 0}, unlisted = {{NULL, 0, 0}, 0};
    for (int i = 0; map && i < map->count && !error->text[0]; i++) {
        StoredTensor* t = safetensors_find(s, map->items[i]->key);
        const char* file = t ? strrchr(s->paths[t->file], '/') + 1 : NULL;
        if (!t || strcmp(file, map->items[i]->string)) list_name(&absent, map->items[i]->key);
    }
    for (int i = 0; i < s->num_tensors && !error->text[0]; i++)
        if (!json_get(map, s->tensors[i].name)) list_name(&unlisted, s->tensors[i].name);
    names_note(s, &absent, "entries of the index whose shard does not hold the tensor", error);
    names_note(s, &unlisted, "that the index does not name tensors, which are used", error);
    if (error->text[0] && strict) {
        Error inner = *error;
        error->text[0] = 0;
        set_error(error, "%s: %s", index_path, inner.text);
    }
    json_free(index);
    if (!error->text[0]) return s;
    safetensors_close(s);
    return NULL;
}

static float bf16_to_float(uint16_t h) {
    union { uint32_t bits; float value; } u;
    u.bits = (uint32_t)h << 16;
    return u.value;
}

static float f16_to_float(uint16_t h) {
    union { uint32_t bits; float value; } u;
    uint32_t exponent = (h >> 10) & 31, fraction = h & 1023u;
    if (exponent == 0) u.value = (float)fraction * 5.9604644775390625e-08f;             // subnormal: fraction 2^-24
    else u.bits = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;      // 112 = 127 - 15, the biases
    u.bits |= (uint32_t)(h & 0x8000) << 16;
    return u.value;
}

// Reads `count` numbers from number `first` of a tensor on, as floats.
static int safetensors_read(const SafeTensors* s, const StoredTensor* t, long first, long count, float* out,
                            Error* error) {
    int size = t->dtype == DTYPE_F64 ? 8 : t->dtype == DTYPE_F32 ? 4 : 2;
    if (t->dtype > DTYPE_F64) return set_error(error, "tensor %.100s: " READABLE, t->name);
    unsigned char buffer[65536];
    for (long done = 0; done < count;) {
        long n = lmin(count - done, (long)sizeof buffer / size);
        if (!read_at(s->fds[t->file], buffer, (size_t)(n * size), t->offset + (first + done) * size))
            return set_error(error, "%s: tensor %.100s cannot be read", s->paths[t->file], t->name);
        if (size == 4) memcpy(out + done, buffer, (size_t)n * 4);
        for (long i = 0; size == 8 && i < n; i++) {
            double x;
            memcpy(&x, buffer + 8 * i, 8);
            out[done + i] = (float)x;
        }
        if (size == 2)
            for (long i = 0; i < n; i++) {
                uint16_t h = (uint16_t)(buffer[2 * i] | buffer[2 * i + 1] << 8);
                out[done + i] = t->dtype == DTYPE_BF16 ? bf16_to_float(h) : f16_to_float(h);
            }
        done += n;
    }
    return 1;
}

// A tensor to be written.
typedef struct {
    const char* name;
    const char* dtype;              // "F32" or "I32"
    int ndim;
    long shape[3];
    const void* data;
} OutTensor;

static long out_tensor_bytes(const OutTensor* t) {
    long bytes = 4;
    for (int i = 0; i < t->ndim; i++) bytes *= t->shape[i];
    return bytes;
}

// Writes a file and flushes it to the disk. On failure the error says why, and the file must not be used.
static int safetensors_write(const char* path, const OutTensor* tensors, int count, Error* error) {
    Text header = {NULL, 0, 0};
    text_print(&header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (long i = 0, at = 0; i < count; i++) {
        const OutTensor* t = &tensors[i];
        text_print(&header, ",");
        text_json_string(&header, t->name);
        text_print(&header, ":{\"dtype\":\"%s\",\"shape\":[", t->dtype);
        for (int k = 0; k < t->ndim; k++) text_print(&header, "%s%ld", k ? "," : "", t->shape[k]);
        text_print(&header, "],\"data_offsets\":[%ld,%ld]}", at, at + out_tensor_bytes(t));
        at += out_tensor_bytes(t);
    }
    text_print(&header, "}");
    while (header.length % 8) text_print(&header, " ");
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)header.length >> (8 * i));
    FILE* f = fopen(path, "wb");
    int ok = f && fwrite(prefix, 8, 1, f) == 1 && fwrite(header.data, header.length, 1, f) == 1;
    for (int i = 0; i < count && ok; i++) {
        size_t bytes = (size_t)out_tensor_bytes(&tensors[i]);
        ok = bytes == 0 || fwrite(tensors[i].data, bytes, 1, f) == 1;
    }
    ok = ok && fflush(f) == 0 && flush_to_disk(fileno(f)) == 0;
    if (!ok) set_error(error, "%s: %s", path, strerror(errno));
    if (f && fclose(f) && ok) ok = set_error(error, "%s: %s", path, strerror(errno));
    free(header.data);
    return ok;
}
