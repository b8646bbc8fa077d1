"""Ceph's radosgw as a real S3 server: a monitor, an OSD in memory, the gateway, in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
KEY, SECRET = "steerage-test-key", "steerage-test-secret"


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in BINARIES if shutil.which(name) is None]


class RadosGateway:
    """Started in `folder`; ends with `stop`.

    Attributes:
        endpoint: Its URL.
        environment: What obstore needs to reach it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._monitor, self._gateway = _free_port(), _free_port()
        self.endpoint = f"http://127.0.0.1:{self._gateway}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()

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
rgw_frontends = beast endpoint=127.0.0.1:{self._gateway}
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
