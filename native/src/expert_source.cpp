#include "expert_source.h"

#include "rounding.h"

#include <algorithm>

namespace pye {

namespace {

constexpr uint32_t kIoThreads = 4; // deep enough for an NVMe queue, few enough to leave the cores to the kernels

// What Place is told of a read that is a record, and not one of the matrices.
constexpr uint32_t kRecord = UINT32_MAX - 1;
// Nor is it to be put anywhere else.
constexpr uint32_t kNowhere = UINT32_MAX - 2;

// In the tags of loads that end in RAM.
constexpr uint64_t kFill = uint64_t(1) << 63;

// A prefetch reads a record in pieces of about this size, so that a demand load need not wait for long. Smaller ones cost
// bandwidth: of 13 MB records, 256 KiB at a time came at 0.8 of the speed and took ten times the processor.
constexpr uint64_t kChunk = 1 << 20;

uint64_t fill_tag(uint32_t layer, uint32_t expert) { return kFill | uint64_t(layer) << 32 | expert; }
uint32_t class_in(uint64_t tag) { return static_cast<uint32_t>(tag >> 32); }

} // namespace

ExpertSource::ExpertSource(const ExpertIndex & index, std::vector<platform::File> model_files,
                           std::unique_ptr<Bundle> bundle, Slots slots, RamTier * ram, Link * link, Link * back)
    : index_(index), bundle_(std::move(bundle)), bundle_file_(static_cast<uint32_t>(model_files.size())),
      slots_(std::move(slots)), ram_(ram), link_(link) {
    for (const ExpertLayer & l : index_.layers) {
        sound_.emplace_back(l.n_expert, 0);
        unfillable_.emplace_back(l.n_expert, 0);
    }
    if (ram_ != nullptr) {
        demotions_ = std::make_unique<Demotions>(index_, *back);
        for (const ShapeClass & c : index_.classes) {
            ways_.emplace_back(c.n_expert, Way::Past);
        }
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
    Whole               whole;
    uint8_t *           room = nullptr; // in RAM, on the way
    if (ram_ != nullptr) {
        if (ram_->comes(layer, expert)) { // nobody waits for the quiet that reading ahead waits for
            disk_->end_fill(fill_tag(layer, expert));
            settle_fills();
        }
        Way &           way  = ways_[l.shape_class][slot];
        const uint8_t * here = ram_->find(layer, expert); // before others take its slot
        demote(l.shape_class, slot);
        if (here != nullptr) {
            way = Way::From;
            std::vector<Read> pieces;
            for (const ExpertMatrix & m : l.matrices) {
                pieces.push_back({m.of_expert(expert)});
                pieces.back().here = here + m.in_slot;
            }
            link_->from_ram();
            disk_->load_begin(tag_of(layer, slot), std::move(pieces), urgency, whole);
            return;
        }
        room = ram_->claim(layer, expert);
        way  = room == nullptr ? Way::Past : Way::Through;
    } else if (bundle_ && bundle_->repacked() && bundle_->has(layer, expert)) { // a record is a slot's image
        room = slots_(l.shape_class).at(slot);
    }
    const bool whole_in_place = bundle_ && bundle_->repacked();
    auto       pieces         = reads(layer, expert, room, urgency == Urgency::Prefetch && whole_in_place, &whole);
    disk_->load_begin(tag_of(layer, slot), std::move(pieces), urgency, whole);
}

std::vector<Read> ExpertSource::reads(uint32_t layer, uint32_t expert, uint8_t * room, bool small_pieces,
                                      Whole * whole) {
    const ExpertLayer & l = index_.layers[layer];
    std::vector<Read>   pieces;
    if (!bundle_ || !bundle_->has(layer, expert)) {
        for (const ExpertMatrix & m : l.matrices) {
            pieces.push_back({m.of_expert(expert), room == nullptr ? nullptr : room + m.in_slot});
        }
        return pieces;
    }
    Read record;
    record.segment  = {bundle_file_, bundle_->offset(layer, expert), index_.classes[l.shape_class].stride};
    record.checked  = sound_[layer][expert] == 0;
    record.checksum = bundle_->checksum(layer, expert);
    record.place    = kRecord;
    record.into     = room;
    if (!small_pieces || room == nullptr || record.segment.size <= kChunk) {
        pieces.push_back(record);
        return pieces;
    }
    if (record.checked) {
        *whole = {record.into, record.segment.size, record.checksum, record.segment};
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
    return pieces;
}

bool ExpertSource::fill_begin() {
    uint32_t layer = 0, expert = 0;
    if (!ram_->next_to_fill([this](uint32_t l, uint32_t e) { return unfillable_[l][e] == 0; }, &layer, &expert)) {
        return false;
    }
    uint8_t *         room = ram_->claim(layer, expert);
    Whole             whole;
    std::vector<Read> pieces;
    for (const Read & read : reads(layer, expert, room, true, &whole)) {
        // A matrix is read in pieces too.
        for (uint64_t at = 0; at < read.segment.size; at += kChunk) {
            Read chunk  = read;
            chunk.place = kNowhere;
            if (!read.checked) {
                chunk.segment.offset += at;
                chunk.segment.size = std::min(kChunk, read.segment.size - at);
                chunk.into += at;
            }
            pieces.push_back(chunk);
            if (read.checked) {
                break;
            }
        }
    }
    disk_->load_begin(fill_tag(layer, expert), std::move(pieces), Urgency::Fill, whole);
    return true;
}

void ExpertSource::settle_fills() {
    DiskTier::Landed landed;
    while (disk_->fill_poll(&landed)) {
        fill_landed(landed);
    }
}

void ExpertSource::end_fills() {
    disk_->cancel_fills();
    while (disk_->n_fill() > 0) {
        disk_->fill_wait();
        settle_fills();
    }
}

void ExpertSource::fill_landed(const DiskTier::Landed & landed) {
    const auto layer = static_cast<uint32_t>((landed.tag & ~kFill) >> 32), expert = static_cast<uint32_t>(landed.tag);
    ram_->arrived(layer, expert, landed.ok);
    if (landed.ok) {
        sound_[layer][expert] = 1;
        ++counters_.fills;
    } else if (!landed.cancelled) {
        unfillable_[layer][expert] = 1; // who needs it will say why
    }
}

uint32_t ExpertSource::class_of(const DiskTier::Landed & landed) { return class_in(landed.tag); }

uint64_t ExpertSource::tag_of(uint32_t layer, uint32_t slot) const {
    return uint64_t(index_.layers[layer].shape_class) << 32 | slot;
}

void  ExpertSource::promote(uint32_t layer, uint32_t slot) { disk_->promote(tag_of(layer, slot)); }
void  ExpertSource::cancel(uint32_t layer, uint32_t slot) { disk_->cancel(tag_of(layer, slot)); }
float ExpertSource::unread(uint32_t layer, uint32_t slot) { return disk_->unread(tag_of(layer, slot)); }

void ExpertSource::landed(uint32_t layer, uint32_t expert, uint32_t slot, bool ok) {
    if (ok) {
        sound_[layer][expert] = 1;
    }
    if (ram_ == nullptr) {
        return;
    }
    const uint32_t   shape_class = index_.layers[layer].shape_class;
    Demotions::Ended back;
    if (demotions_->end(shape_class, slot, slots_(shape_class), &back)) {
        ram_->arrived(back.layer, back.expert, back.ok);
        counters_.demotions += back.ok;
    }
    Way & way = ways_[shape_class][slot];
    if (way == Way::From) {
        ram_->unpin(layer, expert);
    } else if (way == Way::Through) {
        ram_->arrived(layer, expert, ok);
    }
    way = Way::Past;
    if (ok) {
        ram_->entered_vram(layer, expert);
    }
}

void ExpertSource::evicted(uint32_t layer, uint32_t expert, uint32_t slot, bool passes) {
    if (ram_ != nullptr) {
        ram_->left_vram(layer, expert);
        leaving_ = {layer, expert, slot, passes};
    }
}

// Whoever has just left this slot.
void ExpertSource::demote(uint32_t shape_class, uint32_t slot) {
    const Leaving x = leaving_;
    leaving_        = {};
    if (x.slot == slot && index_.layers[x.layer].shape_class == shape_class) {
        if (uint8_t * to = ram_->claim_for_demotion(x.layer, x.expert, x.passes)) {
            demotions_->begin(shape_class, slot, x.layer, x.expert, to);
        }
    }
}

void ExpertSource::emptied(uint32_t shape_class) {
    if (ram_ != nullptr) {
        ram_->all_left_vram(shape_class);
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
    if (piece == kNowhere) {
        return;
    }
    const uint32_t shape_class = class_in(tag), slot = static_cast<uint32_t>(tag);
    SlotMemory &   slots    = slots_(shape_class);
    const auto &   matrices = index_.layers[index_.classes[shape_class].layers[0]].matrices;
    const auto     write    = [&](const ExpertMatrix & m, const uint8_t * from) {
        if (link_ != nullptr) {
            demotions_->before_write(shape_class, slot, slots, m);
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
