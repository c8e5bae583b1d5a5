"""Network namespaces of this machine for the ranks of a job, on one wire whose speed can be set.

    rank 0 namespace: eth0 10.77.0.1 --veth--\
                                              bridge and wire, in a namespace of their own
    rank 1 namespace: eth0 10.77.0.2 --veth--/

Nothing in them reaches another network: there is no interface but eth0 and loopback, and no route but to 10.77.0.0/24. What the ranks send
goes through one token bucket of tc, as on a shared medium. Buckets at each rank's own end would make links that carry both directions at
once, and of that gloo makes use by chance alone: it sends the two directions of an exchange at once if the ranks arrive within
microseconds, one after the other if not (measured: half the speed, or up to all of it).

Needs root, iproute2, and a kernel with namespaces, bridges, veth, ifb and tbf.
"""

import os
import shutil
import subprocess
from pathlib import Path

PREFIX = "llmtrain-wire"
PAYLOAD = 4096
"""Bytes of data in a full frame, as on InfiniBand."""
FRAME = PAYLOAD + 32 + 20 + 14
"""The same with the headers of TCP (with a time stamp), IP and Ethernet."""
WINDOW = 512 << 10
"""Bytes of a connection that may be on their way, so that none wait at the wire for longer than it takes to notice."""
QUEUE = 64 << 20
"""Bytes that may wait at the wire: more than all windows, so nothing is dropped."""


class NoNetwork(Exception):
    """Namespaces cannot be made here; the message says why."""


class Network:
    """A context: `ranks` namespaces and their wire exist inside it, and nothing of them afterwards. Raises NoNetwork."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.switch = f"{PREFIX}-{os.getpid()}-switch"
        self.names = [f"{PREFIX}-{os.getpid()}-{rank}" for rank in range(ranks)]

    def __enter__(self) -> "Network":
        check()
        sweep()
        try:
            self._build()
            for rate in (1e6, None):  # what a kernel lacks shows here, not in the middle of a measurement
                self.limit(rate)
        except NoNetwork as error:
            self._remove()
            raise NoNetwork(f"this machine has no namespaces, bridges, ifb devices or token buckets for us ({error})") from None
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._remove()

    def address(self, rank: int) -> str:
        """Of the rank's eth0."""
        return f"10.77.0.{rank + 1}"

    def command(self, rank: int) -> list[str]:
        """What to put before a command so that it runs in the rank's namespace."""
        return ["ip", "netns", "exec", self.names[rank]]

    def limit(self, rate: float | None) -> None:
        """Let the wire carry `rate` bits per second, frame headers included; None is as fast as this machine can."""
        limited = "ingress" in run("tc", "-n", self.switch, "qdisc", "show", "dev", "port0")
        if rate is not None:
            run("tc", "-n", self.switch, "qdisc", "replace", "dev", "wire", "root", *bucket(rate))
        for rank in range(self.ranks):
            port = ("dev", f"port{rank}")
            if rate is None and limited:
                run("tc", "-n", self.switch, "qdisc", "del", *port, "ingress")
            elif rate is not None and not limited:
                run("tc", "-n", self.switch, "qdisc", "add", *port, "handle", "ffff:", "ingress")
                everything = ("protocol", "all", "u32", "match", "u32", "0", "0")
                redirect = ("action", "mirred", "egress", "redirect", "dev", "wire")
                run("tc", "-n", self.switch, "filter", "add", *port, "parent", "ffff:", *everything, *redirect)

    def _build(self) -> None:
        run("ip", "netns", "add", self.switch)
        for name, kind in (("br0", "bridge"), ("wire", "ifb")):
            run("ip", "-n", self.switch, "link", "add", name, "type", kind)
            run("ip", "-n", self.switch, "link", "set", name, "up")
        for rank, name in enumerate(self.names):
            run("ip", "netns", "add", name)
            ends = (f"port{rank}", "mtu", str(FRAME - 14)), ("eth0", "mtu", str(FRAME - 14))
            run("ip", "-n", self.switch, "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1], "netns", name)
            run("ip", "-n", self.switch, "link", "set", f"port{rank}", "master", "br0", "up")
            run("ip", "-n", name, "address", "add", f"{self.address(rank)}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", interface, "up")
            for setting, value in (("tcp_rmem", f"4096 {WINDOW} {WINDOW}"), ("tcp_slow_start_after_idle", "0")):
                run(*self.command(rank), "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{setting}")

    def _remove(self) -> None:
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def bucket(rate: float) -> list[str]:
    """tc's words for a token bucket of `rate` bits per second.

    What may leave at once after a pause is a frame, so that small messages are as slow as large ones; timers are too coarse for less than
    200 microseconds of a fast wire.
    """
    return ["tbf", "rate", f"{int(rate)}bit", "burst", str(max(FRAME, int(rate / 8 * 200e-6))), "limit", str(QUEUE)]


def check() -> None:
    """Raise NoNetwork if tools or rights are missing."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NoNetwork(f"{' and '.join(missing)} not found: install iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise NoNetwork("network namespaces and limits on their speed need root: run it with sudo")


def refuse() -> str | None:
    """Why there can be no network here, None if there can."""
    try:
        with Network(1):
            return None
    except NoNetwork as error:
        return str(error)


def run(*words: str) -> str:
    """What a command prints; NoNetwork with its complaint if it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise NoNetwork(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def sweep() -> None:
    """Remove what a process left that was killed before it could."""
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(f"{PREFIX}-") and not Path("/proc", name.split("-")[2]).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
