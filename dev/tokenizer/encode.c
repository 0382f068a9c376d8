/*
encode.c: the tokens of a text by dev/lib/tokenizer.h, for check.py, which compares them with those of `tokenizers`.

    encode TOKENIZER.JSON TEXT          prints the tokens, one in a line
    encode TOKENIZER.JSON TEXT --back   the text that they make again
    encode --nfc TEXT                   the text in form NFC
*/
#define TRAIN_MOE_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../../train_moe.c"

int main(int argc, char** argv) {
    Error error = {""};
    size_t length = 0;
    long count = 0;
    begin_program("encode");
    if (argc < 3) die(2, "give a tokenizer.json and a text");
    if (!strcmp(argv[1], "--nfc")) {
        char* given = read_file(argv[2], 1ul << 31, &length, &error);
        if (!given) die(2, "%s", error.text);
        Text nfc = {NULL, 0, 0};
        classes_make();
        text_add_nfc(&nfc, given, given + length);
        fwrite(nfc.data, 1, nfc.length, stdout);
        free(nfc.data);
        free(given);
        return 0;
    }
    Json* j = json_read(argv[1], &error);
    Encoder* e = j ? encoder_make(j, &error) : NULL;
    char* text = e ? read_file(argv[2], 1ul << 31, &length, &error) : NULL;
    int* ids = text ? encode(e, text, length, 1, &count, &error) : NULL;
    if (!ids) die(2, "%s: %s", argv[1], error.text);
    for (long i = 0; i < count && argc == 3; i++) printf("%d\n", ids[i]);
    if (argc > 3) {
        char dir[PATH_SIZE], *slash;
        snprintf(dir, sizeof dir, "%s", argv[1]);
        if ((slash = strrchr(dir, '/')) != NULL) *slash = 0;
        Tokenizer* t = tokenizer_open(slash ? dir : ".", 1 << 20);
        int prepends = 0;           // a space that was put before the text goes again
        for (int i = 0; i < e->num_steps; i++) prepends |= e->steps[i].kind == PREPEND;
        for (long i = e->num_before; i < count - e->num_after; i++)
            for (int k = i == e->num_before && prepends && *t->pieces[ids[i]] == ' '; k < t->lengths[ids[i]]; k++)
                putchar(t->pieces[ids[i]][k]);
        tokenizer_close(t);
    }
    free(ids);
    free(text);
    encoder_free(e);
    json_free(j);
    return 0;
}
