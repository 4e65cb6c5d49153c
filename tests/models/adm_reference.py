"""ADM by itself, as EDM's networks name its parts: written from the papers, to compare an imported network with.

Dhariwal & Nichol 2021 (arXiv 2105.05233), Karras et al. 2022 (arXiv 2206.00364, Table 7).
"""

import math

import torch
from torch import nn
from torch.nn import functional


class Resampled(nn.Conv2d):
    """A convolution behind means of 2×2 pixels, or behind pixels made 2×2; of kernel 0, these alone."""

    def __init__(self, before, after, kernel, up=False, down=False):
        super().__init__(before, after, kernel or 1, padding=kernel // 2)
        self.up, self.down, self.kernel = up, down, kernel
        if not kernel:
            self.weight = self.bias = None
        if up or down:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.down:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return super().forward(x) if self.kernel else x


class Block(nn.Module):
    def __init__(self, before, after, width, up=False, down=False, attention=False):
        super().__init__()
        self.before, self.after, self.heads = before, after, after // 64 if attention else 0
        self.norm0 = nn.GroupNorm(32, before)
        self.conv0 = Resampled(before, after, 3, up, down)
        self.affine = nn.Linear(width, 2 * after)
        self.norm1 = nn.GroupNorm(32, after)
        self.conv1 = nn.Conv2d(after, after, 3, padding=1)
        if before != after or up or down:
            self.skip = Resampled(before, after, 1 if before != after else 0, up, down)
        if attention:
            self.norm2 = nn.GroupNorm(32, after)
            self.qkv = nn.Conv2d(after, 3 * after, 1)
            self.proj = nn.Conv2d(after, after, 1)

    def forward(self, x, embedding):
        skipped = self.skip(x) if hasattr(self, "skip") else x
        h = self.conv0(functional.silu(self.norm0(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, 1)
        x = skipped + self.conv1(functional.silu(self.norm1(h) * (1 + scale) + shift))
        if not self.heads:
            return x
        batch, channels, height, width = x.shape
        size = channels // self.heads
        q, k, v = self.qkv(self.norm2(x)).reshape(batch * self.heads, size, 3, height * width).unbind(2)
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(size), 2)  # [B·heads, queries, keys]
        return x + self.proj((v @ weights.transpose(1, 2)).reshape(x.shape))


class Adm(nn.Module):
    """F(x; c_noise, class). `attention`: the sides in pixels at which blocks attend; the lowest always does once."""

    def __init__(self, side, classes, channels=128, factors=(1, 2), blocks=1, attention=(4,)):
        super().__init__()
        width = 4 * channels
        self.channels = channels
        self.map_layer0, self.map_layer1 = nn.Linear(channels, width), nn.Linear(width, width)
        if classes:
            self.map_label = nn.Linear(classes, width, bias=False)
        self.enc, self.dec, skips, now = nn.ModuleDict(), nn.ModuleDict(), [], 3
        for level, factor in enumerate(factors):
            here = f"{side >> level}x{side >> level}"
            if level == 0:
                self.enc[f"{here}_conv"] = nn.Conv2d(3, channels * factor, 3, padding=1)
                now = channels * factor
            else:
                self.enc[f"{here}_down"] = Block(now, now, width, down=True)
            skips.append(now)
            for index in range(blocks):
                attends = side >> level in attention
                self.enc[f"{here}_block{index}"] = Block(now, channels * factor, width, attention=attends)
                now = channels * factor
                skips.append(now)
        for level, factor in reversed(list(enumerate(factors))):
            here = f"{side >> level}x{side >> level}"
            if level == len(factors) - 1:
                self.dec[f"{here}_in0"] = Block(now, now, width, attention=True)
                self.dec[f"{here}_in1"] = Block(now, now, width)
            else:
                self.dec[f"{here}_up"] = Block(now, now, width, up=True)
            for index in range(blocks + 1):
                attends = side >> level in attention
                self.dec[f"{here}_block{index}"] = Block(now + skips.pop(), channels * factor, width, attention=attends)
                now = channels * factor
        self.out_norm, self.out_conv = nn.GroupNorm(32, now), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x, noise_level, labels=None):
        frequencies = 10000 ** -(torch.arange(self.channels // 2, dtype=x.dtype) / (self.channels // 2))
        angles = noise_level[:, None] * frequencies
        embedding = self.map_layer0(torch.cat([angles.cos(), angles.sin()], 1))
        embedding = self.map_layer1(functional.silu(embedding))
        if labels is not None:
            embedding = embedding + self.map_label(labels)
        embedding, kept = functional.silu(embedding), []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, Block) else block(x)
            kept.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.before:
                x = torch.cat([x, kept.pop()], 1)
            x = block(x, embedding)
        return self.out_conv(functional.silu(self.out_norm(x)))
