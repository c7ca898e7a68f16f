#include "platform.h"

#include "error.h"

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 // Linux 5.14; older headers lack the name, older kernels answer EINVAL
#endif

namespace pye::platform {

void * reserve_addresses(size_t size) {
    void * p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

void * reserve_memory(size_t size) {
    void * p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        return nullptr;
    }
    madvise(p, size, MADV_HUGEPAGE); // a wish: refused without harm where huge pages are off
    madvise(p, size, MADV_DONTFORK); // a forked child must not double the residency by copy-on-write
    madvise(p, size, MADV_DONTDUMP);
    return p;
}

namespace {

// kPage is the smallest page there is; some aarch64 kernels only deal in larger ones.
uint64_t system_page() {
    static const auto size = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    return size;
}
uint64_t page_down(uint64_t at) { return at / system_page() * system_page(); }
uint64_t page_up(uint64_t at) { return page_down(at + system_page() - 1); }
char *   page_down(void * at) { return reinterpret_cast<char *>(page_down(reinterpret_cast<uintptr_t>(at))); }
char *   page_up(void * at) { return reinterpret_cast<char *>(page_up(reinterpret_cast<uintptr_t>(at))); }

} // namespace

bool populate(void * address, size_t size) {
    char * const begin = page_down(address);
    char * const end   = page_up(static_cast<char *>(address) + size);
    if (madvise(begin, static_cast<size_t>(end - begin), MADV_POPULATE_WRITE) == 0) {
        return true;
    }
    if (errno == ENOMEM || errno == EFAULT || errno == EHWPOISON) {
        return false;
    }
    // Another thread may be filling the range already: touch each page without changing what it holds.
    for (char * at = begin; at < end; at += kPage) {
        __atomic_fetch_or(at, char(0), __ATOMIC_RELAXED);
    }
    return true;
}

void release(void * address, size_t size) {
    char * const begin = page_up(address); // whole pages only: the neighbours share the rest
    char * const end   = page_down(static_cast<char *>(address) + size);
    if (begin < end) {
        madvise(begin, static_cast<size_t>(end - begin), MADV_DONTNEED);
    }
}

void unmap(void * address, size_t size) {
    if (address != nullptr) {
        munmap(address, size);
    }
}

namespace {

// O_DIRECT may be accepted by open() and refused by read(), or want a coarser alignment than a page: try one read.
bool direct_reads_work(int fd, size_t align) {
    void * block = nullptr;
    if (posix_memalign(&block, align, align) != 0) {
        return false;
    }
    const ssize_t n = pread(fd, block, align, 0);
    free(block);
    return n >= 0;
}

size_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
    struct statx st{};
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) == 0 && (st.stx_mask & STATX_DIOALIGN) != 0 &&
        st.stx_dio_offset_align != 0) {
        return st.stx_dio_offset_align > st.stx_dio_mem_align ? st.stx_dio_offset_align : st.stx_dio_mem_align;
    }
#else
    (void)fd;
#endif
    return kPage;
}

int64_t mtime_ns(const struct stat & st) {
    return static_cast<int64_t>(st.st_mtim.tv_sec) * 1000000000 + st.st_mtim.tv_nsec;
}

} // namespace

File open_file(const std::string & path) {
    File file;
    file.path = path;
    file.fd   = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (file.fd >= 0) {
        file.align  = direct_alignment(file.fd);
        file.direct = direct_reads_work(file.fd, file.align);
    }
    if (!file.direct) {
        if (file.fd >= 0) {
            close(file.fd);
        }
        file.fd    = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        file.align = 1;
        if (file.fd < 0) {
            throw Error(PYE_E_FILE, "cannot open " + path + ": " + error_text(errno));
        }
        posix_fadvise(file.fd, 0, 0, POSIX_FADV_RANDOM); // an expert is read once: read-ahead only evicts
    }
    struct stat st{};
    if (fstat(file.fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        close_file(file);
        throw Error(PYE_E_FILE, path + " is not a regular file");
    }
    file.size  = static_cast<uint64_t>(st.st_size);
    file.mtime = mtime_ns(st);
    return file;
}

bool changed(const File & file) {
    struct stat st{};
    return fstat(file.fd, &st) != 0 || static_cast<uint64_t>(st.st_size) != file.size || mtime_ns(st) != file.mtime;
}

void close_file(File & file) {
    if (file.fd >= 0) {
        close(file.fd);
        file.fd = -1;
    }
}

int64_t read_at(const File & file, void * to, size_t size, uint64_t offset) {
    size_t done = 0;
    while (done < size) {
        const ssize_t n =
            pread(file.fd, static_cast<char *>(to) + done, size - done, static_cast<off_t>(offset + done));
        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        if (n == 0) {
            break;
        }
        done += static_cast<size_t>(n);
        if (file.direct && done % file.align != 0) {
            break; // a direct read ends unaligned only at the end of the file
        }
    }
    if (!file.direct) { // the kernel keeps a page of which only a part is named
        const uint64_t first = page_down(offset);
        posix_fadvise(file.fd, static_cast<off_t>(first), static_cast<off_t>(page_up(offset + size) - first),
                      POSIX_FADV_DONTNEED);
    }
    return static_cast<int64_t>(done);
}

uint8_t * new_buffer(size_t size, size_t align) {
    constexpr size_t kHugePage = size_t(2) << 20;
    const bool       large     = size >= kHugePage / 2; // a direct read into small pages is a long list of them: slower
    void *           p         = nullptr;
    if (posix_memalign(&p, large ? kHugePage : (align < kPage ? kPage : align), size) != 0) {
        return nullptr;
    }
    if (large) {
        madvise(p, size, MADV_HUGEPAGE);
    }
    return static_cast<uint8_t *>(p);
}

void free_buffer(uint8_t * buffer) { free(buffer); }

void block_signals_in_this_thread() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
}

void name_this_thread(const char * name) { pthread_setname_np(pthread_self(), name); }

int64_t process_id() { return getpid(); }

std::string error_text(int error) {
    char text[128] = {};
    return strerror_r(error, text, sizeof text); // GNU form: returns the text, thread-safe
}

} // namespace pye::platform
