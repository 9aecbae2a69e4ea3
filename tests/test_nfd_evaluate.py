import json

import pytest
import torch
from conftest import generator, tiny_action_model, tiny_vae

import nfd_evaluate
from nfd_evaluate import ROWS, held_actions, played, quality_rows, speed_rows, streamed
from nfd_world import sample_walks
from text import TextEncoder
from vae import VAE
from weights import load_model, shipped

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------- quality
def parts(count, frames=5):
    """(model, VAE, text, actions, generator) of a small world with so many walks."""
    torch.manual_seed(0)
    encoder, walks = TextEncoder(), sample_walks(count, frames, generator(1))
    text = encoder(walks.prompts()).detach()
    return tiny_action_model(), tiny_vae(1), text, walks.actions, generator(2)


def test_walks_are_streamed_as_one_batch():
    video = streamed(*parts(2), steps=1, ode=False)
    assert video.shape == (2, 5, 3, 64, 64)
    assert not torch.equal(video[0], video[1])


def test_walks_are_played_one_after_the_other():
    video = played(*parts(2), steps=2, ahead=4)
    assert video.shape == (2, 5, 3, 64, 64)
    assert not torch.equal(video[0], video[1])


def test_a_player_without_speculation_shows_what_is_streamed():
    video = streamed(*parts(1), steps=2, ode=False)
    assert torch.allclose(played(*parts(1), steps=2, ahead=1), video, atol=1e-4)


@pytest.fixture(scope="module")
def rows():
    """The quality of the shipped models on a walk of 6 frames."""
    vae = load_model(VAE, shipped("vae_frame"))
    encoder = load_model(TextEncoder, shipped("text_encoder"))
    return quality_rows(vae, encoder, CPU, 1, 6, seed=0)


def test_teacher_and_player_are_measured_in_each_way_of_sampling(rows):
    assert list(rows) == [name for name, *_ in ROWS]


@pytest.mark.parametrize("row", [0, 2, 3])
def test_the_shipped_models_show_the_looks_they_are_asked_for(rows, row):
    assert rows[ROWS[row][0]]["looks"] > 80


# ----------------------------------------------------------------------------------------- speed
@pytest.mark.parametrize("every", [1, 4, 16])
def test_actions_change_as_often_as_they_should(every):
    actions = torch.tensor(held_actions(4000, every))
    assert abs((actions.diff() != 0).float().mean() - 1 / every) < 0.03


@pytest.fixture(scope="module")
def speed():
    """The speed of a small model, whose times mean nothing."""
    torch.manual_seed(0)
    model, encoder = tiny_action_model(window=16), TextEncoder().requires_grad_(False)
    with torch.no_grad():
        return speed_rows(model, model, tiny_vae(1), encoder, (64, 64), CPU, 1, 24)


def speculative(speed, every):
    return speed[f"player, 4 steps, an action lasts {every} frames on average, speculative"]


def test_teacher_and_player_are_timed_with_and_without_guesses(speed):
    assert len(speed) == 9
    assert sum("speculative" in name for name in speed) == 4
    assert all(row["frames/s"] > 0 for row in speed.values())


def test_an_action_that_is_held_makes_more_than_a_frame_a_block(speed):
    assert speculative(speed, 64)["frames a block"] > 1.5


def test_an_action_that_always_changes_makes_a_frame_a_block(speed):
    assert speculative(speed, 1)["frames a block"] == 1
    assert speculative(speed, 1)["dropped, %"] == 0


# ---------------------------------------------------------------------------------- command line
def test_the_command_prints_the_quality_of_its_json(command_line, monkeypatch):
    monkeypatch.setattr(nfd_evaluate, "ROWS", ROWS[2:3])
    monkeypatch.setattr(nfd_evaluate, "FPS", 1)
    status, out, err = command_line(
        nfd_evaluate, "--clips", 1, "--seconds", 15, "--device", "cpu", "--out", "table"
    )
    assert status == 0, err
    with open("table.json") as result, open("table.md") as table:
        (row,) = json.load(result)["rows"].values()
        assert table.read() in out
    assert f"{row['action accuracy']:.1f}" in out


def test_the_command_prints_the_speed_of_its_json(command_line, monkeypatch):
    monkeypatch.setattr(nfd_evaluate, "FRAMES", 2)
    arguments = ("--bench", "--repeats", 1, "--device", "cpu", "--out", "speed")
    status, out, err = command_line(nfd_evaluate, *arguments)
    assert status == 0, err
    with open("speed.json") as result, open("speed.md") as table:
        assert len(json.load(result)["rows"]) == 9
        assert table.read() in out


@pytest.mark.parametrize(
    "arguments",
    [["--repeats", 2], ["--size", "small"], ["--dtype", "bfloat16"], ["--bench", "--clips", 2]],
)
def test_flags_without_an_effect_are_refused(arguments, command_line):
    status, _, err = command_line(nfd_evaluate, *arguments)
    assert status == 2
    assert "with --bench" in err


@pytest.mark.parametrize("flag", ["--clips", "--repeats", "--seconds"])
def test_numbers_that_measure_nothing_are_refused(flag, command_line):
    status, _, err = command_line(nfd_evaluate, flag, 0)
    assert status == 2
    assert flag in err
    assert len(err.splitlines()) == 1
