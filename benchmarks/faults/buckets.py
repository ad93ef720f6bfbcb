"""Real servers of gs:// and s3:// on the loopback, and a proxy before them that injects faults."""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import NamedTuple

BUCKET = "films"
_START_SECONDS = 60.0
_COMMANDS = {
    "gs": ("gcp_storage_emulator", "start", "-q", "-M", "--default-bucket", BUCKET, "--host", "127.0.0.1", "--port"),
    "s3": ("moto.server", "-H", "127.0.0.1", "-p"),
}


class Fault(NamedTuple):
    """What the proxy does to a request instead of passing it on, or to its answer."""

    status: int = 0  # answered by the proxy itself
    body: bytes = b"no"  # of that answer
    keep: int | None = None  # bytes of the body that are sent before the connection is closed
    wait: float = 0.0  # seconds before it is passed on
    repeat: bool = False  # it is passed on twice, as networks may; the second answer counts


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server of a scheme.

    Attributes:
      fault: (method, path with query, unquoted) -> a Fault, or None; tests set it.
      seen: (method, path with query, unquoted, Range header or "") of each request.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, scheme: str, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scheme = scheme
        self.upstream = port
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.seen: list[tuple[str, str, str]] = []
        self.generations = threading.Lock()  # between looking at an object's and acting on it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Clients that go away in the middle are nothing to report."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        body = self._body()
        path = urllib.parse.unquote(self.path)
        self.server.seen.append((self.command, path, self.headers.get("Range", "")))
        fault = self.server.fault(self.command, path) or Fault()
        time.sleep(fault.wait)
        if fault.status:
            self._answer(fault.status, {}, fault.body)
            return
        for _ in range(1 + fault.repeat):
            answer = self._answer_of_server(body)
        self._answer(*answer, fault.keep)

    def _answer_of_server(self, body: bytes | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        # What gcp-storage-emulator lacks: generations, parts of lists, and a refusal of bytes behind the end.
        with self.server.generations if self.server.scheme == "gs" else contextlib.nullcontext():
            query = urllib.parse.parse_qs(self.path.partition("?")[2])
            asks = {"ifGenerationMatch", "ifGenerationNotMatch"} & query.keys() or query.get("alt") == ["media"]
            generation = self._generation(query) if asks and self.server.scheme == "gs" else None
            if generation and query.get("ifGenerationMatch", [generation]) != [generation]:
                return 412, {}, b"{}"
            if generation and query.get("ifGenerationNotMatch") == [generation]:
                return 304, {}, b""
            status, found, data = self._ask(self.command, self.path, body, headers)
        if generation:
            found["X-Goog-Generation"] = generation
        if "startOffset" in query and status == 200:
            data = _between(data, query)
        begin, _, last = found.get("Content-Range", "").removeprefix("bytes ").split("/")[0].partition("-")
        status = 416 if last and int(last) < int(begin) else status
        return status, found, data

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict) -> tuple[int, dict[str, str], bytes]:
        """The server's status, headers and body."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(method, path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        return answer.status, dict(answer.getheaders()), data

    def _generation(self, query: dict[str, list[str]]) -> str:
        """That of the object that a request names; "0": there is none."""
        place = re.search(r"/b/([^/?]+)/o/?([^?]*)", self.path)
        assert place
        name = place[2] or urllib.parse.quote(query["name"][0], safe="")
        status, _, data = self._ask("GET", f"/storage/v1/b/{place[1]}/o/{name}", None, {})
        return json.loads(data)["generation"] if status == 200 else "0"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, keep: int | None = None) -> None:
        self.send_response(status)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data[:keep])
        if keep is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, format, *args) -> None:
        """Standard error is the test's."""


def _between(listing: bytes, query: dict[str, list[str]]) -> bytes:
    """The part of a list of objects that was asked for."""
    found = json.loads(listing)
    first, end = query["startOffset"][0], query.get("endOffset", ["\U0010ffff"])[0]
    return json.dumps(found | {"items": [o for o in found.get("items", []) if first <= o["name"] < end]}).encode()


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[Proxy]:
    """A proxy before a server of this scheme with the bucket BUCKET, in a child process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TENSORSTORE_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", *_COMMANDS[scheme], str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    proxy = Proxy(scheme, port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        _wait_for(process, port)
        if scheme == "s3":
            _ask(proxy, "PUT", f"/{BUCKET}", b"")
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        process.kill()
        process.wait()


def environment(scheme: str, url: str) -> dict[str, str]:
    """The variables that make clients speak to a server of this scheme, and to no other."""
    if scheme == "gs":
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "GCE_METADATA_ROOT": "127.0.0.1:9",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # gcsfs would ask Google itself what kind of bucket it is
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _wait_for(process: subprocess.Popen, port: int) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {process.args}")


def upload(proxy: Proxy, folder: pathlib.Path, name: str) -> str:
    """Copies the files of a folder to BUCKET/NAME; returns its address."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            put(proxy, f"{name}/{path.name}", path.read_bytes())
    return f"{proxy.scheme}://{BUCKET}/{name}"


def put(proxy: Proxy, key: str, data: bytes) -> None:
    """Writes an object of BUCKET."""
    if proxy.scheme == "gs":
        path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={urllib.parse.quote(key, safe='')}"
        _ask(proxy, "POST", path, data)
    else:
        _ask(proxy, "PUT", f"/{BUCKET}/{urllib.parse.quote(key)}", data)


def _ask(proxy: Proxy, method: str, path: str, data: bytes | None = None) -> None:
    url, headers = f"http://127.0.0.1:{proxy.upstream}{path}", {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=30).close()
