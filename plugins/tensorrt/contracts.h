// Written by planish.plugins.tensorrt.header from the contracts in plugins.py. Change those.
#pragma once

#include "signature.h"

namespace planish::plugin {

constexpr const char* kNamespace = "planish";
constexpr int kLayout = 1;
// Compute capabilities, times ten, that have kernels: those that CMake compiles for.
#if defined(PLANISH_SMS)
constexpr int kSms[] = {PLANISH_SMS};
#else
constexpr int kSms[] = {80, 86, 87, 89, 90, 100, 120};
#endif

// Adds a residual to tokens, normalises, transforms, permutes and quantises them: PlanishQuantizeActivation behind Add, RMSNormalization and PlanishTransform.
struct PlanishQuantizeTokens {
    int32_t layout;  // version of the layouts of weights, codes and cache
    int32_t bits;  // bits of the weights of all other channels
    int32_t channels;  // input channels that are no high-impact ones
    int32_t high_channels;  // high-impact input channels, the first ones, with 4-bit weights; 0 is none
    int32_t activation_bits;  // bits of the codes of these channels, 2 .. 8
    float clip;  // share of their largest magnitude that the grid spans
    int32_t high_activation_bits;  // the same of the high-impact channels
    float high_clip;  // likewise
    int32_t m;  // rows of a token as a matrix
    int32_t k;  // its columns
    int32_t right_count;  // right factors: 0 is none, 1, or m
    int32_t has_left;  // 1 if there is a left factor
    int32_t permuted;  // 1 if there is a permutation
    int32_t added;  // 1 if there is a residual to add
    int32_t normed;  // 1 if there is a norm
    float epsilon;  // of the norm

    static constexpr const char* kName = "PlanishQuantizeTokens";
    static constexpr const char* kVersion = "2";
    enum Input { kX, kResidual, kGain, kRight, kLeft, kPermutation, kInputs };
    enum Output { kCodes, kScales, kZeroSums, kSum, kOutputs };

    // The attributes, for reading and writing them by name.
    static const std::vector<Field>& fields() {
        static const std::vector<Field> all = {
            {"layout", Field::kInt, offsetof(PlanishQuantizeTokens, layout), "version of the layouts of weights, codes and cache"},
            {"bits", Field::kInt, offsetof(PlanishQuantizeTokens, bits), "bits of the weights of all other channels"},
            {"channels", Field::kInt, offsetof(PlanishQuantizeTokens, channels), "input channels that are no high-impact ones"},
            {"high_channels", Field::kInt, offsetof(PlanishQuantizeTokens, high_channels), "high-impact input channels, the first ones, with 4-bit weights; 0 is none"},
            {"activation_bits", Field::kInt, offsetof(PlanishQuantizeTokens, activation_bits), "bits of the codes of these channels, 2 .. 8"},
            {"clip", Field::kFloat, offsetof(PlanishQuantizeTokens, clip), "share of their largest magnitude that the grid spans"},
            {"high_activation_bits", Field::kInt, offsetof(PlanishQuantizeTokens, high_activation_bits), "the same of the high-impact channels"},
            {"high_clip", Field::kFloat, offsetof(PlanishQuantizeTokens, high_clip), "likewise"},
            {"m", Field::kInt, offsetof(PlanishQuantizeTokens, m), "rows of a token as a matrix"},
            {"k", Field::kInt, offsetof(PlanishQuantizeTokens, k), "its columns"},
            {"right_count", Field::kInt, offsetof(PlanishQuantizeTokens, right_count), "right factors: 0 is none, 1, or m"},
            {"has_left", Field::kInt, offsetof(PlanishQuantizeTokens, has_left), "1 if there is a left factor"},
            {"permuted", Field::kInt, offsetof(PlanishQuantizeTokens, permuted), "1 if there is a permutation"},
            {"added", Field::kInt, offsetof(PlanishQuantizeTokens, added), "1 if there is a residual to add"},
            {"normed", Field::kInt, offsetof(PlanishQuantizeTokens, normed), "1 if there is a norm"},
            {"epsilon", Field::kFloat, offsetof(PlanishQuantizeTokens, epsilon), "of the norm"},
        };
        return all;
    }
    int64_t width() const { return channels + high_channels; }
    int64_t segments() const { return (high_channels > 0) + 1; }
    int64_t code_words() const { return ceil_div(high_channels + padded_channels(channels, bits), 4); }

    // What is wrong with the attributes; empty if nothing is.
    std::string problem() const {
        if (!(layout == 1)) {
            return words("PlanishQuantizeTokens: the model is packed in layout {layout}, and this library reads layout 1; build the engine again with the planish of the library", {{"layout", spell(layout)}});
        }
        if (!(bits == 2 or bits == 3 or bits == 4)) {
            return words("PlanishQuantizeTokens: weights of {bits} bits have no kernel; weights of 2, 3 and 4 bits have", {{"bits", spell(bits)}});
        }
        if (!(channels >= 1 and channels <= 1000000)) {
            return words("PlanishQuantizeTokens: {channels} channels; there are 1 to 1000000", {{"channels", spell(channels)}});
        }
        if (!(high_channels >= 0 and high_channels <= 1000000 and high_channels % 64 == 0)) {
            return words("PlanishQuantizeTokens: {high_channels} high-impact channels; they are a multiple of 64, up to 1000000", {{"high_channels", spell(high_channels)}});
        }
        if (!(width() <= 16384)) {
            return words("PlanishQuantizeTokens: tokens of {width} channels; a kernel holds up to 16384", {{"width", spell(width())}});
        }
        if (!(activation_bits >= 2 and activation_bits <= 8 and high_activation_bits >= 2 and high_activation_bits <= 8)) {
            return words("PlanishQuantizeTokens: activations of {activation_bits} and {high_activation_bits} bits; they have 2 to 8", {{"activation_bits", spell(activation_bits)}, {"high_activation_bits", spell(high_activation_bits)}});
        }
        if (!(clip > 0 and clip <= 1 and high_clip > 0 and high_clip <= 1)) {
            return words("PlanishQuantizeTokens: clips of {clip} and {high_clip}; a clip is above 0 and up to 1", {{"clip", spell(clip)}, {"high_clip", spell(high_clip)}});
        }
        if (!(m >= 1 and m <= width() and k >= 1 and k <= width() and m * k == width())) {
            return words("PlanishQuantizeTokens: tokens of {width} channels are no {m} rows of {k}", {{"width", spell(width())}, {"m", spell(m)}, {"k", spell(k)}});
        }
        if (!(right_count == 0 or right_count == 1 or right_count == m)) {
            return words("PlanishQuantizeTokens: {right_count} right factors for {m} rows; there is one, or one for each row", {{"right_count", spell(right_count)}, {"m", spell(m)}});
        }
        if (!((right_count == 0 and has_left == 0) or width() <= widest_row(k))) {
            return words("PlanishQuantizeTokens: no block of threads is wide enough for {width} channels as rows of {k}", {{"width", spell(width())}, {"k", spell(k)}});
        }
        if (!(epsilon >= 0 and epsilon < 1)) {
            return words("PlanishQuantizeTokens: an epsilon of {epsilon}; it is 0 or more, and below 1", {{"epsilon", spell(epsilon)}});
        }
        return {};
    }

    Signature signature() const {
        Signature made = {"PlanishQuantizeTokens", {}, {}};
        made.inputs.push_back({"x", 0, {Type::kFloat32, Type::kFloat16, Type::kBfloat16}, {named("..."), sized(width())}, -1, -1});
        if (added) made.inputs.push_back({"residual", 1, {Type::kFloat32, Type::kFloat16, Type::kBfloat16}, {named("..."), sized(width())}, 0, -1});
        if (normed) made.inputs.push_back({"gain", 2, {Type::kFloat32}, {sized(width())}, -1, -1});
        if (right_count > 0) made.inputs.push_back({"right", 3, {Type::kFloat32}, {sized(right_count), sized(k), sized(k)}, -1, -1});
        if (has_left) made.inputs.push_back({"left", 4, {Type::kFloat32}, {sized(m), sized(m)}, -1, -1});
        if (permuted) made.inputs.push_back({"permutation", 5, {Type::kInt32}, {sized(width())}, -1, -1});
        made.outputs.push_back({"codes", 0, {Type::kInt32}, {named("..."), sized(code_words())}, -1, -1});
        made.outputs.push_back({"scales", 1, {Type::kFloat32}, {named("..."), sized(segments())}, -1, -1});
        made.outputs.push_back({"zero_sums", 2, {Type::kInt32}, {named("..."), sized(segments()), sized(2)}, -1, -1});
        if (added) made.outputs.push_back({"sum", 3, {Type::kFloat32, Type::kFloat16, Type::kBfloat16}, {named("..."), sized(width())}, 0, -1});
        return made;
    }
};

// Multiplies codes of tokens by low-bit weights: PlanishMatMul, of one segment or two; of gate and up, silu(gate) * up.
struct PlanishLinear {
    int32_t layout;  // version of the layouts of weights, codes and cache
    int32_t bits;  // bits of the weights of all other channels
    int32_t channels;  // input channels that are no high-impact ones
    int32_t high_channels;  // high-impact input channels, the first ones, with 4-bit weights; 0 is none
    int32_t rows;  // output channels
    int32_t code_bits;  // the most bits of a token's code, which decide how codes lie
    int32_t type;  // of y: 0 is float32, 1 float16, 2 bfloat16
    int32_t gated;  // 1 if rows are eight of gate, eight of up, and so on

    static constexpr const char* kName = "PlanishLinear";
    static constexpr const char* kVersion = "2";
    enum Input { kCodes, kScales, kZeroSums, kWords, kWeightScales, kRowSums, kHighWords, kHighWeightScales, kHighRowSums, kInputs };
    enum Output { kY, kOutputs };

    // The attributes, for reading and writing them by name.
    static const std::vector<Field>& fields() {
        static const std::vector<Field> all = {
            {"layout", Field::kInt, offsetof(PlanishLinear, layout), "version of the layouts of weights, codes and cache"},
            {"bits", Field::kInt, offsetof(PlanishLinear, bits), "bits of the weights of all other channels"},
            {"channels", Field::kInt, offsetof(PlanishLinear, channels), "input channels that are no high-impact ones"},
            {"high_channels", Field::kInt, offsetof(PlanishLinear, high_channels), "high-impact input channels, the first ones, with 4-bit weights; 0 is none"},
            {"rows", Field::kInt, offsetof(PlanishLinear, rows), "output channels"},
            {"code_bits", Field::kInt, offsetof(PlanishLinear, code_bits), "the most bits of a token's code, which decide how codes lie"},
            {"type", Field::kInt, offsetof(PlanishLinear, type), "of y: 0 is float32, 1 float16, 2 bfloat16"},
            {"gated", Field::kInt, offsetof(PlanishLinear, gated), "1 if rows are eight of gate, eight of up, and so on"},
        };
        return all;
    }
    int64_t segments() const { return (high_channels > 0) + 1; }
    int64_t code_words() const { return ceil_div(high_channels + padded_channels(channels, bits), 4); }
    int64_t row_tiles() const { return ceil_div(rows, 16); }
    int64_t tile_words() const { return ceil_div(padded_channels(channels, bits) * bits, 2); }
    int64_t high_tile_words() const { return high_channels * 2; }
    int64_t results() const { return rows - gated * ceil_div(rows, 2); }

    // What is wrong with the attributes; empty if nothing is.
    std::string problem() const {
        if (!(layout == 1)) {
            return words("PlanishLinear: the model is packed in layout {layout}, and this library reads layout 1; build the engine again with the planish of the library", {{"layout", spell(layout)}});
        }
        if (!(bits == 2 or bits == 3 or bits == 4)) {
            return words("PlanishLinear: weights of {bits} bits have no kernel; weights of 2, 3 and 4 bits have", {{"bits", spell(bits)}});
        }
        if (!(channels >= 1 and channels <= 1000000)) {
            return words("PlanishLinear: {channels} channels; there are 1 to 1000000", {{"channels", spell(channels)}});
        }
        if (!(high_channels >= 0 and high_channels <= 1000000 and high_channels % 64 == 0)) {
            return words("PlanishLinear: {high_channels} high-impact channels; they are a multiple of 64, up to 1000000", {{"high_channels", spell(high_channels)}});
        }
        if (!(rows >= 1)) {
            return words("PlanishLinear: {rows} output channels; there is one at least", {{"rows", spell(rows)}});
        }
        if (!(code_bits >= 2 and code_bits <= 8)) {
            return words("PlanishLinear: codes of {code_bits} bits; they have 2 to 8", {{"code_bits", spell(code_bits)}});
        }
        if (!(type >= 0 and type <= 2)) {
            return words("PlanishLinear: type {type}; 0 is float32, 1 float16, 2 bfloat16", {{"type", spell(type)}});
        }
        if (!(gated == 0 or gated == 1)) {
            return words("PlanishLinear: gated is {gated}; it is 0 or 1", {{"gated", spell(gated)}});
        }
        if (!(gated == 0 or rows % 16 == 0)) {
            return words("PlanishLinear: {rows} rows of gate and up; they come in sixteens", {{"rows", spell(rows)}});
        }
        return {};
    }

    Signature signature() const {
        Signature made = {"PlanishLinear", {}, {}};
        made.inputs.push_back({"codes", 0, {Type::kInt32}, {named("..."), sized(code_words())}, -1, -1});
        made.inputs.push_back({"scales", 1, {Type::kFloat32}, {named("..."), sized(segments())}, -1, -1});
        made.inputs.push_back({"zero_sums", 2, {Type::kInt32}, {named("..."), sized(segments()), sized(2)}, -1, -1});
        made.inputs.push_back({"words", 3, {Type::kInt32}, {sized(row_tiles()), sized(tile_words())}, -1, -1});
        made.inputs.push_back({"weight_scales", 4, {Type::kFloat32}, {sized(rows)}, -1, -1});
        made.inputs.push_back({"row_sums", 5, {Type::kInt32}, {sized(row_tiles() * 16)}, -1, -1});
        if (high_channels > 0) made.inputs.push_back({"high_words", 6, {Type::kInt32}, {sized(row_tiles()), sized(high_tile_words())}, -1, -1});
        if (high_channels > 0) made.inputs.push_back({"high_weight_scales", 7, {Type::kFloat32}, {sized(rows)}, -1, -1});
        if (high_channels > 0) made.inputs.push_back({"high_row_sums", 8, {Type::kInt32}, {sized(row_tiles() * 16)}, -1, -1});
        made.outputs.push_back({"y", 0, {pick({Type::kFloat32, Type::kFloat16, Type::kBfloat16}, type)}, {named("..."), sized(results())}, -1, -1});
        return made;
    }
};

// Quantises new keys and values and writes them into the packed cache, in place: PlanishAppendKv, twice.
struct PlanishKvAppend {
    int32_t layout;  // version of the layouts of weights, codes and cache
    int32_t kv_heads;  // heads of keys and values
    int32_t head_dim;  // channels of a head
    int32_t context;  // tokens that the cache has room for
    int32_t key_bits;  // bits of a key's code
    int32_t value_bits;  // bits of a value's code
    float key_clip;  // share of a key's range that the grid spans
    float value_clip;  // share of a value's range that the grid spans

    static constexpr const char* kName = "PlanishKvAppend";
    static constexpr const char* kVersion = "1";
    enum Input { kKey, kValue, kPastLengths, kNewLengths, kKeyCache, kKeyGrids, kValueCache, kValueGrids, kInputs };
    enum Output { kNewKeyCache, kNewKeyGrids, kNewValueCache, kNewValueGrids, kOutputs };

    // The attributes, for reading and writing them by name.
    static const std::vector<Field>& fields() {
        static const std::vector<Field> all = {
            {"layout", Field::kInt, offsetof(PlanishKvAppend, layout), "version of the layouts of weights, codes and cache"},
            {"kv_heads", Field::kInt, offsetof(PlanishKvAppend, kv_heads), "heads of keys and values"},
            {"head_dim", Field::kInt, offsetof(PlanishKvAppend, head_dim), "channels of a head"},
            {"context", Field::kInt, offsetof(PlanishKvAppend, context), "tokens that the cache has room for"},
            {"key_bits", Field::kInt, offsetof(PlanishKvAppend, key_bits), "bits of a key's code"},
            {"value_bits", Field::kInt, offsetof(PlanishKvAppend, value_bits), "bits of a value's code"},
            {"key_clip", Field::kFloat, offsetof(PlanishKvAppend, key_clip), "share of a key's range that the grid spans"},
            {"value_clip", Field::kFloat, offsetof(PlanishKvAppend, value_clip), "share of a value's range that the grid spans"},
        };
        return all;
    }
    int64_t key_words() const { return ceil_div(head_dim * key_bits, 32); }
    int64_t value_words() const { return ceil_div(head_dim * value_bits, 32); }

    // What is wrong with the attributes; empty if nothing is.
    std::string problem() const {
        if (!(layout == 1)) {
            return words("PlanishKvAppend: the model is packed in layout {layout}, and this library reads layout 1; build the engine again with the planish of the library", {{"layout", spell(layout)}});
        }
        if (!(kv_heads >= 1 and kv_heads <= 1024)) {
            return words("PlanishKvAppend: {kv_heads} KV heads; there are 1 to 1024", {{"kv_heads", spell(kv_heads)}});
        }
        if (!(head_dim == 64 or head_dim == 96 or head_dim == 128)) {
            return words("PlanishKvAppend: heads of {head_dim} channels have no kernel; heads of 64, 96 and 128 channels have", {{"head_dim", spell(head_dim)}});
        }
        if (!(context >= 16 and context % 16 == 0)) {
            return words("PlanishKvAppend: a cache for {context} tokens; it has room for a multiple of 16", {{"context", spell(context)}});
        }
        if (!(key_bits == 2 or key_bits == 3 or key_bits == 4 or key_bits == 8)) {
            return words("PlanishKvAppend: a cache of {key_bits} bits has no kernel; caches of 2, 3, 4 and 8 bits have", {{"key_bits", spell(key_bits)}});
        }
        if (!(value_bits == 2 or value_bits == 3 or value_bits == 4 or value_bits == 8)) {
            return words("PlanishKvAppend: a cache of {value_bits} bits has no kernel; caches of 2, 3, 4 and 8 bits have", {{"value_bits", spell(value_bits)}});
        }
        if (!(key_clip > 0 and key_clip <= 1 and value_clip > 0 and value_clip <= 1)) {
            return words("PlanishKvAppend: clips of {key_clip} and {value_clip}; a clip is above 0 and up to 1", {{"key_clip", spell(key_clip)}, {"value_clip", spell(value_clip)}});
        }
        return {};
    }

    Signature signature() const {
        Signature made = {"PlanishKvAppend", {}, {}};
        made.inputs.push_back({"key", 0, {Type::kFloat32, Type::kFloat16, Type::kBfloat16}, {named("batch"), named("tokens"), sized(kv_heads * head_dim)}, -1, -1});
        made.inputs.push_back({"value", 1, {Type::kFloat32, Type::kFloat16, Type::kBfloat16}, {named("batch"), named("tokens"), sized(kv_heads * head_dim)}, 0, -1});
        made.inputs.push_back({"past_lengths", 2, {Type::kInt32}, {named("batch")}, -1, -1});
        made.inputs.push_back({"new_lengths", 3, {Type::kInt32}, {named("batch")}, -1, -1});
        made.inputs.push_back({"key_cache", 4, {Type::kInt32}, {named("batch"), sized(kv_heads), sized(context), sized(key_words())}, -1, -1});
        made.inputs.push_back({"key_grids", 5, {Type::kFloat16}, {named("batch"), sized(kv_heads), sized(context), sized(2)}, -1, -1});
        made.inputs.push_back({"value_cache", 6, {Type::kInt32}, {named("batch"), sized(kv_heads), sized(context), sized(value_words())}, -1, -1});
        made.inputs.push_back({"value_grids", 7, {Type::kFloat16}, {named("batch"), sized(kv_heads), sized(context), sized(2)}, -1, -1});
        made.outputs.push_back({"new_key_cache", 0, {Type::kInt32}, {named("batch"), sized(kv_heads), sized(context), sized(key_words())}, -1, 4});
        made.outputs.push_back({"new_key_grids", 1, {Type::kFloat16}, {named("batch"), sized(kv_heads), sized(context), sized(2)}, -1, 5});
        made.outputs.push_back({"new_value_cache", 2, {Type::kInt32}, {named("batch"), sized(kv_heads), sized(context), sized(value_words())}, -1, 6});
        made.outputs.push_back({"new_value_grids", 3, {Type::kFloat16}, {named("batch"), sized(kv_heads), sized(context), sized(2)}, -1, 7});
        return made;
    }
};

// Causal attention of float queries over the packed cache: PlanishAttend.
struct PlanishKvAttend {
    int32_t layout;  // version of the layouts of weights, codes and cache
    int32_t kv_heads;  // heads of keys and values
    int32_t head_dim;  // channels of a head
    int32_t context;  // tokens that the cache has room for
    int32_t key_bits;  // bits of a key's code
    int32_t value_bits;  // bits of a value's code
    int32_t heads;  // query heads

    static constexpr const char* kName = "PlanishKvAttend";
    static constexpr const char* kVersion = "1";
    enum Input { kQuery, kPastLengths, kNewLengths, kKeyCache, kKeyGrids, kValueCache, kValueGrids, kInputs };
    enum Output { kY, kOutputs };

    // The attributes, for reading and writing them by name.
    static const std::vector<Field>& fields() {
        static const std::vector<Field> all = {
            {"layout", Field::kInt, offsetof(PlanishKvAttend, layout), "version of the layouts of weights, codes and cache"},
            {"kv_heads", Field::kInt, offsetof(PlanishKvAttend, kv_heads), "heads of keys and values"},
            {"head_dim", Field::kInt, offsetof(PlanishKvAttend, head_dim), "channels of a head"},
            {"context", Field::kInt, offsetof(PlanishKvAttend, context), "tokens that the cache has room for"},
            {"key_bits", Field::kInt, offsetof(PlanishKvAttend, key_bits), "bits of a key's code"},
            {"value_bits", Field::kInt, offsetof(PlanishKvAttend, value_bits), "bits of a value's code"},
            {"heads", Field::kInt, offsetof(PlanishKvAttend, heads), "query heads"},
        };
        return all;
    }
    int64_t key_words() const { return ceil_div(head_dim * key_bits, 32); }
    int64_t value_words() const { return ceil_div(head_dim * value_bits, 32); }

    // What is wrong with the attributes; empty if nothing is.
    std::string problem() const {
        if (!(layout == 1)) {
            return words("PlanishKvAttend: the model is packed in layout {layout}, and this library reads layout 1; build the engine again with the planish of the library", {{"layout", spell(layout)}});
        }
        if (!(kv_heads >= 1 and kv_heads <= 1024)) {
            return words("PlanishKvAttend: {kv_heads} KV heads; there are 1 to 1024", {{"kv_heads", spell(kv_heads)}});
        }
        if (!(head_dim == 64 or head_dim == 96 or head_dim == 128)) {
            return words("PlanishKvAttend: heads of {head_dim} channels have no kernel; heads of 64, 96 and 128 channels have", {{"head_dim", spell(head_dim)}});
        }
        if (!(context >= 16 and context % 16 == 0)) {
            return words("PlanishKvAttend: a cache for {context} tokens; it has room for a multiple of 16", {{"context", spell(context)}});
        }
        if (!(key_bits == 2 or key_bits == 3 or key_bits == 4 or key_bits == 8)) {
            return words("PlanishKvAttend: a cache of {key_bits} bits has no kernel; caches of 2, 3, 4 and 8 bits have", {{"key_bits", spell(key_bits)}});
        }
        if (!(value_bits == 2 or value_bits == 3 or value_bits == 4 or value_bits == 8)) {
            return words("PlanishKvAttend: a cache of {value_bits} bits has no kernel; caches of 2, 3, 4 and 8 bits have", {{"value_bits", spell(value_bits)}});
        }
        if (!(heads >= 1 and heads <= 1024 and heads % kv_heads == 0)) {
            return words("PlanishKvAttend: {heads} query heads cannot share {kv_heads} KV heads", {{"heads", spell(heads)}, {"kv_heads", spell(kv_heads)}});
        }
        return {};
    }

    Signature signature() const {
        Signature made = {"PlanishKvAttend", {}, {}};
        made.inputs.push_back({"query", 0, {Type::kFloat32, Type::kFloat16, Type::kBfloat16}, {named("batch"), named("tokens"), sized(heads * head_dim)}, -1, -1});
        made.inputs.push_back({"past_lengths", 1, {Type::kInt32}, {named("batch")}, -1, -1});
        made.inputs.push_back({"new_lengths", 2, {Type::kInt32}, {named("batch")}, -1, -1});
        made.inputs.push_back({"key_cache", 3, {Type::kInt32}, {named("batch"), sized(kv_heads), sized(context), sized(key_words())}, -1, -1});
        made.inputs.push_back({"key_grids", 4, {Type::kFloat16}, {named("batch"), sized(kv_heads), sized(context), sized(2)}, -1, -1});
        made.inputs.push_back({"value_cache", 5, {Type::kInt32}, {named("batch"), sized(kv_heads), sized(context), sized(value_words())}, -1, -1});
        made.inputs.push_back({"value_grids", 6, {Type::kFloat16}, {named("batch"), sized(kv_heads), sized(context), sized(2)}, -1, -1});
        made.outputs.push_back({"y", 0, {Type::kFloat32, Type::kFloat16, Type::kBfloat16}, {named("batch"), named("tokens"), sized(heads * head_dim)}, 0, -1});
        return made;
    }
};

// The operations of the library.
using Plugins = Types<PlanishQuantizeTokens, PlanishLinear, PlanishKvAppend, PlanishKvAttend>;

}  // namespace planish::plugin
