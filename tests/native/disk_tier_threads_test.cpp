// A system that allows few threads, or none: in containers their number is limited.
#include "check.h"
#include "disk_tier.h"
#include "disk_tier_fixture.h"
#include "error.h"

#include <atomic>
#include <dlfcn.h>
#include <pthread.h>

namespace {

std::atomic<int> g_threads_allowed{-1}; // -1: as many as the system says

} // namespace

// In the place of the C library's. The next definition in the order of libraries is the real one, or a sanitizer's.
extern "C" int pthread_create(pthread_t * thread, const pthread_attr_t * attributes, void * (*body)(void *),
                              void * argument) noexcept {
    if (g_threads_allowed == 0) {
        return EAGAIN;
    }
    if (g_threads_allowed > 0) {
        --g_threads_allowed;
    }
    using Create            = int (*)(pthread_t *, const pthread_attr_t *, void * (*)(void *), void *);
    static const auto other = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
    return other(thread, attributes, body, argument);
}

TEST(without_any_thread_the_tier_is_not_made) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, 100);
    const pye::platform::File file = pye::platform::open_file(folder.file("a"));
    g_threads_allowed              = 0;
    const auto       make          = [&] { pye::DiskTier({file}, 100, 4, [](uint64_t, uint32_t, const uint8_t *) {}); };
    const pye::Error e             = CAUGHT(pye::Error, make());
    g_threads_allowed              = -1;
    CHECK_EQUAL(e.code(), PYE_E_MEMORY);
    CHECK_EQUAL(fcntl(file.fd, F_GETFD), -1); // it had taken the file over
}

TEST(fewer_threads_than_wished_do_the_work) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, 5000);
    Verifier verifier;
    g_threads_allowed = 2;
    pye::DiskTier tier({pye::platform::open_file(folder.file("a"))}, 1000, 4, verifier.place());
    CHECK_EQUAL(g_threads_allowed.load(), 0);
    g_threads_allowed = -1;
    for (uint64_t tag = 0; tag < 20; ++tag) {
        verifier.begin(tier, tag, {{0, tag * 100, 1000}, {0, tag, 1}});
    }
    for (int i = 0; i < 20; ++i) {
        CHECK(tier.load_wait().ok);
    }
    CHECK_EQUAL(verifier.wrong(), "");
}
