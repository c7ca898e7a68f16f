// ggml says something for every matrix that it repacks, and the process' log function may be an interpreter's: then every expert
// that is read would wait for Python's lock, and a process forked meanwhile would never begin.
#pragma once

namespace pye {

// From now on messages meet our filter first. Before any thread repacks; again harmless.
void filter_log();

// While one lives, debug messages of this thread go nowhere. Errors and warnings are heard.
class QuietKernels {
  public:
    QuietKernels();
    ~QuietKernels();
    QuietKernels(const QuietKernels &)             = delete;
    QuietKernels & operator=(const QuietKernels &) = delete;
};

} // namespace pye
