"""The LLaMA decoder as an ONNX graph: the one definition that every compiled model starts from.

Inputs (int64): input_ids [batch, sequence], attention_mask [batch, total] (1 for real tokens, total = past +
sequence), position_ids [batch, sequence], num_logits_to_keep [] (optional; 0, the default, keeps the logits of all
positions), and per layer past_key_values.{i}.key / .value, float32 [batch, kv_heads, past, head_dim].
Outputs: logits, float32 [batch, kept, vocab], and present.{i}.key / .value [batch, kv_heads, total, head_dim].

Nodes, and the values they make, are named after the modules of the checkpoint. Linear weights keep their checkpoint
name and are stored transposed, [in, out]; embed_tokens and lm_head are stored as in the checkpoint, [vocab, hidden].
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from planish.compiler.checkpoint.config import LlamaConfig
from planish.passes.builder import Builder
from planish.plugins.ops import OPSET

__all__ = ["IR_VERSION", "WeightSource", "build_decoder"]

#: The newest IR version that carries opset 24 and that TensorRT's parsers read.
IR_VERSION = 11

#: (checkpoint name, transpose) -> the tensor to store; evaluated when the model is saved.
WeightSource = Callable[[str, bool], ir.TensorProtocol]

Dim = int | str


def build_decoder(config: LlamaConfig, weight: WeightSource) -> ir.Model:
    """Return the float32 graph of a LlamaForCausalLM; no weight is read here."""
    build = Builder()

    def tensor(name: str, transpose: bool = False) -> ir.Value:
        return build.initializer(weight(name, transpose), name)

    def linear(x: ir.Value, module: str, bias: bool) -> ir.Value:
        name = f"{module}.matmul" if bias else module
        y = build.op("MatMul", [x, tensor(f"{module}.weight", True)], name)
        return build.op("Add", [y, tensor(f"{module}.bias")], module) if bias else y

    def norm(x: ir.Value, module: str) -> ir.Value:
        gain = tensor(f"{module}.weight")
        return build.op("RMSNormalization", [x, gain], module, axis=-1, epsilon=config.rms_norm_eps)

    input_ids = _input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    attention_mask = _input("attention_mask", ir.DataType.INT64, ["batch", "total"])
    position_ids = _input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    inputs, outputs = [input_ids, attention_mask, position_ids], []
    cos, sin = _rotary_angles(build, config, position_ids)
    mask = _attention_mask(build, input_ids, attention_mask)

    embedding = tensor("model.embed_tokens.weight")
    x = build.op("Gather", [embedding, input_ids], "model.embed_tokens")
    if embedding.dtype != ir.DataType.FLOAT:
        x = build.op("Cast", [x], "model.embed_tokens.float32", to=ir.DataType.FLOAT)

    for i in range(config.num_hidden_layers):
        layer, attention, mlp = f"model.layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        past = [_cache(f"past_key_values.{i}.{part}", config, "past") for part in ("key", "value")]

        h = norm(x, f"{layer}.input_layernorm")
        query, key, value = (linear(h, f"{attention}.{p}_proj", config.attention_bias) for p in "qkv")
        query = build.op(
            "RotaryEmbedding", [query, cos, sin], f"{attention}.q_rope", num_heads=config.num_attention_heads
        )
        key = build.op("RotaryEmbedding", [key, cos, sin], f"{attention}.k_rope", num_heads=config.num_key_value_heads)
        attended, *present = build.ops(
            "Attention",
            [query, key, value, mask, *past],
            f"{attention}.attend",
            3,
            q_num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
        )
        projected = linear(attended, f"{attention}.o_proj", config.attention_bias)
        x = build.op("Add", [x, projected], f"{attention}.residual")

        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{mlp}.gate_proj", config.mlp_bias)
        up = linear(h, f"{mlp}.up_proj", config.mlp_bias)
        sigmoid = build.op("Sigmoid", [gate], f"{mlp}.sigmoid")
        silu = build.op("Mul", [gate, sigmoid], f"{mlp}.silu")
        hidden = build.op("Mul", [silu, up], f"{mlp}.hidden")
        projected = linear(hidden, f"{mlp}.down_proj", config.mlp_bias)
        x = build.op("Add", [x, projected], layer)

        for made, part in zip(present, ("key", "value"), strict=True):
            made.name = f"present.{i}.{part}"
            made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), _cache_shape(config, "total")
        inputs += past
        outputs += present

    x = norm(x, "model.norm")
    keep = _input("num_logits_to_keep", ir.DataType.INT64, [])
    keep.const_value = ir.tensor(np.asarray(0, np.int64), name=keep.name)
    x = _last_positions(build, x, keep)
    head = embedding if config.tie_word_embeddings else tensor("lm_head.weight")
    if head.dtype != ir.DataType.FLOAT:
        head = build.op("Cast", [head], "lm_head.float32", to=ir.DataType.FLOAT)
    head = build.op("Transpose", [head], "lm_head.transposed", perm=[1, 0])
    logits = build.op("MatMul", [x, head], "logits")
    logits.type = ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "kept", config.vocab_size])

    graph = ir.Graph(
        [*inputs, keep],
        [logits, *outputs],
        nodes=build.nodes,
        initializers=[*build.initializers, keep],
        opset_imports={"": OPSET},
        name="llama",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="planish")


def _rotary_angles(build: Builder, config: LlamaConfig, position_ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return cos and sin of position * inverse frequency, float32 [batch, sequence, head_dim / 2]."""
    frequencies = build.initializer(config.inv_freq()[None, None, :], "model.rotary_emb.inv_freq")
    axis = build.ints([-1], "model.rotary_emb.last_axis")
    positions = build.op("Cast", [position_ids], "model.rotary_emb.positions", to=ir.DataType.FLOAT)
    column = build.op("Unsqueeze", [positions, axis], "model.rotary_emb.column")
    angles = build.op("Mul", [column, frequencies], "model.rotary_emb.angles")
    return build.op("Cos", [angles], "model.rotary_emb.cos"), build.op("Sin", [angles], "model.rotary_emb.sin")


def _attention_mask(build: Builder, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """Return the additive mask, float32 [batch, 1, sequence, total]: 0 where attended to, -inf elsewhere.

    Query slot past + j sees key slots 0 .. past + j that hold real tokens, and always itself: a padding token that
    saw nothing would make NaN, which reaches real tokens through 0 * NaN.
    """

    def range_of(start: ir.Value, stop: ir.Value, name: str) -> ir.Value:
        return build.op("Range", [start, stop, one], name)

    zero, one = build.ints(0, "model.mask.zero"), build.ints(1, "model.mask.one")
    key_axes, query_axes = build.ints([1, 2], "model.mask.key_axes"), build.ints([-1], "model.mask.query_axes")
    sequence = build.op(
        "Squeeze", [build.op("Shape", [input_ids], "model.mask.seq", start=1, end=2)], "model.mask.sequence"
    )
    total = build.op(
        "Squeeze", [build.op("Shape", [attention_mask], "model.mask.tot", start=1, end=2)], "model.mask.total"
    )
    past = build.op("Sub", [total, sequence], "model.mask.past")
    key_slots = range_of(zero, total, "model.mask.key_slots")
    query_slots = build.op(
        "Unsqueeze", [range_of(past, total, "model.mask.slots"), query_axes], "model.mask.query_slots"
    )
    causal = build.op("LessOrEqual", [key_slots, query_slots], "model.mask.causal")
    itself = build.op("Equal", [key_slots, query_slots], "model.mask.itself")
    real = build.op("Cast", [attention_mask], "model.mask.real", to=ir.DataType.BOOL)
    real = build.op("Unsqueeze", [real, key_axes], "model.mask.real_keys")
    seen = build.op("Or", [build.op("And", [causal, real], "model.mask.past_real"), itself], "model.mask.seen")
    return build.op(
        "Where",
        [seen, build.floats(0.0, "model.mask.open"), build.floats(float("-inf"), "model.mask.closed")],
        "model.mask",
    )


def _last_positions(build: Builder, x: ir.Value, keep: ir.Value) -> ir.Value:
    """Return x[:, -keep:]; -0 is 0, so that keep = 0 keeps all."""
    axis, end = build.ints([1], "logits_to_keep.axis"), build.ints([np.iinfo(np.int64).max], "logits_to_keep.end")
    start = build.op(
        "Unsqueeze",
        [build.op("Neg", [keep], "logits_to_keep.neg"), build.ints([0], "logits_to_keep.dim")],
        "logits_to_keep.start",
    )
    return build.op("Slice", [x, start, end, axis], "logits_to_keep")


def _input(name: str, dtype: ir.DataType, shape: list[Dim]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _cache_shape(config: LlamaConfig, length: str) -> ir.Shape:
    return ir.Shape(["batch", config.num_key_value_heads, length, config.head_dim])


def _cache(name: str, config: LlamaConfig, length: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=_cache_shape(config, length))
