// How many threads a step takes: as many as were fastest of late.
//
// A neighbour on one core makes a whole team wait for the thread that shares this core with it, and
// fewer threads are faster then. So now and then steps are tried with another number of threads;
// it is kept if they were faster. Fewer are tried soon where threads wait at barriers, and else
// hardly ever; more are tried as often as their trials cost little. The first step of all is taken
// by the whole team.
#pragma once

#include <algorithm>
#include <limits>

namespace gdn {

class TeamSize {
   public:
    explicit TeamSize(int most) : most_(most), size_(most) {}

    // Threads of the next step.
    int size() const { return trial_ ? trial_ : size_; }

    // Notes a step of `rows` rows that took `seconds`. waited: seconds that its threads waited
    // at barriers, on average.
    void add(double seconds, double waited, double rows) {
        if (trial_) {
            tried_.add(seconds, waited, rows);
            if (tried_.seconds >= TRIAL_SECONDS || limit(0) <= 0) end_trial(lost(0, 0));
            return;
        }
        // What is long past counts less and less.
        recent_.fade(std::max(0.0, 1 - seconds / MEMORY_SECONDS));
        recent_.add(seconds, waited, rows);
        fewer_.since += seconds, more_.since += seconds;
        if (recent_.seconds >= TRIAL_SECONDS) try_another();
    }

    // The seconds that a trial leaves to a step of so many rows.
    double limit(double rows) const {
        if (!trial_) return std::numeric_limits<double>::infinity();
        return MOST_LOST + MOST_LOST_SHARE * expected(rows) - lost(0, rows);
    }

    // Ends a trial if its step, which has taken `seconds`, is past its limit: true if so. The step
    // goes on with another number of threads then, and is not to be added.
    bool gives_up(double seconds, double rows) {
        if (seconds < limit(rows)) return false;
        end_trial(lost(seconds, 0));  // As if the step had come to nothing.
        return true;
    }

   private:
    // Steps of a trial take so long at least, or until they have lost so many seconds and such a
    // share of what they should take. A smaller gain than this share may be chance.
    static constexpr double TRIAL_SECONDS = 0.03, MOST_LOST = 0.015, MOST_LOST_SHARE = 0.25;
    static constexpr double LEAST_GAIN = 0.05;
    static constexpr double MEMORY_SECONDS = 0.1;
    // What a trial lost is at most one part in so many of the time until the next one.
    static constexpr double PATIENCE = 50;
    // Threads that wait less than this share of their time don't lack a core: then fewer
    // threads are tried after so many seconds, and so many times the usual ones.
    static constexpr double MANY_WAIT = 0.1, QUIET_SECONDS = 10, QUIET_PATIENCE = 10;

    struct Times {
        double seconds = 0, waited = 0, rows = 0;

        void add(double more_seconds, double more_waited, double more_rows) {
            seconds += more_seconds, waited += more_waited, rows += more_rows;
        }
        void fade(double share) { seconds *= share, waited *= share, rows *= share; }
    };

    // Trials of fewer threads, or of more: the seconds since the last one, and until the next.
    struct Direction {
        double since = 0, wait = TRIAL_SECONDS;
        int n_trials = 0;
    };

    void try_another() {
        const bool is_quiet = recent_.waited < MANY_WAIT * recent_.seconds;
        const double until_fewer =
            is_quiet ? std::max(QUIET_SECONDS, QUIET_PATIENCE * fewer_.wait) : fewer_.wait;
        // In turns, one thread and a factor of two.
        if (size_ > 1 && fewer_.since >= until_fewer)
            trial_ = fewer_.n_trials++ % 2 ? size_ / 2 : size_ - 1;
        else if (size_ < most_ && more_.since >= more_.wait)
            trial_ = more_.n_trials++ % 2 ? std::min(2 * size_, most_) : size_ + 1;
        tried_ = {};
    }

    double expected(double rows) const {
        return recent_.seconds / recent_.rows * (tried_.rows + rows);
    }

    // What the trial has lost so far, with a step that has taken `seconds` for `rows`.
    double lost(double seconds, double rows) const {
        return tried_.seconds + seconds - expected(rows);
    }

    void end_trial(double lost) {
        Direction& tried = trial_ < size_ ? fewer_ : more_;
        if (lost < -LEAST_GAIN * expected(0)) {
            // The other way is soon tried, in case that this was chance.
            fewer_ = more_ = {};
            size_ = trial_, recent_ = tried_;
        } else {
            tried.since = 0, tried.wait = std::max(TRIAL_SECONDS, PATIENCE * lost);
        }
        trial_ = 0;
    }

    int most_, size_, trial_ = 0;  // No trial: 0.
    Times recent_, tried_;
    Direction fewer_, more_;
};

}  // namespace gdn
