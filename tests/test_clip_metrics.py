import pytest
import torch
from conftest import generator

from clip_metrics import drift, looks


def test_looks_of_a_plain_picture_are_known():
    video = torch.tensor([1.0, -1.0, -1.0]).view(1, 1, 3, 1, 1).expand(1, 2, 3, 8, 8)
    found = looks(video)
    assert found["sharpness"].tolist() == found["contrast"].tolist() == [[0, 0]]
    assert found["colour"].tolist() == found["red"].tolist() == [[255, 255]]
    assert found["blue"].tolist() == [[0, 0]]


@pytest.fixture
def video():
    return torch.rand(1, 1, 3, 16, 16, generator=generator()) * 2 - 1


def test_a_blurred_picture_is_less_sharp(video):
    blurred = torch.nn.functional.avg_pool2d(video[0], 3, 1, 1)[None]
    assert looks(blurred)["sharpness"] < 0.5 * looks(video)["sharpness"]


def chunks(video, frames, fade):
    """A stream of 12 frames a chunk, whose red fades by so many levels a frame."""
    for start in range(0, frames, 12):
        part = video.expand(1, 12, -1, -1, -1).clone() * 0.5
        part[:, :, 0] -= fade / 127.5 * torch.arange(start, start + 12).view(1, 12, 1, 1)
        yield None, part


def test_a_stream_that_stays_as_it_is_does_not_drift(video):
    first, last = drift(chunks(video, 480, fade=0), 480).values()
    assert last.pop("change") == 0
    assert first == last


def test_a_change_of_colour_is_measured_over_the_whole_stream(video):
    rows = drift(chunks(video, 480, fade=0.1), 480)
    # red fades by 0.1 levels a frame; the middles of the ends are 320 frames apart
    assert rows["last 10 s"]["change"] == pytest.approx(0.1 * 320 / 3, rel=1e-3)


def test_a_stream_is_measured_without_being_kept(video):
    rows = drift(chunks(video, 10**9, fade=0), 400)  # which has no end
    assert set(rows) == {"first 10 s", "last 10 s"}
