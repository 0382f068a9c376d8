// sampling.h: generation with a key/value cache, and what each token prints. Needs json.h and a Model.
#pragma once
#include "tokenizer.h"

// A model's bytes may be anything; what is printed of them is text. Bytes that are no UTF-8, and control characters
// (but tab, newline and \r before a newline), of which a terminal would do who knows what, print as U+FFFD.
typedef struct {
    FILE* out;
    char held[4];               // the start of a character, or \r, until it is known what follows
    int num_held, last;         // last: the last byte printed
} Printer;

static void printer_put(Printer* p, const char* bytes, int n) {
    fwrite(bytes, 1, (size_t)n, p->out);
    p->last = bytes[n - 1];
}

// Whether a character of UTF-8 may begin so. The first two bytes tell, as the others can be anything from 80 to BF.
static int utf8_begins(const char* s, int n) {
    char whole[4] = {s[0], n > 1 ? s[1] : (char)(s[0] == (char)0xE0 ? 0xA0 : s[0] == (char)0xF0 ? 0x90 : 0x80),
                     n > 2 ? s[2] : (char)0x80, (char)0x80};
    return utf8_length(whole, whole + 4) > n;
}

static void print_byte(Printer* p, char byte) {
    p->held[p->num_held++] = byte;
    if (byte == '\n' && p->num_held == 2 && p->held[0] == '\r') {
        printer_put(p, "\r\n", 2);
        p->num_held = 0;
        return;
    }
    int n = utf8_length(p->held, p->held + p->num_held), u = (unsigned char)p->held[0];
    if (n == 0 && utf8_begins(p->held, p->num_held)) return;
    if (p->num_held == 1 && byte == '\r') return;
    if (n == 0 || n < p->num_held) {            // what was held has no end; this byte begins anew
        int again = p->num_held > 1;
        printer_put(p, "\xEF\xBF\xBD", 3);
        p->num_held = 0;
        if (again) print_byte(p, byte);
        return;
    }
    int control = (u < 32 && u != '\t' && u != '\n') || u == 127 || (u == 0xC2 && (unsigned char)p->held[1] < 0xA0);
    printer_put(p, control ? "\xEF\xBF\xBD" : p->held, control ? 3 : n);
    p->num_held = 0;
}

// What is held has no end, and the last line gets one.
static void print_end(Printer* p) {
    if (p->num_held) printer_put(p, "\xEF\xBF\xBD", 3);
    if (p->last != '\n') printer_put(p, "\n", 1);
    p->num_held = 0;
    fflush(p->out);
}

// Prints a token. SentencePiece puts a space before the first word, which is not part of the text.
static void tokenizer_print(const Tokenizer* t, int token, int first, Printer* p) {
    char byte = (char)token, number[16];
    const char* piece = t->pieces ? t->pieces[token] : &byte;
    int length = !piece ? 0 : t->pieces ? t->lengths[token] : 1;
    if (!t->pieces && t->count != 256 && !(t->bytes && token < 256)) {      // what its numbers mean nobody has told
        length = snprintf(number, sizeof number, "%s%d", first ? "" : " ", token);
        piece = number;
    }
    for (int i = first && t->pieces && !t->byte_level && length > 0 && piece[0] == ' '; i < length; i++)
        print_byte(p, piece[i]);
}

typedef struct {
    float probability;
    int token;
} Candidate;

static int compare_candidates(const void* a, const void* b) {
    const Candidate *x = (const Candidate*)a, *y = (const Candidate*)b;
    if (x->probability != y->probability) return x->probability > y->probability ? -1 : 1;
    return x->token - y->token;
}

// A token drawn from softmax(logits / temperature), limited to the top_k likeliest (0: all) and to the smallest set
// whose probability reaches top_p. temperature = 0: the likeliest. uniform is a random number in (0, 1); candidates has
// room for V.
static int sample_token(const float* logits, int V, double temperature, int top_k, double top_p, double uniform,
                        Candidate* candidates) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (temperature <= 0) return best;
    double sum = 0, kept = 0;
    for (int v = 0; v < V; v++) {
        candidates[v].token = v;
        candidates[v].probability = (float)exp((logits[v] - logits[best]) / temperature);
        sum += candidates[v].probability;
    }
    int n = V;
    if (top_k > 0 || top_p < 1) {
        qsort(candidates, (size_t)V, sizeof(Candidate), compare_candidates);
        if (top_k > 0 && top_k < n) {       // top-p is then of what is left
            n = top_k;
            sum = 0;
            for (int i = 0; i < n; i++) sum += candidates[i].probability;
        }
        for (int i = 0; i < n; i++) {
            kept += candidates[i].probability;
            if (kept >= top_p * sum) n = i + 1;
        }
        sum = kept;
    }
    double target = uniform * sum, reached = 0;
    for (int i = 0; i < n; i++) {
        reached += candidates[i].probability;
        if (target < reached) return candidates[i].token;
    }
    return candidates[n - 1].token;
}

typedef struct {
    double temperature, top_p;
    int top_k;
    uint64_t seed;
} Sampling;

// Feeds tokens to the cache, at most T at a time. When the cache is full, it starts again from the later half of what
// it held: so the model never sees positions beyond those it was made for. `history` holds all `count` tokens so far.
static void generator_feed(Model* g, const int* history, int fed, int count) {
    while (fed < count) {
        if (g->cached == g->positions) {
            int keep = g->positions / 2;
            g->cached = 0;
            fed -= keep;
        }
        int n = imin(imin(count - fed, g->T), g->positions - g->cached);
        model_forward(g, history + fed, NULL, 1, n);
        fed += n;
    }
    g->backend->read_back(g, LOGITS);
}

// Continues the prompt (ids: room for prompt + tokens) by up to `tokens` tokens and prints all of it, and a newline if
// the text does not end with one. Returns the number of tokens made, which is smaller if the model ended the sequence.
static int generate(Model* g, const Tokenizer* tokenizer, int* ids, int prompt, int tokens, const Sampling* how,
                    FILE* out) {
    int V = g->config.vocab_size, count = prompt;
    Printer printer = {out, {0}, 0, '\n'};
    Candidate* candidates = (Candidate*)checked_malloc(sizeof(Candidate) * (size_t)V);
    g->cached = 0;
    int first = tokenizer->pieces && !tokenizer->pieces[ids[0]] ? 1 : 0;        // after a begin-of-sequence token
    for (int i = 0; i < prompt; i++) tokenizer_print(tokenizer, ids[i], i <= first, &printer);
    generator_feed(g, ids, 0, count);
    for (int i = 0; i < tokens && !stop_signal; i++) {
        double uniform = random_uniform(random_key(how->seed, hash_string("sample"), (uint64_t)i, 0));
        int token = sample_token(g->logits, V, how->temperature, how->top_k, how->top_p, uniform, candidates),
            ended = 0;
        for (int k = 0; k < tokenizer->num_eos; k++) ended |= token == tokenizer->eos[k];
        if (ended) break;
        ids[count++] = token;
        tokenizer_print(tokenizer, token, count - 1 <= first, &printer);
        fflush(out);
        if (i + 1 < tokens) generator_feed(g, ids, count - 1, count);
    }
    print_end(&printer);
    free(candidates);
    return count - prompt;
}

// What a sample without a prompt goes on from: the begin-of-sequence token, for bytes a newline.
static int first_token(const Config* c, const Tokenizer* t) {
    return t->pieces && t->bos < c->vocab_size ? t->bos : '\n' % c->vocab_size;
}

static const char* sample_of(const Config* c, const Tokenizer* t) {
    return t->pieces || c->vocab_size == 256 ? "" : ", in numbers: no tokenizer.json says what the tokens mean";
}

// The generator shares the parameters of the model in training; what else decides its routing is copied.
static void print_sample(Model* generator, const Model* trained, const Sampling* how, int tokens) {
    generator->has_families = trained->has_families;
    generator->config.router.family_penalty = trained->config.router.family_penalty;
    memcpy(generator->family, trained->family,
           sizeof(int) * (size_t)trained->config.num_layers * (size_t)trained->config.num_experts);
    generator->backend->send(generator, 0);
    Tokenizer* tokenizer = tokenizer_open(trained->tokenizer, generator->config.vocab_size);
    tokenizer_add_ends(tokenizer, trained->luggage);
    int* ids = (int*)checked_malloc(sizeof(int) * (size_t)(tokens + 1));
    ids[0] = first_token(&generator->config, tokenizer);
    printf("\na sample%s:\n", sample_of(&generator->config, tokenizer));
    generate(generator, tokenizer, ids, 1, tokens, how, stdout);
    free(ids);
    tokenizer_close(tokenizer);
}
