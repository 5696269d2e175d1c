"""What a tokenizer does to text: which tokens it adds, and which tokens are no text by themselves."""

from collections.abc import Iterable

from planish.compiler.runtime.tokenizer import Tokenizer

__all__ = ["fragments", "prefix"]

#: Some text for a token to stand behind: alone, decoders strip the space that begins a word.
_ANCHOR = "a"


def prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that `tokenizer` puts before every text by itself: BOS, or nothing."""
    plain, whole = tokenizer.encode(_ANCHOR, special=False), tokenizer.encode(_ANCHOR)
    # What stands behind the text, such as EOS, ends it; calibration reads windows of a text that goes on.
    return next(whole[:start] for start in range(len(whole)) if whole[start : start + len(plain)] == plain)


def fragments(tokenizer: Tokenizer, tokens: Iterable[int]) -> set[int]:
    """Return those of `tokens` that are no text: pieces of one character, the unknown token, special tokens.

    This needs no knowledge of how a vocabulary spells them: a piece of a character decodes to U+FFFD, be it of a
    byte-level vocabulary or of one that falls back on bytes, and the others decode to nothing.
    """
    anchor = tokenizer.encode(_ANCHOR, special=False)[-1]
    alone = tokenizer.decode([anchor])
    decoded = {token: tokenizer.decode([anchor, token]) for token in set(tokens)}
    return {token for token, text in decoded.items() if text == alone or "\N{REPLACEMENT CHARACTER}" in text}
