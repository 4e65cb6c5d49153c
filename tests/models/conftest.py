import pytest

from tests.models.made import write_flow, write_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One folder of each sort that stages write."""
    place = tmp_path_factory.mktemp("models")
    return {
        "teacher": write_model(place / "teacher"),
        "velocity": write_flow(place / "velocity", "velocity"),
        "epsilon": write_flow(place / "epsilon", "epsilon"),
    }
