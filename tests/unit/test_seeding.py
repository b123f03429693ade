"""Draws are functions of (seed, purpose, index) alone."""

import torch

from bridge_engine.seeding import epoch_draw, generator

ITEMS = list(range(10))


def draw(step, *, count=4, seed=0, purpose="demos"):
    return epoch_draw(ITEMS, count, seed=seed, purpose=purpose, step=step)


def test_every_item_comes_once_an_epoch_and_epochs_differ():
    row = [item for step in range(10) for item in draw(step)]  # 40 draws: four epochs
    epochs = [row[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == ITEMS for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_that_spans_two_epochs_skips_and_repeats_nothing():
    row = [item for step in range(5) for item in draw(step)]  # 20 draws, steps of 4 over 10 items
    assert sorted(row[:10]) == sorted(row[10:]) == ITEMS


def test_a_batch_larger_than_the_data_goes_through_it_again():
    assert sorted(draw(0, count=25)) == sorted(ITEMS + ITEMS + draw(0, count=25)[20:])


def test_draws_depend_on_seed_and_purpose_and_on_nothing_global():
    first = draw(3)
    torch.manual_seed(999)
    assert draw(3) == first
    assert draw(3, seed=1) != first
    assert draw(3, purpose="prompts") != first


def test_generators_of_other_steps_are_other_generators():
    numbers = {float(torch.rand(1, generator=generator(0, "rollouts", step))) for step in range(50)}
    assert len(numbers) == 50
