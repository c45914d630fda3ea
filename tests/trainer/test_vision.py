"""How cached features of different towers are distinguished, and in which precision they are computed."""

from types import SimpleNamespace

import pytest
import torch

from trainer import vision
from trainer.errors import UserError
from trainer.runtime import Runtime
from trainer.vision import Vision, cache_features, open_vision


class Features(list):
    folder = "there"


@pytest.fixture
def opened(clip_dir):
    return open_vision(str(clip_dir))


@pytest.fixture
def asked(monkeypatch):
    """Call `cache_features` for one image; returns what the cache is keyed by, and the inputs of its computation."""
    calls = []

    def record(images, images_path, load, encode, how, num_workers):
        calls.append((how, encode, num_workers))
        return Features(images.items())

    monkeypatch.setattr(vision, "open_feature_cache", record)

    def ask(opened: Vision, dtype: str = "float32", model=None):
        dataset = SimpleNamespace(image_hashes=lambda: {"a.png": "1a"}, images_path="images", load_pixels=None)
        args = SimpleNamespace(dtype=dtype, num_workers=3, data_path="a", images_path="images", cache_limit=0)
        run = Runtime(torch.device("cpu"), getattr(torch, dtype))
        cache_features(model, [dataset, None], args, opened, run)
        assert dataset.features == [("a.png", "1a")]
        return calls[-1]

    return ask


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (48, 48)])
def test_a_processor_of_other_sides_than_the_towers_is_refused(clip_dir, monkeypatch, height, width):
    monkeypatch.setattr(vision, "to_pixels", lambda processor, images: torch.zeros(0, 3, height, width))
    with pytest.raises(UserError, match=f"gives {width} x {height} pixels, but its tower takes 32 x 32"):
        open_vision(str(clip_dir))


def test_whatever_decides_a_feature_is_part_of_the_name(asked, opened):
    names = [asked(opened)[0], asked(opened, "bfloat16")[0], asked(opened._replace(hash="other"))[0]]
    assert asked(opened)[0] == names[0]
    opened.processor.do_center_crop = False
    names.append(asked(opened)[0])
    settings = {"hidden_act": "gelu", "num_attention_heads": 1, "layer_norm_eps": 0.5, "image_size": 7, "patch_size": 7}
    for name, value in settings.items():
        setattr(opened.tower.config, name, value)
        names.append(asked(opened)[0])
    assert len(set(names)) == len(names) == 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_features_are_computed_in_the_run_s_precision(asked, opened, dtype):
    seen = []

    class Model:
        @staticmethod
        def encode_images(pixels):
            seen.append(torch.is_autocast_enabled("cpu"))
            return pixels

    _, encode, workers = asked(opened, dtype, Model)
    encode(torch.zeros(1))
    assert seen == [dtype == "bfloat16"]
    assert workers == 3


def test_without_images_there_is_nothing_to_compute(monkeypatch):
    monkeypatch.setattr(vision, "open_feature_cache", None)
    cache_features(None, [SimpleNamespace(image_hashes=dict)], None, None, None)


def test_a_tower_that_is_missing_says_where_to_get_one(tmp_path):
    with pytest.raises(UserError, match=r"^--vision_model .*gone is missing: download openai/clip-vit-base-patch16"):
        open_vision(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="cannot be used: "):
        open_vision(str(tmp_path))


def test_every_data_set_gets_the_features_of_all_names_and_caches_are_limited(monkeypatch, opened, capsys):
    asked, limited = [], []
    monkeypatch.setattr(
        vision, "open_feature_cache", lambda images, *rest, **more: asked.append((images, rest[0])) or Features(images)
    )
    monkeypatch.setattr(vision, "limit_caches", lambda *given: limited.append(given))
    first, second = (
        SimpleNamespace(image_hashes=lambda hashes=hashes: hashes, images_path="pictures", load_pixels=None)
        for hashes in ({"b.png": "2b", "a.png": "1a"}, {"c.png": "3c", "a.png": "1a"})
    )
    args = SimpleNamespace(num_workers=0, data_path="lines", images_path="pictures", cache_limit=7)
    cache_features(None, [first, None, second], args, opened, Runtime(torch.device("cpu"), torch.float32))
    assert asked == [({"a.png": "1a", "b.png": "2b", "c.png": "3c"}, "pictures")]
    assert first.features is second.features
    assert limited == [(["lines", "pictures"], 7)]
    assert capsys.readouterr().out == "features of 3 images: there\n"
