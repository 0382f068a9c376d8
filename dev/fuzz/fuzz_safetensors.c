// libFuzzer target: any bytes as a safetensors file, or, if they begin with {, as the index of a folder with one shard,
// a.safetensors. What opens is read, and loaded as a model. Built and run by dev/fuzz/run.sh.
#define TRAIN_MOE_NO_MAIN
#include "../../train_moe.c"

#include <sys/mman.h>

static int memory_file = -1;
static char memory_path[64], folder[] = "build/fuzz/folder.XXXXXX";
static Model* model = NULL;

// a model of a few dozen numbers: a seed in the corpus (see run.sh) is a checkpoint of it
static Model* tiny_model(void) {
    static const char* text =
        "{\"model_type\": \"qwen3_moe\", \"vocab_size\": 5, \"hidden_size\": 2, \"num_hidden_layers\": 1, "
        "\"num_attention_heads\": 1, \"num_key_value_heads\": 1, \"head_dim\": 2, \"num_experts\": 2, "
        "\"num_experts_per_tok\": 1, \"moe_intermediate_size\": 3, \"tie_word_embeddings\": true}";
    Error error = {""};
    Config c;
    Json* j = json_parse(text, strlen(text), &error);
    if (!j || !config_from_json(&c, j, &error)) abort();
    json_free(j);
    return model_create(&c, FOR_SCORING, 1, 1, 1, NULL);
}

static void setup(void) {
    memory_file = memfd_create("safetensors", 0);
    snprintf(memory_path, sizeof memory_path, "/proc/self/fd/%d", memory_file);
    model = tiny_model();
    const char* seed = getenv("WRITE_SEED");        // run.sh asks for a valid file to start from
    char shard[64];
    if (!mkdtemp(folder)) die(1, "%s: %s", folder, strerror(errno));
    snprintf(shard, sizeof shard, "%s/a.safetensors", folder);
    OutTensor tensors[64];
    int count = 0;
    for (; count < model->layout.count && count < 64; count++) {
        const Tensor* t = &model->layout.tensors[count];
        OutTensor o = {t->name, "F32", tensor_is_matrix(t) ? 2 : 1, {t->rows, t->cols, 0}, model->params + t->offset};
        tensors[count] = o;
    }
    Error error = {""};
    if (!safetensors_write(shard, tensors, count, &error) || (seed && !safetensors_write(seed, tensors, count, &error)))
        die(1, "%s", error.text);
}

static SafeTensors* open_folder(const uint8_t* data, size_t size, Error* error) {
    char path[96];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", folder);
    FILE* f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f)) abort();
    return safetensors_open_model(folder, error);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (!model) setup();
    if (ftruncate(memory_file, 0) || pwrite(memory_file, data, size, 0) != (ssize_t)size) abort();
    Error error = {""}, load_error = {""};
    int index = size > 0 && data[0] == '{';
    SafeTensors* s = index ? open_folder(data, size, &error) : safetensors_open(memory_path, &error);
    if (!s != !!error.text[0]) abort();             // an error, or a file
    if (!s) return 0;
    long end = 0;
    for (int i = 0; i < s->num_tensors; i++) {
        StoredTensor* t = &s->tensors[i];
        if (safetensors_find(s, t->name) != t || t->offset < 8) abort();
        if (!index && t->offset + t->bytes > (long)size) abort();
        float* out = (float*)checked_malloc(sizeof(float) * (size_t)t->count);
        Error ignored = {""};
        safetensors_read(s, t, 0, t->count, out, &ignored);
        free(out);
        end += t->bytes;
    }
    if (!index && end > (long)size) abort();        // tensors that share bytes
    if (!load_tensors(model, s, model->params, "", &load_error) && !load_error.text[0]) abort();
    safetensors_close(s);
    return 0;
}
