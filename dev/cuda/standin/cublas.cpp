// The part of cuBLAS that a trainer uses, for the CPU stand-in: products of float or bf16 matrices, summed in float.
//
// Matrices are column-major: element (i, j) of an m x n matrix with leading dimension ld lies at i + j ld. Every number
// of a result is a sum over k in ascending order, so it does not depend on the number of CPU threads, nor on the other
// rows and columns of the product. (On a GPU the order differs, and so do the last bits.)
//
// Wrong arguments get the status that cuBLAS gives, and a line on stderr that says what is wrong with them.
#include "standin.h"
#include <cublas_v2.h>
#include <stdarg.h>
#include <algorithm>
#include <vector>

using standin::OpenMemory;

struct cublasContext { int unused; };

namespace {

// The product is cut into tiles of ROWS x COLUMNS, which the registers of a core can hold. Operands are copied first:
// of A, ROWS rows at a time, the numbers of one k next to each other; of B, COLUMNS columns likewise.
constexpr int ROWS = 16, COLUMNS = 6;
typedef float Vector __attribute__((vector_size(ROWS * sizeof(float))));

struct Matrix { const char* at; bool bf16; long ld; bool transposed; };

size_t size_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

inline float number(const Matrix& x, long row, long column) {
    long i = x.transposed ? column + row * x.ld : row + column * x.ld;
    return x.bf16 ? standin_bits<float>((unsigned)((const uint16_t*)x.at)[i] << 16) : ((const float*)x.at)[i];
}

// C (m x n) = alpha A B + beta C, with A and B as they are after transposition
void multiply(int m, int n, int k, float alpha, const Matrix& A, const Matrix& B, float beta, char* C, bool bf16,
              long ld) {
    long row_tiles = (m + ROWS - 1) / ROWS, column_tiles = (n + COLUMNS - 1) / COLUMNS;
    std::vector<float> a(row_tiles * ROWS * k), b(column_tiles * COLUMNS * k);
    [[maybe_unused]] int threads = (double)m * n * k < 1e6 ? 1 : standin::cpu_threads();  // starting them takes time
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (long tile = 0; tile < row_tiles; tile++)
            for (int l = 0; l < k; l++)
                for (int r = 0; r < ROWS; r++) {
                    long row = tile * ROWS + r;
                    a[(tile * k + l) * ROWS + r] = row < m ? number(A, row, l) : 0;
                }
        #pragma omp for schedule(static)
        for (long tile = 0; tile < column_tiles; tile++)
            for (int l = 0; l < k; l++)
                for (int c = 0; c < COLUMNS; c++) {
                    long column = tile * COLUMNS + c;
                    b[(tile * k + l) * COLUMNS + c] = column < n ? number(B, l, column) : 0;
                }
        #pragma omp for schedule(dynamic, 1)
        for (long column_tile = 0; column_tile < column_tiles; column_tile++)
            for (long row_tile = 0; row_tile < row_tiles; row_tile++) {
                const float *x = a.data() + row_tile * ROWS * k, *y = b.data() + column_tile * COLUMNS * k;
                Vector sum[COLUMNS] = {};
                for (int l = 0; l < k; l++) {
                    Vector v;
                    memcpy(&v, x + (long)l * ROWS, sizeof v);
                    for (int c = 0; c < COLUMNS; c++) sum[c] += v * y[(long)l * COLUMNS + c];
                }
                for (int c = 0; c < std::min<long>(COLUMNS, n - column_tile * COLUMNS); c++)
                    for (int r = 0; r < std::min<long>(ROWS, m - row_tile * ROWS); r++) {
                        long i = row_tile * ROWS + r + (column_tile * COLUMNS + c) * ld;
                        float s = alpha * sum[c][r];
                        // beta = 0 means that C is not read: it may hold NaN
                        if (beta != 0) s += beta * number({C, bf16, 0, false}, i, 0);
                        if (bf16) ((__nv_bfloat16*)C)[i] = __float2bfloat16(s);
                        else ((float*)C)[i] = s;
                    }
            }
    }
}

cublasStatus_t refuse(cublasStatus_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));
cublasStatus_t refuse(cublasStatus_t status, const char* format, ...) {
    fprintf(stderr, "standin: cuBLAS: ");
    va_list a;
    va_start(a, format);
    vfprintf(stderr, format, a);
    va_end(a);
    fprintf(stderr, "\n");
    return status;
}

// A matrix of `count` ones, `stride` apart, in device memory?
cublasStatus_t check(const char* name, const void* p, cudaDataType_t type, int rows, int columns, int ld,
                     long long stride, int count) {
    if (ld < std::max(1, rows))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "%s has %d rows, but leading dimension %d", name, rows, ld);
    if (!rows || !columns) return CUBLAS_STATUS_SUCCESS;
    if ((size_t)p % size_of(type))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "%s at %p is not aligned to its numbers", name, p);
    size_t bytes = (ld * (columns - 1LL) + rows + stride * (count - 1)) * size_of(type);
    if (!standin::on_device(p, bytes))  // a GPU would not notice, or end in an illegal access
        standin::fail("cuBLAS: the %zu bytes of %s at %p (%d x %d, leading dimension %d, %d times) are not all in an "
                      "allocation of device memory", bytes, name, p, rows, columns, ld, count);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    int devices;
    if (cudaGetDeviceCount(&devices)) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new cublasContext();
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void* workspace, size_t bytes) {
    if (bytes && ((size_t)workspace % 256 || !standin::on_device(workspace, bytes)))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "a workspace is device memory, aligned to 256 bytes");
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                                          int n, int k, const void* alpha, const void* A, cudaDataType at, int lda,
                                          long long stride_a, const void* B, cudaDataType bt, int ldb,
                                          long long stride_b, const void* beta, void* C, cudaDataType ct, int ldc,
                                          long long stride_c, int count, cublasComputeType_t compute,
                                          cublasGemmAlgo_t) {
    if (!handle) return refuse(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    if (m < 0 || n < 0 || k < 0 || count < 0)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "sizes %d, %d, %d, %d", m, n, k, count);
    bool known = (at == CUDA_R_32F || at == CUDA_R_16BF) && bt == at && (ct == CUDA_R_32F || ct == at);
    if (!known || (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_FAST_TF32))
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "A and B must both be float or both bf16, C float or like them, and "
                                                   "the sums CUBLAS_COMPUTE_32F");
    if (!alpha || !beta) return refuse(CUBLAS_STATUS_INVALID_VALUE, "alpha or beta is missing");
    if (!m || !n || !count) return CUBLAS_STATUS_SUCCESS;
    cublasStatus_t status = check("A", A, at, ta ? k : m, ta ? m : k, lda, stride_a, count);
    if (!status) status = check("B", B, bt, tb ? n : k, tb ? k : n, ldb, stride_b, count);
    if (!status) status = check("C", C, ct, m, n, ldc, stride_c, count);
    if (status) return status;
    float x = *(const float*)alpha, y = *(const float*)beta;  // the host's: read now
    standin::count_launch("cublas");
    standin::Launch::submit([=] {
        OpenMemory open;
        double start = standin::now_ms();
        for (int i = 0; i < count; i++)
            multiply(m, n, k, x, {(const char*)A + i * stride_a * size_of(at), at == CUDA_R_16BF, lda, !!ta},
                     {(const char*)B + i * stride_b * size_of(bt), bt == CUDA_R_16BF, ldb, !!tb}, y,
                     (char*)C + i * stride_c * size_of(ct), ct == CUDA_R_16BF, ldc);
        standin::add_time("cublas", standin::now_ms() - start);
    });
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void* alpha, const void* A, cudaDataType at, int lda, const void* B, cudaDataType bt,
                            int ldb, const void* beta, void* C, cudaDataType ct, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, A, at, lda, 0, B, bt, ldb, 0, beta, C, ct, ldc, 0,
                                      1, compute, algorithm);
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                              const float* alpha, const float* A, int lda, const float* B, int ldb, const float* beta,
                              float* C, int ldc) {
    return cublasGemmEx(handle, ta, tb, m, n, k, alpha, A, CUDA_R_32F, lda, B, CUDA_R_32F, ldb, beta, C, CUDA_R_32F,
                        ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                                         int n, int k, const float* alpha, const float* A, int lda, long long stride_a,
                                         const float* B, int ldb, long long stride_b, const float* beta, float* C,
                                         int ldc, long long stride_c, int count) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, A, CUDA_R_32F, lda, stride_a, B, CUDA_R_32F, ldb,
                                      stride_b, beta, C, CUDA_R_32F, ldc, stride_c, count, CUBLAS_COMPUTE_32F,
                                      CUBLAS_GEMM_DEFAULT);
}

const char* cublasGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "an unknown cuBLAS status";
    }
}
const char* cublasGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }

}  // extern "C"
