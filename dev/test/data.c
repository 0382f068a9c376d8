/*
data.c: texts and token shards, the order of their windows, and random numbers.
*/
static void put_i32(Text* t, long value) {
    char bytes[4] = {(char)value, (char)(value >> 8), (char)(value >> 16), (char)(value >> 24)};
    text_add(t, bytes, 4);
}

// A shard of `count` tokens (token i is first + i) whose header has these numbers; it promises `promised` tokens.
static void write_shard(const char* path, long magic, long version, long promised, int width, long count, long first) {
    Text t = {NULL, 0, 0};
    put_i32(&t, magic);
    put_i32(&t, version);
    put_i32(&t, promised);
    while (t.length < SHARD_HEADER) put_i32(&t, 0);
    for (long i = 0; i < count; i++) {
        char bytes[4] = {(char)(first + i), (char)((first + i) >> 8), (char)((first + i) >> 16),
                         (char)((first + i) >> 24)};
        text_add(&t, bytes, (size_t)width);
    }
    write_bytes(path, t.data, t.length);
    free(t.data);
}

// window w of the data set starts with token `first` and goes on by ones
static int window_is(Dataset* d, long w, int first) {
    int tokens[64], targets[64], ok = 1;
    dataset_window(d, w, tokens, targets);
    for (int t = 0; t < d->T; t++) ok &= tokens[t] == first + t && targets[t] == first + t + 1;
    return ok;
}

static void test_windows(void) {
    unsigned char text[250];
    for (int i = 0; i < 250; i++) text[i] = (unsigned char)i;
    write_bytes(temp("text"), text, 250);
    // T = 8: windows of 9 tokens start every 8; the last tenth, 25 bytes, is for validation
    Dataset *all = dataset_open(temp("text"), 8, 256, WHOLE, BYTES),
            *part = dataset_open(temp("text"), 8, 256, TRAIN_PART, BYTES);
    Dataset* val = dataset_open(temp("text"), 8, 256, VAL_PART, BYTES);
    check(all->raw && all->tokens == 250 && all->windows == 31 && window_is(all, 0, 0) && window_is(all, 1, 8) &&
              window_is(all, 30, 240),
          "text: windows of T + 1 tokens start every T");
    check(part->tokens == 225 && part->windows == 28 && window_is(part, 27, 216),
          "text: training has all but the last tenth");
    check(val->tokens == 25 && val->windows == 3 && window_is(val, 0, 225) && window_is(val, 2, 241),
          "text: validation has the last tenth");
    dataset_close(all);
    dataset_close(part);
    dataset_close(val);
    write_bytes(temp("text"), text, 60);
    part = dataset_open(temp("text"), 8, 256, TRAIN_PART, BYTES);
    val = dataset_open(temp("text"), 8, 256, VAL_PART, BYTES);
    check(part->tokens == 51 && val->tokens == 9 && val->windows == 1 && window_is(val, 0, 51),
          "short text: validation has one whole window");
    dataset_close(part);
    dataset_close(val);
    write_bytes(temp("text"), text, 9);
    all = dataset_open(temp("text"), 8, 256, WHOLE, BYTES);
    check(all->windows == 1 && window_is(all, 0, 0), "a text of T + 1 bytes is one window");
    dataset_close(all);
    write_bytes(temp("text"), text, 17);
    all = dataset_open(temp("text"), 8, 256, WHOLE, BYTES);
    check(all->windows == 2 && window_is(all, 1, 8), "a text of 2 T + 1 bytes is two windows");
    dataset_close(all);
}

static void test_shards(void) {
    write_shard(temp("s_1.bin"), SHARD_MAGIC_16, 1, 9, 2, 9, 60000); // exactly one window
    write_shard(temp("s_0.bin"), SHARD_MAGIC_32, 7, 30, 4, 30, 100000); // 3 windows, 5 tokens are left over
    write_shard(temp("other.bin"), SHARD_MAGIC_16, 1, 17, 2, 17, 500);
    Dataset* d = dataset_open(temp("s_1.bin"), 8, 70000, TRAIN_PART, NO_BYTES);
    check(!d->raw && d->windows == 1 && d->tokens == 9 && window_is(d, 0, 60000),
          "uint16 shard of T + 1 tokens: used whole, one window");
    dataset_close(d);
    d = dataset_open(temp("s_0.bin"), 8, 200000, VAL_PART, NO_BYTES);
    check(d->windows == 3 && d->tokens == 30 && window_is(d, 2, 100016), "uint32 shard");
    dataset_close(d);
    char list[2000];
    snprintf(list, sizeof list, "%s,%s", temp("other.bin"), temp("s_*.bin"));
    d = dataset_open(list, 8, 200000, WHOLE, NO_BYTES);
    check(d->num_files == 3 && d->windows == 6 && window_is(d, 0, 500) && window_is(d, 1, 508) &&
              window_is(d, 2, 100000) && window_is(d, 4, 100016) && window_is(d, 5, 60000),
          "a list and a pattern: in the list's order, a pattern's files by name");
    // training visits every window once an epoch; batches may straddle epochs
    int tokens[8], targets[8], seen[6], firsts[30], same_order = 1, other_seed = 1, once = 1;
    static const int starts[] = {500, 508, 100000, 100008, 100016, 60000};
    for (int epoch = 0; epoch < 5; epoch++) {
        memset(seen, 0, sizeof seen);
        for (int i = 0; i < 6; i++) {
            dataset_training_sequence(d, 3, epoch * 6 + i, tokens, targets);
            for (int w = 0; w < 6; w++) seen[w] += tokens[0] == starts[w];
            firsts[epoch * 6 + i] = tokens[0];
            same_order &= tokens[0] == firsts[i];
            dataset_training_sequence(d, 4, epoch * 6 + i, tokens, targets);
            other_seed &= tokens[0] == firsts[epoch * 6 + i];
        }
        for (int w = 0; w < 6; w++) once &= seen[w] == 1;
    }
    check(once, "training visits each window once an epoch");
    check(!same_order && !other_seed, "the order is another one in every epoch and for every seed");
    dataset_close(d);
}

// Our logarithm and cosine against the library's, at the ends and at a million places between; moments of the draws.
static void test_normal(void) {
    double log_error = 0, cos_error = 0, sum = 0, squares = 0;
    enum { COUNT = 1 << 20 };
    for (long i = 0; i < COUNT; i++) {
        long k = i < 1000 ? i : i < 2000 ? (1 << 24) - 1 - (i - 1000) : (long)(mix64((uint64_t)i) >> 40);
        double u = ((double)k + 0.5) / 16777216.0, x = random_normal(mix64((uint64_t)i));
        log_error = larger(log_error, fabs(unit_log(u) / log(u) - 1));
        cos_error = larger(cos_error, fabs(unit_cos(u) - cos(2 * M_PI * u)));
        sum += x;
        squares += x * x;
    }
    check(log_error < 1e-15, "ln u: relative error %.1e", log_error);
    check(cos_error < 1e-15, "cos 2 pi u: error %.1e", cos_error);
    check(fabs(sum / COUNT) < 4e-3 && fabs(squares / COUNT - 1) < 6e-3, "normal draws: mean %.1e, variance %.4f",
          sum / COUNT, squares / COUNT);
}

static void test_permutation(void) {
    static const long sizes[] = {1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 65537};
    int bijection = 1, moved = 1;
    for (EACH(s, sizes)) {
        char* hit = (char*)kept_malloc((size_t)sizes[s]);
        long fixed = 0;
        memset(hit, 0, (size_t)sizes[s]);
        for (long i = 0; i < sizes[s]; i++) {
            long p = random_permutation(i, sizes[s], 12345 + s);
            bijection &= p >= 0 && p < sizes[s] && !hit[p];
            if (p >= 0 && p < sizes[s]) hit[p] = 1;
            fixed += p == i;
        }
        if (sizes[s] >= 255) moved &= fixed < 12;
    }
    check(bijection, "the random permutation is a bijection for 1 to 65537 elements");
    check(moved, "the random permutation leaves few elements in place");
}

// what a run says to data that it cannot use; nothing is written
static void check_data_error(const char* what, const char* data, const char* more, const char* expected,
                             const char* file) {
    int code = run_program("--data %s --out %s --layers 1 --hidden 8 --heads 1 --batch 1 --seq 8 --steps 3 %s", data,
                           temp("none"), more);
    check(code == 2 && error_lines() == 1 && strstr(ran.err, expected) && strstr(ran.err, file), "%s: %s", what,
          ran.err);
    if (strstr(what, "token ")) remove_tree(temp("none")); // found while training: the run has begun
    check(!exists(temp("none")), "%s: nothing is written", what);
    remove_tree(temp("none"));
}

static void test_data_errors(void) {
    char bin[512], text[512], list[1100];
    snprintf(bin, sizeof bin, "%s", temp("bad.bin"));
    snprintf(text, sizeof text, "%s", temp("text"));
    write_bytes(bin, "\1\2\3\4 something else", 19);
    check_data_error("wrong magic", bin, "", "magic 67305985 at byte 0", "bad.bin");
    write_bytes(bin, "", 0);
    check_data_error("empty .bin", bin, "", "magic", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 2, 30, 2, 30, 0);
    check_data_error("wrong version", bin, "--vocab 50", "version 2 at byte 4, expected 1", "bad.bin");
    write_shard(bin, SHARD_MAGIC_32, 1, 30, 4, 30, 0);
    check_data_error("wrong version of uint32", bin, "--vocab 50", "version 1 at byte 4, expected 7", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 31, 2, 30, 0);
    check_data_error("fewer tokens than promised", bin, "--vocab 50",
                     "promises 31 tokens, which makes 1086 bytes, but the file has 1084", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 29, 2, 30, 0);
    check_data_error("more tokens than promised", bin, "--vocab 50", "promises 29 tokens", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, -1, 2, 30, 0);
    check_data_error("negative count", bin, "--vocab 50", "promises -1 tokens", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 8, 2, 8, 0);
    check_data_error("shard too short", bin, "--vocab 50", "8 tokens, but --seq 8 needs at least 9", "bad.bin");
    write_shard(bin, SHARD_MAGIC_16, 1, 30, 2, 30, 30);
    check_data_error("token outside the vocabulary", bin, "--vocab 50",
                     "token 50 at byte 1064; the vocabulary has 0 to 49", "bad.bin");
    write_shard(bin, SHARD_MAGIC_32, 7, 12, 4, 12, -3);
    check_data_error("token below zero", bin, "--vocab 50", "token -3 at byte 1024; the vocabulary has 0 to 49",
                     "bad.bin");
    check_data_error("no --vocab", bin, "", "--vocab is missing", "");
    if (truncate(bin, 100)) die(1, "truncate: %s", strerror(errno));
    check_data_error("half a header", bin, "", "the header ends at byte 100", "bad.bin");
    write_text(text, "short");
    check_data_error("text too short", text, "--val none", "5 bytes, but --seq 8 needs at least 9", "text");
    write_text(text, "seventeen letters");
    check_data_error("text too short for two parts", text, "", "17 bytes, but --seq 8 needs at least 18 (half of them",
                     "text");
    write_text(text, "");
    check_data_error("empty text", text, "", "0 bytes", "text");
    write_corpus(text, 500);
    check_data_error("text for a small vocabulary", text, "--vocab 100", "does not read bytes", "text");
    write_shard(bin, SHARD_MAGIC_16, 1, 30, 2, 30, 0);
    snprintf(list, sizeof list, "%s,%s", text, bin);
    check_data_error("text and shards together", list, "--val none", "cannot be mixed", "bad.bin");
    write_text(temp("a,b.txt"), "seventeen letters");
    check_data_error("a comma in a name", temp("a,b.txt"), "", "17 bytes, but", "a,b.txt");
    check_data_error("missing file", temp("absent.txt"), "", "No such file", "absent.txt");
    check_data_error("pattern without a match", temp("absent*.txt"), "", "No such file", "absent*.txt");
    snprintf(list, sizeof list, "%s,", text);
    check_data_error("a comma too many", list, "", "No such file", "");
    check_data_error("directory", temp_dir, "", "a directory; name the files in it", temp_dir);
    check_data_error("device", "/dev/null", "", "not a regular file", "/dev/null");
    snprintf(list, sizeof list, "--val %s", temp("absent.txt"));
    check_data_error("missing --val", text, list, "No such file", "absent.txt");
}

// A text of JSON is a text, but hardly the one that is meant: a note says so, once.
static void test_json_note(void) {
    static const char* const names[] = {"web.jsonl", "web.JSON", "web.ndjson", "json", "web.jsonl.txt"};
    char line[200];
    memset(line, 'a', sizeof line);
    for (int i = 0; i < 5; i++) {
        write_bytes(temp("%s", names[i]), line, sizeof line);
        int code = run_program("--data %s --layers 1 --hidden 32 --experts 2 --steps 1 --batch 1 --seq 16 --out %s",
                               temp("%s", names[i]), temp("noted_%d", i));
        const char *note = strstr(ran.err, "is read as plain text"), *again = note ? strstr(note + 1, "note:") : NULL;
        check(code == 0 && (note != NULL) == (i < 3) && !again && (!note || strstr(note, "data/tokenize_text.py")),
              "%s: %s", names[i], ran.err);
    }
}

// Archives, tables and tokens without a header are no text, whatever they are called.
static void test_no_text(void) {
    static const struct {
        const char *magic, *says;
        int length;
    } files[] = {{"\x93NUMPY\1\0v\0{", "a NumPy array", 11}, {"\x1f\x8b\x08", "gunzip", 3},
                 {"\x28\xb5\x2f\xfd", "unzstd", 4},          {"PK\3\4", "unzip", 4},
                 {"PAR1", "Parquet", 4},                     {"MMIDIDX\0\0", "index of a Megatron", 9},
                 {"\xfd" "7zXZ\0", "unxz", 6},               {"BZh91AY&SY", "bunzip2", 10},
                 {"7z\xbc\xaf\x27\x1c", "7z", 6},            {"ARROW1", "Arrow", 6},
                 {"\x89HDF", "HDF5", 4},                     {"%PDF-1.4", "pdftotext", 8},
                 {"\xff\xff\xff\xff\x10", "an Arrow stream", 5}};
    char bytes[600];
    int all = sizeof files / sizeof files[0] == sizeof not_text / sizeof not_text[0];
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        memset(bytes, 'a', sizeof bytes);
        memcpy(bytes, files[i].magic, (size_t)files[i].length);
        write_bytes(temp("thing"), bytes, sizeof bytes);
        check_data_error(files[i].says, temp("thing"), "", files[i].says, "thing");
    }
    check(all, "every kind of file that is refused has been tried");
    write_bytes(temp("thing"), "%PDF is a format; PARIS", 23);
    Dataset* d = dataset_open(temp("thing"), 8, 256, WHOLE, BYTES);
    check(d->raw && d->windows == 2, "a text that begins almost like one is a text");
    dataset_close(d);
    memset(bytes, 0, sizeof bytes);
    for (int i = 0; i < 300; i++) bytes[2 * i] = (char)(i * 7);
    write_bytes(temp("TRAIN.BIN"), bytes, sizeof bytes);
    check_data_error("no header, .BIN", temp("TRAIN.BIN"), "", "a .bin file of tokens starts with", "TRAIN.BIN");
    write_bytes(temp("thing"), bytes, sizeof bytes);
    check_data_error("no header, --vocab 300", temp("thing"), "--vocab 300", "has no header of a token shard", "thing");
    int code = run_program("--data %s --seq 8 --batch 1 --layers 1 --hidden 16 --heads 2 --steps 0", temp("thing"));
    check(code == 0 && error_lines() == 1 && strstr(ran.err, "has zero bytes, as no text has"), "no header, bytes: %s",
          ran.err);
    Dataset other;
    memset(&other, 0, sizeof other);
    other.T = 8;
    DataFile f;
    int refused = !data_file_open(&other, &f, temp("thing"), WHOLE, PERHAPS_BYTES);
    check(refused && strstr(other.error, "no text, and no header"), "no header, a model of unknown tokens: %s",
          other.error);
    close(f.fd);
    free(f.path);
}

static void test_data(void) {
    test_windows();
    test_json_note();
    test_no_text();
    test_shards();
    test_normal();
    test_permutation();
    test_data_errors();
}
