"""EDM's ADM network as a UNet2DModel, against ADM written by itself."""

import pytest
import torch
from diffusers import UNet2DModel
from torch.nn import functional

from instaflow import places
from instaflow.errors import DataError
from instaflow.models.adm import configuration, network_of
from instaflow.models.families import TO_IMPORT, architecture_of
from tests.models.adm_reference import Adm


def made(side=8, classes=10, **sizes):
    torch.manual_seed(0)
    network = Adm(side, classes, **sizes).eval()
    for parameter in network.parameters():  # nothing zero, nothing one: each weight counts
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return network


SIZES = [
    {},
    {"classes": 0},
    {"blocks": 2, "factors": (1, 1, 2), "attention": (8, 2)},
    {"factors": (1, 2, 1), "attention": ()},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_imported_network_gives_the_same(sizes):
    network = made(**sizes)
    state = network.state_dict() | {"map_augment.weight": torch.ones(128, 9)}  # training's alone
    ours = network_of({f"model.{name}": value for name, value in state.items()})
    generator = torch.Generator().manual_seed(1)
    x, level = torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([-1.5, 0.1, 1.09])
    classes = torch.tensor([7, 0, 9])
    with torch.no_grad():
        if sizes.get("classes") == 0:
            wanted, found = network(x, level), ours(x, level).sample
        else:
            wanted = network(x, level, functional.one_hot(classes, 10).float())
            found = ours(x, level, classes).sample
        assert wanted.std() > 0.1
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        if not sizes:
            one_hot = functional.one_hot(classes, 10).double()
            double = network.double()(x.double(), level.double(), one_hot)
            # The embedding of the noise level is diffusers' own, in float32.
            torch.testing.assert_close(
                ours.double()(x.double(), level.double(), classes).sample, double, rtol=0, atol=1e-5
            )


def test_the_full_size_is_the_papers():
    """296 million parameters of ImageNet-64's (Karras et al. 2022, Table 7)."""
    with torch.device("meta"):
        network = Adm(64, 1000, channels=192, factors=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8))
        ours = UNet2DModel(**configuration(network.state_dict()))
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (network, ours)]
    assert counts[0] == counts[1] == 295_899_267


CIFAR = {"side": 32, "channels": 256, "factors": (1, 1, 1), "blocks": 3, "attention": (32, 16, 8)}
IMPORTED = {
    "edm-imagenet-64x64-cond-adm": {
        "side": 64, "classes": 1000, "channels": 192, "factors": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8)
    },
    "edm-cifar10-32x32-cond-adm": CIFAR | {"classes": 10},
    "edm-cifar10-32x32-uncond-adm": CIFAR | {"classes": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", places.TO_IMPORT)
def test_what_is_yet_to_be_imported_is_known_as_it_will_be(name):
    with torch.device("meta"):
        network = Adm(**IMPORTED[name])
    architecture = architecture_of(f"teachers/{name}")
    assert architecture is TO_IMPORT[name]
    assert architecture.unet == configuration(network.state_dict())
    assert architecture.parameters()["unet"] == sum(parameter.numel() for parameter in network.parameters())
    assert architecture.settings.parametrization == "edm" and architecture.settings.guidance_scale == 1


def test_other_networks_are_refused():
    state = made().state_dict()
    with pytest.raises(DataError, match=r"DDPM\+\+ or NCSN\+\+"):
        network_of(state | {"model.dec.8x8_aux_conv.weight": torch.zeros(1)})
    with pytest.raises(DataError, match="lacks out_norm"):
        network_of({name: value for name, value in state.items() if not name.startswith("out_norm")})
    with pytest.raises(DataError, match="otherwise than by means"):
        network_of(state | {"enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 4, 4) / 16})
    with pytest.raises(DataError, match="not the whole state"):
        network_of({name: value for name, value in state.items() if "in1" not in name})
    for name in ("out_conv.weight", "map_layer0.weight", "enc.8x8_conv.weight"):
        with pytest.raises(DataError, match="not the whole state"):
            network_of(state | {name: torch.tensor(1.0)})
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"'out_norm\.bias' of this .* not finite"):
            network_of(state | {"model.out_norm.bias": torch.full_like(state["out_norm.bias"], value)})
    out, first = state["out_conv.weight"], state["enc.8x8_conv.weight"]
    doubled = {"out_conv.weight": out.repeat(2, 1, 1, 1), "out_conv.bias": state["out_conv.bias"].repeat(2)}
    wide = {"enc.8x8_conv.weight": first.repeat(1, 2, 1, 1)}
    for change, words in (
        (doubled, "takes 3 channels and gives 6"),
        (wide, "takes 6 channels and gives 3"),
        (doubled | wide, "takes 6 channels and gives 6"),
    ):
        with pytest.raises(DataError, match=words):
            network_of(state | change)
    with pytest.raises(DataError, match="channels of"):
        network_of(
            made(channels=64, factors=(2,), attention=()).state_dict()
            | {"enc.8x8_conv.weight": torch.zeros(64, 3, 3, 3)}
        )
