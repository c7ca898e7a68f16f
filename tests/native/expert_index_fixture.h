// What the tests of the expert index share: a small model, and what must hold for whatever index a file gives.
#pragma once

#include "check.h"
#include "expert_index.h"
#include "files.h"
#include "gguf_bytes.h"

#include <algorithm>

constexpr uint32_t kExperts = 6;

// Keys of a model with experts.
inline GgufBytes model_keys() {
    GgufBytes g;
    g.text("general.architecture", "tiny");
    g.u32("tiny.expert_count", kExperts);
    g.u32("tiny.expert_used_count", 2);
    g.u32("tiny.block_count", 9);
    return g;
}

inline void add_layer(GgufBytes & g, uint32_t block, ggml_type type, int64_t width, int64_t hidden) {
    const std::string prefix = "blk." + std::to_string(block) + ".ffn_";
    // Not in the order in which they lie in a slot.
    g.tensor(prefix + "down_exps.weight", {hidden, width, kExperts}, type);
    g.tensor(prefix + "gate_exps.weight", {width, hidden, kExperts}, type);
    g.tensor(prefix + "up_exps.weight", {width, hidden, kExperts}, type);
}

// Layers of three shape classes, ordinary tensors between them, and experts' tensors that are not weights.
inline GgufBytes small_model() {
    GgufBytes g = model_keys();
    g.tensor("token_embd.weight", {64, 10});
    add_layer(g, 0, GGML_TYPE_Q4_0, 64, 32);
    g.tensor("blk.0.ffn_up_exps.bias", {32, kExperts});
    g.tensor("blk.1.ffn_up.weight", {64, 32}, GGML_TYPE_Q8_0);
    add_layer(g, 3, GGML_TYPE_Q4_0, 64, 32);
    add_layer(g, 2, GGML_TYPE_Q8_0, 64, 32);
    g.tensor("blk.7.ffn_gate_up_exps.weight", {5, 14, kExperts}, GGML_TYPE_F16);
    g.tensor("blk.7.ffn_down_exps.weight", {7, 5, kExperts}, GGML_TYPE_F16);
    g.tensor("blk.7.ffn_gate_inp.weight", {5, kExperts});
    return g;
}

inline void write_model(const std::string & path, const std::vector<uint8_t> & bytes) {
    write_file(path, bytes.data(), bytes.size(), false);
}

// An index, whatever file it came from, names only bytes that the files have, and contradicts itself nowhere.
inline void check_index(const pye::ExpertIndex & index) {
    CHECK(!index.layers.empty());
    CHECK(!index.architecture.empty() || index.n_expert > 0);
    CHECK(index.n_expert_used >= 1);
    uint64_t file_bytes = 0, expert_bytes = 0, slot_bytes = 0, largest = 0;
    for (const std::string & path : index.paths) {
        file_bytes += file_size(path);
    }
    CHECK_EQUAL(index.file_bytes, file_bytes);
    size_t n_matrix = 0;
    for (uint32_t l = 0; l < index.layers.size(); ++l) {
        const pye::ExpertLayer & layer = index.layers[l];
        CHECK(l == 0 || index.layers[l - 1].block < layer.block);
        CHECK(layer.n_expert >= index.n_expert_used);
        CHECK(layer.shape_class < index.classes.size());
        CHECK(!layer.matrices.empty());
        uint64_t end = 0;
        for (uint32_t p = 0; p < layer.matrices.size(); ++p) {
            const pye::ExpertMatrix & m = layer.matrices[p];
            ++n_matrix;
            CHECK_EQUAL(m.layer, l);
            CHECK_EQUAL(m.place, p);
            CHECK(index.find(m.name) == &m);
            CHECK(m.type >= 0 && m.type < GGML_TYPE_COUNT);
            CHECK(m.ne0 > 0 && m.ne1 > 0 && m.bytes > 0);
            CHECK_EQUAL(m.ne0 % ggml_blck_size(m.type), 0);
            CHECK_EQUAL(m.bytes, ggml_row_size(m.type, m.ne0) * static_cast<uint64_t>(m.ne1));
            CHECK_EQUAL(m.data.size, m.bytes * layer.n_expert);
            CHECK(m.data.file < index.paths.size());
            const uint64_t size = file_size(index.paths[m.data.file]);
            CHECK(m.data.size <= size && m.data.offset <= size - m.data.size);
            CHECK_EQUAL(m.in_slot % 64, 0u);
            CHECK(m.in_slot >= end);
            end = m.in_slot + m.bytes;
            CHECK(end <= index.classes[layer.shape_class].stride);
            const pye::Segment last = m.of_expert(layer.n_expert - 1);
            CHECK_EQUAL(last.offset + last.size, m.data.offset + m.data.size);
            expert_bytes += m.data.size;
            largest = std::max(largest, m.bytes);
        }
    }
    CHECK_EQUAL(index.by_name.size(), n_matrix);
    CHECK_EQUAL(index.expert_bytes, expert_bytes);
    CHECK_EQUAL(index.largest_piece(), largest);
    for (uint32_t c = 0; c < index.classes.size(); ++c) {
        const pye::ShapeClass & shape = index.classes[c];
        CHECK(shape.stride > 0);
        CHECK_EQUAL(shape.stride % pye::platform::kPage, 0u);
        CHECK(!shape.layers.empty());
        uint32_t n = 0;
        for (const uint32_t l : shape.layers) {
            CHECK_EQUAL(index.layers[l].shape_class, c);
            CHECK_EQUAL(index.layers[l].first, n);
            n += index.layers[l].n_expert;
        }
        CHECK_EQUAL(shape.n_expert, n);
        slot_bytes += shape.stride * n;
    }
    CHECK_EQUAL(index.slot_bytes(), slot_bytes);
}

// ggml says on stderr what it finds wrong; these tests show it thousands of wrong files.
inline void silence_ggml() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
}
