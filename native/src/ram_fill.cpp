#include "ram_fill.h"

#include "platform.h"

namespace pye {

namespace {

constexpr uint32_t kUnderWay = 4; // the disk must not wait for us while a token holds the lock

} // namespace

RamFill::RamFill(std::mutex & engine, ExpertSource & source)
    : engine_(engine), source_(source), thread_([this] { run(); }) {}

RamFill::~RamFill() {
    stop_.store(true);
    source_.disk().cancel_fills();
    thread_.join();
}

void RamFill::run() {
    platform::block_signals_in_this_thread();
    platform::name_this_thread("pye-fill");
    uint32_t n_under_way = 0;
    for (;;) {
        {
            std::lock_guard<std::mutex> lock(engine_);
            while (!stop_.load() && n_under_way < kUnderWay && source_.fill_begin()) {
                ++n_under_way;
            }
        }
        if (stop_.load()) { // after the last begin, so that nothing is left behind
            source_.disk().cancel_fills();
        }
        DiskTier::Landed landed;
        if (n_under_way == 0 || !source_.disk().fill_wait(&landed)) {
            return;
        }
        std::lock_guard<std::mutex> lock(engine_);
        do {
            source_.fill_landed(landed);
            --n_under_way;
        } while (source_.disk().fill_poll(&landed));
    }
}

} // namespace pye
