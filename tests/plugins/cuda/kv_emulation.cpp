// The C interface of the cache's kernels on the host: their checks as they are, their warps run one after the other.
// All memory is the host's.

#include <cstddef>
#include <cstring>
#include <deque>
#include <vector>

#include "arguments.cu"
#include "kv_arguments.cu"

using namespace planish;

namespace {

// Asynchronous copies that arrive as early or as late as they may.
class HostCopy {
  public:
    explicit HostCopy(bool late) : late_(late) {}

    void bytes16(void* to, const void* from) {
        if (!late_) {
            std::memcpy(to, from, kCopyBytes);
            return;
        }
        open_.push_back({to, from});
    }

    void commit() {
        groups_.push_back(open_);
        open_.clear();
    }

    template <int PENDING>
    void wait() {
        for (; groups_.size() > PENDING; groups_.pop_front()) {
            for (const Move& move : groups_.front()) std::memcpy(move.to, move.from, kCopyBytes);
        }
    }

  private:
    struct Move {
        void* to;
        const void* from;
    };

    bool late_;
    std::vector<Move> open_;
    std::deque<std::vector<Move>> groups_;
};

// What a GPU decides, and tests decide here: when copies arrive, and which of the kernels does it where either can.
struct Choices {
    int32_t late = 1;
    int32_t many = 0;         // attention of many columns whatever their number
    int32_t mapped_rows = 0;  // kMappedRows tokens to a warp whatever is appended
} choices;

constexpr int kThreads = 96;

template <int D>
void attend_few(const Attend& task, int splits, float* workspace) {
    const int bytes = warp_bytes<D>(task.cache, 1);
    std::vector<Quad> memory(static_cast<std::size_t>(kAttendWarps * bytes) / sizeof(Quad));
    auto* shared = reinterpret_cast<uint8_t*>(memory.data());
    for (int sequence = 0; sequence < task.news.batch; ++sequence) {
        for (int head = 0; head < task.cache.kv_heads; ++head) {
            for (int split = 0; split < splits; ++split) {
                std::memset(shared, 0xFF, static_cast<std::size_t>(kAttendWarps * bytes));
                for (int warp = 0; warp < kAttendWarps; ++warp) {
                    HostCopy copy(choices.late != 0);
                    attend_split<KvHostWarp, D>(task, splits, sequence, head, split, warp, shared + warp * bytes, copy);
                }
                for (int thread = 0; thread < kThreads; ++thread) {
                    merge_warps<D>(task, splits, sequence, head, split, reinterpret_cast<float*>(shared),
                                   bytes / static_cast<int>(sizeof(float)), workspace, thread, kThreads);
                }
            }
            for (int thread = 0; splits > 1 && thread < kThreads; ++thread) {
                merge_splits<D>(task, splits, sequence, head, workspace, thread, kThreads);
            }
        }
    }
}

template <int D>
void attend_many(const Attend& task) {
    const int bytes = warp_bytes<D>(task.cache, kManyTiles);
    std::vector<Quad> memory(static_cast<std::size_t>(bytes) / sizeof(Quad));
    auto* shared = reinterpret_cast<uint8_t*>(memory.data());
    for (int sequence = 0; sequence < task.news.batch; ++sequence) {
        for (int head = 0; head < task.cache.kv_heads; ++head) {
            for (int column = 0; column < columns_of(task); column += kManyTiles * kColumns) {
                std::memset(shared, 0xFF, static_cast<std::size_t>(bytes));
                HostCopy copy(choices.late != 0);
                attend_columns<KvHostWarp, D>(task, sequence, head, column, shared, copy);
            }
        }
    }
}

template <int D, int ROWS>
void append(const Append& task) {
    std::vector<Quad> memory(D * ROWS * sizeof(float) / sizeof(Quad));
    for (int64_t warp = 0; warp < append_warps<ROWS>(task); ++warp) {
        append_rows<D, ROWS, KvHostWarp>(task, append_work<ROWS>(task, warp), reinterpret_cast<float*>(memory.data()));
    }
}

// The codes of a row as lanes read them for keys, `codes`, and for values, `other`; -1 where no lane has a channel.
template <int BITS, int D>
void read_row(const uint32_t* row, const uint32_t* next, int32_t* codes, int32_t* other) {
    using R = Row<BITS, D>;
    const auto code = [](uint32_t pair, int half, int e) {
        return static_cast<int32_t>(pair >> 16 * half & 0xFFFFu) >> R::shift(e);
    };
    for (int run = 0; run < kRuns; ++run) {
        const auto keys = unpack_pairs<BITS, D>(neighbouring_runs<R>(row, run / 2));
        const auto values = unpack_pairs<BITS, D>(runs_of_two<R>(row, next, run));
        for (int e = 0; e < R::kRunCodes; ++e) {
            codes[R::channel(run, e)] = code(keys.pair[e], run % 2, e);
            other[R::channel(run, e)] = code(values.pair[e], 0, e);
            other[D + R::channel(run, e)] = code(values.pair[e], 1, e);
        }
    }
}

}  // namespace

extern "C" {

void planish_read_row(const uint32_t* row, const uint32_t* next, int32_t bits, int32_t head_dim, int32_t* codes,
                      int32_t* other) {
    with_head_dim(head_dim, [&](auto d) {
        with_bits(bits, [&](auto b) { read_row<decltype(b)::value, decltype(d)::value>(row, next, codes, other); });
    });
}

float planish_float_of_half(uint16_t half) { return float_of_half(half); }

uint16_t planish_half_of_float(float value) { return half_of_float(value); }

void planish_choose(int32_t late, int32_t many, int32_t mapped_rows) { choices = {late, many, mapped_rows}; }

int planish_append_kv(const planish_append* given, void*) {
    Append task;
    if (const int status = read_append(*given, task)) return status;
    with_head_dim(task.cache.head_dim, [&](auto d) {
        constexpr int kD = decltype(d)::value;
        choices.mapped_rows ? append<kD, kMappedRows>(task) : append<kD, 1>(task);
    });
    return PLANISH_OK;
}

// Blocks of the GPU that splits are planned for.
int planish_blocks = 32;

int planish_plan_attend(planish_attend* given) {
    Attend task;
    if (const int status = read_shapes(*given, task)) return status;
    plan_attend(task, planish_blocks, *given);
    return PLANISH_OK;
}

int planish_attend_kv(const planish_attend* given, void*) {
    Attend task;
    if (const int status = read_attend(*given, task)) return status;
    with_head_dim(task.cache.head_dim, [&](auto d) {
        constexpr int kD = decltype(d)::value;
        if (choices.many || columns_of(task) > kColumns) return attend_many<kD>(task);
        auto* parts = static_cast<uint8_t*>(given->workspace) + PLANISH_ATTEND_COUNTER_BYTES;
        attend_few<kD>(task, given->splits, reinterpret_cast<float*>(parts));
    });
    return PLANISH_OK;
}

}  // extern "C"
