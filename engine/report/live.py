"""A run's page on the loopback address, written anew whenever the run has new records."""

import errno
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from etpo import EtpoError
from etpo.engine.report.page import run_page
from etpo.engine.run_folder import RunFolder

ADDRESS = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
WAITING = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="3">'
    "<title>waiting</title><p>This run has not executed a program yet; the page looks again in 3 seconds.</p>"
)


class LivePage:
    """The newest page of a run.

    Args:
        folder: the run's; it may be written to by another process at the same time.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._lock = Lock()
        self._version = ""
        self._page = WAITING

    def version(self) -> str:
        """Names the state of the records: it changes when they grow."""
        return "-".join(str(size) for size in self.folder.sizes().values())

    def page(self) -> str:
        """The page of the newest records."""
        with self._lock:
            version = self.version()
            if version != self._version:
                try:
                    self._page, self._version = run_page(self.folder, live=version), version
                except ValueError:  # nothing was executed yet
                    self._page = WAITING
            return self._page


def server_of(folder: RunFolder, port: int) -> ThreadingHTTPServer:
    """A server of `/` and `/version` on the loopback address; `serve_forever` starts it.

    Raises:
        EtpoError: the port is taken, or not allowed.
    """
    live = LivePage(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page elsewhere may send a browser here under a name of its own (DNS rebinding).
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            answers = {"/": (live.page, "text/html"), "/version": (live.version, "text/plain")}
            if host not in NAMES or self.path not in answers:
                self.send_error(HTTPStatus.NOT_FOUND if host in NAMES else HTTPStatus.FORBIDDEN)
                return
            answer, kind = answers[self.path]
            body = answer().encode("utf-8", "replace")
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        why = "one that is taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise EtpoError(f"--port {port}: expected a free port, got {why}; choose another, or 0") from error
