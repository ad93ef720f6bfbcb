#!/usr/bin/env bash
# tensorstore 0.1.86, driver gcs: where the server refuses a list of objects (401, 403 or 404, with the JSON that Google
# sends), KvStore.list() returns an empty list and KvStore.delete_range() ends well; neither raises. The status of the
# answer is not looked at: the body is read as a list, and has no items.
# So an account without the right to list, or whose login expires between two pages, sees a folder with nothing in it, or
# with a part of it: data that are there seem not to be, and what was to be removed stays.
# One would expect what KvStore.read() does with the same answer: PERMISSION_DENIED.
# Seen: a server that answers every request with 403; read raises, list gives [], delete_range gives None. The script
# fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorstore==0.1.86
cat >"$folder/ask.py" <<'PYTHON'
import http.server
import os
import threading

REFUSAL = b'{"error": {"code": 403, "message": "someone does not have storage.objects.list access"}}'


class Refuse(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(REFUSAL)))
        self.end_headers()
        self.wfile.write(REFUSAL)

    do_DELETE = do_POST = do_GET

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_address[1]}",
    "GCE_METADATA_ROOT": "127.0.0.1:9",
    "GOOGLE_APPLICATION_CREDENTIALS": "",
}
import tensorstore

store = tensorstore.KvStore.open("gs://bucket/folder/").result()
for ask in (lambda: store.read("x"), store.list, lambda: store.delete_range(store.KeyRange("", ""))):
    try:
        print(ask().result())
    except Exception as error:
        print(str(error).split(":")[0])
PYTHON
seen="$("$folder/venv/bin/python" "$folder/ask.py" 2>/dev/null | tr '\n' ' ')"
echo "read, list, delete_range: $seen"
[ "$seen" = "PERMISSION_DENIED [] None " ]
echo "as stated"
