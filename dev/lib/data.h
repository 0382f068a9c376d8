// data.h: texts and shards of tokens, read in windows. Compiles alone.
//
// Raw text, in which every byte is a token or of which a tokenizer makes tokens, or shards of tokens as llm.c writes
// them: a header of 256 int32 (magic, version, number of tokens), then the tokens. Windows of T + 1 tokens start every
// T tokens and never cross files.
#pragma once
#include "random.h"

enum { SHARD_HEADER = 1024, SHARD_MAGIC_16 = 20240520, SHARD_MAGIC_32 = 20240801 };

// The text that is trained on when no --data is given: the project's own source files, written into this header when
// the program is built. Without `make` there is none.
#if defined(__has_include)
#if __has_include("../../build/embedded.h")
#include "../../build/embedded.h"
#define HAVE_EMBEDDED 1
#endif
#endif
#ifndef HAVE_EMBEDDED
static const unsigned char embedded_text[1] = {0};
static const long embedded_size = 0;
#endif

typedef enum { WHOLE, TRAIN_PART, VAL_PART } Part;      // of a raw text: all, all but the last tenth, the last tenth

typedef struct {
    char* path;
    int fd;                 // -1: the embedded text
    int width;              // bytes in a token: 1 raw text, 2 or 4 in shards
    int* ids;               // the tokens of a text that was encoded (encoded_take), or NULL: the file has them
    long size;              // bytes of the whole file
    long start;             // where this part's tokens start in it
    long count;             // tokens in this part
    long windows;
} DataFile;

typedef struct {
    DataFile* files;
    int num_files;
    int T, vocab_size, raw, encoded;    // raw = 1: bytes are tokens; encoded = 1: a tokenizer made tokens of a text
    const char* zeros;                  // NULL, or a file whose bytes are tokens, and that begins like no text
    long windows, tokens;
    unsigned char* buffer;              // (T + 1, 4) a window as it is in the file
    char error[512];                    // what was wrong with the last file or window
} Dataset;

// what a training run adds to messages: where the name of a missing file comes from; how to need less text
static const char *data_advice = "", *val_advice = "";

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static int data_error(Dataset* d, const char* format, ...) {       // always 0
    va_list args;
    va_start(args, format);
    vsnprintf(d->error, sizeof d->error, format, args);
    va_end(args);
    return 0;
}

static int32_t read_i32(const unsigned char* p) {
    return (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}

// Whether the model's tokens are the bytes of a text. PERHAPS: nothing says so, and nothing says otherwise.
typedef enum { NO_BYTES, BYTES, PERHAPS_BYTES } BytesAllowed;

static void warn_of_bytes(const char* text, int vocab_size) {
    fprintf(stderr, "%s: warning: %s is read as bytes, but nothing says what the model's %d tokens mean\n",
            program_name, text, vocab_size);
}

static int name_ends_in(const char* path, const char* ending) {
    size_t n = strlen(path), k = strlen(ending);
    return n > k && !strcasecmp(path + n - k, ending);
}

static void note_json(const char* path) {
    if (name_ends_in(path, ".json") || name_ends_in(path, ".jsonl") || name_ends_in(path, ".ndjson"))
        fprintf(stderr, "%s: note: %s is read as plain text, with JSON's braces and keys; data/tokenize_text.py makes "
                "token shards of the texts in JSON lines (*.jsonl)\n", program_name, path);
}

// The tokens of a text, for models with a tokenizer; NULL where nobody can make them. Ends the program if it fails.
static int* (*encode_file)(const char* path, long* count) = NULL;

// A text that was encoded, while files use it: those of its training and its validation part share the tokens.
typedef struct EncodedText {
    char* path;
    int *ids, users;
    long count;
    struct EncodedText* next;
} EncodedText;
static EncodedText* encoded_texts;

static int* encoded_take(const char* path, long* count) {
    EncodedText* e = encoded_texts;
    while (e && strcmp(e->path, path)) e = e->next;
    if (!e) {
        EncodedText made = {copy_string(path), NULL, 0, 0, encoded_texts};
        made.ids = encode_file(path, &made.count);
        e = encoded_texts = (EncodedText*)checked_malloc(sizeof *e);
        *e = made;
    }
    e->users++;
    *count = e->count;
    return e->ids;
}

static void encoded_drop(const int* ids) {
    EncodedText** at = &encoded_texts;
    while (*at && (*at)->ids != ids) at = &(*at)->next;
    EncodedText* e = *at;
    if (!e || --e->users > 0) return;
    *at = e->next;
    free(e->path);
    free(e->ids);
    free(e);
}

#define TABLE_ADVICE "data/tokenize_text.py --tokenizer DIR --out NAME FILE.. makes shards of a column of such files"

// What is plainly no text, by its first bytes, and what makes a text or token shards of it.
static const struct {
    const char *magic, *what, *advice;
} not_text[] = {
    {"\x93NUMPY", "a NumPy array", "write its tokens behind a shard's header, see data/README.md"},
    {"\x1f\x8b", "compressed by gzip", "gunzip it first"},
    {"\x28\xb5\x2f\xfd", "compressed by zstd", "unzstd it first"},
    {"\xfd" "7zXZ", "compressed by xz", "unxz it first"},
    {"BZh91AY&SY", "compressed by bzip2", "bunzip2 it first"},
    {"PK\3\4", "a zip archive", "unzip it first"},
    {"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"},
    {"PAR1", "a Parquet table", TABLE_ADVICE},
    {"ARROW1", "an Arrow table", TABLE_ADVICE},
    {"\xff\xff\xff\xff", "an Arrow stream", TABLE_ADVICE},         // as datasets saves a folder
    {"MMIDIDX", "the index of a Megatron data set", "data/tokenize_text.py makes token shards of the text"},
    {"\x89HDF", "an HDF5 file", "write its text or tokens to a file"},
    {"%PDF-", "a PDF", "pdftotext makes a text of it"},
};

// Finds out what a file is and which part of it is used; 0 and d->error if it is of no use. The file is open, but for
// fd = -1, the embedded text.
static int data_file_inspect(Dataset* d, DataFile* f, Part part, BytesAllowed raw_allowed) {
    unsigned char header[SHARD_HEADER];
    const char* path = f->path;
    int T = d->T, have = (int)lmin(f->size, SHARD_HEADER);
    if (f->fd < 0) have = 0;
    else if (!read_at(f->fd, header, (size_t)have, 0)) return data_error(d, "%s: %s", path, strerror(errno));
    int magic = have >= 4 ? read_i32(header) : 0;
    if (magic == SHARD_MAGIC_16 || magic == SHARD_MAGIC_32) {
        int version = magic == SHARD_MAGIC_16 ? 1 : 7;
        if (have < SHARD_HEADER)
            return data_error(d, "%s: the header ends at byte %ld; a token shard's has 1024", path, f->size);
        if (read_i32(header + 4) != version)
            return data_error(d, "%s: version %d at byte 4, expected %d for magic %d", path, read_i32(header + 4),
                              version, magic);
        f->width = magic == SHARD_MAGIC_16 ? 2 : 4;
        f->start = SHARD_HEADER;
        f->count = read_i32(header + 8);
        if (f->count < 0 || SHARD_HEADER + f->count * f->width != f->size)
            return data_error(d, "%s: the header at byte 8 promises %ld tokens, which makes %ld bytes, but the file "
                              "has %ld", path, f->count, SHARD_HEADER + f->count * f->width, f->size);
        if (f->count < T + 1)
            return data_error(d, "%s: %ld tokens, but --seq %d needs at least %d", path, f->count, T, T + 1);
    } else {
        for (size_t i = 0; i < sizeof not_text / sizeof not_text[0]; i++) {
            size_t n = strlen(not_text[i].magic);
            if ((size_t)have >= n && !memcmp(header, not_text[i].magic, n))
                return data_error(d, "%s: %s, no text; %s", path, not_text[i].what, not_text[i].advice);
        }
        if (name_ends_in(path, ".bin"))
            return data_error(d, "%s: magic %d at byte 0; a .bin file of tokens starts with %d (uint16) or %d "
                              "(uint32), see data/README.md", path, magic, SHARD_MAGIC_16, SHARD_MAGIC_32);
        if (!raw_allowed && f->fd < 0)
            return data_error(d, "this model reads tokens; name a text or token shards with --data FILE");
        if (!raw_allowed && !encode_file)
            return data_error(d, "%s: text, but this model does not read bytes; make token shards with "
                              "data/tokenize_text.py", path);
        // a text has no zeros, tokens of two or four bytes do
        int zeros = have && memchr(header, 0, (size_t)have) != NULL;
        if (zeros && raw_allowed != BYTES)
            return data_error(d, "%s: no text, and no header of a token shard; data/tokenize_text.py makes shards",
                              path);
        if (zeros) d->zeros = path;
        if (part != VAL_PART) note_json(path);
        long all = f->size;
        f->width = 1;
        if (!raw_allowed) f->ids = encoded_take(path, &all), f->width = (int)sizeof(int);
        const char* unit = f->ids ? "tokens" : "bytes";
        long val = all / 10 > T + 1 ? all / 10 : T + 1;    // the last tenth, at least one window
        f->start = (part == VAL_PART ? all - val : 0) * f->width;
        f->count = part == WHOLE ? all : part == VAL_PART ? val : all - val;
        if (part == WHOLE && all < T + 1)
            return data_error(d, "%s: %ld %s, but --seq %d needs at least %d", path, all, unit, T, T + 1);
        if (part != WHOLE && all < 2L * (T + 1))
            return data_error(d, "%s: %ld %s, but --seq %d needs at least %d (half of them for validation%s)", path,
                              all, unit, T, 2 * (T + 1), val_advice);
    }
    f->windows = (f->count - 1) / T;
    return 1;
}

static int data_file_open(Dataset* d, DataFile* f, const char* path, Part part, BytesAllowed raw_allowed) {
    struct stat st;
    memset(f, 0, sizeof *f);
    f->path = copy_string(path);
    f->fd = -1;
    f->size = embedded_size;
    if (strcmp(path, "<embedded>")) {
        f->fd = open(path, O_RDONLY);
        if (f->fd < 0)
            return data_error(d, "%s: %s; expected a text or a .bin file of tokens%s", path, strerror(errno),
                              data_advice);
        if (fstat(f->fd, &st)) return data_error(d, "%s: %s", path, strerror(errno));
        if (S_ISDIR(st.st_mode))
            return data_error(d, "%s: a directory; name the files in it (of *.parquet and *.arrow "
                              "data/tokenize_text.py makes shards)", path);
        if (!S_ISREG(st.st_mode)) return data_error(d, "%s: not a regular file", path);
        f->size = (long)st.st_size;
    } else if (embedded_size == 0) {
        return data_error(d, "this build has no embedded text: build with `make`, or name a text with --data FILE");
    }
    return data_file_inspect(d, f, part, raw_allowed);
}

// A hash of 16 pieces of a file, spread over all of it: what tells it from another one of the same name and size.
static uint64_t data_file_hash(const DataFile* f) {
    enum { PIECES = 16, PIECE = 64 };
    unsigned char buffer[PIECE];
    uint64_t hash = 0;
    for (long i = 0, n = lmin(PIECE, f->size); i < PIECES; i++) {
        long at = (long)((double)(f->size - n) * (double)i / (PIECES - 1));
        const unsigned char* p = f->fd < 0 ? embedded_text + at : buffer;
        if (f->fd >= 0 && !read_at(f->fd, buffer, (size_t)n, at)) return 0;
        for (long k = 0; k < n; k++) hash = (hash ^ p[k]) * 0x100000001B3ull;
    }
    return hash;
}

// Opens the files of a comma-separated list of names and patterns; each pattern's files are sorted by name.
// raw_allowed = NO_BYTES: a text becomes tokens by encode_file, and is refused without it.
static Dataset* dataset_open(const char* list, int T, int vocab_size, Part part, BytesAllowed raw_allowed) {
    Dataset* d = (Dataset*)checked_malloc(sizeof(Dataset));
    memset(d, 0, sizeof *d);
    d->T = T;
    d->vocab_size = vocab_size;
    d->buffer = (unsigned char*)checked_malloc(4 * ((size_t)T + 1));
    struct rlimit limit;            // each shard stays open: allow as many as the system does
    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    char *names = copy_string(list), *rest = names, *name;
    while ((name = next_path(&rest)) != NULL) {
        glob_t found;
        memset(&found, 0, sizeof found);
        // a name without a match stands for itself, so that opening it says what is wrong
        if (glob(name, GLOB_NOCHECK, NULL, &found)) die(2, "%s: the file name or pattern cannot be read", name);
        for (size_t i = 0; i < found.gl_pathc; i++) {
            d->files = (DataFile*)realloc(d->files, sizeof(DataFile) * (d->num_files + 1));
            if (!d->files) die(1, "out of memory");
            DataFile* f = &d->files[d->num_files++];
            if (!data_file_open(d, f, found.gl_pathv[i], part, raw_allowed)) die(2, "%s", d->error);
            if (d->num_files > 1 && ((f->width == 1) != d->raw || (f->ids != NULL) != d->encoded))
                die(2, "%s: text and token shards cannot be mixed in one run", f->path);
            d->raw = f->width == 1;
            d->encoded = f->ids != NULL;
            d->windows += f->windows;
            d->tokens += f->count;
        }
        globfree(&found);
    }
    free(names);
    if (d->raw && raw_allowed == PERHAPS_BYTES && part != VAL_PART) warn_of_bytes(list, vocab_size);
    return d;
}

static void dataset_close(Dataset* d) {
    for (int i = 0; i < d->num_files; i++) {
        if (d->files[i].fd >= 0) close(d->files[i].fd);
        free(d->files[i].path);
        encoded_drop(d->files[i].ids);
    }
    free(d->files);
    free(d->buffer);
    free(d);
}

// Window number w (in file order): tokens (T) and targets (T), the tokens that follow them. 0 and d->error if it cannot
// be read or holds a token that the vocabulary does not have.
static int dataset_read(Dataset* d, long w, int* tokens, int* targets) {
    DataFile* f = d->files;
    for (; w >= f->windows; f++) w -= f->windows;
    int T = d->T;
    long offset = f->start + w * T * f->width;
    const unsigned char* p = embedded_text + offset;
    if (f->ids) {
        p = (const unsigned char*)f->ids + offset;
    } else if (f->fd >= 0) {
        p = d->buffer;
        if (!read_at(f->fd, d->buffer, ((size_t)T + 1) * f->width, offset)) {
            return data_error(d, "%.300s: cannot read %d tokens at byte %ld; has the file changed?", f->path, T + 1,
                              offset);
        }
    }
    for (int t = 0; t <= T; t++) {
        long token = f->width == 1 ? p[t] : f->width == 2 ? p[2 * t] | p[2 * t + 1] << 8 : read_i32(p + 4L * t);
        if (token < 0 || token >= d->vocab_size) {
            return data_error(d, "%.300s: token %ld at byte %ld; the vocabulary has 0 to %d", f->path, token,
                              offset + (long)t * f->width, d->vocab_size - 1);
        }
        if (t < T) tokens[t] = (int)token;
        if (t > 0) targets[t - 1] = (int)token;
    }
    return 1;
}

// The same where there is nothing to lose: bad data ends the program.
static void dataset_window(Dataset* d, long w, int* tokens, int* targets) {
    if (!dataset_read(d, w, tokens, targets)) die(2, "%s", d->error);
}

// Reads all shards once before a new run starts: a token that the vocabulary does not have is better found now than in
// the middle of the night. (Bytes are all in their vocabulary.)
static void dataset_check(Dataset* d) {
    enum { MOST = 16384 };
    unsigned char buffer[MOST * 4];
    for (int i = 0; i < d->num_files && !d->raw; i++) {
        const DataFile* f = &d->files[i];
        for (long k = f->start / f->width, end = k + f->count; f->ids && k < end; k++)
            if (f->ids[k] < 0 || f->ids[k] >= d->vocab_size)
                die(2, "%s: its token %ld is %d by tokenizer.json; the model's vocabulary has 0 to %d", f->path, k,
                    f->ids[k], d->vocab_size - 1);
        if (f->ids) continue;
        for (long first = 0; first < f->count; first += MOST) {
            long n = lmin(MOST, f->count - first), offset = f->start + first * f->width;
            if (!read_at(f->fd, buffer, (size_t)(n * f->width), offset))
                die(1, "%s: cannot be read at byte %ld", f->path, offset);
            for (long k = 0; k < n; k++) {
                long token = f->width == 2 ? buffer[2 * k] | buffer[2 * k + 1] << 8 : read_i32(buffer + 4 * k);
                if (token < 0 || token >= d->vocab_size)
                    die(2, "%s: token %ld at byte %ld; the vocabulary has 0 to %d", f->path, token,
                        offset + k * f->width, d->vocab_size - 1);
            }
        }
    }
}

// Sequence number `index` of training: every window once an epoch, in an order that (seed, epoch) fixes. So the
// position in the data is a function of the step, and a resumed run needs to remember nothing else. Returns as
// dataset_read.
static int dataset_training_sequence(Dataset* d, uint64_t seed, long index, int* tokens, int* targets) {
    uint64_t key = random_key(seed, hash_string("order"), (uint64_t)(index / d->windows), 0);
    return dataset_read(d, random_permutation(index % d->windows, d->windows, key), tokens, targets);
}

// Room for B sequences: a batch, or all of a step.
typedef struct {
    int *tokens, *targets;              // (B, T)
} Batch;

static Batch batch_create(long B, int T) {
    Batch batch;
    batch.tokens = (int*)checked_malloc(sizeof(int) * 2 * (size_t)B * (size_t)T);
    batch.targets = batch.tokens + B * T;
    return batch;
}

// Where a run stands. After another B, T or accum, its step alone does not tell what it has read.
typedef struct {
    long step, sequences, tokens;
} Position;

static Position position_after(Position begun, long step, long sequences_per_step, long T) {
    long more = (step - begun.step) * sequences_per_step;
    Position p = {step, begun.sequences + more, begun.tokens + more * T};
    return p;
}
