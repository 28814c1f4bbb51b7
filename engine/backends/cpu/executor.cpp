// Runs a program: a flat array of instructions, on a team of threads, in one call per step.
//
// Threads take tasks of an instruction from a counter. Where the next instruction asks for a
// barrier, they wait for each other (waiting.h). How many threads take part follows what steps
// measured (team_size.h). A step can be run in pieces: when its time is up, threads take no more
// tasks and meet at the next barrier; the counters say where to go on.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <system_error>
#include <utility>
#include <vector>

#include "../../ops/cpu/attention.h"
#include "../../ops/cpu/gated_delta_net.h"
#include "../../ops/cpu/kernels.h"
#include "../../ops/cpu/mul_mat.h"
#include "../../ops/cpu/pack.h"
#include "team.h"
#include "team_size.h"

using namespace gdn;

namespace {

// While it lives, denormal numbers count as zero: processors compute with them a hundred times
// slower.
class FlushDenormals {
   public:
#if defined(__x86_64__)
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

   private:
    const unsigned before_;
#else
    FlushDenormals() {}
#endif
};

// Turns at an instruction's tasks between two looks at the clock.
constexpr int TURNS_PER_LOOK = 8;

// The rows of a step as kernels read them.
class StepRows {
   public:
    // `live`: the live counts, whether kernels see the row tiles (matrix units), whether rows
    // outside them are fine, the number of row tiles, the tiles.
    void set(const int64_t* live) {
        const bool is_matrix = live[N_DIMS] != 0, has_fine = live[N_DIMS + 1] != 0;
        const int64_t n_tiles = live[N_DIMS + 2], n_tokens = live[N_TOKENS];
        const auto* tiles = reinterpret_cast<const RowTile*>(live + N_DIMS + 3);
        by_kind_.clear(), others_.clear();
        fine_.assign(n_tokens, has_fine);
        int32_t row = 0;
        for (const RowTile* tile = tiles; tile < tiles + n_tiles; tile++) {
            while (row < tile->row) others_.push_back(row++);
            for (; row < tile->row + tile->n; row++) by_kind_.push_back(row), fine_[row] = 0;
        }
        while (row < n_tokens) others_.push_back(row++);
        const auto n = static_cast<int64_t>(by_kind_.size()), n_tiled = is_matrix ? n : 0;
        by_kind_.insert(by_kind_.end(), others_.begin(), others_.end());
        if (!is_matrix) {
            others_.resize(n_tokens);
            std::iota(others_.begin(), others_.end(), 0);
        }
        rows = {tiles,           by_kind_.data(),    others_.data(),
                by_kind_.data(), fine_.data(),       is_matrix ? n_tiles : 0,
                n_tiled,         n_tokens - n_tiled, n,
                has_fine};
    }

    Rows rows{};

   private:
    std::vector<int32_t> by_kind_, others_;
    std::vector<uint8_t> fine_;
};

// One cache line for each counter.
struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
};

// Numbers of threads by kind of step. Kinds are few; those of programs that are gone are forgotten
// with all others.
class TeamSizes {
   public:
    explicit TeamSizes(int most) : most_(most) {}

    // The kind of a program's steps of about so many rows: less than twice as many as another.
    TeamSize& of(const Instruction* program, int64_t n_rows) {
        if (sizes_.size() >= MOST_KINDS) sizes_.clear();
        return sizes_.try_emplace({program, std::ilogb(n_rows)}, most_).first->second;
    }

   private:
    static constexpr size_t MOST_KINDS = 64;
    const int most_;
    std::map<std::pair<const Instruction*, int>, TeamSize> sizes_;
};

// Each thread's memory for kernels, which it is the first to touch.
class Scratch {
   public:
    // Throws std::bad_alloc.
    explicit Scratch(int n_threads) : each_(n_threads) {
        for (auto& s : each_) {
            s.reset(static_cast<char*>(std::aligned_alloc(64, SCRATCH_BYTES)));
            if (!s) throw std::bad_alloc();
        }
    }
    char* operator[](int thread) const { return each_[thread].get(); }
    int64_t size() const { return static_cast<int64_t>(each_.size()); }

   private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::vector<std::unique_ptr<char, Free>> each_;
};

class Executor {
   public:
    // Throws as Team.
    explicit Executor(int n_threads) : scratch_(n_threads), sizes_(n_threads), team_(n_threads) {}

    // Begins a program if `first` is -1, else goes on with instruction `first`, for `limit` seconds
    // or a little longer. Returns the instruction to go on with, n at the end.
    // `seconds`: nullptr, or [n]: gets each instruction's time, whatever the limit is.
    int64_t run(const Instruction* program, int64_t n, const int64_t* live, double* seconds,
                int64_t first, double limit) {
        program_ = program, n_ = n, live_ = live, seconds_ = seconds;
        first_ = std::max<int64_t>(first, 0);
        const double start = now();
        met_at_ = start;
        step_rows_.set(live);
        if (static_cast<int64_t>(counters_.size()) < n) counters_ = std::vector<Counter>(n);
        for (int64_t i = 0; first < 0 && i < n; i++)
            counters_[i].next.store(0, std::memory_order_relaxed);
        time_is_up_.store(false, std::memory_order_relaxed);
        all_stop_.store(false, std::memory_order_relaxed);
        resume_.store(n, std::memory_order_relaxed);
        const int64_t n_rows = std::max<int64_t>(1, live[N_TOKENS]);
        TeamSize& size = sizes_.of(program, n_rows);
        n_threads_ = size.size();
        if (first < 0) step_seconds_ = step_waited_ = 0, is_mixed_ = false;
        deadline_ =
            start + std::min(limit, size.limit(static_cast<double>(n_rows)) - step_seconds_);
        team_.run(
            n_threads_,
            [](void* self, int thread) { static_cast<Executor*>(self)->run_program(thread); },
            this);
        const int64_t done = resume_.load(std::memory_order_relaxed);
        if (!seconds) measure(size, now() - start, done == n, static_cast<double>(n_rows));
        return done;
    }

    // The threads that took part in the last step.
    int n_threads() const { return n_threads_; }

   private:
    // Adds up a step's pieces.
    void measure(TeamSize& size, double seconds, bool is_last, double n_rows) {
        step_seconds_ += seconds, step_waited_ += team_.waited() / n_threads_;
        if (!is_last)
            is_mixed_ |= size.gives_up(step_seconds_, n_rows);
        else if (!is_mixed_)
            size.add(step_seconds_, step_waited_, n_rows);
    }

    void run_program(int thread) {
        const FlushDenormals flush;
        begin_matrix_products();
        double start = met_at_;
        for (int64_t i = first_; i < n_; i++) {
            const Instruction& in = program_[i];
            if (i > first_ && (in.barrier || seconds_)) {
                barrier();
                if (all_stop_.load(std::memory_order_relaxed)) {
                    stop_at(i);
                    break;
                }
            }
            if (i > 0 && seconds_ && thread == 0) {
                seconds_[i - 1] = met_at_ - start;
                start = met_at_;
            }
            const Args args{in.views,         in.attrs,         live_,
                            &step_rows_.rows, scratch_[thread], scratch_.size()};
            if (!run_tasks(in, counters_[i], args, thread)) stop_at(i);
        }
        if (seconds_ && n_ > 0) {
            barrier();
            if (thread == 0) seconds_[n_ - 1] = met_at_ - start;
        }
        end_matrix_products();
    }

    // False if there are tasks left: the time is up.
    bool run_tasks(const Instruction& in, Counter& counter, const Args& args, int thread) {
        const int64_t n = in.kernel->n_tasks(args);
        // Every thread takes several turns, so that the others do the work of one that is held up.
        const int64_t grab = n_threads_ == 1 ? n : std::max<int64_t>(1, n / (n_threads_ * 8));
        while (n > 0) {
            if (time_is_up_.load(std::memory_order_relaxed))
                return counter.next.load(std::memory_order_relaxed) >= n;
            const int64_t begin = counter.next.fetch_add(grab, std::memory_order_relaxed);
            if (begin >= n) break;
            in.kernel->run(args, begin, std::min(n, begin + grab));
            if (thread == 0 && ++turns_ % TURNS_PER_LOOK == 0 && !seconds_ && now() > deadline_)
                time_is_up_.store(true, std::memory_order_relaxed);
        }
        return true;
    }

    // Notes that instruction i has to be gone on with.
    void stop_at(int64_t i) {
        int64_t earliest = resume_.load(std::memory_order_relaxed);
        while (i < earliest && !resume_.compare_exchange_weak(earliest, i)) {}
    }

    // The last thread to come decides for all whether they go on.
    void barrier() {
        team_.barrier([this] {
            // A thread that is held up here may miss the whole next instruction.
            if (seconds_) met_at_ = now();
            if (time_is_up_.load(std::memory_order_relaxed))
                all_stop_.store(true, std::memory_order_relaxed);
        });
    }

    const Scratch scratch_;
    TeamSizes sizes_;
    std::vector<Counter> counters_;
    const Instruction* program_ = nullptr;
    int64_t n_ = 0;
    const int64_t* live_ = nullptr;
    StepRows step_rows_;
    double* seconds_ = nullptr;
    int64_t first_ = 0;
    double deadline_ = 0, step_seconds_ = 0, step_waited_ = 0;
    bool is_mixed_ = false;  // Pieces of a step had different numbers of threads.
    int n_threads_ = 1;
    double met_at_ = 0;  // When the run began, or a timed one's threads last met.
    // Thread 0 alone counts its turns.
    alignas(64) unsigned turns_ = 0;
    // Read at every turn, written when a run begins and when its time is up.
    alignas(64) std::atomic<bool> time_is_up_{false};
    std::atomic<bool> all_stop_{false};
    std::atomic<int64_t> resume_{0};
    Team team_;
};

}  // namespace

// Calls f and returns its result. No exception leaves the C interface: if f throws one, this returns
// `failed`, and errno says why.
template <typename F, typename T>
T guarded(F f, T failed) {
    try {
        return f();
    } catch (const std::system_error& error) {
        errno = error.code().value();
    } catch (const std::exception&) { errno = ENOMEM; }
    return failed;
}

#define GDN_EXPORT extern "C" __attribute__((visibility("default")))

// Whether the operating system lets this process use what the library is built for.
GDN_EXPORT int gdn_allowed() { return allow_matrix_products(); }

// nullptr if the threads can't be started; errno says why.
GDN_EXPORT void* gdn_team_create(int n_threads) {
    return guarded([=] { return new Executor(n_threads); }, static_cast<Executor*>(nullptr));
}

GDN_EXPORT void gdn_team_free(void* team) { delete static_cast<Executor*>(team); }

// The threads that took part in the last step.
GDN_EXPORT int gdn_team_threads(const void* team) {
    return static_cast<const Executor*>(team)->n_threads();
}

GDN_EXPORT const void* gdn_kernel(const char* name) {
    for (const Kernel* k : KERNELS)
        if (std::strcmp(k->name, name) == 0) return k;
    return nullptr;
}

// The kernels' constants and sizes that Python needs; -1 for an unknown name.
GDN_EXPORT int64_t gdn_constant(const char* name) {
    constexpr struct {
        const char* name;
        int64_t value;
    } CONSTANTS[] = {
        // clang-format off
        {"sizeof_view", sizeof(View)}, {"sizeof_instruction", sizeof(Instruction)},
        {"F32", F32}, {"F16", F16}, {"I32", I32}, {"I8", I8}, {"PACKED", PACKED}, {"BF16", BF16},
        {"N_TOKENS", N_TOKENS}, {"N_SEQS", N_SEQS}, {"N_SEQS_1", N_SEQS_1},
        {"N_OUTPUTS", N_OUTPUTS}, {"panel_rows", PANEL}, {"k_block", K_BLOCK},
        {"sum_group", SUM_GROUP}, {"tile_side", SIDE}, {"tile_depth", DEPTH},
        {"max_tile_rows", MAX_TILE_ROWS}, {"max_gathered_columns", MAX_GATHERED_COLUMNS},
        {"partial_head", attention_op::PARTIAL_HEAD}, {"max_head", MAX_HEAD},
        // clang-format on
    };
    for (const auto& c : CONSTANTS)
        if (std::strcmp(c.name, name) == 0) return c.value;
    return -1;
}

// As Executor::run; -1 if there is no memory to begin the step, with errno.
GDN_EXPORT int64_t gdn_run(void* team, const void* program, int64_t n, const int64_t* live,
                           double* seconds, int64_t first, double limit) {
    const auto* instructions = static_cast<const Instruction*>(program);
    return guarded(
        [=] {
            return static_cast<Executor*>(team)->run(instructions, n, live, seconds, first, limit);
        },
        int64_t{-1});
}

GDN_EXPORT int32_t gdn_layout_of(int ggml_id) { return layout_of(ggml_id); }

GDN_EXPORT int64_t gdn_panel_bytes(int32_t layout, int64_t n_in) {
    return panel_bytes(layout, n_in);
}

GDN_EXPORT void gdn_pack(int ggml_id, const uint8_t* src, int64_t n_rows, int64_t n_in,
                         float factor, uint8_t* dst, int64_t begin, int64_t end) {
    pack_rows(ggml_id, src, n_rows, n_in, factor, dst, begin, end);
}
