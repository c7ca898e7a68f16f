// Bundles: what this model's bundle must look like on this machine, making its records, and opening one that fits. The format
// is in pyengine.h.
#pragma once

#include "expert_index.h"
#include "pyengine.h"
#include "slot_arena.h"

#include <memory>
#include <string>
#include <vector>

namespace pye {

// Header and tables, as at the start of the file, records in file order. Throws Error(PYE_E_FILE).
std::vector<uint8_t> bundle_tables(const ExpertIndex & index, const std::vector<platform::File> & files, bool raw);

// Makes records from the model's files.
class BundlePacker {
  public:
    BundlePacker(const ExpertIndex & index, bool raw) : index_(index), raw_(raw), arenas_(index.classes.size()) {}

    // Fills the record of one expert. Throws Error(PYE_E_FILE).
    void record(const std::vector<platform::File> & files, uint32_t layer, uint32_t expert, uint8_t * out);

  private:
    const ExpertIndex &                     index_;
    bool                                    raw_;
    std::vector<std::unique_ptr<SlotArena>> arenas_; // by class, one slot each
    std::vector<uint8_t>                    matrix_;
};

// An open bundle that fits the model.
class Bundle {
  public:
    // Throws Error: PYE_E_FILE, PYE_E_FORMAT (damaged, incomplete), PYE_E_STALE (of another model, ggml or CPU).
    Bundle(const std::string & path, const ExpertIndex & index, const std::vector<platform::File> & model_files);
    ~Bundle();
    Bundle(const Bundle &)             = delete;
    Bundle & operator=(const Bundle &) = delete;

    platform::File         release_file(); // to the disk tier
    const platform::File & file() const { return file_; }
    const std::string &    path() const { return path_; }
    bool                   repacked() const { return repacked_; } // records are as slots are

    // Whether the record of an expert is there and has not been given up.
    bool     has(uint32_t layer, uint32_t expert) const { return places_[layers_[layer].first + expert].offset != 0; }
    uint64_t offset(uint32_t layer, uint32_t expert) const { return places_[layers_[layer].first + expert].offset; }
    uint64_t checksum(uint32_t layer, uint32_t expert) const { return places_[layers_[layer].first + expert].checksum; }
    void     give_up(uint32_t layer, uint32_t expert) { places_[layers_[layer].first + expert].offset = 0; }
    uint64_t largest_record() const;

  private:
    void read_tables(const ExpertIndex & index, const std::vector<platform::File> & model_files);

    std::string                   path_;
    platform::File                file_;
    bool                          repacked_ = false;
    std::vector<pye_bundle_layer> layers_;
    std::vector<pye_bundle_place> places_;
};

} // namespace pye
