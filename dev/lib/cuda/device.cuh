// device.cuh: CHECK and CHECK_CUBLAS end the program with one line when a call failed, allow_shared lets a kernel use
// more shared memory, gpu_multiprocessors counts, gpu_open ends the program where no GPU can be used. Needs die and
// options; gpu_products is in tensor_cores.cuh.
#pragma once

static const char* gpu_products(void);

// Ends the program with one line if a call of the CUDA runtime failed; after a launch: CHECK(cudaGetLastError()).
#define CHECK(call) gpu_check((call), #call, __FILE__, __LINE__)
static void gpu_check(cudaError_t status, const char* call, const char* file, int line) {
    if (status == cudaSuccess) return;
    die(1, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(status));
}

// The same for cuBLAS.
#define CHECK_CUBLAS(call) gpu_check_cublas((call), #call, __FILE__, __LINE__)
static void gpu_check_cublas(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    die(1, "%s:%d: %s: %s", file, line, call, cublasGetStatusString(status));
}

// A kernel may use more than 48 KB of dynamic shared memory only after this call, on each device anew.
template <class... A> static void allow_shared(void (*kernel)(A...), size_t bytes) {
    if (bytes > 40 * 1024)          // the kernel's own shared variables count, too
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// Multiprocessors of the current device, or as many as a test pretends: few, so that a block has several tiles.
static int pretended_multiprocessors = 0;
static int gpu_multiprocessors(void) {
    int device, count = pretended_multiprocessors;
    if (count) return count;
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

// Ends the program in one line where no GPU can be used.
static void gpu_open(void) {
    int devices = 0, driver = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
        die(1, "there is no NVIDIA driver on this machine; train_moe runs on the CPU");
    if (status != cudaSuccess) die(1, "no GPU can be used: %s; train_moe runs on the CPU", cudaGetErrorString(status));
    cudaDeviceProp properties;
    CHECK(cudaSetDevice(0));
    CHECK(cudaGetDeviceProperties(&properties, 0));
    if (properties.major < 8)
        die(1, "%s has compute capability %d.%d, 8.0 is the least (A100, RTX 30 and newer); train_moe runs on the CPU",
            properties.name, properties.major, properties.minor);
    if (!options.prompt && !options.prompt_ids)         // what is generated stands alone
        printf("GPU: %s, %.1f GB, %s\n", properties.name, properties.totalGlobalMem / 1e9, gpu_products());
}
