"""`instaflow export`: each form as the programs read it that it is for."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    OnnxStableDiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from instaflow.models import onnx_graphs
from instaflow.models.export import save_model
from instaflow.models.loading import load_model
from instaflow.models.samplers import flow_scheduler
from instaflow.provenance import Origin, Provenance, write_provenance
from pipelines import export
from tests.models.made import (
    load,
    noise,
    teacher_scheduler,
    write_checked,
    write_flow,
    write_model,
    write_published,
    write_xl_flow,
)

PROMPT = "the digit 7"


STUDENT = {"kind": "student", "parametrization": "velocity", "num_steps": 1, "guidance_scale": 1.0}


def write_student(folder):
    return write_model(folder, flow_scheduler("velocity", teacher_scheduler()), **STUDENT)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("export") / "student")


def exported(typed, model, folder, to, *options):
    code, out, err = typed("export", model, folder, "--to", to, *options)
    assert code == 0, err
    return out


def sampled(typed, model, folder):
    """The latents that `instaflow sample` makes of a model."""
    np.save(folder / "noise.npy", noise(1).numpy())
    words = ["--prompt", PROMPT, "--noise-in", folder / "noise.npy", "--latents-out", folder / "out.npy"]
    code, _, err = typed("sample", model, *words, "--output", folder / "out.png")
    assert code == 0, err
    return np.load(folder / "out.npy")


def stock(pipeline, guidance_scale, **more):
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "latents": noise(1), "output_type": "latent"}
    return pipeline(PROMPT, guidance_scale=guidance_scale, **(options | more)).images


def test_instaflow_and_back(typed, student, tmp_path):
    out = exported(typed, student, tmp_path / "out", "instaflow")
    assert out.splitlines()[0] == f"{tmp_path / 'out'}: for InstaFlow's RectifiedFlowPipeline"
    assert "RectifiedFlowPipeline" in (tmp_path / "out" / "model_index.json").read_text()
    back, before = sampled(typed, tmp_path / "out", tmp_path), sampled(typed, student, tmp_path)
    np.testing.assert_allclose(back, before, rtol=0, atol=1e-5)


def test_nothing_is_overwritten(typed, student, tmp_path):
    code, _, err = typed("export", student, student, "--to", "instaflow")
    assert code == 1 and "is there already" in err
    code, _, err = typed("export", student, tmp_path / "no" / "out", "--to", "instaflow")
    assert code == 1 and "does not exist" in err
    code, _, err = typed("export", write_flow(tmp_path / "other", "epsilon"), tmp_path / "out", "--to", "instaflow")
    assert code == 1 and "InstaFlow's convention" in err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_folder_that_was_made_meanwhile_is_left_alone(typed, student, tmp_path, monkeypatch):
    """Two exports to one place at once: the first to end stays, the other says so and takes its part along."""
    begun = export.write_released

    def slow(model, folder):
        begun(model, folder)
        (tmp_path / "out").mkdir()

    monkeypatch.setattr(export, "write_released", slow)
    (tmp_path / ".out.tmp-here-0-1").mkdir()  # left by one that was killed
    monkeypatch.setattr("instaflow.processes.Process.is_gone", lambda process: process.pid == 1)
    code, _, err = typed("export", student, tmp_path / "out", "--to", "instaflow")
    assert code == 1 and "has been made meanwhile" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "diffusers", "--rank", "8"), "--rank is a LoRA's"),
        (("--to", "diffusers", "--strength", "0.5"), "--strength goes with --add"),
        (("--to", "diffusers", "--add", "x", "--strength", "nan"), "--strength is nan"),
        (("--to", "onnx", "--lock-guidance"), "has no place for a lock"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(typed, student, tmp_path, options, message):
    code, _, err = typed("export", student, tmp_path / "out", *options)
    assert code == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_a_flow_with_guidance_is_not_locked(typed, tmp_path):
    flow = write_flow(tmp_path / "flow", "velocity")
    code, _, err = typed("export", flow, tmp_path / "out", "--to", "diffusers", "--lock-guidance")
    assert code == 1 and "is sampled with guidance 1.5" in err
    assert [path.name for path in tmp_path.iterdir()] == ["flow"]


def test_a_teacher_s_own_licence_goes_along(typed, tmp_path):
    teacher = write_checked(tmp_path / "teacher")
    exported(typed, teacher, tmp_path / "out", "diffusers")
    assert "\nlicense: openrail++\n" in (tmp_path / "out" / "README.md").read_text()


# --- diffusers --------------------------------------------------------------------------------------------------------


def test_stock_diffusers_skips_a_students_guidance(typed, student, tmp_path):
    plain = StableDiffusionPipeline.from_pretrained(student)
    right, ruined = stock(plain, 1.0), stock(plain, 7.5)
    assert (right - ruined).abs().max() > 0.1
    assert "whatever guidance_scale is passed" in exported(typed, student, tmp_path / "out", "diffusers")
    locked = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(stock(locked, 7.5), right)
    again = load(tmp_path / "out")
    assert again.unet.config.time_cond_proj_dim is None
    assert again.unet.state_dict().keys() == plain.unet.state_dict().keys()
    torch.testing.assert_close(again.sample(noise(1), [PROMPT]), right, rtol=0, atol=1e-5)
    exported(typed, student, tmp_path / "open", "diffusers", "--no-lock-guidance")
    assert torch.equal(stock(StableDiffusionPipeline.from_pretrained(tmp_path / "open"), 7.5), ruined)


def test_a_flows_guidance_is_left_alone(typed, tmp_path):
    flow = write_flow(tmp_path / "flow", "velocity")
    exported(typed, flow, tmp_path / "out", "diffusers")
    assert load(tmp_path / "out").settings.guidance_scale == 1.5
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["time_cond_proj_dim"] is None


def test_xl_is_locked_too(typed, tmp_path):
    flow = write_xl_flow(tmp_path / "xl", "velocity")
    settings = json.loads((flow / "instaflow.json").read_text())
    (flow / "instaflow.json").write_text(json.dumps(settings | {"kind": "student", "guidance_scale": 1.0}))
    exported(typed, flow, tmp_path / "out", "diffusers")
    plain, locked = (StableDiffusionXLPipeline.from_pretrained(place) for place in (flow, tmp_path / "out"))
    assert torch.equal(stock(locked, 7.5), stock(plain, 1.0))


def test_a_lora_does_to_the_locked_student_what_it_does_to_the_plain_one(typed, student, tmp_path):
    donor = StableDiffusionPipeline.from_pretrained(student)
    donor.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(donor.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    exported(typed, student, tmp_path / "out", "diffusers")
    plain, locked = (StableDiffusionPipeline.from_pretrained(place) for place in (student, tmp_path / "out"))
    before = stock(plain, 1.0)
    for pipeline in (plain, locked):
        pipeline.load_lora_weights(tmp_path / "lora")
    assert torch.equal(stock(locked, 7.5), stock(plain, 1.0))
    assert (stock(plain, 1.0) - before).abs().max() > 1e-3


def test_a_controlnet_of_the_teacher_is_attached(typed, student, tmp_path):
    teacher = StableDiffusionPipeline.from_pretrained(write_published(tmp_path / "teacher", "sd1"))
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(teacher.unet, conditioning_embedding_out_channels=(4, 8))
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)  # zero before they are trained
    exported(typed, student, tmp_path / "out", "diffusers")
    image, made = torch.rand(1, 3, 16, 16), []
    for place, scale in ((student, 1.0), (tmp_path / "out", 7.5)):
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(place, controlnet=control, safety_checker=None)
        made.append(stock(pipeline, scale, image=image))
    assert torch.equal(*made)
    assert (made[0] - stock(StableDiffusionPipeline.from_pretrained(student), 1.0)).abs().max() > 1e-3


@pytest.mark.parametrize("to", ["diffusers", "instaflow"])
def test_the_teachers_safety_checker_and_licence_are_kept(typed, student, tmp_path, to):
    teacher = write_checked(tmp_path / "teacher")
    out = exported(typed, student, tmp_path / "out", to, "--teacher", teacher)
    assert "safety checker is kept" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: openrail++\n" in card and "safety checker is kept" in card
    assert str(tmp_path) not in card and "safety_checker=None" not in card
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.safety_checker, StableDiffusionSafetyChecker)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(PROMPT, num_inference_steps=1, latents=noise(1), output_type="np").nsfw_content_detected
    assert len(found) == 1 and found[0] in (True, False)
    load_model(tmp_path / "out", device=torch.device("cpu"))  # without it


def test_sample_asks_the_safety_checker_unless_told_not_to(typed, tmp_path):
    place = write_checked(tmp_path / "model", unsafe=True)
    words = ["sample", place, "--prompt", PROMPT, "--num-steps", 1]
    said = "1 image, taken for unsafe by the model's safety checker, is black (--no-safety-checker asks none)"
    for more, blackened in (((), True), (("--no-safety-checker",), False)):
        code, out, err = typed(*words, *more, "--output", tmp_path / "one.png")
        assert code == 0, err
        assert (said in out) is blackened
        assert np.asarray(Image.open(tmp_path / "one.png")).any() != blackened
    assert said in typed(*words, "--output", f"{tmp_path}/many/")[1]
    absent = write_published(tmp_path / "absent", "sd1")
    shutil.copy(place / "model_index.json", absent)  # as fetched without its parts
    for more in ((), ("--no-safety-checker",)):
        out = typed("sample", absent, *words[2:], *more, "--output", tmp_path / "two.png")[1]
        assert (f"The safety checker of '{absent}' is not on this machine" in out) is (not more)
    code, _, err = typed(*words, "--no-safety-checker", "--output", f"{tmp_path}/many/")
    assert code == 1 and "safety_checker" in err  # images of one folder are drawn alike


def test_a_safety_checker_that_is_not_here_is_told(typed, student, tmp_path):
    teacher = write_checked(tmp_path / "teacher")
    shutil.rmtree(teacher / "safety_checker")
    out = exported(typed, student, tmp_path / "out", "diffusers", "--teacher", teacher)
    assert "is not on this machine, and left out" in out and "hf download" in out


# --- one file ---------------------------------------------------------------------------------------------------------


def lie_alike(pipeline):
    """Give each weight memory of its own. A file's lie in it at odd places, where kernels add up in another order."""
    for part in pipeline.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data = weight.data.clone()


@pytest.mark.parametrize("family", ["student", "sd2", "xl"])
def test_one_file_gives_the_same_images(typed, student, tmp_path, family):
    place = {
        "student": lambda: student,
        "sd2": lambda: write_published(tmp_path / "sd2", "sd2-v"),
        "xl": lambda: write_xl_flow(tmp_path / "xl", "velocity"),
    }[family]()
    exported(typed, place, tmp_path / "one", "single-file")
    file = tmp_path / "one" / "one.safetensors"
    kind = StableDiffusionXLPipeline if family == "xl" else StableDiffusionPipeline
    whole = kind.from_pretrained(place)
    pipeline = kind.from_single_file(str(file), config=str(tmp_path / "one" / "one"), local_files_only=True)
    for made in (pipeline, whole):
        lie_alike(made)
    assert torch.equal(stock(pipeline, 1.5, output_type="pt"), stock(whole, 1.5, output_type="pt"))
    assert load(file).settings == load(place).settings
    assert f'from_single_file("{file.name}"' in (tmp_path / "one" / "README.md").read_text()


# --- differences ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A teacher, a student that training made of it, and a fine-tuned model of it."""
    place = tmp_path_factory.mktemp("family")
    for name, write in (("teacher", write_model), ("student", write_student), ("finetune", write_model)):
        other = load(write(place / name))
        if name == "teacher":
            continue
        torch.manual_seed(len(name))
        for part in (other.unet, other.text_encoder) if name == "finetune" else (other.unet,):
            for key, weight in part.named_parameters():
                if key.endswith("weight") and weight.ndim in (2, 4):
                    weight.add_(0.05 * torch.randn_like(weight))
        save_model(place / name, **other.parts, scheduler=other.scheduler, settings=other.settings)
    return place


def test_a_lora_makes_the_teacher_the_student(typed, family, tmp_path):
    out = exported(typed, family / "student", tmp_path / "lora", "lora", "--teacher", family / "teacher")
    assert "Rank 64 leaves out 0.00%" in out
    pipeline = StableDiffusionPipeline.from_pretrained(family / "teacher")
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    whole = stock(StableDiffusionPipeline.from_pretrained(family / "student"), 1.0)
    torch.testing.assert_close(stock(pipeline, 1.0), whole, rtol=0, atol=1e-4)
    out = exported(typed, family / "student", tmp_path / "one", "lora", "--teacher", family / "teacher", "--rank", 2)
    error = float(re.search(r"Rank 2 leaves out ([\d.]+)%", out)[1])
    assert 20 < error < 100
    assert f"{error}" in (tmp_path / "one" / "README.md").read_text()


def test_a_delta_and_the_way_back(typed, family, tmp_path):
    out = exported(typed, family / "student", tmp_path / "delta", "delta", "--teacher", family / "teacher")
    assert "weights differ" in out
    exported(typed, family / "teacher", tmp_path / "back", "diffusers", "--add", tmp_path / "delta")
    back, student = load(tmp_path / "back"), load(family / "student")
    assert (back.settings.kind, back.settings.num_steps) == ("student", 1)
    assert back.scheduler.config == student.scheduler.config
    made = [model.sample(noise(1), [PROMPT]) for model in (back, student)]
    torch.testing.assert_close(*made, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_fine_tuned_teacher_is_transplanted(typed, family, tmp_path, strength):
    options = ["--add", family / "finetune", "--teacher", family / "teacher", "--strength", strength]
    exported(typed, family / "student", tmp_path / "out", "diffusers", *options)
    models = {name: load(family / name) for name in ("teacher", "student", "finetune")}
    out = load(tmp_path / "out")
    for part in ("unet", "text_encoder", "vae"):
        w = {name: getattr(model, part).state_dict() for name, model in models.items()}
        for key, value in getattr(out, part).state_dict().items():
            wanted = w["student"][key] + strength * (w["finetune"][key] - w["teacher"][key])
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)
    assert out.settings.kind == "student"
    assert out.settings.lineage[-1]["summary"] == f"W + {strength:g} (W of finetune - W of its teacher)"


@pytest.mark.parametrize("to", ["diffusers", "single-file", "lora", "delta"])
def test_a_card_s_lines_draw_what_the_student_draws(typed, family, tmp_path, monkeypatch, to):
    teacher = ["--teacher", family / "teacher"] if to in ("lora", "delta") else []
    exported(typed, family / "student", tmp_path / "out", to, *teacher)
    monkeypatch.chdir(tmp_path / "out")
    names = {"noise": noise(1)}
    code = code_of(tmp_path / "out").replace("TEACHER", str(family / "teacher"))
    exec(code.replace("a prompt", PROMPT).replace(").images", ', latents=noise, output_type="latent").images'), names)
    whole = stock(StableDiffusionPipeline.from_pretrained(family / "student"), 1.0)
    torch.testing.assert_close(names["image"], whole[0], rtol=0, atol=1e-4)


def test_what_is_added_brings_its_own_stages(typed, family, tmp_path):
    exported(typed, family / "student", tmp_path / "delta", "delta", "--teacher", family / "teacher")
    origin = {"name": "couplings", "kind": "couple", "content": "0123456789abcdef0123", "seconds": 1800.0}
    write_provenance(tmp_path / "delta", Provenance(origins=[Origin(**origin)]))
    exported(typed, family / "teacher", tmp_path / "back", "diffusers", "--add", tmp_path / "delta")
    card = (tmp_path / "back" / "README.md").read_text()
    assert "- couplings (couple)\n  - content 0123456789abcdef" in card and "In all 1,800 s" in card
    assert "Made by, oldest first" not in card  # what follows tells more


def test_the_teacher_is_asked_for(typed, family, tmp_path):
    for to in ("lora", "delta"):
        code, _, err = typed("export", family / "student", tmp_path / "out", "--to", to)
        assert code == 1 and "--teacher PLACE" in err
    torch.save({}, tmp_path / "delta.safetensors")  # no safetensors, a pickle
    code, _, err = typed("export", family / "student", tmp_path / "out", "--to", "diffusers", "--add", tmp_path)
    assert code == 1 and "cannot be read" in err
    assert not (tmp_path / "out").exists()


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_onnxruntime_makes_the_same_images(typed, tmp_path):
    flow = write_flow(tmp_path / "flow", "velocity")
    out = exported(typed, flow, tmp_path / "onnx", "onnx")
    assert float(re.search(r"each graph is within ([\d.e-]+) of PyTorch,", out)[1]) < 1e-4
    pipeline = OnnxStableDiffusionPipeline.from_pretrained(tmp_path / "onnx", provider="CPUExecutionProvider")
    sizes = {"height": 64, "width": 64}  # eight times the latent's, whatever the VAE makes of it
    made = stock(pipeline, 1.5, num_inference_steps=4, latents=noise(1).numpy(), output_type="np", **sizes)
    model = load(flow)
    images = model.decode(model.sample(noise(1), [PROMPT], num_steps=4, guidance_scale=1.5))
    np.testing.assert_allclose(made, images.permute(0, 2, 3, 1).numpy() / 2 + 0.5, rtol=0, atol=1e-4)


def code_of(folder):
    """The Python in a folder's model card."""
    return re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.mark.slow
def test_the_card_of_a_one_step_student_draws_by_onnxruntime_alone(typed, student, tmp_path, monkeypatch):
    exported(typed, student, tmp_path / "onnx", "onnx")
    code = code_of(tmp_path / "onnx")
    assert "diffusers" not in code
    monkeypatch.chdir(tmp_path / "onnx")
    names = {}
    exec(code.replace("a prompt", PROMPT), names)
    model = load(student)
    image = model.decode(model.sample(torch.from_numpy(names["noise"]), [PROMPT]))[0].permute(1, 2, 0).numpy()
    assert names["noise"].shape[1:] == model.latent_shape
    np.testing.assert_allclose(np.asarray(names["image"]), (image / 2 + 0.5).clip(0, 1) * 255, rtol=0, atol=0.51)


@pytest.mark.parametrize("part", ["text_encoder", "vae_decoder"])
def test_a_graph_that_computes_something_else_is_not_exported(typed, student, tmp_path, monkeypatch, part):
    write = onnx_graphs.write_graph

    def tampered(file, graph, inputs, output):
        own = graph.work
        if file.parent.name == part:
            graph.work = lambda *given: own(*given) * 1.01
        write(file, graph, inputs, output)
        graph.work = own

    monkeypatch.setattr(onnx_graphs, "write_graph", tampered)
    code, _, err = typed("export", student, tmp_path / "out", "--to", "onnx")
    assert code == 1 and "is off by 1.0e-02: it is not what PyTorch computes" in err
    assert not list(tmp_path.iterdir())


def test_onnx_is_an_extra(typed, student, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        code, _, err = typed("export", student, tmp_path / "out", "--to", "onnx")
    assert (
        code == 1 and "'onnxscript', which is not installed" in err and "pip install onnx onnxruntime onnxscript" in err
    )
    code, _, err = typed("export", write_xl_flow(tmp_path / "xl", "velocity"), tmp_path / "out", "--to", "onnx")
    assert code == 1 and "is no Stable Diffusion 1 or 2" in err
