import functools
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import generator, tiny_model, tiny_text, tiny_vae

from data import BOUNCE, CLOCKWISE, PULSE, RISE, SLIDE, sample_clips
from diffusion import noise_source
from media import pieces
from metrics import fit_motions, recover
from model import DiT
from sample import (
    chunk_shape,
    denoise_chunk,
    from_image,
    from_noise,
    from_video,
    prompt_at,
    stream,
    text_to_video,
)
from text import TextEncoder
from vae import VAE
from weights import load_model, shipped


def steered(model, vae, text, image=None, video=None, strength=1.0, changes=()):
    """Stream chunks that begin with an image, follow a video, or change their prompt.

    changes: [(first frame, keys)].
    """
    noise, shape = noise_source(generator()), chunk_shape(model, vae, len(text))
    times = model.schedule.timesteps(model.config.steps, strength)
    starts = from_noise(noise, shape, times)
    if image is not None:
        starts = itertools.chain(from_image(image, vae), starts)
    if video is not None:
        starts = from_video(video, vae, noise, shape, times, model.schedule)
    prompt = prompt_at([(0, model.text_keys(text)), *changes])
    cache = model.new_cache(len(text), *shape[-2:])
    denoise = functools.partial(denoise_chunk, model, noise=noise)
    return stream(model, vae, prompt, starts, cache, denoise)


def joined(chunks, count=None):
    """Join the first `count` chunks of a stream, or all: (latents, video)."""
    latents, videos = zip(*itertools.islice(chunks, count), strict=True)
    return torch.cat(latents, dim=1), torch.cat(videos, dim=1)


@pytest.fixture
def world():
    """A tiny student, its VAE and a prompt."""
    model = tiny_model(num_layers=2).requires_grad_(False)
    return model, tiny_vae(), tiny_text()


def plain(world, count):
    """What a stream makes that nothing steers."""
    return joined(text_to_video(*world, generator()), count)


def film(frames=45):
    return sample_clips(1, generator()).render(0, frames)[0]


# --------------------------------------------------------------------------------- along a video
def test_strength_0_reconstructs_the_video(world):
    vae = world[1]
    latents = vae.encode(film()[None])
    x, video = joined(steered(*world, video=pieces(film(), 3, 4), strength=0.0))
    assert (x - latents).abs().max() < 1e-5
    assert (video - vae.decode(latents)).abs().max() < 1e-5


def test_strength_1_ignores_the_video(world):
    x, _ = joined(steered(*world, video=pieces(film(), 3, 4), strength=1.0))
    assert torch.equal(x, plain(world, 4)[0])


def test_a_strength_between_stays_near_the_video(world):
    latents = world[1].encode(film()[None])
    x, _ = joined(steered(*world, video=pieces(film(), 3, 4), strength=0.3))
    alone, _ = plain(world, 4)
    assert 0.01 < (x - latents).abs().mean() < (alone - latents).abs().mean()


@pytest.mark.parametrize("frames", [1, 3, 9, 10, 21, 44])
def test_a_video_gives_as_many_frames_as_it_has(world, frames):
    made = steered(*world, video=pieces(film(frames), 3, 4), strength=0.5)
    assert joined(made)[1].shape[1] == frames


def test_output_begins_before_the_video_has_ended(world):
    read = []

    def reading():
        for frame in film():
            read.append(frame)
            yield frame

    next(steered(*world, video=pieces(reading(), 3, 4), strength=0.5))
    assert len(read) == 9


# --------------------------------------------------------------------------------- from an image
def test_the_first_frame_is_the_image(world):
    vae, image = world[1], film(1)
    x, video = joined(steered(*world, image=image), 4)
    assert x.shape[1] == 1 + 3 * 3
    assert video.shape[1] == 1 + 3 * 12
    assert torch.equal(video[:, :1], vae.decode(vae.encode(image[None])))


def test_what_follows_an_image_is_conditioned_on_it(world):
    one, other = (joined(steered(*world, image=image), 4)[0] for image in (film(1), -film(1)))
    assert not torch.allclose(one[:, 1:], other[:, 1:])


# -------------------------------------------------------------------------------- by new prompts
def test_a_new_prompt_takes_effect_with_the_next_chunk(world):
    changes = [(20, world[0].text_keys(tiny_text("a blue star")))]
    changed, _ = joined(steered(*world, changes=changes), 4)
    same, _ = plain(world, 4)
    assert torch.equal(changed[:, :6], same[:, :6])
    assert not torch.allclose(changed[:, 6:9], same[:, 6:9])


def test_a_stream_asks_for_its_prompt_once_a_chunk(world):
    model, vae, text = world
    noise, keys, asked = noise_source(generator()), model.text_keys(text), []

    def prompt(frames):
        asked.append(frames)
        return keys

    starts = from_noise(noise, (1, 3, 8, 8, 8), model.schedule.timesteps(1))
    denoise = functools.partial(denoise_chunk, model, noise=noise)
    made = stream(model, vae, prompt, starts, model.new_cache(1, 8, 8), denoise)
    list(itertools.islice(made, 6))
    assert asked == [0, 9, 21, 33, 45, 57]


def test_the_keys_of_a_prompt_are_made_once(world):
    made = []
    world[0].text_embedding.register_forward_hook(lambda *_: made.append(1))
    plain(world, 6)
    assert len(made) == 1


def test_each_prompt_holds_from_its_frame_to_the_next():
    prompt = prompt_at([(0, "red"), (16, "blue"), (40, "green")])
    assert [prompt(frames) for frames in (0, 15, 16, 39, 40, 1000)] == [
        *["red"] * 2,
        *["blue"] * 2,
        *["green"] * 2,
    ]


# ------------------------------------------------------------------------ with the shipped weights
@pytest.fixture(scope="module")
def shipped_world():
    """The student, its VAE and the text encoder."""
    paths = {DiT: "student", VAE: "vae", TextEncoder: "text_encoder"}
    return [load_model(net, shipped(name)).requires_grad_(False) for net, name in paths.items()]


@pytest.fixture(scope="module")
def shown(shipped_world):
    """The truth of clips streamed with prompts, as `recover` finds it in their pixels."""
    model, vae, encoder = shipped_world

    def make(prompts, **steering):
        return recover(joined(steered(model, vae, encoder(prompts), **steering), 7)[1])

    return make


def some_clips(motions, colour=0):
    """Two clips of each of the motions, all squares of one colour on black."""
    every = sample_clips(4000, generator(5))
    every = every[(every.background == 0) & (every.shape == 1)]
    clips = every[torch.cat([torch.nonzero(every.motion == m)[:2, 0] for m in motions])]
    return replace(clips, colour=torch.full_like(clips.colour, colour))


def repainted(clips):
    """The same clips in the third colour, on the third background."""
    third = torch.full_like(clips.colour, 2)
    return replace(clips, colour=third, background=third)


def are_in(found, clips, span=slice(None)):
    """The shares of frames in the clips' colour and on their background: the smaller one."""
    right = [
        (getattr(found, name)[:, span] == getattr(clips, name)[:, None]).float().mean()
        for name in ("colour", "background")
    ]
    return min(right)


def moving_as(found, clips):
    """The share of clips whose motion is the one that they should have."""
    return (fit_motions(found, clips.shape).argmin(1) == clips.motion).float().mean()


@pytest.fixture(scope="module")
def from_images(shown):
    """(clips, truth of their first frames, truth of the streams that begin with these)."""
    clips = some_clips([SLIDE, RISE, PULSE], colour=2)
    image = clips.render(0, 1)
    return clips, recover(image), shown(clips.prompts(), image=image[:, 0])


def test_the_object_of_an_image_stays_where_it_is(from_images):
    _, first, found = from_images
    assert (found.x[:, 0] - first.x[:, 0]).abs().max() < 0.5
    assert (found.y[:, 0] - first.y[:, 0]).abs().max() < 0.5


@pytest.mark.parametrize("name", ["colour", "shape", "background"])
def test_the_looks_of_an_image_are_kept(from_images, name):
    _, first, found = from_images
    assert (getattr(found, name) == getattr(first, name)).float().mean() > 0.95


def test_the_object_of_an_image_moves_as_the_prompt_says(from_images):
    clips, _, found = from_images
    assert moving_as(found, clips) > 0.7


@pytest.fixture(scope="module")
def followed(shown):
    """(clips, the same in new colours, truth of streams along the clips towards these)."""
    clips = some_clips([SLIDE, RISE, CLOCKWISE, BOUNCE])
    source, painted = clips.render(), repainted(clips)
    parts = iter([source[:, :9], *source[:, 9:].split(12, dim=1)])
    return clips, painted, shown(painted.prompts(), video=parts, strength=0.7)


def off_track(found, clips):
    """How far the recovered tracks lie from the clips': the mean in pixels."""
    x, y, _, _ = clips.track(torch.arange(81) / 16)
    return ((found.x - x).square() + (found.y - y).square()).sqrt().mean()


def test_a_video_that_is_followed_takes_the_prompts_colours(followed):
    _, painted, found = followed
    assert are_in(found, painted) > 0.9


def test_a_video_that_is_followed_keeps_its_motion(followed, shown):
    clips, painted, found = followed
    assert off_track(found, clips) < 5
    assert off_track(shown(painted.prompts()), clips) > 10


@pytest.fixture(scope="module")
def changed(shown, shipped_world):
    """(clips, the same in new colours, truth of streams that change to these at frame 45)."""
    clips, (model, _, encoder) = some_clips([SLIDE, CLOCKWISE]), shipped_world
    painted = repainted(clips)
    changes = [(45, model.text_keys(encoder(painted.prompts())))]
    return clips, painted, shown(clips.prompts(), changes=changes)


def test_a_new_prompt_shows_within_two_chunks(changed):
    clips, painted, found = changed
    assert are_in(found, clips, slice(45)) > 0.95
    assert are_in(found, painted, slice(69, None)) > 0.95


def test_the_motion_goes_on_across_a_new_prompt(changed):
    clips, _, found = changed
    leap = (found.x.diff(dim=1).square() + found.y.diff(dim=1).square()).sqrt()
    assert leap[:, 42:54].amax() < 4  # pixels from frame to frame
    assert moving_as(found, clips) > 0.7
