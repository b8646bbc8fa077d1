"""The policy file: what is no policy, who is who by it, and reading it again."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import secure
from hypothesis import given
from hypothesis import strategies as st
from waiting import eventually

from steering_service.core.errors import InvalidInput
from steering_service.server import identities, metrics
from steering_service.server.access import ChannelRule, Unauthenticated
from steering_service.server.identities import Identities
from steering_service.server.policy import Role, parse_policy

POLICY = "".join(secure.entry(role, role) for role in Role)


def test_a_policy_that_could_not_be_read_is_read_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(identities, "LOOK_S", 0.01)
    path = tmp_path / "access.toml"
    path.write_text(secure.entry("old", "reader"))
    known = Identities(path)

    def look():
        known.version(time.monotonic())
        return [r for r in caplog.records if r.message == "access policy not taken over"]

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    path.write_text(secure.entry("latecomer", "reader"))
    tries = metrics.RELOADS.labels("policy", "error")._value
    before = tries.get()
    # The process has no file descriptor left; a file is still looked at.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        eventually(lambda: look() and tries.get() >= before + 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(look()) == 1  # told once, tried again and again
    assert known.by_token("old").name == "old"
    before = known.version(time.monotonic())
    eventually(lambda: known.version(time.monotonic()) is not before)
    assert known.by_token("latecomer").name == "latecomer"


def test_a_policy_that_cannot_be_read_stops_the_start(tmp_path):
    for text, expected in {
        "": "identity: Field required",
        "[[identity]]\nname = 'a'\nroles = ['reader']\n": "needs certificate, token_sha256",
        "[[identity]]\nname = 'a'\ncertificate = 'a'\nroles = ['admin']\n": "roles",
        "[[identity]]\nname = 'a'\ncertificate = 'a'\nroles = ['reader']\nadmin = 1\n": "admin",
        POLICY + POLICY: "is another one's already",
        "\xff": "identity",
    }.items():
        path = tmp_path / "access.toml"
        path.write_text(text)
        with pytest.raises(InvalidInput, match="access policy") as caught:
            Identities(path)
        assert caught.value.kind == "access_policy"
        assert expected in str(caught.value) or text == "\xff"
    with pytest.raises(InvalidInput, match="No such file"):
        Identities(tmp_path / "nowhere.toml")


def policy_of(folder: Path, text: str) -> Identities:
    path = folder / "access.toml"
    path.write_text(text)
    return Identities(path)


def test_the_strictest_rule_of_a_channel_counts(tmp_path):
    known = policy_of(
        tmp_path,
        POLICY
        + """
[[channel]]
name = "prod-*"
two_person = true
alone = ["off", "rollback"]
[[channel]]
name = "prod-eu"
two_person = true
alone = ["off"]
[[channel]]
name = "*"
""",
    )
    assert known.rule("prod-us") == ChannelRule(True, frozenset({"off", "rollback"}))
    assert known.rule("prod-eu") == ChannelRule(True, frozenset({"off"}))
    assert known.rule("test") == ChannelRule()
    assert Identities().rule("prod-eu") == ChannelRule()


def test_certificates_and_tokens_are_told_apart(tmp_path):
    known = policy_of(tmp_path, POLICY)
    with pytest.raises(Unauthenticated) as caught:
        known.by_certificate([secure.sha256("operator")], 0.0)
    assert caught.value.kind == "certificate_unknown"


def test_a_certificate_for_two_identities_is_refused(tmp_path):
    entry = '[[identity]]\nname = "{0}"\ncertificate = "{0}"\nroles = ["reader"]\n'
    known = policy_of(tmp_path, entry.format("a") + entry.format("b"))
    assert known.by_certificate(["a", "c"], 1e12).name == "a"
    with pytest.raises(Unauthenticated) as caught:
        known.by_certificate(["a", "b"], 1e12)
    assert caught.value.kind == "certificate_ambiguous"


@given(st.binary(max_size=300))
def test_no_bytes_are_a_policy_by_chance(data):
    with pytest.raises(InvalidInput) as caught:
        parse_policy(data)
    assert caught.value.kind == "access_policy"
