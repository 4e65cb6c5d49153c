"""Where a model comes from, read from a run's files."""

import json

import pytest

from instaflow import provenance
from instaflow.errors import DataError
from instaflow.evaluation.costs import cost_of
from instaflow.files import fingerprint_of
from instaflow.provenance import (
    FILE,
    GONE,
    licence_of,
    provenance_of,
    read_provenance,
    samples_of,
    told,
    way_to,
    write_provenance,
)

HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PHASE = {"samples": 6400, "global_batch_size": 64, "learning_rate": 1e-5, "loss": "l2"}
LINEAGE = [
    {"stage": "pairs", "kind": "couple", "summary": "100 couplings"},
    {"stage": "student", "kind": "distill", "summary": "one-step student"},
]


def write_stage(run, name, settings, parents, seconds=10.0, content=None, **identity):
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    identity |= {f"{key} (content)": value for key, value in parents.items()}
    (folder / "stage.json").write_text(json.dumps({"identity": identity, "settings": settings}))
    done = {"fingerprint": content or f"{name}-content", "seconds": seconds, "hardware": "a GPU"}
    (folder / "done.json").write_text(json.dumps(done))


@pytest.fixture
def run(tmp_path):
    """Couplings of a hub's model, and a student of both."""
    run = tmp_path / "run"
    write_stage(run, "pairs", {"kind": "couple", "model": HUB}, {"model": f"{HUB}@abc"}, prompts="0123456789abcdef0123")
    for weights in ("model", "model-raw"):
        (run / "student" / weights).mkdir(parents=True)
        (run / "student" / weights / "weights").write_text(weights)
    settings = {"kind": "distill", "init": HUB, "couplings": "pairs", "phases": [PHASE]}
    parents = {"init": f"{HUB}@abc", "couplings": "pairs-content"}
    write_stage(run, "student", settings, parents, 7200.0, fingerprint_of(run / "student" / "model"))
    return run


def write_report(run, name="report", **changes):
    card = {"model_content": fingerprint_of(run / "student" / "model"), "num_samples": 2000, "seed": 0} | changes
    row = {"weights": "ema", "num_steps": 1, "guidance_scale": 1.0, "frechet_distance_real": 13.1, "card": card}
    (run / name).mkdir()
    (run / name / "report.json").write_text(json.dumps({"rows": [row, row | {"weights": "raw"}]}))


def test_the_way_from_the_teacher_is_told(run):
    write_report(run)
    found = provenance_of(run / "student" / "model", LINEAGE)
    assert [(origin.name, origin.kind, origin.content) for origin in found.origins] == [
        (HUB, "model", f"{HUB}@abc"),
        ("pairs", "couple", "pairs-content"),
        ("student", "distill", fingerprint_of(run / "student" / "model")),
    ]
    assert (found.teacher, found.licence) == (HUB, "creativeml-openrail-m")
    assert len(found.figures) == 1
    text = told(found)
    for words in (
        "100 couplings",
        "prompts 0123456789abcdef;",
        "phase 1: 6,400 samples, batch 64, learning rate 1e-05, l2",
        "7,200 s on a GPU",
        "In all 7,210 s",
        "1 step, no guidance: Fréchet distance to real images 13.100",
        "num_samples 2000; seed 0",
    ):
        assert words in text, text


def test_what_a_method_works_with_is_told(run):
    regression = {"couplings": "pairs", "weight": 0.25, "loss": "lpips", "share": None}
    settings = {"kind": "distill", "method": "dmd", "regression": regression, "fake": {"updates": 5}, "gan": None}
    write_stage(run, "student", settings, {})
    text = told(provenance_of(run / "student" / "model", LINEAGE))
    assert "  - fake: updates 5\n  - regression: couplings pairs, weight 0.25, loss lpips" in text
    assert "gan" not in text and "share" not in text


def test_figures_are_of_this_very_model(run):
    write_report(run, model_content="another")
    assert not provenance_of(run / "student" / "model", LINEAGE).figures
    write_report(run, "second")
    assert len(provenance_of(run / "student" / "model", LINEAGE).figures) == 1
    assert len(provenance_of(run / "student" / "model-raw", LINEAGE).figures) == 1
    (run / "student" / "model" / "weights").write_text("changed")
    assert not provenance_of(run / "student" / "model", LINEAGE).figures


def test_a_parent_that_was_made_anew_is_not_taken_for_the_old_one(run):
    write_stage(run, "pairs", {"kind": "couple", "model": HUB}, {"model": f"{HUB}@abc"}, content="other couplings")
    origins = provenance_of(run / "student" / "model", LINEAGE).origins
    (pairs,) = (origin for origin in origins if origin.name == "pairs")
    assert pairs.content == "pairs-content" and "made anew" in pairs.summary and pairs.seconds is None


def test_the_way_goes_on_through_other_runs(run, tmp_path):
    """A student of a flow that another run made of its own teacher, on couplings of a third."""
    first, third = tmp_path / "first", tmp_path / "third"
    (first / "teacher" / "model").mkdir(parents=True)
    write_stage(first, "teacher", {"kind": "teacher"}, {}, content=fingerprint_of(first / "teacher" / "model"))
    for weights in ("model", "model-raw"):
        (first / "2rf" / weights).mkdir(parents=True)
        (first / "2rf" / weights / "weights").write_text(f"flow, {weights}")
    settings = {"kind": "reflow", "init": "teacher", "phases": [PHASE | {"samples": 130}]}
    parents = {"init": fingerprint_of(first / "teacher" / "model")}
    write_stage(first, "2rf", settings, parents, 60.0, fingerprint_of(first / "2rf" / "model"))
    write_stage(third, "pairs", {"kind": "couple", "model": str(first / "2rf" / "model"), "count": 50}, {})
    for weights in ("model", "model-raw"):
        flow = first / "2rf" / weights
        settings = {"kind": "distill", "init": str(flow), "couplings": str(third / "pairs"), "phases": [PHASE]}
        parents = {"init": fingerprint_of(flow), "couplings": "of all its files"}
        write_stage(run, "student", settings, parents, 7200.0, fingerprint_of(run / "student" / "model"))
        found = provenance_of(run / "student" / "model", LINEAGE)
        assert [(origin.name, origin.kind, origin.samples) for origin in found.origins] == [
            ("teacher", "teacher", 0),
            ("2rf", "reflow", 128),
            ("pairs", "couple", 50),
            ("student", "distill", 6400),
        ]
        assert found.teacher == str(first / "teacher" / "model")
    (flow / "weights").write_text("other weights")  # changed since
    found = provenance_of(run / "student" / "model", LINEAGE)
    assert (found.origins[0].name, found.origins[0].kind, found.teacher) == ("model-raw", "stage", str(flow))

    exported = tmp_path / "exported"
    exported.mkdir()
    write_provenance(exported, provenance_of(first / "2rf" / "model", []))
    write_stage(run, "student", settings | {"init": str(exported)}, {"init": "exported"}, 7200.0, "content")
    assert [origin.kind for origin in provenance_of(run / "student" / "model", LINEAGE).origins][:2] == [
        "teacher",
        "reflow",
    ]


def test_a_stage_is_counted_and_hashed_once_by_whichever_ways_it_is_reached(run, tmp_path, monkeypatch):
    """Raw weights of a flow, couplings of its average by name and by path, and the flow exported."""
    (run / "2rf" / "model").mkdir(parents=True)
    (run / "2rf" / "model-raw").mkdir()
    (run / "2rf" / "model-raw" / "weights").write_text("raw")
    average, raw = (fingerprint_of(run / "2rf" / name) for name in ("model", "model-raw"))
    first = {"init": f"{HUB}@abc", "couplings": "pairs-content"}
    write_stage(
        run, "2rf", {"kind": "reflow", "init": HUB, "couplings": "pairs", "phases": [PHASE]}, first, content=average
    )
    write_stage(run, "pairs2", {"kind": "couple", "model": "2rf"}, {"model": average})
    exported = tmp_path / "exported"
    exported.mkdir()
    write_provenance(exported, provenance_of(run / "2rf" / "model", LINEAGE))
    assert [origin.name for origin in way_to(exported)] == [HUB, "pairs", "2rf"]
    hashed = []
    monkeypatch.setattr(provenance, "fingerprint_of", lambda folder: hashed.append(folder) or fingerprint_of(folder))
    for place, content, count in ((run / "2rf" / "model-raw", raw, 1), (exported, "exported", 0)):
        settings = {"kind": "distill", "init": str(place), "couplings": str(run / "pairs2"), "phases": [PHASE]}
        settings["regression"] = {"couplings": str(run / "pairs")}
        parents = {"init": content, "couplings": "of all files", "regression.couplings": "of all files"}
        write_stage(tmp_path / "other", "student", settings, parents)
        (tmp_path / "other" / "student" / "model").mkdir(exist_ok=True)
        hashed.clear()
        way = way_to(tmp_path / "other" / "student" / "model")
        assert sorted(origin.name for origin in way) == ["2rf", "pairs", "pairs2", HUB, "student"]
        assert cost_of(way)["training_samples"] == 2 * 6400 and len(hashed) == count


def test_runs_that_lead_back_to_themselves_come_to_an_end(run):
    settings = {"kind": "distill", "init": HUB, "couplings": str(run / "student"), "phases": [PHASE]}
    write_stage(run, "student", settings, {"init": f"{HUB}@abc", "couplings": "of all files"})
    assert [origin.name for origin in way_to(run / "student" / "model")] == [HUB, "student"]


def test_a_way_that_leads_nowhere_is_told_and_has_no_cost(run):
    student = run / "student" / "model"
    assert cost_of(way_to(student)) == {
        "training_samples": 6400,
        "seconds": 7210.0,
        "device_hours": None,
        "devices": ["a GPU"],
    }
    settings = {"kind": "distill", "init": "runs/gone/2rf/model", "couplings": "pairs", "phases": [PHASE]}
    write_stage(run, "student", settings, {"init": "its content", "couplings": "pairs-content"})
    assert (way_to(student)[0].name, way_to(student)[0].summary) == ("model", GONE)
    assert cost_of(way_to(student)) == {}
    settings = {"kind": "distill", "init": HUB, "couplings": "runs/gone/pairs", "phases": [PHASE]}
    write_stage(run, "student", settings, {"init": f"{HUB}@abc", "couplings": "their content"})
    assert [(origin.kind, origin.summary) for origin in way_to(student)][:2] == [("model", ""), ("couple", GONE)]
    assert cost_of(way_to(student)) == {}


def test_elsewhere_the_lineage_is_all(tmp_path):
    (tmp_path / "model").mkdir()
    found = provenance_of(tmp_path / "model", LINEAGE)
    assert [origin.summary for origin in found.origins] == ["100 couplings", "one-step student"]
    assert "In all" not in told(found)


def test_an_export_carries_it_and_no_place_on_this_machine(run, tmp_path):
    found = provenance_of(run / "student" / "model", LINEAGE)
    (tmp_path / "out").mkdir()
    write_provenance(tmp_path / "out", found)
    assert provenance_of(tmp_path / "out", []) == found
    local = {"kind": "distill", "init": str(tmp_path / "teacher"), "couplings": "pairs"}
    write_stage(run, "student", local, {"init": "teacher-content", "couplings": "pairs-content"})
    found = provenance_of(run / "student" / "model", LINEAGE)
    write_provenance(tmp_path / "out", found)
    assert found.teacher == str(tmp_path / "teacher")
    assert str(tmp_path) not in (tmp_path / "out" / FILE).read_text()
    assert read_provenance(tmp_path / "out" / FILE).origins[0].name == "teacher"


def test_a_damaged_file_is_told(tmp_path):
    for text in ("", "[]", '{"origins": [{"colour": "blue"}]}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(DataError, match="is damaged"):
            provenance_of(tmp_path, [])


def test_licences(tmp_path):
    assert licence_of("stabilityai/stable-diffusion-2-1") == "openrail++"
    assert licence_of("XCLiu/instaflow_0_9B_from_sd_1_5") == "cc-by-nc-4.0"
    assert licence_of("owner/unknown") == licence_of("") == licence_of(str(tmp_path)) == ""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\nlicense: other\n")
    assert licence_of(str(tmp_path)) == "mit"


def test_samples_are_counted_in_whole_batches():
    phases = [{"samples": 100, "global_batch_size": 64}, {"samples": 128, "global_batch_size": 64}]
    assert samples_of({"phases": phases}) == 64 + 128
    assert samples_of({"count": 7}) == 7
