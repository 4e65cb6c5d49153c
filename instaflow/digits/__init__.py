"""The miniature: real handwritten digits, their captions, tokenizer and network sizes."""
