// json.h: a strict parser, and a text that grows. Compiles alone.
//
// Functions of this file and of safetensors.h are given files that may be broken or hostile. They return an error
// instead of ending the program, so that tests and fuzzers can call them: the first problem is written to an Error.
#pragma once
#include "util.h"

typedef struct {
    char text[1024];                // empty: no error
} Error;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static int set_error(Error* error, const char* format, ...) {
    if (!error->text[0]) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
    }
    return 0;
}

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    char* key;                      // in an object: the member's name
    char* string;                   // JSON_STRING: its text; JSON_NUMBER: as it was written
    size_t length;                  // bytes of `string`, which may contain zeros
    double number;
    int count;                      // members of an array or object
    struct Json** items;            // (count); an object's are sorted by key
    char* raw;                      // of a member of the whole: its text, as it was written
} Json;

// Values in a text: a tokenizer of 250,000 tokens has a million. More would only serve to fill up the memory.
enum { JSON_MOST_VALUES = 4000000 };

typedef struct {
    const char *start, *at, *end;
    Error* error;
    long values;                    // so far
} JsonReader;

static void json_free(Json* j) {
    if (!j) return;
    for (int i = 0; i < j->count; i++) json_free(j->items[i]);
    free(j->items);
    free(j->key);
    free(j->string);
    free(j->raw);
    free(j);
}

static void json_space(JsonReader* r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) r->at++;
}

static int json_error(JsonReader* r, const char* expected) {
    return set_error(r->error, "not JSON: byte %ld: expected %s", (long)(r->at - r->start), expected);
}

// the bytes of a valid UTF-8 character at s, or 0
static int utf8_length(const char* s, const char* end) {
    const unsigned char* p = (const unsigned char*)s;
    int n = p[0] < 0x80                   ? 1
            : p[0] >= 0xC2 && p[0] < 0xE0 ? 2
            : (p[0] & 0xF0) == 0xE0       ? 3
            : p[0] >= 0xF0 && p[0] < 0xF5 ? 4
                                          : 0;
    if (n == 0 || end - s < n) return 0;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if (n == 3 && ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] >= 0xA0))) return 0; // overlong; surrogate
    if (n == 4 && ((p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] >= 0x90))) return 0; // overlong; too large
    return n;
}

static int utf8_write(char* out, uint32_t c) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)((n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | c);
    return n;
}

static int json_hex4(JsonReader* r, uint32_t* value) {
    *value = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        if (r->at >= r->end || !isxdigit((unsigned char)*r->at)) return json_error(r, "four hexadecimal digits");
        int c = tolower((unsigned char)*r->at);
        *value = *value * 16 + (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    return 1;
}

// the text between quotes, decoded; NULL on error
static char* json_string(JsonReader* r, size_t* length) {
    if (r->at >= r->end || *r->at != '"') {
        json_error(r, "a string");
        return NULL;
    }
    const char* close = ++r->at;
    while (close < r->end && *close != '"') close += *close == '\\' && close + 1 < r->end ? 2 : 1;
    char *out = (char*)checked_malloc((size_t)(close - r->at) + 1), *p = out;   // decoding never makes it longer
    while (r->at < r->end && *r->at != '"') {
        if (*r->at == '\\') {
            static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
            char c = r->at + 1 < r->end ? r->at[1] : 0;
            const char* found = c ? strchr(escapes, c) : NULL;
            uint32_t code, low;
            if (found) {
                *p++ = meanings[found - escapes];
                r->at += 2;
                continue;
            }
            if (c != 'u') { json_error(r, "an escape sequence"); break; }
            r->at += 2;
            if (!json_hex4(r, &code)) break;
            if (code >= 0xD800 && code < 0xDC00) {      // the first half of a pair
                if (r->end - r->at < 2 || r->at[0] != '\\' || r->at[1] != 'u') {
                    json_error(r, "a surrogate pair");
                    break;
                }
                r->at += 2;
                if (!json_hex4(r, &low)) break;
                if (low < 0xDC00 || low >= 0xE000) { json_error(r, "a surrogate pair"); break; }
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            } else if (code >= 0xDC00 && code < 0xE000) { json_error(r, "a surrogate pair"); break; }
            p += utf8_write(p, code);
        } else {
            int n = utf8_length(r->at, r->end);
            if (n == 0) { json_error(r, "UTF-8"); break; }
            if ((unsigned char)*r->at < 0x20) { json_error(r, "an escaped control character"); break; }
            memcpy(p, r->at, (size_t)n);
            p += n;
            r->at += n;
        }
    }
    if (!r->error->text[0] && r->at >= r->end) json_error(r, "a closing quote");
    if (r->error->text[0]) {
        free(out);
        return NULL;
    }
    r->at++;
    *p = 0;
    *length = (size_t)(p - out);
    return out;
}

static int json_compare_keys(const void* a, const void* b) {
    return strcmp((*(Json* const*)a)->key, (*(Json* const*)b)->key);
}

// Strict JSON numbers: no leading zeros, no plus sign, no bare point.
static int json_number(JsonReader* r, Json* j) {
    const char* start = r->at;
    if (r->at < r->end && *r->at == '-') r->at++;
    if (r->at < r->end && *r->at == '0') r->at++;
    else if (r->at < r->end && *r->at >= '1' && *r->at <= '9')
        while (r->at < r->end && isdigit((unsigned char)*r->at)) r->at++;
    else return json_error(r, "a value");
    if (r->at < r->end && *r->at == '.') {
        if (++r->at >= r->end || !isdigit((unsigned char)*r->at)) return json_error(r, "a digit");
        while (r->at < r->end && isdigit((unsigned char)*r->at)) r->at++;
    }
    if (r->at < r->end && (*r->at == 'e' || *r->at == 'E')) {
        r->at++;
        if (r->at < r->end && (*r->at == '+' || *r->at == '-')) r->at++;
        if (r->at >= r->end || !isdigit((unsigned char)*r->at)) return json_error(r, "a digit");
        while (r->at < r->end && isdigit((unsigned char)*r->at)) r->at++;
    }
    j->type = JSON_NUMBER;
    j->length = (size_t)(r->at - start);
    j->string = copy_bytes(start, j->length);
    j->number = strtod(j->string, NULL);
    return 1;
}

// Keys are C strings: a zero byte in one becomes C0 80, which is not UTF-8 and so in no other key. (A tokenizer of
// bytes has a token named "\u0000".)
static char* key_without_zeros(char* key, size_t length) {
    char *out = (char*)checked_malloc(2 * length + 1), *p = out;
    for (size_t i = 0; i < length; i++) {
        if (!key[i]) *p++ = '\xC0';
        *p++ = key[i] ? key[i] : '\x80';
    }
    *p = 0;
    free(key);
    return out;
}

static Json* json_value(JsonReader* r, int depth) {
    Json* j = (Json*)checked_malloc(sizeof(Json));
    memset(j, 0, sizeof *j);
    json_space(r);
    const char* start = r->at;
    char c = r->at < r->end ? *r->at : 0;
    if (depth > 64) {
        json_error(r, "at most 64 levels");
    } else if (++r->values > JSON_MOST_VALUES) {
        json_error(r, "at most 4 million values");
    } else if (c == '{' || c == '[') {
        char close = c == '{' ? '}' : ']';
        int capacity = 0;
        j->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        r->at++;
        json_space(r);
        int empty = r->at < r->end && *r->at == close;
        r->at += empty;
        while (!empty) {
            char* key = NULL;
            size_t length;
            json_space(r);
            if (c == '{') {
                key = json_string(r, &length);
                if (!key) break;
                if (strlen(key) != length) key = key_without_zeros(key, length);
                json_space(r);
                if (r->at >= r->end || *r->at != ':') json_error(r, "a colon");
                r->at++;
            }
            Json* item = r->error->text[0] ? NULL : json_value(r, depth + 1);
            if (!item) {
                free(key);
                break;
            }
            item->key = key;
            if (j->count == capacity) {
                capacity = capacity ? capacity * 2 : 8;
                j->items = (Json**)realloc(j->items, sizeof(Json*) * (size_t)capacity);
                if (!j->items) die(1, "out of memory");
            }
            j->items[j->count++] = item;
            json_space(r);
            if (r->at < r->end && *r->at == ',') {
                r->at++;
                continue;
            }
            if (r->at < r->end && *r->at == close) r->at++;
            else json_error(r, close == '}' ? "a comma or }" : "a comma or ]");
            break;
        }
        if (j->type == JSON_OBJECT && j->count > 1 && !r->error->text[0]) {
            qsort(j->items, (size_t)j->count, sizeof(Json*), json_compare_keys);
            for (int i = 1; i < j->count; i++)
                if (!strcmp(j->items[i - 1]->key, j->items[i]->key))
                    set_error(r->error, "not JSON: the name \"%.80s\" appears twice", j->items[i]->key);
        }
    } else if (c == '"') {
        j->type = JSON_STRING;
        j->string = json_string(r, &j->length);
    } else if (r->end - r->at >= 4 && !memcmp(r->at, "null", 4)) {
        j->type = JSON_NULL;
        r->at += 4;
    } else if (r->end - r->at >= 4 && !memcmp(r->at, "true", 4)) {
        j->type = JSON_TRUE;
        r->at += 4;
    } else if (r->end - r->at >= 5 && !memcmp(r->at, "false", 5)) {
        j->type = JSON_FALSE;
        r->at += 5;
    } else {
        json_number(r, j);
    }
    if (r->error->text[0]) {
        json_free(j);
        return NULL;
    }
    if (depth == 1) j->raw = copy_bytes(start, (size_t)(r->at - start));
    return j;
}

// The value of a whole text, to be freed with json_free; NULL and an error if it is not JSON.
static Json* json_parse(const char* text, size_t length, Error* error) {
    JsonReader r = {text, text, text + length, error, 0};
    Json* j = json_value(&r, 0);
    json_space(&r);
    if (j && r.at != r.end) json_error(&r, "the end");
    if (error->text[0]) {
        json_free(j);
        return NULL;
    }
    return j;
}

// The member of an object, or NULL (also if j is NULL or no object).
static const Json* json_get(const Json* j, const char* key) {
    if (!j || j->type != JSON_OBJECT) return NULL;
    for (int low = 0, high = j->count - 1; low <= high;) {
        int middle = (low + high) / 2, order = strcmp(key, j->items[middle]->key);
        if (order == 0) return j->items[middle];
        if (order < 0) high = middle - 1;
        else low = middle + 1;
    }
    return NULL;
}

// The text of a member of the whole, or NULL.
static const char* json_raw(const Json* j, const char* key) {
    const Json* v = json_get(j, key);
    return v ? v->raw : NULL;
}

// A member that is absent or null.
static int json_absent(const Json* j) { return !j || j->type == JSON_NULL; }

// The text of a file, to be freed; NULL and an error if it cannot be read or is larger than `limit`.
static char* read_file(const char* path, size_t limit, size_t* length, Error* error) {
    struct stat st;
    int fd = open(path, O_RDONLY);
    char* text = NULL;
    if (fd < 0 || fstat(fd, &st)) set_error(error, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode)) set_error(error, "%s: not a regular file", path);
    else if ((size_t)st.st_size > limit)
        set_error(error, "%s: %lld bytes, at most %zu expected", path, (long long)st.st_size, limit);
    else {
        *length = (size_t)st.st_size;
        text = (char*)checked_malloc(*length + 1);
        text[*length] = 0;
        if (!read_at(fd, text, *length, 0)) {
            set_error(error, "%s: cannot be read", path);
            free(text);
            text = NULL;
        }
    }
    if (fd >= 0) close(fd);
    return text;
}

static Json* json_read(const char* path, Error* error) {
    size_t length;
    Error inner = {""};
    char* text = read_file(path, 1 << 30, &length, error);
    if (!text) return NULL;
    Json* j = json_parse(text, length, &inner);
    int pointer = !j && !strncmp(text, "version https://git-lfs", 23);
    if (!j) set_error(error, "%s: %s", path, pointer ? "a git-lfs pointer; git lfs pull fetches the file" : inner.text);
    free(text);
    return j;
}

// A text that grows as it is written.
typedef struct {
    char* data;
    size_t length, capacity;
} Text;

static void text_add(Text* t, const char* bytes, size_t n) {
    if (t->length + n + 1 > t->capacity) {
        t->capacity = (t->length + n + 1) * 2;
        t->data = (char*)realloc(t->data, t->capacity);
        if (!t->data) die(1, "out of memory");
    }
    memcpy(t->data + t->length, bytes, n);
    t->length += n;
    t->data[t->length] = 0;
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void text_print(Text* t, const char* format, ...) {
    char buffer[1024];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    if (n < (int)sizeof buffer) {
        text_add(t, buffer, (size_t)imax(n, 0));
        return;
    }
    char* all = (char*)checked_malloc((size_t)n + 1);
    va_start(args, format);
    vsnprintf(all, (size_t)n + 1, format, args);
    va_end(args);
    text_add(t, all, (size_t)n);
    free(all);
}

// a string with quotes and escapes
static void text_json_string(Text* t, const char* s) {
    const char* end = s + strlen(s);
    text_print(t, "\"");
    for (int n; s < end; s += n) {
        n = utf8_length(s, end);
        if (*s == '"' || *s == '\\') text_print(t, "\\%c", *s);
        else if ((unsigned char)*s < 0x20) text_print(t, "\\u%04x", *s);
        else if (n > 0) text_add(t, s, (size_t)n);
        else if (!strncmp(s, "\xC0\x80", 2)) {                  // as key_without_zeros has it
            text_print(t, "\\u0000");
            n = 2;
        } else text_print(t, "\\ufffd"); // the name of a file may be any bytes
        n = n > 0 ? n : 1;
    }
    text_print(t, "\"");
}

// The shortest decimal that reads back as the same number, always with a point or an exponent: 1e-06 must not become 0.
static void text_json_double(Text* t, double x) {
    char buffer[40];
    for (int precision = 1; precision <= 17; precision++) {
        snprintf(buffer, sizeof buffer, "%.*g", precision, x);
        if (strtod(buffer, NULL) == x) break;
    }
    text_print(t, strpbrk(buffer, ".en") ? "%s" : "%s.0", buffer);
}

// What a value looked like, members in the order of their names.
static void text_json_value(Text* t, const Json* j) {
    static const char* words[] = {"null", "false", "true"};
    if (j->type == JSON_STRING)
        text_json_string(t, j->string);
    else if (j->type == JSON_NUMBER)
        text_print(t, "%s", j->string);
    else if (j->type < JSON_NUMBER)
        text_print(t, "%s", words[j->type]);
    else {
        text_print(t, j->type == JSON_ARRAY ? "[" : "{");
        for (int i = 0; i < j->count; i++) {
            if (i) text_print(t, ", ");
            if (j->type == JSON_OBJECT) {
                text_json_string(t, j->items[i]->key);
                text_print(t, ": ");
            }
            text_json_value(t, j->items[i]);
        }
        text_print(t, j->type == JSON_ARRAY ? "]" : "}");
    }
}
