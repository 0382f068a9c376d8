// before.cuh: what stands before the kernels in the files for GPUs. cut.py writes into each what it needs of it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#pragma nv_diag_suppress 177    // to_float and store are for float and bf16: a file may need one of them
#endif

// What a failed call of the CUDA runtime ends in: put here what your program does in that case.
__attribute__((noreturn, format(printf, 2, 3))) static void die(int code, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    exit(code);
}
