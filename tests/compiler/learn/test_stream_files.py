"""The hidden states between blocks: what is written is read, a slice at a time, and a file is whole or not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.stream_files import StreamFiles

IDS = np.arange(35).reshape(7, 5)
TABLE = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
EMBEDDED = TABLE[torch.from_numpy(IDS)]
ALL = slice(None)


def begun(folder: Path) -> StreamFiles:
    files = StreamFiles(folder / "streams", held_out=2)
    assert files.newest() is None
    files.begin(IDS, lambda ids: TABLE[torch.from_numpy(ids)])
    return files


def advanced(files: StreamFiles) -> None:
    files.write_outputs(0, lambda x: 2 * x)
    files.advance(0, lambda x: 3 * x)


def test_both_streams_begin_as_the_embeddings(tmp_path: Path) -> None:
    files = begun(tmp_path)
    streams = files.open(0)
    assert files.newest() == 0
    assert (streams.target.shape, len(streams.target), streams.target.device) == ((7, 5, 6), 7, torch.device("cpu"))
    assert torch.equal(streams.target[ALL], EMBEDDED)
    assert torch.equal(streams.seen[ALL], EMBEDDED)


@pytest.mark.parametrize("part", [slice(2, 5), slice(5, 7), slice(4, 99), slice(0, 0)])
def test_slices_are_those_of_a_tensor(tmp_path: Path, part: slice) -> None:
    files = begun(tmp_path)
    advanced(files)
    streams = files.open(1)
    assert torch.equal(streams.target[part], 2 * EMBEDDED[part])
    assert torch.equal(streams.seen[part], 3 * EMBEDDED[part])


def test_numpy_reads_a_file(tmp_path: Path) -> None:
    files = begun(tmp_path)
    advanced(files)
    found = np.load(tmp_path / "streams" / "inputs-1.npy")
    assert np.array_equal(found, torch.stack([2 * EMBEDDED, 3 * EMBEDDED]).numpy())


def test_what_is_held_out_is_never_in_a_batch_to_fit_to(tmp_path: Path) -> None:
    streams = begun(tmp_path).open(0)
    fitted = [list(range(7))[part] for part in streams.batches(size=2)]
    assert fitted == [[0, 1], [2, 3], [4]]
    assert [list(range(7))[part] for part in streams.batches(held_out=True)] == [[5, 6]]
    assert [i for part in streams.all_batches() for i in range(7)[part]] == list(range(7))


def test_streams_go_on(tmp_path: Path) -> None:
    files = begun(tmp_path)
    outputs = files.write_outputs(0, lambda x: 2 * x)
    assert torch.equal(outputs[ALL], 2 * EMBEDDED)
    assert files.newest() == 0
    files.advance(0, lambda x: 3 * x)
    assert files.newest() == 1
    # A new object sees the same: nothing is kept in memory.
    streams = StreamFiles(tmp_path / "streams", held_out=2).open(1)
    assert torch.equal(streams.target[ALL], 2 * EMBEDDED)
    assert torch.equal(streams.seen[ALL], 3 * EMBEDDED)
    assert streams.held_out == 2
    assert [path.name for path in (tmp_path / "streams").iterdir()] == ["inputs-1.npy"]


@pytest.mark.parametrize("step", ["write_outputs", "advance"])
def test_what_breaks_off_leaves_the_inputs_of_the_block(tmp_path: Path, step: str) -> None:
    files = begun(tmp_path)

    def killed(x: Tensor) -> Tensor:
        if torch.equal(x, EMBEDDED[5:]):
            raise KeyboardInterrupt
        return x

    files.write_outputs(0, lambda x: x)
    with pytest.raises(KeyboardInterrupt):
        getattr(files, step)(0, killed)
    assert files.newest() == 0
    assert torch.equal(files.open(0).target[ALL], EMBEDDED)
    advanced(files)
    assert files.newest() == 1
    assert torch.equal(files.open(1).seen[ALL], 3 * EMBEDDED)


def test_changing_what_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    files = begun(tmp_path)
    files.open(0).target[ALL].zero_()
    assert files.open(0).target[ALL].any()
