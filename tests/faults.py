"""Kill trainings and damage what they save: what is lost, and what is said.

python tests/faults.py [PART...]    takes some minutes; ends with status 1 if a claim fails

On the smallest teacher, with random latents for clips. A run of one process, and one of two, is
killed twenty times (kill -9) at random moments and resumed; its weights must be those of a run
that nothing happened to, bit for bit.
"""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
STEPS = {1: 150, 2: 30}  # of a run of so many processes
EVERY, KILLS = 3, 20
# teacher.py on random latents, without sheets, and slow enough to be killed in the midst of a step
SCRIPT = f"""
import os, sys, time
sys.path[:0] = [{TESTS!r}, {ROOT!r}]
sys.argv[0] = os.path.join({ROOT!r}, "teacher.py")
import launch, steps, teacher
inner = teacher.optimise
def slow(optimizer, loss, clip=1.0):
    time.sleep(0.05)
    bad = os.environ.get("NAN_RANK") == str(launch.RANK)
    return inner(optimizer, loss * float("nan") if bad else loss, clip)
teacher.optimise = slow
with steps.on_tiny_networks("."):
    teacher.fixed_sheet = lambda *_, **__: {{}}
    launch.run_main(teacher.main)
"""
FLAGS = (
    f"--config tiny.json --vae vae.safetensors --clips 4 --save-every {EVERY} "
    "--batch-size 2 --dtype float32 --threads 1 --device cpu"
)


def start(out, processes=1, *more, **environment):
    """Start a training in a process group of its own."""
    command = [sys.executable, "script.py"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launch, "script.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command += [*FLAGS.split(), "--steps", str(STEPS[processes]), "--out", out, *more]
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def end(process):
    """Wait for a training: (status, what it said)."""
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


@functools.lru_cache(1)
def read_step(path, changed):
    return torch.load(path, weights_only=True)["step"]


def done(out):
    """How many steps the last checkpoint of a run has."""
    path = os.path.join(out, "checkpoint.pt")
    return read_step(path, os.stat(path).st_mtime_ns) if os.path.exists(path) else 0


def wait_for_steps(out, process, count):
    """Wait until the last checkpoint of a running training has so many steps."""
    while process.poll() is None and done(out) < count:
        time.sleep(0.1)


def workers(process):
    """The process ids of the workers that torchrun started."""
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(children) as file:
        return [int(pid) for pid in file.read().split()]


def kill(process):
    """Kill a training and its workers at once: whether it was still running."""
    if process.poll() is None:
        for pid in [*workers(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def check(claim, holds, told=""):
    print("holds:  " if holds else "FAILS:  ", claim, f"  ({told})" if told else "", flush=True)
    if not holds:
        failed.append(claim)


def same(one, other):
    """Whether two runs wrote the same weights."""
    files = [os.path.join(out, "teacher.safetensors") for out in (one, other)]
    contents = []
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            file.seek(8 + size)  # the header tells when and how
            contents.append(file.read())
    return contents[0] == contents[1]


@functools.cache
def undisturbed(processes):
    """Let a run of so many processes end: its folder."""
    out = f"{processes} undisturbed"
    status, said = end(start(out, processes))
    check(f"{out}: ends", status == 0, said[-300:] if status else "")
    return out


def kill_often(name, processes, kills):
    """Kill a run again and again until it has been killed `kills` times, and let it end."""
    lost, moments, begin, killed = [], random.Random(0), time.time(), 0
    whole = undisturbed(processes)
    while killed < kills and done(name) < STEPS[processes]:
        more = ["--resume"] if os.path.isdir(name) else []
        before = done(name) if more else 0
        process = start(name, processes, *more)
        target = before + moments.randint(0, 2)
        while process.poll() is None and (not os.path.isdir(name) or done(name) < target):
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 0.3))
        killed += kill(process)
        lost.append(done(name) - before)
        print(f"{name}: {killed} kills, {done(name)} steps", flush=True)
    status, said = end(start(name, processes, "--resume"))
    what = f"{killed} kills in {time.time() - begin:.0f} s; steps kept between kills: {lost}"
    check(
        f"{name}: goes on after every kill -9",
        status == 0 and killed == kills and min(lost) >= 0,
        what,
    )
    if status:
        print(said[-1500:])
    check(f"{name}: ends in the undisturbed run's weights", status == 0 and same(name, whole))
    left = [n for n in os.listdir(name) if n.endswith(".tmp")]
    check(f"{name}: leaves no half-written file", not left, str(left))


def damage(name, change):
    """Damage the last checkpoint of a stopped run, and resume it."""
    shutil.copytree("stopped", name)
    path = os.path.join(name, "checkpoint.pt")
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(change(content))
    status, said = end(start(name, 1, "--resume"))
    told = [line for line in said.splitlines() if "the one before" in line]
    check(f"a checkpoint that was {name}: the one before is used", status == 0, str(told))
    check(f"a checkpoint that was {name}: one line says so", len(told) == 1)
    check(
        f"a checkpoint that was {name}: the same weights",
        status == 0 and same(name, undisturbed(1)),
    )


def flip(content):
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def stop(name, processes):
    """Send SIGTERM to a run after its first checkpoint: (status of its process, what it said)."""
    process = start(name, processes)
    wait_for_steps(name, process, EVERY)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    return end(process)


# -------------------------------------------------------------------------------------- the parts
def killed():
    kill_often("killed", 1, KILLS)


def two_killed():
    kill_often("two killed", 2, KILLS // 5)


def damaged():
    status, said = stop("stopped", 1)
    holds = status == 0 and "stopped after step" in said
    check("SIGTERM saves and ends with status 0", holds, f"{done('stopped')} steps")
    damage("cut", lambda content: content[: len(content) // 2])
    damage("flipped", flip)


def two_stopped():
    begin = time.time()
    status, said = stop("two stopped", 2)
    told = f"{done('two stopped')} steps, status {status}, {time.time() - begin:.0f} s"
    check("SIGTERM to torchrun saves", "stopped after step" in said, told)
    more = ["--resume", "--steps", str(STEPS[2])]
    status, said = end(start("two stopped", 1, *more))
    check("one process goes on from what two saved", status == 0, said[-300:] if status else "")


def busy():
    process = start("busy")
    wait_for_steps("busy", process, EVERY)
    for more in ([], ["--resume"]):
        status, said = end(start("busy", 1, *more))
        told = said.strip().splitlines()[-1]
        check(f"two runs into one folder are refused, {more}", status == 2, told)
    kill(process)
    status, said = end(start("busy", 1, "--resume", "--seed", "1"))
    told = said.strip().splitlines()[-1]
    check("--resume with other settings says which", status == 2 and "--seed 1" in told, told)


def not_a_number():
    begin = time.time()
    status, said = end(start("nan", 2, NAN_RANK="1"))
    told = [line for line in said.splitlines() if "failed at step" in line]
    spent = f"{time.time() - begin:.0f} s, {told[:1]}"
    check("one process's NaN stops all", status != 0 and told, spent)


def dead():
    process = start("dead", 2)
    wait_for_steps("dead", process, EVERY)
    begin, (_, victim) = time.time(), workers(process)
    os.kill(victim, signal.SIGKILL)
    status, said = end(process)
    told = [line for line in said.splitlines() if re.search("another process|Signal 9", line)]
    spent = time.time() - begin
    holds = status and told and spent < 60
    check("one dead process ends all in a minute", holds, f"{spent:.0f} s, {told[:2]}")


PARTS = {
    part.__name__: part
    for part in (killed, damaged, two_stopped, busy, not_a_number, dead, two_killed)
}


def main(names):
    print(f"torch {torch.__version__}, in {os.getcwd()}", flush=True)
    for name in names or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    failed, folder = [], tempfile.mkdtemp()
    sys.path[:0] = [TESTS, ROOT]
    from conftest import TINY, tiny_vae

    from weights import save_weights

    os.chdir(folder)
    vae = tiny_vae()
    save_weights("vae.safetensors", vae.state_dict(), vae.config)
    for name, text in {"tiny.json": json.dumps(TINY), "script.py": SCRIPT}.items():
        with open(name, "w") as file:
            file.write(text)
    main(sys.argv[1:])
    print(f"{len(failed)} claims fail" if failed else "all claims hold")
    sys.exit(bool(failed))
