"""Losses of one or two low-bit groups: against the block run as a whole, resumed where it broke off."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import CalibrationError, SelectionError
from planish.compiler.learn.block import MODULES
from planish.compiler.learn.low_bit import round_activation
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.progress import Silent
from planish.compiler.select import pair_losses as module
from planish.compiler.select.channel_split import Axis, ChannelSplit
from planish.compiler.select.pair_losses import (
    BY_LINEAR,
    BY_SITE,
    Groups,
    PairLosses,
    group_shapes,
    measure_pair_losses,
)
from planish.passes.scheme import LinearFormat

IDS = np.random.default_rng(8).integers(3, 272, (6, 16))
SPLIT = ChannelSplit(LinearFormat(2, 16), LinearFormat(4, 16), step=8)


def counts_of(groups: Groups, *counts: int) -> dict[str, list[int]]:
    return {name: [*counts] for name in groups}


def orders_of(checkpoint: Checkpoint, split: ChannelSplit, groups: Groups) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shapes = group_shapes(checkpoint, groups)
    return [
        {name: torch.randperm(split.channels(shapes[name]), generator=generator) for name in groups}
        for _ in range(checkpoint.config.num_hidden_layers)
    ]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def measure(checkpoint: Checkpoint, folder: Path) -> list[PairLosses]:
    orders = orders_of(checkpoint, SPLIT, BY_SITE)
    return measure_pair_losses(checkpoint, SPLIT, orders, counts_of(BY_SITE, 0, 8, 56), IDS, folder, Silent())


@pytest.fixture(scope="module")
def measured(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[PairLosses]:
    return measure(checkpoint, tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize(("groups", "axis"), [(BY_SITE, "in"), (BY_SITE, "out"), (BY_LINEAR, "in")])
def test_equals_transformers_with_rounded_linears(
    groups: Groups, axis: Axis, tiny: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    split = ChannelSplit(LinearFormat(2, 16), LinearFormat(4, 16), axis, step=8)
    orders, counts = orders_of(checkpoint, split, groups), (0, 16)
    found = measure_pair_losses(checkpoint, split, orders, counts_of(groups, *counts), IDS, tmp_path, Silent(), groups)[
        1
    ]
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    layer, ids = model.model.layers[1], torch.from_numpy(IDS)
    kept: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, __, y: kept.append(y))
    exact = {name: layer.get_submodule(name).weight.detach().clone() for name in MODULES}

    with torch.no_grad():
        model(ids)
    y = kept[0]

    def loss(*chosen: tuple[str, int]) -> float:
        with torch.no_grad():
            for name, weight in exact.items():
                layer.get_submodule(name).weight.copy_(weight)
            for group, count in chosen:
                whole = torch.cat([exact[name] for name in groups[group]])
                rounded = split.quantize(whole, orders[1][group], count).dequantize()
                rows = [len(exact[name]) for name in groups[group]]
                for name, part in zip(groups[group], rounded.split(rows), strict=True):
                    layer.get_submodule(name).weight.copy_(part)
            model(ids)
        return float(((kept[-1] - y).square().sum(-1) / y.square().sum(-1)).mean())

    for name in groups:
        assert found.alone[name] == pytest.approx([loss((name, count)) for count in counts], rel=1e-3)
    for first, second in itertools.combinations(groups, 2):
        expected = [[loss((first, k), (second, j)) for j in counts] for k in counts]
        np.testing.assert_allclose(found.together[first][second], expected, rtol=1e-3)
        both = np.add.outer(found.alone[first], found.alone[second]) + found.interaction(first, second)
        np.testing.assert_allclose(both, expected, rtol=1e-3)


def test_more_high_channels_lose_less(measured: list[PairLosses]) -> None:
    assert len(measured) == 2
    for of_layer in measured:
        assert of_layer.counts == counts_of(BY_SITE, 0, 8, 56)
        for losses in of_layer.alone.values():
            assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("at", ["before", "after"])
def test_it_goes_on_where_it_broke_off(
    at: str, checkpoint: Checkpoint, measured: list[PairLosses], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the first block's losses are kept, and its stream has not, or has, gone on."""
    advance = StreamFiles.advance

    def broken(files: StreamFiles, *args: object) -> None:
        if at == "after":
            advance(files, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamFiles, "advance", broken)
        with pytest.raises(KeyboardInterrupt):
            measure(checkpoint, tmp_path)
    first = (tmp_path / "pairs-0.json").stat().st_mtime_ns
    assert measure(checkpoint, tmp_path) == measured
    assert (tmp_path / "pairs-0.json").stat().st_mtime_ns == first


def test_each_product_of_an_input_is_computed_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two blocks with four groups and two counts, in two batches: how often each group is multiplied low-bit."""
    low_bit: list[str] = []
    add = module._Branches._add_products

    def counted(hooks: object, name: str, index: int | None, x: torch.Tensor) -> None:
        if index is not None:
            low_bit.append(name)
        add(hooks, name, index, x)

    monkeypatch.setattr(module._Branches, "_add_products", counted)
    orders = orders_of(checkpoint, SPLIT, BY_SITE)
    measure_pair_losses(checkpoint, SPLIT, orders, counts_of(BY_SITE, 0, 8), IDS[:4], tmp_path, Silent())
    # Two candidates, on as many inputs as there are choices in front: none, and two for each group in front.
    assert [low_bit.count(name) // 4 for name in BY_SITE] == [2 * 1, 2 * 3, 2 * 5, 2 * 7]


def test_impossible_counts_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    orders, counts = orders_of(checkpoint, SPLIT, BY_SITE), counts_of(BY_SITE, 0, 12)
    with pytest.raises(SelectionError, match="12 of 64 channels"):
        measure_pair_losses(checkpoint, SPLIT, orders, counts, IDS, tmp_path, Silent())


def test_what_is_not_finite_is_told(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "residual_loss", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(CalibrationError, match="block 0"):
        measure(checkpoint, tmp_path)
    assert not (tmp_path / "pairs-0.json").exists()


def test_shapes_of_groups(checkpoint: Checkpoint) -> None:
    assert group_shapes(checkpoint, BY_SITE) == {
        "attn_in": (128, 64),
        "attn_out": (64, 64),
        "ffn_in": (320, 64),
        "ffn_out": (64, 160),
    }


def test_activations_are_rounded_in_segments(tiny: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One linear that reads codes of its channels, each segment with a scale and clip of its own, by a hook."""
    split = ChannelSplit(LinearFormat(3, 3), LinearFormat(4, 4), step=8)
    orders, counts = orders_of(checkpoint, split, BY_SITE), counts_of(BY_SITE, 0, 16)
    found = measure_pair_losses(checkpoint, split, orders, counts, IDS, tmp_path, Silent())[0]
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    linear, order, kept = model.model.layers[0].mlp.down_proj, orders[0]["ffn_out"], []
    model.model.layers[0].register_forward_hook(lambda _, __, y: kept.append(y))
    ids = torch.from_numpy(IDS)

    def output() -> torch.Tensor:
        with torch.no_grad():
            model(ids)
        return kept[-1]

    y, exact = output(), linear.weight.detach().clone()
    for index, count in enumerate((0, 16)):
        best = float("inf")
        parts = [part for part in ((order[:count], 4), (order[count:], 3)) if len(part[0])]
        with torch.no_grad():
            linear.weight.copy_(split.quantize(exact, order, count).dequantize())
        # The clips that were searched are among these.
        for clips in itertools.product([round(1 - 0.05 * step, 2) for step in range(13)], repeat=len(parts)):

            def rounded(_: object, inputs: tuple[torch.Tensor], parts=parts, clips=clips) -> torch.Tensor:
                x = inputs[0].clone()
                for (channels, bits), clip in zip(parts, clips, strict=True):
                    x[..., channels] = round_activation(inputs[0][..., channels], bits, clip)
                return x

            handle = linear.register_forward_pre_hook(rounded)
            loss = float(((output() - y).square().sum(-1) / y.square().sum(-1)).mean())
            handle.remove()
            best = min(best, abs(loss / found.alone["ffn_out"][index] - 1))
        assert best < 1e-3
    assert found.alone["ffn_out"][1] < found.alone["ffn_out"][0]


def test_some_of_the_tokens_tell_about_all(checkpoint: Checkpoint, measured: list[PairLosses], tmp_path: Path) -> None:
    orders, counts = orders_of(checkpoint, SPLIT, BY_SITE), counts_of(BY_SITE, 0, 8, 56)
    few = measure_pair_losses(checkpoint, SPLIT, orders, counts, IDS, tmp_path, Silent(), every=4)
    for of_some, of_all in zip(few, measured, strict=True):
        for name, losses in of_all.alone.items():
            assert of_some.alone[name] == pytest.approx(losses, rel=0.4)
            assert of_some.alone[name] != losses
