"""A TCP proxy that misbehaves on demand: what lies between a node and its service."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Final

_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Fault:
    """What the network does. Limits count the bytes to the client, on each connection anew.

    Attributes:
        delay_s: Every byte is this late, in both directions.
        held: Nothing passes and nothing is lost, as when TCP repeats packets over a dead link.
        lost: Bytes vanish, in both directions.
        refuse: New connections are closed at once.
        cut_after: Bytes until the connection ends, mid-frame (FIN).
        reset_after: Bytes until it is reset (RST).
        stall_after: Bytes until nothing more passes; the connection stays open.
    """

    delay_s: float = 0.0
    held: bool = False
    lost: bool = False
    refuse: bool = False
    cut_after: int | None = None
    reset_after: int | None = None
    stall_after: int | None = None


FINE: Final = Fault()


@dataclass(eq=False)
class _Link:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    to_client: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Proxy:
    """Forwards TCP to a service, as the present `Fault` lets it. Runs in a thread until closed.

    Attributes:
        address: host:port to dial instead of the service's.
        connections: How many were accepted.
        bytes_to_client: Over all connections.
    """

    def __init__(self, target: str, fault: Fault = FINE) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._fault = fault
        self.connections = 0
        self.bytes_to_client = 0
        self._links: set[_Link] = set()
        self._changed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        """Takes effect on the connections that are open, too."""
        self._fault = fault
        self._loop.call_soon_threadsafe(self._wake)

    def reset(self) -> None:
        """RST on all connections that are open."""
        self._loop.call_soon_threadsafe(lambda: [_reset(link) for link in list(self._links)])

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        )
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        self._loop.run_forever()
        # What is cancelled now has nobody left to tell.
        self._loop.set_exception_handler(lambda *_: None)
        server.close()
        for link in list(self._links):
            _reset(link)
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if self._fault.refuse:
                raise ConnectionError
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, far_writer)
        self._links.add(link)
        link.tasks = [
            asyncio.create_task(self._pump(link, reader, far_writer, to_client=False)),
            asyncio.create_task(self._pump(link, far_reader, writer, to_client=True)),
        ]
        await asyncio.wait(link.tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in link.tasks:
            task.cancel()
        for side in (link.near, link.far):
            side.close()
        self._links.discard(link)

    async def _pump(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        to_client: bool,
    ) -> None:
        """Read ahead into a queue, so that a delay takes no throughput."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def read() -> None:
            with contextlib.suppress(OSError):
                while chunk := await reader.read(_CHUNK):
                    await queue.put((self._loop.time(), chunk))
            await queue.put((self._loop.time(), b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                since, chunk = await queue.get()
                await asyncio.sleep(max(0.0, since + self._fault.delay_s - self._loop.time()))
                if not await self._forward(link, chunk, writer, to_client=to_client):
                    return
        except OSError:
            return
        finally:
            reading.cancel()

    async def _forward(
        self, link: _Link, chunk: bytes, writer: asyncio.StreamWriter, *, to_client: bool
    ) -> bool:
        """Pass a chunk on; False once the connection is to end."""
        while self._fault.held:
            await self._changed.wait()
        if not chunk:
            return False
        if self._fault.lost:
            return True
        if to_client:
            for limit in (self._fault.cut_after, self._fault.reset_after, self._fault.stall_after):
                if limit is not None:
                    chunk = chunk[: max(0, limit - link.to_client)]
            link.to_client += len(chunk)
            self.bytes_to_client += len(chunk)
        writer.write(chunk)
        await writer.drain()
        fault = self._fault
        if to_client:
            if fault.cut_after is not None and link.to_client >= fault.cut_after:
                return False
            if fault.reset_after is not None and link.to_client >= fault.reset_after:
                _reset(link)
                return False
            while self._fault.stall_after is not None and link.to_client >= self._fault.stall_after:
                await self._changed.wait()
        return True


def _reset(link: _Link) -> None:
    for side in (link.near, link.far):
        sock = side.get_extra_info("socket")
        if sock is not None and sock.fileno() != -1:
            # Linger of zero seconds: close sends RST and forgets what was not sent yet.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        side.transport.abort()
