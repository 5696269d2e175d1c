// The plugin of any contract: what TensorRT asks of it is answered from the contract, and the work is a `launch`.
//
// Everything that a node cannot be is refused while an engine is built, in words: attributes when it is created, types
// when formats are chosen, shapes when they are inferred and configured, the GPU when it is configured. What enqueue
// then finds wrong is an error of a kernel's launch alone.
#pragma once

#include <cstring>

#include "launch.h"
#include "log.h"
#include "planish_kernels.h"

namespace planish::plugin {

// Types of TensorRT, and -1 for those that no tensor of ours has.
inline int32_t type_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return static_cast<int32_t>(Type::kFloat32);
        case nvinfer1::DataType::kHALF: return static_cast<int32_t>(Type::kFloat16);
        case nvinfer1::DataType::kBF16: return static_cast<int32_t>(Type::kBfloat16);
        case nvinfer1::DataType::kINT32: return static_cast<int32_t>(Type::kInt32);
        default: return -1;
    }
}

inline nvinfer1::DataType type_of(Type type) {
    using nvinfer1::DataType;
    constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT32};
    return kTypes[static_cast<int32_t>(type)];
}

inline Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

inline std::vector<Shape> shapes_of(const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t count) {
    std::vector<Shape> shapes;
    for (int32_t i = 0; i < count; ++i) shapes.push_back(shape_of(tensors[i].desc.dims));
    return shapes;
}

template <class Node>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
  public:
    // `node` has no problem.
    explicit Plugin(const Node& node) : node_(node), signature_(node.signature()) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override { return new Plugin(node_); }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    const char* getPluginName() const noexcept override { return Node::kName; }
    const char* getPluginVersion() const noexcept override { return Node::kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }
    // There is one tactic, so nothing that timings of it would choose.
    const char* getTimingCacheID() noexcept override { return nullptr; }

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(signature_.outputs.size()); }

    int32_t getAliasedInput(int32_t output) noexcept override {
        const int alias = signature_.outputs[static_cast<size_t>(output)].alias;
        return alias < 0 ? -1 : place_of(signature_, alias);
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t, const nvinfer1::DataType* inputs,
                               int32_t) const noexcept override {
        for (size_t i = 0; i < signature_.outputs.size(); ++i) {
            const Tensor& tensor = signature_.outputs[i];
            outputs[i] = tensor.like < 0 ? type_of(tensor.types[0]) : inputs[place_of(signature_, tensor.like)];
        }
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder& build) noexcept override {
        std::vector<Shape> shapes;
        std::vector<size_t> ranks;
        for (int32_t i = 0; i < input_count; ++i) {
            Shape& shape = shapes.emplace_back();
            for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
                const nvinfer1::IDimensionExpr& size = *inputs[i].d[axis];
                shape.push_back(size.isConstant() ? size.getConstantValue() : -1);
            }
            ranks.push_back(shape.size());
        }
        if (!fine(problem_of_shapes(signature_, shapes))) return 1;
        const auto sources = sources_of(signature_, ranks);
        for (size_t i = 0; i < signature_.outputs.size(); ++i) {
            nvinfer1::DimsExprs& made = outputs[i];
            made.nbDims = 0;
            for (const Dim& dim : signature_.outputs[i].shape) {
                if (!dim.name) {
                    made.d[made.nbDims++] = build.constant(dim.size);
                    continue;
                }
                const Source source = sources.at(dim.name);
                for (size_t axis = 0; axis < source.axes; ++axis) {
                    made.d[made.nbDims++] = inputs[source.input].d[source.first_axis + axis];
                }
            }
        }
        return 0;
    }

    // Called for one tensor after the other, so what it says no to is told by configurePlugin alone.
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t,
                                   int32_t) noexcept override {
        return tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR &&
               problem_of_types(tensors, nullptr, position, position).empty();
    }

    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override {
        if (!fine(problem_of_device()) || !fine(problem_of_shapes(signature_, shapes_of(inputs, input_count)))) return 1;
        return fine(problem_of_types(inputs, outputs, 0, input_count + output_count - 1)) ? 0 : 1;
    }

    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                            const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override {
        std::vector<Shape> largest;
        for (int32_t i = 0; i < count; ++i) largest.push_back(shape_of(inputs[i].max));
        return workspace_bytes(node_, largest);
    }

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t count, const nvinfer1::PluginTensorDesc*,
                          int32_t) noexcept override {
        std::vector<Shape> shapes;
        for (int32_t i = 0; i < count; ++i) shapes.push_back(shape_of(inputs[i].dims));
        return fine(problem_of_shapes(signature_, shapes)) ? 0 : 1;
    }

    int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                    const void* const* input_data, void* const* output_data, void* workspace,
                    cudaStream_t stream) noexcept override {
        Call call = {{}, {output_data, output_data + signature_.outputs.size()}, {}, {}, workspace, stream};
        call.type = static_cast<Type>(type_of(inputs[0].type));
        call.inputs.resize(Node::kInputs);
        for (size_t i = 0; i < signature_.inputs.size(); ++i) {
            call.inputs[static_cast<size_t>(signature_.inputs[i].number)] = input_data[i];
            call.shapes.push_back(shape_of(inputs[i].dims));
        }
        const int status = launch(node_, call);
        if (status != PLANISH_OK) fine(words("{plugin}: {error}", {{"plugin", Node::kName}, {"error", planish_last_error()}}));
        return status;
    }

    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        stored_.clear();
        for (const Field& field : Node::fields()) {
            const auto type = field.kind == Field::kInt ? nvinfer1::PluginFieldType::kINT32
                                                        : nvinfer1::PluginFieldType::kFLOAT32;
            stored_.emplace_back(field.name, reinterpret_cast<const char*>(&node_) + field.offset, type, 1);
        }
        collection_ = {static_cast<int32_t>(stored_.size()), stored_.data()};
        return &collection_;
    }

  private:
    // Of tensors `first` to `last`, inputs before outputs; without `outputs` these follow the inputs in one array.
    std::string problem_of_types(const nvinfer1::DynamicPluginTensorDesc* inputs,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t first,
                                 int32_t last) const {
        const auto input_count = static_cast<int32_t>(signature_.inputs.size());
        std::vector<Type> types;
        for (int32_t i = 0; i <= last; ++i) {
            const bool apart = outputs && i >= input_count;
            const nvinfer1::DataType type = (apart ? outputs[i - input_count] : inputs[i]).desc.type;
            if (type_of(type) < 0) {
                return words("{plugin}: tensor {number} has type {type} of TensorRT, which no tensor of planish has",
                             {{"plugin", Node::kName}, {"number", spell(i)}, {"type", spell(static_cast<int32_t>(type))}});
            }
            types.push_back(static_cast<Type>(type_of(type)));
        }
        for (int32_t i = first; i <= last; ++i) {
            const std::string problem = problem_of_type(signature_, static_cast<size_t>(i), types);
            if (!problem.empty()) return problem;
        }
        return {};
    }

    Node node_;
    Signature signature_;
    std::vector<nvinfer1::PluginField> stored_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace planish::plugin
