"""Where the tests of the registry keep their objects: on a disk, in memory, in a bucket."""

from __future__ import annotations

import os
from uuid import uuid4

import pytest

from store.location import Location


def _bucket():
    if "STEERAGE_TEST_BUCKET" not in os.environ:
        pytest.skip("set STEERAGE_TEST_BUCKET to s3://BUCKET, with credentials and endpoint")
    return Location.open(os.environ["STEERAGE_TEST_BUCKET"] + "/" + uuid4().hex)


@pytest.fixture(params=["local", "memory", "bucket"])
def root(request, tmp_path):
    """An empty Location, on every medium; in a bucket where STEERAGE_TEST_BUCKET names one."""
    if request.param == "local":
        return Location.open(tmp_path / "store")
    return _bucket() if request.param == "bucket" else Location.open("memory://").child("some/path")


@pytest.fixture(params=["local", "bucket"])
def shared_root(request, tmp_path):
    """Like `root`, where other processes can open its URL."""
    return Location.open(tmp_path / "store") if request.param == "local" else _bucket()
