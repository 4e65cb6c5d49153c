"""Couplings: prompts, noise, generation, shards, verification, and the loader that turns shards into batches."""
