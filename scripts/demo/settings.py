"""The paths of the demo's data and weights, and the settings of its stages."""

from trainer.arguments import ROOT

DATA, OUT = ROOT / "dataset" / "demo", ROOT / "out" / "demo"
SIZE = ("--dim", "256", "--n_layers", "8", "--max_seq_len", "128", "--out_dir", str(OUT))  # samples are short here
TRAINING = ("--batch_size", "32", "--accumulation_steps", "1", "--warmup_iters", "20", "--optimizer", "muon")
PRETRAIN = ("--data_path", str(DATA / "pretrain_hq.jsonl"), "--epochs", "4", "--learning_rate", "2e-3")
SFT = (
    *("--data_path", str(DATA / "sft_mini_512.jsonl"), "--eval_path", str(DATA / "eval_sft.jsonl")),
    *("--epochs", "3", "--learning_rate", "1.5e-3"),
)

# what `make demo-all` adds
STUDENT = ("--dim", "128", "--n_layers", "5", *SIZE[4:])  # a quarter of the teacher's parameters
FROM_TEACHER = ("--teacher_weight", "full_sft_256")  # it alone: alpha 0, temperature 1
REASON = (
    *("--max_seq_len", "256", "--packing", "0", "--batch_size", "48", "--accumulation_steps", "1"),
    *("--epochs", "3", "--learning_rate", "1.5e-3", "--optimizer", "muon", "--warmup_iters", "20"),
)
