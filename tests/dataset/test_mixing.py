"""Mixing the rows of several files: how many of each, which ones, and how a resumed run's mixture is compared."""

import numpy as np
import pytest

from dataset import DataError, PretrainDataset, SFTDataset, StepLoader
from dataset.mixing import MixedRows, amounts
from tests.conftest import SENTENCES, write_jsonl


@pytest.mark.parametrize(
    ("sizes", "shares", "taken"),
    [
        ([100, 100], [1, 1], [100, 100]),
        ([70, 1000], [0.7, 0.3], [70, 30]),
        ([1000, 30], [0.7, 0.3], [70, 30]),
        ([10, 20, 90], [7, 2, 1], [10, 20 / 7, 10 / 7]),
        ([0, 50], [0.5, 0.5], [0, 0]),
    ],
)
def test_the_file_that_would_run_out_first_is_taken_whole(sizes, shares, taken):
    assert amounts(sizes, shares) == pytest.approx(taken)
    assert amounts(sizes, [10 * share for share in shares]) == pytest.approx(taken)


@pytest.fixture
def files(tmp_path, tiny_tokenizer) -> list[PretrainDataset]:
    """One file of many long texts, one of few short ones, one in between; each text begins with its file's letter."""
    counts = {"a": (90, 1.0), "b": (40, 0.3), "c": (60, 0.6)}
    opened = []
    for name, (count, part) in counts.items():
        texts = [f"{name}{n} {SENTENCES[n % 8]}" for n in range(count)]
        lines = [{"text": text[: 5 + int(part * len(text))]} for text in texts]
        opened.append(PretrainDataset(write_jsonl(tmp_path / f"{name}.jsonl", lines), tiny_tokenizer, 64))
    return opened


def tokens_of(row: dict) -> int:
    return len(row["input_ids"])


def of_file(mixed: MixedRows, files: list) -> list[list[bytes]]:
    """The rows that came from each file, as bytes."""
    whole = [{row["input_ids"].numpy().tobytes() for row in file} for file in files]
    assert not whole[0] & whole[1]
    rows = [mixed[n]["input_ids"].numpy().tobytes() for n in range(len(mixed))]
    return [[row for row in rows if row in own] for own in whole]


@pytest.mark.parametrize("shares", [(0.7, 0.2, 0.1), (1, 1, 1), (0.05, 0.05, 0.9), (20, 1, 4)])
def test_shares_are_of_tokens_and_no_row_comes_twice(files, shares):
    mixed = MixedRows(files, shares, seed=3)
    rows = of_file(mixed, files)
    tokens = [sum(len(row) // 8 for row in some) for some in rows]
    assert sum(map(len, rows)) == len(mixed)
    assert all(len(set(some)) == len(some) for some in rows)
    for share, count in zip(shares, tokens, strict=True):
        assert count == pytest.approx(share / sum(shares) * sum(tokens), abs=3 * 64)  # each share is exact to a row
    assert any(len(some) == len(file) for some, file in zip(rows, files, strict=True))


def test_the_seed_decides_which_rows_are_taken(files):
    def taken(seed: int) -> list[bytes]:
        return of_file(MixedRows(files, (0.1, 0.5, 0.4), seed), files)[0]

    assert taken(1) == taken(1)
    assert taken(1) != taken(2)
    first = [row["input_ids"].numpy().tobytes() for row in files[0]][: len(taken(1))]
    assert taken(1) != first  # not simply those that come first


def test_without_shares_all_rows_are_there(files):
    mixed = MixedRows(files, None, seed=0)
    assert len(mixed) == sum(map(len, files))
    assert [len(some) for some in of_file(mixed, files)] == [len(file) for file in files]
    for bad in (-1, len(mixed)):
        with pytest.raises(IndexError, match=f"row {bad}"):
            mixed[bad]


def test_a_loader_deals_all_of_it_out_each_epoch(files):
    mixed = MixedRows(files, (0.3, 0.3, 0.4), seed=0)
    loader = StepLoader(mixed, batch_size=4, accumulation_steps=1, epochs=2, seed=0)
    epochs = [[], []]
    for step, batches in enumerate(loader.steps()):
        for batch in batches:
            epochs[step // loader.steps_per_epoch] += [
                ids[mask].numpy().tobytes()
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
                if mask.any()
            ]
    rows = [mixed[n]["input_ids"].numpy().tobytes() for n in range(len(mixed))]
    assert [sorted(epoch) for epoch in epochs] == [sorted(rows)] * 2
    mixed_up = [any(row in own for own in [of_file(mixed, files)[0]]) for row in epochs[0]]
    assert mixed_up != sorted(mixed_up)  # not one file after another


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_of_each_row_are_counted(tmp_path, tiny_tokenizer, packing):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " ".join(SENTENCES)}]
    lines = [{"conversations": [turns[0], turns[1] | {"content": turns[1]["content"][: 9 * n]}]} for n in range(1, 30)]
    rows = SFTDataset(write_jsonl(tmp_path / "chats.jsonl", lines), tiny_tokenizer, 128, packing=packing)
    assert rows.row_tokens.tolist() == [tokens_of(row) for row in rows]
    assert len({*rows.row_tokens.tolist()}) > 1


def test_the_start_up_report_says_what_is_taken_of_each_file(files):
    *own, mixed = MixedRows(files, (0.5, 0.25, 0.25), seed=0).summary.splitlines()
    assert own == [file.summary for file in files]
    for name in "abc":
        assert f"{name}.jsonl (" in mixed
    assert mixed.startswith("mixed, by tokens: ")
    assert f"of {len(files[0]):,} rows" in mixed


def identity_of(*files, shares=(1, 1)) -> dict:
    return MixedRows(files, shares, seed=0).identity


def test_a_saved_run_is_known_by_the_bytes_of_each_file_and_the_shares(files, tmp_path, tiny_tokenizer):
    a, b, c = files
    now = MixedRows([a, b], (3, 1), seed=0)
    assert now.changed_since(identity_of(a, b, shares=(0.75, 0.25))) is None
    assert "shares" in now.changed_since(identity_of(a, b, shares=(0.7, 0.3)))
    assert "b.jsonl has changed since" in now.changed_since(identity_of(a, c, shares=(3, 1)))
    assert "the saved run used" in now.changed_since(identity_of(a, b, c, shares=(1, 1, 1)))
    assert now.changed_since(a.identity)
    assert "a.jsonl has changed since" in a.changed_since(now.identity)

    (tmp_path / "moved").mkdir()
    moved = [PretrainDataset(file.data_path.rename(tmp_path / "moved" / name), tiny_tokenizer, 64)
             for file, name in ((a, "x.jsonl"), (b, "y.jsonl"))]  # fmt: skip
    assert MixedRows(moved, (3, 1), seed=0).changed_since(now.identity) is None


def test_it_looks_to_the_loop_like_the_rows_of_one_file(files):
    mixed = MixedRows(files, (1, 1, 1), seed=0)
    assert (mixed.packing, mixed.max_seq_len) == (True, 64)
    assert {name: len(value) for name, value in mixed.empty_row.items()} == dict.fromkeys(files[0].empty_row, 0)
    assert np.array_equal(mixed[0]["position_ids"], files[0][int(mixed._rows[0][0])]["position_ids"])


def test_a_bad_line_is_told_with_its_file(files, tmp_path, tiny_tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "typo"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: .*missing"):
        MixedRows([*files, PretrainDataset(path, tiny_tokenizer, 64)], None, seed=0)
