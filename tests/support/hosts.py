"""Hosts made of Linux namespaces, each with sshd, a home and a temporary folder of its own.

Each is a mount, PID, network and host-name namespace on a bridge that nothing leaves; all are
children of the PID namespace that `into_laptop` makes, and end with it. `ray stop`, which kills by
process name, sees no further than its host. Needs root, ip (iproute2), sshd and rsync.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = Path("/srv/home")
LAPTOP = "10.77.0.254"
_BRIDGE = "lmcot0"
_LIMIT_S = 60.0
_NAMESPACES = ("--mount", "--pid", "--uts", "--net", "--fork", "--kill-child", "--mount-proc")
_SSHD = "/usr/sbin/sshd"


def missing() -> str:
    """What keeps this machine from having such hosts; empty if nothing does."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    absent = [name for name in ("unshare", "ip", _SSHD, "ssh", "rsync") if not shutil.which(name)]
    if absent:
        return f"needs {', '.join(absent)} (Debian: util-linux iproute2 openssh-server rsync)"
    tried = subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "needs namespaces, which this machine does not give"


def into_laptop(script: Path, *arguments: str) -> list[str]:
    """The command that runs a script in namespaces of its own, with all that it starts."""
    line = shlex.join([sys.executable, str(script), *arguments])
    # Bash is process 1 there, for it takes leave of processes that others have left behind.
    return ["unshare", *_NAMESPACES, "bash", "-c", f"{line} & wait $!"]


def become_laptop() -> None:
    """The machine of the one who types: private folders, and the bridge that hosts are put on."""
    become_private("laptop")
    _ip(f"link add {_BRIDGE} type bridge")
    _ip(f"addr add {LAPTOP}/24 dev {_BRIDGE}")
    _ip(f"link set {_BRIDGE} up")
    keys = HOME / ".ssh"
    keys.mkdir(mode=0o700)
    key = str(keys / "id_ed25519")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)


def start_host(number: int, environment: Mapping[str, str]) -> str:
    """Starts a host; its address, once it answers.

    Args:
        environment: of those who log in.
    """
    address = f"10.77.0.{number}"
    key = (HOME / ".ssh" / "id_ed25519.pub").read_text(encoding="utf-8")
    shown = [f"{name}={value}" for name, value in environment.items()]
    process = subprocess.Popen(
        ["unshare", *_NAMESPACES, sys.executable, __file__, str(number), key, *shown]
    )
    # Once the new namespace is there, not before: else the cable would end in this one.
    _wait("a host's network", lambda: _network(process.pid) != _network(os.getpid()))
    _ip(f"link add cable{number} type veth peer name eth0 netns {process.pid}")
    _ip(f"link set cable{number} master {_BRIDGE} up")
    _wait(f"sshd of host {number}", lambda: _answers(address))
    return address


def _be_host(number: int, key: str, environment: list[str]) -> None:
    """Ends as sshd, which is process 1 of the host."""
    become_private(f"host{number}")
    _wait("the cable", lambda: any(name == "eth0" for _, name in socket.if_nameindex()))
    _ip(f"addr add 10.77.0.{number}/24 dev eth0")
    _ip("link set eth0 up")
    _ip(f"route add default via {LAPTOP}")  # Ray looks for the address that leads outside
    (HOME / ".ssh").mkdir(mode=0o700)
    (HOME / ".ssh" / "authorized_keys").write_text(key, encoding="utf-8")
    _environment()
    host_key = HOME / "sshd-key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)], check=True)
    options = {
        "HostKey": str(host_key), "AuthorizedKeysFile": str(HOME / ".ssh" / "authorized_keys"),
        "PermitRootLogin": "yes", "StrictModes": "no", "UsePAM": "no", "PidFile": "none",
        "MaxStartups": "100", "MaxSessions": "100", "SetEnv": " ".join(environment),
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in ("-o", f"{name} {value}")]
    os.execv(_SSHD, [_SSHD, "-D", "-f", "/dev/null", *arguments])


def _environment() -> None:
    """``~/lmcot-venv`` as a registry would have filled it: with what these tests run on.

    All but lmcot itself, which is for the cluster's own set-up to install.
    """
    venv = HOME / "lmcot-venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    tested = Path(sys.prefix)
    (site,) = (tested / "lib").glob("python3*/site-packages")
    ours = venv / site.relative_to(tested)
    (ours / "tested.pth").write_text(f"{site}\n", encoding="utf-8")
    for one in (tested / "bin").iterdir():
        mine = venv / "bin" / one.name
        if mine.exists() or one.name == "lmcot" or not one.is_file():
            continue
        text = one.read_bytes()
        shebang = f"#!{tested}/bin/python".encode()
        if text.startswith(shebang):
            rest = text.partition(b"\n")[2]
            mine.write_bytes(f"#!{venv}/bin/python\n".encode() + rest)
            mine.chmod(0o755)
        else:
            mine.symlink_to(one)


def become_private(name: str) -> None:
    """Gives a new namespace folders of its own, a home that root is taken to, and a name."""
    socket.sethostname(name)
    stash = Path("/mnt")
    _mount("-t", "tmpfs", "tmpfs", str(stash))
    (stash / "root").mkdir()
    _mount("--rbind", str(ROOT), str(stash / "root"))
    for folder in ("/tmp", "/dev/shm", "/srv", "/run"):
        _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", folder)
    if not (ROOT / "tests").exists():  # it was below one of these
        ROOT.mkdir(parents=True)
        _mount("--rbind", str(stash / "root"), str(ROOT))
    Path("/run/sshd").mkdir(mode=0o755)
    HOME.mkdir()
    users = Path("/srv/passwd")
    users.write_text(
        "".join(
            line if not line.startswith("root:") else f"root:x:0:0:root:{HOME}:/bin/bash\n"
            for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines(keepends=True)
        ),
        encoding="utf-8",
    )
    _mount("--bind", str(users), "/etc/passwd")
    os.environ["HOME"] = str(HOME)
    _ip("link set lo up")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def _network(process: int) -> str:
    return os.readlink(f"/proc/{process}/ns/net")


def _answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1):
            return True
    except OSError:
        return False


def _wait(what: str, look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_LIMIT_S:.0f} s for {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    _be_host(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
