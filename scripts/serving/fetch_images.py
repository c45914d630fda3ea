"""Fetches images from http(s) URLs in requests, without giving clients access to the server's private networks.

Every host name is looked up here, again for every redirection, and the connection goes to exactly the address that was
checked: a name whose address changes a moment later (DNS rebinding) has no effect. Proxies of the environment are not
used, because they would look up names themselves.
"""

import ipaddress
import socket
import time
from collections.abc import Iterator, Sequence

import httpx

from scripts.serving.client import certificates_error
from scripts.serving.schema import ApiError

LARGEST_IMAGE = 20 * 2**20  # bytes
LARGEST_REQUEST = 32 * 2**20  # bytes of all images of a request
REQUEST_SECONDS = 20  # that all of them may take
MOST_REDIRECTIONS = 5


class ImageFetcher:
    """Fetches the content of URLs; may be called from several threads.

    Args:
        private: also fetch from this machine and its private networks.

    Raises:
        UserError: the certificates named by the environment cannot be read.
    """

    def __init__(self, private: bool = False):
        self.private = private
        try:
            authorities = httpx.create_ssl_context()  # those that the environment names
        except OSError as error:
            raise certificates_error(error) from None
        self._client = httpx.Client(
            trust_env=False,
            verify=authorities,
            headers={"Accept-Encoding": "identity"},  # compressed content may be larger than it seems
            limits=httpx.Limits(
                max_keepalive_connections=0
            ),  # a connection is known by address, its certificate by name
        )

    def __call__(self, urls: Sequence[str]) -> list[bytes]:
        """The content of these addresses.

        Raises:
            ApiError: one cannot be fetched or is not allowed, or together they are too large or too slow.
        """
        end_by, room, images = time.monotonic() + REQUEST_SECONDS, LARGEST_REQUEST, []
        for url in urls:
            try:
                images.append(self._fetch(url, min(room, LARGEST_IMAGE), end_by))
            except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, OverflowError, ValueError) as error:
                raise _refusal(url, f"cannot be fetched: {error}") from error
            room -= len(images[-1])
        return images

    def _fetch(self, url: str, room: int, end_by: float) -> bytes:
        at = httpx.URL(url)
        for _ in range(MOST_REDIRECTIONS + 1):
            reply = self._open(url, at, end_by)
            try:
                if not reply.has_redirect_location:
                    return _read(url, reply, room, end_by)
                at = at.join(reply.headers["location"])
            finally:
                reply.close()
        raise _refusal(url, f"cannot be fetched: more than {MOST_REDIRECTIONS} redirects")

    def _open(self, url: str, at: httpx.URL, end_by: float) -> httpx.Response:
        """The response, before its body is read, from the first of the host's addresses that answers."""
        if at.scheme not in ("http", "https") or not at.raw_host:
            raise _refusal(url, "cannot be fetched: it redirects to a non-http(s) URL")
        headers = {"Host": at.netloc.decode("ascii")}
        failure = None
        for address in self._machines(url, at):
            timeout = httpx.Timeout(min(10.0, _left(url, end_by)))
            request = self._client.build_request(
                "GET",
                at.copy_with(host=address),
                headers=headers,
                extensions={"sni_hostname": at.raw_host.decode("ascii")},
                timeout=timeout,
            )
            try:
                return self._client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    def _machines(self, url: str, at: httpx.URL) -> Iterator[str]:
        """The host's addresses from which this server may fetch; at least one.

        Raises:
            ApiError: there is none.
        """
        port = at.port or (443 if at.scheme == "https" else 80)
        found = socket.getaddrinfo(at.raw_host.decode("ascii"), port, type=socket.SOCK_STREAM)
        addresses = dict.fromkeys(place[0] for *_, place in found)
        allowed = [address for address in addresses if self.private or is_public(address)]
        if not allowed:
            raise _refusal(url, "points to this machine or a private network, where this server does not fetch")
        yield from allowed


def is_public(address: str) -> bool:
    """Whether an IP address is public; also for an IPv4 address embedded in an IPv6 address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour
        if wrapped is not None:
            return is_public(str(wrapped))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _read(url: str, reply: httpx.Response, room: int, end_by: float) -> bytes:
    if reply.status_code != 200:
        raise _refusal(url, f"cannot be fetched: {reply.status_code} {reply.reason_phrase}")
    data = bytearray()
    for piece in reply.iter_raw():
        data += piece
        if len(data) > room:
            raise _refusal(
                url, f"is larger than {LARGEST_IMAGE >> 20} MiB, or all are than {LARGEST_REQUEST >> 20} MiB"
            )
        _left(url, end_by)
    return bytes(data)


def _left(url: str, end_by: float) -> float:
    """Seconds left until `end_by`."""
    left = end_by - time.monotonic()
    if left <= 0:
        raise _refusal(url, f"did not arrive within the {REQUEST_SECONDS} seconds allowed for a request's images")
    return left


def _refusal(url: str, why: str) -> ApiError:
    return ApiError(400, f"the image at {url:.200} {why}", "messages")
