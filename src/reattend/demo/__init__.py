"""A small Llama, really trained (`scripts/train_demo_model`), and two texts: all that a first try needs."""

from pathlib import Path

MODEL = Path(__file__).with_name("model")
SELECT_TEXT = Path(__file__).with_name("text") / "select.txt"
EVAL_TEXT = Path(__file__).with_name("text") / "eval.txt"
WINDOW = 256  # tokens: what the model was trained on
