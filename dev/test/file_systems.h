// file_systems.h: file systems that lack something, for the programs under test: NO_LOCKS, NO_FLUSH in the environment.
// KILL_AT_FLUSH=N kills the program when it flushes for the Nth time: a power cut between two steps of a save.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
static int test_flock(int fd, int operation) {
    errno = ENOSYS;
    return getenv("NO_LOCKS") ? -1 : flock(fd, operation);
}
static int test_fsync(int fd) {
    static int flushes;
    struct stat st;
    const char* last = getenv("KILL_AT_FLUSH");
    if (last && ++flushes == atoi(last)) raise(SIGKILL);
    int refuses = getenv("NO_FLUSH") && !fstat(fd, &st) && S_ISDIR(st.st_mode);
    errno = EINVAL;
    return refuses ? -1 : fsync(fd);
}
#define flock test_flock
#define fsync test_fsync
