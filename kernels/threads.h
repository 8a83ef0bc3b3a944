// Threads that are not waited for.
//
// At the end of a parallel region OpenMP waits for every thread, and a thread whose core is busy with other work comes
// to it some milliseconds late: beside one busy program, a step of 200 regions takes half a second. Here a region is over
// when its work is: a thread takes pieces as long as there are some, one that comes late finds none, and the caller
// waits only for pieces that are being worked on. So that a thread loses its core between regions and not in the midst of
// a piece, it yields there before its time slice is over: so it has its share of a core that another program wants too.
// One that lost its core with a piece nevertheless stays away for a while, four times as long each time.

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include <immintrin.h>

namespace threads {

constexpr int64_t SPIN = 2'000'000;   // ns that a thread looks for work before it sleeps: longer than a step's end takes
constexpr int64_t SLICE = 1'000'000;  // ns until a thread yields by itself: Linux was seen to take its core after 4 ms
constexpr int64_t LATE = 100'000;     // ns, besides twice a usual piece's time, after which a piece has lost its core
constexpr int64_t FIRST_ABSENCE = 4'000'000, LONGEST_ABSENCE = 256'000'000;  // ns
constexpr int64_t GOOD = 20'000'000;  // ns without being late, after which a thread's absences are short again

static int64_t now() {
    return std::chrono::steady_clock::now().time_since_epoch().count();
}

struct alignas(64) Helper {
    std::atomic<bool> inside{false};  // it may be at work on a piece
    std::atomic<int64_t> back{0};     // when it may take part again
    int64_t absence = FIRST_ABSENCE;  // how long the next absence will be; the caller's alone
};

class Pool {
  public:
    // Call run(thread) on up to `count` threads, this one with 0. run takes pieces of work until there are none, and
    // returns how many it took; on other threads it may not throw. Whoever is late is not called, and where no thread can
    // be made there are fewer. One caller at a time: another works alone.
    template <class Run>
    void call(int count, const Run& run) {
        std::unique_lock<std::mutex> turn(calling, std::try_to_lock);
        if (!turn || count == 1) {
            run(0);
            return;
        }
        while (int(helpers.size()) < count - 1 && add()) continue;
        function = [](const void* run, int thread) { (*static_cast<const Run*>(run))(thread); };
        argument = &run;
        num_threads = count;
        core = sched_getcpu();
        open = true;
        round++;
        if (sleeping) syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
        const Closing closing{*this};  // where run throws
        const int64_t begin = now(), pieces = run(0), end = now();
        open = false;
        const int64_t patience = LATE + 2 * (end - begin) / (pieces ? pieces : 1);
        for (Helper* helper : helpers) finish(*helper, end, patience);  // one that is too many may be looking, too
    }

  private:
    std::vector<Helper*> helpers;
    std::mutex calling;
    std::atomic<uint32_t> round{0};  // of calls; helpers wait for the next
    std::atomic<int> sleeping{0};
    std::atomic<bool> open{false};  // there may be work in this round
    std::atomic<int> core{-1};      // the caller's
    void (*function)(const void*, int);
    const void* argument;
    int num_threads;

    struct Closing {
        Pool& pool;
        ~Closing() {
            pool.open = false;
            for (Helper* helper : pool.helpers)
                while (helper->inside) sched_yield();
        }
    };

    // Wait until a helper is outside, and send it away if that takes longer than from `end` on it should.
    static void finish(Helper& helper, int64_t end, int64_t patience) {
        if (!helper.inside) return;
        while (helper.inside && now() - end < patience) _mm_pause();
        if (!helper.inside) return;
        while (helper.inside) sched_yield();  // it may wait for this very core
        const int64_t time = now();
        if (time - helper.back > GOOD) helper.absence = FIRST_ABSENCE;
        helper.back = time + helper.absence;
        helper.absence = std::min(4 * helper.absence, LONGEST_ABSENCE);
    }

    bool add() {
        const int thread = int(helpers.size()) + 1;
        auto helper = std::make_unique<Helper>();
        helpers.reserve(thread);
        try {
            std::thread([this, helper = helper.get(), thread] { serve(*helper, thread); }).detach();
        } catch (const std::system_error&) {  // the system has a limit
            return false;
        }
        helpers.push_back(helper.release());
        return true;
    }

    void serve(Helper& helper, int thread) {
        int64_t slice_began = now();
        for (uint32_t seen = 0;;) {
            seen = next_round(seen, slice_began);
            const int64_t away = helper.back - now();
            if (away > 0) {
                std::this_thread::sleep_for(std::chrono::nanoseconds(away));
                slice_began = now();
                continue;
            }
            helper.inside = true;  // before it looks whether the round is open, as the caller closes it before it looks
            if (open && thread < num_threads) function(argument, thread);
            helper.inside = false;
        }
    }

    uint32_t next_round(uint32_t seen, int64_t& slice_began) {
        const int64_t begin = now();
        for (int64_t time = begin; time - begin < SPIN; time = now()) {
            if (time - slice_began > SLICE || core == sched_getcpu()) {  // the caller may be waiting for this very core
                sched_yield();
                slice_began = now();
            }
            for (int i = 0; i < 32; i++) {  // so that most of the time goes into looking
                if (round != seen) return round;
                _mm_pause();
            }
        }
        sleeping++;
        while (round == seen) syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleeping--;
        slice_began = now();
        return round;
    }
};

// It lives as long as the process. A fork has none of its threads, and gets a pool of its own.
static Pool* pool = new Pool;
static const int forks = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace threads
