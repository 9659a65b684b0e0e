"""A server on this machine that answers as OpenML and Kaggle do, and fails as they do."""

import base64
import gzip
import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ARFF = b"""@RELATION credit
@ATTRIBUTE status {'<0','0<=X<200','no checking'}
@ATTRIBUTE other_parties {none,guarantor}
@ATTRIBUTE age NUMERIC
@ATTRIBUTE class {good,bad}
@DATA
'<0',none,67,good
'no checking',guarantor,22,bad
'0<=X<200',none,?,bad
'<0',none,45.5,bad
"""
PHARYNGITIS = b"number,age_y,radt\n1,3.5,0\n2,4.5,1\n3,6.0,1\n"
SUBMISSION = b"id,target\n1,0.5\n"
TRAIN = b"id,ph,urea,target\n1,5.5,10,0\n2,6.5,20,1\n"
NOT_FOUND = (
    '<oml:error xmlns:oml="http://openml.org/openml"><oml:code>111</oml:code>'
    "<oml:message>Unknown dataset</oml:message></oml:error>"
)
FAULTS = ("none", "404", "503", "cut", "checksum", "no such column")


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.csv", content)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Loopback"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        fault = self.server.fault
        if fault == "503":
            self.reply(b"<html>Service Unavailable<br></html>", "text/html", status=503)
        elif self.path.startswith("/api/v1/xml/data/"):
            self.openml_description(fault)
        elif self.path.startswith("/data/v1/download/"):
            self.reply(ARFF, "text/plain", cut=fault == "cut", gzipped=fault != "cut")
        elif fault == "404":
            self.reply(b'{"code":404,"message":"Not found"}', "application/json", status=404)
        elif self.path.endswith("/GetDataset"):
            self.reply(json.dumps({"currentVersionNumber": 3}).encode(), "application/json")
        elif self.path.endswith(("/DownloadDataset", "/DownloadDataFiles")):
            self.send_response(302)  # as Kaggle sends one on to its storage
            self.send_header("Location", f"{self.server.url}/storage/{self.path.rpartition('/')[2]}.zip")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            if "DataFiles" in self.path:
                content = zipped(sample_submission=SUBMISSION, test=b"id,ph,urea\n3,5.0,9\n", train=TRAIN)
            else:
                content = zipped(Pharyngitis=PHARYNGITIS if fault != "no such column" else b"a\n1\n")
            md5 = hashlib.md5(content if fault != "checksum" else b"other").digest()
            google = {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(md5).decode()}"}
            self.reply(content, "application/zip", google, cut=fault == "cut")

    do_POST = do_GET

    def openml_description(self, fault: str) -> None:
        if fault == "404":
            self.reply(NOT_FOUND.encode(), "text/xml", status=412)  # OpenML's status for an id that it lacks
            return
        md5 = hashlib.md5(ARFF if fault != "checksum" else b"other").hexdigest()
        target = "class" if fault != "no such column" else "klass"
        self.reply(
            f"""<?xml version="1.0"?>
            <oml:data_set_description xmlns:oml="http://openml.org/openml">
            <oml:id>31</oml:id><oml:name>credit-g</oml:name><oml:version>1</oml:version>
            <oml:format>ARFF</oml:format><oml:file_id>31</oml:file_id>
            <oml:url>{self.server.url}/data/v1/download/31/credit-g.arff</oml:url>
            <oml:parquet_url>{self.server.url}/never/asked.pq</oml:parquet_url>
            <oml:default_target_attribute>{target}</oml:default_target_attribute>
            <oml:status>active</oml:status><oml:md5_checksum>{md5}</oml:md5_checksum>
            </oml:data_set_description>""".encode(),
            "text/xml",
        )

    def reply(
        self, content: bytes, kind: str, headers: dict | None = None, *, status: int = 200,
        cut: bool = False, gzipped: bool = False,
    ) -> None:  # fmt: skip
        if gzipped:
            content = gzip.compress(content)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if gzipped:
            self.send_header("Content-Encoding", "gzip")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


class Loopback(ThreadingHTTPServer):
    """Serves in the background while it is a context; `fault` (of `FAULTS`) may change at any time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = "none"
        self.seen: list[tuple[str, str, dict]] = []
        self.url = f"http://localhost:{self.server_port}"

    def __enter__(self) -> "Loopback":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
