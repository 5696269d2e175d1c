"""Encoding, streaming and chat templates agree with transformers."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import AutoTokenizer

from planish.compiler.errors import TokenizerError
from planish.compiler.runtime.tokenizer import Tokenizer
from tests.tiny import cut_and_padded

MESSAGES = [
    {"role": "system", "content": 'Be "brief" & <kind>.'},
    {"role": "user", "content": "Hé 北?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]

TEMPLATES = {
    "whitespace control": "{% for m in messages %}\n  {% if m.role %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}",
    "tojson": "{{ bos_token }}{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ eos_token }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "generation prompt": "{{ messages|length }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "date": "{{ strftime_now('%Y') | length }}",
    "generation": (
        "{% set x = 1 %}{% for m in messages %}\n  {% generation %}\n{% set x = 2 %} {{ loop.index }}{{ m.content }}"
        "{{ x }}\n  {%- endgeneration %}{{ x }}{% endfor %}"
    ),
    "tools and documents": "{% if tools is not none or documents is not none %}Use them.{% endif %}{{ other is none }}",
}


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chat_is_what_transformers_renders(folder: Path, template: str, generation_prompt: bool) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=generation_prompt
    )
    assert Tokenizer(folder).chat(MESSAGES, generation_prompt=generation_prompt) == expected


@pytest.mark.parametrize("listed", [False, True])
def test_special_tokens_in_a_chat_are_those_of_transformers(folder: Path, listed: bool) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["bos_token"]
    config |= {"eos_token": "<|pad|>"} | ({"added_tokens_decoder": {}} if listed else {})
    path.write_text(json.dumps(config))
    older = {"bos_token": {"content": "<|bos|>", "lstrip": False}, "eos_token": "<|eos|>", "unk_token": None}
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}")
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False)
    assert ours.chat(MESSAGES) == expected == ("|<|pad|>|<|pad|>|" if listed else "<|bos|>|<|eos|>|<|pad|>|")
    for role in ("bos_token", "eos_token", "unk_token"):
        assert ours.special_token(role) == getattr(theirs, f"{role}_id")


@pytest.mark.parametrize("named", [False, True])
def test_template_in_tokenizer_config(folder: Path, named: bool) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    text = "{{ messages[0].content }}!"
    config["chat_template"] = [{"name": "tool", "template": "no"}, {"name": "default", "template": text}]
    if not named:
        config["chat_template"] = text
    path.write_text(json.dumps(config))
    assert Tokenizer(folder).chat([{"role": "user", "content": "hi"}]) == "hi!"


def test_template_may_refuse_and_may_not_reach_out(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TokenizerError, match="roles must alternate"):
        Tokenizer(folder).chat(MESSAGES)
    path.write_text("{{ messages.append(1) }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(TokenizerError, match="unsafe"):
        Tokenizer(folder).chat(MESSAGES)


def test_no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer(folder).chat(MESSAGES)


def test_template_that_is_not_utf8(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(TokenizerError, match="is not UTF-8"):
        Tokenizer(folder).chat(MESSAGES)


def test_missing_or_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer(folder)


def test_encoding_is_that_of_transformers(tiny: Path) -> None:
    text = "the otter, naïve: 北京 😀 <|eos|> 123\n"
    assert Tokenizer(tiny).encode(text) == AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]


def test_texts_are_neither_cut_nor_padded(folder: Path) -> None:
    cut_and_padded(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in ("the hen", "the hen and the tin man's otter ran in"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_stream_gives_the_text_piece_by_piece(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny)
    text = "the naïve 北京 😀 hen"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


def test_stream_leaves_out_special_tokens_and_tokens_beyond_the_vocabulary(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny)
    (token,) = tokenizer.encode("h")
    stream = tokenizer.stream()
    # 0 to 2 are special; the model's vocabulary of 272 is larger than the tokenizer's.
    assert [stream.push(i) for i in (0, token, 271, 1, token)] == ["", "h", "", "", "h"]


def test_stream_ends_with_the_remains_of_a_character(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny)
    stream = tokenizer.stream()
    ids = tokenizer.encode("a😀")[:-1]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == tokenizer.decode(ids) == "a\ufffd"


@pytest.fixture
def with_bytes(tmp_path: Path) -> Tokenizer:
    """A tokenizer as LLaMA-2 has it: words begin with a mark, and what is no word is spelled in bytes, newlines too."""
    words = ["<unk>", "▁a", "▁b", "c"]
    vocabulary = {token: i for i, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


def test_stream_of_words_and_bytes(with_bytes: Tokenizer) -> None:
    marks = {"a": [1], "b": [2], "c": [3], "\n": [4 + 10], "😀": [4 + byte for byte in "😀".encode()]}
    for text in itertools.product(marks, repeat=4):
        ids = [token for each in text for token in marks[each]]
        stream = with_bytes.stream()
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == with_bytes.decode(ids)
        assert "\ufffd" not in "".join(pieces)


def test_stream_goes_on_behind_bytes_that_are_no_character(with_bytes: Tokenizer) -> None:
    # A newline, which was given, becomes a part of what is no character; a word ends it.
    stream = with_bytes.stream()
    pieces = [stream.push(token) for token in (2, 4 + 0x0A, 4 + 0xF0, 4 + 0x9F, 1, 3)]
    assert pieces[:4] == ["b", "\n", "", ""]
    assert "".join(pieces[4:]) + stream.finish() == "\ufffd\ufffd ac"
    # Random tokens, as a hot model writes them.
    random = np.random.default_rng(0)
    for _ in range(50):
        stream = with_bytes.stream()
        for token in random.integers(1, 260, 40).tolist():
            stream.push(token)
        stream.finish()


def test_tokens_and_their_roles_are_those_of_transformers(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    assert ours.vocabulary() == theirs.get_vocab()
    assert ours.special_token("bos_token") == theirs.bos_token_id
    assert ours.token(theirs.eos_token_id) == theirs.eos_token
    assert ours.special_token("mask_token") is None
    with pytest.raises(KeyError):
        ours.token(len(theirs))


def test_roles_in_an_older_file(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|bos|>"}}))
    assert Tokenizer(folder).special_token("bos_token") == 0
