"""The float export computes what transformers computes, on every variant, step by step and padded."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import TokenizerError
from planish.compiler.export.float_model import export_float, float_model, save_model
from tests.onnx_run import CachedModel, greedy, positions, range_error
from tests.tiny import VARIANTS, write_tiny

Ids = npt.NDArray[np.int64]
#: Our model and transformers'.
Models = tuple[CachedModel, LlamaForCausalLM]
RealModels = tuple[CachedModel, LlamaForCausalLM, Ids]

#: What is seen is about 1e-6; a wrong angle, mask or gain gives 1e-2 and more.
BOUND = 1e-5
LAYERS = 2
DATA = Path(os.environ.get("PLANISH_DATA", "data"))
TEXT = DATA / "dev" / "wikitext2_valid.txt"
#: Read where the data folder is not there.
PARAGRAPH = """
A planishing hammer has a broad, slightly domed and highly polished face. The smith lays the raised vessel over a
stake whose curve fits the inside of the wall, and works round it in close, even courses, each blow overlapping the
one before. Nothing is stretched any more: the metal between hammer and stake is only made level, the marks of the
raising are closed, and the surface takes the polish of the tools. It is slow work. A bowl of twenty centimetres may
take some thousands of blows, all of the same weight, and the last course shows whether the first was true. In the
workshops of the eighteenth century apprentices were kept at it for a year before they were allowed to raise a form
of their own. Machines do it now in minutes, between two dies, and most buyers cannot tell. But hold such a bowl to
the window and turn it: in the hand-made one the light moves in small facets, like water under a light wind, while in
the pressed one it slides without a halt from rim to foot. The older books advise the beginner to listen. A blow that
lands square on the stake rings; one that lands beside it thuds, and leaves a bruise that takes ten more to remove.
Whoever has learned to hear the difference can planish in the dark, it is said, and there were shops where the
master, to prove the point, put out the lamp.
"""


def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_logits(model: LlamaForCausalLM, ids: Ids, mask: Ids) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        y = model(*map(torch.from_numpy, (ids, mask)), position_ids=torch.from_numpy(positions(mask)))
    return y.logits.numpy()


def reference_greedy(model: LlamaForCausalLM, ids: Ids, mask: Ids, tokens: int) -> Ids:
    # Without an end token all rows run to the end.
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return made[:, ids.shape[1] :].numpy()


def random_ids(batch: int, sequence: int, vocabulary: int = 272) -> Ids:
    return np.random.default_rng(sequence).integers(3, vocabulary, (batch, sequence))


def left_padded(lengths: list[int]) -> tuple[Ids, Ids]:
    """Return ids and mask of prompts of these lengths."""
    longest = max(lengths)
    ids = random_ids(len(lengths), longest)
    mask = (np.arange(longest) >= longest - np.array(lengths)[:, None]).astype(np.int64)
    return np.where(mask == 1, ids, 2), mask


@pytest.fixture(scope="module", params=VARIANTS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Our model and transformers', of one variant."""
    folder = write_tiny(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])
    return CachedModel(export_float(open_checkpoint(folder), folder / "onnx")), reference(folder)


@pytest.mark.parametrize(
    "sizes", [[160], [1, 97, 2, 60], [1] * 40], ids=["prefill", "chunked_prefill", "token_by_token"]
)
def test_logits(both: Models, sizes: list[int]) -> None:
    ours, theirs = both
    ids = random_ids(1, sum(sizes))
    assert range_error(ours.in_chunks(ids, sizes), reference_logits(theirs, ids, np.ones_like(ids))) < BOUND


@pytest.mark.parametrize("sizes", [[24], [9, 1, 14], [1] * 24], ids=["prefill", "chunked_prefill", "token_by_token"])
def test_logits_of_a_padded_batch(both: Models, sizes: list[int]) -> None:
    ours, theirs = both
    ids, mask = left_padded([24, 7, 16])
    real = mask == 1
    assert range_error(ours.in_chunks(ids, sizes, mask)[real], reference_logits(theirs, ids, mask)[real]) < BOUND
    # The padding itself leaves no trace: each prompt alone gives the same.
    alone = ours(ids[1:2, -7:]).logits
    assert range_error(ours(ids, mask).logits[1:2, -7:], alone) < BOUND


def test_greedy_tokens(both: Models) -> None:
    ours, theirs = both
    ids, mask = left_padded([11, 5, 8])
    np.testing.assert_array_equal(greedy(ours, ids, mask, 64), reference_greedy(theirs, ids, mask, 64))


@pytest.mark.parametrize("keep", [0, 1, 3, 12])
def test_num_logits_to_keep(both: Models, keep: int) -> None:
    ours, _ = both
    ids = random_ids(2, 12)
    # Other shapes may sum in another order.
    np.testing.assert_allclose(ours(ids, keep=keep).logits, ours(ids).logits[:, -keep:], rtol=1e-4, atol=1e-4)


def test_mask(tmp_path: Path) -> None:
    """Slots up to the token's own that hold real tokens, and always itself, so that no softmax is over nothing."""
    model = float_model(open_checkpoint(write_tiny(tmp_path)))
    mask = next(node.outputs[0] for node in model.graph if node.name == "model.mask")
    mask.type, mask.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 1, "sequence", "total"])
    model.graph.outputs.append(mask)
    loaded = CachedModel(save_model(model, tmp_path / "onnx"))
    attention_mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    ids = random_ids(2, 3)
    past = {name: np.zeros((2, 2, 2, 16), np.float32) for name in loaded.cache_inputs}
    feeds = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": np.zeros_like(ids), **past}
    (found,) = loaded.session.run(["model.mask"], feeds)
    seen = [
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
    ]
    np.testing.assert_array_equal(found[:, 0], np.where(seen, 0.0, -np.inf))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shards", [False, True], ids=["one_file", "shards"])
def test_half_precision_checkpoints(dtype: str, shards: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path, dtype=dtype, shards=shards)
    ids = random_ids(1, 50)
    logits = CachedModel(export_float(open_checkpoint(tmp_path), tmp_path / "onnx"))(ids).logits
    assert range_error(logits, reference_logits(reference(tmp_path), ids, np.ones_like(ids))) < BOUND


# The file


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    folder = write_tiny(tmp_path_factory.mktemp("exported"), attention_bias=True)
    checkpoint = open_checkpoint(folder)
    return checkpoint, export_float(checkpoint, folder / "onnx")


def test_the_checker_accepts_it(exported: tuple[Checkpoint, Path]) -> None:
    onnx.checker.check_model(str(exported[1]), full_check=True)


def test_opset_and_ir_version(exported: tuple[Checkpoint, Path]) -> None:
    model = onnx.load(exported[1], load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    assert model.ir_version == 11
    assert model.producer_name == "planish"


def test_weights_have_their_checkpoint_names_and_values(exported: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = exported
    initializers = ir.load(path).graph.initializers
    assert set(checkpoint.names()) <= set(initializers)
    for name in checkpoint.names():
        stored, original = initializers[name].const_value, checkpoint.tensor(name)
        assert stored is not None
        as_is = original.ndim == 1 or name in ("model.embed_tokens.weight", "lm_head.weight")
        np.testing.assert_array_equal(stored.numpy(), original if as_is else original.T, err_msg=name)


def test_nodes_are_named_after_modules(exported: tuple[Checkpoint, Path]) -> None:
    checkpoint, path = exported
    graph = ir.load(path).graph
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    modules = {name.rpartition(".")[0] for name in checkpoint.names()} - {"lm_head"}
    assert modules <= set(names)
    # The value that a module makes has its name too.
    made = {value.name for node in graph for value in node.outputs}
    assert modules <= made
    by_name = {node.name: node.op_type for node in graph}
    assert by_name["model.layers.1.self_attn.q_proj"] == "Add"
    assert by_name["model.layers.1.self_attn.q_proj.matmul"] == "MatMul"
    assert by_name["model.layers.1.mlp.down_proj"] == "MatMul"
    assert by_name["model.layers.1.self_attn.attend"] == "Attention"


def test_inputs_and_outputs(exported: tuple[Checkpoint, Path]) -> None:
    graph = ir.load(exported[1]).graph
    cache = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    past = [f"past_key_values.{name}" for name in cache]
    assert [value.name for value in graph.inputs] == [
        *("input_ids", "attention_mask", "position_ids"),
        *past,
        "num_logits_to_keep",
    ]
    assert [value.name for value in graph.outputs] == ["logits", *(f"present.{name}" for name in cache)]
    shapes = {value.name: str(value.shape) for value in (*graph.inputs, *graph.outputs)}
    assert shapes["input_ids"] == "[batch,sequence]"
    assert shapes["attention_mask"] == "[batch,total]"
    assert shapes["past_key_values.1.value"] == "[batch,2,past,16]"
    assert shapes["present.0.key"] == "[batch,2,total,16]"
    assert shapes["logits"] == "[batch,kept,272]"


def test_weights_lie_beside_the_model_on_page_boundaries(tmp_path: Path) -> None:
    """Large tensors can be memory-mapped; the model file itself stays small."""
    write_tiny(tmp_path, hidden_size=256, intermediate_size=1600, head_dim=16)
    path = export_float(open_checkpoint(tmp_path), tmp_path / "onnx")
    assert sorted(file.name for file in path.parent.glob("model*")) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 60_000
    large = 0
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "model.onnx.data"
            if int(entries["length"]) > 1 << 20:
                assert int(entries["offset"]) % 4096 == 0
                large += 1
    assert large == 6


def test_the_folder_holds_all_it_takes_to_use_it(exported: tuple[Checkpoint, Path]) -> None:
    folder = exported[1].parent
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names


def test_without_tokenizer(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError):
        export_float(open_checkpoint(tmp_path), tmp_path / "onnx")


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    save_model(float_model(checkpoint), tmp_path / "onnx", lambda done, total: seen.append((done, total)))
    total = seen[-1][1]
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_building_the_graph_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))

    def read(name: str) -> Any:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(checkpoint, "_read", read)
    float_model(checkpoint)


# The real model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> RealModels:
    """Our SmolLM2, transformers' and 256 tokens of text."""
    checkpoint = open_checkpoint("smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    path = export_float(checkpoint, folder)
    ours = CachedModel(path)
    (folder / "model.onnx.data").unlink()
    theirs = LlamaForCausalLM(LlamaConfig(**checkpoint.raw_config)).eval()
    weights = {name: torch.from_numpy(checkpoint.tensor(name)) for name in checkpoint.names()}
    assert theirs.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    text = TEXT.read_text()[:4000] if TEXT.exists() else PARAGRAPH
    ids = np.array([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:256]])
    assert ids.shape == (1, 256)
    return ours, theirs, ids


def test_smollm2_logits_on_real_text(smollm2: RealModels) -> None:
    ours, theirs, ids = smollm2
    expected = reference_logits(theirs, ids, np.ones_like(ids))
    assert range_error(ours(ids).logits, expected) < BOUND
    assert range_error(ours.in_chunks(ids, [200, 50, *[1] * 6]), expected) < BOUND


def test_smollm2_greedy_tokens(smollm2: RealModels) -> None:
    ours, theirs, ids = smollm2
    mask = np.ones_like(ids)
    np.testing.assert_array_equal(greedy(ours, ids, mask, 64), reference_greedy(theirs, ids, mask, 64))
