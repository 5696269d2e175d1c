"""The contracts mean the same in Python and in C++, and what C++ reads is current."""

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.plugins.cuda_build import ARCHITECTURES
from planish.plugins.kernel_layout import padded_channels
from planish.plugins.native import build_library
from planish.plugins.tensorrt.contract import FUNCTIONS, Contract, Rule, names_of
from planish.plugins.tensorrt.header import HEADER, contracts_header
from planish.plugins.tensorrt.plugins import KV_APPEND, KV_ATTEND, LINEAR, PLUGINS, QUANTIZE_TOKENS
from tests.plugin_attributes import GOOD

DTYPES = ["float32", "float16", "bfloat16", "int32"]


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = Path(__file__).with_name("contracts_test.cpp")
    # Into a folder of its own: the name of a cached library would not change with contracts.h.
    library = ctypes.CDLL(str(build_library(source, tmp_path_factory.mktemp("contracts"))))
    library.planish_contract_problem.restype = ctypes.c_char_p
    return library


def problem_in_cpp(library: Any, contract: Contract, values: dict[str, float], inputs: list[Any]) -> str:
    numbers = b"".join(
        np.array(values[each.name], np.int32 if each.kind == "int" else np.float32).tobytes()
        for each in contract.attributes
    )
    flat = [number for _, shape in inputs for number in (len(shape), *shape)]
    said: bytes = library.planish_contract_problem(
        PLUGINS.index(contract),
        numbers,
        len(inputs),
        (ctypes.c_int64 * len(flat))(*flat),
        (ctypes.c_int32 * len(inputs))(*(DTYPES.index(dtype) for dtype, _ in inputs)),
    )
    return said.decode()


def problem_in_python(contract: Contract, values: dict[str, float], inputs: list[Any]) -> str:
    problem = contract.problem(values)
    if problem is None:
        try:
            contract.outputs_of(values, inputs)
        except ValueError as error:
            return str(error)
    return problem or ""


def right_inputs(contract: Contract, values: dict[str, float], rng: np.random.Generator) -> list[Any]:
    """Return inputs as a contract wants them, of random free sizes."""
    free = {"batch": int(rng.integers(1, 4)), "tokens": int(rng.integers(1, 40))}
    leading = tuple(map(int, rng.integers(1, 5, rng.integers(1, 4))))
    known = values | {name: None for name in contract.derived}
    for name, expression in contract.derived.items():
        known[name] = eval(expression, dict(FUNCTIONS), known)  # type: ignore[assignment]
    inputs: list[Any] = []
    types: dict[str, str] = {}
    for tensor in contract.given_inputs(values):
        shape: list[int] = []
        for dim in tensor.shape:
            shape += leading if dim == "..." else [eval(dim, dict(FUNCTIONS), {**known, **free})]
        types[tensor.name] = types[tensor.like] if tensor.like else str(rng.choice(tensor.dtypes))
        inputs.append((types[tensor.name], tuple(shape)))
    return inputs


@pytest.mark.parametrize("contract", PLUGINS, ids=lambda each: each.name)
def test_cpp_and_python_refuse_alike(contract: Contract, in_cpp: Any) -> None:
    rng = np.random.default_rng(len(contract.name))
    said = set()
    for i in range(1000):
        values, inputs = dict(GOOD[contract.name]), right_inputs(contract, GOOD[contract.name], rng)
        if i % 2:
            name = str(rng.choice(list(values)))
            kind = next(each.kind for each in contract.attributes if each.name == name)
            wrong = rng.choice([-1, 0, 1, 2, 3, 4, 5, 8, 9, 64, 96, 100, 128, 1024, 20000, 2_000_000])
            values[name] = int(wrong) if kind == "int" else float(np.float32(rng.choice([-1, 0, 0.1, 1, 1.5])))
        if i % 3 == 0:
            at = int(rng.integers(len(inputs)))
            dtype, shape = inputs[at]
            axis = int(rng.integers(len(shape)))
            inputs[at] = (dtype, (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]))
        elif i % 3 == 1:
            at = int(rng.integers(len(inputs)))
            inputs[at] = (str(rng.choice(DTYPES)), inputs[at][1][: rng.integers(1, 5)])
        if i % 20 == 0:
            inputs.pop()
        found = problem_in_cpp(in_cpp, contract, values, inputs)
        assert found == problem_in_python(contract, values, inputs)
        said.add(found)
    assert "" in said
    assert len(said) > 50


@pytest.mark.parametrize("contract", PLUGINS, ids=lambda each: each.name)
def test_right_inputs_are_taken(contract: Contract) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        made = contract.outputs_of(GOOD[contract.name], right_inputs(contract, GOOD[contract.name], rng))
        assert len(made) == len(contract.outputs)


def test_every_rule_can_be_broken() -> None:
    # A rule that no attribute breaks is none; one that good attributes break would refuse everything.
    tries = [-1, 0, 1, 2, 3, 5, 7, 9, 65, 100, 127, 129, 16385, 20000, 2_000_000]
    for contract in PLUGINS:
        good = GOOD[contract.name]
        assert contract.problem(good) is None
        problems = [contract.problem({**good, name: value}) or "" for name in good for value in [*tries, 1.5]]
        # Widths that no block takes need m and k to fit each other.
        problems.append(
            contract.problem({**good, "channels": 1026 * 15 - 64, "m": 15, "k": 1026, "right_count": 1}) or ""
        )
        problems.append(
            contract.problem({**good, "channels": 700 * 23 - 64, "m": 23, "k": 700, "right_count": 1}) or ""
        )
        for rule in contract.rules:
            words = re.sub(r"\\\{\w+\\\}", ".*", re.escape(rule.otherwise))
            assert any(re.search(words, problem) for problem in problems), rule


def test_messages() -> None:
    def problem(contract: Contract, **changes: float) -> str | None:
        return contract.problem({**GOOD[contract.name], **changes})

    assert problem(LINEAR, bits=8) == (
        "PlanishLinear: weights of 8 bits have no kernel; weights of 2, 3 and 4 bits have"
    )
    assert problem(KV_ATTEND, head_dim=80) == (
        "PlanishKvAttend: heads of 80 channels have no kernel; heads of 64, 96 and 128 channels have"
    )
    assert problem(LINEAR, layout=2) == (
        "PlanishLinear: the model is packed in layout 2, and this library reads layout 1; "
        "build the engine again with the planish of the library"
    )
    assert problem(QUANTIZE_TOKENS, clip=1.5) == (
        "PlanishQuantizeTokens: clips of 1.5 and 1; a clip is above 0 and up to 1"
    )
    lacking = {name: value for name, value in GOOD[LINEAR.name].items() if name != "rows"}
    assert LINEAR.problem(lacking) == "PlanishLinear lacks the attribute 'rows' (output channels)"
    rest = [*[("int32", (1,))] * 2, *[("int32", (1, 3, 48, 6)), ("float16", (1, 3, 48, 2))] * 2]
    with pytest.raises(ValueError, match=r"PlanishKvAppend: 'value' is float16; it takes float32$"):
        KV_APPEND.outputs_of(GOOD[KV_APPEND.name], [("float32", (1, 5, 192)), ("float16", (1, 5, 192)), *rest])
    with pytest.raises(ValueError, match=r"'value' has shape \[1, 6, 192\]; it takes \[1, 5, 192\]$"):
        KV_APPEND.outputs_of(GOOD[KV_APPEND.name], [("float32", (1, 5, 192)), ("float32", (1, 6, 192)), *rest])


def test_the_header_is_current() -> None:
    assert HEADER.read_text() == contracts_header(), "run: python -m planish.plugins.tensorrt.header"


def test_cmake_compiles_every_architecture() -> None:
    text = HEADER.with_name("CMakeLists.txt").read_text()
    (list_,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES (.+)\)", text)
    assert list_.split() == [f"{each}-real" for each in ARCHITECTURES]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_padding_is_that_of_the_packer(bits: int) -> None:
    for channels in [*range(1, 600), 4096, 11008]:
        assert FUNCTIONS["padded_channels"](channels, bits) == padded_channels(channels, bits)


@pytest.mark.parametrize("expression", ["1 < a < 3", "a // 2", "a if b else c", "a ** 2", "-a", "a.b", "[a]", "a / 2"])
def test_expressions_that_mean_something_else_in_cpp(expression: str) -> None:
    with pytest.raises(ValueError, match="is not what Python and C\\+\\+ read alike"):
        names_of(expression)


def test_a_rule_shows_values() -> None:
    contract = Contract("P", "1", "", LINEAR.attributes, (Rule("rows == 1", "{rows} of {type}"),), (), ())
    assert contract.problem(GOOD[LINEAR.name]) == "P: 112 of 0"
