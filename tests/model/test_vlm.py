"""The vision-language model compared with reference logits, and with itself where two ways must agree."""

import copy

import pytest
import torch
from transformers import CLIPModel

from model import LMConfig, MiniMindLM
from model.model_vlm import MiniMindVLM, VLMConfig, load_tower

IMAGE = 34  # the image token's id in these tests
SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300}


@pytest.fixture(scope="module", params=["dense", "moe"])
def vlm(request, clip_dir) -> MiniMindVLM:
    torch.manual_seed(1)
    return MiniMindVLM(VLMConfig(**SMALL, use_moe=request.param == "moe"), vision_model=clip_dir).eval()


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int) -> torch.Tensor:
    """Ids (1, n): n > 0 means n text tokens, 0 an image's four tokens, -n the image token's id typed n times."""
    generator, ids = torch.Generator().manual_seed(sum(parts)), []
    for part in parts:
        text = torch.randint(100, 300, (part,), generator=generator).tolist() if part > 0 else []
        ids += text or [IMAGE] * (4 if part == 0 else -part)
    return torch.tensor([ids])


def left_padded(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(row.size(1) for row in rows)
    ids = torch.cat([torch.cat([torch.zeros(1, width - row.size(1), dtype=torch.int64), row], 1) for row in rows])
    mask = torch.tensor([[0] * (width - row.size(1)) + [1] * row.size(1) for row in rows])
    return ids, mask


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def reference(shared):
    return torch.load(shared / "fixtures" / "minimind2_v.expected.pt", weights_only=True)


@pytest.fixture(scope="module")
def published_model(reference, shared):
    config = VLMConfig(**reference["config"], image_token_id=reference["image_token_id"])
    model = MiniMindVLM(config, vision_model=shared / "fixtures" / "minimind2_v_clip")
    published = torch.load(shared / "fixtures" / "minimind2_v.pth", weights_only=True)
    assert model.state_dict().keys() == published.keys()  # no tower in it, nothing else missing
    model.load_state_dict(published)
    return model.eval()


class TestAgainstReferences:
    @torch.no_grad()
    def test_logits_with_and_without_the_image(self, published_model, reference):
        model = published_model
        assert model.config.image_tokens == reference["image_tokens"]
        ids, images = reference["input_ids"], reference["pixel_values"]
        torch.testing.assert_close(model(ids, pixel_values=images).logits, reference["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(model(ids).logits, reference["logits_without_image"], atol=1e-4, rtol=0)

    def test_features_are_clips_last_hidden_layer_without_the_class_token(self, clip_dir, vlm):
        clip = CLIPModel.from_pretrained(clip_dir).eval()
        images = pixels(3)
        with torch.no_grad():
            hidden = clip.vision_model(pixel_values=images, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(vlm.encode_images(images), hidden[:, 1:], atol=1e-6, rtol=1e-5)

    @torch.no_grad()
    def test_a_text_only_prompt_gets_the_language_models_logits(self, vlm):
        config = LMConfig(**SMALL, use_moe=vlm.config.use_moe)
        plain = MiniMindLM(config).eval()
        language = {k: v for k, v in vlm.state_dict().items() if not k.startswith("vision_proj.")}
        plain.load_state_dict(language)
        ids = prompt(12)
        torch.testing.assert_close(vlm(ids).logits, plain(ids).logits)

    @torch.no_grad()
    def test_what_a_place_holds_is_the_projected_feature(self, vlm):
        ids, images = prompt(3, 0, 2, 0, 1), pixels(2)
        embedded = vlm.embed(ids, images)
        linear = vlm.vision_proj.vision_proj[0]
        by_hand = vlm.tok_embeddings(ids)[0].clone()
        for image, start in ((0, 3), (1, 9)):
            for patch in range(4):
                by_hand[start + patch] = linear.weight @ vlm.encode_images(images)[image, patch] + linear.bias
        torch.testing.assert_close(embedded[0], by_hand)


class TestTower:
    def test_it_is_frozen_and_in_eval_mode_whatever_is_asked_of_the_model(self, vlm):
        model = copy.deepcopy(vlm).train().requires_grad_(True)
        assert not model.vision_encoder.training
        assert not any(p.requires_grad for p in model.vision_encoder.parameters())
        before = copy.deepcopy(model.vision_encoder.state_dict())
        model(prompt(2, 0, 3), pixel_values=pixels(1, 1), labels=prompt(2, 0, 3)).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1.0).step()
        assert all(torch.equal(value, before[key]) for key, value in model.vision_encoder.state_dict().items())

    def test_it_is_in_no_state_dict_but_moves_with_the_model(self, vlm):
        model = copy.deepcopy(vlm).to(torch.float64)
        assert {key.split(".")[0] for key in model.state_dict()} == {
            *("tok_embeddings", "layers", "norm", "output", "vision_proj")
        }
        assert model.vision_encoder.dtype == torch.float64
        assert model(prompt(2, 0), pixel_values=pixels(1, 1).double()).logits.dtype == torch.float64

    def test_number_and_width_of_the_tokens_follow_from_it(self, vlm):
        assert (vlm.config.image_tokens, vlm.config.vision_dim) == (4, 16)
        assert (VLMConfig().image_token_id, VLMConfig().image_tokens, VLMConfig().vision_dim) == (34, 196, 768)

    def test_a_folder_that_holds_no_clip_is_refused(self, tmp_path, clip_dir):
        with pytest.raises(ValueError, match=r"no config\.json"):
            load_tower(tmp_path)
        LMConfig(**SMALL).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="'minimind' model, not a CLIP"):
            load_tower(tmp_path)

    def test_a_tower_of_another_size_is_refused(self, clip_dir):
        model = MiniMindVLM(VLMConfig(**SMALL, image_tokens=9, vision_dim=16))
        with pytest.raises(ValueError, match=r"gives \(4, 16\).*takes \(9, 16\)"):
            model.set_tower(load_tower(clip_dir))


@pytest.mark.usefixtures("no_gradients")
class TestPlaces:
    """Each row of a batch must give the same as alone, in whatever form the images come."""

    def check(self, vlm, rows, images, **given):
        """Compare left-padded rows in a batch with each row alone; `images` are each row's, or None."""
        ids, mask = left_padded(*rows)
        together = vlm(ids, mask, **given).logits
        for row, (alone, own) in enumerate(zip(rows, images, strict=True)):
            expected = vlm(alone, pixel_values=None if own is None else own[None]).logits[0]
            torch.testing.assert_close(together[row, -alone.size(1) :], expected, atol=1e-5, rtol=1e-4)

    def test_rows_with_none_one_and_two_images(self, vlm):
        rows = (prompt(5), prompt(2, 0, 3), prompt(1, 0, 1, 0, 2))
        images = (None, pixels(1, seed=1), pixels(2, seed=2))
        self.check(vlm, rows, images, pixel_values=images)
        padded = torch.zeros(3, 2, 3, 32, 32)
        padded[1, :1], padded[2] = images[1], images[2]
        self.check(vlm, rows, images, pixel_values=padded)
        flat = torch.cat(images[1:])
        self.check(vlm, rows, images, pixel_values=flat)
        self.check(vlm, rows, images, image_features=vlm.encode_images(flat))

    def test_two_images_side_by_side_take_their_own_places(self, vlm):
        ids, images = prompt(2, 0, 0, 1), pixels(2)
        swapped = vlm.embed(ids, images.flip(0)[None])
        torch.testing.assert_close(vlm.embed(ids, images[None])[0, 2:6], swapped[0, 6:10])

    def test_a_short_run_and_runs_beyond_the_images_are_text(self, vlm):
        ids, images = prompt(2, -3, 1, 0, 2, 0, 1), pixels(1)
        embedded, text = vlm.embed(ids, images[None]), vlm.tok_embeddings(ids)
        differs = (embedded != text).any(-1)[0].tolist()
        assert [place for place, d in enumerate(differs) if d] == [6, 7, 8, 9]

    def test_the_mask_tells_typed_tokens_from_an_image(self, vlm):
        ids = prompt(2, -1, 0, 1)  # someone typed @ right before the image
        mask = torch.tensor([[False] * 3 + [True] * 4 + [False]])
        embedded = vlm.embed(ids, pixels(1), mask)
        torch.testing.assert_close(embedded[:, 2], vlm.tok_embeddings(ids)[:, 2])
        torch.testing.assert_close(embedded[:, 3:7], vlm.vision_proj(vlm.encode_images(pixels(1))))

    @pytest.mark.parametrize("form", ["batch", "rows", "flat"])
    def test_an_image_without_places_is_refused(self, vlm, form):
        images = {"batch": pixels(1, 2), "rows": [pixels(2)], "flat": pixels(2)}[form]
        with pytest.raises(ValueError, match="places for"):
            vlm(prompt(2, 0, 1), pixel_values=images)
        with pytest.raises(ValueError, match="places for"):
            vlm(prompt(2, -3, 1), pixel_values=images)

    def test_a_mask_with_a_run_cut_off_is_refused(self, vlm):
        with pytest.raises(ValueError, match=r"\[3\].*takes 4"):
            vlm(prompt(2, 0), pixel_values=pixels(1), image_mask=torch.tensor([[False] * 3 + [True] * 3]))

    def test_features_of_another_tower_are_refused(self, vlm):
        with pytest.raises(ValueError, match=r"\(1, 4, 8\).*images, 4, 16"):
            vlm(prompt(0), image_features=torch.zeros(1, 4, 8))


@pytest.mark.usefixtures("no_gradients")
class TestDecoding:
    def test_cached_decoding_equals_the_full_forward(self, vlm):
        ids = torch.cat([prompt(3, 0, 2), prompt(4)], 1)
        full = vlm(ids, pixel_values=pixels(1, 1)).logits
        out = vlm(ids[:, :9], pixel_values=pixels(1, 1), use_cache=True)
        steps = [out.logits]
        for place in range(9, 13):
            out = vlm(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-4)

    def test_an_image_may_come_after_a_cached_prompt(self, vlm):
        ids = prompt(3, 0, 2)
        out = vlm(ids[:, :2], use_cache=True)
        rest = vlm(ids[:, 2:], past_key_values=out.past_key_values, pixel_values=pixels(1, 1)).logits
        full = vlm(ids, pixel_values=pixels(1, 1)).logits
        torch.testing.assert_close(rest, full[:, 2:], atol=1e-5, rtol=1e-4)

    def test_generation_encodes_each_image_once_and_equals_a_loop_without_a_cache(self, vlm, monkeypatch):
        rows = (prompt(2, 0, 3), prompt(1, 0, 1, 0, 2))
        images = [pixels(1, seed=1), pixels(2, seed=2)]
        expected = []
        for row, own in zip(rows, images, strict=True):
            ids = row
            for _ in range(5):
                ids = torch.cat([ids, vlm(ids, pixel_values=own[None]).logits[:, -1:].argmax(-1)], 1)
            expected.append(ids[0, -5:].tolist())
        encoded = []
        monkeypatch.setattr(
            vlm, "encode_images", lambda x, encode=vlm.encode_images: encoded.append(len(x)) or encode(x)
        )
        ids, mask = left_padded(*rows)
        written = vlm.generate(ids, mask, pixel_values=images, max_new_tokens=5, eos_token_id=())
        assert written[:, -5:].tolist() == expected
        assert encoded == [3]


class TestTraining:
    def test_a_batch_without_an_image_gives_the_projection_a_zero_gradient(self, vlm):
        model = copy.deepcopy(vlm).train()
        labels = prompt(6)
        model(
            prompt(6), pixel_values=pixels(0), labels=labels, image_mask=torch.zeros(1, 6, dtype=bool)
        ).loss.backward()
        gradients = [p.grad for p in model.vision_proj.parameters()]
        assert all(g is not None and g.abs().max() == 0 for g in gradients)

    def test_the_projection_learns_through_frozen_blocks(self, vlm):
        model = copy.deepcopy(vlm).train().requires_grad_(False)
        model.vision_proj.requires_grad_(True)
        ids = prompt(2, 0, 3)
        model(ids, pixel_values=pixels(1, 1), labels=ids).loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.vision_proj.parameters())

    def test_gradient_checkpointing_changes_nothing(self, vlm):
        ids, gradients = prompt(2, 0, 3), []
        for checkpointing in (False, True):
            model = copy.deepcopy(vlm).train()
            model.gradient_checkpointing = checkpointing
            model(ids, pixel_values=pixels(1, 1), labels=ids).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right)


def test_a_transformers_folder_round_trips_without_the_tower(vlm, clip_dir, tmp_path):
    vlm.save_pretrained(tmp_path)
    loaded = MiniMindVLM.from_pretrained(tmp_path).eval()
    loaded.set_tower(load_tower(clip_dir))
    ids, images = prompt(2, 0, 3), pixels(1, 1)
    assert loaded.config.image_tokens == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, pixel_values=images).logits, vlm(ids, pixel_values=images).logits)
