#include "expert_source.h"

#include <algorithm>

namespace pye {

namespace {

constexpr uint32_t kIoThreads = 4; // deep enough for an NVMe queue, few enough to leave the cores to the kernels

// A load's tag: slot, shape class, and whether the bytes are a whole record that must be taken apart.
constexpr uint64_t kRecord = uint64_t(1) << 63;

uint64_t tag_of(uint32_t shape_class, uint32_t slot) { return uint64_t(shape_class) << 32 | slot; }
uint32_t class_of(uint64_t tag) { return static_cast<uint32_t>((tag & ~kRecord) >> 32); }

} // namespace

ExpertSource::ExpertSource(const ExpertIndex & index, std::vector<platform::File> model_files,
                           std::unique_ptr<Bundle> bundle, Arena arena)
    : index_(index), bundle_(std::move(bundle)), bundle_file_(static_cast<uint32_t>(model_files.size())),
      arena_(std::move(arena)) {
    uint64_t largest = index_.largest_piece();
    if (bundle_) {
        model_files.push_back(bundle_->release_file());
        largest = std::max(largest, bundle_->largest_record());
    }
    disk_ = std::make_unique<DiskTier>(
        std::move(model_files), largest, kIoThreads,
        [this](uint64_t tag, uint32_t piece, const uint8_t * bytes) { place(tag, piece, bytes); });
}

void ExpertSource::load_begin(uint32_t layer, uint32_t expert, uint32_t slot) {
    const ExpertLayer & l     = index_.layers[layer];
    const uint64_t      tag   = tag_of(l.shape_class, slot);
    SlotArena &         arena = arena_(l.shape_class);
    if (bundle_ && bundle_->has(layer, expert)) {
        Read record;
        record.segment  = {bundle_file_, bundle_->offset(layer, expert), index_.classes[l.shape_class].stride};
        record.checked  = true;
        record.checksum = bundle_->checksum(layer, expert);
        if (bundle_->repacked()) {
            record.into = arena.at(slot);
        }
        disk_->load_begin(bundle_->repacked() ? tag : tag | kRecord, {record});
        return;
    }
    std::vector<Read> pieces;
    for (const ExpertMatrix & m : l.matrices) {
        pieces.push_back({m.of_expert(expert)});
    }
    disk_->load_begin(tag, std::move(pieces));
}

bool ExpertSource::load_again(uint32_t layer, uint32_t expert, uint32_t slot) {
    if (!bundle_ || !bundle_->has(layer, expert)) {
        return false;
    }
    bundle_->give_up(layer, expert);
    load_begin(layer, expert, slot);
    return true;
}

void ExpertSource::place(uint64_t tag, uint32_t piece, const uint8_t * bytes) {
    const uint32_t shape_class = class_of(tag), slot = static_cast<uint32_t>(tag);
    SlotArena &    arena = arena_(shape_class);
    if ((tag & kRecord) != 0) {
        for (const ExpertMatrix & m : index_.layers[index_.classes[shape_class].layers[0]].matrices) {
            arena.write(slot, m.place, bytes + m.in_slot);
        }
    } else if (bytes != arena.at(slot)) {
        arena.write(slot, piece, bytes);
    }
}

} // namespace pye
