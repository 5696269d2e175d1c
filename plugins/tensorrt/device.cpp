#include "launch.h"

#include <algorithm>
#include <iterator>

#include <cuda_runtime_api.h>

#include "planish_kernels.h"

namespace planish::plugin {

std::string problem_of_device() {
    int device = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) return words("planish finds no GPU: {error}", {{"error", cudaGetErrorString(error)}});
    const int sm = 10 * major + minor;
    if (std::find(std::begin(kSms), std::end(kSms), sm) != std::end(kSms)) return {};
    return words("planish has no kernels for SM {sm}; it has for {sms}",
                 {{"sm", spell(sm)}, {"sms", spell(Shape(std::begin(kSms), std::end(kSms)))}});
}

int copy(void* to, const void* from, size_t bytes, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, on);
    return error == cudaSuccess ? PLANISH_OK : PLANISH_CUDA_FAILED;
}

int clear(void* to, size_t bytes, void* stream) {
    const cudaError_t error = cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? PLANISH_OK : PLANISH_CUDA_FAILED;
}

}  // namespace planish::plugin
