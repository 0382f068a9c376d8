// terminal.h: what a terminal shows: progress, in one line that is overwritten and fits. Needs seconds().
#pragma once
#include <sys/ioctl.h>

// Columns of the terminal that stderr is; 0: it is none. Asked for every line: windows change while a run goes on.
static int terminal_columns(void) {
    struct winsize size;
    if (!isatty(2)) return 0;
    return ioctl(2, TIOCGWINSZ, &size) || size.ws_col == 0 ? 80 : size.ws_col;
}

// A part of a progress line. Where the terminal is too narrow, those of the highest rank are left out first.
typedef struct {
    int rank;
    char text[64];
} Field;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static Field field(int rank, const char* format, ...) {
    Field f = {rank, ""};
    va_list args;
    va_start(args, format);
    vsnprintf(f.text, sizeof f.text, format, args);
    va_end(args);
    return f;
}

static Field field_time_left(int rank, double s) {
    long left = s < 1e9 ? (long)(s + 0.5) : 999999999;
    if (left >= 3600) return field(rank, "%ld:%02ld:%02ld left", left / 3600, left / 60 % 60, left % 60);
    return field(rank, "%ld:%02ld left", left / 60, left % 60);
}

static int progress_stands = 0;         // the cursor is behind progress, which whatever comes next would be glued to

// Before anything else is printed: leaves the progress where it is and goes to the next line.
static void end_progress(void) {
    if (progress_stands) fprintf(stderr, "\n");
    progress_stands = 0;
}

// The work is done, and its progress of no more interest.
static void clear_progress(void) {
    if (progress_stands) fprintf(stderr, "\r\033[K");
    progress_stands = 0;
}

// Shows n <= 16 fields with | between them, over the progress shown before; not on a terminal: all of them, in a line
// of their own. The last column stays free: behind it the cursor waits at the end of the line or at the next, and what
// \r and erasing do then differs between terminals.
static void show_progress(const Field* fields, int n) {
    static int columns, highest;        // rank; it does not rise again, so that fields do not come and go with digits
    char line[16 * 64 + 64];
    int now = terminal_columns(), used;
    if (now != columns || !progress_stands) highest = 99;
    columns = now;
    for (;; highest--) {
        used = 0;
        for (int i = 0; i < n; i++)
            if (fields[i].rank <= highest)
                used += snprintf(line + used, sizeof line - (size_t)used, "%s%s", used ? " | " : "", fields[i].text);
        if (!columns || used < columns || highest == 0) break;
    }
    if (columns) fprintf(stderr, "\r%.*s\033[K", columns - 1, line);
    else fprintf(stderr, "%s\n", line);
    progress_stands = columns > 0;
}

// "WHAT done of total | time left" of work that began at `started`: on a terminal only, at most five times a second.
static void show_count(const char* what, long done, long total, double started) {
    static double shown, shown_of;
    double now = seconds(), left = (now - started) / (double)done * (double)(total - done);
    if (!isatty(2) || (shown_of == started && now - shown < 0.2)) return;
    shown = now;
    shown_of = started;
    Field line[] = {field(0, "%s %ld of %ld", what, done, total), field_time_left(1, left)};
    show_progress(line, done > 0 ? 2 : 1);
}
