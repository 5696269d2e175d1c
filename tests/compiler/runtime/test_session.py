"""A session gives the same logits however the tokens are cut, and refuses models that are not planish's."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tokenizers import Tokenizer

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.float_bundle import export_bundle
from planish.compiler.errors import NotPlanishModelError, TokenizerError
from planish.compiler.runtime.session import Session
from tests.command import Run

TOKENS = np.random.default_rng(0).integers(3, 260, (1, 24))


@pytest.fixture(params=["float_bundle", "bundle"])
def session(request: pytest.FixtureRequest) -> Session:
    opened: Bundle = request.getfixturevalue(request.param)
    return opened.session(threads=1)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(actual - expected).max() <= 1e-4 * np.ptp(expected)


def test_chunks_and_single_tokens_give_the_logits_of_the_whole(session: Session) -> None:
    whole, _ = session.run(TOKENS)
    parts, cache = [], None
    for start, stop in ((0, 10), (10, 11), (11, 12), (12, 24)):
        logits, cache = session.run(TOKENS[:, start:stop], cache)
        parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), whole)
    assert cache is not None
    assert len(cache) == 24


def test_a_cache_stays_valid_after_it_was_extended(session: Session) -> None:
    _, cache = session.run(TOKENS[:, :8])
    first, _ = session.run(TOKENS[:, 8:9], cache)
    session.run(TOKENS[:, 9:12], cache)
    again, _ = session.run(TOKENS[:, 8:9], cache)
    np.testing.assert_array_equal(first, again)


def test_sequences_taken_from_a_cache_go_on_as_they_were(session: Session) -> None:
    ids = np.concatenate([TOKENS[:, :8], TOKENS[:, 8:16]])
    whole, _ = session.run(np.concatenate([ids, ids[:, :3]], axis=1))
    _, cache = session.run(ids)
    taken = cache.take([1, 0, 1])
    del cache
    assert len(taken) == 8
    following, _ = session.run(ids[[1, 0, 1], :3], taken)
    assert_close(following, whole[[1, 0, 1], 8:])


def test_padding_on_either_side_changes_nothing_for_real_tokens(session: Session) -> None:
    short, _ = session.run(TOKENS[:, :7])
    ids = np.full((3, 10), 2)
    mask = np.zeros_like(ids)
    ids[0], mask[0] = TOKENS[0, :10], 1
    ids[1, 3:], mask[1, 3:] = TOKENS[0, :7], 1
    ids[2, :7], mask[2, :7] = TOKENS[0, :7], 1
    logits, cache = session.run(ids, mask=mask)
    assert_close(logits[1:2, 3:], short)
    assert_close(logits[2:3, :7], short)

    expected, _ = session.run(TOKENS[:, :8])
    following, _ = session.run(np.repeat(TOKENS[:, 7:8], 3, axis=0), cache)
    assert_close(following[1, -1], expected[0, -1])
    assert_close(following[2, -1], expected[0, -1])


def test_logits_to_keep_keeps_the_last(session: Session) -> None:
    whole, _ = session.run(TOKENS)
    last, _ = session.run(TOKENS, logits_to_keep=1)
    assert last.shape[1] == 1
    assert_close(last[:, 0], whole[:, -1])


def test_cache_takes_the_bytes_it_says(session: Session) -> None:
    _, cache = session.run(TOKENS)
    assert cache.nbytes == session.cache_bytes_per_token * TOKENS.size


def test_low_bit_cache_has_the_bytes_of_its_codes_and_scales(bundle: Bundle) -> None:
    # 2 layers, 2 KV heads, 16 channels of one byte and a float16 scale and zero, for keys and for values.
    assert bundle.session(threads=1).cache_bytes_per_token == 2 * 2 * 2 * (16 + 4)


@pytest.mark.parametrize("producer", ["someone", "planish"])
def test_foreign_onnx_file_is_refused(tmp_path: Path, producer: str) -> None:
    # Neither another producer's model, nor one of planish's name that is no language model.
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, producer_name=producer, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(NotPlanishModelError, match="was not written by planish"):
        Session(tmp_path / "model.onnx")


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("not a protobuf")
    with pytest.raises(NotPlanishModelError, match="cannot load"):
        Session(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "with a token at least"),
        ([[]], {}, "with a token at least"),
        ([5, 6], {}, "must be .batch, sequence."),
        ([[5, -100]], {}, "tokens count from 0"),
        ([[5, 6]], {"mask": [[1]]}, "mask has the shape"),
        ([[5, 6]], {"logits_to_keep": -1}, "logits_to_keep must be"),
    ],
)
def test_tokens_that_cannot_be_run(session: Session, ids: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.run(ids, **options)


def test_tokens_beyond_the_vocabulary(session: Session) -> None:
    session.run([[271]])
    with pytest.raises(TokenizerError, match="gives token 272, and the model has 272 tokens"):
        session.run([[5, 272, 6]])
    with pytest.raises(TokenizerError, match="gives token 272"):
        session.run_traced([[272]], None, ())


def test_the_tokenizer_of_another_model(run: Run, tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<{number}>" for number in range(10)])
    tokenizer.save(str(model / "tokenizer.json"))
    out = export_bundle(model, tmp_path / "out").path
    assert run("generate", out, "a hen", "--max-new-tokens", 1).code == 0
    done = run("generate", out, "a hen <9>", "--max-new-tokens", 1)
    assert (done.code, "The tokenizer gives token 276, and the model has 272" in done.err) == (14, True), done.err


def test_a_cache_of_other_sequences(session: Session) -> None:
    _, cache = session.run(TOKENS[:, :4])
    with pytest.raises(ValueError, match="the cache is of 1 sequences, and input_ids has 2"):
        session.run([[5], [6]], cache)
