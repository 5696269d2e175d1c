"""The tokenizer and chat template of a bundle, without transformers."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as _Tokenizer

from planish.compiler.errors import TextError, TokenizerError

__all__ = ["TextStream", "Tokenizer"]

#: What decoders put for bytes that are no character.
_NO_CHARACTER = "\ufffd"

#: A chat: {"role": "user", "content": "..."} and so on.
Messages = Sequence[Mapping[str, Any]]


class Tokenizer:
    """The tokenizer.json of a folder, and the chat template beside it."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer.

        Raises:
            TokenizerError: if tokenizer.json is missing or unreadable.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} does not exist. Copy the tokenizer files of the model there.")
        try:
            self._tokenizer = _Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise TokenizerError(f"{path} cannot be read ({error}). Copy it from the model again.") from error
        # A file may say how its writer cut and padded batches. A text is encoded whole, as transformers does.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder = folder

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of `text`; with `special`, those the tokenizer adds by itself (such as BOS) too.

        Raises:
            TextError: if the text holds what was no UTF-8 where it came from.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError("The text is not in UTF-8. Convert it.") from error
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `ids`; with `special`, special tokens too."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def vocabulary(self) -> dict[str, int]:
        """Return every token, special ones included, and its number."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def token(self, number: int) -> str:
        """Return how the vocabulary spells a token.

        Raises:
            KeyError: if there is no such token.
        """
        spelled = self._tokenizer.id_to_token(number)
        if spelled is None:
            raise KeyError(number)
        return str(spelled)

    def special_token(self, role: str) -> int | None:
        """Return the token that the tokenizer's settings name for `role`, such as bos_token; None where they do not."""
        spelled = self._special_tokens().get(role)
        return None if spelled is None else self._tokenizer.token_to_id(spelled)

    def stream(self) -> "TextStream":
        """Return a decoder for tokens that come one at a time."""
        return TextStream(self._tokenizer)

    def chat(self, messages: Messages, *, generation_prompt: bool = True) -> str:
        """Render `messages` by the model's chat template, as transformers' apply_chat_template does.

        Encode the result with `special=False`: templates write the special tokens themselves.

        Raises:
            TokenizerError: if the model has no chat template, or the template refuses the messages.
        """
        template = self._template()
        given = {
            "messages": list(messages),
            # Templates ask whether these are none, which what is not given is not.
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        try:
            return _environment().from_string(template).render(**given, **self._special_tokens())
        except jinja2.TemplateError as error:
            raise TokenizerError(f"The chat template of {self._folder} refuses these messages: {error}") from error

    def _config(self) -> dict[str, Any]:
        return self._json("tokenizer_config.json")

    def _special_tokens(self) -> dict[str, str]:
        """Return role, such as bos_token -> how the vocabulary spells the token, as transformers finds them."""
        named = self._config()
        if "added_tokens_decoder" not in named:
            # Only then does transformers read the older file, and what that says wins.
            named |= self._json("special_tokens_map.json")
        spelled = {role: each.get("content") if isinstance(each, dict) else each for role, each in named.items()}
        return {role: each for role, each in spelled.items() if role.endswith("_token") and isinstance(each, str)}

    def _json(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise TokenizerError(f"{path} cannot be read as JSON ({error}). Copy it from the model again.") from error
        return content if isinstance(content, dict) else {}

    def _template(self) -> str:
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except ValueError as error:
                raise TokenizerError(f"{path} is not UTF-8 ({error}). Copy it from the model again.") from error
        template = self._config().get("chat_template")
        if isinstance(template, list):
            # Older tokenizers name several templates; the one called default is for conversation.
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise TokenizerError(f"The model in {self._folder} has no chat template. Give it a plain prompt instead.")
        return template


class TextStream:
    """Turns tokens into text as they come; a character waits until all its tokens are there."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Text is given up to the second token, and decoded from the first on: a decoder looks back over a few tokens
        # only, and turns what is no character into U+FFFD, which may still become one.
        self._start = self._given = 0

    def push(self, token: int) -> str:
        """Return the text that `token` completes; often a word, sometimes nothing yet."""
        self._ids.append(token)
        text = self._rest()
        if not text or text.endswith(_NO_CHARACTER):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text

    def finish(self) -> str:
        """Return what is left when no more tokens come: the remains of an incomplete character."""
        return self._rest()

    def _rest(self) -> str:
        """Return the text of the tokens that none was given of yet."""
        before, all_of_it = (
            self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True)
            for end in (self._given, len(self._ids))
        )
        return str(all_of_it[len(before) :])


class _Generation(Extension):
    """The tag `generation`, by which templates mark what the model wrote: its body is rendered like all else."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the sandbox that chat templates are written for: that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
