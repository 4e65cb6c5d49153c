import base64
import io
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from instaflow.evaluation.page import model_colours, page, write_page
from instaflow.evaluation.parts import picture
from instaflow.evaluation.plots import quality_plots
from instaflow.evaluation.report import Floors, Gallery, GalleryRow, LossCurve, Protocol, Report, Stage, report_json
from instaflow.evaluation.style import LIGHT
from instaflow.evaluation.svg import marker
from tests.evaluation.example import ROWS, STAGES, full_report, row, with_distance

VOID = {"meta", "img", "br", "path", "circle"}


class Reader(HTMLParser):
    """Collects text, tags and attributes, and checks that every element is closed by its own end tag."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data.replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_is_one_file_that_asks_for_nothing_else():
    content = page(full_report())
    reader = Reader(content)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in reader.tags}
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", content)  # no address, not even of a namespace
    assert "url(" not in content and "@import" not in content
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any("href" in attributes for _, attributes in reader.tags)


def test_all_rows_stages_floors_and_the_protocol_are_on_the_page():
    text = Reader(page(full_report())).text
    for one in ROWS:
        assert f"{one.num_steps}" in text and one.model in text
        assert f"{one.frechet_distance_real:.3g}" in text
    for part in ("pairs2", "couple", "41 s", "0.118", "98.9 %", "2,000 prompts", "an SVC", "torch 2.15.0", "1.80 GB"):
        assert part in text
    assert "The first two prompts of the evaluation." in text


def scopes(content: str) -> list[str | None]:
    """What a table's heads say that they head, as a screen reader tells it."""
    return [attributes.get("scope") for tag, attributes in Reader(content).tags if tag == "th"]


def test_the_tables_heads_say_what_they_head():
    found = scopes(page(full_report()))
    assert len(found) > 15 and {*found} == {"col", "rowgroup"}


def test_what_users_wrote_is_shown_and_never_run():
    evil = "<script>alert('1')</script>\"&"
    base = full_report()
    assert base.gallery and base.gaps
    report = replace(
        base,
        title=evil,
        config=evil,
        hardware=evil,
        protocol=Protocol(samples=evil, notes={evil: evil}),
        versions={evil: evil},
        rows=[replace(r, model=evil + r.model) for r in ROWS],
        stages=[replace(s, description=evil, kind=evil) for s in STAGES],
        checks=[replace(base.checks[0], what=evil, value=evil, expected=evil)],
        losses=[replace(base.losses[0], stage=evil)],
        gallery=replace(base.gallery, prompts=[evil, evil], choice=evil),
        gaps=replace(
            base.gaps,
            measure=evil,
            distances={evil: [1.0, 2.0]},
            student=evil,
            worst=[replace(base.gaps.worst[0], prompt=evil, teacher_reading=evil, student_reading="other")],
        ),
    )
    content = page(report)
    reader = Reader(content)
    assert "<script" not in content
    assert "script" not in {tag for tag, _ in reader.tags}
    assert evil in reader.text
    assert any(attributes.get("alt", "").startswith(evil) for tag, attributes in reader.tags if tag == "img")


OPTIONAL = [f.name for f in fields(Report) if f.name not in ("title", "config", "seed", "hardware", "protocol", "rows")]


@pytest.mark.parametrize("name", OPTIONAL)
def test_any_part_may_be_missing(name):
    bare = Report(title="t", config="c", seed=0, hardware="", protocol=Protocol(), rows=[])
    text = Reader(page(replace(full_report(), **{name: getattr(bare, name)}))).text
    assert not re.search(r"\b(nan|inf|None)\b", text)


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[3:4], ROWS[6:], [row("student", 1, None, None, None)]])
def test_a_report_of_nothing_but_rows_is_a_page(rows):
    report = Report(title="t", config="c", seed=0, hardware="", protocol=Protocol(), rows=rows)
    reader = Reader(page(report))
    assert not re.search(r"\b(nan|inf|None)\b", reader.text)
    assert not any(tag in ("p", "ol", "dl") and not text.strip() for tag, text in elements(page(report)))


def elements(content: str) -> list[tuple[str, str]]:
    return re.findall(r"<(p|ol|dl)\b[^>]*>(.*?)</\1>", content, flags=re.S)


def test_figures_that_are_not_finite_are_dashes_and_spoil_no_drawing():
    broken = [replace(r, frechet_distance_real=math.inf, seconds_per_image=np.float32("nan")) for r in ROWS[3:]]
    curve = LossCurve(stage="2rf", samples_seen=[64, 128, 192], loss=[1.0, math.nan, math.inf])
    base = full_report()
    assert base.gaps
    gaps = replace(base.gaps, distances={"student": [0.1, math.nan], "direct": [math.nan]}, unrelated=math.nan)
    floors = Floors(real_halves=math.inf, reader_accuracy=math.nan)
    content = page(replace(base, floors=floors, rows=[*ROWS[:3], *broken], losses=[curve], gaps=gaps))
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]+", "", content))
    assert "–" in Reader(content).text


def test_the_best_of_the_one_step_rows_is_marked_whoever_it_is():
    def marked(report: Report) -> list[str]:
        return re.findall(r'<span class="best">([^<]*)</span>', page(report))

    assert "0.312" in marked(full_report()) and "0.378" not in marked(full_report())
    assert "0.378" in marked(with_distance("student", 0.9))
    assert marked(replace(full_report(), rows=ROWS[:1])) == []


@pytest.mark.parametrize("place", [0, len(ROWS)])
def test_raw_rows_are_called_so_wherever_they_stand(place):
    """In table, legend and plot; the moving average keeps its name, its colour and the story."""
    raw = replace(ROWS[5], weights="raw", frechet_distance_real=0.219)
    report = replace(full_report(), rows=[*ROWS[:place], raw, *ROWS[place:]])
    content = page(report)
    cells = re.findall(r'<td class="name"><svg.*?</svg>([^<]*)</td>', content)
    assert cells.count("student (raw)") == 1 and cells.count("student") == 1
    assert "student (raw), 1 step: 0.219" in content
    assert re.search(r"<li>(?:<svg.*?</svg>)student \(raw\)</li>", content)
    colours = model_colours(report)
    assert colours["student"] == 2 and len(set(colours.values())) == len(colours)
    assert "draws an image in one step, at a Fréchet distance of 0.312" in Reader(content).text


def test_the_progress_of_each_flow_is_drawn():
    text = page(full_report())
    for title in ("2rf at 640 samples: 0.700", "2rf at 1,280 samples: 0.400", "student at 640 samples: 0.0110"):
        assert title in text
    assert "2rf at 1,280 samples: 0<" not in text  # zero has no place on a logarithmic axis


def test_the_story_follows_the_figures():
    assert "student  is the nearer" in Reader(page(full_report())).text
    assert "direct  is the nearer" in Reader(page(with_distance("student", 0.9))).text


def of_matching() -> Report:
    """A teacher and a generator of four steps, which nothing is compared with."""
    rows = [*ROWS[:3], replace(ROWS[5], model="matched", kind="dmd", num_steps=4)]
    made = Stage(name="matched", kind="distill", method="dmd", parents=["teacher", "pairs"], samples=64)
    couplings = replace(STAGES[1], name="photographs", samples=20, of_real_images=True)
    return Report(
        title="Few",
        config="few",
        seed=0,
        hardware="",
        protocol=Protocol(),
        rows=rows,
        stages=[*STAGES[:2], couplings, made],
    )


def test_each_way_is_explained_where_it_was_gone_and_no_other():
    matched, reflowed = Reader(page(of_matching())).text, Reader(page(full_report())).text
    for text, there, absent in ((matched, "matching", "reflow"), (reflowed, "reflow", "matching")):
        told = text[text.index("Why one step can be enough") : text.index("How it was made")].lower()
        assert {"matching": "distribution matching", "reflow": "reflow straightens"}[there] in told
        assert absent not in told
    assert "Two diffusion models look at the student’s" in matched and "Another road" not in matched
    assert matched.count("measured on the models of this experiment") == 0


def test_a_way_that_no_row_shows_is_explained_by_its_stage():
    report = replace(of_matching(), rows=ROWS[:3])
    assert "Two diffusion models look at the student’s" in Reader(page(report)).text
    beside = replace(ROWS[5], model="earlier/matched", kind="dmd", beside=True)
    assert "Another road" not in Reader(page(replace(full_report(), rows=[*ROWS, beside]))).text


def test_couplings_of_real_images_do_need_images():
    text = Reader(page(of_matching())).text
    assert "Made so, they need no image of the original data set. Those in  photographs  are of real images" in text
    alone = replace(of_matching(), stages=[stage for stage in of_matching().stages if stage.name != "pairs"])
    assert "need no image" not in page(alone) and "Couplings made: 20 in" in Reader(page(alone)).text


def test_the_same_report_gives_the_same_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, full_report())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_each_model_has_its_own_colour_and_the_roles_keep_theirs():
    usual = {"teacher": 0, "2rf": 1, "student": 2, "direct": 3}
    assert {m: c for m, c in model_colours(full_report()).items() if m in usual} == usual
    two = [*ROWS, *(replace(r, model="3rf") for r in ROWS if r.model == "2rf")]
    colours = model_colours(replace(full_report(), rows=two))
    assert len(set(colours.values())) == len(colours)


def test_twenty_models_differ_in_colour_or_shape():
    rows = [replace(ROWS[5], model=f"student-{index}") for index in range(20)]
    report = Report(title="many", config="c", seed=0, hardware="h", protocol=Protocol(), rows=rows)
    colours = model_colours(report)
    looks = {
        re.sub(r"[^a-z]", "", marker(slot, 0, 0).split(' d="')[1]) + str(slot % len(LIGHT)) for slot in colours.values()
    }
    assert len(looks) == 20
    content = page(report)
    assert all(f".c{slot} {{" in content for slot in colours.values())


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
def test_a_small_picture_keeps_every_pixel(mode):
    source = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).convert(mode)
    data = base64.b64decode(re.findall(r"base64,([^\"]+)", picture(source, "alt"))[0])
    assert np.array_equal(np.array(Image.open(io.BytesIO(data)).convert("RGB")), np.array(source.convert("RGB")))


def test_a_large_picture_is_reduced_so_that_the_page_stays_small():
    noise = np.random.default_rng(0).integers(0, 256, (512, 768, 3), dtype=np.uint8)
    kind, data = re.findall(r"data:image/(\w+);base64,([^\"]+)", picture(noise, "alt"))[0]
    assert kind == "jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 171)


def test_a_gallery_row_with_an_image_too_few_is_refused():
    gallery = Gallery(prompts=["a", "b"], rows=[GalleryRow(model="m", kind="flow", num_steps=1, images=[])])
    with pytest.raises(ValueError, match="shorter"):
        page(replace(full_report(), gallery=gallery))


def test_strips_neighbours_and_the_protocol_card_are_on_the_page():
    reader = Reader(page(full_report()))
    alts = [attributes["alt"] for tag, attributes in reader.tags if tag == "img"]
    assert alts.count("a handwritten seven: student, on the way") == 5
    assert alts.count("the nearest real image") == 1
    assert "student lie 1.20 from the nearest real one (median), a real image 1.10 from the nearest other" in " ".join(
        reader.text.replace("student  lie", "student lie").split()
    )
    assert "The protocol card" in reader.text and "2,000 prompts, SHA-256 76543210" in reader.text
    assert reader.text.count("0123456789abcdef ") == len(ROWS) + len(full_report().scores[0].rows)


@pytest.mark.parametrize(
    ("median", "said"),
    [(0.5, "look for copies"), (1.1, "as near as real images"), (2.0, "most of them are no copies of these")],
)
def test_whether_images_are_copies_follows_the_distances(median, said):
    report = full_report()
    assert said in page(replace(report, neighbours=replace(report.neighbours, median=median)))


def test_a_sweep_of_guidance_is_a_curve_with_its_ends_named():
    rows = [
        replace(
            ROWS[0], guidance_scale=scale, swept=True, frechet_distance_real=0.2 + 0.1 * scale, prompt_accuracy=share
        )
        for scale, share in ((1.0, 0.9), (3.0, 0.97), (5.0, 0.99))
    ]
    content = page(
        Report(title="sweep", config="c", seed=0, hardware="h", protocol=Protocol(), rows=[*rows, *ROWS[4:]])
    )
    text = Reader(content).text
    assert ">guidance 1<" in content and ">guidance 5<" in content
    assert "Guidance from 1 to 5" in content and "What guidance trades" in text
    assert all(f"guidance {scale:g}: " in content for scale in (1, 3, 5))
    assert "teacher (guidance 3)" in text
    assert "What guidance trades" not in page(full_report())


def test_a_sweep_that_nobody_reads_is_drawn_against_clip_score():
    scales = {1.0: 0.25, 3.0: 0.31}
    rows = [
        replace(ROWS[0], guidance_scale=g, swept=True, prompt_accuracy=None, clip_score=score)
        for g, score in scales.items()
    ]
    content = page(replace(full_report(), rows=rows, gallery=None, gaps=None))
    assert "CLIP score</text>" in content and "guidance 3: 0.271, 0.310" in content


def test_what_quality_stands_against_is_said_over_its_charts():
    content = page(full_report())
    drawn = re.findall(r'<h3>(Against [^<]*)</h3>|aria-label="([^"]* against [^"]*)"', content)
    assert [head or plot.rpartition(" against ")[2] for head, plot in drawn] == [
        *("Against steps", "steps", "steps", "steps"),
        *("Against time", "time per image"),
        *("Against training", "training samples", "device-minutes"),
    ]
    untimed = [replace(one, seconds_per_image=None) for one in ROWS]
    bare = page(replace(full_report(), rows=untimed, stages=[]))
    assert "Against steps" in bare and "Against time" not in bare and "Against training" not in bare


def test_quality_stands_against_the_cost_of_training():
    report = full_report()
    shown = page(report)
    assert "Quality against training samples" in shown and "Quality against device-minutes" in shown
    assert "here a GPU." in shown
    longer = [replace(stage, seconds=4000 * (stage.seconds or 0)) for stage in report.stages]
    assert "Quality against device-hours" in page(replace(report, stages=longer))
    bare = page(replace(report, stages=[]))
    assert "Quality against training samples" not in bare and "Quality against device" not in bare
    unknown = page(replace(report, stages=[replace(stage, processes=None) for stage in report.stages]))
    assert "Quality against training samples" in unknown and "Quality against device" not in unknown
    cost = {"training_samples": 700, "device_hours": 3.5, "devices": ["a GPU elsewhere"]}
    others = page(replace(report, stages=[], rows=[replace(row, cost=cost) for row in report.rows]))
    assert "Quality against training samples" in others and "Quality against device-hours" in others
    assert "here a GPU elsewhere." in others


def test_cells_that_are_wrong_are_told_in_percent_as_prompts_are():
    report = replace(full_report(), protocol=Protocol(judged="named cells"))
    content = page(report).replace("\N{NO-BREAK SPACE}", " ")
    assert "Named cells not drawn right" in content and "student, 1 step: 0.7 %" in content


def test_a_copy_of_the_reference_is_told_and_not_drawn():
    """It lies at a distance of rounding alone, which no axis can hold beside the others."""
    copied = replace(ROWS[5], model="copy", frechet_distance_teacher=3e-14)
    report = replace(full_report(), rows=[*ROWS, copied])
    drawn = quality_plots(report.rows, report.floors, model_colours(report))
    to_teacher = next(plot for plot in drawn if "teacher’s images" in plot)
    assert "copy, " not in to_teacher and "student, " in to_teacher and "3.0e-14" in page(report)
    alone = replace(report, rows=[replace(row, frechet_distance_teacher=3e-14) for row in ROWS])
    assert "3.0e-14" in page(alone)


def test_what_took_the_time_is_said():
    report = full_report()
    assert "the whole experiment" in page(report) and ">this evaluation<" not in page(report)
    alone = replace(report, stages=[Stage(name="report", kind="evaluate", seconds=61.0)])
    assert ">this evaluation<" in page(alone) and "the whole experiment" not in page(alone)
    assert report_json(alone)["seconds"] == 61.0


def test_no_error_at_all_is_explained_where_it_is_drawn():
    words = "No error among all samples is drawn as half an error."
    assert words not in page(full_report())
    rows = [replace(row, prompt_accuracy=1.0) if row.model == "student" else row for row in ROWS]
    assert words in page(replace(full_report(), rows=rows))
