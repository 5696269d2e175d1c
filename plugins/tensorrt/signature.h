// What contracts.h is written in: tensors as data, and the checks of what a host hands to a plugin. Knows no TensorRT.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace planish::plugin {

enum class Type : int32_t { kFloat32, kFloat16, kBfloat16, kInt32 };

// Sizes; -1 is one that is not known yet.
using Shape = std::vector<int64_t>;

// One dimension of a contract: a size, or the name of one that inputs decide. "..." is any number of dimensions.
struct Dim {
    const char* name;  // null where there is a size
    int64_t size;
};

inline Dim sized(int64_t size) { return {nullptr, size}; }
inline Dim named(const char* name) { return {name, 0}; }

struct Tensor {
    const char* name;
    int number;               // its place in the contract, counted over tensors that may be left out
    std::vector<Type> types;  // any of them
    std::vector<Dim> shape;
    int like;   // number of the input whose type it has; -1 is none
    int alias;  // number of the input whose memory an output is; -1 is none
};

// The tensors that one node has.
struct Signature {
    const char* plugin;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
};

// An attribute: where it lies in the struct of its contract.
struct Field {
    enum Kind { kInt, kFloat };
    const char* name;
    Kind kind;
    size_t offset;
    const char* meaning;
};

template <class... Each>
struct Types {};

// What expressions of contracts call; contract.py has the same in Python.
constexpr int64_t ceil_div(int64_t number, int64_t divisor) { return (number + divisor - 1) / divisor; }

constexpr int64_t padded_channels(int64_t channels, int64_t bits) {
    const int64_t group = bits == 2 ? 128 : bits == 3 ? 256 : bits == 4 ? 64 : 1;
    return ceil_div(channels, group) * group;
}

constexpr int64_t widest_row(int64_t k) { return 16 * (1024 - (k <= 1024 ? 1024 % k : 0)); }

inline Type pick(std::initializer_list<Type> types, int32_t number) { return types.begin()[number]; }

// The product of all dimensions but the last.
inline int64_t leading_size(const Shape& shape) {
    int64_t size = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) size *= shape[i];
    return size;
}

// Numbers, and messages with {name} in them, as text.
std::string spell(int64_t value);
std::string spell(float value);
inline std::string spell(int32_t value) { return spell(int64_t{value}); }
std::string spell(const Shape& shape);
const char* spell(Type type);

using Value = std::pair<const char*, std::string>;

std::string words(std::string message, std::initializer_list<Value> values);

// The place of an input of the contract among those that the node has; -1 where it is left out.
int place_of(const Signature& signature, int number);

// What is wrong with the type of tensor `position`, inputs before outputs, given those before it; empty if nothing is.
std::string problem_of_type(const Signature& signature, size_t position, const std::vector<Type>& types);

// What is wrong with the shapes of the inputs; empty if nothing is.
std::string problem_of_shapes(const Signature& signature, const std::vector<Shape>& inputs);

// Where the size of a named dimension comes from: an input and its axes.
struct Source {
    size_t input;
    size_t first_axis;
    size_t axes;
};

// Needs shapes without a problem.
std::map<std::string, Source> sources_of(const Signature& signature, const std::vector<size_t>& ranks);

}  // namespace planish::plugin
