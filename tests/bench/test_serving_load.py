"""The load generator says in one line what is wrong with the server that it was given."""

from __future__ import annotations

import http.server
import threading

import pytest

from waveos.bench import serving_load
from waveos.errors import WaveError

pytest.importorskip("openai")


@pytest.fixture
def server():
    """A server that answers all with what the test puts into `says`."""

    class Answers(http.server.BaseHTTPRequestHandler):
        says = b""

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(self.says)))
            self.end_headers()
            self.wfile.write(self.says)

        def log_message(self, *about):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield Answers, f"http://127.0.0.1:{made.server_address[1]}/v1"
        made.shutdown()
        thread.join()


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(WaveError, match=r"^http://127\.0\.0\.1:1/v1: Connection error"):
        serving_load.run(url="http://127.0.0.1:1/v1")


@pytest.mark.parametrize("says", [b'{"object": "list", "data": []}', b'"a page"', b"<html>"])
def test_a_server_without_a_model_is_one_line(server, says):
    server[0].says = says
    with pytest.raises(WaveError, match="it lists no model"):
        serving_load.run(url=server[1])
