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
        const auto start = std::chrono::steady_clock::now();
        copy();
        if (const uint64_t limit = limit_.load(std::memory_order_relaxed); limit > 0) {
            wait_for_turn(start, bytes, limit);
        }
        bytes_.fetch_add(bytes, std::memory_order_relaxed);
        busy_ns_.fetch_add(nanoseconds_since(start), std::memory_order_relaxed);
    }
    // A load found its expert in RAM.
    void from_ram() { ++ram_hits_; }

    uint64_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    uint64_t busy_ns() const { return busy_ns_.load(std::memory_order_relaxed); } // summed over threads
    uint64_t ram_hits() const { return ram_hits_; }

  private:
    using Clock = std::chrono::steady_clock;

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
};

} // namespace pye
