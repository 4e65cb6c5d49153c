import io

import numpy as np

from instaflow.couplings.records import Shard, encode


def test_the_bytes_are_those_of_webdatasets_own_writer(tmp_path):
    import webdataset

    records = Shard(np.arange(16, dtype=np.float16).reshape(2, 2, 2, 2), np.ones((2, 2, 2, 2)), ["七", "a\nb"], [7, 9])
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, user="instaflow", group="instaflow", mode=0o444, mtime=0) as tar:
        for row, index in enumerate(records.indices):
            text = {"prompt": records.prompts[row], "index": index}
            arrays = {"latent.npy": records.latent[row], "noise.npy": records.noise[row]}
            tar.write({"__key__": f"{index:09d}", "json": text, **arrays})
    assert encode(records) == buffer.getvalue()
