"""What img2dataset's workers may fetch: http and https answers that end within a time and a size.

img2dataset (1.47, downloader.py) asks urllib's global opener, which also opens file:, ftp: and data: urls, reads an
answer of any length, and bounds only the wait for the next byte: a server that drips holds a thread for ever.
"""

import http.client
import io
import time
import urllib.request
from typing import Any

MAX_ANSWER_BYTES = 100 << 20
"""The largest answer read; CommonPool's images are far below."""
DEADLINE_TIMEOUTS = 6
"""An answer must be whole within this many timeouts (one timeout bounds the wait for a connection or the next byte)."""


class AnswerTooLarge(OSError):
    """The server sends, or says that it will send, more than MAX_ANSWER_BYTES."""

    def __init__(self) -> None:
        super().__init__(f"answer is larger than {MAX_ANSWER_BYTES} bytes")


class _BoundedStream(io.RawIOBase):
    """A socket's bytes, until a deadline and up to a number of them; headers included."""

    def __init__(self, source: Any, deadline: float) -> None:
        self._source, self._deadline, self._num_bytes = source, deadline, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"timed out: no whole answer within {DEADLINE_TIMEOUTS} timeouts")
        num_bytes: int | None = self._source.readinto(buffer)
        self._num_bytes += num_bytes or 0
        if self._num_bytes > MAX_ANSWER_BYTES:
            raise AnswerTooLarge
        return num_bytes

    def close(self) -> None:
        self._source.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        seconds = DEADLINE_TIMEOUTS * (sock.gettimeout() or float("inf"))
        self.fp: Any = io.BufferedReader(_BoundedStream(self.fp.detach(), time.monotonic() + seconds))

    def begin(self) -> None:
        super().begin()
        if (self.length or 0) > MAX_ANSWER_BYTES:
            raise AnswerTooLarge


class _Connection(http.client.HTTPConnection):
    response_class = _BoundedResponse


class _TlsConnection(http.client.HTTPSConnection):
    response_class = _BoundedResponse


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_TlsConnection, req)


def install_web_opener() -> None:
    """Make urllib in this process open http and https urls only, redirects included, within the bounds above.

    Proxies of the environment are used, as urllib does.  Redirects may lead to any host, as those of a browser.
    """
    opener = urllib.request.OpenerDirector()
    proxies = {k: v for k, v in urllib.request.getproxies().items() if k in ("http", "https")}
    opener.add_handler(urllib.request.ProxyHandler(proxies))
    for handler in (
        urllib.request.UnknownHandler,  # the rest: URLError "unknown url type: file"
        _HttpHandler,
        _HttpsHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    urllib.request.install_opener(opener)
