// Damaged files: whatever is in them, reading the index ends with an Error or with an index that check_index() accepts.
// A crash leaves the input behind, in the folder that the message of the last note names.
#include "check.h"
#include "error.h"
#include "expert_index.h"
#include "expert_index_fixture.h"

#include <cstdlib>
#include <random>

namespace {

class Damage {
  public:
    Damage(std::vector<uint8_t> good, uint64_t metadata_size, uint32_t seed)
        : good_(std::move(good)), metadata_size_(metadata_size), random_(seed) {}

    std::vector<uint8_t> next() {
        std::vector<uint8_t> bytes = good_;
        for (uint32_t n = 1 + below(4); n > 0; --n) {
            // Damage to the data changes nothing that an index says.
            const uint64_t at = below(metadata_size_);
            switch (below(8)) {
                case 0:
                case 1:
                case 2: bytes[at] ^= static_cast<uint8_t>(1u << below(8)); break;
                case 3: bytes[at] = static_cast<uint8_t>(random_()); break;
                case 4: set_number(bytes, at); break;
                case 5:
                    bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), 1 + below(9), uint8_t(below(256)));
                    break;
                case 6:
                    bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at),
                                bytes.begin() +
                                    static_cast<std::ptrdiff_t>(std::min<uint64_t>(at + 1 + below(9), bytes.size())));
                    break;
                default: copy_within(bytes, at); break;
            }
        }
        if (below(20) == 0) {
            bytes.resize(below(bytes.size() + 1));
        }
        return bytes;
    }

  private:
    uint64_t below(uint64_t n) { return random_() % n; }

    // A whole number where one may be: 32 or 64 bits, one of those at which arithmetic goes wrong.
    void set_number(std::vector<uint8_t> & bytes, uint64_t at) {
        const uint64_t odd[] = {0,
                                1,
                                2,
                                31,
                                64,
                                1024,
                                1025,
                                65536,
                                INT32_MAX,
                                uint64_t(INT32_MAX) + 1,
                                UINT32_MAX,
                                uint64_t(UINT32_MAX) + 1,
                                uint64_t(1) << 40,
                                INT64_MAX / 4,
                                INT64_MAX - 31,
                                uint64_t(1) << 63,
                                UINT64_MAX - 31,
                                UINT64_MAX};
        const uint64_t value = odd[below(std::size(odd))];
        const uint64_t size  = below(2) == 0 ? 4 : 8;
        if (at + size <= bytes.size()) {
            memcpy(bytes.data() + at, &value, size);
        }
    }

    // A piece of the file in another place: keys, names and types that are right, but not there.
    void copy_within(std::vector<uint8_t> & bytes, uint64_t to) {
        const uint64_t size = 1 + below(64), from = below(metadata_size_);
        if (to + size <= bytes.size() && from + size <= good_.size()) {
            memcpy(bytes.data() + to, good_.data() + from, size);
        }
    }

    std::vector<uint8_t> good_;
    uint64_t             metadata_size_;
    std::mt19937_64      random_;
};

#ifdef __SANITIZE_THREAD__
constexpr uint32_t kSeeds = 2; // slow, and there is but one thread
#else
constexpr uint32_t kSeeds = 8;
#endif

// In memory if possible: thousands of files are written.
std::string quick_folder() { return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "."; }

} // namespace

TEST(damaged_files_give_an_error_or_a_valid_index) {
    silence_ggml();
    const char *      wished = getenv("PYENGINE_FUZZ_SEEDS"); // for a longer run by hand
    const uint32_t    n_seed = wished == nullptr ? kSeeds : static_cast<uint32_t>(strtoul(wished, nullptr, 10));
    uint64_t          valid = 0, format = 0, other = 0;
    GgufBytes         model = small_model();
    const auto        bytes = model.build();
    TemporaryFolder   folder(quick_folder());
    const std::string path = folder.file("damaged.gguf");
    check::note("input in " + path);
    for (uint32_t seed = 1; seed <= n_seed; ++seed) {
        Damage damage(bytes, model.metadata_size, seed);
        for (uint32_t i = 0; i < 500; ++i) {
            write_model(path, damage.next());
            try {
                const pye::ExpertIndex index = pye::read_expert_index(path);
                check_index(index);
                ++valid;
            } catch (const pye::Error & e) {
                CHECK(e.code() == PYE_E_FORMAT || e.code() == PYE_E_UNSUPPORTED || e.code() == PYE_E_FILE);
                CHECK(strlen(e.what()) > 0);
                ++(e.code() == PYE_E_FORMAT ? format : other);
            } catch (const check::Failed & e) {
                throw check::Failed("seed " + std::to_string(seed) + ", file " + std::to_string(i) + ": " + e.what());
            }
        }
    }
    check::note(std::to_string(valid) + " valid, " + std::to_string(format) + " refused, " + std::to_string(other) +
                " otherwise");
    CHECK(valid > 10 * n_seed); // damage to names of ordinary tensors and the like is none
    CHECK(format > 100 * n_seed);
}
