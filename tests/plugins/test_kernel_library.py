"""The C interface on the host: structures as the header lays them out, and arguments that are refused, in words."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from planish.plugins import kernel_library as library_module
from planish.plugins.cuda_build import build_kernels, find_tool
from planish.plugins.kernel_library import (
    CodeSegment,
    KernelError,
    LinearTask,
    QuantizeTask,
    WeightOnlyTask,
    WeightSegment,
    bind,
    call,
    kernel_library,
    library_path,
)
from planish.plugins.native import SOURCES, NativeBuildError, find_compiler
from tests.gpu_here import gpu_is_here
from tests.kernel_emulation import emulated_kernels

#: Structures of planish_kernels.h.
STRUCTURES = {
    "planish_code_segment": CodeSegment,
    "planish_quantize": QuantizeTask,
    "planish_weight_segment": WeightSegment,
    "planish_linear": LinearTask,
    "planish_weight_only": WeightOnlyTask,
}
#: An address that no test reads from.
SOMEWHERE = 1 << 20


@pytest.fixture(scope="module", params=["emulated", pytest.param("nvcc", marks=pytest.mark.slow)])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The checks as the emulation runs them, and as the library of the kernels does, which loads without a GPU."""
    if request.param == "emulated":
        return emulated_kernels()
    if find_tool("nvcc") is None:
        pytest.skip("no nvcc, see docs/kernels.md")
    path = build_kernels(tmp_path_factory.mktemp("library") / "libplanish_kernels.so", ("80",))
    return bind(ctypes.CDLL(str(path)))


def quantize_task(**changes: object) -> QuantizeTask:
    task = QuantizeTask(
        x=SOMEWHERE, segments=(CodeSegment * 2)((576, 768, 3, 1.0)), segment_count=1, channels=576, tokens=4,
        codes=SOMEWHERE, stride=768, scales=SOMEWHERE, zero_sums=SOMEWHERE,
    )  # fmt: skip
    return changed(task, changes)


def linear_task(**changes: object) -> LinearTask:
    segment = WeightSegment(SOMEWHERE, SOMEWHERE, SOMEWHERE, 576)
    task = LinearTask(
        low=segment, low_bits=3, rows=96, tokens=4, codes=SOMEWHERE, stride=768, token_scales=SOMEWHERE,
        token_zero_sums=SOMEWHERE, y=SOMEWHERE,
    )  # fmt: skip
    return changed(task, changes)


def weight_only_task(**changes: object) -> WeightOnlyTask:
    task = WeightOnlyTask(
        words=SOMEWHERE, scales=SOMEWHERE, bits=3, channels=576, rows=96, tokens=4, x=SOMEWHERE, stride=576, y=SOMEWHERE
    )
    return changed(task, changes)


def changed(task: ctypes.Structure, changes: dict[str, object]) -> ctypes.Structure:
    for name, value in changes.items():
        setattr(task, name, value)
    return task


def segments(*each: tuple[int, int, int, float]) -> object:
    return (CodeSegment * 2)(*each)


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    lines = [
        f'printf("{name} {field} %zu\\n", offsetof(struct {name}, {field}));'
        for name, structure in STRUCTURES.items()
        for field, *_ in structure._fields_
    ]
    lines += [f'printf("{name} size %zu\\n", sizeof(struct {name}));' for name in STRUCTURES]
    source = tmp_path / "offsets.cpp"
    source.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "planish_kernels.h"\nint main() {' + "\n".join(lines) + "}"
    )
    program = tmp_path / "offsets"
    subprocess.run([find_compiler(), f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    expected = [
        f"{name} {field} {getattr(structure, field).offset}"
        for name, structure in STRUCTURES.items()
        for field, *_ in structure._fields_
    ]
    expected += [f"{name} size {ctypes.sizeof(structure)}" for name, structure in STRUCTURES.items()]
    assert printed.split("\n")[:-1] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": 3}, "there is no type 3"),
        ({"order": 3}, "there is no order 3"),
        ({"channels": 16385}, "4 tokens of 16385 channels; a token has up to 16384"),
        ({"tokens": 0}, "0 tokens of 576 channels"),
        ({"right": SOMEWHERE, "m": 5, "k": 100}, "576 channels cannot be read as 5 x 100"),
        ({"right": SOMEWHERE, "m": 24, "k": 24, "right_count": 2}, "2 right factors for 24 rows"),
        ({"segment_count": 3}, "3 segments"),
        ({"segments": segments((576, 768, 9, 1.0))}, "576 channels stored as 768, 9 bits of up to 8, clip 1"),
        ({"segments": segments((576, 768, 8, 1.0)), "order": 2}, "8 bits of up to 4"),
        ({"segments": segments((576, 768, 3, 1.5))}, "clip 1.5"),
        ({"segments": segments((576, 600, 3, 1.0))}, "576 channels stored as 600"),
        ({"segments": segments((512, 512, 3, 1.0))}, "segments of 512 channels and 512 bytes in tokens of 576"),
        ({"stride": 752}, "768 bytes in tokens of 576 channels, 752 bytes apart"),
        ({"stride": 776}, "776 bytes apart"),
        ({"x": None}, "planish_quantize_tokens lacks one of its arrays"),
        ({"sum": SOMEWHERE}, "lacks one of its arrays"),
        ({"codes": SOMEWHERE + 8}, "codes and workspace begin at multiples of 16 bytes"),
        ({"workspace": SOMEWHERE + 4}, "codes and workspace begin at multiples of 16 bytes"),
        (
            {"workspace": SOMEWHERE, "sum": SOMEWHERE, "residual": SOMEWHERE},
            "with a workspace, the sum is neither x nor the residual",
        ),
    ],
)
def test_quantisation_refuses(library: ctypes.CDLL, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(library, "planish_quantize_tokens", ctypes.byref(quantize_task(**changes)), None)


@pytest.mark.parametrize("name", ["planish_small_linear", "planish_large_linear"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_bits": 8}, "weights of 8 bits have no kernel"),
        ({"type": -1}, "there is no type -1"),
        ({"order": 7}, "there is no order 7"),
        ({"rows": 0}, "a product of 4 tokens and 0 rows"),
        ({"tokens": 1 << 31}, "a product of 2147483648 tokens and 96 rows"),
        ({"gated": 1, "rows": 88}, "88 rows of gate and up: a multiple of 16"),
        ({"high": WeightSegment(SOMEWHERE, SOMEWHERE, SOMEWHERE, 65)}, "65 high-impact channels beside 576 others"),
        ({"low": WeightSegment(SOMEWHERE, SOMEWHERE, SOMEWHERE, 0)}, "0 high-impact channels beside 0 others"),
        ({"stride": 760}, "tokens 760 bytes apart, which take 768"),
        ({"stride": 368, "order": 2}, "tokens 368 bytes apart, which take 384"),
        ({"high": WeightSegment(SOMEWHERE, SOMEWHERE, SOMEWHERE, 64)}, "which take 832"),
        ({"high": WeightSegment(None, SOMEWHERE, SOMEWHERE, 64), "stride": 832}, "a linear lacks one of its arrays"),
        ({"y": None}, "a linear lacks one of its arrays"),
        ({"codes": SOMEWHERE + 1}, "weights and codes begin at multiples of 16 bytes"),
    ],
)
def test_linears_refuse(library: ctypes.CDLL, name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(library, name, ctypes.byref(linear_task(**changes)), None)


def test_small_linear_refuses(library: ctypes.CDLL) -> None:
    for changes, message in (
        ({"tokens": 17}, "planish_small_linear takes up to 16 tokens, not 17"),
        ({"order": 1}, "planish_small_linear takes codes in the order PLANISH_LANES"),
    ):
        with pytest.raises(ValueError, match=message):
            call(library, "planish_small_linear", ctypes.byref(linear_task(**changes)), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "weights of 5 bits have no kernel"),
        ({"type": 9}, "there is no type 9"),
        ({"tokens": 0}, "a product of 0 tokens and 96 rows"),
        ({"gated": 1, "rows": 40}, "40 rows of gate and up: a multiple of 16"),
        ({"channels": 572}, "572 channels in tokens 576 apart: multiples of 8, and not less"),
        ({"stride": 568}, "576 channels in tokens 568 apart"),
        ({"scales": None}, "a linear lacks one of its arrays"),
        ({"x": SOMEWHERE + 2}, "weights and tokens begin at multiples of 16 bytes"),
    ],
)
def test_weight_only_refuses(library: ctypes.CDLL, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(library, "planish_weight_only_linear", ctypes.byref(weight_only_task(**changes)), None)


def test_the_last_error_stays_until_the_next(library: ctypes.CDLL) -> None:
    with pytest.raises(ValueError, match="there is no type 3"):
        call(library, "planish_large_linear", ctypes.byref(linear_task(type=3)), None)
    assert library.planish_last_error() == b"there is no type 3"


@pytest.mark.slow
@pytest.mark.skipif(gpu_is_here(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path: Path) -> None:
    if find_tool("nvcc") is None:
        pytest.skip("no nvcc, see docs/kernels.md")
    library = bind(ctypes.CDLL(str(build_kernels(tmp_path / "libplanish_kernels.so", ("80",)))))
    with pytest.raises(KernelError, match=r"no GPU can be asked: .* See docs/kernels\.md"):
        call(library, "planish_best_order", 17, 3, ctypes.byref(ctypes.c_int32()))


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANISH_KERNELS", str(tmp_path / "missing.so"))
    assert library_path() == tmp_path / "missing.so"
    with pytest.raises(NativeBuildError, match=r"there is no .*missing\.so\. Run `make plugins`, or set PLANISH_KERN"):
        kernel_library.__wrapped__()
    (tmp_path / "missing.so").write_text("no library")
    with pytest.raises(NativeBuildError, match=r"missing\.so is no library of these kernels: .* Run `make plugins`"):
        kernel_library.__wrapped__()


def test_where_make_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANISH_KERNELS", raising=False)
    root = Path(library_module.__file__).resolve().parents[1]
    assert library_path() == root / "build" / "plugins" / "libplanish_kernels.so"
