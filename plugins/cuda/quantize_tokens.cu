// The launcher of quantize_row.cuh; what it launches is in quantize_plan.cuh.

#include "launch.cuh"
#include "quantize_plan.cuh"

namespace planish {
namespace {

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

// Channel `at` of all tokens, with its residual.
template <class T>
__device__ __forceinline__ float read_channel(const Io& io, int64_t at) {
    const float value = to_float(static_cast<const T*>(io.x)[at]);
    if (!io.residual) return value;
    return to_float(static_cast<T>(value + to_float(static_cast<const T*>(io.residual)[at])));
}

// Stores what read_channel gave, which is of type T.
template <class T>
__device__ __forceinline__ void store_sum(const Io& io, int64_t at, float value) {
    if (io.sum) static_cast<T*>(io.sum)[at] = static_cast<T>(value);
}

// Reads a token into shared memory.
template <class T>
__device__ __forceinline__ void read_token(const RowQuantization& task, const Io& io, int64_t token,
                                           const RowLines& lines, float* row, DeviceBlock& block) {
    const int64_t first = token * task.channels;
    const auto thread = static_cast<int>(threadIdx.x);
    each_channel(lines, task.channels, row, thread, block.threads(), [&](int i, float& place) {
        place = read_channel<T>(io, first + i);
        store_sum<T>(io, first + i, place);
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

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    spread_blocks(const __grid_constant__ RowQuantization task, const __grid_constant__ Io io, float* out, int lines) {
    extern __shared__ __align__(16) float row[];
    __shared__ int32_t scratch[kMaxThreads / 32];
    DeviceBlock block(scratch);
    const int64_t first = int64_t{blockIdx.y} * task.channels;
    spread_lines(
        task, share_of(task.factors, lines, static_cast<int>(blockIdx.x)), row, out + first,
        [&](int i) { return read_channel<T>(io, first + i); },
        [&](int i, float value) { store_sum<T>(io, first + i, value); }, block);
}

template <class T>
int launch_blocks(const RowQuantization& task, const Io& io, int64_t tokens, const QuantizePlan& plan,
                  cudaStream_t stream) {
    const size_t bytes = plan.together * floats_of_token(task.factors) * sizeof(float);
    if (const int status = allow_shared(reinterpret_cast<const void*>(quantize_blocks<T>), bytes)) return status;
    const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(tokens, plan.together));
    quantize_blocks<T><<<blocks, plan.threads, bytes, stream>>>(task, io, plan.together, tokens);
    return launched("planish_quantize_tokens");
}

template <class T, int VALUES, bool TILED>
int launch_rows(const RowQuantization& task, const Io& io, int64_t tokens, const QuantizePlan& plan,
                cudaStream_t stream) {
    constexpr auto kernel = TILED ? quantize_tiles<T, VALUES> : quantize_cores<T, VALUES>;
    const size_t bytes = row_floats<TILED>(task) * sizeof(float);
    if (const int status = allow_shared(reinterpret_cast<const void*>(kernel), bytes)) return status;
    kernel<<<static_cast<unsigned>(tokens), plan.threads, bytes, stream>>>(task, io);
    return launched("planish_quantize_tokens");
}

int make_plan(const RowQuantization& task, int64_t tokens, QuantizePlan& plan) {
    int room = 0;
    if (const int status = read_shared_bytes(room)) return status;
    plan = plan_quantization(task, tokens, room);
    if (plan.threads > 0) return PLANISH_OK;
    return fail(PLANISH_BAD_ARGUMENT, "no block is wide enough for %d channels as rows of %d", task.channels,
                task.factors.k);
}

template <class T>
int launch(const RowQuantization& task, const Io& io, int64_t tokens, const QuantizePlan& plan, cudaStream_t stream) {
    if (plan.path == QuantizePath::kBlocks) return launch_blocks<T>(task, io, tokens, plan, stream);
    const bool tiled = plan.path == QuantizePath::kTiles;
    if (plan.values == 4) {
        return tiled ? launch_rows<T, 4, true>(task, io, tokens, plan, stream)
                     : launch_rows<T, 4, false>(task, io, tokens, plan, stream);
    }
    return tiled ? launch_rows<T, 16, true>(task, io, tokens, plan, stream)
                 : launch_rows<T, 16, false>(task, io, tokens, plan, stream);
}

// The map of every token in `lines` of its lines at a time, into the workspace; then what is behind it.
template <class T>
int launch_spread(const RowQuantization& task, const Io& io, int64_t tokens, float* workspace, int lines,
                  cudaStream_t stream) {
    const RowQuantization second = behind_spread(task);
    QuantizePlan plan;
    if (const int status = make_plan(second, tokens, plan)) return status;
    const size_t bytes = floats_of_token(factors_of(task.factors, {0, lines})) * sizeof(float);
    const dim3 blocks(static_cast<unsigned>(ceil_div(task.factors.m, lines)), static_cast<unsigned>(tokens));
    if (const int status = allow_shared(reinterpret_cast<const void*>(spread_blocks<T>), bytes)) return status;
    spread_blocks<T><<<blocks, threads_of_share(task.factors), bytes, stream>>>(task, io, workspace, lines);
    if (const int status = launched("planish_quantize_tokens")) return status;
    const Io behind = {workspace, nullptr, nullptr, io.codes, io.stride, io.scales, io.sums};
    return launch<float>(second, behind, tokens, plan, stream);
}

template <class T>
int launch_any(const planish_quantize& task, const RowQuantization& row, const Io& io, cudaStream_t stream) {
    if (const int lines = plan_spread(task, row.factors)) {
        return launch_spread<T>(row, io, task.tokens, task.workspace, lines, stream);
    }
    QuantizePlan plan;
    if (const int status = make_plan(row, task.tokens, plan)) return status;
    return launch<T>(row, io, task.tokens, plan, stream);
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
    if (task->type == PLANISH_FLOAT16) return launch_any<__half>(*task, row, io, on);
    if (task->type == PLANISH_BFLOAT16) return launch_any<__nv_bfloat16>(*task, row, io, on);
    return launch_any<float>(*task, row, io, on);
}
