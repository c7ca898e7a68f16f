#include "disk_tier.h"

#include "checksum.h"
#include "elapsed.h"
#include "error.h"
#include "rounding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace pye {

namespace {

// Threads that fills may take, and how long everything else must have been idle: between two layers of a token a disk is
// idle too, and what is read then comes in the way of the next.
constexpr uint32_t kFillThreads = 2;
constexpr auto     kQuiet       = std::chrono::milliseconds(5);

// The part of a file that covers `segment` and starts and ends where direct reads may.
Segment aligned_cover(const platform::File & file, const Segment & segment) {
    const uint64_t first = round_down(segment.offset, file.align);
    return {segment.file, first, round_up(segment.offset + segment.size, file.align) - first};
}

bool is_aligned(const platform::File & file, const void * address) {
    return reinterpret_cast<uintptr_t>(address) % file.align == 0;
}

std::string read_failure(const platform::File & file, const Segment & segment, int64_t got) {
    const std::string where = file.path + " at byte " + std::to_string(segment.offset);
    if (got < 0) {
        return "reading " + where + ": " + platform::error_text(static_cast<int>(-got));
    }
    return "reading " + where + ": the file ends too early (was it truncated or replaced?)";
}

std::string checksum_failure(const platform::File & file, const Segment & segment) {
    return "reading " + file.path + " at byte " + std::to_string(segment.offset) + ": wrong checksum, damaged";
}

std::string changed_failure(const platform::File & file) {
    return file.path + " was changed while it was in use; load the model again";
}

} // namespace

void read_now(const platform::File & file, uint64_t offset, uint64_t size, void * to) {
    const Segment cover  = aligned_cover(file, {0, offset, size});
    uint8_t *     buffer = platform::new_buffer(cover.size, file.align);
    if (buffer == nullptr) {
        throw Error(PYE_E_MEMORY, "out of memory for a read buffer");
    }
    const int64_t  got  = platform::read_at(file, buffer, cover.size, cover.offset);
    const uint64_t skip = offset - cover.offset;
    const bool     ok   = got >= 0 && static_cast<uint64_t>(got) >= skip + size;
    if (ok) {
        memcpy(to, buffer + skip, size);
    }
    platform::free_buffer(buffer);
    if (!ok) {
        throw Error(PYE_E_FILE, read_failure(file, {0, offset, size}, got));
    }
    if (platform::changed(file)) {
        throw Error(PYE_E_FILE, changed_failure(file));
    }
}

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
    for (const auto & [tag, load] : loads_) {
        delete load;
    }
    for (auto & f : files_) {
        platform::close_file(f);
    }
}

void DiskTier::load_begin(uint64_t tag, std::vector<Read> pieces, Urgency urgency, const Whole & whole) {
    const auto n    = static_cast<uint32_t>(pieces.size());
    auto       load = std::make_unique<Load>();
    load->tag       = tag;
    load->pieces    = std::move(pieces);
    load->whole     = whole;
    load->left      = n;
    load->fills     = urgency == Urgency::Fill;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (inject_n_ > 0 && load->pieces[0].here == nullptr) {
            // Counted in demand loads, which come in the same order every time.
            load->poisoned      = inject_after_ == 0;
            uint64_t & to_count = inject_after_ > 0 ? inject_after_ : inject_n_;
            to_count -= urgency == Urgency::Demand;
        }
        if (!loads_.emplace(tag, load.get()).second) {
            throw std::logic_error("two loads of one tag at a time");
        }
        for (uint32_t i = 0; i < n; ++i) {
            (urgency == Urgency::Demand     ? demand_
             : urgency == Urgency::Prefetch ? prefetch_
                                            : fill_)
                .push_back({load.get(), i, urgency});
        }
        n_fill_ += load->fills;
        if (!load->fills && loads_.size() - n_fill_ == 1) {
            active_since_ = std::chrono::steady_clock::now();
        }
        load.release(); // freed when it lands
    }
    // One thread for each piece: waking more would take the cores from the kernels for nothing.
    for (uint32_t i = 0; i < std::min<size_t>(n, threads_.size()); ++i) {
        work_.notify_one();
    }
}

void DiskTier::promote(uint64_t tag) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto                  found = loads_.find(tag);
        if (found == loads_.end()) {
            return;
        }
        std::deque<Task> others;
        for (Task task : prefetch_) {
            if (task.load == found->second) {
                task.urgency = Urgency::Demand;
                demand_.push_back(task);
            } else {
                others.push_back(task);
            }
        }
        prefetch_.swap(others);
    }
    work_.notify_all();
}

void DiskTier::cancel(uint64_t tag) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto                  found = loads_.find(tag);
    if (found == loads_.end()) {
        return;
    }
    drop(found->second, {&demand_, &prefetch_});
}

// Under the lock: what waits in these queues of a load is not read.
void DiskTier::drop(Load * load, std::initializer_list<std::deque<Task> *> queues) {
    const auto unread = [load](const Task & task) { return task.load == load; };
    for (std::deque<Task> * queue : queues) {
        const auto     from = std::remove_if(queue->begin(), queue->end(), unread);
        const uint32_t n    = static_cast<uint32_t>(queue->end() - from);
        queue->erase(from, queue->end());
        load->left -= n;
        load->cancelled = load->cancelled || n > 0;
    }
    if (load->left == 0) {
        land(load);
    }
}

float DiskTier::unread(uint64_t tag) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto                  found = loads_.find(tag);
    if (found == loads_.end()) {
        return 0.0f;
    }
    const auto waits = [&](const Task & task) { return task.load == found->second; };
    const auto n =
        std::count_if(demand_.begin(), demand_.end(), waits) + std::count_if(prefetch_.begin(), prefetch_.end(), waits);
    return static_cast<float>(n) / static_cast<float>(found->second->pieces.size());
}

// Under the lock; every piece has been read or dropped.
void DiskTier::land(Load * load) {
    const auto now   = std::chrono::steady_clock::now();
    const bool fills = load->fills;
    (fills ? landed_fills_ : landed_)
        .push_back({load->tag, load->why.empty() && !load->cancelled, load->cancelled, load->why,
                    load->begun ? load->begun_at : now, now});
    loads_.erase(load->tag);
    delete load;
    if (fills) {
        --n_fill_;
        filled_.notify_all();
        return;
    }
    busy_until_ = now;
    if (loads_.size() == n_fill_) {
        counters_.active_ns.fetch_add(nanoseconds_since(active_since_), std::memory_order_relaxed);
    }
    done_.notify_all();
    if (!fill_.empty()) {
        work_.notify_one();
    }
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

void DiskTier::fill_wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    filled_.wait(lock, [this] { return !landed_fills_.empty() || n_fill_ == 0; });
}

size_t DiskTier::n_fill() {
    std::lock_guard<std::mutex> lock(mutex_);
    return n_fill_ + landed_fills_.size();
}

bool DiskTier::fill_poll(Landed * landed) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (landed_fills_.empty()) {
        return false;
    }
    *landed = std::move(landed_fills_.front());
    landed_fills_.pop_front();
    return true;
}

void DiskTier::cancel_fills() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::deque<Task>            unread;
    unread.swap(fill_);
    for (const Task & task : unread) {
        task.load->cancelled = true;
        if (--task.load->left == 0) {
            land(task.load);
        }
    }
}

void DiskTier::end_fill(uint64_t tag) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto                   found = loads_.find(tag);
    if (found == loads_.end()) {
        return;
    }
    drop(found->second, {&fill_});
    filled_.wait(lock, [this, tag] { return loads_.count(tag) == 0; });
}

void DiskTier::run() {
    platform::block_signals_in_this_thread();
    platform::name_this_thread("pye-io");
    Buffer                       buffer; // made when a read first needs it
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        Task task;
        while (!stop_ && !next(&task)) {
            wait_for_work(lock);
        }
        if (stop_) {
            return;
        }
        const bool prefetching = task.urgency == Urgency::Prefetch;
        if (!task.load->begun) {
            task.load->begun    = true;
            task.load->begun_at = std::chrono::steady_clock::now();
        }
        const bool filling = task.urgency == Urgency::Fill;
        n_prefetching_ += prefetching;
        n_filling_ += filling;
        lock.unlock();
        one(task, buffer);
        lock.lock();
        n_prefetching_ -= prefetching;
        n_filling_ -= filling;
    }
}

// The next piece to read. Prefetches leave one thread free, so that a demand load need not even wait for the end of a piece.
bool DiskTier::next(Task * task) {
    std::deque<Task> * queue = nullptr;
    if (!demand_.empty()) {
        queue = &demand_;
    } else if (!prefetch_.empty() && (n_prefetching_ + 1 < threads_.size() || threads_.size() == 1)) {
        queue = &prefetch_;
    } else if (may_fill() && std::chrono::steady_clock::now() >= busy_until_ + kQuiet) {
        queue = &fill_;
    } else {
        return false;
    }
    *task = queue->front();
    queue->pop_front();
    return true;
}

// Apart from the quiet that must have been before.
bool DiskTier::may_fill() const {
    return !fill_.empty() && loads_.size() == n_fill_ && n_filling_ < std::min<size_t>(kFillThreads, threads_.size());
}

void DiskTier::wait_for_work(std::unique_lock<std::mutex> & lock) {
    if (may_fill()) {
        work_.wait_until(lock, busy_until_ + kQuiet);
    } else {
        work_.wait(lock);
    }
}

void DiskTier::one(const Task & task, Buffer & buffer) {
    const auto      start = std::chrono::steady_clock::now();
    const Read &    piece = task.load->pieces[task.piece];
    std::string     why;
    const uint8_t * bytes = nullptr;
    if (task.load->poisoned) {
        why = "reading " + files_[piece.segment.file].path + " at byte " + std::to_string(piece.segment.offset) +
              ": injected error";
    } else {
        why = fetch(piece, buffer, &bytes);
    }
    if (why.empty()) {
        try {
            place_(task.load->tag, piece.place == Read::kIndex ? task.piece : piece.place, bytes);
        } catch (const std::exception & e) { // nobody above this thread could catch it
            why = e.what();
        }
    } else {
        counters_.errors.fetch_add(1, std::memory_order_relaxed);
    }
    counters_.busy_ns.fetch_add(nanoseconds_since(start), std::memory_order_relaxed);

    Load * load = task.load;
    // Only the thread of the last piece may look at the whole; nobody else touches a load of which one piece is left.
    std::unique_lock<std::mutex> lock(mutex_);
    if (load->left == 1 && load->whole.bytes != nullptr && why.empty() && load->why.empty() && !load->cancelled) {
        lock.unlock();
        if (checksum(load->whole.bytes, load->whole.size) != load->whole.checksum) {
            why = checksum_failure(files_[load->whole.segment.file], load->whole.segment);
        }
        lock.lock();
    }
    if (!why.empty() && load->why.empty()) {
        load->why = why;
    }
    if (--load->left == 0) {
        land(load);
    }
}

// Empty text if `*bytes` points at the segment's bytes, in their place or in the buffer.
std::string DiskTier::fetch(const Read & read, Buffer & buffer, const uint8_t ** bytes) {
    if (read.here != nullptr) {
        *bytes = read.here;
        return {};
    }
    const Segment &        segment = read.segment;
    const platform::File & file    = files_[segment.file];
    const Segment          cover   = aligned_cover(file, segment);
    const uint64_t         skip    = segment.offset - cover.offset;
    const bool             direct  = read.into != nullptr && cover.size == segment.size && is_aligned(file, read.into);
    if (!direct && !buffer) {
        buffer.reset(platform::new_buffer(buffer_size_, buffer_align_));
        if (!buffer) {
            return "out of memory for a read buffer of " + std::to_string(buffer_size_) + " bytes";
        }
    }
    uint8_t * const to  = direct ? read.into : buffer.get();
    const int64_t   got = platform::read_at(file, to, cover.size, cover.offset);
    counters_.reads.fetch_add(1, std::memory_order_relaxed);
    if (got < 0 || static_cast<uint64_t>(got) < skip + segment.size) {
        return read_failure(file, segment, got);
    }
    counters_.bytes.fetch_add(static_cast<uint64_t>(got), std::memory_order_relaxed);
    if (platform::changed(file)) { // after reading: what was written before it would show now
        return changed_failure(file);
    }
    *bytes = to + skip;
    if (read.checked && checksum(*bytes, segment.size) != read.checksum) {
        return checksum_failure(file, segment);
    }
    if (read.into != nullptr && !direct) {
        memcpy(read.into, *bytes, segment.size);
        *bytes = read.into;
    }
    return {};
}

void DiskTier::read(const Segment & segment, uint64_t from, uint64_t size, void * to) const {
    read_now(files_[segment.file], segment.offset + from, size, to);
}

void DiskTier::inject_errors(uint64_t after, uint64_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    inject_after_ = after;
    inject_n_     = n;
}

} // namespace pye
