// The one exception type of the library; c_api.cpp turns it into a code and a sentence.
#pragma once

#include "pyengine.h"

#include <stdexcept>
#include <string>

namespace pye {

class Error : public std::runtime_error {
  public:
    Error(int32_t code, const std::string & sentence) : std::runtime_error(sentence), code_(code) {}
    int32_t code() const { return code_; }

  private:
    int32_t code_;
};

} // namespace pye
