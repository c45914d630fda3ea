"""The benchmarks by name, as tasks of the harness: its prompts, its choice of few-shot examples, its targets.

A task's rows come from the published files, or, without them, from the harness's download.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from scripts.evaluation.controls import shuffle_stems
from scripts.evaluation.subjects import CEVAL, CMMLU, groups_of
from scripts.evaluation.task_files import Splits, read_own, read_splits, read_subjects
from trainer.errors import UserError

TASKS = Path(lm_eval.tasks.__file__).parent

# The harness compiles a prompt's template anew for each question, which takes as long as a small model's answer.
lm_eval.utils.env.from_string = functools.lru_cache(maxsize=None)(lm_eval.utils.env.from_string)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as the harness defines it.

    Attributes:
        path: its YAML, "{}" for the subject.
        scored: the split that is scored.
        stem: the fields of a row that form the question without its options; () if they cannot be separated.
        subjects: {subject: its groups}.
    """

    path: str
    scored: str
    stem: tuple[str, ...] = ()
    subjects: dict[str, tuple[str, ...]] = field(default_factory=dict)


BENCHMARKS = {
    "ceval": Benchmark("ceval/ceval-valid_{}.yaml", "val", ("question",), groups_of(CEVAL)),
    "cmmlu": Benchmark("cmmlu/cmmlu_{}.yaml", "test", ("Question",), groups_of(CMMLU)),
    "openbookqa": Benchmark("openbookqa/openbookqa.yaml", "test", ("question_stem",)),
    "arc_easy": Benchmark("arc/arc_easy.yaml", "test", ("question",)),
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", "test", ("question",)),
    "hellaswag": Benchmark("hellaswag/hellaswag.yaml", "validation", ("query",)),
    "piqa": Benchmark("piqa/piqa.yaml", "validation", ("goal",)),
    "siqa": Benchmark("siqa/siqa.yaml", "validation", ("context", "question")),
    "sciq": Benchmark("sciq/sciq.yaml", "test", ("support", "question")),
    "lambada": Benchmark("lambada/lambada_openai.yaml", "test"),
    "winogrande": Benchmark("winogrande/default.yaml", "validation"),
}
FETCHED_ONLY = ("lambada", "winogrande")
OWN = {  # a user's own questions are asked like OpenBookQA's: which option continues the question best
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}


@dataclass
class Exam:
    """A benchmark, or a subject of one.

    Attributes:
        benchmark: its name here; for a user's own file, the file's name.
        stem: see `Benchmark`.
        seed: for drawing few-shot examples, if the harness draws them.
    """

    benchmark: str
    task: ConfigurableTask
    stem: tuple[str, ...]
    subject: str | None = None
    groups: tuple[str, ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.subject}" if self.subject else self.benchmark

    def rows(self, limit: int | None, shuffle: int | None = None) -> list[dict]:
        """The rows to ask: the first `limit`; shuffled if a seed is given, see `shuffle_stems`.

        Raises:
            UserError: as in `shuffle_stems`.
        """
        rows = [dict(row) for _, row in self.task.doc_iterator(limit=limit, rank=0, world_size=1)]
        return rows if shuffle is None else shuffle_stems(self.name, rows, self.stem, shuffle)


def open_exams(
    names: Sequence[str], data_dir: Path | None, num_fewshot: int, seed: int, split: str | None = None
) -> Iterator[Exam]:
    """The exams of these benchmarks, or of a user's own .jsonl files, subject by subject.

    Args:
        data_dir: the folder of the published files; None: the harness downloads them.
        seed: for drawing few-shot examples, if the harness draws them.
        split: score this split instead (C-Eval's "test").

    Raises:
        UserError: an unknown name, missing or malformed files, too few examples, or a failed download.
    """
    for name in names:
        if name.endswith((".jsonl", ".json")):
            path = Path(name)
            config = OWN | {"task": path.stem}
            yield _opened(Exam(path.stem, None, ("question",)), config, {"test": read_own(path)}, num_fewshot, seed)
            continue
        if name not in BENCHMARKS:
            raise UserError(f"--tasks {name}: choose from {', '.join(BENCHMARKS)}, or give your own .jsonl")
        benchmark = BENCHMARKS[name]
        scored = split or benchmark.scored
        if data_dir is not None and name in FETCHED_ONLY:
            raise UserError(f"--tasks {name}: the harness downloads it; it is not read from --data_dir")
        if not benchmark.subjects:
            splits = None if data_dir is None else read_splits(name, data_dir, scored)
            yield _opened(
                Exam(name, None, benchmark.stem), load_yaml(TASKS / benchmark.path), splits, num_fewshot, seed
            )
            continue
        by_subject = dict.fromkeys(benchmark.subjects)
        if data_dir is not None:
            by_subject = read_subjects(name, data_dir, ("dev", scored), scored)
        for subject, splits in by_subject.items():
            if subject not in benchmark.subjects:
                raise UserError(f"{name}: the file {subject}.csv matches none of its subjects")
            exam = Exam(name, None, benchmark.stem, subject, benchmark.subjects[subject])
            config = load_yaml(TASKS / benchmark.path.format(subject))
            if split is not None:
                config |= {"validation_split": None, "test_split": split}
            yield _opened(exam, config, splits, num_fewshot, seed)


def _opened(exam: Exam, config: dict, splits: Splits | None, num_fewshot: int, seed: int) -> Exam:
    """The exam with its harness task."""
    if splits is not None:
        config |= {"dataset_path": None, "dataset_name": None, "custom_dataset": functools.partial(_datasets, splits)}
        for kind in ("training_split", "validation_split", "test_split"):
            if config.get(kind) not in splits:
                config[kind] = None
        source = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
        scored = config.get("test_split") or config.get("validation_split")
        examples = 0 if source in (None, scored) else len(splits.get(source, ()))
        if num_fewshot > examples:
            raise UserError(
                f"--num_fewshot {num_fewshot}: {exam.name} has {examples} examples beside its questions; "
                "they come from a dev or train file"
            )
        if source not in splits:
            config.pop("fewshot_split", None)
    try:
        exam.task = ConfigurableTask(config=config)
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and the hub raise without a network
        if splits is not None:
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{exam.name} could not be downloaded ({reason}): without a network, --data_dir names a folder of its files"
        ) from None
    exam.task.set_config("num_fewshot", num_fewshot)
    exam.seed = seed
    return exam


def _datasets(splits: Splits, **settings) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
