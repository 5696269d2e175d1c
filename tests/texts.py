"""Texts on which tokenizers tend to disagree: digits, accents, scripts, special tokens, white space, contractions."""

__all__ = ["TEXTS"]

TEXTS = [
    "Hello world",
    "In 2024, 1234567 people paid $3.14 for 42% of it.",
    "naïve café — 北京 😀 Привет",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  two  spaces\n\n\ttab\r\n",
    "it's don't WE'LL",
    "",
]
