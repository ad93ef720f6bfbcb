"""What servers of buckets do wrong, against all that is done with a bucket: the right result or one line, nothing lost.

On real servers of gs:// and s3:// on this machine, behind a proxy that injects faults. What belongs to stores alone is
in test_buckets.py, to runs in test_runs_in_buckets.py, to copies in test_bucket_copies.py.
"""

import importlib.util
import pathlib
import re
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.faults import buckets
from benchmarks.faults.buckets import Fault
from helpers.frame_stores import jpeg, write_store
from input_pipeline import store
from vivi_jax.buckets import client, local
from vivi_jax.buckets.client import MISSING, Folder
from vivi_jax.errors import DataError

SERVERS = all(importlib.util.find_spec(name) for name in ("moto", "flask_cors", "gcp_storage_emulator"))


@pytest.fixture(scope="module", params=client.SCHEMES)
def server(request):
    if not SERVERS:
        pytest.skip("servers")
    with pytest.MonkeyPatch.context() as patch, buckets.serving(request.param) as proxy:
        for name, value in buckets.environment(proxy.scheme, proxy.url).items():
            patch.setenv(name, value)
        patch.setattr(client, "TRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
        yield proxy


@pytest.fixture(scope="module")
def frames(server, tmp_path_factory) -> str:
    """The address of a store of one video of four frames, alike in both buckets."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("local") / "store"
    pictures = [jpeg(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(4)]
    write_store(
        folder, [{"frames": 4, "fps": 2.0, "height": 16, "width": 16, "label": 0}], pictures, class_names=("a",)
    )
    return buckets.upload(server, folder, "store")


# ---- What is done ---------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A folder of a bucket with the object "old", and a store."""

    folder: Folder
    store: str


def replace_old(place: Place) -> object:
    data, generation = place.folder.look("old")
    return data == b"new" or bool(place.folder.replace("old", b"new", generation))


# what -> (it, its result, the objects of the folder behind it)
OLD = {"old": b"old"}
ACTIONS: dict[str, tuple[Callable[[Place], object], object, dict[str, bytes]]] = {
    "read": (lambda p: p.folder.read("old"), b"old", OLD),
    "read a part": (lambda p: p.folder.begin("old", 1, 3)(), b"ld", OLD),
    "list": (lambda p: p.folder.names(), {"old"}, OLD),
    "read a store": (lambda p: len(store.FrameStore(p.store).read(np.arange(4))), 4, OLD),
    "copy": (lambda p: pathlib.Path(local.copied(p.folder.address), "old").read_bytes(), b"old", OLD),
    "write": (lambda p: p.folder.write("new", b"data"), None, OLD | {"new": b"data"}),
    "create once": (lambda p: bool(p.folder.replace("new", b"data", MISSING)), True, OLD | {"new": b"data"}),
    "replace": (replace_old, True, {"old": b"new"}),
    "remove": (lambda p: p.folder.remove("ol"), None, {}),
}


# ---- What goes wrong ------------------------------------------------------------------------------------------------

REFUSED = b'{"error": {"code": 0, "message": "as Google says it"}}'  # which TensorStore takes for an empty list
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
FOR_EVER = {  # each request -> the line
    "login unknown": (Fault(status=401, body=REFUSED), "401 Unauthorized.* log in again"),
    "no right": (
        Fault(status=403, body=REFUSED),
        r"403 Forbidden.*: give the account .* the right to (list|write) .*\(roles/",
    ),
    "no right, says another": (Fault(status=403), r"403 Forbidden: give the account .* the right to (list|write) "),
    "busy": (Fault(status=503, body=REFUSED), r"503 Service Unavailable.*, at each of 3 tries in \d+ s; .*it goes on"),
    "failing": (Fault(status=500), r"500 Internal Server Error, at each of 3 tries in \d+ s; .*it goes on"),
    "too many": (Fault(status=429), "429 Too Many Requests, at each of 3 tries"),
    "cut": (Fault(keep=0), "at each of 3 tries"),
    "gone away": (
        Fault(status=404, body=REFUSED),
        "check the names of the bucket and the folder|is empty, or not there",
    ),
}
# The answer to a removal has nothing to be cut. What is not there need not be removed, and Google does not tell it from
# what is empty.
NO_ERROR = {("cut", "remove"), ("gone away", "remove"), ("gone away", "list")}
FOR_A_WHILE = {
    "busy": Fault(status=503),
    "failing": Fault(status=500),
    "cut": Fault(keep=0),  # a write whose answer is lost has been made
    "slow": Fault(wait=0.2),
    "repeated": Fault(repeat=True),
}


def prepared(server, frames: str, name: str, action: str, tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("VIVI_JAX_CACHE", str(tmp_path / action))
    server.fault = lambda method, path: None
    place = Place(Folder(f"{server.scheme}://{buckets.BUCKET}/{name}/{action.replace(' ', '-')}"), frames)
    place.folder.write("old", b"old")
    return place


def objects(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.names()}


@pytest.mark.parametrize("fault", FOR_EVER)
def test_what_does_not_pass_is_one_line_and_the_same_command_goes_on_afterwards(
    server, frames, fault, tmp_path, monkeypatch
):
    what, line = FOR_EVER[fault]
    for action, (do, result, after) in ACTIONS.items():
        place = prepared(server, frames, f"ever-{fault}", action, tmp_path, monkeypatch)
        server.fault = lambda method, path: what
        try:
            do(place)
        except DataError as refused:
            said = str(refused)
            assert re.search(line, said) and f"{server.scheme}://films/" in said, (action, said)
            assert "\n" not in said and len(said) < 450, (action, said)
        else:
            assert (fault, action) in NO_ERROR, action
        server.fault = lambda method, path: None
        assert objects(place.folder) in (OLD, after), action  # made or not made, and nothing half
        assert do(place) == result and objects(place.folder) == after, action


@pytest.mark.parametrize("fault", FOR_A_WHILE)
def test_what_passes_changes_nothing(server, frames, fault, tmp_path, monkeypatch):
    """The first try of each request goes wrong."""
    for action, (do, result, after) in ACTIONS.items():
        place, seen, lock = (
            prepared(server, frames, f"while-{fault}", action, tmp_path, monkeypatch),
            set(),
            threading.Lock(),
        )

        def once(method: str, path: str) -> Fault | None:
            with lock:
                request = (method, path.split("tensorstore=")[0], server.seen[-1][2])  # noqa: B023
                first = request not in seen  # noqa: B023
                seen.add(request)  # noqa: B023
                return FOR_A_WHILE[fault] if first else None

        server.fault = once
        assert do(place) == result, action
        server.fault = lambda method, path: None
        assert objects(place.folder) == after and seen, action


def test_what_never_works(server):
    """No such bucket, a scheme that is none, and a token of AWS that has expired, which is a 400 there."""
    nowhere = Folder(f"{server.scheme}://no-such-bucket/x")
    for do in (
        lambda: nowhere.read("a"),
        nowhere.names,
        lambda: nowhere.write("a", b""),
        lambda: local.copied(nowhere.address),
    ):
        with pytest.raises(DataError, match="no-such-bucket") as refused:
            do()
        assert "\n" not in str(refused.value)
    for wrong in ("hdfs://films/x", "gs:/films/x", "gs://", "films/x"):
        with pytest.raises(DataError, match=f"{wrong}: a folder in a bucket is gs://BUCKET/FOLDER or s3://"):
            Folder(wrong)
    if server.scheme == "s3":
        server.fault = lambda method, path: Fault(status=400, body=EXPIRED)
        with pytest.raises(DataError, match="its login has expired; log in again .*AWS_SESSION_TOKEN"):
            Folder("s3://films/x").read("a")
        server.fault = lambda method, path: None
