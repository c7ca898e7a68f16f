// What a test program here is made of: TEST(name) { ... CHECK(...) ... }. Including this file also gives it a main() that
// runs all tests, or those whose names are given as arguments. CHECKs belong on the main thread: they throw.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Failed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Test {
    const char *          name;
    std::function<void()> body;
};

inline std::vector<Test> & tests() {
    static std::vector<Test> all;
    return all;
}

// Said once and not counted as a failure: a case that this machine cannot show.
inline void note(const std::string & sentence) { fprintf(stderr, "  note: %s\n", sentence.c_str()); }

[[noreturn]] inline void fail(const char * file, int line, const std::string & sentence) {
    throw Failed(std::string(file) + ":" + std::to_string(line) + ": " + sentence);
}

template <class A, class B> void equal(const char * file, int line, const char * text, const A & a, const B & b) {
    if (!(a == b)) {
        std::ostringstream s;
        s << text << ": " << a << " != " << b;
        fail(file, line, s.str());
    }
}

// The exception that `body` throws.
template <class E, class F> E caught(const char * file, int line, const char * text, F && body) {
    try {
        body();
    } catch (const E & e) {
        return e;
    }
    fail(file, line, std::string("no exception from ") + text);
}

struct Registration {
    Registration(const char * name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

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
#define CAUGHT(type, expression) check::caught<type>(__FILE__, __LINE__, #expression, [&] { (void) (expression); })

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
