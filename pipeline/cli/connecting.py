"""Where the service is and who one is: six flags that all commands share that talk to it."""

from __future__ import annotations

import getpass
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from steering_service.client.credentials import Credentials
    from steering_service.client.operator import Operator

DEFAULT_ADDRESS: Final = "127.0.0.1:7433"
_PANEL: Final = "Service"


def _flag(name: str, envvar: str, help: str) -> Any:
    return typer.Option(name, envvar=envvar, help=help, rich_help_panel=_PANEL, show_default=False)


Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="STEERAGE_ADDRESS",
        help="HOST:PORT of the steering service.",
        rich_help_panel=_PANEL,
    ),
]
Authority = Annotated[
    Path | None,
    _flag("--ca", "STEERAGE_CA", "Certificates of who signs services; given, TLS is used."),
]
Certificate = Annotated[
    Path | None, _flag("--cert", "STEERAGE_CERT", "Client certificate; says who you are.")
]
PrivateKey = Annotated[
    Path | None, _flag("--key-file", "STEERAGE_KEY", "The client certificate's private key.")
]
Token = Annotated[
    Path | None,
    _flag("--token-file", "STEERAGE_TOKEN_FILE", "Bearer token; `steerage token` makes one."),
]
ServerName = Annotated[
    str | None,
    _flag(
        "--server-name",
        "STEERAGE_SERVER_NAME",
        "Name in the service's certificate, where it is not the address's host.",
    ),
]


@dataclass(frozen=True, slots=True)
class Service:
    """Where the service is, and how to show it who one is.

    Attributes:
        address: HOST:PORT; only loopback without TLS.
        credentials: None where nothing was given: plain text, nobody in particular.
    """

    address: str
    credentials: Credentials | None = None

    def operator(self) -> Operator:
        """A client; to be closed by the caller."""
        from steering_service.client.operator import Operator

        return Operator(self.address, credentials=self.credentials)

    def actor(self, given: str | None) -> str | None:
        """Who the log shall name.

        Where the service knows its callers, the caller is who: then the login name, which may be
        another, would be an error. Where it does not, somebody has to be named.
        """
        if given is not None:
            return given
        if self.credentials and (self.credentials.certificate or self.credentials.token):
            return None
        return getpass.getuser()

    @property
    def flags(self) -> str:
        """What to add to a command that is shown to a user, so that it asks the same service."""
        return "" if self.address == DEFAULT_ADDRESS else f" --address {self.address}"


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which takes a keyword `service: Service`, the flags that one is made of."""
    signature = inspect.signature(command, eval_str=True)
    if "service" not in signature.parameters:
        raise TypeError(f"{command.__name__} takes no `service`")
    own = [p for p in signature.parameters.values() if p.name != "service"]

    def connected(
        address: Address = DEFAULT_ADDRESS,
        ca: Authority = None,
        cert: Certificate = None,
        key_file: PrivateKey = None,
        token_file: Token = None,
        server_name: ServerName = None,
        **arguments: Any,
    ) -> None:
        credentials = _credentials(ca, cert, key_file, token_file, server_name)
        command(service=Service(address, credentials), **arguments)

    flags = [
        p
        for p in inspect.signature(connected, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        # --json last, as everywhere.
        for p in sorted([*own, *flags], key=lambda p: p.name == "as_json")
    ]
    update_wrapper(connected, command)
    del connected.__wrapped__  # type: ignore[attr-defined]  # typer would look through
    connected.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    connected.__annotations__ = {p.name: p.annotation for p in parameters}
    return connected


def _credentials(
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    token: Path | None,
    server_name: str | None,
) -> Credentials | None:
    if not any((ca, certificate, key, token, server_name)):
        return None
    from steering_service.client.credentials import Credentials

    return Credentials(
        ca=ca, certificate=certificate, key=key, token=token, server_name=server_name
    )
