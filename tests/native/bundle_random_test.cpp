// Damaged bundles, as they are and with their checksum made right again: whatever is in them, opening one ends with an Error or
// with a bundle that names only bytes that its file has.
#include "bundle.h"
#include "check.h"
#include "checksum.h"
#include "damage.h"
#include "error.h"
#include "expert_index_fixture.h"

#include <cstddef>

namespace {

class Trial {
  public:
    Trial() : folder_(quick_folder()), model_(folder_.file("m.gguf")), path_(folder_.file("m.bundle")) {
        silence_ggml();
        write_model(model_, small_model().build());
        // The fingerprint has the time at which the model was written: fixed, or a kept input would be stale at once.
        const timespec long_ago[2] = {{1000000000, 5}, {1000000000, 5}};
        CHECK_EQUAL(utimensat(AT_FDCWD, model_.c_str(), long_ago, 0), 0);
        index_ = pye::read_expert_index(model_);
        files_.push_back(pye::platform::open_file(model_));
        check::note("input in " + path_);
    }
    ~Trial() { pye::platform::close_file(files_[0]); }

    std::vector<uint8_t> good(bool raw) {
        std::vector<uint8_t> bytes = tables(raw);
        pye::BundlePacker    packer(index_, raw);
        pye_bundle_header    h;
        memcpy(&h, bytes.data(), sizeof h);
        for (uint32_t l = 0; l < index_.layers.size(); ++l) {
            std::vector<uint8_t> record(index_.classes[index_.layers[l].shape_class].stride);
            for (uint32_t e = 0; e < index_.layers[l].n_expert; ++e) {
                packer.record(files_, l, e, record.data());
                bytes.insert(bytes.end(), record.begin(), record.end());
            }
        }
        h.n_done = h.n_record;
        memcpy(bytes.data(), &h, sizeof h);
        set_checksum(&bytes);
        return bytes;
    }

    static void set_checksum(std::vector<uint8_t> * bytes) {
        constexpr size_t  kFrom = offsetof(pye_bundle_header, checksum) + sizeof(uint64_t);
        pye_bundle_header h;
        if (bytes->size() < sizeof h) {
            return;
        }
        memcpy(&h, bytes->data(), sizeof h);
        if (h.data_offset > kFrom && h.data_offset <= bytes->size()) {
            const uint64_t sum = pye::checksum(bytes->data() + kFrom, h.data_offset - kFrom);
            memcpy(bytes->data() + offsetof(pye_bundle_header, checksum), &sum, sizeof sum);
        }
    }

    void run(const std::vector<uint8_t> & input, bool from_corpus) {
        write_model(path_, input);
        try {
            const pye::Bundle bundle(path_, index_, files_);
            for (uint32_t l = 0; l < index_.layers.size(); ++l) {
                const uint64_t size = index_.classes[index_.layers[l].shape_class].stride;
                for (uint32_t e = 0; e < index_.layers[l].n_expert; ++e) {
                    CHECK(bundle.has(l, e));
                    CHECK_EQUAL(bundle.offset(l, e) % pye::platform::kPage, 0u);
                    CHECK(size <= input.size() && bundle.offset(l, e) <= input.size() - size);
                }
            }
            CHECK(bundle.largest_record() > 0 && bundle.largest_record() <= input.size());
            ++valid;
        } catch (const pye::Error & e) {
            CHECK(e.code() == PYE_E_FORMAT || e.code() == PYE_E_STALE);
            corpus.said(e.what(), input, input.size(), from_corpus);
            ++(e.code() == PYE_E_FORMAT ? format : stale);
        }
    }

    Corpus   corpus{"bundle"};
    uint64_t valid = 0, format = 0, stale = 0;
    uint64_t tables_size() { return tables(true).size(); }

  private:
    std::vector<uint8_t> tables(bool raw) { return pye::bundle_tables(index_, files_, raw); }

    TemporaryFolder                  folder_;
    const std::string                model_, path_;
    pye::ExpertIndex                 index_;
    std::vector<pye::platform::File> files_;
};

} // namespace

TEST(damaged_bundles_give_an_error_or_a_valid_bundle) {
    Trial trial;
    for (const auto & input : trial.corpus.inputs()) {
        trial.run(input, true);
    }
    for (const bool raw : {false, true}) { // both fit as they are
        const uint64_t before = trial.valid;
        trial.run(trial.good(raw), true);
        CHECK_EQUAL(trial.valid, before + 1);
    }
    const auto good = trial.good(true);
    for (uint32_t seed = 1; seed <= n_seed(); ++seed) {
        Damage damage(good, trial.tables_size(), seed);
        for (uint32_t i = 0; i < 300; ++i) {
            auto input = damage.next();
            if (i % 10 != 0) { // the checksum would hide every other fault
                Trial::set_checksum(&input);
            }
            try {
                trial.run(input, false);
            } catch (const check::Failed & e) {
                throw check::Failed("seed " + std::to_string(seed) + ", file " + std::to_string(i) + ": " + e.what());
            }
        }
    }
    check::note(std::to_string(trial.valid) + " valid, " + std::to_string(trial.format) + " damaged, " +
                std::to_string(trial.stale) + " stale");
    CHECK(trial.valid > n_seed()); // damage to the order's name, the checksums of records, or what is beyond the tables
    CHECK(trial.format > 10 * n_seed());
    CHECK(trial.stale > 50 * n_seed());
}

TEST(a_bundle_of_another_version_ggml_model_or_cpu_is_stale) {
    Trial      trial;
    const auto good  = trial.good(false);
    const auto stale = [&](size_t at) {
        auto input = good;
        input[at] ^= 1;
        Trial::set_checksum(&input);
        const uint64_t before = trial.stale;
        trial.run(input, true);
        CHECK_EQUAL(trial.stale, before + 1);
    };
    stale(offsetof(pye_bundle_header, format_version));
    stale(offsetof(pye_bundle_header, ggml_version));
    stale(offsetof(pye_bundle_header, architecture));
    const size_t sources = sizeof(pye_bundle_header), layers = sources + sizeof(pye_bundle_source);
    stale(sources + offsetof(pye_bundle_source, bytes));
    stale(sources + offsetof(pye_bundle_source, mtime_ns));
    stale(sources + offsetof(pye_bundle_source, digest));
    stale(layers + offsetof(pye_bundle_layer, record_bytes) + 2);
    stale(layers + offsetof(pye_bundle_layer, matrix) + offsetof(pye_bundle_matrix, type));
    stale(layers + offsetof(pye_bundle_layer, matrix) + offsetof(pye_bundle_matrix, signature));
}
