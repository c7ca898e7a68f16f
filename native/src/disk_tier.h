// The disk tier: reads the pieces of an expert from its files, several at a time, and hands each piece over on the I/O
// thread that read it. Three queues: what a demand load needs goes before everything that a prefetch wishes for, so it never
// waits for more than the pieces that are being read; and fills, which nobody is known to need, are read while nothing else
// is and has not been for a while. Owns the I/O threads and their aligned buffers; knows nothing of slots
// or ggml.
#pragma once

#include "platform.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace pye {

// One contiguous run of bytes in a file.
struct Segment {
    uint32_t file   = 0;
    uint64_t offset = 0;
    uint64_t size   = 0;
};

// One read of a load.
struct Read {
    Segment         segment;
    uint8_t *       into     = nullptr; // where the bytes belong in memory; nullptr: `Place` puts them there
    bool            checked  = false;   // whether `checksum` must agree
    uint64_t        checksum = 0;       // XXH3
    uint32_t        place    = kIndex;  // what `Place` is told; kIndex: the number of this read in its load
    const uint8_t * here     = nullptr; // the bytes, if they are in memory already: nothing is read

    static constexpr uint32_t kIndex = UINT32_MAX;
};

// Synchronous. Throws Error(PYE_E_FILE), also if the file was changed since it was opened.
void read_now(const platform::File & file, uint64_t offset, uint64_t size, void * to);

// A load that somebody waits for, one that somebody may come to need, or one for some time later.
enum class Urgency : uint8_t { Demand, Prefetch, Fill };

// The bytes of a load as a whole, once every piece is where it belongs.
struct Whole {
    const uint8_t * bytes    = nullptr; // nullptr: nothing to check
    uint64_t        size     = 0;
    uint64_t        checksum = 0; // XXH3
    Segment         segment;      // to name in a message
};

class DiskTier {
  public:
    // Called on an I/O thread with the bytes of one read of load `tag`, see Read.place. If it throws, the load fails.
    using Place = std::function<void(uint64_t tag, uint32_t place, const uint8_t * bytes)>;

    struct Landed {
        uint64_t    tag       = 0;
        bool        ok        = false;
        bool        cancelled = false; // not all of it was read, because nobody wanted it any more
        std::string why;               // of a failure
        // From its first read to its end.
        std::chrono::steady_clock::time_point begun, ended;
    };

    struct Counters {
        std::atomic<uint64_t> reads{0}, bytes{0}, errors{0}, busy_ns{0};
        std::atomic<uint64_t> active_ns{0}; // with at least one load under way
    };

    // Takes the files over. `largest` is the size of the largest segment, bytes. Throws Error(PYE_E_MEMORY) if the system
    // allows not even one thread.
    DiskTier(std::vector<platform::File> files, uint64_t largest, uint32_t n_thread, Place place);
    ~DiskTier(); // finishes what runs, drops what waits

    DiskTier(const DiskTier &)             = delete;
    DiskTier & operator=(const DiskTier &) = delete;

    // At least one piece; a tag is that of one load at a time.
    void load_begin(uint64_t tag, std::vector<Read> pieces, Urgency urgency = Urgency::Demand,
                    const Whole & whole = {});
    // Of a load under way: its unread pieces go before those of all prefetches; or are not read at all, and it lands as
    // cancelled. Nothing happens if it has landed.
    void   promote(uint64_t tag);
    void   cancel(uint64_t tag);
    float  unread(uint64_t tag);       // share of its pieces that nobody has begun to read; 0 if it has landed
    Landed load_wait();                // blocks; call only while loads are under way
    bool   load_poll(Landed * landed); // takes a finished load if there is one

    // The same for fills, which land apart from the others.
    void   fill_wait(); // until one has landed that nobody has taken, or none is under way
    bool   fill_poll(Landed * landed);
    size_t n_fill();       // under way, or landed and not taken
    void   cancel_fills(); // what is unread of them is not read
    // The same for one of them; returns once it has landed, after the time of the pieces that are being read, if any. Nothing
    // happens if it has landed.
    void end_fill(uint64_t tag);

    // Synchronous, on the caller's thread. Throws Error(PYE_E_FILE).
    void read(const Segment & segment, uint64_t from, uint64_t size, void * to) const;

    // Fault injection: after `after` more demand loads, the next `n` fail, and every prefetch among them.
    void inject_errors(uint64_t after, uint64_t n);

    const Counters & counters() const { return counters_; }

  private:
    struct Load {
        uint64_t                              tag = 0;
        std::vector<Read>                     pieces;
        Whole                                 whole;
        uint32_t                              left      = 0; // pieces
        bool                                  poisoned  = false;
        bool                                  cancelled = false;
        std::string                           why;
        bool                                  begun = false, fills = false;
        std::chrono::steady_clock::time_point begun_at;
    };
    struct Task {
        Load *   load;
        uint32_t piece;
        Urgency  urgency;
    };
    struct Free {
        void operator()(uint8_t * p) const { platform::free_buffer(p); }
    };
    using Buffer = std::unique_ptr<uint8_t, Free>;

    void        run();
    bool        next(Task * task);
    bool        may_fill() const;
    void        wait_for_work(std::unique_lock<std::mutex> & lock);
    void        land(Load * load);
    void        one(const Task & task, Buffer & buffer);
    std::string fetch(const Read & read, Buffer & buffer, const uint8_t ** bytes);
    void        drop(Load * load, std::initializer_list<std::deque<Task> *> queues);

    std::vector<platform::File> files_;
    Place                       place_;
    uint64_t                    buffer_size_ = 0, buffer_align_ = platform::kPage;

    std::mutex                            mutex_;
    std::condition_variable               work_, done_;
    std::condition_variable               filled_;
    std::deque<Task>                      demand_, prefetch_, fill_;
    uint32_t                              n_prefetching_ = 0, n_filling_ = 0; // threads that read for one
    uint32_t                              n_fill_ = 0;                        // of loads_
    std::unordered_map<uint64_t, Load *>  loads_;                             // under way, by tag
    std::deque<Landed>                    landed_, landed_fills_;
    std::chrono::steady_clock::time_point busy_until_; // nothing but fills was under way since
    std::chrono::steady_clock::time_point active_since_;
    bool                                  stop_         = false;
    uint64_t                              inject_after_ = 0, inject_n_ = 0;
    std::vector<std::thread>              threads_;
    Counters                              counters_;
};

} // namespace pye
