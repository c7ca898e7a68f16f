#include "expert_source.h"

#include "rounding.h"

#include <algorithm>

namespace pye {

namespace {

constexpr uint32_t kIoThreads = 4; // deep enough for an NVMe queue, few enough to leave the cores to the kernels

// What Place is told of a read that is a record, and not one of the matrices.
constexpr uint32_t kRecord = UINT32_MAX - 1;

// A prefetch reads a record in pieces of about this size, so that a demand load need not wait for long. Smaller ones cost
// bandwidth: of 13 MB records, 256 KiB at a time came at 0.8 of the speed and took ten times the processor.
constexpr uint64_t kChunk = 1 << 20;

uint32_t class_in(uint64_t tag) { return static_cast<uint32_t>(tag >> 32); }

} // namespace

ExpertSource::ExpertSource(const ExpertIndex & index, std::vector<platform::File> model_files,
                           std::unique_ptr<Bundle> bundle, Slots slots, RamTier * ram, Link * link)
    : index_(index), bundle_(std::move(bundle)), bundle_file_(static_cast<uint32_t>(model_files.size())),
      slots_(std::move(slots)), ram_(ram), link_(link) {
    for (const ExpertLayer & l : index_.layers) {
        sound_.emplace_back(l.n_expert, 0);
    }
    uint64_t largest = index_.largest_piece();
    if (bundle_) {
        model_files.push_back(bundle_->release_file());
        largest = std::max(largest, bundle_->largest_record());
    }
    disk_ = std::make_unique<DiskTier>(
        std::move(model_files), largest, kIoThreads,
        [this](uint64_t tag, uint32_t piece, const uint8_t * bytes) { place(tag, piece, bytes); });
}

void ExpertSource::load_begin(uint32_t layer, uint32_t expert, uint32_t slot, Urgency urgency) {
    urgency               = preempt_ ? urgency : Urgency::Demand;
    const ExpertLayer & l = index_.layers[layer];
    std::vector<Read>   pieces;
    Whole               whole;
    uint8_t *           room = nullptr; // in RAM, on the way
    if (ram_ != nullptr) {
        if (const uint8_t * here = ram_->find(layer, expert)) {
            for (const ExpertMatrix & m : l.matrices) {
                pieces.push_back({m.of_expert(expert)});
                pieces.back().here = here + m.in_slot;
            }
            link_->from_ram();
            disk_->load_begin(tag_of(layer, slot), std::move(pieces), urgency, whole);
            return;
        }
        room = ram_->claim(layer, expert);
    }
    if (bundle_ && bundle_->has(layer, expert)) {
        Read record;
        record.segment  = {bundle_file_, bundle_->offset(layer, expert), index_.classes[l.shape_class].stride};
        record.checked  = sound_[layer][expert] == 0;
        record.checksum = bundle_->checksum(layer, expert);
        record.place    = kRecord;
        record.into     = room != nullptr ? room : bundle_->repacked() ? slots_(l.shape_class).at(slot) : nullptr;
        if (urgency == Urgency::Prefetch && bundle_->repacked() && record.into != nullptr &&
            record.segment.size > kChunk) {
            if (record.checked) {
                whole = {record.into, record.segment.size, record.checksum, record.segment};
            }
            record.checked       = false;
            const uint64_t n     = (record.segment.size + kChunk / 2) / kChunk;
            const uint64_t bytes = round_up((record.segment.size + n - 1) / n, platform::kPage);
            for (uint64_t at = 0; at < record.segment.size; at += bytes) {
                Read chunk           = record;
                chunk.segment.offset = record.segment.offset + at;
                chunk.segment.size   = std::min(bytes, record.segment.size - at);
                chunk.into           = record.into + at;
                pieces.push_back(chunk);
            }
        } else {
            pieces.push_back(record);
        }
    } else {
        for (const ExpertMatrix & m : l.matrices) {
            pieces.push_back({m.of_expert(expert), room == nullptr ? nullptr : room + m.in_slot});
        }
    }
    disk_->load_begin(tag_of(layer, slot), std::move(pieces), urgency, whole);
}

uint32_t ExpertSource::class_of(const DiskTier::Landed & landed) { return class_in(landed.tag); }

uint64_t ExpertSource::tag_of(uint32_t layer, uint32_t slot) const {
    return uint64_t(index_.layers[layer].shape_class) << 32 | slot;
}

void  ExpertSource::promote(uint32_t layer, uint32_t slot) { disk_->promote(tag_of(layer, slot)); }
void  ExpertSource::cancel(uint32_t layer, uint32_t slot) { disk_->cancel(tag_of(layer, slot)); }
float ExpertSource::unread(uint32_t layer, uint32_t slot) { return disk_->unread(tag_of(layer, slot)); }

void ExpertSource::landed(uint32_t layer, uint32_t expert, bool ok) {
    if (ok) {
        sound_[layer][expert] = 1;
    }
    if (ram_ != nullptr) {
        ram_->landed(layer, expert, ok);
    }
}

void ExpertSource::evicted(uint32_t layer, uint32_t expert) {
    if (ram_ != nullptr) {
        ram_->left_vram(layer, expert);
    }
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
    const uint32_t shape_class = class_in(tag), slot = static_cast<uint32_t>(tag);
    SlotMemory &   slots    = slots_(shape_class);
    const auto &   matrices = index_.layers[index_.classes[shape_class].layers[0]].matrices;
    const auto     write    = [&](const ExpertMatrix & m, const uint8_t * from) {
        if (link_ != nullptr) {
            link_->move(m.bytes, [&] { slots.write(slot, m.place, from); });
        } else {
            slots.write(slot, m.place, from);
        }
    };
    if (piece != kRecord) {
        write(matrices[piece], bytes);
    } else if (!bundle_->repacked()) { // else it lies in the slot already
        for (const ExpertMatrix & m : matrices) {
            write(m, bytes + m.in_slot);
        }
    }
}

} // namespace pye
