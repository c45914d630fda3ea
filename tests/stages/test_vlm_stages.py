"""Both vision stages and eval_vlm.py, run for real on a handful of images."""

import json
import shutil

import pytest
import torch
from PIL import Image

from model.images import default_processor, image_token_id
from model.model_vlm import MiniMindVLM, VLMConfig, load_tower
from tests.conftest import write_jsonl
from tests.running import ROOT, TINY, TINY_TRAINING, call_script, run_script

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with images/ and lines.jsonl, whose lines have one, two and no images in turn."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 32), colour).save(folder / "images" / f"{name}.png")
    lines = []
    for number in range(24):
        one, two = (list(COLOURS)[(number + k) % 3] for k in (0, 1))
        asked = [
            ([f"{one}.png"], "<image>\nWhat colour?", f"It is {one}."),
            ([f"{one}.png", f"{two}.png"], "<image>\n<image>\nThe same?", "No."),
            ([], "Who are you?", f"A robot, number {number}."),
        ][number % 3]
        turns = [{"role": "user", "content": asked[1]}, {"role": "assistant", "content": asked[2]}]
        lines.append({"image": asked[0], "conversations": turns})
    write_jsonl(folder / "lines.jsonl", lines)
    return folder


@pytest.fixture
def out(tiny_out, tmp_path):
    """An --out_dir with only full_sft_32."""
    folder = tmp_path / "out"
    folder.mkdir()
    for suffix in (".pth", ".json"):
        shutil.copy(tiny_out / f"full_sft_32{suffix}", folder)
    return folder


@pytest.fixture
def stage(pictures, clip_dir, tokenizer_dir):
    """Run a stage: stage("pretrain_vlm", out_dir, further flags) -> (weights, json); None if it fails."""

    def run(name: str, out, *flags, stop_after: int | None = None, exit_code: int = 0):
        given = stage_flags(out, pictures, clip_dir, tokenizer_dir)
        call_script(f"train_{name}.py", *given, *flags, stop_after=stop_after, exit_code=exit_code)
        if exit_code == 0:
            name += "_multi" if "--multi" in flags else ""
            weights = torch.load(out / f"{name}_32.pth", weights_only=True)
            return weights, json.loads((out / f"{name}_32.json").read_text())

    return run


@pytest.fixture
def refused(stage, capsys):
    """Run a stage that must end with one line of error; returns the line."""

    def run(*arguments) -> str:
        stage(*arguments, exit_code=2)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    return run


def stage_flags(out, pictures, clip_dir, tokenizer_dir) -> tuple:
    return (
        *("--out_dir", out, "--tokenizer", tokenizer_dir, "--vision_model", clip_dir),
        *("--data_path", pictures / "lines.jsonl", "--images_path", pictures / "images"),
        *(*TINY_TRAINING, "--max_seq_len", "160", "--learning_rate", "1e-2", "--epochs", "9", "--max_steps", "4"),
    )


def changed(before: dict, after: dict) -> set[str]:
    return {key for key in after if key not in before or not torch.equal(before[key], after[key])}


class TestTraining:
    def test_pretraining_moves_the_projection_alone_and_fine_tuning_all(self, stage, out, clip_dir):
        llm = torch.load(out / "full_sft_32.pth", weights_only=True)
        projection = {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"}
        pretrained, about = stage("pretrain_vlm", out)
        assert changed(llm, pretrained) == projection
        assert pretrained.keys() == llm.keys() | projection  # and without a tower
        assert about["stage"] == "pretrain_vlm"
        tuned, tuned_about = stage("sft_vlm", out)
        assert changed(pretrained, tuned) == tuned.keys()
        assert tuned_about["vision_tower"] == about["vision_tower"]
        losses = [json.loads(line)["loss"] for line in (out / "sft_vlm_32.metrics.jsonl").read_text().splitlines()]
        assert losses[-1] < losses[0]

    def test_unfreeze_last_adds_the_last_blocks(self, stage, out):
        llm = torch.load(out / "full_sft_32.pth", weights_only=True)
        pretrained, _ = stage("pretrain_vlm", out, "--unfreeze_last", "1", "--optimizer", "muon")
        assert {key.rsplit(".", 2)[0].split(".")[0] for key in changed(llm, pretrained)} == {"layers", "vision_proj"}
        assert all(key.startswith(("layers.1.", "vision_proj.")) for key in changed(llm, pretrained))
        assert any(key.startswith("layers.1.") for key in changed(llm, pretrained))

    def test_the_projection_alone_learns_with_muon_too(self, stage, out):
        stage("pretrain_vlm", out, "--optimizer", "muon")

    def test_cached_features_train_alike(self, stage, out, tmp_path):
        by_pixels, _ = stage("pretrain_vlm", out)
        again, _ = stage("pretrain_vlm", out, "--overwrite", "--cache_features")
        for key in by_pixels:
            torch.testing.assert_close(again[key], by_pixels[key], atol=2e-3, rtol=1e-2)  # they are kept in fp16

    def test_beyond_the_limit_other_caches_go_and_its_own_are_not_made_again(
        self, stage, out, pictures, monkeypatch, tmp_path
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the limit includes existing caches

        def caches() -> dict[str, int]:
            return {path.name: path.stat().st_ino for path in pictures.glob(".cache/*/*-*-*")}

        flags = ("--cache_features", "--overwrite", "--eval_interval", "4", "--max_steps", "1")
        stage("pretrain_vlm", out, *flags, "--dtype", "bfloat16")
        stage("pretrain_vlm", out, *flags)
        assert sum(name.startswith("features-") for name in caches()) >= 2
        stage("pretrain_vlm", out, *flags, "--cache_limit", "1B")
        assert len(left := caches()) == 2
        stage("pretrain_vlm", out, *flags, "--cache_limit", "1B")
        assert caches() == left

    def test_a_resumed_run_ends_in_the_same_bits(self, stage, out, tmp_path):
        stage("pretrain_vlm", out)
        shutil.copytree(out, tmp_path / "other")
        flags = ("--cache_features", "--save_interval", "2")
        whole, _ = stage("sft_vlm", out, *flags)
        stage("sft_vlm", tmp_path / "other", *flags, stop_after=3, exit_code=130)
        assert json.loads((tmp_path / "other" / "sft_vlm_32.json").read_text())["step"] == 2
        resumed, about = stage("sft_vlm", tmp_path / "other", *flags, "--resume")
        assert about["step"] == 4
        assert changed(whole, resumed) == set()

    def test_multi_has_a_name_of_its_own(self, stage, out):
        stage("pretrain_vlm", out, "--max_steps", "1")
        _, about = stage("sft_vlm", out, "--multi", "--max_steps", "1")
        assert about["stage"] == "sft_vlm_multi"

    @pytest.mark.parametrize("engine", [(), ("--deepspeed", "--zero_stage", "2")])
    def test_two_processes_take_the_steps_of_one(self, stage, out, tmp_path, pictures, clip_dir, tokenizer_dir, engine):
        """Four rows per step: from one process, or two from each of two; some have no image."""
        alone, _ = stage("pretrain_vlm", out, "--no-packing")
        shutil.copytree(out, tmp_path / "two", ignore=shutil.ignore_patterns("pretrain_vlm*"))
        flags = (*stage_flags(tmp_path / "two", pictures, clip_dir, tokenizer_dir), "--no-packing", "--batch_size", "2")
        run_script("train_pretrain_vlm.py", *flags, *engine, processes=2, env={"DS_ACCELERATOR": "cpu"})
        two = torch.load(tmp_path / "two" / "pretrain_vlm_32.pth", weights_only=True)
        assert two.keys() == alone.keys()
        for key in alone:
            torch.testing.assert_close(two[key], alone[key], atol=1e-4, rtol=1e-3)


class TestErrors:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--vision_model", "nowhere"), "--vision_model nowhere is missing: download"),
            (("--images_path", "nowhere"), "line 1: the image nowhere/red.png does not exist"),
            (("--from_weight", "reason"), "reason_32.pth is missing: run train_distill_reason.py"),
            (("--unfreeze_last", "3"), "--unfreeze_last 3: the model has 2 blocks"),
            (("--max_seq_len", "20"), "no sample has a target within 20 tokens"),
        ],
    )
    def test_a_wrong_flag(self, refused, out, flags, message):
        assert message in refused("pretrain_vlm", out, *flags)
        assert not (out / "pretrain_vlm_32.pth").exists()

    def test_a_damaged_tower(self, refused, out, clip_dir, tmp_path):
        shutil.copytree(clip_dir, tmp_path / "clip")
        weights = tmp_path / "clip" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        assert "clip cannot be used" in refused("pretrain_vlm", out, "--vision_model", tmp_path / "clip")

    def test_a_preprocessor_of_another_tower(self, refused, out, clip_dir, tmp_path):
        folder = shutil.copytree(clip_dir, tmp_path / "clip")
        default_processor(224).save_pretrained(folder)
        told = refused("pretrain_vlm", out, "--vision_model", folder)
        assert "gives 224 x 224 pixels, but its tower takes 32 x 32" in told

    def test_a_picture_that_breaks_off_is_named_with_its_line_or_skipped(self, refused, stage, out, pictures, tmp_path):
        shutil.copytree(pictures / "images", tmp_path / "images")
        blue = tmp_path / "images" / "blue.png"
        blue.write_bytes(blue.read_bytes()[:60])
        for flags in ((), ("--cache_features",), ("--num_workers", "1")):
            error = refused("pretrain_vlm", out, "--images_path", tmp_path / "images", *flags)
            assert f"lines.jsonl, line 2: the image {blue} cannot be read as an image" in error
            assert not (out / "pretrain_vlm_32.pth").exists()
        given = ("--images_path", tmp_path / "images", "--skip_bad_lines", "--cache_features")
        stage("pretrain_vlm", out, *given, "--max_steps", "1")
        shutil.copy(pictures / "images" / "blue.png", blue)
        error = refused("pretrain_vlm", out, *given, "--max_steps", "2", "--resume")
        assert f"--resume: the image {blue} is valid now, but the saved run began without its lines" in error

    def test_another_tower_than_it_was_trained_with(self, stage, refused, out, clip_dir, tmp_path):
        stage("pretrain_vlm", out, "--max_steps", "1")
        tower = load_tower(clip_dir)
        with torch.no_grad():
            tower.pre_layrnorm.weight += 1
        tower.save_pretrained(tmp_path / "clip")
        error = refused("sft_vlm", out, "--vision_model", tmp_path / "clip")
        assert "pretrain_vlm_32.pth was trained with vision tower" in error

    def test_a_language_model_is_no_vision_model(self, refused, out):
        error = refused("sft_vlm", out, "--from_weight", "full_sft")
        assert "missing: vision_proj.vision_proj.0.weight" in error


class TestEval:
    @pytest.fixture(scope="class")
    @staticmethod
    def seeing(tmp_path_factory, tiny_tokenizer, clip_dir):
        """An --out_dir with weights for every --model_mode, and a transformers folder."""
        out = tmp_path_factory.mktemp("seeing")
        place = image_token_id(tiny_tokenizer)
        config = VLMConfig(dim=32, n_layers=2, vocab_size=len(tiny_tokenizer), image_token_id=place)
        torch.manual_seed(0)
        model = MiniMindVLM(config, vision_model=clip_dir)
        for name in ("pretrain_vlm", "sft_vlm", "sft_vlm_multi"):
            torch.save(model.state_dict(), out / f"{name}_32.pth")
        model.save_pretrained(out / "folder")
        tiny_tokenizer.save_pretrained(out / "folder")
        return out

    @pytest.fixture
    def asked(self, capsys, seeing, clip_dir, tokenizer_dir):
        """The output of eval_vlm.py, or its line of error."""

        def run(*flags, exit_code: int = 0) -> str:
            given = (*TINY, "--tokenizer", tokenizer_dir, "--vision_model", clip_dir, "--out_dir", seeing)
            short = ("--max_new_tokens", "4", "--temperature", "0")
            call_script("eval_vlm.py", *given, *short, *flags, exit_code=exit_code)
            printed = capsys.readouterr()
            return printed.err.splitlines()[-1] if exit_code else printed.out

        return run

    def test_every_picture_of_a_folder_by_its_name(self, asked, pictures):
        (pictures / "images" / "notes.txt").write_text("not a picture")
        shown = asked("--image_dir", pictures / "images")
        assert [line for line in shown.splitlines() if line.endswith(".png")] == ["blue.png", "green.png", "red.png"]
        together = asked("--image_dir", pictures / "images", "--model_mode", "2")
        assert [line for line in together.splitlines() if line.endswith(".png")] == ["blue.png, green.png", "red.png"]

    def test_without_arguments_it_goes_through_the_pictures_we_ship(self, asked):
        shown = [line for line in asked().splitlines() if line.endswith(".jpg")]
        assert shown == sorted(path.name for path in (ROOT / "dataset" / "eval_images").glob("*.jpg"))
        assert len(shown) >= 6

    def test_streamed_or_not_loaded_either_way_the_answer_is_the_same(self, asked, pictures, seeing):
        red = ("--image", pictures / "images" / "red.png", "--prompt", "What colour?")
        streamed = asked(*red)
        assert streamed.startswith("\nred.png\n> What colour?\n")
        assert asked(*red, "--no-stream") == streamed
        assert asked(*red, "--load", "1", "--out_dir", seeing / "folder") == streamed
        assert asked("--image", pictures / "images" / "blue.png", "--prompt", "What colour?") != streamed

    def test_a_broken_or_missing_picture_is_named(self, asked, tmp_path):
        (tmp_path / "bad.jpg").write_bytes(b"nothing")
        assert "bad.jpg is not an image" in asked("--image", tmp_path / "bad.jpg", exit_code=2)
        assert "gone.jpg does not exist" in asked("--image", tmp_path / "gone.jpg", exit_code=2)
        assert "is not a folder" in asked("--image_dir", tmp_path / "gone", exit_code=2)
        (tmp_path / "bad.jpg").unlink()
        assert "holds 0 images" in asked("--image_dir", tmp_path, exit_code=2)

    def test_of_a_folder_every_picture_is_looked_at_first(self, asked, pictures, tmp_path):
        shutil.copytree(pictures / "images", tmp_path / "images")
        (tmp_path / "images" / "green.png").write_bytes(b"nothing")
        (tmp_path / "images" / "red.png").write_bytes(b"nothing")
        error = asked("--image_dir", tmp_path / "images", exit_code=2)
        assert "green.png is not an image" in error
        assert "(2 of 3 images; --skip_bad_images skips them)" in error
        shown = asked("--image_dir", tmp_path / "images", "--skip_bad_images")
        assert shown.startswith("2 of 3 images skipped, the first: ")
        assert [line for line in shown.splitlines() if line.endswith(".png")] == ["blue.png"]
        assert "holds 1 images" in asked(
            "--image_dir", tmp_path / "images", "--skip_bad_images", "--model_mode", "2", exit_code=2
        )

    def test_what_does_not_fit_is_told(self, asked, pictures):
        red = ("--image", pictures / "images" / "red.png")
        assert "the question takes" in asked(*red, "--prompt", "word " * 9000, exit_code=2)
