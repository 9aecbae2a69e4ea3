import os
from types import SimpleNamespace

import torch

from data import BOUNCE, SPIN, sample_clips
from dataset import SHARES, LatentClips
from diffusion import Schedule, draw_times, flow_matching_loss
from metrics import recover
from model import DiT, ModelConfig
from nfd_teacher import draw_walk_times, own_past, with_actions
from nfd_world import ACTIONS, RADIUS, sample_walks
from teacher import draw_chunk_times


def test_times_are_shifted_towards_noise():
    t = draw_times(20_000, Schedule(shift=5.0), torch.Generator().manual_seed(0))
    assert t.min() > 0
    assert t.max() < 1
    assert abs(t.median() - 5 / 6) < 0.01


def test_each_clip_can_have_a_shift_of_its_own():
    t = draw_times(
        20_000,
        Schedule(shift=5.0 * (1 + torch.arange(20_000) % 2)),
        torch.Generator().manual_seed(0),
    )
    assert abs(t[::2].median() - 5 / 6) < 0.01
    assert abs(t[1::2].median() - 10 / 11) < 0.01


def test_motions_that_are_hard_to_learn_are_drawn_more_often():
    data = object.__new__(LatentClips)  # without a VAE: the draw is what is tested
    data.clips = sample_clips(2000, torch.Generator().manual_seed(0))
    data.latents = torch.zeros(2000, 21, 1, 1, 1)
    x0, prompts = data.batch(20_000, 21, torch.Generator().manual_seed(0), "cpu")
    assert x0.shape == (20_000, 21, 1, 1, 1)
    share = lambda *words: (
        sum(any(word in prompt for word in words) for prompt in prompts) / len(prompts)
    )
    expected = SHARES[data.clips.motion] / SHARES[data.clips.motion].sum()
    assert abs(share("bouncing") - expected[data.clips.motion == BOUNCE].sum()) < 0.02
    assert abs(share("spinning", "turning") - expected[data.clips.motion == SPIN].sum()) < 0.02


def test_a_piece_of_a_walk_has_its_actions_and_none_leads_to_its_first_frame():
    data = object.__new__(LatentClips)
    data.clips = sample_walks(8, 48, torch.Generator().manual_seed(0))
    data.latents = (100 * torch.arange(8)[:, None] + torch.arange(48)).float()[
        ..., None, None, None
    ]  # which frame of which walk
    data.drifted = data.latents + 0.5
    x0, prompts, actions, past = data.batch(200, 24, torch.Generator().manual_seed(0), "cpu")
    walk, frame = (x0[:, :, 0, 0, 0].long() // 100)[:, 0], x0[:, :, 0, 0, 0].long() % 100
    assert (frame.diff(dim=1) == 1).all()
    assert frame[:, 0].max() > 0
    assert torch.equal(actions[:, 1:], data.clips.actions[walk[:, None], frame][:, 1:])
    assert not actions[:, 0].any()
    assert prompts == data.clips[walk].prompts()
    assert torch.equal(past, x0 + 0.5)


def test_a_past_that_has_drifted_shows_the_same_walk_in_another_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = SimpleNamespace(
        encoder=[None, SimpleNamespace(weight=torch.zeros(1))],
        mean=torch.zeros(1),
        encode=lambda video: video,
    )
    walks = sample_walks(100, 2, torch.Generator().manual_seed(0))
    data = LatentClips(vae, walks)
    as_it_is, drifted = recover(data.latents.float()), recover(data.drifted.float())
    off = drifted.radius.mean(1) - RADIUS
    assert (as_it_is.radius - RADIUS).abs().max() < 0.3
    assert off.abs().max() < 1.8
    assert off.min() < -1.3
    assert off.max() > 1.3
    moved = torch.stack([drifted.x - as_it_is.x, drifted.y - as_it_is.y]).abs()[
        :, off < 0
    ]  # what is larger a wall may cut
    assert moved.max() < 0.2
    assert len(os.listdir("runs/latents")) == 2
    assert torch.equal(LatentClips(vae, walks).drifted, data.drifted)


def test_each_chunk_has_a_time_of_its_own_and_each_clip_a_share_of_clean_ones():
    t = draw_chunk_times(2000, 8, 3, Schedule(), torch.Generator().manual_seed(0))
    assert t.shape == (2000, 8)
    assert (t[:, 0] == t[:, 2]).all()
    assert (t[:, 6] == t[:, 7]).all()
    assert ((t[:, 0] != t[:, 3]) | (t[:, 0] == 0)).all()
    assert abs((t[:, ::3] == 0).float().mean() - 0.5) < 0.03
    clean = (t[:, ::3] == 0).float().mean(1)
    assert (
        (clean == 0) | (clean == 1)
    ).float().mean() > 0.4  # half of the clips; a quarter if all had the same share


def test_walks_are_of_next_frames_behind_clean_ones_of_blocks_and_of_single_frames():
    t = draw_walk_times(8000, 24, Schedule(shift=12.0), torch.Generator().manual_seed(0))
    assert t.shape == (8000, 24)
    turns, block, single = t[1::2], t[2::4], t[::4]
    median = lambda t: t[t > 0].median().item()
    assert abs(median(turns) - 12 / 13) < 0.01
    assert abs(median(block) - 12 / 13) < 0.01
    assert abs(median(single) - 3 / 4) < 0.01
    noisy = turns > 0
    assert not (noisy[:, 1:] & noisy[:, :-1]).any()
    assert abs(noisy[:, 0].float().mean() - 0.5) < 0.03
    assert (noisy[:, ::2].any(1) != noisy[:, 1::2].any(1)).all()
    assert (noisy.sum(1) >= 11).all()
    assert (block[:, 8:16] == block[:, 8:9]).all()
    assert ((block[:, 8] > 0) & (block[:, 0] == 0)).any()
    assert abs((block[:, 8] > 0).float().mean() - 0.5) < 0.05
    assert ((single[:, 1:4] != single[:, :3]) | (single[:, :3] == 0)).all()
    assert abs((single[:, :4] > 0).float().mean() - 0.5) < 0.03


def test_flow_matching_loss_is_zero_for_the_true_velocity():
    x0, t = torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3)
    seen = {}

    def model(x_t, t, text):
        eps = (x_t - (1 - t)[..., None, None, None] * x0) / t[..., None, None, None]
        seen["text"] = text
        return eps - x0

    model.schedule = Schedule()
    assert flow_matching_loss(model, x0, t, "prompt", torch.Generator().manual_seed(0)) < 1e-6
    assert seen["text"] == "prompt"


def test_clean_frames_do_not_count_in_the_flow_matching_loss():
    x0, t = torch.randn(2, 3, 4, 2, 2), torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.5, 0.0]])
    model = lambda x_t, t, text: torch.where(t[..., None, None, None] == 0, 1e3, 0.0).expand_as(x_t)
    model.schedule = Schedule()
    loss = flow_matching_loss(model, x0, t, "prompt", torch.Generator().manual_seed(0))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    assert abs(loss - (eps - x0).square().mean((2, 3, 4))[t > 0].mean()) < 1e-6


def action_model(window=6, frames=9):
    torch.manual_seed(0)
    model = DiT(
        ModelConfig(
            dim=48,
            ffn_dim=64,
            freq_dim=16,
            num_heads=2,
            num_layers=2,
            text_dim=8,
            chunk=1,
            window=window,
            num_actions=len(ACTIONS),
        )
    )
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return (
        model,
        torch.randn(8, frames, 8, 4, 4),
        torch.randn(8, 3, 8),
        torch.randint(len(ACTIONS), (8, frames)),
    )


def test_the_models_own_past_is_runs_of_four_frames_behind_data():
    model, x0, text, actions = action_model()
    past = lambda x0, actions=actions: own_past(
        model, x0, 2, text, actions, torch.Generator().manual_seed(0)
    )[1:4]
    changes = lambda other: ((past(x0) - other).flatten(2).norm(dim=2) > 1e-4).all(0).tolist()
    made, late, early, act = past(x0), x0.clone(), x0.clone(), actions.clone()
    assert torch.equal(made[:, :3], x0[1:4, :3])
    assert torch.equal(made[:, 7:], x0[1:4, 7:])
    assert not made.requires_grad
    early[:, 2] = torch.randn_like(
        early[:, 2]
    )  # where the data leaves off shows in all four frames,
    assert changes(past(early)) == [False, False] + [True] * 5 + [False] * 2
    late[:, 5] = torch.randn_like(late[:, 5])  # what it goes on with in none before it
    assert changes(past(late)) == [False] * 5 + [True] * 2 + [False] * 2
    act[:, 4] = (act[:, 4] + 1) % len(ACTIONS)
    assert changes(past(x0, act)) == [False] * 4 + [True] * 3 + [False] * 2


def test_a_batch_of_one_has_a_past_of_its_own_too():
    model, x0, text, actions = action_model()
    made = own_past(model, x0[:1], 2, text[:1], actions[:1], torch.Generator().manual_seed(0))
    assert made.shape == x0[:1].shape
    assert not torch.equal(made, x0[:1])
    assert torch.equal(made[:, 7:], x0[:1, 7:])


def test_half_of_the_models_own_pasts_begin_with_frames_of_its_own():
    model, x0, text, actions = action_model(window=12, frames=12)  # 6 given frames
    past = lambda x0: own_past(model, x0, 2, text, actions, torch.Generator().manual_seed(0))
    made, other = past(x0), x0.clone()
    assert torch.equal(made[1:4, :6], x0[1:4, :6])
    assert torch.equal(made[4:, 4:6], x0[4:, 4:6])
    assert ((made - x0)[4:, :4].flatten(2).norm(dim=2) > 1e-2).all()
    other[:, 0] = torch.randn_like(
        other[:, 0]
    )  # the first is made behind nothing, the others behind it
    changed = ((past(other) - made).flatten(2).norm(dim=2) > 1e-4)[4:]
    assert changed[:, :4].all()
    assert not changed[:, 4:6].any()


def test_the_models_own_past_begins_with_data_noised_to_a_random_time_that_leaves_its_place_to_see():
    model, x0, text, actions = action_model()
    torch.nn.init.zeros_(model.head.head.weight)  # v = 0: a frame stays as noisy as it begins
    found = []
    for seed in range(32):
        made = own_past(model, x0, 1, text, actions, torch.Generator().manual_seed(seed))
        noise, times = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)), []
        for piece in (
            (slice(1, None), slice(3, 7)),
            (slice(4, None), slice(0, 3)),
        ):  # a run, and those that the latter half begin with
            t = ((made - x0)[piece] / (noise - x0)[piece]).median()  # x_t = (1 - t) x0 + t eps
            assert torch.allclose(made[piece], (1 - t) * x0[piece] + t * noise[piece], atol=1e-4)
            times.append(t.item())
        assert abs(times[1] - times[0] - 0.3) < 1e-4
        found.append(times[0])
    assert 0.2 < min(found) < 0.3
    assert 0.5 < max(found) < 0.6


def test_in_every_eighth_walk_the_past_is_lost():
    model, x0, text, actions = action_model()
    made = own_past(model, x0, 2, text, actions, torch.Generator().manual_seed(0))
    noise, none = (
        torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)),
        torch.zeros(1, 1, dtype=torch.long),
    )
    for f in range(9):
        v = model(noise[:1, f : f + 1], torch.ones(1, 1), text[:1], chunk=1, actions=none)
        assert torch.allclose(
            made[:1, f : f + 1], noise[:1, f : f + 1] - v, atol=1e-5
        )  # x0 = eps - v: a guess without a past


def test_an_action_model_begins_as_the_teacher_and_knows_nothing_of_actions():
    teacher = DiT(
        ModelConfig(dim=48, ffn_dim=64, freq_dim=16, num_heads=2, num_layers=5, text_dim=8)
    )
    torch.nn.init.normal_(teacher.head.head.weight, std=0.1)
    model, x, t, text = (
        with_actions(teacher, layers=3),
        torch.randn(2, 5, 8, 4, 4),
        torch.rand(2, 5),
        torch.randn(2, 3, 8),
    )
    actions = torch.randint(len(ACTIONS), (2, 5))
    teacher.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in (0, 2, 4))  # evenly spaced
    assert torch.equal(model(x, t, text, chunk=1, actions=actions), teacher(x, t, text, chunk=1))
    assert model.config.chunk == 1
    assert model.action_embedding.weight.requires_grad
