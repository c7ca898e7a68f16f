// How should the disk tier read? Random direct reads of expert-sized pieces: a pool of sleeping threads against io_uring, at
// several depths. Prints CSV: method, depth, piece bytes, MB/s, CPU seconds per GB.
//
//   g++ -O2 -std=c++17 -pthread bench/disk_reads.cpp -o build/disk_reads && build/disk_reads FILE [SECONDS] > out.csv
//
// FILE should be larger than the drive's own cache; 2 GiB is made if it does not exist.
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <mutex>
#include <random>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

constexpr size_t kAlign = 4096;

struct Result {
    uint64_t bytes   = 0;
    double   seconds = 0;
    double   cpu     = 0;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double cpu_seconds() {
    rusage u{};
    getrusage(RUSAGE_SELF, &u);
    return double(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * double(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

[[noreturn]] void die(const char * what) {
    perror(what);
    exit(1);
}

char * aligned(size_t n) {
    void * p = nullptr;
    if (posix_memalign(&p, kAlign, n) != 0) {
        die("memory");
    }
    memset(p, 1, n); // fault in before the clock starts
    return static_cast<char *>(p);
}

class Offsets {
  public:
    Offsets(uint64_t file, size_t piece, unsigned seed) : n_((file - piece) / kAlign), random_(seed) {}
    uint64_t next() { return random_() % n_ * kAlign; }

  private:
    uint64_t        n_;
    std::mt19937_64 random_;
};

Result with_threads(int fd, uint64_t file, size_t piece, unsigned depth, double seconds) {
    std::atomic<uint64_t>    bytes{0};
    std::vector<std::thread> threads;
    const double             cpu = cpu_seconds(), start = now();
    for (unsigned i = 0; i < depth; ++i) {
        threads.emplace_back([&, i] {
            Offsets offsets(file, piece, i + 1);
            char *  buffer = aligned(piece);
            while (now() - start < seconds) {
                if (pread(fd, buffer, piece, off_t(offsets.next())) != ssize_t(piece)) {
                    die("pread");
                }
                bytes += piece;
            }
            free(buffer);
        });
    }
    for (auto & t : threads) {
        t.join();
    }
    return {bytes, now() - start, cpu_seconds() - cpu};
}

// The kernel's interface as it stands: one ring, one submitting thread, which sleeps for completions.
class Ring {
  public:
    explicit Ring(unsigned depth) {
        io_uring_params p{};
        fd_ = int(syscall(SYS_io_uring_setup, depth, &p));
        if (fd_ < 0) {
            die("io_uring_setup");
        }
        char * sq = map(p.sq_off.array + p.sq_entries * sizeof(uint32_t), IORING_OFF_SQ_RING);
        char * cq = map(p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
        sqes_     = reinterpret_cast<io_uring_sqe *>(map(p.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
        sq_tail_  = reinterpret_cast<std::atomic<uint32_t> *>(sq + p.sq_off.tail);
        sq_mask_  = *reinterpret_cast<uint32_t *>(sq + p.sq_off.ring_mask);
        sq_array_ = reinterpret_cast<uint32_t *>(sq + p.sq_off.array);
        cq_head_  = reinterpret_cast<std::atomic<uint32_t> *>(cq + p.cq_off.head);
        cq_tail_  = reinterpret_cast<std::atomic<uint32_t> *>(cq + p.cq_off.tail);
        cq_mask_  = *reinterpret_cast<uint32_t *>(cq + p.cq_off.ring_mask);
        cqes_     = reinterpret_cast<io_uring_cqe *>(cq + p.cq_off.cqes);
    }
    ~Ring() { close(fd_); }

    void read(int fd, char * to, size_t size, uint64_t offset, uint64_t tag) {
        const uint32_t tail = sq_tail_->load(std::memory_order_relaxed);
        io_uring_sqe & e    = sqes_[tail & sq_mask_];
        memset(&e, 0, sizeof e);
        e.opcode                   = IORING_OP_READ;
        e.fd                       = fd;
        e.addr                     = reinterpret_cast<uint64_t>(to);
        e.len                      = uint32_t(size);
        e.off                      = offset;
        e.user_data                = tag;
        sq_array_[tail & sq_mask_] = tail & sq_mask_;
        sq_tail_->store(tail + 1, std::memory_order_release);
        ++unsubmitted_;
    }
    uint64_t wait(int32_t * result) {
        uint32_t head = cq_head_->load(std::memory_order_relaxed);
        while (head == cq_tail_->load(std::memory_order_acquire)) {
            if (syscall(SYS_io_uring_enter, fd_, unsubmitted_, 1, IORING_ENTER_GETEVENTS, nullptr, 0) < 0 &&
                errno != EINTR) {
                die("io_uring_enter");
            }
            unsubmitted_ = 0;
        }
        const io_uring_cqe e = cqes_[head & cq_mask_];
        cq_head_->store(head + 1, std::memory_order_release);
        *result = e.res;
        return e.user_data;
    }

  private:
    char * map(size_t size, uint64_t offset) const {
        void * p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, off_t(offset));
        if (p == MAP_FAILED) {
            die("mmap");
        }
        return static_cast<char *>(p);
    }

    int                    fd_;
    unsigned               unsubmitted_ = 0;
    io_uring_sqe *         sqes_;
    io_uring_cqe *         cqes_;
    std::atomic<uint32_t> *sq_tail_, *cq_head_, *cq_tail_;
    uint32_t *             sq_array_;
    uint32_t               sq_mask_, cq_mask_;
};

Result with_ring(int fd, uint64_t file, size_t piece, unsigned depth, double seconds) {
    Ring                ring(depth);
    Offsets             offsets(file, piece, 1);
    std::vector<char *> buffers(depth);
    Result              r;
    for (auto & b : buffers) {
        b = aligned(piece);
    }
    const double cpu = cpu_seconds(), start = now();
    unsigned     flying = 0;
    for (unsigned i = 0; i < depth; ++i, ++flying) {
        ring.read(fd, buffers[i], piece, offsets.next(), i);
    }
    while (flying > 0) {
        int32_t        result = 0;
        const uint64_t tag    = ring.wait(&result);
        if (result != int32_t(piece)) {
            errno = result < 0 ? -result : EIO;
            die("read");
        }
        r.bytes += piece;
        --flying;
        if (now() - start < seconds) {
            ring.read(fd, buffers[tag], piece, offsets.next(), tag);
            ++flying;
        }
    }
    r.seconds = now() - start;
    r.cpu     = cpu_seconds() - cpu;
    for (char * b : buffers) {
        free(b);
    }
    return r;
}

void make_file(const char * path) {
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0) {
        die(path);
    }
    std::vector<uint64_t> block(1 << 17);
    std::mt19937_64       random(7); // not compressible, not sparse
    for (auto & x : block) {
        x = random();
    }
    for (int i = 0; i < 2048; ++i) {
        block[0] = uint64_t(i);
        if (write(fd, block.data(), block.size() * sizeof(uint64_t)) < 0) {
            die("write");
        }
    }
    fsync(fd);
    close(fd);
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: disk_reads FILE [SECONDS]\n");
        return 2;
    }
    const double seconds = argc > 2 ? atof(argv[2]) : 1.0;
    struct stat  st{};
    if (stat(argv[1], &st) != 0) {
        make_file(argv[1]);
        stat(argv[1], &st);
    }
    const int fd = open(argv[1], O_RDONLY | O_DIRECT);
    if (fd < 0) {
        die(argv[1]);
    }
    printf("method,depth,piece_bytes,round,mb_per_s,cpu_s_per_gb\n");
    for (int round = 0; round < 3; ++round) { // interleaved: a noisy minute hits all alike
        for (size_t piece : {size_t(20480), size_t(65536), size_t(327680), size_t(1 << 20), size_t(4 << 20)}) {
            for (unsigned depth : {1u, 2u, 4u, 8u, 16u}) {
                for (bool ring : {false, true}) {
                    const Result r = (ring ? with_ring : with_threads)(fd, uint64_t(st.st_size), piece, depth, seconds);
                    printf("%s,%u,%zu,%d,%.1f,%.4f\n", ring ? "io_uring" : "threads", depth, piece, round,
                           double(r.bytes) / 1e6 / r.seconds, r.cpu / (double(r.bytes) / 1e9));
                    fflush(stdout);
                }
            }
        }
    }
    return 0;
}
