"""Streams: each line once per epoch, the same rows as map-style datasets, one order for any number of processes."""

import json

import fsspec
import numpy as np
import pytest

from dataset import DataError, PretrainDataset, SFTDataset, shards
from dataset.shards import Blocks, Shard, hash_shards, list_shards
from dataset.stream_loader import StreamLoader
from dataset.streaming import Fault, StreamedRows
from tests.conftest import SENTENCES, write_jsonl


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """250 lines of unequal length, one longer than several blocks: at least 8 blocks of 4 KiB."""
    lines = [f"{n}. {SENTENCES[n % 8]} {SENTENCES[n % 5]}"[: 20 + n * 37 % 190] for n in range(250)]
    lines[70] = "A very long line. " * 1000
    return write_jsonl(tmp_path_factory.mktemp("stream") / "texts.jsonl", [{"text": line} for line in lines])


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    asked = [
        [
            {"role": "user", "content": SENTENCES[n % 8][:30]},
            {"role": "assistant", "content": SENTENCES[n % 7] * (n % 4 + 1)},
        ]
        for n in range(150)
    ]
    path = tmp_path_factory.mktemp("stream") / "chats.jsonl"
    return write_jsonl(path, [{"conversations": chat} for chat in asked])


@pytest.fixture
def streamed(tiny_tokenizer):
    def make(path, kind=PretrainDataset, **given) -> StreamedRows:
        return StreamedRows(str(path), tiny_tokenizer, kind, **{"max_seq_len": 64, "buffer_bytes": 1 << 13} | given)

    return make


def pieces_of(row: dict) -> list[tuple]:
    """(ids, labels) of each piece in a row."""
    starts = [i for i, position in enumerate(row["position_ids"].tolist()) if position == 0]
    ends = [*starts[1:], len(row["position_ids"])]
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    return [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in zip(starts, ends, strict=True)]


def all_pieces(rows) -> list[tuple]:
    return sorted(piece for row in rows for piece in pieces_of(row))


def epoch_of(rows: StreamedRows, epoch: int = 0) -> list[dict]:
    windows = [rows.window(epoch * rows.windows + place) for place in range(rows.windows)]
    return [window.row(number) for window in windows for number in range(window.rows)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", [PretrainDataset, SFTDataset])
def test_an_epoch_has_the_pieces_of_the_map_style_dataset(kind, packing, texts, chats, streamed, tiny_tokenizer):
    path = texts if kind is PretrainDataset else chats
    whole = kind(path, tiny_tokenizer, 64, packing)
    rows = streamed(path, kind, packing=packing)
    assert rows.windows > 2
    assert all_pieces(epoch_of(rows)) == all_pieces(whole[number] for number in range(len(whole)))


def test_rows_are_filled_and_shuffled_anew_in_each_epoch(texts, streamed):
    rows = streamed(texts)
    first, second = ([row["input_ids"].tolist() for row in epoch_of(rows, epoch)] for epoch in (0, 1))
    assert first != second
    assert first != [row["input_ids"].tolist() for row in epoch_of(streamed(texts, seed=1))]
    assert first == [row["input_ids"].tolist() for row in epoch_of(streamed(texts))]
    lengths = [len(row) for row in first]
    assert max(lengths) == 64
    assert np.mean(lengths) > 0.9 * 64


def taken(rows: StreamedRows, steps=(0, 7), batch_size=4, accumulation=2, **how) -> list[list]:
    """The ids of each micro-batch, and the stream's position after each step."""
    loader = StreamLoader(rows, batch_size, accumulation, report=lambda text: None, **how)
    return [
        ([batch["input_ids"].tolist() for batch in batches], dict(rows.position)) for batches in loader.steps(*steps)
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(texts, streamed, workers):
    assert taken(streamed(texts), num_workers=workers) == taken(streamed(texts))


def test_it_goes_on_from_any_position(texts, streamed):
    """Also across the ends of windows and of the epoch."""
    whole = taken(streamed(texts), (0, 30), batch_size=8)
    assert whole[-1][1]["window"] >= streamed(texts).windows
    for step in (1, 5, 22):
        rows = streamed(texts)
        rows.position = whole[step - 1][1]
        assert taken(rows, (step, 30), batch_size=8) == whole[step:]


def test_ranks_share_the_rows_of_a_step(texts, streamed):
    """Two ranks, which exchange their read counts, see together what one rank sees in twice as many batches."""

    def rank(number):
        rows, asked = streamed(texts), []

        def gather(own):
            asked.append(own)
            begin = 2 * (len(asked) - 1)
            both = [rows.window(begin), rows.window(begin + 1)]
            assert both[number].tokens.tolist() == own.tokens.tolist()
            return both

        return taken(rows, accumulation=1, rank=number, world_size=2, gather=gather)

    alone = taken(streamed(texts), accumulation=2)
    for (first, _), (second, _), (both, _) in zip(rank(0), rank(1), alone, strict=True):
        assert first + second == both


def test_a_stream_has_no_end(texts, streamed):
    rows = streamed(texts)
    assert len(taken(rows, (0, 60), batch_size=16)) == 60
    assert rows.position["window"] > 2 * rows.windows


def test_held_out_rows_are_not_trained_on(texts, streamed, monkeypatch):
    monkeypatch.setattr("dataset.streaming.LEAST_BLOCK", 256)
    rows = streamed(texts, hold_out=True)
    apart = rows.held_out()
    held = all_pieces(apart[number] for number in range(len(apart)))
    learned = all_pieces(epoch_of(rows))
    assert held
    assert sorted(held + learned) == all_pieces(epoch_of(streamed(texts)))
    assert streamed(texts).held_out() is None


class TestBadLines:
    @pytest.fixture
    def spoilt(self, texts, tmp_path):
        """Line 200 is not JSON."""
        lines = texts.read_bytes().split(b"\n")
        lines[199] = b'{"text": '
        path = tmp_path / "texts.jsonl"
        path.write_bytes(b"\n".join(lines))
        return path

    def test_it_is_named_when_it_is_reached(self, spoilt, streamed):
        windows = [streamed(spoilt).window(place) for place in range(streamed(spoilt).windows)]
        (fault,) = [window for window in windows if isinstance(window, Fault)]
        assert fault.reason.startswith(f"{spoilt}, line 200: not valid JSON")
        assert fault.reason.endswith(': {"text":')

    def test_the_run_is_told_with_the_last_step_before_it(self, spoilt, streamed):
        told, rows = [], streamed(spoilt, seed=3)
        before = len(taken(rows, (0, 99), stop=told.append))
        assert len(told) == 1
        assert "line 200" in str(told[0])
        assert 0 < before < 60

    def test_none_is_left_out_before_the_first_step(self, spoilt, streamed):
        with pytest.raises(DataError, match="line 200"):
            taken(streamed(spoilt), (0, 3), batch_size=1000)

    def test_it_is_counted_where_it_is_to_be_skipped(self, spoilt, streamed, tiny_tokenizer):
        rows = streamed(spoilt, skip_bad_lines=True)
        said = []
        loader = StreamLoader(rows, 50, 1, report=said.append)
        assert len(list(loader.steps(0, 6))) == 6
        assert "1 bad lines skipped, the first: " in said[0] or "2 bad lines skipped" in said[0]  # depends on the epoch
        assert f"{spoilt}, line 200: " in said[0]
        whole = PretrainDataset(spoilt, tiny_tokenizer, 64, skip_bad_lines=True)
        assert all_pieces(epoch_of(rows)) == all_pieces(whole[number] for number in range(len(whole)))

    def test_keys_that_mean_nothing_here_are_counted(self, tmp_path, streamed):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"line {n}", "id": n} for n in range(9)])
        assert "ignored keys: id 9" in str(streamed(path).window(0).read)

    def test_blank_lines_may_only_come_last(self, tmp_path, streamed):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n\r\n \n\n')
        assert streamed(path).window(0).read.samples == 2
        path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n')
        assert streamed(path).window(0) == Fault(f"{path}, line 2: the line is empty")

    @pytest.mark.parametrize("blank", [1, 7, 8, 9, 30])
    def test_however_many_blank_lines_come_before_the_next(self, tmp_path, streamed, monkeypatch, blank):
        monkeypatch.setattr(shards, "REST_BYTES", 8)
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "one"}\n' + b"\n" * blank)
        assert streamed(path).window(0).read.samples == 1
        path.write_bytes(b'{"text": "one"}\n' + b"\n" * blank + b'{"text": "two"}\n')
        assert streamed(path).window(0) == Fault(f"{path}, line 2: the line is empty")

    def test_nothing_to_learn_does_not_go_on_for_ever(self, tmp_path, streamed):
        path = tmp_path / "a.jsonl"
        path.write_text("no\nnever\n")
        with pytest.raises(DataError, match=r"no line has a target within 64 tokens; .* bad lines skipped"):
            taken(streamed(path, skip_bad_lines=True))


@pytest.mark.parametrize("block_bytes", [1, 7, 100, 4096])
def test_blocks_hold_each_line_once(tmp_path, block_bytes):
    """For any block size and line length, also if the file does not end with a line end."""
    random = np.random.default_rng(block_bytes)
    shards = []
    for number in range(3):
        path = tmp_path / f"{number}.txt"
        lines = [b"x" * random.integers(0, 60) for _ in range(40)] + [b"y" * 5000, b"end"]
        path.write_bytes(b"\n".join(lines))
        shards.append(Shard(str(path), path.stat().st_size))
    blocks = Blocks(shards, block_bytes)
    found = [each for block in range(len(blocks)) for each in blocks.lines(block)]
    for shard in shards:
        content = open(shard.address, "rb").read()  # noqa: SIM115
        ours = [(place, line) for file, place, line in found if file == shard]
        assert [line for _, line in ours] == content.split(b"\n")
        assert [shard.line_number(place) for place, _ in ours] == list(range(1, len(ours) + 1))


class TestPlaces:
    """The forms of --data_path: a file, a folder, a pattern, an address."""

    @pytest.fixture
    def folder(self, tmp_path):
        for number in range(3):
            write_jsonl(tmp_path / f"part-{number}.jsonl", [{"text": f"{number} {n}"} for n in range(4)])
        (tmp_path / "empty.jsonl").touch()
        (tmp_path / "notes.txt").write_text("no data")
        return tmp_path

    def names(self, address) -> list[str]:
        return [shard.name for shard in list_shards(str(address))]

    def test_local(self, folder):
        assert self.names(folder / "part-1.jsonl") == ["part-1.jsonl"]
        assert self.names(folder) == ["part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]
        assert self.names(folder / "part-[02].jsonl") == ["part-0.jsonl", "part-2.jsonl"]

    def test_an_address(self, folder, streamed):
        memory = fsspec.filesystem("memory")
        for path in folder.glob("part-*.jsonl"):
            memory.pipe(f"/streams/{path.name}", path.read_bytes())
        assert self.names("memory://streams") == self.names(folder)
        assert self.names("memory://streams/part-*.jsonl") == self.names(folder)
        assert self.names("memory://streams/part-1.jsonl") == ["part-1.jsonl"]
        assert hash_shards(list_shards("memory://streams")) == hash_shards(list_shards(str(folder)))
        ours, theirs = (
            [row["input_ids"].tolist() for row in epoch_of(streamed(address))]
            for address in (folder, "memory://streams")
        )
        assert ours == theirs

    @pytest.mark.parametrize(
        ("address", "told"),
        [
            ("nowhere.jsonl", "does not exist"),
            ("nothing-*.jsonl", "no file with content"),
            ("memory://nothing.jsonl", "cannot be read"),
            ("nosuch://a.jsonl", "Protocol not known"),
        ],
    )
    def test_nothing_there(self, tmp_path, address, told):
        with pytest.raises(DataError, match=told):
            list_shards(address if "://" in address else str(tmp_path / address))

    def test_a_file_of_another_kind(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"PAR1 and so on")
        with pytest.raises(DataError, match="is a parquet file"):
            list_shards(str(path))

    def test_a_change_is_noticed(self, folder, streamed):
        then = json.loads(json.dumps(streamed(folder).identity))
        assert streamed(folder).changed_since(then) is None
        write_jsonl(folder / "part-1.jsonl", [{"text": f"1 {n + 1}"} for n in range(4)])
        assert "has changed since" in streamed(folder).changed_since(then)

    def test_a_run_that_streamed_goes_on_streaming(self, folder, streamed, tiny_tokenizer):
        path = folder / "part-1.jsonl"
        rows, whole = streamed(path), PretrainDataset(path, tiny_tokenizer, 64)
        assert "used --stream" in whole.changed_since(rows.identity)
        assert "did not --stream" in rows.changed_since(whole.identity)
