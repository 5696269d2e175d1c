// What the GPU says: whether a launch worked, and what kind of GPU it is.

#include "launch.cuh"

namespace planish {

int launched(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return PLANISH_OK;
    return fail(PLANISH_CUDA_FAILED, "%s could not be launched: %s", kernel, cudaGetErrorString(error));
}

int read_capability(int& capability) {
    int device = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) return fail(PLANISH_CUDA_FAILED, "no GPU can be asked: %s", cudaGetErrorString(error));
    capability = 10 * major + minor;
    return PLANISH_OK;
}

int read_shared_bytes(int& bytes) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return fail(PLANISH_CUDA_FAILED, "no GPU can be asked: %s", cudaGetErrorString(error));
    return PLANISH_OK;
}

int allow_shared(const void* kernel, size_t bytes) {
    // What a block may have without asking, declared memory included.
    constexpr size_t kUnasked = 48 << 10;
    cudaFuncAttributes declared;
    cudaError_t error = cudaFuncGetAttributes(&declared, kernel);
    if (error == cudaSuccess && bytes + declared.sharedSizeBytes <= kUnasked) return PLANISH_OK;
    int most = 0;
    if (const int status = read_shared_bytes(most)) return status;
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most - static_cast<int>(declared.sharedSizeBytes));
    }
    if (error == cudaSuccess) return PLANISH_OK;
    return fail(PLANISH_CUDA_FAILED, "%zu bytes of shared memory cannot be had: %s", bytes, cudaGetErrorString(error));
}

}  // namespace planish

extern "C" int planish_best_order(int64_t tokens, int32_t bits, int32_t* order) {
    int capability = 0;
    if (const int status = planish::read_capability(capability)) return status;
    *order = tokens <= PLANISH_SMALL_TOKENS      ? PLANISH_LANES
             : capability == 90                  ? PLANISH_COLUMNS
             : capability / 10 == 8 && bits <= 4 ? PLANISH_NIBBLES
                                                 : PLANISH_LANES;
    return PLANISH_OK;
}
