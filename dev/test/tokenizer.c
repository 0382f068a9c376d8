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

static void test_tokenizer_refusals(void) {
#define TOKENIZER(parts) \
    "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2}, \"merges\": [\"a b\"]}" parts "}"
    static const struct {
        const char *json, *says;
    } cases[] = {
        {"{\"model\": {\"type\": \"Unigram\", \"vocab\": []}}", "its model is Unigram, not BPE"},
        {TOKENIZER(", \"normalizer\": {\"type\": \"Lowercase\"}"), "it asks for \"Lowercase\""},
        {TOKENIZER(", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"x+\"}}"),
         "it cuts words by an expression of its own, x+"},
        {TOKENIZER(", \"post_processor\": {\"type\": \"BertProcessing\"}"), "it asks for \"BertProcessing\""},
        {TOKENIZER(", \"added_tokens\": [{\"id\": 3, \"content\": \"q\", \"single_word\": true}]"),
         "added token \"q\""},
        {"{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [\"a a\"]}}",
         "merge 0 makes a piece that the vocabulary lacks"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error error = {""};
        Encoder* e = encoder_of(cases[i].json, &error);
        check(!e && strstr(error.text, cases[i].says), "refused: %s", error.text);
        encoder_free(e);
    }
    // characters that the vocabulary lacks are left out; tokens are found before words are cut
    Error error = {""};
    long count = 0;
    Encoder* e =
        encoder_of(TOKENIZER(", \"added_tokens\": [{\"id\": 7, \"content\": \"ba\", \"rstrip\": true}]"), &error);
    int *ids = encode(e, "abxba  ab", 9, 1, &count, &error), expected[] = {2, 7, 2};
    check(count == 3 && !memcmp(ids, expected, sizeof expected), "an added token is cut out, with the space behind it");
    free(ids);
    ids = encode(e, "", 0, 1, &count, &error);
    check(ids && count == 0, "an empty text has no tokens");
    free(ids);
    encoder_free(e);
    // Qwen's form: a mark that would join the letter before it is not accepted
    e = encoder_of(TOKENIZER(", \"normalizer\": {\"type\": \"NFC\"}"), &error);
    check(!encode(e, "ae\xCC\x81", 4, 1, &count, &error) && strstr(error.text, "U+0301"), "not in form NFC: %s",
          error.text);
    encoder_free(e);
}

static void test_tokenizer(void) {
    test_tokenizer_cases();
    test_tokenizer_refusals();
}
