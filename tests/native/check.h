// What a test program here is made of: TEST(name) { ... CHECK(...) ... }. Including this file also gives it a main() that
// runs all tests, or those whose names are given as arguments. CHECKs belong on the main thread: they throw.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

struct Failed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Test {
    const char * name;
    void (*body)();
};

inline std::vector<Test> & tests() {
    static std::vector<Test> all;
    return all;
}

struct Registration {
    Registration(const char * name, void (*body)()) { tests().push_back({name, body}); }
};

// Said, and not counted as a failure: a case that this machine cannot show.
inline void note(const std::string & sentence) { fprintf(stderr, "  note: %s\n", sentence.c_str()); }

// Out of line, here and below: a test program has hundreds of checks, and sanitizers make each inlined one slow to compile.
[[noreturn, gnu::noinline]] inline void fail(const char * file, int line, const char * what,
                                             const std::string & more = "") {
    throw Failed(std::string(file) + ":" + std::to_string(line) + ": " + what + more);
}

template <class T> [[gnu::noinline]] std::string shown(const T & value) {
    if constexpr (std::is_arithmetic_v<T> || std::is_enum_v<T>) {
        return std::to_string(+value); // bool and enumerations as whole numbers
    } else {
        return "'" + std::string(value) + "'";
    }
}

template <class A, class B>
[[gnu::noinline]] void equal(const char * file, int line, const char * text, const A & a, const B & b) {
    if (!(a == b)) {
        fail(file, line, text, ": " + shown(a) + " is not " + shown(b));
    }
}

// The exception that `body` throws.
template <class E, class F> [[gnu::noinline]] E caught(const char * file, int line, const char * text, F && body) {
    try {
        body();
    } catch (const E & e) {
        return e;
    }
    fail(file, line, "no exception from ", text);
}

} // namespace check

#define TEST(name)                                                                                                     \
    static void                      test_##name();                                                                    \
    static const check::Registration register_##name(#name, test_##name);                                              \
    static void                      test_##name()

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            check::fail(__FILE__, __LINE__, "not so: " #condition);                                                    \
        }                                                                                                              \
    } while (false)
#define CHECK_EQUAL(a, b) check::equal(__FILE__, __LINE__, #a " == " #b, a, b)
#define CAUGHT(type, expression) check::caught<type>(__FILE__, __LINE__, #expression, [&] { (void)(expression); })

int main(int n_argument, char ** arguments) {
    int n_run = 0, n_failed = 0;
    for (const check::Test & test : check::tests()) {
        bool wanted = n_argument < 2;
        for (int i = 1; i < n_argument; ++i) {
            wanted = wanted || strcmp(arguments[i], test.name) == 0;
        }
        if (!wanted) {
            continue;
        }
        ++n_run;
        fprintf(stderr, "%s\n", test.name);
        try {
            test.body();
        } catch (const std::exception & e) {
            ++n_failed;
            fprintf(stderr, "  FAILED %s\n", e.what());
        }
    }
    fprintf(stderr, "%d tests, %d failed\n", n_run, n_failed);
    return n_run == 0 || n_failed != 0;
}
