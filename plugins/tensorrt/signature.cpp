#include "signature.h"

#include <cstdio>

namespace planish::plugin {
namespace {

// The sizes that names have so far.
using Sizes = std::map<std::string, Shape>;

std::string spell_wanted(const Tensor& tensor, const Sizes& sizes) {
    std::string text = "[";
    for (const Dim& dim : tensor.shape) {
        const auto known = dim.name ? sizes.find(dim.name) : sizes.end();
        std::string part = dim.name ? dim.name : spell(dim.size);
        if (known != sizes.end()) {
            part = spell(known->second);
            part = part.substr(1, part.size() - 2);
        }
        text += (text.size() > 1 ? ", " : "") + part;
    }
    return text + "]";
}

bool is_leading(const Dim& dim) { return dim.name && std::string(dim.name) == "..."; }

// The axes that each dimension of a tensor of this rank stands for; empty where the rank does not fit.
std::vector<size_t> axes_of(const Tensor& tensor, size_t rank) {
    std::vector<size_t> axes(tensor.shape.size(), 1);
    if (is_leading(tensor.shape[0]) && rank >= tensor.shape.size()) axes[0] = rank - tensor.shape.size() + 1;
    size_t all = 0;
    for (const size_t each : axes) all += each;
    return all == rank ? axes : std::vector<size_t>{};
}

// Whether two shapes can be the same, as far as they are known.
bool agree(const Shape& a, const Shape& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
        if (a[i] >= 0 && b[i] >= 0 && a[i] != b[i]) return false;
    }
    return true;
}

bool bind(const Tensor& tensor, const Shape& shape, Sizes& sizes) {
    const std::vector<size_t> axes = axes_of(tensor, shape.size());
    auto next = shape.begin();
    for (size_t i = 0; i < axes.size(); ++i) {
        const Shape part(next, next + static_cast<std::ptrdiff_t>(axes[i]));
        next += static_cast<std::ptrdiff_t>(axes[i]);
        const Dim& dim = tensor.shape[i];
        if (!agree(part, dim.name ? sizes.emplace(dim.name, part).first->second : Shape{dim.size})) return false;
    }
    return !axes.empty();
}

}  // namespace

std::string spell(int64_t value) { return std::to_string(value); }

std::string spell(float value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", static_cast<double>(value));
    return text;
}

std::string spell(const Shape& shape) {
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + spell(size);
    return "[" + text + "]";
}

const char* spell(Type type) {
    constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "int32"};
    return kNames[static_cast<int32_t>(type)];
}

std::string words(std::string message, std::initializer_list<Value> values) {
    for (const auto& [name, value] : values) {
        const std::string place = "{" + std::string(name) + "}";
        for (size_t at; (at = message.find(place)) != std::string::npos;) message.replace(at, place.size(), value);
    }
    return message;
}

int place_of(const Signature& signature, int number) {
    for (size_t i = 0; i < signature.inputs.size(); ++i) {
        if (signature.inputs[i].number == number) return static_cast<int>(i);
    }
    return -1;
}

std::string problem_of_type(const Signature& signature, size_t position, const std::vector<Type>& types) {
    const size_t inputs = signature.inputs.size();
    const Tensor& tensor = position < inputs ? signature.inputs[position] : signature.outputs[position - inputs];
    std::vector<Type> allowed = tensor.types;
    if (tensor.like >= 0) allowed = {types[static_cast<size_t>(place_of(signature, tensor.like))]};
    std::string list;
    for (const Type type : allowed) {
        if (type == types[position]) return {};
        list += std::string(list.empty() ? "" : " or ") + spell(type);
    }
    return words("{plugin}: '{tensor}' is {type}; it takes {list}",
                 {{"plugin", signature.plugin}, {"tensor", tensor.name}, {"type", spell(types[position])}, {"list", list}});
}

std::string problem_of_shapes(const Signature& signature, const std::vector<Shape>& inputs) {
    if (inputs.size() != signature.inputs.size()) {
        return words("{plugin} takes {wanted} inputs, and {count} are there",
                     {{"plugin", signature.plugin},
                      {"wanted", std::to_string(signature.inputs.size())},
                      {"count", std::to_string(inputs.size())}});
    }
    Sizes sizes;
    for (size_t i = 0; i < inputs.size(); ++i) {
        const Tensor& tensor = signature.inputs[i];
        if (bind(tensor, inputs[i], sizes)) continue;
        return words("{plugin}: '{tensor}' has shape {shape}; it takes {wanted}",
                     {{"plugin", signature.plugin},
                      {"tensor", tensor.name},
                      {"shape", spell(inputs[i])},
                      {"wanted", spell_wanted(tensor, sizes)}});
    }
    return {};
}

std::map<std::string, Source> sources_of(const Signature& signature, const std::vector<size_t>& ranks) {
    std::map<std::string, Source> sources;
    for (size_t i = 0; i < ranks.size(); ++i) {
        const Tensor& tensor = signature.inputs[i];
        const std::vector<size_t> axes = axes_of(tensor, ranks[i]);
        for (size_t at = 0, d = 0; d < axes.size(); at += axes[d++]) {
            if (tensor.shape[d].name) sources.emplace(tensor.shape[d].name, Source{i, at, axes[d]});
        }
    }
    return sources;
}

}  // namespace planish::plugin
