// Damaged copies of a file, and a corpus of those that once showed a parser something new.
#pragma once

#include "check.h"
#include "files.h"

#include <algorithm>
#include <cstdlib>
#include <dirent.h>
#include <fstream>
#include <iterator>
#include <random>
#include <set>

class Damage {
  public:
    // Damage hits the first `size` bytes.
    Damage(std::vector<uint8_t> good, uint64_t size, uint32_t seed)
        : good_(std::move(good)), size_(size), random_(seed) {}

    std::vector<uint8_t> next() {
        std::vector<uint8_t> bytes = good_;
        for (uint32_t n = 1 + below(4); n > 0; --n) {
            const uint64_t at = below(size_);
            switch (below(8)) {
                case 0:
                case 1:
                case 2: bytes[at] ^= static_cast<uint8_t>(1u << below(8)); break;
                case 3: bytes[at] = static_cast<uint8_t>(random_()); break;
                case 4: set_number(bytes, at); break;
                case 5:
                    bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), 1 + below(9), uint8_t(below(256)));
                    break;
                case 6:
                    bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at),
                                bytes.begin() +
                                    static_cast<std::ptrdiff_t>(std::min<uint64_t>(at + 1 + below(9), bytes.size())));
                    break;
                default: copy_within(bytes, at); break;
            }
        }
        if (below(20) == 0) {
            bytes.resize(below(bytes.size() + 1));
        }
        return bytes;
    }

  private:
    uint64_t below(uint64_t n) { return random_() % n; }

    // A whole number where one may be: 32 or 64 bits, one of those at which arithmetic goes wrong.
    void set_number(std::vector<uint8_t> & bytes, uint64_t at) {
        const uint64_t odd[] = {0,
                                1,
                                2,
                                31,
                                64,
                                1024,
                                1025,
                                65536,
                                INT32_MAX,
                                uint64_t(INT32_MAX) + 1,
                                UINT32_MAX,
                                uint64_t(UINT32_MAX) + 1,
                                uint64_t(1) << 40,
                                INT64_MAX / 4,
                                INT64_MAX - 31,
                                uint64_t(1) << 63,
                                UINT64_MAX - 31,
                                UINT64_MAX};
        const uint64_t value = odd[below(std::size(odd))];
        const uint64_t size  = below(2) == 0 ? 4 : 8;
        if (at + size <= bytes.size()) {
            memcpy(bytes.data() + at, &value, size);
        }
    }

    // A piece of the file in another place: keys, names and types that are right, but not there.
    void copy_within(std::vector<uint8_t> & bytes, uint64_t to) {
        const uint64_t size = 1 + below(64), from = below(size_);
        if (to + size <= bytes.size() && from + size <= good_.size()) {
            memcpy(bytes.data() + to, good_.data() + from, size);
        }
    }

    std::vector<uint8_t> good_;
    uint64_t             size_;
    std::mt19937_64      random_;
};

#if defined(__SANITIZE_THREAD__)
inline constexpr uint32_t kSeeds = 2; // slow, and there is but one thread
#elif defined(__SANITIZE_ADDRESS__)
inline constexpr uint32_t kSeeds = 100; // about a minute: this is the one that sees most
#else
inline constexpr uint32_t kSeeds = 8;
#endif

// Seeds of damage to try; more by hand through the environment.
inline uint32_t n_seed() {
    const char * wished = getenv("PYENGINE_FUZZ_SEEDS");
    return wished == nullptr ? kSeeds : static_cast<uint32_t>(strtoul(wished, nullptr, 10));
}

// In memory if possible: thousands of files are written.
inline std::string quick_folder() { return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "."; }

// Inputs kept in tests/native/corpus/NAME: one for each thing a parser has said about a damaged file, numbers aside. A run by
// hand with PYENGINE_FUZZ_KEEP=1 adds those that are new. An input is its size (8 bytes) and those of its first
// `matters` bytes that come before nothing but zeros; the others are zeros when it is tried again.
class Corpus {
  public:
    explicit Corpus(const std::string & name) : folder_(std::string(PYENGINE_CORPUS) + "/" + name) {}

    std::vector<std::vector<uint8_t>> inputs() const {
        std::vector<std::string> names;
        DIR *                    dir = opendir(folder_.c_str());
        if (dir == nullptr) {
            throw check::Failed("no corpus in " + folder_);
        }
        while (const dirent * entry = readdir(dir)) {
            if (entry->d_name[0] != '.') {
                names.emplace_back(entry->d_name);
            }
        }
        closedir(dir);
        std::sort(names.begin(), names.end());
        std::vector<std::vector<uint8_t>> all;
        for (const std::string & n : names) {
            std::ifstream        in(folder_ + "/" + n, std::ios::binary);
            uint64_t             size = 0;
            std::vector<uint8_t> bytes;
            in.read(reinterpret_cast<char *>(&size), sizeof size);
            bytes.assign(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
            bytes.resize(size);
            all.push_back(std::move(bytes));
        }
        return all;
    }

    void said(const std::string & sentence, const std::vector<uint8_t> & input, size_t matters, bool from_corpus) {
        std::string kind;
        for (const char c :
             sentence.substr(std::min({sentence.find(".gguf"), sentence.find(".bundle"), sentence.size()}))) {
            if (static_cast<unsigned char>(c) < 128 && !isdigit(static_cast<unsigned char>(c))) {
                kind += c;
            }
        }
        const bool fresh = kinds_.insert(kind).second;
        if (fresh && !from_corpus && getenv("PYENGINE_FUZZ_KEEP") != nullptr) {
            std::ofstream  out(folder_ + "/" + std::to_string(1000 + kinds_.size()), std::ios::binary);
            const uint64_t size = input.size();
            size_t         end  = std::min(input.size(), matters);
            while (end > 0 && input[end - 1] == 0) {
                --end;
            }
            out.write(reinterpret_cast<const char *>(&size), sizeof size);
            out.write(reinterpret_cast<const char *>(input.data()), static_cast<std::streamsize>(end));
        }
    }

  private:
    std::string           folder_;
    std::set<std::string> kinds_;
};
