#include "engine.h"

#include "backend.h"
#include "device_arena.h"
#include "error.h"
#include "gpu_device.h"
#include "layer_split.h"
#include "quiet_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

namespace pye {

namespace {

constexpr size_t kEvents = 1 << 16;
// If a GPU has less memory than it said, so much less is tried, until it fits.
constexpr double kLess = 0.9;

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
    filter_log();
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

void Engine::use_gpus(const std::vector<std::string> & names, const std::vector<float> & shares, int32_t n_gpu_layers) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_fresh();
    if (!gpus_.empty()) {
        throw Error(PYE_E_STATE, "the GPUs have been chosen already");
    }
    if (names.empty() || shares.size() != names.size() || !(*std::max_element(shares.begin(), shares.end()) > 0.0f) ||
        std::any_of(shares.begin(), shares.end(), [](float s) { return !std::isfinite(s) || s < 0.0f; })) {
        throw Error(PYE_E_ARGUMENT,
                    "every GPU needs a share of the layers that is not negative, one of them more than 0");
    }
    std::vector<Gpu> gpus;
    for (const std::string & name : names) {
        ggml_backend_dev_t gpu = ggml_backend_dev_by_name(name.c_str());
        if (gpu == nullptr) {
            throw Error(PYE_E_ARGUMENT, "this llama.cpp has no device " + name);
        }
        const auto before = static_cast<uint32_t>(
            std::count_if(gpus.begin(), gpus.end(), [gpu](const Gpu & g) { return g.device == gpu; }));
        if (before > 0 && ggml_backend_dev_type(gpu) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            throw Error(PYE_E_ARGUMENT, name + " is named twice");
        }
        gpus.push_back({gpu, gpu_proxy(gpu, before)});
    }
    index_.split_classes(split_layers(shares, index_.n_block, n_gpu_layers));
    gpus_ = std::move(gpus);
}

void Engine::use_experts(uint32_t n) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_fresh();
    uint32_t narrowest = index_.n_expert;
    for (const ExpertLayer & l : index_.layers) {
        narrowest = std::min(narrowest, l.n_expert);
    }
    if (n == 0 || n > narrowest) {
        throw Error(PYE_E_ARGUMENT, "expert_used_count must be 1 to " + std::to_string(narrowest) + " in this model");
    }
    index_.n_expert_used = n;
}

void Engine::start(uint64_t budget, uint64_t ram_budget) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_fresh();
    const auto n_slot = slots_for(budget);
    if (!gpus_.empty() && bundle_ && bundle_->repacked()) {
        throw Error(PYE_E_STALE, "this bundle is for the CPU's kernels; a GPU needs one made with --raw, or none");
    }
    std::vector<Class> classes; // kept only if all can be made, so that a start with another budget may follow
    for (const ShapeClass & c : index_.classes) {
        Class k;
        if (gpus_.empty()) {
            auto arena = std::make_unique<SlotArena>(c, index_.layers[c.layers[0]], c.n_expert, index_.n_expert_used);
            k.arena    = arena.get();
            k.memory   = std::move(arena);
        }
        k.store = std::make_unique<SlotStore>(c.n_expert);
        classes.push_back(std::move(k));
    }
    std::unique_ptr<RamTier> ram;
    if (!gpus_.empty()) {
        ram = std::make_unique<RamTier>(index_, gpus_[0].device);
        ram->resize(ram_slots_for(ram_budget));
    }
    classes_ = std::move(classes);
    apply_budget(n_slot);
    ram_ = std::move(ram);
    try {
        source_ = std::make_unique<ExpertSource>(
            index_, std::move(files_), std::move(bundle_),
            [this](uint32_t c) -> SlotMemory & { return *classes_[c].memory; }, ram_.get(),
            gpus_.empty() ? nullptr : &link_, &back_);
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
        (void)fill_.release();
        (void)source_.release();
        (void)prefetcher_.release();
        for (Class & c : classes_) {
            (void)c.memory.release();
        }
        (void)ram_.release();
        (void)new auto(std::move(streams_));
        closed_ = true;
        return;
    }
    std::unique_ptr<RamFill> fill;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        fill.swap(fill_);
    }
    fill.reset(); // its thread takes the lock
    std::lock_guard<std::mutex> lock(mutex_);
    source_.reset(); // first: its threads write into slots
    prefetcher_.reset();
    wait_for_streams();
    classes_.clear();
    ram_.reset();
}

// On a GPU one token's experts, on the CPU one expert; of each class.
uint32_t Engine::least_slots(const ShapeClass & c) const {
    return gpus_.empty() ? 1 : std::min(c.n_expert, std::max(1u, index_.n_expert_used));
}

bool Engine::is_on(uint32_t gpu, size_t shape_class) const {
    return gpu == kAll || index_.classes[shape_class].gpu == gpu;
}

uint64_t Engine::least_budget(uint32_t gpu) const {
    uint64_t n = 0;
    for (size_t i = 0; i < index_.classes.size(); ++i) {
        n += is_on(gpu, i) ? least_slots(index_.classes[i]) * index_.classes[i].stride : 0;
    }
    return n;
}

std::vector<uint32_t> Engine::slots_for(uint64_t budget, uint32_t gpu) const {
    const uint64_t least = least_budget(gpu);
    if (budget < least) {
        throw Error(PYE_E_BUDGET, "an expert budget of " + std::to_string(budget) +
                                      " bytes is too small for this model: at least " + std::to_string(least) +
                                      " bytes are needed");
    }
    std::vector<uint32_t> n;
    for (size_t i = 0; i < index_.classes.size(); ++i) {
        n.push_back(is_on(gpu, i) ? least_slots(index_.classes[i]) : classes_[i].store->n_slot());
    }
    return shared_out(budget, std::move(n), gpu);
}

std::vector<uint32_t> Engine::ram_slots_for(uint64_t budget) const {
    return shared_out(budget, std::vector<uint32_t>(index_.classes.size(), 0), kAll);
}

// Of what remains beyond the first `n` slots of each class on this GPU, every class gets its share by bytes; what rounding
// leaves goes to whoever fits.
std::vector<uint32_t> Engine::shared_out(uint64_t budget, std::vector<uint32_t> n, uint32_t gpu) const {
    const uint64_t first = bytes_of(n, gpu);
    uint64_t       total = 0;
    for (size_t i = 0; i < n.size(); ++i) {
        total += is_on(gpu, i) ? index_.classes[i].n_expert * index_.classes[i].stride : 0;
    }
    uint64_t     left  = std::min(budget, total) - std::min(budget, first);
    const double share = total == first ? 0.0 : static_cast<double>(left) / static_cast<double>(total - first);
    for (size_t i = 0; i < n.size(); ++i) {
        if (!is_on(gpu, i)) {
            continue;
        }
        const ShapeClass & c    = index_.classes[i];
        const auto         more = static_cast<uint32_t>(share * (c.n_expert - n[i]));
        n[i] += more;
        left -= std::min(left, more * c.stride);
    }
    for (bool given = true; given;) {
        given = false;
        for (size_t i = 0; i < n.size(); ++i) {
            if (is_on(gpu, i) && n[i] < index_.classes[i].n_expert && index_.classes[i].stride <= left) {
                left -= index_.classes[i].stride;
                ++n[i];
                given = true;
            }
        }
    }
    return n;
}

void Engine::apply_budget(const std::vector<uint32_t> & n_slot) {
    if (!gpus_.empty()) {
        take_vram(n_slot);
        return;
    }
    for (size_t i = 0; i < classes_.size(); ++i) {
        for (uint32_t slot : classes_[i].store->resize(n_slot[i])) {
            classes_[i].memory->release(slot);
        }
    }
}

// A GPU's memory cannot be taken in part: all slots of a class are made anew, empty. What was in them comes back over the link.
void Engine::take_vram(const std::vector<uint32_t> & n_slot) {
    wait_for_streams();
    ++generation_;
    for (size_t c = 0; c < classes_.size(); ++c) {
        if (classes_[c].memory == nullptr || classes_[c].store->n_slot() != n_slot[c]) {
            classes_[c].store->resize(0);
            classes_[c].memory.reset(); // first all of the old, then the new
            if (source_) {
                source_->emptied(static_cast<uint32_t>(c));
            }
        }
    }
    for (size_t c = 0; c < classes_.size(); ++c) {
        if (classes_[c].memory == nullptr && n_slot[c] > 0) { // 0: of a GPU that could not take its memory before
            const uint32_t      g     = index_.classes[c].gpu;
            const ExpertLayer & shape = index_.layers[index_.classes[c].layers[0]];
            if (bytes_of(n_slot, g) > gpus_[g].limit) {
                throw Error(PYE_E_MEMORY, std::string(ggml_backend_dev_name(gpus_[g].device)) + " may not take " +
                                              std::to_string(bytes_of(n_slot, g)) + " bytes for expert slots");
            }
            classes_[c].memory = std::make_unique<DeviceArena>(gpus_[g].device, shape, n_slot[c], index_.n_expert_used);
            classes_[c].store->resize(n_slot[c]);
        }
    }
}

void Engine::wait_for_streams() {
    for (const auto & stream : streams_) {
        ggml_backend_synchronize(stream.get());
    }
    streams_.clear();
}

uint64_t Engine::set_budget(uint64_t budget, uint32_t gpu) {
    const auto lock = locked(); // to the end: what computes must not meet a GPU without slots
    check_usable();
    auto n_slot = slots_for(budget, gpu); // throws before anything is given up
    prefetcher_->drain();
    const uint64_t least = least_budget(gpu);
    for (;;) {
        try {
            apply_budget(n_slot);
            return budget;
        } catch (const Error & e) {
            if (e.code() != PYE_E_MEMORY || budget == least) {
                throw;
            }
        }
        budget = std::max(least, static_cast<uint64_t>(kLess * static_cast<double>(bytes_of(n_slot, gpu))));
        n_slot = slots_for(budget, gpu);
    }
}

void Engine::limit_vram(uint32_t gpu, uint64_t bytes) {
    const auto lock  = locked();
    gpus_[gpu].limit = bytes;
}

uint64_t Engine::bytes_of(const std::vector<uint32_t> & n_slot, uint32_t gpu) const {
    uint64_t n = 0;
    for (size_t i = 0; i < n_slot.size(); ++i) {
        n += is_on(gpu, i) ? n_slot[i] * index_.classes[i].stride : 0;
    }
    return n;
}

void Engine::set_ram_tier(uint64_t budget) {
    const auto lock = locked();
    check_usable();
    prefetcher_->drain(); // between steps no other load is under way
    source_->end_fills();
    const auto before = ram_->slots_by_class();
    try {
        ram_->resize(ram_slots_for(budget));
    } catch (const Error &) {
        ram_->resize(before);
        throw;
    }
    if (fill_ && fill_->ended()) {
        fill_ = std::make_unique<RamFill>(mutex_, *source_);
    }
}

void Engine::set_host_threads(int n) {
    const auto lock = locked();
    check_usable();
    if (n < 0) {
        throw Error(PYE_E_ARGUMENT, "a number of threads cannot be negative");
    }
    share_.set_threads(n);
}

void Engine::fill_ram() {
    const auto lock = locked();
    check_usable();
    if (ram_ && !fill_) {
        fill_ = std::make_unique<RamFill>(mutex_, *source_);
    }
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
        if (ram_) {
            ram_->set_priorities(static_cast<uint32_t>(c), of_class);
        }
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
            if (classes_[c].memory != nullptr) {
                layouts.insert(classes_[c].memory->layout(p));
            }
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
    for (size_t c = 0; c < classes_.size(); ++c) {
        const SlotStore & store  = *classes_[c].store;
        const uint64_t    stride = index_.classes[c].stride;
        s.resident += store.n_resident();
        s.resident_bytes += store.n_resident() * stride;
        s.slots += store.n_slot();
        s.budget_bytes += store.n_slot() * stride;
    }
    s.link_bytes = link_.bytes();
    s.link_ns    = link_.busy_ns();

    s.link_bytes_per_s = static_cast<uint64_t>(link_.bytes_per_ns() * 1e9);
    if (ram_) {
        s.ram_hits         = link_.ram_hits();
        s.ram_resident     = ram_->n_resident();
        s.ram_slots        = ram_->n_slot();
        s.ram_budget_bytes = ram_->bytes();
        s.ram_demotions    = source_->counters().demotions;
        s.ram_fills        = source_->counters().fills;
        s.back_bytes       = back_.bytes();
        s.back_ns          = back_.busy_ns();
    }
    s.events_lost = events_.lost();
    return s;
}

pye_gpu Engine::gpu_state(uint32_t number) const {
    const auto lock = locked();
    if (number >= gpus_.size()) {
        throw Error(PYE_E_ARGUMENT, "no GPU " + std::to_string(number) + " is in use");
    }
    pye_gpu g = {};
    strncpy(g.name, ggml_backend_dev_name(gpus_[number].device), sizeof g.name - 1);
    g.least_budget = least_budget(number);
    g.ffns         = gpus_[number].ffns;
    for (size_t c = 0; c < index_.classes.size(); ++c) {
        const ShapeClass & k = index_.classes[c];
        if (!is_on(number, c)) {
            continue;
        }
        g.n_layer += static_cast<uint32_t>(k.layers.size());
        g.slot_bytes += k.n_expert * k.stride;
        if (c < classes_.size()) {
            g.slots += classes_[c].store->n_slot();
            g.resident += classes_[c].store->n_resident();
            g.budget_bytes += classes_[c].store->n_slot() * k.stride;
        }
    }
    return g;
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

void Engine::hear(uint32_t layer, std::vector<int32_t> * ids) {
    replay_.apply(layer, ids);
    const uint32_t n_expert = index_.layers[layer].n_expert;
    for (int32_t id : *ids) {
        if (id < 0 || static_cast<uint32_t>(id) >= n_expert) {
            throw Error(PYE_E_FORMAT,
                        "the router selected expert " + std::to_string(id) + " of " + std::to_string(n_expert));
        }
    }
}

void Engine::look_ahead(uint32_t layer, const std::vector<int32_t> & ids, const float * weights,
                        const std::vector<const float *> & gate_inputs, int64_t n_tokens) {
    if (n_tokens == 0) {
        recording_.without_output();
        return;
    }
    if (ids.size() != index_.n_expert_used * static_cast<size_t>(n_tokens)) {
        // Right all the same, but nobody may learn from it: tables have room for as many as the model says.
        if (!surprised_) {
            surprised_ = true;
            notice("routers choose " + std::to_string(ids.size() / static_cast<size_t>(n_tokens)) +
                   " experts for each token where " + std::to_string(index_.n_expert_used) +
                   " were expected; nothing is learned from them");
        }
    } else if (n_tokens > 1) {
        recording_.several();
    } else if (recording_.on()) {
        recording_.add(layer, ids.data(), weights, gate_inputs.empty() ? nullptr : gate_inputs[0]);
    }
    if (!replay_.active()) {
        prefetcher_->predict(layer, gate_inputs);
    } else if (n_tokens == 1) {
        prefetcher_->predict_replayed(layer, replay_);
    }
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
