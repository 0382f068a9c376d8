/*
terminal.c: what a person at a terminal sees. Programs run in a pseudo-terminal, whose other end feeds a small terminal
that knows what ours print: \r, \n, ESC [K, and lines that go on below when they are too wide.
*/
#include <poll.h>

enum { SCREEN_ROWS = 600, SCREEN_COLUMNS = 200 };
typedef struct {
    int columns, row, column;
    char cells[SCREEN_ROWS][SCREEN_COLUMNS + 1];
    int unknown;                        // control characters that it does not know
    char escape[8];                     // the sequence at hand
    int escape_length;
} Screen;

static void screen_put(Screen* s, char c) {
    if (s->escape_length) {
        s->escape[s->escape_length++] = c;
        if (s->escape_length == 2 && c == '[') return;
        s->unknown += s->escape_length != 3 || c != 'K';
        if (s->escape_length == 3 && c == 'K')
            memset(s->cells[s->row] + s->column, 0, (size_t)(s->columns - s->column));
        s->escape_length = 0;
    } else if (c == 27) {
        s->escape[s->escape_length++] = c;
    } else if (c == '\r') {
        s->column = 0;
    } else if (c == '\n') {
        s->row = imin(s->row + 1, SCREEN_ROWS - 1);
    } else if ((unsigned char)c < 32 || c == 127) {
        s->unknown++;
    } else {
        if (s->column >= s->columns) {
            s->column = 0;
            s->row = imin(s->row + 1, SCREEN_ROWS - 1);
        }
        s->cells[s->row][s->column++] = c;
    }
}

// How many rows of the screen begin with this text.
static int screen_count(const Screen* s, const char* begin) {
    int n = 0;
    for (int r = 0; r <= s->row; r++) n += !strncmp(s->cells[r], begin, strlen(begin));
    return n;
}

// The row, from `from` on, that holds this text; NULL: none does.
static const char* screen_find(const Screen* s, const char* text) {
    for (int r = 0; r <= s->row; r++)
        if (strstr(s->cells[r], text)) return s->cells[r];
    return NULL;
}

// Runs this program as `as` (--as-train-moe, --as-upcycle) with stdout and stderr on a terminal of so many columns,
// which says that it has `later` columns as soon as it shows `when` (NULL: never). seen, if not NULL, gets all that is
// printed.
static Screen* run_in_terminal(int columns, const char* when, int later, Text* seen, const char* as,
                               const char* arguments) {
    Screen* screen = (Screen*)checked_malloc(sizeof(Screen));
    char *copy = copy_string(arguments), *rest = copy, *word, *argv[96] = {self_path, (char*)as};
    int argc = 2, master = posix_openpt(O_RDWR | O_NOCTTY), slave, status = 0;
    memset(screen, 0, sizeof *screen);
    screen->columns = columns;
    while ((word = strsep(&rest, " ")) != NULL && argc < 95)
        if (*word) argv[argc++] = word;
    argv[argc] = NULL;
    struct winsize size = {24, (unsigned short)columns, 0, 0};
    if (master < 0 || grantpt(master) || unlockpt(master) || (slave = open(ptsname(master), O_RDWR | O_NOCTTY)) < 0 ||
        ioctl(slave, TIOCSWINSZ, &size))
        die(1, "a pseudo-terminal: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(300);
        setenv("OMP_WAIT_POLICY", "passive", 1);
        dup2(slave, 1);
        dup2(slave, 2);
        close(slave);
        close(master);
        execv(self_path, argv);
        _exit(99);
    }
    char line[256] = "";
    close(slave);
    for (;;) {
        char buffer[4096];
        ssize_t n = read(master, buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;              // the program has ended
        if (seen) text_add(seen, buffer, (size_t)n);
        for (ssize_t i = 0; i < n; i++) {
            size_t k = strlen(line);
            screen_put(screen, buffer[i]);
            if (k == sizeof line - 1) memmove(line, line + 1, k--);
            line[k] = buffer[i];
            line[k + 1] = 0;
            if (when && strstr(line, when)) {
                size.ws_col = (unsigned short)later;
                ioctl(master, TIOCSWINSZ, &size);
                when = NULL;
            }
        }
    }
    close(master);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    free(copy);
    return screen;
}

static void test_progress_of_training(void) {
    static const struct {
        int columns;
        const char *first, *last, *absent;
    } cases[] = {{120, "step 120/120 | loss ", " left", ""},
                 {80, "step 120/120 | loss ", " left", "GFLOP/s"},
                 {40, "step 120/120 | loss ", " left", "tokens/s"},
                 {24, "step 120/120", "", "left"},
                 {9, "step 120", "", "/120"}};
    char arguments[1024];
    snprintf(arguments, sizeof arguments, "%s %s --val-every 0 --val none --steps 120 --data %s", small_run,
             small_experts, temp("corpus.txt"));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Screen* s = run_in_terminal(cases[i].columns, NULL, 0, NULL, "--as-train-moe", arguments);
        const char* row = screen_find(s, "step 120");
        int all = row && strstr(row, " | lr ") && strstr(row, " | norm ") && strstr(row, "GFLOP/s");
        check(ran.code == 0 && s->unknown == 0 && screen_count(s, "step ") == 1 && row &&
                  !strncmp(row, cases[i].first, strlen(cases[i].first)) && strstr(row, cases[i].last) &&
                  (cases[i].absent[0] ? !strstr(row, cases[i].absent) : all),
              "120 steps at %d columns leave one line: %s", cases[i].columns, row ? row : "none");
        free(s);
    }
    Screen* s = run_in_terminal(120, "step 30/", 50, NULL, "--as-train-moe", arguments);
    const char* row = screen_find(s, "step 120");
    check(ran.code == 0 && screen_count(s, "step ") == 1 && row && strlen(row) < 50,
          "the window shrinks while it runs: %s", row ? row : "none");
    free(s);
    run_program("%s", arguments);
    check(ran.code == 0 && strstr(ran.err, "GFLOP/s") && !strchr(ran.err, '\r') && !strchr(ran.err, 27) &&
              strstr(ran.err, "\nstep 120/120 |"),
          "without a terminal every step has its line, with all that is known");
}

// The rest of what goes on for long: it shows what, how far and how long still, and leaves nothing behind.
static void test_other_progress(void) {
    char arguments[2048];
    Text seen = {NULL, 0, 0};
    snprintf(arguments, sizeof arguments, "--model %s --data %s --eval --seq 24", temp("trained"), temp("corpus.txt"));
    Screen* s = run_in_terminal(80, NULL, 0, &seen, "--as-train-moe", arguments);
    text_add(&seen, "", 1);
    check(ran.code == 0 && strstr(seen.data, "\rloss: window 0 of 833") && !screen_count(s, "loss: window") &&
              screen_count(s, "loss ") == 1,
          "--eval shows how far it is");
    free(s);
    seen.length = 0;
    snprintf(arguments, sizeof arguments,
             "%s %s --experts 10 --select grad2 --calibrate %s --calibrate-batches 2 --batch 2 --seq 24 --check %s "
             "--check-batches 2",
             temp("trained"), temp("larger"), temp("corpus.txt"), temp("corpus.txt"));
    s = run_in_terminal(80, NULL, 0, &seen, "--as-upcycle", arguments);
    text_add(&seen, "", 1);
    check(ran.code == 0 && strstr(seen.data, "\rcalibration: window 0 of 4") &&
              strstr(seen.data, "\rcheck: window 0 of 4"),
          "upcycle shows calibration and check");
    check(strstr(seen.data, " % | ") && strstr(seen.data, " GB | ") && strstr(seen.data, "0:00 left"),
          "upcycle shows what is written");
    check(!screen_count(s, "check:") && !screen_find(s, " % |") && !screen_count(s, "calibration"),
          "and leaves nothing");
    free(s);
    seen.length = 0;
    remove_tree(temp("larger"));
    s = run_in_terminal(30, NULL, 0, &seen, "--as-upcycle", arguments);
    text_add(&seen, "", 1);
    check(ran.code == 0 && strstr(seen.data, " % | 0:0") && !strstr(seen.data, "####") && !strstr(seen.data, "MB/s |"),
          "at 30 columns upcycle shows share and time");
    free(s);
    free(seen.data);
    remove_tree(temp("larger"));
    snprintf(arguments, sizeof arguments, "%s %s --steps 400 --lr 1000000 --clip 0 --schedule constant --data %s",
             small_run, small_experts, temp("corpus.txt"));
    s = run_in_terminal(80, NULL, 0, NULL, "--as-train-moe", arguments);
    check(ran.code == 1 && screen_count(s, "train_moe: step ") == 1, "a message stands below the progress");
    free(s);
}

// What may be any bytes is printed as text: python3's bytes.decode(errors="replace"), and no control characters.
static void test_printed_bytes(void) {
    static const struct {
        const char *what, *bytes, *shown;
    } cases[] = {{"text of one to four bytes a character", "a\tb\n\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", NULL},
                 {"lines that end with \\r\\n", "a\r\nb\r\n", NULL},
                 {"\\r alone", "ab\rc\r\r\n", "ab@c@\r\n"},
                 {"escapes, bells, DEL", "a\33[2J\7\177", "a@[2J@@\n"},
                 {"controls of Latin-1", "\xC2\x9B" "2J\xC2\xA0\n", "@2J\xC2\xA0\n"},
                 {"bytes that begin nothing", "\x80\xC0\xC1\xF5\xFF\n", "@@@@@\n"},
                 {"characters cut off", "\xE2\x82" "A\xF0\x9F\x98" "B\xC3\n", "@A@B@\n"},
                 {"overlong, surrogate, too large", "\xE0\x80\x80 \xED\xA0\x80 \xF4\x90\x80\x80\n", "@@@ @@@ @@@@\n"},
                 {"an end within a character", "a\xE2\x82", "a@\n"},
                 {"an end within a line", "ab", "ab\n"},
                 {"nothing", "", ""}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *text = NULL, expected[64], *e = expected;
        size_t size = 0;
        for (const char* s = cases[i].shown ? cases[i].shown : cases[i].bytes; *s; s++)
            e += *s == '@' ? sprintf(e, "\xEF\xBF\xBD") : sprintf(e, "%c", *s);
        if (!cases[i].shown && e[-1] != '\n') *e++ = '\n';
        Printer p = {open_memstream(&text, &size), {0}, 0, '\n'};
        for (const char* s = cases[i].bytes; *s; s++) print_byte(&p, *s);
        print_end(&p);
        fclose(p.out);
        check(size == (size_t)(e - expected) && !memcmp(text, expected, size), "%s", cases[i].what);
        free(text);
    }
    char* text = NULL;
    size_t size = 0;
    Printer p = {open_memstream(&text, &size), {0}, 0, '\n'};
    print_byte(&p, 0);
    print_end(&p);
    fclose(p.out);
    check(size == 4 && !memcmp(text, "\xEF\xBF\xBD\n", 4), "NUL");
    free(text);
}

static int is_valid_text(const char* s) {
    for (const char* end = s + strlen(s); s < end;) {
        int n = utf8_length(s, end);
        if (n == 0 || ((unsigned char)*s < 32 && *s != '\n' && *s != '\t' && *s != '\r') || *s == 127) return 0;
        s += n;
    }
    return 1;
}

// --sample-every, a model alone and --prompt: as many tokens as asked for, as text, with a newline at the end.
static void test_samples(void) {
    size_t n = 0;
    // bytes that are no newline, so that each of them is one character of the sample
    int code = run_program("%s %s --steps 3 --sample-every 2 --tokens 37 --temperature 9 --data %s --val none",
                           small_run, small_experts, temp("corpus.txt"));
    char* out = read_bytes(temp("stdout"), &n);
    const char* sample = out ? strstr(out, "\na sample:\n\n") : NULL;
    long shown = 0;
    for (const char* s = sample ? sample + 12 : ""; *s && strncmp(s, "\nstep ", 6) && strncmp(s, "\nload", 5); s++)
        shown += (*s & 0xC0) != 0x80;
    check(code == 0 && sample && is_valid_text(out) && shown <= 37 && shown >= 20, "--sample-every obeys --tokens: %ld",
          shown);
    code = run_program("--model %s --tokens 20 --temperature 9", temp("trained"));
    out = read_bytes(temp("stdout"), &n);
    check(code == 0 && n > 20 && n < 65 && out[0] == '\n' && out[n - 1] == '\n' && is_valid_text(out) && out &&
              !strncmp(ran.err, "20 tokens, ", 11),
          "a model alone is sampled from: text, a newline at its end");
    check(!exists(temp("trained/log.csv.new")) && saved_step("trained") == 4, "and not trained");
    code = run_program("--model %s --tokens 8 --prompt-ids 65,27,66,200,13", temp("trained"));
    check(code == 0 && !strncmp(ran.out, "A\xEF\xBF\xBD" "B\xEF\xBF\xBD", 8), "a prompt's bytes are shown as text");
    // token shards, of which nobody says what they mean
    write_shard(temp("ids.bin"), SHARD_MAGIC_16, 1, 290, 2, 290, 0);
    code = run_program("%s --vocab 300 --data %s --steps 2 --sample-every 1 --tokens 5 --out %s", small_run,
                       temp("ids.bin"), temp("ids"));
    sample = strstr(ran.out, "\na sample, in numbers: no tokenizer.json says what the tokens mean:\n");
    int numbers = 0, end = 0;
    if (sample) sscanf(strchr(sample + 1, '\n'), " %*d %*d %*d %*d %*d %*d%n", &end), numbers = end > 0;
    check(code == 0 && numbers, "samples of a model without tokenizer.json are numbers, and say so");
    remove_tree(temp("ids"));
    static const char* wrong[][2] = {{"--steps 9", "--steps belongs to training, which wants --data F"},
                                     {"--out @/new", "--out belongs to training, which wants --data F"},
                                     {"--batch 4", "--batch belongs to training, which wants --data F"},
                                     {"--load", "--load: goes with --eval"}};
    for (int i = 0; i < 4; i++) {
        char arguments[256];
        snprintf(arguments, sizeof arguments, "--model @/trained %s", wrong[i][0]);
        check_refused(2, arguments, wrong[i][1]);
    }
}

// --eval of a part is evaluate() of that part.
static void test_eval_of_a_part(void) {
    Dataset* d = dataset_open(temp("corpus.txt"), 24, 256, WHOLE, BYTES);
    Model* m = open_model(temp("trained"), FOR_SCORING, 3, 24);
    Batch batch = batch_create(3, 24);
    char expected[100];
    snprintf(expected, sizeof expected, "loss %.6f |", evaluate(m, d, 5, batch));
    const char* eval = temp("trained");
    int code = run_program("--model %s --data %s --eval --seq 24 --batch 3 --val-batches 5", eval, temp("corpus.txt"));
    check(code == 0 && strstr(ran.out, expected) && strstr(ran.out, " 360 tokens, "), "--eval --val-batches 5: %s",
          expected);
    code = run_program("--model %s --data %s --eval --seq 24 --batch 3 --val-batches 0", eval, temp("corpus.txt"));
    check(code == 0 && strstr(ran.out, " 19992 tokens, "), "--eval --val-batches 0: all of it");
    check_refused(2, "--model @/trained --prompt x --val-batches 3", "--val-batches belongs to training");
    free(batch.tokens);
    dataset_close(d);
}

static int widest_line(const char* s) {
    int widest = 0;
    for (; *s; s += strcspn(s, "\n"), s += *s == '\n') widest = imax(widest, (int)strcspn(s, "\n"));
    return widest;
}

static void test_help_pages(void) {
    size_t n = 0;
    char *page = read_bytes("dev/FLAGS.md", &n), *help = NULL;
    int code = run_program("--help"), examples = 0;
    help = read_bytes(temp("stdout"), &n);
    if (!help) die(1, "stdout cannot be read");
    for (const char* s = help; (s = strstr(s, "\n  ./train_moe ")) != NULL; s++) examples++;
    check(code == 0 && examples == 3 && widest_line(help) <= 80, "--help: three examples, %d columns",
          widest_line(help));
    check(page && strstr(page, help), "dev/FLAGS.md has it word for word");
    code = run_program("-h");
    check(code == 0 && !*ran.err && !strncmp(help, ran.out, strlen(ran.out)), "-h is --help");
    code = up_run("", "-h");
    check(code == 0 && widest_line(up_output) <= 80 && strstr(up_output, "--calibrate-batches"),
          "upcycle -h: %d columns", widest_line(up_output));
    for (int i = 0; i < NUM_ASKED; i++)
        if (!strstr(up_output, ask_table[i].name)) check(0, "upcycle -h: no --%s", ask_table[i].name);
    code = up_run("", " ");
    check(code == 2 && strstr(up_output, "./upcycle SRC DST --experts M") && strstr(up_output, "are missing"),
          "upcycle without arguments prints its usage");
}

static void test_terminal(void) {
    write_corpus(temp("corpus.txt"), 20000);
    check(train_run("trained", "--steps 4 --save-every 2") == 0, "a model to work with");
    test_progress_of_training();
    test_other_progress();
    test_printed_bytes();
    test_samples();
    test_eval_of_a_part();
    test_help_pages();
}
