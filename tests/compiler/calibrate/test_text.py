"""Calibration tokens are windows of what transformers encodes; what cannot be used is refused in words."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as _Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from planish.compiler.calibrate.settings import CalibrationSettings
from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.calibrate.vocabulary import fragments, prefix
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import CalibrationError, TokenizerError
from planish.compiler.progress import Silent
from planish.compiler.runtime.tokenizer import Tokenizer
from tests.tiny import write_tiny

CHINESE = "北京是中华人民共和国的首都,是全国的政治中心。"


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def with_bos(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, with a tokenizer that puts BOS before a text and EOS behind it."""
    folder = tmp_path_factory.mktemp("bos") / "tiny"
    shutil.copytree(tiny, folder)
    tokenizer = _Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def by_transformers(folder: Path, text: str, length: int) -> list[list[int]]:
    """Return all windows of `length` tokens of a text, no special tokens added."""
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def test_windows_of_the_text(tiny: Path, checkpoint: Checkpoint, text: Path) -> None:
    windows = by_transformers(tiny, text.read_text(encoding="utf-8"), 48)
    found = calibration_tokens(str(text), checkpoint, nsamples=10, seqlen=48, seed=3)
    assert (found.shape, found.dtype) == ((10, 48), np.int64)
    places = [windows.index(row) for row in found.tolist()]
    assert len(set(places)) == 10
    # The last ones are as likely as the first, and do not come last: who splits off a part gets any text.
    assert places != sorted(places)
    assert np.array_equal(found, calibration_tokens(str(text), checkpoint, nsamples=10, seqlen=48, seed=3))
    other = calibration_tokens(str(text), checkpoint, nsamples=10, seqlen=48, seed=4)
    assert not np.array_equal(found, other)
    every = calibration_tokens(str(text), checkpoint, nsamples=len(windows), seqlen=48)
    assert sorted(every.tolist()) == sorted(windows)


def test_every_window_starts_with_the_bos_that_the_tokenizer_adds(with_bos: Path, text: Path) -> None:
    assert AutoTokenizer.from_pretrained(with_bos)("a")["input_ids"][0] == 0
    windows = by_transformers(with_bos, text.read_text(encoding="utf-8"), 47)
    found = calibration_tokens(str(text), open_checkpoint(with_bos), nsamples=len(windows), seqlen=48)
    assert (found[:, 0] == 0).all()
    assert sorted(found[:, 1:].tolist()) == sorted(windows)


def test_jsonl_is_read_as_its_joined_texts(tmp_path: Path, tiny: Path, checkpoint: Checkpoint, text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in (content[:500], content[500:])))
    windows = by_transformers(tiny, content[:500] + "\n\n" + content[500:], 32)
    found = calibration_tokens(str(path), checkpoint, nsamples=len(windows), seqlen=32)
    assert sorted(found.tolist()) == sorted(windows)


def test_too_little_text_names_what_fits(tiny: Path, checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    fit = len(by_transformers(tiny, text.read_text(encoding="utf-8"), 64))
    with pytest.raises(
        CalibrationError, match=f"{fit} sequences of 64 fit, {fit + 1} were.*at most {fit} .--nsamples., or for sho"
    ):
        calibration_tokens(str(text), checkpoint, nsamples=fit + 1, seqlen=64)
    (tmp_path / "short.txt").write_text("the hen ran")
    with pytest.raises(
        CalibrationError, match=r"0 sequences of 64 fit, 1 were asked for. Ask for shorter ones .--seqlen., or giv"
    ):
        calibration_tokens(str(tmp_path / "short.txt"), checkpoint, nsamples=1, seqlen=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nsamples": 0}, "0 calibration sequences hold nothing. Ask for 1 or more"),
        ({"seqlen": 15}, "15 tokens are too short.*Ask for 16 tokens or more"),
        ({"seqlen": 257}, "257 tokens are longer than the model's context of 256. Ask for 256 tokens or fewer"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"source": "no.txt"}, "'no.txt' does not exist. Give a .txt file.*or 'self'"),
        ({"source": "owner/no.jsonl"}, "'owner/no.jsonl' does not exist"),
        ({"source": "wikitext"}, "'wikitext' does not exist"),
    ],
)
def test_settings_that_cannot_be(checkpoint: Checkpoint, text: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration_tokens(checkpoint=checkpoint, **{"source": str(text), **settings})  # type: ignore[arg-type]
    assert caught.value.exit_code == 24


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b"", "holds no text"),
        ("text.txt", b" \n\n", "holds no text"),
        ("text.txt", b"\xff\xfe", "cannot be read"),
        ("text.jsonl", b"not JSON", "line 1: not JSON"),
        ("text.jsonl", b'{"text": "a"}\n{"content": "b"}', "line 2: no field 'text'"),
    ],
)
def test_texts_that_cannot_be_read(
    tmp_path: Path, checkpoint: Checkpoint, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        calibration_tokens(str(tmp_path / name), checkpoint, seqlen=16)


def test_text_of_a_language_that_the_tokenizer_does_not_know(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "text.txt"
    path.write_text(CHINESE * 40, encoding="utf-8")
    with pytest.raises(
        CalibrationError, match=r"does not suit.*tokens per character.*9\d% of them are pieces.*language"
    ):
        calibration_tokens(str(path), checkpoint, nsamples=2, seqlen=32)
    # Some such characters are told of, none are not.
    path.write_text(("the hen and the tin man's otter ran in; " + CHINESE[:2]) * 40, encoding="utf-8")
    heard = Heard()
    calibration_tokens(str(path), checkpoint, nsamples=2, seqlen=32, progress=heard)
    assert [m for m in heard.messages if "used all the same" in m and "% of them" in m]
    path.write_text("the hen and the tin man's otter ran in; " * 40, encoding="utf-8")
    heard = Heard()
    calibration_tokens(str(path), checkpoint, nsamples=2, seqlen=32, progress=heard)
    assert heard.messages == []


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, text: Path) -> None:
    folder = write_tiny(tmp_path / "small", vocab_size=200)
    with pytest.raises(TokenizerError, match=r"gives token 2.., and the model has 200"):
        calibration_tokens(str(text), open_checkpoint(folder), nsamples=1, seqlen=32)


def test_prefix(tiny: Path, with_bos: Path) -> None:
    assert prefix(Tokenizer(tiny)) == []
    assert prefix(Tokenizer(with_bos)) == [0]


def test_fragments_of_a_byte_level_vocabulary(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny)
    pieces = AutoTokenizer.from_pretrained(tiny).get_vocab()
    # All that is written as one ASCII character, a space (Ġ), a line feed (Ċ) or a merge is text.
    whole = {token for piece, token in pieces.items() if piece.replace("Ġ", "a").replace("Ċ", "a").isascii()}
    special = {pieces[piece] for piece in ("<|bos|>", "<|eos|>", "<|pad|>")}
    found = fragments(tokenizer, pieces.values())
    assert special <= found
    assert not found & (whole - special)
    # Each byte of é, a piece by itself.
    assert set(tokenizer.encode("é", special=False)) <= found


def test_fragments_where_bytes_are_a_fallback(tmp_path: Path) -> None:
    """As in SentencePiece vocabularies: U+2581 is a space, <0xE9> a byte, <unk> the rest."""
    from tokenizers import AddedToken, decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    tokenizer = _Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = fragments(Tokenizer(tmp_path), range(len(pieces)))
    # A byte below 0x80 is a character: line feeds are written so.
    assert found == {0, *range(1 + 0x80, 1 + 0x100)}


def test_fingerprint(tmp_path: Path) -> None:
    path, copy = tmp_path / "text.txt", tmp_path / "copy" / "text.txt"
    copy.parent.mkdir()
    for file in (path, copy):
        file.write_text("one")
    base = CalibrationSettings(dataset=str(path)).fingerprint()
    assert CalibrationSettings(dataset=str(copy)).fingerprint() == base
    others = [
        CalibrationSettings(dataset=str(path), **{name: value}).fingerprint()
        for name, value in (("nsamples", 17), ("seqlen", 513), ("seed", 1))
    ]
    others += [CalibrationSettings().fingerprint(), CalibrationSettings(dataset="a/b").fingerprint()]
    path.write_text("two")
    others.append(CalibrationSettings(dataset=str(path)).fingerprint())
    assert len({base, *others}) == 7
    assert CalibrationSettings().model_dump() == {"dataset": "self", "nsamples": 16, "seqlen": 512, "seed": 0}
