"""The commands of operator and node, as a user runs them: each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEERAGE = str(Path(sys.executable).with_name("steerage"))


def steerage(*arguments, code=0):
    done = subprocess.run([STEERAGE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def as_json(*arguments):
    return json.loads(steerage(*arguments, "--json").stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def run_file(folder, make_model):
    rows = [
        {"prompt": f"{n}: to the {side}", "label": int(side == "north"), "split": split}
        for n, split in enumerate(["train"] * 12 + ["validation"] * 6 + ["test"] * 6)
        for side in ("north", "south")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.toml"
    path.write_text(
        f'name = "heading"\n[model]\npath = "{make_model()}"\n'
        '[prompts]\nfiles = ["prompts.jsonl"]\n'
        '[publish]\nsites = ["resid_post.1", "z.1.2"]\nmin_strength = -2\nmax_strength = 2\n'
    )
    return path


@pytest.fixture(scope="module")
def keys(folder):
    steerage("keygen", folder / "publisher.key")
    steerage("keygen", folder / "stranger.key")
    return folder


@pytest.fixture(scope="module")
def service(folder, keys):
    process = subprocess.Popen(
        [
            *(STEERAGE, "serve", "--store", str(folder / "store"), "--address", "127.0.0.1:0"),
            *("--trust", str(keys / "publisher.pub"), "--json"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    yield json.loads(process.stdout.readline())["address"]
    process.terminate()
    assert process.wait(timeout=20) == 0
    process.stdout.close()


def test_the_whole_way_from_a_run_file_to_a_steered_answer(folder, run_file, keys, service):
    store = ("--store", folder / "store")
    missing = steerage("publish", run_file, "--key", keys / "publisher.key", *store, code=1)
    assert "steerage reduce" in missing.stderr
    assert as_json("extract", run_file, *store, "--workers", 1)["quarantined"] == 0
    reduced = as_json("reduce", run_file, *store, "--workers", 1)
    assert reduced["rows"]["train_positive"] == 12
    assert len(reduced["best_layers"]) == 3

    at = ("--address", service)
    publish = ("publish", run_file, *store, *at, "--key")
    assert "trusted" in steerage(*publish, keys / "stranger.key", code=3).stderr
    published = as_json(*publish, keys / "publisher.key")
    assert published["sites"] == ["resid_post.1", "z.1.2"]
    assert as_json(*publish, keys / "publisher.key") == published
    assert published["artifact"] in steerage("list", *at).stdout

    digest = published["artifact"]
    promote = ("promote", "heading", *at)
    too_strong = steerage(*promote, digest, "--strength", 5, "--reason", "x", code=3)
    assert "policy" in too_strong.stderr
    node = (
        *("steer", "heading", *at, "--cache", folder / "node", "--trust", keys / "publisher.pub"),
        *("--model", _model_of(run_file), "-p", "which way?"),
    )
    silent = steerage(*node, "--wait", 1, code=1)
    assert "promote" in silent.stderr
    answers = {}
    for revision, strength in enumerate((0, 2), start=1):
        entry = as_json(*promote, digest, "--strength", strength, "--on", "--reason", "try it")
        assert entry["revision"] == revision
        answers[strength] = as_json(*node)
        assert answers[strength]["strength"] == strength
        assert answers[strength]["revision"] == revision
    assert answers[2]["answer"] != answers[0]["answer"]
    stale = steerage(*promote, "--strength", 1, "--expect", 1, "--reason", "late", code=1)
    assert "revision" in stale.stderr
    as_json(*promote, "--off", "--reason", "incident 7")
    off = as_json(*node)
    assert (off["artifact"], off["answer"]) == (None, answers[0]["answer"])
    history = [
        json.loads(line) for line in steerage("log", "heading", *at, "--json").stdout.splitlines()
    ]
    assert [entry["revision"] for entry in history] == [1, 2, 3]
    assert history[-1]["reason"] == "incident 7"


def test_watch_prints_the_state_now_and_at_every_change(keys, service):
    at = ("--address", service)
    as_json("promote", "canary", *at, "--share", 1, "--reason", "made")
    watcher = subprocess.Popen(
        [STEERAGE, "watch", "canary", *at, "--json"], stdout=subprocess.PIPE, text=True
    )
    try:
        first = json.loads(watcher.stdout.readline())
        as_json("promote", "canary", *at, "--share", 0.25, "--reason", "first nodes")
        second = json.loads(watcher.stdout.readline())
    finally:
        watcher.kill()
        watcher.wait()
        watcher.stdout.close()
    assert (first["revision"], first["share"]) == (1, 1.0)
    assert (second["revision"], second["share"]) == (2, 0.25)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("plan", "absent.toml"), 1, "absent.toml"),
        (("plan",), 2, "RUN.toml"),
        (("extract", "--wrong"), 2, "--wrong"),
        (("promote", "c", "--address", "127.0.0.1:1"), 2, "--reason"),
        (("promote", "c", "--reason", "x"), 2, "nothing to change"),
        (("extract", "run.toml", "--device", "gpu"), 2, "cuda"),
        (("log", "c", "--address", "127.0.0.1:1"), 1, "127.0.0.1:1"),
        (("log", "c", "--address", "10.0.0.1:7433"), 3, "loopback"),
        (("serve", "--address", "0.0.0.0:7433"), 3, "loopback"),
        (("steer", "c", "--model", "nowhere", "--trust", "nowhere.pub"), 1, "nowhere"),
    ],
)
def test_a_users_mistake_gets_its_exit_code_and_a_message(arguments, code, expected, folder):
    assert expected in steerage(*arguments, code=code).stderr


def test_a_missing_gpu_is_said_before_ray_waits_for_one(folder, run_file):
    done = steerage("extract", run_file, "--store", folder / "s", "--device", "cuda", code=1)
    assert "sees no GPU" in done.stderr


def test_a_node_that_does_not_trust_the_publisher_is_refused(folder, run_file, keys, service):
    at = ("--address", service)
    published = json.loads(steerage("list", *at, "--json").stdout.splitlines()[0])["artifact"]
    as_json(
        "promote", "strict", published, *at, "--strength", 1, "--on", "--share", 1, "--reason", "x"
    )
    node = ("steer", "strict", *at, "--cache", folder / "strict", "--model", _model_of(run_file))
    refused = steerage(*node, "--trust", keys / "stranger.pub", "-p", "hi", code=3)
    assert "signature" in refused.stderr


def test_keygen_never_overwrites_a_key(keys):
    before = (keys / "publisher.key").read_bytes()
    assert "publisher.key" in steerage("keygen", keys / "publisher.key", code=1).stderr
    assert (keys / "publisher.key").read_bytes() == before


def test_ctrl_c_ends_the_service_cleanly(folder):
    process = subprocess.Popen(
        [STEERAGE, "serve", "--store", str(folder / "other"), "--address", "127.0.0.1:0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()
    process.send_signal(2)
    start = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert time.monotonic() - start < 20


def _model_of(run_file):
    line = next(line for line in run_file.read_text().splitlines() if line.startswith("path"))
    return line.split('"')[1]
