import numpy as np
import pytest
import torch
from PIL import Image

from instaflow.evaluation.features import exactly, in_bytes, lanczos


def images(count=4, side=32):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_number_becomes_the_byte_next_to_it(dtype):
    values = torch.tensor([-3.0, -1, -0.25, 0, 0.5, 1, 1.5], dtype=dtype).view(1, 1, 1, -1)
    assert in_bytes(values).flatten().tolist() == [0, 0, 96, 128, 191, 255, 255]


def test_lanczos_is_pillow_s():
    big = images(2, 64)
    expected = Image.fromarray(big[1].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.LANCZOS)
    small = lanczos(big, 16)
    assert small.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(small[1].permute(1, 2, 0), np.asarray(expected))


def test_the_precision_of_others_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), exactly():
        assert not torch.backends.cudnn.allow_tf32 and torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 == before and not torch.is_inference_mode_enabled()
