import importlib
import os

import pytest
import torch
from conftest import PROMPT

import flags
import sample
import vae
from flags import fastest_threads as measure_threads
from weights import UserError

SCRIPTS = [
    "attention",
    "bench",
    "data",
    "dmd",
    "evaluate",
    "nfd_consistency",
    "nfd_evaluate",
    "nfd_teacher",
    "nfd_vae",
    "ode_init",
    "play",
    "sample",
    "teacher",
    "vae",
]


def value(kind, text):
    """What a flag of a certain type makes of a text."""
    parser = flags.Parser("A test.")
    parser.add_argument("--flag", type=kind)
    return parser.parse_args([f"--flag={text}"]).flag


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", "", "10000000000", "nan"])
def test_a_whole_number_outside_its_range_is_refused(text):
    with pytest.raises(UserError, match="--flag"):
        value(flags.whole(), text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.1", "1.5", "half", ""])
def test_a_number_outside_its_range_is_refused(text):
    with pytest.raises(UserError, match="--flag"):
        value(flags.real(0, 1), text)


def test_a_number_may_be_asked_to_be_above_its_bound():
    assert value(flags.real(0), "0") == 0
    with pytest.raises(UserError, match="greater than 0"):
        value(flags.real(0, above=True), "0")


@pytest.mark.parametrize("text", ["-1", "9223372036854775808", "1e3"])
def test_a_seed_beyond_64_bits_is_refused(text):
    with pytest.raises(UserError, match="--flag"):
        value(flags.SEED, text)


def test_the_largest_seed_seeds_a_generator():
    assert torch.Generator().manual_seed(value(flags.SEED, str(2**63 - 1)))


@pytest.mark.parametrize("text", ["", " ", "caf\udce9"])
def test_text_that_is_empty_or_not_utf8_is_refused(text):
    with pytest.raises(UserError, match="--flag"):
        value(flags.words, text)


@pytest.mark.parametrize("text", ["", "nowhere.png", "."])
def test_a_file_that_is_not_there_or_a_folder_is_refused(text):
    with pytest.raises(UserError, match="--flag"):
        value(flags.source, text)


@pytest.mark.parametrize("text", ["", "a.jpg", "nowhere/a.png", "."])
def test_a_picture_that_cannot_be_written_is_refused(text):
    with pytest.raises(UserError, match="--flag"):
        value(flags.picture, text)


@pytest.mark.parametrize("name", ["warp", "meta", "cuda:99", "cpu:x", "cpu:7"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UserError, match="not available"):
        flags.on_device(name)


def test_the_device_the_threads_and_the_dtype_are_told(capsys):
    before = torch.get_num_threads()
    assert flags.on_device("cpu", "float32", 1) == (torch.device("cpu"), torch.float32)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    assert capsys.readouterr().out == "on cpu with 1 threads, in float32\n"


def test_one_or_all_threads_are_chosen():
    assert measure_threads.__wrapped__() in (1, torch.get_num_threads(), os.cpu_count())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_something_of_every_flag_and_its_default(name, command_line):
    status, out, _ = command_line(importlib.import_module(name), "--help")
    assert status == 0
    told = out[out.index("-h, --help") :].split("\n  -")[1:]
    assert told or name == "attention"
    for flag in told:
        names, _, text = " ".join(flag.split()).partition(" ")
        assert text.strip(), names
        switched = "[" not in flag and flag.split()[0].lstrip("-").upper() not in flag
        assert switched or "(" in text or names in OPTIONAL, names


OPTIONAL = {"-prompt", "-prompt-at", "-image", "-video", "-prompts", "-actions"}


def test_flags_are_checked_before_a_folder_is_made(command_line):
    status, _, err = command_line(vae, "--steps", 0, "--out", "made")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert not os.listdir()


def test_words_that_the_encoder_does_not_know_are_told(capsys):
    flags.say_what_is_unknown(["a pink elephant on a black background"], 16)
    out = capsys.readouterr().out
    assert "takes pink, elephant for" in out
    assert "counterclockwise" in out


def test_known_prompts_are_taken_without_a_word(capsys):
    flags.say_what_is_unknown([PROMPT, "An orange star, spinning!"], 16)
    assert not capsys.readouterr().out


def test_a_prompt_without_a_word_is_refused():
    with pytest.raises(UserError, match="'!!!' has no word"):
        flags.say_what_is_unknown(["!!!"], 16)


def test_a_prompt_that_is_cut_off_is_told(capsys):
    flags.say_what_is_unknown(["a " * 17], 16)
    assert "only the first 16 words count" in capsys.readouterr().out


def test_a_short_form_of_a_flag_is_refused(command_line):
    status, _, err = command_line(sample, "--promp", PROMPT)
    assert status == 2
    assert "--promp" in err


@pytest.mark.parametrize(("frames", "begin"), [(1, 0), (9, 0), (10, 9), (21, 9), (22, 21)])
def test_the_last_chunk_begins_after_all_frames_of_those_before(frames, begin):
    assert flags.last_chunk(frames, 3, 4) == begin


@pytest.mark.parametrize("text", ["", "made/", ".", "x" * 241, "/dev/null/x"])
def test_results_that_cannot_be_written_are_refused(text):
    with pytest.raises(UserError, match="--flag"):
        value(flags.results, text)


def test_results_may_name_a_folder_that_is_not_there_yet(tmp_path):
    assert value(flags.results, str(tmp_path / "new" / "table"))
