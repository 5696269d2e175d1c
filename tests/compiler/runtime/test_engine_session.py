"""An engine, bound as it will be on a GPU and run on the host, gives the logits that ONNX Runtime gives."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from planish.compiler.errors import DeviceError, EngineLimitError, EngineMismatchError, TokenizerError
from planish.compiler.harness.scoring import Answer, Request, answer_all
from planish.compiler.runtime.engine_session import EngineSession
from tests.engines import CONTEXT, KINDS, MAX_BATCH, MAX_PROMPT, Engine, build_engine, open_engine

TOKENS = np.random.default_rng(0).integers(3, 260, (1, 24))
BY_SLOTS = [name for name, kind in KINDS.items() if not kind.plugins]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds the engine of a kind once and returns its folder."""

    @functools.cache
    def folder_of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("engine")
        build_engine(kind, folder)
        return folder

    return folder_of


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Engine:
    return open_engine(request.param, built(request.param), monkeypatch)


@pytest.fixture
def float32(built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Engine:
    return open_engine("float32", built("float32"), monkeypatch)


@pytest.fixture
def plugged(built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Engine:
    return open_engine("plugins", built("plugins"), monkeypatch)


def assert_near(engine: Engine, found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= engine.kind.error * np.ptp(expected)


def test_prompt_and_answer_are_those_of_onnx_runtime(engine: Engine) -> None:
    session, reference = engine.session(), engine.reference()
    cache = theirs = None
    # Within the profile, beyond it, and token by token.
    for start, stop in ((0, 5), (5, 22), (22, 23), (23, 24)):
        expected, theirs = reference.run(TOKENS[:, start:stop], theirs)
        found, cache = session.run(TOKENS[:, start:stop], cache)
        assert_near(engine, found, expected)
    assert cache is not None
    assert len(cache) == 24
    assert [shapes["input_ids"] for shapes in engine.trt.shapes] == [(1, n) for n in (5, 8, 8, 1, 1, 1)]


def test_the_cache_stays_on_the_gpu_and_is_extended_where_it_lies(engine: Engine) -> None:
    session = engine.session()
    _, first = session.run(TOKENS[:, :5])
    addresses = [memory.address for memory in first.store.current.values()]
    before = engine.trt.gpu.used
    _, second = session.run(TOKENS[:, 5:6], first)
    _, third = session.run(TOKENS[:, 6:7], second)
    assert third.store is first.store
    assert [memory.address for memory in third.store.current.values()] == addresses
    assert (engine.trt.gpu.copies, engine.trt.gpu.used) == (0, before)
    in_place = all(third.store.current[name] is memory for name, memory in third.store.other.items())
    assert in_place == engine.trt.in_place


def test_a_cache_stays_valid_after_it_was_extended(engine: Engine) -> None:
    session, reference = engine.session(), engine.reference()
    _, cache = session.run(TOKENS[:, :8])
    first, longer = session.run(TOKENS[:, 8:9], cache)
    session.run(TOKENS[:, 9:12], cache)
    # What others have made of the cache is not in the one that extended it, nor in itself.
    expected, _ = reference.run(TOKENS[:, :10])
    assert_near(engine, session.run(TOKENS[:, 9:10], longer)[0], expected[:, -1:])
    again, _ = session.run(TOKENS[:, 8:9], cache)
    np.testing.assert_array_equal(first, again)


def test_sequences_taken_from_a_cache_go_on_as_they_were(engine: Engine) -> None:
    session, reference = engine.session(), engine.reference()
    ids = np.concatenate([TOKENS[:, :8], TOKENS[:, 8:16]])
    whole, _ = reference.run(np.concatenate([ids, ids[:, :3]], axis=1))
    _, cache = session.run(ids)
    taken = cache.take([1, 0, 1])
    del cache
    following, _ = session.run(ids[[1, 0, 1], :3], taken)
    assert_near(engine, following, whole[[1, 0, 1], 8:])


def test_what_does_not_fit_together(engine: Engine) -> None:
    session = engine.session()
    _, cache = session.run(TOKENS[:1, :2])
    for ids, options, message in (
        ([[]], {}, "with a token at least"),
        ([[5, -100]], {}, "tokens count from 0"),
        ([[5], [6]], {"cache": cache}, "the cache is of 1 sequences, and input_ids has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            session.run(ids, **options)
    with pytest.raises(TokenizerError, match="gives token 272, and the model has 272 tokens"):
        session.run([[5, 272]])


def test_padding_on_either_side_changes_nothing_for_real_tokens(engine: Engine) -> None:
    session, reference = engine.session(), engine.reference()
    ids = np.full((3, 10), 2)
    mask = np.zeros_like(ids)
    ids[0], mask[0] = TOKENS[0, :10], 1
    ids[1, 3:], mask[1, 3:] = TOKENS[0, :7], 1
    ids[2, :7], mask[2, :7] = TOKENS[0, :7], 1
    expected, theirs = reference.run(ids, mask=mask)
    found, cache = session.run(ids, mask=mask)
    real = mask.astype(bool)
    assert_near(engine, found[real], expected[real])
    # What follows is padded again, in other rows.
    more, some = np.array([[9, 2], [2, 11], [12, 13]]), np.array([[1, 0], [0, 1], [1, 1]])
    expected, theirs = reference.run(more, theirs, mask=some)
    found, cache = session.run(more, cache, mask=some)
    assert_near(engine, found[some == 1], expected[some == 1])
    last, _ = session.run(np.full((3, 1), 7), cache, logits_to_keep=1)
    assert_near(engine, last, reference.run(np.full((3, 1), 7), theirs, logits_to_keep=1)[0])


@pytest.mark.parametrize("keep", [1, 3, 7, 24])
def test_logits_to_keep_keeps_the_last(engine: Engine, keep: int) -> None:
    last, _ = engine.session().run(TOKENS[:, :20], logits_to_keep=keep)
    whole, _ = engine.reference().run(TOKENS[:, :20])
    assert_near(engine, last, whole[:, -keep:])


def test_rows_of_different_length_keep_their_last_logits(plugged: Engine) -> None:
    ids, mask = np.array([[5, 6, 7, 9], [2, 4, 8, 2]]), np.array([[1, 1, 1, 1], [0, 1, 1, 0]])
    found, _ = plugged.session().run(ids, mask=mask, logits_to_keep=2)
    expected, _ = plugged.reference().run(ids, mask=mask, logits_to_keep=2)
    assert_near(plugged, found[0], expected[0])
    assert_near(plugged, found[1, 0], expected[1, 0])
    assert (found[1, 1] == 0).all()


@pytest.mark.parametrize("engine", BY_SLOTS, indirect=True)
def test_the_last_slot_can_be_used_and_none_behind_it(engine: Engine) -> None:
    session, ids = engine.session(), np.tile(TOKENS, (1, 2))[:, :CONTEXT]
    assert (session.limits.sequences, session.limits.context) == (MAX_BATCH, CONTEXT)
    found, cache = session.run(ids)
    assert_near(engine, found, engine.reference().run(ids)[0])
    told = rf"built for 32 tokens of a sequence, and these are 33\. .*--target {engine.kind.flavour} --max-context 33'"
    with pytest.raises(EngineLimitError, match=told):
        session.run([[5]], cache)


def test_the_plugins_count_real_tokens_only(plugged: Engine) -> None:
    session, reference = plugged.session(), plugged.reference()
    ids = np.tile(TOKENS, (1, 2))[:, :CONTEXT]
    mask = np.ones_like(ids)
    mask[:, :4] = 0
    _, cache = session.run(ids, mask=mask)
    _, theirs = reference.run(ids, mask=mask)
    found, cache = session.run([[5, 6, 7, 8]], cache)
    assert_near(plugged, found, reference.run([[5, 6, 7, 8]], theirs)[0])
    with pytest.raises(EngineLimitError, match="these are 33"):
        session.run([[5]], cache)


def test_more_sequences_than_the_engine_takes(float32: Engine) -> None:
    session = float32.session()
    session.run(np.full((MAX_BATCH, 1), 5))
    told = r"built for 4 sequence\(s\) at once, and 5 were given\. .*--target rtx --max-batch-size 5'"
    with pytest.raises(EngineLimitError, match=told):
        session.run(np.full((MAX_BATCH + 1, 1), 5))
    with pytest.raises(EngineLimitError, match="5 were given"):
        session.empty_cache(5)


def test_tasks_keep_to_what_the_engine_takes(float32: Engine) -> None:
    random = np.random.default_rng(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(random.integers(3, 260, count).tolist())

    contexts = [tokens(count) for count in (25, 24, 9, 8, 8, 1)]
    lengths = [1, 2, 3, 8]
    asked = [Request(context, tokens(count)) for context in contexts for count in lengths if len(context) + count <= 32]
    # Each fits into the context, and padded to the longest of both they do not.
    asked += [Request(tokens(23), tokens(1)), Request(tokens(20), tokens(12))]
    # More continuations of one context than the engine takes at once.
    asked += [Request(contexts[2], tokens(3)) for _ in range(MAX_BATCH + 2)]
    found: dict[Request, Answer] = {}
    expected: dict[Request, Answer] = {}
    answer_all(float32.session(), asked, found.update)
    answer_all(float32.reference(), asked, expected.update)
    assert found.keys() == expected.keys() == set(asked)
    for request in asked:
        assert found[request].loglikelihood == pytest.approx(expected[request].loglikelihood, abs=1e-3)
    assert max(shapes["input_ids"][0] for shapes in float32.trt.shapes) == MAX_BATCH


def test_memory_is_given_back(float32: Engine) -> None:
    session = float32.session()
    session.run(TOKENS[:, :MAX_PROMPT])
    used = float32.trt.gpu.used
    for _ in range(3):
        _, cache = session.run(TOKENS[:, :MAX_PROMPT])
        cache.take([0, 0])
        session.run([[4]], cache)
    del cache
    assert float32.trt.gpu.used == used
    del session
    assert float32.trt.gpu.used == 0


def test_too_little_memory(float32: Engine) -> None:
    session = float32.session()
    session.run([[5]])
    float32.trt.gpu.total = float32.trt.gpu.used + 20_000
    with pytest.raises(DeviceError, match=r"memory of the Host GPU is too small.*--max-context or --max-batch-size"):
        session.run(np.full((MAX_BATCH, 1), 5))
    # One sequence still fits.
    session.run([[5]])


def test_no_gpu(float32: Engine) -> None:
    float32.trt.gpu.cuInit = lambda _: 100  # type: ignore[method-assign]
    with pytest.raises(EngineMismatchError, match=r"built for SM 89 with TensorRT-RTX .* but no GPU that it can use"):
        float32.session()


def test_another_gpu(float32: Engine) -> None:
    float32.trt.gpu.sm = 90
    with pytest.raises(EngineMismatchError, match=r"this machine has a Host GPU, SM 90"):
        float32.session()


def test_what_a_gpu_says_of_a_failure(float32: Engine) -> None:
    session = float32.session()
    float32.trt.gpu.cuMemcpyHtoDAsync_v2 = lambda *_: 719  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match=r"The Host GPU failed: cuMemcpyHtoDAsync_v2 .* says CUDA_ERROR_719 \(719\)"):
        session.run([[5]])


def test_an_engine_that_tensorrt_does_not_take(float32: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(float32.trt), "_deserialize", refuse)
    told = r"TensorRT-RTX 11\.1\.0\.106 does not load .*model\.engine\. Build it again .*\n  the magic tag is another"
    with pytest.raises(EngineMismatchError, match=told) as caught:
        float32.session()
    assert "reading" not in str(caught.value)


def refuse(_self: object, _content: bytes, logger: object) -> None:
    logger.log("info", "reading")  # type: ignore[attr-defined]
    logger.log("error", "the magic tag is another")  # type: ignore[attr-defined]


def test_an_engine_of_another_form(float32: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (float32.folder / "engine.json").read_text().replace('"write_indices"', '"slots"')
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    with pytest.raises(EngineMismatchError, match=r"takes attention_mask, .*slots, which this planish does not feed"):
        float32.session()


def test_plugin_libraries_are_loaded_once(plugged: Engine) -> None:
    sessions: list[EngineSession] = [plugged.session(), plugged.session()]
    assert plugged.trt.loaded == [str(plugged.folder / "libplanish_plugins.so")]
    found = [session.run(TOKENS[:, :3])[0] for session in sessions]
    np.testing.assert_array_equal(*found)


def test_what_runs_it(float32: Engine) -> None:
    assert float32.session().runs_on == "TensorRT-RTX 11.1.0.106, Host GPU (SM 89)"
