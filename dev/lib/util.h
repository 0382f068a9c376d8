// util.h: what every file needs: the system's headers, messages that end the program, paths, an arena, time, threads.
// Compiles alone.
#pragma once

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "machine.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
enum { ARRAY_GAP = 64 };        // bytes between arrays, which nothing may touch
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes)
enum { ARRAY_GAP = 0 };
#endif

#define VERSION "0.2"

// The CUDA compiler reads this file as part of train_moe.cu, whose kernels draw the same random numbers.
#ifdef __CUDACC__
#define ALSO_ON_GPU __host__ __device__
#else
#define ALSO_ON_GPU
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Small helpers

static const char* program_name = "train_moe";

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

#include "terminal.h"

static int died = 0;                    // the end has its line

// Bad input ends the program with one line and exit code 2 (the user's to mend), a failure while running with 1.
__attribute__((noreturn, format(printf, 2, 3))) static void die(int code, const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    end_progress();
    fprintf(stderr, "%s: ", program_name);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    died = 1;
    exit(code);
}

// What every program does last: if something printed could not be written, a full disk, say, that is a failure. That
// nobody reads it (`| head`, a terminal that is gone) is none.
static void end_output(void) {
    struct pollfd output = {1, POLLOUT, 0};
    fflush(stdout);
    if (!ferror(stdout) || died || (poll(&output, 1, 0) > 0 && output.revents & (POLLERR | POLLHUP))) return;
    // the reason may be an earlier one's, and errno another's by now: a try tells
    const char* why = write(1, "\n", 1) < 0 ? strerror(errno) : "not all of it could be written";
    end_progress();
    fprintf(stderr, "%s: standard output: %s\n", program_name, why);
    _exit(1);
}

// What every program does first.
static void begin_program(const char* name) {
    int fd = 0;
    program_name = name;
    while (fd >= 0 && fd <= 2) fd = open("/dev/null", O_RDWR);  // a file must not get 1 or 2, which is printed to
    if (fd > 2) close(fd);
    atexit(end_output);
    if (!arithmetic_holds())
        die(1, "compiled with flags that change values (-funsafe-math-optimizations or the like): "
               "build with -O3 alone");
}

static void* checked_malloc(size_t bytes) {
    void* p = malloc(bytes ? bytes : 1);
    if (!p) die(1, "out of memory: %zu bytes wanted", bytes);
    return p;
}

static char* copy_bytes(const char* s, size_t n) {
    char* p = (char*)checked_malloc(n + 1);
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}
static char* copy_string(const char* s) { return copy_bytes(s, strlen(s)); }

// "dir/name" in `path`, which has room for PATH_SIZE bytes
enum { PATH_SIZE = 4096 };
static const char* join_path(char* path, const char* dir, const char* name) {
    size_t n = strlen(dir), k = strlen(name);
    if (n + k + 2 > PATH_SIZE) die(2, "the path %.60s.../%s is too long", dir, name);
    memcpy(path, dir, n);
    path[n] = '/';
    memcpy(path + n + 1, name, k + 1);
    return path;
}

// The next of a comma-separated list of paths; NULL: no more. What exists as a whole, commas and all, is one path.
static char* next_path(char** rest) {
    char* all = *rest;
    if (!all || access(all, F_OK)) return strsep(rest, ",");
    *rest = NULL;
    return all;
}

// the position of a choice among "a|b|c", or -1
static int choice_index(const char* choices, const char* text) {
    size_t n = strlen(text);
    for (int i = 0;; i++) {
        const char* end = strchr(choices, '|');
        size_t length = end ? (size_t)(end - choices) : strlen(choices);
        if (n == length && !strncmp(choices, text, n)) return i;
        if (!end) return -1;
        choices = end + 1;
    }
}

// fsync. Some file systems cannot flush a directory, or cannot flush at all: that is no failure of the write.
static int flush_to_disk(int fd) {
    return fsync(fd) && errno != EINVAL && errno != EBADF && errno != ENOTSUP && errno != ENOSYS ? -1 : 0;
}

// Takes the lock of an open directory, which the system drops when the program ends, however it ends. 0: another run
// has it. A file system without locks (Lustre, some of FUSE) is warned of, and nothing more.
static int lock_directory(int fd, const char* path) {
    if (!flock(fd, LOCK_EX | LOCK_NB)) return 1;
    if (errno == EWOULDBLOCK) return 0;
    fprintf(stderr, "%s: warning: %s: no locks here (%s), so nothing keeps a second run out\n", program_name, path,
            strerror(errno));
    return 1;
}

// Reads exactly n bytes at an offset; 0 if the file ends before or cannot be read.
static int read_at(int fd, void* buffer, size_t n, long offset) {
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (char*)buffer + done, n - done, offset + (long)done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        done += (size_t)got;
    }
    return 1;
}

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }
static long lmin(long a, long b) { return a < b ? a : b; }

#ifdef _OPENMP
static int thread_count(void) { return omp_get_max_threads(); }
static int thread_number(void) { return omp_get_thread_num(); }
#else
static int thread_count(void) { return 1; }
static int thread_number(void) { return 0; }
#endif

// One allocation serves everything. The walk over what is needed is made twice: with base = NULL to count the bytes,
// then with the memory to hand it out.
typedef struct {
    char* base;
    size_t used;
} Arena;

static void* take(Arena* a, size_t bytes) {         // NULL for none
    if (!bytes) return NULL;
    char* p = a->base ? a->base + a->used : NULL;
    a->used += (bytes + 63) / 64 * 64 + ARRAY_GAP;
    if (p) {
        ASAN_POISON_MEMORY_REGION(p + bytes, a->base + a->used - (p + bytes));
    }
    return p;
}
static float* take_floats(Arena* a, long n) { return (float*)take(a, sizeof(float) * n); }

static volatile sig_atomic_t stop_signal = 0;
// The first Ctrl-C or SIGTERM ends the run after the step at hand, a second one at once: saves are whole or not at all.
// (What comes within a second is the same one: timeout(1) signals the process and then its group.)
static char stop_notice[128];           // what the first one is answered with
static void on_signal(int signal_number) {
    static double first;
    int kept = errno;
    if (!stop_signal) {
        first = seconds();
        stop_signal = signal_number;
        if (write(2, stop_notice, strlen(stop_notice)) < 0) errno = kept;
    } else if (seconds() - first > 1) {
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
}

// Also for a terminal that is closed, unless nohup has seen to that.
static void catch_signals(void) {
    snprintf(stop_notice, sizeof stop_notice, "%s%s: a signal: stops after the work at hand, at once after a second\n",
             isatty(2) ? "\n" : "", program_name);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN);
}
