import json
import os
from pathlib import Path

import pytest
import torch
from conftest import full_disk, generator, tiny_model, tiny_text, tiny_vae
from torch.nn import functional as F

import evaluate
from data import sample_clips
from evaluate import write_results
from metrics import diversity, fixed_set, health, measure
from text import TextEncoder
from weights import UserError, save_weights, shipped


# ----------------------------------------------------------------------------------- the measures
@pytest.fixture(scope="module")
def real():
    clips = sample_clips(16, generator(), "all")
    return clips, clips.render()


def blurred(video):
    kernel = torch.exp(-(torch.linspace(-2, 2, 9) ** 2) / 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]
    planes = F.pad(video.flatten(0, 2)[:, None], (4,) * 4, mode="replicate")
    return F.conv2d(planes, kernel).view_as(video)


@pytest.fixture(scope="module")
def scores(real):
    """name of a corruption -> its measures, means over the clips."""
    clips, video = real
    g = generator(1)
    made = {
        "real": video,
        "blurred": blurred(video),
        "frozen": video[:, :1].expand_as(video),
        "shuffled in time": video[:, torch.randperm(81, generator=g)],
        "noisy": video + 0.1 * torch.randn(video.shape, generator=g),
    }
    return {
        name: {k: v.mean().item() for k, v in measure(v, clips).items()} for name, v in made.items()
    }


@pytest.mark.parametrize(
    ("name", "least"),
    [("text alignment", 99), ("frame quality", 99), ("identity", 99), ("temporal quality", 98.5)],
)
def test_real_clips_score_nearly_100(scores, name, least):
    assert scores["real"][name] >= least


LOOKS = ("colour", "shape", "background")


@pytest.fixture(scope="module")
def shuffled(real):
    """name -> its measure of real clips, each under the prompt of another one, many times."""
    clips, video = real
    made = [measure(video[:, :9], clips[torch.arange(16).roll(k)]) for k in (1, 5, 7, 11, 13)]
    return {name: torch.cat([found[name] for found in made]).mean() for name in made[0]}


@pytest.mark.parametrize("name", LOOKS)
def test_looks_are_seen_in_any_frame(real, name):
    clips, video = real
    assert measure(video[:, :9], clips)[name].mean() == 100


@pytest.mark.parametrize("name", LOOKS)
def test_shuffled_prompts_score_what_chance_gives(real, shuffled, name):
    truth = getattr(real[0], name)
    others = truth[torch.stack([torch.arange(16).roll(k) for k in range(1, 16)])]
    assert abs(shuffled[name] - 100 * (others == truth).float().mean()) < 12


def test_shuffled_prompts_are_not_aligned(shuffled):
    assert shuffled["text alignment"] < 5


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


@pytest.mark.parametrize(
    ("corruption", "group", "least"),
    [
        ("frozen", "frame quality", 98),
        ("shuffled in time", "colour", 100),
        ("blurred", "motion", 100),
    ],
)
def test_what_a_corruption_leaves_alone_keeps_its_score(scores, corruption, group, least):
    assert scores[corruption][group] >= least


@pytest.mark.parametrize(
    "name", ["text alignment", "colour", "shape", "motion", "frame quality", "identity"]
)
def test_a_clip_that_shows_nothing_scores_nothing(real, name):
    clips, video = real
    empty = video[:2, :, :, :1, :1].expand(-1, -1, -1, 64, 64)
    assert not measure(empty, clips[:2])[name].any()


@pytest.fixture(scope="module")
def varied():
    """(clips of two prompts, 16 of each: video [2, 16, F, 3, H, W], what the prompts ask for)."""
    clips = sample_clips(3000, generator(5))
    same = [clips[(clips.shape == 1) & (clips.motion == motion)][:16] for motion in (1, 3)]
    asked = clips[torch.tensor([torch.nonzero(clips.motion == m)[0] for m in (1, 3)])]
    asked.shape[:] = 1
    return torch.stack([c.render(0, 17) for c in same]), asked


def test_diversity_of_the_data_is_full(varied):
    assert diversity(*varied) > 85


def test_diversity_of_one_clip_is_none(varied):
    video, asked = varied
    assert diversity(video[:, :1].expand(-1, 16, -1, -1, -1, -1), asked) < 1


def test_the_fixed_set_is_fixed():
    (clips, seeds), (again, same) = fixed_set(), fixed_set()
    assert clips.prompts() == again.prompts()
    assert seeds.initial_seed() == same.initial_seed()


def test_the_fixed_set_has_each_prompt_more_than_once():
    prompts = fixed_set()[0].prompts()
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_fixed_set_is_healthy_when_real():
    clips, _ = fixed_set()
    found = health(clips.render(), clips)
    assert found["text alignment"] == 100
    assert found["diversity"] == 0


# ------------------------------------------------------------------------------------- the tables
@pytest.mark.parametrize("kind", ["teacher", "causal", "student"])
def test_every_kind_of_model_makes_the_frames_asked_for(kind):
    model = tiny_model(num_layers=2)
    text = tiny_text().expand(2, -1, -1)
    video = evaluate.make_videos(kind, model, tiny_vae(), text, generator(), frames=11, steps=2)
    assert video.shape == (2, 11, 3, 64, 64)


def test_table_has_a_row_for_each_model():
    teacher = {"text alignment": 95.04}
    student = {"text alignment": 93.0, "diversity": 80.0}
    lines = evaluate.table({"teacher": teacher, "student": student}).splitlines()
    assert lines[2].startswith("| teacher | 95.0 |")
    assert len(lines) == 4


def test_the_text_alignment_of_each_motion_is_told(monkeypatch):
    def make_videos(kind, model, vae, text, generator):
        return clips.render()  # all as prompted, but for those that move

    clips = sample_clips(10, generator(), "held-out")
    clips.rate[:] = 0
    monkeypatch.setattr(evaluate, "make_videos", make_videos)
    told = evaluate.evaluate("student", None, None, TextEncoder(), 10, split="held-out")["motions"]
    assert told.pop("standing still") == 100
    assert told
    assert set(told.values()) == {0}


def rows_of(name):
    return json.loads(Path(f"{name}.json").read_text())["rows"]


@pytest.fixture
def ablate(command_line, tmp_path, monkeypatch):
    """Calls --ablation with one row, whose weights one step trains: -> (stdout, its measures)."""
    path = str(tmp_path / "student.safetensors")
    row = ("distilled", "student", path, "dmd.py --clips 16")
    monkeypatch.setattr(evaluate, "ABLATION", [row])
    options = ["--train-options", "--steps 1 --batch-size 1", "--clips", 1, "--out", "table"]

    def call():
        status, out, err = command_line(evaluate, "--ablation", *options)
        assert status == 0, err
        return out, rows_of("table")["distilled"]

    return call


def test_ablation_trains_what_is_missing_and_measures_it(ablate):
    out, measures = ablate()
    assert "| distilled | " in out
    assert Path("table.md").read_text() in out
    assert measures["colour"] in (0, 100)
    assert Path("student.safetensors").exists()


def test_ablation_does_not_train_what_is_there(ablate):
    model = tiny_model()
    save_weights("student.safetensors", model.state_dict(), model.config)
    written = os.path.getmtime("student.safetensors")
    out, _ = ablate()
    assert "| distilled | " in out
    assert os.path.getmtime("student.safetensors") == written


def test_ablation_says_which_training_did_not_end(command_line, tmp_path, monkeypatch):
    path = tmp_path / "a" / "student.safetensors"
    row = ("distilled", "student", str(path), "dmd.py --steps 0")
    monkeypatch.setattr(evaluate, "ABLATION", [row])
    status, _, err = command_line(evaluate, "--ablation")
    assert status == 2
    assert "a/student.safetensors" in err.splitlines()[-1]


def test_over_time_measures_first_and_last_ten_seconds(command_line):
    models = ["--teacher", "--student", shipped("student")]
    flags = ["--over-time", *models, "--clips", 1, "--seconds", 16, "--out", "time"]
    status, out, err = command_line(evaluate, *flags)
    assert status == 0, err
    assert "first 10 s" in out
    assert "last 10 s" in out
    (row,) = rows_of("time").values()
    assert len(row["frame quality"]) == 12  # windows of 5 seconds, one a second, in 16
    assert "teacher.safetensors is left out" in out


def test_one_kind_named_without_a_file_is_the_shipped_one_alone(command_line):
    status, _, err = command_line(evaluate, "--student", "--clips", 1, "--out", "table")
    assert status == 0, err
    with open("table.json") as file:
        assert [name.split()[0] for name in json.load(file)["rows"]] == ["student"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", 20], "--seconds goes with --over-time"),
        (["--train-options=--steps 1"], "--train-options goes with --ablation"),
        (["--ablation", "--student", shipped("student")], "--student does not go with --ablation"),
        (["--ablation", "--teacher"], "--teacher does not go with --ablation"),
        (["--ablation", "--causal", shipped("student")], "--causal does not go with --ablation"),
        (["--causal"], "--causal: expected at least one argument"),
        (["--over-time", "--split", "train"], "--split does not go with --over-time"),
    ],
)
def test_flags_without_an_effect_are_refused(command_line, arguments, words):
    status, _, err = command_line(evaluate, *arguments, "--out", "new/table")
    assert status == 2
    assert words in err
    assert not Path("new").exists()


@pytest.mark.parametrize("given", [["--student"], ["--over-time"], ["--ablation"]])
def test_what_is_measured_depends_on_no_fast_dtype(command_line, monkeypatch, given):
    def on_device(device, dtype, threads):
        raise UserError(f"the dtype is {dtype}")

    monkeypatch.setattr(evaluate.flags, "on_device", on_device)
    assert "the dtype is float32" in command_line(evaluate, *given)[2]


def test_models_are_measured_in_the_dtype_asked_for(command_line, monkeypatch):
    def make_videos(kind, model, vae, text, generator):
        assert model.head.head.weight.dtype == vae.mean.dtype == torch.bfloat16
        return torch.zeros(len(text), 81, 3, 64, 64, dtype=torch.bfloat16)

    monkeypatch.setattr(evaluate, "make_videos", make_videos)
    flags = ["--student", "--clips", 1, "--dtype", "bfloat16", "--out", "table"]
    assert command_line(evaluate, *flags)[0] == 0
    assert json.loads(Path("table.json").read_text())["dtype"] == "torch.bfloat16"


def test_a_student_is_no_causal_teacher(command_line):
    status, _, err = command_line(evaluate, "--causal", shipped("student"))
    assert status == 2
    assert "holds 'student', not causal teacher" in err


# ------------------------------------------------------------------------------- results and docs
@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder whose docs/RESULTS.md has two places for tables, one of which has been filled."""
    monkeypatch.setattr(evaluate, "ROOT", str(tmp_path))
    (tmp_path / "docs").mkdir()
    page = "before\n<!-- results/speed.json -->\nold\nrows\n<!-- end -->\nbetween\n"
    page += "<!-- results/other.json -->\n<!-- end -->\n"
    (tmp_path / "docs" / "RESULTS.md").write_text(page)
    write_results(str(tmp_path / "results" / "speed"), {"rows": {"a": 1}}, "| a | \\1 |")
    return tmp_path


def test_results_stand_in_the_docs_where_their_marker_is(results):
    page = "before\n<!-- results/speed.json -->\n| a | \\1 |\n<!-- end -->\nbetween\n"
    page += "<!-- results/other.json -->\n<!-- end -->\n"
    assert (results / "docs" / "RESULTS.md").read_text() == page


def test_results_are_kept_as_json(results):
    assert json.loads((results / "results" / "speed.json").read_text())["rows"] == {"a": 1}


def test_results_that_do_not_fit_on_the_disk_leave_nothing(tmp_path):
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*speed\.json"):
        write_results(str(tmp_path / "speed"), {"rows": 3000 * "x"}, "")
    assert not os.listdir(tmp_path)


def test_results_that_cannot_be_written_are_named():
    with pytest.raises(UserError, match="cannot write /dev/null/speed"):
        write_results("/dev/null/speed", {}, "")
