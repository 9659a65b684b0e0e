"""strict, default and off; and machines that permit fewer layers, played by a server denied some calls."""

import io
import os
import re
import sys
import textwrap
import warnings

import pytest

from etpo.bench.sandbox.mix import split_processes
from etpo.envs.sandbox import Sandbox, SandboxError, SplitArrays, client, modes
from etpo.envs.sandbox.box import wire
from etpo.envs.sandbox.modes import CONSENT, CONSENT_VARIABLE, LayerReport, SandboxWarning
from tests.envs.programs import FIT, SLEEP, program, wait_until


@pytest.fixture(scope="module")
def arrays(small):
    return SplitArrays(small.x[:30], small.y[:30], small.x[30:])


@pytest.fixture
def deny(monkeypatch, tmp_path):
    """`deny("unshare", …)`: servers from now on run on a kernel that permits none of these calls."""

    def patch(*calls):
        file = tmp_path / "server.py"
        file.write_text(
            textwrap.dedent(f"""
            import os, runpy, sys
            start = {str(client.SERVER_FILE)!r}
            runpy.run_path(start)["load_package"]("box", os.path.dirname(start))
            from box import syscalls
            def refused(*args, **kwargs):
                raise PermissionError(1, "Operation not permitted")
            from box import layers
            layers.is_root = lambda: os.geteuid() == 0 and "root" not in {calls!r}
            for name in {calls!r}:
                for module in (os, syscalls):
                    if hasattr(module, name):
                        setattr(module, name, refused)
            sys.argv[0] = start
            runpy.run_path(start, run_name="__main__")
            """)
        )
        monkeypatch.setattr(client, "SERVER_FILE", file)

    return patch


LEFTOVERS = program("""
    import os, time
    os.mkdir("deep")
    open("deep/file", "w").write(os.getcwd())
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        time.sleep(1000)
    print(os.getcwd())
    return 1
""")
NAMESPACES = {wire.NETWORK_NAMESPACE, wire.PROCESS_NAMESPACE, wire.MOUNT_NAMESPACE}
ROOMS = {wire.PROCESS_NAMESPACE, wire.MOUNT_NAMESPACE}


@pytest.mark.filterwarnings("ignore::etpo.envs.sandbox.modes.SandboxWarning")
@pytest.mark.parametrize(
    ("denied", "lost"),
    [
        (["unshare"], NAMESPACES),
        (["seal_mount"], ROOMS),
        (["unshare", "landlock_abi", "install_filter"], NAMESPACES | {wire.LANDLOCK, wire.SECCOMP}),
        (["setns", "landlock_restrict", "setresuid"], ROOMS | {wire.LANDLOCK, wire.OWN_USER}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_with_fewer_layers_programs_still_run_and_leave_nothing(deny, arrays, denied, lost, monkeypatch):
    monkeypatch.setattr(client, "check_default", lambda report: None)
    deny(*denied)
    with Sandbox(workers=1, timeout_s=30.0, memory_mib=512) as box:
        layers = box.layers()
        assert lost <= set(layers.missing)
        reasons = [layers.missing[name] for name in lost]
        assert [reason for reason in reasons if not re.search("not permitted|only root", reason)] == []
        assert set(layers.in_force) | set(layers.missing) == set(wire.LAYERS)
        assert not set(layers.in_force) & set(layers.missing)
        fit, left = box.run([(FIT, arrays, 0), (LEFTOVERS, arrays, 0)])
        assert fit.outcome == "ok", fit.failure
        assert left.failure.kind == "AttributeError"
        assert not os.path.exists(left.stdout.strip())
        assert split_processes(box._process.pid) == []
        assert os.listdir(box._folder) == []
        folder = box._folder
    assert not os.path.exists(folder)


def test_only_its_own_processes_can_be_signalled_even_where_only_seccomp_stands(deny, arrays, monkeypatch):
    monkeypatch.setattr(modes, "_has_warned", True)
    monkeypatch.setattr(client, "check_default", lambda report: None)
    deny("unshare", "landlock_abi", "setresuid")
    body = """
    import os, signal
    def can(pid):
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True
    print(can(os.getpid()), can(os.getppid()), can(1))
    return 1
    """
    with Sandbox(workers=1) as box:
        if wire.SECCOMP in box.layers().missing:
            pytest.skip("this machine has no seccomp")
        assert box.run([(program(body), arrays, 0)])[0].stdout == "True False False\n"


TABLE = [
    # What is taken away; what is lost; what `default` and what `strict` say (None: they run).
    ([], set(), None, None),
    (["root"], set(), None, None),
    (["unshare"], NAMESPACES, None, "process namespace"),
    (["landlock_abi"], {wire.LANDLOCK}, None, "Landlock"),
    (["install_filter"], {wire.SECCOMP}, None, "seccomp filter"),
    (["setresuid"], {wire.OWN_USER}, None, "own user id"),
    (["root", "unshare"], NAMESPACES | {wire.OWN_USER}, None, "own user id"),
    (["unshare", "landlock_abi"], NAMESPACES | {wire.LANDLOCK},
     "needs Landlock or mount namespace, got none", "Landlock"),
    (["unshare", "install_filter"], NAMESPACES | {wire.SECCOMP},
     "needs network namespace or seccomp filter, got none", "seccomp filter"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::etpo.envs.sandbox.modes.SandboxWarning")
@pytest.mark.parametrize(
    ("denied", "lost", "default", "strict"), TABLE, ids=["-".join(row[0]) or "nothing" for row in TABLE]
)
def test_default_fails_closed_and_strict_demands_all(
    deny, sandbox, arrays, monkeypatch, denied, lost, default, strict
):
    """The table of docs/sandbox.md."""
    if sandbox.layers().missing:
        pytest.skip(f"this machine lacks {', '.join(sandbox.layers().missing)}")
    deny(*denied)
    reports = []
    check = modes.check_strict
    monkeypatch.setattr(client, "check_strict", lambda report: reports.append(report) or check(report))
    for mode, says in (("strict", strict), ("default", default)):
        if says is None:
            with Sandbox(mode, workers=1, timeout_s=30.0) as box:
                assert box.run([(FIT, arrays, 0)])[0].outcome == "ok"
                assert box.layers().missing.keys() == lost
        else:
            with pytest.raises(SandboxError) as caught, Sandbox(mode, workers=1) as box:
                box.layers()
            assert says in str(caught.value)
            assert "\n" not in str(caught.value)
            assert mode == "strict" or "--sandbox off" in str(caught.value)
    assert reports[0].missing.keys() == lost


def test_strict_refuses_in_one_line_that_names_what_is_missing(deny):
    deny("landlock_abi", "install_filter")
    with pytest.raises(SandboxError) as caught:
        Sandbox("strict", workers=1)
    message = str(caught.value)
    assert message.startswith("--sandbox strict needs all layers; not in force: ")
    assert "Landlock (Operation not permitted)" in message
    assert "seccomp filter (Operation not permitted)" in message
    assert "\n" not in message


def test_strict_runs_where_every_layer_is_in_force(sandbox, arrays):
    if sandbox.layers().missing:
        pytest.skip(f"this machine lacks {', '.join(sandbox.layers().missing)}")
    with Sandbox("strict", workers=1, timeout_s=30.0) as box:
        assert box.run([(FIT, arrays, 0)])[0].outcome == "ok"


def test_default_warns_once_of_what_is_missing(monkeypatch):
    monkeypatch.setattr(modes, "_has_warned", False)
    some = LayerReport({"Landlock": "version 7"}, {"seccomp filter": "no table"})
    with pytest.warns(SandboxWarning, match=r"without.*seccomp filter \(no table\)"):
        modes.warn_once(some)
    monkeypatch.setattr(modes, "_has_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modes.warn_once(LayerReport({"Landlock": "version 7"}, {}))
        monkeypatch.setattr(modes, "_has_warned", True)
        modes.warn_once(some)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_off_asks_twice(monkeypatch):
    monkeypatch.delenv(CONSENT_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    for answers in ("no\n", "yes\nno\n", "yes\n", "\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answers))
        with pytest.raises(SandboxError, match="not confirmed"):
            Sandbox("off")
    monkeypatch.setattr(sys, "stdin", Terminal("yes\nyes\n"))
    modes.ask_for_off()
    assert sys.stderr.getvalue().count("Type yes") == 1 + 2 + 2 + 1 + 2


@pytest.mark.parametrize("consent", [None, "1", "yes"])
def test_off_without_a_terminal_needs_the_whole_sentence(monkeypatch, consent):
    if consent is None:
        monkeypatch.delenv(CONSENT_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(CONSENT_VARIABLE, consent)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\nyes\n"))
    with pytest.raises(SandboxError, match=f"{CONSENT_VARIABLE}={CONSENT}"):
        Sandbox("off")


def test_off_keeps_processes_of_their_own_and_their_limits(monkeypatch, arrays):
    monkeypatch.setenv(CONSENT_VARIABLE, CONSENT)
    body = """
    import os
    print(os.getuid(), os.path.exists("/etc/passwd"), os.getpid())
    return bytearray(100 * 2**30)
    """
    with Sandbox("off", workers=1, timeout_s=30.0, memory_mib=512) as box:
        assert set(box.layers().missing) == set(wire.LAYERS) - {wire.LIMITS, wire.NO_NEW_PRIVILEGES}
        result = box.run([(program(body), arrays, 0)])[0]
        assert result.outcome == "memory"
        uid, sees_files, pid = result.stdout.split()
        assert (int(uid), sees_files) == (os.getuid(), "True")
        assert int(pid) not in (os.getpid(), box._process.pid)
        box.submit(SLEEP, arrays, 0, timeout_s=0.3)
        assert box.wait()[1].outcome == "timeout"
        assert wait_until(lambda: split_processes(box._process.pid) == [])
