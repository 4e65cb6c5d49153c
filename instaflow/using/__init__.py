"""A trained model in use: prompts and seeds in, images out; what an image tells of itself, sheets, strips, films."""
