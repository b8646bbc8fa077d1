"""Commands that set delivery up: keygen, token, publish, serve."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.app import DELIVERY, app
from pipeline.cli.connecting import DEFAULT_ADDRESS, Service, connecting
from pipeline.cli.options import (
    DEFAULT_STORE,
    AsJson,
    RunPath,
    StoreUrl,
    TrustPaths,
    line,
    print_json,
    show,
    stderr,
    transfer,
)
from pipeline.errors import InvalidInput

if TYPE_CHECKING:
    from steering_service.core.artifact import Artifact

KeyPath = Annotated[
    Path, typer.Option("--key", help="Private key that signs; `steerage keygen` makes one.")
]
_TLS = "TLS and access"


@app.command(rich_help_panel=DELIVERY)
def keygen(
    private: Annotated[Path, typer.Argument(help="Where the private key goes (kept secret).")],
    public: Annotated[
        Path | None, typer.Argument(help="Where the public key goes; by default PRIVATE.pub.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key pair that signs artifacts and revocation lists. Nodes get the public half.

    Example: steerage keygen publisher.key
    """
    from steering_service.core.signing import generate_key

    where = public or private.with_name(f"{private.stem}.pub")
    key_id = generate_key(private, where)
    show({"private": str(private), "public": str(where), "key_id": key_id}, as_json, "Key pair")


@app.command(rich_help_panel=DELIVERY)
def token(
    path: Annotated[Path, typer.Argument(help="Where the token goes; the caller keeps it secret.")],
    as_json: AsJson = False,
) -> None:
    """Make a bearer token, and print the line of the access policy that lets it in.

    The policy holds only the token's sha256, so it is no secret. Whoever has the file is that
    caller: it is made readable for its owner only. Use it with --token-file.

    Example: steerage token gpu-17.token
    """
    secret = secrets.token_urlsafe(32)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise InvalidInput(
            f"{str(path)!r} exists; tokens are never overwritten: choose another name",
            kind="token_exists",
        ) from error
    except OSError as error:
        raise InvalidInput(
            f"cannot write {str(path)!r}: {error.strerror or error}", kind="token_file"
        ) from error
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secret}\n")
    digest = hashlib.sha256(secret.encode()).hexdigest()
    if as_json:
        print_json({"token": str(path), "token_sha256": digest})
    else:
        line(f'token_sha256 = "{digest}"')
        stderr.print(f"the token is in {path}", highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel=DELIVERY)
@connecting
def publish(
    run_file: RunPath,
    key: KeyPath,
    service: Service,
    store: StoreUrl = DEFAULT_STORE,
    direct: Annotated[
        bool,
        typer.Option("--direct", help="Write to --store itself, with no service running."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make an artifact of reduced directions or a trained controller, sign it, and publish it.

    Which sites, how they are applied and the strength limits are set under [publish] in the run
    file. Publishing the same again changes nothing; what was interrupted goes on where it stopped.

    Example: steerage publish examples/refusal.toml --key publisher.key
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
    publishing(artifact, key, store=store if direct else None, service=service)
    show(artifact_summary(artifact), as_json, "Published")


@app.command(rich_help_panel=DELIVERY)
def serve(
    store: StoreUrl = DEFAULT_STORE,
    address: Annotated[
        str,
        typer.Option(
            "--address",
            envvar="STEERAGE_ADDRESS",
            help="HOST:PORT to listen on; port 0 takes a free one.",
        ),
    ] = DEFAULT_ADDRESS,
    trust: TrustPaths = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert", help="The service's certificate, with its chain.", rich_help_panel=_TLS
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option("--tls-key", help="The certificate's private key.", rich_help_panel=_TLS),
    ] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(
            "--client-ca",
            help="Certificates of who signs clients. Without it, callers need tokens.",
            rich_help_panel=_TLS,
        ),
    ] = None,
    access: Annotated[
        Path | None,
        typer.Option(
            "--access",
            metavar="ACCESS.toml",
            help="Who may do what; examples/access.toml is one to start from.",
            rich_help_panel=_TLS,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="HOST:PORT",
            help="Serve Prometheus metrics by HTTP here; loopback only, as it asks nobody who.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the steering service until Ctrl-C.

    It keeps no state but the store, so any number may run over one store, and logs JSON on stderr.
    On loopback it needs nothing more. Any other address needs --tls-cert, --tls-key and --access:
    nothing listens without authentication. Certificates and the access policy may be changed while
    it runs; a broken new policy leaves the old one in force, and the log says so.

    Example: steerage serve --store s3://bucket/steerage --address 0.0.0.0:7433 --trust
    publisher.pub --tls-cert tls.crt --tls-key tls.key --client-ca ca.crt --access access.toml
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
        elif stderr.is_terminal:
            # Elsewhere stderr is a log of JSON, which says so itself.
            stderr.print(f"serving {store} on {bound}; Ctrl-C stops", highlight=False)

    run_server(
        store,
        address,
        trust_roots=TrustRoots.from_paths(trust) if trust else None,
        tls_certificate=tls_cert,
        tls_key=tls_key,
        client_ca=client_ca,
        access_policy=access,
        metrics_address=metrics,
        ready=ready,
    )


def publishing(artifact: Artifact, key: Path, *, store: str | None, service: Service) -> None:
    """Sign and publish, through the service or (with a store) directly."""
    from steering_service.core.signing import Signer
    from store.location import Location
    from store.registry import Registry

    signature = Signer.from_file(key).sign(artifact.manifest_bytes)
    if store is not None:
        Registry(Location.open(store)).publish(
            artifact.manifest_bytes, artifact.payload_bytes, signature
        )
        return
    size = len(artifact.payload_bytes)
    with service.operator() as operator, transfer("publish", size) as sent:
        operator.publish(artifact, signature, on_sent=sent)


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
