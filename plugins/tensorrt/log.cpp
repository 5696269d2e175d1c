#include "log.h"

#include <atomic>
#include <iostream>

namespace planish::plugin {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

bool fine(const std::string& problem) {
    if (problem.empty()) return true;
    nvinfer1::ILoggerFinder* finder = logger_finder;
    if (nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, problem.c_str());
    } else {
        std::cerr << problem << '\n';
    }
    return false;
}

}  // namespace planish::plugin
