"""Hostile programs: body of `build_model`, the outcomes that it may have, and the layers that it is held by.

All are bounded: 200 forks at most, and no signal that could reach a process outside where no layer stops it.
A body that tries many things prints those that worked; `nothing_works` then says that none may. The tests run
each of them; `etpo bench sandbox --hostile N` runs a mix on the machine at hand.
"""

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

from etpo.envs.sandbox.box import wire


@dataclass(frozen=True)
class Hostile:
    """One program.

    Attributes:
        body: of `build_model(x_train, y_train)`.
        outcomes: of a score, those that are right.
        needs: layers without which the program would do harm, or succeed.
        nothing_works: it must print [].
    """

    body: str
    outcomes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    nothing_works: bool = False

    @property
    def source(self) -> str:
        return "def build_model(x_train, y_train):\n" + textwrap.indent(self.body.strip("\n"), "    ") + "\n"


def tries(body: str) -> str:
    """A body that calls `attempt(name, action, *args)` many times and prints the names of what succeeded."""
    return f"""
import os
worked = []
def attempt(name, action, *args):
    try:
        action(*args)
    except (OSError, ValueError, LookupError, AttributeError):
        return
    worked.append(name)
{body}
print(worked)
return 1
"""


_FIT = "from sklearn.naive_bayes import GaussianNB\nreturn GaussianNB().fit(x_train, y_train)"
# What the trainer's user would not want read.
_PRIVATE = [str(Path.home()), os.getcwd(), str(Path(__file__).resolve().parents[2])]


def _model(returned: str, before: str = "") -> str:
    return f"""
{before}
class Model:
    def predict_proba(self, x):
        import numpy as np
        return {returned}
return Model()
"""


HOSTILE = {
    # time
    "endless loop": Hostile("while True: pass", ("timeout",)),
    "endless loop in C": Hostile("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", ("timeout",)),
    "endless predict": Hostile(_model("[0 for _ in iter(int, 1)]"), ("timeout",)),
    "all signals blocked": Hostile(
        "import signal\n"
        "for s in set(signal.Signals) - {9, 19}: signal.signal(s, lambda *a: None)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))\nwhile True: pass",
        ("timeout",),
    ),
    "an alarm": Hostile(
        "import signal\nsignal.signal(14, 0)\nsignal.setitimer(0, 0.01)\nwhile True: pass", ("crashed",)
    ),
    "a storm of signals": Hostile(
        "import os, signal\nsignal.signal(10, lambda *a: None)\n"
        "for _ in range(10_000): os.kill(os.getpid(), 10)\nos.kill(os.getpid(), 15)",
        ("crashed",),
    ),
    "stops itself": Hostile("import os\nos.kill(os.getpid(), 19)", ("timeout", "error")),
    "closes its result": Hostile("import os\nos.close(4)\nreturn 1", ("crashed",)),
    "a thread that outlives the answer": Hostile(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n" + _FIT, ("ok",)
    ),
    "a daemon that outlives the time-out": Hostile(
        "import os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork(): os._exit(0)\n"
        "        time.sleep(1000)\n"
        "time.sleep(1000)",
        ("timeout",),
    ),
    # processes and memory
    "fork bomb": Hostile(
        "import os, time\n"
        "for _ in range(200):\n"
        "    try:\n"
        "        if os.fork() == 0: time.sleep(1000)\n"
        "    except BlockingIOError: break\n"
        "return 1",
        ("error",),
    ),
    "thread bomb": Hostile(
        "import threading, time\n"
        "for _ in range(200): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
        ("error",),
    ),
    "100 GB": Hostile("return bytearray(100 * 2**30)", ("memory",)),
    "100 GB by numpy": Hostile("import numpy as np\nreturn np.ones(100 * 2**27)", ("memory",)),
    "100 GB by mmap": Hostile("import mmap\nreturn mmap.mmap(-1, 100 * 2**30)", ("error",)),
    "a list without end": Hostile("x = [0]\nwhile True: x += x", ("memory",)),
    "a gigabyte of output": Hostile(
        "import os\nfor _ in range(512):\n    os.write(1, bytes(2**20))\n    print('x' * 2**20)\n" + _FIT,
        ("ok",),
    ),
    "a gigabyte of result": Hostile(
        "import os\nfor _ in range(1024): os.write(4, bytes(2**20))", ("invalid_output", "crashed", "error")
    ),
    "a file of a gigabyte": Hostile("open('f', 'wb').truncate(2**30)", ("error",)),
    "its folder filled": Hostile(
        "for i in range(30):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(2**23))",
        ("error",),
        (wire.MOUNT_NAMESPACE,),
    ),
    "many small files": Hostile(
        "for i in range(10_000): open(f'f{i}', 'w').close()", ("error",), (wire.MOUNT_NAMESPACE,)
    ),
    "many descriptors": Hostile("import os\nkeep = [os.dup(1) for _ in range(10_000)]", ("error",)),
    # ends
    "deep recursion": Hostile("def f(): return f()\nf()", ("error",)),
    "deep recursion in C": Hostile(
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return sorted([x], key=f)\nf(0)",
        ("crashed", "memory"),
    ),
    "os._exit": Hostile("import os\nos._exit(0)", ("crashed",)),
    "sys.exit": Hostile("import sys\nsys.exit(0)", ("error",)),
    "abort": Hostile("import os\nos.abort()", ("crashed",)),
    "null pointer": Hostile("import ctypes\nctypes.string_at(0)", ("crashed",)),
    "os._exit in predict": Hostile(_model("__import__('os')._exit(0)"), ("crashed",)),
    "exit at the end": Hostile("import atexit, os\natexit.register(os._exit, 9)\n" + _FIT, ("ok",)),
    # other processes
    "a child for the server": Hostile(
        tries("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def clone(flags):
    pid = libc.syscall({"x86_64": 56, "aarch64": 220}[os.uname().machine], flags | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid == -1:
        raise OSError(ctypes.get_errno(), "clone")
attempt("a child of the parent's", clone, 0x8000)
"""),
        ("error",),
        (wire.SECCOMP,),
        True,
    ),
    "kills its group": Hostile("import os\nos.killpg(0, 9)", ("crashed",)),
    "kills its parent": Hostile(
        "import os\nos.kill(os.getppid() or os.getpid(), 9)", ("crashed", "error"), (wire.SECCOMP,)
    ),
    "kills init": Hostile("import os\nos.kill(1, 9)\nreturn 1", ("error",), (wire.PROCESS_NAMESPACE,)),
    "kills all": Hostile("import os\nos.kill(-1, 9)\nreturn 1", ("error",), (wire.PROCESS_NAMESPACE,)),
    "kills neighbours": Hostile(
        tries("for pid in range(2, 5000):\n    if pid != os.getpid(): attempt(pid, os.kill, pid, 9)"),
        ("error",),
        (wire.PROCESS_NAMESPACE,),
        True,
    ),
    # files
    "writes outside": Hostile(
        tries("""
for folder in ("/", "/etc", "/usr", "/var/tmp", "/root", "/home", "/dev", "/box", "/box/files", "/run"):
    attempt(folder, open, os.path.join(folder, "etpo-was-here"), "w")
    attempt(folder, os.mkdir, os.path.join(folder, "etpo-was-here"))
import sklearn, numpy
for module in (sklearn, numpy, os):
    attempt(module.__name__, open, module.__file__, "r+")
    attempt(module.__name__, os.truncate, module.__file__, 0)
    attempt(module.__name__, os.unlink, module.__file__)
    attempt(module.__name__, os.chmod, module.__file__, 0)
    attempt(module.__name__, os.utime, module.__file__)
"""),
        ("error",),
        (wire.LANDLOCK, wire.SECCOMP),
        True,
    ),
    "reads outside": Hostile(
        tries("""
for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/root/.bashrc", "/proc/1/environ", "/proc/1/mem",
             "/proc/1/maps", "/proc/kcore", "/proc/kallsyms", "/sys/kernel/notes", "/dev/mem", "/dev/kmsg",
             "/proc/%d/environ" % os.getppid()):
    attempt(path, lambda path=path: open(path, "rb").read(1))
for folder in ("/", "/root", "/home", "/var", "/etc", "/usr", "/sys", "/dev", "/proc", "../../../.."):
    attempt(folder, os.listdir, folder)
"""),
        ("error",),
        (wire.LANDLOCK,),
        True,
    ),
    "the user's folders": Hostile(
        tries(f"for folder in {_PRIVATE}: attempt(folder, os.listdir, folder)"),
        ("error",),
        (wire.LANDLOCK,),
        True,
    ),
    "links and /proc": Hostile(
        tries("""
import sklearn
for i, path in enumerate(("/etc/passwd", "/proc/1/root/etc/passwd", "/proc/self/root/etc/passwd",
             "/proc/self/cwd/../../../../etc/passwd", "/proc/thread-self/root/etc/shadow",
             os.path.dirname(sklearn.__file__) + "/datasets/data/breast_cancer.csv")):
    os.symlink(path, f"link{i}")
    attempt(path, lambda i=i: open(f"link{i}").read(1))
    attempt(path, os.link, path, f"hard{i}")
for fd in range(64):
    attempt(fd, os.listdir, f"/proc/self/fd/{fd}/..")
    attempt(fd, os.listdir, f"/dev/fd/{fd}/..")
attempt("memory of init", open, "/proc/1/mem", "r+b")
attempt("settings", open, "/proc/sys/kernel/core_pattern", "w")
attempt("trigger", open, "/proc/sysrq-trigger", "w")
attempt("device", os.mknod, "device", 0o020666, os.makedev(1, 1))
"""),
        ("error",),
        (wire.LANDLOCK, wire.MOUNT_NAMESPACE),
        True,
    ),
    "its environment": Hostile(
        "import os\nprint([k for k in os.environ if 'ETPO' in k or 'KEY' in k or 'TOKEN' in k])\nreturn 1",
        ("error",),
        (),
        True,
    ),
    # sockets and system calls
    "sockets": Hostile(
        tries("""
import socket
for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG", "AF_CAN"):
    for kind in ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW", "SOCK_SEQPACKET"):
        attempt((family, kind), lambda: socket.socket(getattr(socket, family), getattr(socket, kind)))
attempt("pair", socket.socketpair)
attempt("connection", socket.create_connection, ("127.0.0.1", 1), 1)
attempt("name", socket.getaddrinfo, "example.org", 80)
"""),
        ("error",),
        (wire.SECCOMP,),
        True,
    ),
    "system calls by ctypes": Hostile(
        tries("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) == -1:
        raise OSError(ctypes.get_errno(), name)
for name, args in (("socket", (2, 1, 0)), ("ptrace", (0, 0, 0, 0)), ("unshare", (0x10000000,)),
                   ("mount", (b"x", b".", b"tmpfs", 0, 0)), ("setns", (0, 0)), ("chroot", (b".",)),
                   ("setuid", (0,)), ("setgid", (0,)), ("execve", (b"/bin/true", 0, 0)),
                   ("shmget", (1, 4096, 0o1666)), ("personality", (0,)), ("pidfd_open", (1, 0))):
    attempt(name, call, name, *args)
me, size = os.getpid(), ctypes.c_size_t(0)
for name, number in (("keyctl", 250), ("userfaultfd", 323), ("bpf", 321), ("perf_event_open", 298),
                     ("io_uring_setup", 425), ("process_vm_readv", 310), ("clone3", 435), ("seccomp", 317)):
    attempt(name, call, "syscall", number, 0, 0, 0, 0, 0)
attempt("clone", call, "syscall", 56, 0x20000000 | 17, 0, 0, 0, 0)
attempt("x32", call, "syscall", 0x40000000 | 39)
import resource
attempt("limits", resource.setrlimit, resource.RLIMIT_NPROC, (10**6, 10**6))
attempt("other's limits", resource.prlimit, 1, resource.RLIMIT_NOFILE)
"""),
        ("error",),
        (wire.SECCOMP,),
        True,
    ),
    "messages by way of shared files": Hostile(
        tries("""
import ctypes, fcntl, mmap, struct, sklearn
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    result = getattr(libc, name)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result
library = open(sklearn.__file__, "rb")
lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)
attempt("flock", fcntl.flock, library, fcntl.LOCK_SH | fcntl.LOCK_NB)
for command in (fcntl.F_SETLK, fcntl.F_GETLK, 36, 37):
    attempt(("lock", command), fcntl.fcntl, library, command, lock)
attempt("lease", fcntl.fcntl, library, fcntl.F_SETLEASE, fcntl.F_RDLCK)
attempt("notice", fcntl.fcntl, library, fcntl.F_NOTIFY, fcntl.DN_ACCESS)
attempt("inotify", call, "inotify_init1", 0)
attempt("out of the cache", os.posix_fadvise, library.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
attempt("in the cache?", os.preadv, library.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
attempt("free memory", call, "sysinfo", ctypes.create_string_buffer(256))
attempt("time stamp", os.utime, "/dev/null")
futex = {"x86_64": 202, "aarch64": 98}[os.uname().machine]
attempt("futex", call, "syscall", futex, ctypes.create_string_buffer(8), 1, 1, 0, 0, 0)
"""),
        ("error",),
        (wire.SECCOMP, wire.MOUNT_NAMESPACE),
        True,
    ),
    "other programs": Hostile(
        tries("""
import subprocess, sys
for command in (["/bin/sh", "-c", "true"], [sys.executable, "-c", "1"], ["/usr/bin/true"]):
    attempt(command[0], subprocess.run, command)
with open("script", "w") as file:
    file.write("#!/bin/sh\\n")
attempt("own", subprocess.run, ["./script"])
attempt("interpreted", subprocess.run, ["/bin/sh", "script"])
attempt("exec", os.execv, "/bin/true", ["true"])
"""),
        ("error",),
        (wire.SECCOMP,),
        True,
    ),
    # answers
    "constants": Hostile(_model("np.full((len(x), 2), 0.5)"), ("ok",)),
    "NaN": Hostile(_model("np.full((len(x), 2), np.nan)"), ("invalid_output",)),
    "infinite": Hostile(_model("np.full((len(x), 2), np.inf)"), ("invalid_output",)),
    "a wrong shape": Hostile(_model("np.ones((len(x) + 1, 2)) / 2"), ("invalid_output",)),
    "no rows": Hostile(_model("np.ones((0, 2))"), ("invalid_output",)),
    "a huge answer": Hostile(_model("np.ones((len(x), 10**5))"), ("invalid_output", "memory")),
    "a huge shape without content": Hostile(
        _model("np.broadcast_to(np.float64(0), (2**31, 2**10))"), ("memory", "invalid_output")
    ),
    "an object": Hostile(_model("object()"), ("invalid_output",)),
    "objects": Hostile(_model("np.array([[object()] * 2] * len(x))"), ("invalid_output",)),
    "complex numbers": Hostile(_model("np.full((len(x), 2), 1j)"), ("invalid_output",)),
    "an array that raises": Hostile(
        _model("Bad()", "class Bad:\n    def __array__(self, *a, **k): raise SystemExit"), ("error",)
    ),
    "a pickle that acts": Hostile(
        _model(
            "np.array([[Act()] * 2] * len(x), dtype=object)",
            "import os, pickle\n"
            "class Act:\n"
            "    def __reduce__(self): return os.mkdir, ('/tmp/etpo-was-here',)\n"
            "os.write(4, pickle.dumps(Act()))",
        ),
        ("invalid_output", "crashed"),
    ),
    "a forged header": Hostile(
        "import os, struct\n"
        "os.write(4, struct.pack('<4sBIIIIII', b'etpo', 0, 0, 2**31, 2**31, 0, 0, 0))\nos._exit(0)",
        ("crashed",),
    ),
    "two answers": Hostile("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\n" + _FIT, ("ok",)),
    "patched libraries": Hostile(
        "import numpy as np, sklearn.metrics as m, builtins\n"
        "m.roc_auc_score = lambda *a, **k: 1.0\nnp.isfinite = lambda x: np.array(True)\n"
        "np.ascontiguousarray = lambda *a, **k: np.full((7, 7), np.nan)\n" + _FIT,
        ("invalid_output", "error"),
    ),
}  # fmt: skip
