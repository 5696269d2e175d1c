// What a host calls: the two functions that TensorRT looks for in a plugin library, and what the library says of itself.

#include <array>
#include <iterator>

#include <NvInferVersion.h>

#include "creator.h"

#define PLANISH_EXPORT extern "C" __attribute__((visibility("default")))

namespace planish::plugin {
namespace {

template <class... Nodes>
std::array<nvinfer1::IPluginCreatorInterface*, sizeof...(Nodes)> creators(Types<Nodes...>) {
    static std::tuple<Creator<Nodes>...> all;
    return {&std::get<Creator<Nodes>>(all)...};
}

template <class... Nodes>
std::string versions(Types<Nodes...>) {
    std::string list;
    ((list += (list.empty() ? "\"" : ", \"") + std::string(Nodes::kName) + "\": \"" + Nodes::kVersion + "\""), ...);
    return list;
}

}  // namespace
}  // namespace planish::plugin

PLANISH_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static const auto all = planish::plugin::creators(planish::plugin::Plugins());
    count = static_cast<int32_t>(all.size());
    return all.data();
}

PLANISH_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { planish::plugin::set_logger_finder(finder); }

// JSON: the version of TensorRT that the library is for, the layout it reads, its SMs and its plugins with versions.
PLANISH_EXPORT const char* planish_plugins() {
    using namespace planish::plugin;
    static const std::string text =
        words("{\"tensorrt\": [{major}, {minor}, {patch}], \"layout\": {layout}, \"sms\": {sms}, \"plugins\": {{plugins}}}",
              {{"major", spell(NV_TENSORRT_MAJOR)},
               {"minor", spell(NV_TENSORRT_MINOR)},
               {"patch", spell(NV_TENSORRT_PATCH)},
               {"layout", spell(kLayout)},
               {"sms", spell(Shape(std::begin(kSms), std::end(kSms)))},
               {"plugins", versions(Plugins())}});
    return text.c_str();
}
