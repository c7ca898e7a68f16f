// The operating system calls the engine needs, and nothing else. A port to another system is a new platform_*.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pye::platform {

constexpr size_t kPage = 4096; // smallest unit of reserve/populate/release; also the alignment of slots

// Addresses without memory that fault on any access. nullptr if the system refuses.
void * reserve_addresses(size_t size);
// Memory that costs nothing until touched; huge pages where the system allows them. nullptr if refused.
void * reserve_memory(size_t size);
// Fault in a page-aligned range so that nobody later pays for first touch. False if there is no memory.
bool populate(void * address, size_t size);
// Give a page-aligned range back to the system; it reads as zeros afterwards.
void release(void * address, size_t size);
void unmap(void * address, size_t size);

// A file opened for reading experts. Direct (past the page cache) where the file system allows it, else buffered with
// the pages dropped behind each read, and never a read-ahead.
struct File {
    int         fd     = -1;
    bool        direct = false;
    size_t      align  = kPage; // of offsets, sizes and addresses when direct
    uint64_t    size   = 0;
    int64_t     mtime  = 0; // of the last change when it was opened, ns
    std::string path;
};

// Throws Error(PYE_E_FILE).
File open_file(const std::string & path);
void close_file(File & file);
// Whether somebody wrote to the file, or cut it, since it was opened. What was read before this says no is the old content.
bool changed(const File & file);
// Up to `size` bytes at `offset`; short only at the end of the file. Returns bytes read or -errno.
int64_t read_at(const File & file, void * to, size_t size, uint64_t offset);

// `size` bytes aligned for direct reads; free with free_buffer. nullptr if there is no memory.
uint8_t * new_buffer(size_t size, size_t align);
void      free_buffer(uint8_t * buffer);

// Signals belong to the threads of the program that loaded us.
void        block_signals_in_this_thread();
void        name_this_thread(const char * name); // for tools that list threads; at most 15 characters
int64_t     process_id();
std::string error_text(int error);

} // namespace pye::platform
