#include "disk_tier.h"

#include "error.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace pye {

namespace {

uint64_t round_down(uint64_t x, uint64_t to) { return x / to * to; }
uint64_t round_up(uint64_t x, uint64_t to) { return (x + to - 1) / to * to; }

struct Free {
    void operator()(uint8_t * p) const { free(p); }
};

// The part of a file that covers `segment` and starts and ends where direct reads may.
Segment aligned_cover(const platform::File & file, const Segment & segment) {
    const uint64_t first = round_down(segment.offset, file.align);
    return {segment.file, first, round_up(segment.offset + segment.size, file.align) - first};
}

std::string read_failure(const platform::File & file, const Segment & segment, int64_t got) {
    const std::string where = file.path + " at byte " + std::to_string(segment.offset);
    if (got < 0) {
        return "reading " + where + ": " + platform::error_text(static_cast<int>(-got));
    }
    return "reading " + where + ": the file ends too early (was it truncated or replaced?)";
}

} // namespace

DiskTier::DiskTier(std::vector<platform::File> files, uint64_t largest, uint32_t n_thread, Place place)
    : files_(std::move(files)), place_(std::move(place)) {
    for (const auto & f : files_) {
        buffer_align_ = std::max<uint64_t>(buffer_align_, f.align);
    }
    buffer_size_ = round_up(largest, buffer_align_) + 2 * buffer_align_;
    threads_.reserve(n_thread);
    try {
        for (uint32_t i = 0; i < n_thread; ++i) {
            threads_.emplace_back([this] { run(); });
        }
    } catch (const std::exception & e) {
        if (threads_.empty()) { // fewer than wished only cost time
            for (auto & f : files_) {
                platform::close_file(f);
            }
            throw Error(PYE_E_MEMORY, std::string("cannot start a thread for reading experts: ") + e.what());
        }
    }
}

DiskTier::~DiskTier() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    work_.notify_all();
    for (auto & t : threads_) {
        t.join();
    }
    for (const Task & t : tasks_) { // a load that never started any piece is freed by its last piece
        if (--t.load->left == 0) {
            delete t.load;
        }
    }
    for (auto & f : files_) {
        platform::close_file(f);
    }
}

void DiskTier::load_begin(uint64_t tag, std::vector<Segment> pieces) {
    const auto n    = static_cast<uint32_t>(pieces.size());
    auto       load = std::make_unique<Load>(Load{tag, std::move(pieces), n, false, {}});
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (inject_n_ > 0) {
            if (inject_after_ > 0) {
                --inject_after_;
            } else {
                --inject_n_;
                load->poisoned = true;
            }
        }
        for (uint32_t i = 0; i < load->pieces.size(); ++i) {
            tasks_.push_back({load.get(), i});
        }
        load.release(); // freed with its last piece
    }
    work_.notify_all();
}

DiskTier::Landed DiskTier::load_wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return !landed_.empty(); });
    Landed l = std::move(landed_.front());
    landed_.pop_front();
    return l;
}

bool DiskTier::load_poll(Landed * landed) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (landed_.empty()) {
        return false;
    }
    *landed = std::move(landed_.front());
    landed_.pop_front();
    return true;
}

void DiskTier::run() {
    platform::block_signals_in_this_thread();
    std::unique_ptr<uint8_t, Free> buffer;
    std::unique_lock<std::mutex>   lock(mutex_);
    for (;;) {
        work_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
        if (stop_) {
            return;
        }
        const Task task = tasks_.front();
        tasks_.pop_front();
        lock.unlock();
        if (!buffer) {
            void * p = nullptr;
            if (posix_memalign(&p, buffer_align_, buffer_size_) == 0) {
                buffer.reset(static_cast<uint8_t *>(p));
            }
        }
        one(task, buffer.get());
        lock.lock();
    }
}

void DiskTier::one(const Task & task, uint8_t * buffer) {
    const auto      start = std::chrono::steady_clock::now();
    const Segment & piece = task.load->pieces[task.piece];
    std::string     why;
    const uint8_t * bytes = nullptr;
    if (task.load->poisoned) {
        why = "reading " + files_[piece.file].path + " at byte " + std::to_string(piece.offset) + ": injected error";
    } else if (buffer == nullptr) {
        why = "out of memory for a read buffer of " + std::to_string(buffer_size_) + " bytes";
    } else {
        why = fetch(piece, buffer, &bytes);
    }
    if (why.empty()) {
        try {
            place_(task.load->tag, task.piece, bytes);
        } catch (const std::exception & e) { // nobody above this thread could catch it
            why = e.what();
        }
    } else {
        counters_.errors.fetch_add(1, std::memory_order_relaxed);
    }
    counters_.busy_ns.fetch_add(
        static_cast<uint64_t>(
            std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count()),
        std::memory_order_relaxed);

    std::lock_guard<std::mutex> lock(mutex_);
    Load *                      load = task.load;
    if (!why.empty() && load->why.empty()) {
        load->why = why;
    }
    if (--load->left == 0) {
        landed_.push_back({load->tag, load->why.empty(), load->why});
        delete load;
        done_.notify_all();
    }
}

// Empty text if `*bytes` points at the segment in the buffer.
std::string DiskTier::fetch(const Segment & segment, uint8_t * buffer, const uint8_t ** bytes) {
    const platform::File & file  = files_[segment.file];
    const Segment          cover = aligned_cover(file, segment);
    const int64_t          got   = platform::read_at(file, buffer, cover.size, cover.offset);
    counters_.reads.fetch_add(1, std::memory_order_relaxed);
    const uint64_t skip = segment.offset - cover.offset;
    if (got < 0 || static_cast<uint64_t>(got) < skip + segment.size) {
        return read_failure(file, segment, got);
    }
    counters_.bytes.fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
    *bytes = buffer + skip;
    return {};
}

void DiskTier::read(const Segment & segment, uint64_t from, uint64_t size, void * to) const {
    const platform::File & file  = files_[segment.file];
    const Segment          want  = {segment.file, segment.offset + from, size};
    const Segment          cover = aligned_cover(file, want);
    void *                 p     = nullptr;
    if (posix_memalign(&p, std::max<size_t>(file.align, platform::kPage), cover.size) != 0) {
        throw Error(PYE_E_MEMORY, "out of memory for a read buffer");
    }
    std::unique_ptr<uint8_t, Free> buffer(static_cast<uint8_t *>(p));
    const int64_t                  got  = platform::read_at(file, buffer.get(), cover.size, cover.offset);
    const uint64_t                 skip = want.offset - cover.offset;
    if (got < 0 || static_cast<uint64_t>(got) < skip + size) {
        throw Error(PYE_E_FILE, read_failure(file, want, got));
    }
    memcpy(to, buffer.get() + skip, size);
}

void DiskTier::inject_errors(uint64_t after, uint64_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    inject_after_ = after;
    inject_n_     = n;
}

} // namespace pye
