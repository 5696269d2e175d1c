// What plugins say, through the logger of the TensorRT that loaded the library.
#pragma once

#include <string>

#include <NvInferRuntime.h>

namespace planish::plugin {

// Kept from the call of setLoggerFinder on; without one, messages go to standard error.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// Says what went wrong, unless `problem` is empty; returns whether nothing did.
bool fine(const std::string& problem);

}  // namespace planish::plugin
