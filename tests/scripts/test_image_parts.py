"""scripts/serving/image_parts.py: every form in which clients send an image."""

import base64
from urllib.parse import quote

import pytest

from scripts.serving import schema as schema
from scripts.serving.image_parts import read_base64, read_images, read_turns
from scripts.serving.schema import ApiError
from tests.scripts.vlm_weights import picture

DATA = bytes(range(256)) + b"\xfb\xff\xfe~?>" + picture("red")  # the characters of both alphabets, and padding
CODE = base64.b64encode(DATA).decode()
SAFE = base64.urlsafe_b64encode(DATA).decode()


def test_the_sample_has_what_tells_the_forms_apart():
    assert {"+", "/"} <= set(CODE)
    assert CODE.endswith("=")


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{CODE}",
        f"data:image/png;charset=utf-8;base64,{CODE}",
        f"data:image/png;name=a.png;base64,{CODE}",
        f"data:;base64,{CODE}",
        f"data:image;base64,{CODE}",
        f"DATA:IMAGE/PNG;BASE64,{CODE}",
        f"data:image/png; base64, {CODE}",
        f"  data:image/png;base64,{CODE}\n",
        f"data:image/png;base64,{SAFE}",
        f"data:image/png;base64,{CODE.rstrip('=')}",
        f"data:image/png;base64,{SAFE.rstrip('=')}",
        "data:image/png;base64," + "\r\n".join(CODE[i : i + 76] for i in range(0, len(CODE), 76)),
        "data:image/png;base64," + quote(CODE, safe=""),
        "data:image/png;base64," + quote("\n".join((CODE[:40], CODE[40:])), safe=""),
        CODE,
        SAFE.rstrip("="),
        quote(CODE, safe=""),
        "\n".join((CODE[:10], CODE[10:])),
    ],
)
def test_every_form_of_base64_is_read(url):
    assert read_base64(url) == DATA


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"data:image/png,{CODE}", "must have the form"),
        (f"data:image/png;base65,{CODE}", "must have the form"),
        ("data:image/png;base64", "must have the form"),
        ("data:image/png;base64,abcde", "base64 data is invalid"),
        (f"data:image/png;base64,{CODE[:-4]}=abc", "base64 data is invalid"),
        (f"data:image/png;base64,{CODE[:-8]}é", "base64 data is invalid"),
        (f"data:image/png;base64,{CODE[:8]}!{CODE[8:]}", "base64 data is invalid"),
        (CODE[:80] + "!" + CODE[80:], "base64 data is invalid"),
        ("file:///etc/passwd", "must be a data: URL"),
        ("/home/somebody/pictures/a/cat.png/or/so", "must be a data: URL"),
        ("a" * 31, "must be a data: URL"),
        ("ftp://127.0.0.1/" + CODE, "must be a data: URL"),
    ],
)
def test_what_is_none_says_why(url, said):
    with pytest.raises(ApiError, match=said) as caught:
        read_base64(url)
    assert (caught.value.status_code, caught.value.param) == (400, "messages")


def message(*parts) -> schema.Message:
    return schema.Message.model_validate({"role": "user", "content": [*parts]})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": CODE, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": CODE, "detail": None}, "text": None},
        {"type": "image_url", "image_url": CODE},
        {"type": "input_image", "image_url": CODE, "detail": "auto"},
        {"type": "input_image", "image_url": {"url": CODE}},
    ],
)
@pytest.mark.parametrize("text", [{"type": "text", "text": "?"}, {"type": "input_text", "text": "?"}])
def test_parts_are_read_as_chats_and_as_responses_have_them(part, text):
    turns = read_turns([message(part, text)], sees=True, fetch=None)
    assert turns == [{"role": "user", "content": [DATA, "?"]}]


def test_images_keep_their_places_wherever_they_come_from():
    asked = []

    def fetch(urls):
        asked.append(urls)
        return [url.encode() for url in urls]

    urls = ["http://a/1", CODE, " HTTPS://b/2"]
    assert read_images(urls, fetch) == [b"http://a/1", DATA, b"HTTPS://b/2"]
    assert asked == [["http://a/1", "HTTPS://b/2"]]
    with pytest.raises(ApiError, match="base64 data is invalid"):
        read_images(["http://a/1", CODE + "!"], fetch)
    assert len(asked) == 1, "nothing is fetched for a request that is refused anyway"
    assert read_images([CODE], lambda urls: pytest.fail("nothing to fetch")) == [DATA]


def test_a_request_has_at_most_sixteen_images_of_any_kind():
    part = {"type": "image_url", "image_url": CODE}
    eight = message(*[part] * 8)
    (first, second) = read_turns([eight, eight], sees=True, fetch=None)
    assert first["content"] == second["content"] == [DATA] * 8
    remote = message({"type": "image_url", "image_url": "http://a/1"})
    for more in (message(part), remote):
        with pytest.raises(ApiError, match="17 images: this server takes 16 per request"):
            read_turns([eight, more, eight], sees=True, fetch=lambda urls: pytest.fail("fetched"))


def test_a_developer_is_the_system_and_texts_are_joined():
    given = [{"role": "developer", "content": None}, {"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]
    turns = read_turns([schema.Message.model_validate(each) for each in given], sees=False, fetch=None)
    assert turns == [{"role": "system", "content": ""}, {"role": "user", "content": "aa"}]
