"""`steerage evaluate`, as a user runs it: a process of its own, over a real service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from steering_service.client.operator import Operator
from steering_service.core.artifact import ModelReference, Policy, build
from steering_service.core.direction import Direction
from steering_service.core.fingerprint import model_fingerprint
from steering_service.core.intervention import Intervention
from steering_service.core.signing import Signer, generate_key
from steering_service.core.site import Site

STEERAGE = str(Path(sys.executable).with_name("steerage"))


def evaluate(*arguments, code=0):
    done = subprocess.run(
        [STEERAGE, "evaluate", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    for name in ("publisher", "stranger"):
        generate_key(folder / f"{name}.key", folder / f"{name}.pub")
    rows = [{"prompt": f"{n}: to the north?", "split": "test", "answer": "n"} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suites.toml").write_text(
        'name = "north"\n[prompt_baseline]\nsystem = "be brief"\n'
        '[[suites]]\nname = "knows"\nkind = "answer"\nrole = "target"\nfiles = ["rows.jsonl"]\n'
        "max_new_tokens = 3\n"
        '[[suites]]\nname = "talks"\nkind = "fluency"\nrole = "skill"\nfiles = ["rows.jsonl"]\n'
        "max_new_tokens = 3\n"
    )
    return folder


@pytest.fixture(scope="module")
def service(folder):
    process = subprocess.Popen(
        [
            *(STEERAGE, "serve", "--store", str(folder / "store"), "--address", "127.0.0.1:0"),
            *("--trust", str(folder / "publisher.pub"), "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield json.loads(process.stdout.readline())["address"]
    process.terminate()
    assert process.wait(timeout=20) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def digest(folder, service, make_model):
    vector = np.random.default_rng(99).standard_normal(64).astype(np.float32)
    direction = Direction(Site.parse("resid_post.1"), vector * 4, 0.5, 3.0, "difference_of_means")
    artifact = build(
        [Intervention(direction)],
        name="north",
        model=ModelReference(name="tiny", fingerprint=model_fingerprint(make_model())),
        policy=Policy(min_strength=-1.0, max_strength=1.0),
    )
    signer = Signer.from_file(folder / "publisher.key")
    with Operator(service) as operator:
        operator.publish(artifact, signer.sign(artifact.manifest_bytes))
        operator.promote(
            "north",
            artifact=artifact.digest,
            strength=0.5,
            enabled=True,
            share=1.0,
            actor="test",
            reason="test",
        )
    return artifact.digest


@pytest.fixture(scope="module")
def flags(folder, service, make_model):
    return (
        *(folder / "suites.toml", "--model", make_model(), "--address", service),
        *("--cache", folder / "cache", "--trust", folder / "publisher.pub"),
    )


def test_an_artifact_and_then_a_channels_assignment_are_evaluated(folder, flags, digest):
    out = folder / "out"
    first = evaluate(*flags, "--artifact", digest, "--out", out, "--seeds", 2, "--json")
    summary = json.loads(first.stdout)
    assert summary["artifact"] == digest
    assert summary["strengths"] == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    assert summary["seeds"] == [0, 1]
    # none, prompt, nine strengths, two random directions at eight of them; three measures.
    assert len(summary["points"]) == (2 + 9 + 2 * 8) * 3
    assert "evaluate" not in first.stderr
    page = (out / "report.html").read_text()
    assert digest in page

    shown = evaluate(*flags, "--channel", "north", "--out", out, "--suite", "knows", "--seeds", 1)
    again = json.loads((out / "summary.json").read_text())
    assert again["strengths"] == [0, 0.5]
    assert [suite["name"] for suite in again["suites"]] == ["knows"]
    assert "steered +0.5" in shown.stdout
    assert (out / "report.html").read_text() != page
    names = {"report.html", "summary.json", "completions.parquet"}
    assert {path.name for path in out.iterdir()} == names


def test_a_node_would_refuse_it_and_so_does_evaluate(folder, flags, digest):
    stranger = [folder / "stranger.pub" if str(f).endswith("publisher.pub") else f for f in flags]
    refused = evaluate(*stranger, "--artifact", digest, "--out", folder / "no", code=3)
    assert "signature" in refused.stderr
    strong = evaluate(*flags, "--artifact", digest, "--strengths", "-1,5", code=3)
    assert "policy" in strong.stderr
    assert not (folder / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "SUITES.toml"),
        (("s.toml", "--model", "m", "--trust", "k"), "--channel"),
        (("s.toml", "--model", "m", "--trust", "k", "--artifact", "a", "--channel", "c"), "either"),
        (("s.toml", "--model", "m", "--trust", "k", "--artifact", "a", "--strengths", "x"), "'x'"),
    ],
)
def test_wrong_usage_is_explained(arguments, expected):
    assert expected in evaluate(*arguments, code=2).stderr


def test_ctrl_c_ends_it_with_130_and_leaves_no_half_result(folder, flags, digest):
    out = folder / "interrupted"
    process = subprocess.Popen(
        [
            *(STEERAGE, "evaluate", *map(str, flags), "--artifact", digest),
            *("--out", str(out), "--seeds", "100000"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        # Any moment will do: importing, loading or measuring.
        time.sleep(6)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not out.exists()
