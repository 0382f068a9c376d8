/*
json.c: texts that are JSON and texts that are not, and what the latter are told.
*/
static Json* parse(const char* text, size_t n, Error* error) {
    char* exact = (char*)kept_malloc(n); // no zero behind it, for the sanitizer
    memcpy(exact, text, n);
    error->text[0] = 0;
    return keep_json(json_parse(exact, n, error));
}

// for one line of output
static const char* printable(const char* text) {
    static char out[256];
    int n = 0;
    for (const char* s = text; *s && n < 240; s++)
        n += (unsigned char)*s >= 32 && (unsigned char)*s < 127 ? sprintf(out + n, "%c", *s)
                                                                : sprintf(out + n, "<%02x>", *s & 255);
    out[n] = 0;
    return out;
}

static void check_valid(const char* text) {
    Error error;
    Json* j = parse(text, strlen(text), &error);
    check(j && !error.text[0], "accepts %.60s", printable(text));
}

static void check_invalid(const char* text, size_t n, const char* expected) {
    Error error;
    Json* j = parse(text, n, &error);
    check(!j && strstr(error.text, expected), "refuses %.40s: %s", printable(text), error.text);
}

static void check_decoded(const char* text, const char* expected, size_t n) {
    Error error;
    Json* j = parse(text, strlen(text), &error);
    check(j && j->type == JSON_STRING && j->length == n && !memcmp(j->string, expected, n), "decodes %.60s", text);
}

static void test_json(void) {
    static const char* valid[] = {"null",
                                  " true ",
                                  "false",
                                  "0",
                                  "-0",
                                  "-1.5e+10",
                                  "1E5",
                                  "0.0",
                                  "\"\"",
                                  "[]",
                                  "{}",
                                  "\t[ ]\r\n",
                                  "[1, [2, {\"a\": [null]}]]",
                                  "{\"b\": 1, \"a\": {\"a\": 2}}",
                                  "\"\\u00e9\"",
                                  "\"\xC3\xA9\xE2\x96\x81\xF0\x9F\x98\x80\"",
                                  "\"\x7f\""};
    for (EACH(i, valid)) check_valid(valid[i]);

    static const struct {
        const char *text, *expected;
    } invalid[] = {{"", "expected a value"},
                   {" ", "expected a value"},
                   {"nul", "expected a value"},
                   {"nullx", "the end"},
                   {"TRUE", "a value"},
                   {"01", "the end"},
                   {"+1", "a value"},
                   {".5", "a value"},
                   {"1.", "a digit"},
                   {"1.e5", "a digit"},
                   {"1e", "a digit"},
                   {"1e+", "a digit"},
                   {"-", "a value"},
                   {"0x10", "the end"},
                   {"NaN", "a value"},
                   {"Infinity", "a value"},
                   {"[", "a value"},
                   {"[1", "a comma or ]"},
                   {"[1,", "a value"},
                   {"[1,]", "a value"},
                   {"[1 2]", "a comma or ]"},
                   {"[1}", "a comma or ]"},
                   {"{", "a string"},
                   {"{\"a\"", "a colon"},
                   {"{\"a\":", "a value"},
                   {"{\"a\":1", "a comma or }"},
                   {"{\"a\":1,}", "a string"},
                   {"{a:1}", "a string"},
                   {"{1:1}", "a string"},
                   {"{\"a\" 1}", "a colon"},
                   {"]", "a value"},
                   {"\"", "a closing quote"},
                   {"\"a", "a closing quote"},
                   {"\"\\", "an escape"},
                   {"\"\\\"", "a closing quote"},
                   {"\"\\x\"", "an escape"},
                   {"\"\\u12\"", "four hexadecimal"},
                   {"\"\\u12g4\"", "four hexadecimal"},
                   {"\"\\ud800\"", "a surrogate pair"},
                   {"\"\\ud800x\"", "a surrogate pair"},
                   {"\"\\ud800\\u0041\"", "a surrogate pair"},
                   {"\"\\udc00\"", "a surrogate pair"},
                   {"\"a\nb\"", "control character"},
                   {"\"\t\"", "control character"},
                   {"\"\x80\"", "UTF-8"},
                   {"\"\xC3\"", "UTF-8"},
                   {"\"\xC3(\"", "UTF-8"},
                   {"\"\xC0\x80\"", "UTF-8"},
                   {"\"\xC1\xBF\"", "UTF-8"},
                   {"\"\xE0\x80\x80\"", "UTF-8"},
                   {"\"\xED\xA0\x80\"", "UTF-8"},
                   {"\"\xF0\x80\x80\x80\"", "UTF-8"},
                   {"\"\xF4\x90\x80\x80\"", "UTF-8"},
                   {"\"\xF5\x80\x80\x80\"", "UTF-8"},
                   {"\"\xFF\"", "UTF-8"},
                   {"\xEF\xBB\xBF{}", "a value"},
                   {"{\"a\":1,\"a\":2}", "\"a\" appears twice"},
                   {"{\"a\":1,\"b\":0,\"\\u0061\":2}", "\"a\" appears twice"},
                   {"[1] 2", "the end"},
                   {"// comment\n1", "a value"},
                   {"'a'", "a value"}};
    for (EACH(i, invalid))
        check_invalid(invalid[i].text, strlen(invalid[i].text), invalid[i].expected);
    check_invalid("1\0", 2, "the end");

    check_decoded("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8);
    check_decoded("\"\\u0041\\u00e9\\u2581\"", "A\xC3\xA9\xE2\x96\x81", 6);
    check_decoded("\"\\uD83D\\uDE00\\uffff\"", "\xF0\x9F\x98\x80\xEF\xBF\xBF", 7);
    check_decoded("\"a\\u0000b\"", "a\0b", 3);
    Error error;
    static const char with_zero[] = "{\"a\\u0000b\":1,\"a\":2}";
    error.text[0] = 0;
    Json* zero = json_parse(with_zero, sizeof with_zero - 1, &error);
    Text quoted = {NULL, 0, 0};
    const Json* member = json_get(zero, "a\xC0\x80" "b");
    if (member) text_json_string(&quoted, member->key);
    check(member && json_whole(member, 9) == 1 && !strcmp(quoted.data, "\"a\\u0000b\""), "a key with a zero byte");
    free(quoted.data);
    json_free(zero);
    char deep[400];
    for (int levels = 60; levels <= 70; levels++) {
        memset(deep, '[', (size_t)levels);
        memset(deep + levels, ']', (size_t)levels);
        Json* j = parse(deep, 2 * (size_t)levels, &error);
        if (levels == 64 || levels == 66 || (j != NULL) != (levels <= 65))
            check((j != NULL) == (levels <= 65), "%d levels of arrays: %s", levels, j ? "accepted" : error.text);
    }
    memset(deep, '[', sizeof deep);
    check_invalid(deep, sizeof deep, "64 levels");

    const char* text = "{\"z\": 1.5e3, \"a\": [true, \"x\"], \"m\": -7, \"big\": 18446744073709551616, \"null\": null}";
    Json* j = parse(text, strlen(text), &error);
    check(json_get(j, "z")->number == 1500 && json_get(j, "m")->number == -7, "finds members by name");
    check(!json_get(j, "q") && !json_get(json_get(j, "a"), "z") && !json_get(NULL, "a"),
          "finds nothing where there is nothing");
    check(json_get(j, "a")->count == 2 && !strcmp(json_get(j, "a")->items[1]->string, "x"),
          "keeps the order of arrays");
    check(json_whole(json_get(j, "z"), 9999) == -1 && json_whole(json_get(j, "m"), 9999) == -1 &&
              json_whole(json_get(j, "big"), LONG_MAX) == -1,
          "a whole number has no point, exponent or sign and is not too large");
    check(json_absent(json_get(j, "null")) && json_absent(json_get(j, "q")) && !json_absent(json_get(j, "z")),
          "null is absent");

    static const double numbers[] = {
        1e-6, 1, 0, 0.1, 1e6, 1e4, 0.001, 123456789.0, 1.0 / 3, 5e-324, 1.7976931348623157e308};
    int same = 1, floats = 1;
    for (EACH(i, numbers)) {
        Text t = {NULL, 0, 0};
        text_json_double(&t, numbers[i]);
        same &= strtod(t.data, NULL) == numbers[i];
        floats &= strpbrk(t.data, ".e") != NULL;
        free(t.data);
    }
    check(same && floats, "numbers are written so that they read back the same and stay floats");
    Text t = {NULL, 0, 0};
    text_json_string(&t, "a\"b\\c\n\x01\xC3\xA9");
    j = parse(t.data, t.length, &error);
    check(j && !strcmp(j->string, "a\"b\\c\n\x01\xC3\xA9"), "strings are written so that they read back the same");
    Text broken = {NULL, 0, 0};
    text_json_string(&broken, "a\xFFz\xC3");
    Json* mended = parse(broken.data, broken.length, &error);
    check(mended && !strcmp(mended->string, "a\xEF\xBF\xBDz\xEF\xBF\xBD"), "bytes that are not UTF-8 are replaced");
    free(broken.data);
    free(t.data);
    Text long_one = {NULL, 0, 0};
    text_print(&long_one, "%03000d", 7);
    check(long_one.length == 3000 && long_one.data[2999] == '7', "a long value is written whole");
    free(long_one.data);
}
