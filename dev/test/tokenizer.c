/*
tokenizer.c: the tokens of a text are those of Hugging Face's tokenizers (dev/tokenizer/check.py --write-cases), and
what cannot be encoded is refused by name.
*/
static const char* const tokenizer_kinds[] = {"smollm", "llama3", "spm"};

static Encoder* encoder_of(const char* text, Error* error) {
    Json* j = json_parse(text, strlen(text), error);
    Encoder* e = j ? encoder_make(j, error) : NULL;
    json_free(j);
    return e;
}

static void test_tokenizer_cases(void) {
    for (int k = 0; k < 3; k++) {
        char path[PATH_SIZE];
        Error error = {""};
        size_t length = 0, size = 0;
        snprintf(path, sizeof path, "dev/tokenizer/cases/%s/tokenizer.json", tokenizer_kinds[k]);
        Json* j = json_read(path, &error);
        Encoder* e = j ? encoder_make(j, &error) : NULL;
        snprintf(path, sizeof path, "dev/tokenizer/cases/%s/ids.txt", tokenizer_kinds[k]);
        char *text = read_file("dev/tokenizer/cases/text.txt", 1 << 20, &length, &error),
             *wanted = read_file(path, 1 << 20, &size, &error), *at = wanted;
        long count = 0, same = 0;
        int* ids = e && text ? encode(e, text, length, 1, &count, &error) : NULL;
        for (long i = 0; i < count; i++) same += strtol(at, &at, 10) == ids[i];
        check(ids && same == count && !strcmp(at, "\n"), "%s: the tokens of `tokenizers`, %ld of %ld %s",
              tokenizer_kinds[k], same, count, error.text);
        free(ids);
        free(text);
        free(wanted);
        encoder_free(e);
        json_free(j);
    }
}

#define MODEL(vocab, merges) "{\"model\": {\"vocab\": {" vocab "}, \"merges\": [" merges "]}"
#define AB MODEL("\"a\": 0, \"b\": 1, \"ab\": 2", "\"a b\"")

static void test_tokenizer_refusals(void) {
    static const struct {
        const char *json, *says;
    } cases[] = {
        {"{\"model\": {\"type\": \"Unigram\", \"vocab\": []}}", "its model is Unigram, not BPE"},
        {AB ", \"normalizer\": {\"type\": \"Lowercase\"}}", "it asks for \"Lowercase\""},
        {AB ", \"normalizer\": {\"type\": \"ByteLevel\"}}", "its normalizer is ByteLevel"},
        {AB ", \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"ByteLevel\"}, "
            "{\"type\": \"Digits\"}]}}", "it has a step after ByteLevel"},
        {AB ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"x+\"}}}",
         "it cuts words by an expression of its own, x+"},
        {AB ", \"post_processor\": {\"type\": \"BertProcessing\"}}", "it asks for \"BertProcessing\""},
        {AB ", \"added_tokens\": [{\"id\": 3, \"content\": \"q\", \"single_word\": true}]}", "added token \"q\""},
        {AB ", \"normalizer\": {\"type\": \"Prepend\", \"prepend\": \"_\"}, \"added_tokens\": [{\"id\": 4, "
            "\"content\": \"qa\", \"normalized\": true}]}", "added token \"qa\""},
        {MODEL("\"a\": 0", "\"a a\"") "}", "merge 0 makes a piece that the vocabulary lacks"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error error = {""};
        Encoder* e = encoder_of(cases[i].json, &error);
        check(!e && strstr(error.text, cases[i].says), "refused: %s", error.text);
        encoder_free(e);
    }
}

// Texts and their form NFC by Python's unicodedata, but for bytes that are no UTF-8.
static void test_tokenizer_nfc(void) {
    static const struct {
        const char *what, *text, *nfc;  // NULL: the text
    } cases[] = {
        {"what is in form NFC stays", "ผู้ বাংলা مُحَمَّد שָּׁלוֹם ລູ້", NULL},
        {"... and so does this", "മലയാളം ẹ́ Nguyễn 한국어", NULL},
        {"a letter takes its mark", "e\u0301 \u0438\u0306", "\u00E9 \u0439"},
        {"marks in any order", "e\u0302\u0323 e\u0323\u0302 \u00EA\u0323", "\u1EC7 \u1EC7 \u1EC7"},
        {"a mark that another one blocks stays", "a\u0305\u0301", NULL},
        {"one passes by a mark of a lower class", "a\u0315\u0300\u05AE" "b", "\u00E0\u05AE\u0315b"},
        {"marks alone are put in order", "\u0301\u0323\n", "\u0323\u0301\n"},
        {"two letters make one", "\u09C7\u09BE", "\u09CB"},
        {"none over a mark", "\u09C7\u09BC\u09BE", NULL},
        {"Hangul", "\u1112\u1161\u11AB\u1100\u1161 \uAC00\u11A8 \uAC01\u11A8 \u1100\u11A8",
         "\uD55C\uAC00 \uAC01 \uAC01\u11A8 \u1100\u11A8"},
        {"what stands for another one", "\u212B\u2126\uF900\U0002F800", "\u00C5\u03A9\u8C48\u4E3D"},
        {"what is not joined again", "\u0958\U0001D15E\u0344", "\u0915\u093C\U0001D157\U0001D165\u0308\u0301"},
        {"nor over a byte that is no UTF-8", "\xCC" "e\xCC\u0301\x81", NULL},
    };
    classes_make();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Text nfc = {NULL, 0, 0};
        text_add_nfc(&nfc, cases[i].text, cases[i].text + strlen(cases[i].text));
        check(!strcmp(nfc.data, cases[i].nfc ? cases[i].nfc : cases[i].text), "NFC: %s", cases[i].what);
        free(nfc.data);
    }
}

// What tokenizers that people have do not show: the ids are those of `tokenizers`, but for bytes that are no UTF-8.
static void test_tokenizer_details(void) {
#define ADDED(how) ", \"added_tokens\": [{\"id\": 7, \"content\": \"ba\", " how "}]}"
// Llama 3's words
#define WORDS ", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": @}, \"behavior\": \"Isolated\"}}"
#define DIGITS(each) ", \"pre_tokenizer\": {\"type\": \"Digits\", \"individual_digits\": " each "}}"
#define NFC_ADDED \
    MODEL("\"\u00FA\": 0, \"\u0301\": 1", "") ", \"normalizer\": {\"type\": \"NFC\"}, \"added_tokens\": " \
        "[{\"id\": 3, \"content\": \"e\u0301\", \"normalized\": true}, {\"id\": 4, \"content\": \"a\"}]}"
    static const struct {
        const char *what, *json, *text;
        long count;
        int ids[4];
    } cases[] = {
        {"an added token goes before words, and takes the space behind it",
         MODEL("\"a\": 0, \"b\": 1, \"ab\": 2, \" \": 3", "\"a b\"") ADDED("\"rstrip\": true"), "abxba  ab",
         3, {2, 7, 2}},
        {"or before it", MODEL("\"a\": 0, \" \": 1", "") ADDED("\"lstrip\": true"), "a \xE3\x80\x80 ba", 2, {0, 7}},
        {"but no byte that is no UTF-8",
         "{\"model\": {\"byte_fallback\": true, \"vocab\": {\"a\": 0, \" \": 1, \"<0x80>\": 2}, \"merges\": []}"
         ADDED("\"lstrip\": true"), "a \x80\x62\x61", 4, {0, 1, 2, 7}},
        {"what the vocabulary lacks is left out", AB "}", "xax", 1, {0}},
        {"an empty text has no tokens", AB "}", "", 0, {0}},
        {"of a merge listed twice the last counts",
         MODEL("\"a\": 0, \"b\": 1, \"ab\": 2, \"ba\": 3", "\"a b\", \"b a\", \"a b\"") "}", "aba", 2, {0, 3}},
        {"Metaspace puts a space first", MODEL("\"_\": 0, \"a\": 1, \"_a\": 2", "\"_ a\"")
         ", \"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"_\"}}", "a a", 2, {2, 2}},
        {"a merge gives the piece before it another one",
         MODEL("\"a\": 0, \"b\": 1, \"c\": 2, \"bc\": 3, \"abc\": 4", "\"b c\", \"a bc\"") "}", "abc", 1, {4}},
        {"a word that is in the vocabulary needs no merges",
         "{\"model\": {\"ignore_merges\": true, \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2}, \"merges\": []}}",
         "ab", 1, {2}},
        {"what the vocabulary lacks is the unknown token",
         "{\"model\": {\"unk_token\": \"u\", \"vocab\": {\"u\": 0, \"a\": 1}, \"merges\": []}}", "xxa", 3, {0, 0, 1}},
        {"several in a row are one",
         "{\"model\": {\"unk_token\": \"u\", \"fuse_unk\": true, \"vocab\": {\"u\": 0, \"a\": 1}, "
         "\"merges\": []}}", "xxa", 2, {0, 1}},
        {"digits of their own", MODEL("\"1\": 0, \"2\": 1, \"12\": 2", "\"1 2\"") DIGITS("true"), "12", 2, {0, 1}},
        {"digits as words", MODEL("\"1\": 0, \"2\": 1, \"12\": 2", "\"1 2\"") DIGITS("false"), "12", 1, {2}},
        {"'S ends a word", MODEL("\"'\": 0, \"S\": 1, \"x\": 2, \"Sx\": 3", "\"S x\"") WORDS, "'Sx", 3, {0, 1, 2}},
        {"and so does a long s", MODEL("\"'\": 0, \"\xC5\xBF\": 1, \"x\": 2, \"\xC5\xBFx\": 3", "\"\xC5\xBF x\"") WORDS,
         "'\xC5\xBFx", 3, {0, 1, 2}},
        {"a word has three digits",
         MODEL("\"1\": 0, \"34\": 1, \"3\": 2, \"4\": 3", "\"3 4\"") WORDS, "1134", 4, {0, 0, 2, 3}},
        {"ends of lines are one word",
         MODEL("\"\\n\": 0, \"a\": 1, \"\\n\\n\": 2", "\"\\n \\n\"") WORDS, "\n\na", 2, {2, 1}},
        {"and not in that of the letters",
         MODEL("\"\\n\": 0, \"a\": 1, \"\\na\": 2", "\"\\n a\"") WORDS, "\na", 2, {0, 1}},
        {"as others are", MODEL("\"-\": 0, \"a\": 1, \"-a\": 2", "\"- a\"") WORDS, "-a", 1, {2}},
        {"others take them along", MODEL("\"-\": 0, \"\\n\": 1, \"-\\n\": 2", "\"- \\n\"") WORDS, "-\n", 1, {2}},
        {"of two added tokens that overlap the one in the text comes before that in its normal form",
         AB ", \"added_tokens\": [{\"id\": 3, \"content\": \"bq\"}, {\"id\": 4, \"content\": \"ab\", "
         "\"normalized\": true}]}", "abqab", 3, {0, 3, 4}},
        {"an added token is found in form NFC", NFC_ADDED, "e\u0301u\u0301", 2, {3, 0}},
        {"and one that is found in the text keeps what stands behind it from it", NFC_ADDED, "a\u0301", 2, {4, 1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error error = {""};
        long count = -1;
        Text json = {NULL, 0, 0};
        for (const char* s = cases[i].json; *s; s++)        // @: an expression
            if (*s == '@') text_json_string(&json, word_rules[1].expression);
            else text_add(&json, s, 1);
        Encoder* e = encoder_of(json.data, &error);
        free(json.data);
        int* ids = e ? encode(e, cases[i].text, strlen(cases[i].text), 1, &count, &error) : NULL;
        check(ids && count == cases[i].count && !memcmp(ids, cases[i].ids, sizeof(int) * (size_t)count), "%s %s",
              cases[i].what, error.text);
        free(ids);
        encoder_free(e);
    }
}

// A text for a model with a tokenizer, by the programs.
static void test_tokenizer_models(void) {
    const char *text = "dev/tokenizer/cases/text.txt", *json = "dev/tokenizer/cases/smollm/tokenizer.json";
    write_shard(temp("tokens.bin"), SHARD_MAGIC_16, 1, 200, 2, 200, 0);
    for (int vocabulary = 300; vocabulary <= 330; vocabulary += 30) {
        int code = run_program("--data %s --val none --vocab %d --layers 1 --hidden 32 --experts 2 --steps 1 --batch 1 "
                               "--seq 16 --out %s", temp("tokens.bin"), vocabulary,
                               temp(vocabulary == 300 ? "few" : "tokenized"));
        check(code == 0, "a model of %d tokens: %s", vocabulary, ran.err);
    }
    copy_file(json, temp("few/tokenizer.json"));
    copy_file(json, temp("tokenized/tokenizer.json"));
    // bits per byte: of the bytes that the targets print
    Error error = {""};
    Config c;
    config_read(&c, temp("tokenized"), &error);
    check(reads_bytes(&c, temp("tokenized")) == NO_BYTES && encode_file, "the model has a tokenizer for texts");
    long count = 0, tokens = 0, windows;
    int* ids = encode_file(text, &count);
    Tokenizer* t = tokenizer_open(temp("tokenized"), c.vocab_size);
    double bytes = 0, loss = 0, bits = 0;
    windows = (count - 1) / 16;
    for (long k = 1; k <= windows * 16; k++) bytes += t->pieces[ids[k]] ? t->lengths[ids[k]] : 0;
    tokenizer_close(t);
    int code = run_program("--model %s --data %s --eval --seq 16", temp("tokenized"), text);
    const char* line = strstr(ran.out, "\nloss ");
    int read = sscanf(line ? line : "", "\nloss %lf | perplexity %*f | bits per byte %lf | %ld", &loss, &bits, &tokens);
    check(code == 0 && read == 3 && tokens == windows * 16 &&
              fabs(bits - loss / M_LN2 * (double)tokens / bytes) < 1e-4, "--eval of a text: %s%s", ran.out, ran.err);
    // the same of a shard with these tokens
    Text shard = {NULL, 0, 0};
    put_i32(&shard, SHARD_MAGIC_32);
    put_i32(&shard, 7);
    put_i32(&shard, count);
    while (shard.length < SHARD_HEADER) put_i32(&shard, 0);
    for (long k = 0; k < count; k++) put_i32(&shard, ids[k]);
    write_bytes(temp("text.bin"), shard.data, shard.length);
    free(shard.data);
    code = run_program("--model %s --data %s --eval --seq 16", temp("tokenized"), temp("text.bin"));
    line = strstr(ran.out, "\nloss ");
    double again = 0;
    read = sscanf(line ? line : "", "\nloss %*f | perplexity %*f | bits per byte %lf", &again);
    check(code == 0 && read == 1 && fabs(again - bits) < 1e-6, "--eval of a shard: %s%s", ran.out, ran.err);
    unlink(temp("tokenized/tokenizer.json"));
    code = run_program("--model %s --data %s --eval --seq 16", temp("tokenized"), temp("text.bin"));
    check(code == 0 && !strstr(ran.out, "bits per byte"), "but nobody knows its bytes without the tokenizer");
    copy_file(json, temp("tokenized/tokenizer.json"));
    // training on all but the last tenth of its tokens
    Dataset *train = dataset_open(text, 8, 330, TRAIN_PART, NO_BYTES),
            *val = dataset_open(text, 8, 330, VAL_PART, NO_BYTES);
    int window[8], targets[8];
    dataset_window(val, 0, window, targets);
    check(train->files[0].count + val->files[0].count == count &&
              !memcmp(window, ids + train->files[0].count, sizeof window), "the last tenth of its tokens is kept");
    dataset_close(train);
    dataset_close(val);
    free(ids);
    encode_file = NULL;
    code = run_program("--model %s --data %s --steps 1 --batch 1 --seq 8 --out %s", temp("tokenized"), text,
                       temp("on"));
    check(code == 0 && exists(temp("on/model.safetensors")), "training goes on with a text: %s", ran.err);
    code = run_program("--model %s --data %s --steps 1 --batch 1 --seq 8 --out %s", temp("few"), text, temp("on2"));
    check(code == 2 && strstr(ran.err, "by tokenizer.json; the model's vocabulary has 0 to 299"),
          "tokens that the model lacks are found before the start: %s", ran.err);
}

static void test_tokenizer(void) {
    test_tokenizer_cases();
    test_tokenizer_refusals();
    test_tokenizer_nfc();
    test_tokenizer_details();
    test_tokenizer_models();
}
