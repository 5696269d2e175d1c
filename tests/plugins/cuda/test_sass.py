"""What nvcc makes of the kernels: the instructions that are meant, nothing emulated, nothing spilled.

Needs nvcc, cuobjdump and nvdisasm (docs/kernels.md), and no GPU.
"""

import functools
import re
import subprocess
from pathlib import Path

import pytest

from planish.plugins.cuda_build import build_cubin, find_tool

TOOLS = ("nvcc", "cuobjdump", "nvdisasm")
MISSING = [tool for tool in TOOLS if find_tool(tool) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not found: {', '.join(MISSING)}; see docs/kernels.md")

#: Unit -> kernel (part of its name) -> (instruction that it must have, registers at most).
EXPECTED = {
    "small_linear": {"small_dot": ("IDP.4A.U8.U8", 64), "small_mma": ("IMMA.16832.U8.U8", 128)},
    "large_linear": {"large": ("IMMA.16832.U8.U8", 255)},
    "nibble_linear": {"large_nibbles": ("IMMA.16864.U4.U4", 255)},
    "wgmma_linear": {"large_wgmma": ("IGMMA.64x", 255)},
    "weight_only": {"weight_only": ("HMMA.16816.F32", 255)},
    "quantize_tokens": {
        "quantize_cores": ("FFMA", 64),
        "quantize_tiles": ("HMMA.1688.F32.TF32", 64),
        "quantize_blocks": ("HMMA.1688.F32.TF32", 64),
        "spread_blocks": ("HMMA.1688.F32.TF32", 64),
    },
    "append_kv": {"append_kv": ("SHFL", 128)},
    "attend_kv": {"attend_few": ("HMMA.16816.F32", 128), "attend_many": ("HMMA.16816.F32", 255)},
}
#: What is compiled for the oldest GPUs that are supported, and for Hopper, where a 4-bit MMA would be emulated; what
#: both have alike, once.
COMPILED = [
    ("large_linear", "80"),
    ("nibble_linear", "80"),
    ("weight_only", "80"),
    ("small_linear", "90a"),
    ("quantize_tokens", "90a"),
    ("wgmma_linear", "90a"),
    *(
        pytest.param(unit, "80", marks=pytest.mark.slow)
        for unit in ("small_linear", "quantize_tokens", "append_kv", "attend_kv")
    ),
    *(
        pytest.param(unit, "90a", marks=pytest.mark.slow)
        for unit in ("large_linear", "weight_only", "append_kv", "attend_kv")
    ),
]


#: An instruction of a listing: its name and its operands, of which the first is where the result goes.
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\S+) ([^;]*);")


def next_reader(steps: list[tuple[str, str]], at: int) -> int:
    """Return the next of the instructions that reads what the one at `at` gives."""
    register = re.compile(rf"\b{steps[at][1].split(',')[0].strip()}\b")
    return next(i for i in range(at + 1, len(steps)) if register.search(steps[i][1].partition(",")[2]))


@functools.cache
def cubin(unit: str, architecture: str, folder: Path) -> Path:
    return build_cubin(unit, architecture, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


def run(tool: str, *arguments: object) -> str:
    command = [str(find_tool(tool)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(text: str, start: str) -> dict[str, str]:
    """Return kernel name -> its part of a listing whose parts begin with the pattern `start`."""
    pieces = re.split(start, text)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


@pytest.mark.parametrize(("unit", "architecture"), COMPILED)
def test_registers_and_spills(unit: str, architecture: str, folder: Path) -> None:
    usage = run("cuobjdump", "--dump-resource-usage", cubin(unit, architecture, folder))
    found = kernels(usage, r"Function (\w+):")
    assert found
    for name, figures in found.items():
        (limit,) = (limit for part, (_, limit) in EXPECTED[unit].items() if part in name)
        registers = int(re.search(r"REG:(\d+)", figures)[1])
        assert registers <= limit, name
        # Spills and arrays that were not unrolled into registers both lie in local memory.
        assert "LOCAL:0" in figures, name
        assert "STACK:0" in figures, name


@pytest.mark.parametrize(("unit", "kernel", "architecture"), [("nibble_linear", "large_nibbles", "90a")])
def test_nothing_is_emulated_elsewhere(unit: str, kernel: str, architecture: str, folder: Path) -> None:
    """A kernel of an instruction that an architecture does not have is empty there."""
    found = kernels(run("nvdisasm", "-c", cubin(unit, architecture, folder)), r"\.text\.(\w+):")
    assert found
    for name, code in found.items():
        assert kernel in name
        assert not re.search("MMA|CALL|RET", code), name


@pytest.mark.parametrize(
    ("unit", "architecture"),
    [("small_linear", "90a"), ("large_linear", "80"), ("nibble_linear", "80"), ("wgmma_linear", "90a")],
)
def test_outputs_are_rounded_as_the_op_rounds_them(unit: str, architecture: str, folder: Path) -> None:
    """Sum of products times scale, rounded; times scale, rounded: the second is not joined with an addition."""
    found = kernels(run("nvdisasm", "-c", cubin(unit, architecture, folder)), r"\.text\.(\w+):")
    assert found
    for name, code in found.items():
        steps = INSTRUCTION.findall(code)
        converted = [i for i, (opcode, _) in enumerate(steps) if opcode in ("I2FP.F32.S32", "I2F")]
        assert converted, name
        for i in converted:
            first = next_reader(steps, i)
            assert [steps[first][0], steps[next_reader(steps, first)][0]] == ["FMUL", "FMUL"], name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_attention_reads_in_the_background_and_transposes_in_registers(architecture: str, folder: Path) -> None:
    found = kernels(run("nvdisasm", "-c", cubin("attend_kv", architecture, folder)), r"\.text\.(\w+):")
    assert len(found) == 6
    for name, code in found.items():
        for instruction in ("LDGSTS", "MOVM.16.MT88", "MUFU.EX2"):
            assert instruction in code, (name, instruction)
        # Codes are operands as they are: no width of them takes a conversion from integers.
        hot = code[code.index("HMMA") : code.rindex("HMMA")]
        assert "I2F" not in hot, name


@pytest.mark.parametrize(("unit", "architecture"), COMPILED)
def test_instructions(unit: str, architecture: str, folder: Path) -> None:
    found = kernels(run("nvdisasm", "-c", cubin(unit, architecture, folder)), r"\.text\.(\w+):")
    assert found
    for name, code in found.items():
        (instruction,) = (instruction for part, (instruction, _) in EXPECTED[unit].items() if part in name)
        assert instruction in code, name
        if "MMA" in instruction:
            # Something returns where a subroutine takes the place of an instruction that this GPU does not have. A CALL
            # alone may be no more than a jump at which lanes wait for each other. Only what a rounded division or root
            # does with numbers near the end of its range is a subroutine too, behind the kernel's own code.
            own, *subroutines = re.split(r"(?m)^(\$__internal\w*\$\S*):", code)
            assert "RET" not in own, name
            assert all(re.search("(div|sqrt)_rn", label) for label in subroutines[::2]), name
        assert "LDL" not in code, name
