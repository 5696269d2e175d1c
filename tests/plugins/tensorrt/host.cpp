// A host of plugins without TensorRT: loads the library as TensorRT does and drives it, for the tests in Python.
//
// A plugin is an address. Types and formats are TensorRT's numbers, shapes are nested in [rank, sizes...] rows of nine.

#include <dlfcn.h>

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

using namespace nvinfer1;

namespace {

std::string said;

class Logger final : public ILogger {
  public:
    void log(Severity, const char* text) noexcept override { said += (said.empty() ? "" : "\n") + std::string(text); }
};

class Finder final : public ILoggerFinder {
  public:
    ILogger* findLogger() override { return &logger_; }

  private:
    Logger logger_;
};

// A size that is known, or -1: what a dimension expression is while shapes are inferred.
class Expression final : public IDimensionExpr {
  public:
    explicit Expression(int64_t size) : size_(size) { mImpl = &size_; }

  private:
    class Size final : public apiv::VDimensionExpr {
      public:
        explicit Size(int64_t size) : size_(size) {}
        bool isConstant() const override { return size_ >= 0; }
        int64_t getConstantValue() const override { return size_; }
        bool isSizeTensor() const override { return false; }

      private:
        int64_t size_;
    };
    Size size_;
};

class ExpressionBuilder final : public IExprBuilder {
  public:
    ExpressionBuilder() { mImpl = &builder_; }
    const IDimensionExpr* keep(int64_t size) { return builder_.constant(size); }

  private:
    class Builder final : public apiv::VExprBuilder {
      public:
        const IDimensionExpr* constant(int64_t size) override { return &made_.emplace_back(size); }
        const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
            return nullptr;
        }
        const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
            return nullptr;
        }

      private:
        std::deque<Expression> made_;
    };
    Builder builder_;
};

template <class Capability>
Capability& of(IPluginV3* plugin, PluginCapabilityType type) {
    return *static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

IPluginV3OneBuildV2& build_of(IPluginV3* plugin) {
    return of<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime& runtime_of(IPluginV3* plugin) {
    return of<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

constexpr int kRow = 9;

Dims dims_of(const int64_t* row) {
    Dims dims = {};
    dims.nbDims = static_cast<int32_t>(row[0]);
    std::copy(row + 1, row + 1 + row[0], dims.d);
    return dims;
}

std::vector<PluginTensorDesc> tensors_of(const int64_t* shapes, const int32_t* types, int32_t count) {
    std::vector<PluginTensorDesc> tensors(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) {
        tensors[static_cast<size_t>(i)].dims = dims_of(shapes + kRow * i);
        tensors[static_cast<size_t>(i)].type = static_cast<DataType>(types[i]);
        tensors[static_cast<size_t>(i)].format = TensorFormat::kLINEAR;
    }
    return tensors;
}

// As the builder hands tensors over: the sizes at hand are the largest too.
std::vector<DynamicPluginTensorDesc> dynamic_of(const std::vector<PluginTensorDesc>& tensors) {
    std::vector<DynamicPluginTensorDesc> made;
    for (const PluginTensorDesc& tensor : tensors) made.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
    return made;
}

}  // namespace

extern "C" {

// What the plugins have said since the last call.
const char* host_said() {
    static std::string told;
    told = std::move(said);
    said.clear();
    return told.c_str();
}

void* host_load(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        said = dlerror();
        return nullptr;
    }
    static Finder finder;
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    return library;
}

void* host_creator(void* library, const char* name, const char* version, const char* name_space) {
    int32_t count = 0;
    const auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    IPluginCreatorInterface* const* all = get(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = dynamic_cast<IPluginCreatorV3One*>(all[i]);
        if (!std::strcmp(creator->getPluginName(), name) && !std::strcmp(creator->getPluginVersion(), version) &&
            !std::strcmp(creator->getPluginNamespace(), name_space)) {
            return creator;
        }
    }
    return nullptr;
}

// Names of the attributes, a comma behind each.
const char* host_field_names(void* creator) {
    static std::string names;
    names.clear();
    const PluginFieldCollection& fields = *static_cast<IPluginCreatorV3One*>(creator)->getFieldNames();
    for (int32_t i = 0; i < fields.nbFields; ++i) names += std::string(fields.fields[i].name) + ",";
    return names.c_str();
}

// `numbers` are int32 or float32, four bytes each.
void* host_create(void* creator, int32_t count, const char* const* names, const int32_t* types, const void* numbers) {
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < count; ++i) {
        fields.emplace_back(names[i], static_cast<const char*>(numbers) + 4 * i, static_cast<PluginFieldType>(types[i]), 1);
    }
    const PluginFieldCollection given = {count, fields.data()};
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("node", &given, TensorRTPhase::kBUILD);
}

// Another plugin from what this one stores in an engine.
void* host_restore(void* creator, void* plugin) {
    const PluginFieldCollection stored = *runtime_of(static_cast<IPluginV3*>(plugin)).getFieldsToSerialize();
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("node", &stored, TensorRTPhase::kRUNTIME);
}

void* host_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

void* host_attach(void* plugin) { return runtime_of(static_cast<IPluginV3*>(plugin)).attachToContext(nullptr); }

void host_delete(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

int32_t host_outputs(void* plugin) { return build_of(static_cast<IPluginV3*>(plugin)).getNbOutputs(); }

int32_t host_aliased_input(void* plugin, int32_t output) {
    return build_of(static_cast<IPluginV3*>(plugin)).getAliasedInput(output);
}

// Types and shapes of the outputs, the shapes from expressions.
int32_t host_infer(void* plugin, int32_t inputs, const int64_t* shapes, const int32_t* types, int32_t outputs,
                   int64_t* output_shapes, int32_t* output_types) {
    IPluginV3OneBuild& build = build_of(static_cast<IPluginV3*>(plugin));
    ExpressionBuilder expressions;
    std::vector<DimsExprs> in(static_cast<size_t>(inputs)), out(static_cast<size_t>(outputs));
    for (size_t i = 0; i < in.size(); ++i) {
        const int64_t* row = shapes + kRow * static_cast<int64_t>(i);
        in[i].nbDims = static_cast<int32_t>(row[0]);
        for (int64_t axis = 0; axis < row[0]; ++axis) in[i].d[axis] = expressions.keep(row[1 + axis]);
    }
    if (build.getOutputDataTypes(reinterpret_cast<DataType*>(output_types), outputs,
                                 reinterpret_cast<const DataType*>(types), inputs)) {
        return 1;
    }
    if (build.getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs, expressions)) return 1;
    for (size_t i = 0; i < out.size(); ++i) {
        int64_t* row = output_shapes + kRow * static_cast<int64_t>(i);
        row[0] = out[i].nbDims;
        for (int32_t axis = 0; axis < out[i].nbDims; ++axis) {
            row[1 + axis] = out[i].d[axis]->isConstant() ? out[i].d[axis]->getConstantValue() : -1;
        }
    }
    return 0;
}

int32_t host_supports(void* plugin, int32_t position, int32_t inputs, int32_t outputs, const int32_t* types,
                      int32_t format) {
    std::vector<DynamicPluginTensorDesc> tensors(static_cast<size_t>(inputs + outputs));
    for (size_t i = 0; i < tensors.size(); ++i) {
        tensors[i].desc.type = static_cast<DataType>(types[i]);
        tensors[i].desc.format = static_cast<TensorFormat>(format);
    }
    return build_of(static_cast<IPluginV3*>(plugin)).supportsFormatCombination(position, tensors.data(), inputs, outputs);
}

int32_t host_configure(void* plugin, int32_t inputs, int32_t outputs, const int64_t* shapes, const int32_t* types) {
    const auto in = dynamic_of(tensors_of(shapes, types, inputs));
    const auto out = dynamic_of(tensors_of(shapes + kRow * inputs, types + inputs, outputs));
    return build_of(static_cast<IPluginV3*>(plugin)).configurePlugin(in.data(), inputs, out.data(), outputs);
}

int64_t host_workspace(void* plugin, int32_t inputs, int32_t outputs, const int64_t* shapes, const int32_t* types) {
    const auto in = dynamic_of(tensors_of(shapes, types, inputs));
    const auto out = dynamic_of(tensors_of(shapes + kRow * inputs, types + inputs, outputs));
    IPluginV3OneBuild& build = build_of(static_cast<IPluginV3*>(plugin));
    return static_cast<int64_t>(build.getWorkspaceSize(in.data(), inputs, out.data(), outputs));
}

// As at run time: the change of shapes, then the work, on the default stream.
int32_t host_enqueue(void* plugin, int32_t inputs, int32_t outputs, const int64_t* shapes, const int32_t* types,
                     const void* const* input_data, void* const* output_data, void* workspace) {
    IPluginV3OneRuntime& runtime = runtime_of(static_cast<IPluginV3*>(plugin));
    const auto in = tensors_of(shapes, types, inputs);
    const auto out = tensors_of(shapes + kRow * inputs, types + inputs, outputs);
    if (runtime.onShapeChange(in.data(), inputs, out.data(), outputs)) return -1;
    return runtime.enqueue(in.data(), out.data(), input_data, output_data, workspace, nullptr);
}

}  // extern "C"
