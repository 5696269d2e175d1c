// Makes the plugin of any contract from the attributes of a node, or from what an engine has stored of it.
#pragma once

#include "plugin.h"

namespace planish::plugin {

template <class Node>
class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    Creator() {
        for (const Field& field : Node::fields()) {
            const auto type = field.kind == Field::kInt ? nvinfer1::PluginFieldType::kINT32
                                                        : nvinfer1::PluginFieldType::kFLOAT32;
            names_.emplace_back(field.name, nullptr, type, 1);
        }
        collection_ = {static_cast<int32_t>(names_.size()), names_.data()};
    }

    const char* getPluginName() const noexcept override { return Node::kName; }
    const char* getPluginVersion() const noexcept override { return Node::kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                      nvinfer1::TensorRTPhase) noexcept override {
        Node node = {};
        for (const Field& field : Node::fields()) {
            if (!fine(read(field, *given, reinterpret_cast<char*>(&node) + field.offset))) return nullptr;
        }
        return fine(node.problem()) ? new Plugin<Node>(node) : nullptr;
    }

  private:
    // Copies the number called as `field` to `to`; what is returned says why it cannot be.
    static std::string read(const Field& field, const nvinfer1::PluginFieldCollection& given, char* to) {
        for (int32_t i = 0; i < given.nbFields; ++i) {
            const nvinfer1::PluginField& one = given.fields[i];
            if (std::strcmp(one.name, field.name) != 0) continue;
            const auto type = field.kind == Field::kInt ? nvinfer1::PluginFieldType::kINT32
                                                        : nvinfer1::PluginFieldType::kFLOAT32;
            if (one.type != type || one.length != 1 || !one.data) {
                return words("{plugin}: the attribute '{name}' is one {type}",
                             {{"plugin", Node::kName}, {"name", field.name},
                              {"type", field.kind == Field::kInt ? "int32" : "float32"}});
            }
            std::memcpy(to, one.data, 4);
            return {};
        }
        return words("{plugin} lacks the attribute '{name}' ({meaning})",
                     {{"plugin", Node::kName}, {"name", field.name}, {"meaning", field.meaning}});
    }

    std::vector<nvinfer1::PluginField> names_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace planish::plugin
