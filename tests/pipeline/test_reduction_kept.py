"""Reducing what `steerage extract --no-cache` leaves: means of all rows, the rest of kept rows."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import NotFound
from pipeline.extraction.fused import extract_moments
from pipeline.extraction.workers import extract
from pipeline.prompts.plan import plan
from pipeline.ray_runtime import Pool
from pipeline.reduction.kept import find_kept
from pipeline.reduction.reduce import reduce_all
from pipeline.reduction.results import Reduction
from pipeline.reduction.sources import Source
from store.location import Location

REQUESTS = [("difference_of_means", {}), ("paired_difference", {}), ("probe", {})]
POOL = Pool(1)


@pytest.mark.usefixtures("ray_running")
def test_means_are_of_all_rows_and_scores_of_those_that_were_kept(make_run, root, tmp_path):
    run = make_run(capture='tokens = "last"')
    planned = plan(run, root)
    with pytest.raises(NotFound, match="run `steerage extract`"):
        Source.open(root, planned.cache)
    extract_moments(planned, root, pool=POOL, keep_rows=32)
    kept = find_kept(root, planned.cache.digest)
    assert kept.num_rows == 32 < planned.cache.num_rows == 80
    got = reduce_all(planned.cache, root, REQUESTS, num_workers=1)
    elsewhere = Location.open(str(tmp_path / "full"))
    whole = plan(run, elsewhere)
    extract(whole, elsewhere, pool=POOL)
    want = reduce_all(whole.cache, elsewhere, REQUESTS, num_workers=1)
    for one, other in zip(got[:2], want[:2], strict=True):
        assert one.digest != other.digest
        for stream, vectors_LW in other.directions_LW.items():
            np.testing.assert_allclose(one.directions_LW[stream], vectors_LW, rtol=1e-5, atol=1e-7)
        for side in ("positive", "negative"):
            assert one.counts[f"train_{side}"] == other.counts[f"train_{side}"]
            assert one.counts[f"test_{side}"] < other.counts[f"test_{side}"]
    probe = got[2]
    assert probe.counts["train_positive"] < want[2].counts["train_positive"]
    names = set(kept.index()["prompt_id"].to_pylist())
    assert sum(probe.counts.values()) == len(names)
    for reduction in got:
        assert reduction.rows_from == {planned.cache.digest: kept.digest}
        again = Reduction.open(root, reduction.digest)
        assert again.rows_from == reduction.rows_from
    assert want[0].rows_from == {}
    # Once all rows are there, what was reduced of some of them gives way.
    extract(planned, root, pool=POOL)
    after = reduce_all(planned.cache, root, REQUESTS, num_workers=1)
    assert [one.digest for one in after] == [other.digest for other in want]
    assert after[2].counts == want[2].counts
