// What the tests of the disk tier share: where files are read from, and the place that verifies every byte.
#pragma once

#include "disk_tier.h"
#include "files.h"

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

// A way in which files are read.
struct Way {
    std::string name;
    std::string parent; // folder for the files
    bool        buffered;

    pye::platform::File open(const std::string & path) const {
        return buffered ? open_buffered(path) : pye::platform::open_file(path);
    }
};

// Past the page cache where this file system allows it, through it, and on a file system in memory.
inline std::vector<Way> ways() {
    std::vector<Way> all = {{"as the file system allows", ".", false}, {"buffered", ".", true}};
    if (access("/dev/shm", W_OK) == 0) {
        all.push_back({"in memory", "/dev/shm", false});
        all.push_back({"in memory, buffered", "/dev/shm", true});
    }
    return all;
}

// Takes the pieces of loads and compares them with the pattern. load_begin() goes through it, because it must know what
// every load expects before the first piece arrives.
class Verifier {
  public:
    pye::DiskTier::Place place() {
        return [this](uint64_t tag, uint32_t piece, const uint8_t * bytes) { take(tag, piece, bytes); };
    }

    void begin(pye::DiskTier & tier, uint64_t tag, const std::vector<pye::Segment> & pieces) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!expected_.emplace(tag, pieces).second) {
                throw check::Failed("the test uses a tag twice");
            }
        }
        std::vector<pye::Read> reads;
        for (const pye::Segment & piece : pieces) {
            reads.push_back({piece});
        }
        tier.load_begin(tag, std::move(reads));
    }

    // How many pieces of a load have arrived.
    size_t arrived(uint64_t tag) {
        std::lock_guard<std::mutex> lock(mutex_);
        return arrived_.count(tag) == 0 ? 0 : arrived_[tag].size();
    }

    size_t n_arrived() {
        std::lock_guard<std::mutex> lock(mutex_);
        size_t                      n = 0;
        for (const auto & [tag, pieces] : arrived_) {
            n += pieces.size();
        }
        return n;
    }

    // Empty unless a piece had wrong bytes, came twice or was never asked for.
    std::string wrong() {
        std::lock_guard<std::mutex> lock(mutex_);
        return wrong_;
    }

  private:
    void take(uint64_t tag, uint32_t piece, const uint8_t * bytes) {
        pye::Segment want;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            const auto                  load = expected_.find(tag);
            if (load == expected_.end() || piece >= load->second.size()) {
                wrong_ = "a piece that nobody asked for";
                return;
            }
            want = load->second[piece];
            if (!arrived_[tag].emplace(piece, true).second) {
                wrong_ = "a piece that came twice";
            }
        }
        if (!is_pattern(bytes, want.file, want.offset, want.size)) {
            std::lock_guard<std::mutex> lock(mutex_);
            wrong_ = "wrong bytes of file " + std::to_string(want.file) + " at " + std::to_string(want.offset);
        }
    }

    std::mutex                                    mutex_;
    std::map<uint64_t, std::vector<pye::Segment>> expected_;
    std::map<uint64_t, std::map<uint32_t, bool>>  arrived_;
    std::string                                   wrong_;
};
