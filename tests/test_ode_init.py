import functools

import pytest
import torch
from conftest import generator, tiny_model

import evaluate
import metrics
import ode_init
from dataset import Shapes
from diffusion import Schedule
from model import DiT, ModelConfig
from ode_init import chunk_levels, make_trajectories, regression_loss, student_grid
from text import TextEncoder
from weights import UserError, load_model, save_weights


# ----------------------------------------------------------------------------------- trajectories
@pytest.mark.parametrize("student_steps", [1, 2, 4])
@pytest.mark.parametrize("solver_steps", [4, 24, 48])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_student_times_lie_on_the_solver_grid(solver_steps, shift, student_steps):
    schedule, config = Schedule(shift=shift), ModelConfig(steps=student_steps)
    on_grid = schedule.timesteps(solver_steps)[student_grid(solver_steps, config)]
    assert torch.allclose(on_grid, schedule.timesteps(student_steps))


@pytest.mark.parametrize("solver_steps", [6, 26, 50])
def test_student_times_that_are_not_on_the_grid_are_refused(solver_steps):
    with pytest.raises(UserError, match="multiple of 4"):
        student_grid(solver_steps, ModelConfig(steps=4))


CAUSVID = {"steps": 3, "times": (1000, 280, 120), "shift": 8.0}


@pytest.mark.parametrize("solver_steps", [25, 50])
def test_uneven_student_times_lie_on_the_solver_grid(solver_steps):
    config = ModelConfig(**CAUSVID)
    schedule = Schedule(config.shift, config.times)
    on_grid = schedule.timesteps(solver_steps)[student_grid(solver_steps, config)]
    assert torch.allclose(on_grid, schedule.timesteps(3))
    assert (1000 * on_grid).round().tolist() == [1000, 757, 522, 0]


def test_uneven_student_times_that_are_not_on_the_grid_are_refused():
    with pytest.raises(UserError, match="multiple of 25"):
        student_grid(12, ModelConfig(**CAUSVID))


def test_a_student_of_uneven_times_is_trained_and_keeps_them(command_line, monkeypatch):
    monkeypatch.setattr(evaluate, "fixed_set", functools.partial(metrics.fixed_set, prompts=1))
    teacher = tiny_model(**CAUSVID)
    save_weights("teacher.safetensors", teacher.state_dict(), teacher.config, stage="teacher")
    given = ["--teacher", "teacher.safetensors", "--solver-steps", 25, "--trajectories", 16]
    given += ["--steps", 1, "--batch-size", 1, "--out", "out", "--device", "cpu"]
    status, _, err = command_line(ode_init, *given)
    assert status == 0, err
    assert load_model(DiT, "out/ode_init.safetensors").config.times == CAUSVID["times"]


@pytest.mark.parametrize("times", [(280, 1000, 120), (900, 500), (1000, 1000)])
def test_times_that_do_not_fall_from_1000_are_refused(times):
    with pytest.raises(ValueError, match="must fall from 1000"):
        ModelConfig(times=times)


def trajectories(teacher=None, solver_steps=8, student_steps=4, first=0):
    """4 trajectories of clips of 6 latent frames, in batches of 2, and their prompts."""
    grid = student_grid(solver_steps, ModelConfig(steps=student_steps))
    how = (solver_steps, grid, (6, 8, 8, 8), "cpu")
    parts = range(first, 2)
    draw = Shapes().prompter(None, None)
    made = list(make_trajectories(teacher or tiny_model(), encoder(), draw, parts, *how, batch=2))
    return torch.cat([part["states"] for part in made]), [
        p for part in made for p in part["prompts"]
    ]


def encoder():
    torch.manual_seed(0)
    return TextEncoder()


@pytest.mark.parametrize("student_steps", [2, 4])
def test_a_trajectory_has_a_state_for_each_of_the_students_times(student_steps):
    states, _ = trajectories(student_steps=student_steps)
    assert states.shape == (4, student_steps + 1, 6, 8, 8, 8)


def test_every_trajectory_has_a_prompt():
    assert len(trajectories()[1]) == 4


def test_trajectories_are_the_same_every_time():
    assert torch.equal(trajectories()[0], trajectories()[0])


def test_parts_that_are_not_wanted_change_nothing_in_the_others():
    states, prompts = trajectories()
    some, their_prompts = trajectories(first=1)
    assert torch.equal(some, states[2:])
    assert their_prompts == prompts[2:]


def test_trajectories_start_in_unit_noise():
    assert abs(trajectories()[0][:, 0].float().std().item() - 1) < 0.05


def test_trajectories_end_elsewhere_than_they_start():
    states, _ = trajectories()
    assert not torch.allclose(states[:, 0], states[:, -1])


# --------------------------------------------------------------------------------- the regression
class Student:
    """Says x0 = truth + error of every noisy frame, and keeps what it was asked."""

    def __init__(self, truth, error=0.0):
        self.config, self.schedule = tiny_model().config, tiny_model().schedule
        self.truth, self.error = truth, error

    def __call__(self, x_t, t, text, **attention):
        self.x_t, self.t, self.attention = x_t, t, attention
        time = t[:, :, None, None, None]
        v = (x_t - self.truth - self.error) / time.clamp(min=1e-9)
        return torch.where(time > 0, v, 0)


def regress(error=0.0, seed=0):
    """(the loss, the trajectories, the student) of one call."""
    states = torch.randn(2, 5, 6, 8, 8, 8, generator=generator())
    student = Student(states[:, -1], error)
    return regression_loss(student, states, None, generator(seed)), states, student


def test_a_student_that_says_the_trajectorys_end_has_no_loss():
    loss, _, _ = regress()
    assert loss < 1e-10


def test_the_loss_is_the_distance_to_the_trajectorys_end():
    loss, _, student = regress(error=0.5, seed=1)
    share = (student.t > 0).float().mean().item()  # clean frames are right whatever it says
    assert 0 < share < 1
    assert loss.item() == pytest.approx(0.25 * share, rel=1e-3)


def test_the_student_sees_the_trajectorys_state_at_each_frames_time():
    _, states, student = regress(seed=1)
    times = student.schedule.timesteps(4).float()
    for b in range(2):
        for f in range(6):
            level = (times - student.t[b, f]).abs().argmin()
            assert times[level] == student.t[b, f]
            assert torch.equal(student.x_t[b, f], states[b, level, f])


def test_the_student_attends_by_chunk_and_window_of_its_config():
    _, _, student = regress()
    assert student.attention == {"chunk": 3, "window": 4}


def levels():
    return chunk_levels(500, 7, 3, 5, generator())


def test_levels_include_the_clean_one():
    assert set(levels().flatten().tolist()) == {0, 1, 2, 3, 4}


def test_the_frames_of_a_chunk_have_one_level():
    assert levels().shape == (500, 7)
    assert (levels()[:, 0] == levels()[:, 2]).all()
    assert (levels()[:, 3] == levels()[:, 5]).all()


def test_levels_of_chunks_are_independent():
    assert 0.1 < (levels()[:, 0] == levels()[:, 3]).float().mean() < 0.3
