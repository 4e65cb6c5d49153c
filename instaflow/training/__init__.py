"""Training: the loop, the DeepSpeed engine, EMA, checkpoints and losses."""
