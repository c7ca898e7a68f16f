// Damaged files: whatever is in them, reading the index ends with an Error or with an index that check_index() accepts.
#include "check.h"
#include "damage.h"
#include "error.h"
#include "expert_index.h"
#include "expert_index_fixture.h"

namespace {

// A crash leaves the input behind, in the folder that the note names.
class Trial {
  public:
    Trial() : folder_(quick_folder()), path_(folder_.file("damaged.gguf")) {
        silence_ggml();
        check::note("input in " + path_);
    }

    void run(const std::vector<uint8_t> & input, bool from_corpus) {
        write_model(path_, input);
        try {
            const pye::ExpertIndex index = pye::read_expert_index(path_);
            check_index(index);
            ++valid;
        } catch (const pye::Error & e) {
            CHECK(e.code() == PYE_E_FORMAT || e.code() == PYE_E_UNSUPPORTED || e.code() == PYE_E_FILE);
            CHECK(strlen(e.what()) > 0);
            corpus.said(e.what(), input, metadata_size + 64, from_corpus);
            ++(e.code() == PYE_E_FORMAT ? format : other);
        }
    }

    uint64_t metadata_size = 0; // of the good file
    Corpus   corpus{"gguf"};
    uint64_t valid = 0, format = 0, other = 0;

  private:
    TemporaryFolder   folder_;
    const std::string path_;
};

} // namespace

TEST(damaged_files_give_an_error_or_a_valid_index) {
    GgufBytes  model = small_model();
    const auto bytes = model.build();
    Trial      trial;
    trial.metadata_size = model.metadata_size;
    for (const auto & input : trial.corpus.inputs()) {
        trial.run(input, true);
    }
    for (uint32_t seed = 1; seed <= n_seed(); ++seed) {
        Damage damage(bytes, model.metadata_size, seed); // to the data it changes nothing that an index says
        for (uint32_t i = 0; i < 500; ++i) {
            try {
                trial.run(damage.next(), false);
            } catch (const check::Failed & e) {
                throw check::Failed("seed " + std::to_string(seed) + ", file " + std::to_string(i) + ": " + e.what());
            }
        }
    }
    check::note(std::to_string(trial.valid) + " valid, " + std::to_string(trial.format) + " refused, " +
                std::to_string(trial.other) + " otherwise");
    CHECK(trial.valid > 10 * n_seed()); // damage to names of ordinary tensors and the like is none
    CHECK(trial.format > 100 * n_seed());
}
