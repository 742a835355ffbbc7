"""An S3 server on loopback (moto's) that counts what it is asked for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    """Prints no request."""

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class Server:
    """An S3 server, with one (method, path, bytes sent) for each request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._count, threaded=True, request_handler=Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _count(self, environ: Any, start_response: Any) -> list[bytes]:
        body = b"".join(self._app(environ, start_response))
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], len(body)))
        return [body]

    def bytes_sent(self, path: str) -> int:
        return sum(size for method, asked, size in self.requests if method == "GET" and asked == path)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def serve_s3() -> Iterator[Server]:
    """A server that the environment names, with a key that it takes."""
    server = Server()
    wanted = {"AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    wanted |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wanted.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield server
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def other_client() -> Any:
    """What stands for another process: a client with its own memory of listings."""
    return fsspec.filesystem("s3", skip_instance_cache=True)
