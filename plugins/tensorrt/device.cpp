#include "launch.h"

#include <algorithm>
#include <iterator>

#include <cuda_runtime_api.h>

#include "arguments.cuh"

namespace planish::plugin {
namespace {

int done(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return PLANISH_OK;
    // Else the next launch of this thread would report it as its own.
    cudaGetLastError();
    return fail(PLANISH_CUDA_FAILED, "%s could not be enqueued: %s", what, cudaGetErrorString(error));
}

}  // namespace

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
    return done("a copy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, on));
}

int clear(void* to, size_t bytes, void* stream) {
    return done("zeros", cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace planish::plugin
