// before.h: what stands before the functions in the files for CPUs. cut.py writes into each what it needs of it.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// In train_moe, threads that wait for each other sleep where other programs want the cores: dev/lib/threads.h.
static void look_for_others(void) {}
