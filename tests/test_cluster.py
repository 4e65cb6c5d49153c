import pytest

from instaflow.cluster import Cluster, Resources, resources_of, seconds_of
from instaflow.config import load_experiment, load_profile
from instaflow.errors import ConfigError
from tests.experiments import SMALL, write


def asked(text: str, name: str = "pairs", kind: str = "couple", profile: str = "{}") -> Resources:
    layers = [Cluster.model_validate(parse(part)) for part in (profile, text)]
    return resources_of(name, kind, layers)


def parse(text: str):
    from instaflow.dialect import parse_yaml

    return parse_yaml(text, "here")


@pytest.mark.parametrize(
    ("profile", "text", "partition"),
    [
        ("{}", "{}", None),
        ("{partition: a}", "{}", "a"),
        ("{partition: a}", "{partition: b}", "b"),
        ("{partition: a, stages: {couple: {partition: c}}}", "{}", "c"),
        ("{partition: a, stages: {couple: {partition: c}, pairs: {partition: d}}}", "{}", "d"),
        ("{stages: {pairs: {partition: d}}}", "{partition: b}", "b"),
        ("{partition: a}", "{stages: {pairs: {partition: null}}}", None),
        ("{partition: a}", "{stages: {other: {partition: b}, reflow: {partition: c}}}", "a"),
    ],
)
def test_the_experiment_comes_before_the_profile_and_a_stage_before_its_kind(profile, text, partition):
    assert asked(text, profile=profile).partition == partition


def test_variables_are_added_one_by_one_and_lists_replaced():
    found = asked(
        "{environment: {A: x}, stages: {pairs: {environment: {B: y}, modules: [cuda]}}}",
        profile="{environment: {A: a, C: c}, modules: [gcc, nccl]}",
    )
    assert found.environment == {"A": "x", "B": "y", "C": "c"}
    assert found.modules == ["cuda"]


@pytest.mark.parametrize(("gpus", "tasks"), [(0, 3), (1, 3), (8, 24)])
def test_a_node_has_a_task_for_each_gpu_or_one_on_its_cpus(gpus, tasks):
    assert Resources(nodes=3, gpus=gpus).tasks == tasks


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("8:00:00", 28800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-01:02:03", 176523),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(time, seconds):
    assert Resources(time=time).time == time and seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{partitoin: gpu}", "'cluster' has no setting 'partitoin'"),
        ("{stages: {pairs: {stages: {}}}}", "'cluster.stages.pairs' has no setting 'stages'"),
        ("{stages: {pears: {}}}", "'cluster.stages.pears' is neither a stage of this experiment nor a kind of stages"),
        ("{stages: {2rf: {array: 4}}}", "'cluster.stages.2rf.array': only couple stages share their work in an array"),
        ("{time: soon}", "'cluster.time': 'soon' is no time limit; write hours:minutes:seconds"),
        ("{time: 30}", "'cluster.time' should be a valid string, not 30 (put it in quotes)"),
        ("{partition: a b}", "'cluster.partition' should match pattern"),
        ("{environment: {A-B: x}}", "'cluster.environment': 'A-B' is no name of a variable"),
        ("{nodes: 0}", "'cluster.nodes' should be greater than 0, not 0"),
        ('{lines: ["a\\nb"]}', "'cluster.lines.0' should match pattern"),
        ("8", "'cluster' is 8, and must be a mapping of settings"),
    ],
)
def test_a_mistake_is_an_error_that_names_its_place(tmp_path, settings, message):
    with pytest.raises(ConfigError) as error:
        load_experiment(write(tmp_path, f"cluster: {settings}\n{SMALL}"))
    assert error.value.message.startswith(message)


def test_a_profile_is_checked_as_the_section_is(tmp_path):
    stages = load_experiment(write(tmp_path)).stages
    profile = write(tmp_path, "{partition: gpu, stages: {couple: {array: 8}}}", "profile.yaml")
    assert resources_of("pairs", "couple", [load_profile(profile, stages)]).array == 8
    with pytest.raises(ConfigError, match=r"has no setting 'gpu'") as error:
        load_profile(write(tmp_path, "gpu: 1", "wrong.yaml"), stages)
    assert error.value.hint == "Did you mean 'gpus'?"
    with pytest.raises(ConfigError, match="No profile"):
        load_profile(str(tmp_path / "none.yaml"), stages)


def test_what_is_asked_of_a_cluster_is_no_part_of_a_stage_and_survives_the_resolved_experiment(tmp_path):
    plain = load_experiment(write(tmp_path))
    found = load_experiment(write(tmp_path), ["cluster.gpus=8", "cluster.stages={pairs: {array: 4}}"])
    assert found.stages == plain.stages
    assert "cluster" not in plain.resolved()
    again = load_experiment(write(tmp_path, found.resolved(), "again.yaml"))
    assert again.cluster == found.cluster and again.resolved() == found.resolved()
