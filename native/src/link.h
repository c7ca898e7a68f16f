// The link between host memory and a GPU: what moved over it, and for benchmarks a slower one.
#pragma once

#include "elapsed.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

namespace pye {

class Link {
  public:
    // Bytes per second that all moves together may take; 0: what the machine gives.
    void limit(uint64_t bytes_per_s) { limit_.store(bytes_per_s, std::memory_order_relaxed); }

    // Any thread: run `copy`, which moves so many bytes.
    template <class F> void move(uint64_t bytes, F && copy) {
        const auto start = Clock::now();
        begin(start);
        copy();
        if (const uint64_t limit = limit_.load(std::memory_order_relaxed); limit > 0) {
            wait_for_turn(start, bytes, limit);
        }
        end(bytes);
        bytes_.fetch_add(bytes, std::memory_order_relaxed);
        busy_ns_.fetch_add(nanoseconds_since(start), std::memory_order_relaxed);
    }
    // A load found its expert in RAM.
    void from_ram() { ++ram_hits_; }

    uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    uint64_t busy_ns() const { return busy_ns_.load(std::memory_order_relaxed); } // summed over threads
    uint64_t ram_hits() const { return ram_hits_; }
    // Of late, while anything moved; 0: nothing has yet.
    double bytes_per_ns() const { return bytes_per_ns_.load(std::memory_order_relaxed); }

  private:
    using Clock = std::chrono::steady_clock;

    static constexpr uint64_t kSample   = 32u << 20; // what one measurement of the speed takes: bytes
    static constexpr double   kSampleNs = 5e6;       // or the time
    static constexpr double   kNew      = 0.25;      // its weight in the mean

    void begin(Clock::time_point now) {
        std::lock_guard<std::mutex> lock(speed_mutex_);
        if (n_moving_++ == 0) {
            since_ = now;
        }
    }
    void end(uint64_t bytes) {
        std::lock_guard<std::mutex> lock(speed_mutex_);
        --n_moving_;
        const auto now = Clock::now();
        sample_ns_ += static_cast<double>(std::chrono::duration_cast<std::chrono::nanoseconds>(now - since_).count());
        sample_bytes_ += bytes;
        since_ = now;
        if (sample_bytes_ >= kSample || sample_ns_ >= kSampleNs) {
            const double one = static_cast<double>(sample_bytes_) / sample_ns_;
            const double was = bytes_per_ns();
            bytes_per_ns_.store(was == 0.0 ? one : was + kNew * (one - was), std::memory_order_relaxed);
            sample_bytes_ = 0;
            sample_ns_    = 0.0;
        }
    }

    // Moves stand in line behind each other, as on a slower link.
    void wait_for_turn(Clock::time_point start, uint64_t bytes, uint64_t limit) {
        Clock::time_point end;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            const auto                  takes = std::chrono::nanoseconds(bytes * 1000000000 / limit);
            end = free_at_ = std::max(free_at_, start) + takes;
        }
        constexpr auto kSleepIsLate = std::chrono::microseconds(100);
        if (end - Clock::now() > kSleepIsLate) {
            std::this_thread::sleep_until(end - kSleepIsLate);
        }
        while (Clock::now() < end) {
        }
    }

    std::atomic<uint64_t> limit_{0}, bytes_{0}, busy_ns_{0};
    uint64_t              ram_hits_ = 0; // the engine's lock covers it
    std::mutex            mutex_;
    Clock::time_point     free_at_;

    std::mutex          speed_mutex_;
    uint32_t            n_moving_ = 0;
    Clock::time_point   since_;
    uint64_t            sample_bytes_ = 0;
    double              sample_ns_    = 0.0;
    std::atomic<double> bytes_per_ns_{0.0};
};

} // namespace pye
