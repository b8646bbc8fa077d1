"""Ceph's radosgw as a real S3 server: a monitor, an OSD in memory, the gateway, in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
KEY, SECRET = "steerage-test-key", "steerage-test-secret"
ATTEMPTS = 3


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in BINARIES if shutil.which(name) is None]


class Ended(Exception):
    """A daemon ended while it was waited for."""


class RadosGateway:
    """Started in `folder`; ends with `stop`.

    Attributes:
        endpoint: Its URL.
        environment: What obstore needs to reach it.
    """

    def __init__(self, folder: Path) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        for attempt in range(ATTEMPTS):
            # Somebody else may take a port between our choosing it and a daemon's binding it.
            self._folder = folder / str(attempt)
            self._folder.mkdir()
            self._monitor, self._gateway = _free_ports(2)
            try:
                self._start()
            except (subprocess.SubprocessError, OSError, Ended):
                self.stop()
                if attempt == ATTEMPTS - 1:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                break
        self.endpoint = f"http://127.0.0.1:{self._gateway}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()  # also one that is frozen
            process.wait()
        self._processes.clear()

    def freeze(self) -> None:
        """The gateway answers nothing, and its connections stay open."""
        self._processes[-1].send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._processes[-1].send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9 of the gateway; what is in the bucket stays."""
        process = self._processes.pop()
        process.kill()
        process.wait()

    def restart(self) -> None:
        """After `kill`."""
        self._daemon("radosgw", "-n", "client.admin", "-f")
        self._until(self._listens)

    def _start(self) -> None:
        folder = self._folder
        fsid = "aaaaaaaa-0000-4000-8000-000000000000"
        (folder / "ceph.conf").write_text(
            f"""[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{self._monitor}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
osd_objectstore = memstore
memstore_device_bytes = 1073741824
ms_bind_msgr2 = false
osd_crush_chooseleaf_type = 0
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
keyring = {folder}/keyring
rgw_frontends = beast endpoint=127.0.0.1:{self._gateway} tcp_nodelay=1
rgw_enable_usage_log = false
"""
        )
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        for name, caps in (("mon.", "mon"), ("client.admin", "mon")):
            create = ["--create-keyring"] if name == "mon." else []
            self._call(
                *("ceph-authtool", *create, str(folder / "keyring"), "--gen-key", "-n", name),
                *("--cap", caps, "allow *"),
            )
        monmap = str(folder / "monmap")
        self._call(
            *("monmaptool", "--create", "--clobber", "--fsid", fsid),
            *("--addv", "a", f"[v1:127.0.0.1:{self._monitor}]", monmap),
        )
        self._ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._daemon("ceph-mon", "-f", "-i", "a")
        self._until(lambda: self._ceph("ceph", "-s"))
        self._ceph("ceph-osd", "-i", "0", "--mkfs")
        osd_fsid = (folder / "osd" / "fsid").read_text().strip()
        self._ceph("ceph", "osd", "new", osd_fsid)
        self._daemon("ceph-osd", "-f", "-i", "0")
        self._ceph("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        self._daemon("radosgw", "-n", "client.admin", "-f")
        self._until(self._listens)
        self._ceph(
            *("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test"),
            *("--access-key", KEY, "--secret", SECRET),
        )

    def _listens(self) -> None:
        socket.create_connection(("127.0.0.1", self._gateway), 1).close()

    def _until(self, attempt: object, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            if any(process.poll() is not None for process in self._processes):
                raise Ended([process.args for process in self._processes])
            try:
                attempt()  # type: ignore[operator]
            except (subprocess.SubprocessError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def _daemon(self, *command: str) -> None:
        with (self._folder / f"{command[0]}.out").open("wb") as out:
            self._processes.append(
                subprocess.Popen([*command, *self._conf()], stdout=out, stderr=out)
            )

    def _ceph(self, *command: str) -> None:
        self._call(*command, *self._conf())

    def _conf(self) -> list[str]:
        return ["-c", str(self._folder / "ceph.conf")]

    def _call(self, *command: str) -> None:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            timeout=60,
            env={**os.environ, "CEPH_ARGS": ""},
        )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        # All bound at once, so that they differ.
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
