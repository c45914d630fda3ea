"""scripts/serving/fetch_images.py with a site on this machine: what it fetches, and what it never requests."""

import contextlib
import http.server
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest

from scripts.serving import fetch_images
from scripts.serving.fetch_images import ImageFetcher, is_public
from scripts.serving.schema import ApiError
from tests.running import free_port
from tests.scripts.vlm_weights import picture

RED = picture("red")


class Site:
    """A site with an image, redirects to it and elsewhere, and an endless response.

    Attributes:
        asked: (requested host, path), in order.
        leads_to: where /elsewhere redirects to.
    """

    def __init__(self):
        self.asked: list[tuple[str, str]] = []
        self.leads_to = ""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(site):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append((self.headers["Host"], self.path))
                ways = {"/moved": "/red", "/round": "/round", "/elsewhere": site.leads_to}
                self.send_response(302 if self.path in ways else {"/none": 404, "/empty": 204}.get(self.path, 200))
                if self.path in ways:
                    self.send_header("Location", ways[self.path])
                self.end_headers()
                if self.path == "/red":
                    self.wfile.write(RED)
                with contextlib.suppress(ConnectionError):  # the client has closed the connection
                    while self.path == "/flood":
                        self.wfile.write(bytes(2**20))

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def names(monkeypatch):
    """Host names and their addresses at the first, second … look-up; 127.0.0.1 counts as public."""
    known, look_up = {}, socket.getaddrinfo

    def double(host, port, *args, **kwargs):
        host = host.decode() if isinstance(host, bytes) else host
        if not host[0].isdigit():
            host = known[host].pop(0)
        return look_up(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", double)
    monkeypatch.setattr(fetch_images, "is_public", lambda address: address == "127.0.0.1")
    return known


def test_images_are_fetched_where_they_are(site):
    fetch = ImageFetcher(private=True)
    assert fetch([f"{site.address}/red", f"{site.address}/moved"]) == [RED, RED]
    for url, said in (
        (f"{site.address}/none", "404"),
        (f"{site.address}/empty", "204"),
        (f"{site.address}/round", "more than 5 redirects"),
        (f"{site.address}/flood", "larger than 20 MiB"),
        (f"http://127.0.0.1:{free_port()}/", "cannot be fetched"),
        ("http://127.0.0.1:99999/", "cannot be fetched"),
        ("http://", "cannot be fetched"),
        ("http://[", "cannot be fetched"),
        (f"http://{'a' * 300}/", "cannot be fetched"),
    ):
        with pytest.raises(ApiError, match=said) as caught:
            fetch([url])
        assert (caught.value.status_code, caught.value.param) == (400, "messages")
        assert "\n" not in caught.value.detail


def test_all_images_of_a_request_share_its_bytes_and_its_seconds(site, monkeypatch):
    fetch, red = ImageFetcher(private=True), f"{site.address}/red"
    monkeypatch.setattr(fetch_images, "LARGEST_REQUEST", 2 * len(RED))
    assert fetch([red, red]) == [RED, RED]
    with pytest.raises(ApiError, match="larger than"):
        fetch([red, red, red])
    site.asked.clear()
    clock = SimpleNamespace(monotonic=lambda: 12.0 * len(site.asked))  # each look-up takes twelve seconds
    monkeypatch.setattr(fetch_images, "time", clock)
    assert fetch([red]) == [RED]
    site.asked.clear()
    with pytest.raises(ApiError, match="did not arrive within the 20 seconds"):
        fetch([red, red])


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "127.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0177.0.0.1"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "①②⑦.0.0.1", "user:word@127.0.0.1"),
    ],
)
def test_this_machine_is_not_asked_unless_the_operator_allows_it(host, site):
    with pytest.raises(ApiError, match=r"points to this machine|cannot be fetched") as caught:
        ImageFetcher()([f"http://{host}:{site.port}/red"])
    assert caught.value.status_code == 400
    assert site.asked == []


def test_a_redirection_leads_to_no_private_address(site, names):
    names["pictures.example"] = ["127.0.0.1"]
    names["inside.example"] = ["127.0.0.2"]
    site.leads_to = f"http://inside.example:{site.port}/red"
    with pytest.raises(ApiError, match="points to this machine or a private network"):
        ImageFetcher()([f"http://pictures.example:{site.port}/elsewhere"])
    assert site.asked == [(f"pictures.example:{site.port}", "/elsewhere")]


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/red", "gopher://127.0.0.1/"])
def test_a_redirection_leads_to_http_only(place, site, names):
    names["pictures.example"] = ["127.0.0.1"]
    site.leads_to = place
    with pytest.raises(ApiError, match="cannot be fetched"):
        ImageFetcher()([f"http://pictures.example:{site.port}/elsewhere"])


def test_the_connection_goes_to_the_address_that_was_checked(site, names):
    """A name whose address changes at the second look-up is looked up only once."""
    names["pictures.example"] = ["127.0.0.1", "127.0.0.2"]
    assert ImageFetcher()([f"http://pictures.example:{site.port}/red"]) == [RED]
    assert site.asked == [(f"pictures.example:{site.port}", "/red")]
    assert names["pictures.example"] == ["127.0.0.2"]


def test_of_a_names_machines_the_private_ones_are_left_out_and_the_next_one_is_asked(site, monkeypatch):
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, site.port)) for address in ("127.0.0.2", "127.0.0.3")
    ]
    look_up = socket.getaddrinfo
    monkeypatch.setattr(fetch_images, "is_public", lambda address: address != "127.0.0.4")
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: (
            [*found, *look_up("127.0.0.4", *rest, **more), *look_up("127.0.0.1", *rest, **more)]
            if host == "pictures.example"
            else look_up(host, *rest, **more)
        ),
    )
    assert ImageFetcher()([f"http://pictures.example:{site.port}/red"]) == [RED]


def test_no_proxy_of_the_environment_is_asked(site, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert ImageFetcher(private=True)([f"{site.address}/red"]) == [RED]


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
        ),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "fe80::1", "fe80::1%1", "fc00::1", "fec0::1", "ff02::1"),
    ],
)
def test_addresses_that_are_not_the_internets(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "::ffff:8.8.8.8", "2002:808:808::", "2606:4700:4700::1111"])
def test_addresses_that_are(address):
    assert is_public(address)


def test_how_much_and_how_long_a_request_may_be():
    limits = (fetch_images.LARGEST_IMAGE, fetch_images.LARGEST_REQUEST, fetch_images.REQUEST_SECONDS)
    assert (*limits, fetch_images.MOST_REDIRECTIONS) == (20_971_520, 33_554_432, 20, 5)


@pytest.mark.parametrize(("room", "fits"), [(4, True), (3, False)])
def test_an_image_may_take_all_the_room_there_is(room, fits, monkeypatch):
    monkeypatch.setattr(fetch_images, "time", SimpleNamespace(monotonic=lambda: 0.0))
    reply = SimpleNamespace(status_code=200, iter_raw=lambda: iter([b"12", b"34"]))
    if fits:
        assert fetch_images._read("u", reply, room, 1.0) == b"1234"
    else:
        with pytest.raises(ApiError, match="is larger than 20 MiB, or all are than 32 MiB"):
            fetch_images._read("u", reply, room, 1.0)


@pytest.mark.parametrize(("now", "left"), [(9.0, 1.0), (10.0, None), (11.0, None)])
def test_the_last_moment(now, left, monkeypatch):
    monkeypatch.setattr(fetch_images, "time", SimpleNamespace(monotonic=lambda: now))
    if left:
        assert fetch_images._left("u", 10.0) == left
    else:
        with pytest.raises(ApiError, match="did not arrive within the 20 seconds"):
            fetch_images._left("u", 10.0)


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://a.example/x", 80),
        ("https://a.example/x", 443),
        ("https://a.example:81/x", 81),
        ("http://a.example:443", 443),
    ],
)
def test_the_port_of_an_address(url, port, monkeypatch):
    asked = []

    def look_up(host, at, type):
        asked.append((host, at))
        return [(2, 1, 6, "", ("8.8.8.8", at)), (2, 1, 6, "", ("8.8.8.8", at)), (2, 1, 6, "", ("1.1.1.1", at))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert list(ImageFetcher()._machines(url, httpx.URL(url))) == ["8.8.8.8", "1.1.1.1"]
    assert asked == [("a.example", port)]
