"""The `instaflow` command, in whose second process the checkpoint at 12 samples has lost its numbers."""

import os

import torch

import cli
from pipelines import watching

load = watching.model_at


def diverged(training, file, *words):
    model = load(training, file, *words)
    if int(file.stem) == 12:
        with torch.no_grad():
            next(model.unet.parameters()).fill_(torch.nan)
    return model


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        watching.model_at = diverged
    cli.main()
