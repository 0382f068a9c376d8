// file_systems.h: file systems that lack something, for the programs under test: NO_LOCKS, NO_FLUSH in the environment.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
static int test_flock(int fd, int operation) {
    errno = ENOSYS;
    return getenv("NO_LOCKS") ? -1 : flock(fd, operation);
}
static int test_fsync(int fd) {
    struct stat st;
    int refuses = getenv("NO_FLUSH") && !fstat(fd, &st) && S_ISDIR(st.st_mode);
    errno = EINVAL;
    return refuses ? -1 : fsync(fd);
}
#define flock test_flock
#define fsync test_fsync
