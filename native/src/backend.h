// Our ggml device, as the rest of the library sees it.
#pragma once

#include "ggml-backend-impl.h"

namespace pye {

class Engine;

ggml_backend_dev_t       expert_device();
ggml_backend_buffer_type expert_buffer_type(Engine * engine);
// Add the device to ggml's registry, once per process. A process that opens no engine never has it.
void register_device();

} // namespace pye
