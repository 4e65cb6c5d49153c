"""The couple stage: (noise, latent) pairs of a model, sampled or inverted, in shards. Also what repairs them."""

import os
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from instaflow.couplings.generate import Sampler, make_records, write_records
from instaflow.couplings.leases import Leases
from instaflow.couplings.manifest import (
    Manifest,
    make_anew,
    place_of_data,
    place_of_model,
    read_manifest,
    write_manifest,
)
from instaflow.couplings.output import close_output, open_output, settle_output, take_over
from instaflow.couplings.prompts import KeptPrompts, save_prompts
from instaflow.couplings.records import Shard
from instaflow.couplings.shards import Sidecar, read_sidecar, shards_fingerprint, shards_to_make, unmark_shard
from instaflow.couplings.verify import bad_shards, verify
from instaflow.couplings.verify_shard import Problem
from instaflow.errors import DataError, Interrupted
from instaflow.files import write_json
from instaflow.image_files import images_exist, images_hash
from instaflow.interruption import Stop, listening
from instaflow.meeting import facts, host
from instaflow.models.device import device, set_up_cpu
from instaflow.models.loading import DTYPES, load_model
from instaflow.models.model import Model
from instaflow.models.pixels import PixelModel
from instaflow.models.samplers import coupling_scheduler, recorded_scheduler
from instaflow.models.sampling import Sampling, pays_to_compile
from instaflow.places import is_hub_name, model_fingerprint
from instaflow.plurals import counted
from instaflow.progress import Progress
from instaflow.prompt_sources import Prompts
from instaflow.rundir import StageFolder, locked, read_done
from instaflow.sections import DIGITS
from instaflow.world import barrier, hardware, world
from pipelines.experiment import say
from pipelines.inverting import INVERSION, inverting, real_captions, real_images
from pipelines.keeping import announced, keep_no_prompt, keeping

DECIDING = ("instaflow", "torch", "diffusers", "transformers")

MakeSampler = Callable[[Model, Manifest], Sampler]


def run(stage: StageFolder, stop: Stop) -> Callable[[], str | None]:
    """Make the shards that are missing, among any number of workers; every process of a launch makes its share.

    Returns what gives the content's fingerprint, or None as long as shards are left that belong to other workers.
    """
    settings, place = stage.stage, world()
    if place.leads and not (stage.folder / "prompts.json").exists():
        save_prompts(stage.folder, prompts_of(stage))
    barrier()
    prompts = KeptPrompts(stage.folder)
    model = load_model(stage.locate(settings.model), device=device(), dtype=DTYPES[settings.dtype])
    if isinstance(model, PixelModel):
        for prompt in prompts:
            model.number_of(prompt)  # raises DataError for one that is no class
    scheduler = None if settings.data else coupling_scheduler(model, settings.sampler, settings.timestep_spacing)
    if place.leads:
        if not (stage.folder / "manifest.json").exists():
            write_manifest(stage.folder, described(stage, model, scheduler, prompts.hash))
        if read_manifest(stage.folder).prompts_hash != prompts.hash:
            message = f'"{stage.folder / "prompts.json"}" does not have the hash that the manifest says'
            raise DataError(message, make_anew(stage.folder))
        if settings.keep and settings.keep.embeddings:
            keep_no_prompt(stage.folder, model)
        settle_output(stage.folder, settings.output)
        open_output(stage.folder)
    barrier()
    manifest = read_manifest(stage.folder)  # perhaps another worker's, a moment earlier
    if told := other_versions(manifest):
        what = "shards may differ in their last bits; give all workers one environment"
        say(f"{stage.name}: '{host()}' has {' and '.join(told)} as the first worker: {what}")
    index, count = stage.worker.index * place.size + place.rank, stage.worker.count * place.size
    mine = [shard for shard in shards_to_make(stage.folder, manifest.plan) if shard % count == index]
    make_sampler = sampler_of(manifest, scheduler, settings.data, model.image_size)
    made = make_shards(stage.folder, mine, manifest, prompts, model, make_sampler, label=stage.name, stop=stop)
    for sidecar in made:
        stage.log(shard=sidecar.shard, count=sidecar.count, left_out=len(sidecar.left_out))
    if stop():
        left = len(shards_to_make(stage.folder, manifest.plan))
        raise Interrupted(
            f"Stage '{stage.name}' stopped ({stop.signal}): left to make are {left} of "
            f"{counted(manifest.plan.num_shards, 'shard')}",
            f"To go on: {stage.command()}",
        )

    def fingerprint() -> str | None:
        take_over(stage.folder, manifest.plan)
        if shards_to_make(stage.folder, manifest.plan):
            return None
        Leases(stage.folder).clear()
        plan = manifest.plan
        if not any(read_sidecar(stage.folder, shard, plan).count for shard in range(plan.num_shards)):
            what = "image can be read and inverted" if manifest.data else "latent is an image's"
            raise DataError(
                f"Stage '{stage.name}' made no coupling: no {what}",
                f"Look at what the shards' sidecars tell, and delete '{stage.folder}' to make it anew",
            )
        close_output(stage.folder)
        return shards_fingerprint(stage.folder, manifest.plan)

    return fingerprint


def prompts_of(stage: StageFolder) -> Iterable[str]:
    """The stage's prompts, or the captions of its real images."""
    settings = stage.stage
    if settings.data:
        return real_captions(settings.data, settings.count, stage.seed, stage.name)
    return Prompts(settings.prompts)


def described(stage: StageFolder, model: Model, scheduler: Any, prompts_hash: str) -> Manifest:
    """What the stage is about to make, and how; `scheduler` is None where it inverts."""
    settings = stage.stage
    compiled = settings.compile
    if compiled is None:
        branches = 2 if settings.guidance_scale > 1 else 1
        calls = settings.count * settings.num_steps * branches
        compiled = settings.data is None and pays_to_compile(model, calls)
    inverted: dict[str, Any] = {}
    if settings.data:
        inverted = {"data": seen_from(stage.folder, settings.data), "data_hash": images_hash(settings.data)}
    return Manifest(
        stage=stage.name,
        seed=stage.seed,
        count=settings.count,
        records_per_shard=settings.records_per_shard,
        latent_shape=model.latent_shape,
        prompts_hash=prompts_hash,
        model=stage.relative(settings.model),
        model_fingerprint=stage.content(settings.model),
        sampler={"class": type(scheduler).__name__, **plain(scheduler.config)} if scheduler else INVERSION,
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        timestep_spacing=scheduler.config.get("timestep_spacing", "karras") if scheduler else "trailing",
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        compiled=compiled,
        keep=announced(settings.keep, model, scheduler, settings.num_steps),
        hardware={"name": hardware(), **versions()},
        **inverted,
    )


def versions() -> dict[str, str]:
    """Those of this worker's packages that couplings depend on."""
    here = facts().versions
    return {package: here[package] for package in DECIDING if package in here}


def other_versions(manifest: Manifest) -> list[str]:
    """Where they are not those that the stage was begun with, as far as the manifest tells."""
    begun = manifest.hardware
    return [
        f"{package} {here}, not {begun[package]}"
        for package, here in versions().items()
        if begun.get(package, here) != here
    ]


def make_shards(
    folder: Path,
    shards: list[int],
    manifest: Manifest,
    prompts: Sequence[str],
    model: Model,
    make_sampler: MakeSampler,
    *,
    label: str,
    stop: Stop,
    unmark: Callable[[int], None] | None = None,
) -> Iterator[Sidecar]:
    """Lease, sample and write shards, each written while the next is sampled; yields their sidecars.

    With `unmark` they are made again, whatever sidecars they have (`Leases.turns`).
    """
    if not shards:
        return
    if manifest.compiled and world().leads:
        print(f"{label}: compiling the network, which may take a minute or two", flush=True)
    sample = make_sampler(model, manifest)

    @cache
    def precise() -> Sampler:
        plain = manifest.model_copy(update={"compiled": False})  # for a few records
        return make_sampler(load_model(model.name, device=device()), plain)

    again = None if manifest.dtype == "float32" else lambda *batch: precise()(*batch)
    total = sum(len(manifest.plan.indices(shard)) for shard in shards)
    sampled: set[int] = set()  # shards, by this process
    left_out = 0  # of their records
    writing: deque[Future[Sidecar]] = deque()

    def done() -> int:
        """The couplings of the shards that are made, by whom ever."""
        left = {*shards_to_make(folder, manifest.plan)} - sampled
        return total - sum(len(manifest.plan.indices(shard)) for shard in shards if shard in left)

    with (
        Progress(label, total=total, unit="couplings", quiet=not world().leads) as progress,
        Leases(folder) as leases,
        ThreadPoolExecutor(1) as writer,
    ):

        def write(shard: int, records: Shard) -> Sidecar:
            sidecar = write_records(folder, shard, manifest, records)
            leases.give_back(shard)
            return sidecar

        def written() -> Sidecar:
            nonlocal left_out
            sidecar = writing.popleft().result()
            left_out += len(sidecar.left_out)
            return sidecar

        for shard, lost in leases.turns(shards, stop, unmark):
            progress.update(before := done())

            def stop_or_lost(lost: Callable[[], bool] = lost) -> bool:
                return stop() or lost()

            records = make_records(
                folder,
                shard,
                manifest,
                prompts,
                sample,
                again=again,
                stop=stop_or_lost,
                report=lambda count: progress.update(progress.done + count),
            )
            while writing:  # at most one waits for the disk, however slow that is
                yield written()
            if records is None:
                leases.give_back(shard)
                progress.update(before)
            else:
                sampled.add(shard)
                writing.append(writer.submit(write, shard, records))
        while writing:
            yield written()
        progress.update(done() - left_out)
    if left_out:
        why = "images that cannot be read or lead to no noise" if manifest.data else "latents that are no image's"
        print(f"{label}: left out {counted(left_out, 'coupling')}: {why}")
    if model.num_truncated:  # each process speaks of what it made itself
        print(f"{label}: in {model.num_truncated:,} couplings the prompt was too long for the tokenizer and was cut")


def sampler_of(manifest: Manifest, scheduler: object, data: str | None, size: tuple[int, int]) -> MakeSampler:
    """What makes the records of a stage: by sampling with the scheduler, or by inverting real images of `size`."""
    if data is None:
        return lambda model, manifest: sampler(model, scheduler, manifest)
    image = real_images(data, manifest.count, size)
    return lambda model, manifest: inverting(model, manifest, image)


def sampler(model: Model, scheduler: object, manifest: Manifest) -> Sampler:
    """What samples a batch with this model, and keeps of it what the manifest says.

    Raises InstaFlowError where the model can't be compiled.
    """
    sampling = Sampling(
        model,
        num_steps=manifest.num_steps,
        guidance_scale=manifest.guidance_scale,
        scheduler=scheduler,
        compiled_for=manifest.batch_size if manifest.compiled else None,
    )
    return keeping(sampling, manifest.keep)


def repair(folder: Path, *, model: str | None = None, workers: int = 1) -> list[int]:
    """Make exactly the bad or missing shards of a couple stage's folder again; returns their numbers.

    `model` says where the model is that made them, if no longer where it was. Of a stage that is not done, shards
    that nobody made yet are left to it.
    """
    manifest = read_manifest(folder)
    with locked(folder):
        open_output(folder)  # a store that is gone must not look like shards that are
        with listening() as stop:
            problems = verify(folder, workers=workers, stop=stop)
        return make_bad_shards(folder, manifest, problems, model)


def make_bad_shards(folder: Path, manifest: Manifest, problems: list[Problem], model: str | None = None) -> list[int]:
    """Make the shards that `problems` name again; returns their numbers."""
    for problem in problems:
        if problem.shard is None and not problem.stray:
            raise DataError(str(problem), "No shard can mend that: restore the file, or make the stage anew")
    shards = bad_shards(problems)
    if not shards:
        return []
    prompts = KeptPrompts(folder)
    place = model or place_of_model(folder, manifest)
    hint = f"Say where it is: instaflow repair {shlex.quote(str(folder))} --model PLACE; or make the couplings anew"
    if not Path(place).exists() and not is_hub_name(place):
        raise DataError(f"The model that made the couplings in '{folder}' is not at '{place}'", hint)
    if model_fingerprint(place) != manifest.model_fingerprint:
        raise DataError(f"'{place}' is not the model that made the couplings in '{folder}'", hint)
    set_up_cpu()
    loaded = load_model(place, device=device(), dtype=DTYPES[manifest.dtype])
    data = data_to_invert(folder, manifest) if manifest.data else None
    scheduler = None if data else recorded_scheduler(manifest.sampler)
    with listening() as stop:
        made = make_shards(
            folder,
            shards,
            manifest,
            prompts,
            loaded,
            sampler_of(manifest, scheduler, data, loaded.image_size),
            label="repair",
            stop=stop,
            unmark=partial(unmark_shard, folder),
        )
        count = len(list(made))
    Leases(folder).clear()
    if count < len(shards):
        again = ["instaflow", "repair", str(folder), *(["--model", model] if model else [])]
        raise Interrupted(f"Repair of '{folder}' stopped ({stop.signal})", f"To go on: {shlex.join(again)}")
    renew_done_mark(folder, manifest)
    return shards


def data_to_invert(folder: Path, manifest: Manifest) -> str:
    """Where the images are that a stage's couplings were inverted from. Raises DataError if they are not there."""
    data = place_of_data(folder, manifest)
    if not images_exist(data) or images_hash(data) != manifest.data_hash:
        raise DataError(
            f"The images that the couplings in '{folder}' were inverted from are not at '{data}'",
            "Put them there as they were, or make the couplings anew",
        )
    return data


def renew_done_mark(folder: Path, manifest: Manifest) -> None:
    """Let a done stage's mark tell what its shards hold now; what was built on other bytes will be refused."""
    file = folder / "done.json"
    if file.exists() and not shards_to_make(folder, manifest.plan):
        mark, fingerprint = read_done(folder), shards_fingerprint(folder, manifest.plan)
        if mark["fingerprint"] != fingerprint:
            write_json(file, mark | {"fingerprint": fingerprint})


def seen_from(folder: Path, data: str) -> str:
    """Where images are, as a stage's folder sees it; "digits" and a URL as they stand."""
    return data if data == DIGITS or "://" in data else os.path.relpath(data, folder)


def plain(config: dict) -> dict:
    """A scheduler's settings without the library's own notes on where they were loaded from."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
