#include "platform.h"

#include "check.h"
#include "error.h"
#include "files.h"

#include <algorithm>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

namespace platform = pye::platform;

namespace {

constexpr size_t kPage = platform::kPage;

// What madvise(MADV_POPULATE_WRITE) is answered, 0 for the system's own answer.
int g_populate_answer = 0;
// The most bytes that one pread() gives, and how many are interrupted by a signal before they give any.
size_t g_pread_most = SIZE_MAX, g_interruptions = 0;

bool contains(const std::string & text, const std::string & part) { return text.find(part) != std::string::npos; }

// Whether the system can read this byte: unlike reading it ourselves, asking does not end the process.
bool readable(const void * address) {
    int ends[2];
    CHECK_EQUAL(pipe(ends), 0);
    const bool yes = write(ends[1], address, 1) == 1;
    close(ends[0]);
    close(ends[1]);
    return yes;
}

bool resident(char * address, size_t size) {
    std::vector<unsigned char> pages(size / kPage);
    CHECK_EQUAL(mincore(address, size, pages.data()), 0);
    for (const unsigned char p : pages) {
        if ((p & 1) == 0) {
            return false;
        }
    }
    return true;
}

class Memory {
  public:
    explicit Memory(size_t size) : size_(size), at_(static_cast<char *>(platform::reserve_memory(size))) {
        CHECK(at_ != nullptr);
    }
    ~Memory() { platform::unmap(at_, size_); }
    Memory(const Memory &)             = delete;
    Memory & operator=(const Memory &) = delete;
    char *   at(size_t offset = 0) { return at_ + offset; }

  private:
    size_t size_;
    char * at_;
};

} // namespace

// In the place of the C library's: plays a system older than Linux 5.14, or one that has no memory left.
extern "C" int madvise(void * address, size_t size, int advice) noexcept {
    constexpr int populate_write = 23;
    if (advice == populate_write && g_populate_answer != 0) {
        errno = g_populate_answer;
        return -1;
    }
    return static_cast<int>(syscall(SYS_madvise, address, size, advice));
}

// In the place of the C library's: a system may give less than it was asked for at any time.
extern "C" ssize_t pread(int fd, void * to, size_t size, off_t offset) {
    if (g_interruptions > 0) {
        --g_interruptions;
        errno = EINTR;
        return -1;
    }
    return syscall(SYS_pread64, fd, to, std::min(size, g_pread_most), offset);
}

TEST(reserved_addresses_have_no_memory) {
    const size_t size = size_t(1) << 36; // more than any test machine has
    void *       p    = platform::reserve_addresses(size);
    CHECK(p != nullptr);
    CHECK_EQUAL(reinterpret_cast<uintptr_t>(p) % kPage, 0u);
    CHECK(!readable(p));
    CHECK(!readable(static_cast<char *>(p) + size - 1));
    platform::unmap(p, size);
    CHECK(platform::reserve_addresses(SIZE_MAX / 2) == nullptr);
    CHECK(platform::reserve_memory(SIZE_MAX / 2) == nullptr);
    platform::unmap(nullptr, size); // nothing to do
}

TEST(memory_costs_nothing_until_populated_and_nothing_once_released) {
    constexpr size_t size = 32 * kPage;
    Memory           memory(size);
    CHECK(!resident(memory.at(), kPage));
    CHECK(platform::populate(memory.at(8 * kPage), 8 * kPage));
    CHECK(resident(memory.at(8 * kPage), 8 * kPage));
    memset(memory.at(), 'x', size);
    platform::release(memory.at(8 * kPage), 8 * kPage);
    for (size_t i = 0; i < size; ++i) {
        const bool released = i >= 8 * kPage && i < 16 * kPage;
        CHECK_EQUAL(int(*memory.at(i)), released ? 0 : 'x');
    }
}

TEST(populating_changes_no_byte) {
    constexpr size_t size = 8 * kPage;
    for (const int answer : {0, EINVAL}) {
        Memory memory(size);
        CHECK(!resident(memory.at(), kPage));
        // Pages that another thread has filled already are among those that come.
        memset(memory.at(3 * kPage), 0x5a, 2 * kPage);
        g_populate_answer    = answer;
        const bool populated = platform::populate(memory.at(), size);
        g_populate_answer    = 0;
        CHECK(populated);
        CHECK(resident(memory.at(), size));
        for (size_t i = 0; i < size; ++i) {
            CHECK_EQUAL(int(*memory.at(i)), i >= 3 * kPage && i < 5 * kPage ? 0x5a : 0);
        }
    }
}

TEST(populating_without_memory_says_so) {
    Memory memory(kPage);
    for (const int answer : {ENOMEM, EFAULT}) {
        g_populate_answer    = answer;
        const bool populated = platform::populate(memory.at(), kPage);
        g_populate_answer    = 0;
        CHECK(!populated);
        CHECK(!resident(memory.at(), kPage));
    }
}

TEST(a_forked_child_does_not_get_the_memory) {
    Memory memory(kPage);
    memset(memory.at(), 'x', kPage);
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int ends[2];
        _exit(pipe(ends) == 0 && write(ends[1], memory.at(), 1) == -1 && errno == EFAULT ? 0 : 1);
    }
    int status = -1;
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQUAL(WEXITSTATUS(status), 0);
    CHECK(readable(memory.at()));
}

TEST(files_that_cannot_be_opened) {
    TemporaryFolder  folder;
    const pye::Error missing = CAUGHT(pye::Error, platform::open_file(folder.file("missing")));
    CHECK_EQUAL(missing.code(), PYE_E_FILE);
    CHECK(contains(missing.what(), folder.file("missing")));
    CHECK(contains(missing.what(), "No such file"));
    for (const std::string & path : {folder.file(""), std::string("/dev/zero")}) {
        const pye::Error e = CAUGHT(pye::Error, platform::open_file(path));
        CHECK_EQUAL(e.code(), PYE_E_FILE);
        CHECK(contains(e.what(), "not a regular file"));
    }
}

TEST(refused_files_leave_no_descriptor_open) {
    TemporaryFolder folder;
    const int       before = dup(0);
    close(before);
    for (int i = 0; i < 10; ++i) {
        CAUGHT(pye::Error, platform::open_file(folder.file("missing")));
        CAUGHT(pye::Error, platform::open_file(folder.file("")));
        CAUGHT(pye::Error, platform::open_file("/dev/zero"));
    }
    const int after = dup(0);
    close(after);
    CHECK_EQUAL(after, before); // the lowest free number
}

TEST(a_file_is_described_and_closed) {
    TemporaryFolder folder;
    for (const uint64_t size : {uint64_t(0), uint64_t(1), uint64_t(kPage), uint64_t(10 * kPage + 17)}) {
        write_pattern(folder.file("a"), 0, size);
        platform::File file = platform::open_file(folder.file("a"));
        CHECK_EQUAL(file.size, size);
        CHECK_EQUAL(file.path, folder.file("a"));
        CHECK(file.align >= 1);
        CHECK_EQUAL(file.align & (file.align - 1), 0u);
        CHECK(fcntl(file.fd, F_GETFD) & FD_CLOEXEC); // not for programs that we start
        const int fd = file.fd;
        platform::close_file(file);
        CHECK_EQUAL(file.fd, -1);
        CHECK_EQUAL(fcntl(fd, F_GETFD), -1);
        platform::close_file(file); // once is enough, twice is harmless
    }
}

TEST(read_at_is_short_only_at_the_end) {
    TemporaryFolder folder;
    const uint64_t  size = 3 * kPage + 100;
    write_pattern(folder.file("a"), 0, size);
    for (const bool buffered : {false, true}) {
        platform::File file = buffered ? open_buffered(folder.file("a")) : platform::open_file(folder.file("a"));
        alignas(kPage) static uint8_t bytes[8 * kPage];
        CHECK_EQUAL(platform::read_at(file, bytes, 2 * kPage, kPage), int64_t(2 * kPage));
        CHECK(is_pattern(bytes, 0, kPage, 2 * kPage));
        CHECK_EQUAL(platform::read_at(file, bytes, 8 * kPage, 0), int64_t(size));
        CHECK(is_pattern(bytes, 0, 0, size));
        CHECK_EQUAL(platform::read_at(file, bytes, kPage, 3 * kPage), 100);
        CHECK_EQUAL(platform::read_at(file, bytes, kPage, 4 * kPage), 0);
        CHECK_EQUAL(platform::read_at(file, bytes, kPage, 400 * kPage), 0);
        CHECK_EQUAL(platform::read_at(file, bytes, 0, 0), 0);
        platform::close_file(file);
        CHECK_EQUAL(platform::read_at(file, bytes, kPage, 0), -EBADF);
    }
}

TEST(read_at_goes_on_after_a_part_and_after_a_signal) {
    TemporaryFolder folder;
    write_pattern(folder.file("a"), 0, 3 * kPage + 100);
    for (const bool buffered : {false, true}) {
        platform::File file = buffered ? open_buffered(folder.file("a")) : platform::open_file(folder.file("a"));
        alignas(kPage) static uint8_t bytes[4 * kPage];
        memset(bytes, 0, sizeof bytes);
        g_pread_most      = buffered ? 100 : kPage;
        g_interruptions   = 3;
        const int64_t got = platform::read_at(file, bytes, 4 * kPage, 0);
        g_pread_most      = SIZE_MAX;
        CHECK_EQUAL(got, int64_t(3 * kPage + 100));
        CHECK_EQUAL(g_interruptions, 0u);
        CHECK(is_pattern(bytes, 0, 0, 3 * kPage + 100));
        platform::close_file(file);
    }
}

TEST(errors_have_the_systems_names) {
    CHECK_EQUAL(platform::error_text(ENOENT), "No such file or directory");
    CHECK(!platform::error_text(123456).empty());
}

TEST(a_child_is_another_process) {
    const int64_t mine = platform::process_id();
    CHECK_EQUAL(mine, int64_t(getpid()));
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        _exit(platform::process_id() == mine);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK_EQUAL(WEXITSTATUS(status), 0);
}
