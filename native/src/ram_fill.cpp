#include "ram_fill.h"

#include "platform.h"

namespace pye {

namespace {

constexpr size_t kUnderWay = 4; // the disk must not wait for us while a token holds the lock

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
    for (;;) {
        {
            std::lock_guard<std::mutex> lock(engine_);
            source_.settle_fills();
            while (!stop_.load() && source_.disk().n_fill() < kUnderWay && source_.fill_begin()) {
            }
            if (source_.disk().n_fill() == 0) {
                ended_ = true;
                return;
            }
        }
        if (stop_.load()) { // after the last begin, so that nothing is left behind
            source_.disk().cancel_fills();
        }
        source_.disk().fill_wait();
    }
}

} // namespace pye
