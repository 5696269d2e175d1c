"""The hidden states between blocks: what is written is read, and a file is whole or not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.stream_files import StreamFiles

IDS = np.arange(35).reshape(7, 5)
TABLE = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def begun(folder: Path) -> StreamFiles:
    files = StreamFiles(folder / "streams", held_out=2)
    assert files.newest() is None
    files.begin(IDS, lambda ids: TABLE[ids])
    return files


def test_both_streams_begin_as_the_embeddings(tmp_path: Path) -> None:
    files = begun(tmp_path)
    streams = files.open(0)
    assert files.newest() == 0
    assert torch.equal(streams.target, TABLE[torch.from_numpy(IDS)])
    assert torch.equal(streams.seen, streams.target)


def test_what_is_held_out_is_never_in_a_batch_to_fit_to(tmp_path: Path) -> None:
    streams = begun(tmp_path).open(0)
    fitted = [list(range(7))[part] for part in streams.batches(size=2)]
    assert fitted == [[0, 1], [2, 3], [4]]
    assert [list(range(7))[part] for part in streams.batches(held_out=True)] == [[5, 6]]


def test_streams_go_on(tmp_path: Path) -> None:
    files = begun(tmp_path)
    files.advance(0, 2 * files.open(0).target, lambda x: 3 * x)
    assert files.newest() == 1
    # A new object sees the same: nothing is kept in memory.
    streams = StreamFiles(tmp_path / "streams", held_out=2).open(1)
    embedded = TABLE[torch.from_numpy(IDS)]
    assert torch.equal(streams.target, 2 * embedded)
    assert torch.equal(streams.seen, 3 * embedded)
    assert streams.held_out == 2
    assert [path.name for path in (tmp_path / "streams").iterdir()] == ["inputs-1.npy"]


def test_what_breaks_off_leaves_the_inputs_of_the_block(tmp_path: Path) -> None:
    files = begun(tmp_path)

    def killed(x: Tensor) -> Tensor:
        if torch.equal(x, TABLE[torch.from_numpy(IDS[5:])]):
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        files.advance(0, files.open(0).target, killed)
    assert files.newest() == 0
    assert torch.equal(files.open(0).target, TABLE[torch.from_numpy(IDS)])
    files.advance(0, files.open(0).target, lambda x: x)
    assert files.newest() == 1


def test_reading_does_not_change_the_file(tmp_path: Path) -> None:
    files = begun(tmp_path)
    files.open(0).target.zero_()
    assert files.open(0).target.any()
