"""What a save is said to take is what it takes."""

import pytest

from bridge_engine.models.catalog import resolve_model
from bridge_engine.models.shapes import shape_of
from bridge_engine.state.sizes import export_bytes, state_bytes
from tests.support.training import make_trainer


def on_disk(folder):
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "bridge"},
        {"method": "sft", "export": {"merged": True}, "optimizer": {"name": "sgd"}},
        {"method": "bridge", "student": {"form": "full"}, "export": {"svd_rank": 4}},
    ],
)
def test_a_save_takes_what_was_said_before(tmp_path, changes):
    with make_trainer(tmp_path, **changes, steps=1) as trainer:
        assert trainer.run()
        shape = shape_of(resolve_model("bridge-tiny"))
        state = on_disk(tmp_path / "checkpoints")
        exports = on_disk(tmp_path / "adapters") + on_disk(tmp_path / "models")
        assert state_bytes(trainer.spec, shape) == pytest.approx(state, rel=0.1)
        assert export_bytes(trainer.spec, shape) == pytest.approx(exports, rel=0.1)
