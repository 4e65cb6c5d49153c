"""The `instaflow` command: options, help and exit codes. Each command imports what it runs, and nothing else."""

import logging
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from instaflow import __version__

NOISY = ("diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree")
"""Loggers that warn at every start where torchao is installed, for those who write it."""


class Commands(click.Group):
    """The commands in the order of the data's road."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--local_rank", hidden=True, expose_value=False, help="Put there by the DeepSpeed launcher.")
def cli() -> None:
    """Turn a text-to-image diffusion model into a one-step generator.

    An experiment is one YAML file of named stages. Start with the packaged one, which needs no GPU and no network:

    \b
        instaflow run digits

    Exit codes: 0 done, 1 an error, 2 wrong usage, 75 interrupted: the same command goes on.
    """


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """CONFIG and --set, which every command has that takes an experiment."""
    options = [
        click.argument("config"),
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="Change one setting, e.g. --set stages.2rf.phases.0.samples=6400. May be given several times.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


launcher_option = click.option(
    "--local_rank", hidden=True, expose_value=False, help="Put there by the DeepSpeed launcher."
)


def experiment_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every command has that runs stages of an experiment."""
    options = [
        click.option("--run-dir", metavar="DIR", help="Write the run here instead of the file's `run`."),
        click.option("--stage", metavar="NAME", help="Run only this stage."),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Show the experiment with every default, look for the files it reads, and write nothing.",
        ),
        launcher_option,
    ]
    for option in reversed(options):
        command = option(command)
    return config_options(command)


def worker_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `couple` has besides: which of several workers this command is."""
    options = [
        click.option(
            "--worker-index",
            type=click.IntRange(min=0),
            metavar="I",
            help="Make only the shards of worker I, counted from 0. Slurm's and Kubernetes' variables fill it in.",
        ),
        click.option(
            "--worker-count",
            type=click.IntRange(min=1),
            metavar="N",
            help="How many workers have fixed shards. By default none has: any number share what is to be made.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


watch_option = click.option(
    "--watch",
    is_flag=True,
    help="While models of the report are still trained, score their checkpoints as they come.",
)


def start(
    kind: str | None,
    config: str,
    run_dir: str | None,
    overrides: tuple[str, ...],
    stage: str | None,
    dry_run: bool,
    worker_index: int | None = None,
    worker_count: int | None = None,
    watch: bool = False,
) -> None:
    """Run one stage, the stages of one kind, or without a kind all of them."""
    from instaflow.config import load_experiment

    experiment = load_experiment(config, overrides, run_dir)
    if stage is not None:
        experiment.check_stage(stage, kind)
    if dry_run:
        from pipelines.experiment import check_files

        click.echo(experiment.resolved(), nl=False)
        check_files(experiment, stage, kind)
        return
    from instaflow.interruption import listening
    from instaflow.world import ALONE, together_under_srun, worker

    me = ALONE
    if kind == "couple":
        me = worker(worker_index, worker_count)
    else:
        together_under_srun()
    with listening() as stop:
        if watch:
            from pipelines.watching import run as run_watch

            run_watch(experiment, stage, stop)
            return
        from pipelines.experiment import run_all, run_kind, run_one

        if stage is not None:
            run_one(experiment, stage, stop, me)
        elif kind is not None:
            run_kind(experiment, kind, stop, me)
        else:
            run_all(experiment, stop)


@cli.command()
@experiment_options
def run(**options: Any) -> None:
    """Run all stages of an experiment, in order; go on where it stopped.

    CONFIG is a YAML file, or the name of a packaged experiment.

    \b
        instaflow run digits
        instaflow run configs/digits.yaml --run-dir runs/seed1 --set seed=1
    """
    start(None, **options)


def add_stage_command(kind: str, first_line: str, *examples: str, more: str = "") -> None:
    """The command that runs the stages of one kind. more: what its help says of it besides."""
    shown = "\n        ".join(examples)

    def command(**options: Any) -> None:
        start(kind, **options)

    command.__doc__ = f"""{first_line}

    Runs every stage of kind `{kind}` whose parents are done, in order, and says what waits for what.
{more}
    \b
        {shown}
    """
    if kind == "couple":
        command = worker_options(command)
    if kind == "evaluate":
        command = watch_option(command)
    cli.command(kind)(experiment_options(command))


add_stage_command("teacher", "Train the miniature teacher of the digits experiment.", "instaflow teacher digits")
add_stage_command(
    "couple", "Write (noise, image) couplings of a model into shards.", "instaflow couple digits --stage pairs"
)
add_stage_command(
    "reflow", "Train the next rectified flow on couplings.", "instaflow reflow digits --set stages.2rf.ema_decay=0.999"
)
add_stage_command(
    "distill", "Train a student of one step or few, by its stage's method.", "instaflow distill digits --stage student"
)
add_stage_command(
    "evaluate",
    "Measure models; write report.html, report.md and report.json.",
    "instaflow evaluate digits",
    "instaflow evaluate digits --stage report --watch",
    more="""
    With --watch it waits for trainings (reflow, distill) among the report's models that another process runs, here or
    on another machine with the same files. Each new checkpoint is measured as the report measures, and noted in
    STAGE/watch: scores.jsonl, a line each, and watch.html, the curve. It ends when the trainings are done, and writes
    nothing into their folders.
""",
)


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--by",
    type=click.Choice(["real", "teacher", "accuracy"]),
    default="real",
    show_default=True,
    help="Rank by Fréchet distance to the real or the teacher's images, or by prompt accuracy.",
)
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="By default beside the folder that the runs are in: runs/digits/0 goes to runs/digits-report.",
)
def compare(runs: tuple[Path, ...], by: str, output: Path | None) -> None:
    """Rank the models of one experiment that was run with several seeds.

    Reads each run's report, and writes compare.json and compare.html: means, spreads, and which differences hold.

    \b
        for seed in 0 1 2; do instaflow run digits --set seed=$seed --run-dir runs/digits/$seed; done
        instaflow compare runs/digits/0 runs/digits/1 runs/digits/2
    """
    from pipelines.compare import run as run_compare

    for line in run_compare(runs, by=by, output=output):
        click.echo(line)


@cli.command()
@config_options
@click.option(
    "--gpus", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="How many work together."
)
@click.option(
    "--utilization",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Of the datasheets' rate, what yours reach: 0.4 for 40%. By default 0.3, an assumption.",
)
def plan(config: str, overrides: tuple[str, ...], gpus: int, utilization: float | None) -> None:
    """Tell what an experiment will cost, before any of it runs.

    Stage by stage: pairs, training samples, floating-point operations, bytes on disk, memory of each GPU under the
    stage's ZeRO stage, and days on named GPUs; beside them the paper's, where the networks are the paper's. Takes some
    seconds on a CPU, reads no weights and asks no network.

    \b
        instaflow plan sd15-instaflow --gpus 8
        instaflow plan sd15-instaflow --gpus 8 --set stages.2rf.zero_stage=2
    """
    from instaflow.config import load_experiment

    experiment = load_experiment(config, overrides)
    from pipelines.plan import run as make_plan

    for line in make_plan(experiment, gpus=gpus, utilization=utilization):
        click.echo(line)


@cli.command()
@config_options
@click.option("--run-dir", metavar="DIR", help="Write the rehearsal here instead of the file's `run` and -rehearsal.")
@launcher_option
def rehearse(config: str, overrides: tuple[str, ...], run_dir: str | None) -> None:
    """Run an experiment in miniature, all of it in minutes.

    The same stages in the same order by the same code, with settings as they are; but each model that is not made by a
    stage is swapped for a tiny one of its format with random weights, and every count is divided by a thousand. Nothing
    is fetched. What comes out is worthless; that it comes out tells that the experiment runs to its end.

    \b
        instaflow rehearse sd15-instaflow
        torchrun --nproc-per-node 2 --no-python instaflow rehearse sd15-instaflow
    """
    from instaflow.config import load_experiment

    experiment = load_experiment(config, overrides)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tiny networks: threads that spin would mostly wait
    from instaflow.interruption import listening

    with listening() as stop:
        from pipelines.rehearse import run as run_rehearsal

        run_rehearsal(experiment, run_dir, stop)


@cli.command()
@config_options
@click.option("--run-dir", metavar="DIR", help="Write the run here instead of the file's `run`.")
@click.option(
    "--profile", metavar="FILE", help="A YAML file with settings of the cluster; those of CONFIG come before them."
)
@click.option(
    "--backend",
    type=click.Choice(["slurm", "local"]),
    default="slurm",
    show_default=True,
    help="Who runs the jobs; local is this machine, at once and one after another.",
)
@click.option("--dry-run", is_flag=True, help="Print the scripts, and submit and write nothing.")
@click.option("--write", is_flag=True, help="Write the scripts to RUN/jobs, to be submitted by hand, and submit none.")
def submit(
    config: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    profile: str | None,
    backend: str,
    dry_run: bool,
    write: bool,
) -> None:
    """Submit an experiment to a Slurm cluster, a job a stage.

    Each comes after those it builds on. What jobs ask for is said in the experiment's section `cluster`, or in a
    profile of the same form. Couple stages may be arrays; a stage that a time limit or a preemption stops is saved, and
    its job queued again. Stages that are done are left out. The scripts are kept in RUN/jobs; one that was edited
    there is submitted as it stands. With --backend local the same chain runs on this machine: each stage in as many
    processes as its job has GPUs on a node.

    \b
        instaflow submit digits --dry-run
        instaflow submit sd15-instaflow --set cluster.partition=gpu --set cluster.account=me
        instaflow submit sd15-instaflow --backend local --set cluster.gpus=4
    """
    if write and backend == "local":
        raise click.UsageError("--write is for Slurm's scripts; --backend local writes none.")
    from instaflow.config import load_experiment

    experiment = load_experiment(config, overrides, run_dir)
    from pipelines.submit import run as submit_all

    submit_all(experiment, profile, backend, dry_run=dry_run, write=write)


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
def status(folder: Path) -> None:
    """Tell how far a run is, from its files alone.

    A line for each stage: its state, progress, rate, time left and job; below it why it failed. Of a run that was not
    submitted, the stages that have begun.

    Exit codes: 0 all done, 1 a stage failed, 75 not done yet.

    \b
        instaflow status runs/digits
    """
    from pipelines.status import run as tell

    lines, code = tell(folder)
    click.echo("\n".join(lines))
    sys.exit(code)


@cli.command()
@click.argument("place", metavar="[FOLDER|CONFIG]", default=".")
@click.option("--json", "as_json", is_flag=True, help="Tell it as JSON, for scripts.")
def doctor(place: str, as_json: bool) -> None:
    """Try what bites on clusters, before a run meets it.

    Packages, PyTorch, GPUs, processes that sum over gloo and NCCL, a compiler, Slurm's commands, models and weights;
    and in FOLDER, or where CONFIG's run goes, what runs ask of a file system: whole renames, locks, the clock, the
    disk's rate (256 MB are written, read and removed), room. A line each: ok, warning or failure, with the way to mend
    it. Of CONFIG, also whether its models and files are here, and whether its plan fits on the disk.

    Started by `srun` on several nodes, it looks at each; the first one tells for all, and tries besides whether they
    run the same, reach one another, and see the same folder and locks.

    Exit codes: 0, or 1 if anything fails.

    \b
        instaflow doctor runs
        instaflow doctor sd15-instaflow
    """
    from instaflow.world import together_under_srun

    together_under_srun()
    from pipelines.doctor import run as examine

    findings, code = examine(place)
    if as_json and findings:
        import json
        from dataclasses import asdict

        click.echo(json.dumps([asdict(one) for one in findings], indent=2, ensure_ascii=False))
    elif findings:
        from pipelines.doctor_table import lines

        click.echo("\n".join(lines(findings)))
    sys.exit(code)


class HeadedOption(click.Option):
    """An option that stands under a heading of its command's help."""

    def __init__(self, *names: Any, heading: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.heading = heading


class Headed(click.Command):
    """A command whose options stand under headings, in the order in which they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def headed(heading: str) -> Callable[..., Any]:
    """`click.option` for an option under this heading."""
    return partial(click.option, cls=HeadedOption, heading=heading)


what_to_draw, noise_option, how_option, made_of_it = (
    headed(words) for words in ("What to draw", "From which noise", "How", "What to make of it")
)


@cli.command(cls=Headed)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@what_to_draw("--prompt", "prompts", metavar="TEXT", multiple=True, help="May be given several times.")
@what_to_draw(
    "--prompts",
    "prompt_file",
    metavar="FILE",
    help="The prompts of a file, in any form that a couple stage reads; - is standard input, a prompt a line.",
)
@what_to_draw("--column", metavar="NAME", help="Where the prompts are, in a file with columns.")
@noise_option(
    "--seed", type=click.IntRange(min=0), metavar="S", help="Each prompt its own noise of this seed; by default of 0."
)
@noise_option(
    "--seeds",
    metavar="RANGES",
    help="Each prompt with each of these: 0-99, or 3,5,8-11. 7 is the first noise of --seed 7, 7:3 its fourth.",
)
@noise_option(
    "--noise-in",
    "noise_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.npy",
    help="Take the noise from here: one [C, H, W] of unit variance an image, float32.",
)
@how_option("--num-steps", type=click.IntRange(1, 1000), help="Network steps an image; the model knows its default.")
@how_option("--guidance-scale", type=click.FloatRange(min=0), help="1 or less: none; the model knows its default.")
@how_option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The networks' precision.",
)
@how_option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="N",
    help="Images at a time: fewer take less memory.",
)
@how_option(
    "--no-safety-checker",
    "safety_checker",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Leave out a model's safety checker, which else blackens what it takes for unsafe.",
)
@made_of_it(
    "--output",
    metavar="PLACE",
    help="An image file: all on one sheet, by default grid.png. A place that ends in a slash: a folder of images.",
)
@made_of_it("--captions", is_flag=True, help="Write seed and prompt below each image of a sheet.")
@made_of_it(
    "--between",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="N more on the way from each seed to the next or, with one seed, from prompt to prompt.",
)
@made_of_it(
    "--animate",
    is_flag=True,
    help="The way from noise to image, a frame a step: a .gif, .webp or .png, by default steps.gif.",
)
@made_of_it(
    "--shard-size",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="Pack a folder's images into tars of N: a webdataset.",
)
@made_of_it(
    "--worker-index",
    type=click.IntRange(min=0),
    metavar="I",
    help="Draw only worker I's share of a folder, from 0; Slurm's and Kubernetes' variables fill it in.",
)
@made_of_it("--worker-count", type=click.IntRange(min=1), metavar="N", help="How many workers fill the folder.")
@made_of_it(
    "--latents-out",
    "latents_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.npy",
    help="Write the scaled latents of a sheet before decoding.",
)
def sample(**options: Any) -> None:
    """Make images with a teacher, a flow or a student.

    MODEL is a model folder of a run, or any Stable Diffusion (1, 2 or XL): a folder, a hub name or a .safetensors file.
    Several models draw from the same noise, a row each. A PNG tells how it was made (`instaflow show grid.png`); a
    folder's images go on where a command was stopped.

    \b
        M=runs/digits/student/model
        instaflow sample $M --prompt "a handwritten seven" --prompt "an odd one"
        instaflow sample $M --prompts prompts.txt --seeds 0-3 --captions
        instaflow sample $M --prompt "a seven" --seeds 3,8 --between 6
        instaflow sample runs/digits/{2rf,student}/model --prompt "a 7" --animate
        instaflow sample $M --prompts prompts.txt --output out/ --shard-size 1000
    """
    from pipelines.sample_request import Request, wanted_by

    request = Request(**options)
    wanted = wanted_by(request)
    from pipelines.sample import run as run_sample

    click.echo(run_sample(request, wanted))


@cli.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to be reached at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: one that is free, as printed."
)
@click.option(
    "--token",
    help="What those who ask must know. At an address that other machines reach there is always one, by default a new.",
)
@click.option(
    "--no-safety-checker",
    is_flag=True,
    help="Leave out the models' safety checkers, which else blacken what they take for unsafe.",
)
def serve(models: tuple[str, ...], host: str, port: int, token: str | None, no_safety_checker: bool) -> None:
    """Draw on a local page, as you type.

    Each MODEL is what `instaflow sample` takes. They stand side by side with their times: a student, say, beside its
    teacher. Seeds, steps, guidance, the way from one noise to another; programs ask the same in JSON (docs/serve.md).

    Only this machine reaches the page. Another --host wants a token, which is part of the address that is printed; what
    is sent is not encrypted. Ctrl-C or SIGTERM end it, with exit code 0.

    \b
        instaflow serve runs/digits/student/model runs/digits/teacher/model
    """
    from pipelines.serve import run as run_serve

    run_serve(models, host=host, port=port, token=token, safety_checker=not no_safety_checker)
    sys.stdout.flush()
    os._exit(0)  # at once: nothing is left to be written, and a step of a drawing may be under way that none waits for


@cli.command()
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["diffusers", "instaflow", "single-file", "onnx", "lora", "delta"]),
    required=True,
    help="The form.",
)
@click.option("--teacher", metavar="PLACE", help="The model it began with, if its run does not tell.")
@click.option(
    "--lock-guidance/--no-lock-guidance",
    default=None,
    help="Of --to diffusers: skip guidance for a student (the default). ControlNetModel.from_unet refuses it then.",
)
@click.option("--rank", type=click.IntRange(1), help="Of the LoRA.  [default: 64]")
@click.option(
    "--add",
    metavar="PLACE",
    help="Add a delta, or the difference of a fine-tuned model to the teacher, to MODEL before.",
)
@click.option("--strength", type=float, help="So many times is that added.  [default: 1.0]")
def export(
    model: str,
    output: Path,
    to: str,
    teacher: str | None,
    lock_guidance: bool | None,
    rank: int | None,
    add: str | None,
    strength: float | None,
) -> None:
    """Write a model in another form, for other programs.

    MODEL is what `instaflow sample` takes; OUTPUT is a folder, made with a model card: teacher, data, cost, figures
    with their protocol, licence. The forms:

    \b
        diffusers    a pipeline of stock diffusers, with the teacher's safety checker
        instaflow    for InstaFlow's own pipeline: its sign, its timesteps
        single-file  one .safetensors under Stable Diffusion's original names, and its configuration beside it
        onnx         graphs for onnxruntime, which have to agree with PyTorch (pip install onnx onnxruntime onnxscript)
        lora         the difference to the teacher as a LoRA, with what its rank leaves out
        delta        the difference itself

    Models that InstaFlow released are read as any other, by name or folder.

    \b
        instaflow export runs/digits/student/model digits-student --to diffusers
        instaflow export XCLiu/instaflow_0_9B_from_sd_1_5 instaflow --to diffusers
        instaflow export runs/mine/student/model styled --to diffusers --add Lykon/dreamshaper-7
    """
    from pipelines.export import run as run_export

    for line in run_export(
        model, output, to, teacher=teacher, lock=lock_guidance, rank=rank, added=add, strength=strength
    ):
        click.echo(line)


@cli.command()
@click.argument("folder", metavar="MODEL|PNG", type=click.Path(path_type=Path))
def show(folder: Path) -> None:
    """Tell what a model is and where it comes from.

    The stages from the teacher to it, with couplings, phases, hashes and seconds; the figures of reports that measured
    it, with their protocol. Reads files alone: of a run, or of an exported folder. Of a PNG that `instaflow sample`
    made, the model, the prompts and seeds, steps and guidance.

    \b
        instaflow show runs/digits/student/model
        instaflow show grid.png
    """
    from pipelines.show import run as run_show

    click.echo(run_show(folder))


@cli.command("import-edm")
@click.argument("state", metavar="STATE.safetensors", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--class-names",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The classes' names, one a line: then a prompt may be a name, where else it is a class's number.",
)
def import_edm(state: Path, folder: Path, class_names: Path | None) -> None:
    """Make a model's folder of an ADM network of EDM's, such as that of ImageNet-64.

    The folder is a teacher as any other, with pixels for latents and a class for a prompt. EDM gives its networks out
    as pickles that hold code, which this toolkit opens none of. Where you trust them, in a checkout of EDM's code:

    \b
        import pickle
        from safetensors.torch import save_file
        net = pickle.load(open("edm-imagenet-64x64-cond-adm.pkl", "rb"))["ema"]
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, "adm.safetensors")

    Its DDPM++ and NCSN++ networks are refused: no UNet2DModel computes what they do. The network must have been trained
    with EDM's own preconditioning (train.py's --precond=edm, which is its default; sigma_data 0.5): one of VP or VE has
    a state dict of the same names and shapes, can't be told apart, and would be read wrongly.

    \b
        mkdir -p teachers
        instaflow import-edm adm.safetensors teachers/imagenet64
    """
    from pipelines.import_edm import run as run_import

    click.echo(run_import(state, folder, class_names))


@cli.command("import-pickle")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def import_pickle(model: Path, output: Path) -> None:
    """Take the tensors out of a .ckpt, or of a folder's .bin files, as .safetensors.

    Such files are pickles, which can run code as they are loaded; no other command opens one. This one reads them by
    PyTorch's reader of plain tensors, which runs nothing, and refuses a file that holds more.

    \b
        instaflow import-pickle v1-5-pruned.ckpt v1-5-pruned.safetensors
        instaflow import-pickle old-model/ new-model/
    """
    from pipelines.import_pickle import run as run_import

    click.echo(run_import(model, output))


@cli.command()
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="The first one.")
@click.option(
    "--seeds", type=click.IntRange(1, 64), default=8, show_default=True, metavar="N", help="How many, side by side."
)
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default="runs/toy",
    show_default=True,
    help="Where toy.png, toy.html and toy.json go.",
)
def toy(seed: int, seeds: int, output: Path) -> None:
    """Show on five modes in the plane what distribution matching and reflow do.

    A one-step generator is trained as DMD trains one: by the real score alone, with a fake score, and with regression.
    The first collapses to a mode, the second misses one, the third finds all. Beside it, reflow of the same mixture:
    its paths before and after, and one step. Takes about a minute of one core, and needs no GPU.

    \b
        instaflow toy --output runs/toy
    """
    from pipelines.toy import run as run_toy

    for line in run_toy(seed=seed, seeds=seeds, output=output):
        click.echo(line)


def couplings_options(command: Callable[..., None]) -> Callable[..., None]:
    """DIR and --workers of the commands that read all shards of a couple stage."""
    options = [
        click.argument("folder", metavar="DIR", type=click.Path(path_type=Path)),
        click.option(
            "--workers",
            metavar="N",
            type=click.IntRange(min=1),
            help="Processes that read, each with a shard in memory; by default one for each core.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@couplings_options
def verify(folder: Path, workers: int | None) -> None:
    """Read every shard of a couple stage, and tell each fault with its file.

    Against its sidecar (count, index range, hash), the manifest (shapes, the noise of this seed, stage and index,
    optional fields), the prompts, and what noise and latents must be: N(0, 1), unique in the whole set, finite, neither
    constant nor far off in deviation. Noise that was found by inversion need only be finite, near N(0, 1) in deviation,
    and of one image alone.

    Exit codes: 0 all sound, 1 faults, 75 no faults, but the stage is not done.

    \b
        instaflow verify runs/digits/pairs
    """
    from instaflow.couplings.manifest import read_manifest
    from instaflow.couplings.shards import read_sidecar, shards_to_make
    from instaflow.couplings.verify import is_unfinished
    from instaflow.couplings.verify import verify as check
    from instaflow.interruption import listening
    from instaflow.parallel import cores
    from instaflow.plurals import counted
    from instaflow.progress import Progress

    plan = read_manifest(folder).plan
    to_make = shards_to_make(folder, plan) if is_unfinished(folder) else []
    total = plan.count - sum(len(plan.indices(shard)) for shard in to_make)
    with Progress("verify", total=total, unit="couplings") as progress, listening() as stop:
        problems = check(folder, workers=workers or cores(), stop=stop, progress=progress.update)
    for problem in problems:
        click.echo(str(problem), err=True)
    if any(not problem.stray for problem in problems):
        if any(problem.shard is not None for problem in problems):
            click.echo(f"Hint: instaflow repair {shlex.quote(str(folder))} makes the bad shards again", err=True)
        sys.exit(1)
    made = sorted({*range(plan.num_shards)} - {*to_make})
    couplings = sum(read_sidecar(folder, shard, plan).count for shard in made)
    shards = counted(plan.num_shards, "shard")
    if to_make:
        click.echo(f"{folder}: not done; {len(made)} of {shards}, {counted(couplings, 'coupling')}, all sound")
        sys.exit(75)
    click.echo(f"{folder}: {shards}, {counted(couplings, 'coupling')}, all sound")


@cli.command()
@couplings_options
@click.option("--model", metavar="PLACE", help="Where the model is, if no longer where the stage found it.")
def repair(folder: Path, workers: int | None, model: str | None) -> None:
    """Make exactly the bad or missing shards again.

    Needs the stage's folder, and the very model that made it. Shards that a stage in the making has not come to are
    left to it (exit code 75).

    \b
        instaflow repair runs/digits/pairs
    """
    from instaflow.couplings.manifest import read_manifest
    from instaflow.couplings.shards import shards_to_make
    from instaflow.parallel import cores
    from instaflow.plurals import counted
    from pipelines.couple import repair as make_again

    shards = make_again(folder, model=model, workers=workers or cores())
    numbers = ", ".join(f"{shard:05d}" for shard in shards)
    click.echo(f"{folder}: made {numbers} again" if shards else f"{folder}: nothing to repair")
    if to_make := shards_to_make(folder, read_manifest(folder).plan):
        left = counted(len(to_make), "shard")
        click.echo(f"{folder}: {left} not made yet, which the stage's `instaflow couple` command makes")
        sys.exit(75)


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(1, 300), default=12, show_default=True, help="Pairs on the sheet.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="pairs.png",
    show_default=True,
    help="The contact sheet.",
)
@click.option("--model", metavar="PLACE", help="Where the model is, if no longer where the stage found it.")
def inspect(folder: Path, count: int, output: Path, model: str | None) -> None:
    """Tell what a couple stage holds, and draw some of its pairs.

    What made it, how much of it is there, its size and rate; and a contact sheet of noises and images, decoded by the
    VAE of the model that made them, or as the shards keep them.

    \b
        instaflow inspect runs/digits/pairs
    """
    from instaflow.couplings.description import describe
    from instaflow.couplings.manifest import read_manifest

    for line in describe(folder, read_manifest(folder)):
        click.echo(line)
    click.echo()
    from pipelines.inspect import draw_sheet

    click.echo(draw_sheet(folder, output, count=count, model=model))


@cli.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--fetch", is_flag=True, help="Download those that are named and not here.")
@click.option("--json", "as_json", is_flag=True, help="Tell it as JSON, for scripts.")
def weights(names: tuple[str, ...], fetch: bool, as_json: bool) -> None:
    """List the files of weights that metrics and losses measure by.

    For what, from where, how large, by which hash they are known, and whether they are here: in $INSTAFLOW_WEIGHTS
    (by default instaflow/weights in the user's cache), or where torch.hub and the Hugging Face hub keep them. With a
    file in place nothing asks a network; without --fetch nothing does anyway.

    Exit codes: 0, or 1 if a file is damaged, or one that was named is missing.

    \b
        instaflow weights
        instaflow weights inception lpips-alex --fetch
    """
    from instaflow import weights as files

    chosen = files.named(names)
    if fetch and not names:
        raise click.UsageError("--fetch wants to know which: " + ", ".join(files.WEIGHTS))
    for one in chosen if fetch else ():
        if files.look_for(one).state != "present":
            from instaflow.progress import Progress

            with Progress(one.name, total=one.megabytes, unit="MB", quiet=as_json) as progress:
                files.fetch(one, progress.update)
    found = [files.look_for(one) for one in chosen]
    if as_json:
        import json

        click.echo(json.dumps([files.entry(one) for one in found], indent=2))
    else:
        click.echo("\n\n".join(map(files.told, found)))
    if any(one.state == "wrong" or (names and one.state == "missing") for one in found):
        sys.exit(1)


def main() -> None:
    """Run the command and end with its exit code."""
    if any(os.environ.get(name, "1") != "1" for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")):  # torchrun's, DeepSpeed's
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several processes share the cores: don't spin
    code, among_others = 0, False
    try:
        command()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    finally:
        if "torch" in sys.modules:
            from instaflow.world import leave as disconnect

            among_others = disconnect()
    if among_others:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of torch's have aborted a process of several in the interpreter's own end
    sys.exit(code)


def command() -> None:
    """Run the command; turn what the user can mend into `Error:` and `Hint:`."""
    from instaflow.errors import InstaFlowError, of_the_system

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        cli(prog_name="instaflow", standalone_mode=False)
    except InstaFlowError as error:
        leave(error.message, error.hint, error.exit_code)
    except click.exceptions.Abort:
        leave("at once; what is finished is kept", "The same command goes on from there", 75)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if (mendable := of_the_system(error)) is None:
            raise
        leave(mendable.message, mendable.hint, mendable.exit_code)


def leave(message: str, hint: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0" or code != 75:
        click.echo(f"{'Stopped' if code == 75 else 'Error'}: {message}", err=True)
        if hint:
            click.echo(f"Hint: {hint}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
