// What the GGUF files say about experts: which tensors, where, how large, and which share a shape class. Reads metadata
// only and distrusts every number in it.
#pragma once

#include "disk_tier.h"

#include "ggml.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace pye {

// One of an expert layer's stacked weights, e.g. blk.3.ffn_up_exps.weight: [ne0, ne1, n_expert].
struct ExpertMatrix {
    std::string name;
    ggml_type   type    = GGML_TYPE_COUNT;
    int64_t     ne0     = 0; // input width, elements
    int64_t     ne1     = 0; // output width, rows
    uint32_t    layer   = 0; // index into ExpertIndex::layers
    uint32_t    place   = 0; // index into ExpertLayer::matrices, and piece of a load
    uint64_t    bytes   = 0; // of one expert
    uint64_t    in_slot = 0; // byte offset in a slot
    Segment     data;        // all experts

    Segment of_expert(uint32_t expert) const { return {data.file, data.offset + expert * bytes, bytes}; }
};

struct ExpertLayer {
    uint32_t                  block       = 0; // N of blk.N
    uint32_t                  n_expert    = 0;
    uint32_t                  shape_class = 0;
    uint32_t                  first       = 0; // number of its expert 0 within the class
    std::vector<ExpertMatrix> matrices;        // gate, up, down, or gate_up, down
};

// Layers whose experts have the same matrices (role, type, size) in the same order and lie on the same device.
struct ShapeClass {
    uint64_t              stride   = 0; // bytes of a slot
    uint32_t              n_expert = 0; // over all its layers
    std::vector<uint32_t> layers;
    uint32_t              gpu = 0; // number of the GPU that computes them, if there is any
};

struct ExpertIndex {
    std::string              architecture;
    uint32_t                 n_expert      = 0; // GGUF key <arch>.expert_count
    uint32_t                 n_expert_used = 0; // GGUF key <arch>.expert_used_count
    uint32_t                 n_block       = 0; // GGUF key <arch>.block_count
    uint64_t                 file_bytes    = 0;
    uint64_t                 expert_bytes  = 0;
    std::vector<std::string> paths;
    std::vector<uint64_t>    metadata_bytes; // of each file, all before the tensor data
    std::vector<ExpertLayer> layers;
    std::vector<ShapeClass>  classes;
    std::unordered_map<std::string, std::pair<uint32_t, uint32_t>> by_name; // -> layer, place

    uint64_t             slot_bytes() const; // slots for every expert
    uint64_t             largest_piece() const;
    uint32_t             n_in() const; // width of gate inputs, elements
    const ExpertMatrix * find(const std::string & tensor) const;
    // Layers on different GPUs share no slots: a class of its own for each. `gpu_of_block` [n_block]. Once, before use.
    void split_classes(const std::vector<uint32_t> & gpu_of_block);
    // Layer and id of an expert of a class, by its number within the class.
    std::pair<uint32_t, uint32_t> owner(uint32_t shape_class, uint32_t number) const;
};

// `path` is the model, or the first file of a split one. Throws Error: PYE_E_FILE, PYE_E_FORMAT, PYE_E_UNSUPPORTED.
ExpertIndex read_expert_index(const std::string & path);

} // namespace pye
