// libFuzzer target: any bytes as a text or token shard. What opens is read, window by window. Built and run by
// dev/fuzz/run.sh.
#define TRAIN_MOE_NO_MAIN
#include "../../train_moe.c"

// The first byte chooses the length of a window, the part of a text and whether bytes are tokens; the rest is the file.
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static int memory_file = -1;
    int tokens[16], targets[16];
    char path[] = "shard";
    Dataset d;
    DataFile f;
    if (size == 0) return 0;
    if (memory_file < 0) memory_file = memfd_create("data", 0);
    size--;
    if (ftruncate(memory_file, 0) || pwrite(memory_file, data + 1, size, 0) != (ssize_t)size) abort();
    memset(&d, 0, sizeof d);
    memset(&f, 0, sizeof f);
    d.T = 1 + (data[0] & 15);
    d.vocab_size = 300;
    d.files = &f;
    d.num_files = 1;
    d.buffer = (unsigned char*)checked_malloc(4 * ((size_t)d.T + 1));
    f.path = path;
    f.fd = memory_file;
    f.size = (long)size;
    if (data_file_inspect(&d, &f, (Part)((data[0] >> 4) % 3), (BytesAllowed)((data[0] >> 6) % 3))) {
        if (f.windows < 1) abort();
        for (long w = 0; w < f.windows; w++)
            if (!dataset_read(&d, w, tokens, targets) && !strstr(d.error, "the vocabulary has")) abort();
        data_file_hash(&f);
    } else if (!d.error[0]) {
        abort();
    }
    free(d.buffer);
    return 0;
}
