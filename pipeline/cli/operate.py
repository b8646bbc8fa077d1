"""Commands of an operator: keygen, publish, promote, serve, watch, log."""

from __future__ import annotations

import getpass
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.app import app
from pipeline.cli.options import (
    DEFAULT_ADDRESS,
    DEFAULT_STORE,
    AsJson,
    RunPath,
    ServiceAddress,
    StoreUrl,
    print_json,
    show,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from steering_service.core.artifact import Artifact

Channel = Annotated[str, typer.Argument(help="Name of the channel, such as 'refusal'.")]
KeyPath = Annotated[
    Path, typer.Option("--key", help="Private key that signs; `steerage keygen` makes one.")
]
TrustPaths = Annotated[
    list[Path] | None,
    typer.Option("--trust", help="Public key, or folder of them, that is trusted; repeatable."),
]


@app.command()
def keygen(
    private: Annotated[Path, typer.Argument(help="Where the private key goes (kept secret).")],
    public: Annotated[
        Path | None, typer.Argument(help="Where the public key goes; by default PRIVATE.pub.")
    ] = None,
) -> None:
    """Make a key pair that signs artifacts. Nodes get the public half as a trust root."""
    from steering_service.core.signing import generate_key

    where = public or private.with_name(f"{private.stem}.pub")
    key_id = generate_key(private, where)
    show({"private": str(private), "public": str(where), "key_id": key_id}, False, "Key pair")


@app.command()
def publish(
    run_file: RunPath,
    key: KeyPath,
    store: StoreUrl = DEFAULT_STORE,
    address: ServiceAddress = DEFAULT_ADDRESS,
    direct: Annotated[
        bool,
        typer.Option("--direct", help="Write to --store itself, with no service running."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make an artifact of reduced directions or a trained controller, sign it, and publish it.

    Which sites, how they are applied and the strength limits are set under [publish] in the run
    file. Publishing the same again changes nothing.
    """
    from pipeline.cli.batch import behaviours_of, planning, reduction_of
    from pipeline.cli.train import directions_of
    from pipeline.control.results import TrainedController, trained_digest
    from pipeline.reduction.artifacts import build_artifact

    run, root, planned = planning(run_file, store)
    capture = planned.cache.digest
    if run.train is not None:
        directions = directions_of(run, planned, store).digest
        trained = TrainedController.open(root, trained_digest(capture, directions, run.train))
        artifact = trained.artifact(run.publish, name=run.name, model=planned.model)
    else:
        reduction = reduction_of(run, planned, store)
        artifact = build_artifact(
            reduction,
            run.publish,
            name=run.name,
            model=planned.model,
            behaviours=behaviours_of(run, store),
        )
    publishing(artifact, key, store=store if direct else None, address=address)
    show(artifact_summary(artifact), as_json, "Published")


@app.command()
def promote(
    channel: Channel,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the channel's log.")],
    artifact: Annotated[
        str | None, typer.Argument(help="Digest; without it the channel keeps its artifact.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="Within the artifact's signed limits.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Part of the nodes that take part, 0 to 1.")
    ] = None,
    on: Annotated[
        bool | None, typer.Option("--on/--off", help="Off: every node runs the plain model.")
    ] = None,
    actor: Annotated[
        str | None, typer.Option("--actor", help="Who; by default the login name.")
    ] = None,
    expect: Annotated[
        int | None,
        typer.Option("--expect", help="Fail unless the channel is at this revision (0: new)."),
    ] = None,
    address: ServiceAddress = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Point a channel at an artifact, or change its strength, share or switch.

    Every node that watches the channel follows within a second. What is not named stays.
    """
    from steering_service.client.operator import Operator

    if (artifact, strength, share, on) == (None, None, None, None):
        raise typer.BadParameter(
            "nothing to change: name an artifact, --strength, --share or --off"
        )
    with Operator(address) as operator:
        entry = operator.promote(
            channel,
            artifact=artifact,
            strength=strength,
            enabled=on,
            share=share,
            reason=reason,
            actor=actor or getpass.getuser(),
            expected_revision=expect,
        )
    show(_plain(entry), as_json, f"Channel {channel}")


@app.command()
def serve(
    store: StoreUrl = DEFAULT_STORE,
    address: ServiceAddress = DEFAULT_ADDRESS,
    trust: TrustPaths = None,
    as_json: AsJson = False,
) -> None:
    """Run the steering service until Ctrl-C.

    It keeps no state but the store, so any number may run over one store, and logs JSON on stderr.
    Without TLS, which comes with a later release, it listens on loopback addresses only. Port 0
    takes a free one.
    """
    from steering_service.core.signing import TrustRoots
    from steering_service.server.app import serve as run_server
    from steering_service.server.logs import JsonFormatter

    # A service's log is read by machines, and what nodes refuse is told nowhere else.
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    service_log = logging.getLogger("steering_service")
    service_log.addHandler(handler)
    service_log.setLevel(logging.INFO)
    service_log.propagate = False

    def ready(bound: str) -> None:
        if as_json:
            print_json({"address": bound})
        else:
            stderr.print(f"serving {store} on {bound}; Ctrl-C stops", highlight=False)

    run_server(
        store, address, trust_roots=TrustRoots.from_paths(trust) if trust else None, ready=ready
    )


@app.command()
def watch(
    channel: Channel, address: ServiceAddress = DEFAULT_ADDRESS, as_json: AsJson = False
) -> None:
    """Print a channel's state now and at every change, until Ctrl-C or the service ends."""
    from steering_service.client.operator import Operator

    with Operator(address) as operator:
        for assignment in operator.watch(channel):
            _print_line(asdict(assignment), as_json)


@app.command()
def log(
    channel: Channel, address: ServiceAddress = DEFAULT_ADDRESS, as_json: AsJson = False
) -> None:
    """Print who changed a channel, when, how and why."""
    from steering_service.client.operator import Operator

    with Operator(address) as operator:
        for entry in operator.history(channel):
            _print_line(_plain(entry), as_json)


@app.command(name="list")
def list_artifacts(address: ServiceAddress = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List the published artifacts."""
    from steering_service.client.operator import Operator

    with Operator(address) as operator:
        for digest in operator.list():
            manifest = operator.manifest(digest).manifest
            line = {
                "artifact": digest,
                "name": manifest.name,
                "model": manifest.model.name,
                "sites": [record.site for record in manifest.interventions],
            }
            if as_json:
                print_json(line)
            else:
                sites = " ".join(record.site for record in manifest.interventions)
                stdout.print(
                    f"{digest}  {manifest.name}  {manifest.model.name}  {sites}",
                    soft_wrap=True,
                    markup=False,
                )


def publishing(artifact: Artifact, key: Path, *, store: str | None, address: str) -> None:
    """Sign and publish, through the service or (with a store) directly."""
    from steering_service.client.operator import Operator
    from steering_service.core.signing import Signer
    from store.location import Location
    from store.registry import Registry

    signature = Signer.from_file(key).sign(artifact.manifest_bytes)
    if store is not None:
        Registry(Location.open(store)).publish(
            artifact.manifest_bytes, artifact.payload_bytes, signature
        )
        return
    with Operator(address) as operator:
        operator.publish(artifact, signature)


def artifact_summary(artifact: Artifact) -> dict[str, Any]:
    """What `steerage publish --json` prints."""
    manifest = artifact.manifest
    return {
        "artifact": artifact.digest,
        "name": manifest.name,
        "kind": manifest.kind,
        "model": manifest.model.name,
        "sites": [record.site for record in manifest.interventions],
        "positions": sorted({record.positions for record in manifest.interventions}),
        "min_strength": manifest.policy.min_strength,
        "max_strength": manifest.policy.max_strength,
        "bytes": len(artifact.payload_bytes),
    }


def _plain(entry: Any) -> dict[str, Any]:
    values = asdict(entry)
    values["time"] = entry.time.isoformat()
    return values


def _print_line(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(values)
        return
    artifact = (values["artifact"] or "none")[:12]
    state = "on " if values["enabled"] else "off"
    line = (
        f"{values['channel']} r{values['revision']}  {state}  artifact {artifact}  "
        f"strength {values['strength']:g}  share {values['share']:.0%}"
    )
    if "actor" in values:
        line += f"  {values['time'][:19]}Z  {values['actor']}: {values['reason'] or '(no reason)'}"
    stdout.print(line, highlight=False, soft_wrap=True, markup=False)
