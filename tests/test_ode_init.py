import pytest
import torch

from diffusion import Schedule
from model import DiT, ModelConfig
from ode_init import chunk_levels, make_trajectories, regression_loss, student_grid
from text import TextEncoder
from weights import UserError


@pytest.mark.parametrize("solver_steps", [4, 24, 48])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_student_times_lie_on_the_solver_grid(solver_steps, shift):
    schedule = Schedule(shift=shift)
    assert torch.allclose(
        schedule.timesteps(solver_steps)[student_grid(solver_steps)], schedule.timesteps(4)
    )
    with pytest.raises(UserError, match="multiple of 4"):
        student_grid(solver_steps + 2)


def tiny(seed=0):
    torch.manual_seed(seed)
    model = DiT(ModelConfig(dim=16, ffn_dim=16, freq_dim=8, num_heads=1, num_layers=1))
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def test_trajectories_start_in_the_noise_and_end_where_the_solver_ends():
    model, encoder = tiny(), TextEncoder()
    states, prompts = make_trajectories(model, encoder, 4, 8, (6, 8, 8, 8), "cpu", batch=2)
    again, _ = make_trajectories(model, encoder, 4, 8, (6, 8, 8, 8), "cpu", batch=2)
    assert states.shape == (4, 5, 6, 8, 8, 8)
    assert len(prompts) == 4
    assert torch.equal(states, again)
    assert abs(states[:, 0].float().std().item() - 1) < 0.05
    assert not torch.allclose(states[:, 0], states[:, -1])


def test_target_is_the_trajectory_own_end():
    """A student that returns the right x0 has loss 0, and the loss of any other is its distance to the last state."""
    model, g = tiny(), torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 6, 8, 8, 8, generator=g)

    class Student:
        config, schedule = model.config, model.schedule
        error = 0.0

        def __call__(self, x_t, t, text, chunk, window):
            assert chunk == 3
            assert window == 4
            self.seen = x_t, t
            v = (x_t - states[:, -1] - self.error) / t[:, :, None, None, None].clamp(min=1e-9)
            return torch.where(t[:, :, None, None, None] > 0, v, 0)

    student = Student()
    assert regression_loss(student, states, None, g) < 1e-10
    student.error = 0.5
    loss = regression_loss(student, states, None, torch.Generator().manual_seed(3))
    x_t, t = student.seen
    assert loss.item() == pytest.approx(0.25 * (t > 0).float().mean().item(), rel=1e-3)
    # what the student sees is the trajectory's state at each chunk's time, and the times are the student's
    times = model.schedule.timesteps(4).float()
    for b in range(2):
        for f in range(6):
            level = (times - t[b, f]).abs().argmin()
            assert times[level] == t[b, f]
            assert torch.equal(x_t[b, f], states[b, level, f])


def test_levels_are_one_per_chunk_independent_and_include_clean():
    levels = chunk_levels(500, 7, 3, 5, torch.Generator().manual_seed(0))
    assert levels.shape == (500, 7)
    assert set(levels.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert (levels[:, 0] == levels[:, 2]).all()
    assert (levels[:, 3] == levels[:, 5]).all()
    assert 0.1 < (levels[:, 0] == levels[:, 3]).float().mean() < 0.3
