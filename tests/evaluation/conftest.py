import pytest


@pytest.fixture(autouse=True)
def own_weights(tmp_path, monkeypatch):
    """The user's folder of weights stays as it is."""
    monkeypatch.setenv("INSTAFLOW_WEIGHTS", str(tmp_path / "weights"))
