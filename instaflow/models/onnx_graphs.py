"""A Stable Diffusion as ONNX graphs, in the folders that diffusers' OnnxStableDiffusionPipeline reads."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instaflow.errors import ConfigError
from instaflow.files import write_json
from instaflow.models.settings import write_settings

PIPELINE = "OnnxStableDiffusionPipeline"
DRAWN = ("sample", "latent_sample")
"""The inputs that are compared on random values."""
STOCK_SCALE = 0.18215
"""What that pipeline divides latents by, whatever its VAE is: Stable Diffusion's scaling_factor."""


class Graph(nn.Module):
    """A function of tensors, with the network that it calls."""

    def __init__(self, network: nn.Module, work: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.work = network, work

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.work(self.network, *inputs)


def write_onnx(model: Any, folder: Path) -> float:
    """Write a TextToImage's graphs, tokenizer and scheduler; returns how far onnxruntime is from PyTorch.

    Of the graph that is farthest: the largest difference of its output, relative to its largest value. Raises
    ConfigError for a model of pixels or XL, and where ONNX's packages are not installed.
    """
    if model.vae is None or model.text_encoder_2 is not None:
        raise ConfigError(f"'{model.name}' is no Stable Diffusion 1 or 2, whose form in ONNX diffusers knows")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"'--to onnx' wants the package '{error.name}', which is not installed",
            "pip install onnx onnxruntime onnxscript",
        ) from error
    model.unet.float()
    model.vae.float()
    model.text_encoder.float()
    scale = STOCK_SCALE / model.vae.config.scaling_factor
    ids = model.tokens([model.any_prompt] * 2)[0].int()
    hidden = model.text_encoder(ids)[0]
    latents = torch.zeros(2, *model.latent_shape, device=model.device)
    images = torch.zeros(2, 3, *model.image_size, device=model.device)
    step = torch.tensor([999], device=model.device)  # one for the whole batch
    graphs: dict[str, tuple[nn.Module, Callable[..., Tensor], dict[str, Tensor], str]] = {
        "text_encoder": (model.text_encoder, encode_text, {"input_ids": ids}, "last_hidden_state"),
        "unet": (
            model.unet,
            call_unet,
            {"sample": latents, "timestep": step, "encoder_hidden_states": hidden},
            "out_sample",
        ),
        "vae_decoder": (
            model.vae,
            lambda vae, latents: vae.decode(latents * scale, return_dict=False)[0],
            {"latent_sample": latents},
            "sample",
        ),
        "vae_encoder": (
            model.vae,
            lambda vae, images: vae.encode(images, return_dict=False)[0].mean / scale,
            {"sample": images},
            "latent_sample",
        ),
    }
    for part, (network, work, inputs, output) in graphs.items():
        write_graph(folder / part / "model.onnx", Graph(network, work), inputs, output)
    model.tokenizer.save_pretrained(folder / "tokenizer")
    model.scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": PIPELINE}
    index |= {part: ["diffusers", "OnnxRuntimeModel"] for part in graphs}
    index |= {"tokenizer": ["transformers", type(model.tokenizer).__name__]}
    index |= {"scheduler": ["diffusers", type(model.scheduler).__name__]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", index)
    write_settings(folder, model.settings)
    random = torch.Generator().manual_seed(0)
    far = []
    for part, (network, work, inputs, _) in graphs.items():
        drawn = {
            name: torch.randn(value.shape, generator=random).to(value) if name in DRAWN else value
            for name, value in inputs.items()
        }
        far.append(compared(folder / part / "model.onnx", Graph(network, work), drawn))
    return max(far)


def encode_text(encoder: nn.Module, ids: Tensor) -> Tensor:
    hidden: Tensor = encoder(ids)[0]
    return hidden


def call_unet(unet: nn.Module, x: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
    output: Tensor = unet(x, timestep, hidden, return_dict=False)[0]
    return output


@torch.no_grad()
def write_graph(file: Path, graph: nn.Module, inputs: dict[str, Tensor], output: str) -> None:
    """Trace a graph for batches of any size, and write it; weights beyond 2 GB go into a file beside it."""
    file.parent.mkdir(parents=True)
    batch = {0: torch.export.Dim.DYNAMIC}
    shapes = tuple(batch if len(value) > 1 else None for value in inputs.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(inputs),
            output_names=[output],
            verbose=False,
        )
    assert program is not None
    program.save(str(file))


@torch.no_grad()
def compared(file: Path, graph: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The largest difference of onnxruntime's output and PyTorch's, relative to the largest value of the latter."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
    wanted = graph(*inputs.values()).cpu()
    return float((torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max())
