// libFuzzer target: any bytes as JSON, and what parses as a config.json and as a trainer.json.
// Built and run by dev/fuzz/run.sh.
#define TRAIN_MOE_NO_MAIN
#include "../../train_moe.c"

// What was read must come back from what is written, with every member that is not ours as it was, and the second time
// nothing changes: config.json is the one file that both programs depend on.
static void check_round_trip(const Config* c, const Json* luggage) {
    Text text[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
    Json* now = NULL;
    for (int pass = 0; pass < 2; pass++) {
        Error error = {""};
        Config back;
        config_to_json(&text[pass], c, pass ? now : luggage, "float32");
        Json* j = json_parse(text[pass].data, text[pass].length, &error);
        if (!j || !config_from_json(&back, j, &error)) {
            fprintf(stderr, "config_to_json wrote what cannot be read: %s\n%s\n", error.text, text[pass].data);
            abort();
        }
        if (memcmp(c, &back, sizeof back)) abort();
        if (!pass) now = j;
        else json_free(j);
    }
    for (int i = 0; i < luggage->count; i++) {
        const Json* v = luggage->items[i];
        const char* value = json_raw(now, v->key);
        if (!key_is_owned(c, v->key) && (!value || strcmp(value, v->raw))) abort();
    }
    if (strcmp(text[0].data, text[1].data)) abort();
    json_free(now);
    free(text[0].data);
    free(text[1].data);
}

// Where a run stands is never negative, whatever its trainer.json says.
static void check_trainer(const Json* j) {
    DataFile file;
    Dataset d;
    Text what = {NULL, 0, 0};
    memset(&file, 0, sizeof file);
    memset(&d, 0, sizeof d);
    file.fd = -1;
    d.files = &file;
    d.num_files = 1;
    Position p = trainer_position(j);
    if (p.step >= 0 && (p.sequences < 0 || p.tokens < 0)) abort();
    list_other_files(&what, "data", json_get(j, "data_files"), &d);
    free(what.data);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Error error = {""};
    Config config;
    int layers;
    Json* j = json_parse((const char*)data, size, &error);
    if (!j != !!error.text[0]) abort();             // an error, or a value
    if (!j) return 0;
    if (config_from_json(&config, j, &error)) {
        check_round_trip(&config, j);
        if (active_window(j, &config, &layers) < 0 || layers < 0 || layers > config.num_layers) abort();
    } else if (!error.text[0]) abort();
    check_trainer(j);
    json_free(j);
    return 0;
}
