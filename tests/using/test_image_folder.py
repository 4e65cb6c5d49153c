"""A folder of many images: killed and begun again it goes on, and holds each image once."""

import io
import signal
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import instaflow
from instaflow.errors import ConfigError, Interrupted
from instaflow.image_files import ImageFiles
from instaflow.interruption import Stop
from instaflow.models.samplers import flow_scheduler
from instaflow.using.image_folder import ImageFolder
from instaflow.using.metadata import About, Drawn, read_about
from instaflow.world import Worker
from tests.models.made import teacher_scheduler, write_model
from tests.pipelines.runs import instaflow as run_command
from tests.pipelines.runs import start

ABOUT = About(["a model"], [1], [1.0], "float32")
IDENTITY = {"model": "abc", "num_steps": 1}


def known(index):
    return Drawn(f"prompt {index}", f"0:{index}")


class Pen:
    """Draws an image of its index; stops after so many batches."""

    def __init__(self, batches=10**9, error=None):
        self.drawn, self.batches, self.error, self.stop = [], batches, error, Stop()

    def __call__(self, indices):
        self.drawn += indices
        self.batches -= 1
        if self.batches == 0:
            self.stop.signal = "SIGTERM"
            if self.error:
                raise self.error
        return [Image.new("RGB", (4, 4), (index, 0, 0)) for index in indices]


def fill(folder: ImageFolder, pen: Pen, identity=IDENTITY) -> list[int]:
    heard = []
    folder.begin(identity)
    folder.fill(pen, known, ABOUT, batch_size=3, stop=pen.stop, report=heard.append)
    return heard


def members(folder: Path) -> dict[str, bytes]:
    """Every file of the images, from tars or loose, in order."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                names = tar.getnames()
                assert not set(names) & found.keys()
                found |= {name: tar.extractfile(name).read() for name in names}
        elif path.suffix in (".png", ".txt"):
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize("per_shard", [None, 4])
def test_images_lie_beside_their_prompts(tmp_path, per_shard):
    pen = Pen()
    heard = fill(ImageFolder(tmp_path / "out", 10, per_shard), pen)
    assert pen.drawn == list(range(10)) and heard == ([4, 8, 10] if per_shard else list(range(1, 11)))
    files = members(tmp_path / "out")
    assert list(files) == [f"{index:09d}.{ending}" for index in range(10) for ending in ("png", "txt")]
    for index in range(10):
        assert files[f"{index:09d}.txt"] == f"prompt {index}".encode()
        assert Image.open(io.BytesIO(files[f"{index:09d}.png"])).getpixel((0, 0)) == (index, 0, 0)
    (tmp_path / "one.png").write_bytes(files["000000007.png"])
    assert read_about(tmp_path / "one.png").images == [known(7)]
    captions = [image.caption for image in ImageFiles(str(tmp_path / "out"))]
    assert captions == [f"prompt {index}" for index in range(10)]  # as the data of a couple stage


@pytest.mark.parametrize("per_shard", [None, 4])
@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_what_is_stopped_goes_on_to_the_same_bytes(tmp_path, per_shard, error, batches):
    whole = ImageFolder(tmp_path / "whole", 10, per_shard)
    fill(whole, Pen())
    folder = ImageFolder(tmp_path / "out", 10, per_shard)
    with pytest.raises((Interrupted, OSError)):
        fill(folder, Pen(batches, error))
    assert not [path for path in (tmp_path / "out").iterdir() if ".tmp-" in path.name]
    held = 10 - sum(len(folder.indices(unit)) for unit in folder.missing())
    assert held < 10
    (tmp_path / "out" / ".00001.tar.tmp-left").touch()  # by a writer that was killed
    pen = Pen()
    fill(folder, pen)
    assert pen.drawn == list(range(held, 10))  # nothing is drawn again
    assert not list((tmp_path / "out").glob(".*.tmp-*"))
    assert members(tmp_path / "out") == members(tmp_path / "whole")
    if per_shard:
        for path in (tmp_path / "whole").glob("*.tar"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert fill(folder, pen) == [] and len(pen.drawn) == 10 - held


@pytest.mark.parametrize("per_shard", [None, 4])
def test_workers_share_a_folder(tmp_path, per_shard):
    fill(ImageFolder(tmp_path / "whole", 10, per_shard), Pen())
    drawn = {}
    for index in (1, 0, 2):
        folder, pen = ImageFolder(tmp_path / "out", 10, per_shard, Worker(index, 3)), Pen()
        heard = fill(folder, pen)
        assert folder.missing() == [] and heard[-1] == folder.images(folder.share()) == len(pen.drawn)
        drawn[index] = pen.drawn
    assert drawn[1] == ([4, 5, 6, 7] if per_shard else [1, 4, 7])
    assert sorted(index for mine in drawn.values() for index in mine) == list(range(10))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_of_workers_who_begin_at_once_each_finds_the_folder_begun(tmp_path):
    processes = get_context("fork")
    for trial in range(5):
        folder, gate = ImageFolder(tmp_path / f"out{trial}", 10, 4), processes.Barrier(4)

        def begin(folder=folder, gate=gate):
            gate.wait()
            folder.begin(IDENTITY)

        workers = [processes.Process(target=begin) for _ in range(4)]
        for one in workers:
            one.start()
        for one in workers:
            one.join()
        assert [one.exitcode for one in workers] == [0, 0, 0, 0]
    with pytest.raises(ConfigError, match="begun with num_steps"):
        folder.begin(IDENTITY | {"num_steps": 2})


def test_a_folder_of_something_else_is_refused(tmp_path):
    folder = ImageFolder(tmp_path / "out", 10, 4)
    fill(folder, Pen())
    with pytest.raises(ConfigError, match="begun with num_steps 1, and now it is 2"):
        folder.begin(IDENTITY | {"num_steps": 2})
    with pytest.raises(ConfigError, match="begun with per_shard 4, and now it is None"):
        ImageFolder(tmp_path / "out", 10, None).begin(IDENTITY)
    (tmp_path / "out" / "sample.json").write_text("[")
    with pytest.raises(ConfigError, match="is damaged"):
        folder.begin(IDENTITY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        ImageFolder(tmp_path / "other", 10, 4).begin(IDENTITY)


def test_a_command_that_is_killed_is_typed_again(tmp_path):
    """SIGKILL, then to the end; the images are those of Python."""
    scheduler = flow_scheduler("velocity", teacher_scheduler())
    settings = {"kind": "student", "parametrization": "velocity", "num_steps": 1, "guidance_scale": 1.0}
    model = write_model(tmp_path / "model", scheduler, **settings)
    (tmp_path / "prompts.txt").write_text("".join(f"the digit {digit}\n" for digit in range(10)))
    words = ["sample", model, "--prompts", "prompts.txt", "--seeds", "0-99", "--output", "out/"]
    words += ["--shard-size", "30", "--batch-size", "10"]
    killed = start(*words, cwd=tmp_path)
    while killed.poll() is None and len(list(tmp_path.glob("out/*.tar"))) < 3:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.ended().returncode == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.tar")}
    done = run_command(*words, cwd=tmp_path)
    assert "out: 1,000 images in 34 shards, 1 step" in done.stdout
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert not list(tmp_path.glob("out/.*.tmp-*"))
    files = members(tmp_path / "out")
    assert len(files) == 2000
    drawn = instaflow.load(model, device="cpu")(["the digit 3", "the digit 9"], seeds=[42, 99])
    for index, image in zip((342, 999), drawn, strict=True):
        made = np.asarray(Image.open(io.BytesIO(files[f"{index:09d}.png"]))).astype(int)
        assert np.abs(made - np.asarray(image)).max() <= 1
