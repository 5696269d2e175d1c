// Runs the warps of the cache's kernels on the host, one after the other, for the tests in Python.

#include <cstddef>
#include <cstring>
#include <deque>
#include <vector>

#include "kv_append.cuh"
#include "kv_warps.cuh"

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

template <class Function>
void with_head_dim(int head_dim, Function function) {
    if (head_dim == 64) return function(Constant<64>{});
    if (head_dim == 96) return function(Constant<96>{});
    function(Constant<128>{});
}

template <int D>
void attend_few(const Attend& task, int splits, bool late, int threads) {
    const int bytes = warp_bytes<D>(task.cache, 1);
    std::vector<Quad> memory(static_cast<std::size_t>(kAttendWarps * bytes) / sizeof(Quad));
    auto* shared = reinterpret_cast<uint8_t*>(memory.data());
    std::vector<float> workspace(static_cast<std::size_t>(part_offset<D>(task, splits, task.news.batch, 0, 0)),
                                 std::nanf(""));
    for (int sequence = 0; sequence < task.news.batch; ++sequence) {
        for (int head = 0; head < task.cache.kv_heads; ++head) {
            for (int split = 0; split < splits; ++split) {
                std::memset(shared, 0xFF, static_cast<std::size_t>(kAttendWarps * bytes));
                for (int warp = 0; warp < kAttendWarps; ++warp) {
                    HostCopy copy(late);
                    attend_split<KvHostWarp, D>(task, splits, sequence, head, split, warp, shared + warp * bytes, copy);
                }
                for (int thread = 0; thread < threads; ++thread) {
                    merge_warps<D>(task, splits, sequence, head, split, reinterpret_cast<float*>(shared),
                                   bytes / static_cast<int>(sizeof(float)), workspace.data(), thread, threads);
                }
            }
            for (int thread = 0; splits > 1 && thread < threads; ++thread) {
                merge_splits<D>(task, splits, sequence, head, workspace.data(), thread, threads);
            }
        }
    }
}

template <int D>
void attend_many(const Attend& task, bool late) {
    const int bytes = warp_bytes<D>(task.cache, kManyTiles);
    std::vector<Quad> memory(static_cast<std::size_t>(bytes) / sizeof(Quad));
    auto* shared = reinterpret_cast<uint8_t*>(memory.data());
    for (int sequence = 0; sequence < task.news.batch; ++sequence) {
        for (int head = 0; head < task.cache.kv_heads; ++head) {
            for (int column = 0; column < columns_of(task); column += kManyTiles * kColumns) {
                std::memset(shared, 0xFF, static_cast<std::size_t>(bytes));
                HostCopy copy(late);
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

// Structures are passed as they are: their fields have the sizes and places that ctypes gives them.
void planish_append(const Append* task, int32_t rows) {
    with_head_dim(task->cache.head_dim, [&](auto d) {
        constexpr int kD = decltype(d)::value;
        rows == 1 ? append<kD, 1>(*task) : append<kD, kMappedRows>(*task);
    });
}

// `splits` is 0 for many columns. `late` says when copies arrive.
void planish_attend(const Attend* task, int32_t splits, int32_t late, int32_t threads) {
    with_head_dim(task->cache.head_dim, [&](auto d) {
        constexpr int kD = decltype(d)::value;
        splits ? attend_few<kD>(*task, splits, late != 0, threads) : attend_many<kD>(*task, late != 0);
    });
}

}  // extern "C"
