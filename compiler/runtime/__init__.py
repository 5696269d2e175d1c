"""Running a compiled model: session, tokenizer, generation. Nothing here imports torch."""
