"""Reading and preprocessing images, and placing them in prompts."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import CLIPImageProcessorPil

from model import images
from model.chat import render_chat
from model.images import ImageError, image_processor, image_token_id, prepare_chat, read_image, to_pixels
from model.model_vlm import VLMConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, by its paper's code


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth image with different values everywhere."""
    y, x = np.mgrid[:height, :width]
    channels = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1)
    return Image.fromarray(channels.astype(np.uint8))


def as_file(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def blank_png(side: int) -> bytes:
    """The beginning of a square PNG with one bit per pixel: if refused for its size, the rest is never read."""
    rows = zlib.compress(bytes(1 + math.ceil(side / 8)) * 100)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


class TestReading:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG", "TIFF"])
    def test_formats(self, kind, tmp_path):
        (tmp_path / "a").write_bytes(as_file(picture(), kind, **({"lossless": True} if kind == "WEBP" else {})))
        image = read_image(tmp_path / "a")
        assert (image.mode, image.size) == ("RGB", (40, 30))
        difference = np.abs(np.asarray(image, int) - np.asarray(picture(), int)).mean()
        assert difference < (30 if kind == "GIF" else 4)

    @pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "I;16"])
    def test_modes_show_what_a_person_sees(self, mode, tmp_path):
        grey = picture().convert("L")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        else:
            image = (picture() if mode in ("P", "CMYK", "RGBA") else grey).convert(mode)
        (tmp_path / "a").write_bytes(as_file(image, "TIFF" if mode == "CMYK" else "PNG"))
        seen = np.asarray(read_image(tmp_path / "a"), int)
        expected = np.asarray((picture() if mode in ("P", "CMYK", "RGBA") else grey).convert("RGB"), int)
        if mode == "1":
            assert set(np.unique(seen)) == {0, 255}
            assert abs(seen.mean() - expected.mean()) < 8
        else:
            assert np.abs(seen - expected).mean() < (25 if mode == "P" else 2)

    def test_clear_parts_are_white(self):
        image = picture().convert("RGBA")
        image.paste((10, 20, 30, 0), (0, 0, 20, 30))
        seen = np.asarray(read_image(as_file(image, "PNG")))
        assert (seen[:, :20] == 255).all()
        assert (seen[:, 20:] == np.asarray(picture())[:, 20:]).all()

    def test_a_photograph_is_turned_as_its_exif_says(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        seen = read_image(as_file(picture(), "PNG", exif=exif))
        assert np.array_equal(np.asarray(seen), np.rot90(np.asarray(picture()), -1))

    def test_a_path_and_bytes_are_the_same(self, tmp_path):
        (tmp_path / "a.png").write_bytes(as_file(picture(), "PNG"))
        assert read_image(tmp_path / "a.png").tobytes() == picture().tobytes()

    def test_what_is_broken_is_named(self, tmp_path):
        whole = as_file(picture(200, 200), "PNG")
        for name, content in (("cut.png", whole[:-600]), ("text.jpg", b"not an image"), ("empty.png", b"")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ImageError, match=name):
                read_image(tmp_path / name)
        with pytest.raises(ImageError, match=r"gone\.png does not exist"):
            read_image(tmp_path / "gone.png")
        with pytest.raises(ImageError, match="the image"):
            read_image(whole[:-600])

    def test_an_unreadable_exif_block_spoils_no_image(self):
        broken = as_file(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
        assert read_image(broken).size == picture().size
        png = as_file(picture(), "PNG", exif=b"Exif\x00\x00no TIFF at all")
        assert np.array_equal(read_image(png), picture())

    @pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "JPEG"])
    def test_a_sent_format_that_is_taken_opens_as_bytes(self, kind):
        assert read_image(as_file(picture(), kind)).size == (40, 30)

    @pytest.mark.parametrize("kind", ["TIFF", "ICO", "EPS"])
    def test_bytes_of_formats_that_hide_other_images_are_refused(self, kind):
        with pytest.raises(ImageError, match="not an image in a supported format"):
            read_image(as_file(picture(), kind))

    def test_no_other_program_is_started_for_a_drawing(self, tmp_path):
        (tmp_path / "a.eps").write_bytes(as_file(picture(), "EPS"))
        with pytest.raises(ImageError, match=r"a\.eps is a vector drawing \(EPS\)"):
            read_image(tmp_path / "a.eps")

    @pytest.mark.parametrize("side", [8193, 30_000])
    @pytest.mark.parametrize("from_file", [False, True])
    def test_a_small_file_of_too_many_pixels_is_never_decoded(self, side, from_file, tmp_path, monkeypatch):
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it is decoded"))
        data = blank_png(side)
        assert len(data) < 1000
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(
            ImageError, match=f"{side} x {side} pixels: at most 67 million|decompression bomb"
        ) as caught:
            read_image(tmp_path / "a.png" if from_file else data)
        assert "\n" not in str(caught.value)

    def test_the_limit_counts_pixels(self, monkeypatch):
        monkeypatch.setattr(images, "MOST_PIXELS", 40 * 30)
        assert read_image(as_file(picture(), "PNG")).size == (40, 30)
        for size in ((40, 31), (1201, 1)):
            with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels"):
                read_image(as_file(picture(*size), "PNG"))

    def test_a_photograph_of_too_many_pixels_is_read_smaller(self, monkeypatch):
        data = as_file(picture(640, 320), "JPEG")
        for most, size in ((204_800, (640, 320)), (204_799, (320, 160)), (51_199, (160, 80)), (12_799, (80, 40))):
            monkeypatch.setattr(images, "MOST_PIXELS", most)
            seen = read_image(data)
            assert seen.size == size
            assert np.abs(np.asarray(seen, int) - np.asarray(picture(*size), int)).mean() < 4
        monkeypatch.setattr(images, "MOST_PIXELS", 3_199)
        with pytest.raises(ImageError, match="640 x 320 pixels"):
            read_image(data)

    def test_a_progressive_one_is_not_as_that_is_decoded_whole_first(self, monkeypatch):
        monkeypatch.setattr(images, "MOST_PIXELS", 204_799)
        with pytest.raises(ImageError, match="640 x 320 pixels"):
            read_image(as_file(picture(640, 320), "JPEG", progressive=True))

    def test_clear_parts_are_white_in_every_band(self, monkeypatch):
        """The same as if it were composited over white in one piece."""
        alpha = picture(70, 50).convert("RGBA")
        alpha.putalpha(picture(70, 50).convert("L").rotate(180))
        white = Image.new("RGBA", alpha.size, "white")
        for band in (1, 300, 10**6):
            monkeypatch.setattr(images, "BAND", band)
            seen = read_image(as_file(alpha, "PNG"))
            assert np.array_equal(seen, Image.alpha_composite(white, alpha).convert("RGB"))


class TestPreparing:
    def test_a_folder_without_settings_gets_clips_usual_way(self, clip_dir):
        """By hand: shortest side to 32 by bicubic interpolation, centre crop, CLIP's mean and standard deviation."""
        pixels = to_pixels(image_processor(clip_dir, 32), [picture(80, 64)])
        square = np.asarray(picture(80, 64).resize((40, 32), Image.Resampling.BICUBIC))[:, 4:36] / 255
        expected = (square - np.array(MEAN)) / np.array(STD)
        assert pixels.shape == (1, 3, 32, 32)
        torch.testing.assert_close(pixels[0], torch.tensor(expected).permute(2, 0, 1).float(), atol=1e-5, rtol=1e-5)

    def test_a_folders_own_settings_count(self, tmp_path):
        own = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=[0] * 3, image_std=[1] * 3)
        own.save_pretrained(tmp_path)
        pixels = to_pixels(image_processor(tmp_path, 32), [picture(50, 20)])
        assert np.allclose(pixels[0].permute(1, 2, 0) * 255, np.asarray(picture(50, 20)), atol=1e-3)

    def test_a_long_strip_takes_no_more_than_its_middle(self, clip_dir):
        processor = image_processor(clip_dir, 32)
        strip = Image.new("RGB", (200_000, 2))  # 3,200,000 x 32 when enlarged as a whole
        strip.paste((255, 0, 0), (99_990, 0, 100_010, 2))
        pixels = to_pixels(processor, [strip])
        red = torch.tensor([(v - m) / s for v, m, s in zip((1, 0, 0), MEAN, STD, strict=True)])
        torch.testing.assert_close(pixels[0], red[:, None, None].expand(3, 32, 32), atol=1e-5, rtol=1e-5)

    def test_no_image_is_an_empty_batch(self, clip_dir):
        assert to_pixels(image_processor(clip_dir, 32), []).shape == (0, 3, 32, 32)


class TestPlacing:
    def place(self, tokenizer, clip_dir, chat, **given):
        config = VLMConfig(image_token_id=image_token_id(tokenizer), image_tokens=4, max_seq_len=200)
        return prepare_chat(tokenizer, chat, config, image_processor(clip_dir, 32), **given)

    @pytest.fixture(params=["tiny_tokenizer", "plain_tokenizer"])
    def tokenizer(self, request):
        return request.getfixturevalue(request.param)

    def test_the_id_is_the_entry_or_else_the_at_sign(self, tiny_tokenizer, plain_tokenizer):
        assert image_token_id(tiny_tokenizer) == tiny_tokenizer.convert_tokens_to_ids("<image>")
        assert image_token_id(plain_tokenizer) == plain_tokenizer.convert_tokens_to_ids("@")

    def test_images_stand_where_the_chat_has_them(self, tokenizer, clip_dir):
        red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
        chat = [
            {"role": "user", "content": [as_file(red, "PNG"), "What is this?"]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": ["And", " these", as_file(blue, "PNG"), as_file(red, "PNG"), "?"]},
        ]
        ids, images, _ = self.place(tokenizer, clip_dir, chat)
        markers = [
            {"role": "user", "content": [[-1] * 4, "\n", "What is this?"]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": ["And these", "\n", [-1] * 4, "\n", [-1] * 4, "\n", "?"]},
        ]
        expected = render_chat(tokenizer, markers, add_generation_prompt=True)[0]
        assert images["image_mask"][0].tolist() == [token == -1 for token in expected]
        assert ids[0].tolist() == [image_token_id(tokenizer) if token == -1 else token for token in expected]
        squares = to_pixels(image_processor(clip_dir, 32), [red, blue, red])
        assert torch.equal(images["pixel_values"], squares)

    def test_what_a_user_types_is_text(self, tokenizer, clip_dir):
        typed = "an @, " + "@" * 4 + " and <image> <image>\n"
        chat = [{"role": "user", "content": typed}]
        ids, images, _ = self.place(tokenizer, clip_dir, chat)
        assert images == {}
        assert typed in tokenizer.decode(ids[0])
        ids, images, _ = self.place(
            tokenizer, clip_dir, [{"role": "user", "content": [typed, as_file(picture(), "PNG")]}]
        )
        assert images["image_mask"].sum() == 4
        after_text = len(tokenizer(typed, add_special_tokens=False)["input_ids"])
        assert images["image_mask"][0].int().argmax() >= after_text
        if image_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<image>"):
            assert (ids == image_token_id(tokenizer)).sum() == 4  # the words became no entry of the vocabulary

    def test_turns_that_do_not_fit_leave_with_their_images(self, tokenizer, clip_dir):
        red, blue = (as_file(Image.new("RGB", (32, 32), colour), "PNG") for colour in ("red", "blue"))
        chat = [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [b"broken, but never looked at", "one"]},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": [red, "two"]},
            {"role": "assistant", "content": "second"},
            {"role": "user", "content": [blue, "three"]},
        ]
        whole = self.place(tokenizer, clip_dir, [chat[0], *chat[3:]])
        cut = self.place(tokenizer, clip_dir, chat, room=whole.input_ids.size(1))
        assert torch.equal(cut.input_ids, whole.input_ids)
        assert torch.equal(cut.images["pixel_values"], whole.images["pixel_values"])
        assert len(cut.images["pixel_values"]) == 2
        assert cut.turns == chat[3:]
        with pytest.raises(ValueError, match="the question takes"):
            self.place(tokenizer, clip_dir, chat, room=10)

    def test_a_broken_image_is_an_error(self, tokenizer, clip_dir):
        with pytest.raises(ImageError, match="the image"):
            self.place(tokenizer, clip_dir, [{"role": "user", "content": [b"no image"]}])
