"""What is shared out over ranks is whole, even and the same; what a run is made of is written down.

Real ranks are in tests/integration/test_torchrun.py.
"""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from bridge_engine.distributed.ranks import World, stretch
from bridge_engine.errors import EngineError
from bridge_engine.rollout import SamplingParams, sample
from bridge_engine.run import run
from bridge_engine.spec.identity import spec_sha256
from bridge_engine.spec.train import TrainSpec
from tests.support.tiny import EOS, PAD, random_policy
from tests.support.training import make_trainer


class OneOf(World):
    """A rank that never meets the others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 16, 17])
def test_stretches_are_even_and_leave_nothing_out(count, size):
    items = list(range(count))
    parts = [items[stretch(count, rank, size)] for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_balanced_shares_leave_nothing_out_and_cost_about_the_same(size):
    rng = torch.Generator().manual_seed(size)
    items = ["x" * int(torch.randint(1, 200, (), generator=rng)) for _ in range(40)]
    shares = [OneOf(rank, size).balanced(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    costs = [sum(map(len, share)) for share in shares]
    assert max(costs) - min(costs) <= min(map(len, items)) + max(map(len, items)) // 4


def test_more_ranks_than_sequences_leave_some_without_work_and_none_behind():
    shares = [OneOf(rank, 4).balanced(["aa", "b"]) for rank in range(4)]
    assert shares == [["aa"], ["b"], [], []]


def test_one_process_shares_with_nobody_and_loads_no_torch():
    world = World()
    assert world.spread([3, 1, 2], lambda mine: [-i for i in mine]) == [-3, -1, -2]
    assert world.balanced([[3], [1, 1]]) == [[3], [1, 1]]
    assert world.add({"a": 1.5}) == {"a": 1.5}
    assert world.first(lambda: 7) == 7
    assert world.any(True)
    assert not world.any(False)
    code = "import bridge_engine.run, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_share_of_the_rows_is_drawn_as_among_all_of_them():
    policy = random_policy("student")
    prompts = [[5, 6, 7], [3], [9, 8, 7, 6]]

    def draw(rows):
        with policy.using("student"):
            return sample(
                policy.model,
                prompts,
                SamplingParams(12),
                eos_ids=[EOS],
                pad_id=PAD,
                generator=torch.Generator().manual_seed(4),
                repeats=5,
                rows=rows,
            )

    everything = [c.tokens for c in draw(None)]
    for rows in ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14], [14], [6, 2]):
        assert [c.tokens for c in draw(rows)] == [everything[row] for row in rows]
    assert draw([]) == []


# --------------------------------------------------------------------------- what is written down


def uploaded(folder, answers):
    rows = [{"problem": f"{i}+{i}?", "answer": a, "solution": f"#{a}"} for i, a in answers]
    folder.joinpath("ds_mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGE_UPLOADS_DIR", str(tmp_path))
    uploaded(tmp_path, [(i, str(2 * i)) for i in range(1, 9)])
    return {"method": "sft", "data": {"demos": "ds_mine"}, "sft": {"batch_size": 2}}


def test_a_run_directory_of_other_data_is_refused_with_the_role(tmp_path, own_data):
    first = make_trainer(tmp_path / "run", **own_data)
    assert first.run()
    assert make_trainer(tmp_path / "run", **own_data).run(), "the same rows are the same data"
    uploaded(tmp_path, [(i, str(2 * i)) for i in range(1, 8)] + [(9, "18")])
    again = make_trainer(tmp_path / "run", **own_data)
    accepted = []
    again.accepted = lambda: accepted.append(True)
    with pytest.raises(EngineError, match=r"other data.*data\.demos: ") as caught:
        again.run()
    assert (caught.value.code, caught.value.param) == ("data_changed", "data.demos")
    assert not accepted


def test_a_checkpoint_from_before_the_hashes_can_still_be_resumed(tmp_path, own_data):
    made = make_trainer(tmp_path / "run", **own_data)
    assert made.run()
    made.state._refuse_other_data({})


def test_the_spec_and_the_data_of_a_run_are_in_its_directory_by_hash(tmp_path, own_data):
    spec = {**own_data, "steps": 1, "name": "first try"}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    environments = []
    for folder, name in (("a", "first try"), ("b", "called otherwise")):
        file.write_text(yaml.safe_dump({**spec, "name": name}))
        assert run(file, tmp_path / folder) == 0
        environments.append(json.loads((tmp_path / folder / "environment.json").read_text()))
    one, other = environments
    assert one["spec_sha256"] == other["spec_sha256"], "a name is no part of what is trained"
    assert len(one["spec_sha256"]) == 64
    assert set(one["data_sha256"]) == {"demos"}
    assert one["processes"] == 1
    # what it says is what another spec, or other data, would change
    changed = TrainSpec.model_validate({**spec, "seed": 1})
    assert spec_sha256(changed) != spec_sha256(TrainSpec.model_validate(spec))
    uploaded(tmp_path, [(9, "18")] * 3)
    assert run(file, tmp_path / "c") == 0
    c = json.loads((tmp_path / "c" / "environment.json").read_text())
    assert c["data_sha256"] != one["data_sha256"]
    assert c["spec_sha256"] == one["spec_sha256"]
