#include "disk_tier.h"

#include "check.h"
#include "checksum.h"
#include "disk_tier_fixture.h"
#include "error.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <pthread.h>
#include <set>
#include <stdexcept>
#include <sys/mman.h>
#include <thread>

using pye::DiskTier;
using pye::Read;
using pye::Segment;
using pye::Urgency;
namespace platform = pye::platform;

namespace {

constexpr uint64_t kPage = platform::kPage;

bool contains(const std::string & text, const std::string & part) { return text.find(part) != std::string::npos; }

uint64_t largest(const std::vector<Segment> & pieces) {
    uint64_t n = 0;
    for (const Segment & p : pieces) {
        n = std::max(n, p.size);
    }
    return n;
}

std::vector<platform::File> one_file(platform::File file) {
    std::vector<platform::File> files;
    files.push_back(std::move(file));
    return files;
}

// Pages of a file that the page cache holds.
size_t cached_pages(const std::string & path) {
    const size_t size = file_size(path);
    const int    fd   = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    void *       map  = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    CHECK(map != MAP_FAILED);
    std::vector<unsigned char> resident((size + kPage - 1) / kPage);
    const int                  status = mincore(map, size, resident.data());
    munmap(map, size);
    CHECK_EQUAL(status, 0);
    return static_cast<size_t>(std::count_if(resident.begin(), resident.end(), [](unsigned char r) { return r & 1; }));
}

void drop_from_cache(const std::string & path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
}

// Holds I/O threads inside their place function until it is opened.
class Gate {
  public:
    void wait_inside() {
        std::unique_lock<std::mutex> lock(mutex_);
        ++inside_;
        changed_.notify_all();
        changed_.wait(lock, [this] { return open_; });
    }
    void await(size_t n) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return inside_ >= n; });
    }
    void open() {
        std::lock_guard<std::mutex> lock(mutex_);
        open_ = true;
        changed_.notify_all();
    }
    size_t inside() {
        std::lock_guard<std::mutex> lock(mutex_);
        return inside_;
    }

  private:
    std::mutex              mutex_;
    std::condition_variable changed_;
    size_t                  inside_ = 0;
    bool                    open_   = false;
};

} // namespace

TEST(every_byte_at_odd_offsets_and_sizes) {
    const uint64_t             size  = 5 * kPage + 1234; // ends within a page and within a disk block
    const std::vector<Segment> cases = {
        {0, 0, 1},
        {0, 0, kPage},
        {0, 0, kPage + 1},
        {0, 1, kPage},
        {0, 1, kPage - 1},
        {0, kPage - 1, 1},
        {0, kPage - 1, 2},
        {0, kPage, kPage},
        {0, kPage + 1, 3 * kPage - 2},
        {0, 511, 2},
        {0, 513, 1023},
        {0, 2 * kPage - 7, 2 * kPage + 14},
        {0, size - 1, 1},
        {0, size - 1235, 1235},
        {0, size - kPage - 1, kPage + 1},
        {0, 5 * kPage, 1234},
        {0, 0, size},
        {0, 3, size - 3},
    };
    for (const Way & way : ways()) {
        TemporaryFolder folder(way.parent);
        write_pattern(folder.file("a"), 0, size);
        Verifier       verifier;
        platform::File file = way.open(folder.file("a"));
        if (way.parent == "." && !way.buffered && !file.direct) {
            check::note("this file system refuses direct reads: only buffered ones are tested");
        }
        CHECK_EQUAL(file.size, size);
        DiskTier tier(one_file(file), largest(cases), 1, verifier.place());
        for (uint64_t i = 0; i < cases.size(); ++i) {
            verifier.begin(tier, i, {cases[i]});
            const DiskTier::Landed landed = tier.load_wait();
            CHECK_EQUAL(landed.why, "");
            CHECK(landed.ok);
            CHECK_EQUAL(landed.tag, i);
            CHECK_EQUAL(verifier.arrived(i), 1u);
            CHECK_EQUAL(verifier.wrong(), "");
        }
        CHECK_EQUAL(tier.counters().reads.load(), cases.size());
        CHECK_EQUAL(tier.counters().errors.load(), 0u);
        CHECK(tier.counters().busy_ns.load() > 0);
        uint64_t asked = 0, covered = 0;
        for (const Segment & s : cases) {
            asked += s.size;
            covered += std::min(size, (s.offset + s.size + kPage - 1) / kPage * kPage) - s.offset / kPage * kPage;
        }
        CHECK(tier.counters().bytes.load() >= asked);
        CHECK(tier.counters().bytes.load() <= covered);
        if (way.buffered) {
            CHECK_EQUAL(tier.counters().bytes.load(), asked);
        }
    }
}

TEST(read_gives_any_part_of_a_segment_on_the_callers_thread) {
    for (const Way & way : ways()) {
        TemporaryFolder folder(way.parent);
        const uint64_t  size = 3 * kPage + 77;
        write_pattern(folder.file("a"), 0, size);
        DiskTier      tier(one_file(way.open(folder.file("a"))), kPage, 1, [](uint64_t, uint32_t, const uint8_t *) {});
        const Segment segment = {0, 999, size - 999};
        for (const auto & [from, n] : std::vector<std::pair<uint64_t, uint64_t>>{
                 {0, 1}, {0, size - 999}, {kPage, kPage}, {3097, 5000}, {size - 999 - 1, 1}}) {
            std::vector<uint8_t> bytes(n + 1, 0xee);
            tier.read(segment, from, n, bytes.data());
            CHECK(is_pattern(bytes.data(), 0, segment.offset + from, n));
            CHECK_EQUAL(bytes[n], 0xee);
        }
        uint8_t          bytes[8];
        const pye::Error e = CAUGHT(pye::Error, tier.read({0, size - 4, 8}, 0, 8, bytes));
        CHECK_EQUAL(e.code(), PYE_E_FILE);
        CHECK(contains(e.what(), folder.file("a")));
    }
}

TEST(several_files_and_many_loads_in_flight) {
    for (const Way & way : ways()) {
        TemporaryFolder             folder(way.parent);
        std::vector<platform::File> files;
        for (uint32_t f = 0; f < 3; ++f) {
            const std::string path = folder.file(std::to_string(f));
            write_pattern(path, f, 20 * kPage + 333 * f);
            files.push_back(way.open(path));
        }
        Verifier           verifier;
        DiskTier           tier(std::move(files), 2 * kPage, 4, verifier.place());
        constexpr uint64_t n_load = 200;
        for (uint64_t tag = 0; tag < n_load; ++tag) {
            const uint32_t f = tag % 3;
            verifier.begin(tier, tag << 32 | 7, // tags have 64 bits
                           {{f, tag * 97, 2 * kPage}, {(f + 1) % 3, tag * 89 + 1, 1}, {f, tag * 83 + 2, kPage + tag}});
        }
        std::set<uint64_t> seen;
        for (uint64_t i = 0; i < n_load; ++i) {
            const DiskTier::Landed landed = tier.load_wait();
            CHECK_EQUAL(landed.why, "");
            CHECK(landed.ok);
            CHECK(seen.insert(landed.tag).second);
            CHECK_EQUAL(verifier.arrived(landed.tag), 3u); // a load lands with its last piece, not before
        }
        CHECK_EQUAL(verifier.wrong(), "");
        CHECK_EQUAL(tier.counters().reads.load(), 3 * n_load);
        DiskTier::Landed none;
        CHECK(!tier.load_poll(&none));
    }
}

TEST(what_place_wrote_is_seen_after_the_load_landed) {
    // No lock of the test's own here: that the bytes may be read is the tier's promise. The thread sanitizer holds it to it.
    TemporaryFolder folder;
    const uint64_t  size = 16 * kPage;
    write_pattern(folder.file("a"), 0, size);
    std::vector<uint8_t> memory(size, 0);
    DiskTier             tier(one_file(platform::open_file(folder.file("a"))), kPage, 4,
                              [&](uint64_t tag, uint32_t piece, const uint8_t * bytes) {
                      memcpy(memory.data() + (tag * 2 + piece) * kPage, bytes, kPage);
                              });
    for (uint64_t tag = 0; tag < 8; ++tag) {
        tier.load_begin(tag, {{0, tag * 2 * kPage, kPage}, {0, (tag * 2 + 1) * kPage, kPage}});
    }
    for (int i = 0; i < 8; ++i) {
        DiskTier::Landed landed;
        if (i % 2 == 0) {
            landed = tier.load_wait();
        } else {
            while (!tier.load_poll(&landed)) {
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        }
        CHECK(landed.ok);
        CHECK(is_pattern(memory.data() + landed.tag * 2 * kPage, 0, landed.tag * 2 * kPage, 2 * kPage));
    }
}

TEST(a_segment_past_the_end_fails_and_others_do_not) {
    for (const Way & way : ways()) {
        TemporaryFolder folder(way.parent);
        const uint64_t  size = 2 * kPage + 100;
        write_pattern(folder.file("short"), 0, size);
        Verifier verifier;
        DiskTier tier(one_file(way.open(folder.file("short"))), 8 * kPage, 2, verifier.place());
        verifier.begin(tier, 0, {{0, size - 10, 11}});          // one byte too many
        verifier.begin(tier, 1, {{0, 10 * kPage, 5}});          // all of it behind the end
        verifier.begin(tier, 2, {{0, 0, 5}, {0, size - 1, 2}}); // one good piece does not save the load
        verifier.begin(tier, 3, {{0, size - 10, 10}});          // fits
        verifier.begin(tier, 4, {{0, kPage, 2 * kPage}});       // ends in the last page, behind the end
        for (int i = 0; i < 5; ++i) {
            const DiskTier::Landed landed = tier.load_wait();
            CHECK_EQUAL(landed.ok, landed.tag == 3);
            CHECK_EQUAL(landed.why.empty(), landed.ok);
            if (!landed.ok) {
                CHECK(contains(landed.why, folder.file("short")));
                CHECK(contains(landed.why, "ends too early"));
            }
        }
        CHECK_EQUAL(verifier.wrong(), "");
        CHECK_EQUAL(verifier.arrived(0) + verifier.arrived(1) + verifier.arrived(4), 0u);
        CHECK_EQUAL(tier.counters().errors.load(), 4u);
    }
}

TEST(a_file_truncated_or_removed_while_it_is_open) {
    for (const Way & way : ways()) {
        TemporaryFolder folder(way.parent);
        write_pattern(folder.file("cut"), 0, 8 * kPage);
        write_pattern(folder.file("gone"), 1, 8 * kPage);
        Verifier                    verifier;
        std::vector<platform::File> files = {way.open(folder.file("cut")), way.open(folder.file("gone"))};
        DiskTier                    tier(std::move(files), 4 * kPage, 2, verifier.place());
        CHECK_EQUAL(truncate(folder.file("cut").c_str(), 4 * kPage + 10), 0);
        CHECK_EQUAL(unlink(folder.file("gone").c_str()), 0);
        verifier.begin(tier, 0, {{0, 4 * kPage + 5, 20}});
        verifier.begin(tier, 1, {{0, 4 * kPage, 10}});
        verifier.begin(tier, 2, {{0, 4 * kPage - 1, 11}});
        verifier.begin(tier, 3, {{1, 4 * kPage - 1, 3 * kPage}}); // an open file stays until it is closed
        for (int i = 0; i < 4; ++i) { // what is left of a file that somebody cut is not trusted either
            const DiskTier::Landed landed = tier.load_wait();
            CHECK_EQUAL(landed.ok, landed.tag == 3);
        }
    }
}

TEST(a_file_written_to_while_it_is_open) {
    for (const Way & way : ways()) {
        TemporaryFolder folder(way.parent);
        write_pattern(folder.file("a"), 0, 8 * kPage);
        Verifier verifier;
        DiskTier tier(one_file(way.open(folder.file("a"))), kPage, 2, verifier.place());
        verifier.begin(tier, 0, {{0, 10, 20}});
        CHECK(tier.load_wait().ok);
        CHECK_EQUAL(verifier.wrong(), "");
        std::this_thread::sleep_for(std::chrono::milliseconds(20)); // file systems keep time in ticks
        write_pattern(folder.file("a"), 0, 8 * kPage);              // of the same size, even with the same bytes
        verifier.begin(tier, 1, {{0, 10, 20}});
        const DiskTier::Landed landed = tier.load_wait();
        CHECK(!landed.ok);
        CHECK(landed.why.find("changed") != std::string::npos);
    }
}

TEST(a_read_into_its_place_with_a_checksum) {
    for (const Way & way : ways()) {
        TemporaryFolder folder(way.parent);
        write_pattern(folder.file("a"), 0, 8 * kPage);
        uint8_t * const to    = platform::new_buffer(2 * kPage, kPage);
        platform::File  plain = way.open(folder.file("a"));
        pye::read_now(plain, kPage, 2 * kPage, to);
        platform::close_file(plain);
        const uint64_t sum = pye::checksum(to, 2 * kPage);
        memset(to, 0, 2 * kPage);
        const uint8_t * placed = nullptr;
        DiskTier        tier(one_file(way.open(folder.file("a"))), 2 * kPage, 1,
                             [&](uint64_t, uint32_t, const uint8_t * bytes) { placed = bytes; });
        tier.load_begin(0, {{{0, kPage, 2 * kPage}, to, true, sum}});
        CHECK(tier.load_wait().ok);
        CHECK(placed == to);
        CHECK_EQUAL(pye::checksum(to, 2 * kPage), sum);
        CHECK_EQUAL(tier.counters().reads.load(), 1u);
        CHECK(tier.counters().active_ns.load() > 0);
        placed = nullptr;
        tier.load_begin(1, {{{0, kPage, 2 * kPage}, to, true, sum ^ 1}});
        const DiskTier::Landed landed = tier.load_wait();
        CHECK(!landed.ok);
        CHECK(landed.why.find("checksum") != std::string::npos);
        CHECK(placed == nullptr);
        platform::free_buffer(to);
    }
}

TEST(what_the_system_says_about_a_failed_read_is_passed_on) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, kPage);
    platform::File unreadable = open_buffered(folder.file("a"));
    close(unreadable.fd);
    unreadable.fd = open(folder.file("a").c_str(), O_WRONLY | O_CLOEXEC);
    Verifier verifier;
    DiskTier tier(one_file(unreadable), kPage, 1, verifier.place());
    verifier.begin(tier, 9, {{0, 17, 5}});
    const DiskTier::Landed landed = tier.load_wait();
    CHECK(!landed.ok);
    CHECK_EQUAL(landed.tag, 9u);
    CHECK_EQUAL(landed.why, "reading " + folder.file("a") + " at byte 17: Bad file descriptor");
    CHECK_EQUAL(verifier.n_arrived(), 0u);
    uint8_t byte;
    CHECK_EQUAL(CAUGHT(pye::Error, tier.read({0, 17, 5}, 0, 1, &byte)).code(), PYE_E_FILE);
}

TEST(injected_errors_hit_exactly_their_loads) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, 4 * kPage);
    Verifier verifier;
    DiskTier tier(one_file(platform::open_file(folder.file("a"))), kPage, 3, verifier.place());
    uint64_t next = 0;
    // The tags that fail among `n` loads of two pieces each.
    const auto failing = [&](int n) {
        std::set<uint64_t> failed;
        const uint64_t     first = next;
        for (int i = 0; i < n; ++i, ++next) {
            verifier.begin(tier, next, {{0, next, kPage}, {0, 2 * next, 3}});
        }
        for (int i = 0; i < n; ++i) {
            const DiskTier::Landed landed = tier.load_wait();
            if (!landed.ok) {
                failed.insert(landed.tag - first);
                CHECK(contains(landed.why, "injected"));
                CHECK(contains(landed.why, folder.file("a")));
            }
            CHECK_EQUAL(verifier.arrived(landed.tag), landed.ok ? 2u : 0u);
        }
        return failed;
    };
    CHECK(failing(3).empty());
    tier.inject_errors(2, 3);
    CHECK(failing(10) == (std::set<uint64_t>{2, 3, 4}));
    CHECK(failing(3).empty());
    tier.inject_errors(0, 1);
    CHECK(failing(3) == std::set<uint64_t>{0});
    tier.inject_errors(5, 2);
    CHECK(failing(3).empty());
    CHECK(failing(5) == (std::set<uint64_t>{2, 3}));
    tier.inject_errors(1, 100);
    CHECK(failing(3) == (std::set<uint64_t>{1, 2}));
    tier.inject_errors(0, 0); // off
    CHECK(failing(5).empty());
    CHECK_EQUAL(verifier.wrong(), "");
}

TEST(a_place_that_throws_fails_its_load_only) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, 4 * kPage);
    DiskTier tier(one_file(platform::open_file(folder.file("a"))), kPage, 2,
                  [](uint64_t tag, uint32_t, const uint8_t *) {
                      if (tag == 1) {
                          throw std::runtime_error("no room");
                      }
                  });
    for (uint64_t tag = 0; tag < 4; ++tag) {
        tier.load_begin(tag, {{0, tag, 100}, {0, tag, 1}});
    }
    for (int i = 0; i < 4; ++i) {
        const DiskTier::Landed landed = tier.load_wait();
        CHECK_EQUAL(landed.ok, landed.tag != 1);
        CHECK_EQUAL(contains(landed.why, "no room"), landed.tag == 1);
    }
}

TEST(a_tier_that_did_nothing_ends) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, kPage);
    const platform::File file = platform::open_file(folder.file("a"));
    {
        DiskTier tier(one_file(file), kPage, 4, [](uint64_t, uint32_t, const uint8_t *) {});
        CHECK(fcntl(file.fd, F_GETFD) >= 0);
    }
    CHECK_EQUAL(fcntl(file.fd, F_GETFD), -1); // the tier owned the file
}

TEST(ending_finishes_what_runs_and_drops_what_waits) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, 4 * kPage);
    constexpr uint32_t n_thread = 2, n_load = 50, n_piece = 3;
    size_t             fewest = SIZE_MAX;
    for (int round = 0; round < 10; ++round) {
        Gate                gate;
        std::atomic<size_t> finished{0};
        auto tier = std::make_unique<DiskTier>(one_file(platform::open_file(folder.file("a"))), kPage, n_thread,
                                               [&](uint64_t, uint32_t, const uint8_t *) {
                                                   gate.wait_inside();
                                                   ++finished;
                                               });
        for (uint64_t tag = 0; tag < n_load; ++tag) { // one load is half under way, others wait whole
            tier->load_begin(tag, {{0, tag, 100}, {0, tag + 1, kPage}, {0, tag + 2, 1}});
        }
        gate.await(n_thread);
        std::thread ending([&] { tier.reset(); });
        // The end must wait for what runs: open the gate only when it had every chance not to.
        std::this_thread::sleep_for(std::chrono::milliseconds(3 * round));
        CHECK_EQUAL(finished.load(), 0u);
        gate.open();
        ending.join();
        CHECK_EQUAL(finished.load(), gate.inside()); // whoever was inside has finished
        CHECK(finished.load() >= n_thread);
        fewest = std::min(fewest, finished.load());
    }
    // A thread that came out before the end was asked for went on; not so every time.
    CHECK(fewest < n_load * n_piece);
}

TEST(ending_with_loads_that_nobody_took) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, 4 * kPage);
    std::atomic<int> placed{0};
    {
        DiskTier tier(one_file(platform::open_file(folder.file("a"))), kPage, 2,
                      [&](uint64_t, uint32_t, const uint8_t *) { ++placed; });
        for (uint64_t tag = 0; tag < 20; ++tag) {
            tier.load_begin(tag, {{0, tag, 100}, {0, 10 * kPage, 1}});
        }
        (void)tier.load_wait();
    }
    CHECK(placed.load() >= 1);
    // Nothing ever started: all of it waits.
    DiskTier idle(one_file(platform::open_file(folder.file("a"))), kPage, 0,
                  [](uint64_t, uint32_t, const uint8_t *) {});
    idle.load_begin(1, {{0, 0, 1}, {0, 1, 1}, {0, 2, 1}});
    idle.load_begin(2, {{0, 0, 1}});
}

TEST(the_page_cache_stays_clean) {
    for (const Way & way : ways()) {
        if (way.parent != ".") {
            continue; // such files are nowhere but in the cache
        }
        TemporaryFolder   folder;
        const std::string path = folder.file("a");
        const uint64_t    size = 64 * kPage + 99;
        write_pattern(path, 0, size);
        drop_from_cache(path);
        if (cached_pages(path) != 0) {
            check::note("this file system does not drop pages when asked");
            continue;
        }
        Verifier verifier;
        DiskTier tier(one_file(way.open(path)), 8 * kPage, 4, verifier.place());
        for (uint64_t tag = 0; tag < 40; ++tag) {
            verifier.begin(tier, tag, {{0, tag * 2000 + 17, 3 * kPage + tag}, {0, tag * 1500 + 1, 200}});
        }
        verifier.begin(tier, 40, {{0, size - 50, 50}});
        for (int i = 0; i <= 40; ++i) {
            CHECK(tier.load_wait().ok);
        }
        CHECK_EQUAL(verifier.wrong(), "");
        CHECK_EQUAL(cached_pages(path), 0u);
    }
}

TEST(signals_are_blocked_in_io_threads) {
    sigset_t mine_before, mine_after;
    pthread_sigmask(SIG_SETMASK, nullptr, &mine_before);
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, kPage);
    std::mutex       mutex;
    std::vector<int> open_signals;
    size_t           n_place = 0;
    DiskTier tier(one_file(platform::open_file(folder.file("a"))), kPage, 3, [&](uint64_t, uint32_t, const uint8_t *) {
        sigset_t blocked;
        pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
        std::lock_guard<std::mutex> lock(mutex);
        ++n_place;
        for (int s = 1; s < SIGRTMAX; ++s) {
            // Two cannot be blocked; those between the classic and the real-time ones belong to the C library.
            if (s != SIGKILL && s != SIGSTOP && (s < 32 || s >= SIGRTMIN) && sigismember(&blocked, s) != 1) {
                open_signals.push_back(s);
            }
        }
    });
    for (uint64_t tag = 0; tag < 30; ++tag) {
        tier.load_begin(tag, {{0, tag, 1}});
    }
    for (int i = 0; i < 30; ++i) {
        CHECK(tier.load_wait().ok);
    }
    CHECK_EQUAL(n_place, 30u);
    CHECK(open_signals.empty());
    pthread_sigmask(SIG_SETMASK, nullptr, &mine_after); // the thread that made the tier keeps its own
    for (int s = 1; s < SIGRTMAX; ++s) {
        CHECK_EQUAL(sigismember(&mine_after, s), sigismember(&mine_before, s));
    }
}

// ---- queues

namespace {

// One thread that is held at the gate by the load `tag` 0, and the order in which the others arrive.
struct Queue {
    TemporaryFolder       folder{"."};
    Gate                  gate;
    std::mutex            mutex;
    std::vector<uint64_t> order; // tags, one for each piece
    DiskTier              tier;

    explicit Queue(uint32_t n_thread = 1)
        : tier(one_file(platform::open_file(made())), 4 * kPage, n_thread,
               [this](uint64_t tag, uint32_t, const uint8_t *) {
                   if (tag == 0) {
                       gate.wait_inside();
                   }
                   std::lock_guard<std::mutex> lock(mutex);
                   order.push_back(tag);
               }) {
        tier.load_begin(0, {{{0, 0, kPage}}});
        gate.await(1);
    }

    std::string made() {
        write_pattern(folder.file("a"), 0, 64 * kPage);
        return folder.file("a");
    }

    void begin(uint64_t tag, uint32_t n_piece, Urgency urgency) {
        std::vector<Read> pieces;
        for (uint32_t i = 0; i < n_piece; ++i) {
            pieces.push_back({{0, (tag * 4 + i) * kPage, kPage}});
        }
        tier.load_begin(tag, pieces, urgency);
    }

    // Lets the thread go and takes `n` loads: their tags, in the order in which they landed.
    std::vector<DiskTier::Landed> finish(size_t n) {
        gate.open();
        std::vector<DiskTier::Landed> landed;
        while (landed.size() < n) {
            landed.push_back(tier.load_wait());
        }
        return landed;
    }
};

std::vector<uint64_t> tags(const std::vector<DiskTier::Landed> & landed) {
    std::vector<uint64_t> t;
    for (const DiskTier::Landed & l : landed) {
        t.push_back(l.tag);
    }
    return t;
}

} // namespace

TEST(a_demand_load_goes_before_every_prefetch) {
    Queue q;
    q.begin(1, 2, Urgency::Prefetch);
    q.begin(2, 1, Urgency::Prefetch);
    q.begin(3, 2, Urgency::Demand);
    CHECK(tags(q.finish(4)) == (std::vector<uint64_t>{0, 3, 1, 2}));
    CHECK(q.order == (std::vector<uint64_t>{0, 3, 3, 1, 1, 2}));
}

TEST(a_promoted_prefetch_is_a_demand_load) {
    Queue q;
    q.begin(1, 2, Urgency::Prefetch);
    q.begin(2, 3, Urgency::Prefetch);
    CHECK_EQUAL(q.tier.unread(2), 1.0f);
    q.tier.promote(2);
    CHECK_EQUAL(q.tier.unread(2), 1.0f);
    q.tier.promote(77); // nobody's
    CHECK(tags(q.finish(3)) == (std::vector<uint64_t>{0, 2, 1}));
}

TEST(a_cancelled_load_lands_without_being_read) {
    Queue q;
    q.begin(1, 3, Urgency::Prefetch);
    q.begin(2, 1, Urgency::Prefetch);
    q.tier.cancel(1);
    q.tier.cancel(77); // nobody's
    DiskTier::Landed landed;
    CHECK(q.tier.load_poll(&landed)); // at once: no piece was being read
    CHECK_EQUAL(landed.tag, 1u);
    CHECK(landed.cancelled);
    CHECK(!landed.ok);
    q.begin(1, 1, Urgency::Prefetch); // the tag is free again
    const auto rest = q.finish(3);
    CHECK(tags(rest) == (std::vector<uint64_t>{0, 2, 1}));
    CHECK(rest[2].ok && !rest[2].cancelled);
    CHECK_EQUAL(q.tier.counters().reads.load(), 3u);
}

TEST(a_load_that_is_cancelled_while_its_last_piece_is_read_lands_whole) {
    Queue q;
    q.tier.cancel(0);
    const auto landed = q.finish(1);
    CHECK(landed[0].ok);
    CHECK(!landed[0].cancelled);
}

TEST(prefetches_leave_a_thread_for_demand_loads) {
    TemporaryFolder folder(".");
    write_pattern(folder.file("a"), 0, 64 * kPage);
    Gate                  gate;
    std::atomic<uint32_t> n_prefetching{0};
    DiskTier              tier(one_file(platform::open_file(folder.file("a"))), kPage, 3,
                               [&](uint64_t tag, uint32_t, const uint8_t *) {
                      if (tag < 10) {
                          ++n_prefetching;
                          gate.wait_inside();
                      }
                               });
    for (uint64_t tag = 0; tag < 5; ++tag) {
        tier.load_begin(tag, {{{0, tag * kPage, kPage}}}, Urgency::Prefetch);
    }
    gate.await(2);
    tier.load_begin(10, {{{0, 20 * kPage, kPage}}}); // lands though every prefetch hangs
    CHECK_EQUAL(tier.load_wait().tag, 10u);
    CHECK_EQUAL(n_prefetching.load(), 2u);
    gate.open();
    for (int i = 0; i < 5; ++i) {
        CHECK(tier.load_wait().ok);
    }
}

TEST(fills_come_after_everything_and_land_apart) {
    Queue q;
    q.begin(1, 2, Urgency::Fill);
    q.begin(2, 2, Urgency::Prefetch);
    q.begin(3, 1, Urgency::Demand);
    CHECK(tags(q.finish(3)) == (std::vector<uint64_t>{0, 3, 2}));
    DiskTier::Landed landed;
    q.tier.fill_wait();
    CHECK_EQUAL(q.tier.n_fill(), 1u); // until it is taken
    CHECK(q.tier.fill_poll(&landed));
    CHECK_EQUAL(q.tier.n_fill(), 0u);
    CHECK_EQUAL(landed.tag, 1u);
    CHECK(landed.ok);
    CHECK(q.order == (std::vector<uint64_t>{0, 3, 2, 2, 1, 1}));
    CHECK(!q.tier.fill_poll(&landed));
    q.tier.fill_wait(); // none is under way
    CHECK(!q.tier.load_poll(&landed));
}

TEST(cancelled_fills_land_unread) {
    Queue q;
    for (uint64_t tag = 1; tag < 4; ++tag) {
        q.begin(tag, 2, Urgency::Fill);
    }
    q.tier.cancel_fills();
    DiskTier::Landed landed;
    for (uint64_t tag = 1; tag < 4; ++tag) {
        CHECK(q.tier.fill_poll(&landed));
        CHECK(landed.cancelled && !landed.ok);
        CHECK_EQUAL(landed.tag, tag);
    }
    CHECK(!q.tier.fill_poll(&landed));
    CHECK(q.finish(1)[0].ok);
    CHECK_EQUAL(q.tier.counters().reads.load(), 1u);
}

TEST(one_fill_of_several_is_ended) {
    Queue q;
    q.begin(1, 2, Urgency::Fill);
    q.begin(2, 2, Urgency::Fill);
    q.tier.end_fill(1);
    q.tier.end_fill(77); // nobody's
    DiskTier::Landed landed;
    CHECK(q.tier.fill_poll(&landed)); // at once, though something else is being read
    CHECK_EQUAL(landed.tag, 1u);
    CHECK(landed.cancelled && !landed.ok);
    CHECK(!q.tier.fill_poll(&landed));
    q.begin(1, 1, Urgency::Fill); // the tag is free again
    CHECK(q.finish(1)[0].ok);
    for (const uint64_t tag : {2u, 1u}) {
        q.tier.end_fill(tag + 2); // nobody's
        while (!q.tier.fill_poll(&landed)) {
            q.tier.fill_wait();
        }
        CHECK_EQUAL(landed.tag, tag);
        CHECK(landed.ok);
    }
    CHECK_EQUAL(q.tier.counters().reads.load(), 4u);
}

TEST(a_fill_is_ended_once_what_is_being_read_of_it_has_been) {
    for (const uint32_t n_piece : {1u, 3u}) {
        TemporaryFolder folder(".");
        write_pattern(folder.file("a"), 0, 8 * kPage);
        Gate              gate;
        DiskTier          tier(one_file(platform::open_file(folder.file("a"))), kPage, 1,
                               [&](uint64_t, uint32_t, const uint8_t *) { gate.wait_inside(); });
        std::vector<Read> pieces(n_piece, Read{{0, 0, kPage}});
        tier.load_begin(1, pieces, Urgency::Fill);
        gate.await(1);
        std::thread opener([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            gate.open();
        });
        tier.end_fill(1);
        opener.join();
        DiskTier::Landed landed;
        CHECK(tier.fill_poll(&landed));
        CHECK_EQUAL(landed.ok, n_piece == 1); // nothing was left to drop
        CHECK_EQUAL(landed.cancelled, n_piece > 1);
        CHECK_EQUAL(tier.counters().reads.load(), 1u);
    }
}

TEST(a_load_in_pieces_is_checked_as_a_whole) {
    for (const bool damaged : {false, true}) {
        TemporaryFolder folder(".");
        write_pattern(folder.file("a"), 0, 8 * kPage);
        DiskTier          tier(one_file(platform::open_file(folder.file("a"))), kPage, 3,
                               [](uint64_t, uint32_t, const uint8_t *) {});
        uint8_t *         slot = platform::new_buffer(4 * kPage, kPage);
        std::vector<Read> pieces(4);
        for (uint32_t i = 0; i < 4; ++i) {
            pieces[i].segment = {0, (2 + i) * kPage, kPage};
            pieces[i].into    = slot + i * kPage;
        }
        std::vector<uint8_t> right(4 * kPage);
        tier.read({0, 2 * kPage, 4 * kPage}, 0, right.size(), right.data());
        pye::Whole whole{
            slot, right.size(), pye::checksum(right.data(), right.size()) + damaged, {0, 2 * kPage, 4 * kPage}};
        tier.load_begin(1, pieces, Urgency::Prefetch, whole);
        const DiskTier::Landed landed = tier.load_wait();
        CHECK_EQUAL(landed.ok, !damaged);
        CHECK_EQUAL(contains(landed.why, "checksum"), damaged);
        CHECK(memcmp(slot, right.data(), right.size()) == 0);
        platform::free_buffer(slot);
    }
}

TEST(two_loads_of_one_tag_at_a_time_are_refused) {
    Queue q;
    (void)CAUGHT(std::logic_error, q.begin(0, 1, Urgency::Prefetch));
    CHECK_EQUAL(q.finish(1)[0].tag, 0u);
}

TEST(what_is_still_queued_at_the_end_is_dropped) {
    Queue q(2);
    for (uint64_t tag = 1; tag < 9; ++tag) {
        q.begin(tag, 2, tag % 2 == 0 ? Urgency::Prefetch : Urgency::Demand);
    }
    q.tier.cancel(4);
    q.gate.open();
}
