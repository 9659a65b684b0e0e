"""Which layers of the box this machine permits, found out at the server's start. Imports nothing of etpo.

A layer that cannot be had is left out and its reason kept; `sandbox.py` says so, or refuses (`strict`).
"""

import contextlib
import os
from collections.abc import Iterable

from . import files as view
from . import readable, rooms, seccomp, wire
from . import syscalls as kernel

SCOPED_SIGNALS_SINCE = 6  # version of Landlock
USER_NAMESPACE = "user, process and mount namespaces"


class Layers:
    """What can be put around a program, and why not the rest. Make it before the first thread and import.

    Args:
        enforce: False for `--sandbox off`: limits only.
        folder: an empty folder of the server's own.
        hidden: paths that programs must not read, wherever they lie.

    Attributes:
        in_force: layer → in words, what holds.
        missing: layer → why it is not in force.
        rooms: new process and mount namespaces, or None.
        uid: first of the user ids that programs get, one a slot, or None.
        filter: the seccomp filter, or None.
    """

    def __init__(self, enforce: bool, folder: str, hidden: Iterable[str]) -> None:
        self.in_force = {
            wire.LIMITS: "time limit, memory limit, limits on processes and files",
            wire.NO_NEW_PRIVILEGES: "no set-user-id, no capabilities",
        }
        self.missing: dict[str, str] = {}
        self.rooms: rooms.Rooms | None = None
        self.uid: int | None = None
        self.filter: bytes | None = None
        self._abi = 0
        self._ruleset = -1
        self._paths: list[str] = []
        if not enforce:
            self.missing = {name: "switched off" for name in wire.LAYERS if name not in self.in_force}
            return
        files = readable.readable(hidden)
        self._paths = files.visible()
        self._take_user()
        self._take_namespaces(files, folder)
        self._take_landlock()
        self._take_seccomp()

    @property
    def signals_to_self_only(self) -> bool:
        """True where only the seccomp filter can keep a program from signalling other processes."""
        return self.rooms is None and self.uid is None and self._abi < SCOPED_SIGNALS_SINCE

    def ruleset(self, folder: str) -> int | None:
        """Descriptor of the Landlock rules for a program whose own folder is `folder`; for `give_back`."""
        if self._abi == 0 or self._ruleset >= 0:
            return self._ruleset if self._abi else None
        own = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        try:
            return view.landlock_rules(self._abi, self._paths, own)
        finally:
            os.close(own)

    def give_back(self, ruleset: int | None) -> None:
        """Close what `ruleset` opened for one program."""
        if ruleset is not None and ruleset != self._ruleset:
            os.close(ruleset)

    def drop(self, name: str, reason: str) -> bool:
        """Do without a layer that failed when it was tried; False where that is not possible."""
        if name not in self.in_force or name in (wire.LIMITS, wire.NO_NEW_PRIVILEGES):
            return False
        lost = (wire.PROCESS_NAMESPACE, wire.MOUNT_NAMESPACE)
        for layer in lost if name in lost else (name,):
            self.in_force.pop(layer, None)
            self.missing[layer] = reason
        if name in lost and self.in_force.get(wire.OWN_USER, "").startswith(USER_NAMESPACE):
            self.missing[wire.OWN_USER] = "only root may change users"
            del self.in_force[wire.OWN_USER]
        if name in lost and self.rooms is not None:
            self.rooms.close()
            self.rooms = None
            if self._ruleset >= 0:  # it was made for rooms
                os.close(self._ruleset)
                self._ruleset = -1
        elif name == wire.OWN_USER:
            self.uid = None
        elif name == wire.LANDLOCK:
            self._abi = 0
        elif name == wire.SECCOMP:
            self.filter = None
        return True

    def close(self) -> None:
        if self.rooms is not None:
            self.rooms.close()
            self.rooms = None

    def _take_user(self) -> None:
        self.uid = first_uid()
        if self.uid is None:
            self.missing[wire.OWN_USER] = "only root may change users"
        else:
            self.in_force[wire.OWN_USER] = f"one a process, from {self.uid}"

    def _take_namespaces(self, files: readable.Readable, folder: str) -> None:
        both = (wire.PROCESS_NAMESPACE, wire.MOUNT_NAMESPACE)
        try:
            if not is_root():
                uid, gid = os.geteuid(), os.getegid()
                kernel.unshare(kernel.CLONE_NEWUSER)
                kernel.map_own_ids(uid, gid)
            kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS)
        except OSError as error:
            for name in (wire.NETWORK_NAMESPACE, *both):
                self.missing[name] = _reason(error)
            return
        self.in_force[wire.NETWORK_NAMESPACE] = "no interface, no messages"
        try:
            self.rooms = rooms.Rooms(files, folder)
        except OSError as error:
            for name in both:
                self.missing[name] = _reason(error)
            return
        self.in_force[wire.PROCESS_NAMESPACE] = "one a process, with an init"
        if self.uid is None and not is_root():
            del self.missing[wire.OWN_USER]
            self.in_force[wire.OWN_USER] = f"{USER_NAMESPACE} in its place"
        self.in_force[wire.MOUNT_NAMESPACE] = f"the interpreter in memory, {view.PRIVATE_MIB} MiB of its own"

    def _take_landlock(self) -> None:
        try:
            self._abi = kernel.landlock_abi()
            if self.rooms is not None:
                self._ruleset = view.landlock_rules(
                    self._abi, self._paths, self.rooms.writable, self.rooms.root
                )
        except OSError as error:
            self._abi = 0
            self.missing[wire.LANDLOCK] = _reason(error)
        else:
            self.in_force[wire.LANDLOCK] = f"version {self._abi}, {len(self._paths)} readable paths"

    def _take_seccomp(self) -> None:
        try:
            self.filter = seccomp.seccomp_filter(os.uname().machine)
        except ValueError as error:
            self.missing[wire.SECCOMP] = str(error)
        else:
            self.in_force[wire.SECCOMP] = f"{len(self.filter) // 8} instructions"


def is_root() -> bool:
    """True where this process may change users, and needs no user namespace for the others."""
    return os.geteuid() == 0


def first_uid() -> int | None:
    """First of this server's user ids, one a slot; None where the server may not change its user.

    Derived from the process id, so that two servers on one machine share none.
    """
    if not is_root():
        return None
    mapped = 0
    with contextlib.suppress(FileNotFoundError), open("/proc/self/uid_map") as file:
        mapped = max(int(start) + int(length) for start, _, length in map(str.split, file))
    wanted = 1_000_000 + 256 * os.getpid()
    return wanted if wanted + 256 < mapped else 20_000 + 256 * os.getpid() % 40_000


def _reason(error: OSError) -> str:
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{error.strerror or error}"
