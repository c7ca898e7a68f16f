/* Preloaded into a process (LD_PRELOAD), this makes pread() of GGUF files behave as a bad disk may: late, short or
 * interrupted reads, and errors. The environment says which, when the first read comes:
 *   FAULTY_DISK_DELAY_US   each read waits a random time up to this
 *   FAULTY_DISK_SHORT      1: some reads return only their first part, whole blocks of 4096 bytes, or EINTR
 *   FAULTY_DISK_EIO_AFTER  n: read number n, counted from 0, fails with EIO
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

static atomic_long n_reads, n_faults;

long faulty_disk_reads(void) { return n_reads; }
long faulty_disk_faults(void) { return n_faults; }

static long setting(const char * name, long otherwise) {
    const char * text = getenv(name);
    return text == NULL ? otherwise : atol(text);
}

static int is_model(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    return n > 5 && memcmp(path + n - 5, ".gguf", 5) == 0;
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
        seed = (unsigned)gettid();
    }
    long number = n_reads++;
    long delay  = setting("FAULTY_DISK_DELAY_US", 0);
    if (delay > 0) {
        usleep((useconds_t)(rand_r(&seed) % delay));
        n_faults++;
    }
    if (number == setting("FAULTY_DISK_EIO_AFTER", -1)) {
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
    return real(fd, to, size, offset);
}

ssize_t pread64(int fd, void * to, size_t size, off_t offset) { return pread(fd, to, size, offset); }
