// The launcher of quantize_row.cuh; what it launches is in quantize_plan.cuh.

#include "launch.cuh"
#include "quantize_plan.cuh"

namespace planish {
namespace {

// What a block may have without asking.
constexpr size_t kFreeSharedBytes = 48 << 10;

struct Io {
    const void* x;
    const void* residual;
    void* sum;
    uint8_t* codes;
    int64_t stride;
    float* scales;
    TokenSum* sums;
};

template <class T>
__device__ __forceinline__ float to_float(T value) {
    return static_cast<float>(value);
}

// Reads a token into shared memory.
template <class T>
__device__ __forceinline__ void read_token(const RowQuantization& task, const Io& io, int64_t token,
                                           const RowLines& lines, float* row, DeviceBlock& block) {
    const int64_t first = token * task.channels;
    const T* x = static_cast<const T*>(io.x) + first;
    const auto thread = static_cast<int>(threadIdx.x);
    each_channel(lines, task.channels, row, thread, block.threads(), [&](int i, float& place) {
        float value = to_float(x[i]);
        if (io.residual) {
            const T sum = static_cast<T>(value + to_float(static_cast<const T*>(io.residual)[first + i]));
            if (io.sum) static_cast<T*>(io.sum)[first + i] = sum;
            value = to_float(sum);
        }
        place = value;
    });
}

__device__ __forceinline__ RowOutput output_of(const RowQuantization& task, const Io& io, int64_t token) {
    return {io.codes + token * io.stride, io.scales + token * task.segment_count, io.sums + token * task.segment_count};
}

template <class T, int VALUES, bool TILED>
__device__ __forceinline__ void quantize_token(const RowQuantization& task, const Io& io) {
    extern __shared__ __align__(16) float row[];
    __shared__ int32_t scratch[kMaxThreads / 32];
    DeviceBlock block(scratch);
    const int64_t token = blockIdx.x;
    read_token<T>(task, io, token, lines_before<TILED>(task), row, block);
    __syncthreads();
    quantize_row<VALUES, TILED>(task, row, output_of(task, io, token), block);
}

template <class T, int VALUES>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_cores(const __grid_constant__ RowQuantization task, const __grid_constant__ Io io) {
    quantize_token<T, VALUES, false>(task, io);
}

template <class T, int VALUES>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_tiles(const __grid_constant__ RowQuantization task, const __grid_constant__ Io io) {
    quantize_token<T, VALUES, true>(task, io);
}

// A block has `tokens` of `count` tokens.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_blocks(const __grid_constant__ RowQuantization task, const __grid_constant__ Io io, int tokens,
                    int64_t count) {
    extern __shared__ __align__(16) float row[];
    __shared__ int32_t scratch[kMaxThreads / 32];
    DeviceBlock block(scratch);
    const int64_t first = int64_t{blockIdx.x} * tokens, left = count - first;
    const TokenRows rows = {row, floats_of_token(task.factors), left < tokens ? static_cast<int>(left) : tokens};
    for (int i = 0; i < rows.count; ++i) {
        read_token<T>(task, io, first + i, lines_of_blocks(task.factors), row + i * rows.floats, block);
    }
    __syncthreads();
    quantize_rows(task, rows, [&](int i) { return output_of(task, io, first + i); }, block);
}

template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
    if (bytes <= kFreeSharedBytes) return;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class T>
int launch_blocks(const RowQuantization& task, const Io& io, int64_t tokens, const QuantizePlan& plan,
                  cudaStream_t stream) {
    const size_t bytes = plan.together * floats_of_token(task.factors) * sizeof(float);
    allow_shared(quantize_blocks<T>, bytes);
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(tokens, plan.together));
    quantize_blocks<T><<<blocks, plan.threads, bytes, stream>>>(task, io, plan.together, tokens);
    return launched("planish_quantize_tokens");
}

template <class T, int VALUES, bool TILED>
int launch_rows(const RowQuantization& task, const Io& io, int64_t tokens, const QuantizePlan& plan,
                cudaStream_t stream) {
    constexpr auto kernel = TILED ? quantize_tiles<T, VALUES> : quantize_cores<T, VALUES>;
    const size_t bytes = row_floats<TILED>(task) * sizeof(float);
    allow_shared(kernel, bytes);
    kernel<<<static_cast<unsigned>(tokens), plan.threads, bytes, stream>>>(task, io);
    return launched("planish_quantize_tokens");
}

template <class T>
int launch(const RowQuantization& task, const Io& io, int64_t tokens, cudaStream_t stream) {
    int room = 0;
    if (const int status = read_shared_bytes(room)) return status;
    const QuantizePlan plan = plan_quantization(task, tokens, room);
    if (plan.threads == 0) {
        return fail(PLANISH_BAD_ARGUMENT, "no block is wide enough for %d channels as rows of %d", task.channels,
                    task.factors.k);
    }
    if (plan.path == QuantizePath::kBlocks) return launch_blocks<T>(task, io, tokens, plan, stream);
    const bool tiled = plan.path == QuantizePath::kTiles;
    if (plan.values == 4) {
        return tiled ? launch_rows<T, 4, true>(task, io, tokens, plan, stream)
                     : launch_rows<T, 4, false>(task, io, tokens, plan, stream);
    }
    return tiled ? launch_rows<T, 16, true>(task, io, tokens, plan, stream)
                 : launch_rows<T, 16, false>(task, io, tokens, plan, stream);
}

}  // namespace
}  // namespace planish

extern "C" int planish_quantize_tokens(const planish_quantize* task, void* stream) {
    using namespace planish;
    RowQuantization row = {};
    if (const int status = read_quantize(*task, row)) return status;
    const Io io = {task->x,
                   task->residual,
                   task->sum,
                   task->codes,
                   task->stride,
                   task->scales,
                   reinterpret_cast<TokenSum*>(task->zero_sums)};
    const auto on = static_cast<cudaStream_t>(stream);
    if (task->type == PLANISH_FLOAT16) return launch<__half>(row, io, task->tokens, on);
    if (task->type == PLANISH_BFLOAT16) return launch<__nv_bfloat16>(row, io, task->tokens, on);
    return launch<float>(row, io, task->tokens, on);
}
