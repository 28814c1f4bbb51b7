// Runs programs on the CPU's executor, so that ThreadSanitizer watches how its threads share work.
//
// Instructions pass numbers on through a few buffers: a task reads what another thread may have
// written before the last barrier, and no two tasks of a phase write the same place. What comes out
// is compared with the same program run by one loop.

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "../../engine/ops/cpu/kernel.h"

using gdn::Args, gdn::Instruction, gdn::Kernel, gdn::N_DIMS, gdn::SCRATCH_BYTES, gdn::View;

extern "C" {
void* gdn_team_create(int n_threads);
void gdn_team_free(void* team);
int64_t gdn_run(void* team, const void* program, int64_t n, const int64_t* live, double* seconds,
                int64_t first, double limit);
}

namespace {

constexpr int N_BUFFERS = 6, N_INSTRUCTIONS = 400, N_RUNS = 20;

using Buffers = std::vector<std::vector<uint64_t>>;

uint64_t mixed(uint64_t a, uint64_t b, int64_t i) {
    return (a ^ (b << 1)) * 6364136223846793005u + static_cast<uint64_t>(i);
}

int64_t n_tasks(const Args& args) { return args.rows(args.v[0]); }

// out[i] of a few places of in; through scratch, which must be the thread's own.
void run_tasks(const Args& args, int64_t begin, int64_t end) {
    uint64_t *out = args.v[0].as<uint64_t>(), *own = reinterpret_cast<uint64_t*>(args.scratch);
    const uint64_t* in = args.v[1].as<uint64_t>();
    const int64_t n = args.v[1].shape[0];
    for (int64_t i = begin; i < end; i++) {
        own[i % 64] = in[(i * 7 + 3) % n];
        out[i] = mixed(own[i % 64], in[n - 1 - i % n], i);
    }
}

const Kernel MIX = {"MIX", n_tasks, run_tasks};

// Buffer 2 of a phase is written by one instruction, buffer 3 by another without a barrier between.
struct Program {
    explicit Program(Buffers& buffers) {
        views.reserve(2 * N_INSTRUCTIONS);
        for (int i = 0; i < N_INSTRUCTIONS; i++) {
            const int phase = i / 2, side = i % 2;
            targets.push_back(phase % 3 * 2 + side);
            sources.push_back((phase + 2) % 3 * 2 + (side ^ (phase % 2)));
            for (int b : {targets.back(), sources.back()}) {
                View view{};
                view.data = reinterpret_cast<char*>(buffers[b].data());
                view.shape[0] = static_cast<int64_t>(buffers[b].size());
                view.rank = 1;
                views.push_back(view);
            }
            instructions.push_back({&MIX, &views[2 * i], nullptr, side == 0});
        }
    }

    // What one thread makes of the buffers.
    void run_alone(Buffers& buffers, int n) const {
        std::vector<char> scratch(SCRATCH_BYTES);
        const int64_t live[N_DIMS + 3] = {};
        for (int i = 0; i < n; i++) {
            auto &out = buffers[targets[i]], &in = buffers[sources[i]];
            View pair[2] = {views[2 * i], views[2 * i + 1]};
            pair[0].data = reinterpret_cast<char*>(out.data());
            pair[1].data = reinterpret_cast<char*>(in.data());
            const Args args{pair, nullptr, live, nullptr, scratch.data()};
            run_tasks(args, 0, n_tasks(args));
        }
    }

    std::vector<View> views;
    std::vector<int> targets, sources;
    std::vector<Instruction> instructions;
};

// Sizes from none to more tasks than a thread takes in one turn.
Buffers fresh_buffers() {
    const int64_t sizes[N_BUFFERS] = {1, 97, 333, 5, 64, 210};
    Buffers buffers;
    for (int64_t size : sizes) buffers.emplace_back(size, 1);
    return buffers;
}

bool agrees(int n_threads) {
    Buffers buffers = fresh_buffers(), expected = buffers;
    const Program program(buffers);
    std::vector<double> seconds(N_INSTRUCTIONS);
    const int64_t live[N_DIMS + 3] = {};
    void* team = gdn_team_create(n_threads);
    bool good = true;
    int n_pieces = 0;
    for (int i = 0; i < N_RUNS && good; i++) {
        // Short and long programs, with timers and without; at times the team parks before.
        const int n = i % 4 == 3 ? i % 7 : N_INSTRUCTIONS - i;
        if (i % 5 == 4) std::this_thread::sleep_for(std::chrono::milliseconds(5));
        // In one piece, or in as many as there are looks at the clock.
        double* timed = i % 3 == 2 ? seconds.data() : nullptr;
        const double limit = i % 2 ? 1.0 : 0.0;
        int64_t done = -1;
        do {
            done = gdn_run(team, program.instructions.data(), n, live, timed, done, limit);
            n_pieces++;
        } while (done < n);
        program.run_alone(expected, n);
        good = buffers == expected;
        // The next run must see what is written between runs.
        for (Buffers* b : {&buffers, &expected}) (*b)[i % N_BUFFERS][0] += i;
    }
    gdn_team_free(team);
    std::printf("%d threads: %d runs of up to %d instructions, in %d pieces, %s\n", n_threads,
                N_RUNS, N_INSTRUCTIONS, n_pieces, good ? "agree" : "DIFFER from one loop");
    return good && n_pieces > 10 * N_RUNS;
}

}  // namespace

int main() {
    bool good = true;
    for (int n_threads : {1, 2, 3}) good &= agrees(n_threads);
    return good ? 0 : 1;
}
