// tokenizer.h: a text to tokens, by a Hugging Face tokenizer.json. Needs json.h.
//
// Byte-pair encoding (Sennrich et al. 2016) in its two dialects: of bytes (GPT-2, Llama 3, Qwen, SmolLM) and of
// characters with bytes for those that the vocabulary lacks (SentencePiece: Llama 2, Mistral). A text is cut at added
// tokens, each part is normalised and cut into words, and in each word the two neighbours whose merge was learned
// first are merged, again and again. What a tokenizer.json asks for besides is refused by name; truncation and padding,
// which are for batches, are not done.
#pragma once
#include "json.h"
#include "unicode.h"

// ---- tokens to a text --------------------------------------------------------------------------------------------

// From tokenizer.json: what each token prints. Without one, a token is a byte, if there are 256 of them.
typedef struct {
    int count;                      // the model's vocabulary
    char** pieces;                  // NULL: prints nothing (special tokens)
    int* lengths;
    int bytes;                      // 1: tokens are bytes, as tokenizer.json tells
    int byte_level; // 1: pieces are in GPT-2's alphabet of bytes; 0: in SentencePiece's, with ▁ for a space
    int *eos, num_eos, bos;         // (count) the ends of sequence; its begin, 0 if config.json has none
} Tokenizer;

// GPT-2's alphabet gives every byte a printable character: the printable bytes of Latin-1 are themselves, the others
// are numbered from 256 on.
static int is_printable(uint32_t c) {
    return (c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255);
}

static int byte_of_character(uint32_t c) {
    if (is_printable(c)) return (int)c;
    for (uint32_t b = 0, n = 256; b < 256; b++)
        if (!is_printable(b) && n++ == c) return (int)b;
    return -1;
}

// The next character of a token's name as a byte, or -1; *piece moves behind it. Zero bytes: see key_without_zeros.
static int next_byte(const char** piece, const char* end) {
    const unsigned char* u = (const unsigned char*)*piece;
    int n = utf8_length(*piece, end), zero = n == 0 && u[0] == 0xC0 && u[1] == 0x80;
    *piece += zero ? 2 : n ? n : 1;
    return zero ? 0 : byte_of_character(n < 2 ? u[0] : n == 2 ? (uint32_t)(u[0] & 31) << 6 | (u[1] & 63) : 0xFFFF);
}

// 1 if the ids of a tokenizer.json are the bytes of the text. Each byte is named by its own character; those that UTF-8
// never has may instead be made of each other, so that there is a merge that no text meets.
static int is_not_utf8(long byte) { return byte == 0xC0 || byte == 0xC1 || byte >= 0xF5; }

static int vocabulary_is_bytes(const Json* tokenizer) {
    const Json *vocab = json_get(json_get(tokenizer, "model"), "vocab"), *added = json_get(tokenizer, "added_tokens");
    char seen[256] = {0};
    if (!vocab || vocab->type != JSON_OBJECT || vocab->count != 256) return 0;
    for (int i = 0; i < 256; i++) {
        const char *key = vocab->items[i]->key, *at = key, *end = key + strlen(key);
        long id = json_whole(vocab->items[i], 255);
        if (id < 0 || seen[id]++) return 0;
        int own = next_byte(&at, end) == id && at == end, made = is_not_utf8(id) && at <= end;
        for (at = key; made && at < end;) made = is_not_utf8(next_byte(&at, end));
        if (!own && !made) return 0;
    }
    for (int i = 0; added && i < added->count; i++)
        if (json_whole(json_get(added->items[i], "id"), 255) < 0) return 0;
    return 1;
}

static int tokenizer_is_bytes(const char* dir) {
    char path[PATH_SIZE];
    Error ignored = {""};
    Json* j = access(join_path(path, dir, "tokenizer.json"), F_OK) ? NULL : json_read(path, &ignored);
    int bytes = vocabulary_is_bytes(j);
    json_free(j);
    return bytes;
}

static int json_contains_type(const Json* j, const char* type) {
    const Json* t = json_get(j, "type");
    if (t && t->type == JSON_STRING && !strcmp(t->string, type)) return 1;
    for (int i = 0; j && i < j->count; i++)
        if (json_contains_type(j->items[i], type)) return 1;
    return 0;
}

static void tokenizer_add(Tokenizer* t, long id, const char* piece, int special) {
    if (id < 0 || id >= t->count) return;
    free(t->pieces[id]);
    t->pieces[id] = NULL;
    if (special) return;
    char *out = (char*)checked_malloc(strlen(piece) + 1), *p = out;
    const char* end = piece + strlen(piece);
    unsigned byte;
    int used = 0;
    if (!t->byte_level && sscanf(piece, "<0x%2X>%n", &byte, &used) == 1 && used == 6 && piece[6] == 0) {
        *p++ = (char)byte;
    } else {
        while (piece < end) {
            const char* start = piece;
            int b = next_byte(&piece, end);
            size_t n = (size_t)(piece - start);
            if (b >= 0 && (t->byte_level || *start == '\xC0')) *p++ = (char)b;
            else if (!t->byte_level && n == 3 && !memcmp(start, "\xE2\x96\x81", 3)) *p++ = ' ';
            else {
                memcpy(p, start, n);
                p += n;
            }
        }
    }
    t->pieces[id] = out;
    t->lengths[id] = (int)(p - out);
}

static void tokenizer_add_eos(Tokenizer* t, const Json* j) {
    if (json_whole(j, INT_MAX) >= 0 && t->num_eos < t->count) t->eos[t->num_eos++] = (int)json_whole(j, INT_MAX);
    for (int i = 0; j && j->type == JSON_ARRAY && i < j->count; i++) tokenizer_add_eos(t, j->items[i]);
}

// Takes the begin and, if there are none yet, the ends of sequence from a config.json.
static void tokenizer_add_ends(Tokenizer* t, const Json* j) {
    if (t->num_eos == 0) tokenizer_add_eos(t, json_get(j, "eos_token_id"));
    t->bos = imax(0, (int)json_whole(json_get(j, "bos_token_id"), INT_MAX));
}

// Reads DIR's tokenizer.json, if any, and the end-of-sequence tokens; dir may be NULL.
static Tokenizer* tokenizer_open(const char* dir, int vocab_size) {
    Tokenizer* t = (Tokenizer*)checked_malloc(sizeof(Tokenizer));
    char path[PATH_SIZE];
    Error error = {""};
    memset(t, 0, sizeof *t);
    t->count = vocab_size;
    t->eos = (int*)checked_malloc(sizeof(int) * (size_t)vocab_size);
    static const char* eos_files[] = {"generation_config.json", "config.json"};
    for (int i = 0; dir && i < 2; i++) {
        join_path(path, dir, eos_files[i]);
        Json* j = access(path, F_OK) ? NULL : json_read(path, &error);
        tokenizer_add_ends(t, j);
        json_free(j);
    }
    join_path(path, dir ? dir : "", "tokenizer.json");
    if (!dir || access(path, F_OK)) return t;
    Json* j = json_read(path, &error);
    if (!j) die(2, "%s", error.text);
    const Json *vocab = json_get(json_get(j, "model"), "vocab"), *added = json_get(j, "added_tokens");
    t->bytes = vocabulary_is_bytes(j);
    if (t->bytes) {
        json_free(j);
        return t;
    }
    t->byte_level = json_contains_type(json_get(j, "decoder"), "ByteLevel");
    t->pieces = (char**)checked_malloc(sizeof(char*) * (size_t)vocab_size);
    t->lengths = (int*)checked_malloc(sizeof(int) * (size_t)vocab_size);
    memset(t->pieces, 0, sizeof(char*) * (size_t)vocab_size);
    memset(t->lengths, 0, sizeof(int) * (size_t)vocab_size);
    if (!vocab) die(2, "%s: no model.vocab", path);
    for (int i = 0; i < vocab->count; i++) {
        const Json* v = vocab->items[i];
        if (vocab->type == JSON_OBJECT && v->type == JSON_NUMBER) tokenizer_add(t, json_whole(v, INT_MAX), v->key, 0);
        // Unigram: a list of [piece, score]
        if (vocab->type == JSON_ARRAY && v->count > 0 && v->items[0]->type == JSON_STRING)
            tokenizer_add(t, i, v->items[0]->string, 0);
    }
    for (int i = 0; added && i < added->count; i++) {
        const Json *id = json_get(added->items[i], "id"), *content = json_get(added->items[i], "content");
        const Json* special = json_get(added->items[i], "special");
        if (id && content && content->type == JSON_STRING)
            tokenizer_add(t, json_whole(id, INT_MAX), content->string, special && special->type == JSON_TRUE);
    }
    json_free(j);
    return t;
}

static void tokenizer_close(Tokenizer* t) {
    for (int i = 0; i < t->count && t->pieces; i++) free(t->pieces[i]);
    free(t->pieces);
    free(t->lengths);
    free(t->eos);
    free(t);
}

// ---- classes of characters -------------------------------------------------------------------------------------

enum { LETTER = 1, NUMBER = 2, SPACE = 4, MARK = 8 };
// (0x110001) made at first use; the last: bytes that are no UTF-8. Multiples of MARK: ranks of combining classes.
static uint16_t* character_classes;

static int unicode_digit(const char** text) {
    char d = *(*text)++;
    return d >= 'a' ? d - 'a' + 26 : d >= 'A' ? d - 'A' : d >= '0' ? d - '0' + 52 : d == '+' ? 62 : 63;
}

// The next number of a text of unicode.h.
static int unicode_number(const char** text) {
    int n = 0, shift = 0, digit;
    do {
        digit = unicode_digit(text);
        n |= (digit & 31) << shift;
        shift += 5;
    } while (digit > 31);
    return n;
}

// Gives the characters that a text of unicode.h lists a class; 0: the one of each run that it tells.
static void classes_add(const char* runs, int class_) {
    for (int c = 0, n; *runs;) {
        c += unicode_number(&runs);
        n = unicode_number(&runs);
        for (int of_run = class_ ? class_ : unicode_digit(&runs) * MARK; n > 0; n--)
            character_classes[c++] |= (uint16_t)of_run;
    }
}

static void classes_make(void) {
    static const int spaces[][2] = {{9, 13}, {32, 32}, {0x85, 0x85}, {0xA0, 0xA0}, {0x1680, 0x1680}, {0x2000, 0x200A},
                                    {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}};
    if (character_classes) return;
    character_classes = (uint16_t*)checked_malloc(0x110001 * sizeof(uint16_t));
    memset(character_classes, 0, 0x110001 * sizeof(uint16_t));
    classes_add(unicode_letters, LETTER);
    classes_add(unicode_numbers, NUMBER);
    classes_add(unicode_marks, 0);
    for (size_t i = 0; i < sizeof spaces / sizeof spaces[0]; i++)
        for (int c = spaces[i][0]; c <= spaces[i][1]; c++) character_classes[c] |= SPACE;
}

// The character at s < end and its length; a byte that is no UTF-8 is a character of its own, of no class: 0x110000.
static int character_at(const char* s, const char* end, int* length) {
    const unsigned char* u = (const unsigned char*)s;
    int n = utf8_length(s, end);
    *length = imax(n, 1);
    return n == 0 ? 0x110000 : n == 1 ? u[0] : n == 2 ? (u[0] & 31) << 6 | (u[1] & 63)
         : n == 3 ? (u[0] & 15) << 12 | (u[1] & 63) << 6 | (u[2] & 63)
                  : (u[0] & 7) << 18 | (u[1] & 63) << 12 | (u[2] & 63) << 6 | (u[3] & 63);
}

static int class_at(const char* s, const char* end, int* length) {
    return s < end ? character_classes[character_at(s, end, length)] : (*length = 0, 0);
}

// ---- words -----------------------------------------------------------------------------------------------------

// The expressions by which tokenizers cut a text into words differ in few places:
//     contractions                    's|'t|'re|'ve|'m|'ll|'d, in capitals too with (?i:
//     [^\r\n\p{L}\p{N}]?\p{L}+        any_before: what may stand before letters; otherwise a space
//     \p{N}{1,3}                      digits: the most in a word; 0: any number, with a space before
//      ?[^\s\p{L}\p{N}]+[\r\n]*       lines: other characters take the ends of lines along, and \s*[\r\n]+ is a word
//     \s+(?!\S)|\s+                   spaces, but the last before a word
typedef struct {
    const char* expression;
    int capitals, any_before, digits, lines;
} WordRule;

#define LETTERS_LIKE_LLAMA "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define REST_LIKE_LLAMA "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
static const WordRule word_rules[] = {
    {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", 0, 0, 0, 0},   // GPT-2
    {LETTERS_LIKE_LLAMA "\\p{N}{1,3}" REST_LIKE_LLAMA, 1, 1, 3, 1},                                        // Llama 3
    {LETTERS_LIKE_LLAMA "\\p{N}" REST_LIKE_LLAMA, 1, 1, 1, 1},                                             // Qwen
};

// The length of a contraction at s, or 0. Without regard to case ſ (U+017F) is an s.
static int contraction_at(const char* s, const char* end, int capitals) {
    static const char* const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    if (*s != '\'') return 0;
    if (capitals && end - s > 2 && !memcmp(s + 1, "\xC5\xBF", 2)) return 3;
    for (int i = 0; i < 7; i++) {
        long n = (long)strlen(endings[i]);
        int differs = end - s <= n || (capitals ? strncasecmp : strncmp)(s + 1, endings[i], (size_t)n);
        if (!differs) return (int)n + 1;
    }
    return 0;
}

// The end of the run of characters of (or, with not_of = 1, not of) some classes at s, of `most` characters at most.
static const char* run_of(const char* s, const char* end, int classes, int not_of, long most) {
    for (int n; s < end && most > 0 && ((class_at(s, end, &n) & classes) != 0) != not_of; most--) s += n;
    return s;
}

// The end of the word that begins at s.
static const char* word_end(const char* s, const char* end, const WordRule* r) {
    enum { LISTED = LETTER | NUMBER | SPACE };          // what [^\s\p{L}\p{N}] leaves out
    int n, after_n, contraction = contraction_at(s, end, r->capitals), first = class_at(s, end, &n);
    if (contraction) return s + contraction;
    int second = class_at(s + n, end, &after_n), line_end = *s == '\n' || *s == '\r';
    if (first & LETTER) return run_of(s, end, LETTER, 0, LONG_MAX);
    int before = r->any_before ? !line_end && !(first & NUMBER) : *s == ' ';
    if (before && second & LETTER) return run_of(s + n, end, LETTER, 0, LONG_MAX);
    const char* t = r->digits == 0 && *s == ' ' && second & NUMBER ? s + n : s;
    if (class_at(t, end, &n) & NUMBER) return run_of(t, end, NUMBER, 0, r->digits ? r->digits : LONG_MAX);
    t = *s == ' ' && s + 1 < end && !(second & LISTED) ? s + 1 : s;
    if (!(class_at(t, end, &n) & LISTED)) {
        t = run_of(t, end, LISTED, 1, LONG_MAX);
        while (r->lines && t < end && (*t == '\n' || *t == '\r')) t++;
        return t;
    }
    const char *space_end = run_of(s, end, SPACE, 0, LONG_MAX), *line = space_end;
    while (line > s && line[-1] != '\n' && line[-1] != '\r') line--;
    if (r->lines && line > s) return line;              // up to the last end of line among the spaces
    if (space_end == end) return space_end;
    for (t = s; class_at(t, end, &n), t + n < space_end;) t += n;
    return t > s ? t : space_end;                       // all but the last space, which belongs to what follows
}

// ---- hash tables -----------------------------------------------------------------------------------------------

typedef struct {
    uint64_t key;                   // of a piece its hash; of a pair left << 32 | right
    const char* piece;              // of a piece; NULL: of something else, or nothing
    int length, id, rank;           // id = -1: an empty place
} HashPlace;

typedef struct {
    HashPlace* places;              // (size), size a power of two, at least twice the entries
    size_t size;
} HashTable;

static void table_make(HashTable* t, size_t entries) {
    for (t->size = 16; t->size < 2 * entries; t->size *= 2) {}
    t->places = (HashPlace*)checked_malloc(sizeof(HashPlace) * t->size);
    for (size_t i = 0; i < t->size; i++) t->places[i].id = -1;
}

// The place of a piece (or, with piece = NULL, of a key alone), empty or not.
static HashPlace* table_at(const HashTable* t, uint64_t key, const char* piece, int length) {
    for (size_t i = (size_t)((key * 0x9E3779B97F4A7C15ull) >> 32) & (t->size - 1);; i = (i + 1) & (t->size - 1)) {
        HashPlace* p = &t->places[i];
        if (p->id < 0) return p;
        if (p->key == key && (!piece || (p->length == length && !memcmp(p->piece, piece, (size_t)length)))) return p;
    }
}

// A new entry; 0 if there is one already, which stays.
static int table_put(HashTable* t, uint64_t key, const char* piece, int length, int id, int rank) {
    HashPlace *p = table_at(t, key, piece, length), place = {key, piece, length, id, rank};
    if (p->id >= 0) return 0;
    *p = place;
    return 1;
}

// ---- form NFC (Unicode's annex 15) -------------------------------------------------------------------------------

// What characters are made of, made at first use: by character, id and rank are the two parts, the second 0 if there is
// one; by first << 32 | second, id is the character.
static HashTable decompositions, compositions;

static void decompositions_add(const char* runs, int parts) {
    int seconds[128], num_seconds = 0, firsts[2] = {0, 0}, turn = 0;
    for (int c = 0; *runs;) {
        c += unicode_number(&runs);
        for (int n = unicode_number(&runs); n > 0; n--, c++) {
            int *first = &firsts[turn++ % parts], d = unicode_number(&runs), second = 1;   // twice, plus 1: not joined
            *first += d & 1 ? -(d + 1) / 2 : d / 2;
            if (parts == 2) {
                int k = unicode_number(&runs);
                if (k == num_seconds) seconds[num_seconds++] = unicode_number(&runs);
                second = seconds[k];
            }
            uint64_t pair = (uint64_t)*first << 32 | (uint64_t)(second >> 1);
            table_put(&decompositions, (uint64_t)c, NULL, 0, *first, second >> 1);
            if (!(second & 1)) table_put(&compositions, pair, NULL, 0, c, 0);
        }
    }
}

// The character that two make, or -1. Hangul's are numbered: a lead, one of 21 vowels, and none or one of 27 tails.
static int composed(int first, int second) {
    int lead = first - 0x1100, vowel = second - 0x1161, syllable = first - 0xAC00, tail = second - 0x11A7;
    if (lead >= 0 && lead < 19 && vowel >= 0 && vowel < 21) return 0xAC00 + (lead * 21 + vowel) * 28;
    if (syllable >= 0 && syllable < 11172 && syllable % 28 == 0 && tail > 0 && tail < 28) return first + tail;
    return table_at(&compositions, (uint64_t)first << 32 | (uint64_t)second, NULL, 0)->id;
}

// A starter, with the marks behind it in the order of their classes; marks alone at the begin of a text.
typedef struct {
    int* characters;
    int count, room;
} MarkedCharacter;

static int rank_of(int c) { return character_classes[c] / MARK; }

// Joins the starter with the marks that it can take: none that stands before is of the same class or a higher one.
static void marks_join(MarkedCharacter* m) {
    int kept = 1;
    if (m->count == 0 || rank_of(m->characters[0])) return;
    for (int i = 1; i < m->count; i++) {
        int c = m->characters[i], blocked = kept > 1 && rank_of(m->characters[kept - 1]) >= rank_of(c);
        int whole = blocked ? -1 : composed(m->characters[0], c);
        if (whole >= 0) m->characters[0] = whole;
        else m->characters[kept++] = c;
    }
    m->count = kept;
}

static void marks_write(MarkedCharacter* m, Text* out) {
    char bytes[4];
    marks_join(m);
    for (int i = 0; i < m->count; i++) text_add(out, bytes, (size_t)utf8_write(bytes, (uint32_t)m->characters[i]));
    m->count = 0;
}

static void marks_put(MarkedCharacter* m, int c, Text* out) {
    const HashPlace* parts = table_at(&decompositions, (uint64_t)c, NULL, 0);
    if (parts->id >= 0) {
        marks_put(m, parts->id, out);
        if (parts->rank) marks_put(m, parts->rank, out);
        return;
    }
    int rank = rank_of(c), at;
    if (rank == 0) {
        marks_join(m);
        int whole = m->count == 1 ? composed(m->characters[0], c) : -1;
        if (whole >= 0) m->count = 0, c = whole;
        marks_write(m, out);
    }
    if (m->count == m->room) {
        m->room = 2 * m->room + 16;
        m->characters = (int*)realloc(m->characters, sizeof(int) * (size_t)m->room);
        if (!m->characters) die(1, "out of memory");
    }
    for (at = m->count++; at > 0 && rank_of(m->characters[at - 1]) > rank; at--)
        m->characters[at] = m->characters[at - 1];
    m->characters[at] = c;
}

// Adds a text in form NFC: its characters taken apart, marks in order, and put together again.
static void text_add_nfc(Text* out, const char* s, const char* end) {
    MarkedCharacter m = {NULL, 0, 0};
    if (!decompositions.size) {
        table_make(&decompositions, 2100);
        table_make(&compositions, 1000);
        decompositions_add(unicode_pairs, 2);
        decompositions_add(unicode_singles, 1);
    }
    for (int n; s < end; s += n) {
        int c = character_at(s, end, &n);
        if (c < 0x110000) marks_put(&m, c, out);
        else marks_write(&m, out), text_add(out, s, 1);
    }
    marks_write(&m, out);
    free(m.characters);
}

// ---- a tokenizer.json ------------------------------------------------------------------------------------------

typedef enum { PREPEND, REPLACE, MAKE_NFC, CUT_AT_ADDED, CUT_WORDS, CUT_DIGITS, CUT_AT_PREFIX } TextStepKind;
typedef enum { NEVER, FIRST, ALWAYS, UNLESS_THERE } PrependWhen;

// What is done to a part of the text, in order: PREPEND `with`, REPLACE `what` by `with`, bring into form NFC, cut at
// the added tokens that are found in what came of it, cut into words by a rule, cut out digits (most = 1: each), cut
// before each `with`.
typedef struct {
    TextStepKind kind;
    PrependWhen when;
    char *what, *with;
    const WordRule* rule;
    int most, normalized;           // normalized: which added tokens
} TextStep;

typedef struct {
    char* content;
    int length, id, strip_left, strip_right;
    int normalized;                 // 0: found in the text; 1: in what the normalizer leaves of it
} AddedToken;

typedef struct {
    HashTable pieces, merges;
    int bytes_first;                // 1: a word begins as its bytes; 0: as its characters
    int byte_ids[256];              // of <0x00> to <0xFF>, or -1
    int unknown, fuse_unknown, ignore_merges;
    AddedToken* added;              // (num_added), longest first
    int num_added;
    char begins[256];               // 1: an added token begins with this byte
    TextStep steps[16];
    int num_steps;
    int *before, *after, num_before, num_after;         // what the whole text stands between
} Encoder;

static uint64_t piece_hash(const char* s, size_t n) {
    uint64_t h = 0xCBF29CE484222325ull;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 0x100000001B3ull;
    return h;
}

static int piece_id(const Encoder* e, const char* s, size_t n) {
    return table_at(&e->pieces, piece_hash(s, n), s, (int)n)->id;
}

static const char* json_string_of(const Json* j, const char* key) {
    const Json* v = json_get(j, key);
    return v && v->type == JSON_STRING ? v->string : "";
}

static int json_flag(const Json* j, const char* key) { return json_get(j, key) && json_get(j, key)->type == JSON_TRUE; }

static TextStep* add_step(Encoder* e, TextStepKind kind) {
    TextStep* s = &e->steps[e->num_steps++];
    memset(s, 0, sizeof *s);
    s->kind = kind;
    s->what = s->with = NULL;
    return s;
}

// A normalizer or pre_tokenizer of tokenizer.json as steps; 0 and an error if it asks for more than is here.
static int add_steps(Encoder* e, const Json* j, Error* error) {
    if (json_absent(j)) return 1;
    const char* type = json_string_of(j, "type");
    const Json *pattern = json_get(j, "pattern"), *list = json_get(j, strcmp(type, "Sequence") ? "" : "normalizers");
    if (!strcmp(type, "Sequence")) {
        if (!list) list = json_get(j, "pretokenizers");
        for (int i = 0; list && i < list->count; i++) {
            if (i > 0 && !strcmp(json_string_of(list->items[i - 1], "type"), "ByteLevel"))
                return set_error(error, "it has a step after ByteLevel");
            if (!add_steps(e, list->items[i], error)) return 0;
        }
        return 1;
    }
    if (e->num_steps + 4 > 16) return set_error(error, "more steps than 16");
    if (!strcmp(type, "NFC")) {
        add_step(e, MAKE_NFC);
    } else if (!strcmp(type, "Prepend")) {
        TextStep* s = add_step(e, PREPEND);
        s->when = ALWAYS;
        s->with = copy_string(json_string_of(j, "prepend"));
    } else if (!strcmp(type, "Replace") && *json_string_of(pattern, "String")) {
        TextStep* s = add_step(e, REPLACE);
        s->what = copy_string(json_string_of(pattern, "String"));
        s->with = copy_string(json_string_of(j, "content"));
    } else if (!strcmp(type, "Digits")) {
        add_step(e, CUT_DIGITS)->most = json_flag(j, "individual_digits") ? 1 : INT_MAX;
    } else if (!strcmp(type, "Split")) {
        const WordRule* rule = NULL;
        for (size_t i = 0; i < sizeof word_rules / sizeof word_rules[0]; i++)
            if (!strcmp(json_string_of(pattern, "Regex"), word_rules[i].expression)) rule = &word_rules[i];
        if (!rule || strcmp(json_string_of(j, "behavior"), "Isolated") || json_flag(j, "invert"))
            return set_error(error, "it cuts words by an expression of its own, %.80s",
                             json_string_of(pattern, "Regex"));
        add_step(e, CUT_WORDS)->rule = rule;
    } else if (!strcmp(type, "ByteLevel")) {
        if (json_flag(j, "add_prefix_space")) {
            TextStep* s = add_step(e, PREPEND);
            s->when = UNLESS_THERE;
            s->with = copy_string(" ");
        }
        if (!json_get(j, "use_regex") || json_flag(j, "use_regex")) add_step(e, CUT_WORDS)->rule = &word_rules[0];
    } else if (!strcmp(type, "Metaspace")) {
        const char* scheme = json_string_of(j, "prepend_scheme");
        const Json* add = json_get(j, "add_prefix_space");
        TextStep* replace = add_step(e, REPLACE);
        replace->what = copy_string(" ");
        replace->with = copy_string(json_string_of(j, "replacement"));
        TextStep* prepend = add_step(e, PREPEND);
        prepend->with = copy_string(replace->with);
        prepend->when = !strcmp(scheme, "never") || (!*scheme && add && add->type == JSON_FALSE) ? NEVER
                        : !strcmp(scheme, "first") ? FIRST : UNLESS_THERE;
        if (!json_get(j, "split") || json_flag(j, "split"))
            add_step(e, CUT_AT_PREFIX)->with = copy_string(replace->with);
    } else return set_error(error, "it asks for \"%.60s\"", type);
    return 1;
}

// The ids that a TemplateProcessing puts around a text.
static int add_template(Encoder* e, const Json* j, Error* error) {
    const char* type = json_string_of(j, "type");
    if (json_absent(j) || !strcmp(type, "ByteLevel")) return 1;
    const Json *list = json_get(j, "processors"), *single = json_get(j, "single");
    if (!strcmp(type, "Sequence")) {
        for (int i = 0; list && i < list->count; i++)
            if (!add_template(e, list->items[i], error)) return 0;
        return 1;
    }
    if (strcmp(type, "TemplateProcessing")) return set_error(error, "it asks for \"%.60s\"", type);
    for (int i = 0, seen = 0; single && i < single->count; i++) {
        const Json* special = json_get(single->items[i], "SpecialToken");
        if (!special) {
            seen = 1;
            continue;
        }
        const Json* ids = json_get(json_get(json_get(j, "special_tokens"), json_string_of(special, "id")), "ids");
        for (int k = 0; ids && k < ids->count; k++) {
            int **to = seen ? &e->after : &e->before, *count = seen ? &e->num_after : &e->num_before;
            *to = (int*)realloc(*to, sizeof(int) * (size_t)(*count + 1));
            if (!*to) die(1, "out of memory");
            (*to)[(*count)++] = (int)json_whole(ids->items[k], INT_MAX);
        }
    }
    return 1;
}

static int longer_first(const void* a, const void* b) {
    return ((const AddedToken*)b)->length - ((const AddedToken*)a)->length;
}

// A key of the vocabulary as the bytes that it stands for; *length is their number, or -1 if it stands for none.
static char* piece_bytes(const Encoder* e, const char* key, int* length) {
    char *out = copy_string(key), *p = out;
    const char* end = key + strlen(key);
    if (!e->bytes_first) {
        *length = (int)(end - key);
        return out;
    }
    while (key < end) {
        int b = next_byte(&key, end);
        if (b < 0) {
            *length = -1;
            return out;
        }
        *p++ = (char)b;
    }
    *length = (int)(p - out);
    return out;
}

// The vocabulary, and what stands for a character that it lacks.
static int read_vocabulary(Encoder* e, const Json* model, Error* error) {
    const Json* vocab = json_get(model, "vocab");
    table_make(&e->pieces, (size_t)vocab->count);
    for (int i = 0; i < vocab->count; i++) {
        int length, id = (int)json_whole(vocab->items[i], INT_MAX);
        char* piece = piece_bytes(e, vocab->items[i]->key, &length);
        if (id < 0 || length < 0 || !table_put(&e->pieces, piece_hash(piece, (size_t)length), piece, length, id, 0))
            free(piece);
    }
    for (int b = 0; b < 256; b++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", b);
        e->byte_ids[b] = json_flag(model, "byte_fallback") ? piece_id(e, name, 6) : -1;
    }
    const char* unknown = json_string_of(model, "unk_token");
    e->unknown = *unknown ? piece_id(e, unknown, strlen(unknown)) : -1;
    if (*unknown && e->unknown < 0) return set_error(error, "its vocabulary lacks its unk_token, %.40s", unknown);
    e->fuse_unknown = json_flag(model, "fuse_unk");
    return 1;
}

// The merges, in the order in which they were learned: "left right", or [left, right].
static int read_merges(Encoder* e, const Json* model, Error* error) {
    const Json* merges = json_get(model, "merges");
    e->ignore_merges = json_flag(model, "ignore_merges");
    table_make(&e->merges, (size_t)merges->count);
    for (int i = 0; i < merges->count; i++) {
        const Json* m = merges->items[i];
        const char *text = m->type == JSON_STRING ? m->string : "", *space = strchr(text, ' ');
        int pair = m->type == JSON_ARRAY && m->count == 2 && m->items[0]->type == JSON_STRING &&
                   m->items[1]->type == JSON_STRING;
        if (!pair && !space) return set_error(error, "merge %d is no pair", i);
        char *left = pair ? copy_string(m->items[0]->string) : copy_bytes(text, (size_t)(space - text)), *right;
        int n, k;
        right = piece_bytes(e, pair ? m->items[1]->string : space + 1, &k);
        char* whole = piece_bytes(e, left, &n);
        free(left);
        int left_id = n < 0 ? -1 : piece_id(e, whole, (size_t)n), right_id = k < 0 ? -1 : piece_id(e, right, (size_t)k);
        whole = (char*)realloc(whole, (size_t)(imax(n, 0) + imax(k, 0) + 1));
        if (!whole) die(1, "out of memory");
        if (k > 0 && n >= 0) memcpy(whole + n, right, (size_t)k);
        int id = left_id < 0 || right_id < 0 ? -1 : piece_id(e, whole, (size_t)(n + k));
        free(whole);
        free(right);
        if (id < 0) return set_error(error, "merge %d makes a piece that the vocabulary lacks", i);
        uint64_t key = (uint64_t)left_id << 32 | (uint64_t)right_id;    // of a merge listed twice the last counts
        if (!table_put(&e->merges, key, NULL, 0, id, i)) table_at(&e->merges, key, NULL, 0)->rank = i;
    }
    return 1;
}

static int read_added(Encoder* e, const Json* j, Error* error) {
    const Json *added = json_get(j, "added_tokens"), *normalizer = json_get(j, "normalizer");
    int changes = json_contains_type(normalizer, "Prepend") || json_contains_type(normalizer, "Replace"), late = 0;
    e->added = (AddedToken*)checked_malloc(sizeof(AddedToken) * (size_t)(1 + (added ? added->count : 0)));
    for (int i = 0; added && i < added->count; i++) {
        const Json* a = added->items[i];
        const char* content = json_string_of(a, "content");
        int normalized = json_flag(a, "normalized"), id = (int)json_whole(json_get(a, "id"), INT_MAX);
        if (json_flag(a, "single_word") || (changes && normalized))
            return set_error(error, "added token \"%.40s\" is found in a way that is not supported", content);
        if (!*content || id < 0) continue;
        Text t = {NULL, 0, 0};
        if (normalized && json_contains_type(normalizer, "NFC")) text_add_nfc(&t, content, content + strlen(content));
        else text_add(&t, content, strlen(content));
        AddedToken token = {t.data, (int)t.length, id, json_flag(a, "lstrip"), json_flag(a, "rstrip"), normalized};
        e->begins[(unsigned char)*token.content] = 1;
        e->added[e->num_added++] = token;
        late |= normalized;
    }
    qsort(e->added, (size_t)e->num_added, sizeof(AddedToken), longer_first);
    if (late) add_step(e, CUT_AT_ADDED)->normalized = 1;
    return 1;
}

static int encoder_read(Encoder* e, const Json* j, Error* error) {
    const Json *model = json_get(j, "model"), *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
    const Json *normalizer = json_get(j, "normalizer");
    const char* type = json_string_of(model, "type");
    if (*type && strcmp(type, "BPE")) return set_error(error, "its model is %.40s, not BPE", type);
    if (!vocab || vocab->type != JSON_OBJECT || !merges || merges->type != JSON_ARRAY)
        return set_error(error, "its model has no vocab and merges");
    if (!json_absent(json_get(model, "dropout"))) return set_error(error, "it drops merges at random");
    if (*json_string_of(model, "continuing_subword_prefix") || *json_string_of(model, "end_of_word_suffix"))
        return set_error(error, "its pieces have a prefix or suffix");
    if (json_contains_type(normalizer, "ByteLevel")) return set_error(error, "its normalizer is ByteLevel");
    e->bytes_first = json_contains_type(json_get(j, "pre_tokenizer"), "ByteLevel");
    add_step(e, CUT_AT_ADDED);
    return read_vocabulary(e, model, error) && read_merges(e, model, error) && add_steps(e, normalizer, error) &&
           read_added(e, j, error) && add_steps(e, json_get(j, "pre_tokenizer"), error) &&
           add_template(e, json_get(j, "post_processor"), error);
}

static void encoder_free(Encoder* e) {
    if (!e) return;
    for (size_t i = 0; i < e->pieces.size; i++)
        if (e->pieces.places[i].id >= 0) free((char*)e->pieces.places[i].piece);
    for (int i = 0; i < e->num_added; i++) free(e->added[i].content);
    for (int i = 0; i < e->num_steps; i++) free(e->steps[i].what), free(e->steps[i].with);
    free(e->pieces.places);
    free(e->merges.places);
    free(e->added);
    free(e->before);
    free(e->after);
    free(e);
}

// The encoder of a tokenizer.json that was parsed; NULL and an error that says what it asks for if that is not here.
static Encoder* encoder_make(const Json* j, Error* error) {
    Encoder* e = (Encoder*)checked_malloc(sizeof(Encoder));
    memset(e, 0, sizeof *e);
    classes_make();
    if (encoder_read(e, j, error)) return e;
    encoder_free(e);
    return NULL;
}

// ---- a text ----------------------------------------------------------------------------------------------------

typedef struct {
    int* ids;
    long count, room;
} Ids;

static void ids_add(Ids* out, int id) {
    if (out->count == out->room) {
        out->room = out->room ? 2 * out->room : 1024;
        out->ids = (int*)realloc(out->ids, sizeof(int) * (size_t)out->room);
        if (!out->ids) die(1, "out of memory");
    }
    out->ids[out->count++] = id;
}

// Symbols of a word, linked to their neighbours, and a heap of the merges that they could make, best first.
typedef struct {
    int id, before, after;          // id = -1: merged into another
} Symbol;

typedef struct {
    int rank, at, id;               // the symbol at `at` and the one after it would become `id`
} Merging;

typedef struct {
    Symbol* symbols;
    Merging* heap;                  // (num_heap), heap[0] is the best
    int num_symbols, room, num_heap;
} WordMerger;

static int merge_less(Merging a, Merging b) { return a.rank != b.rank ? a.rank < b.rank : a.at < b.at; }

// Adds the merge of a symbol and the one after it, if there is one, to the heap.
static void word_offer(const Encoder* e, WordMerger* w, int at) {
    const Symbol* s = &w->symbols[at];
    if (s->after < 0) return;
    uint64_t key = (uint64_t)s->id << 32 | (uint64_t)w->symbols[s->after].id;
    const HashPlace* p = table_at(&e->merges, key, NULL, 0);
    if (p->id < 0) return;
    Merging m = {p->rank, at, p->id};
    int i = w->num_heap++;
    for (; i > 0 && merge_less(m, w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = m;
}

// Takes the best merge from the heap.
static Merging word_best(WordMerger* w) {
    Merging best = w->heap[0], last = w->heap[--w->num_heap];
    int i = 0;
    for (int child; (child = 2 * i + 1) < w->num_heap; i = child) {
        if (child + 1 < w->num_heap && merge_less(w->heap[child + 1], w->heap[child])) child++;
        if (!merge_less(w->heap[child], last)) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return best;
}

static void word_add(WordMerger* w, int id) {
    Symbol s = {id, w->num_symbols - 1, -1};
    if (w->num_symbols) w->symbols[w->num_symbols - 1].after = w->num_symbols;
    w->symbols[w->num_symbols++] = s;
}

// The tokens of one word: symbols for its bytes or characters, then the best merge of two neighbours, until there is
// none.
static void encode_word(const Encoder* e, WordMerger* w, const char* s, size_t n, Ids* out) {
    int whole = e->ignore_merges ? piece_id(e, s, n) : -1;
    if (whole >= 0) {
        ids_add(out, whole);
        return;
    }
    if ((size_t)w->room < n) {
        w->room = (int)n + 64;
        free(w->symbols);
        free(w->heap);
        w->symbols = (Symbol*)checked_malloc(sizeof(Symbol) * (size_t)w->room);
        w->heap = (Merging*)checked_malloc(sizeof(Merging) * 3 * (size_t)w->room);      // each merge offers two more
    }
    w->num_symbols = w->num_heap = 0;
    const char* end = s + n;
    for (int length, unknown = 0; s < end; s += length) {
        length = e->bytes_first ? 1 : imax(utf8_length(s, end), 1);
        int id = piece_id(e, s, (size_t)length), bytes = id < 0;
        for (int i = 0; i < length; i++) bytes = bytes && e->byte_ids[(unsigned char)s[i]] >= 0;
        for (int i = 0; i < length && bytes; i++) word_add(w, e->byte_ids[(unsigned char)s[i]]);
        int is_unknown = id < 0 && !bytes && e->unknown >= 0;
        if (is_unknown ? !(unknown && e->fuse_unknown) : id >= 0) word_add(w, is_unknown ? e->unknown : id);
        unknown = is_unknown;
    }
    for (int i = 0; i < w->num_symbols; i++) word_offer(e, w, i);
    while (w->num_heap) {
        Merging m = word_best(w);
        Symbol* left = &w->symbols[m.at];
        if (left->id < 0 || left->after < 0) continue;
        Symbol* right = &w->symbols[left->after];
        const HashPlace* now = table_at(&e->merges, (uint64_t)left->id << 32 | (uint64_t)right->id, NULL, 0);
        if (now->id != m.id || now->rank != m.rank) continue;           // one of them has been merged meanwhile
        left->id = m.id;
        right->id = -1;
        left->after = right->after;
        if (left->after >= 0) w->symbols[left->after].before = m.at;
        if (left->before >= 0) word_offer(e, w, left->before);
        word_offer(e, w, m.at);
    }
    for (int i = 0; i < w->num_symbols; i++)
        if (w->symbols[i].id >= 0) ids_add(out, w->symbols[i].id);
}

static int starts_with(const char* s, const char* end, const char* prefix) {
    size_t n = strlen(prefix);
    return n > 0 && (size_t)(end - s) >= n && !memcmp(s, prefix, n);
}

// The added token of a kind that begins at s, the longest, or NULL.
static const AddedToken* added_at(const Encoder* e, const char* s, const char* end, int normalized) {
    if (!e->begins[(unsigned char)*s]) return NULL;
    for (int i = 0; i < e->num_added; i++)
        if (e->added[i].normalized == normalized && starts_with(s, end, e->added[i].content)) return &e->added[i];
    return NULL;
}

// What the steps from number `step` on make of a part of the text; first = 1: the text begins with it.
static int encode_part(const Encoder* e, WordMerger* w, int step, const char* s, const char* end, int first, Ids* out,
                       Error* error) {
    const TextStep* how = &e->steps[step];
    if (s == end) return 1;
    if (step == e->num_steps) {
        if (end - s > INT_MAX / 4) return set_error(error, "a word of %ld bytes; cut the text up", (long)(end - s));
        encode_word(e, w, s, (size_t)(end - s), out);
        return 1;
    }
    if (how->kind == CUT_AT_ADDED) {
        for (const char *begin = s, *part = s;;) {
            const AddedToken* added = s < end ? added_at(e, s, end, how->normalized) : NULL;
            if (s < end && !added) {
                s++;
                continue;
            }
            const char* part_end = s;
            int n;
            for (const char* t = s; added && added->strip_left && t > part;) {
                for (t--; t > part && (*t & 0xC0) == 0x80;) t--;
                if (!(class_at(t, s, &n) & SPACE) || t + n != part_end) break;
                part_end = t;
            }
            if (!encode_part(e, w, step + 1, part, part_end, first && part == begin, out, error)) return 0;
            if (!added) return 1;
            ids_add(out, added->id);
            s += added->length;
            if (added->strip_right) s = run_of(s, end, SPACE, 0, LONG_MAX);
            part = s;
        }
    }
    if (how->kind == PREPEND || how->kind == REPLACE || how->kind == MAKE_NFC) {
        int wanted = how->when == ALWAYS || (how->when != NEVER && !starts_with(s, end, how->with));
        int put = how->kind == PREPEND && wanted && (how->when != FIRST || first);
        if (how->kind == PREPEND && !put) return encode_part(e, w, step + 1, s, end, first, out, error);
        Text changed = {NULL, 0, 0};
        if (how->kind == MAKE_NFC) {
            text_add_nfc(&changed, s, end);
            s = end;
        }
        if (put) {
            text_add(&changed, how->with, strlen(how->with));
            text_add(&changed, s, (size_t)(end - s));
        }
        for (; !put && s < end;) {
            int found = starts_with(s, end, how->what);
            text_add(&changed, found ? how->with : s, found ? strlen(how->with) : 1);
            s += found ? strlen(how->what) : 1;
        }
        int ok = encode_part(e, w, step + 1, changed.data, changed.data + changed.length, first, out, error);
        free(changed.data);
        return ok;
    }
    for (const char* word = s; word < end; word = s, first = 0) {
        int n;
        if (how->kind == CUT_WORDS) s = word_end(word, end, how->rule);
        else if (how->kind == CUT_AT_PREFIX)
            for (s++; s < end && !starts_with(s, end, how->with);) s++;
        else if (class_at(s, end, &n) & NUMBER) s = run_of(s, end, NUMBER, 0, how->most);
        else s = run_of(s, end, NUMBER, 1, LONG_MAX);
        if (!encode_part(e, w, step + 1, word, s, first, out, error)) return 0;
    }
    return 1;
}

// The tokens of a text of `length` bytes, *count of them; the caller frees them. whole = 1: with those that the
// tokenizer puts around a text. Bytes that are no UTF-8 are characters of their own. NULL and an error if a word is too
// long.
static int* encode(const Encoder* e, const char* text, size_t length, int whole, long* count, Error* error) {
    Ids out = {NULL, 0, 0};
    WordMerger word;
    memset(&word, 0, sizeof word);
    for (int i = 0; whole && i < e->num_before; i++) ids_add(&out, e->before[i]);
    int ok = encode_part(e, &word, 0, text, text + length, 1, &out, error);
    for (int i = 0; whole && i < e->num_after; i++) ids_add(&out, e->after[i]);
    free(word.symbols);
    free(word.heap);
    if (!out.ids) ids_add(&out, 0), out.count = 0;      // an empty text has tokens, too: none
    *count = out.count;
    if (ok) return out.ids;
    free(out.ids);
    return NULL;
}
