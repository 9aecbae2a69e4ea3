"""The first steps of each training script, on tiny networks, beside the same steps by hand."""

import copy
import functools
import itertools
import json
import os

import pytest
import torch
from conftest import TINY, generator, tiny_action_model, tiny_model, tiny_vae
from steps import (
    LR,
    STAGES,
    TIMES,
    WINDOW,
    FewShapes,
    by_hand,
    load,
    normal,
    on_tiny_networks,
    train_tiny,
    trajectories,
    weights_of,
    without_optimizers,
)
from torch import nn

from data import sample_clips
from model import DiT
from optimisers import EMA
from text import TextEncoder
from vae import VAE
from weights import load_model, read_weights, save_weights


# ------------------------------------------------------------------------ a script's first steps
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tiny weights, which is the current one, with random latents for clips."""
    folder = tmp_path_factory.mktemp("steps")
    student = tiny_model(window=WINDOW)
    for p in student.parameters():
        nn.init.normal_(p, mean=p.mean().item(), std=0.2)
    networks = {
        "vae": tiny_vae(),
        "vae_frame": tiny_vae(time_stride=1),
        "text_encoder": TextEncoder(),
        "teacher": tiny_model(window=WINDOW),
        "student": student,
        "action_teacher": tiny_action_model(window=4, steps=3),
    }
    (folder / "tiny.json").write_text(json.dumps(TINY | {"window": WINDOW}))
    for name, network in networks.items():
        save_weights(str(folder / f"{name}.safetensors"), network.state_dict(), network.config)
    with on_tiny_networks(folder):
        yield folder


@pytest.fixture(scope="module")
def both_ways(folder):
    """The steps of a stage, made once: (by the script, as `train_tiny` caught them, by hand)."""

    @functools.cache
    def made(name):
        command, build = STAGES[name]
        script = train_tiny(command, name.replace(" ", "_"))
        return script, by_hand(build, copy.deepcopy(script.start))

    return made


@pytest.fixture
def fresh(folder):
    """What a script calls `training.train` with, before any step."""
    return lambda name: train_tiny(STAGES[name][0], steps=())


def distance(one, other):
    """The distance of two dicts of tensors."""
    return sum((v - other[k]).square().sum().item() for k, v in one.items()) ** 0.5


def off(name, part, both_ways):
    """How far a part is from the one by hand, as a share of the way that it went."""
    script, hand = both_ways(name)
    end = weights_of(script.state[part])
    way = distance(end, weights_of(script.start[part]))
    assert way > 0
    return distance(end, weights_of(hand.state[part])) / way


def averages(state):
    return [k for k, v in state.items() if isinstance(v, EMA)]


every_stage = pytest.mark.parametrize("name", STAGES)


# ------------------------------------------------------------------------------ what a step does
@every_stage
def test_networks_learn_as_by_hand(name, both_ways):
    state = without_optimizers(both_ways(name)[0].state)
    networks = state.keys() - averages(state)
    assert networks
    assert all(off(name, part, both_ways) < 1e-3 for part in networks)


@every_stage
def test_averages_follow_as_by_hand(name, both_ways):
    parts = averages(both_ways(name)[0].state)
    assert parts
    assert all(off(name, part, both_ways) < 1e-3 for part in parts)


@every_stage
def test_a_step_reports_the_numbers_by_hand(name, both_ways):
    script, hand = both_ways(name)
    for mine, expected in zip(script.numbers, hand.numbers, strict=True):
        assert {k: v.item() for k, v in mine.items()} == pytest.approx(
            {k: v.item() for k, v in expected.items()}, rel=1e-4
        )


@every_stage
def test_a_step_draws_no_other_numbers_than_by_hand(name, both_ways):
    script, hand = both_ways(name)
    assert torch.equal(script.drawn, hand.drawn)


LATE = {
    "vae": {"ema": 0.998},
    "teacher": {"ema": 0.999},
    "ode init": {"ema": 0.999},
    "dmd": {"ema": 0.99},
    "action teacher": {"ema": 0.999},
    "player": {"ema": 0.95, "slow": 0.998},
}


@pytest.mark.parametrize(("name", "decays"), LATE.items(), ids=LATE.keys())
def test_a_late_average_keeps_this_share_of_its_past(name, decays, fresh):
    script = fresh(name)
    for part in decays:
        for v in script.state[part].shadow.values():
            v.zero_()
    script.step(10_005, generator())
    network = weights_of(next(iter(script.state.values())))
    for part, decay in decays.items():
        mean = {k: v / (1 - decay) for k, v in script.state[part].shadow.items()}
        assert distance(mean, network) < 1e-3 * distance(mean, dict.fromkeys(mean, 0.0))


# --------------------------------------------------------------------- what is kept and written
@every_stage
def test_a_checkpoint_holds_networks_and_averages(name, both_ways):
    script, hand = both_ways(name)
    assert without_optimizers(script.state).keys() == hand.state.keys()


@every_stage
def test_a_checkpoint_holds_the_optimisers_that_step(name, both_ways):
    script, hand = both_ways(name)
    optimizers = script.state.keys() - hand.state.keys()
    assert len(optimizers) == len(hand.state.keys() & {"vae", "model", "student", "fake"})
    assert all(script.state[optimizer].state for optimizer in optimizers)


WRITTEN = [
    ("vae", "vae", "ema", ""),
    ("frame vae", "vae_frame", "ema", ""),
    ("teacher", "teacher", "ema", "0."),
    ("teacher", "text_encoder", "ema", "1."),
    ("causal teacher", "causal_teacher", "ema", "0."),
    ("ode init", "ode_init", "ema", ""),
    ("dmd", "student", "ema", ""),
    ("rollout", "student", "ema", ""),
    ("action teacher", "action_teacher", "ema", "0."),
    ("player", "player", "slow", ""),
]


def averaged(script, part, prefix):
    """The tensors of an average whose names begin with a prefix, without it."""
    shadow = script.state[part].shadow
    return {k.removeprefix(prefix): v for k, v in shadow.items() if k.startswith(prefix)}


@pytest.mark.parametrize(("name", "file", "part", "prefix"), WRITTEN)
def test_what_is_written_is_the_average(name, file, part, prefix, both_ways):
    script, _ = both_ways(name)
    written, _ = read_weights(os.path.join(script.run.out, f"{file}.safetensors"))
    expected = averaged(script, part, prefix)
    assert written.keys() == expected.keys()
    if name in ("vae", "frame vae"):  # these two normalise the latents at the end
        del expected["mean"], expected["std"]
    assert all(torch.equal(v.bfloat16().float(), written[k]) for k, v in expected.items())


@pytest.mark.parametrize(("name", "file"), [("vae", "vae"), ("frame vae", "vae_frame")])
def test_a_trained_vae_is_written_with_normalised_latents(name, file, both_ways):
    vae = load_model(VAE, os.path.join(both_ways(name)[0].run.out, f"{file}.safetensors"))
    latents = vae.encode(FewShapes().video(64, 33, generator(2)))
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.02
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 0.02


@pytest.mark.parametrize("name", dict.fromkeys(name for name, *_ in WRITTEN))
def test_a_stopped_run_writes_nothing(name, folder):
    script = train_tiny(STAGES[name][0], f"stopped_{name.replace(' ', '_')}", (), seconds=None)
    assert os.listdir(script.run.out) == []


SHEETS = [
    ("teacher", "teacher.fixed_sheet", 1, "ema", "0."),
    ("causal teacher", "teacher.fixed_sheet", 1, "ema", "0."),
    ("ode init", "ode_init.fixed_sheet", 1, "ema", ""),
    ("dmd", "dmd.fixed_sheet", 1, "ema", ""),
    ("action teacher", "nfd_teacher.walk_sheet", 0, "ema", "0."),
    ("player", "nfd_consistency.walk_sheet", 0, "slow", ""),
]


@pytest.mark.parametrize(("name", "sampler", "place", "part", "prefix"), SHEETS)
def test_sheets_show_the_average(name, sampler, place, part, prefix, both_ways, monkeypatch):
    script, shown = both_ways(name)[0], []
    monkeypatch.setattr(sampler, lambda *given, **_: shown.append(weights_of(given[place])))
    script.sheet("sheet.png")
    assert distance(shown[0], averaged(script, part, prefix)) == 0


KINDS = [("teacher", "teacher"), ("causal teacher", "causal"), ("ode init", "student")]


@pytest.mark.parametrize(("name", "kind"), [*KINDS, ("dmd", "student")])
def test_sheets_are_sampled_as_the_model_is_trained(name, kind, both_ways, monkeypatch):
    script, kinds = both_ways(name)[0], []
    sampler = f"{STAGES[name][0].split()[0]}.fixed_sheet"
    monkeypatch.setattr(sampler, lambda *given, **_: kinds.append(given[0]))
    script.sheet("sheet.png")
    assert kinds == [kind]


def test_a_vaes_sheet_shows_the_average(both_ways, monkeypatch):
    script, shown = both_ways("vae")[0], []
    monkeypatch.setattr("vae.save_sheet", lambda video, path: shown.append(video))
    script.sheet("sheet.png")
    vae = tiny_vae()
    vae.load_state_dict(script.state["ema"].shadow)
    clips, reconstructed = shown[0][::2], shown[0][1::2]
    assert torch.allclose(reconstructed, vae.decode(vae.encode(clips)), atol=1e-5)


# ------------------------------------------------------------------------------- single claims
def test_trajectories_are_those_of_the_teachers_guided_ode(folder, monkeypatch):
    kept = []

    def solve(path, names, told, count, make):
        kept.extend(make(0))
        return trajectories()

    monkeypatch.setattr("ode_init.kept_in", solve)
    train_tiny(STAGES["ode init"][0], steps=())
    teacher, encoder, g = load(DiT, "teacher"), load(TextEncoder, "text_encoder"), generator()
    text = encoder(sample_clips(16, g).prompts(g))
    states = [normal((16, 21, 8, 8, 8), g)]
    with torch.no_grad():
        for t, r in itertools.pairwise(TIMES):
            x_t, at = states[-1], t.expand(16, 21)
            v_text, v_null = (teacher(x_t, at, prompt) for prompt in (text, 0 * text))
            states.append(x_t - (t - r) * (v_null + 2 * (v_text - v_null)))
    made = kept[0]["states"].float()
    assert torch.allclose(made, torch.stack(states, dim=1), rtol=0.01, atol=0.01)


def test_the_fake_score_has_twice_the_students_learning_rate(fresh):
    state = fresh("dmd").state
    rates = [state[f"{name}_optimizer"].param_groups[0]["lr"] for name in ("student", "fake")]
    assert rates == pytest.approx([LR, 2 * LR])


@pytest.mark.parametrize("name", ["student", "fake"])
def test_adamw_has_no_momentum_in_dmd(name, fresh):
    assert fresh("dmd").state[f"{name}_optimizer"].param_groups[0]["betas"] == (0.0, 0.99)


def test_guidance_of_the_teacher_moves_the_student_elsewhere(both_ways):
    two, three = (weights_of(both_ways(name)[0].state["student"]) for name in ("dmd", "guidance 3"))
    start = weights_of(both_ways("dmd")[0].start["student"])
    assert distance(two, three) > 0.1 * distance(two, start)


def test_the_fake_score_is_asked_at_one_time_for_each_clip(fresh):
    script, times = fresh("dmd"), []
    script.state["fake"].register_forward_hook(lambda _, inputs, v: times.append(inputs[1]))
    script.step(0, generator())
    assert len(times) == 2  # for the student, and to learn
    for t in times:
        assert (t == t[:, :1]).all()
        assert len(t[:, 0].unique()) == 4


def test_the_fake_score_learns_at_the_time_it_was_asked_at(fresh):
    script, times = fresh("dmd"), []
    script.state["fake"].register_forward_hook(lambda _, inputs, v: times.append(inputs[1]))
    script.step(0, generator())
    assert torch.equal(times[0], times[1])


ACTION_STAGES = [("action teacher", "nfd_teacher"), ("player", "nfd_consistency")]


def own_pasts(script, module, monkeypatch):
    """Take a step in which a model's own past is 7 everywhere.

    -> (weights of the model that made it, noisy frames and times that the network saw).
    """
    made, seen = [], []

    def own_past(model, past, *_):
        made.append(weights_of(model))
        return torch.full_like(past, 7.0)

    network = next(iter(script.state.values()))
    if module == "nfd_teacher":
        network = network[0]
    network.register_forward_hook(lambda _, inputs, v: seen.append(inputs[:2]))
    monkeypatch.setattr(f"{module}.own_past", own_past)
    script.step(1, generator())
    return made[0], *seen[0]


@pytest.mark.parametrize(("name", "module"), ACTION_STAGES)
def test_clean_frames_of_walks_are_a_models_own(name, module, fresh, monkeypatch):
    _, x_t, t = own_pasts(fresh(name), module, monkeypatch)
    assert (x_t[t == 0] == 7).all()
    assert (x_t[t > 0] != 7).all()


@pytest.mark.parametrize(("name", "module"), ACTION_STAGES)
def test_the_own_past_is_made_by_the_average(name, module, fresh, monkeypatch):
    script = fresh(name)
    part = averages(script.state)[-1]  # the slow one, where there are two
    for v in script.state[part].shadow.values():
        v.mul_(0.5)
    prefix = "0." if module == "nfd_teacher" else ""
    expected = {k: v.clone() for k, v in averaged(script, part, prefix).items()}
    assert distance(own_pasts(script, module, monkeypatch)[0], expected) == 0


def test_the_consistency_target_is_the_fast_average(fresh, monkeypatch):
    script, targets = fresh("player"), []

    def loss(student, target, *_, **attention):
        targets.append(weights_of(target))
        return sum(p.sum() for p in student.parameters())

    monkeypatch.setattr("nfd_consistency.consistency_loss", loss)
    for v in script.state["ema"].shadow.values():
        v.mul_(0.5)
    expected = weights_of(script.state["ema"])
    script.step(0, generator())
    assert distance(targets[0], expected) == 0
