// libFuzzer target: bytes up to the first zero as a tokenizer.json, the rest as a text for it. Every token is one that
// the file gave, and a text that was encoded once is encoded the same again. Built and run by dev/fuzz/run.sh.
#define TRAIN_MOE_NO_MAIN
#include "../../train_moe.c"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Error error = {""};
    const uint8_t* zero = (const uint8_t*)memchr(data, 0, size);
    size_t json = zero ? (size_t)(zero - data) : size;
    Json* j = json_parse((const char*)data, json, &error);
    if (tokenizer_size(j) < 0) abort();
    Encoder* e = j ? encoder_make(j, &error) : NULL;
    if (e && zero) {
        long count = 0, again = 0;
        int* ids = encode(e, (const char*)zero + 1, size - json - 1, 1, &count, &error);
        int* twice = encode(e, (const char*)zero + 1, size - json - 1, 1, &again, &error);
        if (count != again || (ids && memcmp(ids, twice, sizeof(int) * (size_t)count))) abort();
        for (long i = 0; ids && i < count; i++)
            if (ids[i] < 0 && e->num_before + e->num_after == 0) abort();
        free(ids);
        free(twice);
    }
    encoder_free(e);
    json_free(j);
    return 0;
}
