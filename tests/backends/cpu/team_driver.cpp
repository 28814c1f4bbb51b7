// A team of threads and the choice of its size, for tests/backends/cpu/test_team.py.

#include <ctime>

#include "../../../engine/backends/cpu/team.h"
#include "../../../engine/backends/cpu/team_size.h"

using gdn::Team, gdn::TeamSize;

namespace {

double cpu_seconds() {
    timespec t{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void sleep_for(double seconds) {
    const timespec t = {0, static_cast<long>(1e9 * seconds)};
    nanosleep(&t, nullptr);
}

// What the threads of a run share.
struct Shared {
    Team* team;
    int n_rounds;
    double held_up;  // Seconds that thread 0 comes late to the first barrier.
    int64_t* counts;
    int64_t n_between = 0;  // Counted by the last thread at each barrier.
};

void count(void* context, int thread) {
    auto& shared = *static_cast<Shared*>(context);
    if (thread == 0 && shared.held_up > 0) sleep_for(shared.held_up);
    for (int i = 0; i < shared.n_rounds; i++) {
        shared.counts[16 * thread]++;
        shared.team->barrier([&] { shared.n_between++; });
        // All threads see what the last one did, and none has gone on to the next barrier's.
        if (shared.n_between != i + 1) shared.counts[16 * thread] -= 1 << 20;
        shared.team->barrier([] {});
    }
}

}  // namespace

extern "C" {

void* make_team(int n) { return new Team(n); }
void free_team(void* team) { delete static_cast<Team*>(team); }

// Counts rounds on `size` threads; counts: [threads of the team, 16]. The CPU seconds of the process
// meanwhile.
double count_rounds(void* team, int size, int n_rounds, double held_up, int64_t* counts) {
    Shared shared{static_cast<Team*>(team), n_rounds, held_up, counts};
    const double before = cpu_seconds();
    shared.team->run(size, count, &shared);
    return cpu_seconds() - before;
}

double waited(const void* team) { return static_cast<const Team*>(team)->waited(); }

void* make_size(int most) { return new TeamSize(most); }
void free_size(void* size) { delete static_cast<TeamSize*>(size); }
int size_of(const void* size) { return static_cast<const TeamSize*>(size)->size(); }
void add_step(void* size, double seconds, double waited, double rows) {
    static_cast<TeamSize*>(size)->add(seconds, waited, rows);
}
double limit_of(const void* size) { return static_cast<const TeamSize*>(size)->limit(1); }
int gives_up(void* size, double seconds) {
    return static_cast<TeamSize*>(size)->gives_up(seconds, 1);
}
}
