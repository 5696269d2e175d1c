"""The contracts of the plugins.

Their names are not those of the planish functions: a parser that knows both takes the plugin, and these have other
inputs. Codes travel as int32, four bytes to a number, because TensorRT has typing rules of its own for int8.
"""

from planish.plugins.tensorrt.contract import Attribute, Contract, Dtype, Rule, Tensor

__all__ = ["KV_APPEND", "KV_ATTEND", "LAYOUT", "LINEAR", "PLUGINS", "QUANTIZE_TOKENS"]

#: Version of the layouts in memory: weights (segments.cuh), codes of tokens (fragments.cuh), cache (packing.py).
LAYOUT = 1

_FLOATS: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
_INT: tuple[Dtype, ...] = ("int32",)

_LAYOUT = Attribute("layout", "int", "version of the layouts of weights, codes and cache")
_SAME_LAYOUT = Rule(
    f"layout == {LAYOUT}",
    f"the model is packed in layout {{layout}}, and this library reads layout {LAYOUT}; build the engine again with "
    "the planish of the library",
)
_SEGMENTS = "(high_channels > 0) + 1"
_STORED = {
    "segments": _SEGMENTS,
    "code_words": "ceil_div(high_channels + padded_channels(channels, bits), 4)",
}
_WEIGHT_ATTRIBUTES = (
    Attribute("bits", "int", "bits of the weights of all other channels"),
    Attribute("channels", "int", "input channels that are no high-impact ones"),
    Attribute("high_channels", "int", "high-impact input channels, the first ones, with 4-bit weights; 0 is none"),
)
_WEIGHT_RULES = (
    Rule(
        "bits == 2 or bits == 3 or bits == 4",
        "weights of {bits} bits have no kernel; weights of 2, 3 and 4 bits have",
    ),
    Rule("channels >= 1 and channels <= 1000000", "{channels} channels; there are 1 to 1000000"),
    Rule(
        "high_channels >= 0 and high_channels <= 1000000 and high_channels % 64 == 0",
        "{high_channels} high-impact channels; they are a multiple of 64, up to 1000000",
    ),
)
_CODE_TENSORS = (
    Tensor("codes", _INT, ("...", "code_words"), "four codes to a number, in the order of fragments.cuh"),
    Tensor("scales", ("float32",), ("...", "segments"), "of the codes of a token, by segment"),
    Tensor("zero_sums", _INT, ("...", "segments", "2"), "zero point, and sum of the codes with padding"),
)

QUANTIZE_TOKENS = Contract(
    name="PlanishQuantizeTokens",
    version="2",
    meaning="Adds a residual to tokens, normalises, transforms, permutes and quantises them: PlanishQuantizeActivation "
    "behind Add, RMSNormalization and PlanishTransform.",
    attributes=(
        _LAYOUT,
        *_WEIGHT_ATTRIBUTES,
        Attribute("activation_bits", "int", "bits of the codes of these channels, 2 .. 8"),
        Attribute("clip", "float", "share of their largest magnitude that the grid spans"),
        Attribute("high_activation_bits", "int", "the same of the high-impact channels"),
        Attribute("high_clip", "float", "likewise"),
        Attribute("m", "int", "rows of a token as a matrix"),
        Attribute("k", "int", "its columns"),
        Attribute("right_count", "int", "right factors: 0 is none, 1, or m"),
        Attribute("has_left", "int", "1 if there is a left factor"),
        Attribute("permuted", "int", "1 if there is a permutation"),
        Attribute("added", "int", "1 if there is a residual to add"),
        Attribute("normed", "int", "1 if there is a norm"),
        Attribute("epsilon", "float", "of the norm"),
    ),
    derived={"width": "channels + high_channels", **_STORED},
    rules=(
        _SAME_LAYOUT,
        *_WEIGHT_RULES,
        Rule("width <= 16384", "tokens of {width} channels; a kernel holds up to 16384"),
        Rule(
            "activation_bits >= 2 and activation_bits <= 8 and high_activation_bits >= 2 and high_activation_bits <= 8",
            "activations of {activation_bits} and {high_activation_bits} bits; they have 2 to 8",
        ),
        Rule(
            "clip > 0 and clip <= 1 and high_clip > 0 and high_clip <= 1",
            "clips of {clip} and {high_clip}; a clip is above 0 and up to 1",
        ),
        Rule(
            "m >= 1 and m <= width and k >= 1 and k <= width and m * k == width",
            "tokens of {width} channels are no {m} rows of {k}",
        ),
        Rule(
            "right_count == 0 or right_count == 1 or right_count == m",
            "{right_count} right factors for {m} rows; there is one, or one for each row",
        ),
        Rule(
            "(right_count == 0 and has_left == 0) or width <= widest_row(k)",
            "no block of threads is wide enough for {width} channels as rows of {k}",
        ),
        Rule("epsilon >= 0 and epsilon < 1", "an epsilon of {epsilon}; it is 0 or more, and below 1"),
    ),
    inputs=(
        Tensor("x", _FLOATS, ("...", "width"), "the tokens"),
        Tensor("residual", _FLOATS, ("...", "width"), "is added to them", given="added", like="x"),
        Tensor("gain", ("float32",), ("width",), "of the norm", given="normed"),
        Tensor("right", ("float32",), ("right_count", "k", "k"), "right factors", given="right_count > 0"),
        Tensor("left", ("float32",), ("m", "m"), "left factor", given="has_left"),
        Tensor("permutation", _INT, ("width",), "stored channel i is channel permutation[i]", given="permuted"),
    ),
    outputs=(*_CODE_TENSORS, Tensor("sum", _FLOATS, ("...", "width"), "x + residual", given="added", like="x")),
)

LINEAR = Contract(
    name="PlanishLinear",
    version="2",
    meaning="Multiplies codes of tokens by low-bit weights: PlanishMatMul, of one segment or two; of gate and up, "
    "silu(gate) * up.",
    attributes=(
        _LAYOUT,
        *_WEIGHT_ATTRIBUTES,
        Attribute("rows", "int", "output channels"),
        Attribute("code_bits", "int", "the most bits of a token's code, which decide how codes lie"),
        Attribute("type", "int", "of y: 0 is float32, 1 float16, 2 bfloat16"),
        Attribute("gated", "int", "1 if rows are eight of gate, eight of up, and so on"),
    ),
    derived={
        **_STORED,
        "row_tiles": "ceil_div(rows, 16)",
        "tile_words": "ceil_div(padded_channels(channels, bits) * bits, 2)",
        "high_tile_words": "high_channels * 2",
        "results": "rows - gated * ceil_div(rows, 2)",
    },
    rules=(
        _SAME_LAYOUT,
        *_WEIGHT_RULES,
        Rule("rows >= 1", "{rows} output channels; there is one at least"),
        Rule("code_bits >= 2 and code_bits <= 8", "codes of {code_bits} bits; they have 2 to 8"),
        Rule("type >= 0 and type <= 2", "type {type}; 0 is float32, 1 float16, 2 bfloat16"),
        Rule("gated == 0 or gated == 1", "gated is {gated}; it is 0 or 1"),
        Rule("gated == 0 or rows % 16 == 0", "{rows} rows of gate and up; they come in sixteens"),
    ),
    inputs=(
        *_CODE_TENSORS,
        Tensor("words", _INT, ("row_tiles", "tile_words"), "weights in kernel layout"),
        Tensor("weight_scales", ("float32",), ("rows",), "of the weights, by row"),
        Tensor("row_sums", _INT, ("row_tiles * 16",), "sums of centred codes, by row"),
        Tensor("high_words", _INT, ("row_tiles", "high_tile_words"), "of the high segment", given="high_channels > 0"),
        Tensor("high_weight_scales", ("float32",), ("rows",), "likewise", given="high_channels > 0"),
        Tensor("high_row_sums", _INT, ("row_tiles * 16",), "likewise", given="high_channels > 0"),
    ),
    outputs=(Tensor("y", _FLOATS, ("...", "results"), "the products", pick="type"),),
)

_CACHE_ATTRIBUTES = (
    _LAYOUT,
    Attribute("kv_heads", "int", "heads of keys and values"),
    Attribute("head_dim", "int", "channels of a head"),
    Attribute("context", "int", "tokens that the cache has room for"),
    Attribute("key_bits", "int", "bits of a key's code"),
    Attribute("value_bits", "int", "bits of a value's code"),
)
_CACHE_RULES = (
    _SAME_LAYOUT,
    Rule("kv_heads >= 1 and kv_heads <= 1024", "{kv_heads} KV heads; there are 1 to 1024"),
    Rule(
        "head_dim == 64 or head_dim == 96 or head_dim == 128",
        "heads of {head_dim} channels have no kernel; heads of 64, 96 and 128 channels have",
    ),
    Rule("context >= 16 and context % 16 == 0", "a cache for {context} tokens; it has room for a multiple of 16"),
    *(
        Rule(
            f"{side} == 2 or {side} == 3 or {side} == 4 or {side} == 8",
            f"a cache of {{{side}}} bits has no kernel; caches of 2, 3, 4 and 8 bits have",
        )
        for side in ("key_bits", "value_bits")
    ),
)
_CACHE = (
    Tensor("key_cache", _INT, ("batch", "kv_heads", "context", "key_words"), "codes, in the layout of packing.pack"),
    Tensor("key_grids", ("float16",), ("batch", "kv_heads", "context", "2"), "scale then zero"),
    Tensor("value_cache", _INT, ("batch", "kv_heads", "context", "value_words"), "likewise"),
    Tensor("value_grids", ("float16",), ("batch", "kv_heads", "context", "2"), "likewise"),
)
_CACHE_SIZES = {"key_words": "ceil_div(head_dim * key_bits, 32)", "value_words": "ceil_div(head_dim * value_bits, 32)"}
_LENGTHS = (
    Tensor("past_lengths", _INT, ("batch",), "tokens of each sequence in the cache"),
    Tensor("new_lengths", _INT, ("batch",), "tokens of each sequence that come now; what follows them is padding"),
)

KV_APPEND = Contract(
    name="PlanishKvAppend",
    version="1",
    meaning="Quantises new keys and values and writes them into the packed cache, in place: PlanishAppendKv, twice.",
    attributes=(
        *_CACHE_ATTRIBUTES,
        Attribute("key_clip", "float", "share of a key's range that the grid spans"),
        Attribute("value_clip", "float", "share of a value's range that the grid spans"),
    ),
    derived=_CACHE_SIZES,
    rules=(
        *_CACHE_RULES,
        Rule(
            "key_clip > 0 and key_clip <= 1 and value_clip > 0 and value_clip <= 1",
            "clips of {key_clip} and {value_clip}; a clip is above 0 and up to 1",
        ),
    ),
    inputs=(
        Tensor("key", _FLOATS, ("batch", "tokens", "kv_heads * head_dim"), "new keys, behind RoPE and key map"),
        Tensor("value", _FLOATS, ("batch", "tokens", "kv_heads * head_dim"), "new values", like="key"),
        *_LENGTHS,
        *_CACHE,
    ),
    outputs=tuple(
        Tensor(f"new_{each.name}", each.dtypes, each.shape, "with the new tokens", alias=each.name) for each in _CACHE
    ),
)

KV_ATTEND = Contract(
    name="PlanishKvAttend",
    version="1",
    meaning="Causal attention of float queries over the packed cache: PlanishAttend.",
    attributes=(*_CACHE_ATTRIBUTES, Attribute("heads", "int", "query heads")),
    derived=_CACHE_SIZES,
    rules=(
        *_CACHE_RULES,
        Rule(
            "heads >= 1 and heads <= 1024 and heads % kv_heads == 0",
            "{heads} query heads cannot share {kv_heads} KV heads",
        ),
    ),
    inputs=(
        Tensor("query", _FLOATS, ("batch", "tokens", "heads * head_dim"), "behind RoPE and key map"),
        *_LENGTHS,
        *_CACHE,
    ),
    outputs=(Tensor("y", _FLOATS, ("batch", "tokens", "heads * head_dim"), "the attention", like="query"),),
)

#: All plugins of the library.
PLUGINS = (QUANTIZE_TOKENS, LINEAR, KV_APPEND, KV_ATTEND)
