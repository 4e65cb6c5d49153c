"""The perceptual distance against the lpips package, its formula written out, and finite differences."""

import numpy as np
import pytest
import torch
import torchvision
from diffusers import AutoencoderTiny
from torch.nn import functional

from instaflow.errors import DataError
from instaflow.models.tiny import tiny_vae
from instaflow.models.vae import load_tiny
from instaflow.training.perceptual import (
    PerceptualDistance,
    PerceptualNetwork,
    cropped,
    load_lpips,
    load_network,
    save_network,
    small_layers,
)
from tests.models.made import noise

BACKBONE = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}


def write_backbone(path, name):
    """Random weights under torchvision's names and in its shapes; the classifier's, read by nobody, take no room."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in BACKBONE[name](weights=None).state_dict().items()}
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    for key, shape in shapes.items():
        if "features" in key:
            state[key] = torch.randn(shape) / max(1, shape[1:].numel()) ** 0.5
    torch.save(state, path)
    return path


def images(count, size, seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def of_the_package(name, weights):
    """The lpips package's own network, with the backbone's weights put in place."""
    import lpips

    network = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
    state = torch.load(weights, weights_only=True)
    for part in (getattr(network.net, f"slice{i}") for i in range(1, 6)):
        for place, layer in part.named_children():
            own = {key: state[f"features.{place}.{key}"] for key in layer.state_dict()}
            layer.load_state_dict(own)
    return network


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_is_the_package_s(tmp_path, name):
    weights = write_backbone(tmp_path / "w.pth", name)
    ours, theirs = load_lpips(name, weights), of_the_package(name, weights)
    for size in ((72, 66), (64, 80)):  # an image of at most 64 pixels is enlarged
        x, y = images(1, size).requires_grad_(), images(1, size, seed=1)
        small = size == (64, 80)
        enlarged = [functional.interpolate(z, (224, 224), mode="bilinear") if small else z for z in (x, y)]
        expected = theirs(*enlarged).flatten()
        found = ours.distance(ours(x), ours(y))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        wanted, had = (torch.autograd.grad(value.sum(), x)[0] for value in (expected, found))
        torch.testing.assert_close(had, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        assert float(expected.detach().min()) > 1e-3
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_network_of_ones_own_by_hand(tmp_path):
    torch.manual_seed(0)
    layers = small_layers([3, 4, 6], [1, 2])
    save_network(tmp_path / "own", layers, [3, 4, 6], [1, 2])
    network = load_network(tmp_path / "own")
    x, y = images(2, (8, 8)), images(2, (8, 8), seed=1)
    expected = np.zeros(2)
    for depth in (2, 4):
        one, other = (layers[:depth](z).detach().double().numpy() for z in (x, y))
        assert one.shape[2:] == ((8, 8) if depth == 2 else (4, 4))
        for row in range(2):
            sums = 0.0
            for place in np.ndindex(one.shape[2:]):
                a, b = one[row][:, *place], other[row][:, *place]
                a, b = (v / max(np.linalg.norm(v), 1e-10) for v in (a, b))
                sums += ((a - b) ** 2).sum()
            expected[row] += sums / np.prod(one.shape[2:])
    np.testing.assert_allclose(network.distance(network(x), network(y)).numpy(), expected, rtol=1e-5)
    assert network.distance(network(x), network(x)).tolist() == [0, 0]


def test_the_gradient_is_finite_where_no_channel_answers():
    """The square root of a sum of squares has none at zero."""
    layers = small_layers([3, 4], [1])
    torch.nn.init.constant_(layers[0].bias, -100.0)
    network = PerceptualNetwork(layers, [2], of_imagenet=False)
    x = images(1, (8, 8)).requires_grad_()
    network.distance(network(x), network(images(1, (8, 8), seed=1))).sum().backward()
    assert x.grad.isfinite().all()


@pytest.fixture
def distance():
    torch.manual_seed(0)
    vae = tiny_vae(scaling_factor=0.7).requires_grad_(False).eval()
    return PerceptualDistance(vae, PerceptualNetwork(small_layers([3, 8, 8], [1, 2]), [2, 4], of_imagenet=False))


def test_the_gradient_goes_through_the_frozen_decoder(distance):
    z, target = noise(2).requires_grad_(), noise(2, seed=1).requires_grad_()
    found = distance(z, target, None)
    decoded = [distance.vae.decode(part / 0.7).sample for part in (z, target)]
    torch.testing.assert_close(found, distance.network.distance(*map(distance.network, decoded)))
    found.sum().backward()
    assert target.grad is None and all(weight.grad is None for weight in distance.vae.parameters())
    direction = z.grad / z.grad.norm()
    with torch.no_grad():
        ends = [distance(z + step * direction, target, None).sum().double() for step in (0.02, -0.02)]
    assert float(ends[0] - ends[1]) / 0.04 == pytest.approx(float(z.grad.norm()), rel=0.02)


def test_checkpointing_the_decoder_changes_no_gradient(distance):
    def gradient():
        z, calls = noise(2).requires_grad_(), []
        hook = distance.vae.decoder.up_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        distance(z, noise(2, seed=1), None).sum().backward()
        hook.remove()
        return z.grad, len(calls)

    (plain, calls), _ = gradient(), distance.vae.enable_gradient_checkpointing()
    again, more = gradient()
    assert torch.equal(again, plain) and more == calls + 1  # once more on the way back


def test_crops_are_drawn_for_each_sample_and_are_the_same_in_both(distance):
    draws = np.array([[0.5, 0.5, 0.0, 0.999], [0.5, 0.5, 0.999, 0.45]])
    z, target = noise(2), noise(2, seed=1)
    whole = PerceptualDistance(distance.vae, distance.network)
    cut = PerceptualDistance(distance.vae, distance.network, crop=3)(z, target, draws)
    squares = [(slice(0, 3), slice(5, 8)), (slice(5, 8), slice(2, 5))]
    for row, square in enumerate(squares):
        parts = (part[row : row + 1][:, :, *square] for part in (z, target))
        torch.testing.assert_close(cut[row : row + 1], whole(*parts, None))
    assert torch.equal(cropped(z, 8, draws[:, 2:]), z)
    places = np.random.default_rng(0).random((4000, 2))
    numbered = torch.arange(64.0).view(1, 1, 8, 8).expand(4000, -1, -1, -1)
    corners, counts = cropped(numbered, 3, places)[:, 0, 0, 0].unique(return_counts=True)
    assert corners.tolist() == [8 * row + column for row in range(6) for column in range(6)]
    assert counts.min() > 60  # of 111 each


def test_a_tiny_decoder_takes_scaled_latents(tmp_path):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    loaded = load_tiny(tmp_path / "tiny", device=torch.device("cpu"))
    network = PerceptualNetwork(small_layers([3, 8], [1]), [2], of_imagenet=False)
    decode = PerceptualDistance(loaded, network).decode
    torch.testing.assert_close(decode(noise(1)), tiny.eval().decode(noise(1)).sample)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    (tmp_path / "tiny" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tiny(tmp_path / "tiny", device=torch.device("cpu"))


@pytest.mark.parametrize("fault", ["another network", "no such layer", "damaged", "code"])
def test_a_backbone_of_something_else_is_refused(tmp_path, fault):
    file = tmp_path / "w.pth"
    if fault == "another network":
        write_backbone(file, "vgg")
    elif fault == "no such layer":
        torch.save({"layer.0.weight": torch.zeros(1)}, file)
    elif fault == "damaged":
        file.write_bytes(b"PK\x03\x04 and no more")
    else:
        torch.save(print, file)  # a pickle that would import what it names
    with pytest.raises(DataError, match="holds no weights of torchvision's network for 'alex'") as caught:
        load_lpips("alex", file)
    assert str(file) in caught.value.message


@pytest.mark.parametrize("fault", ["missing", "format", "shapes", "damaged"])
def test_a_folder_that_is_no_perceptual_network_is_refused(tmp_path, fault):
    folder = tmp_path / "own"
    save_network(folder, small_layers([3, 4], [1]), [3, 4], [1])
    if fault == "missing":
        (folder / "model.safetensors").unlink()
    elif fault == "format":
        (folder / "config.json").write_text('{"format": 2, "channels": [3, 4], "strides": [1]}')
    elif fault == "shapes":
        (folder / "config.json").write_text('{"format": 1, "channels": [3, 5], "strides": [1]}')
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="is no perceptual network"):
        load_network(folder)
