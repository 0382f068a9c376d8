// libFuzzer target: any bytes as JSON, and what parses as a config.json and as a trainer.json. Built and run by dev/fuzz/run.sh.
#define TRAIN_MOE_NO_MAIN
#include "../../train_moe.c"

// What was read must come back from what is written: config.json is the one file that both programs depend on.
static void check_round_trip(const Config* c) {
    Text text = {NULL, 0, 0};
    Error error = {""};
    Config back;
    config_to_json(&text, c);
    Json* j = json_parse(text.data, text.length, &error);
    if (!j) {
        fprintf(stderr, "config_to_json wrote what is not JSON: %s\n%s\n", error.text, text.data);
        abort();
    }
    if (!config_from_json(&back, j, &error) && !strstr(error.text, "mlp_only_layers")) {
        fprintf(stderr, "config_from_json refuses what config_to_json wrote: %s\n%s\n", error.text, text.data);
        abort();
    }
    json_free(j);
    free(text.data);
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
    Json* j = json_parse((const char*)data, size, &error);
    if (!j != !!error.text[0]) abort();             // an error, or a value
    if (!j) return 0;
    if (config_from_json(&config, j, &error)) check_round_trip(&config);
    else if (!error.text[0]) abort();
    check_trainer(j);
    json_free(j);
    return 0;
}
