import json
import os

import pytest
import torch
from torch.nn import functional as F

import evaluate
from data import sample_clips
from evaluate import play_walks, table
from metrics import diversity, fixed_set, health, measure
from model import DiT, ModelConfig
from text import TextEncoder
from vae import VAE, VAEConfig
from weights import shipped


@pytest.fixture(scope="module")
def real():
    clips = sample_clips(16, torch.Generator().manual_seed(0), "all")
    return clips, clips.render()


@pytest.fixture(scope="module")
def scores(real):
    """name of a corruption -> its measures, means over the clips."""
    clips, video = real
    g = torch.Generator().manual_seed(1)
    kernel = torch.exp(-(torch.linspace(-2, 2, 9) ** 2) / 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]
    blurred = F.conv2d(
        F.pad(video.flatten(0, 2)[:, None], (4,) * 4, mode="replicate"), kernel
    ).view_as(video)
    made = {
        "real": video,
        "blurred": blurred,
        "frozen": video[:, :1].expand_as(video),
        "shuffled in time": video[:, torch.randperm(81, generator=g)],
        "noisy": video + 0.1 * torch.randn(video.shape, generator=g),
    }
    return {
        name: {k: v.mean().item() for k, v in measure(v, clips).items()} for name, v in made.items()
    }


def test_real_clips_score_99_or_more(scores):
    assert all(scores["real"][k] >= 99 for k in ("text alignment", "frame quality", "identity")), (
        scores["real"]
    )
    assert scores["real"]["temporal quality"] >= 98.5


def test_shuffled_prompts_score_what_chance_gives(real):
    clips, video = real
    found = measure(video[:, :9], clips)  # the attributes but motion are seen in any frame
    order = torch.stack([torch.arange(16).roll(k) for k in range(1, 16)])
    chance = {
        name: 100 * (getattr(clips, name)[order] == getattr(clips, name)).float().mean().item()
        for name in ("colour", "shape", "background")
    }
    shuffled = [measure(video[:, :9], clips[torch.arange(16).roll(k)]) for k in (1, 5, 7, 11, 13)]
    for name, value in chance.items():
        assert found[name].mean() == 100
        assert abs(torch.cat([s[name] for s in shuffled]).mean() - value) < 12
    assert torch.cat([s["text alignment"] for s in shuffled]).mean() < 5


@pytest.mark.parametrize(
    ("corruption", "group", "loss"),
    [
        ("blurred", "frame quality", 10),
        ("noisy", "frame quality", 25),
        ("frozen", "motion", 50),
        ("frozen", "temporal quality", 10),
        ("shuffled in time", "motion", 50),
        ("shuffled in time", "temporal quality", 15),
        ("noisy", "temporal quality", 15),
    ],
)
def test_the_group_that_should_notice_a_corruption_does(scores, corruption, group, loss):
    assert scores[corruption][group] < scores["real"][group] - loss, scores[corruption]


def test_what_a_corruption_leaves_alone_keeps_its_score(scores):
    assert scores["frozen"]["frame quality"] > 98
    assert scores["shuffled in time"]["colour"] == 100
    assert scores["blurred"]["motion"] == 100


def test_a_clip_that_shows_nothing_scores_nothing(real):
    clips, video = real
    empty = measure(video[:2, :, :, :1, :1].expand(-1, -1, -1, 64, 64), clips[:2])
    assert not any(
        empty[k].any()
        for k in ("text alignment", "colour", "shape", "motion", "frame quality", "identity")
    )


def test_diversity_of_the_data_is_full_and_of_one_clip_none():
    clips = sample_clips(3000, torch.Generator().manual_seed(5))
    same = [clips[(clips.shape == 1) & (clips.motion == motion)][:16] for motion in (1, 3)]
    video, asked = (
        torch.stack([c.render(0, 17) for c in same]),
        clips[torch.tensor([torch.nonzero(clips.motion == m)[0] for m in (1, 3)])],
    )
    asked.shape[:] = 1
    assert diversity(video, asked) > 85
    assert diversity(video[:, :1].expand(-1, 16, -1, -1, -1, -1), asked) < 1


def test_the_fixed_set_is_fixed_and_healthy_when_real():
    clips, generator = fixed_set()
    again, _ = fixed_set()
    assert clips.prompts() == again.prompts()
    assert clips.prompts()[0] == clips.prompts()[1] != clips.prompts()[2]
    assert generator.initial_seed() == fixed_set()[1].initial_seed()
    found = health(clips.render(), clips)
    assert found["text alignment"] == 100
    assert found["diversity"] == 0


def test_table_has_a_row_for_each_model():
    text = table(
        {
            "teacher": {"text alignment": 95.04},
            "student": {"text alignment": 93.0, "diversity": 80.0},
        }
    )
    assert text.splitlines()[2].startswith("| teacher | 95.0 |")
    assert len(text.splitlines()) == 4


def test_ablation_trains_what_is_missing_once_and_measures_every_row(
    command_line, tmp_path, monkeypatch
):
    path = tmp_path / "distilled" / "student.safetensors"
    monkeypatch.setattr(
        evaluate, "ABLATION", [("distilled", "student", str(path), "dmd.py --clips 16")]
    )
    written = []
    for _ in range(2):
        status, out, err = command_line(
            evaluate,
            "--ablation",
            "--train-options",
            "--steps 1 --batch-size 1",
            "--clips",
            1,
            "--out",
            "table",
        )
        assert status == 0, err
        assert "| distilled | " in out, err
        written.append(os.path.getmtime(path))
    assert written[0] == written[1]
    assert json.load(open("table.json"))["rows"]["distilled"]["colour"] in (0, 100)
    assert open("table.md").read() in out


def test_ablation_says_which_training_did_not_end(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluate,
        "ABLATION",
        [("distilled", "student", str(tmp_path / "a" / "student.safetensors"), "dmd.py --steps 0")],
    )
    status, _, err = command_line(evaluate, "--ablation")
    assert status == 2
    assert "a/student.safetensors" in err.splitlines()[-1]


def test_over_time_measures_first_and_last_ten_seconds(command_line, tmp_path):
    student = shipped("student")
    status, out, err = command_line(
        evaluate,
        "--over-time",
        "--teacher",
        "--student",
        student,
        "--clips",
        1,
        "--seconds",
        16,
        "--out",
        "time",
    )
    assert status == 0, err
    assert "first 10 s" in out, err
    assert "last 10 s" in out, err
    (row,) = json.load(open("time.json"))["rows"].values()
    assert len(row["frame quality"]) == 12  # windows of 5 seconds, one a second, in 16


# -------------------------------------------------------------------------------------------------- the action world
def test_play_walks_measures_what_the_model_streams_and_what_a_player_shows():
    torch.manual_seed(0)
    model = DiT(
        ModelConfig(
            dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1, chunk=1, num_actions=5
        )
    ).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    torch.nn.init.normal_(model.action_embedding.weight)
    world = (
        model,
        VAE(VAEConfig(8, 1, 16, 16, 16)).eval().requires_grad_(False),
        TextEncoder().requires_grad_(False),
    )
    video, measured = play_walks(*world, count=2, frames=5, steps=1)
    assert video.shape == (2, 5, 3, 64, 64)
    assert set(measured) == {
        name + part
        for name in ("action accuracy", "frame quality", "looks")
        for part in ("", ", last 10 s")
    }
    alone, _ = play_walks(*world, count=1, frames=5, steps=2)
    played, _ = play_walks(*world, count=1, frames=5, steps=2, ahead=1)
    assert torch.allclose(alone, played, atol=1e-4)
    played, _ = play_walks(*world, count=2, frames=5, ahead=4)
    assert played.shape == (2, 5, 3, 64, 64)
    assert not torch.equal(played[0], played[1])
