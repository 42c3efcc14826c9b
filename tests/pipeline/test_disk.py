"""What plan says of the disk, against what a run takes."""

import pytest
import torch
import transformers

from reattend import demo
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.convert.mla.transform import Mla
from reattend.families.source import source_of
from reattend.pipeline.calibrating import StoredStatistics
from reattend.pipeline.planning import plan
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

STEPS = [
    Int8(rounding="compensated"),
    Int8(outliers="static"),
    Int8(outliers="smooth", rounding="compensated"),
    Mla(latent_rank=64, rope_dim=32, refit=False),
]


@pytest.mark.parametrize("step", STEPS, ids=["compensated", "static", "smooth", "mla"])
def test_statistics_take_what_plan_counts(tmp_path, step):
    source = source_of(open_checkpoint(demo.MODEL))
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    ids = torch.randint(10, 2000, (2, 48), generator=torch.Generator().manual_seed(0))
    tokens = {"calibration": ids, "selection": ids.flip(0)}
    statistics = StoredStatistics(tmp_path)
    step.calibrate(source, lambda *texts, **few: layer_passes(model, source.family, tokens), statistics)
    taken = sum(file.stat().st_size for file in tmp_path.iterdir())
    headers = 8192 * len(statistics)
    counted = step.statistics_bytes(source)
    assert 0.4 * counted < taken < counted + headers
    without = plan(Recipe(steps=(Int8(),)), demo.MODEL).disk_bytes
    if step.step == "int8":
        with_statistics = plan(Recipe(steps=(step,), window=64), demo.MODEL).disk_bytes
        assert with_statistics == pytest.approx(without + counted, abs=4096)
