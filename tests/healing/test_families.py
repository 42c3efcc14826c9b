"""Every family that can be trained: each stored tensor has a parameter, and learns."""

import pytest
import torch
from safetensors.torch import load_file

from reattend.checkpoint.index import open_checkpoint
from reattend.families.source import source_of
from reattend.healing.loop import Data, Trainer
from reattend.healing.states import Record, States
from reattend.modeling.loading import load
from reattend.recipes.schema import parse_step
from tiny_models import CONFIGS


def silent(*arguments):
    pass


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in ("bert", "mixtral")])
def test_family(models, family, tmp_path):
    folder = models(family)
    source = source_of(open_checkpoint(folder))
    step = parse_step(
        {"step": "heal", "kl": 0.0, "labels": 1.0, "outliers": 1.0, "outlier_limit": 1e-3, "steps": 2, "batch": 2,
         "learning_rate": 0.1, "warmup": 0, "evaluate_every": 1},
        "test",
    )  # fmt: skip
    assert step.check(source)
    model, _ = load(folder, dtype="float32", runtime="stock")
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(step, source, Data(ids[:2], ids[2:], 0, "cpu"), model, None)
    record = trainer.run(Record(""), States(tmp_path, main=True), silent)
    assert set(trainer._stored) == set(load_file(folder / "model.safetensors"))
    assert {group.reads[0] for group in step.groups(source)} == set(trainer._stored)
    assert record.curve[0][1 + 4] > 0  # attention and FFN outputs were seen
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    # Softmax does not see what is added to all scores of a query: a key's bias has no gradient but rounding.
    assert [name for name in still if "k_proj.bias" not in name] == []
    if record.best:
        with States(tmp_path, main=True).best(record) as best:
            assert set(best.keys()) == set(trainer._stored)
