/* Tells whether this machine runs AMX tile instructions. Some virtual machines advertise AMX but trap on its instructions
 * or emulate them very slowly, so the only way to know is to run some, in a process whose death harms nobody.
 *
 * Exit status: see the constants below. Death by a signal (SIGILL), or running past the caller's time limit, means the
 * same as TOO_SLOW: keep away from AMX. */
#include <cpuid.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

constexpr int WORKS        = 0;
constexpr int NOT_OFFERED  = 2; // by the processor or the kernel: ggml finds out too and does without
constexpr int WRONG_RESULT = 3;
constexpr int TOO_SLOW     = 4;

constexpr long ARCH_REQ_XCOMP_PERM = 0x1023; // kernel's asm/prctl.h, which is not installed everywhere
constexpr long XFEATURE_XTILEDATA  = 18;

// All that a tile has, and what ggml's kernels use.
constexpr int ROWS = 16, ROW_BYTES = 64;

// A multiplication takes 16 cycles in hardware, and microseconds where a hypervisor emulates it. The best of several
// batches counts, so that a busy neighbour is not taken for emulation.
constexpr int  BATCHES = 10, BATCH = 2000;
constexpr auto SLOW_BATCH = std::chrono::nanoseconds(200) * BATCH;

struct alignas(64) TileConfig {
    uint8_t  palette;
    uint8_t  start_row;
    uint8_t  reserved[14];
    uint16_t row_bytes[16];
    uint8_t  rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the layout is the processor's");

alignas(64) int8_t left[ROWS][ROW_BYTES];
alignas(64) int8_t right[ROWS][ROW_BYTES];
alignas(64) int32_t sums[ROWS][ROW_BYTES / sizeof(int32_t)];

bool offered() {
    constexpr unsigned AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25; // in edx
    unsigned           eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & AMX_TILE) && (edx & AMX_INT8) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// Adds the product of `left` and `right` BATCHES * BATCH times to `sums`. Returns the time of the fastest batch.
std::chrono::nanoseconds multiply(const TileConfig & config) {
    using Clock  = std::chrono::steady_clock;
    auto fastest = std::chrono::nanoseconds::max();
    asm volatile("ldtilecfg %0" : : "m"(config));
    asm volatile("tilezero %tmm0");
    for (int batch = 0; batch < BATCHES; ++batch) {
        const auto started = Clock::now();
        asm volatile("tileloadd (%0,%1,1), %%tmm1" : : "r"(left), "r"(long{ROW_BYTES}) : "memory");
        asm volatile("tileloadd (%0,%1,1), %%tmm2" : : "r"(right), "r"(long{ROW_BYTES}) : "memory");
        for (int i = 0; i < BATCH; ++i) {
            asm volatile("tdpbssd %tmm2, %tmm1, %tmm0");
        }
        asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(sums), "r"(long{ROW_BYTES}) : "memory");
        fastest = std::min(fastest, std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - started));
    }
    asm volatile("tilerelease");
    return fastest;
}

} // namespace

int main() {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    if (!offered()) {
        return NOT_OFFERED;
    }
    TileConfig config{};
    config.palette = 1;
    for (int tile = 0; tile < 3; ++tile) {
        config.row_bytes[tile] = ROW_BYTES;
        config.rows[tile]      = ROWS;
    }
    std::memset(left, 1, sizeof left);
    std::memset(right, 1, sizeof right);
    const auto fastest = multiply(config);
    for (const auto & row : sums) {
        for (const int32_t sum : row) {
            if (sum != ROW_BYTES * BATCHES * BATCH) {
                return WRONG_RESULT;
            }
        }
    }
    return fastest > SLOW_BATCH ? TOO_SLOW : WORKS;
}
