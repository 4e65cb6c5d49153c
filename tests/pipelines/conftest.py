"""A couple stage of six shards that is made in a second."""

import pytest

from tests.models.made import write_model

TEXT = """
run: unused
stages:
  pairs:
    {kind: couple, model: MODEL, prompts: [a seven, an odd digit], count: 44, records_per_shard: 8, batch_size: 4,
     num_steps: 2, guidance_scale: 2}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("experiment")
    path = folder / "pairs.yaml"
    path.write_text(TEXT.replace("MODEL", str(write_model(folder / "teacher"))))
    return str(path)
