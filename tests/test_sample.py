import itertools

import pytest
import torch
from conftest import generator, tiny_model, tiny_text, tiny_vae

from diffusion import noise_source, solve_ode, solve_teacher, with_null
from sample import chunk_shape, remember_chunk, sample_teacher, solve_chunk, text_to_video


def world(**fields):
    """A tiny student, its VAE and a prompt."""
    return tiny_model(num_layers=2, **fields), tiny_vae(), tiny_text()


def latents(seed, chunks, fields=None, **options):
    """The latents of so many chunks of a stream; fields: of the model's config."""
    made = text_to_video(*world(**fields or {}), generator(seed), **options)
    torch.seed()  # the global random state must not matter
    return torch.cat([x for x, _ in itertools.islice(made, chunks)], dim=1)


# ------------------------------------------------------------------------------------ the stream
def test_a_seed_gives_the_same_latents_bit_for_bit():
    assert torch.equal(latents(0, 6), latents(0, 6))


def test_another_seed_gives_other_latents():
    assert not torch.equal(latents(0, 2), latents(1, 2))


def test_a_longer_video_begins_as_the_shorter_one():
    assert torch.equal(latents(0, 6)[:, :9], latents(0, 3))


@torch.no_grad()
def test_a_stream_is_algorithm_2_chunk_by_chunk():
    """Written with a full block-causal forward over all latents so far, and no cache."""
    streamed, g, past = latents(0, 6, window=3), generator(0), torch.zeros(1, 0, 8, 8, 8)
    model, _, text = world()
    for _ in range(6):
        x = torch.randn(1, 3, 8, 8, 8, generator=g)
        for t, r in itertools.pairwise(model.schedule.timesteps(4)):
            t_all = torch.cat([torch.zeros(1, past.shape[1]), torch.full((1, 3), float(t))], dim=1)
            v = model(torch.cat([past, x], dim=1), t_all, text, chunk=3, window=3)[:, -3:]
            x = model.schedule.x0(x, v, t)
            if r > 0:
                x = model.schedule.add_noise(x, torch.randn(x.shape, generator=g), r)
        past = torch.cat([past, x], dim=1)
    assert (streamed - past).abs().max() < 1e-4


@pytest.mark.parametrize(("chunk", "frames"), [(3, [9, 12, 12, 12]), (1, [1, 4, 4, 4])])
def test_the_first_frame_of_a_stream_has_a_latent_of_its_own(chunk, frames):
    made = text_to_video(*world(chunk=chunk), generator())
    assert [video.shape[1] for _, video in itertools.islice(made, 4)] == frames


@torch.no_grad()
def test_a_stream_keeps_no_more_than_its_window():
    model, _, text = world()
    cache, keys = model.new_cache(1, 8, 8, window=2), model.text_keys(text)
    size, kept = cache.k.numel() + cache.v.numel(), []
    for _ in range(5):
        remember_chunk(model, torch.randn(1, 3, 8, 8, 8), keys, cache)
        kept.append(cache.frames)
    assert kept == [3] * 5
    assert cache.k.numel() + cache.v.numel() == size


def test_each_video_of_a_batch_is_what_it_is_alone():
    model, vae, text = world()
    made = text_to_video(model, vae, text.expand(2, -1, -1), [generator(s) for s in (3, 4)])
    both = torch.cat([x for x, _ in itertools.islice(made, 3)], dim=1)
    for row, seed in zip(both, (3, 4), strict=True):
        assert (row - latents(seed, 3)[0]).abs().max() < 1e-4


def test_a_stream_has_the_size_that_is_asked_for():
    x, video = next(text_to_video(*world(), generator(), size=(32, 48)))
    assert x.shape == (1, 3, 8, 4, 6)
    assert video.shape == (1, 9, 3, 32, 48)


# ------------------------------------------------------------------------- as the weights have it
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_chunk_takes_the_models_steps_and_a_clean_pass(steps):
    model, vae, text = world(steps=steps)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    list(itertools.islice(text_to_video(model, vae, text, generator()), 3))
    assert len(passes) == 3 * (steps + 1) - 1  # the last chunk is remembered when more is asked


def test_steps_that_are_given_count_more_than_the_models():
    assert torch.equal(latents(0, 3, {"steps": 2}), latents(0, 3, steps=2))
    assert not torch.equal(latents(0, 3, {"steps": 2}), latents(0, 3))


def test_a_window_that_is_given_counts_more_than_the_models():
    assert torch.equal(latents(0, 6, {"window": 2}), latents(0, 6, window=2))
    assert not torch.equal(latents(0, 6, {"window": 2}), latents(0, 6))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_stream_makes_chunks_of_the_models_length(chunk):
    made = text_to_video(*world(chunk=chunk), generator())
    assert [x.shape[1] for x, _ in itertools.islice(made, 3)] == [chunk] * 3


# --------------------------------------------------------------------------------- in many steps
@torch.no_grad()
def test_a_chunk_under_guidance_1_is_the_plain_ode():
    model, vae, text = world()
    text = torch.cat([text, tiny_text("a blue star")])
    shape, times = chunk_shape(model, vae, 2), model.schedule.timesteps(3)
    keys, both = model.text_keys(text), model.text_keys(with_null(text))
    cache, double = (model.new_cache(count, *shape[-2:]) for count in (2, 4))

    def velocity(x_t, t):
        return model(x_t, t, keys, cache=cache)

    for _ in range(3):
        x = torch.randn(shape)
        plain = solve_ode(velocity, x, times, model.schedule)[-1]
        guided = solve_chunk(model, x, times, both, double, guidance=1.0)
        assert (plain - guided).abs().max() < 1e-5
        remember_chunk(model, plain, keys, cache)
        remember_chunk(model, plain, both, double)


@pytest.mark.parametrize("frames", [1, 7, 9])
def test_the_teacher_makes_one_clip_of_the_frames_asked_for(frames):
    model, vae, text = world()
    x, video = sample_teacher(model, vae, text, generator(), frames, steps=2)
    assert x.shape == (1, *vae.latent_shape(frames, 64, 64))
    assert video.shape == (1, frames, 3, 64, 64)


def test_the_teachers_clip_is_what_its_ode_ends_in():
    model, vae, text = world()
    x, _ = sample_teacher(model, vae, text, generator(), 9, steps=2)
    noise = noise_source(generator())(x.shape)
    assert torch.equal(x, solve_teacher(model, noise, text, steps=2)[-1])
