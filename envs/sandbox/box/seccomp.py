"""The system calls that a program may not make, as a seccomp filter. Standard library only.

Everything is allowed but: sockets of any kind, looking into or signalling other processes by special calls,
new namespaces and mounts, keys, new programs (`execve`), System V and POSIX message objects that would
outlive the program, and the rarely used calls in which kernels have had their holes. A call that is newer
than this table does not exist for the program (ENOSYS), so that a new kernel opens no door.

A later split, or one of another trainer on this machine, reads the same library files: locks on them,
watches, futexes in their memory and the state of their cache would carry labels from one to the other. So
would counts of the whole machine. These calls are refused, too, and those that change a file's mode, owner or
time stamps, which Landlock does not guard. Numbers that count up for the whole machine do the same: those of
pipes, memory files and process descriptors can be read off a descriptor, so none can be made.
"""

import errno
import struct

# System call numbers (x86-64, aarch64); None where the processor's table lacks the call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "unshare": (272, 97), "setns": (308, 268), "sethostname": (170, 161), "setdomainname": (171, 162),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "reboot": (169, 142),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "vhangup": (153, 58), "syslog": (103, 116),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "seccomp": (317, 277),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "lookup_dcookie": (212, 18),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "personality": (135, 92), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "execve": (59, 221), "execveat": (322, 281), "uselib": (134, None), "mknod": (133, None),
    "mknodat": (259, 33), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semctl": (66, 191), "msgget": (68, 186), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    "flock": (73, 32), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
    "futex_waitv": (449, 449), "fadvise64": (221, 223), "readahead": (187, 213), "mincore": (27, 232),
    "preadv2": (327, 286), "pwritev2": (328, 287), "cachestat": (451, 451), "sysinfo": (99, 179),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # Inode numbers of memory files and pipes come from counters of the whole machine; so do the calls of AIO.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "pipe": (22, None), "pipe2": (293, 59),
    "io_setup": (206, 0), "io_destroy": (207, 1), "io_submit": (209, 2), "io_cancel": (210, 3),
    "io_getevents": (208, 4), "io_pgetevents": (333, 292),
    "sync": (162, 81), "syncfs": (306, 267), "splice": (275, 76), "tee": (276, 77), "vmsplice": (278, 75),
}  # fmt: skip
CLONE, CLONE3, IOCTL, PRLIMIT64 = (56, 220), (435, 435), (16, 29), (302, 261)
FCNTL, FUTEX = (72, 25), (202, 98)
# Signals to others, where neither a namespace nor a user of its own keeps the program from sending them.
KILL = {
    "kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)
}  # fmt: skip
TKILL = (200, 130)  # names a thread of any process
LAST_KNOWN = 451
AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}

# New namespaces; and a process that would be the server's child, not the program's, and so never reaped.
CLONE_NEW_ANY, CLONE_PARENT, CLONE_PIDFD = 0x7E02_0000, 0x8000, 0x1000
# The only ioctls: is it a terminal, how wide, bytes waiting, close-on-exec, non-blocking.
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421)
LOCKS, LEASES_AND_WATCHES = (5, 6, 7, 36, 37, 38), (1024, 1025, 1026)
FUTEX_PRIVATE = 128

_LOAD, _AND, _EQUAL, _GREATER, _SET, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_LOW, _ARGUMENT_BYTES = 0, 4, 16, 8
_ALLOW, _KILL_PROCESS = 0x7FFF_0000, 0x8000_0000


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, operand)


def _fail(number: int) -> bytes:
    return _instruction(_RETURN, 0x0005_0000 | number)


def _load_argument(index: int) -> bytes:
    return _instruction(_LOAD, _ARGUMENT_LOW + index * _ARGUMENT_BYTES)


def _fail_where(index: int, values: tuple[int, ...]) -> bytes:
    """Refuse the call where the argument is one of the values, else allow it."""
    jumps = [_instruction(_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
    return b"".join((_load_argument(index), *jumps, _instruction(_RETURN, _ALLOW), _fail(errno.EPERM)))


def _allow_only(index: int, values: tuple[int, ...]) -> bytes:
    """Allow the call where the argument is one of the values, else refuse it."""
    jumps = [_instruction(_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
    return b"".join((_load_argument(index), *jumps, _fail(errno.ENOTTY), _instruction(_RETURN, _ALLOW)))


def seccomp_filter(machine: str, only_pid: int | None = None) -> bytes:
    """The filter as packed `struct sock_filter`s, 8 bytes each.

    Args:
        machine: `os.uname().machine`.
        only_pid: where given, signals may go to this process and to its own group only.

    Raises:
        ValueError: the processor's system calls are not in the table.
    """
    if machine not in AUDIT_ARCH:
        raise ValueError(f"no table of system calls for {machine}")
    column = list(AUDIT_ARCH).index(machine)

    def on(number: int | None, *body: bytes) -> bytes:
        """If this call is made, go through the body (which returns); else step over it."""
        if number is None:
            return b""
        return _instruction(_EQUAL, number, 0, len(b"".join(body)) // 8) + b"".join(body)

    allow = _instruction(_RETURN, _ALLOW)
    parts = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, AUDIT_ARCH[machine], 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
        _instruction(_GREATER, LAST_KNOWN, 0, 1),  # the x32 calls of x86-64 among them
        _fail(errno.ENOSYS),
        on(CLONE3[column], _fail(errno.ENOSYS)),  # its flags are out of sight; libraries turn to clone
        on(
            CLONE[column],
            _load_argument(0),
            _instruction(_SET, CLONE_NEW_ANY | CLONE_PARENT | CLONE_PIDFD, 0, 1),
            _fail(errno.EPERM),
            allow,
        ),
        # Waiting at an address that processes share ends at once, which callers take for a false alarm.
        on(
            FUTEX[column],
            _load_argument(1),
            _instruction(_SET, FUTEX_PRIVATE, 1, 0),
            _fail(errno.EINVAL),
            allow,
        ),
        on(FCNTL[column], _fail_where(1, LOCKS + LEASES_AND_WATCHES)),
        on(IOCTL[column], _allow_only(1, IOCTLS)),
        on(PRLIMIT64[column], _load_argument(0), _instruction(_EQUAL, 0, 1, 0), _fail(errno.EPERM), allow),
    ]
    if only_pid is not None:
        for numbers in KILL.values():
            to_self = [
                _load_argument(0),
                _instruction(_EQUAL, only_pid, 2, 0),
                _instruction(_EQUAL, 0, 1, 0),
                _fail(errno.EPERM),
                allow,
            ]
            parts.append(on(numbers[column], *to_self))
        parts.append(on(TKILL[column], _fail(errno.EPERM)))
    denied = sorted(numbers[column] for numbers in DENIED.values() if numbers[column] is not None)  # type: ignore[type-var]
    # One jump each to the shared refusal behind the list; a jump reaches 255 instructions.
    parts += [
        _instruction(_EQUAL, number, len(denied) - i, 0)  # type: ignore[arg-type]
        for i, number in enumerate(denied)
    ]
    parts += [allow, _fail(errno.EPERM)]
    return b"".join(parts)
