// Files for tests of reading: in a folder of their own, with bytes that tell where they are from.
#pragma once

#include "check.h"
#include "platform.h"

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <ftw.h>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

// (Not <filesystem>: every program here would be half as long again to compile.)
inline uint64_t file_size(const std::string & path) {
    struct stat st{};
    if (stat(path.c_str(), &st) != 0) {
        throw check::Failed("no size of " + path + ": " + strerror(errno));
    }
    return static_cast<uint64_t>(st.st_size);
}

// A folder below `parent` that is gone with this object. The working folder is on a disk; where /tmp is, is anyone's guess.
class TemporaryFolder {
  public:
    explicit TemporaryFolder(const std::string & parent = ".") {
        path_ = parent + "/files-XXXXXX";
        if (mkdtemp(path_.data()) == nullptr) {
            throw check::Failed("cannot make a folder in " + parent + ": " + strerror(errno));
        }
    }
    ~TemporaryFolder() {
        nftw(
            path_.c_str(), [](const char * path, const struct stat *, int, FTW *) { return remove(path); }, 4,
            FTW_DEPTH | FTW_PHYS);
    }
    TemporaryFolder(const TemporaryFolder &)             = delete;
    TemporaryFolder & operator=(const TemporaryFolder &) = delete;

    std::string file(const std::string & name) const { return path_ + "/" + name; }

  private:
    std::string path_;
};

// Byte `at` of a pattern file: any two files, and any two places less than 2^32 bytes apart, soon differ.
inline uint8_t pattern(uint32_t file, uint64_t at) {
    const uint64_t word = (at / 8 + 1) * 0x9e3779b97f4a7c15u + file * 0xd1342543de82ef95u;
    return static_cast<uint8_t>((word ^ word >> 29) >> (at % 8 * 8));
}

inline bool is_pattern(const uint8_t * bytes, uint32_t file, uint64_t from, uint64_t size) {
    for (uint64_t i = 0; i < size; ++i) {
        if (bytes[i] != pattern(file, from + i)) {
            return false;
        }
    }
    return true;
}

inline void write_file(const std::string & path, const void * bytes, size_t size, bool to_disk) {
    const int fd   = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    size_t    done = 0;
    while (fd >= 0 && done < size) {
        const ssize_t n = write(fd, static_cast<const char *>(bytes) + done, size - done);
        if (n <= 0) {
            break;
        }
        done += static_cast<size_t>(n);
    }
    const bool written = fd >= 0 && done == size && (!to_disk || fsync(fd) == 0);
    if (fd >= 0) {
        close(fd);
    }
    if (!written) {
        throw check::Failed("cannot write " + path + ": " + strerror(errno));
    }
}

// On the disk when this returns, so that its pages are clean.
inline void write_pattern(const std::string & path, uint32_t file, uint64_t size) {
    std::vector<uint8_t> bytes(size);
    for (uint64_t i = 0; i < size; ++i) {
        bytes[i] = pattern(file, i);
    }
    write_file(path, bytes.data(), bytes.size(), true);
}

// As platform::open_file() gives it where direct reads are refused.
inline pye::platform::File open_buffered(const std::string & path) {
    pye::platform::File file;
    file.path  = path;
    file.fd    = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    file.align = 1;
    if (file.fd < 0) {
        throw check::Failed("cannot open " + path + ": " + strerror(errno));
    }
    posix_fadvise(file.fd, 0, 0, POSIX_FADV_RANDOM);
    struct stat st{};
    fstat(file.fd, &st);
    file.size  = static_cast<uint64_t>(st.st_size);
    file.mtime = static_cast<int64_t>(st.st_mtim.tv_sec) * 1000000000 + st.st_mtim.tv_nsec;
    return file;
}
