// The launcher of quantize_row.cuh: one block per token.
//
// A thread holds 16 results of a factor, or 4 where there are few tokens, when a GPU is nearly idle and more threads
// make a token's own time shorter.

#include "launch.cuh"
#include "quantize_row.cuh"

namespace planish {
namespace {

constexpr int kMostChannels = 16384;
constexpr int kFewTokens = 32;
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

template <class T, int VALUES>
__global__ void __launch_bounds__(kMaxThreads)
    quantize(const __grid_constant__ RowQuantization task, const __grid_constant__ Io io) {
    extern __shared__ float row[];
    __shared__ int32_t scratch[kMaxThreads / 32];
    DeviceBlock block(scratch);
    const int64_t token = blockIdx.x, first = token * task.channels;
    block.each([&](int thread) {
        const T* x = static_cast<const T*>(io.x) + first;
        for (int i = thread; i < task.channels; i += block.threads()) {
            float value = to_float(x[i]);
            if (io.residual) {
                const T sum = static_cast<T>(value + to_float(static_cast<const T*>(io.residual)[first + i]));
                if (io.sum) static_cast<T*>(io.sum)[first + i] = sum;
                value = to_float(sum);
            }
            row[i] = value;
        }
    });
    const RowOutput out = {io.codes + token * io.stride, io.scales + token * task.segment_count,
                           io.sums + token * task.segment_count};
    quantize_row<VALUES>(task, row, out, block);
}

// Threads whose results, VALUES each, make up a row; 0 where the most threads are too few.
template <int VALUES>
int threads_for(const Factors& factors, int channels) {
    for (int threads = 64; threads <= kMaxThreads; threads += 32) {
        const int stride = factors.right || factors.left ? results_stride(factors.k, threads) : threads;
        if (stride * VALUES >= channels) return threads;
    }
    return 0;
}

template <class T, int VALUES>
int launch(const RowQuantization& task, const Io& io, int64_t tokens, int threads, cudaStream_t stream) {
    const size_t bytes = task.channels * sizeof(float);
    if (bytes > kFreeSharedBytes) {
        cudaFuncSetAttribute(quantize<T, VALUES>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    }
    quantize<T, VALUES><<<static_cast<unsigned>(tokens), threads, bytes, stream>>>(task, io);
    return launched("planish_quantize_tokens");
}

template <class T>
int launch(const RowQuantization& task, const Io& io, int64_t tokens, cudaStream_t stream) {
    const int few = tokens <= kFewTokens ? threads_for<4>(task.factors, task.channels) : 0;
    if (few) return launch<T, 4>(task, io, tokens, few, stream);
    const int threads = threads_for<16>(task.factors, task.channels);
    if (!threads)
        return fail(PLANISH_BAD_ARGUMENT, "no block is wide enough for %d channels as rows of %d", task.channels,
                    task.factors.k);
    return launch<T, 16>(task, io, tokens, threads, stream);
}

int check(const planish_quantize& task) {
    if (task.type < PLANISH_FLOAT32 || task.type > PLANISH_BFLOAT16)
        return fail(PLANISH_BAD_ARGUMENT, "there is no type %d", task.type);
    if (task.channels < 1 || task.channels > kMostChannels || task.tokens < 1 || task.tokens > INT32_MAX) {
        return fail(PLANISH_BAD_ARGUMENT, "%lld tokens of %d channels; a token has up to %d",
                    static_cast<long long>(task.tokens), task.channels, kMostChannels);
    }
    const bool has_factor = task.right || task.left;
    if (has_factor && (task.m < 1 || task.k < 1 || int64_t{task.m} * task.k != task.channels)) {
        return fail(PLANISH_BAD_ARGUMENT, "%d channels cannot be read as %d x %d", task.channels, task.m, task.k);
    }
    if (task.right && task.right_count != 1 && task.right_count != task.m) {
        return fail(PLANISH_BAD_ARGUMENT, "%d right factors for %d rows", task.right_count, task.m);
    }
    if (task.segment_count < 1 || task.segment_count > kMaxSegments)
        return fail(PLANISH_BAD_ARGUMENT, "%d segments", task.segment_count);
    int64_t channels = 0, padded = 0;
    for (int s = 0; s < task.segment_count; ++s) {
        const planish_code_segment& segment = task.segments[s];
        if (segment.bits < 2 || segment.bits > 8 || !(segment.clip > 0 && segment.clip <= 1) || segment.channels < 1 ||
            segment.padded < segment.channels || segment.padded % kTileChannels) {
            return fail(PLANISH_BAD_ARGUMENT, "segment %d: %d channels in %d bytes, %d bits, clip %g", s,
                        segment.channels, segment.padded, segment.bits, static_cast<double>(segment.clip));
        }
        channels += segment.channels;
        padded += segment.padded;
    }
    if (channels != task.channels || task.stride < padded || task.stride % 16) {
        return fail(PLANISH_BAD_ARGUMENT,
                    "segments of %lld channels and %lld bytes in tokens of %d channels, %lld bytes apart",
                    static_cast<long long>(channels), static_cast<long long>(padded), task.channels,
                    static_cast<long long>(task.stride));
    }
    if (!task.x || !task.codes || !task.scales || !task.zero_sums || (task.sum && !task.residual)) {
        return fail(PLANISH_BAD_ARGUMENT, "planish_quantize_tokens lacks one of its arrays");
    }
    if (!aligned(task.codes)) return fail(PLANISH_BAD_ARGUMENT, "codes begin at a multiple of 16 bytes");
    return PLANISH_OK;
}

}  // namespace
}  // namespace planish

extern "C" int planish_quantize_tokens(const planish_quantize* task, void* stream) {
    using namespace planish;
    if (const int status = check(*task)) return status;
    RowQuantization row = {task->channels,     task->gain,
                           task->epsilon,      {task->right, task->left, task->right_count, task->m, task->k},
                           task->permutation,  {},
                           task->segment_count};
    for (int s = 0; s < task->segment_count; ++s) {
        const planish_code_segment& segment = task->segments[s];
        row.segments[s] = {segment.channels, segment.padded, segment.bits,
                           segment.clip / static_cast<float>(zero_point(segment.bits) - 1)};
    }
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
