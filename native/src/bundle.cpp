#include "bundle.h"

#include "checksum.h"
#include "error.h"
#include "rounding.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>

namespace pye {

namespace {

constexpr char     kMagic[8]     = "pyebndl";
constexpr uint64_t kSample       = 4096;       // bytes of each expert tensor in a source's digest
constexpr uint64_t kChunk        = 1u << 20;   // of reading metadata
constexpr uint64_t kMostTables   = 256u << 20; // 7 million experts
constexpr size_t   kChecksumFrom = offsetof(pye_bundle_header, checksum) + sizeof(uint64_t);

static_assert(sizeof(pye_bundle_header) == 256 && sizeof(pye_bundle_source) == 24 && sizeof(pye_bundle_matrix) == 64 &&
                  sizeof(pye_bundle_layer) == 216 && sizeof(pye_bundle_place) == 16,
              "the format's sizes are the same on every machine");

std::unique_ptr<SlotArena> arena_of(const ExpertIndex & index, uint32_t shape_class) {
    const ShapeClass & c = index.classes[shape_class];
    return std::make_unique<SlotArena>(c, index.layers[c.layers[0]], 1, index.n_expert_used);
}

uint64_t digest_of(const ExpertIndex & index, uint32_t file, const platform::File & f) {
    Checksum             sum;
    std::vector<uint8_t> bytes(kChunk);
    for (uint64_t at = 0; at < index.metadata_bytes[file]; at += kChunk) {
        const uint64_t n = std::min(kChunk, index.metadata_bytes[file] - at);
        read_now(f, at, n, bytes.data());
        sum.add(bytes.data(), n);
    }
    std::vector<Segment> tensors;
    for (const ExpertLayer & l : index.layers) {
        for (const ExpertMatrix & m : l.matrices) {
            if (m.data.file == file) {
                tensors.push_back(m.data);
            }
        }
    }
    std::sort(tensors.begin(), tensors.end(), [](const Segment & a, const Segment & b) { return a.offset < b.offset; });
    for (const Segment & t : tensors) {
        const uint64_t n = std::min(kSample, t.size);
        read_now(f, t.offset, n, bytes.data());
        sum.add(bytes.data(), n);
    }
    return sum.value();
}

template <class T> void append(std::vector<uint8_t> * out, const T & value) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto * bytes = reinterpret_cast<const uint8_t *>(&value);
    out->insert(out->end(), bytes, bytes + sizeof value);
}

void copy_text(char * to, size_t capacity, const std::string & text) {
    memcpy(to, text.data(), std::min(capacity - 1, text.size()));
}

std::string role_of(const ExpertMatrix & m) { // blk.3.ffn_gate_up_exps.weight
    const size_t from = m.name.find(".ffn_") + 5;
    return m.name.substr(from, m.name.find("_exps", from) - from);
}

pye_bundle_header header_of(const ExpertIndex & index) {
    pye_bundle_header h = {};
    memcpy(h.magic, kMagic, sizeof kMagic);
    h.format_version = PYE_BUNDLE_VERSION;
    h.header_bytes   = sizeof h;
    h.n_source       = static_cast<uint32_t>(index.paths.size());
    h.n_variant      = 1;
    h.n_layer        = static_cast<uint32_t>(index.layers.size());
    for (const ExpertLayer & l : index.layers) {
        h.n_record += l.n_expert;
    }
    copy_text(h.ggml_version, sizeof h.ggml_version, PYE_GGML_VERSION);
    copy_text(h.architecture, sizeof h.architecture, index.architecture);
    copy_text(h.order, sizeof h.order, "file");
    h.data_offset =
        round_up(sizeof h + uint64_t(h.n_source) * sizeof(pye_bundle_source) +
                     uint64_t(h.n_layer) * sizeof(pye_bundle_layer) + uint64_t(h.n_record) * sizeof(pye_bundle_place),
                 platform::kPage);
    return h;
}

std::vector<pye_bundle_layer> layers_of(const ExpertIndex & index, bool raw) {
    std::vector<std::vector<uint64_t>> signatures(index.classes.size()); // by class and place
    if (!raw) {
        for (uint32_t c = 0; c < index.classes.size(); ++c) {
            const auto arena = arena_of(index, c);
            for (uint32_t p = 0; p < index.layers[index.classes[c].layers[0]].matrices.size(); ++p) {
                signatures[c].push_back(arena->signature(p));
            }
        }
    }
    std::vector<pye_bundle_layer> layers;
    uint32_t                      first = 0;
    for (const ExpertLayer & l : index.layers) {
        pye_bundle_layer b = {};
        b.block            = l.block;
        b.n_expert         = l.n_expert;
        b.n_matrix         = static_cast<uint32_t>(l.matrices.size());
        b.first            = first;
        b.record_bytes     = index.classes[l.shape_class].stride;
        first += l.n_expert;
        for (uint32_t p = 0; p < l.matrices.size(); ++p) {
            const ExpertMatrix & m  = l.matrices[p];
            pye_bundle_matrix &  to = b.matrix[p];
            copy_text(to.role, sizeof to.role, role_of(m));
            to.type      = m.type;
            to.signature = raw ? 0 : signatures[l.shape_class][p];
            to.repacked  = to.signature != 0;
            to.ne0       = static_cast<uint64_t>(m.ne0);
            to.ne1       = static_cast<uint64_t>(m.ne1);
            to.offset    = m.in_slot;
            to.bytes     = m.bytes;
        }
        layers.push_back(b);
    }
    return layers;
}

std::vector<pye_bundle_source> sources_of(const ExpertIndex & index, const std::vector<platform::File> & files) {
    std::vector<pye_bundle_source> sources;
    for (uint32_t f = 0; f < index.paths.size(); ++f) {
        sources.push_back({files[f].size, files[f].mtime, digest_of(index, f, files[f])});
    }
    return sources;
}

} // namespace

std::vector<uint8_t> bundle_tables(const ExpertIndex & index, const std::vector<platform::File> & files, bool raw) {
    pye_bundle_header             h      = header_of(index);
    const auto                    layers = layers_of(index, raw);
    std::vector<pye_bundle_place> places;
    uint64_t                      at = h.data_offset;
    for (const pye_bundle_layer & l : layers) {
        for (uint32_t e = 0; e < l.n_expert; ++e) {
            places.push_back({at, 0});
            at += l.record_bytes;
        }
    }
    h.file_bytes = at;
    std::vector<uint8_t> out;
    append(&out, h);
    for (const auto & s : sources_of(index, files)) {
        append(&out, s);
    }
    for (const auto & l : layers) {
        append(&out, l);
    }
    for (const auto & p : places) {
        append(&out, p);
    }
    out.resize(h.data_offset);
    const uint64_t sum = checksum(out.data() + kChecksumFrom, out.size() - kChecksumFrom);
    memcpy(out.data() + offsetof(pye_bundle_header, checksum), &sum, sizeof sum);
    return out;
}

void BundlePacker::record(const std::vector<platform::File> & files, uint32_t layer, uint32_t expert, uint8_t * out) {
    if (layer >= index_.layers.size() || expert >= index_.layers[layer].n_expert) {
        throw Error(PYE_E_ARGUMENT, "no such expert");
    }
    const ExpertLayer & l      = index_.layers[layer];
    const uint64_t      stride = index_.classes[l.shape_class].stride;
    if (raw_) {
        memset(out, 0, stride);
        for (const ExpertMatrix & m : l.matrices) {
            const Segment s = m.of_expert(expert);
            read_now(files[s.file], s.offset, s.size, out + m.in_slot);
        }
        return;
    }
    auto & arena = arenas_[l.shape_class];
    if (!arena) {
        arena = arena_of(index_, l.shape_class);
    }
    for (const ExpertMatrix & m : l.matrices) {
        const Segment s = m.of_expert(expert);
        matrix_.resize(std::max<uint64_t>(matrix_.size(), s.size));
        read_now(files[s.file], s.offset, s.size, matrix_.data());
        arena->write(0, m.place, matrix_.data());
    }
    memcpy(out, arena->at(0), stride);
}

Bundle::Bundle(const std::string & path, const ExpertIndex & index, const std::vector<platform::File> & model_files)
    : path_(path), file_(platform::open_file(path)) {
    try {
        read_tables(index, model_files);
    } catch (...) {
        platform::close_file(file_);
        throw;
    }
}

Bundle::~Bundle() { platform::close_file(file_); }

platform::File Bundle::release_file() {
    platform::File f = file_;
    file_.fd         = -1;
    return f;
}

uint64_t Bundle::largest_record() const {
    uint64_t n = 0;
    for (const auto & l : layers_) {
        n = std::max(n, l.record_bytes);
    }
    return n;
}

// Trusts nothing before the checksum agrees, and of the rest only what is equal to what this model's bundle must say.
void Bundle::read_tables(const ExpertIndex & index, const std::vector<platform::File> & model_files) {
    const auto damaged = [this](const std::string & how) { return Error(PYE_E_FORMAT, path_ + " is damaged: " + how); };
    const auto stale   = [this](const std::string & how) { return Error(PYE_E_STALE, path_ + " is stale: " + how); };

    pye_bundle_header h = {};
    if (file_.size < sizeof h) {
        throw damaged("too short for a bundle");
    }
    read_now(file_, 0, sizeof h, &h);
    if (memcmp(h.magic, kMagic, sizeof kMagic) != 0) {
        throw Error(PYE_E_FORMAT, path_ + " is not a bundle");
    }
    if (h.format_version != PYE_BUNDLE_VERSION || h.header_bytes != sizeof h) {
        throw stale("it has format version " + std::to_string(h.format_version) + ", this is version " +
                    std::to_string(PYE_BUNDLE_VERSION));
    }
    if (h.data_offset < sizeof h || h.data_offset > kMostTables || h.data_offset % platform::kPage != 0 ||
        h.data_offset > file_.size) {
        throw damaged("its tables lie past its end");
    }
    std::vector<uint8_t> bytes(h.data_offset);
    read_now(file_, 0, bytes.size(), bytes.data());
    if (pye::checksum(bytes.data() + kChecksumFrom, bytes.size() - kChecksumFrom) != h.checksum) {
        throw damaged("the checksum of its tables is wrong");
    }

    const pye_bundle_header expected = header_of(index);
    if (strncmp(h.ggml_version, expected.ggml_version, sizeof h.ggml_version) != 0) {
        throw stale("it was made for ggml " +
                    std::string(h.ggml_version, strnlen(h.ggml_version, sizeof h.ggml_version)) + ", this is ggml " +
                    expected.ggml_version);
    }
    if (strncmp(h.architecture, expected.architecture, sizeof h.architecture) != 0 || h.n_source != expected.n_source ||
        h.n_layer != expected.n_layer || h.n_record != expected.n_record) {
        throw stale("it is of another model");
    }
    if (h.n_variant < 1 || h.n_variant > 64) {
        throw damaged("it has " + std::to_string(h.n_variant) + " variants");
    }
    const uint64_t need = sizeof h + uint64_t(h.n_source) * sizeof(pye_bundle_source) +
                          uint64_t(h.n_variant) * (uint64_t(h.n_layer) * sizeof(pye_bundle_layer) +
                                                   uint64_t(h.n_record) * sizeof(pye_bundle_place));
    if (need > h.data_offset) {
        throw damaged("its tables do not fit before its data");
    }
    if (h.n_done != uint64_t(h.n_variant) * h.n_record) {
        throw Error(PYE_E_FORMAT, path_ + " is incomplete: its making was interrupted");
    }
    const uint8_t * at      = bytes.data() + sizeof h;
    const auto      sources = sources_of(index, model_files);
    for (uint32_t i = 0; i < h.n_source; ++i, at += sizeof(pye_bundle_source)) {
        pye_bundle_source s;
        memcpy(&s, at, sizeof s);
        if (s.bytes != sources[i].bytes || s.digest != sources[i].digest) {
            throw stale("it is of another model than " + index.paths[i]);
        }
        if (s.mtime_ns != sources[i].mtime_ns) {
            throw stale(index.paths[i] +
                        " was written after it was made (copied perhaps?); check it against the model");
        }
    }
    layers_.resize(h.n_layer);
    memcpy(layers_.data(), at, h.n_layer * sizeof(pye_bundle_layer));
    at += uint64_t(h.n_variant) * h.n_layer * sizeof(pye_bundle_layer);
    places_.resize(h.n_record);
    memcpy(places_.data(), at, h.n_record * sizeof(pye_bundle_place));

    const auto same = [this](const std::vector<pye_bundle_layer> & other) {
        return memcmp(layers_.data(), other.data(), other.size() * sizeof(pye_bundle_layer)) == 0;
    };
    repacked_ = same(layers_of(index, false));
    if (!repacked_ && !same(layers_of(index, true))) {
        throw stale("its experts are in the layout of another CPU, or of another model");
    }
    for (const pye_bundle_layer & l : layers_) {
        for (uint32_t e = 0; e < l.n_expert; ++e) {
            const uint64_t offset = places_[l.first + e].offset;
            if (offset < h.data_offset || offset % platform::kPage != 0 || l.record_bytes > file_.size ||
                offset > file_.size - l.record_bytes) {
                throw damaged("a record lies past its end (" + std::to_string(file_.size) + " bytes; truncated?)");
            }
        }
    }
}

} // namespace pye
