// log.h: what a run says about itself: sizes, signals, rows of csv files, time left. Needs layout.h.
#pragma once

// Parameters in all, and parameters that one token uses (all but the experts it is not sent to).
static void count_parameters(const Config* c, long* total, long* active) {
    Layout layout = {NULL, 0, 0, 0, NULL};
    layout_walk(&layout, c, NULL);
    *total = *active = layout.matrices + layout.total;
    for (int l = 0; l < c->num_layers; l++)
        *active -= (long)(layer_experts(c, l) - layer_topk(c, l)) * 3 * c->hidden_size * layer_width(c, l);
}

// Floating-point operations of training on one token: 2 for each active parameter forward and 4 backward (the LM head
// counts, looking up an embedding does not), and causal attention over T positions.
static double flops_per_token(const Config* c, int T) {
    long total, active;
    count_parameters(c, &total, &active);
    if (!c->tie_word_embeddings) active -= (long)c->vocab_size * c->hidden_size;
    return 6.0 * active + 6.0 * c->num_layers * c->num_heads * c->head_dim * T;
}

static volatile sig_atomic_t stop_signal = 0;
// The first Ctrl-C or SIGTERM ends the run after the step at hand, a second one at once: saves are whole or not at all.
// (What comes within a second is the same one: timeout(1) signals the process and then its group.)
static void on_signal(int signal_number) {
    static double first;
    if (!stop_signal) {
        first = seconds();
        stop_signal = signal_number;
    } else if (seconds() - first > 1) {
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
}

// Also for a terminal that is closed, unless nohup has seen to that.
static void catch_signals(void) {
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN);
}

// Opens OUT/name for appending. A run that continues at `step` first drops the rows of later steps, which it will make
// again; a new run starts with the header.
static FILE* log_open(const char* out, const char* name, const char* header, long step) {
    char path[PATH_SIZE], temporary[PATH_SIZE], line[1024];
    join_path(path, out, name);
    join_path(temporary, out, ".log");
    FILE *kept = fopen(temporary, "w"), *old = step > 0 ? fopen(path, "r") : NULL;
    if (!kept) die(1, "%s: %s", temporary, strerror(errno));
    fprintf(kept, "%s\n", header);
    if (old) {
        if (fgets(line, sizeof line, old))
            while (fgets(line, sizeof line, old))
                if (strchr(line, '\n') && atol(line) <= step) fputs(line, kept);
        fclose(old);
    }
    if (fclose(kept) || rename(temporary, path)) die(1, "%s: %s", path, strerror(errno));
    FILE* log = fopen(path, "a");
    if (!log) die(1, "%s: %s", path, strerror(errno));
    return log;
}

static void print_duration(double s) {
    long left = (long)(s + 0.5);
    if (left >= 3600) fprintf(stderr, "%ld:%02ld:%02ld left", left / 3600, left / 60 % 60, left % 60);
    else fprintf(stderr, "%ld:%02ld left", left / 60, left % 60);
}
