#include "engine.h"

#include "backend.h"
#include "error.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace pye {

namespace {

constexpr size_t kEvents = 1 << 16;

// All of them or none.
std::vector<platform::File> open_files(const std::vector<std::string> & paths) {
    std::vector<platform::File> files;
    try {
        for (const std::string & p : paths) {
            files.push_back(platform::open_file(p));
        }
    } catch (...) {
        for (auto & f : files) {
            platform::close_file(f);
        }
        throw;
    }
    return files;
}

} // namespace

Engine::Engine(const std::string & path)
    : index_(read_expert_index(path)), buft_(expert_buffer_type(this)), events_(kEvents),
      owner_(platform::process_id()) {
    files_  = open_files(index_.paths);
    direct_ = std::all_of(files_.begin(), files_.end(), [](const platform::File & f) { return f.direct; });
}

Engine::~Engine() {
    close();
    for (auto & f : files_) {
        platform::close_file(f);
    }
}

void Engine::use_bundle(const std::string & path) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_fresh();
    bundle_ = std::make_unique<Bundle>(path, index_, files_);
    direct_ = direct_ && bundle_->file().direct;
}

void Engine::start(uint64_t budget) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_fresh();
    slots_for(budget);
    std::vector<Class> classes; // kept only if all can be made, so that a start with another budget may follow
    for (const ShapeClass & c : index_.classes) {
        Class k;
        k.arena = std::make_unique<SlotArena>(c, index_.layers[c.layers[0]], c.n_expert, index_.n_expert_used);
        k.store = std::make_unique<SlotStore>(c.n_expert);
        classes.push_back(std::move(k));
    }
    classes_ = std::move(classes);
    apply_budget(budget);
    try {
        source_ = std::make_unique<ExpertSource>(index_, std::move(files_), std::move(bundle_),
                                                 [this](uint32_t c) -> SlotArena & { return *classes_[c].arena; });
    } catch (...) {
        closed_ = true; // the files are gone
        throw;
    }
    std::vector<SlotStore *> stores;
    for (const Class & c : classes_) {
        stores.push_back(c.store.get());
    }
    prefetcher_ = std::make_unique<Prefetcher>(index_, std::move(stores), *source_, events_, timeline_, stats_);
    packers_    = {};
    files_.clear();
}

void Engine::close() {
    if (owner_ != platform::process_id()) {
        // A forked child has no I/O threads to join, and the lock may have been held at the fork.
        // The slots' memory is not here either: giving it back would hit whatever the child has put in its place.
        (void)source_.release();
        (void)prefetcher_.release();
        for (Class & c : classes_) {
            (void)c.arena.release();
        }
        closed_ = true;
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    source_.reset(); // first: its threads write into slots
    prefetcher_.reset();
    classes_.clear();
}

uint64_t Engine::least_budget() const {
    uint64_t n = 0;
    for (const ShapeClass & c : index_.classes) {
        n += c.stride;
    }
    return n;
}

// Every class gets one slot, and of the remaining budget its share by bytes; what rounding leaves goes to whoever fits.
std::vector<uint32_t> Engine::slots_for(uint64_t budget) const {
    const uint64_t least = least_budget(), total = index_.slot_bytes();
    if (budget < least) {
        throw Error(PYE_E_BUDGET, "an expert budget of " + std::to_string(budget) +
                                      " bytes is too small for this model: at least " + std::to_string(least) +
                                      " bytes are needed");
    }
    uint64_t              left  = std::min(budget, total) - least;
    const double          share = total == least ? 0.0 : static_cast<double>(left) / static_cast<double>(total - least);
    std::vector<uint32_t> n;
    for (const ShapeClass & c : index_.classes) {
        const auto more = static_cast<uint32_t>(share * (c.n_expert - 1));
        n.push_back(1 + more);
        left -= std::min(left, more * c.stride);
    }
    for (bool given = true; given;) {
        given = false;
        for (size_t i = 0; i < n.size(); ++i) {
            if (n[i] < index_.classes[i].n_expert && index_.classes[i].stride <= left) {
                left -= index_.classes[i].stride;
                ++n[i];
                given = true;
            }
        }
    }
    return n;
}

void Engine::apply_budget(uint64_t budget) {
    const auto n = slots_for(budget);
    for (size_t i = 0; i < classes_.size(); ++i) {
        for (uint32_t slot : classes_[i].store->resize(n[i])) {
            classes_[i].arena->release(slot);
        }
    }
}

void Engine::set_ram_budget(uint64_t budget) {
    const auto lock = locked();
    check_usable();
    slots_for(budget); // throws before anything is given up
    prefetcher_->drain();
    apply_budget(budget);
}

void Engine::set_priorities(const float * values, size_t n) {
    const auto lock = locked();
    check_usable();
    uint32_t widest = 0;
    for (const ExpertLayer & l : index_.layers) {
        widest = std::max(widest, l.n_expert);
    }
    if (n != index_.layers.size() * widest) {
        throw Error(PYE_E_ARGUMENT, "priorities must be " + std::to_string(index_.layers.size()) + " x " +
                                        std::to_string(widest) + " floats");
    }
    for (size_t c = 0; c < classes_.size(); ++c) {
        std::vector<float> of_class(index_.classes[c].n_expert);
        for (uint32_t l : index_.classes[c].layers) {
            const ExpertLayer & layer = index_.layers[l];
            std::copy_n(values + size_t(l) * widest, layer.n_expert, of_class.begin() + layer.first);
        }
        classes_[c].store->set_priorities(of_class);
    }
}

void Engine::inject_read_errors(uint64_t after, uint64_t n) {
    const auto lock = locked();
    check_usable();
    source_->disk().inject_errors(after, n);
}

size_t Engine::events(pye_event * out, size_t capacity) {
    const auto lock = locked();
    return events_.take(out, capacity);
}

pye_info Engine::info() const {
    const auto            lock = locked();
    pye_info              i    = {};
    std::set<std::string> layouts;
    for (size_t c = 0; c < classes_.size(); ++c) {
        for (uint32_t p = 0; p < index_.layers[index_.classes[c].layers[0]].matrices.size(); ++p) {
            layouts.insert(classes_[c].arena->layout(p));
        }
    }
    std::string kernels;
    for (const std::string & l : layouts) {
        kernels += (kernels.empty() ? "" : ", ") + l;
    }
    strncpy(i.architecture, index_.architecture.c_str(), sizeof i.architecture - 1);
    strncpy(i.kernels, kernels.c_str(), sizeof i.kernels - 1);
    i.n_layer       = static_cast<int32_t>(index_.layers.size());
    i.n_expert_used = static_cast<int32_t>(index_.n_expert_used);
    i.n_class       = static_cast<int32_t>(index_.classes.size());
    i.n_file        = static_cast<int32_t>(index_.paths.size());
    i.n_embd        = static_cast<int32_t>(index_.n_in());
    i.direct_io     = direct_;
    if (const Bundle * bundle = source_ ? source_->bundle() : bundle_.get()) {
        i.bundle          = 1;
        i.bundle_repacked = bundle->repacked();
    }
    i.file_bytes   = index_.file_bytes;
    i.expert_bytes = index_.expert_bytes;
    i.slot_bytes   = index_.slot_bytes();
    i.least_budget = least_budget();
    for (const ExpertLayer & l : index_.layers) {
        i.n_expert = std::max(i.n_expert, static_cast<int32_t>(l.n_expert));
        i.n_experts_total += l.n_expert;
        for (const ExpertMatrix & m : l.matrices) {
            i.expert_used_bytes += m.bytes * index_.n_expert_used;
        }
    }
    return i;
}

pye_stats Engine::stats() const {
    const auto lock = locked();
    pye_stats  s    = stats_;
    if (source_) {
        const auto & d = source_->disk().counters();
        s.bytes_read   = d.bytes.load(std::memory_order_relaxed);
        s.reads        = d.reads.load(std::memory_order_relaxed);
        s.read_errors  = d.errors.load(std::memory_order_relaxed);
        s.load_ns      = d.busy_ns.load(std::memory_order_relaxed);
        s.io_ns        = d.active_ns.load(std::memory_order_relaxed);
    }
    for (const Class & c : classes_) {
        s.resident += c.store->n_resident();
        s.resident_bytes += c.store->n_resident() * c.arena->stride();
        s.slots += c.store->n_slot();
        s.budget_bytes += c.store->n_slot() * c.arena->stride();
    }
    s.events_lost = events_.lost();
    return s;
}

void Engine::fail(int32_t code, const std::string & why) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (failure_code_ == PYE_OK) {
        failure_code_ = code;
        failure_      = why;
    }
}

int32_t Engine::take_failure(std::string * why) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    const int32_t               code = failure_code_;
    *why                             = failure_;
    failure_code_                    = PYE_OK;
    failure_.clear();
    return code;
}

void Engine::notice(const std::string & what) {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    if (notice_.empty()) {
        notice_ = what;
    }
}

std::string Engine::take_notice() {
    std::lock_guard<std::mutex> lock(failure_mutex_);
    std::string                 what;
    what.swap(notice_);
    return what;
}

void Engine::set_replay(const int32_t * ids, size_t n_step, size_t n_used) {
    const auto   lock = locked();
    const size_t n    = n_step * index_.layers.size() * n_used;
    if (n_step > 0 && n_used != index_.n_expert_used) {
        throw Error(PYE_E_ARGUMENT, "a replay must name " + std::to_string(index_.n_expert_used) +
                                        " experts for each token and layer, as this model's router does");
    }
    for (size_t i = 0; i < n; ++i) {
        const uint32_t most = index_.layers[i / n_used % index_.layers.size()].n_expert;
        if (ids[i] < 0 || static_cast<uint32_t>(ids[i]) >= most) {
            throw Error(PYE_E_ARGUMENT,
                        "a replay names expert " + std::to_string(ids[i]) + " of " + std::to_string(most));
        }
    }
    replay_.set(std::vector<int32_t>(ids, ids + n), index_.layers.size(), n_used);
}

void Engine::set_predictors(std::vector<Predictor> predictors) {
    const auto lock = locked();
    check_usable();
    const uint32_t n_in = index_.n_in();
    for (const Predictor & p : predictors) {
        if (p.source >= p.target || p.target >= index_.layers.size()) {
            throw Error(PYE_E_ARGUMENT,
                        "a predictor must look from a layer at a later one of " + std::to_string(index_.layers.size()));
        }
        if (p.n_in != n_in || p.n_expert != index_.layers[p.target].n_expert) {
            throw Error(PYE_E_ARGUMENT, "a predictor for layer " + std::to_string(p.target) + " must map " +
                                            std::to_string(n_in) + " inputs to " +
                                            std::to_string(index_.layers[p.target].n_expert) + " experts");
        }
    }
    prefetcher_->set_predictors(std::move(predictors));
}

void Engine::set_prefetch_rules(const pye_prefetch_rules & rules) {
    const auto lock = locked();
    check_usable();
    prefetcher_->set_rules(rules);
}

void Engine::set_look_ahead(bool on) {
    const auto lock = locked();
    check_usable();
    prefetcher_->set_guessing(on);
}

void Engine::expect(uint32_t layer, const uint32_t * experts, size_t n, bool keep) {
    const auto lock = locked();
    check_usable();
    if (layer >= index_.layers.size()) {
        throw Error(PYE_E_ARGUMENT, "there is no layer " + std::to_string(layer));
    }
    const std::vector<uint32_t> wanted(experts, experts + n);
    for (uint32_t e : wanted) {
        if (e >= index_.layers[layer].n_expert) {
            throw Error(PYE_E_ARGUMENT, "there is no expert " + std::to_string(e));
        }
    }
    prefetcher_->settle();
    prefetcher_->expect(layer, wanted, keep);
}

void Engine::set_recording(bool ids, bool inputs) {
    const auto lock = locked();
    recording_.set(ids, inputs, index_.layers.size(), index_.n_expert_used, index_.n_in());
}

size_t Engine::take_recording(uint16_t * ids, uint16_t * weights, uint16_t * inputs, size_t capacity) {
    const auto lock = locked();
    return recording_.take(ids, weights, inputs, capacity);
}

void Engine::set_timeline(bool on) {
    const auto lock = locked();
    timeline_.set(on);
}

size_t Engine::take_timeline(pye_span * out, size_t capacity) {
    const auto lock = locked();
    return timeline_.take(out, capacity);
}

std::vector<uint8_t> Engine::tables(bool raw) const {
    std::lock_guard<std::mutex> lock(mutex_);
    check_fresh();
    return bundle_tables(index_, files_, raw);
}

void Engine::record(bool raw, uint32_t layer, uint32_t expert, uint8_t * out) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_fresh();
    auto & packer = packers_[raw];
    if (!packer) {
        packer = std::make_unique<BundlePacker>(index_, raw);
    }
    packer->record(files_, layer, expert, out);
}

void Engine::read_tensor(const ExpertMatrix & m, uint64_t from, uint64_t size, void * to) const {
    const auto lock = locked();
    check_usable();
    source_->disk().read(m.data, from, size, to);
}

std::unique_lock<std::mutex> Engine::locked() const {
    if (owner_ != platform::process_id()) { // before the lock, which may have been held at the fork
        throw Error(PYE_E_STATE, "this process was forked after the model was opened; open the model after the fork");
    }
    return std::unique_lock<std::mutex>(mutex_);
}

void Engine::check_fresh() const {
    if (source_ || closed_) {
        throw Error(PYE_E_STATE, "the engine has been started already");
    }
}

void Engine::check_usable() const {
    if (closed_) {
        throw Error(PYE_E_STATE, "the model's experts are closed");
    }
    if (!source_) {
        throw Error(PYE_E_STATE, "the engine has not been started");
    }
}

} // namespace pye
