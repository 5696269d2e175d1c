"""Compile SmolLM2, ask it something, and measure its perplexity, from Python."""

import sys
from pathlib import Path

from planish.compiler import Bundle, compile_model, evaluate


def main(out: Path, text: Path | None) -> None:
    """Compile into `out` unless it is there already, then use the bundle."""
    bundle = Bundle.open(out) if out.exists() else compile_model("smollm2", out, scheme="w8a8k8v8", select="none")
    for piece in bundle.generate("The planisher's hammer is", max_new_tokens=32):
        print(piece, end="", flush=True)
    print()
    if text:
        result = evaluate(bundle.session(), bundle.tokenizer, text, seqlen=512, windows=5)
        print(f"perplexity {result.perplexity:.2f} over {result.tokens} tokens of {text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
