// Builds the bytes of a GGUF file, right ones and wrong ones: every number can be given a false value.
#pragma once

#include "ggml.h"
#include "gguf.h"

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

class GgufBytes {
  public:
    struct Tensor {
        std::string          name;
        std::vector<int64_t> ne;
        int32_t              type = GGML_TYPE_F32;
        // Filled in by build() unless given.
        std::optional<uint64_t> offset, size;
        std::optional<uint32_t> n_dimension;
    };

    GgufBytes & text(const std::string & key, const std::string & value) {
        add_key(key, GGUF_TYPE_STRING);
        put_text(keys_, value);
        return *this;
    }
    template <class T> GgufBytes & number(const std::string & key, gguf_type type, T value) {
        add_key(key, type);
        put(keys_, value);
        return *this;
    }
    GgufBytes & u32(const std::string & key, uint32_t value) { return number(key, GGUF_TYPE_UINT32, value); }
    template <class T> GgufBytes & array(const std::string & key, gguf_type type, const std::vector<T> & values) {
        add_key(key, GGUF_TYPE_ARRAY);
        put(keys_, static_cast<int32_t>(type));
        put(keys_, uint64_t(values.size()));
        for (const T & v : values) {
            put(keys_, v);
        }
        return *this;
    }
    // A key whose value is whatever these bytes are.
    GgufBytes & raw(const std::string & key, int32_t type, const std::vector<uint8_t> & value) {
        add_key(key, type);
        keys_.insert(keys_.end(), value.begin(), value.end());
        return *this;
    }

    GgufBytes & tensor(Tensor t) {
        tensors_.push_back(std::move(t));
        return *this;
    }
    GgufBytes & tensor(const std::string & name, std::vector<int64_t> ne, ggml_type type = GGML_TYPE_F32) {
        return tensor(Tensor{name, std::move(ne), type, {}, {}, {}});
    }

    // False values for the header.
    std::string             magic   = "GGUF";
    uint32_t                version = 3;
    std::optional<uint64_t> n_key, n_tensor;
    uint64_t                alignment = 32; // of the data; a key has to say so too if it is another

    // The whole file. Data are made by `data(tensor, byte)`; bytes of no tensor are 0xaa.
    template <class F> std::vector<uint8_t> build(F && data) {
        std::vector<uint8_t> out(magic.begin(), magic.end());
        put(out, version);
        put(out, n_tensor.value_or(tensors_.size()));
        put(out, n_key.value_or(n_keys_));
        out.insert(out.end(), keys_.begin(), keys_.end());
        uint64_t at = 0;
        for (const Tensor & t : tensors_) {
            put_text(out, t.name);
            put(out, t.n_dimension.value_or(static_cast<uint32_t>(t.ne.size())));
            for (const int64_t n : t.ne) {
                put(out, n);
            }
            put(out, t.type);
            put(out, t.offset.value_or(at));
            at = padded(at + size_of(t));
        }
        metadata_size = out.size();
        out.resize(padded(out.size()), 0xaa);
        data_offset = out.size();
        for (const Tensor & t : tensors_) {
            const uint64_t size = size_of(t);
            for (uint64_t i = 0; i < size; ++i) {
                out.push_back(data(t, i));
            }
            out.resize(padded(out.size()), 0xaa);
        }
        return out;
    }
    std::vector<uint8_t> build() {
        return build([](const Tensor &, uint64_t) { return uint8_t(0); });
    }

    // Of the file that build() made last, bytes.
    uint64_t metadata_size = 0, data_offset = 0;

    static uint64_t size_of(const Tensor & t) {
        if (t.size) {
            return *t.size; // also if the type is none and ggml could not say
        }
        uint64_t size = ggml_row_size(static_cast<ggml_type>(t.type), t.ne.empty() ? 1 : t.ne[0]);
        for (size_t i = 1; i < t.ne.size(); ++i) {
            size *= static_cast<uint64_t>(t.ne[i]);
        }
        return size;
    }

  private:
    template <class T> static void put(std::vector<uint8_t> & out, T value) {
        uint8_t bytes[sizeof value];
        memcpy(bytes, &value, sizeof value); // little-endian, as every machine we build for
        out.insert(out.end(), bytes, bytes + sizeof value);
    }
    static void put_text(std::vector<uint8_t> & out, const std::string & text) {
        put(out, uint64_t(text.size()));
        out.insert(out.end(), text.begin(), text.end());
    }
    void add_key(const std::string & key, int32_t type) {
        put_text(keys_, key);
        put(keys_, type);
        ++n_keys_;
    }
    uint64_t padded(uint64_t n) const { return (n + alignment - 1) / alignment * alignment; }

    std::vector<uint8_t> keys_;
    uint64_t             n_keys_ = 0;
    std::vector<Tensor>  tensors_;
};
