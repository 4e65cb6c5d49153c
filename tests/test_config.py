import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from instaflow.config import apply_override, load_experiment
from instaflow.dialect import parse_yaml
from instaflow.errors import ConfigError, DataError
from instaflow.methods import DistillStage, ProgressiveStage
from instaflow.sections import PromptSource
from tests.experiments import HALVED, PHASE, SMALL, write

CONFIGS = Path(__file__).parents[1] / "configs"
HUB = "kind: couple, model: some-one/some.model_1"


def refusal(folder: Path, text: str, *overrides: str) -> ConfigError:
    """The error that an experiment file with this text is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(folder, text), overrides)
    return caught.value


def couple(**settings: str) -> str:
    """An experiment of one couple stage; settings as YAML text."""
    stage = {"prompts": "[a]", "count": "8", "guidance_scale": "1.5"} | settings
    return f"run: r\nstages:\n  pairs: {{{HUB}, {', '.join(f'{key}: {value}' for key, value in stage.items())}}}\n"


# --- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["", "a\0b", "\udcff"])
def test_a_run_folder_that_no_system_takes_is_refused(tmp_path, run):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    with pytest.raises(ConfigError, match="'run'"):
        load_experiment(str(path), run=run)


@pytest.mark.parametrize("seed", ["-1", "true", "1.5", str(2**63)])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, seed):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    with pytest.raises(ConfigError, match="'seed' must be a whole number from 0 to"):
        load_experiment(str(path), [f"seed={seed}"])


def test_a_change_of_one_stage_leaves_another_that_shares_its_lines():
    tree = parse_yaml("{stages: {a: {phases: &p [{samples: 1}]}, b: {phases: *p}}}", "here")
    apply_override(tree, "stages.a.phases.0.samples=2")
    assert tree == {"stages": {"a": {"phases": [{"samples": 2}]}, "b": {"phases": [{"samples": 1}]}}}


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.lstrip().encode())
    assert load_experiment(str(path)).run == "runs/small"


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml' is not UTF-8 text \(byte 8\)"):
        load_experiment(str(path))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "[run, seed]", "run", "5"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert "is not an experiment: a mapping with 'run'" in refusal(tmp_path, text).message


# --- the top of the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {}", "'run' is missing"),
        ("run: ''\nstages: {}", "'run' is missing"),
        ("run: 2024\nstages: {}", "'run' must be text, not 2024"),
        ("run: r", "'stages' is missing"),
        ("run: r\nstages: {}", "'stages' is missing or empty"),
        ("run: r\nstages: [a]", "'stages' is missing or empty"),
        ("run: r\nseed: -1\nstages: {}", "'seed' must be a whole number from 0 to 2^63 - 1, not -1"),
        ("run: r\nseed: true\nstages: {}", "not True"),
        ("run: r\nseed: 1.0\nstages: {}", "not 1.0"),
        ("run: r\nseed: '1'\nstages: {}", "not '1'"),
        ("run: r\nseed:\nstages: {}", "'seed' is empty"),
        ("run: r\nstages: {a: 5}", "'stages.a' is 5, and must be a mapping of settings"),
        ("run: r\nstages: {a: }", "'stages.a' is empty: it must be a mapping of settings"),
        ("run: r\nstages: {a: {kind: distill, method: }}", "'stages.a': 'method' is empty"),
        ("run: r\nstages: {a: {}}", "'stages.a': 'kind' is missing"),
        ("run: r\nstages: {a: {kind: [couple]}}", "'stages.a': no such kind: ['couple']"),
        ("run: r\nstages: {a/b: {kind: couple}}", "'stages.a/b': a stage's name is"),
        ("run: r\nstages: {..: {kind: couple}}", "'stages...': a stage's name is"),
        ("run: r\nstages: {-a: {kind: couple}}", "'stages.-a': a stage's name is"),
        ("run: r\nstages: {'': {kind: couple}}", "a stage's name is"),
        ("run: r\nstages: {sieben七: {kind: couple}}", "a stage's name is"),
    ],
)
def test_what_is_wrong_at_the_top_is_named(tmp_path, text, words):
    assert words in refusal(tmp_path, text).message


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("run: r\nsede: 1", "has no setting 'sede'", "Did you mean 'seed'?"),
        ("run: r\nstages: {a: {kind: reflwo}}", "no such kind: 'reflwo'", "Did you mean 'reflow'?"),
        ("run: r\nstages: {a: {kind: train}}", "no such kind: 'train'", "Known: teacher, couple, "),
        (couple(cuont="1"), "'stages.pairs' has no setting 'cuont'", "Did you mean 'count'?"),
        (couple(zzz="1"), "'stages.pairs' has no setting 'zzz'", "Known: kind, model, prompts, "),
        (
            SMALL.replace("autoencoder_phases: [{", "autoencoder_phases: [{smaples: 1, "),
            "'stages.teacher.autoencoder_phases.0' has no setting 'smaples'",
            "Did you mean 'samples'?",
        ),
        (
            SMALL.replace("student, num_steps", "student, num_step"),
            "'stages.report.models.1'",
            "Did you mean 'num_steps'",
        ),
        (SMALL.replace("teacher, num_steps: 25", "teacher, numsteps: 25"), "'stages.report.reference'", "'num_steps'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path, text, message, hint):
    error = refusal(tmp_path, text)
    assert message in error.message
    assert hint in error.hint


def test_the_unknown_key_of_a_second_phase_is_found(tmp_path):
    phases = f"[{PHASE}, {PHASE.replace('learning_rate', 'learnign_rate')}]"
    error = refusal(tmp_path, SMALL.replace(f"[{PHASE}, {PHASE}]", phases))
    assert error.message == "'stages.2rf.phases.1' has no setting 'learnign_rate'"
    assert error.hint == "Did you mean 'learning_rate'?"


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_no_stage_may_share_the_noise_of_evaluation_or_sampling(tmp_path, name):
    error = refusal(tmp_path, couple().replace("pairs:", f"{name}:"))
    assert f"'stages.{name}': no stage may be called '{name}'" in error.message
    assert error.hint.startswith("Call it, say, ")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "received"),
    [
        ("count", "'64'", "'64'"),
        ("count", "64.0", "64.0"),
        ("count", "6.4e1", "64.0"),
        ("count", "true", "True"),
        ("count", "-1", "-1"),
        ("count", "0", "0"),
        ("count", "[8]", "[8]"),
        ("count", "012", "'012'"),
        ("guidance_scale", "'1.5'", "'1.5'"),
        ("guidance_scale", "true", "True"),
        ("guidance_scale", "-0.5", "-0.5"),
        ("guidance_scale", ".inf", "'.inf'"),
        ("guidance_scale", "1e400", "inf"),
        ("dtype", "fp16", "'fp16'"),
        ("dtype", "16", "16"),
        ("timestep_spacing", "uniform", "'uniform'"),
        ("sampler", "karras", "'karras'"),
        ("prompts", "5", "5"),
        ("prompts", "[]", "[]"),
        ("prompts.path", "{path: 5}", "5 (put it in quotes)"),
        ("prompts.path", "{path: ''}", "''"),
        ("prompts.max_length", "{path: a.txt, max_length: 0}", "0"),
        ("prompts.min_score", "{path: a.csv, score_column: s, min_score: high}", "'high'"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(tmp_path, key, value, received):
    message = refusal(tmp_path, couple(**{key.partition(".")[0]: value})).message
    assert message.startswith((f"'stages.pairs.{key}' should be ", f"'stages.pairs.{key}' should have "))
    assert f", not {received}" in message


@pytest.mark.parametrize(
    "name",
    ["euler-ancestral", "euler_a", "EulerAncestralDiscreteScheduler", "sde-dpmsolver++", "DPM++ 2M SDE", "lcm", "ddpm"],
)
def test_a_sampler_that_draws_noise_is_refused_with_the_reason(tmp_path, name):
    message = refusal(tmp_path, couple(sampler=name)).message
    assert message.startswith(f"'stages.pairs.sampler': '{name}' draws new noise at each step")
    assert "from its own noise alone" in message and "heun" in message


@pytest.mark.parametrize("name", ["dpm-solver++", "ddim", "pndm", "heun", "unipc", "euler"])
def test_deterministic_samplers_serve(tmp_path, name):
    load_experiment(write(tmp_path, couple(sampler=name)))


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_samplers_of_equal_strides_must_reach_the_data(tmp_path, name):
    assert "divisor of 1000" in refusal(tmp_path, couple(sampler=name, num_steps="30")).message
    assert "linspace" in refusal(tmp_path, couple(sampler=name, timestep_spacing="linspace")).message
    load_experiment(write(tmp_path, couple(sampler=name, num_steps="30", timestep_spacing="leading")))


def test_every_wrong_value_of_a_stage_is_named_at_once(tmp_path):
    message = refusal(tmp_path, couple(count="-1", batch_size="x")).message
    assert [line.split("'")[1] for line in message.splitlines()] == ["stages.pairs.count", "stages.pairs.batch_size"]


def test_a_missing_key_is_named(tmp_path):
    text = couple().replace(", count: 8", "")
    assert refusal(tmp_path, text).message == "'stages.pairs.count' is missing"


def test_a_wrong_item_of_a_list_is_named(tmp_path):
    message = refusal(tmp_path, couple(prompts="[a, 7, b]")).message
    assert message == "'stages.pairs.prompts.1' should be a valid string, not 7 (put it in quotes)"


def test_a_wrong_value_in_a_phase_is_named(tmp_path):
    message = refusal(tmp_path, SMALL, "stages.2rf.phases.1.learning_rate=-1e-3").message
    assert message == "'stages.2rf.phases.1.learning_rate' should be greater than 0, not -0.001"


def test_whole_numbers_serve_as_fractions_but_not_the_other_way(tmp_path):
    stage = load_experiment(write(tmp_path, couple(guidance_scale="2"))).stages["pairs"]
    assert stage.guidance_scale == 2.0
    assert type(stage.guidance_scale) is float


def test_prompts_that_yaml_1_1_would_change_stay_prompts(tmp_path):
    stage = load_experiment(write(tmp_path, couple(prompts="[yes, 'no', 2024-01-31, 012, '', \"7\"]"))).stages["pairs"]
    assert stage.prompts == ["yes", "no", "2024-01-31", "012", "", "7"]


def aim(keys: str) -> str:
    return f"stages.report.aims=[{{{keys}}}]"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.2rf.phases.0.samples=3", "'stages.2rf.phases.0': samples (3) is less than one global_batch_size (4)"),
        ("stages.2rf.phases=[]", "'stages.2rf.phases' should have at least 1 item, not []"),
        ("stages.2rf.ema_decay=1", "'stages.2rf.ema_decay' should be less than 1, not 1"),
        ("stages.2rf.offload_optimizer=true", "'stages.2rf': offload_optimizer goes with zero_stage 1, 2 or 3"),
        ("stages.2rf.zero_stage=4", "'stages.2rf.zero_stage' should be 0, 1, 2 or 3, not 4"),
        ("stages.report.reference.num_steps=8", "'teacher' at 8 steps is not among the models"),
        (
            aim("model: direct, num_steps: 1, figure: prompt_accuracy, value: 1"),
            "aims.0.model: 'direct' at 1 step is not",
        ),
        (
            aim("model: student, num_steps: 4, figure: prompt_accuracy, value: 1"),
            "aims.0.model: 'student' at 4 steps is",
        ),
        (aim("model: student, figure: prompt_accuracy, better_than: direct"), "aims.0.better_than: 'direct' at 1 step"),
        (aim("model: student, figure: prompt_accuracy, better_than: student"), "cannot be better than itself"),
        (aim("model: student, figure: prompt_accuracy"), "an aim has one of value, times_reference and better_than"),
        (aim("model: student, figure: prompt_accuracy, value: 1, times_reference: 1"), "an aim has one of value"),
        (aim("model: student, figure: frechet_distance_teacher, times_reference: 1"), "the reference's own"),
        (aim("model: student, figure: clip_score, value: 1"), "aims.0.figure: no clip_score is measured here"),
        (aim("model: student, figure: fid, value: 1"), "'stages.report.aims.0.figure' should be"),
        ("stages.report.models.1.model=teacher", "models: 'teacher' stands 2 times with the same weights"),
        (
            "stages.report.models.0.weights=raw",
            "reference: 'teacher' at 25 steps is not among the models with its moving average (weights: ema)",
        ),
        ("stages.2rf.preview={grid: 12, images: 8}", "'stages.2rf.preview': grid (12) is more than the images (8)"),
        ("stages.report.num_samples=1", "greater than or equal to 4, not 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, override, words):
    assert words in refusal(tmp_path, SMALL, override).message


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("{}", "'stages.pairs.keep': names nothing to keep; name images, embeddings or trajectory"),
        ("{embeddings: false}", "'stages.pairs.keep': names nothing to keep"),
        ("{image: {every: 5}}", "'stages.pairs.keep' has no setting 'image'"),
        ("{images: {}}", "'stages.pairs.keep.images.every' is missing"),
        ("{images: {every: 0}}", "'stages.pairs.keep.images.every' should be greater than 0, not 0"),
        ("{images: {every: 5, format: jpg}}", "should be 'webp' or 'png', not 'jpg'"),
        ("{trajectory: [0.5, 0.25]}", "the times must rise, and [0.5, 0.25] do not"),
        ("{trajectory: [0.5, 0.5]}", "the times must rise"),
        ("{trajectory: [0.5, 1]}", "'stages.pairs.keep.trajectory.1' should be less than 1, not 1"),
        ("{trajectory: [0]}", "should be greater than 0, not 0"),
        ("{trajectory: []}", "should have at least 1 item, not []"),
    ],
)
def test_what_is_to_be_kept_is_checked(tmp_path, keep, words):
    assert words in refusal(tmp_path, couple(keep=keep)).message


def test_nothing_besides_pairs_is_kept_unless_asked(tmp_path):
    assert load_experiment(write(tmp_path)).stages["pairs"].keep is None
    keep = load_experiment(write(tmp_path, couple(keep="{images: {every: 5}, trajectory: [0.5]}"))).stages["pairs"].keep
    assert (keep.images.every, keep.images.format, keep.embeddings, keep.trajectory) == (5, "webp", False, [0.5])


def test_the_paper_s_sign_needs_a_velocity(tmp_path):
    overrides = ["stages.2rf.parametrization=epsilon", "stages.2rf.negate_output_at_start=true"]
    assert "'stages.2rf': negate_output_at_start goes with" in refusal(tmp_path, SMALL, *overrides).message
    load_experiment(write(tmp_path), ["stages.2rf.parametrization=velocity", overrides[1]])


# --- --set ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda found: found.seed == 7),
        ("run=runs/other", lambda found: found.run == "runs/other"),
        ("stages.2rf.phases.1.samples=64", lambda found: [p.samples for p in found.stages["2rf"].phases] == [8, 64]),
        ("stages.2rf.ema_decay=0.5", lambda found: found.stages["2rf"].ema_decay == 0.5),  # a key not in the file
        (f"stages.2rf.phases=[{PHASE}]", lambda found: len(found.stages["2rf"].phases) == 1),
        ("stages.pairs.prompts=[x, 'y']", lambda found: found.stages["pairs"].prompts == ["x", "y"]),
        ("stages.pairs.prompts.1=a=b", lambda found: found.stages["pairs"].prompts == ["a seven", "a=b"]),
        ("stages.pairs.prompts.0=no", lambda found: found.stages["pairs"].prompts[0] == "no"),
        ("stages.pairs.prompts.0='7'", lambda found: found.stages["pairs"].prompts[0] == "7"),
        (
            "stages.report.models.1={model: teacher, weights: raw, num_steps: [1]}",
            lambda found: [entry.weights for entry in found.stages["report"].models] == ["ema", "raw"],
        ),
        ("stages.2rf.preview=null", lambda found: found.stages["2rf"].preview is None),
        ("stages.2rf.preview={every: 9}", lambda found: found.stages["2rf"].preview.every == 9),
        ("stages.2rf.micro_batch_size=null", lambda found: found.stages["2rf"].micro_batch_size is None),
        ("stages.report.models.0.num_steps=[25]", lambda found: found.stages["report"].models[0].num_steps == [25]),
        (f"stages.new={{{HUB}, prompts: [a], count: 1, guidance_scale: 1}}", lambda found: "new" in found.stages),
    ],
)
def test_set_changes_one_value(tmp_path, override, read):
    assert not read(replace(load_experiment(write(tmp_path)), source="")) or "null" in override
    assert read(load_experiment(write(tmp_path), [override]))


@pytest.mark.parametrize(
    "key", ["stages.v1.5.count=64", f"stages.v1.5={{{HUB}, prompts: [a], count: 64, guidance_scale: 1}}"]
)
def test_set_finds_a_stage_with_a_dot_in_its_name(tmp_path, key):
    text = couple().replace("pairs:", "v1.5:")
    assert load_experiment(write(tmp_path, text), [key]).stages["v1.5"].count == 64


def test_the_last_set_wins_and_run_dir_beats_the_file(tmp_path):
    found = load_experiment(write(tmp_path), ["seed=1", "seed=2"], run="elsewhere")
    assert (found.seed, found.run) == (2, "elsewhere")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("seed", "--set 'seed' is not of the form a.b=c", "Example: --set "),
        ("=1", "--set '=1' is not of the form a.b=c", ""),
        ("stages.2fr.ema_decay=0.9", "'stages' has no '2fr'", "Did you mean '2rf'?"),
        ("stages.report.perceptual.a.b=3", "has no 'perceptual'", "--set 'stages.report.perceptual={a: {b: 3}}'"),
        ("stages.2rf.phases.2.samples=8", "'stages.2rf.phases' has items 0 to 1, not '2'", ""),
        ("stages.2rf.phases.-1.samples=8", "has items 0 to 1, not '-1'", ""),
        ("stages.2rf.phases.²=8", "has items 0 to 1, not '²'", ""),
        ("stages.2rf.phases.samples=8", "has items 0 to 1, not 'samples'", ""),
        ("stages.pairs.count.x=8", "'stages.pairs.count' is a single value and has nothing below it", ""),
        ("stages.2rf.ema_dekay=0.9", "'stages.2rf' has no setting 'ema_dekay'", "Did you mean 'ema_decay'?"),
        ("stages.2rf.phases=[1", "--set 'stages.2rf.phases=[1', line 1 is not valid YAML", ""),
        ("stages.pairs.count='64'", "'stages.pairs.count' should be a valid integer, not '64'", ""),
        ("stages.pairs.count=", "'stages.pairs.count' is empty: it should be a valid integer", ""),
    ],
)
def test_a_set_that_fits_nowhere_is_refused(tmp_path, override, message, hint):
    error = refusal(tmp_path, SMALL, override)
    assert message in error.message
    assert hint in error.hint


def test_a_set_below_an_empty_list_is_refused(tmp_path):
    error = refusal(tmp_path, SMALL, "stages.pairs.prompts=[]", "stages.pairs.prompts.0=a")
    assert "'stages.pairs.prompts' has no items, so no '0'" in error.message


# --- parents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("stages.2rf.init=teahcer", "'stages.2rf.init' names 'teahcer', which is no stage", "Did you mean 'teacher'?"),
        ("stages.2rf.couplings=some/where", "'stages.2rf.couplings' names 'some/where'", "Known: teacher, pairs, "),
        ("stages.2rf.couplings=teacher", "needs a stage that gives couplings, and 'teacher' gives none", "pairs"),
        ("stages.2rf.init=pairs", "needs a stage that gives a model, and 'pairs' gives none", "teacher, student"),
        ("stages.2rf.init=report", "needs a stage that gives a model, and 'report' gives none", "teacher, student"),
        ("stages.report.models.1.model=pairs", "'stages.report.models.1.model' needs a stage that gives a model", ""),
        ("stages.2rf.init=''", "'stages.2rf.init' is empty", ""),
        ("stages.2rf.init=/no/such/folder", "'stages.2rf.init' names '/no/such/folder'", ""),
        ("stages.2rf.init=2024", "should be a valid string, not 2024 (put it in quotes)", ""),
    ],
)
def test_a_parent_that_cannot_serve_is_refused(tmp_path, override, message, hint):
    error = refusal(tmp_path, SMALL, override)
    assert message in error.message
    assert hint in error.hint


ALEX = "stages.student.perceptual={network: alex, weights: alexnet.pth}"
LPIPS = "stages.student.phases.0.loss=lpips"
RECTIFIED = "stages.2rf.parametrization=rectified-diffusion"


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ([LPIPS], "'stages.student': loss: lpips needs a section 'perceptual' that says by which network", ""),
        ([ALEX], "'stages.student': perceptual goes with a phase of loss: lpips or lpips-huber", ""),
        ([LPIPS, "stages.student.perceptual={network: teacher, weights: a}"], "weights go with network: alex", ""),
        ([LPIPS, "stages.student.perceptual={network: 2rf}"], "needs a stage that gives a perceptual network", ""),
        (
            [LPIPS, "stages.student.perceptual={network: teacher}"],
            "and 'teacher' gives none",
            "'teacher' trains one where it has perceptual_phases",
        ),
        ([LPIPS, "stages.student.perceptual={network: elsewhere}"], "names 'elsewhere', which is no stage", ""),
        ([LPIPS, "stages.student.perceptual={netwrok: alex}"], "no setting 'netwrok'", "Did you mean 'network'?"),
        ([LPIPS, ALEX, "stages.student.perceptual.crop=0"], "'stages.student.perceptual.crop' should be greater", ""),
        (["stages.student.phases.0.loss=lpips-huber", ALEX], "a student has not; choose lpips", ""),
        (["stages.student.parametrization=rectified-diffusion"], "a student's loss is on its data anyhow", ""),
        ([RECTIFIED, "stages.2rf.time_density=u-shaped"], "draws its timesteps uniformly; leave out time_density", ""),
        ([RECTIFIED, "stages.2rf.negate_output_at_start=true"], "goes with parametrization: velocity", ""),
        (
            [RECTIFIED, "stages.2rf.phases.0.loss=lpips-huber", ALEX.replace("student", "2rf")],
            "with rectified-diffusion choose pseudo-huber or lpips",
            "",
        ),
        (["stages.student.phases.0.loss=l1"], "should be 'l2', 'pseudo-huber', 'lpips' or 'lpips-huber', not 'l1'", ""),
        (["stages.teacher.phases.0.loss=l2"], "'stages.teacher.phases.0' has no setting 'loss'", ""),
    ],
)
def test_losses_that_lack_something_are_refused(tmp_path, overrides, message, hint):
    error = refusal(tmp_path, SMALL, *overrides)
    assert message in error.message and hint in error.hint


def test_a_distill_stage_has_the_schema_of_its_method(tmp_path):
    stages = load_experiment(write(tmp_path, SMALL + HALVED)).stages
    assert (type(stages["student"]), stages["student"].method) == (DistillStage, "instaflow")
    assert type(stages["halved"]) is ProgressiveStage
    assert stages["halved"].parents() == {"init": "teacher", "couplings": "pairs"}
    assert [phase.num_steps for phase in stages["halved"].phases] == [2, 1]
    written = load_experiment(write(tmp_path, SMALL + HALVED)).resolved().partition("  halved:\n")[2]
    assert written.startswith("    kind: distill\n    method: progressive\n    init: teacher\n    couplings: pairs\n")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("method=progresive", "'stages.halved': no such method: 'progresive'", "Known: instaflow, progressive"),
        ("method=[1]", "'stages.halved': no such method: [1]", "Known: instaflow, progressive"),
        (
            "method=instaflow",
            "'stages.halved' has no setting 'guidance_scale'",
            "'guidance_scale' goes with method: progressive, method: dmd, kind: reflow",
        ),
        ("stacked=true", "has no setting 'stacked'", "'stacked' goes with method: instaflow, kind: reflow"),
        ("regression={}", "has no setting 'regression'", "'regression' goes with method: dmd"),
        ("phases.1.num_steps=2", "'stages.halved': phases: num_steps must halve from one phase to the next", ""),
        ("phases.0.num_steps=3", "say 8, 4, 2, 1, and [3, 1] do not", ""),
        ("phases.1.num_steps=0", "'stages.halved.phases.1.num_steps' should be greater than or equal to 1, not 0", ""),
        (
            "phases.0.loss=l2",
            "'stages.halved.phases.0' has no setting 'loss'",
            "'loss' goes with method: instaflow, kind",
        ),
        ("phases.0.gan_weight=1", "'stages.halved.phases.0' has no setting 'gan_weight'", "goes with method: dmd"),
        ("phases=[{num_steps: 512, samples: 8, global_batch_size: 4, learning_rate: 1e-3}]", "begin with 500", ""),
        ("parametrization=velocity", "'stages.halved' has no setting 'parametrization'", ""),
        ("preview=null", "'stages.halved' has no setting 'preview'", ""),
        (
            "num_steps=2",
            "'stages.halved' has no setting 'num_steps'",
            "'num_steps' belongs into 'stages.halved.phases'; 'num_steps' goes with method: dmd, kind: reflow",
        ),
        ("couplings=teacher", "'stages.halved.couplings' needs a stage that gives couplings", ""),
    ],
)
def test_what_progressive_distillation_does_not_know_is_refused(tmp_path, override, message, hint):
    error = refusal(tmp_path, SMALL + HALVED, f"stages.halved.{override}")
    assert message in error.message and hint in error.hint


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("student.fake={updates: 5}", "'fake' goes with method: dmd"),
        ("student.real={couplings: pairs, share: 0.5}", "'real' goes with kind: reflow"),
        ("student.prompts=[a]", "'prompts' goes with method: dmd"),
        ("teacher.classes=true", "'classes' goes with method: edm"),
        ("student.phasees=[]", "Did you mean 'phases'?"),
    ],
)
def test_a_setting_of_another_method_is_told_to_be_that(tmp_path, override, hint):
    assert refusal(tmp_path, SMALL, f"stages.{override}").hint == hint


def test_couplings_are_no_setting_of_distribution_matching(tmp_path):
    text = "  matched: {kind: distill, method: dmd, init: teacher, teacher: teacher, prompts: [a], couplings: pairs}\n"
    assert refusal(tmp_path, SMALL + text).hint == (
        "'couplings' belongs into 'stages.matched.regression'; "
        "'couplings' goes with method: instaflow, method: progressive, kind: reflow"
    )


MATCHED = f"""
  edm: {{kind: teacher, method: edm, data: digits, phases: [{PHASE}]}}
  direct: {{kind: distill, init: edm, couplings: pairs, parametrization: epsilon, phases: [{PHASE}]}}
  matched: {{kind: distill, method: dmd, init: direct, teacher: edm, prompts: ["0"], guidance_scale: 1,
            phases: [{PHASE}]}}
"""
TAUGHT = "Stages that can teach: teacher, 2rf, edm"


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("guidance_scale=2", "'stages.matched.guidance_scale': 'edm' is an EDM", "Write guidance_scale: 1"),
        ("num_steps=4", "'stages.matched.num_steps': 'direct' is an EDM", "Write num_steps: 1"),
        ("init=teachers/edm-imagenet-64x64-cond-adm", "-adm' is an EDM", "Write num_steps: 1"),
        ("teacher=student", "'stages.matched.teacher' names 'student', a student, which knows", TAUGHT),
        ("teacher=matched", "'stages.matched.teacher' names 'matched', a student", TAUGHT),
        ("teacher=pairs", "needs a stage that gives a model", "Stages that do: teacher, 2rf, edm"),
    ],
)
def test_what_a_teacher_cannot_give_to_a_matching_is_told_by_the_file(tmp_path, override, message, hint):
    changes = [override, *(["num_steps=2"] if override.startswith("init") else [])]
    error = refusal(tmp_path, SMALL + MATCHED, *(f"stages.matched.{change}" for change in changes))
    assert message in error.message and error.hint == hint


@pytest.mark.parametrize(
    ("key", "value", "example"),
    [
        ("matched.gan", True, "{real: ...}"),
        ("matched.regression", "pairs", "{couplings: ...}"),
        ("matched.fake", 5, "{updates: ...}"),
        ("matched.phases.0", 64, "{samples: ..., global_batch_size: ..., learning_rate: ...}"),
        ("2rf.preview", False, "{every: ...}"),
    ],
)
def test_a_section_that_is_none_is_told_with_how_one_is_written(tmp_path, key, value, example):
    message = refusal(tmp_path, SMALL + MATCHED, f"stages.{key}={str(value).lower()}").message
    assert message == f"'stages.{key}' must be a mapping of settings, such as {example}, not {value!r}"


def test_a_matching_of_another_teacher_may_be_guided(tmp_path):
    changes = [f"stages.matched.{change}" for change in ("init=2rf", "teacher=teacher", "guidance_scale=2")]
    assert load_experiment(write(tmp_path, SMALL + MATCHED), changes).stages["matched"].guidance_scale == 2


def test_a_halving_says_its_steps(tmp_path):
    assert (
        "'stages.halved.phases.0.num_steps' is missing"
        in refusal(tmp_path, SMALL + HALVED.replace("num_steps: 2, ", "")).message
    )
    assert (
        "compile goes with zero_stage 0, 1 or 2"
        in refusal(tmp_path, SMALL + HALVED, "stages.halved.compile=true", "stages.halved.zero_stage=3").message
    )


def test_lpips_needs_its_package_and_counts_its_files(tmp_path):
    student = load_experiment(write(tmp_path), [LPIPS, ALEX, "stages.student.perceptual.decoder=tiny"]).stages[
        "student"
    ]
    assert student.packages() == {"lpips": "perceptual.network: alex"}
    assert student.files() == {"perceptual.weights": "alexnet.pth", "perceptual.decoder": "tiny"}
    assert student.parents() == {"init": "2rf", "couplings": "pairs"}
    plain = load_experiment(write(tmp_path)).stages["student"]
    assert plain.packages() == plain.files() == {} and {phase.loss for phase in plain.phases} == {"l2"}
    folder = load_experiment(write(tmp_path), [LPIPS, f"stages.student.perceptual={{network: {tmp_path}}}"])
    assert folder.stages["student"].packages() == {}
    assert folder.stages["student"].parents()["perceptual.network"] == str(tmp_path)


def test_a_folder_serves_as_parent(tmp_path):
    overrides = [f"stages.2rf.init={tmp_path}", f"stages.2rf.couplings={tmp_path}"]
    found = load_experiment(write(tmp_path), overrides)
    assert found.stage_parents("2rf") == []
    assert found.stage_parents("student") == ["pairs", "2rf"]


def test_a_hub_name_serves_as_model_but_not_as_couplings(tmp_path):
    load_experiment(write(tmp_path), ["stages.2rf.init=some-one/some.model_1"])
    assert "no folder" in refusal(tmp_path, SMALL, "stages.2rf.couplings=some-one/some.model_1").message


def test_a_single_file_serves_as_model(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match="pickle"):
        (tmp_path / "model.ckpt").write_bytes(b"")
        load_experiment(write(tmp_path), [f"stages.2rf.init={tmp_path / 'model.ckpt'}"])
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"model_index\.json"):
        load_experiment(write(tmp_path), [f"stages.2rf.init={tmp_path / 'model.safetensors'}"])
    assert "no folder" in refusal(tmp_path, SMALL, "stages.2rf.init=models/gone.safetensors").message


@pytest.mark.parametrize("name", ["2rf", "1e3", "2024", "true", "v1.5", "null"])
def test_a_stage_may_bear_any_plain_name(tmp_path, name):
    text = SMALL.replace("  2rf:", f"  {name}:").replace("init: 2rf", f"init: '{name}'")
    found = load_experiment(write(tmp_path, text))
    assert found.stage_parents("student") == ["pairs", name]
    again = load_experiment(write(tmp_path, found.resolved(), "again.yaml"))
    assert again.stages == found.stages


def test_a_circle_is_printed(tmp_path):
    pairs2 = "  pairs2: {kind: couple, model: student, prompts: [a], count: 8, guidance_scale: 1}\n"
    error = refusal(tmp_path, SMALL + pairs2, "stages.2rf.couplings=pairs2")
    assert error.message == "The stages build on each other in a circle: 2rf → pairs2 → student → 2rf"


def test_a_stage_that_builds_on_itself_is_a_circle(tmp_path):
    error = refusal(tmp_path, SMALL, "stages.2rf.init=2rf")
    assert error.message == "The stages build on each other in a circle: 2rf → 2rf"


def test_the_order_follows_the_parents_whatever_the_file_s(tmp_path):
    tree = yaml.safe_load(load_experiment(write(tmp_path)).resolved())
    tree["stages"] = dict(reversed(tree["stages"].items()))
    turned = load_experiment(write(tmp_path, yaml.safe_dump(tree, sort_keys=False), "turned.yaml"))
    names = list(turned.stages)
    assert sorted(names) == sorted(load_experiment(write(tmp_path)).stages)
    for name in names:
        for parent in turned.stages[name].parents().values():
            assert names.index(parent) < names.index(name)


def test_stages_that_do_not_depend_on_each_other_keep_the_file_s_order(tmp_path):
    assert list(load_experiment(write(tmp_path)).stages) == ["teacher", "pairs", "2rf", "student", "report"]


# --- where the file and its prompts are -----------------------------------------------------------------------------


def test_a_packaged_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_experiment("digits")
    assert found.source == "digits"
    assert found.stages == load_experiment(str(CONFIGS / "digits.yaml")).stages


def test_a_folder_of_the_same_name_does_not_hide_a_packaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert "teacher" in load_experiment("digits").stages


@pytest.mark.parametrize(
    ("source", "words"), [("nowhere.yaml", "No experiment file 'nowhere.yaml'"), (".", "is a folder")]
)
def test_a_file_that_is_not_there_is_named(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_experiment(source)
    assert words in caught.value.message
    assert source == "." or "digits" in caught.value.hint


def test_a_relative_prompt_file_lies_beside_the_experiment(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", couple(prompts="texts/mine.txt"))
    monkeypatch.chdir(tmp_path)
    found = load_experiment("below/small.yaml").stages["pairs"]
    assert found.prompts == str(tmp_path / "below" / "texts" / "mine.txt")


def test_relative_prompts_with_a_column_lie_beside_the_experiment_too(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", couple(prompts="{path: 'laion/{00..99}.parquet', column: TEXT, deduplicate: true}"))
    monkeypatch.chdir(tmp_path)
    found = load_experiment("below/small.yaml")
    expected = PromptSource(path=f"{tmp_path}/below/laion/{{00..99}}.parquet", column="TEXT", deduplicate=True)
    assert found.stages["pairs"].prompts == expected
    again = load_experiment(write(tmp_path, found.resolved()))
    assert again.stages["pairs"].prompts == expected


@pytest.mark.parametrize("prompts", ["s3://bucket/p.txt", "{path: 's3://bucket/p.csv', column: caption}"])
def test_a_url_of_prompts_stays_as_it_is(tmp_path, prompts):
    found = load_experiment(write(tmp_path, couple(prompts=prompts))).stages["pairs"].prompts
    assert getattr(found, "path", found).startswith("s3://bucket/p.")


@pytest.mark.parametrize(
    ("prompts", "message", "hint"),
    [
        ("{a: b}", "'stages.pairs.prompts' has no setting 'a'", "Known: path, column, min_length, "),
        ("{column: b}", "'stages.pairs.prompts.path' is missing", ""),
        ("{path: a.csv, score_column: s}", "'stages.pairs.prompts': score_column and min_score go together", ""),
        ("{path: a, min_length: 9, max_length: 8}", "'stages.pairs.prompts': max_length (8) is less than min", ""),
    ],
)
def test_a_source_of_prompts_that_does_not_add_up_is_refused(tmp_path, prompts, message, hint):
    error = refusal(tmp_path, couple(prompts=prompts))
    assert error.message.startswith(message) and error.hint.startswith(hint)


def test_an_absolute_prompt_file_stays_where_it_is(tmp_path):
    assert load_experiment(write(tmp_path, couple(prompts="/data/p.txt"))).stages["pairs"].prompts == "/data/p.txt"


# --- the resolved experiment ----------------------------------------------------------------------------------------


def test_the_resolved_experiment_means_the_same_wherever_it_is_saved(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    text = SMALL.replace("[a seven, the digit 7]", "mine.txt").replace("learning_rate: 1e-3", "learning_rate: 1e-6")
    write(tmp_path / "first", text)
    monkeypatch.chdir(tmp_path)
    found = load_experiment("first/small.yaml", ["seed=3", "stages.2rf.weight_decay=1e-10"])
    monkeypatch.chdir(tmp_path / "second")
    again = load_experiment(write(tmp_path / "second", found.resolved()))
    assert (again.run, again.seed, again.stages) == (found.run, found.seed, found.stages)
    assert list(again.stages) == list(found.stages)
    assert again.resolved() == found.resolved()


@pytest.mark.parametrize(
    "prompt",
    ["1e-6", "1e3", "yes", "null", "012", "1:30", "2024-01-31", "", " a ", "a: b", "# c", "naïve 七", "a\nb", "- x"],
)
def test_a_prompt_survives_the_resolved_experiment(tmp_path, prompt):
    text = SMALL.replace("[a seven, the digit 7]", json.dumps([prompt]))  # JSON is YAML in quotes
    found = load_experiment(write(tmp_path, text))
    assert found.stages["pairs"].prompts == [prompt]
    assert load_experiment(write(tmp_path, found.resolved())).stages["pairs"].prompts == [prompt]


def test_the_resolved_experiment_spells_out_defaults_and_starts_with_the_kind(tmp_path):
    pairs = yaml.safe_load(load_experiment(write(tmp_path)).resolved())["stages"]["pairs"]
    assert list(pairs)[:2] == ["kind", "model"]
    assert pairs["records_per_shard"] == 1024
    assert pairs["dtype"] == "float32"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_resolves(path, tmp_path):
    found = load_experiment(str(path))
    assert load_experiment(write(tmp_path, found.resolved())).stages == found.stages
    for stage in found.stages.values():
        prompts = getattr(stage, "prompts", None)
        assert not isinstance(prompts, str) or Path(prompts).is_file()


def test_a_setting_of_a_phase_is_sent_there(tmp_path):
    with pytest.raises(ConfigError, match="has no setting 'learning_rate'") as caught:
        load_experiment(write(tmp_path), ["stages.2rf.learning_rate=1e-3"])
    assert caught.value.hint == "'learning_rate' belongs into 'stages.2rf.phases'"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/mnt/pairs", "'/mnt/pairs' is no URL; write s3://bucket/folder, or file:///folder"),
        ("s3:bucket", "is no URL"),
        ("s3://", "is no URL"),
        ("simplecache::s3://bucket/pairs", "is no URL"),
        ("s3://bucket/pairs::memory://", "a chain of URLs"),
        ("memory://pairs", "ends with the process"),
        ("file://pairs", "a relative path"),
        ("ftp://me:secret@host/pairs", "a password does not belong here; give it to fsspec"),
    ],
)
def test_an_output_that_is_no_place_to_write_to_is_refused(tmp_path, output, words):
    error = refusal(tmp_path, couple(output=f'"{output}"'))
    assert "output" in error.message and words in error.message and "secret" not in error.message + error.hint
    for good in "s3://bucket/sd15/pairs", "sftp://me@host:22/pairs", "file:///mnt/pairs":
        load_experiment(write(tmp_path, couple(output=f'"{good}"')))


def test_real_images_are_not_couplings_of_prompts(tmp_path):
    change = "stages.2rf.real={couplings: pairs, share: 0.5}"
    with pytest.raises(ConfigError, match="names 'pairs', which draws its images from prompts"):
        load_experiment(write(tmp_path, SMALL), [change])
