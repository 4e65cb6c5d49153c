"""Images by the thousand: `instaflow sample` into a folder, which goes on where it stopped."""

from collections.abc import Sequence

from PIL import Image

from instaflow.interruption import listening
from instaflow.places import model_fingerprint
from instaflow.plurals import counted
from instaflow.progress import Progress
from instaflow.prompt_sources import prompts_hash
from instaflow.rundir import locked
from instaflow.using.generator import Generator
from instaflow.using.image_folder import ImageFolder
from instaflow.using.metadata import About
from instaflow.world import worker
from pipelines.sample import sampled_with, tell_of
from pipelines.sample_request import Request, Wanted


def run(request: Request, wanted: Wanted, model: Generator) -> str:
    """Draw the images that the folder lacks; returns a line that says what it holds now. Raises InstaFlowError."""
    (place,), how = request.models, sampled_with(request, model)
    me = worker(request.worker_index, request.worker_count)
    folder = ImageFolder(request.target, len(wanted), request.shard_size, me)
    about = About([place], [how["num_steps"]], [how["guidance_scale"]], request.dtype)

    def draw(indices: Sequence[int]) -> list[Image.Image]:
        return model(
            [wanted.prompt(index) for index in indices], seeds=[wanted.seed(index) for index in indices], **how
        )

    with locked(folder.folder, shared=me.count > 1):
        folder.begin(
            {
                "model": model_fingerprint(place),
                "prompts": prompts_hash(wanted.prompts),
                "seeds": request.seeds or f"{wanted.first}, each prompt its own noise",
                "dtype": request.dtype,
                "safety_checker": model.checker is not None,
                **how,
            }
        )
        total = folder.images(folder.share())
        done = total - folder.images(folder.missing())
        with Progress("sample", total=total, unit="images", start=done) as progress, listening() as stop:
            folder.fill(draw, wanted.drawn, about, batch_size=request.batch_size, stop=stop, report=progress.update)
    tell_of(model)
    shards = f" in {counted(len(folder.share()), 'shard')}" if request.shard_size else ""
    whose = f" of worker {me.index} of {me.count}" if me.count > 1 else ""
    return f"{folder.folder}: {counted(total, 'image')}{shards}{whose}, {counted(how['num_steps'], 'step')}"
