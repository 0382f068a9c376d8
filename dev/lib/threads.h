// threads.h: threads that wait do not burn the cores that others want. Compiles alone.
//
// OpenMP's threads wait for each other by turning round for some milliseconds before they sleep: the fastest way on an
// idle machine. But where another program has the core of one thread, all others burn theirs until its turn comes, at
// each of the hundreds of waits in a training step. gcc's library turns round 300 times less if there are more threads
// than cores, in whatever teams (its do_spin). So while Linux says that our threads want for a core, a second team
// sleeps beside them to make it so. It computes nothing: results do not depend on it.
#pragma once
#include "util.h"

#if defined(_OPENMP) && !defined(__clang__)
#include <pthread.h>

static pthread_mutex_t second_team_sleeps = PTHREAD_MUTEX_INITIALIZER;

static void* second_team(void* threads) {
    int n = 0;
    #pragma omp parallel num_threads(*(int*)threads) reduction(+ : n)
    n += thread_number();
    pthread_mutex_lock(&second_team_sleeps);    // until it is to end
    pthread_mutex_unlock(&second_team_sleeps);
    return NULL;
}

// Seconds that the threads of this process were ready to run and had no core, all together; 0 where nobody counts.
static double waited_for_cores(void) {
    DIR* d = opendir("/proc/self/task");
    double sum = 0, ran, waited;
    for (struct dirent* e; d && (e = readdir(d)) != NULL;) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/task/%.20s/schedstat", e->d_name);
        FILE* f = fopen(path, "r");
        if (f && fscanf(f, "%lf %lf", &ran, &waited) == 2) sum += waited * 1e-9;
        if (f) fclose(f);
    }
    if (d) closedir(d);
    return sum;
}

// Puts the second team to sleep beside the first, or ends it.
static int sharing = 0;
static void share_cores(int on) {
    static int size;
    static pthread_t team;
    if (on && !sharing) {
        size = imax(2, omp_get_num_procs() - thread_count() + 2);
        pthread_mutex_lock(&second_team_sleeps);
        sharing = !pthread_create(&team, NULL, second_team, &size);
        if (!sharing) pthread_mutex_unlock(&second_team_sleeps);
    } else if (!on && sharing) {
        pthread_mutex_unlock(&second_team_sleeps);
        pthread_join(team, NULL);
        sharing = 0;
    }
}

// Called where one thread is at work; looks after .02 seconds, then 5 times a second.
static void look_for_others(void) {
    static double looked, waited, interval;
    double now = seconds(), since = looked, before = waited;
    if (now - since < interval || thread_count() == 1 || omp_in_parallel()) return;
    waited = waited_for_cores();
    looked = now;
    interval = since == 0 ? 0.02 : 0.2;
    double missing = (waited - before) / (now - since);         // cores
    if (since > 0 && missing > 0.33) share_cores(1);
    else if (missing < 0.1) share_cores(0);
}
#else       // clang's library sleeps sooner by itself, and fails if the program ends while a second team starts
static inline void share_cores(int on) { (void)on; }
static void look_for_others(void) {}
#endif
