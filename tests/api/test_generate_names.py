"""What adapters and models are called: steps, best, latest, aliases, and names that are none."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from bridge_engine.spec.train import TrainSpec
from tests.api.conftest import BRIDGE, problem
from tests.api.house import House
from tests.api.local_house import ask, client, house, text

__all__ = ["client", "house"]  # fixtures

pytestmark = pytest.mark.timeout(900)  # the first of them waits for inference to start


def test_names_mean_step_best_and_latest(client: TestClient, house: House) -> None:
    house.save(2, "one", accuracy=0.9)
    house.save(4, "two", accuracy=0.1)
    meant = {
        name: ask(client, adapter=f"{house.job}{name}").json()["adapter"].partition("@")[2]
        for name in ("", "@best", "@latest", "@2", "@4")
    }
    assert meant == {"": "2", "@best": "2", "@latest": "4", "@2": "2", "@4": "4"}
    assert text(ask(client, adapter=f"{house.job}@2")) != text(
        ask(client, adapter=f"{house.job}@4")
    )


def test_base_model_that_is_not_the_adapters_is_409(client: TestClient, house: House) -> None:
    house.save(2, "one")
    response = ask(client, adapter=house.job, model="smollm2-135m-instruct")
    assert problem(response, 409, "base_model_mismatch")["allowed"] == ["bridge-tiny"]
    assert text(ask(client, adapter=house.job, model="bridge-tiny"))


def test_unknown_names_are_404_with_the_nearest(client: TestClient, house: House) -> None:
    early = problem(ask(client, adapter=house.job), 404, "unknown_adapter")
    assert "no adapter yet" in early["detail"]
    house.save(2, "one")
    near = problem(ask(client, adapter=house.job[:-1] + "_@2"), 404, "unknown_adapter")
    assert near["nearest"] == f"{house.job}@2"
    assert near["nearest"] in near["detail"]
    step = problem(ask(client, adapter=f"{house.job}@3"), 404, "unknown_adapter")
    assert "saved: 2" in step["detail"]
    for odd in (f"{house.job}@", f"{house.job}@{'9' * 40}", "a\x00b", "../..", "é", ""):
        response = ask(client, adapter=odd)
        assert response.status_code in (200, 404), response.text
    model = problem(ask(client, model="bridge-tyni"), 404, "unknown_model")
    assert model["nearest"] == "bridge-tiny"
    problem(client.get("/adapters/nobody@1"), 404, "unknown_adapter")
    problem(client.get("/adapters", params={"after": "nobody@1"}), 404, "unknown_adapter")


def test_adapter_may_be_named_as_the_model(client: TestClient, house: House) -> None:
    """As everybody does who comes from OpenAI's or vLLM's API."""
    house.save(2, "one")
    expected = ask(client, adapter=house.job).json()
    for name in (house.job, f"{house.job}@2", f"{house.job}@latest"):
        body = ask(client, model=name).json()
        assert (body["model"], body["adapter"]) == ("bridge-tiny", f"{house.job}@2")
        assert body["choices"] == expected["choices"]
    unknown = problem(ask(client, model=f"{house.job}@3"), 404, "unknown_model")
    assert unknown["param"] == "model"
    assert "saved: 2" in unknown["detail"]
    for odd in ("a\x00b", "é", f"{house.job}@{'9' * 5000}"):
        problem(ask(client, model=odd), 404, "unknown_model")


def test_unknown_model_is_told_of_base_models_and_of_adapters(
    client: TestClient, house: House
) -> None:
    house.save(2, "one")
    body = problem(ask(client, model="nobody"), 404, "unknown_model")
    assert {"bridge-tiny", house.job, f"{house.job}@2"} <= set(body["allowed"])
    assert "base model" in body["detail"]
    assert "adapter" in body["detail"]
    typo = problem(ask(client, model=f"{house.job[:-1]}_@2"), 404, "unknown_model")
    assert typo["nearest"] == f"{house.job}@2"


@pytest.mark.parametrize("name", ["@" + "9" * 5000, "@" + "9" * 18, "@01", "@-1", "@٣"])
def test_any_step_after_the_at_is_found_or_404(client: TestClient, house: House, name: str) -> None:
    house.save(2, "one")
    problem(client.get(f"/adapters/{house.job}{name}"), 404, "unknown_adapter")
    problem(ask(client, adapter=f"{house.job}{name}"), 404, "unknown_adapter")


def test_adapters_are_listed_newest_first(client: TestClient, house: House) -> None:
    for step in (2, 4, 6):
        house.save(step, "one")
    page = client.get("/adapters", params={"limit": 2}).json()
    assert [row["step"] for row in page["data"]] == [6, 4]
    rest = client.get("/adapters", params={"after": page["next"]}).json()
    assert [row["step"] for row in rest["data"]] == [2]
    other = house.store.create_job(TrainSpec.model_validate(BRIDGE), total_steps=10)[0].id
    assert client.get("/adapters", params={"job_id": other}).json()["data"] == []


def test_aliases_mean_one_adapter_until_they_are_moved(client: TestClient, house: House) -> None:
    house.save(2, "one", accuracy=0.9)
    house.save(4, "two", accuracy=0.1)
    put = client.put("/adapters/aliases/tutor", json={"adapter": f"{house.job}@best"})
    assert put.status_code == 200, put.text
    assert put.json()["adapter"] == f"{house.job}@2"
    assert ask(client, adapter="tutor").json()["adapter"] == f"{house.job}@2"
    assert client.get("/adapters/tutor").json()["name"] == f"{house.job}@2"
    client.put("/adapters/aliases/tutor", json={"adapter": f"{house.job}@latest"})
    assert ask(client, model="tutor").json()["adapter"] == f"{house.job}@4"
    listed = client.get("/adapters/aliases").json()["data"]
    assert [(a["name"], a["adapter"]) for a in listed] == [("tutor", f"{house.job}@4")]
    near = problem(ask(client, adapter="tutr"), 404, "unknown_adapter")
    assert near["nearest"] == "tutor"
    assert client.delete("/adapters/aliases/tutor").status_code == 204
    problem(ask(client, adapter="tutor"), 404, "unknown_adapter")
    problem(client.delete("/adapters/aliases/tutor"), 404, "unknown_alias")


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("bridge-tiny", {"adapter": "JOB"}, 409, "name_taken"),
        ("job_mine", {"adapter": "JOB"}, 409, "name_taken"),
        ("a@b", {"adapter": "JOB"}, 422, None),
        ("mine", {"adapter": "nobody"}, 404, "unknown_adapter"),
        ("mine", {}, 422, "missing"),
    ],
)
def test_an_alias_that_cannot_be_is_refused(
    client: TestClient, house: House, name: str, body: dict[str, str], status: int, code: str
) -> None:
    house.save(2, "one")
    body = {key: house.job if value == "JOB" else value for key, value in body.items()}
    problem(client.put(f"/adapters/aliases/{name}", json=body), status, code)
    assert client.get("/adapters/aliases").json()["data"] == []
