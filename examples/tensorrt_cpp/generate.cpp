// Generate with a planish engine: token ids in, token ids out, greedy, one sequence.
//
//     generate ENGINES/TENSORRT NEW_TOKENS ID...        needs libnvinfer and the plugin library that lies beside the engine
//
// The cache stays on the GPU: every cache output is bound to the memory of the input that it extends.

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

namespace {

[[noreturn]] void stop(const std::string& why) {
    std::cerr << "error: " << why << '\n';
    std::exit(1);
}

void check(cudaError_t error) {
    if (error != cudaSuccess) stop(cudaGetErrorString(error));
}

class Logger final : public nvinfer1::ILogger {
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << text << '\n';
    }
};

// Memory of the GPU, zeroed.
std::shared_ptr<void> allocate(size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes));
    check(cudaMemset(memory, 0, bytes));
    return {memory, cudaFree};
}

template <class Number>
std::shared_ptr<void> upload(const std::vector<Number>& numbers) {
    auto memory = allocate(numbers.size() * sizeof(Number));
    check(cudaMemcpy(memory.get(), numbers.data(), numbers.size() * sizeof(Number), cudaMemcpyHostToDevice));
    return memory;
}

bool begins(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

}  // namespace

int main(int count, char** arguments) {
    if (count < 4) stop("usage: generate ENGINES/TENSORRT NEW_TOKENS ID...");
    const std::string folder = arguments[1];
    std::vector<int64_t> ids;
    for (int i = 3; i < count; ++i) ids.push_back(std::atoll(arguments[i]));

    Logger logger;
    const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    const std::string plugins = folder + "/libplanish_plugins.so";
    if (!runtime->getPluginRegistry().loadLibrary(plugins.c_str())) stop(plugins + " is missing or for another TensorRT");
    std::ifstream file(folder + "/model.engine", std::ios::binary);
    const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (!engine) stop(folder + "/model.engine is for another GPU or TensorRT; engine.json says for which");
    const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());

    if (engine->getTensorIOMode("past_lengths") == nvinfer1::TensorIOMode::kNONE) stop(folder + " has no plugins");

    std::map<std::string, std::shared_ptr<void>> caches;
    int64_t room = 0;
    for (int32_t i = 0; i < engine->getNbIOTensors(); ++i) {
        const std::string name = engine->getIOTensorName(i);
        if (!begins(name, "past_key_values.")) continue;
        nvinfer1::Dims shape = engine->getTensorShape(name.c_str());  // [batch, heads, context, numbers]
        shape.d[0] = 1;
        const bool scales = engine->getTensorDataType(name.c_str()) == nvinfer1::DataType::kHALF;
        caches[name] = allocate(static_cast<size_t>(shape.d[1] * shape.d[2] * shape.d[3]) * (scales ? 2 : 4));
        room = shape.d[2];
        context->setInputShape(name.c_str(), shape);
        context->setTensorAddress(name.c_str(), caches[name].get());
        context->setTensorAddress(("present" + name.substr(std::string("past_key_values").size())).c_str(),
                                  caches[name].get());
    }
    const int64_t new_tokens = std::atoll(arguments[2]), prompt = static_cast<int64_t>(ids.size());
    if (prompt + new_tokens > room) {
        stop("the cache has room for " + std::to_string(room) + " tokens, and prompt and answer have " +
             std::to_string(prompt + new_tokens) + ". Build the engine with a larger --max-context.");
    }

    const int64_t vocabulary = engine->getTensorShape("logits").d[2], keep = 1;
    const auto logits = allocate(static_cast<size_t>(vocabulary) * sizeof(float));
    context->setTensorAddress("logits", logits.get());
    context->setInputTensorAddress("num_logits_to_keep", &keep);  // it sets a shape, so it is read on the host
    std::vector<float> last(static_cast<size_t>(vocabulary));
    for (int64_t past = 0; past < prompt + new_tokens - 1;) {
        const auto tokens = static_cast<int64_t>(ids.size());
        std::vector<int64_t> positions(ids.size());
        for (int64_t i = 0; i < tokens; ++i) positions[static_cast<size_t>(i)] = past + i;
        const std::map<std::string, std::shared_ptr<void>> inputs = {
            {"input_ids", upload(ids)},
            {"position_ids", upload(positions)},
            {"past_lengths", upload(std::vector<int32_t>{static_cast<int32_t>(past)})},
            {"new_lengths", upload(std::vector<int32_t>{static_cast<int32_t>(tokens)})},
        };
        for (const auto& [name, memory] : inputs) {
            const bool lengths = name == "past_lengths" || name == "new_lengths";
            const nvinfer1::Dims shape = lengths ? nvinfer1::Dims{1, {1}} : nvinfer1::Dims{2, {1, tokens}};
            if (!context->setInputShape(name.c_str(), shape)) stop("the engine takes fewer tokens at once than the prompt");
            context->setTensorAddress(name.c_str(), memory.get());
        }
        if (!context->enqueueV3(nullptr)) stop("the engine failed; the lines above say where");
        check(cudaMemcpy(last.data(), logits.get(), last.size() * sizeof(float), cudaMemcpyDeviceToHost));
        past += tokens;
        ids = {std::max_element(last.begin(), last.end()) - last.begin()};
        std::cout << ids[0] << ' ' << std::flush;
    }
    std::cout << '\n';
}
