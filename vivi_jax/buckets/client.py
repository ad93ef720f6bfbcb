"""Objects of gs:// and s3:// by name, whole or in part; whatever goes wrong is one line.

Both schemes are read and written by TensorStore, which comes with Orbax: one set of tries, and any number of reads
under way. obstore is as fast, but its gs:// speaks to no emulator, so nothing here could be tested.

Accounts are those of the machine: Google's application default credentials, AWS's variables, profile or instance role.
Other servers are named by AWS_ENDPOINT_URL (with AWS_REGION), and by TENSORSTORE_GCS_HTTP_URL.
"""

import contextlib
import copy
import http
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from vivi_jax.errors import DataError

_LOG = logging.getLogger(__name__)
SCHEMES = ("gs", "s3")
ADDRESSES = tuple(f"{scheme}://" for scheme in SCHEMES)  # how the paths begin that are read here
IN_FLIGHT = 128  # requests at a time; TensorStore's own 32 are a third as fast at 50 ms each
# Some two minutes in all, of failures that may pass: busy servers (429, 5xx), lost connections, answers that were cut.
TRIES = {"max_retries": 9, "initial_delay": "500ms", "max_delay": "30s"}
MISSING = b"\x02"  # TensorStore's generation of what is not there
_RIGHTS = {
    "read": "the right to list and to read there (roles/storage.objectViewer; s3:ListBucket and s3:GetObject)",
    "write": "the right to write and to delete there (roles/storage.objectUser; s3:PutObject and s3:DeleteObject)",
}
_NOT_THERE = ".vivi_jax_is_this_listed"  # the name of no object
SAY_SECONDS = 15.0  # without an answer, until the log says so
# Read at the first request of the process: by default a server that says nothing is waited for without end.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


def cache_root() -> pathlib.Path:
    """Where what was read from buckets is kept on this machine."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vivi_jax")
    return pathlib.Path(os.environ.get("VIVI_JAX_CACHE") or default).expanduser().absolute()


class NotThere(DataError):
    """No object of this name, or no such bucket."""


class Folder:
    """What lies below gs://BUCKET/NAME or s3://BUCKET/NAME. Safe to share between threads.

    Raises:
      DataError: another scheme, or no name of a bucket. Whether the bucket is there is seen when it is read.
    """

    def __init__(self, address: str):
        import tensorstore  # half a second, and local folders need it not

        found = re.fullmatch(r"(\w+)://([^/]+)((?:/.*)?)", address)
        if not found or found[1] not in SCHEMES:
            raise DataError(f"{address}: a folder in a bucket is gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
        self.address = address.rstrip("/")
        folder = found[3].strip("/")
        spec = {"bucket": found[2], "path": f"{folder}/" if folder else ""}
        context = {
            f"{driver}_{what}": value
            for driver in ("gcs", "s3")
            for what, value in (("request_concurrency", {"limit": IN_FLIGHT}), ("request_retries", TRIES))
        }
        try:
            self._objects = tensorstore.KvStore.open(
                spec | (_s3() if found[1] == "s3" else {"driver": "gcs"}), context=tensorstore.Context(context)
            ).result()
        except ValueError as error:
            raise DataError(f"{address}: {error}") from None
        self._said = 0.0

    def below(self, name: str) -> "Folder":
        """The folder of this name in it."""
        found = copy.copy(self)
        found.address, found._objects = f"{self.address}/{name}", self._objects / f"{name}/"
        return found

    def begin(self, name: str, start: int | None = None, stop: int | None = None) -> Callable[[], bytes]:
        """Begins to read an object, or its bytes [start, stop).

        Returns:
          What waits for them. It raises DataError, and NotThere if there is no such object.
        """
        part = None if stop is None else slice(start, stop)
        future, began = self._objects.read(name, byte_range=part), time.monotonic()

        def finish() -> bytes:
            found = self._result(future, name, began)
            if found.state == "missing":
                raise self._not_there(name)
            return found.value

        return finish

    def read(self, name: str) -> bytes:
        """An object, whole; raises as `begin`."""
        return self.begin(name)()

    def look(self, name: str) -> tuple[bytes | None, bytes]:
        """An object and its generation, by which `replace` knows it again; None, MISSING where there is none."""
        found = self._result(self._objects.read(name), name, time.monotonic())
        return (None if found.state == "missing" else found.value), found.stamp.generation

    def changed(self, name: str, generation: bytes) -> tuple[bytes, bytes] | None:
        """An object and its generation; None: it is still of the one given (b"": of none)."""
        began = time.monotonic()
        found = self._result(self._objects.read(name, if_not_equal=generation), name, began)
        if found.state == "missing":
            raise self._not_there(name)
        return None if found.state == "unspecified" else (found.value, found.stamp.generation)

    def write(self, name: str, data: bytes) -> None:
        """Writes an object, in place of what is there; raises as `begin`."""
        self._result(self._objects.write(name, data), name, time.monotonic(), "write")

    def replace(self, name: str, data: bytes | None, generation: bytes) -> bytes | None:
        """Writes an object, or removes it, if what is there is of this generation (MISSING: if nothing is there).

        Returns:
          The new generation; None: it was another, and is as it was. Raises as `begin`.
        """
        began = time.monotonic()
        written = self._result(self._objects.write(name, data, if_equal=generation), name, began, "write")
        if written.generation:
            return written.generation
        there, now = self.look(name)  # a try whose answer was lost makes the next one fail
        return now if there == data else None

    def remove(self, prefix: str = "") -> None:
        """Removes all objects whose names begin so; raises as `begin`."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        with self._listing("write"):
            found = self._objects.delete_range(self._objects.KeyRange(prefix, end))
            self._result(found, prefix, time.monotonic(), "write")

    def names(self) -> set[str]:
        """Names of all objects below the folder, without its own.

        Raises:
          DataError: as `begin`; NotThere: no such bucket.
        """
        with self._listing("read"):
            found = self._result(self._objects.list(), "", time.monotonic())
        return {name.decode(errors="replace") for name in found}

    @contextlib.contextmanager
    def _listing(self, verb: str) -> Iterator[None]:
        """Around what lists: TensorStore takes a list that gs:// refuses for an empty one, or stumbles over the answer.

        Of an object that is not there the same refusal is an error, and Google says that it is not there only to those
        who may list.
        """
        try:
            yield
        finally:
            if self.address.startswith("gs://"):
                self._result(self._objects.read(_NOT_THERE), "", time.monotonic(), verb)

    def _not_there(self, name: str) -> NotThere:
        return NotThere(f"there is no {self.address}/{name}; check the names of the bucket and the folder")

    def _result(self, future: Any, name: str, began: float, verb: str = "read") -> Any:
        what = f"{self.address}/{name}" if name else self.address
        while True:
            try:
                return future.result(timeout=SAY_SECONDS)
            except TimeoutError:
                now = time.monotonic()
                if now - self._said >= SAY_SECONDS:  # of many reads at once, one speaks
                    self._said = now
                    _LOG.warning("no answer from %s for %.0f s; still trying", what, now - began)
            except ValueError as error:  # TensorStore's, of whatever kind
                raise _explained(error, verb, what, time.monotonic() - began) from None


def _s3() -> dict[str, Any]:
    """What TensorStore does not take from AWS's variables by itself."""
    spec: dict[str, Any] = {"driver": "s3"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": "us-east-1"}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def _explained(error: ValueError, verb: str, what: str, seconds: float) -> DataError:
    """The one line of a failure to read or write something."""
    text = " ".join(str(error).split())
    code = re.search(r"http_response_code='(\d+)'", text)
    status = int(code[1]) if code else None
    words = re.split(r" \[[\w-]+='", text)[0]
    tries = re.search(r"All (\d+) retry attempts failed: ", words)
    words = re.sub(r"^([A-Z_]+: )?(All \d+ retry attempts failed: )?(CURL error )?", "", words)[:300]
    if status:
        phrase = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ""
        words = f"{status} {phrase}" + ("" if words in ("Unknown", phrase) else f", {words}")
    if status == 401 or "ExpiredToken" in words:
        return DataError(
            f"cannot {verb} {what}: {words}: the account is unknown, or its login has expired; log in again "
            "(gcloud auth application-default login; or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN)"
        )
    if "PERMISSION_DENIED" in text:  # 403
        return DataError(f"cannot {verb} {what}: {words}: give the account this runs as {_RIGHTS[verb]}")
    if status == 404 or text.startswith("NOT_FOUND"):
        return NotThere(f"there is no {what}: {words}; check the names of the bucket and the folder")
    if status == 416 or text.startswith("OUT_OF_RANGE"):
        return DataError(f"{what} is shorter than it must be: it was cut, or is of another store; copy it there again")
    if tries:
        return DataError(
            f"cannot {verb} {what}: {words}, at each of {int(tries[1]) + 1} tries in {seconds:.0f} s; start the same "
            "command again when the server answers: it goes on"
        )
    return DataError(f"cannot {verb} {what}: {words}")
