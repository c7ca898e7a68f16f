#include "expert_index.h"

#include "error.h"
#include "rounding.h"

#include "gguf.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <sys/stat.h>
#include <unordered_set>

namespace pye {

namespace {

// llama.cpp's own limits (LLAMA_MAX_EXPERTS, LLAMA_MAX_LAYERS): it meets larger numbers with an assertion.
constexpr uint32_t kMostExperts = 1024;
constexpr uint32_t kMostBlocks  = 512;
constexpr uint32_t kMostFiles   = 9999;
constexpr uint64_t kAlign       = 64; // of a matrix in a slot; the kernels want 32 or 64

// In the order in which they lie in a slot.
constexpr std::array<const char *, 4> kRoles = {"gate_up", "gate", "up", "down"};

struct GgufFree {
    void operator()(gguf_context * g) const { gguf_free(g); }
};
using GgufPtr = std::unique_ptr<gguf_context, GgufFree>;

uint64_t size_of_file(const std::string & path) {
    struct stat st{};
    if (stat(path.c_str(), &st) != 0) {
        throw Error(PYE_E_FILE, "cannot open " + path + ": " + platform::error_text(errno));
    }
    if (!S_ISREG(st.st_mode)) {
        throw Error(PYE_E_FILE, path + " is not a regular file");
    }
    return static_cast<uint64_t>(st.st_size);
}

// gguf_init_from_file cannot say why it refused: look at the first bytes ourselves.
void check_magic(const std::string & path, uint64_t size) {
    FILE * f = fopen(path.c_str(), "rb");
    if (f == nullptr) {
        throw Error(PYE_E_FILE, "cannot open " + path + ": " + platform::error_text(errno));
    }
    char         magic[4] = {};
    const size_t n        = fread(magic, 1, sizeof magic, f);
    fclose(f);
    if (size == 0) {
        throw Error(PYE_E_FORMAT, path + " is empty");
    }
    if (n != sizeof magic || memcmp(magic, "GGUF", 4) != 0) {
        throw Error(PYE_E_FORMAT, path + " is not a GGUF file");
    }
}

[[noreturn]] void refuse_type(const std::string & path, const std::string & key) {
    throw Error(PYE_E_FORMAT, path + ": GGUF key " + key + " has an unexpected type");
}

uint32_t get_u32(const gguf_context * g, const std::string & path, const std::string & key, uint32_t otherwise) {
    const int64_t id = gguf_find_key(g, key.c_str());
    if (id < 0) {
        return otherwise;
    }
    switch (gguf_get_kv_type(g, id)) {
        case GGUF_TYPE_UINT32: return gguf_get_val_u32(g, id);
        case GGUF_TYPE_UINT16: return gguf_get_val_u16(g, id);
        case GGUF_TYPE_INT32:
            return gguf_get_val_i32(g, id) < 0 ? UINT32_MAX : static_cast<uint32_t>(gguf_get_val_i32(g, id));
        default: refuse_type(path, key);
    }
}

// Some architectures give the count per layer: the largest is what matters here.
uint32_t get_u32_or_largest(const gguf_context * g, const std::string & path, const std::string & key,
                            uint32_t otherwise) {
    const int64_t id = gguf_find_key(g, key.c_str());
    if (id < 0 || gguf_get_kv_type(g, id) != GGUF_TYPE_ARRAY) {
        return get_u32(g, path, key, otherwise);
    }
    const gguf_type type = gguf_get_arr_type(g, id);
    if (type != GGUF_TYPE_UINT32 && type != GGUF_TYPE_INT32) {
        refuse_type(path, key);
    }
    const auto * values = static_cast<const uint32_t *>(gguf_get_arr_data(g, id));
    return gguf_get_arr_n(g, id) == 0 ? 0 : *std::max_element(values, values + gguf_get_arr_n(g, id));
}

bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// model-00001-of-00003.gguf -> the three names.
std::vector<std::string> split_paths(const std::string & path, uint32_t n_file) {
    if (n_file <= 1) {
        return {path};
    }
    char suffix[64];
    snprintf(suffix, sizeof suffix, "-%05u-of-%05u.gguf", 1u, n_file);
    const std::string tail = suffix;
    if (n_file > kMostFiles || path.size() <= tail.size() || !ends_with(path, tail)) {
        throw Error(PYE_E_FORMAT, path + " says it is part of " + std::to_string(n_file) +
                                      " files, but is not named like the first of them (" + tail + ")");
    }
    std::vector<std::string> paths;
    for (uint32_t i = 1; i <= n_file; ++i) {
        snprintf(suffix, sizeof suffix, "-%05u-of-%05u.gguf", i, n_file);
        paths.push_back(path.substr(0, path.size() - tail.size()) + suffix);
    }
    return paths;
}

// blk.12.ffn_up_exps.weight -> 12 and the index into kRoles. No other spelling of the number: one name, one matrix.
bool parse_name(const char * name, uint32_t * block, uint32_t * role) {
    unsigned n = 0;
    if (sscanf(name, "blk.%5u.ffn_", &n) != 1) {
        return false;
    }
    for (uint32_t r = 0; r < kRoles.size(); ++r) {
        if ("blk." + std::to_string(n) + ".ffn_" + kRoles[r] + "_exps.weight" == name) {
            *block = n;
            *role  = r;
            return true;
        }
    }
    return false;
}

// Whether the kernels can compute with a tensor of that name in that type; most contradictions llama.cpp finds itself.
bool type_fits(const std::string & name, ggml_type type) {
    if (ends_with(name, "norm.weight")) {
        return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    }
    if (ends_with(name, "_exps.weight") || ends_with(name, "ffn_gate_inp.weight")) {
        return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr; // no integers, no F64
    }
    return true;
}

class Builder {
  public:
    explicit Builder(const std::string & path) { index_.paths = {path}; }

    ExpertIndex build() {
        for (uint32_t file = 0; file < index_.paths.size(); ++file) {
            add_file(file);
        }
        make_layers();
        make_classes();
        return std::move(index_);
    }

  private:
    struct Found {
        ExpertMatrix matrix;
        uint32_t     block, role, n_expert;
    };

    void add_file(uint32_t file) {
        const std::string path = index_.paths[file];
        const uint64_t    size = size_of_file(path);
        check_magic(path, size);
        // No ggml tensors (ctx): making them ends the process where the number of elements is one that only just fits.
        const gguf_init_params params = {/*no_alloc=*/true, /*ctx=*/nullptr};
        const GgufPtr          gguf(gguf_init_from_file(path.c_str(), params));
        if (!gguf) {
            throw Error(PYE_E_FORMAT, path + ": the GGUF metadata is damaged or truncated");
        }
        if (file == 0) {
            read_keys(gguf.get(), path);
        }
        index_.file_bytes += size;
        index_.metadata_bytes.push_back(std::min<uint64_t>(gguf_get_data_offset(gguf.get()), size));
        for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); ++i) {
            add_tensor(gguf.get(), i, file, size);
        }
    }

    void read_keys(const gguf_context * g, const std::string & path) {
        const int64_t arch = gguf_find_key(g, "general.architecture");
        if (arch < 0 || gguf_get_kv_type(g, arch) != GGUF_TYPE_STRING) {
            throw Error(PYE_E_FORMAT, path + ": GGUF key general.architecture is missing");
        }
        index_.architecture  = gguf_get_val_str(g, arch);
        index_.n_expert      = get_u32_or_largest(g, path, index_.architecture + ".expert_count", 0);
        index_.n_expert_used = get_u32_or_largest(g, path, index_.architecture + ".expert_used_count", 0);
        index_.n_block       = get_u32(g, path, index_.architecture + ".block_count", 1);
        check_counts(g, path);
        check_epsilons(g, path);
        check_tokens(g, path);
        index_.paths = split_paths(path, get_u32(g, path, "split.count", 1));
    }

    // What llama.cpp would meet with an assertion, which ends the process, is refused here with a sentence.
    void check_counts(const gguf_context * g, const std::string & path) const {
        const auto count = [&](const char * key, uint32_t otherwise) {
            return get_u32(g, path, index_.architecture + key, otherwise);
        };
        const auto refuse = [&](const char * key, uint32_t value, const std::string & why) {
            throw Error(PYE_E_FORMAT, path + ": " + key + " " + std::to_string(value) + " " + why);
        };
        const std::string fits = "does not fit expert_count " + std::to_string(index_.n_expert);
        if (index_.n_expert > kMostExperts) {
            refuse("expert_count", index_.n_expert, "is more than llama.cpp's " + std::to_string(kMostExperts));
        }
        if (index_.n_expert_used > index_.n_expert || (index_.n_expert > 0 && index_.n_expert_used == 0)) {
            refuse("expert_used_count", index_.n_expert_used, fits);
        }
        const uint32_t n_group = count(".expert_group_count", 0);
        if (n_group > 0 && (n_group >= index_.n_expert || index_.n_expert % n_group != 0)) {
            refuse("expert_group_count", n_group, fits);
        }
        const uint32_t n_group_used = count(".expert_group_used_count", 0);
        if (n_group > 1 && (n_group_used == 0 || n_group_used >= n_group)) {
            refuse("expert_group_used_count", n_group_used,
                   "does not fit expert_group_count " + std::to_string(n_group));
        }
        const uint32_t n_block = index_.n_block;
        if (n_block == 0 || n_block > kMostBlocks) {
            refuse("block_count", n_block, "is not between 1 and llama.cpp's " + std::to_string(kMostBlocks));
        }
        const uint32_t n_extra = count(".nextn_predict_layers", 0);
        if (n_extra > n_block) {
            refuse("nextn_predict_layers", n_extra, "does not fit block_count " + std::to_string(n_block));
        }
        const uint32_t n_context = count(".context_length", 0);
        if (n_context > INT32_MAX) { // it comes out of llama.cpp as a negative number
            refuse("context_length", n_context, "is absurd");
        }
    }

    // The same for the numbers that norms add to a variance, and for a vocabulary that has a token twice.
    void check_epsilons(const gguf_context * g, const std::string & path) const {
        for (const char * key : {".attention.layer_norm_rms_epsilon", ".attention.layer_norm_epsilon"}) {
            const int64_t id = gguf_find_key(g, (index_.architecture + key).c_str());
            if (id >= 0 && gguf_get_kv_type(g, id) == GGUF_TYPE_FLOAT32 && !(gguf_get_val_f32(g, id) >= 0.0f)) {
                throw Error(PYE_E_FORMAT,
                            path + ": GGUF key " + index_.architecture + key + " is negative or no number");
            }
        }
    }

    void check_tokens(const gguf_context * g, const std::string & path) const {
        const int64_t id = gguf_find_key(g, "tokenizer.ggml.tokens");
        if (id < 0 || gguf_get_kv_type(g, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(g, id) != GGUF_TYPE_STRING) {
            return;
        }
        std::unordered_set<std::string_view> seen;
        seen.reserve(gguf_get_arr_n(g, id));
        for (size_t i = 0; i < gguf_get_arr_n(g, id); ++i) {
            const std::string_view token = gguf_get_arr_str(g, id, i);
            if (!token.empty() && !seen.insert(token).second) { // llama.cpp gives empty ones names of their own
                throw Error(PYE_E_FORMAT, path + ": token " + std::to_string(i) + " of the vocabulary appears twice");
            }
        }
    }

    void add_tensor(const gguf_context * g, int64_t i, uint32_t file, uint64_t file_size) {
        const char *    name   = gguf_get_tensor_name(g, i);
        const int64_t * ne     = gguf_get_tensor_ne(g, i);
        const uint64_t  offset = gguf_get_data_offset(g) + gguf_get_tensor_offset(g, i);
        const uint64_t  bytes  = gguf_get_tensor_size(g, i);
        if (offset > file_size || bytes > file_size - offset) {
            throw Error(PYE_E_FORMAT, index_.paths[file] + ": tensor " + name + " lies past the end of the file (" +
                                          std::to_string(file_size) + " bytes; truncated?)");
        }
        const ggml_type type = gguf_get_tensor_type(g, i);
        if (!type_fits(name, type)) {
            throw Error(PYE_E_FORMAT,
                        index_.paths[file] + ": tensor " + name + " cannot be of type " + ggml_type_name(type));
        }
        uint32_t block = 0, role = 0;
        if (!parse_name(name, &block, &role)) {
            return;
        }
        if (ne[3] != 1 || ne[2] < 1 || ne[2] > kMostExperts || bytes == 0) {
            throw Error(PYE_E_FORMAT, index_.paths[file] + ": tensor " + name + " has an impossible shape");
        }
        Found f;
        f.block        = block;
        f.role         = role;
        f.n_expert     = static_cast<uint32_t>(ne[2]);
        f.matrix.name  = name;
        f.matrix.type  = type;
        f.matrix.ne0   = ne[0];
        f.matrix.ne1   = ne[1];
        f.matrix.data  = {file, offset, bytes};
        f.matrix.bytes = bytes / f.n_expert;
        index_.expert_bytes += bytes;
        found_.push_back(std::move(f));
    }

    void make_layers() {
        if (found_.empty()) {
            throw Error(PYE_E_UNSUPPORTED, "no experts in this model: nothing to manage");
        }
        if (index_.n_expert == 0) {
            throw Error(PYE_E_UNSUPPORTED, "there are expert tensors, but no GGUF key " + index_.architecture +
                                               ".expert_count to say how many experts");
        }
        std::sort(found_.begin(), found_.end(), [](const Found & a, const Found & b) {
            return a.block != b.block ? a.block < b.block : a.role < b.role;
        });
        for (Found & f : found_) {
            if (index_.layers.empty() || index_.layers.back().block != f.block) {
                index_.layers.emplace_back();
                index_.layers.back().block    = f.block;
                index_.layers.back().n_expert = f.n_expert;
            }
            ExpertLayer & layer = index_.layers.back();
            if (layer.n_expert != f.n_expert || f.n_expert < index_.n_expert_used || f.n_expert > index_.n_expert) {
                throw Error(PYE_E_FORMAT, index_.paths[f.matrix.data.file] + ": tensor " + f.matrix.name + " has " +
                                              std::to_string(f.n_expert) +
                                              " experts, which does not fit the rest of the model");
            }
            f.matrix.layer = static_cast<uint32_t>(index_.layers.size() - 1);
            f.matrix.place = static_cast<uint32_t>(layer.matrices.size());
            if (!index_.by_name.emplace(f.matrix.name, std::make_pair(f.matrix.layer, f.matrix.place)).second) {
                throw Error(PYE_E_FORMAT,
                            index_.paths[f.matrix.data.file] + ": tensor " + f.matrix.name + " appears twice");
            }
            layer.matrices.push_back(std::move(f.matrix));
        }
    }

    void make_classes() {
        std::unordered_map<std::string, uint32_t> known;
        for (uint32_t l = 0; l < index_.layers.size(); ++l) {
            ExpertLayer & layer = index_.layers[l];
            std::string   shape;
            uint64_t      at = 0;
            for (ExpertMatrix & m : layer.matrices) {
                m.in_slot = at;
                at        = round_up(at + m.bytes, kAlign);
                shape += m.name.substr(m.name.find(".ffn_")) + ':' + std::to_string(m.type) + ':' +
                         std::to_string(m.ne0) + 'x' + std::to_string(m.ne1) + ';';
            }
            const auto [it, fresh] = known.emplace(shape, static_cast<uint32_t>(index_.classes.size()));
            if (fresh) {
                index_.classes.emplace_back();
                index_.classes.back().stride = round_up(at, platform::kPage);
            }
            ShapeClass & c    = index_.classes[it->second];
            layer.shape_class = it->second;
            layer.first       = c.n_expert;
            c.n_expert += layer.n_expert;
            c.layers.push_back(l);
        }
    }

    ExpertIndex        index_;
    std::vector<Found> found_;
};

} // namespace

uint64_t ExpertIndex::slot_bytes() const {
    uint64_t n = 0;
    for (const auto & c : classes) {
        n += c.stride * c.n_expert;
    }
    return n;
}

uint64_t ExpertIndex::largest_piece() const {
    uint64_t n = 0;
    for (const auto & l : layers) {
        for (const auto & m : l.matrices) {
            n = std::max(n, m.bytes);
        }
    }
    return n;
}

const ExpertMatrix * ExpertIndex::find(const std::string & tensor) const {
    const auto it = by_name.find(tensor);
    return it == by_name.end() ? nullptr : &layers[it->second.first].matrices[it->second.second];
}

void ExpertIndex::split_classes(const std::vector<uint32_t> & gpu_of_block) {
    std::vector<ShapeClass> parts;
    for (const ShapeClass & whole : classes) {
        const size_t first_part = parts.size();
        for (uint32_t l : whole.layers) {
            ExpertLayer &  layer = layers[l];
            const uint32_t gpu   = layer.block < gpu_of_block.size() ? gpu_of_block[layer.block] : 0;
            const auto     part  = std::find_if(parts.begin() + static_cast<std::ptrdiff_t>(first_part), parts.end(),
                                                [gpu](const ShapeClass & c) { return c.gpu == gpu; });
            layer.shape_class    = static_cast<uint32_t>(part - parts.begin());
            if (part == parts.end()) {
                parts.push_back({whole.stride, 0, {}, gpu});
            }
            ShapeClass & c = parts[layer.shape_class];
            layer.first    = c.n_expert;
            c.n_expert += layer.n_expert;
            c.layers.push_back(l);
        }
    }
    classes = std::move(parts);
}

uint32_t ExpertIndex::n_in() const { return static_cast<uint32_t>(layers[0].matrices[0].ne0); }

std::pair<uint32_t, uint32_t> ExpertIndex::owner(uint32_t shape_class, uint32_t number) const {
    for (uint32_t l : classes[shape_class].layers) {
        if (number >= layers[l].first && number < layers[l].first + layers[l].n_expert) {
            return {l, number - layers[l].first};
        }
    }
    throw std::logic_error("an expert that no layer owns");
}

ExpertIndex read_expert_index(const std::string & path) { return Builder(path).build(); }

} // namespace pye
