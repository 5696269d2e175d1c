// The contracts as C++ reads them, for the tests in Python. Needs no header of TensorRT.

#include <cstring>

#include "../../../plugins/tensorrt/contracts.h"
#include "../../../plugins/tensorrt/signature.cpp"

using namespace planish::plugin;

namespace {

std::string said;

template <class Node>
Node read(const char* numbers) {
    Node node = {};
    for (const Field& field : Node::fields()) {
        std::memcpy(reinterpret_cast<char*>(&node) + field.offset, numbers, 4);
        numbers += 4;
    }
    return node;
}

template <class Node>
void check(const char* numbers, const std::vector<Shape>& shapes, const std::vector<Type>& types) {
    const Node node = read<Node>(numbers);
    said = node.problem();
    if (!said.empty()) return;
    const Signature signature = node.signature();
    const size_t known = types.size() == signature.inputs.size() ? types.size() : 0;
    for (size_t i = 0; said.empty() && i < known; ++i) said = problem_of_type(signature, i, types);
    if (said.empty()) said = problem_of_shapes(signature, shapes);
}

template <class... Nodes>
void check(Types<Nodes...>, int plugin, const char* numbers, const std::vector<Shape>& shapes,
           const std::vector<Type>& types) {
    int i = 0;
    ((i++ == plugin ? check<Nodes>(numbers, shapes, types) : void()), ...);
}

}  // namespace

// Attributes are four bytes each, in the order of the contract; a shape is a rank and its sizes.
extern "C" const char* planish_contract_problem(int plugin, const char* numbers, int inputs, const int64_t* shapes,
                                                const int32_t* types) {
    std::vector<Shape> read;
    std::vector<Type> read_types;
    for (int i = 0; i < inputs; ++i) {
        read.emplace_back(shapes + 1, shapes + 1 + shapes[0]);
        read_types.push_back(static_cast<Type>(types[i]));
        shapes += 1 + shapes[0];
    }
    check(Plugins(), plugin, numbers, read, read_types);
    return said.c_str();
}
