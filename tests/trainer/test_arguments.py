"""The flags that all stages share: all exist, all are parsed as meant, and wrong values give one line of error."""

import argparse
import importlib
import inspect
import json

import pytest

import train_full_sft
import train_pretrain
from model import MiniMindLM
from model.generation import TextGeneration
from model.inference.request import Request
from trainer.argument_types import (
    BooleanFlag,
    byte_size,
    mix_part,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    probability,
    seed,
    text,
)
from trainer.arguments import Parser, check_training_arguments, training_parser
from trainer.engine_settings import deepspeed_config
from trainer.errors import UserError
from trainer.inference_arguments import SAMPLING, add_sampling_arguments, sampling_settings

COMMON_FLAGS = """
    out_dir epochs max_steps batch_size accumulation_steps learning_rate warmup_iters grad_clip dtype device seed
    num_workers log_interval save_interval eval_interval eval_path dim n_layers max_seq_len use_moe tokenizer data_path
    resume overwrite compile gradient_checkpointing deepspeed zero_stage use_wandb wandb_project skip_bad_lines packing
    local_rank ddp offload
""".split()


def parse(*arguments: str):
    return training_parser("A stage.", batch_size=4, learning_rate=1e-3).parse_args(arguments)


@pytest.mark.parametrize("stage", [train_pretrain, train_full_sft])
def test_every_common_flag_is_there(stage, monkeypatch):
    monkeypatch.setattr("sys.argv", [stage.__name__])
    args = vars(stage.get_args())
    assert set(COMMON_FLAGS) <= args.keys()
    assert min(args["batch_size"], args["learning_rate"]) > 0
    assert args["data_path"].endswith(".jsonl")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("", False),
        ("--use_moe", True),
        ("--use_moe 1", True),
        ("--use_moe 0", False),
        ("--use_moe true", True),
        ("--use_moe True", True),
        ("--use_moe False", False),
        ("--use_moe=false", False),
        ("--use_moe yes", True),
        ("--use_moe off", False),
        ("--no-use_moe", False),
        ("--no-use_moe 0", True),
        ("--use_moe --no-use_moe", False),
        ("--use_moe --dim 64", True),
    ],
)
def test_a_switch_is_read_as_meant(typed, meant):
    assert parse(*typed.split()).use_moe is meant


def test_switches_keep_their_defaults():
    args = parse()
    assert args.packing is True
    assert args.compile is None  # the machine decides
    assert parse("--no-packing").packing is False
    assert parse("--compile", "0").compile is False


def test_old_commands_and_launchers_are_understood():
    args = parse("--ddp", "--local_rank=1", "--local-rank", "0")
    assert args.ddp is True
    assert args.local_rank == 0


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--batch_size", "0", "1 or more"),
        ("--batch_size", "four", "four"),
        ("--epochs", "-1", "1 or more"),
        ("--accumulation_steps", "0", "1 or more"),
        ("--max_steps", "-1", "0 or more"),
        ("--learning_rate", "0", "above 0"),
        ("--learning_rate", "nan", "above 0"),
        ("--learning_rate", "inf", "above 0"),
        ("--grad_clip", "-1", "above 0"),
        ("--seed", "-1", "2^63"),
        ("--seed", "9223372036854775808", "2^63"),
        ("--use_moe", "maybe", "'maybe'"),
        ("--dtype", "int8", "bfloat16"),
        ("--zero_stage", "4", "4"),
        ("--dims", "64", "--dims"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag(flag, value, told):
    with pytest.raises(UserError) as error:
        parse(flag, value)
    assert flag in str(error.value)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--max_seq_len 1", "--max_seq_len"),
        ("--resume --overwrite", "choose one"),
        ("--deepspeed --optimizer muon", "muon"),
        ("--deepspeed --optimizer adamw8bit", "adamw8bit needs whole matrices, which DeepSpeed"),
    ],
)
def test_settings_that_cannot_work_together(arguments, told):
    with pytest.raises(UserError, match=told):
        check_training_arguments(parse(*arguments.split()))


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [("", "adamw"), ("--optimizer auto", "muon"), ("--optimizer auto --deepspeed", "adamw")],
)
def test_auto_takes_muon_where_the_matrices_are_whole(arguments, taken):
    args = parse(*arguments.split())
    check_training_arguments(args)
    assert args.optimizer == taken
    args = parse("--optimizer", "auto")
    args.fsdp = True
    check_training_arguments(args)
    assert args.optimizer == "adamw"


def test_a_switch_needs_two_dashes():
    assert BooleanFlag(["--thing"], "thing").option_strings == ["--thing", "--no-thing"]


def test_deepspeed_settings_follow_the_flags(tmp_path, capsys):
    own = tmp_path / "ds.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}, "train_batch_size": 999}))
    plain = deepspeed_config(parse("--deepspeed", "--zero_stage", "1", "--grad_clip", "0.5"))
    assert plain["zero_optimization"] == {"stage": 1}
    offloaded = {"offload_optimizer": {"device": "cpu"}}
    given = deepspeed_config(parse("--deepspeed", "--offload", "optimizer"))
    assert given["zero_optimization"] == {"stage": 2} | offloaded
    given = deepspeed_config(parse("--deepspeed", "--zero_stage", "3", "--offload", "all"))
    assert given["zero_optimization"] == {"stage": 3} | offloaded | {"offload_param": {"device": "cpu"}}
    config = deepspeed_config(parse("--deepspeed", str(own)))
    assert config["zero_optimization"] == {"stage": 3}
    assert "fp16" not in config
    assert "train_batch_size" not in config
    for settings, clip in ((plain, 0.5), (config, 1.0)):
        assert settings["train_micro_batch_size_per_gpu"] == 4
        assert settings["gradient_clipping"] == clip
    said = capsys.readouterr().err
    assert "fp16" in said
    assert "train_batch_size" in said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("all",), "add --deepspeed or --fsdp"),
        (("all", "--deepspeed"), "--offload all needs --zero_stage 3 or more"),
        (("optimizer", "--deepspeed", "--zero_stage", "0"), "--offload optimizer needs --zero_stage 1 or more"),
        (("optimizer", "--deepspeed", "ds.json"), "ds.json decides what is offloaded"),
    ],
)
def test_what_no_engine_can_offload_is_refused(flags, told):
    with pytest.raises(UserError, match=told):
        check_training_arguments(parse("--offload", *flags))


@pytest.mark.parametrize("content", [None, "", "[1, 2]", "{'stage': 2}"])
def test_a_deepspeed_file_that_is_none(tmp_path, content):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"ds\.json"):
        deepspeed_config(parse("--deepspeed", str(path)))


@pytest.mark.parametrize(
    "stage", ["eval_model", "eval_vlm", "scripts.chat_openai_api", "scripts.collect_teacher_answers"]
)
def test_what_is_said_to_a_model_is_utf8(stage, monkeypatch):
    """A path may be any bytes; a prompt that is not UTF-8, which no tokenizer or server accepts, is refused by name."""
    flag = "--system" if stage.startswith("scripts") else "--prompt"
    broken = b"caf\xe9".decode("utf-8", "surrogateescape")
    monkeypatch.setattr("sys.argv", [stage, flag, broken])
    with pytest.raises(UserError, match=f"argument {flag}: not valid UTF-8"):
        importlib.import_module(stage).get_args()
    assert parse("--data_path", broken).data_path == broken
    assert text("水") == "水"


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (positive_int, ("1", "9"), ("0", "-1", "x")),
        (non_negative_int, ("0", "9"), ("-1", "0.5")),
        (seed, ("0", str(2**63 - 1)), ("-1", str(2**63))),
        (positive_float, ("0.1", "9"), ("0", "-1", "inf", "nan")),
        (non_negative_float, ("0", "9"), ("-0.1", "inf", "nan")),
        (probability, ("0.1", "1"), ("0", "1.1", "-1", "nan")),
    ],
)
def test_the_bounds_of_a_number(kind, taken, refused):
    assert [kind(number) for number in taken] == [type(kind(number))(number) for number in taken]
    for number in refused:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(number)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("50GB", 50_000_000_000), ("1.5 TB", 1_500_000_000_000), ("500mb", 500_000_000), ("0", 0), ("7", 7)),
        *(("3k", 3000), ("2KiB", 2048), ("1GiB", 1 << 30), ("12 B", 12)),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1,5GB", "5 boxes", "1e9", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 50GB"):
        byte_size(text)


@pytest.mark.parametrize("text", ["", "a.jsonl", "a.jsonl:", ":0.5", "a.jsonl:0", "a.jsonl:-1", "a:x", "a:nan"])
def test_what_is_no_part_of_a_mixture(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"such as a\.jsonl:0\.7"):
        mix_part(text)


def test_a_file_is_mixed_in_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = training_parser("", mix=[("a.jsonl", 0.5), ("b.jsonl", 0.2)]).parse_args([])
    check_training_arguments(args)
    args.mix.append((str(tmp_path / "a.jsonl"), 0.3))
    with pytest.raises(UserError, match=r"--mix names .* twice"):
        check_training_arguments(args)


def test_caches_are_limited_unless_it_is_said():
    assert training_parser("").parse_args([]).cache_limit == 50_000_000_000
    assert training_parser("").parse_args(["--cache_limit", "1MB"]).cache_limit == 1_000_000


def test_how_a_model_writes_is_said_once_and_programs_get_the_plain_distribution():
    parser = Parser("A front-end.")
    add_sampling_arguments(parser)
    assert sampling_settings(parser.parse_args([])) == SAMPLING | {"seed": None}
    assert sampling_settings(parser.parse_args(["--top_k", "7"])) == SAMPLING | {"seed": None, "top_k": 7}
    off = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    for call in (TextGeneration.stream, Request):
        assert {name: inspect.signature(call).parameters[name].default for name in off} == off


def test_every_sampling_flag_reaches_the_model():
    parser = Parser("")
    before = {action.dest for action in parser._actions}
    add_sampling_arguments(parser)
    flags = {action.dest for action in parser._actions} - before
    settings = sampling_settings(parser.parse_args(["--repetition_penalty", "1.5", "--seed", "7"]))
    assert settings.keys() == flags
    assert (settings["repetition_penalty"], settings["seed"]) == (1.5, 7)
    assert flags <= inspect.signature(MiniMindLM.stream).parameters.keys()


@pytest.mark.parametrize(
    ("word", "on"),
    [
        *(("1", True), ("true", True), ("TRUE", True), ("yes", True), ("on", True)),
        *(("0", False), ("false", False), ("no", False), ("off", False)),
    ],
)
def test_every_word_of_a_switch(word, on):
    assert parse("--use_moe", word).use_moe is on
    assert parse("--no-use_moe", word).use_moe is not on


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "--max_seq_len 2", "--resume", "--overwrite", "--deepspeed", "--optimizer muon", "--use_wandb"),
        *("--tracker swanlab", "--use_wandb --tracker wandb", "--deepspeed --optimizer adamw"),
    ],
)
def test_settings_that_work_together(arguments):
    check_training_arguments(parse(*arguments.split()))


def test_all_that_deepspeed_is_told_without_a_file():
    assert deepspeed_config(parse("--deepspeed")) == {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,  # whatever ours are, because the loop accumulates
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert deepspeed_config(parse("--deepspeed", "--accumulation_steps", "7"))["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    "name",
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    optimizer scheduler fp16 bf16 torch_autocast
    """.split(),
)
def test_what_a_deepspeed_file_says_of_our_flags_is_left_out_and_told(name, tmp_path, capsys):
    (own := tmp_path / "ds.json").write_text(json.dumps({name: "theirs", "steps_per_print": 5}))
    config = deepspeed_config(parse("--deepspeed", str(own)))
    assert config.get(name) != "theirs"
    assert config["steps_per_print"] == 5
    assert capsys.readouterr().err.strip() == f"{own}: {name} ignored in favour of the flags"


def test_numbers_just_beyond_their_bounds():
    for kind, number in ((probability, "1.0000001"), (positive_float, "-1e-9"), (non_negative_float, "-1e-9")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(number)
    assert (probability("1e-9"), positive_float("1e-9"), non_negative_float("0")) == (1e-9, 1e-9, 0.0)
    found = (positive_int("1"), non_negative_int("0"), seed("9223372036854775807"))
    assert found == (1, 0, 2**63 - 1)
    assert {type(number) for number in found} == {int}
