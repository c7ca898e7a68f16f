/* Preloaded into a process (LD_PRELOAD), this makes pread() of GGUF files and bundles behave as a bad disk may: late, short
 * or interrupted reads, errors, and lies. The environment says which, at every read:
 *   FAULTY_DISK_DELAY_US     each read waits a random time up to this
 *   FAULTY_DISK_STALL_US     each read waits a random time of this mean (geometric), one in 128 waits 20 ms
 *   FAULTY_DISK_SHORT        1: some reads return only their first part, whole blocks of 4096 bytes, or EINTR
 *   FAULTY_DISK_EIO_AFTER    n: read number n, counted from 0, fails with EIO
 *   FAULTY_DISK_EIO_ONE_IN   n: one read in n, at random, fails with EIO
 *   FAULTY_DISK_LIE_ONE_IN   n: one read in n, at random, has the lowest bit of every byte turned round
 *   FAULTY_DISK_SEED         what comes at random comes from this and the order in which threads first read; the thread's
 *                            number if it is not set
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define BLOCK 4096
#define LONG_STALL_US 20000
#define ONE_LONG_IN 128

static atomic_long n_reads, n_faults, n_threads;

long faulty_disk_reads(void) { return n_reads; }
long faulty_disk_faults(void) { return n_faults; }

static long setting(const char * name, long otherwise) {
    const char * text = getenv(name);
    return text == NULL ? otherwise : atol(text);
}

static int ends(const char * path, ssize_t n, const char * with) {
    const ssize_t size = (ssize_t)strlen(with);
    return n > size && memcmp(path + n - size, with, (size_t)size) == 0;
}

static int is_model(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    return ends(path, n, ".gguf") || ends(path, n, ".bundle");
}

static int one_in(unsigned * seed, const char * name) {
    const long n = setting(name, 0);
    return n > 0 && rand_r(seed) % n == 0;
}

/* Geometric in steps of a sixteenth of the mean: as good as exponential, and without the mathematics library. */
static void stall(unsigned * seed, long mean_us) {
    long us = 0;
    while (rand_r(seed) % 17 != 0) {
        us += mean_us / 16;
    }
    usleep((useconds_t)(rand_r(seed) % ONE_LONG_IN == 0 ? LONG_STALL_US : us));
}

ssize_t pread(int fd, void * to, size_t size, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (real == NULL) {
        real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    }
    if (!is_model(fd)) {
        return real(fd, to, size, offset);
    }
    static _Thread_local unsigned seed;
    if (seed == 0) {
        const long wanted = setting("FAULTY_DISK_SEED", -1);
        seed = wanted < 0 ? (unsigned)gettid() : (unsigned)(wanted * 1000003 + ++n_threads);
    }
    long number = n_reads++;
    long delay  = setting("FAULTY_DISK_DELAY_US", 0);
    if (delay > 0) {
        usleep((useconds_t)(rand_r(&seed) % delay));
        n_faults++;
    }
    long mean = setting("FAULTY_DISK_STALL_US", 0);
    if (mean > 0) {
        stall(&seed, mean);
        n_faults++;
    }
    if (number == setting("FAULTY_DISK_EIO_AFTER", -1) || one_in(&seed, "FAULTY_DISK_EIO_ONE_IN")) {
        n_faults++;
        errno = EIO;
        return -1;
    }
    if (setting("FAULTY_DISK_SHORT", 0)) {
        int chance = rand_r(&seed) % 4;
        if (chance == 0) {
            n_faults++;
            errno = EINTR;
            return -1;
        }
        if (chance == 1 && size > BLOCK) {
            n_faults++;
            size = (1 + rand_r(&seed) % (size / BLOCK)) * BLOCK;
        }
    }
    ssize_t got = real(fd, to, size, offset);
    if (one_in(&seed, "FAULTY_DISK_LIE_ONE_IN")) {
        n_faults++;
        for (ssize_t i = 0; i < got; ++i) {
            ((unsigned char *)to)[i] ^= 1;
        }
    }
    return got;
}

ssize_t pread64(int fd, void * to, size_t size, off_t offset) { return pread(fd, to, size, offset); }
