// Hundreds of random loads from several files, with faults between them, while another thread reads synchronously.
#include "check.h"
#include "disk_tier.h"
#include "disk_tier_fixture.h"

#include <atomic>
#include <random>
#include <set>
#include <thread>

using pye::DiskTier;
using pye::Segment;

namespace {

constexpr uint64_t kPage          = pye::platform::kPage;
constexpr uint32_t kFiles         = 4;
constexpr uint64_t kMost          = 3 * kPage; // size of a segment
constexpr uint64_t kSizes[kFiles] = {60 * kPage, 40 * kPage + 1, 50 * kPage - 1, kMost + 12345};

Segment random_segment(std::mt19937_64 & random) {
    const auto     file = static_cast<uint32_t>(random() % kFiles);
    const uint64_t size = random() % 4 == 0 ? 1 + random() % 16 : 1 + random() % kMost;
    const uint64_t last = kSizes[file] - size;
    // Often at the very end, where files are not a multiple of anything.
    return {file, random() % 8 == 0 ? last : random() % (last + 1), size};
}

void stress(const Way & way, uint32_t n_thread, uint64_t seed) {
    TemporaryFolder                  folder(way.parent);
    std::vector<pye::platform::File> files;
    for (uint32_t f = 0; f < kFiles; ++f) {
        write_pattern(folder.file(std::to_string(f)), f, kSizes[f]);
        files.push_back(way.open(folder.file(std::to_string(f))));
    }
    std::mt19937_64 random(seed);
    Verifier        verifier;
    DiskTier        tier(std::move(files), kMost, n_thread, verifier.place());

    std::atomic<bool> stop{false}, read_wrong{false};
    std::thread       reader([&] {
        std::mt19937_64      own(seed + 1);
        std::vector<uint8_t> bytes(kMost);
        while (!stop) {
            const Segment  s    = random_segment(own);
            const uint64_t from = own() % s.size;
            tier.read(s, from, s.size - from, bytes.data());
            read_wrong = read_wrong || !is_pattern(bytes.data(), s.file, s.offset + from, s.size - from);
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    });

    constexpr uint64_t         n_load = 300;
    std::map<uint64_t, size_t> pieces;  // of loads that should succeed
    std::set<uint64_t>         to_fail; // loads that should not
    uint64_t                   begun = 0, landed = 0, poison_from = 0, poison_to = 0;
    std::string                problem;
    const auto                 take = [&](const DiskTier::Landed & l) {
        ++landed;
        if (l.ok != (to_fail.count(l.tag) == 0)) {
            problem = "load " + std::to_string(l.tag) + " should have gone the other way: " + l.why;
        }
        if (l.ok && verifier.arrived(l.tag) != pieces[l.tag]) {
            problem = "load " + std::to_string(l.tag) + " landed before its pieces";
        }
    };
    while (landed < n_load && problem.empty()) {
        const uint64_t in_flight = begun - landed;
        if (begun < n_load && in_flight < 40 && (in_flight == 0 || random() % 3 != 0)) {
            if (begun >= poison_to && random() % 20 == 0) {
                poison_from = begun + random() % 5;
                poison_to   = poison_from + 1 + random() % 3;
                tier.inject_errors(poison_from - begun, poison_to - poison_from);
            }
            std::vector<Segment> segments;
            for (uint64_t n = 1 + random() % 3; n > 0; --n) {
                segments.push_back(random_segment(random));
            }
            bool fails = begun >= poison_from && begun < poison_to;
            if (random() % 25 == 0) { // one byte past the end
                Segment & s = segments[random() % segments.size()];
                s.offset    = kSizes[s.file] - s.size + 1;
                fails       = true;
            }
            if (fails) {
                to_fail.insert(begun);
            } else {
                pieces[begun] = segments.size();
            }
            verifier.begin(tier, begun++, segments);
        } else if (random() % 2 == 0) {
            take(tier.load_wait());
        } else {
            DiskTier::Landed l;
            if (tier.load_poll(&l)) {
                take(l);
            }
        }
    }
    stop = true;
    reader.join();
    CHECK_EQUAL(problem, "");
    CHECK_EQUAL(verifier.wrong(), "");
    CHECK(!read_wrong);
    CHECK(to_fail.size() > 10);
    CHECK(pieces.size() > 200);
}

} // namespace

TEST(random_loads) {
    uint64_t seed = 0;
    for (const Way & way : ways()) {
        for (const uint32_t n_thread : {1, 4}) {
            stress(way, n_thread, ++seed);
        }
    }
}

// Tiers that end at a random moment: nothing may hang, leak or be touched afterwards.
TEST(random_ends) {
    TemporaryFolder folder;
    write_pattern(folder.file("0"), 0, 32 * kPage);
    std::mt19937_64 random(7);
    for (int round = 0; round < 60; ++round) {
        Verifier                         verifier;
        std::vector<pye::platform::File> files = {pye::platform::open_file(folder.file("0"))};
        DiskTier                         tier(std::move(files), kMost, 1 + random() % 4, verifier.place());
        const uint64_t                   n_load = random() % 30;
        for (uint64_t tag = 0; tag < n_load; ++tag) {
            verifier.begin(tier, tag, {{0, random() % kMost, 1 + random() % kMost}, {0, random() % kPage, kPage}});
        }
        for (uint64_t n = n_load == 0 ? 0 : random() % n_load; n > 0; --n) {
            CHECK(tier.load_wait().ok);
        }
        CHECK_EQUAL(verifier.wrong(), "");
    }
}
