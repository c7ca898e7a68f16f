#include "expert_index.h"

#include "check.h"
#include "error.h"
#include "expert_index_fixture.h"

#include <set>

namespace {

bool contains(const std::string & text, const std::string & part) { return text.find(part) != std::string::npos; }

// Reads an index from these bytes.
pye::ExpertIndex index_of(const std::vector<uint8_t> & bytes) {
    silence_ggml();
    const TemporaryFolder folder;
    const std::string     path = folder.file("model.gguf");
    write_model(path, bytes);
    pye::ExpertIndex index = pye::read_expert_index(path);
    check_index(index);
    return index;
}

// Its bytes are refused with this code and a sentence that has the file's name and `part` in it.
void refused(int32_t code, const std::vector<uint8_t> & bytes, const std::string & part = "") {
    const pye::Error e = CAUGHT(pye::Error, index_of(bytes));
    if (e.code() != code || !contains(e.what(), part)) {
        throw check::Failed("code " + std::to_string(e.code()) + ", '" + e.what() + "'; expected " +
                            std::to_string(code) + " and '" + part + "'");
    }
}

using Change = void (*)(GgufBytes &);

// The keys of a model, and what `change` adds.
template <class F> std::vector<uint8_t> with(F && change) {
    GgufBytes g = model_keys();
    change(g);
    return g.build();
}

GgufBytes with_counts(uint32_t n_expert, uint32_t n_used) {
    GgufBytes g;
    g.text("general.architecture", "tiny");
    g.u32("tiny.expert_count", n_expert);
    g.u32("tiny.expert_used_count", n_used);
    add_layer(g, 0, GGML_TYPE_F32, 8, 4);
    return g;
}

} // namespace

TEST(a_model_is_indexed) {
    const auto content = [](const GgufBytes::Tensor & t, uint64_t at) {
        return pattern(static_cast<uint32_t>(t.name.size() * 31 + t.name[4]), at);
    };
    const std::vector<uint8_t> bytes = small_model().build(content);
    const pye::ExpertIndex     index = index_of(bytes);
    CHECK_EQUAL(index.architecture, "tiny");
    CHECK_EQUAL(index.n_expert, kExperts);
    CHECK_EQUAL(index.n_expert_used, 2u);
    CHECK_EQUAL(index.layers.size(), 4u);
    std::vector<uint32_t> blocks, classes, firsts;
    for (const pye::ExpertLayer & l : index.layers) {
        blocks.push_back(l.block);
        classes.push_back(l.shape_class);
        firsts.push_back(l.first);
        CHECK_EQUAL(l.n_expert, kExperts);
    }
    CHECK(blocks == (std::vector<uint32_t>{0, 2, 3, 7}));
    CHECK(classes == (std::vector<uint32_t>{0, 1, 0, 2}));
    CHECK(firsts == (std::vector<uint32_t>{0, 0, kExperts, 0}));
    // Gate, up, down whatever the file's order: gate and up side by side.
    const std::vector<pye::ExpertMatrix> & m = index.layers[0].matrices;
    CHECK_EQUAL(m.size(), 3u);
    CHECK_EQUAL(m[0].name, "blk.0.ffn_gate_exps.weight");
    CHECK_EQUAL(m[1].name, "blk.0.ffn_up_exps.weight");
    CHECK_EQUAL(m[2].name, "blk.0.ffn_down_exps.weight");
    CHECK_EQUAL(m[1].in_slot, m[0].bytes);
    CHECK_EQUAL(m[0].ne0, 64);
    CHECK_EQUAL(m[0].ne1, 32);
    CHECK_EQUAL(m[2].ne0, 32);
    CHECK(m[0].type == GGML_TYPE_Q4_0);
    CHECK_EQUAL(index.layers[3].matrices[0].name, "blk.7.ffn_gate_up_exps.weight");
    CHECK_EQUAL(index.layers[3].matrices[1].name, "blk.7.ffn_down_exps.weight");
    // The segments hold the bytes of these tensors and no others.
    for (const pye::ExpertLayer & l : index.layers) {
        for (const pye::ExpertMatrix & matrix : l.matrices) {
            const auto file = static_cast<uint32_t>(matrix.name.size() * 31 + matrix.name[4]);
            CHECK(is_pattern(bytes.data() + matrix.data.offset, file, 0, matrix.data.size));
        }
    }
    CHECK(index.find("token_embd.weight") == nullptr);
    CHECK(index.find("blk.0.ffn_up_exps.bias") == nullptr);
    CHECK(index.find("") == nullptr);
}

TEST(a_larger_alignment_is_kept) {
    GgufBytes g = model_keys();
    g.u32("general.alignment", 1024);
    g.alignment = 1024;
    g.tensor("token_embd.weight", {3, 1});
    add_layer(g, 0, GGML_TYPE_F32, 3, 5);
    const pye::ExpertIndex index = index_of(g.build());
    for (const pye::ExpertMatrix & m : index.layers[0].matrices) {
        CHECK_EQUAL(m.data.offset % 1024, 0u);
    }
}

TEST(one_name_only_makes_an_expert_matrix) {
    for (const char * name :
         {"blk.0.ffn_up.weight", "blk.0.ffn_up_exps.bias", "blk.0.ffn_up_exps.weight2", "blk.0.ffn_up_exps",
          "xblk.0.ffn_up_exps.weight", "blk.00.ffn_up_exps.weight", "blk.+0.ffn_up_exps.weight",
          "blk. 0.ffn_up_exps.weight", "blk.-1.ffn_up_exps.weight", "blk.ffn_up_exps.weight",
          "blk.0.ffn_up_shexp.weight", "blk.4294967296.ffn_up_exps.weight", "blk.0x1.ffn_up_exps.weight",
          "blk.0.ffn__exps.weight", ""}) {
        refused(PYE_E_UNSUPPORTED, with([&](GgufBytes & g) { g.tensor(name, {8, 4, kExperts}); }), "no experts");
    }
}

TEST(what_is_no_model) {
    silence_ggml();
    const TemporaryFolder folder;
    const auto            code = [&](const std::string & path) {
        const pye::Error e = CAUGHT(pye::Error, pye::read_expert_index(path));
        CHECK(contains(e.what(), path));
        return e.code();
    };
    CHECK_EQUAL(code(folder.file("missing.gguf")), PYE_E_FILE);
    CHECK_EQUAL(code(folder.file("")), PYE_E_FILE); // a folder
    CHECK_EQUAL(code("/dev/null"), PYE_E_FILE);
    refused(PYE_E_FORMAT, {}, "empty");
    refused(PYE_E_FORMAT, {'G', 'G', 'U'}, "not a GGUF file");
    refused(PYE_E_FORMAT, std::vector<uint8_t>(5000, 'x'), "not a GGUF file");
    refused(PYE_E_FORMAT, {'G', 'G', 'U', 'F'}, "model.gguf");
    refused(PYE_E_UNSUPPORTED, model_keys().build(), "no experts");
    refused(PYE_E_FORMAT, GgufBytes().build(), "general.architecture");
}

TEST(a_truncated_file_is_refused_wherever_it_ends) {
    GgufBytes                  g     = small_model();
    const std::vector<uint8_t> bytes = g.build();
    index_of(bytes);
    std::set<size_t> sizes;
    for (size_t i = 0; i < 64; ++i) {
        sizes.insert(bytes.size() * i / 64);
        sizes.insert(g.metadata_size * i / 64); // most of the file is data
    }
    sizes.insert({1, 2, 3, 4, 5, 8, 24, g.metadata_size - 1, g.metadata_size, g.data_offset - 1, g.data_offset});
    for (const size_t size : sizes) {
        refused(PYE_E_FORMAT, std::vector<uint8_t>(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size)));
    }
    // Only the padding behind the last tensor may be missing.
    const uint64_t       last = kExperts * 5 * sizeof(float);
    std::vector<uint8_t> cut(bytes.begin(), bytes.end() - static_cast<std::ptrdiff_t>((32 - last % 32) % 32));
    index_of(cut);
    cut.pop_back();
    refused(PYE_E_FORMAT, cut, "truncated");
}

TEST(counts_of_experts) {
    index_of(with_counts(kExperts, 1).build());
    index_of(with_counts(kExperts, kExperts).build());
    refused(PYE_E_UNSUPPORTED, with_counts(0, 0).build(), "expert_count");
    refused(PYE_E_FORMAT, with_counts(0, 2).build());
    refused(PYE_E_FORMAT, with_counts(kExperts, 0).build(), "expert_used_count");
    refused(PYE_E_FORMAT, with_counts(kExperts, kExperts + 1).build(), "expert_used_count");
    refused(PYE_E_FORMAT, with_counts(UINT32_MAX, 2).build(), "expert_count");
    refused(PYE_E_FORMAT, with_counts(UINT32_MAX, UINT32_MAX).build(), "expert_count");
    refused(PYE_E_FORMAT, with_counts(kExperts - 1, 2).build(), "does not fit"); // the tensors have more
    GgufBytes no_keys;
    no_keys.text("general.architecture", "tiny");
    add_layer(no_keys, 0, GGML_TYPE_F32, 8, 4);
    refused(PYE_E_UNSUPPORTED, no_keys.build(), "expert_count");
}

TEST(counts_of_other_types) {
    const auto counts = [](const auto & change) {
        GgufBytes g;
        g.text("general.architecture", "tiny");
        change(g);
        add_layer(g, 0, GGML_TYPE_F32, 8, 4);
        return g.build();
    };
    for (const gguf_type type : {GGUF_TYPE_INT32, GGUF_TYPE_UINT32}) {
        index_of(counts([&](GgufBytes & g) {
            g.number<int32_t>("tiny.expert_count", type, kExperts).number<int32_t>("tiny.expert_used_count", type, 2);
        }));
    }
    // One count per layer: the largest.
    const pye::ExpertIndex index = index_of(counts([](GgufBytes & g) {
        g.array<uint32_t>("tiny.expert_count", GGUF_TYPE_UINT32, {0, kExperts, 1});
        g.array<int32_t>("tiny.expert_used_count", GGUF_TYPE_INT32, {0, 2, 1});
    }));
    CHECK_EQUAL(index.n_expert, kExperts);
    CHECK_EQUAL(index.n_expert_used, 2u);

    const Change wrong[] = {
        [](GgufBytes & g) { g.number<int32_t>("tiny.expert_count", GGUF_TYPE_INT32, -1); },
        [](GgufBytes & g) { g.number<uint8_t>("tiny.expert_count", GGUF_TYPE_BOOL, 1); },
        [](GgufBytes & g) { g.number<float>("tiny.expert_count", GGUF_TYPE_FLOAT32, 6); },
        [](GgufBytes & g) { g.text("tiny.expert_count", "6"); },
        [](GgufBytes & g) { g.array<float>("tiny.expert_count", GGUF_TYPE_FLOAT32, {6}); },
        [](GgufBytes & g) { g.array<uint32_t>("tiny.expert_count", GGUF_TYPE_UINT32, {}); },
        [](GgufBytes & g) { g.array<int32_t>("tiny.expert_count", GGUF_TYPE_INT32, {6, -1}); },
    };
    for (const Change change : wrong) {
        refused(PYE_E_FORMAT, counts([&](GgufBytes & g) {
                    change(g);
                    g.u32("tiny.expert_used_count", 2);
                }));
    }
}

TEST(an_architecture_that_is_no_text) {
    GgufBytes g;
    g.u32("general.architecture", 7);
    refused(PYE_E_FORMAT, g.build(), "general.architecture");
    GgufBytes of_texts;
    of_texts.raw("general.architecture", GGUF_TYPE_ARRAY,
                 std::vector<uint8_t>{8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 'x'});
    refused(PYE_E_FORMAT, of_texts.build(), "general.architecture");
}

TEST(tensors_that_cannot_be) {
    const std::string name           = "blk.0.ffn_up_exps.weight";
    const auto        refused_tensor = [&](const GgufBytes::Tensor & t) {
        refused(PYE_E_FORMAT, with([&](GgufBytes & g) { g.tensor(t); }));
    };
    refused_tensor({name, {0, 4, kExperts}, GGML_TYPE_F32, {}, {}, {}});
    refused_tensor({name, {8, 0, kExperts}, GGML_TYPE_F32, {}, {}, {}});
    refused_tensor({name, {8, 4, 0}, GGML_TYPE_F32, {}, {}, {}});
    refused_tensor({name, {8, 4, kExperts, 0}, GGML_TYPE_F32, {}, {}, {}});
    refused_tensor({name, {8, 4, kExperts, 2}, GGML_TYPE_F32, {}, {}, {}});
    refused_tensor({name, {8, 4, kExperts + 1}, GGML_TYPE_F32, {}, {}, {}}); // more than expert_count
    refused_tensor({name, {8, 4}, GGML_TYPE_F32, {}, {}, {}});               // one expert, two are used
    refused_tensor({name, {8, 4, 5000}, GGML_TYPE_F32, {}, {}, {}});
    refused_tensor({name, {-8, 4, kExperts}, GGML_TYPE_F32, {}, 96, {}});
    refused_tensor({name, {8, 4, int64_t(1) << 32 | kExperts}, GGML_TYPE_F32, {}, 96, {}});
    refused_tensor({name, {int64_t(1) << 40, int64_t(1) << 40, kExperts}, GGML_TYPE_F32, {}, 96, {}});
    refused_tensor({name, {INT64_MAX}, GGML_TYPE_F32, {}, 96, {}});
    // As many elements as can be counted at all: ggml_new_tensor() ends the process over these.
    refused_tensor({name, {INT64_MAX / 4, 1, 4}, GGML_TYPE_I8, {}, 96, {}});
    refused_tensor({name, {1, INT64_MAX}, GGML_TYPE_F16, {}, 96, {}});
    refused_tensor({name, {32, INT64_MAX / 32}, GGML_TYPE_Q4_0, {}, 96, {}});
    refused_tensor({name, {INT64_MAX / 4, 4, 0}, GGML_TYPE_I8, {}, 96, {}});
    refused_tensor({name, {8, 4, kExperts}, GGML_TYPE_F32, uint64_t(32), {}, {}});
    refused_tensor({name, {8, 4, kExperts}, GGML_TYPE_F32, UINT64_MAX - 31, {}, {}});
    refused_tensor({name, {8, 4, kExperts}, GGML_TYPE_F32, {}, 8 * 4 * kExperts * 4 - 32, {}}); // data too short
    refused_tensor({name, {33, 4, kExperts}, GGML_TYPE_Q4_0, {}, 4096, {}});                    // no whole blocks
    refused_tensor({name, {8, 4, kExperts}, GGML_TYPE_F32, {}, {}, 0xffffffffu});
    refused_tensor({name, {8, 4, kExperts, 1, 1}, GGML_TYPE_F32, {}, {}, {}});
    refused_tensor({std::string(64, 'n'), {8}, GGML_TYPE_F32, {}, {}, {}});
    for (const int32_t type : {-1, 4, 5, int32_t(GGML_TYPE_COUNT), INT32_MAX, INT32_MIN}) { // 4 and 5 were types once
        refused_tensor({name, {64, 4, kExperts}, type, {}, 96, {}});
    }
    // Layers whose tensors disagree about the number of experts.
    refused(PYE_E_FORMAT, with([](GgufBytes & g) {
                g.tensor("blk.0.ffn_up_exps.weight", {8, 4, kExperts});
                g.tensor("blk.0.ffn_down_exps.weight", {4, 8, kExperts - 1});
            }),
            "does not fit");
    refused(PYE_E_FORMAT, with([](GgufBytes & g) {
                g.tensor("blk.0.ffn_up_exps.weight", {8, 4, kExperts});
                g.tensor("blk.0.ffn_up_exps.weight", {8, 4, kExperts});
            }));
    // The same name for ggml, which stops at the zero byte; not for the file.
    refused(PYE_E_FORMAT, with([](GgufBytes & g) {
                g.tensor(std::string("blk.0.ffn_up_exps.weight\0a", 26), {8, 4, kExperts});
                g.tensor(std::string("blk.0.ffn_up_exps.weight\0b", 26), {8, 4, kExperts});
            }));
}

TEST(headers_and_keys_that_cannot_be) {
    const auto model = [](Change change) {
        GgufBytes g = model_keys();
        add_layer(g, 0, GGML_TYPE_F32, 8, 4);
        change(g);
        return g.build();
    };
    index_of(model([](GgufBytes &) {}));
    const Change wrong[] = {
        [](GgufBytes & g) { g.version = 0; },
        [](GgufBytes & g) { g.version = 1; },
        [](GgufBytes & g) { g.version = 4; },
        [](GgufBytes & g) { g.version = 0x03000000; },
        [](GgufBytes & g) { g.magic = "FUGG"; },
        [](GgufBytes & g) { g.n_key = 1; },
        [](GgufBytes & g) { g.n_key = 100; },
        [](GgufBytes & g) { g.n_key = INT64_MAX; },
        [](GgufBytes & g) { g.n_key = UINT64_MAX; },
        [](GgufBytes & g) { g.n_tensor = 100; },
        [](GgufBytes & g) { g.n_tensor = INT64_MAX / 1000; },
        [](GgufBytes & g) { g.n_tensor = INT64_MAX; },
        [](GgufBytes & g) { g.n_tensor = UINT64_MAX; },
        [](GgufBytes & g) { g.u32("", 1); },
        [](GgufBytes & g) { g.u32("twice", 1).u32("twice", 1); },
        [](GgufBytes & g) { g.raw("text", GGUF_TYPE_STRING, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}); },
        [](GgufBytes & g) { g.raw("no type", 13, {}); },
        [](GgufBytes & g) { g.raw("no type", -1, {}); },
        [](GgufBytes & g) { g.raw("array of arrays", GGUF_TYPE_ARRAY, {9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}); },
        [](GgufBytes & g) { g.raw("long array", GGUF_TYPE_ARRAY, {0, 0, 0, 0, 0xff, 0xff, 0xff, 0x3f, 0, 0, 0, 0}); },
        [](GgufBytes & g) {
            g.raw("long array", GGUF_TYPE_ARRAY, {8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff});
        },
        [](GgufBytes & g) { g.u32("general.alignment", 0); },
        [](GgufBytes & g) { g.u32("general.alignment", 3); },
        [](GgufBytes & g) { g.u32("general.alignment", 1u << 31); },
        [](GgufBytes & g) { g.text("general.alignment", "32"); },
        [](GgufBytes & g) { g.array<uint32_t>("general.alignment", GGUF_TYPE_UINT32, {}); },
        [](GgufBytes & g) { g.text("split.count", "2"); },
        [](GgufBytes & g) { g.u32("split.count", 2); }, // not named like a part
        [](GgufBytes & g) { g.u32("split.count", UINT32_MAX); },
        [](GgufBytes & g) { g.number<int32_t>("split.count", GGUF_TYPE_INT32, -5); },
    };
    for (const Change change : wrong) {
        refused(PYE_E_FORMAT, model(change));
    }
    index_of(model([](GgufBytes & g) { g.number<uint16_t>("split.count", GGUF_TYPE_UINT16, 0); }));
    index_of(model([](GgufBytes & g) { g.number<uint16_t>("split.count", GGUF_TYPE_UINT16, 1); }));
}

TEST(split_models) {
    silence_ggml();
    const TemporaryFolder folder;
    const auto            part = [](uint16_t number, uint32_t block) {
        GgufBytes g = number == 1 ? model_keys() : GgufBytes();
        g.number<uint16_t>("split.no", GGUF_TYPE_UINT16, static_cast<uint16_t>(number - 1));
        g.number<uint16_t>("split.count", GGUF_TYPE_UINT16, 3);
        add_layer(g, block, GGML_TYPE_Q8_0, 64, 32);
        return g.build([=](const GgufBytes::Tensor & t, uint64_t at) { return pattern(number, at + t.name.size()); });
    };
    const auto name = [&](int number) { return folder.file("m-0000" + std::to_string(number) + "-of-00003.gguf"); };
    std::vector<std::vector<uint8_t>> bytes = {part(1, 4), part(2, 0), part(3, 2)};
    for (int i = 1; i <= 3; ++i) {
        write_model(name(i), bytes[static_cast<size_t>(i - 1)]);
    }
    const pye::ExpertIndex index = pye::read_expert_index(name(1));
    check_index(index);
    CHECK(index.paths == (std::vector<std::string>{name(1), name(2), name(3)}));
    CHECK_EQUAL(index.layers.size(), 3u);
    CHECK_EQUAL(index.classes.size(), 1u);
    CHECK_EQUAL(index.layers[0].matrices[0].data.file, 1u);
    CHECK_EQUAL(index.layers[1].matrices[0].data.file, 2u);
    CHECK_EQUAL(index.layers[2].matrices[0].data.file, 0u);
    for (const pye::ExpertLayer & l : index.layers) {
        for (const pye::ExpertMatrix & m : l.matrices) {
            const std::vector<uint8_t> & in = bytes[m.data.file];
            CHECK(in[m.data.offset] == pattern(m.data.file + 1, m.name.size()));
        }
    }

    const auto refused_first = [&](int32_t code, const std::string & path, const std::string & part_of_sentence) {
        const pye::Error e = CAUGHT(pye::Error, pye::read_expert_index(path));
        CHECK_EQUAL(e.code(), code);
        if (!contains(e.what(), part_of_sentence)) {
            throw check::Failed(e.what());
        }
    };
    refused_first(PYE_E_FORMAT, name(2), "general.architecture"); // only the first part has the keys
    write_model(folder.file("other.gguf"), bytes[0]);
    refused_first(PYE_E_FORMAT, folder.file("other.gguf"), "-00001-of-00003.gguf");
    GgufBytes absurd = model_keys();
    absurd.u32("split.count", 10000);
    write_model(folder.file("m-00001-of-10000.gguf"), absurd.build());
    refused_first(PYE_E_FORMAT, folder.file("m-00001-of-10000.gguf"), "10000");

    write_model(name(2), std::vector<uint8_t>(bytes[1].begin(), bytes[1].end() - 5000));
    refused_first(PYE_E_FORMAT, name(1), name(2));
    write_model(name(2), bytes[2]); // the same layer twice
    refused_first(PYE_E_FORMAT, name(1), "twice");
    unlink(name(2).c_str());
    refused_first(PYE_E_FILE, name(1), name(2));
}
